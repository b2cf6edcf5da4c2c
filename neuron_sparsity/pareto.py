"""Perplexity against activation ratio under every rule of activation sparsity, by one and the same perplexity code.

1. The dense model: an eighth of the windows, then all (`rule_passes`).
2. Every rule on every score (`rules`) over a grid of activation ratios: all layers cut at once, one pass a point.
3. For every p, a root search in the logarithm of the rule's strength, until a pass is within a tenth of p.
4. The activation ratio each rule needs at each p, with a paired bootstrap over windows, and which rules the text tells
   apart (`frontier`).

This is Figure 3 of *Sparsing Law* (arXiv:2411.02335) in kind, for any model. Rules that come to the same cut share its
pass: all of them share the one in which every neuron is cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuron_sparsity import kernels
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.cett_search import METRICS, Metric
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.frontier import Verdict, compare, crossings, interval
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.rule_passes import RulePass, RulePasses
from neuron_sparsity.rules import DenseScores, Rule, parse_rules
from neuron_sparsity.search import next_cett
from neuron_sparsity.store import provenance
from neuron_sparsity.typed import percents

__all__ = ["ParetoPoint", "ParetoResult", "RuleAnswer", "RuleCurve", "Verdict", "pareto"]

TOLERANCE = 0.1  # of p: interpolation between passes does the rest
_MAX_PASSES = 6  # around one p


@dataclass(frozen=True)
class ParetoPoint:
    """One measured pass.

    Attributes:
        parameter: Of the rule, in its own unit.
        activation_ratio: Share of (token, neuron) pairs active in that pass, mean over layers.
        ppl: Perplexity.
        ppl_increase_percent: `100 * (ppl / ppl_dense - 1)`.
        kl: Mean KL divergence from the dense model, in nats a token.
    """

    parameter: float
    activation_ratio: float
    ppl: float
    ppl_increase_percent: float
    kl: float


@dataclass(frozen=True)
class RuleAnswer:
    """What a rule needs at one p.

    Attributes:
        metric: `"ppl"`; or `"kl"`, where the mean KL divergence is log(1 + p/100): the same text tells it more exactly.
        p_percent: Rise of perplexity, or of what the KL divergence would be as one.
        reached: Whether some parameter costs as much. If not, every neuron may be cut by this rule; `zeros` has none.
        activation_ratio: At which it is p percent, interpolated between passes; None if not reached.
        low: Lower end of its 95 % interval, for text like this; None with fewer than 5 windows.
        high: Upper end.
        parameter: Of the pass nearest to p.
        measured_percent: Rise of the metric in that pass.
        converged: Whether that is within a tenth of p. Passes are made for perplexity, and Top-k has few.
    """

    metric: str
    p_percent: float
    reached: bool
    activation_ratio: float | None
    low: float | None
    high: float | None
    parameter: float | None
    measured_percent: float | None
    converged: bool


@dataclass(frozen=True)
class RuleCurve:
    """One rule on one score.

    Attributes:
        rule: A key of `rules.RULES`.
        score: `"s"` or `"contribution"`.
        label: Both, for people.
        parameter_name: What the parameter of its points is.
        points: Every pass, most active neurons first; the last cuts every neuron.
        answers: One for each p by perplexity, then one for each p by KL divergence.
    """

    rule: str
    score: str
    label: str
    parameter_name: str
    points: tuple[ParetoPoint, ...]
    answers: tuple[RuleAnswer, ...]


@dataclass(frozen=True)
class ParetoResult:
    """Perplexity against activation ratio under every rule, on one text.

    Attributes:
        p_percents: Rises of perplexity that were asked for.
        ppl_dense: Perplexity of the model as it is.
        nonzero_ratio: Share of (token, neuron) pairs whose post-activation is not exactly zero in the dense run.
        curves: One a rule and score.
        verdicts: As the answers of a curve: who needs fewest, and which differences the text tells.
        n_points: Points of each curve's grid, without those of the searches.
        model: What was measured.
        corpus: On what.
        cost: `forward_passes` over the corpus that were made, `cuts` that were measured, `taken_up` of them from an
            earlier run, `seconds`.
        provenance: Versions, seed, command, what ran, and what `s` is.
    """

    p_percents: tuple[float, ...]
    ppl_dense: float
    nonzero_ratio: float
    curves: tuple[RuleCurve, ...]
    verdicts: tuple[Verdict, ...]
    n_points: int
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]

    def dominant(self, metric: str = "ppl") -> str | None:
        """Return the rule that needs fewest at every p, told from every other at each; None if none does."""
        verdicts = [verdict for verdict in self.verdicts if verdict.metric == metric]
        firsts = {verdict.first for verdict in verdicts}
        return firsts.pop() if len(firsts) == 1 and all(verdict.first_alone for verdict in verdicts) else None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `pareto.json`."""
        curves = [
            vars(curve) | {"points": [vars(p) for p in curve.points], "answers": [vars(a) for a in curve.answers]}
            for curve in self.curves
        ]
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {
            "p_percents": list(self.p_percents),
            "curves": curves,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "dominant": {metric: self.dominant(metric) for metric in METRICS},
            "model": self.model.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ParetoResult:
        """Read the content of `pareto.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        curves = [
            RuleCurve(
                **{key: curve[key] for key in ("rule", "score", "label", "parameter_name")},
                points=tuple(ParetoPoint(**_taken(ParetoPoint, point)) for point in curve["points"]),
                answers=tuple(RuleAnswer(**_taken(RuleAnswer, answer)) for answer in curve["answers"]),
            )
            for curve in data["curves"]
        ]
        return cls(
            **_taken(cls, data)
            | {
                "p_percents": tuple(data["p_percents"]),
                "curves": tuple(curves),
                "verdicts": tuple(Verdict.from_json(verdict) for verdict in data["verdicts"]),
                "model": ModelInfo.from_json(data["model"]),
            }
        )


def _taken(kind: Any, data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in kind.__dataclass_fields__}


def pareto(
    model: Any,
    windows: Windows,
    *,
    rules: Sequence[str] = (),
    p_percents: Sequence[float] = (1.0, 5.0, 10.0),
    n_points: int = 6,
    folder: str | Path | None = None,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ParetoResult:
    """Return perplexity against activation ratio under each rule, and what each needs at each p.

    Thresholds come from the dense run on the same text; Top-k and Top-p choose token by token in the running model.
    A neuron counts as active where its rule keeps it and its post-activation is not exactly zero, in the cut run.

    Args:
        model: TransformerLens model or adapter.
        windows: Text that everything is measured on.
        rules: Such as `"cett"`, `"topk"` (on both scores), `"fat:s"`, `"topp:c"`; all rules on both scores if none.
        p_percents: Rises of perplexity, each > 0.
        n_points: Passes of each curve at activation ratios evenly apart, before the searches; at least 1.
        folder: Folder to keep every pass in as it is made, and to take up those that an interrupted run left there.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The result. Where no parameter of a rule costs p percent, its answer says so.

    Raises:
        ValueError: If a rule is unknown or named twice, a p is not a positive number, or `n_points` is below 1.
        ModelError: If a rule asks for the activation function's own output and it cannot be had.
        MeasurementError: If activations or losses are NaN, or memory runs out.
    """
    chosen = parse_rules([rules] if isinstance(rules, str) else rules)
    asked = tuple(sorted(set(percents(p_percents))))
    if n_points < 1:
        raise ValueError(f"n_points must be at least 1, got {n_points}")
    start = time.perf_counter()
    passes = RulePasses(
        measurable(model, windows),
        windows,
        sorted({rule.score for rule in chosen}),
        folder=None if folder is None else Path(folder),
        backend=backend,
        batch_size=batch_size,
        progress=progress,
    )
    dense = passes.dense()
    searches = [_RuleSearch(passes, rule, dense) for rule in chosen]
    for search in searches:
        search.sweep(n_points)
    for search in searches:
        for p_percent in asked:
            search.seek(p_percent)
    return _result(passes, dense, searches, asked, n_points, time.perf_counter() - start)


class _RuleSearch:
    """The passes of one rule, by strength."""

    def __init__(self, passes: RulePasses, rule: Rule, dense: DenseScores) -> None:
        self.passes, self.rule, self.dense = passes, rule, dense
        self.found: dict[float, tuple[float, RulePass]] = {}

    def measure(self, strength: float) -> bool:
        """Make the pass at a strength; return whether it is a new one (Top-k has no more than d_mlp)."""
        parameter = self.rule.parameter_at(strength, self.dense)
        strength = 1.0 if strength >= 1 else self.rule.strength_of(parameter, self.dense)
        if strength in self.found or strength <= 0:
            return False
        label = f"{self.rule.label}, {self.rule.parameter_name} {parameter:.4g}" if strength < 1 else "every neuron cut"
        made = self.passes.measure(self.rule.cut(parameter, self.dense, self.passes.backend), label)
        self.found[strength] = parameter, made
        return True

    def sweep(self, n_points: int) -> None:
        """Measure at activation ratios evenly apart, from all neurons that are not zero down to none."""
        if self.rule.name == "zeros":
            cut = self.rule.cut(0.0, self.dense, self.passes.backend)
            self.found[0.0] = 0.0, self.passes.measure(cut, self.rule.label)
            return
        for share in np.arange(n_points, 0, -1) / (n_points + 1):
            self.measure(self.rule.strength_at(float(share) * self.dense.nonzero_ratio, self.dense))
        self.measure(1.0)

    def seek(self, p_percent: float) -> None:
        """Measure until a pass is close to p, if p can be reached."""
        target = math.log1p(p_percent / 100)
        for _ in range(_MAX_PASSES):
            points = [(strength, made.mean("ppl")) for strength, (_, made) in self.found.items() if strength > 0]
            if not points or max(rise for _, rise in points) < target:
                return
            if any(_is_close(rise, p_percent) for _, rise in points):
                return
            if not self.measure(next_cett(points, target, prior_slope=_slope(points, target))):
                return

    def passes_in_order(self) -> list[RulePass]:
        """From the dense model on, stronger and stronger."""
        return [self.passes.untouched, *(made for _, (_, made) in sorted(self.found.items(), key=lambda pair: pair[0]))]

    def answer(self, metric: Metric, p_percent: float, ratio: float, draws: Any) -> RuleAnswer:
        """Return what the rule needs at p, from the ratio that `frontier` read off its passes."""
        if math.isnan(ratio):
            return RuleAnswer(metric, p_percent, False, None, None, None, None, None, False)
        target = math.log1p(p_percent / 100)
        nearest = min(self.found.values(), key=lambda pair: abs(pair[1].mean(metric) - target))
        low, high = (None, None) if draws is None else interval(draws, self.passes.windows.n_windows)
        rise = nearest[1].mean(metric)
        close = _is_close(rise, p_percent)
        return RuleAnswer(metric, p_percent, True, ratio, low, high, nearest[0], _percent(rise), close)

    def curve(self, answers: Sequence[RuleAnswer]) -> RuleCurve:
        """Return all of it."""
        dense_loss = self.passes.loss
        points = [
            ParetoPoint(
                parameter,
                made.activation_ratio,
                math.exp(min(dense_loss + made.mean("ppl"), 500.0)),
                _percent(made.mean("ppl")),
                made.mean("kl"),
            )
            for _, (parameter, made) in sorted(self.found.items(), key=lambda pair: pair[0])
        ]
        rule = self.rule
        return RuleCurve(rule.name, rule.score, rule.label, rule.parameter_name, tuple(points), tuple(answers))


def _percent(rise: float) -> float:
    return 100 * math.expm1(min(rise, 500.0))


def _is_close(rise: float, p_percent: float) -> bool:
    return abs(_percent(rise) - p_percent) <= TOLERANCE * p_percent


def _slope(points: Sequence[tuple[float, float]], target: float) -> float:
    """Slope of log(rise) over log(strength) between the nearest points around the target; 2 if there are none.

    Rules differ in it: a quantile near one costs steeply.
    """
    below = [point for point in points if 0 < point[1] < target]
    above = [point for point in points if point[1] >= target and point[0] < 1]
    if not below or not above:
        return 2.0
    (x0, y0), (x1, y1) = max(below, key=lambda p: p[1]), min(above, key=lambda p: p[1])
    return float(np.clip(math.log(y1 / y0) / math.log(x1 / x0), 0.3, 300.0)) if x1 > x0 else 2.0


def _result(
    passes: RulePasses,
    dense: DenseScores,
    searches: Sequence[_RuleSearch],
    asked: tuple[float, ...],
    n_points: int,
    seconds: float,
) -> ParetoResult:
    answers: list[list[RuleAnswer]] = [[] for _ in searches]
    verdicts: list[Verdict] = []
    for metric in METRICS:
        in_order = [search.passes_in_order() for search in searches]
        ratios, draws = crossings(in_order, [math.log1p(p / 100) for p in asked], metric)
        for column, p in enumerate(asked):
            at_p = None if draws is None else draws[:, :, column]
            for index, search in enumerate(searches):
                drawn = None if at_p is None else at_p[:, index]
                answers[index].append(search.answer(metric, p, float(ratios[index, column]), drawn))
            labels = [search.rule.label for search in searches]
            verdicts.append(compare(labels, metric, p, ratios[:, column], at_p, passes.windows.n_windows))
    source = {} if passes.reader is None else {"s": passes.reader.source}
    used = dict.fromkeys(("tail_error", "threshold_mask", "contribution_topk"), " + ".join(passes.backends))
    return ParetoResult(
        p_percents=asked,
        ppl_dense=math.exp(passes.loss),
        nonzero_ratio=dense.nonzero_ratio,
        curves=tuple(search.curve(found) for search, found in zip(searches, answers, strict=True)),
        verdicts=tuple(verdicts),
        n_points=n_points,
        model=passes.adapter.info,
        corpus=passes.windows.describe(),
        cost={
            "forward_passes": passes.forward_passes,
            "cuts": passes.n_cuts,
            "taken_up": passes.taken_up,
            "seconds": seconds,
        },
        provenance=provenance() | {"forward": passes.adapter.forward, "backends": used} | source,
    )
