"""Models whose weights wait in CPU memory or on disk until their layer runs: the same numbers as in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_sparsity.adapter import attach, load_model
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import ModelError
from neuron_sparsity.model_info import WeightFacts
from neuron_sparsity.perplexity import default_batch_size, perplexity
from neuron_sparsity.placement import is_offloaded
from neuron_sparsity.sparsity import apply_thresholds, cett_ppl_sparsity, sparsify
from tests.conftest import transformer_lens_version
from tests.integration.measured import Measured, assert_same, measure

accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's: pip install -e '.[large]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
offloads = pytest.mark.skipif(transformer_lens_version() < (4, 0), reason="TransformerLens 3 runs no offloaded model")

adapter_module = sys.modules["neuron_sparsity.adapter"]
perplexity_module = sys.modules["neuron_sparsity.perplexity"]  # as an attribute of the package it is the function
FAMILIES = ("llama", "gpt2", "opt")
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_hf_models: Any, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """`folder(family)`: a tiny model in Hugging Face format."""

    def save(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"offload-{family}"
        if not path.exists():
            tiny_hf_models(family).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def windows(own_windows: Any, tiny_bridge: Any) -> Callable[[str], Windows]:
    made: dict[str, Windows] = {}

    def make(family: str) -> Windows:
        if family not in made:
            made[family] = own_windows(tiny_bridge(family), 4, window=24)
        return made[family]

    return make


@pytest.fixture(scope="module")
def in_memory(tiny_bridge: Any, windows: Any) -> Callable[[str], Measured]:
    made: dict[str, Measured] = {}

    def make(family: str) -> Measured:
        if family not in made:
            made[family] = measure(tiny_bridge(family), windows(family))
        return made[family]

    return make


def split_map(folder: Path, family: str) -> dict[str, str]:
    """The first layer in memory, the second and the unembedding on disk, the rest in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = LAYERS[family]
    names = {name.split(f"{layers}.")[0] for name, _ in model.named_parameters() if layers in name}
    assert names
    whole = {name.rsplit(".", 1)[0]: "cpu" for name, _ in model.named_parameters() if layers not in name}
    buffers = {name.rsplit(".", 1)[0]: "cpu" for name, _ in model.named_buffers() if layers not in name}
    return whole | buffers | {f"{layers}.0": "cpu", f"{layers}.1": "disk", "lm_head": "disk"}


def weight(model: Any, name: str) -> torch.Tensor:
    """A parameter of the Hugging Face model inside a bridge, as it stands now."""
    return next(
        p for key, p in model.original_model.named_parameters() if key.replace("._original_component", "") == name
    )


@offloads
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_between_memory_and_disk(family: str, folder: Any, windows: Any, in_memory: Any) -> None:
    model = load_model(folder(family), device=split_map(folder(family), family))
    adapter = attach(model, name=f"tiny-{family}-test")
    assert adapter.offloaded
    assert adapter.devices == [torch.device("cpu")]
    assert adapter.forward.startswith("Hugging Face")
    assert_same(measure(adapter, windows(family)), in_memory(family))
    assert weight(model, "lm_head.weight").is_meta, "what was brought is given up again"


@offloads
@pytest.mark.parametrize(("how", "family"), [("disk", "gpt2"), ("cpu_offload", "gpt2"), ("after booting", "opt")])
def test_the_other_ways_to_put_weights_away(
    how: str,
    family: str,
    folder: Any,
    windows: Any,
    in_memory: Any,
    tiny_bridge: Any,
    tiny_hf_models: Any,
    tiny_tokenizer: Any,
) -> None:
    """Both have biases, and GPT-2 Conv1D; in `"after booting"` the bridge keeps what stood there when it was booted."""
    from transformer_lens.model_bridge import TransformerBridge

    if how == "disk":
        model = load_model(folder(family), device={"": "disk"})
    elif how == "cpu_offload":
        hf_model = accelerate.cpu_offload(tiny_hf_models(family))
        model = TransformerBridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tiny_tokenizer)
    else:
        model = tiny_bridge(family)
        accelerate.cpu_offload(model.original_model)
    adapter = attach(model, name=f"tiny-{family}-test")
    assert adapter.offloaded
    assert not any(adapter.w_out(layer).is_meta for layer in range(2))
    bias = adapter.b_out(0)
    assert bias is not None
    assert not bias.is_meta
    assert_same(measure(adapter, windows(family)), in_memory(family))


@offloads
def test_the_bridge_itself(folder: Any, windows: Any, in_memory: Any) -> None:
    adapter = attach(load_model(folder("llama"), device={"": "disk"}), name="tiny-llama-test", plain=False)
    assert (adapter.plain, adapter.forward) == (None, "TransformerBridge")
    assert_same(measure(adapter, windows("llama")), in_memory("llama"), rel=1e-4)


@offloads
def test_bfloat16(folder: Any, windows: Any) -> None:
    """The checkpoint is float32: what is read from it is converted as a loaded model is."""
    kept, away = (
        attach(load_model(folder("llama"), dtype="bfloat16", device=device), name="same")
        for device in ("cpu", {"": "disk"})
    )
    assert away.info == kept.info
    assert away.w_out(1).dtype == torch.bfloat16
    assert_same(measure(away, windows("llama")), measure(kept, windows("llama")))


