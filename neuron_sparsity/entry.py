"""What a measurement is given, checked where it enters: a model, and windows that fit it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.model_info import otherwise
from neuron_sparsity.typed import expect, said

__all__ = ["check_ranking", "check_windows", "finite", "means_sketch", "measurable", "own_means", "shape_of"]

_PHI = (1 + 5**0.5) / 2
_SAME_MEANS = 1e-3  # of their norm: 2e-4 is what half precision makes of them, 1e-1 what a thousand other tokens do


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


def check_ranking(ranking: Any, adapter: MLPAdapter) -> None:
    """Refuse a ranking that was not made on this model, or that orders nothing.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is of another model, has not one score a neuron, or a score is NaN.
    """
    expect("ranking", ranking, "Ranking")
    if ranking.model.fingerprint != adapter.info.fingerprint:
        how = otherwise(ranking.model, adapter.info)
        raise ValueError(f"the ranking was made on {ranking.model.name} {how}; record this model first")
    if tuple(ranking.scores.shape) != (adapter.info.n_layers, adapter.info.d_mlp):
        raise ValueError(
            f"the ranking has scores of shape {list(ranking.scores.shape)}, the model "
            f"{[adapter.info.n_layers, adapter.info.d_mlp]}; give one score a neuron"
        )
    n_nan = int(torch.isnan(ranking.scores).sum())
    if n_nan:
        raise ValueError(
            f"{n_nan} of {ranking.n_neurons} scores by {ranking.by!r} are NaN and cannot be ordered; replace them first"
        )


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


def finite(means: Any) -> Any:
    """Return mean activations, if there are some and all are numbers; what is no tensor is told by `shape_of`.

    Raises:
        ValueError: If some are NaN or infinite.
    """
    if isinstance(means, Tensor) and not means.isfinite().all():
        raise ValueError("means are NaN or infinite; record the model again")
    return means


def means_sketch(means: Float[Tensor, "layer neuron"] | None) -> tuple[float, ...]:
    """Return nine numbers that tell means of one text from those of another; none without means.

    They are the norm of all means, and eight sums of them with fixed weights, `cos(phi k i^2)` for the i-th mean. A
    hash would take a recording that was made again, with another batch size and so other rounding, for other text.
    """
    if means is None:
        return ()
    flat = means.detach().double().cpu().reshape(-1)
    place = torch.arange(1, len(flat) + 1, dtype=torch.float64)
    sums = [float(flat @ torch.cos(_PHI * k * place**2)) for k in range(1, 9)]
    return (float(flat.norm()), *sums)


def own_means(result: Any, means: Any) -> None:
    """Refuse means that a removal was not measured with; files of earlier versions do not know theirs.

    Args:
        result: An AblationResult; anything else may have any means.
        means: Mean activations, or None.

    Raises:
        ValueError: If the rise of the result belongs to other means.
    """
    known = getattr(result, "means_sketch", ())
    if not known or not isinstance(means, Tensor):
        return
    found = means_sketch(means)
    if any(abs(ours - theirs) > _SAME_MEANS * known[0] for ours, theirs in zip(found, known, strict=False)):
        raise ValueError(
            "means are not those that the rise was measured with; give those of its ranking: "
            "means=ranking.mean_activation"
        )
