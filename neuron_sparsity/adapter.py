"""Everything that knows TransformerLens: load a model, check its MLPs, run it with a function on the post-activations.

HookedTransformer (TransformerLens 2.16 to 3.x) and TransformerBridge (3.x and 4.x, plain and compatibility mode) are
used through what they share: `blocks`, `hooks()`, `unembed`, `cfg`. `attach` proves on one batch, layer by layer,
that `hook_post` is what enters the down projection, and refuses the model otherwise: a number measured on the wrong
tensor is worse than none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import placement
from neuron_sparsity.errors import ModelError
from neuron_sparsity.model_info import ModelInfo, WeightFacts, computed
from neuron_sparsity.plain import PlainBody, refuse_dropout, relative_error
from neuron_sparsity.typed import said
from neuron_sparsity.weights import BUILTIN_MODELS, first_line, load_weights

__all__ = ["BUILTIN_MODELS", "MLPAdapter", "ModelInfo", "attach", "checkpoint_steps", "load_model"]

PostHook = Callable[[int, Tensor], "Tensor | None"]
"""`f(layer, z)`: called with each layer's post-activations [batch, pos, d_mlp]; a returned tensor replaces them."""

# The adapter that is being checked in this context, if any: its probes pass the hooks of other adapters unchanged and
# uncounted, so that `perplexity(model, ...)` inside `sparsify(model, ...)` counts its own tokens only.
_PROBING: ContextVar[MLPAdapter | None] = ContextVar("probing", default=None)

# Largest error of `z @ W_out + b_out` against the MLP's own output, relative to the output's largest entry.
_REBUILD_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PLAIN_PROBE = 64  # positions, in each of two windows: enough for an attention that differs to show


