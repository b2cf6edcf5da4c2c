"""`global_rank`: one stable sort of all layers' scores. It has one implementation, on every device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity import kernels


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@given(
    st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0, math.inf]), min_size=3, max_size=3), min_size=1, max_size=5
    ),
    st.data(),
)
def test_global_rank_equals_sorting(device: str, rows: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, 3 * len(rows)))
    pairs = [(score, layer, neuron) for layer, row in enumerate(rows) for neuron, score in enumerate(row)]
    expected = [[layer, neuron] for _, layer, neuron in sorted(pairs, key=lambda pair: pair[0])[:k]]
    scores = torch.tensor(rows, device=device)
    assert kernels.global_rank(scores, k).tolist() == expected
    assert kernels.global_rank(scores.T.contiguous().T, k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n_layer", "n_neuron"), [(1, 1), (7, 63), (3, 1536), (30, 300)])
def test_many_ties_go_to_the_earlier_layer_and_the_smaller_index(
    device: str, n_layer: int, n_neuron: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n_neuron)
    scores = torch.randint(-4, 5, (n_layer, n_neuron), generator=generator).to(dtype)
    flat = scores.flatten().tolist()
    expected = [list(divmod(index, n_neuron)) for index in sorted(range(len(flat)), key=flat.__getitem__)]
    for k in (0, 1, len(flat)):
        found = kernels.global_rank(scores.to(device), k)
        assert (found.dtype, found.device.type) == (torch.int64, device)
        assert found.tolist() == expected[:k]


def test_global_rank_of_close_scores_and_of_nothing(device: str) -> None:
    close = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64, device=device)
    assert kernels.global_rank(close, 2).tolist() == [[0, 1], [0, 0]]
    subnormal = torch.tensor([[2.0**-149, 0.0, -(2.0**-149)]], device=device)
    assert kernels.global_rank(subnormal, 3)[:, 1].tolist() == [2, 1, 0]
    assert kernels.global_rank(torch.zeros(2, 0, device=device), 0).shape == (0, 2)
