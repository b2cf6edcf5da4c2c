"""`damage` and `evaluate` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")


def test_damage_of_a_truncation_and_of_the_ablation_of_a_run(whole_run: Callable[[], Path], measure: Any) -> None:
    folder = whole_run()
    sparsity, ablation = (json.loads((folder / f"{name}.json").read_text()) for name in ("sparsity", "ablation"))
    done = measure("damage", "--out", folder)
    assert done.code == 0, done.err
    assert done.out.startswith("truncated at CETT-PPL-1%: perplexity ")
    saved = json.loads((folder / "damage.json").read_text())
    assert saved["ppl_increase_percent"] == pytest.approx(sparsity["ppl_increase_percent"], abs=1e-2)
    assert saved["corpus"]["sha256"] == sparsity["corpus"]["sha256"]
    assert [part["layer"] for part in saved["layers"]] == [0, 1]
    tokens = load_file(folder / "damage.safetensors")
    assert tokens["loss_difference"].sum() / saved["corpus"]["scored_tokens"] == pytest.approx(
        saved["rise"]["mean"], abs=1e-6
    )
    done = measure("damage", "--of", "ablation", "--layers", "none", "--out", folder, "--json")
    assert done.code == 0, done.err
    assert done.json["corpus"]["sha256"] == ablation["heldout"]["corpus"]["sha256"]
    assert done.json["ppl_increase_percent"] == pytest.approx(ablation["heldout"]["ppl_increase_percent"], abs=1e-2)
    assert done.json["layers"] == []


def test_damage_refuses(measure: Any, tmp_path: Path) -> None:
    assert "--of must be one of truncation, ablation, got 'all'" in measure("damage", "--of", "all").error()
    assert "--layers must be one of alone, spared, none" in measure("damage", "--layers", "both").error()
    missing = measure("damage", "--of", "ablation", "--out", tmp_path / "new")
    assert "has no ablation.json; `neuron-sparsity ablate` makes it" in missing.error()


@needs_lm_eval
def test_evaluate_applies_the_results_of_a_run(
    whole_run: Callable[[], Path], cli: Any, model_folder: Callable[[str], str]
) -> None:
    folder = whole_run()
    done = cli("evaluate", model_folder("llama"), "--limit", 8, "--out", folder)
    assert done.code == 0, done.err
    assert done.err == ""
    saved = json.loads((folder / "downstream.json").read_text())
    removable = json.loads((folder / "ablation.json").read_text())["n_removable"]
    names = ["dense", "CETT-PPL-1%"] + [f"{removable:,} neurons removed"] * bool(removable)
    assert [form["name"] for form in saved["forms"]] == names
    assert saved["schema"] == 1
    assert "everyday_choices acc, 8 items" in done.out
    assert (
        cli("evaluate", model_folder("llama"), "--limit", 8, "--out", folder, "--json").json["forms"] == saved["forms"]
    )


def test_evaluate_says_how_to_get_lm_eval(
    whole_run: Callable[[], Path], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron_sparsity import downstream

    monkeypatch.setattr(downstream, "find_spec", lambda name: None)
    said = r'need the package lm-eval: pip install -e "\.\[eval\]" in the clone'
    with pytest.raises(downstream.MeasurementError, match=said):
        downstream.evaluate(None, None)
    refused = cli("evaluate", "a model that would not load", "--out", whole_run())
    assert 'pip install -e ".[eval]" in the clone' in refused.error()


def test_evaluate_refuses(cli: Any, tmp_path: Path, model_folder: Callable[[str], str], measure: Any) -> None:
    assert "name with --out the run folder" in cli("evaluate", "nowhere").error()
    assert "is no run folder" in cli("evaluate", "nowhere", "--out", tmp_path).error()
    assert measure("record", "--out", tmp_path / "recorded").code == 0
    refused = cli("evaluate", model_folder("llama"), "--out", tmp_path / "recorded")
    assert "has no result to apply; `neuron-sparsity sparsity --out" in refused.error()
