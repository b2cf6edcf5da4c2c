"""Scores of neurons and their order, weakest first.

No ranking is better than another by its name: layers live on different scales, so that the plain mean contribution,
ranked over a whole model, can do worse than chance. `ablation` measures each against a random control.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.statistics import NeuronStatistics

__all__ = ["RANKINGS", "Ranking", "rank"]


def _random(stats: NeuronStatistics, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(stats.zero_count.shape, generator=generator, dtype=torch.float64)


def _frequency(stats: NeuronStatistics, seed: int) -> Tensor:
    if not stats.threshold_names:
        raise ValueError(
            "by='activation_frequency' needs statistics recorded under thresholds; "
            "record(model, corpus, thresholds={result.name: result.thresholds})"
        )
    return stats.activation_frequency(0)


RANKINGS: dict[str, tuple[str, Callable[[NeuronStatistics, int], Tensor]]] = {
    "contribution": ("mean of |z| * ||W_out||", lambda stats, seed: stats.mean_contribution),
    "activation_frequency": ("share of tokens with the contribution above the layer's threshold", _frequency),
    "maximum": ("largest contribution on any token", lambda stats, seed: stats.contribution_max.double()),
    "weight_norm": ("||W_out||", lambda stats, seed: stats.w_norm.double()),
    "random": ("uniform random numbers, the control", _random),
}
"""Name -> what the score is, and how it comes from statistics and seed."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Neurons in the order in which they would be removed.

    Attributes:
        by: Name of the score.
        scope: `"model"`: one order over all layers by score. `"layer"`: by rank within the own layer, so that every
            layer loses the same share.
        scores: One a neuron; the smallest goes first.
        mean_activation: Mean of each neuron's `z`, which mean replacement puts in its place; None if unknown.
        model: What the scores were measured on.
        corpus: On which text.
        seed: Seed of a random ranking.
    """

    by: str
    scope: str
    scores: Float[Tensor, "layer neuron"]
    mean_activation: Float[Tensor, "layer neuron"] | None
    model: ModelInfo
    corpus: dict[str, Any]
    seed: int = 0

    @property
    def n_neurons(self) -> int:
        """Neurons of the model."""
        return self.scores.numel()

    def order(self) -> Int[Tensor, "neuron 2"]:
        """Return (row, neuron) of every neuron, weakest first; row counts the measured layers from 0."""
        if self.scope == "model":
            return kernels.global_rank(self.scores, self.n_neurons)
        ranks = self.scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return kernels.global_rank(ranks.double(), self.n_neurons)

    def weakest(self, k: int) -> list[tuple[int, int]]:
        """Return (layer, neuron) of the k weakest neurons, weakest first; layer is the block's index.

        Raises:
            ValueError: If k is not between 0 and the number of neurons.
        """
        return self._named(self.order()[: self._checked(k)])

    def strongest(self, k: int) -> list[tuple[int, int]]:
        """Return (layer, neuron) of the k strongest neurons, strongest first.

        Raises:
            ValueError: If k is not between 0 and the number of neurons.
        """
        return self._named(self.order().flip(0)[: self._checked(k)])

    def _checked(self, k: int) -> int:
        if not 0 <= k <= self.n_neurons:
            raise ValueError(f"k must be between 0 and {self.n_neurons}, got {k}")
        return k

    def _named(self, rows: Int[Tensor, "k 2"]) -> list[tuple[int, int]]:
        return [(self.model.layers[layer], neuron) for layer, neuron in rows.tolist()]


def rank(
    stats: NeuronStatistics, *, by: str = "contribution", scope: Literal["model", "layer"] = "model", seed: int = 0
) -> Ranking:
    """Return the neurons of a model ranked by a score, weakest first.

    Args:
        stats: What was recorded.
        by: `"contribution"`, `"activation_frequency"`, `"maximum"`, `"weight_norm"` or `"random"`.
        scope: Over the whole model, or within each layer.
        seed: For `"random"`.

    Returns:
        The ranking; `weakest(k)` and `strongest(k)` read it.

    Raises:
        ValueError: If the name or the scope is unknown, a score is NaN, or the statistics lack what it needs.
    """
    if by not in RANKINGS:
        raise ValueError(f"unknown ranking {by!r}; one of {', '.join(RANKINGS)}")
    if scope not in ("model", "layer"):
        raise ValueError(f"scope must be 'model' or 'layer', got {scope!r}")
    scores = RANKINGS[by][1](stats, seed)
    if torch.isnan(scores).any():
        raise ValueError(f"scores by {by!r} are NaN; the statistics are damaged, record them again")
    return Ranking(by, scope, scores, stats.mean_activation, stats.model, stats.corpus, seed)
