"""What a measurement is given, checked where it enters: a model, and windows that fit it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.typed import expect, said

__all__ = ["check_windows", "measurable", "shape_of"]


def measurable(model: Any, windows: Any, **others: Any) -> MLPAdapter:
    """Return an adapter to a model, once it is sure that it can run on these windows.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus.
        **others: More windows by the name of their argument, or None where none were given.

    Raises:
        ModelError: If the model cannot be measured (`attach`).
        TypeError: If `model` is no TransformerLens model, or windows are something else.
        ValueError: If windows hold tokens that the model does not have, or are longer than its context.
    """
    texts = {"windows": windows} | {name: other for name, other in others.items() if other is not None}
    for name, text in texts.items():
        expect(name, text, "Windows")
    adapter = attach(model)
    for name, text in texts.items():
        check_windows(name, text, adapter)
    return adapter


def check_windows(name: str, windows: Any, adapter: MLPAdapter | None) -> None:
    """Refuse windows that were made for another model. One with as many tokens in another order cannot be told.

    Raises:
        TypeError: If they are something else; without an adapter, this alone is checked.
        ValueError: If windows hold tokens that the model does not have, or are longer than its context.
    """
    expect(name, windows, "Windows")
    if adapter is None:
        return
    cfg, made = adapter.model.cfg, "make them for this model: ns.load_corpus(source, model)"
    n_vocab, n_ctx = int(cfg.d_vocab), int(cfg.n_ctx)
    if (largest := int(windows.tokens.max())) >= n_vocab:
        raise ValueError(f"{name} hold token {largest}, and {adapter.info.name} has tokens 0 to {n_vocab - 1}; {made}")
    if windows.window > n_ctx:
        raise ValueError(f"{name} are {windows.window} tokens long, and {adapter.info.name} takes {n_ctx}; {made}")


def shape_of(means: Any) -> list[int]:
    """Return the shape of mean activations; empty if there are none.

    Raises:
        TypeError: If they are no tensor.
    """
    if not isinstance(means, Tensor | None):
        raise TypeError(f"means must be a tensor [layer, neuron], got {said(means)}; stats.mean_activation is one")
    return [] if means is None else list(means.shape)
