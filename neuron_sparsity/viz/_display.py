"""What a view returns: shown by Jupyter, VS Code and exported HTML without a network, saved as a page or as a figure.

A notebook is one document. The style sheet, the script and the CircuitsVis bundle (1.3 MB, 0.5 as it is packed here) go
into it once, with the first output that needs them; a cell that carried them carries them again when it runs again,
because its old output is gone. That is the only thing this module remembers: it decides what an output weighs, never
what it says. In Colab each output is a document of its own, and carries its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from neuron_sparsity.report import views
from neuron_sparsity.report._text import join, visible
from neuron_sparsity.store import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Assets", "View", "assets"]

_CONNECT = """document.querySelectorAll(".ns-view .drawing").forEach((drawing) => drawing.removeAttribute("style"));
window.neuronSparsity && window.neuronSparsity();"""
_UNPACK = """(async () => {
  if (window.CircuitsVis) return;
  const packed = Uint8Array.from(atob("%s"), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  if (window.CircuitsVis) return; // two notebooks of one page unpack side by side
  document.head.append(script);
  window.neuronSparsity();
})();"""
# Jupyter floats lists of terms and stripes tables.
_RESET = """&.ns-view :is(dt, dd) { float: none; width: auto; padding: 0; }
&.ns-view tbody tr:nth-child(n) { background: none; }
&[data-theme] > .plain { display: none; }
&[data-theme] .drawing { display: contents !important; }"""
_NO_MATH = "tex2jax_ignore mathjax_ignore"  # JupyterLab typesets what stands between two dollars
# What a host that trusts nothing lets through has no style sheet, no scripts, no data attributes, and of a drawing its
# labels only, run together: they stay hidden, and what to do is said.
_PLAIN = (
    '<p class="plain">Without its style sheet, scripts and curves, because the notebook is not trusted here. If you '
    "trust it, say so (JupyterLab: Trust Notebook in the command palette; VS Code: trust the folder), or run its "
    "cells. If it is trusted, <code>ns.viz.assets()</code> in a cell of its own mends this.</p>"
)
_DRAWING = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
_FIGURES = ("svg", "png", "pdf")


@dataclass(frozen=True)
class View:
    """One view of a result. A notebook shows it; every number in it says what it was measured on.

    Attributes:
        title: What is shown.
        measured: On what: model, corpus, tokens, definition.
        fragment: The markup, without style sheet and scripts.
    """

    title: str
    measured: str
    fragment: str = field(repr=False)
    _draw: Callable[[], Figure] = field(repr=False)

    def figure(self) -> Figure:
        """Return the view as a matplotlib figure, for a paper: the same data, without scripts.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._draw()

    def save(self, path: str | Path, *, dpi: int = 200) -> Path:
        """Write the view to a file and return its path: `.html` is one page that opens offline, the others a figure.

        Args:
            path: Ends in `.html`, `.svg`, `.png` or `.pdf`.
            dpi: Of a PNG.

        Raises:
            ModuleNotFoundError: If a figure is asked for and matplotlib is not installed.
            RunFolderError: If the file cannot be written.
            ValueError: If the path ends otherwise.
        """
        path = Path(path)
        kind = path.suffix.lower().removeprefix(".")
        if kind in ("html", "htm"):
            data = self.page().encode("utf-8")
        elif kind in _FIGURES:
            buffer = io.BytesIO()
            self.figure().savefig(buffer, format=kind, dpi=dpi)
            data = buffer.getvalue()
        else:
            raise ValueError(f"a view is saved as .html, .svg, .png or .pdf, got {path.name!r}")
        write_bytes(path, data)
        return path

    def page(self) -> str:
        """Return the view as a document of its own, which forbids every request and every script but its own."""
        used = _scripts(bundle="data-widget=" in self.fragment)
        hashes = " ".join(f"'sha256-{_digest(source)}'" for source in used)
        policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
        shape = Markup(
            '<!doctype html>\n<html lang="en" data-theme="auto">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="{}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{}</title>\n'
            "<style>{}</style>\n</head>\n<body>\n{}\n{}</body>\n</html>\n"
        )
        scripts = join(Markup("<script>{}</script>\n").format(Markup(source)) for source in used)
        return str(shape.format(policy, visible(self.title), Markup(_style()), self._body(), scripts))

    def _body(self) -> Markup:
        layout = "display:grid;grid-template-columns:minmax(0,1fr);gap:.8rem;overflow-wrap:break-word"
        shape = Markup('<div class="fragment {}" style="{}"><p class="measured">{}</p>{}</div>')
        return shape.format(_NO_MATH, layout, visible(self.measured), Markup(self.fragment))

    def _repr_html_(self) -> str:
        """Return the view for a notebook, with what its page does not have yet."""
        carried = _PAGE.carried(bundle="data-widget=" in self.fragment)
        body = _DRAWING.sub(r'<span class="drawing" style="display:none">\g<0></span>', str(self._body()))
        shape = Markup('{}<div class="ns-view" data-theme="auto">{}{}</div><script>{}</script>')
        return str(shape.format(Markup(carried), Markup(_PLAIN), Markup(body), Markup(_CONNECT)))


@dataclass(frozen=True)
class Assets:
    """The style sheet and scripts of all views, to stand in a cell of their own."""

    def _repr_html_(self) -> str:
        return _PAGE.carried(bundle=True, again=True) + f"<script>{_CONNECT}</script>"


def assets() -> Assets:
    """Return what views need once a notebook, for a cell of its own.

    The first view that is shown brings it along. A cell with `ns.viz.assets()` is for a notebook whose first view was
    deleted, or moves from cell to cell: where it is missing, texts stand without colours and maps without a read-out.
    """
    return Assets()


class _Page:
    """Which output of this session's notebook carries which part."""

    def __init__(self) -> None:
        self.carriers: dict[str, tuple[str | None, str | None]] = {}

    def carried(self, *, bundle: bool, again: bool = False) -> str:
        """Return the parts that the next output has to bring, and note that it does."""
        parts = {"base": _base, "bundle": _packed_bundle}
        wanted = parts if bundle else ["base"]
        missing = [name for name in wanted if again or self._missing(name)]
        self.carriers |= dict.fromkeys(missing, _cell())
        return "".join(parts[name]() for name in missing)

    def _missing(self, name: str) -> bool:
        if name not in self.carriers or "google.colab" in sys.modules:
            return True
        (carrier, run), (cell, this_run) = self.carriers[name], _cell()
        return carrier is not None and carrier == cell and run != this_run


_PAGE = _Page()


def _cell() -> tuple[str | None, str | None]:
    """Return the cell that is running and this run of it, as far as the notebook says; JupyterLab and VS Code do."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    parent: dict[str, Any] = getattr(shell, "get_parent", dict)() or {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")


def _scripts(*, bundle: bool) -> list[str]:
    circuitsvis, boot = views.scripts()
    return [circuitsvis, boot] if bundle else [boot]


@lru_cache(maxsize=1)
def _base() -> str:
    return f"<style>{_scoped(_style())}</style><script>{views.scripts()[1]}</script>"


@lru_cache(maxsize=1)
def _packed_bundle() -> str:
    packed = gzip.compress(views.scripts()[0].encode("utf-8"), 9, mtime=0)
    return f"<script>{_UNPACK % base64.b64encode(packed).decode('ascii')}</script>"


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")


@lru_cache(maxsize=1)
def _style() -> str:
    return (Path(views.__file__).parent / "assets" / "style.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _scoped(css: str) -> str:
    """Return the style sheet of the page for elements inside a view only: a notebook has styles of its own.

    Rules are nested (CSS Nesting, in every browser since 2023); those of the document become the view's.
    """
    css = re.sub(r":root\b", "&", css)
    css = re.sub(r"^(\s*)(?:html|body)(?=[\s,{])", r"\1&", css, flags=re.MULTILINE)
    return f".ns-view {{\n{css}\n{_RESET}\n}}"
