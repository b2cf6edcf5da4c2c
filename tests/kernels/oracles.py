"""What the tests of the ops share: inputs, layouts, naive oracles, and one check an op that holds it to its oracle.

The oracles are numpy in float64, written here and nowhere shared with the package. The one thing they take over is the
definition of a contribution, `c = |z| * w_norm` rounded to float32 once: which side of a threshold a neuron falls on is
compared exactly, so the rounding is part of the promise.

Counts, indices, masks, maxima and selected values are compared exactly. Sums and norms may be off by twice what plain
float32 torch is off on the same input, and a few units in the last place: nothing else decides a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.kernels import StatisticsState

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N_NEURON, D_MODEL = 11, 5
SMALLEST = 2.0**-149  # the smallest float32 above zero
COUNTS = ("nonzero_count", "histogram", "above_count")
SUMS = ("activation_sum", "contribution_sum", "contribution_sq_sum")
ULP = 2.0**-23
FLOOR_ULP = 4  # what a result may be off where torch, by luck, is exact


@dataclass(frozen=True)
class Backend:
    """A backend on a device, asked for by name; the ops as methods, without numpy's warnings about NaN."""

    name: str
    device: str
    n_examples: int

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    def tensor(self, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def state(self, n_neuron: int, cuts: Sequence[float] = ()) -> StatisticsState:
        return StatisticsState.zeros(n_neuron, torch.tensor(list(cuts)), device=self.device)

    def neuron_statistics(self, z: Tensor, w_norm: Tensor, state: StatisticsState) -> Tensor:
        with np.errstate(all="ignore"):
            return kernels.neuron_statistics(z, w_norm, state, backend=self.name)

    def tail_error(self, z: Tensor, w_norm: Tensor, w_out: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with np.errstate(all="ignore"):
            return kernels.tail_error(z, w_norm, w_out, cuts, backend=self.name)

    def threshold_mask(self, z: Tensor, w_norm: Tensor, threshold: float) -> Tensor:
        with np.errstate(all="ignore"):
            return kernels.threshold_mask(z, w_norm, threshold, backend=self.name)

    def contribution_topk(self, z: Tensor, w_norm: Tensor, k: int, *, largest: bool = False) -> tuple[Tensor, Tensor]:
        with np.errstate(all="ignore"):
            return kernels.contribution_topk(z, w_norm, k, largest=largest, backend=self.name)

    def for_all(self, check: Callable[..., None], **strategies: Any) -> None:
        """Hold `check` to as many hypothesis examples as this backend has time for."""
        settings(max_examples=self.n_examples)(given(**strategies)(check))()


def weights(n_neuron: int = N_NEURON, d_model: int = D_MODEL, device: str = "cpu") -> tuple[Tensor, Tensor]:
    w_out = torch.randn(n_neuron, d_model, generator=torch.Generator().manual_seed(1))
    return w_out.norm(dim=1).to(device), w_out.to(device)


def activations(
    n_token: int, n_neuron: int = N_NEURON, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Half of it exact zeros (of both signs), the rest of either sign and many magnitudes."""
    generator = torch.Generator().manual_seed(n_token)
    z = torch.randn(n_token, n_neuron, generator=generator)
    z = z * torch.exp2(torch.randint(-12, 5, z.shape, generator=generator))
    return torch.where(torch.randn(z.shape, generator=generator) < 0, 0.0 * z, z).to(device=device, dtype=dtype)


def laid_out(z: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same numbers, each time in fresh memory, in four layouts."""

    def rows_apart() -> Tensor:
        view = z.new_full((2 * len(z), z.shape[1] + 3), 7.0)[::2, 2:-1]
        return view.copy_(z)

    def every_second_neuron() -> Tensor:
        view = z.new_full((len(z), 2 * z.shape[1]), 7.0)[:, ::2]
        return view.copy_(z)

    return {
        "contiguous": z.clone,
        "transposed": lambda: z.T.contiguous().T,
        "rows apart": rows_apart,
        "every second neuron": every_second_neuron,
    }


LAYOUTS = list(laid_out(torch.zeros(1, 1)))


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bits of a tensor: NaN equals itself, and -0.0 is not 0.0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(whole)


def contributions(z: Tensor, w_norm: Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.abs(z.detach().float().cpu().numpy()) * w_norm.float().cpu().numpy()


def assert_as_good_as_torch(
    found: np.ndarray, plain: np.ndarray, exact: np.ndarray, scale: np.ndarray, what: str
) -> None:
    """`found` errs at most twice as much as `plain`: the largest error in units of `scale`, what was added up."""
    unit = np.where(scale > 0, scale, 1.0)

    def error(value: np.ndarray) -> float:
        return float(np.max(np.abs(value - exact) / unit, initial=0.0))

    allowed = 2 * error(plain) + FLOOR_ULP * ULP
    assert found.shape == exact.shape, what
    assert error(found) <= allowed, f"{what}: off by {error(found):.2e}, allowed {allowed:.2e}"


def check_statistics(backend: Backend, z: Tensor, w_norm: Tensor, cuts: Sequence[float]) -> None:
    """Every count, sum and maximum of `z`, [token, neuron] or [group, token, neuron], is what the oracle says."""
    before, state = bits(z), backend.state(z.shape[-1], cuts)
    maximum = backend.neuron_statistics(z, w_norm, state)
    assert torch.equal(bits(z), before), "z was changed"
    c = contributions(z, w_norm)
    assert (maximum.dtype, maximum.device.type) == (torch.float32, backend.device)
    np.testing.assert_array_equal(maximum.cpu().numpy(), c.max(axis=-2, initial=0.0))

    tokens = z.reshape(math.prod(z.shape[:-1]), z.shape[-1]).float().cpu()
    c = c.reshape(tokens.shape)
    assert state.n_tokens == len(tokens)
    histogram = np.zeros((z.shape[-1], kernels.N_BINS), dtype=np.int64)
    bin_index = np.searchsorted(kernels.histogram_edges().numpy(), c, side="right") - 1
    np.add.at(histogram, (np.arange(z.shape[-1]), bin_index), 1)
    expected = {
        "nonzero_count": (tokens != 0).sum(0).numpy(),
        "histogram": histogram,
        "above_count": np.array([(c >= np.float32(cut)).sum(0) for cut in cuts]).reshape(len(cuts), -1).T,
    }
    for name in COUNTS:
        assert getattr(state, name).dtype == torch.int64
        np.testing.assert_array_equal(getattr(state, name).cpu().numpy(), expected[name], err_msg=name)

    plain_c = torch.from_numpy(c)
    summands = dict(zip(SUMS, [(tokens, 1), (plain_c, 1), (plain_c, 2)], strict=True))
    for name, (values, power) in summands.items():
        found = getattr(state, name)
        assert found.dtype == torch.float64
        wide = values.double() ** power
        plain = (values**power).sum(0).double().numpy()
        scale = wide.abs().sum(0).numpy()
        assert_as_good_as_torch(found.cpu().numpy(), plain, wide.sum(0).numpy(), scale, name)


def check_tail(backend: Backend, z: Tensor, w_norm: Tensor, w_out: Tensor, cuts: Sequence[float]) -> None:
    """Counts are exact and norms as good as torch's, for every threshold and for the full output."""
    before = bits(z)
    error, active, full = backend.tail_error(z, w_norm, w_out, backend.tensor(list(cuts)))
    assert torch.equal(bits(z), before), "z was changed"
    assert (error.dtype, active.dtype, full.dtype) == (torch.float32, torch.int64, torch.float32)
    assert (error.shape, active.shape, full.shape) == ((len(cuts), len(z)), (len(cuts),), (len(z),))
    c = contributions(z, w_norm)
    values, w = z.float().cpu(), w_out.float().cpu()
    found = torch.cat([error, full[None]]).double().cpu().numpy()
    plain, exact = np.zeros_like(found), np.zeros_like(found)
    for k, cut in enumerate([*cuts, None]):
        below = np.ones(c.shape, dtype=bool) if cut is None else c < np.float32(cut)
        tail = values * torch.from_numpy(below)
        plain[k] = (tail @ w).norm(dim=1).numpy()
        exact[k] = (tail.double() @ w.double()).norm(dim=1).numpy()
        if cut is not None:
            assert int(active[k]) == int((~below).sum()), f"active at {cut}"
    size = values.double().abs() @ w.double().norm(dim=1)
    assert_as_good_as_torch(found, plain, exact, np.broadcast_to(size.numpy(), exact.shape), "norms")


def check_mask(backend: Backend, z: Tensor, w_norm: Tensor, cut: float) -> None:
    """What is kept keeps its bits, NaN is NaN, all else is zero, and the count says how many are active."""
    original, c = z.clone(), contributions(z, w_norm)
    active = backend.threshold_mask(z, w_norm, cut)
    kept, nan = torch.from_numpy(c >= np.float32(cut)), torch.from_numpy(np.isnan(c))
    assert (active.dtype, z.dtype) == (torch.int64, original.dtype)
    assert active.tolist() == kept.sum(1).tolist()
    assert torch.equal(bits(z)[kept], bits(original)[kept]), "what is kept has changed"
    assert bool(z.cpu()[nan].isnan().all()), "NaN is not NaN"
    assert not z.cpu()[~(kept | nan)].any(), "what is cut is not zero"


def sorted_indices(c: np.ndarray, k: int, largest: bool) -> list[list[int]]:
    """Sorted by value, NaN above everything, ties by index."""

    def key(value: float, index: int) -> tuple[float, float, int]:
        rank = (1.0, 0.0) if math.isnan(value) else (0.0, value)
        return (-rank[0], -rank[1], index) if largest else (*rank, index)

    return [sorted(range(len(row)), key=lambda index: key(row[index], index))[:k] for row in c.tolist()]


def check_topk(backend: Backend, z: Tensor, w_norm: Tensor, k: int, *, largest: bool) -> None:
    """Indices and values are those of a full sort."""
    before, c = bits(z), contributions(z, w_norm)
    values, indices = backend.contribution_topk(z, w_norm, k, largest=largest)
    assert torch.equal(bits(z), before), "z was changed"
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert values.shape == indices.shape == (len(z), k)
    assert indices.tolist() == sorted_indices(c, k, largest)
    np.testing.assert_array_equal(values.cpu().numpy(), np.take_along_axis(c, indices.cpu().numpy(), axis=1))
