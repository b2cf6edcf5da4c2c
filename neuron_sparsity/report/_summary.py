"""The summary: the run in one sentence, and the headline cards, each with what its number was measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report._classes import array
from neuron_sparsity.report._fragments import card
from neuron_sparsity.report._text import count, join, number, percent_of, replacement, signed, target, visible
from neuron_sparsity.search import search_name
from neuron_sparsity.wording import no_shorter, seen_by, times, unsettled

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.interval import Estimate
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["control_line", "headline", "sentences", "summary"]

_DEAD = target(100 * classes.DEAD)


def _measured_on(model: Any, corpus: Mapping[str, Any], definition: str) -> str:
    tokens, window = corpus.get("n_tokens"), corpus.get("window")
    where = f"{visible(model.name)} on {visible(corpus.get('name', '?'))}"
    return f"{where}, {count(tokens)} tokens in windows of {count(window)}. {definition}"


def _n_neurons(stats: NeuronStatistics) -> int:
    return int(array(stats.zero_count).size)


def _rise(removed: AblationResult) -> float:
    return 100.0 * (removed.ppl_ablated / removed.ppl_dense - 1.0)


def _holds(removed: AblationResult) -> str:
    heldout = removed.heldout
    if not heldout:
        return "not checked on held-out text"
    rise = signed(heldout["ppl_increase_percent"])
    text = f"held-out text that {seen_by(heldout)}" if seen_by(heldout) else "held-out text"
    if heldout.get("interval"):
        rise += f", 95 % interval {signed(heldout['interval'][0])} to {signed(heldout['interval'][1])}"
    if heldout.get("holds"):
        return f"holds on {text} ({rise})"
    if heldout.get("verdict") == "not refuted" and not heldout.get("interval"):
        return f"is not refuted on {text}: {rise} there, without an interval"
    if heldout.get("verdict") == "not refuted":
        return f"is not refuted on {text}: {rise} there, around the target of {target(removed.p_percent)}"
    return f"does not hold on {text}: {rise} there, over the target of {target(removed.p_percent)}"


def control_line(control: Mapping[str, Any]) -> str:
    """Return what as many random neurons cost, beside what the ranking's cost on the same tokens."""
    said = f"As many random neurons of every layer: {signed(control['ppl_increase_percent'])}"
    if "seeds" not in control:  # of the first version
        return f"{said}."
    seeds = len(control["seeds"])
    said += f" (mean of {count(seeds)} seeds, standard deviation {number(control['sd_percent'])})" if seeds > 1 else ""
    said += f" on {count(control['n_tokens'])} tokens"
    if control["ratio"] is None:
        return f"{said}."
    return f"{said}: {times(control).replace('-', '−')} the damage of these."


def sentences(*said: str) -> list[str]:
    """Return those of the words that say something as sentences."""
    return [f"{words[0].upper()}{words[1:]}." for words in said if words]


def headline(
    stats: NeuronStatistics, result: SparsityResult | None = None, removed: AblationResult | None = None
) -> str:
    """Return the whole run in one plain sentence or two."""
    total, model = _n_neurons(stats), visible(stats.model.name)
    said = []
    if result is not None and result.reached:
        said.append(
            f"{model} needs {percent_of(result.activation_ratio)} of its MLP neurons on an average token"
            f"{_range(result)}: {_at(result)}. The other {percent_of(result.sparsity_ratio)} can idle."
        )
    elif result is not None:
        said.append(
            f"No truncation of {model} raises perplexity by {target(result.p_percent)}: the target was not reached, so "
            "there is no sparsity to report at it."
        )
    if removed is not None:
        more = "" if removed.resolved else ", perhaps more"
        held = f"; this {_holds(removed)}" if removed.heldout else ""
        said.append(f"{count(removed.n_removable)} of {count(total)} neurons can go for good{more}{held}.")
    active = classes.activity(stats, result)
    dead = int(classes.class_counts(active).dead.sum())
    said.append(f"{count(dead) if dead else 'None'} of {count(total)} neurons {'is' if dead == 1 else 'are'} dead.")
    return Markup('<p class="headline">{}</p>').format(" ".join(said))


def summary(
    stats: NeuronStatistics, result: SparsityResult | None = None, removed: AblationResult | None = None
) -> str:
    """Return the headline cards: sparsity, idle neurons beside removable ones, dead neurons."""
    cards = []
    if result is not None:
        cards += [_sparsity_card(result), _idle_card(result, _n_neurons(stats))]
    if removed is not None:
        cards.append(_removable_card(removed))
    cards.append(_dead_card(stats, result))
    return Markup('{}<div class="cards">{}</div>').format(headline(stats, result, removed), join(cards))


