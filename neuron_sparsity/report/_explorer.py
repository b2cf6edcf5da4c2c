"""The data behind the table of all neurons: what every neuron brings along, and what only a chosen part of them does.

Every neuron has its numbers. Example texts, triggers and logit tokens would make a page of hundreds of megabytes, so
they go along for a part, as many of every layer: those of largest mean contribution, those whose largest contribution
stands out most from their mean, the rarest that fire at all, and some at random; whoever wants another one asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neuron_sparsity.kernels import histogram_edges
from neuron_sparsity.report._classes import Activity, array, largest_is_first, layer_labels
from neuron_sparsity.report._packed import Packed, asinh_codes, log_codes
from neuron_sparsity.report._text import visible_token
from neuron_sparsity.statistics import CONTEXT_BEFORE
from neuron_sparsity.taxonomy.files import ROLES

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.saliency import NeuronSaliency

__all__ = ["Explorer", "atlas_columns", "explorer", "flat_indices", "kind_codes", "stand_in"]

LARGE = 65_536  # neurons beyond which numbers are stored to 1 % and histograms go along for the chosen part only
KINDS = (
    "token detector",
    "bigram detector",
    "trigram detector",
    "positional",
    *(role for role in ROLES if role != "none"),
)
_KIND_COLUMNS = ("is_token_detector", "ngram", "is_positional", "logit_role")
_MOST_CHARACTERS = 60  # of a trigger or token
_NUMBERS = (  # of an atlas: column, name, heading, unit, scale
    ("n_triggers", "triggers", "triggers", "count", "asinh"),
    ("position_information_bits", "position information", "position, bits", "bits", "log"),
    ("logit_skew", "logit skew", "logit skew", "number", "asinh"),
    ("logit_kurtosis", "logit kurtosis", "logit kurtosis", "number", "asinh"),
)
_LISTS = (("triggers", 5), ("top_logit_tokens", 10), ("bottom_logit_tokens", 10))


@dataclass(frozen=True)
class Explorer:
    """The packed data and what the page says of it.

    Attributes:
        text: Base64, as `Packed.text` returns it.
        n_neurons: Neurons in the table.
        n_chosen: Neurons that bring examples along.
        n_examples: Examples of each of those.
        histograms: Whether every neuron has its histogram.
        rounding_percent: Largest error of a number, in percent.
        lists: Columns of the atlas that are lists of tokens and are shown.
    """

    text: str
    n_neurons: int
    n_chosen: int
    n_examples: int
    histograms: bool
    rounding_percent: float
    lists: tuple[str, ...]


def atlas_columns(atlas: Any, labels: Sequence[int], width: int) -> dict[str, NDArray[Any]]:
    """Return the columns of an Atlas, or of a DataFrame with its columns, as arrays of one value a neuron.

    Raises:
        ValueError: If it does not have one row a neuron, ordered by layer and neuron.
    """
    if atlas is None:
        return {}
    frame = getattr(atlas, "table", atlas)
    missing = [name for name in ("layer", "neuron") if name not in frame.columns]
    if missing:
        raise ValueError(f"an atlas needs the columns layer and neuron, it has no {missing[0]}")
    found = {str(name): np.asarray(frame[name]) for name in frame.columns}
    expected = (np.repeat(np.asarray(labels), width), np.tile(np.arange(width), len(labels)))
    if len(frame) != len(expected[0]):
        raise ValueError(
            f"the atlas has {len(frame):,} rows, the statistics {len(expected[0]):,} neurons; make it from these"
        )
    if not (np.array_equal(found["layer"], expected[0]) and np.array_equal(found["neuron"], expected[1])):
        raise ValueError("the rows of the atlas are not ordered by layer and neuron; sort it by these two columns")
    return found


def explorer(
    stats: NeuronStatistics,
    active: Activity,
    removed: AblationResult | None = None,
    *,
    saliency: NeuronSaliency | None = None,
    atlas: Any = None,
    neurons: Iterable[tuple[int, int]] = (),
    thresholds: Sequence[float] = (),
) -> Explorer:
    """Return the data of the table of all neurons.

    Args:
        stats: The run.
        active: How often each neuron is active.
        removed: Gives the order in which neurons can go.
        saliency: Gives what it predicts of removing each neuron alone.
        atlas: An Atlas or DataFrame; the columns that are there are shown.
        neurons: (layer, neuron) that bring their examples along besides the chosen ones.
        thresholds: Drawn into the histograms, one a layer.

    Raises:
        ValueError: If a neuron that is asked for does not exist, or the atlas or the saliency is of other neurons.
    """
    labels, (n_layers, width) = layer_labels(stats), active.frequency.shape
    extra = atlas_columns(atlas, labels, width)
    rise = _predicted_rise(saliency, removed, (n_layers, width))
    wanted = flat_indices(stats, neurons)
    n_tokens = sum(most for name, most in _LISTS if name in extra)
    order, capacity, n_examples = _order(stats, active, n_tokens, wanted)
    while True:
        chosen = np.sort(order[:capacity])
        found = _packed(stats, active, removed, rise, extra, chosen, n_examples, thresholds)
        over = len(found.text) / text_bytes(n_layers * width)
        if over <= 1 or capacity <= max(len(wanted), 1):
            return found
        # Texts that pack badly; the numbers of all neurons, which stay, are a part of what is over.
        capacity = max(len(wanted), 1, int(min(0.9, over**-2) * capacity))


def _packed(
    stats: NeuronStatistics,
    active: Activity,
    removed: AblationResult | None,
    rise: NDArray[np.float64] | None,
    extra: dict[str, NDArray[Any]],
    chosen: NDArray[np.int64],
    n_examples: int,
    thresholds: Sequence[float],
) -> Explorer:
    labels, (n_layers, width) = layer_labels(stats), active.frequency.shape
    table = _Table(Packed(), n_layers * width)
    window = int(stats.corpus.get("window") or 0)
    head = {"width": width, "layers": labels, "tokens": stats.n_tokens, "window": window, "n": table.n_neurons}
    table.packed.header |= head | {"kinds": list(KINDS), "columns": []}
    _numbers(table, stats, active)
    _atlas_numbers(table, extra)
    if rise is not None:
        table.column("rise", "removed alone", "removed alone, predicted", "rise", "asinh", rise)
    _removal(table, removed, labels)
    names = [name for name, _ in _LISTS if name in extra]
    table.packed.add("chosen", chosen, "u4")
    strings = _Strings()
    _examples(table.packed, stats, chosen, n_examples, strings)
    _lists(table.packed, extra, chosen, strings)
    every = table.n_neurons <= LARGE
    _histograms(table.packed, stats, thresholds, None if every else chosen)
    table.packed.header["strings"] = strings.texts
    return Explorer(
        table.packed.text(), table.n_neurons, len(chosen), n_examples, every, 0.05 if every else 1.0, tuple(names)
    )


@dataclass
class _Table:
    packed: Packed
    n_neurons: int

    def column(self, key: str, label: str, short: str, unit: str, scale: str, values: NDArray[Any]) -> None:
        """Add a column of numbers headed `short`; `unit` is percent (of a share), rise, number, count or bits."""
        levels = 65_534 if self.n_neurons <= LARGE else 4_094
        encode = log_codes if scale == "log" else asinh_codes
        codes, low, high, *step = encode(np.asarray(values, dtype=np.float64).ravel(), levels)
        self.packed.add(key, codes, "u2")
        shape = {"key": key, "label": label, "short": short, "unit": unit, "scale": scale, "low": low, "high": high}
        shape |= {"step": step[0]} if step else {}
        self.packed.header["columns"].append(shape)


@dataclass
class _Strings:
    """Texts of the page, each once, as they are shown; 0 stands for none."""

    texts: list[str] = field(default_factory=list)
    _index: dict[str, int] = field(default_factory=dict)

    def code(self, token: object) -> int:
        text = visible_token(str(token)[:_MOST_CHARACTERS])
        if text not in self._index:
            self.texts.append(text)
            self._index[text] = len(self.texts)
        return self._index[text]


def flat_indices(stats: NeuronStatistics, neurons: Iterable[tuple[int, int]]) -> list[int]:
    """Return the places of (layer, neuron) among all neurons of the statistics, each once.

    Raises:
        ValueError: If there is no such neuron.
    """
    labels, width, found = layer_labels(stats), array(stats.zero_count).shape[1], []
    for layer, neuron in neurons:
        if layer not in labels or not 0 <= neuron < width:
            raise ValueError(
                f"there is no neuron {layer}:{neuron}; layers are {labels[0]} to {labels[-1]}, neurons 0 to {width - 1}"
            )
        found.append(labels.index(layer) * width + neuron)
    return list(dict.fromkeys(found))


def stand_in(removed: AblationResult | None) -> str:
    """Return what predictions put in a neuron's place: "zero" if that is what was removed by, else "mean"."""
    return "zero" if removed is not None and removed.replacement == "zero" else "mean"


