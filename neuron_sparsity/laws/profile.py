"""Best point and profile likelihood of a law: which coefficients have a sum of squares below a cut.

The region `{sum of squares <= cut}` is walked in the nonlinear parameters, alpha and log K, and in each of its points
the linear ones are exact (`linear.Bowls`). What a quantity ranges over in the region is its profile interval: no
surface is approximated by a parabola.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

from neuron_sparsity.laws.linear import NOISE_FLOOR, Array, Bowls, Observations
from neuron_sparsity.laws.shapes import ALPHA_MIN, ReluLaw, Shape, SiluLaw

__all__ = [
    "Law",
    "Optimum",
    "Profile",
    "Region",
    "alpha_grid",
    "best_log_k",
    "bowls_of",
    "alpha_rows",
    "fill_region",
    "find_optimum",
    "find_region",
]

Law: TypeAlias = ReluLaw | SiluLaw

_GOLDEN = (np.sqrt(5) - 1) / 2
_N_STARTS = 4
_N_ROWS, _N_COLUMNS = 65, 33  # of a region: enough for three digits of its extent
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
        cut: Largest sum of squares inside, one number or one per shape.
        ends: Which ends of the search were inside: "alpha low", "alpha high", "log_k low", "log_k high".
    """

    shape: Shape
    bowls: Bowls
    cut: float | Array
    ends: frozenset[str]

    def intervals(self, law: Law) -> dict[str, tuple[float, float]]:
        """Return what each coefficient ranges over; an end that the search did not find goes on to the bound."""
        found = law.extents(self.shape, self.bowls, self.cut)
        for name, ends in law.open_ends(self.ends).items():
            for side, value in ends:
                found[name] = (value, found[name][1]) if side == 0 else (found[name][0], value)
        return found


@dataclass(frozen=True)
class Profile:
    """A law on a curve with its optimum; a region is computed once for each level.

    Attributes:
        law: The law, anchored at the curve's ends.
        data: The curve.
        best: The optimum.
    """

    law: Law
    data: Observations
    best: Optimum
    _regions: dict[float, Region] = field(default_factory=dict, repr=False, compare=False)

    def region(self, level: float) -> Region:
        """Return the part whose projections are intervals of a level such as 0.95."""
        if level not in self._regions:
            self._regions[level] = find_region(self.law, self.data, self.best, self.cut(level))
        return self._regions[level]

    def cut(self, level: float) -> float:
        """Return the largest sum of squares inside, by an F test of one parameter with the noise unknown."""
        freedom = len(self.data.y) - len(self.law.names)
        variance = max(self.best.sse / freedom, NOISE_FLOOR**2)
        return self.best.sse + float(f_distribution.ppf(level, 1, freedom)) * variance


def find_optimum(law: Law, data: Observations) -> Optimum:
    """Return the best point: the whole plane of alpha and log K on a grid, then its lowest valleys to the bottom."""
    alphas = alpha_grid(law)
    log_k, floors = best_log_k(law, data, alphas)
    low, high = float(law.log_k_grid[0]), float(law.log_k_grid[-1])

    def sse(point: Array) -> float:
        shape = Shape(np.exp(point[:1]), point[1:] if len(point) == 2 else np.zeros(1))
        return float(bowls_of(law, data, shape).solve()[0][0])

    found: list[tuple[float, Array]] = []
    for start in valleys(floors)[:_N_STARTS]:
        point, bounds = np.array([np.log(alphas[start])]), [(np.log(alphas[0]), np.log(alphas[-1]))]
        if high > low:
            point, bounds = np.append(point, log_k[start]), [*bounds, (low, high)]
        simplex = np.vstack([point, point + 0.05 * np.eye(len(point))])
        options = {"initial_simplex": simplex, "xatol": 1e-8, "fatol": 1e-12 * float(floors[start]), "maxiter": 500}
        done = minimize(sse, point, method="Nelder-Mead", bounds=bounds, options=options)
        found.append((float(done.fun), np.asarray(done.x)))
    point = min(found, key=lambda pair: pair[0])[1]
    shape = Shape(np.exp(point[:1]), point[1:] if len(point) == 2 else np.zeros(1))
    value, a, b = bowls_of(law, data, shape).solve()
    return Optimum(Shape(shape.alpha[0], shape.log_k[0]), float(a[0]), float(b[0]), float(value[0]))


def find_region(law: Law, data: Observations, best: Optimum, cut: float) -> Region:
    """Return what is below a cut: rows of alpha, each with its log K from rim to rim."""
    alpha = float(best.shape.alpha)

    def height(alphas: Array) -> Array:
        return np.where(alphas == alpha, best.sse, best_log_k(law, data, alphas)[1])

    rows, ends = alpha_rows(height, np.union1d(alpha_grid(law), alpha), alpha, cut)
    log_k = best_log_k(law, data, rows)[0]
    log_k[rows == alpha] = best.shape.log_k
    return fill_region(law, data, rows, log_k, np.full(len(rows), cut), ends)


def alpha_rows(height: Callable[[Array], Array], grid: Array, best: float, cut: float) -> tuple[Array, frozenset[str]]:
    """Return alphas from the lowest to the highest whose height is at most a cut, and which ends of the grid are.

    Args:
        height: Smallest sum of squares for each alpha.
        grid: Where the ends are looked for, with the best alpha among them.
        best: The best alpha.
        cut: The cut.
    """
    inside = np.flatnonzero((height(grid) <= cut) | (grid == best))
    first, last = int(inside[0]), int(inside[-1])
    ends: set[str] = set()
    low, high = float(grid[first]), float(grid[last])
    if first == 0:
        ends.add("alpha low")
    else:
        low = _cross(height, cut, low, float(grid[first - 1]))
    if last == len(grid) - 1:
        ends.add("alpha high")
    else:
        high = _cross(height, cut, high, float(grid[last + 1]))
    return np.union1d(_rim_to_rim(np.array([low]), np.array([high]), _N_ROWS)[0], best), frozenset(ends)


