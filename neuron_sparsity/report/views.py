"""One function per view -> an HTML fragment, usable alone.

Each view reads attributes of a result and returns escaped markup; charts are SVG, heat maps embedded PNG, token views
CircuitsVis widgets. `with_assets` adds the style sheet and the scripts a fragment needs outside the page, once per
document. CircuitsVis is used for its bundle alone: its Python side points at a CDN or carries the bundle per widget.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import circuitsvis
import numpy as np
from markupsafe import Markup

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report._classes import array, layer_labels
from neuron_sparsity.report._curves import (
    activation_curve,
    cett_curves,
    layer_ratios,
    layer_table,
    layer_thresholds,
    removable_layers,
    removal_curve,
    removal_verdict,
)
from neuron_sparsity.report._damage import damage
from neuron_sparsity.report._fragments import figure, heat, note, token_text, widget
from neuron_sparsity.report._histogram import neuron_histogram
from neuron_sparsity.report._measured import definitions, measured
from neuron_sparsity.report._neuron_table import neuron_table
from neuron_sparsity.report._neurons import class_counts, neuron_map
from neuron_sparsity.report._pareto import pareto_curves, pareto_table
from neuron_sparsity.report._summary import headline, summary
from neuron_sparsity.report._text import count, join, number, percent_of, visible
from neuron_sparsity.statistics import CONTEXT_BEFORE

if TYPE_CHECKING:
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult, TokenActivity

__all__ = [
    "activation_curve",
    "cett_curves",
    "class_counts",
    "damage",
    "definitions",
    "headline",
    "layer_ratios",
    "layer_table",
    "layer_thresholds",
    "measured",
    "neuron_card",
    "neuron_examples",
    "neuron_histogram",
    "neuron_map",
    "neuron_table",
    "pareto_curves",
    "pareto_table",
    "passage_map",
    "passage_tokens",
    "removable_layers",
    "removal_curve",
    "removal_verdict",
    "scripts",
    "summary",
    "with_assets",
]

_ASSETS = Path(__file__).parent / "assets"


@lru_cache(maxsize=1)
def scripts() -> tuple[str, str]:
    """Return the sources of the two scripts of a page: the CircuitsVis bundle and what fills the views.

    The bundle's closing script tags are written so that they end no element, and its source map, which a browser
    would ask for, is left out.
    """
    bundle = (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    bundle = re.sub(r"</(script)", r"<\\/\1", re.sub(r"//# sourceMappingURL=\S*", "", bundle), flags=re.IGNORECASE)
    return bundle.strip(), (_ASSETS / "boot.js").read_text(encoding="utf-8").strip()


def with_assets(fragment: str) -> str:
    """Return `fragment` with the style sheet and scripts before and after it, to show one view in a notebook."""
    style = (_ASSETS / "style.css").read_text(encoding="utf-8")
    sources = list(scripts())
    if "data-neurons" in fragment:
        sources.append((_ASSETS / "neurons.js").read_text(encoding="utf-8").strip())
    after = "".join(f"<script>{source}</script>" for source in sources)
    return f'<style>{style}</style><div class="fragment">{fragment}</div>{after}'


def neuron_examples(
    stats: NeuronStatistics, result: SparsityResult | None = None, *, n_neurons: int = 8, n_examples: int = 3
) -> str:
    """Return the neurons of largest and of smallest mean contribution with the tokens that drive them most.

    Args:
        stats: The run.
        result: Gives the threshold that activation frequency refers to.
        n_neurons: How many of each.
        n_examples: How many examples of each neuron.

    Raises:
        ValueError: If `n_neurons` or `n_examples` is negative.
    """
    if n_neurons < 0 or n_examples < 0:
        raise ValueError(f"n_neurons and n_examples must be >= 0, got {n_neurons} and {n_examples}")
    active = classes.activity(stats, result)
    mean = array(stats.contribution_sum) / stats.n_tokens
    flat = np.where(np.isfinite(mean), mean, -np.inf).ravel()
    order = np.argsort(flat, kind="stable")
    strongest = np.argsort(-flat, kind="stable")[:n_neurons]
    groups = (("Strongest", strongest, "largest"), ("Weakest", order[np.isfinite(flat[order])][:n_neurons], "smallest"))
    figures = []
    for name, chosen, said in groups:
        cards = [_neuron_card(stats, active, int(index), n_examples) for index in chosen]
        caption = (
            f"The {count(len(cards))} neurons of {said} mean contribution. In each example the marked token is the one "
            f"measured; the tokens around it are context and carry no value.{_shared_token(stats, chosen)}"
        )
        figures.append(
            figure(f"{name} neurons", Markup('<div class="neurons">{}</div>').format(join(cards)), caption, wide=True)
        )
    return join(figures)


def _shared_token(stats: NeuronStatistics, chosen: np.ndarray) -> str:
    """What is to be said where many of the neurons have one and the same token of the text as their top example."""
    position = array(stats.example_position)
    tops = position[..., 0].ravel()[chosen] if position.shape[2] else np.array([-1])
    times = int(np.unique(tops[tops >= 0], return_counts=True)[1].max(initial=0))
    if times <= 2:
        return ""
    return f" The top example is the same token for {count(times)} of {count(len(tops))}: often an attention sink."


def neuron_card(
    stats: NeuronStatistics, row: int, neuron: int, result: SparsityResult | None = None, *, n_examples: int = 5
) -> str:
    """Return one neuron with the tokens that drive it most; `row` counts the measured layers from 0."""
    index = row * array(stats.contribution_sum).shape[1] + neuron
    return _neuron_card(stats, classes.activity(stats, result), index, n_examples)


def _neuron_card(stats: NeuronStatistics, active: classes.Activity, index: int, n_examples: int) -> Markup:
    row, neuron = divmod(index, active.frequency.shape[1])
    values, positions = array(stats.example_value)[row, neuron], array(stats.example_position)[row, neuron]
    name = f"L{layer_labels(stats)[row]} · N{neuron}"
    shown = [k for k in range(min(len(values), n_examples)) if positions[k] >= 0 and np.isfinite(values[k])]
    top = max((float(values[k]) for k in shown), default=0.0)
    window = int(stats.corpus.get("window") or 0)
    examples = [
        _example(
            stats, name, array(stats.example_context)[row, neuron, k], float(values[k]), top, int(positions[k]), window
        )
        for k in shown
    ]
    body = join(examples) if examples else note("No example: it contributed on no token after a window's first.")
    frequency = active.frequency[row, neuron]
    largest = number(array(stats.contribution_max)[row, neuron])
    average = number(array(stats.contribution_sum)[row, neuron] / stats.n_tokens)
    if classes.largest_is_first(stats)[row, neuron] and largest != number(values[0]):
        largest += " (on a window's first token, never an example)"
    facts = f"mean contribution {average}, largest {largest}, active on {percent_of(frequency)} of tokens"
    return Markup('<article class="neuron"><h4>{}</h4><p class="facts">{}</p>{}</article>').format(name, facts, body)


def _example(
    stats: NeuronStatistics, name: str, context: np.ndarray, value: float, top: float, position: int, window: int
) -> Markup:
    inside = [(place, int(token)) for place, token in enumerate(context) if token >= 0]
    tokens = [stats.token_strings.get(token, f"⟨token {token}⟩") for _, token in inside]
    centre = next((index for index, (place, _) in enumerate(inside) if place == CONTEXT_BEFORE), None)
    values = [value if index == centre else 0.0 for index in range(len(tokens))]
    where = f"window {position // window}, position {position % window}" if window else f"position {position}"
    props = {
        "tokens": tokens,
        "values": [float(f"{v:.4g}") for v in values],
        "minValue": 0.0,
        "maxValue": top or 1.0,
        "positiveColor": "#2563ab",
    }
    shown = widget(
        "ColoredTokens", props, label=f"{name}, contribution {number(value)}", fallback=token_text(tokens, centre)
    )
    return Markup('<div class="example"><p class="value-tag" title="{}">{}</p>{}</div>').format(
        where, number(value), shown
    )


def passage_map(passage: TokenActivity, *, layers: Sequence[int] | None = None) -> str:
    """Return the activation ratio of a passage, layer by token; `layers` are the block indices, by default 0, 1, ..."""
    ratio = array(passage.activation_ratio).astype(np.float64)
    low, high = _range(ratio)
    column = f"{ratio.shape[1]} tokens of {visible(passage.corpus.get('name', 'a passage'))}"
    picture = heat(
        ratio,
        row_labels=list(range(ratio.shape[0]) if layers is None else layers),
        column="token",
        quantity="activation ratio",
        alt=f"Activation ratio, {ratio.shape[0]} layers by {column}",
        low=low,
        high=high,
        names=list(passage.token_strings),
    )
    caption = (
        f"Share of a layer's neurons active on a token, {column}. Active: {visible(passage.definition)}. The first "
        "column stands apart where the model uses the first token as an attention sink."
    )
    return figure("Activation ratio by layer and token", picture, caption, wide=True)


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0 or finite.min() == finite.max():
        return 0.0, 1.0
    return float(np.floor(finite.min() * 20) / 20), float(np.ceil(finite.max() * 20) / 20)


def _span(rows: np.ndarray) -> str:
    return f"layer {rows[0]}" if len(rows) == 1 else f"layers {rows[0]}–{rows[-1]}"


def passage_tokens(passage: TokenActivity) -> str:
    """Return the passage as text, each token coloured by how far its activation ratio lies from the passage's mean.

    Raises:
        ValueError: If strings and measured positions differ in number.
    """
    ratio, tokens = array(passage.activation_ratio).astype(np.float64), list(passage.token_strings)
    if ratio.ndim != 2 or ratio.shape[1] != len(tokens):
        raise ValueError(
            f"a passage of {len(tokens)} tokens needs ratios [layer, {len(tokens)}], got shape {ratio.shape}"
        )
    thirds = np.array_split(np.arange(ratio.shape[0]), min(3, ratio.shape[0]))
    groups = [np.arange(ratio.shape[0]), *thirds]
    names = ["all layers", *(_span(third) for third in thirds)]
    rows = np.stack([ratio[group].mean(axis=0) for group in groups])
    finite = np.where(np.isfinite(rows), rows, np.nan)
    values = (
        np.nan_to_num(finite - np.nanmean(finite, axis=1, keepdims=True))
        if np.isfinite(finite).any()
        else np.zeros_like(rows)
    )
    bound = float(np.abs(values).max()) or 1.0
    props = {
        "tokens": tokens,
        "values": [[float(f"{value:.4f}") for value in column] for column in values.T],
        "labels": names,
        "positiveBounds": [bound] * len(names),
        "negativeBounds": [-bound] * len(names),
    }
    shown = widget(
        "ColoredTokensMulti", props, label="Passage coloured by activation ratio", fallback=token_text(tokens)
    )
    mean = number(np.nanmean(finite[0]) if np.isfinite(finite[0]).any() else np.nan)
    caption = (
        f"Blue to violet: more neurons active than on this passage's average token ({mean} over all layers); red: "
        "fewer. Choose a group of layers above the text; hover over a token for its differences of activation ratio."
    )
    return figure("The passage", shown, caption, wide=True)
