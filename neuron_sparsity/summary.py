"""The headline numbers of a run in plain lines, each with what it was measured on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.interval import Estimate
from neuron_sparsity.laws import LawFit
from neuron_sparsity.pareto import ParetoResult, RuleAnswer
from neuron_sparsity.search import search_name
from neuron_sparsity.sparsity import SparsityResult
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.wording import no_shorter, seen_by, times, unsettled

if TYPE_CHECKING:
    from neuron_sparsity.study import StudyResult
    from neuron_sparsity.trajectory import TrajectoryResult

__all__ = ["law_lines", "pareto_lines", "side_by_side", "study_lines", "summary_lines", "trajectory_lines"]


def law_lines(fit: LawFit, source: str) -> list[str]:
    """Return what a fit of a law found, one statement a line.

    Args:
        fit: The fit.
        source: Where the points are from.

    Returns:
        Lines without markup.
    """
    left_out = f", the first {fit.drop_first} left out" if fit.drop_first else ""
    lines = [f"{fit.law} law, {fit.formula}, D in billions of tokens; {fit.n_points} points of {source}{left_out}"]
    for name, (low, high) in fit.intervals.items():
        ends = " and ".join(fit.at_bound.get(name, ()))
        bound = f"; its {ends} end is a bound" if ends else ""
        lines.append(
            f"  {name:5} {getattr(fit, name):.4g}  ({100 * fit.level:g} % interval {low:.4g} to {high:.4g}{bound})"
        )
    lines.append(f"  MAE {fit.mae:.3g}, MSE {fit.mse:.3g}, R2 {fit.r2:.5f}; limit for unbounded data {fit.limit:.4g}")
    lines.append(f"  {fit.choice}")
    if fit.rivals:
        lines.append(
            f"rivals, with their error on the tokens after the first {100 * fit.holdout:.0f} %, fitted to those:"
        )
    for score in fit.rivals:
        heldout = "too few points" if score.heldout_mse is None else f"MSE {score.heldout_mse:.3g}"
        lines.append(f"  {score.law:12} MSE {score.mse:.3g}  held out {heldout}  {score.formula}")
    return lines + [f"note: {warning}" for warning in fit.warnings]


def pareto_lines(result: ParetoResult) -> list[str]:
    """Return what every rule needs, as a table in plain lines, and which rule needs fewest.

    Args:
        result: What was measured.

    Returns:
        Lines without markup.
    """
    corpus, asked = result.corpus, result.p_percents
    lines = [
        f"{result.model.name} on {corpus['name']}: {corpus['n_tokens']:,} tokens in windows of {corpus['window']}; "
        f"perplexity {result.ppl_dense:.3f} dense; {result.nonzero_ratio:.3f} of (token, neuron) pairs not exactly zero"
    ]
    for metric, name in (("ppl", "perplexity rises by"), ("kl", "KL divergence is, as a rise of perplexity,")):
        lines.append(f"activation ratio at which {name}")
        lines.append(f"  {'rule':16}" + "".join(f"{f'{p:g} %':24}" for p in asked).rstrip())
        for curve in result.curves:
            cells = [_needed(answer) for answer in curve.answers if answer.metric == metric]
            if curve.rule == "zeros":
                cells = [
                    f"{curve.points[0].activation_ratio:.3f}, perplexity {curve.points[0].ppl_increase_percent:+.3f} %"
                ]
            lines.append(f"  {curve.label:16}" + "".join(f"{cell:24}" for cell in cells).rstrip())
        dominant = result.dominant(metric)
        for verdict in result.verdicts:
            if verdict.metric != metric or verdict.first is None:
                continue
            unclear = verdict.not_apart
            if unclear is None:
                told = f"{corpus['n_windows']} windows are too few to tell it from others"
            else:
                told = f"not told by this text from {', '.join(unclear)}" if unclear else "told from every other"
            lines.append(f"  fewest at {verdict.p_percent:g} %: {verdict.first}; {told}")
        lines.append(f"  dominates at every p: {dominant or 'no rule that this text tells from all others'}")
    made, cuts = result.cost["forward_passes"], result.cost["cuts"]
    lines.append(f"cost: {made:.1f} forward passes, {cuts:g} different cuts")
    return lines


def _needed(answer: RuleAnswer) -> str:
    if answer.activation_ratio is None:
        return "not reached"
    if answer.low is None or answer.high is None:
        return f"{answer.activation_ratio:.3f}"
    return f"{answer.activation_ratio:.3f} ({answer.low:.3f} to {answer.high:.3f})"


def summary_lines(
    result: SparsityResult | None, stats: NeuronStatistics | None, removed: AblationResult | None
) -> list[str]:
    """Return what a run found, one statement a line.

    Args:
        result: How sparse, or None.
        stats: The recording, or None.
        removed: What can go, or None.

    Returns:
        Lines without markup.
    """
    lines = []
    first = result or stats or removed
    if first is not None:
        corpus = first.corpus
        lines.append(
            f"{first.model.name} on {corpus['name']}: {corpus['n_tokens']:,} tokens in windows of {corpus['window']}"
        )
    if result is not None:
        lines += _sparsity_lines(result)
    if stats is not None:
        lines += _neuron_lines(stats, thresholds=result is None or result.reached)
    if removed is not None:
        lines += _removal_lines(removed)
    if result is not None and removed is not None:
        lines += side_by_side(result, removed)
    return lines


def side_by_side(result: SparsityResult, removed: AblationResult) -> list[str]:
    """Return how many neurons idle token by token and how many can go for good, in one line, if both are known."""
    if not result.reached:
        return []
    idle, gone = result.sparsity_ratio, removed.n_removable / removed.n_neurons
    return [
        f"side by side: on an average token {100 * idle:.1f} % of the neurons can idle at {result.name} "
        f"({result.corpus['n_tokens']:,} tokens), for good {100 * gone:.2f} % can go at {removed.p_percent:g} %"
    ]


def _sparsity_lines(result: SparsityResult) -> list[str]:
    if not result.reached:
        by = "perplexity rises by" if result.metric == "cett_ppl" else "the KL divergence is"
        value = result.ppl_increase_percent if result.metric == "cett_ppl" else 100 * math.expm1(result.kl or 0.0)
        return [f"{result.name} is not reached: with every neuron cut (CETT 1) {by} only {value:.2f} %"]
    lines = [
        f"{result.name}: activation ratio {result.activation_ratio:.3f} (sparsity ratio {result.sparsity_ratio:.3f}) "
        f"at CETT {result.cett:.4f}",
        f"perplexity {result.ppl_dense:.3f} dense, {result.ppl_sparse:.3f} truncated "
        f"({result.ppl_increase_percent:+.3f} %, measured)",
    ]
    lines += [_estimate_line(result.p_percent, found) for found in result.estimates]
    if result.calibration is not None:
        lines.append(
            f"thresholds from other text: {result.calibration['name']}, {result.calibration['n_tokens']:,} tokens"
        )
    if not result.converged:
        lines.append(
            f"the measured rise is more than {result.tolerance_percent:g} points from {result.p_percent:g} %: "
            "it jitters by rounding; more tokens make it steadier"
        )
    return lines


def _estimate_line(p_percent: float, found: Estimate) -> str:
    line = f"  {search_name(found.metric, p_percent)} by all passes: "
    line += f"activation ratio {found.activation_ratio:.3f} at CETT {found.cett:.4f}"
    if found.low is None:
        return f"{line}; {found.n_windows} windows are too few for an interval"
    return (
        f"{line}; 95 % interval {found.low:.3f} to {found.high:.3f} ({found.n_windows} windows; "
        f"{found.tokens_to_halve:,} tokens would halve it)"
    )


def _neuron_lines(stats: NeuronStatistics, *, thresholds: bool) -> list[str]:
    """Dead neurons under the first recorded thresholds, unless those cut everything, and neurons that are never on."""
    n_neurons, n_tokens = stats.zero_count.numel(), stats.n_tokens
    bound = f" (95 % upper bound of their frequency: {3 / n_tokens:.1e})"
    lines = []
    if stats.threshold_names and thresholds:
        frequency = stats.activation_frequency(0)
        dead, never = int((frequency < 0.001).sum()), int((frequency == 0).sum())
        lines.append(
            f"dead under {stats.threshold_names[0]} (active on less than 0.1 % of {n_tokens:,} tokens): "
            f"{dead:,} of {n_neurons:,} neurons; never active: {never:,}{bound if never else ''}"
        )
    silent = int((stats.zero_count == n_tokens).sum())
    lines.append(
        f"exactly zero on all {n_tokens:,} tokens: {silent:,} of {n_neurons:,} neurons{bound if silent else ''}"
    )
    return lines


def _removal_lines(removed: AblationResult) -> list[str]:
    within = " within layers" if removed.scope == "layer" else ""
    lines = [
        f"removable for good at {removed.p_percent:g} % ({removed.ranking}{within}, {removed.replacement} replacement"
        f"{_ranked_on(removed)}): "
        f"{removed.n_removable:,} of {removed.n_neurons:,} neurons ({removed.ppl_increase_percent:+.3f} %, "
        f"{removed.corpus['n_tokens']:,} tokens)"
    ]
    if not removed.reached:
        lines.append(f"  {removed.p_percent:g} % is not reached: no set that was tried costs more")
    elif removed.n_removable == 0 and removed.resolved:
        lines.append("  already the weakest neuron of this ranking costs more")
    if not removed.resolved:
        lines.append(f"  {unsettled(removed)}")
    if removed.control is not None:
        lines.append(_control_line(removed.control))
    elif removed.n_removable:
        lines.append("  no control: nothing is known of what as many random neurons cost")
    if removed.heldout is not None:
        lines += _heldout_lines(removed.heldout)
    return lines


def _ranked_on(removed: AblationResult) -> str:
    """Where the ranking is from: its own text flatters it."""
    corpus = removed.ranking_corpus
    if corpus.get("unseen_in_search"):
        return f", ranked on {corpus['n_tokens']:,} other tokens"
    return ", ranked on the same text" if corpus["sha256"] == removed.corpus["sha256"] else ""


def _control_line(control: dict[str, Any]) -> str:
    line = f"  control, as many random neurons of every layer: {control['ppl_increase_percent']:+.3f} %"
    if "seeds" not in control:  # of the first version
        return line
    seeds, spread = control["seeds"], control["sd_percent"]
    line += f" (mean of {len(seeds)} seeds, sd {spread:.3f}" if spread is not None else " (1 seed"
    line += f"; {control['n_tokens']:,} tokens)"
    return line if control["ratio"] is None else f"{line}, {times(control)} the damage of this ranking"


def _heldout_lines(heldout: dict[str, Any]) -> list[str]:
    verdict = heldout.get("verdict", "holds" if heldout["holds"] else "does not hold")
    if seen_by(heldout):
        verdict += f", but {seen_by(heldout)} this text"
    if heldout.get("chosen_on"):
        verdict += ", but was chosen on it"
    line = f"  on {heldout['corpus']['n_tokens']:,} held-out tokens: {heldout['ppl_increase_percent']:+.3f} %"
    interval = heldout.get("interval")
    if interval:
        line += f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f} %"
    lines = [f"{line}, {verdict}"]
    holding = heldout.get("holding")
    if holding:
        upper = f", at most {holding['interval'][1]:+.3f} %" if holding["interval"] else ""
        lines.append(
            f"  the {holding['n_removable']:,} weakest hold there ({holding['ppl_increase_percent']:+.3f} %{upper}), "
            "chosen on that text"
        )
    elif no_shorter(heldout):
        lines.append(f"  {no_shorter(heldout)}")
    return lines


def trajectory_lines(result: TrajectoryResult) -> list[str]:
    """Return activation sparsity over training, one checkpoint a line, and what is missing.

    Args:
        result: What was measured, finished or not.

    Returns:
        Lines without markup.
    """
    model, corpus, common = result.model, result.corpus, result.common
    lines = [
        f"{len(result.points)} checkpoints of {model.n_layers} x {model.d_mlp} neurons ({model.activation}) on "
        f"{corpus['name']}, {corpus['n_tokens']:,} tokens in windows of {corpus['window']}"
    ]
    if common is None:
        lines.append("the common CETT is not known yet; the same `track` goes on")
    elif common.given:
        lines.append(f"common CETT {common.cett:.4f}, given")
    else:
        found = f"{common.ppl_increase_percent:+.3f} % on average over {len(common.checkpoints)} checkpoints"
        reached = "" if common.reached else f"; {result.p_percent:g} % is not reached by any CETT"
        lines.append(f"common CETT {common.cett:.4f}: {found} ({', '.join(common.checkpoints)}){reached}")
    for point in result.points:
        at, own = point.at(result.cett), point.own
        if at is None:
            continue
        dead = "" if at.dead is None else f", dead {at.dead.dead_ratio:.4f}"
        alone = f"; {result.name} by itself: " if own is not None else ""
        if own is not None:
            alone += f"{own.activation_ratio:.4f} at CETT {own.cett:.4f}" if own.reached else "not reached"
        lines.append(
            f"  {point.checkpoint}, {point.tokens:,} tokens: activation ratio {at.activation_ratio:.4f} "
            f"({at.ppl_increase_percent:+.3f} %), perplexity {point.ppl_dense:.3f}{dead}{alone}"
        )
    lines += [f"gap: {gap.checkpoint}, {gap.tokens:,} tokens: {gap.error}" for gap in result.gaps]
    counted = next((at.dead for point in result.points if (at := point.at(result.cett)) and at.dead), None)
    if counted is not None:
        lines.append(
            f"dead: active on less than {100 * counted.dead_below:g} % of {counted.n_tokens:,} tokens at the common "
            f"CETT (95 % upper bound of the frequency of one never active: {counted.frequency_bound_95:.1e})"
        )
    return lines


def study_lines(result: StudyResult) -> list[str]:
    """Return what a study found, one statement a line.

    Args:
        result: What was found, finished or not.

    Returns:
        Lines without markup.
    """
    text = result.text
    lines = [
        f"{result.config['name']}: {len(result.runs)} of {len(result.runs) + len(result.missing)} runs, trained on "
        f"{text['train_tokens']:,} tokens of {text['source']}, measured on {text['heldout']['n_tokens']:,} held out"
    ]
    for run in result.runs:
        own = run.laws[0]
        limit = f"limit {own.fit['limit']:.4f}" if own.fit else "no law"
        told = "" if own.told or own.fit is None else ", which the data do not identify"
        end = "n/a" if run.end_ratio is None else f"{run.end_ratio:.4f}"
        lines.append(f"  {run.name:<16} activation ratio {end} at the end of the stable phase; {limit}{told}")
    for spread in result.spreads:
        lines.append(
            f"{spread.model} {spread.activation}: {spread.quantity} {spread.mean:.4g} +- {spread.deviation:.2g} over "
            f"{len(spread.values)} seeds"
        )
    return lines
