"""One process a run: the same study, started twice in one folder, must not write the same checkpoints twice."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.store import make_folder

__all__ = ["alone"]

_LOCK = ".lock"
_PATIENCE_SECONDS = 5.0
"""How long a folder that is held is waited for: processes that were told to end a moment ago need a while to."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against other processes while the context is open; on Windows nothing is held.

    The system lets go of it when the process ends, however it ends: a kill leaves nothing that must be removed by hand.

    Args:
        folder: The folder; made if it is not there.
        what: What an error calls it.

    Raises:
        RunFolderError: If another process holds it, or it cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> with alone(pathlib.Path(tempfile.mkdtemp()), "run a"):
        ...     pass
    """
    make_folder(folder)
    with (folder / _LOCK).open("a+", encoding="utf-8") as file:
        until = time.monotonic() + _PATIENCE_SECONDS
        while not _taken(file):
            if time.monotonic() > until:
                file.seek(0)
                raise RunFolderError(
                    f"{what} in {folder} is held by another process ({file.read(200).strip() or 'unnamed'}); "
                    "let it end, or end it, or name another folder with --out"
                )
            time.sleep(0.1)
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    """Take the lock of an open file; return whether it could be had, or there are none here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
