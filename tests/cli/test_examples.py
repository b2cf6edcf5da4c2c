"""The scripts in examples/ run from start to end, on a tiny model, and every one of them is run here."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = {
    "remove_until.py": ("--ranking", "fisher_mean", "--p", "5", "20"),
    "compare_rankings.py": ("--rankings", "contribution", "random", "--p", "20"),
    "prune_and_save.py": ("checkpoint", "--scope", "layer", "--replacement", "zero", "--p", "20"),
}


@pytest.fixture
def script(
    repository: Path,
    model_folder: Callable[[str], str],
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str], str]:
    """`script(name)`: what it prints."""

    def run(name: str) -> str:
        sizes = ("--model", model_folder("opt"), "--text", text_file, "--tokens", "640", "--n-ctx", "16")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name], *sizes])
        runpy.run_path(str(repository / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_is_run_here(repository: Path) -> None:
    assert {path.name for path in (repository / "examples").glob("*.py")} == set(SCRIPTS)


def test_remove_until(script: Callable[[str], str]) -> None:
    said = script("remove_until.py")
    assert "256 tokens of" in said
    assert "ranked by fisher_mean (model)" in said
    assert all(f"p = {p} %: " in said for p in (5, 20))
    assert "128 held-out tokens" in said


def test_compare_rankings(script: Callable[[str], str]) -> None:
    rows = [line.split(" | ") for line in script("compare_rankings.py").splitlines() if line.startswith("| ")][2:]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (by, kind) for by in ("contribution", "random") for kind in ("zero", "mean")
    ]
    assert all(len(row) == 7 for row in rows)


def test_prune_and_save(script: Callable[[str], str], tmp_path: Path) -> None:
    said = script("prune_and_save.py")
    told: dict[str, Any] = json.loads((tmp_path / "checkpoint/pruning.json").read_text())
    assert f"{len(told['neurons'])} of 128 neurons taken out: {told['form']}" in said
    assert "from disk" in said
