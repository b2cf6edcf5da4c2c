"""The search for the largest prefix of a ranking whose removal costs at most p percent, in few passes.

Passes add up (tally.py), so that a search that was interrupted, or that asks for another p, goes on with what is there.
The next step follows from what was measured alone:

1. A count is first measured on few windows, evenly spread. The standard error of its paired difference, over the
   eighths, tells whether its rise is above or below the target; if that lies within two standard errors, twice as
   many windows are run, up to all. Where a count near it was measured on all windows, its difference there takes away
   most of the error (regression on a control variate).
2. The next count comes from log(rise) against log(count), between the largest count that seems to hold and the smallest
   above it that does not, until these two are 1 % apart, or neighbours, and both measured on all windows.
3. The curve need not be monotone: counts 5, 12 and 25 % above the answer are measured too, and one that holds
   becomes the answer, from which the search goes on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.ranking import Ranking
from neuron_sparsity.replacement import Replacer
from neuron_sparsity.search import next_cett
from neuron_sparsity.tally import DENSE, Measured, control_key, prefix_key

__all__ = ["PrefixSearch", "Removals", "order_hash", "step_at"]

_CLEAR = 2.0  # standard errors
_RESOLUTION = 0.01
_BEYOND = (1.05, 1.12, 1.25)
_SMALL_BANK = 4096  # neurons
_CROWD = 4  # measured counts so near the answer: from there on the bracket is halved


def order_hash(ranking: Ranking) -> str:
    """Return the hash of a ranking's order: (row, neuron) as little-endian int32, weakest first."""
    return hashlib.sha256(ranking.order().numpy().astype("<i4").tobytes()).hexdigest()


def step_at(n: int) -> int:
    """Return how near two counts about n are taken for the same place: 1 %, or neighbours."""
    return max(1, math.floor(_RESOLUTION * n))


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

    def controls(self, text: str, n: int, seeds: Sequence[int], n_windows: int) -> None:
        """Measure the removal of as many random neurons of every layer as the n weakest have there, for each seed."""
        masks = {seed: self.matched(n, seed) for seed in seeds}
        if any(self.measured[text].missing(control_key(n, seed), n_windows) for seed in seeds):
            self.replacer.prepare(torch.stack([self._mask(self.order[:n]), *masks.values()]).any(dim=0))
        for seed, mask in masks.items():
            self._run(text, control_key(n, seed), lambda mask=mask: mask, n_windows, f"random control, seed {seed}")  # type: ignore[misc]

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
            more = min(max(4 * int(gone.sum()), _SMALL_BANK), self.replacer.spare())
            self.replacer.prepare(gone | self._mask(self.order[:more]))
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
            limit: Of `Removals.passes`.
        """
        while (step := self._next(target)) is not None:
            count, n_windows = step
            cost = len(self.measured.missing(prefix_key(count), n_windows)) / self.measured.windows.n_windows
            if self.removals.passes + cost + self._owed(target, count, n_windows) > limit:
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
        points = [
            (math.log(m), math.log(r)) for m in self.counts() if n / 8 <= m <= n and (r := self.estimate(m)[0]) > 0
        ]
        if len(points) < 2 or points[-1][0] - points[0][0] < 0.2:
            return 1.0
        x, y = np.array(points).T
        return float(np.clip(np.polyfit(x, y, 1)[0], 0.5, 2.5))

    def _next(self, target: float) -> tuple[int, int] | None:
        """Return the count to measure next and on how many windows, or None when the answer is known."""
        low, high = self.bracket(target)
        for n in (low, high):
            if 0 < n <= self.total and not self.clear(n, target):
                return n, self._more(n)
        if high - low > step_at(low):
            return self._between(low, high, target), self.measured.levels[0]
        for n in (low, high):
            if 0 < n <= self.total and not self.measured.whole(prefix_key(n)):
                return n, self.measured.windows.n_windows
        return self._beyond(low, high, target)

    def _between(self, low: int, high: int, target: float) -> int:
        """Return a count that was not measured, where the target is expected."""
        if high > self.total and low >= self.total // 4:
            return self.total  # "everything may go" is said only of everything removed
        counts, step = self.counts(), step_at(low)
        points = [(n / self.total, self.estimate(n)[0]) for n in counts]
        if not points:
            return min(max(8, self.total // 200), self.total)
        crowd = [n for n in counts if low / 1.1 <= n <= 1.1 * high]
        root = round(next_cett(points, target, prior_slope=1.0) * self.total)
        if high <= self.total and len(crowd) >= _CROWD:
            root = (low + high) // 2
        elif high <= self.total and high > 4 * max(low, 1) and (root <= low + step or root >= high - step):
            root = round(math.sqrt(max(low, 1) * high))
        return min(
            max(root, low + step), high - 1 if high > self.total else high - min(step, high - low - 1), self.total
        )

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

    def _missing(self, n: int) -> float:
        """Return how much of a pass is to be made until a count is measured on all windows."""
        return 1 - self.measured.n_windows(prefix_key(n)) / self.measured.windows.n_windows

    def _owed(self, target: float, count: int, n_windows: int) -> float:
        """Return how much of a pass is still to be made for an answer after the next one."""
        low = self.bracket(target)[0]
        if not low:
            return 1 - n_windows / self.measured.windows.n_windows
        owed = 0.0 if low == count else self._missing(low)
        # Until something is known to hold on all windows, what seems to hold may still turn out not to.
        return owed if self.answer(target) else max(owed, self._reserve(target, count))

    def _reserve(self, target: float, count: int) -> float:
        """Return the least that an answer costs beside a count: one that holds as far as its windows can tell."""
        holds = (n for n in self.counts() if n != count and self.estimate(n)[0] <= target and self.clear(n, target))
        return min(map(self._missing, holds), default=0.0)

    def _settle(self, target: float, limit: float) -> None:
        """Measure the largest count that seems to hold, and can still be paid for, on all windows.

        Until there is an answer, one that is close to the target must leave enough for one that is not.
        """
        for n in sorted(self.counts(), reverse=True):
            left = limit - self.removals.passes - self._missing(n) + 1e-9
            close = not self.answer(target) and not self.clear(n, target)
            if self.estimate(n)[0] <= target and left >= (self._reserve(target, n) if close else 0.0):
                self.removals.prefix(self.text, n)
                if self.estimate(n)[0] <= target:
                    return
