"""Ranks at a store in memory, in threads: who is waited for, and for how long."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from neuron_sparsity import parallel
from neuron_sparsity.errors import RankError
from neuron_sparsity.parallel import ranks as ranks_module
from neuron_sparsity.parallel.process import place
from neuron_sparsity.parallel.ranks import Ranks

dist = pytest.importorskip("torch.distributed")


@pytest.fixture
def two() -> tuple[Ranks, Ranks]:
    store = dist.HashStore()
    return Ranks(store, 0, 2), Ranks(store, 1, 2)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            found[index] = calls[index]()
        except RankError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "it hangs"
    return found


def test_ranks_meet_and_tell(two: tuple[Ranks, Ranks]) -> None:
    for turn in range(3):
        found = at_once(lambda turn=turn: two[0].meet("here", turn), lambda turn=turn: two[1].meet("here", [turn]))
        assert found == [[turn, [turn]]] * 2


def test_a_silent_rank_is_waited_for_no_longer_than_patience(two: tuple[Ranks, Ranks]) -> None:
    two[0].patience = 0.2
    with pytest.raises(RankError, match=r"rank 1 of 2 gives no sign for 0\.2 seconds"):
        two[0].meet("here")


def test_a_sign_of_life_renews_the_patience(two: tuple[Ranks, Ranks]) -> None:
    two[0].patience = 0.6

    def work() -> Any:
        for _ in range(6):
            two[1]._looked -= 1.0  # as if a second had gone by
            two[1].alive()
            threading.Event().wait(0.2)
        return two[1].meet("here")

    assert at_once(lambda: two[0].meet("here"), work) == [[None, None]] * 2


def test_a_rank_without_a_process_is_gone(two: tuple[Ranks, Ranks]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    two[0].homes = {1: (place(), ended.pid)}
    with pytest.raises(RankError, match="rank 1 of 2 is gone"):
        two[0].meet("here")
    assert "rank 1 of 2 is gone" in str(two[0].lost())


def test_an_unburied_process_is_gone(two: tuple[Ranks, Ranks]) -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        two[0].homes = {1: (place(), process.pid)}
        assert two[0].lost() is None
        process.kill()
        process.stdout.read()  # to its end: it is dead, and nobody has waited for it
        for _ in range(100):
            if two[0].lost() is not None:
                break
            threading.Event().wait(0.02)
        assert "rank 1 of 2 is gone" in str(two[0].lost())


def test_a_process_number_of_another_machine_means_nothing(two: tuple[Ranks, Ranks]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    two[0].homes = {1: ("another boot", ended.pid)}
    assert two[0].lost() is None


def test_who_came_and_left_is_not_gone(two: tuple[Ranks, Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets its key and ends between our look at the keys and our look at its process."""
    two[0].homes = {1: (place(), 1)}

    def dies_after_arriving(pid: int) -> bool:
        two[1].store.set("1/1", '["here", null]')
        return False

    monkeypatch.setattr(ranks_module, "runs", dies_after_arriving)
    assert two[0].meet("here") == [None, None]


def test_the_first_trouble_is_the_one_all_are_told(two: tuple[Ranks, Ranks]) -> None:
    two[1].tell(1, "failed: disk full")
    two[0].tell(0, "failed: something that followed from it")
    for ranks in two:
        with pytest.raises(RankError, match="rank 1 of 2 failed: disk full"):
            ranks.meet("here")


def test_a_store_that_is_gone_is_told_in_our_words(two: tuple[Ranks, Ranks]) -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe\nException raised from ...")

    two[0].store = Gone()
    with pytest.raises(RankError, match=r"out of reach \(Broken pipe\); start the same command again"):
        two[0].meet("here")
    two[0].leave()  # and nobody is left who could be told


def test_a_broken_exchange_says_who_broke_it(two: tuple[Ranks, Ranks]) -> None:
    two[1].tell(1, "failed: out of memory")
    with pytest.raises(RankError, match="rank 1 of 2 failed: out of memory"), two[0]._connected():
        raise RuntimeError("Connection closed by peer")


def test_without_torchrun_nothing_is_shared() -> None:
    assert parallel.launched() == (0, 1)
    assert (parallel.position(), parallel.leads(), parallel.described()) == ("", True, {})
    with parallel.session("cpu"), parallel.leader_first("a step"):
        assert parallel.share(5, 2) == range(5)
        assert parallel.agreed("number", 3) == 3
    assert "RANK" not in os.environ


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("n_windows", "batch_size"), [(1, 1), (2, 4), (7, 2), (24, 2), (64, 64), (65, 64)])
def test_shares_are_the_batches_of_one_process(size: int, n_windows: int, batch_size: int) -> None:
    shares = [parallel._part(n_windows, batch_size, rank, size) for rank in range(size)]
    batches = [start for share in shares for start in range(share.start, share.stop, batch_size)]
    assert batches == list(range(0, n_windows, batch_size))
    assert [window for share in shares for window in share] == list(range(n_windows))
    n_batches = [-(-len(share) // batch_size) for share in shares]
    assert max(n_batches) - min(n_batches) <= 1
    assert len(shares[0]) > 0, "rank 0 shows the progress"
