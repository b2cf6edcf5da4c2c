"""The two laws as `A_0 + B h(D)`: what `h` looks like for given exponents, and how B becomes the paper's b and c.

Each shape is anchored at the first point, `|h| = 1` there, so that nothing over- or underflows for any magnitude of
tokens. ReLU's `exp(-c D^alpha + b)` is written with alpha and K, the number of e-folds it decays by from the first to
the last point: `h = exp(-K (D^alpha - D_first^alpha) / (D_last^alpha - D_first^alpha))`. In these two the law stays
regular where it stops being identified: for alpha towards 0, c and b grow without bound while h becomes a power law.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neuron_sparsity.laws.linear import Array, Bowls

__all__ = ["LAWS", "ReluLaw", "Shape", "SiluLaw"]

ALPHA_MIN = 1e-3  # below it the laws are a power law (ReLU) and a logarithm (SiLU) to five digits
ALPHA_MAX = 20.0  # ten times the steepest published exponent
_MAX_LOG = 600.0  # exp of it is still a float64


@dataclass(frozen=True)
class Shape:
    """The nonlinear parameters: alpha, and the logarithm of K (0 where a law has none); arrays of one shape."""

    alpha: Array
    log_k: Array


@dataclass(frozen=True)
class ReluLaw:
    """`A(D) = exp(-c D^alpha + b) + A_0`, falling, D in billions of tokens (arXiv:2411.02335).

    Attributes:
        x_first: Logarithm of D at the first point.
        x_last: The same at the last point.
    """

    x_first: float
    x_last: float
    name = "relu"
    names = ("alpha", "b", "c", "A_0")
    formula = "exp(-c D^alpha + b) + A_0"
    direction = "fall"
    log_k_grid = np.linspace(np.log(1e-4), np.log(1e4), 140)

    @property
    def alpha_max(self) -> float:
        """Largest exponent that is tried."""
        return _alpha_max(self.x_first, self.x_last)

    def values(self, shape: Shape, x: Array) -> Array:
        """Return h at log-tokens x, [..., point]."""
        with np.errstate(over="ignore"):
            grown = np.expm1(shape.alpha[..., None] * (x - self.x_first))
            return np.exp(-(self._rate(shape)[..., None] * grown))

    def coefficients(self, shape: Shape, a: float, b: float) -> dict[str, float]:
        """Return alpha, b, c and A_0 in the paper's units."""
        with np.errstate(divide="ignore"):
            log_b = float(np.log(b))
        c = float(np.exp(self._log_c(shape)))
        return {"alpha": float(shape.alpha), "b": log_b + float(self._rate(shape)), "c": c, "A_0": a}

    def extents(self, shape: Shape, bowls: Bowls, cut: float | Array) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest value of each coefficient over all shapes and bowls below a cut."""
        low, high = bowls.extent(cut, 0.0, 1.0)
        known = np.isfinite(high)
        with np.errstate(divide="ignore"):
            b_low, b_high = (np.log(np.maximum(end, 0.0)) + self._rate(shape) for end in (low, high))
        log_c = self._log_c(shape)[known]
        return {
            "alpha": (float(shape.alpha[known].min()), float(shape.alpha[known].max())),
            "b": (float(np.nanmin(b_low)), float(np.nanmax(b_high))),
            "c": (float(np.exp(log_c.min())), float(np.exp(log_c.max()))),
            "A_0": _over_all(bowls.extent(cut, 1.0, 0.0)),
        }

    def open_ends(self, ends: frozenset[str]) -> dict[str, list[tuple[int, float]]]:
        """Return which ends (0 low, 1 high) of the intervals go on to which value, where the search ended inside."""
        found: dict[str, list[tuple[int, float]]] = {"alpha": [], "b": [], "c": []}
        if "alpha low" in ends:
            found["alpha"].append((0, 0.0))
        if "alpha high" in ends:
            found["alpha"].append((1, np.inf))
            found["c"].append((0, 0.0) if self.x_last >= 0 else (1, np.inf))
        if ends & {"alpha low", "log_k high"}:
            found["b"].append((1, np.inf))
            found["c"].append((1, np.inf))
        if "log_k low" in ends:
            found["c"].append((0, 0.0))
        return found

    def x_within(self, shape: Shape, b: Array, distance: float) -> Array:
        """Return the log-tokens at which the law is a distance from its limit; -inf where it is always nearer."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            grown = np.log(b / distance) / self._rate(shape)
            return self.x_first + np.log1p(np.maximum(grown, -1.0)) / shape.alpha

    def _rate(self, shape: Shape) -> Array:
        return np.exp(shape.log_k) / np.expm1(shape.alpha * (self.x_last - self.x_first))

    def _log_c(self, shape: Shape) -> Array:
        return np.log(self._rate(shape)) - shape.alpha * self.x_first


