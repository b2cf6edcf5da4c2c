"""Compare rankings by how many neurons they remove for p percent of perplexity, each against its control.

    python examples/compare_rankings.py --rankings contribution wanda fisher random --p 5

A control removes as many random neurons of every layer. A ranking that costs as much as its control has found out how
many neurons each layer can spare, and nothing about which; one that costs more has found the wrong ones.
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
    options.add_argument(
        "--rankings", nargs="+", default=["contribution", "wanda", "taylor", "fisher", "fisher_mean", "random"]
    )
    options.add_argument("--scope", default="model", help="model or layer")
    options.add_argument("--replacements", nargs="+", default=["zero", "mean"])
    options.add_argument("--p", type=float, default=5.0)
    given = options.parse_args()

    model = ns.attach(ns.load_model(given.model), name=given.model)
    corpus = ns.load_corpus(given.text, model.model, n_tokens=given.tokens, n_ctx=given.n_ctx)
    others, rest = corpus.split(0.4)
    calibration, heldout = rest.split(2 / 3)
    stats, gradients = ns.record(model, others), ns.saliency(model, others)
    print(f"{given.model}, p = {given.p:g} %, searched on {calibration.n_tokens:,} tokens of {given.text},")
    print(f"ranked on {others.n_tokens:,} others, held out {heldout.n_tokens:,}; percent are rises of perplexity\n")
    print("| ranking | replacement | removable | measured | control | held out | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for by in given.rankings:
        for replacement in given.replacements:
            found = ns.removable_neurons(
                model,
                calibration,
                ns.rank(stats, by=by, saliency=gradients, scope=given.scope),
                p_percent=given.p,
                replacement=replacement,
                heldout=heldout,
                ranked_on=others,
            )
            shown = ["-", "-", "-", "-"]
            if found.n_removable:
                rises = (
                    found.ppl_increase_percent,
                    *(part["ppl_increase_percent"] for part in (found.control, found.heldout)),
                )
                shown = [f"{rise:+.2f} %" for rise in rises] + [found.heldout["verdict"]]
            print(f"| {by} | {replacement} | {found.n_removable:,} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
