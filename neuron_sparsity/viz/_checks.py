"""What a view is given: arrays of the promised shape, no NaN, and no more of it than a page can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BYTES", "finite", "fits", "matrix", "row_of", "same_length"]

MOST_BYTES = 8_000_000
"""What one view may put into a page. A notebook of a dozen such views still opens."""


def matrix(values: Any, what: str, axes: Sequence[str]) -> NDArray[np.float64]:
    """Return values as a float64 array with one axis a name, none of them empty.

    Raises:
        TypeError: If they are no numbers.
        ValueError: If the number of axes is another, or there is nothing to show.
    """
    if hasattr(values, "detach"):  # a tensor: bfloat16 has no NumPy type
        values = values.detach().double().cpu()
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be numbers [{', '.join(axes)}], got {type(values).__name__}: {error}") from error
    if found.ndim != len(axes) or found.size == 0:
        raise ValueError(f"{what} must be [{', '.join(axes)}] with at least one value, got shape {list(found.shape)}")
    return found


def same_length(names: Sequence[Any], length: int, what: str, axis: str) -> None:
    """Raise ValueError unless there is one name for each place of an axis."""
    if len(names) != length:
        raise ValueError(f"{what} must be one a {axis}: got {len(names):,} for {length:,}")


def finite(values: NDArray[np.float64], what: str, *names: Sequence[Any]) -> NDArray[np.float64]:
    """Return values that are all finite.

    Args:
        values: Any number of axes.
        what: What they are, for the error.
        *names: What the places of each axis are called.

    Raises:
        ValueError: If one is NaN or infinite: a colour for it would be a lie. It names the first.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        at = ", ".join(str(axis[place]) for axis, place in zip(names, bad[0], strict=True))
        value = values[tuple(bad[0])]
        raise ValueError(
            f"{what}: {len(bad):,} of {values.size:,} values are not finite, the first is {value:g} at {at}; leave "
            "those out or measure them again"
        )
    return values


def fits(n: int, bytes_each: float, what: str, *, mend: str) -> None:
    """Raise ValueError if `n` things of so many bytes each are more than a page can hold, with the number that fits.

    Args:
        n: How many.
        bytes_each: What one of them adds to the page.
        what: What they are, in the plural.
        mend: What to choose fewer of.
    """
    if n * bytes_each > MOST_BYTES:
        most = max(int(MOST_BYTES / bytes_each), 0)
        raise ValueError(
            f"{n:,} {what} would make a page of about {n * bytes_each / 1e6:,.0f} MB; {most:,} fit into "
            f"{MOST_BYTES / 1e6:g} MB: {mend}"
        )


def row_of(model: Any, neuron: Any) -> tuple[int, int]:
    """Return (row, index) of a neuron that is given as (layer, neuron), where layer is the block's index.

    Raises:
        TypeError: If it is no pair of whole numbers.
        ValueError: If the model has no such neuron.
    """
    try:
        layer, index = (int(part) for part in neuron)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a neuron is (layer, neuron), such as (3, 17), got {neuron!r}") from error
    layers = [int(block) for block in getattr(model, "layers", None) or range(model.n_layers)]
    if layer not in layers or not 0 <= index < model.d_mlp:
        raise ValueError(
            f"no neuron ({layer}, {index}) in {model.name}: layers {layers[0]} to {layers[-1]}, neurons 0 to "
            f"{model.d_mlp - 1}"
        )
    return layers.index(layer), index