def _predicted_rise(
    saliency: NeuronSaliency | None, removed: AblationResult | None, shape: tuple[int, int]
) -> NDArray[np.float64] | None:
    """Return the rise of the mean loss in nats that gradients predict of removing each neuron alone.

    "resample" is predicted as the mean, which is what the page then says: exact to first order, and too low to second.

    Raises:
        ValueError: If the saliency is not of `shape`, one value a neuron.
    """
    if saliency is None:
        return None
    constant = 0.0 if stand_in(removed) == "zero" else saliency.mean_activation
    rise: NDArray[np.float64] = array(saliency.predicted_rise(constant)).astype(np.float64)
    if rise.shape != shape:
        raise ValueError(f"the saliency is of {list(rise.shape)} neurons, the statistics of {list(shape)}")
    return rise


def _numbers(table: _Table, stats: NeuronStatistics, active: Activity) -> None:
    mean = array(stats.contribution_sum) / stats.n_tokens
    table.packed.add("class", active.codes, "u1")
    table.column("frequency", "active on", "active on", "percent", "log", active.frequency)
    table.column("mean", "mean contribution", "mean contribution", "number", "log", mean)
    table.column(
        "largest", "largest contribution", "largest contribution", "number", "log", array(stats.contribution_max)
    )
    total = np.where(np.isfinite(mean), mean, 0.0).sum(axis=1, keepdims=True)
    share = np.divide(mean, total, out=np.zeros(mean.shape), where=total > 0)
    table.column("share", "share of its layer", "share of its layer", "percent", "log", share)
    table.packed.header["definition"] = active.definition


