"""The passes of a CETT search over one corpus, and what each of them showed.

    rough    a few windows: dense once, then truncated until the mean KL divergence tells roughly which CETT is wanted
    dense    all windows once: every token's loss, what KL divergences need, and exact CETT curves around that place
    truncate all windows, all layers truncated at once: rise of the loss, KL divergence, neurons active, by window
    check    the CETT of chosen thresholds, measured

The mean KL divergence from the dense to the truncated model goes like CETT to the power of about two, and jitters a
sixth as much as the rise of the loss: a thousand tokens place the search (docs/method.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.curves import CettCurves, CurveRecorder, ProbeRecorder, ascending, measure_curves
from neuron_sparsity.divergence import DenseReference
from neuron_sparsity.perplexity import Progress, default_batch_size, mean_loss, token_losses
from neuron_sparsity.search import next_cett
from neuron_sparsity.truncation import truncated_losses

__all__ = ["KL_SLOPE", "Evaluation", "Evaluator"]

KL_SLOPE = 2.1  # of log(KL) over log(CETT), measured on smollm2-135m (docs/measured.md)
_ROUGH_TOKENS = (1024, 8192)  # at least, if there are as many; at most; an eighth of the corpus between
_ROUGH_PASSES = 4  # for one p
_ROUGH_STEP = 0.12  # in log(CETT): a step that small ends the rough search
_PROBE_ROWS = 256
_CURVE_FACTORS = (0.8, 1.0, 1.25)  # of the rough CETT: between them interpolation is exact enough (docs/measured.md)
_CURVE_FACTORS_LOW = (0.82, 1.16)  # of a rough CETT below `_LOW`: there a line is, within 0.4 % (docs/measured.md)
_LOW = 0.08
_CURVE_FACTORS_NEXT = (0.88, 1.14)  # of the rough CETT of a further p: passes at the first one place it closely
_FURTHER_FACTORS = (0.8, 1.0, 1.25)  # around a CETT that turns out to lie outside
_CHECKED_WHOLE = 4096  # tokens: up to here a CETT is checked on all of them, beyond on the first batches
_HEAD_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One truncated pass over all windows.

    Attributes:
        cett: The common CETT that was asked for.
        thresholds: One a layer.
        rise: Sum over the scored positions of each window of the loss, truncated minus dense, in nats.
        kl: The same of KL(dense || truncated).
        scored: Scored positions of each window.
        window_activation: Share of (token, neuron) pairs active in each window.
        layer_activation: Share of (token, neuron) pairs active in each layer.
    """

    cett: float
    thresholds: list[float]
    rise: Float[np.ndarray, " window"]
    kl: Float[np.ndarray, " window"]
    scored: Int[np.ndarray, " window"]
    window_activation: Float[np.ndarray, " window"]
    layer_activation: list[float]

    @property
    def activation_ratio(self) -> float:
        """Mean of the layers' activation ratios."""
        return sum(self.layer_activation) / len(self.layer_activation)

    def mean(self, metric: str) -> float:
        """Return the mean rise of the loss (`"ppl"`) or the mean KL divergence (`"kl"`), in nats a token."""
        return float((self.rise if metric == "ppl" else self.kl).sum() / self.scored.sum())

    def percent(self, metric: str) -> float:
        """Return the rise of perplexity in percent, or what the KL divergence would be as one."""
        return 100 * math.expm1(min(self.mean(metric), 500.0))


