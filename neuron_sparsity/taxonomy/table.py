"""The atlas: every neuron of a model as a row of one table.

1. From the statistics alone: class, activation frequency with N and the bound 3/N, size of the contribution.
2. With a model and windows, from one pass up to the unembedding (`active`): triggers, detectors, what activity says
   about the position, and how the classes move with N. The bits of the pass are read a few neurons at a time.
3. With a model: what the neuron's output row does to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_sparsity.adapter import MLPAdapter, ModelInfo, attach
from neuron_sparsity.corpus import Windows
from neuron_sparsity.entry import measurable
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.statistics import NeuronStatistics, check_corpus
from neuron_sparsity.store import decode, make_folder, provenance
from neuron_sparsity.taxonomy.active import watch
from neuron_sparsity.taxonomy.classes import CLASSES, ClassPoint, ClassRule, active_counts, active_name
from neuron_sparsity.taxonomy.columns import Question, frame, of_logits, of_pass, of_statistics, positional_words
from neuron_sparsity.taxonomy.files import ATLAS_FILE, ROLES, read_table, write_table
from neuron_sparsity.taxonomy.logits import RoleRule
from neuron_sparsity.taxonomy.positions import POSITIONAL_BITS
from neuron_sparsity.taxonomy.triggers import TriggerRule
from neuron_sparsity.typed import checked, expect

__all__ = ["Atlas", "atlas"]


@dataclass(frozen=True, eq=False)
class Atlas:
    """Every neuron of a model, a row each, and what the columns mean.

    Attributes:
        table: pandas DataFrame, ordered by (layer, neuron); `docs/atlas.md` lists the columns.
        model: What was measured.
        corpus: On what the statistics were recorded (`Windows.describe`).
        n_tokens: N of the statistics.
        watched: On what triggers and positions were counted, or None if they were not.
        definitions: What each group of columns means, in words.
        curve: Neurons in each class on more and more tokens; the windows are in a random order.
        question: What the atlas was asked for: the same question on the same model and text has the same answer.
        provenance: Versions and command.
    """

    table: Any
    model: ModelInfo
    corpus: dict[str, Any]
    n_tokens: int
    watched: dict[str, Any] | None
    definitions: dict[str, str]
    curve: tuple[ClassPoint, ...]
    question: dict[str, Any]
    provenance: dict[str, Any]

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many neurons there are of each kind, of the kinds that were measured.

        Returns:
            `classes`; `triggers` (covered by a small set, detectors of tokens, bigrams and trigrams, positional);
            `roles`.
        """
        kinds = {"classes": {name: int((self.table["class"] == name).sum()) for name in CLASSES}}
        kinds["classes"]["never"] = int((self.table["activation_count"] == 0).sum())
        if "n_triggers" in self.table:
            kinds["triggers"] = {"covered_by_few": int((self.table["n_triggers"] > 0).sum())}
            for n, name in enumerate(("token_detector", "bigram_detector", "trigram_detector"), start=1):
                kinds["triggers"][name] = int((self.table["ngram"] == n).sum())
            kinds["triggers"]["positional"] = int(self.table["is_positional"].sum())
        if "logit_role" in self.table:
            kinds["roles"] = {name: int((self.table["logit_role"] == name).sum()) for name in ROLES}
        return kinds

    def to_json(self) -> dict[str, Any]:
        """Return everything but the table, and the counts; plain values, ready for JSON."""
        return self._header() | {"counts": self.counts()}

    def save(self, folder: str | Path) -> Path:
        """Write `atlas.parquet` into a folder; return its path.

        Raises:
            RunFolderError: If it cannot be written.
        """
        path = Path(folder) / ATLAS_FILE
        make_folder(path.parent)
        write_table(path, self.table, self._header())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Atlas:
        """Read `atlas.parquet` of a folder.

        Raises:
            RunFolderError: If it is missing, damaged or of a newer schema.
        """
        path = Path(folder) / ATLAS_FILE
        table, header = read_table(path)
        found: Atlas = decode(path, lambda: _build(table, header))
        return found

    def _header(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "table"}
        return data | {"model": self.model.to_json(), "curve": [point.to_json() for point in self.curve]}


def _build(table: Any, header: dict[str, Any]) -> Atlas:
    values = {name: header[name] for name in Atlas.__dataclass_fields__ if name != "table"}
    values["model"] = ModelInfo.from_json(header["model"])
    values["curve"] = tuple(checked(ClassPoint.from_json(point)) for point in header["curve"])
    found = Atlas(table=table, **values)
    for corpus in (found.corpus, found.watched):
        if corpus is not None:
            check_corpus(corpus)
    if found.n_tokens < 1 or not all(isinstance(words, str) for words in found.definitions.values()):
        raise ValueError(f"{found.n_tokens} tokens, definitions {list(found.definitions)}")
    return checked(found)  # type: ignore[no-any-return]


