"""`contribution_topk`: the indices and values of a full stable sort, however the row is cut into tiles and parts."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.kernels.oracles import (
    DTYPES,
    LAYOUTS,
    N_NEURON,
    SMALLEST,
    Backend,
    activations,
    check_topk,
    laid_out,
    weights,
)

LARGEST = pytest.mark.parametrize("largest", [False, True], ids=["weakest", "strongest"])


def tied(
    n_token: int, n_neuron: int = N_NEURON, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and weight norms with many equal contributions, not only at zero."""
    z, (w_norm, _) = activations(n_token, n_neuron, dtype, device), weights(n_neuron, device=device)
    return (z * 2).round() / 2, (w_norm * 2).ceil() / 2


@LARGEST
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", [0, 1, 4])
def test_topk_equals_the_oracle(backend: Backend, n_token: int, dtype: torch.dtype, largest: bool) -> None:
    z, w_norm = tied(n_token, dtype=dtype, device=backend.device)
    for k in (1, 4, N_NEURON):
        check_topk(backend, z, w_norm, k, largest=largest)


@pytest.mark.parametrize(("n_token", "k"), [(7, 5), (63, 1), (300, 1)])
def test_topk_equals_the_oracle_for_many_tokens(backend: Backend, n_token: int, k: int) -> None:
    z, w_norm = tied(n_token, device=backend.device)
    check_topk(backend, z, w_norm, k, largest=True)


