"""Cost of the CETT-PPL-p% search in F, from nothing to the verified result. Bar: 12 F at 8,192 tokens.

With `--exhaustive`, the same question is put to a search that does without every shortcut: CETT of every layer by
bisection over all contributions of all tokens (`metrics.threshold_for_cett` on the stored activations of the dense
run), and bisection in CETT over full truncated passes. It takes an hour on two cores; its answer and the tool's are
printed side by side. The rise jitters by rounding (0.03 points at 8,192 tokens), so the exhaustive answer is read off
a straight line of log(rise) over log(CETT) through its last passes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.metrics import cett
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
    if given.exhaustive:
        row |= exhaustive(adapter, windows, given.p, result)
    write_row("search_exhaustive" if given.exhaustive else "search", row, save=given.save)


def exhaustive(adapter: MLPAdapter, windows: Windows, p: float, result: ns.SparsityResult) -> dict[str, float]:
    """Bisection in CETT, each step with thresholds bisected on the dense run's stored activations."""
    stored = store_activations(adapter, windows)
    errors = [
        abs(float64_cett(stored[i], adapter.w_out(i), layer.threshold) / result.cett - 1)
        for i, layer in enumerate(result.layers)
    ]
    dense = token_losses(adapter, windows)
    target, low, high = math.log1p(p / 100), 0.01, 0.5
    points = []
    for _ in range(10):
        middle = math.sqrt(low * high)
        losses, truncation = truncated_losses(adapter, windows, bisected(adapter, stored, middle))
        rise = mean_loss((losses - dense).double(), windows.scored)
        points.append((middle, rise, truncation.activation_ratio))
        print(
            f"  exhaustive: CETT {middle:.5f} rise {100 * math.expm1(rise):.4f} % ratio {points[-1][2]:.5f}", flush=True
        )
        low, high = (middle, high) if rise < target else (low, middle)
    near = [(e, d, r) for e, d, r in points if d > 0 and abs(math.log(d / target)) < 0.5]
    x, y = np.log([e for e, _, _ in near]), np.log([d for _, d, _ in near])
    slope, offset = np.polyfit(x, y, 1)
    at = math.exp((math.log(target) - offset) / slope)
    ratio = float(np.polyval(np.polyfit(x, [r for _, _, r in near], 1), math.log(at)))
    last = points[-1]
    return {
        "exhaustive_cett": at,
        "exhaustive_ratio": ratio,
        "exhaustive_ratio_last_step": last[2],
        "ratio_difference": result.activation_ratio - ratio,
        "worst_layer_cett_error": max(errors),
    }


def float64_cett(z: torch.Tensor, w_out: torch.Tensor, threshold: float) -> float:
    """CETT by its definition, in float64, sharing no code with the package."""
    w_out, total = w_out.double(), 0.0
    for rows in z.split(512):
        rows = rows.double()
        tail = torch.where(rows.abs() * w_out.norm(dim=1) < threshold, rows, 0.0)
        total += float(((tail @ w_out).norm(dim=1) / (rows @ w_out).norm(dim=1)).sum())
    return total / len(z)


def store_activations(adapter: MLPAdapter, windows: Windows) -> list[torch.Tensor]:
    """Every layer's post-activations of the dense run, [token, neuron]: 1.5 GB for 8,192 tokens of smollm2-135m."""
    kept: list[list[torch.Tensor]] = [[] for _ in adapter.layers]
    with torch.no_grad():
        for start in range(0, windows.n_windows, 2):
            tokens = windows.tokens[start : start + 2].long()
            adapter.final_residual(tokens, lambda layer, z: kept[layer].append(z.flatten(0, 1).clone()))
    return [torch.cat(pieces) for pieces in kept]


def bisected(adapter: MLPAdapter, stored: list[torch.Tensor], target: float) -> list[float]:
    """Threshold of every layer by 22 halvings of log(threshold), CETT over all tokens each time."""
    thresholds = []
    for layer, z in enumerate(stored):
        low, high = 1e-6, float((z.abs() * adapter.w_norms[layer]).max())
        for _ in range(22):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if float(cett(z, adapter.w_out(layer), middle)) <= target else (low, middle)
        thresholds.append(float(np.float32(low)))
    return thresholds


if __name__ == "__main__":
    main()
