"""The activation function's own output: what it is on every kind of model, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity.activation import ActivationReader
from neuron_sparsity.adapter import attach
from neuron_sparsity.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = (torch.arange(24) * 11 + 3).remainder(300).view(2, 12)


def read(reader: ActivationReader) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    s, z = {}, {}

    def on_post(layer: int, value: Tensor) -> None:
        s[layer], z[layer] = reader.of(layer, value).clone(), value.clone()

    with torch.no_grad(), reader.reading():
        reader.adapter.final_residual(TOKENS, on_post)
    return s, z


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-compat", "hooked-silu"])
def test_s_of_a_gated_mlp_is_act_of_the_gate(
    name: str, plain: bool, tiny_model: Any, hooks_on: Callable[[Any], int]
) -> None:
    model = tiny_model(name)
    caught: dict[str, Tensor] = {}

    def catch(value: Tensor, hook: Any, key: str) -> None:
        caught[key] = value.detach().clone()

    keys = [f"blocks.{layer}.mlp.{hook}" for layer in range(2) for hook in ("hook_pre", "hook_pre_linear")]
    with torch.no_grad():
        model.run_with_hooks(
            TOKENS, fwd_hooks=[(key, lambda value, hook, key=key: catch(value, hook, key)) for key in keys]
        )
    adapter = attach(model, plain=plain)
    before = hooks_on(model)
    reader = ActivationReader(adapter)
    assert reader.adapter is adapter
    assert adapter.runs_plain == (plain and not name.startswith("hooked"))
    s, z = read(reader)
    for layer in range(2):
        expected = torch.nn.functional.silu(caught[f"blocks.{layer}.mlp.hook_pre"])
        assert torch.allclose(s[layer], expected, atol=1e-5)
        late = model.blocks[layer].mlp.b_in if name.startswith("hooked") else 0.0
        assert torch.allclose(s[layer] * caught[f"blocks.{layer}.mlp.hook_pre_linear"] + late, z[layer], atol=1e-4)
        assert not torch.allclose(s[layer], z[layer], atol=0.1)
    assert hooks_on(model) == before


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt2-compat", "neox", "hooked-relu", "hooked-gelu"])
def test_s_of_a_plain_mlp_is_z(name: str, tiny_model: Any) -> None:
    reader = ActivationReader(attach(tiny_model(name)))
    assert reader.is_z
    s, z = read(reader)
    assert all(torch.equal(s[layer], z[layer]) for layer in range(2))


def test_reading_changes_nothing_and_leaves_nothing(tiny_model: Any, hooks_on: Callable[[Any], int]) -> None:
    model = tiny_model("llama")
    reader = ActivationReader(attach(model))
    plain = reader.adapter.plain
    before = hooks_on(model), hooks_on(plain.base)
    with torch.no_grad():
        dense = reader.adapter.final_residual(TOKENS)
        with reader.reading():
            assert torch.equal(reader.adapter.final_residual(TOKENS), dense)
        with pytest.raises(KeyError), reader.reading():
            raise KeyError
    assert (hooks_on(model), hooks_on(plain.base)) == before
    with pytest.raises(RuntimeError, match=r"call it inside `with reader\.reading"):
        reader.of(0, dense)


def test_hooks_of_ones_own_are_seen_through(tiny_model: Any) -> None:
    """With a hook on the bridge the bridge itself runs, and s is read there."""
    model = tiny_model("llama")
    reader = ActivationReader(attach(model))
    dense, _ = read(reader)
    model.add_hook("blocks.0.mlp.hook_pre", lambda value, hook: 2 * value)
    changed, _ = read(reader)
    model.reset_hooks()
    assert not torch.allclose(changed[0], dense[0], atol=1e-2)


def test_something_between_activation_and_hook_post_is_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    adapter = attach(model)
    model.add_hook("blocks.1.mlp.hook_post", lambda value, hook: 2 * value)
    with pytest.raises(ModelError, match=r"layer 1: act\(hook_pre\) \* up misses hook_post by .*use rules on contrib"):
        ActivationReader(adapter)
    model.reset_hooks()


def test_a_wrong_activation_function_is_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron_sparsity import activation

    monkeypatch.setattr(activation, "_function", lambda adapter, block: torch.relu)
    with pytest.raises(ModelError, match=r"layer 0: act\(hook_pre\) \* up misses hook_post"):
        ActivationReader(attach(tiny_model("llama")))
    with pytest.raises(ModelError, match=r"layer 0: act\(hook_pre\) misses hook_post"):
        ActivationReader(attach(tiny_model("gpt2")))


def test_solu_with_layer_norm_is_refused(tiny_hooked: Any) -> None:
    with pytest.raises(ModelError, match=r"layer 0: .* misses hook_post .*solu_ln.*use rules on contributions"):
        ActivationReader(attach(tiny_hooked(act_fn="solu_ln")))
