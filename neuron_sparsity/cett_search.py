"""Truncated passes, one after the other, until one of them stands for p.

A pass is made at a first guess, then where the line through all passes in (log CETT, log rise) puts p. It is over when
a pass lies within half the tolerance of p and close to that place, and the place rests on two passes at least (on one,
where a pass jitters by less than a sixth of the tolerance). Three passes near p know the place better than another
would tell: from then on the whole tolerance will do. Of several p that is asked of the smallest; the passes of one
place the first pass of the next, which is over with the first pass within its tolerance.
See `search` for the line, `evaluation` for the passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from neuron_sparsity.evaluation import KL_SLOPE, Evaluation, Evaluator
from neuron_sparsity.search import RootEstimate, at_root, estimate_root, next_cett, spread

__all__ = ["METRICS", "MIN_CETT", "SLOPES", "CettSearch", "Goal", "Metric", "carried"]

Metric = Literal["ppl", "kl"]
METRICS: tuple[Metric, ...] = ("ppl", "kl")

_MAX_PASSES = 8  # around one p
MIN_CETT = 1e-6  # nobody looks below it
_JITTER = 0.04  # of the rise at 4,096 tokens, as a share of it (docs/measured.md, at p = 1)
_KL_JITTER = 0.2  # the same of the KL divergence, as a share of it
SLOPES = {"ppl": 2.5, "kl": KL_SLOPE}  # of log(rise) over log(CETT), measured on smollm2-135m (docs/measured.md)
_ROOT_ERROR = 0.3  # standard error of the root that ends the search, in tolerances
_AT_ROOT = 0.012  # in log(CETT), 0.002 of activation ratio: a pass that close to the root stands for it
_ON_ROOT = 0.005  # so close to it, a second pass would share the jitter of the first
_ONE_PASS = 1 / 6  # of the tolerance: where a pass jitters less, one pass stands for itself
_ENOUGH = 3  # passes near p: with that many, twice as far will do, from p and from the root
_CETT_TOLERANCE = 0.004  # of each layer's CETT against the common one, relative


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        p_percent: Rise of perplexity, or of what the KL divergence would be as one.
        metric: Which of them.
        tolerance: How close a pass must come, in percentage points.
        n_scored: Scored positions of the text: the more, the less a pass jitters.
        closely: Whether a pass must stand where all of them put p, as that of the first p must. A further p is over
            with the first pass within the tolerance: a second one would cost more than it tells beside the text's own
            error, and the interval knows how many there were.
    """

    p_percent: float
    metric: Metric
    tolerance: float
    n_scored: int
    closely: bool = True

    @property
    def target(self) -> float:
        """Wanted rise of the mean loss, or mean KL divergence, in nats."""
        return math.log1p(self.p_percent / 100)

    @property
    def fewest(self) -> int:
        """Passes that the answer must rest on: two, where jitter may bring a pass within the tolerance by luck."""
        return 1 if self.jitter(self.metric) * self.p_percent <= _ONE_PASS * self.tolerance else 2

    def jitter(self, metric: Metric) -> float:
        """Standard deviation of log(rise) that is expected of one pass near p."""
        of_rise = _JITTER * math.sqrt(4096 / max(1, self.n_scored))
        return of_rise * (_KL_JITTER if metric == "kl" else 1.0)

    def root(self, evaluations: Sequence[Evaluation], metric: Metric | None = None) -> RootEstimate | None:
        """Return where all passes put p by a metric; the goal's own if None."""
        metric = metric or self.metric
        points = [(e.cett, e.mean(metric)) for e in evaluations]
        return estimate_root(points, self.target, jitter=self.jitter(metric), prior_slope=SLOPES[metric])


def carried(guess: float, found: Sequence[tuple[float, float]]) -> float:
    """Return where a further p is to be looked for first, from those that are found.

    A few windows put the answers at guesses; all windows put them elsewhere, in log(CETT) by shifts that are alike, and
    not so alike that one alone would tell the next: their mean is carried over.

    Args:
        guess: CETT at which a few windows put the further p.
        found: (guess, answer) of the others.

    Example:
        >>> round(carried(0.2, [(0.1, 0.09)]), 4), carried(0.2, [])
        (0.18, 0.2)
    """
    shift = [math.log(answer / start) for start, answer in found]
    return min(1.0, guess * math.exp(sum(shift) / max(1, len(shift))))


