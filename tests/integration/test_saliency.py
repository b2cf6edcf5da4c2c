"""Gradients of the loss: against finite differences, on both TransformerLens classes, in bounded memory, no trace."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity.ablation import ablate
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError, ModelError
from neuron_sparsity.perplexity import token_losses
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record
from neuron_sparsity.saliency import NeuronSaliency, loss_gradients, measure_gradients, saliency
from neuron_sparsity.scores import RANKINGS

module = importlib.import_module("neuron_sparsity.saliency")  # `ns.saliency` is the function
MODELS = ("llama", "gpt2-compat", "opt", "neox", "hooked-relu", "hooked-silu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def llama(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def windows(llama: Any, own_windows: Any) -> Windows:
    made: Windows = own_windows(llama, 6)
    return made


@pytest.fixture(scope="module")
def found(llama: Any, windows: Windows) -> NeuronSaliency:
    return saliency(llama, windows)


def summed_loss(adapter: MLPAdapter, windows: Windows, layer: int, change: Callable[[Tensor], Tensor]) -> float:
    """The summed loss where one layer's post-activations are changed."""
    losses = token_losses(adapter, windows, on_post=lambda at, z: change(z) if at == layer else None)
    return float(losses.double().sum())


def slope(adapter: MLPAdapter, windows: Windows, layer: int, direction: Callable[[Tensor], Tensor]) -> float:
    """Central difference of the summed loss along a direction of one layer's post-activations."""
    step = 1e-3  # at ten times that, ReLUs that switch on the way show
    up = summed_loss(adapter, windows, layer, lambda z: z + step * direction(z))
    down = summed_loss(adapter, windows, layer, lambda z: z - step * direction(z))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_change_of_the_loss_is_the_measured_one(tiny_model: Any, own_windows: Any, name: str) -> None:
    model = tiny_model(name)
    windows = own_windows(model, 4)
    adapter = attach(model)
    found = saliency(model, windows)
    pairs = loss_gradients(adapter, windows.tokens.long(), windows.scored)
    generator = torch.Generator().manual_seed(0)
    for layer, (z, g) in enumerate(pairs):
        direction = torch.randn(z.shape, generator=generator)
        predicted = float((g * direction).double().sum())
        assert slope(adapter, windows, layer, lambda _, d=direction: d) == pytest.approx(predicted, rel=0.02, abs=0.05)
        signs = torch.where(torch.rand(64, generator=generator) < 0.5, 1.0, -1.0)
        scaling = float((found.product_sum[layer] * signs).sum())
        assert slope(adapter, windows, layer, lambda z, s=signs: z * s) == pytest.approx(scaling, rel=0.02, abs=0.05)
        shifting = float((found.gradient_sum[layer] * signs).sum())
        shifted = slope(adapter, windows, layer, lambda z, s=signs: s.expand_as(z))
        assert shifted == pytest.approx(shifting, rel=0.02, abs=0.05)
        centred = (z - found.mean_activation[layer].float()) * g
        for sums, value in (("product_sq_sum", (z * g) ** 2), ("product_gradient_sum", z * g**2)):
            assert torch.allclose(getattr(found, sums)[layer], value.double().sum((0, 1)), rtol=1e-4, atol=1e-5)
        for sums, value in (("product_abs_sum", (z * g).abs()), ("centred_abs_sum", centred.abs())):
            assert torch.allclose(getattr(found, sums)[layer], value.double().sum((0, 1)), rtol=1e-4, atol=1e-5)


def test_the_plain_body_and_the_wrapped_model_have_the_same_gradients(llama: Any, windows: Windows) -> None:
    plain, wrapped = attach(llama), attach(llama, plain=False)
    assert plain.plain is not None
    assert wrapped.plain is None
    for ours, theirs in zip(
        *(loss_gradients(one, windows.tokens.long(), windows.scored) for one in (plain, wrapped)), strict=True
    ):
        assert torch.allclose(ours[0], theirs[0], atol=1e-5)
        assert torch.allclose(ours[1], theirs[1], atol=1e-5)
        assert float(ours[1].abs().max()) > 0.01


