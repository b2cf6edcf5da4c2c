"""Perplexity against activation ratio under every rule: as a chart and a table of the page, and as a figure on disk."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from neuron_sparsity.report._charts import Chart, asinh_axis, linear_axis
from neuron_sparsity.report._fragments import figure, folded, note, table
from neuron_sparsity.report._text import count, join, number, signed, target, visible
from neuron_sparsity.rules import RULES
from neuron_sparsity.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neuron_sparsity.pareto import ParetoPoint, ParetoResult, RuleAnswer, RuleCurve

__all__ = ["draw_pareto", "pareto_curves", "pareto_table", "save_pareto_figure"]

# Okabe and Ito's palette, without its yellow and black: told apart by colour-blind readers, on white and on dark.
_COLOURS = {
    "cett": "#0072b2",
    "fat": "#d55e00",
    "quantile": "#009e73",
    "topk": "#cc79a7",
    "topp": "#e69f00",
    "zeros": "#56b4e9",
}
_MARKERS = {"cett": "o", "fat": "s", "quantile": "^", "topk": "D", "topp": "v", "zeros": "*"}
FIGURES = ("pareto.svg", "pareto.png")


def pareto_curves(result: ParetoResult) -> str:
    """Return perplexity rise against activation ratio, one line a rule and score."""
    shown = [(curve, _drawn(curve)) for curve in result.curves]
    points = [(p.activation_ratio, p.ppl_increase_percent) for _, found in shown for p in found]
    if not points:
        return note("No pass was recorded that can be drawn.")
    unit = min(result.p_percents, default=1.0)
    chart = Chart(
        linear_axis([x for x, _ in points], "activation ratio"),
        asinh_axis([y for _, y in points], "perplexity rise", unit=unit),
        f"Perplexity rise against activation ratio, {count(len(shown))} rules, {count(len(points))} passes",
        height=380.0,
    )
    chart.rule(unit, f"target +{target(unit)}")
    for curve, found in shown:
        style = "line thin dashed" if curve.score == "s" else "line thin"
        colour = _COLOURS.get(curve.rule, "var(--accent)")
        if len(found) > 1:
            line = [(p.activation_ratio, p.ppl_increase_percent) for p in found]
            chart.line(line, style=style, colour=colour, note=visible(curve.label))
        for p in found:
            parameter = f", {curve.parameter_name} {number(p.parameter)}" if curve.parameter_name else ""
            said = f"{visible(curve.label)}{parameter}: activation ratio {number(p.activation_ratio)}, perplexity "
            chart.point(p.activation_ratio, p.ppl_increase_percent, said + signed(p.ppl_increase_percent), radius=2.2)
    key = join(_key(curve) for curve, _ in shown)
    caption = (
        f"Dense perplexity {number(result.ppl_dense, 4)}. All layers cut at once by each rule; lower and further left "
        "is better. Full lines: scores are contributions; dashed: the activation function's own output. The vertical "
        "scale is linear around zero and logarithmic beyond the smallest target."
    )
    return figure(
        "Perplexity rise under every rule", Markup("{}<p class=facts>{}</p>").format(chart.svg(), key), caption
    )


def pareto_table(result: ParetoResult) -> str:
    """Return the activation ratio each rule needs at each p, fewest first, and which differences the text tells."""
    header = ["rule", *(f"+{target(p)}" for p in result.p_percents)]
    parts = []
    for metric, name in (("ppl", "perplexity"), ("kl", "KL divergence, as a rise of perplexity")):
        answers = {c.label: [a for a in c.answers if a.metric == metric] for c in result.curves}
        order = sorted(answers, key=lambda label: _place(answers[label]))
        rows = [[visible(label), *map(_cell, answers[label])] for label in order]
        caption = f"Activation ratio needed, by {name}; 95 % intervals of the text in brackets"
        parts.append(table(header, rows, caption=caption))
    verdicts = join(Markup("<p class=facts>{}</p>").format(line) for line in _verdicts(result))
    body = join((parts[0], verdicts, folded("By KL divergence, which the same text tells more exactly", parts[1])))
    used = dict.fromkeys(curve.rule for curve in result.curves)
    caption = "; ".join(f"{visible(rule)}: {RULES.get(rule, 'a rule of another version')}" for rule in used)
    return figure("What each rule needs", body, f"A neuron is active where, by {caption}.", wide=True)


def _verdicts(result: ParetoResult) -> list[str]:
    found = []
    for verdict in result.verdicts:
        if verdict.metric != "ppl" or verdict.first is None:
            continue
        unclear = verdict.not_apart
        if unclear is None:
            rest = "; this text has too few windows to tell it from others"
        else:
            names = ", ".join(visible(label) for label in unclear)
            rest = f"; this text does not tell it from {names}" if names else ", told from every other"
        found.append(f"At +{target(verdict.p_percent)} {visible(verdict.first)} needs fewest{rest}.")
    return found


def _drawn(curve: RuleCurve) -> list[ParetoPoint]:
    """Passes that a chart can hold, without the one that cuts everything: it would flatten all others."""
    finite = [p for p in curve.points if math.isfinite(p.activation_ratio) and math.isfinite(p.ppl_increase_percent)]
    return [p for p in finite if p.activation_ratio > 0] or finite


def _key(curve: RuleCurve) -> Markup:
    dash = "5 3.5" if curve.score == "s" else "none"
    shape = Markup(
        '<svg width="26" height="10" aria-hidden="true"><line x1="0" x2="22" y1="5" y2="5" '
        'style="stroke:{};stroke-width:2.4;stroke-dasharray:{}"/></svg>{}&ensp; '
    )
    return shape.format(_COLOURS.get(curve.rule, "var(--accent)"), dash, visible(curve.label))


def _place(answers: list[RuleAnswer]) -> tuple[bool, float]:
    first = next((a.activation_ratio for a in answers if a.activation_ratio is not None), None)
    return (first is None, first or 0.0)


def _cell(answer: RuleAnswer) -> str:
    if answer.activation_ratio is None:
        return "not reached"
    ends = "" if answer.low is None or answer.high is None else f" ({number(answer.low)} to {number(answer.high)})"
    return f"{number(answer.activation_ratio)}{ends}"


def draw_pareto(result: ParetoResult, drawing: Figure) -> None:
    """Draw perplexity against activation ratio under every rule into an empty figure."""
    axes = drawing.add_subplot()
    for curve in result.curves:
        shown = _drawn(curve)
        axes.plot(
            [p.activation_ratio for p in shown],
            [p.ppl for p in shown],
            linestyle="--" if curve.score == "s" else "-",
            color=_COLOURS.get(curve.rule),
            marker=_MARKERS.get(curve.rule),
            markersize=3.5,
            linewidth=1.2,
            label=curve.label,
        )
    for p in result.p_percents:
        axes.axhline(result.ppl_dense * (1 + p / 100), color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"+{p:g} %", (1.0, result.ppl_dense * (1 + p / 100)), xycoords=("axes fraction", "data"), fontsize=7
        )
    corpus = result.corpus
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("activation ratio")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{result.model.name} on {corpus['name']}, {corpus['n_tokens']:,} tokens", fontsize=10)
    axes.legend(fontsize=7)


def save_pareto_figure(result: ParetoResult, folder: str | Path) -> list[str]:
    """Write `pareto.svg` and `pareto.png` into a folder, perplexity against activation ratio; needs matplotlib.

    Returns:
        The names of the files; none where matplotlib is not installed.

    Raises:
        RunFolderError: If a file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    draw_pareto(result, drawing)
    for name in FIGURES:
        data = io.BytesIO()
        drawing.savefig(data, format=name[-3:], dpi=160)
        write_bytes(Path(folder) / name, data.getvalue())
    return list(FIGURES)
