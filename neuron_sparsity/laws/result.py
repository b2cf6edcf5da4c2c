"""What a fit of a law gives back: coefficients with intervals, the curve with a band, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from neuron_sparsity.laws.checks import check_level
from neuron_sparsity.laws.linear import Array
from neuron_sparsity.laws.profile import Law, Optimum, Profile, Region
from neuron_sparsity.laws.rivals import LawScore

__all__ = [
    "BILLION",
    "BOUNDS",
    "Estimate",
    "LawFit",
    "Prediction",
    "band",
    "bound_ends",
    "containing",
    "finite",
    "limit_is_told",
]

BILLION = 1e9
BOUNDS = {"alpha": (0.0, math.inf), "c": (0.0, math.inf), "A_0": (0.0, 1.0)}


class Prediction(NamedTuple):
    """A curve with its band, one element a place asked for."""

    mean: Array
    low: Array
    high: Array


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LawFit:
    """A law fitted to activation ratio over training tokens; D is in billions of tokens, as in arXiv:2411.02335.

    ReLU: `A(D) = exp(-c D^alpha + b) + A_0`. SiLU: `A(D) = -c / D^alpha + A_0`. Intervals are profile intervals: all
    values for which the best curve that has them fits about as well as the best of all. They do not say that the law is
    the right one: compare `rivals`.

    Attributes:
        law: `relu` or `silu`.
        alpha: Exponent.
        b: Logarithm of the factor of the exponential; None for SiLU.
        c: Factor of `D^alpha` (ReLU) or of `1 / D^alpha` (SiLU).
        A_0: The limit for unbounded data.
        intervals: (low, high) of each coefficient.
        level: Their confidence level.
        at_bound: Which ends are no result of the data but a bound or infinite: {"A_0": ("low",)}.
        noise: `independent` or `ar1`: what the intervals assume of neighbouring residuals.
        correlation: Correlation of neighbouring residuals, estimated; it is used where noise is `ar1`.
        durbin_watson: Of the weighted residuals: 2 if independent, towards 0 if neighbours are alike.
        mae: Weighted mean absolute residual.
        mse: Weighted mean squared residual.
        r2: Share of the weighted variance that the law explains.
        aicc: Akaike's criterion corrected for few points; inf with too few.
        residuals: Measured minus fitted, in the order of the points.
        n_points: Points that were fitted.
        drop_first: Points left out at the beginning.
        holdout: Share of the tokens up to which points were fitted for the held-out errors in `rivals`.
        rivals: This law, the other one and the rival curves, with their errors in and out of sample; empty if they
            were not asked for.
        choice: One sentence on how the law was chosen.
        warnings: Plain sentences on what the data do not tell.
    """

    law: str
    alpha: float
    b: float | None
    c: float
    A_0: float
    intervals: dict[str, tuple[float, float]]
    level: float
    at_bound: dict[str, tuple[str, ...]]
    noise: str
    correlation: float
    durbin_watson: float
    mae: float
    mse: float
    r2: float
    aicc: float
    residuals: Array = field(repr=False, compare=False)
    n_points: int
    drop_first: int
    holdout: float
    rivals: tuple[LawScore, ...] = field(repr=False)
    choice: str
    warnings: tuple[str, ...]
    profile: Profile = field(repr=False, compare=False)

    @property
    def limit(self) -> float:
        """The activation ratio for unbounded data: A_0."""
        return self.A_0

    @property
    def limit_interval(self) -> tuple[float, float]:
        """The interval of the limit."""
        return self.intervals["A_0"]

    @property
    def formula(self) -> str:
        """The law, with D in billions of tokens."""
        return self.profile.law.formula

    def predict(self, tokens: float | Sequence[float] | Array, level: float = 0.95) -> Prediction:
        """Return the activation ratio that the law gives, with its profile band.

        The band is that of the curve, not of a single measurement around it, and it assumes that the law goes on to
        hold. Ratios are not clipped to [0, 1].

        Args:
            tokens: Training tokens, > 0.
            level: Confidence level of the band, in (0, 1).

        Returns:
            mean, low and high, each [token].

        Raises:
            ValueError: If a number of tokens is not positive and finite, or the level is outside (0, 1).

        Example:
            >>> from neuron_sparsity.laws import fit_law
            >>> D = np.arange(1, 21)
            >>> fit = fit_law(D * 1e9, 0.4 - 0.1 / D**0.5, "silu")
            >>> float(fit.predict(1e11).mean[0].round(4))
            0.39
        """
        check_level(level)
        return band(self.profile.law, self.profile.best, self.profile.region(level), tokens)

    def tokens_to_within(self, x: float, level: float = 0.95) -> Estimate:
        """Return the training tokens at which the law is `x` away from its limit, with the profile interval.

        Args:
            x: Distance in activation ratio, > 0.
            level: Confidence level, in (0, 1).

        Returns:
            Tokens: 0 where the law is always nearer, inf where more tokens than a float64 holds are needed.

        Raises:
            ValueError: If x is not positive, or the level is outside (0, 1).

        Example:
            >>> from neuron_sparsity.laws import fit_law
            >>> D = np.arange(1, 21)
            >>> fit = fit_law(D * 1e9, 0.4 - 0.1 / D**0.5, "silu")
            >>> round(fit.tokens_to_within(0.01).value / 1e9, 2)
            100.0
        """
        check_level(level)
        if not (x > 0 and math.isfinite(x)):
            raise ValueError(f"x must be a positive distance in activation ratio, got {x}")
        law, best, region = self.profile.law, self.profile.best, self.profile.region(level)
        low, high = region.bowls.extent(region.cut, 0.0, 1.0)
        known = np.isfinite(high)
        with np.errstate(over="ignore"):
            value = BILLION * np.exp(law.x_within(best.shape, np.asarray(best.b), x))
            ends = [BILLION * np.exp(law.x_within(region.shape, np.maximum(end, 0.0), x)[known]) for end in (low, high)]
        return Estimate(float(value), float(min(ends[0].min(), value)), float(max(ends[1].max(), value)))

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON data: coefficients by their names, infinite ends as None.

        Example:
            >>> from neuron_sparsity.laws import fit_law
            >>> D = np.arange(1, 21)
            >>> data = fit_law(D * 1e9, 0.4 - 0.1 / D**0.5, "silu").to_json()
            >>> data["law"], round(data["alpha"], 3), round(data["limit"], 3)
            ('silu', 0.5, 0.4)
        """
        coefficients = {name: getattr(self, name) for name in self.profile.law.names}
        data = (
            {"law": self.law, "formula": self.formula}
            | coefficients
            | {
                "limit": self.limit,
                "intervals": {name: list(ends) for name, ends in self.intervals.items()},
                "limit_interval": list(self.limit_interval),
                "at_bound": {name: list(ends) for name, ends in self.at_bound.items()},
                "residuals": [float(residual) for residual in self.residuals],
                "rivals": [vars(score) for score in self.rivals],
                "warnings": list(self.warnings),
            }
        )
        plain = ("level", "noise", "correlation", "durbin_watson", "mae", "mse", "r2", "aicc", "n_points", "drop_first")
        data |= {name: getattr(self, name) for name in (*plain, "holdout", "choice")}
        result: dict[str, Any] = finite(data)
        return result


