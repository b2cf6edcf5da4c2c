"""The Hugging Face model inside a bridge: it runs where it gives the same numbers, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity import plain
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import perplexity, token_losses
from neuron_sparsity.recorder import record
from neuron_sparsity.sparsity import sparsify

pytest.importorskip("transformer_lens.model_bridge")


def make_windows(n_windows: int = 3, n_pos: int = 48) -> Windows:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 300, (n_windows, n_pos), generator=generator, dtype=torch.int32)
    tokens[:, 0] = 0
    scored = torch.ones(n_windows, n_pos, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens, scored, "random", ("d",) * n_windows, "apart", True)


def passed(adapter: MLPAdapter, run: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    posts: dict[int, Tensor] = {}
    with torch.no_grad():
        residual = run(tokens, lambda layer, z: posts.update({layer: z.clone()}))
    return residual, [posts[layer] for layer in range(adapter.info.n_layers)]


@pytest.mark.parametrize("compat", [False, True], ids=["plain", "compat"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_both_give_the_same_numbers(tiny_bridge: Any, family: str, compat: bool) -> None:
    adapter, windows = attach(tiny_bridge(family, compat=compat)), make_windows()
    if adapter.plain is None:
        assert "gives other numbers" in adapter.forward or "in the plain model" in adapter.forward
        assert compat, "without folded weights it is the same model"
        return
    assert adapter.forward.startswith("Hugging Face")
    tokens = windows.tokens.long()
    (ours, our_posts), (theirs, their_posts) = (
        passed(adapter, run, tokens) for run in (adapter.final_residual, adapter._wrapped_residual)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for z, expected in zip(our_posts, their_posts, strict=True):
        assert z.shape == expected.shape
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_a_hook_returns_takes_effect(tiny_bridge: Any, family: str) -> None:
    model, windows = tiny_bridge(family), make_windows()
    losses = [
        token_losses(attach(model, plain=plain), windows, on_post=lambda layer, z: 0.5 * z) for plain in (True, False)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    untouched = token_losses(attach(model), windows)
    assert float((losses[0] - untouched).abs().max()) > 1e-3


def test_a_model_with_hooks_is_measured_with_them(tiny_bridge: Any) -> None:
    model, windows = tiny_bridge("llama"), make_windows()
    adapter = attach(model)
    before = perplexity(adapter, windows).ppl
    with sparsify(model, [0.3, 0.3]):
        inside = perplexity(adapter, windows).ppl
    with sparsify(attach(model, plain=False), [0.3, 0.3]):
        wrapped = perplexity(attach(model, plain=False), windows).ppl
    assert inside == pytest.approx(wrapped, rel=1e-6)
    assert abs(inside / before - 1) > 1e-4
    assert perplexity(adapter, windows).ppl == before


def test_a_model_in_training_runs_as_it_is(tiny_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bridge("llama")
    adapter = attach(model)
    assert adapter.plain is not None
    monkeypatch.setattr(adapter, "plain", lambda *_: pytest.fail("the plain model ran"))
    model.train()
    adapter.final_residual(make_windows().tokens.long())


def test_nothing_is_left_on_the_model(tiny_bridge: Any) -> None:
    model = tiny_bridge("llama")
    inner = model.original_model
    attention, children = inner.config._attn_implementation, [id(module) for module in inner.modules()]
    adapter = attach(model)
    assert adapter.plain is not None

    def stop(layer: int, z: Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        adapter.final_residual(make_windows().tokens.long(), stop)
    assert not any(module._forward_pre_hooks for module in adapter.plain.projections)
    assert (inner.config._attn_implementation, [id(module) for module in inner.modules()]) == (attention, children)


def test_weights_are_shared(tiny_bridge: Any) -> None:
    model = tiny_bridge("llama")
    adapter = attach(model)
    assert adapter.plain is not None
    theirs = {tensor.data_ptr() for tensor in model.original_model.parameters()}
    assert {tensor.data_ptr() for tensor in adapter.plain.base.parameters()} <= theirs


def test_a_plain_model_that_gives_other_numbers_is_not_used(tiny_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = plain.PlainBody.__call__
    monkeypatch.setattr(plain.PlainBody, "__call__", lambda self, tokens, on_post: 1.001 * true(self, tokens, on_post))
    adapter = attach(tiny_bridge("llama"))
    assert adapter.plain is None
    assert "other numbers" in adapter.forward


def test_post_activations_that_differ_are_noticed_too(tiny_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = plain.PlainBody.__call__

    def shifted(self: Any, tokens: Tensor, on_post: Any) -> Tensor:
        return true(self, tokens, on_post and (lambda layer, z: on_post(layer, z + 0.01)))

    monkeypatch.setattr(plain.PlainBody, "__call__", shifted)
    assert "other numbers" in attach(tiny_bridge("llama")).forward


def test_a_forward_of_its_own_is_refused(tiny_bridge: Any) -> None:
    model = tiny_bridge("llama")
    norm = model.original_model.model.norm.original_component
    norm.forward = norm.forward
    assert "forward of its own" in attach(model).forward


def test_an_adapter_is_asked_for_the_bridge_too(tiny_bridge: Any) -> None:
    adapter = attach(tiny_bridge("llama"))
    assert adapter.plain is not None
    wrapped = attach(adapter, plain=False)
    assert (wrapped.plain, wrapped.forward, wrapped.info) == (None, "TransformerBridge", adapter.info)
    assert attach(adapter) is adapter
    assert attach(wrapped, plain=False) is wrapped


def test_results_say_what_ran(tiny_bridge: Any) -> None:
    model = tiny_bridge("llama")
    windows = make_windows()
    assert record(model, windows).provenance["forward"].startswith("Hugging Face LlamaForCausalLM inside")
    assert record(attach(model, plain=False), windows).provenance["forward"] == "TransformerBridge"
