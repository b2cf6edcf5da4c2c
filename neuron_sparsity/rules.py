"""Rules by which a neuron counts as active on a token, each with one parameter, and what cuts by them in a model.

    rule      parameter   a neuron stays active where
    fat       eps         its score is at least eps, the same in all layers
    quantile  quantile    its score is at least that quantile of its layer's scores in the dense run
    cett      CETT        c >= t, the t of its layer whose cut makes that error in the dense run
    topk      k           its score is among the k largest of its token and layer
    topp      share       it is in the smallest set of its token and layer that holds that share of the scores
    zeros     none        its post-activation is not exactly zero

The score is `|s|`, the activation function's own output, or the contribution `c = |z| * ||W_out||`; CETT is defined on
contributions. Whatever the rule, a neuron whose z is exactly zero is not active: it puts nothing out.

Rules are compared through a `strength` in [0, 1]: at 0 a rule cuts nothing but zeros, at 1 everything.

FAT and Top-k: as in *Sparsing Law*, arXiv:2411.02335, section 3; Top-p: the smallest set that holds a share of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.curves import CettCurves
from neuron_sparsity.kernels.reference import contributions
from neuron_sparsity.metrics import EXACT_ZERO_THRESHOLD, topk_mask, topp_mask

__all__ = [
    "RULES",
    "Cut",
    "DenseScores",
    "Rule",
    "ScoreHistogram",
    "ThresholdCut",
    "TopKCut",
    "TopPCut",
    "parse_rules",
]

Score = Literal["s", "contribution"]
SCORES: tuple[Score, ...] = ("s", "contribution")

RULES = {
    "cett": "c >= t of the layer, one CETT for all layers",
    "fat": "score >= eps, one eps for all layers",
    "quantile": "score >= a quantile of the layer's scores, one quantile for all layers",
    "topk": "the k largest scores of each token and layer",
    "topp": "each token's smallest set that holds a share of the layer's scores",
    "zeros": "z is not exactly zero",
}
PARAMETERS = {"cett": "CETT", "fat": "eps", "quantile": "quantile", "topk": "k", "topp": "share", "zeros": ""}
_EVERYTHING = float(np.finfo(np.float32).max)  # a threshold that also cuts what grows once layers before go
_SHIFT = 16  # of a float32's bits: bins keep its exponent and seven bits of its mantissa, each 0.8 % wide
_N_BINS = 1 << (31 - _SHIFT)
_TOPP_GRID = np.geomspace(1e-5, 1.0, 61)  # shares left out
_CETT_GRID = np.geomspace(1e-4, 1.0, 200)


class Cut(Protocol):
    """Cuts one batch of one layer in the running model."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cuts that do the same."""

    def __call__(
        self, layer: int, z: Float[Tensor, "token neuron"], s: Float[Tensor, "token neuron"], w_norm: Tensor
    ) -> tuple[Float[Tensor, "token neuron"], Int[Tensor, " token"]]:
        """Return `z` with what is not active zero, and how many neurons of each token are active. May overwrite `z`."""


@dataclass(frozen=True)
class ThresholdCut:
    """Active where the score is at least the layer's threshold.

    Attributes:
        score: `"s"` or `"contribution"`.
        thresholds: One a layer, > 0.
        backend: Of the kernel that cuts by contributions.

    Example:
        >>> cut = ThresholdCut("contribution", (2.0,))
        >>> cut(0, torch.tensor([[3.0, -1.0]]), torch.tensor([[0.1, 9.0]]), torch.ones(2))
        (tensor([[3., -0.]]), tensor([1]))
    """

    score: Score
    thresholds: tuple[float, ...]
    backend: kernels.Backend = "auto"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cuts that do the same."""
        if min(self.thresholds) == _EVERYTHING:
            return ("everything",)
        return ("threshold", self.score, *self.thresholds)

    def __call__(self, layer: int, z: Tensor, s: Tensor, w_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a batch of a layer."""
        if self.score == "contribution":
            active = kernels.threshold_mask(z, w_norm, self.thresholds[layer], backend=self.backend)
            return z, active
        return _kept(z, s.float().abs() >= self.thresholds[layer])


@dataclass(frozen=True)
class TopKCut:
    """Active among the k largest scores of a token; ties go to the smaller index. Exact zeros are never active.

    Example:
        >>> TopKCut("s", 1)(0, torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 1.0]]), torch.ones(2))
        (tensor([[3., 0.]]), tensor([1]))
    """

    score: Score
    k: int

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cuts that do the same."""
        return ("topk", self.score, self.k) if self.k else ("everything",)

    def __call__(self, layer: int, z: Tensor, s: Tensor, w_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a batch of a layer."""
        if self.k == 0:
            return _kept(z, torch.zeros_like(z, dtype=torch.bool))
        return _kept(z, topk_mask(_scores(self.score, z, s, w_norm), self.k))


