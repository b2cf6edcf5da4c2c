"""The bar on stderr: with rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neuron_sparsity import progress as progress_module
from neuron_sparsity.progress import progress_bar

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal of 120 columns and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.pieces: list[bytes] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self.master, 4096)
            except OSError:  # the other side was closed
                return
            if not piece:
                return
            self.pieces.append(piece)

    def raw(self) -> str:
        os.close(self.slave)
        self.reader.join(timeout=10)
        os.close(self.master)
        return b"".join(self.pieces).decode()


def on_terminal(*arguments: str) -> tuple[int, str, str]:
    """Run the program with stderr on a terminal; return exit code, stdout, stderr."""
    terminal = Terminal()
    done = subprocess.run(
        [sys.executable, "-m", "neuron_sparsity", *arguments],
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"},
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stdout, terminal.raw()


def test_terminal_shows_rate_and_time_left(tmp_path: Path, model_folder: Callable[[str], str], text_file: str) -> None:
    arguments = ["sparsity", model_folder("llama"), "--text", text_file, "--tokens", "192", "--n-ctx", "16"]
    code, out, err = on_terminal(*arguments, "--batch-size", "1", "--out", str(tmp_path / "run"))
    shown = CONTROL.sub("", err)
    assert code == 0
    assert "CETT-PPL-1%" in out
    assert "\x1b" not in out
    assert "loading " in shown
    assert "truncated pass, CETT" in shown
    assert re.search(r"[\d,]+ tokens/s", shown)
    assert re.search(r"100 %.*tokens/s.*0:00:\d\d", shown)
    assert "Traceback" not in shown
    assert "Warning" not in shown


def test_terminal_shows_nothing_when_quiet_and_errors_in_red(tmp_path: Path) -> None:
    code, out, err = on_terminal("rank", str(tmp_path / "\x1b[2J"))
    assert (code, out) == (1, "")
    assert err.startswith("\x1b[31merror: ")
    assert "\x1b[2J" not in err
    code, out, err = on_terminal("record", str(tmp_path), "--quiet")
    assert (code, out) == (1, "")
    assert CONTROL.sub("", err).startswith("error: ")
    assert err.count("\n") == 1


def test_nothing_is_shown_elsewhere() -> None:
    with progress_bar(False) as progress:
        assert progress is None


@contextmanager
def bar_on(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> Any:
    """A bar whose output is kept, and whose clock the test turns."""
    import io

    import rich.console

    screen = io.StringIO()

    def console(**_: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=140, color_system=None)

    with monkeypatch.context() as patched:
        patched.setattr(progress_module.time, "monotonic", lambda: clock[0])
        console_of_rich = rich.console.Console
        patched.setattr(rich.console, "Console", console)
        with progress_bar(True) as progress:
            patched.setattr(rich.console, "Console", console_of_rich)
            yield progress, screen


def test_rate_counts_only_what_this_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    with bar_on(monkeypatch, clock) as (progress, screen):
        progress("recording neurons", 9000, 10_000)  # taken up where an interrupted one stopped
        clock[0] += 2.0
        progress("recording neurons", 9500, 10_000)
    shown = CONTROL.sub("", screen.getvalue())
    assert "250 tokens/s" in shown
    assert "95 %" in shown


def test_each_pass_has_its_own_bar_and_names_are_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    with bar_on(monkeypatch, clock) as (progress, screen):
        progress("loading \x1b[2J\x07[red]model", 0, 0)
        for label in ("dense pass", "truncated pass", "truncated pass"):
            progress(label, 0, 10)
            clock[0] += 1.0
            progress(label, 10, 10)
    shown = screen.getvalue()
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    last = CONTROL.sub("", shown).strip().splitlines()[-4:]
    assert ["loading \\x1b[2J\\x07[red]model" in last[0], *("100 %" in line for line in last)] == [True] * 5
    assert [line.split("  ")[0].strip() for line in last[1:]] == ["dense pass", "truncated pass", "truncated pass"]