def atlas(
    stats: NeuronStatistics,
    model: Any = None,
    windows: Windows | None = None,
    *,
    folder: str | Path | None = None,
    active: str | None = None,
    classes: ClassRule | None = None,
    triggers: TriggerRule | None = None,
    positional_bits: float = POSITIONAL_BITS,
    logits: bool = True,
    roles: RoleRule | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Atlas:
    """Return what kind of neuron each one is.

    Args:
        stats: What `record` returned.
        model: TransformerLens model or adapter, the one that was recorded. Without it, only what the statistics tell.
        windows: With a model, the corpus on which triggers and positions are counted: one more pass.
        folder: Where `atlas.parquet` is saved, and read instead if the same question is answered there already.
        active: What counts as active: a name in `stats.threshold_names`, or `"nonzero"`. If None, the first recorded
            thresholds, else `"nonzero"`.
        classes: What makes a neuron dead, rare and always on.
        triggers: What makes a set of triggers small, and a neuron a detector.
        positional_bits: Information on the position, above what chance shows, from which on a neuron is positional.
        logits: With a model, whether to work out the effects on logits: a product of all output rows with the
            unembedding.
        roles: What makes a neuron one of prediction, suppression or partition.
        seed: Of the order in which the windows enter the curve of classes.
        batch_size: Windows a forward pass; chosen from free memory if None.
        progress: Called as it goes.

    Returns:
        The atlas; saved in `folder` too, if one is given.

    Raises:
        MeasurementError: If post-activations are NaN or infinite, or memory or disk run out.
        ModelError: If the effects on logits of this model cannot be told.
        RunFolderError: If `folder` cannot be written, or what it holds is damaged.
        ValueError: If there are no such thresholds, the model is not the one that was recorded, windows come without a
            model, or `positional_bits` is not positive.

    Example:
        >>> made = ns.atlas(stats, model, corpus)  # doctest: +SKIP
        >>> made.table.query("is_token_detector and layer < 3")[["layer", "neuron", "triggers"]]  # doctest: +SKIP
    """
    if not positional_bits > 0:
        raise ValueError(f"positional_bits must be > 0, got {positional_bits}")
    if windows is not None and model is None:
        raise ValueError("windows need a model to run on them: atlas(stats, model, windows)")
    expect("stats", stats, "NeuronStatistics")
    adapter = None if model is None else attach(model) if windows is None else measurable(model, windows)
    if adapter is not None and adapter.info.fingerprint != stats.model.fingerprint:
        raise ValueError(
            f"the statistics are of {stats.model.name} with other weights than {adapter.info.name}; record this model"
        )
    question = Question(
        stats,
        windows,
        active_name(stats, active),
        classes or ClassRule(),
        triggers or TriggerRule(),
        positional_bits,
        (roles or RoleRule()) if logits and adapter is not None else None,
        seed,
    )
    if folder is not None and (Path(folder) / ATLAS_FILE).is_file():
        kept = Atlas.load(folder)
        if kept.question == question.to_json():
            return kept
    made = _made(question, adapter, batch_size, progress)
    if folder is not None:
        made.save(folder)
    return made


def _made(question: Question, adapter: MLPAdapter | None, batch_size: int | None, progress: Progress | None) -> Atlas:
    """Return the atlas that answers a question: group after group of columns, and what each means."""
    stats, windows = question.stats, question.windows
    count, words = active_counts(stats, question.active)
    columns = of_statistics(stats, count, question.classes)
    curve: tuple[ClassPoint, ...] = (question.classes.point(count, stats.n_tokens),)
    definitions = {"active": words, "classes": question.classes.words}
    if adapter is not None and windows is not None:
        bits = watch(adapter, windows, question.thresholds, batch_size=batch_size, progress=progress)
        pass_columns, curve = of_pass(question, bits, windows, adapter, progress)
        columns |= pass_columns
        definitions["triggers"] = question.triggers.words
        definitions["positional"] = positional_words(question.positional_bits)
    if adapter is not None and question.roles is not None:
        columns |= of_logits(adapter, question.roles, stats, progress)
        definitions["logits"] = question.roles.words
    return Atlas(
        table=frame(columns, stats.model),
        model=stats.model,
        corpus=stats.corpus,
        n_tokens=stats.n_tokens,
        watched=None if windows is None else windows.describe(),
        definitions=definitions,
        curve=curve,
        question=question.to_json(),
        provenance=provenance(seed=question.seed) | ({} if adapter is None else {"forward": adapter.forward}),
    )
