"""`CurveRecorder` on a real model's layers: what is not finite is named, whichever backend runs."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
import torch

from neuron_sparsity.adapter import attach
from neuron_sparsity.curves import CurveRecorder
from neuron_sparsity.errors import MeasurementError

CUTS = np.array([[0.1], [0.1]])


@pytest.mark.parametrize("cuts", [CUTS, CUTS[:, :0]], ids=["one threshold", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_layer_that_is_not_finite_is_named(tiny_bridge: Any, backend: Any, bad: float, cuts: np.ndarray) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not interpreted:
        pytest.skip("the model is on the CPU, where kernels can only be interpreted")
    recorder = CurveRecorder(attach(tiny_bridge("llama")), cuts, backend=backend)
    z = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    recorder.on_post(0, z)
    recorder.on_post(1, z)
    assert recorder.curves().n_tokens == 6
    z[1, 2, 7] = bad
    with np.errstate(invalid="ignore"):  # numpy's, in which kernels are interpreted
        recorder.on_post(1, z)
    with pytest.raises(MeasurementError, match=r"^layer 1: post-activations are NaN or infinite"):
        recorder.curves()
