"""Runs side by side: each with its own numbers, and a refusal where the runs answer different questions."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from neuron_sparsity.report import compare
from neuron_sparsity.report._text import number
from tests.report.conftest import Run, make_run

HOSTILE = "</script><img src=x onerror=alert(1)>"


def parts(run: Run) -> dict[str, Any]:
    return {"stats": run.stats, "result": run.result, "removed": run.removed, "passage": None, "pareto": None}


def changed(part: Any, **values: Any) -> Any:
    return SimpleNamespace(**{**vars(part), **values})


@pytest.fixture
def runs() -> dict[str, dict[str, Any]]:
    small, large = make_run(name="small"), make_run(n_layers=6, d_mlp=64, name="large")
    large.result = changed(large.result, activation_ratio=0.25, estimates=())
    return {"runs/one": parts(small), "two": parts(large)}


def cells(html: str, row: str) -> list[str]:
    found = re.search(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', html, flags=re.S)
    assert found is not None, row
    return re.findall(r"<td>(.*?)</td>", found[1])


def test_every_run_has_its_column(runs: dict[str, dict[str, Any]]) -> None:
    page = compare(runs)
    small, large = runs["runs/one"]["result"], runs["two"]["result"]
    assert cells(page.html, "model") == ["small", "large"]
    assert cells(page.html, "MLP neurons") == ["4 × 48 = 192", "6 × 64 = 384"]
    ratios = cells(page.html, "activation ratio")
    assert ratios[0].startswith(f"{number(small.activation_ratio)} (")
    assert ratios[1] == number(large.activation_ratio)
    assert cells(page.html, "can go for good")[0] == "5 (2.60\u00a0%)"
    assert "B · two needs the fewest" in page.html
    runs["two"]["removed"] = changed(runs["two"]["removed"], resolved=False)
    assert [", perhaps more" in cell for cell in cells(compare(runs).html, "can go for good")] == [False, True]
    assert page.title == "2 runs side by side"
    assert page.html.count("var CircuitsVis=") == 0  # nothing of it is used here


def test_layers_of_unequal_models_meet_at_their_relative_depth(runs: dict[str, dict[str, Any]]) -> None:
    assert "relative depth" in compare(runs).html
    same = {"a": runs["two"], "b": runs["two"]}
    assert "relative depth" not in compare(same).html
    assert compare(same).html.count('class="dot run-1"') >= 6


def test_what_a_run_lacks_is_said(runs: dict[str, dict[str, Any]]) -> None:
    runs["two"] |= {"result": None, "removed": None}
    html = compare(runs).html
    assert cells(html, "activation ratio")[1] == "not measured"
    assert cells(html, "can go for good")[1] == "not measured"
    runs["runs/one"] |= {"result": None, "removed": None}
    assert "not measured in any of these runs" in compare(runs).html


def test_a_target_that_was_not_reached_has_no_number(runs: dict[str, dict[str, Any]]) -> None:
    runs["two"]["result"] = changed(runs["two"]["result"], reached=False)
    html = compare(runs).html
    assert cells(html, "activation ratio")[1] == "not reached"
    assert "needs the fewest" not in html


def test_intervals_that_overlap_tell_nothing_apart(runs: dict[str, dict[str, Any]]) -> None:
    twin = {"a": runs["runs/one"], "b": parts(make_run(name="twin"))}
    assert "does not tell the two apart" in compare(twin).html
    assert "does not tell the two apart" not in compare(runs).html


def test_different_texts_are_pointed_out(runs: dict[str, dict[str, Any]]) -> None:
    assert "not measured on the same text" not in compare(runs).html
    runs["two"]["result"].corpus = {**runs["two"]["result"].corpus, "name": "other"}
    assert "not measured on the same text" in compare(runs).html


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("result", {"p_percent": 5.0}, "the search of runs/one is CETT-PPL-1%, that of two is CETT-PPL-5%"),
        ("result", {"metric": "cett_kl"}, "that of two is CETT-KL-1%: they answer different questions"),
        ("removed", {"p_percent": 5.0}, "the removal of runs/one is for \\+1 %, that of two is for \\+5 %"),
    ],
)
def test_runs_that_answer_different_questions_are_refused(
    runs: dict[str, dict[str, Any]], part: str, values: dict[str, Any], said: str
) -> None:
    runs["two"][part] = changed(runs["two"][part], **values)
    with pytest.raises(ValueError, match=said):
        compare(runs)


def test_too_few_and_too_many_are_refused(runs: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="2 to 8 runs stand side by side on a page, got 1"):
        compare({"one": runs["two"]})
    with pytest.raises(ValueError, match="got 9"):
        compare({str(i): runs["two"] for i in range(9)})


def test_hostile_names_are_text(runs: dict[str, dict[str, Any]]) -> None:
    runs["two"]["stats"].model.name = HOSTILE
    page = compare({HOSTILE: runs["two"], "b": runs["runs/one"]}, title=HOSTILE)
    body = re.sub(r"<script>.*?</script>", "", page.html, flags=re.S)
    assert "<img src=x" not in body
    assert "&lt;img src=x onerror=alert(1)&gt;" in body


def test_the_target_does_not_look_like_a_run(runs: dict[str, dict[str, Any]]) -> None:
    html = compare(runs).html.split("</style>")[1]
    assert html.count('class="asked"') == 4  # a line and its key in two charts
    assert 'class="target' not in html
