"""Remove neurons for good, for all tokens, and measure what that costs.

`ablate` (replacement.py) is the intervention. `removable_neurons` is the measurement, and `removable_sets` several of
them that share passes:

1. The dense losses on the calibration part of the corpus.
2. The search for the longest prefix of a ranking that costs at most p percent (removal.py).
3. Controls: as many random neurons of every layer, several seeds, on as many windows as their damage needs to be seen.
   Without them no ranking is worth its name.
4. Held-out text: the rise on windows the search never saw, with its 95 % interval (confirmation.py).

All of it costs at most 10 F, one F being a dense forward pass over the calibration part, and 5 F more for each further
p. Nearly half of that is the search's in any case: many controls or a large held-out part come on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from neuron_sparsity import parallel
from neuron_sparsity.adapter import MLPAdapter, ModelInfo
from neuron_sparsity.confirmation import compare, confirm, rise_percent
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import check_ranking, means_sketch, measurable
from neuron_sparsity.holding import held_fields
from neuron_sparsity.overlap import all_among, share_text
from neuron_sparsity.perplexity import Progress, default_batch_size
from neuron_sparsity.ranking import Ranking
from neuron_sparsity.removal import PrefixSearch, Removals, order_hash
from neuron_sparsity.replacement import BANK_TOKENS, REPLACEMENTS, Replacer, ablate
from neuron_sparsity.store import decode, make_folder, provenance, read_json, write_json
from neuron_sparsity.tally import DENSE, prefix_key
from neuron_sparsity.typed import percents

__all__ = [
    "PARTIAL",
    "REPLACEMENTS",
    "AblationResult",
    "ablate",
    "drop_finished_search",
    "removable_neurons",
    "removable_sets",
]

PARTIAL = "ablation.partial.json"
"""What an interrupted search has measured."""

_CALIBRATION, _HELDOUT = "calibration", "held-out"
_MAX_PASSES = (10.0, 5.0)  # for the first p, with the dense passes; for each further one
_LEAST_SEARCH = (5.0, 2.25)  # of that


@dataclass(frozen=True)
class AblationResult:
    """The largest removable set of a ranking.

    Attributes:
        p_percent: Rise of perplexity that was allowed.
        ranking: Name of the ranking.
        scope: Whether neurons were ranked over the model or within layers.
        replacement: What took the neurons' place.
        n_neurons: Neurons of the model.
        n_removable: How many of the weakest may go.
        removable: They, as (layer, neuron), weakest first.
        reached: False where everything may go: all neurons were removed, and that holds.
        ppl_dense: Perplexity of the model as it is, on the calibration part.
        ppl_ablated: The same without the removable neurons.
        ppl_increase_percent: The measured rise.
        curve: Every measured count: n_removed, ppl, ppl_increase_percent; ascending. Those measured on some windows
            only have n_tokens below the corpus', and are estimates for all of it with their standard_error_percent.
        control: The same number of random neurons of every layer: `seeds`, the `ppl` of each, mean
            `ppl_increase_percent`, its spread over the seeds `sd_percent`, and `ratio`, the mean over the ranking's
            own rise. Where `n_tokens` is below the corpus', these are estimates for all of it, paired with the
            ranking's own pass, with a `standard_error_percent`. None where nothing is removable, or no controls were
            asked for.
        heldout: The same removal on text that the search never saw: `interval` is the 95 % interval of the rise in
            percent (None with fewer than 5 windows: then nothing is said to hold), `verdict` is "holds", "not refuted"
            or "fails", `holds` whether it is the first; `holding` is the shorter prefix that holds there, chosen on
            that text, or None. `unseen_in_search`, `unseen_by_ranking`: whether the search and the ranking are known
            to have seen nothing of it.
        ranking_corpus: What the ranking was made on; `unseen_in_search`: whether the calibration part shares nothing
            with it. A ranking flatters itself on its own text.
        model: What was measured.
        corpus: The calibration part.
        cost: `forward_passes` over the calibration part, all in all, each counted once; `seconds` of this call.
        provenance: Versions, seed, command.
        ranking_sha256: Hash of the order of removal.
        resolved: Whether the search ended by itself: the next larger count measured to cost more is 1 % further on
            at most, or next to it, and none up to 25 % above holds. If not, its passes were spent, and more may go.
        per_p: What was found for each p that was asked for together.
        means_sketch: What tells the means that took the neurons' place from others; empty where none did, and in
            older files.
    """

    p_percent: float
    ranking: str
    scope: str
    replacement: str
    n_neurons: int
    n_removable: int
    removable: tuple[tuple[int, int], ...]
    reached: bool
    ppl_dense: float
    ppl_ablated: float
    ppl_increase_percent: float
    curve: tuple[dict[str, float], ...]
    control: dict[str, Any] | None
    heldout: dict[str, Any] | None
    ranking_corpus: dict[str, Any]
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]
    ranking_sha256: str = ""
    resolved: bool = True
    per_p: tuple[dict[str, Any], ...] = ()
    means_sketch: tuple[float, ...] = ()

    def holding_set(self) -> AblationResult:
        """Return the set that was measured to hold on the held-out text: this one, or the shorter one found there.

        All that is told of the shorter one (rise, curve, corpus) was measured on the text that it was chosen on.

        Raises:
            ValueError: If none was found to hold.
        """
        return replace(self, **held_fields(self))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `ablation.json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "model": self.model.to_json(),
            "removable": [list(pair) for pair in self.removable],
            "curve": list(self.curve),
            "per_p": list(self.per_p),
            "means_sketch": list(self.means_sketch),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AblationResult:
        """Read the content of `ablation.json` back; files of the first version lack the last four fields.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        fields = cls.__dataclass_fields__
        own = {name: data[name] for name in fields if name in data or fields[name].default is MISSING} | {
            "model": ModelInfo.from_json(data["model"]),
            "removable": tuple((int(layer), int(neuron)) for layer, neuron in data["removable"]),
            "curve": tuple(data["curve"]),
            "per_p": tuple(data.get("per_p", ())),
            "means_sketch": tuple(data.get("means_sketch", ())),
        }
        return cls(**own)


