"""`atlas` from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.taxonomy import Atlas
from tests.cli.conftest import SIZES


def test_it_records_what_is_not_there_and_says_what_it_found(measure: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = measure("atlas", "--active", "nonzero", "--out", folder)
    assert done.code == 0, done.err
    assert done.err == ""
    made, stats = Atlas.load(folder), NeuronStatistics.load(folder)
    assert made.question["active"] == "nonzero"
    assert (made.corpus["sha256"], made.watched["sha256"]) == (stats.corpus["sha256"],) * 2  # type: ignore[index]
    assert made.curve[-1].n_tokens == made.n_tokens == 192
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "windows.safetensors", "statistics.safetensors", "atlas.parquet"}
    lines = done.out.splitlines()
    assert lines[0].endswith("192 tokens in windows of 16: 128 neurons")
    assert lines[1].startswith(
        "active: post-activation is not exactly zero; dead: active on under 0.1 % of tokens; rare"
    )
    counts = made.counts()
    # A gated SiLU is never exactly zero.
    assert lines[2].startswith("dead 0 (0 never active: at most 1.6 % of tokens, 95 % bound 3/N), rare 0, alive 0, ")
    assert lines[3] == "dead, as N grows: 0 at N = 16, 0 at N = 48, 0 at N = 96, 0 at N = 192"
    assert f"{counts['triggers']['token_detector']:,} token detectors" in lines[4]
    assert f"prediction {counts['roles']['prediction']:,}, suppression" in lines[-2]
    assert lines[-1] == f"atlas: {folder / 'atlas.parquet'}"
    assert pd.read_parquet(folder / "atlas.parquet").shape == made.table.shape  # any reader of Parquet will do


def test_json_and_the_same_question_again(measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure("atlas", "--no-logits", "--active", "nonzero", "--out", tmp_path / "run", "--json").json
    assert first["question"]["active"] == "nonzero"
    assert "logits" not in first["definitions"]
    assert "roles" not in first["counts"]
    assert sum(first["counts"]["classes"][name] for name in ("dead", "rare", "alive", "always_on")) == 128
    assert first["counts"]["classes"]["always_on"] == 128  # a gated SiLU is never exactly zero
    written = (tmp_path / "run" / "atlas.parquet").stat().st_mtime_ns
    again = measure("atlas", "--no-logits", "--active", "nonzero", "--out", tmp_path / "run", "--json").json
    assert again == first
    assert (tmp_path / "run" / "atlas.parquet").stat().st_mtime_ns == written


def test_relu_is_counted_by_zeros(cli: Any, model_folder: Callable[[str], str], text_file: str, tmp_path: Path) -> None:
    done = cli("atlas", model_folder("opt"), "--text", text_file, *SIZES, "--out", tmp_path / "run", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    made = Atlas.load(tmp_path / "run")
    assert made.definitions["active"] == "post-activation is not exactly zero"
    assert not (tmp_path / "run" / "sparsity.json").exists()
    assert 0 < made.table["activation_frequency"].mean() < 1


def test_it_takes_the_thresholds_of_a_run(whole_run: Callable[[], Path], measure: Any) -> None:
    folder = whole_run()
    before = (folder / "statistics.safetensors").read_bytes()
    done = measure("atlas", "--out", folder, "--no-logits")
    assert done.code == 0, done.err
    assert "active: contribution >= the layer's CETT-PPL-1% threshold; dead: " in done.out
    assert (folder / "statistics.safetensors").read_bytes() == before
    made, stats = Atlas.load(folder), NeuronStatistics.load(folder)
    assert made.question["active"] == stats.threshold_names[0]
    assert made.curve[-1].n_tokens == stats.n_tokens


def test_it_refuses(measure: Any, whole_run: Callable[[], Path]) -> None:
    assert "--active must be one of auto, nonzero, cett, got 'all'" in measure("atlas", "--active", "all").error()
    folder = whole_run()
    (folder / "atlas.parquet").write_bytes(b"PAR1 and nothing more")
    assert f"{folder / 'atlas.parquet'} is damaged (" in measure("atlas", "--out", folder).error()
