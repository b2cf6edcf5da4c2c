"""Best point and profile likelihood of a law: which coefficients have a sum of squares below a cut.

The region `{sum of squares <= cut}` is walked in two nonlinear parameters, alpha and log K, and in each of its points the
linear ones are exact (`linear.Bowls`). What a quantity ranges over in the region is its profile interval: no surface is
approximated by a parabola.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

from neuron_sparsity.laws.linear import Array, Bowls, Observations
from neuron_sparsity.laws.shapes import ALPHA_MIN, ReluLaw, Shape, SiluLaw

__all__ = ["Optimum", "Profile", "Region", "find_optimum"]

_GOLDEN = (np.sqrt(5) - 1) / 2
_N_STARTS = 4
_NOISE_FLOOR = 1e-8  # ratios arrive as float32: nothing smaller is noise or signal
_MAX_ELEMENTS = 4_000_000  # of a [shape, point] array: 32 MB


@dataclass(frozen=True)
class Optimum:
    """The best point of a law on a curve.

    Attributes:
        shape: Its alpha and log K.
        a: A_0.
        b: B, the size of the part that changes, at the first point.
        sse: Weighted sum of squares.
    """

    shape: Shape
    a: float
    b: float
    sse: float


@dataclass(frozen=True)
class Region:
    """All that is below a cut: shapes [shape] with their bowls.

    Attributes:
        shape: alpha and log K of each.
        bowls: The linear parameters of each.
        cut: Largest sum of squares inside.
        ends: Which ends of the search were inside: "alpha low", "alpha high", "log_k low", "log_k high".
    """

    shape: Shape
    bowls: Bowls
    cut: float
    ends: frozenset[str]


@dataclass(frozen=True)
class Profile:
    """A law on a curve with its optimum; `region` is computed once for each level.

    Attributes:
        law: The law, anchored at the curve's ends.
        data: The curve.
        best: The optimum.
    """

    law: ReluLaw | SiluLaw
    data: Observations
    best: Optimum
    _regions: dict[float, Region] = field(default_factory=dict, repr=False, compare=False)

    def region(self, level: float) -> Region:
        """Return what is inside the joint cut whose projections are intervals of a level such as 0.95."""
        if level not in self._regions:
            self._regions[level] = self._find_region(self._cut(level))
        return self._regions[level]

    def _cut(self, level: float) -> float:
        freedom = len(self.data.y) - len(self.law.names)
        variance = max(self.best.sse / freedom, _NOISE_FLOOR**2)
        return self.best.sse + float(f_distribution.ppf(level, 1, freedom)) * variance

    def _find_region(self, cut: float) -> Region:
        law, best = self.law, float(self.best.shape.alpha)
        alphas = np.union1d(_alpha_grid(law), best)
        floors = self._rows(alphas)[1]
        floors[alphas == best] = min(self.best.sse, cut)
        inside = np.flatnonzero(floors <= cut)
        low = self._cross(cut, alphas[inside[0]], alphas[inside[0] - 1]) if inside[0] > 0 else alphas[0]
        last = inside[-1]
        high = self._cross(cut, alphas[last], alphas[last + 1]) if last + 1 < len(alphas) else alphas[-1]
        rows = np.union1d(_between(low, high, 65), best)
        return self._fill(rows, cut, {"alpha low": low <= alphas[0], "alpha high": high >= alphas[-1]})
