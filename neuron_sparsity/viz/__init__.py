"""Views of results, for a notebook: each is shown offline, saved as a page, and drawn as a figure for a paper.

    ns.viz.layer_map(stats, result)                       # shown by Jupyter, VS Code and exported HTML
    ns.viz.layer_map(stats, result).save("map.html")      # one page that opens offline
    ns.viz.layer_map(stats, result).save("map.svg")       # matplotlib; .png and .pdf too
    ns.viz.layer_map(stats, result).figure()              # the matplotlib figure itself

A notebook holds the CircuitsVis bundle once: the first view that needs it brings it. What is given is checked first:
lengths must agree, NaN is refused, and what would make a page of more than 8 MB is refused with the number that fits.
"""

from neuron_sparsity.viz._checks import MOST_BYTES
from neuron_sparsity.viz._curves import cett_curves, pareto, removal_curve
from neuron_sparsity.viz._display import Assets, View, assets
from neuron_sparsity.viz._neurons import histogram, layer_map
from neuron_sparsity.viz._tokens import examples, text, token_activity, topk

__all__ = [
    "MOST_BYTES",
    "Assets",
    "View",
    "assets",
    "cett_curves",
    "examples",
    "histogram",
    "layer_map",
    "pareto",
    "removal_curve",
    "text",
    "token_activity",
    "topk",
]
