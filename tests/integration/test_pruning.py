"""Neurons taken out of the weights: the loss is the ablated one, in memory and read back by plain transformers."""

from __future__ import annotations

import json
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
from neuron_sparsity.errors import ModelError, RunFolderError
from neuron_sparsity.perplexity import perplexity
from neuron_sparsity.pruning import FORMS, prune
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record

FAMILIES = ("llama", "gpt2", "opt", "neox")
D_MODEL, D_MLP = 32, 64
PER_NEURON = {"llama": 3 * D_MODEL, "gpt2": 2 * D_MODEL + 1, "opt": 2 * D_MODEL + 1, "neox": 2 * D_MODEL + 1}
EVEN = [(layer, neuron) for layer in (0, 1) for neuron in range(1 + layer, 64, 5)][:-1] + [(1, 63)]
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
            losses[named, replacement] = float(torch.tensor(found.ppl, dtype=torch.float64).log())
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
    assert len(changed) == 2 * (3 if case.family in ("llama", "gpt2", "opt", "neox") else 0)
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
    assert perplexity(bridge, case.windows).ppl == pytest.approx(torch.tensor(case.losses["even", "zero"]).exp(), 1e-4)
    twice = prune(plainly(tmp_path / "once"), [(0, 0), (1, 50)])
    both = prune(case.model, [*EVEN, (0, 0), (1, 63)])
    assert same_bits(bits(twice.model), bits(both.model))


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
def test_a_layer_without_neurons(case: SimpleNamespace, replacement: str, tmp_path: Path) -> None:
    """Width 0 in memory; a checkpoint keeps one neuron of zeros, where all layers are empty."""
    layer = [(0, neuron) for neuron in range(D_MLP)]
    every = [(block, neuron) for block in (0, 1) for neuron in range(D_MLP)]
    for pairs in (layer, every):
        with ablate(case.bridge, pairs, replacement=replacement, means=case.means):
            expected = torch.tensor(perplexity(case.bridge, case.windows).ppl, dtype=torch.float64).log()
        options = {"replacement": replacement, "means": case.means}
        cut, auto = prune(case.model, pairs, form="cut", **options), prune(case.model, pairs, **options)
        assert cut.widths[0] == 0
        for pruned in (cut, auto, SimpleNamespace(model=plainly(auto.save(tmp_path / f"{len(pairs)}")))):
            assert hf_loss(pruned.model, case.tokens) == pytest.approx(float(expected), abs=1e-4)
        assert (auto.form, auto.widths[0]) == (("zeroed", D_MLP) if pairs is layer else ("padded", 1))
        assert "neurons, and a checkpoint" in auto.reason or "at least one" in auto.reason
        with pytest.raises(ModelError, match="form='zeroed' can be saved|'padded' or 'zeroed' can be saved"):
            cut.save(tmp_path / "refused")


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
    assert hf_loss(again, searched) == pytest.approx(
        float(torch.tensor(result.ppl_ablated, dtype=torch.float64).log()), abs=1e-4
    )
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
        "neuron_sparsity ",
    ):
        assert said in card, said
    added = 2 * (D_MLP + 2 * 0) if False else pruned.n_parameters_added
    biased = removal.family == "llama" and replacement == "mean"
    width = again.config.intermediate_size if removal.family == "llama" else 0
    assert added == (2 * (2 * width + D_MODEL) if biased else 0)
    assert bool(getattr(again.config, "mlp_bias", False)) == biased


def test_a_result_of_another_model_is_refused(removal: SimpleNamespace, tiny_hf_models: Any) -> None:
    other = tiny_hf_models(removal.family, seed=1)
    with pytest.raises(ValueError, match=r"found on tiny-.* with other weights \(as loaded\); prune the model that was"):
        prune(other, removal.results["zero"])
    with pytest.raises(ValueError, match="found with zero replacement, not 'mean'; leave out replacement="):
        prune(removal.model, removal.results["zero"], replacement="mean")


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


def replaced_loss(model: Any, tokens: Tensor, pairs: list[tuple[int, int]], values: Tensor, path: str) -> float:
    """The loss with post-activations replaced by a hook on each layer's down projection."""
    handles = []
    for layer in (0, 1):
        gone = torch.zeros(D_MLP, dtype=torch.bool)
        gone[[neuron for block, neuron in pairs if block == layer]] = True

        def before(module: Any, args: Any, gone: Tensor = gone, layer: int = layer) -> Any:
            return (torch.where(gone, values[layer].to(args[0]), args[0]),)

        handles.append(model.get_submodule(path.format(layer)).register_forward_pre_hook(before))
    try:
        return hf_loss(model, tokens)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("model", "path", "form", "setting"),
    [
        (("Qwen2", GATED), "model.layers.{}.mlp.down_proj", "cut", "intermediate_size"),
        (("Phi3", GATED), "model.layers.{}.mlp.down_proj", "cut", "intermediate_size"),
        (("Gemma2", GATED | {"head_dim": 8}), "model.layers.{}.mlp.down_proj", "cut", "intermediate_size"),
        (("Falcon", {"ffn_hidden_size": 64}), "transformer.h.{}.mlp.dense_4h_to_h", "cut", "ffn_hidden_size"),
        (("Bloom", {}), "transformer.h.{}.mlp.dense_4h_to_h", "zeroed", None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_other_families_take_the_form_that_their_configuration_has(
    model: tuple[str, dict[str, Any]], path: str, form: str, setting: str | None, tmp_path: Path
) -> None:
    """Gate and up projection in one matrix (Phi-3); a width that no configuration holds (BLOOM)."""
    plain = tiny(model[0], **model[1])
    tokens = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    n_neuron = 128 if model[0] == "Bloom" else 64
    pairs = EVEN
    values = torch.zeros(2, n_neuron)
    if model[0] == "Bloom":
        gone = torch.zeros(2, n_neuron, dtype=torch.bool)
        for layer, neuron in pairs:
            gone[layer, neuron] = True
        handles = [
            plain.get_submodule(path.format(layer)).register_forward_pre_hook(
                lambda module, args, layer=layer: (args[0].masked_fill(gone[layer], 0.0), *args[1:])
            )
            for layer in (0, 1)
        ]
        expected = hf_loss(plain, tokens)
        for handle in handles:
            handle.remove()
    else:
        expected = replaced_loss(plain, tokens, pairs, values, path)
    pruned = prune(plain, pairs, out=tmp_path / "out")
    assert pruned.form == form
    again = plainly(tmp_path / "out")
    assert hf_loss(again, tokens) == pytest.approx(expected, abs=1e-4)
    if setting is None:
        assert "the configuration of BloomForCausalLM has no setting for the width" in pruned.reason
    else:
        assert getattr(again.config, setting) == 51
