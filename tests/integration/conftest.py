"""Tiny models by name, on whichever TransformerLens is installed, and text that they wrote themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


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
        import torch

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
