"""A run killed at any moment, any number of times, ends with what it would have ended with."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.integration.killing import said_by

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
    tmp_path: Path,
) -> None:
    tiny_hf_models("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(tiny_text, encoding="utf-8")
    said = said_by(
        "tests.integration.killing", tmp_path / "model", tmp_path / "text", tmp_path / "runs", what, rounds, 0
    )
    found = re.fullmatch(rf"{rounds} runs of {what} finished after (\d+) deaths with the same result.*\n", said)
    assert found, said
    assert int(found[1]) >= rounds // 2, "hardly anything was killed"
