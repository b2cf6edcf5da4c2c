"""Checks of what a user passes: one line that says what is wrong and what mends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from neuron_sparsity.laws.linear import Array

__all__ = ["check_level", "check_ratios", "check_weights", "column"]


def column(name: str, values: Sequence[float] | Array) -> Array:
    """Return finite numbers as a vector.

    Raises:
        ValueError: If they are no numbers, not finite or no plain list.
    """
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {str(values)[:60]}; convert them first") from None
    if numbers.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, got an array of shape {numbers.shape}; flatten it")
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise ValueError(f"{name} must be finite, got {numbers[bad[0]]} at position {bad[0]}; leave that point out")
    return numbers


def check_weights(weights: Sequence[float] | Array | None, y: Array, columns: Mapping[str, Array]) -> Array:
    """Return weights of mean 1 after checking that all columns are of one length.

    Raises:
        ValueError: If lengths differ or a weight is not positive.
    """
    (first, x), (second, _) = columns.items()
    if len(x) != len(y):
        raise ValueError(f"{first} and {second} differ in length: {len(x)} and {len(y)}; give one of each a point")
    w = np.ones_like(y) if weights is None else column("weights", weights)
    if len(w) != len(y):
        raise ValueError(f"weights and {second} differ in length: {len(w)} and {len(y)}; give one weight a point")
    if len(w) == 0:
        return w
    if w.min() <= 0:
        raise ValueError(f"weights must be positive, got {w.min():g}; leave a point out instead of weighing it with 0")
    return np.asarray(w / w.mean())


def check_ratios(name: str, y: Array) -> None:
    """Raise ValueError unless all are in [0, 1]."""
    outside = np.flatnonzero((y < 0) | (y > 1))
    if len(outside):
        i = int(outside[0])
        mend = "divide percentages by 100" if y[i] > 1 else "leave that point out"
        raise ValueError(f"{name} must be in [0, 1], got {y[i]:g} at position {i}; {mend}")


def check_level(level: float) -> None:
    """Raise ValueError unless a confidence level is in (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}; 0.95 asks for 95 % intervals")
