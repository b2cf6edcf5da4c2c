"""Every op against a naive oracle: loops and float64, written here and nowhere shared with the package.

The one thing the oracle takes over is the definition of a contribution, `c = |z| * w_norm` rounded to float32 once:
which side of a threshold a neuron falls on is compared exactly, so the rounding is part of the promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.kernels import StatisticsState
from neuron_sparsity.kernels.reference import BLOCK_TOKEN

SIZES = [0, 1, 7, 63, BLOCK_TOKEN, 300, 2 * BLOCK_TOKEN + 1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N_NEURON, D_MODEL = 11, 5
SMALLEST = 2.0**-149


def weights(n_neuron: int = N_NEURON, d_model: int = D_MODEL, seed: int = 1) -> tuple[Tensor, Tensor]:
    w_out = torch.randn(n_neuron, d_model, generator=torch.Generator().manual_seed(seed))
    return w_out.norm(dim=1), w_out


def activations(n_token: int, dtype: torch.dtype = torch.float32, n_neuron: int = N_NEURON) -> Tensor:
    """Half of it exact zeros (of both signs), the rest of either sign and many magnitudes."""
    generator = torch.Generator().manual_seed(n_token)
    z = torch.randn(n_token, n_neuron, generator=generator)
    z = z * torch.exp2(torch.randint(-12, 5, z.shape, generator=generator))
    return torch.where(torch.randn(z.shape, generator=generator) < 0, 0.0 * z, z).to(dtype)


def oracle_contributions(z: Tensor, w_norm: Tensor) -> np.ndarray:
    return np.abs(z.detach().to(torch.float32).numpy()) * w_norm.numpy()


def oracle_bin(c: float) -> int:
    """The largest bin whose lower edge is at most c, found by looking."""
    edges = kernels.histogram_edges().tolist()
    return max(index for index, edge in enumerate(edges) if edge <= c)


def oracle_statistics(z: Tensor, w_norm: Tensor, cuts: list[float]) -> dict[str, np.ndarray]:
    values, c = z.double().numpy(), oracle_contributions(z, w_norm)
    n_neuron = z.shape[1]
    histogram = np.zeros((n_neuron, kernels.N_BINS), dtype=np.int64)
    above = np.zeros((n_neuron, len(cuts)), dtype=np.int64)
    nonzero = np.zeros(n_neuron, dtype=np.int64)
    for token in range(len(values)):
        for neuron in range(n_neuron):
            nonzero[neuron] += values[token, neuron] != 0
            histogram[neuron, oracle_bin(float(c[token, neuron]))] += 1
            for k, cut in enumerate(cuts):
                above[neuron, k] += c[token, neuron] >= np.float32(cut)
    wide = c.astype(np.float64)
    return {
        "nonzero_count": nonzero,
        "histogram": histogram,
        "above_count": above,
        "activation_sum": values.sum(0),
        "contribution_sum": wide.sum(0),
        "contribution_sq_sum": (wide**2).sum(0),
        "maximum": c.max(0, initial=0.0),
    }


def laid_out(z: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same numbers, each time in fresh memory, in four layouts."""
    padded = torch.full((2 * len(z), z.shape[1] + 3), 7.0, dtype=z.dtype)

    def strided() -> Tensor:
        wide = padded.clone()
        view = wide[::2, 2:-1]
        view.copy_(z)
        return view

    def every_second_neuron() -> Tensor:
        wide = torch.full((len(z), 2 * z.shape[1]), 7.0, dtype=z.dtype)
        wide[:, ::2] = z
        return wide[:, ::2]

    return {
        "contiguous": z.clone,
        "transposed": lambda: z.T.contiguous().T,
        "rows apart": strided,
        "every second neuron": every_second_neuron,
    }


LAYOUTS = list(laid_out(torch.zeros(1, 1)))


