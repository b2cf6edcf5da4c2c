"""A model folder whose weights are changed in place: no command takes the numbers of the weights before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = ("--tokens", "192", "--n-ctx", "16", "--quiet")


@pytest.fixture
def folder(tmp_path: Path, tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any) -> Callable[[bool], Path]:
    """`folder(True)`: the one model folder, written anew, with an adapter merged into its query and value if asked."""

    def write(merged: bool) -> Path:
        model = tiny_hf_models("llama")
        generator = torch.Generator().manual_seed(1)
        for layer in model.model.layers if merged else ():
            for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
                left, right = (torch.randn(n, 2, generator=generator) for n in matrix.shape)
                matrix.add_(0.3 * matrix.std() * left @ right.T)
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("record", ()),
        ("sparsity", ("--p", "10")),
        ("ablate", ("--p", "20", "--ranking", "contribution", "--replacement", "zero")),
    ],
)
def test_a_run_folder_of_the_weights_before_is_refused(
    command: str, options: tuple[str, ...], folder: Any, cli: Any, text_file: str, tmp_path: Path
) -> None:
    def run(merged: bool) -> Any:
        return cli(command, folder(merged), "--text", text_file, *SIZES, *options, "--out", tmp_path / "run")

    assert run(False).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    said = run(True).error()
    assert "holds another run (model.fingerprint: " in said
    assert "name another folder" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert run(False).code == 0


def test_the_changed_weights_are_not_pruned_by_the_result_before(
    folder: Any, cli: Any, text_file: str, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    options = ("--p", "20", "--ranking", "contribution", "--replacement", "zero", "--out", run)
    assert cli("ablate", folder(False), "--text", text_file, *SIZES, *options).code == 0
    folder(True)
    assert "with other weights" in cli("prune", run, "--out", out).error()
    assert not out.exists()
    folder(False)
    assert cli("prune", run, "--out", out).code == 0
