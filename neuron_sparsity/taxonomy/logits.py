"""What a neuron's output row does to the logits, directly: through the final norm and the unembedding alone.

The final norm maps the residual stream `h` to `gamma * (h - mean(h)) / s(h) + beta` (LayerNorm; RMSNorm has no mean).
Its scale `1 / s(h)` is one positive number a token; the rest is linear and is folded into the row:

    effect = (gamma * (w_out - mean(w_out))) @ W_U        [vocab]

in logits for a unit of activation, before division by `s(h)`.

Logits that are capped or scaled afterwards are taken before that. `gamma` is read off the model's own final norm, and
that it is this norm, and that its output is what enters the unembedding, is proved on one batch; a model for which it
is not is refused.

The moments of the effect over the vocabulary tell roles (Gurnee et al. 2024, arXiv:2401.12181): a neuron that raises
a few tokens (prediction: high kurtosis, skewed to the right), lowers a few (suppression: to the left), or moves large
parts of the vocabulary against each other (partition: high variance without high kurtosis). Where "high" begins is ours
to choose, and is part of the result. A table of neurons by vocabulary never exists: effects are made for a few neurons
at a time and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from neuron_sparsity import placement
from neuron_sparsity.adapter import _REBUILD_TOLERANCE, MLPAdapter, _probe_tokens, attach
from neuron_sparsity.errors import ModelError
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.plain import relative_error

__all__ = ["LogitEffects", "RoleRule", "logit_effects"]

_EFFECT_FLOATS = 1 << 23  # effects held at once: 32 MiB of float32
_PROBES = 32  # rows sent through the final norm: each output feature is read off the largest of as many inputs
_INSTEAD = "logits=False (--no-logits) leaves these columns out"


@dataclass(frozen=True)
class RoleRule:
    """What makes a role.

    Args:
        kurtosis: Excess kurtosis (0 for a normal distribution) from which on an effect is on few tokens.
        spread: Standard deviation of the effect of a unit output row, over its median in the model, from which on
            an effect without that kurtosis is a partition.

    Raises:
        ValueError: If one is not positive.
    """

    kurtosis: float = 10.0
    spread: float = 2.0

    def __post_init__(self) -> None:
        if not (self.kurtosis > 0 and self.spread > 0):
            raise ValueError(f"kurtosis and spread must be > 0, got {self.kurtosis} and {self.spread}")

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            f"prediction: excess kurtosis of the effect over the vocabulary at least {self.kurtosis:g}, skew above 0; "
            f"suppression: the same, skew below 0; partition: less kurtosis, and a standard deviation, for a unit "
            f"output row, of at least {self.spread:g} times the model's median"
        )

    def roles(
        self, std: NDArray[np.float64], skew: NDArray[np.float64], kurtosis: NDArray[np.float64], norm: NDArray[Any]
    ) -> NDArray[np.str_]:
        """Return `"prediction"`, `"suppression"`, `"partition"` or `"none"` for each neuron.

        Example:
            >>> numbers = [[1.0, 1.0, 4.0, 1.0], [2.0, -2.0, 0.0, 0.0], [30.0, 30.0, 0.0, 0.0], [1.0] * 4]
            >>> RoleRule().roles(*map(np.array, numbers)).tolist()
            ['prediction', 'suppression', 'partition', 'none']
        """
        role = np.full(std.shape, "none", dtype="<U11")
        unit = std / np.where(norm > 0, norm, np.nan)
        known = unit[np.isfinite(unit)]
        if len(known):
            role[unit >= self.spread * np.median(known)] = "partition"
        few = kurtosis >= self.kurtosis
        role[few] = "none"
        role[few & (skew > 0)] = "prediction"
        role[few & (skew < 0)] = "suppression"
        return role


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """The direct effect of every neuron's output row on the logits: of a unit of activation, before division by `s(h)`.

    Attributes:
        top_ids: Tokens whose logits rise most, the most first.
        top_values: By how much.
        bottom_ids: Tokens whose logits fall most, the most first.
        bottom_values: By how much.
        mean: Mean over the vocabulary; a shift of all logits, which changes no probability.
        std: Standard deviation over the vocabulary.
        skew: Third standardised moment; NaN where the effect is the same on all tokens.
        kurtosis: Fourth standardised moment less 3 (0 for a normal distribution); NaN where the skew is.
        n_vocab: Tokens of the vocabulary.
        norm: What was folded: `"LayerNorm"`, `"RMSNorm"` or `"none"`.
    """

    top_ids: Int[NDArray, "layer neuron k"]
    top_values: Float[NDArray, "layer neuron k"]
    bottom_ids: Int[NDArray, "layer neuron k"]
    bottom_values: Float[NDArray, "layer neuron k"]
    mean: Float[NDArray, "layer neuron"]
    std: Float[NDArray, "layer neuron"]
    skew: Float[NDArray, "layer neuron"]
    kurtosis: Float[NDArray, "layer neuron"]
    n_vocab: int
    norm: str


def logit_effects(model: Any, *, k: int = 10, progress: Progress | None = None) -> LogitEffects:
    """Return the direct effect of every neuron's output row on the logits. No text is needed.

    Args:
        model: TransformerLens model or adapter.
        k: Tokens to keep at either end.
        progress: Called after each block of neurons.

    Returns:
        The tokens at both ends and the moments of every neuron's effect.

    Raises:
        ModelError: If the final norm is neither LayerNorm nor RMSNorm, or the unembedding is not linear.
        ValueError: If k is not between 1 and the size of the vocabulary.

    Example:
        >>> effects = logit_effects(model)  # doctest: +SKIP
        >>> model.tokenizer.convert_ids_to_tokens(effects.top_ids[-1, 0])  # doctest: +SKIP
    """
    adapter = attach(model)
    info, n_vocab = adapter.info, int(adapter.model.cfg.d_vocab)
    if not 1 <= k <= n_vocab:
        raise ValueError(f"k must be between 1 and {n_vocab}, the size of the vocabulary, got {k}")
    shape, step = (info.n_layers, info.d_mlp), max(1, _EFFECT_FLOATS // n_vocab)
    ids = [np.empty((*shape, k), dtype=np.int32) for _ in range(2)]
    values = [np.empty((*shape, k), dtype=np.float32) for _ in range(2)]
    moments = np.empty((4, *shape))
    with torch.no_grad(), adapter.unembedding():
        norm = _FinalNorm(adapter)
        unembed = _unembedding(adapter)
        for layer in range(info.n_layers):
            rows = norm.fold(adapter.w_out(layer))
            if progress:
                progress("effects on logits", layer * info.d_mlp, info.n_layers * info.d_mlp)
            for start in range(0, info.d_mlp, step):
                here = (layer, slice(start, min(start + step, info.d_mlp)))
                effect = unembed(rows[here[1]])
                for end, largest in enumerate((True, False)):
                    found = effect.topk(k, dim=1, largest=largest)
                    values[end][here], ids[end][here] = found.values.cpu(), found.indices.cpu()
                moments[(slice(None), *here)] = _moments(effect).cpu()
    if progress:
        progress("effects on logits", info.n_layers * info.d_mlp, info.n_layers * info.d_mlp)
    mean, std, skew, kurtosis = moments
    return LogitEffects(ids[0], values[0], ids[1], values[1], mean, std, skew, kurtosis, n_vocab, norm.kind)


def _moments(effect: Float[Tensor, "neuron vocab"]) -> Float[Tensor, "moment neuron"]:
    """Return mean, standard deviation, skew and excess kurtosis, summed in float64; `effect` is used up."""
    mean = effect.mean(dim=1, dtype=torch.float64)
    effect -= mean.float()[:, None]
    std = _mean_power(effect, 2).sqrt()
    effect /= std.float()[:, None]  # NaN where there is no spread
    return torch.stack([mean, std, _mean_power(effect, 3), _mean_power(effect, 4) - 3])


def _mean_power(values: Float[Tensor, "neuron vocab"], power: int) -> Float[Tensor, " neuron"]:
    return values.pow(power).mean(dim=1, dtype=torch.float64)


class _FinalNorm:
    """The linear part of a model's final norm, read off the module itself and proved on one batch."""

    def __init__(self, adapter: MLPAdapter) -> None:
        d_model = adapter.info.d_model
        module = getattr(adapter.model, "ln_final", None)
        self.gain: Tensor | None = None
        if module is None:
            self.kind = "none"
            return
        entering, leaving = _through(adapter, module)
        generator = torch.Generator().manual_seed(0)
        probes = 1 + torch.randn(_PROBES, d_model, generator=generator)  # a mean, so that it shows whether it goes
        probes = probes.to(entering.device, entering.dtype)
        with placement.materialised(module):
            bias = module(torch.zeros_like(probes[None, :1]))[0].float()
            outputs = module(probes[None])[0].float() - bias
        gains, errors = {}, {}
        for kind in ("LayerNorm", "RMSNorm"):
            inputs = _standardised(probes.float(), kind)
            gains[kind] = (outputs * inputs).sum(dim=0) / (inputs * inputs).sum(dim=0)
            errors[kind] = max(
                _error_of_direction(inputs * gains[kind], outputs),
                _error_of_direction(_standardised(entering.float(), kind) * gains[kind], leaving.float() - bias),
            )
        self.kind = min(errors, key=errors.__getitem__)
        self.gain = gains[self.kind]
        if not errors[self.kind] <= _REBUILD_TOLERANCE.get(entering.dtype, 1e-4):
            raise ModelError(
                f"the final norm of {adapter.info.name} is neither LayerNorm nor RMSNorm ({errors[self.kind]:.1e} of "
                "its output is not explained), or something stands between it and the unembedding, so that effects on "
                f"logits cannot be told; {_INSTEAD}"
            )

    def fold(self, w_out: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron d_model"]:
        """Return output rows as they enter the unembedding, but for the norm's scale."""
        rows = w_out.detach().float()
        if self.gain is None:
            return rows
        if self.kind == "LayerNorm":
            rows = rows - rows.mean(dim=1, keepdim=True)
        return rows.to(self.gain.device) * self.gain


def _standardised(rows: Float[Tensor, "*rows d_model"], kind: str) -> Float[Tensor, "*rows d_model"]:
    if kind == "LayerNorm":
        rows = rows - rows.mean(dim=-1, keepdim=True)
    return rows / rows.pow(2).mean(dim=-1, keepdim=True).sqrt()


def _error_of_direction(found: Float[Tensor, "row d_model"], output: Float[Tensor, "row d_model"]) -> float:
    """Return the relative error of rows, each up to a factor: a norm's epsilon changes no direction."""
    factor = (found * output).sum(dim=1, keepdim=True) / (found * found).sum(dim=1, keepdim=True)
    return relative_error(found * factor, output)


def _through(adapter: MLPAdapter, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Return what enters the final norm on one batch, and what enters the unembedding there, [pos, d_model]."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    try:
        leaving = adapter._wrapped_residual(_probe_tokens(adapter.model), None)
    finally:
        handle.remove()
    if not caught or caught[0].shape != leaving.shape:
        raise ModelError(
            f"the final norm of {adapter.info.name} is not what enters the unembedding, so that effects on logits "
            f"cannot be told; {_INSTEAD}"
        )
    return caught[0][0], leaving[0].to(caught[0].device)


def _unembedding(adapter: MLPAdapter) -> Any:
    """Return the unembedding's linear part, rows [neuron, d_model] -> logits [neuron, vocab] in float32.

    Raises:
        ModelError: If it is not linear.
    """
    unembed = adapter.model.unembed
    dtype = next((p.dtype for p in (*unembed.parameters(), *unembed.buffers()) if p.is_floating_point()), torch.float32)

    def plain(rows: Tensor) -> Tensor:
        found: Tensor = unembed(rows.to(placement.device_of(unembed), dtype)[None])[0]
        return found.float()

    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(2, adapter.info.d_model, generator=generator)
    offset = plain(torch.zeros(1, adapter.info.d_model))
    separate, together = plain(pair) - offset, plain(pair.sum(dim=0, keepdim=True)) - offset
    error = relative_error(separate.sum(dim=0, keepdim=True), together)
    if not error <= _REBUILD_TOLERANCE.get(dtype, 1e-4):
        raise ModelError(
            f"the unembedding of {adapter.info.name} is not linear ({error:.1e} of a logit), so that effects on logits "
            f"cannot be told; {_INSTEAD}"
        )
    return lambda rows: plain(rows).sub_(offset)
