"""One model of a study, trained by the Hugging Face `Trainer`, with checkpoints on a schedule of its own.

Killed at any moment, training goes on from the last checkpoint that is whole, with the same windows in the same order.
Under `accelerate launch` or `torchrun` the Trainer spreads the batch over the processes: a step takes the same windows,
however many there are, and what one number of processes has begun another can go on with.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from neuron_sparsity.errors import MeasurementError, RankError
from neuron_sparsity.parallel import launched
from neuron_sparsity.parallel.process import brief
from neuron_sparsity.perplexity import Progress
from neuron_sparsity.store import write_bytes
from neuron_sparsity.study.config import ModelShape, RunPlan, StudyConfig, TrainingPlan
from neuron_sparsity.study.text import StudyText

__all__ = ["checkpoint_path", "llama_config", "losses", "parameter_counts", "shares", "trained", "train"]

_STATE = "trainer_state.json"
_NOT_WEIGHTS = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "pytorch_model_fsdp*")
_LOGGED = 100  # losses a run keeps


def llama_config(shape: ModelShape, activation: str, config: StudyConfig) -> Any:
    """Return the configuration of a model: Llama with gated MLPs of the given activation function."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.text.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        hidden_act=activation,
        max_position_embeddings=config.text.window,
        tie_word_embeddings=shape.tied,
        # The tokenizer's only special token, which ends a document, is the first of its vocabulary.
        bos_token_id=0,
        eos_token_id=0,
    )


def parameter_counts(shape: ModelShape, config: StudyConfig) -> dict[str, int]:
    """Return the parameters of a model, `total` and `non_embedding`; no weights are made.

    Example:
        >>> from neuron_sparsity.study.config import load_config
        >>> tiny = load_config("tiny")
        >>> parameter_counts(tiny.models[0], tiny)
        {'total': 411348, 'non_embedding': 325332}
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(shape, config.activations[0], config))
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    return {"total": total, "non_embedding": total - sum(weight.numel() for weight in matrices.values())}


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the Trainer puts the checkpoint of a step."""
    return folder / f"checkpoint-{step}"


def trained(folder: Path, config: StudyConfig) -> bool:
    """Whether the training in a folder is over."""
    return _is_whole(checkpoint_path(folder, config.training.steps))


def train(
    run: RunPlan, config: StudyConfig, text: StudyText, folder: Path, *, cpu: bool, progress: Progress | None = None
) -> None:
    """Train one model, from its last checkpoint if there is one, up to the last step.

    Args:
        run: Which model.
        config: The study.
        text: What is trained on.
        folder: Where the checkpoints go.
        cpu: Whether to train on the CPU where there is a GPU.
        progress: Called after every step.

    Raises:
        MeasurementError: If the loss is no number any more.
        RankError: If another of the processes that train together is gone.
        ValueError: If the batch cannot be shared among the processes, or accelerate is not installed.
    """
    if not trained(folder, config):
        _train(run, config, text, folder, cpu, progress)
    if launched()[0] == 0:
        for step in config.training.checkpoint_steps():
            _keep_weights_only(checkpoint_path(folder, step))


def shares(plan: TrainingPlan, n_processes: int) -> tuple[int, int]:
    """Return how many windows a process takes at once, and how many times before a step of the optimizer.

    Times `n_processes` they are the batch; at once it is `device_batch`, or the largest divisor of a process' share
    below it.

    Raises:
        ValueError: If the batch cannot be shared.

    Example:
        >>> plan = TrainingPlan(500, 16, 8, 1e-3, 20, 50)
        >>> [shares(plan, n) for n in (1, 2, 4)]
        [(8, 2), (8, 1), (4, 1)]
    """
    if plan.batch % n_processes:
        raise ValueError(
            f"training.batch {plan.batch} cannot be shared by {n_processes} processes; start a number of them that "
            "divides it, or change it, with --config"
        )
    share = plan.batch // n_processes
    at_once = next(n for n in range(min(plan.device_batch, share), 0, -1) if share % n == 0)
    return at_once, share // at_once


def losses(folder: Path, config: StudyConfig) -> list[dict[str, float]]:
    """Return the training loss that was logged: `step`, `loss`, `learning_rate`."""
    state = json.loads((checkpoint_path(folder, config.training.steps) / _STATE).read_text(encoding="utf-8"))
    return [
        {name: entry[name] for name in ("step", "loss", "learning_rate")}
        for entry in state["log_history"]
        if "loss" in entry
    ]


