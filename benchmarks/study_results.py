"""Put a finished study under docs/results/study: study.json, figures, and the tables of the page, on stdout.

neuron-sparsity study --preset tiny --jobs 2 --out runs/tiny
python -m benchmarks.study_results runs/tiny > tables.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from neuron_sparsity.store import write_json
from neuron_sparsity.study import Series, StudyResult, StudyRun

TARGET = Path(__file__).parents[1] / "docs" / "results" / "study"
COLOURS = {"relu": "#0072b2", "silu": "#d55e00"}
LABELS = {"width_depth": "width-depth ratio", "scale": "parameters without embeddings"}


def axes_of(n: int) -> Any:
    """Return a figure and `n` panels side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, n, figsize=(4.6 * n, 3.4), constrained_layout=True)
    return figure, panels


def over_training(result: StudyResult) -> None:
    """Activation ratio, dead neurons and loss of the models with several seeds."""
    figure, (ratio, dead, ppl) = axes_of(3)
    for run in result.runs:
        if run.model != "base":
            continue
        colour = COLOURS[run.activation]
        for phase, marker in (("stable", "o"), ("warmup", "x"), ("decay", "x")):
            points = [point for point in run.points if point.phase == phase]
            tokens = [point.tokens / 1e6 for point in points]
            ratio.plot(tokens, [point.activation_ratio for point in points], marker, color=colour, markersize=3.5)
        law = run.laws[0]
        ratio.plot([place / 1e6 for place in law.places], law.mean, color=colour, linewidth=1)
        tokens = [point.tokens / 1e6 for point in run.points]
        dead.plot(tokens, [point.dead_ratio for point in run.points], "-o", color=colour, markersize=3, linewidth=1)
        ppl.plot(tokens, [point.ppl_dense for point in run.points], "-o", color=colour, markersize=3, linewidth=1)
    ratio.set(xscale="log", xlabel="training tokens, millions", ylabel="activation ratio")
    dead.set(xscale="log", xlabel="training tokens, millions", ylabel="dead neurons, share of all")
    ppl.set(xscale="log", yscale="log", xlabel="training tokens, millions", ylabel="perplexity, held out")
    for activation, colour in COLOURS.items():
        ratio.plot([], [], color=colour, label=f"{activation}, a line a seed")
    ratio.legend(frameon=False)
    figure.savefig(TARGET / "training.png", dpi=110)


def over_shape(result: StudyResult) -> None:
    """Activation ratio at the end over width-depth ratio and scale; activation frequencies."""
    figure, panels = axes_of(3)
    for panel, kind in zip(panels, ("width_depth", "scale"), strict=False):
        for one in result.series:
            if one.kind == kind:
                panel.plot(one.x, one.y, "o", color=COLOURS[one.activation], label=f"{one.activation}, {one.quantity}")
        panel.set(xscale="log", xlabel=LABELS[kind], ylabel="activation ratio")
        panel.legend(frameon=False)
    edges = result.frequency_edges
    for run in result.runs:
        if run.model == "base" and run.seed == 0 and run.frequency_shares:
            panels[2].stairs(run.frequency_shares[1:], edges, color=COLOURS[run.activation], label=run.activation)
    panels[2].set(xscale="log", xlabel="share of tokens a neuron is active on", ylabel="share of neurons")
    panels[2].legend(frameon=False)
    figure.savefig(TARGET / "shape.png", dpi=110)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def run_row(run: StudyRun) -> str:
    """Return a run as a row of Markdown."""
    law, last = run.laws[0], run.stable_end
    limit, later, rmse = "no fit", "no fit", ""
    if law.fit is not None:
        low, high = law.fit["limit_interval"]
        if law.later is not None:
            begin, end = law.later["limit_interval"]
            later = f"{law.later['limit']:.3f} ({begin:.3f} to {end:.3f})"
        limit, rmse = f"{law.fit['limit']:.3f} ({low:.3f} to {high:.3f})", f"{law.fit['mse'] ** 0.5:.4f}"
    cells = [run.name, f"{run.parameters['non_embedding']:,}", f"{run.width_depth_ratio:.3g}"]
    cells += (
        ["", "", ""] if last is None else [f"{last.ppl_dense:.1f}", number(run.end_ratio), number(last.dead_ratio, 4)]
    )
    return (
        f"| {' | '.join([*cells, number(run.common.get('cett')), limit, later, 'yes' if law.told else 'no', rmse])} |"
    )


def series_row(one: Series) -> str:
    """Return what a series tells as a row of Markdown."""
    pairs = ", ".join(f"{x:,.4g}: {y:.3f}" for x, y in sorted(zip(one.x, one.y, strict=True)))
    told = one.problem
    if one.fit is not None:
        told = one.fit.get("verdict") or " ".join(one.fit["warnings"])
        if one.kind == "width_depth":
            low, high = one.fit["intervals"]["slope"]
            told = f"slope {one.fit['slope']:.2g} ({low:.2g} to {high:.2g}). {told}"
    return f"| {one.kind} | {one.activation} | {one.quantity} | {pairs} | {told} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("study", type=Path, help="folder of the study")
    result = StudyResult.load(options.parse_args().study)
    TARGET.mkdir(exist_ok=True)
    write_json(TARGET / "study.json", result.to_json())
    over_training(result)
    over_shape(result)
    header = ["run", "parameters", "width/depth", "perplexity", "activation ratio", "dead", "CETT", "limit (95 %)"]
    header += ["without the first quarter", "told", "RMSE"]
    print(f"| {' | '.join(header)} |\n| --- {'| --: ' * (len(header) - 1)}|")
    print("\n".join(map(run_row, result.runs)))
    print("\n| model | quantity | mean | standard deviation | seeds |\n| --- | --- | --: | --: | --: |")
    for one in result.spreads:
        n = len(one.values)
        print(f"| {one.model} {one.activation} | {one.quantity} | {one.mean:.4g} | {one.deviation:.2g} | {n} |")
    print("\n| series | activation | quantity | values | what it tells |\n| --- | --- | --- | --- | --- |")
    print("\n".join(map(series_row, result.series)))
    print("\n| runs | kind | correlation | entries |\n| --- | --- | --: | --: |")
    for pair in result.agreements:
        print(f"| {pair.first}, {pair.second} | {pair.kind} | {number(pair.correlation)} | {pair.n_entries} |")
    for law in sorted({run.activation for run in result.runs}):
        own = [run for run in result.runs if run.activation == law]
        print(f"\n{law}: half of the change after " + ", ".join(f"{run.name} {run.half_tokens}" for run in own))


if __name__ == "__main__":
    main()
