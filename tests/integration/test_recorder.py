"""A recording equals a brute-force cache, in one piece, in parts, and after every way to interrupt it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_sparsity import adapter as adapter_module
from neuron_sparsity.adapter import attach, load_model
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import MeasurementError, ModelError, RunFolderError
from neuron_sparsity.kernels import BackendChoice, histogram_edges
from neuron_sparsity.recorder import record
from neuron_sparsity.recording import PARTIAL
from neuron_sparsity.statistics import CONTEXT_BEFORE, CONTEXT_LENGTH, NeuronStatistics
from neuron_sparsity.store import read_tensors, write_tensors

CUTS = {"low": [0.05, 0.1], "high": [1.0, 2.0]}
COUNTS = ("zero_count", "histogram", "above_count", "n_tokens")
SUMS = ("contribution_sum", "contribution_sq_sum", "activation_sum")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_windows(n_windows: int = 7, window: int = 20, *, seed: int = 0, name: str = "random") -> Windows:
    tokens = torch.randint(3, 300, (n_windows, window), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    scored = torch.ones(n_windows, window, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens.int(), scored, name, ("d",) * n_windows, "apart", True)


def cached_activations(model: Any, windows: Windows, batch_size: int) -> Tensor:
    """Return z [layer, window, pos, neuron] of run_with_hooks, nothing of the package in between."""
    caught: dict[int, list[Tensor]] = {}
    for start in range(0, windows.n_windows, batch_size):
        hooks = [
            (
                f"blocks.{layer}.mlp.hook_post",
                lambda z, hook, layer=layer: caught.setdefault(layer, []).append(z.clone()),
            )
            for layer in range(2)
        ]
        model.run_with_hooks(windows.tokens[start : start + batch_size].long(), fwd_hooks=hooks)
    return torch.stack([torch.cat(parts) for _, parts in sorted(caught.items())])


def contributions(model: Any, z: Tensor) -> Tensor:
    norms = torch.stack([model.blocks[layer].mlp.W_out.float().norm(dim=1) for layer in range(2)])
    return z.float().abs() * norms[:, None, None]


def expected_examples(c: Tensor, n_examples: int) -> tuple[Tensor, Tensor]:
    """The largest contribution of each window beyond position 0; of those the largest, ties to the earlier window."""
    n_layers, _, window, n_neurons = c.shape
    value = torch.zeros(n_layers, n_neurons, n_examples)
    position = torch.full((n_layers, n_neurons, n_examples), -1)
    for layer in range(n_layers):
        for neuron in range(n_neurons):
            best = c[layer, :, 1:, neuron].max(dim=1)
            found = [
                (-v, w * window + p + 1) for w, (v, p) in enumerate(zip(*map(Tensor.tolist, best), strict=True)) if v
            ]
            for rank, (negative, where) in enumerate(sorted(found)[:n_examples]):
                value[layer, neuron, rank], position[layer, neuron, rank] = -negative, where
    return value, position


def assert_is_brute_force(stats: NeuronStatistics, model: Any, windows: Windows, batch_size: int) -> None:
    z = cached_activations(model, windows, batch_size)
    c = contributions(model, z)
    assert stats.n_tokens == windows.n_tokens
    assert stats.corpus == windows.describe()
    assert torch.equal(stats.zero_count, (z == 0).sum((1, 2)))
    assert torch.equal(stats.contribution_max, c.amax((1, 2)))
    for name, expected in (
        ("contribution_sum", c.double().sum((1, 2))),
        ("contribution_sq_sum", (c.double() ** 2).sum((1, 2))),
        ("activation_sum", z.double().sum((1, 2))),
    ):
        torch.testing.assert_close(getattr(stats, name), expected, rtol=2e-6, atol=2e-5)
    edges = np.append(histogram_edges().numpy(), np.inf)
    for layer, neuron in ((0, 0), (0, 17), (1, 5), (1, 63)):
        counts = np.histogram(c[layer, :, :, neuron].double().numpy(), edges)[0]
        assert stats.histogram[layer, neuron].tolist() == counts.tolist()
    for k, cuts in enumerate(CUTS.values()):
        above = c >= torch.tensor(cuts)[:, None, None, None]
        assert torch.equal(stats.above_count[..., k], above.sum((1, 2)))
    value, position = expected_examples(c, stats.example_value.shape[2])
    assert torch.equal(stats.example_value, value)
    assert torch.equal(stats.example_position, position)


def assert_same(a: NeuronStatistics, b: NeuronStatistics) -> None:
    for field in fields(NeuronStatistics):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


# --- against brute force ---


@pytest.mark.parametrize("compat", [False, True], ids=["plain", "compat"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bridge_equals_a_cache(tiny_bridge: Any, family: str, compat: bool) -> None:
    model, windows = tiny_bridge(family, compat=compat), make_windows()
    stats = record(attach(model, plain=False), windows, thresholds=CUTS, batch_size=3, n_examples=3)
    assert_is_brute_force(stats, model, windows, 3)
    assert stats.model == attach(model).info
    assert stats.threshold_names == ("low", "high")
    if family == "opt":
        assert 0.1 < float(stats.zero_count.sum()) / (2 * 64 * 140) < 0.9, "relu has exact zeros to count"


@pytest.mark.parametrize(("act_fn", "gated"), [("relu", False), ("silu", True), ("solu_ln", False)])
def test_hooked_transformer_equals_a_cache(tiny_hooked: Any, act_fn: str, gated: bool) -> None:
    model, windows = tiny_hooked(act_fn=act_fn, gated=gated), make_windows()
    stats = record(model, windows, thresholds=CUTS, batch_size=2)
    assert_is_brute_force(stats, model, windows, 2)


def test_half_precision_equals_a_cache(tiny_hf_models: Any, tiny_tokenizer: Any) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt").to(torch.bfloat16)
    model = bridge.boot_transformers("t", hf_model=hf_model, tokenizer=tiny_tokenizer, dtype=torch.bfloat16)
    windows = make_windows(3)
    stats = record(attach(model, plain=False), windows, thresholds=CUTS, batch_size=2)
    assert_is_brute_force(stats, model, windows, 2)


def test_examples_are_few_and_never_at_position_0(tiny_bridge: Any) -> None:
    model = tiny_bridge("opt")
    windows = make_windows(3)
    stats = record(model, windows, n_examples=5)
    position = stats.example_position
    assert bool((position[..., 3:] == -1).all()), "one a window, so three at most"
    assert not bool(((position >= 0) & (position % windows.window == 0)).any())
    assert bool(((stats.example_value > 0) == (position >= 0)).all())
    assert bool((stats.example_value.diff(dim=2) <= 0).all())


def test_context_is_the_text_around(tiny_bridge: Any, tiny_tokenizer: Any) -> None:
    windows = make_windows(4, 30)
    stats = record(tiny_bridge("llama"), windows, n_examples=2)
    flat = windows.tokens.flatten().tolist()
    for layer, neuron, k in ((0, 0, 0), (1, 7, 1), (1, 63, 0)):
        where = int(stats.example_position[layer, neuron, k])
        context = stats.example_context[layer, neuron, k].tolist()
        assert len(context) == CONTEXT_LENGTH
        for offset, token in enumerate(context, start=where - CONTEXT_BEFORE):
            assert token == (flat[offset] if offset // 30 == where // 30 else -1)
        assert context[CONTEXT_BEFORE] == flat[where]
    shown = {token for token in stats.example_context.flatten().tolist() if token >= 0}
    assert stats.token_strings == {token: tiny_tokenizer.decode([token]) for token in shown}


def test_batch_size_changes_no_count(tiny_bridge: Any) -> None:
    model, windows = tiny_bridge("opt"), make_windows()
    one, many = (record(model, windows, thresholds=CUTS, batch_size=size) for size in (1, 7))
    torch.testing.assert_close(one.contribution_sum, many.contribution_sum, rtol=1e-5, atol=1e-5)
    assert int((one.histogram - many.histogram).abs().sum()) <= 4, "a rounding may cross an edge"
    assert torch.equal(one.zero_count, many.zero_count)


def test_nothing_is_left_on_the_model(tiny_bridge: Any) -> None:
    model = tiny_bridge("opt")
    attach(model)

    def n_hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = n_hooks()
    record(model, make_windows(2))

    def stop(label: str, done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        record(model, make_windows(2), progress=stop)
    assert n_hooks() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- parts and disk ---


def test_merged_halves_are_the_whole(tiny_bridge: Any) -> None:
    model, windows = tiny_bridge("llama"), make_windows(8)
    whole = record(model, windows, thresholds=CUTS, batch_size=1)
    halves = [record(model, half, thresholds=CUTS, batch_size=1) for half in windows.split()]
    merged = halves[0].merge(halves[1])
    for name in COUNTS:
        assert torch.equal(torch.as_tensor(getattr(merged, name)), torch.as_tensor(getattr(whole, name))), name
    for name in SUMS:
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    for name in ("contribution_max", "example_value", "example_context", "thresholds", "w_norm"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    assert (merged.model, merged.token_strings) == (whole.model, whole.token_strings)
    for key in ("n_tokens", "scored_tokens", "n_windows", "window", "bos", "packing"):
        assert merged.corpus[key] == whole.corpus[key]


def test_merging_three_recordings_is_associative(tiny_bridge: Any) -> None:
    model = tiny_bridge("opt")
    a, b, c = (record(model, make_windows(2, seed=seed, name=f"part {seed}")) for seed in (1, 2, 3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    for name in (*COUNTS, "example_value", "example_position", "example_context", "contribution_max"):
        assert torch.equal(torch.as_tensor(getattr(left, name)), torch.as_tensor(getattr(right, name))), name
    assert left.corpus == right.corpus


def test_statistics_of_two_models_do_not_merge(tiny_bridge: Any) -> None:
    a = record(tiny_bridge("opt"), make_windows(2))
    b = record(tiny_bridge("opt", seed=1), make_windows(2, seed=1))
    with pytest.raises(ValueError, match=r"^statistics of different models: tiny-opt-test and tiny-opt-test$"):
        a.merge(b)


def test_the_folder_holds_the_result(tiny_bridge: Any, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    stats = record(tiny_bridge("gpt2"), make_windows(3), thresholds=CUTS, folder=folder, checkpoint_seconds=0)
    assert [path.name for path in folder.iterdir()] == ["statistics.safetensors"]
    assert_same(NeuronStatistics.load(folder), stats)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tiny_bridge: Any, tmp_path: Path) -> None:
    told: list[int] = []
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"file is a file; name a folder with --out$"):
        record(tiny_bridge("opt"), make_windows(2), folder=tmp_path / "file", progress=lambda *now: told.append(1))
    assert not told


def test_memory_does_not_grow_with_the_corpus(tiny_bridge: Any, tmp_path: Path) -> None:
    model, sizes = tiny_bridge("opt"), []
    for n_windows in (3, 30):
        windows = make_windows(n_windows)

        def stop(label: str, done: int, total: int) -> None:
            if done == total:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            record(model, windows, batch_size=3, folder=tmp_path / str(n_windows), checkpoint_seconds=0, progress=stop)
        sizes.append((tmp_path / str(n_windows) / PARTIAL).stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 64, "only numbers in the header grow"


# --- interrupted ---


def stopping_at(done: int, act: Callable[[], None]) -> Callable[[str, int, int], None]:
    def progress(label: str, now: int, total: int) -> None:
        if now == done:
            act()

    return progress


def test_resumed_after_an_exception(tiny_bridge: Any, tmp_path: Path) -> None:
    model, windows = tiny_bridge("llama"), make_windows()
    whole = record(model, windows, thresholds=CUTS, batch_size=2)
    options: dict[str, Any] = {"thresholds": CUTS, "folder": tmp_path, "checkpoint_seconds": 0}

    def fail() -> None:
        raise InterruptedError

    for done in (40, 80, 120):
        with pytest.raises(InterruptedError):
            record(model, windows, batch_size=2, progress=stopping_at(done, fail), **options)
        assert (tmp_path / PARTIAL).is_file()
        assert not (tmp_path / "statistics.safetensors").exists()
    told: list[int] = []
    resumed = record(model, windows, progress=lambda label, done, total: told.append(done), **options)
    assert told == [120, 140]
    assert_same(resumed, whole)
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("done", [0, 60, 140], ids=["before", "between", "after the last batch"])
def test_resumed_after_a_signal(tiny_bridge: Any, tmp_path: Path, number: signal.Signals, done: int) -> None:
    """The state is written although the last checkpoint would be due in an hour only."""
    model, windows = tiny_bridge("opt"), make_windows()
    whole = record(model, windows, batch_size=3)
    before = signal.getsignal(number)
    options: dict[str, Any] = {"folder": tmp_path, "batch_size": 3, "checkpoint_seconds": 3600}
    with pytest.raises(KeyboardInterrupt):
        record(model, windows, progress=stopping_at(done, lambda: os.kill(os.getpid(), number)), **options)
    assert signal.getsignal(number) is before
    if done == 140:
        assert_same(NeuronStatistics.load(tmp_path), whole)
    else:
        assert (tmp_path / PARTIAL).is_file()
        assert_same(record(model, windows, **options), whole)


CHILD = """
import os, signal, sys
from pathlib import Path
from neuron_sparsity.adapter import load_model
from neuron_sparsity.recorder import record
from neuron_sparsity.store import read_tensors
from neuron_sparsity.corpus import Windows

