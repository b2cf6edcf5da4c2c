"""KL divergence of a changed model's next-token distributions from the dense model's, without keeping a distribution.

With logits `z = h W + b` of the last hidden state `h`, and `p`, `q` the softmax of the dense and the changed logits,

    KL(p || q) = sum_v p_v (log p_v - log q_v)
               = [lse(z_q) - g . h_q] - [lse(z_p) - g . h_p],    g = W p

(the biases cancel). So a dense pass leaves `g` and one number behind for each token, and a later pass pays for one dot
product: its logits and their log-sum-exp are made for the loss anyway. Only the dense pass pays for a product, `W p`.

Where logits are not linear in `h` (a soft cap), or rounded to half precision, `h_p` is kept instead, and a later pass
makes the dense logits again. Where logits cannot be made from pieces of `h` at all, it runs the dense model again.
"""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import parallel
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows

__all__ = ["Comparison", "DenseReference", "ScoredRows"]

_IN_MEMORY = 32 << 20  # bytes; longer references lie in a temporary file, so that memory does not grow with the corpus
_LINEAR_TOLERANCE = 1e-5  # of the largest logit: `h W + b` against the model's own logits


@dataclass(frozen=True)
class ScoredRows:
    """Some scored positions of a pass, in the order of the corpus.

    Attributes:
        index: Flat position in the corpus, `window * n_pos + pos`, of the token that is predicted.
        hidden: What entered the unembedding there; None where the model makes logits in one piece only.
        logits: Of the next token. Whoever gets them may overwrite them.
        lse: Their log-sum-exp.
    """

    index: Int[Tensor, " row"]
    hidden: Float[Tensor, "row d_model"] | None
    logits: Float[Tensor, "row vocab"]
    lse: Float[Tensor, " row"]


class DenseReference:
    """What a dense pass leaves behind, to compare later passes over the same windows with it.

    Args:
        adapter: The model.
        windows: The corpus.
    """

    def __init__(self, adapter: MLPAdapter, windows: Windows) -> None:
        self.adapter, self.windows = adapter, windows
        self._unembedding = _linear_unembedding(adapter)
        self._n_rows = int(windows.scored[:, 1:].sum())
        self._offset = torch.zeros(self._n_rows)
        self._rows: _Rows | None = None
        self._done = 0

    def remember(self, rows: ScoredRows) -> None:
        """Take in the next rows of the dense pass (`on_rows` of `perplexity.token_losses`)."""
        if rows.hidden is None:
            return
        kept = rows.hidden
        if self._unembedding is not None:
            p = rows.logits.sub_(rows.lse[:, None]).exp_()
            kept = p @ self._unembedding
            there = slice(self._done, self._done + len(kept))
            self._offset[there] = (rows.lse - (kept * rows.hidden).sum(dim=1)).cpu()
        if self._rows is None:
            self._rows = _Rows(self._n_rows, kept.shape[1])
        self._rows.put(self._done, kept.float().cpu())
        self._done += len(kept)

    def comparison(self) -> Comparison:
        """Return what takes in one later pass."""
        return Comparison(self)

    def _kl(self, first: int, rows: ScoredRows) -> Float[Tensor, " row"]:
        if rows.hidden is None or self._rows is None:
            return _divergence(self._dense_logits(rows), rows)
        kept = self._rows.get(first, len(rows.index)).to(rows.lse.device)
        if self._unembedding is not None:
            offset = self._offset[first : first + len(kept)].to(rows.lse.device)
            return rows.lse - (kept * rows.hidden).sum(dim=1) - offset
        return _divergence(self.adapter.logits(kept.to(rows.hidden.dtype)), rows)

    def _dense_logits(self, rows: ScoredRows) -> Float[Tensor, "row vocab"]:
        """Run the dense model on the one window that these rows are of."""
        window = rows.index // self.windows.window
        tokens = self.windows.tokens[int(window[0])][None].long()
        logits = self.adapter.model(tokens.to(self.adapter.device), return_type="logits")[0].float()
        return logits[(rows.index.to(logits.device) - 1) % self.windows.window]


class Comparison:
    """One pass compared with the dense one.

    Attributes:
        kl: KL(dense || this pass) of each scored position in nats, at the token that is predicted; 0 elsewhere.
    """

    def __init__(self, reference: DenseReference) -> None:
        self._reference, self._done = reference, 0
        self.kl: Float[Tensor, "window pos"] = torch.zeros(reference.windows.tokens.shape)

    def take(self, rows: ScoredRows) -> None:
        """Take in the next rows of the pass (`on_rows` of `perplexity.token_losses`)."""
        self.kl.view(-1)[rows.index] = self._reference._kl(self._done, rows).cpu()
        self._done += len(rows.index)

    def pool(self) -> None:
        """Take in the other ranks' positions; each calls this once, after its own windows."""
        self.kl = parallel.total({"kl": self.kl})["kl"]


class _Rows:
    """A float32 matrix in memory, or in a temporary file if it is large."""

    def __init__(self, n_rows: int, width: int) -> None:
        self.width = width
        large = 4 * n_rows * width > _IN_MEMORY
        self.file = tempfile.TemporaryFile(prefix="neuron_sparsity-") if large else None  # noqa: SIM115, kept open
        if self.file is not None:
            weakref.finalize(self, self.file.close)
        self.tensor = torch.empty(0 if large else n_rows, width)

    def put(self, first: int, rows: Tensor) -> None:
        if self.file is None:
            self.tensor[first : first + len(rows)] = rows
        else:
            self.file.seek(4 * first * self.width)
            self.file.write(rows.contiguous().numpy().tobytes())

    def get(self, first: int, n_rows: int) -> Tensor:
        if self.file is None:
            return self.tensor[first : first + n_rows]
        self.file.seek(4 * first * self.width)
        data = self.file.read(4 * n_rows * self.width)
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(n_rows, self.width).copy())


def _divergence(dense: Float[Tensor, "row vocab"], rows: ScoredRows) -> Float[Tensor, " row"]:
    log_p = dense.log_softmax(dim=1)
    log_q = rows.logits - rows.lse[:, None]
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1)  # a masked token has -inf in both


def _linear_unembedding(adapter: MLPAdapter) -> Float[Tensor, "vocab d_model"] | None:
    """Return `W` transposed if logits are proved to be `h W + b` in float32, else None."""
    weight = getattr(adapter.model.unembed, "W_U", None)
    if not adapter.chunked_logits or not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        return None
    if weight.is_meta:  # it waits in CPU memory or on disk, and is not kept: hidden states are
        return None
    weight, d_model = weight.detach(), adapter.info.d_model
    if weight.dim() != 2 or weight.shape[0] != d_model:
        return None
    # Rows of unlike sizes, so that a soft cap shows; differences to the zero row, in which a bias cancels.
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.0, 1.0, 10.0, 100.0])[:, None]
    hidden = (sizes * torch.randn(4, d_model, generator=generator)).to(weight.device)
    with torch.no_grad():
        found, expected = adapter.logits(hidden), hidden @ weight
    found = found - found[:1]
    if found.shape != expected.shape:
        return None
    scale = expected.abs().amax(dim=1).clamp_min(1e-30)
    error = (found - expected).abs().amax(dim=1) / scale
    return weight.t() if bool((error <= _LINEAR_TOLERANCE).all()) else None
