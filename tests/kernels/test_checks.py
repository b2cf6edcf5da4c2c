"""The checks themselves: each notices an answer that is wrong by as little as a bit, and a kernel that is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.kernels import StatisticsState
from tests.kernels.oracles import (
    Backend,
    activations,
    assert_as_good_as_torch,
    check_mask,
    check_statistics,
    check_tail,
    check_topk,
    weights,
)

Z, (W_NORM, W_OUT) = activations(30), weights()
TIED = torch.tensor([[1.0, -1.0, 0.0, 0.0, 2.0]])


def with_each(damages: dict[str, Callable[..., Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage", damages.values(), ids=damages.keys())


class Damaged(Backend):
    """Torch on the CPU, with an answer that `damage` gets its hands on."""

    def __init__(self, damage: Callable[..., Any]) -> None:
        super().__init__("torch", "cpu", 1)
        object.__setattr__(self, "damage", damage)

    def neuron_statistics(self, z: Tensor, w_norm: Tensor, state: StatisticsState) -> Tensor:
        maximum = kernels.neuron_statistics(z, w_norm, state)
        self.damage(z=z, state=state, maximum=maximum)
        return maximum

    def tail_error(self, z: Tensor, w_norm: Tensor, w_out: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error, active, full = kernels.tail_error(z, w_norm, w_out, cuts)
        self.damage(z=z, error=error, active=active, full=full)
        return error, active, full

    def threshold_mask(self, z: Tensor, w_norm: Tensor, threshold: float) -> Tensor:
        active = kernels.threshold_mask(z, w_norm, threshold)
        self.damage(z=z, active=active)
        return active

    def contribution_topk(self, z: Tensor, w_norm: Tensor, k: int, *, largest: bool = False) -> tuple[Tensor, Tensor]:
        values, indices = kernels.contribution_topk(z, w_norm, k, largest=largest)
        self.damage(z=z, values=values, indices=indices)
        return values, indices


def a_bit_up(tensor: Tensor) -> Tensor:
    """The last element, moved to the next number."""
    flat = tensor.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(np.inf, dtype=tensor.dtype))
    return tensor


def swap_first_two(tensor: Tensor) -> Tensor:
    return tensor[:, :2].copy_(tensor[:, :2].flip(1))


@with_each(
    {
        "a maximum": lambda maximum, **_: a_bit_up(maximum),
        "a non-zero": lambda state, **_: state.nonzero_count[-1].add_(1),
        "a bin": lambda state, **_: state.histogram[0].copy_(state.histogram[0].roll(1)),
        "a threshold": lambda state, **_: state.above_count[-1, -1].sub_(1),
        "a token": lambda state, **_: setattr(state, "n_tokens", state.n_tokens + 1),
        "a sum": lambda state, **_: state.activation_sum[3].add_(1e-4),
        "a contribution": lambda state, **_: state.contribution_sum[3].mul_(1 + 2e-5),
        "a square": lambda state, **_: state.contribution_sq_sum[3].mul_(1 - 2e-5),
        "a sum that is NaN": lambda state, **_: state.contribution_sum[0].fill_(np.nan),
        "an activation": lambda z, **_: a_bit_up(z),
    }
)
def test_the_check_of_statistics_notices(damage: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_statistics(Damaged(damage), Z.clone(), W_NORM, [0.05, 1.0])
    check_statistics(Damaged(lambda **_: None), Z.clone(), W_NORM, [0.05, 1.0])


@with_each(
    {
        "an active pair": lambda active, **_: active[-1].add_(1),
        "a norm": lambda error, **_: error[-1, 0].mul_(1 + 1e-5),
        "a full norm": lambda full, **_: full[0].mul_(1 - 1e-5),
        "a norm that is NaN": lambda error, **_: error[0, 0].fill_(np.nan),
        "an activation": lambda z, **_: a_bit_up(z),
    }
)
def test_the_check_of_tail_errors_notices(damage: Callable[..., Any]) -> None:
    z = Z[:1].abs() + 0.25  # of one sign, so that nothing cancels and an error is large beside the scale
    with pytest.raises(AssertionError):
        check_tail(Damaged(damage), z.clone(), W_NORM, W_OUT.abs(), [0.3, 100.0])
    check_tail(Damaged(lambda **_: None), z.clone(), W_NORM, W_OUT.abs(), [0.3, 100.0])


@with_each(
    {
        "a kept value": lambda z, **_: z.copy_(torch.where(z > 1, torch.nextafter(z, torch.zeros(())), z)),
        "a value that was cut": lambda z, **_: z.masked_fill_(z == 0, 1e-45),
        "a count": lambda active, **_: active[0].add_(1),
    }
)
def test_the_check_of_masks_notices(damage: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_mask(Damaged(damage), Z.clone(), W_NORM, 0.05)
    check_mask(Damaged(lambda **_: None), Z.clone(), W_NORM, 0.05)


@with_each(
    {
        "a tie that goes to the larger index": lambda indices, **_: swap_first_two(indices),
        "a value": lambda values, **_: a_bit_up(values),
        "an activation": lambda z, **_: a_bit_up(z),
    }
)
def test_the_check_of_rankings_notices(damage: Callable[..., Any]) -> None:
    for largest in (False, True):
        with pytest.raises(AssertionError):
            check_topk(Damaged(damage), TIED.clone(), torch.ones(5), 4, largest=largest)
        check_topk(Damaged(lambda **_: None), TIED.clone(), torch.ones(5), 4, largest=largest)


def test_an_error_is_measured_against_torch_and_not_against_a_number_of_ours() -> None:
    exact, scale = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    for plain_error in (1e-6, 1e-3):
        plain = exact * (1 + plain_error)
        assert_as_good_as_torch(exact * (1 + 1.9 * plain_error), plain, exact, scale, "sum")
        with pytest.raises(AssertionError, match="sum: off by"):
            assert_as_good_as_torch(exact * (1 + 2.9 * plain_error), plain, exact, scale, "sum")
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(np.array([1.0, np.nan]), exact, exact, scale, "sum")


def test_a_wrong_kernel_is_noticed(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the ways in which the mask's kernel could be wrong, put in its place."""
    if backend.name == "torch":
        pytest.skip("for kernels")
    wrong = importlib.import_module("tests.kernels.wrong_kernels")
    module = importlib.import_module("neuron_sparsity.kernels.triton.threshold_mask")
    z, w_norm = backend.tensor([[1.0, 0.25, 3.0, 0.5], [0.5, 0.0, 0.75, 2.0]]), backend.tensor([1.0] * 4)
    check_mask(backend, z.clone(), w_norm, 0.5)
    for name in ("above_only_kernel", "last_neuron_forgotten_kernel", "last_count_forgotten_kernel"):
        with monkeypatch.context() as patch:
            patch.setattr(module, "threshold_mask_kernel", getattr(wrong, name))
            with pytest.raises(AssertionError):
                check_mask(backend, z.clone(), w_norm, 0.5)
