"""What chosen neurons do on each token of a passage: the activations that a token view colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable

__all__ = ["NeuronActivations", "neuron_activations"]


@dataclass(frozen=True, eq=False)
class NeuronActivations:
    """Post-activations of chosen neurons over a passage.

    Attributes:
        token_ids: The passage.
        token_strings: Its tokens as text.
        neurons: (layer, neuron) of each column; layer is the block's index.
        activation: `z`, signed, what enters the down projection.
        contribution: `|z| * ||W_out||`, in residual-stream norm.
        model: What was measured.
        corpus: Where the passage is from (`Windows.describe`, with the window's index).
    """

    token_ids: list[int]
    token_strings: list[str]
    neurons: tuple[tuple[int, int], ...]
    activation: Float[Tensor, "pos neuron"]
    contribution: Float[Tensor, "pos neuron"]
    model: ModelInfo
    corpus: dict[str, Any]


def neuron_activations(
    model: Any, windows: Windows, neurons: Sequence[tuple[int, int]], *, window: int = 0, n_tokens: int = 128
) -> NeuronActivations:
    """Return what chosen neurons do on one window's beginning, in one forward pass of the dense model.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus.
        neurons: (layer, neuron), layer being the block's index: what `Ranking.strongest` returns.
        window: Which window.
        n_tokens: How many of its tokens, from its start.

    Returns:
        Activations [pos, neuron], float32, in the order of `neurons`.

    Raises:
        ValueError: If there is no such window or neuron, or none was chosen.
    """
    adapter = measurable(model, windows)
    if not 0 <= window < windows.n_windows:
        raise ValueError(f"window must be between 0 and {windows.n_windows - 1}, got {window}")
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    chosen = tuple((int(layer), int(neuron)) for layer, neuron in neurons)
    if not chosen:
        raise ValueError("no neuron was chosen; rank(stats).strongest(8) names some")
    layers = adapter.info.layers
    for layer, neuron in chosen:
        if layer not in layers or not 0 <= neuron < adapter.info.d_mlp:
            raise ValueError(
                f"no neuron ({layer}, {neuron}) in {adapter.info.name}: layers {layers[0]} to {layers[-1]}, neurons 0 "
                f"to {adapter.info.d_mlp - 1}"
            )
    tokens = windows.tokens[window, :n_tokens]
    activation = torch.zeros(len(tokens), len(chosen))
    norm = torch.zeros(len(chosen))

    def on_post(row: int, z: Tensor) -> None:
        for column, (layer, neuron) in enumerate(chosen):
            if layer == layers[row]:
                activation[:, column] = z[0, :, neuron].float().cpu()
                norm[column] = adapter.w_norms[row][neuron].float().cpu()

    with torch.no_grad():
        adapter.final_residual(tokens[None].long(), on_post)
    tokenizer, ids = adapter.model.tokenizer, tokens.tolist()
    return NeuronActivations(
        ids,
        [tokenizer.decode([token]) for token in ids] if tokenizer else [str(token) for token in ids],
        chosen,
        activation,
        activation.abs() * norm,
        adapter.info,
        windows.describe() | {"window_index": window, "document": windows.documents[window]},
    )
