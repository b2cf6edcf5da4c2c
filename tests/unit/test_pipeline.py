"""The steps of a run: what each reads from the folder, what it measures again, what is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_sparsity import pipeline
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.pipeline import Run
from neuron_sparsity.recording import PARTIAL
from neuron_sparsity.run_results import load_run, means_of, render
from neuron_sparsity.statistics import NeuronStatistics
from neuron_sparsity.store import read_tensors, write_tensors

QUESTION: dict[str, Any] = {"ranking": "contribution", "replacement": "mean", "scope": "model", "seed": 0}


@pytest.fixture(scope="module")
def model(tiny_bridge: Callable[..., Any]) -> Any:
    return tiny_bridge("llama")


@pytest.fixture(scope="module")
def windows(model: Any, sample_tokens: Callable[..., Any]) -> Windows:
    tokens = sample_tokens(model, 6, window=12)
    scored = torch.ones(tokens.shape, dtype=torch.bool)
    scored[:, 0] = False
    return Windows(tokens, scored, "own words", tuple("abcdef"), "apart", bos=True)


@pytest.fixture
def run(model: Any, windows: Windows, tmp_path: Path) -> Callable[..., Run]:
    return lambda **options: Run(model, windows, tmp_path / "run", **options)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measurements that were made, in order."""
    made: list[str] = []
    for name in ("cett_ppl_sparsities", "record", "saliency", "removable_sets", "token_activity"):
        original = getattr(pipeline, name)

        def counted(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            made.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(pipeline, name, counted)
    return made


def test_a_third_of_the_windows_is_kept_for_confirmation(run: Callable[..., Run], windows: Windows) -> None:
    held = run(heldout=True)
    assert held.confirmation is not None
    assert (held.calibration.n_windows, held.confirmation.n_windows) == (4, 2)
    rows = {tuple(row) for part in (held.calibration, held.confirmation) for row in part.tokens.tolist()}
    assert rows == {tuple(row) for row in windows.tokens.tolist()}


def test_one_window_cannot_confirm_itself(model: Any, windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one window cannot be split"):
        Run(model, windows.take(1), tmp_path / "run", heldout=True)
    assert not (tmp_path / "run").exists()


def test_each_question_is_measured_once(run: Callable[..., Run], passes: list[str]) -> None:
    def steps(p_percent: float, **changes: Any) -> list[str]:
        passes.clear()
        fresh = run(heldout=True)
        result = fresh.sparsity(p_percent)
        stats = fresh.record(result)
        fresh.ablate(stats, p_percent=p_percent, **QUESTION | changes)
        fresh.passage(result)
        return list(passes)

    everything = ["cett_ppl_sparsities", "record", "removable_sets", "token_activity"]
    assert steps(1.0) == everything
    assert steps(1.0) == []
    for change in ({"ranking": "maximum"}, {"replacement": "zero"}, {"scope": "layer"}, {"seed": 3}):
        assert steps(1.0, **change) == ["removable_sets"], change
        assert steps(1.0, **change) == []
    assert steps(50.0) == everything


def test_a_recording_is_made_again_only_for_new_thresholds(run: Callable[..., Run], passes: list[str]) -> None:
    alone = run()
    alone.record()
    result = alone.sparsity(1.0)
    with_thresholds = alone.record(result)
    assert with_thresholds.threshold_names == ("CETT-PPL-1%",)
    assert alone.record().threshold_names == ("CETT-PPL-1%",)
    assert passes == ["record", "cett_ppl_sparsities", "record"]


@pytest.mark.parametrize("next_step", ["the same", "other thresholds"])
def test_a_kill_between_a_result_and_the_removal_of_its_state(
    run: Callable[..., Run], passes: list[str], monkeypatch: pytest.MonkeyPatch, next_step: str
) -> None:
    alone, unlink = run(), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == PARTIAL:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        patched.setattr(pipeline, "record", partial(pipeline.record, checkpoint_seconds=0))
        with pytest.raises(KeyboardInterrupt):
            alone.record()
    assert alone.folder.has(PARTIAL)
    assert alone.folder.has("statistics.safetensors")
    alone.record(None if next_step == "the same" else alone.sparsity(1.0))
    assert passes == (["record"] if next_step == "the same" else ["record", "cett_ppl_sparsities", "record"])
    assert not alone.folder.has(PARTIAL)


def test_the_state_of_another_recording_stays(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """`report` was interrupted in its recording under thresholds; `record` finds its own result and leaves that be."""
    alone = run()
    alone.record()
    result = alone.sparsity(1.0)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(NeuronStatistics, "save", killed)
        patched.setattr(pipeline, "record", partial(pipeline.record, checkpoint_seconds=0))
        with pytest.raises(KeyboardInterrupt):
            alone.record(result)
    alone.record()
    assert alone.folder.has(PARTIAL)


def test_windows_of_the_folder_are_those_of_its_results(run: Callable[..., Run], windows: Windows) -> None:
    whole = run()
    whole.sparsity(1.0)
    path = whole.folder.file("windows.safetensors")
    assert set(read_tensors(path)[0]) == {"tokens", "scored"}
    part = run(heldout=True)
    assert part.confirmation is not None
    kept, header = read_tensors(path)
    assert torch.equal(kept["tokens"], windows.tokens)
    assert header["sha256"] == windows.sha256
    assert torch.equal(kept["calibration_tokens"], part.calibration.tokens)
    assert torch.equal(kept["heldout_scored"], part.confirmation.scored)
    part.sparsity(1.0)
    kept, header = read_tensors(path)
    assert torch.equal(kept["tokens"], part.calibration.tokens)
    assert header["sha256"] == part.calibration.sha256
    assert "calibration_tokens" not in kept


def test_large_windows_are_not_kept(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sparsity.windows._MAX_BYTES", 100)
    assert not run().folder.has("windows.safetensors")


def test_a_folder_with_a_recording_alone_can_be_rendered(run: Callable[..., Run]) -> None:
    alone = run()
    with pytest.raises(RunFolderError, match=r"statistics.safetensors does not exist"):
        load_run(alone.folder.path)
    alone.record()
    found = load_run(alone.folder.path)
    assert found["stats"].n_tokens == 72
    assert [found[key] for key in ("result", "removed", "passage")] == [None, None, None]
    render(alone.folder.path)
    assert alone.folder.has("report.html")


def test_files_that_do_not_fit_together_are_named(run: Callable[..., Run]) -> None:
    alone = run()
    alone.record()
    alone.sparsity(1.0)
    path = alone.folder.file("sparsity.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"ppl_dense": "low"}))
    with pytest.raises(
        RunFolderError, match=r'sparsity.json is damaged \(TypeError: ppl_dense must be float, got "low"'
    ):
        load_run(alone.folder.path)
    path.write_text(json.dumps(data | {"evaluations": [{}]}))
    with pytest.raises(RunFolderError, match=r"run cannot be rendered .*delete that file and run its step again"):
        render(alone.folder.path)
    path.write_text(json.dumps(data))
    statistics = alone.folder.file("statistics.safetensors")
    tensors, header = read_tensors(statistics)
    write_tensors(statistics, tensors | {"histogram": tensors["histogram"][:, :3]}, header)
    with pytest.raises(RunFolderError, match=r"statistics.safetensors is damaged \(ValueError: histogram"):
        render(alone.folder.path)


def test_gradients_are_measured_once_and_only_where_a_ranking_needs_them(
    run: Callable[..., Run], passes: list[str], windows: Windows
) -> None:
    def steps(heldout: bool = True, **changes: Any) -> list[str]:
        passes.clear()
        fresh = run(heldout=heldout)
        fresh.ablate(fresh.record(), p_percent=1.0, **QUESTION | changes)
        return list(passes)

    assert steps() == ["record", "removable_sets"]
    assert steps(ranking=None) == ["saliency", "removable_sets"]
    assert steps(ranking=None) == steps(ranking="fisher_mean_shrunk") == []
    assert steps(ranking=None, replacement="zero") == ["removable_sets"]
    found = load_run(run().folder.path)["removed"]
    assert (found.ranking, found.replacement) == ("fisher_shrunk", "zero")
    assert found.ranking_corpus["sha256"] == found.corpus["sha256"] == run(heldout=True).calibration.sha256


def test_gradients_are_of_text_apart_where_there_is_some(
    run: Callable[..., Run], passes: list[str], windows: Windows
) -> None:
    others = windows._pick([5], "page")
    apart = Run(run().model, windows._pick(range(5), "page"), run().folder.path.parent / "apart", True, others)
    removed = apart.ablate(apart.record(), p_percent=30.0, **QUESTION | {"ranking": None})
    assert passes == ["record", "saliency", "removable_sets"]
    assert removed.ranking_corpus["sha256"] == others.sha256
    assert removed.ranking_corpus["unseen_in_search"] is True
    means = means_of(apart.folder, removed)
    assert means is not None
    assert torch.equal(means, apart.saliency().mean_activation)
    (apart.folder.path / "saliency.safetensors").unlink()
    with pytest.raises(RunFolderError, match="has means of other text"):
        means_of(apart.folder, removed)


def test_gradients_of_other_text_are_measured_again(run: Callable[..., Run], passes: list[str]) -> None:
    first = run(heldout=True)
    found = first.saliency()
    dataclasses.replace(found, corpus=found.corpus | {"sha256": "0"}).save(first.folder.path)
    assert first.saliency().corpus == found.corpus
    assert passes == ["saliency", "saliency"]
    first.folder.file("saliency.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunFolderError, match=r"saliency\.safetensors cannot be read"):
        first.saliency()


def test_where_weights_are_away_the_default_needs_no_gradients(
    run: Callable[..., Run], passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(heldout=True)
    monkeypatch.setattr(type(here.adapter), "offloaded", True)
    removed = here.ablate(here.record(), p_percent=1.0, **QUESTION | {"ranking": None})
    assert removed.ranking == "maximum"
    assert passes == ["record", "removable_sets"]
