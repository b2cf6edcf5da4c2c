"""What a removal is held against: random neurons, and text that the search never saw.

The set *holds* on held-out text if the whole 95 % interval of the rise (paired bootstrap over windows) is at most p, is
*not refuted* if p lies inside, and *fails* if the interval lies above. Where it does not hold, a shorter prefix that
does is looked for there; chosen on that text, it is no longer unseen. On fewer than five windows there is no interval,
and nothing is said to hold.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from neuron_sparsity.interval import paired_interval
from neuron_sparsity.removal import PrefixSearch, Removals
from neuron_sparsity.tally import DENSE, control_key, prefix_key

__all__ = ["compare", "confirm", "rise_percent"]

_CONTROL_ERROR = 0.2  # of the damage: a control that is known as well needs no more windows
_SHORTER = (0.9, 0.5, 0.25)
"""How much shorter each try is than the one before; the first is cut by the slope first, but intervals shrink less."""
_MOST = 500.0  # of a mean loss: its perplexity still is a number


def rise_percent(rise: float) -> float:
    """Return the rise of perplexity in percent, from that of the mean loss in nats.

    Example:
        >>> round(rise_percent(0.00995), 3)
        1.0
    """
    return 100 * math.expm1(min(rise, _MOST))


def compare(removals: Removals, text: str, n: int, seeds: list[int], limit: float) -> dict[str, Any]:
    """Remove as many random neurons of every layer, on as many windows as it takes to see what that does.

    Args:
        removals: The passes; those without the n weakest neurons were made on all windows.
        text: Where to measure.
        n: How many of the weakest are removed by the ranking.
        seeds: One control each.
        limit: Of `Removals.passes`; the fewest windows are run in any case.
    """
    measured = removals.measured[text]
    keys, own = [control_key(n, seed) for seed in seeds], measured.rise(prefix_key(n))[0]
    found: list[tuple[float, float]] = []
    for n_windows in measured.levels:
        cost = sum(len(measured.missing(key, n_windows)) for key in keys) / measured.windows.n_windows
        if found and removals.passes + cost > limit:
            break
        removals.controls(text, n, seeds, n_windows)
        found = [measured.rise(key, prefix_key(n)) for key in keys]
        if all(error <= _CONTROL_ERROR * max(abs(rise), own) for rise, error in found):
            break
    percents, ppl_dense = [rise_percent(rise) for rise, _ in found], math.exp(measured.loss(DENSE))
    mean = statistics.fmean(percents)
    return {
        "kind": "random neurons, the same number in every layer",
        "seed": seeds[0],
        "seeds": seeds,
        "ppl": [ppl_dense * math.exp(min(rise, _MOST)) for rise, _ in found],
        "ppl_increase_percent": mean,
        "sd_percent": statistics.stdev(percents) if len(percents) > 1 else None,
        "standard_error_percent": 100 * max(error * math.exp(min(rise, _MOST)) for rise, error in found),
        "ratio": mean / rise_percent(own) if own > 0 else None,
        "n_tokens": measured.n_tokens(keys[0]),
    }


def confirm(
    removals: Removals, text: str, n: int, p_percent: float, search: PrefixSearch, limit: float
) -> dict[str, Any]:
    """Measure a removal on text that the search never saw, and look there for a set that holds.

    Args:
        removals: The passes.
        text: Where to confirm.
        n: How many of the weakest are removed.
        p_percent: What was allowed.
        search: Tells how steeply the rise goes with the count.
        limit: Of `Removals.passes`, for the shorter sets.
    """
    removals.dense(text)
    measured, slope = removals.measured[text], search.slope(n)
    share = measured.windows.n_tokens / search.measured.windows.n_tokens
    own = found = _on(removals, text, n, p_percent)
    tried = 0
    while not found["holds"] and found["interval"] and n > 1 and tried < len(_SHORTER):
        if removals.passes + share > limit + 1e-9:
            break
        by_slope = 1.0 if tried else min(1.0, (p_percent / found["interval"][1]) ** (1 / slope))
        n = max(1, min(n - 1, math.floor(n * _SHORTER[tried] * by_slope)))
        found, tried = _on(removals, text, n, p_percent), tried + 1
    holding = {"n_removable": n} | found | {"chosen_on": "held-out text"} if tried and found["holds"] else None
    return own | {
        "ppl_dense": math.exp(measured.loss(DENSE)),
        "holding": holding,
        "holding_tried": tried,
        "corpus": measured.windows.describe(),
    }


def _on(removals: Removals, text: str, n: int, p_percent: float) -> dict[str, Any]:
    measured, key = removals.measured[text], removals.prefix(text, n)
    rise = rise_percent(measured.rise(key)[0])
    ends = paired_interval(measured.difference(key).sum(axis=1), measured.scored.sum(axis=1))
    interval = None if ends is None else [rise_percent(end) for end in ends]
    low, high = interval or [rise, math.inf]
    holds = high <= p_percent
    return {
        "ppl_ablated": math.exp(min(measured.loss(key), _MOST)),
        "ppl_increase_percent": rise,
        "interval": interval,
        "verdict": "fails" if low > p_percent else "holds" if holds else "not refuted",
        "holds": holds,
    }
