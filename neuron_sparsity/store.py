"""The run folder: tensors as safetensors, everything else as JSON, written atomically, never pickle.

A folder belongs to one run: one model, one corpus. `run.json` says which, and every file names its schema version.
A file is written beside its place and then moved there, so that a kill at any moment leaves the old file or the new
one, never half of one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from neuron_sparsity.errors import RunFolderError

__all__ = [
    "SCHEMA",
    "RunFolder",
    "decode",
    "make_folder",
    "provenance",
    "read_json",
    "read_tensors",
    "to_json_text",
    "write_bytes",
    "write_json",
    "write_tensors",
]

SCHEMA = 1
_KINDS = ("I64", "F64", "F32", "I32", "F16", "I16", "U8", "I8", "BOOL")  # in the order in which they are written
_PACKAGES = (
    "neuron_sparsity",
    "torch",
    "triton",
    "transformer_lens",
    "transformers",
    "numpy",
    "safetensors",
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
        make_folder(self.path)
        if (self.path / "run.json").exists():
            self._check_same(read_json(self.path / "run.json"))
        elif any(entry.name[0] != "." for entry in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} holds other files and no run.json; name an empty or new folder with --out"
            )
        else:
            write_json(self.path / "run.json", self.request)

    def _check_same(self, found: dict[str, Any]) -> None:
        for key, value in self.request.items():
            if found.get(key) != value:
                raise RunFolderError(
                    f"{self.path} holds another run ({key}: {_brief(found.get(key))}, not {_brief(value)}); "
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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist; the step that writes it has not run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({_reason(error)}); delete it and run the step that writes it again"
        ) from error
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

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist; the step that writes it has not run") from None
    except (OSError, ValueError, KeyError, SafetensorError, RecursionError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({_reason(error)}); delete it and run the step that writes it again"
        ) from error
    _check_schema(path, header.get("schema") if isinstance(header, dict) else None)
    return tensors, header


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
    except OSError as error:
        raise RunFolderError(_cannot_write(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def decode(path: Path, build: Callable[[], Any]) -> Any:
    """Build a result from a file's content; what does not fit becomes a one-line error that names the file.

    Raises:
        RunFolderError: If a key is missing or a value has the wrong type.
    """
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunFolderError(
            f"{path} is damaged ({_reason(error)}); delete it and run the step that writes it again"
        ) from error


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


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
