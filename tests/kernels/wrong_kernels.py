"""The kernel of `threshold_mask`, wrong in one place each: what the checks have to notice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def above_only_kernel(
    z_ptr, w_norm_ptr, active_ptr, threshold, n_neuron, stride_token, stride_neuron, BLOCK: tl.constexpr
):
    """A contribution equal to the threshold is cut."""
    token, neuron = tl.program_id(0), tl.arange(0, BLOCK)
    place = z_ptr + token * stride_token + neuron * stride_neuron
    z = tl.load(place, mask=neuron < n_neuron, other=0.0)
    kept = tl.abs(z * tl.load(w_norm_ptr + neuron, mask=neuron < n_neuron, other=0.0)) > threshold
    tl.store(place, tl.where(kept, z, 0.0), mask=neuron < n_neuron)
    tl.store(active_ptr + token, tl.sum(kept.to(tl.int64)))


@triton.jit
def last_neuron_forgotten_kernel(
    z_ptr, w_norm_ptr, active_ptr, threshold, n_neuron, stride_token, stride_neuron, BLOCK: tl.constexpr
):
    """A row is one neuron short."""
    token, neuron = tl.program_id(0), tl.arange(0, BLOCK)
    place = z_ptr + token * stride_token + neuron * stride_neuron
    z = tl.load(place, mask=neuron < n_neuron - 1, other=0.0)
    kept = tl.abs(z * tl.load(w_norm_ptr + neuron, mask=neuron < n_neuron - 1, other=0.0)) >= threshold
    tl.store(place, tl.where(kept, z, 0.0), mask=neuron < n_neuron - 1)
    tl.store(active_ptr + token, tl.sum(kept.to(tl.int64)))


@triton.jit
def last_count_forgotten_kernel(
    z_ptr, w_norm_ptr, active_ptr, threshold, n_neuron, stride_token, stride_neuron, BLOCK: tl.constexpr
):
    """The last token's count is not written: only poisoned memory shows it for certain."""
    token, neuron = tl.program_id(0), tl.arange(0, BLOCK)
    place = z_ptr + token * stride_token + neuron * stride_neuron
    z = tl.load(place, mask=neuron < n_neuron, other=0.0)
    kept = tl.abs(z * tl.load(w_norm_ptr + neuron, mask=neuron < n_neuron, other=0.0)) >= threshold
    tl.store(place, tl.where(kept, z, 0.0), mask=neuron < n_neuron)
    tl.store(active_ptr + token, tl.sum(kept.to(tl.int64)), mask=token < tl.num_programs(0) - 1)
