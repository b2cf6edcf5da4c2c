"""Neurons taken out of the weights: the loss is the ablated one, in memory and read back by plain transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from neuron_sparsity.ablation import ablate, removable_neurons
from neuron_sparsity.adapter import attach
from neuron_sparsity.damage import damage
from neuron_sparsity.errors import ModelError, RunFolderError
from neuron_sparsity.perplexity import perplexity
from neuron_sparsity.pruning import FORMS, prune
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record

FAMILIES = ("llama", "gpt2", "opt", "neox")
D_MODEL, D_MLP = 32, 64
PER_NEURON = {"llama": 3 * D_MODEL, "gpt2": 2 * D_MODEL + 1, "opt": 2 * D_MODEL + 1, "neox": 2 * D_MODEL + 1}
EVEN = [(0, neuron) for neuron in range(1, 64, 5)] + [(1, neuron) for neuron in range(2, 63, 5)]
UNEVEN = [*EVEN, (1, 0), (1, 20), (1, 63)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def hf_loss(model: Any, tokens: Tensor) -> float:
    """Mean next-token loss in float64, from the model's own logits."""
    with torch.no_grad():
        logits = model(tokens).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def plainly(folder: Path) -> Any:
    """What a stranger loads: nothing of ours, and every tensor has its place."""
    model, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture(scope="module")
def means() -> Tensor:
    return torch.randn(2, D_MLP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any, tiny_hf_models: Any, means: Tensor
) -> SimpleNamespace:
    """A family as bridge and as Hugging Face model, and the losses of its ablations, measured on the bridge."""
    bridge = tiny_model(request.param)
    windows = own_windows(bridge, 16)
    losses = {}
    for replacement in ("zero", "mean"):
        for named, pairs in (("even", EVEN), ("uneven", UNEVEN)):
            with ablate(bridge, pairs, replacement=replacement, means=means):
                found = perplexity(bridge, windows)
            losses[named, replacement] = math.log(found.ppl)
    model = tiny_hf_models(request.param)
    tokens = windows.tokens.long()
    return SimpleNamespace(
        family=request.param, bridge=bridge, model=model, windows=windows, tokens=tokens, losses=losses, means=means
    )


