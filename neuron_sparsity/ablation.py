"""Remove neurons for good, for all tokens, and measure what that costs.

`ablate` (replacement.py) is the intervention. `removable_neurons` is the measurement, and `removable_sets` several of
them that share passes:

1. The dense losses on the calibration part of the corpus.
2. The search for the longest prefix of a ranking that costs at most p percent (removal.py).
3. Controls: as many random neurons of every layer, several seeds, on as many windows as their damage needs to be seen.
   Without them no ranking is worth its name.
4. Held-out text: dense and ablated loss on windows the search never saw, with a paired bootstrap over windows. The
   set *holds* if the whole 95 % interval of the rise is at most p, is *not refuted* if p lies inside, and *fails* if
   the interval lies above. Where it does not hold, a shorter prefix that does is looked for there.

All of it costs at most 10 F, one F being a dense forward pass over the calibration part, if the held-out part is no
larger; five more for each further p.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity import parallel
from neuron_sparsity.adapter import MLPAdapter, ModelInfo, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.interval import paired_interval
from neuron_sparsity.perplexity import Progress, default_batch_size
from neuron_sparsity.ranking import Ranking
from neuron_sparsity.removal import DENSE, PrefixSearch, Removals, control_key, order_hash, prefix_key
from neuron_sparsity.replacement import REPLACEMENTS, Replacer, ablate
from neuron_sparsity.store import decode, make_folder, provenance, read_json, write_json

__all__ = ["PARTIAL", "REPLACEMENTS", "AblationResult", "ablate", "removable_neurons", "removable_sets"]

PARTIAL = "ablation.partial.json"
"""What an interrupted search has measured."""

_CALIBRATION, _HELDOUT = "calibration", "held-out"
_MAX_PASSES = 10.0
_FURTHER_PASSES = 5.0  # for each further p
_CONTROL_PASSES = 1.0
_CONTROL_ERROR = 0.2  # of the damage: a control that is known as well needs no more windows
_HOLDING_PASSES = 3


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
        reached: Whether removing more was measured to cost more than p; if not, everything may go.
        ppl_dense: Perplexity of the model as it is, on the calibration part.
        ppl_ablated: The same without the removable neurons.
        ppl_increase_percent: The measured rise.
        curve: Every measured count: n_removed, ppl, ppl_increase_percent; ascending. Those measured on some windows
            only have n_tokens below the corpus', and are estimates for all of it with their standard_error_percent.
        control: The same number of random neurons of every layer: `seeds`, the `ppl` of each, mean
            `ppl_increase_percent` and its spread `sd_percent`, all on `n_tokens`; `ratio` is the mean over the
            ranking's own rise on the same tokens. None where nothing is removable, or no controls were asked for.
        heldout: The same removal on text that the search never saw: `interval` is the 95 % interval of the rise in
            percent (None with fewer than 5 windows: then the point decides), `verdict` is "holds", "not refuted" or
            "fails", `holds` whether it is the first; `holding` is the shorter prefix that holds there, chosen on that
            text, or None. `unseen_by_ranking` is true where the ranking was made on the calibration part alone.
        ranking_corpus: What the ranking was made on.
        model: What was measured.
        corpus: The calibration part.
        cost: `forward_passes` over the calibration part, all in all, each counted once; `seconds` of this call.
        provenance: Versions, seed, command.
        ranking_sha256: Hash of the order of removal.
        resolved: Whether the search ended by itself: the next larger count measured to cost more is 1 % further on
            at most, or next to it, and none up to 25 % above holds. If not, its passes were spent.
        per_p: What was found for each p that was asked for together.
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

    def to_json(self) -> dict[str, Any]:
        """Return the content of `ablation.json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "model": self.model.to_json(),
            "removable": [list(pair) for pair in self.removable],
            "curve": list(self.curve),
            "per_p": list(self.per_p),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AblationResult:
        """Read the content of `ablation.json` back; files of the first version lack the last three fields.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        fields = cls.__dataclass_fields__
        own = {name: data[name] for name in fields if name in data or fields[name].default is MISSING} | {
            "model": ModelInfo.from_json(data["model"]),
            "removable": tuple((int(layer), int(neuron)) for layer, neuron in data["removable"]),
            "curve": tuple(data["curve"]),
            "per_p": tuple(data.get("per_p", ())),
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
        heldout: Windows to confirm on; then the search takes all of `windows`.
        n_controls: How many random controls, with seeds from `seed` on.
        seed: Of the controls, and of `"resample"`.
        folder: Where what was measured is kept after every piece of a pass, in `ablation.partial.json`; another call
            with the same model, order, texts and replacement goes on from there.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        One result for each p, in the order they were given.

    Raises:
        ValueError: If p is not positive, the ranking is of another model or holds NaN, or the corpus is one window.
        MeasurementError: If losses are NaN or memory runs out.
        RunFolderError: If the folder cannot be written, or what is kept there is damaged.
    """
    adapter = attach(model)
    _check(adapter, ranking, p_percents, n_controls)
    if heldout is None:
        windows, heldout = windows.split(0.5)
    replacer = Replacer(
        adapter,
        replacement,
        means=ranking.mean_activation,
        corpus=windows if replacement == "resample" else None,
        seed=seed,
    )
    run = _Run(adapter, {_CALIBRATION: windows, _HELDOUT: heldout}, ranking, replacer, seed)
    run.begin(folder, batch_size, progress)
    found = {
        p: run.result(p, n_controls, _MAX_PASSES + k * _FURTHER_PASSES)
        for k, p in enumerate(sorted(set(map(float, p_percents))))
    }
    together = tuple(_brief(found[p]) for p in sorted(found))
    return tuple(replace(found[float(p)], per_p=together) for p in p_percents)


def _check(adapter: MLPAdapter, ranking: Ranking, p_percents: Sequence[float], n_controls: int) -> None:
    for p_percent in p_percents:
        if not (math.isfinite(p_percent) and p_percent > 0):
            raise ValueError(f"p must be a positive number of percent, got {p_percent}")
    if not p_percents:
        raise ValueError("p_percents is empty; name at least one rise of perplexity in percent")
    if n_controls < 0:
        raise ValueError(f"n_controls must be >= 0, got {n_controls}")
    if ranking.model.fingerprint != adapter.info.fingerprint:
        raise ValueError(f"the ranking was made on {ranking.model.name} with other weights; record this model first")
    if tuple(ranking.scores.shape) != (adapter.info.n_layers, adapter.info.d_mlp):
        raise ValueError(
            f"the ranking has scores of shape {list(ranking.scores.shape)}, the model "
            f"{[adapter.info.n_layers, adapter.info.d_mlp]}; give one score a neuron"
        )
    n_nan = int(torch.isnan(ranking.scores).sum())
    if n_nan:
        raise ValueError(
            f"{n_nan} of {ranking.n_neurons} scores by {ranking.by!r} are NaN and cannot be ordered; replace them first"
        )


class _Run:
    """One search: its passes, and what is read from them."""

    def __init__(
        self, adapter: MLPAdapter, texts: Mapping[str, Windows], ranking: Ranking, replacer: Replacer, seed: int
    ) -> None:
        self.adapter, self.texts, self.ranking, self.replacer, self.seed = adapter, texts, ranking, replacer, seed
        self.sha256 = order_hash(ranking)
        self.start = time.perf_counter()
        self.share = texts[_HELDOUT].n_tokens / texts[_CALIBRATION].n_tokens
        self.removals: Removals

    def begin(self, folder: str | Path | None, batch_size: int | None, progress: Progress | None) -> None:
        """Take up what is kept in a folder, and make the dense pass."""
        if batch_size is None:  # one for all passes
            batch_size = default_batch_size(self.adapter, self.texts[_CALIBRATION].window)
        options = {"batch_size": batch_size, "progress": progress}
        path = None if folder is None else Path(folder) / PARTIAL

        def keep() -> None:
            if path is not None and parallel.leads():
                passes = {name: measured.to_json() for name, measured in self.removals.measured.items()}
                write_json(path, {"question": self._question(), "passes": passes})

        self.removals = Removals(self.adapter, self.ranking, self.replacer, self.texts, options, keep)
        if path is not None:
            make_folder(path.parent)
            self._take_up(path)
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
            "means": None if means is None else float(means.double().sum()),
            "seed": self.seed if self.replacer.replacement == "resample" else None,
            "texts": {name: windows.sha256 for name, windows in self.texts.items()},
        }

    def _take_up(self, path: Path) -> None:
        data = read_json(path) if path.is_file() else {}
        if parallel.agreed("what was kept of a search", data.get("question")) != self._question():
            return  # of another question: it is written over
        for name, measured in self.removals.measured.items():
            decode(path, lambda name=name, measured=measured: measured.take_up(data["passes"][name]))

    def result(self, p_percent: float, n_controls: int, limit: float) -> AblationResult:
        """Search, measure the controls and confirm, for one p, with at most `limit` passes made in all."""
        target = math.log1p(p_percent / 100)
        later = (_CONTROL_PASSES if n_controls else 0.0) + self.share * (2 + (self.share < 1))
        search = PrefixSearch(self.removals, _CALIBRATION)
        resolved = search.run(target, limit - later - 1)
        n = search.answer(target)
        rise = search.estimate(n)[0]
        control = self._control(n, n_controls) if n and n_controls else None
        return AblationResult(
            p_percent=p_percent,
            ranking=self.ranking.by,
            scope=self.ranking.scope,
            replacement=self.replacer.replacement,
            n_neurons=self.ranking.n_neurons,
            n_removable=n,
            removable=tuple(self.ranking.weakest(n)),
            reached=search.bracket(target)[1] <= self.ranking.n_neurons,
            ppl_dense=self.ppl_dense,
            ppl_ablated=self.ppl_dense * math.exp(rise),
            ppl_increase_percent=_percent(rise),
            curve=tuple(self._point(search, count) for count in (0, *search.counts())),
            control=control,
            heldout=self._confirm(n, p_percent, search, limit) if n else None,
            ranking_corpus=self.ranking.corpus,
            model=self.adapter.info,
            corpus=self.texts[_CALIBRATION].describe(),
            cost={"forward_passes": self.removals.passes, "seconds": time.perf_counter() - self.start},
            provenance=provenance(seed=self.seed),
            ranking_sha256=self.sha256,
            resolved=resolved,
        )

    def _point(self, search: PrefixSearch, n: int) -> dict[str, float]:
        rise, error = search.estimate(n)
        return {
            "n_removed": n,
            "ppl": self.ppl_dense * math.exp(min(rise, 500.0)),
            "ppl_increase_percent": _percent(rise),
            "n_tokens": self.measured.n_tokens(prefix_key(n) if n else DENSE),
            "standard_error_percent": 100 * error * math.exp(min(rise, 500.0)),
        }

    def _control(self, n: int, n_controls: int) -> dict[str, Any]:
        """Remove as many random neurons of every layer, on as many windows as it takes to see what that does."""
        seeds, measured = [self.seed + k for k in range(n_controls)], self.measured
        keys = [control_key(n, seed) for seed in seeds]
        spent = self.removals.passes
        for n_windows in measured.levels:
            cost = sum(len(measured.missing(key, n_windows)) for key in keys) / measured.windows.n_windows
            if n_windows > measured.levels[0] and self.removals.passes - spent + cost > _CONTROL_PASSES:
                break
            for seed in seeds:
                self.removals.control(_CALIBRATION, n, seed, n_windows)
            found = [measured.rise(key) for key in keys]
            if all(error <= _CONTROL_ERROR * abs(rise) for rise, error in found):
                break
        percents = [_percent(measured.mean(key)) for key in keys]
        own, mean = _percent(measured.mean(prefix_key(n), keys[0])), statistics.fmean(percents)
        return {
            "kind": "random neurons, the same number in every layer",
            "seed": self.seed,
            "seeds": seeds,
            "ppl": [math.exp(min(measured.loss(key), 500.0)) for key in keys],
            "ppl_dense": math.exp(measured.loss(DENSE, keys[0])),
            "ppl_increase_percent": mean,
            "sd_percent": statistics.stdev(percents) if len(percents) > 1 else None,
            "ranking_increase_percent": own,
            "ratio": mean / own if own > 0 else None,
            "n_tokens": measured.n_tokens(keys[0]),
        }

    def _confirm(self, n: int, p_percent: float, search: PrefixSearch, limit: float) -> dict[str, Any]:
        """Measure the removal on text that the search never saw, and look there for a set that holds."""
        text, windows = self.removals.measured[_HELDOUT], self.texts[_HELDOUT]
        self.removals.dense(_HELDOUT)
        found = self._on_heldout(n, p_percent)
        holding, tried = None, 0
        if found["verdict"] != "holds":
            holding, tried = self._holding(n, found, p_percent, search, limit)
        return found | {
            "ppl_dense": math.exp(text.loss(DENSE)),
            "holding": holding,
            "holding_tried": tried,
            "corpus": windows.describe(),
            "unseen_by_ranking": self.ranking.corpus["sha256"] == self.texts[_CALIBRATION].sha256,
        }

    def _on_heldout(self, n: int, p_percent: float) -> dict[str, Any]:
        text = self.removals.measured[_HELDOUT]
        key = self.removals.prefix(_HELDOUT, n)
        rise = text.rise(key)[0]
        ends = paired_interval(text.difference(key).sum(axis=1), text.scored.sum(axis=1))
        interval = None if ends is None else [_percent(end) for end in ends]
        low, high = interval or [_percent(rise)] * 2
        return {
            "ppl_ablated": math.exp(min(text.loss(key), 500.0)),
            "ppl_increase_percent": _percent(rise),
            "interval": interval,
            "verdict": "holds" if high <= p_percent else "fails" if low > p_percent else "not refuted",
            "holds": high <= p_percent,
        }

    def _holding(
        self, n: int, found: dict[str, Any], p_percent: float, search: PrefixSearch, limit: float
    ) -> tuple[dict[str, Any] | None, int]:
        """Return a shorter prefix that holds on the held-out text, and how many were tried."""
        tried = 0
        while n > 1 and tried < _HOLDING_PASSES and self.removals.passes + self.share <= limit:
            upper = (found["interval"] or [0.0, found["ppl_increase_percent"]])[1]
            shrink = (p_percent / upper) ** (1 / search.slope(n))
            n = max(1, min(n - 1, math.floor(n * max(0.05, 0.95 * shrink))))
            found, tried = self._on_heldout(n, p_percent), tried + 1
            if found["holds"]:
                return {"n_removable": n} | found | {"chosen_on": "held-out text"}, tried
        return None, tried


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


def _percent(rise: float) -> float:
    return 100 * math.expm1(min(rise, 500.0))
