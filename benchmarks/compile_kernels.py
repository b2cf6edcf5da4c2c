"""Compile every kernel ahead of time, without a GPU, and report registers, spills and shared memory.

For sm_80 (A100) and sm_90 (H100), each dtype, and the shapes of real models that the launchers would choose. Exit code
1 if a kernel does not compile or spills registers to memory.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from neuron_sparsity.kernels.triton import contribution_topk, neuron_statistics, tail_error, threshold_mask

ARCHITECTURES = (80, 90)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {
    "active_ptr": "i64",
    "cut_ptr": "fp32",
    "square_ptr": "fp32",
    "below_ptr": "i64",
    "selected_ptr": "i64",
    "value_ptr": "fp32",
    "index_ptr": "i64",
    "sum_ptr": "fp64",
    "maximum_ptr": "fp32",
    "histogram_ptr": "i64",
    "nonzero_ptr": "i64",
    "above_ptr": "i64",
    "w_norm_ptr": "fp32",
}


class Case(NamedTuple):
    """One kernel as it would be launched."""

    op: str
    shape: str
    dtype: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]


class Use(NamedTuple):
    """What one compiled kernel takes of a streaming multiprocessor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def cases() -> Iterator[Case]:
    """Every kernel, dtype and block size that the launchers choose for d_mlp 1,536 to 65,536."""
    for name, dtype in DTYPES.items():
        for d_mlp in (1536, 8192, 14336, 28672, 65536):
            launch = contribution_topk.select_options(d_mlp) | {"LARGEST": False}
            yield split("contribution_topk select", f"d_mlp {d_mlp}", name, contribution_topk.select_kernel, launch)
        for d_mlp in (1536, 14336):
            launch = threshold_mask.launch_options(d_mlp)
            yield split("threshold_mask", f"d_mlp {d_mlp}", name, threshold_mask.threshold_mask_kernel, launch)
        launch = {"UPCAST": False} | tail_error.blocks(dtype)
        yield split("tail_error", "any", name, tail_error.tail_error_kernel, launch)
        for n_cuts in (0, 1, 4):
            launch = {"N_CUTS": n_cuts, **neuron_statistics.LAUNCH}
            yield split(
                "neuron_statistics", f"{n_cuts} thresholds", name, neuron_statistics.neuron_statistics_kernel, launch
            )
    for k in (1, 64, 512, contribution_topk.MAX_SORT):
        launch = contribution_topk.sort_options(k) | {"LARGEST": False}
        yield split("contribution_topk sort", f"k {k}", "i64", contribution_topk.sort_kernel, launch)


def split(op: str, shape: str, dtype: str, kernel: Any, launch: dict[str, Any]) -> Case:
    """A case whose constants and options come in one dictionary, as they are launched."""
    options = {key: value for key, value in launch.items() if key in ("num_warps", "num_stages", "enable_fp_fusion")}
    return Case(op, shape, dtype, kernel, {key: launch[key] for key in launch if key not in options}, options)


def compiled(case: Case, architecture: int) -> Use:
    """Compile one kernel and ask `ptxas` what it takes."""
    signature: dict[str, str] = {}
    constants = dict(case.constants)
    divisible: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("stride_neuron", "stride_w_model"):  # 1 in a contiguous tensor, and then known to the compiler
            signature[name], constants[name] = "constexpr", 1
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, case.dtype)
            divisible[(position,)] = [["tt.divisibility", 16]]
        elif name == "threshold":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith(("stride", "n_neuron", "d_model")):
                divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options=dict(case.options))
    return resources(kernel.asm["ptx"], architecture, int(kernel.metadata.shared))


def resources(ptx: str, architecture: int, shared: int) -> Use:
    """Assemble PTX with `ptxas --verbose`, which comes with triton, and read what it says."""
    suffix = "a" if architecture >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file, tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"-arch=sm_{architecture}{suffix}", "-o", cubin.name, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    said = done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    if registers is None or len(spills) != 2:
        raise RuntimeError(f"cannot read the output of ptxas: {said}")
    return Use(int(registers[1]), sum(spills), shared)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="part of an op's name")
    given = options.parse_args()
    worst = 0
    print(f"triton {triton.__version__}")
    print(f"{'op':26} {'shape':14} {'dtype':5} {'warps':>5}  " + "".join(f"{f'sm_{a}: registers, spilled, shared':>40}" for a in ARCHITECTURES))
    for case in cases():
        if given.only not in case.op:
            continue
        uses = [compiled(case, architecture) for architecture in ARCHITECTURES]
        cells = "".join(f"{f'{u.registers} {u.spilled_bytes:>6} B {u.shared_bytes:>8} B':>40}" for u in uses)
        print(f"{case.op:26} {case.shape:14} {case.dtype:5} {case.options['num_warps']:>5}  {cells}", flush=True)
        worst = max(worst, *(use.spilled_bytes for use in uses))
    if worst:
        sys.exit(f"registers are spilled: {worst} bytes in the worst kernel")


if __name__ == "__main__":
    main()
