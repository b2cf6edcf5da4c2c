"""`neuron-sparsity ablate --refine`: the order of `ns.refine`, kept under its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.adapter import load_model
from neuron_sparsity.corpus import load_corpus
from neuron_sparsity.greedy import refine
from neuron_sparsity.pipeline import CALIBRATION_SHARE
from neuron_sparsity.removal import order_hash

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REFINED = ("--refine", "40", "--ranking", "fisher_mean", "--p", "20", "--json")


def test_the_order_is_that_of_refine(
    measure: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "run", "--ranking-tokens", "0")
    plain = measure("ablate", *out, *REFINED[2:]).json
    refined = measure("ablate", *out, *REFINED).json
    assert plain["ranking"] == "fisher_mean"
    assert refined["ranking"] == "fisher_mean refined to 40 in 4 (mean)"
    assert refined["ranking_corpus"] == plain["ranking_corpus"]
    model = load_model(model_folder("llama"))
    windows = load_corpus(text_file, model, n_tokens=192, n_ctx=16).split(CALIBRATION_SHARE)[0]
    expected = refine(model, windows, n_remove=40, by="fisher_mean", replacement="mean")
    assert refined["ranking_sha256"] == order_hash(expected) != plain["ranking_sha256"]


def test_asked_again_it_is_read(measure: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert measure("ablate", "--out", out, *REFINED).code == 0
    written = (out / "ablation.json").stat().st_mtime_ns
    again = measure("ablate", "--out", out, *REFINED).json
    assert (out / "ablation.json").stat().st_mtime_ns == written
    assert again == json.loads((out / "ablation.json").read_text())
    assert "refined to 40 in 4 (mean), mean replacement" in measure("ablate", "--out", out, *REFINED[:-1]).out
    assert (
        measure("ablate", "--out", out, "--refine", "30", *REFINED[2:])
        .json["ranking"]
        .startswith("fisher_mean refined to 30")
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--refine", "-1"), "--refine must be at least 0, got -1"),
        (("--refine", "8", "--ranking", "rms"), "--refine takes a ranking by gradients (wanda, residual"),
        (("--refine", "8", "--replacement", "resample"), "--refine takes --replacement mean or zero, got resample"),
        (("--refine", "129"), "n_remove must be between 1 and 128, got 129"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    measure: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in measure("ablate", "--out", tmp_path / "run", *arguments).error()