# --- neuron_statistics ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", SIZES)
def test_statistics_equal_the_oracle(n_token: int, dtype: torch.dtype) -> None:
    z, (w_norm, _) = activations(n_token, dtype), weights()
    cuts = [0.0, SMALLEST, 0.05, 1.0, 1e9]
    state = StatisticsState.zeros(N_NEURON, torch.tensor(cuts))
    maximum = kernels.neuron_statistics(z, w_norm, state)
    expected = oracle_statistics(z, w_norm, cuts)
    assert state.n_tokens == n_token
    assert maximum.numpy().tolist() == expected["maximum"].tolist()
    for name in ("nonzero_count", "histogram", "above_count"):
        assert getattr(state, name).dtype == torch.int64
        assert getattr(state, name).tolist() == expected[name].tolist(), name
    for name in ("contribution_sum", "contribution_sq_sum"):
        assert getattr(state, name).dtype == torch.float64
        np.testing.assert_allclose(getattr(state, name).numpy(), expected[name], rtol=3e-6)
    scale = oracle_contributions(z, torch.ones(N_NEURON)).astype(np.float64).sum(0)
    assert np.all(np.abs(state.activation_sum.numpy() - expected["activation_sum"]) <= 3e-6 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_token", [1, 7, 300])
def test_statistics_do_not_depend_on_the_layout(n_token: int, layout: str) -> None:
    z, (w_norm, _) = activations(n_token), weights()
    cuts = torch.tensor([0.05])
    states = [StatisticsState.zeros(N_NEURON, cuts) for _ in range(2)]
    view = laid_out(z)[layout]()
    assert torch.equal(
        kernels.neuron_statistics(view, w_norm, states[0]), kernels.neuron_statistics(z, w_norm, states[1])
    )
    assert torch.equal(view, z)
    for name in ("nonzero_count", "histogram", "above_count"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name))
    for name in ("activation_sum", "contribution_sum", "contribution_sq_sum"):
        torch.testing.assert_close(getattr(states[0], name), getattr(states[1], name), rtol=1e-5, atol=1e-6)


