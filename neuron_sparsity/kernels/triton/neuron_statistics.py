"""`neuron_statistics`: every statistic of every neuron from one read of z.

A program takes a block of neurons and walks their tokens, 16 at a time; a thread owns its neurons, so that nothing is
exchanged between threads.

Sums: float32 over 16 tokens, then float64. Programs write their sums side by side and one reduction in fixed order adds
them up, so the result repeats bit for bit.

Counts: of 64 histogram bins, of non-zeros and of exceedances. A token contributes one bit to a 64-bit word (its bin)
and a few bits to a 32-bit word (the flags). Counting the ones of many words by position is addition of binary numbers
written across words: word j of a counter holds bit j of each of its 64 counts. A full adder is two logic operations
for all positions at once, and a carry reaches word j only every 2^j tokens, so that a token costs about six
operations on each word instead of 64 comparisons. (Carry-save adders: Harley and Seal's population count; Muła, Kurz
and Lemire, arXiv:1611.07612, section 4.) Twelve words count to 4,095; then they are unpacked into int64 counters in
memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron_sparsity.kernels.triton.common import EXACT, contribution, w_norm_of

if TYPE_CHECKING:
    from neuron_sparsity.kernels import StatisticsState

__all__ = ["neuron_statistics", "neuron_statistics_kernel"]

STEP = 16  # tokens between two float64 additions
LAUNCH = {"BLOCK": 128, "STEP": STEP, "num_warps": 4, **EXACT}
MAX_STEPS = 255  # 16 * 255 tokens: what twelve bits count
MAX_CUTS = 31  # one flag each, and one for non-zeros
PROGRAMS = 1024  # that keep a large GPU busy

_BIN_SHIFT: tl.constexpr = tl.constexpr(22)
_BIN_OFFSET: tl.constexpr = tl.constexpr(((127 - 20) << 1) - 1)


@triton.jit
def _full_add(a, b, c):
    """Sum and carry of three bits, at every position."""
    partial = a ^ b
    return partial ^ c, (a & b) | (partial & c)


@triton.jit
def _ripple(counter, carry):
    """Add one bit at every position to an eight-word counter."""
    c0, c1, c2, c3, c4, c5, c6, c7 = counter
    c0, carry = c0 ^ carry, c0 & carry
    c1, carry = c1 ^ carry, c1 & carry
    c2, carry = c2 ^ carry, c2 & carry
    c3, carry = c3 ^ carry, c3 & carry
    c4, carry = c4 ^ carry, c4 & carry
    c5, carry = c5 ^ carry, c5 & carry
    c6, carry = c6 ^ carry, c6 & carry
    return c0, c1, c2, c3, c4, c5, c6, c7 ^ carry


@triton.jit
def _add_pair(i: tl.constexpr, low, high, held, a, b):
    """Add the i-th pair of words to a counter of 4 + 8 words; carries wait in `held` until they have company."""
    l0, l1, l2, l3 = low
    h0, h1, h2 = held
    l0, carry = _full_add(l0, a, b)
    if i % 2 == 0:
        h0 = carry
    else:
        l1, carry = _full_add(l1, h0, carry)
        if i % 4 == 1:
            h1 = carry
        else:
            l2, carry = _full_add(l2, h1, carry)
            if i % 8 == 3:
                h2 = carry
            else:
                l3, carry = _full_add(l3, h2, carry)
                high = _ripple(high, carry)
    return (l0, l1, l2, l3), high, (h0, h1, h2)


@triton.jit
def _count(low, high, position):
    """The count at one position of a counter."""
    l0, l1, l2, l3 = low
    c0, c1, c2, c3, c4, c5, c6, c7 = high
    n = ((l0 >> position) & 1) + (((l1 >> position) & 1) << 1)
    n += (((l2 >> position) & 1) << 2) + (((l3 >> position) & 1) << 3)
    n += (((c0 >> position) & 1) << 4) + (((c1 >> position) & 1) << 5)
    n += (((c2 >> position) & 1) << 6) + (((c3 >> position) & 1) << 7)
    n += (((c4 >> position) & 1) << 8) + (((c5 >> position) & 1) << 9)
    n += (((c6 >> position) & 1) << 10) + (((c7 >> position) & 1) << 11)
    return n


@triton.jit
def _words(z, c, cut_ptr, N_CUTS: tl.constexpr):
    """The bit of a token's bin, and its flags: non-zero, then one for each threshold."""
    bits = (c.to(tl.int32, bitcast=True) >> _BIN_SHIFT) - _BIN_OFFSET
    bin_word = tl.full([], 1, dtype=tl.int64) << tl.minimum(tl.maximum(bits, 0), 63).to(tl.int64)
    flags = (z != 0.0).to(tl.int32)
    for k in tl.static_range(N_CUTS):
        flags |= (c >= tl.load(cut_ptr + k)).to(tl.int32) << (k + 1)
    return bin_word, flags


