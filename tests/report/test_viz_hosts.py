"""ns.viz where it is opened: pages that put outputs in, take them out and change theme as JupyterLab and VS Code do.

Neither has to be installed. What they do to an output was read from their renderers and seen in them (docs/viz.md).
"""

from __future__ import annotations

from typing import Any

import pytest

from neuron_sparsity import viz
from neuron_sparsity.viz import _display
from tests.report.browser import Tab

HOSTS = {
    # Parses an output outside the document, makes its scripts anew, and puts it in: then they run, once.
    "jupyterlab": """window.put = (id, html) => {
        const output = document.createElement("div");
        output.id = id;
        output.innerHTML = html;
        output.querySelectorAll("script").forEach((old) => {
            const script = document.createElement("script");
            for (const { name, value } of old.attributes) script.setAttribute(name, value);
            script.textContent = old.textContent;
            old.replaceWith(script);
        });
        document.body.append(output);
    }""",
    # Puts an output in with its scripts dead, and runs a copy of each at its end, which goes at once.
    "vscode": """window.put = (id, html) => {
        const output = document.createElement("div");
        output.id = id;
        output.innerHTML = html;
        document.body.append(output);
        for (const old of [...output.getElementsByTagName("script")]) {
            const script = document.createElement("script");
            script.text = old.innerText;
            if (old.type) script.setAttribute("type", old.type);
            output.append(script);
            script.remove();
        }
    }""",
}
# What JupyterLab lets through of a notebook that is not trusted.
SANITIZE = """(html) => {
    const output = document.createElement("div");
    output.innerHTML = html;
    output.querySelectorAll("script, style").forEach((element) => element.remove());
    output.querySelectorAll("svg").forEach((element) => element.replaceWith(element.textContent)); // text stays
    output.querySelectorAll("*").forEach((element) => {
        const gone = [...element.attributes].filter(({ name }) => /^(data|aria)-|^(role|hidden)$/.test(name));
        gone.forEach(({ name }) => element.removeAttribute(name));
    });
    document.body.append(output);
}"""
STYLE_SHEETS = (
    "[...document.querySelectorAll('style')].filter((style) => style.textContent.includes('.ns-view')).length"
)
ROUND = "10px"  # the corner of a figure, as the style sheet has it


@pytest.fixture(autouse=True)
def new_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_display, "_PAGE", _display._Page())


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest, tab: Tab) -> Any:
    """A page without outputs, with `put(id, html)`."""
    page = tab.open('<!doctype html><html><head><meta charset="utf-8"></head><body></body></html>')
    page.evaluate(HOSTS[request.param])
    return page


def text(word: str = "a") -> viz.View:
    return viz.text([word, " b"], [[1.0, 2.0], [3.0, -4.0]], labels=["first", "second"], measured="two words")


def put(page: Any, **outputs: str) -> None:
    """Put outputs into the page, one after another."""
    for name, html in outputs.items():
        page.evaluate("([name, html]) => put(name, html)", [name, html])


def corner(page: Any, output: str) -> str:
    return str(page.locator(f"#{output} figure").first.evaluate("(figure) => getComputedStyle(figure).borderRadius"))


def drawn(page: Any, output: str, times: int = 1) -> None:
    from playwright.sync_api import expect

    expect(page.locator(f"#{output} .colored-tokens")).to_have_count(times)


def test_views_stay_as_they_are_when_the_output_with_the_style_sheet_is_cleared(host: Any, run: Any) -> None:
    views = {"map": viz.layer_map(run.stats, run.result), "first": text(), "second": text("c")}
    put(host, **{name: view._repr_html_() for name, view in views.items()})
    drawn(host, "second")
    host.evaluate("document.querySelector('#map').remove(); document.querySelector('#first').replaceChildren()")
    assert corner(host, "second") == ROUND
    put(host, later=text("d")._repr_html_())
    drawn(host, "later")
    assert corner(host, "later") == ROUND


