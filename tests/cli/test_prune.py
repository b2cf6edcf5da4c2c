"""`neuron-sparsity prune`: from a run folder to a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str], text_file: str
) -> Callable[..., Path]:
    """`made("zero", p)`: the run folder of an `ablate`."""
    from neuron_sparsity.cli import app

    folders: dict[tuple[str, str], Path] = {}

    def run(replacement: str, p: str = "20") -> Path:
        if (replacement, p) not in folders:
            out = tmp_path_factory.mktemp("ablated") / "run"
            arguments = ["ablate", model_folder("llama"), "--text", text_file, "--tokens", "192", "--n-ctx", "16"]
            arguments += ["--p", p, "--scope", "layer", "--replacement", replacement, "--out", str(out), "--quiet"]
            app(arguments, standalone_mode=False)
            folders[replacement, p] = out
        return folders[replacement, p]

    return run


def loss(folder: Path, run: Path) -> float:
    """Of plain transformers, on the windows that the search ran on."""
    from transformers import AutoModelForCausalLM

    tokens = load_file(run / "windows.safetensors")["tokens"].long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_a_run_folder_becomes_a_checkpoint_with_the_ablated_loss(
    made: Callable[..., Path], cli: Callable[..., Any], replacement: str, tmp_path: Path
) -> None:
    run = made(replacement)
    ablation = json.loads((run / "ablation.json").read_text())
    assert ablation["n_removable"] > 2
    done = cli("prune", run, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert f"{ablation['n_removable']:,} of 128 neurons taken out, {replacement} replacement" in done.out
    assert done.out.splitlines()[-1] == f"checkpoint: {tmp_path / 'out'}"
    assert loss(tmp_path / "out", run) == pytest.approx(math.log(ablation["ppl_ablated"]), abs=1e-4)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files >= {"pruning.json", "README.md"}
    told = cli("prune", run, "--out", tmp_path / "zeroed", "--form", "zeroed", "--json").json
    assert told == {"folder": str(tmp_path / "zeroed")} | json.loads((tmp_path / "zeroed/pruning.json").read_text())
    assert (told["form"], told["reason"]) == ("zeroed", "asked for")
    assert loss(tmp_path / "zeroed", run) == pytest.approx(math.log(ablation["ppl_ablated"]), abs=1e-4)


def test_what_cannot_be_pruned_is_said_before_anything_is_written(
    made: Callable[..., Path],
    whole_run: Callable[[], Path],
    model_folder: Callable[[str], str],
    cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run, out = made("zero"), tmp_path / "out"
    assert "is no run folder" in cli("prune", tmp_path, "--out", out).error()
    assert "form must be one of auto, cut" in cli("prune", run, "--out", out, "--form", "thin").error()
    assert "with other weights" in cli("prune", run, "--out", out, "--model", model_folder("opt")).error()
    assert "is not empty; name an empty or new folder" in cli("prune", run, "--out", run).error()
    bare = whole_run()
    (bare / "ablation.json").unlink()
    assert (
        "has no ablation.json; find what can go with `neuron-sparsity ablate`"
        in cli("prune", bare, "--out", out).error()
    )
    edited = whole_run()
    text = json.loads((edited / "ablation.json").read_text())
    (edited / "ablation.json").write_text(json.dumps(text | {"ranking_corpus": {"sha256": "0"}}))
    assert "has means of other text than ablation.json" in cli("prune", edited, "--out", out).error()
    (edited / "ablation.json").write_text(json.dumps(text | {"model": text["model"] | {"dtype": "load"}}))
    assert "is damaged (dtype 'load')" in cli("prune", edited, "--out", out).error()
    (edited / "ablation.json").write_text(json.dumps(text | {"removable": [], "n_removable": 0}))
    assert "nothing is removable at this p" in cli("prune", edited, "--out", out).error()
    assert cli("prune", run).code == 2
    assert not out.exists()
