"""Cost of the removable set in F: dense passes, search, controls and held-out confirmation; and of gradients.

As `neuron-sparsity ablate` does it: two thirds of the windows to search on, one third to confirm on. F is a dense pass
over the two thirds. Passes are counted by the tokens that were run; the bar is 10 for one p, and 5 more for each
further one. The time in F is beside it: a pass with neurons replaced costs a little more than a dense one. Gradients
(`saliency`) are timed on the same two thirds.
"""

from __future__ import annotations

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, spread, write_row
from neuron_sparsity.pipeline import CALIBRATION_SHARE


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--p", type=float, action="append", help="repeat it for several at once; 1 by default")
    options.add_argument("--ranking", default="fisher_mean")
    options.add_argument("--replacement", default="mean")
    options.set_defaults(tokens=12_288, repeats=1)
    given = options.parse_args()
    adapter, windows = load(given)
    calibration, heldout = windows.split(CALIBRATION_SHARE)
    gradients: list[ns.NeuronSaliency] = []
    saliency = against_dense_pass(adapter, calibration, lambda: gradients.append(ns.saliency(adapter, calibration)), 1)
    stats, p_percents = ns.record(adapter, calibration), given.p or [1.0]
    ranking = ns.rank(stats, by=given.ranking, saliency=gradients[0])
    results: list[ns.AblationResult] = []

    def search() -> None:
        options = {"p_percents": p_percents, "replacement": given.replacement, "heldout": heldout}
        results[:] = ns.removable_sets(adapter, calibration, ranking, **options)

    ratios = against_dense_pass(adapter, calibration, search, given.repeats)
    passes = max(result.cost["forward_passes"] for result in results)
    bar = 10 + 5 * (len(p_percents) - 1)
    for result in results:
        row = {"model": given.model, "corpus": windows.name, "n_tokens": calibration.n_tokens}
        row |= {"ranking": result.ranking, "replacement": result.replacement, "p_percent": result.p_percent}
        row |= {"n_removable": result.n_removable, "resolved": result.resolved, "counts": len(result.curve) - 1}
        row |= {"forward_passes": result.cost["forward_passes"], "all_forward_passes": passes, "bar": bar}
        row |= {f"ablate_F_{key}": value for key, value in spread(ratios).items()} | {"saliency_F": saliency[0]}
        write_row("ablate", row, save=given.save)
    if passes > bar:
        raise SystemExit(f"{passes:.2f} passes are over the bar of {bar}")


if __name__ == "__main__":
    main()
