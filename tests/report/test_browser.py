"""In a real browser: the widgets render, hostile tokens stay text, and nothing runs that should not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neuron_sparsity.report import report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")

ATTACK = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
PROBE = "<script>setTimeout(() => { document.body.dataset.overflow = document.body.scrollWidth; }, 1500);</script>"


def dom(html: str, folder: Path, *, width: int = 1280) -> str:
    """The document after its scripts have run."""
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=4000",
        f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8")


def hostile_page(run: Any) -> str:
    run.stats.token_strings = dict.fromkeys(run.stats.token_strings, ATTACK)
    run.passage.token_strings = [ATTACK] * len(run.passage.token_strings)
    run.stats.model.name = ATTACK
    return report(run.stats, run.result, run.removed, passage=run.passage, title="Untouched").html


def test_every_widget_renders(run: Any, tmp_path: Path) -> None:
    html = report(run.stats, run.result, run.removed, passage=run.passage).html
    shown = dom(html, tmp_path)
    widgets = html.count('class="widget"')
    assert widgets == shown.count('class="colored-tokens"') > 10
    assert len(re.findall(r"<output[^>]*>Hover over the map", shown)) == 3
    assert shown.count('role="button"') == 4  # the passage's groups of layers, reachable by keyboard


@pytest.mark.parametrize("policy", [True, False], ids=["with policy", "by escaping alone"])
def test_hostile_tokens_stay_text(run: Any, tmp_path: Path, policy: bool) -> None:
    html = hostile_page(run)
    if not policy:
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    shown = dom(html, tmp_path)
    assert "<title>Untouched</title>" in shown
    assert not re.search(r"<img[^>]*onerror", shown)
    tokens = shown.replace("\u2060", "")
    assert "&lt;/script&gt;&lt;img·src=x·onerror=document.title='owned'&gt;" in tokens


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_overflows(run: Any, tmp_path: Path, width: int) -> None:
    html = report(run.stats, run.result, run.removed, passage=run.passage).html
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", f"{PROBE}</body>")
    found = re.search(r'data-overflow="(\d+)"', dom(html, tmp_path, width=width))
    assert found is not None
    assert int(found[1]) <= width
