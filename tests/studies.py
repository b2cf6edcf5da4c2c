"""A study that takes seconds, and one that was made up: what the tests of `study` share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from neuron_sparsity.study import StudyConfig, study

PROBE = "scale"


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
