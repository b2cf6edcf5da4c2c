"""Checkpoints: what is loaded, by which name, and how many tokens it was trained on."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from neuron_sparsity.adapter import MLPAdapter, attach, checkpoint_steps, load_model
from neuron_sparsity.errors import ModelError
from neuron_sparsity.weights import first_line

__all__ = ["Checkpoint", "Source", "checkpoint_schedule", "resolve", "training_tokens_of"]

Source = str | Path | tuple[str, Callable[[], Any]]
"""A local folder, a Hugging Face name (`NAME@REVISION` for one of its revisions), or (label, callable)."""

_FAMILIES = {
    # 1,024 sequences of 2,048 tokens; runs that took larger batches have their revisions named in these steps too.
    "EleutherAI/pythia": ("step{}", 2_097_152),
    # 512 sequences of 1,024 tokens: effective_bsz and seq_len of conf/mistral-small.yaml and mistral-medium.yaml, with
    # what they inherit, in github.com/stanford-crfm/mistral; their schedule is the one that TransformerLens has.
    "stanford-crfm/": ("checkpoint-{}", 524_288),
}
"""Start of the name: how the revision of a step is called, and the training tokens of one step."""

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter|iteration)s?[-_=]?(\d+)", re.IGNORECASE)
_COUNT = r"(\d+(?:\.\d+)?)\s?([kmbt]?)"
_TOKENS = re.compile(rf"(?:tokens?[-_=]?{_COUNT}(?![a-z0-9])|(?<![a-z0-9.]){_COUNT}[-_ ]?tokens?)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a training run.

    Attributes:
        label: Its name in the result.
        tokens: Training tokens it has seen; 0 for the untrained model.
        source: What `load_model` takes, or a callable that returns that.
    """

    label: str
    tokens: int
    source: str | Path | Callable[[], Any]

    def load(self, *, device: str | None, dtype: str, trust_remote_code: bool) -> MLPAdapter:
        """Return the model, ready to be measured.

        Raises:
            ModelError: If it cannot be loaded or measured.
        """
        found: Any = self.source
        if not isinstance(found, str | Path):
            try:
                found = found()
            except Exception as error:  # a callable may raise anything; the other checkpoints go on
                raise ModelError(
                    f"the callable of {self.label!r} failed with {type(error).__name__}: {first_line(error)}"
                ) from error
        model = load_model(found, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return attach(model, name=self.label)


def checkpoint_schedule(name: str, *, every: int = 1) -> list[str]:
    """Return the revisions of a model whose training checkpoints TransformerLens knows, ready for `track`.

    Pythia and the GPT-2 models of Stanford CRFM; `track` knows their training tokens too. Nothing is downloaded.

    Args:
        name: Full Hugging Face name.
        every: Keep every so-manieth of them, counted from the last.

    Returns:
        Names with revisions, in the order of training.

    Raises:
        ModelError: If TransformerLens knows no schedule for it.
        ValueError: If `every` is less than 1.

    Example:
        >>> found = checkpoint_schedule("EleutherAI/pythia-70m")
        >>> len(found), found[1], found[-1]
        (154, 'EleutherAI/pythia-70m@step1', 'EleutherAI/pythia-70m@step143000')
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    family = _family(name)
    if family is None:
        raise ModelError(
            f"no checkpoint schedule of {name!r} is known, only those of {', '.join(_FAMILIES)}...; "
            "name the checkpoints one by one, as NAME@REVISION"
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # TransformerLens tells of Pythia's older versions every time it is asked
    try:
        steps = checkpoint_steps(name)
    finally:
        logging.disable(before)
    revisions = [family[0].format(step) for step in steps]
    return [f"{name}@{revision}" for revision in revisions[::-1][::every][::-1]]


def resolve(
    checkpoints: Sequence[Source | Checkpoint],
    *,
    training_tokens: Mapping[str, float] | None = None,
    tokens_per_step: float | None = None,
) -> list[Checkpoint]:
    """Return checkpoints in the order of training.

    Args:
        checkpoints: In any order.
        training_tokens: Training tokens of each label; what is not in it is read from the label.
        tokens_per_step: Training tokens of one step, for labels that name a step.

    Raises:
        TypeError: If one is no folder, name, pair or `Checkpoint`.
        ValueError: If there is none, the tokens of one are not known, or two have the same label or tokens.
    """
    if isinstance(checkpoints, str | Path):
        raise TypeError(f"checkpoints must be a sequence of them, got {checkpoints!r}; put it in a list")
    if tokens_per_step is not None and not (math.isfinite(tokens_per_step) and tokens_per_step > 0):
        raise ValueError(f"tokens_per_step must be a positive number of tokens, got {tokens_per_step:g}")
    found: list[Checkpoint] = []
    given = dict(training_tokens or {})
    for item in checkpoints:
        if isinstance(item, Checkpoint):
            found.append(replace(item, tokens=_counted(item.label, item.tokens)))
            continue
        label, source = _named(item)
        _refuse_a_folder_of_several(source)
        tokens = given.get(label)
        if tokens is None:
            tokens = training_tokens_of(label, tokens_per_step=tokens_per_step)
        found.append(Checkpoint(label, _counted(label, tokens), source))
    if not found:
        raise ValueError("there is no checkpoint to track; name folders, Hugging Face revisions or (label, callable)")
    unknown = sorted(set(given) - {checkpoint.label for checkpoint in found})
    if unknown:
        raise ValueError(f"training_tokens names {unknown[0]!r}, which is none of the checkpoints")
    found.sort(key=lambda checkpoint: checkpoint.tokens)
    labels = [checkpoint.label for checkpoint in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"checkpoint {label!r} is named twice; name each once")
    for first, second in itertools.pairwise(found):
        if first.tokens == second.tokens:
            raise ValueError(
                f"{first.label!r} and {second.label!r} were both trained on {first.tokens:,} tokens; "
                "the tokens of checkpoints must differ"
            )
    return found


def training_tokens_of(label: str, *, tokens_per_step: float | None = None) -> int:
    """Return the training tokens that a checkpoint's name tells, or the state of the Trainer that wrote the folder.

    Args:
        label: Folder, `NAME@REVISION`, or any label. Steps are read from `step1000`, `checkpoint-1000` and the like,
            tokens from `tokens2.1B`, `2.1B-tokens`.
        tokens_per_step: Training tokens of one step. If given, it goes before tokens in the name.

    Raises:
        ValueError: If they are not known.

    Example:
        >>> training_tokens_of("runs/step1000", tokens_per_step=4096)
        4096000
        >>> training_tokens_of("EleutherAI/pythia-70m@step1"), training_tokens_of("model@step50-tokens1.5B")
        (2097152, 1500000000)
    """
    own = label.rsplit("@", 1)[-1] if "@" in label else Path(label).name
    steps = _STEP.findall(own)
    if steps and tokens_per_step is not None:
        return round(int(steps[-1]) * tokens_per_step)
    named = _TOKENS.search(own)
    if named:
        number, unit = (named[1], named[2]) if named[1] else (named[3], named[4])
        return round(float(number) * _UNITS[unit.lower()])
    family = _family(label.rsplit("@", 1)[0]) if "@" in label else None
    if steps and family is not None:
        return int(steps[-1]) * family[1]
    seen = _tokens_seen(Path(label))
    if seen:
        return seen
    why = f"its name tells step {steps[-1]} only" if steps else "its name tells neither step nor tokens"
    raise ValueError(
        f"the training tokens of checkpoint {label!r} are not known ({why}); give the tokens of one step "
        "(tokens_per_step=, --tokens-per-step), or those of the checkpoint (training_tokens={...}, CHECKPOINT=TOKENS)"
    )


def _family(name: str) -> tuple[str, int] | None:
    return next((family for start, family in _FAMILIES.items() if name.startswith(start)), None)


def _named(item: Any) -> tuple[str, str | Callable[[], Any]]:
    if isinstance(item, str | Path):
        if not str(item):
            raise ValueError("a checkpoint has an empty name; name a folder or a Hugging Face revision")
        return str(item), str(item)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and callable(item[1]):
        return item[0], item[1]
    raise TypeError(
        f"a checkpoint must be a folder, a name, or (label, callable), got {type(item).__name__}; "
        "a model in memory is ('label', lambda: model)"
    )


def _refuse_a_folder_of_several(source: Any) -> None:
    """Tell whoever names the folder of a Trainer which folders in it are meant."""
    if callable(source) or not os.path.isdir(source):  # noqa: PTH112 (False, and no error, for a name no file can have)
        return
    if (Path(source) / "config.json").is_file():
        return
    inside = sorted(path.parent.name for path in Path(source).glob("*/config.json"))
    if inside:
        raise ValueError(
            f"{source} is no checkpoint but a folder of {len(inside)}, such as {inside[-1]}; name them: {source}/*"
        )


def _counted(label: str, tokens: Any) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, Real) or not math.isfinite(tokens) or tokens < 0:
        raise ValueError(f"training tokens of {label!r} must be a number >= 0, got {tokens!r}")
    return round(float(tokens))


def _tokens_seen(folder: Path) -> int:
    """Return what a Trainer has counted (`include_num_input_tokens_seen`); 0 if it has not."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        seen = state.get("num_input_tokens_seen", 0)
    except (OSError, ValueError, AttributeError):
        return 0
    return int(seen) if isinstance(seen, int | float) and seen > 0 else 0
