"""`fit_law` on curves whose law is known: recovery, invariants, bounds, intervals, warnings, wording of errors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from neuron_sparsity.laws import LawFit, fit_law
from neuron_sparsity.laws.fit import observations
from neuron_sparsity.laws.noise import durbin_watson, estimate_correlation
from neuron_sparsity.laws.result import bound_ends, finite
from neuron_sparsity.laws.rivals import RIVALS, score_laws

NOISE = 5e-4
D = np.linspace(1.5, 80.0, 30)


def relu(D: Any, alpha: float, b: float, c: float, A_0: float) -> Any:
    return np.exp(-c * D**alpha + b) + A_0


def silu(D: Any, alpha: float, c: float, A_0: float) -> Any:
    return A_0 - c / D**alpha


def noisy(curve: Any, seed: int = 0, size: float = NOISE) -> Any:
    return curve + size * np.random.default_rng(seed).standard_normal(len(curve))


def correlated(n: int, rho: float, seed: int = 0) -> Any:
    steps = np.random.default_rng(seed).standard_normal(n)
    found = [steps[0]]
    for step in steps[1:]:
        found.append(rho * found[-1] + math.sqrt(1 - rho**2) * step)
    return np.array(found)


@pytest.fixture(scope="module")
def relu_fit() -> LawFit:
    return fit_law(D * 1e9, noisy(relu(D, 0.449, -3.05, 0.286, 0.0674)), "relu")


@pytest.fixture(scope="module")
def silu_fit() -> LawFit:
    return fit_law(D * 1e9, noisy(silu(D, 0.844, 0.208, 0.39)), "silu")


def test_a_case_by_hand() -> None:
    """0.5 - 0.2 / sqrt(D) at D = 1, 4, 16, 64, 100."""
    fit = fit_law([1e9, 4e9, 16e9, 64e9, 100e9], [0.3, 0.4, 0.45, 0.475, 0.48], "silu")
    assert (fit.alpha, fit.c, fit.A_0) == pytest.approx((0.5, 0.2, 0.5), rel=1e-5)
    assert fit.b is None
    assert fit.mse < 1e-14
    assert fit.predict(25e9).mean[0] == pytest.approx(0.46, abs=1e-6)
    assert fit.tokens_to_within(0.01).value == pytest.approx(400e9, rel=1e-4)


@pytest.mark.parametrize(
    "truth", [(0.449, -3.05, 0.286, 0.0674), (1.01, -3.49, 0.00797, 0.0721), (2.11, -3.82, 9.04e-6, 0.0712)]
)
def test_relu_is_recovered_from_exact_points(truth: tuple[float, ...]) -> None:
    grid = np.linspace(3.0, 300.0, 30)
    fit = fit_law(grid * 1e9, relu(grid, *truth), "relu", compare=False)
    assert (fit.alpha, fit.b, fit.c, fit.A_0) == pytest.approx(truth, rel=2e-3)
    assert fit.r2 == pytest.approx(1.0)


def test_a_power_law_is_the_limit_of_relu_for_small_alpha() -> None:
    fit = fit_law(D * 1e9, noisy(0.06 + 0.05 * D**-0.6, size=1e-4), "relu", compare=False)
    assert fit.at_bound["alpha"] == ("low",)
    assert fit.intervals["alpha"][0] == 0
    assert fit.intervals["b"][1] == fit.intervals["c"][1] == math.inf
    assert any("no upper end" in sentence for sentence in fit.warnings)
    assert fit.limit_interval[0] < 0.06 < fit.limit_interval[1]


def test_reported_errors_are_those_of_the_residuals(relu_fit: LawFit) -> None:
    y = noisy(relu(D, 0.449, -3.05, 0.286, 0.0674))
    own = relu(D, relu_fit.alpha, relu_fit.b or 0.0, relu_fit.c, relu_fit.A_0)
    np.testing.assert_allclose(relu_fit.residuals, y - own, atol=1e-12)
    np.testing.assert_allclose(relu_fit.predict(D * 1e9).mean, own, atol=1e-12)
    assert relu_fit.mse == pytest.approx(np.mean((y - own) ** 2))
    assert relu_fit.mae == pytest.approx(np.mean(np.abs(y - own)))
    assert relu_fit.r2 == pytest.approx(1 - np.mean((y - own) ** 2) / np.var(y))
    n, k = 30, 5
    assert relu_fit.aicc == pytest.approx(n * math.log(relu_fit.mse) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    assert relu_fit.limit == relu_fit.A_0
    assert relu_fit.n_points == 30


@pytest.mark.parametrize("law", ["relu", "silu"])
def test_no_other_start_finds_a_better_point(law: str, relu_fit: LawFit, silu_fit: LawFit) -> None:
    fit = relu_fit if law == "relu" else silu_fit
    curve, n = (relu, 4) if law == "relu" else (silu, 3)
    y = fit.residuals + fit.predict(D * 1e9).mean
    rng = np.random.default_rng(1)
    low, high = ([0.01, -9, 1e-4, 0.0], [3, 3, 5, 1]) if law == "relu" else ([0.01, 1e-4, 0.0], [3, 5, 1.0])
    for _ in range(30):
        start = rng.uniform(low, high)
        done = least_squares(lambda p: np.nan_to_num(curve(D, *p) - y, posinf=1e3), start, bounds=(low, high))
        assert 2 * done.cost / len(D) >= fit.mse * (1 - 1e-6)
    assert len(fit.intervals) == n


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("name", ["alpha", "c", "A_0"])
def test_the_best_curve_at_an_end_of_an_interval_is_as_good_as_the_cut(
    name: str, end: int, relu_fit: LawFit, silu_fit: LawFit
) -> None:
    """What defines a profile interval, checked by another optimiser."""
    for fit, curve in ((relu_fit, relu), (silu_fit, silu)):
        names = list(fit.intervals)
        best = [getattr(fit, each) for each in names]
        y = fit.residuals + fit.predict(D * 1e9).mean
        held = names.index(name)

        def residuals(free: Any, *, curve: Any = curve, y: Any = y, held: int = held, fit: LawFit = fit) -> Any:
            return (curve(D, *np.insert(free, held, fit.intervals[name][end])) - y) / NOISE

        # From the optimum in small steps: what is held moves to its end, the others follow.
        free = np.delete(best, held)
        for share in np.linspace(0.1, 1.0, 10):
            value = best[held] + share * (fit.intervals[name][end] - best[held])

            def step(free: Any, *, value: float = value, curve: Any = curve, y: Any = y, held: int = held) -> Any:
                return (curve(D, *np.insert(free, held, value)) - y) / NOISE

            free = least_squares(step, free, x_scale=np.abs(free) + 1e-3, max_nfev=2000).x
        reached = float(np.sum(residuals(free) ** 2)) * NOISE**2
        assert reached == pytest.approx(fit.profile.cut(0.95), rel=0.01)


def test_intervals_widen_with_the_level_and_hold_the_estimate(relu_fit: LawFit) -> None:
    fits = {
        level: fit_law(D * 1e9, noisy(relu(D, 0.449, -3.05, 0.286, 0.0674)), "relu", level=level, compare=False)
        for level in (0.5, 0.95, 0.99)
    }
    for name, (low, high) in relu_fit.intervals.items():
        assert fits[0.99].intervals[name][0] <= low < fits[0.5].intervals[name][0] < getattr(relu_fit, name)
        assert getattr(relu_fit, name) < fits[0.5].intervals[name][1] < high <= fits[0.99].intervals[name][1]
        assert fits[0.95].intervals[name] == (low, high)


@pytest.mark.parametrize("law", ["relu", "silu"])
def test_tokens_a_thousand_times_as_large_change_c_and_nothing_else(law: str) -> None:
    y = noisy(relu(D, 0.683, -3.46, 0.079, 0.069) if law == "relu" else silu(D, 0.479, 0.102, 0.409))
    small, large = (fit_law(D * scale, y, law, compare=False) for scale in (1e9, 1e12))  # type: ignore[arg-type]
    factor = 1000 ** (-small.alpha if law == "relu" else small.alpha)
    assert large.c == pytest.approx(small.c * factor, rel=1e-3)
    assert large.alpha == pytest.approx(small.alpha, rel=1e-4)
    assert large.limit == pytest.approx(small.limit, rel=1e-4)
    assert large.mse == pytest.approx(small.mse, rel=1e-9)
    assert large.limit_interval == pytest.approx(small.limit_interval, rel=1e-3)
    if law == "relu":
        assert large.b == pytest.approx(small.b, rel=1e-4)
    np.testing.assert_allclose(small.predict(1e11), large.predict(1e14), rtol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e6, 1e30])
def test_no_magnitude_of_tokens_fails(magnitude: float) -> None:
    for law, curve in (("relu", relu(D, 0.683, -3.46, 0.079, 0.069)), ("silu", silu(D, 0.479, 0.102, 0.409))):
        fit = fit_law(D * magnitude, noisy(curve), law)  # type: ignore[arg-type]
        assert fit.mse < 2 * NOISE**2
        assert all(low <= getattr(fit, name) <= high for name, (low, high) in fit.intervals.items())
        assert math.isfinite(fit.predict(magnitude).mean[0])


def test_weights_are_relative_and_small_ones_silence_a_point() -> None:
    y = noisy(silu(D, 0.844, 0.208, 0.39))
    broken = y.copy()
    broken[12] -= 0.05
    weights = np.ones(30)
    weights[12] = 1e-9
    silenced = fit_law(D * 1e9, broken, "silu", weights=weights, compare=False)
    without = fit_law(np.delete(D, 12) * 1e9, np.delete(y, 12), "silu", compare=False)
    assert silenced.limit == pytest.approx(without.limit, rel=1e-6)
    assert silenced.mse == pytest.approx(without.mse, rel=1e-4)
    assert fit_law(D * 1e9, y, "silu", weights=7 * np.ones(30)) == fit_law(D * 1e9, y, "silu")


def test_drop_first_leaves_the_first_points_out() -> None:
    y = noisy(relu(D, 0.683, -3.46, 0.079, 0.069))
    y[:3] = 0.09
    dropped = fit_law(D * 1e9, y, "relu", drop_first=3, compare=False)
    sliced = fit_law(D[3:] * 1e9, y[3:], "relu", compare=False)
    assert dropped.drop_first == 3
    assert dropped.n_points == 27
    assert (dropped.alpha, dropped.intervals) == (sliced.alpha, sliced.intervals)


def test_a_limit_that_is_not_identified_is_said_in_plain_words() -> None:
    fits = [fit_law(D * 1e9, noisy(silu(D, 0.1, 0.3, 0.6), seed, 3e-3), "silu", compare=False) for seed in range(3)]
    for fit in fits:
        low, high = fit.limit_interval
        said = f"The data do not identify the limit: every A_0 from {low:.3g} to {high:.3g} is in the 95 % interval"
        assert fit.warnings[0].startswith(said)
        assert low < 0.6 < high
    assert fits[0].limit_interval[1] == 1.0
    assert fits[0].at_bound == {"A_0": ("high",)}


def test_noise_alone_is_no_dependence() -> None:
    for seed in (3, 4):
        fit = fit_law(D * 1e9, noisy(np.full(30, 0.2), seed))
        assert any(sentence.startswith("A constant is in the 95 % intervals") for sentence in fit.warnings)
        assert any(sentence.startswith("The data do not identify the limit") for sentence in fit.warnings)


def test_an_identified_limit_gives_no_warning(silu_fit: LawFit) -> None:
    assert silu_fit.warnings == ()
    assert silu_fit.at_bound == {}


def test_the_band_and_the_tokens_to_the_limit_go_with_the_intervals(silu_fit: LawFit) -> None:
    far = silu_fit.predict([1e9, 1e12, 1e40])
    assert (far.low <= far.mean).all()
    assert (far.mean <= far.high).all()
    assert (far.low[2], far.high[2]) == pytest.approx(silu_fit.limit_interval, rel=1e-3)
    assert silu_fit.predict(1e12, level=0.5).high[0] < far.high[1]
    near, further = silu_fit.tokens_to_within(0.01), silu_fit.tokens_to_within(0.001)
    assert near.low < near.value < near.high < further.value
    assert silu_fit.limit - silu_fit.predict(near.value).mean[0] == pytest.approx(0.01)


def test_relu_tokens_to_the_limit(relu_fit: LawFit) -> None:
    near = relu_fit.tokens_to_within(0.002)
    assert near.low < near.value < near.high
    assert relu_fit.predict(near.value).mean[0] - relu_fit.limit == pytest.approx(0.002)
    assert relu_fit.tokens_to_within(0.5).value == 0.0


def test_auto_picks_by_held_out_error_and_says_by_how_much() -> None:
    falling = fit_law(D * 1e9, noisy(relu(D, 0.449, -3.05, 0.286, 0.0674)))
    rising = fit_law(D * 1e9, noisy(silu(D, 0.844, 0.208, 0.39)))
    assert (falling.law, rising.law) == ("relu", "silu")
    error = {score.law: math.sqrt(score.heldout_mse or 0.0) for score in rising.rivals}
    assert rising.choice == (
        f"The silu law was chosen: root mean squared error {error['silu']:.2g} in predicting the held-out points, "
        f"{error['relu']:.2g} for the relu law, which can only fall and is flat here."
    )
    assert error["silu"] < error["relu"] / 5


def test_auto_between_two_laws_that_are_both_able() -> None:
    """On noise around a constant either may do better."""
    for seed, expected in ((3, "silu"), (4, "relu")):
        fit = fit_law(D * 1e9, noisy(np.full(30, 0.2), seed))
        error = {score.law: score.heldout_mse for score in fit.rivals}
        assert fit.law == expected == min(("relu", "silu"), key=lambda law: error[law] or 0.0)
        assert "flat" not in fit.choice


def test_auto_with_too_few_points_to_hold_out() -> None:
    fit = fit_law(D[:6] * 1e9, noisy(silu(D[:6], 0.844, 0.208, 0.39)))
    assert fit.law == "silu"
    assert "too few to hold any out" in fit.choice
    assert any("was not tested" in sentence for sentence in fit.warnings)


def test_few_spare_points_are_said() -> None:
    fit = fit_law(D[:5] * 1e9, noisy(relu(D[:5], 0.449, -3.05, 0.286, 0.0674), size=1e-5), "relu", compare=False)
    assert "5 points for 4 coefficients: too few to tell the noise by (1 spare)." in fit.warnings
    assert fit.rivals == ()
    assert fit.aicc == math.inf


def test_a_rival_that_extrapolates_better_is_named() -> None:
    fit = fit_law(D * 1e9, noisy(0.35 + 0.012 * np.log(D + 0.5), size=1e-4), "silu")
    scores = {score.law: score for score in fit.rivals}
    assert set(scores) == {"relu", "silu", *(rival.name for rival in RIVALS)}
    assert scores["logarithm"].heldout_mse < scores["silu"].heldout_mse  # type: ignore[operator]
    assert any(sentence.startswith("The logarithm curve, a ln(D + s) + d, predicts") for sentence in fit.warnings)


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("logarithm", 0.2 - 0.02 * np.log(D + 5.0)),
        ("sigmoid", 1.07 - 1 / (1 + np.exp(-0.1 * D - 3.0))),
        ("power", 0.1 * D**-0.2),
        ("power", 0.3 * D**0.05),
        ("exponential", 0.06 + 0.04 * np.exp(-D / 15)),
        ("exponential", 0.4 - 0.1 * np.exp(-D / 15)),
        ("relu", relu(D, 0.449, -3.05, 0.286, 0.0674)),
        ("silu", silu(D, 0.844, 0.208, 0.39)),
    ],
)
def test_every_curve_recovers_itself_and_extrapolates(name: str, curve: Any) -> None:
    scores = {score.law: score for score in score_laws(observations(D * 1e9, curve), 0.6)}
    assert scores[name].mse < 1e-11
    assert scores[name].heldout_mse is not None
    assert scores[name].heldout_mse < 1e-9


def test_the_held_out_error_is_that_of_a_fit_to_the_first_points() -> None:
    y = noisy(silu(D, 0.844, 0.208, 0.39))
    first = np.less_equal(D, 0.6 * D[-1])
    head = fit_law(D[first] * 1e9, y[first], "silu", compare=False)
    expected = np.mean((head.predict(D[~first] * 1e9).mean - y[~first]) ** 2)
    score = next(score for score in fit_law(D * 1e9, y, "silu").rivals if score.law == "silu")
    assert score.heldout_mse == pytest.approx(expected, rel=1e-6)
    assert score.n_parameters == 3


def test_correlated_residuals_are_told_and_allowed_for() -> None:
    y = silu(D, 0.844, 0.208, 0.39) + NOISE * correlated(30, 0.9, seed=2)
    plain, wide = (fit_law(D * 1e9, y, "silu", noise=noise, compare=False) for noise in ("independent", "ar1"))  # type: ignore[arg-type]
    assert plain.durbin_watson < 1.2
    assert plain.correlation > 0.4
    assert any("noise='ar1'" in sentence for sentence in plain.warnings)
    assert not any("noise='ar1'" in sentence for sentence in wide.warnings)
    assert np.ptp(wide.limit_interval) > 1.5 * np.ptp(plain.limit_interval)
    assert wide.mse >= plain.mse


def test_warm_up_is_told_from_noise() -> None:
    y = silu(D, 0.844, 0.208, 0.39) + 1e-4 * np.random.default_rng(0).standard_normal(30)
    y[:5] = y[5] - 0.002 * np.arange(5, 0, -1)
    fit = fit_law(D * 1e9, y, "silu")
    assert any(sentence.startswith("The residuals drift (correlation of neighbours 0.9") for sentence in fit.warnings)
    assert not any("drift" in sentence for sentence in fit_law(D * 1e9, y, "silu", drop_first=5).warnings)


def test_without_correlation_ar1_is_the_same_fit() -> None:
    y = silu(D, 0.844, 0.208, 0.39) + NOISE * np.where(np.arange(30) % 2, 1.0, -1.0)
    fit = fit_law(D * 1e9, y, "silu", noise="ar1", compare=False)
    assert fit.correlation == 0.0
    assert fit.intervals == fit_law(D * 1e9, y, "silu", compare=False).intervals


def test_correlation_is_estimated_from_a_long_curve() -> None:
    grid = np.linspace(1, 100, 400)
    for rho in (0.0, 0.6):
        y = relu(grid, 0.449, -3.05, 0.286, 0.0674) + NOISE * correlated(400, rho)
        found, evidence = estimate_correlation(fit_law(grid * 1e9, y, "relu", compare=False).profile)
        assert found == pytest.approx(rho, abs=0.12)
        assert (evidence > 3.84) == (rho > 0)


def test_durbin_watson_by_hand() -> None:
    assert durbin_watson(np.array([1.0, 1.0, 1.0])) == 0.0
    assert durbin_watson(np.array([1.0, 2.0, 1.0])) == pytest.approx(2 / 6)
    assert durbin_watson(np.zeros(3)) == 2.0


def test_json_has_the_promised_names(relu_fit: LawFit, silu_fit: LawFit) -> None:
    data = json.loads(json.dumps(relu_fit.to_json(), allow_nan=False))
    assert {"law", "alpha", "b", "c", "A_0", "intervals", "mae", "mse", "limit", "rivals", "warnings"} <= set(data)
    assert data["law"] == "relu"
    assert data["intervals"]["alpha"] == list(relu_fit.intervals["alpha"])
    assert data["limit"] == data["A_0"]
    assert len(data["residuals"]) == data["n_points"] == 30
    assert {"law", "mse", "aicc", "heldout_mse"} <= set(data["rivals"][0])
    assert "b" not in silu_fit.to_json()


def test_json_writes_an_infinite_end_as_null() -> None:
    fit = fit_law(D * 1e9, noisy(0.06 + 0.05 * D**-0.6, size=1e-4), "relu", compare=False)
    assert json.loads(json.dumps(fit.to_json(), allow_nan=False))["intervals"]["c"][1] is None
    assert finite((1.0, math.nan, "a")) == [1.0, None, "a"]
    assert bound_ends({"b": (-math.inf, 0.0)}, {}) == {"b": ("low",)}


@settings(max_examples=25)
@given(
    law=st.sampled_from(["relu", "silu"]),
    alpha=st.floats(0.15, 2.0),
    limit=st.floats(0.02, 0.6),
    change=st.floats(0.01, 0.3),
    last=st.floats(5.0, 500.0),
    size=st.sampled_from([1e-5, NOISE, 3e-3]),
    n=st.integers(8, 40),
    seed=st.integers(0, 100),
)
def test_any_curve_is_fitted_within_the_bounds(
    law: Any, alpha: float, limit: float, change: float, last: float, size: float, n: int, seed: int
) -> None:
    grid = np.linspace(last / n, last, n)
    shape = np.exp(-3 * (grid / last) ** alpha) if law == "relu" else 1 - (grid / grid[0]) ** -alpha
    truth = limit + change * shape
    y = np.clip(noisy(truth, seed, size), 0, 1)
    try:
        fit = fit_law(grid * 1e9, y, law, compare=False)
    except ValueError as error:
        if "no such curve fits better than a constant" not in str(error) or size < change / 10:
            raise
        return
    assert 0 <= fit.A_0 <= 1
    assert fit.c > 0
    assert fit.alpha > 0
    if 0 <= truth.min() <= truth.max() <= 1 and np.array_equal(y, noisy(truth, seed, size)):
        assert fit.mse <= np.mean((y - truth) ** 2) * (1 + 1e-6) + 1e-16
    for name, (low, high) in fit.intervals.items():
        assert low <= getattr(fit, name) <= high
    assert 0 <= fit.limit_interval[0] <= fit.limit_interval[1] <= 1
    assert fit.intervals["alpha"][0] >= 0
    assert fit.intervals["c"][0] >= 0
    mean, low, high = fit.predict(np.geomspace(last * 1e7, last * 1e12, 7))
    assert np.isfinite(mean).all()
    assert (low <= mean).all()
    assert (mean <= high).all()
    within = fit.tokens_to_within(change / 20)
    assert 0 <= within.low <= within.value <= within.high
    json.dumps(fit.to_json(), allow_nan=False)


RISING = np.arange(1, 11) * 1e9
FALLING_RATIO = 0.07 + 0.03 * np.exp(-np.arange(1, 11) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": RISING[::-1]}, r"tokens must rise, but position 1 has 9e\+09 after 1e\+10; sort the checkpoints"),
        ({"tokens": np.full(10, 1e9)}, r"tokens must rise, but position 1 has 1e\+09 after 1e\+09; sort"),
        ({"tokens": RISING - 1e9}, "tokens must be positive, got 0; leave the untrained checkpoint out"),
        ({"tokens": RISING[:9]}, "tokens and activation_ratio differ in length: 9 and 10; give one"),
        (
            {"activation_ratio": 100 * FALLING_RATIO},
            r"activation_ratio must be in \[0, 1\], got .* at position 0; divide",
        ),
        ({"activation_ratio": -FALLING_RATIO}, r"activation_ratio must be in \[0, 1\]"),
        ({"activation_ratio": np.append(FALLING_RATIO[:9], np.nan)}, "must be finite, got nan at position 9; leave"),
        ({"tokens": np.append(RISING[:9], np.inf)}, "tokens must be finite, got inf at position 9"),
        ({"activation_ratio": ["a"] * 10}, "activation_ratio must be numbers, got .*; convert them first"),
        ({"activation_ratio": FALLING_RATIO.reshape(2, 5)}, r"an array of shape \(2, 5\); flatten it"),
        ({"weights": np.ones(3)}, "weights and activation_ratio differ in length: 3 and 10; give one weight a point"),
        ({"weights": np.zeros(10)}, "weights must be positive, got 0; leave a point out"),
        (
            {"drop_first": 6},
            "4 points are too few for the relu law with 4 coefficients; measure at least 5 .* drop_first",
        ),
        (
            {"drop_first": 7, "law": "silu"},
            "3 points are too few for the silu law with 3 coefficients; measure at least 4",
        ),
        ({"drop_first": -1}, "drop_first must be a number of points >= 0, got -1"),
        ({"drop_first": 1.5}, "drop_first must be a number of points >= 0, got 1.5"),
        ({"drop_first": 20}, "0 points are too few"),
        ({"law": "gelu"}, "law must be 'auto', 'relu' or 'silu', got 'gelu'"),
        ({"noise": "white"}, "noise must be 'independent' or 'ar1', got 'white'"),
        ({"level": 95}, r"level must be in \(0, 1\), got 95; 0.95 asks for 95 % intervals"),
        ({"holdout": 1.0}, r"holdout must be in \(0, 1\), got 1.0"),
        ({"law": "silu"}, "the silu law can only rise with tokens, and no such curve .* constant; try law='relu'"),
        ({"law": "relu", "activation_ratio": 0.5 - FALLING_RATIO}, "relu law can only fall with tokens"),
        ({"law": "auto", "activation_ratio": np.full(10, 0.1)}, "the ratio neither falls like the relu law nor rises"),
    ],
)
def test_errors_say_what_is_wrong_and_what_mends_it(change: dict[str, Any], message: str) -> None:
    arguments = {"tokens": RISING, "activation_ratio": FALLING_RATIO, "law": "relu", "compare": False} | change
    with pytest.raises(ValueError, match=message) as caught:
        fit_law(**arguments)
    assert "\n" not in str(caught.value)


def test_predictions_refuse_what_is_no_number_of_tokens(silu_fit: LawFit) -> None:
    with pytest.raises(ValueError, match="tokens must be positive, finite numbers; pass training tokens"):
        silu_fit.predict([0.0])
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        silu_fit.predict(1e9, level=1.0)
    with pytest.raises(ValueError, match="x must be a positive distance in activation ratio, got 0"):
        silu_fit.tokens_to_within(0)
