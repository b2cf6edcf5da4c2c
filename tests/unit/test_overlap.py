"""Which windows share text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuron_sparsity.corpus import Windows
from neuron_sparsity.overlap import apart_from, share_text


def windows(tokens: Any) -> Windows:
    tokens = torch.as_tensor(tokens, dtype=torch.int32)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens, scored, "text", tuple(map(str, range(len(tokens)))), "packed", bos=False)


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(0, 50_000, (4096,), generator=torch.Generator().manual_seed(0))


def test_windows_cut_at_other_places_share_text(stream: torch.Tensor) -> None:
    measured = windows(stream[:1024].view(8, 128))
    others = windows(stream[100 : 100 + 2048].view(16, 128))
    kept = apart_from(others, measured)
    assert kept is not None
    assert kept.documents == tuple(map(str, range(8, 16)))  # the eighth begins at token 996
    assert share_text(others, measured)
    assert not share_text(kept, measured)


@pytest.mark.parametrize(("shared", "found"), [(15, False), (16, True), (17, True)])
def test_a_run_of_sixteen_tokens_is_shared_text(stream: torch.Tensor, shared: int, found: bool) -> None:
    first, second = stream[:64].clone()[None], stream[1000:1064].clone()[None]
    second[0, 20 : 20 + shared] = first[0, 40 : 40 + shared]
    assert share_text(windows(first), windows(second)) is found
    assert (apart_from(windows(first), windows(second)) is None) is found


def test_the_same_tokens_in_another_order_are_another_text(stream: torch.Tensor) -> None:
    assert not share_text(windows(stream[:64][None]), windows(stream[:64].flip(0)[None]))


def test_windows_shorter_than_a_run_are_compared_whole() -> None:
    measured = windows([[1, 2, 3], [4, 5, 6]])
    kept = apart_from(windows([[1, 2, 4], [4, 5, 6], [7, 8, 9]]), measured)
    assert kept is not None
    assert kept.tokens.tolist() == [[1, 2, 4], [7, 8, 9]]
    assert apart_from(measured, windows([[9, 9, 9]]), measured) is None
