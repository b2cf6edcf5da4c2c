"""`neuron-sparsity track`: checkpoints -> trajectory.json, a page, and points that `fit` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = ("--tokens", "192", "--n-ctx", "16")


@pytest.fixture(scope="module")
def checkpoints(
    tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Folders step-1 to step-6, each a little further from the first; the second one has lost its weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    for n in range(1, 7):
        model = tiny_hf_models("llama")
        generator = torch.Generator().manual_seed(n)
        for parameter in model.parameters():
            parameter.add_(0.02 * n * parameter.std() * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / f"step-{n}")
        tiny_tokenizer.save_pretrained(root / f"step-{n}")
    (root / "step-2" / "model.safetensors").unlink()
    return [str(root / f"step-{n}") for n in range(1, 7)]


@pytest.fixture
def track(cli: Callable[..., Any], checkpoints: list[str], text_file: str) -> Callable[..., Any]:
    def run(*options: object, of: list[str] = checkpoints) -> Any:
        return cli("track", *of, "--text", text_file, *SIZES, *options)

    return run


def test_from_folders_to_a_fit(
    cli: Callable[..., Any], track: Callable[..., Any], checkpoints: list[str], tmp_path: Path
) -> None:
    done = track("--tokens-per-step", "1e9", "--p", "5", "--out", tmp_path / "run", of=checkpoints[::-1])
    assert (done.code, done.err) == (0, "")
    first, second, *others = done.out.splitlines()
    assert first.startswith("5 checkpoints of 2 x 64 neurons (silu) on page.txt, 192 tokens in windows of 16")
    assert "on average over 5 checkpoints" in second
    assert sum("activation ratio 0." in line for line in others) == 5
    assert next(line for line in others if line.startswith("gap: ")).startswith(f"gap: {checkpoints[1]}, 2,000,000,000")
    assert any(line.startswith("dead: active on less than 0.1 % of 192 tokens") for line in others)
    data = json.loads((tmp_path / "run" / "trajectory.json").read_text())
    assert [point["tokens"] for point in data["points"]] == [1e9, 3e9, 4e9, 5e9, 6e9]
    assert data["complete"] is True

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "run" / "report.html").unlink()
    again = cli("report", tmp_path / "run")
    assert again.out == done.out
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == page
    assert json.loads(cli("report", tmp_path / "run", "--json").out)["points"] == data["points"]
    assert cli("report", tmp_path / "run", "--quiet").out == ""
    assert "leave out --p" in cli("report", tmp_path / "run", "--p", "2").error()

    # Five points of random models follow no law, but they are read.
    fitted = cli("fit", tmp_path / "run", "--law", "silu")
    assert fitted.code == 0 or "silu law" in fitted.error()


def test_it_goes_on_and_prints_json(track: Callable[..., Any], checkpoints: list[str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--cett", "0.1", "--json")
    two = [f"{checkpoints[0]}=3e6", f"{checkpoints[2]}=4e6"]
    first = track(*out, of=two).json
    assert [(point["tokens"], point["cett"]) for point in first["points"]] == [(3_000_000, 0.1), (4_000_000, 0.1)]
    assert first["common"]["given"] is True
    three = track(*out, of=[*two, f"{checkpoints[3]}=5e6"]).json
    assert three["points"][:2] == first["points"]
    assert three["points"][2]["tokens"] == 5_000_000


def test_revisions_of_the_cache(
    cli: Callable[..., Any], checkpoints: list[str], text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NAME@REVISION is another commit of a repository: here of the local cache, laid out as the hub's client does."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    for n in (1, 3):
        commit = str(n) * 40
        shutil.copytree(checkpoints[n - 1], repository / "snapshots" / commit)
        (repository / "refs" / f"step{n}").write_text(commit)
    names = ["someone/model@step1", "someone/model@step3", "someone/model@step5"]
    options = ("--text", text_file, *SIZES, "--tokens-per-step", "100", "--cett", "0.1")
    done = cli("track", *names, *options, "--out", tmp_path / "names", "--json")
    assert done.code == 0, done.err
    by_name = done.json
    folders = [checkpoints[0], checkpoints[2]]
    by_folder = cli("track", *folders, *options, "--out", tmp_path / "folders", "--json").json
    assert [point["checkpoint"] for point in by_name["points"]] == names[:2]
    for one, other in zip(by_name["points"], by_folder["points"], strict=True):
        assert {**one, "checkpoint": ""} == {**other, "checkpoint": ""}
    assert [gap["checkpoint"] for gap in by_name["gaps"]] == names[2:]
    assert "step5" in by_name["gaps"][0]["error"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "--tokens-per-step"),
        (("--tokens-per-step", "0"), "tokens_per_step must be a positive"),
        (("--tokens-per-step", "1", "--p", "0"), "--p must be a positive"),
        (("--tokens-per-step", "1", "--cett", "2"), "cett must be in [1e-06, 1]"),
        (("--tokens-per-step", "1", "--dtype", "int8"), "dtype must be"),
        (("--tokens-per-step", "1", "--tokens", "0"), "--tokens must be at least 1"),
        (("--tokens-per-step", "1", "--every", "0"), "--every must be at least 1"),
        (("--tokens-per-step", "1", "--every", "10"), "--every 10 is for NAME@all, and none is named"),
        (("--tokens-per-step", "1", "--device", "abacus"), "--device abacus does not work here"),
    ],
)
def test_bad_options(track: Callable[..., Any], options: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    assert complaint in track("--out", tmp_path / "run", *options).error()
    assert not (tmp_path / "run").exists()


def test_bad_checkpoints(
    track: Callable[..., Any], checkpoints: list[str], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "run")
    assert "no checkpoint schedule of 'gpt2'" in track(*out, of=["gpt2@all"]).error()
    assert "'many' for training tokens" in track(*out, of=[f"{checkpoints[0]}=many"]).error()
    assert "named twice" in track(*out, of=[f"{checkpoints[0]}=1"] * 2).error()
    assert "both trained on 1 tokens" in track(*out, of=[f"{name}=1" for name in checkpoints[:2]]).error()
    nothing = track(*out, of=[f"{tmp_path / 'nowhere'}=1"]).error()
    assert "none of the 1 checkpoints can be measured" in nothing
    assert "nowhere" in nothing
    other = track(*out, of=[f"{model_folder('opt')}=1", f"{checkpoints[0]}=2"]).error()
    assert "the checkpoints are not of one model" in other
    assert "has activation relu, not silu" in other


def test_folders_of_other_runs(
    cli: Callable[..., Any], track: Callable[..., Any], whole_run: Callable[[], Path], text_file: str, tmp_path: Path
) -> None:
    assert "holds another run" in track("--tokens-per-step", "1", "--out", whole_run()).error()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"schema": 1, "kind": "trajectory"}')
    (tmp_path / "run" / "trajectory.json").write_text('{"schema": 1, "points": 3}')
    assert "trajectory.json is damaged" in cli("report", tmp_path / "run").error()
