"""Greedy refinement: scores change as neurons go, so remove a few percent of what shall go, score again, and go on.

1. A `saliency` of the dense model scores every neuron.
2. Of the `n_remove` neurons that shall go, the weakest share goes: its post-activations are replaced from here on.
3. A pass forward and backward over the changed model scores the neurons that are left. 2 and 3 repeat, each round with
   an equal share, until `n_remove` are chosen.

The result is a `Ranking`: first the chosen neurons in the order in which they went, then the rest by its last score.
Each round costs one forward and one backward pass. No weight is changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.ranking import Ranking, rank
from neuron_sparsity.replacement import Replacer
from neuron_sparsity.saliency import NeuronSaliency, measure_gradients, saliency
from neuron_sparsity.scores import DEFAULT_RANKING, RANKINGS

__all__ = ["refine", "refined_name"]

REPLACEMENTS = ("zero", "mean")


def refine(
    model: Any,
    windows: Windows,
    first: NeuronSaliency | None = None,
    *,
    n_remove: int,
    n_rounds: int = 4,
    by: str = DEFAULT_RANKING,
    replacement: str = "zero",
    scope: Literal["model", "layer"] = "model",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Ranking:
    """Return a ranking whose first `n_remove` neurons were chosen a share at a time, scored anew after each share.

    Args:
        model: TransformerLens model or adapter.
        windows: What scores are measured on: text that the removal is not confirmed on.
        first: `saliency` of the dense model on these windows; measured if None.
        n_remove: How many neurons shall go. A search may stop before all of them are gone, or go on beyond.
        n_rounds: In how many shares. One is the plain ranking.
        by: A score that needs gradients (`RANKINGS`).
        replacement: What takes the place of neurons that have gone, `"zero"` or `"mean"`: of the dense model.
        scope: Over the whole model, or the same share of each layer.
        batch_size: Windows a pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The ranking; its scores are places in the order, 0 for the neuron that goes first.

    Raises:
        MeasurementError: If gradients are NaN or infinite, or memory runs out.
        ValueError: If `n_remove` or `n_rounds` cannot be, `by` needs no gradients, or `first` is of another model or
            text.
    """
    adapter = measurable(model, windows)
    n_neurons = adapter.info.n_layers * adapter.info.d_mlp
    if by not in RANKINGS or RANKINGS[by].needs != "saliency":
        known = ", ".join(name for name, score in RANKINGS.items() if score.needs == "saliency")
        raise ValueError(f"by must be a score that a saliency pass gives, one of {known}; got {by!r}")
    if replacement not in REPLACEMENTS:
        raise ValueError(f"replacement must be one of {', '.join(REPLACEMENTS)}, got {replacement!r}")
    if not 1 <= n_remove <= n_neurons:
        raise ValueError(f"n_remove must be between 1 and {n_neurons}, got {n_remove}")
    if not 1 <= n_rounds <= n_remove:
        raise ValueError(f"n_rounds must be between 1 and n_remove ({n_remove}), got {n_rounds}")
    if first is None:
        first = saliency(adapter, windows, batch_size=batch_size, progress=progress)
    if (first.model.fingerprint, first.corpus["sha256"]) != (adapter.info.fingerprint, windows.sha256):
        raise ValueError("first is of another model or other windows; leave it out, or measure saliency on these")
    means = first.mean_activation
    replacer = Replacer(adapter, replacement, means=means)
    gone = torch.zeros(means.shape, dtype=torch.bool)
    chosen: list[Int[Tensor, "k 2"]] = []
    found, rest = first, _left(rank(first, by=by, scope=scope), gone)
    for step in range(1, n_rounds + 1):
        share = n_remove * step // n_rounds - int(gone.sum())
        chosen.append(rest[:share])
        gone[rest[:share, 0], rest[:share, 1]] = True
        rest = rest[share:]
        if step < n_rounds:
            with replacer.on_post(gone) as on_post:
                sums = measure_gradients(
                    adapter,
                    windows,
                    means,
                    on_post=on_post,
                    batch_size=batch_size,
                    progress=progress,
                    label=f"gradients without {int(gone.sum())} neurons",
                )
            # Moments of z stay those of the dense model: a mean is the one that is put in.
            found = replace(found, **sums)  # type: ignore[arg-type]
            rest = _left(rank(found, by=by, scope=scope), gone)
    order = torch.cat([*chosen, rest])
    places = torch.empty(means.shape, dtype=torch.float64)
    places[order[:, 0], order[:, 1]] = torch.arange(n_neurons, dtype=torch.float64)
    name = refined_name(by, n_remove, n_rounds, replacement=replacement, scope=scope)
    return Ranking(name, "model", places, means, adapter.info, first.corpus)


def refined_name(
    by: str, n_remove: int, n_rounds: int = 4, *, replacement: str = "zero", scope: Literal["model", "layer"] = "model"
) -> str:
    """Return the name that `refine` gives to its ranking: what it was made by, which an `AblationResult` keeps.

    Example:
        >>> refined_name("fisher_mean", 3000, replacement="mean")
        'fisher_mean refined to 3000 in 4 (mean)'
    """
    return f"{by} refined to {n_remove} in {n_rounds} ({replacement}{', by layer' if scope == 'layer' else ''})"


def _left(ranking: Ranking, gone: Bool[Tensor, "layer neuron"]) -> Int[Tensor, "neuron 2"]:
    """The order of the neurons that are still there; those that went count as the weakest of their layers."""
    order = replace(ranking, scores=ranking.scores.masked_fill(gone, -torch.inf)).order()
    return order[~gone[order[:, 0], order[:, 1]]]
