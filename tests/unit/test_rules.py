"""Rules by hand: masks, parameters and strengths, thresholds from the dense run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.metrics import EXACT_ZERO_THRESHOLD
from neuron_sparsity.rules import (
    RULES,
    DenseScores,
    Rule,
    ScoreHistogram,
    ThresholdCut,
    TopKCut,
    TopPCut,
    parse_rules,
    topp_counts,
)

Z = torch.tensor([[2.0, -1.0, 0.0, 0.5], [0.0, 0.0, -3.0, 1.0]])
S = torch.tensor([[0.1, -1.0, 0.9, 2.0], [0.0, 5.0, 0.2, -0.2]])
NORM = torch.tensor([1.0, 4.0, 1.0, 2.0])
C = torch.tensor([[2.0, 4.0, 0.0, 1.0], [0.0, 0.0, 3.0, 2.0]])


def cut(rule: Any) -> tuple[list[list[float]], list[int]]:
    z, active = rule(0, Z.clone(), S, NORM)
    return z.tolist(), active.tolist()


def dense(n_tokens: int = 400, seed: int = 0) -> tuple[DenseScores, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n_tokens, 50, generator=generator).abs() * scale for scale in (1.0, 30.0)]
    spread = ScoreHistogram(2)
    for layer, values in enumerate(scores):
        spread.add(layer, values)
    topp = sum(topp_counts(values) for values in scores) / (2 * scores[0].numel())
    curves = SimpleNamespace(
        activation_ratio_at=lambda cett: 1 - cett, thresholds_at=lambda cett: [float(np.float32(cett)), 2.0]
    )
    both: dict[Any, Any] = {"s": spread, "contribution": spread}
    return DenseScores(50, 2, 1.0, both, {"s": topp, "contribution": topp}, curves), scores  # type: ignore[arg-type]


def test_threshold_on_s_cuts_by_s_and_not_by_z() -> None:
    assert cut(ThresholdCut("s", (0.5,))) == ([[0.0, -1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]], [2, 0])


def test_threshold_on_contributions_cuts_by_z_times_norm() -> None:
    assert cut(ThresholdCut("contribution", (2.0,))) == ([[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, -3.0, 1.0]], [2, 2])


def test_a_neuron_that_is_exactly_zero_is_never_active() -> None:
    for rule in (
        ThresholdCut("s", (EXACT_ZERO_THRESHOLD,)),
        TopKCut("s", 4),
        TopKCut("contribution", 4),
        TopPCut("s", 1),
    ):
        z, active = cut(rule)
        assert (z, active) == (Z.tolist(), [3, 2]), rule


def test_top_k_of_each_score() -> None:
    assert cut(TopKCut("s", 2)) == ([[0.0, -1.0, 0.0, 0.5], [0.0, 0.0, -3.0, 0.0]], [2, 1])
    assert cut(TopKCut("contribution", 2)) == ([[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, -3.0, 1.0]], [2, 2])


def test_top_p_of_each_score() -> None:
    # Contributions 4, 2, 1 of 7: 0.7 needs the first two. 3, 2 of 5: 0.5 of it is the first alone, 0.7 both.
    assert cut(TopPCut("contribution", 0.7)) == ([[2.0, -1.0, 0.0, 0.0], [0.0, 0.0, -3.0, 1.0]], [2, 2])
    assert cut(TopPCut("contribution", 0.5)) == ([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -3.0, 0.0]], [1, 1])
    assert cut(TopPCut("s", 0.5)) == ([[0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]], [1, 0])


@pytest.mark.parametrize("name", [name for name in RULES if name != "zeros"])
def test_the_strongest_of_every_rule_cuts_everything_and_is_the_same_cut(name: str) -> None:
    numbers, _ = dense()
    huge = SimpleNamespace(thresholds_at=lambda cett: [float(np.finfo(np.float32).max)] * 2)
    numbers = DenseScores(50, 2, 1.0, numbers.spread, numbers.topp_ratio, huge)  # type: ignore[arg-type]
    rule = Rule(name, "contribution")
    strongest = rule.cut(rule.parameter_at(1.0, numbers), numbers)
    z, active = strongest(0, Z.clone(), S, NORM)
    assert (z == 0).all()
    assert active.tolist() == [0, 0]
    assert strongest.key == ("everything",)


@pytest.mark.parametrize("score", ["s", "contribution"])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.07])
def test_strength_at_a_ratio_keeps_that_share_of_the_dense_run(score: Any, ratio: float) -> None:
    numbers, scores = dense()
    for name in ("fat", "quantile", "topk", "topp"):
        rule = Rule(name, score)
        strength = rule.strength_at(ratio, numbers)
        parameter = rule.parameter_at(strength, numbers)
        assert rule.strength_of(parameter, numbers) == pytest.approx(strength, abs=0.011), name
        chosen = rule.cut(parameter, numbers)
        kept = [chosen(i, values.clone(), values, torch.ones(50))[1].sum() for i, values in enumerate(scores)]
        assert float(sum(kept)) / (2 * scores[0].numel()) == pytest.approx(ratio, abs=0.02), name
        if name == "quantile":
            assert [float(n) / scores[0].numel() for n in kept] == pytest.approx([ratio, ratio], abs=0.005)
        if name == "fat":
            assert kept[1] > kept[0] + 100, "one eps for layers of unlike scales"


def test_histogram_against_sorting() -> None:
    numbers, scores = dense()
    spread = numbers.spread["s"]
    for share in (0.001, 0.3, 0.77, 0.999):
        found = spread.quantile([share, share])
        for threshold, values in zip(found, scores, strict=True):
            assert float((values < threshold).float().mean()) == pytest.approx(share, abs=0.002)
    assert spread.maximum == float(scores[1].max())
    kept = sum(float((values >= 0.5).sum()) for values in scores) / 40_000
    assert spread.share_at_least([0.5, 0.5]) == pytest.approx(kept, abs=0.002)
    together = torch.cat(scores).flatten()
    assert float((together < spread.common_quantile(0.4)).float().mean()) == pytest.approx(0.4, abs=0.002)


def test_a_quantile_among_exact_zeros_cuts_them_alone() -> None:
    spread = ScoreHistogram(1)
    spread.add(0, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert spread.quantile([0.5]) == [EXACT_ZERO_THRESHOLD]


def test_top_p_counts_are_those_of_its_mask() -> None:
    from neuron_sparsity.metrics import topp_mask
    from neuron_sparsity.rules import _TOPP_GRID

    scores = torch.randn(7, 63, generator=torch.Generator().manual_seed(1)).abs()
    expected = [int(topp_mask(scores, float(1 - left_out)).sum()) for left_out in _TOPP_GRID]
    assert topp_counts(scores).tolist() == expected


def test_every_rule_stands_for_both_scores_unless_it_has_one() -> None:
    assert len(parse_rules()) == 10
    assert [rule.label for rule in parse_rules(["fat", "zeros", "topp:c"])] == [
        "fat on |s|",
        "fat on c",
        "exact zeros",
        "topp on c",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["topq"], "no rule 'topq'; rules are cett, fat, quantile, topk, topp, zeros"),
        (["fat:z"], "no score 'z' in 'fat:z'; scores are s and contribution"),
        (["cett:s"], "cett is defined on contributions only, got 'cett:s'"),
        (["topk", "topk:c"], "topk on c is named twice"),
    ],
)
def test_rules_that_there_are_not(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parse_rules(names)


@pytest.mark.parametrize(
    ("name", "parameter", "message"),
    [
        ("fat", -1.0, r"eps of fat must be in \[0, inf\], got -1"),
        ("fat", float("nan"), r"eps of fat must be in \[0, inf\], got nan"),
        ("topk", 51.0, r"k of topk must be in \[0, 50\], got 51"),
        ("topk", 1.5, "k must be a whole number, got 1.5"),
        ("topp", 1.1, r"share of topp must be in \[0, 1\], got 1.1"),
        ("quantile", -0.1, r"quantile of quantile must be in \[0, 1\], got -0.1"),
    ],
)
def test_parameters_out_of_range(name: str, parameter: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(name, "s").cut(parameter, dense()[0])
