"""The table of all neurons in a real browser: found, filtered, sorted, opened; hostile text stays text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.report_page import synthetic_saliency
from neuron_sparsity.report import _classes as classes
from neuron_sparsity.report import report
from neuron_sparsity.report.page import Section, render
from neuron_sparsity.report.views import neuron_table
from tests.report.browser import Tab
from tests.report.conftest import Run, make_atlas, make_run
from tests.report.test_browser import POLICIES, WIDTHS, without_policy

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
AS_SHOWN = (
    "</script><script>document.title='owned'</script>",
    "<img·src=x·onerror=document.title='owned'>",
    "\"'`><svg/onload=document.title='owned'>",
    "⟨U+2028⟩alert(1)//",
    "⟨U+202E⟩evil⟨U+2066⟩",
    "⟨NUL⟩nul",
    "🦜😀",
    "${document.title='owned'}",
    "&lt;b&gt;",
)


@pytest.fixture(scope="module")
def full(full_run: Run) -> Run:
    return full_run


def shown(tab: Tab, run: Run, *, whole: bool = False, **options: Any) -> Page:
    """Show the table of a run, or with `whole` its page, which takes longer."""
    parts = {name: options.pop(name) for name in ("atlas", "neurons", "saliency") if name in options}
    if whole:
        html = report(run.stats, run.result, run.removed, passage=run.passage, **parts).html
    else:
        table = neuron_table(run.stats, run.result, run.removed, **parts)
        html = render([Section("which", "Which neurons?", "", (table,))], title="A table")
    page = tab.open(html, **options)
    page.locator("[data-neurons][data-ready]").wait_for()
    return page


def rows(page: Page) -> Any:
    return page.locator(".rows-scroll tbody tr[data-index]")


def first_row(page: Page) -> list[str]:
    return list(rows(page).first.locator("th, td").all_text_contents())


def expect_found(page: Page, n: int, of: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(".controls .found")).to_have_text(f"{n:,} of {of:,}")


def test_rows_open_filter_and_sort(tab: Tab, full: Run) -> None:
    page = shown(tab, full, whole=True)
    n, mean = 46_080, (full.stats.contribution_sum / full.stats.n_tokens).numpy()
    expect_found(page, n, n)
    assert rows(page).count() < 60  # of all those rows, as many as are seen
    layer, neuron = np.unravel_index(mean.argmax(), mean.shape)
    assert first_row(page)[0] == f"L{layer} · N{neuron}"
    page.get_by_role("button", name="mean contribution").click()
    layer, neuron = np.unravel_index(mean.argmin(), mean.shape)
    assert first_row(page)[0] == f"L{layer} · N{neuron}"
    assert page.locator("[data-key=mean]").get_attribute("aria-sort") == "ascending"

    page.get_by_role("checkbox", name="alive").uncheck()
    counts = classes.class_counts(classes.activity(full.stats, full.result))
    expect_found(page, n - int(counts.alive.sum()), n)
    page.get_by_label("Layer", exact=True).select_option("layer 7")
    expect_found(page, 1536 - int(counts.alive[7]), n)
    page.get_by_role("button", name="Reset").click()
    expect_found(page, n, n)

    page.get_by_role("searchbox").fill("3:17")
    expect_found(page, 1, n)
    rows(page).first.click()
    detail = page.get_by_role("region", name="The chosen neuron")
    assert detail.get_by_role("heading", level=4).inner_text() == "L3 · N17"
    frequency = full.stats.above_count[3, 17, 0].item() / full.stats.n_tokens
    assert f"{100 * frequency:.3g}" in detail.locator("dl").inner_text()
    assert detail.locator(".histogram rect").count() > 5


def test_a_deep_row_is_reached_by_keys_alone(tab: Tab, full: Run) -> None:
    page = shown(tab, full)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "rows-scroll":
            break
    page.keyboard.press("End")
    page.locator(".rows-scroll tr[data-index='46079']").wait_for()
    name = "document.getElementById(document.querySelector('.rows-scroll').getAttribute('aria-activedescendant'))"
    assert page.evaluate(f"{name}.dataset.index") == "46079"
    box = page.evaluate(
        f"(() => {{ const r = {name}.getBoundingClientRect(), s = document.querySelector('.rows-scroll')"
        ".getBoundingClientRect(); return [r.top >= s.top, r.bottom <= s.bottom + 1]; })()"
    )
    assert box == [True, True]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    opened = page.locator(".detail h4").inner_text()
    assert opened == page.evaluate(f"{name}.firstChild.textContent")
    assert page.evaluate("document.activeElement.textContent") == opened
    page.keyboard.press("Escape")
    assert page.locator(".detail > *").count() == 0
    assert page.evaluate("document.activeElement.className") == "rows-scroll"


def test_a_neuron_without_examples_says_how_to_get_them_and_then_has_them(tab: Tab) -> None:
    run = make_run(30, 1536)
    page = shown(tab, run, anchor="#neuron=4:900")
    assert page.locator(".detail h4").inner_text() == "L4 · N900"
    note = page.locator(".detail .examples").inner_text()
    if "--neurons" not in note:
        pytest.fail("the neuron of this test was chosen: take another")
    assert "neuron-sparsity report RUNFOLDER --neurons 4:900" in note
    page = shown(tab, run, anchor="#neuron=4:900", neurons=[(4, 900)])
    tokens = [run.stats.token_strings[int(i)] for i in run.stats.example_context[4, 900, :3, 16]]
    wanted = [token.replace(" ", "·").replace("\n", "↵") for token in tokens]
    assert page.locator(".detail .examples mark").all_text_contents() == wanted


def test_a_neuron_says_what_its_removal_costs(tab: Tab, run: Run) -> None:
    run.removed.removable = [[2, 9], [1, 5]]
    saliency = synthetic_saliency(run.stats)
    rise = 100 * np.expm1(saliency.predicted_rise(saliency.mean_activation).numpy().ravel())
    page = shown(tab, run, saliency=saliency, anchor="#neuron=1:5")
    said = page.locator(".detail dl").inner_text()
    size = f"{'+' if rise[53] > 0 else '−'}{abs(rise[53]):#.3g} %"
    assert f"perplexity {size}, predicted from gradients (first order, and half" in said
    assert "on 4,096 tokens of speeches for ranking, with its mean in its place" in said
    assert "can go: number 2 of 2 in order of contribution" in said
    page.get_by_role("button", name="removed alone, predicted").click()
    layer, neuron = divmod(int(rise.argmax()), 48)
    assert rise.max() > 1000
    assert (first_row(page)[0], "over +1,000 %" in first_row(page)) == (f"L{layer} · N{neuron}", True)
    page.get_by_role("button", name="removed alone, predicted").click()
    layer, neuron = divmod(int(rise.argmin()), 48)
    assert first_row(page)[0] == f"L{layer} · N{neuron}"
    assert any(cell.startswith("−") for cell in first_row(page))

    run.removed = None
    said = shown(tab, run, anchor="#neuron=1:5").locator(".detail dl").inner_text()
    assert "not predicted: this needs gradients, which neuron-sparsity ablate leaves" in said
    assert "not measured: neuron-sparsity ablate finds what can go" in said


def test_an_atlas_adds_kinds_triggers_and_logit_tokens(tab: Tab, run: Run) -> None:
    atlas = make_atlas(run.stats)
    page = shown(tab, run, atlas=atlas, anchor="#neuron=1:5")
    text = page.locator(".detail .texts").inner_text()
    for wanted in (*atlas["triggers"][53], *atlas["top_logit_tokens"][53], *atlas["bottom_logit_tokens"][53]):
        assert wanted.replace(" ", "·") in text
    positional = int(atlas["is_positional"].sum())
    page.get_by_label("Kind").select_option(f"positional ({positional})")
    expect_found(page, positional, 192)
    assert all("positional" in row for row in rows(page).all_text_contents())
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("searchbox").fill("trigger 53.1")
    expect_found(page, 1, 192)
    assert first_row(page)[0] == "L1 · N5"


@POLICIES
def test_hostile_text_is_shown_as_text(tab: Tab, policy: bool) -> None:
    run = make_run(words=ATTACKS, name=ATTACKS[0])
    atlas = make_atlas(run.stats)
    atlas["triggers"] = [ATTACKS[:5]] * len(atlas)
    atlas["top_logit_tokens"] = [ATTACKS] * len(atlas)
    run.stats.corpus["name"] = run.removed.corpus["name"] = ATTACKS[1]
    run.removed.ranking = ATTACKS[2]
    html = report(run.stats, run.result, run.removed, passage=run.passage, atlas=atlas, title="Untouched").html
    page = tab.open(html if policy else without_policy(html), anchor="#neuron=2:9")
    page.locator("[data-neurons][data-ready]").wait_for()
    assert page.title() == "Untouched"
    assert page.locator("img[onerror], [onload], .detail script, .detail img").count() == 0
    detail = page.locator(".detail")
    for place, part in (("chips", ".chips"), ("examples", ".examples")):
        text = "".join(detail.locator(part).all_text_contents())
        for wanted in AS_SHOWN:
            assert wanted in text, (place, wanted)
    page.get_by_role("searchbox").fill("<img src=y onerror=document.title='owned'>")
    expect_found(page, 0, 192)
    assert page.title() == "Untouched"


@WIDTHS
def test_nothing_is_wider_than_the_window(tab: Tab, run: Run, width: int) -> None:
    page = shown(tab, run, atlas=make_atlas(run.stats), width=width, whole=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_decompression_the_page_says_so(tab: Tab, run: Run) -> None:
    html = report(run.stats, run.result).html
    assert html.count("typeof DecompressionStream === ") == 1
    page = tab.open(without_policy(html.replace("typeof DecompressionStream === ", "true || ")))
    assert page.locator(".explorer-on").is_hidden()
    assert "DecompressionStream" in page.locator(".explorer-off").inner_text()


def test_a_small_run_brings_all_examples_along(tab: Tab, run: Run) -> None:
    page = shown(tab, run)
    assert page.locator("[name=chosen]").count() == 0
    page.locator(".rows-scroll tbody tr[data-index='2'] td").first.click()
    assert page.locator(".detail .example").count() == 5


def visible_columns(page: Page) -> list[str]:
    """The keys of the columns that are wholly in sight before anybody scrolls."""
    return list(
        page.evaluate(
            "(() => { const s = document.querySelector('.rows-scroll'), right = s.getBoundingClientRect().left + "
            "s.clientLeft + s.clientWidth; return [...s.querySelectorAll('thead th')].filter((cell) => "
            "cell.getBoundingClientRect().right <= right + 1).map((cell) => cell.dataset.key); })()"
        )
    )


def test_the_columns_that_say_most_are_in_sight_and_others_are_hinted_at(tab: Tab, run: Run) -> None:
    parts: dict[str, Any] = {"atlas": make_atlas(run.stats), "saliency": synthetic_saliency(run.stats)}
    page = shown(tab, run, **parts)
    assert {"removal", "rise", "kind", "n_triggers", "logit_kurtosis"} < set(visible_columns(page))
    assert page.locator(".rows-frame.more").count() == 0
    page = shown(tab, run, **parts, width=400)
    assert visible_columns(page) == ["neuron", "class", "mean", "removal"]
    assert page.locator(".rows-frame.more").count() == 1
    page.locator(".rows-scroll").evaluate("(scroller) => { scroller.scrollLeft = 1e6; }")
    page.locator(".rows-frame:not(.more)").wait_for()

    frame = parts["atlas"].assign(is_token_detector=False, ngram=0, is_positional=False, logit_role="none")
    page = shown(tab, run, **parts | {"atlas": frame})
    assert page.locator(".rows-scroll thead th").last.get_attribute("data-key") == "kind"


def test_a_layer_is_found_by_its_name(tab: Tab, run: Run) -> None:
    page = shown(tab, run)
    for query, n in (("L3", 48), ("layer 3", 48), ("Layer 3 N17", 1), ("l9", 0), ("3", 4)):
        page.get_by_role("searchbox").fill(query)
        expect_found(page, n, 192)


def test_numbers_that_can_be_misread_say_what_they_mean(tab: Tab, run: Run) -> None:
    atlas = make_atlas(run.stats)
    atlas["n_triggers"] = 3
    atlas.loc[53, "n_triggers"] = 0
    run.stats.contribution_max = run.stats.contribution_max.clone()
    run.stats.contribution_max[1, 5] *= 2
    said = {}
    for neuron in (5, 6):
        page = shown(tab, run, atlas=atlas, saliency=synthetic_saliency(run.stats), anchor=f"#neuron=1:{neuron}")
        said[neuron] = page.locator(".detail dl").inner_text()
        assert ("–" in page.locator(f"#neuron-{48 + neuron} td").all_text_contents()) is (neuron == 5)
    for words in ("no set of at most 5 tokens covers it", "(on a window's first token, never an example)"):
        assert words in said[5]
        assert words not in said[6]
    assert "the cost alone is not the cost together with others" in said[5]
