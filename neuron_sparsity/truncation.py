"""Run a model with its weak neurons cut, token by token: `sparsify` on TransformerLens, `apply_thresholds` on plain HF.

A neuron whose contribution `|z| * ||W_out||` lies below its layer's threshold gives nothing to that token's output.
Both are context managers and leave no hook behind, whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import MLPAdapter, ModelInfo, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.kernels.reference import contributions
from neuron_sparsity.model_info import otherwise
from neuron_sparsity.perplexity import Progress, RowHook, token_losses
from neuron_sparsity.plain import down_projections, output_rows
from neuron_sparsity.typed import expect

__all__ = [
    "TokenActivity",
    "Truncation",
    "WindowTruncation",
    "apply_thresholds",
    "sparsify",
    "token_activity",
    "truncated_losses",
]


class Truncation:
    """Counts what was active while a model ran truncated.

    Attributes:
        thresholds: One a layer.
        pairs: All (token, neuron) pairs, a layer.
        backends: Which kernel backends have run.
    """

    def __init__(self, thresholds: Sequence[float], backend: kernels.Backend = "auto") -> None:
        self.thresholds = [float(threshold) for threshold in thresholds]
        self.pairs = torch.zeros(len(thresholds), dtype=torch.int64)
        self.backends: set[str] = set()
        self._backend = backend
        self._active: list[int | Tensor] = [0] * len(thresholds)

    @property
    def active(self) -> Int[Tensor, " layer"]:
        """(token, neuron) pairs that stayed active, a layer."""
        return torch.tensor([int(count) for count in self._active], dtype=torch.int64)

    @property
    def layer_activation_ratios(self) -> list[float]:
        """Active pairs over all pairs of each layer, in the truncated runs so far."""
        return (self.active.double() / self.pairs.clamp_min(1)).tolist()

    @property
    def activation_ratio(self) -> float:
        """Mean of the layers' activation ratios."""
        ratios = self.layer_activation_ratios
        return sum(ratios) / len(ratios)

    def cut(self, layer: int, z: Float[Tensor, "*rows neuron"], w_norm: Float[Tensor, " neuron"]) -> Tensor:
        """Return `z` with the weak neurons zero, and count."""
        flat = rearrange(z, "... neuron -> (...) neuron")
        if torch.is_grad_enabled() and flat.requires_grad:
            kept = contributions(flat.detach(), w_norm) >= self.thresholds[layer]
            flat, active = flat * kept, kept.sum(dim=1)
            self.backends.add("torch")  # the kernels know no gradients
        else:
            active = kernels.threshold_mask(flat, w_norm, self.thresholds[layer], backend=self._backend)
            self.backends.add(kernels.choose(z.device, self._backend).name)
        self._count(layer, active.view(z.shape[:-1]))
        self.pairs[layer] += flat.numel()
        return flat.view(z.shape)

    def _count(self, layer: int, active: Int[Tensor, "*rows"]) -> None:
        """Add the active neurons of each token."""
        self._active[layer] = self._active[layer] + active.sum()  # stays on the layer's device: no wait for it here

    def pool(self) -> None:
        """Count what all ranks have counted; each calls this once, after its own windows."""
        counted = parallel.total({"active": self.active, "pairs": self.pairs})
        self._active, self.pairs = list(counted["active"]), counted["pairs"]


class WindowTruncation(Truncation):
    """A truncation of whole windows, that counts what was active in each."""

    def __init__(self, thresholds: Sequence[float], backend: kernels.Backend = "auto") -> None:
        super().__init__(thresholds, backend)
        self._batches: list[Tensor] = []

    @property
    def window_activation_ratios(self) -> Float[Tensor, " window"]:
        """Share of (token, neuron) pairs, all layers, that stayed active in each window so far, in order."""
        counts = torch.cat([batch.cpu() for batch in self._batches]).double()
        return counts * len(counts) / float(self.pairs.sum())

    def pool(self) -> None:
        """Count what all ranks have counted, the windows of all in order."""
        super().pool()
        own = [batch.cpu() for batch in self._batches]
        self._batches = [parallel.joined(torch.cat(own) if own else torch.zeros(0, dtype=torch.int64))]

    def _count(self, layer: int, active: Int[Tensor, "batch pos"]) -> None:
        super()._count(layer, active)
        of_window = active.sum(dim=1)
        if layer == 0:
            self._batches.append(of_window)
        else:
            self._batches[-1] = self._batches[-1] + of_window.to(self._batches[-1].device)


