"""This process among the others: where they meet, and how one learns that another is gone.

Only words go through the store; each rank sets keys of its own and looks at those of the others. The main thread does
all of it, so that a signal is heard while a rank waits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from neuron_sparsity.errors import RankError
from neuron_sparsity.parallel.process import brief, place, runs

__all__ = ["AGAIN", "PATIENCE_SECONDS", "Ranks"]

PATIENCE_SECONDS = 1800.0
"""How long a rank that gives no sign is waited for: longer than any model takes to load or any batch to run."""

_FAILURE = "failure"  # the key of the first trouble; whoever sees it first writes it
_LINGER_SECONDS = 10.0
AGAIN = "start the same command again: a recording goes on from what is in its folder"
_GONE = f"is gone (killed, or out of memory?); {AGAIN}"


class Ranks:
    """This process among the others. The store is where they meet; data does not go through it."""

    def __init__(self, store: Any, rank: int, size: int, device: str = "cpu") -> None:
        self.store, self.rank, self.size, self.device = store, rank, size, device
        self.patience = PATIENCE_SECONDS
        self.others = [r for r in range(size) if r != rank]
        self.homes: dict[int, tuple[str, int]] = {}
        self._step = self._beat = 0
        self._looked = time.monotonic()

    def meet(self, step: str, value: Any = None) -> list[Any]:
        """Wait until every rank is at this step; return what each of them says, in the order of ranks.

        Raises:
            RankError: If one is gone, has failed, gives no sign, or is at another step.
        """
        self._step += 1
        keys = [f"{self._step}/{rank}" for rank in range(self.size)]
        with self._store_is_there():
            self.store.set(keys[self.rank], json.dumps([step, value]))
            self._wait(keys)
            found = [json.loads(self.store.get(key)) for key in keys]
        for rank, (theirs, _) in enumerate(found):
            if theirs != found[0][0]:
                where = f"{self._name(rank)} is at {theirs!r}, {self._name(0)} at {found[0][0]!r}"
                raise RankError(f"{where}; start the same command on all")
        return [said for _, said in found]

    def _wait(self, keys: list[str]) -> None:
        pause, signs = 0.001, {rank: ("", time.monotonic()) for rank in self.others}
        while missing := [rank for rank in self.others if not self.store.check([keys[rank]])]:
            self._raise_failure()
            dead = [rank for rank in missing if self._is_dead(rank)]
            for rank in dead:
                if not self.store.check([keys[rank]]):  # else it came here, and left for good while we looked
                    self.tell(rank, _GONE)
            self._raise_failure()
            for rank in missing:
                sign = self._sign(rank)
                if sign != signs[rank][0]:
                    signs[rank] = (sign, time.monotonic())
                elif time.monotonic() - signs[rank][1] > self.patience:
                    self.tell(rank, f"gives no sign for {self.patience:g} seconds; {AGAIN}")
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        self._raise_failure()  # one may have come here and then left for a trouble that it saw

    def alive(self) -> None:
        """Give a sign, and look after the others; at most once a second.

        Raises:
            RankError: If one is gone or has failed.
        """
        if time.monotonic() - self._looked < 1.0:
            return
        self._looked, self._beat = time.monotonic(), self._beat + 1
        with self._store_is_there():
            self.store.set(f"sign/{self.rank}", str(self._beat))
            self._look()

    def lost(self) -> RankError | None:
        """Return what is known of a rank that is gone or has failed."""
        try:
            with self._store_is_there():
                self._look()
        except RankError as error:
            return error
        return None

    def tell(self, rank: int, what: str) -> None:
        """Tell all ranks what happened to one of them, unless they know of another trouble."""
        self.store.compare_set(_FAILURE, "", json.dumps([rank, what]))

    def leave(self) -> None:
        """Say that this rank looks no more into the store. The process that holds it, if torchrun does not, waits."""
        with suppress(RuntimeError):  # the store is gone: nobody needs to be told
            self.store.set(f"left/{self.rank}", "")
            until = time.monotonic() + _LINGER_SECONDS
            holds = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            waiting = [rank for rank in self.others if holds]
            while waiting and time.monotonic() < until:
                time.sleep(0.02)
                waiting = [r for r in waiting if not self.store.check([f"left/{r}"]) and not self._is_dead(r)]

    def exchanged(self, step: str) -> Any:
        """Meet; then, while the context is open, turn a broken connection into a RankError."""
        self.meet(step)
        return self._connected()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            until = time.monotonic() + 3.0  # a process that was killed a moment ago may still be there
            while (known := self.lost()) is None and time.monotonic() < until:
                time.sleep(0.1)
            raise known or RankError(f"an exchange between the ranks broke ({brief(error)}); {AGAIN}") from error

    @contextmanager
    def _store_is_there(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"torchrun, or the process that holds its store, is gone or out of reach ({brief(error)}); {AGAIN}"
            ) from error

    def _look(self) -> None:
        self._raise_failure()
        for rank in self.others:
            if self._is_dead(rank):
                self.tell(rank, _GONE)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.store.check([_FAILURE]):
            rank, what = json.loads(self.store.get(_FAILURE))
            raise RankError(f"{self._name(rank)} {what}")

    def _sign(self, rank: int) -> str:
        key = f"sign/{rank}"
        return bytes(self.store.get(key)).decode() if self.store.check([key]) else ""

    def _is_dead(self, rank: int) -> bool:
        """Whether a rank on this machine has no process any more; of other machines torchrun tells."""
        home, pid = self.homes.get(rank, ("", 0))
        return home == place() and not runs(pid)

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.size}"
