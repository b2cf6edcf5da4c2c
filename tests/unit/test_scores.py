"""Scores worked by hand: from statistics, from gradients, and a user's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.ranking import rank
from neuron_sparsity.saliency import NeuronSaliency
from neuron_sparsity.scores import DEFAULT_RANKING, RANKINGS, Measured
from neuron_sparsity.store import read_tensors, write_tensors
from tests.unit.test_ranking import statistics

# Three tokens of one neuron: mean of z 2/3, z g = 2, -2, -3, (z - mean) g = 2/3, -8/3, -7/3.
Z, G = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 1.0, -1.0])
BY_HAND = {
    "taylor": 7 / 3,
    "taylor_mean": 17 / 9,
    "fisher": 17 / 3,
    "fisher_mean": 13 / 3,
    "fisher_shrunk": math.sqrt(17 / 3 * 14 / 3 * 2),
    "fisher_mean_shrunk": math.sqrt(13 / 3 * 38 / 9 * 2),
    "residual": (1 + 2 + 3) * 0.5 / 3,
    "residual_rms": math.sqrt((1 + 4 + 9) * 0.25 / 3),
    "wanda": math.sqrt(14) * 0.75,
}


def saliency_of(z: Tensor, g: Tensor, **changes: Any) -> NeuronSaliency:
    """Sums over [token, layer, neuron]; each neuron's norm over that of the residual stream is 1/2, its L1 norm 3/4."""
    z, g = z.double(), g.double()
    info = ModelInfo(
        "hand-made", z.shape[1], 8, z.shape[2], "silu", True, "float32", "as loaded", "none", (0, 2), "f00d"
    )
    product, centred = z * g, (z - z.mean(0)) * g
    fields: dict[str, Any] = {
        "model": info,
        "corpus": {"name": "hand-made", "sha256": "0", "n_tokens": 5, "window": 5},
        "n_tokens": len(z),
        "n_scored": len(z) - 1,
        "activation_sum": z.sum(0),
        "activation_sq_sum": (z**2).sum(0),
        "share_sum": z.abs().sum(0) / 2,
        "share_sq_sum": (z**2).sum(0) / 4,
        "gradient_sum": g.sum(0),
        "gradient_sq_sum": (g**2).sum(0),
        "product_sum": product.sum(0),
        "product_abs_sum": product.abs().sum(0),
        "product_sq_sum": (product**2).sum(0),
        "product_gradient_sum": (product * g).sum(0),
        "centred_abs_sum": centred.abs().sum(0),
        "w_l1": torch.full(z.shape[1:], 0.75, dtype=torch.float64),
    }
    return NeuronSaliency(**(fields | changes))


@pytest.fixture
def found() -> NeuronSaliency:
    generator = torch.Generator().manual_seed(0)
    z, g = torch.randn(50, 2, 4, generator=generator), torch.randn(50, 2, 4, generator=generator)
    return saliency_of(z + 1, g)


@pytest.mark.parametrize("by", sorted(BY_HAND))
def test_scores_of_three_tokens_by_hand(by: str) -> None:
    three = saliency_of(Z.view(3, 1, 1), G.view(3, 1, 1))
    assert RANKINGS[by].of(Measured(by, None, three)).item() == pytest.approx(BY_HAND[by])


def test_every_score_of_a_saliency_was_worked_by_hand() -> None:
    assert {by for by, score in RANKINGS.items() if score.needs == "saliency"} == set(BY_HAND)


