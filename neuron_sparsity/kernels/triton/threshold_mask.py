"""`threshold_mask` in place: every activation is read once and written once, and nothing else touches memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuron_sparsity.kernels.triton.common import EXACT, contribution, next_power_of_2, w_norm_of

__all__ = ["threshold_mask", "threshold_mask_kernel"]

MAX_BLOCK = 2048  # an SM full of threads, at 32 registers each; at 4096 bfloat16 spills one on sm_90 (triton 3.9)


@triton.jit
def threshold_mask_kernel(
    z_ptr, w_norm_ptr, active_ptr, threshold, n_neuron, stride_token, stride_neuron, BLOCK: tl.constexpr
):
    """One token a program; its neurons pass in blocks."""
    token = tl.program_id(0).to(tl.int64)
    row = z_ptr + token * stride_token
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, n_neuron, BLOCK):
        neuron = start + tl.arange(0, BLOCK)
        inside = neuron < n_neuron
        place = row + neuron.to(tl.int64) * stride_neuron
        z = tl.load(place, mask=inside, other=0.0)
        c = contribution(z, tl.load(w_norm_ptr + neuron, mask=inside, other=0.0))
        kept = c >= threshold
        # NaN is neither above nor below: it stays, and is not active.
        tl.store(place, tl.where(kept | (c != c), z, 0.0), mask=inside)
        count += (kept & inside).to(tl.int32)
    tl.store(active_ptr + token, tl.sum(count).to(tl.int64))


def threshold_mask(z: Tensor, w_norm: Tensor, threshold: float) -> Tensor:
    """Set activations whose contribution is below `threshold` to zero, in place; return active neurons a token."""
    n_token, n_neuron = z.shape
    active = torch.empty(n_token, dtype=torch.int64, device=z.device)
    if n_token == 0:
        return active
    threshold_mask_kernel[(n_token,)](
        z, w_norm_of(w_norm), active, threshold, n_neuron, *z.stride(), **launch_options(n_neuron)
    )
    return active


def launch_options(n_neuron: int) -> dict[str, Any]:
    """Block size and warps for a row of neurons."""
    block = min(MAX_BLOCK, next_power_of_2(n_neuron))
    return {"BLOCK": block, "num_warps": 4 if block < 2048 else 8, **EXACT}
