"""Remove the weakest neurons until perplexity has risen by p percent, and see whether that holds on other text.

    python examples/remove_until.py --ranking fisher_mean --replacement mean --p 1 5

Two fifths of the text are ranked on, two fifths are searched on, one fifth confirms: a ranking flatters itself on its
own text, and so does a search. Any model and text that the command line takes will do.
"""

from __future__ import annotations

import argparse

import neuron_sparsity as ns


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--text", default="sotu")
    options.add_argument("--tokens", type=int, default=20_480)
    options.add_argument("--n-ctx", type=int, default=None)
    options.add_argument("--ranking", default="fisher_mean")
    options.add_argument("--scope", default="model", help="model or layer")
    options.add_argument("--replacement", default="mean")
    options.add_argument("--p", type=float, nargs="+", default=[1.0, 5.0])
    given = options.parse_args()

    model = ns.attach(ns.load_model(given.model), name=given.model)
    corpus = ns.load_corpus(given.text, model.model, n_tokens=given.tokens, n_ctx=given.n_ctx)
    others, rest = corpus.split(0.4)
    calibration, heldout = rest.split(2 / 3)
    stats, gradients = ns.record(model, others), ns.saliency(model, others)
    ranking = ns.rank(stats, by=given.ranking, saliency=gradients, scope=given.scope)
    print(f"{given.model} on {calibration.n_tokens:,} tokens of {given.text}, ranked by {ranking.by} ({ranking.scope})")
    results = ns.removable_sets(
        model,
        calibration,
        ranking,
        p_percents=given.p,
        replacement=given.replacement,
        heldout=heldout,
        ranked_on=others,
    )
    for found in results:
        print(f"p = {found.p_percent:g} %: {found.n_removable:,} of {found.n_neurons:,} neurons, {found.replacement}")
        if found.n_removable:
            print(f"  measured {found.ppl_increase_percent:+.3f} %")
            print(f"  random neurons of the same layers {found.control['ppl_increase_percent']:+.3f} %")
            rise, verdict = found.heldout["ppl_increase_percent"], found.heldout["verdict"]
            print(f"  {heldout.n_tokens:,} held-out tokens {rise:+.3f} %: {verdict}")


if __name__ == "__main__":
    main()
