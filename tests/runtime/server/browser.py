"""A headless Chromium, where one is installed, and a look at a page that notes what goes wrong in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "chrome")
READY = "#run:enabled"
"""In the playground: the models are known, and nothing runs."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; skips the test where there is none, or nothing to drive it with.

    While it is there, `asyncio.run` cannot be called: the driver has an event loop in this thread.
    """
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives a browser")
    with driver.sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, COMMANDS)), None)
        path = installed or playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("needs Chromium, of the system or of `playwright install chromium`")
        # Chromium's sandbox refuses to be root's, as whom containers run tests.
        sandboxed = os.geteuid() != 0
        with playwright.chromium.launch(executable_path=path, chromium_sandbox=sandboxed) as browser:
            yield browser


class Visit:
    """A page in a tab of its own, without memory of others.

    Attributes:
        page: the page, by playwright's interface.
        faults: what scripts threw and what the console called an error.
        origins: of everything that was asked for.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.origins: set[str] = set()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        page.on("request", lambda request: self.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))))

    def text(self, selector: str) -> str:
        """The text of the only element."""
        return self.page.text_content(selector, strict=True) or ""

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements, in their order."""
        return self.page.locator(selector).all_text_contents()

    def fill(self, **fields: object) -> None:
        """Fills in fields of the playground's form, by their ids."""
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))

    def run(self, **fields: object) -> None:
        """Fills in the playground's form, sends it, and waits for the end of all answers."""
        self.fill(**fields)
        self.page.press("#prompt", "Control+Enter")
        self.wait(READY)

    def wait(self, selector: str, text: str | None = None) -> None:
        """Waits until there is such an element, with such a text in it. Not by a script: the page forbids `eval`."""
        self.page.locator(selector).filter(has_text=text).first.wait_for()


@contextlib.contextmanager
def visit(browser: Browser, url: str, **context: Any) -> Iterator[Visit]:
    """Opens an address. `context` is playwright's: viewport, color_scheme, reduced_motion, http_credentials."""
    with browser.new_context(**context) as tab:
        tab.set_default_timeout(20_000)
        visited = Visit(tab.new_page())
        visited.page.goto(url)
        yield visited
