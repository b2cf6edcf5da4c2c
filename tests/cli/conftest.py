"""A tiny model folder, a text, and `cli`: one command in this process, as `main` runs it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity import terminal
from neuron_sparsity.cli import main

SIZES = ("--tokens", "192", "--n-ctx", "16")


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))

    def error(self) -> str:
        """The one line a refused command prints, and nothing else anywhere."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert self.err.strip().isprintable(), self.err
        return self.err.strip()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any
) -> Callable[[str], str]:
    """`model_folder(family)`: a tiny model in Hugging Face format, saved once a session."""
    saved: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in saved:
            path = tmp_path_factory.mktemp(f"tiny-{family}")
            tiny_hf_models(family).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
            saved[family] = str(path)
        return saved[family]

    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> str:
    path = tmp_path_factory.mktemp("text") / "page.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return str(path)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`cli("rank", folder)` -> Done. stdout and stderr are those of the process, foreign libraries' output included."""
    for name, value in terminal._QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(terminal.DEBUG, raising=False)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["neuron-sparsity", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        caught = capfd.readouterr()
        return Done(int(left.value.code or 0), caught.out, caught.err)

    return run


@pytest.fixture
def measure(cli: Callable[..., Done], model_folder: Callable[[str], str], text_file: str) -> Callable[..., Done]:
    """`measure("sparsity", "--out", folder)`: a command on the tiny Llama and the page of text."""

    def run(command: str, *options: object) -> Done:
        return cli(command, model_folder("llama"), "--text", text_file, *SIZES, *options)

    return run


@pytest.fixture(scope="session")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str], text_file: str
) -> Callable[[], Path]:
    """`whole_run()`: a fresh copy of a run folder that `report` filled."""
    from neuron_sparsity.cli import app

    made = tmp_path_factory.mktemp("whole") / "run"
    copies = tmp_path_factory.mktemp("copies")

    def copy() -> Path:
        if not made.exists():
            arguments = ["report", model_folder("llama"), "--text", text_file, *SIZES, "--out", str(made), "--quiet"]
            app(arguments, standalone_mode=False)
        target = copies / str(len(list(copies.iterdir())))
        shutil.copytree(made, target)
        return target

    return copy