def test_a_model_without_chunked_logits_has_the_same_gradients(
    llama: Any, windows: Windows, found: NeuronSaliency
) -> None:
    adapter = attach(llama, plain=False)
    adapter.chunked_logits = False
    sums = measure_gradients(adapter, windows, found.mean_activation, batch_size=4)
    assert torch.allclose(sums["product_sum"], found.product_sum, atol=1e-4)
    assert torch.allclose(sums["product_sq_sum"], found.product_sq_sum, rtol=1e-3, atol=1e-6)


def test_only_scored_losses_count(llama: Any, windows: Windows) -> None:
    scored = windows.scored.clone()
    scored[:, 10:] = False
    for z, g in loss_gradients(attach(llama), windows.tokens.long(), scored):
        assert z.shape == g.shape
        assert torch.equal(g[:, 9:], torch.zeros_like(g[:, 9:]))  # later positions can only be read by later losses
        assert float(g[:, :9].abs().max()) > 0


def test_sums_are_those_of_statistics_and_do_not_depend_on_the_batch(
    llama: Any, windows: Windows, found: NeuronSaliency
) -> None:
    stats = record(llama, windows)
    assert torch.allclose(found.mean_activation, stats.mean_activation, atol=1e-6)
    second = found.activation_sq_sum.sqrt() * stats.w_norm
    assert torch.allclose(second, stats.contribution_sq_sum.sqrt(), rtol=1e-4)
    other = saliency(llama, windows, batch_size=4)
    for name in module._TENSORS:
        assert torch.allclose(getattr(found, name), getattr(other, name), rtol=1e-4, atol=1e-5), name
    assert (found.n_tokens, found.n_scored) == (windows.n_tokens, windows.n_scored)
    assert found.corpus == windows.describe()
    assert (found.cost["forward_passes"], found.cost["backward_passes"]) == (2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "hooked-relu"])
def test_shares_are_of_the_stream_that_the_mlp_adds_to(tiny_model: Any, own_windows: Any, name: str) -> None:
    model = tiny_model(name)
    windows = own_windows(model, 2)
    adapter, found = attach(model), saliency(model, windows)
    with torch.no_grad():
        cache = model.run_with_cache(windows.tokens.long())[1]
    for layer in range(2):
        after, added = cache[f"blocks.{layer}.hook_resid_post"], cache[f"blocks.{layer}.hook_mlp_out"]
        stream = (after - added).norm(dim=-1)
        if name == "neox":  # attention runs beside the MLP: the stream is the block's input
            stream = cache[f"blocks.{layer}.hook_resid_pre"].norm(dim=-1)
        z = cache[f"blocks.{layer}.mlp.hook_post"]
        share = z.abs() * adapter.w_norms[layer] / stream[..., None]
        assert torch.allclose(found.share_sum[layer], share.double().sum((0, 1)), rtol=1e-3)
        assert torch.allclose(found.share_sq_sum[layer], (share**2).double().sum((0, 1)), rtol=1e-3)


