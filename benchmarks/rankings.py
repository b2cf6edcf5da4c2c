"""How many neurons go under each ranking and replacement before perplexity rises by p percent, each beside its control.

Rankings are made on `--ranking-tokens` of the text; of the rest, which shares nothing with them, two thirds are
searched and one third confirms. One row for each ranking, replacement and p. The control is as many random neurons of
every layer, replaced alike. `refined` rankings are scored anew after each share of the neurons (`ns.refine`).
Activation frequency is counted under the thresholds of CETT-PPL-1% on the text of the ranking. Gradients are kept in
the folder `--keep`, and taken up from there.

    python -m benchmarks.rankings --p 1 --p 5 --save
    python -m benchmarks.rankings --text wiki.txt --rankings fisher,fisher_mean --refine 3000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import neuron_sparsity as ns
from benchmarks.harness import load, parser, write_row
from neuron_sparsity.adapter import MLPAdapter
from neuron_sparsity.corpus import Windows
from neuron_sparsity.overlap import apart_from
from neuron_sparsity.pipeline import CALIBRATION_SHARE
from neuron_sparsity.ranking import RANKINGS
from neuron_sparsity.saliency import SALIENCY_FILE


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(tokens=12_288)
    made.add_argument("--ranking-tokens", type=int, default=8192)
    made.add_argument("--rankings", default=",".join(RANKINGS), help="names, with commas")
    made.add_argument("--replacements", default="zero,mean")
    made.add_argument("--scope", default="model")
    made.add_argument("--p", type=float, action="append", help="default: 1 and 5")
    made.add_argument("--controls", type=int, default=3)
    made.add_argument("--refine", type=int, default=0, help="also refine the gradient rankings to this many neurons")
    made.add_argument("--only-refined", action="store_true", help="with --refine: leave out the rankings as they were")
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--keep", type=Path, help="folder for gradients")
    given = made.parse_args()
    if given.only_refined and not given.refine:
        made.error("--only-refined leaves nothing to measure without --refine")
    return given


def rankings(given: argparse.Namespace, adapter: MLPAdapter, windows: Windows) -> Iterator[tuple[ns.Ranking, str]]:
    """Yield each ranking with the replacement it is to be tried with."""
    names, thresholds = given.rankings.split(","), None
    if "activation_frequency" in names:
        thresholds = {"CETT-PPL-1%": ns.cett_ppl_sparsity(adapter, windows, p_percent=1.0).thresholds}
    stats = ns.record(adapter, windows, thresholds=thresholds)
    gradients = gradients_on(adapter, windows, given.keep)
    for replacement in given.replacements.split(","):
        for by in names:
            if not given.only_refined:
                yield ns.rank(stats, by=by, saliency=gradients, scope=given.scope), replacement
            if given.refine and RANKINGS[by].needs == "saliency":
                refining = {"n_remove": given.refine, "n_rounds": given.rounds, "scope": given.scope}
                yield ns.refine(adapter, windows, gradients, by=by, replacement=replacement, **refining), replacement


def gradients_on(adapter: MLPAdapter, windows: Windows, folder: Path | None) -> ns.NeuronSaliency:
    if folder is not None and (folder / SALIENCY_FILE).is_file():
        found = ns.NeuronSaliency.load(folder)
        if (found.model.fingerprint, found.corpus["sha256"]) == (adapter.info.fingerprint, windows.sha256):
            return found
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return ns.saliency(adapter, windows, folder=folder)


def main() -> None:
    given = options()
    adapter, windows = load(given)
    more = ns.load_corpus(given.text, adapter.model, n_tokens=given.tokens + 2 * given.ranking_tokens)
    apart = apart_from(more, windows)
    if apart is None or apart.n_tokens < given.ranking_tokens:
        raise SystemExit(f"{given.text} has no {given.ranking_tokens:,} further tokens; lower --ranking-tokens")
    others = apart.take(given.ranking_tokens // apart.window)
    calibration, heldout = windows.split(CALIBRATION_SHARE)
    for ranking, replacement in rankings(given, adapter, others):
        for found in ns.removable_sets(
            adapter,
            calibration,
            ranking,
            p_percents=given.p or [1.0, 5.0],
            replacement=replacement,
            heldout=heldout,
            ranked_on=others,
            n_controls=given.controls,
        ):
            write_row("rankings", row_of(given.model, windows.name, others, found), save=given.save)


def row_of(model: str, corpus: str, others: Windows, found: ns.AblationResult) -> dict[str, Any]:
    control, confirmed = found.control or {}, found.heldout or {}
    holding = confirmed.get("holding") or {}
    low, high = confirmed.get("interval") or (None, None)
    return {
        "model": model,
        "corpus": corpus,
        "ranking_tokens": others.n_tokens,
        "n_tokens": found.corpus["n_tokens"],
        "heldout_tokens": confirmed.get("corpus", {}).get("n_tokens"),
        "ranking": found.ranking,
        "scope": found.scope,
        "replacement": found.replacement,
        "p_percent": found.p_percent,
        "n_neurons": found.n_neurons,
        "n_removable": found.n_removable,
        "resolved": found.resolved,
        "rise_percent": found.ppl_increase_percent,
        "control_percent": control.get("ppl_increase_percent"),
        "control_sd_percent": control.get("sd_percent"),
        "control_tokens": control.get("n_tokens"),
        "control_ratio": control.get("ratio"),
        "heldout_percent": confirmed.get("ppl_increase_percent"),
        "heldout_low": low,
        "heldout_high": high,
        "verdict": confirmed.get("verdict"),
        "n_holding": holding.get("n_removable"),
        "forward_passes": found.cost["forward_passes"],
    }


if __name__ == "__main__":
    main()
