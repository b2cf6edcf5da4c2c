"""Several processes, one measurement: what `torchrun` starts shares the windows and adds up what each process saw.

1. Every process (rank) loads the model, cuts the same windows, and takes the same steps with the same numbers. Only
   passes over the corpus are divided: `share` gives a rank its run of whole batches, the very batches that one process
   makes, so that counts are equal and not merely close.
2. After a pass `total` adds up (sums, counts, losses) and `gather` collects. All ranks get the same bits, so all of
   them decide alike; what is too short to divide each measures whole, and rank 0's is taken (`alike`).
3. Before every exchange the ranks `meet` in torchrun's store, where each says which step it is at. Whoever waits there
   looks after the others: a rank that has failed has said why, one that is gone has no process any more, and one
   that gives no sign for half an hour counts as gone. All ranks then end with the same RankError.

Without torchrun, or with one process, every function here returns what it was given, and torch is not imported.
Data goes by gloo between CPUs and by NCCL between GPUs; the store holds words only.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from neuron_sparsity.errors import MeasurementError, RankError
from neuron_sparsity.parallel.process import brief, ignore_sigterm, place, stdout_to_stderr, stop_on_sigterm
from neuron_sparsity.parallel.ranks import AGAIN, PATIENCE_SECONDS, Ranks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "agreed",
    "alike",
    "alive",
    "described",
    "everyones",
    "first",
    "gather",
    "joined",
    "launched",
    "leader_first",
    "leads",
    "meet",
    "own_device",
    "position",
    "session",
    "share",
    "total",
]

T = TypeVar("T")

_EXCHANGE = timedelta(minutes=10)  # for an exchange that all ranks have come to
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CALLS = itertools.count()  # sessions of this process: each has keys of its own


def launched() -> tuple[int, int]:
    """Return the rank of this process and how many there are, as torchrun says; (0, 1) without it.

    Example:
        >>> launched()
        (0, 1)
    """
    if not all(name in os.environ for name in _VARIABLES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def own_device(device: str | None) -> str | None:
    """Return the device of this rank: its own GPU, if GPUs are asked for or there are some; else `device`.

    Raises:
        ValueError: If a GPU is named by its number, or there are fewer GPUs than processes on this machine.
    """
    if launched()[1] == 1 or device not in (None, "cuda"):
        if launched()[1] > 1 and str(device).startswith("cuda"):
            raise ValueError(f"under torchrun every process takes a GPU of its own: --device cuda, not {device}")
        return device
    import torch

    n_gpus, local = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(os.environ.get("LOCAL_RANK", 0))
    if n_gpus == 0:
        return device
    if local >= n_gpus:
        raise ValueError(
            f"process {local + 1} of this machine has no GPU: there are {n_gpus}; "
            f"--nproc-per-node {n_gpus}, or --device cpu"
        )
    return f"cuda:{local}"


_SESSION: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_ALIKE: ContextVar[bool] = ContextVar("alike", default=False)


@contextmanager
def session(device: str | None = None) -> Iterator[None]:
    """Measure together with the other processes that torchrun started, while the context is open.

    Inside, `record` and `cett_ppl_sparsity` work on this rank's windows and return the result of all ranks, on every
    rank. Every rank must make the same calls. An error on one of them ends all.

    SIGTERM, which torchrun sends when a rank is gone, interrupts inside; after an error it is ignored, so that the
    reason can still be told before the process ends.

    Args:
        device: What `own_device` returned: of a GPU, data goes by NCCL.

    Raises:
        RankError: If another rank is gone, has failed, or did something else.
    """
    rank, size = launched()
    if size == 1:
        yield
        return
    import torch.distributed as dist

    with stop_on_sigterm():
        ranks: Ranks | None = None
        token = _SESSION.set(None)
        try:
            ranks = _arrive(rank, size, device or "cpu")
            _connect(ranks)
            _SESSION.set(ranks)
            yield
            ranks.meet("the end")
        except BaseException as error:
            ignore_sigterm()
            known = _say_why(ranks, error)
            if known is not None:
                raise known from error
            raise
        finally:
            _SESSION.reset(token)
            if ranks is not None:
                ranks.leave()
                if dist.is_initialized():
                    dist.destroy_process_group()


def _say_why(ranks: Ranks | None, error: BaseException) -> RankError | None:
    """Tell the other ranks why this one leaves. Return their trouble, if this one was only asked to stop for it."""
    if ranks is None or isinstance(error, RankError):
        return None
    asked = isinstance(error, KeyboardInterrupt)
    known = ranks.lost() if asked else None
    if known is None:
        what = f"was interrupted; {AGAIN}" if asked else f"failed: {brief(error)}"
        with suppress(RuntimeError):  # the store may be gone; then nobody is left who could be told
            ranks.tell(ranks.rank, what)
    return known


def _arrive(rank: int, size: int, device: str) -> Ranks:
    """Meet the other ranks in torchrun's store."""
    import torch.distributed as dist

    if not dist.is_available():
        raise RankError("this torch has no torch.distributed; start one process, without torchrun")
    if dist.is_initialized():
        raise RankError("torch.distributed is set up already; measure before init_process_group, or in one process")
    try:
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE_SECONDS)))[0]
    except (RuntimeError, ValueError) as error:
        raise RankError(f"torchrun's store cannot be reached: {brief(error)}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
    store = dist.PrefixStore(f"neuron_sparsity/{attempt}/{next(_CALLS)}", store)
    return Ranks(store, rank, size, device if device.startswith("cuda") else "cpu")


def _connect(ranks: Ranks) -> None:
    """Learn where the other ranks live, and connect to them."""
    import torch
    import torch.distributed as dist

    on_gpu = ranks.device != "cpu"
    homes = ranks.meet("the start", [place(), os.getpid(), on_gpu])
    ranks.homes = {rank: (place, pid) for rank, (place, pid, _) in enumerate(homes)}
    if len({gpu for *_, gpu in homes}) > 1:
        raise RankError("some ranks have a GPU and some have none; give all of them --device cpu")
    with ranks.exchanged("connecting"), stdout_to_stderr():  # where gloo of some versions prints
        if on_gpu:
            torch.cuda.set_device(ranks.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("connections", ranks.store),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=_EXCHANGE,
        )
        dist.all_reduce(torch.zeros(1, device=ranks.device))


def described() -> dict[str, int]:
    """Return what a result's provenance says of the processes that measured it: nothing of one alone."""
    ranks = _SESSION.get()
    return {} if ranks is None else {"processes": ranks.size}


def position() -> str:
    """Return such as `1-of-3` for the second of three processes; empty for one alone."""
    ranks = _SESSION.get()
    return "" if ranks is None else f"{ranks.rank}-of-{ranks.size}"


def leads() -> bool:
    """Return whether this is the rank that writes: the first, or the only one."""
    ranks = _SESSION.get()
    return ranks is None or ranks.rank == 0


def meet(step: str) -> None:
    """Wait until every rank is at this step.

    Raises:
        RankError: If one never will be.
    """
    ranks = _SESSION.get()
    if ranks is not None:
        ranks.meet(step)


def alive() -> None:
    """Give the others a sign, between two batches, and end if one of them is gone.

    Raises:
        RankError: If one is gone or has failed.
    """
    ranks = _SESSION.get()
    if ranks is not None:
        ranks.alive()


@contextmanager
def leader_first(step: str) -> Iterator[None]:
    """Have rank 0 run the block before the others do: it makes the files that they then find.

    Raises:
        RankError: If rank 0 fails at it.
    """
    if not leads():
        meet(step)
    yield
    if leads():
        meet(step)


@contextmanager
def alike() -> Iterator[None]:
    """Have every rank run on all windows while the context is open, and take rank 0's numbers instead of totals."""
    token = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(token)


def share(n_windows: int, batch_size: int) -> range:
    """Return the windows of this rank: a run of whole batches, of those that one process would make.

    Raises:
        ValueError: If `batch_size` is not positive.

    Example:
        >>> share(10, 4)
        range(0, 10)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ranks = _SESSION.get()
    return range(n_windows) if ranks is None or _ALIKE.get() else _part(n_windows, batch_size, ranks.rank, ranks.size)


def _part(n_windows: int, batch_size: int, rank: int, size: int) -> range:
    """Return the windows of one rank.

    Example:
        >>> [_part(10, 2, rank, 3) for rank in range(3)], [_part(2, 4, rank, 3) for rank in range(3)]
        ([range(0, 4), range(4, 8), range(8, 10)], [range(0, 2), range(2, 2), range(2, 2)])
    """
    n_batches = -(-n_windows // batch_size)
    start, stop = (min(n_windows, batch_size * -(-n_batches * r // size)) for r in (rank, rank + 1))
    return range(start, stop)


def everyones(what: str, value: T) -> list[T]:
    """Return what every rank says, in the order of ranks; it must be ready for JSON.

    Example:
        >>> min(everyones("batch size", 4))
        4
    """
    ranks = _SESSION.get()
    return [value] if ranks is None else ranks.meet(what, value)


def agreed(what: str, value: T) -> T:
    """Return `value` if all ranks have the same; it must be ready for JSON.

    Raises:
        MeasurementError: If they differ.
    """
    said = everyones(what, value)
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            raise MeasurementError(
                f"the ranks differ in {what}: {_shown(theirs)} on rank {rank}, {_shown(said[0])} on rank 0; "
                "they need the same model, text, options, versions and run folder"
            )
    return value


def total(tensors: Mapping[str, Tensor], *, maxima: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the sums of all ranks' tensors, on every rank with the same bits; of those in `maxima`, the largest.

    What only one rank knows comes through unchanged if the others hold zeros. Integers are exact.
    """
    ranks = _SESSION.get()
    if ranks is None or _ALIKE.get():
        return first(tensors)
    import torch.distributed as dist

    summed = {}
    with ranks.exchanged(_step("the total of", tensors)):
        for name, tensor in tensors.items():
            copy = tensor.detach().to(ranks.device, copy=True).contiguous()
            if copy.numel():
                dist.all_reduce(copy, dist.ReduceOp.MAX if name in maxima else dist.ReduceOp.SUM)
            summed[name] = copy.to(tensor.device)
    return summed


def first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank: of what all have measured alike, one copy to go on with."""
    ranks = _SESSION.get()
    if ranks is None:
        return dict(tensors)
    import torch.distributed as dist

    taken = {}
    with ranks.exchanged(_step("rank 0's", tensors)):
        for name, tensor in tensors.items():
            copy = tensor.detach().to(ranks.device, copy=True).contiguous()
            if copy.numel():
                dist.broadcast(copy, src=0)
            taken[name] = copy.to(tensor.device)
    return taken


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, which have the same shape, in the order of ranks."""
    ranks = _SESSION.get()
    if ranks is None:
        return [tensor]
    import torch
    import torch.distributed as dist

    own = tensor.detach().to(ranks.device).contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    with ranks.exchanged(_step("all of", {"a tensor": tensor})):
        if own.numel():
            dist.all_gather(parts, own)
    return [part.to(tensor.device) for part in parts]


def joined(rows: Tensor) -> Tensor:
    """Return the rows of all ranks one after the other, in the order of ranks; each may have another number."""
    lengths = [len(rows)] if _ALIKE.get() else everyones("number of rows", len(rows))
    if len(lengths) == 1:
        return first({"rows": rows})["rows"]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    import torch

    return torch.cat([part[:length] for part, length in zip(gather(padded), lengths, strict=True)])


def _step(what: str, tensors: Mapping[str, Tensor]) -> str:
    return f"{what} {', '.join(f'{name} {tensor.dtype} {list(tensor.shape)}' for name, tensor in tensors.items())}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
