"""`tail_error`: mask, product with W_out and norm in one kernel, for all thresholds and the full output at once.

A program makes one tile of the output, [BLOCK_TOKEN, BLOCK_MODEL], for one threshold: it reads z and W_out in tiles,
sets what is above the threshold to zero in registers, and keeps of the product only the sum of squares of each row.
Neither the masked activations nor the outputs reach memory. Programs of neighbouring thresholds follow one another, so
that their tiles of z and W_out come from cache; z crosses the memory bus about once.

The arithmetic is that of one product for each threshold: the gain is in what is not written and read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron_sparsity.kernels.triton.common import EXACT, INTERPRETED, contribution, w_norm_of

__all__ = ["tail_error", "tail_error_kernel"]


@triton.jit
def tail_error_kernel(
    z_ptr,
    w_norm_ptr,
    w_out_ptr,
    cut_ptr,
    square_ptr,
    below_ptr,
    n_token,
    n_neuron,
    d_model,
    n_cut,
    n_tile,
    stride_token,
    stride_neuron,
    stride_w_neuron,
    stride_w_model,
    BLOCK_TOKEN: tl.constexpr,
    BLOCK_MODEL: tl.constexpr,
    BLOCK_NEURON: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sum of squares of one output tile's rows under one threshold; the last "threshold" lets everything through."""
    program = tl.program_id(0)
    cut_index = program % (n_cut + 1)
    tile = (program // (n_cut + 1)) % n_tile
    block = program // (n_cut + 1) // n_tile
    everything = cut_index == n_cut
    cut = tl.load(cut_ptr + cut_index, mask=cut_index < n_cut, other=0.0)

    token = block * BLOCK_TOKEN + tl.arange(0, BLOCK_TOKEN)
    column = tile * BLOCK_MODEL + tl.arange(0, BLOCK_MODEL)
    z_rows = z_ptr + token.to(tl.int64)[:, None] * stride_token
    w_columns = w_out_ptr + column.to(tl.int64)[None, :] * stride_w_model
    real_token = (token < n_token)[:, None]
    real_column = (column < d_model)[None, :]
    output = tl.zeros([BLOCK_TOKEN, BLOCK_MODEL], dtype=tl.float32)
    n_below = tl.zeros([BLOCK_TOKEN], dtype=tl.int32)
    for start in range(0, n_neuron, BLOCK_NEURON):
        neuron = start + tl.arange(0, BLOCK_NEURON)
        inside = neuron < n_neuron
        wide = neuron.to(tl.int64)
        z = tl.load(z_rows + wide[None, :] * stride_neuron, mask=real_token & inside[None, :], other=0.0)
        w_norm = tl.load(w_norm_ptr + neuron, mask=inside, other=0.0)
        w_out = tl.load(w_columns + wide[:, None] * stride_w_neuron, mask=real_column & inside[:, None], other=0.0)
        below = contribution(z, w_norm[None, :]) < cut
        n_below += tl.sum((below & inside[None, :]).to(tl.int32), axis=1)
        tail = tl.where(below | everything, z, 0.0).to(z.dtype)
        if UPCAST:
            tail, w_out = tail.to(tl.float32), w_out.to(tl.float32)
        output = tl.dot(tail, w_out, output, input_precision="ieee")
    place = (tile * (n_cut + 1) + cut_index).to(tl.int64) * n_token + token
    tl.store(square_ptr + place, tl.sum(output * output, axis=1), mask=token < n_token)
    if (tile == 0) & (cut_index < n_cut):
        tl.atomic_add(below_ptr + cut_index, tl.sum(tl.where(token < n_token, n_below, 0)).to(tl.int64))


def tail_error(z: Tensor, w_norm: Tensor, w_out: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of the tail's output for each threshold and token, active count a threshold, norm of the full output."""
    (n_token, n_neuron), d_model, n_cut = z.shape, w_out.shape[1], len(thresholds)
    below = torch.zeros(n_cut, dtype=torch.int64, device=z.device)
    if n_token == 0:
        return torch.zeros(n_cut, 0, device=z.device), below, torch.zeros(0, device=z.device)
    # Float64 is rounded, as in torch; the interpreter has no bfloat16 product.
    upcast = z.dtype != w_out.dtype or z.dtype == torch.float64 or (INTERPRETED and z.dtype == torch.bfloat16)
    shape = blocks(torch.float32 if upcast else z.dtype)
    n_tile = max(1, triton.cdiv(d_model, shape["BLOCK_MODEL"]))  # the first tile counts, also without an output
    square = torch.empty(n_tile, n_cut + 1, n_token, device=z.device)
    grid = (triton.cdiv(n_token, shape["BLOCK_TOKEN"]) * n_tile * (n_cut + 1),)
    tail_error_kernel[grid](
        z,
        w_norm_of(w_norm),
        w_out,
        thresholds.to(device=z.device, dtype=torch.float32).contiguous(),
        square,
        below,
        n_token,
        n_neuron,
        d_model,
        n_cut,
        n_tile,
        *z.stride(),
        *w_out.stride(),
        UPCAST=upcast,
        **shape,
    )
    norm = square.sum(dim=0).sqrt_()
    return norm[:n_cut], n_token * n_neuron - below, norm[n_cut]


def blocks(dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and launch options; float32 products run on the plain cores, in smaller tiles."""
    token, model, neuron, stages = (64, 64, 32, 2) if dtype == torch.float32 else (128, 128, 64, 3)
    tiles = {"BLOCK_TOKEN": token, "BLOCK_MODEL": model, "BLOCK_NEURON": neuron}
    return {**tiles, "num_warps": 8, "num_stages": stages, **EXACT}
