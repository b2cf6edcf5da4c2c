"""How the limit of the activation ratio depends on a model's shape and size: width-depth ratio, and scale.

1. *Width-depth ratio* (arXiv:2411.02335): the limit rises linearly up to a bottleneck and is flat beyond. For a given
   bottleneck that is a straight line in `min(ratio, bottleneck)`, solved exactly; the bottleneck is profiled over all
   places from the second smallest to the largest ratio.
2. *Scale*: a straight line of the limit over the decimal logarithm of the parameters, and whether its slope is told
   apart from zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from neuron_sparsity.laws.checks import check_level, check_ratios, check_weights, column
from neuron_sparsity.laws.linear import NOISE_FLOOR, Array, Bowls, Observations
from neuron_sparsity.laws.result import Estimate, Prediction, bound_ends, containing, finite

__all__ = ["ScaleFit", "WidthDepthFit", "fit_scale", "fit_width_depth"]

_N_PLACES = 2001


@dataclass(frozen=True)
class WidthDepthFit:
    """Limit over width-depth ratio: `intercept + slope * min(ratio, bottleneck)`.

    Attributes:
        intercept: The rising line at ratio 0.
        slope: Rise of the limit per unit of the ratio below the bottleneck.
        bottleneck: Width-depth ratio from which on the limit is flat.
        plateau: The limit there.
        intervals: (low, high) of the four.
        level: Their confidence level.
        at_bound: Which ends are the second smallest or the largest ratio, beyond which nothing is seen.
        mse: Weighted mean squared residual.
        mse_line: The same of a straight line without a bottleneck.
        r2: Share of the weighted variance that is explained.
        residuals: Measured minus fitted, in the order given.
        n_points: Number of points.
        warnings: Plain sentences on what the data do not tell.
    """

    intercept: float
    slope: float
    bottleneck: float
    plateau: float
    intervals: dict[str, tuple[float, float]]
    level: float
    at_bound: dict[str, tuple[str, ...]]
    mse: float
    mse_line: float
    r2: float
    residuals: Array = field(repr=False, compare=False)
    n_points: int
    warnings: tuple[str, ...]
    _region: tuple[Array, Bowls, float] = field(repr=False, compare=False)

    def predict(self, ratio: float | Sequence[float] | Array) -> Prediction:
        """Return the limit at width-depth ratios, with the profile band of the fit's level.

        Raises:
            ValueError: If a ratio is not positive and finite.
        """
        wanted = np.atleast_1d(column("ratio", np.atleast_1d(np.asarray(ratio))))
        if wanted.min(initial=1.0) <= 0:
            raise ValueError(f"ratio must be positive, got {wanted.min():g}; pass d_model / n_layers")
        mean = self.intercept + self.slope * np.minimum(wanted, self.bottleneck)
        places, bowls, cut = self._region
        ends = [bowls.extent(cut, 1.0, np.minimum(place, places)) for place in wanted]
        low = np.array([np.nanmin(low) for low, _ in ends])
        high = np.array([np.nanmax(high) for _, high in ends])
        return Prediction(mean, np.minimum(low, mean), np.maximum(high, mean))

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON data."""
        names = [name for name in self.__dataclass_fields__ if not name.startswith("_")]
        data: dict[str, Any] = finite({name: getattr(self, name) for name in names if name != "residuals"})
        return data | {"residuals": [float(value) for value in self.residuals]}