class MLPAdapter:
    """A model whose MLP neurons can be measured. Made by `attach`; holds no state of a run.

    Attributes:
        model: The TransformerLens model itself, unchanged.
        info: What is measured.
        plain: The Hugging Face model inside a bridge, run instead of it where nothing hangs on the bridge's hooks and
            both were proved equal on one batch; else None.
        forward: What runs in a pass without hooks of yours, and why: part of every result's provenance.
        chunked_logits: Whether `unembed` on pieces of the residual stream gives the model's own logits (proved on
            one batch). Where it does not, losses take the whole model's logits, one window at a time.
    """

    def __init__(self, model: Any, name: str | None = None, *, plain: bool = True) -> None:
        self.model = model
        self.plain: PlainBody | None = None  # until it is proved
        self.layers = _mlp_layers(model)
        probing = _PROBING.set(self)
        try:
            with torch.no_grad():
                facts, lowest = _check_layers(self)
                self.w_norms = facts.norms
                self.chunked_logits = _logits_agree(self)
                self.plain, self.forward = _plain_body(self, *facts.shape) if plain else (None, type(model).__name__)
        finally:
            _PROBING.reset(probing)
        self.info = ModelInfo.of(model, facts, name=name, version=_version(), layers=self.layers, lowest=lowest)

    @property
    def device(self) -> torch.device:
        """Device that takes the tokens."""
        return placement.device_of(self.model.embed)

    @property
    def devices(self) -> list[torch.device]:
        """Devices that the model runs on: those of the tokens, of the measured layers and of the logits."""
        found = [self.device, *(norm.device for norm in self.w_norms), placement.device_of(self.model.unembed)]
        return list(dict.fromkeys(found))

    @property
    def offloaded(self) -> bool:
        """Whether weights are away, in CPU memory or on disk, until their layer runs."""
        return placement.is_offloaded(getattr(self.model, "original_model", self.model))

    @property
    def runs_plain(self) -> bool:
        """Whether a pass now would run the Hugging Face model inside a bridge."""
        return self.plain is not None and not self.model.training and not _hooked(self.model)

    def w_out(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        """Return the output weights of measured layer `layer`, one row a neuron, on the layer's own device.

        Where they are offloaded, every call reads them anew.
        """
        return _w_out(self.model, self.layers[layer])

    def b_out(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Return the output bias of measured layer `layer`, or None."""
        return placement.output_bias(self.model.blocks[self.layers[layer]].mlp)

    @contextmanager
    def hooked(self, on_post: PostHook | None) -> Iterator[None]:
        """Call `on_post` at every measured layer while the context is open; no hook is left behind."""
        if on_post is None:
            yield
            return
        hooks = []
        for layer, block in enumerate(self.layers):

            def at_post(value: Tensor, hook: Any, layer: int = layer) -> Tensor | None:
                return on_post(layer, value) if _PROBING.get() in (None, self) else None

            hooks.append((f"blocks.{block}.mlp.hook_post", at_post))
        with self.model.hooks(fwd_hooks=hooks):
            yield

    def final_residual(
        self, tokens: Int[Tensor, "batch pos"], on_post: PostHook | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the model on `tokens` up to what enters the unembedding, and return that, on the unembedding's device.

        The unembedding itself sees one position only, so a pass for statistics does not pay for logits.
        """
        if self.plain is not None and self.runs_plain:
            residual = self.plain(tokens.to(self.device), on_post)
        else:
            residual = self._wrapped_residual(tokens, on_post)
        return residual.to(placement.device_of(self.model.unembed))

    def _wrapped_residual(self, tokens: Tensor, on_post: PostHook | None) -> Tensor:
        """`final_residual` by the TransformerLens model itself."""
        caught: list[Tensor] = []

        def keep_one_position(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, :1], *args[1:])

        handle = self.model.unembed.register_forward_pre_hook(keep_one_position)
        try:
            with self.hooked(on_post):
                self.model(tokens.to(self.device), return_type="logits")
        finally:
            handle.remove()
        return caught[0]

    @contextmanager
    def unembedding(self) -> Iterator[None]:
        """Keep the unembedding's weights where they are used while the context is open: `logits` loads nothing."""
        with placement.materialised(self.model.unembed):
            yield

    def logits(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Return the logits of rows of `final_residual`, in float32."""
        logits = self.model.unembed(residual[None] if residual.dim() == 2 else residual)
        logits = logits[0] if residual.dim() == 2 else logits
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None) or 0.0
        logits = logits.float()
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


def attach(model: Any, *, name: str | None = None, plain: bool = True) -> MLPAdapter:
    """Return an adapter to a model's MLP neurons, after proving that they are what they seem.

    On one batch and for every layer: the post-activation is as wide as `W_out` has rows, and `z @ W_out + b_out`
    rebuilds the MLP's own output.

    Args:
        model: HookedTransformer, TransformerBridge, or an adapter (returned as it is, if `plain` is as it is).
        name: Name to record; the model's own if None.
        plain: Whether the Hugging Face model inside a bridge may run instead of it, where it is proved to give the
            same numbers to rounding: faster.

    Returns:
        The adapter. The model is not changed and keeps its own hooks.

    Raises:
        TypeError: If `model` is no TransformerLens model.
        ModelError: If it has no MLP, is a mixture of experts, lacks the hook, a layer's output cannot be rebuilt, or
            dropout is on (training mode).
    """
    if isinstance(model, MLPAdapter):
        refuse_dropout(model.model)
        return model if plain or model.plain is None else MLPAdapter(model.model, model.info.name, plain=False)
    if not (hasattr(model, "blocks") and hasattr(model, "hooks") and hasattr(model, "cfg")):
        boot = "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=...)"
        mend = "ns.load_model(name)" if isinstance(model, str | Path) else boot
        raise TypeError(f"model must be a HookedTransformer or TransformerBridge, got {said(model)}; {mend} makes one")
    refuse_dropout(model)
    return MLPAdapter(model, name, plain=plain)


def load_model(
    model: Any,
    *,
    device: str | torch.device | placement.DeviceMap | None = None,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Return a TransformerLens model that is ready to be measured.

    Args:
        model: A built-in name (`smollm2-135m`, `demo-relu`, `demo-silu`), a Hugging Face name or `NAME@REVISION`, a
            local folder in HF format, a `.gguf` file, or a HookedTransformer or TransformerBridge, which is checked and
            returned.
        device: Such as `"cuda"`; the first GPU if there is one, else the CPU, if None. `"auto"`, or a Hugging Face
            `device_map` of your own, spreads the layers over GPUs, CPU memory and disk (docs/scale.md).
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, or torch's own.
        trust_remote_code: Whether code that comes with the weights may run. Off unless you say so.

    Returns:
        TransformerBridge on TransformerLens 3 and 4, HookedTransformer on 2, in eval mode. `attach` has accepted it.

    Raises:
        ModelError: If it cannot be found or loaded, or has no MLP neurons to measure.
        ValueError: If `dtype` is none of the three.
    """
    if not isinstance(model, str | Path):
        return attach(model).model
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    name = str(model)
    folder, hf_model, tokenizer = load_weights(
        name, dtype=getattr(torch, dtype), device=device, trust_remote_code=trust_remote_code
    )
    booted = _boot(name, folder, hf_model, tokenizer, dtype)
    booted.cfg.model_name = name
    adapter = attach(booted, name=name, plain=False)  # refuses what cannot be measured; whoever measures attaches again
    if adapter.offloaded:
        booted.cfg.device = str(adapter.device)  # TransformerLens takes it from weights that are on the meta device
    return booted


def _boot(name: str, folder: str, hf_model: Any, tokenizer: Any, dtype: str) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        from transformer_lens import HookedTransformer

        try:
            return HookedTransformer.from_pretrained(
                name.partition("@")[0], hf_model=hf_model, tokenizer=tokenizer, dtype=dtype, device=str(hf_model.device)
            ).eval()
        except Exception as error:
            raise ModelError(
                f"TransformerLens {_version()} cannot take {name!r}: {first_line(error)}; "
                "`pip install -U transformer_lens` (3 and later take any Hugging Face model)"
            ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with placement.untold(hf_model):
                return TransformerBridge.boot_transformers(folder, hf_model=hf_model, tokenizer=tokenizer).eval()
        except Exception as error:
            raise ModelError(f"TransformerLens {_version()} cannot take {name!r}: {first_line(error)}") from error


def checkpoint_steps(name: str) -> list[int]:
    """Return the training steps of which TransformerLens knows a model's checkpoints to be published.

    Raises:
        ModelError: If it knows none.
    """
    try:
        from transformer_lens.tools.model_registry.checkpoints import get_checkpoint_labels
    except ImportError:
        from transformer_lens.loading_from_pretrained import get_checkpoint_labels
    try:
        return list(get_checkpoint_labels(name)[0])
    except ValueError as error:
        raise ModelError(f"TransformerLens {_version()} knows no checkpoints of {name!r}: {error}") from error


def _version() -> str:
    return metadata.version("transformer_lens")


def _mlp_layers(model: Any) -> list[int]:
    """Return the indices of the blocks that have an MLP; refuse mixtures of experts and attention-only models."""
    blocks = [index for index, block in enumerate(model.blocks) if hasattr(block, "mlp")]
    if not blocks or getattr(model.cfg, "attn_only", False):
        raise ModelError("the model has no MLP neurons (attention-only?); measure a model with MLP layers")
    for block in blocks:
        mlp = model.blocks[block].mlp
        kind = type(mlp).__name__
        if "moe" in kind.lower() or hasattr(mlp, "experts"):
            raise ModelError(
                f"layer {block} is a mixture of experts ({kind}), whose neurons share no one W_out; "
                "measure a model with dense MLPs"
            )
        if f"blocks.{block}.mlp.hook_post" not in model.hook_dict:
            raise ModelError(
                f"layer {block} has no hook blocks.{block}.mlp.hook_post in TransformerLens {_version()}; "
                "a newer TransformerLens may have it"
            )
    widths = {
        shape for block in blocks if (shape := placement.output_shape(model.blocks[block].mlp, block)) is not None
    }
    if len(widths) > 1:
        raise _differ(widths)
    return blocks


def _differ(widths: set[tuple[int, ...]]) -> ModelError:
    return ModelError(f"layers differ in width ({sorted(widths)}); only models of one d_mlp can be measured")


def _w_out(model: Any, block: int) -> Float[Tensor, "neuron d_model"]:
    return placement.output_weight(model.blocks[block].mlp, block)


def _probe_tokens(model: Any, n_pos: int = 8) -> Int[Tensor, "batch pos"]:
    vocab = int(model.cfg.d_vocab)
    n_pos = max(2, min(n_pos, int(model.cfg.n_ctx)))
    return (torch.arange(n_pos) * 7 + 5).remainder(vocab)[None]


def _check_layers(adapter: MLPAdapter) -> tuple[WeightFacts, float]:
    """Rebuild every MLP's output from its post-activations on one batch.

    Returns what is kept of the weights, and the smallest post-activation.
    """
    posts: dict[int, Tensor] = {}
    outputs: dict[int, list[Tensor]] = {}
    handles = []
    for layer, block in enumerate(adapter.layers):

        def catch(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            outputs.setdefault(layer, []).append((output[0] if isinstance(output, tuple) else output).detach())

        # BLOOM's MLP adds the residual stream to its output: there only the down projection itself can tell.
        mlp = adapter.model.blocks[block].mlp
        handles += [module.register_forward_hook(catch) for module in (mlp, getattr(mlp, "out", None)) if module]
    try:
        adapter.final_residual(_probe_tokens(adapter.model), lambda layer, z: posts.update({layer: z.detach()}))
    except Exception as error:  # meta tensors make a model raise anything
        if isinstance(error, ModelError) or not adapter.offloaded:
            raise
        raise ModelError(
            f"TransformerLens {_version()} cannot run a model whose weights are away until their layer runs "
            f"({first_line(error)}); 4.3 can, or load the model on one device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    facts = WeightFacts(exact=not computed(adapter.model))
    for layer, block in enumerate(adapter.layers):
        with placement.materialised(adapter.model.blocks[block]):
            _check_layer(adapter, layer, facts, posts.get(layer), outputs.get(layer, []))
    facts.add_rest(getattr(adapter.model, "original_model", adapter.model))
    return facts, min(float(z.min()) for z in posts.values())


def _check_layer(adapter: MLPAdapter, layer: int, facts: WeightFacts, z: Tensor | None, outputs: list[Tensor]) -> None:
    block = adapter.layers[layer]
    if z is None or not outputs:
        raise ModelError(f"layer {block}: blocks.{block}.mlp.hook_post did not fire, so its neurons cannot be measured")
    w_out, b_out = adapter.w_out(layer), adapter.b_out(layer)
    if z.shape[-1] != w_out.shape[0]:
        raise ModelError(
            f"layer {block}: hook_post is {z.shape[-1]} wide but W_out has {w_out.shape[0]} rows, "
            "so it is not what enters the down projection (a mixture of experts?)"
        )
    if facts.norms and facts.shape != w_out.shape:
        raise _differ({facts.shape, tuple(w_out.shape)})
    facts.add(w_out, adapter.model.blocks[block])
    if not torch.isfinite(z).all() or not torch.isfinite(facts.norms[-1]).all():
        raise ModelError(f"layer {block}: weights or post-activations are NaN or infinite; load intact weights")
    rebuilt = z.float() @ w_out.float()
    rebuilt = rebuilt if b_out is None else rebuilt + b_out.float()
    error = min(relative_error(rebuilt, output.float()) for output in outputs)
    if not error <= _REBUILD_TOLERANCE.get(z.dtype, 1e-4):
        hooked = _hooked(adapter.model)
        raise ModelError(
            f"layer {block}: z @ W_out + b_out misses the MLP's output by {error:.1e} of its size, "
            "so hook_post is not what enters the down projection"
            + ("; the model has hooks of yours: attach(model) before you add them" if hooked else "")
        )


def _hooked(model: Any) -> bool:
    """Whether hooks hang on the model: it is measured with them."""
    return any(not handle.is_permanent for point in model.hook_dict.values() for handle in point.fwd_hooks)


def _plain_body(adapter: MLPAdapter, n_neuron: int, d_model: int) -> tuple[PlainBody | None, str]:
    """Return the Hugging Face model inside a bridge, if it gives the same numbers; and what runs, with the reason."""
    name, inner = type(adapter.model).__name__, getattr(adapter.model, "original_model", None)
    if inner is None:
        return None, name
    try:
        body = PlainBody(inner, len(adapter.layers), n_neuron, d_model)
    except (ValueError, AttributeError, TypeError) as error:
        return None, f"{name} ({first_line(error)})"
    tokens = _probe_tokens(adapter.model, _PLAIN_PROBE)
    tokens = torch.cat((tokens, tokens.flip(1))).to(adapter.device)
    posts: list[dict[int, Tensor]] = [{}, {}]
    expected = adapter._wrapped_residual(tokens, lambda layer, z: posts[0].update({layer: z.clone()}))
    try:
        found = body(tokens, lambda layer, z: posts[1].update({layer: z.clone()}))
    except Exception as error:  # whatever a foreign model raises: the bridge runs it
        return None, f"{name} ({type(error).__name__} in the plain model: {first_line(error)})"
    tolerance = _REBUILD_TOLERANCE.get(expected.dtype, 1e-4)
    pairs = [(found, expected), *((posts[1].get(layer), z) for layer, z in posts[0].items())]
    if any(ours is None or not relative_error(ours.float(), theirs.float()) <= tolerance for ours, theirs in pairs):
        return None, f"{name} (its plain Hugging Face model gives other numbers)"
    return body, f"Hugging Face {type(inner).__name__} inside {name}, {body.attention} attention"


def _logits_agree(adapter: MLPAdapter) -> bool:
    tokens = _probe_tokens(adapter.model)
    full = adapter.model(tokens.to(adapter.device), return_type="logits").float()
    pieces = adapter.logits(adapter.final_residual(tokens))
    scale = float(full.abs().max().clamp_min(1e-30))
    tolerance = _REBUILD_TOLERANCE.get(adapter.model.cfg.dtype, 1e-4)
    return full.shape == pieces.shape and float((full - pieces.to(full.device)).abs().max()) <= tolerance * scale
