"""Commands that show what a result does to the model: to single tokens, and to downstream tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuron_sparsity.console import measured_on, open_run, print_json, say
from neuron_sparsity.options import (
    DEFAULT_MODEL,
    DEFAULT_TOKENS,
    AsJson,
    BatchSize,
    Bos,
    Device,
    Dtype,
    Kernels,
    Model,
    NCtx,
    Out,
    Packed,
    Quiet,
    RemoteCode,
    Text,
    Tokens,
    check_device,
    check_question,
)
from neuron_sparsity.terminal import one_line_errors

if TYPE_CHECKING:
    from neuron_sparsity.damage import DamageResult
    from neuron_sparsity.downstream import DownstreamResult, Score

__all__ = ["damage", "evaluate"]

_LISTED = 6


@one_line_errors
def damage(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    of: Annotated[
        str, typer.Option("--of", help="truncation (CETT-PPL-p%), or ablation (what `ablate` found in the run folder).")
    ] = "truncation",
    p: Annotated[
        float | None,
        typer.Option(
            "--p", help="Rise of perplexity in percent. Default: 1; of an ablation the first it was asked for."
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="alone: each layer changed by itself. spared: all but this one. none.")
    ] = "alone",
    tokens: Tokens = DEFAULT_TOKENS,
    out: Out = None,
    n_ctx: NCtx = None,
    bos: Bos = None,
    packed: Packed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Kernels = "auto",
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show which tokens a truncation or a removal hurts, and in which layers. One pass a layer."""
    check_question(1.0 if p is None else p)
    for option, value, allowed in (
        ("--of", of, ("truncation", "ablation")),
        ("--layers", layers, ("alone", "spared", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    with open_run(model, text, tokens, out, locals()) as run:
        found = run.damage(p, of=of, layers=None if layers == "none" else layers)
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        for line in damage_lines(found):
            say(line)
        say(f"damage: {run.folder.file('damage.json')}")


@one_line_errors
def evaluate(
    model: Model = DEFAULT_MODEL,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", help="Tasks, separated by commas: names that lm-eval knows, .yaml files, or everyday_choices."
        ),
    ] = "everyday_choices",
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder whose results are applied: sparsity*.json, ablation*.json.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many items of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", help="Solved examples before each question. Default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Items of a task at once.")] = 16,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run downstream tasks with lm-eval: the model as it is, and under each result of a run folder."""
    if out is None:
        raise ValueError(
            "name with --out the run folder whose results are applied; `neuron-sparsity sparsity` makes one"
        )
    from neuron_sparsity.downstream import require_lm_eval
    from neuron_sparsity.run_results import applied_results
    from neuron_sparsity.store import write_json

    applied = applied_results(out)
    require_lm_eval()
    check_device(device, "auto")
    import torch

    from neuron_sparsity.downstream import evaluate as run_tasks
    from neuron_sparsity.weights import load_weights

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    _, hf_model, tokenizer = load_weights(
        model, dtype=getattr(torch, dtype), device=device, trust_remote_code=trust_remote_code
    )
    found = run_tasks(
        hf_model,
        tokenizer,
        [task.strip() for task in tasks.split(",") if task.strip()],
        results=applied.results,
        means=applied.means,
        limit=limit,
        num_fewshot=fewshot,
        batch_size=batch_size,
        verbose=not quiet and sys.stderr.isatty(),
    )
    write_json(out / "downstream.json", found.to_json())
    if as_json:
        print_json(found.to_json() | {"left_out": list(applied.left_out)})
    elif not quiet:
        for line in (*downstream_lines(found), *(f"left out: {name}" for name in applied.left_out)):
            say(line)
        say(f"scores: {out / 'downstream.json'}")


def damage_lines(found: DamageResult) -> list[str]:
    """Return what was found, one statement a line."""
    lines = [
        f"{found.change}: perplexity {found.ppl_dense:.3f} to {found.ppl_changed:.3f} "
        f"({found.ppl_increase_percent:+.3f} %); {measured_on(found.model.name, found.corpus)}",
        f"loss {found.rise.mean:+.5f} nats a token{_ends(found.rise)}; KL divergence {found.kl.mean:.5f}; "
        f"it rises on {100 * found.hurt_ratio:.1f} % of tokens",
    ]
    for name, listed in (("hurt", found.hurt), ("helped", found.helped)):
        lines += [
            f"  {name} {token.difference:+.2f}  {''.join(token.before)}[{token.token}]" for token in listed[:_LISTED]
        ]
    if found.interaction is not None and found.layer_sum is not None:
        worst = sorted(found.layers, key=lambda layer: -layer.rise)[:_LISTED]
        lines += [f"  layer {part.layer:>3} {found.layer_passes} {part.rise:+.5f}{_ends(part)}" for part in worst]
        lines.append(
            f"  sum of the layers {found.layer_sum.mean:+.5f}, interaction {found.interaction.mean:+.5f}"
            f"{_ends(found.interaction)}"
        )
    return lines


def _ends(part: Any) -> str:
    return "" if part.low is None else f" (95 % interval {part.low:+.5f} to {part.high:+.5f})"


def downstream_lines(found: DownstreamResult) -> list[str]:
    """Return the scores, one task, metric and form a line."""
    lines, width = [], max(24, *(len(form.name) for form in found.forms))
    for dense in found.dense.scores:
        lines.append(f"{dense.task} {dense.metric}, {dense.n:,} items, {found.model['name']}")
        for form in found.forms:
            score = next(
                s for s in form.scores if (s.task, s.metric, s.filter) == (dense.task, dense.metric, dense.filter)
            )
            lines.append(f"  {form.name:<{width}} {score.value:.4f}{_error(score.stderr)}{_against(form.name, score)}")
    return lines


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" +- {stderr:.4f}"


def _against(name: str, score: Score) -> str:
    if name == "dense":
        return ""
    said = f"  to dense {score.difference:+.4f}{_error(score.difference_stderr)}"
    if score.p_value is not None:
        said += f" (paired; {score.lost} lost, {score.gained} gained, p {score.p_value:.2g})"
    return said
