"""`study`: train a grid of small models, follow each over its checkpoints, fit and draw, from the command line."""

from __future__ import annotations

import dataclasses
import io
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neuron_sparsity.console import print_json, say
from neuron_sparsity.options import AsJson, Quiet, Text
from neuron_sparsity.parallel import launched
from neuron_sparsity.terminal import one_line_errors

if TYPE_CHECKING:
    from neuron_sparsity.study import StudyConfig

__all__ = ["show", "study"]


@one_line_errors
def study(
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="tiny, small, or paper-0.1b, -0.2b, -0.4b, -0.8b, -1.2b. Default: tiny."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A configuration of your own, TOML or JSON, instead of a preset.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the study.")] = None,
    text: Text = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs trained at a time, each in a process of its own.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Names of runs, to train these alone; repeat it for several.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, without making any weights.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu: where there is a GPU too. Default: what there is.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a grid of small models, follow their activation sparsity over training and fit the laws.

    An interrupted study goes on where it stopped. With `accelerate launch -m neuron_sparsity study ...` several
    processes train each model together.
    """
    if preset is not None and config is not None:
        raise ValueError("give --preset or --config, not both")
    if out is None and not dry_run:
        raise ValueError("name a folder with --out, or see what would be trained with --dry-run")
    from neuron_sparsity.progress import progress_bar

    with progress_bar(not quiet and sys.stderr.isatty() and launched()[0] == 0) as progress:
        from neuron_sparsity.study import load_config
        from neuron_sparsity.study import study as run_study
        from neuron_sparsity.study.grid import PARENT

        found = load_config(preset or "tiny" if config is None else _file(config))
        if text:
            found = dataclasses.replace(found, text=dataclasses.replace(found.text, source=tuple(text)))
        if out is None or dry_run:
            if launched()[0] == 0:
                _say_plan(found, _arguments(preset, config, text, out, found.name), as_json=as_json)
            return
        with redirect_stdout(io.StringIO()):  # stdout is for results, and some libraries print there
            run_study(found, out, only=only or (), jobs=jobs, device=device, progress=progress)
    if launched()[0] == 0 and PARENT not in os.environ:  # the process that started this one puts the page together
        show(out, quiet=quiet, as_json=as_json)


def _file(path: Path) -> Path:
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"--config takes a .toml or .json file, got {path}; a preset is named with --preset")
    return path


def _arguments(preset: str | None, config: Path | None, text: list[str] | None, out: Path | None, name: str) -> str:
    """Return what starts the study, behind the name of the program."""
    arguments = ["study", *(["--preset", preset or "tiny"] if config is None else ["--config", str(config)])]
    arguments += ["--text", *text] if text else []
    return shlex.join([*arguments, "--out", str(Path("runs") / name if out is None else out)])


def _say_plan(config: StudyConfig, arguments: str, *, as_json: bool) -> None:
    from neuron_sparsity.study import plan_rows

    rows = plan_rows(config)
    start = {"one": f"neuron-sparsity {arguments}", "several": f"accelerate launch -m neuron_sparsity {arguments}"}
    if as_json:
        print_json({"config": config.to_json(), "models": rows, "start": start})
        return
    plan = config.training
    say(f"{config.name}: {config.about}")
    say(
        f"{len(config.runs())} runs of {plan.steps:,} steps of {config.tokens_per_step:,} tokens: "
        f"{plan.warmup_steps:,} of warm-up, {plan.decay_steps:,} of decay; {len(plan.checkpoint_steps())} "
        f"checkpoints; text: {', '.join(config.text.source)}"
    )
    for row in rows:
        counts = row["parameters"]
        say(
            f"  {row['model']:<8} {row['n_layers']:>3} layers of {row['d_model']} x {row['d_mlp']}, width/depth "
            f"{row['width_depth_ratio']:.3g}: {counts['non_embedding']:.3g} parameters without embeddings, "
            f"{counts['total']:.3g} in all; {row['runs']} runs of {row['tokens']:.3g} tokens, "
            f"{row['operations']:.2g} operations"
        )
    say(f"start it in one process: {start['one']}")
    say(f"in one for each GPU, a number that divides the batch of {plan.batch}: {start['several']}")


def show(folder: Path, *, quiet: bool, as_json: bool) -> None:
    """Write the page of a study's folder, and print what it found."""
    from neuron_sparsity.run_results import render_study
    from neuron_sparsity.summary import study_lines

    result = render_study(folder)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        for line in study_lines(result):
            say(line)
        say(f"report: {folder / 'report.html'}")
