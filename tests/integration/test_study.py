"""A study of seconds, from text to findings; killed at any moment it ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from neuron_sparsity.adapter import attach, load_model
from neuron_sparsity.errors import CorpusError, MeasurementError, RankError, RunFolderError
from neuron_sparsity.recorder import record
from neuron_sparsity.study import RunPlan, StudyResult, grid, training
from neuron_sparsity.study import alone as alone_module
from neuron_sparsity.study.alone import alone
from neuron_sparsity.study.measuring import patterns
from neuron_sparsity.study.text import prepare
from neuron_sparsity.trajectory import TrajectoryResult
from tests.integration.killing import said_by
from tests.studies import a_config, a_text, run

pytest.importorskip("accelerate")
pytest.importorskip("transformer_lens.model_bridge")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("study") / "run"
    return folder, run(a_config(text), folder)


def test_every_run_has_its_points(done: tuple[Path, StudyResult], text: Path) -> None:
    folder, result = done
    config = a_config(text)
    assert result.complete
    assert [found.name for found in result.runs] == ["a-relu-0", "b-relu-0"]
    for found in result.runs:
        assert tuple(point.step for point in found.points) == config.training.checkpoint_steps()
        assert [point.tokens for point in found.points] == [128 * point.step for point in found.points]
        assert [point.phase for point in found.points][-2:] == ["stable", "decay"]
        assert found.points[-1].ppl_dense < found.points[0].ppl_dense / 4  # it has learned
        trajectory = TrajectoryResult.load(folder / "runs" / found.name / "track")
        assert found.common["cett"] == trajectory.cett
        assert [point.activation_ratio for point in found.points] == trajectory.curve()[1]
        assert found.end_ratio == found.points[-2].activation_ratio
        assert [law.law for law in found.laws] == ["relu", "silu"]
        assert sum(found.frequency_shares) == pytest.approx(1)
        assert len(found.losses) == 40
        rates = [entry["learning_rate"] for entry in found.losses]
        assert rates[2] == rates[34] == 0.02 > rates[-1]
        assert rates[0] < rates[1]
    assert result.runs[0].parameters["non_embedding"] < result.runs[1].parameters["non_embedding"]
    assert StudyResult.load(folder).to_json() == json.loads(json.dumps(result.to_json()))


def test_only_weights_are_kept_of_finished_runs(done: tuple[Path, StudyResult]) -> None:
    for folder in (done[0] / "runs").glob("*/checkpoints/checkpoint-*"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json"} <= names
        assert not [name for name in names if name.startswith(("optimizer", "rng_state", "scheduler", "training_args"))]


def test_training_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """The Trainer's state comes last: what lacks it, or has half of it, was being written when the kill came."""
    for step, state in ((3, '{"global_step": 3}'), (10, '{"global_step": 10}'), (20, '{"global_st'), (30, None)):
        folder = training.checkpoint_path(tmp_path, step)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert training._last_whole(tmp_path, keep=True) == tmp_path / "checkpoint-10"
    assert len(list(tmp_path.iterdir())) == 4
    assert training._last_whole(tmp_path, keep=False) == tmp_path / "checkpoint-10"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-10"}
    assert training._last_whole(tmp_path / "none", keep=False) is None


def test_held_out_text_is_never_trained_on(done: tuple[Path, StudyResult], text: Path) -> None:
    prepared = prepare(a_config(text), done[0] / "text")
    trained = " ".join(prepared.tokenizer.decode(row["input_ids"]) for row in prepared.rows())
    document = prepared.tokenizer.decode(prepared.heldout.tokens[:4].flatten())
    assert len(document) > 100
    assert document not in trained
    assert prepared.rows()[3]["input_ids"].tolist() in np.asarray(prepared.rows().tokens).tolist()
    assert set(prepared.heldout.documents) == {"speech.txt@16384"}  # the middle one of three passages


