"""Which backend runs: `auto` chooses by the device, one asked for by name runs or says why it cannot."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from neuron_sparsity import kernels
from neuron_sparsity.kernels import BackendChoice, StatisticsState, choose
from neuron_sparsity.kernels import backend as backends
from tests.kernels.oracles import Backend

Z, W_NORM, W_OUT = torch.ones(2, 3), torch.ones(3), torch.ones(3, 4)
CALLS = {
    "neuron_statistics": lambda name: kernels.neuron_statistics(Z, W_NORM, StatisticsState.zeros(3), backend=name),
    "tail_error": lambda name: kernels.tail_error(Z, W_NORM, W_OUT, torch.ones(1), backend=name),
    "threshold_mask": lambda name: kernels.threshold_mask(Z.clone(), W_NORM, 0.5, backend=name),
    "contribution_topk": lambda name: kernels.contribution_topk(Z, W_NORM, 1, backend=name),
}
on_every_op = pytest.mark.parametrize("op", list(CALLS))


class NotRun:
    """Stands for a module whose ops must not be called."""

    def __getattr__(self, op: str) -> None:
        raise AssertionError(f"{op} ran")


def test_every_op_with_a_choice_is_tried_here() -> None:
    assert set(CALLS) == set(kernels.OPS)


def test_auto_is_torch_on_the_cpu_though_kernels_could_be_interpreted() -> None:
    assert choose("cpu") == choose(torch.device("cpu"), "auto") == BackendChoice("torch", "tensors on cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_triton_on_cuda() -> None:
    assert choose("cuda") == BackendChoice("triton", "tensors on cuda")


def test_what_was_asked_for_is_what_runs(backend: Backend) -> None:
    assert choose(backend.device, backend.name).name == backend.name
    module = backends.implementation("threshold_mask", torch.device(backend.device), backend.name)
    expected = {"torch": "neuron_sparsity.kernels.reference", "triton": "neuron_sparsity.kernels.triton.threshold_mask"}
    assert module.__name__ == expected[backend.name]


@on_every_op
def test_torch_on_the_cpu_and_auto_call_no_kernel(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(backends.importlib, "import_module", imported.append)
    CALLS[op]("torch")
    CALLS[op]("auto")
    assert imported == []


@on_every_op
def test_triton_never_falls_back_to_torch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "reference", NotRun())
    with pytest.raises(AssertionError, match=f"{op} ran"):
        CALLS[op]("torch")
    monkeypatch.setattr(backends, "_version", lambda: None)
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    with pytest.raises(ValueError, match="backend 'triton' cannot run: triton is not installed"):
        CALLS[op]("triton")


@on_every_op
def test_triton_on_the_cpu_says_that_it_needs_cuda(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        CALLS[op]("triton")
    assert str(caught.value) == (
        "backend 'triton' cannot run: it needs CUDA tensors and these are on cpu "
        "(TRITON_INTERPRET=1 runs them on the CPU, to test); use backend='auto' or 'torch'"
    )


def test_the_version_of_triton_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of an op asks for it, and it is read from disk."""
    backends._version.cache_clear()
    asked: list[str] = []
    monkeypatch.setattr(backends.metadata, "version", lambda name: asked.append(name) or "3.9.0")
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    for _ in range(3):
        choose("cpu", "triton")
    backends._version.cache_clear()
    assert asked == ["triton"]


@on_every_op
def test_an_unknown_backend_is_named_with_the_known_ones(op: str) -> None:
    with pytest.raises(ValueError, match=r"^backend must be one of auto, torch, triton, got 'cuda'$"):
        CALLS[op]("cuda")


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_devices_are_torch_and_no_kernels_even_interpreted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    assert choose(device) == BackendChoice("torch", f"tensors on {device}")
    with pytest.raises(ValueError, match=f"it needs CUDA tensors and these are on {device}"):
        choose(device, "triton")


@pytest.mark.parametrize(
    ("interpreted", "version", "capability", "reason"),
    [
        (False, None, (9, 0), "triton is not installed"),
        (True, "3.9.0", (9, 0), "TRITON_INTERPRET is set"),
        (False, "3.9.0", (7, 5), "it needs compute capability 8.0, Tesla T4 has 7.5"),
    ],
)
def test_auto_on_cuda_says_why_it_is_torch(
    interpreted: bool, version: str | None, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a GPU that is only pretended, so that this is seen without one."""
    monkeypatch.setattr(backends, "_interpreted", lambda: interpreted)
    monkeypatch.setattr(backends, "_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    chosen = choose("cuda")
    assert chosen.name == "torch"
    assert reason in chosen.reason
    assert choose("cuda", "torch") == BackendChoice("torch", "asked for")
    with pytest.raises(ValueError, match=reason):
        choose("cuda", "triton")


def test_interpretation_is_settled_when_kernels_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(backends.sys.modules, "neuron_sparsity.kernels.triton.common", raising=False)
    for value, expected in {"1": True, "true": True, "on": True, "0": False, "": False}.items():
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert backends._interpreted() is expected
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    common = importlib.import_module("neuron_sparsity.kernels.triton.common")
    monkeypatch.setenv("TRITON_INTERPRET", "0" if common.INTERPRETED else "1")
    assert backends._interpreted() is common.INTERPRETED