@pytest.mark.parametrize("replacement", ["zero", "mean"])
@pytest.mark.parametrize("form", ["cut", "padded", "zeroed"])
@pytest.mark.parametrize("pairs", ["even", "uneven"])
def test_the_loss_is_the_ablated_one_in_memory_and_from_disk(
    case: SimpleNamespace, pairs: str, form: str, replacement: str, tmp_path: Path
) -> None:
    before = bits(case.model)
    expected = case.losses[pairs, replacement]
    assert abs(expected - hf_loss(case.model, case.tokens)) > 0.01
    neurons = EVEN if pairs == "even" else UNEVEN
    pruned = prune(case.model, neurons, replacement=replacement, means=case.means, form=form)
    assert hf_loss(pruned.model, case.tokens) == pytest.approx(expected, abs=1e-4)
    assert same_bits(bits(case.model), before)
    assert pruned.neurons == tuple(sorted(neurons))
    assert pruned.n_parameters == count(pruned.model)
    assert pruned.n_parameters_before == count(case.model)
    if pairs == "uneven" and form == "cut":
        with pytest.raises(ModelError, match=r"layers keep 48 to 51 neurons.*form='padded' or 'zeroed' can be saved"):
            pruned.save(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    again = plainly(pruned.save(tmp_path / "out"))
    assert same_bits(bits(again), bits(pruned.model))
    assert hf_loss(again, case.tokens) == pytest.approx(expected, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_counted_exactly(case: SimpleNamespace, form: str) -> None:
    """13 neurons go from each layer, three more from the second; a neuron is its rows, columns and their biases."""
    each = PER_NEURON[case.family]
    even, uneven = (prune(case.model, pairs, form=form) for pairs in (EVEN, UNEVEN))
    gone, zeros = {
        "auto": (26 * each, 3 * each),
        "cut": (29 * each, 0),
        "padded": (26 * each, 3 * each),
        "zeroed": (0, 29 * each),
    }[form]
    assert (uneven.n_parameters_removed, uneven.n_parameters_zeroed, uneven.n_parameters_added) == (gone, zeros, 0)
    assert count(case.model) - count(uneven.model) == gone
    assert even.n_parameters_removed + even.n_parameters_zeroed == 26 * each
    assert even.n_parameters_zeroed == (26 * each if form == "zeroed" else 0)
    assert (even.form, uneven.form) == (("cut", "padded") if form == "auto" else (form, form))
    assert uneven.widths == {0: D_MLP if form == "zeroed" else 51, 1: {"cut": 48, "zeroed": 64}.get(form, 51)}


def test_zeros_are_where_the_removed_neurons_were(case: SimpleNamespace) -> None:
    pruned = prune(case.model, UNEVEN, form="zeroed").model
    old, new = bits(case.model), bits(pruned)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert {name.rpartition(".")[2] for name in changed} <= {"weight", "bias"}
    assert len(changed) == 2 * 3  # gate, up and down; or up, its bias and down
    for name in changed:
        differs = old[name] != new[name]
        assert not new[name][differs].any()


def test_what_a_bridge_holds_is_pruned_and_the_bridge_is_as_before(
    case: SimpleNamespace, tmp_path: Path, hooks_on: Callable[[Any], int]
) -> None:
    dense, hooks = perplexity(case.bridge, case.windows).ppl, hooks_on(case.bridge)
    before = bits(case.bridge.original_model)
    for model in (case.bridge, attach(case.bridge), attach(case.bridge, plain=False)):
        pruned = prune(model, UNEVEN, replacement="mean", means=case.means)
        assert hf_loss(pruned.model, case.tokens) == pytest.approx(case.losses["uneven", "mean"], abs=1e-4)
    assert same_bits(bits(case.bridge.original_model), before)
    assert (perplexity(case.bridge, case.windows).ppl, hooks_on(case.bridge)) == (dense, hooks)
    again = plainly(pruned.save(tmp_path / "out"))
    assert hf_loss(again, case.tokens) == pytest.approx(case.losses["uneven", "mean"], abs=1e-4)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the harbour")["input_ids"] == case.bridge.tokenizer("the harbour")["input_ids"]
    straight = prune(case.model, UNEVEN, replacement="mean", means=case.means)
    assert same_bits(bits(straight.model), bits(pruned.model))


def test_a_pruned_model_can_be_measured_and_pruned_again(case: SimpleNamespace, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    once = prune(case.model, EVEN, out=tmp_path / "once")
    assert once.form == "cut"
    bridge = TransformerBridge.boot_transformers(
        "tiny-pruned", hf_model=plainly(tmp_path / "once"), tokenizer=case.bridge.tokenizer
    )
    assert attach(bridge).info.d_mlp == 51
    assert math.log(perplexity(bridge, case.windows).ppl) == pytest.approx(case.losses["even", "zero"], abs=1e-4)
    twice = prune(plainly(tmp_path / "once"), [(0, 0), (1, 50)])
    both = prune(case.model, [*EVEN, (0, 0), (1, 63)])
    assert same_bits(bits(twice.model), bits(both.model))


def test_a_context_shorter_than_the_probe(tiny_hf_models: Any) -> None:
    config = copy.deepcopy(tiny_hf_models("gpt2").config)
    config.n_positions = 5
    model = hf.GPT2LMHeadModel(config).eval()
    assert prune(model, EVEN).form == "cut"


def test_layers_of_different_widths_cannot_be_ablated_and_the_error_says_what_can(tiny_hf_models: Any) -> None:
    cut = prune(tiny_hf_models("llama"), UNEVEN, form="cut").model
    with (
        pytest.raises(ValueError, match=r"layers differ in width .*; prune with form='zeroed' to ablate what is left"),
        ablate(cut, [(0, 0)]),
    ):
        pass
    zeroed = prune(tiny_hf_models("llama"), UNEVEN, form="zeroed").model
    with ablate(zeroed, [(0, 0)]):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_as_wide_as_the_residual_stream(family: str, tiny_hf_models: Any, means: Tensor) -> None:
    config = copy.deepcopy(tiny_hf_models(family).config)
    setattr(config, {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size"), D_MODEL)
    torch.manual_seed(0)
    model = type(tiny_hf_models(family))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    down = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "neox": "mlp.dense_4h_to_h"}[family]
    downs = [module for name, module in model.named_modules() if name.endswith(down)]
    pairs, fill, tokens = [(0, 3), (0, 31), (1, 3), (1, 8)], means[:, :D_MODEL].float(), torch.arange(24).reshape(2, 12)
    handles = []
    for row, module in enumerate(downs):
        gone = [neuron for layer, neuron in pairs if layer == row]

        def put(module: Any, args: Any, row: int = row, gone: Any = gone) -> Any:
            z = args[0].clone()
            z[..., gone] = fill[row, gone]
            return (z, *args[1:])

        handles.append(module.register_forward_pre_hook(put))
    expected = hf_loss(model, tokens)
    for handle in handles:
        handle.remove()
    assert abs(expected - hf_loss(model, tokens)) > 1e-3, "a removal that changes nothing proves nothing"
    with ablate(model, pairs, means=fill):
        assert hf_loss(model, tokens) == pytest.approx(expected, abs=1e-5)
    pruned = prune(model, pairs, means=fill)
    assert pruned.form == "cut"
    assert hf_loss(pruned.model, tokens) == pytest.approx(expected, abs=1e-4)
    again = prune(prune(model, pairs[:2], form="cut").model, [(1, 3), (1, 8)])
    assert hf_loss(again.model, tokens) == pytest.approx(hf_loss(prune(model, pairs).model, tokens), abs=1e-5)


def test_a_form_that_cannot_be_had_is_named(tiny_hf_models: Any) -> None:
    model = tiny_hf_models("llama")
    padded = prune(model, [(0, 1)], form="padded")
    assert (padded.form, padded.reason) == ("zeroed", "padded was asked for, and a layer keeps all of its neurons")
    assert prune(model, EVEN, form="padded").reason == "asked for"
    assert prune(model, [(0, 1)], form="zeroed").reason == "asked for"


def test_pruning_zeros_changes_nothing_bit_for_bit(case: SimpleNamespace) -> None:
    once = prune(case.model, UNEVEN, form="zeroed")
    twice = prune(once.model, UNEVEN, form="zeroed")
    with torch.no_grad():
        assert torch.equal(once.model(case.tokens).logits, twice.model(case.tokens).logits)
    assert same_bits(bits(once.model), bits(twice.model))


def test_untouched_weights_share_their_memory_and_nothing_else(case: SimpleNamespace) -> None:
    pruned = prune(case.model, [(0, 3)], form="cut").model
    old = {name: tensor.data_ptr() for name, tensor in case.model.state_dict().items()}
    own = [name for name, tensor in pruned.state_dict().items() if tensor.data_ptr() != old[name]]
    assert 0 < len(own) <= 4
    assert not {id(module) for module in pruned.modules()} & {id(module) for module in case.model.modules()}
    assert not {id(parameter) for parameter in pruned.parameters()} & {id(p) for p in case.model.parameters()}
    assert pruned.config is not case.model.config


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_a_layer_that_keeps_none_is_left_with_one_neuron_of_zeros(
    case: SimpleNamespace, replacement: str, tmp_path: Path
) -> None:
    options = {"replacement": replacement, "means": case.means}
    every = [(block, neuron) for block in (0, 1) for neuron in range(D_MLP)]
    for pairs, widths in ((every[:D_MLP], {0: 1, 1: 64}), (every, {0: 1, 1: 1})):
        with ablate(case.bridge, pairs, **options):
            expected = math.log(perplexity(case.bridge, case.windows).ppl)
        cut, auto = prune(case.model, pairs, form="cut", **options), prune(case.model, pairs, **options)
        assert cut.widths == widths
        assert cut.n_parameters_removed + cut.n_parameters_zeroed == len(pairs) * PER_NEURON[case.family]
        assert cut.n_parameters == count(cut.model)
        for pruned in (cut, auto, SimpleNamespace(model=plainly(auto.save(tmp_path / f"{len(pairs)}")))):
            assert hf_loss(pruned.model, case.tokens) == pytest.approx(expected, abs=1e-4)
        assert auto.form == ("cut" if pairs is every else "zeroed")


# A result of `removable_neurons`.


@pytest.fixture(scope="module", params=["llama", "opt"])
def removal(request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any, tiny_hf_models: Any) -> SimpleNamespace:
    bridge = tiny_model(request.param)
    stats = record(bridge, own_windows(bridge, 32))
    windows = own_windows(bridge, 32, seed=1)
    model = tiny_hf_models(request.param)
    results = {
        kind: removable_neurons(bridge, windows, rank(stats, scope="layer"), p_percent=5.0, replacement=kind)
        for kind in ("zero", "mean")
    }
    return SimpleNamespace(
        family=request.param, bridge=bridge, model=model, stats=stats, windows=windows, results=results
    )


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_a_result_brings_its_neurons_its_replacement_and_what_it_was_measured_on(
    removal: SimpleNamespace, replacement: str, tmp_path: Path
) -> None:
    result = removal.results[replacement]
    assert result.n_removable > 2
    means = removal.stats.mean_activation
    pruned = prune(removal.model, result, means=means, out=tmp_path / "out", tokenizer=removal.bridge.tokenizer)
    again = plainly(tmp_path / "out")
    searched = removal.windows.split(0.5)[0].tokens.long()
    assert hf_loss(again, searched) == pytest.approx(math.log(result.ppl_ablated), abs=1e-4)
    assert (pruned.replacement, set(pruned.neurons)) == (replacement, set(result.removable))
    told = json.loads((tmp_path / "out/pruning.json").read_text())
    assert told["schema"] == 1
    assert told["neurons"] == [list(pair) for pair in sorted(result.removable)]
    assert told["n_parameters"] == count(again)
    assert told["source"] == {
        "name": result.model.name,
        "architecture": type(removal.model).__name__,
        "fingerprint": result.model.fingerprint,
    }
    assert told["measured"]["ppl_ablated"] == result.ppl_ablated
    assert told["measured"]["corpus"] == result.corpus
    assert told["provenance"]["versions"]["neuron_sparsity"]
    card = (tmp_path / "out/README.md").read_text()
    for said in (
        f"{result.n_removable} of its 128 MLP neurons",
        f"{result.ppl_increase_percent:+.3f} %",
        f"{result.heldout['ppl_increase_percent']:+.3f} %",
        f"{result.control['ppl_increase_percent']:+.3f} %",
        f"{result.corpus['n_tokens']:,} tokens in windows of 32",
        f"| now | {count(again):,} |",
        f"never saw, 5 % {'holds' if result.heldout['holds'] else 'does not hold'}.",
        "neuron_sparsity ",
    ):
        assert said in card, said
    biased = removal.family == "llama" and replacement == "mean"
    width = again.config.intermediate_size if removal.family == "llama" else 0
    assert pruned.n_parameters_added == (2 * (2 * width + D_MODEL) if biased else 0)
    assert bool(getattr(again.config, "mlp_bias", False)) == biased


def test_a_result_of_another_model_is_refused(removal: SimpleNamespace, tiny_hf_models: Any) -> None:
    other = tiny_hf_models(removal.family, seed=1)
    with pytest.raises(ValueError, match=r"found on tiny-.* with other weights \(as loaded\); prune the model that"):
        prune(other, removal.results["zero"])
    with pytest.raises(ValueError, match="found with zero replacement, not 'mean'; leave out replacement="):
        prune(removal.model, removal.results["zero"], replacement="mean")


def test_means_of_other_text_are_refused(removal: SimpleNamespace, own_windows: Any) -> None:
    result, means = removal.results["mean"], removal.stats.mean_activation
    said = "means are not those that the rise was measured with; give those of its ranking: means=ranking.mean_act"
    one = means.clone()
    one[1, 5] += 0.1 * means.norm()
    for other in (record(removal.bridge, removal.windows).mean_activation, means + 0.01, one, means.flip(1)):
        with pytest.raises(ValueError, match=said):
            prune(removal.model, result, means=other)
    with pytest.raises(ValueError, match=said):
        damage(removal.bridge, removal.windows, result, means=means + 0.01)
    again = record(removal.bridge, own_windows(removal.bridge, 32), batch_size=3).mean_activation
    assert not torch.equal(again, means), "with the same numbers, nothing is said of rounding"
    for same in (again, means.float(), means.half()):
        assert prune(removal.model, result, means=same).replacement == "mean"
    assert removal.results["zero"].means_sketch == ()
    older = dataclasses.replace(result, means_sketch=())  # files before this was kept
    assert prune(removal.model, older, means=means + 0.01).replacement == "mean"


# What a configuration offers.


def tiny(name: str, **options: Any) -> Any:
    """A random model of another family, of the same sizes."""
    common = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**common | options)).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    return model


GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
TOKENS = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))


