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

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_sparsity.errors import CorpusError
from neuron_sparsity.rows import Need, read_data_set
from neuron_sparsity.sources import BUILT_IN, Cutter, Document, open_source
from neuron_sparsity.windows import Windows, evenly

__all__ = ["BUILT_IN", "Windows", "load_corpus", "windows_from_text"]

_DEFAULT_N_CTX = 512
_READ_BYTES = 2**21
_READ_BYTES_PER_TOKEN = 32  # a token is about 4 bytes of English: eight times what is needed
_READ_BYTES_PER_DOCUMENT = 2**18


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
        model: Anything with `tokenizer`, `cfg.n_ctx` and `cfg.d_vocab`; or an adapter of it (`attach`).
        n_tokens: Tokens to measure, BOS included, rounded down to whole windows. If the text holds fewer windows, all
            are taken: `Windows.n_tokens` tells how many tokens that made.
        n_ctx: Tokens per window, BOS included; the smaller of the model's `n_ctx` and 512 by default.
        prepend_bos: Whether windows start with BOS; by default whether the tokenizer itself puts one before a text.
        packed: Whether to join documents with EOS; by default only the rows of a data set, which may be one line each.
        column: Column of a data set that holds the text.

    Raises:
        CorpusError: If the source cannot be found or read, is too short, or the tokenizer does not fit the model.
        TypeError: If `model` is a name, or the arguments are in the other order.
        ValueError: If `n_ctx` or `n_tokens` cannot work here, or the tokenizer lacks the BOS or EOS asked for.

    Example:
        >>> model = load_model("smollm2-135m")  # doctest: +SKIP
        >>> load_corpus("sotu", model)  # doctest: +SKIP
        Windows('sotu': 32 windows x 512 tokens, 16352 scored, apart, with BOS, sha256 ...)
    """
    if isinstance(model, str | Path):
        if not isinstance(source, str | Path | list | tuple):
            raise TypeError(f"load_corpus takes the text first and then the model: load_corpus({str(model)!r}, model)")
        raise TypeError(f"model must be a model, got the name {str(model)!r}; ns.load_model({str(model)!r}) loads one")
    if not hasattr(model, "tokenizer"):
        model = getattr(model, "model", model)  # of an adapter
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
    taken = torch.cat([bodies[i][evenly(len(bodies[i]), share)] for i, share in zip(kept, shares, strict=True)])
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
    for index in evenly(len(documents), n_chosen):
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
    taken = evenly(n_bodies, min(n_windows, n_bodies))
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


def _visiting_order(n: int, n_first: int) -> list[int]:
    """Return every index below `n`: `n_first` evenly spaced ones, then the rest so that any beginning is spread too."""
    first = evenly(n, n_first)
    n_bits = n.bit_length()
    return first + sorted(set(range(n)) - set(first), key=lambda index: f"{index:0{n_bits}b}"[::-1])


def _share(n: int, capacities: Sequence[int]) -> list[int]:
    """Return how many each gives so that together they give `n`, as evenly as their capacities allow."""
    shares = [0] * len(capacities)
    left = min(n, sum(capacities))
    while left:
        able = [index for index, capacity in enumerate(capacities) if shares[index] < capacity]
        each = left // len(able)
        for index in able if each else (able[position] for position in evenly(len(able), left)):
            given = min(max(each, 1), capacities[index] - shares[index])
            shares[index] += given
            left -= given
    return shares