def _train(
    run: RunPlan, config: StudyConfig, text: StudyText, folder: Path, cpu: bool, progress: Progress | None
) -> None:
    if find_spec("accelerate") is None:
        raise ValueError('training needs the package accelerate: pip install -e ".[study]" in the clone')
    from transformers import LlamaForCausalLM, PrinterCallback, Trainer, default_data_collator, set_seed

    arguments = _arguments(run, config, folder, cpu)
    last = _last_whole(folder, keep=launched()[0] > 0)
    if last is not None:
        _fit_processes(last, arguments.per_device_train_batch_size)
    set_seed(run.seed)
    model = LlamaForCausalLM(llama_config(run.model, run.activation, config))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=text.rows(),
        data_collator=default_data_collator,  # windows are of one length: nothing is padded
        processing_class=text.tokenizer,
        callbacks=[_OnSchedule(config, run.name, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every loss to stdout, which is for results
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except RuntimeError as error:
        if launched()[1] == 1 or not _is_of_a_connection(error):
            raise
        raise RankError(
            f"another process of this training is gone ({brief(error)}); it says why, or was killed; "
            "the same command goes on from the last checkpoint"
        ) from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def _fit_processes(path: Path, device_batch: int) -> None:
    """Ready a checkpoint to be gone on from by this number of processes, whatever their number was.

    Older transformers take the batch of one device from the checkpoint, and the global one would grow. And of several
    processes all but the first may write their state of random numbers after the file that says a checkpoint is whole,
    so a kill can leave half of it. Nobody needs it: nothing is drawn while a model trains, and the order of the windows
    is the seed's.
    """
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if state.get("train_batch_size") != device_batch:  # every process writes the same, and none sees half of it
        write_bytes(path / _STATE, json.dumps(state | {"train_batch_size": device_batch}, indent=2).encode())
    (path / f"rng_state_{launched()[0]}.pth").unlink(missing_ok=True)


class _OnSchedule(TrainerCallback):
    """Saves at the steps of the schedule, and drops what only the last checkpoint needs to be gone on from."""

    def __init__(self, config: StudyConfig, name: str, progress: Progress | None) -> None:
        self.steps = config.training.checkpoint_steps()
        self.tokens_per_step, self.name, self.progress = config.tokens_per_step, name, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True
        if self.progress and state.is_world_process_zero:
            self.progress(
                f"training {self.name}",
                state.global_step * self.tokens_per_step,
                state.max_steps * self.tokens_per_step,
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for step in self.steps:
                if step < state.global_step:
                    _keep_weights_only(checkpoint_path(Path(args.output_dir), step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not float("-inf") < loss < float("inf"):
            raise MeasurementError(
                f"the training loss of {self.name} is {loss} at step {state.global_step}; lower training.learning_rate"
            )


def _arguments(run: RunPlan, config: StudyConfig, folder: Path, cpu: bool) -> Any:
    from transformers import TrainingArguments

    plan = config.training
    device_batch, accumulated = shares(plan, launched()[1])
    on_gpu = torch.cuda.is_available() and not cpu
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=accumulated,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": plan.decay_steps, "min_lr_ratio": 0.1},
        warmup_steps=plan.warmup_steps,
        weight_decay=plan.weight_decay,
        adam_beta2=plan.adam_beta2,
        max_grad_norm=plan.max_grad_norm,
        bf16=plan.bf16 and on_gpu,
        seed=run.seed,
        data_seed=run.seed,
        save_strategy="no",  # the callback says when
        logging_strategy="steps",
        logging_steps=max(1, plan.steps // _LOGGED),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,  # there are none
        dataloader_pin_memory=on_gpu,
    )
    # One process takes one GPU: with more in sight the Trainer would take so many times the windows.
    if arguments.device is not None and arguments.n_gpu > 1:  # asking for the device counts them
        arguments._n_gpu = 1
    return arguments


def _last_whole(folder: Path, *, keep: bool) -> Path | None:
    """Return the last checkpoint that was written to its end; what a kill has left of others is removed.

    Args:
        folder: Of the Trainer.
        keep: Whether to leave the broken ones: of several processes one removes them.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            found[int(path.name.rpartition("-")[2])] = path
        elif not keep:
            shutil.rmtree(path, ignore_errors=True)
    return found[max(found)] if found else None


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer's state comes last."""
    try:
        step = json.loads((path / _STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    return path.name == f"checkpoint-{step}"


def _keep_weights_only(path: Path) -> None:
    """Remove the optimizer's state, twice as large as the model, and the like of a checkpoint."""
    for pattern in _NOT_WEIGHTS:
        for file in path.glob(pattern):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)
