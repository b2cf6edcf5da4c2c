"""Several runs side by side: a table of headline numbers, and curves and layers of all of them in one chart each."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report._charts import Axis, Chart, asinh_axis, layer_axis, linear_axis
from neuron_sparsity.report._classes import layer_labels
from neuron_sparsity.report._fragments import figure, folded, note, table
from neuron_sparsity.report._measured import definitions, measured
from neuron_sparsity.report._text import count, join, number, percent_of, plain, signed, target, visible
from neuron_sparsity.report.page import Report, Section, render
from neuron_sparsity.search import search_name

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["MOST_RUNS", "compare"]

MOST_RUNS = 8
_DASHES = ("none", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 3", "1 3", "6 2 1 2 1 2")
_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class _Run:
    letter: str
    name: str
    place: int
    stats: NeuronStatistics
    result: SparsityResult | None
    removed: AblationResult | None

    @property
    def label(self) -> str:
        return f"{self.letter} · {self.name}"

    @property
    def stroke(self) -> str:
        return f"var(--run-{self.place});stroke-dasharray:{_DASHES[self.place]}"


def compare(runs: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> Report:
    """Return one page with several runs side by side.

    Args:
        runs: What `load_run` returned for each, by the name it gets on the page; 2 to 8.
        title: Title of the page.

    Raises:
        ValueError: If there are too few or too many runs, or they asked for a different p or by a different metric.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"2 to {MOST_RUNS} runs stand side by side on a page, got {len(runs)}")
    found = [
        _Run(string.ascii_uppercase[at], visible(name), at, parts["stats"], parts.get("result"), parts.get("removed"))
        for at, (name, parts) in enumerate(runs.items())
    ]
    _require_one_question(found)
    name = visible(title if title is not None else f"{len(found)} runs side by side")
    sections = [
        Section("summary", "Summary", "", (_headline(found), _key(found), _table(found), *_remarks(found))),
        Section("sparse", "How sparse are they?", _lead(found), tuple(_sparse(found))),
        Section("removable", "What can go?", "Sets that can be replaced on every token.", tuple(_removable(found))),
        Section("which", "Which neurons?", "Dead neurons of each layer.", (_dead(found),)),
        Section("measured", "How it was measured", "What the numbers of each run rest on.", tuple(_measured(found))),
    ]
    return Report(html=render(sections, title=name), title=name)


def _require_one_question(runs: Sequence[_Run]) -> None:
    for part, words in (("result", "search"), ("removed", "removal")):
        asked = [(run, getattr(run, part)) for run in runs if getattr(run, part) is not None]
        for run, other in asked[1:]:
            first_run, first = asked[0]
            ours, theirs = _question(first), _question(other)
            if ours != theirs:
                raise ValueError(
                    f"the {words} of {first_run.name} is {ours}, that of {run.name} is {theirs}: they answer different "
                    "questions; measure both with the same --p and --metric"
                )


def _question(part: Any) -> str:
    return search_name(part.metric, part.p_percent) if hasattr(part, "metric") else f"for +{part.p_percent:g} %"


def _reached(runs: Sequence[_Run]) -> list[tuple[_Run, SparsityResult]]:
    return [(run, run.result) for run in runs if run.result is not None and run.result.reached]


def _ends(result: SparsityResult) -> tuple[float, float] | None:
    own = next((found for found in result.estimates if found.metric == result.metric), None)
    return None if own is None or own.low is None or own.high is None else (own.low, own.high)


def _headline(runs: Sequence[_Run]) -> Markup:
    said = []
    ordered = sorted(_reached(runs), key=lambda pair: pair[1].activation_ratio)
    if len(ordered) > 1:
        (few, least), (many, most) = ordered[0], ordered[-1]
        said.append(
            f"At {search_name(least.metric, least.p_percent)} {few.label} needs the fewest of its MLP neurons on an "
            f"average token, {percent_of(least.activation_ratio)}; {many.label} the most, "
            f"{percent_of(most.activation_ratio)}."
        )
        ends = _ends(least), _ends(most)
        if ends[0] and ends[1] and ends[0][1] >= ends[1][0]:
            said.append("Their 95 % intervals overlap: this text does not tell the two apart.")
    removed = sorted(
        ((run, run.removed.n_removable / run.removed.n_neurons) for run in runs if run.removed is not None),
        key=lambda pair: -pair[1],
    )
    if len(removed) > 1:
        (top, share), (low, least_share) = removed[0], removed[-1]
        said.append(
            f"For good most can go of {top.label}, {percent_of(share)} of its neurons, and fewest of {low.label}, "
            f"{percent_of(least_share)}."
        )
    return Markup('<p class="headline">{}</p>').format(" ".join(said) or f"{len(runs)} runs side by side.")


def _key(runs: Sequence[_Run]) -> Markup:
    shape = Markup(
        '<span class="run-key"><svg width="34" height="10" aria-hidden="true"><line x1="0" x2="32" y1="5" y2="5" '
        'style="stroke:{};stroke-width:2.6"/></svg>{}</span>'
    )
    return Markup('<div class="legend runs">{}</div>').format(join(shape.format(run.stroke, run.label) for run in runs))


