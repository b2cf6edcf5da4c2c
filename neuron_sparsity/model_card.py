"""The model card of a pruned checkpoint: what was removed, on what that was measured, and with which versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, neuron-sparsity]
---
"""
_FORMS = {
    "cut": "their rows and columns are gone",
    "padded": "rows and columns are gone down to one width for all layers; the rest of them are zeros",
    "zeroed": "the shapes are as they were; zeros stand in the place of what went",
}


def model_card(record: Mapping[str, Any]) -> str:
    """Return the card of a checkpoint as Markdown.

    Args:
        record: What `pruning.json` says.
    """
    source, n_gone = record["source"], len(record["neurons"])
    name = _quoted(source["name"])
    sections = [
        f"# {name} without {n_gone:,} of its {record['n_neurons']:,} MLP neurons",
        f"{name} ({source['architecture']}) was pruned by neuron_sparsity, for every token and every text. Each "
        f"neuron's post-activation is replaced by {_replacement(record['replacement'])}; in the weights, "
        f"{_FORMS[record['form']]} ({record['reason']}). `pruning.json` names every neuron.",
        _table(
            ("parameters", "number"),
            [
                ("before", record["n_parameters_before"]),
                ("gone", record["n_parameters_removed"]),
                ("new biases", record["n_parameters_added"]),
                ("now", record["n_parameters"]),
                ("of these zero in the place of what went", record["n_parameters_zeroed"]),
            ],
        ),
        "## What it costs",
        *_cost(record["measured"]),
        "## Use",
        '`AutoModelForCausalLM.from_pretrained("FOLDER")` of transformers loads it; no other code is needed. The '
        "licence is that of the model it was made of.",
        "## Made with",
        ", ".join(f"{package} {version}" for package, version in record["provenance"]["versions"].items()) + ".",
    ]
    return _HEAD + "\n" + "\n\n".join(sections) + "\n"


def _cost(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return ["Not measured: the neurons were named one by one."]
    corpus, heldout, control = measured["corpus"], measured["heldout"], measured["control"]
    rows = [(_text(corpus), f"{measured['ppl_dense']:.4g}", _rise(measured))]
    if heldout is not None and heldout.get("chosen_on"):
        chosen = (
            f"The weakest neurons by {measured['ranking']} (scope {measured['scope']}), as many as were found to hold "
            f"at {measured['p_percent']:g} % on held-out text. They were chosen on this text, and measured on no other:"
        )
        return [chosen, _table(("text", "perplexity before", "rise"), rows)]
    if heldout is not None:
        rows.append((f"held out: {_text(heldout['corpus'])}", f"{heldout['ppl_dense']:.4g}", _rise(heldout)))
    said = [
        f"The weakest neurons by {measured['ranking']} (scope {measured['scope']}), as many as may go before "
        f"perplexity rises by {measured['p_percent']:g} %.",
        _table(("text", "perplexity before", "rise"), rows),
    ]
    if heldout is not None:
        verdict = "holds" if heldout["holds"] else "does not hold"
        said.append(f"On the held-out text, which the search never saw, {measured['p_percent']:g} % {verdict}.")
    if control is not None:
        said.append(f"As many random neurons of every layer cost {_rise(control)}.")
    return [*said, "What the removed neurons do on other text was not measured."]


def _text(corpus: Mapping[str, Any]) -> str:
    return f"{_quoted(corpus['name'])}, {corpus['n_tokens']:,} tokens in windows of {corpus['window']}"


def _rise(measured: Mapping[str, Any]) -> str:
    return f"{measured['ppl_increase_percent']:+.3f} %"


def _replacement(name: str) -> str:
    return "its mean, folded into the bias" if name == "mean" else "zero"


def _quoted(name: str) -> str:
    """A name as code: nothing in it is markup."""
    return f"`{' '.join(name.split()).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    shown = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
