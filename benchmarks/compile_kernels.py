"""Compile every kernel ahead of time, without a GPU, and report what the machine code takes of a GPU.

For sm_80 (A100) and sm_90 (H100, H200), each dtype, and the shapes of real models, with the block sizes that the
launchers would choose: registers of a thread, bytes that a thread spills to memory, shared memory of a program, and how
many threads fit on a streaming multiprocessor (SM) at once. All of it is read from the machine code that triton would
load, not from a second run of `ptxas`, whose options differ. Exit code 1 if a kernel does not compile or spills.

With `--instructions`, the loops of each kernel are disassembled for sm_90 and their instructions counted by the unit of
the SM that executes them: what bounds a kernel that is not bound by memory (`docs/kernels.md`).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
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

REGISTERS = 65_536  # of an SM
SHARED_KIB = {80: 164, 90: 227}
MAX_THREADS = 2048

# Unit of the SM, instructions it takes, and threads it serves in a clock on sm_90: the table of arithmetic throughput
# in the CUDA programming guide, and Nsight Compute's list of pipelines. Instructions named nowhere go to "alu".
LANES = {"alu": 64, "fma": 128, "imad": 64, "fp64": 64, "xu": 16, "memory": 32}
UNITS = {
    "fma": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 HSETP2",
    "imad": "IMAD IDP",
    "fp64": "DADD DMUL DFMA DSETP",
    "xu": "MUFU F2F F2I I2F POPC FLO REDUX",
    "memory": "LDG STG LDS STS LDSM LDGSTS LDL STL RED REDG ATOM ATOMG ATOMS SHFL",
    "tensor": "HMMA HGMMA",
    "other": "BRA BAR BSSY BSYNC EXIT NOP LDC S2R CS2R R2UR WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE WARPSYNC",
}
_UNIT = {name: unit for unit, names in UNITS.items() for name in names.split()}
_SMALLEST_LOOP = 40  # instructions; shorter ones only step over empty ranges


class Case(NamedTuple):
    """One kernel as it would be launched.

    `loops` names the kernel's inner loops in the order of its source, with how many elements a program handles in one
    pass of each.
    """

    op: str
    shape: str
    dtype: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    loops: dict[str, int]


class Use(NamedTuple):
    """What one compiled kernel takes of a streaming multiprocessor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int


class Loop(NamedTuple):
    """Instructions of one inner loop for each element it handles."""

    name: str
    units: dict[str, float]

    @property
    def elements_a_clock(self) -> float:
        """Elements that one SM handles in a clock if the busiest unit, or the issue of instructions, never waits."""
        return 1 / max(self._clocks().values())

    @property
    def busiest(self) -> str:
        """The unit that bounds the loop, or "issue": four instructions of 32 threads in a clock."""
        clocks = self._clocks()
        return max(clocks, key=clocks.__getitem__)

    def _clocks(self) -> dict[str, float]:
        clocks = {unit: self.units.get(unit, 0.0) / lanes for unit, lanes in LANES.items()}
        clocks["fma"] += self.units.get("imad", 0.0) / LANES["fma"]  # IMAD occupies one half of the FMA lanes
        return clocks | {"issue": sum(self.units.values()) / 128}


def cases() -> Iterator[Case]:
    """Every kernel, dtype and block size that the launchers choose for d_mlp 1,536 to 65,536."""
    for name, dtype in DTYPES.items():
        for largest in (False, True):
            for d_mlp in (1536, 8192, 14336, 28672, 65536):
                launch = contribution_topk.select_options(d_mlp)
                loops = {"count": launch["BLOCK"], "place": launch["PART"]}
                launch = launch | {"LARGEST": largest}
                shape = f"{d_mlp}{' largest' if largest else ''}"
                yield split("contribution_topk select", shape, name, contribution_topk.select_kernel, launch, loops)
        for d_mlp in (1536, 14336):
            launch = threshold_mask.launch_options(d_mlp)
            loops = {"mask": launch["BLOCK"]}
            yield split("threshold_mask", f"{d_mlp}", name, threshold_mask.threshold_mask_kernel, launch, loops)
        launch = {"UPCAST": False} | tail_error.blocks(dtype)
        loops = {"mask and multiply": launch["BLOCK_TOKEN"] * launch["BLOCK_NEURON"]}
        yield split("tail_error", "any", name, tail_error.tail_error_kernel, launch, loops)
        for n_cuts in (0, 1, 4, neuron_statistics.MAX_CUTS):
            launch = {"N_CUTS": n_cuts, **neuron_statistics.LAUNCH}
            loops = {"tokens": launch["BLOCK"] * launch["STEP"], "unpack": launch["BLOCK"]}
            kernel = neuron_statistics.neuron_statistics_kernel
            yield split("neuron_statistics", f"{n_cuts} thresholds", name, kernel, launch, loops)
    for largest in (False, True):
        for k in (1, 64, 512, contribution_topk.MAX_SORT):
            launch = contribution_topk.sort_options(k) | {"LARGEST": largest}
            shape = f"k {k}{' largest' if largest else ''}"
            yield split("contribution_topk sort", shape, "i64", contribution_topk.sort_kernel, launch, {})


def split(op: str, shape: str, dtype: str, kernel: Any, launch: dict[str, Any], loops: dict[str, int]) -> Case:
    """A case whose constants and options come in one dictionary, as they are launched."""
    options = {
        key: value for key, value in launch.items() if key in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    }
    constants = {key: launch[key] for key in launch if key not in options}
    return Case(op, shape, dtype, kernel, constants, options, loops)


def compiled(case: Case, architecture: int) -> Any:
    """Compile one kernel for an architecture, as a launch on contiguous tensors would."""
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
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))


