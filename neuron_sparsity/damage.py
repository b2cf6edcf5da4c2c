"""What a change of the MLPs does to single tokens: which it hurts, which it helps, and in which layers it happens.

The same for both changes this package knows, a removal of neurons and a truncation:

1. Two passes over the windows, dense and changed: the paired difference of every scored token's loss, and the KL
   divergence of its distribution from the dense one.
2. One pass for each layer that is changed. `layers="alone"` changes this layer only and leaves all others dense
   (leave-one-layer-in): what the layer costs by itself. `layers="spared"` changes all layers but this one: what is
   saved by sparing it. Effects do not add up; what the layers' sum leaves of the whole is the interaction.

Differences are paired, token by token, and intervals are percentile intervals of a paired bootstrap over windows,
widened as a t interval would be (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from neuron_sparsity import parallel
from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.adapter import MLPAdapter, ModelInfo, PostHook
from neuron_sparsity.corpus import Windows
from neuron_sparsity.damage_tables import (
    DecileDamage,
    Interval,
    LayerDamage,
    TokenDamage,
    TokenGroup,
    by_decile,
    by_token,
    extremes,
    intervals,
    percentiles,
)
from neuron_sparsity.divergence import DenseReference
from neuron_sparsity.entry import measurable, own_means
from neuron_sparsity.model_info import otherwise
from neuron_sparsity.perplexity import Progress, default_batch_size, mean_loss, token_losses
from neuron_sparsity.replacement import Replacer, default_replacement, neuron_mask
from neuron_sparsity.sparsity import SparsityResult
from neuron_sparsity.store import RunFolder, decode, provenance, read_json, read_tensors, write_json, write_tensors
from neuron_sparsity.truncation import Truncation, _thresholds
from neuron_sparsity.typed import checked

__all__ = ["DamageResult", "damage"]

LayerPasses = Literal["alone", "spared"]
_LAYER_PASSES = ("alone", "spared")
_FILES = ("damage.json", "damage.safetensors")


@dataclass(frozen=True, eq=False)
class DamageResult:
    """What a change costs, token by token and layer by layer. Losses and divergences are in nats.

    Attributes:
        change: What was done, in words.
        ppl_dense: Perplexity of the model as it is.
        ppl_changed: Perplexity of the changed model.
        ppl_increase_percent: The measured rise.
        rise: Mean difference of the loss over the scored tokens, changed minus dense, with its 95 % interval.
        kl: Mean KL divergence from the dense to the changed model, with its 95 % interval.
        percentiles: Of the differences of single tokens, by percent: `{"50": ...}`.
        hurt_ratio: Share of the scored tokens whose loss rises.
        top_percent_share: Sum of the differences of the 1 % of tokens hurt most, over the sum of all differences (it
            can exceed 1, since others are helped); None where the sum is not positive.
        hurt: Tokens hurt most, worst first, at most `per_document` of a document.
        helped: Tokens helped most, best first.
        by_token: Tokens of the same text together: hurt most first; those hurt most and those helped most.
        min_count: Occurrences below which a token is left out of `by_token`.
        by_decile: Tokens by their place in the window, in tenths.
        layer_passes: `"alone"`, `"spared"` (see the module), or None where no layer was run.
        layers: What each changed layer costs (`"alone"`) or what sparing it saves (`"spared"`).
        layer_sum: Sum over the layers.
        interaction: `rise` less `layer_sum`, with its interval: positive where layers hurt more together.
        model: What was measured.
        corpus: On what.
        cost: `forward_passes` over the corpus, `seconds`.
        provenance: Versions, seed, command.
        loss_difference: Of every token, changed minus dense; 0 where it is not scored. None if read from JSON alone.
        token_kl: KL divergence at every token; 0 where it is not scored; exact to about 1e-5. None likewise.
    """

    change: str
    ppl_dense: float
    ppl_changed: float
    ppl_increase_percent: float
    rise: Interval
    kl: Interval
    percentiles: dict[str, float]
    hurt_ratio: float
    top_percent_share: float | None
    hurt: tuple[TokenDamage, ...]
    helped: tuple[TokenDamage, ...]
    by_token: tuple[TokenGroup, ...]
    min_count: int
    by_decile: tuple[DecileDamage, ...]
    layer_passes: str | None
    layers: tuple[LayerDamage, ...]
    layer_sum: Interval | None
    interaction: Interval | None
    model: ModelInfo
    corpus: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]
    loss_difference: Float[Tensor, "window pos"] | None = None
    token_kl: Float[Tensor, "window pos"] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `damage.json`: everything but the values of single tokens."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _TENSORS}
        nested = {name: [part.to_json() for part in data[name]] for name in _NESTED}
        single = {name: None if data[name] is None else data[name].to_json() for name in _INTERVALS}
        return data | nested | single | {"model": self.model.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DamageResult:
        """Read the content of `damage.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        own = {name: data[name] for name in cls.__dataclass_fields__ if name not in _TENSORS}
        own |= {name: tuple(kind.from_json(part) for part in data[name]) for name, kind in _NESTED.items()}
        own |= {name: None if data[name] is None else Interval.from_json(data[name]) for name in _INTERVALS}
        return cls(**own | {"model": ModelInfo.from_json(data["model"])})

    def save(self, folder: str | Path) -> None:
        """Write `damage.json`, and the values of single tokens to `damage.safetensors`, in a run folder.

        Raises:
            ValueError: If this result was read from JSON alone.
            RunFolderError: If they cannot be written.
        """
        if self.loss_difference is None or self.token_kl is None:
            raise ValueError("the values of single tokens are not here; load the result with DamageResult.load(folder)")
        tensors = {"loss_difference": self.loss_difference, "kl": self.token_kl}
        write_tensors(Path(folder) / _FILES[1], tensors, self.corpus)
        write_json(Path(folder) / _FILES[0], self.to_json())

    @classmethod
    def load(cls, folder: str | Path) -> DamageResult:
        """Read what `save` wrote.

        Raises:
            RunFolderError: If a file is missing, damaged, or the two are of different texts.
        """
        path, tokens = (RunFolder(folder).file(name) for name in _FILES)
        data = read_json(path)
        tensors, header = read_tensors(tokens)

        def build() -> DamageResult:
            found = cls.from_json(data)
            if header["sha256"] != found.corpus["sha256"]:
                raise ValueError(f"{tokens.name} is of another text than {path.name}")
            object.__setattr__(found, "loss_difference", tensors["loss_difference"])
            object.__setattr__(found, "token_kl", tensors["kl"])
            return checked(found)

        return decode(path, build)


_TENSORS = ("loss_difference", "token_kl")
_INTERVALS = ("rise", "kl", "layer_sum", "interaction")
_NESTED: dict[str, Any] = {
    "hurt": TokenDamage,
    "helped": TokenDamage,
    "by_token": TokenGroup,
    "by_decile": DecileDamage,
    "layers": LayerDamage,
}


def damage(
    model: Any,
    windows: Windows,
    change: SparsityResult | AblationResult | Iterable[tuple[int, int]],
    *,
    replacement: str | None = None,
    means: Float[Tensor, "layer neuron"] | None = None,
    seed: int = 0,
    layers: LayerPasses | None = "alone",
    n_tokens: int = 20,
    per_document: int = 2,
    min_count: int = 8,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> DamageResult:
    """Return what a removal of neurons, or a truncation, does to single tokens, and which layers do it.

    It costs two passes over the windows, and one more for each layer that is changed. With fewer windows for the
    layers, call it twice: `layers=None` on all of them, and on `windows.take(n)`.

    Args:
        model: TransformerLens model or adapter.
        windows: The text. What a search chose on this very text is damaged less here than elsewhere: give text that
            the search has not seen where you can.
        change: SparsityResult (its thresholds cut), AblationResult (its removable neurons go, replaced as there), or
            (layer, neuron) pairs.
        replacement: Of neurons given as pairs: `"zero"`, `"mean"` or `"resample"` (other tokens of `windows`). Default:
            mean where `means` are given, else zero.
        means: Mean post-activations (`NeuronStatistics.mean_activation`); needed for `"mean"`.
        seed: Of `"resample"`.
        layers: `"alone"`: each layer changed by itself. `"spared"`: all but this one. None: no passes for layers.
        n_tokens: How many of the tokens hurt most, and of those helped most, are listed; as many groups of tokens.
        per_document: At most so many listed tokens of one document.
        min_count: Occurrences below which a token is left out of `by_token`.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called after each batch.

    Returns:
        Differences and divergences of every token, the lists and groups made of them, and each layer's part.

    Raises:
        ValueError: If the change is of another model, neurons do not exist, means are missing or not those that a
            result was measured with, or an option is wrong.
        MeasurementError: If a loss is NaN, or memory runs out.

    Example:
        >>> found = damage(model, corpus, [(3, 141), (7, 5)])  # doctest: +SKIP
        >>> found.hurt[0].token, found.hurt[0].difference, found.layers[0].share  # doctest: +SKIP
    """
    _check(layers, n_tokens=n_tokens, per_document=per_document, min_count=min_count)
    start = time.perf_counter()
    adapter = measurable(model, windows)
    stand_in = default_replacement(replacement, means)
    with _changed(adapter, change, stand_in, means, windows, seed) as (said, hook, touched):
        passes = _Passes(adapter, windows, batch_size, progress)
        changed, kl = passes.compare(hook, "changed pass")
        difference = changed - passes.dense
        columns = [difference, kl]
        for row in touched if layers else []:
            inside, _ = passes.compare(_in_layers(hook, row, layers), f"layer {adapter.info.layers[row]} {layers}")
            columns.append(inside - passes.dense if layers == "alone" else changed - inside)
    rows = [adapter.info.layers[row] for row in touched] if layers else []
    parts = _parts(torch.stack([column.double().sum(dim=1) for column in columns], dim=1), windows, rows)
    ppl_dense, rise = math.exp(mean_loss(passes.dense, windows.scored)), parts["rise"].mean
    names = _token_names(adapter, windows)
    values = {"difference": difference, "kl": kl, "dense": passes.dense}
    return DamageResult(
        change=said,
        ppl_dense=ppl_dense,
        ppl_changed=ppl_dense * math.exp(min(rise, 500.0)),
        ppl_increase_percent=100 * math.expm1(min(rise, 500.0)),
        **parts,
        **percentiles(difference[windows.scored]),
        hurt=extremes(windows, values, names, n_tokens, per_document, largest=True),
        helped=extremes(windows, values, names, n_tokens, per_document, largest=False),
        by_token=by_token(windows, difference, kl, names, min_count, n_tokens),
        min_count=min_count,
        by_decile=by_decile(windows, difference, kl),
        layer_passes=layers,
        model=adapter.info,
        corpus=windows.describe(),
        cost={"forward_passes": float(passes.count), "seconds": time.perf_counter() - start},
        provenance=provenance(seed=seed) | parallel.described() | {"forward": adapter.forward},
        loss_difference=difference,
        token_kl=kl,
    )


def _check(layers: str | None, **counts: int) -> None:
    if layers is not None and layers not in _LAYER_PASSES:
        raise ValueError(f"layers must be 'alone', 'spared' or None, got {layers!r}")
    for name, least in (("n_tokens", 0), ("per_document", 1), ("min_count", 2)):
        if counts[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {counts[name]}")


class _Passes:
    """A dense pass, and changed ones that are compared with it token by token."""

    def __init__(
        self, adapter: MLPAdapter, windows: Windows, batch_size: int | None, progress: Progress | None
    ) -> None:
        self.adapter, self.windows, self.count = adapter, windows, 0
        if batch_size is None:  # one for all passes: another size rounds otherwise
            batch_size = min(parallel.everyones("batch size", default_batch_size(adapter, windows.window)))
        self._options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        self._reference = DenseReference(adapter, windows)
        self.dense = self._losses(None, "dense pass", self._reference.remember)

    def compare(self, hook: PostHook | None, label: str) -> tuple[Tensor, Tensor]:
        """Return losses and KL divergences [window, pos] of one changed pass."""
        comparison = self._reference.comparison()
        losses = self._losses(hook, label, comparison.take)
        comparison.pool()
        for values in (losses, comparison.kl):
            mean_loss(values, self.windows.scored)  # NaN and infinity are refused here
        return losses, comparison.kl

    def _losses(self, hook: PostHook | None, label: str, on_rows: Any) -> Float[Tensor, "window pos"]:
        self.count += 1
        return token_losses(self.adapter, self.windows, on_post=hook, on_rows=on_rows, label=label, **self._options)


@contextmanager
def _changed(
    adapter: MLPAdapter, change: Any, replacement: str, means: Tensor | None, windows: Windows, seed: int
) -> Iterator[tuple[str, PostHook | None, list[int]]]:
    """Yield the change in words, the hook that makes it, and the rows of the layers that it changes."""
    info = adapter.info
    found = getattr(getattr(change, "model", None), "fingerprint", info.fingerprint)
    if found != info.fingerprint:
        how = otherwise(change.model, info)
        raise ValueError(f"the change was measured on {change.model.name} {how}; measure this model first")
    if isinstance(change, SparsityResult):
        truncation = Truncation(_thresholds(change, info.n_layers))

        def cut(layer: int, z: Tensor) -> Tensor:
            return truncation.cut(layer, z, adapter.w_norms[layer])

        yield f"truncated at {change.name}", cut, list(range(info.n_layers))
        return
    neurons: Any = change
    origin = ""
    if isinstance(change, AblationResult):
        own_means(change, means)
        neurons, replacement, origin = change.removable, change.replacement, f", the weakest by {change.ranking}"
    mask = neuron_mask(info.layers, info.d_mlp, neurons)
    # Without means, those of this text would be taken: that is another removal than the one that was measured.
    corpus = windows if replacement == "resample" else None
    replacer = Replacer(adapter, replacement, means=means, corpus=corpus, seed=seed)
    said = f"{int(mask.sum()):,} neurons removed{origin}, {replacement} replacement"
    with replacer.on_post(mask) as hook:
        yield said, hook, mask.any(dim=1).nonzero()[:, 0].tolist()


def _in_layers(hook: PostHook | None, row: int, layers: str | None) -> PostHook:
    """Return a hook that changes this layer alone, or all but this one."""

    def on_post(layer: int, z: Tensor) -> Tensor | None:
        return hook(layer, z) if hook is not None and (layer == row) == (layers == "alone") else None

    return on_post


def _parts(sums: Float[Tensor, "window column"], windows: Windows, blocks: list[int]) -> dict[str, Any]:
    """Return the means and intervals of the whole and of its layers, from the sums of each window."""
    of_layers = sums[:, 2:]
    derived = torch.cat([sums, of_layers.sum(1, keepdim=True), (sums[:, 0] - of_layers.sum(1))[:, None]], dim=1)
    counts = windows.scored.sum(dim=1)[:, None].expand_as(derived)
    found = intervals(derived, counts)
    whole = found[0].mean
    layers = tuple(
        LayerDamage(block, *one.values(), one.mean / whole if whole > 0 else None)
        for block, one in zip(blocks, found[2:], strict=False)
    )
    return {
        "rise": found[0],
        "kl": found[1],
        "layers": layers,
        "layer_sum": found[-2] if blocks else None,
        "interaction": found[-1] if blocks else None,
    }


def _token_names(adapter: MLPAdapter, windows: Windows) -> dict[int, str]:
    tokenizer = adapter.model.tokenizer
    ids = windows.tokens.unique().tolist()
    return {token: tokenizer.decode([token]) if tokenizer else str(token) for token in ids}
