"""The plain Hugging Face model inside a wrapped one, and what runs below its hooks.

A TransformerBridge keeps the Hugging Face modules it wraps. `unwrapped` puts them together again: shallow copies that
share every weight and buffer. A pass without hook points, and with fused attention, costs less (docs/measured.md has
by how much). It is used only where `adapter` has proved, on one batch, that it gives the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from neuron_sparsity.errors import ModelError
from neuron_sparsity.model_info import WeightFacts
from neuron_sparsity.placement import hook_of, materialised, run_hooked

__all__ = [
    "PlainBody",
    "down_projections",
    "fingerprint",
    "output_rows",
    "refuse_dropout",
    "relative_error",
    "unwrapped",
]


class PlainBody:
    """A Hugging Face model up to what enters its unembedding.

    Args:
        model: Causal language model of transformers, wrapped or not; not changed.
        n_layers: Layers with an MLP.
        d_mlp: Neurons a layer.
        d_model: Width of the residual stream.

    Raises:
        ValueError: If it cannot be put together, with the reason.
    """

    def __init__(self, model: nn.Module, n_layers: int, d_mlp: int, d_model: int) -> None:
        plain = unwrapped(model)
        self.base: Any = getattr(plain, "base_model", plain)
        if self.base is plain:
            raise ValueError(f"{type(plain).__name__} has no base model")
        self.attention = str(getattr(self.base.config, "_attn_implementation", "eager"))
        self.projections = down_projections(plain, d_mlp, d_model, n_layers)

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], on_post: Callable[[int, Tensor], Tensor | None] | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the last hidden state; `on_post(layer, z)` sees, and may replace, each layer's post-activations."""
        with ExitStack() as stack:
            if on_post is not None:
                for index, module in enumerate(self.projections):

                    def before(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> Any:
                        changed = on_post(index, args[0].reshape(*tokens.shape, -1))  # OPT's MLP flattens batch, pos
                        return None if changed is None else (changed.reshape(args[0].shape), *args[1:])

                    stack.callback(module.register_forward_pre_hook(before).remove)
            residual: Tensor = self.base(input_ids=tokens, use_cache=False).last_hidden_state
        return residual


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the plain model that a wrapped one contains; weights, buffers and hooks are shared, nothing is changed.

    Raises:
        ValueError: If a module computes something of its own that a copy would lose.
    """
    config = getattr(model, "config", None)
    fused: Any = None
    if config is not None:
        fused = copy.deepcopy(config)
        soft_cap = getattr(config, "attn_logit_softcapping", None)  # fused attention knows none
        if getattr(model, "_supports_sdpa", False) and not soft_cap:
            fused._attn_implementation = "sdpa"
    return _unwrapped(model, config, fused, {})


def _unwrapped(module: nn.Module, config: Any, fused: Any, done: dict[int, nn.Module]) -> nn.Module:
    inner = module
    while isinstance(getattr(inner, "original_component", None), nn.Module):
        inner = inner.original_component  # type: ignore[assignment]
    if id(inner) in done:
        return done[id(inner)]
    hook = hook_of(inner)
    # accelerate puts its own forward over the class's; anything else that stands there would be lost in a copy.
    own = vars(inner).get("forward") if hook is None else vars(inner).get("_old_forward")
    if own is not None and (hook is None or getattr(own, "__func__", None) is not type(inner).forward):
        raise ValueError(f"{type(inner).__name__} has a forward of its own")
    made = copy.copy(inner)
    for name in ("forward", "_old_forward", "_hf_hook"):
        vars(made).pop(name, None)
    if hook is not None:
        run_hooked(made, inner)
    done[id(inner)] = made
    made._modules = {
        name: child if child is None else _unwrapped(child, config, fused, done)
        for name, child in inner._modules.items()
    }
    if config is not None and getattr(inner, "config", None) is config:
        made.config = fused
    return made


def down_projections(model: nn.Module, d_mlp: int, d_model: int, n_layers: int) -> list[nn.Module]:
    """Return each layer's down projection: the module whose weight maps d_mlp to d_model, once a layer, in order.

    Raises:
        ValueError: If the layers cannot be told apart.
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) >= n_layers]
    for stack in stacks:
        found = [[m for m in layer.modules() if _maps(m, d_mlp, d_model)] for layer in stack]
        found = [candidates for candidates in found if candidates]
        if len(found) == n_layers and all(len(candidates) == 1 for candidates in found):
            return [candidates[0] for candidates in found]
    raise ValueError(
        f"no list of {n_layers} layers with one projection {d_mlp} -> {d_model} each in {type(model).__name__}; "
        "give the plain Hugging Face model that was measured"
    )


def _maps(module: nn.Module, d_in: int, d_out: int) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or any(True for _ in module.children()):
        return False
    transposed = type(module).__name__ == "Conv1D"
    return tuple(weight.shape) == ((d_in, d_out) if transposed else (d_out, d_in))


def output_rows(module: nn.Module) -> Float[Tensor, "neuron d_model"]:
    """Return a down projection's weights in float32, one row a neuron, also where they wait on disk."""
    with materialised(module):
        weight: Tensor = module.weight.detach()  # type: ignore[assignment, union-attr, operator]
    return (weight if type(module).__name__ == "Conv1D" else weight.t()).float()


def fingerprint(model: nn.Module, projections: Sequence[nn.Module]) -> str:
    """Return the fingerprint of a plain Hugging Face model, the one that `attach` finds for it in a TransformerBridge.

    Args:
        model: Causal language model of transformers.
        projections: Its down projections, in order.

    Raises:
        ValueError: If they are not in blocks of one list.
    """
    wanted = {id(module) for module in projections}
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        blocks = [block for block in stack if any(id(module) in wanted for module in block.modules())]
        if len(blocks) == len(projections):
            facts = WeightFacts()
            for module, block in zip(projections, blocks, strict=True):
                with materialised(block):
                    facts.add(output_rows(module), block)
            facts.add_rest(model)
            return facts.fingerprint
    raise ValueError(f"no list of {len(projections)} blocks with one down projection each in {type(model).__name__}")


def relative_error(rebuilt: Tensor, output: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of either; infinite if their sizes differ."""
    if output.numel() != rebuilt.numel():
        return float("inf")
    scale = max(float(output.abs().max()), float(rebuilt.abs().max()), 1e-30)
    return float((rebuilt - output.reshape(rebuilt.shape)).abs().max()) / scale


def refuse_dropout(model: Any) -> None:
    """Refuse a model that drops activations at random: measured twice, it would give two numbers.

    Modules of transformers keep the share to drop in a `Dropout`, or as a number that they give to the function.

    Raises:
        ModelError: If a module that drops a share > 0 is in training mode.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module.training and any(
            isinstance(value, float) and value > 0
            for key, value in vars(module).items()
            if "drop" in key or (key == "p" and "Dropout" in type(module).__name__)
        ):
            raise ModelError(f"the model is in training mode and {name} drops activations at random; call model.eval()")
