"""Whether what was built from a file is of the types it declares: `from_json` takes whatever a file says."""

from __future__ import annotations

import json
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["brief", "checked"]


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
