"""One law for several scales: a common exponent, and b, c and A_0 for each curve of its own.

1. Fit each curve by itself; its noise is what is left over, and its residuals are measured in it from here on.
2. For every alpha on a grid, fit the rest of every curve; the sum over the curves has the common alpha at its lowest.
3. Profile intervals as for a single curve: what one curve may use of the cut is what the others leave.
4. An F test of the common exponent against one exponent a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import f as f_distribution

from neuron_sparsity.laws.checks import check_level
from neuron_sparsity.laws.fit import observations
from neuron_sparsity.laws.linear import NOISE_FLOOR, Array, Observations
from neuron_sparsity.laws.profile import (
    Law,
    Optimum,
    Region,
    alpha_grid,
    alpha_rows,
    best_log_k,
    bowls_of,
    fill_region,
    find_optimum,
)
from neuron_sparsity.laws.result import BOUNDS, Prediction, band, bound_ends, containing, finite, limit_is_told
from neuron_sparsity.laws.shapes import LAWS, Shape

__all__ = ["JointCurve", "JointFit", "fit_joint"]


@dataclass(frozen=True)
class JointCurve:
    """One curve of a joint fit.

    Attributes:
        b: Logarithm of the factor of the exponential; None for SiLU.
        c: Factor of `D^alpha` (ReLU) or of `1 / D^alpha` (SiLU).
        A_0: The limit.
        intervals: (low, high) of each.
        at_bound: Which ends are a bound or infinite.
        mse: Weighted mean squared residual.
        mse_alone: The same with an exponent of its own.
        n_points: Points that were fitted.
    """

    b: float | None
    c: float
    A_0: float
    intervals: dict[str, tuple[float, float]]
    at_bound: dict[str, tuple[str, ...]]
    mse: float
    mse_alone: float
    n_points: int
    _law: Law = field(repr=False, compare=False)
    _best: Optimum = field(repr=False, compare=False)
    _region: Region = field(repr=False, compare=False)

    @property
    def limit(self) -> float:
        """The activation ratio for unbounded data: A_0."""
        return self.A_0

    def predict(self, tokens: float | Sequence[float] | Array) -> Prediction:
        """Return the activation ratio that the law gives, with the profile band of the fit's level.

        Args:
            tokens: Training tokens, > 0.

        Raises:
            ValueError: If a number of tokens is not positive and finite.
        """
        return band(self._law, self._best, self._region, tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the curve as JSON data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        result: dict[str, Any] = finite(data | {"limit": self.limit})
        return result


@dataclass(frozen=True)
class JointFit:
    """Several curves with one exponent.

    Attributes:
        law: `relu` or `silu`.
        alpha: The common exponent.
        alpha_interval: Its interval.
        level: Confidence level of all intervals.
        at_bound: Which ends of `alpha_interval` are a bound.
        curves: Each curve's own coefficients, by its name.
        p_value: Of a common exponent, by an F test against one exponent a curve.
        n_points: Points of all curves.
        warnings: Plain sentences on what the data do not tell.
    """

    law: str
    alpha: float
    alpha_interval: tuple[float, float]
    level: float
    at_bound: tuple[str, ...]
    curves: dict[str, JointCurve] = field(repr=False)
    p_value: float
    n_points: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON data."""
        names = [name for name in self.__dataclass_fields__ if name != "curves"]
        data: dict[str, Any] = finite({name: getattr(self, name) for name in names})
        return data | {"curves": {name: curve.to_json() for name, curve in self.curves.items()}}


@dataclass(frozen=True)
class _Curve:
    """A curve with its law, and the residuals' variance when it is fitted by itself."""

    law: Law
    data: Observations
    sse_alone: float
    variance: float

    def heights(self, alphas: Array) -> Array:
        """Return the smallest sum of squares at each alpha, in units of the variance."""
        return best_log_k(self.law, self.data, alphas)[1] / self.variance


