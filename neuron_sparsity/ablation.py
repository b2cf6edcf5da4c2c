"""Remove neurons for good, for all tokens, and measure what that costs.

`ablate` is the intervention: chosen neurons' post-activations are replaced while a context is open.
`removable_neurons` is the measurement:

1. The dense losses on the calibration part of the corpus.
2. Root search on the count: remove the n weakest neurons of a ranking, measure the paired rise of perplexity, and
   propose the next n from log(rise) against log(n), until the largest n that costs at most p percent is known to 3 %
   (or 14 passes are spent: the curve tells).
3. A control: as many random neurons of every layer. Without it no ranking is worth its name.
4. Held-out text: dense and ablated perplexity on windows the search never saw.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, ModelInfo, PostHook, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import Progress, mean_loss, token_losses
from neuron_sparsity.ranking import Ranking
from neuron_sparsity.search import next_cett
from neuron_sparsity.store import provenance

__all__ = ["REPLACEMENTS", "AblationResult", "ablate", "removable_neurons"]

REPLACEMENTS = ("mean", "zero")
_MAX_EVALUATIONS = 14
_MAX_PROPOSALS = 6
_COUNT_RESOLUTION = 0.03

Neurons = Iterable[tuple[int, int]]
"""(layer, neuron) pairs; layer is the block's index."""


@dataclass(frozen=True)
class AblationResult:
    """The largest removable set of a ranking.

    Attributes:
        p_percent: Rise of perplexity that was allowed.
        ranking: Name of the ranking.
        scope: Whether neurons were ranked over the model or within layers.
        replacement: What took the neurons' place.
        n_neurons: Neurons of the model.
        n_removable: How many of the weakest may go.
        removable: They, as (layer, neuron), weakest first.
        reached: Whether removing more was measured to cost more than p; if not, everything may go.
        ppl_dense: Perplexity of the model as it is, on the calibration part.
        ppl_ablated: The same without the removable neurons.
        ppl_increase_percent: The measured rise.
        curve: Every measured count: n_removed, ppl, ppl_increase_percent; ascending.
        control: The same number of random neurons of every layer, or None where nothing is removable.
        heldout: The same removal on text that the search never saw, and whether it holds p there;
            `unseen_by_ranking` is true where the ranking was made on the calibration part alone.
        ranking_corpus: What the ranking was made on.
        model: What was measured.
        corpus: The calibration part.
        cost: `forward_passes` over the calibration part, `seconds`.
        provenance: Versions, seed, command.
    """

    p_percent: float
    ranking: str
    scope: str
    replacement: str
    n_neurons: int
    n_removable: int
    removable: tuple[tuple[int, int], ...]
    reached: bool
    ppl_dense: float
    ppl_ablated: float
    ppl_increase_percent: float
    curve: tuple[dict[str, float], ...]
    control: dict[str, Any] | None
    heldout: dict[str, Any] | None
    ranking_corpus: dict[str, Any]
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `ablation.json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "model": self.model.to_json(),
            "removable": [list(pair) for pair in self.removable],
            "curve": list(self.curve),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AblationResult:
        """Read the content of `ablation.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        own = {name: data[name] for name in cls.__dataclass_fields__} | {
            "model": ModelInfo.from_json(data["model"]),
            "removable": tuple((int(layer), int(neuron)) for layer, neuron in data["removable"]),
            "curve": tuple(data["curve"]),
        }
        return cls(**own)


@contextmanager
def ablate(
    model: Any,
    neurons: Neurons,
    *,
    replacement: str = "zero",
    means: Float[Tensor, "layer neuron"] | None = None,
) -> Iterator[None]:
    """Remove neurons while the context is open: their post-activation is replaced on every token.

    Args:
        model: TransformerLens model or adapter.
        neurons: (layer, neuron) pairs.
        replacement: `"zero"`, or `"mean"` for each neuron's mean.
        means: Mean post-activations (`NeuronStatistics.mean_activation`); needed for `"mean"`.

    Raises:
        ValueError: If a neuron does not exist or is named twice, or `means` is missing or of another shape.
    """
    adapter = attach(model)
    with adapter.hooked(_replacing(adapter, list(neurons), replacement, means)):
        yield


