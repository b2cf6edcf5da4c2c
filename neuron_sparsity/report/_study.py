"""Views of a study over training: both laws, spread over seeds, dead neurons, loss, every run in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from neuron_sparsity.report._charts import Axis, Chart, linear_axis, log_axis
from neuron_sparsity.report._fragments import figure, note, pairs, table
from neuron_sparsity.report._text import count, interval, join, number, percent_of, plain, signed, target, visible

if TYPE_CHECKING:
    from neuron_sparsity.study import LawFound, StudyPoint, StudyResult, StudyRun

__all__ = [
    "COLOURS",
    "dead_over_data",
    "gap_table",
    "how_made",
    "key",
    "law_table",
    "loss_over_data",
    "ratio_over_data",
    "run_table",
    "spread_table",
    "verdict",
]

COLOURS = 8  # of the style sheet, told apart by colour-blind readers
_ACTIVATION_COLOUR = {"relu": 0, "silu": 1}
_SAID = {"activation_ratio": "activation ratio", "dead_ratio": "dead neurons, share of all", "ppl_dense": "perplexity"}


def verdict(result: StudyResult) -> str:
    """Return in words what the laws tell, and what they do not."""
    said = []
    for activation in dict.fromkeys(run.activation for run in result.runs):
        own = [run for run in result.runs if run.activation == activation]
        fitted = [run for run in own if run.laws[0].fit is not None]
        told = [run for run in own if run.laws[0].told]
        better = [run for run in own if _error(run.laws[0]) <= _error(run.laws[1]) and run.laws[0].fit is not None]
        said.append(
            f"{visible(activation)}: its law can be fitted to {len(fitted)} of {len(own)} runs, fits better than the "
            f"other law on {len(better)}, and the data identify its limit, with and without the first quarter of the "
            f"points, on {len(told)}."
        )
        if len(told) < len(own):
            said.append(
                f"For {visible(activation)}, limits of the other runs are not told by these data; where limits are "
                "compared below, the ratio at the end of the stable phase stands in their place."
            )
    return join(Markup("<p class=facts>{}</p>").format(line) for line in said) or note("No run is finished yet.")


def ratio_over_data(result: StudyResult, activation: str) -> str:
    """Return activation ratio over training tokens of the runs of one activation function, with both laws."""
    runs = _seeds_of(result, activation)
    points = [point for run in runs for point in run.points]
    if not points:
        return note(f"No checkpoint of a {visible(activation)} model is measured yet.")
    x = _tokens_axis([point.tokens for point in points])
    chart = Chart(
        x,
        linear_axis([point.activation_ratio for point in points], "activation ratio"),
        f"Activation ratio over training tokens, {visible(activation)}, {count(len(runs))} seeds",
        height=340.0,
    )
    for place, run in enumerate(runs):
        colour = f"var(--run-{place % COLOURS})"
        for law, style in zip(run.laws, ("line", "line thin dashed"), strict=False):
            said = f"seed {run.seed}: {law.law} law"
            chart.line(list(zip(law.places, law.mean, strict=True)), style=style, colour=colour, note=said)
        for point in run.points:
            chart.point(point.tokens, point.activation_ratio, _point_note(run, point), style=_dot(point, place))
    caption = (
        f"Model {visible(runs[0].model)}, a colour a seed, all at the common CETT of their run; rings: warm-up "
        "and decay, which no law is fitted to. Full lines: the law of this activation function; dashed: the other one, "
        "where it can be fitted at all."
    )
    body = Markup("{}{}").format(chart.svg(), key([(f"seed {run.seed}", place) for place, run in enumerate(runs)]))
    return figure(f"Over training: {visible(activation)}", body, caption, wide=True)


def law_table(result: StudyResult) -> str:
    """Return both laws of every run with their intervals, or why one cannot be fitted."""
    rows = []
    for run in result.runs:
        for law in run.laws:
            own = "own" if law.law == run.activation else "other"
            rows.append([visible(run.name), f"{visible(law.law)} ({own})", *_law_cells(law)])
    header = [
        "run",
        "law",
        "alpha",
        "c",
        "limit A_0",
        "without the first quarter",
        "identified",
        "R²",
        "RMSE",
        "remarks",
    ]
    caption = "Laws of the stable phase, D in billions of tokens, with 95 % profile intervals"
    return figure("Laws", table(header, rows, caption=caption), wide=True)


def spread_table(result: StudyResult) -> str:
    """Return how much seeds differ."""
    rows = [
        [
            f"{visible(one.model)} {visible(one.activation)}",
            _SAID.get(one.quantity, visible(one.quantity)),
            number(one.mean),
            number(one.deviation, 2),
            ", ".join(number(value) for value in one.values),
        ]
        for one in result.spreads
    ]
    if not rows:
        return note("No model was trained with more than one seed: how far seeds differ is not known.")
    caption = "At the end of the stable phase"
    header = ["model", "quantity", "mean", "standard deviation", "each seed"]
    return figure("Seeds", table(header, rows, caption=caption), wide=True)


def dead_over_data(result: StudyResult) -> str:
    """Return the share of dead neurons over training tokens."""
    n_tokens = result.text["heldout"]["n_tokens"]
    bound = 3 / n_tokens
    caption = (
        f"Dead: active, at the common CETT, on under 0.1 % of {count(n_tokens)} tokens. A neuron that was never active "
        f"is so on at most {percent_of(bound)} of tokens (95 %)."
    )
    return _over_data(result, "Dead neurons", "dead neurons, share of all", lambda p: p.dead_ratio, caption, zero=True)


def loss_over_data(result: StudyResult) -> str:
    """Return the dense loss over training tokens."""
    return _over_data(
        result,
        "Loss",
        "loss, nats a token",
        lambda point: math.log(point.ppl_dense),
        "Mean next-token loss of the models as they are, on the held-out text.",
    )


def run_table(result: StudyResult) -> str:
    """Return every run at the end of its stable phase."""
    rows = []
    for run in result.runs:
        last = run.stable_end
        shape = f"{run.shape['n_layers']} x {run.shape['d_model']} x {run.shape['d_mlp']}"
        cells = ["not measured"] * 5 if last is None else _end_cells(run, last)
        rows.append([visible(run.name), shape, count(run.parameters["non_embedding"]), *cells])
    header = ["run", "layers x d_model x d_mlp", "parameters", "activation ratio", "own", "rise", "perplexity", "dead"]
    caption = (
        "Parameters without embeddings; activation ratio, rise of perplexity and dead neurons at the common CETT of "
        "the run, at the end of the stable phase; own: at the checkpoint's own CETT"
    )
    return figure("Every run", table(header, rows, caption=caption), wide=True)


def gap_table(result: StudyResult) -> str:
    """Return what is missing, and why."""
    rows = [
        [visible(run.name), visible(gap["checkpoint"]), visible(gap["error"])]
        for run in result.runs
        for gap in run.gaps
    ]
    rows += [[visible(name), "", "not finished; the same command goes on"] for name in result.missing]
    if not rows:
        return note("Every run is finished, and every checkpoint could be measured.")
    caption = f"{count(len(rows))} missing"
    return figure("Gaps", table(["run", "checkpoint", "reason"], rows, caption=caption), wide=True)


def how_made(result: StudyResult) -> str:
    """Return what every number rests on: text, training, measurement, versions."""
    text, training, held = result.text, result.config["training"], result.text["heldout"]
    tokens = training["batch"] * result.config["text"]["window"]
    items = [
        (
            "Trained on",
            f"{visible(text['source'])}: {count(text['train_tokens'])} tokens of {count(text['train_documents'])} "
            f"documents, vocabulary {count(text['vocab'])}, sha256 {visible(str(text['train_sha256'])[:12])}",
        ),
        (
            "Measured on",
            f"{count(held['n_tokens'])} tokens of {count(text['heldout_documents'])} documents that were never trained "
            f"on, windows of {count(held['window'])}, sha256 {visible(str(held['sha256'])[:12])}",
        ),
        (
            "Training",
            f"{count(training['steps'])} steps of {count(tokens)} tokens, AdamW, learning rate "
            f"{plain(training['learning_rate'])}: warm-up {count(training['warmup_steps'])} steps, decay "
            f"{count(training['decay_steps'])}",
        ),
        ("Target", f"perplexity {target(result.config['p_percent'])} higher, on average over a run's last checkpoints"),
        ("Versions", visible(", ".join(f"{k} {v}" for k, v in result.provenance.get("versions", {}).items()))),
    ]
    definition = (
        "One CETT for all checkpoints of a run, searched on its last five; activation ratio: neurons kept over all, in "
        "the truncated run, mean over tokens and layers (arXiv:2411.02335, Appendix E). Laws are fitted to the stable "
        "phase alone."
    )
    return figure("How it was made", pairs(items), definition, wide=True)


def key(names: Sequence[tuple[str, int]]) -> Markup:
    """Return what the colours of a chart mean."""
    shape = Markup(
        '<span class="run-key"><svg width="14" height="10" aria-hidden="true"><circle cx="5" cy="5" r="4" '
        'style="fill:var(--run-{})"/></svg>{}</span>'
    )
    return Markup('<p class="legend runs">{}</p>').format(
        join((shape.format(place % COLOURS, visible(name)) for name, place in names), " ")
    )


def _seeds_of(result: StudyResult, activation: str) -> list[StudyRun]:
    """Return the runs of the model with the most seeds."""
    own = [run for run in result.runs if run.activation == activation]
    models = [run.model for run in own]
    return [run for run in own if run.model == max(models, key=models.count)]


def _over_data(
    result: StudyResult,
    title: str,
    label: str,
    value: Callable[[StudyPoint], float | None],
    caption: str,
    *,
    zero: bool = False,
) -> str:
    activations = list(dict.fromkeys(run.activation for run in result.runs))
    runs = [run for activation in activations for run in _seeds_of(result, activation)]
    found = [(run, point, y) for run in runs for point in run.points if (y := value(point)) is not None]
    if not found:
        return note(f"{title}: nothing was measured.")
    chart = Chart(
        _tokens_axis([point.tokens for _, point, _ in found]),
        linear_axis([y for _, _, y in found], label, zero=zero),
        f"{title} over training tokens, {count(len(runs))} runs",
    )
    for run in runs:
        place = _ACTIVATION_COLOUR.get(run.activation, 2)
        line = [(float(point.tokens), y) for other, point, y in found if other is run]
        chart.line(line, style="line thin", colour=f"var(--run-{place})")
        for x, y in line:
            chart.point(
                x, y, f"{visible(run.name)}, {count(x)} tokens: {number(y)}", style=f"dot run-{place}", radius=2
            )
    names = [(activation, _ACTIVATION_COLOUR.get(activation, 2)) for activation in activations]
    model = f"Model {visible(runs[0].model)}, a line a seed. "
    return figure(title, Markup("{}{}").format(chart.svg(), key(names)), model + caption)


def _tokens_axis(tokens: Sequence[float]) -> Axis:
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "single tokens"))
        if max(tokens) >= unit or unit == 1.0
    )
    axis = log_axis(min(tokens) / unit, max(tokens) / unit, f"training tokens, {name}")
    return Axis(
        lambda value: axis.place(value / unit),
        [tick * unit for tick in axis.ticks],
        axis.label,
        lambda value: plain(value / unit),
    )


def _dot(point: StudyPoint, place: int) -> str:
    return f"dot run-{place % COLOURS}" if point.phase == "stable" else "dot control"


def _point_note(run: StudyRun, point: StudyPoint) -> str:
    return (
        f"{visible(run.name)}, {count(point.tokens)} tokens ({visible(point.phase)}): "
        f"{number(point.activation_ratio)}, perplexity {number(point.ppl_dense, 4)}"
    )


def _error(law: LawFound) -> float:
    return math.inf if law.fit is None or law.fit.get("mse") is None else float(law.fit["mse"])


def _law_cells(law: LawFound) -> list[str]:
    if law.fit is None:
        return ["cannot be fitted", "", "", "", "", "", "", visible(law.problem)]
    fit = law.fit
    numbers = [f"{number(fit[name])} ({interval(*fit['intervals'][name])})" for name in ("alpha", "c", "A_0")]
    errors = [number(fit["r2"]), number(math.sqrt(fit["mse"]))]
    remarks = visible(" ".join(fit["warnings"]))
    later = "no fit"
    if law.later is not None:
        later = f"{number(law.later['limit'])} ({interval(*law.later['limit_interval'])})"
    return [*numbers, later, "yes" if law.told else "no", *errors, remarks]


def _end_cells(run: StudyRun, last: StudyPoint) -> list[str]:
    return [
        number(last.activation_ratio),
        "not reached" if last.own_activation_ratio is None else number(last.own_activation_ratio),
        signed(last.ppl_increase_percent),
        number(last.ppl_dense, 4),
        "" if last.dead_ratio is None else percent_of(last.dead_ratio),
    ]