def use(case: Case, architecture: int) -> Use:
    """Compile one kernel and read what it takes from its machine code."""
    kernel = compiled(case, architecture)
    said = examine(kernel.asm["cubin"], knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cannot read the output of cuobjdump: {said}")
    registers, stack, local = map(int, found.groups())  # a kernel has nothing on its stack but spilled registers
    shared = int(kernel.metadata.shared)
    return Use(
        registers, stack + local, shared, resident(32 * case.options["num_warps"], registers, shared, architecture)
    )


def resident(threads: int, registers: int, shared_bytes: int, architecture: int) -> int:
    """Return how many threads of a kernel fit on an SM at once.

    Registers are given out to warps in units of 256, shared memory in units of 128 bytes and 1 KiB more a program.
    """
    registers_a_warp = -(-registers * 32 // 256) * 256
    programs = REGISTERS // registers_a_warp // (threads // 32)
    shared = -(-shared_bytes // 128) * 128 + 1024
    return min(programs, SHARED_KIB[architecture] * 1024 // shared, MAX_THREADS // threads, 32) * threads


def loops(case: Case) -> list[Loop]:
    """Count the instructions of a kernel's inner loops for sm_90, for each element."""
    code = examine(compiled(case, 90).asm["cubin"], knobs.nvidia.nvdisasm.path, "--print-code")
    instructions: list[str] = []
    labels: dict[str, int] = {}
    ranges: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)[\w.]*\s*(.*?);", line):
            instructions.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1] == "BRA" and target and target[0] in labels:
                ranges.append((labels[target[0]], len(instructions)))
    inner = [r for r in ranges if not any(r[0] <= s[0] and s[1] <= r[1] and r != s for s in ranges)]
    found = sorted(r for r in inner if r[1] - r[0] >= _SMALLEST_LOOP)
    if len(found) != len(case.loops):
        raise RuntimeError(f"{case.op} {case.shape}: {len(found)} inner loops where {len(case.loops)} were expected")
    threads = 32 * case.options["num_warps"]
    counted = []
    for (name, elements), (first, last) in zip(case.loops.items(), found, strict=True):
        units = Counter(unit(instruction) for instruction in instructions[first:last])
        counted.append(Loop(name, {key: n * threads / elements for key, n in units.items()}))
    return counted


def unit(instruction: str) -> str:
    """The unit of the SM that executes an instruction, by its name; U... is the uniform datapath."""
    return _UNIT.get(instruction, "other" if instruction.startswith("U") else "alu")


def examine(cubin: bytes, tool: str, *options: str) -> str:
    """Return what one of NVIDIA's tools, which come with triton, says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {' '.join(options)}: {done.stderr}")
    return done.stdout


def uses(index: int) -> list[Use]:
    """What a case takes on every architecture; by its number, since kernels do not travel between processes."""
    case = list(cases())[index]
    return [use(case, architecture) for architecture in ARCHITECTURES]


def print_uses(chosen: dict[int, Case], path: Path | None) -> int:
    """Print, and write as CSV if asked, what each kernel takes; return the bytes that the worst one spills."""
    heads = "".join(f"{f'sm_{a}: registers, spilled, shared, threads an SM':>50}" for a in ARCHITECTURES)
    print(f"{'op':25} {'shape':14} {'dtype':5} {'warps':>5}{heads}")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for case, found in zip(chosen.values(), pool.map(uses, chosen), strict=True):
            cells = "".join(
                f"{f'{u.registers} {u.spilled_bytes:>6} B {u.shared_bytes:>8} B {u.threads:>8}':>50}" for u in found
            )
            print(f"{case.op:25} {case.shape:14} {case.dtype:5} {case.options['num_warps']:>5}{cells}", flush=True)
            for architecture, u in zip(ARCHITECTURES, found, strict=True):
                key = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "warps": case.options["num_warps"]}
                rows.append(key | {"architecture": f"sm_{architecture}"} | u._asdict() | {"triton": triton.__version__})
    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return max(row["spilled_bytes"] for row in rows)


def print_loops(chosen: dict[int, Case]) -> None:
    """Print the instructions of each inner loop, an element."""
    print("sm_90: instructions an element; elements that an SM handles in a clock, and what bounds them")
    heads = "".join(f"{name:>8}" for name in [*LANES, "tensor", "other", "all"])
    print(f"{'op':25} {'shape':14} {'dtype':5} {'loop':18}{heads}")
    for case in chosen.values():
        for loop in loops(case) if case.loops else ():
            counts = [loop.units.get(key, 0.0) for key in [*LANES, "tensor", "other"]]
            cells = "".join(f"{n:>8.2f}" for n in [*counts, sum(counts)])
            bound = f"{loop.elements_a_clock:.2f} ({loop.busiest})"
            print(f"{case.op:25} {case.shape:14} {case.dtype:5} {loop.name:18}{cells}   {bound}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="part of an op's name")
    options.add_argument("--dtype", choices=[*DTYPES, "i64"], help="one dtype instead of all")
    options.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV too")
    options.add_argument("--instructions", action="store_true", help="count the instructions of the loops instead")
    given = options.parse_args()
    chosen = {
        index: case for index, case in enumerate(cases()) if given.only in case.op and given.dtype in (None, case.dtype)
    }
    if not chosen:
        options.error(f"no kernel is named {given.only!r}")
    print(f"triton {triton.__version__}")
    if given.instructions:
        print_loops(chosen)
    elif worst := print_uses(chosen, given.csv):
        sys.exit(f"registers are spilled: {worst} bytes a thread in the worst kernel")


if __name__ == "__main__":
    main()
