"""Tiny models by name, on whichever TransformerLens is installed, and text that they wrote themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`tiny_model("opt", seed=0)` a bridge; `"gpt2-compat"` one in compatibility mode; `"hooked-relu"`, `"hooked-silu"`
    (gated) a HookedTransformer. Skips where the installed TransformerLens has no such class.
    """

    def make(name: str, *, seed: int = 0) -> Any:
        if name.startswith("hooked-"):
            act_fn = name.removeprefix("hooked-")
            return request.getfixturevalue("tiny_hooked")(act_fn=act_fn, gated=act_fn == "silu", seed=seed)
        family = name.removesuffix("-compat")
        return request.getfixturevalue("tiny_bridge")(family, compat=family != name, seed=seed)

    return make


@pytest.fixture(scope="session")
def own_windows(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    """`own_windows(model, n_windows=32, window=32, seed=0)`: Windows of text that the model wrote."""

    def make(model: Any, n_windows: int = 32, *, window: int = 32, seed: int = 0) -> Any:
        from neuron_sparsity.corpus import Windows

        tokens = sample_tokens(model, n_windows, window=window, seed=seed)
        scored = torch.ones_like(tokens, dtype=torch.bool)
        scored[:, 0] = False
        return Windows(tokens, scored, "its own words", ("none",) * n_windows, "apart", bos=True)

    return make


@pytest.fixture(scope="session")
def hooks_on() -> Callable[[Any], int]:
    """`hooks_on(module)`: how many forward hooks hang on it, TransformerLens's own and torch's."""

    def count(model: Any) -> int:
        points = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in getattr(model, "hook_dict", {}).values())
        modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return points + modules

    return count


@pytest.fixture(scope="session")
def make_hf(tiny_hf_models: Callable[..., Any]) -> Callable[[str], Any]:
    """A tiny Hugging Face model: of the families of all tests, and of three that change their logits at the end."""
    import transformers as hf

    def make(family: str) -> Any:
        if family not in ("gemma2", "granite", "cohere"):
            return tiny_hf_models(family)
        name = family.capitalize()
        options: dict[str, Any] = {
            "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
            "granite": {"logits_scaling": 8.0},
            "cohere": {"logit_scale": 0.25},
        }[family]
        config = getattr(hf, f"{name}Config")(intermediate_size=64, num_key_value_heads=2, **COMMON, **SIZES, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(hf, f"{name}ForCausalLM")(config).float().eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(8.0)
        model.config.architectures = [type(model).__name__]
        return model

    return make


@pytest.fixture(scope="session")
def make_bridge(make_hf: Callable[[str], Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """`make_bridge(family, compat=False)`: a bridge of one of them."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge

    def make(family: str, *, compat: bool = False) -> Any:
        booted = bridge.boot_transformers(f"tiny-{family}", hf_model=make_hf(family), tokenizer=tiny_tokenizer)
        if compat:
            booted.enable_compatibility_mode()
        return booted

    return make
