"""What is read of a streamed data set: to its end where it is small or on this disk, else only as far as needed."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from neuron_sparsity import corpus as corpus_module
from neuron_sparsity import rows as rows_module
from neuron_sparsity.corpus import Windows, load_corpus
from neuron_sparsity.rows import Need, stream_texts
from neuron_sparsity.sources import Cutter, Document

WORDS = "w1 w2 w3 w4"


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    return SimpleNamespace(tokenizer=tiny_tokenizer, cfg=SimpleNamespace(n_ctx=16, d_vocab=300))


@pytest.fixture
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_READ_BYTES", 400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two hundred rows, each with its own number in it, in two files."""
    for part in range(2):
        lines = [json.dumps({"text": f"row {100 * part + row} of all, {WORDS}"}) for row in range(100)]
        (tmp_path / f"part-{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def load(source: Any, model: Any, n_windows: int, **options: Any) -> Windows:
    return load_corpus(f"hf:{source}", model, n_ctx=16, n_tokens=16 * n_windows, **options)


def row_numbers(windows: Windows) -> list[int]:
    return [int(name.removeprefix("row ")) for name in windows.documents]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The real library, offline."""
    real = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(real.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("few_bytes", "local")
@pytest.mark.parametrize("packed", [True, False])
def test_a_folder_is_sampled_to_its_end(folder: Path, model: Any, packed: bool) -> None:
    windows = load(folder, model, 8, packed=packed)
    assert windows.n_windows == 8
    taken = row_numbers(windows)
    assert taken == sorted(taken)
    assert taken[0] < 40
    assert taken[-1] > 160
    gaps = [right - left for left, right in itertools.pairwise(taken)]
    assert max(gaps) <= 2 * min(gaps) + 8, "evenly spaced"
    assert windows.sampling.startswith("windows evenly spaced over all 200 rows with text, of which ")
    assert windows.describe()["sampling"] == windows.sampling
    assert windows.split()[0].sampling == windows.sampling
    assert load(folder, model, 8, packed=packed).sha256 == windows.sha256


@pytest.mark.usefixtures("local")
def test_a_folder_that_is_needed_whole_is_taken_whole(folder: Path, model: Any) -> None:
    windows = load(folder, model, 10_000)
    assert windows.sampling == "windows evenly spaced over all 200 rows with text"
    decoded = "".join(model.tokenizer.decode(row) for row in windows.tokens)
    assert all(f"row {row} of all" in decoded.replace("<s>", "") for row in range(199))


@pytest.mark.usefixtures("few_bytes", "local")
def test_a_folder_that_is_too_large_is_read_from_its_start(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_LOCAL_BYTES", 100)
    windows = load(folder, model, 4)
    n_read = -(-400 // len(f"row 0 of all, {WORDS}"))
    assert row_numbers(windows)[-1] < n_read
    expected = f"windows evenly spaced over the first {n_read} rows with text; the rows after them were not read"
    assert windows.sampling == expected


# --- a stand-in for the hub


class Rows:
    """A split: its rows, how many were asked for, and what the hub says of its size."""

    def __init__(self, texts: Iterator[str], num_bytes: int | None = None) -> None:
        self.texts, self.n_read = texts, 0
        self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_bytes=num_bytes)})

    def __iter__(self) -> Iterator[dict[str, str]]:
        for text in self.texts:
            self.n_read += 1
            yield {"text": text}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`hub(rows)`: what `hf:set` gives from now on."""
    fake: Any = ModuleType("datasets")
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)

    def offer(rows: Rows) -> Rows:
        fake.load_dataset = lambda path, name=None, *, streaming: {"train": rows}
        return rows

    return offer


def endless(text: str = WORDS) -> Iterator[str]:
    while True:
        yield text


