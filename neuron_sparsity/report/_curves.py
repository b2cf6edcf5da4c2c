"""Charts of the search and of the ablation: perplexity against what is cut, and how both spread over the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from neuron_sparsity.report._charts import Chart, asinh_axis, layer_axis, linear_axis
from neuron_sparsity.report._classes import layer_labels
from neuron_sparsity.report._fragments import figure, folded, note, table
from neuron_sparsity.report._summary import control_line, sentences
from neuron_sparsity.report._text import count, join, number, percent, percent_of, replacement, signed, target, visible
from neuron_sparsity.wording import no_shorter, unsettled

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = [
    "activation_curve",
    "cett_curves",
    "layer_ratios",
    "layer_table",
    "layer_thresholds",
    "removable_layers",
    "removal_curve",
    "removal_verdict",
]


def activation_curve(result: SparsityResult) -> str:
    """Return perplexity rise against activation ratio, at every point the search evaluated."""
    points = sorted(
        (float(e["activation_ratio"]), float(e["ppl_increase_percent"]), float(e["cett"])) for e in result.evaluations
    )
    finite = [point for point in points if np.isfinite(point).all()]
    if not finite:
        return note("The search recorded no evaluation that can be drawn.")
    divergences = sorted(
        (float(e["activation_ratio"]), 100 * float(np.expm1(min(e["kl"], 50.0))))
        for e in result.evaluations
        if "kl" in e
    )
    title = f"Perplexity rise against activation ratio, {len(finite)} evaluations, target {target(result.p_percent)}"
    chart = Chart(
        linear_axis([point[0] for point in finite], "activation ratio"),
        asinh_axis([point[1] for point in finite], "perplexity rise", unit=max(result.p_percent, 1e-3)),
        title,
    )
    chart.rule(result.p_percent, f"target +{target(result.p_percent)}")
    for estimate in result.estimates:
        if estimate.low is not None and estimate.high is not None:
            kl = estimate.metric == "cett_kl"
            ends = [(estimate.low, result.p_percent), (estimate.high, result.p_percent)]
            said = f"95 % interval {number(estimate.low)} to {number(estimate.high)}"
            name = "KL divergence" if kl else "perplexity"
            chart.line(ends, style="line interval" + (" kl" if kl else ""), note=f"by {name}: {said}")
    steady = [(x, y) for x, y in divergences if np.isfinite(y)]
    if len(steady) > 1:
        chart.line(steady, style="line thin kl", note="KL divergence from the dense model, as a rise of perplexity")
        for x, y in steady:
            chart.point(x, y, f"activation ratio {number(x)}, KL divergence {signed(y)}", style="dot kl", radius=2.4)
    chart.line([(x, y) for x, y, _ in finite])
    for x, y, cett in finite:
        chart.point(x, y, f"activation ratio {number(x)}, perplexity {signed(y)}, CETT {number(cett)}")
    if result.reached:
        ratio, rise = result.activation_ratio, result.ppl_increase_percent
        found = f"found: activation ratio {number(ratio)}, perplexity {signed(rise)}"
        chart.point(ratio, rise, found, style="dot found", radius=5.5)
    caption = "All layers truncated at once, thresholds from the dense run. "
    caption += "The ring is the result. " if result.reached else "No point costs as much as the target. "
    if len(steady) > 1:
        caption += (
            "Orange: the mean KL divergence from the dense model, written as the rise it would be on the model's own "
            "text. "
        )
    if any(estimate.low is not None for estimate in result.estimates):
        caption += "Thick bars on the target: 95 % intervals of the activation ratio. "
    caption += "The vertical scale is linear around zero and logarithmic beyond the target."
    return figure("Perplexity rise against activation ratio", chart.svg(), caption)


def cett_curves(result: SparsityResult) -> str:
    """Return CETT against activation ratio for every layer."""
    curves = [c for c in result.curves if len(c["cett"])]
    if not curves:
        return note("The run holds no CETT curves.")
    ratios = [float(v) for c in curves for v in c["activation_ratio"]]
    values = [float(v) for c in curves for v in c["cett"]] + ([float(result.cett)] if result.reached else [])
    chart = Chart(
        linear_axis([v for v in ratios if np.isfinite(v)], "activation ratio of the layer"),
        linear_axis([v for v in values if np.isfinite(v)], "CETT", zero=True),
        f"CETT against activation ratio, {len(curves)} layers",
    )
    for index, curve in enumerate(curves):
        keep = np.unique(np.linspace(0, len(curve["cett"]) - 1, 48).round().astype(int))
        points = sorted((float(curve["activation_ratio"][k]), float(curve["cett"][k])) for k in keep)
        shade = f"color-mix(in oklab, var(--accent), var(--warm) {100 * index / max(len(curves) - 1, 1):.0f}%)"
        chart.line(points, style="line thin", colour=shade, note=f"layer {curve['layer']}")
    if result.reached:
        chart.rule(result.cett, f"CETT {number(result.cett)}")
    first, last = curves[0]["layer"], curves[-1]["layer"]
    caption = (
        f"One line a layer, from blue (layer {first}) to orange (layer {last}): how much of its output is lost when "
        "only this share of its neurons stays active."
    )
    return figure("CETT of each layer", chart.svg(), caption)


def layer_ratios(result: SparsityResult) -> str:
    """Return the activation ratio of each layer as bars."""
    ratios = [float(layer.activation_ratio) for layer in result.layers]
    if not ratios:
        return note("The run holds no thresholds per layer.")
    index = [layer.layer for layer in result.layers]
    mean = float(np.mean(ratios))
    x = layer_axis(index)
    chart = Chart(
        x, linear_axis([*ratios, mean], "activation ratio", zero=True), f"Activation ratio of {len(ratios)} layers"
    )
    for layer, ratio in zip(index, ratios, strict=True):
        chart.bar(layer, 0.0, ratio, f"layer {layer}: activation ratio {number(ratio)}", style="bar")
    chart.rule(mean, f"mean {number(mean)}")
    caption = "Share of (token, neuron) pairs active in the truncated run. The mean over layers is the headline."
    return figure("Activation ratio of each layer", chart.svg(), caption)


def layer_thresholds(result: SparsityResult) -> str:
    """Return the threshold of each layer as a line."""
    layers = [(layer.layer, float(layer.threshold)) for layer in result.layers if np.isfinite(layer.threshold)]
    if not layers:
        return note("The run holds no finite threshold.")
    y = linear_axis([threshold for _, threshold in layers], "threshold", zero=True)
    chart = Chart(layer_axis([index for index, _ in layers]), y, f"Threshold of {len(layers)} layers")
    chart.line([(float(index), threshold) for index, threshold in layers])
    for index, threshold in layers:
        chart.point(index, threshold, f"layer {index}: threshold {number(threshold, 4)}")
    caption = (
        "On the contribution, in residual-stream norm. Layers write at different scales, hence one threshold each."
    )
    return figure("Threshold of each layer", chart.svg(), caption)


def layer_table(result: SparsityResult) -> str:
    """Return threshold, CETT and activation ratio of each layer, folded away."""
    header = ("layer", "threshold", "CETT", "activation ratio", "sparsity ratio")
    rows = [
        (
            str(layer.layer),
            number(layer.threshold, 4),
            number(layer.cett),
            number(layer.activation_ratio),
            number(1 - layer.activation_ratio),
        )
        for layer in result.layers
    ]
    caption = "Thresholds on the contribution, in residual-stream norm"
    return folded(f"Thresholds of all {len(rows)} layers", table(header, rows, caption=caption))


def removal_curve(removed: AblationResult) -> str:
    """Return perplexity rise against the number of neurons removed, with target, random control and held-out check."""
    points = [(float(p["n_removed"]), float(p["ppl_increase_percent"])) for p in removed.curve]
    points = sorted(point for point in points if np.isfinite(point).all())
    if not points:
        return note("The run holds no removal curve.")
    rises = [("held", removed.heldout), ("control", removed.control)]
    marks = [(style, float(found["ppl_increase_percent"])) for style, found in rises if found]
    title = f"Perplexity rise against neurons removed, {len(points)} evaluations, target {target(removed.p_percent)}"
    x = linear_axis(
        [0.0, *(p[0] for p in points), float(removed.n_removable)], "neurons removed", zero=True, whole=True
    )
    heights = [p[1] for p in points] + [rise for _, rise in marks if np.isfinite(rise)]
    chart = Chart(x, asinh_axis(heights, "perplexity rise", unit=max(removed.p_percent, 1e-3)), title)
    chart.rule(removed.p_percent, f"target +{target(removed.p_percent)}")
    chart.line(points)
    some = {p["n_removed"]: p for p in removed.curve if p.get("standard_error_percent")}
    for removed_count, rise in points:
        words, few = f"{count(removed_count)} removed: perplexity {signed(rise)}", some.get(removed_count)
        if few is not None:
            words += f", estimated from {count(few['n_tokens'])} tokens"
            words += f", standard error {number(few['standard_error_percent'])} points"
        chart.point(removed_count, rise, words, style="dot" if few is None else "dot few")
    said = {
        "control": f"control, {visible(removed.control.get('kind', 'random'))}" if removed.control else "",
        "held": "held-out text",
    }
    for style, rise in marks:
        chart.point(
            removed.n_removable, rise, f"{said[style]}: perplexity {signed(rise)}", style=f"dot {style}", radius=5.5
        )
    rings = {"held": "the blue ring the same set on held-out text", "control": "the orange ring the control"}
    shown = ", ".join(rings[style] for style, _ in marks)
    caption = f"Removed in order of {visible(removed.ranking)}, weakest first, each replaced by {replacement(removed)}."
    if shown:
        caption += f" At {count(removed.n_removable)} neurons: {shown}."
    return figure("Perplexity rise against neurons removed", join([chart.svg(), _few(removed, some)]), caption)


def _few(removed: AblationResult, some: Mapping[float, Mapping[str, float]]) -> Markup:
    """The key of points from fewer tokens than the others."""
    if not some:
        return Markup("")
    sizes = sorted({int(point["n_tokens"]) for point in some.values()})
    fewer = count(sizes[0]) + (f" to {count(sizes[-1])}" if len(sizes) > 1 else "")
    whole = removed.corpus.get("n_tokens")
    keys = (("dot", f"all {count(whole)} tokens"), ("dot few", f"estimated from {fewer} of them"))
    shape = Markup(
        '<span class="point-key"><svg class="chart" viewBox="0 0 10 10" aria-hidden="true"><circle class="{}" cx="5" '
        'cy="5" r="3.2"/></svg>{}</span>'
    )
    return Markup('<div class="legend">{}</div>').format(join(shape.format(style, said) for style, said in keys))


def removable_layers(stats: NeuronStatistics, removed: AblationResult) -> str:
    """Return how many neurons of each layer are in the removable set, as bars.

    Raises:
        ValueError: If the set names a layer that the statistics do not have.
    """
    labels = layer_labels(stats)
    counts = dict.fromkeys(labels, 0)
    for layer, _ in removed.removable:
        if int(layer) not in counts:
            raise ValueError(
                f"the removable set names layer {layer}, the statistics have layers {labels[0]} to {labels[-1]}"
            )
        counts[int(layer)] += 1
    x = layer_axis(labels)
    y = linear_axis([0.0, float(max([1, *counts.values()]))], "neurons", zero=True, whole=True)
    chart = Chart(x, y, f"Removable neurons of {len(labels)} layers, {count(len(removed.removable))} in all")
    for layer, found in counts.items():
        chart.bar(layer, 0.0, found, f"layer {layer}: {count(found)} removable", style="bar warm")
    caption = f"{count(len(removed.removable))} neurons in all; every layer has {count(stats.model.d_mlp)}."
    return figure("Removable neurons of each layer", chart.svg(), caption)


def removal_verdict(removed: AblationResult) -> str:
    """Return what the ablation found in plain sentences: the set, the held-out check, the control."""
    share = percent_of(removed.n_removable / removed.n_neurons)
    said = [
        f"{count(removed.n_removable)} of {count(removed.n_neurons)} neurons ({share}) can be replaced by "
        f"{replacement(removed)} on every token."
    ]
    if not removed.reached:
        said.append(
            f"No set that was tried costs more than the target of +{target(removed.p_percent)}, so all of them may go."
        )
    said += sentences(unsettled(removed))
    said.append(f"Perplexity goes from {number(removed.ppl_dense, 4)} to {number(removed.ppl_ablated, 4)}.")
    held = removed.heldout
    if not held:
        said.append("The set was not checked on held-out text.")
    elif held.get("holds"):
        said.append(
            f"On held-out text it rises by {percent(held['ppl_increase_percent'])}, within the target: the set holds."
            + (" It was chosen on that text." if held.get("chosen_on") else "")
        )
    elif held.get("verdict") == "not refuted":
        ends = " to ".join(signed(end) for end in held.get("interval") or ())
        said.append(
            f"On held-out text perplexity changes by {signed(held['ppl_increase_percent'])}, "
            f"{f'with a 95 % interval of {ends}' if ends else 'without an interval'}: the target is not refuted "
            "there, nor confirmed."
        )
    else:
        said.append(
            f"On held-out text perplexity changes by {signed(held['ppl_increase_percent'])}, beyond the target: the "
            "set does not hold there, and fewer neurons can really go."
        )
    if held and held.get("holding"):
        fewer = held["holding"]
        said.append(
            f"The {count(fewer['n_removable'])} weakest do hold there ({signed(fewer['ppl_increase_percent'])}), but "
            "they were chosen on that text."
        )
    said += sentences(no_shorter(held or {}))
    if removed.control:
        kind = visible(removed.control.get("kind", "random"))
        said.append(f"Control ({kind}). {control_line(removed.control)}")
    return join([Markup('<p class="verdict">{}</p>').format(" ".join(said)), _every_target(removed)])


def _every_target(removed: AblationResult) -> str:
    """What the same search found at each p, where it was asked for several."""
    found = getattr(removed, "per_p", ())
    if len(found) < 2:
        return ""
    header = ("target", "neurons that can go", "perplexity", "random neurons do", "held-out text, 95 %", "verdict")
    rows = [
        (
            f"+{target(one['p_percent'])}",
            count(one["n_removable"]),
            signed(one["ppl_increase_percent"]),
            f"{number(one['control_ratio'])} times" if one["control_ratio"] else "not known",
            " to ".join(signed(end) for end in one["heldout_interval"]) if one["heldout_interval"] else "not known",
            visible(one["verdict"] or "nothing to check"),
        )
        for one in found
    ]
    where = f"{count(removed.corpus['n_tokens'])} tokens of {visible(removed.corpus['name'])}"
    return table(header, rows, caption=f"Every target of this search, on {where}")
