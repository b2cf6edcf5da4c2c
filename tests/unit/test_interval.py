"""The bootstrap interval on simulated text whose answer is known: it covers, it shrinks, and it tells few windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from neuron_sparsity.bootstrap import MIN_WINDOWS
from neuron_sparsity.cett_search import Goal
from neuron_sparsity.curves import CettCurves
from neuron_sparsity.evaluation import Evaluation
from neuron_sparsity.interval import Estimate, _solved, estimate

TARGET = math.log1p(0.01)
TRUTH = 0.045  # CETT at which the mean rise over all text is the target
SCORED = 511


def activation(cett: float) -> float:
    return -0.2 * math.log(cett) + 0.05


def curves() -> CettCurves:
    cett = np.array([[0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1, 0.2, 0.5]])
    return CettCurves(
        threshold=cett.copy(),
        cett=cett,
        activation_ratio=np.vectorize(activation)(cett),
        maximum=np.ones(1),
        silent_tokens=np.zeros(1, dtype=np.int64),
        n_tokens=1000,
        nonzero_ratio=np.ones(1),
    )


class Text:
    """`n` windows drawn from all text: each has a rise with a part linear in CETT, and an activity of its own.

    The spread is that of smollm2-135m: 0.14 nats a token of the loss difference at 1 %, a tenth of that of the KL.
    """

    def __init__(self, n: int, generator: np.random.Generator, *, spread: float = 1.0) -> None:
        self.linear = spread * 0.14 / math.sqrt(SCORED) * generator.standard_normal(n)
        self.scale = 1 + spread * 0.1 * generator.standard_normal(n)
        self.level = spread * 0.01 * generator.standard_normal(n)
        self.generator = generator

    def rise(self, cett: float) -> float:
        return float(TARGET * ((cett / TRUTH) ** 2.1 * self.scale.mean() + cett / TRUTH * self.linear.mean() / TARGET))

    def measured(self, cett: float) -> Evaluation:
        kl = TARGET * (cett / TRUTH) ** 2.1 * self.scale
        jitter = 0.0003 * self.generator.standard_normal()
        level = activation(cett) + self.level
        n = len(self.scale)
        return Evaluation(
            cett,
            [cett],
            (kl + self.linear * cett / TRUTH + jitter) * SCORED,
            kl * SCORED,
            np.full(n, SCORED),
            level,
            [float(level.mean())],
        )

    def answer(self, metric: str) -> Estimate:
        goal = Goal(1.0, metric, 0.05, SCORED * len(self.scale))  # type: ignore[arg-type]
        made = [self.measured(TRUTH * 1.03)]
        for _ in range(3):
            value = made[-1].mean(metric)
            if value <= 0:
                made.append(self.measured(2 * made[-1].cett))
                continue
            made.append(self.measured(made[-1].cett * (TARGET / value) ** 0.4))
        root = goal.root(made)
        if root is None:
            pytest.fail("the simulated search did not come near")
        return estimate(made, root, TARGET, curves(), metric=metric, n_tokens=512 * len(self.scale))


@pytest.mark.parametrize("metric", ["ppl", "kl"])
@pytest.mark.parametrize("n_windows", [16, 40])
def test_the_interval_covers_the_answer_for_all_text(metric: str, n_windows: int) -> None:
    generator = np.random.default_rng(n_windows)
    answers = [Text(n_windows, generator).answer(metric) for _ in range(150)]
    covered = np.mean([low.low <= activation(TRUTH) <= low.high for low in answers if low.low and low.high])
    assert 0.90 <= covered <= 0.99
    assert all(e.low is not None and e.high is not None and e.low < e.activation_ratio < e.high for e in answers)
    bias = np.mean([e.activation_ratio for e in answers]) - activation(TRUTH)
    assert abs(bias) < 0.004


def test_four_times_the_text_halves_it_as_it_says() -> None:
    generator = np.random.default_rng(0)

    def width(n: int) -> float:
        answers = [Text(n, generator).answer("ppl") for _ in range(20)]
        assert {e.tokens_to_halve for e in answers} == {4 * 512 * n}
        return float(np.mean([e.high - e.low for e in answers if e.high and e.low]))

    assert width(25) / width(100) == pytest.approx(2, rel=0.15)


def test_the_kl_divergence_is_known_better() -> None:
    text = Text(32, np.random.default_rng(3))
    ppl, kl = text.answer("ppl"), text.answer("kl")
    assert ppl.high is not None
    assert ppl.low is not None
    assert kl.high is not None
    assert kl.low is not None
    assert kl.high - kl.low < 0.6 * (ppl.high - ppl.low)


def test_windows_that_are_all_the_same_leave_only_the_jitter() -> None:
    answer = Text(16, np.random.default_rng(0), spread=0.0).answer("ppl")
    assert answer.low is not None
    assert answer.high is not None
    assert 0 < answer.high - answer.low < 0.01
    assert answer.activation_ratio == pytest.approx(activation(TRUTH), abs=0.004)


def test_few_windows_have_an_answer_but_no_interval() -> None:
    answer = Text(MIN_WINDOWS - 1, np.random.default_rng(0)).answer("kl")
    assert (answer.low, answer.high) == (None, None)
    assert 0 < answer.activation_ratio < 1
    assert Estimate.from_json(answer.to_json()) == answer


@pytest.mark.parametrize("shift", [-20.0, -1.0, -0.1, 0.0, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("slope", [1.5, 2.3, 4.0])
def test_the_shifted_root_is_the_one_of_a_root_finder(shift: float, slope: float) -> None:
    expected = brentq(lambda x: math.exp(slope * x) + shift * math.exp(x) - 1, -12, 12)
    assert float(_solved(np.array([shift]), slope)[0]) == pytest.approx(expected, abs=1e-9)
