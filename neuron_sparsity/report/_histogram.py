"""The recorded histogram of one neuron's contributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neuron_sparsity.kernels import histogram_edges
from neuron_sparsity.report._charts import Chart, linear_axis, log_axis
from neuron_sparsity.report._classes import array, layer_labels
from neuron_sparsity.report._fragments import figure, note
from neuron_sparsity.report._text import count, number, percent_of, plain, visible

if TYPE_CHECKING:
    from neuron_sparsity.recorder import NeuronStatistics

__all__ = ["Bins", "bins_of", "neuron_histogram", "values_histogram"]


@dataclass(frozen=True)
class Bins:
    """One neuron's contributions by size, without the exact zeros.

    Attributes:
        low: Lower edge of each bin that holds a token, ascending; the first bin of a recording starts at half its edge,
            since a logarithmic axis has no zero.
        high: Upper edges; the last bin of a recording ends at the neuron's maximum.
        share: Share of all tokens in each bin.
        zero_share: Share of all tokens on which the neuron's post-activation is exactly zero.
        thresholds: Recorded thresholds of its layer, by name.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    share: NDArray[np.float64]
    zero_share: float
    thresholds: dict[str, float]


def bins_of(stats: NeuronStatistics, row: int, neuron: int) -> Bins:
    """Return the histogram of one neuron; `row` counts the measured layers from 0."""
    edges = histogram_edges().numpy()
    counts = array(stats.histogram)[row, neuron].astype(np.float64)
    zeros = float(array(stats.zero_count)[row, neuron])
    counts[0] -= zeros
    top = max(float(array(stats.contribution_max)[row, neuron]), float(edges[-1]) * 1.5)
    low, high = np.maximum(edges, edges[1] / 2), np.append(edges[1:], top)
    held = counts > 0
    cuts = array(stats.thresholds)[row].astype(np.float64)
    named = dict(zip(stats.threshold_names, cuts.tolist(), strict=True))
    return Bins(low[held], high[held], counts[held] / stats.n_tokens, zeros / stats.n_tokens, named)


def neuron_histogram(stats: NeuronStatistics, row: int, neuron: int) -> str:
    """Return how often one neuron contributes how much, on a logarithmic scale, with the layer's thresholds."""
    bins, name = bins_of(stats, row, neuron), f"L{layer_labels(stats)[row]} · N{neuron}"
    title = f"Contributions of {name}"
    zeros = f"Exactly zero on {percent_of(bins.zero_share)} of {count(stats.n_tokens)} tokens."
    if not len(bins.low):
        return figure(title, note("It contributed on no token."), zeros)
    shown = {said: cut for said, cut in bins.thresholds.items() if math.isfinite(cut) and cut > 0}
    ends = [float(bins.low[0]), float(bins.high[-1]), *shown.values()]
    tallest = float(bins.share.max())
    chart = Chart(
        log_axis(min(ends), max(ends), "contribution, in residual-stream norm"),
        linear_axis([0.0, 100 * tallest], "tokens, % of all", zero=True),
        f"{title}: {count(len(bins.low))} bins that hold tokens",
    )
    for low, high, share in zip(bins.low, bins.high, bins.share, strict=True):
        said = f"{number(low)} to {number(high)}: {percent_of(share)} of tokens"
        chart.bar((low + high) / 2, 0.0, 100 * share, said, style="bar", width=high - low)
    for said, cut in shown.items():
        chart.line([(cut, 0.0), (cut, 100 * tallest)], style="target", note=f"{visible(said)}: {number(cut)}")
    marks = "; ".join(f"{visible(said)} at {plain(float(f'{cut:.3g}'))}" for said, cut in shown.items())
    caption = f"{zeros} Two bins an octave." + (f" Dashed: threshold of the layer, {marks}." if marks else "")
    return figure(title, chart.svg(), caption)


def values_histogram(edges: NDArray[np.floating], heights: NDArray[np.integer], *, quantity: str, title: str) -> str:
    """Return bars over the bins between `edges`, one more than heights."""
    chart = Chart(
        linear_axis([float(edges[0]), float(edges[-1])], visible(quantity)),
        linear_axis([0.0, float(heights.max())], "values", zero=True, whole=True),
        f"{visible(title)}, {count(len(heights))} bins",
    )
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        said = f"{number(low)} to {number(high)}: {count(height)} values"
        chart.bar(float(low + high) / 2, 0.0, float(height), said, style="bar", width=float(high - low))
    return figure(visible(title), chart.svg(), f"{count(heights.sum())} values in {count(len(heights))} equal bins.")
