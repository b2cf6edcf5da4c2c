"""`fit_law`: checks the points, fits the law, and says what the points do not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from neuron_sparsity.laws.cautions import cautions
from neuron_sparsity.laws.checks import check_level, check_ratios, check_weights, column
from neuron_sparsity.laws.linear import NOISE_FLOOR, Array, Observations
from neuron_sparsity.laws.noise import durbin_watson, estimate_correlation
from neuron_sparsity.laws.profile import Profile, find_optimum
from neuron_sparsity.laws.result import BILLION, BOUNDS, LawFit, bound_ends, containing
from neuron_sparsity.laws.rivals import LawScore, aicc, score_laws
from neuron_sparsity.laws.shapes import LAWS

__all__ = ["LawName", "Noise", "fit_law", "observations"]

LawName = Literal["auto", "relu", "silu"]
Noise = Literal["independent", "ar1"]


def fit_law(
    tokens: Sequence[float] | Array,
    activation_ratio: Sequence[float] | Array,
    law: LawName = "auto",
    *,
    weights: Sequence[float] | Array | None = None,
    drop_first: int = 0,
    level: float = 0.95,
    noise: Noise = "independent",
    compare: bool = True,
    holdout: float = 0.6,
) -> LawFit:
    """Return a law of arXiv:2411.02335 fitted to activation ratio over training tokens, with profile intervals.

    With D in billions of tokens, `relu` is `exp(-c D^alpha + b) + A_0`, falling, and `silu` is `-c / D^alpha + A_0`,
    rising. The fit minimises the weighted sum of squares with alpha > 0, c > 0 and 0 <= A_0 <= 1.

    Args:
        tokens: Training tokens of each checkpoint, rising; plain tokens, not billions.
        activation_ratio: Activation ratio of each, in [0, 1].
        law: `relu`, `silu`, or `auto`: the one of the two that predicts the held-out points better.
        weights: Weight of each squared residual, such as `1 / standard_error**2`; only their ratios count.
        drop_first: Points to leave out at the beginning, where warm-up bends the curve.
        level: Confidence level of the intervals, in (0, 1).
        noise: What is assumed of neighbouring residuals: `independent`, or `ar1`, correlated by an amount that is
            estimated: coefficients then come from generalised least squares, and intervals are wider.
        compare: Whether to fit the rival curves too, for `rivals`; `auto` always does.
        holdout: Share of the tokens of the last point up to which points are fitted for the held-out error.

    Returns:
        The fit. Where the data do not identify the limit, or a rival extrapolates better, `warnings` says so.

    Raises:
        ValueError: If the points cannot be fitted: lengths that differ, tokens that do not rise, ratios outside [0, 1],
            NaN, too few points, or no change in the direction of the law.

    Example:
        >>> import numpy as np
        >>> D = np.linspace(1, 40, 30)
        >>> ratio = np.exp(-0.286 * D**0.449 - 3.05) + 0.0674
        >>> fit = fit_law(D * 1e9, ratio, "relu")
        >>> f"{fit.alpha:.3f} {fit.b:.2f} {fit.c:.3f} {fit.A_0:.4f}"
        '0.449 -3.05 0.286 0.0674'
    """
    data = observations(tokens, activation_ratio, weights=weights, drop_first=drop_first)
    _check_options(law, level, noise, holdout)
    needed = 1 + max(len(LAWS[name].names) for name in (LAWS if law == "auto" else (law,)))
    if len(data.y) < needed:
        raise ValueError(
            f"{len(data.y)} points are too few for the {law} law with {needed - 1} coefficients; "
            f"measure at least {needed} checkpoints" + (" or lower drop_first" if drop_first else "")
        )
    scores = score_laws(data, holdout) if compare or law == "auto" else ()
    profiles = {name: _profile(name, data) for name in (LAWS if law == "auto" else (law,))}
    name, choice = _choose(law, profiles, scores)
    profile = profiles[name]
    correlation, evidence = estimate_correlation(profile)
    if noise == "ar1" and correlation > 0:
        profile = _profile(name, replace(data, correlation=correlation))
        _choose(name, {name: profile}, ())  # refuses one that is flat now
    return _result(
        profile,
        evidence,
        level=level,
        noise=noise,
        correlation=correlation,
        drop_first=drop_first,
        holdout=holdout,
        rivals=scores,
        choice=choice,
    )


def observations(
    tokens: Sequence[float] | Array,
    activation_ratio: Sequence[float] | Array,
    *,
    weights: Sequence[float] | Array | None = None,
    drop_first: int = 0,
) -> Observations:
    """Return the points ready to be fitted, after all checks."""
    D, y = column("tokens", tokens), column("activation_ratio", activation_ratio)
    w = check_weights(weights, y, {"tokens": D, "activation_ratio": y})
    check_ratios("activation_ratio", y)
    if len(D) and D.min() <= 0:
        raise ValueError(f"tokens must be positive, got {D.min():g}; leave the untrained checkpoint out")
    steps = np.flatnonzero(np.diff(D) <= 0)
    if len(steps):
        i = int(steps[0])
        raise ValueError(
            f"tokens must rise, but position {i + 1} has {D[i + 1]:g} after {D[i]:g}; sort the checkpoints by tokens "
            "and keep one point for each count"
        )
    if isinstance(drop_first, bool) or not isinstance(drop_first, int | np.integer) or drop_first < 0:
        raise ValueError(f"drop_first must be a number of points >= 0, got {drop_first!r}")
    D, y, w = D[drop_first:], y[drop_first:], w[drop_first:]
    return Observations(np.log(D / BILLION), y, w / w.mean() if len(w) else w)


def _check_options(law: str, level: float, noise: str, holdout: float) -> None:
    if law not in ("auto", *LAWS):
        raise ValueError(f"law must be 'auto', 'relu' or 'silu', got {law!r}")
    if noise not in ("independent", "ar1"):
        raise ValueError(f"noise must be 'independent' or 'ar1', got {noise!r}")
    check_level(level)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must be in (0, 1), got {holdout}; 0.6 fits the first 60 % of the tokens")


def _profile(name: str, data: Observations) -> Profile:
    law = LAWS[name](float(data.x[0]), float(data.x[-1]))
    return Profile(law, data, find_optimum(law, data))


def _choose(law: str, profiles: dict[str, Profile], scores: tuple[LawScore, ...]) -> tuple[str, str]:
    """Return the law's name and why; refuse a law whose best curve is flat."""
    able = [name for name, profile in profiles.items() if _change(profile) > NOISE_FLOOR]
    if not able and law == "auto":
        raise ValueError(
            "the ratio neither falls like the relu law nor rises like the silu law; measure more checkpoints"
        )
    if not able:
        other = "silu" if law == "relu" else "relu"
        direction = LAWS[law].direction
        raise ValueError(
            f"the {law} law can only {direction} with tokens, and no such curve fits better than a constant; "
            f"try law={other!r}, or drop_first to leave warm-up out"
        )
    if law != "auto":
        return law, f"The {law} law was asked for."
    errors = {score.law: score.heldout_mse for score in scores if score.law in LAWS}
    how = "predicting the held-out points"
    if None in errors.values():
        errors = {score.law: score.mse for score in scores if score.law in LAWS}
        how = "fitting the points (too few to hold any out)"
    error = {name: math.sqrt(value or 0.0) for name, value in errors.items()}
    best = min(able, key=lambda name: error[name])
    other = "silu" if best == "relu" else "relu"
    text = f"root mean squared error {error[best]:.2g} in {how}, {error[other]:.2g} for the {other} law"
    if other not in able:
        text += f", which can only {LAWS[other].direction} and is flat here"
    return best, f"The {best} law was chosen: {text}."


