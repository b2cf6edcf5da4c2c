"""The static figures: matplotlib, in a font that comes with it, without pyplot and without its state.

Text from data is drawn as it is: never as a formula, although a token may be `$`, and with the number of a character in
place of one the font does not have.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from neuron_sparsity.report._image import CIVIDIS, NEVER_COLOUR
from neuron_sparsity.report._pareto import draw_pareto
from neuron_sparsity.report._text import visible, visible_token

__all__ = ["Curve", "PaperFigure", "bars", "classes", "curves", "heat_map", "histogram", "pareto", "strips"]

_FONT = "DejaVu Sans"
_STYLE: Any = {
    "font.family": _FONT,
    "font.size": 8.0,
    "text.parse_math": False,
    "svg.hashsalt": "neuron_sparsity",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_MOST_TICKS = 64  # tokens whose names fit under a map
_TOKEN, _ROW, _LINE = 14, 24, 84  # characters that fit beside an axis: of a token, of a row's name, of an example


class PaperFigure(Figure):
    """A matplotlib figure that a notebook shows without pyplot, with 128 colours: a third of the bytes."""

    def _repr_png_(self) -> bytes:
        drawn, kept = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=110)
        Image.open(drawn).convert("RGB").quantize(128).save(kept, format="png", optimize=True)
        return kept.getvalue()


@dataclass(frozen=True)
class Curve:
    """One line of `curves`: its points, and how it is drawn and named."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    colour: str = COLOURS[0]
    style: str = "o-"


@contextmanager
def _drawing(title: str, measured: str, size: tuple[float, float]) -> Iterator[tuple[PaperFigure, Axes]]:
    with mpl.rc_context(_STYLE):
        drawing = PaperFigure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.add_subplot()
        yield drawing, axes
        _title(drawing, title, measured, size[0])


def _title(drawing: PaperFigure, title: str, measured: str, width: float) -> None:
    lines = [text(title), *textwrap.wrap(text(measured), int(width * 14))]
    drawing.suptitle("\n".join(lines), fontsize=8.5, x=0.01, ha="left")


@lru_cache(maxsize=4096)
def _drawn(character: str) -> str:
    font = font_manager.get_font(font_manager.findfont(_FONT))
    return character if font.get_char_index(ord(character)) else f"[U+{ord(character):04X}]"


def text(said: object, *, most: int | None = None) -> str:
    """Return text from data as the font can draw it, no longer than `most` characters."""
    shown = "".join(map(_drawn, visible(said)))
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def _name(axis: Axis, names: Sequence[str], **look: Any) -> None:
    """Give every place of an axis its name, made now: later matplotlib would read `$` as the start of a formula."""
    axis.set_ticks(range(len(names)), labels=list(names), **look)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _token_axis(axes: Axes, tokens: Sequence[str]) -> None:
    if len(tokens) <= _MOST_TICKS:
        _name(axes.xaxis, [text(visible_token(token), most=_TOKEN) for token in tokens], rotation=90, fontsize=6)
    axes.set_xlabel("token")


def _cividis() -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("cividis of the page", CIVIDIS)


def heat_map(
    values: NDArray[np.float64],
    *,
    title: str,
    measured: str,
    quantity: str,
    rows: Sequence[str],
    row_axis: str,
    tokens: Sequence[str],
    signed: bool = False,
) -> PaperFigure:
    """Return values [row, token] as colours; signed ones around white, in two colours that everybody tells apart."""
    size = (7.2, float(np.clip(2.0 + 0.16 * len(rows), 2.7, 9.0)))
    with _drawing(title, measured, size) as (drawing, axes):
        bound = float(np.abs(values).max()) or 1.0
        limits = {"vmin": -bound, "vmax": bound, "cmap": "RdBu"} if signed else {"cmap": _cividis()}
        picture = axes.imshow(values, aspect="auto", interpolation="nearest", **limits)
        step = -(-len(rows) // 40)
        axes.yaxis.set_ticks(range(0, len(rows), step), labels=[text(row, most=_ROW) for row in rows[::step]])
        axes.set_ylabel(row_axis)
        _token_axis(axes, tokens)
        drawing.colorbar(picture, ax=axes, label=quantity, pad=0.01)
    return drawing


def classes(
    frequency: NDArray[np.float64], dead: NDArray[np.bool_], *, layers: Sequence[int], title: str, measured: str
) -> PaperFigure:
    """Return activation frequency [layer, rank], rarest first within each layer, dead neurons in the warning colour."""
    order = np.argsort(frequency, axis=1, kind="stable")
    with _drawing(title, measured, (7.2, float(np.clip(1.6 + 0.12 * len(layers), 2.6, 9.0)))) as (drawing, axes):
        colours = _cividis().with_extremes(bad=NEVER_COLOUR)
        ranked, marked = np.take_along_axis(frequency, order, axis=1), np.take_along_axis(dead, order, axis=1)
        shown = np.ma.masked_array(ranked, marked)
        picture = axes.imshow(shown, aspect="auto", interpolation="nearest", vmin=0.0, vmax=1.0, cmap=colours)
        step = -(-len(layers) // 40)
        axes.yaxis.set_ticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
        axes.set(xlabel="neurons of the layer, rarest first", ylabel="layer")
        drawing.colorbar(picture, ax=axes, label="activation frequency", pad=0.01)
    return drawing


def bars(
    values: Sequence[float], names: Sequence[str], *, title: str, measured: str, quantity: str, axis: str
) -> PaperFigure:
    """Return horizontal bars, the first on top."""
    with _drawing(title, measured, (7.2, 1.1 + 0.24 * len(values))) as (drawing, axes):
        axes.barh(range(len(values)), values, color=COLOURS[0], height=0.7)
        _name(axes.yaxis, [text(name, most=_LINE) for name in names], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel=quantity, ylabel=axis)
    return drawing


def strips(
    parts: Sequence[tuple[str, NDArray[np.float64], NDArray[np.int64]]],
    tokens: Sequence[str],
    *,
    title: str,
    measured: str,
    quantity: str,
) -> PaperFigure:
    """Return panels of [rank, token]: colour is the value, the number in a cell is the neuron."""
    rows = sum(values.shape[0] for _, values, _ in parts)
    size = (float(np.clip(1.6 + 0.36 * len(tokens), 5.0, 18.0)), 1.7 + 0.24 * rows + 0.2 * len(parts))
    with mpl.rc_context(_STYLE):
        drawing = PaperFigure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawing)
        panels = drawing.subplots(len(parts), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, values, neurons) in zip(panels, parts, strict=True):
            low, high = float(values.min()), float(values.max())
            picture = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=_cividis())
            for rank, column in np.ndindex(values.shape):
                bright = values[rank, column] > (low + high) / 2
                axes.text(
                    column, rank, str(neurons[rank, column]), ha="center", va="center", fontsize=5.5,
                    color="black" if bright else "white",
                )  # fmt: skip
            _name(axes.yaxis, [str(rank + 1) for rank in range(values.shape[0])])
            axes.set_ylabel("rank")
            axes.set_title(name, fontsize=8, loc="left", pad=3)
            drawing.colorbar(picture, ax=axes, label=quantity, pad=0.01)
        _token_axis(panels[-1], tokens)
        _title(drawing, title, measured, size[0])
    return drawing


