"""The table of all neurons: search, filters and the place of a neuron's details; `assets/neurons.js` fills it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report._classes import array, layer_labels
from neuron_sparsity.report._explorer import Explorer, explorer, stand_in
from neuron_sparsity.report._fragments import figure, folded, pairs
from neuron_sparsity.report._text import count, join, plain, replacement, script_json, signed, target, visible

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.saliency import NeuronSaliency
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["neuron_table"]

_CLASSES = (("dead", "dead"), ("rare", "rare"), ("alive", "alive"), ("always_on", "always on"))
_UNAVAILABLE = (
    "The table of all neurons is packed in this page and needs scripts and a browser of 2023 or later "
    "(DecompressionStream): Chrome 80, Firefox 113, Safari 16.4 or newer. All other sections can be read without."
)


def neuron_table(
    stats: NeuronStatistics,
    result: SparsityResult | None = None,
    removed: AblationResult | None = None,
    *,
    saliency: NeuronSaliency | None = None,
    atlas: Any = None,
    neurons: Iterable[tuple[int, int]] = (),
) -> str:
    """Return every neuron as a table to search, filter and sort; a row opens what is known of its neuron.

    Args:
        stats: The run.
        result: Gives the threshold that activation frequency refers to.
        removed: Gives the order in which neurons can go.
        saliency: Gives what it predicts of removing each neuron alone.
        atlas: An Atlas, or a DataFrame with its columns; what is missing is not shown.
        neurons: (layer, neuron) that bring their examples along besides those chosen for all.

    Raises:
        ValueError: If one of `neurons` does not exist, or the atlas or the saliency is of other neurons.
    """
    active = classes.activity(stats, result)
    found = explorer(
        stats, active, removed, saliency=saliency, atlas=atlas, neurons=neurons,
        thresholds=_thresholds(stats, result, active),
    )  # fmt: skip
    labels = layer_labels(stats)
    counts = classes.class_counts(active)
    words = {
        "definition": visible(active.definition),
        "never": classes.upper_bound(stats.n_tokens),
        "removal": "" if removed is None else _removal_words(removed),
        "alone": "" if saliency is None else _alone_words(saliency, removed),
        "nRemovable": 0 if removed is None else len(removed.removable),
    }
    shape = Markup(
        '<div class="explorer" data-neurons><p class="note explorer-off">{off}</p><div class="explorer-on" hidden>'
        '{controls}<div class="rows-frame">'
        '<div class="rows-scroll" tabindex="0" role="grid" aria-label="All neurons" aria-rowcount="{rows}">'
        '<table role="presentation"><thead role="rowgroup"></thead><tbody role="rowgroup"></tbody></table></div></div>'
        '<p class="keys">Arrow keys move, Enter opens, Esc closes.</p>'
        '<p class="keys printed">The rows that were on the screen; the page itself has all.</p>'
        '<div class="detail" role="region" aria-label="The chosen neuron"></div></div>'
        '{atlas}<script type="application/json">{words}</script>'
        '<script type="application/octet-stream">{data}</script></div>'
    )
    body = shape.format(
        off=_UNAVAILABLE,
        controls=_controls(labels, counts, removed, found),
        rows=found.n_neurons + 1,
        atlas=_atlas_words(atlas, active),
        words=script_json(words),
        data=Markup(found.text),  # base64
    )
    return figure(f"All {count(found.n_neurons)} neurons", body, _caption(stats, active, found), wide=True)


def _thresholds(stats: NeuronStatistics, result: SparsityResult | None, active: classes.Activity) -> list[float]:
    """The cuts that `active` counts by; none where it counts what is not exactly zero."""
    if active.definition == classes.exactly_zero(stats).definition:
        return []
    if result is not None:
        return [float(layer.threshold) for layer in result.layers]
    return [float(cut) for cut in array(stats.thresholds)[:, 0]]


def _controls(labels: list[int], counts: Any, removed: AblationResult | None, found: Explorer) -> Markup:
    box = Markup(
        '<label class="pill"><input type="checkbox" name="class" value="{}" checked>'
        '<span class="swatch class-{}"></span>{} <small>{}</small></label>'
    )
    pills = [
        box.format(index, name, said, count(np.sum(getattr(counts, name))))
        for index, (name, said) in enumerate(_CLASSES)
    ]
    layers = join(Markup('<option value="{}">layer {}</option>').format(row, label) for row, label in enumerate(labels))
    only = Markup('<label class="pill"><input type="checkbox" name="{}">{}</label>')
    if removed is not None:
        pills.append(only.format("removable", "can go"))
    if found.n_chosen < found.n_neurons:
        pills.append(only.format("chosen", "with examples"))
    shape = Markup(
        '<form class="controls" role="search" aria-label="Neurons"><input type="search" name="find" '
        'placeholder="3:17, L3, 17, or text" aria-label="Layer and neuron, layer, neuron, or text of tokens" '
        'autocomplete="off" spellcheck="false">'
        '<select name="layer" aria-label="Layer"><option value="">all layers</option>{}</select>'
        '<select name="kind" aria-label="Kind" hidden><option value="">any kind</option></select>'
        '<fieldset><legend class="unseen">Class</legend>{}</fieldset>'
        '<button type="reset">Reset</button><output class="found" aria-live="polite"></output></form>'
    )
    return shape.format(layers, join(pills))


def _removal_words(removed: AblationResult) -> str:
    rise = 100.0 * (removed.ppl_ablated / removed.ppl_dense - 1.0)
    return (
        f"in order of {visible(removed.ranking)}, each replaced by {replacement(removed)}; all of them together: "
        f"perplexity {signed(rise)} on {count(removed.corpus.get('n_tokens'))} tokens of "
        f"{visible(removed.corpus.get('name', '?'))}, of +{target(removed.p_percent)} allowed"
    )


def _alone_words(saliency: NeuronSaliency, removed: AblationResult | None) -> str:
    """What is predicted of removing one neuron, and what it was measured on."""
    constant = {"zero": "zero", "mean": "its mean"}[stand_in(removed)]
    return (
        "predicted from gradients (first order, and half the Fisher information for the second) on "
        f"{count(saliency.n_tokens)} tokens of {visible(saliency.corpus.get('name', '?'))}, with {constant} in its "
        "place on every token and all other neurons as they are"
    )


def _atlas_words(atlas: Any, active: classes.Activity) -> Markup:
    """What an Atlas says of itself; a DataFrame says nothing. Its classes are not shown: the page has its own."""
    meanings = dict(getattr(atlas, "definitions", None) or {})
    meanings.pop("classes", None)
    if not meanings:
        return Markup("")
    if "active" in meanings:
        other = "" if meanings["active"].replace(">=", "≥") == active.definition else "; the classes count otherwise"
        meanings = {"active, for triggers and positions": meanings.pop("active") + other} | meanings
    said = [(visible(name), visible(words)) for name, words in meanings.items()]
    watched = getattr(atlas, "watched", None)
    if watched:
        where = f"{visible(watched.get('name', '?'))}, {count(watched.get('n_tokens'))} tokens"
        said.append(("triggers and positions on", where))
    return folded("What kinds, triggers and logit effects mean, and what they were measured on", pairs(said))


def _caption(stats: NeuronStatistics, active: classes.Activity, found: Explorer) -> Markup:
    said = [
        f"{visible(stats.model.name)} on {visible(stats.corpus.get('name', '?'))}, N = {count(stats.n_tokens)} tokens. "
        f"Active: {visible(active.definition)}. Contributions in residual-stream norm, per token; share of its layer: "
        f"of the layer's summed contributions. Numbers are kept to about {plain(found.rounding_percent)}\u00a0%."
    ]
    more = ", triggers and logit tokens." if found.lists else "."
    if found.n_chosen < found.n_neurons:
        what = "Examples" + (", triggers and logit tokens" if found.lists else "")
        also = "" if found.histograms else ", and histograms,"
        said.append(
            f"{what}{also} are in this page for {count(found.n_chosen)} neurons, as many of every layer: those of "
            "largest mean contribution, those whose largest contribution stands out most, the rarest that fire, and "
            "some at random. Text is searched in these. Another neuron's come along with"
        )
        shape = Markup("{} <code>neuron-sparsity report RUNFOLDER --neurons LAYER:NEURON</code>.")
        return shape.format(" ".join(said))
    return Markup("{}").format(" ".join(said) + " Text is searched in examples" + more)