def _change(profile: Profile) -> float:
    """Return how much the fitted curve changes over the points."""
    return float(profile.best.b * np.ptp(profile.law.values(profile.best.shape, profile.data.x)))


def _result(profile: Profile, evidence: float, **settings: Any) -> LawFit:
    law, data, best = profile.law, profile.data, profile.best
    residuals = data.y - best.a - best.b * law.values(best.shape, data.x)
    mse = float(np.average(residuals**2, weights=data.weight))
    variance = float(np.average((data.y - np.average(data.y, weights=data.weight)) ** 2, weights=data.weight))
    coefficients = law.coefficients(best.shape, best.a, best.b)
    intervals = containing(coefficients, profile.region(settings["level"]).intervals(law))
    fit = LawFit(
        law=law.name,
        alpha=coefficients["alpha"],
        b=coefficients.get("b"),
        c=coefficients["c"],
        A_0=coefficients["A_0"],
        intervals=intervals,
        at_bound=bound_ends(intervals, BOUNDS),
        durbin_watson=durbin_watson(residuals * np.sqrt(data.weight)),
        mae=float(np.average(np.abs(residuals), weights=data.weight)),
        mse=mse,
        r2=1 - mse / variance if variance > 0 else math.nan,
        aicc=aicc(mse, len(data.y), len(law.names)),
        residuals=residuals,
        n_points=len(data.y),
        warnings=(),
        profile=profile,
        **settings,
    )
    return replace(fit, warnings=cautions(fit, evidence))
