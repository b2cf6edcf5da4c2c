"""The run folder: tensors as safetensors, everything else as JSON, written atomically, never pickle.

A folder belongs to one run: one model, one corpus. `run.json` says which, and every file names its schema version.
A file is written beside its place and then moved there, so that a kill at any moment leaves the old file or the new
one, never half of one. What a kill leaves beside it is hidden, never read, and removed once it is an hour old.

What is read may have been damaged or planted: only regular files of a size a run can have are opened, JSON must hold
what this package writes, and no value of a file ever becomes a path, a template or code.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from neuron_sparsity.advice import difference, writer
from neuron_sparsity.errors import RunFolderError

__all__ = [
    "SCHEMA",
    "RunFolder",
    "blaming",
    "decode",
    "make_folder",
    "parse_header",
    "provenance",
    "read_bytes",
    "read_json",
    "read_tensors",
    "to_json_text",
    "write_bytes",
    "write_json",
    "write_tensors",
]

SCHEMA = 1
_MAX_JSON_BYTES = 1 << 29  # the removable neurons of a model of 70B take a tenth of it
_MAX_DEPTH = 32
_LEFTOVER = re.compile(r"\.(\w+\.)+\w{8}", re.ASCII)  # what `mkstemp` names after a file of a run
_LEFTOVER_SECONDS = 3600  # a file that is being written is younger
_KINDS = ("I64", "F64", "F32", "I32", "F16", "I16", "U8", "I8", "BOOL")  # in the order in which they are written
_PACKAGES = (
    "neuron_sparsity",
    "torch",
    "triton",
    "transformer_lens",
    "transformers",
    "numpy",
    "safetensors",
    "pyarrow",
    "circuitsvis",
)


def provenance(*, seed: int = 0, command: str | None = None) -> dict[str, Any]:
    """Return what is needed to run a measurement again: versions, seed and command.

    Example:
        >>> sorted(provenance(command="neuron-sparsity record"))
        ['command', 'seed', 'versions']
    """
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "seed": seed, "command": _own_command() if command is None else command}


def _own_command() -> str:
    """The command line, if it is this package's; `python` for scripts and notebooks, whose arguments are their own."""
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.stem == "neuron-sparsity" or program.resolve() == Path(__file__).with_name("__main__.py").resolve()
    return shlex.join(["neuron-sparsity", *sys.argv[1:]]) if ours else "python"


class RunFolder:
    """One run on disk.

    Args:
        path: The folder; made if it is not there.
        request: What the run is about (model, corpus, options); None opens a folder that must exist.

    Raises:
        RunFolderError: If the folder cannot be written, holds another run or foreign files, or is damaged or newer.
    """

    def __init__(self, path: str | Path, request: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        if request is None:
            if not self.has("run.json"):
                raise RunFolderError(
                    f"{self.path} is no run folder (it has no run.json); name a folder made by `record`"
                )
            self.request = read_json(self.path / "run.json")
            return
        self.request = json.loads(json.dumps(_finite(dict(request))))
        known = os.path.lexists(self.path / "run.json")
        if not known and self.path.is_dir() and any(entry.name[0] != "." for entry in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} holds other files and no run.json; name an empty or new folder with --out"
            )
        make_folder(self.path)
        if known:
            self._check_same(read_json(self.path / "run.json"))
            _sweep(self.path)
        else:
            write_json(self.path / "run.json", self.request)

    def _check_same(self, found: dict[str, Any]) -> None:
        for key, value in self.request.items():
            if found.get(key) != value:
                raise RunFolderError(
                    f"{self.path} holds another run ({difference(found.get(key), value, key)}); "
                    "name another folder with --out"
                )

    def file(self, name: str) -> Path:
        """Return the path of a file of this run."""
        return self.path / name

    def has(self, name: str) -> bool:
        """Return whether a file of this run is there."""
        return os.path.isfile(self.file(name))  # noqa: PTH113 (False, and no error, if it may not be looked at)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with its schema version; NaN and infinity become null.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    text = json.dumps({"schema": SCHEMA} | _finite(dict(data)), indent=1, allow_nan=False)
    write_bytes(path, text.encode())


