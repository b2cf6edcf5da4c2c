"""The search for the largest prefix of a ranking whose removal costs at most p percent, in few passes.

Every pass leaves, for each window it ran on, the sums of its losses over eighths of the window: that is all a paired
difference (without the neurons minus dense) needs. Passes add up: a count measured on an eighth of the windows is
later measured on the others only, and a search that was interrupted, or that asks for another p, goes on with what is
there. The next step follows from these measurements alone:

1. A count is first measured on few windows, evenly spread. The standard error of its paired difference, over the
   eighths, tells whether its rise is above or below the target; if that lies within two standard errors, twice as
   many windows are run, up to all. Where a count near it was measured on all windows, its difference there takes away
   most of the error (regression on a control variate).
2. The next count comes from log(rise) against log(count), between the largest count that seems to hold and the smallest
   above it that does not, until these two are 1 % apart, or neighbours. The answer was measured on all windows.
3. The curve need not be monotone: counts 5, 12 and 25 % above the answer are measured too, and one that holds
   becomes the answer, from which the search goes on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.ranking import Ranking
from neuron_sparsity.replacement import Replacer
from neuron_sparsity.search import next_cett

__all__ = ["DENSE", "Measured", "PrefixSearch", "Removals", "control_key", "order_hash", "prefix_key", "step_at"]

DENSE = "dense"
_PIECES = 8  # of a window
_FIRST_TOKENS = 1024  # a count is first measured on as many, or on an eighth of the windows if that is less
_CLEAR = 2.0  # standard errors
_RESOLUTION = 0.01
_BEYOND = (1.05, 1.12, 1.25)
_CROWD = 4  # measured counts so near the answer: from there on the bracket is halved

Array = NDArray[np.float64]


def prefix_key(n: int) -> str:
    """Return the name of a pass without the n weakest neurons."""
    return f"weakest {n}"


def control_key(n: int, seed: int) -> str:
    """Return the name of a pass without as many random neurons of every layer."""
    return f"random {n} seed {seed}"


def order_hash(ranking: Ranking) -> str:
    """Return the hash of a ranking's order: (row, neuron) as little-endian int32, weakest first."""
    return hashlib.sha256(ranking.order().numpy().astype("<i4").tobytes()).hexdigest()


def step_at(n: int) -> int:
    """Return how near two counts about n are taken for the same place: 1 %, or neighbours."""
    return max(1, math.floor(_RESOLUTION * n))


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
        few = min(math.ceil(n / 8), max(2, math.ceil(_FIRST_TOKENS / windows.window)))
        self.levels = [max(min(2, n), few)]
        while self.levels[-1] < n:
            self.levels.append(min(n, 2 * self.levels[-1]))
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
        scale = math.sqrt(len(n) * (1 - share)) / n.sum()
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


