"""A run killed at any moment, any number of times, ends with what it would have ended with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

MORE = hypothesis.settings().max_examples // 50
"""1, and 16 in `make soak`."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the model is loaded once and every attempt is a fork")
@pytest.mark.parametrize(
    ("what", "rounds"), [("record", 200 if MORE > 1 else 10), ("report", 2 * MORE), ("track", 6 if MORE > 1 else 2)]
)
def test_killed_runs_lose_nothing(
    what: str,
    rounds: int,
    tiny_hf_models: Callable[..., Any],
    tiny_tokenizer: Any,
    tiny_text: str,
    repository: Path,
    tmp_path: Path,
) -> None:
    tiny_hf_models("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(tiny_text, encoding="utf-8")
    arguments = [tmp_path / "model", tmp_path / "text", tmp_path / "runs", what, rounds, 0]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.killing", *map(str, arguments)],
        cwd=repository,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(rf"{rounds} runs of {what} finished after (\d+) deaths with the same result.*\n", done.stdout)
    assert found, done.stdout
    assert int(found[1]) >= rounds // 2, "hardly anything was killed"
