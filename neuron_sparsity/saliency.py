"""What the loss says of every neuron: gradients, streamed, and what they predict of a removal.

Let `L` be the summed next-token loss and `g = dL/dz` the gradient at one token's post-activation `z`. To first order,
putting a constant `a` in the place of `z` changes the loss by `(a - z) g` on that token; the mean of its square is the
diagonal of the empirical Fisher information times the squared change, which stands for the second order.

1. A forward pass gives each neuron's mean, and its contribution beside the norm of the residual stream it is added to.
2. A second pass, forward and backward, gives `g`. The gradient at the end of the residual stream is put together a few
   hundred logits at a time, so that no [batch, pos, vocab] tensor exists, and goes back through the layers at once.
3. Per neuron float64 sums are kept, over all tokens of all windows: enough for any constant `a` (`fisher(a)`).

Weights need no gradient and get none. Nothing is left on the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, ModelInfo, PostHook
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.errors import MeasurementError, ModelError
from neuron_sparsity.perplexity import Progress, batches, default_batch_size, memory_advice
from neuron_sparsity.statistics import check_corpus
from neuron_sparsity.store import decode, make_folder, provenance, read_tensors, write_tensors
from neuron_sparsity.typed import checked

__all__ = ["NeuronSaliency", "SALIENCY_FILE", "loss_gradients", "measure_gradients", "saliency"]

SALIENCY_FILE = "saliency.safetensors"

_LOGIT_FLOATS = 1 << 21  # logits held at once: they, their exponentials and their gradient are 32 MiB of float32
_GRADIENT_SUMS = (
    "gradient_sum",
    "gradient_sq_sum",
    "product_sum",
    "product_abs_sum",
    "product_sq_sum",
    "product_gradient_sum",
    "centred_abs_sum",
)
_FORWARD_SUMS = ("activation_sum", "activation_sq_sum", "share_sum", "share_sq_sum")
_TENSORS = (*_FORWARD_SUMS, *_GRADIENT_SUMS, "w_l1")


@dataclass(frozen=True, eq=False)
class NeuronSaliency:
    """Sums over all tokens of a corpus, float64, of every neuron's post-activation `z` and its gradient `g`.

    Attributes:
        model: What was measured.
        corpus: On what (`Windows.describe`).
        n_tokens: Tokens seen: every position of every window.
        n_scored: Losses in `L`, the sum that `g` is the gradient of, in nats.
        activation_sum: Sum of `z`.
        activation_sq_sum: Sum of `z^2`.
        share_sum: Sum of the contribution `|z| ||W_out||` over the norm of the residual stream that the MLP adds to.
        share_sq_sum: Sum of its square.
        gradient_sum: Sum of `g`.
        gradient_sq_sum: Sum of `g^2`.
        product_sum: Sum of `z g`.
        product_abs_sum: Sum of `|z g|`.
        product_sq_sum: Sum of `(z g)^2`.
        product_gradient_sum: Sum of `z g^2`.
        centred_abs_sum: Sum of `|(z - mean z) g|`.
        w_l1: Sum of the absolute output weights of each neuron.
        cost: `forward_passes` and `backward_passes` over the corpus, `seconds`.
        provenance: Versions, seed, command.
    """

    model: ModelInfo
    corpus: dict[str, Any]
    n_tokens: int
    n_scored: int
    activation_sum: Float[Tensor, "layer neuron"]
    activation_sq_sum: Float[Tensor, "layer neuron"]
    share_sum: Float[Tensor, "layer neuron"]
    share_sq_sum: Float[Tensor, "layer neuron"]
    gradient_sum: Float[Tensor, "layer neuron"]
    gradient_sq_sum: Float[Tensor, "layer neuron"]
    product_sum: Float[Tensor, "layer neuron"]
    product_abs_sum: Float[Tensor, "layer neuron"]
    product_sq_sum: Float[Tensor, "layer neuron"]
    product_gradient_sum: Float[Tensor, "layer neuron"]
    centred_abs_sum: Float[Tensor, "layer neuron"]
    w_l1: Float[Tensor, "layer neuron"]
    cost: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_activation(self) -> Float[Tensor, "layer neuron"]:
        """Mean of `z`: what mean replacement puts in."""
        return self.activation_sum / self.n_tokens

    def predicted_rise(
        self, constant: Float[Tensor, "layer neuron"] | float = 0.0, *, order: Literal[1, 2] = 2
    ) -> Float[Tensor, "layer neuron"]:
        """Return the rise of the mean loss in nats, signed, if one neuron alone were `constant` on every token.

        First order is the gradient times the change. Second order adds half of `fisher`, which stands for the Hessian's
        diagonal, token by token (Theis et al. 2018, arXiv:1801.05787): what a change of one token's activation does to
        that of another is left out. How near it comes: docs/measured.md.
        """
        first = (torch.as_tensor(constant) * self.gradient_sum - self.product_sum) / self.n_scored
        return first if order == 1 else first + 0.5 * self.fisher(constant) * self.n_tokens / self.n_scored

    def fisher(self, constant: Float[Tensor, "layer neuron"] | float = 0.0) -> Float[Tensor, "layer neuron"]:
        """Return the mean over tokens of `((z - constant) g)^2`, exactly, from the sums.

        Zero replacement is the constant 0, mean replacement `mean_activation`. Pruning by it is Theis et al. 2018
        (arXiv:1801.05787); the diagonal of the empirical Fisher information.
        """
        a = torch.as_tensor(constant, dtype=torch.float64)
        total = self.product_sq_sum - 2 * a * self.product_gradient_sum + a**2 * self.gradient_sq_sum
        return total.clamp_min(0) / self.n_tokens  # a difference of sums may round to below 0

    def mean_square(self, constant: Float[Tensor, "layer neuron"] | float = 0.0) -> Float[Tensor, "layer neuron"]:
        """Return the mean over tokens of `(z - constant)^2`, from the sums."""
        a = torch.as_tensor(constant, dtype=torch.float64)
        return ((self.activation_sq_sum - 2 * a * self.activation_sum) / self.n_tokens + a**2).clamp_min(0)

    def save(self, folder: str | Path) -> None:
        """Write `saliency.safetensors` into a folder, which is made if it is not there.

        Raises:
            RunFolderError: If it cannot be written.
        """
        names = ("corpus", "n_tokens", "n_scored", "cost", "provenance")
        header = {"model": self.model.to_json()} | {name: getattr(self, name) for name in names}
        make_folder(Path(folder))
        write_tensors(Path(folder) / SALIENCY_FILE, {name: getattr(self, name) for name in _TENSORS}, header)

    @classmethod
    def load(cls, folder: str | Path) -> NeuronSaliency:
        """Read `saliency.safetensors` of a folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / SALIENCY_FILE
        tensors, header = read_tensors(path)
        return decode(path, lambda: _build(tensors, header))


