"""The page of a trajectory: every point, gap and definition is there, and nothing of the data becomes markup."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.report import trajectory_report
from neuron_sparsity.sparsity import LayerThreshold
from neuron_sparsity.trajectory import (
    CommonCett,
    DeadShare,
    Gap,
    SparsityAt,
    TrackedModel,
    TrajectoryPoint,
    TrajectoryResult,
)
from tests.report.browser import Tab

HOSTILE = "</script><img src=x onerror=alert(1)>"
CETT = 0.07


def at(cett: float, ratio: float, *, reached: bool = True) -> SparsityAt:
    layers = tuple(LayerThreshold(layer, 0.1, cett, ratio + 0.01 * layer, 1.0) for layer in range(3))
    dead = DeadShare(0.001, 0.02, 0.01, 0.0, (0.01, 0.02, 0.03), 2048, 3 / 2048)
    return SparsityAt(cett, ratio, 1.02, 0.011, layers, dead if reached else None, reached)


@pytest.fixture
def result() -> TrajectoryResult:
    tokens = [0, *(int(2e9 * k) for k in range(1, 16))]
    ratios = [0.5, *(float(np.exp(-0.3 * (2 * k) ** 0.5 - 1.5) + 0.1) for k in range(1, 16))]
    points = tuple(
        TrajectoryPoint(
            f"{HOSTILE}@step{n}", count, 60.0 - n, f"f{n}", at(0.05, ratio, reached=n > 0), (at(CETT, ratio),)
        )
        for n, (count, ratio) in enumerate(zip(tokens, ratios, strict=True))
    )
    common = CommonCett(CETT, False, tuple(p.checkpoint for p in points[-5:]), 1.02, 0.05, True, True, ())
    corpus = {"name": HOSTILE, "n_tokens": 2048, "window": 32, "sha256": HOSTILE}
    return TrajectoryResult(
        1.0,
        common,
        points,
        (),
        (Gap("step99", 31_000_000_000, f"cannot be loaded: {HOSTILE}"),),
        TrackedModel(3, 32, 64, "relu", True, 300, "abc"),
        corpus,
        True,
        {},
    )


def test_the_page_shows_points_law_and_gaps(result: TrajectoryResult) -> None:
    html = trajectory_report(result).html
    assert html.count("<circle") >= 4 * 15
    assert "relu law" in html
    assert "95 % band" in html
    assert "1 checkpoints are missing" in html
    assert "31,000,000,000" in html
    assert "mean rise +1.02" in html
    assert "training tokens, billions" in html
    assert re.search(r"on under 0.100\s%\s*of 2,048 tokens", html)
    assert "too short to tell dead from rare" in html  # 3 / 2048 is above 0.1 %
    assert "not reached" in html  # the untrained model by itself


def test_nothing_of_the_data_becomes_markup(result: TrajectoryResult) -> None:
    html = trajectory_report(result).html
    assert "<img src=x" not in html
    assert html.count("</script>") == html.count("<script")


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_it_fits_and_runs_nothing(tab: Tab, result: TrajectoryResult, width: int) -> None:
    page = tab.open(trajectory_report(result, title="Untouched").html, width=width)
    assert page.title() == "Untouched"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img[onerror]").count() == 0
    field = page.locator("[data-heat] .field")
    field.focus()
    for _ in range(14):
        page.keyboard.press("ArrowRight")
    said = page.locator("[data-heat] .readout").inner_text()
    assert said.startswith("layer 0, checkpoint 14 “</script><img·src=x·onerror=alert(1)>@step14”: activation ratio ")
    assert float(said.split()[-1]) == pytest.approx(result.points[14].passes[0].layers[0].activation_ratio, abs=1e-4)


def test_the_same_result_gives_the_same_bytes(result: TrajectoryResult) -> None:
    assert trajectory_report(result).html == trajectory_report(result).html


def test_too_few_points_for_a_law(result: TrajectoryResult) -> None:
    html = trajectory_report(dataclasses.replace(result, points=result.points[:3])).html
    assert "No law is fitted: 2 points are too few" in html


def test_an_unfinished_run(result: TrajectoryResult) -> None:
    pending = tuple(dataclasses.replace(point, passes=()) for point in result.points[:2])
    unfinished: Any = dataclasses.replace(result, common=None, points=(), pending=pending, gaps=(), complete=False)
    html = trajectory_report(unfinished).html
    assert "the run is not finished" in html
    assert html.count("not measured") >= 2
    assert "at the common CETT, which is not found yet" in html
    assert "Every checkpoint could be loaded" in html


def test_a_given_cett_is_said(result: TrajectoryResult) -> None:
    given = dataclasses.replace(result, common=CommonCett(CETT, True))
    assert "0.0700, given" in trajectory_report(given).html


def test_it_reads_back_what_it_writes(result: TrajectoryResult) -> None:
    assert TrajectoryResult.from_json(result.to_json()) == result
    assert result.curve()[0] == [point.tokens for point in result.points[1:]]
    assert result.curve("own")[0] == [point.tokens for point in result.points[1:]]
    with pytest.raises(ValueError, match="which must be"):
        result.curve("all")
