"""Counts of dead, rare, alive and always-on neurons, and which activity definition a run can give.

The classes are those of the atlas, by the same rule and from the same counts; the never active are a part of the dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neuron_sparsity.report._text import number
from neuron_sparsity.search import search_name
from neuron_sparsity.taxonomy.classes import ALWAYS_ON, CLASSES, DEAD, NONZERO, RARE, ClassRule, active_counts

if TYPE_CHECKING:
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = [
    "Activity",
    "ClassCounts",
    "activity",
    "array",
    "class_counts",
    "exactly_zero",
    "largest_is_first",
    "layer_labels",
    "upper_bound",
]


@dataclass(frozen=True)
class Activity:
    """How often each neuron is active.

    Attributes:
        frequency: float64 [layer, neuron], share of tokens on which the neuron is active.
        never: bool [layer, neuron], active on no token at all.
        definition: What "active" means here, in words.
        exact: False where the frequency was read off the histogram.
    """

    frequency: NDArray[np.float64]
    never: NDArray[np.bool_]
    definition: str
    exact: bool = True

    @property
    def codes(self) -> NDArray[np.int8]:
        """Index in `taxonomy.classes.CLASSES` of the class of each neuron."""
        return ClassRule().codes_at(self.frequency)

    @property
    def dead(self) -> NDArray[np.bool_]:
        """Whether each neuron is dead."""
        return self.codes == CLASSES.index("dead")


@dataclass(frozen=True)
class ClassCounts:
    """Neurons per layer in each class, int64 [layer]; dead + rare + alive + always_on is the layer's width."""

    dead: NDArray[np.int64]
    rare: NDArray[np.int64]
    alive: NDArray[np.int64]
    always_on: NDArray[np.int64]
    never: NDArray[np.int64]


def array(values: Any) -> NDArray[Any]:
    """Return a CPU tensor, array or list as a NumPy array."""
    return np.asarray(values)


def layer_labels(stats: NeuronStatistics) -> list[int]:
    """Return the block index of each row of the statistics: hybrid stacks have blocks without an MLP."""
    labels = getattr(stats.model, "layers", None)
    rows = array(stats.zero_count).shape[0]
    return [int(label) for label in labels] if labels else list(range(rows))


def exactly_zero(stats: NeuronStatistics) -> Activity:
    """Return activity under "exactly zero or not": active iff the post-activation is not zero."""
    return _counted(stats, NONZERO)


def activity(stats: NeuronStatistics, result: SparsityResult | None = None) -> Activity:
    """Return activity under the threshold of `result`, else under the first recorded one, else "exactly zero or not".

    Counts under recorded thresholds are exact. Where the recorder did not count under the thresholds of `result`, the
    frequency comes from the histogram and says so. A result that did not reach its target has no thresholds to go by.
    """
    names = tuple(stats.threshold_names)
    if result is None:
        return _counted(stats, None)
    wanted = np.array([layer.threshold for layer in result.layers], dtype=np.float64)
    if not result.reached or not wanted.size or not (np.isfinite(wanted) & (wanted > 0)).all():
        return exactly_zero(stats)
    recorded = array(stats.thresholds)
    for column in range(len(names)):
        if np.allclose(recorded[:, column], wanted, rtol=1e-5, atol=0.0):
            return _counted(stats, names[column])
    frequency = array(stats.activation_frequency_at(wanted.tolist())).astype(np.float64)
    name = search_name(result.metric, result.p_percent)
    definition = f"contribution ≥ the layer's {name} threshold (read off the histogram)"
    return Activity(frequency, frequency <= 0, definition, exact=False)


def _counted(stats: NeuronStatistics, active: str | None) -> Activity:
    counts, words = active_counts(stats, active)
    return Activity(counts / stats.n_tokens, counts == 0, words.replace(">=", "≥"))


def class_counts(
    active: Activity, *, dead: float = DEAD, rare: float = RARE, always_on: float = ALWAYS_ON
) -> ClassCounts:
    """Return the neurons per layer in each class.

    Args:
        active: How often each neuron is active.
        dead: A neuron active on less than this share of tokens is dead.
        rare: One that is not dead and below this share is rare.
        always_on: One above this share is always on.

    Raises:
        ValueError: Unless 0 <= dead <= rare <= always_on <= 1.
    """
    code = ClassRule("frequency", dead, rare, always_on).codes_at(active.frequency)
    sizes = {name: (code == index).sum(axis=1) for index, name in enumerate(CLASSES)}
    return ClassCounts(**sizes, never=active.never.sum(axis=1))


def largest_is_first(stats: NeuronStatistics) -> NDArray[np.bool_]:
    """Return bool [layer, neuron]: whether a neuron's largest contribution is on a window's first token.

    That token counts for the largest contribution and is never an example, so the two differ.
    """
    largest, values = array(stats.contribution_max), array(stats.example_value)
    if values.shape[2] == 0:
        return np.zeros(largest.shape, dtype=bool)
    top = np.where(array(stats.example_position)[..., 0] >= 0, values[..., 0], 0.0)
    return np.asarray(largest > top * (1 + 1e-6))


def upper_bound(n_tokens: int) -> str:
    """Return the 95 % upper bound 3/N on the frequency of a neuron never seen active, as text with N's arithmetic."""
    return f"3/N = {number(300.0 / n_tokens)}\u00a0%"
