"""`track`: activation sparsity over the checkpoints of a training run, from the command line."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuron_sparsity.console import print_json, read_corpus, say
from neuron_sparsity.options import (
    DEFAULT_TOKENS,
    AsJson,
    BatchSize,
    Bos,
    Device,
    Dtype,
    Kernels,
    NCtx,
    P,
    Packed,
    Quiet,
    RemoteCode,
    Text,
    Tokens,
    check_device,
    check_question,
    check_sizes,
)
from neuron_sparsity.terminal import one_line_errors

if TYPE_CHECKING:
    from neuron_sparsity.trajectory import TrajectoryResult

__all__ = ["show", "track"]

_ALL = "@all"


@one_line_errors
def track(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Local folders or Hugging Face names, NAME@REVISION; with =TOKENS behind it, what it was trained on. "
            "NAME@all: all of Pythia's or a CRFM GPT-2's.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder.")],
    text: Text = None,
    p: P = 1.0,
    tokens_per_step: Annotated[
        float | None, typer.Option("--tokens-per-step", help="Training tokens of one step, for names like step1000.")
    ] = None,
    every: Annotated[int, typer.Option("--every", help="Of NAME@all, every so-manieth, counted from the last.")] = 1,
    cett: Annotated[
        float | None,
        typer.Option("--cett", help="CETT common to all checkpoints. Default: searched on the last five."),
    ] = None,
    tokens: Tokens = DEFAULT_TOKENS,
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
    """Measure activation sparsity over checkpoints of a training run; an interrupted run goes on where it stopped."""
    check_question(p)
    check_sizes({"tokens": tokens, "n_ctx": n_ctx, "batch_size": batch_size})
    from neuron_sparsity.progress import progress_bar

    options: dict[str, Any] = {"n_ctx": n_ctx, "bos": bos, "packed": packed}
    with progress_bar(not quiet and sys.stderr.isatty()) as progress:
        from neuron_sparsity.trajectory import track as measure

        named, counts = _named(checkpoints, every)
        check_device(device, backend)
        with redirect_stdout(io.StringIO()):  # stdout is for results, and some libraries print there
            measure(
                named,
                lambda model: read_corpus(model, text, tokens, options),
                p_percent=p,
                cett=cett,
                training_tokens=counts,
                tokens_per_step=tokens_per_step,
                folder=out,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                backend=backend,  # type: ignore[arg-type]
                batch_size=batch_size,
                progress=progress,
            )
    show(out, quiet=quiet, as_json=as_json)


def show(folder: Path, *, quiet: bool, as_json: bool) -> None:
    """Write the page of a folder that `track` has filled, and print what it holds; no model is loaded."""
    from neuron_sparsity.run_results import render_trajectory
    from neuron_sparsity.summary import trajectory_lines

    result: TrajectoryResult = render_trajectory(folder)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        for line in trajectory_lines(result):
            say(line)
        say(f"report: {folder / 'report.html'}")


def _named(checkpoints: list[str], every: int) -> tuple[list[str], dict[str, float]]:
    """Return the names of checkpoints, and the training tokens of those that are named with them."""
    from neuron_sparsity.trajectory import checkpoint_schedule

    names: list[str] = []
    counts: dict[str, float] = {}
    if every < 1:
        raise ValueError(f"--every must be at least 1, got {every}")
    if every > 1 and not any(_is_all(checkpoint) for checkpoint in checkpoints):
        raise ValueError(
            f"--every {every} is for NAME{_ALL}, and none is named; leave it out, or name fewer checkpoints"
        )
    for checkpoint in checkpoints:
        name, _, count = checkpoint.rpartition("=")
        if _is_all(checkpoint):
            names += checkpoint_schedule(checkpoint.removesuffix(_ALL), every=every)
        elif name and not Path(checkpoint).exists():
            try:
                counts[name] = float(count)
            except ValueError:
                raise ValueError(f"{checkpoint!r} has {count!r} for training tokens; give a number, as 2.1e9") from None
            names.append(name)
        else:
            names.append(checkpoint)
    return names, counts


def _is_all(checkpoint: str) -> bool:
    return checkpoint.endswith(_ALL) and not Path(checkpoint).exists()
