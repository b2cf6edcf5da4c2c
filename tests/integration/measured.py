"""What the tests of placement compare: everything this package measures, of one model held in different ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from neuron_sparsity.ablation import AblationResult, removable_neurons
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import perplexity
from neuron_sparsity.ranking import TokenRanking, rank
from neuron_sparsity.recorder import NeuronStatistics, record
from neuron_sparsity.sparsity import SparsityResult, cett_ppl_sparsity, sparsify

COUNTS = ("zero_count", "histogram", "above_count", "example_position", "example_context")


@dataclass(frozen=True)
class Measured:
    ppl: float
    stats: NeuronStatistics
    sparsity: SparsityResult
    ppl_inside: float
    tokens: TokenRanking
    removable: AblationResult


def measure(model: Any, windows: Windows) -> Measured:
    options: dict[str, Any] = {"batch_size": 2}
    stats = record(model, windows, thresholds={"some": [0.1, 0.1]}, **options)
    sparsity = cett_ppl_sparsity(model, windows, p_percent=10.0, tolerance_percent=1.0, **options)
    with sparsify(model, sparsity):
        inside = perplexity(model, windows, **options).ppl
    return Measured(
        ppl=perplexity(model, windows, **options).ppl,
        stats=stats,
        sparsity=sparsity,
        ppl_inside=inside,
        tokens=rank(model, windows, per_token=True, n_tokens=12),
        removable=removable_neurons(model, windows, rank(stats), p_percent=5.0, **options),
    )


def assert_same(found: Measured, expected: Measured, *, rel: float = 1e-5) -> None:
    """Integers exactly, floats to rounding."""
    assert found.stats.model == expected.stats.model
    for name in COUNTS:
        assert torch.equal(getattr(found.stats, name), getattr(expected.stats, name)), name
    for name in ("contribution_sum", "contribution_max", "activation_sum", "w_norm", "example_value"):
        torch.testing.assert_close(getattr(found.stats, name), getattr(expected.stats, name), rtol=rel, atol=rel)
    assert torch.equal(found.tokens.neuron, expected.tokens.neuron)
    assert found.ppl == pytest.approx(expected.ppl, rel=rel)
    assert found.ppl_inside == pytest.approx(expected.ppl_inside, rel=rel)
    assert found.sparsity.thresholds == pytest.approx(expected.sparsity.thresholds, rel=1e-3)
    assert found.sparsity.activation_ratio == pytest.approx(expected.sparsity.activation_ratio, abs=1e-3)
    assert found.removable.removable == expected.removable.removable
    assert found.removable.ppl_ablated == pytest.approx(expected.removable.ppl_ablated, rel=rel)
