"""Lists, groups and intervals of the damage of single tokens: by hand, and on simulated text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.corpus import Windows
from neuron_sparsity.damage_tables import Interval, TokenDamage, by_decile, by_token, extremes, intervals, percentiles

NAMES = {0: "<s>", 1: " a", 2: " b", 3: " c"}


@pytest.fixture
def windows() -> Windows:
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 2], [0, 2, 2, 3]], dtype=torch.int32)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    scored[2, 3] = False
    return Windows(tokens, scored, "by hand", ("one", "one", "two"), "apart", bos=True)


@pytest.fixture
def difference() -> torch.Tensor:
    return torch.tensor([[0.0, 4.0, 1.0, 3.0], [0.0, 2.0, -1.0, -2.0], [0.0, 0.5, 0.25, 0.0]])


def values(difference: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"difference": difference, "kl": difference.abs() / 2, "dense": difference + 10}


def test_tokens_of_one_text_together(windows: Windows, difference: torch.Tensor) -> None:
    a, b = by_token(windows, difference, difference.abs(), NAMES, 2, 20)
    assert (a.token, a.token_id, a.count, b.token, b.count) == (" a", 1, 3, " b", 4)
    assert a.rise == pytest.approx((4 + 2 - 1) / 3)
    assert b.rise == pytest.approx((1 - 2 + 0.5 + 0.25) / 4)
    assert a.kl == pytest.approx(7 / 3)
    assert a.stderr == pytest.approx(np.std([4, 2, -1], ddof=1) / np.sqrt(3))
    assert a.share == pytest.approx(5 / 7.75)
    assert [group.token for group in by_token(windows, difference, difference, NAMES, 4, 20)] == [" b"]
    single = by_token(windows, difference, difference, NAMES, 1, 1)
    assert [group.token for group in single] == [" c", " b"], "from either end"
    assert by_token(windows, -difference, difference, NAMES, 2, 20)[0].share is None, "no share of no damage"


def test_the_hurt_and_the_helped_a_few_of_each_document(windows: Windows, difference: torch.Tensor) -> None:
    hurt = extremes(windows, values(difference), NAMES, 20, 2, largest=True)
    assert [(token.window, token.pos, token.difference) for token in hurt] == [
        (0, 1, 4.0),
        (0, 3, 3.0),
        (2, 1, 0.5),
        (2, 2, 0.25),
    ]
    assert hurt[1] == TokenDamage(" c", ("<s>", " a", " b"), (), 0, 3, "one", 13.0, 3.0, 1.5)
    assert hurt[0].after == (" b", " c")
    helped = extremes(windows, values(difference), NAMES, 20, 2, largest=False)
    assert [token.difference for token in helped] == [-2.0, -1.0], "only what is helped"
    assert len(extremes(windows, values(difference), NAMES, 1, 2, largest=True)) == 1
    assert extremes(windows, values(torch.zeros(3, 4)), NAMES, 20, 2, largest=True) == ()


def test_what_is_not_scored_is_in_no_list(windows: Windows, difference: torch.Tensor) -> None:
    spoiled = difference.clone()
    spoiled[2, 3] = 100.0
    assert 100.0 not in [t.difference for t in extremes(windows, values(spoiled), NAMES, 20, 20, largest=True)]
    assert by_token(windows, spoiled, spoiled, NAMES, 2, 20)[0].rise < 5


def test_tenths_of_the_window(windows: Windows, difference: torch.Tensor) -> None:
    found = by_decile(windows, difference, difference.abs())
    assert [(cell.first, cell.last, cell.count) for cell in found] == [(1, 1, 3), (2, 2, 3), (3, 3, 2)]
    assert [cell.rise for cell in found] == pytest.approx([6.5 / 3, 0.25 / 3, 0.5])
    assert found[0].low is None
    tokens = torch.zeros(2, 25, dtype=torch.int32)
    long = Windows(tokens, torch.arange(25).expand(2, 25) > 0, "long", ("a", "b"), "apart", bos=False)
    cells = by_decile(long, torch.zeros(2, 25), torch.zeros(2, 25))
    assert len(cells) == 10
    assert [cells[0].first, cells[-1].last, sum(cell.count for cell in cells)] == [0, 24, 48]
    assert all(left.last + 1 == right.first for left, right in pairwise(cells))


def test_spread_over_tokens() -> None:
    found: dict[str, Any] = percentiles(torch.tensor([-1.0] + [0.0] * 97 + [1.0, 3.0]))
    assert found["hurt_ratio"] == 0.02
    assert found["top_percent_share"] == pytest.approx(3 / 3)
    assert found["percentiles"]["50"] == 0
    assert percentiles(-torch.ones(3))["top_percent_share"] is None


def test_windows_without_a_scored_token_count_for_nothing() -> None:
    sums, counts = torch.tensor([[2.0], [4.0], [0.0]]), torch.tensor([[1], [1], [0]])
    assert intervals(sums.repeat(2, 1), counts.repeat(2, 1)) == [Interval(3.0, None, None)], "four windows are too few"
    (found,) = intervals(sums.repeat(3, 1), counts.repeat(3, 1))
    assert found.mean == 3.0
    assert found.low is not None
    assert 2.0 <= found.low < 3.0


@pytest.mark.parametrize("n_windows", [6, 16])
def test_intervals_cover(n_windows: int) -> None:
    """Windows differ among themselves, and their tokens too; columns are paired."""
    generator, n_tokens, runs = torch.Generator().manual_seed(1), 20, 200
    hits = np.zeros(2)
    for _ in range(runs):
        of_window = 0.3 * torch.randn(n_windows, 1, generator=generator)
        whole = 1.0 + of_window + torch.randn(n_windows, n_tokens, generator=generator)
        part = 0.4 + of_window + 0.1 * torch.randn(n_windows, n_tokens, generator=generator)
        sums = torch.stack([whole.sum(1), (whole - part).sum(1)], dim=1)
        found = intervals(sums, torch.full((n_windows, 2), n_tokens))
        hits += [one.low <= truth <= one.high for one, truth in zip(found, (1.0, 0.6), strict=True)]  # type: ignore[operator]
    assert (hits / runs > 0.9).all(), hits / runs
    assert (hits / runs < 0.995).all(), "an interval that always covers says nothing"
