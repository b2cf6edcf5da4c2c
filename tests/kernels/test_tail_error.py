"""`tail_error`: exact counts, norms as good as torch's, for all thresholds and for the full output."""

from __future__ import annotations

import math

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
    check_tail,
    laid_out,
    weights,
)

CUTS = [0.0, SMALLEST, 0.02, 0.5, 3.0, 1e9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", [0, 1, 7, 63, BLOCK_TOKEN, 300])
def test_tail_error_equals_the_oracle(backend: Backend, n_token: int, dtype: torch.dtype) -> None:
    z, (w_norm, w_out) = activations(n_token, dtype=dtype, device=backend.device), weights(device=backend.device)
    check_tail(backend, z, w_norm, w_out.to(dtype), CUTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_token", "n_neuron", "d_model"), [(1, 1, 1), (7, 63, 64), (65, 300, 130), (129, 33, 257), (5, 1536, 7)]
)
def test_tail_error_equals_the_oracle_in_many_tiles(
    backend: Backend, n_token: int, n_neuron: int, d_model: int, dtype: torch.dtype
) -> None:
    z = activations(n_token, n_neuron, dtype, backend.device)
    w_norm, w_out = weights(n_neuron, d_model, backend.device)
    check_tail(backend, z, w_norm, w_out.to(dtype), [0.05, 10.0])


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_may_be_of_another_dtype(backend: Backend, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    z, (w_norm, w_out) = activations(7, dtype=dtype, device=backend.device), weights(device=backend.device)
    check_tail(backend, z, w_norm, w_out.to(w_dtype), [0.5])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tail_error_equals_the_oracle_in_every_layout(backend: Backend, layout: str) -> None:
    z, (w_norm, w_out) = activations(63, device=backend.device), weights(device=backend.device)
    for other in LAYOUTS:
        check_tail(backend, laid_out(z)[layout](), w_norm, laid_out(w_out)[other](), [0.05, 1.0])


def test_cutting_no_neuron_and_cutting_all_are_exact(backend: Backend) -> None:
    """Nothing but exact zeros is below a positive number, and a threshold above everything cuts everything."""
    z, (w_norm, w_out) = activations(70, device=backend.device), weights(device=backend.device)
    error, active, full = backend.tail_error(z, w_norm, w_out, backend.tensor([0.0, SMALLEST, 1e9]))
    assert not error[:2].any()
    assert torch.equal(error[2], full)
    assert active.tolist() == [z.numel(), int(z.count_nonzero()), 0]


@pytest.mark.parametrize(
    ("n_token", "n_neuron", "d_model", "n_cut"), [(0, 3, 2, 1), (2, 0, 2, 1), (2, 3, 0, 1), (7, 11, 5, 0), (0, 3, 2, 0)]
)
def test_shapes_with_nothing_in_them(backend: Backend, n_token: int, n_neuron: int, d_model: int, n_cut: int) -> None:
    w_norm, w_out = torch.ones(n_neuron, device=backend.device), torch.ones(n_neuron, d_model, device=backend.device)
    check_tail(backend, activations(n_token, n_neuron, device=backend.device), w_norm, w_out, [0.5] * n_cut)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_all_zeros(backend: Backend, value: float) -> None:
    w_norm, w_out = weights(device=backend.device)
    z = torch.full((3, N_NEURON), value, device=backend.device)
    error, active, full = backend.tail_error(z, w_norm, w_out, backend.tensor([0.0, SMALLEST]))
    assert (error.any(), full.any()) == (False, False)
    assert active.tolist() == [3 * N_NEURON, 0]


def test_a_tie_with_the_threshold_is_active(backend: Backend) -> None:
    z, ones = backend.tensor([[3.0, -4.0, 4.0]]), backend.tensor([1.0, 1.0, 1.0])
    above = math.nextafter(4.0, 5.0) + 2.0**-21
    error, active, _ = backend.tail_error(z, ones, torch.eye(3, device=backend.device), backend.tensor([4.0, above]))
    assert active.tolist() == [2, 0]
    assert float(error[0, 0]) == 3.0


def test_subnormal_contributions_and_thresholds_are_compared_exactly(backend: Backend) -> None:
    z, w_norm = backend.tensor([[SMALLEST, 2 * SMALLEST, 1e-20, -3e-20, 0.0]]), backend.tensor([1, 1, 1e-20, 1e-20, 1])
    w_out = torch.eye(5, device=backend.device)
    check_tail(backend, z, w_norm, w_out, [SMALLEST, 2 * SMALLEST, 1e-40, 2e-40])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_full_norm_and_stays_in_its_token(backend: Backend, bad: float) -> None:
    z, (w_norm, w_out) = activations(9, device=backend.device), weights(device=backend.device)
    z[:, 2] = 100.0
    cuts = backend.tensor([0.05, 1.0])
    clean = backend.tail_error(z, w_norm, w_out, cuts)
    z[3, 2] = bad
    error, active, full = backend.tail_error(z, w_norm, w_out, cuts)
    assert not math.isfinite(float(full[3]))
    assert torch.equal(active, clean[1]), "what is not finite is not below a threshold"
    others = [token for token in range(9) if token != 3]
    assert torch.equal(error[:, others], clean[0][:, others])
    assert torch.equal(full[others], clean[2][others])


def test_tail_and_rest_make_the_whole(backend: Backend) -> None:
    """With orthogonal output weights the squared norms of what is cut and what is kept add up."""
    w_out = torch.diag(backend.tensor([1.0, 2.0, 0.5, 1.0]))
    w_norm = w_out.norm(dim=1)

    def check(values: list[float], cut: float) -> None:
        z = backend.tensor([values])
        error, active, full = backend.tail_error(z, w_norm, w_out, backend.tensor([cut]))
        kept = z.clone()
        assert backend.threshold_mask(kept, w_norm, cut).tolist() == active.tolist()
        assert float(error**2 + (kept @ w_out).norm() ** 2) == pytest.approx(float(full**2), rel=1e-5, abs=1e-6)

    values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=4, max_size=4)
    backend.for_all(check, values=values, cut=st.floats(0, 4, width=32))


def test_norms_and_thresholds_may_be_of_any_float_type_and_layout(backend: Backend) -> None:
    z, (w_norm, w_out) = activations(7, device=backend.device), weights(2 * N_NEURON, device=backend.device)
    check_tail(backend, z, w_norm[::2], w_out[:N_NEURON], [0.05])
    check_tail(backend, z, w_norm[:N_NEURON].half(), w_out[:N_NEURON], [0.05])
    given = (z, w_norm[:N_NEURON], w_out[:N_NEURON])
    plain = backend.tail_error(*given, backend.tensor([0.0625, 1.0]))
    for cuts in (backend.tensor([0.0625, 9.0, 1.0, 9.0])[::2], backend.tensor([0.0625, 1.0], dtype=torch.float64)):
        for ours, expected in zip(backend.tail_error(*given, cuts), plain, strict=True):
            assert torch.equal(ours, expected)


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Four GiB for the activations and four for the weights, of which a few pages are touched."""
    w_norm, w_out = weights(3, device=backend.device)
    z = torch.empty_strided((2, 3), (2**31 + 8, 1), dtype=torch.float16, device=backend.device)
    check_tail(backend, z.copy_(activations(2, 3)), w_norm, w_out, [0.05])
    wide = torch.empty_strided((3, w_out.shape[1]), (2**30 + 8, 1), dtype=torch.float16, device=backend.device)
    check_tail(backend, z, w_norm, wide.copy_(w_out), [0.05])
