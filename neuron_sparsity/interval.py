"""How far a sampled text lets CETT-PPL-p% be known: a paired bootstrap over windows, without further passes.

Each truncated pass near the answer leaves, for every window, the sums of its paired differences (truncated minus dense,
token by token) and the share of neurons active in it. Windows are drawn with replacement; for each draw the mean rise
shifts by some Delta, and with it the CETT that costs p percent:

- perplexity: a draw shifts the part of the rise that is linear in the change of the logits, and so in CETT (the mean
  of it over all text is small; KL divergence has none of it): `u^slope + (Delta / target) u = 1`, u = CETT / answer;
- KL divergence: a draw scales all of it: `(1 + Delta / target) u^slope = 1`.

The jitter of single passes is added to Delta. The percentile interval is widened as a t interval would be, since a
bootstrap of few windows is too narrow (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from neuron_sparsity.bootstrap import DRAWS, MIN_WINDOWS, ends, window_draws
from neuron_sparsity.curves import CettCurves
from neuron_sparsity.evaluation import Evaluation
from neuron_sparsity.search import RootEstimate, is_near

__all__ = ["Estimate", "estimate", "paired_interval"]


@dataclass(frozen=True)
class Estimate:
    """Where a metric puts p, by a local fit through all passes near it.

    Attributes:
        metric: `"cett_ppl"` or `"cett_kl"`.
        cett: At which the rise of perplexity (or the KL divergence, read as one) is p percent.
        activation_ratio: There, in the truncated run.
        low: Lower end of the 95 % interval of the activation ratio, for text like this; None with fewer than 5 windows.
        high: Upper end.
        n_windows: Windows that were drawn from.
        n_passes: Truncated passes that the fit rests on.
        tokens_to_halve: Tokens of such text that would make the interval half as wide.
    """

    metric: str
    cett: float
    activation_ratio: float
    low: float | None
    high: float | None
    n_windows: int
    n_passes: int
    tokens_to_halve: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Estimate:
        """Return what `to_json` was made from."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def estimate(
    evaluations: Sequence[Evaluation],
    root: RootEstimate,
    target: float,
    curves: CettCurves,
    *,
    metric: str,
    n_tokens: int,
) -> Estimate:
    """Return the answer of one metric with its interval.

    Args:
        evaluations: Truncated passes; those near the root are used.
        root: Where the fit puts the target.
        target: Rise of the mean loss or KL divergence that is wanted, in nats.
        curves: How the dense run's activation ratio goes with CETT.
        metric: `"ppl"` or `"kl"`.
        n_tokens: Of the text.
    """
    near = [e for e in evaluations if is_near(e.mean(metric), target)]
    there = float(curves.activation_ratio_at(np.array(root.cett)))
    # Each pass's ratio, carried to the root along the dense run's curve.
    carried = [e.activation_ratio + there - float(curves.activation_ratio_at(np.array(e.cett))) for e in near]
    ratio = float(np.mean(carried))
    n_windows = len(near[0].scored)
    low = high = None
    if n_windows >= MIN_WINDOWS:
        scale = [math.exp(-root.slope * math.log(e.cett / root.cett)) for e in near]
        sums = np.mean([s * (e.rise if metric == "ppl" else e.kl) for s, e in zip(scale, near, strict=True)], axis=0)
        active = np.mean([e.window_activation - e.window_activation.mean() for e in near], axis=0)
        ratios = _draws(sums, near[0].scored, active, root, target, curves, metric == "ppl") + ratio - there
        low, high = (float(np.clip(edge, 0.0, 1.0)) for edge in ends(ratios, n_windows))
    return Estimate(f"cett_{metric}", root.cett, ratio, low, high, n_windows, len(near), 4 * n_tokens)


def paired_interval(
    sums: Float[np.ndarray, " window"], scored: Float[np.ndarray, " window"]
) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean difference per token, by bootstrap over windows.

    Args:
        sums: Each window's sum of paired differences (changed minus dense, token by token).
        scored: Its scored tokens.

    Returns:
        Lower and upper end; None with fewer than 5 windows that are scored.

    Example:
        >>> low, high = paired_interval(np.array([1.0, 3.0, 2.0, 4.0, 5.0, 3.0]), np.full(6, 10.0))
        >>> round(low, 2), round(high, 2)
        (0.17, 0.45)
    """
    sums, scored = sums[scored > 0], scored[scored > 0]
    n = len(sums)
    if n < MIN_WINDOWS:
        return None
    drawn = _drawn(np.stack((sums, scored), axis=1), np.random.default_rng(0))
    low, high = ends(drawn[:, 0] / drawn[:, 1], n)
    return float(low), float(high)


def _drawn(
    columns: Float[np.ndarray, "window column"], generator: np.random.Generator
) -> Float[np.ndarray, "draw column"]:
    """Return the sums over each draw of as many windows as there are."""
    return np.concatenate([weights @ columns for weights in window_draws(len(columns), generator)])


def _draws(
    sums: Float[np.ndarray, " window"],
    scored: Float[np.ndarray, " window"],
    active: Float[np.ndarray, " window"],
    root: RootEstimate,
    target: float,
    curves: CettCurves,
    linear: bool,
) -> Float[np.ndarray, " draw"]:
    """Return the dense run's activation ratio at each draw's answer, and how the drawn windows differ in it."""
    generator, n = np.random.default_rng(0), len(sums)
    drawn = _drawn(np.stack((sums, scored, active), axis=1), generator)
    shift = drawn[:, 0] / np.maximum(drawn[:, 1], 1.0) - sums.sum() / scored.sum()
    shift = shift / target + root.error * generator.standard_normal(DRAWS)
    log_u = _solved(shift, root.slope) if linear else -np.log(np.maximum(1 + shift, 1e-3)) / root.slope
    cett = np.minimum(root.cett * np.exp(log_u), 1.0)
    return curves.activation_ratio_at(cett) + drawn[:, 2] / n


def _solved(shift: Float[np.ndarray, " draw"], slope: float) -> Float[np.ndarray, " draw"]:
    """Return log u of `u^slope + shift u = 1`, by bisection: the only root there is, as slope > 1."""
    slope = max(slope, 1.2)
    low, high = np.full(len(shift), -12.0), np.full(len(shift), 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = np.exp(slope * middle) + shift * np.exp(middle) > 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
