"""`apply_thresholds` on the plain Hugging Face model does what `sparsify` does through TransformerLens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuron_sparsity.adapter import attach
from neuron_sparsity.sparsity import SparsityResult, apply_thresholds, cett_ppl_sparsity, sparsify
from neuron_sparsity.store import to_json_text

FAMILIES = ("llama", "gpt2", "opt", "neox")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def hf_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token losses in float64, from the model's own logits."""
    with torch.no_grad():
        logits = model(tokens).logits.double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any, tiny_hf_models: Any) -> SimpleNamespace:
    family = request.param
    bridge = tiny_model(family)
    windows = own_windows(bridge, 16)
    result = cett_ppl_sparsity(bridge, windows, p_percent=10.0, tolerance_percent=1.0)
    tokens = windows.tokens.long()
    return SimpleNamespace(
        family=family, bridge=bridge, windows=windows, tokens=tokens, result=result, hf_model=tiny_hf_models(family)
    )


def test_the_loss_is_the_one_of_sparsify(case: SimpleNamespace) -> None:
    dense = float(hf_losses(case.hf_model, case.tokens).mean())
    with apply_thresholds(case.hf_model, case.result) as here:
        truncated = float(hf_losses(case.hf_model, case.tokens).mean())
    with sparsify(case.bridge, case.result) as there, torch.no_grad():
        logits = case.bridge(case.tokens, return_type="logits").double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten())
    assert truncated == pytest.approx(float(expected), abs=1e-4)
    assert truncated > dense + 0.05
    assert here.layer_activation_ratios == pytest.approx(there.layer_activation_ratios, abs=1e-3)
    assert here.activation_ratio == pytest.approx(case.result.activation_ratio, abs=1e-3)
    assert here.pairs.tolist() == [case.tokens.numel() * 64] * 2


def test_a_result_read_back_from_json_does_the_same(case: SimpleNamespace) -> None:
    again = SparsityResult.from_json(json.loads(to_json_text(case.result.to_json())))
    with apply_thresholds(case.hf_model, case.result):
        first = hf_losses(case.hf_model, case.tokens)
    with apply_thresholds(case.hf_model, again):
        assert torch.equal(hf_losses(case.hf_model, case.tokens), first)


def test_no_hook_is_left(case: SimpleNamespace, hooks_on: Callable[[Any], int]) -> None:
    before, dense = hooks_on(case.hf_model), hf_losses(case.hf_model, case.tokens)
    with apply_thresholds(case.hf_model, case.result):
        assert hooks_on(case.hf_model) == before + 2
    assert hooks_on(case.hf_model) == before
    with pytest.raises(KeyError), apply_thresholds(case.hf_model, case.result):
        raise KeyError
    assert hooks_on(case.hf_model) == before
    assert torch.equal(hf_losses(case.hf_model, case.tokens), dense)


def test_other_weights_are_refused(case: SimpleNamespace, tiny_hf_models: Any, hooks_on: Callable[[Any], int]) -> None:
    other = tiny_hf_models(case.family, seed=1)
    with (
        pytest.raises(ValueError, match=r"layer 0: output weights differ from those measured on"),
        apply_thresholds(other, case.result),
    ):
        pass
    assert hooks_on(other) == 0


def test_a_model_of_another_shape_is_refused(case: SimpleNamespace) -> None:
    wider = dataclasses.replace(case.result, model=dataclasses.replace(case.result.model, d_mlp=65))
    for model, result in ((torch.nn.Linear(64, 32), case.result), (case.hf_model, wider)):
        with (
            pytest.raises(ValueError, match=r"no list of 2 layers with one projection 6\d -> 32"),
            apply_thresholds(model, result),
        ):
            pass


def test_generation_runs_truncated(case: SimpleNamespace) -> None:
    with apply_thresholds(case.hf_model, case.result) as truncation:
        out = case.hf_model.generate(case.tokens[:2, :4], max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert out.shape == (2, 7)
    assert truncation.pairs.tolist() == [2 * 6 * 64] * 2  # the last token is not run


def test_a_result_of_compatibility_mode_is_refused(tiny_model: Any, own_windows: Any, tiny_hf_models: Any) -> None:
    bridge = tiny_model("gpt2-compat")
    result = cett_ppl_sparsity(bridge, own_windows(bridge, 4), p_percent=10.0, tolerance_percent=5.0)
    assert result.model.weights == "centred"
    plain = tiny_hf_models("gpt2")
    with pytest.raises(ValueError, match=r"\(centred\); measure this model as loaded"), apply_thresholds(plain, result):
        pass
    # Centring changes a row's norm by 1 / (2 d_model) only: in a wide model the norms alone would not tell.
    norms = [float(layer.mlp.c_proj.weight.norm(dim=1).mean()) for layer in plain.transformer.h]
    layers = tuple(dataclasses.replace(one, w_norm_mean=n) for one, n in zip(result.layers, norms, strict=True))
    alike = dataclasses.replace(result, layers=layers)
    with pytest.raises(ValueError, match=r"\(centred\); measure this model as loaded"), apply_thresholds(plain, alike):
        pass


def test_as_many_neurons_as_dimensions_are_ambiguous_and_refused(tiny_model: Any, tiny_hf_models: Any) -> None:
    info = attach(tiny_model("llama")).info
    square = SimpleNamespace(model=dataclasses.replace(info, d_mlp=32), layers=(), thresholds=[])
    with (
        pytest.raises(ValueError, match=r"with one projection 32 -> 32 each"),
        apply_thresholds(tiny_hf_models("llama"), square),
    ):
        pass
