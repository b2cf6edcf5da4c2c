"""What a change does to single tokens, and in which layers: the view of a DamageResult."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from neuron_sparsity.report._charts import Chart, layer_axis, linear_axis
from neuron_sparsity.report._fragments import figure, note, table, token_text
from neuron_sparsity.report._text import count, join, number, percent_of, signed, visible, visible_token

if TYPE_CHECKING:
    from neuron_sparsity.damage import DamageResult
    from neuron_sparsity.damage_tables import TokenDamage

__all__ = ["damage"]

_GROUPS = 8


def damage(result: DamageResult, *, n_tokens: int = 8) -> str:
    """Return the tokens hurt and helped most in their context, and what each layer costs.

    Args:
        result: The damage of a removal or a truncation.
        n_tokens: How many tokens of either kind are shown.

    Raises:
        ValueError: If `n_tokens` is negative.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be >= 0, got {n_tokens}")
    corpus = result.corpus
    measured = f"{visible(result.change)}; {visible(corpus['name'])}, {count(corpus['scored_tokens'])} scored tokens"
    said = (
        f"Perplexity {signed(result.ppl_increase_percent)} ({measured}). The loss rises on "
        f"{percent_of(result.hurt_ratio)} of the tokens."
    )
    if result.top_percent_share is not None:
        said += f" The 1 % hurt most carry {percent_of(result.top_percent_share)} of the sum of all differences."
    parts = [
        Markup('<p class="verdict">{}</p>').format(said),
        _tokens("Tokens hurt most", result.hurt[:n_tokens], "Rise of the marked token's loss, in nats."),
        _tokens("Tokens helped most", result.helped[:n_tokens], "Fall of the marked token's loss, in nats."),
        _layers(result),
        _groups(result),
    ]
    return join(parts)


def _tokens(title: str, tokens: tuple[TokenDamage, ...], caption: str) -> Markup:
    if not tokens:
        return note(f"{title}: there is none.")
    shape = Markup('<div class="example"><p class="value-tag" title="{}">{}</p><div>{}</div></div>')
    rows = join(
        shape.format(
            f"{visible(token.document)}, window {token.window}, position {token.pos}",
            number(token.difference),
            token_text([*token.before, token.token, *token.after], len(token.before)),
        )
        for token in tokens
    )
    return figure(title, rows, f"{caption} The tokens after it are shown for reading only.", wide=True)


def _layers(result: DamageResult) -> Markup:
    if not result.layers:
        return note("Layers were not run one by one.")
    rises = [part.rise for part in result.layers]
    ends = [end for part in result.layers for end in (part.low, part.high) if end is not None]
    said = "changed alone" if result.layer_passes == "alone" else "spared"
    chart = Chart(
        layer_axis([part.layer for part in result.layers]),
        linear_axis([0.0, *rises, *ends], "rise of the loss, nats", zero=not any(rise < 0 for rise in [*rises, *ends])),
        f"Damage of {len(rises)} layers, each {said}",
    )
    for part in result.layers:
        text = f"layer {part.layer} {said}: {number(part.rise)}"
        if part.low is not None and part.high is not None:
            text += f", 95 % interval {number(part.low)} to {number(part.high)}"
            chart.line([(part.layer, part.low), (part.layer, part.high)], style="line interval", note=text)
        chart.point(part.layer, part.rise, text)
    caption = (
        "Each layer changed alone, all others dense."
        if result.layer_passes == "alone"
        else "What is saved where all layers but this one are changed."
    )
    if result.layer_sum is not None and result.interaction is not None:
        caption += (
            f" All layers together: {number(result.rise.mean)}; sum of the layers: {number(result.layer_sum.mean)}; "
            f"what the sum leaves over: {number(result.interaction.mean)}."
        )
    return figure("Damage of each layer", chart.svg(), caption)


def _groups(result: DamageResult) -> Markup:
    groups = result.by_token
    if not groups:
        return note(f"No token occurs {result.min_count} times.")
    chosen = groups if len(groups) <= 2 * _GROUPS else (*groups[:_GROUPS], *groups[-_GROUPS:])
    rows = [(visible_token(g.token), count(g.count), number(g.rise), number(g.stderr), number(g.kl)) for g in chosen]
    caption = f"Tokens that occur {result.min_count} times or more, hurt most first"
    header = ("token", "occurrences", "mean rise, nats", "standard error", "mean KL, nats")
    return figure("By token", table(header, rows, caption=caption))