@given(split=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_statistics_of_two_halves_add_up(split: int, seed: int) -> None:
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).relu()
    w_norm, cuts = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3])
    whole, parts = StatisticsState.zeros(3, cuts), StatisticsState.zeros(3, cuts)
    once = kernels.neuron_statistics(z, w_norm, whole)
    twice = [kernels.neuron_statistics(part, w_norm, parts) for part in (z[:split], z[split:])]
    assert torch.equal(once, torch.maximum(*twice))
    assert whole.n_tokens == parts.n_tokens == 40
    for name in ("nonzero_count", "histogram", "above_count"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    torch.testing.assert_close(whole.contribution_sum, parts.contribution_sum, rtol=1e-6, atol=0.0)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_every_token_is_in_one_bin_and_at_most_once_above(values: list[float]) -> None:
    z = torch.tensor(values)[:, None]
    state = StatisticsState.zeros(1, torch.tensor([0.0, SMALLEST, 1.0]))
    kernels.neuron_statistics(z, torch.ones(1), state)
    at_least_zero, positive, at_least_one = state.above_count[0].tolist()
    assert int(state.histogram.sum()) == at_least_zero == len(values)
    assert positive == int(state.nonzero_count) == sum(value != 0 for value in values)
    # 1.0 is an edge, so what is above it can be read off the histogram exactly.
    first = kernels.histogram_edges().tolist().index(1.0)
    assert int(state.histogram[0, first:].sum()) == at_least_one == sum(abs(value) >= 1 for value in values)


def test_histogram_edges_are_exact() -> None:
    edges = kernels.histogram_edges()
    assert edges.dtype == torch.float64
    assert edges[:4].tolist() == [0.0, 2.0**-20, 1.5 * 2.0**-20, 2.0**-19]
    assert edges[-1] == 2.0**11
    assert bool((edges.diff() > 0).all())
    inside = edges[1:].float()
    below = torch.nextafter(inside, torch.tensor(0.0))
    for value, index in [*zip(inside, range(1, 64), strict=True), *zip(below, range(63), strict=True)]:
        state = StatisticsState.zeros(1)
        kernels.neuron_statistics(value.reshape(1, 1), torch.ones(1), state)
        assert state.histogram[0].nonzero().flatten().tolist() == [index]
    extremes = torch.tensor([0.0, -0.0, SMALLEST, 2.0**-127, torch.finfo(torch.float32).max])[:, None]
    state = StatisticsState.zeros(1)
    kernels.neuron_statistics(extremes, torch.ones(1), state)
    assert (int(state.histogram[0, 0]), int(state.histogram[0, -1])) == (4, 1)
    assert int(state.nonzero_count) == 3


def test_zero_means_z_and_not_its_contribution() -> None:
    """A neuron without output weights fires all the same, and so does one whose contribution underflows."""
    state = StatisticsState.zeros(3, torch.tensor([SMALLEST]))
    kernels.neuron_statistics(torch.tensor([[1.0, 1e-30, 0.0]]), torch.tensor([0.0, 1e-30, 1.0]), state)
    assert state.nonzero_count.tolist() == [1, 1, 0]
    assert state.above_count[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_no_zeros(dtype: torch.dtype) -> None:
    z = torch.tensor([[torch.finfo(dtype).smallest_normal / 4]], dtype=dtype)
    assert float(z) > 0
    state = StatisticsState.zeros(1, torch.tensor([SMALLEST]))
    maximum = kernels.neuron_statistics(z, torch.ones(1), state)
    assert (int(state.nonzero_count), int(state.above_count)) == (1, 1)
    assert float(maximum) == float(z)
    assert kernels.threshold_mask(z, torch.ones(1), SMALLEST).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_and_stays_in_its_neuron(bad: float) -> None:
    z, (w_norm, _) = activations(20), weights()
    clean, dirty = StatisticsState.zeros(N_NEURON), StatisticsState.zeros(N_NEURON)
    kernels.neuron_statistics(z, w_norm, clean)
    z[3, 2] = bad
    kernels.neuron_statistics(z, w_norm, dirty)
    assert not math.isfinite(float(dirty.activation_sum[2]))
    assert not math.isfinite(float(dirty.contribution_sum[2]))
    others = [neuron for neuron in range(N_NEURON) if neuron != 2]
    for name in ("nonzero_count", "histogram"):
        assert torch.equal(getattr(dirty, name)[others], getattr(clean, name)[others])
        assert int(getattr(dirty, name)[2].sum()) >= 0
    torch.testing.assert_close(dirty.activation_sum[others], clean.activation_sum[others], rtol=0.0, atol=0.0)


def test_counts_stay_exact_where_float32_could_not_count() -> None:
    state = StatisticsState.zeros(1, torch.tensor([1.0]))
    state.nonzero_count += 2**40
    state.above_count += 2**40
    state.contribution_sum += 2.0**40
    kernels.neuron_statistics(torch.ones(3, 1), torch.ones(1), state)
    assert (int(state.nonzero_count), int(state.above_count)) == (2**40 + 3, 2**40 + 3)
    assert float(state.contribution_sum) == 2.0**40 + 3


# --- tail_error ---


def oracle_tail(
    z: Tensor, w_norm: Tensor, w_out: Tensor, cuts: list[float]
) -> tuple[np.ndarray, list[int], np.ndarray]:
    c, values = oracle_contributions(z, w_norm), z.double().numpy()
    w = w_out.double().numpy()
    error, active = np.zeros((len(cuts), len(z))), [0] * len(cuts)
    for k, cut in enumerate(cuts):
        for token in range(len(z)):
            tail = c[token] < np.float32(cut)
            error[k, token] = np.linalg.norm(values[token, tail] @ w[tail])
            active[k] += int((~tail).sum())
    return error, active, np.linalg.norm(values @ w, axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", SIZES)
def test_tail_error_equals_the_oracle(n_token: int, dtype: torch.dtype) -> None:
    z, (w_norm, w_out) = activations(n_token, dtype), weights()
    w_out = w_out.to(dtype)
    cuts = [0.0, SMALLEST, 0.02, 0.5, 3.0, 1e9]
    error, active, full = kernels.tail_error(z, w_norm, w_out, torch.tensor(cuts))
    expected = oracle_tail(z, w_norm, w_out, cuts)
    assert (error.dtype, active.dtype, full.dtype) == (torch.float32, torch.int64, torch.float32)
    assert error.shape == (len(cuts), n_token)
    assert active.tolist() == expected[1]
    scale = (oracle_contributions(z, w_norm).astype(np.float64)).sum(1)
    assert np.all(np.abs(error.numpy() - expected[0]) <= 1e-6 * scale + 1e-30)
    assert np.all(np.abs(full.numpy() - expected[2]) <= 1e-6 * scale + 1e-30)
    assert not error[:2].any(), "nothing below a positive number but exact zeros"
    assert torch.equal(error[-1], full), "a threshold above everything cuts everything, bit for bit"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tail_error_does_not_depend_on_the_layout(layout: str) -> None:
    z, (w_norm, w_out) = activations(63), weights()
    view = laid_out(z)[layout]()
    plain = kernels.tail_error(z, w_norm, w_out, torch.tensor([0.05, 1.0]))
    strided = kernels.tail_error(view, w_norm, w_out.T.contiguous().T, torch.tensor([0.05, 1.0]))
    assert torch.equal(strided[1], plain[1])
    torch.testing.assert_close(strided[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(strided[2], plain[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(view, z)


def test_tail_error_without_thresholds() -> None:
    w_norm, w_out = weights()
    error, active, full = kernels.tail_error(activations(7), w_norm, w_out, torch.empty(0))
    assert (error.shape, active.shape, full.shape) == ((0, 7), (0,), (7,))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=4, max_size=4), st.floats(0, 4, width=32))
def test_tail_and_rest_make_the_whole(values: list[float], cut: float) -> None:
    """With orthogonal output weights the squared norms of what is cut and what is kept add up."""
    z, w_out = torch.tensor([values]), torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    w_norm = w_out.norm(dim=1)
    error, active, full = kernels.tail_error(z, w_norm, w_out, torch.tensor([cut]))
    kept = z.clone()
    assert kernels.threshold_mask(kept, w_norm, cut).tolist() == active.tolist()
    assert float(error**2 + (kept @ w_out).norm() ** 2) == pytest.approx(float(full**2), rel=1e-5, abs=1e-6)


# --- threshold_mask ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", SIZES)
def test_mask_equals_the_oracle_in_place(n_token: int, dtype: torch.dtype, layout: str) -> None:
    z, (w_norm, _) = activations(n_token, dtype), weights()
    cut = 0.05
    kept = oracle_contributions(z, w_norm) >= np.float32(cut)
    given_z = laid_out(z)[layout]()
    active = kernels.threshold_mask(given_z, w_norm, cut)
    assert active.dtype == torch.int64
    assert active.tolist() == kept.sum(1).tolist()
    assert given_z.dtype == dtype
    assert torch.equal(given_z, torch.where(torch.from_numpy(kept), z, torch.zeros((), dtype=dtype)))


def test_mask_touches_only_what_it_was_given() -> None:
    wide = torch.full((6, 5), 0.5)
    kernels.threshold_mask(wide[::2, 1:4], torch.ones(3), 1.0)
    expected = torch.full((6, 5), 0.5)
    expected[::2, 1:4] = 0.0
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cutting_nothing_changes_no_bit(dtype: torch.dtype) -> None:
    z, (w_norm, _) = activations(300, dtype), weights()
    z[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max], dtype=dtype)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    for cut in (0.0, -1.0, -math.inf):
        changed = z.clone()
        assert kernels.threshold_mask(changed, w_norm, cut).tolist() == [N_NEURON] * 300
        assert torch.equal(changed.view(bits), z.view(bits))


def test_a_tie_with_the_threshold_is_active() -> None:
    below = float(torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)))
    z = torch.tensor([[1.0, -2.0, below, 0.0]])
    assert kernels.threshold_mask(z, torch.ones(4), 2.0).tolist() == [1]
    assert z.tolist() == [[0.0, -2.0, 0.0, 0.0]]


def test_mask_of_nan_and_infinity() -> None:
    z = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    assert kernels.threshold_mask(z, torch.ones(4), 5.0).tolist() == [2]
    assert math.isnan(float(z[0, 0]))
    assert z[0, 1:].tolist() == [math.inf, -math.inf, 0.0]
    z = torch.tensor([[1.0, math.inf]])
    assert kernels.threshold_mask(z, torch.ones(2), math.inf).tolist() == [1]
    assert z.tolist() == [[0.0, math.inf]]


@given(
    z=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12), cut=st.floats(0, 8, width=16), w=st.floats(0.25, 4)
)
def test_mask_is_idempotent_and_monotone(z: list[float], cut: float, w: float) -> None:
    once, w_norm = torch.tensor([z]), torch.full((len(z),), w)
    more = once.clone()
    n_active = kernels.threshold_mask(once, w_norm, cut)
    again = once.clone()
    n_again = kernels.threshold_mask(again, w_norm, cut)
    assert torch.equal(again, once)
    if cut > 0:
        assert torch.equal(n_again, n_active)
    assert bool((kernels.threshold_mask(more, w_norm, cut + 0.5) <= n_active).all())


# --- contribution_topk and global_rank ---


def oracle_topk(c: np.ndarray, k: int, largest: bool) -> list[list[int]]:
    """Sorted by value, NaN above everything, ties by index."""

    def key(row: np.ndarray, index: int) -> tuple[float, float, int]:
        value = float(row[index])
        rank = (1.0, 0.0) if math.isnan(value) else (0.0, value)
        return (-rank[0], -rank[1], index) if largest else (*rank, index)

    return [sorted(range(len(row)), key=lambda index: key(row, index))[:k] for row in c]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_token", SIZES)
def test_topk_equals_the_oracle(n_token: int, dtype: torch.dtype, largest: bool) -> None:
    z, (w_norm, _) = activations(n_token, dtype), weights()
    z = (z * 2).round() / 2  # ties, not only at zero
    w_norm = (w_norm * 2).ceil() / 2
    c = oracle_contributions(z, w_norm)
    for k in (1, 4, N_NEURON):
        values, indices = kernels.contribution_topk(z, w_norm, k, largest=largest)
        assert (values.dtype, indices.dtype, values.shape) == (torch.float32, torch.int64, (n_token, k))
        expected = oracle_topk(c, k, largest)
        assert indices.tolist() == expected
        assert torch.equal(values, torch.from_numpy(c).gather(1, indices))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_topk_does_not_depend_on_the_layout(layout: str) -> None:
    z, (w_norm, _) = activations(63), weights()
    view = laid_out(z)[layout]()
    for ours, plain in zip(
        kernels.contribution_topk(view, w_norm, 5), kernels.contribution_topk(z, w_norm, 5), strict=True
    ):
        assert torch.equal(ours, plain)


def test_nan_counts_as_the_largest() -> None:
    z = torch.tensor([[1.0, math.nan, math.inf, 0.0]])
    assert kernels.contribution_topk(z, torch.ones(4), 4)[1].tolist() == [[3, 0, 2, 1]]
    assert kernels.contribution_topk(z, torch.ones(4), 2, largest=True)[1].tolist() == [[1, 2]]


@given(
    st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0, math.inf]), min_size=3, max_size=3), min_size=1, max_size=5
    ),
    st.data(),
)
def test_global_rank_equals_sorting(rows: list[list[float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, 3 * len(rows)))
    pairs = [(score, layer, neuron) for layer, row in enumerate(rows) for neuron, score in enumerate(row)]
    expected = [[layer, neuron] for _, layer, neuron in sorted(pairs, key=lambda pair: pair[0])[:k]]
    assert kernels.global_rank(torch.tensor(rows), k).tolist() == expected
    assert kernels.global_rank(torch.tensor(rows).T.contiguous().T, k).tolist() == expected


def test_global_rank_of_float64_and_of_nothing() -> None:
    close = torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert kernels.global_rank(close, 2).tolist() == [[0, 1], [0, 0]]
    assert kernels.global_rank(torch.empty(2, 0), 0).shape == (0, 2)


# --- what is said when an argument is wrong ---

Z, W_NORM, W_OUT = torch.zeros(2, 3), torch.ones(3), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.neuron_statistics(torch.zeros(1, 2, 3), W_NORM, StatisticsState.zeros(3)),
            "z must be [token, neuron], got [1, 2, 3]; flatten batch and pos",
        ),
        (
            lambda: kernels.neuron_statistics(Z, torch.ones(4), StatisticsState.zeros(3)),
            "w_norm must be [3], got [4]",
        ),
        (
            lambda: kernels.neuron_statistics(Z, W_NORM, StatisticsState.zeros(4)),
            "state is for 4 neurons, z has 3",
        ),
        (
            lambda: kernels.tail_error(Z, W_NORM, torch.ones(4, 3), torch.ones(1)),
            "w_out must be [3, d_model], got [4, 3]",
        ),
        (lambda: kernels.tail_error(Z, W_NORM, W_OUT, torch.tensor(1.0)), "thresholds must be [threshold], got []"),
        (
            lambda: kernels.threshold_mask(Z[0], W_NORM, 1.0),
            "z must be [token, neuron], got [3]; flatten batch and pos",
        ),
        (lambda: kernels.threshold_mask(Z, W_NORM[:2], 1.0), "w_norm must be [3], got [2]"),
        (lambda: kernels.threshold_mask(Z, W_NORM, math.nan), "threshold must be a number, got nan"),
        (lambda: kernels.contribution_topk(Z, W_NORM, 0), "k must be between 1 and 3, got 0"),
        (lambda: kernels.contribution_topk(Z, W_NORM, 4), "k must be between 1 and 3, got 4"),
        (lambda: kernels.contribution_topk(Z, W_OUT, 1), "w_norm must be [3], got [3, 4]"),
        (lambda: kernels.global_rank(Z, 7), "k must be between 0 and 6, got 7"),
        (lambda: kernels.global_rank(Z, -1), "k must be between 0 and 6, got -1"),
        (lambda: kernels.global_rank(W_NORM, 1), "scores must be [layer, neuron], got [3]"),
        (
            lambda: kernels.global_rank(torch.full((1, 2), math.nan), 1),
            "scores must not be NaN; drop or replace the scores that could not be computed",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        call()
    assert str(caught.value) == message


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 40))
def test_threshold_of_a_number_that_is_present_keeps_it(n_token: int, n_neuron: int) -> None:
    """The threshold goes through a Python float: that must not move it across the contribution it was read from."""
    z = activations(n_token, n_neuron=n_neuron)
    w_norm, _ = weights(n_neuron)
    cut = float(torch.from_numpy(oracle_contributions(z, w_norm)).max())
    assert int(kernels.threshold_mask(z, w_norm, cut).sum()) >= 1