@contextmanager
def sparsify(model: Any, result: Any, *, backend: kernels.Backend = "auto") -> Iterator[Truncation]:
    """Truncate a model while the context is open: anything run inside sees only its strong neurons.

    Args:
        model: TransformerLens model or adapter.
        result: SparsityResult, or one threshold a layer.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.

    Yields:
        A Truncation, which counts active neurons of every token that passes.

    Raises:
        TypeError: If the result is something else.
        ValueError: If the result is of another model, there is not one threshold a layer, or the backend cannot run.
    """
    adapter = attach(model)
    truncation = Truncation(_thresholds(result, adapter.info.n_layers), backend)
    for norm in adapter.w_norms:
        kernels.choose(norm.device, backend)  # refuse a backend that cannot run before anything runs
    found = getattr(getattr(result, "model", None), "fingerprint", adapter.info.fingerprint)
    if found != adapter.info.fingerprint:
        how = otherwise(result.model, adapter.info)
        raise ValueError(f"the result was measured on {result.model.name} {how}; measure this model first")
    with adapter.hooked(lambda layer, z: truncation.cut(layer, z, adapter.w_norms[layer])):
        yield truncation


@contextmanager
def apply_thresholds(hf_model: nn.Module, result: Any) -> Iterator[Truncation]:
    """Truncate a plain Hugging Face model with the thresholds of a result; its source is not edited.

    The down projection of each layer is found by its shape, `d_mlp -> d_model`, inside the decoder's layers.

    Args:
        hf_model: Causal language model of transformers with the weights that were measured.
        result: SparsityResult (also one read back from `sparsity.json`).

    Yields:
        A Truncation, which counts active neurons.

    Raises:
        ValueError: If the layers cannot be told apart, or the weights are not the measured ones (a model measured
            in compatibility mode has other output weights than its plain form).
    """
    expect("result", result, "SparsityResult")
    info = result.model
    projections = down_projections(hf_model, info.d_mlp, info.d_model, info.n_layers)
    norms = []
    for layer, module in zip(result.layers, projections, strict=True):
        rows = output_rows(module)
        norms.append(rows.norm(dim=1))
        other_form = info.weights == "centred" and float(rows.mean(dim=1).abs().max()) > 1e-5 * float(rows.abs().max())
        if other_form or not abs(float(norms[-1].mean()) - layer.w_norm_mean) <= 1e-4 * layer.w_norm_mean:
            raise ValueError(
                f"layer {layer.layer}: output weights differ from those measured on {info.name} ({info.weights}); "
                "measure this model as loaded, without folding or centring"
            )
    truncation = Truncation(_thresholds(result, info.n_layers))
    with ExitStack() as stack:
        for index, module in enumerate(projections):

            def before(module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> tuple[Tensor, ...]:
                return (truncation.cut(index, args[0], norms[index]), *args[1:])

            stack.callback(module.register_forward_pre_hook(before).remove)
        yield truncation


def truncated_losses(
    adapter: MLPAdapter,
    windows: Windows,
    thresholds: Sequence[float],
    *,
    on_rows: RowHook | None = None,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "truncated pass",
) -> tuple[Float[Tensor, "window pos"], WindowTruncation]:
    """Return the next-token losses of the truncated model, and what was active."""
    truncation = WindowTruncation(thresholds, backend)
    losses = token_losses(
        adapter,
        windows,
        on_post=lambda layer, z: truncation.cut(layer, z, adapter.w_norms[layer]),
        on_rows=on_rows,
        batch_size=batch_size,
        progress=progress,
        label=label,
    )
    truncation.pool()
    return losses, truncation


@dataclass(frozen=True, eq=False)
class TokenActivity:
    """How much of each layer is active on each token of a passage.

    Attributes:
        token_ids: The passage.
        token_strings: Its tokens as text.
        activation_ratio: Share of the layer's neurons with `c >= threshold` on the dense run.
        definition: What counts as active.
        corpus: Where the passage is from (`Windows.describe`, with the window's index).
        model: What was measured; None in a file of an earlier version.
    """

    token_ids: list[int]
    token_strings: list[str]
    activation_ratio: Float[Tensor, "layer pos"]
    definition: str
    corpus: dict[str, Any]
    model: ModelInfo | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `passage.json`; ratios to five digits."""
        ratios = [[round(value, 5) for value in row] for row in self.activation_ratio.tolist()]
        return {
            "token_ids": self.token_ids,
            "token_strings": self.token_strings,
            "activation_ratio": ratios,
            "definition": self.definition,
            "corpus": self.corpus,
            "model": None if self.model is None else self.model.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenActivity:
        """Read the content of `passage.json` back.

        Raises:
            KeyError, TypeError, ValueError: If keys are missing or of the wrong type.
        """
        return cls(
            [int(token) for token in data["token_ids"]],
            [str(text) for text in data["token_strings"]],
            torch.tensor(data["activation_ratio"]),
            str(data["definition"]),
            dict(data["corpus"]),
            ModelInfo.from_json(data["model"]) if data.get("model") else None,
        )


def token_activity(
    model: Any,
    windows: Windows,
    result: Any,
    *,
    window: int = 0,
    n_tokens: int = 128,
    backend: kernels.Backend = "auto",
) -> TokenActivity:
    """Return each layer's activation ratio on every token of one window's beginning (the paper's token-wise view).

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus.
        result: SparsityResult, or one threshold a layer.
        window: Which window.
        n_tokens: How many of its tokens, from its start.
        backend: Of the kernel: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Ratios [layer, pos] on the dense run.

    Raises:
        ValueError: If there is no such window, or the backend cannot run.
    """
    adapter = measurable(model, windows)
    if not 0 <= window < windows.n_windows:
        raise ValueError(f"window must be between 0 and {windows.n_windows - 1}, got {window}")
    cuts = _thresholds(result, adapter.info.n_layers)
    tokens = windows.tokens[window, :n_tokens]
    ratio = torch.zeros(adapter.info.n_layers, len(tokens))

    def on_post(layer: int, z: Tensor) -> None:
        active = kernels.threshold_mask(z[0].clone(), adapter.w_norms[layer], cuts[layer], backend=backend)
        ratio[layer] = active.cpu() / adapter.info.d_mlp

    with torch.no_grad():
        adapter.final_residual(tokens[None].long(), on_post)
    tokenizer = adapter.model.tokenizer
    named = f"the layer's {result.name} threshold" if hasattr(result, "name") else "the given threshold"
    return TokenActivity(
        tokens.tolist(),
        [tokenizer.decode([token]) for token in tokens.tolist()] if tokenizer else [str(t) for t in tokens.tolist()],
        ratio,
        f"contribution >= {named}",
        windows.describe() | {"window_index": window, "document": windows.documents[window]},
        adapter.info,
    )


def _thresholds(result: Any, n_layers: int) -> list[float]:
    if isinstance(result, str) or hasattr(result, "thresholds"):
        expect("result", result, "SparsityResult")
    try:
        cuts = [float(cut) for cut in getattr(result, "thresholds", result)]
    except (TypeError, ValueError, RuntimeError):  # the last one: a row of a tensor
        expect("result", result, "SparsityResult", "one threshold a layer")
        raise
    if len(cuts) != n_layers:
        raise ValueError(f"need one threshold for each of {n_layers} layers, got {len(cuts)}")
    if any(not cut >= 0 for cut in cuts):
        raise ValueError("thresholds must be >= 0 and not NaN")
    return cuts
