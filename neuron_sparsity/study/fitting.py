"""From trajectories to findings: laws of every run, spread over seeds, width-depth ratio, scale, agreement on tokens.

What the data do not identify is said, not filled in: a law that cannot be fitted keeps its reason, and where the limit
of one run is not told, shape and scale are compared by the ratio at the end of the stable phase instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from neuron_sparsity.laws import fit_law, fit_scale, fit_width_depth
from neuron_sparsity.laws.result import limit_is_told
from neuron_sparsity.study.config import SERIES, RunPlan, StudyConfig
from neuron_sparsity.study.measuring import Patterns
from neuron_sparsity.study.result import Agreement, LawFound, Series, Spread, StudyPoint, StudyRun
from neuron_sparsity.trajectory import TrajectoryPoint, TrajectoryResult

__all__ = ["agreements", "frequency_edges", "law_found", "run_found", "series", "spreads"]

_CURVE_POINTS = 60
_MOST_PAIRS = 300
_MIN_COUNT = 8  # places of an entry of the vocabulary: its mean ratio says little with fewer
_BINS_PER_DECADE = 3


def run_found(
    run: RunPlan,
    config: StudyConfig,
    trajectory: TrajectoryResult,
    seen: Patterns | None,
    *,
    parameters: dict[str, int],
    losses: Sequence[dict[str, float]],
) -> StudyRun:
    """Return what one run has found, its laws included."""
    points = tuple(_point(point, trajectory.cett, config) for point in trajectory.points if point.tokens > 0)
    stable = [point for point in points if point.phase == "stable"]
    end = next((p.activation_ratio for p in reversed(stable) if p.step == config.training.stable_until), None)
    common = trajectory.common
    other = "silu" if run.activation == "relu" else "relu"
    edges = frequency_edges(config.text.measure_tokens)
    return StudyRun(
        name=run.name,
        model=run.model.name,
        activation=run.activation,
        seed=run.seed,
        shape={name: getattr(run.model, name) for name in ("n_layers", "d_model", "d_mlp", "n_heads")},
        series=run.model.series,
        parameters=parameters,
        points=points,
        gaps=tuple(vars(gap) for gap in trajectory.gaps),
        common={}
        if common is None
        else {
            "cett": common.cett,
            "ppl_increase_percent": common.ppl_increase_percent,
            "reached": common.reached,
            "converged": common.converged,
            "checkpoints": list(common.checkpoints),
        },
        laws=tuple(law_found(stable, law) for law in (run.activation, other)),
        end_ratio=end,
        half_tokens=_half_tokens(stable),
        frequency_shares=() if seen is None else _shares(seen, edges),
        losses=tuple(losses),
    )


def law_found(points: Sequence[StudyPoint], law: str) -> LawFound:
    """Return a law fitted to points, or why it cannot be."""
    tokens, ratios = [point.tokens for point in points], [point.activation_ratio for point in points]
    try:
        fit = fit_law(tokens, ratios, law)  # type: ignore[arg-type]
    except ValueError as error:
        return LawFound(law, None, str(error), told=False)
    places = np.geomspace(min(tokens), max(tokens), _CURVE_POINTS)
    curve = fit.predict(places)
    later, drop_first = None, len(points) // 4
    with suppress(ValueError):  # what is left is too little, or does not change in the direction of the law
        again = fit_law(tokens, ratios, law, drop_first=drop_first, compare=False)  # type: ignore[arg-type]
        later = {"drop_first": drop_first, "limit": again.limit, "limit_interval": list(again.limit_interval)}
    intervals = [fit.limit_interval, *([] if later is None else [again.limit_interval])]
    told = len(intervals) == 2 and all(limit_is_told(ends, float(np.ptp(ratios))) for ends in intervals)
    return LawFound(law, fit.to_json(), "", told, later, tuple(map(float, places)), tuple(map(float, curve.mean)))


def spreads(runs: Sequence[StudyRun]) -> tuple[Spread, ...]:
    """Return the spread over seeds, of every shape and activation function that has at least two."""
    found: list[Spread] = []
    for key in dict.fromkeys((run.model, run.activation) for run in runs):
        same = [run for run in runs if (run.model, run.activation) == key]
        last = [run.stable_end for run in same]
        for quantity in ("activation_ratio", "dead_ratio", "ppl_dense"):
            values = [getattr(point, quantity) for point in last if point is not None]
            known = [value for value in values if value is not None]
            if len(known) >= 2:
                found.append(Spread(*key, quantity, tuple(known), float(np.mean(known)), float(np.std(known, ddof=1))))
    return tuple(found)


def series(runs: Sequence[StudyRun]) -> tuple[Series, ...]:
    """Return how the limit depends on width-depth ratio and on scale, for each activation function."""
    found = []
    for kind, activation in itertools.product(SERIES, dict.fromkeys(run.activation for run in runs)):
        own = [run for run in runs if kind in run.series and run.activation == activation and run.end_ratio is not None]
        if not own:
            continue
        limits = [run.limit for run in own]
        told = all(limit is not None for limit in limits)
        y = [limit if told else run.end_ratio for limit, run in zip(limits, own, strict=True)]
        x = [run.width_depth_ratio if kind == "width_depth" else float(run.parameters["non_embedding"]) for run in own]
        fit, problem = None, ""
        try:
            fit = (fit_width_depth if kind == "width_depth" else fit_scale)(x, y).to_json()  # type: ignore[arg-type]
        except ValueError as error:
            problem = str(error)
        found.append(
            Series(
                kind,
                activation,
                "limit" if told else "end",
                tuple(run.name for run in own),
                tuple(x),
                tuple(float(value) for value in y if value is not None),
                tuple(run.half_tokens for run in own),
                fit,
                problem,
            )
        )
    return tuple(found)


def agreements(runs: Sequence[StudyRun], seen: Mapping[str, Patterns], tokenizer: Any) -> tuple[Agreement, ...]:
    """Return on which tokens models of several scales are active alike, and two seeds of one shape for comparison."""
    found: list[Agreement] = []
    for activation in dict.fromkeys(run.activation for run in runs):
        own = [run for run in runs if run.activation == activation and run.name in seen]
        scales = {run.parameters["non_embedding"]: run for run in reversed(own) if "scale" in run.series}
        ordered = [scales[size] for size in sorted(scales)]
        pairs = [("scale", *pair) for pair in itertools.combinations(ordered, 2)]
        for model in dict.fromkeys(run.model for run in own):
            pairs += [("seed", *pair) for pair in itertools.combinations([r for r in own if r.model == model], 2)]
        for kind, one, other in pairs:
            drawn = len(ordered) > 1 and (one, other) == (ordered[0], ordered[-1])
            found.append(_agreement(kind, one.name, other.name, seen, tokenizer if drawn else None))
    return tuple(found)


def frequency_edges(n_tokens: int) -> tuple[float, ...]:
    """Return the edges of the bins of activation frequency, from what one token in all is up to 1.

    Example:
        >>> [round(edge, 3) for edge in frequency_edges(100)]
        [0.01, 0.022, 0.046, 0.1, 0.215, 0.464, 1.0]
    """
    n = math.ceil(_BINS_PER_DECADE * math.log10(n_tokens) - 1e-9)
    return tuple(10 ** ((index - n) / _BINS_PER_DECADE) for index in range(n + 1))


def _point(point: TrajectoryPoint, cett: float | None, config: StudyConfig) -> StudyPoint:
    at, own = point.at(cett), point.own
    assert at is not None  # `points` of a result were measured at the common CETT
    step = round(point.tokens / config.tokens_per_step)
    reached = own is not None and own.reached
    return StudyPoint(
        step=step,
        tokens=point.tokens,
        phase=config.training.phase(step),
        activation_ratio=at.activation_ratio,
        own_activation_ratio=own.activation_ratio if reached and own else None,
        own_cett=own.cett if reached and own else None,
        ppl_dense=point.ppl_dense,
        ppl_increase_percent=at.ppl_increase_percent,
        dead_ratio=None if at.dead is None else at.dead.dead_ratio,
        layer_activation_ratios=tuple(layer.activation_ratio for layer in at.layers),
    )


def _half_tokens(points: Sequence[StudyPoint]) -> float | None:
    """Return the tokens at which half of the change from the first point to the last was made first."""
    if len(points) < 2:
        return None
    first, last = points[0].activation_ratio, points[-1].activation_ratio
    if first == last:
        return None
    done = [(point.activation_ratio - first) / (last - first) for point in points]
    for (one, before), (other, after) in itertools.pairwise(zip(points, done, strict=True)):
        if before < 0.5 <= after:
            x = math.log(one.tokens) + math.log(other.tokens / one.tokens) * (0.5 - before) / (after - before)
            return math.exp(x)
    return None


def _shares(seen: Patterns, edges: Sequence[float]) -> tuple[float, ...]:
    """Return the share of neurons that are never active, and in each bin of those that are."""
    frequency = seen.frequency.double().numpy().ravel()
    active = frequency[frequency > 0]
    # The lowest edge is that of one token in all, which rounding must not lose.
    counts, _ = np.histogram(active, bins=np.array([0.0, *edges[1:-1], 1.0 + 1e-9]))
    return tuple(float(count) / frequency.size for count in ((frequency == 0).sum(), *counts))


def _agreement(kind: str, first: str, second: str, seen: Mapping[str, Patterns], tokenizer: Any) -> Agreement:
    one, other = seen[first], seen[second]
    often = (one.token_count >= _MIN_COUNT) & (other.token_count >= _MIN_COUNT)
    ids = often.nonzero().flatten()
    x, y = one.token_ratio[ids].double().numpy(), other.token_ratio[ids].double().numpy()
    varied = len(ids) > 2 and x.std() > 0 and y.std() > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varied else None
    pairs = []
    if tokenizer is not None:
        most = one.token_count[ids].argsort(descending=True, stable=True)[:_MOST_PAIRS].tolist()
        pairs = [(tokenizer.decode([int(ids[place])]), float(x[place]), float(y[place])) for place in most]
    return Agreement(first, second, kind, correlation, len(ids), tuple(pairs))
