"""The pass behind triggers, positions and curves: whether each neuron was active on each token, one bit each.

Counts of n-grams a neuron would take a table of neurons times n-grams; bits take neurons times tokens over eight, and
every count can be made from them, exactly, a few neurons at a time. 46,080 neurons on 4,096 tokens are 24 MB, on 65,536
tokens 377 MB; an 8B model's 458,752 neurons on 65,536 tokens are 3.8 GB. Above `IN_MEMORY` they lie in a temporary
file, so that memory does not grow with the corpus; TMPDIR says where.
"""

from __future__ import annotations

import errno
import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError
from neuron_sparsity.kernels.reference import contributions
from neuron_sparsity.perplexity import Progress, batches, default_batch_size, memory_advice

__all__ = ["ActiveBits", "watch"]

IN_MEMORY = 256 << 20
"""Bytes of bits that are kept in memory; more of them lie in a temporary file."""


class ActiveBits:
    """Which neuron was active on which token.

    Args:
        n_layers: Measured layers.
        n_neurons: Neurons a layer.
        n_windows: Windows of the corpus.
        n_pos: Tokens a window.

    Example:
        >>> bits = ActiveBits(1, 2, 1, 3)
        >>> bits.put(0, 0, torch.tensor([[[True, False], [False, False], [True, True]]]))
        >>> bits.get(0, 0, 2)[0].tolist()
        [[1, 0], [0, 0], [1, 1]]
    """

    def __init__(self, n_layers: int, n_neurons: int, n_windows: int, n_pos: int) -> None:
        self.n_layers, self.n_neurons, self.n_windows, self.n_pos = n_layers, n_neurons, n_windows, n_pos
        self._row = -(-n_pos // 8)  # bytes a neuron and window
        self.n_bytes = n_windows * n_layers * n_neurons * self._row
        large = self.n_bytes > IN_MEMORY
        self._file = tempfile.TemporaryFile(prefix="neuron_sparsity-") if large else None  # noqa: SIM115, kept open
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        self._bits = np.zeros((0 if large else n_windows, n_layers, n_neurons, self._row), dtype=np.uint8)

    def put(self, layer: int, first: int, active: Bool[Tensor, "window pos neuron"]) -> None:
        """Keep one layer of a batch whose first window is `first`.

        Raises:
            MeasurementError: If the disk of the temporary file is full.
        """
        packed = np.packbits(active.permute(0, 2, 1).cpu().numpy(), axis=2)
        if self._file is None:
            self._bits[first : first + len(packed), layer] = packed
            return
        try:
            for window, rows in enumerate(packed, start=first):
                self._file.seek(self._place(window, layer, 0))
                self._file.write(rows.tobytes())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise MeasurementError(
                f"the disk of temporary files is full: {self.n_bytes / 1e9:.1f} GB are needed; "
                "measure fewer tokens, or name a folder with more room in TMPDIR"
            ) from error

    def get(self, layer: int, start: int, stop: int) -> UInt8[NDArray, "window pos neuron"]:
        """Return 1 where a neuron of `start` to `stop` was active, else 0."""
        if self._file is None:
            packed = self._bits[:, layer, start:stop]
        else:
            packed = np.empty((self.n_windows, stop - start, self._row), dtype=np.uint8)
            for window in range(self.n_windows):
                self._file.seek(self._place(window, layer, start))
                packed[window] = np.frombuffer(self._file.read(packed[window].nbytes), np.uint8).reshape(-1, self._row)
        return np.ascontiguousarray(np.unpackbits(packed, axis=2, count=self.n_pos).transpose(0, 2, 1))

    def blocks(self, n_neurons: int) -> Iterator[tuple[int, slice, UInt8[NDArray, "window pos neuron"]]]:
        """Yield (layer, neurons, activity) of all neurons, at most `n_neurons` at a time."""
        for layer in range(self.n_layers):
            for start in range(0, self.n_neurons, n_neurons):
                stop = min(start + n_neurons, self.n_neurons)
                yield layer, slice(start, stop), self.get(layer, start, stop)

    def _place(self, window: int, layer: int, neuron: int) -> int:
        return ((window * self.n_layers + layer) * self.n_neurons + neuron) * self._row


def watch(
    adapter: MLPAdapter,
    windows: Windows,
    thresholds: Float[Tensor, " layer"] | None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ActiveBits:
    """Return which neuron is active on which token of a corpus, from one pass up to the unembedding.

    Args:
        adapter: The model.
        windows: The corpus.
        thresholds: Active means `c >= threshold`, one a layer; if None, that `z` is not exactly zero.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Raises:
        MeasurementError: If post-activations are NaN or infinite, or memory or disk run out.
    """
    info = adapter.info
    bits = ActiveBits(info.n_layers, info.d_mlp, windows.n_windows, windows.window)
    norms = adapter.w_norms
    cuts = None if thresholds is None else [cut.to(norm.device) for cut, norm in zip(thresholds, norms, strict=True)]
    first = 0

    def on_post(layer: int, z: Tensor) -> None:
        if not torch.isfinite(z.sum(dtype=torch.float32)):
            raise MeasurementError(
                f"layer {info.layers[layer]}: post-activations are NaN or infinite in windows {first} to "
                f"{first + len(z) - 1}; check the weights, or use --dtype float32"
            )
        bits.put(layer, first, z != 0 if cuts is None else contributions(z, norms[layer]) >= cuts[layer])

    size = default_batch_size(adapter, windows.window) if batch_size is None else batch_size
    with torch.no_grad():
        for first, tokens in batches(windows, size, progress, "watching neurons"):  # noqa: B007 (read in on_post)
            with memory_advice(size, windows.window):
                adapter.final_residual(tokens, on_post)
    return bits