@dataclass(frozen=True)
class SiluLaw:
    """`A(D) = -c / D^alpha + A_0`, rising, D in billions of tokens (arXiv:2411.02335).

    Attributes:
        x_first: Logarithm of D at the first point.
        x_last: The same at the last point.
    """

    x_first: float
    x_last: float
    name = "silu"
    names = ("alpha", "c", "A_0")
    formula = "-c / D^alpha + A_0"
    direction = "rise"
    log_k_grid = np.zeros(1)  # it has no K

    @property
    def alpha_max(self) -> float:
        """Largest exponent that is tried."""
        return _alpha_max(self.x_first, self.x_last)

    def values(self, shape: Shape, x: Array) -> Array:
        """Return h at log-tokens x, [..., point]."""
        return -np.exp(np.minimum(-shape.alpha[..., None] * (x - self.x_first), _MAX_LOG / 2))

    def coefficients(self, shape: Shape, a: float, b: float) -> dict[str, float]:
        """Return alpha, c and A_0 in the paper's units."""
        return {"alpha": float(shape.alpha), "c": b * float(np.exp(shape.alpha * self.x_first)), "A_0": a}

    def extents(self, shape: Shape, bowls: Bowls, cut: float | Array) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest value of each coefficient over all shapes and bowls below a cut."""
        low, high = bowls.extent(cut, 0.0, 1.0)
        known = np.isfinite(high)
        to_c = np.exp(shape.alpha * self.x_first)
        return {
            "alpha": (float(shape.alpha[known].min()), float(shape.alpha[known].max())),
            "c": _over_all((low * to_c, high * to_c)),
            "A_0": _over_all(bowls.extent(cut, 1.0, 0.0)),
        }

    def open_ends(self, ends: frozenset[str]) -> dict[str, list[tuple[int, float]]]:
        """Return which ends (0 low, 1 high) of the intervals go on to which value, where the search ended inside."""
        found: dict[str, list[tuple[int, float]]] = {"alpha": [], "c": []}
        if "alpha low" in ends:
            found["alpha"].append((0, 0.0))
        if "alpha high" in ends:
            found["alpha"].append((1, np.inf))
            found["c"].append((1, np.inf) if self.x_first >= 0 else (0, 0.0))
        return found

    def x_within(self, shape: Shape, b: Array, distance: float) -> Array:
        """Return the log-tokens at which the law is a distance from its limit; -inf where it is always nearer."""
        with np.errstate(divide="ignore", over="ignore"):
            return self.x_first + np.log(b / distance) / shape.alpha


LAWS: dict[str, type[ReluLaw] | type[SiluLaw]] = {"relu": ReluLaw, "silu": SiluLaw}


def _alpha_max(x_first: float, x_last: float) -> float:
    return min(ALPHA_MAX, _MAX_LOG / max(abs(x_first), abs(x_last), x_last - x_first))


def _over_all(extent: tuple[Array, Array]) -> tuple[float, float]:
    return float(np.nanmin(extent[0])), float(np.nanmax(extent[1]))
