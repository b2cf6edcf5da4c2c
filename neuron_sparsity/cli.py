"""The command line: parse, one library call, write. torch is imported when a command runs, not before.

Exit codes: 0 done; 1 a one-line error on stderr; 2 wrong usage; 130 interrupted. Results go to stdout, progress to
stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from neuron_sparsity import (
    __version__,
    atlas_commands,
    commands,
    effect_commands,
    report_commands,
    study_command,
    track_command,
)
from neuron_sparsity.console import (
    conclude,
    conclude_pareto,
    measured_on,
    open_run,
    print_json,
    read_corpus,
    say,
)
from neuron_sparsity.options import (
    DEFAULT_MODEL,
    DEFAULT_RANKING_TOKENS,
    DEFAULT_TOKENS,
    AsJson,
    BatchSize,
    Bos,
    By,
    Calibration,
    Compare,
    Controls,
    Device,
    Dtype,
    Kernels,
    Metric,
    Model,
    NCtx,
    Neurons,
    Out,
    P,
    Packed,
    Points,
    Ps,
    Quiet,
    RankingTokens,
    Refine,
    RemoteCode,
    Replacement,
    Rules,
    Scope,
    Seed,
    Text,
    Tokens,
    WithAtlas,
    check_question,
    check_refine,
    check_rules,
)
from neuron_sparsity.parallel import launched
from neuron_sparsity.terminal import one_flag_a_text, one_line_errors, prepare

__all__ = ["app", "main"]

PARALLEL = ("record", "sparsity", "study")
"""The commands that several processes can run together (torchrun)."""

app = typer.Typer(
    help="Which neurons of a language model do anything, and how few does it need?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@one_line_errors
def report(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="As for the other commands, or a run folder to render again.")
    ] = DEFAULT_MODEL,
    text: Text = None,
    p: P = 1.0,
    metric: Metric = "ppl",
    tokens: Tokens = DEFAULT_TOKENS,
    out: Out = None,
    ranking: By = None,
    replacement: Replacement = "mean",
    ranking_tokens: RankingTokens = DEFAULT_RANKING_TOKENS,
    scope: Scope = "model",
    n_ctx: NCtx = None,
    bos: Bos = None,
    packed: Packed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Kernels = "auto",
    seed: Seed = 0,
    atlas: WithAtlas = True,
    compare: Compare = None,
    neurons: Neurons = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure everything and write one page: sparsity, every neuron, what can go.

    Two thirds of the windows are for measuring, one third confirms what can go.
    """
    if compare:
        report_commands.compare_again(context, compare, out, quiet=quiet, as_json=as_json)
        return
    check_question(p, ranking, replacement, scope, metric)
    folder = Path(model)
    if report_commands.holds(context, folder, "study"):
        study_command.show(folder, quiet=quiet, as_json=as_json)
        return
    if (folder / "run.json").is_file():
        if report_commands.holds(context, folder, "trajectory"):
            track_command.show(folder, quiet=quiet, as_json=as_json)
        else:
            report_commands.render_again(context, folder, neurons or [], quiet=quiet, as_json=as_json)
        return
    if neurons:
        raise ValueError(f"--neurons is for a run folder, {model} is none; render it again when it is measured")
    with open_run(model, text, tokens, out, locals(), heldout=True) as run:
        from neuron_sparsity.run_results import render

        result = run.sparsity(p, metric=metric)  # type: ignore[arg-type]
        stats = run.record(result)
        removed = run.ablate(stats, p_percent=p, ranking=ranking, replacement=replacement, scope=scope, seed=seed)
        if result.reached:  # else its thresholds cut everything
            run.passage(result)
        if atlas:
            run.atlas(stats, active=result.name if result.reached else "nonzero")
        render(run.folder.path)
    conclude(run.folder.path, result, stats, removed, quiet=quiet, as_json=as_json)


