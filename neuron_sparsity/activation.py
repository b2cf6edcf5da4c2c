"""The activation function's own output `s`, beside the post-activation `z` that a hook sees.

For a gated MLP `z = act(gate) * up` and `s = act(gate)`; for a plain one `s = z = act(in)`. FAT, Top-k and Top-p are
defined on `|s|` in the literature on ReLU models; on a gated MLP the two differ by the factor `up`.

`s` is made from what enters the activation function (`hook_pre`) by the model's own function, and `s * up = z` (`s = z`
for a plain MLP) is proved on one batch, layer by layer. Where it does not hold, as in SoLU with LayerNorm, whose `z` is
the LayerNorm of `s`, the model is refused: rules on contributions, which need `z` alone, still run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuron_sparsity.adapter import _REBUILD_TOLERANCE, MLPAdapter, _probe_tokens, attach
from neuron_sparsity.errors import ModelError
from neuron_sparsity.plain import relative_error

__all__ = ["ActivationReader"]

_PRE, _UP = "hook_pre", "hook_pre_linear"
_PART = {_PRE: "gate", _UP: "in"}  # the projection of a gated MLP that each hook is the output of
_INSTEAD = "use rules on contributions (cett, fat:c, quantile:c, topk:c, topp:c), which need z alone"

Catch = Callable[[int, Tensor], None]


class ActivationReader:
    """Gives `s` of every layer while a model runs: `of(layer, z)` inside `reading()`, where z is what `on_post` sees.

    Args:
        adapter: The model.

    Attributes:
        adapter: What must run for it: the one given, or the same model without its plain body, where that body's
            gate cannot be told.
        is_z: Whether `s` is `z`, so that nothing need be read.
        source: How `s` is had, in words: part of a result's provenance.

    Raises:
        ModelError: If `s` cannot be had or cannot be proved, naming the layer.
    """

    def __init__(self, adapter: MLPAdapter) -> None:
        self.is_z = not adapter.info.gated
        self.source = "s = z, the activation function's output" if self.is_z else "s = act(hook_pre), z = s * up"
        self._functions = [_function(adapter, block) for block in adapter.layers]
        self._projections: dict[str, list[nn.Module]] = {}
        self._pre: dict[int, Tensor] = {}
        witness = adapter  # only the bridge has hooks before the activation function of a plain MLP
        if adapter.plain is not None and self.is_z:
            witness = attach(adapter, plain=False)
        elif adapter.plain is not None:
            found = {hook: _plain_projections(adapter, part) for hook, part in _PART.items()}
            self._projections = {hook: modules for hook, modules in found.items() if modules}
            if len(self._projections) < len(_PART):
                adapter = witness = attach(adapter, plain=False)
        self.adapter = adapter
        with torch.no_grad():
            self._prove(witness)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what enters each activation function while the context is open; nothing is left behind."""
        if self.is_z:
            yield
            return
        try:
            with self._catching(self.adapter, {_PRE: self._pre.__setitem__}):
                yield
        finally:
            self._pre.clear()

    def of(self, layer: int, z: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
        """Return `s` of the batch whose post-activations are `z`; once a batch, inside `reading()`.

        Raises:
            RuntimeError: Outside `reading()`.
        """
        if self.is_z:
            return z
        if layer not in self._pre:
            raise RuntimeError("s is read while the model runs: call it inside `with reader.reading():`")
        s: Tensor = self._functions[layer](self._pre.pop(layer))
        return s.reshape(z.shape)

    @contextmanager
    def _catching(self, adapter: MLPAdapter, wanted: dict[str, Catch]) -> Iterator[None]:
        """Hand over the output of the named hooks of every layer, from whichever body runs."""
        with ExitStack() as stack:
            if adapter.runs_plain and self._projections:
                for hook, catch in wanted.items():
                    for layer, module in enumerate(self._projections[hook]):

                        def after(
                            m: nn.Module, args: Any, out: Tensor, layer: int = layer, catch: Catch = catch
                        ) -> None:
                            catch(layer, out)

                        stack.callback(module.register_forward_hook(after).remove)
            else:
                hooks = []
                for hook, catch in wanted.items():
                    for layer, block in enumerate(adapter.layers):

                        def at(value: Tensor, hook: Any, layer: int = layer, catch: Catch = catch) -> None:
                            catch(layer, value)

                        hooks.append((f"blocks.{block}.mlp.{hook}", at))
                stack.enter_context(adapter.model.hooks(fwd_hooks=hooks))
            yield

    def _prove(self, adapter: MLPAdapter) -> None:
        """Check `act(pre) * up = z`, or `act(pre) = z`, in every layer on one batch."""
        needed = (_PRE,) if self.is_z else (_PRE, _UP)
        for block in adapter.layers:
            for hook in needed:
                if f"blocks.{block}.mlp.{hook}" not in adapter.model.hook_dict:
                    raise ModelError(
                        f"layer {block} has no hook blocks.{block}.mlp.{hook}, so the activation function's own output "
                        f"cannot be had; {_INSTEAD}"
                    )
        seen: dict[str, dict[int, Tensor]] = {hook: {} for hook in needed}
        posts: dict[int, Tensor] = {}
        with self._catching(adapter, {hook: seen[hook].__setitem__ for hook in needed}):
            adapter.final_residual(_probe_tokens(adapter.model), lambda layer, z: posts.update({layer: z.clone()}))
        for layer, block in enumerate(adapter.layers):
            if any(layer not in found for found in (*seen.values(), posts)):
                raise ModelError(
                    f"layer {block}: the hooks around the activation function did not fire, so its own output cannot "
                    f"be had; {_INSTEAD}"
                )
            z = posts[layer]
            rebuilt = self._functions[layer](seen[_PRE][layer]).reshape(z.shape).float()
            if not self.is_z:
                rebuilt = rebuilt * seen[_UP][layer].reshape(z.shape).float() + _late_bias(adapter, block)
            error = relative_error(rebuilt, z.float())
            if not error <= _REBUILD_TOLERANCE.get(z.dtype, 1e-4):
                form = "act(hook_pre)" if self.is_z else "act(hook_pre) * up"
                raise ModelError(
                    f"layer {block}: {form} misses hook_post by {error:.1e} of its size ({adapter.info.activation}; "
                    "something, such as SoLU's LayerNorm, stands between), so the activation function's own output is "
                    f"not what enters W_out; {_INSTEAD}"
                )


def _function(adapter: MLPAdapter, block: int) -> Callable[[Tensor], Tensor]:
    """Return the model's own activation function of a block, or the one its name stands for."""
    mlp = adapter.model.blocks[block].mlp
    for holder in (mlp, getattr(mlp, "original_component", None)):
        for name in ("act_fn", "activation_fn", "act"):
            found = getattr(holder, name, None)
            if callable(found):
                return found  # type: ignore[no-any-return]
    from transformers.activations import ACT2FN

    if adapter.info.activation not in ACT2FN:
        raise ModelError(
            f"layer {block}: no activation function of the model is known ({adapter.info.activation!r}), so its own "
            f"output cannot be had; {_INSTEAD}"
        )
    return ACT2FN[adapter.info.activation]  # type: ignore[no-any-return]


def _plain_projections(adapter: MLPAdapter, part: str) -> list[nn.Module]:
    """Return the modules of the plain body that hold the weights of each layer's gate (or `in`); none if one lacks."""
    modules = [] if adapter.plain is None else list(adapter.plain.base.modules())
    by_weight = {id(weight): module for module in modules if (weight := _own_weight(module)) is not None}
    found = []
    for block in adapter.layers:
        wrapped = getattr(adapter.model.blocks[block].mlp, part, None)
        module = by_weight.get(id(_own_weight(getattr(wrapped, "original_component", None))))
        if module is None:
            return []
        found.append(module)
    return found


def _own_weight(module: Any) -> Any:
    return getattr(module, "_parameters", {}).get("weight")


def _late_bias(adapter: MLPAdapter, block: int) -> Tensor | float:
    """Return what HookedTransformer's gated MLP adds to `s * up`: its `b_in` (zero in every pretrained model)."""
    mlp = adapter.model.blocks[block].mlp
    bias = None if getattr(mlp, "in", None) is not None else getattr(mlp, "b_in", None)
    return 0.0 if bias is None else bias.float()
