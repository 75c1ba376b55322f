"""Debian's Chromium, driven by playwright, and what it must not do on any page of ours."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")

# Milliseconds. A machine with other work is slow, and time decides nothing here.
PATIENCE = 60_000
expect = playwright.expect
expect.set_options(timeout=PATIENCE)


@dataclass
class Seen:
    """What a page said and asked for."""

    console: list[str] = field(default_factory=list)
    origins: set[str] = field(default_factory=set)
    posted: list[dict] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def open_page(
    browser: "playwright.Browser", url: str, **context: object
) -> tuple["playwright.Page", Seen]:
    """A page in a context of its own, as a private window has it."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
    page.set_default_timeout(PATIENCE)
    seen = Seen()
    page.on("console", lambda message: seen.console.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.console.append(f"uncaught: {error}"))

    def note(request: "playwright.Request") -> None:
        parts = urlsplit(request.url)
        seen.origins.add(f"{parts.scheme}://{parts.netloc}")
        if request.method == "POST":
            seen.posted.append(request.post_data_json)

    page.on("request", note)
    page.goto(url)
    return page, seen