def band(law: Law, best: Optimum, region: Region, tokens: float | Sequence[float] | Array) -> Prediction:
    """Return a law's curve at numbers of tokens, and what it ranges over in a region."""
    wanted = np.atleast_1d(np.asarray(tokens, dtype=np.float64))
    if wanted.ndim != 1 or not bool(np.all((wanted > 0) & np.isfinite(wanted))):
        raise ValueError("tokens must be positive, finite numbers; pass training tokens, such as 1e9")
    x = np.log(wanted / BILLION)
    mean = best.a + best.b * law.values(best.shape, x)
    low, high = mean.copy(), mean.copy()
    for place, height in enumerate(law.values(region.shape, x).T):
        ends = region.bowls.extent(region.cut, 1.0, height)
        low[place], high[place] = np.nanmin(ends[0]), np.nanmax(ends[1])
    return Prediction(mean, np.minimum(low, mean), np.maximum(high, mean))


def limit_is_told(interval: tuple[float, float], change: float) -> bool:
    """Return whether an interval of the limit is inside (0, 1) and no wider than the ratio changed over the data."""
    low, high = interval
    return low > 0 and high < 1 and high - low <= change


def finite(value: Any) -> Any:
    """Return JSON data with None in place of infinite and NaN numbers.

    Example:
        >>> finite({"c": [0.0, float("inf")]})
        {'c': [0.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def containing(
    estimates: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Return intervals that reach to the estimates: a region's rows may just miss its own middle.

    Example:
        >>> containing({"c": 0.3}, {"c": (0.1, 0.2)})
        {'c': (0.1, 0.3)}
    """
    return {name: (min(low, estimates[name]), max(high, estimates[name])) for name, (low, high) in intervals.items()}


def bound_ends(
    intervals: dict[str, tuple[float, float]], bounds: dict[str, tuple[float, float]]
) -> dict[str, tuple[str, ...]]:
    """Return which ends of the intervals are a bound or infinite.

    Example:
        >>> bound_ends({"A_0": (0.0, 0.07), "c": (0.1, 0.2)}, {"A_0": (0.0, 1.0), "c": (0.0, math.inf)})
        {'A_0': ('low',)}
    """
    found = {}
    for name, (low, high) in intervals.items():
        least, most = bounds.get(name, (-math.inf, math.inf))
        ends = ("low",) * (low <= least) + ("high",) * (high >= most)
        if ends:
            found[name] = ends
    return found