def fill_region(law: Law, data: Observations, rows: Array, log_k: Array, cuts: Array, ends: frozenset[str]) -> Region:
    """Return the region of rows of alpha with a cut each: in every row log K from rim to rim, and the best one."""
    low, high = _rims(law, data, cuts, rows, log_k)
    if len(law.log_k_grid) > 1:
        ends |= {"log_k low"} if low.min() <= law.log_k_grid[0] else frozenset()
        ends |= {"log_k high"} if high.max() >= law.log_k_grid[-1] else frozenset()
    columns = np.column_stack([_rim_to_rim(low, high, _N_COLUMNS), log_k])
    shape = Shape(np.repeat(rows, columns.shape[1]), columns.ravel())
    return Region(shape, bowls_of(law, data, shape), np.repeat(cuts, columns.shape[1]), ends)


def alpha_grid(law: Law) -> Array:
    """Return the exponents at which valleys are looked for, dense where laws are found."""
    high = law.alpha_max
    return np.union1d(np.geomspace(ALPHA_MIN, high, 24), np.linspace(ALPHA_MIN, min(3.0, high), 24))


def bowls_of(law: Law, data: Observations, shape: Shape) -> Bowls:
    """Return the bowls of shapes in parts that fit in memory."""
    size = max(1, _MAX_ELEMENTS // len(data.x))
    parts = []
    for start in range(0, len(shape.alpha), size):
        part = Shape(shape.alpha[start : start + size], shape.log_k[start : start + size])
        parts.append(Bowls.of(data, law.values(part, data.x)))
    return parts[0] if len(parts) == 1 else Bowls.joined(parts)


def best_log_k(law: Law, data: Observations, alphas: Array) -> tuple[Array, Array]:
    """Return the best log K of each alpha and the sum of squares there: a scan, then golden sections of all at once."""
    grid = law.log_k_grid
    floors = _sse(law, data, np.repeat(alphas, len(grid)), np.tile(grid, len(alphas))).reshape(len(alphas), -1)
    best = floors.argmin(axis=1)
    if len(grid) == 1:
        return np.zeros_like(alphas), floors[:, 0]
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = _sse(law, data, alphas, left), _sse(law, data, alphas, right)
    for _ in range(32):
        down = at_left < at_right  # the minimum is left of `right`
        low, high = np.where(down, low, left), np.where(down, right, high)
        new = np.where(down, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_new = _sse(law, data, alphas, new)
        left, right = np.where(down, new, right), np.where(down, left, new)
        at_left, at_right = np.where(down, at_new, at_right), np.where(down, at_left, at_new)
    middle = (low + high) / 2
    return middle, _sse(law, data, alphas, middle)


def valleys(heights: Array) -> list[int]:
    """Return the places of local minima, the lowest first."""
    padded = np.concatenate([[np.inf], heights, [np.inf]])
    places = np.flatnonzero((heights <= padded[:-2]) & (heights <= padded[2:]))
    return [int(place) for place in places[np.argsort(heights[places], kind="stable")]]


def _sse(law: Law, data: Observations, alpha: Array, log_k: Array) -> Array:
    return bowls_of(law, data, Shape(alpha, log_k)).solve()[0]


def _cross(height: Callable[[Array], Array], cut: float, inside: float, outside: float) -> float:
    """Return the last alpha below the cut on the way out: seven places between the two, again and again."""
    for _ in range(12):
        places = np.linspace(inside, outside, 9)
        above = height(places[1:-1]) > cut
        first = int(np.argmax(np.append(above, True))) + 1
        inside, outside = places[first - 1], places[first]
        if abs(outside - inside) < 1e-6 * abs(inside):
            break
    return inside


def _rims(law: Law, data: Observations, cuts: Array, rows: Array, log_k: Array) -> tuple[Array, Array]:
    """Return the outermost log K below the cut in each row, by bisection from the scan's last place inside."""
    grid = law.log_k_grid
    if len(grid) == 1:
        return log_k, log_k
    floors = _sse(law, data, np.repeat(rows, len(grid)), np.tile(grid, len(rows))).reshape(len(rows), -1)
    below = floors <= cuts[:, None]
    some = below.any(axis=1)
    first = np.where(some, below.argmax(axis=1), np.searchsorted(grid, log_k))
    last = np.where(some, len(grid) - 1 - below[:, ::-1].argmax(axis=1), np.searchsorted(grid, log_k) - 1)
    inside = [
        np.where(some, np.minimum(grid[first], log_k), log_k),
        np.where(some, np.maximum(grid[last], log_k), log_k),
    ]
    outside = [grid[np.maximum(first - 1, 0)], grid[np.minimum(last + 1, len(grid) - 1)]]
    near, far, alpha, cut = np.concatenate(inside), np.concatenate(outside), np.tile(rows, 2), np.tile(cuts, 2)
    for _ in range(24):
        middle = (near + far) / 2
        is_in = _sse(law, data, alpha, middle) <= cut
        near, far = np.where(is_in, middle, near), np.where(is_in, far, middle)
    return near[: len(rows)], near[len(rows) :]


def _rim_to_rim(low: Array, high: Array, n: int) -> Array:
    """Return n places between each pair, [pair, n], denser at the ends: the region's rim is round there."""
    return low[:, None] + (high - low)[:, None] * (1 - np.cos(np.linspace(0, np.pi, n))) / 2
