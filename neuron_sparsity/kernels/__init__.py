"""The few operations that touch every (token, neuron) pair: validated here, computed by a backend.

Everything that measures neurons (recorder, CETT curves, `sparsify`, per-token ranking) goes through these ops.
`c = |z| * w_norm` is a neuron's contribution, always rounded to float32 once, so that every op and every backend agrees
on which side of a threshold a neuron falls: counts, masks and indices are equal, bit for bit.

Backends: `reference` (torch: the definition, and what runs on the CPU) and `triton` (one kernel file an op, what runs
on CUDA). `backend="auto"` chooses by the device; `choose` says what and why; one asked for by name never falls back.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity.kernels import reference
from neuron_sparsity.kernels.backend import BACKENDS, Backend, BackendChoice, choose, implementation
from neuron_sparsity.kernels.reference import N_BINS

__all__ = [
    "BACKENDS",
    "MAX_THRESHOLDS",
    "N_BINS",
    "OPS",
    "Backend",
    "BackendChoice",
    "StatisticsState",
    "choose",
    "contribution_topk",
    "global_rank",
    "histogram_edges",
    "neuron_statistics",
    "tail_error",
    "threshold_mask",
]

OPS = ("neuron_statistics", "tail_error", "threshold_mask", "contribution_topk")
"""The ops that have more than one backend."""

MAX_THRESHOLDS = 31
"""Thresholds that `neuron_statistics` can count above at once."""


@dataclass
class StatisticsState:
    """Running statistics of one layer's neurons, updated in place by `neuron_statistics`.

    Counts are int64 and exact. Sums are float64, fed by float32 sums over at most 128 tokens, whose relative error is
    below 128 * 2^-24 = 8e-6 and in practice near 1e-7; adding 10^10 of those in float64 adds at most 10^10 * 2^-53 =
    1e-6. So nothing overflows or drifts in 10^12 tokens.

    Raises:
        ValueError: By `zeros`, if there are more than 31 thresholds.
    """

    n_tokens: int
    nonzero_count: Int[Tensor, " neuron"]
    activation_sum: Float[Tensor, " neuron"]
    contribution_sum: Float[Tensor, " neuron"]
    contribution_sq_sum: Float[Tensor, " neuron"]
    histogram: Int[Tensor, "neuron bin"]
    thresholds: Float[Tensor, " threshold"]
    above_count: Int[Tensor, "neuron threshold"]

    @classmethod
    def zeros(
        cls, n_neuron: int, thresholds: Float[Tensor, " threshold"] | None = None, device: str | torch.device = "cpu"
    ) -> StatisticsState:
        """Return the state of `n_neuron` neurons before the first token."""
        cuts = torch.empty(0) if thresholds is None else thresholds
        if len(cuts) > MAX_THRESHOLDS:
            raise ValueError(f"at most {MAX_THRESHOLDS} thresholds can be counted at once, got {len(cuts)}")

        def sums() -> Tensor:
            return torch.zeros(n_neuron, dtype=torch.float64, device=device)

        return cls(
            n_tokens=0,
            nonzero_count=torch.zeros(n_neuron, dtype=torch.int64, device=device),
            activation_sum=sums(),
            contribution_sum=sums(),
            contribution_sq_sum=sums(),
            histogram=torch.zeros(n_neuron, N_BINS, dtype=torch.int64, device=device),
            thresholds=cuts.to(device=device, dtype=torch.float32),
            above_count=torch.zeros(n_neuron, len(cuts), dtype=torch.int64, device=device),
        )


def histogram_edges() -> Float[Tensor, " bin"]:
    """Return the lower edge of each bin of the contribution histogram.

    Bin 0 holds everything below 2^-20, exact zeros too; the last bin is open above.

    Returns:
        Float64, [64]: 0, 2^-20, 1.5 * 2^-20, 2^-19, 1.5 * 2^-19, ..., 2^11.

    Example:
        >>> histogram_edges()[-3:].tolist()
        [1024.0, 1536.0, 2048.0]
    """
    position = torch.arange(N_BINS, dtype=torch.float64) - 1
    edges = torch.exp2(torch.floor(position / 2) - 20) * torch.where(position % 2 == 0, 1.0, 1.5)
    edges[0] = 0.0
    return edges


def neuron_statistics(
    z: Float[Tensor, "*group token neuron"],
    w_norm: Float[Tensor, " neuron"],
    state: StatisticsState,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*group neuron"]:
    """Add the tokens of `z` to a layer's running statistics, in one pass.

    `z` is meant to be finite: NaN or infinity in one neuron makes its own sums NaN or infinite and leaves all other
    neurons alone, so that a caller may check `activation_sum` afterwards instead of `z` before.

    Args:
        z: Post-activations; with a group axis (windows), the largest contributions come one row a group.
        w_norm: Norm of each neuron's output weights, float32.
        state: What was seen so far, on the device of `z`; updated in place.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Float32: the largest contribution of each neuron among these tokens, of each group; 0 where there are none.

    Raises:
        ValueError: If shapes disagree, or the backend cannot run here.

    Example:
        >>> state = StatisticsState.zeros(2)
        >>> neuron_statistics(torch.tensor([[3.0, 0.0], [-4.0, 1.0]]), torch.tensor([1.0, 2.0]), state)
        tensor([4., 2.])
        >>> state.n_tokens, state.contribution_sum.tolist(), state.nonzero_count.tolist()
        (2, [7.0, 2.0], [2, 1])
    """
    if z.dim() not in (2, 3):
        raise ValueError(f"z must be [token, neuron] or [group, token, neuron], got {list(z.shape)}")
    _check_norms(z, w_norm)
    if len(state.contribution_sum) != z.shape[-1]:
        raise ValueError(f"state is for {len(state.contribution_sum)} neurons, z has {z.shape[-1]}")
    _check_device(z, "state", state.contribution_sum)
    groups = z if z.dim() == 3 else z[None]
    maximum: Tensor = _run("neuron_statistics", backend, groups, w_norm.float(), state)
    return maximum if z.dim() == 3 else maximum[0]


def tail_error(
    z: Float[Tensor, "token neuron"],
    w_norm: Float[Tensor, " neuron"],
    w_out: Float[Tensor, "neuron d_model"],
    thresholds: Float[Tensor, " threshold"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "threshold token"], Int[Tensor, " threshold"], Float[Tensor, " token"]]:
    """Return the norm of the truncated tail's output for several thresholds at once.

    The tail of a token at threshold `t` is its neurons with `c < t` (arXiv:2411.02335, Eq. 3). NaN or infinity in a
    token makes its full norm NaN or infinite, and leaves its tails' norms undefined; other tokens are not touched.

    Args:
        z: Post-activations.
        w_norm: Norm of each neuron's output weights.
        w_out: Output weights.
        thresholds: Cuts on the contribution.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Norm of the tail's output; number of active (token, neuron) pairs; norm of the full output. Float32, int64.

    Raises:
        ValueError: If shapes disagree, or the backend cannot run here.

    Example:
        >>> z, w_out = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> error, active, full = tail_error(z, torch.ones(2), w_out, torch.tensor([3.5]))
        >>> error.tolist(), active.tolist(), full.tolist()
        ([[3.0]], [1], [5.0])
    """
    _check(z, w_norm)
    if w_out.dim() != 2 or w_out.shape[0] != z.shape[1]:
        raise ValueError(f"w_out must be [{z.shape[1]}, d_model], got {list(w_out.shape)}")
    _check_device(z, "w_out", w_out)
    if thresholds.dim() != 1:
        raise ValueError(f"thresholds must be [threshold], got {list(thresholds.shape)}")
    found: tuple[Tensor, Tensor, Tensor] = _run("tail_error", backend, z, w_norm.float(), w_out, thresholds)
    return found


def threshold_mask(
    z: Float[Tensor, "token neuron"], w_norm: Float[Tensor, " neuron"], threshold: float, *, backend: Backend = "auto"
) -> Int[Tensor, " token"]:
    """Set every activation whose contribution is below `threshold` to zero, in place.

    What is kept is not changed by a bit. NaN stays NaN, and is not active; what is cut is a zero of either sign.

    Args:
        z: Post-activations; changed.
        w_norm: Norm of each neuron's output weights.
        threshold: Cut on the contribution, as a float32.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Number of active neurons of each token.

    Raises:
        ValueError: If shapes disagree, the threshold is NaN, or the backend cannot run here.

    Example:
        >>> z = torch.tensor([[3.0, -4.0]])
        >>> threshold_mask(z, torch.ones(2), 3.5), z
        (tensor([1]), tensor([[ 0., -4.]]))
    """
    _check(z, w_norm)
    if threshold != threshold:
        raise ValueError("threshold must be a number, got nan")
    active: Tensor = _run("threshold_mask", backend, z, w_norm.float(), threshold)
    return active


def contribution_topk(
    z: Float[Tensor, "token neuron"],
    w_norm: Float[Tensor, " neuron"],
    k: int,
    *,
    largest: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Return the k weakest (or strongest) neurons of each token by contribution.

    Args:
        z: Post-activations.
        w_norm: Norm of each neuron's output weights.
        k: How many, 1 to the number of neurons.
        largest: The strongest instead of the weakest.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Contributions and neuron indices, in order. Ties go to the smaller index; NaN counts as the largest.

    Raises:
        ValueError: If shapes disagree, k is out of range, or the backend cannot run here.

    Example:
        >>> contribution_topk(torch.tensor([[3.0, -1.0, 1.0]]), torch.ones(3), 2)
        (tensor([[1., 1.]]), tensor([[1, 2]]))
    """
    _check(z, w_norm)
    if not 1 <= k <= z.shape[1]:
        raise ValueError(f"k must be between 1 and {z.shape[1]}, got {k}")
    found: tuple[Tensor, Tensor] = _run("contribution_topk", backend, z, w_norm.float(), k, largest)
    return found


