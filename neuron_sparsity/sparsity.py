"""CETT-PPL-p%: how few neurons may stay active, token by token, before perplexity rises by p percent.

The metric is that of *Sparsing Law* (arXiv:2411.02335; "PPL-p%" in its first version). The search, pass by pass
(`evaluation` makes the passes):

1. An eighth of the windows: rough CETT curves, and the CETT at which the mean KL divergence from the dense to the
   truncated model is log(1 + p/100). KL divergence is steady, and the rise of the loss is not far from it.
2. One dense pass over all windows: every token's loss, and exact CETT curves around that CETT.
3. Truncated passes over all windows, all layers at once: at that CETT, then where the line through the passes in
   (log CETT, log rise) puts p, until one is within the tolerance and near where all of them together put p.
4. The CETT of the thresholds found is checked; where a layer misses by more than 0.4 %, thresholds are interpolated
   anew with a point measured there, and evaluated again.

What is returned was measured: thresholds, the rise at exactly these thresholds, the neurons active in that pass. Where
all passes together put p, with an interval, is in `estimates`, for both metrics: the same passes tell both.

CETT-KL-p% asks for the CETT at which the mean KL divergence is log(1 + p/100): what the rise of perplexity would be on
text drawn from the model itself. The same text tells it two to four times as exactly (docs/measured.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.cett_search import METRICS, CettSearch, Goal, Metric, carried
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.evaluation import Evaluation, Evaluator
from neuron_sparsity.interval import Estimate, estimate
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.search import search_name
from neuron_sparsity.store import provenance
from neuron_sparsity.truncation import TokenActivity, apply_thresholds, sparsify, token_activity
from neuron_sparsity.typed import percents

__all__ = [
    "Estimate",
    "LayerThreshold",
    "SparsityResult",
    "TokenActivity",
    "apply_thresholds",
    "cett_ppl_sparsities",
    "cett_ppl_sparsity",
    "sparsify",
    "token_activity",
]

_TOLERANCE = 0.1  # of p: a pass jitters by 0.03 p at 8,192 tokens, and half of this is aimed at
_FIRST_CETT = 0.05  # at p = 1 (0.04 measured on smollm2-135m); from there by the square root of p


@dataclass(frozen=True)
class LayerThreshold:
    """One layer's part of a result.

    Attributes:
        layer: Block index.
        threshold: Cut on the contribution; a neuron below it is truncated.
        cett: CETT of that cut on the dense run's activations: measured on every token, or interpolated between exact
            values close by and corrected by a measurement on some windows (`cett_measured_on` of the result).
        activation_ratio: Share of (token, neuron) pairs active in the truncated run.
        w_norm_mean: Mean norm of the layer's output weight rows: tells other weights apart.
    """

    layer: int
    threshold: float
    cett: float
    activation_ratio: float
    w_norm_mean: float


@dataclass(frozen=True)
class SparsityResult:
    """CETT-PPL-p% of a model on a corpus.

    Attributes:
        p_percent: Rise of perplexity that was asked for.
        reached: Whether some CETT in [0, 1] costs that much. If not, the numbers are those of CETT 1.
        ppl_dense: Perplexity of the model as it is.
        ppl_sparse: Perplexity at the returned thresholds, measured.
        ppl_increase_percent: `100 * (ppl_sparse / ppl_dense - 1)`: the measured rise, never the target.
        cett: The CETT common to all layers.
        activation_ratio: Mean over layers of the share of (token, neuron) pairs active in the truncated run.
        layers: Threshold, CETT and activation ratio of each layer.
        converged: Whether the measured rise (of the metric) is within `tolerance_percent` of p.
        tolerance_percent: In percentage points.
        evaluations: CETT 0, where only exact zeros are cut and nothing changes, then every truncated pass over all
            windows: cett, ppl, ppl_increase_percent, kl, activation_ratio.
        curves: Every layer's measured CETT curve.
        silent_tokens: (layer, token) pairs left out of the CETT because the MLP's output is zero there.
        model: What was measured.
        corpus: On what.
        cost: `forward_passes` over the corpus, `seconds`, and `dense_passes`: seconds in units of its dense pass.
        provenance: Versions, seed, command.
        metric: `"cett_ppl"`, or `"cett_kl"` if the KL divergence was asked for.
        kl: Mean KL divergence from the dense to the truncated model at the returned thresholds, in nats a token.
        estimates: For both metrics, where all passes together put p, with a 95 % interval of the activation ratio; a
            metric that no pass came near is left out.
        calibration: Text that the CETT curves were measured on; None if it is `corpus` too.
        cett_measured_on: Tokens that the CETT of the returned thresholds was measured on.
    """

    p_percent: float
    reached: bool
    ppl_dense: float
    ppl_sparse: float
    ppl_increase_percent: float
    cett: float
    activation_ratio: float
    layers: tuple[LayerThreshold, ...]
    converged: bool
    tolerance_percent: float
    evaluations: tuple[dict[str, float], ...]
    curves: tuple[dict[str, Any], ...]
    silent_tokens: int
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]
    metric: str = "cett_ppl"
    kl: float | None = None
    estimates: tuple[Estimate, ...] = ()
    calibration: dict[str, Any] | None = None
    cett_measured_on: int | None = None

    @property
    def sparsity_ratio(self) -> float:
        """One minus the activation ratio."""
        return 1.0 - self.activation_ratio

    @property
    def thresholds(self) -> list[float]:
        """The threshold of each layer."""
        return [layer.threshold for layer in self.layers]

    @property
    def name(self) -> str:
        """Such as `CETT-PPL-1%`."""
        return search_name(self.metric, self.p_percent)

    def estimate(self, metric: Metric) -> Estimate | None:
        """Return the estimate of one metric, if there is one."""
        return next((found for found in self.estimates if found.metric == f"cett_{metric}"), None)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `sparsity.json`."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "sparsity_ratio": self.sparsity_ratio,
            "model": self.model.to_json(),
            "layers": [vars(layer) for layer in self.layers],
            "evaluations": list(self.evaluations),
            "curves": list(self.curves),
            "estimates": [found.to_json() for found in self.estimates],
        }
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SparsityResult:
        """Read the content of `sparsity.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        keys = LayerThreshold.__dataclass_fields__
        since = ("metric", "kl", "estimates", "calibration", "cett_measured_on")  # files of 0.1 lack some
        own = {name: data[name] for name in cls.__dataclass_fields__ if name in data or name not in since} | {
            "model": ModelInfo.from_json(data["model"]),
            "layers": tuple(LayerThreshold(**{key: layer[key] for key in keys}) for layer in data["layers"]),
            "evaluations": tuple(data["evaluations"]),
            "curves": tuple(data["curves"]),
            "estimates": tuple(Estimate.from_json(found) for found in data.get("estimates", ())),
        }
        return cls(**own)


def cett_ppl_sparsity(
    model: Any,
    windows: Windows,
    *,
    p_percent: float = 1.0,
    metric: Metric = "ppl",
    calibration: Windows | None = None,
    tolerance_percent: float | None = None,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> SparsityResult:
    """Return CETT-PPL-p%: thresholds, activation ratio and the measured rise of perplexity (arXiv:2411.02335).

    A small step in CETT flips neurons that lie at a threshold, so the rise jitters from one CETT to the next (by about
    0.04 percentage points at 4,096 tokens). The result is a measured pass close to where the line through all passes
    puts p; `estimates` has that place, with an interval: the text is a sample, and that matters more.

    Args:
        model: TransformerLens model or adapter.
        windows: Evaluation text, and calibration text too if there is no other.
        p_percent: Rise of perplexity, > 0.
        metric: `"ppl"`, or `"kl"`: the CETT at which the mean KL divergence is log(1 + p/100).
        calibration: Other text to measure the CETT of thresholds on.
        tolerance_percent: How close to p the measured rise must come, in percentage points; a tenth of p if None. The
            first two passes are held to half of it.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`; `provenance` of the result says which ran.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The result; `reached=False` with the numbers at CETT 1 where no CETT costs p percent.

    Raises:
        ValueError: If `p_percent` is not a positive number, or the backend cannot run here.
        MeasurementError: If activations or losses are NaN, or memory runs out.
    """
    (result,) = cett_ppl_sparsities(
        model,
        windows,
        p_percents=(p_percent,),
        metric=metric,
        calibration=calibration,
        tolerance_percent=tolerance_percent,
        backend=backend,
        batch_size=batch_size,
        progress=progress,
    )
    return result


def cett_ppl_sparsities(
    model: Any,
    windows: Windows,
    *,
    p_percents: Sequence[float] = (1.0, 5.0, 10.0),
    metric: Metric = "ppl",
    calibration: Windows | None = None,
    tolerance_percent: float | None = None,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[SparsityResult, ...]:
    """Return `cett_ppl_sparsity` for several p at once: they share the dense pass and each other's truncated passes.

    The smallest p is searched as if it were alone; a larger one is over with the first pass within its tolerance.

    Args:
        model: As for `cett_ppl_sparsity`, and so are the others.
        windows: As there.
        p_percents: Rises of perplexity, each > 0.
        metric: As there.
        calibration: As there.
        tolerance_percent: As there; one that is given holds for all p.
        backend: As there.
        batch_size: As there.
        progress: As there.

    Returns:
        One result for each p, in their order; `cost` is that of all of them.
    """
    p_percents = percents(p_percents)
    if tolerance_percent is not None and not (math.isfinite(tolerance_percent) and tolerance_percent > 0):
        raise ValueError(f"tolerance must be a positive number of percentage points, got {tolerance_percent}")
    if metric not in METRICS:
        raise ValueError(f"metric must be 'ppl' or 'kl', got {metric!r}")
    start = time.perf_counter()
    adapter = measurable(model, windows, calibration=calibration)
    if calibration is not None and calibration.sha256 == windows.sha256:
        calibration = None
    evaluator = Evaluator(
        adapter, windows, calibration=calibration, backend=backend, batch_size=batch_size, progress=progress
    )
    goals = [
        Goal(p, metric, tolerance_percent or _TOLERANCE * p, windows.n_scored, closely=not further)
        for further, p in enumerate(sorted(set(p_percents)))
    ]
    first = [min(0.9, _FIRST_CETT * math.sqrt(goal.p_percent)) for goal in goals]
    guesses = evaluator.dense(evaluator.rough([goal.target for goal in goals], first))
    searches = [CettSearch(evaluator, goal) for goal in goals]
    best: list[Evaluation] = []
    placed: list[tuple[float, float]] = []
    for search, guess in zip(searches, guesses, strict=True):
        best.append(search.approach(carried(guess, placed)))
        root = search.goal.root(evaluator.evaluations)
        placed += [(guess, root.cett)] if root else []
    cett = evaluator.check(*[made.thresholds for made in best])
    answers = {
        search.goal.p_percent: (search, *search.checked(made, there))
        for search, made, there in zip(searches, best, cett, strict=True)
    }
    seconds = time.perf_counter() - start
    return tuple(_result(*answers[p], seconds) for p in p_percents)


def _result(search: CettSearch, best: Evaluation, cett: Float[np.ndarray, " layer"], seconds: float) -> SparsityResult:
    evaluator, goal = search.evaluator, search.goal
    info, curves, corpus = evaluator.adapter.info, evaluator.curves, evaluator.windows
    ppl_dense = math.exp(evaluator.loss)
    untouched = dict.fromkeys(("cett", "ppl_increase_percent", "kl"), 0.0) | {
        "ppl": ppl_dense,
        "activation_ratio": evaluator.nonzero_ratio,
    }
    norms = [float(norm.mean()) for norm in evaluator.adapter.w_norms]
    layers = zip(info.layers, best.thresholds, cett.tolist(), best.layer_activation, norms, strict=True)
    used = " + ".join(sorted(evaluator.backends))
    return SparsityResult(
        p_percent=goal.p_percent,
        reached=search.reached(),
        ppl_dense=ppl_dense,
        ppl_sparse=_ppl(ppl_dense, best),
        ppl_increase_percent=best.percent("ppl"),
        cett=best.cett,
        activation_ratio=best.activation_ratio,
        layers=tuple(LayerThreshold(*layer) for layer in layers),
        converged=abs(search.value(best) - goal.p_percent) <= goal.tolerance,
        tolerance_percent=goal.tolerance,
        evaluations=(untouched, *(_shown(ppl_dense, made) for made in evaluator.evaluations)),
        curves=tuple(curves.to_json(info.layers)),
        silent_tokens=int(curves.silent_tokens.sum()),
        model=info,
        corpus=corpus.describe(),
        cost={
            "forward_passes": evaluator.passes,
            "seconds": seconds,
            "dense_passes": seconds / max(evaluator.dense_seconds, 1e-9),
        },
        provenance=provenance()
        | parallel.described()
        | {"forward": evaluator.adapter.forward, "backends": dict.fromkeys(("tail_error", "threshold_mask"), used)},
        metric=f"cett_{goal.metric}",
        kl=best.mean("kl"),
        estimates=_estimates(evaluator, goal),
        calibration=None if evaluator.calibration is corpus else evaluator.calibration.describe(),
        cett_measured_on=evaluator.checked_tokens,
    )


def _ppl(ppl_dense: float, made: Evaluation) -> float:
    return ppl_dense * math.exp(min(made.mean("ppl"), 500.0))


def _shown(ppl_dense: float, made: Evaluation) -> dict[str, float]:
    return {
        "cett": made.cett,
        "ppl": _ppl(ppl_dense, made),
        "ppl_increase_percent": made.percent("ppl"),
        "kl": made.mean("kl"),
        "activation_ratio": made.activation_ratio,
    }


def _estimates(evaluator: Evaluator, goal: Goal) -> tuple[Estimate, ...]:
    found = []
    for metric in METRICS:
        root = goal.root(evaluator.evaluations, metric)
        if root is not None:
            found.append(
                estimate(
                    evaluator.evaluations,
                    root,
                    goal.target,
                    evaluator.curves,
                    metric=metric,
                    n_tokens=evaluator.windows.n_tokens,
                )
            )
    return tuple(found)
