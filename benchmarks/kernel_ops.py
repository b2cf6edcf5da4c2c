"""What the kernel benchmark measures: each op beside the plain torch expression it replaces, and the check of both.

The plain expressions are what a user would write. `fault` compares any of them, and the kernels, with the torch
backend: nothing is timed that is not right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.kernels import Backend, StatisticsState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
D_MODEL = {1536: 576, 3072: 768, 8192: 2048, 14336: 4096, 28672: 8192}  # SmolLM2, GPT-2, Llama 3 at 1B, 8B and 70B
N_THRESHOLDS = 16
SLICE = 256  # last tokens of an input, where outputs of a token are compared

# Sums and norms; everything else is an integer or rounded once, and has to be equal.
INEXACT = {"activation_sum", "contribution_sum", "contribution_sq_sum", "error", "full"}
TOLERANCE = {"triton": 1e-4, "fp32": 1e-4, "bf16": 2e-2}  # of a kernel; of the plain expression in a dtype

Found = dict[str, Tensor]


class Inputs(NamedTuple):
    """What an op is given."""

    z: Tensor
    w_norm: Tensor
    w_out: Tensor
    cuts: Tensor


class Op(NamedTuple):
    """An op, the expression it replaces, and what both are measured by.

    Both return their outputs by name; those in `by_token` have tokens in that dimension. `n_bytes` must move in any
    implementation.
    """

    run: Callable[[Inputs, Backend], Found]
    plain: Callable[[Inputs], Found]
    n_bytes: Callable[[Inputs], int]
    by_token: dict[str, int] = {}  # noqa: RUF012, a NamedTuple's default is not shared state: nobody writes to it
    n_flop: Callable[[Inputs], int] = lambda given: 0
    speedup_bar: float = 0.0
    share_bar: float = 0.0


def statistics_run(given: Inputs, backend: Backend) -> Found:
    state = StatisticsState.zeros(given.z.shape[1], device=given.z.device)
    found = {"maximum": kernels.neuron_statistics(given.z, given.w_norm, state, backend=backend)}
    names = ("nonzero_count", "histogram", "activation_sum", "contribution_sum", "contribution_sq_sum")
    return found | {name: getattr(state, name) for name in names}


def statistics_plain(given: Inputs) -> Found:
    z, n_neuron, n_bins = given.z, given.z.shape[1], kernels.N_BINS
    c = z.abs() * given.w_norm
    edges = kernels.histogram_edges()[1:].to(device=z.device, dtype=torch.float32)
    place = torch.bucketize(c, edges, right=True) + torch.arange(n_neuron, device=z.device) * n_bins
    histogram = torch.zeros(n_neuron * n_bins, dtype=torch.int64, device=z.device)
    histogram.scatter_add_(0, place.flatten(), torch.ones_like(histogram[:1]).expand(place.numel()))
    return {
        "maximum": c.amax(dim=0),
        "nonzero_count": (z != 0).sum(dim=0),
        "histogram": histogram.view(n_neuron, n_bins),
        "activation_sum": z.sum(dim=0, dtype=torch.float32),
        "contribution_sum": c.sum(dim=0),
        "contribution_sq_sum": (c * c).sum(dim=0),
    }


def tail_run(given: Inputs, backend: Backend) -> Found:
    error, active, full = kernels.tail_error(*given, backend=backend)
    return {"error": error, "active": active, "full": full}


def tail_plain(given: Inputs) -> Found:
    c = given.z.abs() * given.w_norm
    error, active = [], []
    for cut in given.cuts:
        tail = given.z * (c < cut)
        error.append(torch.linalg.vector_norm(tail @ given.w_out, dim=1, dtype=torch.float32))
        active.append((c >= cut).sum())
    full = torch.linalg.vector_norm(given.z @ given.w_out, dim=1, dtype=torch.float32)
    return {"error": torch.stack(error), "active": torch.stack(active), "full": full}


def mask_run(given: Inputs, backend: Backend) -> Found:
    active = kernels.threshold_mask(given.z, given.w_norm, float(given.cuts[8]), backend=backend)
    return {"active": active, "z": given.z}


def mask_plain(given: Inputs) -> Found:
    cut = given.z.abs() * given.w_norm < given.cuts[8]
    return {"active": (~cut).sum(dim=1), "z": given.z.masked_fill_(cut, 0.0)}


def topk(k_of: Callable[[int], int]) -> Op:
    """The k weakest neurons of each token; which of several equal ones torch takes is open: only values compare."""

    def run(given: Inputs, backend: Backend) -> Found:
        k = k_of(given.z.shape[1])
        return dict(zip(("values", "indices"), kernels.contribution_topk(*given[:2], k, backend=backend), strict=True))

    def plain(given: Inputs) -> Found:
        return {"values": (given.z.abs() * given.w_norm).topk(k_of(given.z.shape[1]), largest=False).values}

    def n_bytes(given: Inputs) -> int:
        return given.z.nbytes + len(given.z) * k_of(given.z.shape[1]) * 12

    return Op(run, plain, n_bytes, {"values": 0, "indices": 0}, speedup_bar=5.0)


OPS = {
    "neuron_statistics": Op(
        statistics_run, statistics_plain, lambda given: given.z.nbytes, speedup_bar=4.0, share_bar=0.8
    ),
    "contribution_topk_eighth": topk(lambda n_neuron: n_neuron // 8),
    "contribution_topk_64": topk(lambda n_neuron: min(64, n_neuron)),
    "tail_error": Op(
        tail_run,
        tail_plain,
        lambda given: given.z.nbytes + given.w_out.nbytes + 4 * (N_THRESHOLDS + 1) * len(given.z),
        {"error": 1, "full": 0},
        lambda given: 2 * (N_THRESHOLDS + 1) * given.z.numel() * given.w_out.shape[1],
        speedup_bar=3.0,
    ),
    "threshold_mask": Op(
        mask_run, mask_plain, lambda given: 2 * given.z.nbytes + 8 * len(given.z), {"active": 0, "z": 0}
    ),
}


def inputs(n_token: int, d_mlp: int, d_model: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Post-activations like those of a gated MLP, some exactly zero, with weights, and thresholds among them."""
    torch.manual_seed(seed)
    gate = torch.randn(n_token, d_mlp, device=device, dtype=dtype)
    z = torch.nn.functional.silu(gate).mul_(torch.randn_like(gate)).masked_fill_(gate < -2.0, 0.0)
    w_out = torch.randn(d_mlp, d_model, device=device, dtype=dtype).mul_(torch.rand(d_mlp, 1, device=device) + 0.5)
    w_norm = w_out.float().norm(dim=1)
    c = (z[:SLICE].float().abs() * w_norm).flatten()[: 1 << 20]
    return Inputs(z, w_norm, w_out, c.quantile(torch.linspace(0.1, 0.9, N_THRESHOLDS, device=device)))


