"""Cost of the CETT-PPL-p% search in F, from nothing to the verified result.

Bars: 5 F at 8,192 tokens, and 25 times faster than the paper's algorithm.

With `--paper 20`, the same question is put to the algorithm of the paper as its authors run it (arXiv:2411.02335, and
the thresholds of its published code), written anew here: 20 steps of bisection in CETT; in each, a dense pass, and in
every layer a binary search over 65,536 thresholds, evenly spaced up to the 99th percentile of the contributions, with a
clone of the activations and a matrix product a probe; then a truncated pass. Both run on the same model object, the
package's fast forward, so that only the algorithms differ. With fewer steps the cost of 20 is in proportion (each step
does the same work), and the answer is as far as the bisection has come. `--paper-skip 4` leaves out the first four, if
the tool's own answer says beyond doubt how they end.

With `--exhaustive`, it is put to a search without shortcuts: the CETT of 24 thresholds a layer, 3 % apart, measured on
every token; full truncated passes, thresholds read off that grid: four steps of bisection in CETT, then eight passes
evenly spaced over the 8 % around where it ended. The rise jitters by rounding (0.03 points at 8,192 tokens), so
bisection alone ends anywhere within a percent or two of CETT; the exhaustive answer is read off a straight line of
log(rise) over log(CETT) through its passes near p, and has a standard error. The tool's answer, its thresholds' CETT
recomputed in float64 by code of its own, and the paper's answer stand beside it.

With `--jitter`, how the rise and the KL divergence scatter around the tool's answer, in percent of it: of six passes
within 0.1 % of CETT of each other, and of twelve passes a percent apart around their line; how far the close ones lie
off that line; and the standard deviation of both over tokens, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, plain_pass, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.curves import CurveRecorder
from neuron_sparsity.divergence import DenseReference
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.truncation import truncated_losses

PAPER_STEPS = 20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--p", type=float, nargs="+", default=[1.0])
    options.add_argument("--metric", choices=("ppl", "kl"), default="ppl")
    options.add_argument("--paper", type=int, default=0, metavar="STEPS", help="20 are the whole algorithm")
    options.add_argument("--paper-skip", type=int, default=0, metavar="STEPS", help="leave these out of the 20")
    options.add_argument("--exhaustive", action="store_true")
    options.add_argument("--jitter", action="store_true")
    given = options.parse_args()
    if given.metric == "kl" and (given.paper or given.exhaustive):
        options.error("--paper and --exhaustive search by perplexity: leave out --metric kl")
    adapter, windows = load(given)
    found: list[tuple[ns.SparsityResult, ...]] = []

    def search() -> None:
        found.append(ns.cett_ppl_sparsities(adapter, windows, p_percents=given.p, metric=given.metric))

    ratios = against_dense_pass(adapter, windows, search, given.repeats)
    result = found[-1][0]
    row = {
        "model": given.model,
        "corpus": windows.name,
        "n_tokens": windows.n_tokens,
        "metric": given.metric,
        "p_percent": " ".join(f"{p:g}" for p in given.p),
        "search_F_median": float(np.median(ratios)),
        "search_F_min": min(ratios),
        "search_F_max": max(ratios),
        "forward_passes": result.cost["forward_passes"],
        "truncated_passes": len(result.evaluations) - 1,
        "rise_percent": result.ppl_increase_percent,
        "cett": result.cett,
        "activation_ratio": result.activation_ratio,
    }
    for estimate in result.estimates:
        row |= {
            f"{estimate.metric}_ratio": estimate.activation_ratio,
            f"{estimate.metric}_low": estimate.low,
            f"{estimate.metric}_high": estimate.high,
        }
    row |= plain_pass(adapter, windows, 1)
    if given.paper:
        row |= paper(adapter, windows, result, given.paper, given.paper_skip)
        row["speed_up"] = row["paper_F"] / row["search_F_median"]
    if given.exhaustive:
        row |= exhaustive(adapter, windows, given.p[0], result)
    kinds = [kind for kind in ("paper", "exhaustive") if getattr(given, kind)]
    write_row("_".join(["search", *kinds]), row, save=given.save)
    if given.jitter:
        write_row("search_jitter", jitter(adapter, windows, result), save=given.save)


def paper(adapter: MLPAdapter, windows: Windows, result: ns.SparsityResult, steps: int, skip: int) -> dict[str, float]:
    """Some steps of the paper's algorithm: cost in F, of all 20 in proportion (each does the same), and where it is."""
    answers: list[dict[str, float]] = []
    bracket = skipped(result.cett, skip)

    def work() -> None:
        answers.append(bisection(adapter, windows, result.p_percent, steps, bracket))

    ratios = against_dense_pass(adapter, windows, work, 1)
    return {"paper_steps_run": steps, "paper_skipped": skip, "paper_F": ratios[0] * PAPER_STEPS / steps} | answers[0]