def saliency(
    model: Any,
    windows: Windows,
    *,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> NeuronSaliency:
    """Return what the gradients of the loss say of every MLP neuron, from one forward and one forward-backward pass.

    Hooks that are on the model take part: inside `ablate` the gradients are those of the ablated model.

    Args:
        model: TransformerLens model or adapter; all its weights must be in memory.
        windows: The corpus. The loss is that of its scored positions.
        folder: Where the result is saved too.
        batch_size: Windows a pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The sums; `rank(saliency, by=...)` makes a ranking of them.

    Raises:
        MeasurementError: If gradients are NaN or infinite, or memory runs out.
        ModelError: If weights are offloaded, or the residual stream cannot be seen.
        RunFolderError: If `folder` cannot be written.
    """
    adapter, start = measurable(model, windows), time.perf_counter()
    if adapter.offloaded:
        raise ModelError("gradients need every weight in memory, and some are offloaded; load the model without 'auto'")
    if batch_size is None:
        batch_size = default_batch_size(adapter, windows.window, kept_layers=adapter.info.n_layers)
    forward = _forward_sums(adapter, windows, batch_size, progress)
    means = forward["activation_sum"] / windows.n_tokens
    backward = measure_gradients(adapter, windows, means, batch_size=batch_size, progress=progress)
    found = NeuronSaliency(
        model=adapter.info,
        corpus=windows.describe(),
        n_tokens=windows.n_tokens,
        n_scored=windows.n_scored,
        w_l1=torch.stack([adapter.w_out(layer).double().abs().sum(1).cpu() for layer in range(adapter.info.n_layers)]),
        cost={"forward_passes": 2.0, "backward_passes": 1.0, "seconds": time.perf_counter() - start},
        provenance=provenance(),
        **forward,
        **backward,
    )
    if folder is not None:
        found.save(folder)
    return found


def measure_gradients(
    adapter: MLPAdapter,
    windows: Windows,
    means: Float[Tensor, "layer neuron"],
    *,
    on_post: PostHook | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "gradients of the loss",
) -> dict[str, Float[Tensor, "layer neuron"]]:
    """Return the sums of NeuronSaliency that need gradients, by name.

    Args:
        adapter: The model.
        windows: The corpus.
        means: What `centred_abs_sum` is centred on.
        on_post: Called with each layer's post-activations; what it returns replaces them, and is what `z` is then.
        batch_size: Windows a pass; chosen from free memory if None.
        progress: Called after each batch.
        label: What the progress says.

    Raises:
        MeasurementError: If gradients are NaN or infinite, or memory runs out.
    """
    if batch_size is None:
        batch_size = default_batch_size(adapter, windows.window, kept_layers=adapter.info.n_layers)
    if not adapter.chunked_logits:
        batch_size = min(batch_size, 1)
    sums = _Sums(adapter, _GRADIENT_SUMS)
    centres = [mean.to(norm) for mean, norm in zip(means, adapter.w_norms, strict=True)]
    for start, tokens in batches(windows, batch_size, progress, label):
        scored = windows.scored[start : start + len(tokens)]
        with memory_advice(batch_size, windows.window):
            pairs = loss_gradients(adapter, tokens, scored, on_post)
            for layer, (z, g) in enumerate(pairs):
                _add_gradients(sums, layer, z.flatten(0, 1).float(), g.flatten(0, 1).float(), centres[layer])
        sums.check("gradients", start, len(tokens))
    return sums.stacked()


def loss_gradients(
    adapter: MLPAdapter,
    tokens: Int[Tensor, "batch pos"],
    scored: Bool[Tensor, "batch pos"],
    on_post: PostHook | None = None,
) -> list[tuple[Float[Tensor, "batch pos neuron"], Float[Tensor, "batch pos neuron"]]]:
    """Return (z, dL/dz) of every measured layer, `L` the sum of the scored next-token losses of one batch, in nats.

    Args:
        adapter: The model.
        tokens: Token ids.
        scored: True where the token's own loss counts.
        on_post: As for `MLPAdapter.final_residual`.
    """
    posts: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor) -> Tensor:
        changed = on_post(layer, z) if on_post is not None else None
        z = z if changed is None else changed
        posts[layer] = z if z.requires_grad else z.detach().requires_grad_()  # the first layer begins the graph
        return posts[layer]

    with _frozen(adapter.model), torch.inference_mode(False), torch.enable_grad():
        if adapter.chunked_logits:
            end = adapter.final_residual(tokens, keep)
            slope = _slope_at_the_end(adapter, end.detach(), tokens, scored)
        else:
            with adapter.hooked(keep):
                logits = adapter.model(tokens.to(adapter.device), return_type="logits").float()
            end, slope = _loss_sum(logits[:, :-1], tokens[:, 1:], scored[:, 1:]), None
        layers = [posts[layer] for layer in range(adapter.info.n_layers)]
        gradients = torch.autograd.grad(end, layers, slope, allow_unused=True, materialize_grads=True)
    return [(z.detach(), g) for z, g in zip(layers, gradients, strict=True)]


