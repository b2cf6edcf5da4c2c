"""The headline numbers in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.kernels import N_BINS
from neuron_sparsity.sparsity import Estimate, LayerThreshold, SparsityResult
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.summary import summary_lines

MODEL = ModelInfo("tiny", 1, 4, 4, "relu", False, "float32", "as loaded", "a test", (0,), "0")
CORPUS: dict[str, Any] = {"name": "page", "sha256": "0", "n_tokens": 2000, "window": 50, "scored_tokens": 1960}


@pytest.fixture
def result() -> SparsityResult:
    return SparsityResult(
        p_percent=1.0,
        reached=True,
        ppl_dense=20.0,
        ppl_sparse=20.2,
        ppl_increase_percent=1.0,
        cett=0.2,
        activation_ratio=0.25,
        layers=(LayerThreshold(0, 0.1, 0.2, 0.25, 1.0),),
        converged=True,
        tolerance_percent=0.02,
        evaluations=(),
        curves=(),
        silent_tokens=0,
        model=MODEL,
        corpus=CORPUS,
        cost={},
        provenance={},
    )


@pytest.fixture
def stats() -> NeuronStatistics:
    """Four neurons: never active, active on one token of 2,000 (dead), on three (not dead), on all."""
    zeros = torch.zeros(1, 4)
    return NeuronStatistics(
        model=MODEL,
        corpus=CORPUS,
        n_tokens=2000,
        zero_count=torch.tensor([[2000, 0, 0, 0]]),
        contribution_sum=zeros.double(),
        contribution_sq_sum=zeros.double(),
        activation_sum=zeros.double(),
        contribution_max=zeros,
        histogram=torch.zeros(1, 4, N_BINS, dtype=torch.int64),
        thresholds=torch.tensor([[0.1]]),
        above_count=torch.tensor([[[0], [1], [3], [2000]]]),
        threshold_names=("CETT-PPL-1%",),
        example_value=torch.zeros(1, 4, 0),
        example_position=torch.zeros(1, 4, 0, dtype=torch.int64),
        example_context=torch.zeros(1, 4, 0, 24, dtype=torch.int32),
        token_strings={},
        w_norm=zeros + 1,
    )


@pytest.fixture
def removed() -> AblationResult:
    return AblationResult(
        p_percent=1.0,
        ranking="contribution",
        scope="model",
        replacement="mean",
        n_neurons=4,
        n_removable=2,
        removable=((0, 0), (0, 1)),
        reached=True,
        ppl_dense=20.0,
        ppl_ablated=20.1,
        ppl_increase_percent=0.5,
        curve=(),
        control={"kind": "random", "seed": 0, "ppl": 30.0, "ppl_increase_percent": 50.0},
        heldout={"ppl_increase_percent": 1.5, "holds": False, "corpus": {**CORPUS, "n_tokens": 1000}},
        ranking_corpus=CORPUS,
        model=MODEL,
        corpus=CORPUS,
        cost={},
        provenance={},
    )


def test_every_number_is_said_with_what_it_was_measured_on(
    result: SparsityResult, stats: NeuronStatistics, removed: AblationResult
) -> None:
    assert summary_lines(result, stats, removed) == [
        "tiny on page: 2,000 tokens in windows of 50",
        "CETT-PPL-1%: activation ratio 0.250 (sparsity ratio 0.750) at CETT 0.2000",
        "perplexity 20.000 dense, 20.200 truncated (+1.000 %, measured)",
        "dead under CETT-PPL-1% (active on less than 0.1 % of 2,000 tokens): 2 of 4 neurons; never active: 1 "
        "(95 % upper bound of their frequency: 1.5e-03)",
        "exactly zero on all 2,000 tokens: 1 of 4 neurons (95 % upper bound of their frequency: 1.5e-03)",
        "removable for good at 1 % (contribution, mean replacement, ranked on the same text): 2 of 4 neurons "
        "(+0.500 %, 2,000 tokens)",
        "  control, as many random neurons of every layer: +50.000 %",
        "  on 1,000 held-out tokens: +1.500 %, does not hold",
        "side by side: on an average token 75.0 % of the neurons can idle at CETT-PPL-1% (2,000 tokens), for good "
        "50.00 % can go at 1 %",
    ]


def test_a_set_of_every_layer_is_told_from_one_of_the_model(removed: AblationResult) -> None:
    within = summary_lines(None, None, replace(removed, scope="layer"))[1]
    assert within.startswith("removable for good at 1 % (contribution within layers, mean replacement, ranked on the ")
    assert "within layers" not in summary_lines(None, None, removed)[1]


def test_a_removal_says_its_controls_its_interval_and_what_holds(removed: AblationResult) -> None:
    control = {"ppl_increase_percent": 3.0, "seeds": [0, 1, 2], "sd_percent": 0.25, "n_tokens": 500, "ratio": 2.5}
    holding = {"n_removable": 1, "ppl_increase_percent": 0.2, "interval": [-0.5, 0.9]}
    heldout = {"ppl_increase_percent": 1.5, "interval": [0.5, 2.5], "verdict": "not refuted", "holds": False}
    heldout |= {"corpus": {**CORPUS, "n_tokens": 1000}, "holding": holding, "holding_tried": 2}
    lines = summary_lines(None, None, replace(removed, control=control, heldout=heldout))
    assert lines[2:] == [
        "  control, as many random neurons of every layer: +3.000 % (mean of 3 seeds, sd 0.250; 500 tokens), "
        "2.50 times the damage of this ranking",
        "  on 1,000 held-out tokens: +1.500 %, 95 % interval +0.500 to +2.500 %, not refuted",
        "  the 1 weakest hold there (+0.200 %, at most +0.900 %), chosen on that text",
    ]
    rough = control | {"standard_error_percent": 0.9}
    assert summary_lines(None, None, replace(removed, control=rough))[2].endswith(
        "about 2.5 times the damage of this ranking"
    )
    one = control | {"seeds": [0], "sd_percent": None, "ratio": None}
    none = summary_lines(None, None, replace(removed, control=one, heldout=heldout | {"holding": None}))
    assert none[2].endswith("+3.000 % (1 seed; 500 tokens)")
    assert none[4] == "  no shorter set holds there of 2 that were tried"


def test_a_removal_says_what_it_does_not_know(removed: AblationResult) -> None:
    everything = summary_lines(None, None, replace(removed, reached=False, control=None, resolved=False))
    assert everything[2:5] == [
        "  1 % is not reached: no set that was tried costs more",
        "  the passes of the search were spent: more may go",
        "  no control: nothing is known of what as many random neurons cost",
    ]
    points = [{"n_removed": n, "n_tokens": n_tokens} for n, n_tokens in ((2, 2000), (3, 500), (5, 2000), (4, 2000))]
    bounded = summary_lines(None, None, replace(removed, curve=tuple(points), resolved=False))
    assert bounded[2] == "  the passes of the search were spent: 4 cost more, not all between and above was measured"
    nothing = summary_lines(None, None, replace(removed, n_removable=0, resolved=False))
    assert not any("weakest neuron" in line for line in nothing)


def test_estimates_of_both_metrics_have_their_interval_or_say_why_not(result: SparsityResult) -> None:
    ppl = Estimate("cett_ppl", 0.21, 0.251, 0.2, 0.3, 40, 3, 8000)
    kl = Estimate("cett_kl", 0.22, 0.24, None, None, 4, 2, 8000)
    lines = summary_lines(replace(result, estimates=(ppl, kl), calibration=CORPUS | {"name": "other"}), None, None)
    assert lines[3:] == [
        "  CETT-PPL-1% by all passes: activation ratio 0.251 at CETT 0.2100; 95 % interval 0.200 to 0.300 (40 windows; "
        "8,000 tokens would halve it)",
        "  CETT-KL-1% by all passes: activation ratio 0.240 at CETT 0.2200; 4 windows are too few for an interval",
        "thresholds from other text: other, 2,000 tokens",
    ]
    by_kl = replace(result, metric="cett_kl", kl=0.002, reached=False)
    assert summary_lines(by_kl, None, None)[1].startswith("CETT-KL-1% is not reached")
    assert summary_lines(by_kl, None, None)[1].endswith("the KL divergence is only 0.20 %")


def test_what_did_not_come_out_is_said(result: SparsityResult) -> None:
    unreached = summary_lines(replace(result, reached=False, ppl_increase_percent=0.3), None, None)
    assert unreached[1] == "CETT-PPL-1% is not reached: with every neuron cut (CETT 1) perplexity rises by only 0.30 %"
    rough = summary_lines(replace(result, converged=False), None, None)
    assert rough[-1].startswith("the measured rise is more than 0.02 points from 1 %")


def test_parts_that_were_not_measured_are_left_out(removed: AblationResult, stats: NeuronStatistics) -> None:
    assert summary_lines(None, None, None) == []
    nothing = summary_lines(None, None, replace(removed, n_removable=0, removable=(), control=None, heldout=None))
    assert "0 of 4 neurons" in nothing[1]
    assert nothing[2:] == ["  already the weakest neuron of this ranking costs more"]
    never_zero = replace(stats, zero_count=torch.zeros(1, 4, dtype=torch.int64), threshold_names=())
    assert summary_lines(None, never_zero, None)[1:] == ["exactly zero on all 2,000 tokens: 0 of 4 neurons"]
