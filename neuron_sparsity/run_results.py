"""What a run folder holds, read without the model: for the page, for commands on a folder, to be applied to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.ablation_files import kept_removals
from neuron_sparsity.damage import DamageResult
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.pareto import ParetoResult
from neuron_sparsity.report import Report, compare, report, study_report, trajectory_report
from neuron_sparsity.report._explorer import flat_indices
from neuron_sparsity.saliency import SALIENCY_FILE, NeuronSaliency
from neuron_sparsity.sparsity import SparsityResult
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import RunFolder, blaming, read_json
from neuron_sparsity.taxonomy import ATLAS_FILE, Atlas
from neuron_sparsity.truncation import TokenActivity
from neuron_sparsity.typed import checked

if TYPE_CHECKING:  # every command reads run folders, and few of them need the rooms of training
    from neuron_sparsity.study import StudyResult
    from neuron_sparsity.trajectory import TrajectoryResult

__all__ = [
    "AppliedResults",
    "applied_results",
    "load_run",
    "means_of",
    "render",
    "render_comparison",
    "render_study",
    "render_trajectory",
]


def load_run(path: str | Path) -> dict[str, Any]:
    """Return what a run folder holds, or None for it.

    `stats`, `result`, `removed`, `passage`, `pareto`, `damage`, `saliency`, `atlas`.

    Raises:
        RunFolderError: If it is no run folder, or a file in it is damaged or newer.
    """
    folder = RunFolder(path)
    builders: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
        "result": ("sparsity.json", SparsityResult.from_json),
        "removed": ("ablation.json", AblationResult.from_json),
        "passage": ("passage.json", TokenActivity.from_json),
        "pareto": ("pareto.json", ParetoResult.from_json),
        "damage": ("damage.json", DamageResult.from_json),
    }
    found: dict[str, Any] = {"stats": NeuronStatistics.load(folder.path)}
    for key, (name, build) in builders.items():
        file = folder.file(name)
        data = read_json(file) if folder.has(name) else None
        with blaming(file):
            found[key] = None if data is None else checked(build(data))
    found["saliency"] = NeuronSaliency.load(folder.path) if folder.has(SALIENCY_FILE) else None
    found["atlas"] = Atlas.load(folder.path) if folder.has(ATLAS_FILE) else None
    return found


@dataclass(frozen=True)
class AppliedResults:
    """Results of a run folder that can be applied to a model.

    Attributes:
        results: Truncations, then removals, by p, under names that differ.
        means: Mean post-activations [layer, neuron] that the removals put in, or None.
        left_out: Files that are not taken, each with the reason.
    """

    results: dict[str, SparsityResult | AblationResult]
    means: Float[Tensor, "layer neuron"] | None
    left_out: tuple[str, ...]


def applied_results(path: str | Path) -> AppliedResults:
    """Return the results of a run folder that can be applied to a model: those that are reached, at every p.

    Raises:
        RunFolderError: If it is no run folder, has no such result, or a file in it is damaged.
    """
    folder = RunFolder(path)
    kept = kept_removals(folder)
    truncations: dict[str, SparsityResult] = {}
    left_out = dict(kept.left_out)
    for file in sorted(folder.path.glob("sparsity*.json"), key=lambda file: (file.name != "sparsity.json", file.name)):
        data = read_json(file)
        with blaming(file):
            result = checked(SparsityResult.from_json(data))
        if result.name in truncations:
            left_out[file.name] = f"{result.name} is of another file already"
        elif result.reached:
            truncations[result.name] = result
    removals = {p: removed for p, removed in kept.at.items() if removed.n_removable}
    means = means_of(folder, next(iter(removals.values()))) if removals else None
    found: dict[str, Any] = dict(sorted(truncations.items(), key=lambda item: item[1].p_percent))
    for p, removed in removals.items():
        at = f" at {p:g} %" if len(removals) > 1 else ""
        found[f"{removed.n_removable:,} neurons removed{at}"] = removed
    if not found:
        raise RunFolderError(f"{path} has no result to apply; `neuron-sparsity sparsity --out {path}` makes one")
    return AppliedResults(found, means, tuple(f"{name} ({why})" for name, why in left_out.items()))


def means_of(folder: RunFolder, removed: AblationResult) -> Float[Tensor, "layer neuron"] | None:
    """Return the mean post-activations that a removal has put in, which lie where its ranking is from; None for others.

    Raises:
        RunFolderError: If the folder has means of other text only.
    """
    if removed.replacement != "mean":
        return None
    for name, kind in (("statistics.safetensors", NeuronStatistics), (SALIENCY_FILE, NeuronSaliency)):
        source: Any = kind.load(folder.path) if folder.has(name) else None
        if source is not None and source.corpus["sha256"] == removed.ranking_corpus["sha256"]:
            return source.mean_activation  # type: ignore[no-any-return]
    raise RunFolderError(f"{folder.path} has means of other text than ablation.json was made with; run `ablate` again")


def render(
    path: str | Path, found: Mapping[str, Any] | None = None, *, neurons: Iterable[tuple[int, int]] = ()
) -> Report:
    """Write `report.html` of a run folder from what it holds; no model is loaded.

    Args:
        path: The run folder.
        found: What `load_run` returned, if it was called already.
        neurons: (layer, neuron) whose examples must be on the page.

    Raises:
        ValueError: If one of `neurons` does not exist.
        RunFolderError: If there is nothing to render, files do not fit together, or the page cannot be written.
    """
    found = load_run(path) if found is None else found
    places = list(neurons)
    flat_indices(found["stats"], places)
    mend = "if a file in it was edited, delete that file and run its step again"
    with blaming(Path(path), "cannot be rendered", mend):
        parts = {name: found.get(name) for name in ("passage", "pareto", "damage", "saliency", "atlas")}
        page = report(found["stats"], found["result"], found["removed"], neurons=places, **parts)
        page.save(Path(path) / "report.html")
    return page


def render_comparison(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page with several run folders side by side; no model is loaded.

    Args:
        folders: Run folders, 2 to 8.
        out: The page, or a folder for it (`compare.html` in it).

    Returns:
        The path of the page.

    Raises:
        ValueError: If a folder is named twice, or the runs answer different questions.
        RunFolderError: If one is no run folder, or lacks the statistics, or the page cannot be written.
    """
    paths = [Path(folder) for folder in folders]
    places = [path.resolve() for path in paths]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise ValueError(f"{paths[at]} is named twice; name every run folder once")
    if len(paths) < 2:
        raise ValueError("--compare takes two or more run folders: report --compare RUN1 RUN2")
    target = Path(out)
    target = target / "compare.html" if target.is_dir() else target
    if not target.parent.is_dir():
        raise RunFolderError(f"the folder of {target} does not exist; make it first")
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    page = compare({name: load_run(path) for name, path in zip(names, paths, strict=True)})
    page.save(target)
    return target


def render_trajectory(path: str | Path) -> TrajectoryResult:
    """Write `report.html` of a folder that `track` has filled, and return what it holds; no model is loaded.

    Raises:
        RunFolderError: If the folder holds no trajectory, the file is damaged, or the page cannot be written.
    """
    from neuron_sparsity.trajectory.result import TRAJECTORY_FILE, TrajectoryResult

    found: TrajectoryResult = _rendered(path, TrajectoryResult, trajectory_report, TRAJECTORY_FILE, "track")
    return found


def render_study(path: str | Path) -> StudyResult:
    """Write `report.html` of a study's folder, and return what it holds; no model is loaded.

    Raises:
        RunFolderError: If the folder holds no study, the file is damaged, or the page cannot be written.
    """
    from neuron_sparsity.study.result import STUDY_FILE, StudyResult

    found: StudyResult = _rendered(path, StudyResult, study_report, STUDY_FILE, "study")
    return found


def _rendered(path: str | Path, kind: Any, page_of: Callable[[Any], Report], file: str, command: str) -> Any:
    found = kind.load(RunFolder(path).path)
    with blaming(Path(path), "cannot be rendered", f"if {file} was edited, delete it and run `{command}` again"):
        page_of(found).save(Path(path) / "report.html")
    return found
