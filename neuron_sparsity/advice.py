"""What errors about a run folder say: which step writes a file, and in what two requests differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neuron_sparsity.typed import brief

__all__ = ["difference", "writer"]

_WRITERS = {
    "ablation.json": "ablate",
    "atlas.parquet": "atlas",
    "damage.json": "damage",
    "damage.safetensors": "damage",
    "downstream.json": "evaluate",
    "pareto.json": "pareto",
    "passage.json": "report",
    "saliency.safetensors": "ablate",
    "sparsity.json": "sparsity",
    "statistics.safetensors": "record",
    "study.json": "study",
    "trajectory.json": "track",
}
_MOST_CHARACTERS = 200


def writer(name: str) -> str:
    """Return which command writes a file of a run folder, in brackets after a blank; nothing if none is known.

    Example:
        >>> writer("sparsity.json"), writer("notes.txt")
        (' (`neuron-sparsity sparsity` writes it)', '')
    """
    return f" (`neuron-sparsity {_WRITERS[name]}` writes it)" if name in _WRITERS else ""


def difference(found: Any, wanted: Any, name: str) -> str:
    """Return in what two values differ, key by key where they are mappings, in a line that is not too long.

    A hash comes last: it tells that something differs, and not what.

    Example:
        >>> difference({"sha256": "70ea", "n_tokens": 64}, {"sha256": "b1", "n_tokens": 32}, "corpus")
        'corpus.n_tokens: 64, not 32; corpus.sha256: "70ea", not "b1"'
    """
    apart = sorted(_apart(found, wanted, name), key=lambda pair: "sha256" in pair[0])
    lines = [f"{where}: {what}" for where, what in apart]
    kept = [line for place, line in enumerate(lines) if sum(map(len, lines[: place + 1])) <= _MOST_CHARACTERS]
    return "; ".join(kept or lines[:1])


def _apart(found: Any, wanted: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in dict.fromkeys((*wanted, *found)):
            yield from _apart(found.get(key), wanted.get(key), f"{name}.{key}")
    elif found != wanted:
        yield name, f"{brief(found)}, not {brief(wanted)}"
