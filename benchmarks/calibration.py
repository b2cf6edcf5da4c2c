"""How CETT-PPL-p% moves when the CETT of thresholds is taken from other text than the one it is measured on.

For every pair of texts: thresholds whose CETT was measured on the first, perplexity and activation ratio on the second.
The windows of a text are the same in all of its rows.
"""

from __future__ import annotations

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", default=["sotu"], help="more texts: files or built-in corpora")
    options.add_argument("--p", type=float, default=1.0)
    given = options.parse_args()
    adapter, first = load(given)
    others = (ns.load_corpus(text, adapter.model, n_tokens=given.tokens) for text in given.texts if text != given.text)
    corpora = [first, *others]
    for evaluated in corpora:
        for calibrated in [evaluated, *(corpus for corpus in corpora if corpus is not evaluated)]:
            result = ns.cett_ppl_sparsity(adapter, evaluated, calibration=calibrated, p_percent=given.p)
            row = {
                "model": given.model,
                "evaluated_on": evaluated.name,
                "calibrated_on": calibrated.name,
                "n_tokens": evaluated.n_tokens,
                "p_percent": given.p,
                "rise_percent": result.ppl_increase_percent,
                "cett": result.cett,
                "activation_ratio": result.activation_ratio,
            }
            for estimate in result.estimates:
                row |= {
                    f"{estimate.metric}_{key}": value
                    for key, value in (
                        ("cett", estimate.cett),
                        ("ratio", estimate.activation_ratio),
                        ("low", estimate.low),
                        ("high", estimate.high),
                    )
                }
            write_row("calibration", row, save=given.save)


if __name__ == "__main__":
    main()
