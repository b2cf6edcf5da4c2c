"""NeuronStatistics: what a recording knows of every neuron. Merges, saves, loads; `recorder` fills it.

Counts are exact int64; sums are float64; the histogram of contributions has two bins an octave, so that the
activation frequency at any threshold can be read off later without the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuron_sparsity.adapter import ModelInfo
from neuron_sparsity.kernels import N_BINS, histogram_edges
from neuron_sparsity.store import decode, make_folder, read_tensors, write_tensors
from neuron_sparsity.typed import checked

__all__ = ["CONTEXT_BEFORE", "CONTEXT_LENGTH", "NeuronStatistics", "check_tensor"]

CONTEXT_BEFORE, CONTEXT_LENGTH = 16, 24
"""An example's context: 16 tokens before, the token itself, 7 after."""


@dataclass(frozen=True, eq=False)
class NeuronStatistics:
    """Statistics of every neuron over a corpus. `c` is the contribution `|z| * ||W_out||`.

    Attributes:
        model: What was recorded.
        corpus: On what (`Windows.describe`).
        n_tokens: Tokens seen: every position of every window.
        zero_count: Tokens with `z` exactly zero.
        contribution_sum: Sum of `c`.
        contribution_sq_sum: Sum of `c` squared.
        activation_sum: Sum of `z`, signed.
        contribution_max: Largest `c`.
        histogram: Tokens a bin of `c`; lower edges from `kernels.histogram_edges()`.
        thresholds: Cuts on `c` whose exceedances were counted exactly, one set of layers a name.
        above_count: Tokens with `c >= threshold`.
        threshold_names: Name of each set of thresholds.
        example_value: Largest contributions, descending, at most one a window; 0 where there are fewer.
        example_position: `window index * window length + pos` in the corpus it came from; -1 where there is none.
            Position 0 of a window is an attention sink in most models and is never an example.
        example_context: Token ids around it; the token itself at index 16; -1 outside the window.
        token_strings: String of every token id in `example_context`.
        w_norm: Norm of each neuron's output weights.
        provenance: Versions, seed, command, and `backends`: which backend each kernel ran on.
    """

    model: ModelInfo
    corpus: dict[str, Any]
    n_tokens: int
    zero_count: Int[Tensor, "layer neuron"]
    contribution_sum: Float[Tensor, "layer neuron"]
    contribution_sq_sum: Float[Tensor, "layer neuron"]
    activation_sum: Float[Tensor, "layer neuron"]
    contribution_max: Float[Tensor, "layer neuron"]
    histogram: Int[Tensor, "layer neuron bin"]
    thresholds: Float[Tensor, "layer k"]
    above_count: Int[Tensor, "layer neuron k"]
    threshold_names: tuple[str, ...]
    example_value: Float[Tensor, "layer neuron example"]
    example_position: Int[Tensor, "layer neuron example"]
    example_context: Int[Tensor, "layer neuron example context"]
    token_strings: dict[int, str]
    w_norm: Float[Tensor, "layer neuron"]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers with an MLP."""
        return int(self.zero_count.shape[0])

    @property
    def d_mlp(self) -> int:
        """Neurons a layer."""
        return int(self.zero_count.shape[1])

    @property
    def mean_contribution(self) -> Float[Tensor, "layer neuron"]:
        """Mean of `c` over all tokens, float64."""
        return self.contribution_sum / self.n_tokens

    @property
    def rms_contribution(self) -> Float[Tensor, "layer neuron"]:
        """Root mean square of `c`, float64."""
        return (self.contribution_sq_sum / self.n_tokens).sqrt()

    @property
    def mean_activation(self) -> Float[Tensor, "layer neuron"]:
        """Mean of the signed post-activation `z`, float64: what mean replacement puts in."""
        return self.activation_sum / self.n_tokens

    def activation_frequency(self, which: int | str = 0) -> Float[Tensor, "layer neuron"]:
        """Return the share of tokens on which each neuron is active under a recorded set of thresholds; exact.

        Raises:
            ValueError: If that set was not recorded; `activation_frequency_at` reads any threshold off the histogram.
        """
        if isinstance(which, str):
            if which not in self.threshold_names:
                raise ValueError(f"no thresholds named {which!r} were recorded, only {list(self.threshold_names)}")
            which = self.threshold_names.index(which)
        if not 0 <= which < len(self.threshold_names):
            raise ValueError(f"{len(self.threshold_names)} sets of thresholds were recorded, got number {which}")
        return self.above_count[:, :, which].double() / self.n_tokens

    def activation_frequency_at(self, threshold: float | Sequence[float]) -> Float[Tensor, "layer neuron"]:
        """Return the share of tokens with `c >= threshold`, read off the histogram.

        Exact where the threshold is a bin's edge; inside a bin the tokens count as evenly spread over it. Exact zeros
        are never active, and the last bin ends at the neuron's own maximum.

        Args:
            threshold: One for all layers, or one a layer; > 0.

        Raises:
            ValueError: If a threshold is not positive or their number is not the number of layers.
        """
        cuts = torch.as_tensor(threshold, dtype=torch.float64).reshape(-1)
        if len(cuts) not in (1, self.n_layers) or not bool((cuts > 0).all()):
            raise ValueError(f"threshold must be one or {self.n_layers} positive numbers, got {threshold}")
        lower = histogram_edges()
        upper = torch.cat((lower[1:], lower[-1:]))
        share = ((upper - cuts[:, None]) / (upper - lower).clamp_min(1e-300)).clamp(0.0, 1.0)[:, :-1]
        counts = self.histogram.double()
        counts[:, :, 0] -= self.zero_count
        active = torch.einsum("lnb,lb->ln", counts[:, :, :-1], share.expand(self.n_layers, -1))
        top = self.contribution_max.double()
        in_last = ((top - cuts[:, None]) / (top - lower[-1]).clamp_min(1e-300)).clamp(0.0, 1.0)
        in_last = torch.where(cuts[:, None] <= lower[-1], 1.0, in_last)
        return (active + counts[:, :, -1] * in_last) / self.n_tokens

    def merge(self, other: NeuronStatistics) -> NeuronStatistics:
        """Return the statistics of both recordings together: counts exactly, sums to rounding; associative.

        A merged example's position is still the one in the corpus it came from. If the two keep different numbers of
        examples, the smaller number is kept.

        Raises:
            ValueError: If they are of different models or thresholds, or share a part of the corpus.
        """
        if self.model.fingerprint != other.model.fingerprint:
            raise ValueError(f"statistics of different models: {self.model.name} and {other.model.name}")
        if self.threshold_names != other.threshold_names or not torch.equal(self.thresholds, other.thresholds):
            raise ValueError("statistics under different thresholds; record both with the same ones")
        added = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return NeuronStatistics(
            model=self.model,
            corpus=_merge_corpus(self.corpus, other.corpus),
            n_tokens=self.n_tokens + other.n_tokens,
            thresholds=self.thresholds,
            threshold_names=self.threshold_names,
            w_norm=self.w_norm,
            contribution_max=torch.maximum(self.contribution_max, other.contribution_max),
            token_strings=self.token_strings | other.token_strings,
            provenance=_merge_provenance(self.provenance, other.provenance),
            **added,
            **_merge_examples(self, other),
        )

    def save(self, folder: str | Path) -> None:
        """Write `statistics.safetensors` into a folder, which is made if it is not there.

        Raises:
            RunFolderError: If it cannot be written.
        """
        make_folder(Path(folder))
        header = {
            "model": self.model.to_json(),
            "corpus": self.corpus,
            "n_tokens": self.n_tokens,
            "threshold_names": list(self.threshold_names),
            "token_strings": self.token_strings,
            "provenance": self.provenance,
        }
        write_tensors(Path(folder) / "statistics.safetensors", {name: getattr(self, name) for name in _TENSORS}, header)

    @classmethod
    def load(cls, folder: str | Path) -> NeuronStatistics:
        """Read `statistics.safetensors` of a folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / "statistics.safetensors"
        tensors, header = read_tensors(path)
        return decode(path, lambda: _build(tensors, header))