def skipped(cett: float, steps: int) -> tuple[float, float]:
    """Where bisection of [0, 1] stands after some steps, if it ends at `cett`."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if cett < middle else (middle, high)
    if steps and not low + 0.2 * (high - low) < cett < high - 0.2 * (high - low):
        raise ValueError(f"{steps} steps end at {low:g} to {high:g}, too close to {cett:g} to be left out; skip fewer")
    return low, high


def bisection(
    adapter: MLPAdapter, windows: Windows, p: float, steps: int, bracket: tuple[float, float]
) -> dict[str, float]:
    """Bisection in CETT: what is dense is run dense again in every step, on all windows in one batch."""
    (low, high), target = bracket, math.log1p(p / 100)
    dense = mean_loss(token_losses(adapter, windows), windows.scored)
    rise, ratio, cett = math.nan, math.nan, math.nan
    for _ in range(steps):
        cett = (low + high) / 2
        cuts = [0.0] * adapter.info.n_layers

        def on_post(layer: int, z: torch.Tensor, cett: float = cett, cuts: list[float] = cuts) -> None:
            cuts[layer] = searched_threshold(z.flatten(0, 1), adapter.w_norms[layer], adapter.w_out(layer), cett)

        with torch.no_grad():
            adapter.final_residual(windows.tokens.long(), on_post)
        losses, truncation = truncated_losses(adapter, windows, cuts)
        rise, ratio = mean_loss(losses, windows.scored) - dense, truncation.activation_ratio
        print(f"  paper: CETT {cett:.5f} rise {100 * math.expm1(rise):.4f} % ratio {ratio:.5f}", flush=True)
        low, high = (cett, high) if rise < target else (low, cett)
    return {"paper_rise_percent": 100 * math.expm1(rise), "paper_cett": cett, "paper_ratio": ratio}


def searched_threshold(z: torch.Tensor, w_norm: torch.Tensor, w_out: torch.Tensor, cett: float) -> float:
    """The largest of 65,536 thresholds whose CETT is at most `cett`, by binary search."""
    contribution = z.abs() * w_norm
    sample = contribution.flatten()[:: max(1, contribution.numel() // 10_000_000)]
    thresholds = torch.linspace(0, float(torch.quantile(sample, 0.99)), 65_536)
    full = (z @ w_out).norm(dim=1)
    left, right = 0, len(thresholds)
    while left < right:
        middle = (left + right) // 2
        tail = z.clone()
        tail[contribution >= thresholds[middle]] = 0
        if float(((tail @ w_out).norm(dim=1) / full).mean()) > cett:
            right = middle
        else:
            left = middle + 1
    return float(thresholds[max(0, left - 1)])


class Point(NamedTuple):
    """What a truncated pass showed."""

    log_cett: float
    log_rise: float
    log_kl: float
    activation_ratio: float
    rise_token_sd: float
    kl_token_sd: float


def measurer(adapter: MLPAdapter, windows: Windows, result: ns.SparsityResult) -> Callable[[float], Point]:
    """A function that makes a truncated pass at a CETT, thresholds from a fine grid measured on every token."""
    recorder = CurveRecorder(adapter, np.outer(result.thresholds, 1.03 ** np.arange(-12, 12)))
    reference = DenseReference(adapter, windows)
    dense = token_losses(adapter, windows, on_post=recorder.on_post, on_rows=reference.remember)
    grid = recorder.curves()

    def measure(cett: float) -> Point:
        cuts = [
            float(np.exp(np.interp(math.log(cett), np.log(grid.cett[i]), np.log(grid.threshold[i]))))
            for i in range(len(grid.cett))
        ]
        comparison = reference.comparison()
        losses, truncation = truncated_losses(adapter, windows, cuts, on_rows=comparison.take)
        difference, kl = (losses - dense).double(), comparison.kl
        rise, ratio = mean_loss(difference, windows.scored), truncation.activation_ratio
        print(f"  pass: CETT {cett:.5f} rise {100 * math.expm1(rise):.4f} % ratio {ratio:.5f}", flush=True)
        sds = [float(values[windows.scored].std()) for values in (difference, kl)]
        return Point(math.log(cett), math.log(rise), math.log(mean_loss(kl, windows.scored)), ratio, *sds)

    return measure


def jitter(adapter: MLPAdapter, windows: Windows, result: ns.SparsityResult) -> dict[str, float]:
    """Scatter of rise and KL divergence in passes close to each other, and in passes a percent apart."""
    measure = measurer(adapter, windows, result)
    apart = [measure(result.cett * math.exp(step)) for step in np.linspace(-0.055, 0.055, 12)]
    close = [measure(result.cett * math.exp(step)) for step in np.linspace(-0.0005, 0.0005, 6)]
    row = {}
    for name in ("rise", "kl"):
        x, y = np.array([(point.log_cett, getattr(point, f"log_{name}")) for point in apart]).T
        slope, offset = np.polyfit(x, y, 1)
        near = np.array([getattr(point, f"log_{name}") - slope * point.log_cett - offset for point in close])
        scatter = y - slope * x - offset
        row |= {
            f"{name}_slope": slope,
            f"{name}_apart_percent": 100 * math.sqrt(float(scatter @ scatter) / (len(apart) - 2)),
            f"{name}_close_percent": 100 * float(near.std(ddof=1)),
            f"{name}_close_off_line_percent": 100 * float(near.mean()),
            f"{name}_token_sd": float(np.mean([getattr(point, f"{name}_token_sd") for point in close])),
        }
    return row


def exhaustive(adapter: MLPAdapter, windows: Windows, p: float, result: ns.SparsityResult) -> dict[str, float]:
    """Bisection and a scan in CETT, thresholds from a fine grid that was measured on every token."""
    pass_at = measurer(adapter, windows, result)
    target, low, high = math.log1p(p / 100), 0.75 * result.cett, 1.33 * result.cett
    points: list[Point] = []

    def measure(cett: float) -> float:
        points.append(pass_at(cett))
        return math.exp(points[-1].log_rise)

    for _ in range(4):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    for step in np.linspace(-0.04, 0.04, 8):
        measure(math.sqrt(low * high) * math.exp(step))
    near = [point for point in points if abs(point.log_cett - math.log(low * high) / 2) < 0.09]
    x, y, ratios = np.array([(point.log_cett, point.log_rise, point.activation_ratio) for point in near]).T
    slope, offset = np.polyfit(x, y, 1)
    at = (math.log(target) - offset) / slope
    ratio_slope, ratio_offset = np.polyfit(x, ratios, 1)
    scatter = math.sqrt(float(((y - slope * x - offset) ** 2).sum()) / (len(x) - 2))
    ratio = ratio_slope * at + ratio_offset
    errors = float64_cett(adapter, windows, result.thresholds) / result.cett - 1
    return {
        "exhaustive_cett": math.exp(at),
        "exhaustive_ratio": ratio,
        "exhaustive_ratio_error": abs(ratio_slope) * scatter / slope / math.sqrt(len(x)),
        "jitter_percent": 100 * target * scatter,
        "ratio_difference": result.activation_ratio - ratio,
        "estimate_difference": result.estimates[0].activation_ratio - ratio,
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
