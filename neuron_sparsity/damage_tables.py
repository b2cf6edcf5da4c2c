"""Lists and groups made of the damage of single tokens, and their intervals; no model in sight.

`intervals` is a paired bootstrap over windows: windows are drawn with replacement, and every column of sums is taken
from the same draw, so that differences between columns (a layer and the whole) keep their pairing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity.bootstrap import MIN_WINDOWS, ends, window_draws
from neuron_sparsity.corpus import Windows

__all__ = [
    "DecileDamage",
    "Interval",
    "LayerDamage",
    "TokenDamage",
    "TokenGroup",
    "by_decile",
    "by_token",
    "extremes",
    "intervals",
    "percentiles",
]

_PERCENTS = (1, 5, 25, 50, 75, 95, 99)
_BEFORE, _AFTER = 12, 4

_Own = TypeVar("_Own", bound="_Row")


class _Row:
    """Plain values that go to JSON and back as they are."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_json(cls: type[_Own], data: dict[str, Any]) -> _Own:
        """Return what `to_json` was made from."""
        names = cls.__dataclass_fields__  # type: ignore[attr-defined]
        own = {name: data[name] for name in names}
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.items()})


@dataclass(frozen=True)
class Interval(_Row):
    """A mean over tokens with its 95 % interval for text like this; the ends are None with fewer than 5 windows."""

    mean: float
    low: float | None
    high: float | None

    def values(self) -> tuple[float, float | None, float | None]:
        """Return mean and ends."""
        return self.mean, self.low, self.high


@dataclass(frozen=True)
class LayerDamage(_Row):
    """One layer's part.

    Attributes:
        layer: Block index.
        rise: Mean rise of the loss in nats, with this layer changed alone; or what sparing it saves.
        low: Lower end of its 95 % interval; None with fewer than 5 windows.
        high: Upper end.
        share: `rise` over the rise of the whole change; None where that is not positive.
    """

    layer: int
    rise: float
    low: float | None
    high: float | None
    share: float | None


@dataclass(frozen=True)
class TokenDamage(_Row):
    """One token and what the change did to its prediction.

    Attributes:
        token: Its text.
        before: Texts of up to 12 tokens before it.
        after: Texts of up to 4 tokens after it, which the model did not see.
        window: Which window.
        pos: Its place in the window.
        document: The document that the window starts in.
        loss_dense: Loss of the dense model, in nats.
        difference: Rise of the loss.
        kl: KL divergence of the changed model's prediction from the dense one's.
    """

    token: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    window: int
    pos: int
    document: str
    loss_dense: float
    difference: float
    kl: float


@dataclass(frozen=True)
class TokenGroup(_Row):
    """All scored tokens of one vocabulary entry.

    Attributes:
        token: Its text.
        token_id: Its index.
        count: How many there are.
        rise: Mean rise of their loss.
        stderr: Its standard error, over the occurrences.
        kl: Mean KL divergence at them.
        share: Sum of their rises over that of all tokens; None where that is not positive.
    """

    token: str
    token_id: int
    count: int
    rise: float
    stderr: float
    kl: float
    share: float | None


@dataclass(frozen=True)
class DecileDamage(_Row):
    """Scored tokens of one tenth of the window.

    Attributes:
        first: First place in the window.
        last: Last place in the window.
        count: Scored tokens there.
        rise: Mean rise of the loss.
        low: Lower end of its 95 % interval; None with fewer than 5 windows.
        high: Upper end.
        kl: Mean KL divergence.
    """

    first: int
    last: int
    count: int
    rise: float
    low: float | None
    high: float | None
    kl: float


def intervals(
    sums: Float[Tensor, "window column"], counts: Int[Tensor, "window column"], *, seed: int = 0
) -> list[Interval]:
    """Return the mean of each column over all tokens, with the interval of a paired bootstrap over windows.

    Args:
        sums: Sum over the tokens of each window, for several quantities.
        counts: How many tokens each sum is of. A window may have none.
        seed: Of the draws.

    Example:
        >>> flat = intervals(torch.full((6, 1), 4.0), torch.full((6, 1), 2))
        >>> flat
        [Interval(mean=2.0, low=2.0, high=2.0)]
        >>> intervals(torch.ones(2, 1), torch.ones(2, 1))
        [Interval(mean=1.0, low=None, high=None)]
    """
    x, n = sums.double().numpy(), counts.double().numpy()
    means = x.sum(axis=0) / np.maximum(n.sum(axis=0), 1.0)
    n_windows = int((n.sum(axis=1) > 0).sum())
    if n_windows < MIN_WINDOWS:
        return [Interval(float(mean), None, None) for mean in means]
    generator, size = np.random.default_rng(seed), len(x)
    blocks = [(drawn @ x) / np.maximum(drawn @ n, 1.0) for drawn in window_draws(size, generator)]
    low, high = ends(np.concatenate(blocks), n_windows)
    return [Interval(*map(float, column)) for column in zip(means, low, high, strict=True)]


