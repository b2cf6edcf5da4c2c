"""Kill a run with SIGKILL again and again, take it up again each time, and compare what it ends with.

    python -m tests.integration.killing MODEL TEXT FOLDER record|report|track ROUNDS SEED

The model is loaded once; every attempt is a fork. A child dies before the n-th of its operations on files, for a random
n, or whenever its parent strikes; after a few deaths it is left alone. One line says what was done; a difference, or
work that was done twice, is an AssertionError that names the round: the same seed makes the same plan again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity import pipeline
from neuron_sparsity.adapter import attach, load_model
from neuron_sparsity.corpus import load_corpus
from neuron_sparsity.pipeline import Run
from neuron_sparsity.recorder import record
from neuron_sparsity.run_results import render
from neuron_sparsity.store import read_json, read_tensors
from neuron_sparsity.trajectory import track

REPOSITORY = Path(__file__).parents[2]
OPERATIONS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir")
FILES = {
    "record": ("run.json", "windows.safetensors", "statistics.safetensors"),
    "report": (
        "run.json",
        "windows.safetensors",
        "sparsity.json",
        "statistics.safetensors",
        "ablation.json",
        "passage.json",
        "report.html",
    ),
    "track": ("run.json", "windows.safetensors", "trajectory.json"),
}


def said_by(module: str, *arguments: object) -> str:
    """Run a module like this one in a process of one thread, which may fork, and return its line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def take_steps(run: Run, what: str) -> None:
    if what == "record":
        run.record()
        return
    result = run.sparsity(1.0)
    stats = run.record(result)
    run.ablate(stats, p_percent=1.0, ranking="contribution", replacement="mean", scope="model", seed=0)
    run.passage(result)
    render(run.folder.path)


def track_changed(model: Any, windows: Any, folder: Path, progress: Any) -> None:
    """Track three checkpoints: the model, each with some more neurons of its first layer turned off."""
    weight = model.model.blocks[0].mlp.out.weight if hasattr(model.model.blocks[0].mlp, "out") else model.w_out(0)
    whole = weight.detach().clone()

    def checkpoint(n: int) -> Any:
        with torch.no_grad():
            weight.copy_(whole)
            weight.view(-1)[: 40 * n] *= 0.9
        return model.model

    track(
        [(f"step{3 - n}", partial(checkpoint, n)) for n in range(3)],
        windows,
        folder=folder,
        tokens_per_step=10,
        batch_size=1,
        progress=progress,
    )


def child(work: Callable[[Any], None], inside: Path, die_at: int | None, told: int) -> None:
    """Run in a fork: do the work, die before operation `die_at`, tell the parent every batch and the operations."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(inside) in str(arguments[0]):
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def progress(label: str, done: int, total: int) -> None:
        os.write(told, f"{label.replace(' ', '-')} {done}\n".encode())

    sys.addaudithook(watch)
    try:
        work(progress)
        os.write(told, f"operations {count}\n".encode())
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def attempt(
    work: Callable[[Any], None], inside: Path, die_at: int | None, seconds: float | None
) -> tuple[bool, list[tuple[str, int]]]:
    """Return whether the work was finished, and what was told: (label, tokens done) of each batch."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(work, inside, die_at, write)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # nothing, if it is done: it was not waited for yet
    with os.fdopen(read, encoding="ascii") as lines:
        told = [(label, int(done)) for label, done in (line.split() for line in lines if line.endswith("\n"))]
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the run failed with {code}"
    return code == 0, told


def content(folder: Path, what: str) -> dict[str, Any]:
    """Everything a run ended with, bit for bit, but what was spent on it."""
    found: dict[str, Any] = {}
    for name in FILES[what]:
        path = folder / name
        if path.suffix == ".json":
            data = read_json(path)
            data.pop("cost", None)
            found[name] = json.dumps(data, sort_keys=True)
        elif path.suffix == ".safetensors":
            tensors, header = read_tensors(path)
            bits = {key: (str(value.dtype), value.numpy().tobytes()) for key, value in tensors.items()}
            found[name] = (bits, json.dumps(header, sort_keys=True))
        else:
            assert path.read_text(encoding="utf-8").endswith("</html>\n") or "</html>" in path.read_text("utf-8")[-50:]
    extra = {path.name for path in folder.iterdir() if path.name[0] != "."} - set(FILES[what])
    assert not extra, f"left behind: {extra}"
    return found


def one_round(plan: random.Random, make: Callable[[Path], Callable[[Any], None]], folder: Path, seen: Any) -> int:
    """Kill and take up again until it is done; return the number of deaths."""
    work = make(folder)
    deaths, limit, last = 0, plan.randint(1, 8), -1
    operations, duration = seen
    while True:
        by_operation = plan.random() < 0.6
        die_at = plan.randrange(operations) if by_operation and deaths < limit else None
        seconds = plan.uniform(0, duration) if not by_operation and deaths < limit else None
        done, told = attempt(work, folder, die_at, seconds)
        recorded = [tokens for label, tokens in told if label == "recording-neurons"]
        if recorded:
            assert recorded[0] >= last, f"{recorded[0]} tokens taken up again, {last} were recorded"
            last = recorded[-1]
        if done:
            return deaths
        deaths += 1


def main() -> None:
    model_folder, text, root, what, rounds, seed = sys.argv[1:]
    torch.set_num_threads(1)  # a fork has no threads but its own
    model = attach(load_model(model_folder, device="cpu"), name="tiny")
    windows = load_corpus(text, model.model, n_tokens=192, n_ctx=16)
    pipeline.record = partial(record, checkpoint_seconds=0)  # type: ignore[attr-defined]

    def make(folder: Path) -> Callable[[Any], None]:
        def work(progress: Any) -> None:
            if what == "track":
                track_changed(model, windows, folder, progress)
                return
            run = Run(model, windows, folder, heldout=what == "report", batch_size=1, progress=progress)
            take_steps(run, what)

        return work

    whole = Path(root) / "whole"
    start = time.perf_counter()
    done, told = attempt(make(whole), whole, None, None)
    duration = time.perf_counter() - start
    assert done
    assert told[-1][0] == "operations", told
    expected = content(whole, what)
    deaths = 0
    for number in range(int(rounds)):
        folder = Path(root) / f"run-{number}"
        try:
            deaths += one_round(random.Random(f"{seed}:{number}"), make, folder, (told[-1][1], duration))
            assert content(folder, what) == expected, "another result"
        except AssertionError as error:
            raise AssertionError(f"{what}, seed {seed}, round {number}: {error}") from error
    print(f"{rounds} runs of {what} finished after {deaths} deaths with the same result, bit for bit")


if __name__ == "__main__":
    main()
