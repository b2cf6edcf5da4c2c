"""Views of all neurons at once: the map by activation frequency, and the classes dead, rare, alive and always on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report._charts import Chart, layer_axis, linear_axis
from neuron_sparsity.report._classes import Activity, ClassCounts, layer_labels
from neuron_sparsity.report._fragments import figure, folded, heat, note, table
from neuron_sparsity.report._text import count, join, target, visible

if TYPE_CHECKING:
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["class_counts", "frequency_map", "neuron_map"]

_CLASSES = (("dead", "dead"), ("rare", "rare"), ("alive", "alive"), ("always_on", "always on"))
_DEAD, _RARE, _ALWAYS_ON = (target(100 * share) for share in (classes.DEAD, classes.RARE, classes.ALWAYS_ON))
_NONE_QUIET = "No neuron of this run is dead or rare."


def neuron_map(stats: NeuronStatistics, result: SparsityResult | None = None) -> str:
    """Return layers x neurons by activation frequency: sorted within each layer, and, folded away, in index order."""
    active = classes.activity(stats, result)
    return frequency_map(
        active.frequency, active.dead, layer_labels(stats), active=active.definition, mark=f"dead, under {_DEAD}",
        n_tokens=stats.n_tokens,
    )  # fmt: skip


def frequency_map(
    frequency: NDArray[np.float64],
    dead: NDArray[np.bool_],
    labels: list[int],
    *,
    active: str,
    mark: str,
    n_tokens: int | None,
) -> str:
    """Return frequencies [layer, neuron] as two maps, those of dead neurons marked; `mark` says what dead means."""
    order, quantity = np.argsort(frequency, axis=1, kind="stable"), "activation frequency"
    shape = f"{len(labels)} layers of {count(frequency.shape[1])} neurons"
    ranked = heat(
        np.take_along_axis(frequency, order, axis=1),
        row_labels=labels,
        column="rank",
        quantity=quantity,
        alt=f"Activation frequency, {shape}, sorted from the rarest to the most frequent within each layer",
        marked=np.take_along_axis(dead, order, axis=1),
        marked_label=mark,
        order=order,
    )
    indexed = heat(
        frequency,
        row_labels=labels,
        column="neuron",
        quantity=quantity,
        alt=f"Activation frequency, {shape}, in index order",
        marked=dead,
        marked_label=mark,
    )
    caption = (
        f"Share of tokens on which a neuron is active, rarest on the left, in the dense run. "
        f"Active: {visible(active)}. N = {count(n_tokens)} tokens."
    )
    body = join([ranked, folded("The same in index order", indexed)])
    return figure("Every neuron by activation frequency", body, caption, wide=True)


def class_counts(stats: NeuronStatistics, result: SparsityResult | None = None) -> str:
    """Return the neurons of each layer by class: all of them, the dead and rare at their own scale, and a table."""
    active, labels = classes.activity(stats, result), layer_labels(stats)
    counts, width = classes.class_counts(active), active.frequency.shape[1]
    quiet = int((counts.dead + counts.rare).max())
    whole = _stacked(counts, labels, width, _CLASSES, "All neurons")
    zoomed = _stacked(counts, labels, quiet, _CLASSES[:2], "Dead and rare only") if quiet else note(_NONE_QUIET)
    swatch = Markup('<span><span class="swatch class-{}"></span>{} ({})</span>')
    keys = join(swatch.format(name, said, count(getattr(counts, name).sum())) for name, said in _CLASSES)
    body = join(
        [
            Markup('<div class="two">{}{}</div><div class="legend">{}</div>').format(whole, zoomed, keys),
            folded("Counts of every layer, both definitions", _class_table(stats, counts, labels)),
        ]
    )
    return figure("Dead, rare, alive, always on", body, _class_caption(stats, active), wide=True)


def _stacked(
    counts: ClassCounts, labels: list[int], high: int, shown: tuple[tuple[str, str], ...], title: str
) -> Markup:
    y = linear_axis([0.0, float(high)], "neurons", zero=True, whole=True)
    chart = Chart(layer_axis(labels), y, f"{title}, by class, in {len(labels)} layers")
    for row, layer in enumerate(labels):
        low = 0
        for name, said in shown:
            top = low + int(getattr(counts, name)[row])
            chart.bar(layer, low, top, f"layer {layer}: {count(top - low)} {said}", style=f"class-{name}")
            low = top
    return Markup("<div><h4>{}</h4>{}</div>").format(title, chart.svg())


def _class_table(stats: NeuronStatistics, counts: ClassCounts, labels: list[int]) -> Markup:
    zero = classes.class_counts(classes.exactly_zero(stats))
    columns = {
        "dead": counts.dead,
        "of them never active": counts.never,
        "rare": counts.rare,
        "alive": counts.alive,
        "always on": counts.always_on,
        "dead by zeros": zero.dead,
        "exactly zero on every token": zero.never,
    }
    rows = [(str(layer), *(count(column[row]) for column in columns.values())) for row, layer in enumerate(labels)]
    rows.append(("all", *(count(column.sum()) for column in columns.values())))
    return table(
        ("layer", *columns), rows, caption=f"Neurons of each layer by class, N = {count(stats.n_tokens)} tokens"
    )


def _class_caption(stats: NeuronStatistics, active: Activity) -> str:
    text = (
        f"Dead: active on under {_DEAD} of tokens; rare: under {_RARE}; always on: over {_ALWAYS_ON}; the rest alive. "
        f"Active: {visible(active.definition)}; \u201cby zeros\u201d counts a token as active where the "
        f"post-activation is not exactly zero. N = {count(stats.n_tokens)}: a neuron never seen active is active on at "
        f"most {classes.upper_bound(stats.n_tokens)} of tokens (95\u00a0% bound)."
    )
    if 3.0 / stats.n_tokens > classes.DEAD:
        text += " That bound lies above the definition of dead: this corpus is too short to tell dead from rare."
    return text
