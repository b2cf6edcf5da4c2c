"""The order of neurons by a score (`scores` has them), weakest first.

No ranking is better than another by its name: layers live on different scales, so that the plain mean contribution,
ranked over a whole model, can do worse than chance. `ablation` measures each against a random control.

`rank(stats)` orders the neurons of a model; `rank(model, windows, per_token=True)` those of each token of a passage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from neuron_sparsity import kernels
from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.saliency import NeuronSaliency
from neuron_sparsity.scores import DEFAULT_RANKING, RANKINGS, Measured
from neuron_sparsity.statistics import NeuronStatistics

__all__ = ["RANKINGS", "Ranking", "TokenRanking", "rank"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Neurons in the order in which they would be removed.

    Attributes:
        by: Name of the score.
        scope: `"model"`: one order over all layers by score. `"layer"`: by rank within the own layer, so that every
            layer loses the same share.
        scores: One a neuron; the smallest goes first.
        mean_activation: Mean of each neuron's `z`, which mean replacement puts in its place; None if unknown.
        model: What the scores were measured on.
        corpus: On which text.
        seed: Seed of a random ranking.
    """

    by: str
    scope: str
    scores: Float[Tensor, "layer neuron"]
    mean_activation: Float[Tensor, "layer neuron"] | None
    model: ModelInfo
    corpus: dict[str, Any]
    seed: int = 0

    @property
    def n_neurons(self) -> int:
        """Neurons of the model."""
        return self.scores.numel()

    def order(self) -> Int[Tensor, "neuron 2"]:
        """Return (row, neuron) of every neuron, weakest first; row counts the measured layers from 0."""
        if self.scope == "model":
            return kernels.global_rank(self.scores, self.n_neurons)
        ranks = self.scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return kernels.global_rank(ranks.double(), self.n_neurons)

    def weakest(self, k: int) -> list[tuple[int, int]]:
        """Return (layer, neuron) of the k weakest neurons, weakest first; layer is the block's index.

        Raises:
            ValueError: If k is not between 0 and the number of neurons.
        """
        return self._named(self.order()[: self._checked(k)])

    def strongest(self, k: int) -> list[tuple[int, int]]:
        """Return (layer, neuron) of the k strongest neurons, strongest first.

        Raises:
            ValueError: If k is not between 0 and the number of neurons.
        """
        return self._named(self.order().flip(0)[: self._checked(k)])

    def _checked(self, k: int) -> int:
        if not 0 <= k <= self.n_neurons:
            raise ValueError(f"k must be between 0 and {self.n_neurons}, got {k}")
        return k

    def _named(self, rows: Int[Tensor, "k 2"]) -> list[tuple[int, int]]:
        return [(self.model.layers[layer], neuron) for layer, neuron in rows.tolist()]


@dataclass(frozen=True, eq=False)
class TokenRanking:
    """The k weakest or strongest neurons of every layer on every token of a passage.

    Attributes:
        token_ids: The passage.
        token_strings: Its tokens as text.
        contribution: `|z| * ||W_out||`, in order: ascending for the weakest, descending for the strongest.
        neuron: Indices in the layer; ties go to the smaller one.
        largest: Whether these are the strongest.
        model: What was measured.
        corpus: Where the passage is from (`Windows.describe`, with the window's index).
        backend: Which backend ranked.
    """

    token_ids: list[int]
    token_strings: list[str]
    contribution: Float[Tensor, "layer pos k"]
    neuron: Int[Tensor, "layer pos k"]
    largest: bool
    model: ModelInfo
    corpus: dict[str, Any]
    backend: str

    def at(self, pos: int) -> list[tuple[int, int, float]]:
        """Return (layer, neuron, contribution) of one token's neurons, layer by layer; layer is the block's index."""
        return [
            (block, int(neuron), float(value))
            for row, block in enumerate(self.model.layers)
            for neuron, value in zip(self.neuron[row, pos], self.contribution[row, pos], strict=True)
        ]


@overload
def rank(
    stats: NeuronStatistics | NeuronSaliency,
    *,
    by: str | ArrayLike | None = ...,
    name: str | None = ...,
    saliency: NeuronSaliency | None = ...,
    scope: Literal["model", "layer"] = ...,
    seed: int = ...,
    per_token: Literal[False] = ...,
) -> Ranking: ...


@overload
def rank(
    stats: Any,
    windows: Windows,
    *,
    per_token: Literal[True],
    k: int = ...,
    largest: bool = ...,
    window: int = ...,
    n_tokens: int = ...,
    backend: kernels.Backend = ...,
) -> TokenRanking: ...


