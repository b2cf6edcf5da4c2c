"""Greedy refinement: against the same steps taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_sparsity import greedy
from neuron_sparsity.ablation import ablate, removable_neurons
from neuron_sparsity.corpus import Windows
from neuron_sparsity.greedy import refine
from neuron_sparsity.ranking import rank
from neuron_sparsity.saliency import NeuronSaliency, saliency

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def windows(model: Any, own_windows: Any) -> Windows:
    made: Windows = own_windows(model, 8)
    return made


@pytest.fixture(scope="module")
def first(model: Any, windows: Windows) -> NeuronSaliency:
    return saliency(model, windows)


@pytest.mark.parametrize(("by", "replacement"), [("fisher", "zero"), ("fisher_mean", "mean"), ("taylor", "mean")])
def test_two_rounds_are_two_steps_by_hand(
    model: Any, windows: Windows, first: NeuronSaliency, by: str, replacement: str
) -> None:
    means = first.mean_activation
    ranking = refine(model, windows, first, n_remove=40, n_rounds=2, by=by, replacement=replacement)
    gone = rank(first, by=by).weakest(20)
    assert ranking.weakest(20) == gone
    with ablate(model, gone, replacement=replacement, means=means):
        inside = saliency(model, windows)
    scores = rank(inside, by=by).scores
    if by == "fisher_mean":  # the mean that is put in is that of the dense model
        scores = inside.fisher(means)
    for layer, neuron in gone:
        scores[layer, neuron] = -1
    expected = rank(first, by=scores).weakest(128)
    assert sorted(expected[:20]) == sorted(gone)
    agree = sum(ours == theirs for ours, theirs in zip(ranking.weakest(128)[20:], expected[20:], strict=True))
    assert agree > 100  # of 108; equal but for rounding between the wrapped model and the plain one
    assert set(ranking.weakest(40)) != set(rank(first, by=by).weakest(40))


def test_one_round_is_the_plain_ranking(model: Any, windows: Windows, first: NeuronSaliency) -> None:
    ranking = refine(model, windows, first, n_remove=30, n_rounds=1, by="taylor")
    assert torch.equal(ranking.order(), rank(first, by="taylor").order())
    assert ranking.by == "taylor refined to 30 in 1 (zero)"


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_every_neuron_is_ranked_once_and_a_search_takes_it(
    model: Any, windows: Windows, first: NeuronSaliency, scope: Any
) -> None:
    options = {"by": "taylor", "replacement": "mean"}  # a neuron that has gone still has a score then
    ranking = refine(model, windows, first, n_remove=50, n_rounds=3, scope=scope, **options)
    assert sorted(ranking.weakest(128)) == [(layer, neuron) for layer in range(2) for neuron in range(64)]
    if scope == "layer":
        for k in (16, 50, 128):
            assert abs(sum(layer == 0 for layer, _ in ranking.weakest(k)) - k / 2) <= 1.5
    assert ranking.mean_activation is not None
    assert torch.equal(ranking.mean_activation, first.mean_activation)
    removed = removable_neurons(model, windows, ranking, p_percent=5.0, replacement="mean")
    assert list(removed.removable) == ranking.weakest(removed.n_removable)


def test_neurons_that_went_count_as_the_weakest_of_their_layers(first: NeuronSaliency) -> None:
    scores = torch.arange(64.0).expand(2, 64)
    gone = torch.zeros(2, 64, dtype=torch.bool)
    gone[0, 63] = gone[1, 0] = True  # one of each layer, whatever their scores are now
    left = greedy._left(rank(first, by=scores, scope="layer"), gone)
    assert left[:4].tolist() == [[0, 0], [1, 1], [0, 1], [1, 2]]
    assert len(left) == 126


def test_all_neurons_may_go(model: Any, windows: Windows, first: NeuronSaliency) -> None:
    ranking = refine(model, windows, first, n_remove=128, n_rounds=4)
    assert len(set(ranking.weakest(128))) == 128


def test_the_first_saliency_is_measured_if_it_is_not_given(model: Any, windows: Windows, first: NeuronSaliency) -> None:
    given, measured = (refine(model, windows, one, n_remove=20, n_rounds=2) for one in (first, None))
    assert torch.equal(given.order()[:20], measured.order()[:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "contribution"}, "by must be a score that a saliency pass gives, one of wanda, .*; got 'contribution'"),
        ({"by": "size"}, "got 'size'"),
        ({"replacement": "noise"}, "replacement must be one of zero, mean, got 'noise'"),
        ({"n_remove": 0}, "n_remove must be between 1 and 128, got 0"),
        ({"n_remove": 129}, "n_remove must be between 1 and 128, got 129"),
        ({"n_rounds": 0}, r"n_rounds must be between 1 and n_remove \(10\), got 0"),
        ({"n_rounds": 11}, "got 11"),
    ],
)
def test_bad_arguments_are_refused_before_a_pass(
    model: Any, windows: Windows, first: NeuronSaliency, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refine(model, windows, first, **{"n_remove": 10, "n_rounds": 2} | options)


def test_a_saliency_of_other_text_is_refused(model: Any, windows: Windows, first: NeuronSaliency) -> None:
    with pytest.raises(ValueError, match="first is of another model or other windows"):
        refine(model, windows.take(4), first, n_remove=10)


def test_nothing_is_left_behind(
    model: Any, windows: Windows, first: NeuronSaliency, hooks_on: Any, sample_tokens: Any
) -> None:
    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return getattr(out := model(tokens), "logits", out)

    tokens = windows.tokens[:2].long()
    dense, before = logits(tokens), hooks_on(model)

    def stop(label: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt(label)

    with pytest.raises(KeyboardInterrupt, match="gradients without 10 neurons"):
        refine(model, windows, first, n_remove=20, n_rounds=2, progress=stop)
    assert torch.equal(logits(tokens), dense)
    assert hooks_on(model) == before
