"""`SparsityCallback`: training goes as it would without it, bit for bit; its steps are what `track` finds of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from neuron_sparsity.errors import ModelError, RunFolderError
from neuron_sparsity.trajectory import SparsityCallback, TrajectoryResult, track
from neuron_sparsity.trajectory.tracker import Tracker

BATCH, LENGTH = 4, 32
PER_STEP = BATCH * LENGTH


class _Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of tokens in a fixed order; the collator drops some at random, so that a touched random state shows."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index].long()
        return {"input_ids": row, "labels": row.clone()}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    hidden = torch.rand(batch["labels"].shape) < 0.1 + 0.05 * random.random() + 0.05 * np.random.rand()  # noqa: NPY002
    return batch | {"labels": batch["labels"].masked_fill(hidden, -100)}


@pytest.fixture(scope="module")
def windows(own_windows: Callable[..., Any], tiny_hf_models: Callable[..., Any]) -> Any:
    return own_windows(tiny_hf_models("llama"), 24)


@pytest.fixture(scope="module")
def train(
    tiny_hf_models: Callable[..., Any], tiny_tokenizer: Any, own_windows: Callable[..., Any]
) -> Callable[..., Any]:
    """`train(folder, callbacks, max_steps=6)`: a Trainer that has trained the tiny Llama with dropout."""
    from transformers import Trainer, TrainingArguments

    tokens = own_windows(tiny_hf_models("llama"), 64, window=LENGTH, seed=5).tokens

    def run(folder: Path, *callbacks: Any, resume: Any = None, tokenizer: Any = tiny_tokenizer, **options: Any) -> Any:
        model = tiny_hf_models("llama", seed=3).requires_grad_(True)
        model.config.attention_dropout = 0.1
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 5e-3,
            "seed": 11,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        trainer = Trainer(
            model,
            TrainingArguments(str(folder), **settings | options),
            train_dataset=_Texts(tokens),
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_is_the_same_bit_for_bit(train: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    callback = SparsityCallback(windows, tmp_path / "run", steps=3, tokens_per_step=PER_STEP, keep_weights=True)
    watched = train(tmp_path / "watched", callback)
    assert same(weights(plain), weights(watched))
    assert watched.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())
    optimizers = [trainer.optimizer.state_dict()["state"] for trainer in (plain, watched)]
    for mine, others in zip(optimizers[0].values(), optimizers[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(others[name])) for name in mine)

    # Each step is what `track` finds of the weights that were there.
    result = callback.result
    assert result is not None
    assert [(point.checkpoint, point.tokens) for point in result.points] == [
        (f"step-{n}", n * PER_STEP) for n in (0, 3, 6)
    ]
    folders = [tmp_path / "run" / "weights" / f"step-{n}" for n in (0, 3, 6)]
    again = track(folders, windows, tokens_per_step=PER_STEP)
    assert again.common is not None
    assert again.cett == result.cett
    assert [p.at(again.cett) for p in again.points] == [p.at(result.cett) for p in result.points]
    assert [p.own for p in again.points] == [p.own for p in result.points]
    saved = track_of(folders[-1])
    assert all(torch.equal(saved[name], value) for name, value in weights(watched).items() if name in saved)
    on_disk = TrajectoryResult.load(tmp_path / "run")
    assert on_disk.points == result.points


def track_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def test_a_random_state_that_is_touched_would_show(train: Callable[..., Any], tmp_path: Path) -> None:
    """The training above draws from all three generators: a callback that draws from one changes the weights."""
    from transformers import TrainerCallback

    class Careless(TrainerCallback):
        def __init__(self, draw: Callable[[], Any]) -> None:
            self.draw = draw

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            self.draw()

    plain = weights(train(tmp_path / "plain"))
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        assert not same(plain, weights(train(tmp_path / "touched", Careless(draw))))


def test_tokens_that_the_trainer_counts(train: Callable[..., Any], windows: Any, tmp_path: Path) -> None:
    callback = SparsityCallback(windows, tmp_path / "run", tokens=[1, 2.5 * PER_STEP, 1e12], cett=0.2)
    train(tmp_path / "t", callback, max_steps=4, include_num_input_tokens_seen="all")
    assert callback.result is not None
    found = [(point.checkpoint, point.tokens) for point in callback.result.points]
    assert found == [("step-1", PER_STEP), ("step-3", 3 * PER_STEP), ("step-4", 4 * PER_STEP)]
    assert callback.result.common is not None
    assert (callback.result.cett, callback.result.common.given) == (0.2, True)
    assert not (tmp_path / "run" / "weights").exists()


def test_training_that_goes_on_goes_on_in_its_folder(
    train: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callback() -> SparsityCallback:
        return SparsityCallback(windows, tmp_path / "run", steps=[1, 2, 4], tokens_per_step=PER_STEP, cett=0.15)

    class PowerError(Exception):
        pass

    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise PowerError

    saving = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(PowerError):
        train(tmp_path / "a", callback(), Fails(), **saving)
    before = TrajectoryResult.load(tmp_path / "run").points
    assert [point.checkpoint for point in before] == ["step-1", "step-2", "step-4"]
    visited: list[str] = []
    visit = Tracker.visit
    monkeypatch.setattr(Tracker, "visit", lambda self, c, **kwargs: visited.append(c.label) or visit(self, c, **kwargs))
    resumed = callback()
    train(tmp_path / "a", resumed, resume=str(tmp_path / "a" / "checkpoint-3"), **saving)
    assert resumed.result is not None
    assert visited[:2] == ["step-4", "step-6"]  # step 4 was trained anew
    assert [point.checkpoint for point in resumed.result.points] == ["step-1", "step-2", "step-4", "step-6"]
    assert resumed.result.points[:2] == before[:2]
    assert resumed.result.gaps == ()
    # A training from the beginning is another one.
    with pytest.raises(RunFolderError, match="holds the trajectory of another training"):
        train(tmp_path / "c", callback())


def test_a_model_that_cannot_be_measured_stops_the_training_at_once(
    train: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = SparsityCallback(windows, tmp_path / "run", steps=1, tokens_per_step=PER_STEP)
    monkeypatch.setattr(
        "neuron_sparsity.trajectory.checkpoints.load_model",
        lambda *args, **kwargs: (_ for _ in ()).throw(ModelError("layer 0 is a mixture of experts")),
    )
    with pytest.raises(ModelError, match=r"mixture of experts .*first step"):
        train(tmp_path / "t", callback)


def test_a_step_that_cannot_be_measured_is_a_gap_with_its_own_reason(
    train: Callable[..., Any], windows: Any, tmp_path: Path
) -> None:
    """Also where training goes on later from a step behind it."""
    from transformers import TrainerCallback

    class Step2(TrainerCallback):
        """Weights that are no numbers while step 2 is measured; the steps after it are sound again."""

        sound: ClassVar[list[torch.Tensor]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight = kwargs["model"].model.layers[0].mlp.up_proj.weight.data
            if state.global_step == 2 and self.sound:
                weight.copy_(self.sound.pop())
            elif state.global_step == 2:
                self.sound.append(weight.clone())
                weight.fill_(float("nan"))

    class PowerError(Exception):
        pass

    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise PowerError

    def callback() -> SparsityCallback:
        return SparsityCallback(windows, tmp_path / "run", steps=[1, 2], tokens_per_step=PER_STEP, cett=0.15)

    saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(PowerError):
        train(tmp_path / "a", Step2(), callback(), Step2(), Fails(), **saving)
    assert [gap.checkpoint for gap in TrajectoryResult.load(tmp_path / "run").gaps] == ["step-2"]
    resumed = callback()
    train(tmp_path / "a", resumed, resume=str(tmp_path / "a" / "checkpoint-3"), **saving)
    assert resumed.result is not None
    assert [point.checkpoint for point in resumed.result.points] == ["step-1", "step-5"]
    assert [(gap.checkpoint, gap.tokens) for gap in resumed.result.gaps] == [("step-2", 2 * PER_STEP)]
    assert "NaN" in resumed.result.gaps[0].error
    assert not (tmp_path / "run" / "weights").exists()


def test_what_is_missing_is_told_before_training(
    train: Callable[..., Any], windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="the training tokens of a step are not known"):
        train(tmp_path / "t", SparsityCallback(windows, tmp_path / "run", steps=1))
    callback = SparsityCallback(windows, tmp_path / "run", steps=1, tokens_per_step=1)
    with pytest.raises(ValueError, match="the tokenizer is not known"):
        train(tmp_path / "t", callback, tokenizer=None)
    monkeypatch.setattr(torch.nn.Parameter, "ds_id", 1, raising=False)
    with pytest.raises(ModelError, match="is spread over processes"):
        train(tmp_path / "t", callback)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "steps= or as tokens="),
        ({"steps": 1, "tokens": [1]}, "steps= or as tokens="),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": []}, "list of step numbers"),
        ({"steps": [-1]}, "list of step numbers"),
        ({"steps": True}, "list of step numbers"),
        ({"tokens": []}, "list of numbers"),
        ({"tokens": [float("inf")]}, "list of numbers"),
        ({"steps": 1, "tokens_per_step": 0}, "tokens_per_step must be a positive"),
        ({"steps": 1, "p_percent": -1}, "p must be a positive"),
        ({"steps": 1, "cett": 0}, "cett must be in"),
    ],
)
def test_bad_arguments(options: dict[str, Any], complaint: str, windows: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        SparsityCallback(windows, tmp_path / "run", **options)


def test_a_text_is_no_windows(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="windows must be Windows, got str"):
        SparsityCallback("sotu", tmp_path, steps=1)  # type: ignore[arg-type]


def test_the_first_process_alone_makes_the_folder(
    windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    SparsityCallback(windows, tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    SparsityCallback(windows, tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "run.json").exists()