_SUMMED = (
    "zero_count",
    "contribution_sum",
    "contribution_sq_sum",
    "activation_sum",
    "histogram",
    "above_count",
)
_TENSORS = {
    "zero_count": (torch.int64, "layer neuron"),
    "contribution_sum": (torch.float64, "layer neuron"),
    "contribution_sq_sum": (torch.float64, "layer neuron"),
    "activation_sum": (torch.float64, "layer neuron"),
    "contribution_max": (torch.float32, "layer neuron"),
    "histogram": (torch.int64, "layer neuron bin"),
    "thresholds": (torch.float32, "layer k"),
    "above_count": (torch.int64, "layer neuron k"),
    "example_value": (torch.float32, "layer neuron example"),
    "example_position": (torch.int64, "layer neuron example"),
    "example_context": (torch.int32, "layer neuron example context"),
    "w_norm": (torch.float32, "layer neuron"),
}
"""Type and axes of every tensor, as they are written."""


def _build(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> NeuronStatistics:
    stats = NeuronStatistics(
        model=ModelInfo.from_json(header["model"]),
        corpus=dict(header["corpus"]),
        n_tokens=int(header["n_tokens"]),
        threshold_names=tuple(header["threshold_names"]),
        token_strings={int(key): str(value) for key, value in header["token_strings"].items()},
        provenance=dict(header.get("provenance", {})),  # recordings of version 0.1.0 have none
        **{name: tensors[name] for name in _TENSORS},
    )
    sizes = {
        "layer": stats.model.n_layers,
        "neuron": stats.model.d_mlp,
        "bin": N_BINS,
        "k": len(stats.threshold_names),
        "example": stats.example_value.shape[-1],
        "context": CONTEXT_LENGTH,
    }
    for name, (dtype, axes) in _TENSORS.items():
        tensor, shape = tensors[name], [sizes[axis] for axis in axes.split()]
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}")
    _check_values(checked(stats))
    return stats


