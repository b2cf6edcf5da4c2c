"""Cost of the CETT-PPL-p% search in F, from nothing to the verified result. Bar: 12 F at 8,192 tokens.

With `--exhaustive`, the same question is put to a search without shortcuts: the CETT of 24 thresholds a layer, 3 %
apart, measured on every token; full truncated passes, thresholds read off that grid: four steps of bisection in CETT,
then eight passes evenly spaced over the 8 % around where it ended. The rise jitters by rounding (0.03 points at 8,192
tokens), so bisection alone ends anywhere within a percent or two of CETT; the exhaustive answer is read off a straight
line of log(rise) over log(CETT) through its passes near p, and has a standard error. Its answer and the tool's are
printed side by side, with the CETT of the tool's thresholds recomputed in float64 by code of its own.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, plain_pass, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.curves import CurveRecorder
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.truncation import truncated_losses


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--p", type=float, default=1.0)
    options.add_argument("--exhaustive", action="store_true")
    given = options.parse_args()
    adapter, windows = load(given)
    results: list[ns.SparsityResult] = []

    def search() -> None:
        results.append(ns.cett_ppl_sparsity(adapter, windows, p_percent=given.p))

    ratios = against_dense_pass(adapter, windows, search, given.repeats)
    result = results[-1]
    row = {
        "model": given.model,
        "corpus": windows.name,
        "n_tokens": windows.n_tokens,
        "p_percent": given.p,
        "search_F_median": float(np.median(ratios)),
        "search_F_min": min(ratios),
        "search_F_max": max(ratios),
        "forward_passes": result.cost["forward_passes"],
        "rise_percent": result.ppl_increase_percent,
        "cett": result.cett,
        "activation_ratio": result.activation_ratio,
    }
    row |= plain_pass(adapter, windows, 1)
    if given.exhaustive:
        row |= exhaustive(adapter, windows, given.p, result)
    write_row("search_exhaustive" if given.exhaustive else "search", row, save=given.save)


def exhaustive(adapter: MLPAdapter, windows: Windows, p: float, result: ns.SparsityResult) -> dict[str, float]:
    """Bisection and a scan in CETT, thresholds from a fine grid that was measured on every token."""
    steps = 1.03 ** np.arange(-12, 12)
    recorder = CurveRecorder(adapter, np.outer(result.thresholds, steps))
    dense = token_losses(adapter, windows, on_post=recorder.on_post)
    grid = recorder.curves()
    target, low, high = math.log1p(p / 100), 0.75 * result.cett, 1.33 * result.cett
    points = []

    def measure(cett: float) -> float:
        cuts = [
            float(np.exp(np.interp(math.log(cett), np.log(grid.cett[i]), np.log(grid.threshold[i]))))
            for i in range(len(grid.cett))
        ]
        losses, truncation = truncated_losses(adapter, windows, cuts)
        rise = mean_loss((losses - dense).double(), windows.scored)
        points.append((math.log(cett), math.log(rise), truncation.activation_ratio))
        print(
            f"  exhaustive: CETT {cett:.5f} rise {100 * math.expm1(rise):.4f} % ratio {points[-1][2]:.5f}", flush=True
        )
        return rise

    for _ in range(4):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    for step in np.linspace(-0.04, 0.04, 8):
        measure(math.sqrt(low * high) * math.exp(step))
    x, y, ratios = np.array([point for point in points if abs(point[0] - math.log(low * high) / 2) < 0.09]).T
    slope, offset = np.polyfit(x, y, 1)
    at = (math.log(target) - offset) / slope
    ratio_slope, ratio_offset = np.polyfit(x, ratios, 1)
    jitter = math.sqrt(float(((y - slope * x - offset) ** 2).sum()) / (len(x) - 2))
    ratio = ratio_slope * at + ratio_offset
    errors = float64_cett(adapter, windows, result.thresholds) / result.cett - 1
    return {
        "exhaustive_cett": math.exp(at),
        "exhaustive_ratio": ratio,
        "exhaustive_ratio_error": abs(ratio_slope) * jitter / slope / math.sqrt(len(x)),
        "jitter_percent": 100 * target * jitter,
        "ratio_difference": result.activation_ratio - ratio,
        "worst_layer_cett_error": float(np.abs(errors).max()),
    }


def float64_cett(adapter: MLPAdapter, windows: Windows, thresholds: list[float]) -> np.ndarray:
    """CETT of each layer by its definition, in float64, sharing no code with the package."""
    total = np.zeros(len(thresholds))

    def add(layer: int, z: torch.Tensor) -> None:
        w_out = adapter.w_out(layer).double()
        for rows in z.flatten(0, 1).double().split(512):
            tail = torch.where(rows.abs() * w_out.norm(dim=1) < thresholds[layer], rows, 0.0)
            total[layer] += float(((tail @ w_out).norm(dim=1) / (rows @ w_out).norm(dim=1)).sum())

    with torch.no_grad():
        for start in range(0, windows.n_windows, 2):
            adapter.final_residual(windows.tokens[start : start + 2].long(), add)
    return total / windows.n_tokens


if __name__ == "__main__":
    main()
