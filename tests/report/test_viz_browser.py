"""ns.viz in a real browser: outputs of a notebook and saved pages are drawn, and ask for nothing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from neuron_sparsity import viz
from neuron_sparsity.viz import _display
from tests.report.browser import Tab
from tests.report.test_browser import ATTACK

BUNDLE = "DecompressionStream"  # once a notebook, packed


@pytest.fixture(autouse=True)
def new_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_display, "_PAGE", _display._Page())


def drawn(tab: Tab, html: str, widgets: int) -> str:
    """Return the document once that many widgets are drawn."""
    from playwright.sync_api import expect

    page = tab.open(html)
    expect(page.locator(".colored-tokens")).to_have_count(widgets)
    return page.content()


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


def test_every_output_of_a_notebook_is_drawn_offline(tab: Tab, run: Any) -> None:
    html = notebook_like(run)
    assert html.count(BUNDLE) == 1
    widgets = html.count('class="widget"')
    assert widgets == 7
    shown = drawn(tab, html, widgets)
    assert len(re.findall(r'data-connected="yes"', shown)) == widgets + 3
    assert len(re.findall(r"<output[^>]*>Hover over the map", shown)) == 3
    assert shown.count('class="ns-view" data-theme="dark"') == 4, "the notebook is dark"
    ids = re.findall(r'id="circuits-vis-\d+"', shown)
    assert len(set(ids)) == len(ids) == widgets


def test_a_saved_page_is_drawn_offline(tab: Tab) -> None:
    view = viz.text(["a", " b"], [[1.0, 2.0], [3.0, -4.0]], labels=["first", "second"])
    shown = drawn(tab, view.page(), 1)
    assert ">first<" in shown
    assert 'role="button"' in shown


def test_hostile_text_runs_nothing(tab: Tab, run: Any) -> None:
    run.stats.token_strings = dict.fromkeys(run.stats.token_strings, ATTACK)
    run.passage.token_strings = [ATTACK] * len(run.passage.token_strings)
    run.stats.model.name = ATTACK
    shown = drawn(tab, notebook_like(run, ATTACK), 7)
    assert "<title>Untouched</title>" in shown
    assert not re.search(r"<img[^>]*onerror", shown)
    assert "&lt;/script&gt;&lt;img·src=x·onerror=document.title='owned'&gt;" in shown.replace("\u2060", "")


def test_outputs_before_the_bundle_are_drawn_when_it_comes(tab: Tab, run: Any) -> None:
    """A notebook may put its outputs into the page in any order."""
    first, second = (viz.examples(run.stats, neuron)._repr_html_() for neuron in ((1, 7), (2, 3)))
    assert BUNDLE not in second
    drawn(tab, f"<!doctype html><meta charset=utf-8><body>{second}{first}", 10)
