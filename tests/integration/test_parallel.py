"""Two and three processes measure what one does; one that is lost ends the others, and nothing is lost with it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.errors import MeasurementError, RankError, RunFolderError
from tests.integration.ranks import (
    exchange,
    fail,
    measure,
    part_ways,
    record_part,
    run_ranks,
    search_until_killed,
)

SUMS = ("contribution_sum", "contribution_sq_sum", "activation_sum")
TIMES = ("seconds", "dense_passes")


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any
) -> str:
    folder = tmp_path_factory.mktemp("tiny-opt")
    tiny_hf_models("opt").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tiny_hf_models: Callable[..., Any], sample_tokens: Callable[..., Any]) -> list[list[int]]:
    """17 windows that the model wrote, in nine batches. The first two come again later: ties among examples."""
    tokens = sample_tokens(tiny_hf_models("opt"), 15, window=16)
    return [*tokens.tolist(), *tokens[:2].tolist()]


@pytest.fixture(scope="module")
def long_text(tiny_hf_models: Callable[..., Any], sample_tokens: Callable[..., Any]) -> list[list[int]]:
    """More than 4,096 tokens: CETT is checked on the first batches only, which rank 0 has."""
    tokens = sample_tokens(tiny_hf_models("opt"), 66, window=64)
    return list(tokens.tolist())


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, model_folder: str, text: list[list[int]], long_text: list[list[int]]
) -> list[Any]:
    """What one process finds on all the text, on two windows of it, and on a long one."""
    (left,) = run_ranks(1, measure, tmp_path_factory.mktemp("alone"), model_folder, text, text[:2], long_text)
    assert left.error is None
    return list(left.value)


def assert_same_statistics(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in SUMS:
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert found[name] == value, name


def assert_same_json(found: Any, expected: Any, where: str = "") -> None:
    """Equal in everything but time: integers and words exactly, floats to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"provenance", *TIMES}:
            assert_same_json(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_json(a, b, f"{where}/{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_several_ranks_find_what_one_process_does(
    tmp_path: Path,
    model_folder: str,
    text: list[list[int]],
    long_text: list[list[int]],
    alone: list[Any],
    n_ranks: int,
) -> None:
    """The second text is one batch: all ranks but one have no windows."""
    ranks = run_ranks(n_ranks, measure, tmp_path, model_folder, text, text[:2], long_text)
    for left in ranks:
        assert left.error is None
        for (stats, result), (stats_alone, result_alone) in zip(left.value, alone, strict=True):
            assert_same_statistics(stats, stats_alone)
            assert_same_json(result, result_alone)
            assert result["provenance"]["processes"] == n_ranks
    for left in ranks[1:]:
        for (stats, result), (stats_0, result_0) in zip(left.value, ranks[0].value, strict=True):
            assert all(np.array_equal(stats[name], stats_0[name]) for name in SUMS), "the same bits on all ranks"
            assert (result["evaluations"], result["layers"]) == (result_0["evaluations"], result_0["layers"])
    stats, result = alone[0]
    assert result["reached"]
    assert len(result["evaluations"]) > 3, "a search that is worth its name"
    value, place = stats["example_value"], stats["example_position"]
    tied = (value[..., :-1] == value[..., 1:]) & (value[..., 1:] > 0)
    assert tied.any()
    assert (place[..., :-1] < place[..., 1:])[tied].all(), "ties go to the earlier window"


def test_what_goes_between_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(3, exchange, tmp_path)
    assert [left.error for left in ranks] == [None] * 3
    for rank, left in enumerate(ranks):
        assert left.value["total"] == {"sum": [3, 3 * 2**53 + 3], "top": [2.0, -1.0], "none": []}
        assert left.value["own"] == [rank, 2**53 + rank], "what was given is not changed"
        assert left.value["first"] == [0, 2**53]
        assert left.value["alike"] == ([0, 2**53], range(10), [0, 2**53])
        assert left.value["gather"] == [[0], [1], [2]]
        assert left.value["joined"] == [0, 0, 1]
        assert left.value["everyones"] == ["rank 0", "rank 1", "rank 2"]
        assert left.value["share"] == [range(0, 4), range(4, 8), range(8, 10)][rank]
        assert left.value["who"] == (f"{rank}-of-3", rank == 0, {"processes": 3})


def test_an_error_on_one_rank_ends_all_with_its_reason(tmp_path: Path) -> None:
    ranks = run_ranks(3, fail, tmp_path, 2)
    assert isinstance(ranks[2].error, MeasurementError)
    for left in ranks[:2]:
        assert isinstance(left.error, RankError)
        assert str(left.error) == "rank 2 of 3 failed: layer 3: post-activations are NaN"


def test_ranks_that_take_different_steps_are_told(tmp_path: Path) -> None:
    for left in run_ranks(2, part_ways, tmp_path):
        assert isinstance(left.error, RankError)
        assert str(left.error) == (
            "rank 1 of 2 is at 'a dense pass', rank 0 of 2 at 'a truncated pass'; start the same command on all"
        )


def test_a_killed_rank_ends_the_recording_and_the_same_ranks_go_on(
    tmp_path: Path, model_folder: str, text: list[list[int]], alone: list[Any]
) -> None:
    out = tmp_path / "run"
    ranks = run_ranks(3, record_part, tmp_path, model_folder, text, out, 1, 2)
    assert ranks[1].code == -signal.SIGKILL
    for left in (ranks[0], ranks[2]):
        assert isinstance(left.error, RankError), left
        assert str(left.error).startswith("rank 1 of 3 is gone")
        assert "start the same command again" in str(left.error)
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"record.partial.{rank}-of-3.safetensors" for rank in range(3)]

    for other in (1, 2):
        for left in run_ranks(other, record_part, tmp_path, model_folder, text, out, None, 0):
            assert isinstance(left.error, RunFolderError | RankError)
            assert "was begun with 3 processes: go on with as many" in str(left.error)

    ranks = run_ranks(3, record_part, tmp_path, model_folder, text, out, None, 0)
    for rank, left in enumerate(ranks):
        assert left.error is None
        stats, shown = left.value
        assert_same_statistics(stats, alone[0][0])
        begun, last = [(6, 6), (10, 12), (16, 17)][rank]
        assert (shown[0], shown[-1]) == (begun * 16, last * 16), "it goes on, and does not begin again"
    assert [path.name for path in out.iterdir()] == ["statistics.safetensors"]


def test_a_killed_rank_ends_the_search(tmp_path: Path, model_folder: str, text: list[list[int]]) -> None:
    ranks = run_ranks(2, search_until_killed, tmp_path, model_folder, text, 1)
    assert ranks[1].code == -signal.SIGKILL
    assert isinstance(ranks[0].error, RankError)
    assert str(ranks[0].error).startswith("rank 1 of 2 is gone")


def test_the_rank_that_holds_the_store_is_killed(tmp_path: Path, model_folder: str, text: list[list[int]]) -> None:
    ranks = run_ranks(2, search_until_killed, tmp_path, model_folder, text, 0)
    assert ranks[0].code == -signal.SIGKILL
    assert isinstance(ranks[1].error, RankError)
    assert "gone" in str(ranks[1].error)
