"""Tokens and n-grams that a neuron fires on, and the neurons that detect them (Voita et al. 2023, arXiv:2309.04827).

An n-gram, n = 1, 2, 3, stands at a token if it is the token itself with the n - 1 before it in the same window.
Position 0 of a window takes no part: it is BOS where windows begin with one, and an attention sink in most models. A
neuron's activations are those at all other positions, for every n.

1. **Smallest set.** A set of n-grams covers the activations at the places where one of them stands. Each place has one
   n-gram, so sets do not overlap, and the smallest set that covers a share is that of the most frequent ones: taking
   them in the order of their counts is exact, no search is needed.
2. **Detector.** A neuron that 1 to 5 n-grams cover to 95 %, each of which it fires on in at least 95 % of the places
   where it stands. Which of its n-grams those can be is decided by the second condition, and the smallest set of them
   is again that of the most frequent ones.
3. A set of bigrams covers no more than their last tokens do. So a neuron that needs more than 5 tokens needs more than
   5 bigrams and trigrams, and is not looked at for them.

A neuron of few activations is covered by as few n-grams, whatever they are: under `min_activations` nothing is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

__all__ = ["Detection", "Grams", "TriggerRule", "Triggers"]

N_MAX = 3


@dataclass(frozen=True)
class TriggerRule:
    """What makes a set of triggers small, and a neuron a detector.

    Args:
        covered: Share of a neuron's activations that its triggers cover.
        fires: Share of the places where a trigger stands on which a detector fires.
        most: Triggers that a set may have at most.
        min_activations: Activations that a neuron needs for a claim.

    Raises:
        ValueError: If a share is not above 0 and at most 1, or a count is less than 1.
    """

    covered: float = 0.95
    fires: float = 0.95
    most: int = 5
    min_activations: int = 20

    def __post_init__(self) -> None:
        if not (0 < self.covered <= 1 and 0 < self.fires <= 1):
            raise ValueError(f"covered and fires must be above 0 and at most 1, got {self.covered} and {self.fires}")
        if self.most < 1 or self.min_activations < 1:
            raise ValueError(f"most and min_activations must be at least 1, got {self.most}, {self.min_activations}")

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            f"1 to {self.most} n-grams that cover {100 * self.covered:g} % of activations, each of which the neuron "
            f"fires on in at least {100 * self.fires:g} % of its places; at least {self.min_activations} activations; "
            "position 0 of a window left out"
        )


class Grams:
    """The n-grams of a corpus, and where each stands.

    Args:
        tokens: Token ids.
        n: 1, 2 or 3.

    Attributes:
        ids: The different n-grams, in ascending order.
        places: In how many places each stands.

    Example:
        >>> grams = Grams(np.array([[0, 7, 8, 7, 8]]), 2)
        >>> grams.ids.tolist(), grams.places.tolist()
        ([[7, 8], [8, 7]], [2, 1])
        >>> grams.count(np.array([[0], [1], [1], [0], [1]])).tolist()
        [[2], [0]]
    """

    def __init__(self, tokens: Int[NDArray, "window pos"], n: int) -> None:
        n_windows, n_pos = tokens.shape
        size = int(tokens.max()) + 1
        key = np.zeros((n_windows, max(n_pos - n, 0)), dtype=np.int64)
        for back in range(n - 1, -1, -1):  # the oldest token first: keys are in the order of the n-grams
            key = key * size + tokens[:, n - back : n_pos - back]
        at = (np.arange(n_windows)[:, None] * n_pos + np.arange(n, max(n_pos, n))).ravel()
        flat = key.ravel()
        order = np.argsort(flat, kind="stable")
        keys, self._starts, self.places = np.unique(flat[order], return_index=True, return_counts=True)
        self._at = at[order]
        self.ids = np.stack([keys // size**back % size for back in range(n - 1, -1, -1)], axis=1)

    def count(self, active: NDArray[np.uint8]) -> Int[NDArray, "gram neuron"]:
        """Return on how many places of each n-gram each neuron is active; `active` is [token, neuron]."""
        if not len(self.places):
            return np.zeros((0, active.shape[1]), dtype=np.int32)
        return np.add.reduceat(active[self._at], self._starts, axis=0, dtype=np.int32)


@dataclass(frozen=True)
class Detection:
    """The triggers of one neuron: token ids of each, the most frequent first; a detector's if `detector`."""

    ids: tuple[tuple[int, ...], ...]
    detector: bool

    @property
    def n(self) -> int:
        """Of n-gram."""
        return len(self.ids[0])


