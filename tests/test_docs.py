"""The pages of the API in a real Chromium: Swagger UI, ReDoc, and the list when neither comes."""

import json
import re
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from playwright.async_api import Page, Route, expect

from chatserver import Config, create_app
from tests.browser import Browser, browsing
from tests.commands import run, tool
from tests.document import OPERATIONS
from tests.processes import ROOT, serving
from tests.words import KEY, missing

pytestmark = pytest.mark.slow
SCRIPT = (ROOT / "web" / "docs.js").read_text("utf-8")
PINNED = dict(re.findall(r'name: "(.+)",\s+folder: "(.+)"', SCRIPT))  # files and where they are
# A logo of ReDoc's, which our policy does not let it fetch, and what the tests do in vain.
FORGIVEN = "cdn.redoc.ly|ERR_ADDRESS_UNREACHABLE|integrity|status of 400"
ALICE = {"username": "alice", "email": "alice@example.com", "password": "1234"}
POST = "#operations-Messages-post_message"
ROW = f"{POST} .live-responses-table tbody"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Give a browser; after the test no page has complained about anything unforgiven."""
    async with browsing(FORGIVEN) as browser:
        yield browser


@pytest.fixture(scope="module")
async def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give the files that the CDN has of the pinned versions, as npm has them, too."""
    folder = tmp_path_factory.mktemp("npm")
    packages = {place.partition("/")[0] for place in PINNED.values()}
    code, said = await run(tool("npm"), "pack", "--silent", *packages, folder=folder)
    if code:
        missing(f"npm could not fetch Swagger UI and ReDoc: {said}")
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return {name: next(folder.rglob(name)).read_bytes() for name in PINNED}


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    """Run the server as a part of a larger site; give its address."""
    site = web.Application()
    database = f"sqlite:///{tmp_path}/chat.db"
    site.add_subapp("/chat", create_app(Config(database_url=database, secret_key=KEY)))
    async with serving(site) as url:
        yield f"{url}/chat"


async def visit(browser: Browser, url: str, files: dict[str, bytes]) -> Page:
    """Open a page for which the CDN has these files, and wait until it shows each operation."""

    async def answer(route: Route) -> None:
        """Answer in the place of the CDN."""
        name = route.request.url.rpartition("/")[2]
        if name in files:
            kind = "text/css" if name.endswith(".css") else "text/javascript"
            await route.fulfill(body=files[name], content_type=kind)
        else:
            await route.abort("addressunreachable")

    page = await browser.page()
    await page.route(re.compile("^https:"), answer)
    await page.goto(url)
    shown = page.locator(".opblock, [data-section-id*=operation], .list h3")
    await expect(shown.nth(len(OPERATIONS) - 1)).to_be_attached()
    return page


async def test_swagger_logs_in_and_posts(
    browser: Browser, files: dict[str, bytes], url: str
) -> None:
    """Authorize takes name and password, and "Try it out" posts a message with the log-in."""
    async with aiohttp.request("POST", f"{url}/auth/register", json=ALICE) as answer:
        assert answer.status == 201
    page = await visit(browser, f"{url}/docs", files)
    await page.click(".auth-wrapper .authorize")
    for name, told in (("nobody", "invalid_grant"), ("Alice@example.com", "Authorized")):
        await page.fill("#oauth_username", name)
        await page.fill("#oauth_password", "1234")
        await page.click(".modal-btn.authorize")
        await expect(page.locator(".auth-container")).to_contain_text(told)
    await page.click(".btn-done")
    await page.click(f"{POST} button.opblock-summary-control")
    await page.click(f"{POST} .try-out__btn")
    await page.fill(f"{POST} [data-param-name=room_id] input", "1")
    await page.fill(f"{POST} textarea", '{"message": "Hello from Swagger"}')
    await page.click(f"{POST} .execute")
    await expect(page.locator(f"{ROW} .response-col_status").first).to_contain_text("201")
    answer = json.loads(await page.inner_text(f"{ROW} .microlight >> nth=0"))
    assert (answer["username"], answer["seq"]) == ("alice", 2)
    assert await page.evaluate("JSON.stringify({ ...localStorage, ...sessionStorage })") == "{}"


async def test_redoc_shows_every_operation(
    browser: Browser, files: dict[str, bytes], url: str
) -> None:
    """ReDoc renders every operation, and how the WebSocket is spoken to."""
    page = await visit(browser, f"{url}/redoc", files)
    text = await page.inner_text("body")
    assert [path for _, path in OPERATIONS if path not in text] == []
    assert "A client that loses nothing" in text


@pytest.mark.parametrize("cdn", [{}, dict.fromkeys(PINNED, b"window.owned = 1")])
async def test_without_its_files_a_page_lists_the_operations_itself(
    browser: Browser, url: str, cdn: dict[str, bytes]
) -> None:
    """Without a CDN, or with one that sends other files, the pages list the operations."""
    for name in ("docs", "redoc"):
        page = await visit(browser, f"{url}/{name}", cdn)
        shown = await page.locator("h3").all_text_contents()
        assert sorted(shown) == sorted(f"{method} {path}" for method, path in OPERATIONS)
        assert await page.evaluate("window.owned") is None
