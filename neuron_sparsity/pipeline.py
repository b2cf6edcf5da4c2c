"""The steps of a run, each reading what the steps before it left in the run folder and writing its own file.

    sparsity   -> sparsity.json        CETT-PPL-p% on the calibration part
    record     -> statistics.safetensors
    ablate     -> ablation.json        searched on the calibration part, confirmed on the held-out part
    passage    -> passage.json         activity of every layer on every token of one window
    render     -> report.html          needs the folder only, never the model

A step whose file is there already, for the same request, is not run again: an interrupted report goes on where it
stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_sparsity.ablation import AblationResult, removable_neurons
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record
from neuron_sparsity.report import Report, report
from neuron_sparsity.sparsity import SparsityResult, cett_ppl_sparsity
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import RunFolder, decode, read_json, write_json, write_tensors
from neuron_sparsity.truncation import TokenActivity, token_activity

__all__ = ["Run", "load_run", "render"]

CALIBRATION_SHARE = 2 / 3
_MAX_WINDOW_BYTES = 64 << 20


@dataclass
class Run:
    """A model, a corpus and a folder, and the steps that can be taken with them.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus. With `heldout`, a third of its windows is kept for confirmation.
        path: The run folder.
        heldout: Whether to keep windows for confirmation.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Raises:
        RunFolderError: If the folder cannot be written or holds another run.
        ValueError: If there are too few windows to keep some.
    """

    model: Any
    windows: Windows
    path: Path
    heldout: bool = False
    batch_size: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.adapter: MLPAdapter = attach(self.model)
        self.calibration, self.confirmation = self.windows, None
        if self.heldout:
            self.calibration, self.confirmation = self.windows.split(CALIBRATION_SHARE)
        info = self.adapter.info
        self.folder = RunFolder(
            self.path,
            {
                "kind": "run",
                "model": {"name": info.name, "fingerprint": info.fingerprint, "dtype": info.dtype},
                "corpus": self.windows.describe(),
            },
        )
        self._keep_windows()

    def sparsity(self, p_percent: float) -> SparsityResult:
        """Search CETT-PPL-p%, or read it if the folder has it for the same p and text."""
        found = self._found("sparsity.json", SparsityResult.from_json)
        if found and found.p_percent == p_percent and found.corpus["sha256"] == self.calibration.sha256:
            return found
        result = cett_ppl_sparsity(
            self.adapter, self.calibration, p_percent=p_percent, batch_size=self.batch_size, progress=self.progress
        )
        write_json(self.folder.file("sparsity.json"), result.to_json())
        return result

    def record(self, result: SparsityResult | None = None) -> NeuronStatistics:
        """Record every neuron, counting exactly under a result's thresholds; or read the recording if it is there."""
        thresholds = {} if result is None else {result.name: result.thresholds}
        if self.folder.has("statistics.safetensors"):
            stats = NeuronStatistics.load(self.folder.path)
            same = stats.corpus["sha256"] == self.calibration.sha256
            if same and (result is None or _same_thresholds(stats, result)):
                return stats
        return record(
            self.adapter,
            self.calibration,
            thresholds=thresholds,
            folder=self.folder.path,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def ablate(
        self, stats: NeuronStatistics, *, p_percent: float, ranking: str, replacement: str, scope: str, seed: int
    ) -> AblationResult:
        """Find what can go for good, or read it if the folder has it for the same question."""
        found = self._found("ablation.json", AblationResult.from_json)
        asked = (p_percent, ranking, replacement, scope, self.calibration.sha256)
        if found and asked == (
            found.p_percent,
            found.ranking,
            found.replacement,
            found.scope,
            found.corpus["sha256"],
        ):
            return found
        removed = removable_neurons(
            self.adapter,
            self.calibration,
            rank(stats, by=ranking, scope=scope, seed=seed),  # type: ignore[arg-type]
            p_percent=p_percent,
            replacement=replacement,
            heldout=self.confirmation,
            seed=seed,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        write_json(self.folder.file("ablation.json"), removed.to_json())
        return removed

    def passage(self, result: SparsityResult) -> TokenActivity:
        """Measure the activity of every layer on each token of the calibration part's middle window."""
        activity = token_activity(self.adapter, self.calibration, result, window=self.calibration.n_windows // 2)
        write_json(self.folder.file("passage.json"), activity.to_json())
        return activity

    def _keep_windows(self) -> None:
        parts = {"": self.calibration} | ({"heldout_": self.confirmation} if self.confirmation is not None else {})
        tensors = {
            f"{prefix}{name}": getattr(part, name) for prefix, part in parts.items() for name in ("tokens", "scored")
        }
        if sum(tensor.nbytes for tensor in tensors.values()) <= _MAX_WINDOW_BYTES:
            write_tensors(self.folder.file("windows.safetensors"), tensors, self.windows.describe())

    def _found(self, name: str, build: Callable[[dict[str, Any]], Any]) -> Any:
        if not self.folder.has(name):
            return None
        path = self.folder.file(name)
        data = read_json(path)
        return decode(path, lambda: build(data))


def load_run(path: str | Path) -> dict[str, Any]:
    """Return what a run folder holds: `stats`, `result`, `removed`, `passage`; None for steps not taken.

    Raises:
        RunFolderError: If it is no run folder, or a file in it is damaged or newer.
    """
    folder = RunFolder(path)
    builders: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
        "result": ("sparsity.json", SparsityResult.from_json),
        "removed": ("ablation.json", AblationResult.from_json),
        "passage": ("passage.json", TokenActivity.from_json),
    }
    found: dict[str, Any] = {"stats": NeuronStatistics.load(folder.path)}
    for key, (name, build) in builders.items():
        file = folder.file(name)
        data = read_json(file) if folder.has(name) else None
        found[key] = None if data is None else decode(file, lambda data=data, build=build: build(data))
    return found


def render(path: str | Path) -> Report:
    """Write `report.html` of a run folder from what it holds; no model is loaded.

    Raises:
        RunFolderError: If there is nothing to render, or the page cannot be written.
    """
    found = load_run(path)
    page = report(found["stats"], found["result"], found["removed"], passage=found["passage"])
    page.save(Path(path) / "report.html")
    return page


def _same_thresholds(stats: NeuronStatistics, result: SparsityResult) -> bool:
    if result.name not in stats.threshold_names:
        return False
    recorded = stats.thresholds[:, stats.threshold_names.index(result.name)]
    return recorded.tolist() == [float(cut) for cut in result.thresholds]