@dataclass(frozen=True)
class TopPCut:
    """Active in the smallest set of a token's neurons that holds a share of the layer's scores.

    Example:
        >>> TopPCut("s", 0.6)(0, torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 1.0]]), torch.ones(2))
        (tensor([[3., 0.]]), tensor([1]))
    """

    score: Score
    share: float

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for cuts that do the same."""
        return ("topp", self.score, self.share) if self.share > 0 else ("everything",)

    def __call__(self, layer: int, z: Tensor, s: Tensor, w_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a batch of a layer."""
        if self.share >= 1:  # a sum would round the smallest away
            return _kept(z, torch.ones_like(z, dtype=torch.bool))
        return _kept(z, topp_mask(_scores(self.score, z, s, w_norm), self.share))


def _scores(score: Score, z: Tensor, s: Tensor, w_norm: Tensor) -> Tensor:
    return contributions(z, w_norm) if score == "contribution" else s.float().abs()


def _kept(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return z * mask, (mask & (z != 0)).sum(dim=1)


class ScoreHistogram:
    """How the scores of each layer are spread: exact counts of (token, neuron) pairs in bins 0.8 % wide.

    Example:
        >>> spread = ScoreHistogram(1)
        >>> spread.add(0, torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
        >>> round(spread.quantile([0.5])[0], 1), spread.maximum, spread.share_at_least([1.5])
        (2.0, 4.0, 0.5)
    """

    def __init__(self, n_layers: int) -> None:
        self.counts = np.zeros((n_layers, _N_BINS), dtype=np.int64)
        self.maximum = 0.0

    def add(self, layer: int, scores: Float[Tensor, "*rows neuron"]) -> None:
        """Count a batch of scores, >= 0."""
        bits = scores.float().contiguous().view(torch.int32)
        counted = torch.bincount((bits >> _SHIFT).flatten().long(), minlength=_N_BINS)
        self.counts[layer] += counted[:_N_BINS].cpu().numpy()
        self.maximum = max(self.maximum, float(scores.max()))

    def quantile(self, shares: Sequence[float]) -> list[float]:
        """Return the score below which each layer has its share of pairs: linear inside a bin, > 0; infinite at 1."""
        return [self._quantile(counts, share) for counts, share in zip(self.counts, shares, strict=True)]

    def common_quantile(self, share: float) -> float:
        """Return the score below which that share of all layers' pairs lies."""
        return self._quantile(self.counts.sum(axis=0), share)

    def share_at_least(self, thresholds: Sequence[float]) -> float:
        """Return the share of all pairs whose score is at least its layer's threshold."""
        kept = 0.0
        for counts, threshold in zip(self.counts, thresholds, strict=True):
            index = int(np.float32(threshold).view(np.int32)) >> _SHIFT
            low, high = _edges(index)
            kept += counts[index + 1 :].sum() + counts[index] * (high - threshold) / (high - low)
        return float(kept / self.counts.sum())

    def _quantile(self, counts: Int[np.ndarray, " bin"], share: float) -> float:
        rank, below = share * counts.sum(), np.cumsum(counts)
        if share >= 1:
            return _EVERYTHING
        index = int(np.searchsorted(below, rank, side="right"))
        if index == 0:  # among the exact zeros
            return EXACT_ZERO_THRESHOLD
        low, high = _edges(index)
        inside = (rank - below[index - 1]) / counts[index]
        return float(np.float32(low + inside * (high - low)))


def _edges(index: int) -> tuple[float, float]:
    low, high = np.array([index << _SHIFT, (index + 1) << _SHIFT], dtype=np.int32).view(np.float32)
    return float(low), float(high) if math.isfinite(high) else _EVERYTHING


@dataclass(frozen=True, eq=False)
class DenseScores:
    """What the rules need of the dense run.

    Attributes:
        d_mlp: Neurons a layer.
        n_layers: Layers.
        nonzero_ratio: Share of (token, neuron) pairs whose z is not exactly zero.
        spread: How each score is spread.
        topp_ratio: Activation ratio of Top-p at the shares left out `_TOPP_GRID`, on a sample of tokens, by score.
        curves: CETT of thresholds.
    """

    d_mlp: int
    n_layers: int
    nonzero_ratio: float
    spread: dict[Score, ScoreHistogram]
    topp_ratio: dict[Score, Float[np.ndarray, " share"]]
    curves: CettCurves


def topp_counts(scores: Float[Tensor, "token neuron"]) -> Float[np.ndarray, " share"]:
    """Return how many (token, neuron) pairs Top-p keeps at each share left out of `_TOPP_GRID`."""
    ordered = scores.double().sort(dim=1, descending=True).values
    before = ordered.cumsum(dim=1) - ordered
    relative = before / ordered.sum(dim=1, keepdim=True).clamp_min(1e-300)
    wanted = torch.from_numpy(1 - _TOPP_GRID).to(relative.device)
    kept = [((relative < share) & (ordered > 0)).sum() for share in wanted]
    return np.array([float(n) for n in kept])


@dataclass(frozen=True)
class Rule:
    """One rule on one score.

    Attributes:
        name: A key of `RULES`.
        score: `"s"` or `"contribution"`.

    Example:
        >>> Rule("topk", "s").label, Rule("topk", "s").parameter_name
        ('topk on |s|', 'k')
    """

    name: str
    score: Score

    @property
    def label(self) -> str:
        """Name and score for people."""
        if self.name == "zeros":
            return "exact zeros"
        return f"{self.name} on {'|s|' if self.score == 's' else 'c'}"

    @property
    def parameter_name(self) -> str:
        """What its parameter is called."""
        return PARAMETERS[self.name]

    def strength_at(self, ratio: float, dense: DenseScores) -> float:
        """Return the strength at which this share of pairs stays active on the dense run, about."""
        if self.name == "topp":
            kept = dense.topp_ratio[self.score]
            return float(np.exp(np.interp(-ratio, -kept, np.log(_TOPP_GRID))))
        if self.name == "cett":
            kept = dense.curves.activation_ratio_at(_CETT_GRID)
            return float(np.exp(np.interp(-ratio, -kept, np.log(_CETT_GRID))))
        if self.name == "fat":
            spread = dense.spread[self.score]
            return min(1.0, spread.common_quantile(1 - ratio) / spread.maximum)
        return 1 - ratio

    def parameter_at(self, strength: float, dense: DenseScores) -> float:
        """Return the rule's own parameter at a strength."""
        if self.name == "fat":
            return _EVERYTHING if strength >= 1 else strength * dense.spread[self.score].maximum
        if self.name == "topk":
            return float(round((1 - strength) * dense.d_mlp))
        return 1 - strength if self.name == "topp" else strength

    def strength_of(self, parameter: float, dense: DenseScores) -> float:
        """Return the strength that a parameter stands for: of Top-k one in `d_mlp + 1` steps."""
        if self.name == "fat":
            return min(1.0, parameter / dense.spread[self.score].maximum)
        if self.name == "topk":
            return 1 - parameter / dense.d_mlp
        return 1 - parameter if self.name == "topp" else parameter

    def cut(self, parameter: float, dense: DenseScores, backend: kernels.Backend = "auto") -> Cut:
        """Return what cuts by this rule.

        Args:
            parameter: The rule's own: eps, quantile, CETT, k or share; of `zeros` any.
            dense: What the dense run showed.
            backend: Of the kernels.

        Raises:
            ValueError: If the parameter is out of its range.
        """
        self._check(parameter, dense)
        if self.name == "topk":
            return TopKCut(self.score, int(parameter))
        if self.name == "topp":
            return TopPCut(self.score, parameter)
        if self.name == "cett":
            return ThresholdCut("contribution", tuple(dense.curves.thresholds_at(parameter)), backend)
        if self.name == "quantile":
            thresholds = dense.spread[self.score].quantile([parameter] * dense.n_layers)
            return ThresholdCut(self.score, tuple(thresholds), backend)
        eps = EXACT_ZERO_THRESHOLD if self.name == "zeros" else max(parameter, EXACT_ZERO_THRESHOLD)
        return ThresholdCut(self.score, (float(np.float32(eps)),) * dense.n_layers, backend)

    def _check(self, parameter: float, dense: DenseScores) -> None:
        high = {"fat": math.inf, "topk": dense.d_mlp, "zeros": math.inf}.get(self.name, 1.0)
        if not 0 <= parameter <= high:
            raise ValueError(f"{self.parameter_name} of {self.name} must be in [0, {high:g}], got {parameter:g}")
        if self.name == "topk" and parameter != int(parameter):
            raise ValueError(f"k must be a whole number, got {parameter:g}")


def parse_rules(names: Sequence[str] = ()) -> tuple[Rule, ...]:
    """Return rules by their names: `cett`, `topk:s`, `topk:contribution` (`topk:c`), or `topk` for both scores.

    Args:
        names: None of them stands for all rules on both scores.

    Raises:
        ValueError: If a name is unknown or given twice, or a rule has no such score.

    Example:
        >>> [rule.label for rule in parse_rules(["topk", "cett"])]
        ['topk on |s|', 'topk on c', 'cett on c']
    """
    found: list[Rule] = []
    for name in names or RULES:
        rule, _, score = name.partition(":")
        score = {"c": "contribution"}.get(score, score)
        if rule not in RULES:
            raise ValueError(f"no rule {rule!r}; rules are {', '.join(RULES)}")
        if score not in ("", *SCORES):
            raise ValueError(f"no score {score!r} in {name!r}; scores are s and contribution (or c)")
        if rule in ("cett", "zeros"):
            if score == "s":
                raise ValueError(f"{rule} is defined on contributions only, got {name!r}")
            scores: tuple[Score, ...] = ("contribution",)
        else:
            scores = SCORES if not score else (score,)  # type: ignore[assignment]
        for one in scores:
            if Rule(rule, one) in found:
                raise ValueError(f"{Rule(rule, one).label} is named twice")
            found.append(Rule(rule, one))
    return tuple(found)