def curves(
    lines: Sequence[Curve],
    *,
    title: str,
    measured: str,
    x: str,
    y: str,
    rule: tuple[float, str] | None = None,
    marks: Sequence[tuple[float, float, str]] = (),
    symlog: float | None = None,
    bar: tuple[float, float, str] | None = None,
) -> PaperFigure:
    """Return lines on common axes.

    Args:
        lines: What is drawn.
        title: What is shown.
        measured: On what.
        x: The horizontal axis, with its unit.
        y: The vertical axis, with its unit.
        rule: A horizontal line and its name.
        marks: Single points (x, y, name), as rings.
        symlog: The vertical axis is linear up to this value and logarithmic beyond.
        bar: First and last value and name of what the lines' colours mean, in cividis, in place of a key.
    """
    with _drawing(title, measured, (7.2, 4.2)) as (drawing, axes):
        for line in lines:
            axes.plot(
                line.x, line.y, line.style, color=line.colour, label=text(line.label), linewidth=1.2, markersize=3
            )
        for index, (at, height, name) in enumerate(marks):
            colour = COLOURS[(index + 1) % len(COLOURS)]
            axes.plot([at], [height], "o", mfc="none", mec=colour, mew=1.6, markersize=8, label=text(name))
        if rule is not None:
            axes.axhline(rule[0], color="0.45", linewidth=0.9, linestyle=":", label=text(rule[1]))
        if symlog is not None:
            axes.set_yscale("symlog", linthresh=symlog)
            lowest = min(0.0, *(height for line in lines for height in line.y), *(mark[1] for mark in marks))
            axes.set_ylim(bottom=1.1 * lowest - 0.1 * symlog)
        _plain_numbers(axes.yaxis)
        axes.set(xlabel=x, ylabel=y)
        if bar is not None:
            scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(bar[0], bar[1]), _cividis())
            drawing.colorbar(scale, ax=axes, label=bar[2], pad=0.01, ticks=MaxNLocator(8, integer=True))
        if bar is None or rule is not None:
            _key(axes, only_rule=bar is not None)
    return drawing


def _key(axes: Axes, *, only_rule: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    kept = [(h, said) for h, said in zip(handles, labels, strict=True) if said]
    if only_rule:
        kept = kept[-1:]
    if kept:
        axes.legend(*zip(*kept, strict=True), fontsize=7, frameon=False)


def histogram(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    height: NDArray[np.float64],
    *,
    title: str,
    measured: str,
    x: str,
    y: str,
    log: bool,
    cuts: dict[str, float],
) -> PaperFigure:
    """Return bars over the bins [low, high), and a vertical line for each cut."""
    with _drawing(title, measured, (7.2, 3.2)) as (drawing, axes):
        axes.bar(low, height, width=high - low, align="edge", color=COLOURS[0], linewidth=0.3, edgecolor="white")
        for index, (name, cut) in enumerate(cuts.items()):
            colour = COLOURS[(index + 1) % len(COLOURS)]
            axes.axvline(cut, color=colour, linestyle="--", linewidth=1.0, label=text(f"{name}: {cut:.3g}"))
        if log:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
            if high.max() < 1e3 * low.min():  # few decades: name what lies between
                axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
                axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel=text(x), ylabel=text(y))
        _key(axes, only_rule=False)
    return drawing


def pareto(result: Any) -> PaperFigure:
    """Return perplexity against activation ratio under every rule."""
    with mpl.rc_context(_STYLE):
        drawing = PaperFigure(figsize=(7.2, 4.8), layout="constrained")
        FigureCanvasAgg(drawing)
        draw_pareto(result, drawing)
        for part in drawing.findobj(Text):
            part.set_text(text(part.get_text()))
    return drawing
