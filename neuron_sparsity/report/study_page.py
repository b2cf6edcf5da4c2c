"""The page of a study: the paper's figures in kind, made from its result alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neuron_sparsity.report import _study as views
from neuron_sparsity.report import _study_shape as shape_views
from neuron_sparsity.report._text import count, visible
from neuron_sparsity.report.page import Report, Section, render
from neuron_sparsity.typed import expect

if TYPE_CHECKING:
    from neuron_sparsity.study import StudyResult

__all__ = ["study_report"]


def study_report(result: StudyResult, *, title: str | None = None) -> Report:
    """Return one page that shows a study; it opens offline and sends no request.

    Args:
        result: What `study` returned, finished or not.
        title: Title of the page.

    Returns:
        The page: `.save("report.html")` writes it, a notebook shows it.
    """
    expect("result", result, "StudyResult")
    name = visible(title if title is not None else f"How activation sparsity arises: {result.config['name']}")
    activations = list(dict.fromkeys(run.activation for run in result.runs))
    missing = f"; {count(len(result.missing))} more are not finished" if result.missing else ""
    sections = [
        Section(
            "data",
            "Training data",
            f"Activation ratio as the models see more data: {count(len(result.runs))} runs{missing}.",
            (
                views.verdict(result),
                *(views.ratio_over_data(result, activation) for activation in activations),
                views.law_table(result),
                views.spread_table(result),
            ),
        ),
        Section(
            "shape",
            "Width and depth",
            "Models with the same number of parameters, wide and shallow or narrow and deep.",
            tuple(shape_views.over_shape(result, "width_depth", activation) for activation in activations),
        ),
        Section(
            "scale",
            "Scale",
            "Models of several sizes: where the ratio ends, and how soon it gets there.",
            (
                *(shape_views.over_shape(result, "scale", activation) for activation in activations),
                shape_views.convergence(result),
            ),
        ),
        Section(
            "neurons",
            "Neurons and tokens",
            "How often neurons are active, and whether models of several sizes are active on the same tokens.",
            (
                *(shape_views.frequencies(result, activation) for activation in activations),
                *(shape_views.token_scatter(result, activation) for activation in activations),
                shape_views.agreement_table(result),
            ),
        ),
        Section(
            "state",
            "What else changes",
            "Neurons that do nothing, and how well the models predict.",
            (views.dead_over_data(result), views.loss_over_data(result)),
        ),
        Section("numbers", "In numbers", "", (views.run_table(result), views.gap_table(result))),
        Section("measured", "How it was made", "", (views.how_made(result),)),
    ]
    return Report(html=render(sections, title=name), title=name)
