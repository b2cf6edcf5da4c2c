"""The report: every view of a run on one page that opens offline.

`views` has one function per view, each returning an HTML fragment; `page` puts fragments into one file. A report is
made from results alone and never needs the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from neuron_sparsity.report._compare import compare
from neuron_sparsity.report._pareto import save_pareto_figure
from neuron_sparsity.report.page import Report, build
from neuron_sparsity.report.study_page import study_report
from neuron_sparsity.report.trajectory_page import trajectory_report

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.damage import DamageResult
    from neuron_sparsity.pareto import ParetoResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.saliency import NeuronSaliency
    from neuron_sparsity.sparsity import SparsityResult, TokenActivity

__all__ = ["Report", "compare", "report", "save_pareto_figure", "study_report", "trajectory_report"]


def report(
    stats: NeuronStatistics,
    result: SparsityResult | None = None,
    removed: AblationResult | None = None,
    *,
    passage: TokenActivity | None = None,
    pareto: ParetoResult | None = None,
    damage: DamageResult | None = None,
    saliency: NeuronSaliency | None = None,
    atlas: Any = None,
    neurons: Iterable[tuple[int, int]] = (),
    title: str | None = None,
) -> Report:
    """Return one page that shows a run; it opens offline and sends no request.

    Args:
        stats: Statistics of every neuron.
        result: The CETT-PPL-p% search; without it, its sections say how to get it.
        removed: The removable set; without it, its section says how to get it.
        passage: Activation ratio of a passage, layer by token.
        pareto: Perplexity against activation ratio under every rule; shown where it was measured.
        damage: What a change does to single tokens and in which layers; shown where it was measured.
        saliency: What gradients predict of removing each neuron alone appears in the table of neurons.
        atlas: An Atlas, or a DataFrame with its columns, one row a neuron: kinds, triggers and logit effects appear in
            the table of neurons. Missing columns are not shown.
        neurons: (layer, neuron) whose examples must be on the page; a page has room for those of a part of them only.
        title: Title of the page; by default it names the model.

    Returns:
        The page: `.save("report.html")` writes it, a notebook shows it. The same input gives the same bytes.

    Raises:
        ValueError: If the parts come from different models, or disagree in shape; if one of `neurons` does not exist.
    """
    return build(
        stats, result, removed, passage=passage, pareto=pareto, damage=damage, saliency=saliency, atlas=atlas,
        neurons=neurons, title=title,
    )  # fmt: skip
