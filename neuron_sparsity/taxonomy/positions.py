"""What a neuron's activity says about the position: mutual information, in bits (Voita et al. 2023, arXiv:2309.04827).

Every position has the same number of tokens, W windows, so with `f_p` the share of them on which the neuron is active
at position p, and `f` the mean of `f_p` over the T positions,

    I = 1/T sum_p [ f_p log2(f_p / f) + (1 - f_p) log2((1 - f_p) / (1 - f)) ]

Position 0 takes no part (BOS, or an attention sink). On few windows every neuron seems to know its position:
independent activity shows about (T - 1) / (2 N ln 2) bits, 0.09 on 4,096 tokens in windows of 512, which is more than
the threshold of 0.05. How much it shows on average is known exactly: with A activations put anywhere on N = W T tokens,
the number at a position is hypergeometric. A neuron is positional if its information exceeds that by the threshold.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import rel_entr

__all__ = ["POSITIONAL_BITS", "information_bits", "information_by_chance_bits"]

POSITIONAL_BITS = 0.05

_CELLS = 1 << 20  # probabilities that are made at once


def information_bits(count: Int[NDArray, "pos neuron"], n_windows: int) -> Float[NDArray, " neuron"]:
    """Return the mutual information of activity and position, in bits.

    Args:
        count: Windows in which each neuron is active at each position.
        n_windows: Of how many.

    Example:
        >>> information_bits(np.array([[2, 1], [0, 1]]), 2).tolist()
        [1.0, 0.0]
    """
    at, mean = count / n_windows, count.sum(axis=0) / (n_windows * len(count))
    return (rel_entr(at, mean) + rel_entr(1 - at, 1 - mean)).mean(axis=0) / np.log(2)


def information_by_chance_bits(total: Int[NDArray, " neuron"], n_windows: int, n_pos: int) -> Float[NDArray, " neuron"]:
    """Return what `information_bits` is on average if as many activations fall on positions at random, in bits.

    Args:
        total: Activations of each neuron, at all positions.
        n_windows: Windows.
        n_pos: Positions that were counted.

    Example:
        >>> information_by_chance_bits(np.array([0, 1, 4]), 2, 2).round(4).tolist()
        [0.0, 0.3113, 0.0]
    """
    from scipy.stats import hypergeom  # a second to import

    different, back = np.unique(total, return_inverse=True)
    n_tokens, k = n_windows * n_pos, np.arange(n_windows + 1)
    at = k / n_windows
    found = np.empty(len(different))
    for start in range(0, len(different), step := max(1, _CELLS // len(k))):
        some = different[start : start + step, None]
        term = rel_entr(at, some / n_tokens) + rel_entr(1 - at, 1 - some / n_tokens)
        likely = hypergeom.pmf(k, n_tokens, some, n_windows)
        # Where the term is infinite (active somewhere, never on average) the probability is zero.
        found[start : start + step] = np.where(likely > 0, likely * np.where(likely > 0, term, 0), 0).sum(axis=1)
    return found[back] / np.log(2)
