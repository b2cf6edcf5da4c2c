"""The fingerprint sees every parameter, and not how a class lays it out; nothing measured on a model is taken for
another one's."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuron_sparsity.ablation import removable_neurons
from neuron_sparsity.adapter import attach
from neuron_sparsity.blueprint import mlp_outputs
from neuron_sparsity.damage import damage
from neuron_sparsity.errors import ModelError
from neuron_sparsity.fingerprint import Sums, sums_of
from neuron_sparsity.plain import fingerprint, unwrapped
from neuron_sparsity.pruning import prune
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record
from tests.conftest import FAMILIES, N_CTX, N_VOCAB, transformer_lens_version

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FUSED = ("phi3", "bloom")  # query, key and value in one, gate and up too


@pytest.fixture(scope="module")
def make(tiny_hf_models: Any) -> Callable[..., Any]:
    """`make("phi3", tied=False)`: a tiny Hugging Face model, of the families of all tests and of more."""
    import transformers as hf

    def made(family: str, *, tied: bool = False) -> Any:
        if family in FAMILIES and not tied:
            return tiny_hf_models(family)
        sizes = {"vocab_size": N_VOCAB, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 0}
        sizes |= {"eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": tied}
        wide = {"num_hidden_layers": 2, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
        wide |= {"max_position_embeddings": N_CTX}
        config, kind = {
            "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
            "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM),
            "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM),
            "bloom": (hf.BloomConfig, hf.BloomForCausalLM),
        }[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(config(**sizes, **({"n_layer": 2} if family == "bloom" else wide))).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(8.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.requires_grad_(False)

    return made


@pytest.fixture(scope="module")
def boot(tiny_tokenizer: Any) -> Callable[[Any], Any]:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    return lambda model: bridge.boot_transformers("tiny", hf_model=model, tokenizer=tiny_tokenizer)


def of_plain(model: Any) -> str:
    return fingerprint(model, list(mlp_outputs(model).values()))


def nudged(parameter: torch.Tensor) -> None:
    """Change one number to its neighbour among the numbers of its type."""
    last = (-1,) * parameter.dim()
    parameter[last] = torch.nextafter(parameter[last], torch.tensor(math.inf))


# --- every parameter


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_any_number_of_any_parameter_shows(make: Any, family: str) -> None:
    model = make(family)
    expected, unseen = of_plain(model), []
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        nudged(parameter)
        unseen += [name] if of_plain(model) == expected else []
        parameter.copy_(before)
    assert of_plain(model) == expected
    assert not unseen


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm", "embed_tokens")


@pytest.mark.parametrize("kind", [*KINDS, "post_attention_layernorm", "model.norm", "lm_head"])
def test_a_changed_row_is_another_model_for_attach(make: Any, boot: Any, kind: str) -> None:
    model = make("llama")
    expected = of_plain(model)
    name = next(name for name, _ in model.named_parameters() if kind in name)
    model.get_parameter(name)[0].mul_(1.01)
    changed = of_plain(model)
    assert attach(boot(model)).info.fingerprint == changed != expected


def test_blocks_that_trade_their_attention_show(make: Any) -> None:
    model = make("llama")
    expected = of_plain(model)
    first, second = model.model.layers
    first.self_attn, second.self_attn = second.self_attn, first.self_attn
    assert of_plain(model) != expected


def test_a_changed_bias_of_a_fused_projection_shows_in_a_bridge(make: Any, boot: Any) -> None:
    """GPT-2 and BLOOM, whose bridges have it twice: as a view, and as a copy."""
    for family, name in (
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("bloom", "transformer.h.1.self_attention.query"),
    ):
        model = make(family)
        expected = attach(boot(make(family))).info.fingerprint
        nudged(next(parameter for key, parameter in model.named_parameters() if key.startswith(name)))
        assert attach(boot(model)).info.fingerprint == of_plain(unwrapped(model)) != expected


def test_what_is_changed_inside_of_a_bridge_shows(make: Any, boot: Any) -> None:
    """The query of BLOOM's bridge is a copy of a third of the fused matrix, and what the bridge runs."""
    bridge = boot(make("bloom"))
    expected = attach(bridge).info.fingerprint
    with torch.no_grad():
        nudged(bridge.blocks[1].attn.q.weight)
    assert attach(bridge).info.fingerprint != expected


