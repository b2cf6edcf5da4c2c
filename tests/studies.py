"""A study that takes seconds, and one that was made up: what the tests of `study` share."""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

import torch

from neuron_sparsity.sparsity import LayerThreshold
from neuron_sparsity.study import RunPlan, StudyConfig, StudyResult, fitting, load_config, study
from neuron_sparsity.study.measuring import Patterns
from neuron_sparsity.trajectory import (
    CommonCett,
    DeadShare,
    Gap,
    SparsityAt,
    TrackedModel,
    TrajectoryPoint,
    TrajectoryResult,
)


def a_text(folder: Path, n_sentences: int = 900) -> Path:
    """Write sentences that a small model can learn something of, and return the file."""
    draw = random.Random(3)
    subjects = ["The senate", "A ship", "The army", "Congress", "The bank", "Every citizen"]
    verbs = ["has paid", "will leave", "must build", "cannot see", "takes", "has lost"]
    objects = ["the debt", "the harbour", "a treaty", "the public land", "all taxes", "peace and war"]
    said = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}." for _ in range(n_sentences)]
    path = folder / "speech.txt"
    path.write_text(" ".join(said), encoding="utf-8")
    return path


def a_file(text: Path) -> dict[str, Any]:
    """Return the content of a configuration file: models of one and of two layers, of ReLU."""
    return {
        "name": "micro",
        "about": "For tests.",
        "p_percent": 0.5,
        "activations": ["relu"],
        "text": {
            "source": [str(text)],
            "vocab": 300,
            "window": 16,
            "heldout_every": 3,
            "measure_tokens": 256,
        },
        "training": {
            "steps": 40,
            "batch": 8,
            "device_batch": 8,
            "learning_rate": 0.02,
            "warmup_steps": 2,
            "decay_steps": 4,
            "checkpoints": 6,
            "first_checkpoint": 4,
        },
        "models": [
            {"name": "a", "n_layers": 1, "d_model": 16, "d_mlp": 40, "n_heads": 2, "series": ["scale"]},
            {"name": "b", "n_layers": 2, "d_model": 16, "d_mlp": 40, "n_heads": 2, "series": ["scale"]},
        ],
    }


def a_config(text: Path, **training: Any) -> StudyConfig:
    """Return that configuration, with other values in `training`."""
    data = a_file(text)
    return StudyConfig.from_json(data | {"training": data["training"] | training})


def run(config: StudyConfig, folder: Path, **options: Any) -> Any:
    """Run a study on the CPU."""
    return study(config, folder, device="cpu", **options)


@functools.cache
def a_result(mark: str = "", *, few: bool = False, told: bool = True) -> StudyResult:
    """Return a study whose points were made up: ReLU's law falling, SiLU's rising, over shapes, scales and seeds.

    Args:
        mark: Put into every name that comes from outside.
        few: Only three scales, and no width-depth ratios.
        told: Whether the curves reach their limits.
    """
    file = a_file(Path("speech.txt"))
    config = StudyConfig.from_json(
        file
        | {"activations": ["relu", "silu"], "text": file["text"] | {"measure_tokens": 4096}}
        | {
            "models": [
                _shape(n, d, (0, 1, 2) if (n, d) == (4, 84) else (0,))
                for n, d in (_SHAPES[:1] + _SHAPES[-2:] if few else _SHAPES)
            ]
        }
        | {"training": load_config("tiny").to_json()["training"]}
    )
    trajectories = {run.name: _trajectory(config, run, mark, told=told) for run in config.runs()}
    patterns = {run.name: _patterns(run) for run in config.runs()}
    runs = [
        fitting.run_found(
            run,
            config,
            trajectories[run.name],
            patterns[run.name],
            parameters={"total": 1000 + 12 * run.model.n_layers * run.model.d_model**2, "non_embedding": _size(run)},
            losses=[{"step": 1, "loss": 3.0, "learning_rate": 0.1}],
        )
        for run in config.runs()
    ]
    facts = {"source": f"speech{mark}", "train_tokens": 1_024_000, "train_documents": 70, "vocab": 1024}
    facts |= {"train_sha256": "ab" * 32, "heldout_documents": 7}
    facts |= {"heldout": {"n_tokens": 4096, "window": 128, "sha256": "cd" * 32}}

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"t{ids[0]}{mark}"

    return StudyResult(
        config=config.to_json() | {"name": f"made up{mark}"},
        text=facts,
        runs=tuple(runs),
        missing=(f"later{mark}",),
        spreads=fitting.spreads(runs),
        series=fitting.series(runs),
        agreements=fitting.agreements(runs, patterns, Tokenizer()),
        frequency_edges=fitting.frequency_edges(4096),
        provenance={"versions": {"python": "3"}, "seed": 0, "command": mark},
    )


