"""How a run was measured: the definitions behind its numbers, the corpus, the model, cost, versions, command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from neuron_sparsity.report._fragments import figure, pairs
from neuron_sparsity.report._text import count, duration, join, plain, visible

if TYPE_CHECKING:
    from neuron_sparsity.ablation import AblationResult
    from neuron_sparsity.recorder import NeuronStatistics
    from neuron_sparsity.sparsity import SparsityResult

__all__ = ["definitions", "measured"]

_DEFINITIONS = (
    ("Post-activation z", "What enters the down projection: act(gate) × up in a gated MLP, act(in) in a plain one."),
    (
        "Contribution",
        "|z| × ‖W_out‖, the norm of what a neuron adds to the residual stream. The output bias belongs to no neuron.",
    ),
    (
        "CETT",
        "Cumulative error of tail truncation: the norm of what all neurons below a threshold add together, over the "
        "norm of the MLP's output, averaged over tokens. One threshold a layer, one CETT for all layers.",
    ),
    (
        "Active",
        "Contribution at or above the layer's threshold. Activation ratio: active (token, neuron) pairs over all "
        "pairs, per layer, then the mean over layers. Sparsity ratio: 1 − activation ratio.",
    ),
    (
        "CETT-PPL-p%",
        "The CETT at which truncating all layers at once raises perplexity by p percent (Sparsing Law, arXiv "
        "2411.02335; called PPL-p% in its first version).",
    ),
    (
        "CETT-KL-p%",
        "The CETT at which the mean KL divergence from the dense to the truncated next-token distribution is "
        "log(1 + p/100): what perplexity would rise by on text drawn from the model itself. Known several times better "
        "from the same text.",
    ),
    (
        "Interval",
        "95 %, by paired bootstrap over windows of the differences truncated minus dense: how the activation ratio "
        "would vary with other text of this kind. It says nothing of text of another kind.",
    ),
    (
        "Removable",
        "The largest set found of neurons, in the order of a ranking, that can be replaced on every token before "
        "perplexity rises by p percent. Idle neurons change from token to token; removed ones are gone.",
    ),
    (
        "Dead",
        "Active on under 0.1 % of tokens; of them, never active at all. Both depend on the corpus and on N tokens: a "
        "zero count bounds the frequency by 3/N (95 %).",
    ),
    ("Perplexity", "exp of the mean next-token loss over the scored positions of fixed windows."),
)


def definitions() -> str:
    """Return the definitions every number of the page rests on."""
    return figure("Definitions", pairs(_DEFINITIONS), wide=True)


def measured(
    stats: NeuronStatistics, result: SparsityResult | None = None, removed: AblationResult | None = None
) -> str:
    """Return model, corpora, cost, versions, seed and command of a run."""
    parts = [figure("Model", pairs(_model(stats.model)))]
    runs = [("sparsity search", result), ("ablation", removed)]
    items: list[tuple[str, str]] = []
    for name, run in runs:
        if run is not None and run.cost:
            passes = plain(round(run.cost.get("forward_passes", math.nan), 1))
            spent = f"{passes} forward passes of the corpus, {duration(run.cost.get('seconds'))}"
            items.append((f"Cost of the {name}", spent))
    provenance = [dict(run.provenance) for _, run in runs if run is not None and run.provenance]
    items += _provenance(provenance)
    if items:
        parts.append(figure("Run", pairs(items)))
    parts.append(figure("Corpus", pairs(_corpora(stats, result, removed)), wide=True))
    return join(parts)


def _model(model: Any) -> list[tuple[str, str]]:
    gate = "gated" if model.gated else "plain"
    total = f"{model.n_layers} layers × {count(model.d_mlp)} = {count(model.n_layers * model.d_mlp)}"
    items = [
        ("Name", visible(model.name)),
        ("MLP neurons", total),
        ("Residual stream", f"d_model {count(model.d_model)}"),
        ("Activation", f"{visible(model.activation)}, {gate}"),
    ]
    for term, attribute in (("Precision", "dtype"), ("Weights", "weights"), ("Fingerprint", "fingerprint")):
        value = getattr(model, attribute, None)
        if value:
            items.append((term, visible(value)))
    return items


def _corpus(corpus: Mapping[str, Any]) -> Markup:
    tokens, scored = count(corpus.get("n_tokens")), count(corpus.get("scored_tokens"))
    head = f"{visible(corpus.get('name', '?'))}: {tokens} tokens, {scored} scored"
    bos = "with" if corpus.get("bos") else "without"
    window = f"{count(corpus.get('n_windows'))} windows of {count(corpus.get('window'))}, {bos} BOS"
    if corpus.get("packing"):
        window += f", documents {visible(corpus['packing'])}"
    if corpus.get("stride") is not None:
        window += f", stride {visible(corpus['stride'])}"
    if corpus.get("sampling"):
        window += f"; {visible(corpus['sampling'])}"
    return Markup("{}; {}; sha256 <code>{}</code>").format(head, window, visible(corpus.get("sha256", "?")))


def _corpora(
    stats: NeuronStatistics, result: SparsityResult | None, removed: AblationResult | None
) -> list[tuple[str, str]]:
    found = [("Statistics", stats.corpus)]
    if result is not None:
        found.append(("Sparsity search", result.corpus))
        if result.calibration is not None:
            found.append(("Thresholds", result.calibration))
    if removed is not None:
        ranked_on = {key: value for key, value in removed.ranking_corpus.items() if key != "unseen_in_search"}
        found += [("Ablation", removed.corpus), ("Ranking", ranked_on)]
        if removed.heldout and removed.heldout.get("corpus"):
            found.append(("Held-out check", removed.heldout["corpus"]))
    merged: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for use, corpus in found:
        merged.setdefault(repr(sorted(corpus.items(), key=str)), ([], corpus))[0].append(use)
    return [(", ".join(uses), _corpus(corpus)) for uses, corpus in merged.values()]


def _provenance(provenance: list[dict[str, Any]]) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    versions: dict[str, str] = {}
    for entry in provenance:
        versions.update({str(name): str(version) for name, version in (entry.get("versions") or {}).items()})
    if versions:
        items.append(
            ("Versions", ", ".join(f"{visible(name)} {visible(version)}" for name, version in sorted(versions.items())))
        )
    for term, key in (("Seed", "seed"), ("Device", "device"), ("Backend", "backend"), ("Command", "command")):
        values = list(dict.fromkeys(str(entry[key]) for entry in provenance if entry.get(key) is not None))
        if values:
            shape = Markup("<code>{}</code>") if key == "command" else Markup("{}")
            items.append((term, join((shape.format(visible(value)) for value in values), Markup("<br>"))))
    return items
