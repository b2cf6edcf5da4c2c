"""Root search for a CETT or a count whose cost is wanted: which place to measure next.

The cost (rise of the mean loss) goes nearly like a power of what is cut, and jitters by rounding. Both facts are used:
lines in logarithms, and no chase after the last digit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["RootEstimate", "at_root", "estimate_root", "is_near", "next_cett", "search_name", "spread"]

_NEAR = 0.25  # in log(rise): points as close to the target lie on one line
_SPREAD = 0.04  # in log(CETT): how far around the root passes are made


@dataclass(frozen=True)
class RootEstimate:
    """Where the wanted rise lies, by all passes near it.

    Attributes:
        cett: The estimate.
        error: Its standard error, in log(rise): 0.01 is one percent of the wanted rise.
        n_points: Passes it rests on.
        slope: Of log(rise) over log(CETT) there.
    """

    cett: float
    error: float
    n_points: int
    slope: float


def search_name(metric: str, p_percent: float) -> str:
    """Return such as `CETT-KL-1%` for the metric `cett_kl`.

    Example:
        >>> search_name("cett_ppl", 0.5)
        'CETT-PPL-0.5%'
    """
    return f"CETT-{metric.removeprefix('cett_').upper()}-{p_percent:g}%"


def is_near(rise: float, target: float) -> bool:
    """Return whether a rise is so close to the target that it lies on one line with it, in logarithms."""
    return rise > 0 and abs(math.log(rise / target)) < _NEAR


def spread(root: RootEstimate, points: Sequence[tuple[float, float]]) -> float:
    """Return where around an estimate the next pass tells most: within 4 %, as far as can be from those made.

    Passes apart from each other show the slope; and the jitter of passes very close to one another may be shared
    (docs/measured.md has how they scatter).
    """
    centre, tried = math.log(root.cett), np.log([e for e, _ in points])
    places = [min(0.0, centre + step) for step in np.linspace(-_SPREAD, _SPREAD, 9)]
    return math.exp(max(places, key=lambda place: (float(np.abs(tried - place).min()), -abs(place - centre))))


def at_root(root: RootEstimate, points: Sequence[tuple[float, float]]) -> float:
    """Return the place nearest to an estimate where no pass was made yet."""
    return math.exp(_untried(math.log(root.cett), [math.log(e) for e, _ in points], -math.inf, 0.0))


def estimate_root(
    points: Sequence[tuple[float, float]], target: float, *, jitter: float, prior_slope: float = 2.5
) -> RootEstimate | None:
    """Return where log(rise) = log(target), on a line through all points near it, and how well that is known.

    Least squares in (log CETT, log rise), with a prior on the slope: few points close to each other tell it badly.
    Their scatter around the line is the jitter; the given one counts like four points more.

    Args:
        points: (CETT, rise of the mean loss in nats) of the passes so far.
        target: Rise that is wanted, > 0.
        jitter: Standard deviation of log(rise) that is expected before any was seen.
        prior_slope: Slope that is expected, give or take a third.

    Returns:
        None while no pass came near.

    Example:
        >>> root = estimate_root([(0.098, 0.0095), (0.1, 0.0102), (0.102, 0.0105)], 0.01, jitter=0.02)
        >>> round(root.cett, 4), round(root.error, 3), root.n_points
        (0.0998, 0.01, 3)
    """
    near = [point for point in _by_distance(points, target) if is_near(math.exp(point[1]), target)]
    if not near:
        return None
    x, y = np.array(near).T
    centre = x.mean()
    design = np.stack((np.ones_like(x), x - centre), axis=1)
    weight = (jitter / (prior_slope / 3)) ** 2  # of the prior, in points
    normal = design.T @ design + np.diag([0.0, weight])
    offset, slope = np.linalg.solve(normal, design.T @ y + np.array([0.0, weight * prior_slope]))
    slope = max(slope, prior_slope / 3)
    at = (math.log(target) - offset) / slope
    residual = y - offset - slope * (x - centre)
    variance = (4 * jitter**2 + float(residual @ residual)) / (len(near) + 3)
    there = np.array([1.0, at])
    error = math.sqrt(variance * float(there @ np.linalg.solve(normal, there)))
    return RootEstimate(min(1.0, math.exp(centre + at)), error, len(near), float(slope))


def next_cett(points: Sequence[tuple[float, float]], target: float, *, prior_slope: float = 2.0) -> float:
    """Return the CETT to try next, from (CETT, rise of the mean loss in nats) of the passes so far.

    log(rise) is nearly a straight line in log(CETT), of slope about two. (The same holds of the share of neurons
    removed for good, with a slope of about one: `ablation` uses this too.) Far from the target the two points nearest
    to it give the line; close to it the points scatter by rounding, and all near ones are shifted along the common
    slope and averaged, so that the search does not chase the jitter. Two neighbouring points on either side of the
    target hold a solution between them, and the search stays there.

    Args:
        points: At least one.
        target: Rise that is wanted, > 0.
        prior_slope: Slope while there are too few points to tell.

    Returns:
        In (0, 1], never a CETT that was tried, except that 1 is returned again where even 1 costs too little.

    Example:
        >>> round(next_cett([(0.1, 0.04)], 0.01), 4)
        0.05
    """
    risen = _by_distance(points, target)
    if not risen:
        return min(1.0, 4 * max(e for e, _ in points))
    slope = _slope(risen, prior_slope)
    near = [(x, y) for x, y in risen if is_near(math.exp(y), target)] or risen[:1]
    proposal = float(np.mean([x + (math.log(target) - y) / slope for x, y in near]))
    proposal = min(max(proposal, risen[0][0] - math.log(4)), risen[0][0] + math.log(4), 0.0)
    ordered = sorted((math.log(e), d >= target) for e, d in points)
    crossings = [(a[0], b[0]) for a, b in itertools.pairwise(ordered) if b[1] and not a[1]]
    low, high = -math.inf, 0.0
    if crossings:
        low, high = min(crossings, key=lambda pair: max(pair[0] - proposal, proposal - pair[1], 0.0))
        margin = 0.05 * (high - low)
        proposal = proposal if low + margin <= proposal <= high - margin else (low + high) / 2
    elif all(above for _, above in ordered):
        high = ordered[0][0]
        proposal = proposal if proposal < high else high - math.log(1.5)
    elif not any(above for _, above in ordered):
        low = ordered[-1][0]
        step = math.log(1.5 if max(points)[1] > target / 4 else 4.0)
        proposal = proposal if proposal > low else min(low + step, 0.0)
    return math.exp(_untried(proposal, [x for x, _ in ordered], low, high))


def _by_distance(points: Sequence[tuple[float, float]], target: float) -> list[tuple[float, float]]:
    """Return (log CETT, log rise) of the points that rose, nearest to the target first."""
    return sorted(((math.log(e), math.log(d)) for e, d in points if d > 0), key=lambda p: abs(p[1] - math.log(target)))


def _untried(proposal: float, tried: Sequence[float], low: float, high: float) -> float:
    """Return the place nearest to a proposal, between low and high, where no pass was made yet."""
    proposal = min(max(proposal, low), high)
    steps = [0.0, *(sign * 0.002 * 1.5**k for k in range(12) for sign in (1, -1))]
    for place in (proposal + step for step in steps):
        if low <= place <= high and all(abs(place - x) >= 1e-4 for x in tried):
            return place
    return (low + high) / 2 if math.isfinite(low) else proposal


def _slope(risen: Sequence[tuple[float, float]], prior: float) -> float:
    """Slope of log(rise) over log(CETT) by least squares through the points near the target, if they lie apart."""
    chosen = risen[:4]
    x = np.array([p[0] for p in chosen])
    y = np.array([p[1] for p in chosen])
    if len(chosen) < 2 or np.ptp(x) < 0.1:
        return prior
    return float(np.clip(np.polyfit(x, y, 1)[0], 0.4 * prior, 2.5 * prior))