def test_a_plain_hugging_face_model(folder: Any, windows: Any, tiny_bridge: Any, tiny_hf_models: Any) -> None:
    from transformers import AutoModelForCausalLM

    tokens = windows("llama").tokens.long()
    result = cett_ppl_sparsity(tiny_bridge("llama"), windows("llama"), p_percent=10.0, tolerance_percent=1.0)
    logits = []
    away = AutoModelForCausalLM.from_pretrained(folder("llama"), device_map={"": "disk"}).eval()
    for hf_model in (tiny_hf_models("llama"), away):
        with apply_thresholds(hf_model, result), torch.no_grad():
            logits.append(hf_model(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert float((away(tokens).logits - logits[1]).abs().max()) > 1e-3


def loads(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often each parameter is read from where it waits."""
    from accelerate.utils import OffloadedWeightsLoader

    counts: dict[str, int] = {}
    read = OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> Any:
        counts[key] = counts.get(key, 0) + 1
        return read(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return counts


@offloads
def test_each_weight_is_read_once_besides_the_passes(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down projections too: they are not read once for their norms and once more for the fingerprint."""
    model = load_model(folder("llama"), device={"": "disk"})
    counts = loads(model, monkeypatch)
    before, after, check = {}, {}, adapter_module._check_layers

    def facts(**options: Any) -> WeightFacts:
        before.update(counts)
        return WeightFacts(**options)

    def checked(adapter: Any) -> Any:
        found = check(adapter)
        after.update(counts)
        return found

    monkeypatch.setattr(adapter_module, "WeightFacts", facts)
    monkeypatch.setattr(adapter_module, "_check_layers", checked)
    adapter = attach(model)
    assert len(after) == len(list(model.original_model.parameters())) == 21
    assert {name: count - before[name] for name, count in after.items()} == dict.fromkeys(after, 1)
    counts.clear()
    adapter.w_out(1)
    assert counts == {"model.layers.1.mlp.down_proj.weight": 1}


@offloads
def test_the_unembedding_is_read_once_a_batch(folder: Any, windows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = attach(load_model(folder("llama"), device={"": "disk"}))
    counts = loads(adapter.model, monkeypatch)
    monkeypatch.setattr(perplexity_module, "_LOGIT_FLOATS", 1)  # chunks of 64 positions
    perplexity(adapter, windows("llama"), batch_size=4)
    assert counts["lm_head.weight"] == 1
    assert counts["model.layers.0.mlp.down_proj.weight"] == 1


@offloads
def test_batches_are_larger_where_every_batch_reads_the_weights(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "_free_bytes", lambda device: 1e12)
    kept, away = (attach(load_model(folder("llama"), device=device)) for device in ("cpu", {"": "disk"}))
    assert default_batch_size(away, 64) >= 4 * default_batch_size(kept, 64)


@offloads
def test_nothing_is_left_after_an_error(folder: Any, windows: Any) -> None:
    adapter = attach(load_model(folder("llama"), device={"": "disk"}))
    before = perplexity(adapter, windows("llama")).ppl
    hooks = [vars(module).get("_hf_hook") for module in adapter.model.original_model.modules()]
    with pytest.raises(RuntimeError, match="stop"), adapter.unembedding():
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), sparsify(adapter, [0.3, 0.3]):
        raise RuntimeError("stop")
    assert [vars(module).get("_hf_hook") for module in adapter.model.original_model.modules()] == hooks
    assert weight(adapter.model, "lm_head.weight").is_meta
    assert is_offloaded(adapter.model.original_model)
    assert perplexity(adapter, windows("llama")).ppl == before


def test_auto(folder: Any, in_memory: Any, windows: Any) -> None:
    adapter = attach(load_model(folder("opt"), device="auto"), name="tiny-opt-test")
    assert adapter.info == in_memory("opt").stats.model
    assert perplexity(adapter, windows("opt")).ppl == pytest.approx(in_memory("opt").ppl, rel=1e-5)


@offloads
def test_the_text_functions_of_the_bridge_work(folder: Any) -> None:
    """They put tokens on `cfg.device`, which TransformerLens reads off an offloaded weight: the meta device."""
    model = load_model(folder("llama"), device={"": "disk"})
    assert torch.device(model.cfg.device) == torch.device("cpu")
    assert model.to_tokens("the harbour").device == torch.device("cpu")


def test_a_skeleton_is_refused(tiny_tokenizer: Any, folder: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder("llama")))
    model = TransformerBridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tiny_tokenizer)
    with pytest.raises(ModelError, match="meta device, which holds no numbers"):
        attach(model)


@pytest.mark.skipif(transformer_lens_version() >= (4, 0), reason="TransformerLens 4 runs offloaded models")
def test_what_the_host_cannot_run_is_refused(folder: Any, tiny_hf_models: Any, tiny_tokenizer: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    with pytest.raises(
        ModelError, match=r"TransformerLens 3\S+ cannot take .* unsupported offload targets: \['disk'\]"
    ):
        load_model(folder("llama"), device={"": "disk"})
    hf_model = accelerate.cpu_offload(tiny_hf_models("llama"))
    model = TransformerBridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tiny_tokenizer)
    with pytest.raises(ModelError, match=r"TransformerLens 3\S+ cannot run a model whose weights are away"):
        attach(model)


def test_without_accelerate(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sparsity.placement.find_spec", lambda name: None)
    for device in ("auto", {"": "cpu"}):
        with pytest.raises(ModelError, match="needs the package accelerate"):
            load_model(folder("llama"), device=device)