class CettSearch:
    """One search, on an evaluator that has made its dense pass; passes made for another p serve it too.

    Args:
        evaluator: Makes the passes.
        goal: What is asked for.
    """

    def __init__(self, evaluator: Evaluator, goal: Goal) -> None:
        self.evaluator, self.goal = evaluator, goal

    def approach(self, guess: float) -> Evaluation:
        """Make passes until one of them stands for p, and return it."""
        cett, extended = guess, 0
        for _ in range(_MAX_PASSES):
            if self._settled():  # passes for another p may do
                break
            if cett < 1.0 and extended < 2 and not self.evaluator.curves.covers(cett):
                self.evaluator.extend(cett)
                extended += 1
            made = self.evaluator.truncate(cett)
            if cett >= 1.0 and self.value(made) < self.goal.p_percent:
                break
            cett = self._next()
            if cett < MIN_CETT:
                break
        if not self.reached() and all(e.cett < 1 for e in self.evaluator.evaluations):
            self.evaluator.truncate(1.0)  # "not reached" is said of CETT 1 only
        return self._best()

    def checked(
        self, best: Evaluation, cett: Float[np.ndarray, " layer"]
    ) -> tuple[Evaluation, Float[np.ndarray, " layer"]]:
        """Return a pass whose layers have the CETT that was asked for, and that CETT of each layer.

        Args:
            best: What `approach` returned.
            cett: What `Evaluator.check` said of its thresholds.
        """
        off = np.abs(cett / best.cett - 1)[self.evaluator.curves.maximum > 0]
        if best.cett >= 1.0 or not off.size or off.max() <= _CETT_TOLERANCE:
            return best, cett
        self.evaluator.refine(best.thresholds)
        best = self.evaluator.truncate(best.cett)
        (cett,) = self.evaluator.check(best.thresholds)
        return best, cett

    def _next(self) -> float:
        root = self.goal.root(self.evaluator.evaluations)
        points = [(e.cett, e.mean(self.goal.metric)) for e in self.evaluator.evaluations]
        if root is None or (root.n_points < 2 and not self._stands(root)):
            return next_cett(points, self.goal.target, prior_slope=SLOPES[self.goal.metric])
        on_it = root.n_points < 2 and abs(math.log(self.evaluator.evaluations[-1].cett / root.cett)) < _ON_ROOT
        return spread(root, points) if on_it else at_root(root, points)

    def _settled(self) -> bool:
        """Whether a pass is within the tolerance, and close to where all of them, as many as needed, put p."""
        if not self.goal.closely:
            return bool(self._near())
        root = self.goal.root(self.evaluator.evaluations)
        if root is None or root.n_points < self.goal.fewest or not self._stands(root):
            return False
        return root.error * self.goal.p_percent <= _ROOT_ERROR * self.goal.tolerance

    def _stands(self, root: RootEstimate) -> bool:
        at_root = _AT_ROOT * (2 if self._enough() else 1)
        return any(abs(math.log(e.cett / root.cett)) <= at_root for e in self._near())

    def _enough(self) -> bool:
        root = self.goal.root(self.evaluator.evaluations)
        return root is not None and root.n_points >= _ENOUGH

    def value(self, evaluation: Evaluation) -> float:
        """Return what is compared with p."""
        return evaluation.percent(self.goal.metric)

    def reached(self) -> bool:
        """Whether some pass cost as much as was asked for."""
        return any(self.value(e) >= self.goal.p_percent - self.goal.tolerance for e in self.evaluator.evaluations)

    def _near(self) -> list[Evaluation]:
        """The evaluations that are close enough to p."""
        close = self.goal.tolerance * (1 if self._enough() or not self.goal.closely else 0.5)
        return [e for e in self.evaluator.evaluations if abs(self.value(e) - self.goal.p_percent) <= close]

    def _best(self) -> Evaluation:
        if not self.reached():
            return max(self.evaluator.evaluations, key=lambda e: e.cett)
        root = self.goal.root(self.evaluator.evaluations)
        if root is None or not self._near():
            return min(self.evaluator.evaluations, key=lambda e: abs(self.value(e) - self.goal.p_percent))
        return min(self._near(), key=lambda e: abs(math.log(e.cett / root.cett)))
