"""The bootstrap that every interval rests on: windows drawn with replacement, the same draws for all quantities.

A percentile interval of few windows is too narrow, by the factor of a t quantile and of n against n - 1; its quantiles
are moved outwards by as much (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from scipy import stats

__all__ = ["DRAWS", "LEVEL", "MIN_WINDOWS", "ends", "window_draws"]

LEVEL = 0.95
MIN_WINDOWS = 5
"""With fewer there is no interval."""
DRAWS = 4000
_BLOCK = 100


def window_draws(
    n_windows: int, generator: np.random.Generator, n_draws: int = DRAWS
) -> Iterator[Float[np.ndarray, "draw window"]]:
    """Yield how often each window is in each draw, a hundred draws at a time: memory stays small for long texts."""
    for _ in range(n_draws // _BLOCK):
        yield generator.multinomial(n_windows, np.full(n_windows, 1 / n_windows), size=_BLOCK).astype(np.float64)


def ends(drawn: Float[np.ndarray, "draw ..."], n_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % interval of what was drawn.

    Example:
        >>> low, high = ends(np.linspace(0, 1, 1001), n_windows=1000)
        >>> round(float(low), 3), round(float(high), 3)
        (0.025, 0.975)
    """
    spread = stats.t.ppf((1 - LEVEL) / 2, n_windows - 1) * math.sqrt(n_windows / (n_windows - 1))
    tail = float(stats.norm.cdf(spread))
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return low, high
