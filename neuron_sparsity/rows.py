"""Rows of a Hugging Face data set, streamed: as many as the wanted tokens need, and what was read is told.

A row is tokenised when it arrives and its text forgotten, so memory holds about the tokens that are wanted.

1. A data set on the hub is read from its start until its rows hold at least 2 MiB of text *and* the wanted tokens (or
   32 characters for each of them, where rows are too short to fill windows). Windows are spread evenly over those rows.
2. A data set on this disk (a folder of up to a gigabyte), or one that the hub says is small (up to 32 MiB), is read to
   its end, and an evenly spaced part of its rows is kept: whenever twice of what is needed has come together, every
   other row is dropped, and from then on every second, fourth, ... row is taken.

`DataSet.sampling` says which it was. No code that comes with a data set is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity.errors import CorpusError
from neuron_sparsity.sources import Cutter, Document, kind, reason

__all__ = ["DataSet", "Need", "read_data_set", "stream_texts"]

_SMALL_BYTES = 2**25
_LOCAL_BYTES = 2**30


@dataclass(frozen=True)
class DataSet:
    """What was read of a data set.

    Attributes:
        name: `hf:NAME:CONFIG:SPLIT`, with the split that was taken.
        documents: The rows that were kept, tokenised.
        sampling: Which rows these are, in words.
    """

    name: str
    documents: list[Document]
    sampling: str


@dataclass(frozen=True)
class Need:
    """How much of a data set is needed.

    Attributes:
        tokens: Tokens that windows can be cut from.
        chars: Characters to read at least, so that a few windows are not all from the first rows.
        most_chars: Characters at which to stop, whatever they hold.
        packed: Whether rows are joined; else only whole windows of a row count.
    """

    tokens: int
    chars: int
    most_chars: int
    packed: bool

    def usable(self, document: Document, cutter: Cutter) -> int:
        """Tokens of a row that windows can be cut from."""
        n = 0 if document.tokens is None else len(document.tokens)
        return n + 1 if self.packed else n // cutter.body * cutter.body

    def met(self, chars: int, tokens: int, times: int = 1) -> bool:
        """Whether so much is enough, `times` over."""
        return (chars >= times * self.chars and tokens > times * self.tokens) or chars >= times * self.most_chars


def read_data_set(source: str, column: str, cutter: Cutter, need: Need) -> DataSet:
    """Return rows of a data set that are enough, or all there are.

    Args:
        source: `hf:NAME[:CONFIG[:SPLIT]]`; NAME may be a folder.
        column: The column that holds the text.
        cutter: Tokenises the rows.
        need: What is enough.

    Raises:
        CorpusError: If it cannot be read, or the split or column is not there.
        ValueError: If `source` has another form.
    """
    with _opened(source, ("test", "train")) as (path, config, split, rows):
        whole = _is_small(path, rows, split)
        documents, sampling = _sample(_texts(rows, column, source), cutter, need, whole=whole)
    return DataSet(f"hf:{path}:{config}:{split}", documents, sampling)


def stream_texts(source: str, column: str) -> Iterator[str]:
    """Yield the text of every row of a data set that holds some, in its order: of the split `train`, if none is named.

    Args:
        source: `hf:NAME[:CONFIG[:SPLIT]]`; NAME may be a folder.
        column: The column that holds the text.

    Raises:
        CorpusError: If it cannot be read, or the split or column is not there.
        ValueError: If `source` has another form.
    """
    with _opened(source, ("train",)) as (_, _, _, rows):
        for _, text in _texts(rows, column, source):
            yield text


@contextmanager
def _opened(source: str, usual: Sequence[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Open a data set; what goes wrong while its rows are read is a CorpusError.

    Args:
        source: `hf:NAME[:CONFIG[:SPLIT]]`.
        usual: Splits to take if none is named, the first that is there; else the data set's first.

    Yields:
        Name, configuration, split and the split's rows.
    """
    path, config, split = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    if not path or source.count(":") > 3:
        raise ValueError(f"a data set is named hf:NAME[:CONFIG[:SPLIT]], got {source!r}")
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f'{source} needs the package datasets: pip install -e ".[hf]" in the clone') from error
    options: dict[str, Any] = {"streaming": True}
    if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:  # datasets < 4
        options["trust_remote_code"] = False
    try:
        splits: Any = datasets.load_dataset(path, config or None, **options)
        split = split or next((known for known in usual if known in splits), next(iter(splits)))
        if split not in splits:
            raise CorpusError(f"{source} has no split {split!r}; pass one of: {', '.join(splits)}")
        yield path, config, split, splits[split]
    except CorpusError:
        raise
    except Exception as error:  # datasets raises anything: ConnectionError, ValueError, RuntimeError, of the hub's own
        raise CorpusError(
            f"cannot read {source}: {reason(error)}; check its name and the network, or pass a file"
        ) from error


def _is_small(path: str, rows: Any, split: str) -> bool:
    """Return whether a data set is read to its end: it is on this disk, or the hub says that it is small."""
    folder = Path(path)
    if folder.exists():
        sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return sum(sizes) <= _LOCAL_BYTES
    known = getattr(getattr(getattr(rows, "info", None), "splits", None) or {}, "get", lambda name: None)(split)
    n_bytes = getattr(known, "num_bytes", None)
    return n_bytes is not None and 0 < n_bytes <= _SMALL_BYTES


def _texts(rows: Iterable[Any], column: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield `(row, text)` of the rows that hold text."""
    for index, row in enumerate(rows):
        if column not in row:
            raise CorpusError(f"{source} has no column {column!r}; pass column= one of: {', '.join(row)}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(f"column {column!r} of {source} holds {kind(text)}; pass column= one of text")
        if text and text.strip():
            yield index, text


def _sample(texts: Iterator[tuple[int, str]], cutter: Cutter, need: Need, *, whole: bool) -> tuple[list[Document], str]:
    """Return the rows that are kept, and which they are, in words."""
    kept: list[Document] = []
    stride, chars, tokens, n_rows, ended = 1, 0, 0, 0, True
    for index, text in texts:
        n_rows += 1
        if (n_rows - 1) % stride:
            continue
        kept.append(_row(index, text, cutter))
        chars, tokens = chars + len(text), tokens + need.usable(kept[-1], cutter)
        if not whole and need.met(chars, tokens):
            ended = next(texts, None) is None  # one row further: "the first n rows" is not said of all
            break
        while whole and len(kept) > 1 and need.met(chars, tokens, times=2):
            kept, stride = kept[::2], 2 * stride
            chars = sum(document.size for document in kept)
            tokens = sum(need.usable(document, cutter) for document in kept)
    if not ended:
        return (
            kept,
            f"windows evenly spaced over the first {n_rows:,} rows with text; the rows after them were not read",
        )
    part = "" if stride == 1 else f", of which {len(kept):,}, evenly spaced, were taken"
    return kept, f"windows evenly spaced over all {n_rows:,} rows with text{part}"


def _row(index: int, text: str, cutter: Cutter) -> Document:
    document = Document.of_text(f"row {index}", text)
    pieces = cutter.encode(document, len(text), 1)
    return Document(document.name, len(text), _gone, torch.cat(pieces) if len(pieces) > 1 else pieces[0])


def _gone(start: int, stop: int) -> str:
    raise AssertionError("the text of a row is not kept")
