"""`SparsityCallback`: the visits of `track`, made while a Hugging Face `Trainer` trains.

1. At a chosen step the weights are written to `FOLDER/weights/step-N`, as the Trainer itself would, and measured from
   there: the model that trains is read and nothing else, and every random state is put back afterwards. Training goes
   as it would without the callback, bit for bit.
2. What a step is at its own CETT-PPL-p% stands in `trajectory.json` at once.
3. When training ends, the common CETT is searched on the last five steps and applied to all, as `track` does; where a
   CETT was given, that has been done step by step. Then the weights are removed, unless they are to be kept.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from neuron_sparsity import kernels
from neuron_sparsity.corpus import Windows
from neuron_sparsity.errors import ModelError, RunFolderError
from neuron_sparsity.parallel import launched
from neuron_sparsity.trajectory.checkpoints import Checkpoint
from neuron_sparsity.trajectory.result import TrajectoryResult
from neuron_sparsity.trajectory.tracker import Tracker

__all__ = ["SparsityCallback"]


class SparsityCallback(TrainerCallback):
    """Records activation sparsity at chosen moments of a training run: give it to `Trainer(callbacks=[...])`.

    It needs memory for a second copy of the model while it measures, and room on disk for the weights of every step
    measured until training ends (where `cett` is given: of one, and of those that could not be measured). In a run of
    several processes the first one measures, and the others wait for it, as long as the `ddp_timeout` of
    TrainingArguments lets them (half an hour).

    Args:
        windows: What to measure on: text that is not trained on. `load_corpus` and `windows_from_text` make it.
        folder: Where `trajectory.json` goes. A training that goes on from a checkpoint goes on in its folder.
        steps: Steps to measure at: a number for every so many, with the untrained model as step 0, or the steps
            themselves. The last step is measured in any case.
        tokens: Or numbers of training tokens: each is measured at the first step that has seen as many.
        tokens_per_step: Training tokens of one optimizer step, over all processes. Not needed where the Trainer counts
            them: `TrainingArguments(include_num_input_tokens_seen="all")`.
        p_percent: Rise of perplexity, > 0.
        cett: CETT common to all steps, in [1e-6, 1]; searched on the last five when training ends if None.
        tokenizer: Of the model; the Trainer's `processing_class` if None.
        keep_weights: Whether `FOLDER/weights` stays when all is measured. A training that is extended later needs it
            where the common CETT is searched: the last five are other ones then.
        device: That the copy is measured on; the first GPU if there is one, else the CPU, if None.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        backend: Of the kernels: `"auto"`, `"torch"` or `"triton"`.
        batch_size: Windows a forward pass; chosen from free memory if None.

    Attributes:
        result: What was found, once training has ended; None before, and in other processes than the first.

    Raises:
        ModelError: In training, if the first step that is measured cannot be; later ones become gaps of the result.
        TypeError: If `windows` is no `Windows`.
        ValueError: If neither or both of `steps` and `tokens` are given, or an argument cannot be.
        RunFolderError: If `folder` holds another run; when training begins, if it holds another training.
    """

    def __init__(
        self,
        windows: Windows,
        folder: str | Path,
        *,
        steps: int | Sequence[int] | None = None,
        tokens: Sequence[float] | None = None,
        tokens_per_step: float | None = None,
        p_percent: float = 1.0,
        cett: float | None = None,
        tokenizer: Any = None,
        keep_weights: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        backend: kernels.Backend = "auto",
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(windows, Windows):
            raise TypeError(f"windows must be Windows, got {type(windows).__name__}; windows_from_text makes some")
        if (steps is None) == (tokens is None):
            raise ValueError("give the moments to measure at as steps= or as tokens=, one of them")
        self.steps = None if steps is None else _checked_steps(steps)
        self.tokens = None if tokens is None else _checked_tokens(tokens)
        if tokens_per_step is not None and not tokens_per_step > 0:
            raise ValueError(f"tokens_per_step must be a positive number of tokens, got {tokens_per_step}")
        self.tokens_per_step, self.tokenizer, self.keep_weights = tokens_per_step, tokenizer, keep_weights
        self.folder = Path(folder)
        self.result: TrajectoryResult | None = None
        self._tracker = Tracker(
            windows,
            folder if launched()[0] == 0 else None,  # the others would find it half made
            p_percent=p_percent,
            cett=cett,
            load={"device": device, "dtype": dtype, "trust_remote_code": False},
            measure={"backend": backend, "batch_size": batch_size},
        )
        self._seen = -1.0
        self._visited: dict[str, Checkpoint] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that what is needed is there, take up an earlier part of the run, and measure the untrained model."""
        if self.tokens_per_step is None and args.include_num_input_tokens_seen in ("no", False):
            raise ValueError(
                "the training tokens of a step are not known; give SparsityCallback tokens_per_step=, or "
                "TrainingArguments include_num_input_tokens_seen='all'"
            )
        self._tokenizer(kwargs)
        _require_whole(kwargs["model"])
        if not state.is_world_process_zero:
            return
        self._take_up(state)
        if state.global_step == 0 and self._due(state):
            self._measure(state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if this step is one to be measured."""
        if self._due(state) and state.is_world_process_zero:
            self._measure(state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the last step, search the common CETT and apply it to all."""
        if not state.is_world_process_zero:
            return
        if f"step-{state.global_step}" not in self._visited:
            self._measure(state, kwargs)
        ordered = sorted(self._visited.values(), key=lambda checkpoint: checkpoint.tokens)
        with _random_states_kept():
            self.result = self._tracker.run(ordered)
        if not self.keep_weights:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def _due(self, state: Any) -> bool:
        step, before = state.global_step, self._seen
        if self.tokens is not None:
            self._seen = self._tokens(state)
            return any(before < wanted <= self._seen for wanted in self.tokens)
        if isinstance(self.steps, int):
            return bool(step % self.steps == 0)
        return step in (self.steps or ())

    def _tokens(self, state: Any) -> int:
        if self.tokens_per_step is not None:
            return round(state.global_step * self.tokens_per_step)
        return int(state.num_input_tokens_seen)

    def _take_up(self, state: Any) -> None:
        """Go on with what was measured up to the step that training goes on from; later steps are trained anew."""
        if self.tokens is not None:
            self._seen = self._tokens(state) if state.global_step else -1.0
        points, gaps = self._tracker.points, self._tracker.earlier_gaps
        seen = {label: point.tokens for label, point in points.items()} | {gap.checkpoint: gap.tokens for gap in gaps}
        for label, tokens in seen.items():
            number = label.removeprefix("step-")
            step = int(number) if number.isdecimal() else -1
            if state.global_step == 0 or step < 0:
                raise RunFolderError(
                    f"{self.folder} holds the trajectory of another training; name another folder, or go on from a "
                    "checkpoint of that one"
                )
            if step <= state.global_step:
                self._visited[label] = Checkpoint(label, tokens, str(self.folder / "weights" / label))
            else:
                points.pop(label, None)

    def _measure(self, state: Any, kwargs: dict[str, Any]) -> None:
        label = f"step-{state.global_step}"
        target = self.folder / "weights" / label
        with _random_states_kept():
            target.mkdir(parents=True, exist_ok=True)
            kwargs["model"].save_pretrained(target)
            self._tokenizer(kwargs).save_pretrained(target)
            checkpoint = Checkpoint(label, self._tokens(state), str(target))
            self._visited[label] = checkpoint
            found = self._tracker.visit(checkpoint, at=self._tracker.cett)
            self._tracker.close()
        if found is None and not self._tracker.points:  # better now than when hours of training are over
            raise ModelError(f"{self._tracker.gaps[label].error} (the first step that SparsityCallback was to measure)")
        if found is not None and self._tracker.cett is not None and not self.keep_weights:
            shutil.rmtree(target)  # those of a gap stay: it is tried once more when training ends

    def _tokenizer(self, kwargs: dict[str, Any]) -> Any:
        found = kwargs.get("processing_class") if self.tokenizer is None else self.tokenizer
        if found is None:
            raise ValueError(
                "the tokenizer is not known; give SparsityCallback tokenizer=, or the Trainer processing_class="
            )
        return found


def _checked_steps(steps: int | Sequence[int]) -> int | frozenset[int]:
    if isinstance(steps, int) and not isinstance(steps, bool):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return steps
    found = [] if isinstance(steps, bool | str) else list(steps)
    if not found or not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in found):
        raise ValueError(f"steps must be a number, or a list of step numbers >= 0, got {steps!r}")
    return frozenset(found)


def _checked_tokens(tokens: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(count) for count in tokens)
    if not found or not all(0 <= count < float("inf") for count in found):
        raise ValueError(f"tokens must be a list of numbers >= 0, got {list(tokens)!r}")
    return found


def _require_whole(model: torch.nn.Module) -> None:
    """Refuse a model of which this process holds a part only."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "placements") or parameter.is_meta:
            raise ModelError(
                f"{name} is spread over processes (FSDP, DeepSpeed ZeRO-3), so its weights cannot be written from one; "
                "let the Trainer save checkpoints and give those to track"
            )


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back: measuring draws numbers of its own."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the Trainer seeds this one)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
