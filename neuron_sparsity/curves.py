"""CETT curves: for every layer, how large an error each threshold makes, and which threshold a given CETT needs.

1. `ProbeRecorder` takes the contributions of a few hundred tokens, and the CETT at 16 of their quantiles.
2. `CurveRecorder` rides on a dense pass and measures the CETT of a handful of thresholds exactly, on every token.
3. `CettCurves.thresholds_at` inverts the curve by monotone cubic interpolation in (log CETT, log threshold).

CETT: arXiv:2411.02335, Eq. 3; one threshold a layer, the same CETT for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from neuron_sparsity import kernels, parallel
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError
from neuron_sparsity.kernels.reference import contributions
from neuron_sparsity.metrics import EXACT_ZERO_THRESHOLD
from neuron_sparsity.perplexity import Progress, batches, default_batch_size, memory_advice

__all__ = ["CettCurves", "CurveRecorder", "ProbeRecorder", "ascending", "measure_curves"]

_PROBE_QUANTILES = torch.cat(
    (torch.logspace(-2, -0.5, 5), torch.linspace(0.4, 0.9, 6), 1 - torch.logspace(-1.3, -3, 5))
)

_BEYOND = 0.05  # of the way from the last measured point to the end, in the logarithm


@dataclass(frozen=True, eq=False)
class CettCurves:
    """What was measured of every layer's CETT on the dense run's activations.

    Attributes:
        threshold: Cuts on the contribution, ascending.
        cett: CETT at each.
        activation_ratio: Share of (token, neuron) pairs with `c >= threshold`.
        maximum: Largest contribution seen.
        silent_tokens: Tokens whose MLP output is exactly zero; left out of the CETT.
        n_tokens: Tokens measured.
        nonzero_ratio: Share of (token, neuron) pairs with `z` not exactly zero: the activation ratio at CETT 0.
        head: The same of the first windows alone, if they were kept apart.
    """

    threshold: Float[np.ndarray, "layer k"]
    cett: Float[np.ndarray, "layer k"]
    activation_ratio: Float[np.ndarray, "layer k"]
    maximum: Float[np.ndarray, " layer"]
    silent_tokens: Int[np.ndarray, " layer"]
    n_tokens: int
    nonzero_ratio: Float[np.ndarray, " layer"]
    head: CettCurves | None = None

    def thresholds_at(self, cett: float) -> list[float]:
        """Return the threshold of every layer for one CETT.

        Args:
            cett: Target; 0 gives the threshold that cuts only exact zeros, 1 or more the one that cuts everything.

        Returns:
            One number a layer, each exactly representable as a float32.
        """
        return [float(np.float32(self._threshold_at(layer, cett))) for layer in range(len(self.threshold))]

    def cett_at(self, thresholds: Sequence[float]) -> Float[np.ndarray, " layer"]:
        """Return each layer's CETT at a threshold of its own, interpolated; 0 where nothing was ever active."""
        found = np.zeros(len(self.threshold))
        for layer in np.flatnonzero(self.maximum > 0).tolist():
            log_cett, log_threshold = self._increasing(layer, float(self.maximum[layer]) * (1 + 1e-6))
            at = np.log(max(thresholds[layer], EXACT_ZERO_THRESHOLD))
            found[layer] = min(1.0, float(np.exp(_interpolate(log_threshold, log_cett, at))))
        return found

    def mean_cett(self, thresholds: Sequence[float]) -> float:
        """Return the geometric mean over layers of the CETT at given thresholds, one a layer, between 0 and 1."""
        found = self.cett_at(thresholds)[self.maximum > 0]
        return float(np.exp(np.log(np.maximum(found, 1e-300)).mean())) if found.size else 1.0

    def activation_ratio_at(self, cett: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Return the dense run's activation ratio, mean over layers, at one CETT common to all; any number of CETTs.

        Linear in log CETT between the points measured, and up to CETT 1, where nothing is active.
        """
        cett = np.asarray(cett, dtype=np.float64)
        at, total = np.log(np.maximum(cett, 1e-12)), np.zeros(cett.shape)
        for layer, highest in enumerate(self.nonzero_ratio.tolist()):
            inside = np.flatnonzero((self.cett[layer] > 0) & (self.cett[layer] < 1))
            inside = inside[np.argsort(self.cett[layer][inside], kind="stable")]
            x = np.append(np.log(self.cett[layer][inside]), 0.0)
            y = np.append(self.activation_ratio[layer][inside], 0.0)
            if len(x) > 2 and x[1] - x[0] > 1e-9:  # below the first point: on along the first two
                below = y[0] + (y[1] - y[0]) / (x[1] - x[0]) * (at - x[0])
            else:
                below = np.full(at.shape, y[0])
            total += np.minimum(highest, np.where(at < x[0], below, np.interp(at, x, y)))
        return total / len(self.threshold)

    def covers(self, cett: float) -> bool:
        """Return whether every layer was measured below and above a CETT, or at most 6 % from it."""
        near, live = np.array([cett * 1.06, cett / 1.06]), self.maximum > 0
        return bool(((self.cett.min(axis=1) <= near[0]) & (self.cett.max(axis=1) >= near[1]))[live].all())

    def _threshold_at(self, layer: int, cett: float) -> float:
        maximum = np.float32(self.maximum[layer])
        if cett <= 0 or maximum <= 0:
            return EXACT_ZERO_THRESHOLD
        if cett >= 1:
            return float(np.finfo(np.float32).max)  # also cuts what grows beyond the dense run once layers before go
        above = float(np.nextafter(maximum, np.float32(np.inf)))
        log_cett, log_threshold = self._increasing(layer, above)
        return float(np.clip(np.exp(_interpolate(log_cett, log_threshold, np.log(cett))), EXACT_ZERO_THRESHOLD, above))

    def _increasing(self, layer: int, above: float) -> tuple[np.ndarray, np.ndarray]:
        """The layer's points as (log CETT, log threshold), both strictly increasing, up to (1, everything cut)."""
        pairs = [*sorted(zip(self.threshold[layer], self.cett[layer], strict=True)), (above, 1.0)]
        kept: list[tuple[float, float]] = []
        for threshold, cett in pairs:
            if cett > 0 and threshold > 0 and (not kept or (cett > kept[-1][0] and threshold > kept[-1][1])):
                kept.append((cett, threshold))
        points = np.log(np.array(kept, dtype=np.float64))
        return points[:, 0], points[:, 1]

    def to_json(self, blocks: Sequence[int]) -> list[dict[str, Any]]:
        """Return one object a layer: its thresholds, CETT and activation ratio."""
        return [
            {
                "layer": int(block),
                "threshold": [float(t) for t in self.threshold[layer]],
                "cett": [float(e) for e in self.cett[layer]],
                "activation_ratio": [float(r) for r in self.activation_ratio[layer]],
            }
            for layer, block in enumerate(blocks)
        ]

    def joined(self, other: CettCurves) -> CettCurves:
        """Return both curves' points as one; they must be of the same tokens."""
        order = np.argsort(np.concatenate((self.threshold, other.threshold), axis=1), axis=1, kind="stable")

        def both(name: str) -> np.ndarray:
            values = np.concatenate((getattr(self, name), getattr(other, name)), axis=1)
            return np.take_along_axis(values, order, axis=1)

        return CettCurves(
            threshold=both("threshold"),
            cett=both("cett"),
            activation_ratio=both("activation_ratio"),
            maximum=np.maximum(self.maximum, other.maximum),
            silent_tokens=self.silent_tokens,
            n_tokens=self.n_tokens,
            nonzero_ratio=self.nonzero_ratio,
            head=_joined_heads(self.head, other.head),
        )


class CurveRecorder:
    """Sums up CETT and activation ratio at given thresholds while a dense pass runs: `on_post` is its hook.

    Args:
        adapter: The model.
        thresholds: Cuts on the contribution, ascending in each layer.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        head_tokens: Once that many tokens are measured, the curves so far are kept apart: `head` of what comes out.

    Raises:
        ValueError: If a threshold is negative or NaN, or the backend cannot run here.
    """

    def __init__(
        self,
        adapter: MLPAdapter,
        thresholds: Float[np.ndarray, "layer k"],
        *,
        backend: kernels.Backend = "auto",
        head_tokens: int = 0,
    ) -> None:
        if not (thresholds >= 0).all():
            raise ValueError("thresholds must be >= 0 and not NaN")
        n_cuts = thresholds.shape[1]
        self.adapter, self.backend = adapter, backend
        self.thresholds = thresholds.astype(np.float32)
        self.n_tokens, self.head_tokens = 0, head_tokens
        self._head: dict[str, Tensor] | None = None
        devices = [norm.device for norm in adapter.w_norms]
        for device in devices:
            kernels.choose(device, backend)  # refuse a backend that cannot run before anything runs
        # One sum a layer, where the layer is: nothing waits for a GPU before the pass is over.
        self._sums = [_Sums.zeros(n_cuts, device) for device in devices]

    def on_post(self, layer: int, z: Float[Tensor, "batch pos neuron"]) -> None:
        """Add a batch of one layer's post-activations."""
        flat = rearrange(z, "... neuron -> (...) neuron")
        w_norm, sums = self.adapter.w_norms[layer], self._sums[layer]
        cuts = torch.from_numpy(self.thresholds[layer])
        error, active, full = kernels.tail_error(flat, w_norm, self.adapter.w_out(layer), cuts, backend=self.backend)
        sums.output += full.double().sum()  # NaN and infinity stay, and show in `curves`
        sums.error += torch.where(full == 0, 0.0, error / full).double().sum(dim=1)
        sums.active += active
        sums.heard += (full != 0).sum()
        sums.nonzero += flat.count_nonzero()
        largest = torch.maximum(flat.amax(dim=0), -flat.amin(dim=0)).float() * w_norm
        sums.maximum.copy_(torch.maximum(sums.maximum, largest.max()))
        self.n_tokens += len(flat) if layer == 0 else 0
        if self._head is None and layer == len(self._sums) - 1 and 0 < self.head_tokens <= self.n_tokens:
            self._head = self._seen()

    def curves(self) -> CettCurves:
        """Return what was measured so far, by all ranks. A layer that never put out anything has CETT 0 everywhere.

        Raises:
            MeasurementError: If a layer's post-activations were NaN or infinite.
        """
        head = None
        if parallel.everyones("the first batches are apart", self._head is not None)[0]:  # rank 0 has the first
            head = self._curves(parallel.first(self._head or self._seen()))
        return self._curves(parallel.total(self._seen(), maxima=("maximum", "thresholds")), head)

    def _seen(self) -> dict[str, Tensor]:
        """Return the sums of this rank, on the CPU."""
        own = {name: torch.stack([getattr(sums, name).cpu() for sums in self._sums]) for name in _Sums.__annotations__}
        return own | {"tokens": torch.tensor(self.n_tokens), "thresholds": torch.from_numpy(self.thresholds.copy())}

    def _curves(self, total: dict[str, Tensor], head: CettCurves | None = None) -> CettCurves:
        n_tokens = int(total["tokens"])
        broken = (~torch.isfinite(total["output"])).nonzero()
        if len(broken):
            raise MeasurementError(
                f"layer {self.adapter.info.layers[int(broken[0])]}: post-activations are NaN or infinite; check the "
                "weights, or use --dtype float32"
            )
        pairs = max(1, n_tokens * self.adapter.info.d_mlp)
        return CettCurves(
            threshold=total["thresholds"].numpy().astype(np.float64),
            cett=(total["error"] / total["heard"].clamp_min(1)[:, None]).numpy(),
            activation_ratio=(total["active"].double() / pairs).numpy(),
            maximum=total["maximum"].numpy().astype(np.float64),
            silent_tokens=(n_tokens - total["heard"]).numpy(),
            n_tokens=n_tokens,
            nonzero_ratio=(total["nonzero"].double() / pairs).numpy(),
            head=head,
        )


@dataclass
class _Sums:
    """What one layer has shown so far."""

    output: Tensor
    error: Tensor
    active: Tensor
    heard: Tensor
    nonzero: Tensor
    maximum: Tensor

    @classmethod
    def zeros(cls, n_cuts: int, device: torch.device) -> _Sums:
        return cls(
            output=torch.zeros((), dtype=torch.float64, device=device),
            error=torch.zeros(n_cuts, dtype=torch.float64, device=device),
            active=torch.zeros(n_cuts, dtype=torch.int64, device=device),
            heard=torch.zeros((), dtype=torch.int64, device=device),
            nonzero=torch.zeros((), dtype=torch.int64, device=device),
            maximum=torch.zeros((), device=device),
        )


def ascending(rows: Sequence[Sequence[float]]) -> Float[np.ndarray, "layer k"]:
    """Return rows of one threshold a layer as ascending thresholds of each layer."""
    return np.sort(np.array(rows, dtype=np.float64).T, axis=1)


class ProbeRecorder(CurveRecorder):
    """Coarse curves over the whole range of thresholds, from a few hundred of the tokens that pass.

    The first batch's contributions give the thresholds of each layer. Good to a few percent of the CETT: enough to
    place the thresholds that a full pass then measures.

    Args:
        adapter: The model.
        stride: Which tokens: every `stride`-th.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
    """

    def __init__(self, adapter: MLPAdapter, stride: int, *, backend: kernels.Backend = "auto") -> None:
        super().__init__(adapter, np.ones((adapter.info.n_layers, len(_PROBE_QUANTILES))), backend=backend)
        self.stride = stride
        self._placed = [False] * adapter.info.n_layers

    def on_post(self, layer: int, z: Float[Tensor, "batch pos neuron"]) -> None:
        """Add a batch of one layer's post-activations."""
        rows = rearrange(z, "batch pos neuron -> (batch pos) neuron")[:: self.stride]
        if not self._placed[layer]:
            c = contributions(rows, self.adapter.w_norms[layer]).flatten()
            positive = c[c > 0].sort().values
            if not torch.isfinite(c.sum()):
                block = self.adapter.info.layers[layer]
                raise MeasurementError(f"layer {block}: post-activations are NaN or infinite; check the weights")
            if len(positive):
                at = (_PROBE_QUANTILES * (len(positive) - 1)).long().to(c.device)
                self.thresholds[layer] = positive[at].cpu().numpy()
            self._placed[layer] = True
        super().on_post(layer, rows[None])


def measure_curves(
    adapter: MLPAdapter,
    windows: Windows,
    thresholds: Float[np.ndarray, "layer k"],
    *,
    head_tokens: int = 0,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    label: str = "CETT curves",
) -> CettCurves:
    """Return the CETT of given thresholds on every token: one dense pass without unembedding.

    Args:
        adapter: The model.
        windows: The corpus.
        thresholds: Cuts on the contribution, ascending in each layer.
        head_tokens: Keep the curves of the first batches, of that many tokens at least, apart.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.
        label: What the progress says.
    """
    recorder = CurveRecorder(adapter, thresholds, backend=backend, head_tokens=head_tokens)
    if batch_size is None:
        batch_size = default_batch_size(adapter, windows.window)
    batch_size = min(parallel.everyones("batch size", batch_size))
    mine = parallel.share(windows.n_windows, batch_size)
    with torch.no_grad():
        for _, tokens in batches(windows, batch_size, progress, label, mine.start, mine.stop):
            with memory_advice(len(tokens), windows.window):
                adapter.final_residual(tokens, recorder.on_post)
    return recorder.curves()


def _joined_heads(first: CettCurves | None, second: CettCurves | None) -> CettCurves | None:
    """Both as one if they are of the same windows: batches of another size end elsewhere."""
    if first is None or second is None or first.n_tokens != second.n_tokens:
        return None
    return first.joined(second)


def _interpolate(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Monotone cubic between the measured points; beyond them on along the nearest two, for a while.

    The last point is no measured one but the end, where everything is cut: far away, and no guide to the slope before
    it. The line along the last two measured points goes on for `_BEYOND`, and from there straight to the end.
    """
    if len(x) == 1:
        return float(y[0] + (at - x[0]))
    if at < x[0]:
        return float(y[0] + (at - x[0]) * (y[1] - y[0]) / (x[1] - x[0]))
    x_end, y_end, x, y = x[-1], y[-1], x[:-1], y[:-1]
    if len(x) > 1:
        if at <= x[-1]:
            return float(PchipInterpolator(x, y)(at))
        slope, step = (y[-1] - y[-2]) / (x[-1] - x[-2]), _BEYOND * (x_end - x[-1])
        further = (x[-1] + step, y[-1] + slope * step)
        if further[1] < y_end:
            x, y = (np.append(axis, value) for axis, value in zip((x, y), further, strict=True))
    return float(np.interp(at, np.append(x, x_end), np.append(y, y_end)))
