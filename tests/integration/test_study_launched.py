"""A study that torchrun starts in two processes ends with the points of one, bit for bit, whoever interrupts it.

One process takes a step in two halves, which are those of the two: so even sums are taken in the same order. Every
study is a process of its own with one thread, for the same reason.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.studies import a_config, a_text

pytest.importorskip("accelerate")
pytest.importorskip("transformer_lens.model_bridge")
pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ALONE = (sys.executable,)
SECONDS = 240  # for what takes half a minute on a machine with nothing else to do

# The second process is gone in step 10 of the first run.
KILLED = """
import os, signal
from neuron_sparsity.cli import main
from neuron_sparsity.study import training

on_step_end = training._OnSchedule.on_step_end

def die(self, args, state, control, **kwargs):
    if os.environ["RANK"] == "1" and state.global_step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    on_step_end(self, args, state, control, **kwargs)

training._OnSchedule.on_step_end = die
main()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    path = folder / "micro.json"
    path.write_text(json.dumps(a_config(a_text(folder), device_batch=4).to_json()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process finds."""
    out = tmp_path_factory.mktemp("one") / "out"
    code, _, errors = finish(start(ALONE, file, out, "--quiet"))
    assert code == 0, errors
    return content(out)


@pytest.fixture(scope="module")
def two(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a study of two processes, and what they said on stdout."""
    out = tmp_path_factory.mktemp("two") / "out"
    code, said, errors = finish(start(TORCHRUN, file, out, "--json"))
    assert code == 0, errors
    return out, said


def start(launcher: tuple[str, ...], file: Path, out: Path, *options: str, script: Path | None = None) -> Any:
    program = ["-m", "neuron_sparsity"] if script is None else [str(script)]
    command = [*launcher, *program, "study", "--config", str(file), "--out", str(out), "--device", "cpu", *options]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    try:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a signal to its group, as Ctrl-C is one, does not reach the tests
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: Any) -> tuple[int, str, str]:
    try:
        said, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a process hangs")
    return process.returncode, said, errors


def interrupt(process: Any, there: Callable[[], bool]) -> str:
    """Press Ctrl-C when something has come to be, and return what was said on stderr."""
    until = time.monotonic() + SECONDS
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    code, said, errors = finish(process)
    assert code != 0
    assert said == ""
    return errors


def content(folder: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((folder / "study.json").read_text(encoding="utf-8"))["runs"]
    return runs


def test_two_processes_train_as_one(one: list[dict[str, Any]], two: tuple[Path, str]) -> None:
    """The losses of all steps are those of the same windows, at the same rates."""
    folder, said = two
    assert said.count("\n") == 1, "one process prints"
    assert json.loads(said)["runs"] == content(folder)
    assert content(folder) == one
    assert [len(found["losses"]) for found in one] == [40, 40]
    assert [found["points"][-1]["tokens"] for found in one] == [5120, 5120]
    for checkpoint in (folder / "runs").glob("*/checkpoints/checkpoint-*"):
        assert not [path.name for path in checkpoint.iterdir() if path.name.startswith(("optimizer", "scheduler"))]


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [TORCHRUN, ALONE], ids=["two", "one"])
def test_an_interrupted_study_goes_on(
    launcher: tuple[str, ...], file: Path, one: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ctrl-C while the second run trains, and while the first is tracked; then with as many processes, or with one."""
    out = tmp_path / "out"
    second = out / "runs" / "b-relu-0" / "checkpoints"
    errors = interrupt(start(TORCHRUN, file, out), lambda: any(second.glob("checkpoint-*/trainer_state.json")))
    assert "interrupted; the same command goes on" in errors
    assert not (second / "checkpoint-40").exists()
    whole = [path.parent / "model.safetensors" for path in second.glob("checkpoint-*/trainer_state.json")]
    begun = {path: path.stat().st_mtime_ns for path in whole}
    tracked = out / "runs" / "a-relu-0" / "track" / "trajectory.json"
    errors = interrupt(start(launcher, file, out), tracked.exists)
    assert "interrupted; the same command goes on" in errors
    assert not (out / "study.json").exists()
    assert {path: path.stat().st_mtime_ns for path in whole} == begun
    code, _, errors = finish(start(launcher, file, out, "--quiet"))
    assert code == 0, errors
    assert content(out) == one


@pytest.mark.soak
def test_a_process_that_is_gone_ends_the_others(file: Path, one: list[dict[str, Any]], tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED, encoding="utf-8")
    code, said, errors = finish(start(TORCHRUN, file, out, script=script))
    assert code != 0
    assert said == ""
    assert "Signal 9 (SIGKILL)" in errors  # torchrun's own words
    left = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert all(
        line.startswith("error: rank 0 of 2: another process of this training is gone")
        and line.endswith("the same command goes on from the last checkpoint")
        for line in left
    ), errors
    # What the second process had no time to write to its end is not needed.
    last = max((out / "runs/a-relu-0/checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    (last / "rng_state_1.pth").write_bytes(b"half of it")
    code, _, errors = finish(start(TORCHRUN, file, out, "--quiet"))
    assert code == 0, errors
    assert content(out) == one


def test_an_error_of_the_first_process_ends_the_second(file: Path, two: tuple[Path, str], tmp_path: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(data | {"p_percent": 2.0}), encoding="utf-8")
    shutil.copytree(two[0], tmp_path / "out")
    code, said, errors = finish(start(TORCHRUN, other, tmp_path / "out"))
    assert code != 0
    assert said == ""
    assert "error: rank 0 of 2: " in errors
    assert "holds another run (p_percent: 0.5, not 2.0)" in errors
    short = tmp_path / "short.json"
    short.write_text(json.dumps(data | {"training": data["training"] | {"steps": 4000}}), encoding="utf-8")
    code, _, errors = finish(start(TORCHRUN, short, tmp_path / "short"))
    assert code != 0
    assert "tokens to train on, and 4,000 steps of 128 tokens need 512,000; give more text" in errors
