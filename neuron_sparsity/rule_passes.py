"""Passes of a model under rules, all by one and the same loss code, each made once and kept in the run folder.

dense    an eighth of the windows, for rough CETT curves; then all: every token's loss, what KL divergences need,
         how scores are spread, exact CETT curves
measure  all windows, all layers cut at once by one rule: rise of the loss, KL divergence, neurons active, by window
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.activation import ActivationReader
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.curves import CurveRecorder, ProbeRecorder, ascending
from neuron_sparsity.divergence import DenseReference
from neuron_sparsity.kernels.reference import contributions
from neuron_sparsity.perplexity import Progress, default_batch_size, mean_loss, token_losses
from neuron_sparsity.rules import Cut, DenseScores, Score, ScoreHistogram, topp_counts
from neuron_sparsity.store import blaming, read_json, write_json

__all__ = ["PASSES", "RulePass", "RulePasses"]

PASSES = "pareto-passes.json"
"""File of a run folder that keeps every pass: an interrupted measurement goes on from it, and so does a further one."""

_CETTS = np.geomspace(0.004, 0.9, 14)  # exact curves at these; 1.5 apart, between them interpolation is good to 1 %
_SAMPLE = 256  # tokens that Top-p's shares are told from, about
_MIN_PART = 1024


@dataclass(frozen=True, eq=False)
class RulePass:
    """One pass over all windows under a rule.

    Attributes:
        rise: Sum over the scored positions of each window of the loss, cut minus dense, in nats.
        kl: The same of KL(dense || cut).
        scored: Scored positions of each window.
        active: Share of (token, neuron) pairs active in each window, all layers.
    """

    rise: Float[np.ndarray, " window"]
    kl: Float[np.ndarray, " window"]
    scored: Int[np.ndarray, " window"]
    active: Float[np.ndarray, " window"]

    @property
    def activation_ratio(self) -> float:
        """Share of (token, neuron) pairs active: layers are equally wide, so it is their mean."""
        return float(self.active.mean())

    def mean(self, metric: str) -> float:
        """Return the mean rise of the loss (`"ppl"`) or the mean KL divergence (`"kl"`), in nats a token."""
        return float((self.rise if metric == "ppl" else self.kl).sum() / self.scored.sum())


class RulePasses:
    """Makes the passes, keeps them and counts them.

    Args:
        adapter: The model.
        windows: Text that everything is measured on.
        scores: Which scores the rules need; `"s"` asks for the activation function's own output.
        folder: Run folder to keep passes in, and to take up those that are there for this model and text.
        backend: Of the kernels.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Attributes:
        forward_passes: Made by this object, in passes over `windows`.
        taken_up: Passes that the folder had and were not made again.
        loss: Mean dense loss in nats, once `dense` has run.

    Raises:
        ModelError: If `scores` holds `"s"` and it cannot be had.
        RunFolderError: If the file of passes is damaged.
    """

    def __init__(
        self,
        adapter: MLPAdapter,
        windows: Windows,
        scores: Sequence[Score],
        *,
        folder: Path | None = None,
        backend: kernels.Backend = "auto",
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.reader = ActivationReader(adapter) if "s" in scores else None
        self.adapter = adapter if self.reader is None else self.reader.adapter
        self.windows, self.scores, self.backend = windows, tuple(scores), backend
        self.backends = sorted({kernels.choose(norm.device, backend).name for norm in adapter.w_norms})
        self.forward_passes, self.taken_up, self.loss = 0.0, 0, math.nan
        batch_size = batch_size or default_batch_size(adapter, windows.window)
        self._options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        self._file = None if folder is None else folder / PASSES
        self._kept: dict[str, dict[str, list[float]]] = {}
        self._made: dict[tuple[object, ...], RulePass] = {}
        self._dense: Tensor
        self._reference: DenseReference
        self._scored = windows.scored.sum(dim=1).numpy()

    def dense(self) -> DenseScores:
        """Run the dense model: what rules need of it, and what later passes are compared with."""
        text = self.windows
        n_part = min(text.n_windows, max(math.ceil(_MIN_PART / text.window), text.n_windows // 8))
        part = text.take(n_part)
        probe = ProbeRecorder(self.adapter, max(1, part.n_tokens // _SAMPLE), backend=self.backend)
        self._losses(part, "dense pass, part", probe.on_post)
        rough = probe.curves()
        thresholds = ascending([rough.thresholds_at(cett) for cett in _CETTS])
        recorder = _DenseRecorder(self, CurveRecorder(self.adapter, thresholds, backend=self.backend))
        self._reference = DenseReference(self.adapter, text)
        with recorder.reading():
            self._dense = self._losses(text, "dense pass, scores", recorder.on_post, on_rows=self._reference.remember)
        self.loss = mean_loss(self._dense, text.scored)
        silent = np.zeros(text.n_windows)
        self.untouched = RulePass(silent, silent, self._scored, recorder.active())
        self._take_up()
        return recorder.scores()

    def measure(self, cut: Cut, label: str) -> RulePass:
        """Run all windows with every layer cut, unless this or an equal cut was measured already.

        Raises:
            MeasurementError: If losses or divergences are not finite.
        """
        if cut.key in self._made:
            return self._made[cut.key]
        name = hashlib.sha256(repr(cut.key).encode()).hexdigest()[:24]
        if name in self._kept:
            found = {key: np.array(values) for key, values in self._kept[name].items()}
            self._made[cut.key] = RulePass(scored=self._scored, **found)
            self.taken_up += 1
            return self._made[cut.key]
        active = _Active(self)
        comparison = self._reference.comparison()

        def on_post(layer: int, z: Tensor) -> Tensor:
            flat = rearrange(z, "batch pos neuron -> (batch pos) neuron")
            s = flat if self.reader is None else rearrange(self.reader.of(layer, z), "b p neuron -> (b p) neuron")
            kept, n_active = cut(layer, flat, s, self.adapter.w_norms[layer])
            active.add(layer, n_active.view(z.shape[:-1]))
            return kept.view(z.shape)

        with self._reading():
            losses = self._losses(self.windows, label, on_post, on_rows=comparison.take)
        for values in (losses, comparison.kl):
            mean_loss(values, self.windows.scored)  # NaN and infinity are refused here
        made = RulePass(
            (losses - self._dense).double().sum(dim=1).numpy(),
            comparison.kl.double().sum(dim=1).numpy(),
            self._scored,
            active.ratios(),
        )
        self._made[cut.key] = made
        self._keep(name, made)
        return made

    @property
    def n_cuts(self) -> int:
        """Different cuts that were measured."""
        return len(self._made)

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self.reader is None else self.reader.reading()

    def _losses(self, windows: Windows, label: str, on_post: Any, **hooks: Any) -> Float[Tensor, "window pos"]:
        self.forward_passes += windows.n_tokens / self.windows.n_tokens
        return token_losses(self.adapter, windows, label=label, on_post=on_post, **hooks, **self._options)

    def _question(self) -> dict[str, Any]:
        info = self.adapter.info
        model = {"name": info.name, "fingerprint": info.fingerprint, "dtype": info.dtype}
        return {"model": model, "corpus": self.windows.sha256, "loss": self.loss}

    def _take_up(self) -> None:
        """Read the passes that the folder keeps, if they are of this model, text and dense loss to the last bit."""
        if self._file is None or not self._file.is_file():
            return
        data = read_json(self._file)
        if {key: data.get(key) for key in self._question()} == self._question():
            self._kept = _checked(self._file, data, self.windows.n_windows)

    def _keep(self, name: str, made: RulePass) -> None:
        if self._file is None:
            return
        self._kept[name] = {key: getattr(made, key).tolist() for key in ("rise", "kl", "active")}
        write_json(self._file, self._question() | {"passes": self._kept})


class _Active:
    """Active pairs of each window."""

    def __init__(self, passes: RulePasses) -> None:
        info = passes.adapter.info
        self._pairs = passes.windows.window * info.d_mlp * info.n_layers
        self._batches: list[Tensor] = []

    def add(self, layer: int, active: Int[Tensor, "batch pos"]) -> None:
        """Add the active neurons of each token; layers come in order."""
        of_window = active.sum(dim=1)
        if layer == 0:
            self._batches.append(of_window)
        else:
            self._batches[-1] = self._batches[-1] + of_window.to(self._batches[-1].device)

    def ratios(self) -> Float[np.ndarray, " window"]:
        """Share of pairs active in each window."""
        return torch.cat([batch.cpu() for batch in self._batches]).numpy() / self._pairs


class _DenseRecorder:
    """Sums up, while the dense model runs, everything that rules need of it."""

    def __init__(self, passes: RulePasses, curves: CurveRecorder) -> None:
        self._passes, self._curves = passes, curves
        info = passes.adapter.info
        self._spread = {score: ScoreHistogram(info.n_layers) for score in passes.scores}
        self._topp: dict[Score, list[np.ndarray]] = {score: [] for score in passes.scores}
        self._sampled, self._nonzero = 0, _Active(passes)
        self._stride = max(1, passes.windows.n_tokens // _SAMPLE)

    def reading(self) -> AbstractContextManager[None]:
        """Return the context that reads `s`, if it is needed."""
        return self._passes._reading()

    def on_post(self, layer: int, z: Float[Tensor, "batch pos neuron"]) -> None:
        """Add a batch of one layer's post-activations."""
        self._curves.on_post(layer, z)
        self._nonzero.add(layer, (z != 0).sum(dim=2))
        sampled = rearrange(z, "batch pos neuron -> (batch pos) neuron")[:: self._stride]
        self._sampled += sampled.numel()
        for score in self._passes.scores:
            if score == "s":
                assert self._passes.reader is not None
                values = self._passes.reader.of(layer, z).float().abs().flatten(0, 1)
            else:
                values = contributions(z.flatten(0, 1), self._passes.adapter.w_norms[layer])
            self._spread[score].add(layer, values)
            self._topp[score].append(topp_counts(values[:: self._stride]))

    def active(self) -> Float[np.ndarray, " window"]:
        """Share of pairs not exactly zero, by window."""
        return self._nonzero.ratios()

    def scores(self) -> DenseScores:
        """Return what was seen."""
        info = self._passes.adapter.info
        return DenseScores(
            info.d_mlp,
            info.n_layers,
            float(self.active().mean()),
            self._spread,
            {score: np.sum(counts, axis=0) / self._sampled for score, counts in self._topp.items()},
            self._curves.curves(),
        )


def _checked(path: Path, data: dict[str, Any], n_windows: int) -> dict[str, dict[str, list[float]]]:
    with blaming(path):
        for found in data["passes"].values():
            if set(found) != {"rise", "kl", "active"} or any(
                np.array(values, dtype=np.float64).shape != (n_windows,) for values in found.values()
            ):
                raise ValueError("a pass is incomplete")
        return dict(data["passes"])