def fit_joint(
    curves: Mapping[str, tuple[Sequence[float] | Array, Sequence[float] | Array]],
    law: Literal["relu", "silu"],
    *,
    drop_first: int | Mapping[str, int] = 0,
    level: float = 0.95,
) -> JointFit:
    """Return one law for several scales: curves that share alpha, each with its own b, c and A_0.

    The paper (arXiv:2411.02335) fits each scale by itself; its exponents differ from scale to scale. Whether one does
    for all is told by `p_value`.

    Args:
        curves: (tokens, activation_ratio) of each curve, by a name such as `0.1b`; plain tokens.
        law: `relu` or `silu`.
        drop_first: Points to leave out at the beginning: of every curve, or of each by its name.
        level: Confidence level of the intervals, in (0, 1).

    Returns:
        The fit.

    Raises:
        ValueError: If there are fewer than two curves, or one cannot be fitted: the message names it.

    Example:
        >>> D = np.linspace(2, 40, 20)
        >>> fit = fit_joint({"small": (D * 1e9, 0.40 - 0.1 / D**0.5), "large": (D * 1e9, 0.39 - 0.2 / D**0.5)}, "silu")
        >>> round(fit.alpha, 3), round(fit.curves["large"].A_0, 3)
        (0.5, 0.39)
    """
    if law not in LAWS:
        raise ValueError(f"law must be 'relu' or 'silu', got {law!r}")
    if len(curves) < 2:
        raise ValueError(f"a joint fit needs at least two curves, got {len(curves)}; use fit_law for a single one")
    check_level(level)
    unknown = [name for name in drop_first if name not in curves] if isinstance(drop_first, Mapping) else []
    if unknown:
        raise ValueError(f"drop_first names curves that were not passed: {', '.join(unknown)}")
    parts = {
        name: _alone(name, points, law, drop_first.get(name, 0) if isinstance(drop_first, Mapping) else drop_first)
        for name, points in curves.items()
    }

    def height(alphas: Array) -> Array:
        return np.sum([part.heights(alphas) for part in parts.values()], axis=0)

    n_points, n_own = sum(len(part.data.y) for part in parts.values()), len(LAWS[law].names) - 1
    freedom = n_points - len(parts) * n_own - 1
    grid = alpha_grid(min((part.law for part in parts.values()), key=lambda each: each.alpha_max))
    alpha = _lowest(height, grid)
    lowest = float(height(np.array([alpha]))[0])
    # Below 1 only by chance, or where the noise is below the floor: heights are in units of each curve's own variance.
    cut = lowest + float(f_distribution.ppf(level, 1, freedom)) * max(lowest / freedom, 1.0)
    rows, ends = alpha_rows(height, np.union1d(grid, alpha), alpha, cut)
    own = {name: part.heights(rows) for name, part in parts.items()}
    spare = cut - np.sum(list(own.values()), axis=0)
    inside = (spare >= 0) | (rows == alpha)
    interval = (0.0 if "alpha low" in ends else float(rows[0]), np.inf if "alpha high" in ends else float(rows[-1]))
    fitted = {
        name: _own_part(part, alpha, rows[inside], ((spare + own[name]) * part.variance)[inside], ends)
        for name, part in parts.items()
    }
    alone = sum(part.sse_alone / part.variance for part in parts.values())
    p_value = _p_value(lowest, alone, len(parts) - 1, n_points - len(parts) * (n_own + 1))
    return JointFit(
        law=law,
        alpha=alpha,
        alpha_interval=interval,
        level=level,
        at_bound=bound_ends({"alpha": interval}, BOUNDS).get("alpha", ()),
        curves=fitted,
        p_value=p_value,
        n_points=n_points,
        warnings=_warnings(fitted, {name: float(np.ptp(part.data.y)) for name, part in parts.items()}, p_value, level),
    )


def _p_value(together: float, alone: float, n_fewer: int, freedom: int) -> float:
    """Return how often curves that share an exponent lose as much by sharing it: an F test."""
    ratio = max(together - alone, 0.0) / n_fewer / max(alone / freedom, 1e-300)
    return float(f_distribution.sf(ratio, n_fewer, freedom))


def _alone(name: str, points: tuple[Sequence[float] | Array, Sequence[float] | Array], law: str, drop: int) -> _Curve:
    try:
        tokens, ratio = points
        data = observations(tokens, ratio, drop_first=drop)
    except (TypeError, ValueError) as error:
        raise ValueError(f"curve {name!r}: {error}") from None
    n_coefficients = len(LAWS[law].names)
    if len(data.y) <= n_coefficients:
        raise ValueError(f"curve {name!r}: {len(data.y)} points are too few; measure at least {n_coefficients + 1}")
    kind = LAWS[law](float(data.x[0]), float(data.x[-1]))
    best = find_optimum(kind, data)
    if best.b <= 0:
        raise ValueError(
            f"curve {name!r}: the {law} law can only {kind.direction}, and this curve does not; leave it out"
        )
    variance = max(best.sse / (len(data.y) - n_coefficients), NOISE_FLOOR**2)
    return _Curve(kind, data, best.sse, variance)


def _lowest(height: Any, grid: Array) -> float:
    """Return the alpha of least height: the grid's best place, then finer and finer grids around it."""
    heights = height(grid)
    for _ in range(8):
        best = int(heights.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        grid = np.union1d(np.linspace(low, high, 13), grid[best])
        heights = height(grid)
    return float(grid[heights.argmin()])


def _own_part(part: _Curve, alpha: float, rows: Array, cuts: Array, ends: frozenset[str]) -> JointCurve:
    law, data = part.law, part.data
    log_k, _ = best_log_k(law, data, np.array([alpha]))
    sse, a, b = (float(values[0]) for values in bowls_of(law, data, Shape(np.array([alpha]), log_k)).solve())
    best = Optimum(Shape(np.asarray(alpha), log_k[0]), a, b, sse)
    region = fill_region(law, data, rows, best_log_k(law, data, rows)[0], cuts, ends)
    found = region.intervals(law)
    values = law.coefficients(best.shape, a, b)
    intervals = containing(values, found)
    del intervals["alpha"]
    return JointCurve(
        b=values.get("b"),
        c=values["c"],
        A_0=values["A_0"],
        intervals=intervals,
        at_bound=bound_ends(intervals, BOUNDS),
        mse=sse / len(data.y),
        mse_alone=part.sse_alone / len(data.y),
        n_points=len(data.y),
        _law=law,
        _best=best,
        _region=region,
    )


def _warnings(
    curves: dict[str, JointCurve], changes: dict[str, float], p_value: float, level: float
) -> tuple[str, ...]:
    found = []
    if p_value < 0.05:
        found.append(
            f"The curves do not share one exponent (p = {p_value:.2g}): exponents of their own fit better; see fit_law."
        )
    open_limits = [name for name, curve in curves.items() if not limit_is_told(curve.intervals["A_0"], changes[name])]
    if open_limits:
        found.append(f"The data do not identify the limit of {', '.join(open_limits)} at {100 * level:g} %.")
    return tuple(found)
