"""Size, time and memory of the report page. Bars: 6 MB, 10 s for 30 x 1,536; 15 MB, 60 s, 2 GiB for 32 x 14,336.

A synthetic run folder holds statistics of that shape, of no model: counts, sums and histograms as those
of a recording spread, contexts of tokens from a vocabulary in which a token of rank r is drawn about 1/r of the time,
as in text. A process of its own renders it; its largest resident memory counts whole, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import write_row
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.run_results import render
from neuron_sparsity.saliency import NeuronSaliency
from neuron_sparsity.statistics import CONTEXT_LENGTH, NeuronStatistics
from neuron_sparsity.store import RunFolder

N_BINS = 64
N_EXAMPLES = 5


def synthetic_statistics(n_layers: int, d_mlp: int, n_tokens: int = 65_536, n_vocab: int = 49_152) -> NeuronStatistics:
    """Statistics of a recording that never was."""
    random, shape = np.random.default_rng(0), (n_layers, d_mlp)
    shift = random.normal(0.0, 1.0, shape).astype(np.float32)
    above = random.binomial(n_tokens, 1 / (1 + np.exp(-1.6 * (shift + 0.5)))).astype(np.int64)
    mean = np.exp(shift - 2.5 + 0.4 * random.normal(size=shape))
    histogram = np.empty((*shape, N_BINS), dtype=np.int64)
    for layer in range(n_layers):
        place = np.arange(N_BINS) - (38 + 3 * shift[layer])[:, None]
        hump = np.exp(-0.5 * (place / random.uniform(3, 7, (d_mlp, 1))) ** 2)
        histogram[layer] = random.poisson(hump / hump.sum(axis=1, keepdims=True) * n_tokens)
    ids = np.empty((*shape, N_EXAMPLES, CONTEXT_LENGTH), dtype=np.int32)
    for layer in range(n_layers):
        ids[layer] = np.exp(random.random(ids.shape[1:]) * np.log(n_vocab)).astype(np.int32) - 1
    values = -np.sort(-mean[..., None] * np.exp(random.random((*shape, N_EXAMPLES)) * 3), axis=2)
    names = {i: " " + np.base_repr(i * 7_919 % 1_679_616, 36).lower() for i in np.unique(ids).tolist()}
    layers = tuple(range(n_layers))
    info = ModelInfo(
        "synthetic", n_layers, 4096, d_mlp, "silu", True, "float32", "as loaded", "none", layers, "synthetic"
    )
    corpus = {"name": "synthetic", "sha256": "0" * 64, "n_tokens": n_tokens, "window": 512, "bos": True}
    corpus |= {"n_windows": n_tokens // 512, "scored_tokens": n_tokens - n_tokens // 512, "packing": "packed"}
    tensors = {
        "zero_count": np.zeros(shape, dtype=np.int64),
        "contribution_sum": mean * n_tokens,
        "contribution_sq_sum": mean**2 * n_tokens * 2,
        "activation_sum": mean * n_tokens * random.normal(size=shape),
        "contribution_max": values[:, :, 0].astype(np.float32),
        "histogram": np.minimum(histogram, n_tokens),
        "thresholds": np.full((n_layers, 1), 0.1, dtype=np.float32),
        "above_count": above[..., None],
        "example_value": values.astype(np.float32),
        "example_position": random.integers(0, n_tokens, values.shape),
        "example_context": ids,
        "w_norm": np.ones(shape, dtype=np.float32),
    }
    return NeuronStatistics(
        model=info, corpus=corpus, n_tokens=n_tokens, threshold_names=("CETT-PPL-1%",), token_strings=names,
        **{name: torch.from_numpy(values) for name, values in tensors.items()},
    )  # fmt: skip


def synthetic_saliency(stats: Any) -> NeuronSaliency:
    """Gradients that predict rises of either sign and of every size, for the neurons of statistics."""
    random, shape = np.random.default_rng(2), tuple(stats.zero_count.shape)
    names = [name for name in NeuronSaliency.__dataclass_fields__ if name.endswith("_sum") or name == "w_l1"]
    sums = {name: torch.from_numpy(random.normal(size=shape) * np.exp(random.normal(0, 3, shape))) for name in names}
    corpus = {"name": "speeches for ranking", "sha256": "1" * 64, "n_tokens": 4096, "window": 512}
    return NeuronSaliency(model=stats.model, corpus=corpus, n_tokens=4096, n_scored=4088, **sums)


def child(folder: Path) -> dict[str, float]:
    """Render a run folder, and say what it took."""
    start = time.perf_counter()
    page = render(folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"MB": len(page.html.encode()) / 1e6, "seconds": seconds, "peak_MiB": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child)))
        return
    root = Path(__file__).resolve().parent.parent
    for n_layers, d_mlp in given.shape or [(30, 1536), (32, 14_336)]:
        with tempfile.TemporaryDirectory() as folder:
            stats = synthetic_statistics(n_layers, d_mlp)
            RunFolder(folder, {"model": stats.model.to_json(), "corpus": stats.corpus})
            stats.save(folder)
            del stats
            command = [sys.executable, "-m", "benchmarks.report_page", "--child", folder]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        row = {"shape": f"{n_layers} x {d_mlp}"} | json.loads(done.stdout.splitlines()[-1])
        write_row("report_page", row, save=given.save)


if __name__ == "__main__":
    main()
