"""What passes over a text have found, kept as sums by window: they add up, can be written down and taken up again.

Every pass leaves, for each window it ran on, the sums of its losses over eighths of the window: that is all a paired
difference (changed model minus dense) needs. A change that was measured on a part of the windows is later measured on
the others only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neuron_sparsity.corpus import Windows

__all__ = ["DENSE", "Measured", "control_key", "prefix_key"]

DENSE = "dense"
_PIECES = 8  # of a window
_FIRST_TOKENS = 1024  # a count is first measured on as many, or on a quarter of the windows if that is less

Array = NDArray[np.float64]


def prefix_key(n: int) -> str:
    """Return the name of a pass without the n weakest neurons."""
    return f"weakest {n}"


def control_key(n: int, seed: int) -> str:
    """Return the name of a pass without as many random neurons of every layer."""
    return f"random {n} seed {seed}"


class Measured:
    """Sums of losses of the passes over one text, by window, and what follows from them.

    Args:
        windows: The text.

    Attributes:
        order: Window indices; any first few of them are spread evenly over the text.
        levels: How many windows a pass may run on: from few to all, each twice the one before.
        sums: One array [window, piece] for every pass; NaN where a window was not run.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        n = windows.n_windows
        heard = windows.scored.any(dim=1).tolist()
        self.order = sorted(range(n), key=lambda index: (not heard[index], _reversed_bits(index)))
        self.levels = [min(max(1, n // 4), max(2, math.ceil(_FIRST_TOKENS / windows.window)))]
        while self.levels[-1] < n:
            twice = 2 * self.levels[-1]
            self.levels.append(twice if 1.5 * twice <= n else n)
        self.scored: Array = self._pieces(windows.scored.double())
        self.sums: dict[str, Array] = {}

    def n_windows(self, key: str) -> int:
        """Return on how many windows a pass was run."""
        return 0 if key not in self.sums else int((~np.isnan(self.sums[key][:, 0])).sum())

    def n_tokens(self, key: str) -> int:
        """Return on how many tokens a pass was run."""
        return self.n_windows(key) * self.windows.window

    def whole(self, key: str) -> bool:
        """Return whether a pass was run on all windows."""
        return self.n_windows(key) == self.windows.n_windows

    def passes(self) -> float:
        """Return how many passes over the whole text were made so far."""
        return sum(map(self.n_windows, self.sums)) / self.windows.n_windows

    def missing(self, key: str, n_windows: int) -> list[int]:
        """Return which of the first `n_windows` windows a pass was not run on yet."""
        done = self.sums.get(key)
        return [index for index in self.order[:n_windows] if done is None or np.isnan(done[index, 0])]

    def add(self, key: str, indices: list[int], losses: Tensor) -> None:
        """Keep what a pass over some windows found."""
        table = self.sums.setdefault(key, np.full_like(self.scored, np.nan))
        table[indices] = self._pieces(losses.double())

    def loss(self, key: str, like: str | None = None) -> float:
        """Return the mean loss of a pass over the windows it ran on, or those that another one ran on."""
        at = ~np.isnan(self.sums[like or key][:, 0])
        return float(self.sums[key][at].sum() / self.scored[at].sum())

    def difference(self, key: str) -> Array:
        """Return the paired differences from the dense pass [window, piece]; NaN where a window was not run."""
        return self.sums[key] - self.sums[DENSE]

    def mean(self, key: str, like: str | None = None) -> float:
        """Return the mean rise of the loss over the windows a pass ran on, or those that another one ran on."""
        return self.loss(key, like) - self.loss(DENSE, like or key)

    def rise(self, key: str, near: str | None = None) -> tuple[float, float]:
        """Return the rise of the mean loss over all windows, and the standard error of an estimate from some of them.

        Args:
            key: A pass.
            near: One that ran on all windows and resembles it.
        """
        difference = self.difference(key)
        at = ~np.isnan(difference[:, 0])
        share = at.mean()
        n, x = self.scored[at].ravel(), difference[at].ravel()
        n, x = n[n > 0], x[n > 0]
        rise = float(x.sum() / n.sum())
        if share == 1:
            return rise, 0.0
        if len(n) < 4:
            return rise, math.inf
        scale = math.sqrt(len(n) * (1 - share)) / float(n.sum())
        rest = x - rise * n
        error = scale * math.sqrt(float(rest @ rest) / (len(n) - 1))
        if near is not None and len(n) >= 8:
            whole = self.difference(near)
            y = whole[at].ravel()[self.scored[at].ravel() > 0]
            part = float(y.sum() / n.sum())
            about = y - part * n
            slope = float(rest @ about) / max(float(about @ about), 1e-300)
            left = rest - slope * about
            helped = scale * math.sqrt(float(left @ left) / (len(n) - 2))
            if helped < error:
                return rise + slope * (float(whole.sum() / self.scored.sum()) - part), helped
        return rise, error

    def _pieces(self, values: Tensor) -> Array:
        edges = np.linspace(0, values.shape[1], min(_PIECES, values.shape[1]) + 1).astype(int)[:-1]
        return np.asarray(np.add.reduceat(values.numpy(), edges, axis=1))

    def to_json(self) -> dict[str, Any]:
        """Return every pass, ready for JSON: which windows, and their sums."""
        found = {}
        for key, table in self.sums.items():
            at = np.flatnonzero(~np.isnan(table[:, 0]))
            found[key] = {"windows": at.tolist(), "sums": table[at].tolist()}
        return found

    def take_up(self, data: Mapping[str, Any]) -> None:
        """Read back what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError, IndexError: If it is something else.
        """
        for key, entry in data.items():
            sums = np.array(entry["sums"], dtype=np.float64)
            table = np.full_like(self.scored, np.nan)
            if sums.shape != (len(entry["windows"]), table.shape[1]) or not np.isfinite(sums).all():
                raise ValueError(f"{key!r} holds {list(sums.shape)} sums for {len(entry['windows'])} windows")
            table[np.array(entry["windows"], dtype=np.int64)] = sums
            self.sums[str(key)] = table


def _reversed_bits(index: int) -> float:
    """Return the bits of an index behind the point, in reverse: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    value, weight = 0.0, 0.5
    while index:
        value, index, weight = value + weight * (index & 1), index >> 1, weight / 2
    return value
