"""The counters of `neuron_statistics`, from every count that one program can reach, and how programs share tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.oracles import Backend

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernel_file = pytest.importorskip("neuron_sparsity.kernels.triton.neuron_statistics")
add_pair, count, STEP = kernel_file._add_pair, kernel_file._count, kernel_file.STEP


@triton.jit
def count_one_step_kernel(word_ptr, start_ptr, count_ptr, STEP: tl.constexpr, N_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """A lane has a counter that stands at its own start everywhere, adds STEP words and writes every count."""
    lane = tl.arange(0, BLOCK)
    start = tl.load(start_ptr + lane)
    zero = start * 0
    low = (-(start & 1), -((start >> 1) & 1), -((start >> 2) & 1), -((start >> 3) & 1))
    high = (
        -((start >> 4) & 1),
        -((start >> 5) & 1),
        -((start >> 6) & 1),
        -((start >> 7) & 1),
        -((start >> 8) & 1),
        -((start >> 9) & 1),
        -((start >> 10) & 1),
        -((start >> 11) & 1),
    )
    held = (zero, zero, zero)
    for i in tl.static_range(STEP // 2):
        a = tl.load(word_ptr + lane * STEP + 2 * i)
        b = tl.load(word_ptr + lane * STEP + 2 * i + 1)
        low, high, held = add_pair(i, low, high, held, a, b)
    for position in range(N_BIT):
        tl.store(count_ptr + lane * N_BIT + position, count(low, high, zero + position))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_count_plus_any_sixteen_words_is_right(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "torch":
        pytest.skip("torch counts without these")
    n_bit, block = torch.iinfo(dtype).bits, 4096
    start = torch.arange(block).clamp(max=2**12 - 1 - STEP)
    words = torch.randint(
        -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1, (block, STEP), generator=torch.Generator().manual_seed(0)
    )
    words[::3], words[1::5] = -1, 0  # all ones: the longest carries
    counts = torch.empty(block, n_bit, dtype=dtype, device=backend.device)
    given_words, given_start = words.to(backend.device, dtype), start.to(backend.device, dtype)
    count_one_step_kernel[(1,)](given_words, given_start, counts, STEP=STEP, N_BIT=n_bit, BLOCK=block)
    ones = ((words[:, :, None] >> torch.arange(n_bit)) & 1).sum(dim=1)
    assert torch.equal(counts.cpu().long(), start[:, None] + ones)


@given(n_group=st.integers(1, 10**5), n_token=st.integers(1, 10**6), n_blocks=st.integers(1, 1000))
def test_no_program_gets_more_than_it_can_count(n_group: int, n_token: int, n_blocks: int) -> None:
    groups, tokens = kernel_file.share(n_group, n_token, n_blocks)
    assert 1 <= groups <= n_group
    assert tokens > 0
    assert tokens % STEP == 0
    assert groups * tokens <= 2**12 - 1
    assert groups == 1 or tokens >= n_token, "a program's maximum is that of one group"


def test_a_large_recording_keeps_a_large_gpu_busy_and_its_counters_full() -> None:
    """No fewer programs than PROGRAMS where there is work for them, and each as long as it can be."""
    for n_group, n_token, n_blocks in [(1, 16_384, 12), (64, 256, 12), (1, 1_000_000, 112), (8, 2048, 86)]:
        groups, tokens = kernel_file.share(n_group, n_token, n_blocks)
        n_program = triton.cdiv(n_group, groups) * triton.cdiv(n_token, tokens) * n_blocks
        assert n_program >= kernel_file.PROGRAMS
        assert n_program <= 2 * kernel_file.PROGRAMS or groups * tokens > kernel_file.MAX_STEPS * STEP // 2
