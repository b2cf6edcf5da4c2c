"""Names of checkpoints: what they tell of training tokens, and which lists of them are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.errors import ModelError
from neuron_sparsity.trajectory import Checkpoint, checkpoint_schedule
from neuron_sparsity.trajectory.checkpoints import resolve, training_tokens_of


@pytest.mark.parametrize(
    ("label", "per_step", "tokens"),
    [
        ("step1000", 512, 512_000),
        ("runs/a-3/checkpoint-200", 10, 2000),
        ("runs/step9/checkpoint-200/", 10, 2000),
        ("global_step30", 2, 60),
        ("iter_0005000-ckpt", 1, 5000),
        ("step100", 0.5, 50),
        ("EleutherAI/pythia-1.4b@step143000", None, 299_892_736_000),
        ("EleutherAI/pythia-1.4b@step1000", 7, 7000),
        ("stanford-crfm/alias-gpt2-small-x21@checkpoint-400000", None, 209_715_200_000),
        ("allenai/OLMo-1B@step20000-tokens84B", None, 84_000_000_000),
        ("allenai/OLMo-1B@step20000-tokens84B", 4_194_304, 83_886_080_000),
        ("a/tokens_2.5M", None, 2_500_000),
        ("300B-tokens", None, 300_000_000_000),
        ("12 tokens", None, 12),
    ],
)
def test_training_tokens_from_a_name(label: str, per_step: float | None, tokens: int) -> None:
    assert training_tokens_of(label, tokens_per_step=per_step) == tokens


@pytest.mark.parametrize(
    ("label", "per_step", "reason"),
    [
        ("checkpoint-200", None, "its name tells step 200 only"),
        ("gpt2", None, "its name tells neither step nor tokens"),
        ("gpt2", 512.0, "its name tells neither step nor tokens"),
        ("runs/step100/final", 512.0, "its name tells neither step nor tokens"),
    ],
)
def test_tokens_that_are_not_known(label: str, per_step: float | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        training_tokens_of(label, tokens_per_step=per_step)
    assert label in str(raised.value)
    assert "--tokens-per-step" in str(raised.value)


def test_the_folder_around_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"is no checkpoint but a folder of 2, such as checkpoint-5; name them: .*/\*$"
    ):
        resolve([str(tmp_path)], training_tokens={str(tmp_path): 5})
    found = resolve([tmp_path / "checkpoint-10", "x" * 5000 + "/step3"], tokens_per_step=1)
    assert [checkpoint.tokens for checkpoint in found] == [3, 10]


def test_what_a_trainer_has_counted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-20"
    folder.mkdir()
    state = folder / "trainer_state.json"
    for content in ("{", "[]", json.dumps({"num_input_tokens_seen": 0}), json.dumps({"num_input_tokens_seen": "9"})):
        state.write_text(content)
        with pytest.raises(ValueError, match="are not known"):
            training_tokens_of(str(folder))
    state.write_text(json.dumps({"num_input_tokens_seen": 12_345}))
    assert training_tokens_of(str(folder)) == 12_345
    assert training_tokens_of(str(folder), tokens_per_step=10) == 200


def test_order_is_that_of_training() -> None:
    found = resolve(["b/step20", Path("a/step3"), ("step1", dict), Checkpoint("last", 900, "x")], tokens_per_step=10)
    assert [checkpoint.label for checkpoint in found] == ["step1", "a/step3", "b/step20", "last"]
    assert [checkpoint.tokens for checkpoint in found] == [10, 30, 200, 900]
    counted = resolve([Checkpoint("last", 9e2, "x"), Checkpoint("first", np.int64(3), "x")])  # type: ignore[arg-type]
    assert [(checkpoint.tokens, type(checkpoint.tokens)) for checkpoint in counted] == [(3, int), (900, int)]
    mapped = resolve(["early", "step2"], training_tokens={"early": 5.0}, tokens_per_step=10)
    assert [(checkpoint.label, checkpoint.tokens) for checkpoint in mapped] == [("early", 5), ("step2", 20)]


@pytest.mark.parametrize(
    ("checkpoints", "options", "error", "complaint"),
    [
        ([], {}, ValueError, "there is no checkpoint to track"),
        ("step1", {}, TypeError, "put it in a list"),
        ([""], {}, ValueError, "empty name"),
        ([7], {}, TypeError, "must be a folder, a name, or .label, callable., got int"),
        ([("step1", "folder")], {}, TypeError, "got tuple"),
        (["a/step1", "a/step1"], {"tokens_per_step": 1}, ValueError, "'a/step1' is named twice"),
        (["a/step1", "b/step1"], {"tokens_per_step": 1}, ValueError, "both trained on 1 tokens"),
        (["a"], {"training_tokens": {"a": -1}}, ValueError, "must be a number >= 0, got -1"),
        (["a"], {"training_tokens": {"a": float("nan")}}, ValueError, "got nan"),
        (["a"], {"training_tokens": {"a": True}}, ValueError, "got True"),
        (["a"], {"training_tokens": {"a": 1, "b": 2}}, ValueError, "names 'b', which is none of"),
        (["step1"], {"tokens_per_step": 0}, ValueError, "tokens_per_step must be a positive"),
        (["step1"], {"tokens_per_step": float("inf")}, ValueError, "tokens_per_step must be a positive"),
        ([Checkpoint("a", -3, "a")], {}, ValueError, "must be a number >= 0, got -3"),
    ],
)
def test_lists_that_are_refused(checkpoints: Any, options: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        resolve(checkpoints, **options)


@pytest.mark.parametrize(
    ("name", "n", "first", "last", "tokens"),
    [
        ("EleutherAI/pythia-70m", 154, "step0", "step143000", 299_892_736_000),
        ("EleutherAI/pythia-70m-v0", 143, "step1000", "step143000", 299_892_736_000),
        ("stanford-crfm/alias-gpt2-small-x21", 609, "checkpoint-0", "checkpoint-400000", 209_715_200_000),
    ],
)
def test_schedules_that_transformer_lens_knows(
    name: str, n: int, first: str, last: str, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    found = checkpoint_schedule(name)
    assert (len(found), found[0], found[-1]) == (n, f"{name}@{first}", f"{name}@{last}")
    ordered = resolve(found)
    assert [checkpoint.label for checkpoint in ordered] == found
    assert ordered[-1].tokens == tokens
    assert not caplog.records
    assert checkpoint_schedule(name, every=50)[-1] == found[-1]
    assert checkpoint_schedule(name, every=50) == found[(n - 1) % 50 :: 50]


def test_schedules_that_are_not_known() -> None:
    with pytest.raises(ModelError, match="no checkpoint schedule of 'gpt2' is known"):
        checkpoint_schedule("gpt2")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        checkpoint_schedule("EleutherAI/pythia-70m", every=0)


def test_a_callable_may_raise_anything() -> None:
    def broken() -> Any:
        raise KeyError("weights")

    def load(source: Callable[[], Any]) -> Any:
        return Checkpoint("a", 1, source).load(device="cpu", dtype="float32", trust_remote_code=False)

    with pytest.raises(ModelError, match="the callable of 'a' failed with KeyError: 'weights'"):
        load(broken)
