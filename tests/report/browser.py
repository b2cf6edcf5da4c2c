"""A browser to click in: the system's Chromium, driven by Playwright, which downloads none of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
TIMEOUT_MS = 30_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser; while it runs, no event loop can be started in this thread."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        # Root, as in containers, cannot have Chromium's sandbox. SwiftShader: the CircuitsVis bundle looks for WebGL.
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=["--disable-gpu", "--enable-unsafe-swiftshader"]
        )
        with started:
            yield started


class Tab:
    """A page of a browser of its own; `logged` holds all its console said, `requested` every address it asked for."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self.folder = folder
        self.logged: list[str] = []
        self.requested: list[str] = []
        # Offline: what is asked for is noted, and never answered.
        self.page = browser.new_page(offline=True, reduced_motion="reduce")
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.logged.append(f"exception: {error}"))
        self.page.on("crash", lambda _: self.logged.append("the page crashed"))
        self.page.on("popup", lambda other: self.logged.append(f"a window was opened: {other.url}"))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("websocket", lambda socket: self.requested.append(socket.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if not message.text.startswith("[.WebGL-"):  # the driver speaking of its own speed
            self.logged.append(f"{message.type}: {message.text}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.logged.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(
        self, html: str, *, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light",
        anchor: str = "",
    ) -> Page:  # fmt: skip
        """Show a page that lies in a file, and return it when its scripts have run."""
        path = self.folder / "page.html"
        path.write_text(html, encoding="utf-8")
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto("about:blank")  # an anchor alone loads nothing anew
        self.page.goto(path.as_uri() + anchor)
        return self.page

    def require_silence(self) -> None:
        """Fail if the console said anything, or if anything but the page itself and its own data was asked for."""
        assert not self.logged, f"said on the console: {self.logged}"
        own = (self.folder / "page.html").as_uri()
        asked = [url for url in self.requested if not url.startswith(("data:", "blob:", "about:"))]
        outside = [url for url in asked if url.split("#")[0] != own]
        assert not outside, f"asked for: {outside}"
