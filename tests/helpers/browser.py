"""A real browser for tests of pages: Debian's ``chromium``, or Google Chrome, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless browser; the test is skipped where none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no browser: apt-get install chromium, or Google Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its own sandbox does not work for root, as whom containers run.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()
