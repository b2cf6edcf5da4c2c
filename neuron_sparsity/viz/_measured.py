"""What stands over every view: on what it was measured. And the way to the figures, which need matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from neuron_sparsity.report._text import count

__all__ = ["figures", "on"]


def on(model: Any, corpus: Mapping[str, Any], definition: str = "", index: str = "") -> str:
    """Return model, corpus and tokens in one line, with what was counted; `index` names an entry put after it.

    Example:
        >>> from types import SimpleNamespace
        >>> on(SimpleNamespace(name="tiny"), {"name": "letters", "n_tokens": 2048, "window": 128}, "active: c > 0")
        'tiny on letters, 2,048 tokens in windows of 128; active: c > 0'
    """
    name = f"{model.name} on " if model is not None else ""
    where = f"{corpus.get('name', 'a text without a name')}, {count(corpus.get('n_tokens'))} tokens"
    if corpus.get("window"):
        where += f" in windows of {count(corpus['window'])}"
    said = f"{name}{where}; {definition}" if definition else f"{name}{where}"
    return f"{said} {corpus[index]}" if index and index in corpus else said


def figures() -> Any:
    """Return the module that draws.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        return importlib.import_module("neuron_sparsity.viz._figures")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "figures are drawn by matplotlib, which is not installed: pip install matplotlib; "
            "the view itself and .save('view.html') do without",
            name="matplotlib",
        ) from error
