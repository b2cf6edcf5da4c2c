"""Classes, triggers and information on the position without a model: against counts made the long way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity.errors import MeasurementError
from neuron_sparsity.kernels import N_BINS
from neuron_sparsity.model_info import ModelInfo
from neuron_sparsity.statistics import CONTEXT_LENGTH, NeuronStatistics
from neuron_sparsity.taxonomy import active as active_module
from neuron_sparsity.taxonomy.active import ActiveBits
from neuron_sparsity.taxonomy.classes import ClassRule, class_curve, classify
from neuron_sparsity.taxonomy.logits import RoleRule
from neuron_sparsity.taxonomy.positions import information_bits, information_by_chance_bits
from neuron_sparsity.taxonomy.triggers import Grams, TriggerRule, Triggers, smallest_cover
from tests.brute import class_of, information, kind_of

MODEL = ModelInfo("tiny", 1, 4, 5, "relu", False, "float32", "as loaded", "test", (0,), "f" * 16)


def make_statistics(nonzero: list[int], above: list[int], n_tokens: int, name: str = "text") -> NeuronStatistics:
    d_mlp = len(nonzero)
    zeros, corpus = torch.zeros(1, d_mlp, dtype=torch.float64), {"name": name, "sha256": name, "window": 10}
    return NeuronStatistics(
        model=replace(MODEL, d_mlp=d_mlp),
        corpus=corpus | {"n_tokens": n_tokens, "scored_tokens": n_tokens, "n_windows": n_tokens // 10},
        n_tokens=n_tokens,
        zero_count=n_tokens - torch.tensor([nonzero]),
        contribution_sum=zeros,
        contribution_sq_sum=zeros,
        activation_sum=zeros,
        contribution_max=zeros.float(),
        histogram=torch.zeros(1, d_mlp, N_BINS, dtype=torch.int64),
        thresholds=torch.ones(1, 1),
        above_count=torch.tensor([above])[..., None],
        threshold_names=("CETT-PPL-1%",),
        example_value=torch.zeros(1, d_mlp, 0),
        example_position=torch.zeros(1, d_mlp, 0, dtype=torch.int64),
        example_context=torch.zeros(1, d_mlp, 0, CONTEXT_LENGTH, dtype=torch.int32),
        token_strings={},
        w_norm=torch.ones(1, d_mlp),
    )


# --- classes


@pytest.mark.parametrize("n_tokens", [7, 100, 999, 1000, 1001, 4096])
def test_classes_are_those_of_the_definitions_at_every_count(n_tokens: int) -> None:
    counts = list(range(n_tokens + 1))
    stats = make_statistics(counts, counts[::-1], n_tokens)
    for name, seen in (("nonzero", counts), ("CETT-PPL-1%", counts[::-1]), (None, counts[::-1])):
        for definition in ("frequency", "any"):
            found = classify(stats, active=name, definition=definition)
            expected = [class_of(count, n_tokens, never=definition == "any") for count in seen]
            assert found.names[0].tolist() == expected
            assert found.count[0].tolist() == seen
            for kind, n in found.by_layer().items():
                assert n.tolist() == [expected.count(kind) if kind != "never" else 1]
            assert [getattr(found.total, kind) for kind in ("dead", "rare", "alive", "always_on")] == [
                expected.count(kind) for kind in ("dead", "rare", "alive", "always_on")
            ]


def test_a_neuron_that_was_never_active_comes_with_its_bound() -> None:
    found = classify(make_statistics([0, 1, 3000], [0, 0, 0], 3000), active="nonzero")
    assert found.bound_95[0, 0] == pytest.approx(0.001)
    assert np.isnan(found.bound_95[0, 1:]).all()
    assert found.total.never == 1
    assert found.active == "post-activation is not exactly zero"
    assert (found.n_tokens, found.model, found.corpus["name"]) == (3000, "tiny", "text")
    # What the bound means: at a frequency of 3/N, so long a silence happens one time in twenty.
    assert (1 - found.bound_95[0, 0]) ** 3000 == pytest.approx(0.05, rel=0.01)


def test_classes_refuse() -> None:
    stats = make_statistics([1], [1], 10)
    with pytest.raises(ValueError, match=r"no thresholds named 'other' were recorded, only \['nonzero', 'CETT-PPL-1%'"):
        classify(stats, active="other")
    with pytest.raises(ValueError, match="definition must be 'frequency'"):
        classify(stats, definition="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"need 0 <= dead <= rare <= always_on <= 1, got 0\.1, 0\.01, 0\.99"):
        classify(stats, dead=0.1)
    with pytest.raises(ValueError, match="at least one recording"):
        class_curve([])


def test_curve_of_recordings_is_that_of_their_sums() -> None:
    parts = [make_statistics([0, 1, k, 1000], [0, 0, 0, 1], 1000, f"part {k}") for k in (0, 1, 20)]
    points = class_curve(parts, active="nonzero")
    assert [point.n_tokens for point in points] == [1000, 2000, 3000]
    assert [point.never for point in points] == [2, 1, 1]
    for k, point in enumerate(points, start=1):
        counts = [0, k, sum((0, 1, 20)[:k]), 1000 * k]
        classes = [class_of(count, 1000 * k) for count in counts]
        assert (point.dead, point.rare, point.alive, point.always_on) == tuple(
            classes.count(name) for name in ("dead", "rare", "alive", "always_on")
        )
        assert point.bound_95 == 3 / (1000 * k)


# --- bits


def random_activity(seed: int, shape: tuple[int, ...], share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("in_memory", [1 << 30, 0])
@pytest.mark.parametrize("n_pos", [2, 7, 8, 9, 63])
def test_bits_come_back(monkeypatch: pytest.MonkeyPatch, in_memory: int, n_pos: int) -> None:
    monkeypatch.setattr(active_module, "IN_MEMORY", in_memory)
    seen = random_activity(n_pos, (2, 5, n_pos, 11))
    bits = ActiveBits(2, 11, 5, n_pos)
    assert (bits._file is None) == bool(in_memory)
    assert bits.n_bytes == 2 * 5 * 11 * -(-n_pos // 8)
    for first, last in ((0, 2), (2, 5)):
        for layer in (1, 0):
            bits.put(layer, first, torch.from_numpy(seen[layer, first:last]))
    for layer, neurons, found in bits.blocks(4):
        assert found.flags.c_contiguous
        assert np.array_equal(found, seen[layer][:, :, neurons])
    assert [(layer, n.start, n.stop) for layer, n, _ in bits.blocks(6)] == [
        (0, 0, 6),
        (0, 6, 11),
        (1, 0, 6),
        (1, 6, 11),
    ]


def test_a_full_disk_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_module, "IN_MEMORY", 0)
    bits = ActiveBits(1, 4, 1, 8)

    class Full:
        def seek(self, place: int) -> None: ...
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    bits._file = Full()  # type: ignore[assignment]
    with pytest.raises(MeasurementError, match=r"^the disk of temporary files is full: 0\.0 GB are needed; .*TMPDIR$"):
        bits.put(0, 0, torch.ones(1, 8, 4, dtype=torch.bool))


# --- triggers


def found_triggers(tokens: np.ndarray, active: np.ndarray, rule: TriggerRule, block: int = 100) -> Triggers:
    """`active` is [window, pos, neuron]."""
    found = Triggers(tokens, 1, active.shape[2], rule)
    for first in range(0, active.shape[2], block):
        some = active[:, :, first : first + block].astype(np.uint8).copy()
        some[:, 0] = 0
        found.add(0, first, some.reshape(-1, some.shape[2]))
    return found


def assert_brute(tokens: np.ndarray, active: np.ndarray, rule: TriggerRule, found: Triggers) -> list[Any]:
    kinds = [kind_of(active[:, :, neuron], tokens, rule) for neuron in range(active.shape[2])]
    for neuron, kind in enumerate(kinds):
        assert found.n_covering_tokens[0, neuron] == kind.n_covering_tokens
        detection = found.found.get((0, neuron))
        if detection is None:
            assert kind.n_triggers == 0
        else:
            assert (len(detection.ids), detection.n if detection.detector else 0) == (kind.n_triggers, kind.ngram)
            assert detection.ids == kind.triggers
    return kinds


@pytest.mark.parametrize("block", [1, 100])
@pytest.mark.parametrize(
    "rule",
    [TriggerRule(), TriggerRule(min_activations=1), TriggerRule(0.6, 0.5, 3, 2), TriggerRule(1.0, 1.0, 1, 1)],
)
def test_triggers_are_those_of_a_count(rule: TriggerRule, block: int) -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(0, 6, (9, 30))
    for first, before in ((2, 0), (10, 1), (14, 0)):  # the bigram (4, 2) stands thrice as often as the trigram
        tokens[:, first : first + 3] = [before, 4, 2]
    tokens[:, 20:29] = [0, 2, 0, 2, 0, 2, 0, 2, 0]  # and the token 2 twice as often as the bigram
    active = random_activity(4, (9, 30, 40), 0.1)
    active |= generator.random(40) < 0.3  # some are on nearly everywhere
    for neuron, token in enumerate(range(6)):  # and some know a token, with noise
        active[:, :, neuron] = (tokens == token) ^ (generator.random(tokens.shape) < 0.01 * neuron)
    pair = (tokens[:, 1:] == 2) & (tokens[:, :-1] == 4)
    active[:, 1:, 6], active[:, 0, 6] = pair, True  # position 0 takes no part
    active[:, :2, 7], active[:, 2:, 7] = False, pair[:, 1:] & (tokens[:, :-2] == 1)
    active[:, :, 8] = False
    kinds = assert_brute(tokens, active, rule, found_triggers(tokens, active, rule, block))
    if rule.covered == 0.6:
        assert {kind.ngram for kind in kinds} == {0, 1, 2, 3}


@given(st.data())
def test_triggers_are_those_of_a_count_whatever_the_text(data: st.DataObject) -> None:
    n_windows, n_pos = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    size = n_windows * n_pos
    tokens = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))).reshape(n_windows, n_pos)
    bits = data.draw(st.lists(st.booleans(), min_size=2 * size, max_size=2 * size))
    active = np.array(bits).reshape(n_windows, n_pos, 2)
    rule = TriggerRule(
        data.draw(st.sampled_from([0.5, 0.95, 1.0])),
        data.draw(st.sampled_from([0.5, 0.95])),
        5,
        data.draw(st.integers(1, 3)),
    )
    assert_brute(tokens, active, rule, found_triggers(tokens, active, rule))


def test_a_planted_detector_is_found_and_one_exception_too_many_is_not() -> None:
    tokens = np.tile(np.arange(10), (20, 5))  # every token stands 100 times
    planted = (tokens == 3) | (tokens == 7)
    few, many, elsewhere = planted.copy(), planted.copy(), planted.copy()
    places = np.argwhere(tokens == 3)
    for row, kept in ((few, 95), (many, 94)):
        row[tokens == 3] = False
        row[tuple(places[:kept].T)] = True
    wrong = np.argwhere(tokens == 5)[:11]
    elsewhere[tuple(wrong.T)] = True  # 200 of 211 = 94.8 %
    active = np.stack([planted, few, many, elsewhere], axis=2)
    found = found_triggers(tokens, active, TriggerRule())
    assert found.found[0, 0].ids == ((3,), (7,))
    assert found.found[0, 1].detector
    assert found.found[0, 1].ids == ((7,), (3,))
    assert not found.found[0, 2].detector
    assert not found.found[0, 3].detector
    assert found.n_covering_tokens[0].tolist() == [2, 2, 2, 3]


def test_no_smaller_set_covers_than_the_most_frequent_ones() -> None:
    """Greedy by count against every set there is."""
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 9, (7, 60))
    total = counts.sum(axis=0) + generator.integers(0, 3, 60)
    for share in (0.5, 0.8, 0.95, 1.0):
        sizes = smallest_cover(counts, total, share)
        for neuron in range(60):
            column = counts[:, neuron]
            by_search = next(
                (
                    size
                    for size in range(1, 8)
                    if any(sum(chosen) / total[neuron] >= share for chosen in itertools.combinations(column, size))
                ),
                0,
            )
            assert sizes[neuron] == by_search


def test_few_activations_make_no_claim() -> None:
    tokens = np.arange(40).reshape(1, 40)
    active = np.zeros((1, 40, 1), dtype=bool)
    active[0, 5, 0] = True
    assert found_triggers(tokens, active, TriggerRule()).found == {}
    assert found_triggers(tokens, active, TriggerRule(min_activations=1)).found[0, 0].detector


def test_large_token_ids_keep_their_order() -> None:
    tokens = np.array([[0, 255_999, 2, 255_999, 2, 255_999]])
    grams = Grams(tokens, 3)
    assert grams.ids.tolist() == [[2, 255_999, 2], [255_999, 2, 255_999]]
    assert grams.places.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TriggerRule(covered=0.0), "covered and fires must be above 0 and at most 1, got 0.0 and 0.95"),
        (lambda: TriggerRule(fires=1.5), "got 0.95 and 1.5"),
        (lambda: TriggerRule(most=0), "most and min_activations must be at least 1, got 0, 20"),
        (lambda: RoleRule(kurtosis=-1.0), "kurtosis and spread must be > 0, got -1.0 and 2.0"),
        (lambda: ClassRule(rare=2.0), "need 0 <= dead <= rare <= always_on <= 1"),
    ],
)
def test_rules_refuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- positions


def test_information_is_that_of_the_joint_frequencies() -> None:
    active = random_activity(1, (7, 13, 30), 0.4)
    active[:, :, 0], active[:, :, 1] = True, False
    active[:, :6, 2], active[:, 6:, 2] = True, False
    found = information_bits(active.sum(axis=0), 7)
    for neuron in range(30):
        assert found[neuron] == pytest.approx(information(active[:, :, neuron]), abs=1e-12)
    assert found[:2].tolist() == [0, 0]
    share = 6 / 13  # known from the position alone: all of its entropy
    assert found[2] == pytest.approx(-share * math.log2(share) - (1 - share) * math.log2(1 - share))


@pytest.mark.parametrize(("n_windows", "n_pos"), [(2, 3), (3, 2), (1, 5), (4, 2)])
def test_chance_is_the_mean_over_all_placements(n_windows: int, n_pos: int) -> None:
    n = n_windows * n_pos
    totals = np.arange(n + 1)
    found = information_by_chance_bits(totals, n_windows, n_pos)
    for total in totals:
        informations = []
        for chosen in itertools.combinations(range(n), int(total)):
            active = np.zeros(n, dtype=bool)
            active[list(chosen)] = True
            informations.append(information(active.reshape(n_windows, n_pos)))
        assert found[total] == pytest.approx(np.mean(informations), abs=1e-12)


def test_chance_is_large_on_few_windows() -> None:
    """What makes the correction necessary: on 8 windows of 512 a neuron that knows nothing exceeds the threshold."""
    chance = information_by_chance_bits(np.array([8 * 511 // 2]), 8, 511)[0]
    assert chance == pytest.approx(510 / (2 * 8 * 511 * math.log(2)), rel=0.1)
    assert chance > 0.05
    active = random_activity(0, (8, 511), 0.5)
    assert information(active) == pytest.approx(chance, abs=0.02)


def test_roles() -> None:
    generator = np.random.default_rng(0)
    std = np.concatenate([generator.uniform(0.9, 1.1, 50), [5.0, 5.0, 5.0, 0.0]])
    skew, kurtosis, norm = np.zeros(54), np.zeros(54), np.ones(54)
    skew[50:53], kurtosis[50:53], norm[52] = [3.0, -3.0, 0.1], [40.0, 40.0, 1.0], 1.0
    skew[53] = kurtosis[53] = np.nan
    norm[53] = 0.0
    roles = RoleRule().roles(std, skew, kurtosis, norm)
    assert set(roles[:50]) == {"none"}
    assert roles[50:].tolist() == ["prediction", "suppression", "partition", "none"]
    norm[52] = 100.0  # a long row moves logits far without meaning to part them
    assert RoleRule().roles(std, skew, kurtosis, norm)[52] == "none"
