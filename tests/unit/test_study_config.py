"""Configurations of a study: what is shipped, what is refused and how it is named, when checkpoints are kept."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.study import StudyConfig, TrainingPlan, load_config, plan_rows, presets
from tests.studies import a_file

PUBLISHED = {"0.1b": 1.08e8, "0.2b": 2.41e8, "0.4b": 4.52e8, "0.8b": 7.60e8, "1.2b": 1.18e9}


@pytest.mark.parametrize(("scale", "parameters"), PUBLISHED.items())
def test_the_models_of_the_paper_have_its_parameters(scale: str, parameters: float) -> None:
    (row,) = plan_rows(load_config(f"paper-{scale}"))
    assert row["parameters"]["non_embedding"] == pytest.approx(parameters, rel=0.02)
    assert row["parameters"]["total"] > row["parameters"]["non_embedding"]


def test_every_preset_says_what_it_is_for() -> None:
    found = presets()
    assert set(found) == {"tiny", "small", *(f"paper-{scale}" for scale in PUBLISHED)}
    for name, about in found.items():
        config = load_config(name)
        assert (config.name, config.about) == (name, about)
        assert StudyConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_grid_varies_one_thing_at_a_time(name: str) -> None:
    config = load_config(name)
    rows = {row["model"]: row for row in plan_rows(config)}
    shapes = {model.name: model for model in config.models}
    wide = [rows[model.name] for model in config.models if "width_depth" in model.series]
    sizes = [row["parameters"]["non_embedding"] for row in wide]
    assert len({row["width_depth_ratio"] for row in wide}) >= 4  # or no bottleneck can be fitted
    assert max(sizes) / min(sizes) < 1.05
    scales = [rows[model.name] for model in config.models if "scale" in model.series]
    assert len(scales) >= 3
    assert max(row["parameters"]["non_embedding"] for row in scales) > 10 * min(
        row["parameters"]["non_embedding"] for row in scales
    )
    assert len(shapes["base"].seeds) >= 3
    assert set(config.activations) == {"relu", "silu"}


def test_checkpoints_are_close_at_first_and_end_both_phases() -> None:
    for name in presets():
        plan = load_config(name).training
        steps = plan.checkpoint_steps()
        assert plan.stable_until in steps
        assert steps[-1] == plan.steps
        assert steps[0] == plan.first_checkpoint
        assert len(steps) == plan.checkpoints
        gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
        assert gaps[0] < gaps[-2] / 3
    assert [TrainingPlan(10, 1, 1, 1.0, 2, 3).phase(step) for step in (2, 3, 7, 8)] == [
        "warmup",
        "stable",
        "stable",
        "decay",
    ]
    assert 10 in TrainingPlan(10, 1, 1, 1.0, 2, 0, checkpoints=6, first_checkpoint=1).checkpoint_steps()


def test_a_file_is_read(tmp_path: Path) -> None:
    data = a_file(Path("speech.txt"))
    (tmp_path / "mine.json").write_text(json.dumps(data), encoding="utf-8")
    config = load_config(tmp_path / "mine.json")
    assert config.training.batch == 8
    assert [run.name for run in config.runs()] == ["a-relu-0", "b-relu-0"]
    (tmp_path / "mine.toml").write_text('name = "x"\nabout = 3\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.toml: 'training' is missing"):
        load_config(tmp_path / "mine.toml")
    (tmp_path / "bad.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.toml is no TOML"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match=r"none\.toml cannot be read \(No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"there is no preset 'huge'; choose one of paper-0\.1b, .*tiny"):
        load_config("huge")


def changed(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(a_file(Path("speech.txt")))
    place: Any = data
    *front, last = path.split(".")
    for key in front:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("training.lr", 0.1, r"unknown key 'training\.lr'; known here: steps, batch, "),
        ("modells", [], r"unknown key 'modells'; known here: name, "),
        ("models.1.depth", 3, r"unknown key 'models\[1\]\.depth'"),
        ("training", 3, "training must be a table, got 3"),
        ("training.steps", "many", r'training\.steps must be int, got "many"'),
        ("training.steps", 0, r"training\.steps must be > 0, got 0"),
        ("training.learning_rate", float("nan"), r"training\.learning_rate must be > 0, got nan"),
        ("training.device_batch", 3, r"training\.batch 8 must be a multiple of training\.device_batch 3"),
        ("training.warmup_steps", 38, r"training\.warmup_steps 38 and decay_steps 4 leave no stable phase of 40 steps"),
        ("training.weight_decay", -0.1, r"training\.weight_decay must be >= 0, got -0\.1"),
        ("training.adam_beta2", 1.0, r"training\.adam_beta2 must be in \[0, 1\), got 1\.0"),
        ("training.max_grad_norm", float("nan"), r"training\.max_grad_norm must be >= 0, got nan"),
        ("text.window", 1, r"text\.window must be at least 2"),
        ("text.measure_tokens", 15, r"text\.measure_tokens 15 is less than a window of 16"),
        ("text.source", "sotu", r'text\.source must be a list of strings, as \["\.\.\."\], got "sotu"'),
        ("models.0.seeds", 0, r"models\[0\]\.seeds must be a list of whole numbers, as \[0, 1\], got 0"),
        ("models", {"name": "a"}, r"models must be a list of tables, each under \[\[models\]\], got"),
        ("training.checkpoints", 3, r"training\.checkpoints must be at least 6"),
        ("training.first_checkpoint", 36, r"training\.first_checkpoint 36 lies beyond the stable phase"),
        ("text.vocab", 200, r"text\.vocab must be at least 257"),
        ("text.heldout_every", 1, r"text\.heldout_every must be at least 2"),
        ("text.source", [], r"text\.source names no text"),
        ("activations", ["gelu"], "activations must be some of relu, silu, each once"),
        ("activations", ["relu", "relu"], "activations must be some of relu, silu, each once"),
        ("models", [], "there are no models"),
        ("models.1.name", "a", "two models have the same name"),
        ("models.1.name", "../a", r"model '\.\./a': a name is letters, digits"),
        ("models.0.n_heads", 3, "model 'a': d_model 16 must be n_heads 3 heads of an even size"),
        ("models.0.n_layers", 0, "model 'a': n_layers must be at least 1, got 0"),
        ("models.0.seeds", [1, 1], "model 'a': seeds must be numbers >= 0, each once"),
        ("models.0.series", ["height"], "model 'a': unknown series 'height'; known: width_depth, scale"),
    ],
)
def test_what_cannot_be_is_named(path: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^the configuration: {said}"):
        StudyConfig.from_json(changed(path, value))
