"""The columns of the atlas, a group for each thing that can be measured: arrays [layer, neuron], by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from neuron_sparsity.adapter import MLPAdapter, ModelInfo
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.taxonomy.active import ActiveBits
from neuron_sparsity.taxonomy.classes import CLASSES, NONZERO, ClassPoint, ClassRule, bound_95
from neuron_sparsity.taxonomy.logits import RoleRule, logit_effects
from neuron_sparsity.taxonomy.positions import information_bits, information_by_chance_bits
from neuron_sparsity.taxonomy.triggers import TriggerRule, Triggers

__all__ = ["Question", "frame", "of_logits", "of_pass", "of_statistics", "positional_words"]

_WORK_BYTES = 64 << 20  # of activity and counts that are read at once
_LOGIT_TOKENS = 10


@dataclass(frozen=True)
class Question:
    """What an atlas is asked for; as for `atlas`, with every default filled in."""

    stats: NeuronStatistics
    windows: Windows | None
    active: str
    classes: ClassRule
    triggers: TriggerRule
    positional_bits: float
    roles: RoleRule | None  # None where effects on logits are left out
    seed: int

    @property
    def thresholds(self) -> Float[Tensor, " layer"] | None:
        """One a layer; None where active means not exactly zero."""
        names = self.stats.threshold_names
        return None if self.active == NONZERO else self.stats.thresholds[:, names.index(self.active)]

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the same ones have the same answer."""
        return {
            "fingerprint": self.stats.model.fingerprint,
            "recorded": self.stats.corpus["sha256"],
            "watched": None if self.windows is None else self.windows.sha256,
            "active": self.active,
            "thresholds": [] if self.thresholds is None else self.thresholds.tolist(),
            "classes": asdict(self.classes),
            "triggers": asdict(self.triggers),
            "positional_bits": self.positional_bits,
            "logits": None if self.roles is None else asdict(self.roles),
            "seed": self.seed,
        }


def positional_words(positional_bits: float) -> str:
    """Return in words what makes a neuron positional."""
    return (
        f"mutual information of activity and position, at least {positional_bits:g} bits (logarithm to base 2) above "
        "what as many activations at random places show; position 0 of a window left out"
    )


def of_statistics(stats: NeuronStatistics, count: NDArray[np.int64], rule: ClassRule) -> dict[str, Any]:
    """Return the columns that the recording alone gives."""
    layer_sum = stats.contribution_sum.sum(dim=1, keepdim=True)
    share = (stats.contribution_sum / layer_sum).nan_to_num(0.0)  # a layer that gives nothing has no shares
    return {
        "class": np.array(CLASSES)[rule.codes(count, stats.n_tokens)],
        "activation_frequency": count / stats.n_tokens,
        "activation_count": count,
        "frequency_bound_95": np.where(count == 0, bound_95(stats.n_tokens), np.nan),
        "mean_contribution": stats.mean_contribution.numpy(),
        "rms_contribution": stats.rms_contribution.numpy(),
        "max_contribution": stats.contribution_max.double().numpy(),
        "contribution_share_of_layer": share.numpy(),
    }


