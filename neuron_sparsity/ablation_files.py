"""The removals of a run folder: `ablation.json` for the first p of a search, `ablation-p<p>.json` for each other one.

A later search with fewer p leaves files of an earlier one behind. Those that answer another question than
`ablation.json`, with another ranking, replacement, text or model, belong to another search, and are not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_sparsity.ablation import AblationResult
from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.store import RunFolder, blaming, read_json
from neuron_sparsity.typed import checked

__all__ = ["KeptRemovals", "answers", "file_names", "kept_removals", "removal_at"]

_FIRST = "ablation.json"
_NAMED: dict[str, Callable[[AblationResult], str]] = {
    "ranking": lambda removed: removed.ranking,
    "scope": lambda removed: removed.scope,
    "replacement": lambda removed: removed.replacement,
}
_HASHED: dict[str, Callable[[AblationResult], Any]] = {
    "model": lambda removed: (removed.model.fingerprint, removed.model.dtype),
    "text": lambda removed: removed.corpus["sha256"],
    "text of the ranking": lambda removed: removed.ranking_corpus["sha256"],
    "order of removal": lambda removed: removed.ranking_sha256,
    "seed": lambda removed: removed.provenance["seed"] if removed.replacement == "resample" else None,
}


@dataclass(frozen=True)
class KeptRemovals:
    """What a folder holds of one search.

    Attributes:
        first: What `ablation.json` holds; None if it is not there.
        at: Every removal of this search by its p, ascending; the first among them.
        left_out: Other files, by name, and why each is not taken.
    """

    first: AblationResult | None
    at: dict[float, AblationResult]
    left_out: dict[str, str]


def file_names(p_percents: Sequence[float]) -> list[str]:
    """Return the file of each p of a search.

    Example:
        >>> file_names((1, 5, 0.5))
        ['ablation.json', 'ablation-p5.json', 'ablation-p0.5.json']
    """
    return [_FIRST, *(_name(p) for p in p_percents[1:])]


def kept_removals(folder: RunFolder) -> KeptRemovals:
    """Return the removals that a run folder holds of the search that wrote its `ablation.json`.

    Raises:
        RunFolderError: If a file is damaged or newer.
    """
    first = _read(folder, _FIRST) if folder.has(_FIRST) else None
    found = {} if first is None else {first.p_percent: first}
    left_out: dict[str, str] = {}
    for path in sorted(folder.path.glob("ablation-p*.json")):
        other = _read(folder, path.name)
        with blaming(path):
            why = f"no {_FIRST} beside it" if first is None else _apart(other, first)
        if not why and other.p_percent in found:
            why = f"the same p as {_FIRST}"
        if why:
            left_out[path.name] = why
        else:
            found[other.p_percent] = other
    return KeptRemovals(first, dict(sorted(found.items())), left_out)


def removal_at(folder: RunFolder, p_percent: float | None = None) -> AblationResult:
    """Return the removal that a run folder holds at a p; that of `ablation.json` if None.

    Raises:
        RunFolderError: If there is none, with those that there are, or a file is damaged or newer.
    """
    if p_percent is None and folder.has(_FIRST):
        return _read(folder, _FIRST)
    kept = kept_removals(folder)
    if kept.first is None:
        raise RunFolderError(f"{folder.path} has no {_FIRST}; `neuron-sparsity ablate` makes it")
    assert p_percent is not None
    if p_percent in kept.at:
        return kept.at[p_percent]
    mend = f"`neuron-sparsity ablate --p {kept.first.p_percent:g} --p {p_percent:g}` finds several"
    name = _name(p_percent)
    if name in kept.left_out:
        raise RunFolderError(f"{folder.file(name)} was left by another search ({kept.left_out[name]}); {mend}")
    known = " and ".join(f"{p:g}" for p in kept.at)
    raise RunFolderError(f"{folder.path} has no removal at {p_percent:g} %, but at {known} %; {mend}")


def answers(asked: tuple[Any, ...], n_controls: int, removed: AblationResult) -> bool:
    """Whether a removal answers what is asked, with as many controls (files of the first version have one).

    Args:
        asked: p, ranking, replacement, scope, seed, and the hashes of the text and of that of the ranking.
        n_controls: How many controls it should have, unless nothing can go.
        removed: What a file holds.
    """
    made = 0 if removed.control is None else len(removed.control.get("seeds", [0]))
    own = (removed.p_percent, removed.ranking, removed.replacement, removed.scope, removed.provenance["seed"])
    same = (*own, removed.corpus["sha256"], removed.ranking_corpus["sha256"]) == asked
    return same and (removed.n_removable == 0 or made == n_controls)


def _name(p_percent: float) -> str:
    return f"ablation-p{p_percent:g}.json"


def _read(folder: RunFolder, name: str) -> AblationResult:
    path = folder.file(name)
    data = read_json(path)
    with blaming(path):
        found: AblationResult = checked(AblationResult.from_json(data))
    return found


def _apart(other: AblationResult, first: AblationResult) -> str:
    """Say in what a removal answers another question than the first; nothing where it is the same."""
    for what, part in _NAMED.items():
        if part(other) != part(first):
            return f"{what} {part(other)}, not {part(first)}"
    return next((f"another {what}" for what, part in _HASHED.items() if part(other) != part(first)), "")
