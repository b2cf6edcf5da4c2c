"""`neuron_statistics`: exact counts, sums as good as torch's, however tokens are laid out and shared out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from neuron_sparsity import kernels
from neuron_sparsity.kernels.reference import BLOCK_TOKEN
from tests.kernels.oracles import (
    COUNTS,
    DTYPES,
    LAYOUTS,
    N_NEURON,
    SMALLEST,
    SUMS,
    Backend,
    activations,
    bits,
    check_statistics,
    laid_out,
    weights,
)

CUTS = [0.0, SMALLEST, 0.05, 1.0, 1e9]
SHAPES = [(0, 11), (1, 1), (7, 63), (63, 7), (BLOCK_TOKEN, 11), (300, 2), (2, 300), (1, 1536)]


@pytest.fixture
def one_program(tune: Callable[..., None]) -> None:
    """A program takes all it can count: the interpreter's time goes into unpacking counters."""
    tune("neuron_statistics", PROGRAMS=1)


@pytest.mark.parametrize(("n_token", "n_neuron"), SHAPES)
def test_statistics_equal_the_oracle(backend: Backend, n_token: int, n_neuron: int, one_program: None) -> None:
    z, (w_norm, _) = activations(n_token, n_neuron, device=backend.device), weights(n_neuron, device=backend.device)
    check_statistics(backend, z, w_norm, CUTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", [7, 63])
def test_statistics_equal_the_oracle_in_every_dtype(
    backend: Backend, n_token: int, dtype: torch.dtype, one_program: None
) -> None:
    z, (w_norm, _) = activations(n_token, dtype=dtype, device=backend.device), weights(device=backend.device)
    check_statistics(backend, z, w_norm, CUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_equal_the_oracle_in_every_layout(backend: Backend, layout: str) -> None:
    z, (w_norm, _) = activations(35, device=backend.device), weights(device=backend.device)
    check_statistics(backend, laid_out(z)[layout](), w_norm, [0.05])


@pytest.mark.parametrize(
    ("n_group", "n_token", "n_neuron", "most_steps", "n_program"),
    [
        (1, 1, 1, 255, 1),
        (5, 20, 11, 255, 1),  # one program
        (5, 20, 11, 4, 1),  # two groups a program, one in the last
        (5, 20, 11, 255, 10**9),  # a program for every step of 16 tokens
        (2, 75, 3, 4, 1),  # two programs a group
        (2, 75, 3, 255, 10**9),
        (9, 1, 2, 4, 1),
        (3, 17, 130, 255, 1),  # two blocks of neurons
    ],
)
def test_groups_have_their_own_maxima_however_programs_share_them(
    backend: Backend,
    tune: Callable[..., None],
    n_group: int,
    n_token: int,
    n_neuron: int,
    most_steps: int,
    n_program: int,
) -> None:
    tune("neuron_statistics", MAX_STEPS=most_steps, PROGRAMS=n_program)
    w_norm, _ = weights(n_neuron, device=backend.device)
    z = activations(n_group * n_token, n_neuron, device=backend.device).view(n_token, n_group, n_neuron)
    check_statistics(backend, z.transpose(0, 1), w_norm, [0.0, 0.05])


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 3), (2, 4, 0), (4, 0)])
def test_nothing_is_added_by_nothing(backend: Backend, shape: tuple[int, ...]) -> None:
    """Without groups, without tokens, without neurons (whose tokens are counted all the same)."""
    check_statistics(
        backend, torch.zeros(shape, device=backend.device), weights(shape[-1], device=backend.device)[0], CUTS
    )


@pytest.mark.parametrize("n_token", [4080, 4100])
def test_a_neuron_that_is_always_on_is_counted_to_the_last_token(
    backend: Backend, n_token: int, one_program: None
) -> None:
    """4,080 tokens are the most that one program counts, and all of them are in one bin."""
    if backend.interpreted and n_token > 4080:
        pytest.skip("interpreted, it takes ten seconds; programs that share tokens are tested on fewer")
    check_statistics(backend, torch.ones(n_token, 1, device=backend.device), backend.tensor([1.0]), [1.0])