@dataclass(frozen=True)
class ScaleFit:
    """Limit over scale: `level_at_mean + slope * (log10(params) - mean of log10(params))`.

    Attributes:
        slope: Change of the limit for ten times the parameters.
        slope_interval: Its interval.
        level_at_mean: The limit at the geometric mean of the parameters.
        level_interval: Its interval.
        level: Confidence level of both.
        p_value: Of a slope of zero, by a t test.
        depends: Whether the interval of the slope excludes zero.
        change: Change of the fitted limit from the smallest to the largest model, with its interval.
        mse: Weighted mean squared residual.
        n_points: Number of models.
        verdict: One sentence.
    """

    slope: float
    slope_interval: tuple[float, float]
    level_at_mean: float
    level_interval: tuple[float, float]
    level: float
    p_value: float
    depends: bool
    change: Estimate
    mse: float
    n_points: int
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON data."""
        data: dict[str, Any] = finite({name: getattr(self, name) for name in self.__dataclass_fields__})
        return data


def fit_width_depth(
    ratio: Sequence[float] | Array,
    limit: Sequence[float] | Array,
    *,
    weights: Sequence[float] | Array | None = None,
    level: float = 0.95,
) -> WidthDepthFit:
    """Return the limit of the activation ratio over width-depth ratio: linear up to a bottleneck, then flat.

    `intercept + slope * min(ratio, bottleneck)`, as found in arXiv:2411.02335 (bottleneck 114 at 0.1B). Intervals are
    profile intervals over all bottlenecks from the second smallest to the largest ratio.

    Args:
        ratio: Width over depth of each model, `d_model / n_layers`, in any order.
        limit: Limit of its activation ratio (or the ratio at the end of training), in [0, 1].
        weights: Weight of each squared residual, such as `1 / standard_error**2`.
        level: Confidence level of the intervals, in (0, 1).

    Returns:
        The fit; `warnings` says where no bottleneck is seen.

    Raises:
        ValueError: If lengths differ, there are fewer than five points or four different ratios, a ratio is not
            positive or a limit outside [0, 1].

    Example:
        >>> ratio = np.array([10, 20, 40, 80, 160, 320])
        >>> fit = fit_width_depth(ratio, 0.05 + 0.0002 * np.minimum(ratio, 114))
        >>> round(fit.bottleneck), round(fit.plateau, 4)
        (114, 0.0728)
    """
    x, y = column("ratio", ratio), column("limit", limit)
    w = check_weights(weights, y, {"ratio": x, "limit": y})
    check_ratios("limit", y)
    check_level(level)
    if len(x) and x.min() <= 0:
        raise ValueError(f"ratio must be positive, got {x.min():g}; pass d_model / n_layers")
    different = np.unique(x)
    if len(x) < 5 or len(different) < 4:
        raise ValueError(
            f"{len(x)} points with {len(different)} different ratios are too few for a line and its bottleneck; "
            "measure at least five points with four different ratios"
        )
    data = Observations(x, y, w)
    ends = (float(different[1]), float(different[-1]))
    best, region = _profile_bottleneck(data, ends, level)
    own = _bowls(data, np.array([best]))
    slope, intercept = float(own.b[0]), float(own.a[0])
    estimates = {"intercept": intercept, "slope": slope, "bottleneck": best, "plateau": intercept + slope * best}
    intervals = containing(estimates, _width_depth_intervals(*region))
    residuals = y - intercept - slope * np.minimum(x, best)
    mse, mse_line = float(own.floor[0]) / len(x), float(_bowls(data, different[-1:]).floor[0]) / len(x)
    variance = float(np.average((y - np.average(y, weights=w)) ** 2, weights=w))
    at_bound = bound_ends({"bottleneck": intervals["bottleneck"]}, {"bottleneck": ends})
    return WidthDepthFit(
        **estimates,
        intervals=intervals,
        level=level,
        at_bound=at_bound,
        mse=mse,
        mse_line=mse_line,
        r2=1 - mse / variance if variance > 0 else math.nan,
        residuals=residuals,
        n_points=len(x),
        warnings=_width_depth_warnings(intervals, at_bound, level, ends),
        _region=region,
    )


def fit_scale(
    params: Sequence[float] | Array,
    limit: Sequence[float] | Array,
    *,
    weights: Sequence[float] | Array | None = None,
    level: float = 0.95,
) -> ScaleFit:
    """Return whether the limit of the activation ratio depends on scale: its slope over log10(params), with interval.

    arXiv:2411.02335 finds hardly any dependence. A slope that is not told apart from zero is no proof of none: the
    interval says how large a dependence the data leave room for.

    Args:
        params: Parameters of each model, > 0.
        limit: Limit of its activation ratio, in [0, 1].
        weights: Weight of each squared residual, such as `1 / standard_error**2`.
        level: Confidence level of the intervals, in (0, 1).

    Returns:
        The fit; `verdict` is one sentence.

    Raises:
        ValueError: If lengths differ, there are fewer than three models or all are of one size, parameters are not
            positive or a limit is outside [0, 1].

    Example:
        >>> fit = fit_scale([0.1e9, 0.2e9, 0.4e9, 0.8e9, 1.2e9], [0.0614, 0.0674, 0.0690, 0.0721, 0.0782])
        >>> round(fit.slope, 4), fit.depends
        (0.0136, True)
    """
    n, y = column("params", params), column("limit", limit)
    w = check_weights(weights, y, {"params": n, "limit": y})
    check_ratios("limit", y)
    check_level(level)
    if len(n) and n.min() <= 0:
        raise ValueError(f"params must be positive, got {n.min():g}; pass numbers of parameters, such as 1.2e9")
    if len(n) < 3 or len(np.unique(n)) < 2:
        raise ValueError(f"{len(n)} models of {len(np.unique(n))} sizes are too few; pass at least three of two sizes")
    x = np.log10(n)
    middle = float(np.average(x, weights=w))
    spread = float(w @ (x - middle) ** 2)
    slope, mean = float(w @ ((x - middle) * y)) / spread, float(np.average(y, weights=w))
    residuals = y - mean - slope * (x - middle)
    freedom = len(x) - 2
    deviation = math.sqrt(max(float(w @ residuals**2) / freedom, NOISE_FLOOR**2))
    reach = float(t_distribution.ppf((1 + level) / 2, freedom)) * deviation
    slope_reach, mean_reach = reach / math.sqrt(spread), reach / math.sqrt(len(x))
    p_value = 2 * float(t_distribution.sf(abs(slope) * math.sqrt(spread) / deviation, freedom))
    interval = (slope - slope_reach, slope + slope_reach)
    decades = float(x.max() - x.min())
    depends = bool(interval[0] > 0 or interval[1] < 0)
    percent = f"{100 * level:g} %"
    told = f"{slope:+.3g} for ten times the parameters ({percent} interval {interval[0]:+.3g} to {interval[1]:+.3g})"
    return ScaleFit(
        slope=slope,
        slope_interval=interval,
        level_at_mean=mean,
        level_interval=(mean - mean_reach, mean + mean_reach),
        level=level,
        p_value=p_value,
        depends=depends,
        change=Estimate(slope * decades, interval[0] * decades, interval[1] * decades),
        mse=float(np.average(residuals**2, weights=w)),
        n_points=len(x),
        verdict=f"The limit {'changes' if depends else 'shows no dependence on scale'}: {told}.",
    )


def _bowls(data: Observations, places: Array) -> Bowls:
    return Bowls.of(data, np.minimum(data.x, places[:, None]), bounded=False)


def _profile_bottleneck(
    data: Observations, ends: tuple[float, float], level: float
) -> tuple[float, tuple[Array, Bowls, float]]:
    """Return the best bottleneck, and the bottlenecks that fit about as well, with their lines and the cut."""
    places = np.union1d(np.linspace(*ends, _N_PLACES), data.x[(data.x >= ends[0]) & (data.x <= ends[1])])
    best = _refine(data, places)
    sse = float(_bowls(data, np.array([best])).floor[0])
    freedom = len(data.x) - 3
    cut = sse + float(f_distribution.ppf(level, 1, freedom)) * max(sse / freedom, NOISE_FLOOR**2)
    inside = np.flatnonzero(_bowls(data, places).floor <= cut)
    low = min(places[max(inside[0] - 1, 0)], best) if len(inside) else best
    high = max(places[min(inside[-1] + 1, len(places) - 1)], best) if len(inside) else best
    near = np.union1d(np.linspace(low, high, _N_PLACES), best)
    return best, (near, _bowls(data, near), cut)


def _refine(data: Observations, places: Array) -> float:
    """Return the bottleneck of the smallest sum of squares: the best of some places, then of finer ones around it."""
    for _ in range(7):
        best = int(_bowls(data, places).floor.argmin())
        place, low, high = places[best], places[max(best - 1, 0)], places[min(best + 1, len(places) - 1)]
        places = np.union1d(np.linspace(low, high, 21), place)
    return float(place)


def _width_depth_intervals(places: Array, bowls: Bowls, cut: float) -> dict[str, tuple[float, float]]:
    inside = places[(bowls.floor <= cut) | (bowls.floor == bowls.floor.min())]
    found = {"bottleneck": (float(inside[0]), float(inside[-1]))}
    for name, f_a, f_b in (("intercept", 1.0, 0.0), ("slope", 0.0, 1.0), ("plateau", 1.0, places)):
        low, high = bowls.extent(cut, f_a, f_b)
        found[name] = (float(np.nanmin(low)), float(np.nanmax(high)))
    return found


def _width_depth_warnings(
    intervals: dict[str, tuple[float, float]],
    at_bound: dict[str, tuple[str, ...]],
    level: float,
    limits: tuple[float, float],
) -> tuple[str, ...]:
    percent, found = f"{100 * level:g} %", []
    ends = at_bound.get("bottleneck", ())
    if "high" in ends:
        found.append(
            f"No bottleneck is told: a straight line up to the largest ratio, {limits[1]:g}, is in the {percent} "
            "interval; models with a larger ratio would show one."
        )
    if "low" in ends:
        found.append(
            f"The bottleneck may lie below {limits[0]:g}, the second smallest ratio; models with smaller ratios would "
            "tell."
        )
    low, high = intervals["slope"]
    if low <= 0 <= high:
        found.append(f"A slope of 0 is in the {percent} interval: the limit is not shown to depend on the ratio.")
    elif high < 0:
        found.append("The limit falls with the ratio; the paper's law rises.")
    return tuple(found)
