"""What several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["EXACT", "INTERPRETED", "contribution", "next_power_of_2", "w_norm_of"]


@triton.jit
def contribution(z, w_norm):
    """`|z| * w_norm`, rounded to float32 once, NaN with a positive sign: as `reference.contributions`."""
    return tl.abs(z.to(tl.float32) * w_norm)


EXACT = {"enable_fp_fusion": False}
"""Launch option: `|z| * w_norm` is rounded before it is added to anything, as in torch."""

INTERPRETED = not isinstance(contribution, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when the kernels were imported: they run on CPU tensors, and on no GPU."""


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(0, n - 1).bit_length()


def w_norm_of(w_norm: Tensor) -> Tensor:
    """Weight norms as the kernels read them: float32, one after the other."""
    return w_norm.float().contiguous()
