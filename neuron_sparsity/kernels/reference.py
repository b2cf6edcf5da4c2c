"""The operations in torch: the definition other backends are held to, and what runs on the CPU.

Each walks the tokens in blocks of `BLOCK_TOKEN` rows, so that a block of a few thousand neurons and its temporaries
stay in the second-level cache: on two CPU cores whole-tensor expressions spend most of their time on fresh memory.
Comparisons write 1.0 and 0.0 straight into a float buffer: measured on AVX2, that takes a fifth of the time of a
boolean mask, and its use a twentieth (`mul_` by floats against `masked_fill_`).
No function here validates; `neuron_sparsity.kernels` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neuron_sparsity.kernels import StatisticsState

BLOCK_TOKEN = 128

# The histogram has two bins an octave. A float32 shifted right by 22 bits keeps its exponent and the first bit of its
# mantissa, so bins are [2^e, 1.5 * 2^e) and [1.5 * 2^e, 2^(e+1)). Bin 0 takes whatever is below 2^-20 (exact zeros
# are counted apart), the last bin whatever is at least 2^11.
N_BINS = 64
_BIN_SHIFT = 22
_BIN_OFFSET = ((127 - 20) << 1) - 1
_INDEX_BITS = 0xFFFFFFFF
_NAN_BITS = 0x7FC00000


def contributions(z: Tensor, w_norm: Tensor) -> Tensor:
    """`|z| * w_norm` in float32, whatever the type of `z`: the one rounding every op agrees on."""
    return z.float().abs().mul_(w_norm) if z.dtype != torch.float32 else z.abs().mul_(w_norm)


def neuron_statistics(z: Tensor, w_norm: Tensor, state: StatisticsState) -> Tensor:
    """Add `z`, [group, token, neuron], to `state`; return each group's largest contribution of each neuron."""
    maximum = torch.empty(len(z), z.shape[2], device=z.device)
    n_token, n_neuron = z.shape[1:]
    bins = torch.empty(n_token, n_neuron, dtype=torch.int32, device=z.device)
    scratch = torch.empty(2, min(BLOCK_TOKEN, n_token), n_neuron, device=z.device)
    for index, group in enumerate(z):
        maximum[index] = _group_statistics(group, w_norm, state, bins, scratch)
    return maximum


def _group_statistics(z: Tensor, w_norm: Tensor, state: StatisticsState, bins: Tensor, scratch: Tensor) -> Tensor:
    n_token, n_neuron = z.shape
    base = torch.arange(n_neuron, dtype=torch.int32, device=z.device) * N_BINS
    maximum = torch.zeros(n_neuron, device=z.device)
    ones = torch.ones(BLOCK_TOKEN, device=z.device)
    for start in range(0, n_token, BLOCK_TOKEN):
        block = z[start : start + BLOCK_TOKEN].float()
        row, index = ones[: len(block)], bins[start : start + BLOCK_TOKEN]
        c, flags = scratch[:, : len(block)]
        torch.abs(block, out=c).mul_(w_norm)
        state.activation_sum += (row @ block).double()
        state.contribution_sum += (row @ c).double()
        torch.maximum(maximum, c.amax(dim=0), out=maximum)
        # Of z itself: c is zero too where a neuron has no output weights, and where the product underflows.
        state.nonzero_count += (row @ torch.ne(block, 0.0, out=flags)).long()
        for k, threshold in enumerate(state.thresholds.tolist()):
            state.above_count[:, k] += (row @ torch.ge(c, threshold, out=flags)).long()
        torch.bitwise_right_shift(c.view(torch.int32), _BIN_SHIFT, out=index)
        index.sub_(_BIN_OFFSET).clamp_(0, N_BINS - 1).add_(base)
        state.contribution_sq_sum += (row @ c.mul_(c)).double()
    state.histogram += torch.bincount(bins.view(-1), minlength=n_neuron * N_BINS).view(n_neuron, N_BINS)
    state.n_tokens += n_token
    return maximum


def tail_error(z: Tensor, w_norm: Tensor, w_out: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of the tail's output for each threshold and token, active count a threshold, norm of the full output."""
    n_token, n_threshold = len(z), len(thresholds)
    error = torch.empty(n_threshold, n_token, device=z.device)
    full = torch.empty(n_token, device=z.device)
    active = torch.zeros(n_threshold, dtype=torch.int64, device=z.device)
    w_out = w_out.float()
    cuts = thresholds.tolist()
    scratch = torch.empty(BLOCK_TOKEN, z.shape[1], device=z.device)
    for start in range(0, n_token, BLOCK_TOKEN):
        stop = min(start + BLOCK_TOKEN, n_token)
        block = z[start:stop].float()
        c = contributions(block, w_norm)
        full[start:stop] = (block @ w_out).norm(dim=1)
        tail = scratch[: len(block)]
        for k, cut in enumerate(cuts):
            torch.lt(c, cut, out=tail)
            active[k] += tail.numel() - tail.sum(dim=1).long().sum()
            error[k, start:stop] = (tail.mul_(block) @ w_out).norm(dim=1)
    return error, active, full


def threshold_mask(z: Tensor, w_norm: Tensor, threshold: float) -> Tensor:
    """Set activations whose contribution is below `threshold` to zero, in place; return active neurons a token."""
    active = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for start in range(0, len(z), BLOCK_TOKEN):
        block = z[start : start + BLOCK_TOKEN]
        c = contributions(block, w_norm)
        kept = torch.ge(c, threshold, out=c)
        active[start : start + BLOCK_TOKEN] = kept.sum(dim=1).long()
        block.mul_(kept)
    return active


def contribution_topk(z: Tensor, w_norm: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k weakest or strongest neurons of each token, in order; ties go to the smaller index.

    A contribution is never negative, so its bits as an integer have its order: with the index below them in one int64,
    all keys differ, and the library's partial sort is exact. A stable sort of the row takes four times as long or more.
    """
    values = torch.empty(len(z), k, device=z.device)
    indices = torch.empty(len(z), k, dtype=torch.int64, device=z.device)
    index = torch.arange(z.shape[1], device=z.device)
    if largest:
        index = _INDEX_BITS - index
    for start in range(0, len(z), BLOCK_TOKEN):
        c = contributions(z[start : start + BLOCK_TOKEN], w_norm)
        bits = c.view(torch.int32).bitwise_and_(0x7FFFFFFF).clamp_max_(_NAN_BITS)  # every NaN is the same
        keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(index)
        keys = keys.topk(k, dim=1, largest=largest, sorted=True).values
        values[start : start + BLOCK_TOKEN] = (keys >> 32).to(torch.int32).view(torch.float32)
        chosen = keys.bitwise_and_(_INDEX_BITS)
        indices[start : start + BLOCK_TOKEN] = _INDEX_BITS - chosen if largest else chosen
    return values, indices


def global_rank(scores: Tensor, k: int) -> Tensor:
    """Flat indices of the k smallest scores, ascending; ties go to the smaller index."""
    return torch.sort(scores.reshape(-1), stable=True).indices[:k]