def _check_values(stats: NeuronStatistics) -> None:
    """Raise ValueError or KeyError if a value is one that no recording has."""
    if not 1 <= stats.n_tokens < 1 << 63 or len(stats.model.layers) != stats.model.n_layers:
        raise ValueError(f"{stats.n_tokens} tokens, {stats.model.n_layers} layers called {stats.model.layers[:3]}")
    check_corpus(stats.corpus)
    for name in _TENSORS:
        check_tensor(name, getattr(stats, name), stats.n_tokens)


def check_corpus(corpus: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError if what a file says of its corpus lacks what is shown of one."""
    for key, kind in (("name", str), ("sha256", str), ("n_tokens", int), ("window", int)):
        if not isinstance(corpus[key], kind):
            raise ValueError(f"{key} of the corpus is {corpus[key]!r}")


def check_tensor(name: str, tensor: Tensor, n_tokens: int) -> None:
    """Raise ValueError if a tensor holds a value that no recording of `n_tokens` tokens has."""
    counts = name in ("zero_count", "nonzero_count", "above_count", "histogram")
    if counts and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) <= n_tokens:
        raise ValueError(f"{name} has counts outside 0 to {n_tokens}, the tokens that were seen")
    # A sum is NaN where a value is: no mask as large as the tensor is needed to see that.
    if tensor.dtype.is_floating_point and torch.isnan(tensor.sum(dtype=torch.float64)):
        raise ValueError(f"{name} is NaN")


def _merge_corpus(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    parts_a, parts_b = a.get("parts", [a["sha256"]]), b.get("parts", [b["sha256"]])
    if set(parts_a) & set(parts_b):
        raise ValueError("both statistics contain the same windows, which would count twice")
    parts = sorted([*parts_a, *parts_b])
    names = sorted({*a["name"].split(" + "), *b["name"].split(" + ")})
    summed = {key: a[key] + b[key] for key in ("n_tokens", "scored_tokens", "n_windows")}
    sha = hashlib.sha256("".join(parts).encode()).hexdigest()
    return a | summed | {"name": " + ".join(names), "sha256": sha, "parts": parts}


def _merge_provenance(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The common one, or each part's own."""
    parts = [*a.get("parts", [a]), *b.get("parts", [b])]
    return a if all(part == parts[0] for part in parts) else {"parts": parts}


def _merge_examples(a: NeuronStatistics, b: NeuronStatistics) -> dict[str, Tensor]:
    n_example = min(a.example_value.shape[2], b.example_value.shape[2])  # beyond that, one side's are unknown
    value = torch.cat((a.example_value, b.example_value), dim=2)
    position = torch.cat((a.example_position, b.example_position), dim=2)
    context = torch.cat((a.example_context, b.example_context), dim=2)
    by_position = position.argsort(dim=2, stable=True)
    by_value = value.gather(2, by_position).argsort(dim=2, descending=True, stable=True)
    order = by_position.gather(2, by_value)[:, :, :n_example]
    return {
        "example_value": value.gather(2, order),
        "example_position": position.gather(2, order),
        "example_context": context.gather(2, order[..., None].expand(-1, -1, -1, context.shape[3])),
    }
