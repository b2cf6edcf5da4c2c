"""Views of neurons: all of them by how often they are active, and one of them by how much it contributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuron_sparsity.report import _classes as activities
from neuron_sparsity.report import views
from neuron_sparsity.report._classes import DEAD, layer_labels
from neuron_sparsity.report._histogram import bins_of, values_histogram
from neuron_sparsity.report._neurons import frequency_map
from neuron_sparsity.report._text import count, percent_of, target, visible
from neuron_sparsity.viz._checks import finite, matrix, row_of
from neuron_sparsity.viz._display import View
from neuron_sparsity.viz._measured import figures, on

if TYPE_CHECKING:
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["histogram", "layer_map"]


def layer_map(stats: NeuronStatistics | Any, result: SparsityResult | None = None, *, measured: str = "") -> View:
    """Return every neuron by activation frequency, layers by neurons, dead ones in a colour of their own.

    Args:
        stats: The run; or an atlas of it, or a table with an atlas' columns layer, neuron, class and
            activation_frequency.
        result: Gives the thresholds that "active" refers to; else the first recorded ones, else "not exactly zero".
        measured: On what a table was measured, which it does not know itself.

    Returns:
        View: two maps with a read-out (sorted within layers, and in index order), and, for a run, the classes of each
        layer; as a figure, the sorted map.

    Raises:
        TypeError: If a result comes with an atlas, which has its own definition of active.
        ValueError: If a frequency is NaN, statistics and model disagree in shape, or rows of a table are missing.
    """
    if not hasattr(stats, "zero_count"):
        if result is not None:
            raise TypeError("an atlas has a definition of active of its own; give no result with it")
        return _of_atlas(stats, measured)
    active = activities.activity(stats, result)
    frequency = matrix(active.frequency, "activation frequency", ("layer", "neuron"))
    layers = layer_labels(stats)
    shape = (len(layers), stats.model.d_mlp)
    if frequency.shape != shape:
        raise ValueError(f"activation frequency must be {list(shape)}, one a neuron, got {list(frequency.shape)}")
    finite(frequency, "activation frequency", [f"layer {k}" for k in layers], [f"neuron {k}" for k in range(shape[1])])
    title = f"{count(frequency.size)} neurons by activation frequency"
    dead = active.dead
    definition = f"active: {active.definition}; dead, under {target(100 * DEAD)} of tokens: {count(dead.sum())} neurons"
    measured = on(stats.model, stats.corpus, f"{definition}; N = {count(stats.n_tokens)}")

    def draw() -> Any:
        return figures().classes(frequency, dead, layers=layers, title=title, measured=measured)

    return View(title, measured, views.neuron_map(stats, result) + views.class_counts(stats, result), draw)


def _of_atlas(source: Any, measured: str) -> View:
    table = getattr(source, "table", source)
    missing = [name for name in ("layer", "neuron", "class", "activation_frequency") if name not in table]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; ns.atlas(stats).table has it")
    ordered = table.sort_values(["layer", "neuron"])
    layers = [int(layer) for layer in ordered["layer"].unique()]
    width = int(ordered["neuron"].max()) + 1
    if not np.array_equal(ordered["neuron"], np.tile(np.arange(width), len(layers))):
        raise ValueError(f"the table has {len(table):,} rows, not one for each of {len(layers)} x {width:,} neurons")
    shape = (len(layers), width)
    frequency = np.asarray(ordered["activation_frequency"], dtype=np.float64).reshape(shape)
    finite(frequency, "activation_frequency", [f"layer {k}" for k in layers], [f"neuron {k}" for k in range(width)])
    dead = np.asarray(ordered["class"] == "dead").reshape(shape)
    title = f"{count(frequency.size)} neurons by activation frequency"
    said = getattr(source, "definitions", {"active": "as the table's column says"})
    if hasattr(source, "corpus"):
        words = f"active: {said['active']}; {said['classes']}: {count(dead.sum())} dead; N = {count(source.n_tokens)}"
        measured = on(source.model, source.corpus, words)
    body = frequency_map(
        frequency, dead, layers, active=said["active"], mark="dead", n_tokens=getattr(source, "n_tokens", None)
    )

    def draw() -> Any:
        return figures().classes(frequency, dead, layers=layers, title=title, measured=measured)

    return View(title, measured, body, draw)


def histogram(
    source: NeuronStatistics | ArrayLike,
    neuron: tuple[int, int] | None = None,
    *,
    quantity: str = "",
    measured: str = "",
    n_bins: int = 40,
) -> View:
    """Return how often a neuron contributes how much, as it was recorded; or a histogram of values of your own.

    Args:
        source: The run; or values, one axis.
        neuron: (layer, neuron) of the run; layer is the block's index.
        quantity: What values of your own are, with their unit.
        measured: On what they were measured.
        n_bins: Bins for values of your own; a recording has two an octave.

    Returns:
        View: bars; for a neuron on a logarithmic axis, with the layer's thresholds.

    Raises:
        TypeError: If a run comes without a neuron, or values with one.
        ValueError: If there is no such neuron, values are empty, NaN or infinite, or have no name.

    Example:
        >>> histogram([0.0, 0.5, 0.5, 1.0], quantity="activation frequency", n_bins=2).title
        'activation frequency of 4 values'
    """
    if hasattr(source, "zero_count"):
        if neuron is None:
            raise TypeError("a run has a histogram for each neuron: histogram(stats, (layer, neuron))")
        return _of_neuron(source, neuron)
    if neuron is not None:
        raise TypeError("a neuron is read from statistics; values of your own are one axis without it")
    values = matrix(source, "values", ("value",))
    finite(values, "values", range(len(values)))
    if not quantity or n_bins < 1:
        raise ValueError(f"values of your own need a name and bins: quantity={quantity!r}, n_bins={n_bins}")
    heights, edges = np.histogram(values, bins=n_bins)
    title = f"{quantity} of {count(len(values))} values"
    body = values_histogram(edges, heights, quantity=quantity, title=title)
    return View(title, measured, body, _drawing(edges, heights.astype(np.float64), title, measured, quantity))


def _drawing(edges: NDArray[Any], heights: NDArray[np.float64], title: str, measured: str, quantity: str) -> Any:
    look: dict[str, Any] = {"x": quantity, "y": "values", "log": False, "cuts": {}}
    return lambda: figures().histogram(edges[:-1], edges[1:], heights, title=title, measured=measured, **look)


def _of_neuron(stats: Any, neuron: tuple[int, int]) -> View:
    row, index = row_of(stats.model, neuron)
    counts = matrix(stats.histogram[row, index], "histogram", ("bin",))
    finite(counts, f"histogram of neuron ({neuron[0]}, {neuron[1]})", [f"bin {k}" for k in range(len(counts))])
    bins = bins_of(stats, row, index)
    title = f"Contributions of L{layer_labels(stats)[row]} N{index}"
    zeros = f"exactly zero on {percent_of(bins.zero_share)} of tokens"
    measured = on(stats.model, stats.corpus, f"{zeros}; N = {count(stats.n_tokens)}")
    cuts = {visible(name): cut for name, cut in bins.thresholds.items() if np.isfinite(cut) and cut > 0}
    look: dict[str, Any] = {"x": "contribution, in residual-stream norm", "y": "tokens, % of all", "log": True}

    def draw() -> Any:
        if not len(bins.low):
            raise ValueError(f"L{layer_labels(stats)[row]} N{index} contributed on no token: there is nothing to draw")
        heights = 100 * bins.share
        return figures().histogram(bins.low, bins.high, heights, title=title, measured=measured, cuts=cuts, **look)

    return View(title, measured, views.neuron_histogram(stats, row, index), draw)
