"""The run folder: whole files or none, and one line about each way in which a folder can be unusable."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_sparsity import store, typed
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.store import RunFolder, read_json, read_tensors, write_bytes, write_json, write_tensors

REQUEST = {"model": "tiny", "corpus": {"sha256": "ab", "n_tokens": 64}}
TENSORS = {"count": torch.arange(6).view(2, 3), "sum": torch.tensor([0.1, math.nan, -math.inf], dtype=torch.float64)}


def refusal(call: Callable[[], Any]) -> str:
    """Return the message of the RunFolderError a call raises; it must be one line."""
    with pytest.raises(RunFolderError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written is read ---


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1, "b": [0.1, {"c": "\u00e9\ud55c"}], "t": (1, 2), "n": None})
    assert read_json(path) == {"schema": 1, "a": 1, "b": [0.1, {"c": "\u00e9\ud55c"}], "t": [1, 2], "n": None}
    assert visible(tmp_path) == ["x.json"]


def test_what_is_no_number_is_null_and_valid_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ppl": math.nan, "all": [math.inf, {"low": -math.inf}]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"schema": 1, "ppl": None, "all": [None, {"low": None}]}


def test_tensors_round_trip_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS | {"turned": TENSORS["count"].T, "empty": torch.empty(0, 3)}, {"n": 3, "ppl": math.nan})
    tensors, header = read_tensors(path)
    assert header == {"schema": 1, "n": 3, "ppl": None}
    assert torch.equal(tensors["turned"], TENSORS["count"].T)
    assert tensors["empty"].shape == (0, 3)
    assert tensors["sum"].numpy().tobytes() == TENSORS["sum"].numpy().tobytes()
    assert tensors["count"].dtype == torch.int64


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"1")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"a long first version")
    write_bytes(tmp_path / "x", b"short")
    assert (tmp_path / "x").read_bytes() == b"short"
    assert visible(tmp_path) == ["x"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_json_value_survives(value: Any) -> None:
    assert json.loads(store.to_json_text({"value": value})) == {"schema": 1, "value": value}


# --- failing while writing ---


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, function, full)
    expected = f"{path} cannot be written: the disk is full; free some space or name another folder with --out"
    assert refusal(lambda: write_json(path, {"a": 2})) == expected
    assert read_json(path)["a"] == 1
    assert visible(tmp_path) == ["x.json"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    write_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"a": 2})
    assert read_json(tmp_path / "x.json")["a"] == 1
    assert visible(tmp_path) == ["x.json"]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from neuron_sparsity.store import write_json
setattr(os, sys.argv[2], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
write_json(Path(sys.argv[1], "run.json"), {"a": 2})
"""


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, function: str) -> None:
    RunFolder(tmp_path, {"a": 1})
    assert run_python(KILLED, tmp_path, function).returncode == -signal.SIGKILL
    assert RunFolder(tmp_path, {"a": 1}).request == {"a": 1}
    assert read_json(tmp_path / "run.json") == {"schema": 1, "a": 1}


def test_a_kill_before_the_first_file_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    assert run_python(KILLED, tmp_path, "replace").returncode == -signal.SIGKILL
    assert [name[0] for name in visible(tmp_path)] == ["."]
    assert RunFolder(tmp_path, {"a": 3}).has("run.json")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit on file sizes")
