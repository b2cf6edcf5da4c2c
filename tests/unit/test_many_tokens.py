"""Statistics of 10^9 to 10^12 tokens: counts are exact, sums are stable, and what is read off and shown stays right.

Nobody runs so many tokens in a test: recordings are merged as the Fibonacci numbers grow, so that no sum is round, and
a state is set to what so many tokens would have left before the next batch is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_sparsity.kernels import StatisticsState, histogram_edges, neuron_statistics
from neuron_sparsity.report import report
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import to_json_text
from neuron_sparsity.summary import summary_lines
from tests.unit.test_statistics import COUNTS, SUMS, make_activations, make_statistics

UNIT = 2.0**-53  # relative error of one addition in float64
N_MERGES = 50  # the 52nd Fibonacci number is 3.3e10: with 40 tokens each, 1.3e12


def fresh_corpus(stats: NeuronStatistics, number: int) -> NeuronStatistics:
    """The same statistics as if of other windows: the same windows twice would be refused."""
    corpus = {key: value for key, value in stats.corpus.items() if key != "parts"}
    return replace(stats, corpus=corpus | {"sha256": f"part {number}", "name": "text"})


def merged(parts: list[NeuronStatistics]) -> Iterator[tuple[NeuronStatistics, list[int]]]:
    """Yield statistics of more and more tokens, and how often each part is in them."""
    (a, weights_a), (b, weights_b) = (parts[0], [1, 0]), (parts[1], [0, 1])
    for number in range(N_MERGES):
        together = fresh_corpus(a, 2 * number).merge(fresh_corpus(b, 2 * number + 1))
        (a, weights_a), (b, weights_b) = (
            (b, weights_b),
            (together, [x + y for x, y in zip(weights_a, weights_b, strict=True)]),
        )
        yield b, weights_b


@pytest.fixture(scope="module")
def parts() -> list[NeuronStatistics]:
    noise = torch.rand(2, 5, 8, 3, generator=torch.Generator().manual_seed(1))
    return [make_statistics(make_activations(seed, 5) * noise, str(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def many(parts: list[NeuronStatistics]) -> tuple[NeuronStatistics, list[int]]:
    *_, last = merged(parts)
    return last


def test_merged_counts_are_exact_and_sums_are_stable(parts: list[NeuronStatistics]) -> None:
    for number, (stats, weights) in enumerate(merged(parts)):
        assert stats.n_tokens == sum(weight * part.n_tokens for weight, part in zip(weights, parts, strict=True))
        for name in COUNTS:
            rows = [getattr(part, name).flatten().tolist() for part in parts]
            expected = [
                sum(weight * value for weight, value in zip(weights, column, strict=True))
                for column in zip(*rows, strict=True)
            ]
            assert getattr(stats, name).flatten().tolist() == expected, name
        for name in SUMS:
            rows = [getattr(part, name).flatten().tolist() for part in parts]
            for column, found in zip(zip(*rows, strict=True), getattr(stats, name).flatten().tolist(), strict=True):
                exact = sum(weight * Fraction(value) for weight, value in zip(weights, column, strict=True))
                scale = sum(weight * abs(Fraction(value)) for weight, value in zip(weights, column, strict=True))
                assert abs(Fraction(found) - exact) <= (number + 1) * UNIT * scale, name
    assert stats.n_tokens > 10**12


def test_a_batch_after_many_tokens_is_counted_exactly() -> None:
    """Every counter goes on from a number that float64 does not have: 2^53 + 1."""
    z = make_activations(3, 4)[0].flatten(0, 1)
    before, large = StatisticsState.zeros(3, torch.tensor([0.5, 2.0])), 2**53 + 1
    neuron_statistics(z, torch.ones(3), before)
    after = StatisticsState.zeros(3, torch.tensor([0.5, 2.0]))
    after.n_tokens = large
    for counts in (after.nonzero_count, after.histogram, after.above_count):
        counts.fill_(large)
    neuron_statistics(z, torch.ones(3), after)
    assert after.n_tokens == large + before.n_tokens
    for name in ("nonzero_count", "histogram", "above_count"):
        assert torch.equal(getattr(after, name) - large, getattr(before, name)), name


@pytest.mark.parametrize("n_tokens", [10**9, 10**12])
def test_sums_do_not_drift_after_many_tokens(n_tokens: int) -> None:
    """A mean of about 0.4 over `n_tokens` before, 400 batches after: at most one rounding an addition, as promised."""
    generator = torch.Generator().manual_seed(0)
    state = StatisticsState.zeros(2)
    start = {
        "contribution_sum": 0.4 * n_tokens,
        "contribution_sq_sum": 0.3 * n_tokens,
        "activation_sum": -0.1 * n_tokens,
    }
    for name, value in start.items():
        getattr(state, name).fill_(value)
    exact = {name: Fraction(value) for name, value in start.items()}
    n_batches = 400
    for _ in range(n_batches):
        z = torch.randn(128, 2, generator=generator)
        neuron_statistics(z, torch.ones(2), state)
        c = z[:, 0].abs()
        for name, values in (("contribution_sum", c), ("contribution_sq_sum", c * c), ("activation_sum", z[:, 0])):
            exact[name] += sum(map(Fraction, values.tolist()))
    for name, value in exact.items():
        added = abs(value - Fraction(start[name])) + 128 * n_batches  # what the float32 sums of a batch may be off by
        bound = n_batches * UNIT * abs(value) + 128 * Fraction(2.0**-24) * added
        assert abs(Fraction(float(getattr(state, name)[0])) - value) <= bound, name


def test_what_is_read_off_is_right(parts: list[NeuronStatistics], many: tuple[NeuronStatistics, list[int]]) -> None:
    stats, weights = many
    for edge in (4, 30, 43, 60):
        cut = float(histogram_edges()[edge])
        rows = [part.histogram[:, :, edge:].sum(2).flatten().tolist() for part in parts]
        found = stats.activation_frequency_at(cut).flatten().tolist()
        for column, share in zip(zip(*rows, strict=True), found, strict=True):
            exact = Fraction(sum(weight * value for weight, value in zip(weights, column, strict=True)), stats.n_tokens)
            assert abs(Fraction(share) - exact) <= 64 * UNIT
    above = [part.above_count.flatten().tolist() for part in parts]
    for column, share in zip(zip(*above, strict=True), stats.activation_frequency(0).flatten().tolist(), strict=True):
        exact = Fraction(sum(weight * value for weight, value in zip(weights, column, strict=True)), stats.n_tokens)
        assert share == pytest.approx(float(exact), rel=4 * UNIT)
    means = [
        sum(weight * Fraction(float(part.activation_sum[0, 0])) for weight, part in zip(weights, parts, strict=True))
    ]
    assert float(stats.mean_activation[0, 0]) == pytest.approx(float(means[0] / stats.n_tokens), rel=1e-13)


def test_many_tokens_are_saved_told_and_shown(many: tuple[NeuronStatistics, list[int]], tmp_path: Path) -> None:
    stats, _ = many
    n_tokens, shown = stats.n_tokens, f"{stats.n_tokens:,}"
    assert shown.count(",") == 4
    stats.save(tmp_path)
    loaded = NeuronStatistics.load(tmp_path)
    assert loaded.n_tokens == n_tokens == loaded.corpus["n_tokens"]
    for name in (*COUNTS, *SUMS):
        assert torch.equal(getattr(loaded, name), getattr(stats, name)), name
    assert f'"n_tokens": {n_tokens}' in to_json_text({"corpus": stats.corpus})
    lines = " ".join(summary_lines(None, loaded, None))
    assert f"{shown} tokens in windows of 8" in lines
    assert f"exactly zero on all {shown} tokens" in lines
    html: Any = report(loaded).html
    assert f"N = {shown} tokens" in html
    assert f"text: {shown} tokens, {stats.corpus['scored_tokens']:,} scored" in html