def _at(result: SparsityResult) -> str:
    """What the headline's ratio was measured at, beside what was asked for."""
    limit = target(result.p_percent)
    if result.metric == "cett_ppl":
        return f"perplexity then changes by {signed(result.ppl_increase_percent)} (target +{limit})"
    found = "" if result.kl is None else f", measured at {percent_of(math.expm1(min(result.kl, 50.0)))}"
    return f"the target is a KL divergence of {limit}{found}"


def _range(result: SparsityResult) -> str:
    """The interval of the metric that was asked for, in brackets."""
    own = next((found for found in result.estimates if found.metric == result.metric), None)
    if own is None or own.low is None:
        return ""
    return f" (95 % interval {percent_of(own.low)} to {percent_of(own.high)})"


def _interval_line(found: Estimate) -> str:
    if found.low is None:
        return "Too few windows for an interval."
    return (
        f"95 % interval for text like this: {number(found.low)} to {number(found.high)} (bootstrap over "
        f"{count(found.n_windows)} windows; {count(found.tokens_to_halve)} tokens would halve it)."
    )


def _companion_line(result: SparsityResult) -> list[str]:
    """The same question by the other metric, read off the same passes."""
    other = next((found for found in result.estimates if found.metric != result.metric), None)
    if other is None:
        return []
    by = "by KL divergence from the dense model" if other.metric == "cett_kl" else "by perplexity"
    ends = "" if other.low is None else f" ({number(other.low)} to {number(other.high)})"
    return [f"{search_name(other.metric, result.p_percent)}, {by}: {number(other.activation_ratio)}{ends}."]


def _sparsity_card(result: SparsityResult) -> Markup:
    label = f"Activation ratio at {search_name(result.metric, result.p_percent)}"
    definition = "Active: contribution at or above the layer's threshold; mean over layers."
    on = _measured_on(result.model, result.corpus, definition)
    rise = signed(result.ppl_increase_percent)
    change = f"Perplexity {number(result.ppl_dense, 4)} → {number(result.ppl_sparse, 4)} ({rise})."
    if not result.reached:
        lines = [
            f"No CETT in [0, 1] raises perplexity by {target(result.p_percent)}.",
            f"At CETT {number(result.cett)}: {change[0].lower()}{change[1:]}",
        ]
        return card(label, "not reached", lines, on, tone="warn")
    lines = [f"Sparsity ratio {number(result.sparsity_ratio)}, at CETT {number(result.cett)}.", change]
    own = next((found for found in result.estimates if found.metric == result.metric), None)
    if own is not None:
        lines.append(_interval_line(own))
    lines += _companion_line(result)
    if result.calibration is not None:
        lines.append(f"Thresholds from other text: {visible(result.calibration.get('name', '?'))}.")
    if not result.converged:
        lines.append(f"The search ended outside its tolerance of {number(result.tolerance_percent)} points.")
    return card(label, number(result.activation_ratio), lines, on)


def _idle_card(result: SparsityResult, total: int) -> Markup:
    on = _measured_on(result.model, result.corpus, "Which neurons idle changes from token to token.")
    if not result.reached:
        return card("Idle on an average token", "n/a", ["The target was not reached."], on, tone="warn")
    lines = [f"of {count(total)} neurons, {percent_of(result.sparsity_ratio)}: others on the next token."]
    return card("Idle on an average token", count(result.sparsity_ratio * total), lines, on)


def _removable_card(removed: AblationResult) -> Markup:
    share = percent_of(removed.n_removable / removed.n_neurons)
    lines = [
        f"of {count(removed.n_neurons)} neurons, {share}: gone for every token, perplexity {signed(_rise(removed))}."
    ]
    lines += sentences(unsettled(removed), _holds(removed), no_shorter(removed.heldout or {}))
    if removed.control:
        lines.append(control_line(removed.control))
    limit = f"at most +{target(removed.p_percent)}"
    order = f"In order of {visible(removed.ranking)}"
    if removed.ranking_corpus.get("unseen_in_search"):
        order += f" on {count(removed.ranking_corpus['n_tokens'])} other tokens"
    definition = f"{order}, replaced by {replacement(removed)}, {limit}."
    tone = "warn" if removed.heldout and not removed.heldout.get("holds") else ""
    return card(
        "Removable for good",
        count(removed.n_removable),
        lines,
        _measured_on(removed.model, removed.corpus, definition),
        tone=tone,
    )


def _dead_card(stats: NeuronStatistics, result: SparsityResult | None) -> Markup:
    active, total = classes.activity(stats, result), _n_neurons(stats)
    counts, zero = classes.class_counts(active), classes.exactly_zero(stats)
    dead = int(counts.dead.sum())
    lines = [
        f"of {count(total)} neurons, {percent_of(dead / total)}: active on under {_DEAD} of tokens.",
        f"Never active: {count(counts.never.sum())}. Exactly zero on every token: {count(zero.never.sum())}.",
    ]
    definition = f"Active: {visible(active.definition)}."
    return card("Dead neurons", count(dead), lines, _measured_on(stats.model, stats.corpus, definition))
