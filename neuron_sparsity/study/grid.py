"""`study`: prepare the text, train every model of the grid, follow each over its checkpoints, and fit.

    FOLDER/config.json               the configuration, as --config takes it
    FOLDER/text/                     tokenizer, token ids to train on, held-out windows
    FOLDER/runs/NAME/checkpoints/    what the Trainer writes
    FOLDER/runs/NAME/track/          what `track` writes, and patterns.safetensors
    FOLDER/study.json                everything that was found

Every step leaves its result on the disk before the next one begins, and is not done again.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from neuron_sparsity.errors import MeasurementError
from neuron_sparsity.parallel import launched
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.store import RunFolder, provenance, read_json, write_bytes, write_json
from neuron_sparsity.study import fitting
from neuron_sparsity.study.alone import alone
from neuron_sparsity.study.config import RunPlan, StudyConfig
from neuron_sparsity.study.measuring import Patterns, follow, patterns_of
from neuron_sparsity.study.result import STUDY_FILE, StudyResult, StudyRun
from neuron_sparsity.study.text import StudyText, prepare
from neuron_sparsity.study.training import losses, parameter_counts, train, trained
from neuron_sparsity.trajectory import TrajectoryResult
from neuron_sparsity.trajectory.result import TRAJECTORY_FILE

__all__ = ["chosen", "plan_rows", "study"]

PARENT = "NEURON_SPARSITY_STUDY_PARENT"
"""Set for the processes of `jobs`: the process that started them, without which they end."""

_POLL_SECONDS = 0.5
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def study(
    config: StudyConfig,
    folder: str | Path,
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    device: str | None = None,
    progress: Progress | None = None,
) -> StudyResult:
    """Return what the models of a grid show of the sparsing laws, trained and measured where that is not yet done.

    Args:
        config: What to train and to measure; `load_config` reads one.
        folder: Where everything goes, and what an interrupted study goes on from.
        only: Names of runs, to train and measure these alone; all if empty.
        jobs: Runs that are trained at a time, each in a process of its own.
        device: `"cpu"` to train and measure on the CPU where there is a GPU; the Trainer takes what there is if None.
        progress: Called after every step and batch.

    Returns:
        What is known of all runs; those that are not finished are `missing`.

    Raises:
        CorpusError: If the text cannot be read or is too short.
        MeasurementError: If a run fails.
        RankError: If another of the processes that a launcher started is gone.
        RunFolderError: If the folder cannot be written, holds another study, or another process works in it.
        ValueError: If `only` names no run, `jobs` is less than 1, or more than 1 under a launcher of several processes.

    Example:
        >>> from neuron_sparsity.study import load_config, study
        >>> study(load_config("tiny"), "runs/tiny", jobs=2)  # doctest: +SKIP
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if device not in (None, "cpu"):
        raise ValueError(f"device must be 'cpu' or None, got {device!r}; accelerate launch chooses GPUs")
    plans, root, (rank, n_ranks) = chosen(config, only), Path(folder), launched()
    if n_ranks > 1 and jobs > 1:
        raise ValueError(
            f"{n_ranks} processes train one run together, so jobs must be 1, got {jobs}; leave out --jobs, or "
            "start the study without torchrun and accelerate launch"
        )
    if rank == 0:
        _open(root, config)
    _end_with_parent()
    text = prepare(config, root / "text", progress)
    if jobs > 1 and len(plans) > 1:
        _in_processes(plans, config, root, jobs, device, progress)
    else:
        with _held([run for run in plans if rank == 0 and not _measured(run, config, root)], root):
            for run in plans:
                train(run, config, text, _checkpoints(root, run), cpu=device == "cpu", progress=progress)
            if rank == 0:
                for run in plans:
                    _measure(run, config, text, root, device, progress)
    if rank > 0 or PARENT in os.environ:  # another process puts the results together
        return _collect((), config, text, root)
    found = _collect(config.runs(), config, text, root)
    write_json(root / STUDY_FILE, found.to_json())
    return found


def _open(root: Path, config: StudyConfig) -> None:
    """Open the folder of a study; one that has not come to its text yet is free for another configuration."""
    request, path = _request(config), root / "run.json"
    if path.is_file() and not (root / "text" / "data.json").is_file() and read_json(path).get("kind") == "study":
        with alone(root / "text", "the text"):
            write_json(path, request)
            (root / "config.json").unlink(missing_ok=True)
    RunFolder(root, request)
    if not (root / "config.json").is_file():
        write_bytes(root / "config.json", _config_text(config))


def chosen(config: StudyConfig, only: Sequence[str] = ()) -> tuple[RunPlan, ...]:
    """Return the runs of these names, or all.

    Raises:
        ValueError: If there is no such run.
    """
    runs = {run.name: run for run in config.runs()}
    unknown = [name for name in only if name not in runs]
    if unknown:
        raise ValueError(f"there is no run {unknown[0]!r} in {config.name}; its runs: {', '.join(runs)}")
    return tuple(run for name, run in runs.items() if not only or name in only)


