"""Views of activation sparsity over training: the curve with its law, every layer, dead neurons, perplexity, gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from neuron_sparsity.laws import LawFit, fit_law
from neuron_sparsity.report._charts import Axis, Chart, linear_axis
from neuron_sparsity.report._fragments import figure, heat, note, pairs, table
from neuron_sparsity.report._text import count, interval, number, percent_of, plain, signed, target, visible

if TYPE_CHECKING:
    from neuron_sparsity.trajectory import TrajectoryPoint, TrajectoryResult

__all__ = [
    "dead_over_training",
    "fitted_law",
    "gap_table",
    "layers_over_training",
    "law_over_training",
    "perplexity_over_training",
    "ratio_over_training",
    "trajectory_measured",
    "trajectory_table",
]

_CURVE_POINTS = 120
_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, "single tokens"))
_EMPTY = "No checkpoint is measured at the common CETT yet: the run is not finished."


def fitted_law(result: TrajectoryResult) -> LawFit | str:
    """Return the law fitted to the points at the common CETT, or why there is none."""
    try:
        return fit_law(*result.curve())
    except ValueError as error:
        return str(error)


def ratio_over_training(result: TrajectoryResult, fit: LawFit | str) -> str:
    """Return activation ratio over training tokens, at the common and at each own CETT, with the law and its band."""
    points = [(point, point.at(result.cett)) for point in result.points]
    shown = [(point, at) for point, at in points if at is not None]
    if not shown:
        return note(_EMPTY)
    x = _token_axis([point.tokens for point, _ in shown])
    common = [(float(point.tokens), at.activation_ratio) for point, at in shown]
    own = [(float(point.tokens), point.own) for point in result.points if point.own and point.own.reached]
    heights = [y for _, y in common] + [found.activation_ratio for _, found in own]
    lines: list[tuple[Sequence[float], str]] = []
    places: list[float] = []
    if isinstance(fit, LawFit):
        trained = [tokens for tokens, _ in common if tokens > 0]
        places = np.linspace(min(trained), max(trained), _CURVE_POINTS).tolist()
        curve = fit.predict(places)
        drawn = ((curve.mean, "line"), (curve.low, "line thin dashed"), (curve.high, "line thin dashed"))
        # A band that is told badly would flatten everything else.
        lines = [(np.clip(values, min(heights) - 0.2, max(heights) + 0.2).tolist(), style) for values, style in drawn]
        heights += [y for values, _ in lines for y in values]
    title = f"Activation ratio over training tokens, {count(len(shown))} checkpoints"
    chart = Chart(x, linear_axis(heights, "activation ratio"), title, height=340.0)
    for values, style in lines:
        said = "fitted law" if style == "line" else "end of its 95 % band"
        chart.line(list(zip(places, values, strict=True)), style=style, note=said)
    for tokens, found in own:
        said = f"{count(int(tokens))} tokens: {number(found.activation_ratio)} at its own CETT {number(found.cett)}"
        chart.point(tokens, found.activation_ratio, said, style="dot kl", radius=2.4)
    for (tokens, ratio), (point, _) in zip(common, shown, strict=True):
        chart.point(tokens, ratio, f"{visible(point.checkpoint)}, {count(int(tokens))} tokens: {number(ratio)}")
    caption = f"Large blue points: all checkpoints at the common CETT {number(result.cett or 0.0)}."
    if isinstance(fit, LawFit):
        caption += f" Line: {fit.formula}, D in billions; dashed: its 95 % band."
    caption += f" Small orange points: each at its own {result.name}." if own else ""
    return figure("Activation ratio over training", chart.svg(), caption, wide=not isinstance(fit, LawFit))


def law_over_training(fit: LawFit | str) -> str:
    """Return the coefficients of the law with their intervals, or why there is none."""
    if isinstance(fit, str):
        return note(f"No law is fitted: {visible(fit)}.")
    rows = [
        [name, number(float(getattr(fit, name))), interval(low, high)] for name, (low, high) in fit.intervals.items()
    ]
    caption = f"{fit.law} law, {fit.formula}, D in billions of tokens; {count(fit.n_points)} points"
    body = table(["coefficient", "value", "95 % interval"], rows, caption=caption)
    remarks = " ".join((fit.choice, *fit.warnings))
    return figure("The fitted law", body, visible(remarks))


def layers_over_training(result: TrajectoryResult) -> str:
    """Return the activation ratio of every layer at every checkpoint, at the common CETT."""
    shown = [(point, at) for point in result.points if (at := point.at(result.cett)) is not None]
    if not shown:
        return note(_EMPTY)
    values = np.array([[layer.activation_ratio for layer in at.layers] for _, at in shown]).T
    low, high = float(values.min()), float(values.max())
    low, high = (low, high) if high > low else (0.0, 1.0)
    body = heat(
        values,
        row_labels=[layer.layer for layer in shown[0][1].layers],
        column="checkpoint",
        quantity="activation ratio",
        alt=f"Activation ratio of {values.shape[0]} layers at {values.shape[1]} checkpoints, {low:.3g} to {high:.3g}",
        low=low,
        high=high,
        names=[point.checkpoint for point, _ in shown],
    )
    said = "A column is a checkpoint, in the order of training, all at the common CETT."
    return figure("Activation ratio of each layer", body, said, wide=True)


def dead_over_training(result: TrajectoryResult) -> str:
    """Return the share of dead neurons over training tokens, at the common CETT."""
    shown = [
        (point, at.dead) for point in result.points if (at := point.at(result.cett)) is not None and at.dead is not None
    ]
    if not shown:
        return note("Dead neurons were not counted: no checkpoint was truncated at a CETT below 1.")
    first = shown[0][1]
    pairs_of = [(float(point.tokens), dead.dead_ratio) for point, dead in shown]
    title = f"Share of dead neurons over training tokens, {count(len(shown))} checkpoints"
    y = linear_axis([ratio for _, ratio in pairs_of], "dead neurons, share of all", zero=True)
    chart = Chart(_token_axis([tokens for tokens, _ in pairs_of]), y, title)
    chart.line(pairs_of, style="line thin")
    for (tokens, ratio), (point, dead) in zip(pairs_of, shown, strict=True):
        said = (
            f"{visible(point.checkpoint)}: {percent_of(ratio)} dead, {percent_of(dead.never_active_ratio)} never active"
        )
        chart.point(tokens, ratio, said)
    caption = (
        f"Dead: active, at the common CETT, on under {percent_of(first.dead_below)} of {count(first.n_tokens)} tokens. "
        f"A neuron that was never active is so on at most {percent_of(first.frequency_bound_95)} of tokens (95 %)"
    )
    short = first.frequency_bound_95 > first.dead_below
    caption += ": this text is too short to tell dead from rare." if short else "."
    return figure("Dead neurons", chart.svg(), caption)


def perplexity_over_training(result: TrajectoryResult) -> str:
    """Return the dense loss over training tokens."""
    points = [*result.points]
    if not points:
        return note(_EMPTY)
    found = [(float(point.tokens), float(np.log(point.ppl_dense))) for point in points]
    title = f"Dense loss over training tokens, {count(len(found))} checkpoints"
    y = linear_axis([loss for _, loss in found], "loss, nats a token")
    chart = Chart(_token_axis([tokens for tokens, _ in found]), y, title)
    chart.line(found, style="line thin")
    for (tokens, loss), point in zip(found, points, strict=True):
        said = f"{visible(point.checkpoint)}: loss {number(loss)}, perplexity {number(point.ppl_dense, 4)}"
        chart.point(tokens, loss, said)
    return figure("Loss", chart.svg(), "Mean next-token loss of the model as it is, on the measured text.")


def trajectory_table(result: TrajectoryResult) -> str:
    """Return every point in numbers, and what was measured but is no point yet."""
    header = [
        "checkpoint",
        "tokens",
        "activation ratio",
        "perplexity, dense",
        "rise",
        "dead",
        "own CETT",
        "own activation ratio",
    ]
    rows = [_row(point, result) for point in (*result.points, *result.pending)]
    at = "the common CETT, which is not found yet" if result.cett is None else f"the common CETT {number(result.cett)}"
    caption = f"Activation ratio, rise and dead neurons at {at}"
    return figure("Every checkpoint", table(header, rows, caption=caption), wide=True)


def _row(point: TrajectoryPoint, result: TrajectoryResult) -> list[str]:
    at, own = point.at(result.cett), point.own
    dead = None if at is None else at.dead
    return [
        visible(point.checkpoint),
        count(point.tokens),
        "not measured" if at is None else number(at.activation_ratio),
        number(point.ppl_dense, 4),
        "" if at is None else signed(at.ppl_increase_percent),
        "" if dead is None else percent_of(dead.dead_ratio),
        "" if own is None else number(own.cett) if own.reached else "not reached",
        "" if own is None or not own.reached else number(own.activation_ratio),
    ]


def gap_table(result: TrajectoryResult) -> str:
    """Return the checkpoints that are missing, and why."""
    if not result.gaps:
        return note("Every checkpoint could be loaded and measured.")
    rows = [[visible(gap.checkpoint), count(gap.tokens), visible(gap.error)] for gap in result.gaps]
    body = table(["checkpoint", "tokens", "reason"], rows, caption=f"{count(len(rows))} checkpoints are missing")
    return figure("Gaps", body, "They are in no curve and no fit. The same command tries them again.", wide=True)


def trajectory_measured(result: TrajectoryResult) -> str:
    """Return what the curve rests on: model, text, and how the common CETT came about."""
    model, corpus, common = result.model, result.corpus, result.common
    gated = "gated" if model.gated else "not gated"
    items = [
        ("Model", f"{model.n_layers} layers of {count(model.d_mlp)} neurons, {visible(model.activation)}, {gated}"),
        (
            "Text",
            f"{visible(corpus.get('name'))}: {count(int(corpus.get('n_tokens', 0)))} tokens in windows of "
            f"{count(int(corpus.get('window', 0)))}, sha256 {visible(str(corpus.get('sha256'))[:12])}",
        ),
        ("Target", f"perplexity {target(result.p_percent)} higher on average"),
    ]
    if common is not None and common.given:
        items.append(("Common CETT", f"{number(common.cett)}, given"))
    elif common is not None:
        names = ", ".join(visible(name) for name in common.checkpoints)
        reached = "" if common.reached else "; no CETT in [0, 1] costs as much"
        rise = signed(common.ppl_increase_percent or 0.0)
        items.append(("Common CETT", f"{number(common.cett)}: mean rise {rise} over {names}{reached}"))
    definition = (
        "CETT: error that the truncated tail makes in a layer's output, relative to the output, mean over tokens; one "
        "threshold a layer, from the checkpoint's own curves. Activation ratio: neurons kept over all neurons, in the "
        "truncated run, mean over tokens and layers (arXiv:2411.02335, Appendix E)."
    )
    return figure("Model, text and target", pairs(items), definition, wide=True)


def _token_axis(tokens: Sequence[float]) -> Axis:
    """Return an axis of training tokens, in the unit that keeps its numbers short."""
    largest = max(tokens, default=1.0)
    unit, name = next((unit, name) for unit, name in _UNITS if largest >= unit or unit == 1.0)
    axis = linear_axis([value / unit for value in tokens], f"training tokens, {name}")
    return Axis(
        lambda value: axis.place(value / unit), [tick * unit for tick in axis.ticks], axis.label, _written(unit)
    )


def _written(unit: float) -> Callable[[float], str]:
    return lambda value: plain(value / unit)
