"""What tells weights apart: sums over every parameter that do not show how a class lays the parameters out.

A Hugging Face model fuses query, key and value where a HookedTransformer has one tensor a head; matrices are stored
transposed, biases of zeros are added. What stays is the bag of numbers that a block has.

1. Of the bit pattern of each number in float32, an integer, the sum and the sum of squares are kept modulo 2^64: exact,
   the same in any order and on any device. Any one number that changes changes them; zeros add nothing. Numbers that
   only trade places inside of one block do not show.
2. A TransformerBridge has the parts of a fused matrix beside the matrix itself. What a wrapper has beside the module
   that it wraps is left out where its sums are those of one part of that module: it is a copy.
3. Folded and centred weights are computed when a model is loaded, and round otherwise on another machine. Of those the
   sum of squares is kept, to 6 digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuron_sparsity.errors import ModelError
from neuron_sparsity.placement import materialised

__all__ = ["Sums", "sums_of"]

# Numbers at a time: buffers of this size stay in a core's cache and are used again; with larger ones most of the time
# goes to memory that the system clears anew for each. A GPU wants more of them at once.
_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 22
_MODULUS = 1 << 64


class Sums(NamedTuple):
    """Sums over a bag of numbers.

    Attributes:
        bits: Of the bit patterns in float32, modulo 2^64.
        squared_bits: Of their squares, modulo 2^64.
        squares: Of the squares of the numbers themselves.
    """

    bits: int = 0
    squared_bits: int = 0
    squares: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Return the sums over two bags together."""
        return Sums(
            (self.bits + other.bits) % _MODULUS,
            (self.squared_bits + other.squared_bits) % _MODULUS,
            self.squares + other.squares,
        )

    def told(self, *, exact: bool) -> str:
        """Return what goes into a fingerprint."""
        return f"{self.bits:x} {self.squared_bits:x}" if exact else f"{self.squares:.6g}"


def sums_of(module: nn.Module, done: set[int]) -> Sums:
    """Return the sums over all parameters of a module and of everything in it; weights that are away are brought.

    Tied parameters count in each module that has them, as if they were not tied.

    Args:
        module: Any; a wrapper of TransformerLens too.
        done: `id` of the modules that were counted before and are left out; those of this one are added.

    Raises:
        ModelError: If a parameter is on the meta device and nothing brings it.

    Example:
        >>> fused, parts = nn.Linear(2, 2, bias=False), [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> with torch.no_grad():
        ...     for row, part in enumerate(parts):
        ...         _ = part.weight.copy_(fused.weight[row]), part.bias.zero_()
        >>> sums_of(fused, set())[:2] == sums_of(nn.ModuleList(parts), set())[:2]
        True
    """
    return _walk(module, done, [])


def _walk(module: nn.Module, done: set[int], found: list[tuple[int, int]]) -> Sums:
    """`sums_of`; the sums of every module that is met are added to `found`."""
    if id(module) in done:
        return Sums()
    done.add(id(module))
    n_before, wrapped = len(found), getattr(module, "original_component", None)
    inner = _walk(wrapped, done, found) if isinstance(wrapped, nn.Module) else Sums()
    parts = found[n_before:]
    own = Sums()
    if any(parameter is not None for parameter in module._parameters.values()):
        with materialised(module):
            for name, parameter in module._parameters.items():
                own = own if parameter is None else own.plus(_sums(_used(module, parameter.detach()), name))
    for child in module._modules.values():
        own = own if child is None else own.plus(_walk(child, done, found))
    total = inner if own[:2] in parts else inner.plus(own)
    found.append(total[:2])
    return total


def _used(module: nn.Module, values: Tensor) -> Tensor:
    """Without the first rows of a table of positions that no position reads (OPT has two)."""
    offset = vars(module).get("offset")
    return values[offset:] if isinstance(module, nn.Embedding) and isinstance(offset, int) else values


def _sums(values: Tensor, name: str) -> Sums:
    """Return the sums over one tensor, a chunk at a time."""
    if values.is_meta:
        raise ModelError(f"parameter {name} is on the meta device, which holds no numbers; load the weights")
    rows = values if values.dim() else values[None]
    n_rows = max(1, (_CHUNK if values.device.type == "cpu" else _GPU_CHUNK) // max(rows[:1].numel(), 1))
    bits = squared_bits = torch.zeros((), dtype=torch.int64, device=values.device)
    squares = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in rows.split(n_rows):
        near = chunk.float()
        far = [(chunk - near).float()] if chunk.dtype == torch.float64 else []  # what float32 does not hold
        for part in (near, *far):
            pattern = part.contiguous().view(torch.int32).long()
            bits, squared_bits = bits + pattern.sum(), squared_bits + (pattern * pattern).sum()
        squares = squares + near.double().square().sum()
    return Sums(int(bits) % _MODULUS, int(squared_bits) % _MODULUS, float(squares))
