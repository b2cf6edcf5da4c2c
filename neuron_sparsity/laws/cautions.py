"""Plain sentences on what a fit does not tell."""

from __future__ import annotations

import math

import numpy as np

from neuron_sparsity.laws.result import LawFit, limit_is_told

__all__ = ["cautions"]

_EVIDENCE = 3.84  # likelihood ratio of correlated residuals: one in forty independent ones exceeds it
_DRIFT = 0.9  # a correlation that no measurement noise has
_CLEARLY_BETTER = 0.8  # of a held-out squared error


def cautions(fit: LawFit, evidence: float) -> tuple[str, ...]:
    """Return the sentences that apply.

    Args:
        fit: The fit.
        evidence: Likelihood ratio of correlated against independent residuals.
    """
    percent = f"{100 * fit.level:g} %"
    return tuple(
        sentence
        for sentence in (
            _on_the_limit(fit, percent),
            _on_change(fit, percent),
            _on_open_ends(fit),
            _on_noise(fit, evidence),
            _on_points(fit),
            _on_rivals(fit),
        )
        if sentence
    )


def _on_the_limit(fit: LawFit, percent: str) -> str:
    low, high = fit.limit_interval
    if limit_is_told((low, high), float(np.ptp(fit.profile.data.y))):
        return ""
    return (
        f"The data do not identify the limit: every A_0 from {low:.3g} to {high:.3g} is in the {percent} interval, so "
        f"{fit.A_0:.3g} is one of many that fit; checkpoints at more tokens would narrow it."
    )


def _on_change(fit: LawFit, percent: str) -> str:
    flat = fit.intervals["c"][0] == 0 if fit.b is None else fit.intervals["b"][0] == -math.inf
    return f"A constant is in the {percent} intervals: the points do not show that the ratio changes." if flat else ""


def _on_open_ends(fit: LawFit) -> str:
    if fit.b is None or not math.isinf(fit.intervals["c"][1]):
        return ""
    return (
        "b and c have no upper end: they can grow together and leave the curve as it is on the data; compare "
        "predictions, not these coefficients."
    )


def _on_noise(fit: LawFit, evidence: float) -> str:
    told = f"(correlation of neighbours {fit.correlation:.2f}, Durbin-Watson {fit.durbin_watson:.2f})"
    if evidence > _EVIDENCE and fit.correlation >= _DRIFT:
        return (
            f"The residuals drift {told}: the law misses a part of the curve, as warm-up makes it do, and no interval "
            "allows for that; leave the first points out with drop_first."
        )
    if evidence > _EVIDENCE and fit.noise == "independent":
        return (
            f"The residuals are no independent noise {told}, so the intervals are too narrow: ask for noise='ar1', or "
            "leave warm-up out with drop_first."
        )
    return ""


def _on_points(fit: LawFit) -> str:
    n_coefficients = len(fit.intervals)
    freedom = fit.n_points - n_coefficients
    if freedom < 3:
        return (
            f"{fit.n_points} points for {n_coefficients} coefficients: too few to tell the noise by ({freedom} spare)."
        )
    return ""


def _on_rivals(fit: LawFit) -> str:
    if not fit.rivals:
        return ""
    heldout = {score.law: score.heldout_mse for score in fit.rivals}
    own = heldout.pop(fit.law)
    if own is None:
        return "Too few points to hold any out: how well the law extrapolates was not tested."
    known = {name: error for name, error in heldout.items() if error is not None}
    best = min(known, key=lambda name: known[name])
    if known[best] >= _CLEARLY_BETTER * own:
        return ""
    formula = next(score.formula for score in fit.rivals if score.law == best)
    return (
        f"The {best} curve, {formula}, predicts the held-out points better: root mean squared error "
        f"{math.sqrt(known[best]):.2g} against {math.sqrt(own):.2g}."
    )
