"""`threshold_mask`: in place, to the bit, and nothing outside of what it was given."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from neuron_sparsity.kernels.reference import BLOCK_TOKEN
from tests.kernels.oracles import (
    DTYPES,
    LAYOUTS,
    N_NEURON,
    SMALLEST,
    Backend,
    activations,
    bits,
    check_mask,
    contributions,
    laid_out,
    weights,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", [0, 1, 7, 63, BLOCK_TOKEN, 300])
def test_mask_equals_the_oracle_in_place(backend: Backend, n_token: int, dtype: torch.dtype) -> None:
    z, (w_norm, _) = activations(n_token, dtype=dtype, device=backend.device), weights(device=backend.device)
    check_mask(backend, z, w_norm, 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_equals_the_oracle_in_every_layout(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    z, (w_norm, _) = activations(7, dtype=dtype, device=backend.device), weights(device=backend.device)
    check_mask(backend, laid_out(z)[layout](), w_norm, 0.05)


@pytest.mark.parametrize("n_neuron", [0, 1, 7, 63, 300, 1536, 4097])
def test_mask_equals_the_oracle_for_every_width(backend: Backend, n_neuron: int) -> None:
    z, (w_norm, _) = activations(3, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
    check_mask(backend, z, w_norm, 0.5)


@pytest.mark.parametrize("n_neuron", [15, 16, 17, 63, 300])
def test_mask_equals_the_oracle_in_many_blocks(backend: Backend, tune: Callable[..., None], n_neuron: int) -> None:
    tune("threshold_mask", MAX_BLOCK=16)
    z, (w_norm, _) = activations(5, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
    check_mask(backend, z, w_norm, 0.5)


def test_mask_touches_only_what_it_was_given(backend: Backend) -> None:
    wide = torch.full((6, 5), 0.5, device=backend.device)
    backend.threshold_mask(wide[::2, 1:4], backend.tensor([1.0, 1.0, 1.0]), 1.0)
    expected = torch.full((6, 5), 0.5)
    expected[::2, 1:4] = 0.0
    assert torch.equal(wide.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cutting_nothing_changes_no_bit(backend: Backend, dtype: torch.dtype) -> None:
    z, (w_norm, _) = activations(40, dtype=dtype), weights(device=backend.device)
    z[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max], dtype=dtype)
    for cut in (0.0, -1.0, -math.inf):
        changed = z.to(backend.device, copy=True)
        assert backend.threshold_mask(changed, w_norm, cut).tolist() == [N_NEURON] * len(z)
        assert torch.equal(bits(changed), bits(z))


def test_a_tie_with_the_threshold_is_active(backend: Backend) -> None:
    below = float(torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)))
    z = backend.tensor([[1.0, -2.0, below, 0.0]])
    assert backend.threshold_mask(z, backend.tensor([1.0] * 4), 2.0).tolist() == [1]
    assert z.tolist() == [[0.0, -2.0, 0.0, 0.0]]


def test_the_threshold_is_rounded_to_float32(backend: Backend) -> None:
    """The float32 nearest to 0.7 is less than 0.7; thresholds may be integers, and beyond what float32 holds."""
    z = backend.tensor([[0.7, 1.0, 0.5, 0.0, math.inf]])
    active = [int(backend.threshold_mask(z.clone(), backend.tensor([1.0] * 5), cut)) for cut in (0.7, 1, 1e-50, 1e50)]
    assert active == [3, 2, 5, 1]


def test_a_threshold_that_is_a_contribution_keeps_it(backend: Backend) -> None:
    """The threshold goes through a Python float: that must not move it across the contribution it was read from."""

    def check(n_token: int, n_neuron: int) -> None:
        z, (w_norm, _) = activations(n_token, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
        cut = float(contributions(z, w_norm).max())
        assert int(backend.threshold_mask(z, w_norm, cut).sum()) >= 1

    backend.for_all(check, n_token=st.integers(1, 3), n_neuron=st.integers(1, 40))


@pytest.mark.parametrize("cut", [SMALLEST, 2 * SMALLEST, 1e-40, 2e-40])
def test_subnormal_contributions_and_thresholds_are_compared_exactly(backend: Backend, cut: float) -> None:
    z = backend.tensor([[SMALLEST, -2 * SMALLEST, 1e-20, -3e-20, 0.0, -0.0]])
    check_mask(backend, z, backend.tensor([1.0, 1.0, 1e-20, 1e-20, 1.0, 1.0]), cut)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [5.0, math.inf])
def test_nan_stays_and_is_not_active_and_infinity_is(backend: Backend, cut: float, dtype: torch.dtype) -> None:
    z = backend.tensor([[math.nan, math.inf, -math.inf, 1.0], [1.0, -6.0, math.nan, 5.0]], dtype=dtype)
    check_mask(backend, z, backend.tensor([1.0] * 4), cut)


def test_all_zeros(backend: Backend) -> None:
    for cut, n_active in ((0.0, 3), (SMALLEST, 0)):
        z = backend.tensor([[0.0, -0.0, 0.0]] * 2)
        assert backend.threshold_mask(z, backend.tensor([1.0] * 3), cut).tolist() == [n_active] * 2
        assert not z.any()


def test_mask_is_idempotent_and_monotone(backend: Backend) -> None:
    def check(z: list[float], cut: float, w: float) -> None:
        once, w_norm = backend.tensor([z]), torch.full((len(z),), w, device=backend.device)
        more = once.clone()
        n_active = backend.threshold_mask(once, w_norm, cut)
        again = once.clone()
        n_again = backend.threshold_mask(again, w_norm, cut)
        assert torch.equal(again, once)
        if cut > 0:
            assert torch.equal(n_again, n_active)
        assert bool((backend.threshold_mask(more, w_norm, cut + 0.5) <= n_active).all())

    values = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12)
    backend.for_all(check, z=values, cut=st.floats(0, 8, width=16), w=st.floats(0.25, 4))


def test_norms_may_be_of_any_float_type_and_layout(backend: Backend) -> None:
    z, (w_norm, _) = activations(7, device=backend.device), weights(2 * N_NEURON, device=backend.device)
    check_mask(backend, z.clone(), w_norm[::2], 0.05)
    check_mask(backend, z, w_norm[:N_NEURON].bfloat16(), 0.05)


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Four GiB, of which two pages are touched."""
    z = torch.empty_strided((2, 3), (2**31 + 8, 1), dtype=torch.float16, device=backend.device)
    check_mask(backend, z.copy_(activations(2, 3)), weights(3, device=backend.device)[0], 0.05)
