"""Several devices on a machine with none: CPU tensors that say, and insist, that they are elsewhere.

Inside `pretended()`, `"ipu:0"`, `"ipu:1"` ... are devices (no build of torch has real ones). A tensor there holds a
CPU tensor, which computes: the numbers are the CPU's, bit for bit. An operation on tensors of two devices raises, as on
GPUs, except for scalars and for indices on the CPU. What GPUs do to rounding, memory and time cannot be seen this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "ipu"


class Elsewhere(Tensor):
    """A tensor on a pretended device."""

    inner: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, where: torch.device | None = None, requires_grad: bool = False) -> Any:
        if where is None:  # accelerate makes a parameter of the class that stood there before
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # what torch's own code sees; what Python sees is `device`
        )
        made.inner, made.where = inner, where
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.where}, {self.inner})"

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner.clone()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("copy", None)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self.inner if dtype is None else self.inner.to(dtype)
        if device is None or device == self.where:
            return self if dtype is None else Elsewhere(moved, self.where)
        return Elsewhere(moved.clone(), device) if device.type == KIND else moved.clone().to(device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, asked = func._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name not in ("aten::_to_copy", "aten::copy_"):
        places = {tensor.device for tensor in tensors if tensor.dim()}
        if "index" in name:
            places.discard(torch.device("cpu"))
        if len(places) > 1:
            raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(map(str, places)))}")
    where = next((tensor.where for tensor in tensors if isinstance(tensor, Elsewhere)), None)
    if name == "aten::copy_":
        where = args[0].where if isinstance(args[0], Elsewhere) else None
    if asked is not None:
        where = torch.device(asked)
        kwargs = kwargs | {"device": torch.device("cpu") if where.type == KIND else where}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if where is None or where.type != KIND:
        return out
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    return tree_map(lambda x: Elsewhere(x, where) if isinstance(x, Tensor) else x, out)


class _Operations(TorchDispatchMode):
    """`torch.zeros(..., device="ipu:1")` and the like."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What does not ask a dispatch mode: `torch.tensor(..., device=)`, and `.to(other)` of a CPU tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == KIND:
            kwargs.pop("device")
            return Elsewhere(func(*args, **kwargs), torch.device(device))
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Elsewhere):
            return args[0].to(args[1].where, args[1].dtype)
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """Offer devices `ipu:0`, `ipu:1`, ... while the context is open. Without gradients."""
    with _Functions(), _Operations(), torch.no_grad():
        yield
