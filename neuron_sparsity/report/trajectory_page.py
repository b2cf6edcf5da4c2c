"""The page of a trajectory: activation sparsity over training, made from its result alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuron_sparsity.report import _trajectory as views
from neuron_sparsity.report._text import count, visible
from neuron_sparsity.report.page import Report, Section, render
from neuron_sparsity.typed import expect

if TYPE_CHECKING:
    from neuron_sparsity.trajectory import TrajectoryResult

__all__ = ["trajectory_report"]


def trajectory_report(result: TrajectoryResult, *, title: str | None = None) -> Report:
    """Return one page that shows a trajectory; it opens offline and sends no request.

    Args:
        result: What `track` returned, finished or not.
        title: Title of the page.

    Returns:
        The page: `.save("report.html")` writes it, a notebook shows it.
    """
    expect("result", result, "TrajectoryResult")
    name = visible(title if title is not None else f"Activation sparsity over training, {result.name}")
    fit = views.fitted_law(result)
    measured = f"{count(len(result.points))} checkpoints"
    unfinished = "" if result.complete else "; the run is not finished"
    missing = f"; {count(len(result.gaps))} missing" if result.gaps else ""
    sections = [
        Section(
            "training",
            "Over training",
            f"How few neurons stay active as the model sees more data: {measured}{missing}{unfinished}.",
            (views.ratio_over_training(result, fit), views.law_over_training(fit), views.layers_over_training(result)),
        ),
        Section(
            "state",
            "What else changes",
            "Neurons that do nothing, and how well the model predicts.",
            (views.dead_over_training(result), views.perplexity_over_training(result)),
        ),
        Section("numbers", "In numbers", "", (views.trajectory_table(result), views.gap_table(result))),
        Section("measured", "How it was measured", "", (views.trajectory_measured(result),)),
    ]
    return Report(html=render(sections, title=name), title=name)