def replaced_loss(model: Any, path: str, values: Tensor) -> float:
    """The loss with the post-activations of `EVEN` replaced by hooks on the down projections."""
    handles = []
    for layer in (0, 1):
        gone = torch.zeros(values.shape[1], dtype=torch.bool)
        gone[[neuron for block, neuron in EVEN if block == layer]] = True

        def before(module: Any, args: Any, gone: Tensor = gone, layer: int = layer) -> Any:
            return (torch.where(gone, values[layer].to(args[0]), args[0]), *args[1:])

        handles.append(model.get_submodule(path.format(layer)).register_forward_pre_hook(before))
    try:
        return hf_loss(model, TOKENS)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "options", "path", "setting"),
    [
        ("Qwen2", GATED, "model.layers.{}.mlp.down_proj", "intermediate_size"),
        ("Phi3", GATED, "model.layers.{}.mlp.down_proj", "intermediate_size"),
        ("Gemma2", GATED | {"head_dim": 8}, "model.layers.{}.mlp.down_proj", "intermediate_size"),
        ("Falcon", {"ffn_hidden_size": 64}, "transformer.h.{}.mlp.dense_4h_to_h", "ffn_hidden_size"),
        ("Bloom", {}, "transformer.h.{}.mlp.dense_4h_to_h", None),
    ],
)
def test_other_families_take_the_form_that_their_configuration_has(
    name: str, options: dict[str, Any], path: str, setting: str | None, tmp_path: Path
) -> None:
    """Gate and up projection in one matrix (Phi-3); a width that no configuration holds (BLOOM)."""
    model = tiny(name, **options)
    expected = replaced_loss(model, path, torch.zeros(2, 64 if setting else 128))
    assert abs(expected - hf_loss(model, TOKENS)) > 5e-4
    pruned = prune(model, EVEN, out=tmp_path / "out")
    assert pruned.form == ("cut" if setting else "zeroed")
    again = plainly(tmp_path / "out")
    assert hf_loss(again, TOKENS) == pytest.approx(expected, abs=1e-4)
    if setting is None:
        assert "the configuration of BloomForCausalLM has no setting for the width" in pruned.reason
        with pytest.raises(ModelError, match="no setting for the width of its MLPs; form='zeroed' can be saved"):
            prune(model, EVEN, form="cut", out=tmp_path / "cut")
        assert not (tmp_path / "cut").exists()
    else:
        assert getattr(again.config, setting) == 51