def test_as_many_thresholds_as_there_may_be(backend: Backend) -> None:
    """The last flag is the sign bit of its word."""
    cuts = [-1.0, 0.0, math.inf, *(0.01 * 1.3**k for k in range(kernels.MAX_THRESHOLDS - 3))]
    z, (w_norm, _) = activations(20, device=backend.device), weights(device=backend.device)
    check_statistics(backend, z, w_norm, cuts)


def test_norms_may_be_of_any_float_type_and_layout(backend: Backend) -> None:
    z, (w_norm, _) = activations(7, device=backend.device), weights(2 * N_NEURON, device=backend.device)
    check_statistics(backend, z, w_norm[::2], [0.05])
    check_statistics(backend, z, w_norm[:N_NEURON].half(), [0.05])


def test_statistics_of_two_halves_add_up(backend: Backend, one_program: None) -> None:
    w_norm, cuts = backend.tensor([0.5, 1.0, 2.0]), [0.3]

    def check(split: int, seed: int) -> None:
        z = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).relu().to(backend.device)
        whole, parts = backend.state(3, cuts), backend.state(3, cuts)
        once = backend.neuron_statistics(z, w_norm, whole)
        twice = [backend.neuron_statistics(part, w_norm, parts) for part in (z[:split], z[split:])]
        assert torch.equal(once, torch.maximum(*twice))
        assert whole.n_tokens == parts.n_tokens == 40
        for name in COUNTS:
            assert torch.equal(getattr(whole, name), getattr(parts, name))
        torch.testing.assert_close(whole.contribution_sum, parts.contribution_sum, rtol=1e-6, atol=0.0)

    backend.for_all(check, split=st.integers(0, 40), seed=st.integers(0, 10**6))


def test_every_token_is_in_one_bin_and_at_most_once_above(backend: Backend) -> None:
    # 1.0 is an edge, so what is above it can be read off the histogram exactly.
    first = kernels.histogram_edges().tolist().index(1.0)

    def check(values: list[float]) -> None:
        state = backend.state(1, [0.0, SMALLEST, 1.0])
        backend.neuron_statistics(backend.tensor(values)[:, None], backend.tensor([1.0]), state)
        at_least_zero, positive, at_least_one = state.above_count[0].tolist()
        assert int(state.histogram.sum()) == at_least_zero == len(values)
        assert positive == int(state.nonzero_count) == sum(value != 0 for value in values)
        assert int(state.histogram[0, first:].sum()) == at_least_one == sum(abs(value) >= 1 for value in values)

    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    backend.for_all(check, values=st.lists(finite, min_size=1, max_size=30))


def test_histogram_edges_are_exact(backend: Backend) -> None:
    edges = kernels.histogram_edges()
    assert edges.dtype == torch.float64
    assert edges[:4].tolist() == [0.0, 2.0**-20, 1.5 * 2.0**-20, 2.0**-19]
    assert edges[-1] == 2.0**11
    assert bool((edges.diff() > 0).all())
    inside = edges[1:].float()
    below = torch.nextafter(inside, torch.tensor(0.0))
    values = torch.cat([inside, below]).to(backend.device)
    state = backend.state(len(values))
    backend.neuron_statistics(values[None], torch.ones_like(values), state)
    assert state.histogram.argmax(dim=1).tolist() == [*range(1, 64), *range(63)]
    assert state.histogram.sum(dim=1).tolist() == [1] * len(values)


def test_extremes_are_in_the_outer_bins(backend: Backend) -> None:
    state = backend.state(1)
    extremes = backend.tensor([0.0, -0.0, SMALLEST, 2.0**-127, torch.finfo(torch.float32).max])[:, None]
    backend.neuron_statistics(extremes, backend.tensor([1.0]), state)
    assert (int(state.histogram[0, 0]), int(state.histogram[0, -1])) == (4, 1)
    assert int(state.nonzero_count) == 3


