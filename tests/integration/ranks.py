"""Real processes for the tests of `parallel`, and what they do.

They are forked from a server that imports everything once, so that a test with three processes takes a second or two
and not half a minute. Every job runs inside `parallel.session`, as under torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PRELOAD = [
    "tests.integration.ranks",
    "neuron_sparsity.sparsity",
    "neuron_sparsity.recorder",
    "transformers.models.auto.modeling_auto",
    "transformers.models.opt.modeling_opt",
    "transformer_lens.model_bridge",
]
CUTS = {"low": [0.05, 0.1], "high": [1.0, 2.0]}
BATCH = 2


@dataclass(frozen=True)
class Left:
    """How one rank ended: what its job returned, or the error; both None if it was killed."""

    value: Any
    error: BaseException | None
    code: int


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(n_ranks: int, job: Callable[..., Any], folder: Path, *arguments: Any) -> list[Left]:
    """Run `job(rank, *arguments)` on every rank, and wait for all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _server().Process(target=_child, args=(rank, n_ranks, port, job, folder, arguments)) for rank in range(n_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        hangs = process.is_alive()
        process.kill()
        assert not hangs, f"{job.__name__}: a rank hangs"
    return [_left(folder / f"{rank}.pickle", process.exitcode) for rank, process in enumerate(processes)]


def _left(path: Path, code: int | None) -> Left:
    value, error = pickle.loads(path.read_bytes()) if path.exists() else (None, None)
    path.unlink(missing_ok=True)
    return Left(value, error, code or 0)


def _child(rank: int, n_ranks: int, port: int, job: Callable[..., Any], folder: Path, arguments: Any) -> None:
    import torch

    from neuron_sparsity.parallel import session

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    value, error = None, None
    try:
        with session():
            value = job(rank, *arguments)
    except BaseException as caught:
        error = type(caught)(str(caught))
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((value, error)))


def make_windows(tokens: list[list[int]]) -> Any:
    import torch

    from neuron_sparsity.corpus import Windows

    ids = torch.tensor(tokens, dtype=torch.int32)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(ids, scored, "its own words", ("none",) * len(ids), "apart", bos=True)


def measure(rank: int, model_folder: str, *texts: list[list[int]]) -> list[Any]:
    """Record and search on each text."""
    from neuron_sparsity.adapter import attach, load_model
    from neuron_sparsity.recorder import record
    from neuron_sparsity.sparsity import cett_ppl_sparsity

    adapter, found = attach(load_model(model_folder)), []
    for text in texts:
        windows = make_windows(text)
        stats = record(adapter, windows, thresholds=CUTS, batch_size=BATCH, n_examples=3)
        result = cett_ppl_sparsity(adapter, windows, p_percent=5.0, batch_size=BATCH)
        found.append((plain(stats), result.to_json()))
    return found


def plain(stats: Any) -> dict[str, Any]:
    """Statistics as numpy arrays and plain values: tensors would go through shared memory."""
    return {
        name: value.numpy() if hasattr(value, "numpy") else value
        for name, value in vars(stats).items()
        if name not in ("model", "provenance")
    }


def record_part(
    rank: int, model_folder: str, text: list[list[int]], out: Path, killed: int | None, after: int
) -> tuple[dict[str, Any], list[int]]:
    """Record; rank `killed` is gone after so many batches, each of which it has kept. The last rank is slow then."""
    from neuron_sparsity.adapter import load_model
    from neuron_sparsity.recorder import record

    shown: list[int] = []
    recorded = out.with_name("the last rank has recorded")  # the machine may be busy: the killed one waits for it

    def progress(label: str, done: int, total: int) -> None:
        shown.append(done)
        if rank == killed and len(shown) == after + 1:  # it is shown before the first batch, too
            while not recorded.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if killed is not None and rank == 2 and len(shown) == 2:
            recorded.touch()
            time.sleep(1.5)  # so it learns of the loss in the middle of its windows

    stats = record(
        load_model(model_folder),
        make_windows(text),
        thresholds=CUTS,
        folder=out,
        batch_size=BATCH,
        n_examples=3,
        checkpoint_seconds=0.0 if rank == killed else 60.0,
        progress=progress,
    )
    return plain(stats), shown


def search_until_killed(rank: int, model_folder: str, text: list[list[int]], killed: int) -> Any:
    """Search; rank `killed` is gone in the first truncated pass over all windows."""
    from neuron_sparsity.adapter import load_model
    from neuron_sparsity.sparsity import cett_ppl_sparsity

    def progress(label: str, done: int, total: int) -> None:
        if rank == killed and label.startswith("truncated"):
            os.kill(os.getpid(), signal.SIGKILL)

    return cett_ppl_sparsity(load_model(model_folder), make_windows(text), batch_size=BATCH, progress=progress)


def fail(rank: int, failing: int) -> None:
    """One rank has an error of its own, while the others wait for it."""
    from neuron_sparsity.errors import MeasurementError
    from neuron_sparsity.parallel import meet

    if rank == failing:
        raise MeasurementError("layer 3: post-activations are NaN")
    meet("the next step")


def part_ways(rank: int) -> None:
    """The ranks take different steps."""
    from neuron_sparsity.parallel import meet

    meet("a dense pass" if rank else "a truncated pass")


def exchange(rank: int) -> dict[str, Any]:
    """Everything that goes between ranks, on small numbers."""
    import torch

    from neuron_sparsity import parallel

    own = {"sum": torch.tensor([rank, 2**53 + rank]), "top": torch.tensor([float(rank), -1.0]), "none": torch.empty(0)}
    order: list[int] = []
    with parallel.leader_first("in order"):
        order.append(rank)
    with parallel.alike():
        alike = (parallel.total(own)["sum"].tolist(), parallel.share(10, 2), parallel.joined(own["sum"]).tolist())
    return {
        "total": {name: value.tolist() for name, value in parallel.total(own, maxima=("top",)).items()},
        "own": own["sum"].tolist(),
        "first": parallel.first(own)["sum"].tolist(),
        "alike": alike,
        "gather": [value.tolist() for value in parallel.gather(torch.tensor([rank]))],
        "joined": parallel.joined(torch.arange(rank)).tolist(),
        "everyones": parallel.everyones("name", f"rank {rank}"),
        "share": parallel.share(10, 2),
        "who": (parallel.position(), parallel.leads(), parallel.described()),
    }
