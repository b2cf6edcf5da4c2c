"""What a study finds: every point of every run, laws, spread over seeds, and what depends on shape and scale."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuron_sparsity.laws.result import finite
from neuron_sparsity.store import blaming, read_json
from neuron_sparsity.typed import checked

__all__ = ["STUDY_FILE", "Agreement", "LawFound", "Series", "Spread", "StudyPoint", "StudyResult", "StudyRun"]

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class StudyPoint:
    """One checkpoint of a run.

    Attributes:
        step: Optimizer step.
        tokens: Training tokens.
        phase: `warmup`, `stable` or `decay`; laws are fitted to the stable ones.
        activation_ratio: At the CETT common to the run's checkpoints.
        own_activation_ratio: At its own CETT-PPL-p%; None where no CETT costs p percent.
        own_cett: That CETT.
        ppl_dense: Perplexity of the held-out text.
        ppl_increase_percent: Measured rise at the common CETT.
        dead_ratio: Neurons active on under 0.1 % of the tokens, over all; None where the CETT cuts everything.
        layer_activation_ratios: The activation ratio of each layer.
    """

    step: int
    tokens: int
    phase: str
    activation_ratio: float
    own_activation_ratio: float | None
    own_cett: float | None
    ppl_dense: float
    ppl_increase_percent: float
    dead_ratio: float | None
    layer_activation_ratios: tuple[float, ...]


@dataclass(frozen=True)
class LawFound:
    """A law fitted to the stable phase of a run, or why there is none.

    Attributes:
        law: `relu` or `silu`.
        fit: `LawFit.to_json()`; None if the law cannot be fitted.
        problem: Why, in words; "" if it can.
        told: Whether the data identify the limit, with all points and without the first quarter of them: a limit that
            rests on the first points alone is told by how training begins.
        later: The fit without the first quarter: `drop_first`, `limit`, `limit_interval`; None if it cannot be made.
        places: Training tokens at which the curve is told.
        mean: The curve there.
    """

    law: str
    fit: dict[str, Any] | None
    problem: str
    told: bool
    later: dict[str, Any] | None = None
    places: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyRun:
    """One model of the grid.

    Attributes:
        name: Name of the run.
        model: Name of its shape.
        activation: `relu` or `silu`.
        seed: Its seed.
        shape: `n_layers`, `d_model`, `d_mlp`, `n_heads`.
        series: Figures that it belongs to.
        parameters: `total` and `non_embedding`.
        points: Its checkpoints.
        gaps: Checkpoints that could not be measured, and why.
        common: The common CETT, its mean rise of perplexity, and whether p was reached.
        laws: Both laws, its own first.
        end_ratio: Activation ratio at the end of the stable phase; None if that is a gap.
        half_tokens: Training tokens at which half of the change since the warm-up was made; None if there is none.
        frequency_shares: Share of neurons in each bin of activation frequency (`StudyResult.frequency_edges`), that of
            neurons never active first; empty if not measured.
        losses: Logged training losses: `step`, `loss`, `learning_rate`.
    """

    name: str
    model: str
    activation: str
    seed: int
    shape: dict[str, int]
    series: tuple[str, ...]
    parameters: dict[str, int]
    points: tuple[StudyPoint, ...]
    gaps: tuple[dict[str, Any], ...]
    common: dict[str, Any]
    laws: tuple[LawFound, ...]
    end_ratio: float | None
    half_tokens: float | None
    frequency_shares: tuple[float, ...]
    losses: tuple[dict[str, float], ...]

    @property
    def width_depth_ratio(self) -> float:
        """`d_model / n_layers`."""
        return self.shape["d_model"] / self.shape["n_layers"]

    @property
    def stable_end(self) -> StudyPoint | None:
        """The checkpoint at the end of the stable phase; None if that is a gap."""
        if self.end_ratio is None:
            return None
        return next(point for point in reversed(self.points) if point.phase == "stable")

    @property
    def limit(self) -> float | None:
        """The limit of its own law, where the data identify it."""
        own = self.laws[0]
        return float(own.fit["limit"]) if own.told and own.fit is not None else None


@dataclass(frozen=True)
class Spread:
    """How much one quantity differs between the seeds of a model.

    Attributes:
        model: Name of the shape.
        activation: `relu` or `silu`.
        quantity: `activation_ratio`, `dead_ratio` or `ppl_dense`, at the end of the stable phase.
        values: One a seed.
        mean: Their mean.
        deviation: Their standard deviation (of a sample).
    """

    model: str
    activation: str
    quantity: str
    values: tuple[float, ...]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Series:
    """How the limit depends on shape or scale.

    Attributes:
        kind: `width_depth` or `scale`.
        activation: `relu` or `silu`.
        quantity: `limit`, or `end` where the data of some run do not identify it: the ratio at the end of the stable
            phase.
        runs: Names of the runs.
        x: Width-depth ratio, or parameters without embeddings, of each.
        y: The quantity.
        half_tokens: Training tokens at which half of the change was made.
        fit: `WidthDepthFit.to_json()` or `ScaleFit.to_json()`; None if there is none.
        problem: Why not; "" if there is.
    """

    kind: str
    activation: str
    quantity: str
    runs: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    half_tokens: tuple[float | None, ...]
    fit: dict[str, Any] | None
    problem: str


@dataclass(frozen=True)
class Agreement:
    """Whether two models are active on the same tokens.

    Attributes:
        first: Name of a run.
        second: Name of another.
        kind: `scale`, or `seed` for two seeds of one shape: what to compare it with.
        correlation: Pearson's, of the mean activation ratio over entries of the vocabulary; None if one is constant.
        n_entries: Entries that occur often enough.
        pairs: Up to 300 of them: the entry as text, its ratio in the first model and in the second.
    """

    first: str
    second: str
    kind: str
    correlation: float | None
    n_entries: int
    pairs: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True)
class StudyResult:
    """A study.

    Attributes:
        config: The configuration.
        text: What was trained and measured on.
        runs: Those that are finished.
        missing: Names of those that are not.
        spreads: Over seeds.
        series: Over shape and scale.
        agreements: Between scales, and between seeds.
        frequency_edges: Edges of the bins of activation frequency, rising; the last is 1.
        provenance: Versions, seed, command.
    """

    config: dict[str, Any]
    text: dict[str, Any]
    runs: tuple[StudyRun, ...]
    missing: tuple[str, ...]
    spreads: tuple[Spread, ...]
    series: tuple[Series, ...]
    agreements: tuple[Agreement, ...]
    frequency_edges: tuple[float, ...]
    provenance: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every run of the grid is finished."""
        return not self.missing

    def to_json(self) -> dict[str, Any]:
        """Return the content of `study.json`."""
        data: dict[str, Any] = finite(asdict(self))
        return data | {"complete": self.complete}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StudyResult:
        """Read the content of `study.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        return cls(
            config=data["config"],
            text=data["text"],
            runs=tuple(_run(run) for run in data["runs"]),
            missing=tuple(data["missing"]),
            spreads=tuple(Spread(**_tuples(spread)) for spread in data["spreads"]),
            series=tuple(Series(**_tuples(series)) for series in data["series"]),
            agreements=tuple(
                Agreement(**one | {"pairs": tuple(tuple(pair) for pair in one["pairs"])}) for one in data["agreements"]
            ),
            frequency_edges=tuple(data["frequency_edges"]),
            provenance=data["provenance"],
        )

    @classmethod
    def load(cls, folder: str | Path) -> StudyResult:
        """Read `study.json` of a folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / STUDY_FILE
        data = read_json(path)
        with blaming(path):
            found: StudyResult = checked(cls.from_json(data))
        return found


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def _run(data: dict[str, Any]) -> StudyRun:
    inner = {
        "points": tuple(StudyPoint(**_tuples(point)) for point in data["points"]),
        "laws": tuple(LawFound(**_tuples(law)) for law in data["laws"]),
    }
    return StudyRun(**_tuples(data) | inner)
