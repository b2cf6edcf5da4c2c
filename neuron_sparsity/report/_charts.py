"""Charts as small inline SVG: axes, lines, points and stacked bars whose colours follow the page's style sheet.

A `Chart` maps data to a viewBox, collects fragments, and `svg` puts the axes around them. Colours are CSS classes or
custom properties, so one drawing serves light, dark and print; no script is needed to read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from neuron_sparsity.report._text import count, join, plain

__all__ = ["Axis", "Chart", "asinh_axis", "layer_axis", "linear_axis", "log_axis", "ticks"]

WIDTH, HEIGHT = 460.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 14.0, 26.0, 46.0


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within [low, high], at most `most` of them.

    Example:
        >>> ticks(0, 1)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / max(most - 1, 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= 0.9 * raw)
    first = math.ceil(low / step - 1e-9)
    found = [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return [tick + 0.0 for tick in found]


@dataclass(frozen=True)
class Axis:
    """One axis: data -> 0..1, the places of its ticks, and how a tick is written."""

    place: Callable[[float], float]
    ticks: Sequence[float]
    label: str
    write: Callable[[float], str] = plain


def linear_axis(values: Sequence[float], label: str, *, zero: bool = False, whole: bool = False) -> Axis:
    """Return a linear axis with a little room; with `zero` it starts at 0, with `whole` its ticks are integers.

    Where no value is negative, the axis has no negative part either: no share or loss is below 0.

    Example:
        >>> linear_axis([0.0, 0.0], "activation ratio").ticks
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    with_room = low - room if low < 0 else max(0.0, low - room)
    low, high = (min(0.0, low) if zero else with_room), high + room
    at = [tick for tick in ticks(low, high) if not whole or tick == round(tick)]

    def place(value: float) -> float:
        return (value - low) / (high - low)

    return Axis(place, at, label, count if whole else plain)


def layer_axis(layers: Sequence[int]) -> Axis:
    """Return an axis of layers with half a place of room on either side."""
    low, high = min(layers) - 0.6, max(layers) + 0.6
    at = [tick for tick in ticks(low, high) if tick == round(tick) and min(layers) <= tick <= max(layers)]
    return Axis(lambda value: (value - low) / (high - low), at, "layer", count)


def _short(value: float) -> str:
    """Return 10,000 as 10k: a tick label must fit a phone."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{plain(value / unit)}{letter}"
    return plain(value)


def asinh_axis(values: Sequence[float], label: str, *, unit: float) -> Axis:
    """Return an axis linear within about ± `unit` and logarithmic beyond: it holds rises of 0.1 % and of 10,000 %."""
    low, high = math.asinh(min([0.0, *values]) / unit), math.asinh(max([unit, *values]) / unit)
    room = 0.06 * (high - low)
    low, high = low - room, high + room
    steps = [0.0, *(sign * unit * 10.0**power for power in range(0, 9) for sign in (1, -1))]
    at = sorted(step for step in steps if low <= math.asinh(step / unit) <= high)
    if len(at) > 7:
        at = [step for step in at if step <= 0 or round(math.log10(step / unit)) % 2 == 0]

    def place(value: float) -> float:
        return (math.asinh(value / unit) - low) / (high - low)

    return Axis(place, at, label, lambda value: f"{_short(value)} %")


def log_axis(low: float, high: float, label: str) -> Axis:
    """Return a logarithmic axis from `low` to `high`, both > 0."""
    start, end = math.log10(low) - 0.05, math.log10(high) + 0.05
    steps = (1, 2, 5) if end - start < 3 else (1,)
    powers = range(math.floor(start), math.floor(end) + 1)
    at = [step * 10.0**power for power in powers for step in steps if start <= math.log10(step) + power <= end]
    return Axis(lambda value: (math.log10(max(value, 1e-300)) - start) / (end - start), at[:: len(at) // 8 + 1], label)


@dataclass
class Chart:
    """A drawing under construction; every method adds to it."""

    x: Axis
    y: Axis
    title: str
    height: float = HEIGHT
    parts: list[Markup] = field(default_factory=list)

    def _x(self, value: float) -> str:
        return f"{LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT):.1f}"

    def _y(self, value: float) -> str:
        return f"{TOP + (1 - self.y.place(value)) * (self.height - TOP - BOTTOM):.1f}"

    def line(
        self, points: Sequence[tuple[float, float]], *, style: str = "line", colour: str = "", note: str = ""
    ) -> None:
        """Join the finite points in the order given."""
        path = " ".join(f"{self._x(x)},{self._y(y)}" for x, y in points if math.isfinite(x) and math.isfinite(y))
        stroke = Markup(' style="stroke:{}"').format(colour) if colour else ""
        title = Markup("<title>{}</title>").format(note) if note else ""
        self.parts.append(Markup('<polyline class="{}" points="{}"{}>{}</polyline>').format(style, path, stroke, title))

    def point(self, x: float, y: float, note: str, *, style: str = "dot", radius: float = 3.2) -> None:
        """Draw one point; `note` is read out and shown on hover. What is not finite is left out."""
        if math.isfinite(x) and math.isfinite(y):
            circle = Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>')
            self.parts.append(circle.format(style, self._x(x), self._y(y), radius, note))

    def rule(self, y: float, label: str, *, style: str = "target") -> None:
        """Draw a horizontal line across at `y`; its key stands above the plot, where no data can cover it."""
        line = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        right, at = WIDTH - RIGHT, self._y(y)
        self.parts.append(line.format(style, LEFT, right, at, at))
        self.parts.append(line.format(style, LEFT, LEFT + 22, 12, 12))
        self.parts.append(Markup('<text class="{}-text" x="{}" y="16">{}</text>').format(style, LEFT + 28, label))

    def bar(self, x: float, low: float, high: float, note: str, *, style: str, width: float = 0.8) -> None:
        """Draw a bar centred on `x` from `low` to `high`."""
        if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
            return
        left, right = float(self._x(x - width / 2)), float(self._x(x + width / 2))
        top, bottom = float(self._y(high)), float(self._y(low))
        rectangle = Markup(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
        )
        self.parts.append(rectangle.format(style, left, top, right - left, max(bottom - top, 0.4), note))

    def svg(self) -> Markup:
        """Return the drawing with its axes, as one `<svg>` element with a title for screen readers."""
        grid = [*self._y_axis(), *self._x_axis()]
        return Markup('<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}{}</svg>').format(
            WIDTH, self.height, self.title, join(grid), join(self.parts)
        )

    def _y_axis(self) -> list[Markup]:
        found = []
        for tick in self.y.ticks:
            at = self._y(tick)
            found.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="ytick" x="{}" y="{}">{}</text>'
                ).format(LEFT, WIDTH - RIGHT, at, at, LEFT - 7, float(at) + 4, self.y.write(tick))
            )
        middle = TOP + (self.height - TOP - BOTTOM) / 2
        label = Markup('<text class="label" transform="translate(11 {:.1f}) rotate(-90)">{}</text>')
        return [*found, label.format(middle, self.y.label)]

    def _x_axis(self) -> list[Markup]:
        bottom = self.height - BOTTOM
        found = [
            Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, bottom, bottom)
        ]
        for tick in self.x.ticks:
            text = Markup('<text class="xtick" x="{}" y="{}">{}</text>')
            found.append(text.format(self._x(tick), bottom + 17, self.x.write(tick)))
        middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
        return [
            *found,
            Markup('<text class="label" x="{}" y="{}">{}</text>').format(middle, self.height - 7, self.x.label),
        ]