def percentiles(differences: Float[Tensor, " token"]) -> dict[str, Any]:
    """Return how the damage spreads over tokens: percentiles, share that is hurt, share of the 1 % hurt most."""
    values = differences.double()
    total, n_top = float(values.sum()), max(1, math.ceil(len(values) / 100))
    found = np.percentile(values.numpy(), _PERCENTS)
    return {
        "percentiles": {str(percent): float(value) for percent, value in zip(_PERCENTS, found, strict=True)},
        "hurt_ratio": float((values > 0).double().mean()),
        "top_percent_share": float(values.topk(n_top).values.sum()) / total if total > 0 else None,
    }


def extremes(
    windows: Windows,
    values: Mapping[str, Float[Tensor, "window pos"]],
    names: Mapping[int, str],
    n_tokens: int,
    per_document: int,
    *,
    largest: bool,
) -> tuple[TokenDamage, ...]:
    """Return the scored tokens of the largest (or smallest) difference, a few of each document; none that is spared.

    Args:
        windows: The text.
        values: `difference`, `kl` and `dense` (the dense loss) of every token.
        names: Text of each token.
        n_tokens: How many.
        per_document: At most so many of one document.
        largest: Whether those hurt most are wanted, else those helped most.
    """
    difference = values["difference"] if largest else -values["difference"]
    flat = torch.where(windows.scored & (difference > 0), difference, 0.0).flatten()
    order = flat.argsort(descending=True, stable=True)[: int((flat > 0).sum())]
    taken: Counter[str] = Counter()
    found: list[TokenDamage] = []
    for index in order.tolist():
        if len(found) == n_tokens:
            break
        window, pos = divmod(index, windows.window)
        document = windows.documents[window]
        if taken[document] < per_document:
            taken[document] += 1
            found.append(_token(windows, values, names, window, pos))
    return tuple(found)


def _token(
    windows: Windows, values: Mapping[str, Tensor], names: Mapping[int, str], window: int, pos: int
) -> TokenDamage:
    texts = [names[token] for token in windows.tokens[window, max(0, pos - _BEFORE) : pos + 1 + _AFTER].tolist()]
    here = min(pos, _BEFORE)
    return TokenDamage(
        token=texts[here],
        before=tuple(texts[:here]),
        after=tuple(texts[here + 1 :]),
        window=window,
        pos=pos,
        document=windows.documents[window],
        loss_dense=float(values["dense"][window, pos]),
        difference=float(values["difference"][window, pos]),
        kl=float(values["kl"][window, pos]),
    )


def by_token(
    windows: Windows,
    difference: Float[Tensor, "window pos"],
    kl: Float[Tensor, "window pos"],
    names: Mapping[int, str],
    min_count: int,
    n_groups: int,
) -> tuple[TokenGroup, ...]:
    """Return the tokens that occur `min_count` times, hurt most first: `n_groups` from either end."""
    ids, group = windows.tokens[windows.scored].long().unique(return_inverse=True)
    values = torch.stack([difference[windows.scored].double(), kl[windows.scored].double()], dim=1)
    count = torch.bincount(group, minlength=len(ids))
    sums = torch.zeros(len(ids), 2, dtype=torch.float64).index_add_(0, group, values)
    mean = sums / count[:, None]
    spread = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, group, (values[:, 0] - mean[group, 0]) ** 2)
    stderr = (spread / (count - 1).clamp_min(1) / count).sqrt()
    total = float(values[:, 0].sum())
    order = [index for index in mean[:, 0].argsort(descending=True, stable=True).tolist() if count[index] >= min_count]
    if len(order) > 2 * n_groups:
        order = order[:n_groups] + order[len(order) - n_groups :]
    return tuple(
        TokenGroup(
            token=names[int(ids[index])],
            token_id=int(ids[index]),
            count=int(count[index]),
            rise=float(mean[index, 0]),
            stderr=float(stderr[index]),
            kl=float(mean[index, 1]),
            share=float(sums[index, 0]) / total if total > 0 else None,
        )
        for index in order
    )


def by_decile(
    windows: Windows, difference: Float[Tensor, "window pos"], kl: Float[Tensor, "window pos"]
) -> tuple[DecileDamage, ...]:
    """Return tokens by their place in the window, in tenths (fewer where a window is shorter); empty tenths go."""
    cells = min(10, windows.window)
    edges = [cell * windows.window // cells for cell in range(cells + 1)]
    places = [slice(first, last) for first, last in pairwise(edges)]
    counts = torch.stack([windows.scored[:, place].sum(dim=1) for place in places], dim=1)
    sums = torch.stack([difference.double()[:, place].sum(dim=1) for place in places], dim=1)
    divergences = [float(kl.double()[:, place].sum()) for place in places]
    rows = zip(places, counts.sum(dim=0).tolist(), intervals(sums, counts), divergences, strict=True)
    return tuple(
        DecileDamage(place.start, place.stop - 1, count, *one.values(), divergence / count)
        for place, count, one, divergence in rows
        if count
    )
