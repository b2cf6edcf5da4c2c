"""`neuron-sparsity study`: a plan without weights, a study of seconds, bad input in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.study import StudyResult
from tests.studies import a_file, a_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def file(text: Path, tmp_path: Path) -> Callable[..., Path]:
    """`file(training={...})`: a configuration file, with some values changed."""

    def write(**changes: Any) -> Path:
        data = a_file(text)
        for name, value in changes.items():
            data[name] = data[name] | value if isinstance(value, dict) else value
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


def test_a_dry_run_says_what_would_be_trained(cli: Callable[..., Any]) -> None:
    done = cli("study", "--preset", "paper-1.2b", "--dry-run")
    assert done.code == 0
    assert "2 runs of 160,000 steps of 2,097,152 tokens" in done.out
    assert "32 layers of 1792 x 4480, width/depth 56: 1.18e+09 parameters without embeddings" in done.out
    found = cli("study", "--preset", "paper-0.1b", "--dry-run", "--json").json
    assert found["models"][0]["parameters"]["non_embedding"] == pytest.approx(1.08e8, rel=0.02)
    assert found["config"]["training"]["device_batch"] == 16
    again = cli("study", "--dry-run", "--text", "hf:some/text", "--json").json
    assert again["config"]["text"]["source"] == ["hf:some/text"]


def test_what_starts_a_plan_is_what_accelerate_takes(cli: Callable[..., Any], file: Callable[..., Path]) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    path = file()
    path = path.rename(path.with_name("my study.json"))
    for options in (("--preset", "paper-0.4b"), ("--config", path, "--text", "a b.txt", "c.txt", "--out", "elsewhere")):
        plan = cli("study", *options, "--dry-run")
        start = cli("study", *options, "--dry-run", "--json").json["start"]
        assert plan.out.splitlines()[-2].endswith(f" {start['one']}")
        assert plan.out.splitlines()[-1].endswith(f" {start['several']}")
        one, several = (shlex.split(start[name]) for name in ("one", "several"))
        assert several[:2] == ["accelerate", "launch"]
        found = launch.launch_command_parser().parse_args(several[2:])
        assert (found.module, found.training_script) == (True, "neuron_sparsity")
        assert ["neuron-sparsity", *found.training_script_args] == one
        assert (
            cli(*one[1:], "--dry-run", "--json").json["config"]
            == cli(*several[4:], "--dry-run", "--json").json["config"]
        )
        assert one[-1] == ("elsewhere" if "--out" in options else "runs/paper-0.4b")


def test_several_processes(
    cli: Callable[..., Any], file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong options are told by each, a plan by the first."""
    for rank in (0, 1):
        where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))
        error = cli("study", "--config", file(), "--jobs", 2, "--out", tmp_path / "x").error()
        assert error.startswith(
            f"error: rank {rank} of 2: 2 processes train one run together, so jobs must be 1, got 2;"
        )
        assert bool(cli("study", "--dry-run").out) == (rank == 0)
    assert not (tmp_path / "x").exists()


def test_a_study_from_a_file(cli: Callable[..., Any], file: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    path = file(models=[a_file(tmp_path)["models"][0]])
    done = cli("study", "--config", path, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "micro: 1 of 1 runs, trained on 5,120 tokens of speech.txt, measured on 256 held out"
    assert lines[1].split()[:3] == ["a-relu-0", "activation", "ratio"]
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert "Over training: relu" in (out / "report.html").read_text(encoding="utf-8")
    result = StudyResult.load(out)
    assert result.complete
    again = cli("study", "--config", path, "--out", out, "--device", "cpu", "--json")
    assert again.json["runs"] == json.loads(json.dumps(result.to_json()))["runs"]
    assert cli("study", "--config", out / "config.json", "--out", out, "--device", "cpu", "--quiet").out == ""
    (out / "report.html").unlink()
    rendered = cli("report", out)
    assert rendered.out.splitlines() == lines
    assert (out / "report.html").is_file()
    assert "holds a study, rendered as it is" in cli("report", out, "--tokens", "64").error()
    other = file(training={"learning_rate": 0.5})
    assert (
        "holds another run (training.learning_rate: 0.02, not 0.5)"
        in cli("study", "--config", other, "--out", out).error()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--preset", "huge", "--out", "x"), "error: there is no preset 'huge'; choose one of paper-0.1b, "),
        ((), "error: name a folder with --out, or see what would be trained with --dry-run"),
        (("--preset", "tiny", "--config", "mine.toml", "--dry-run"), "error: give --preset or --config, not both"),
        (("--config", "mine.yaml", "--dry-run"), "error: --config takes a .toml or .json file, got mine.yaml"),
        (("--config", "none.toml", "--dry-run"), "error: the configuration none.toml cannot be read"),
        (("--jobs", "0", "--out", "x"), "error: jobs must be at least 1, got 0"),
        (
            ("--only", "base-relu-7", "--out", "x"),
            "error: there is no run 'base-relu-7' in tiny; its runs: base-relu-0",
        ),
        (("--device", "tpu", "--out", "x"), "error: device must be 'cpu' or None, got 'tpu'"),
    ],
)
def test_bad_input(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("study", *arguments).error().startswith(said)
    assert not (tmp_path / "x").exists()


def test_a_bad_key_is_named(cli: Callable[..., Any], file: Callable[..., Path], tmp_path: Path) -> None:
    error = cli("study", "--config", file(training={"lr": 0.1}), "--out", tmp_path / "x").error()
    assert "unknown key 'training.lr'; known here: steps, batch" in error


def test_a_damaged_result_is_told(cli: Callable[..., Any], tmp_path: Path) -> None:
    from neuron_sparsity.errors import RunFolderError

    (tmp_path / "study.json").write_text('{"schema": 1, "runs": 3}', encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"study\.json is damaged"):
        StudyResult.load(tmp_path)
    data = StudyResult({}, {}, (), (), (), (), (), (1.0,), {}).to_json() | {"schema": 1, "frequency_edges": ["many"]}
    (tmp_path / "study.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"study\.json is damaged .*frequency_edges must be tuple"):
        StudyResult.load(tmp_path)
