"""Contributions, masks and CETT: cases by hand, definitions by brute force, and what holds for every input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_sparsity import metrics
from neuron_sparsity.metrics import EXACT_ZERO_THRESHOLD

few = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0])
rows = st.lists(st.lists(few, min_size=4, max_size=4), min_size=1, max_size=5).map(torch.tensor)


def layer(n_token: int = 20, n_neuron: int = 8, d_model: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_token, n_neuron, generator=generator).relu()
    return z, torch.randn(n_neuron, d_model, generator=generator)


def brute_force_cett(z: Tensor, w_out: Tensor, threshold: float) -> float:
    """Eq. 3 of arXiv:2411.02335, one token and one neuron at a time."""
    c = metrics.contribution(z, w_out)
    ratios = []
    for token in range(len(z)):
        full, tail = np.zeros(w_out.shape[1]), np.zeros(w_out.shape[1])
        for neuron in range(z.shape[1]):
            output = float(z[token, neuron]) * w_out[neuron].double().numpy()
            full += output
            if float(c[token, neuron]) < threshold:
                tail += output
        if np.linalg.norm(full) > 0:
            ratios.append(np.linalg.norm(tail) / np.linalg.norm(full))
    return float(np.mean(ratios)) if ratios else math.nan


def test_contribution_by_hand() -> None:
    z = torch.tensor([[3.0, -4.0], [0.0, 0.5]], dtype=torch.float16)
    w_out = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float16)
    c = metrics.contribution(z, w_out)
    assert c.dtype == torch.float32
    assert c.tolist() == [[15.0, 8.0], [0.0, 1.0]]


def test_contribution_leaves_its_input_alone() -> None:
    z, w_out = layer()
    before = z.clone()
    metrics.contribution(z, w_out)
    metrics.cett(z, w_out, 0.5)
    assert torch.equal(z, before)


# --- CETT ---


def test_cett_by_hand() -> None:
    """Two tokens: (3, 4) loses its 3 of 5; (6, 8) loses nothing."""
    z = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    assert float(metrics.cett(z, torch.eye(2), 3.5)) == pytest.approx(0.3)
    assert float(metrics.cett(z, torch.eye(2), 0.0)) == 0.0
    assert float(metrics.cett(z, torch.eye(2), math.inf)) == 1.0


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), quantile=st.floats(0, 1))
def test_cett_equals_brute_force(seed: int, quantile: float) -> None:
    z, w_out = layer(seed=seed)
    threshold = float(metrics.contribution(z, w_out).flatten().quantile(quantile))
    assert float(metrics.cett(z, w_out, threshold)) == pytest.approx(brute_force_cett(z, w_out, threshold), abs=1e-5)


def test_tokens_without_output_are_left_out() -> None:
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert float(metrics.cett(z, torch.eye(2), 3.5)) == pytest.approx(0.6)
    assert math.isnan(float(metrics.cett(z[:1], torch.eye(2), 3.5)))
    assert math.isnan(float(metrics.cett(z[:0], torch.eye(2), 3.5)))


def test_outputs_that_cancel_are_left_out() -> None:
    w_out = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    z = torch.tensor([[2.0, 2.0], [2.0, 1.0]])
    assert float(metrics.cett(z, w_out, 1.5)) == pytest.approx(1.0)  # of the second token: it loses -1 of 1


def test_cett_may_exceed_one_and_fall() -> None:
    """What is cut next may cancel what was cut before: CETT is no distribution function of the threshold."""
    z, w_out = torch.tensor([[1.0, 1.1, 1.2]]), torch.tensor([[2.0], [-2.0], [2.0]])
    cetts = [float(metrics.cett(z, w_out, threshold)) for threshold in (0.0, 2.1, 2.3, 2.5)]
    assert cetts == pytest.approx([0.0, 2.0 / 2.2, 0.2 / 2.2, 1.0], abs=1e-5)


# --- the threshold of a CETT ---


def brute_force_threshold(z: Tensor, w_out: Tensor, target: float) -> float:
    """The largest of all thresholds that make a difference: each contribution present, and one above them all."""
    values = metrics.contribution(z, w_out).unique()
    values = values[values > 0]
    candidates = [*values.tolist(), float(torch.nextafter(values[-1], torch.tensor(math.inf)))]
    return max(cut for cut in candidates if brute_force_cett(z, w_out, cut) <= target + 1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), target=st.sampled_from([1e-6, 0.05, 0.2, 0.5, 0.9, 1.0]))
def test_threshold_is_the_largest_there_is(seed: int, target: float) -> None:
    z, w_out = layer(n_token=4, n_neuron=6, d_model=2, seed=seed)
    z[0, 0] = 1.0
    assert metrics.threshold_for_cett(z, w_out, target) == brute_force_threshold(z, w_out, target)


def test_threshold_where_cett_falls_again() -> None:
    """A bisection would stop at 2.0: CETT is 0.91 just above it and 0.09 at 2.4."""
    z, w_out = torch.tensor([[1.0, 1.1, 1.2]]), torch.tensor([[2.0], [-2.0], [2.0]])
    assert metrics.threshold_for_cett(z, w_out, 0.1) == pytest.approx(2.4)
    assert metrics.threshold_for_cett(z, w_out, 0.05) == pytest.approx(2.0)


def test_threshold_of_a_layer_keeps_its_promise() -> None:
    z, w_out = layer(n_token=200, n_neuron=32, d_model=16)
    thresholds = [metrics.threshold_for_cett(z, w_out, target) for target in (0.0, 0.01, 0.1, 0.3, 0.7, 1.0)]
    assert thresholds == sorted(thresholds)
    for target, threshold in zip((0.01, 0.1, 0.3, 0.7), thresholds[1:-1], strict=True):
        above = float(np.nextafter(np.float32(threshold), np.float32(math.inf)))
        assert float(metrics.cett(z, w_out, threshold)) <= target + 1e-6
        assert float(metrics.cett(z, w_out, above)) > target - 1e-6
        assert threshold == float(np.float32(threshold))


def test_threshold_at_zero_cuts_exact_zeros_only() -> None:
    """The paper's own code returns its largest threshold here."""
    z, w_out = layer()
    assert metrics.threshold_for_cett(z, w_out, 0.0) == EXACT_ZERO_THRESHOLD
    c = metrics.contribution(z, w_out)
    assert torch.equal(metrics.threshold_mask(c, EXACT_ZERO_THRESHOLD), z != 0)
    assert float(torch.tensor(EXACT_ZERO_THRESHOLD)) > 0
    assert float(torch.tensor(EXACT_ZERO_THRESHOLD / 2)) == 0