def removable_neurons(
    model: Any,
    windows: Windows,
    ranking: Ranking,
    *,
    p_percent: float = 1.0,
    replacement: str = "mean",
    heldout: Windows | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AblationResult:
    """Return the largest set of a ranking's weakest neurons whose removal raises perplexity by at most p percent.

    The set is a prefix of the ranking, found on the calibration part and then confirmed on held-out windows and
    against a random control.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus. Without `heldout`, half of its windows (every other one) are held out.
        ranking: Order of removal, made on this model.
        p_percent: Rise of perplexity that is allowed, > 0.
        replacement: `"mean"` or `"zero"`.
        heldout: Windows to confirm on; then the search takes all of `windows`.
        seed: Of the random control.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        The set, the curve that led to it, its control and its held-out confirmation.

    Raises:
        ValueError: If p is not positive, the ranking is of another model, or the corpus is one window.
        MeasurementError: If losses are NaN or memory runs out.
    """
    if not (math.isfinite(p_percent) and p_percent > 0):
        raise ValueError(f"p must be a positive number of percent, got {p_percent}")
    adapter = attach(model)
    if ranking.model.fingerprint != adapter.info.fingerprint:
        raise ValueError(f"the ranking was made on {ranking.model.name} with other weights; record this model first")
    if heldout is None:
        windows, heldout = windows.split(0.5)
    removal = _Removal(adapter, windows, ranking, replacement, {"batch_size": batch_size, "progress": progress})
    start = time.perf_counter()
    n_removable, reached = removal.search(p_percent)
    chosen = ranking.order()[:n_removable]
    control = removal.control(chosen, seed) if n_removable else None
    confirmed = removal.confirm(chosen, heldout, p_percent) if n_removable else None
    if confirmed is not None:
        confirmed["unseen_by_ranking"] = ranking.corpus["sha256"] == windows.sha256
    rise = removal.rises[n_removable]
    return AblationResult(
        p_percent=p_percent,
        ranking=ranking.by,
        scope=ranking.scope,
        replacement=replacement,
        n_neurons=ranking.n_neurons,
        n_removable=n_removable,
        removable=tuple(ranking.weakest(n_removable)),
        reached=reached,
        ppl_dense=removal.ppl_dense,
        ppl_ablated=removal.ppl_dense * math.exp(rise),
        ppl_increase_percent=_percent(rise),
        curve=removal.curve(),
        control=control,
        heldout=confirmed,
        ranking_corpus=ranking.corpus,
        model=adapter.info,
        corpus=windows.describe(),
        cost={"forward_passes": removal.tokens_run / windows.n_tokens, "seconds": time.perf_counter() - start},
        provenance=provenance(seed=seed),
    )


class _Removal:
    """Passes over the calibration part with more and more neurons removed."""

    def __init__(
        self, adapter: MLPAdapter, windows: Windows, ranking: Ranking, replacement: str, options: dict[str, Any]
    ) -> None:
        self.adapter, self.windows, self.options = adapter, windows, options
        self.order, self.replacement, self.means = ranking.order(), replacement, ranking.mean_activation
        self.tokens_run = 0
        _replacing(adapter, [], replacement, self.means)  # refuse bad arguments before the first pass
        self.dense = self._losses(windows, None, "dense pass")
        self.ppl_dense = math.exp(mean_loss(self.dense, windows.scored))
        self.rises: dict[int, float] = {0: 0.0}

    def search(self, p_percent: float) -> tuple[int, bool]:
        """Return the largest measured count that costs at most p, and whether a larger one was seen to cost more."""
        target, total = math.log1p(p_percent / 100), len(self.order)
        count = max(1, total // 200)
        for step in range(_MAX_EVALUATIONS):
            self.rises[count] = self._rise(self.windows, self.dense, self.order[:count], f"removing {count} neurons")
            low = max(n for n, rise in self.rises.items() if rise <= target)
            high = min((n for n, rise in self.rises.items() if rise > target and n > low), default=total + 1)
            if low == total or high - low <= max(1, _COUNT_RESOLUTION * low):
                break
            points = [(n / total, rise) for n, rise in self.rises.items() if n > 0]
            proposal = round(next_cett(points, target, prior_slope=1.0) * total)
            count = min(max(proposal, low + 1), high - 1, total)
            if step >= _MAX_PROPOSALS:  # halving is sure to end; "everything may go" is said only of everything removed
                count = total if high > total else (low + high) // 2
            elif high <= total and high - low > 2 and count in (low + 1, high - 1):
                count = round(math.sqrt(max(low, 1) * high))
        return low, high <= total

    def curve(self) -> tuple[dict[str, float], ...]:
        """Return every measured count, ascending."""
        return tuple(
            {"n_removed": n, "ppl": self.ppl_dense * math.exp(rise), "ppl_increase_percent": _percent(rise)}
            for n, rise in sorted(self.rises.items())
        )

    def control(self, chosen: Tensor, seed: int) -> dict[str, Any]:
        """Remove as many random neurons of every layer, and measure."""
        generator = torch.Generator().manual_seed(seed)
        per_layer = Counter(chosen[:, 0].tolist())
        rows = [
            torch.tensor([layer, neuron])
            for layer, n in sorted(per_layer.items())
            for neuron in torch.randperm(self.adapter.info.d_mlp, generator=generator)[:n].tolist()
        ]
        rise = self._rise(self.windows, self.dense, torch.stack(rows), "random control")
        return {
            "kind": "random neurons, the same number in every layer",
            "seed": seed,
            "ppl": self.ppl_dense * math.exp(rise),
            "ppl_increase_percent": _percent(rise),
        }

    def confirm(self, chosen: Tensor, heldout: Windows, p_percent: float) -> dict[str, Any]:
        """Measure the removal on text that the search never saw."""
        dense = self._losses(heldout, None, "dense pass, held-out")
        rise = self._rise(heldout, dense, chosen, "ablated pass, held-out")
        ppl_dense = math.exp(mean_loss(dense, heldout.scored))
        return {
            "ppl_dense": ppl_dense,
            "ppl_ablated": ppl_dense * math.exp(rise),
            "ppl_increase_percent": _percent(rise),
            "holds": _percent(rise) <= p_percent,
            "corpus": heldout.describe(),
        }

    def _rise(self, windows: Windows, dense: Tensor, rows: Tensor, label: str) -> float:
        pairs = [(self.adapter.info.layers[layer], neuron) for layer, neuron in rows.tolist()]
        hook = _replacing(self.adapter, pairs, self.replacement, self.means)
        return mean_loss((self._losses(windows, hook, label) - dense).double(), windows.scored)

    def _losses(self, windows: Windows, hook: PostHook | None, label: str) -> Float[Tensor, "window pos"]:
        self.tokens_run += windows.n_tokens
        return token_losses(self.adapter, windows, on_post=hook, label=label, **self.options)


def _replacing(
    adapter: MLPAdapter, neurons: list[tuple[int, int]], replacement: str, means: Tensor | None
) -> PostHook | None:
    """Return the hook that replaces the neurons, or None if there are none."""
    if replacement not in REPLACEMENTS:
        raise ValueError(f"replacement must be one of {', '.join(REPLACEMENTS)}, got {replacement!r}")
    info = adapter.info
    shape = (info.n_layers, info.d_mlp)
    if replacement == "mean" and (means is None or tuple(means.shape) != shape):
        found = "none" if means is None else list(means.shape)
        raise ValueError(f"replacement 'mean' needs means of shape {list(shape)}, got {found}; record the model first")
    keep = _kept(info, neurons)
    touched = (~keep.all(dim=1)).tolist()
    if not any(touched):
        return None
    fill = torch.where(keep, 0.0, means.float() if replacement == "mean" and means is not None else 0.0)
    factor = keep.float()

    def on_post(layer: int, z: Tensor) -> Tensor | None:
        if not touched[layer]:
            return None
        # Exactly z where the factor is 1, the filling where it is 0; on a CPU in half the time of torch.where.
        return torch.addcmul(fill[layer].to(z), z, factor[layer].to(z))

    return on_post


def _kept(info: ModelInfo, neurons: list[tuple[int, int]]) -> Tensor:
    """Which neurons stay, [layer, neuron]; refuses those that do not exist or come twice."""
    rows = {block: row for row, block in enumerate(info.layers)}
    keep = torch.ones(info.n_layers, info.d_mlp, dtype=torch.bool)
    for layer, neuron in neurons:
        if layer not in rows or not 0 <= neuron < info.d_mlp:
            raise ValueError(
                f"no neuron ({layer}, {neuron}): layers are {info.layers[0]} to {info.layers[-1]}, "
                f"neurons 0 to {info.d_mlp - 1}"
            )
        if not keep[rows[layer], neuron]:
            raise ValueError(f"neuron ({layer}, {neuron}) is named twice")
        keep[rows[layer], neuron] = False
    return keep


def _percent(rise: float) -> float:
    return 100 * math.expm1(min(rise, 500.0))
