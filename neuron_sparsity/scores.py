"""What neurons can be ranked by: name -> what the score is, and how it comes from what was measured.

`z` is a post-activation, `c = |z| ||W_out||` its contribution, `g = dL/dz` the gradient of the summed next-token loss.
Means are over all tokens. The smallest score goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.saliency import NeuronSaliency
from neuron_sparsity.statistics import NeuronStatistics

__all__ = ["DEFAULT_RANKING", "RANKINGS", "Measured", "Score", "best_ranking"]

DEFAULT_RANKING = "fisher_mean_shrunk"
"""The one that lets most neurons go, replaced by their means (`benchmarks/rankings.py` measures)."""


@dataclass(frozen=True)
class Measured:
    """What a score may come from.

    Attributes:
        by: Name of the score that is wanted.
        stats: A recording, or None.
        saliency: A pass for gradients, or None.
        seed: Of random numbers.
    """

    by: str
    stats: NeuronStatistics | None
    saliency: NeuronSaliency | None
    seed: int = 0

    @property
    def model(self) -> ModelInfo:
        """What was measured."""
        return self.either.model

    @property
    def either(self) -> NeuronStatistics | NeuronSaliency:
        """The recording if there is one, else the pass for gradients."""
        found = self.saliency if self.stats is None else self.stats
        assert found is not None
        return found

    def source(self, needs: str) -> NeuronStatistics | NeuronSaliency:
        """Return what a score was taken from, whose text and means are the ranking's."""
        if needs == "saliency":
            return self.gradients()
        return self.recorded() if needs == "statistics" else self.either

    def recorded(self) -> NeuronStatistics:
        """Return the recording.

        Raises:
            ValueError: If there is none.
        """
        if self.stats is None:
            raise ValueError(f"by={self.by!r} needs statistics: rank(record(model, corpus), by={self.by!r})")
        return self.stats

    def gradients(self) -> NeuronSaliency:
        """Return the pass for gradients.

        Raises:
            ValueError: If there is none.
        """
        if self.saliency is None:
            raise ValueError(f"by={self.by!r} needs a saliency pass: rank(saliency(model, corpus), by={self.by!r})")
        return self.saliency


def _random(measured: Measured) -> Tensor:
    generator = torch.Generator().manual_seed(measured.seed)
    info = measured.model
    return torch.rand(info.n_layers, info.d_mlp, generator=generator, dtype=torch.float64)


def _frequency(measured: Measured) -> Tensor:
    stats = measured.recorded()
    if not stats.threshold_names:
        raise ValueError(
            "by='activation_frequency' needs statistics recorded under thresholds; "
            "record(model, corpus, thresholds={result.name: result.thresholds})"
        )
    return stats.activation_frequency(0)


def _fluctuation(measured: Measured) -> Tensor:
    stats = measured.recorded()
    mean = stats.mean_activation * stats.w_norm.double()
    return (stats.contribution_sq_sum / stats.n_tokens - mean**2).clamp_min(0).sqrt()


def _wanda(measured: Measured) -> Float[Tensor, "layer neuron"]:
    found = measured.gradients()
    return found.activation_sq_sum.sqrt() * found.w_l1


def _shrunk(constant: Callable[[NeuronSaliency], Tensor | float]) -> Callable[[Measured], Tensor]:
    """Geometric mean of the mean product and the product of the means: few tokens tell the second much better."""

    def score(measured: Measured) -> Tensor:
        found = measured.gradients()
        a = constant(found)
        apart = found.mean_square(a) * found.gradient_sq_sum / found.n_tokens
        return (found.fisher(a) * apart).sqrt()

    return score


def _per_token(name: str) -> Callable[[Measured], Tensor]:
    def score(measured: Measured) -> Tensor:
        found = measured.gradients()
        total: Tensor = getattr(found, name)
        return total / found.n_tokens

    return score


class Score(NamedTuple):
    """One entry of `RANKINGS`.

    Attributes:
        definition: What the score is, in words.
        of: How it comes from what was measured, float64 [layer, neuron].
        needs: Of what was measured: `"statistics"`, `"saliency"` or `"nothing"`.
    """

    definition: str
    of: Callable[[Measured], Tensor]
    needs: Literal["statistics", "saliency", "nothing"]


RANKINGS: dict[str, Score] = {
    "contribution": Score("mean of |z| * ||W_out||", lambda found: found.recorded().mean_contribution, "statistics"),
    "rms": Score("root mean square of |z| * ||W_out||", lambda found: found.recorded().rms_contribution, "statistics"),
    "fluctuation": Score(
        "standard deviation of z, times ||W_out|| (FLAP, arXiv:2312.11983)", _fluctuation, "statistics"
    ),
    "maximum": Score(
        "largest contribution on any token", lambda found: found.recorded().contribution_max.double(), "statistics"
    ),
    "activation_frequency": Score(
        "share of tokens with the contribution above the layer's threshold", _frequency, "statistics"
    ),
    "weight_norm": Score("||W_out||", lambda found: found.recorded().w_norm.double(), "statistics"),
    "random": Score("uniform random numbers, the control", _random, "nothing"),
    "wanda": Score(
        "||z||_2 over the tokens, times ||W_out||_1 (Wanda, arXiv:2306.11695, summed over the outputs)",
        _wanda,
        "saliency",
    ),
    "residual": Score(
        "mean of the contribution over the norm of the residual stream", _per_token("share_sum"), "saliency"
    ),
    "residual_rms": Score(
        "root mean square of the contribution over the norm of the residual stream",
        lambda found: _per_token("share_sq_sum")(found).sqrt(),
        "saliency",
    ),
    "taylor": Score(
        "mean of |z g|, g the gradient of the loss: first order (arXiv:1611.06440)",
        _per_token("product_abs_sum"),
        "saliency",
    ),
    "taylor_mean": Score(
        "mean of |(z - mean z) g|: first order, of mean replacement", _per_token("centred_abs_sum"), "saliency"
    ),
    "fisher": Score(
        "mean of (z g)^2: second order (arXiv:1801.05787)", lambda found: found.gradients().fisher(), "saliency"
    ),
    "fisher_mean": Score(
        "mean of ((z - mean z) g)^2: second order, of mean replacement",
        lambda found: found.gradients().fisher(found.gradients().mean_activation),
        "saliency",
    ),
    "fisher_shrunk": Score(
        "fisher, shrunk: its geometric mean with mean z^2 times mean g^2", _shrunk(lambda found: 0.0), "saliency"
    ),
    "fisher_mean_shrunk": Score(
        "fisher_mean, shrunk: its geometric mean with the variance of z times mean g^2",
        _shrunk(lambda found: found.mean_activation),
        "saliency",
    ),
}
"""Name -> what the score is, and how it comes from what was measured."""


def best_ranking(replacement: str, *, gradients: bool = True) -> str:
    """Return the ranking that lets most neurons go under a replacement (`benchmarks/rankings.py` measures).

    Args:
        replacement: What takes a neuron's place.
        gradients: Whether there can be a saliency pass.

    Example:
        >>> best_ranking("mean"), best_ranking("zero"), best_ranking("mean", gradients=False)
        ('fisher_mean_shrunk', 'fisher_shrunk', 'maximum')
    """
    if not gradients:
        return "maximum"
    return "fisher_shrunk" if replacement == "zero" else DEFAULT_RANKING
