"""The text of a study: documents -> a tokenizer, packed windows to train on, and windows that are never trained on.

1. Every `heldout_every`-th document is held out. Where there are few documents, passages of them stand in their place.
2. A byte-level BPE tokenizer is trained on the documents that are not.
3. These are joined with the end-of-document token into one stream of token ids, `train.bin`, as long as the training
   needs; window i is the i-th stretch of it. Nothing of it is in memory.
4. Windows of the held-out documents are what every checkpoint is measured on.

`data.json` is written last: a folder without it is prepared anew.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuron_sparsity.corpus import Windows, windows_from_text
from neuron_sparsity.errors import CorpusError
from neuron_sparsity.parallel import launched
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.rows import stream_texts
from neuron_sparsity.sources import Document, open_source
from neuron_sparsity.store import read_json, read_tensors, write_json, write_tensors
from neuron_sparsity.study.alone import alone
from neuron_sparsity.study.config import StudyConfig

__all__ = ["END", "StudyText", "TokenRows", "documents", "prepare"]

END = "<|endoftext|>"
_PASSAGE_BYTES = 2**14
_PIECE_BYTES = 2**22
_BATCH = 64  # documents that are tokenised together
_HELDOUT_CHARS_PER_TOKEN = 32  # a token is 2 to 5 characters: several times what is needed
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class StudyText:
    """The text of a study, ready to be trained on.

    Attributes:
        folder: Where it lies.
        tokenizer: The tokenizer.
        heldout: Windows to measure on.
        n_windows: Windows to train on.
        window: Tokens of each.
        facts: What a result must say about it: source, numbers of documents and tokens, hashes.
    """

    folder: Path
    tokenizer: Any
    heldout: Windows
    n_windows: int
    window: int
    facts: dict[str, Any]

    def rows(self) -> TokenRows:
        """Return the windows to train on."""
        return TokenRows(self.folder / "train.bin", self.facts["dtype"], self.n_windows, self.window)


class TokenRows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Windows of a file of token ids, as the Trainer takes them; read from the disk as they are needed.

    Args:
        path: The file.
        dtype: `uint16` or `uint32`.
        n_windows: How many windows.
        window: Tokens of each.
    """

    def __init__(self, path: Path, dtype: str, n_windows: int, window: int) -> None:
        self.tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(n_windows, window))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": row, "labels": row.clone()}


