"""Every p of an `ablate` can be used: pruned, its damage shown, put side by side; the set that holds, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.run_results import applied_results

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval")
HOLDING = {"n_removable": 2, "ppl_ablated": 300.5, "ppl_increase_percent": 0.25, "interval": None}
HOLDING |= {"verdict": "holds", "holds": True, "chosen_on": "held-out text"}


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str], text_file: str) -> Path:
    """A run folder of `ablate --p 0.5 --p 5`, whose sets differ in size."""
    from neuron_sparsity.cli import app

    out = tmp_path_factory.mktemp("ablated") / "run"
    arguments = ["ablate", model_folder("llama"), "--text", text_file, "--tokens", "192", "--n-ctx", "16"]
    arguments += ["--p", "0.5", "--p", "5", "--replacement", "zero", "--controls", "0", "--out", str(out), "--quiet"]
    app(arguments, standalone_mode=False)
    return out


@pytest.fixture
def run(ablated: Path, tmp_path: Path) -> Path:
    shutil.copytree(ablated, tmp_path / "run")
    return tmp_path / "run"


def found(run: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((run / name).read_text()))


def edit(run: Path, name: str, **changes: Any) -> None:
    (run / name).write_text(json.dumps(found(run, name) | changes))


def pruned(cli: Any, run: Path, out: Path, *options: object) -> int:
    done = cli("prune", run, "--form", "zeroed", "--out", out, "--json", *options)
    assert done.code == 0, done.err
    assert done.json["measured"]["n_removable"] == len(done.json["neurons"])
    return len(done.json["neurons"])


def test_prune_takes_any_p_of_the_folder(cli: Any, run: Path, tmp_path: Path) -> None:
    first, second = (found(run, name)["n_removable"] for name in ("ablation.json", "ablation-p5.json"))
    assert 0 < first < second
    assert pruned(cli, run, tmp_path / "default") == first
    assert pruned(cli, run, tmp_path / "named", "--p", "0.5") == first
    assert pruned(cli, run, tmp_path / "other", "--p", "5") == second
    refused = cli("prune", run, "--p", "3", "--out", tmp_path / "none").error()
    assert "has no removal at 3 %, but at 0.5 and 5 %; `neuron-sparsity ablate --p 0.5 --p 3` finds several" in refused
    assert not (tmp_path / "none").exists()


def test_prune_takes_the_set_that_holds_on_heldout_text(cli: Any, run: Path, tmp_path: Path) -> None:
    heldout = found(run, "ablation-p5.json")["heldout"]
    edit(run, "ablation-p5.json", heldout=heldout | {"holds": True, "verdict": "holds"})
    whole = found(run, "ablation-p5.json")["n_removable"]
    assert pruned(cli, run, tmp_path / "whole", "--p", "5", "--holding") == whole
    edit(run, "ablation-p5.json", heldout=heldout | {"holds": False, "verdict": "fails", "holding": HOLDING})
    done = cli("prune", run, "--p", "5", "--holding", "--form", "zeroed", "--out", tmp_path / "short")
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "short/pruning.json").read_text())
    assert told["neurons"] == sorted(found(run, "ablation-p5.json")["removable"][:2])
    assert told["measured"]["ppl_increase_percent"] == 0.25
    assert told["measured"]["corpus"] == heldout["corpus"]
    assert "perplexity: +0.250 % on " in done.out
    assert "the held-out text that this set was chosen on" in done.out
    card = (tmp_path / "short/README.md").read_text()
    assert "chosen on this text" in card
    assert "never saw" not in card
    edit(run, "ablation-p5.json", heldout=heldout | {"holds": False, "verdict": "fails", "holding": None})
    refused = cli("prune", run, "--p", "5", "--holding", "--out", tmp_path / "none").error()
    assert "no set was found to hold at 5 % on the 64 tokens of held-out text" in refused


def test_the_damage_of_any_p_can_be_shown(measure: Any, run: Path) -> None:
    for options, name in (((), "ablation.json"), (("--p", "5"), "ablation-p5.json")):
        done = measure("damage", "--of", "ablation", "--layers", "none", *options, "--out", run, "--json")
        assert done.code == 0, done.err
        assert done.json["change"].startswith(f"{found(run, name)['n_removable']:,} neurons")
        expected = found(run, name)["heldout"]["ppl_increase_percent"]
        assert done.json["ppl_increase_percent"] == pytest.approx(expected, abs=1e-2)
    refused = measure("damage", "--of", "ablation", "--p", "3", "--out", run).error()
    assert "has no removal at 3 %, but at 0.5 and 5 %" in refused


def test_results_are_applied_at_every_p_and_stale_ones_are_named(run: Path) -> None:
    counts = [found(run, name)["n_removable"] for name in ("ablation.json", "ablation-p5.json")]
    applied = applied_results(run)
    assert [result.n_removable for result in applied.results.values()] == counts
    assert list(applied.results) == [f"{n:,} neurons removed at {p:g} %" for n, p in zip(counts, (0.5, 5), strict=True)]
    assert applied.left_out == ()
    stale = found(run, "ablation-p5.json")
    for change, why in (
        ({"ranking": "rms", "ranking_sha256": "0"}, "ranking rms, not fisher_shrunk"),
        ({"ranking_sha256": "0"}, "another order of removal"),
        ({"replacement": "mean"}, "replacement mean, not zero"),
        ({"corpus": stale["corpus"] | {"sha256": "0"}}, "another text"),
        ({"model": stale["model"] | {"fingerprint": "0"}}, "another model"),
        ({"p_percent": 0.5}, "the same p as ablation.json"),
    ):
        (run / "ablation-p5.json").write_text(json.dumps(stale | change))
        applied = applied_results(run)
        assert list(applied.results) == [f"{counts[0]:,} neurons removed"]
        assert applied.left_out == (f"ablation-p5.json ({why})",)


def test_a_stale_p_is_not_taken_for_one_of_this_question(cli: Any, measure: Any, run: Path, tmp_path: Path) -> None:
    edit(run, "ablation-p5.json", ranking="rms")
    for refused in (
        cli("prune", run, "--p", "5", "--out", tmp_path / "none").error(),
        measure("damage", "--of", "ablation", "--p", "5", "--out", run).error(),
    ):
        assert "ablation-p5.json was left by another search (ranking rms, not fisher_shrunk)" in refused
    (run / "ablation-p5.json").write_text("{")
    assert "ablation-p5.json cannot be read" in cli("prune", run, "--p", "5", "--out", tmp_path / "none").error()


@needs_lm_eval
def test_evaluate_puts_every_p_side_by_side(cli: Any, run: Path, model_folder: Callable[[str], str]) -> None:
    counts = [found(run, name)["n_removable"] for name in ("ablation.json", "ablation-p5.json")]
    shutil.copy(run / "ablation-p5.json", run / "ablation-p9.json")
    edit(run, "ablation-p9.json", p_percent=9.0, ranking="rms")
    done = cli("evaluate", model_folder("llama"), "--limit", 8, "--out", run)
    assert done.code == 0, done.err
    forms = [form["name"] for form in found(run, "downstream.json")["forms"]]
    assert forms == ["dense", f"{counts[0]} neurons removed at 0.5 %", f"{counts[1]} neurons removed at 5 %"]
    assert "left out: ablation-p9.json (ranking rms, not fisher_shrunk)" in done.out.splitlines()
    told = cli("evaluate", model_folder("llama"), "--limit", 8, "--out", run, "--json").json
    assert told["left_out"] == ["ablation-p9.json (ranking rms, not fisher_shrunk)"]