def test_zero_means_z_and_not_its_contribution(backend: Backend) -> None:
    """A neuron without output weights fires all the same, and so does one whose contribution underflows."""
    state = backend.state(3, [SMALLEST])
    backend.neuron_statistics(backend.tensor([[1.0, 1e-30, 0.0]]), backend.tensor([0.0, 1e-30, 1.0]), state)
    assert state.nonzero_count.tolist() == [1, 1, 0]
    assert state.above_count[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_no_zeros(backend: Backend, dtype: torch.dtype) -> None:
    z = backend.tensor([[torch.finfo(dtype).smallest_normal / 4]], dtype=dtype)
    assert float(z) > 0
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter reads a subnormal bfloat16 as another number (3.9); compiled kernels do not")
    state = backend.state(1, [SMALLEST])
    maximum = backend.neuron_statistics(z, backend.tensor([1.0]), state)
    assert (int(state.nonzero_count), int(state.above_count)) == (1, 1)
    assert float(maximum) == float(z) == float(state.contribution_sum)


def test_products_and_thresholds_that_are_subnormal_are_compared_exactly(backend: Backend) -> None:
    z, w_norm = backend.tensor([[1e-20, 3e-20, 2.0**-100]]), backend.tensor([1e-20, 1e-20, 2.0**-49])
    check_statistics(backend, z, w_norm, [SMALLEST, 2 * SMALLEST, 1e-40, 2e-40])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_and_stays_in_its_neuron_and_group(
    backend: Backend, bad: float, one_program: None
) -> None:
    z, (w_norm, _) = activations(20, device=backend.device).view(2, 10, N_NEURON), weights(device=backend.device)
    clean, dirty = backend.state(N_NEURON, [0.05]), backend.state(N_NEURON, [0.05])
    before = backend.neuron_statistics(z, w_norm, clean)
    z[1, 3, 2] = bad
    after = backend.neuron_statistics(z, w_norm, dirty)
    for name in SUMS:
        assert not math.isfinite(float(getattr(dirty, name)[2]))
    assert not math.isfinite(float(after[1, 2]))
    after[1, 2] = before[1, 2]
    assert torch.equal(after, before)
    others = [neuron for neuron in range(N_NEURON) if neuron != 2]
    for name in (*COUNTS, *SUMS):
        assert torch.equal(getattr(dirty, name)[others], getattr(clean, name)[others])
    assert int(dirty.histogram[2].sum()) == 20


def test_counts_stay_exact_where_float32_could_not_count(backend: Backend) -> None:
    state = backend.state(1, [1.0])
    state.nonzero_count += 2**40
    state.above_count += 2**40
    state.histogram += 2**62
    state.contribution_sum += 2.0**40
    backend.neuron_statistics(torch.ones(3, 1, device=backend.device), backend.tensor([1.0]), state)
    assert (int(state.nonzero_count), int(state.above_count)) == (2**40 + 3, 2**40 + 3)
    assert int(state.histogram.max()) == 2**62 + 3
    assert float(state.contribution_sum) == 2.0**40 + 3


def test_the_same_input_gives_the_same_bits(backend: Backend, tune: Callable[..., None]) -> None:
    tune("neuron_statistics", PROGRAMS=10**9)
    z, (w_norm, _) = activations(70, device=backend.device), weights(device=backend.device)
    states = [backend.state(N_NEURON) for _ in range(2)]
    for state in states:
        backend.neuron_statistics(z, w_norm, state)
    for name in SUMS:
        assert torch.equal(bits(getattr(states[0], name)), bits(getattr(states[1], name)))


def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Four GiB, of which two pages are touched."""
    z = torch.empty_strided((2, 3), (2**31 + 8, 1), dtype=torch.float16, device=backend.device)
    check_statistics(backend, z.copy_(activations(2, 3)), weights(3, device=backend.device)[0], [0.05])