def test_threshold_at_one_cuts_everything() -> None:
    z, w_out = layer()
    threshold = metrics.threshold_for_cett(z, w_out, 1.0)
    assert not metrics.threshold_mask(metrics.contribution(z, w_out), threshold).any()
    assert float(metrics.cett(z, w_out, threshold)) == 1.0


def test_threshold_of_silent_layers() -> None:
    z, w_out = layer()
    for silent in (z * 0.0, z[:0]):
        for target in (0.0, 0.5, 1.0):
            assert metrics.threshold_for_cett(silent, w_out, target) == EXACT_ZERO_THRESHOLD
    assert metrics.threshold_for_cett(z, w_out * 0.0, 0.5) == EXACT_ZERO_THRESHOLD


def test_threshold_of_one_neuron() -> None:
    z = torch.tensor([[2.0]])
    assert metrics.threshold_for_cett(z, torch.eye(1), 0.999) == 2.0
    assert metrics.threshold_for_cett(z, torch.eye(1), 1.0) == float(np.nextafter(np.float32(2), np.float32(3)))


# --- masks ---


@given(rows, st.sampled_from([0.0, EXACT_ZERO_THRESHOLD, 0.5, 1.0, 2.0, 3.0]))
def test_threshold_mask_and_fat_agree_on_contributions(c: Tensor, cut: float) -> None:
    c = c.abs()
    mask = metrics.threshold_mask(c, cut)
    assert mask.tolist() == [[value >= cut for value in row] for row in c.tolist()]
    if cut > 0:
        assert torch.equal(metrics.fat_mask(c, cut), mask)
    assert torch.equal(metrics.fat_mask(c, 0.0), c != 0)


