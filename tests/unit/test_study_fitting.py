"""From trajectories to findings: planted laws, shapes and seeds are found again, and what is not told is said."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from neuron_sparsity.study import StudyPoint, StudyResult, fitting
from neuron_sparsity.study.measuring import Patterns
from tests.studies import a_result


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return a_result()


def test_each_activation_has_its_own_law(result: StudyResult) -> None:
    for run in result.runs:
        own, other = run.laws
        assert own.law == run.activation != other.law
        assert own.fit is not None
        assert own.told
        expected = (0.10 if run.activation == "relu" else 0.35) + 0.001 * min(run.width_depth_ratio, 50)
        assert run.limit == pytest.approx(expected + 0.002 * run.seed, abs=0.02)
        assert other.fit is None
        assert f"the {other.law} law can only" in other.problem
        assert own.fit["n_points"] == sum(point.phase == "stable" for point in run.points) == 12
        assert own.later is not None
        assert own.later["drop_first"] == 3
        assert own.later["limit"] == pytest.approx(run.limit, abs=0.02)
        assert len(own.places) == len(own.mean) == 60
        assert own.places[0] == pytest.approx(min(p.tokens for p in run.points if p.phase == "stable"))


def test_what_is_not_told_is_said() -> None:
    found = a_result(told=False)
    assert not any(run.laws[0].told for run in found.runs if run.activation == "relu")
    assert {one.quantity for one in found.series if one.activation == "relu"} == {"end"}
    for one in found.series:
        if one.quantity == "end":
            by_name = {run.name: run for run in found.runs}
            assert list(one.y) == [by_name[name].end_ratio for name in one.runs]


def test_a_limit_that_rests_on_the_first_points_is_not_told() -> None:
    """The fall is over after two points; what comes later is flat and noisy, and tells no limit by itself."""
    ratios = [0.40, 0.30, 0.201, 0.199, 0.2005, 0.1985, 0.2015, 0.1995, 0.2, 0.1982, 0.2011, 0.1992]
    points = [
        StudyPoint(n, 40_000 * n, "stable", ratio, None, None, 9.0, 1.0, None, (ratio,))
        for n, ratio in enumerate(ratios, 1)
    ]
    found = fitting.law_found(points, "relu")
    assert found.fit is not None
    low, high = found.fit["limit_interval"]
    assert 0.19 < low < high < 0.21
    assert not found.told


def test_shape_and_scale(result: StudyResult) -> None:
    by_kind = {(one.kind, one.activation): one for one in result.series}
    assert set(by_kind) == {(kind, act) for kind in ("width_depth", "scale") for act in ("relu", "silu")}
    wide = by_kind["width_depth", "relu"]
    assert wide.quantity == "limit"
    assert len(wide.x) == 7  # three seeds of one shape, four other shapes
    assert wide.fit is not None
    low, high = wide.fit["intervals"]["slope"]
    assert low <= 0.001 <= high
    scale = by_kind["scale", "silu"]
    assert scale.x == tuple(float(run.parameters["non_embedding"]) for run in result.runs if run.name in scale.runs)
    assert scale.fit is not None
    assert "slope" in scale.fit


def test_seeds(result: StudyResult) -> None:
    (ratio,) = [one for one in result.spreads if (one.activation, one.quantity) == ("relu", "activation_ratio")]
    assert len(ratio.values) == 3
    assert ratio.mean == pytest.approx(np.mean(ratio.values))
    assert ratio.deviation == pytest.approx(0.002)
    assert {one.model for one in result.spreads} == {"m4.84"}


def test_a_gap_at_the_end_of_the_stable_phase_is_not_filled_by_an_earlier_point(result: StudyResult) -> None:
    last = result.runs[0].stable_end
    assert last is not None
    assert last.activation_ratio == result.runs[0].end_ratio
    gone = dataclasses.replace(result.runs[0], end_ratio=None)
    assert gone.stable_end is None
    for one in fitting.spreads([gone, *result.runs[1:]]):
        assert len(one.values) == (2 if one.activation == gone.activation else 3)


def test_agreement_is_that_of_the_tokens(result: StudyResult) -> None:
    seeds = [one for one in result.agreements if one.kind == "seed"]
    scales = [one for one in result.agreements if one.kind == "scale"]
    assert len(seeds) == len(scales) == 6  # three pairs of three, for each activation function
    assert all(one.n_entries == 32 for one in result.agreements)  # those that occur eight times or more
    drawn = [one for one in result.agreements if one.pairs]
    assert [(one.first, one.second) for one in drawn] == [
        ("m2.36-relu-0", "m4.84-relu-0"),
        ("m2.36-silu-0", "m4.84-silu-0"),
    ]
    x, y = np.array([pair[1:] for pair in drawn[0].pairs]).T
    assert drawn[0].correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert drawn[0].pairs[0][0] == "t39"  # the most frequent first
    constant = Patterns(torch.zeros(1, 2), torch.zeros(40), torch.full((40,), 9), 360, "x")
    flat = fitting._agreement("seed", "a", "b", {"a": constant, "b": constant}, None)
    assert (flat.correlation, flat.n_entries) == (None, 40)


def test_frequencies_are_counted(result: StudyResult) -> None:
    edges = fitting.frequency_edges(4096)
    assert edges[-1] == 1.0
    assert edges[0] <= 1 / 4096
    seen = Patterns(torch.tensor([[0.0, 1 / 4096, 0.5, 1.0]]), torch.zeros(4), torch.zeros(4), 4096, "x")
    shares = fitting._shares(seen, edges)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == shares[1] == 0.25
    assert shares[-1] == 0.5
    assert len(shares) == len(edges)
    assert all(run.frequency_shares for run in result.runs)


def test_half_of_the_change() -> None:
    def point(tokens: int, ratio: float) -> StudyPoint:
        return StudyPoint(1, tokens, "stable", ratio, None, None, 9.0, 1.0, None, (ratio,))

    assert fitting._half_tokens([point(100, 0.4), point(400, 0.2), point(1600, 0.0)]) == pytest.approx(400)
    assert fitting._half_tokens([point(100, 0.4), point(1600, 0.0)]) == pytest.approx(400)
    assert fitting._half_tokens([point(100, 0.1), point(400, 0.1)]) is None
    assert fitting._half_tokens([point(100, 0.1)]) is None


def test_a_study_is_read_back(result: StudyResult) -> None:
    data = json.loads(json.dumps(result.to_json()))
    assert StudyResult.from_json(data).to_json() == result.to_json()
    assert not result.complete
