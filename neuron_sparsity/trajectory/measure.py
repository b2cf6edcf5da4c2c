"""What is measured of one checkpoint, and the search for the CETT that is common to several.

`options` are those of every pass: `backend`, `batch_size`, `progress`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.cett_search import SLOPES, CettSearch, Goal
from neuron_sparsity.corpus import Windows
from neuron_sparsity.evaluation import Evaluation, Evaluator
from neuron_sparsity.recorder import record
from neuron_sparsity.sparsity import LayerThreshold, cett_ppl_sparsity
from neuron_sparsity.taxonomy.classes import DEAD, bound_95
from neuron_sparsity.trajectory.result import CommonCett, DeadShare, SparsityAt

__all__ = ["LAST", "common_cett", "own_sparsity", "sparsity_at"]

LAST = 5
"""Checkpoints at the end of training that the common CETT is searched on (arXiv:2411.02335, Appendix E)."""

_TOLERANCE = 0.1  # of p, as for a single search: every further pass loads each of the five again
_MAX_EXTENSIONS = 2


def own_sparsity(adapter: MLPAdapter, windows: Windows, p_percent: float, **options: Any) -> tuple[float, SparsityAt]:
    """Return a checkpoint's dense perplexity, and what it is at its own CETT-PPL-p%.

    Raises:
        MeasurementError: If activations or losses are NaN, or memory runs out.
    """
    found = cett_ppl_sparsity(adapter, windows, p_percent=p_percent, **options)
    estimate = found.estimate("ppl")
    dead = dead_share(adapter, windows, found.thresholds, **options) if found.reached else None
    return found.ppl_dense, SparsityAt(
        cett=found.cett,
        activation_ratio=found.activation_ratio,
        ppl_increase_percent=found.ppl_increase_percent,
        kl=cast("float", found.kl),
        layers=found.layers,
        dead=dead,
        reached=found.reached,
        converged=found.converged,
        low=None if estimate is None else estimate.low,
        high=None if estimate is None else estimate.high,
    )


def sparsity_at(adapter: MLPAdapter, windows: Windows, cett: float, **options: Any) -> tuple[float, SparsityAt]:
    """Return a checkpoint's dense perplexity, and what it is at a given CETT, with thresholds of its own curves.

    Raises:
        MeasurementError: If activations or losses are NaN, or memory runs out.
    """
    evaluator = Evaluator(adapter, windows, **options)
    evaluator.probe()
    evaluator.dense([cett])
    for _ in range(_MAX_EXTENSIONS):
        if cett < 1 and not evaluator.curves.covers(cett):
            evaluator.extend(cett)
    made = evaluator.truncate(cett)
    (there,) = evaluator.check(made.thresholds)
    # Which p it stands for plays no part in whether a pass has the CETT that was asked for.
    search = CettSearch(evaluator, Goal(1.0, "ppl", 1.0, windows.n_scored))
    made, there = search.checked(made, there)
    norms = [float(norm.mean()) for norm in adapter.w_norms]
    layers = zip(adapter.info.layers, made.thresholds, there.tolist(), made.layer_activation, norms, strict=True)
    return math.exp(evaluator.loss), SparsityAt(
        cett=cett,
        activation_ratio=made.activation_ratio,
        ppl_increase_percent=made.percent("ppl"),
        kl=made.mean("kl"),
        layers=tuple(LayerThreshold(*layer) for layer in layers),
        dead=dead_share(adapter, windows, made.thresholds, **options) if cett < 1 else None,
    )


def dead_share(adapter: MLPAdapter, windows: Windows, thresholds: Sequence[float], **options: Any) -> DeadShare:
    """Return how many neurons are dead under thresholds, one a layer: active on less than 0.1 % of tokens.

    One pass of the dense model; `c >= threshold` is active, as everywhere.
    """
    stats = record(adapter, windows, thresholds={"these": thresholds}, n_examples=0, **options)
    frequency = stats.activation_frequency("these")
    dead = frequency < DEAD
    return DeadShare(
        dead_below=DEAD,
        dead_ratio=float(dead.double().mean()),
        never_active_ratio=float((frequency == 0).double().mean()),
        never_nonzero_ratio=float((stats.zero_count == stats.n_tokens).double().mean()),
        layer_dead_ratios=tuple(dead.double().mean(dim=1).tolist()),
        n_tokens=stats.n_tokens,
        frequency_bound_95=bound_95(stats.n_tokens),
    )


def common_cett(
    labels: Sequence[str],
    own: Sequence[SparsityAt],
    p_percent: float,
    n_scored: int,
    measure: Callable[[str, float], SparsityAt],
) -> CommonCett:
    """Return the CETT at which the mean over checkpoints of PPL truncated over PPL dense is 1 + p/100.

    Args:
        labels: The checkpoints.
        own: What each is at its own CETT: places the first pass.
        p_percent: Rise of perplexity that is wanted on average.
        n_scored: Scored positions that a pass over one checkpoint has.
        measure: `f(label, cett)`: a truncated pass over one of them.
    """
    # The rise of each goes about like a power of the CETT, through what was measured at its own: where their mean is p.
    slope = SLOPES["ppl"]
    rises = [max(found.ppl_increase_percent, 0.01 * p_percent, 1e-12) * found.cett**-slope for found in own]
    guess = float((p_percent / np.mean(rises)) ** (1 / slope))
    passes = _JointPasses(labels, measure)
    goal = Goal(p_percent, "ppl", _TOLERANCE * p_percent, n_scored * len(labels), closely=False)
    search = CettSearch(cast("Evaluator", passes), goal)
    best = search.approach(min(1.0, guess))
    rise = search.value(best)
    return CommonCett(
        cett=best.cett,
        given=False,
        checkpoints=tuple(labels),
        ppl_increase_percent=rise,
        tolerance_percent=goal.tolerance,
        reached=search.reached(),
        converged=abs(rise - p_percent) <= goal.tolerance,
        evaluations=tuple({"cett": e.cett, "ppl_increase_percent": e.percent("ppl")} for e in passes.evaluations),
    )


class _JointPasses:
    """What `CettSearch` asks of an evaluator, over several checkpoints at once: a pass is one over each of them."""

    def __init__(self, labels: Sequence[str], measure: Callable[[str, float], SparsityAt]) -> None:
        self.labels, self.measure = labels, measure
        self.evaluations: list[Evaluation] = []
        self.curves = self

    def covers(self, cett: float) -> bool:
        """Whether curves need no extension: `sparsity_at` extends those of each checkpoint."""
        return True

    def truncate(self, cett: float) -> Evaluation:
        """Measure all of them; the logarithm of their mean PPL ratio is the rise."""
        found = [self.measure(label, cett) for label in self.labels]
        ratio = float(np.mean([1 + one.ppl_increase_percent / 100 for one in found]))
        active = float(np.mean([one.activation_ratio for one in found]))
        made = Evaluation(
            cett=cett,
            thresholds=[],
            rise=np.array([math.log(ratio)]),
            kl=np.array([float(np.mean([one.kl for one in found]))]),
            scored=np.array([1]),
            window_activation=np.array([active]),
            layer_activation=[active],
        )
        self.evaluations.append(made)
        return made