_SHAPES = ((4, 84), (8, 60), (3, 96), (2, 120), (1, 168), (2, 36), (3, 60))


def _shape(n_layers: int, d_model: int, seeds: tuple[int, ...]) -> dict[str, Any]:
    small = (n_layers, d_model) in _SHAPES[-2:]
    series = ["scale"] if small else ["width_depth"]
    return {
        "name": f"m{n_layers}.{d_model}",
        "n_layers": n_layers,
        "d_model": d_model,
        "d_mlp": 5 * d_model // 2,
        "n_heads": d_model // 12,
        "seeds": list(seeds),
        "series": [*series, "scale"] if (n_layers, d_model) == (4, 84) else series,
    }


def _size(run: RunPlan) -> int:
    return 12 * run.model.n_layers * run.model.d_model**2


def _limit(run: RunPlan) -> float:
    ratio = min(run.model.width_depth_ratio, 50.0)
    return (0.10 if run.activation == "relu" else 0.35) + 0.001 * ratio + 0.002 * run.seed


def _trajectory(config: StudyConfig, run: RunPlan, mark: str, *, told: bool) -> TrajectoryResult:
    points = []
    for number, step in enumerate(config.training.checkpoint_steps()):
        tokens = step * config.tokens_per_step
        done = tokens / (config.training.steps * config.tokens_per_step)
        away = 0.2 * math.exp(-6 * done) if run.activation == "relu" else -0.02 * done**-0.6
        if not told:  # nearly straight, and noisy
            away = (0.1 - 0.03 * done) * (1 if run.activation == "relu" else -1) + 0.002 * (-1) ** number
        ratio = _limit(run) + away
        layers = tuple(LayerThreshold(layer, 0.1, 0.2, ratio, 1.0) for layer in range(run.model.n_layers))
        dead = DeadShare(0.001, 0.02, 0.01, 0.0, (0.02,), 4096, 3 / 4096)
        at = SparsityAt(0.2, ratio, 1.01, 0.01, layers, dead)
        points.append(TrajectoryPoint(f"step-{step}{mark}", tokens, 90.0 - 40 * done, "f", at, (at,)))
    model = TrackedModel(run.model.n_layers, run.model.d_model, run.model.d_mlp, run.activation, True, 1024, "t")
    common = CommonCett(0.2, False, ("step-500",), 1.0, 0.1)
    gaps = (Gap(f"step-7{mark}", 7, f"cannot be loaded{mark}"),) if run.seed == 2 else ()
    return TrajectoryResult(1.0, common, tuple(points), (), gaps, model, {"n_tokens": 4096}, True, {})


def _patterns(run: RunPlan) -> Patterns:
    generator = torch.Generator().manual_seed(run.seed + run.model.d_model)
    frequency = torch.rand(run.model.n_layers, run.model.d_mlp, generator=generator) ** 4
    frequency[0, :3] = 0.0
    ratio = torch.linspace(0.1, 0.4, 40) + 0.05 * torch.rand(40, generator=generator)
    return Patterns(frequency, ratio, torch.arange(40), 4096, "step-450")