def test_logits_are_made_a_few_rows_at_a_time(
    llama: Any, windows: Windows, found: NeuronSaliency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGIT_FLOATS", 300 * 20)
    rows: list[int] = []
    handle = llama.unembed.register_forward_hook(lambda module, args, out: rows.append(out[..., 0].numel()))
    try:
        sums = measure_gradients(attach(llama), windows, found.mean_activation, batch_size=6)
    finally:
        handle.remove()
    assert 1 < max(rows) <= 20
    assert sum(rows) >= windows.n_scored
    assert torch.allclose(sums["product_sum"], found.product_sum, atol=1e-4)


def test_nothing_is_left_behind(
    tiny_model: Any, windows: Windows, found: NeuronSaliency, hooks_on: Callable[[Any], int]
) -> None:
    model = tiny_model("llama")
    some = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    some.requires_grad_(True)

    def state() -> tuple[Any, ...]:
        asking = [parameter.requires_grad for parameter in model.parameters()]
        return hooks_on(model), asking, [p.grad for p in model.parameters()], torch.is_grad_enabled()

    def stop(label: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt(label)

    def stop_at_gradients(label: str, done: int, total: int) -> None:
        if done and "gradients" in label:
            raise KeyboardInterrupt(label)

    def fail(layer: int, z: Tensor) -> None:
        raise ArithmeticError

    model(windows.tokens.long())  # a bridge hangs hooks of its own on itself in its first pass
    before = state()
    assert any(before[1])
    assert not all(before[1])
    with torch.inference_mode():
        again = saliency(model, windows)
    assert torch.allclose(again.product_sum, found.product_sum, atol=1e-5)
    assert state() == before
    for progress in (stop, stop_at_gradients):
        with pytest.raises(KeyboardInterrupt):
            saliency(model, windows, progress=progress)
        assert state() == before
    with pytest.raises(ArithmeticError):
        measure_gradients(attach(model), windows, found.mean_activation, on_post=fail)
    assert state() == before


def test_inside_ablate_the_gradients_are_those_of_the_ablated_model(
    llama: Any, windows: Windows, found: NeuronSaliency
) -> None:
    chosen = [(0, 3), (1, 5)]
    with ablate(llama, chosen):
        inside = saliency(llama, windows)

    def zeroing(layer: int, z: Tensor) -> Tensor:
        keep = torch.ones(64)
        keep[chosen[layer][1]] = 0
        return z * keep

    direct = measure_gradients(attach(llama), windows, inside.mean_activation, on_post=zeroing)
    assert torch.allclose(inside.product_sum, direct["product_sum"], atol=1e-4)
    assert not torch.allclose(inside.product_sum, found.product_sum, atol=1e-2)
    assert inside.product_abs_sum[0, 3] == inside.product_abs_sum[1, 5] == 0


def test_a_neuron_that_does_nothing_is_ranked_first_by_every_score_that_sees_it(
    tiny_hf_models: Any, tiny_tokenizer: Any, own_windows: Any
) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt")
    layers = hf_model.model.decoder.layers
    layers[1].fc2.weight[:, 7] = 0  # without output
    layers[0].fc1.weight[9] = 0  # never active
    layers[0].fc1.bias[9] = -1
    model = bridge.boot_transformers("tiny-planted-test", hf_model=hf_model, tokenizer=tiny_tokenizer)
    windows = own_windows(model, 8)
    stats, found = record(model, windows), saliency(model, windows)
    for by in RANKINGS:
        if by in ("random", "activation_frequency"):
            continue
        planted = {(1, 7)} if by == "weight_norm" else {(1, 7), (0, 9)}
        ranking = rank(stats, by=by, saliency=found)
        assert all(ranking.scores[layer, neuron] == 0 for layer, neuron in planted), by
        n_silent = int((ranking.scores <= 0).sum())  # others may be silent on this text
        assert planted <= set(ranking.weakest(n_silent)), by
        assert n_silent < 64, by


def test_saved_beside_other_files_and_loaded(llama: Any, windows: Windows, tmp_path: Path) -> None:
    made = saliency(llama, windows, folder=tmp_path)
    again = NeuronSaliency.load(tmp_path)
    assert torch.equal(rank(made, by="fisher").order(), rank(again, by="fisher").order())
    assert (again.cost, again.provenance, again.corpus) == (made.cost, made.provenance, made.corpus)


def test_bad_weights_and_weights_that_are_away_are_refused(
    tiny_model: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = attach(tiny_model("llama"))
    with pytest.raises(MeasurementError, match=r"layer 0: gradients are NaN or infinite in windows 0 to \d"):
        measure_gradients(
            adapter, windows, torch.zeros(2, 64), on_post=lambda layer, z: z * float("nan") if layer == 1 else None
        )
    monkeypatch.setattr(MLPAdapter, "offloaded", True)
    with pytest.raises(ModelError, match="gradients need every weight in memory"):
        saliency(adapter, windows)
