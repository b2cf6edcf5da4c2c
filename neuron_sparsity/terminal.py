"""What the command line does to its terminal: errors in one line, no control characters, no foreign noise."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from neuron_sparsity.errors import NeuronSparsityError
from neuron_sparsity.parallel import launched

__all__ = ["given", "keep_freed_memory", "one_flag_a_text", "one_line_errors", "prepare", "printable"]

DEBUG = "NEURON_SPARSITY_DEBUG"
_MAX_CHARACTERS = 600
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_MANY = ("--text", "--calibration", "--rules", "--compare", "--neurons")
_SEVERAL_P = ("sparsity", "ablate", "pareto")
_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare() -> None:
    """Set the process up for a command: other libraries' notes off, every character printable, freed memory kept.

    With NEURON_SPARSITY_DEBUG set, notes and warnings stay.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get(DEBUG):
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # Without a handler, Python prints the warnings that libraries log.
    logging.getLogger().addHandler(logging.NullHandler())


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every error into one red line and exit code 1, an interruption into one line and exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _complain("interrupted; the same command goes on from what is in the run folder")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            _complain(_in_words(error))
            raise typer.Exit(1) from None

    return wrapped


def printable(text: str) -> str:
    r"""Return text that cannot move the cursor or colour the terminal: control characters are escaped.

    Example:
        >>> print(printable(chr(27) + "[31mred" + chr(10)))
        \x1b[31mred\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _in_words(error: Exception) -> str:
    name, text = type(error).__name__, str(error).strip()
    if isinstance(error, NeuronSparsityError):
        return text or name
    lowered = text.lower()
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or any(sign in lowered for sign in _OUT_OF_MEMORY):
        return "out of memory; lower --batch-size or --n-ctx, or use a smaller model or --dtype bfloat16"
    if isinstance(error, ValueError) and text:
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = text.splitlines()[0] if text else ""
    return f"unexpected {name}: {first}; {DEBUG}=1 shows where"


def _complain(message: str) -> None:
    rank, size = launched()
    message = message if size == 1 else f"rank {rank} of {size}: {message}"
    line = printable(" ".join(message.split()))
    if len(line) > _MAX_CHARACTERS:
        line = f"{line[: _MAX_CHARACTERS // 2]} ... {line[-_MAX_CHARACTERS // 2 :]}"
    typer.secho(f"error: {line}", fg="red" if sys.stderr.isatty() else None, err=True)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system after every large tensor.

    Measured on two cores: a forward pass of smollm2-135m takes three quarters of the time, since its pages need not
    be zeroed again and again. Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return


def one_flag_a_text(arguments: list[str]) -> list[str]:
    """Let one `--text` take all that follows up to the next option: `--text a b` becomes `--text a --text b`.

    So do `--calibration`, `--rules`, `--compare` and `--neurons`; and `--p` takes all numbers that follow, where there
    may be several.
    """
    expanded: list[str] = []
    flag, values = "", 0
    several = _MANY + (("--p",) if arguments and arguments[0] in _SEVERAL_P else ())
    for argument in arguments:
        if argument.startswith("-"):
            flag, values = (argument if argument in several else ""), 0
        elif flag == "--p" and values and not _is_number(argument):
            flag = ""  # MODEL may come next
        elif flag:
            expanded += [flag] if values else []
            values += 1
        expanded.append(argument)
    return expanded


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def given(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line, and is no default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
