"""The atlas: every neuron of a model as a row of one table.

1. From the statistics alone: class, activation frequency with N and the bound 3/N, size of the contribution.
2. With a model and windows, from one pass up to the unembedding (`active`): triggers, detectors, what activity says
   about the position, and how the classes move with N. The bits of the pass are read a few neurons at a time.
3. With a model: what the neuron's output row does to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from neuron_sparsity.adapter import MLPAdapter, ModelInfo, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.statistics import NeuronStatistics, check_corpus
from neuron_sparsity.store import decode, make_folder, provenance
from neuron_sparsity.taxonomy.active import ActiveBits, watch
from neuron_sparsity.taxonomy.classes import (
    CLASSES,
    NONZERO,
    ClassPoint,
    ClassRule,
    active_counts,
    bound_95,
)
from neuron_sparsity.taxonomy.files import ATLAS_FILE, ROLES, read_table, write_table
from neuron_sparsity.taxonomy.logits import RoleRule, logit_effects
from neuron_sparsity.taxonomy.positions import POSITIONAL_BITS, information_bits, information_by_chance_bits
from neuron_sparsity.taxonomy.triggers import TriggerRule, Triggers
from neuron_sparsity.typed import checked

__all__ = ["Atlas", "atlas"]

_WORK_BYTES = 64 << 20  # of activity and counts that are read at once
N_LOGIT_TOKENS = 10


@dataclass(frozen=True, eq=False)
class Atlas:
    """Every neuron of a model, a row each, and what the columns mean.

    Attributes:
        table: pandas DataFrame, ordered by (layer, neuron); `docs/atlas.md` lists the columns.
        model: What was measured.
        corpus: On what the statistics were recorded (`Windows.describe`).
        n_tokens: N of the statistics.
        watched: On what triggers and positions were counted, or None if they were not.
        definitions: What each group of columns means, in words.
        curve: Neurons in each class on more and more tokens; the windows are in a random order.
        question: What the atlas was asked for: the same question on the same model and text has the same answer.
        provenance: Versions and command.
    """

    table: Any
    model: ModelInfo
    corpus: dict[str, Any]
    n_tokens: int
    watched: dict[str, Any] | None
    definitions: dict[str, str]
    curve: tuple[ClassPoint, ...]
    question: dict[str, Any]
    provenance: dict[str, Any]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many neurons there are of each kind, of the kinds that were measured.

        Returns:
            `classes`; `triggers` (covered by a small set, detectors of tokens, bigrams and trigrams, positional);
            `roles`.
        """
        kinds = {"classes": {name: int((self.table["class"] == name).sum()) for name in CLASSES}}
        kinds["classes"]["never"] = int((self.table["activation_count"] == 0).sum())
        if "n_triggers" in self.table:
            kinds["triggers"] = {"covered_by_few": int((self.table["n_triggers"] > 0).sum())}
            for n, name in enumerate(("token_detector", "bigram_detector", "trigram_detector"), start=1):
                kinds["triggers"][name] = int((self.table["ngram"] == n).sum())
            kinds["triggers"]["positional"] = int(self.table["is_positional"].sum())
        if "logit_role" in self.table:
            kinds["roles"] = {name: int((self.table["logit_role"] == name).sum()) for name in ROLES}
        return kinds

    def to_json(self) -> dict[str, Any]:
        """Return everything but the table, and the counts; plain values, ready for JSON."""
        return self._header() | {"counts": self.counts()}

    def save(self, folder: str | Path) -> Path:
        """Write `atlas.parquet` into a folder; return its path.

        Raises:
            RunFolderError: If it cannot be written.
        """
        path = Path(folder) / ATLAS_FILE
        make_folder(path.parent)
        write_table(path, self.table, self._header())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Atlas:
        """Read `atlas.parquet` of a folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / ATLAS_FILE
        table, header = read_table(path)
        found: Atlas = decode(path, lambda: _build(table, header))
        return found

    def _header(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "table"}
        return data | {"model": self.model.to_json(), "curve": [point.to_json() for point in self.curve]}


def _build(table: Any, header: dict[str, Any]) -> Atlas:
    values = {name: header[name] for name in Atlas.__dataclass_fields__ if name != "table"}
    values["model"] = ModelInfo.from_json(header["model"])
    values["curve"] = tuple(checked(ClassPoint.from_json(point)) for point in header["curve"])
    found = Atlas(table=table, **values)
    for corpus in (found.corpus, found.watched):
        if corpus is not None:
            check_corpus(corpus)
    if found.n_tokens < 1 or not all(isinstance(words, str) for words in found.definitions.values()):
        raise ValueError(f"{found.n_tokens} tokens, definitions {list(found.definitions)}")
    return checked(found)  # type: ignore[no-any-return]


def atlas(
    stats: NeuronStatistics,
    model: Any = None,
    windows: Windows | None = None,
    *,
    folder: str | Path | None = None,
    active: str | None = None,
    classes: ClassRule | None = None,
    triggers: TriggerRule | None = None,
    positional_bits: float = POSITIONAL_BITS,
    logits: bool = True,
    roles: RoleRule | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Atlas:
    """Return what kind of neuron each one is.

    Args:
        stats: What `record` returned.
        model: TransformerLens model or adapter, the one that was recorded. Without it, only what the statistics tell.
        windows: With a model, the corpus on which triggers and positions are counted: one more pass.
        folder: Where `atlas.parquet` is saved, and read instead if the same question is answered there already.
        active: What counts as active: a name in `stats.threshold_names`, or `"nonzero"`. If None, the first recorded
            thresholds, else `"nonzero"`.
        classes: What makes a neuron dead, rare and always on.
        triggers: What makes a set of triggers small, and a neuron a detector.
        positional_bits: Information on the position, above what chance shows, from which on a neuron is positional.
        logits: With a model, whether to work out the effects on logits: a product of all output rows with the
            unembedding.
        roles: What makes a neuron one of prediction, suppression or partition.
        seed: Of the order in which the windows enter the curve of classes.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called as it goes.

    Returns:
        The atlas; saved in `folder` too, if one is given.

    Raises:
        MeasurementError: If post-activations are NaN or infinite, or memory or disk run out.
        ModelError: If the effects on logits of this model cannot be told.
        RunFolderError: If `folder` cannot be written, or what it holds is damaged.
        ValueError: If there are no such thresholds, the model is not the one that was recorded, windows come without a
            model, or `positional_bits` is not positive.

    Example:
        >>> made = ns.atlas(stats, model, corpus)  # doctest: +SKIP
        >>> made.table.query("is_token_detector and layer < 3")[["layer", "neuron", "triggers"]]  # doctest: +SKIP
    """
    rules = (classes or ClassRule(), triggers or TriggerRule(), roles or RoleRule())
    if not positional_bits > 0:
        raise ValueError(f"positional_bits must be > 0, got {positional_bits}")
    if windows is not None and model is None:
        raise ValueError("windows need a model to run on them: atlas(stats, model, windows)")
    adapter = None if model is None else attach(model)
    if adapter is not None and adapter.info.fingerprint != stats.model.fingerprint:
        raise ValueError(
            f"the statistics are of {stats.model.name} with other weights than {adapter.info.name}; record this model"
        )
    _, words = active_counts(stats, active)
    active = active or (stats.threshold_names[0] if stats.threshold_names else NONZERO)
    logits = logits and adapter is not None
    question = _question(stats, windows, active, rules, positional_bits, logits, seed)
    if folder is not None and (Path(folder) / ATLAS_FILE).is_file():
        kept = Atlas.load(folder)
        if kept.question == question:
            return kept
    columns, curve = _of_statistics(stats, active, rules[0])
    definitions = {"active": words, "classes": rules[0].words}
    if adapter is not None and windows is not None:
        cuts = None if active == NONZERO else stats.thresholds[:, stats.threshold_names.index(active)]
        bits = watch(adapter, windows, cuts, batch_size=batch_size, progress=progress)
        pass_columns, curve = _of_pass(bits, windows, adapter, rules, positional_bits, seed, progress)
        columns |= pass_columns
        definitions |= {"triggers": rules[1].words, "positional": _positional_words(positional_bits)}
    if adapter is not None and logits:
        columns |= _of_logits(adapter, rules[2], stats, progress)
        definitions["logits"] = rules[2].words
    made = Atlas(
        table=_frame(columns, stats.model),
        model=stats.model,
        corpus=stats.corpus,
        n_tokens=stats.n_tokens,
        watched=None if windows is None else windows.describe(),
        definitions=definitions,
        curve=curve,
        question=question,
        provenance=provenance(seed=seed) | ({} if adapter is None else {"forward": adapter.forward}),
    )
    if folder is not None:
        made.save(folder)
    return made


def _question(
    stats: NeuronStatistics,
    windows: Windows | None,
    active: str,
    rules: tuple[ClassRule, TriggerRule, RoleRule],
    positional_bits: float,
    logits: bool,
    seed: int,
) -> dict[str, Any]:
    cuts = [] if active == NONZERO else stats.thresholds[:, stats.threshold_names.index(active)].tolist()
    return {
        "fingerprint": stats.model.fingerprint,
        "recorded": stats.corpus["sha256"],
        "watched": None if windows is None else windows.sha256,
        "active": active,
        "thresholds": cuts,
        "classes": asdict(rules[0]),
        "triggers": asdict(rules[1]),
        "positional_bits": positional_bits,
        "logits": asdict(rules[2]) if logits else None,
        "seed": seed,
    }


def _positional_words(positional_bits: float) -> str:
    return (
        f"mutual information of activity and position, at least {positional_bits:g} bits (logarithm to base 2) above "
        "what as many activations at random places show; position 0 of a window left out"
    )


def _of_statistics(
    stats: NeuronStatistics, active: str, rule: ClassRule
) -> tuple[dict[str, Any], tuple[ClassPoint, ...]]:
    """Return the columns that the recording alone gives, and the classes at its N."""
    count, _ = active_counts(stats, active)
    layer_sum = stats.contribution_sum.sum(dim=1, keepdim=True)
    share = (stats.contribution_sum / layer_sum).nan_to_num(0.0)  # a layer that gives nothing has no shares
    columns = {
        "class": np.array(CLASSES)[rule.codes(count, stats.n_tokens)],
        "activation_frequency": count / stats.n_tokens,
        "activation_count": count,
        "frequency_bound_95": np.where(count == 0, bound_95(stats.n_tokens), np.nan),
        "mean_contribution": stats.mean_contribution.numpy(),
        "rms_contribution": stats.rms_contribution.numpy(),
        "max_contribution": stats.contribution_max.double().numpy(),
        "contribution_share_of_layer": share.numpy(),
    }
    return columns, (rule.point(count, stats.n_tokens),)


def _of_pass(
    bits: ActiveBits,
    windows: Windows,
    adapter: MLPAdapter,
    rules: tuple[ClassRule, TriggerRule, RoleRule],
    positional_bits: float,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, Any], tuple[ClassPoint, ...]]:
    """Return the columns that the bits of a pass give, and how the classes move with N."""
    shape, n_pos = (bits.n_layers, bits.n_neurons), windows.window - 1
    found = Triggers(windows.tokens.numpy(), *shape, rules[1])
    information, total = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    stops = _checkpoints(windows.n_windows)
    order = np.random.default_rng(seed).permutation(windows.n_windows)
    seen = np.zeros((len(stops), *shape), dtype=np.int64)
    size = max(1, _WORK_BYTES // (4 * windows.n_tokens + found.bytes_a_neuron))
    for layer, neurons, active in bits.blocks(size):
        if progress:
            progress("reading triggers", layer * shape[1] + neurons.start, shape[0] * shape[1])
        by_window = active.sum(axis=1, dtype=np.int64)[order].cumsum(axis=0)
        seen[:, layer, neurons] = by_window[np.array(stops) - 1]
        active[:, 0] = 0  # BOS, or an attention sink
        at = active[:, 1:].sum(axis=0, dtype=np.int64)
        information[layer, neurons], total[layer, neurons] = (
            information_bits(at, windows.n_windows),
            at.sum(axis=0),
        )
        found.add(layer, neurons.start, active.reshape(-1, active.shape[2]))
    if progress:
        progress("reading triggers", shape[0] * shape[1], shape[0] * shape[1])
    chance = information_by_chance_bits(total.ravel(), windows.n_windows, n_pos).reshape(shape)
    columns = _trigger_columns(found, adapter) | {
        "position_information_bits": information,
        "position_information_by_chance_bits": chance,
        "is_positional": information - chance >= positional_bits,
    }
    points = [rules[0].point(count, stop * windows.window) for count, stop in zip(seen, stops, strict=True)]
    return columns, tuple(points)


def _checkpoints(n_windows: int) -> list[int]:
    """Return numbers of windows at which classes are counted: all, half of them, and so on down to one.

    Example:
        >>> _checkpoints(20)
        [1, 2, 5, 10, 20]
    """
    stops = []
    while n_windows:
        stops.append(n_windows)
        n_windows //= 2
    return stops[::-1]


def _trigger_columns(found: Triggers, adapter: MLPAdapter) -> dict[str, Any]:
    shape = found.n_covering_tokens.shape
    n_triggers, ngram = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    words = np.empty(shape, dtype=object)
    for place in np.ndindex(shape):
        words[place] = []
    decode_ids = _decoder(adapter)
    for place, detection in found.found.items():
        n_triggers[place] = len(detection.ids)
        ngram[place] = detection.n if detection.detector else 0
        words[place] = [decode_ids(ids) for ids in detection.ids]
    return {
        "n_covering_tokens": found.n_covering_tokens,
        "n_triggers": n_triggers,
        "triggers": words,
        "is_token_detector": ngram == 1,
        "ngram": ngram,
    }


def _of_logits(
    adapter: MLPAdapter, rule: RoleRule, stats: NeuronStatistics, progress: Progress | None
) -> dict[str, Any]:
    effects = logit_effects(adapter, k=min(N_LOGIT_TOKENS, int(adapter.model.cfg.d_vocab)), progress=progress)
    decode_ids = _decoder(adapter)
    return {
        "top_logit_tokens": _strings(effects.top_ids, decode_ids),
        "bottom_logit_tokens": _strings(effects.bottom_ids, decode_ids),
        "logit_mean": effects.mean,
        "logit_std": effects.std,
        "logit_skew": effects.skew,
        "logit_kurtosis": effects.kurtosis,
        "logit_role": rule.roles(effects.std, effects.skew, effects.kurtosis, stats.w_norm.double().numpy()),
    }


def _strings(ids: Int[NDArray, "layer neuron k"], decode_ids: Callable[[Sequence[int]], str]) -> NDArray[np.object_]:
    """Return lists of strings, [layer, neuron]; every token is decoded once."""
    text = {token: decode_ids((token,)) for token in np.unique(ids).tolist()}
    found = np.empty(ids.shape[:2], dtype=object)
    for place in np.ndindex(found.shape):
        found[place] = [text[token] for token in ids[place].tolist()]
    return found


def _decoder(adapter: MLPAdapter) -> Callable[[Sequence[int]], str]:
    """Return what turns token ids into text; without a tokenizer, the ids."""
    tokenizer = adapter.model.tokenizer
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids)))


def _frame(columns: dict[str, Any], model: ModelInfo) -> Any:
    import pandas as pd

    layer, neuron = np.meshgrid(np.array(model.layers), np.arange(model.d_mlp), indexing="ij")
    both = {"layer": layer.astype(np.int32), "neuron": neuron.astype(np.int32)} | columns
    lists = {name: values.ravel() for name, values in both.items()}
    return pd.DataFrame({name: v.tolist() if v.dtype.kind in "OU" else v for name, v in lists.items()})
