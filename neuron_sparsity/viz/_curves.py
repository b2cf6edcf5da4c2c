"""Views of curves: perplexity against neurons removed and against neurons active, and the CETT of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from neuron_sparsity.report import views
from neuron_sparsity.report._image import colour
from neuron_sparsity.report._text import count, join, number, replacement, target, visible
from neuron_sparsity.search import search_name
from neuron_sparsity.typed import expect
from neuron_sparsity.viz._display import View
from neuron_sparsity.viz._measured import figures, on

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.pareto import ParetoResult
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["cett_curves", "pareto", "removal_curve"]


def removal_curve(removed: AblationResult, *others: AblationResult) -> View:
    """Return the rise of perplexity against the number of neurons removed, of one ranking or of several.

    Args:
        removed: What `removable_neurons` returned.
        *others: Other rankings on the same model and text, drawn beside it and into the same figure.

    Returns:
        View; in the figure, the rings of a single result are its held-out check and its random control.

    Raises:
        ValueError: If a rise is NaN, no point can be drawn, or results are of different models or texts.
    """
    results = (removed, *others)
    for given in results:
        expect("removed", given, "AblationResult")
    for other in others:
        _same(removed, other)
    drawn = [_points(result) for result in results]
    names = " and ".join(dict.fromkeys(visible(result.ranking) for result in results))
    title = f"Perplexity rise against neurons removed by {names}"
    put_in = " or ".join(dict.fromkeys(replacement(result) for result in results))
    definition = f"dense perplexity {number(removed.ppl_dense, 4)}; removed neurons replaced by {put_in}"
    measured = on(removed.model, removed.corpus, definition)
    left_out = sum(not math.isfinite(float(p["ppl_increase_percent"])) for result in results for p in result.curve)
    if left_out:
        measured += f"; {count(left_out)} points of infinite perplexity are left out"
    marks = [] if others else _marks(removed)

    def draw() -> Any:
        module = figures()
        lines = [
            module.Curve(*zip(*points, strict=True), label=f"{result.ranking}, {result.replacement}", colour=shade)
            for result, points, shade in zip(results, drawn, _colours(module, len(results)), strict=True)
        ]
        rule = (removed.p_percent, f"target +{removed.p_percent:g} %")
        axes = {"x": f"neurons removed, of {count(removed.n_neurons)}", "y": "rise of perplexity, %"}
        unit = max(removed.p_percent, 1e-3)
        return module.curves(lines, title=title, measured=measured, rule=rule, marks=marks, symlog=unit, **axes)

    body = join(Markup(views.removal_curve(result)) for result in results)
    if others:
        body = Markup('<div class="grid">{}</div>').format(body)
    return View(title, measured, body, draw)


def _colours(module: Any, n: int) -> Iterable[str]:
    return (module.COLOURS[place % len(module.COLOURS)] for place in range(n))


def _same(first: AblationResult, other: AblationResult) -> None:
    for what, ours, theirs in (
        ("models", first.model.fingerprint, other.model.fingerprint),
        ("texts", first.corpus.get("sha256"), other.corpus.get("sha256")),
    ):
        if ours != theirs:
            raise ValueError(
                f"the rankings {first.ranking} and {other.ranking} were measured on different {what}; their curves "
                "cannot share axes"
            )


def _points(removed: AblationResult) -> list[tuple[float, float]]:
    points = sorted((float(point["n_removed"]), float(point["ppl_increase_percent"])) for point in removed.curve)
    for n, rise in points:
        if math.isnan(n) or math.isnan(rise):
            raise ValueError(f"the curve of {removed.ranking} is NaN at {n:g} neurons removed; measure it again")
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        raise ValueError(f"the curve of {removed.ranking} has no point that can be drawn")
    return finite


def _marks(removed: AblationResult) -> list[tuple[float, float, str]]:
    found = [("held-out text", removed.heldout), ("as many random neurons of every layer", removed.control)]
    rises = [(float(part["ppl_increase_percent"]), name) for name, part in found if part]
    return [(float(removed.n_removable), rise, name) for rise, name in rises if math.isfinite(rise)]


def pareto(result: ParetoResult) -> View:
    """Return perplexity against activation ratio under every rule, and the table of what each needs.

    Args:
        result: What `pareto` returned.

    Raises:
        ValueError: If a point is NaN, or there is none.
    """
    expect("result", result, "ParetoResult")
    points = [(curve.label, point) for curve in result.curves for point in curve.points]
    if not points:
        raise ValueError("the result has no pass that can be drawn")
    for label, point in points:
        if math.isnan(point.activation_ratio) or math.isnan(point.ppl):
            raise ValueError(f"the curve of {label} is NaN at parameter {point.parameter:g}; measure it again")
    title = f"Perplexity against activation ratio under {count(len(result.curves))} rules"
    measured = on(result.model, result.corpus, f"dense perplexity {number(result.ppl_dense, 4)}")
    body = views.pareto_curves(result) + views.pareto_table(result)
    return View(title, measured, body, lambda: figures().pareto(result))


def cett_curves(result: SparsityResult) -> View:
    """Return CETT against activation ratio for every layer: what a layer loses when only a share of it is active.

    Args:
        result: What `cett_ppl_sparsity` returned.

    Raises:
        ValueError: If a curve is NaN, its two lists differ in length, or there is none.
    """
    expect("result", result, "SparsityResult")
    curves = [curve for curve in result.curves if len(curve["cett"])]
    if not curves:
        raise ValueError("the result holds no CETT curves")
    for curve in curves:
        ratio, cett = list(curve["activation_ratio"]), list(curve["cett"])
        if len(ratio) != len(cett):
            raise ValueError(
                f"layer {curve['layer']}: {len(cett):,} CETT values for {len(ratio):,} activation ratios, need as many"
            )
        if any(math.isnan(float(value)) for value in (*ratio, *cett)):
            raise ValueError(f"the CETT curve of layer {curve['layer']} is NaN; measure it again")
    title = f"CETT of {count(len(curves))} layers"
    measured = on(result.model, result.corpus, _found(result))

    def draw() -> Any:
        module = figures()
        first, last = int(curves[0]["layer"]), int(curves[-1]["layer"])
        lines = [
            module.Curve(
                *zip(*sorted(zip(curve["activation_ratio"], curve["cett"], strict=True)), strict=True),
                colour=colour((int(curve["layer"]) - first) / max(last - first, 1)),
                style="-",
            )
            for curve in curves
        ]
        rule = (result.cett, f"CETT {result.cett:.3g}") if result.reached else None
        axes = {"x": "activation ratio of the layer", "y": "CETT", "bar": (first, max(last, first + 1), "layer")}
        return module.curves(lines, title=title, measured=measured, rule=rule, **axes)

    return View(title, measured, views.cett_curves(result), draw)


def _found(result: SparsityResult) -> str:
    if not result.reached:
        return f"no CETT in 0..1 raises perplexity by {target(result.p_percent)}"
    name = search_name(result.metric, result.p_percent)
    return f"{name}: CETT {number(result.cett)}, activation ratio {number(result.activation_ratio)}"
