"""The sequence of truncated passes on laws whose answer is known: how many, where they stop, and what they return."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.cett_search import CettSearch, Goal, carried
from neuron_sparsity.evaluation import Evaluation

N_SCORED = 8192
Law = Callable[[float], float]


class FakeEvaluator:
    """Laws instead of a model; counts what it is asked for."""

    def __init__(self, rise: Law, kl: Law, *, covered: tuple[float, float] = (0.0, 1.0), off: float = 0.0) -> None:
        self.rise, self.kl, self.covered, self.off = rise, kl, covered, off
        self.evaluations: list[Evaluation] = []
        self.extended: list[float] = []
        self.refined = 0
        self.curves: Any = SimpleNamespace(
            maximum=np.ones(2), covers=lambda cett: self.covered[0] <= cett <= self.covered[1]
        )

    def truncate(self, cett: float) -> Evaluation:
        assert 0 < cett <= 1
        one = np.array([N_SCORED])
        made = Evaluation(cett, [cett], self.rise(cett) * one, self.kl(cett) * one, one, np.ones(1), [0.5])
        self.evaluations.append(made)
        return made

    def extend(self, cett: float) -> None:
        self.extended.append(cett)
        self.covered = (min(self.covered[0], 0.8 * cett), max(self.covered[1], 1.25 * cett))

    def check(self, *thresholds: list[float]) -> list[np.ndarray]:
        return [np.array(some * 2) * (1 + (0.0 if self.refined else self.off)) for some in thresholds]

    def refine(self, thresholds: list[float]) -> None:
        self.refined += 1


def power_law(root: float, slope: float, target: float = math.log1p(0.01), jitter: float = 0.0) -> Law:
    generator = np.random.default_rng(0)
    return lambda cett: target * ((cett / root) ** slope + jitter * generator.standard_normal())


def run(
    evaluator: FakeEvaluator, guess: float, *, p: float = 1.0, metric: str = "ppl"
) -> tuple[CettSearch, Evaluation]:
    goal = Goal(p, metric, 0.1 * p, N_SCORED)  # type: ignore[arg-type]
    search = CettSearch(evaluator, goal)  # type: ignore[arg-type]
    best = search.approach(guess)
    best, _ = search.checked(best, *evaluator.check(best.thresholds))
    return search, best


@pytest.mark.parametrize("slope", [1.7, 2.3, 3.0])
@pytest.mark.parametrize("off", [0.85, 1.0, 1.1])
def test_two_or_three_passes_find_a_power_law(slope: float, off: float) -> None:
    evaluator = FakeEvaluator(power_law(0.045, slope), power_law(0.05, 2.1))
    search, best = run(evaluator, 0.045 * off)
    assert 2 <= len(evaluator.evaluations) <= 3
    assert search.reached()
    assert best.percent("ppl") == pytest.approx(1, abs=0.05)
    assert best.cett == pytest.approx(0.045, rel=0.02)


def test_jitter_costs_few_passes_more_and_the_line_through_all_is_near() -> None:
    counts, off = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        target = math.log1p(0.01)

        def jittering(cett: float, generator: Any = generator, target: float = target) -> float:
            return float(target * ((cett / 0.045) ** 2.4 + 0.03 * generator.standard_normal()))

        evaluator = FakeEvaluator(jittering, power_law(0.05, 2.1))
        search, best = run(evaluator, 0.045 * math.exp(0.09 * generator.standard_normal()))
        counts.append(len(evaluator.evaluations))
        root = search.goal.root(evaluator.evaluations)
        assert root is not None
        off.append(math.log(root.cett / 0.045))
        assert best.percent("ppl") == pytest.approx(1, abs=0.05 if len(evaluator.evaluations) < 3 else 0.1)
    assert np.mean(counts) < 3
    assert np.mean(np.array(counts) <= 3) >= 0.9  # three are the price that is promised
    assert max(counts) <= 5
    assert float(np.std(off)) < 0.012
    assert abs(float(np.mean(off))) < 0.006


def test_from_three_passes_near_p_on_twice_as_far_will_do() -> None:
    """The third pass lies outside half the tolerance: the end inside the whole one, and not the end beyond it."""
    target = math.log1p(0.01)

    def jittering(*jitter: float) -> FakeEvaluator:
        left = iter(jitter)
        return FakeEvaluator(lambda cett: target * ((cett / 0.045) ** 2.4 + next(left)), power_law(0.05, 2.1))

    evaluator, beyond = jittering(0.05, -0.07, 0.07), jittering(0.05, -0.07, 0.12, 0.0)
    _, best = run(evaluator, 0.047)
    assert len(evaluator.evaluations) == 3
    assert best is evaluator.evaluations[-1]
    assert 1.05 < best.percent("ppl") < 1.1
    _, best = run(beyond, 0.047)
    assert len(beyond.evaluations) == 4
    assert best.percent("ppl") == pytest.approx(1, abs=0.05)


def test_the_kl_divergence_is_searched_when_it_is_asked_for() -> None:
    evaluator = FakeEvaluator(power_law(0.045, 2.4), power_law(0.05, 2.1))
    _, best = run(evaluator, 0.047, metric="kl")
    assert best.percent("kl") == pytest.approx(1, abs=0.05)
    assert best.cett == pytest.approx(0.05, rel=0.02)
    assert len(evaluator.evaluations) == 2


@pytest.mark.parametrize("p", [0.01, 1.0, 10.0, 200.0])
def test_any_p(p: float) -> None:
    target = math.log1p(p / 100)
    evaluator = FakeEvaluator(power_law(0.1, 2.0, target), power_law(0.1, 2.1, target))
    _, best = run(evaluator, 0.08, p=p)
    assert best.percent("ppl") == pytest.approx(p, rel=0.05)


def test_a_pass_by_luck_is_not_the_end() -> None:
    """The first pass hits p, the second says that the law lies elsewhere: both count."""
    values = iter([math.log1p(0.01), 1.2 * math.log1p(0.01)])
    law = power_law(0.04, 2.4)
    evaluator = FakeEvaluator(lambda cett: next(values, law(cett)), power_law(0.05, 2.1))
    run(evaluator, 0.045)
    assert len(evaluator.evaluations) > 2


def test_what_is_not_reached_is_said_after_a_look_at_cett_one() -> None:
    evaluator = FakeEvaluator(lambda cett: 0.001 * cett, lambda cett: 0.001 * cett)
    search, best = run(evaluator, 0.05)
    assert not search.reached()
    assert best.cett == 1.0


def test_a_law_that_is_negative_at_first_is_followed_outwards() -> None:
    target = math.log1p(0.01)
    evaluator = FakeEvaluator(lambda cett: target * ((cett / 0.1) ** 2.1 - 2 * cett / 0.1), power_law(0.1, 2.1))
    search, best = run(evaluator, 0.1)
    assert search.reached()
    assert best.percent("ppl") == pytest.approx(1, abs=0.05)


def test_curves_are_measured_further_out_where_they_end_and_not_elsewhere() -> None:
    inside = FakeEvaluator(power_law(0.045, 2.4), power_law(0.05, 2.1), covered=(0.035, 0.06))
    run(inside, 0.045)
    assert not inside.extended
    outside = FakeEvaluator(power_law(0.1, 2.4), power_law(0.05, 2.1), covered=(0.035, 0.06))
    run(outside, 0.045)
    assert 1 <= len(outside.extended) <= 2
    assert all(cett > 0.06 for cett in outside.extended)


def test_thresholds_that_miss_their_cett_are_interpolated_anew_and_evaluated_again() -> None:
    evaluator = FakeEvaluator(power_law(0.045, 2.4), power_law(0.05, 2.1), off=0.01)
    _, best = run(evaluator, 0.045)
    assert evaluator.refined == 1
    assert best is evaluator.evaluations[-1]
    exact = FakeEvaluator(power_law(0.045, 2.4), power_law(0.05, 2.1), off=0.003)
    run(exact, 0.045)
    assert exact.refined == 0


def test_one_pass_is_enough_where_jitter_is_small_against_the_tolerance() -> None:
    target = math.log1p(0.05)
    evaluator = FakeEvaluator(power_law(0.1, 2.3, target), power_law(0.1, 2.1, target))
    goal = Goal(5.0, "ppl", 0.5, 65_536)
    assert (goal.fewest, Goal(5.0, "ppl", 0.5, N_SCORED).fewest, Goal(5.0, "kl", 0.5, N_SCORED).fewest) == (1, 2, 1)
    search = CettSearch(evaluator, goal)  # type: ignore[arg-type]
    assert search.approach(0.1005).cett == 0.1005
    assert len(evaluator.evaluations) == 1
    off = FakeEvaluator(power_law(0.1, 2.3, target), power_law(0.1, 2.1, target))
    CettSearch(off, goal).approach(0.106)  # type: ignore[arg-type]
    assert len(off.evaluations) == 2


@pytest.mark.parametrize(("more", "excess"), [(1.0, 0.0), (0.92, 0.3), (1.1, -0.2), (1.05, 0.1)])
def test_passes_at_one_p_place_the_first_pass_of_the_next(more: float, excess: float) -> None:
    """A few windows put the KL divergence off by a factor, and the rise lies above it."""

    def rise(cett: float) -> float:
        return 0.01 * (more * (cett / 0.049) ** 2.1 + excess * (cett / 0.049) ** 1.7)

    evaluator = FakeEvaluator(rise, power_law(0.049, 2.1))
    found: list[tuple[float, float]] = []
    for p in (1.0, 5.0, 10.0):
        guess = 0.049 * (math.log1p(p / 100) / 0.01) ** (1 / 2.1)
        goal = Goal(p, "ppl", 0.1 * p, N_SCORED, closely=not found)
        search = CettSearch(evaluator, goal)  # type: ignore[arg-type]
        best = search.approach(carried(guess, found))
        assert best.percent("ppl") == pytest.approx(p, abs=search.goal.tolerance)
        root = search.goal.root(evaluator.evaluations)
        assert root is not None
        found.append((guess, root.cett))
    assert len(evaluator.evaluations) <= 7


def test_the_mean_shift_is_carried_over() -> None:
    assert carried(0.2, [(0.1, 0.11), (0.15, 0.15)]) == pytest.approx(0.2 * 1.1**0.5)
    assert carried(0.9, [(0.1, 0.2)]) == 1.0
