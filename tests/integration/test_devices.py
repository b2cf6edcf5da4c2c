"""Layers on several devices: pretended ones, which raise as soon as two of them meet in an operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from neuron_sparsity.adapter import MLPAdapter, attach
from tests.conftest import transformer_lens_version
from tests.elsewhere import Elsewhere, pretended
from tests.integration.measured import assert_same, measure

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated:UserWarning"),  # what torch calls on a subclass
]
ZERO, ONE, TWO = (torch.device(f"ipu:{index}") for index in range(3))
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}
# The unembedding stands neither where the tokens go in nor where the last layer is.
MAPS = {
    "llama": {"model.embed_tokens": ZERO, "model.rotary_emb": ZERO, "model.norm": ONE, "lm_head": TWO},
    "gpt2": {"transformer.wte": ZERO, "transformer.wpe": ZERO, "transformer.ln_f": ONE, "lm_head": TWO},
}


@pytest.fixture
def devices() -> Iterator[None]:
    with pretended():
        yield


@pytest.fixture
def spread(devices: None, tiny_hf_models: Any, tiny_tokenizer: Any, tmp_path: Any) -> Any:
    """`spread(family, second="ipu:1")`: a bridge with its first layer on ipu:0 and its second one where you say."""
    accelerate = pytest.importorskip("accelerate", reason="pip install -e '.[large]'")
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge

    def make(family: str, second: Any = ONE, **changes: Any) -> Any:
        layers = {f"{LAYERS[family]}.0": ZERO, f"{LAYERS[family]}.1": second}
        hf_model = accelerate.dispatch_model(
            tiny_hf_models(family), MAPS[family] | layers | changes, offload_dir=tmp_path, force_hooks=True
        )
        return bridge.boot_transformers(f"tiny-{family}-test", hf_model=hf_model, tokenizer=tiny_tokenizer)

    return make


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("gpt2", True), ("llama", False)])
def test_every_measurement(tiny_bridge: Any, own_windows: Any, spread: Any, family: str, plain: bool) -> None:
    kept = tiny_bridge(family)
    windows = own_windows(kept, 2, window=12)
    adapter = attach(spread(family), plain=plain)
    assert (adapter.plain is not None) is plain
    assert adapter.devices == [ZERO, ONE, TWO]
    assert [norm.device for norm in adapter.w_norms] == [ZERO, ONE]
    assert adapter.w_out(1).device == ONE
    assert adapter.final_residual(windows.tokens.long()).device == TWO
    assert_same(measure(adapter, windows), measure(attach(kept, plain=plain), windows), rel=1e-4)


@pytest.mark.skipif(transformer_lens_version() < (4, 0), reason="TransformerLens 3 runs no offloaded model")
def test_devices_and_disk(tiny_bridge: Any, own_windows: Any, spread: Any) -> None:
    """What waits on disk runs on the first device."""
    kept = tiny_bridge("llama")
    windows = own_windows(kept, 2, window=12)
    adapter = attach(spread("llama", "disk", lm_head="disk"))
    assert adapter.offloaded
    assert adapter.devices == [ZERO]
    assert adapter.w_out(1).device == ZERO
    assert_same(measure(adapter, windows), measure(attach(kept), windows))


def move(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = tensor.to(device)  # type: ignore[assignment]


def test_hooked_transformer(devices: None, tiny_hooked: Any, own_windows: Any) -> None:
    """As `n_devices=2` places it: half of the blocks each, what comes after them with the last."""
    kept, model = tiny_hooked(), tiny_hooked()
    windows = own_windows(kept, 2, window=12)
    model.cfg.device, model.cfg.n_devices = str(ZERO), 2
    for module in (model.embed, model.pos_embed, model.blocks[0]):
        move(module, ZERO)
    for module in (model.blocks[1], model.ln_final, model.unembed):
        move(module, ONE)
    adapter = attach(model)
    assert adapter.devices == [ZERO, ONE]
    assert_same(measure(adapter, windows), measure(kept, windows))


# --- the pretence itself


def test_devices_that_meet_raise(devices: None) -> None:
    here, there = torch.ones(2, device=ZERO), torch.ones(2, device=ONE)
    assert isinstance(here, Elsewhere)
    for meet in (lambda: here + there, lambda: here + torch.ones(2), lambda: torch.cat([here, there]), here.numpy):
        with pytest.raises((RuntimeError, TypeError), match=r"tensors on (cpu|ipu:0) and ipu|can't convert ipu:0"):
            meet()
    assert (here + there.to(here)).tolist() == [2.0, 2.0]
    assert type((here + there.to(ZERO)).cpu()) is torch.Tensor


def test_an_adapter_that_forgets_the_move_is_caught(spread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLPAdapter, "b_out", lambda self, layer: torch.zeros(32))
    with pytest.raises(RuntimeError, match="tensors on cpu and ipu:0"):
        attach(spread("llama"))
