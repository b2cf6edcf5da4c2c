"""Next-token loss and perplexity of a model on fixed windows, in bounded memory.

The model runs up to what enters the unembedding; logits are made a few hundred positions at a time and thrown away,
so that no [batch, pos, vocab] tensor ever exists. Losses of single tokens are kept: every comparison between a dense
and a changed model is paired, token by token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuron_sparsity import parallel
from neuron_sparsity.adapter import MLPAdapter, PostHook
from neuron_sparsity.corpus import Windows
from neuron_sparsity.divergence import ScoredRows
from neuron_sparsity.entry import measurable
from neuron_sparsity.errors import MeasurementError

__all__ = ["PerplexityResult", "default_batch_size", "perplexity", "token_losses"]

Progress = Callable[[str, int, int], None]
"""`f(label, done, total)`: called after each batch with what runs and how many of how many tokens are done."""

RowHook = Callable[[ScoredRows], None]
"""`f(rows)`: called with scored positions and their logits."""

_LOGIT_FLOATS = 1 << 23  # logits held at once: 32 MiB of float32
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}  # measured on two cores: 1,024 tokens is fastest, 4,096 costs 8 % more


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a model on a corpus.

    Attributes:
        ppl: `exp` of the mean loss over the scored positions.
        loss: Mean next-token loss in nats.
        n_scored: Positions scored.
        corpus: What it was measured on (`Windows.describe`).
    """

    ppl: float
    loss: float
    n_scored: int
    corpus: dict[str, Any]


def perplexity(
    model: Any, windows: Windows, *, batch_size: int | None = None, progress: Progress | None = None
) -> PerplexityResult:
    """Return the perplexity of a model, as it is, on a corpus.

    Hooks that are on the model take part: call it inside `sparsify` or `ablate` to measure the changed model.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        Perplexity, mean loss in nats and what they were measured on.

    Raises:
        MeasurementError: If a loss is NaN, or memory runs out.
        ValueError: If the windows do not fit the model.
    """
    losses = token_losses(measurable(model, windows), windows, batch_size=batch_size, progress=progress)
    loss = mean_loss(losses, windows.scored)
    return PerplexityResult(math.exp(loss), loss, windows.n_scored, windows.describe())


def mean_loss(losses: Float[Tensor, "window pos"], scored: Bool[Tensor, "window pos"]) -> float:
    """Return the mean of the scored losses, summed in float64.

    Raises:
        MeasurementError: If it is NaN or infinite.
    """
    loss = float(losses[scored].double().mean())
    if not math.isfinite(loss):
        raise MeasurementError(f"the mean loss is {loss}; the weights or the activations are not finite numbers")
    return loss


def token_losses(
    adapter: MLPAdapter,
    windows: Windows,
    *,
    on_post: PostHook | None = None,
    on_rows: RowHook | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "dense pass",
) -> Float[Tensor, "window pos"]:
    """Return the next-token loss of every scored position.

    Args:
        adapter: The model.
        windows: The corpus.
        on_post: Called with each layer's post-activations; what it returns replaces them.
        on_rows: Called with the logits of some scored positions at a time, in order.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.
        label: What the progress says.

    Returns:
        Float32 on the CPU, in nats; the loss stands at the token that is predicted, 0 where it is not scored.
    """
    if batch_size is None:
        batch_size = default_batch_size(adapter, windows.window)
    if not adapter.chunked_logits:
        batch_size = min(batch_size, 1)
    batch_size = min(parallel.everyones("batch size", batch_size))
    mine = parallel.share(windows.n_windows, batch_size)
    losses = torch.zeros(windows.tokens.shape)
    with torch.no_grad():
        for start, tokens in batches(windows, batch_size, progress, label, mine.start, mine.stop):
            stop = start + len(tokens)
            losses[start:stop] = _batch_losses(adapter, tokens, windows.scored[start:stop], start, on_post, on_rows)
    return parallel.total({"losses": losses})["losses"]  # each rank's windows, and zeros elsewhere