@LARGEST
@pytest.mark.parametrize("n_neuron", [1, 7, 63, 300, 1536])
def test_topk_equals_the_oracle_for_every_width(
    backend: Backend, tune: Callable[..., None], n_neuron: int, largest: bool
) -> None:
    """Without ties other than zeros, and with many; k from one neuron to all of them."""
    if backend.interpreted:
        tune("contribution_topk", MAX_SORT=64)  # interpreted, a sort of 2,048 takes five seconds
    for k in sorted({1, n_neuron // 3 or 1, n_neuron // 2 or 1, n_neuron - 1 or 1, n_neuron}):
        check_topk(backend, *tied(2, n_neuron, device=backend.device), k, largest=largest)
    z, (w_norm, _) = activations(2, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
    check_topk(backend, z, w_norm, n_neuron // 2 or 1, largest=largest)


@pytest.mark.parametrize("k", [300, 2048, 2049])
def test_as_many_as_one_program_sorts_and_one_more(backend: Backend, k: int) -> None:
    if backend.interpreted and k == 2048:
        pytest.skip("interpreted, a sort of 2,048 takes five seconds")
    check_topk(backend, *tied(1, 2100, device=backend.device), k, largest=True)


@LARGEST
@pytest.mark.parametrize("n_neuron", [32_768, 32_769])
def test_a_row_as_wide_as_registers_hold_and_one_wider(backend: Backend, n_neuron: int, largest: bool) -> None:
    z, (w_norm, _) = activations(1, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
    check_topk(backend, z, w_norm, 100, largest=largest)


@LARGEST
@pytest.mark.parametrize(("n_neuron", "k"), [(17, 5), (48, 48), (63, 1), (63, 40), (300, 33)])
def test_topk_equals_the_oracle_in_many_tiles(
    backend: Backend, tune: Callable[..., None], n_neuron: int, k: int, largest: bool
) -> None:
    tune("contribution_topk", MAX_ROW=16, TILE=16)
    check_topk(backend, *tied(2, n_neuron, device=backend.device), k, largest=largest)


@LARGEST
@pytest.mark.parametrize(("n_neuron", "k"), [(9, 3), (63, 20), (64, 64)])
def test_topk_equals_the_oracle_in_many_parts(
    backend: Backend, tune: Callable[..., None], n_neuron: int, k: int, largest: bool
) -> None:
    if backend.name == "triton":
        plain = importlib.import_module("neuron_sparsity.kernels.triton.contribution_topk").select_options

        def select_options(n: int) -> dict[str, Any]:
            return {**plain(n), "PART": 8}

        tune("contribution_topk", select_options=select_options)
    check_topk(backend, *tied(3, n_neuron, device=backend.device), k, largest=largest)


@LARGEST
@pytest.mark.parametrize("k", [3, 4, 5, N_NEURON])
def test_more_than_one_program_sorts(backend: Backend, tune: Callable[..., None], k: int, largest: bool) -> None:
    tune("contribution_topk", MAX_SORT=4)
    z, w_norm = tied(5, device=backend.device)
    z[1, 3], z[2, 5], z[4] = math.nan, math.inf, 0.0
    check_topk(backend, z, w_norm, k, largest=largest)


@LARGEST
@pytest.mark.parametrize("layout", LAYOUTS)
def test_topk_equals_the_oracle_in_every_layout(backend: Backend, layout: str, largest: bool) -> None:
    z, w_norm = tied(3, device=backend.device)
    check_topk(backend, laid_out(z)[layout](), w_norm, 5, largest=largest)


def test_nan_counts_as_the_largest(backend: Backend) -> None:
    z, ones = backend.tensor([[1.0, math.nan, math.inf, 0.0]]), backend.tensor([1.0] * 4)
    assert backend.contribution_topk(z, ones, 4)[1].tolist() == [[3, 0, 2, 1]]
    assert backend.contribution_topk(z, ones, 2, largest=True)[1].tolist() == [[1, 2]]


@LARGEST
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_has_its_place(backend: Backend, dtype: torch.dtype, largest: bool) -> None:
    """NaN of either sign, and the one that infinity times nothing makes, are equal; so are the two infinities."""
    rows = [[math.nan, -math.inf, -math.nan, math.inf, 2.0, 0.0, math.inf], [math.nan] * 7, [-math.inf] * 7]
    w_norm = backend.tensor([1.0] * 6 + [0.0])
    for k in (1, 3, 7):
        check_topk(backend, backend.tensor(rows, dtype=dtype), w_norm, k, largest=largest)


@LARGEST
def test_subnormals_have_an_order(backend: Backend, largest: bool) -> None:
    z = backend.tensor([[3 * SMALLEST, SMALLEST, 0.0, -2 * SMALLEST, 1e-20, -3e-20, -0.0, 2.0**-126]])
    w_norm = backend.tensor([1.0, 1.0, 1.0, 1.0, 1e-20, 1e-20, 1.0, 1.0])
    for k in (1, 4, 8):
        check_topk(backend, z, w_norm, k, largest=largest)


@LARGEST
@pytest.mark.parametrize("value", [0.0, -0.0, -1.5])
def test_equal_contributions_go_by_index(backend: Backend, value: float, largest: bool) -> None:
    z = torch.full((2, 20), value, device=backend.device)
    for k in (1, 7, 20):
        values, indices = backend.contribution_topk(z, torch.ones(20, device=backend.device), k, largest=largest)
        assert indices.tolist() == [list(range(k))] * 2
        assert values.tolist() == [[abs(value)] * k] * 2


def test_topk_equals_sorting(backend: Backend) -> None:
    hard = st.sampled_from([0.0, -0.0, SMALLEST, 1.0, -1.0, 1.0 + 2.0**-23, 3e38, math.inf, math.nan])
    row = st.lists(hard | st.floats(width=32), min_size=1, max_size=20)

    def check(row: list[float], share: float, largest: bool) -> None:
        k = max(1, round(share * len(row)))
        check_topk(backend, backend.tensor([row]), torch.ones(len(row), device=backend.device), k, largest=largest)

    backend.for_all(check, row=row, share=st.floats(0, 1), largest=st.booleans())


def test_norms_may_be_of_any_float_type_and_layout(backend: Backend) -> None:
    z, (w_norm, _) = activations(3, device=backend.device), weights(2 * N_NEURON, device=backend.device)
    check_topk(backend, z, w_norm[::2], 4, largest=True)
    check_topk(backend, z, w_norm[:N_NEURON].half(), 4, largest=True)


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Four GiB, of which two pages are touched."""
    z = torch.empty_strided((2, 3), (2**31 + 8, 1), dtype=torch.float16, device=backend.device)
    check_topk(backend, z.copy_(activations(2, 3)), weights(3, device=backend.device)[0], 2, largest=True)
