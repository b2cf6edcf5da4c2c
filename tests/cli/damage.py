"""Ways to damage a file, and a guard that watches what a command does meanwhile."""

from __future__ import annotations

import atexit
import copy
import gc
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

# --- values that do not belong where they stand

NESTED: Any = 0
for _ in range(300):
    NESTED = [NESTED]

ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    -(10**400),
    10**4000,
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "../../../etc/passwd",
    "/etc/passwd",
    "\ud800",
    "<script>alert(1)</script>",
    "{{ cycler.__init__.__globals__.os.system('false') }}",
    "%s%n{0.__class__}",
    "x" * 100_000,
    "1e999",
    [],
    [None],
    [[0, 0]],
    [0] * 5000,
    {},
    {"__class__": "os.system", "": None},
    NESTED,
    {"a": NESTED},
]
"""What a JSON file may say in the wrong place: every type, every size, what looks like a path, a template or markup."""

NUMBERS: list[Any] = [-1, 0, 1, 2, 2**31, 2**63, 2**64, 10**30, 1e308, 5e-324]


def places(data: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON document."""
    if len(here) == 8:
        return
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        yield (*here, key)
        yield from places(child, (*here, key))


@st.composite
def damaged_data(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON document with a few values replaced, removed or doubled."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 2))):
        found = [place for place in places(data) if place[0] != "schema"]
        *above, key = draw(st.sampled_from(found))
        holder = data
        for step in above:
            holder = holder[step]
        action = draw(st.sampled_from(["odd", "odd", "odd", "number", "remove", "double"]))
        if action == "remove":
            del holder[key]
        elif action == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            value = draw(st.sampled_from(NUMBERS if action == "number" else ODD_VALUES))
            holder[key] = copy.deepcopy(value)  # else the next damage would be done to the list of values itself
    return data


def json_text(data: Any) -> str:
    """JSON as any writer might leave it: NaN, Infinity and integers of any length."""
    return json.dumps(data)


@st.composite
def damaged_json(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return the bytes of a JSON file, damaged in what they say or in how they say it."""
    if draw(st.booleans()):
        return json_text(draw(damaged_data(json.loads(whole)))).encode()
    return draw(damaged_bytes(whole))


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return bytes cut off, with bits turned, with a piece put in, doubled or blanked."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["cut", "turn", "insert", "double", "blank"]))
        if action == "cut":
            del data[at:]
        elif action == "turn" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "insert":
            data[at:at] = draw(st.sampled_from([b"\0", b"\xff\xfe", b"[" * 5000, b'"', b"}", b"9" * 5000, b"e9", b"-"]))
        elif action == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        else:
            data[at : at + 8] = bytes(min(8, len(data) - at))
    return bytes(data)


# --- safetensors: eight bytes of length, JSON, data


def split_safetensors(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join_safetensors(head: dict[str, Any], data: bytes) -> bytes:
    text = json_text(head).encode()
    return struct.pack("<Q", len(text)) + text + data


DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "U64", "X99", "")
SHAPES: list[list[Any]] = [[], [0], [2**63, 2**63], [10**12], [-1], [1] * 70, [2, 64], [2, 64, 64], [1.5], ["2"]]
NUMERIC_BYTES = [b"\xff", b"\x00", struct.pack("<d", float("nan")), struct.pack("<d", 1e308), struct.pack("<q", -1)]


@st.composite
def damaged_safetensors(draw: st.DrawFn, whole: bytes) -> bytes:
    """Return a safetensors file with damage in its tensors' heads, in the header of ours, in the data or anywhere."""
    head, data = split_safetensors(whole)
    kind = draw(st.sampled_from(["header", "header", "head", "data", "data", "length", "bytes"]))
    if kind == "header":
        own = draw(damaged_data(json.loads(head["__metadata__"]["header"])))
        head["__metadata__"]["header"] = json_text(own)
        return join_safetensors(head, data)
    if kind == "head":
        name = draw(st.sampled_from(sorted(set(head) - {"__metadata__"})))
        entry, field = head[name], draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone"]))
        if field == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif field == "shape":
            entry["shape"] = draw(st.sampled_from(SHAPES))
        elif field == "data_offsets":
            entry["data_offsets"] = [draw(st.sampled_from([0, 8, -1, 2**63, 10**12])) for _ in range(2)]
        else:
            moved = head.pop(name)
            if field == "name":
                head[draw(st.sampled_from(["../../x", "", "\x00", "__class__", name.upper()]))] = moved
        return join_safetensors(head, data)
    if kind == "data":
        name = draw(st.sampled_from(sorted(set(head) - {"__metadata__"})))
        start, stop = head[name]["data_offsets"]
        piece = draw(st.sampled_from(NUMERIC_BYTES))
        whole_tensor = draw(st.booleans())
        stop = stop if whole_tensor else min(stop, start + 8)
        filled = (piece * (-(-(stop - start) // len(piece))))[: stop - start]
        return join_safetensors(head, data[:start] + filled + data[stop:])
    if kind == "length":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]))) + whole[8:]
    return draw(damaged_bytes(whole))


