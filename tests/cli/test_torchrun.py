"""`torchrun -m neuron_sparsity`: the program as users start it, in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_sparsity.statistics import NeuronStatistics

SIZES = ("--tokens", "192", "--n-ctx", "16", "--batch-size", "2")
COUNTS = ("zero_count", "histogram", "contribution_max", "example_value", "example_position", "example_context")

# Rank 1 is gone in its second batch, the first time it is started.
KILLED = """
import os, signal
from neuron_sparsity import recording
from neuron_sparsity.cli import main

add = recording.Recording.add

def add_and_die(self, start, tokens):
    add(self, start, tokens)
    if os.environ["RANK"] == "1" and start > 6 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

recording.Recording.add = add_and_die
main()
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`as_rank(1)`: the environment of the second of two processes of torchrun."""

    def setup(rank: int) -> None:
        where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))

    return setup


@pytest.mark.slow
def test_search_in_two_processes(
    measure: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    alone = measure("sparsity", *SIZES, "--p", 1, "--out", tmp_path / "one", "--json").json
    arguments = ("sparsity", model_folder("llama"), "--text", text_file, *SIZES, "--p", 1, "--out", tmp_path / "two")
    done = torchrun("-m", "neuron_sparsity", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "one process prints"
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "two" / "sparsity.json").read_text()) == found
    assert found["provenance"]["processes"] == 2
    assert found["provenance"]["command"].startswith("neuron-sparsity sparsity ")
    assert found["reached"] == alone["reached"]
    for key in ("ppl_dense", "ppl_sparse", "cett", "activation_ratio"):
        assert found[key] == pytest.approx(alone[key], rel=1e-9), key
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"run.json", "sparsity.json", "windows.safetensors"}


@pytest.mark.slow
def test_recording_survives_a_killed_process(
    measure: Callable[..., Any], model_folder: Callable[[str], str], text_file: str, tmp_path: Path
) -> None:
    """The other says who is gone; started again, by torchrun itself, both go on to the result of one process."""
    script, out = tmp_path / "killed.py", tmp_path / "two"
    script.write_text(KILLED)
    arguments = ("record", model_folder("llama"), "--text", text_file, *SIZES, "--out", out, "--quiet")
    done = torchrun("--max-restarts", 1, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "error: rank 0 of 2: rank 1 of 2 is gone (killed, or out of memory?); start the same command" in done.stderr
    assert {path.name for path in out.iterdir()} == {"run.json", "statistics.safetensors", "windows.safetensors"}
    measure("record", *SIZES, "--out", tmp_path / "one", "--quiet")
    one, two = (NeuronStatistics.load(tmp_path / name) for name in ("one", "two"))
    for name in COUNTS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    torch.testing.assert_close(one.contribution_sum, two.contribution_sum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_refuse(cli: Callable[..., Any], as_rank: Callable[[int], None], rank: int) -> None:
    as_rank(rank)
    for arguments in (("rank", "folder"), ("report",), ("ablate",), ("doctor",), ("fit", "points.csv")):
        error = cli(*arguments).error()
        assert error == f"error: rank {rank} of 2: {arguments[0]} runs as one process: start it without torchrun"


def test_one_process_of_torchrun_is_like_none(
    cli: Callable[..., Any], as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli("doctor", "--json").code == 0


def test_wrong_input_is_told_by_every_rank(measure: Callable[..., Any], as_rank: Callable[[int], None]) -> None:
    as_rank(1)
    assert measure("sparsity", "--p", -1).error().startswith("error: rank 1 of 2: --p must be a positive number")


def test_every_process_takes_its_own_gpu(
    measure: Callable[..., Any], as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron_sparsity.parallel import own_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device("cuda:3") == "cuda:3", "one process takes what it is given"
    as_rank(0)
    assert [own_device(device) for device in (None, "cuda", "cpu")] == ["cuda:0", "cuda:0", "cpu"]
    as_rank(1)
    assert "process 2 of this machine has no GPU: there are 1" in measure("record").error()
    assert "takes a GPU of its own" in measure("record", "--device", "cuda:1").error()
