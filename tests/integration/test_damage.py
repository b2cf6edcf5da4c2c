"""Damage of a change, token by token and layer by layer, on tiny models where it can be known beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity.ablation import ablate, removable_neurons
from neuron_sparsity.adapter import attach
from neuron_sparsity.damage import DamageResult, damage
from neuron_sparsity.errors import MeasurementError, RunFolderError
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record
from neuron_sparsity.sparsity import cett_ppl_sparsity, sparsify
from neuron_sparsity.store import RunFolder, to_json_text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CHOSEN = [(0, 3), (0, 10), (1, 5), (1, 40), (1, 41)]


@pytest.fixture(scope="module", params=["llama", "opt", "hooked-relu"])
def case(request: pytest.FixtureRequest, tiny_model: Any, own_windows: Any) -> SimpleNamespace:
    model = tiny_model(request.param)
    windows = own_windows(model, 12)
    stats = record(model, windows)
    return SimpleNamespace(model=model, adapter=attach(model), windows=windows, stats=stats)


@pytest.fixture(scope="module")
def result(case: SimpleNamespace) -> Any:
    return cett_ppl_sparsity(case.model, case.windows, p_percent=20.0, tolerance_percent=5.0)


def losses(case: SimpleNamespace, hook: Any = None) -> Tensor:
    return token_losses(case.adapter, case.windows, on_post=hook, batch_size=4)


@pytest.mark.parametrize("layers", ["alone", "spared", None])
def test_the_damage_of_nothing_is_exactly_nothing(case: SimpleNamespace, layers: Any) -> None:
    found = damage(case.model, case.windows, [], layers=layers)
    assert found.loss_difference is not None
    assert not found.loss_difference.any()
    assert (found.rise.mean, found.rise.low, found.rise.high, found.ppl_increase_percent) == (0, 0, 0, 0)
    assert found.ppl_changed == found.ppl_dense
    assert abs(found.kl.mean) < 2e-6
    assert (found.hurt, found.helped, found.layers, found.hurt_ratio, found.top_percent_share) == ((), (), (), 0, None)
    assert found.cost["forward_passes"] == 2


def test_the_seed_of_resampled_neurons_is_kept(case: SimpleNamespace) -> None:
    def of(seed: int) -> DamageResult:
        return damage(case.model, case.windows, CHOSEN, replacement="resample", seed=seed, layers=None)

    assert of(3).provenance["seed"] == 3
    assert of(3).rise.mean == of(3).rise.mean != of(4).rise.mean


def test_differences_are_those_of_two_separate_passes(case: SimpleNamespace, result: Any) -> None:
    dense = losses(case)
    removed = damage(case.model, case.windows, CHOSEN, replacement="mean", means=case.stats.mean_activation)
    with ablate(case.model, CHOSEN, replacement="mean", means=case.stats.mean_activation):
        expected = losses(case) - dense
    torch.testing.assert_close(removed.loss_difference, expected, atol=2e-5, rtol=1e-4)
    truncated = damage(case.model, case.windows, result)
    with sparsify(case.model, result):
        expected = losses(case) - dense
    torch.testing.assert_close(truncated.loss_difference, expected, atol=2e-5, rtol=1e-4)
    assert truncated.change == "truncated at CETT-PPL-20%"
    assert truncated.ppl_increase_percent == pytest.approx(result.ppl_increase_percent, abs=1e-2)
    assert truncated.kl.mean == pytest.approx(result.kl, rel=1e-3)
    assert truncated.ppl_dense == pytest.approx(result.ppl_dense, rel=1e-6)
    scored = case.windows.scored
    assert truncated.rise.mean == pytest.approx(mean_loss(expected.double(), scored), abs=1e-5)
    assert truncated.hurt[0].difference == pytest.approx(float(expected[scored].max()), abs=1e-4)
    assert truncated.rise.low is not None
    assert truncated.rise.high is not None
    assert truncated.rise.low < truncated.rise.mean < truncated.rise.high


@pytest.mark.parametrize("layers", ["alone", "spared"])
def test_layers_are_what_single_passes_say(case: SimpleNamespace, layers: Any) -> None:
    found = damage(case.model, case.windows, CHOSEN, layers=layers)
    scored, dense = case.windows.scored, losses(case)
    joint = rise_of(case, CHOSEN, dense)
    alone = [rise_of(case, [pair for pair in CHOSEN if pair[0] == layer], dense) for layer in (0, 1)]
    # Of two layers, sparing one leaves the other alone.
    expected = alone if layers == "alone" else [joint - alone[1], joint - alone[0]]
    assert [part.layer for part in found.layers] == [0, 1]
    assert [part.rise for part in found.layers] == pytest.approx(expected, abs=1e-5)
    assert found.layer_sum is not None
    assert found.interaction is not None
    assert found.layer_sum.mean == pytest.approx(sum(expected), abs=2e-5)
    assert found.interaction.mean == pytest.approx(joint - sum(expected), abs=2e-5)
    assert found.cost["forward_passes"] == 4
    if joint > 0:
        assert [part.share for part in found.layers] == pytest.approx([part / joint for part in expected], abs=1e-2)
    assert int(scored.sum()) == case.windows.n_scored


def rise_of(case: SimpleNamespace, neurons: list[tuple[int, int]], dense: Tensor) -> float:
    with ablate(case.model, neurons):
        return mean_loss((losses(case) - dense).double(), case.windows.scored)


def test_a_layer_that_is_not_changed_costs_no_pass(case: SimpleNamespace) -> None:
    found = damage(case.model, case.windows, [(1, 5), (1, 7)])
    assert [part.layer for part in found.layers] == [1]
    assert found.cost["forward_passes"] == 3
    assert found.layers[0].rise == pytest.approx(found.rise.mean, abs=1e-7)
    assert found.interaction is not None
    assert found.interaction.mean == pytest.approx(0, abs=1e-7)


def test_a_planted_hurt_token_comes_first(tiny_hf_models: Any, tiny_tokenizer: Any, own_windows: Any) -> None:
    """A neuron that fires at one place only, and says there what comes next: without it that one token is hurt."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt")
    windows = own_windows(hf_model, 6)
    window, pos, neuron = 4, 17, 9
    last = hf_model.model.decoder.layers[-1]
    seen: list[Tensor] = []
    handle = last.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        hf_model(windows.tokens.long())
    handle.remove()
    inputs = seen[0].reshape(*windows.tokens.shape, -1)
    here = inputs[window, pos - 1]
    others = (inputs @ here / (here @ here)).flatten().sort(descending=True).values
    assert others[1] < 0.95, "no other place looks like this one"
    following = hf_model.lm_head.weight[windows.tokens[window, pos].long()]
    with torch.no_grad():
        last.fc1.weight[neuron], last.fc1.bias[neuron] = here / (here @ here), -0.97
        last.fc2.weight[:, neuron] = 1000 * following / following.norm()
    model = bridge.boot_transformers("planted", hf_model=hf_model, tokenizer=tiny_tokenizer)
    found = damage(model, windows, [(1, neuron)])
    first = found.hurt[0]
    assert (first.window, first.pos) == (window, pos)
    assert first.token == tiny_tokenizer.decode([int(windows.tokens[window, pos])])
    assert first.difference > 1
    assert first.difference == pytest.approx(float(found.rise.mean) * windows.n_scored, rel=1e-3)
    assert found.top_percent_share == pytest.approx(1, rel=1e-3)
    assert len(first.before) == 12
    assert len(first.after) == 4