class Removals:
    """Passes without some neurons, over one or two texts.

    Args:
        adapter: The model.
        ranking: Gives the order.
        replacer: Puts something in the neurons' place.
        texts: Name -> windows; the first is that of the search, and its dense pass is the unit of cost.
        options: Of `token_losses`.
        kept: Called after each piece of a pass.
    """

    def __init__(
        self,
        adapter: MLPAdapter,
        ranking: Ranking,
        replacer: Replacer,
        texts: Mapping[str, Windows],
        options: Mapping[str, Any],
        kept: Callable[[], None],
    ) -> None:
        self.adapter, self.replacer, self.options, self.kept = adapter, replacer, dict(options), kept
        self.order: Int[Tensor, "neuron 2"] = ranking.order()
        self.measured = {name: Measured(windows) for name, windows in texts.items()}
        self._unit = next(iter(texts.values())).n_tokens

    @property
    def passes(self) -> float:
        """Everything that was run, also in an earlier call, in passes over the first text."""
        tokens = sum(m.passes() * m.windows.n_tokens for m in self.measured.values()) + self.replacer.tokens_run
        return tokens / self._unit

    def prefix(self, text: str, n: int, n_windows: int | None = None) -> str:
        """Measure the removal of the n weakest neurons on the first windows of a text's order, or on all."""
        return self._run(text, prefix_key(n), lambda: self._mask(self.order[:n]), n_windows, f"removing {n:,} neurons")

    def dense(self, text: str) -> str:
        """Measure the model as it is on all windows of a text."""
        return self._run(text, DENSE, lambda: self._mask(self.order[:0]), None, "dense pass")

    def control(self, text: str, n: int, seed: int, n_windows: int) -> str:
        """Measure the removal of as many random neurons of every layer as the n weakest have there."""
        return self._run(
            text, control_key(n, seed), lambda: self.matched(n, seed), n_windows, f"random control, seed {seed}"
        )

    def matched(self, n: int, seed: int) -> Bool[Tensor, "layer neuron"]:
        """Return a mask of random neurons, as many of every layer as the n weakest have there."""
        generator = torch.Generator().manual_seed(seed)
        counts = self.order[:n, 0].bincount(minlength=self.adapter.info.n_layers).tolist()
        mask = torch.zeros(self.adapter.info.n_layers, self.adapter.info.d_mlp, dtype=torch.bool)
        for row, count in enumerate(counts):
            if count:
                mask[row, torch.randperm(self.adapter.info.d_mlp, generator=generator)[:count]] = True
        return mask

    def _mask(self, rows: Int[Tensor, "neuron 2"]) -> Bool[Tensor, "layer neuron"]:
        mask = torch.zeros(self.adapter.info.n_layers, self.adapter.info.d_mlp, dtype=torch.bool)
        mask[rows[:, 0], rows[:, 1]] = True
        return mask

    def _run(self, text: str, key: str, mask: Callable[[], Tensor], n_windows: int | None, label: str) -> str:
        """Run what is missing of a pass, piece by piece, so that an interruption costs one piece."""
        measured = self.measured[text]
        wanted = measured.windows.n_windows if n_windows is None else n_windows
        if not measured.missing(key, wanted):
            return key
        gone = mask()
        if key.startswith("weakest"):  # larger counts will be asked for
            self.replacer.prepare(gone | self._mask(self.order[: min(4 * int(gone.sum()), self.replacer.spare())]))
        label += "" if text == next(iter(self.measured)) else f", {text}"
        with self.replacer.on_post(gone) as on_post:
            for level in [level for level in measured.levels if level < wanted] + [wanted]:
                indices = measured.missing(key, level)
                if not indices:
                    continue
                piece = measured.windows._pick(indices, measured.windows.name)
                losses = token_losses(self.adapter, piece, on_post=on_post, label=label, **self.options)
                mean_loss(losses, piece.scored) if piece.scored.any() else None  # NaN and infinity are refused here
                measured.add(key, indices, losses)
                self.kept()
        return key


