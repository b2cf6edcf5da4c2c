"""The search for a removable prefix, on made-up losses: what it finds, what it costs, and how it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_sparsity.corpus import Windows
from neuron_sparsity.removal import PrefixSearch, step_at
from neuron_sparsity.tally import DENSE, Measured, prefix_key

TOTAL = 5000
TARGET = math.log1p(0.01)


def windows(n_windows: int = 16, n_pos: int = 64) -> Windows:
    tokens = torch.arange(n_windows * n_pos, dtype=torch.int32).view(n_windows, n_pos)
    return Windows(tokens, tokens % n_pos > 0, "made up", ("d",) * n_windows, "apart", bos=False)


class MadeUp:
    """Stands in for `Removals`: the mean rise of a count is `curve(count)` exactly, its tokens scatter around it."""

    def __init__(
        self, curve: Callable[[int], float], *, scatter: float = 1.0, seed: int = 0, n_windows: int = 16
    ) -> None:
        text, generator = windows(n_windows), np.random.default_rng(seed)
        self.measured = {"text": Measured(text)}
        self.order = torch.zeros(TOTAL, 2)
        scored = text.scored.numpy()
        self.dense = np.where(scored, generator.gamma(2.0, 1.5, scored.shape), 0.0)
        noise = np.where(scored, generator.standard_t(4, scored.shape), 0.0)
        self.noise = scatter * np.where(scored, noise - noise.sum() / scored.sum(), 0.0)
        self.scored, self.curve = scored, curve
        self.calls: list[tuple[int, int]] = []
        self.add(DENSE, self.dense, n_windows)

    @property
    def passes(self) -> float:
        return self.measured["text"].passes()

    def add(self, key: str, losses: Any, n_windows: int) -> None:
        table = self.measured["text"]
        indices = table.missing(key, n_windows)
        table.add(key, indices, torch.tensor(losses[indices]))

    def prefix(self, text: str, n: int, n_windows: int | None = None) -> str:
        n_windows = self.scored.shape[0] if n_windows is None else n_windows
        self.calls.append((n, n_windows))
        rise = self.curve(n)
        changed = self.dense + np.where(self.scored, rise + 0.05 * math.sqrt(n / TOTAL) * self.noise, 0.0)
        self.add(prefix_key(n), changed, n_windows)
        return prefix_key(n)


def searched(made: MadeUp, target: float = TARGET, limit: float = 100.0) -> tuple[int, bool, PrefixSearch]:
    search = PrefixSearch(made, "text")  # type: ignore[arg-type]
    resolved = search.run(target, limit)
    return search.answer(target), resolved, search


def power(root: float, exponent: float) -> Callable[[int], float]:
    return lambda n: TARGET * (n / root) ** exponent


@settings(max_examples=60)
@given(
    st.floats(1.0, 4900.0), st.floats(0.4, 2.5), st.floats(0.0, 3.0), st.integers(0, 10**6)
)  # what is searched for, the curve's slope, how the tokens scatter
def test_the_largest_count_that_holds_is_found_where_the_curve_is_monotone(
    root: float, exponent: float, scatter: float, seed: int
) -> None:
    made = MadeUp(power(root + 1e-6, exponent), scatter=scatter, seed=seed)
    found, resolved, search = searched(made)
    exact = math.floor(root + 1e-6)
    assert resolved
    assert found <= exact <= found + step_at(found) - 1
    low, high = search.bracket(TARGET)
    assert low == found
    assert high - low <= step_at(low)
    assert all(search.measured.whole(prefix_key(n)) for n in (low, high))


def test_the_usual_search_costs_few_passes_and_never_more_than_it_may() -> None:
    costs, done = [], 0
    for seed in range(30):
        made = MadeUp(power(300 + 37 * seed, 0.8 + 0.05 * seed), seed=seed)
        found, resolved, _ = searched(made, limit=7.75)
        costs.append(made.passes)
        done += resolved
        assert made.passes <= 7.75
        assert made.curve(found) <= TARGET
        assert found > 0.9 * (300 + 37 * seed)
    assert np.median(costs) < 7.0
    assert done >= 27


@settings(max_examples=40)
@given(st.floats(1.2, 8.0), st.integers(0, 1000))
def test_a_spent_search_still_answers_with_what_was_measured_on_everything(limit: float, seed: int) -> None:
    made = MadeUp(power(700, 1.2), seed=seed)
    found, _, search = searched(made, limit=limit)
    assert made.passes <= limit + 1e-9
    assert made.curve(found) <= TARGET
    assert found == 0 or search.measured.whole(prefix_key(found))


@pytest.mark.parametrize(("n_windows", "seed"), [(3, 4), (8, 36), (16, 46)])
def test_a_spent_search_does_not_fall_back_to_nothing_where_something_holds(n_windows: int, seed: int) -> None:
    """A count that only seems to hold must not take what one that is safe would cost."""
    made = MadeUp(power(190.5, 1.2), scatter=3.0, seed=seed, n_windows=n_windows)
    n, resolved, _ = searched(made, limit=4.0)
    assert not resolved
    assert 0 < n <= 190


def test_far_counts_are_measured_on_few_windows_only() -> None:
    made = MadeUp(power(2500, 1.0), scatter=0.3)
    searched(made)
    first = [n for n, n_windows in made.calls if n_windows == made.measured["text"].levels[0]]
    whole = [n for n in dict.fromkeys(n for n, _ in made.calls) if made.measured["text"].whole(prefix_key(n))]
    assert len(first) > len(whole)
    assert 0.5 < whole[0] / 2500 < 2, whole
    assert all(abs(math.log(n / 2500)) < 0.05 for n in whole[1:]), whole


class Uneven(MadeUp):
    """Windows rise by very different amounts, as those of a real text do, and not the same ones at every count."""

    def prefix(self, text: str, n: int, n_windows: int | None = None) -> str:
        places = np.linspace(0, 2 * np.pi, self.scored.shape[0], endpoint=False)
        shares = np.exp(np.cos(self.phase * places + 0.5 * math.log(n)) + 0.05 * np.cos(n + places))
        per_window = self.curve(n) * (shares / shares.mean())[:, None]
        self.calls.append((n, n_windows or len(places)))
        changed = self.dense + np.where(self.scored, per_window + 0.02 * math.sqrt(n / TOTAL) * self.noise, 0.0)
        self.add(prefix_key(n), changed, n_windows or len(places))
        return prefix_key(n)

    phase = 1


@pytest.mark.parametrize("limit", [5.6, 7.6])
def test_where_windows_differ_the_answer_is_near_all_the_same(limit: float) -> None:
    shares = []
    for seed in range(24):
        root = 200 * 1.13**seed
        made = Uneven(power(root, 0.5 + 0.06 * seed), seed=seed)
        made.phase = 1 + seed % 5
        found, _, search = searched(made, limit=limit)
        assert made.passes <= limit + 1e-9
        assert found == 0 or search.measured.rise(prefix_key(found))[0] <= TARGET
        holds = [n for n in range(1, TOTAL + 1, 1 + int(root / 200)) if made.curve(n) <= TARGET]
        shares.append(found / max(holds))
    assert min(shares) > (0.5 if limit < 7 else 0.9), sorted(shares)
    assert np.quantile(shares, 0.2) > 0.95, sorted(shares)


def test_a_curve_that_comes_down_again_nearby_is_noticed() -> None:
    def curve(n: int) -> float:
        return power(1000, 1.0)(n) * (0.5 if 1090 <= n <= 1180 else 1.0)

    made = MadeUp(curve, scatter=0.2)
    found, resolved, _ = searched(made)
    assert resolved
    assert 1090 <= found <= 1180
    assert curve(found) <= TARGET < curve(found + step_at(found))


@pytest.mark.parametrize("seed", range(20))
def test_a_plateau_above_the_target_is_not_walked_down_step_by_step(seed: int) -> None:
    """The line through one count far below and one a little above points at the latter again and again."""
    low, last = 60 + 5 * seed, 100 + 9 * seed

    def curve(n: int) -> float:
        return TARGET * (0.1 if n <= low else 0.97 if n <= last else 1.06 + 0.2 * (n / last - 1))

    found, _, _ = searched(MadeUp(curve, scatter=0.5, seed=seed), limit=7.6)
    assert 0.8 * last < found <= last


def test_everything_may_go_is_said_only_of_everything_removed() -> None:
    made = MadeUp(lambda n: 1e-4 * n / TOTAL, scatter=0.01)
    found, resolved, search = searched(made)
    assert (found, resolved, search.bracket(TARGET)) == (TOTAL, True, (TOTAL, TOTAL + 1))
    falling = MadeUp(lambda n: -1e-4 * n / TOTAL, scatter=0.01)
    assert searched(falling)[0] == TOTAL


@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0, 2.5, 2.75, 3.0, 4.0, 6.0])
def test_a_search_ends_whatever_it_may_cost_where_nothing_may_go(limit: float) -> None:
    made = MadeUp(lambda n: 0.5)
    assert searched(made, limit=limit)[0] == 0
    assert made.passes <= limit


def test_nothing_may_go_where_one_neuron_costs_too_much() -> None:
    made = MadeUp(lambda n: 0.5)
    found, resolved, search = searched(made)
    assert (found, resolved, search.bracket(TARGET)) == (0, True, (0, 1))


def test_a_search_that_was_interrupted_anywhere_ends_with_the_same_measurements() -> None:
    def fresh() -> MadeUp:
        return MadeUp(power(900, 1.1), seed=5)

    whole = fresh()
    expected = searched(whole)
    for stop in range(1, len(whole.calls)):
        first = fresh()
        original, left = first.prefix, [stop]

        def interrupted(*arguments: Any, original: Any = original, left: Any = left) -> str:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return str(original(*arguments))

        first.prefix = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            searched(first)
        kept = json.loads(json.dumps(first.measured["text"].to_json()))
        second = fresh()
        second.measured["text"].take_up(kept)
        assert searched(second)[:2] == expected[:2]
        assert second.calls == whole.calls[stop:]
        for key, sums in whole.measured["text"].sums.items():
            np.testing.assert_array_equal(second.measured["text"].sums[key], sums)


def test_a_second_target_uses_what_the_first_has_measured() -> None:
    alone, both = (MadeUp(power(900, 1.1)) for _ in range(2))
    five = math.log1p(0.05)
    searched(alone, five)
    searched(both)
    before = both.passes
    assert searched(both, five)[0] == searched(alone, five)[0]
    assert both.passes - before < alone.passes - 1


# The measurements.


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 300])
def test_the_first_windows_of_the_order_are_spread_over_the_text(n: int) -> None:
    measured = Measured(windows(n, 8))
    assert sorted(measured.order) == list(range(n))
    assert measured.levels[-1] == n
    assert measured.levels == sorted(set(measured.levels))
    for level in measured.levels[:-1]:
        places = np.sort(measured.order[:level])
        assert np.diff(places, prepend=0, append=n - 1).max() <= 3 * n / level


def test_an_estimate_from_some_windows_is_as_far_off_as_it_says_and_less_far_with_a_near_pass() -> None:
    plain, helped = [], []
    for seed in range(200):
        made = MadeUp(power(1000, 1.0), seed=seed)
        made.prefix("text", 800)
        made.prefix("text", 1000, 4)
        table = made.measured["text"]
        truth = made.curve(1000)
        for kept, near in ((plain, None), (helped, prefix_key(800))):
            rise, error = table.rise(prefix_key(1000), near)
            kept.append((rise - truth, error))
    (off, said), (near_off, near_said) = (np.array(kept).T for kept in (plain, helped))
    assert np.std(off) == pytest.approx(np.sqrt(np.mean(said**2)), rel=0.25)
    assert np.mean(np.abs(off) > 2 * said) < 0.12
    assert np.std(near_off) < 0.05 * np.std(off)  # the scatter of these two is the same, but for its size
    assert np.mean(near_said) < np.mean(said)


def test_sums_add_up_over_pieces_of_a_pass() -> None:
    made = MadeUp(power(1000, 1.0))
    table = made.measured["text"]
    for n_windows in (4, 8, 16):
        made.prefix("text", 1000, n_windows)
    assert table.passes() == 2.0
    assert table.rise(prefix_key(1000)) == (pytest.approx(TARGET), 0.0)
    assert table.n_tokens(prefix_key(1000)) == 16 * 64


def test_damaged_sums_are_refused() -> None:
    table = Measured(windows())
    for entry in ({"windows": [0], "sums": [[1.0]]}, {"windows": [99], "sums": [[0.0] * 8]}, {"windows": [0]}):
        with pytest.raises((ValueError, IndexError, KeyError)):
            table.take_up({"dense": entry})


def test_windows_without_a_scored_position_come_last() -> None:
    text = windows(8)
    text.scored[0] = False
    measured = Measured(text)
    assert measured.order[-1] == 0
