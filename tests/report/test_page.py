"""The page: one file, no request, the same bytes for the same input."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neuron_sparsity.report import Report, report

SECTIONS = ["summary", "sparse", "where", "which", "removable", "measured"]


@pytest.fixture
def page(run: Any) -> Report:
    return report(run.stats, run.result, run.removed, passage=run.passage)


def without_scripts(html: str) -> str:
    return re.sub(r"<script>.*?</script>", "", html, flags=re.S)


def test_the_page_of_a_30_layer_model_is_small(full_run: Any) -> None:
    page = report(full_run.stats, full_run.result, full_run.removed, passage=full_run.passage)
    assert len(page.html.encode()) < 6_000_000
    assert "46,080" in page.html


def test_nothing_is_loaded_from_outside(page: Report) -> None:
    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in {"link", "iframe", "object", "embed", "base", "audio", "video"}
            names = {"src", "href", "srcset", "xlink:href", "action", "data", "poster", "background", "ping"}
            self.found += [value or "" for name, value in attrs if name in names]

    links = Links()
    links.found = []
    links.feed(page.html)
    assert links.found
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in links.found)
    body = without_scripts(page.html)
    assert not re.search(r"url\(|@import|https?:|sourceMappingURL", body)
    assert "sourceMappingURL" not in page.html


def test_the_policy_names_exactly_the_scripts_of_the_page(page: Report) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "script-src 'unsafe" not in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", page.html, flags=re.S)
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
    assert digests == set(re.findall(r"'sha256-([^']*)'", policy[1]))


def test_the_bundle_is_embedded_once(page: Report) -> None:
    assert page.html.count("var CircuitsVis=") == 1
    assert page.html.count('class="widget"') > 10


def test_the_same_input_gives_the_same_bytes(run: Any, page: Report) -> None:
    assert report(run.stats, run.result, run.removed, passage=run.passage).html == page.html


def test_sections_come_in_order(page: Report) -> None:
    assert re.findall(r'<section id="(\w+)"', page.html) == SECTIONS


def test_missing_parts_say_how_to_get_them(run: Any) -> None:
    html = report(run.stats).html
    assert re.findall(r'<section id="(\w+)"', html) == SECTIONS
    assert "<code>ns.cett_ppl_sparsity(model, corpus)</code>" in html
    assert "ns.removable_neurons(model, corpus, ranking)" in html
    assert "Not part of this run: sparsity and removable neurons" in html
    assert "Dead neurons" in html


@pytest.mark.parametrize("missing", ["result", "removed", "passage"])
def test_each_part_may_be_missing(run: Any, missing: str) -> None:
    parts = {"result": run.result, "removed": run.removed, "passage": run.passage}
    html = report(run.stats, **{**parts, missing: None}).html
    assert re.findall(r'<section id="(\w+)"', html) == SECTIONS
    assert ("Not measured here" in html) == (missing != "passage")
    assert ("No passage was recorded" in html) == (missing == "passage")


def test_nothing_removable_is_a_result(run: Any) -> None:
    changes = {
        "n_removable": 0,
        "removable": (),
        "control": None,
        "heldout": None,
        "ppl_ablated": run.removed.ppl_dense,
    }
    html = report(run.stats, run.result, SimpleNamespace(**{**vars(run.removed), **changes})).html
    assert "0 of 192 neurons" in html


def test_an_unreached_target_makes_a_page(run: Any) -> None:
    layers = tuple(SimpleNamespace(**{**vars(layer), "threshold": float("inf")}) for layer in run.result.layers)
    changes = {"reached": False, "cett": 1.0, "activation_ratio": 0.0, "layers": layers}
    html = report(run.stats, SimpleNamespace(**{**vars(run.result), **changes})).html
    assert "not reached" in html


def test_parts_of_different_models_are_refused(run: Any) -> None:
    run.result.model = SimpleNamespace(**{**vars(run.result.model), "fingerprint": "bad"})
    with pytest.raises(ValueError, match="different models: fingerprint c0ffee and bad"):
        report(run.stats, run.result)


def test_a_title_is_escaped(run: Any) -> None:
    html = report(run.stats, title="<b>&\x00").html
    assert "<title>&lt;b&gt;&amp;⟨NUL⟩</title>" in html
    assert "<b>" not in without_scripts(html)


def test_save_replaces_the_file_in_one_step(page: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert page.save(path) == path
    assert path.read_text(encoding="utf-8") == page.html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Report("new", "t").save(path)
    assert path.read_text(encoding="utf-8") == page.html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_notebook_shows_the_page_in_a_frame(page: Report) -> None:
    shown = page._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts"' in shown
