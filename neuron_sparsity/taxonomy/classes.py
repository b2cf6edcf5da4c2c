"""Dead, rare, alive, always on: by how many tokens a neuron is active on, with N and the bound that N allows.

A neuron that was not active on any of N tokens is active on at most 3/N of all (95 % upper bound, the rule of three):
unseen in 10,000 tokens is not dead. So every class comes with N, and `class_curve` shows how the counts move with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.typed import expect

__all__ = [
    "ALWAYS_ON",
    "CLASSES",
    "DEAD",
    "NONZERO",
    "RARE",
    "ClassPoint",
    "ClassRule",
    "NeuronClasses",
    "active_counts",
    "active_name",
    "bound_95",
    "class_curve",
    "classify",
]

CLASSES = ("dead", "rare", "alive", "always_on")
DEAD, RARE, ALWAYS_ON = 0.001, 0.01, 0.99
NONZERO = "nonzero"
"""Active means that the post-activation is not exactly zero. Any other name is that of recorded thresholds."""

Definition = Literal["frequency", "any"]


@dataclass(frozen=True)
class ClassRule:
    """Which share of tokens makes which class.

    Args:
        definition: Of dead. `"frequency"`: active on less than a share `dead` of tokens (arXiv:2411.02335, data
            repository). `"any"`: active on none at all (arXiv:2309.04827).
        dead: That share.
        rare: A neuron that is not dead and active on less than this share is rare.
        always_on: One active on more than this share is always on; the rest is alive.

    Raises:
        ValueError: If the definition is unknown, or unless 0 <= dead <= rare <= always_on <= 1.

    Example:
        >>> rule = ClassRule()
        >>> [CLASSES[code] for code in rule.codes(np.array([0, 5, 40, 998]), 1000)]
        ['dead', 'rare', 'alive', 'always_on']
        >>> rule.words
        'dead: active on under 0.1 % of tokens; rare: under 1 %; always on: over 99 %'
    """

    definition: Definition = "frequency"
    dead: float = DEAD
    rare: float = RARE
    always_on: float = ALWAYS_ON

    def __post_init__(self) -> None:
        if self.definition not in ("frequency", "any"):
            raise ValueError(
                f"definition must be 'frequency' (dead: below a share of tokens) or 'any' (dead: active on none), "
                f"got {self.definition!r}"
            )
        if not 0 <= self.dead <= self.rare <= self.always_on <= 1:
            raise ValueError(
                f"need 0 <= dead <= rare <= always_on <= 1, got {self.dead}, {self.rare}, {self.always_on}"
            )

    @property
    def words(self) -> str:
        """The rule in words."""
        dead = "active on no token" if self.definition == "any" else f"active on under {100 * self.dead:g} % of tokens"
        return f"dead: {dead}; rare: under {100 * self.rare:g} %; always on: over {100 * self.always_on:g} %"

    def codes(self, count: NDArray[np.int64], n_tokens: int) -> NDArray[np.int8]:
        """Return the index in `CLASSES` of neurons that are active on `count` of `n_tokens` tokens."""
        return self.codes_at(count / n_tokens)

    def codes_at(self, frequency: NDArray[np.float64]) -> NDArray[np.int8]:
        """Return the index in `CLASSES` of neurons that are active on these shares of the tokens."""
        code = np.full(frequency.shape, CLASSES.index("alive"), dtype=np.int8)
        code[frequency > self.always_on] = CLASSES.index("always_on")
        code[frequency < self.rare] = CLASSES.index("rare")
        code[frequency == 0 if self.definition == "any" else frequency < self.dead] = CLASSES.index("dead")
        return code

    def point(self, count: NDArray[np.int64], n_tokens: int) -> ClassPoint:
        """Return how many neurons are in each class."""
        sizes = np.bincount(self.codes(count, n_tokens).ravel(), minlength=len(CLASSES))
        by_name = dict(zip(CLASSES, map(int, sizes), strict=True))
        return ClassPoint(n_tokens=n_tokens, never=int((count == 0).sum()), bound_95=bound_95(n_tokens), **by_name)


@dataclass(frozen=True)
class ClassPoint:
    """How many neurons of a model are in each class, on so many tokens.

    Attributes:
        n_tokens: N.
        dead: Dead, by the definition that was asked for.
        rare: Not dead, and active on few tokens.
        alive: The rest.
        always_on: Active on nearly all tokens.
        never: Active on no token at all: a part of the dead.
        bound_95: 95 % upper bound 3/N on the frequency of a neuron that was never active.
    """

    n_tokens: int
    dead: int
    rare: int
    alive: int
    always_on: int
    never: int
    bound_95: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClassPoint:
        """Return what `to_json` was made from."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, eq=False)
