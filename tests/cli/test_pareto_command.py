"""`neuron-sparsity pareto` on a tiny model: what it writes, says, refuses, and does not do twice."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--rules", "cett", "topk", "zeros", "--p", "5", "--p", "20", "--points", "2")


def test_pareto_writes_its_result_and_prints_a_table(measure: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = measure("pareto", *QUICK, "--out", out)
    assert (done.code, done.err) == (0, "")
    data = json.loads((out / "pareto.json").read_text())
    assert data["p_percents"] == [5.0, 20.0]
    assert [curve["label"] for curve in data["curves"]] == ["cett on c", "topk on |s|", "topk on c", "exact zeros"]
    assert set(data) >= {"schema", "ppl_dense", "verdicts", "dominant", "model", "corpus", "cost", "provenance"}
    assert data["provenance"]["s"] == "s = act(hook_pre), z = s * up"
    assert "activation ratio at which perplexity rises by" in done.out
    assert "192 tokens in windows of 16; perplexity" in done.out
    assert "fewest at 5 %: " in done.out
    assert "dominates at every p: " in done.out
    for label in ("cett on c", "topk on |s|", "topk on c", "exact zeros"):
        assert f"  {label}" in done.out
    written = {path.name for path in out.iterdir()}
    assert written >= {"run.json", "windows.safetensors", "pareto.json", "pareto-passes.json"}
    figures = {"pareto.svg", "pareto.png"}
    assert figures <= written if importlib.util.find_spec("matplotlib") else not figures & written


def test_without_matplotlib_one_line_says_so(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    done = measure("pareto", "--rules", "cett", "--p", "20", "--points", "1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "figure: not drawn, matplotlib is not installed (extra `notebooks`)" in done.out
    assert not (tmp_path / "run/pareto.svg").exists()


def test_the_same_question_is_read_and_another_takes_up_its_passes(
    measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "run", "--json", "--batch-size", "4")
    first = measure("pareto", *QUICK, *out).json
    assert measure("pareto", *QUICK, *out).json == first
    other = measure("pareto", "--rules", "topk:c", "--p", "5", "--points", "2", *out).json
    assert other["cost"]["taken_up"] == other["cost"]["cuts"]
    kept = {curve["label"]: curve for curve in first["curves"]}["topk on c"]
    assert {point["parameter"] for point in other["curves"][0]["points"]} <= {p["parameter"] for p in kept["points"]}
    assert measure("pareto", *QUICK, "--out", tmp_path / "run", "--quiet").out == ""


def test_report_of_the_folder_shows_it(cli: Callable[..., Any], measure: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert measure("record", "--out", out).code == 0
    assert measure("pareto", *QUICK, "--out", out).code == 0
    done = cli("report", out)
    assert done.code == 0, done.err
    page = (out / "report.html").read_text()
    assert "By which rule?" in page
    assert "topk on |s|" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rules", "best"), "error: no rule 'best'; rules are cett, fat, quantile, topk, topp, zeros"),
        (("--rules", "cett:s"), "error: cett is defined on contributions only, got 'cett:s'"),
        (("--points", "0"), "error: --points must be at least 1, got 0"),
        (("--p", "-1"), "error: --p must be a positive number of percent, got -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    cli: Callable[..., Any], options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert cli("pareto", "no-such-model", *options, "--out", tmp_path / "run").error() == message
    assert not (tmp_path / "run").exists()


def test_a_damaged_result_is_named(measure: Callable[..., Any], tmp_path: Path) -> None:
    out = ("--rules", "cett", "--p", "20", "--points", "1", "--out", tmp_path / "run")
    assert measure("pareto", *out).code == 0
    path = tmp_path / "run/pareto.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ppl_dense": "low"}))
    assert 'pareto.json is damaged (TypeError: ppl_dense must be float, got "low")' in measure("pareto", *out).error()
