"""Memory of a recording, against what `plan` computes. Bars: constant in the number of tokens, and within 10 %.

The real recorder (`record`, its state, its kernels, its checkpoints and its file at the end) runs on a stack of layers
that has no weights: each layer's post-activations are random numbers. By default that is the shape of an 8B model, 32 x
14,336. Every number of tokens has a process of its own; what counts is the largest resident memory while `record` runs,
less the memory before it, as the command line sets the process up (it keeps freed memory; `--default-malloc` does not).

With `--model NAME`, the real model: the largest resident memory of `record` above the loaded model. With `--search` as
well, that of the CETT-PPL-1% search instead: the bar is 600 MB, flat from 2,048 to 65,536 tokens. Its truncated passes
are alike in memory, so that few will do: the search takes any pass within half a point of p.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import neuron_sparsity as ns
from benchmarks.harness import load, write_row
from neuron_sparsity.adapter import MLPAdapter, ModelInfo
from neuron_sparsity.corpus import Windows
from neuron_sparsity.footprint import Footprint
from neuron_sparsity.plan import plan
from neuron_sparsity.terminal import keep_freed_memory


class SyntheticStack(MLPAdapter):
    """Layers without weights: their post-activations are normal random numbers."""

    def __init__(self, n_layers: int, d_mlp: int) -> None:
        layers = tuple(range(n_layers))
        self.info = ModelInfo(
            name="synthetic",
            n_layers=n_layers,
            d_model=1,
            d_mlp=d_mlp,
            activation="none",
            gated=False,
            dtype="float32",
            weights="as loaded",
            host="none",
            layers=layers,
            fingerprint="synthetic",
        )
        self.layers, self.forward = list(layers), "random numbers"
        self.model: Any = SimpleNamespace(tokenizer=None, cfg=SimpleNamespace(d_vocab=1000, n_ctx=1 << 20))
        self.w_norms = [torch.ones(d_mlp) for _ in layers]

    def final_residual(self, tokens: Tensor, on_post: Any = None) -> Tensor:
        """Hand every layer a batch of random post-activations."""
        for layer in self.layers:
            on_post(layer, torch.empty(*tokens.shape, self.info.d_mlp).normal_())
        return torch.zeros(*tokens.shape, 1)


def synthetic_windows(n_tokens: int, n_ctx: int) -> Windows:
    tokens = torch.arange(n_tokens, dtype=torch.int32).remainder(1000).view(-1, n_ctx)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens, scored, "synthetic", ("none",) * len(tokens), "packed", bos=False)


def memory(kind: str) -> int:
    """Resident memory now (`VmRSS`) or at its largest since `forget_peak` (`VmHWM`), in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kind))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(adapter: MLPAdapter, windows: Windows, batch_size: int | None, *, search: bool = False) -> dict[str, float]:
    """Record, or search, in this process, and return the largest memory above what it was before."""
    record_small(windows.window)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        before = memory("VmRSS")
        if search:
            ns.cett_ppl_sparsity(adapter, windows, tolerance_percent=0.5, batch_size=batch_size)
        else:
            ns.record(adapter, windows, folder=folder, batch_size=batch_size, checkpoint_seconds=5.0)
        peak = memory("VmHWM") - before
    return {"peak": peak, "seconds": time.perf_counter() - start}


def record_small(n_ctx: int) -> None:
    """What a first recording loads and never gives back is no part of a recording's memory."""
    with tempfile.TemporaryDirectory() as folder:
        ns.record(SyntheticStack(2, 64), synthetic_windows(2 * n_ctx, n_ctx), folder=folder, batch_size=1)


def in_fresh_process(*arguments: object) -> dict[str, float]:
    """Run `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", *map(str, arguments)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--width", type=int, default=14_336, help="neurons a layer")
    made.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16_384])
    made.add_argument("--n-ctx", type=int, default=512)
    made.add_argument("--batch-size", type=int, default=2)
    made.add_argument("--model", help="a real model instead, on the built-in text")
    made.add_argument("--search", action="store_true", help="of CETT-PPL-1%%, instead of a recording; needs --model")
    made.add_argument("--default-malloc", action="store_true")
    made.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    parser = options()
    given = parser.parse_args()
    if given.search and not given.model:
        parser.error("--search needs --model: a stack without weights has no perplexity")
    if given.child:
        if not given.default_malloc:
            keep_freed_memory()
        print(json.dumps(child(given)))
        return
    for n_tokens in given.tokens:
        flags = ["--default-malloc"] * given.default_malloc + ["--search"] * given.search
        shape = ["--layers", given.layers, "--width", given.width, "--n-ctx", given.n_ctx]
        shape += ["--batch-size", given.batch_size, *(["--model", given.model] if given.model else [])]
        found = in_fresh_process(*shape, "--tokens", n_tokens, *flags)
        row = {"shape": given.model or f"{given.layers} x {given.width}", "n_tokens": n_tokens, "n_ctx": given.n_ctx}
        row |= {"batch_size": given.batch_size, "peak_MB": found["peak"] / 1e6}
        if not given.search:
            expected = predicted(given, n_tokens)
            row |= {"plan_MB": expected / 1e6, "measured_over_plan": found["peak"] / expected}
        row |= {"seconds": found["seconds"]}
        write_row("memory_search" if given.search else "memory", row, save=given.save)


def child(given: argparse.Namespace) -> dict[str, float]:
    if given.model:
        load_options = argparse.Namespace(model=given.model, text="sotu", tokens=given.tokens[0])
        adapter, windows = load(load_options)
        return measure(adapter, windows, given.batch_size, search=given.search)
    windows = synthetic_windows(given.tokens[0], given.n_ctx)
    return measure(SyntheticStack(given.layers, given.width), windows, given.batch_size)


def predicted(given: argparse.Namespace, n_tokens: int) -> int:
    if given.model:
        made = plan(given.model, n_tokens=n_tokens, n_ctx=given.n_ctx, batch_size=given.batch_size, device="cpu")
        return made.steps[0].peak_bytes - made.weights_bytes
    return Footprint(given.layers, given.width, 0, given.n_ctx, given.batch_size).recording


if __name__ == "__main__":
    main()
