"""The parts views are made of: figure, table, card, list of pairs, heat map, CircuitsVis widget; all escape."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from neuron_sparsity.report._image import gradient, png_data_uri
from neuron_sparsity.report._text import inert, join, script_json, visible_token

__all__ = ["card", "figure", "folded", "heat", "note", "pairs", "shaded_text", "table", "token_text", "widget"]

_MOST_HOVER = 400_000  # values a page carries for hovering; beyond, the picture stays and the read-out goes
_MOST_COLUMNS = 4096  # pixels a row of a heat map may have; beyond, neighbours are averaged


def figure(title: str, body: str, caption: str = "", *, wide: bool = False) -> Markup:
    """Return a titled figure; `wide` takes the full width of the page."""
    under = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    shape = Markup('<figure class="{}"><h3>{}</h3>{}{}</figure>')
    return shape.format("wide" if wide else "half", title, body, under)


def note(text: str) -> Markup:
    """Return a one-line remark."""
    return Markup('<p class="note">{}</p>').format(text)


def folded(summary: str, body: str) -> Markup:
    """Return `body` behind a line that opens it."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def card(label: str, value: str, lines: Sequence[str], measured: str, *, tone: str = "") -> Markup:
    """Return a headline number: what it is, the number, what it means, and what it was measured on."""
    meaning = join(Markup("<p>{}</p>").format(line) for line in lines)
    shape = Markup(
        '<article class="card {}"><h3>{}</h3><p class="{}">{}</p><div class="lines">{}</div>'
        '<p class="measured">{}</p></article>'
    )
    size = "value" if value[:1].isdigit() else "value words"
    return shape.format(tone, label, size, value, meaning, measured)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> Markup:
    """Return a table that scrolls within itself where it is too wide; its first column heads each row."""
    head = join(Markup('<th scope="col">{}</th>').format(cell) for cell in header)
    body = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], join(Markup("<td>{}</td>").format(c) for c in row[1:])
        )
        for row in rows
    )
    shape = Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{0}"><table><caption>{0}</caption>'
        "<thead><tr>{1}</tr></thead><tbody>{2}</tbody></table></div>"
    )
    return shape.format(caption, head, body)


def pairs(items: Sequence[tuple[str, str]]) -> Markup:
    """Return a list of terms and what they are."""
    return Markup("<dl>{}</dl>").format(
        join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(term, text) for term, text in items)
    )


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u2").tobytes()).decode("ascii")


def _binned(values: NDArray[Any], columns: int) -> NDArray[Any]:
    edges = np.linspace(0, values.shape[1], columns + 1).astype(int)[:-1]
    counts = np.diff([*edges.tolist(), values.shape[1]])
    return np.asarray(np.add.reduceat(values.astype(np.float64), edges, axis=1) / counts)


def heat(
    values: NDArray[np.floating],
    *,
    row_labels: Sequence[int],
    column: str,
    quantity: str,
    alt: str,
    low: float = 0.0,
    high: float = 1.0,
    marked: NDArray[np.bool_] | None = None,
    marked_label: str = "",
    order: NDArray[np.integer] | None = None,
    names: Sequence[str] | None = None,
) -> Markup:
    """Return a heat map [row, column] with a legend and a read-out for mouse and arrow keys.

    Args:
        values: What is drawn; rows are layers, the first on top.
        row_labels: Number of each layer.
        column: What a column is ("token", "rank").
        quantity: What a colour means.
        alt: The picture in words.
        low: Value of the darkest colour.
        high: Value of the brightest colour.
        marked: Values drawn in the warning colour.
        marked_label: What the warning colour means.
        order: Neuron index of each value, where columns are ranks.
        names: Token of each column.
    """
    rows, columns = values.shape
    drawn, drawn_marks = values, marked
    if columns > _MOST_COLUMNS:
        drawn = _binned(values, _MOST_COLUMNS)
        drawn_marks = None if marked is None else _binned(marked, _MOST_COLUMNS) > 0.5
    data = Markup("")
    if values.size <= _MOST_HOVER and columns < 65_535:
        scaled = np.round(np.clip(np.nan_to_num((values - low) / (high - low), nan=2.0), 0.0, 2.0) * 65_534)
        content: dict[str, Any] = {
            "rows": list(row_labels),
            "columns": columns,
            "column": column,
            "quantity": quantity,
            "low": low,
            "high": high,
            "values": _packed(np.minimum(scaled, 65_535)),
            "order": None if order is None else _packed(order),
            "names": None if names is None else [visible_token(name) for name in names],
        }
        data = Markup('<script type="application/json">{}</script>').format(script_json(content))
    mark = Markup('<span class="swatch never"></span>{}').format(marked_label) if marked_label else ""
    shape = Markup(
        '<div class="heat" data-heat><div class="rows" aria-hidden="true"><span>{first}</span><span>layer</span>'
        '<span>{last}</span></div><div class="field" tabindex="0" role="img" aria-label="{alt}">'
        '<img src="{uri}" alt="{alt}" width="600" class="{pixels}" style="--rows:{count}">'
        '<span class="cursor" hidden></span></div>'
        '<output class="readout" aria-live="polite"></output><div class="legend"><span>{low}</span>'
        '<span class="ramp" style="background:linear-gradient(90deg,{ramp})"></span><span>{high}</span>'
        "<span>{quantity}</span>{mark}</div>{data}</div>"
    )
    return shape.format(
        first=row_labels[0],
        last=row_labels[-1],
        alt=alt,
        uri=png_data_uri(drawn, low=low, high=high, marked=drawn_marks),
        pixels="coarse" if columns <= 600 else "fine",
        count=rows,
        low=f"{low:.3g}",
        high=f"{high:.3g}",
        ramp=gradient(),
        quantity=quantity,
        mark=mark,
        data=data,
    )


def token_text(tokens: Sequence[str], highlighted: int | None = None) -> Markup:
    """Return tokens as running text, one of them marked: what a reader without scripts sees."""
    return join(
        (Markup("<mark>{}</mark>") if index == highlighted else Markup("<span>{}</span>")).format(visible_token(token))
        for index, token in enumerate(tokens)
    )


def shaded_text(tokens: Sequence[str], values: Sequence[float], bound: float) -> Markup:
    """Return tokens as running text on blue for positive and red for negative values, full at +- `bound`."""
    shape = Markup('<span style="background:rgba({},{:.2f})">{}</span>')
    colours = ("196,60,20" if value < 0 else "37,99,171" for value in values)
    strength = (0.7 * min(abs(value) / (bound or 1.0), 1.0) for value in values)
    return join(
        shape.format(Markup(colour), alpha, visible_token(token))
        for token, colour, alpha in zip(tokens, colours, strength, strict=True)
    )


def widget(name: str, props: Mapping[str, Any], *, label: str, fallback: Markup) -> Markup:
    """Return the place of a CircuitsVis widget, which the page's one script fills; until then `fallback` stands there.

    The tokens in `props` are made inert, because CircuitsVis writes them as HTML.

    Raises:
        ValueError: If tokens and values differ in number.
    """
    tokens, values = list(props["tokens"]), list(props["values"])
    if len(tokens) != len(values):
        raise ValueError(f"tokens and values must be equally many, got {len(tokens)} and {len(values)}")
    safe = {**props, "tokens": [inert(token) for token in tokens], "values": values}
    shape = Markup(
        '<div class="widget" data-widget="{}" role="group" aria-label="{}"><div class="widget-view">{}</div>'
        '<script type="application/json">{}</script></div>'
    )
    return shape.format(name, label, fallback, script_json(safe))
