"""Cost of the search for removable neurons in F, its control and its held-out confirmation included.

As `neuron-sparsity ablate` does it: two thirds of the windows to search on, one third to confirm on. F is a dense pass
over the two thirds. How many passes the search takes depends on the model and the ranking: at most 14, each a dense
pass with some neurons replaced.
"""

from __future__ import annotations

import neuron_sparsity as ns
from benchmarks.harness import against_dense_pass, load, parser, spread, write_row
from neuron_sparsity.pipeline import CALIBRATION_SHARE


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(tokens=12_288, repeats=1)
    given = options.parse_args()
    adapter, windows = load(given)
    calibration, heldout = windows.split(CALIBRATION_SHARE)
    ranking = ns.rank(ns.record(adapter, calibration))
    results: list[ns.AblationResult] = []

    def search() -> None:
        results.append(ns.removable_neurons(adapter, calibration, ranking, p_percent=1.0, heldout=heldout))

    ratios = against_dense_pass(adapter, calibration, search, given.repeats)
    row = {"model": given.model, "corpus": windows.name, "n_tokens": calibration.n_tokens}
    row |= {f"ablate_F_{key}": value for key, value in spread(ratios).items()}
    row |= {"forward_passes": results[-1].cost["forward_passes"], "evaluations": len(results[-1].curve) - 1}
    write_row("ablate", row, save=given.save)


if __name__ == "__main__":
    main()
