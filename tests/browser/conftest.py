"""Pages in a headless Chromium: one that is installed, or playwright's own; without one the tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_MS = 180_000  # a busy machine is slow, and not wrong
WINDOWS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
}


@pytest.fixture(scope="session")
def browser():
    """A browser that is started once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    given = os.environ.get("BITMILL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        path = given or driver.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no chromium: install the package chromium, or set BITMILL_CHROMIUM to one")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


class Opened:
    """A page, and everything it did that it should not."""

    def __init__(self, page) -> None:
        self.page = page
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def visit(browser, tmp_path) -> Iterator[Callable[..., Opened]]:
    """Open HTML text; what follows are options of a browser context."""
    contexts = []

    def visit(html: str, window: str = "desktop", **options) -> Opened:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(**WINDOWS[window], **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        opened = Opened(context.new_page())
        opened.page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            opened.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return opened

    yield visit
    for context in contexts:
        context.close()