# --- one model, whatever its class


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, False) for family in (*FAMILIES, "phi3")] + [("llama", True), ("gemma", True), ("bloom", True)],
)
def test_classes_agree(make: Any, boot: Any, family: str, tied: bool) -> None:
    expected = of_plain(make(family, tied=tied))
    bridge = boot(make(family, tied=tied))
    adapter = attach(bridge)
    assert adapter.info.fingerprint == expected
    assert attach(bridge, plain=False).info == adapter.info
    assert of_plain(unwrapped(bridge.original_model)) == expected
    bridge.enable_compatibility_mode(no_processing=True)
    assert attach(bridge).info.fingerprint == expected


def test_tied_and_untied_agree(make: Any) -> None:
    tied = make("llama", tied=True)
    untied = make("llama")
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.lm_head.weight})
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert of_plain(untied) == of_plain(tied)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "gemma"])
def test_a_hooked_transformer_agrees(make: Any, family: str) -> None:
    """Without processing. Gemma's stores its norms plus one, and a scaled embedding: there it is another one."""
    if transformer_lens_version() >= (4, 0):
        pytest.skip("HookedTransformer left with TransformerLens 4")
    model = make(family)
    found = attach(hooked(model, family)).info.fingerprint
    assert (found == of_plain(model)) is (family != "gemma")


def hooked(model: Any, family: str) -> Any:
    import transformer_lens
    from transformer_lens.pretrained import weight_conversions

    options: dict[str, Any] = {
        "neox": {"positional_embedding_type": "rotary", "rotary_dim": 2, "parallel_attn_mlp": True},
    }
    gated = {"n_key_value_heads": 2, "gated_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 8}
    options |= {"llama": gated, "gemma": gated}
    norm = "RMS" if family in ("llama", "gemma") else "LN"
    sizes = {"n_layers": 2, "d_model": 32, "d_mlp": 64, "n_heads": 4, "d_head": 8, "n_ctx": N_CTX, "d_vocab": N_VOCAB}
    kind = {"act_fn": "relu", "normalization_type": norm, "device": "cpu", "final_rms": norm == "RMS"}
    config = transformer_lens.HookedTransformerConfig(**sizes, **kind, **options.get(family, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = transformer_lens.HookedTransformer(config).eval()
    state = getattr(weight_conversions, f"convert_{family}_weights")(model, config)
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos", "unembed.b_U")) for name in missing)
    return made


def test_types_of_the_same_numbers_agree_and_rounded_ones_do_not(make: Any) -> None:
    model = make("llama").bfloat16()
    assert of_plain(model) == of_plain(copy.deepcopy(model).float()) == of_plain(copy.deepcopy(model).double())
    assert of_plain(model) != of_plain(make("llama"))


def test_what_float32_does_not_hold_shows_in_float64(make: Any) -> None:
    model = make("llama").double()
    expected = of_plain(model)
    model.lm_head.weight[0, 0] += 1e-12
    assert of_plain(model) != expected


def test_rows_that_no_position_reads_do_not_count(make: Any) -> None:
    model = make("opt")
    expected = of_plain(model)
    positions = model.model.decoder.embed_positions.weight
    positions[:2] = 7.0
    assert of_plain(model) == expected
    nudged(positions[2:3])
    assert of_plain(model) != expected


# --- weights that are computed when they are loaded


def test_folded_weights_may_round_otherwise_and_a_changed_row_shows(make: Any, boot: Any) -> None:
    found = []
    for change in (None, "rounding", "row"):
        bridge = boot(make("gpt2"))
        bridge.enable_compatibility_mode()
        query = bridge.blocks[0].attn.q.weight
        with torch.no_grad():
            if change == "rounding":
                for parameter in bridge.blocks[1].mlp.parameters():
                    parameter.mul_(1 + 2**-23)
                    parameter.mul_(1 - 2**-23)
                nudged(query)
            elif change == "row":
                query[0].mul_(1.1)
        found.append(attach(bridge).info.fingerprint)
    assert found[0] == found[1] != found[2]


# --- sums


def test_sums_by_hand() -> None:
    """1.0 is 0x3f800000, 0.5 is 0x3f000000; a negative pattern is that of a negative integer."""
    module = nn.Linear(2, 1, bias=False)
    one, half = 0x3F800000, 0x3F000000
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -0.5]]))
    minus_half = half - 2**31
    total = Sums((one + minus_half) % 2**64, (one**2 + minus_half**2) % 2**64, 1.25)
    assert sums_of(module, set()) == total
    assert total.told(exact=False) == "1.25"
    done: set[int] = set()
    assert sums_of(nn.ModuleList([module, module]), done) == total
    assert sums_of(module, done) == Sums()


