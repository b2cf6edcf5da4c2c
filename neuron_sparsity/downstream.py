"""What a truncation or a removal does to downstream tasks: EleutherAI's `lm-eval` (extra `eval`) around the HF model.

1. The model as it is answers the tasks.
2. It answers them again inside each change: `apply_thresholds` of a SparsityResult, the removal of an AblationResult,
   or any context of your own. lm-eval's and transformers' sources are not touched, and nothing is left behind.
3. The same items are answered every time, so each change is compared with the dense model item by item: the difference
   of a score with the standard error of the *paired* difference, how many items it lost and gained, and McNemar's exact
   test (McNemar 1947). That error is much smaller than those of the two scores, which lm-eval reports beside them.

`everyday_choices` is a task of this package that needs no hub: 96 sentences with a right and a wrong ending.
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuron_sparsity.ablation import AblationResult, ablate
from neuron_sparsity.adapter import attach
from neuron_sparsity.entry import own_means
from neuron_sparsity.errors import CorpusError, MeasurementError
from neuron_sparsity.model_info import ModelInfo
from neuron_sparsity.plain import down_projections, fingerprint, unwrapped
from neuron_sparsity.sparsity import SparsityResult
from neuron_sparsity.store import provenance
from neuron_sparsity.task_scores import Score, scores_of
from neuron_sparsity.truncation import Truncation, apply_thresholds
from neuron_sparsity.weights import first_line

__all__ = ["BUILT_IN_TASKS", "DownstreamResult", "Form", "Score", "evaluate", "require_lm_eval"]

BUILT_IN_TASKS = ("everyday_choices",)
_TASKS = Path(__file__).parent / "tasks"

Change = Callable[[nn.Module], AbstractContextManager[Any]]
"""`f(hf_model)`: a context in which the model is changed."""


@dataclass(frozen=True)
class Form:
    """The model in one form: dense, truncated, or without some neurons.

    Attributes:
        name: `dense`, or what was changed.
        activation_ratio: Mean over layers of the share of (token, neuron) pairs that were active while the tasks ran,
            padding included; None where nothing was truncated.
        scores: Of every task and metric.
    """

    name: str
    activation_ratio: float | None
    scores: tuple[Score, ...]

    def score(self, task: str, metric: str = "acc") -> Score:
        """Return a score by the names of task and metric.

        Raises:
            KeyError: If there is none.
        """
        for found in self.scores:
            if (found.task, found.metric) == (task, metric):
                return found
        raise KeyError(f"no {metric} of {task}; there are {sorted({(s.task, s.metric) for s in self.scores})}")


@dataclass(frozen=True)
class DownstreamResult:
    """Downstream scores of a model, dense and changed, side by side.

    Attributes:
        tasks: As they were asked for.
        forms: The dense model first, then each change.
        model: Name; and the fingerprint of the weights, if a result told it.
        settings: `limit`, `num_fewshot`, `batch_size`, `seed`; `n_shot` and `versions` of each task as lm-eval reports.
        cost: `evaluations` of the tasks, `seconds`.
        provenance: Versions (of lm-eval too), seed, command.
    """

    tasks: tuple[str, ...]
    forms: tuple[Form, ...]
    model: dict[str, Any]
    settings: dict[str, Any]
    cost: dict[str, float]
    provenance: dict[str, Any]

    @property
    def dense(self) -> Form:
        """The model as it is."""
        return self.forms[0]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `downstream.json`."""
        forms = [vars(form) | {"scores": [dict(vars(score)) for score in form.scores]} for form in self.forms]
        return dict(vars(self)) | {"tasks": list(self.tasks), "forms": forms}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DownstreamResult:
        """Read the content of `downstream.json` back.

        Raises:
            KeyError, TypeError: If keys are missing or of the wrong type.
        """
        keys = Score.__dataclass_fields__
        forms = tuple(
            Form(
                form["name"],
                form["activation_ratio"],
                tuple(Score(**{key: score[key] for key in keys}) for score in form["scores"]),
            )
            for form in data["forms"]
        )
        own = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**own | {"tasks": tuple(data["tasks"]), "forms": forms})


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: str | Sequence[str] = BUILT_IN_TASKS,
    *,
    results: Sequence[Any] | Mapping[str, Any] = (),
    means: Float[Tensor, "layer neuron"] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    seed: int | None = None,
    verbose: bool = False,
) -> DownstreamResult:
    """Return lm-eval's scores of a model as it is and in each changed form, compared item by item.

    Args:
        model: Causal language model of transformers, or a TransformerBridge as it was loaded.
        tokenizer: As transformers loads it. A bridge's own is not taken: TransformerLens may have made it put BOS
            first, and scores would not be those of lm-eval alone.
        tasks: Names that lm-eval knows (`piqa`, `hellaswag`, ...: their data come from the hub), `everyday_choices`
            (needs no hub), or paths of task files (.yaml) of your own.
        results: Each a SparsityResult, an AblationResult, or `f(hf_model)` that returns a context. A mapping gives
            them names. All are applied to the dense model, not to each other.
        means: Mean post-activations (`NeuronStatistics.mean_activation`), for an AblationResult of mean replacement.
        limit: Only the first so many items of each task.
        num_fewshot: Solved examples before each question; None takes each task's own number.
        batch_size: Sequences a forward pass.
        seed: Of lm-eval's choices, such as the examples; None takes lm-eval's own seeds. This process's random state
            is put back afterwards.
        verbose: Whether lm-eval's own messages and bars are shown, on stderr.

    Returns:
        Scores with standard errors, and paired differences to the dense model with theirs.

    Raises:
        TypeError: If `model` is no model, `tokenizer` no tokenizer, or a result none of the three.
        ValueError: If lm-eval does not know a task, a result is of other weights, two have one name, or sizes are
            wrong.
        CorpusError: If the data of a task cannot be loaded.
        MeasurementError: If lm-eval is not installed.

    Example:
        >>> found = evaluate(hf_model, tokenizer, "piqa", results=[at_1, at_5])  # doctest: +SKIP
        >>> found.forms[1].score("piqa").difference  # doctest: +SKIP
    """
    require_lm_eval()
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be at least 0, got {num_fewshot}")
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be the one transformers loads with the model, got {type(tokenizer).__name__}")
    hf_model = _plain(model)
    changes: dict[str, AbstractContextManager[Any]] = {"dense": nullcontext(), **_changes(hf_model, results, means)}
    options = {"limit": limit, "num_fewshot": num_fewshot}
    start = time.perf_counter()
    runs: dict[str, Any] = {}
    ratios: dict[str, float | None] = {}
    with _lm_eval(hf_model, tokenizer, batch_size, seed, verbose=verbose) as harness:
        harness.load(tasks)
        for name, change in changes.items():
            with change as inside:
                runs[name] = harness.run(tasks, options)
                ratios[name] = inside.activation_ratio if isinstance(inside, Truncation) else None
    dense = runs["dense"]
    known = next((r.model for r in _listed(results) if isinstance(getattr(r, "model", None), ModelInfo)), None)
    named = str(getattr(hf_model.config, "_name_or_path", "") or type(hf_model).__name__)
    return DownstreamResult(
        tasks=tuple(Path(task).name if task.endswith(".yaml") else task for task in tasks),
        forms=tuple(Form(name, ratios[name], scores_of(run, dense)) for name, run in runs.items()),
        model={"name": Path(named).name, "fingerprint": None}
        if known is None
        else {"name": known.name, "fingerprint": known.fingerprint},
        settings=options
        | {"batch_size": batch_size, "seed": seed}
        | {"n_shot": dict(dense["n-shot"]), "versions": dict(dense["versions"])},
        cost={"evaluations": float(len(runs)), "seconds": time.perf_counter() - start},
        provenance=provenance(seed=seed or 0) | {"lm_eval": metadata.version("lm_eval")},
    )


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval, before anything is loaded.

    Raises:
        MeasurementError: If it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MeasurementError('downstream tasks need the package lm-eval: pip install -e ".[eval]" in the clone')


