"""How well a sample of text lets CETT-PPL-p% and CETT-KL-p% be known, and whether the intervals tell it.

1. Spread. Truncated passes at a grid of CETTs over a long text, once; then samples of its windows are drawn with
   replacement, and each metric's answer is read off each sample's own passes, by interpolation in (log CETT, log rise):
   standard deviation of the activation ratio, and how often a sample has no answer on the grid.
2. Coverage, with `--coverage N`. The text is cut into N samples that share no window; the tool measures each; how often
   is the answer of all the text, by the same tool, inside the sample's 95 % interval?
"""

from __future__ import annotations

import math

import numpy as np

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.cett_search import METRICS
from neuron_sparsity.corpus import Windows
from neuron_sparsity.evaluation import Evaluation, Evaluator


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--p", type=float, nargs="+", default=[1.0, 5.0])
    options.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens of a sample")
    options.add_argument("--samples", type=int, default=300)
    options.add_argument("--coverage", type=int, default=0, metavar="N")
    options.set_defaults(tokens=16_384)
    given = options.parse_args()
    adapter, windows = load(given)
    shared = {"model": given.model, "corpus": windows.name, "n_tokens": windows.n_tokens}
    if given.coverage:
        for p in given.p:
            write_row("coverage", shared | coverage(adapter, windows, p, given.coverage), save=given.save)
        return
    for p in given.p:
        passes = grid(adapter, windows, p)
        for size in given.sizes:
            n = max(2, size // windows.window)
            row = shared | {"sample_tokens": n * windows.window, "samples": given.samples, "p_percent": p}
            write_row("sampling", row | spread(passes, n, p, given.samples), save=given.save)


def grid(adapter: MLPAdapter, windows: Windows, p: float) -> list[Evaluation]:
    """Truncated passes over all windows at CETTs of 0.55 to 1.8 times the one where the KL divergence is p."""
    evaluator = Evaluator(adapter, windows)
    target = math.log1p(p / 100)
    (guess,) = evaluator.dense(evaluator.rough([target], [0.05 * math.sqrt(p)]))
    for factor in (0.55, 0.7, 0.85, 1.0, 1.18, 1.4, 1.8):
        if not evaluator.curves.covers(guess * factor):
            evaluator.extend(guess * factor)
        evaluator.truncate(min(1.0, guess * factor))
    return evaluator.evaluations


def spread(passes: list[Evaluation], n: int, p: float, samples: int) -> dict[str, float]:
    """Standard deviation of each metric's answer over samples of `n` windows."""
    generator, target = np.random.default_rng(0), math.log1p(p / 100)
    x = np.log([e.cett for e in passes])
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for _ in range(samples):
        chosen = generator.integers(0, len(passes[0].scored), n)
        ratios = np.array([e.window_activation[chosen].mean() for e in passes])
        for metric in METRICS:
            sums = [(e.rise if metric == "ppl" else e.kl)[chosen].sum() for e in passes]
            rises = np.array(sums) / passes[0].scored[chosen].sum()
            at = crossing(x, rises, target)
            if at is not None:
                found[metric].append(float(np.interp(at, x, ratios)))
    row: dict[str, float] = {}
    for metric, values in found.items():
        row |= {
            f"{metric}_ratio_mean": float(np.mean(values)),
            f"{metric}_ratio_sd": float(np.std(values, ddof=1)),
            f"{metric}_no_answer": 1 - len(values) / samples,
        }
    return row


def crossing(x: np.ndarray, rises: np.ndarray, target: float) -> float | None:
    """Where the rise first passes the target, by interpolation of its logarithm; None if it does not."""
    for i in range(len(x) - 1):
        low, high = rises[i], rises[i + 1]
        if 0 < low < target <= high:
            share = (math.log(target) - math.log(low)) / (math.log(high) - math.log(low))
            return float(x[i] + share * (x[i + 1] - x[i]))
    return None


def coverage(adapter: MLPAdapter, windows: Windows, p: float, n_samples: int) -> dict[str, float]:
    """How often the interval of a sample holds the answer of all text."""
    whole = ns.cett_ppl_sparsity(adapter, windows, p_percent=p)
    each = windows.n_windows // n_samples
    inside: dict[str, list[bool]] = {f"cett_{metric}": [] for metric in METRICS}
    widths: dict[str, list[float]] = {name: [] for name in inside}
    missing = dict.fromkeys(inside, 0)
    for index in range(n_samples):
        rows = range(index, windows.n_windows, n_samples)[:each]
        sample = Windows(
            windows.tokens[list(rows)],
            windows.scored[list(rows)],
            windows.name,
            tuple(windows.documents[row] for row in rows),
            windows.packing,
            windows.bos,
        )
        told = {estimate.metric: estimate for estimate in ns.cett_ppl_sparsity(adapter, sample, p_percent=p).estimates}
        for truth in whole.estimates:
            found = told.get(truth.metric)
            if found is None or found.low is None or found.high is None:
                missing[truth.metric] += 1
                continue
            inside[truth.metric].append(found.low <= truth.activation_ratio <= found.high)
            widths[truth.metric].append(found.high - found.low)
        print(f"  sample {index + 1} of {n_samples}: {told}", flush=True)
    row: dict[str, float] = {"p_percent": p, "samples": n_samples, "sample_tokens": each * windows.window}
    for truth in whole.estimates:
        name = truth.metric
        row |= {
            f"{name}_truth": truth.activation_ratio,
            f"{name}_covered": float(np.mean(inside[name])),
            f"{name}_width": float(np.mean(widths[name])),
            f"{name}_without": missing[name],
        }
    return row


if __name__ == "__main__":
    main()
