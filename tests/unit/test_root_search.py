"""`next_cett` on laws whose answer is known: few steps, inside the bracket, no point twice, never above 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity.search import at_root, estimate_root, next_cett, spread

TARGET = math.log1p(0.01)
Law = Callable[[float], float]


def search(law: Law, target: float, *, first: float = 0.1, tolerance: float = 0.02, limit: int = 30) -> list[float]:
    """Return the CETTs that are tried until the rise is within a relative tolerance, or 1 costs too little."""
    points: list[tuple[float, float]] = []
    cett = first
    while len(points) < limit:
        points.append((cett, law(cett)))
        if abs(points[-1][1] / target - 1) <= tolerance or (cett >= 1.0 and points[-1][1] < target):
            break
        cett = next_cett(points, target)
        assert 0 < cett <= 1
        assert all(abs(math.log(cett / tried)) > 1e-9 for tried, _ in points), f"{cett} was tried before"
        assert stays_in_a_bracket(points, cett, target), f"{cett} leaves {points}"
    return [cett for cett, _ in points]


def stays_in_a_bracket(points: list[tuple[float, float]], cett: float, target: float) -> bool:
    """Whether a proposal lies between two neighbours on either side of the target, if there are such neighbours."""
    ordered = sorted(points)
    pairs = [(a[0], b[0]) for a, b in itertools.pairwise(ordered) if a[1] < target <= b[1]]
    return not pairs or any(low < cett < high for low, high in pairs)


def noisy(clean: Law, size: float, draws: Iterator[float], cett: float) -> float:
    return clean(cett) + size * TARGET * next(draws)


def power_law(root: float, slope: float) -> Law:
    return lambda cett: TARGET * (cett / root) ** slope


@pytest.mark.parametrize("slope", [1.0, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("root", [0.004, 0.05, 0.1, 0.3, 0.95])
def test_a_power_law_is_solved_in_few_steps(slope: float, root: float) -> None:
    tried = search(power_law(root, slope), TARGET)
    assert tried[-1] == pytest.approx(root, rel=0.03)
    assert len(tried) <= 6


def test_the_prior_slope_solves_its_own_law_at_once() -> None:
    assert search(power_law(0.07, 2.0), TARGET, first=0.05)[1:] == [pytest.approx(0.07)]


def test_two_points_far_apart_give_the_slope() -> None:
    law = power_law(0.1, 3.0)
    assert next_cett([(0.2, law(0.2)), (0.4, law(0.4))], TARGET) == pytest.approx(0.1)


@given(
    slope=st.floats(1.0, 3.0),
    log_root=st.floats(math.log(0.01), math.log(0.9)),
    noise=st.lists(st.floats(-0.03, 0.03), min_size=30, max_size=30),
    additive=st.booleans(),
)
def test_jitter_neither_leads_astray_nor_stalls(
    slope: float, log_root: float, noise: list[float], additive: bool
) -> None:
    root, draws = math.exp(log_root), iter(noise)
    clean = power_law(root, slope)

    def law(cett: float) -> float:
        if additive:
            return clean(cett) + TARGET * next(draws)
        return clean(cett) * (1 + next(draws))

    tried = search(law, TARGET, tolerance=0.05)
    assert len(tried) <= 14
    assert clean(tried[-1]) / TARGET == pytest.approx(1, abs=0.09)


@given(
    slope=st.floats(0.8, 4.0),
    log_first=st.floats(math.log(1e-3), 0.0),
    noise=st.lists(st.floats(-1.0, 1.0), min_size=12, max_size=12),
    size=st.floats(0.0, 3.0),
)
def test_whatever_the_noise_no_point_comes_twice_and_none_leaves_the_unit_interval(
    slope: float, log_first: float, noise: list[float], size: float
) -> None:
    draws = iter(noise)
    clean = power_law(0.1, slope)
    law = partial(noisy, clean, size, draws)
    tried = search(law, TARGET, first=math.exp(log_first), limit=12)
    assert len(set(tried)) == len(tried)
    assert all(0 < cett <= 1 for cett in tried)


def test_rises_that_are_negative_at_first_lead_outwards() -> None:
    tried = search(lambda cett: -1e-4 if cett < 0.3 else 0.2 * (cett - 0.3), TARGET, first=0.02)
    assert tried[-1] == pytest.approx(0.3 + TARGET / 0.2, rel=0.01)
    assert len(tried) <= 10


def test_one_small_rise_among_negative_ones_does_not_make_the_search_creep() -> None:
    tried = search(lambda cett: 1e-4 if cett == 0.02 else -1e-4 if cett < 0.2 else cett - 0.2, TARGET, first=0.02)
    assert tried[-1] == pytest.approx(0.2 + TARGET, rel=0.01)
    assert len(tried) <= 16


@pytest.mark.parametrize(
    "law", [lambda cett: 0.0, lambda cett: -cett, lambda cett: 0.001 * cett**2], ids=["flat", "falling", "small"]
)
def test_a_rise_that_is_never_reached_ends_at_one(law: Law) -> None:
    tried = search(law, TARGET)
    assert tried[-1] == 1.0
    assert len(tried) <= 5


def test_a_solution_just_below_one_is_found() -> None:
    assert search(power_law(0.999, 2.0), TARGET, tolerance=1e-4)[-1] == pytest.approx(0.999, rel=1e-3)


def test_a_step_is_at_most_fourfold_without_a_bracket() -> None:
    assert next_cett([(0.01, 1e-9)], TARGET) == pytest.approx(0.04)
    assert next_cett([(0.8, 5.0)], TARGET) == pytest.approx(0.2)


def test_near_points_are_averaged_along_the_slope() -> None:
    # Two passes at nearly the same CETT, one 10 % too low and one 10 % too high: between them, not at either's root.
    low, high = (0.0999, 0.9 * TARGET), (0.1, 1.1 * TARGET)
    assert low[0] < next_cett([low, high], TARGET) < high[0]


def test_a_bracket_too_narrow_for_its_margins_is_halved() -> None:
    points = [(0.1, 0.5 * TARGET), (0.1 * (1 + 1e-5), 2 * TARGET)]
    assert points[0][0] < next_cett(points, TARGET) < points[1][0]


def test_the_estimate_is_none_while_no_pass_is_near() -> None:
    assert estimate_root([(0.1, 0.1 * TARGET), (0.2, -1.0)], TARGET, jitter=0.03) is None


def test_one_pass_alone_is_known_to_the_expected_jitter() -> None:
    root = estimate_root([(0.1, TARGET)], TARGET, jitter=0.03)
    assert root is not None
    assert (root.cett, root.error, root.n_points) == (pytest.approx(0.1), pytest.approx(0.03), 1)


@pytest.mark.parametrize("size", [0.0, 0.01, 0.03, 0.05])
def test_the_error_of_the_estimate_is_what_repetitions_show(size: float) -> None:
    generator = np.random.default_rng(0)
    errors, told = [], []
    for _ in range(400):
        places = 0.1 * np.exp(np.linspace(-0.04, 0.04, 5) + generator.uniform(-0.01, 0.01))
        slope = generator.uniform(2.0, 3.0)
        rises = TARGET * np.exp(slope * np.log(places / 0.1) + size * generator.standard_normal(5))
        root = estimate_root(list(zip(places, rises, strict=True)), TARGET, jitter=max(size, 1e-6))
        assert root is not None
        assert root.n_points == 5
        errors.append(slope * math.log(root.cett / 0.1))
        told.append(root.error)
    assert abs(np.mean(errors)) < 4 * size / math.sqrt(5 * 400) + 1e-9
    assert np.mean(told) == pytest.approx(np.std(errors), rel=0.2, abs=1e-3)


def test_scatter_beyond_the_expected_jitter_is_told() -> None:
    calm = estimate_root([(0.1, 0.99 * TARGET), (0.1001, 1.01 * TARGET), (0.1002, TARGET)], TARGET, jitter=0.01)
    wild = estimate_root([(0.1, 0.85 * TARGET), (0.1001, 1.15 * TARGET), (0.1002, TARGET)], TARGET, jitter=0.01)
    assert calm is not None
    assert wild is not None
    assert wild.error > 5 * calm.error
    assert wild.cett == pytest.approx(calm.cett, rel=0.01)


def test_passes_are_spread_around_the_root() -> None:
    points = [(0.1, TARGET)]
    for _ in range(8):
        root = estimate_root(points, TARGET, jitter=0.03)
        assert root is not None
        place = spread(root, points)
        assert abs(math.log(place / root.cett)) <= 0.04 + 1e-9
        points.append((place, TARGET * (place / 0.1) ** 2.5))
    places = sorted(math.log(place / 0.1) for place, _ in points)
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.009
    assert abs(sum(places)) / len(places) < 0.01


def test_no_pass_is_made_twice_and_none_beyond_one() -> None:
    points = [(1.0, TARGET)]
    root = estimate_root(points, TARGET, jitter=0.03)
    assert root is not None
    assert 0.95 < spread(root, points) < 1.0
    assert 0.98 < at_root(root, points) < 1.0