def test_an_ablation_result_is_its_neurons(case: SimpleNamespace) -> None:
    removed = removable_neurons(case.model, case.windows, rank(case.stats), p_percent=20.0)
    assert removed.n_removable > 0
    means = case.stats.mean_activation
    found = damage(case.model, case.windows, removed, means=means, layers=None)
    same = damage(case.model, case.windows, removed.removable, replacement="mean", means=means, layers=None)
    assert torch.equal(found.loss_difference, same.loss_difference)  # type: ignore[arg-type]
    assert found.change == f"{removed.n_removable} neurons removed, the weakest by contribution, mean replacement"
    assert (found.layer_passes, found.layers, found.interaction) == (None, (), None)


def test_saved_and_loaded(case: SimpleNamespace, tmp_path: Path) -> None:
    found = damage(case.model, case.windows, CHOSEN)
    RunFolder(tmp_path, {"kind": "run"})
    found.save(tmp_path)
    again = DamageResult.load(tmp_path)
    assert torch.equal(again.loss_difference, found.loss_difference)  # type: ignore[arg-type]
    assert torch.equal(again.token_kl, found.token_kl)  # type: ignore[arg-type]
    assert again.to_json() == found.to_json()
    alone = DamageResult.from_json(json.loads(to_json_text(found.to_json())))
    assert alone.loss_difference is None
    assert alone.hurt == found.hurt
    with pytest.raises(ValueError, match=r"load the result with DamageResult.load\(folder\)"):
        alone.save(tmp_path)
    data = json.loads((tmp_path / "damage.json").read_text())
    for key, value in (("hurt_ratio", "half"), ("layers", [{"layer": 0}]), ("corpus", {"sha256": "other"})):
        (tmp_path / "damage.json").write_text(json.dumps(data | {key: value}))
        with pytest.raises(RunFolderError, match=r"damage.json is damaged"):
            DamageResult.load(tmp_path)


def test_nothing_is_left_behind(case: SimpleNamespace, hooks_on: Callable[[Any], int]) -> None:
    before, dense = hooks_on(case.model), losses(case)

    def interrupt(label: str, done: int, total: int) -> None:
        if label == "layer 1 alone" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        damage(case.model, case.windows, CHOSEN, progress=interrupt, batch_size=4)
    assert hooks_on(case.model) == before
    assert torch.equal(losses(case), dense)


def test_bad_input_is_refused_before_any_pass(case: SimpleNamespace, result: Any) -> None:
    def refused(match: str, change: Any = CHOSEN, **options: Any) -> None:
        def no_pass(*told: Any) -> None:
            raise AssertionError("a pass was made")

        with pytest.raises(ValueError, match=match):
            damage(case.model, case.windows, change, progress=no_pass, **options)

    refused("layers must be 'alone', 'spared' or None, got 'all'", layers="all")
    refused("n_tokens must be at least 0, got -1", n_tokens=-1)
    refused("per_document must be at least 1, got 0", per_document=0)
    refused("min_count must be at least 2, got 1", min_count=1)
    refused(r"no neuron \(7, 0\)", [(7, 0)])
    refused(r"neuron \(0, 3\) is named twice", [(0, 3), (0, 3)])
    refused("needs means of shape", replacement="mean")
    other = dataclasses.replace(result, model=dataclasses.replace(result.model, fingerprint="other"))
    refused("with other weights; measure this model first", other)


def test_nan_is_refused(case: SimpleNamespace) -> None:
    means = torch.full((2, 64), float("nan"))
    with pytest.raises(MeasurementError, match="not finite"):
        damage(case.model, case.windows, CHOSEN, replacement="mean", means=means)
