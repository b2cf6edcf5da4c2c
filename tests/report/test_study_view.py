"""The page of a study: the paper's figures in kind, what is not told is said, and no data becomes markup."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest

from neuron_sparsity.report import study_report
from neuron_sparsity.study import StudyResult
from tests.studies import a_result

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return a_result()


def test_the_page_has_the_figures_of_the_paper(result: StudyResult) -> None:
    page = study_report(result)
    assert page.title == "How activation sparsity arises: made up"
    for title in (
        "Over training: relu",
        "Over training: silu",
        "Laws",
        "Seeds",
        "Width-depth ratio: relu",
        "Width-depth ratio: silu",
        "Scale: relu",
        "Scale: silu",
        "Convergence over scale",
        "Activation frequency: relu",
        "Activation frequency: silu",
        "Token by token: relu",
        "Token by token: silu",
        "Agreement on tokens",
        "Dead neurons",
        "Loss",
        "Every run",
        "Gaps",
        "How it was made",
    ):
        assert f"<h3>{title}</h3>" in page.html, title
    charts = re.findall(r'<svg class="chart"', page.html)
    assert len(charts) == 2 + 2 + 2 + 1 + 2 + 2 + 2
    assert "seed 2: relu law" in page.html
    assert "step-7" in page.html
    assert "cannot be loaded" in page.html
    assert "later" in page.html


def test_numbers_are_those_of_the_result(result: StudyResult) -> None:
    said = html.unescape(study_report(result).html)
    run = result.runs[0]
    assert run.laws[0].fit is not None
    assert f"{run.laws[0].fit['alpha']:.3g}" in said
    for one in result.spreads:
        assert f"{one.model} {one.activation}" in said
    assert "relu: its law can be fitted to 9 of 9 runs, fits better than the other law on 9" in said
    assert "identify its limit, with and without the first quarter of the points, on 9" in said
    assert "1,024,000 tokens of 70 documents" in said
    assert "4,096 tokens of 7 documents that were never trained on" in said


def test_the_page_says_where_no_limit_is_told() -> None:
    said = html.unescape(study_report(a_result(few=True, told=False)).html)
    assert "identify its limit, with and without the first quarter of the points, on 0" in said
    assert "limits of the other runs are not told by these data" in said
    assert "so this is the ratio at the end of the stable phase in the place of the limit" in said
    assert "The data do not identify the limit: every A_0 from" in said


def test_a_law_that_cannot_be_fitted_says_why(result: StudyResult) -> None:
    said = html.unescape(study_report(result).html)
    assert "the silu law can only rise with tokens" in said
    assert "<td>cannot be fitted</td>" in said


def test_unfinished_studies_have_a_page(result: StudyResult) -> None:
    nothing = dataclasses.replace(result, runs=(), spreads=(), series=(), agreements=())
    said = study_report(nothing).html
    assert "No run is finished yet." in said
    assert "Agreement on tokens: fewer than two" in said
    first = dataclasses.replace(result, runs=result.runs[:1], spreads=(), series=(), agreements=())
    said = study_report(first).html
    assert "No model was trained with more than one seed" in said
    assert "Width-depth ratio: relu: no run of this series is finished" in said
    unmeasured = tuple(
        dataclasses.replace(run, frequency_shares=(), half_tokens=None, points=(), end_ratio=None)
        for run in result.runs
    )
    assert "not measured" in study_report(dataclasses.replace(result, runs=unmeasured, series=())).html


def test_nothing_becomes_markup() -> None:
    page = study_report(a_result(HOSTILE, few=True)).html
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_the_same_study_gives_the_same_bytes(result: StudyResult) -> None:
    assert study_report(result).html == study_report(StudyResult.from_json(result.to_json())).html
