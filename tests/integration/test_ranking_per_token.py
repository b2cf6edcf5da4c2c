"""The weakest and strongest neurons of each token, against a sort of the cached contributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuron_sparsity.adapter import attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.ranking import rank
from neuron_sparsity.recorder import record


def make_windows() -> Windows:
    tokens = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    scored = torch.ones(3, 20, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens.int(), scored, "random", ("d",) * 3, "apart", True)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_is_a_stable_sort_of_the_contributions(tiny_bridge: Any, family: str, largest: bool) -> None:
    adapter, windows = attach(tiny_bridge(family)), make_windows()
    posts: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        adapter.final_residual(windows.tokens[1:2, :9].long(), lambda layer, z: posts.update({layer: z[0].clone()}))
    found = rank(adapter, windows, per_token=True, k=5, largest=largest, window=1, n_tokens=9)
    assert found.neuron.shape == found.contribution.shape == (2, 9, 5)
    assert (found.backend, found.largest, found.corpus["window_index"]) == ("torch", largest, 1)
    assert found.token_ids == windows.tokens[1, :9].tolist()
    for layer, z in posts.items():
        c = z.abs() * adapter.w_norms[layer]
        values, order = c.sort(dim=1, descending=largest, stable=True)
        assert torch.equal(found.neuron[layer], order[:, :5])
        assert torch.equal(found.contribution[layer], values[:, :5])
    layer, neuron, value = found.at(3)[5]
    assert (layer, neuron, value) == (1, int(found.neuron[1, 3, 0]), float(found.contribution[1, 3, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be between 1 and 64, got 0"),
        ({"k": 65}, "k must be between 1 and 64, got 65"),
        ({"window": 3}, "window must be between 0 and 2, got 3"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"backend": "cuda"}, "backend must be one of auto, torch, triton"),
    ],
)
def test_wrong_arguments(tiny_bridge: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank(tiny_bridge("llama"), make_windows(), per_token=True, **options)


def test_no_argument_is_ignored(tiny_bridge: Any) -> None:
    model, windows = tiny_bridge("llama"), make_windows()
    for option in ({"by": "maximum"}, {"scope": "layer"}, {"seed": 1}):
        with pytest.raises(ValueError, match="ranks by contribution within each layer; leave out by, scope and seed"):
            rank(model, windows, per_token=True, **option)
    with pytest.raises(TypeError, match=r"rank\(stats\) takes no k, largest"):
        rank(record(model, windows), k=5, largest=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="how_many"):
        rank(model, windows, per_token=True, how_many=5)  # type: ignore[call-overload]


def test_statistics_and_passages_are_not_mixed_up(tiny_bridge: Any) -> None:
    model, windows = tiny_bridge("llama"), make_windows()
    with pytest.raises(ValueError, match="per_token=True ranks a model on a passage"):
        rank(model, per_token=True)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="takes what record"):
        rank(model, windows)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="takes what record"):
        rank(record(model, windows), windows)  # type: ignore[call-overload]
