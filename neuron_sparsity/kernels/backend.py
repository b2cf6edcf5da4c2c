"""Which implementation of an op runs: chosen by where the tensors are, told with its reason, never changed silently.

`"auto"` takes the Triton kernels for tensors on a CUDA device, and torch for all others. A backend that is asked for by
name runs or fails: it is never replaced by another.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Literal

import torch

from neuron_sparsity.kernels import reference

__all__ = ["BACKENDS", "Backend", "BackendChoice", "choose", "implementation"]

Backend = Literal["auto", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton")
_LEAST_CAPABILITY = (8, 0)  # bfloat16 products; the oldest architecture the kernels are compiled for in the tests


@dataclass(frozen=True)
class BackendChoice:
    """A backend and why it is that one.

    Attributes:
        name: `"torch"` or `"triton"`.
        reason: For people.
    """

    name: str
    reason: str


def choose(device: torch.device | str, backend: str = "auto") -> BackendChoice:
    """Return the backend that an op runs on for tensors of a device.

    Args:
        device: Where the tensors are.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        The backend with the reason for it. `"auto"` is the only one that chooses.

    Raises:
        ValueError: If there is no such backend, or `"triton"` was asked for and cannot run there.

    Example:
        >>> choose("cpu")
        BackendChoice(name='torch', reason='tensors on cpu')
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = torch.device(device)
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    problem = _why_no_triton(device)
    if backend == "triton":
        if problem is not None:
            raise ValueError(f"backend 'triton' cannot run: {problem}; use backend='auto' or 'torch'")
        return BackendChoice("triton", "asked for" + (", interpreted" if device.type == "cpu" else ""))
    if device.type != "cuda":
        return BackendChoice("torch", f"tensors on {device.type}")
    return BackendChoice("triton", f"tensors on {device.type}") if problem is None else BackendChoice("torch", problem)


def implementation(op: str, device: torch.device, backend: str) -> ModuleType:
    """Return the module whose function `op` runs for tensors of a device.

    Raises:
        ValueError: As `choose`.
    """
    if choose(device, backend).name == "torch":
        return reference
    return importlib.import_module(f"neuron_sparsity.kernels.triton.{op}")


def _why_no_triton(device: torch.device) -> str | None:
    """Return what keeps the Triton kernels from running on a device, or None."""
    interpreted = _interpreted()
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not interpreted):
        return (
            f"it needs CUDA tensors and these are on {device.type} (TRITON_INTERPRET=1 runs them on the CPU, to test)"
        )
    if _version() is None:
        return "triton is not installed; `pip install triton`"
    if device.type == "cuda":
        if interpreted:
            return "TRITON_INTERPRET is set, which interprets kernels on the CPU; unset it"
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            has = ".".join(map(str, capability))
            return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {has}"
    return None


def _interpreted() -> bool:
    """Whether kernels are interpreted: settled by the environment when they are first imported."""
    common = sys.modules.get("neuron_sparsity.kernels.triton.common")
    if common is not None:
        return bool(common.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _version() -> str | None:  # every call of an op asks, and the answer is on disk
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