@dataclass(eq=False)
class Triggers:
    """What the neurons of a model fire on; filled a block of neurons at a time.

    Args:
        tokens: Token ids of the corpus.
        n_layers: Measured layers.
        n_neurons: Neurons a layer.
        rule: What counts as a small set.

    Attributes:
        n_covering_tokens: Size of the smallest set of tokens that covers the neuron's activations; 0 if it has none.
        found: Triggers of the neurons that a small set covers, by (row of the layer, neuron).
    """

    tokens: Int[NDArray, "window pos"]
    n_layers: int
    n_neurons: int
    rule: TriggerRule = field(default_factory=TriggerRule)

    def __post_init__(self) -> None:
        self._grams = [Grams(self.tokens, n) for n in range(1, N_MAX + 1)]
        self.n_covering_tokens = np.zeros((self.n_layers, self.n_neurons), dtype=np.int32)
        self.found: dict[tuple[int, int], Detection] = {}

    @property
    def bytes_a_neuron(self) -> int:
        """Working memory of `add` for one neuron: activity twice; counts of n-grams, sorted, summed, as shares."""
        return 2 * self.tokens.size + 24 * max(len(grams.places) for grams in self._grams)

    def add(self, layer: int, first: int, active: NDArray[np.uint8]) -> None:
        """Take in neurons from `first` on; `active` is [token, neuron], with position 0 of each window blank."""
        total = active.sum(axis=0, dtype=np.int64)
        counts = self._grams[0].count(active)
        sizes = smallest_cover(counts, total, self.rule.covered)
        self.n_covering_tokens[layer, first : first + len(sizes)] = sizes
        left = np.flatnonzero((sizes > 0) & (sizes <= self.rule.most) & (total >= self.rule.min_activations))
        covers = {column: self._named(0, counts[:, column], sizes[column]) for column in left.tolist()}
        for n in range(N_MAX):
            if not len(left):
                break
            some = counts[:, left] if n == 0 else self._grams[n].count(active[:, left])
            precise = np.where(some / np.maximum(self._grams[n].places, 1)[:, None] >= self.rule.fires, some, 0)
            needed = smallest_cover(precise, total[left], self.rule.covered)
            is_detector = (needed > 0) & (needed <= self.rule.most)
            for index in np.flatnonzero(is_detector).tolist():
                ids = self._named(n, precise[:, index], needed[index])
                self.found[layer, first + int(left[index])] = Detection(ids, detector=True)
            left = left[~is_detector]
        for column in left.tolist():
            self.found[layer, first + column] = Detection(covers[column], detector=False)

    def _named(self, n: int, counts: NDArray[np.int32], size: int) -> tuple[tuple[int, ...], ...]:
        """Return the `size` most frequent n-grams; of equally frequent ones the smaller ids."""
        order = np.argsort(-counts.astype(np.int64), kind="stable")[:size]
        return tuple(tuple(map(int, self._grams[n].ids[row])) for row in order)


def smallest_cover(
    counts: Int[NDArray, "gram neuron"], total: Int[NDArray, " neuron"], share: float
) -> Int[NDArray, " neuron"]:
    """Return how many of the most frequent n-grams cover a share of each neuron's activations; 0 if all do not.

    Args:
        counts: Activations at the places of each n-gram.
        total: Activations.
        share: Above 0, at most 1.

    Example:
        >>> smallest_cover(np.array([[6, 0], [1, 0], [3, 5]]), np.array([10, 9]), 0.9).tolist()
        [2, 0]
    """
    if not len(counts):
        return np.zeros(len(total), dtype=np.int64)
    ordered = np.sort(counts.T, axis=1)[:, ::-1].cumsum(axis=1)  # [neuron, gram]
    enough = ordered / np.maximum(total, 1)[:, None] >= share
    return np.where(enough[:, -1], enough.argmax(axis=1) + 1, 0)
