"""Texts of any bytes, and things that are no text at all: measured, or refused in one line, within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.cli import damage

FUZZ = settings(
    max_examples=settings().max_examples // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
WORDS = "The neuron that fires for every token says little. " * 40
PIECES: list[bytes] = [
    WORDS.encode(),
    b"\xef\xbb\xbf",  # a byte order mark
    b"\xff\xfe",
    b"\x00",
    b"\xed\xa0\x80",  # a lone surrogate, as careless programs encode it
    b"\xf4\x90\x80\x80",  # beyond Unicode
    b"\xc3",  # half a character
    b"\r\n" * 50,
    b" \t\n" * 50,
    bytes(range(1, 32)),
    "\u202e\u2028\ufeff\u0301".encode() * 20,
    "\U0001f9e0\u4e2d\u0640".encode() * 40,
    b"<s></s><unk><|endoftext|>" * 20,
    b"\x1b[31m" * 20,
]


def texts() -> st.SearchStrategy[bytes]:
    mixed = st.lists(st.sampled_from(PIECES), max_size=4).map(b"".join)
    recoded = st.sampled_from(["utf-16", "utf-32", "latin-1", "utf-7"]).map((WORDS + "\u00e9").encode)
    return mixed | recoded | st.binary(max_size=400) | st.text(max_size=400).map(lambda text: text.encode())


@pytest.fixture
def loaded(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny Llama's folder, loaded once."""
    from neuron_sparsity import adapter

    name = model_folder("llama")
    model = adapter.load_model(name)
    monkeypatch.setattr(adapter, "load_model", lambda *_, **__: model)
    return name


def check(done: Any, out: Path) -> None:
    """Measured, or one line about the text and no folder made."""
    if done.code == 0:
        assert done.err == "", done.err
        assert (out / "statistics.safetensors").is_file()
    else:
        message = done.error()
        assert "unexpected" not in message, message
        assert "the-text" in message, message
        assert not out.exists()


@FUZZ
@given(content=texts(), packed=st.sampled_from(["--packed", "--apart"]), tokens=st.sampled_from([16, 192, 10**9]))
def test_any_bytes(content: bytes, packed: str, tokens: int, cli: Any, loaded: str, tmp_path: Path) -> None:
    text, out = tmp_path / "the-text", tmp_path / "run"
    text.write_bytes(content)
    with damage.guarded(tmp_path):
        done = cli("record", loaded, "--text", text, "--tokens", tokens, "--n-ctx", 16, packed, "--out", out, "--quiet")
    check(done, out)
    damage.replace(out, "nothing", text)


@pytest.mark.parametrize("what", damage.STANDS_THERE)
def test_what_is_no_text(what: str, cli: Any, loaded: str, tmp_path: Path, text_file: str) -> None:
    text, out = tmp_path / "the-text", tmp_path / "run"
    damage.replace(text, what, Path(text_file))
    with damage.guarded(tmp_path, seconds=20):
        done = cli("record", loaded, "--text", text, "--n-ctx", 16, "--tokens", 64, "--out", out, "--quiet")
    check(done, out)
    if what not in ("a link to a file", "another name of a file"):
        assert done.code == 1
    if what in ("a pipe", "a socket", "a link to a device"):
        assert "is a pipe or a device; write its text into a file" in done.err


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/stdin", "/proc/self/mem", "/proc/kmsg"])
def test_devices_are_no_text(device: str, cli: Any, loaded: str, tmp_path: Path) -> None:
    with damage.guarded(tmp_path, seconds=20):
        message = cli("record", loaded, "--text", device, "--out", tmp_path / "run").error()
    assert Path(device).name in message
    assert "unexpected" not in message


@pytest.mark.parametrize("line", [b"a", b" ", b"ab "], ids=["one word", "no word", "many words"])
def test_one_line_of_many_megabytes(line: bytes, cli: Any, loaded: str, tmp_path: Path) -> None:
    """Stretches of it are read, whatever its length; what has no spaces is no word that takes for ever to split."""
    text, out = tmp_path / "the-text", tmp_path / "run"
    text.write_bytes(line * (8_000_000 // len(line)))
    with damage.guarded(tmp_path):
        done = cli("record", loaded, "--text", text, "--n-ctx", 16, "--tokens", 64, "--out", out, "--quiet")
    check(done, out)