def fault(op: Op, run: Callable[[Inputs], Found], given: Inputs, tolerance: float) -> str | None:
    """Compare what `run` returns with the torch backend; return what is wrong, or None.

    Totals are compared over all tokens, outputs of a token on the last ones. `tolerance` is of the largest number.
    """
    expected = op.run(given._replace(z=given.z.clone()), "torch")  # clones: threshold_mask writes in place
    for name, mine in run(given._replace(z=given.z.clone())).items():
        true, dim = expected[name], op.by_token.get(name)
        if dim is not None:
            first = max(0, true.shape[dim] - SLICE)
            mine, true = (x.narrow(dim, first, x.shape[dim] - first) for x in (mine, true))
        if mine.shape != true.shape:
            return f"{name} is {list(mine.shape)}, not {list(true.shape)}"
        if name not in INEXACT:
            if n_wrong := int((mine != true).sum()):
                return f"{name}: {n_wrong} of {true.numel()} differ"
        elif not (off := float((mine.double() - true).abs().max() / true.double().abs().max())) <= tolerance:
            return f"{name}: off by {off:.1e} of the largest, {tolerance:.0e} allowed"
    return None


def checked(label: str, op: Op, dtype: str, given: Inputs, runs: dict[str, Callable[[Inputs], Found]]) -> bool:
    """Whether everything in `runs` computes what the torch backend does; what does not is printed."""
    wrong = {name: fault(op, run, given, TOLERANCE.get(name, TOLERANCE[dtype])) for name, run in runs.items()}
    for name, text in wrong.items():
        if text is not None:
            print(f"{label} {name}: WRONG, and therefore not timed: {text}", flush=True)
    return not any(wrong.values())
