"""A real Chromium without a window, driven by Playwright, whose pages must not complain."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser as Chromium
from playwright.async_api import Page, async_playwright, expect

from tests.commands import tool

expect.set_options(timeout=20_000)


class Browser:
    """The browser of one test, and what its pages complained about."""

    def __init__(self, chromium: Chromium, forgiven: str) -> None:
        """Take complaints that match this pattern for granted."""
        self.chromium, self.forgiven = chromium, forgiven
        self.problems: list[str] = []

    async def page(self, beside: Page | None = None, **device: Any) -> Page:
        """Open a page on a machine of its own, or beside another, with which it shares all."""
        if beside:
            return await beside.context.new_page()
        context = await self.chromium.new_context(**device)
        context.on("console", lambda said: self.hear(said.type, f"{said.text} {said.location}"))
        context.on("weberror", lambda thrown: self.hear("error", str(thrown.error)))
        return await context.new_page()

    def hear(self, kind: str, words: str) -> None:
        """Remember what a console complains about."""
        if kind in ("error", "warning") and not re.search(self.forgiven, words):
            self.problems.append(words)


@asynccontextmanager
async def browsing(forgiven: str) -> AsyncIterator[Browser]:
    """Run a browser as long as the block lasts; its pages complain of nothing but this."""
    path = tool("chromium", "chromium-browser")
    flags = ["--disable-frame-rate-limit"]  # of one frame a second for a tab behind another
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=path, args=flags) as chromium,
    ):
        browser = Browser(chromium, forgiven)
        yield browser
    assert not browser.problems, browser.problems
