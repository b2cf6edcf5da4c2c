"""Which rule needs the fewest active neurons for a rise of perplexity, and how well the text tells them apart.

A curve goes from the dense model (rise 0) to every neuron cut. Where it crosses a rise is read off by interpolation
between the passes: linear in activation ratio against asinh(rise / (target / 4)), which is the logarithm of the rise
near the target and linear below. Rises jitter, so the mean of their running maximum and running minimum is taken. KL
divergences are read in the same way.

The text is a sample: windows are drawn with replacement, the same draws for every curve, and the crossing is read off
each draw's own rises and ratios. Differences between rules are therefore paired. The percentile interval is widened as
a t interval would be (`interval`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from neuron_sparsity.bootstrap import MIN_WINDOWS, ends, window_draws
from neuron_sparsity.rule_passes import RulePass

__all__ = ["Verdict", "compare", "crossing", "crossings"]

_DRAWS = 2000


@dataclass(frozen=True)
class Verdict:
    """What rules need at one p, fewest first.

    Attributes:
        metric: `"ppl"`, or `"kl"`: the KL divergence is what it would be as a rise of perplexity by p.
        p_percent: Rise.
        order: Labels of the rules that reach it, by activation ratio.
        difference: Activation ratio of each minus that of the first.
        low: Lower end of the 95 % interval of that difference; None with fewer than 5 windows.
        high: Upper end.
        apart: Whether the interval leaves out zero; None without an interval.
    """

    metric: str
    p_percent: float
    order: tuple[str, ...]
    difference: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    apart: tuple[bool | None, ...]

    @property
    def first(self) -> str | None:
        """The rule that needs fewest; None where none reaches p."""
        return self.order[0] if self.order else None

    @property
    def not_apart(self) -> tuple[str, ...] | None:
        """Rules that the text does not tell from the first; None where it has too few windows to tell."""
        if any(told is None for told in self.apart):
            return None
        return tuple(label for label, told in zip(self.order[1:], self.apart[1:], strict=True) if not told)

    @property
    def first_alone(self) -> bool:
        """Whether the text tells the first from every other rule."""
        return len(self.order) > 1 and all(self.apart[1:])

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """Return what `to_json` was made from."""
        lists = {name: tuple(data[name]) for name in cls.__dataclass_fields__ if name not in ("metric", "p_percent")}
        return cls(data["metric"], data["p_percent"], **lists)


def crossing(
    ratios: Float[np.ndarray, "draw pass"], rises: Float[np.ndarray, "draw pass"], target: float
) -> Float[np.ndarray, " draw"]:
    """Return the activation ratio at which each row's rise reaches the target.

    Args:
        ratios: Activation ratio of each pass, from the dense model to everything cut.
        rises: Mean rise of the loss in nats.
        target: Rise that is wanted, > 0.

    Returns:
        One number a row; NaN where no pass rises as far.

    Example:
        >>> crossing(np.array([[1.0, 0.6, 0.0]]), np.array([[0.0, 0.01, 9.0]]), 0.01)
        array([0.6])
    """
    upper = np.maximum.accumulate(rises, axis=1)
    lower = np.minimum.accumulate(rises[:, ::-1], axis=1)[:, ::-1]
    rises, unit = (upper + lower) / 2, target / 4
    after = np.argmax(rises >= target, axis=1)
    rows = np.arange(len(rises))
    reached = rises[rows, after] >= target
    before = np.maximum(after - 1, 0)
    y = np.arcsinh(np.stack((rises[rows, before], rises[rows, after])) / unit)
    share = (math.asinh(target / unit) - y[0]) / np.maximum(y[1] - y[0], 1e-300)
    share = np.where(after == 0, 1.0, np.clip(share, 0.0, 1.0))
    found = ratios[rows, before] + share * (ratios[rows, after] - ratios[rows, before])
    return np.where(reached, found, np.nan)


def crossings(
    curves: Sequence[Sequence[RulePass]], targets: Sequence[float], metric: str = "ppl"
) -> tuple[Float[np.ndarray, "curve target"], Float[np.ndarray, "draw curve target"] | None]:
    """Return the activation ratio of every curve at every target, and the same of every draw of windows.

    Args:
        curves: Passes over the same windows, from the dense model to everything cut.
        targets: Rises of the mean loss, or KL divergences, in nats.
        metric: `"ppl"` or `"kl"`.

    Returns:
        The ratios, NaN where a target is not reached; and those of the draws, None with fewer than 5 windows.
    """
    scored = curves[0][0].scored.astype(np.float64)
    n = len(scored)
    whole = _read(curves, targets, metric, np.ones((1, n)), scored)[0]
    if n < MIN_WINDOWS:
        return whole, None
    generator = np.random.default_rng(0)
    blocks = [_read(curves, targets, metric, weights, scored) for weights in window_draws(n, generator, n_draws=_DRAWS)]
    return whole, np.concatenate(blocks)


def _read(
    curves: Sequence[Sequence[RulePass]],
    targets: Sequence[float],
    metric: str,
    weights: Float[np.ndarray, "draw window"],
    scored: Float[np.ndarray, " window"],
) -> Float[np.ndarray, "draw curve target"]:
    found = np.empty((len(weights), len(curves), len(targets)))
    n_scored = np.maximum(weights @ scored, 1.0)[:, None]
    for index, passes in enumerate(curves):
        rises = weights @ np.stack([one.rise if metric == "ppl" else one.kl for one in passes], axis=1) / n_scored
        ratios = weights @ np.stack([one.active for one in passes], axis=1) / weights.sum(axis=1)[:, None]
        for column, target in enumerate(targets):
            found[:, index, column] = crossing(ratios, rises, target)
    return found


def interval(draws: Float[np.ndarray, " draw"], n_windows: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of draws, widened for few windows; a draw that is not reached counts as 0."""
    low, high = ends(np.nan_to_num(draws), n_windows)
    return float(low), float(high)


def compare(
    labels: Sequence[str],
    metric: str,
    p_percent: float,
    ratios: Float[np.ndarray, " curve"],
    draws: Float[np.ndarray, "draw curve"] | None,
    n_windows: int,
) -> Verdict:
    """Return the rules in the order of what they need at one p, with paired intervals of the differences to the first.

    Args:
        labels: Of the curves.
        metric: `"ppl"` or `"kl"`.
        p_percent: Rise of it.
        ratios: Activation ratio of each curve there; NaN where it is not reached.
        draws: The same for each draw of windows; None with too few.
        n_windows: Windows that were drawn from.

    Example:
        >>> verdict = compare(["a", "b"], "ppl", 1.0, np.array([0.7, 0.6]), None, 3)
        >>> verdict.order, verdict.apart
        (('b', 'a'), (None, None))
    """
    order = [int(i) for i in np.argsort(ratios, kind="stable") if not math.isnan(ratios[i])]
    names = tuple(labels[i] for i in order)
    differences = tuple(float(ratios[i] - ratios[order[0]]) for i in order)
    if draws is None:
        unknown = (None,) * len(order)
        return Verdict(metric, p_percent, names, differences, unknown, unknown, unknown)
    told = np.nan_to_num(draws)
    ends = [interval(told[:, i] - told[:, order[0]], n_windows) for i in order]
    low, high = tuple(end[0] for end in ends), tuple(end[1] for end in ends)
    apart = tuple(not bottom <= 0 <= top for bottom, top in ends)
    return Verdict(metric, p_percent, names, differences, low, high, apart)
