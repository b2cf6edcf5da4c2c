"""The linear half of a fit and the region, against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity.laws.linear import Bowls, Observations
from neuron_sparsity.laws.profile import Shape, bowls_of, find_optimum, valleys
from neuron_sparsity.laws.shapes import ReluLaw, SiluLaw


def observations(seed: int, n: int = 12, correlation: float = 0.0) -> Observations:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 3.0, n)
    return Observations(np.linspace(0, 3, n), rng.uniform(-0.3, 1.3, n), weight / weight.mean(), correlation)


def brute_sse(data: Observations, shape: Any, a: Any, b: Any) -> Any:
    residuals = data.whiten(data.y - a[..., None] - b[..., None] * shape)
    return np.sum(residuals**2, axis=-1)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_without_bounds_it_is_least_squares(correlation: float) -> None:
    data, shape = observations(0, correlation=correlation), np.exp(-np.linspace(0, 3, 12))
    design = data.whiten(np.stack([np.ones(12), shape])).T
    (a, b), (sse,), *_ = np.linalg.lstsq(design, data.whiten(data.y), rcond=None)
    bowls = Bowls.of(data, shape[None], bounded=False)
    assert (bowls.a[0], bowls.b[0], bowls.floor[0]) == pytest.approx((a, b, sse))
    inverse = np.linalg.inv(design.T @ design)
    low, high = bowls.extent(sse + 0.1, 2.0, 3.0)
    reach = np.sqrt(0.1 * np.array([2.0, 3.0]) @ inverse @ np.array([2.0, 3.0]))
    assert (low[0], high[0]) == pytest.approx((2 * a + 3 * b - reach, 2 * a + 3 * b + reach))


@given(
    seed=st.integers(0, 10_000),
    f_a=st.sampled_from([0.0, 1.0]),
    f_b=st.sampled_from([0.0, 1.0, -0.7]),
    rise=st.floats(0.01, 2),
)
def test_bounded_bottom_and_extent_are_those_of_a_fine_grid(seed: int, f_a: float, f_b: float, rise: float) -> None:
    data = observations(seed)
    shape = np.random.default_rng(seed).uniform(-1, 1, 12)
    bowls = Bowls.of(data, shape[None])
    sse, a, b = (float(values[0]) for values in bowls.solve())
    assert 0 <= a <= 1
    assert b >= 0
    grid_a, grid_b = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 5, 1001), indexing="ij")
    heights = brute_sse(data, shape, grid_a, grid_b)
    assert sse <= heights.min() + 1e-12
    assert sse == pytest.approx(heights.min(), abs=0.01)
    assert sse == pytest.approx(brute_sse(data, shape, np.array(a), np.array(b)))
    if f_a == f_b == 0:
        return
    low, high = bowls.extent(sse + rise, f_a, f_b)
    values = (f_a * grid_a + f_b * grid_b)[heights <= sse + rise]
    assert low[0] <= values.min() + 1e-9
    assert high[0] >= values.max() - 1e-9
    assert (low[0], high[0]) == pytest.approx((values.min(), values.max()), abs=0.03)


def test_nothing_is_below_a_cut_that_is_too_low() -> None:
    data = observations(1)
    bowls = Bowls.of(data, np.linspace(0, 1, 12)[None])
    assert np.isnan(bowls.extent(float(bowls.solve()[0][0]) * 0.9, 1.0, 0.0)).all()


def test_a_bowl_knows_the_best_of_one_parameter_given_the_other() -> None:
    bowls = Bowls.of(observations(2), np.linspace(0, 1, 12)[None], bounded=False)
    assert bowls.b_at(float(bowls.a[0])) == pytest.approx(bowls.b)
    assert bowls.a_at(float(bowls.b[0])) == pytest.approx(bowls.a)
    for b in (-0.2, 0.4):
        best = bowls.sse(bowls.a_at(b), np.array([b]))
        assert best < bowls.sse(bowls.a_at(b) + 0.01, np.array([b]))
        assert best < bowls.sse(bowls.a_at(b) - 0.01, np.array([b]))


def test_bowls_in_parts_are_the_same_bowls(monkeypatch: pytest.MonkeyPatch) -> None:
    data, law = observations(3), ReluLaw(0.0, 3.0)
    shape = Shape(np.linspace(0.1, 2, 50), np.linspace(-1, 1, 50))
    whole = bowls_of(law, data, shape)
    monkeypatch.setattr("neuron_sparsity.laws.profile._MAX_ELEMENTS", 100)
    parts = bowls_of(law, data, shape)
    for name in ("floor", "a", "b", "m_ab", "spread"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("kind", [ReluLaw, SiluLaw])
def test_coefficients_give_the_curve_of_the_shape(kind: Any) -> None:
    law = kind(0.5, 4.0)
    shape = Shape(np.asarray(0.7), np.asarray(0.3 if kind is ReluLaw else 0.0))
    x = np.linspace(0.5, 4.0, 9)
    c = law.coefficients(shape, 0.1, 0.04)
    D = np.exp(x)
    curve = (
        np.exp(-c["c"] * D ** c["alpha"] + c["b"]) + c["A_0"]
        if kind is ReluLaw
        else c["A_0"] - c["c"] / D ** c["alpha"]
    )
    np.testing.assert_allclose(0.1 + 0.04 * law.values(shape, x), curve)
    distance = abs(float(curve[5]) - 0.1)
    assert float(law.x_within(shape, np.asarray(0.04), distance)) == pytest.approx(x[5])


def test_a_noise_free_curve_has_its_optimum_found_from_any_valley() -> None:
    x = np.log(np.linspace(1, 50, 25))
    data = Observations(x, np.exp(-0.3 * np.exp(0.8 * x) - 2.5) + 0.05, np.ones(25))
    best = find_optimum(ReluLaw(float(x[0]), float(x[-1])), data)
    assert float(best.shape.alpha) == pytest.approx(0.8, rel=1e-3)
    assert best.sse < 1e-12


def test_valleys_come_lowest_first() -> None:
    assert valleys(np.array([3.0, 1.0, 2.0, 0.5, 4.0, 2.0])) == [3, 1, 5]
