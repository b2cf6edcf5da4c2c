"""How many neurons go under each ranking and replacement before perplexity rises by p percent, each beside its control.

Rankings are made, and counts searched, on half of the windows; the other half confirms. One row for each ranking,
replacement and p. The control is as many random neurons of every layer, replaced alike. `refined` rankings are scored
anew after each share of the neurons (`ns.refine`).

    python -m benchmarks.rankings --tokens 16384 --p 1 --p 5 --save
    python -m benchmarks.rankings --text wiki.txt --rankings fisher,fisher_mean --refine 3000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.ranking import RANKINGS


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(tokens=16_384)
    names = [name for name in RANKINGS if name != "activation_frequency"]  # it would need a search for thresholds first
    made.add_argument("--rankings", default=",".join(names), help="names, with commas")
    made.add_argument("--replacements", default="zero,mean")
    made.add_argument("--scope", default="model")
    made.add_argument("--p", type=float, action="append", help="default: 1 and 5")
    made.add_argument("--refine", type=int, default=0, help="also refine the gradient rankings to this many neurons")
    made.add_argument("--rounds", type=int, default=4)
    return made.parse_args()


def rankings(given: argparse.Namespace, adapter: MLPAdapter, windows: Windows) -> Iterator[tuple[ns.Ranking, str]]:
    """Yield each ranking with the replacement it is to be tried with."""
    stats, gradients = ns.record(adapter, windows), ns.saliency(adapter, windows)
    for replacement in given.replacements.split(","):
        for by in given.rankings.split(","):
            yield ns.rank(stats, by=by, saliency=gradients, scope=given.scope), replacement
            if given.refine and RANKINGS[by].needs == "saliency":
                refining = {"n_remove": given.refine, "n_rounds": given.rounds, "scope": given.scope}
                yield ns.refine(adapter, windows, gradients, by=by, replacement=replacement, **refining), replacement


def main() -> None:
    given = options()
    adapter, windows = load(given)
    calibration, heldout = windows.split(0.5)
    for ranking, replacement in rankings(given, adapter, calibration):
        for p in given.p or [1.0, 5.0]:
            found = ns.removable_neurons(
                adapter, calibration, ranking, p_percent=p, replacement=replacement, heldout=heldout
            )
            control, confirmed = found.control or {}, found.heldout or {}
            row = {
                "model": given.model,
                "corpus": windows.name,
                "n_tokens": calibration.n_tokens,
                "ranking": ranking.by,
                "scope": ranking.scope,
                "replacement": replacement,
                "p_percent": p,
                "n_neurons": found.n_neurons,
                "n_removable": found.n_removable,
                "ppl_increase_percent": found.ppl_increase_percent,
                "control_increase_percent": control.get("ppl_increase_percent"),
                "heldout_increase_percent": confirmed.get("ppl_increase_percent"),
                "heldout_tokens": heldout.n_tokens,
                "forward_passes": found.cost["forward_passes"],
            }
            write_row("rankings", row, save=given.save)


if __name__ == "__main__":
    main()