# --- things that are no file


def _fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, outside: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # a socket's name may be 108 bytes long
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _huge(path: Path, outside: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)  # four tebibytes that take no room


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


STANDS_THERE: dict[str, Callable[[Path, Path], None]] = {
    "nothing": lambda path, outside: None,
    "an empty file": lambda path, outside: path.touch(),
    "a folder": _folder,
    "a pipe": _fifo,
    "a socket": _socket,
    "a huge file": _huge,
    "a link to nothing": lambda path, outside: path.symlink_to(outside.parent / "missing"),
    "a link to itself": lambda path, outside: path.symlink_to(path),
    "a link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a link to a file": lambda path, outside: path.symlink_to(outside),
    "a link to a folder": lambda path, outside: path.symlink_to(outside.parent),
    "another name of a file": lambda path, outside: path.hardlink_to(outside),
}


def replace(path: Path, what: str, outside: Path) -> None:
    """Put something else where a file of the run was; `outside` is a file that must stay as it is."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    STANDS_THERE[what](path, outside)


# --- what a command does meanwhile


class Hung(BaseException):
    """A command that waits for ever; no `except Exception` may catch it."""


_FORBIDDEN = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "socket.connect",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watching: list[tuple[Path, list[str]]] = []
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event in _FORBIDDEN and arguments[0] != "uname":  # `doctor` asks Python for the platform, and Python asks that
        seen.append(f"{event}{arguments}"[:300])
    elif event == "open" and not isinstance(arguments[0], int) and int(arguments[2] or 0) & _WRITES:
        _check_inside(folder, seen, event, arguments[0])
    elif event in ("os.rename", "os.link", "os.symlink"):
        _check_inside(folder, seen, event, arguments[1])
        if event == "os.rename":
            _check_inside(folder, seen, event, arguments[0])
    elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"):
        _check_inside(folder, seen, event, arguments[0])


def _check_inside(folder: Path, seen: list[str], event: str, target: Any) -> None:
    if isinstance(target, int):
        return
    path = Path(os.path.abspath(os.fsdecode(target)))  # noqa: PTH100 (the name itself: a link is not followed)
    if folder != path and folder not in path.parents and path != Path("/dev/null") and "__pycache__" not in path.parts:
        seen.append(f"{event} {path}")


@contextmanager
def guarded(folder: Path, *, seconds: int = 60, room: int = 3 << 30) -> Iterator[None]:
    """Fail if what runs inside writes outside `folder`, starts a process, unpickles, connects, hangs or eats memory."""
    global _hooked
    if not _hooked:
        import matplotlib.font_manager  # noqa: F401  (makes its folders and list of fonts on a machine that has none)

        sys.addaudithook(_audit)  # there is no way to take one off again
        atexit.register(gc.unfreeze)
        _hooked = True
    seen: list[str] = []

    def hung(number: int, frame: FrameType | None) -> None:
        raise Hung(f"nothing came back within {seconds} s")

    gc.collect()  # temporary folders that earlier tests have left to the collector are not what runs inside
    gc.freeze()  # what is alive now is not looked through again: nine tenths of an example went into that
    before = signal.signal(signal.SIGALRM, hung)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, limits[1]))
    signal.alarm(seconds)
    _watching.append((folder.absolute(), seen))
    try:
        yield
    finally:
        _watching.pop()
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    assert not seen, seen