def rank(
    stats: Any,
    windows: Windows | None = None,
    *,
    by: str | ArrayLike | None = None,
    name: str | None = None,
    saliency: NeuronSaliency | None = None,
    scope: Literal["model", "layer"] = "model",
    seed: int = 0,
    per_token: bool = False,
    **passage: Any,
) -> Ranking | TokenRanking:
    """Return the neurons of a model ranked by a score, weakest first; or, `per_token`, those of each token.

    Args:
        stats: What `record` or `saliency` returned; with `per_token`, the TransformerLens model or adapter.
        windows: With `per_token`, the corpus the passage is from.
        by: A name in `RANKINGS`, which says what each is; or scores of your own, [layer, neuron], the smallest to go
            first. If None, `"contribution"` of statistics, `DEFAULT_RANKING` of a saliency.
        name: What scores of your own are called.
        saliency: What `saliency` returned, for the scores that need gradients, if `stats` are statistics.
        scope: Over the whole model, or within each layer.
        seed: For `"random"`.
        per_token: Rank by the contribution on each token of a passage, within each layer.
        **passage: With `per_token` only. `k`: how many neurons a layer and token (8); `largest`: the strongest instead
            of the weakest; `window`: which window the passage begins (0); `n_tokens`: how many tokens of it (128);
            `backend`: of the kernel, `"auto"`, `"torch"` or `"triton"`.

    Returns:
        Ranking, which `weakest(k)` and `strongest(k)` read; or TokenRanking.

    Raises:
        TypeError: If an argument of a passage comes without `per_token`.
        ValueError: If the name or the scope is unknown, a score is NaN or their shape is wrong, what was measured
            lacks what the score needs, statistics and saliency are of different models, `windows` is missing or given
            in vain, there is no such window, k is out of range, or tokens are to be ranked by anything but the
            contribution within a layer.
    """
    if per_token:
        if windows is None:
            raise ValueError("per_token=True ranks a model on a passage: rank(model, windows, per_token=True)")
        plainly = (by is None or (isinstance(by, str) and by == "contribution")) and (name, saliency) == (None, None)
        if not plainly or (scope, seed) != ("model", 0):
            raise ValueError("per_token=True ranks by contribution within each layer; leave out by, scope and seed")
        return _rank_tokens(stats, windows, **passage)
    if passage:
        raise TypeError(f"rank(stats) takes no {', '.join(passage)}; rank(model, windows, per_token=True) does")
    if windows is not None or not isinstance(stats, NeuronStatistics | NeuronSaliency):
        raise ValueError(
            "rank(stats) takes what record(model, windows) or saliency(model, windows) returned; "
            "per_token=True takes model and windows"
        )
    if scope not in ("model", "layer"):
        raise ValueError(f"scope must be 'model' or 'layer', got {scope!r}")
    recorded, gradients = _sources(stats, saliency)
    if by is None:
        by = "contribution" if recorded is not None and saliency is None else DEFAULT_RANKING
    measured = Measured(by if isinstance(by, str) else name or "scores of your own", recorded, gradients, seed)
    if not isinstance(by, str):
        return _ranking(measured, _own_scores(by, measured), stats, scope)
    if name is not None:
        raise ValueError(f"name is for scores of your own; by={by!r} has one")
    if by not in RANKINGS:
        raise ValueError(f"unknown ranking {by!r}; one of {', '.join(RANKINGS)}")
    score = RANKINGS[by]
    return _ranking(measured, score.of(measured), measured.source(score.needs), scope)


def _sources(stats: Any, saliency: NeuronSaliency | None) -> tuple[NeuronStatistics | None, NeuronSaliency | None]:
    if isinstance(stats, NeuronSaliency):
        if saliency is not None:
            raise ValueError("two saliencies were given; rank(stats, saliency=saliency) takes statistics first")
        return None, stats
    if saliency is not None and saliency.model.fingerprint != stats.model.fingerprint:
        raise ValueError(
            f"statistics and saliency are of different models: {stats.model.name} and {saliency.model.name}"
        )
    return stats, saliency


def _own_scores(by: Any, measured: Measured) -> Float[Tensor, "layer neuron"]:
    """Return scores that were given as a tensor, an array or lists.

    Raises:
        ValueError: If they are no numbers, or not one a neuron.
    """
    shape = [measured.model.n_layers, measured.model.d_mlp]
    try:
        scores = torch.as_tensor(by, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"by must be a name or numbers of shape {shape}, got {type(by).__name__}: {error}") from error
    if list(scores.shape) != shape:
        raise ValueError(f"scores must be {shape}, one a layer and neuron, got {list(scores.shape)}")
    return scores.clone()


def _ranking(measured: Measured, scores: Tensor, source: NeuronStatistics | NeuronSaliency, scope: str) -> Ranking:
    if torch.isnan(scores).any():
        layer, neuron = torch.isnan(scores).nonzero()[0].tolist()
        raise ValueError(
            f"scores by {measured.by!r} are NaN, first in layer {source.model.layers[layer]}, neuron {neuron}; "
            "a neuron without a score has no place in an order"
        )
    return Ranking(measured.by, scope, scores, source.mean_activation, source.model, source.corpus, measured.seed)


def _rank_tokens(
    model: Any,
    windows: Windows,
    *,
    k: int = 8,
    largest: bool = False,
    window: int = 0,
    n_tokens: int = 128,
    backend: kernels.Backend = "auto",
) -> TokenRanking:
    adapter = measurable(model, windows)
    if not 0 <= window < windows.n_windows:
        raise ValueError(f"window must be between 0 and {windows.n_windows - 1}, got {window}")
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    tokens = windows.tokens[window, :n_tokens]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def on_post(layer: int, z: Tensor) -> None:
        found[layer] = kernels.contribution_topk(z[0], adapter.w_norms[layer], k, largest=largest, backend=backend)

    with torch.no_grad():
        adapter.final_residual(tokens[None].long(), on_post)
    values, neurons = zip(*(found[layer] for layer in range(adapter.info.n_layers)), strict=True)
    tokenizer = adapter.model.tokenizer
    ids = tokens.tolist()
    return TokenRanking(
        token_ids=ids,
        token_strings=[tokenizer.decode([token]) for token in ids] if tokenizer else [str(token) for token in ids],
        contribution=torch.stack([value.cpu() for value in values]),
        neuron=torch.stack([neuron.cpu() for neuron in neurons]),
        largest=largest,
        model=adapter.info,
        corpus=windows.describe() | {"window_index": window, "document": windows.documents[window]},
        backend=" + ".join(sorted({kernels.choose(norm.device, backend).name for norm in adapter.w_norms})),
    )
