"""What gradients predict of removing one neuron, against what removing it costs on the same tokens.

`--neurons` neurons at random over the whole model, and as many of those that are predicted to matter most (half of
`--most` the largest predicted rises, half the largest falls), each replaced alone on every token: one pass a neuron, on
the tokens that the gradients were taken on. Three predictions: the first-order term, half the empirical Fisher
information of the change (Theis et al. 2018, arXiv:1801.05787), and their sum. One row a group, replacement and
prediction: rank correlation, share of neurons whose sign is right, slope through zero, and the error as a share of the
spread of what was measured.

    python -m benchmarks.removal_effect --model demo-relu --tokens 4096 --neurons 200 --most 40 --save
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.perplexity import mean_loss, token_losses
from neuron_sparsity.replacement import Replacer


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(tokens=2048)
    made.add_argument("--neurons", type=int, default=60, help="at random")
    made.add_argument("--most", type=int, default=20, help="of those predicted to matter most")
    made.add_argument("--replacements", default="mean,zero")
    made.add_argument("--seed", type=int, default=0)
    return made.parse_args()


def main() -> None:
    given = options()
    adapter, windows = load(given)
    gradients = ns.saliency(adapter, windows)
    dense = token_losses(adapter, windows).double()
    for replacement in given.replacements.split(","):
        constant = gradients.mean_activation if replacement == "mean" else 0.0
        first, both = (gradients.predicted_rise(constant, order=order).flatten() for order in (1, 2))
        replacer = Replacer(adapter, replacement, means=gradients.mean_activation if replacement == "mean" else None)
        for group, neurons in chosen(given, both).items():
            measured = np.array([rise(adapter, windows, replacer, dense, int(neuron)) for neuron in neurons])
            for prediction, values in {"first": first, "fisher": both - first, "first+fisher": both}.items():
                row: dict[str, Any] = {"model": given.model, "corpus": windows.name, "n_tokens": windows.n_tokens}
                row |= {"replacement": replacement, "group": group, "neurons": len(neurons), "prediction": prediction}
                write_row("removal_effect", row | compared(values[neurons].numpy(), measured), save=given.save)


def chosen(given: argparse.Namespace, predicted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The neurons of each group, as places in the flattened model."""
    generator = torch.Generator().manual_seed(given.seed)
    order = predicted.argsort()
    groups = {"random": torch.randperm(len(predicted), generator=generator)[: given.neurons]}
    if given.most >= 2:
        groups["most"] = torch.cat([order[: given.most // 2], order[-(given.most // 2) :]])
    return groups


def rise(adapter: MLPAdapter, windows: Windows, replacer: Replacer, dense: torch.Tensor, neuron: int) -> float:
    """Rise of the mean loss in nats with one neuron replaced on every token."""
    mask = torch.zeros(adapter.info.n_layers, adapter.info.d_mlp, dtype=torch.bool)
    mask.view(-1)[neuron] = True
    with replacer.on_post(mask) as replaced:
        losses = token_losses(adapter, windows, on_post=replaced)
    return mean_loss(losses.double() - dense, windows.scored)


def compared(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Return how well one tells the other."""
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "sign_right": float((np.sign(predicted) == np.sign(measured)).mean()),
        "slope": float(predicted @ measured / (predicted @ predicted)),
        "error_share": float(np.sqrt(((measured - predicted) ** 2).mean()) / measured.std()),
        "measured_sd_nats": float(measured.std()),
        "largest_measured_nats": float(measured[np.abs(measured).argmax()]),
        "predicted_there_nats": float(predicted[np.abs(measured).argmax()]),
    }


if __name__ == "__main__":
    main()
