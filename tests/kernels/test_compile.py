"""The kernels compiled ahead of time, without a GPU: what interpreted kernels cannot show.

Kernels are interpreted in this process, so that each test compiles in one of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

if sys.platform != "linux":
    pytest.skip("triton brings its compiler for Linux only", allow_module_level=True)

DTYPES = ("fp32", "fp16", "bf16")

# Flushed, a subnormal number is a zero; fused, `|z| * w_norm` is not rounded before it is added. Instructions without a
# rounding mode are such as the assembler may fuse. A product of matrices may: nothing relies on its roundings.
ROUNDING = """
import re
from benchmarks import compile_kernels as c

def may_fuse(ptx):
    return re.findall(r"fma|(?:mul|add)[.]f32", ptx)

def ptx_of(case, **options):
    return c.compiled(case._replace(options=case.options | options), 90).asm["ptx"]

chosen = [
    case for case in c.cases()
    if case.shape in ("1536", "any", "1 thresholds")
    and (case.dtype == "fp32" or case.dtype == "bf16" and case.op == "threshold_mask")
]
for case in chosen:
    ptx = ptx_of(case)
    assert "mul.rn.f32" in ptx, f"{case.op}: where is the product?"
    assert ".ftz" not in ptx, f"{case.op} {case.dtype} flushes subnormal numbers"
    assert case.op == "tail_error" or not may_fuse(ptx), f"{case.op} {case.dtype}: {may_fuse(ptx)}"
    print(case.op)
assert may_fuse(ptx_of(chosen[0], enable_fp_fusion=True)), "fusion would not be noticed"
"""

# A launch makes constants of integers that are 1, such as the number of groups of [token, neuron].
ONES = """
from benchmarks import compile_kernels as c

seen = set()
for case in c.cases():
    if case.op in seen:
        continue
    seen.add(case.op)
    names = case.kernel.arg_names
    constants = {name: 1 for name in names if not name.endswith("_ptr") and name != "threshold"} | case.constants
    types = {name: "*" + c.POINTERS.get(name, "fp32") if name.endswith("_ptr") else "fp32" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    source = c.ASTSource(case.kernel, {name: types[name] for name in names}, constexprs=constants)
    c.triton.compile(source, target=c.GPUTarget("cuda", 90, 32), options=dict(case.options))
    print(case.op)
"""

SPILL = """
import sys
from benchmarks import compile_kernels as c

c.print_uses = lambda chosen, path: 8
sys.argv = ["compile_kernels", "--only", "threshold_mask"]
c.main()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing is interpreted, and nothing was compiled before."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(tmp_path)}


def python(*arguments: str, repository: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_dtype_compiles_for_every_architecture_without_spills(
    repository: Path, environment: dict[str, str]
) -> None:
    done = python(
        *("-m", "benchmarks.compile_kernels", "--only", "threshold_mask"),
        repository=repository,
        environment=environment | {"TRITON_INTERPRET": "1"},
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("threshold_mask")]
    assert {dtype for dtype in DTYPES if any(f" {dtype} " in row for row in rows)} == set(DTYPES), done.stderr
    for row in rows:
        uses = re.findall(r"(\d+) +(\d+) B +(\d+) B", row)
        assert len(uses) == 2, row
        for registers, spilled, shared in uses:
            assert 0 < int(registers) <= 255, row
            assert int(spilled) == 0, row
            assert int(shared) <= 48 * 1024, row
    assert done.returncode == 0, done.stderr


def test_a_spill_is_noticed(repository: Path, environment: dict[str, str]) -> None:
    done = python("-c", SPILL, repository=repository, environment=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("registers are spilled: 8 bytes"), done.stderr


@pytest.mark.parametrize("script", [ROUNDING, ONES], ids=["nothing is fused or flushed", "integers that are 1"])
def test_every_kernel_compiles(script: str, repository: Path, environment: dict[str, str]) -> None:
    done = python("-c", script, repository=repository, environment=environment)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "contribution_topk",
        "neuron_statistics",
        "tail_error",
        "threshold_mask",
    }
