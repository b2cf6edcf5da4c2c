"""Where a model's weights are: on one device, on several, or away (in CPU memory or on disk) until their layer runs.

accelerate moves them (`device_map`, `cpu_offload`, `disk_offload`). A module that it dispatched carries a hook whose
`pre_forward` brings weights and inputs to the module's own device, and whose `post_forward` takes the weights away
again. Between the two they are on torch's meta device: shapes without numbers. Whoever reads a weight outside of the
module's forward has to do what the hook does, or reads nothing; `materialised` does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuron_sparsity.errors import ModelError

__all__ = [
    "DeviceMap",
    "device_of",
    "hook_of",
    "is_offloaded",
    "materialised",
    "output_bias",
    "output_shape",
    "output_weight",
    "require_accelerate",
    "run_hooked",
    "untold",
]

DeviceMap = Mapping[str, "int | str | torch.device"]
"""Hugging Face's `device_map`: names of modules -> GPU number, `"cpu"` or `"disk"`."""


def hook_of(module: nn.Module) -> Any:
    """Return accelerate's hook on this very module, or None. A wrapper that passes attributes through has none."""
    return vars(module).get("_hf_hook")


@contextmanager
def materialised(module: nn.Module) -> Iterator[None]:
    """Bring the weights of a module and of everything in it to where they are used, and keep them there while open.

    A tensor that is read inside stays what it is afterwards; the module gives its own up again. Calls of the module
    inside bring and give up nothing: many of them cost one load.
    """
    with ExitStack() as stack:
        for part in module.modules():
            hook = hook_of(part)
            if hook is not None and _is_away(part):
                stack.callback(hook.post_forward, part, None)  # before the load: also half a load is given up
                hook.pre_forward(part)
                stack.callback(setattr, part, "_hf_hook", hook)
                part._hf_hook = _Resident(device_of(part))  # type: ignore[assignment]
        yield


class _Resident:
    """Stands in for the hook of a module whose weights are there already: moves inputs, and nothing else."""

    no_grad = False

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def _is_away(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def output_weight(mlp: nn.Module, block: int) -> Float[Tensor, "neuron d_model"]:
    """Return `W_out` of the MLP of a TransformerLens block, on the MLP's own device.

    Raises:
        ModelError: If there is none, or it holds no numbers.
    """
    with materialised(_out(mlp)):
        try:
            weight = _read(mlp, block)
        except NotImplementedError as error:  # TransformerLens 4.3, on quantised weights and on the meta device
            raise ModelError(f"layer {block}: {str(error).splitlines()[0]}") from error
    if weight.is_meta:
        raise ModelError(f"layer {block}: W_out is on the meta device, which holds no numbers; load the weights")
    return weight.detach()


def output_shape(mlp: nn.Module, block: int) -> tuple[int, ...] | None:
    """Return the shape of `W_out`, or None where it is not known before the weights are read.

    Raises:
        ModelError: If there is none.
    """
    try:
        return tuple(_read(mlp, block).shape)
    except NotImplementedError:
        return None


def _read(mlp: nn.Module, block: int) -> Tensor:
    weight: Tensor | None = getattr(mlp, "W_out", None)
    if weight is None:
        raise ModelError(f"layer {block}: {type(mlp).__name__} has no W_out, so a neuron's output cannot be told")
    return weight


def output_bias(mlp: nn.Module) -> Float[Tensor, " d_model"] | None:
    """Return `b_out` of the MLP of a TransformerLens block, or None."""
    bias: Tensor | None = getattr(mlp, "b_out", None)
    if bias is not None and bias.is_meta:  # a bridge's `b_out` is whatever stood there when it was booted
        with materialised(_out(mlp)):
            bias = _out(mlp).bias  # type: ignore[assignment]
    return None if bias is None else bias.detach()


def _out(mlp: nn.Module) -> nn.Module:
    """The down projection, if the MLP has it as a module of its own; else the MLP."""
    out = getattr(mlp, "out", None)
    return out if isinstance(out, nn.Module) else mlp


def is_offloaded(model: nn.Module) -> bool:
    """Return whether weights of a model are away until their layer runs.

    Example:
        >>> is_offloaded(nn.Linear(2, 2)), is_offloaded(nn.Linear(2, 2, device="meta"))
        (False, True)
    """
    return _is_away(model)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module runs on, wherever its weights wait.

    Raises:
        ModelError: If its weights are on the meta device and nothing would bring them.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    pending = [hook_of(part) for part in module.modules()]
    while pending:
        hook = pending.pop(0)
        pending[:0] = getattr(hook, "hooks", ())  # several in one
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    device = next(module.parameters()).device
    if device.type == "meta":
        raise ModelError(
            "the model's weights are on the meta device, which holds no numbers; load it with weights, or have "
            "accelerate dispatch it (device_map)"
        )
    return device


def run_hooked(module: nn.Module, original: nn.Module) -> None:
    """Let accelerate's hook on `original`, whose weights `module` shares, do its work in `module`'s forward too."""
    run = module.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        hook = hook_of(original)
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
            output = run(*args, **kwargs)
        return hook.post_forward(module, output)

    module.forward = forward  # type: ignore[method-assign]


@contextmanager
def untold(hf_model: nn.Module) -> Iterator[None]:
    """Keep the device map of a dispatched model from TransformerLens where it mixes GPUs with CPU memory or disk.

    TransformerLens 4.3 refuses to boot such a model, because it was never tried: its own words are "likely fine", and
    what it does for a model on CPU and disk is the same. `attach` tries it on every layer before anything is measured.
    """
    device_map: Any = vars(hf_model).get("hf_device_map") or {}
    away = [str(device) in ("cpu", "disk") for device in device_map.values()]
    if not any(away) or all(away):
        yield
        return
    del hf_model.hf_device_map
    try:
        yield
    finally:
        hf_model.hf_device_map = device_map


def require_accelerate(device: object) -> None:
    """Refuse a placement that needs accelerate where it is not installed.

    Raises:
        ModelError: If it is not.
    """
    if find_spec("accelerate") is None:
        raise ModelError(
            f"device {device!r} spreads a model over devices, which needs the package accelerate; "
            'pip install -e ".[large]" in the clone'
        )
