"""`contribution_topk`: exact selection without sorting the row, then a sort of the k that were selected.

1. A contribution is never negative, so its bits as an integer have its order. The key of a neuron is these bits
   (their complement for the strongest); equal keys go by index.
2. `select_kernel`, one token a program: counts how many keys lie at or below a place and moves that place, by
   interpolation and bisection in turn, until exactly k do, or until it stands on a key that several neurons share.
   The row stays in registers for that up to 32,768 neurons; beyond, it is read again from cache. Last, the row is
   read from cache in parts, and prefix sums place the k neurons, as (key, index) in one integer, in order of index.
3. `sort_kernel` sorts them, a row a program. Above 2,048 the library's sort takes over: a bitonic network in one
   program grows with k log² k and no longer fits its registers.

The contributions are never written to memory; z is read from memory once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron_sparsity.kernels.triton.common import EXACT, contribution, next_power_of_2, w_norm_of

__all__ = ["contribution_topk", "select_kernel", "sort_kernel"]

MAX_ROW = 32_768  # neurons that one program holds in registers
TILE = 8192  # neurons at a time beyond that
MAX_SORT = 2048

_LAST_KEY: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)


@triton.jit
def _keys(row, w_norm_ptr, start, n_neuron, stride_neuron, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Keys of a block of neurons, the last possible key beyond the row."""
    neuron = start + tl.arange(0, BLOCK)
    inside = neuron < n_neuron
    z = tl.load(row + neuron.to(tl.int64) * stride_neuron, mask=inside, other=0.0)
    c = contribution(z, tl.load(w_norm_ptr + neuron, mask=inside, other=0.0))
    bits = tl.where(c != c, _NAN_BITS, c.to(tl.int32, bitcast=True))
    if LARGEST:
        bits = _LAST_KEY - bits
    return tl.where(inside, bits, _LAST_KEY)


@triton.jit
def _n_up_to(
    place,
    keys,
    row,
    w_norm_ptr,
    n_neuron,
    stride_neuron,
    BLOCK: tl.constexpr,
    N_TILES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """How many keys of the row are at most `place`; the row is read again only if it has several tiles."""
    if N_TILES == 1:
        n = tl.sum((keys <= place).to(tl.int32))
    else:
        n = 0
        for tile in range(N_TILES):
            keys = _keys(row, w_norm_ptr, tile * BLOCK, n_neuron, stride_neuron, BLOCK, LARGEST)
            n += tl.sum((keys <= place).to(tl.int32))
    return n


@triton.jit
def select_kernel(
    z_ptr,
    w_norm_ptr,
    selected_ptr,
    n_neuron,
    k,
    stride_token,
    stride_neuron,
    BLOCK: tl.constexpr,
    N_TILES: tl.constexpr,
    PART: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write the k smallest (key, index) of one token, ascending in the index."""
    token = tl.program_id(0).to(tl.int64)
    row = z_ptr + token * stride_token
    keys = _keys(row, w_norm_ptr, 0, n_neuron, stride_neuron, BLOCK, LARGEST)

    # low and high: fewer than k keys are at most low, at least k are at most high.
    low = tl.full([], -1, dtype=tl.int64)
    n_low = tl.full([], 0, dtype=tl.int32)
    high = tl.full([], _LAST_KEY, dtype=tl.int64)
    n_high = tl.full([], BLOCK * N_TILES, dtype=tl.int32)
    if N_TILES == 1:
        low = tl.min(keys).to(tl.int64) - 1
    step_index = tl.full([], 0, dtype=tl.int32)
    while (high - low > 1) & (n_low < k):
        middle = low + (high - low) // 2
        if step_index % 2 == 1:
            share = (k - n_low).to(tl.float32) / (n_high - n_low).to(tl.float32)
            step = ((high - low).to(tl.float32) * share).to(tl.int64)
            middle = low + tl.minimum(tl.maximum(step, 1), high - low - 1)
        step_index += 1
        n = _n_up_to(middle.to(tl.int32), keys, row, w_norm_ptr, n_neuron, stride_neuron, BLOCK, N_TILES, LARGEST)
        if n <= k:
            low, n_low = middle, n
        else:
            high, n_high = middle, n

    # All keys up to low are selected; if they are fewer than k, the first of those equal to high are too.
    certain, shared = low.to(tl.int32), high.to(tl.int32)
    n_shared = k - n_low
    n_before = tl.full([], 0, dtype=tl.int32)  # selected in earlier parts
    n_met = tl.full([], 0, dtype=tl.int32)  # keys equal to high in earlier parts
    out = selected_ptr + token * k
    for start in range(0, n_neuron, PART):
        part = _keys(row, w_norm_ptr, start, n_neuron, stride_neuron, PART, LARGEST)
        equal = (part == shared).to(tl.int32)
        chosen = (part <= certain).to(tl.int32)
        if n_shared > 0:
            order = tl.cumsum(equal, axis=0) + n_met
            chosen += ((equal > 0) & (order <= n_shared)).to(tl.int32)
        place = tl.cumsum(chosen, axis=0) + n_before - 1
        neuron = start + tl.arange(0, PART)
        packed = (part.to(tl.int64) << 32) | neuron.to(tl.int64)
        tl.store(out + place, packed, mask=chosen > 0)
        n_before += tl.sum(chosen)
        n_met += tl.sum(equal)


@triton.jit
def sort_kernel(selected_ptr, value_ptr, index_ptr, k, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Sort one token's (key, index) and take them apart."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < k
    packed = tl.load(selected_ptr + token * k + place, mask=inside, other=0x7FFFFFFFFFFFFFFF)
    packed = tl.sort(packed)
    key = (packed >> 32).to(tl.int32)
    if LARGEST:
        key = _LAST_KEY - key
    tl.store(value_ptr + token * k + place, key.to(tl.float32, bitcast=True), mask=inside)
    tl.store(index_ptr + token * k + place, packed & 0xFFFFFFFF, mask=inside)


def contribution_topk(z: Tensor, w_norm: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k weakest or strongest neurons of each token, in order; ties go to the smaller index."""
    n_token, n_neuron = z.shape
    selected = torch.empty(n_token, k, dtype=torch.int64, device=z.device)
    values = torch.empty(n_token, k, device=z.device)
    indices = torch.empty(n_token, k, dtype=torch.int64, device=z.device)
    if n_token == 0:
        return values, indices
    select_kernel[(n_token,)](
        z, w_norm_of(w_norm), selected, n_neuron, k, *z.stride(), LARGEST=largest, **select_options(n_neuron)
    )
    if k > MAX_SORT:
        packed = selected.sort(dim=1).values
        key = (packed >> 32).to(torch.int32)
        values.copy_((0x7FFFFFFF - key if largest else key).view(torch.float32))
        return values, indices.copy_(packed & 0xFFFFFFFF)
    sort_kernel[(n_token,)](selected, values, indices, k, LARGEST=largest, **sort_options(k))
    return values, indices


def select_options(n_neuron: int) -> dict[str, Any]:
    """Block sizes and warps of `select_kernel`: at most 64 keys a thread while counting, 8 while placing."""
    block = next_power_of_2(n_neuron) if n_neuron <= MAX_ROW else TILE
    warps = min(16, max(1, block // 512))
    part = min(block, warps * 32 * 8)
    return {"BLOCK": block, "N_TILES": -(-n_neuron // block), "PART": part, "num_warps": warps, **EXACT}


def sort_options(k: int) -> dict[str, Any]:
    """Block size and warps of `sort_kernel`: about 8 packed keys a thread."""
    block = next_power_of_2(k)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256)), **EXACT}
