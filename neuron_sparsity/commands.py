"""Commands that measure nothing and write no run folder; `cli` puts them beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neuron_sparsity.console import measured_on, print_json, say
from neuron_sparsity.options import (
    DEFAULT_MODEL,
    DEFAULT_TOKENS,
    RANKINGS,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Model,
    NCtx,
    Quiet,
    RemoteCode,
    Scope,
    Seed,
    Tokens,
    check_sizes,
)
from neuron_sparsity.terminal import one_line_errors, printable

if TYPE_CHECKING:
    from rich.table import Table

    from neuron_sparsity.plan import Plan
    from neuron_sparsity.pruning import PrunedModel

__all__ = ["doctor", "fit", "plan", "prune", "rank", "show_plan", "size_text"]


@one_line_errors
def plan(
    model: Model = DEFAULT_MODEL,
    tokens: Tokens = DEFAULT_TOKENS,
    n_ctx: NCtx = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what measuring a model will need: memory, disk and time. No weights are read, and no device is needed."""
    check_sizes({"tokens": tokens, "n_ctx": n_ctx, "batch_size": batch_size})
    from neuron_sparsity.plan import plan as make_plan

    made = make_plan(
        model,
        n_tokens=tokens,
        n_ctx=n_ctx,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(made.to_json())
    else:
        show_plan(made)


@one_line_errors
def prune(
    folder: Annotated[Path, typer.Argument(help="Run folder in which `ablate` or `report` found what can go.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint, empty or not there.")],
    p: Annotated[
        float | None, typer.Option("--p", help="Of which p, where several were asked for. Default: the first.")
    ] = None,
    holding: Annotated[
        bool, typer.Option("--holding", help="Take the set that was measured to hold on the held-out text.")
    ] = False,
    form: Annotated[
        str,
        typer.Option("--form", help="cut, padded or zeroed. Default: auto, the first of them a checkpoint can hold."),
    ] = "auto",
    model: Annotated[
        str | None, typer.Option("--model", help="Where the measured weights are. Default: where they were.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take the removable neurons out of the weights, and write a checkpoint that transformers loads."""
    import torch

    from neuron_sparsity.ablation_files import removal_at
    from neuron_sparsity.checkpoint import check_vacant
    from neuron_sparsity.errors import RunFolderError
    from neuron_sparsity.pruning import prune as prune_model
    from neuron_sparsity.run_results import means_of
    from neuron_sparsity.store import RunFolder
    from neuron_sparsity.weights import load_weights

    run = RunFolder(folder)
    if not run.has("ablation.json"):
        raise RunFolderError(f"{folder} has no ablation.json; find what can go with `neuron-sparsity ablate` first")
    removed = removal_at(run, p)
    removed = removed.holding_set() if holding else removed
    means = means_of(run, removed)
    check_vacant(out)
    dtype = getattr(torch, removed.model.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise RunFolderError(
            f"{folder / 'ablation.json'} is damaged (dtype {removed.model.dtype!r}); run `ablate` again"
        )
    _, plain, tokenizer = load_weights(
        model or removed.model.name, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code
    )
    pruned = prune_model(plain, removed, means=means, form=form, out=out, tokenizer=tokenizer)
    if as_json:
        print_json({"folder": str(out)} | pruned.to_json())
    elif not quiet:
        for line in (*_pruned_lines(pruned), f"checkpoint: {out}"):
            say(line)


@one_line_errors
def rank(
    folder: Annotated[Path, typer.Argument(help="Run folder with a recording.")],
    by: Annotated[
        str, typer.Option("--by", help=f"{', '.join(RANKINGS)}; from wanda on, after `ablate` by such a one.")
    ] = "contribution",
    weakest: Annotated[
        int | None, typer.Option("--weakest", help="How many of the weakest to list. Default: 20.")
    ] = None,
    strongest: Annotated[
        int | None, typer.Option("--strongest", help="List this many of the strongest instead.")
    ] = None,
    scope: Scope = "model",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """List the weakest (or strongest) neurons of a recording."""
    from neuron_sparsity.errors import RunFolderError
    from neuron_sparsity.ranking import rank as rank_neurons
    from neuron_sparsity.saliency import NeuronSaliency
    from neuron_sparsity.scores import RANKINGS as DEFINITIONS
    from neuron_sparsity.statistics import NeuronStatistics
    from neuron_sparsity.store import RunFolder

    if weakest is not None and strongest is not None:
        raise typer.BadParameter("give --weakest or --strongest, not both")
    stats = NeuronStatistics.load(RunFolder(folder).path)
    if by == "activation_frequency" and not stats.threshold_names:
        raise RunFolderError(
            f"{folder} was not recorded under thresholds, which --by {by} counts; `neuron-sparsity report` does that"
        )
    gradients = NeuronSaliency.load(folder) if by in DEFINITIONS and DEFINITIONS[by].needs == "saliency" else None
    ranking = rank_neurons(stats, by=by, saliency=gradients, scope=scope, seed=seed)  # type: ignore[call-overload]
    neurons = (
        ranking.strongest(strongest) if strongest is not None else ranking.weakest(20 if weakest is None else weakest)
    )
    rows = {block: row for row, block in enumerate(stats.model.layers)}
    listed = [
        {"layer": layer, "neuron": neuron, "score": float(ranking.scores[rows[layer], neuron])}
        for layer, neuron in neurons
    ]
    if as_json:
        print_json(
            {
                "by": by,
                "scope": scope,
                "definition": DEFINITIONS[by].definition,
                "corpus": ranking.corpus,
                "neurons": listed,
            }
        )
        return
    which = "strongest" if strongest is not None else "weakest"
    say(f"{which} by {DEFINITIONS[by].definition}; {measured_on(stats.model.name, ranking.corpus)}")
    for entry in listed:
        typer.echo(f"layer {entry['layer']:>3}  neuron {entry['neuron']:>6}  {entry['score']:.4g}")


@one_line_errors
def fit(
    file: Annotated[
        Path,
        typer.Argument(
            help="trajectory.json or its run folder, a CSV with columns tokens,activation_ratio, or a JSON object with "
            "the lists token_passed and activation_ratio."
        ),
    ],
    law: Annotated[str, typer.Option("--law", help="auto, relu or silu.")] = "auto",
    drop_first: Annotated[int, typer.Option("--drop-first", help="Warm-up points to leave out.")] = 0,
    noise: Annotated[
        str, typer.Option("--noise", help="independent, or ar1: neighbouring points err together.")
    ] = "independent",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit the law of activation ratio over training tokens, with intervals and rival laws."""
    from neuron_sparsity.laws import fit_law, read_points
    from neuron_sparsity.summary import law_lines

    points = read_points(file)
    found = fit_law(*points, law=law, drop_first=drop_first, noise=noise)  # type: ignore[arg-type]
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        for line in law_lines(found, file.name or str(file)):
            say(line)


@one_line_errors
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices and what works here."""
    from neuron_sparsity.doctor import examine, lines

    found = examine()
    if as_json:
        print_json(found)
    else:
        for line in lines(found):
            say(line)


def _pruned_lines(pruned: PrunedModel) -> list[str]:
    measured = pruned.measured or {}
    corpus, heldout = measured["corpus"], measured["heldout"] or {}
    chosen = ", the held-out text that this set was chosen on" if heldout.get("chosen_on") else ""
    return [
        f"{pruned.source['name']}: {len(pruned.neurons):,} of {pruned.n_neurons:,} neurons taken out, "
        f"{pruned.replacement} replacement; {pruned.form} ({pruned.reason})",
        f"parameters: {pruned.n_parameters_before:,} before, {pruned.n_parameters:,} now "
        f"({pruned.n_parameters_removed:,} gone, {pruned.n_parameters_added:,} new in biases); "
        f"{pruned.n_parameters_zeroed:,} are zero in the place of what went",
        f"perplexity: {measured['ppl_increase_percent']:+.3f} % on {corpus['name']}, {corpus['n_tokens']:,} tokens in "
        f"windows of {corpus['window']}{chosen}, as measured by ablation",
    ]


def show_plan(plan: Plan) -> None:
    """Print a plan as two tables, and where its times are from."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    model = plan.model
    console.print(
        printable(
            f"{model.name}: {model.architecture}, {model.n_layers} x {model.d_mlp:,} neurons, d_model {model.d_model:,}"
        )
    )
    console.print(
        f"{plan.n_tokens:,} tokens in windows of {plan.n_ctx}, {plan.batch_size} a forward pass at most, "
        f"{plan.dtype} on {plan.device}"
    )
    console.print(_sizes(plan))
    console.print(_steps(plan))
    devices = plan.n_devices()
    if plan.device != "cpu" and devices is not None:
        console.print(f"devices of 80 GB: {devices}, {size_text(plan.peak_on(devices))} on the fullest")
    elif plan.device != "cpu":
        console.print("devices of 80 GB: one is too small for a block and its batch; lower --batch-size")
    for source in dict.fromkeys(step.source for step in plan.steps):
        names = ", ".join(step.name for step in plan.steps if step.source == source)
        console.print(f"F of {names}: {source}")
    console.print(
        "F is one dense forward pass with loss on the same tokens. Its count was measured on that model and setting, "
        "and is an estimate for any other. Bytes are computed, the Python process itself left out."
    )


def _sizes(plan: Plan) -> Table:
    model = plan.model
    rows = [
        ("parameters", f"{model.n_parameters:,}", ""),
        ("  of the MLPs", f"{model.n_mlp_parameters:,}", f"{model.n_mlp_parameters / model.n_parameters:.0%}"),
        (f"weights in {plan.dtype}", size_text(plan.weights_bytes), ""),
        ("statistics while recording", size_text(plan.statistics_bytes), "does not grow with tokens"),
        ("statistics when done", size_text(plan.result_bytes), "with contexts of examples"),
        ("activations of a batch", size_text(plan.batch_bytes), "with temporaries"),
        ("peak on the device", size_text(plan.peak_bytes), "largest step, with weights"),
        ("run folder", size_text(plan.run_folder_bytes), "and a few MB of JSON and HTML"),
    ]
    if plan.host_bytes:
        rows.insert(-1, ("peak of the machine", size_text(plan.host_bytes), "weights arrive there"))
    return _table(("need", "size", "note"), rows)


def _steps(plan: Plan) -> Table:
    flop = plan.dense_pass_flop
    rows = [
        (step.name, f"{step.dense_passes:g} F", size_text(step.dense_passes * flop, "FLOP"), size_text(step.peak_bytes))
        for step in plan.steps
    ]
    return _table(("step", "time", "that is", "peak"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, justify="right" if name in ("size", "time", "that is", "peak") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def size_text(n: float, unit: str = "B") -> str:
    """Return a size in decimal units.

    Example:
        >>> size_text(999), size_text(504_627_328), size_text(16_060_522_496), size_text(3.0e15, "FLOP")
        ('999 B', '505 MB', '16.1 GB', '3.0 PFLOP')
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while n >= 999.5 and power < len(prefixes) - 1:
        n, power = n / 1000, power + 1
    return f"{n:.1f} {prefixes[power]}{unit}" if power and n < 99.95 else f"{n:.0f} {prefixes[power]}{unit}"
