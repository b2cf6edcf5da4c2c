"""Laws over several models: width-depth ratio, scale, and curves that share an exponent."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import linregress

from neuron_sparsity.laws import fit_joint, fit_law, fit_scale, fit_width_depth

RATIO = np.array([3.2, 6, 12, 20, 34, 55, 80, 114, 160, 220, 330, 500])
D = np.linspace(2.0, 60.0, 20)


def width_depth(ratio: Any, bottleneck: float = 114.0) -> Any:
    return 0.05 + 0.0002 * np.minimum(ratio, bottleneck)


def noisy(curve: Any, seed: int = 0, size: float = 5e-4) -> Any:
    return curve + size * np.random.default_rng(seed).standard_normal(len(curve))


def test_width_depth_by_hand() -> None:
    """0.1 + 0.01 r up to r = 5, then 0.15."""
    fit = fit_width_depth([2, 4, 5, 6, 8, 10], [0.12, 0.14, 0.15, 0.15, 0.15, 0.15])
    assert (fit.intercept, fit.slope, fit.bottleneck, fit.plateau) == pytest.approx((0.1, 0.01, 5.0, 0.15), rel=1e-4)
    assert fit.predict([3.0, 7.0]).mean == pytest.approx([0.13, 0.15])
    assert fit.r2 == pytest.approx(1.0)
    assert fit.warnings == ()


def test_width_depth_intervals_cover() -> None:
    truth = {"intercept": 0.05, "slope": 0.0002, "bottleneck": 114.0, "plateau": float(width_depth(114))}
    hits = dict.fromkeys([*truth, "curve"], 0)
    for seed in range(100):
        fit = fit_width_depth(RATIO, noisy(width_depth(RATIO), seed, 1e-3))
        for name, value in truth.items():
            low, high = fit.intervals[name]
            assert low <= getattr(fit, name) <= high
            hits[name] += low <= value <= high
        _, low, high = fit.predict(70.0)
        hits["curve"] += bool(low[0] <= width_depth(70.0) <= high[0])
    assert all(90 <= n <= 99 for n in hits.values()), hits


def test_width_depth_does_not_depend_on_order_and_scales() -> None:
    y = noisy(width_depth(RATIO), size=1e-3)
    fit, turned = fit_width_depth(RATIO, y), fit_width_depth(RATIO[::-1], y[::-1])
    assert turned.bottleneck == pytest.approx(fit.bottleneck)
    assert fit_width_depth(10 * RATIO, y).bottleneck == pytest.approx(10 * fit.bottleneck)
    assert fit.mse <= fit.mse_line
    assert fit.mse == pytest.approx(np.mean(fit.residuals**2))


def test_a_straight_line_has_no_bottleneck() -> None:
    fit = fit_width_depth(RATIO, noisy(width_depth(RATIO, 1e9), size=1e-3))
    assert fit.at_bound == {"bottleneck": ("high",)}
    assert fit.warnings[0].startswith(
        "No bottleneck is told: a straight line up to the largest ratio, 500, is in the 95 %"
    )


def test_no_dependence_on_the_ratio_is_said() -> None:
    fit = fit_width_depth(RATIO, noisy(np.full(12, 0.07), size=1e-3))
    assert any("A slope of 0 is in the 95 % interval" in sentence for sentence in fit.warnings)
    early = fit_width_depth(RATIO, noisy(width_depth(RATIO, 4.0), size=1e-5))
    assert any(
        sentence.startswith("The bottleneck may lie below 6, the second smallest") for sentence in early.warnings
    )
    falling = fit_width_depth(RATIO, 0.2 - noisy(width_depth(RATIO), size=1e-4))
    assert "The limit falls with the ratio; the paper's law rises." in falling.warnings


def test_width_depth_weights_silence_a_point() -> None:
    y, weights = noisy(width_depth(RATIO), size=1e-4), np.ones(12)
    y[3], weights[3] = 0.3, 1e-9
    assert fit_width_depth(RATIO, y, weights=weights).bottleneck == pytest.approx(114, rel=0.03)


def test_scale_is_a_straight_line_with_its_interval() -> None:
    params, limit = np.array([0.1, 0.2, 0.4, 0.8, 1.2]) * 1e9, np.array([0.409, 0.390, 0.385, 0.383, 0.382])
    fit, other = fit_scale(params, limit), linregress(np.log10(params), limit)
    assert (fit.slope, fit.p_value) == pytest.approx((other.slope, other.pvalue))
    reach = 3.18245 * other.stderr
    assert fit.slope_interval == pytest.approx((other.slope - reach, other.slope + reach), rel=1e-4)
    assert fit.depends == (other.pvalue < 0.05)
    decades = np.log10(12)
    assert fit.change == pytest.approx((fit.slope * decades, *(end * decades for end in fit.slope_interval)))
    assert fit.level_interval[0] < fit.level_at_mean < fit.level_interval[1]


def test_scale_says_whether_there_is_a_dependence() -> None:
    params = np.array([0.1, 0.2, 0.4, 0.8, 1.2]) * 1e9
    none = fit_scale(params, [0.070, 0.071, 0.070, 0.071, 0.070])
    assert not none.depends
    assert none.verdict.startswith("The limit shows no dependence on scale: ")
    some = fit_scale(params, 0.01 * np.log10(params) - 0.02, level=0.9)
    assert some.depends
    assert some.slope == pytest.approx(0.01)
    assert some.verdict.startswith("The limit changes: +0.01 for ten times the parameters (90 % interval +0.01 to")


@pytest.mark.parametrize("law", ["relu", "silu"])
def test_curves_that_share_an_exponent(law: Any) -> None:
    own = (
        {"small": (0.07, 0.2), "large": (0.06, 0.4)} if law == "relu" else {"small": (0.40, 0.1), "large": (0.38, 0.3)}
    )
    curves = {
        name: (D * 1e9, noisy(np.exp(-c * D**0.6 - 3) + a if law == "relu" else a - c / D**0.6, seed))
        for seed, (name, (a, c)) in enumerate(own.items())
    }
    fit = fit_joint(curves, law)
    assert fit.alpha_interval[0] < 0.6 < fit.alpha_interval[1]
    assert fit.p_value > 0.05
    assert fit.n_points == 40
    for name, (a, c) in own.items():
        curve, alone = fit.curves[name], fit_law(*curves[name], law, compare=False)
        assert curve.intervals["A_0"][0] < a < curve.intervals["A_0"][1]
        assert curve.intervals["c"][0] < c < curve.intervals["c"][1]
        assert curve.mse >= curve.mse_alone * (1 - 1e-9)
        assert curve.mse_alone == pytest.approx(alone.mse, rel=1e-6)
        assert np.ptp(curve.intervals["A_0"]) < np.ptp(alone.limit_interval)
        assert curve.limit == curve.to_json()["limit"]
        mean, low, high = curve.predict([1e9, 1e11])
        assert (low <= mean).all()
        assert (mean <= high).all()
        wide = np.ptp(alone.intervals["alpha"])
        assert fit.alpha_interval[1] - fit.alpha_interval[0] < wide
    assert fit.warnings == ()
    data = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    assert set(data["curves"]) == set(own)
    assert data["alpha"] == fit.alpha


def test_curves_that_do_not_share_an_exponent_are_told() -> None:
    curves = {f"{alpha}": (D * 1e9, noisy(0.4 - 0.2 / D**alpha, size=1e-4)) for alpha in (0.5, 1.0)}
    fit = fit_joint(curves, "silu")
    assert 0.5 < fit.alpha < 1.0
    assert fit.p_value < 1e-6
    assert fit.warnings[0].startswith("The curves do not share one exponent (p = ")


def test_a_joint_fit_with_a_limit_that_is_not_identified() -> None:
    curves = {"a": (D * 1e9, noisy(0.6 - 0.3 / D**0.1, 1, 3e-3)), "b": (D * 1e9, noisy(0.6 - 0.3 / D**0.1, 2, 3e-3))}
    fit = fit_joint(curves, "silu")
    assert fit.warnings[-1] == "The data do not identify the limit of a, b at 95 %."
    assert np.ptp(fit.curves["a"].intervals["A_0"]) > np.ptp(curves["a"][1])


def test_drop_first_of_a_joint_fit_goes_by_name() -> None:
    y = noisy(0.4 - 0.2 / D**0.6)
    y[:2] = 0.1
    curves = {"bent": (D * 1e9, y), "clean": (D * 1e9, noisy(0.39 - 0.1 / D**0.6, 1))}
    fit = fit_joint(curves, "silu", drop_first={"bent": 2})
    assert fit.curves["bent"].n_points == 18
    assert fit.curves["bent"].mse < 1e-6
    assert fit_joint(curves, "silu", drop_first=2).n_points == 36


def test_json_of_width_depth_and_scale_is_strict() -> None:
    fit = fit_width_depth(RATIO, noisy(width_depth(RATIO), size=1e-3))
    data = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    assert data["bottleneck"] == fit.bottleneck
    assert len(data["residuals"]) == 12
    assert not any(name.startswith("_") for name in data)
    scale = fit_scale([1e8, 1e9, 2e9], [0.07, 0.071, 0.07])
    assert json.loads(json.dumps(scale.to_json(), allow_nan=False))["slope_interval"] == list(scale.slope_interval)


CURVE = (D * 1e9, 0.4 - 0.2 / D**0.6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_width_depth([1, 2, 3], [0.1] * 3), "3 points with 3 different ratios are too few .*; measure at"),
        (lambda: fit_width_depth([1, 1, 1, 2, 2], [0.1] * 5), "5 points with 2 different ratios are too few"),
        (lambda: fit_width_depth([1, 2, 3, 4, 5], [0.1] * 4), "ratio and limit differ in length: 5 and 4; give one"),
        (
            lambda: fit_width_depth([-1, 2, 3, 4, 5], [0.1] * 5),
            "ratio must be positive, got -1; pass d_model / n_layers",
        ),
        (
            lambda: fit_width_depth([1, 2, 3, 4, 5], [7.0] * 5),
            r"limit must be in \[0, 1\], got 7 at position 0; divide",
        ),
        (lambda: fit_width_depth(RATIO, width_depth(RATIO), level=2), r"level must be in \(0, 1\), got 2"),
        (lambda: fit_width_depth(RATIO, width_depth(RATIO)).predict(-1.0), "ratio must be positive, got -1"),
        (
            lambda: fit_scale([1e9, 2e9], [0.1, 0.1]),
            "2 models of 2 sizes are too few; pass at least three of two sizes",
        ),
        (lambda: fit_scale([1e9] * 3, [0.1] * 3), "3 models of 1 sizes are too few"),
        (lambda: fit_scale([0, 1, 2], [0.1] * 3), "params must be positive, got 0; pass numbers of parameters"),
        (lambda: fit_scale([1, 2, np.nan], [0.1] * 3), "params must be finite, got nan at position 2"),
        (lambda: fit_scale([], []), "0 models of 0 sizes are too few"),
        (lambda: fit_joint({"a": CURVE}, "silu"), "a joint fit needs at least two curves, got 1; use fit_law"),
        (lambda: fit_joint({"a": CURVE, "b": CURVE}, "auto"), "law must be 'relu' or 'silu', got 'auto'"),  # type: ignore[arg-type]
        (lambda: fit_joint({"a": CURVE, "b": ([1, 1], [0.1, 0.1])}, "silu"), "curve 'b': tokens must rise"),
        (lambda: fit_joint({"a": CURVE, "b": CURVE[0]}, "silu"), "curve 'b': "),  # type: ignore[dict-item]
        (
            lambda: fit_joint({"a": CURVE, "b": ([1, 2], [0.1, 0.2])}, "silu"),
            "curve 'b': 2 points are too few; measure",
        ),
        (lambda: fit_joint({"a": CURVE, "b": CURVE}, "relu"), "curve 'a': the relu law can only fall, and this curve"),
        (lambda: fit_joint({"a": CURVE, "b": CURVE}, "silu", drop_first={"z": 1}), "drop_first names curves .*: z"),
    ],
)
def test_errors_say_what_is_wrong_and_what_mends_it(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
