"""The views of `pareto`: every curve is drawn, every answer is told, and nothing of the data becomes markup."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.frontier import Verdict
from neuron_sparsity.pareto import ParetoPoint, ParetoResult, RuleAnswer, RuleCurve
from neuron_sparsity.report import report, save_pareto_figure, views
from neuron_sparsity.rules import parse_rules

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def result(run: Any) -> ParetoResult:
    curves = []
    for index, rule in enumerate(parse_rules()):
        points = [
            ParetoPoint(0.1 * k, 1 - 0.2 * k, 14 + 0.1 * k**3, 0.7 * k**3 + 0.01 * index, 0.006 * k**2)
            for k in range(1, 6)
        ]
        answers = [
            RuleAnswer(metric, p, reached, 0.6 + 0.01 * index if reached else None, 0.55, 0.7, 0.2, p, True)
            for metric in ("ppl", "kl")
            for p, reached in ((1.0, True), (10.0, index != 3))
        ]
        curves.append(RuleCurve(rule.name, rule.score, rule.label, rule.parameter_name, tuple(points), tuple(answers)))
    labels = tuple(curve.label for curve in curves[:3])
    verdicts = tuple(
        Verdict(metric, p, labels, (0.0, 0.01, 0.02), (0.0, -0.01, 0.01), (0.0, 0.03, 0.03), (False, False, True))
        for metric in ("ppl", "kl")
        for p in (1.0, 10.0)
    )
    return ParetoResult(
        (1.0, 10.0), 14.2, 1.0, tuple(curves), verdicts, 6, run.stats.model, run.stats.corpus, {"cuts": 5.0}, {}
    )


def test_every_curve_is_drawn_and_every_pass_told(result: ParetoResult) -> None:
    drawn = views.pareto_curves(result)
    assert drawn.count("<polyline") == len(result.curves) == 10
    assert drawn.count("line thin dashed") == sum(curve.score == "s" for curve in result.curves) == 4
    colours = set(re.findall(r"stroke:(#[0-9a-f]{6})", drawn))
    assert len(colours) == len({curve.rule for curve in result.curves})
    assert "topk on |s|, k 0.200: activation ratio 0.600, perplexity +5.6" in drawn
    assert drawn.count("<circle") == 40, "the pass that cuts everything is left out"


def test_table_says_what_is_needed_and_what_is_not_reached(result: ParetoResult) -> None:
    told = views.pareto_table(result)
    assert "0.600 (0.550 to 0.700)" in told
    assert told.count("not reached") == 2
    assert "At +1\u00a0% cett on c needs fewest; this text does not tell it from fat on |s|." in told


def test_page_has_the_section_only_where_it_was_measured(run: Any, result: ParetoResult) -> None:
    assert "By which rule?" not in report(run.stats, run.result, run.removed).html
    page = report(run.stats, run.result, run.removed, pareto=result).html
    assert "By which rule?" in page
    other = dataclasses.replace(result, model=type(run.stats.model)(**vars(run.stats.model) | {"fingerprint": "other"}))
    with pytest.raises(ValueError, match="come from different models"):
        report(run.stats, pareto=other)


def test_labels_are_escaped(result: ParetoResult) -> None:
    curve = dataclasses.replace(result.curves[0], label=HOSTILE, parameter_name=HOSTILE)
    hostile = dataclasses.replace(result, curves=(curve,))
    for shown in (views.pareto_curves(hostile), views.pareto_table(hostile)):
        assert "<img" not in shown
        assert "&lt;img" in shown


def test_nothing_to_draw_is_said(result: ParetoResult) -> None:
    assert "No pass was recorded" in views.pareto_curves(dataclasses.replace(result, curves=()))


def test_figure_on_disk(result: ParetoResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert save_pareto_figure(result, tmp_path) == ["pareto.svg", "pareto.png"]
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "pareto.svg").read_text()
