"""Inverting CETT curves: the interpolated threshold against the exact one, and every shape a curve can have."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuron_sparsity import metrics
from neuron_sparsity.curves import CettCurves
from neuron_sparsity.metrics import EXACT_ZERO_THRESHOLD


def random_layer(*, n_token: int, n_neuron: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_token, n_neuron, generator=generator)
    if kind == "relu":
        z = z.relu()
    elif kind == "heavy":
        z = z**3
    return z, torch.randn(n_neuron, 24, generator=generator) * torch.rand(n_neuron, 1, generator=generator)


def measured(z: Tensor, w_out: Tensor, n_points: int) -> CettCurves:
    """The curve of one layer at quantiles of its positive contributions, half of them in the uppermost tenth."""
    c = metrics.contribution(z, w_out)
    positive = c[c > 0].sort().values
    quantiles = torch.cat((torch.linspace(0.02, 0.9, n_points // 2), 1 - torch.logspace(-1.1, -4, n_points // 2)))
    cuts = positive[quantiles.mul(len(positive) - 1).long()]
    return curves([(float(t), float(metrics.cett(z, w_out, float(t)))) for t in cuts], maximum=float(positive[-1]))


def curves(points: list[tuple[float, float]], *, maximum: float) -> CettCurves:
    array = np.array(points, dtype=np.float64)
    return CettCurves(
        threshold=array[None, :, 0],
        cett=array[None, :, 1],
        activation_ratio=np.linspace(1.0, 0.0, len(array))[None],
        maximum=np.array([maximum]),
        silent_tokens=np.array([0]),
        n_tokens=100,
        nonzero_ratio=np.array([1.0]),
    )


@pytest.mark.parametrize("kind", ["dense", "relu", "heavy"])
@pytest.mark.parametrize("n_neuron", [63, 300])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_the_interpolated_threshold_is_the_exact_one(kind: str, n_neuron: int, target: float) -> None:
    z, w_out = random_layer(n_token=200, n_neuron=n_neuron, kind=kind)
    (threshold,) = measured(z, w_out, 60).thresholds_at(target)
    assert threshold == pytest.approx(metrics.threshold_for_cett(z, w_out, target), rel=0.03)
    assert float(metrics.cett(z, w_out, threshold)) == pytest.approx(target, rel=0.02)


def test_points_of_the_curve_are_met_exactly() -> None:
    curve = curves([(1.0, 0.1), (2.0, 0.3), (4.0, 0.8)], maximum=5.0)
    for threshold, cett in ((1.0, 0.1), (2.0, 0.3), (4.0, 0.8)):
        assert curve.thresholds_at(cett) == [pytest.approx(threshold, rel=1e-6)]


@pytest.mark.parametrize("cett", [0.0, -1.0])
def test_cett_zero_cuts_exact_zeros_only(cett: float) -> None:
    z, w_out = random_layer(n_token=50, n_neuron=63, kind="relu")
    (threshold,) = measured(z, w_out, 8).thresholds_at(cett)
    assert threshold == EXACT_ZERO_THRESHOLD > 0
    c = metrics.contribution(z, w_out)
    assert torch.equal(c >= threshold, c > 0)
    assert float(metrics.cett(z, w_out, threshold)) == 0.0


@pytest.mark.parametrize("cett", [1.0, 1.5, math.inf])
def test_cett_one_cuts_everything(cett: float) -> None:
    z, w_out = random_layer(n_token=50, n_neuron=63, kind="dense")
    (threshold,) = measured(z, w_out, 8).thresholds_at(cett)
    c = metrics.contribution(z, w_out)
    assert not (c >= threshold).any()
    assert threshold == torch.finfo(torch.float32).max  # and whatever a later layer grows to once earlier ones are cut


def test_a_layer_without_activations_has_the_zero_threshold_everywhere() -> None:
    silent = curves([(1.0, 0.0), (2.0, 0.0)], maximum=0.0)
    for cett in (0.0, 0.2, 1.0):
        assert silent.thresholds_at(cett) == [EXACT_ZERO_THRESHOLD]


def test_below_the_first_point_the_line_goes_on() -> None:
    # CETT = threshold / 10, a straight line of slope one in logarithms.
    curve = curves([(1.0, 0.1), (2.0, 0.2), (4.0, 0.4)], maximum=10.0)
    assert curve.thresholds_at(0.01) == [pytest.approx(0.1, rel=1e-5)]
    assert curve.thresholds_at(1e-6) == [pytest.approx(1e-5, rel=1e-4)]


def test_above_the_last_point_it_ends_where_everything_is_cut() -> None:
    curve = curves([(1.0, 0.1), (2.0, 0.2)], maximum=10.0)
    assert (
        2.0 < curve.thresholds_at(0.5)[0] < curve.thresholds_at(0.99)[0] <= np.nextafter(np.float32(10), np.float32(11))
    )


def test_a_single_point_is_joined_to_the_end() -> None:
    curve = curves([(1.0, 0.1)], maximum=10.0)
    assert curve.thresholds_at(0.1) == [pytest.approx(1.0)]
    assert curve.thresholds_at(math.sqrt(0.1)) == [pytest.approx(math.sqrt(10), rel=0.01)]


def test_only_zero_points_leave_the_end_alone() -> None:
    curve = curves([(1.0, 0.0), (2.0, 0.0)], maximum=10.0)
    thresholds = [curve.thresholds_at(cett)[0] for cett in (0.1, 0.5, 0.9)]
    assert thresholds == sorted(thresholds)
    assert all(0 < threshold <= 10.00001 for threshold in thresholds)


def test_points_that_fall_are_passed_over() -> None:
    jagged = curves([(1.0, 0.1), (2.0, 0.3), (3.0, 0.25), (4.0, 0.5)], maximum=6.0)
    smooth = curves([(1.0, 0.1), (2.0, 0.3), (4.0, 0.5)], maximum=6.0)
    for cett in (0.05, 0.2, 0.28, 0.4, 0.9):
        assert jagged.thresholds_at(cett) == smooth.thresholds_at(cett)


def test_a_cett_above_one_in_the_middle_is_no_obstacle() -> None:
    # Neurons that cancel: cutting one of them leaves an error larger than the output.
    curve = curves([(1.0, 0.1), (2.0, 0.6), (3.0, 1.4)], maximum=6.0)
    assert 2.0 < curve.thresholds_at(0.9)[0] < 3.0
    assert curve.thresholds_at(1.0)[0] > 6.0


def test_equal_thresholds_count_once() -> None:
    curve = curves([(1.0, 0.1), (1.0, 0.1), (2.0, 0.3)], maximum=6.0)
    assert curve.thresholds_at(0.2) == curves([(1.0, 0.1), (2.0, 0.3)], maximum=6.0).thresholds_at(0.2)


@given(
    points=st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(0.0, 1.2)), min_size=1, max_size=8),
    ceiling=st.floats(1.0, 10.0),
    ceilings=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6),
)
def test_thresholds_never_fall_as_the_cett_rises(
    points: list[tuple[float, float]], ceiling: float, ceilings: list[float]
) -> None:
    maximum = ceiling * max(threshold for threshold, _ in points)
    curve = curves(sorted(points), maximum=maximum)
    thresholds = [curve.thresholds_at(cett)[0] for cett in sorted(ceilings)]
    assert all(b >= a * (1 - 1e-6) for a, b in itertools.pairwise(thresholds))
    inner = [t for t, cett in zip(thresholds, sorted(ceilings), strict=True) if cett < 1]
    assert all(EXACT_ZERO_THRESHOLD <= t <= maximum * (1 + 1e-6) for t in inner)
    assert all(float(np.float32(t)) == t for t in thresholds)


def test_joined_curves_hold_all_points_in_order() -> None:
    first, second = curves([(1.0, 0.1), (4.0, 0.8)], maximum=5.0), curves([(2.0, 0.3)], maximum=6.0)
    joined = first.joined(second)
    assert joined.threshold.tolist() == [[1.0, 2.0, 4.0]]
    assert joined.cett.tolist() == [[0.1, 0.3, 0.8]]
    assert joined.activation_ratio.tolist() == [[1.0, 1.0, 0.0]]
    assert joined.maximum.tolist() == [6.0]
    assert joined.n_tokens == 100
    assert joined.thresholds_at(0.3) == [2.0]


def test_heads_are_joined_only_if_they_are_of_the_same_windows() -> None:
    head, longer = curves([(1.0, 0.1)], maximum=5.0), replace(curves([(2.0, 0.3)], maximum=5.0), n_tokens=200)
    whole = curves([(1.0, 0.1), (4.0, 0.8)], maximum=5.0)
    same = replace(whole, head=head).joined(replace(whole, head=curves([(2.0, 0.3)], maximum=5.0)))
    assert same.head is not None
    assert same.head.cett.tolist() == [[0.1, 0.3]]
    assert replace(whole, head=head).joined(replace(whole, head=longer)).head is None
    assert replace(whole, head=head).joined(whole).head is None


def test_the_end_of_the_scale_is_no_guide_to_the_slope_before_it() -> None:
    """A power law up to CETT 0.1, and one token with a contribution ten thousand times larger: the law goes on."""
    points = [(t, 0.01 * t**2) for t in (1.0, 2.0, 3.0)]
    found = curves(points, maximum=3e4)
    for t in (1.3, 2.5, 3.0, 3.1):
        assert found.thresholds_at(0.01 * t**2)[0] == pytest.approx(t, rel=0.004)


@pytest.mark.parametrize("cett", [0.05, 0.2, 0.35, 0.7, 1.0])
def test_activation_ratios_are_read_off_at_one_cett_for_all_layers(cett: float) -> None:
    """Two layers whose ratios are straight in log CETT: the mean of both lines, and nothing active at CETT 1."""
    cetts = np.array([[0.1, 0.3, 0.6], [0.2, 0.4, 0.8]])
    slopes = np.array([[-0.2], [-0.3]])
    both = CettCurves(
        threshold=cetts,
        cett=cetts,
        activation_ratio=slopes * np.log(cetts),
        maximum=np.ones(2),
        silent_tokens=np.zeros(2, dtype=np.int64),
        n_tokens=10,
        nonzero_ratio=np.ones(2),
    )
    assert float(both.activation_ratio_at(np.array(cett))) == pytest.approx(-0.25 * math.log(cett), abs=1e-12)
    assert float(both.activation_ratio_at(np.array(1e-9))) == 1.0


def test_every_layer_has_its_own_points() -> None:
    both = CettCurves(
        threshold=np.array([[1.0, 2.0], [10.0, 20.0]]),
        cett=np.array([[0.1, 0.2], [0.1, 0.2]]),
        activation_ratio=np.array([[0.9, 0.8], [0.7, 0.6]]),
        maximum=np.array([5.0, 50.0]),
        silent_tokens=np.array([0, 0]),
        n_tokens=10,
        nonzero_ratio=np.array([1.0, 1.0]),
    )
    assert both.thresholds_at(0.1) == [1.0, 10.0]
    rows = both.to_json([0, 3])
    assert [row["layer"] for row in rows] == [0, 3]
    assert rows[1] == {"layer": 3, "threshold": [10.0, 20.0], "cett": [0.1, 0.2], "activation_ratio": [0.7, 0.6]}