def global_rank(scores: Float[Tensor, "layer neuron"], k: int) -> Int[Tensor, "k 2"]:
    """Return (layer, neuron) of the k smallest scores of the whole model, ascending.

    A library sort: a model has at most a few million neurons, and they are ranked once.

    Args:
        scores: One score a neuron.
        k: How many, 0 to the number of neurons.

    Returns:
        Int64 pairs; ties go to the earlier layer, then the smaller index.

    Raises:
        ValueError: If a score is NaN or k is out of range.

    Example:
        >>> global_rank(torch.tensor([[3.0, 1.0], [0.5, 1.0]]), 3).tolist()
        [[1, 0], [0, 1], [1, 1]]
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be [layer, neuron], got {list(scores.shape)}")
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k must be between 0 and {scores.numel()}, got {k}")
    if torch.isnan(scores).any():
        raise ValueError("scores must not be NaN; drop or replace the scores that could not be computed")
    flat = reference.global_rank(scores, k)
    return torch.stack((flat // scores.shape[1], flat % scores.shape[1]), dim=1)


def _check(z: Tensor, w_norm: Tensor) -> None:
    if z.dim() != 2:
        raise ValueError(f"z must be [token, neuron], got {list(z.shape)}; flatten batch and pos")
    _check_norms(z, w_norm)


def _check_norms(z: Tensor, w_norm: Tensor) -> None:
    if w_norm.shape != z.shape[-1:]:
        raise ValueError(f"w_norm must be [{z.shape[-1]}], got {list(w_norm.shape)}")
    _check_device(z, "w_norm", w_norm)


def _check_device(z: Tensor, name: str, other: Tensor) -> None:
    if other.device != z.device:
        raise ValueError(f"z is on {z.device} and {name} on {other.device}; move one to the other")


def _run(op: str, backend: str, z: Tensor, *arguments: Any) -> Any:
    """Call an op of the chosen backend, on the tensor's own GPU if it is on one: kernels start on the current one."""
    run = getattr(implementation(op, z.device, backend), op)
    with torch.cuda.device(z.device) if z.device.type == "cuda" else nullcontext():
        return run(z, *arguments)
