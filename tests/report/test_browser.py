"""In a real browser: the widgets render, hostile text stays text, and nothing runs or is asked for that should not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.report import compare, report
from tests.report.browser import Tab
from tests.report.conftest import make_run

ATTACK = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
WIDTHS = pytest.mark.parametrize("width", [1280, 400])
POLICIES = pytest.mark.parametrize("policy", [True, False], ids=["with policy", "by escaping alone"])


def without_policy(html: str) -> str:
    changed, found = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert found == 1
    return changed


def test_the_probes_notice_what_is_planted(tab: Tab) -> None:
    html = (
        "<script>console.error('planted'); new WebSocket('ws://planted.invalid/s'); alert('planted');"
        "fetch('http://planted.invalid/x').catch(() => 0); window.open('about:blank');</script>"
        "<script>nothing.planted</script><img src='http://planted.invalid/i.png'>"
    )
    page = tab.open(html)
    page.wait_for_load_state("networkidle")
    noticed = "\n".join(tab.logged)
    for wanted in ("error: planted", "dialog: planted", "exception: nothing is not defined", "a window was opened"):
        assert wanted in noticed
    assert {"http://planted.invalid/x", "http://planted.invalid/i.png", "ws://planted.invalid/s"} <= set(tab.requested)
    with pytest.raises(AssertionError, match="planted"):
        tab.require_silence()
    tab.logged.clear()
    with pytest.raises(AssertionError, match="planted"):
        tab.require_silence()
    tab.requested.clear()


def test_every_widget_renders(tab: Tab, run: Any) -> None:
    from playwright.sync_api import expect

    html = report(run.stats, run.result, run.removed, passage=run.passage).html
    page = tab.open(html)
    widgets = html.count('class="widget"')
    assert widgets > 10
    expect(page.locator(".colored-tokens")).to_have_count(widgets)
    expect(page.locator("output", has_text="Hover over the map")).to_have_count(3)
    expect(page.get_by_role("button", name=re.compile("^(all layers|layers? [0-9–]+)$"))).to_have_count(
        4
    )  # of the passage


def test_a_map_is_read_by_mouse_and_by_arrow_keys(tab: Tab, run: Any) -> None:
    from playwright.sync_api import expect

    page = tab.open(report(run.stats, run.result, run.removed, passage=run.passage).html)
    heat = page.locator("[data-heat]").filter(has=page.get_by_role("img", name=re.compile("^Activation ratio, 4")))
    field, said = heat.locator(".field"), heat.locator(".readout")
    ratio = run.passage.activation_ratio.numpy()
    field.focus()
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(said).to_contain_text("layer 2, token 1 ")
    assert float(said.inner_text().split()[-1]) == pytest.approx(ratio[2, 1], abs=1e-4)
    box = field.bounding_box()
    assert box is not None
    field.hover(position={"x": box["width"] - 4, "y": box["height"] - 4})
    expect(said).to_contain_text("layer 3, token 23 ")
    assert float(said.inner_text().split()[-1]) == pytest.approx(ratio[3, 23], abs=1e-4)


@POLICIES
def test_hostile_tokens_stay_text(tab: Tab, run: Any, policy: bool) -> None:
    run.stats.token_strings = dict.fromkeys(run.stats.token_strings, ATTACK)
    run.passage.token_strings = [ATTACK] * len(run.passage.token_strings)
    run.stats.model.name = ATTACK
    html = report(run.stats, run.result, run.removed, passage=run.passage, title="Untouched").html
    page = tab.open(html if policy else without_policy(html))
    page.locator(".colored-tokens").first.wait_for()
    shown = page.content()
    assert page.title() == "Untouched"
    assert not re.search(r"<img[^>]*onerror", shown)
    assert "&lt;/script&gt;&lt;img·src=x·onerror=document.title='owned'&gt;" in shown.replace("\u2060", "")


@WIDTHS
def test_nothing_overflows(tab: Tab, run: Any, width: int) -> None:
    page = tab.open(report(run.stats, run.result, run.removed, passage=run.passage).html, width=width)
    page.locator(".colored-tokens").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@WIDTHS
def test_runs_side_by_side_fit_and_are_text(tab: Tab, width: int) -> None:
    attacks = (ATTACK, "\"'`><svg/onload=document.title='owned'>", "<img src=x onerror=document.title='owned'>")
    runs = {}
    for place, attack in enumerate(attacks):
        run = make_run(n_layers=4 + place, name=attack)
        runs[attack] = {"stats": run.stats, "result": run.result, "removed": run.removed}
    page = tab.open(compare(runs, title="Untouched").html, width=width)
    assert page.title() == "Untouched"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heads = page.locator(".side-by-side thead th").all_text_contents()
    assert heads == ["", *(f"{letter} · {attack}" for letter, attack in zip("ABC", attacks, strict=True))]
    assert page.locator("img, [onload], [onerror]").count() == 0


def test_the_theme_button_changes_the_colours(tab: Tab, run: Any) -> None:
    html = report(run.stats).html
    page = tab.open(html)
    background, button = "getComputedStyle(document.body).backgroundColor", page.get_by_role("button", name="theme")
    light, dark = "rgb(251, 251, 249)", "rgb(20, 23, 26)"
    for wanted, label in ((light, "auto"), (light, "light"), (dark, "dark"), (light, "auto")):
        assert page.evaluate(background) == wanted
        assert button.inner_text() == f"Theme: {label}"
        button.click()
    assert tab.open(html, scheme="dark").evaluate(background) == dark
    page.keyboard.press("Tab")  # past the link that skips to the summary
    while page.evaluate("document.activeElement.id") != "theme":
        assert page.evaluate("document.activeElement.tagName") == "A"
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(background) == light


def test_it_is_printed_whole(tab: Tab, tmp_path: Path, run: Any) -> None:
    page = tab.open(report(run.stats, run.result, run.removed, passage=run.passage).html, scheme="dark")
    page.pdf(path=tmp_path / "page.pdf", print_background=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    folded = page.locator("details:not([open])").count()
    assert folded > 2
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("header, .controls").filter(visible=True).count()