@pytest.mark.parametrize(("by", "expected"), [("rms", math.sqrt(14 / 3) * 2), ("fluctuation", math.sqrt(38 / 9) * 2)])
def test_scores_of_statistics_by_hand(by: str, expected: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    moments = {"activation_sum": one * 2, "contribution_sq_sum": one * 14 * 4, "w_norm": one.float() * 2}
    stats = statistics([[4.0]], layers=(0,), n_tokens=3, **moments)
    assert rank(stats, by=by).scores.item() == pytest.approx(expected)


def test_fluctuation_of_a_constant_is_zero_and_not_nan() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    value = 0.1 + 1e-9
    moments = {"activation_sum": one * 3 * value, "contribution_sq_sum": one * 3 * value**2, "w_norm": one.float()}
    assert rank(statistics([[value]], layers=(0,), n_tokens=3, **moments), by="fluctuation").scores.item() < 1e-8


@pytest.mark.parametrize("constant", [0.0, 0.7, -3.0])
def test_fisher_of_any_constant_is_that_of_the_tokens(constant: float) -> None:
    generator = torch.Generator().manual_seed(1)
    z, g = torch.randn(50, 2, 4, generator=generator) + 5, torch.randn(50, 2, 4, generator=generator)
    direct = (((z.double() - constant) * g.double()) ** 2).mean(0)
    assert torch.allclose(saliency_of(z, g).fisher(constant), direct, rtol=1e-10)
    per_neuron = torch.full((2, 4), constant, dtype=torch.float64)
    assert torch.equal(saliency_of(z, g).fisher(per_neuron), saliency_of(z, g).fisher(constant))


def test_fisher_of_a_constant_neuron_and_its_own_value_is_zero() -> None:
    three = saliency_of(torch.full((3, 1, 1), 0.1), G.view(3, 1, 1))
    assert three.fisher(three.mean_activation).item() == pytest.approx(0, abs=1e-12)


def test_predicted_rise_to_first_order(found: NeuronSaliency) -> None:
    assert torch.equal(found.predicted_rise(order=1), -found.product_sum / 49)
    expected = (2.0 * found.gradient_sum - found.product_sum) / 49
    assert torch.equal(found.predicted_rise(2.0, order=1), expected)


def test_predicted_rise_to_second_order_is_that_of_a_quadratic_loss() -> None:
    """Where tokens are apart and the Hessian is g^2, as the Fisher information takes it, it is exact."""
    generator = torch.Generator().manual_seed(2)
    z, g = (torch.randn(50, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    change = 0.7 - z
    expected = (g * change + 0.5 * g**2 * change**2).sum(0) / 49
    assert torch.allclose(saliency_of(z, g).predicted_rise(0.7), expected, rtol=1e-10)


def test_a_saliency_ranks_alone_and_beside_statistics(found: NeuronSaliency) -> None:
    alone, beside = rank(found, by="taylor"), rank(statistics(), by="taylor", saliency=found)
    assert torch.equal(alone.scores, beside.scores)
    assert (alone.by, alone.corpus) == ("taylor", found.corpus)
    assert beside.mean_activation is not None
    assert torch.equal(beside.mean_activation, found.mean_activation)
    assert rank(found).by == rank(statistics(), saliency=found).by == DEFAULT_RANKING
    assert rank(statistics()).by == "contribution"
    assert rank(statistics(), by="contribution", saliency=found).corpus == statistics().corpus


def test_scope_layer_of_a_saliency(found: NeuronSaliency) -> None:
    ranking = rank(found, by="fisher", scope="layer")
    for k in range(0, 9, 2):
        assert sum(layer == 0 for layer, _ in ranking.weakest(k)) == k // 2


def test_what_a_score_lacks_is_said_with_the_call_that_mends_it(found: NeuronSaliency) -> None:
    with pytest.raises(ValueError, match=r"by='fisher' needs a saliency pass: rank\(saliency\(model, corpus\)"):
        rank(statistics(), by="fisher")
    with pytest.raises(ValueError, match=r"by='rms' needs statistics: rank\(record\(model, corpus\), by='rms'\)"):
        rank(found, by="rms")
    with pytest.raises(ValueError, match="two saliencies"):
        rank(found, saliency=found)
    with pytest.raises(ValueError, match="different models: hand-made and other"):
        rank(statistics(), saliency=replace(found, model=replace(found.model, name="other", fingerprint="beef")))


@pytest.mark.parametrize("kind", [lambda x: x, torch.tensor, np.array, lambda x: torch.tensor(x).half()])
def test_scores_of_your_own(kind: Any) -> None:
    ranking = rank(statistics(), by=kind([[3.0, 1.0, 1.0, 2.0], [0.5, 9.0, 1.0, 0.0]]), name="mine")
    assert (ranking.by, ranking.weakest(2)) == ("mine", [(2, 3), (2, 0)])
    assert ranking.scores.dtype == torch.float64


def test_scores_of_your_own_are_copied() -> None:
    own = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    ranking = rank(statistics(), by=own, scope="layer")
    own.zero_()
    assert ranking.scores.max() == 7
    assert ranking.by == "scores of your own"


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(2, 3), {}, r"scores must be \[2, 4\], one a layer and neuron, got \[2, 3\]"),
        (torch.zeros(8), {}, r"scores must be \[2, 4\]"),
        (torch.tensor([[0.0] * 4, [0.0, 0.0, math.nan, 0.0]]), {"name": "mine"}, "'mine' are NaN, first in layer 2, "),
        ([["a"] * 4] * 2, {}, r"by must be a name or numbers of shape \[2, 4\], got list"),
        ("taylor", {"name": "mine"}, "name is for scores of your own"),
    ],
)
def test_bad_scores_of_your_own_are_refused(
    found: NeuronSaliency, scores: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank(found, by=scores, **options)


def test_saved_and_loaded(found: NeuronSaliency, tmp_path: Path) -> None:
    found = replace(found, cost={"seconds": 1.0})
    found.save(tmp_path)
    again = NeuronSaliency.load(tmp_path)
    for name in NeuronSaliency.__dataclass_fields__:
        old, new = getattr(found, name), getattr(again, name)
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: tensors.pop("w_l1"), "w_l1"),
        (lambda tensors, header: tensors.update(w_l1=torch.zeros(2, 4)), "float32"),
        (lambda tensors, header: tensors.update(share_sum=torch.zeros(2, 5).double()), "share_sum"),
        (lambda tensors, header: tensors["product_sum"].fill_(math.nan), "product_sum"),
        (lambda tensors, header: header.update(n_tokens=0), "0 tokens"),
        (lambda tensors, header: header.update(corpus={}), "name"),
        (lambda tensors, header: header.pop("cost"), "cost"),
    ],
)
def test_a_damaged_file_is_named(found: NeuronSaliency, tmp_path: Path, change: Any, message: str) -> None:
    found.save(tmp_path)
    tensors, header = read_tensors(tmp_path / "saliency.safetensors")
    change(tensors, header)
    write_tensors(tmp_path / "saliency.safetensors", tensors, header)
    with pytest.raises(RunFolderError, match=rf"saliency.safetensors is damaged \(.*{message}"):
        NeuronSaliency.load(tmp_path)
