"""Order, ties, scope and wording of rankings, on statistics written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.kernels import N_BINS
from neuron_sparsity.ranking import RANKINGS, rank
from neuron_sparsity.statistics import CONTEXT_LENGTH, NeuronStatistics

N_TOKENS = 10
CONTRIBUTION = [[3.0, 1.0, 1.0, 2.0], [0.5, 9.0, 1.0, 0.0]]


def statistics(contribution: Any = CONTRIBUTION, *, layers: tuple[int, ...] = (0, 2), **changes: Any) -> Any:
    """Statistics of two layers (blocks 0 and 2) whose mean contribution is what is given."""
    mean = torch.tensor(contribution, dtype=torch.float64)
    n_layer, n_neuron = mean.shape
    info = ModelInfo("hand-made", n_layer, 8, n_neuron, "relu", False, "float32", "as loaded", "none", layers, "f00d")
    counts = torch.zeros(n_layer, n_neuron, dtype=torch.int64)
    fields: dict[str, Any] = {
        "model": info,
        "corpus": {"name": "hand-made", "sha256": "0"},
        "n_tokens": N_TOKENS,
        "zero_count": counts,
        "contribution_sum": mean * N_TOKENS,
        "contribution_sq_sum": mean**2 * N_TOKENS,
        "activation_sum": -mean * N_TOKENS,
        "contribution_max": torch.arange(mean.numel()).flip(0).view_as(mean).float(),
        "histogram": torch.zeros(n_layer, n_neuron, N_BINS, dtype=torch.int64),
        "thresholds": torch.full((n_layer, 1), 0.5),
        "above_count": torch.arange(mean.numel()).view(n_layer, n_neuron, 1),
        "threshold_names": ("CETT-PPL-1%",),
        "example_value": torch.zeros(n_layer, n_neuron, 1),
        "example_position": torch.full((n_layer, n_neuron, 1), -1),
        "example_context": torch.full((n_layer, n_neuron, 1, CONTEXT_LENGTH), -1, dtype=torch.int32),
        "token_strings": {},
        "w_norm": torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]])[:n_layer, :n_neuron],
    }
    return NeuronStatistics(**(fields | changes))


def test_weakest_first_and_ties_by_layer_then_neuron() -> None:
    ranking = rank(statistics())
    assert ranking.weakest(8) == [(2, 3), (2, 0), (0, 1), (0, 2), (2, 2), (0, 3), (0, 0), (2, 1)]
    assert ranking.order()[0].tolist() == [1, 3]  # rows count the measured layers, names are block indices
    assert (ranking.by, ranking.scope, ranking.n_neurons) == ("contribution", "model", 8)


def test_strongest_is_weakest_backwards() -> None:
    ranking = rank(statistics())
    assert ranking.strongest(3) == [(2, 1), (0, 0), (0, 3)]
    assert ranking.strongest(8) == ranking.weakest(8)[::-1]


@pytest.mark.parametrize("k", [0, 1, 8])
def test_k_neurons_each_once(k: int) -> None:
    assert len(set(rank(statistics()).weakest(k))) == k


@pytest.mark.parametrize("k", [-1, 9])
def test_a_k_that_is_not_there_is_refused(k: int) -> None:
    for choose in (rank(statistics()).weakest, rank(statistics()).strongest):
        with pytest.raises(ValueError, match=f"k must be between 0 and 8, got {k}"):
            choose(k)


def test_scope_layer_takes_the_same_share_of_every_layer() -> None:
    ranking = rank(statistics(), scope="layer")
    assert ranking.weakest(8) == [(0, 1), (2, 3), (0, 2), (2, 0), (0, 3), (2, 2), (0, 0), (2, 1)]
    for k in range(0, 9, 2):
        assert sum(layer == 0 for layer, _ in ranking.weakest(k)) == k // 2


@pytest.mark.parametrize(
    ("by", "first", "last"),
    [
        ("contribution", (2, 3), (2, 1)),
        ("activation_frequency", (0, 0), (2, 3)),
        ("maximum", (2, 3), (0, 0)),
        ("weight_norm", (2, 0), (0, 3)),
    ],
)
def test_each_name_ranks_by_its_score(by: str, first: tuple[int, int], last: tuple[int, int]) -> None:
    weakest = rank(statistics(), by=by).weakest(8)
    assert (weakest[0], weakest[-1]) == (first, last)


def test_every_ranking_of_statistics_is_an_order_of_all_neurons() -> None:
    for by in (by for by, score in RANKINGS.items() if score.needs != "saliency"):
        for scope in ("model", "layer"):
            named = rank(statistics(), by=by, scope=scope).weakest(8)
            assert sorted(named) == [(layer, neuron) for layer in (0, 2) for neuron in range(4)]


def test_random_is_repeatable_and_moves_with_its_seed() -> None:
    orders = [rank(statistics(), by="random", seed=seed).weakest(8) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert rank(statistics(), by="random", seed=1).seed == 1


def test_infinite_scores_come_last_and_all_equal_scores_keep_their_order() -> None:
    infinite = [[math.inf, 1.0, 1.0, 2.0], [0.5, 9.0, 1.0, 0.0]]
    assert rank(statistics(infinite)).strongest(1) == [(0, 0)]
    even = rank(statistics([[1.0] * 4] * 2)).weakest(8)
    assert even == sorted(even)


def test_mean_replacement_gets_the_signed_mean() -> None:
    mean = rank(statistics()).mean_activation
    assert isinstance(mean, Tensor)
    assert mean.tolist() == [[-3.0, -1.0, -1.0, -2.0], [-0.5, -9.0, -1.0, 0.0]]


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"unknown ranking 'size'; one of contribution, rms, fluctuation, maximum"):
        rank(statistics(), by="size")


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope must be 'model' or 'layer', got 'token'"):
        rank(statistics(), scope="token")  # type: ignore[arg-type]


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="scores by 'contribution' are NaN"):
        rank(statistics([[1.0, math.nan, 1.0, 1.0]] * 2))


def test_frequency_without_recorded_thresholds_says_how_to_record_them() -> None:
    bare = statistics(
        thresholds=torch.zeros(2, 0), above_count=torch.zeros(2, 4, 0, dtype=torch.int64), threshold_names=()
    )
    with pytest.raises(ValueError, match=r"record\(model, corpus, thresholds=\{result\.name: result\.thresholds\}\)"):
        rank(bare, by="activation_frequency")
