"""The steps of a run, each reading what the steps before it left in the run folder and writing its own file.

    sparsity   -> sparsity.json        CETT-PPL-p% on the calibration part
    record     -> statistics.safetensors
    saliency   -> saliency.safetensors gradients, where the ranking needs them: on text of their own, if there is some
    ablate     -> ablation.json        searched on the calibration part, confirmed on the held-out part
    damage     -> damage.json          with damage.safetensors; of sparsity.json, or of ablation.json
    passage    -> passage.json         activity of every layer on every token of one window
    atlas      -> atlas.parquet        what kind of neuron each one is
    pareto     -> pareto.json          every rule over a range of activation ratios; its passes in pareto-passes.json

A step whose file is there already, for the same request, is not run again: an interrupted report goes on where it
stopped. In a `parallel.session` rank 0 writes these files, into a folder that all ranks see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from neuron_sparsity import parallel
from neuron_sparsity.ablation import AblationResult, drop_finished_search, removable_sets
from neuron_sparsity.ablation_files import answers, file_names, removal_at
from neuron_sparsity.adapter import MLPAdapter, attach
from neuron_sparsity.cett_search import Metric
from neuron_sparsity.corpus import Windows
from neuron_sparsity.damage import DamageResult, damage
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.greedy import refine, refined_name
from neuron_sparsity.kernels import Backend
from neuron_sparsity.pareto import ParetoResult, pareto
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.ranking import Ranking, rank
from neuron_sparsity.recorder import record
from neuron_sparsity.recording import drop_finished
from neuron_sparsity.rules import parse_rules
from neuron_sparsity.run_results import means_of
from neuron_sparsity.saliency import SALIENCY_FILE, NeuronSaliency, saliency
from neuron_sparsity.scores import RANKINGS, best_ranking
from neuron_sparsity.sparsity import SparsityResult, cett_ppl_sparsities
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import RunFolder, blaming, decode, read_json, write_json
from neuron_sparsity.taxonomy import Atlas, atlas
from neuron_sparsity.truncation import TokenActivity, token_activity
from neuron_sparsity.typed import checked
from neuron_sparsity.windows import keep_windows

__all__ = ["CALIBRATION_SHARE", "Run"]

CALIBRATION_SHARE = 2 / 3


@dataclass
class Run:
    """A model, a corpus and a folder, and the steps that can be taken with them.

    Args:
        model: TransformerLens model or adapter.
        windows: The corpus. With `heldout`, a third of its windows is kept for confirmation.
        path: The run folder.
        heldout: Whether to keep windows for confirmation. A folder whose results were measured with some kept goes
            on that way.
        others: Text for rankings by gradients that shares nothing with the windows; if None, they are made on the
            calibration part, and flatter themselves in the search.
        batch_size: Windows a forward pass; chosen from free memory if None.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        progress: Called after each batch.

    Raises:
        RunFolderError: If the folder cannot be written or holds another run.
        ValueError: If there are too few windows to keep some.
    """

    model: Any
    windows: Windows
    path: Path
    heldout: bool = False
    others: Windows | None = None
    batch_size: int | None = None
    backend: Backend = "auto"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.adapter: MLPAdapter = attach(self.model)
        self.calibration, self.confirmation = self.windows, None
        if self.heldout or self._was_split():
            self.calibration, self.confirmation = self.windows.split(CALIBRATION_SHARE)
        info = self.adapter.info
        request = {
            "kind": "run",
            "model": {"name": info.name, "fingerprint": info.fingerprint, "dtype": info.dtype},
            "corpus": self.windows.describe(),
        }
        for what, value in (*request.items(), ("calibration part", self.calibration.sha256)):
            parallel.agreed(what, value)
        with parallel.leader_first("the run folder is there"):
            if not parallel.leads() and not (Path(self.path) / "run.json").is_file():
                raise RunFolderError(
                    f"{self.path} of rank 0 is not seen here; name with --out a folder all ranks share"
                )
            self.folder = RunFolder(self.path, request)
        self._keep_windows(self._measured_windows())

    def sparsity(
        self, p_percent: float, *, metric: Metric = "ppl", calibration: Windows | None = None
    ) -> SparsityResult:
        """Search CETT-PPL-p% (or CETT-KL-p%), or read it if the folder has it for the same question."""
        return self.sparsities((p_percent,), metric=metric, calibration=calibration)[0]

    def sparsities(
        self, p_percents: Sequence[float], *, metric: Metric = "ppl", calibration: Windows | None = None
    ) -> tuple[SparsityResult, ...]:
        """Search several p in one, or read them: the first goes to `sparsity.json`, another to `sparsity-p<p>.json`."""
        names = ["sparsity.json", *(f"sparsity-p{p:g}.json" for p in p_percents[1:])]
        other = None if calibration is None or calibration.sha256 == self.calibration.sha256 else calibration.sha256
        parallel.agreed("calibration text", other)
        found = [
            self._found(name, SparsityResult.from_json, partial(_answers, (p, metric, self.calibration.sha256, other)))
            for name, p in zip(names, p_percents, strict=True)
        ]
        if parallel.agreed("whether the results are there", all(result is not None for result in found)):
            return tuple(found)
        results = cett_ppl_sparsities(
            self.adapter,
            self.calibration,
            p_percents=p_percents,
            metric=metric,
            calibration=calibration,
            backend=self.backend,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        if parallel.leads():
            for name, result in zip(names, results, strict=True):
                write_json(self.folder.file(name), result.to_json())
        self._keep_windows(self.calibration)
        return results

    def record(self, result: SparsityResult | None = None) -> NeuronStatistics:
        """Record every neuron, counting exactly under a result's thresholds; or read the recording if it is there.

        A recording of the whole text serves too where no thresholds are asked for: `ablation.json` says then that
        the ranking has seen the held-out part.
        """
        if result is not None and not result.reached:
            result = None  # its thresholds cut everything: no neuron could be told from another by them
        thresholds = {} if result is None else {result.name: result.thresholds}
        if parallel.agreed("whether statistics.safetensors is there", self.folder.has("statistics.safetensors")):
            stats = NeuronStatistics.load(self.folder.path)
            path = self.folder.file("statistics.safetensors")
            model, sha = decode(path, lambda: (stats.model.fingerprint, str(stats.corpus["sha256"])))
            whole = result is None and sha in (self.calibration.sha256, self.windows.sha256)
            same = whole or (result is not None and sha == self.calibration.sha256 and _same_thresholds(stats, result))
            if same and model == self.adapter.info.fingerprint:
                if parallel.leads():
                    drop_finished(self.folder.path)
                return stats
        return record(
            self.adapter,
            self.calibration,
            thresholds=thresholds,
            folder=self.folder.path,
            backend=self.backend,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    @property
    def ranking_text(self) -> Windows:
        """What rankings by gradients are made on."""
        return self.calibration if self.others is None else self.others

    def saliency(self) -> NeuronSaliency:
        """Measure gradients on the text for rankings, or read them if they are there."""
        path = self.folder.file(SALIENCY_FILE)
        if self.folder.has(SALIENCY_FILE):
            found = NeuronSaliency.load(self.folder.path)
            measured = decode(path, lambda: (found.model.fingerprint, found.corpus["sha256"]))
            if measured == (self.adapter.info.fingerprint, self.ranking_text.sha256):
                return found
        return saliency(
            self.adapter,
            self.ranking_text,
            folder=self.folder.path,
            batch_size=self.batch_size,
            progress=self.progress,
        )

    def default_ranking(self, replacement: str) -> str:
        """Return the ranking that lets most neurons go; of those without gradients where weights are away."""
        return best_ranking(replacement, gradients=not self.adapter.offloaded)

    def ranked_on(self, stats: NeuronStatistics, ranking: str) -> str:
        """Return the hash of the text that a ranking is, or will be, made on."""
        found: str = self.ranking_text.sha256 if RANKINGS[ranking].needs == "saliency" else stats.corpus["sha256"]
        return found

    def rank(self, stats: NeuronStatistics, ranking: str, scope: str, seed: int) -> Ranking:
        """Rank the neurons, by gradients where the ranking needs them."""
        gradients = self.saliency() if RANKINGS[ranking].needs == "saliency" else None
        return rank(stats, by=ranking, saliency=gradients, scope=scope, seed=seed)  # type: ignore[call-overload,no-any-return]

    def refine(self, n_remove: int, **how: Any) -> Ranking:
        """Rank the neurons by gradients, a share at a time."""
        first, running = self.saliency(), {"batch_size": self.batch_size, "progress": self.progress}
        return refine(self.adapter, self.ranking_text, first, n_remove=n_remove, **how, **running)  # type: ignore[arg-type]

    def ablate(
        self,
        stats: NeuronStatistics,
        *,
        p_percent: float,
        replacement: str,
        scope: str,
        seed: int,
        ranking: str | None = None,
    ) -> AblationResult:
        """Find what can go for good, or read it if the folder has it for the same question."""
        question = {"ranking": ranking, "replacement": replacement, "scope": scope, "seed": seed}
        return self.ablations(stats, p_percents=(p_percent,), **question)[0]  # type: ignore[arg-type]

    def ablations(
        self,
        stats: NeuronStatistics,
        *,
        p_percents: Sequence[float],
        replacement: str,
        scope: str,
        seed: int,
        ranking: str | None = None,
        refine: int = 0,
        n_controls: int = 3,
    ) -> tuple[AblationResult, ...]:
        """Find what can go at several p, or read it: first `ablation.json`, then `ablation-p<p>.json`.

        What an interrupted search has measured is taken up.
        """
        ranking = ranking or self.default_ranking(replacement)
        names = file_names(p_percents)
        how = {"replacement": replacement, "scope": scope}
        name, ordered = (refined_name(ranking, refine, **how), "model") if refine else (ranking, scope)  # type: ignore[arg-type]
        asked = (name, replacement, ordered, seed, self.calibration.sha256, self.ranked_on(stats, ranking))
        found = [
            self._found(name, AblationResult.from_json, partial(answers, (p, *asked), n_controls))
            for name, p in zip(names, p_percents, strict=True)
        ]
        if not all(result is not None for result in found):
            found = list(
                removable_sets(
                    self.adapter,
                    self.calibration,
                    self.refine(refine, by=ranking, **how) if refine else self.rank(stats, ranking, scope, seed),
                    p_percents=p_percents,
                    replacement=replacement,
                    heldout=self.confirmation,
                    ranked_on=self.ranking_text if RANKINGS[ranking].needs == "saliency" else None,
                    n_controls=n_controls,
                    seed=seed,
                    folder=self.folder.path,
                    batch_size=self.batch_size,
                    progress=self.progress,
                )
            )
            for name, result in zip(names, found, strict=True):
                write_json(self.folder.file(name), result.to_json())
        drop_finished_search(self.folder.path, found[0])
        return tuple(found)

    def known_sparsity(self) -> SparsityResult | None:
        """Return what `sparsity.json` holds, if it is there."""
        return self._found("sparsity.json", SparsityResult.from_json, lambda old: True)

    def damage(self, p_percent: float | None, *, of: str = "truncation", layers: Any = "alone") -> DamageResult:
        """Measure what the truncation for a p (1 if None) does to single tokens, or an ablation of the folder.

        The ablation is that of `ablation.json` if p is None. It is measured on the held-out part, a truncation on the
        text of its search.
        """
        options: dict[str, Any] = {"layers": layers, "batch_size": self.batch_size, "progress": self.progress}
        if of == "ablation":
            removed = removal_at(self.folder, p_percent)
            means = means_of(self.folder, removed)
            text = self.confirmation or self.calibration
            found = damage(self.adapter, text, removed, means=means, **options)
        else:
            result = self.sparsity(1.0 if p_percent is None else p_percent)
            found = damage(self.adapter, self.calibration, result, **options)
        found.save(self.folder.path)
        return found

    def passage(self, result: SparsityResult) -> TokenActivity:
        """Measure the activity of every layer on each token of the calibration part's middle window, or read it."""
        thresholds = {"thresholds": result.thresholds}
        path, middle = self.folder.file("passage.json"), self.calibration.n_windows // 2
        if self.folder.has("passage.json"):
            data = read_json(path)
            found = decode(path, lambda: checked(TokenActivity.from_json(data)))
            same = (data.get("thresholds"), found.corpus.get("sha256"), found.corpus.get("window_index"))
            if same == (result.thresholds, self.calibration.sha256, middle):
                return found
        activity = token_activity(self.adapter, self.calibration, result, window=middle, backend=self.backend)
        write_json(path, activity.to_json() | thresholds)
        return activity

    def atlas(self, stats: NeuronStatistics, *, active: str | None = None, logits: bool = True) -> Atlas:
        """Find what kind of neuron each one is, or read it if the folder has it for the same question.

        Args:
            stats: The recording, of this folder or of other text.
            active: What counts as active; if None, exceeding the first recorded thresholds, else not exactly zero.
            logits: Whether to work out the effects on logits.
        """
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        return atlas(
            stats, self.adapter, self.calibration, folder=self.folder.path, active=active, logits=logits, **options
        )

    def pareto(self, rules: Sequence[str], *, p_percents: Sequence[float], n_points: int) -> ParetoResult:
        """Measure perplexity against activation ratio under every rule, or read it if the folder has the same question.

        Another question on the same text takes up the passes that were made for this one.
        """
        labels = [rule.label for rule in parse_rules(rules)]
        asked = (labels, sorted(set(p_percents)), n_points, self.calibration.sha256)

        def same(old: ParetoResult) -> bool:
            labels = [curve.label for curve in old.curves]
            return (labels, list(old.p_percents), old.n_points, old.corpus["sha256"]) == asked

        found = self._found("pareto.json", ParetoResult.from_json, same)
        if found is not None:
            return found
        result = pareto(
            self.adapter,
            self.calibration,
            rules=rules,
            p_percents=p_percents,
            n_points=n_points,
            folder=self.folder.path,
            backend=self.backend,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        write_json(self.folder.file("pareto.json"), result.to_json())
        return result

    def _keep_windows(self, main: Windows) -> None:
        """Write the windows: `tokens` and `scored` are those of `sparsity.json`, or of the part that is searched.

        Where those are all windows and a search for removable neurons was made on a part of them, that part is there
        as `calibration_tokens`; its held-out part is `heldout_tokens`.
        """
        if not parallel.leads():
            return
        parts = {"": main}
        if self.confirmation is not None or self.folder.has("ablation.json"):
            calibration, heldout = self.windows.split(CALIBRATION_SHARE)
            parts |= {"heldout_": heldout} | (
                {} if calibration.sha256 == main.sha256 else {"calibration_": calibration}
            )
        keep_windows(self.folder.path, parts)

    def _measured_windows(self) -> Windows:
        """Return the windows that `sparsity.json` was measured on, if it is there; else those to be searched."""
        found = self._found(
            "sparsity.json", SparsityResult.from_json, lambda old: old.corpus["sha256"] == self.windows.sha256
        )
        return self.calibration if found is None else self.windows

    def _was_split(self) -> bool:
        """Whether the folder holds results that were measured on the calibration part."""
        if self.windows.n_windows < 2:
            return False
        part = self.windows.split(CALIBRATION_SHARE)[0].sha256
        for name in ("sparsity.json", "ablation.json"):
            path = Path(self.path) / name
            if path.is_file():
                data = read_json(path)
                with blaming(path):
                    if data["corpus"]["sha256"] == part:
                        return True
        return False

    def _found(self, name: str, build: Callable[[dict[str, Any]], Any], same: Callable[[Any], bool]) -> Any:
        """Return what a file holds if it answers the same question, else None."""
        if not self.folder.has(name):
            return None
        path = self.folder.file(name)
        data = read_json(path)
        old = decode(path, lambda: checked(build(data)))
        return old if decode(path, lambda: same(old)) else None


def _answers(asked: tuple[Any, ...], old: SparsityResult) -> bool:
    """Whether a search answers what is asked: p, metric, text, and text of the thresholds if it is another."""
    other = None if old.calibration is None else old.calibration["sha256"]
    return (old.p_percent, old.metric.removeprefix("cett_"), old.corpus["sha256"], other) == asked


def _same_thresholds(stats: NeuronStatistics, result: SparsityResult) -> bool:
    if result.name not in stats.threshold_names:
        return False
    recorded = stats.thresholds[:, stats.threshold_names.index(result.name)]
    return recorded.tolist() == [float(cut) for cut in result.thresholds]
