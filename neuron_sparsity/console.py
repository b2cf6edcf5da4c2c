"""What the commands share: opening a run for a model and a text, and saying what was found.

torch is imported when a run is opened, not before.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from neuron_sparsity.options import check_device, check_sizes
from neuron_sparsity.parallel import launched, own_device, session
from neuron_sparsity.terminal import printable

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.corpus import Windows
    from neuron_sparsity.pareto import ParetoResult
    from neuron_sparsity.pipeline import Run
    from neuron_sparsity.sparsity import SparsityResult
    from neuron_sparsity.statistics import NeuronStatistics

__all__ = [
    "DEFAULT_CORPUS",
    "conclude",
    "conclude_pareto",
    "measured_on",
    "open_run",
    "print_json",
    "read_corpus",
    "say",
]

DEFAULT_CORPUS = "sotu"


@contextmanager
def open_run(
    model: str, text: list[str] | None, tokens: int, out: Path | None, options: dict[str, Any], *, heldout: bool = False
) -> Iterator[Run]:
    """Load model and corpus and open the run folder; under torchrun, together with the other processes."""
    from neuron_sparsity.progress import progress_bar

    check_sizes(options)
    show = not options["quiet"] and sys.stderr.isatty() and launched()[0] == 0
    device = own_device(options["device"])
    with session(device), progress_bar(show) as progress:
        if progress:
            progress(f"loading {model}", 0, 0)
        from neuron_sparsity.adapter import attach, load_model
        from neuron_sparsity.pipeline import Run

        check_device(device, options["backend"])
        with redirect_stdout(io.StringIO()):  # stdout is for results, and some libraries print there
            loaded = load_model(
                model,
                device=device,
                dtype=options["dtype"],
                trust_remote_code=options["trust_remote_code"],
            )
            windows = read_corpus(loaded, text, tokens, options)
            others = read_others(loaded, text, windows, options.get("ranking_tokens", 0), options)
        yield Run(
            attach(loaded, name=model),
            windows,
            out if out is not None else Path("runs") / _slug(f"{Path(model).name}-{windows.name}"),
            heldout=heldout,
            others=others,
            batch_size=options["batch_size"],
            backend=options["backend"],
            progress=progress,
        )


def read_corpus(model: Any, text: list[str] | None, tokens: int, options: dict[str, Any]) -> Windows:
    """Return the windows of a text, or of the default one."""
    from neuron_sparsity.corpus import load_corpus

    with redirect_stdout(io.StringIO()):  # stdout is for results, and some libraries print there
        return load_corpus(
            text[0] if text and len(text) == 1 else text or DEFAULT_CORPUS,
            model,
            n_tokens=tokens,
            n_ctx=options["n_ctx"],
            prepend_bos=options["bos"],
            packed=options["packed"],
        )


def read_others(
    model: Any, text: list[str] | None, windows: Windows, tokens: int, options: dict[str, Any]
) -> Windows | None:
    """Return windows of the same text that share nothing with those given, or None if there are not enough."""
    from neuron_sparsity.overlap import apart_from

    n_windows = tokens // windows.window
    if n_windows < 1:
        return None
    # Where the windows of a larger sample fall, some fall on those given; of twice as many, enough are left.
    left = apart_from(read_corpus(model, text, windows.n_tokens + 2 * tokens, options), windows)
    return None if left is None or left.n_windows < n_windows else left.take(n_windows)


def conclude(
    folder: Path,
    result: SparsityResult | None,
    stats: NeuronStatistics | None,
    removed: AblationResult | None,
    further: Sequence[SparsityResult | AblationResult] = (),
    *,
    beside: SparsityResult | None = None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Print what was found, `further` being the results at more p; one of several processes prints."""
    if launched()[0] > 0:
        return
    from neuron_sparsity.store import blaming
    from neuron_sparsity.summary import side_by_side, summary_lines

    if as_json:
        parts = {"sparsity": result, "ablation": removed}
        found: dict[str, Any] = {name: part.to_json() for name, part in parts.items() if part is not None}
        if further:
            name, main = ("ablation", removed) if result is None else ("sparsity", result)
            found = {name: [one.to_json() for one in (main, *further) if one is not None]}
        alone = len(found) == 1 and stats is None and not further
        print_json(next(iter(found.values())) if alone else {"folder": str(folder)} | found)
        return
    if quiet:
        return
    mend = "if a file in it was edited, delete that file and run its step again"
    with blaming(folder, "cannot be summed up", mend):
        lines = summary_lines(result, stats, removed)
        for one in further:
            lines += (summary_lines(None, None, one) if result is None else summary_lines(one, None, None))[1:]  # type: ignore[arg-type]
        if beside is not None and removed is not None:
            lines += side_by_side(beside, removed)
    for line in lines:
        say(line)
    page = folder / "report.html"
    say(f"report: {page}" if stats is not None and page.is_file() else f"run folder: {folder}")


def conclude_pareto(folder: Path, result: ParetoResult, *, quiet: bool, as_json: bool) -> None:
    """Draw the figure if matplotlib is there, and print what every rule needs."""
    from neuron_sparsity.report import save_pareto_figure
    from neuron_sparsity.summary import pareto_lines

    drawn = save_pareto_figure(result, folder)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        for line in pareto_lines(result):
            say(line)
        figure = "not drawn, matplotlib is not installed (extra `notebooks`)" if not drawn else " and ".join(drawn)
        say(f"figure: {figure}")
        say(f"run folder: {folder}")


def measured_on(model: str, corpus: dict[str, Any]) -> str:
    """Say model, corpus, tokens and window."""
    return f"{model} on {corpus['name']}, {corpus['n_tokens']:,} tokens in windows of {corpus['window']}"


def say(line: str) -> None:
    """Print a line, whatever characters are in it."""
    typer.echo(printable(line))


def print_json(data: dict[str, Any]) -> None:
    """Print a result for machines."""
    from neuron_sparsity.store import to_json_text

    typer.echo(to_json_text(data))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "run"