def test_activation_functions_begin_alike(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same weights, same windows in the same order; another seed, others."""
    config = a_config(text)
    prepared = prepare(config, tmp_path)
    begun: dict[tuple[str, int], Any] = {}

    def train(self: Any, **options: Any) -> None:
        weights = torch.cat([value.flatten() for value in self.model.state_dict().values()])
        first = next(iter(self.get_train_dataloader()))["input_ids"]
        begun[self.model.config.hidden_act, self.args.seed] = (weights.clone(), first.cpu())

    monkeypatch.setattr(transformers.Trainer, "train", train)
    for activation, seed in (("relu", 0), ("silu", 0), ("relu", 1)):
        plan = RunPlan(config.models[0], activation, seed)
        training.train(plan, config, prepared, tmp_path / plan.name, cpu=True)
    relu, silu, other = begun["relu", 0], begun["silu", 0], begun["relu", 1]
    assert torch.equal(relu[0], silu[0])
    assert torch.equal(relu[1], silu[1])
    assert not torch.equal(relu[0], other[0])
    assert not torch.equal(relu[1], other[1])


def test_patterns_are_those_of_a_recording(done: tuple[Path, StudyResult], text: Path) -> None:
    folder = done[0]
    prepared = prepare(a_config(text), folder / "text")
    adapter = attach(load_model(str(folder / "runs/b-relu-0/checkpoints/checkpoint-36"), device="cpu"))
    thresholds = [0.02, 0.05]
    found = patterns(adapter, prepared.heldout, thresholds)
    stats = record(adapter, prepared.heldout, thresholds={"these": thresholds}, n_examples=0)
    assert torch.equal(found.frequency, stats.activation_frequency("these").float())
    assert int(found.token_count.sum()) == found.n_tokens == prepared.heldout.n_tokens
    weighted = (found.token_ratio.double() * found.token_count).sum() / found.n_tokens
    assert float(weighted) == pytest.approx(float(found.frequency.double().mean()), abs=1e-6)
    with pytest.raises(ValueError, match="1 thresholds for 2 layers"):
        patterns(adapter, prepared.heldout, [0.1])


def test_a_finished_study_is_not_made_again(
    done: tuple[Path, StudyResult], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run(a_config(text), folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert again.to_json() == result.to_json()


def test_some_runs_alone(done: tuple[Path, StudyResult], text: Path, tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "runs" / "b-relu-0")
    part = run(a_config(text), tmp_path / "copy", only=["a-relu-0"])
    assert part.missing == ("b-relu-0",)
    assert not part.complete
    assert [found.name for found in part.runs] == ["a-relu-0"]
    with pytest.raises(ValueError, match="there is no run 'c' in micro; its runs: a-relu-0, b-relu-0"):
        run(a_config(text), tmp_path / "copy", only=["c"])


def test_a_folder_of_another_configuration(done: tuple[Path, StudyResult], text: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds another run \(training\.batch: 8, not 16\)"):
        run(a_config(text, batch=16), done[0])


def test_text_too_short(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"tokens to train on, and 4,000 steps of 128 tokens need 512,000; give more"):
        run(a_config(text, steps=4000), tmp_path / "long")
    short = tmp_path / "short.txt"
    short.write_text("Six hundred people stood at the harbour.", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"short\.txt has .* tokens to train on"):
        run(a_config(short), tmp_path / "short")
    with pytest.raises(CorpusError, match="no file and no built-in text"):
        run(a_config(tmp_path / "none.txt"), tmp_path / "none")


def test_bad_arguments(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run(a_config(text), tmp_path, jobs=0)
    with pytest.raises(ValueError, match="device must be 'cpu' or None"):
        grid.study(a_config(text), tmp_path, device="cuda:1")


def test_training_that_diverges_is_told(text: Path, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"training loss of a-relu-0 is .*; lower training\.learning_rate"):
        run(a_config(text, learning_rate=1e30, max_grad_norm=1e30), tmp_path / "wild")


def test_a_step_takes_the_same_windows_whatever_they_are_shared_by(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_config(text, batch=48, device_batch=12).training
    shared = {n: training.shares(plan, n) for n in (1, 2, 3, 4, 6, 16, 48)}
    assert shared == {1: (12, 4), 2: (12, 2), 3: (8, 2), 4: (12, 1), 6: (8, 1), 16: (3, 1), 48: (1, 1)}
    with pytest.raises(ValueError, match=r"training\.batch 48 cannot be shared by 5 processes; start a number of them"):
        training.shares(plan, 5)

    class FourGPUs(transformers.TrainingArguments):  # type: ignore[misc]
        def __post_init__(self) -> None:
            super().__post_init__()
            assert self.device is not None
            self._n_gpu = 4

    monkeypatch.setattr(transformers, "TrainingArguments", FourGPUs)
    found = training._arguments(a_config(text).runs()[0], a_config(text), tmp_path, cpu=True)
    assert found.train_batch_size * found.gradient_accumulation_steps == a_config(text).training.batch


def test_a_checkpoint_of_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"global_step": 3, "train_batch_size": 8, "log_history": [{"loss": 1.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    for rank in (0, 1):
        (tmp_path / f"rng_state_{rank}.pth").write_bytes(b"half")
    monkeypatch.setattr(training, "launched", lambda: (1, 2))
    training._fit_processes(tmp_path, 4)
    assert json.loads((tmp_path / "trainer_state.json").read_text("utf-8")) == state | {"train_batch_size": 4}
    assert {path.name for path in tmp_path.iterdir()} == {"trainer_state.json", "rng_state_0.pth"}


def test_a_process_that_is_gone_is_told(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = a_config(text), ["gloo/transport/tcp/pair.cc:534] Connection closed by peer", "the device is hot"]
    prepared = prepare(config, tmp_path / "text")

    def train(self: Any, **options: Any) -> None:
        raise RuntimeError(said[0])

    monkeypatch.setattr(transformers.Trainer, "train", train)
    monkeypatch.setattr(training, "launched", lambda: (0, 2))
    with pytest.raises(RankError, match=r"another process of this training is gone \(gloo.*the same command goes on"):
        training.train(config.runs()[0], config, prepared, tmp_path / "a", cpu=True)
    del said[0]
    with pytest.raises(RuntimeError, match="the device is hot"):
        training.train(config.runs()[0], config, prepared, tmp_path / "a", cpu=True)


def test_a_folder_that_another_process_works_in(
    done: tuple[Path, StudyResult], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setattr(alone_module, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(CorpusError, match="no file and no built-in text"):
        run(a_config(tmp_path / "none.txt"), tmp_path / "out")
    with (
        alone(tmp_path / "out" / "text", "the text"),
        pytest.raises(RunFolderError, match=r"the text in .* is held by"),
    ):
        run(a_config(text), tmp_path / "out")
    begun = tmp_path / "begun"
    shutil.copytree(done[0], begun)
    shutil.rmtree(begun / "runs")
    held = rf"run b-relu-0 in .* is held by another process \(process {os.getpid()} on .*\); let it end"
    with alone(begun / "runs" / "b-relu-0", "run b"), pytest.raises(RunFolderError, match=held):
        run(a_config(text), begun)
    assert not (begun / "runs" / "a-relu-0" / "checkpoints").exists()
    shutil.copytree(done[0], tmp_path / "done")
    with alone(tmp_path / "done" / "runs" / "b-relu-0", "run b"):
        assert run(a_config(text), tmp_path / "done").complete  # nothing is left to do there


def test_a_folder_without_its_text_is_free_for_another_configuration(text: Path, tmp_path: Path) -> None:
    """Whoever mistypes the name of a text need not name another folder, nor empty this one."""
    with pytest.raises(CorpusError, match="no file and no built-in text"):
        run(a_config(tmp_path / "none.txt"), tmp_path / "out")
    with pytest.raises(CorpusError, match="need 512,000"):
        run(a_config(text, steps=4000), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == a_config(text, steps=4000).to_json()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"schema": 1, "kind": "trajectory"}', encoding="utf-8")
    with pytest.raises(RunFolderError, match=r'holds another run \(kind: "trajectory", not "study"\)'):
        run(a_config(text), tmp_path / "other")


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_process(done: tuple[Path, StudyResult], text: Path, tmp_path: Path) -> None:
    found = run(a_config(text), tmp_path / "jobs", jobs=2)
    assert [vars(one) for one in found.runs] == [vars(one) for one in done[1].runs]
    # A process that fails is named, with its reason.
    shutil.rmtree(tmp_path / "jobs" / "runs" / "a-relu-0")
    (tmp_path / "jobs" / "runs" / "a-relu-0").write_text("in the way", encoding="utf-8")
    with pytest.raises(MeasurementError, match=r"run a-relu-0 failed: .*; the same command goes on"):
        run(a_config(text), tmp_path / "jobs", jobs=2, only=["a-relu-0", "b-relu-0"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="every attempt is a fork")
def test_killed_studies_end_with_the_same_bits(done: tuple[Path, StudyResult], text: Path, tmp_path: Path) -> None:
    said = said_by("tests.integration.study_killing", text, tmp_path / "killed", 6)
    assert said == "finished after 6 deaths\n"
    found = StudyResult.load(tmp_path / "killed")
    assert [vars(one) for one in found.runs] == [vars(one) for one in done[1].runs]
    assert found.agreements == done[1].agreements