def _removal(table: _Table, removed: AblationResult | None, labels: Sequence[int]) -> None:
    """The place of each neuron in the removable set, from 1; 0 stays."""
    if removed is None:
        return
    order, row = np.zeros(table.n_neurons, dtype=np.int64), {label: index for index, label in enumerate(labels)}
    width = table.n_neurons // len(labels)
    pairs = np.array(
        [[row[int(layer)], int(neuron)] for layer, neuron in removed.removable if int(layer) in row], dtype=np.int64
    ).reshape(-1, 2)
    order[pairs[:, 0] * width + pairs[:, 1]] = np.arange(1, len(pairs) + 1)
    table.packed.add("removal", order, "u4")


def _atlas_numbers(table: _Table, extra: dict[str, NDArray[Any]]) -> None:
    for name, label, short, unit, scale in _NUMBERS:
        if name in extra:
            values = extra[name].astype(np.float64)
            table.column(name, label, short, unit, scale, np.maximum(values, 0.0) if scale == "log" else values)
    if any(source in extra for source in _KIND_COLUMNS):
        table.packed.add("kind", kind_codes(extra), "u1")


def kind_codes(columns: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return of neurons with these columns of an atlas what they are: bit k stands for `KINDS[k]`."""
    codes = np.zeros((), dtype=np.int64)
    for name in (source for source in _KIND_COLUMNS if source in columns):
        values = np.asarray(columns[name])
        if name == "is_token_detector":
            codes = codes | values.astype(bool)
        elif name == "ngram":
            codes = codes | 2 * (values == 2) | 4 * (values == 3)
        elif name == "is_positional":
            codes = codes | 8 * values.astype(bool)
        else:
            codes = codes | sum((16 << index) * (values == role) for index, role in enumerate(KINDS[4:]))
    return codes


def _order(
    stats: NeuronStatistics, active: Activity, n_tokens: int, wanted: Sequence[int]
) -> tuple[NDArray[np.int64], int, int]:
    """Return all neurons, first who brings examples along, how many of them do, and how many examples of each.

    A neuron has `n_tokens` texts besides its examples; a token takes 2 bytes before it is packed.
    """
    n, width = active.frequency.size, active.frequency.shape[1]
    budget, context, n_examples = budget_bytes(n), stats.example_context.shape[3], stats.example_value.shape[2]
    cost = 2 * n_tokens + 8
    of_example = 2 * context + 8
    if n * (cost + n_examples * of_example) > budget:
        n_examples = min(n_examples, 3)
    capacity = min(n, max(len(wanted), budget // (cost + max(n_examples, 1) * of_example)))
    mean = array(stats.contribution_sum) / stats.n_tokens
    mean = np.where(np.isfinite(mean), mean, -1.0)
    peak = np.divide(array(stats.contribution_max), mean, out=np.zeros(mean.shape), where=mean > 0)
    rarest = np.where(active.frequency > 0, -active.frequency, -2.0)
    at_random = np.random.default_rng(0).random(mean.shape)
    ranks = [_ranks(score) for score in (mean, peak, rarest, at_random)]
    first = np.minimum.reduce(ranks)
    has_example = array(stats.example_position)[:, :, 0] >= 0 if n_examples else np.zeros(mean.shape, dtype=bool)
    priority = np.where(has_example, first, first + width).ravel()
    priority[list(wanted)] = -1
    return np.argsort(priority, kind="stable"), capacity, n_examples


def budget_bytes(n_neurons: int) -> int:
    """Return what examples and lists of tokens may take before they are packed: 1.9 MB for 46,080 neurons."""
    return 1_800_000 + 2 * n_neurons


def text_bytes(n_neurons: int) -> int:
    """Return what the packed table may take of the page: 3.6 MB for 46,080 neurons, 11.9 MB for 458,752."""
    return 2_700_000 + 20 * n_neurons


def _ranks(score: NDArray[Any]) -> NDArray[np.int64]:
    """Return the place of each neuron in its layer, the largest score first."""
    order = np.argsort(-score, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(score.shape[1])[None, :], axis=1)
    return ranks


def _examples(
    packed: Packed, stats: NeuronStatistics, chosen: NDArray[np.int64], n_examples: int, strings: _Strings
) -> None:
    row, neuron = np.divmod(chosen, array(stats.example_value).shape[1])
    values = array(stats.example_value)[row, neuron, :n_examples].astype(np.float64)
    position = array(stats.example_position)[row, neuron, :n_examples].astype(np.int64)
    tokens = array(stats.example_context)[row, neuron, :n_examples]
    there = (position >= 0) & np.isfinite(values)
    tokens = np.where(there[..., None], tokens, -1)
    ids, inverse = np.unique(tokens, return_inverse=True)
    names = stats.token_strings
    codes = np.array([0 if i < 0 else strings.code(names.get(int(i), f"⟨token {i}⟩")) for i in ids], dtype=np.int64)
    packed.add("example_token", codes[inverse], "u2" if len(strings.texts) <= 65_535 else "u4")
    value, low, high = log_codes(np.where(there, np.abs(values), np.nan), 65_534)
    packed.add("example_value", value, "u2")
    window = int(stats.corpus.get("window") or 0) or (1 << 32) - 1
    packed.add("example_window", np.where(there, position // window, 0), "u4")
    packed.add("example_first", largest_is_first(stats)[row, neuron], "u1")
    packed.add("example_pos", np.where(there, position % window, 0), "u4")
    packed.header["examples"] = {"count": n_examples, "context": int(tokens.shape[2]), "at": CONTEXT_BEFORE}
    packed.header["examples"] |= {"low": low, "high": high}


def _lists(packed: Packed, extra: dict[str, NDArray[Any]], chosen: NDArray[np.int64], strings: _Strings) -> None:
    packed.header["lists"] = {}
    for name, most in _LISTS:
        if name not in extra:
            continue
        codes = np.zeros((len(chosen), most), dtype=np.int64)
        for place, items in enumerate(extra[name][chosen]):
            kept = [] if items is None else list(items)[:most]
            codes[place, : len(kept)] = [strings.code(item) for item in kept]
        packed.add(name, codes, "u2" if len(strings.texts) <= 65_535 else "u4")
        packed.header["lists"][name] = most


def _histograms(
    packed: Packed, stats: NeuronStatistics, thresholds: Sequence[float], chosen: NDArray[np.int64] | None
) -> None:
    """Counts on a logarithmic scale of 255 steps: the bin of all below 2^-20, then the first used to the last."""
    histogram = array(stats.histogram)
    flat = histogram.reshape(-1, histogram.shape[2])
    flat = flat if chosen is None else flat[chosen]
    used = 1 + np.flatnonzero(flat[:, 1:].any(axis=0))
    kept = [0, *range(int(used[0]), int(used[-1]) + 1)] if used.size else [0]
    scale = 255.0 / np.log1p(stats.n_tokens)
    packed.add("histogram", np.rint(np.log1p(flat[:, kept]) * scale), "u1")
    lower = [*histogram_edges().tolist(), None]
    packed.header["histogram"] = {
        "every": chosen is None,
        "bins": len(kept),
        "edges": [*(lower[place] for place in kept), lower[kept[-1] + 1]],
        "thresholds": [cut if np.isfinite(cut) else None for cut in map(float, thresholds)],
    }
