"""The table of all neurons in a real browser: found, filtered, sorted, opened; hostile text stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report import compare, report
from neuron_sparsity.report.page import Section, render
from neuron_sparsity.report.views import neuron_table
from tests.report.chromium import CHROMIUM, Chromium
from tests.report.conftest import Run, make_atlas, make_run

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")

READY = "document.querySelector('[data-neurons]').dataset.ready"
ROWS = "[...document.querySelectorAll('.rows-scroll tbody tr[data-index]')]"
FOUND = "document.querySelector('.controls .found').textContent"
ATTACKS = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "\"'`><svg/onload=document.title='owned'>",
    "\u2028alert(1)//",
    "\u202eevil\u2066",
    "\x00nul",
    "🦜😀",
    "${document.title='owned'}",
    "&lt;b&gt;",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def full(full_run: Run) -> Run:
    return full_run


def shown(browser: Chromium, run: Run, *, whole: bool = False, **options: Any) -> None:
    """Show the table of a run, or with `whole` its page, which takes longer."""
    parts = {name: options.pop(name) for name in ("atlas", "neurons") if name in options}
    if whole:
        html = report(run.stats, run.result, run.removed, passage=run.passage, **parts).html
    else:
        table = neuron_table(run.stats, run.result, run.removed, **parts)
        html = render([Section("which", "Which neurons?", "", (table,))], title="A table")
    browser.logged.clear()
    browser.requested.clear()
    browser.open(html, **options)
    browser.wait(READY)


def first_row(browser: Chromium) -> list[str]:
    return list(browser.run(f"[...{ROWS}[0].children].map((cell) => cell.textContent)"))


def test_rows_open_filter_and_sort_without_error_or_request(browser: Chromium, full: Run) -> None:
    shown(browser, full, whole=True)
    n, mean = 46_080, (full.stats.contribution_sum / full.stats.n_tokens).numpy()
    assert browser.run(FOUND) == "46,080 of 46,080"
    assert browser.run(f"{ROWS}.length") < 60  # of all those rows, as many as are seen
    layer, neuron = np.unravel_index(mean.argmax(), mean.shape)
    assert first_row(browser)[0] == f"L{layer} · N{neuron}"
    browser.click("[data-sort='mean']")
    layer, neuron = np.unravel_index(mean.argmin(), mean.shape)
    assert first_row(browser)[0] == f"L{layer} · N{neuron}"
    assert browser.run("document.querySelector('[data-key=mean]').getAttribute('aria-sort')") == "ascending"

    browser.click(".controls .pill:has([value='2'])")  # no longer those alive
    dead = classes.class_counts(classes.activity(full.stats, full.result))
    left = n - int(dead.alive.sum())
    browser.wait(f"{FOUND} === '{left:,} of 46,080'")
    browser.run("(() => { const s = document.querySelector('[name=layer]'); s.value = 7;"
                " s.dispatchEvent(new Event('input', { bubbles: true })); })()")  # fmt: skip
    browser.wait(f"{FOUND} === '{1536 - int(dead.alive[7]):,} of 46,080'")
    browser.click(".controls button[type=reset]")
    browser.wait(f"{FOUND} === '46,080 of 46,080'")

    browser.click(".controls [name=find]")
    browser.type("3:17")
    browser.wait(f"{FOUND} === '1 of 46,080'")
    browser.click(".rows-scroll tbody tr[data-index] td")
    assert browser.run("document.querySelector('.detail h4').textContent") == "L3 · N17"
    frequency = full.stats.above_count[3, 17, 0].item() / full.stats.n_tokens
    assert f"{100 * frequency:.3g}" in browser.run("document.querySelector('.detail dl').textContent")
    assert browser.run("document.querySelectorAll('.detail .histogram rect').length") > 5
    assert browser.logged == []
    assert [url for url in browser.requested if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
    assert [url for url in browser.requested if url.startswith("file:") and not url.endswith("page.html")] == []


def test_a_deep_row_is_reached_by_keys_alone(browser: Chromium, full: Run) -> None:
    shown(browser, full)
    browser.run("document.querySelector('.rows-scroll').focus()")
    browser.press("End")
    browser.wait(f"{ROWS}.some((row) => row.dataset.index === '46079')")
    name = "document.getElementById(document.querySelector('.rows-scroll').getAttribute('aria-activedescendant'))"
    assert browser.run(f"{name}.dataset.index") == "46079"
    box = browser.run(
        f"(() => {{ const r = {name}.getBoundingClientRect(), s = document.querySelector('.rows-scroll')"
        ".getBoundingClientRect(); return [r.top >= s.top, r.bottom <= s.bottom + 1]; })()"
    )
    assert box == [True, True]
    browser.press("ArrowUp")
    browser.press("Enter")
    opened = browser.run("document.querySelector('.detail h4').textContent")
    assert opened == browser.run(f"{name}.firstChild.textContent")
    assert browser.run("document.activeElement.textContent") == opened
    browser.press("Escape")
    assert browser.run("document.querySelector('.detail').childElementCount") == 0
    assert browser.run("document.activeElement.className") == "rows-scroll"


def test_a_neuron_without_examples_says_how_to_get_them_and_then_has_them(browser: Chromium) -> None:
    run = make_run(30, 1536)
    chosen_out = "L4 · N900"
    shown(browser, run, anchor="#neuron=4:900")
    assert browser.run("document.querySelector('.detail h4').textContent") == chosen_out
    note = browser.run("document.querySelector('.detail .examples').textContent")
    if "--neurons" not in note:
        pytest.fail("the neuron of this test was chosen: take another")
    assert "neuron-sparsity report RUNFOLDER --neurons 4:900" in note
    shown(browser, run, anchor="#neuron=4:900", neurons=[(4, 900)])
    marks = browser.run("[...document.querySelectorAll('.detail .examples mark')].map((m) => m.textContent)")
    tokens = [run.stats.token_strings[int(i)] for i in run.stats.example_context[4, 900, :3, 16]]
    assert marks == [token.replace(" ", "·").replace("\n", "↵") for token in tokens]


def test_an_atlas_adds_kinds_triggers_and_logit_tokens(browser: Chromium, run: Run) -> None:
    atlas = make_atlas(run.stats)
    shown(browser, run, atlas=atlas, anchor="#neuron=1:5")
    text = browser.run("document.querySelector('.detail .texts').textContent")
    for wanted in (*atlas["triggers"][53], *atlas["top_logit_tokens"][53], *atlas["bottom_logit_tokens"][53]):
        assert wanted.replace(" ", "·") in text
    positional = int(atlas["is_positional"].sum())
    browser.run("(() => { const s = document.querySelector('[name=kind]'); s.value = 3;"
                " s.dispatchEvent(new Event('input', { bubbles: true })); })()")  # fmt: skip
    browser.wait(f"{FOUND} === '{positional} of 192'")
    assert all("positional" in row for row in browser.run(f"{ROWS}.map((row) => row.textContent)"))
    browser.click(".controls button[type=reset]")
    browser.click(".controls [name=find]")
    browser.type("trigger 53.1")
    browser.wait(f"{FOUND} === '1 of 192'")
    assert first_row(browser)[0] == "L1 · N5"
    assert browser.logged == []


def test_the_theme_button_changes_the_colours(browser: Chromium, run: Run) -> None:
    shown(browser, run)
    colours = []
    for _ in range(3):
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        browser.click("#theme")
    assert colours == ["rgb(251, 251, 249)", "rgb(251, 251, 249)", "rgb(20, 23, 26)"]  # auto, light, dark
    shown(browser, run, scheme="dark")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


@pytest.mark.parametrize("policy", [True, False], ids=["with policy", "by escaping alone"])
def test_hostile_text_is_shown_as_text(browser: Chromium, policy: bool) -> None:
    run = make_run(words=ATTACKS, name=ATTACKS[0])
    atlas = make_atlas(run.stats)
    atlas["triggers"] = [ATTACKS[:5]] * len(atlas)
    atlas["top_logit_tokens"] = [ATTACKS] * len(atlas)
    run.stats.corpus["name"] = run.removed.corpus["name"] = ATTACKS[1]
    run.removed.ranking = ATTACKS[2]
    html = report(run.stats, run.result, run.removed, passage=run.passage, atlas=atlas, title="Untouched").html
    if not policy:
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    browser.logged.clear()
    browser.open(html, anchor="#neuron=2:9")
    browser.wait(READY)
    assert browser.run("document.title") == "Untouched"
    assert browser.run("document.querySelectorAll('img[onerror], [onload], .detail script, .detail img').length") == 0
    text = browser.run("document.querySelector('.detail').textContent")
    for wanted in ("</script><script>", "<img·src=x·onerror=", "⟨U+2028⟩alert(1)//", "⟨U+202E⟩evil⟨U+2066⟩", "⟨NUL⟩nul",
                   "🦜😀", "&lt;b&gt;", "<svg/onload="):  # fmt: skip
        assert wanted in text
    browser.click(".controls [name=find]")
    browser.type("<img src=y onerror=document.title='owned'>")
    browser.wait(f"{FOUND} === '0 of 192'")
    assert browser.run("document.title") == "Untouched"
    assert browser.logged == []


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(browser: Chromium, run: Run, width: int) -> None:
    shown(browser, run, atlas=make_atlas(run.stats), width=width, whole=True)
    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 400])
def test_runs_side_by_side_fit_and_ask_for_nothing(browser: Chromium, width: int) -> None:
    runs = {}
    for place, attack in enumerate(ATTACKS[:3]):
        run = make_run(n_layers=4 + place, name=attack)
        runs[attack] = {"stats": run.stats, "result": run.result, "removed": run.removed}
    browser.logged.clear()
    browser.requested.clear()
    browser.open(compare(runs, title="Untouched").html, width=width)
    assert browser.run("document.title") == "Untouched"
    assert browser.run("document.documentElement.scrollWidth") <= width
    heads = browser.run("[...document.querySelectorAll('.side-by-side thead th')].map((cell) => cell.textContent)")
    assert heads == ["", *(f"{letter} · {attack}" for letter, attack in zip("ABC", ATTACKS, strict=False))]
    assert browser.run("document.querySelectorAll('img, [onload], [onerror]').length") == 0
    assert browser.logged == []
    assert all(url.startswith(("file:", "about:")) for url in browser.requested)


def test_without_decompression_the_page_says_so(browser: Chromium, run: Run) -> None:
    html = report(run.stats, run.result).html.replace("typeof DecompressionStream === ", "true || ")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    browser.open(html)
    assert browser.run("document.querySelector('.explorer-on').hidden")
    assert "DecompressionStream" in browser.run("document.querySelector('.explorer-off').innerText")


def test_a_small_run_brings_all_examples_along(browser: Chromium, tmp_path: Path, run: Run) -> None:
    shown(browser, run)
    assert browser.run("document.querySelector('[name=chosen]')") is None
    browser.click(".rows-scroll tbody tr[data-index='2'] td")
    assert browser.run("document.querySelectorAll('.detail .example').length") == 5
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