@app.command()
@one_line_errors
def record(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
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
    """Record the statistics of every neuron in one pass; an interrupted recording goes on where it stopped."""
    with open_run(model, text, tokens, out, locals()) as run:
        stats = run.record()
    if launched()[0] > 0:
        return
    if as_json:
        print_json({"folder": str(run.folder.path), "n_tokens": stats.n_tokens, "model": stats.model.to_json()})
    elif not quiet:
        say(f"{measured_on(stats.model.name, stats.corpus)}: {stats.n_layers} x {stats.d_mlp} neurons recorded")
        say(f"statistics: {run.folder.file('statistics.safetensors')}")


@app.command()
@one_line_errors
def sparsity(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    p: Ps = None,
    metric: Metric = "ppl",
    calibration: Calibration = None,
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
    """Search CETT-PPL-p%: how few neurons may stay active before perplexity rises by p percent."""
    percents = p or [1.0]
    for percent in percents:
        check_question(percent, metric=metric)
    with open_run(model, text, tokens, out, locals()) as run:
        other = None if calibration is None else read_corpus(run.adapter.model, calibration, tokens, locals())
        first, *further = run.sparsities(percents, metric=metric, calibration=other)  # type: ignore[arg-type]
    conclude(run.folder.path, first, None, None, further, quiet=quiet, as_json=as_json)


@app.command()
@one_line_errors
def ablate(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    p: Ps = None,
    tokens: Tokens = DEFAULT_TOKENS,
    out: Out = None,
    ranking: By = None,
    refine: Refine = 0,
    replacement: Replacement = "mean",
    ranking_tokens: RankingTokens = DEFAULT_RANKING_TOKENS,
    scope: Scope = "model",
    controls: Controls = 3,
    n_ctx: NCtx = None,
    bos: Bos = None,
    packed: Packed = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Kernels = "auto",
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the largest set of neurons that can go for good; a third of the windows confirms it.

    An interrupted search goes on where it stopped.
    """
    percents = p or [1.0]
    for percent in percents:
        check_question(percent, ranking, replacement, scope)
    check_refine(refine, ranking, replacement)
    if controls < 0:
        raise ValueError(f"--controls must be at least 0, got {controls}")
    with open_run(model, text, tokens, out, locals(), heldout=True) as run:
        result = run.sparsity(percents[0]) if ranking == "activation_frequency" else None
        stats = run.record(result)
        question = {"ranking": ranking, "refine": refine, "replacement": replacement, "scope": scope, "seed": seed}
        found = run.ablations(stats, p_percents=percents, n_controls=controls, **question)  # type: ignore[arg-type]
        beside = run.known_sparsity()
    conclude(run.folder.path, None, None, found[0], found[1:], beside=beside, quiet=quiet, as_json=as_json)


@app.command()
@one_line_errors
def pareto(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    p: Ps = None,
    rules: Rules = None,
    points: Points = 6,
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
    """Measure perplexity against activation ratio under every rule, and which rule needs the fewest active neurons."""
    percents = p or [1.0, 5.0, 10.0]
    for percent in percents:
        check_question(percent)
    check_rules(rules, points)
    with open_run(model, text, tokens, out, locals()) as run:
        result = run.pareto(rules or [], p_percents=percents, n_points=points)
    conclude_pareto(run.folder.path, result, quiet=quiet, as_json=as_json)


app.command()(commands.rank)
app.command()(commands.fit)
app.command()(atlas_commands.atlas)
app.command()(commands.plan)
app.command()(effect_commands.damage)
app.command()(effect_commands.evaluate)
app.command()(commands.prune)
app.command()(study_command.study)
app.command()(track_command.track)
app.command()(commands.doctor)


@app.callback(invoke_without_command=True)
@one_line_errors
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"neuron-sparsity {__version__}")
        raise typer.Exit
    if launched()[1] > 1 and context.invoked_subcommand not in (None, *PARALLEL):
        raise ValueError(f"{context.invoked_subcommand} runs as one process: start it without torchrun")


def main() -> None:
    """Run the command line."""
    prepare()
    app(one_flag_a_text(sys.argv[1:]))


if __name__ == "__main__":
    main()
