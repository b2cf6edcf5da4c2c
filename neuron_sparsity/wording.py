"""What a removable set leaves open, in words that the terminal and the page share, without capital or full stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult

__all__ = ["no_shorter", "seen_by", "times", "unsettled"]


def unsettled(removed: AblationResult) -> str:
    """Return what the search left open above the set that it found; nothing where it ended by itself.

    Counts that were measured on some of the windows only are estimates, and not named.
    """
    if removed.resolved:
        return ""
    whole = removed.corpus["n_tokens"]
    dear = [  # more than the largest that holds: none of these does
        int(point["n_removed"])
        for point in removed.curve
        if point["n_removed"] > removed.n_removable and point.get("n_tokens", whole) >= whole
    ]
    if not dear:
        return "the passes of the search were spent: more may go"
    return f"the passes of the search were spent: {min(dear):,} cost more, not all between and above was measured"


def no_shorter(heldout: Mapping[str, Any]) -> str:
    """Return why no set is known to hold on held-out text; nothing where one does or none was sought.

    Example:
        >>> no_shorter({"holds": False, "holding": None, "holding_tried": 0, "interval": None})
        'windows there are too few for an interval: nothing is said to hold'
    """
    if heldout.get("holds") or heldout.get("holding") or "holding" not in heldout:
        return ""
    if not heldout["holding_tried"]:
        few = "windows there are too few for an interval: nothing is said to hold"
        return "no shorter set was tried there" if heldout.get("interval") else few
    return f"no shorter set holds there of {heldout['holding_tried']} that were tried"


def seen_by(heldout: Mapping[str, Any]) -> str:
    """Return who has seen something of the held-out text: the search, the ranking, both; nothing where neither has.

    Example:
        >>> seen_by({"unseen_in_search": True, "unseen_by_ranking": False}), seen_by({})
        ('the ranking has seen', '')
    """
    names = {"unseen_in_search": "the search", "unseen_by_ranking": "the ranking"}
    found = [name for key, name in names.items() if not heldout.get(key, True)]
    return f"{' and '.join(found)} {'have' if len(found) > 1 else 'has'} seen" if found else ""


def times(control: Mapping[str, Any]) -> str:
    """Return how many times the damage of the ranking a control does, with the digits that its standard error gives.

    Example:
        >>> times({"ratio": 2.5}), times({"ratio": 11.02, "ppl_increase_percent": 10.5, "standard_error_percent": 1.9})
        ('2.50 times', 'about 11 times')
    """
    ratio, mean, error = control["ratio"], control.get("ppl_increase_percent"), control.get("standard_error_percent")
    if not (ratio and mean and error) or not math.isfinite(ratio * error / mean):
        return f"{ratio:,.2f} times"
    of_ratio = abs(ratio * error / mean)
    place = min(math.floor(math.log10(size)) for size in (of_ratio, abs(ratio)))
    return f"about {round(ratio, min(-place, 2)):,.{min(max(-place, 0), 2)}f} times"
