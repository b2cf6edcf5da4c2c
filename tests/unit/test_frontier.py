"""Crossings and paired comparisons of curves, against answers known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neuron_sparsity.frontier import Verdict, compare, crossing, crossings, interval
from neuron_sparsity.rule_passes import RulePass


def passes(needed: np.ndarray, ratios: list[float], n: int, noise: np.ndarray) -> list[RulePass]:
    """A rule whose rise is 0.01 at the ratio `needed` of each window, plus what the window adds."""
    scored = np.full(n, 100)
    made = []
    for ratio in ratios:
        cut = 1 - ratio
        rise = 0.01 * (cut / (1 - needed)) ** 2.5 + noise * cut
        made.append(RulePass(100 * rise, 100 * 0.01 * (cut / (1 - needed)) ** 2, scored, np.full(n, ratio)))
    return made


RATIOS = [1.0, 0.9, 0.75, 0.6, 0.5, 0.3, 0.0]


def test_crossing_lies_between_the_passes_around_it() -> None:
    ratios, rises = np.array([[1.0, 0.7, 0.5, 0.0]]), np.array([[0.0, 0.004, 0.02, 2.0]])
    (found,) = crossing(ratios, rises, 0.01)
    assert 0.5 < found < 0.7
    share = (math.asinh(4) - math.asinh(1.6)) / (math.asinh(8) - math.asinh(1.6))
    assert found == pytest.approx(0.7 - 0.2 * share)


def test_crossing_of_a_rise_that_never_comes_is_nan() -> None:
    found = crossing(np.array([[1.0, 0.5, 0.0]] * 2), np.array([[0.0, 0.001, 0.005], [0.0, 0.1, 0.2]]), 0.01)
    assert math.isnan(found[0])
    assert 0.5 < found[1] < 1.0


def test_crossing_of_a_jittering_curve_is_in_the_middle_of_its_crossings() -> None:
    ratios, rises = np.array([[1.0, 0.8, 0.7, 0.6, 0.0]]), np.array([[0.0, 0.011, 0.009, 0.011, 1.0]])
    assert 0.6 < crossing(ratios, rises, 0.01)[0] < 0.82


def test_interval_holds_the_truth_and_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    n = 40
    noise = generator.normal(0, 0.01, n)  # what a window adds is the same under both rules
    first, second = passes(np.full(n, 0.60), RATIOS, n, noise), passes(np.full(n, 0.63), RATIOS, n, noise)
    whole, draws = crossings([first, second], [0.01])
    assert draws is not None
    assert whole[1, 0] - whole[0, 0] == pytest.approx(0.03, abs=0.015)
    low, high = interval(draws[:, 0, 0], n)
    assert low < whole[0, 0] < high
    verdict = compare(["a", "b"], "ppl", 1.0, whole[:, 0], draws[:, :, 0], n)
    assert verdict.order == ("a", "b")
    assert verdict.apart == (False, True)
    assert verdict.first_alone
    assert verdict.high[1] - verdict.low[1] < 0.5 * (high - low)  # type: ignore[operator]


def test_the_same_curve_twice_is_not_told_apart() -> None:
    noise = np.random.default_rng(1).normal(0, 0.01, 12)
    curve = passes(np.full(12, 0.6), RATIOS, 12, noise)
    whole, draws = crossings([curve, curve], [0.01])
    assert draws is not None
    verdict = compare(["a", "b"], "ppl", 1.0, whole[:, 0], draws[:, :, 0], 12)
    assert verdict.apart == (False, False)
    assert verdict.not_apart == ("b",)
    assert not verdict.first_alone
    assert (verdict.low, verdict.high) == ((0.0, 0.0), (0.0, 0.0))


def test_kl_divergences_are_read_in_the_same_way() -> None:
    curve = passes(np.full(9, 0.6), RATIOS, 9, np.zeros(9))
    whole, draws = crossings([curve], [0.01], "kl")
    assert whole[0, 0] == pytest.approx(0.6)
    assert draws is not None
    assert draws[:, 0, 0] == pytest.approx(whole[0, 0])


def test_few_windows_have_no_interval() -> None:
    curve = passes(np.full(4, 0.6), RATIOS, 4, np.zeros(4))
    whole, draws = crossings([curve, curve], [0.01])
    assert draws is None
    verdict = compare(["a", "b"], "kl", 1.0, whole[:, 0], None, 4)
    assert (verdict.low, verdict.apart) == ((None, None), (None, None))
    assert verdict.not_apart is None
    assert not verdict.first_alone


def test_a_rule_that_does_not_reach_p_is_left_out() -> None:
    verdict = compare(["a", "b"], "ppl", 1.0, np.array([np.nan, 0.4]), None, 3)
    assert verdict.order == ("b",)
    assert compare(["a"], "ppl", 1.0, np.array([np.nan]), None, 3).first is None
    assert Verdict.from_json(verdict.to_json()) == verdict
