"""Where weights are: what accelerate's hooks say, and what is done when they fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neuron_sparsity import placement
from neuron_sparsity.errors import ModelError
from neuron_sparsity.placement import device_of, is_offloaded, materialised, output_shape, output_weight, untold


def offloaded(width: int = 3) -> tuple[nn.Sequential, torch.Tensor]:
    """A linear layer in a container, its weights away, and what they are."""
    accelerate = pytest.importorskip("accelerate", reason="pip install -e '.[large]'")
    model = nn.Sequential(nn.Linear(width, width))
    weight = model[0].weight.detach().clone()
    return accelerate.cpu_offload(model), weight


def test_weights_are_there_inside_and_gone_after() -> None:
    model, weight = offloaded()
    layer = model[0]
    assert is_offloaded(model)
    with materialised(model):
        inside = layer.weight
        assert torch.equal(inside, weight)
        layer(torch.ones(1, 3))
        assert layer.weight is inside, "a call inside loads nothing and gives up nothing"
        with materialised(layer):
            assert layer.weight is inside
        assert layer.weight is inside
    assert layer.weight.is_meta
    assert torch.equal(inside, weight)
    assert torch.allclose(layer(torch.ones(1, 3)), torch.ones(1, 3) @ weight.T + model(torch.zeros(1, 3)))


def test_a_load_that_fails_leaves_the_hook_and_no_weights() -> None:
    model, _ = offloaded()
    hook = model[0]._hf_hook
    hook.weights_map = {"weight": hook.weights_map["weight"]}  # the bias is lost
    with pytest.raises(KeyError, match="bias"), materialised(model):
        pytest.fail("opened")
    assert model[0]._hf_hook is hook
    assert model[0].weight.is_meta


def test_a_model_in_memory_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight
    with materialised(layer):
        assert layer.weight is weight
    assert layer.weight is weight


def with_hook(hook: Any, device: str = "cpu") -> nn.Module:
    layer = nn.Linear(2, 2, device=device)
    layer._hf_hook = hook
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("hook", "device"),
    [
        (SimpleNamespace(execution_device=1), "cuda:1"),
        (SimpleNamespace(execution_device="cuda:0"), "cuda:0"),
        (SimpleNamespace(execution_device=torch.device("cpu")), "cpu"),
        (
            SimpleNamespace(hooks=[SimpleNamespace(execution_device=None), SimpleNamespace(execution_device=2)]),
            "cuda:2",
        ),
        (SimpleNamespace(execution_device=None), "cpu"),
    ],
)
def test_the_device_a_module_runs_on(hook: Any, device: str) -> None:
    assert device_of(with_hook(hook)) == torch.device(device)


def test_a_module_that_nobody_brings_back() -> None:
    with pytest.raises(ModelError, match="on the meta device, which holds no numbers"):
        device_of(nn.Linear(2, 2, device="meta"))


class Block(nn.Module):
    """An MLP as TransformerLens shows it."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    @property
    def W_out(self) -> Any:  # noqa: N802 (TransformerLens's name)
        if isinstance(self.weight, Exception):
            raise self.weight
        return self.weight


def test_weights_that_cannot_be_read() -> None:
    quantised = Block(NotImplementedError("TransformerLens cannot read W_out because it is packed.\nMore."))
    assert output_shape(quantised, 3) is None
    with pytest.raises(ModelError, match=r"^layer 3: TransformerLens cannot read W_out because it is packed\.$"):
        output_weight(quantised, 3)
    with pytest.raises(ModelError, match="layer 0: W_out is on the meta device"):
        output_weight(Block(torch.ones(2, 2, device="meta")), 0)
    for read in (output_shape, output_weight):
        with pytest.raises(ModelError, match="layer 1: Block has no W_out"):
            read(Block(None), 1)


@pytest.mark.parametrize(
    ("device_map", "hidden"),
    [
        ({"a": 0, "b": "disk"}, True),
        ({"a": 0, "b": "cpu"}, True),
        ({"a": "cuda:0", "b": "cpu"}, True),
        ({"a": 0, "b": 1}, False),
        ({"a": "cpu", "b": "disk"}, False),
        ({"": torch.device("cpu")}, False),
    ],
)
def test_a_mixed_map_is_hidden_while_the_host_boots(device_map: Any, hidden: bool) -> None:
    model = nn.Linear(2, 2)
    model.hf_device_map = device_map

    def boot() -> None:
        with untold(model):
            assert hasattr(model, "hf_device_map") is not hidden
            raise RuntimeError("boot")

    with pytest.raises(RuntimeError, match="boot"):
        boot()
    assert model.hf_device_map is device_map


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    placement.require_accelerate("auto")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"device 'auto' .* needs the package accelerate; pip install"):
        placement.require_accelerate("auto")
