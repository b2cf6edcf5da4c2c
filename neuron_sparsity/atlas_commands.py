"""The command that says what kind of neuron each one is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    P,
    Packed,
    Quiet,
    RemoteCode,
    Text,
    Tokens,
    check_question,
)
from neuron_sparsity.terminal import one_line_errors

if TYPE_CHECKING:
    from neuron_sparsity.taxonomy import Atlas

__all__ = ["atlas"]

ACTIVE = ("auto", "nonzero", "cett")


@one_line_errors
def atlas(
    model: Model = DEFAULT_MODEL,
    text: Text = None,
    active: Annotated[
        str,
        typer.Option(
            "--active",
            help="What counts as active. nonzero: not exactly zero. cett: contribution at the layer's CETT-PPL-p% "
            "threshold or above, searched if sparsity.json is not there. auto: nonzero for ReLU, else cett.",
        ),
    ] = "auto",
    p: P = 1.0,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Work out what each neuron does to the logits.")
    ] = True,
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
    """Say what kind of neuron each one is: dead or alive, what it fires on, what it does to the logits.

    Records the neurons first where the folder has no statistics.
    """
    check_question(p)
    if active not in ACTIVE:
        raise ValueError(f"--active must be one of {', '.join(ACTIVE)}, got {active!r}")
    with open_run(model, text, tokens, out, locals()) as run:
        from neuron_sparsity.errors import MeasurementError
        from neuron_sparsity.taxonomy import NONZERO

        by_zeros = active == "nonzero" or (active == "auto" and run.adapter.info.activation.startswith("relu"))
        result = None if by_zeros else run.sparsity(p)
        if result is not None and not result.reached:
            raise MeasurementError(
                f"{result.name} is not reached, so there are no thresholds to count by; "
                "name a smaller --p, or --active nonzero"
            )
        stats = run.record(result)
        made = run.atlas(stats, active=NONZERO if result is None else result.name, logits=logits)
    if as_json:
        print_json({"folder": str(run.folder.path)} | made.to_json())
    elif not quiet:
        for line in atlas_lines(made):
            say(line)
        say(f"atlas: {run.folder.file('atlas.parquet')}")


def atlas_lines(made: Atlas) -> list[str]:
    """Return what was found, one statement a line."""
    counts, total = made.counts(), len(made.table)
    classes = counts["classes"]
    lines = [
        f"{measured_on(made.model.name, made.corpus)}: {total:,} neurons",
        f"active: {made.definitions['active']}; {made.definitions['classes']}",
        f"dead {classes['dead']:,} ({classes['never']:,} never active: at most {300 / made.n_tokens:.2g} % of tokens, "
        f"95 % bound 3/N), rare {classes['rare']:,}, alive {classes['alive']:,}, always on {classes['always_on']:,}",
    ]
    if len(made.curve) > 1:
        dead = ", ".join(f"{point.dead:,} at N = {point.n_tokens:,}" for point in made.curve)
        lines.append(f"dead, as N grows: {dead}")
    if found := counts.get("triggers"):
        lines += [
            f"triggers ({made.definitions['triggers']}): {found['token_detector']:,} token detectors, "
            f"{found['bigram_detector']:,} of bigrams, {found['trigram_detector']:,} of trigrams; "
            f"{found['covered_by_few']:,} neurons covered by a small set",
            f"positional ({made.definitions['positional']}): {found['positional']:,}",
        ]
    if roles := counts.get("roles"):
        said = ", ".join(f"{name} {roles[name]:,}" for name in roles)
        lines.append(f"effect on logits ({made.definitions['logits']}): {said}")
    return lines
