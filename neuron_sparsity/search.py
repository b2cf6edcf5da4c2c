"""Root search for a CETT or a count whose cost is wanted: which place to measure next.

The cost (rise of the mean loss) goes nearly like a power of what is cut, and jitters by rounding. Both facts are used:
lines in logarithms, and no chase after the last digit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["next_cett"]


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
    risen = sorted(((math.log(e), math.log(d)) for e, d in points if d > 0), key=lambda p: abs(p[1] - math.log(target)))
    if not risen:
        return min(1.0, 4 * max(e for e, _ in points))
    slope = _slope(risen, prior_slope)
    near = [(x, y) for x, y in risen if abs(y - math.log(target)) < 0.25] or risen[:1]
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
