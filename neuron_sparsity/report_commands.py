"""What `report` does without a model: a run folder rendered again, and several run folders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from neuron_sparsity.console import conclude, print_json, say
from neuron_sparsity.terminal import given

__all__ = ["compare_again", "holds", "neuron_places", "render_again"]

_SAID = ("quiet", "as_json")


def _refuse_others(context: typer.Context, allowed: Sequence[str], why: str) -> None:
    for name in context.params:
        if name not in (*allowed, *_SAID) and given(context, name):
            option = name if name == "model" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{why}; leave out {option}")


def neuron_places(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return (layer, neuron) of texts such as "3:17".

    Raises:
        ValueError: If one reads otherwise.

    Example:
        >>> neuron_places(["3:17", "L0:N5"])
        [(3, 17), (0, 5)]
    """
    found = []
    for text in texts:
        layer, colon, neuron = text.upper().partition(":")
        layer, neuron = layer.removeprefix("L"), neuron.removeprefix("N")
        if not (colon and layer.isdecimal() and neuron.isdecimal()):
            raise ValueError(f"--neurons takes LAYER:NEURON, such as 3:17, got {text!r}")
        found.append((int(layer), int(neuron)))
    return found


def holds(context: typer.Context, folder: Path, what: str) -> bool:
    """Return whether a folder is one that `track` ("trajectory") or `study` has filled: that file and no recording."""
    found = (folder / f"{what}.json").is_file() and not (folder / "statistics.safetensors").exists()
    if found:
        _refuse_others(context, ("model",), f"{folder} holds a {what}, rendered as it is")
    return found


def render_again(context: typer.Context, folder: Path, neurons: Sequence[str], *, quiet: bool, as_json: bool) -> None:
    """Write the page of a run folder again, and say what the run found."""
    from neuron_sparsity.run_results import load_run, render

    _refuse_others(context, ("model", "neurons"), f"{folder} is a run folder, rendered as it is")
    found = load_run(folder)
    render(folder, found, neurons=neuron_places(neurons))
    conclude(folder, found["result"], found["stats"], found["removed"], quiet=quiet, as_json=as_json)


def compare_again(
    context: typer.Context, folders: Sequence[Path], out: Path | None, *, quiet: bool, as_json: bool
) -> None:
    """Write one page with several run folders side by side, `compare.html` unless `out` says otherwise."""
    from neuron_sparsity.run_results import render_comparison

    _refuse_others(context, ("compare", "out"), "--compare puts run folders side by side as they are")
    path = render_comparison(folders, out if out is not None else Path("compare.html"))
    if as_json:
        print_json({"page": str(path), "runs": [str(folder) for folder in folders]})
    elif not quiet:
        say(f"{len(folders)} runs side by side: {path}")
