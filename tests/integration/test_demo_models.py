"""The built-in models that come with the package: small, trained, and of the activation they are named by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import neuron_sparsity as ns
from neuron_sparsity.doctor import examine
from neuron_sparsity.weights import DEMO_MODELS

pytest.importorskip("transformer_lens.model_bridge")


@pytest.fixture(scope="module", params=DEMO_MODELS)
def demo(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, ns.load_model(request.param, device="cpu")


@pytest.fixture(scope="module")
def windows(demo: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    said = "The Congress of the United States has had under its consideration the state of the public debt. "
    path.write_text(said * 30, encoding="utf-8")
    return ns.load_corpus(path, demo[1], n_tokens=512, n_ctx=64)


def test_it_is_trained_and_of_its_activation(demo: tuple[str, Any], windows: Any) -> None:
    name, model = demo
    adapter = ns.attach(model, name=name)
    assert adapter.info.gated
    assert f"demo-{adapter.info.activation}" == name
    assert ns.perplexity(model, windows).ppl < adapter.model.cfg.d_vocab / 5
    stats = ns.record(model, windows)
    zero = float(stats.zero_count.double().mean()) / stats.n_tokens
    assert zero > 0.2 if name == "demo-relu" else zero < 0.001


def test_it_is_small_and_says_how_it_was_made(demo: tuple[str, Any], repository: Path) -> None:
    folder = repository / "neuron_sparsity" / "demo" / demo[0]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    said = (folder / "README.md").read_text(encoding="utf-8")
    assert said.startswith(f"# {demo[0]}\n")
    assert "public domain" in said
    assert "Licence: MIT" in said
    assert "neuron-sparsity study --preset tiny" in said


def test_doctor_knows_them() -> None:
    assert {name: examine()["built_in"][name] for name in DEMO_MODELS} == {"demo-relu": True, "demo-silu": True}


def test_an_unknown_name_names_them() -> None:
    with pytest.raises(ns.ModelError, match=r"a built-in \(smollm2-135m, demo-relu, demo-silu\)"):
        ns.load_model("demo-gelu")
