"""One streaming pass of a model over a corpus: the statistics of every neuron.

1. Every batch runs up to the unembedding; each layer's post-activations go to `kernels.neuron_statistics` on the
   layer's own device, and are forgotten.
2. Memory does not grow with the number of tokens: per neuron a few sums, 64 histogram bins and K examples.
3. With a folder, the state is written there once a minute and when a signal asks to stop; the next call goes on from
   it, and ends with the same bits as a recording that was never interrupted.
4. In a `parallel.session` each rank records its own windows, with a state of its own; at the end they are added up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity import parallel
from neuron_sparsity.allocator import give_back_freed_memory
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.errors import RankError, RunFolderError
from neuron_sparsity.interrupts import stop_requested
from neuron_sparsity.kernels import Backend
from neuron_sparsity.perplexity import Progress, batches, default_batch_size, memory_advice
from neuron_sparsity.recording import Recording, partial_path
from neuron_sparsity.statistics import NeuronStatistics

__all__ = ["NeuronStatistics", "record"]


def record(
    model: Any,
    windows: Windows,
    *,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    folder: str | Path | None = None,
    n_examples: int = 5,
    batch_size: int | None = None,
    checkpoint_seconds: float = 60.0,
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> NeuronStatistics:
    """Return the statistics of every MLP neuron of a model over a corpus, from one pass.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus.
        thresholds: Sets of thresholds on the contribution, one number a layer, whose exceedances are counted
            exactly: `{"CETT-PPL-1%": result.thresholds}`.
        folder: Where an interrupted recording is kept and taken up again, and where the result is saved.
        n_examples: Top activating examples a neuron, at most one a window.
        batch_size: Windows a forward pass; chosen from free memory if None. A resumed recording keeps its own.
        checkpoint_seconds: How often the state is written to `folder`.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`; `provenance` of the result says which ran.
        progress: Called after each batch.

    Returns:
        The statistics; saved in `folder` too, if one is given.

    Raises:
        MeasurementError: If post-activations are NaN or infinite, or memory runs out.
        RankError: If another rank of a `parallel.session` is gone or has failed.
        RunFolderError: If `folder` cannot be written or holds another recording, or one of another number of ranks.
        TypeError: If `windows` are no windows, or `thresholds` no sets by name.
        ValueError: If a set of thresholds does not have one number >= 0 a layer, `n_examples` or `batch_size`
            cannot be, the windows do not fit the model, or the backend cannot run here.
        KeyboardInterrupt: After SIGINT or SIGTERM, once the state (or, at the very end, the result) is written.
    """
    adapter = measurable(model, windows)
    if n_examples < 0:
        raise ValueError(f"n_examples must be >= 0, got {n_examples}")
    recording = Recording(adapter, windows, {} if thresholds is None else thresholds, n_examples, backend)
    path = None if folder is None else partial_path(Path(folder))
    begun = None if path is None else recording.resume(path, batch_size)
    if batch_size is None:
        batch_size = default_batch_size(adapter, windows.window)
    batch_size = _common_batch_size(begun, batch_size)
    recording.take_share(batch_size)
    with torch.no_grad(), stop_requested(path is not None) as stop:
        try:
            _run(recording, batch_size, path, stop, checkpoint_seconds, progress)
        except RankError:
            if path is not None:
                recording.write(path, batch_size)
            raise
    give_back_freed_memory()  # of the batches: what follows takes almost as much as the state
    stats = recording.finish()
    if folder is not None and path is not None:
        if parallel.leads():
            stats.save(folder)
        parallel.meet("statistics are saved")
        path.unlink(missing_ok=True)
    if stop.is_set():  # in the last batch: the result is kept, but whoever asked wants no next step
        raise KeyboardInterrupt
    return stats


def _run(
    recording: Recording,
    batch_size: int,
    path: Path | None,
    stop: threading.Event,
    checkpoint_seconds: float,
    progress: Progress | None,
) -> None:
    """Record all windows of this rank that are left, writing the state now and then."""
    windows, (first, last) = recording.windows, (recording.next_window, recording.share.stop)
    written = time.monotonic()
    for start, tokens in batches(windows, batch_size, progress, "recording neurons", first, last):
        with memory_advice(batch_size, windows.window):
            recording.add(start, tokens)
        if path is not None and (stop.is_set() or time.monotonic() - written > checkpoint_seconds):
            recording.write(path, batch_size)
            written = time.monotonic()
        if stop.is_set():
            raise KeyboardInterrupt
    if path is not None and parallel.position():  # another rank may be lost before all are added up
        recording.write(path, batch_size)


def _common_batch_size(begun: int | None, wanted: int) -> int:
    """Return the batch size of all ranks: the one that some began with, else the smallest.

    Raises:
        RunFolderError: If ranks began with different ones.
    """
    said = parallel.everyones("batch size of the recording", (begun, wanted))
    kept = {size for size, _ in said if size is not None}
    if len(kept) > 1:
        raise RunFolderError(
            f"the ranks began this recording with batch sizes {sorted(kept)}; delete their states to start afresh"
        )
    return kept.pop() if kept else min(size for _, size in said)