kept, _ = read_tensors(Path(sys.argv[2]))
windows = Windows(kept["tokens"], kept["scored"], "random", ("d",) * len(kept["tokens"]), "apart", True)
number, seconds, folder = int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]

def progress(label, done, total):
    print(done, flush=True)
    if done == 60:
        os.kill(os.getpid(), number)

record(load_model(sys.argv[1], device="cpu"), windows, folder=folder, batch_size=3, checkpoint_seconds=seconds,
       progress=progress)
"""


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory, tiny_hf_models: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_hf_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("number", "checkpoint_seconds"), [(signal.SIGINT, 3600), (signal.SIGTERM, 3600), (signal.SIGKILL, 0)]
)
def test_resumed_in_another_process(
    saved_model: Path, tmp_path: Path, number: signal.Signals, checkpoint_seconds: float
) -> None:
    windows = make_windows()
    write_tensors(tmp_path / "w.safetensors", {"tokens": windows.tokens, "scored": windows.scored}, {})
    run = tmp_path / "run"
    arguments = [saved_model, tmp_path / "w.safetensors", int(number), checkpoint_seconds, run]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert "KeyboardInterrupt" in done.stderr
    last = int(done.stdout.splitlines()[-1])
    assert last < windows.n_tokens
    assert [path.name for path in run.iterdir() if path.name[0] != "."] == [PARTIAL]
    model = load_model(saved_model, device="cpu")
    told: list[int] = []
    resumed = record(model, windows, folder=run, progress=lambda label, now, total: told.append(now))
    assert told[0] >= 60
    assert_same(resumed, record(model, windows, batch_size=3))


def test_signals_are_left_alone_without_a_folder_and_outside_the_main_thread(tiny_bridge: Any, tmp_path: Path) -> None:
    model, windows, handlers = tiny_bridge("opt"), make_windows(2), []

    def look(*now: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    record(model, windows, progress=look)
    thread = threading.Thread(target=lambda: record(model, windows, folder=tmp_path, progress=look))
    thread.start()
    thread.join()
    assert handlers
    assert set(handlers) == {before}
    assert (tmp_path / "statistics.safetensors").is_file()


# --- what is refused ---


@pytest.fixture
def interrupted(tiny_bridge: Any, tmp_path: Path) -> Path:
    """A folder with a recording of the tiny OPT model that stopped after three of seven windows."""

    def fail() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        record(
            tiny_bridge("opt"), make_windows(), thresholds=CUTS, batch_size=3, folder=tmp_path, checkpoint_seconds=0,
            progress=stopping_at(60, fail),
        )  # fmt: skip
    return tmp_path


def test_a_resume_that_would_mix_two_recordings(tiny_bridge: Any, interrupted: Path, monkeypatch: Any) -> None:
    model, windows, path = tiny_bridge("opt"), make_windows(), interrupted / PARTIAL
    other = rf"^{path} is of another recording; delete it to start afresh$"
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match=other):
        record(tiny_bridge("opt", seed=1), windows, thresholds=CUTS, folder=interrupted)
    with pytest.raises(RunFolderError, match=other):
        record(model, make_windows(seed=1), thresholds=CUTS, folder=interrupted)
    with pytest.raises(RunFolderError, match=other):
        record(model, windows, thresholds=CUTS, folder=interrupted, n_examples=2)
    with pytest.raises(RunFolderError, match=other):
        record(model, windows, thresholds=CUTS | {"low": [0.05, 0.2]}, folder=interrupted)
    with pytest.raises(RunFolderError, match=other):
        record(model, windows, folder=interrupted)
    with pytest.raises(
        RunFolderError, match=rf"^{path} was begun with batch size 3, not 2; leave the batch size out, or"
    ):
        record(model, windows, thresholds=CUTS, folder=interrupted, batch_size=2)
    adapter = attach(model)
    adapter.info = replace(adapter.info, dtype="bfloat16")
    with pytest.raises(RunFolderError, match=other):
        record(adapter, windows, thresholds=CUTS, folder=interrupted)
    if attach(model).plain is not None:
        with pytest.raises(RunFolderError, match=other):
            record(attach(model, plain=False), windows, thresholds=CUTS, folder=interrupted)
    with monkeypatch.context() as patch:
        patch.setattr("neuron_sparsity.kernels.choose", lambda *_: BackendChoice("triton", "pretended"))
        with pytest.raises(RunFolderError, match=other):
            record(model, windows, thresholds=CUTS, folder=interrupted)
    assert path.read_bytes() == before, "a refusal changes nothing"
    record(model, windows, thresholds=CUTS, folder=interrupted, batch_size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.pop("next_window"), "KeyError: 'next_window'"),
        (lambda tensors, header: header.update(next_window="x"), "ValueError: "),
        (lambda tensors, header: header.update(next_window=8), "ValueError: next_window is 8 of 7"),
        (lambda tensors, header: header.update(batch_size=0), "ValueError: next_window is 3 of 7, batch_size 0"),
        (lambda tensors, header: tensors.pop("maximum"), "KeyError: 'maximum'"),
        (
            lambda tensors, header: tensors.update(histogram=tensors["histogram"][..., :1]),
            "ValueError: histogram is torch.int64 [64, 1], not torch.int64 [64, 64]",
        ),
        (lambda tensors, header: tensors.update(maximum=tensors["maximum"].double()), "ValueError: maximum is torch.f"),
        (lambda tensors, header: tensors["maximum"].fill_(math.nan), "ValueError: maximum is NaN"),
        (
            lambda tensors, header: tensors["nonzero_count"].add_(99),
            "ValueError: nonzero_count has counts outside",
        ),
        (
            lambda tensors, header: tensors["example_position"].add_(60),
            "ValueError: example_position is outside",
        ),
    ],
)
def test_a_damaged_state(tiny_bridge: Any, interrupted: Path, change: Callable[..., Any], message: str) -> None:
    path = interrupted / PARTIAL
    tensors, header = read_tensors(path)
    change(tensors, header)
    write_tensors(path, tensors, header)
    with pytest.raises(RunFolderError) as caught:
        record(tiny_bridge("opt"), make_windows(), thresholds=CUTS, folder=interrupted)
    assert str(caught.value).startswith(f"{path} is damaged ({message}")
    assert "\n" not in str(caught.value)


def test_a_state_that_was_cut_off(tiny_bridge: Any, interrupted: Path) -> None:
    path = interrupted / PARTIAL
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunFolderError, match=rf"^{path} cannot be read \(SafetensorError: "):
        record(tiny_bridge("opt"), make_windows(), thresholds=CUTS, folder=interrupted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": {"x": [1.0]}}, "thresholds 'x' must have 2 numbers, one a layer, got 1"),
        ({"thresholds": {"x": [1.0, -1.0]}}, "thresholds 'x' must be >= 0, got [1.0, -1.0]"),
        ({"thresholds": {"x": [math.nan, 1.0]}}, "thresholds 'x' must be >= 0, got [nan, 1.0]"),
        ({"n_examples": -1}, "n_examples must be >= 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
    ],
)
def test_arguments_that_cannot_be(tiny_bridge: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        record(tiny_bridge("opt"), make_windows(2), **options)
    assert str(caught.value) == message


def test_weights_that_are_not_finite_are_refused_at_once(tiny_hf_models: Any, tiny_tokenizer: Any) -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    hf_model = tiny_hf_models("opt")
    hf_model.model.decoder.layers[1].fc1.weight[0, 0] = math.nan
    model = bridge.boot_transformers("tiny", hf_model=hf_model, tokenizer=tiny_tokenizer)
    with pytest.raises(ModelError, match=r"^layer 1: weights or post-activations are NaN or infinite; load intact"):
        record(model, make_windows(2))


def test_nan_at_one_token_names_the_layer_and_the_windows(tiny_bridge: Any) -> None:
    """The batch on which the model was checked did not hold it: the recording notices."""
    model, windows = tiny_bridge("opt"), make_windows(6)
    adapter = attach(model)

    def spoil(z: Tensor, hook: Any) -> Tensor:
        spoilt = z.clone()
        spoilt[0, 3, 7] = math.inf
        return spoilt

    model.add_hook("blocks.1.mlp.hook_post", spoil)
    expected = r"^layer 1: post-activations are NaN or infinite in windows 0 to 1; check the weights, or use --dtype"
    with pytest.raises(MeasurementError, match=expected):
        record(adapter, windows, batch_size=2)


def test_a_model_without_a_tokenizer_is_recorded_without_strings(tiny_bridge: Any) -> None:
    model = tiny_bridge("opt")
    model.tokenizer = None
    assert record(model, make_windows(2)).token_strings == {}


def test_the_probe_of_the_adapter_is_no_part_of_a_recording(tiny_bridge: Any) -> None:
    """Attaching runs the model on tokens of its own; they must not be counted."""
    model, windows = tiny_bridge("opt"), make_windows(2)
    assert adapter_module._probe_tokens(model).numel() > 0
    assert int(record(model, windows).histogram.sum()) == 2 * 64 * windows.n_tokens