def prepare(config: StudyConfig, folder: Path, progress: Progress | None = None) -> StudyText:
    """Return the text of a study; it is read and tokenised where `folder` does not hold it yet.

    Of several processes the first does that, and the others wait.

    Raises:
        CorpusError: If the text cannot be read, or is too short for the steps or for measuring.
    """
    from transformers import AutoTokenizer

    path = folder / "data.json"
    if launched()[0] > 0:
        while not path.is_file():
            time.sleep(_WAIT_SECONDS)
    elif not path.is_file():
        with alone(folder, "the text"):
            if not path.is_file():  # else whoever held it has made it
                _prepare(config, folder, progress)
    facts = read_json(path)
    tensors, header = read_tensors(folder / "heldout.safetensors")
    names = tuple(header["documents"])
    heldout = Windows(
        tensors["tokens"], tensors["scored"].bool(), header["name"], names, "packed", header["bos"], header["sampling"]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return StudyText(folder, tokenizer, heldout, facts["train_windows"], config.text.window, facts)


def documents(config: StudyConfig) -> tuple[str, Iterator[tuple[str, str]]]:
    """Return the name of the text and its documents `(name, text)`, the same ones in the same order each time.

    Speeches and files come in an order that was drawn once and for all; a data set in its own.
    """
    plan = config.text
    source = plan.source[0] if len(plan.source) == 1 else list(plan.source)
    if isinstance(source, str) and source.startswith("hf:"):
        return source, ((f"row {i}", text) for i, text in enumerate(stream_texts(source, plan.column)))
    name, found = open_source(source)
    parts = [(document, *ends) for document in found for ends in _parts(document, len(found) < 2 * plan.heldout_every)]
    random.Random(0).shuffle(parts)
    return name, ((f"{part.name}@{start}", part.read(start, stop)) for part, start, stop in parts)


def _parts(document: Document, cut: bool) -> Iterator[tuple[int, int]]:
    each = _PASSAGE_BYTES if cut else _PIECE_BYTES
    starts = range(0, document.size, each)
    return ((start, min(start + each, document.size)) for start in starts)


def _prepare(config: StudyConfig, folder: Path, progress: Progress | None) -> None:
    name, texts = documents(config)
    tokenizer = _train_tokenizer(config, (text for _, _, text in _split(config, texts, heldout=False)))
    tokenizer.save_pretrained(folder / "tokenizer")
    needed = config.training.steps * config.tokens_per_step
    heldout: list[tuple[str, str]] = []
    wanted = _HELDOUT_CHARS_PER_TOKEN * config.text.measure_tokens

    def training() -> Iterator[str]:
        kept = 0
        for index, title, text in _split(config, documents(config)[1]):
            if not _is_heldout(config, index):
                yield text
            elif kept < wanted:
                heldout.append((title, text))
                kept += len(text)

    facts = _write_tokens(training(), tokenizer, folder, needed, progress)
    if facts["train_tokens"] < needed:
        plan = config.training
        raise CorpusError(
            f"{name} has {facts['train_tokens']:,} tokens to train on, and {plan.steps:,} steps of "
            f"{config.tokens_per_step:,} tokens need {needed:,}; give more text with --text, or lower training.steps"
        )
    windows = _heldout_windows(config, name, heldout, tokenizer)
    header = windows.describe() | {"documents": list(windows.documents)}
    write_tensors(folder / "heldout.safetensors", {"tokens": windows.tokens, "scored": windows.scored}, header)
    facts |= {"source": name, "vocab": len(tokenizer), "train_windows": needed // config.text.window}
    facts |= {"heldout_documents": len(heldout), "heldout": windows.describe()}
    write_json(folder / "data.json", facts)


def _split(
    config: StudyConfig, texts: Iterable[tuple[str, str]], *, heldout: bool = True
) -> Iterator[tuple[int, str, str]]:
    """Yield (index, name, text); without those that are held out, if they are not wanted."""
    for index, (title, text) in enumerate(texts):
        if text.strip() and (heldout or not _is_heldout(config, index)):
            yield index, title, text


def _is_heldout(config: StudyConfig, index: int) -> bool:
    every = config.text.heldout_every
    return index % every == every // 2


def _train_tokenizer(config: StudyConfig, texts: Iterator[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    left = config.text.tokenizer_megabytes * 1e6

    def some() -> Iterator[str]:
        nonlocal left
        for text in texts:
            if left <= 0:
                return
            left -= len(text)
            yield text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.text.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(some(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, model_max_length=config.text.window
    )


def _write_tokens(
    texts: Iterator[str], tokenizer: Any, folder: Path, needed: int, progress: Progress | None
) -> dict[str, Any]:
    """Write the stream of token ids, up to what is needed, and return what it is."""
    dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
    end, digest, n_tokens, n_documents = tokenizer.eos_token_id, hashlib.sha256(), 0, 0
    with (folder / "train.bin").open("wb") as file:
        for batch in iter(lambda: list(itertools.islice(texts, _BATCH)), []):
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                taken = np.array([*ids, end], dtype=np.dtype(dtype).newbyteorder("<"))[: needed - n_tokens]
                file.write(taken.tobytes())
                digest.update(taken.tobytes())
                n_tokens, n_documents = n_tokens + len(taken), n_documents + (len(taken) > 0)
            if progress:
                progress("tokens", n_tokens, needed)
            if n_tokens >= needed:
                break
    return {
        "dtype": dtype,
        "train_tokens": n_tokens,
        "train_documents": n_documents,
        "train_sha256": digest.hexdigest(),
        "end_token": END,
    }


def _heldout_windows(config: StudyConfig, name: str, heldout: list[tuple[str, str]], tokenizer: Any) -> Windows:
    plan = config.text
    mend = "lower text.measure_tokens or text.heldout_every, or give more text with --text"
    if not heldout:
        raise CorpusError(f"{name} has too few documents to hold every {plan.heldout_every}th out; {mend}")
    windows = windows_from_text(
        heldout,
        tokenizer,
        name=f"{name}[held-out]",
        n_tokens=plan.measure_tokens,
        n_ctx=plan.window,
        packed=True,
        d_vocab=plan.vocab,
    )
    if windows.n_windows < plan.measure_tokens // plan.window:
        raise CorpusError(
            f"the text held out of {name} has {windows.n_tokens:,} tokens in whole windows, and "
            f"{plan.measure_tokens:,} are to be measured on; {mend}"
        )
    return windows