def removable_neurons(
    model: Any, windows: Windows, ranking: Ranking, *, p_percent: float = 1.0, **options: Any
) -> AblationResult:
    """Return the largest set of a ranking's weakest neurons whose removal raises perplexity by at most p percent.

    The set is a prefix of the ranking, found on the calibration part and then confirmed on held-out windows and
    against random controls.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus. Without `heldout`, half of its windows (every other one) are held out.
        ranking: Order of removal, made on this model.
        p_percent: Rise of perplexity that is allowed, > 0.
        **options: Those of `removable_sets`.

    Returns:
        The set, the curve that led to it, its controls and its held-out confirmation.

    Raises:
        ValueError: If p is not positive, the ranking is of another model or holds NaN, or the corpus is one window.
        MeasurementError: If losses are NaN or memory runs out.
    """
    return removable_sets(model, windows, ranking, p_percents=(p_percent,), **options)[0]


def removable_sets(
    model: Any,
    windows: Windows,
    ranking: Ranking,
    *,
    p_percents: Sequence[float] = (1.0, 5.0),
    replacement: str = "mean",
    heldout: Windows | None = None,
    ranked_on: Windows | None = None,
    n_controls: int = 3,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[AblationResult, ...]:
    """Return the removable sets of several p in one search: they share every pass.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus. Without `heldout`, half of its windows (every other one) are held out.
        ranking: Order of removal, made on this model.
        p_percents: Rises of perplexity that are allowed, > 0.
        replacement: `"mean"`, `"zero"` or `"resample"`, which draws from the calibration part.
        heldout: Windows to confirm on, not those that are searched; then the search takes all of `windows`.
        ranked_on: Text that the ranking was made on, if not on the calibration part: the result tells what it has
            seen of the others.
        n_controls: How many random controls, with seeds from `seed` on.
        seed: Of the controls, and of `"resample"`.
        folder: Where what was measured is kept after every piece of a pass, in `ablation.partial.json`; another call
            with the same model, order, texts and replacement goes on from there.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        One result for each p, in the order they were given.

    Raises:
        ValueError: If p is not positive, the ranking is of another model or holds NaN, the corpus is one window, or
            every held-out window is also searched.
        MeasurementError: If losses are NaN or memory runs out.
        RunFolderError: If the folder cannot be written, or what is kept there is damaged.
    """
    adapter = measurable(model, windows, heldout=heldout, ranked_on=ranked_on)
    p_percents = percents(p_percents)
    check_ranking(ranking, adapter)
    if n_controls < 0:
        raise ValueError(f"n_controls must be >= 0, got {n_controls}")
    if heldout is None:
        windows, heldout = windows.split(0.5)
    elif all_among(heldout, windows):
        raise ValueError("heldout holds nothing but windows that are searched too; give others, or leave it out")
    replacer = Replacer(
        adapter,
        replacement,
        means=ranking.mean_activation,
        corpus=windows if replacement == "resample" else None,
        seed=seed,
    )
    if ranked_on is not None and ranked_on.sha256 != ranking.corpus["sha256"]:
        raise ValueError(f"ranked_on is not what the ranking was made on ({ranking.corpus['name']}); leave it out")
    texts, asked = {_CALIBRATION: windows, _HELDOUT: heldout}, sorted(set(map(float, p_percents)))
    run = _Run(adapter, texts, ranking, ranked_on, replacer, seed, n_controls)
    run.begin(folder, batch_size, progress, asked)
    found = {p: run.result(p, first=p == asked[0]) for p in asked}
    together = tuple(_brief(found[p]) for p in sorted(found))
    return tuple(replace(found[float(p)], per_p=together) for p in p_percents)


def drop_finished_search(folder: Path, result: AblationResult) -> None:
    """Remove what a search has left in a folder, once its result is saved; that of another question stays."""
    path = folder / PARTIAL
    if parallel.leads() and path.is_file():
        question = read_json(path).get("question")
        own = (result.ranking_sha256, result.replacement)
        if isinstance(question, dict) and (question.get("order"), question.get("replacement")) == own:
            path.unlink()


class _Run:
    """One search: its passes, and what is read from them."""

    def __init__(
        self,
        adapter: MLPAdapter,
        texts: Mapping[str, Windows],
        ranking: Ranking,
        ranked_on: Windows | None,
        replacer: Replacer,
        seed: int,
        n_controls: int,
    ) -> None:
        self.adapter, self.texts, self.ranking, self.replacer, self.seed = adapter, texts, ranking, replacer, seed
        self.ranked_on, self.n_controls = ranked_on, n_controls
        self.sha256 = order_hash(ranking)
        self.start = time.perf_counter()
        self.share = texts[_HELDOUT].n_tokens / texts[_CALIBRATION].n_tokens
        self.removals: Removals
        self.limit = 0.0  # of all passes, for the p so far and the next one
        self.begun: dict[str, Any] = {"n_controls": n_controls, "passes": 0.0}  # what is asked, and was there before

    def begin(
        self, folder: str | Path | None, batch_size: int | None, progress: Progress | None, asked: list[float]
    ) -> None:
        """Take up what is kept in a folder, and make the dense pass."""
        if batch_size is None:  # one for all passes
            batch_size = default_batch_size(self.adapter, self.texts[_CALIBRATION].window)
        options = {"batch_size": batch_size, "progress": progress}
        path = None if folder is None else Path(folder) / PARTIAL

        def keep() -> None:
            if path is not None and parallel.leads():
                passes = {name: measured.to_json() for name, measured in self.removals.measured.items()}
                write_json(path, {"question": self._question(), "begun": self.begun, "passes": passes})

        self.removals = Removals(self.adapter, self.ranking, self.replacer, self.texts, options, keep)
        self.begun["p_percents"] = asked
        if path is not None:
            make_folder(path.parent)
            self._take_up(path)
        self.limit = self.begun["passes"]
        self.removals.dense(_CALIBRATION)
        self.measured = self.removals.measured[_CALIBRATION]
        self.ppl_dense = math.exp(self.measured.loss(DENSE))

    def _question(self) -> dict[str, Any]:
        """What passes belong to: the same, and they can be counted together."""
        means = self.ranking.mean_activation if self.replacer.replacement == "mean" else None
        return {
            "model": [self.adapter.info.fingerprint, self.adapter.info.dtype],
            "order": self.sha256,
            "replacement": self.replacer.replacement,
            "means": None if means is None else sha256(means.double().cpu().numpy().tobytes()).hexdigest(),
            "seed": self.seed if self.replacer.replacement == "resample" else None,
            "texts": {name: windows.sha256 for name, windows in self.texts.items()},
        }

    def _take_up(self, path: Path) -> None:
        data = read_json(path) if path.is_file() else {}
        if parallel.agreed("what was kept of a search", data.get("question")) != self._question():
            return  # of another question: it is written over
        for name, measured in self.removals.measured.items():
            decode(path, partial(lambda name, measured: measured.take_up(data["passes"][name]), name, measured))
        begun = data.get("begun", {})
        same = all(begun.get(name) == self.begun[name] for name in ("p_percents", "n_controls"))
        # The passes of another p are no part of what this one may cost; those of this call, interrupted, are.
        self.begun["passes"] = decode(path, lambda: float(begun["passes"])) if same else self.removals.passes

    def result(self, p_percent: float, *, first: bool) -> AblationResult:
        """Search, measure the controls and confirm, for one p."""
        target = math.log1p(p_percent / 100)
        comparing = self.n_controls * self.measured.levels[0] / self.measured.windows.n_windows
        if self.replacer.replacement == "resample":
            comparing += min(1.0, BANK_TOKENS / self.texts[_CALIBRATION].n_tokens)
        trying = (2 if first else 1) * self.share  # shorter prefixes on the held-out text; more if passes are left
        rest = comparing + trying + (2 if first else 1) * self.share
        most, least = (made[0 if first else 1] for made in (_MAX_PASSES, _LEAST_SEARCH))
        self.limit += max(most, least + rest)
        limit, search = self.limit, PrefixSearch(self.removals, _CALIBRATION)
        resolved = search.run(target, limit - rest)
        if not resolved and not search.answer(target):  # better a small set that is not confirmed as well than none
            resolved = search.run(target, limit - rest + trying)
        n = search.answer(target)
        rise, seeds = search.estimate(n)[0], [self.seed + k for k in range(self.n_controls)]
        control = compare(self.removals, _CALIBRATION, n, seeds, limit - rest + comparing) if n and seeds else None
        heldout = confirm(self.removals, _HELDOUT, n, p_percent, search, limit) if n else None
        if heldout is not None:
            heldout["unseen_in_search"] = self._unseen_in_search
            heldout["unseen_by_ranking"] = self._unseen_by_ranking(_HELDOUT)
        return AblationResult(
            p_percent=p_percent,
            ranking=self.ranking.by,
            scope=self.ranking.scope,
            replacement=self.replacer.replacement,
            n_neurons=self.ranking.n_neurons,
            n_removable=n,
            removable=tuple(self.ranking.weakest(n)),
            reached=n < self.ranking.n_neurons,
            ppl_dense=self.ppl_dense,
            ppl_ablated=self.ppl_dense * math.exp(rise),
            ppl_increase_percent=rise_percent(rise),
            curve=tuple(self._point(search, count) for count in (0, *search.counts())),
            control=control,
            heldout=heldout,
            ranking_corpus=self.ranking.corpus | {"unseen_in_search": self._unseen_by_ranking(_CALIBRATION)},
            model=self.adapter.info,
            corpus=self.texts[_CALIBRATION].describe(),
            cost={"forward_passes": self.removals.passes, "seconds": time.perf_counter() - self.start},
            provenance=provenance(seed=self.seed),
            ranking_sha256=self.sha256,
            resolved=resolved,
            means_sketch=means_sketch(self.ranking.mean_activation if self.replacer.replacement == "mean" else None),
        )

    def _unseen_by_ranking(self, text: str) -> bool:
        """Whether a text shares nothing with what the ranking was made on; False where that is not known."""
        if self.ranked_on is not None:
            return not share_text(self.texts[text], self.ranked_on)
        on_calibration = bool(self.ranking.corpus["sha256"] == self.texts[_CALIBRATION].sha256)
        return text == _HELDOUT and on_calibration and self._unseen_in_search

    @cached_property
    def _unseen_in_search(self) -> bool:
        return not share_text(self.texts[_HELDOUT], self.texts[_CALIBRATION])

    def _point(self, search: PrefixSearch, n: int) -> dict[str, float]:
        rise, error = search.estimate(n)
        return {
            "n_removed": n,
            "ppl": self.ppl_dense * math.exp(min(rise, 500.0)),
            "ppl_increase_percent": rise_percent(rise),
            "n_tokens": self.measured.n_tokens(prefix_key(n) if n else DENSE),
            "standard_error_percent": 100 * error * math.exp(min(rise, 500.0)),
        }


def _brief(result: AblationResult) -> dict[str, Any]:
    control, heldout = result.control or {}, result.heldout or {}
    return {
        "p_percent": result.p_percent,
        "n_removable": result.n_removable,
        "ppl_increase_percent": result.ppl_increase_percent,
        "control_ratio": control.get("ratio"),
        "heldout_interval": heldout.get("interval"),
        "verdict": heldout.get("verdict"),
    }