@pytest.mark.usefixtures("few_bytes")
@pytest.mark.parametrize(("n_windows", "n_rows"), [(2, 37), (60, None)])
def test_the_hub_is_read_as_far_as_the_tokens_need(hub: Any, model: Any, n_windows: int, n_rows: int | None) -> None:
    """Two windows are spread over 400 characters; sixty take what they need, and nothing is left over."""
    rows = hub(Rows(endless()))
    windows = load("set", model, n_windows)
    assert windows.n_windows == n_windows
    per_row = len(model.tokenizer(WORDS)["input_ids"]) + 1  # and EOS
    needed = n_rows or -(-(n_windows * 16 + 1) // per_row)
    assert abs(rows.n_read - 1 - needed) <= 1
    assert windows.sampling.endswith("; the rows after them were not read")


@pytest.mark.usefixtures("few_bytes")
def test_rows_that_fill_no_window_do_not_read_the_hub_empty(hub: Any, model: Any) -> None:
    rows = hub(Rows(endless("w")))
    with pytest.raises(corpus_module.CorpusError, match="shorter than a window"):
        load("set", model, 2, packed=False)
    assert rows.n_read <= 32 * 2 * 16 + 1


@pytest.mark.usefixtures("few_bytes")
@pytest.mark.parametrize("num_bytes", [None, 10_000])
def test_what_the_hub_says_is_small_is_read_to_its_end(hub: Any, model: Any, num_bytes: int | None) -> None:
    rows = hub(Rows(iter([WORDS] * 300), num_bytes))
    windows = load("set", model, 2)
    if num_bytes is None:
        assert rows.n_read < 50
        assert "the rows after them were not read" in windows.sampling
    else:
        assert rows.n_read == 300
        assert windows.sampling.startswith("windows evenly spaced over all 300 rows with text, of which ")


@pytest.mark.usefixtures("few_bytes")
def test_a_stream_that_ends_where_it_is_enough_was_read_whole(hub: Any, model: Any) -> None:
    n_rows = -(-400 // len(WORDS))
    hub(Rows(iter([WORDS] * n_rows + ["", " "])))
    assert load("set", model, 2).sampling == f"windows evenly spaced over all {n_rows} rows with text"


@pytest.mark.parametrize(("n_rows", "whole"), [(3000, True), (None, False)])
def test_memory_holds_what_is_needed(
    model: Any, n_rows: int | None, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many rows that are read to their end no more than twice the need is kept, and of no row the text."""
    cutter = Cutter.of(model.tokenizer, 16, None, 300)
    need = Need(tokens=1000, chars=400, most_chars=10**6, packed=True)
    made: list[weakref.ref[Document]] = []
    make, most = rows_module._row, 0

    def watched(*arguments: Any) -> Document:
        document = make(*arguments)
        made.append(weakref.ref(document))
        return document

    def texts() -> Iterator[tuple[int, str]]:
        nonlocal most
        for index in itertools.count() if n_rows is None else range(n_rows):
            yield index, WORDS
            most = max(most, sum(reference() is not None for reference in made))

    monkeypatch.setattr(rows_module, "_row", watched)
    documents, _ = rows_module._sample(texts(), cutter, need, whole=whole)
    per_row = need.usable(documents[0], cutter)
    assert need.tokens < per_row * len(documents)
    assert most <= (2 if whole else 1) * (need.tokens // per_row + 2)
    with pytest.raises(AssertionError, match="not kept"):
        documents[0].read(0, 5)


def test_no_code_of_a_data_set_is_run_by_older_datasets(hub: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before version 4 they asked, or ran it: whoever reads rows says no."""
    hub(Rows(iter([])))
    asked: list[bool] = []

    def load_dataset(path: str, name: str | None = None, *, streaming: bool, trust_remote_code: bool = True) -> Any:
        asked.append(trust_remote_code)
        return {"train": Rows(iter([WORDS] * 50))}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(list(stream_texts("hf:set", "text"))) == 50
    assert load("set", model, 2).n_windows == 2
    assert asked == [False, False]


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
def test_a_stream_is_named_as_a_data_set_is(source: str) -> None:
    with pytest.raises(ValueError, match="a data set is named hf:NAME"):
        next(stream_texts(source, "text"))