class PrefixSearch:
    """The search on one text; what it does next follows from what was measured alone.

    Args:
        removals: The passes; the dense one was made.
        text: Which text to search on.
    """

    def __init__(self, removals: Removals, text: str) -> None:
        self.removals, self.text = removals, text
        self.measured, self.total = removals.measured[text], len(removals.order)

    def run(self, target: float, limit: float) -> bool:
        """Measure until the answer is known, or until `limit` passes were made in all; return which.

        Args:
            target: Rise of the mean loss that is allowed, in nats.
            limit: Of `Removals.passes`; at most one pass more is made so that the answer is measured on all windows.
        """
        while (step := self._next(target)) is not None:
            count, n_windows = step
            cost = len(self.measured.missing(prefix_key(count), n_windows)) / self.measured.windows.n_windows
            if self.removals.passes + cost + self._owed(target, count) > limit:
                self._settle(target, limit)
                return self._next(target) is None
            self.removals.prefix(self.text, count, n_windows)
        return True

    def answer(self, target: float) -> int:
        """Return the largest count that was measured on all windows and holds."""
        holds = (n for n in self.counts() if self.measured.whole(prefix_key(n)))
        return max((n for n in holds if self.estimate(n)[0] <= target), default=0)

    def counts(self) -> list[int]:
        """Return every measured count above 0, ascending."""
        prefix = prefix_key(0)[:-1]
        return sorted(int(key.removeprefix(prefix)) for key in self.measured.sums if key.startswith(prefix))

    def estimate(self, n: int) -> tuple[float, float]:
        """Return the rise of the mean loss over all windows and its standard error: 0 where all were run."""
        if n == 0:
            return 0.0, 0.0
        whole = [m for m in self.counts() if self.measured.whole(prefix_key(m)) and m != n]
        near = min(whole, key=lambda m: abs(math.log(m / n)), default=None)
        return self.measured.rise(prefix_key(n), None if near is None else prefix_key(near))

    def clear(self, n: int, target: float) -> bool:
        """Return whether a count is known to be above or below the target."""
        rise, error = self.estimate(n)
        return abs(rise - target) > _CLEAR * error or self.measured.whole(prefix_key(n))

    def bracket(self, target: float) -> tuple[int, int]:
        """Return the largest count that seems to hold, and the smallest above it that does not (or one too many)."""
        counts = self.counts()
        low = max((n for n in counts if self.estimate(n)[0] <= target), default=0)
        return low, min((n for n in counts if n > low), default=self.total + 1)

    def slope(self, n: int) -> float:
        """Return how steeply log(rise) goes with log(count) below and up to a count: 1 where too little is known."""
        points = [(math.log(m), math.log(r)) for m in self.counts() if n / 8 <= m <= n and (r := self.estimate(m)[0]) > 0]
        if len(points) < 2 or points[-1][0] - points[0][0] < 0.2:
            return 1.0
        return float(np.clip(np.polyfit(*zip(*points, strict=True), 1)[0], 0.5, 2.5))

    def _next(self, target: float) -> tuple[int, int] | None:
        """Return the count to measure next and on how many windows, or None when the answer is known."""
        low, high = self.bracket(target)
        for n in (low, high):
            if 0 < n <= self.total and not self.clear(n, target):
                return n, self._more(n)
        if high - low > step_at(low):
            return self._between(low, high, target), self.measured.levels[0]
        if low and not self.measured.whole(prefix_key(low)):
            return low, self.measured.windows.n_windows
        return self._beyond(low, high, target)

    def _between(self, low: int, high: int, target: float) -> int:
        """Return a count that was not measured, where the target is expected."""
        if high > self.total and low >= self.total // 4:
            return self.total  # "everything may go" is said only of everything removed
        counts, step = self.counts(), step_at(low)
        points = [(n / self.total, self.estimate(n)[0]) for n in counts]
        if not points:
            return max(1, self.total // 200)
        crowd = [n for n in counts if low / 1.1 <= n <= 1.1 * high]
        root = round(next_cett(points, target, prior_slope=1.0) * self.total)
        if high <= self.total and len(crowd) >= _CROWD:
            root = (low + high) // 2
        elif high <= self.total and high > 4 * max(low, 1) and (root <= low + step or root >= high - step):
            root = round(math.sqrt(max(low, 1) * high))
        return min(max(root, low + step), high - 1 if high > self.total else high - min(step, high - low - 1), self.total)

    def _beyond(self, low: int, high: int, target: float) -> tuple[int, int] | None:
        """Return what is left to measure above an answer, in case the curve comes down again."""
        if high > self.total:
            return None
        counts = [n for n in self.counts() if n > high]
        for factor in _BEYOND:
            place = min(max(round(factor * low), high + 1), self.total)
            if place > high and not any(abs(n - place) <= step_at(place) for n in counts):
                return place, self.measured.levels[0]
        for n in counts:
            if n <= _BEYOND[-1] * low + step_at(n) and not self.clear(n, target):
                return n, self._more(n)
        return None

    def _more(self, n: int) -> int:
        done = self.measured.n_windows(prefix_key(n))
        return next(level for level in self.measured.levels if level > done)

    def _owed(self, target: float, count: int) -> float:
        """Return how much of a pass is still to be made for the answer, if another count is measured first."""
        low = self.bracket(target)[0]
        if low in (0, count):
            return 0.0
        return 1 - self.measured.n_windows(prefix_key(low)) / self.measured.windows.n_windows

    def _settle(self, target: float, limit: float) -> None:
        """Measure the largest count that seems to hold on all windows; if it does not after all, the next one."""
        while (low := self.bracket(target)[0]) and not self.measured.whole(prefix_key(low)):
            if self.removals.passes > limit:
                break
            self.removals.prefix(self.text, low)


def _reversed_bits(index: int) -> float:
    """Return the bits of an index behind the point, in reverse: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    value, weight = 0.0, 0.5
    while index:
        value, index, weight = value + weight * (index & 1), index >> 1, weight / 2
    return value