class NeuronClasses:
    """The class of every neuron.

    Attributes:
        code: Index in `("dead", "rare", "alive", "always_on")`.
        count: Tokens on which the neuron is active.
        n_tokens: N, of how many.
        active: What counts as active, in words.
        rule: What makes which class.
        layers: Block index of each row.
        model: Name of the model.
        corpus: What it was measured on (`Windows.describe`).
    """

    code: NDArray[np.int8]
    count: NDArray[np.int64]
    n_tokens: int
    active: str
    rule: ClassRule
    layers: tuple[int, ...]
    model: str
    corpus: dict[str, Any]

    @property
    def names(self) -> NDArray[np.str_]:
        """Name of the class of every neuron, [layer, neuron]."""
        return np.array(CLASSES)[self.code]

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share of tokens on which each neuron is active."""
        return self.count / self.n_tokens

    @property
    def bound_95(self) -> NDArray[np.float64]:
        """3/N where a neuron was never active, else NaN: the 95 % upper bound on its frequency."""
        return np.where(self.count == 0, bound_95(self.n_tokens), math.nan)

    @property
    def total(self) -> ClassPoint:
        """Neurons of the model in each class."""
        return self.rule.point(self.count, self.n_tokens)

    def by_layer(self) -> dict[str, NDArray[np.int64]]:
        """Return neurons of each layer in each class, and those `never` active (a part of the dead)."""
        found = {name: (self.code == code).sum(axis=1) for code, name in enumerate(CLASSES)}
        return found | {"never": (self.count == 0).sum(axis=1)}


def bound_95(n_tokens: int) -> float:
    """Return 3/N, the 95 % upper bound on the frequency of what was not seen in N independent tokens; at most 1.

    Example:
        >>> bound_95(3000)
        0.001
    """
    return min(1.0, 3.0 / n_tokens)


def classify(
    stats: NeuronStatistics,
    *,
    active: str | None = None,
    definition: Definition = "frequency",
    dead: float = DEAD,
    rare: float = RARE,
    always_on: float = ALWAYS_ON,
) -> NeuronClasses:
    """Return which neurons are dead, rare, alive and always on; counts are exact.

    Args:
        stats: What `record` returned.
        active: What counts as active: a name in `stats.threshold_names`, or `"nonzero"` (the post-activation is not
            exactly zero). If None, the first recorded thresholds, else `"nonzero"`.
        definition: Of dead: `"frequency"` (active on less than `dead` of tokens) or `"any"` (active on none).
        dead: Share of tokens.
        rare: Share of tokens.
        always_on: Share of tokens.

    Returns:
        The classes, with N and what they were measured on.

    Raises:
        ValueError: If there are no such thresholds, the definition is unknown, or shares are out of order.

    Example:
        >>> ns.classify(ns.record(model, corpus)).total  # doctest: +SKIP
        ClassPoint(n_tokens=4096, dead=0, rare=2, alive=46041, always_on=37, never=0, bound_95=0.000732421875)
    """
    expect("stats", stats, "NeuronStatistics")
    rule = ClassRule(definition, dead, rare, always_on)
    count, words = active_counts(stats, active)
    return NeuronClasses(
        code=rule.codes(count, stats.n_tokens),
        count=count,
        n_tokens=stats.n_tokens,
        active=words,
        rule=rule,
        layers=stats.model.layers,
        model=stats.model.name,
        corpus=stats.corpus,
    )


def class_curve(
    recordings: Sequence[NeuronStatistics],
    *,
    active: str | None = None,
    definition: Definition = "frequency",
    dead: float = DEAD,
    rare: float = RARE,
    always_on: float = ALWAYS_ON,
) -> tuple[ClassPoint, ...]:
    """Return the classes after the first recording, after the first two, and so on: how they move with N.

    `atlas` has such a curve from its one pass; this one is for recordings of parts of a corpus that is too long for
    one. They are merged as `NeuronStatistics.merge` does.

    Args:
        recordings: Of the same model and thresholds, on text that does not overlap.
        active: As for `classify`.
        definition: As for `classify`.
        dead: Share of tokens.
        rare: Share of tokens.
        always_on: Share of tokens.

    Raises:
        ValueError: If there is no recording, or they cannot be merged.
    """
    if not recordings:
        raise ValueError("class_curve needs at least one recording; record(model, part) makes one of each part")
    rule, merged = ClassRule(definition, dead, rare, always_on), recordings[0]
    points = [rule.point(active_counts(merged, active)[0], merged.n_tokens)]
    for more in recordings[1:]:
        merged = merged.merge(more)
        points.append(rule.point(active_counts(merged, active)[0], merged.n_tokens))
    return tuple(points)


def active_name(stats: NeuronStatistics, active: str | None) -> str:
    """Return what counts as active where nothing is said: the first recorded thresholds, else not exactly zero.

    Raises:
        ValueError: If there are no thresholds of that name.
    """
    active = active or (stats.threshold_names[0] if stats.threshold_names else NONZERO)
    if active != NONZERO and active not in stats.threshold_names:
        raise ValueError(
            f"no thresholds named {active!r} were recorded, only {[NONZERO, *stats.threshold_names]}; "
            "record(model, windows, thresholds={name: cuts}) counts under others"
        )
    return active


def active_counts(stats: NeuronStatistics, active: str | None) -> tuple[NDArray[np.int64], str]:
    """Return on how many tokens each neuron is active, and what that means in words.

    Raises:
        ValueError: If there are no thresholds of that name.
    """
    active = active_name(stats, active)
    if active == NONZERO:
        return (stats.n_tokens - stats.zero_count).numpy(), "post-activation is not exactly zero"
    column = stats.threshold_names.index(active)
    return stats.above_count[:, :, column].numpy(), f"contribution >= the layer's {active} threshold"
