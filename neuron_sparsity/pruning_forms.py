"""The forms in which neurons can go from the weights: what each leaves of every layer, and why one is taken.

`pruning` tries them in this order and says which it took; what a checkpoint can hold is found out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neuron_sparsity.blueprint import MLP

__all__ = ["FORMS", "Plan", "no_bias", "no_width", "plans_of"]

FORMS = ("auto", "cut", "padded", "zeroed")


@dataclass(frozen=True)
class Plan:
    """A form, the widths it leaves, and the reason to take it."""

    form: str
    widths: dict[int, int]
    reason: str


def plans_of(form: str, gone: Mapping[int, Tensor], mlps: Mapping[int, MLP], kind: str) -> list[Plan]:
    """Return what to try, the best first."""
    own = {block: mlp.d_mlp for block, mlp in mlps.items()}
    # Conv1D of transformers cannot be 0 wide: a layer that keeps none is left with one neuron of zeros.
    keep = own | {block: max(1, int((~mask).sum())) for block, mask in gone.items()}
    widest = max(keep.values())
    padded = {block: min(width, widest) for block, width in own.items()}
    if form != "auto":
        asked = {"cut": keep, "padded": padded, "zeroed": own}[form]
        if asked == own and form != "zeroed":
            return [Plan("zeroed", own, f"{form} was asked for, and a layer keeps all of its neurons")]
        return [Plan(form, asked, "asked for")]
    cut = Plan("cut", keep, f"the configuration of {kind} can say what each layer keeps")
    if padded == own:
        return [
            cut,
            Plan("zeroed", own, f"a layer keeps all of its neurons, and a checkpoint of {kind} has one width"),
        ]
    return [
        cut,
        Plan("padded", padded, f"a checkpoint of {kind} has one width, and a layer keeps {widest}"),
        Plan("zeroed", own, f"the configuration of {kind} has no setting for the width of its MLPs"),
    ]


def no_width(kind: str, plan: Plan) -> str:
    """Return why no checkpoint holds a plan's widths, and what could be saved."""
    least, most = min(plan.widths.values()), max(plan.widths.values())
    if plan.form == "zeroed":
        return f"{kind} with layers of {least} to {most} neurons cannot be built from its configuration"
    if least < most:
        what = f"layers keep {least} to {most} neurons, and a checkpoint of {kind} has one width"
        return f"{what}; form='padded' or 'zeroed' can be saved"
    return f"the configuration of {kind} has no setting for the width of its MLPs; form='zeroed' can be saved"


def no_bias(kind: str) -> str:
    """Return why no checkpoint holds the constants of mean replacement, and what could be done."""
    return (
        f"mean replacement puts constants into the down projections' biases, and the configuration of {kind} has no "
        "setting for them; use the model in memory, or remove neurons with replacement='zero'"
    )
