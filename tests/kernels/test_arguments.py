"""What is said when an argument is wrong: the same on every backend, because it is said before one is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from neuron_sparsity import kernels
from neuron_sparsity.kernels import MAX_THRESHOLDS, StatisticsState

Z, W_NORM, W_OUT = torch.zeros(2, 3), torch.ones(3), torch.ones(3, 4)
ELSEWHERE = torch.ones(3, device="meta")


def statistics(z: torch.Tensor, w_norm: torch.Tensor, n_neuron: int = 3) -> Callable[[str], object]:
    return lambda backend: kernels.neuron_statistics(z, w_norm, StatisticsState.zeros(n_neuron), backend=backend)


def tail(z: torch.Tensor, w_norm: torch.Tensor, w_out: torch.Tensor, cuts: torch.Tensor) -> Callable[[str], object]:
    return lambda backend: kernels.tail_error(z, w_norm, w_out, cuts, backend=backend)


def mask(z: torch.Tensor, w_norm: torch.Tensor, cut: float = 1.0) -> Callable[[str], object]:
    return lambda backend: kernels.threshold_mask(z, w_norm, cut, backend=backend)


def topk(z: torch.Tensor, w_norm: torch.Tensor, k: int) -> Callable[[str], object]:
    return lambda backend: kernels.contribution_topk(z, w_norm, k, backend=backend)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (statistics(Z[0], W_NORM), "z must be [token, neuron] or [group, token, neuron], got [3]"),
        (statistics(Z[None, None], W_NORM), "z must be [token, neuron] or [group, token, neuron], got [1, 1, 2, 3]"),
        (statistics(Z, torch.ones(4)), "w_norm must be [3], got [4]"),
        (statistics(Z[None], torch.ones(2)), "w_norm must be [3], got [2]"),
        (statistics(Z, W_NORM, 4), "state is for 4 neurons, z has 3"),
        (statistics(Z, ELSEWHERE), "z is on cpu and w_norm on meta; move one to the other"),
        (
            tail(Z[None], W_NORM, W_OUT, torch.ones(1)),
            "z must be [token, neuron], got [1, 2, 3]; flatten batch and pos",
        ),
        (tail(Z, W_NORM, W_OUT.to("meta"), torch.ones(1)), "z is on cpu and w_out on meta; move one to the other"),
        (tail(Z, W_NORM, torch.ones(4, 3), torch.ones(1)), "w_out must be [3, d_model], got [4, 3]"),
        (tail(Z, W_NORM, W_OUT, torch.tensor(1.0)), "thresholds must be [threshold], got []"),
        (tail(Z, ELSEWHERE, W_OUT, torch.ones(1)), "z is on cpu and w_norm on meta; move one to the other"),
        (mask(Z[0], W_NORM), "z must be [token, neuron], got [3]; flatten batch and pos"),
        (mask(Z, W_NORM[:2]), "w_norm must be [3], got [2]"),
        (mask(Z, W_NORM, math.nan), "threshold must be a number, got nan"),
        (mask(Z, ELSEWHERE), "z is on cpu and w_norm on meta; move one to the other"),
        (topk(Z[None], W_NORM, 1), "z must be [token, neuron], got [1, 2, 3]; flatten batch and pos"),
        (topk(Z, W_NORM, 0), "k must be between 1 and 3, got 0"),
        (topk(Z, W_NORM, 4), "k must be between 1 and 3, got 4"),
        (topk(Z, W_OUT, 1), "w_norm must be [3], got [3, 4]"),
        (topk(Z, ELSEWHERE, 1), "z is on cpu and w_norm on meta; move one to the other"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_right(
    backend: str, call: Callable[[str], object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        call(backend)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (Z, 7, "k must be between 0 and 6, got 7"),
        (Z, -1, "k must be between 0 and 6, got -1"),
        (W_NORM, 1, "scores must be [layer, neuron], got [3]"),
        (
            torch.full((1, 2), math.nan),
            1,
            "scores must not be NaN; drop or replace the scores that could not be computed",
        ),
    ],
)
def test_global_rank_names_a_wrong_argument(scores: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        kernels.global_rank(scores, k)
    assert str(caught.value) == message


def test_a_state_counts_only_so_many_thresholds() -> None:
    StatisticsState.zeros(1, torch.ones(MAX_THRESHOLDS))
    with pytest.raises(ValueError, match=r"^at most 31 thresholds can be counted at once, got 32$"):
        StatisticsState.zeros(1, torch.ones(32))