def default_batch_size(adapter: MLPAdapter, window: int, *, kept_layers: int = 1) -> int:
    """Return how many windows fit a pass: a fifth of the free memory, within what is fast.

    A pass for gradients keeps the activations of all layers at once: `kept_layers` is how many.
    """
    info, heads = adapter.info, int(getattr(adapter.model.cfg, "n_heads", 1) or 1)
    per_token = 4 * kept_layers * (4 * info.d_mlp + 16 * info.d_model + 3 * heads * window)
    devices = adapter.devices
    # Offloaded weights are read anew for every batch, which costs more than a few thousand tokens do.
    limit = 16_384 if adapter.offloaded else _BATCH_TOKENS.get(devices[0].type, 4096)
    return max(1, int(min(limit, 0.2 * min(map(_free_bytes, devices)) / per_token)) // window)


def batches(
    windows: Windows, batch_size: int, progress: Progress | None, label: str, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, Int[Tensor, "batch pos"]]]:
    """Yield (index of the first window, tokens) of each batch from window `first` up to `last`, telling progress.

    Raises:
        ValueError: If `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    last = windows.n_windows if last is None else last
    if progress:
        progress(label, first * windows.window, last * windows.window)
    for start in range(first, last, batch_size):
        tokens = windows.tokens[start : min(start + batch_size, last)].long()
        yield start, tokens
        parallel.alive()
        if progress:
            progress(label, min(start + batch_size, last) * windows.window, last * windows.window)


@contextmanager
def memory_advice(batch_size: int | None, window: int) -> Iterator[None]:
    """Turn running out of memory into an error that says which option to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(batch_size, window) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise _out_of_memory(batch_size, window) from error
        raise


def _out_of_memory(batch_size: int | None, window: int) -> MeasurementError:
    lower = f"--batch-size (now {batch_size})" if batch_size and batch_size > 1 else f"--n-ctx (now {window})"
    return MeasurementError(f"out of memory; lower {lower}, or use a smaller model or --dtype bfloat16")


def _batch_losses(
    adapter: MLPAdapter,
    tokens: Int[Tensor, "batch pos"],
    scored: Bool[Tensor, "batch pos"],
    first_window: int,
    on_post: PostHook | None,
    on_rows: RowHook | None,
) -> Float[Tensor, "batch pos"]:
    losses = torch.zeros(tokens.shape)
    mask = scored[:, 1:]
    target = tokens[:, 1:][mask]
    index = torch.arange(tokens.numel()).view(tokens.shape)[:, 1:][mask] + first_window * tokens.shape[1]
    with memory_advice(len(tokens), tokens.shape[1]), adapter.unembedding():
        if adapter.chunked_logits:
            residual = adapter.final_residual(tokens, on_post)
            hidden = residual[:, :-1][mask.to(residual.device)]
            step = max(64, _LOGIT_FLOATS // int(adapter.model.cfg.d_vocab))
            pieces = [
                _row_losses(index[part], hidden[part], adapter.logits(hidden[part]), target[part], on_rows)
                for part in (slice(i, i + step) for i in range(0, len(hidden), step))
            ]
            losses[:, 1:][mask] = torch.cat(pieces) if pieces else torch.zeros(0)
        else:
            with adapter.hooked(on_post):
                logits = adapter.model(tokens.to(adapter.device), return_type="logits").float()
            rows = logits[:, :-1][mask.to(logits.device)]
            losses[:, 1:][mask] = _row_losses(index, None, rows, target, on_rows)
    return losses


def _row_losses(
    index: Int[Tensor, " row"],
    hidden: Float[Tensor, "row d_model"] | None,
    logits: Float[Tensor, "row vocab"],
    target: Int[Tensor, " row"],
    on_rows: RowHook | None,
) -> Float[Tensor, " row"]:
    lse = logits.logsumexp(dim=1)
    loss = lse - logits.gather(1, target.to(logits.device)[:, None])[:, 0]
    if on_rows is not None and len(index):
        on_rows(ScoredRows(index, hidden, logits, lse))
    return loss.cpu()


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 4e9
