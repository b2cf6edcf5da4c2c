"""Views of a study over shape and scale: limits, convergence, activation frequencies, agreement on tokens."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from markupsafe import Markup

from neuron_sparsity.report._charts import Chart, linear_axis, log_axis
from neuron_sparsity.report._fragments import figure, note, table
from neuron_sparsity.report._study import COLOURS, key
from neuron_sparsity.report._text import count, interval, number, percent_of, visible

if TYPE_CHECKING:
    from neuron_sparsity.study import Series, StudyResult, StudyRun

__all__ = ["agreement_table", "convergence", "frequencies", "over_shape", "token_scatter"]

_TITLES = {"width_depth": "Width-depth ratio", "scale": "Scale"}
_X = {"width_depth": "width-depth ratio, d_model / layers", "scale": "parameters without embeddings"}
_QUANTITY = {"limit": "limit of the activation ratio", "end": "activation ratio, end of stable phase"}


def over_shape(result: StudyResult, kind: str, activation: str) -> str:
    """Return the limit over width-depth ratio or scale with the fitted line, and what it tells."""
    found = _series(result, kind, activation)
    title = f"{_TITLES[kind]}: {visible(activation)}"
    if found is None:
        return note(f"{title}: no run of this series is finished.")
    chart = Chart(
        log_axis(min(found.x), max(found.x), _X[kind]),
        linear_axis(found.y, _QUANTITY.get(found.quantity, visible(found.quantity))),
        f"{title}, {count(len(found.x))} runs",
    )
    line = _line(found)
    chart.line(line, style="line thin", note="fitted")
    for name, x, y in zip(found.runs, found.x, found.y, strict=True):
        chart.point(x, y, f"{visible(name)}: {number(x)}, {number(y)}")
    stands = (
        ""
        if found.quantity == "limit"
        else "The data do not identify the limit of every run, so this is the ratio at the end of the stable phase "
        "in the place of the limit. "
    )
    return figure(title, chart.svg(), stands + _told(found))


def convergence(result: StudyResult) -> str:
    """Return how many tokens half of the change took, over scale."""
    known = [
        (one.activation, name, x, half)
        for one in result.series
        if one.kind == "scale"
        for name, x, half in zip(one.runs, one.x, one.half_tokens, strict=True)
        if half is not None
    ]
    if not known:
        return note("How soon models of several scales converge is not known: no run of the series has changed.")
    activations = list(dict.fromkeys(activation for activation, *_ in known))
    chart = Chart(
        log_axis(min(x for *_, x, _ in known), max(x for *_, x, _ in known), _X["scale"]),
        log_axis(min(half for *_, half in known), max(half for *_, half in known), "training tokens"),
        f"Tokens until half of the change, {count(len(known))} runs",
    )
    for activation, name, x, half in known:
        said = f"{visible(name)}: {count(half)} tokens"
        chart.point(x, half, said, style=f"dot run-{activations.index(activation) % COLOURS}")
    caption = (
        "Training tokens after which the activation ratio had first made half of its change over the stable phase. "
        "Further down is sooner."
    )
    body = Markup("{}{}").format(chart.svg(), key([(name, place) for place, name in enumerate(activations)]))
    return figure("Convergence over scale", body, caption)


def frequencies(result: StudyResult, activation: str) -> str:
    """Return how activation frequencies are spread over neurons, one line a scale."""
    title = f"Activation frequency: {visible(activation)}"
    runs = [run for run in _scales(result, activation) if run.frequency_shares]
    if not runs:
        return note(f"{title}: not measured.")
    edges = result.frequency_edges
    n_tokens = result.text["heldout"]["n_tokens"]
    middles = [math.sqrt(low * high) for low, high in itertools.pairwise(edges)]
    heights = [100 * share for run in runs for share in run.frequency_shares[1:]]
    chart = Chart(
        log_axis(edges[0], 1.0, "share of tokens on which a neuron is active"),
        linear_axis(heights, "neurons, % of all", zero=True),
        f"{title}, {count(len(runs))} scales",
    )
    for place, run in enumerate(runs):
        line = [(x, 100 * share) for x, share in zip(middles, run.frequency_shares[1:], strict=True)]
        chart.line(line, style="line", colour=f"var(--run-{place % COLOURS})", note=visible(run.name))
    never = "; ".join(f"{visible(run.name)} {percent_of(run.frequency_shares[0])}" for run in runs)
    caption = (
        f"End of the stable phase, at the common CETT, {count(n_tokens)} tokens; three bins a decade. Never active: "
        f"{never}."
    )
    body = Markup("{}{}").format(chart.svg(), key([(_size(run), place) for place, run in enumerate(runs)]))
    return figure(title, body, caption)


def token_scatter(result: StudyResult, activation: str) -> str:
    """Return the activation ratio of single tokens in the smallest and the largest model."""
    title = f"Token by token: {visible(activation)}"
    names = {run.name for run in result.runs if run.activation == activation}
    found = next((one for one in result.agreements if one.pairs and one.first in names), None)
    if found is None:
        return note(f"{title}: fewer than two scales were measured.")
    xs, ys = [x for _, x, _ in found.pairs], [y for _, _, y in found.pairs]
    chart = Chart(
        linear_axis(xs, f"activation ratio in {visible(found.first)}"),
        linear_axis(ys, f"activation ratio in {visible(found.second)}"),
        f"{title}, {count(len(found.pairs))} entries of the vocabulary",
    )
    low, high = max(min(xs), min(ys)), min(max(xs), max(ys))
    if low < high:
        chart.line([(low, low), (high, high)], style="line thin dashed", note="equal")
    for text, x, y in found.pairs:
        chart.point(x, y, f"{visible(text)}: {number(x)}, {number(y)}", radius=2.2)
    said = "not known" if found.correlation is None else number(found.correlation)
    caption = (
        f"The {count(len(found.pairs))} most frequent entries of the vocabulary; correlation {said} over "
        f"{count(found.n_entries)}. Dashed: equal."
    )
    return figure(title, chart.svg(), caption)


def agreement_table(result: StudyResult) -> str:
    """Return the correlation of token-wise activation ratios, between scales and between seeds."""
    if not result.agreements:
        return note("Agreement on tokens: fewer than two comparable runs were measured.")
    rows = [
        [
            f"{visible(one.first)}, {visible(one.second)}",
            "two scales" if one.kind == "scale" else "two seeds of one model",
            "not known" if one.correlation is None else number(one.correlation),
            count(one.n_entries),
        ]
        for one in result.agreements
    ]
    caption = (
        "Pearson correlation of the mean activation ratio over entries of the vocabulary; what two seeds of one model "
        "agree in is the most that two scales could be expected to"
    )
    return figure(
        "Agreement on tokens", table(["runs", "", "correlation", "entries"], rows, caption=caption), wide=True
    )


def _series(result: StudyResult, kind: str, activation: str) -> Series | None:
    return next((one for one in result.series if (one.kind, one.activation) == (kind, activation)), None)


def _scales(result: StudyResult, activation: str) -> list[StudyRun]:
    """Return one run of every scale, the smallest first."""
    own = [run for run in result.runs if run.activation == activation and "scale" in run.series]
    first = {run.parameters["non_embedding"]: run for run in reversed(own)}
    return [first[size] for size in sorted(first)]


def _size(run: StudyRun) -> str:
    return f"{visible(run.model)}, {count(run.parameters['non_embedding'])}"


def _line(found: Series) -> list[tuple[float, float]]:
    if found.fit is None:
        return []
    fit, low, high = found.fit, math.log(min(found.x)), math.log(max(found.x))
    places = [math.exp(low + (high - low) * step / 60) for step in range(61)]
    if found.kind == "width_depth":
        return [(x, fit["intercept"] + fit["slope"] * min(x, fit["bottleneck"])) for x in places]
    middle = sum(math.log10(x) for x in found.x) / len(found.x)
    return [(x, fit["level_at_mean"] + fit["slope"] * (math.log10(x) - middle)) for x in places]


def _told(found: Series) -> str:
    if found.fit is None:
        return f"Nothing is fitted: {visible(found.problem)}."
    fit = found.fit
    if found.kind == "scale":
        return str(visible(fit["verdict"]))
    ends = {name: interval(*fit["intervals"][name]) for name in ("slope", "bottleneck", "plateau")}
    told = (
        f"Linear up to a bottleneck, then flat: slope {number(fit['slope'])} (95 % interval {ends['slope']}), "
        f"bottleneck {number(fit['bottleneck'])} ({ends['bottleneck']}), plateau {number(fit['plateau'])} "
        f"({ends['plateau']}). "
    )
    return told + str(visible(" ".join(fit["warnings"])))