@triton.jit
def neuron_statistics_kernel(
    z_ptr,
    w_norm_ptr,
    cut_ptr,
    sum_ptr,
    maximum_ptr,
    histogram_ptr,
    nonzero_ptr,
    above_ptr,
    n_group,
    n_token,
    n_neuron,
    stride_group,
    stride_token,
    stride_neuron,
    groups_a_program,
    tokens_a_program,
    N_CUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Statistics of BLOCK neurons over a range of groups and of tokens in each."""
    neuron = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < n_neuron
    first_group = tl.program_id(1) * groups_a_program
    first_token = tl.program_id(2) * tokens_a_program
    last_group = tl.minimum(first_group + groups_a_program, n_group)
    last_token = tl.minimum(first_token + tokens_a_program, n_token)
    w_norm = tl.load(w_norm_ptr + neuron, mask=inside, other=0.0)
    columns = z_ptr + neuron.to(tl.int64) * stride_neuron

    zero = tl.full([], 0, dtype=tl.int64)  # offsets are 64-bit
    z_sum = tl.zeros([BLOCK], dtype=tl.float64)
    c_sum = tl.zeros([BLOCK], dtype=tl.float64)
    square_sum = tl.zeros([BLOCK], dtype=tl.float64)
    no_bins = tl.zeros([BLOCK], dtype=tl.int64)
    no_flags = tl.zeros([BLOCK], dtype=tl.int32)
    bins_low = (no_bins, no_bins, no_bins, no_bins)
    bins_high = (no_bins, no_bins, no_bins, no_bins, no_bins, no_bins, no_bins, no_bins)
    flags_low = (no_flags, no_flags, no_flags, no_flags)
    flags_high = (no_flags, no_flags, no_flags, no_flags, no_flags, no_flags, no_flags, no_flags)
    for group in range(first_group, last_group):
        rows = columns + (zero + group) * stride_group
        maximum = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(first_token, last_token, STEP):
            z_part = tl.zeros([BLOCK], dtype=tl.float32)
            c_part = tl.zeros([BLOCK], dtype=tl.float32)
            square_part = tl.zeros([BLOCK], dtype=tl.float32)
            bins_held = (no_bins, no_bins, no_bins)
            flags_held = (no_flags, no_flags, no_flags)
            for i in tl.static_range(STEP // 2):
                token = zero + start + 2 * i
                place = rows + token * stride_token
                a = tl.load(place, mask=neuron < tl.where(token < last_token, n_neuron, 0), other=0.0).to(tl.float32)
                b = tl.load(
                    place + stride_token, mask=neuron < tl.where(token + 1 < last_token, n_neuron, 0), other=0.0
                ).to(tl.float32)
                c_a, c_b = contribution(a, w_norm), contribution(b, w_norm)
                z_part += a + b
                c_part += c_a + c_b
                square_part += c_a * c_a + c_b * c_b
                largest = tl.maximum(c_a, c_b, propagate_nan=tl.PropagateNan.ALL)
                maximum = tl.maximum(maximum, largest, propagate_nan=tl.PropagateNan.ALL)
                bin_a, flags_a = _words(a, c_a, cut_ptr, N_CUTS)
                bin_b, flags_b = _words(b, c_b, cut_ptr, N_CUTS)
                bins_low, bins_high, bins_held = _add_pair(i, bins_low, bins_high, bins_held, bin_a, bin_b)
                flags_low, flags_high, flags_held = _add_pair(i, flags_low, flags_high, flags_held, flags_a, flags_b)
            z_sum += z_part.to(tl.float64)
            c_sum += c_part.to(tl.float64)
            square_sum += square_part.to(tl.float64)
        place = (zero + tl.program_id(2) * n_group + group) * n_neuron + neuron
        tl.store(maximum_ptr + place, maximum, mask=inside)

    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    out = sum_ptr + program * 3 * n_neuron + neuron
    tl.store(out, z_sum, mask=inside)
    tl.store(out + n_neuron, c_sum, mask=inside)
    tl.store(out + 2 * n_neuron, square_sum, mask=inside)
    # Rows beyond the last token were counted as zeros, up to a multiple of STEP in every group.
    n_real = last_token - first_token
    n_padded = (tl.cdiv(n_real, STEP) * STEP - n_real) * (last_group - first_group)
    wide = neuron.to(tl.int64)
    for b in range(64):
        n = _count(bins_low, bins_high, zero + b) - tl.where(b == 0, n_padded, 0)
        tl.atomic_add(histogram_ptr + wide * 64 + b, n, mask=inside & (n > 0), sem="relaxed")
    n = _count(flags_low, flags_high, 0).to(tl.int64)
    tl.atomic_add(nonzero_ptr + wide, n, mask=inside & (n > 0), sem="relaxed")
    for k in tl.static_range(N_CUTS):
        n = _count(flags_low, flags_high, k + 1) - tl.where(tl.load(cut_ptr + k) <= 0.0, n_padded, 0)
        tl.atomic_add(above_ptr + wide * N_CUTS + k, n.to(tl.int64), mask=inside & (n > 0), sem="relaxed")


def neuron_statistics(z: Tensor, w_norm: Tensor, state: StatisticsState) -> Tensor:
    """Add `z`, [group, token, neuron], to `state`; return each group's largest contribution of each neuron."""
    n_group, n_token, n_neuron = z.shape
    if z.numel() == 0:
        state.n_tokens += n_group * n_token
        return torch.zeros(n_group, n_neuron, device=z.device)
    n_cuts = len(state.thresholds)
    groups, tokens = share(n_group, n_token, triton.cdiv(n_neuron, LAUNCH["BLOCK"]))
    n_group_parts, n_token_parts = triton.cdiv(n_group, groups), triton.cdiv(n_token, tokens)
    sums = torch.empty(n_token_parts * n_group_parts, 3, n_neuron, dtype=torch.float64, device=z.device)
    maximum = torch.empty(n_token_parts, n_group, n_neuron, device=z.device)
    neuron_statistics_kernel[(triton.cdiv(n_neuron, LAUNCH["BLOCK"]), n_group_parts, n_token_parts)](
        z,
        w_norm_of(w_norm),
        state.thresholds,
        sums,
        maximum,
        state.histogram,
        state.nonzero_count,
        state.above_count,
        n_group,
        n_token,
        n_neuron,
        *z.stride(),
        groups,
        tokens,
        N_CUTS=n_cuts,
        **LAUNCH,
    )
    total = sums.sum(dim=0)
    state.activation_sum += total[0]
    state.contribution_sum += total[1]
    state.contribution_sq_sum += total[2]
    state.n_tokens += n_group * n_token
    return maximum.amax(dim=0)


def share(n_group: int, n_token: int, n_blocks: int) -> tuple[int, int]:
    """Return how many groups, and how many tokens of each, one program takes.

    As many as it can count, but no more than leaves work for all of the GPU: the counters of a program are unpacked
    once, which is worth about 400 tokens of counting.
    """
    most = min(MAX_STEPS, max(1, n_group * triton.cdiv(n_token, STEP) * n_blocks // PROGRAMS))
    steps_a_group = triton.cdiv(n_token, STEP)
    if steps_a_group >= most:
        parts = triton.cdiv(steps_a_group, most)
        return 1, triton.cdiv(steps_a_group, parts) * STEP
    return min(n_group, most // steps_a_group), steps_a_group * STEP
