"""The recorder's own memory: one state, never copied; contexts of examples, gathered a few at a time."""

from __future__ import annotations

import torch

from neuron_sparsity.recording import _contexts, _PerLayer
from neuron_sparsity.statistics import CONTEXT_BEFORE, CONTEXT_LENGTH


def test_contexts_of_more_examples_than_are_gathered_at_once() -> None:
    n_window, n_pos = 5, 40
    tokens = torch.randint(0, 1000, (n_window, n_pos), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    position = torch.arange(3 * 2000 * 3).remainder(n_window * n_pos + 1) - 1  # every place, and -1
    context = _contexts(tokens, position.view(3, 2000, 3))
    assert (context.dtype, list(context.shape)) == (torch.int32, [3, 2000, 3, CONTEXT_LENGTH])
    padded = torch.nn.functional.pad(tokens, (CONTEXT_BEFORE, CONTEXT_LENGTH), value=-1)
    for where, found in zip(position.tolist(), context.view(-1, CONTEXT_LENGTH), strict=True):
        window, pos = divmod(where, n_pos)
        expected = padded[window, pos : pos + CONTEXT_LENGTH] if where >= 0 else torch.full((CONTEXT_LENGTH,), -1)
        assert torch.equal(found, expected.int()), where


def test_layers_of_one_device_are_rows_of_one_tensor_and_those_of_two_are_put_together() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    state = _PerLayer([cpu, cpu, cpu], (2,), torch.int64)
    state.layers[1] += 7
    assert state.cpu().tolist() == [[0, 0], [7, 7], [0, 0]]
    assert state.cpu().data_ptr() == state.layers[0].data_ptr()
    mixed = _PerLayer([cpu, meta, cpu], (2,), torch.float32)
    assert [layer.device for layer in mixed.layers] == [cpu, meta, cpu]
    mixed.layers[2] += 5
    mixed.layers[1] = torch.full((2,), 3.0)  # a meta tensor cannot be read
    assert mixed.cpu().tolist() == [[0, 0], [3, 3], [5, 5]]
