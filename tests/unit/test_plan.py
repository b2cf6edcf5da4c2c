"""Memory, disk and time of a plan: by hand, against the tensors that are really made, and in the documentation."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from benchmarks import memory, pages, plan_table
from neuron_sparsity.adapter import attach
from neuron_sparsity.blueprint import draw
from neuron_sparsity.footprint import Footprint
from neuron_sparsity.perplexity import default_batch_size
from neuron_sparsity.plan import plan, plan_for
from neuron_sparsity.recorder import record
from neuron_sparsity.recording import Recording

STACK = Footprint(n_layers=2, d_mlp=48, d_model=16, n_ctx=32, batch_size=4)


def tiny_llama() -> Any:
    return hf.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )


def test_a_neuron_takes_612_bytes_while_it_is_recorded_and_1092_when_done() -> None:
    """64 bins, a count and three sums of 8 bytes; maximum and norm; 5 examples of 4 + 8 bytes, then of 24 tokens."""
    assert STACK.state == 2 * 48 * (64 * 8 + 4 * 8 + 4 + 4 + 5 * 12)
    assert STACK.result == 2 * 48 * (64 * 8 + 4 * 8 + 4 + 4 + 5 * 12 + 5 * 24 * 4)
    assert STACK.activations == 4 * 32 * 48 * 4


def test_state_and_file_are_those_of_a_recording(tmp_path: Path) -> None:
    stack, windows = memory.SyntheticStack(2, 48), memory.synthetic_windows(256, 32)
    cuts = {"a": [0.5, 0.5], "b": [1.0, 1.0]}
    footprint = Footprint(2, 48, 0, 32, 4, n_cuts=2)
    recording = Recording(stack, windows, cuts, 5)
    held = sum(tensor.nbytes for tensor in recording._stacked().values()) + sum(norm.nbytes for norm in stack.w_norms)
    assert held == footprint.state
    stats = record(stack, windows, thresholds=cuts, folder=tmp_path, batch_size=4)
    assert list(stats.example_context.shape[2:]) == [5, 24]
    on_disk = (tmp_path / "statistics.safetensors").stat().st_size
    assert 0 < on_disk - footprint.result - stats.thresholds.nbytes < 8192  # the header; thresholds are no neuron's


def test_weights_peak_and_time_by_hand() -> None:
    made = plan_for(draw(tiny_llama(), name="tiny"), n_tokens=1000, n_ctx=32, batch_size=4, dtype="bfloat16")
    n = 2 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16) + 2 * 100 * 16 + 16
    assert (made.model.n_parameters, made.weights_bytes) == (n, 2 * n)
    assert (made.n_tokens, made.batch_size, made.n_neurons) == (992, 4, 96)
    assert made.dense_pass_flop == 2 * (n - 100 * 16) * 992
    assert made.peak_bytes == max(step.peak_bytes for step in made.steps) > made.weights_bytes + made.statistics_bytes
    assert made.run_folder_bytes == made.result_bytes + 992 * 5
    assert [step.name for step in made.steps] == ["record", "sparsity", "ablate"]


def test_one_device_holds_all_and_two_hold_half_of_the_blocks_each() -> None:
    made = plan_for(draw(tiny_llama(), name="tiny"), n_tokens=1000, n_ctx=32, batch_size=1, device="cuda")
    assert made.peak_on(1) == made.peak_bytes
    half = (4 * made.model.n_stack_parameters + made.statistics_bytes) // 2
    assert made.peak_on(2) == made.peak_bytes - half
    assert made.n_devices(made.peak_bytes) == 1
    assert made.n_devices(made.peak_bytes - 1) == 2
    assert made.n_devices(1000) is None


def test_batch_is_what_a_run_takes_where_memory_is_no_limit(
    tiny_bridge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("neuron_sparsity.perplexity")
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1e12)
    adapter = attach(tiny_bridge("llama"))
    made = plan_for(draw(tiny_llama(), name="tiny"), n_tokens=10_000, n_ctx=64)
    assert made.batch_size == default_batch_size(adapter, 64)
    assert plan_for(made.model, n_tokens=128, n_ctx=64).batch_size == 2  # no more than there are


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
        ({"device": "abacus"}, "device must be such as cpu or cuda, got 'abacus'"),
        ({"n_ctx": 1}, "n_ctx must be at least 2, got 1"),
        ({"n_ctx": 4096}, "n_ctx must be at most the model's 2048, got 4096"),
        ({"n_tokens": 100, "n_ctx": 128}, "100 tokens do not fill a window of 128"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        plan(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("step", "page", "pattern"),
    [
        ("record", "docs/measured.md", r"^\| `record`.*?\| ([\d.]+) F"),
        ("sparsity", "docs/measured.md", r"^\| CETT-PPL-1% search.*?\| ([\d.]+) F"),
        ("ablate", "docs/scale.md", r"that of `ablate` is ([\d.]+) F"),
    ],
)
def test_times_are_those_of_the_page_that_is_named(step: str, page: str, pattern: str, repository: Path) -> None:
    found = re.search(pattern, (repository / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    steps = {step.name: step for step in plan_for(draw(tiny_llama(), name="tiny"), n_ctx=32).steps}
    assert steps[step].dense_passes == float(found[1])
    assert "measured on smollm2-135m" in steps[step].source
    assert page in steps[step].source


def test_table_in_the_documentation_is_what_is_computed() -> None:
    shown = pages.shown(plan_table.PAGE.read_text(encoding="utf-8"), plan_table.NAME)
    assert shown == plan_table.table(), "python -m benchmarks.plan_table --write"


def test_published_shapes_have_their_published_parameters() -> None:
    published = {"Llama 3.2 1B": 1.24, "Llama 2 7B": 6.74, "Llama 3.1 8B": 8.03, "Llama 2 13B": 13.02}
    published |= {"OPT 30B": 29.97, "Llama 3.1 70B": 70.55}
    found = {made.model.name: round(made.model.n_parameters / 1e9, 2) for made in plan_table.plans()}
    assert found == published


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel tells no peak of a process")
def test_memory_of_a_recording_is_constant_and_what_the_plan_says() -> None:
    """A stack of 16 x 8,192, where the state is most of it; `benchmarks/memory.py` does 32 x 14,336."""
    shape = ("--layers", 16, "--width", 8192, "--n-ctx", 128, "--batch-size", 2)
    expected = Footprint(16, 8192, 0, 128, 2).recording

    def peak(n_tokens: int) -> float:
        """The least of a few processes: what the allocator happens to keep only adds, up to a tenth at times."""
        found: list[float] = []
        while len(found) < 4 and (not found or min(found) > 1.04 * expected):
            found.append(memory.in_fresh_process(*shape, "--tokens", n_tokens)["peak"])
        return min(found)

    peaks = [peak(n_tokens) for n_tokens in (256, 1024)]
    assert peaks == pytest.approx([expected, expected], rel=0.1)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
