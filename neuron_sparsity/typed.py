"""Whether a value is of the type it should be: what a function is given, and what `from_json` builds from a file."""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["brief", "checked", "expect", "percents", "said"]

_MADE_BY = {
    "Atlas": "ns.atlas(stats)",
    "AblationResult": "ns.removable_neurons(model, corpus, ranking)",
    "DamageResult": "ns.damage(model, corpus, removed)",
    "NeuronSaliency": "ns.saliency(model, corpus)",
    "NeuronStatistics": "ns.record(model, corpus)",
    "ParetoResult": "ns.pareto(model, corpus)",
    "Ranking": "ns.rank(stats), or ns.rank(ns.saliency(model, corpus)),",
    "SparsityResult": "ns.cett_ppl_sparsity(model, corpus)",
    "StudyConfig": 'ns.load_config("tiny")',
    "StudyResult": "ns.study(config, folder)",
    "TokenActivity": "ns.token_activity(model, corpus, result)",
    "TokenRanking": "ns.rank(model, corpus, per_token=True)",
    "TrajectoryResult": "ns.track(checkpoints, corpus)",
    "Windows": 'ns.load_corpus("sotu", model)',
}


def expect(name: str, value: Any, *kinds: str, instead: str = "") -> None:
    """Refuse an argument that is not of one of these classes, saying what makes one.

    Classes go by name, so that this module, which all others import, knows none of them. A SimpleNamespace may stand in
    for any: whoever puts one together has given it what is read.

    Args:
        name: Of the argument, as the caller wrote it.
        value: What was given.
        kinds: Names of classes; a subclass will do.
        instead: What mends it, if not making one of the first class.

    Raises:
        TypeError: If it is of another class.

    Example:
        >>> expect("config", "tiny", "StudyConfig")
        Traceback (most recent call last):
        TypeError: config must be a StudyConfig, got 'tiny'; ns.load_config("tiny") makes one
    """
    if {kind.__name__ for kind in type(value).__mro__}.isdisjoint((*kinds, "SimpleNamespace")):
        mend = instead or f"{_MADE_BY[kinds[0]]} makes {'windows' if kinds[0] == 'Windows' else 'one'}"
        article = "" if kinds[0] == "Windows" else "an " if kinds[0][0] == "A" else "a "
        raise TypeError(f"{name} must be {article}{' or '.join(kinds)}, got {said(value)}; {mend}")


def percents(values: Any) -> tuple[float, ...]:
    """Return rises of perplexity in percent, given as a list, an array or anything else that yields numbers.

    Raises:
        TypeError: If they are no such thing, or something else is among them.
        ValueError: If there are none, or one is no positive number.

    Example:
        >>> percents([1, 5.0])
        (1.0, 5.0)
    """
    wanted = "p_percents must be several numbers of percent, such as (1.0, 5.0), got"
    try:
        listed = None if isinstance(values, str) else list(values)
    except TypeError:  # one number, an array of no dimension
        listed = None
    if listed is None:
        raise TypeError(f"{wanted} {said(values)}")
    for value in listed:
        if isinstance(value, str | bool) or not hasattr(value, "__float__"):
            raise TypeError(f"{wanted} {said(value)} among them")
    found = tuple(map(float, listed))
    if not found:
        raise ValueError("p_percents is empty; p_percents must hold at least one p, such as (1.0,)")
    for p_percent in found:
        if not (math.isfinite(p_percent) and p_percent > 0):
            raise ValueError(f"p must be a positive number of percent, got {p_percent}")
    return found


def said(value: Any) -> str:
    """Return what was given, for an error: a short text or number as it is, else what it is.

    Example:
        >>> said("sotu"), said(0.5), said(None), said([0.0])
        ("'sotu'", '0.5', 'None', 'list')
    """
    if value is None or isinstance(value, int | float | str):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return value.__qualname__ if isinstance(value, type) else type(value).__name__


def checked(result: Any) -> Any:
    """Return a dataclass that was built from a file, if its fields hold what they are declared to, all the way down.

    Raises:
        TypeError: If a field holds something else.
    """
    for name, hint in get_type_hints(type(result)).items():
        if not _fits(getattr(result, name), hint):
            raise TypeError(f"{name} must be {type(result).__annotations__[name]}, got {brief(getattr(result, name))}")
    return result


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is UnionType:
        return any(_fits(value, choice) for choice in inner)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if not isinstance(value, kind):
        return False
    if kind is dict and inner[1] is not float:  # a number that is infinite is written as null
        return all(_fits(item, inner[1]) for item in value.values())
    if kind is tuple:
        hints = [inner[0]] * len(value) if inner[-1] is ... else inner
        return len(hints) == len(value) and all(map(_fits, value, hints))
    if kind is list:
        return all(_fits(item, inner[0]) for item in value)
    return checked(value) is value if is_dataclass(value) else True


def brief(value: Any) -> str:
    """Return a value as a few characters of an error."""
    text = json.dumps(value, default=lambda other: type(other).__name__)
    return text if len(text) <= 80 else text[:77] + "..."