def _lead(runs: Sequence[_Run]) -> str:
    asked = next((run.result for run in runs if run.result is not None), None)
    if asked is None:
        return "How many neurons may stay inactive, token by token."
    return f"How many neurons may stay inactive, token by token: {search_name(asked.metric, asked.p_percent)}."


def _table(runs: Sequence[_Run]) -> Markup:
    rows: list[tuple[str, Callable[[_Run], str]]] = [
        ("model", lambda run: visible(run.stats.model.name)),
        ("MLP neurons", _shape_of),
        ("activation", lambda run: f"{visible(run.stats.model.activation)}, {_gate(run)}"),
        ("text", lambda run: _text_of(run.result.corpus if run.result else run.stats.corpus)),
        ("activation ratio", lambda run: _of(run.result, _ratio)),
        ("CETT", lambda run: _of(run.result, lambda r: number(r.cett) if r.reached else "not reached")),
        ("perplexity, dense", lambda run: _of(run.result or run.removed, lambda r: number(r.ppl_dense, 4))),
        ("perplexity, truncated", lambda run: _of(run.result, _truncated)),
        ("can go for good", lambda run: _of(run.removed, _gone)),
        ("held-out text", lambda run: _of(run.removed, _held)),
        ("ranking, replacement", lambda run: _of(run.removed, lambda r: f"{visible(r.ranking)}, {r.replacement}")),
        ("dead neurons", _dead_of),
    ]
    header = ("", *(run.label for run in runs))
    body = [(said, *(cell(run) for run in runs)) for said, cell in rows]
    shown = table(header, body, caption="Headline numbers; 95 % intervals of the text in brackets")
    return figure("Side by side", Markup('<div class="side-by-side">{}</div>').format(shown), wide=True)


def _of(part: Any, say: Callable[[Any], str]) -> str:
    return _NOT_MEASURED if part is None else say(part)


def _shape_of(run: _Run) -> str:
    model = run.stats.model
    return f"{model.n_layers} × {count(model.d_mlp)} = {count(model.n_layers * model.d_mlp)}"


def _gate(run: _Run) -> str:
    return "gated" if run.stats.model.gated else "plain"


def _text_of(corpus: Mapping[str, Any]) -> str:
    return f"{visible(corpus.get('name', '?'))}, {count(corpus.get('n_tokens'))} tokens"


def _ratio(result: SparsityResult) -> str:
    if not result.reached:
        return "not reached"
    ends = _ends(result)
    return number(result.activation_ratio) + (f" ({number(ends[0])} to {number(ends[1])})" if ends else "")


def _truncated(result: SparsityResult) -> str:
    return f"{number(result.ppl_sparse, 4)} ({signed(result.ppl_increase_percent)})"


def _gone(removed: AblationResult) -> str:
    more = "" if removed.resolved else ", perhaps more"
    return f"{count(removed.n_removable)} ({percent_of(removed.n_removable / removed.n_neurons)}){more}"


def _held(removed: AblationResult) -> str:
    held = removed.heldout
    if not held:
        return "not checked"
    verdict = held.get("verdict", "holds" if held.get("holds") else "fails")
    return f"{signed(held['ppl_increase_percent'])}, {visible(verdict)}"


def _dead_of(run: _Run) -> str:
    active = classes.activity(run.stats, run.result)
    dead = int(classes.class_counts(active).dead.sum())
    return f"{count(dead)} ({percent_of(dead / active.frequency.size)}), N = {count(run.stats.n_tokens)}"


def _remarks(runs: Sequence[_Run]) -> list[Markup]:
    texts = {_text_of(run.result.corpus if run.result else run.stats.corpus) for run in runs}
    remarks = []
    if len(texts) > 1:
        remarks.append("The runs were not measured on the same text: part of a difference may be the text's.")
    if len({run.stats.n_tokens for run in runs}) > 1:
        remarks.append("The runs saw different numbers of tokens: the more tokens, the fewer neurons count as dead.")
    return [note(remark) for remark in remarks]


def _depth(runs: Sequence[_Run]) -> tuple[Axis, Callable[[_Run, int], float]]:
    """The axis of layers: their numbers where all runs have the same, else the relative depth."""
    labels = {tuple(layer_labels(run.stats)) for run in runs}
    if len(labels) == 1:
        layers = list(next(iter(labels)))
        return layer_axis(layers), lambda run, row: float(layers[row])
    axis = linear_axis([0.0, 1.0], "relative depth", zero=True)
    return axis, lambda run, row: (row + 0.5) / len(layer_labels(run.stats))


