"""CETT-PPL-p%: how few neurons may stay active, token by token, before perplexity rises by p percent.

The metric is that of *Sparsing Law* (arXiv:2411.02335; "PPL-p%" in its first version). The search:

1. `curves.probe_curves` on a few hundred tokens: roughly which thresholds belong to which CETT.
2. Dense and truncated passes on a quarter of the windows: roughly which CETT costs p percent. The rise of the loss
   goes like CETT to the power of about two, so at most three truncated passes are enough.
3. One dense pass over all windows: every token's loss, and exact CETT curves around that CETT.
4. Truncated passes over all windows, all layers at once. The rise jitters, so passes are made around p until the line
   through all of them tells the root to a part of the tolerance, and then at that root: one pass that happens to hit p
   may lie several percent of CETT away from it.
5. A dense pass measures every layer's CETT at the thresholds found; where one misses by more than 0.4 %, thresholds
   are interpolated anew with that point, and evaluated again.

What is returned was measured: thresholds, the rise at exactly these thresholds, the neurons active in that pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import MLPAdapter, ModelInfo, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.curves import CettCurves, CurveRecorder, ascending, measure_curves, probe_curves
from neuron_sparsity.perplexity import Progress, mean_loss, token_losses
from neuron_sparsity.search import RootEstimate, at_root, estimate_root, next_cett, spread
from neuron_sparsity.store import provenance
from neuron_sparsity.truncation import (
    TokenActivity,
    apply_thresholds,
    sparsify,
    token_activity,
    truncated_losses,
)

__all__ = [
    "LayerThreshold",
    "SparsityResult",
    "TokenActivity",
    "apply_thresholds",
    "cett_ppl_sparsity",
    "sparsify",
    "token_activity",
]

_CURVE_FACTORS = (0.5, 0.75, 0.9, 1.1, 1.3, 1.8)  # close to 1: on tiny models the CETT is then met to 0.5 %, not 2 %
_NEARER_FACTORS = (0.96, 1.04)  # measured around a CETT that is inside the curves but not in their middle
_FURTHER_FACTORS = (0.7, 1.0, 1.3)  # and around one that is outside
_FIRST_CETT = 0.05  # at p = 1 (0.04 measured on smollm2-135m); from there by the square root of p
_MAX_EVALUATIONS = 9
_MAX_SETTLING = 3  # passes at the root, until the rise of one is within the tolerance
_MIN_CETT = 1e-6
_JITTER = 0.04  # of the rise at p = 1 and 4,096 tokens, in percentage points (measured: docs/measured.md)
_ROOT_ERROR = 0.2  # standard error of the root that ends the search, in tolerances
_AT_ROOT = 0.003  # in log(CETT): a pass that close to the root stands for it
_CETT_TOLERANCE = 0.004  # of each layer's measured CETT against the common one, relative


@dataclass(frozen=True)
class LayerThreshold:
    """One layer's part of a result.

    Attributes:
        layer: Block index.
        threshold: Cut on the contribution; a neuron below it is truncated.
        cett: CETT of that cut on the dense run's activations, measured on every token.
        activation_ratio: Share of (token, neuron) pairs active in the truncated run.
        w_norm_mean: Mean norm of the layer's output weight rows: tells other weights apart.
    """

    layer: int
    threshold: float
    cett: float
    activation_ratio: float
    w_norm_mean: float


@dataclass(frozen=True)
class SparsityResult:
    """CETT-PPL-p% of a model on a corpus.

    Attributes:
        p_percent: Rise of perplexity that was asked for.
        reached: Whether some CETT in [0, 1] costs that much. If not, the numbers are those of CETT 1.
        ppl_dense: Perplexity of the model as it is.
        ppl_sparse: Perplexity at the returned thresholds, measured.
        ppl_increase_percent: `100 * (ppl_sparse / ppl_dense - 1)`: the measured rise, never the target.
        cett: The CETT common to all layers.
        activation_ratio: Mean over layers of the share of (token, neuron) pairs active in the truncated run.
        layers: Threshold, CETT and activation ratio of each layer.
        converged: Whether the measured rise is within `tolerance_percent` of p.
        tolerance_percent: In percentage points.
        evaluations: CETT 0, where only exact zeros are cut and nothing changes, then every truncated pass over all
            windows: cett, ppl, ppl_increase_percent, activation_ratio.
        curves: Every layer's measured CETT curve.
        silent_tokens: (layer, token) pairs left out of the CETT because the MLP's output is zero there.
        model: What was measured.
        corpus: On what.
        cost: `forward_passes` over the corpus, `seconds`, and `dense_passes`: seconds in units of one dense pass.
        provenance: Versions, seed, command.
    """

    p_percent: float
    reached: bool
    ppl_dense: float
    ppl_sparse: float
    ppl_increase_percent: float
    cett: float
    activation_ratio: float
    layers: tuple[LayerThreshold, ...]
    converged: bool
    tolerance_percent: float
    evaluations: tuple[dict[str, float], ...]
    curves: tuple[dict[str, Any], ...]
    silent_tokens: int
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]

    @property
    def sparsity_ratio(self) -> float:
        """One minus the activation ratio."""
        return 1.0 - self.activation_ratio

    @property
    def thresholds(self) -> list[float]:
        """The threshold of each layer."""
        return [layer.threshold for layer in self.layers]

    @property
    def name(self) -> str:
        """Such as `CETT-PPL-1%`."""
        return f"CETT-PPL-{self.p_percent:g}%"

    def to_json(self) -> dict[str, Any]:
        """Return the content of `sparsity.json`."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "metric": "cett_ppl",
            "sparsity_ratio": self.sparsity_ratio,
            "model": self.model.to_json(),
            "layers": [vars(layer) for layer in self.layers],
            "evaluations": list(self.evaluations),
            "curves": list(self.curves),
        }
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SparsityResult:
        """Read the content of `sparsity.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        keys = LayerThreshold.__dataclass_fields__
        own = {name: data[name] for name in cls.__dataclass_fields__} | {
            "model": ModelInfo.from_json(data["model"]),
            "layers": tuple(LayerThreshold(**{key: layer[key] for key in keys}) for layer in data["layers"]),
            "evaluations": tuple(data["evaluations"]),
            "curves": tuple(data["curves"]),
        }
        return cls(**own)


def cett_ppl_sparsity(
    model: Any,
    windows: Windows,
    *,
    p_percent: float = 1.0,
    tolerance_percent: float | None = None,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> SparsityResult:
    """Return CETT-PPL-p%: thresholds, activation ratio and the measured rise of perplexity (arXiv:2411.02335).

    A small step in CETT flips neurons that lie at a threshold, so the rise jitters from one CETT to the next (by about
    0.04 percentage points at 4,096 tokens). The result is a measured pass where the line through all passes puts p:
    two searches agree to about 0.001 of activation ratio at 8,192 tokens, not to the last digit.

    Args:
        model: TransformerLens model or adapter.
        windows: Calibration and evaluation text.
        p_percent: Rise of perplexity, > 0.
        tolerance_percent: How close to p the measured rise must come; 0.05 points (0.05 p below p = 1) if None.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`; `provenance` of the result says which ran.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The result; `reached=False` with the numbers at CETT 1 where no CETT costs p percent.

    Raises:
        ValueError: If `p_percent` is not a positive number, or the backend cannot run here.
        MeasurementError: If activations or losses are NaN, or memory runs out.
    """
    if not (math.isfinite(p_percent) and p_percent > 0):
        raise ValueError(f"p must be a positive number of percent, got {p_percent}")
    tolerance = 0.05 * min(1.0, p_percent) if tolerance_percent is None else tolerance_percent
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a positive number of percentage points, got {tolerance}")
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    return _Search(attach(model), windows, p_percent, tolerance, backend, options).run()


class _Search:
    """One search: the passes it has made and what they showed."""

    def __init__(
        self,
        adapter: MLPAdapter,
        windows: Windows,
        p_percent: float,
        tolerance: float,
        backend: kernels.Backend,
        options: dict[str, Any],
    ) -> None:
        self.adapter, self.windows = adapter, windows
        self.p_percent, self.tolerance = p_percent, tolerance
        self.target = math.log1p(p_percent / 100)
        self.jitter = _JITTER * min(1.0, 1 / p_percent) * math.sqrt(4096 / max(1, int(windows.scored.sum())))
        self.options, self.backend = options, backend
        self.backends = {kernels.choose(norm.device, backend).name for norm in adapter.w_norms}
        self.passes = 0.0
        self.dense_seconds_per_token = 0.0
        self.ppl_dense = math.nan
        self.evaluations: list[dict[str, Any]] = []

    def run(self) -> SparsityResult:
        start = time.perf_counter()
        probe = probe_curves(self.adapter, self.windows, backend=self.backend)
        self.passes += min(2, self.windows.n_windows) / self.windows.n_windows
        guess = self._rough_cett(probe)
        dense, curves = self._dense_pass(probe, guess)
        guess = curves.mean_cett(probe.thresholds_at(guess))  # the probe's CETT is good to a few percent
        self.ppl_dense = math.exp(mean_loss(dense, self.windows.scored))
        curves = self._bracket(dense, curves, guess)
        best, measured, curves = self._settle(dense, curves)
        seconds = time.perf_counter() - start
        return self._result(best, measured, curves, seconds)

    def _rough_cett(self, probe: CettCurves) -> float:
        """Find the CETT that costs about p percent on a quarter of the windows."""
        guess = min(0.9, _FIRST_CETT * math.sqrt(self.p_percent))
        part = self.windows.take(max(2, self.windows.n_windows // 4)) if self.windows.n_windows >= 8 else self.windows
        begin = time.perf_counter()
        dense = self._losses(part, None, "dense pass, part")
        self.dense_seconds_per_token = (time.perf_counter() - begin) / part.n_tokens
        if part is self.windows:
            return guess
        points: list[tuple[float, float]] = []
        for _ in range(3):
            losses, _ = self._truncated(part, probe.thresholds_at(guess), "rough search")
            points.append((guess, mean_loss(losses - dense, part.scored)))
            guess = next_cett(points, self.target)
            if abs(math.log(guess / points[-1][0])) < 0.15 or guess >= 1.0:
                break
        return guess

    def _dense_pass(self, probe: CettCurves, guess: float) -> tuple[Tensor, CettCurves]:
        """Measure every token's dense loss and the CETT curves around `guess`, in one pass."""
        targets = sorted({min(0.95, guess * factor) for factor in _CURVE_FACTORS})
        thresholds = ascending([probe.thresholds_at(target) for target in targets])
        recorder = CurveRecorder(self.adapter, thresholds, backend=self.backend)
        losses = self._losses(self.windows, recorder.on_post, "dense pass and CETT curves")
        return losses, recorder.curves()

    def _bracket(self, dense: Tensor, curves: CettCurves, guess: float) -> CettCurves:
        """Evaluate until the passes near p tell its place; measure more of the curves where they end."""
        cett, rebuilt = guess, False
        for _ in range(_MAX_EVALUATIONS):
            if not rebuilt and cett < 1.0 and not curves.covers(cett, around=guess):
                factors = _NEARER_FACTORS if curves.covers(cett) else _FURTHER_FACTORS
                more = ascending([curves.thresholds_at(min(0.97, cett * factor)) for factor in factors])
                curves, rebuilt = curves.joined(self._curves(more, "CETT curves, further out")), True
            rise = self._evaluate(dense, curves, cett)
            root, points = self._root(), self._points()
            if self._known(root) or (cett >= 1.0 and rise < self.p_percent):
                break
            cett = spread(root, points) if root and root.n_points > 1 else next_cett(points, self.target)
            if cett < _MIN_CETT:
                break
        for _ in range(_MAX_SETTLING):
            root = self._root()
            if root is None or (self._near() and abs(math.log(self._best()["cett"] / root.cett)) < _AT_ROOT):
                break
            self._evaluate(dense, curves, at_root(root, self._points()))
        if all(e["ppl_increase_percent"] < self.p_percent - self.tolerance and e["cett"] < 1 for e in self.evaluations):
            self._evaluate(dense, curves, 1.0)  # "not reached" is said of CETT 1 only
        return curves

    def _evaluate(self, dense: Tensor, curves: CettCurves, cett: float) -> float:
        thresholds = curves.thresholds_at(cett)
        losses, truncation = self._truncated(self.windows, thresholds, f"truncated pass, CETT {cett:.4f}")
        rise = mean_loss((losses - dense).double(), self.windows.scored)
        percent = 100 * math.expm1(min(rise, 500.0))
        self.evaluations.append(
            {
                "cett": cett,
                "rise": rise,
                "ppl": self.ppl_dense * math.exp(min(rise, 500.0)),
                "ppl_increase_percent": percent,
                "activation_ratio": truncation.activation_ratio,
                "thresholds": thresholds,
                "layers": truncation.layer_activation_ratios,
            }
        )
        return percent

    def _settle(self, dense: Tensor, curves: CettCurves) -> tuple[dict[str, Any], list[float], CettCurves]:
        """Measure each layer's CETT at the chosen thresholds; where one misses, interpolate anew, evaluate again."""
        best = self._best()
        for attempt in (0, 1):
            there = self._curves(np.array(best["thresholds"])[:, None], "CETT at the thresholds")
            measured = there.cett[:, 0]
            off = np.abs(measured / best["cett"] - 1)[curves.maximum > 0]
            if attempt == 1 or best["cett"] >= 1.0 or not off.size or off.max() <= _CETT_TOLERANCE:
                break
            curves = curves.joined(there)
            self._evaluate(dense, curves, best["cett"])
            best = self.evaluations[-1]
        return best, measured.tolist(), curves

    def _points(self) -> list[tuple[float, float]]:
        return [(e["cett"], e["rise"]) for e in self.evaluations]

    def _near(self) -> list[dict[str, Any]]:
        """The evaluations whose rise is within the tolerance."""
        return [e for e in self.evaluations if abs(e["ppl_increase_percent"] - self.p_percent) <= self.tolerance]

    def _root(self) -> RootEstimate | None:
        return estimate_root(self._points(), self.target, jitter=self.jitter)

    def _known(self, root: RootEstimate | None) -> bool:
        """Whether all passes together tell the place of p well enough."""
        return root is not None and root.error * self.p_percent <= _ROOT_ERROR * self.tolerance

    def _reached(self) -> bool:
        return any(e["ppl_increase_percent"] >= self.p_percent - self.tolerance for e in self.evaluations)

    def _best(self) -> dict[str, Any]:
        if not self._reached():
            return max(self.evaluations, key=lambda e: float(e["cett"]))
        root = self._root()
        if root is None or not self._near():
            return min(self.evaluations, key=lambda e: abs(e["ppl_increase_percent"] - self.p_percent))
        return min(self._near(), key=lambda e: abs(math.log(e["cett"] / root.cett)))

    def _result(
        self, best: dict[str, Any], measured: list[float], curves: CettCurves, seconds: float
    ) -> SparsityResult:
        dense_seconds = self.dense_seconds_per_token * self.windows.n_tokens
        layers = tuple(
            LayerThreshold(
                block,
                best["thresholds"][i],
                measured[i],
                best["layers"][i],
                float(self.adapter.w_norms[i].mean()),
            )
            for i, block in enumerate(self.adapter.info.layers)
        )
        used = " + ".join(sorted(self.backends))
        shown = ("cett", "ppl", "ppl_increase_percent", "activation_ratio")
        untouched = {
            "cett": 0.0,
            "ppl": self.ppl_dense,
            "ppl_increase_percent": 0.0,
            "activation_ratio": float(curves.nonzero_ratio.mean()),
        }
        return SparsityResult(
            p_percent=self.p_percent,
            reached=self._reached(),
            ppl_dense=self.ppl_dense,
            ppl_sparse=best["ppl"],
            ppl_increase_percent=best["ppl_increase_percent"],
            cett=float(best["cett"]),
            activation_ratio=best["activation_ratio"],
            layers=layers,
            converged=abs(best["ppl_increase_percent"] - self.p_percent) <= self.tolerance,
            tolerance_percent=self.tolerance,
            evaluations=(untouched, *({key: e[key] for key in shown} for e in self.evaluations)),
            curves=tuple(curves.to_json(self.adapter.info.layers)),
            silent_tokens=int(curves.silent_tokens.sum()),
            model=self.adapter.info,
            corpus=self.windows.describe(),
            cost={
                "forward_passes": self.passes,
                "seconds": seconds,
                "dense_passes": seconds / max(dense_seconds, 1e-9),
            },
            provenance=provenance()
            | parallel.described()
            | {"forward": self.adapter.forward, "backends": dict.fromkeys(("tail_error", "threshold_mask"), used)},
        )

    def _losses(self, windows: Windows, on_post: Any, label: str) -> Float[Tensor, "window pos"]:
        self.passes += windows.n_tokens / self.windows.n_tokens
        return token_losses(self.adapter, windows, on_post=on_post, label=label, **self.options)

    def _curves(self, thresholds: Float[np.ndarray, "layer k"], label: str) -> CettCurves:
        self.passes += 1
        return measure_curves(self.adapter, self.windows, thresholds, backend=self.backend, label=label, **self.options)

    def _truncated(self, windows: Windows, thresholds: Sequence[float], label: str) -> tuple[Tensor, Any]:
        self.passes += windows.n_tokens / self.windows.n_tokens
        return truncated_losses(self.adapter, windows, thresholds, backend=self.backend, label=label, **self.options)
