"""ns.viz where it is looked at: in a notebook exported to HTML, and in a real browser without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_sparsity import viz
from neuron_sparsity.viz import _display

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
BUNDLE = "DecompressionStream"  # once a notebook, packed
ATTACK = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


@pytest.fixture(autouse=True)
def new_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_display, "_PAGE", _display._Page())


def visit(html: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """Return the document after its scripts have run, what the console said, and what was asked of a network."""
    page, net = folder / "page.html", folder / "net.json"
    page.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=4000",
        "--enable-logging=stderr", "--enable-unsafe-swiftshader",  # the bundle looks for WebGL, which warns without it
        "--disable-background-networking", "--disable-component-update",
        f"--log-net-log={net}", f"--user-data-dir={folder / 'profile'}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    console = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    log = net.read_text(encoding="utf-8", errors="replace")
    asked = re.findall(r'"url":"((?:https?|wss?)://[^"]*)"', log)
    return done.stdout.decode("utf-8"), console, [url for url in asked if not _of_the_browser(url)]


def _of_the_browser(url: str) -> bool:
    """Chromium looks for updates of its own."""
    return re.match(r"https?://[a-z0-9.-]*\.?(google|googleapis|gstatic|gvt1)\.com[:/]", url) is not None


def notebook_like(run: Any, word: str = " peace") -> str:
    """A document of outputs, as a notebook has them."""
    tokens = [word] * 6
    views = [
        viz.layer_map(run.stats, run.result),
        viz.text(tokens, np.arange(18.0).reshape(6, 3) - 6, labels=[f"L0 {word}", "b", "c"], measured=word),
        viz.examples(run.stats, (1, 7)),
        viz.token_activity(run.passage),
    ]
    outputs = "".join(f'<div class="output">{view._repr_html_()}</div>' for view in views)
    head = '<!doctype html><html><head><meta charset="utf-8"><title>Untouched</title></head>'
    return f'{head}<body data-jp-theme-light="false"><h1>A notebook</h1>{outputs}</body></html>'


@browser
def test_the_probes_notice_an_error_and_a_request(tmp_path: Path) -> None:
    html = "<script>console.error('planted');fetch('http://planted.invalid/x')</script>"
    _, console, asked = visit(html, tmp_path)
    assert any("planted" in line for line in console)
    assert any("planted.invalid" in url for url in asked)


@browser
def test_every_output_of_a_notebook_is_drawn_offline(run: Any, tmp_path: Path) -> None:
    html = notebook_like(run)
    assert html.count(BUNDLE) == 1
    shown, console, asked = visit(html, tmp_path)
    assert console == []
    assert asked == []
    widgets = html.count('class="widget"')
    assert widgets == 7
    assert shown.count('class="colored-tokens"') == widgets
    assert len(re.findall(r'data-connected="yes"', shown)) == widgets + 3
    assert len(re.findall(r"<output[^>]*>Hover over the map", shown)) == 3
    assert shown.count('class="ns-view" data-theme="dark"') == 4, "the notebook is dark"
    ids = re.findall(r'id="circuits-vis-\d+"', shown)
    assert len(set(ids)) == len(ids) == widgets


@browser
def test_a_saved_page_is_drawn_offline(run: Any, tmp_path: Path) -> None:
    view = viz.text(["a", " b"], [[1.0, 2.0], [3.0, -4.0]], labels=["first", "second"])
    shown, console, asked = visit(view.page(), tmp_path)
    assert (console, asked) == ([], [])
    assert shown.count('class="colored-tokens"') == 1
    assert ">first<" in shown
    assert 'role="button"' in shown


@browser
def test_hostile_text_runs_nothing(run: Any, tmp_path: Path) -> None:
    run.stats.token_strings = dict.fromkeys(run.stats.token_strings, ATTACK)
    run.passage.token_strings = [ATTACK] * len(run.passage.token_strings)
    run.stats.model.name = ATTACK
    shown, console, asked = visit(notebook_like(run, ATTACK), tmp_path)
    assert "<title>Untouched</title>" in shown
    assert not re.search(r"<img[^>]*onerror", shown)
    assert (console, asked) == ([], [])
    assert "&lt;/script&gt;&lt;img·src=x·onerror=document.title='owned'&gt;" in shown.replace("\u2060", "")


@browser
def test_outputs_before_the_bundle_are_drawn_when_it_comes(run: Any, tmp_path: Path) -> None:
    """A notebook may put its outputs into the page in any order."""
    first, second = (viz.examples(run.stats, neuron)._repr_html_() for neuron in ((1, 7), (2, 3)))
    assert BUNDLE not in second
    shown, console, _ = visit(f"<!doctype html><meta charset=utf-8><body>{second}{first}", tmp_path)
    assert console == []
    assert shown.count('class="colored-tokens"') == 10


CELLS = [
    "import neuron_sparsity as ns\nfrom pathlib import Path",
    "ns.viz.text(['a', ' b'], [[1.0], [-2.0]], measured='two words')",
    "ns.viz.text(['c', ' d'], [[1.0], [-2.0]], measured='two more')",
    "ns.viz.text(['c', ' d'], [[1.0], [-2.0]]).figure()",
]


def test_an_exported_notebook_has_the_bundle_once(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell["outputs"][0]["data"] for cell in notebook.cells[1:]]
    assert ["text/html" in data for data in outputs] == [True, True, False]
    assert "image/png" in outputs[2], "a figure is shown without pyplot"
    assert json.dumps(outputs).count(BUNDLE) == 1
    nbconvert = pytest.importorskip("nbconvert")
    html, _ = nbconvert.HTMLExporter(embed_images=True).from_notebook_node(notebook)
    assert html.count(BUNDLE) == 1
    assert html.count('class="ns-view"') == 2
