"""Kinds of neurons counted the long way, one neuron and token at a time, in exact arithmetic; nothing of the code."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kind:
    """What the tokens on which one neuron is active say of it."""

    n_covering_tokens: int
    n_triggers: int
    ngram: int
    triggers: tuple[tuple[int, ...], ...]
    information_bits: float


def covering(counts: Counter[Any], total: int, share: Fraction) -> list[Any]:
    """The fewest n-grams that cover a share of `total`, the most frequent first; none if all together do not."""
    chosen, covered = [], 0
    for gram, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        chosen.append(gram)
        covered += count
        if covered >= share * total:
            return chosen
    return []


def kind_of(active: np.ndarray, tokens: np.ndarray, rule: Any) -> Kind:
    """`active` and `tokens` are [window, pos]; position 0 takes no part."""
    n_windows, n_pos = tokens.shape
    covered, fires = Fraction(str(rule.covered)), Fraction(str(rule.fires))
    places = [(w, p) for w in range(n_windows) for p in range(1, n_pos)]
    total = sum(bool(active[place]) for place in places)
    tokens_needed, n_triggers, ngram, triggers = 0, 0, 0, ()
    for n in (1, 2, 3):
        stands: Counter[tuple[int, ...]] = Counter()
        fired: Counter[tuple[int, ...]] = Counter()
        for w, p in places:
            if p - n + 1 < 1:
                continue
            gram = tuple(int(token) for token in tokens[w, p - n + 1 : p + 1])
            stands[gram] += 1
            fired[gram] += bool(active[w, p])
        fired = Counter({gram: count for gram, count in fired.items() if count})
        cover = covering(fired, total, covered) if total else []
        if n == 1:
            tokens_needed = len(cover)
        if total < rule.min_activations:
            continue
        if n == 1 and 0 < len(cover) <= rule.most:
            n_triggers, triggers = len(cover), tuple(cover)
        precise = Counter({gram: count for gram, count in fired.items() if Fraction(count, stands[gram]) >= fires})
        detecting = covering(precise, total, covered)
        if ngram == 0 and 0 < len(detecting) <= rule.most:
            n_triggers, ngram, triggers = len(detecting), n, tuple(detecting)
    return Kind(tokens_needed, n_triggers, ngram, triggers, information(active[:, 1:]))


def information(active: np.ndarray) -> float:
    """Mutual information of activity and position from the table of joint frequencies, in bits."""
    n_windows, n_pos = active.shape
    joint = {(p, bit): 0 for p in range(n_pos) for bit in (False, True)}
    for w in range(n_windows):
        for p in range(n_pos):
            joint[p, bool(active[w, p])] += 1
    n = n_windows * n_pos
    of_bit = {bit: sum(joint[p, bit] for p in range(n_pos)) for bit in (False, True)}
    return math.fsum(
        count / n * math.log2(count * n / (n_windows * of_bit[bit])) for (p, bit), count in joint.items() if count
    )


def class_of(count: int, n_tokens: int, *, never: bool = False) -> str:
    """By the definitions' own numbers: 0.1, 1 and 99 percent."""
    if (count == 0) if never else count * 1000 < n_tokens:
        return "dead"
    if count * 100 < n_tokens:
        return "rare"
    return "always_on" if count * 100 > 99 * n_tokens else "alive"
