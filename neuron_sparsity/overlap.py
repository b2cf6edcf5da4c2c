"""Which windows share text: a ranking made on the very text that a removal is searched on flatters it.

Two windows share text if some run of 16 tokens (or of a whole window, if that is shorter) is in both. Windows of one
document that were cut at other places are found like that, and boilerplate of a few words does not count.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt64

from neuron_sparsity.corpus import Windows

__all__ = ["all_among", "apart_from", "share_text"]

_RUN = 16  # tokens


def apart_from(windows: Windows, *others: Windows) -> Windows | None:
    """Return those of the windows that share no text with any of the others; None if all do.

    Example:
        >>> import torch
        >>> scored = torch.tensor([[False, True, True]] * 2)
        >>> def text(*rows):
        ...     return Windows(torch.tensor(rows, dtype=torch.int32), scored, "n", ("a", "b"), "packed", bos=False)
        >>> apart_from(text((1, 2, 3), (4, 5, 6)), text((7, 8, 9), (1, 2, 3))).tokens.tolist()
        [[4, 5, 6]]
    """
    run = min(_RUN, windows.window, *(other.window for other in others))
    known = np.concatenate([_runs(other, run).ravel() for other in others])
    kept = np.flatnonzero(~_shared(windows, known, run)).tolist()
    return windows._pick(kept, windows.name) if kept else None


def share_text(first: Windows, second: Windows) -> bool:
    """Return whether some window of one shares text with some window of the other."""
    run = min(_RUN, first.window, second.window)
    return bool(_shared(first, _runs(second, run).ravel(), run).any())


def all_among(windows: Windows, others: Windows) -> bool:
    """Return whether every window is also one of the others, token for token."""
    if windows.window != others.window:
        return False
    return bool(np.isin(_runs(windows, windows.window), _runs(others, others.window)).all())


def _shared(windows: Windows, known: UInt64[np.ndarray, " run"], run: int) -> Bool[np.ndarray, " window"]:
    return np.asarray(np.isin(_runs(windows, run), known).any(axis=1))


def _runs(windows: Windows, run: int) -> UInt64[np.ndarray, "window run"]:
    """Return a hash of every run of tokens: a sum with fixed random factors, modulo 2^64."""
    factors = np.random.default_rng(0).integers(0, 1 << 63, run, dtype=np.uint64) | np.uint64(1)
    tokens = windows.tokens.numpy().astype(np.uint64) + np.uint64(1)
    found = np.zeros((windows.n_windows, windows.window - run + 1), dtype=np.uint64)
    for place, factor in enumerate(factors):
        found += tokens[:, place : place + found.shape[1]] * factor
    return found
