"""The search for the largest prefix of a ranking whose removal costs at most p percent, in few passes.

Passes add up (tally.py), so that a search that was interrupted, or that asks for another p, goes on with what is there.
The next step follows from what was measured alone:

1. On few windows, evenly spread, always the same: a handful of counts, from log(rise) against log(count), until the
   target lies between two that are near each other. Windows differ more than counts do: what the few say can be far
   off, and more of them would not pay.
2. On all windows, where the target is expected: between the largest count that holds and the smallest above it that
   does not, by the line through both; while there is only one of them, by the slope there, and further the more counts
   did not hold. A little below that place (up to 2 %, by how far it is extrapolated), since a count that holds is an
   answer, and one that does not is none. Until the two are 1 % apart, or neighbours.
3. The curve need not be monotone: counts 5, 12 and 25 % above the answer are measured too, on as many windows as their
   standard errors need (over the eighths, with the difference of a near count that was measured on all windows as a
   control variate); one that holds becomes the answer, from which the search goes on.
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
_SURE = 3.5  # standard errors from few windows, which know little of the others
_RESOLUTION = 0.01
_BEYOND = (1.05, 1.12, 1.25)
_SMALL_BANK = 4096  # neurons
_PLACED = 0.5  # of the count: two so near each other on few windows are near enough
_MARGIN = 0.05  # of the way between two counts, in log(count), that the next one keeps from either
_STUCK = 0.35  # the same, from the one that did not hold, where the last one before it was near
_PLACING = 5  # counts on few windows
_BELOW, _BELOW_SHARE = 0.02, 0.2  # of the count; of the way from the nearest one
_FURTHER = 0.9  # of the target, for each count that did not hold while none has
_CROWD = 5  # counts on all windows so near the answer: from there on the bracket is halved


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
        self._all = self.measured.windows.n_windows

    def run(self, target: float, limit: float) -> bool:
        """Measure until the answer is known, or until `limit` passes were made in all; return which.

        Args:
            target: Rise of the mean loss that is allowed, in nats.
            limit: Of `Removals.passes`.
        """
        while (step := self._next(target)) is not None:
            count, n_windows = step
            if not self.answer(target) and self.removals.passes + self._missing(count, n_windows) + 1 > limit:
                safest = self._safest(target)  # the last one that can be paid for has to hold
                count, n_windows = (safest, self._all) if self._missing(safest) else step
            if self.removals.passes + self._missing(count, n_windows) > limit + 1e-9:
                return False
            self.removals.prefix(self.text, count, n_windows)
        return True

    def answer(self, target: float) -> int:
        """Return the largest count that was measured on all windows and holds."""
        return max((n for n in self._whole() if self.estimate(n)[0] <= target), default=0)

    def counts(self) -> list[int]:
        """Return every measured count above 0, ascending."""
        prefix = prefix_key(0)[:-1]
        return sorted(int(key.removeprefix(prefix)) for key in self.measured.sums if key.startswith(prefix))

    def estimate(self, n: int) -> tuple[float, float]:
        """Return the rise of the mean loss over all windows and its standard error: 0 where all were run."""
        if n == 0:
            return 0.0, 0.0
        whole = [m for m in self._whole() if m != n]
        near = min(whole, key=lambda m: abs(math.log(m / n)), default=None)
        return self.measured.rise(prefix_key(n), None if near is None else prefix_key(near))

    def clear(self, n: int, target: float, errors: float = _CLEAR) -> bool:
        """Return whether a count is known to be above or below the target."""
        rise, error = self.estimate(n)
        return abs(rise - target) > errors * error or self.measured.whole(prefix_key(n))

    def bracket(self, target: float) -> tuple[int, int]:
        """Return the largest count known to hold, and the smallest above it known not to (or one too many).

        While none was measured on all windows, what few of them say is taken for known.
        """
        if not self._whole():
            holds = {n: self.estimate(n)[0] <= target for n in self.counts()}
            low = max((n for n in holds if holds[n]), default=0)
            return low, min((n for n in holds if n > low), default=self.total + 1)
        holds = {n: self.estimate(n)[0] <= target for n in self.counts() if self.clear(n, target, _SURE)}
        high = min((n for n in holds if n > self.answer(target) and not holds[n]), default=self.total + 1)
        return max((n for n in holds if n < high and holds[n]), default=0), high

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
        apart = high - low > step_at(low)
        if not self._whole():
            counts = self.counts()
            placing = len(counts) < _PLACING or all(self.clear(n, target, _SURE) for n in counts)
            if apart and high - low > _PLACED * low and placing:
                return self._place(low, high, target), self.measured.levels[0]
            return low or min(counts, key=lambda n: abs(self.estimate(n)[0] - target)), self._all
        if apart:
            return self._root(low, high, target), self._all
        for n in (low, high):
            if 0 < n <= self.total and not self.measured.whole(prefix_key(n)):
                return n, self._all
        return self._beyond(low, high, target)

    def _place(self, low: int, high: int, target: float) -> int:
        """Return a count that was not measured, where few windows expect the target."""
        counts, step = self.counts(), step_at(low)
        if not counts:
            return min(max(8, self.total // 200), self.total)
        if high > self.total and low >= self.total // 4:
            return self.total  # "everything may go" is said only of everything removed
        root = round(
            next_cett([(n / self.total, self.estimate(n)[0]) for n in counts], target, prior_slope=1.0) * self.total
        )
        if high <= self.total and high > 4 * max(low, 1) and (root <= low + step or root >= high - step):
            root = round(math.sqrt(max(low, 1) * high))
        return self._inside(root, low, high)

    def _root(self, low: int, high: int, target: float) -> int:
        """Return a count that was not measured, a little below where those on all windows expect the target."""
        if high > self.total and low >= self.total // 4:
            return self.total
        rises = {n: self.estimate(n)[0] for n in (low, high) if 0 < n <= self.total}
        known = max(rises, key=lambda n: rises[n]) if rises else 1
        if len(rises) == 2 and 0 < rises[low] < rises[high]:
            crowd = [n for n in self._whole() if low / 1.15 <= n <= 1.15 * high]
            stuck = any(high < n <= 1.3 * high for n in self._whole())
            share = math.log(target / rises[low]) / math.log(rises[high] / rises[low])
            share = min(max(share, _MARGIN), 1 - (_STUCK if stuck else _MARGIN))
            root = low * (high / low) ** (0.5 if len(crowd) >= _CROWD else share)
        elif len(rises) == 2 or rises.get(known, 0.0) <= 0:
            root = math.sqrt(max(low, 1) * high) if high <= self.total else 4.0 * max(low, 1)
        else:
            failed = sum(n > low for n in self._whole()) if known == high else 0
            ratio = (_FURTHER**failed * target / rises[known]) ** (1 / self._steepness(known, target))
            root = known * min(max(ratio, 0.25), 4.0)
        nearest = min((abs(math.log(root / n)) for n in rises), default=1.0)
        return self._inside(round((1 - min(_BELOW, _BELOW_SHARE * nearest)) * root), low, high)

    def _inside(self, n: int, low: int, high: int) -> int:
        """Return the count between two others that is nearest to n, and not the same place as one of them."""
        step = step_at(low)
        return min(max(n, low + step), high - 1 if high > self.total else high - min(step, high - low - 1), self.total)

    def _steepness(self, n: int, target: float) -> float:
        """Return the slope at a count of which the target lies on one side only: between it and its neighbour there."""
        holds = self.estimate(n)[0] <= target
        same = [m for m in self._whole() if (r := self.estimate(m)[0]) > 0 and (r <= target) == holds]
        near = sorted(same, key=lambda m: abs(math.log(m / n)))[:2]
        found = self.slope(n)
        if len(near) == 2 and max(near) < 2 * min(near):
            first, second = (self.estimate(m)[0] for m in near)
            found = math.log(first / second) / math.log(near[0] / near[1])
        return float(np.clip(found, 0.4, 2.5))

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
            if n > _BEYOND[-1] * low + step_at(n) or self.measured.whole(prefix_key(n)):
                continue
            if self.estimate(n)[0] <= target or not self.clear(n, target):
                return n, self._more(n)
        return None

    def _safest(self, target: float) -> int:
        """Return a count that is likely to hold: the largest that seems to, by far; else the surest; else far below."""
        whole = self._whole()
        seem = {n: e for n in self.counts() if n < min(whole, default=n + 1) and (e := self.estimate(n))[0] <= target}
        margins = {n: (target - rise) / max(error, 1e-12) for n, (rise, error) in seem.items()}
        if margins:
            return max((n for n in margins if margins[n] > _CLEAR), default=max(margins, key=lambda n: margins[n]))
        return max(1, min(self.counts(), default=4 * max(8, self.total // 200)) // 4)

    def _whole(self) -> list[int]:
        """Return the counts above 0 that were measured on all windows, ascending."""
        return [n for n in self.counts() if self.measured.whole(prefix_key(n))]

    def _more(self, n: int) -> int:
        done = self.measured.n_windows(prefix_key(n))
        return next(level for level in self.measured.levels if level > done)

    def _missing(self, n: int, n_windows: int | None = None) -> float:
        """Return how much of a pass is to be made until a count is measured on some or all windows."""
        return len(self.measured.missing(prefix_key(n), n_windows or self._all)) / self._all
