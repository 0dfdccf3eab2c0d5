"""The pages of the API in a real Chromium: Swagger UI, ReDoc, and the list when neither comes."""

import asyncio
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from chatserver import Config, create_app
from tests.browser import Browser, Chromium, Tab, program
from tests.conftest import missing
from tests.processes import KEY, NO_LIMITS, ROOT, serving

pytestmark = pytest.mark.slow
PATHS = json.loads((ROOT / "web" / "openapi.json").read_text("utf-8"))["paths"]
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    if method != "parameters"
}
ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js")
PACKAGES = ("swagger-ui-dist@5.35.0", "redoc@2.5.4")
NO_FOLDER = "docs_assets|MIME type"  # the console tells that the server has no such folder
REDOC_LOGO = "cdn.redoc.ly"  # which our policy does not let it fetch
ALICE = {"username": "alice", "email": "alice@example.com", "password": "1234"}


@pytest.fixture(scope="session")
def chromium() -> Iterator[str]:
    """Give the address of a browser."""
    path = program()
    if path is None:
        missing("there is no Chromium here")
    browser = Chromium(path or "")
    try:
        yield browser.address()
    finally:
        browser.close()


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """Give the browser; after the test no page has complained about anything unforgiven."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(chromium, max_msg_size=0) as socket,
        asyncio.TaskGroup() as tasks,
    ):
        browser = Browser(socket)
        reading = tasks.create_task(browser.read())
        yield browser
        problems = [
            each for tab in browser.tabs.values() for each in tab.problems if REDOC_LOGO not in each
        ]
        await browser.close()
        reading.cancel()
    assert problems == []


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the files of Swagger UI and ReDoc, from npm unless there is one."""
    if given := os.environ.get("DOCS_ASSETS_DIR"):
        return Path(given)
    npm = shutil.which("npm")
    if npm is None:
        missing("neither DOCS_ASSETS_DIR nor npm has Swagger UI and ReDoc")
    folder = tmp_path_factory.mktemp("assets")
    command = [str(npm), "pack", "--silent", *PACKAGES]
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        missing(f"npm could not fetch Swagger UI and ReDoc: {done.stderr.strip()[-200:]}")
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if name in ASSETS and (file := tar.extractfile(member)):
                    (folder / name).write_bytes(file.read())
    return folder


@asynccontextmanager
async def site(folder: Path, prefix: str = "", **settings: Any) -> AsyncIterator[str]:
    """Run the server, maybe under a prefix of a larger one; yield its address."""
    settings |= {**NO_LIMITS, "database_url": f"sqlite:///{folder}/chat.db", "secret_key": KEY}
    app = create_app(Config(**settings))
    if prefix:
        (larger := web.Application()).add_subapp(prefix, app)
        app = larger
    async with serving(app) as url:
        yield url + prefix


@pytest.mark.parametrize("prefix", ["", "/chat"])
async def test_swagger_logs_in_and_posts(
    browser: Browser, assets: Path, tmp_path: Path, prefix: str
) -> None:
    """Authorize takes name and password, and "Try it out" posts a message with the log-in."""
    async with (
        site(tmp_path, prefix, docs_assets=str(assets)) as url,
        aiohttp.ClientSession() as session,
    ):
        (await session.post(f"{url}/auth/register", json=ALICE)).raise_for_status()
        tab = await browser.tab(f"{url}/docs")
        await tab.wait(f"document.querySelectorAll('.opblock').length === {len(OPERATIONS)}")
        await tab.click(".auth-wrapper .authorize")
        fields = "[...document.querySelectorAll('.auth-container input')]"
        visible = f"{fields}.filter((el) => el.checkVisibility()).map((el) => el.id)"
        await tab.equals(visible, ["oauth_username", "oauth_password"])
        with tab.forgiving("status of 400") as refused:
            await authorize(tab, "alice", "wrong")
            await tab.wait("document.querySelector('.auth-container .errors')")
        assert len(refused) == 1
        await authorize(tab, "Alice@example.com", "1234")
        await tab.wait("document.querySelector('.auth-container').innerText.includes('Authorized')")
        await tab.click(".btn-done")
        post = "#operations-Messages-post_message"
        await tab.click(f"{post} button.opblock-summary-control")
        await tab.click(f"{post} .try-out__btn")
        await tab.fill(f"{post} [data-param-name=room_id] input", "1")
        await tab.fill(f"{post} textarea", '{"message": "Hello from Swagger"}')
        await tab.click(f"{post} .execute")
        row = f"{post} .live-responses-table tbody"
        status = f"document.querySelector('{row} .response-col_status')?.innerText.trim()"
        await tab.equals(status, "201")
        answer = await tab.js(f"document.querySelector('{row} .microlight').innerText")
        assert (json.loads(answer)["username"], json.loads(answer)["seq"]) == ("alice", 2)
        assert await tab.js("JSON.stringify({ ...localStorage, ...sessionStorage })") == "{}"


async def authorize(tab: Tab, name: str, password: str) -> None:
    """Log in with Swagger's own dialog."""
    await tab.fill("#oauth_username", name)
    await tab.fill("#oauth_password", password)
    await tab.click(".modal-btn.authorize")


@pytest.mark.parametrize("prefix", ["", "/chat"])
async def test_redoc_shows_every_operation(
    browser: Browser, assets: Path, tmp_path: Path, prefix: str
) -> None:
    """ReDoc renders every operation, and how the WebSocket is spoken to."""
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    async with site(tmp_path, prefix, docs_assets=str(assets)) as url:
        tab = await browser.tab(f"{url}/redoc")
        sections = "[...document.querySelectorAll('[data-section-id]')].map((el) => el.id)"
        await tab.wait(f"{sections}.length > {len(names)}")
        shown = await tab.js(sections)
        text = await tab.js("document.body.innerText")
    assert [name for name in names if not any(name in section for section in shown)] == []
    assert [path for path in PATHS if path not in text] == []
    assert "A client that loses nothing" in text


async def test_the_cdn_is_held_to_the_pinned_files(
    browser: Browser, assets: Path, tmp_path: Path
) -> None:
    """Without a folder the files of just these versions come from the CDN: the hashes are right."""
    files = {name: (assets / name).read_bytes() for name in ASSETS}
    async with site(tmp_path) as url:
        for page, shown in (("docs", ".opblock"), ("redoc", "[data-section-id]")):
            tab = await browser.tab("about:blank")
            await tab.intercept("https://*", files)
            with tab.forgiving(NO_FOLDER):
                await tab.go(f"{url}/{page}")
                await tab.wait(f"document.querySelectorAll('{shown}').length >= {len(OPERATIONS)}")


@pytest.mark.parametrize("trouble", ["offline", "forged"])
async def test_without_its_files_a_page_lists_the_operations_itself(
    browser: Browser, tmp_path: Path, trouble: str
) -> None:
    """Without a CDN, or with one that sends other files, the pages list the operations."""
    forged = dict.fromkeys(ASSETS, b"window.owned = 1")
    async with site(tmp_path) as url:
        for page in ("docs", "redoc"):
            tab = await browser.tab("about:blank")
            await tab.intercept("https://*", forged if trouble == "forged" else {})
            with tab.forgiving(f"{NO_FOLDER}|ERR_ADDRESS_UNREACHABLE|integrity"):
                await tab.go(f"{url}/{page}")
                await tab.wait(f"document.querySelectorAll('h3').length >= {len(OPERATIONS)}")
            shown = await tab.js("[...document.querySelectorAll('h3')].map((el) => el.textContent)")
            assert sorted(shown) == sorted(OPERATIONS)
            assert await tab.js("window.owned") is None