@pytest.mark.parametrize(
    ("name", "options", "path", "switch"),
    [
        ("Llama", GATED, "model.layers.{}.mlp.down_proj", "mlp_bias"),
        ("Falcon", {"ffn_hidden_size": 64}, "transformer.h.{}.mlp.dense_4h_to_h", "bias"),
        ("Qwen2", GATED, "model.layers.{}.mlp.down_proj", None),
    ],
)
def test_means_are_saved_where_the_configuration_has_biases(
    name: str, options: dict[str, Any], path: str, switch: str | None, means: Tensor, tmp_path: Path
) -> None:
    model = tiny(name, **options)
    expected = replaced_loss(model, path, means)
    pruned = prune(model, EVEN, replacement="mean", means=means)
    assert hf_loss(pruned.model, TOKENS) == pytest.approx(expected, abs=1e-4)
    assert pruned.n_parameters == count(pruned.model)
    if switch is None:
        with pytest.raises(ModelError, match="no setting for them; use the model in memory, or remove neurons with"):
            pruned.save(tmp_path / "out")
        assert pruned.n_parameters_added == 2 * D_MODEL
        assert not (tmp_path / "out").exists()
        return
    again = plainly(pruned.save(tmp_path / "out"))
    assert getattr(again.config, switch) is True
    assert hf_loss(again, TOKENS) == pytest.approx(expected, abs=1e-4)