def _plain(model: Any) -> nn.Module:
    """Return the plain Hugging Face model."""
    if hasattr(model, "hooks") and hasattr(model, "cfg"):
        adapter = attach(model)
        if adapter.plain is None:
            raise TypeError(
                "lm-eval needs the plain Hugging Face model, and this TransformerLens model does not run as one "
                f"({adapter.forward}); pass the model that transformers loads"
            )
        return unwrapped(adapter.model.original_model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"model must be a causal language model of transformers or a TransformerBridge, got {type(model).__name__}"
        )
    return model


def _listed(results: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    return list(results.values() if isinstance(results, Mapping) else results)


def _changes(
    hf_model: nn.Module, results: Sequence[Any] | Mapping[str, Any], means: Tensor | None
) -> dict[str, AbstractContextManager[Any]]:
    """Return the context of each change by its name; refuses what cannot be applied before any task runs."""
    if isinstance(results, Mapping):
        pairs = [(str(name), result) for name, result in results.items()]
    else:
        pairs = [(_name(result), result) for result in results]
    found: dict[str, AbstractContextManager[Any]] = {}
    for name, result in pairs:
        if name in found or name == "dense":
            raise ValueError(f"two forms are named {name!r}; give names of your own: results={{'name': result, ...}}")
        if isinstance(result, SparsityResult):
            with apply_thresholds(hf_model, result):
                found[name] = apply_thresholds(hf_model, result)
        elif isinstance(result, AblationResult):
            with _removed(hf_model, result, means):
                found[name] = _removed(hf_model, result, means)
        elif callable(result):
            found[name] = result(hf_model)
        else:
            raise TypeError(
                f"a result must be a SparsityResult, an AblationResult or f(hf_model) that returns a context, "
                f"got {type(result).__name__}"
            )
    return found


def _name(result: Any) -> str:
    if isinstance(result, AblationResult):
        return f"{result.n_removable:,} neurons removed"
    return str(getattr(result, "name", None) or getattr(result, "__name__", type(result).__name__))


@contextmanager
def _removed(hf_model: nn.Module, result: AblationResult, means: Tensor | None) -> Iterator[None]:
    """Remove the neurons of a result from a plain Hugging Face model while the context is open."""
    info = result.model
    projections = down_projections(hf_model, info.d_mlp, info.d_model, info.n_layers)
    if fingerprint(hf_model, projections) != info.fingerprint:
        raise ValueError(f"the removal was measured on {info.name} with other weights; measure this model first")
    if result.replacement not in ("zero", "mean"):
        raise ValueError(
            f"replacement {result.replacement!r} cannot be made here; pass a context of your own: f(hf_model)"
        )
    if result.replacement == "mean" and means is None:
        raise ValueError(
            "the removal replaces neurons by their means: pass means=stats.mean_activation (or those of its ranking)"
        )
    own_means(result, means)
    with ablate(hf_model, result.removable, replacement=result.replacement, means=means):
        yield


class _Harness:
    """lm-eval with one model, and where it looks for tasks."""

    def __init__(self, hf_model: nn.Module, tokenizer: Any, batch_size: int, seed: int | None) -> None:
        from lm_eval.models.huggingface import HFLM

        # A copy of the tokenizer: lm-eval gives it a padding token.
        self.model = HFLM(pretrained=hf_model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)  # type: ignore[arg-type]
        self.seed = seed
        self.manager: Any = None

    def load(self, tasks: Sequence[str]) -> None:
        """Find the tasks and load their data.

        Raises:
            ValueError: If lm-eval does not know a task.
            CorpusError: If data cannot be loaded.
        """
        from lm_eval.tasks import TaskManager

        if not tasks:
            raise ValueError("name at least one task, for example everyday_choices")
        own = all(task in BUILT_IN_TASKS or task.endswith(".yaml") for task in tasks)
        # Reading the thousands of tasks that come with lm-eval takes seconds; tasks of one's own do without.
        self.manager = TaskManager(include_path=str(_TASKS), include_defaults=not own)
        for task in tasks:
            if task.endswith(".yaml"):
                if not Path(task).is_file():
                    raise ValueError(f"task file {task} does not exist")
            elif task not in self.manager.task_index:
                close = difflib.get_close_matches(task, [*self.manager.all_tasks, *BUILT_IN_TASKS], n=3)
                meant = f"; did you mean {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists all"
                raise ValueError(f"lm-eval {metadata.version('lm_eval')} has no task {task!r}{meant}")
        for task in tasks:
            try:
                self.manager.load([task])
            except Exception as error:  # the hub, datasets and the task's own code raise anything
                raise CorpusError(
                    f"task {task!r} cannot be loaded ({type(error).__name__}: {first_line(error)}); check its file or "
                    "the network, or take everyday_choices, which needs none"
                ) from error

    def run(self, tasks: Sequence[str], options: dict[str, Any]) -> Any:
        """Return what lm-eval reports, samples included."""
        from lm_eval.evaluator import simple_evaluate

        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        seeds = {} if self.seed is None else dict.fromkeys(names, self.seed)
        return simple_evaluate(
            model=self.model, tasks=list(tasks), task_manager=self.manager, log_samples=True, **options, **seeds
        )


@contextmanager
def _lm_eval(
    hf_model: nn.Module, tokenizer: Any, batch_size: int, seed: int | None, *, verbose: bool
) -> Iterator[_Harness]:
    """Open lm-eval around a model; random states, logging and the model's mode are as before afterwards."""
    logger, training = logging.getLogger("lm_eval"), hf_model.training
    level, states = logger.level, (random.getstate(), np.random.get_state())  # noqa: NPY002 (lm-eval seeds the old one)
    with ExitStack() as stack:
        stack.callback(hf_model.train, training)
        stack.callback(logger.setLevel, level)
        stack.callback(random.setstate, states[0])
        stack.callback(np.random.set_state, states[1])
        stack.enter_context(torch.random.fork_rng())
        if not verbose:
            stack.enter_context(redirect_stderr(io.StringIO()))
            stack.enter_context(redirect_stdout(io.StringIO()))
            logger.setLevel(logging.ERROR)
        yield _Harness(hf_model, tokenizer, batch_size, seed)