def plan_rows(config: StudyConfig) -> list[dict[str, Any]]:
    """Return what a study would train, a row a model, without any weights.

    Each row: name, shape, width-depth ratio, parameters, runs, training tokens of each, and floating-point operations
    of all of them (6 for each parameter without embeddings and token, and those of the unembedding).
    """
    rows = []
    tokens = config.training.steps * config.tokens_per_step
    for model in config.models:
        counts = parameter_counts(model, config)
        n_runs = len(model.seeds) * len(config.activations)
        operations = 6.0 * (counts["non_embedding"] + config.text.vocab * model.d_model) * tokens * n_runs
        shape = {name: getattr(model, name) for name in ("n_layers", "d_model", "d_mlp", "n_heads")}
        rows.append(
            {"model": model.name}
            | shape
            | {"width_depth_ratio": model.width_depth_ratio, "parameters": counts, "runs": n_runs, "tokens": tokens}
            | {"checkpoints": len(config.training.checkpoint_steps()), "operations": operations}
        )
    return rows


def _collect(plans: Sequence[RunPlan], config: StudyConfig, text: StudyText, root: Path) -> StudyResult:
    """Return what those of the runs that are finished have found."""
    runs: list[StudyRun] = []
    seen: dict[str, Patterns] = {}
    for run in plans:
        track = root / "runs" / run.name / "track"
        if not _measured(run, config, root):
            continue
        trajectory = TrajectoryResult.load(track)
        known = patterns_of(_checkpoints(root, run), track, config, text.heldout, trajectory, None)
        if known is not None:
            seen[run.name] = known
        counts = parameter_counts(run.model, config)
        logged = losses(_checkpoints(root, run), config)
        runs.append(fitting.run_found(run, config, trajectory, known, parameters=counts, losses=logged))
    names = {run.name for run in runs}
    return StudyResult(
        config=config.to_json(),
        text=text.facts,
        runs=tuple(runs),
        missing=tuple(run.name for run in config.runs() if run.name not in names),
        spreads=fitting.spreads(runs),
        series=fitting.series(runs),
        agreements=fitting.agreements(runs, seen, text.tokenizer),
        frequency_edges=fitting.frequency_edges(config.text.measure_tokens),
        provenance=provenance(),
    )


@contextmanager
def _held(plans: Sequence[RunPlan], root: Path) -> Iterator[None]:
    """Keep other processes away from the folders of runs."""
    with ExitStack() as stack:
        for run in plans:
            stack.enter_context(alone(root / "runs" / run.name, f"run {run.name}"))
        yield


def _measure(
    run: RunPlan, config: StudyConfig, text: StudyText, root: Path, device: str | None, progress: Progress | None
) -> None:
    checkpoints, track = _checkpoints(root, run), root / "runs" / run.name / "track"

    def told(what: str, done: int, total: int) -> None:
        if progress:
            progress(f"{run.name} {what}", done, total)

    found = follow(checkpoints, track, config, text.heldout, device=device, progress=told)
    patterns_of(checkpoints, track, config, text.heldout, found, device)


def _measured(run: RunPlan, config: StudyConfig, root: Path) -> bool:
    """Whether a run is trained and its checkpoints are measured, all but those that cannot be."""
    track = root / "runs" / run.name / "track"
    done = (track / TRAJECTORY_FILE).is_file() and trained(_checkpoints(root, run), config)
    return done and TrajectoryResult.load(track).complete


def _checkpoints(root: Path, run: RunPlan) -> Path:
    return root / "runs" / run.name / "checkpoints"


def _request(config: StudyConfig) -> dict[str, Any]:
    """Return the configuration with a key for every value, so that a difference can be named."""
    data = config.to_json()
    flat = {f"{name}.{key}": value for name in ("text", "training") for key, value in data[name].items()}
    flat |= {f"models.{model['name']}": model for model in data["models"]}
    names = [model["name"] for model in data["models"]]
    return (
        {"kind": "study", "activations": data["activations"], "p_percent": config.p_percent} | flat | {"models": names}
    )


def _config_text(config: StudyConfig) -> bytes:
    return json.dumps(config.to_json(), indent=1).encode()


def _in_processes(
    plans: Sequence[RunPlan], config: StudyConfig, root: Path, jobs: int, device: str | None, progress: Progress | None
) -> None:
    """Train and measure each run in a process of its own, the longest first."""
    waiting = [run for run in plans if not _measured(run, config, root)]
    waiting.sort(key=lambda run: parameter_counts(run.model, config)["total"])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", PARENT: str(os.getpid())}
    package = str(Path(__file__).parents[2])
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    # Of a launcher's single process: those that it starts are none of the launcher's.
    kept = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS and "ELASTIC" not in name}
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    failed = ""
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < jobs and not failed:
                name = waiting.pop().name
                command = [sys.executable, "-m", "neuron_sparsity", "study", "--config", str(root / "config.json")]
                command += ["--out", str(root), "--only", name, "--quiet", *(["--device", device] if device else [])]
                errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
                process = subprocess.Popen(
                    command, env=kept | own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
                )
                running[name] = (process, errors)
            for name, (process, said) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode and not failed:
                        failed = f"run {name} failed: {_last_line(said) or f'exit code {process.returncode}'}"
                    said.close()
                    if progress:
                        progress("runs", len(plans) - len(waiting) - len(running), len(plans))
            time.sleep(_POLL_SECONDS)
    finally:
        for process, said in running.values():
            process.terminate()
            said.close()
    if failed:
        raise MeasurementError(f"{failed}; the same command goes on with the other runs")


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def _end_with_parent() -> None:
    """In a process of `jobs`: end when the one that started it has."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    gc.freeze()  # what is loaded stays: without it, letting go of a checkpoint's model takes a fifth of tracking