def test_a_configuration_with_a_list_of_widths_holds_layers_that_differ(tmp_path: Path) -> None:
    """Gemma 3n has one width a layer in its configuration."""
    sizes = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 300, "head_dim": 8, "laurel_rank": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    sizes |= {"altup_num_inputs": 2, "activation_sparsity_pattern": None, "num_key_value_heads": 2}
    config = hf.Gemma3nTextConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **sizes
    )
    model = hf.Gemma3nForCausalLM(config).eval()
    pruned = prune(model, [(0, 3), (1, 4), (1, 60)], out=tmp_path / "out")
    assert (pruned.form, pruned.widths) == ("cut", {0: 63, 1: 62})
    again = plainly(tmp_path / "out")
    assert again.config.intermediate_size == [63, 62]
    assert hf_loss(again, TOKENS) == pytest.approx(hf_loss(pruned.model, TOKENS), abs=1e-6)


def test_tied_weights_types_and_generation_settings_are_kept(tmp_path: Path) -> None:
    model = tiny("Llama", **GATED, tie_word_embeddings=True).to(torch.bfloat16)
    model.generation_config.temperature, model.generation_config.do_sample = 0.25, True
    pruned = prune(model, UNEVEN, out=tmp_path / "out")
    assert pruned.model.lm_head.weight is pruned.model.model.embed_tokens.weight
    assert pruned.n_parameters_before == count(model)
    again = plainly(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.dtype == pruned.model.dtype == torch.bfloat16
    assert again.generation_config.temperature == 0.25
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert prune(model.train(), UNEVEN).model.training is False
    assert model.training


def test_a_model_that_was_unpacked_from_a_gguf_file_is_saved(tmp_path: Path) -> None:
    """transformers saves no model that it read from GGUF, although its weights are dense."""
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    model = tiny("Llama", **GATED)
    model.config.quantization_config = hf.GgufConfig()
    model.hf_quantizer = gguf.GgufHfQuantizer(model.config.quantization_config)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "refused")
    pruned = prune(model, EVEN, out=tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert hf_loss(plainly(tmp_path / "out"), TOKENS) == pytest.approx(hf_loss(pruned.model, TOKENS), abs=1e-6)
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    model.hf_quantizer.quantization_config.quant_method = "fp8"
    with pytest.raises(ModelError, match="the weights are quantised or not loaded"):
        prune(model, EVEN)


def test_means_become_a_constant_in_the_bias(tiny_hf_models: Any) -> None:
    """Worked by hand: two neurons of one layer, means 2 and -1."""
    model = tiny_hf_models("opt")
    values = torch.zeros(2, D_MLP)
    values[1, 5], values[1, 6] = 2.0, -1.0
    pruned = prune(model, [(1, 5), (1, 6)], replacement="mean", means=values).model
    old, new = model.model.decoder.layers[1].fc2, pruned.model.decoder.layers[1].fc2
    assert torch.allclose(new.bias, old.bias + 2 * old.weight[:, 5] - old.weight[:, 6], atol=1e-6)
    assert torch.equal(pruned.model.decoder.layers[0].fc2.bias, model.model.decoder.layers[0].fc2.bias)


# What is refused.


@pytest.mark.parametrize(
    ("neurons", "options", "message"),
    [
        ([], {}, "there are no neurons to prune: the list is empty"),
        ([(0, 3), (1, 3), (0, 3)], {}, r"neuron \(0, 3\) is named twice"),
        ([(2, 0)], {}, r"no neuron \(2, 0\): layers are 0 to 1, neurons 0 to 63"),
        ([(0, 64)], {}, r"no neuron \(0, 64\): layers are 0 to 1, neurons 0 to 63"),
        ([(0, -1)], {}, r"no neuron \(0, -1\)"),
        ([(0, 1)], {"form": "short"}, "form must be one of auto, cut, padded, zeroed, got 'short'"),
        ([(0, 1)], {"replacement": "resample"}, "got 'resample': weights hold constants, and nothing that changes"),
        ([(0, 1)], {"replacement": "mean"}, r"needs means of shape \[2, 64\], got none; record the model first"),
        ([(0, 1)], {"replacement": "mean", "means": torch.zeros(2, 63)}, r"means of shape \[2, 64\], got \[2, 63\]"),
        ([(0, 1)], {"replacement": "mean", "means": torch.full((2, 64), torch.nan)}, "means are NaN or infinite"),
    ],
)
def test_bad_neurons_and_options_are_refused(
    tiny_hf_models: Any, neurons: list[tuple[int, int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prune(tiny_hf_models("llama"), neurons, **options)


@pytest.mark.parametrize("pair", [(0, 1, 2), (0, 1.5), "01", 7])
def test_what_is_no_pair_is_refused(tiny_hf_models: Any, pair: Any) -> None:
    with pytest.raises(TypeError, match=r"neurons are pairs \(layer, neuron\) of integers, got "):
        prune(tiny_hf_models("opt"), [(0, 0), pair])


def test_a_folder_that_holds_something_is_left_alone(tiny_hf_models: Any, tmp_path: Path) -> None:
    model = tiny_hf_models("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="full is not empty; name an empty or new folder"):
        prune(model, [(0, 1)], out=tmp_path / "full")
    with pytest.raises(RunFolderError, match=r"precious\.txt is a file; name an empty or new folder"):
        prune(model, [(0, 1)], out=tmp_path / "full/precious.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    prune(model, [(0, 1)], out=str(tmp_path / "empty"))
    assert (tmp_path / "empty/config.json").is_file()


def test_a_write_that_fails_leaves_nothing(
    tiny_hf_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_hf_models("llama")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuron_sparsity.checkpoint.write_json", full)
    with pytest.raises(RunFolderError, match=r"out cannot be written \(\[Errno 28\] No space left"):
        prune(model, [(0, 1)], out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_whose_neurons_cannot_go_are_refused(tiny_hf_models: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="layer 0 is a mixture of experts"):
        prune(tiny_hf_models("mixtral"), [(0, 1)])
    with pytest.raises(TypeError, match="model must be a Hugging Face model, a TransformerBridge or an adapter, got"):
        prune(torch.nn.Linear(2, 2), [(0, 1)])
    integers = tiny_hf_models("opt")
    fc2 = integers.model.decoder.layers[0].fc2
    fc2.weight = torch.nn.Parameter(torch.zeros(fc2.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="the weights are quantised or not loaded"):
        prune(integers, [(0, 1)])
    shared = tiny_hf_models("opt")
    shared.model.decoder.layers[1].fc2.weight = shared.model.decoder.layers[0].fc2.weight
    with pytest.raises(ModelError, match="layers share the weights of one MLP"):
        prune(shared, [(0, 1)])


def test_a_norm_between_the_projections_is_noticed() -> None:
    """BitNet normalises the post-activations over the neurons: taking some out changes all others."""
    model = tiny("BitNet", **GATED)
    with pytest.raises(ModelError, match=r"does not run with its neurons taken out|mixes neurons"):
        prune(model, EVEN, form="cut")
    with pytest.raises(ModelError, match="something between its up and down projection mixes neurons"):
        prune(model, EVEN, form="zeroed")


def test_bridges_that_hold_other_weights_are_refused(tiny_model: Any, tiny_hf_models: Any) -> None:
    with pytest.raises(ModelError, match="compatibility mode, which rewrote the weights; give the plain"):
        prune(tiny_model("gpt2-compat"), [(0, 1)])
    bridge = tiny_model("gpt2")
    with pytest.raises(ValueError, match="a TransformerBridge has wrapped this GPT2LMHeadModel; give the bridge"):
        prune(bridge.original_model, [(0, 1)])


def test_a_hooked_transformer_is_refused(tiny_model: Any) -> None:
    with pytest.raises(TypeError, match="HookedTransformer keeps no Hugging Face model; give the plain"):
        prune(tiny_model("hooked-relu"), [(0, 1)])


def test_a_dispatched_model_is_refused(tiny_hf_models: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_hf_models("llama"), execution_device="cpu")
    with pytest.raises(ModelError, match="on several devices or away; load it on one device"):
        prune(model, [(0, 1)])