def _slope_at_the_end(
    adapter: MLPAdapter,
    residual: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    scored: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Return the gradient of the summed loss at what enters the unembedding, by a few hundred logits at a time."""
    slope = torch.zeros_like(residual)
    mask = scored[:, 1:]
    where, position = mask.nonzero(as_tuple=True)
    target = tokens[:, 1:][mask]
    step = max(16, _LOGIT_FLOATS // int(adapter.model.cfg.d_vocab))
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        rows = where[part].to(residual.device), position[part].to(residual.device)
        hidden = residual[rows].requires_grad_()
        logits = adapter.logits(hidden)
        loss = torch.nn.functional.cross_entropy(logits, target[part].to(logits.device), reduction="sum")
        (slope[rows],) = torch.autograd.grad(loss, hidden)
    return slope


def _loss_sum(logits: Tensor, target: Tensor, mask: Tensor) -> Float[Tensor, ""]:
    rows, wanted = logits[mask.to(logits.device)], target[mask].to(logits.device)
    return torch.nn.functional.cross_entropy(rows, wanted, reduction="sum")


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Let no weight ask for a gradient while the context is open: the graph is of activations alone."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _forward_sums(
    adapter: MLPAdapter, windows: Windows, batch_size: int, progress: Progress | None
) -> dict[str, Float[Tensor, "layer neuron"]]:
    """Pass without gradients: moments of z, and contributions beside the residual stream."""
    sums = _Sums(adapter, _FORWARD_SUMS)
    norms: dict[int, Tensor] = {}

    def on_post(layer: int, z: Tensor) -> None:
        rows = z.detach().flatten(0, 1).float()
        stream = norms[layer].flatten()[:, None]
        share = torch.where(stream > 0, rows.abs() * adapter.w_norms[layer] / stream, 0.0)
        for name, value in zip(_FORWARD_SUMS, (rows, rows**2, share, share**2), strict=True):
            sums.add(name, layer, value)

    def at_residual(layer: int) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            norms[layer] = value.detach().float().norm(dim=-1)

        return hook

    hooks = [(_residual_name(adapter, block), at_residual(layer)) for layer, block in enumerate(adapter.layers)]
    with torch.no_grad(), adapter.model.hooks(fwd_hooks=hooks):
        for start, tokens in batches(windows, batch_size, progress, "contributions to the residual stream"):
            with memory_advice(batch_size, windows.window):
                adapter.final_residual(tokens, on_post)
            sums.check("post-activations", start, len(tokens))
    return sums.stacked()


def _residual_name(adapter: MLPAdapter, block: int) -> str:
    """Name of the hook on the stream that the MLP adds to: of the block's input where MLP and attention run abreast."""
    for point in ("hook_resid_mid", "hook_resid_pre"):
        if f"blocks.{block}.{point}" in adapter.model.hook_dict:
            return f"blocks.{block}.{point}"
    raise ModelError(f"layer {block} has no hook on its residual stream; a newer TransformerLens may have it")


def _add_gradients(sums: _Sums, layer: int, z: Tensor, g: Tensor, mean: Tensor) -> None:
    product = z * g
    sums.add("gradient_sum", layer, g)
    sums.add("gradient_sq_sum", layer, g**2)
    sums.add("product_sum", layer, product)
    sums.add("product_abs_sum", layer, product.abs())
    sums.add("product_sq_sum", layer, product**2)
    sums.add("product_gradient_sum", layer, product * g)
    sums.add("centred_abs_sum", layer, ((z - mean) * g).abs())


class _Sums:
    """Float64 sums over tokens, one tensor a layer on the layer's own device."""

    def __init__(self, adapter: MLPAdapter, names: tuple[str, ...]) -> None:
        self.layers = adapter.info.layers
        self.values = {
            name: [torch.zeros_like(norm, dtype=torch.float64) for norm in adapter.w_norms] for name in names
        }

    def add(self, name: str, layer: int, rows: Float[Tensor, "token neuron"]) -> None:
        """Add one batch."""
        self.values[name][layer] += rows.sum(dim=0, dtype=torch.float64)

    def check(self, what: str, start: int, n_windows: int) -> None:
        """Refuse numbers that are none, as soon as they come."""
        for tensors in self.values.values():
            for block, tensor in zip(self.layers, tensors, strict=True):
                if not torch.isfinite(tensor.sum()):
                    raise MeasurementError(
                        f"layer {block}: {what} are NaN or infinite in windows {start} to {start + n_windows - 1}; "
                        "check the weights, or use --dtype float32"
                    )

    def stacked(self) -> dict[str, Float[Tensor, "layer neuron"]]:
        """Return them on the CPU."""
        return {name: torch.stack([tensor.cpu() for tensor in tensors]) for name, tensors in self.values.items()}


def _build(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> NeuronSaliency:
    found: NeuronSaliency = checked(
        NeuronSaliency(
            model=ModelInfo.from_json(header["model"]),
            corpus=dict(header["corpus"]),
            n_tokens=int(header["n_tokens"]),
            n_scored=int(header["n_scored"]),
            cost=dict(header["cost"]),
            provenance=dict(header["provenance"]),
            **{name: tensors[name] for name in _TENSORS},
        )
    )
    shape = [found.model.n_layers, found.model.d_mlp]
    if found.n_tokens < 1 or found.n_scored < 1 or len(found.model.layers) != found.model.n_layers:
        raise ValueError(f"{found.n_tokens} tokens, {found.n_scored} scored, layers {found.model.layers[:3]}")
    check_corpus(found.corpus)
    for name in _TENSORS:
        tensor = getattr(found, name)
        if tensor.dtype != torch.float64 or list(tensor.shape) != shape or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not finite float64 {shape}")
    return found