def of_pass(
    question: Question, bits: ActiveBits, windows: Windows, adapter: MLPAdapter, progress: Progress | None
) -> tuple[dict[str, Any], tuple[ClassPoint, ...]]:
    """Return the columns that the bits of a pass give, and how the classes move with N."""
    shape, n_pos = (bits.n_layers, bits.n_neurons), windows.window - 1
    found = Triggers(windows.tokens.numpy(), *shape, question.triggers)
    information, total = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    stops = _halves(windows.n_windows)
    order = np.random.default_rng(question.seed).permutation(windows.n_windows)
    seen = np.zeros((len(stops), *shape), dtype=np.int64)
    size = max(1, _WORK_BYTES // (4 * windows.n_tokens + found.bytes_a_neuron))
    for layer, neurons, active in bits.blocks(size):
        if progress:
            progress("reading triggers", layer * shape[1] + neurons.start, shape[0] * shape[1])
        by_window = active.sum(axis=1, dtype=np.int64)[order].cumsum(axis=0)
        seen[:, layer, neurons] = by_window[np.array(stops) - 1]
        active[:, 0] = 0  # BOS, or an attention sink
        at = active[:, 1:].sum(axis=0, dtype=np.int64)
        information[layer, neurons] = information_bits(at, windows.n_windows)
        total[layer, neurons] = at.sum(axis=0)
        found.add(layer, neurons.start, active.reshape(-1, active.shape[2]))
    if progress:
        progress("reading triggers", shape[0] * shape[1], shape[0] * shape[1])
    chance = information_by_chance_bits(total.ravel(), windows.n_windows, n_pos).reshape(shape)
    columns = _trigger_columns(found, adapter) | {
        "position_information_bits": information,
        "position_information_by_chance_bits": chance,
        "is_positional": information - chance >= question.positional_bits,
    }
    points = [question.classes.point(count, stop * windows.window) for count, stop in zip(seen, stops, strict=True)]
    return columns, tuple(points)


def _halves(n_windows: int) -> list[int]:
    """Return numbers of windows at which classes are counted: all, half of them, and so on down to one.

    Example:
        >>> _halves(20)
        [1, 2, 5, 10, 20]
    """
    stops = []
    while n_windows:
        stops.append(n_windows)
        n_windows //= 2
    return stops[::-1]


def _trigger_columns(found: Triggers, adapter: MLPAdapter) -> dict[str, Any]:
    shape = found.n_covering_tokens.shape
    n_triggers, ngram = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    words = np.empty(shape, dtype=object)
    for place in np.ndindex(shape):
        words[place] = []
    decode_ids = _decoder(adapter)
    for place, detection in found.found.items():
        n_triggers[place] = len(detection.ids)
        ngram[place] = detection.n if detection.detector else 0
        words[place] = [decode_ids(ids) for ids in detection.ids]
    return {
        "n_covering_tokens": found.n_covering_tokens,
        "n_triggers": n_triggers,
        "triggers": words,
        "is_token_detector": ngram == 1,
        "ngram": ngram,
    }


def of_logits(
    adapter: MLPAdapter, rule: RoleRule, stats: NeuronStatistics, progress: Progress | None
) -> dict[str, Any]:
    """Return the columns that the weights give: what each output row does to the logits."""
    effects = logit_effects(adapter, k=min(_LOGIT_TOKENS, int(adapter.model.cfg.d_vocab)), progress=progress)
    decode_ids = _decoder(adapter)
    return {
        "top_logit_tokens": _strings(effects.top_ids, decode_ids),
        "bottom_logit_tokens": _strings(effects.bottom_ids, decode_ids),
        "logit_mean": effects.mean,
        "logit_std": effects.std,
        "logit_skew": effects.skew,
        "logit_kurtosis": effects.kurtosis,
        "logit_role": rule.roles(effects.std, effects.skew, effects.kurtosis, stats.w_norm.double().numpy()),
    }


def _strings(ids: Int[NDArray, "layer neuron k"], decode_ids: Callable[[Sequence[int]], str]) -> NDArray[np.object_]:
    """Return lists of strings, [layer, neuron]; every token is decoded once."""
    text = {token: decode_ids((token,)) for token in np.unique(ids).tolist()}
    found = np.empty(ids.shape[:2], dtype=object)
    for place in np.ndindex(found.shape):
        found[place] = [text[token] for token in ids[place].tolist()]
    return found


def _decoder(adapter: MLPAdapter) -> Callable[[Sequence[int]], str]:
    """Return what turns token ids into text; without a tokenizer, the ids."""
    tokenizer = adapter.model.tokenizer
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids)))


def frame(columns: dict[str, Any], model: ModelInfo) -> Any:
    """Return columns as a pandas DataFrame, a row a neuron, with `layer` and `neuron` in front."""
    import pandas as pd

    layer, neuron = np.meshgrid(np.array(model.layers), np.arange(model.d_mlp), indexing="ij")
    both = {"layer": layer.astype(np.int32), "neuron": neuron.astype(np.int32)} | columns
    lists = {name: values.ravel() for name, values in both.items()}
    return pd.DataFrame({name: v.tolist() if v.dtype.kind in "OU" else v for name, v in lists.items()})