def to_json_text(data: Mapping[str, Any]) -> str:
    """Return a JSON object as text, with the schema version; NaN and infinity become null.

    Example:
        >>> to_json_text({"ppl": float("nan")})
        '{"schema": 1, "ppl": null}'
    """
    return json.dumps({"schema": SCHEMA} | _finite(dict(data)), allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of this package.

    Raises:
        RunFolderError: If it is missing, damaged, no object, or of a newer schema.
    """
    with _readable(path, _MAX_JSON_BYTES):
        data = _parse(path.read_text(encoding="utf-8"))
    _check_schema(path, data.get("schema") if isinstance(data, dict) else None)
    return data


def write_tensors(path: Path, tensors: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    text = json.dumps({"schema": SCHEMA} | _finite(dict(header)), allow_nan=False)
    _write(path, _safetensors({name: value.contiguous().numpy() for name, value in tensors.items()}, {"header": text}))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read tensors and header of a file that `write_tensors` wrote.

    Raises:
        RunFolderError: If it is missing, damaged or of a newer schema.
    """
    from safetensors import SafetensorError, safe_open

    readable = _readable(path, _memory_bytes(), KeyError, AttributeError, SafetensorError)
    with readable, safe_open(path, framework="pt") as file:
        header = _parse((file.metadata() or {})["header"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    _check_schema(path, header.get("schema") if isinstance(header, dict) else None)
    return tensors, header


def read_bytes(path: Path) -> bytes:
    """Read a file of a run whole.

    Raises:
        RunFolderError: If it is missing, no regular file, or larger than memory.
    """
    with _readable(path, _memory_bytes()):
        return path.read_bytes()


def parse_header(path: Path, text: bytes) -> dict[str, Any]:
    """Parse the JSON object that a file of another format carries.

    Raises:
        RunFolderError: If it is damaged, no object, or of a newer schema.
    """
    data = decode(path, lambda: _parse(text.decode()))
    _check_schema(path, data.get("schema") if isinstance(data, dict) else None)
    return dict(data)


@contextmanager
def _readable(path: Path, max_bytes: int, *errors: type[Exception]) -> Iterator[None]:
    """Say in one line why a file cannot be read. Pipes, which may wait for ever, and huge files are not opened."""
    unreadable: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError, *errors)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no file")
        if found.st_size > max_bytes:
            raise OSError(f"{found.st_size:,} bytes are more than the {max_bytes:,} that it may have here")
        yield
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist; the step that writes it has not run{writer(path.name)}") from None
    except unreadable as error:
        raise RunFolderError(
            f"{path} cannot be read ({_reason(error)}); delete it and run the step that writes it again"
        ) from error


def _memory_bytes() -> int:
    """Return the size of this machine's memory: tensors that do not fit it are no recording that was made here."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return sys.maxsize


def _parse(text: str) -> Any:
    """Parse JSON as `write_json` writes it: finite numbers that a float holds, and no deep nesting.

    Raises:
        ValueError: If it is anything else.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number in JSON")

    data = json.loads(text, parse_constant=refuse)
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inner = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if any(
            isinstance(child, int | float) and not -sys.float_info.max <= child <= sys.float_info.max for child in inner
        ):
            raise ValueError("a number is too large")
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return data
    raise ValueError(f"more than {_MAX_DEPTH} levels of nesting")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        RunFolderError: If it cannot be written (no permission, disk full).
    """
    _write(path, [data])


def _safetensors(arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[Any]:
    """Yield the pieces of a safetensors file: byte for byte what the library writes, without a copy of the tensors.

    `safetensors.torch.save` holds the whole file in memory, and `save_file` has a temporary file of its own beside
    the one it is given, which a kill would leave there.
    """
    kinds = {
        name: "BOOL" if array.dtype.kind == "b" else f"{array.dtype.kind.upper()}{8 * array.itemsize}"
        for name, array in arrays.items()
    }
    order = sorted(arrays, key=lambda name: (_KINDS.index(kinds[name]), name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        shape, start = list(arrays[name].shape), end
        end += arrays[name].nbytes
        entries[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from (arrays[name].reshape(-1) for name in order)


def _write(path: Path, pieces: Iterable[Any]) -> None:
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunFolderError(_cannot_write(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk too, so that what is removed next cannot be gone before they are there."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove what killed processes left: unfinished files, hidden beside their places."""
    for entry in path.iterdir():
        if not _LEFTOVER.fullmatch(entry.name):
            continue
        with suppress(FileNotFoundError):  # another process moved its file to its place meanwhile
            found = entry.lstat()
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _LEFTOVER_SECONDS:
                entry.unlink()


@contextmanager
def blaming(
    path: Path, said: str = "is damaged", mend: str = "delete it and run the step that writes it again"
) -> Iterator[None]:
    """Turn what wrong content raises into one line: `PATH SAID (why); MEND`.

    Raises:
        RunFolderError: If a key is missing, or a value has the wrong type or size.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunFolderError(f"{path} {said} ({_reason(error)}); {mend}") from error


def decode(path: Path, build: Callable[[], Any]) -> Any:
    """Build a result from a file's content; what does not fit becomes a one-line error that names the file.

    Raises:
        RunFolderError: If a key is missing, or a value has the wrong type or size.
    """
    with blaming(path):
        return build()


def _check_schema(path: Path, schema: Any) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise RunFolderError(f"{path} is no file of neuron_sparsity (no schema number); name a folder made by `record`")
    if schema > SCHEMA:
        raise RunFolderError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}; `pip install -U neuron-sparsity`"
        )


def make_folder(path: Path) -> None:
    """Make a folder, or prove that the one that is there can be written to: before hours of work, not after them.

    Raises:
        RunFolderError: If it cannot be made or written to, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(dir=path, prefix=".probe.")
        os.close(descriptor)
        Path(probe).unlink()
    except FileExistsError:
        raise RunFolderError(f"{path} is a file; name a folder with --out") from None
    except OSError as error:
        raise RunFolderError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{path} cannot be written: the disk is full; free some space or name another folder with --out"
    return f"{path} cannot be written ({error.strerror or error}); name another folder with --out"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