@pytest.mark.parametrize("shape", [(), (1,), (300, 1000), (1, 200_000), (200_000,), (0, 5), (7, 63, 300)])
def test_chunks_and_layouts_do_not_show(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pattern = [int(x) for x in values.contiguous().view(torch.int32).flatten().tolist()] if values.numel() else []
    expected = (sum(pattern) % 2**64, sum(x * x for x in pattern) % 2**64)
    for view in (values, values.T if values.dim() == 2 else values, values.flip(0) if values.dim() else values):
        module = nn.Module()
        module.weight = nn.Parameter(view)
        assert sums_of(module, set())[:2] == expected


def test_weights_on_the_meta_device_are_refused() -> None:
    with pytest.raises(ModelError, match="parameter weight is on the meta device, which holds no numbers"):
        sums_of(nn.Linear(2, 2, device="meta"), set())


# --- nothing measured on one model is taken for another's


@pytest.fixture(scope="module")
def case(make: Any, boot: Any, own_windows: Any) -> dict[str, Any]:
    """A model, and the same one with an adapter merged into its query and value."""
    changed = make("llama")
    generator = torch.Generator().manual_seed(1)
    for layer in changed.model.layers:
        for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight):
            size = float(matrix.std())
            left, right = (torch.randn(n, 2, generator=generator) for n in matrix.shape)
            matrix.add_(0.3 * size * left @ right.T)
    first, second = attach(boot(make("llama"))), attach(boot(copy.deepcopy(changed)))
    windows = own_windows(first.model, 16)
    return {
        "first": first,
        "second": second,
        "plain": changed,
        "windows": windows,
        "rankings": [rank(record(adapter, windows)) for adapter in (first, second)],
    }


def test_results_of_the_first_model_are_refused_on_the_second(case: dict[str, Any]) -> None:
    ranking, windows = case["rankings"][0], case["windows"]
    result = removable_neurons(case["first"], windows, ranking, p_percent=20.0, replacement="zero")
    assert result.n_removable > 0
    with pytest.raises(ValueError, match=r"the ranking was made on .* with other weights; record this model first"):
        removable_neurons(case["second"], windows, ranking, p_percent=20.0)
    with pytest.raises(ValueError, match="with other weights"):
        prune(case["plain"], result)
    with pytest.raises(ValueError, match="with other weights"):
        damage(case["second"], windows, result)
    statistics = [ranking_of.model for ranking_of in case["rankings"]]
    assert replace(statistics[0], fingerprint="") == replace(statistics[1], fingerprint="")


def test_passes_that_are_kept_of_the_first_model_are_not_taken_up_by_the_second(
    case: dict[str, Any], tmp_path: Path
) -> None:
    ranking, windows = case["rankings"][1], case["windows"]
    options = {"p_percent": 20.0, "replacement": "zero"}
    alone = removable_neurons(case["second"], windows, ranking, **options)
    same_order = replace(ranking, model=case["first"].info)
    removable_neurons(case["first"], windows, same_order, folder=tmp_path, **options)
    kept = next(tmp_path.glob("*.json"))
    assert case["first"].info.fingerprint in json.loads(kept.read_text())["question"]["model"]
    found = removable_neurons(case["second"], windows, ranking, folder=tmp_path, **options)
    assert (found.ppl_dense, found.removable) == (alone.ppl_dense, alone.removable)
