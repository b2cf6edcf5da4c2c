"""The backends that every test of an op runs on, and memory that shows what was never written."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tests.kernels.oracles")

from tests.kernels.oracles import Backend  # noqa: E402 (its assertions have to be rewritten first)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(Backend("torch", "cpu", n_examples=50), id="torch-cpu"),
        pytest.param(Backend("triton", "cpu", n_examples=5), id="triton-interpreted"),
        pytest.param(Backend("torch", "cuda", n_examples=20), id="torch-cuda", marks=pytest.mark.gpu),
        pytest.param(Backend("triton", "cuda", n_examples=20), id="triton-cuda", marks=pytest.mark.gpu),
    ],
)
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.param
    if found.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if found.name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if found.name == "triton" and (os.environ.get("TRITON_INTERPRET") == "1") != found.interpreted:
        pytest.skip("kernels are either compiled or interpreted in one process, as TRITON_INTERPRET says")
    return found


@pytest.fixture
def tune(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`tune(op, NAME=value)`: other block sizes in the op's kernel file for this test; torch has none."""

    def set_sizes(op: str, **sizes: Any) -> None:
        if backend.name == "triton":
            module = importlib.import_module(f"neuron_sparsity.kernels.triton.{op}")
            for name, size in sizes.items():
                monkeypatch.setattr(module, name, size)

    return set_sizes


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN and absurd integers, so that an output that is not written is noticed."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory: torch.Tensor = plain(*args, **kwargs)
        return memory.fill_(math.nan if memory.is_floating_point() else -(10**9) - 7)

    monkeypatch.setattr(torch, "empty", poisoned)