def test_fat_by_hand() -> None:
    s = torch.tensor([[0.0, -0.0, -0.1, 0.1, 2.0, 2.0**-149]])
    assert metrics.fat_mask(s, 0.0).tolist() == [[False, False, True, True, True, True]]
    assert metrics.fat_mask(s, 0.1).tolist() == [[False, False, True, True, True, False]]


@given(rows, st.integers(1, 4))
def test_topk_by_sorting(s: Tensor, k: int) -> None:
    mask = metrics.topk_mask(s, k)
    assert mask.sum(dim=1).tolist() == [k] * len(s)
    for row, active in zip(s.tolist(), mask.tolist(), strict=True):
        best = sorted(range(4), key=lambda index: (-abs(row[index]), index))[:k]
        assert [index for index in range(4) if active[index]] == sorted(best)


@given(rows, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]))
def test_topp_is_the_smallest_set(c: Tensor, share: float) -> None:
    c = c.abs()
    mask = metrics.topp_mask(c, share)
    for row, active in zip(c.double(), mask, strict=True):
        total, n_active = float(row.sum()), int(active.sum())
        best = row.sort(descending=True).values
        assert float(row[active].sum()) == float(best[:n_active].sum()), "the largest ones"
        assert float(best[:n_active].sum()) >= share * total, "enough of them"
        assert n_active == 0 or float(best[: n_active - 1].sum()) < share * total, "and not one too many"


def test_topp_ends() -> None:
    c = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    assert metrics.topp_mask(c, 0.0).tolist() == [[False] * 3] * 2
    assert metrics.topp_mask(c, 1.0).tolist() == [[True, False, True], [False] * 3]


def test_masks_of_no_tokens() -> None:
    nothing = torch.empty(0, 3)
    assert metrics.topk_mask(nothing, 2).shape == metrics.topp_mask(nothing, 0.5).shape == (0, 3)
    assert metrics.fat_mask(nothing, 0.1).shape == metrics.threshold_mask(nothing, 0.1).shape == (0, 3)
    assert metrics.activation_ratio(metrics.fat_mask(nothing, 0.1)) == 0.0


@given(rows, st.floats(0, 3), st.floats(0, 3))
def test_activation_ratio_is_a_share_and_falls_with_the_threshold(z: Tensor, low: float, high: float) -> None:
    low, high = sorted((low, high))
    ratios = [metrics.activation_ratio(metrics.threshold_mask(z.abs(), cut)) for cut in (low, high)]
    assert 0 <= ratios[1] <= ratios[0] <= 1


def test_activation_ratio_counts_beyond_float32() -> None:
    """The mean of 2^24 + 1 ones in float32 would lose one of them."""
    active = torch.ones(2**24 + 1, 1, dtype=torch.bool)
    active[0] = False
    assert metrics.activation_ratio(active) == 1 - 1 / (2**24 + 1)


# --- what is said when an argument is wrong ---

Z, W_OUT = torch.ones(2, 3), torch.ones(3, 4)
DISAGREE = "z must be [token, neuron] and w_out [neuron, d_model] of one width, got [2, 3] and [4, 3]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.contribution(Z, W_OUT.T), DISAGREE),
        (lambda: metrics.cett(Z, W_OUT.T, 1.0), DISAGREE),
        (lambda: metrics.threshold_for_cett(Z, W_OUT.T, 0.5), DISAGREE),
        (lambda: metrics.cett(Z, W_OUT, -1.0), "threshold must be >= 0, got -1.0"),
        (lambda: metrics.cett(Z, W_OUT, math.nan), "threshold must be >= 0, got nan"),
        (lambda: metrics.threshold_for_cett(Z, W_OUT, 1.5), "target must be in [0, 1], got 1.5"),
        (lambda: metrics.threshold_for_cett(Z, W_OUT, math.nan), "target must be in [0, 1], got nan"),
        (lambda: metrics.threshold_mask(Z, -1.0), "threshold must be >= 0, got -1.0"),
        (lambda: metrics.fat_mask(Z, -0.5), "eps must be >= 0, got -0.5"),
        (lambda: metrics.topk_mask(Z, 0), "k must be between 1 and 3, got 0"),
        (lambda: metrics.topk_mask(Z, 4), "k must be between 1 and 3, got 4"),
        (lambda: metrics.topp_mask(Z, 1.1), "share must be in [0, 1], got 1.1"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        call()
    assert str(caught.value) == message
