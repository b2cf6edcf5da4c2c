"""The linear half of a fit: `y = A_0 + B h` for a whole grid of shapes `h` at once, with bounds.

For one shape the sum of squares is a bowl over (A_0, B). `Bowls` holds a bowl per shape: where its bottom is, how deep
it is, how it is curved. With `0 <= A_0 <= 1` and `B >= 0` the best point and the extent of the part below a cut in
any direction, are exact: the bottom or the rim where that is allowed, and otherwise one of the three edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOISE_FLOOR", "Array", "Bowls", "Observations"]

Array: TypeAlias = NDArray[np.float64]

NOISE_FLOOR = 1e-8
"""Ratios arrive as float32: nothing smaller is noise or signal."""


@dataclass(frozen=True)
class Observations:
    """What is fitted.

    Attributes:
        x: Natural logarithm of the tokens in billions, rising, [point].
        y: Activation ratio, [point].
        weight: Weight of each squared residual, of mean 1, [point].
        correlation: Correlation of neighbouring residuals, in [0, 1); 0 where the noise is independent.
    """

    x: Array
    y: Array
    weight: Array
    correlation: float = 0.0

    def whiten(self, values: Array) -> Array:
        """Return values [..., point] in units in which the noise is independent and of one size."""
        scaled: Array = values * np.sqrt(self.weight)
        rho = self.correlation
        if rho == 0:
            return scaled
        innovations = (scaled[..., 1:] - rho * scaled[..., :-1]) / np.sqrt(1 - rho**2)
        return np.concatenate([scaled[..., :1], innovations], axis=-1)


@dataclass(frozen=True)
class Bowls:
    """Sums of squares over (A_0, B), a bowl per shape.

    Attributes:
        floor: Sum of squares at the bottom, without bounds, [shape].
        a: A_0 at the bottom.
        b: B at the bottom.
        m_aa: Curvature along A_0: half the second derivative, the same for every shape.
        m_ab: Mixed curvature.
        spread: Curvature along B where A_0 follows.
        bounded: Whether 0 <= A_0 <= 1 and B >= 0 hold; without it both are free.
    """

    floor: Array
    a: Array
    b: Array
    m_aa: float
    m_ab: Array
    spread: Array
    bounded: bool = True

    @classmethod
    def of(cls, data: Observations, shapes: Array, *, bounded: bool = True) -> Bowls:
        """Return the bowls of shapes [..., point]."""
        one, y, h = data.whiten(np.ones_like(data.y)), data.whiten(data.y), data.whiten(shapes)
        m_aa = float(one @ one)
        h_mean, y_mean = h @ one / m_aa, float(y @ one) / m_aa
        h = h - h_mean[..., None] * one  # without its constant part: exact where h is nearly constant
        spread = np.maximum(np.einsum("...i,...i->...", h, h), 1e-200)
        b = h @ (y - y_mean * one) / spread
        rest = y - y_mean * one - b[..., None] * h
        floor = np.einsum("...i,...i->...", rest, rest)
        return cls(floor, y_mean - b * h_mean, b, m_aa, h_mean * m_aa, spread, bounded)

    @classmethod
    def joined(cls, parts: Sequence[Bowls]) -> Bowls:
        """Return the bowls of several calls as one."""
        columns = ([getattr(part, name) for part in parts] for name in ("floor", "a", "b", "m_ab", "spread"))
        floor, a, b, m_ab, spread = (np.concatenate(column) for column in columns)
        return cls(floor, a, b, parts[0].m_aa, m_ab, spread, parts[0].bounded)

    @property
    def m_bb(self) -> Array:
        """Curvature along B where A_0 stays."""
        return self.spread + self.m_ab**2 / self.m_aa

    def sse(self, a: Array, b: Array) -> Array:
        """Return the sum of squares at a point of each bowl."""
        along = b - self.b
        return self.floor + self.spread * along**2 + self.m_aa * (a - self.a + self.m_ab / self.m_aa * along) ** 2

    def solve(self) -> tuple[Array, Array, Array]:
        """Return (sum of squares, A_0, B) at the best allowed point."""
        inside = self._allowed(self.a, self.b)
        if inside.all():
            return self.floor, self.a, self.b
        edges = [(np.full_like(self.a, end), np.maximum(self.b_at(end), 0.0)) for end in (0.0, 1.0)]
        edges.append((np.clip(self.a_at(0.0), 0.0, 1.0), np.zeros_like(self.b)))
        a, b = (np.stack(parts) for parts in zip(*edges, strict=True))
        best = np.argmin(self.sse(a, b), axis=0)[None]
        a, b = (np.take_along_axis(values, best, axis=0)[0] for values in (a, b))
        a, b = np.where(inside, self.a, a), np.where(inside, self.b, b)
        return np.where(inside, self.floor, self.sse(a, b)), a, b

    def extent(self, cut: float | Array, f_a: float, f_b: Array | float) -> tuple[Array, Array]:
        """Return the lowest and the highest `f_a A_0 + f_b B` whose sum of squares is at most a cut, within the bounds.

        Args:
            cut: The largest sum of squares that still counts, one number or one per shape.
            f_a: Factor of A_0.
            f_b: Factor of B, one number or one per shape.

        Returns:
            (low, high), each [shape]; NaN where no allowed point is below the cut.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            depth = cut - self.floor
            slope_b = (f_b - self.m_ab * f_a / self.m_aa) / self.spread  # the inverse curvature times f
            slope_a = (f_a - self.m_ab * slope_b) / self.m_aa
            reach = np.sqrt(depth / np.maximum(f_a * slope_a + f_b * slope_b, 1e-300))
            ends: list[Array] = []
            for sign in (-1.0, 1.0):
                a, b = self.a + sign * reach * slope_a, self.b + sign * reach * slope_b
                ends.append(np.where(self._allowed(a, b), f_a * a + f_b * b, np.nan))
            if not self.bounded:
                return ends[0], ends[1]
            edges = self._edges(depth)
            values = [f_a * a + f_b * b for a, b in edges]
            low = np.where(np.isnan(ends[0]), np.fmin.reduce(values), ends[0])
            high = np.where(np.isnan(ends[1]), np.fmax.reduce(values), ends[1])
        return low, high

    def b_at(self, a: float) -> Array:
        """Return the best B for a given A_0, without bounds."""
        return self.b - self.m_ab / self.m_bb * (a - self.a)

    def a_at(self, b: float) -> Array:
        """Return the best A_0 for a given B, without bounds."""
        return self.a - self.m_ab / self.m_aa * (b - self.b)

    def _allowed(self, a: Array, b: Array) -> NDArray[np.bool_]:
        if not self.bounded:
            return np.ones(a.shape, dtype=bool)
        return (a >= 0) & (a <= 1) & (b >= 0)

    def _edges(self, depth: Array) -> list[tuple[Array, Array]]:
        """Return the ends of the allowed parts of the three edges that are below the cut; NaN where there are none."""
        ends: list[tuple[Array, Array]] = []
        for a in (0.0, 1.0):
            curvature = self.m_aa * self.spread / self.m_bb
            reach = np.sqrt((depth - curvature * (a - self.a) ** 2) / self.m_bb)
            middle = self.b_at(a)
            outside = middle + reach < 0
            for b in (np.maximum(middle - reach, 0.0), middle + reach):
                ends.append((np.full_like(b, a), np.where(outside, np.nan, b)))
        reach = np.sqrt((depth - self.spread * self.b**2) / self.m_aa)
        middle = self.a_at(0.0)
        outside = (middle + reach < 0) | (middle - reach > 1)
        for a_end in (np.clip(middle - reach, 0.0, 1.0), np.clip(middle + reach, 0.0, 1.0)):
            ends.append((np.where(outside, np.nan, a_end), np.zeros_like(a_end)))
        return ends