class Evaluator:
    """Makes the passes, and counts them.

    Args:
        adapter: The model.
        windows: Text that losses, KL divergences and activation ratios are taken on.
        calibration: Text that CETT curves are taken on; the same if None.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Attributes:
        passes: Forward passes so far, in passes over `windows`.
        dense_seconds: What the dense pass over `windows` took, with what it measures.
        nonzero_ratio: Share of (token, neuron) pairs of `windows` that are not exactly zero in the dense run.
        loss: Mean dense loss in nats.
        curves: CETT curves on the calibration text.
        evaluations: Every truncated pass over all windows.
        checked_tokens: Tokens that the last `check` measured on.
    """

    def __init__(
        self,
        adapter: MLPAdapter,
        windows: Windows,
        *,
        calibration: Windows | None = None,
        backend: kernels.Backend = "auto",
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.adapter, self.windows = adapter, windows
        self.calibration = windows if calibration is None else calibration
        self.backend = backend
        self.backends = {kernels.choose(norm.device, backend).name for norm in adapter.w_norms}
        self.passes, self.dense_seconds, self.loss, self.nonzero_ratio = 0.0, math.nan, math.nan, math.nan
        self.curves: CettCurves
        self.evaluations: list[Evaluation] = []
        self.checked_tokens = 0
        self._options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        if batch_size is None:
            batch_size = default_batch_size(adapter, windows.window)
        # One for all passes: a rank compares a truncated pass with what its own dense pass left behind.
        self._paired = self._options | {"batch_size": min(parallel.everyones("batch size", batch_size))}
        self._dense: Tensor
        self._reference: DenseReference
        self._probe: CettCurves
        self._checked: tuple[list[list[float]], CettCurves] | None = None  # of the last `check`, if on all text
        self._refined: list[list[float]] = []  # thresholds that `refine` has taken into the curves

    def rough(self, targets: Sequence[float], first: Sequence[float]) -> list[float]:
        """Return roughly the CETT at which the mean KL divergence is each target, from an eighth of the windows.

        Args:
            targets: In nats, ascending.
            first: Where to look first, one for each.
        """
        with parallel.alike():  # a few windows: all ranks run on all of them
            return self._all_rough(self._part(), targets, first)

    def probe(self) -> None:
        """Take rough curves on an eighth of the windows, for `dense` around CETTs that are known already."""
        with parallel.alike():
            self._probed(self._part())

    def _probed(self, part: Windows) -> DenseReference:
        reference = DenseReference(self.adapter, part)
        probe = ProbeRecorder(self.adapter, max(1, part.n_tokens // _PROBE_ROWS), backend=self.backend)
        self._losses(part, "dense pass, part", on_post=probe.on_post, on_rows=reference.remember)
        self._probe = probe.curves()
        return reference

    def _all_rough(self, part: Windows, targets: Sequence[float], first: Sequence[float]) -> list[float]:
        reference = self._probed(part)
        points: list[tuple[float, float]] = []
        found = [self._rough(part, reference, *goal, points) for goal in zip(targets, first, strict=True)]
        # How the first goes on to the others, a thousand tokens tell no better than the usual slope: half of each.
        usual = [min(1.0, found[0] * (target / targets[0]) ** (1 / KL_SLOPE)) for target in targets]
        return [math.sqrt(own * other) for own, other in zip(found, usual, strict=True)]

    def _rough(
        self, part: Windows, reference: DenseReference, target: float, first: float, points: list[tuple[float, float]]
    ) -> float:
        cett = next_cett(points, target, prior_slope=KL_SLOPE) if points else first
        for _ in range(_ROUGH_PASSES):
            comparison = reference.comparison()
            self._truncated(part, self._probe.thresholds_at(cett), "rough search", on_rows=comparison.take)
            comparison.pool()
            points.append((cett, mean_loss(comparison.kl, part.scored)))
            cett = next_cett(points, target, prior_slope=KL_SLOPE)
            if abs(math.log(cett / points[-1][0])) < _ROUGH_STEP or cett >= 1.0:
                break
        return cett

    def dense(self, guesses: Sequence[float]) -> list[float]:
        """Run the dense pass, with CETT curves around rough CETTs; return the exact curves' word for each of them.

        Args:
            guesses: Ascending.
        """
        factors = [_CURVE_FACTORS_LOW if guesses[0] < _LOW else _CURVE_FACTORS]
        factors += [_CURVE_FACTORS_NEXT] * (len(guesses) - 1)
        wanted = sorted(min(0.95, g * factor) for g, some in zip(guesses, factors, strict=True) for factor in some)
        apart: list[float] = []
        for cett in wanted:
            if not apart or cett > 1.03 * apart[-1]:
                apart.append(cett)
        thresholds = ascending([self._probe.thresholds_at(cett) for cett in apart])
        self._reference = DenseReference(self.adapter, self.windows)
        options: dict[str, Any] = {"on_rows": self._reference.remember}
        start = time.perf_counter()
        if self.calibration is self.windows:
            head = 0 if self.windows.n_tokens <= _CHECKED_WHOLE else _HEAD_TOKENS
            recorder = CurveRecorder(self.adapter, thresholds, backend=self.backend, head_tokens=head)
            self._dense = self._losses(self.windows, "dense pass, CETT curves", on_post=recorder.on_post, **options)
            self.dense_seconds = time.perf_counter() - start
            self.curves = recorder.curves()
            self.nonzero_ratio = float(self.curves.nonzero_ratio.mean())
        else:
            nonzero = torch.zeros(self.adapter.info.n_layers, dtype=torch.int64)

            def count(layer: int, z: Tensor) -> None:
                nonzero[layer] += z.count_nonzero().cpu()

            self._dense = self._losses(self.windows, "dense pass", on_post=count, **options)
            self.dense_seconds = time.perf_counter() - start
            pairs = nonzero.numel() * self.windows.n_tokens * self.adapter.info.d_mlp
            self.nonzero_ratio = float(parallel.total({"nonzero": nonzero})["nonzero"].sum()) / pairs
            self.curves = self._measure(thresholds, "CETT curves, calibration text")
        self.loss = mean_loss(self._dense, self.windows.scored)
        return [self.curves.mean_cett(self._probe.thresholds_at(guess)) for guess in guesses]

    def extend(self, cett: float) -> None:
        """Measure more of the curves around a CETT that lies outside: one pass."""
        more = ascending([self.curves.thresholds_at(min(0.97, cett * factor)) for factor in _FURTHER_FACTORS])
        self.curves = self.curves.joined(self._measure(more, "CETT curves, further out"))

    def truncate(self, cett: float) -> Evaluation:
        """Run all windows truncated at a common CETT."""
        thresholds = self.curves.thresholds_at(cett)
        comparison = self._reference.comparison()
        losses, truncation = self._truncated(
            self.windows, thresholds, f"truncated pass, CETT {cett:.4f}", on_rows=comparison.take
        )
        comparison.pool()
        for values in (losses, comparison.kl):
            mean_loss(values, self.windows.scored)  # NaN and infinity are refused here
        difference = (losses - self._dense).double()
        made = Evaluation(
            cett,
            thresholds,
            difference.sum(dim=1).numpy(),
            comparison.kl.double().sum(dim=1).numpy(),
            self.windows.scored.sum(dim=1).numpy(),
            truncation.window_activation_ratios.numpy(),
            truncation.layer_activation_ratios,
        )
        self.evaluations.append(made)
        return made

    def check(self, *thresholds: Sequence[float]) -> list[Float[np.ndarray, " layer"]]:
        """Return each layer's CETT at some thresholds, one pass for all: on all calibration text if it is short.

        On longer text the exact curves are interpolated, and the result is corrected, layer by layer, by how far
        interpolation is off on the first batches, where the thresholds are measured.
        """
        cuts, head = np.array(thresholds).T, self.curves.head
        order = np.argsort(cuts, axis=1, kind="stable")
        back = np.argsort(order, axis=1, kind="stable")
        cuts = np.take_along_axis(cuts, order, axis=1)
        if head is not None and not self.calibration.scored[: head.n_tokens // self.calibration.window].any():
            head = None  # windows without a scored position are no text of their own
        self.checked_tokens = (self.curves if head is None else head).n_tokens
        if head is None:
            measured = self._measure(cuts, "CETT at the thresholds")
            self._checked = ([list(some) for some in thresholds], measured)
            return list(np.take_along_axis(measured.cett, back, axis=1).T)
        self._checked = None
        n_windows = head.n_tokens // self.calibration.window
        of_head = self._measure(cuts, "CETT at the thresholds", n_windows).cett
        found = []
        for some, cett in zip(thresholds, np.take_along_axis(of_head, back, axis=1).T, strict=True):
            expected = head.cett_at(some)
            correction = np.where(expected > 0, cett / np.maximum(expected, 1e-30), 1.0)
            found.append(self.curves.cett_at(some) * correction)
        return found

    def refine(self, thresholds: Sequence[float]) -> None:
        """Take the CETT of thresholds on all calibration text into the curves: one pass, if `check` made none."""
        wanted = list(thresholds)
        if wanted in self._refined:
            return
        points, there = self._checked or ([], None)
        if there is None or wanted not in points:
            points, there = [wanted], self._measure(np.array(wanted)[:, None], "CETT at the thresholds")
        self.curves, self._checked = self.curves.joined(there), None
        self._refined += points

    def _part(self) -> Windows:
        n, (least, most) = self.windows.n_windows, (math.ceil(size / self.windows.window) for size in _ROUGH_TOKENS)
        heard = self.windows.scored.any(dim=1).nonzero()[:, 0].tolist()  # the others tell nothing
        text = self.windows if len(heard) == n else self.windows._pick(heard, self.windows.name)
        return text.take(min(text.n_windows, max(least, min(most, n // 8))))

    def _losses(self, windows: Windows, label: str, **hooks: Any) -> Float[Tensor, "window pos"]:
        self.passes += windows.n_tokens / self.windows.n_tokens
        return token_losses(self.adapter, windows, label=label, **hooks, **self._paired)

    def _measure(self, cuts: Float[np.ndarray, "layer k"], label: str, n_windows: int | None = None) -> CettCurves:
        text = self.calibration if n_windows is None else self.calibration.take(n_windows, spread=False)
        head = 0 if n_windows or text.n_tokens <= _CHECKED_WHOLE else _HEAD_TOKENS
        self.passes += text.n_tokens / self.windows.n_tokens
        return measure_curves(
            self.adapter, text, cuts, head_tokens=head, backend=self.backend, label=label, **self._options
        )

    def _truncated(self, windows: Windows, thresholds: Sequence[float], label: str, **hooks: Any) -> tuple[Tensor, Any]:
        self.passes += windows.n_tokens / self.windows.n_tokens
        return truncated_losses(
            self.adapter, windows, thresholds, backend=self.backend, label=label, **hooks, **self._paired
        )
