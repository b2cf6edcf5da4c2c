"""What tracking finds: a point for every checkpoint, gaps, and the CETT that is common to all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.search import search_name
from neuron_sparsity.sparsity import LayerThreshold
from neuron_sparsity.store import blaming, read_json
from neuron_sparsity.typed import checked

__all__ = [
    "TRAJECTORY_FILE",
    "CommonCett",
    "DeadShare",
    "Gap",
    "SparsityAt",
    "TrackedModel",
    "TrajectoryPoint",
    "TrajectoryResult",
]

TRAJECTORY_FILE = "trajectory.json"
_PROBE_TEXT = "The 17 ships of 1790 weren't\n\tseen again: naïve, 東京, if (x >= 0) {y[i] += 2;}"


@dataclass(frozen=True)
class DeadShare:
    """How many neurons are dead under some thresholds.

    Attributes:
        dead_below: A neuron is dead if the share of tokens on which it is active is smaller.
        dead_ratio: Dead neurons over all neurons.
        never_active_ratio: Those that are active on no token at all.
        never_nonzero_ratio: Those whose post-activation is exactly zero on every token.
        layer_dead_ratios: Dead neurons over all, in each layer.
        n_tokens: Tokens measured on.
        frequency_bound_95: 3 / n_tokens, at most 1: the 95 % upper bound of the frequency of a neuron that was never
            active. If it is above `dead_below`, the text is too short to tell dead neurons from rare ones.
    """

    dead_below: float
    dead_ratio: float
    never_active_ratio: float
    never_nonzero_ratio: float
    layer_dead_ratios: tuple[float, ...]
    n_tokens: int
    frequency_bound_95: float


@dataclass(frozen=True)
class SparsityAt:
    """One checkpoint truncated at one CETT.

    Attributes:
        cett: CETT common to all layers.
        activation_ratio: Mean over layers of the share of (token, neuron) pairs active in the truncated run.
        ppl_increase_percent: Measured rise of perplexity.
        kl: Mean KL divergence from the dense model, in nats a token.
        layers: Threshold, CETT and activation ratio of each layer.
        dead: Dead neurons under these thresholds; None where they cut everything.
        reached: False where a search found no CETT in [0, 1] that costs p percent: the numbers are those of CETT 1.
        converged: Whether a search came within its tolerance of p.
        low: Lower end of the 95 % interval of the activation ratio at p, for a search; None with too few windows.
        high: Upper end.
    """

    cett: float
    activation_ratio: float
    ppl_increase_percent: float
    kl: float
    layers: tuple[LayerThreshold, ...]
    dead: DeadShare | None
    reached: bool = True
    converged: bool = True
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SparsityAt:
        """Return what `asdict` was made from."""
        dead = data["dead"]
        if dead is not None:
            dead = DeadShare(**dead | {"layer_dead_ratios": tuple(dead["layer_dead_ratios"])})
        layers = tuple(LayerThreshold(**layer) for layer in data["layers"])
        return cls(**data | {"layers": layers, "dead": dead})


@dataclass(frozen=True)
class TrajectoryPoint:
    """What is known of one checkpoint.

    Attributes:
        checkpoint: Its label.
        tokens: Training tokens.
        ppl_dense: Perplexity as it is.
        fingerprint: Hash of its weights.
        own: At its own CETT-PPL-p%; None where that was not asked for.
        passes: At CETTs common to several checkpoints: those the search for the common one has tried, and that one.
    """

    checkpoint: str
    tokens: int
    ppl_dense: float
    fingerprint: str
    own: SparsityAt | None
    passes: tuple[SparsityAt, ...]

    def at(self, cett: float | None) -> SparsityAt | None:
        """Return what was measured at a common CETT, if it was."""
        return next((found for found in self.passes if found.cett == cett), None)

    def to_json(self, cett: float | None = None) -> dict[str, Any]:
        """Return plain values; with what was measured at the common CETT in front, if it was."""
        common = self.at(cett)
        front: dict[str, Any] = {"checkpoint": self.checkpoint, "tokens": self.tokens}
        if common is not None:
            front |= {"activation_ratio": common.activation_ratio, "cett": common.cett}
        front |= {"ppl_dense": self.ppl_dense}
        if common is not None:
            front["ppl_increase_percent"] = common.ppl_increase_percent
            front["layer_activation_ratios"] = [layer.activation_ratio for layer in common.layers]
            front["dead_ratio"] = None if common.dead is None else common.dead.dead_ratio
        return front | {
            "fingerprint": self.fingerprint,
            "own": None if self.own is None else asdict(self.own),
            "passes": [asdict(found) for found in self.passes],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrajectoryPoint:
        """Return what `to_json` was made from."""
        return cls(
            checkpoint=data["checkpoint"],
            tokens=data["tokens"],
            ppl_dense=data["ppl_dense"],
            fingerprint=data["fingerprint"],
            own=None if data["own"] is None else SparsityAt.from_json(data["own"]),
            passes=tuple(SparsityAt.from_json(found) for found in data["passes"]),
        )


@dataclass(frozen=True)
class Gap:
    """A checkpoint that could not be loaded or measured, and why."""

    checkpoint: str
    tokens: int
    error: str


@dataclass(frozen=True)
class CommonCett:
    """The CETT that all checkpoints are truncated at.

    Attributes:
        cett: The CETT.
        given: Whether it was given, and not searched.
        checkpoints: Those that it was searched on: the last five that can be measured, or all if there are fewer.
        ppl_increase_percent: 100 * (mean over them of PPL truncated / PPL dense - 1), measured; None if it was given.
        tolerance_percent: How close to p that had to come, in percentage points.
        reached: Whether some CETT in [0, 1] costs p percent on average.
        converged: Whether the measured rise is within the tolerance.
        evaluations: Every CETT that was tried, with its mean rise: `cett`, `ppl_increase_percent`.
    """

    cett: float
    given: bool
    checkpoints: tuple[str, ...] = ()
    ppl_increase_percent: float | None = None
    tolerance_percent: float | None = None
    reached: bool = True
    converged: bool = True
    evaluations: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class TrackedModel:
    """What all checkpoints of a run have in common.

    Attributes:
        n_layers: Layers with an MLP.
        d_model: Width of the residual stream.
        d_mlp: Neurons a layer.
        activation: Name of the activation function.
        gated: Whether the MLP is gated.
        d_vocab: Entries of the vocabulary.
        tokenizer: Hash of the tokenizer's vocabulary and of how it cuts one text; "" without one.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    activation: str
    gated: bool
    d_vocab: int
    tokenizer: str

    @classmethod
    def of(cls, adapter: MLPAdapter) -> TrackedModel:
        """Return that of one checkpoint."""
        info = adapter.info
        tokenizer, digest = getattr(adapter.model, "tokenizer", None), ""
        if tokenizer is not None:
            cut = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
            content = json.dumps([sorted(tokenizer.get_vocab().items()), cut])
            digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        sizes = (info.n_layers, info.d_model, info.d_mlp, info.activation, info.gated)
        return cls(*sizes, int(adapter.model.cfg.d_vocab), digest)

    def difference(self, other: TrackedModel) -> str:
        """Return in words what another checkpoint has that this one has not; "" if they are alike."""
        for name in ("n_layers", "d_model", "d_mlp", "activation", "gated", "d_vocab"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"{name} {theirs}, not {ours}"
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            return "another tokenizer"
        return ""


@dataclass(frozen=True)
class TrajectoryResult:
    """Activation sparsity over training.

    Attributes:
        p_percent: Rise of perplexity that was asked for.
        common: The CETT common to all checkpoints; None while it is not known.
        points: Checkpoints measured at the common CETT, in the order of training.
        pending: Checkpoints that were measured, but not at the common CETT or not asked for by the last run.
        gaps: Checkpoints that could not be loaded or measured.
        model: What all checkpoints have in common.
        corpus: What was measured on (`Windows.describe`).
        complete: Whether every checkpoint is a point or a gap.
        provenance: Versions, seed, command.
    """

    p_percent: float
    common: CommonCett | None
    points: tuple[TrajectoryPoint, ...]
    pending: tuple[TrajectoryPoint, ...]
    gaps: tuple[Gap, ...]
    model: TrackedModel
    corpus: dict[str, Any]
    complete: bool
    provenance: dict[str, Any]

    @property
    def cett(self) -> float | None:
        """The common CETT."""
        return None if self.common is None else self.common.cett

    @property
    def name(self) -> str:
        """Such as `CETT-PPL-1%`."""
        return search_name("cett_ppl", self.p_percent)

    def curve(self, which: str = "common") -> tuple[list[int], list[float]]:
        """Return training tokens and activation ratios, ready for `fit_law`: those of trained checkpoints.

        Args:
            which: `"common"`: all at the common CETT. `"own"`: each at its own CETT-PPL-p%, where that is reached.

        Raises:
            ValueError: If `which` is neither.
        """
        if which not in ("common", "own"):
            raise ValueError(f"which must be 'common' or 'own', got {which!r}")
        at = [(point.tokens, point.at(self.cett) if which == "common" else point.own) for point in self.points]
        kept = [(tokens, found) for tokens, found in at if tokens > 0 and found is not None and found.reached]
        return [tokens for tokens, _ in kept], [found.activation_ratio for _, found in kept]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `trajectory.json`.

        Its `points` are those that a law can be fitted to; the untrained model, which no law has a place for, is apart.
        """
        points = [point.to_json(self.cett) for point in self.points]
        return {
            "metric": "cett_ppl",
            "p_percent": self.p_percent,
            "complete": self.complete,
            "common": None if self.common is None else asdict(self.common),
            "points": [point for point in points if point["tokens"] > 0],
            "untrained": [point for point in points if point["tokens"] == 0],
            "pending": [point.to_json() for point in self.pending],
            "gaps": [asdict(gap) for gap in self.gaps],
            "model": asdict(self.model),
            "corpus": self.corpus,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrajectoryResult:
        """Read the content of `trajectory.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """

        def many(entries: Sequence[dict[str, Any]]) -> tuple[TrajectoryPoint, ...]:
            return tuple(TrajectoryPoint.from_json(entry) for entry in entries)

        common = data["common"]
        if common is not None:
            lists = {name: tuple(common[name]) for name in ("checkpoints", "evaluations")}
            common = CommonCett(**common | lists)
        return cls(
            p_percent=data["p_percent"],
            common=common,
            points=many([*data["untrained"], *data["points"]]),
            pending=many(data["pending"]),
            gaps=tuple(Gap(**gap) for gap in data["gaps"]),
            model=TrackedModel(**data["model"]),
            corpus=data["corpus"],
            complete=data["complete"],
            provenance=data["provenance"],
        )

    @classmethod
    def load(cls, folder: str | Path) -> TrajectoryResult:
        """Read `trajectory.json` of a run folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / TRAJECTORY_FILE
        data = read_json(path)
        with blaming(path):
            found: TrajectoryResult = checked(cls.from_json(data))
        return found
