"""What every benchmark shares: the model, the unit F, and rows of results.

F is one dense forward pass with loss of the same model object on the same tokens: TransformerLens' own forward, hook
points and all. Where the package runs the Hugging Face model inside instead, a dense pass costs it less than 1 F;
`plain_pass_F` says how much. A machine that is shared is noisy, so work and baseline alternate in one run, and only
ratios are kept.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import neuron_sparsity as ns
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.store import provenance
from neuron_sparsity.terminal import keep_freed_memory

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--text", default="sotu", help="a file or a built-in corpus")
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    return made


def load(options: argparse.Namespace) -> tuple[MLPAdapter, Windows]:
    """Load model and corpus as the command line does."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    keep_freed_memory()
    model = ns.load_model(options.model)
    windows = ns.load_corpus(options.text, model, n_tokens=options.tokens)
    return attach(model), windows


def seconds(work: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def against_dense_pass(adapter: MLPAdapter, windows: Windows, work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the cost of `work` in F, once a repeat; a dense pass before and after each gives F."""
    wrapped = attach(adapter.model, plain=False)
    ns.perplexity(wrapped, windows)  # warm up: first touch of weights and buffers
    ratios = []
    before = seconds(lambda: ns.perplexity(wrapped, windows))
    for _ in range(repeats):
        taken = seconds(work)
        after = seconds(lambda: ns.perplexity(wrapped, windows))
        ratios.append(2 * taken / (before + after))
        before = after
    return ratios


def plain_pass(adapter: MLPAdapter, windows: Windows, repeats: int) -> dict[str, float]:
    """Cost in F of the dense pass that the package itself runs."""
    ratios = against_dense_pass(adapter, windows, lambda: ns.perplexity(adapter, windows), repeats)
    return {"plain_pass_F": statistics.median(ratios)}


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def write_row(name: str, row: dict[str, Any], *, save: bool) -> None:
    """Print a row, and append it to `results/NAME.csv` if asked."""
    versions = provenance()["versions"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    row |= {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "transformer_lens": versions["transformer_lens"],
    }
    for key, value in row.items():
        print(f"  {key:24} {value:.4g}" if isinstance(value, float) else f"  {key:24} {value}")
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