def _per_layer(
    runs: Sequence[tuple[_Run, Sequence[float]]], quantity: str, title: str, caption: str, *, wide: bool = False
) -> Markup:
    """One line a run over the layers."""
    if not runs:
        return note(f"{title}: {_NOT_MEASURED} in any of these runs.")
    x, place = _depth([run for run, _ in runs])
    values = [value for _, row in runs for value in row]
    chart = Chart(x, linear_axis([0.0, *values], quantity, zero=True), f"{title} of {len(runs)} runs")
    for run, row in runs:
        points = [(place(run, at), value) for at, value in enumerate(row)]
        chart.line(points, colour=run.stroke, note=run.label)
        for at, (where, value) in enumerate(points):
            said = f"{run.label}, layer {layer_labels(run.stats)[at]}: {number(value)}"
            chart.point(where, value, said, style=f"dot run-{run.place}", radius=2.4)
    return figure(title, Markup("{}{}").format(chart.svg(), _key([run for run, _ in runs])), caption, wide=wide)


def _rises(
    runs: Sequence[tuple[_Run, list[tuple[float, float]]]], p_percent: float, label: str, title: str, caption: str
) -> Markup:
    """Perplexity rise against what is cut, one line a run."""
    drawn = [(run, [point for point in sorted(points) if np.isfinite(point).all()]) for run, points in runs]
    drawn = [(run, points) for run, points in drawn if points]
    if not drawn:
        return note(f"{title}: {_NOT_MEASURED} in any of these runs.")
    chart = Chart(
        linear_axis([x for _, points in drawn for x, _ in points], label),
        asinh_axis([y for _, points in drawn for _, y in points], "perplexity rise", unit=max(p_percent, 1e-3)),
        f"{title}, {len(drawn)} runs",
    )
    chart.rule(p_percent, f"target +{target(p_percent)}", style="asked")  # not dashed in a colour: that is a run
    for run, points in drawn:
        chart.line(points, colour=run.stroke, note=run.label)
        for x, y in points:
            said = f"{run.label}: {label} {number(x)}, perplexity {signed(y)}"
            chart.point(x, y, said, style=f"dot run-{run.place}", radius=2.2)
    return figure(title, Markup("{}{}").format(chart.svg(), _key([run for run, _ in drawn])), caption)


def _sparse(runs: Sequence[_Run]) -> list[Markup]:
    searched = [(run, run.result) for run in runs if run.result is not None]
    curves = [
        (run, [(float(e["activation_ratio"]), float(e["ppl_increase_percent"])) for e in result.evaluations])
        for run, result in searched
    ]
    p_percent = searched[0][1].p_percent if searched else 1.0
    layers = [(run, [float(layer.activation_ratio) for layer in result.layers]) for run, result in _reached(runs)]
    return [
        _per_layer(
            layers,
            "activation ratio",
            "Activation ratio of each layer",
            "Share of (token, neuron) pairs active in the truncated run, of every run whose target was reached.",
        ),
        _rises(
            curves,
            p_percent,
            "activation ratio",
            "Perplexity rise against activation ratio",
            "All layers truncated at once; lower and further left is better. The vertical scale is linear around zero "
            "and logarithmic beyond the target.",
        ),
    ]


def _removable(runs: Sequence[_Run]) -> list[Markup]:
    found = [(run, run.removed) for run in runs if run.removed is not None]
    shares = []
    for run, removed in found:
        row = {label: at for at, label in enumerate(layer_labels(run.stats))}
        gone = np.bincount([row[int(layer)] for layer, _ in removed.removable if int(layer) in row], minlength=len(row))
        shares.append((run, (100.0 * gone / run.stats.model.d_mlp).tolist()))
    curves = [
        (run, [(100.0 * p["n_removed"] / removed.n_neurons, float(p["ppl_increase_percent"])) for p in removed.curve])
        for run, removed in found
    ]
    p_percent = found[0][1].p_percent if found else 1.0
    return [
        _per_layer(shares, "removable neurons, %", "Removable neurons of each layer", "In percent of the layer."),
        _rises(
            curves,
            p_percent,
            "neurons removed, %",
            "Perplexity rise against neurons removed",
            f"Weakest first, in the order of each run's own ranking; the target is +{plain(p_percent)} %. Lower and "
            "further right is better.",
        ),
    ]


def _dead(runs: Sequence[_Run]) -> Markup:
    rows = []
    for run in runs:
        counts = classes.class_counts(classes.activity(run.stats, run.result))
        rows.append((run, (100.0 * counts.dead / run.stats.model.d_mlp).tolist()))
    seen = "; ".join(
        f"{run.letter}: {visible(classes.activity(run.stats, run.result).definition)}, "
        f"N = {count(run.stats.n_tokens)}, at most {classes.upper_bound(run.stats.n_tokens)} where none is seen"
        for run in runs
    )
    caption = f"In percent of the layer: active on under {target(100 * classes.DEAD)} of tokens. Active, {seen}."
    return _per_layer(rows, "dead neurons, %", "Dead neurons of each layer", caption, wide=True)


def _measured(runs: Sequence[_Run]) -> list[Markup]:
    shape = Markup('<div class="grid">{}</div>')
    parts = [folded(run.label, shape.format(Markup(measured(run.stats, run.result, run.removed)))) for run in runs]
    return [*parts, Markup(definitions())]