def test_two_notebooks_in_one_page_share_what_they_bring(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = text()._repr_html_()
    monkeypatch.setattr(_display, "_PAGE", _display._Page())
    other = text("c")._repr_html_()
    put_both = "([one, other]) => { put('one', one); put('other', other); }"  # before either has unpacked its bundle
    host.evaluate(put_both, [one, other])
    drawn(host, "one")
    drawn(host, "other")
    assert host.evaluate(STYLE_SHEETS) == 1
    assert host.evaluate("document.head.querySelectorAll('script').length") == 1, "one bundle runs"
    host.evaluate("document.querySelector('#one').remove()")
    assert corner(host, "other") == ROUND
    host.locator("#other").get_by_role("button", name="second").click()
    drawn(host, "other")
    ids = host.evaluate("[...document.querySelectorAll('.widget-view')].map((view) => view.id)")
    assert len(set(ids)) == len(ids)


def test_an_output_that_was_away_while_the_bundle_came_is_drawn_when_it_returns(host: Any) -> None:
    html = text()._repr_html_()
    host.evaluate(
        "(html) => { put('away', html); window.away = document.querySelector('#away'); away.remove(); }", html
    )
    host.wait_for_function("window.CircuitsVis")
    host.evaluate("document.body.append(away)")
    drawn(host, "away")


def test_an_output_comes_back_as_it_left(host: Any, run: Any) -> None:
    put(host, map=viz.layer_map(run.stats, run.result)._repr_html_(), text=text()._repr_html_())
    drawn(host, "text")
    colours = "[...document.querySelectorAll('#text .colored-tokens span')].map((token) => token.style.backgroundColor)"
    first = host.evaluate(colours)
    host.locator("#text").get_by_role("button", name="second").click()
    host.wait_for_function(f"(first) => String({colours}) !== String(first)", arg=first)
    second = host.evaluate(colours)
    host.evaluate("window.gone = [...document.body.children]; document.body.replaceChildren()")
    host.evaluate("document.body.append(...gone)")
    drawn(host, "text")
    assert host.evaluate(colours) == second
    host.locator("#text").get_by_role("button", name="first").click()
    host.wait_for_function(f"(first) => String({colours}) === String(first)", arg=first)
    host.locator("#map .field").first.focus()
    assert "layer 0, neuron" in host.locator("#map .readout").first.inner_text()


def test_views_follow_the_theme_of_their_host(host: Any) -> None:
    themes = [
        ("document.body.className = 'vscode-dark'", "dark"),
        ("document.body.className = 'vscode-light'", "light"),
        ("document.body.className = 'vscode-high-contrast'", "dark"),
        ("document.body.className = 'vscode-high-contrast vscode-high-contrast-light'", "light"),
        ("document.body.dataset.jpThemeLight = 'false'", "dark"),
        ("document.body.dataset.jpThemeLight = 'true'", "light"),
    ]
    host.evaluate(themes[0][0])
    put(host, view=viz.histogram([1.0, 2.0, 2.5], quantity="a value", measured="three numbers")._repr_html_())
    view = host.locator("#view .ns-view")
    inks = {"light": "rgb(28, 33, 38)", "dark": "rgb(230, 232, 234)"}
    for said, theme in themes:
        host.evaluate(said)
        host.wait_for_function("(theme) => document.querySelector('.ns-view').dataset.theme === theme", arg=theme)
        assert view.evaluate("(view) => getComputedStyle(view).color") == inks[theme]


def test_drawings_stand_in_their_line(host: Any, run: Any) -> None:
    put(host, view=viz.cett_curves(run.result)._repr_html_())
    assert host.locator("#view svg.chart").bounding_box()["width"] > 500
    assert host.locator("#view svg.chart text").first.is_visible()


def test_a_notebook_that_is_not_trusted_stands_beside_one_that_is(host: Any, run: Any) -> None:
    views = [text("untrusted"), viz.cett_curves(run.result)]
    for html in [view._repr_html_() for view in views]:
        host.evaluate(SANITIZE, html)
    hints = host.locator(".plain")
    assert [hints.nth(place).is_visible() for place in range(2)] == [True, True]
    assert "·b" in host.locator(".widget").first.inner_text(), "the text is there"
    said = host.locator(".ns-view").nth(1).inner_text()
    assert "CETT of each layer" in said
    assert "activation ratio of the layer" not in said, "nor are the labels of a drawing that is not"
    put(host, trusted=viz.assets()._repr_html_() + text()._repr_html_())
    drawn(host, "trusted")
    hint = host.locator("#trusted .plain")
    assert not hint.is_visible()
    assert hints.first.is_visible()