def test_a_write_that_the_system_really_refuses(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.store import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_bytes(Path(sys.argv[1], "small"), bytes(1000))
try:
    write_bytes(Path(sys.argv[1], "small"), bytes(100_000))
except RunFolderError as error:
    print(error)
"""
    done = run_python(code, tmp_path)
    expected = f"{tmp_path / 'small'} cannot be written (File too large); name another folder with --out\n"
    assert done.stdout == expected, done.stderr
    assert visible(tmp_path) == ["small"]
    assert (tmp_path / "small").read_bytes() == bytes(1000), "what was there before"


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    RunFolder(tmp_path, REQUEST)
    (tmp_path / ".notes.txt").write_text("not ours")
    (tmp_path / ".cache.d.abcdefgh").mkdir()
    leave = """
import os, signal, sys
from pathlib import Path
from neuron_sparsity.store import make_folder, write_bytes
name, function = sys.argv[2:]
setattr(os, function, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
make_folder(Path(sys.argv[1])) if name == "probe" else write_bytes(Path(sys.argv[1], name), b"half")
"""
    for name, function in (("statistics.safetensors", "replace"), ("sparsity.json", "fsync"), ("probe", "unlink")):
        assert run_python(leave, tmp_path, name, function).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name.startswith((".statistics.", ".sparsity.", ".probe."))]
    assert len(left) == 3
    RunFolder(tmp_path, REQUEST)
    assert all(path.exists() for path in left), "another process may be writing them"
    for path in [*left, tmp_path / ".notes.txt", tmp_path / ".cache.d.abcdefgh"]:
        os.utime(path, (0, 0))
    RunFolder(tmp_path, REQUEST)
    assert visible(tmp_path) == [".cache.d.abcdefgh", ".notes.txt", "run.json"]


def test_a_name_is_on_the_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, then its name: what is removed after a write cannot outlive it in a power failure."""
    steps: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def counted(*arguments: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            steps.append("folder" if folder else name)
            return original(*arguments)

        monkeypatch.setattr(os, name, counted)
    write_bytes(tmp_path / "x", b"1")
    assert steps == ["fsync", "replace", "folder"]


# --- files that cannot be read ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read (JSONDecodeError: "),
        (b'{"schema": 1, "a": ', "cannot be read (JSONDecodeError: "),
        (b"not JSON\nat all\n", "cannot be read (JSONDecodeError: "),
        (b"\xff\xfe\0", "cannot be read (UnicodeDecodeError: "),
        (b"[" * 100_000, "cannot be read (RecursionError: "),
        (b"[1, 2]", "is no file of neuron_sparsity (no schema number); name a folder made by `record`"),
        (b"null", "is no file of neuron_sparsity"),
        (b'{"a": 1}', "is no file of neuron_sparsity"),
        (b'{"schema": "1"}', "is no file of neuron_sparsity"),
        (b'{"schema": true}', "is no file of neuron_sparsity"),
        (b'{"schema": 0}', "is no file of neuron_sparsity"),
        (b'{"schema": 1, "ppl": NaN}', "cannot be read (ValueError: NaN is no number in JSON)"),
        (b'{"schema": 1, "ppl": -Infinity}', "cannot be read (ValueError: -Infinity is no number in JSON)"),
        (b'{"schema": 1, "ppl": [{"x": 1e999}]}', "cannot be read (ValueError: a number is too large)"),
        (b'{"schema": 1, "n": 1' + b"0" * 400 + b"}", "cannot be read (ValueError: a number is too large)"),
        (b'{"schema": 1, "n": 1' + b"0" * 5000 + b"}", "cannot be read (ValueError: "),
        (b'{"schema": 1, "a": ' + b"[" * 32 + b"]" * 32 + b"}", "cannot be read (ValueError: more than 32 levels"),
        (b'{"schema": 2}', "has schema 2, this version reads up to 1; `pip install -U neuron-sparsity`"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    assert refusal(lambda: read_json(path)).startswith(f"{path} {message}")
    assert refusal(lambda: RunFolder(tmp_path)).startswith(f"{path} {message}")


def test_files_that_are_missing_or_folders(tmp_path: Path) -> None:
    missing = f"{tmp_path / 'x'} does not exist; the step that writes it has not run"
    assert refusal(lambda: read_json(tmp_path / "x")) == missing
    assert refusal(lambda: read_tensors(tmp_path / "x")) == missing
    for read in (read_json, read_tensors):
        assert " cannot be read (" in refusal(lambda read=read: read(tmp_path))  # type: ignore[misc]
    (tmp_path / "file").write_text("x")
    assert "cannot be read" in refusal(lambda: read_json(tmp_path / "file" / "x"))


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_tensors_that_were_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"n": 3})
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(lambda: read_tensors(path))
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("; delete it and run the step that writes it again")


def test_tensors_of_someone_else(tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04pickle" * 10)
    assert "cannot be read" in refusal(lambda: read_tensors(path))
    path.write_bytes(save(TENSORS))
    assert "cannot be read" in refusal(lambda: read_tensors(path))
    path.write_bytes(save(TENSORS, {"header": "{"}))
    assert "cannot be read" in refusal(lambda: read_tensors(path))
    path.write_bytes(save(TENSORS, {"header": "[]"}))
    assert "no schema number" in refusal(lambda: read_tensors(path))
    path.write_bytes(save(TENSORS, {"header": '{"schema": 7}'}))
    assert "has schema 7, this version reads up to 1" in refusal(lambda: read_tensors(path))


def test_decode_names_the_file() -> None:
    path = Path("out/x.json")
    for build in (lambda: {}["a"], lambda: int("x"), lambda: len(3), lambda: [][0], lambda: None.a):  # type: ignore
        message = refusal(lambda build=build: store.decode(path, build))  # type: ignore[misc]
        assert re.fullmatch(
            r"out/x\.json is damaged \(\w+: .*\); delete it and run the step that writes it again", message
        )


# --- folders ---


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b", REQUEST)
    assert read_json(folder.file("run.json")) == {"schema": 1} | REQUEST
    assert visible(folder.path) == ["run.json"]
    assert RunFolder(folder.path).request == {"schema": 1} | REQUEST
    assert folder.has("run.json")
    assert not folder.has("statistics.safetensors")


def test_a_run_is_taken_up_again(tmp_path: Path) -> None:
    RunFolder(tmp_path, REQUEST | {"limit": math.nan})
    write_json(tmp_path / "sparsity.json", {})
    assert RunFolder(tmp_path, REQUEST | {"limit": math.nan}).has("sparsity.json")
    assert RunFolder(tmp_path, {"model": "tiny"}).has("sparsity.json")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, REQUEST)
    expected = f'{tmp_path} holds another run (model: "tiny", not "large"); name another folder with --out'
    assert refusal(lambda: RunFolder(tmp_path, REQUEST | {"model": "large"})) == expected
    assert "(p_percent: null, not 1.0)" in refusal(lambda: RunFolder(tmp_path, REQUEST | {"p_percent": 1.0}))
    long = refusal(lambda: RunFolder(tmp_path, REQUEST | {"corpus": {"text": "x" * 500}}))
    assert len(long) < 300 + len(str(tmp_path))
    assert read_json(tmp_path / "run.json") == {"schema": 1} | REQUEST


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    expected = f"{tmp_path} holds other files and no run.json; name an empty or new folder with --out"
    assert refusal(lambda: RunFolder(tmp_path, REQUEST)) == expected
    assert visible(tmp_path) == ["thesis.tex"]


def test_nothing_is_tried_out_in_a_folder_of_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    monkeypatch.setattr(store, "make_folder", pytest.fail)
    assert "holds other files" in refusal(lambda: RunFolder(tmp_path, REQUEST))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_pipes_and_huge_files_are_not_opened(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert "(OSError: it is no file)" in refusal(lambda: read(tmp_path / "pipe"))
    (tmp_path / "zeros").symlink_to("/dev/zero")
    assert "(OSError: it is no file)" in refusal(lambda: read(tmp_path / "zeros"))
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 42)
    assert "(OSError: 4,398,046,511,104 bytes are more than" in refusal(lambda: read(tmp_path / "huge"))


@dataclass
class Inner:
    size: int


@dataclass
class Outer:
    ratio: float
    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    inner: tuple[Inner, ...]
    rises: dict[str, float]
    extra: dict[str, Any] | None


def test_fields_are_checked_all_the_way_down() -> None:
    right = {"ratio": 1, "names": ("a",), "pairs": ((1, 2),), "inner": (Inner(1),), "rises": {}, "extra": None}
    assert typed.checked(Outer(**right)) == Outer(**right)  # type: ignore[arg-type]
    typed.checked(Outer(**right | {"rises": {"ppl": None}, "extra": {"a": [None]}}))  # type: ignore[arg-type]
    for name, wrong in (
        ("ratio", "1"),
        ("ratio", True),
        ("ratio", None),
        ("names", ["a"]),
        ("names", (1,)),
        ("pairs", ((1,),)),
        ("pairs", ((1, 2.5),)),
        ("inner", ({"size": 1},)),
        ("inner", (Inner("1"),)),  # type: ignore[arg-type]
        ("rises", []),
        ("extra", []),
    ):
        with pytest.raises(TypeError, match=r"must be .*, got "):
            typed.checked(Outer(**right | {name: wrong}))  # type: ignore[arg-type]


def test_hidden_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("x")
    assert RunFolder(tmp_path, REQUEST).has("run.json")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    no_run = "is no run folder (it has no run.json); name a folder made by `record`"
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert refusal(lambda path=path: RunFolder(path)) == f"{path} {no_run}"  # type: ignore[misc]
    assert refusal(lambda: RunFolder(tmp_path / "file", REQUEST)) == (
        f"{tmp_path / 'file'} is a file; name a folder with --out"
    )
    under = tmp_path / "file" / "out"
    expected = f"{under} cannot be written (Not a directory); name another folder with --out"
    assert refusal(lambda: RunFolder(under, REQUEST)) == expected


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where not even root can make a file")
def test_a_folder_where_nothing_can_be_written() -> None:
    refused = [lambda: store.make_folder(Path("/proc/self")), lambda: RunFolder("/proc/self/out", REQUEST)]
    for call in refused:
        assert re.search(r" cannot be written \(.+\); name another", refusal(call))
    assert " cannot be written (" in refusal(lambda: write_json(Path("/proc/self/x.json"), {}))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", REQUEST)
    (tmp_path / "run").chmod(0o500)
    try:
        assert "(Permission denied)" in refusal(lambda: RunFolder(tmp_path / "run", REQUEST))
    finally:
        (tmp_path / "run").chmod(0o700)


def test_writing_into_a_folder_that_is_gone(tmp_path: Path) -> None:
    expected = (
        f"{tmp_path / 'gone' / 'x'} cannot be written (No such file or directory); name another folder with --out"
    )
    assert refusal(lambda: write_bytes(tmp_path / "gone" / "x", b"")) == expected


def test_provenance() -> None:
    told = store.provenance(seed=3, command="neuron-sparsity record")
    assert (told["seed"], told["command"]) == (3, "neuron-sparsity record")
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(json.dumps(told)) == told


def test_a_package_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PACKAGES", ("no-such-package-of-this-name",))
    assert store.provenance()["versions"]["no-such-package-of-this-name"] == "not installed"


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    """The file is streamed by code of our own, so it must be the library's byte for byte, header and all."""
    from safetensors.torch import save

    tensors = {
        "float": torch.arange(12.0).view(3, 4),
        "long": torch.arange(5),
        'name with "\u00e9"': torch.zeros(2, 0, 3),
        "mask": torch.tensor([True, False, True]),
        "double": torch.tensor([0.1, -0.2], dtype=torch.float64),
        "int": torch.arange(3, dtype=torch.int32),
        "scalar": torch.tensor(1.5),
        "half": torch.ones(3, dtype=torch.float16),
        "strided": torch.arange(12).view(3, 4).t(),
    }
    write_tensors(tmp_path / "x", tensors, {"text": "</\u00e9\n"})
    header = json.dumps({"schema": 1, "text": "</\u00e9\n"})
    expected = save({name: value.contiguous() for name, value in tensors.items()}, {"header": header})
    assert (tmp_path / "x").read_bytes() == expected


def test_only_what_differs_from_another_run_is_told(tmp_path: Path) -> None:
    corpus = {"name": "sotu", "sha256": "70ea" * 16, "n_tokens": 4096, "window": 512}
    RunFolder(tmp_path, {"kind": "run", "corpus": corpus})
    more = {"kind": "run", "corpus": corpus | {"n_tokens": 8192, "sha256": "b1c3" * 16}}
    said = refusal(lambda: RunFolder(tmp_path, more))
    assert said.startswith(f"{tmp_path} holds another run (corpus.n_tokens: 4096, not 8192; corpus.sha256: ")
    assert said.endswith("; name another folder with --out")
    same_size = {"kind": "run", "corpus": corpus | {"sha256": "b1c3" * 16}}
    assert "holds another run (corpus.sha256: " in refusal(lambda: RunFolder(tmp_path, same_size))


@pytest.mark.parametrize(("name", "command"), [("statistics.safetensors", "record"), ("ablation.json", "ablate")])
def test_a_missing_file_names_the_command_that_writes_it(tmp_path: Path, name: str, command: str) -> None:
    path = tmp_path / name
    read = read_tensors if path.suffix == ".safetensors" else read_json
    expected = f"the step that writes it has not run (`neuron-sparsity {command}` writes it)"
    assert refusal(lambda: read(path)) == f"{path} does not exist; {expected}"
