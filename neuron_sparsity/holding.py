"""The set that holds on held-out text, as a removal of its own.

Where a removable set does not hold on held-out text, `confirmation` looks there for a shorter prefix of the ranking
that does. Its rise is known on that text alone, on which it was also chosen.
"""

from __future__ import annotations

from typing import Any

__all__ = ["held_fields"]


def held_fields(removed: Any) -> dict[str, Any]:
    """Return the fields in which the set that holds differs from a removal; none where the removal itself holds.

    Args:
        removed: An AblationResult.

    Raises:
        ValueError: If nothing is removable, or no set was found to hold.
    """
    p, heldout = f"{removed.p_percent:g} %", removed.heldout
    if not removed.n_removable:
        raise ValueError(f"no set can hold on held-out text: nothing is removable at {p}; search at a larger p")
    if heldout is None:
        raise ValueError(
            "the removal was not measured on held-out text; removable_neurons(model, corpus, ranking) does"
        )
    if heldout["holds"]:
        return {}
    held, corpus = heldout.get("holding"), heldout["corpus"]
    if not held:
        raise ValueError(
            f"no set was found to hold at {p} on the {corpus['n_tokens']:,} tokens of held-out text "
            f"({heldout.get('holding_tried', 0)} shorter ones were tried); search on more text or at a larger p"
        )
    n, measured = int(held["n_removable"]), ("ppl_dense", "ppl_ablated", "ppl_increase_percent")
    own = heldout | held | {"holding": None}
    del own["n_removable"]
    points = {
        0: own | {"ppl_ablated": own["ppl_dense"], "ppl_increase_percent": 0.0},
        n: own,
        removed.n_removable: heldout,
    }
    return {
        "n_removable": n,
        "removable": removed.removable[:n],
        "reached": True,
        **{name: own[name] for name in measured},
        "curve": tuple(_point(count, found, corpus["n_tokens"]) for count, found in points.items()),
        "control": None,
        "heldout": own,
        "corpus": corpus,
        "per_p": (),
    }


def _point(n: int, found: dict[str, Any], n_tokens: int) -> dict[str, float]:
    return {
        "n_removed": n,
        "ppl": found["ppl_ablated"],
        "ppl_increase_percent": found["ppl_increase_percent"],
        "n_tokens": n_tokens,
        "standard_error_percent": 0.0,
    }
