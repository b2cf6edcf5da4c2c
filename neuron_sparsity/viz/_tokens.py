"""Tokens: neurons over a passage, a neuron's examples, the weakest and strongest of each token, layers by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from neuron_sparsity.passage import NeuronActivations
from neuron_sparsity.report import _classes as activities
from neuron_sparsity.report import views
from neuron_sparsity.report._explorer import KINDS, kind_codes
from neuron_sparsity.report._fragments import figure, folded, pairs, shaded_text, table, widget
from neuron_sparsity.report._text import count, join, number, visible, visible_token
from neuron_sparsity.statistics import CONTEXT_BEFORE
from neuron_sparsity.taxonomy.files import ROLES
from neuron_sparsity.typed import expect
from neuron_sparsity.viz._checks import MOST_BYTES, finite, fits, matrix, row_of, same_length
from neuron_sparsity.viz._display import View
from neuron_sparsity.viz._measured import figures, on

if TYPE_CHECKING:
    from neuron_sparsity.ranking import TokenRanking
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult, TokenActivity

__all__ = ["examples", "text", "token_activity", "topk"]

_BYTES_PER_VALUE = 7.5  # of a number with four digits and its comma, in JSON
_BYTES_PER_LABEL = 45.0  # a neuron's name and its two bounds
_BYTES_PER_CELL = 30.0  # of a table: <td>N1234 (0.123)</td>


def text(
    passage: NeuronActivations | Sequence[str],
    activations: ArrayLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    first: int = 0,
    quantity: str = "post-activation z",
    measured: str = "",
) -> View:
    """Return a passage coloured by the activations of chosen neurons: choose a neuron above the text, hover for all.

    Args:
        passage: What `neuron_activations` returned; or the tokens as strings, with the three arguments below.
        activations: [token, neuron], for tokens of your own.
        labels: What each neuron is called; by default 0, 1, ...
        first: First token that is shown: 1 leaves out position 0, an attention sink in most models, whose values would
            make all others pale.
        quantity: What the values are, with their unit.
        measured: On what they were measured: model, corpus, tokens.

    Returns:
        View: a CircuitsVis widget; as a figure, neurons by tokens.

    Raises:
        TypeError: If the activations are no numbers, or are given beside a result that has its own.
        ValueError: If lengths differ, a value is NaN or infinite, or the page would be too large: it says how many
            neurons fit.

    Example:
        >>> shown = text(["The", " bank"], [[0.5, -1.0], [2.0, 0.0]], labels=["L1 N7", "L2 N3"])
        >>> shown.title
        '2 neurons over 2 tokens'
        >>> text(["The", " bank"], [[0.5, float("nan")], [2.0, 0.0]])
        Traceback (most recent call last):
        ValueError: activations: 1 of 4 values are not finite, the first is nan at token 0, 1; leave those out or
        measure them again
    """
    if isinstance(passage, NeuronActivations):
        if activations is not None or labels is not None:
            raise TypeError("these activations have values and labels of their own; give tokens as strings for others")
        tokens, activations = passage.token_strings, passage.activation
        labels = [f"L{layer} N{neuron}" for layer, neuron in passage.neurons]
        measured = on(passage.model, passage.corpus, f"{count(len(tokens))} tokens of window", "window_index")
    else:
        tokens = [str(token) for token in passage]
    if activations is None:
        raise TypeError("text(tokens, activations) takes activations [token, neuron]")
    values = matrix(activations, "activations", ("token", "neuron"))
    same_length(tokens, values.shape[0], "tokens", "row of activations")
    names = [str(label) for label in labels] if labels is not None else [str(k) for k in range(values.shape[1])]
    same_length(names, values.shape[1], "labels", "neuron")
    if not 0 <= first < len(tokens):
        raise ValueError(f"first must be between 0 and {len(tokens) - 1}, the last token, got {first}")
    tokens, values = tokens[first:], values[first:]
    each = values.shape[0] * _BYTES_PER_VALUE + _BYTES_PER_LABEL
    fits(values.shape[1], each, "neurons", mend=f"choose fewer of them, or a shorter passage than {len(tokens):,}")
    finite(values, "activations", [f"token {first + place}" for place in range(len(tokens))], names)
    title = f"{count(len(names))} neurons over {count(len(tokens))} tokens"

    def draw() -> Any:
        look = {"title": title, "measured": measured, "quantity": quantity}
        return figures().heat_map(values.T, rows=names, row_axis="neuron", tokens=tokens, signed=True, **look)

    return View(title, measured, _coloured(tokens, values, names, title, quantity), draw)


def _coloured(tokens: Sequence[str], values: np.ndarray, names: Sequence[str], title: str, quantity: str) -> str:
    bounds = np.abs(values).max(axis=0)
    bounds[bounds == 0] = 1.0
    props = {
        "tokens": tokens,
        "values": [[float(f"{value:.4g}") for value in row] for row in values.tolist()],
        "labels": [visible(name) for name in names],
        "positiveBounds": [float(f"{bound:.4g}") for bound in bounds],
        "negativeBounds": [-float(f"{bound:.4g}") for bound in bounds],
    }
    still = shaded_text(tokens, values[:, 0].tolist(), float(bounds[0]))
    caption = (
        f"Blue: positive {visible(quantity)}, red: negative; each neuron has a scale of its own, full at its largest "
        "value here. Choose a neuron above the text; hover over a token for all values."
    )
    shown = widget("ColoredTokensMulti", props, label=title, fallback=still)
    return figure(title, shown, caption, wide=True)


def examples(
    stats: NeuronStatistics,
    neurons: tuple[int, int] | Sequence[tuple[int, int]],
    result: SparsityResult | None = None,
    *,
    atlas: Any = None,
    n_examples: int = 5,
) -> View:
    """Return the tokens that drive chosen neurons most, each with its context.

    Args:
        stats: The run.
        neurons: One (layer, neuron) or several; layer is the block's index.
        result: Gives the threshold that "active" refers to.
        atlas: An atlas of the run, or its table: what it says of each neuron stands above its examples.
        n_examples: How many of each neuron; the recording keeps a few.

    Returns:
        View; as a figure, one bar an example.

    Raises:
        TypeError: If a neuron is no pair.
        ValueError: If there is no such neuron, none was chosen, a value is NaN, or the page would be too large.
    """
    single = len(neurons) == 2 and all(isinstance(part, int | np.integer) for part in neurons)
    chosen: list[Any] = [neurons] if single else list(neurons)
    if not chosen or n_examples < 1:
        raise ValueError(f"choose at least one neuron and one example, got {len(chosen)} and {n_examples}")
    rows = [row_of(stats.model, neuron) for neuron in chosen]
    cards, n_bytes = [], 0
    for (layer, neuron), row in zip(chosen, rows, strict=True):
        card = Markup(views.neuron_card(stats, *row, result, n_examples=n_examples)) + _about(atlas, layer, neuron)
        cards.append(Markup("<div>{}</div>").format(card))
        n_bytes += len(cards[-1].encode())
        if n_bytes > MOST_BYTES:
            fits(len(rows), n_bytes / len(cards), "neurons", mend="choose fewer of them, or fewer examples")
    found = [_examples_of(stats, row, neuron, n_examples) for row, neuron in rows]
    named = ", ".join(f"L{layer} N{neuron}" for layer, neuron in chosen[:4]) + (", …" if len(chosen) > 4 else "")
    title = f"What drives {named}"
    definition = f"active: {activities.activity(stats, result).definition}"
    measured = on(stats.model, stats.corpus, definition)
    caption = "The marked token is the one measured; the tokens around it are context and carry no value."
    body = join(cards) if len(cards) == 1 else Markup('<div class="neurons">{}</div>').format(join(cards))
    one_name = len(chosen) == 1
    bars = [
        (value, words if one_name else f"L{layer} N{neuron}: {words}")
        for (layer, neuron), shown in zip(chosen, found, strict=True)
        for value, words in shown
    ]

    def draw() -> Any:
        if not bars:
            raise ValueError(f"{named}: no example to draw, it contributed on no token")
        axis = {"quantity": "contribution, in residual-stream norm", "axis": "example"}
        values, names = [value for value, _ in bars], [name for _, name in bars]
        return figures().bars(values, names, title=title, measured=measured, **axis)

    return View(title, measured, figure(title, body, caption, wide=True), draw)


def _about(atlas: Any, layer: int, neuron: int) -> Markup:
    """Return what an atlas says of one neuron; columns that were not measured are not there."""
    if atlas is None:
        return Markup("")
    frame = getattr(atlas, "table", atlas)
    rows = frame[(frame["layer"] == layer) & (frame["neuron"] == neuron)]
    if len(rows) != 1:
        raise ValueError(f"the atlas has {len(rows)} rows for neuron ({layer}, {neuron}); is it of another model?")
    row = rows.iloc[0]
    code = int(kind_codes(row))
    kinds = [str(row["class"]).replace("_", " ")]
    kinds += [f"{kind} neuron" if kind in ROLES else kind for bit, kind in enumerate(KINDS) if code >> bit & 1]
    said = [("kind", ", ".join(kinds))]
    columns = (("triggers", "fires on"), ("top_logit_tokens", "raises"), ("bottom_logit_tokens", "lowers"))
    said += [
        (name, "  ".join(visible_token(word) for word in row[column]))
        for column, name in columns
        if len(row.get(column, ()))
    ]
    return pairs(said)


def _examples_of(stats: NeuronStatistics, row: int, neuron: int, most: int) -> list[tuple[float, str]]:
    """Return (contribution, its text with the token in brackets) of one neuron, largest first."""
    values = activities.array(stats.example_value)[row, neuron].astype(np.float64)[:most]
    finite(values, f"examples of neuron {neuron}", [f"example {place}" for place in range(len(values))])
    found = []
    for place, value in enumerate(values):
        if int(activities.array(stats.example_position)[row, neuron, place]) < 0:
            continue
        context = activities.array(stats.example_context)[row, neuron, place]
        words = [
            (f"[{visible_token(_string(stats, token))}]" if at == CONTEXT_BEFORE else visible(_string(stats, token)))
            for at, token in enumerate(context.tolist())
            if token >= 0 and CONTEXT_BEFORE - 7 <= at <= CONTEXT_BEFORE + 4
        ]
        found.append((float(value), "".join(words)))
    return found


def _string(stats: NeuronStatistics, token: int) -> str:
    return stats.token_strings.get(token, f"⟨token {token}⟩")


def token_activity(passage: TokenActivity, *, layers: Sequence[int] | None = None) -> View:
    """Return the activation ratio of a passage, layer by token, and the passage coloured by it.

    Args:
        passage: What `token_activity` returned.
        layers: Block index of each row, by default those of the model.

    Returns:
        View; as a figure, layers by tokens.

    Raises:
        ValueError: If lengths differ, a ratio is NaN or outside 0..1, or the page would be too large.
    """
    ratio = matrix(passage.activation_ratio, "activation_ratio", ("layer", "token"))
    tokens = list(passage.token_strings)
    same_length(tokens, ratio.shape[1], "token_strings", "token")
    model = getattr(passage, "model", None)
    rows = list(layers if layers is not None else getattr(model, "layers", None) or range(ratio.shape[0]))
    same_length(rows, ratio.shape[0], "layers", "row")
    fits(ratio.shape[1], 4 * _BYTES_PER_VALUE + 3.0 * ratio.shape[0] + 60, "tokens", mend="choose a shorter passage")
    finite(ratio, "activation_ratio", [f"layer {row}" for row in rows], [f"token {k}" for k in range(len(tokens))])
    if ratio.min() < 0 or ratio.max() > 1:
        raise ValueError(f"activation_ratio must lie in 0..1, got {ratio.min():g} to {ratio.max():g}")
    title = "Activation ratio by layer and token"
    measured = on(model, passage.corpus, f"active: {passage.definition}")

    def draw() -> Any:
        look = {"title": title, "measured": measured, "quantity": "activation ratio"}
        return figures().heat_map(ratio, rows=[str(row) for row in rows], row_axis="layer", tokens=tokens, **look)

    body = views.passage_map(passage, layers=rows) + views.passage_tokens(passage)
    return View(title, measured, body, draw)


def topk(ranking: TokenRanking, other: TokenRanking | None = None, *, layer: int | None = None) -> View:
    """Return the strongest and the weakest neurons of every token, as a table of each layer.

    Args:
        ranking: What `rank(model, windows, per_token=True)` returned.
        other: The other end of the same passage, ranked with `largest` the other way.
        layer: Block index of the layer that is open and drawn; the middle one if None.

    Returns:
        View; as a figure, the contributions of one layer's neurons by token, each cell with its neuron.

    Raises:
        ValueError: If the two are of different passages or models or the same end, there is no such layer, a
            contribution is NaN, or the page would be too large.
    """
    for name, end in (("ranking", ranking), ("other", other or ranking)):
        expect(name, end, "TokenRanking")
    ends = sorted([ranking] if other is None else [ranking, other], key=lambda end: not end.largest)
    layers, tokens = list(ranking.model.layers), list(ranking.token_strings)
    _same_passage(ends)
    layer = layers[len(layers) // 2] if layer is None else layer
    if layer not in layers:
        raise ValueError(f"no layer {layer} in {ranking.model.name}: layers {layers[0]} to {layers[-1]}")
    parts = []
    for end in ends:
        values = matrix(end.contribution, "contribution", ("layer", "token", "rank"))
        same_length(tokens, values.shape[1], "token_strings", "token")
        same_length(layers, values.shape[0], "layers of the model", "row")
        ranks = [f"rank {rank + 1}" for rank in range(values.shape[2])]
        at = [f"token {place}" for place in range(len(tokens))]
        finite(values, "contribution", [f"layer {block}" for block in layers], at, ranks)
        parts.append(("strongest" if end.largest else "weakest", values, np.asarray(end.neuron)))
    n_ranks = sum(values.shape[2] for _, values, _ in parts)
    fits(
        len(layers) * len(tokens) * n_ranks, _BYTES_PER_CELL, "neurons", mend="choose a shorter passage or a smaller k"
    )
    title = f"The {' and '.join(name for name, _, _ in parts)} neurons of each token"
    measured = on(ranking.model, ranking.corpus, f"first {count(len(tokens))} tokens of window", "window_index")
    tables = [
        (block, _ranked_table(tokens, parts, row, f"Layer {block}: neuron (contribution, in residual-stream norm)"))
        for row, block in enumerate(layers)
    ]
    opened = next(shown for block, shown in tables if block == layer)
    closed = join(folded(f"Layer {block}", shown) for block, shown in tables if block != layer)
    caption = "Contribution |z| × ‖W_out‖, strongest first or weakest first; ties go to the smaller index."
    row = layers.index(layer)

    def draw() -> Any:
        drawn = [(name, values[row].T, neurons[row].T) for name, values, neurons in parts]
        look = {"title": f"{title}, layer {layer}", "measured": measured}
        return figures().strips(drawn, tokens, quantity="contribution", **look)

    return View(title, measured, figure(title, join([opened, closed]), caption, wide=True), draw)


def _same_passage(ends: Sequence[TokenRanking]) -> None:
    if len(ends) == 1:
        return
    first, second = ends
    if first.largest == second.largest:
        raise ValueError(
            f"both rankings have largest={first.largest}; one shows the strongest neurons, one the weakest"
        )
    same = (first.token_ids, first.model.fingerprint) == (second.token_ids, second.model.fingerprint)
    if not same:
        raise ValueError("the two rankings are of different passages or models; rank the same window of one model")


def _ranked_table(tokens: Sequence[str], parts: Sequence[Any], row: int, caption: str) -> Markup:
    header = ["token", *(f"{name} {rank + 1}" for name, values, _ in parts for rank in range(values.shape[2]))]
    cells = [
        [
            visible_token(token),
            *(
                f"N{neuron} ({number(value)})"
                for _, values, neurons in parts
                for neuron, value in zip(neurons[row, place], values[row, place], strict=True)
            ),
        ]
        for place, token in enumerate(tokens)
    ]
    return table(header, cells, caption=caption)
