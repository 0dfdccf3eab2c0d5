"""A real Chromium without a window, driven over its DevTools protocol.

A tab remembers what its console complains about. What is run in it finds elements as one does in
the console: by $ and $$.
"""

import asyncio
import base64
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from tests.commands import started
from tests.words import until

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--no-first-run", "--no-proxy-server", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--lang=en-GB"),
)
KEYS = {"Tab": 9, "Enter": 13, "ArrowUp": 38, "Escape": 27}
PAGE = "document.body.innerText"
PATIENCE = 20.0


class PageError(Exception):
    """The browser refused a command, or a script in the page failed."""


class Browser:
    """One test's connection to the browser, and the tabs that the test opened."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, forgiven: str) -> None:
        """Speak over this socket; complaints of pages that match a pattern are expected."""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self.tabs: dict[str, Tab] = {}
        self.forgiven = forgiven

    async def read(self) -> None:
        """Hand out replies and events until the connection ends."""
        async for frame in self._socket:
            message = json.loads(frame.data)
            if "id" in message:
                reply = self._replies.pop(message["id"])
                if not reply.done():
                    reply.set_result(message)
            elif tab := self.tabs.get(message.get("sessionId")):
                tab.hear(message["method"], message["params"])

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Give a command and return its result."""
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        target = {"sessionId": session} if session else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **target})
        async with asyncio.timeout(PATIENCE):
            message = await reply
        if "error" in message:
            raise PageError(method, message["error"])
        return message["result"]

    async def tab(self, url: str, beside: "Tab | None" = None, *, phone: bool = False) -> "Tab":
        """Open a page on a machine of its own, or beside another, with which it shares all."""
        if beside:
            context = beside.context
        else:
            context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        where: dict[str, Any] = {"url": "about:blank", "browserContextId": context}
        target = await self.call("Target.createTarget", newWindow=True, **where)
        opened = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = self.tabs[opened["sessionId"]] = Tab(self, opened["sessionId"], context)
        for domain in ("Page", "Runtime", "Log"):
            await tab.call(f"{domain}.enable")
        width, height = (390, 844) if phone else (1200, 800)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await tab.call("Emulation.setDeviceMetricsOverride", **size)
        await tab.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        await tab.go(url)
        return tab


class Tab:
    """A page in a window: what it shows, the hands on its mouse and keyboard, its console."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        """Drive the page behind this session, in a context of the browser."""
        self._browser = browser
        self._session = session
        self.context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self._files: dict[str, bytes] = {}
        self.problems: list[str] = []

    async def call(self, method: str, **params: Any) -> Any:
        """Give a command to this tab."""
        return await self._browser.call(method, self._session, **params)

    def hear(self, event: str, params: dict[str, Any]) -> None:
        """Remember complaints, and answer requests that `intercept` stopped."""
        level = params.get("type") or params.get("entry", {}).get("level")
        if event == "Runtime.exceptionThrown" or level in ("error", "warning"):
            self.problems.append(json.dumps(params))
        elif event == "Fetch.requestPaused":
            task = asyncio.create_task(self._answer(params["requestId"], params["request"]["url"]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def intercept(self, pattern: str, files: Mapping[str, bytes]) -> None:
        """Answer requests to such URLs with these files, and let all others of them fail."""
        self._files = dict(files)
        await self.call("Fetch.enable", patterns=[{"urlPattern": pattern}])

    async def _answer(self, request: str, url: str) -> None:
        """Answer a request in the place of the host that it was meant for."""
        name = url.rsplit("/", 1)[1]
        if name not in self._files:
            why = "AddressUnreachable"
            await self.call("Fetch.failRequest", requestId=request, errorReason=why)
            return
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        headers = {"Content-Type": kind, "Access-Control-Allow-Origin": "*"}
        listed = [{"name": key, "value": value} for key, value in headers.items()]
        body = base64.b64encode(self._files[name]).decode()
        answer = {"responseCode": 200, "responseHeaders": listed, "body": body}
        await self.call("Fetch.fulfillRequest", requestId=request, **answer)

    @contextmanager
    def forgiving(self, pattern: str) -> Iterator[list[str]]:
        """Take complaints that match the pattern out of what the block adds to the console."""
        before = len(self.problems)
        forgiven: list[str] = []
        yield forgiven
        later, self.problems[before:] = self.problems[before:], []
        for problem in later:
            (forgiven if re.search(pattern, problem) else self.problems).append(problem)

    async def go(self, url: str) -> None:
        """Load a page, or go to another place in it."""
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def reload(self) -> None:
        """Load the page again."""
        await self.js("window.isOld = true")
        await self.call("Page.reload")
        await self.wait("!window.isOld && document.readyState === 'complete'")

    async def js(self, code: str) -> Any:
        """Return the value of an expression in the page; an element is just true."""
        code = f"((value) => value instanceof Node || value)({code})"
        how = {"awaitPromise": True, "returnByValue": True, "includeCommandLineAPI": True}
        answer = await self.call("Runtime.evaluate", expression=code, **how)
        if "exceptionDetails" in answer:
            raise PageError(code, answer["exceptionDetails"])
        return answer["result"].get("value")

    async def wait(
        self, code: str, patience: float = PATIENCE, fits: Callable[[Any], bool] = bool
    ) -> Any:
        """Wait until an expression is true, or fits, and return its value."""
        deadline, value = time.monotonic() + patience, None
        while True:
            with suppress(PageError):
                if fits(value := await self.js(code)):
                    return value
            late = time.monotonic() > deadline
            assert not late, f"{code} is {value!r}; {self.problems}; {await self.js(PAGE)}"
            await asyncio.sleep(0.02)

    async def equals(self, code: str, wanted: object, patience: float = PATIENCE) -> None:
        """Wait until an expression has just this value."""
        await self.wait(code, patience, lambda value: bool(value == wanted))

    async def reads(self, selector: str, *texts: str) -> None:
        """Wait until such elements say just this, one after another."""
        code = f"$$({json.dumps(selector)}).map((el) => el.textContent)"
        await self.equals(code, list(texts))

    async def _spot(self, selector: str) -> dict[str, Any]:
        """Wait until nothing covers the middle of an element, and return where that is."""
        x, y = await self.wait(
            f"""((el) => {{
                el.scrollIntoView({{ block: 'nearest' }});
                const box = el.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return el.contains(document.elementFromPoint(x, y)) && [x, y];
            }})($({json.dumps(selector)}))"""
        )
        return {"x": x, "y": y}

    async def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        spot = await self._spot(selector)
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", **spot)

    async def click(self, selector: str) -> None:
        """Click on an element with the mouse."""
        spot = await self._spot(selector) | {"button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, **spot)

    async def tap(self, selector: str) -> None:
        """Touch an element with a finger."""
        spot = await self._spot(selector)
        await self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[spot])
        await self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    async def type(self, text: str, *keys: str) -> None:
        """Type into what has the focus, and press keys."""
        await self.call("Input.insertText", text=text)
        await self.press(*keys)

    async def fill(self, selector: str, text: str, *keys: str) -> None:
        """Click into a field, type in the place of what it says, and press keys."""
        await self.click(selector)
        await self.js(f"$({json.dumps(selector)}).select()")
        await self.type(text, *keys)

    async def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys, one after another, and let them go."""
        for key in keys:
            stroke = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            stroke["modifiers"] = 8 if shift else 0
            text = {"text": "\r"} if key == "Enter" else {}
            await self.call("Input.dispatchKeyEvent", type="keyDown", **stroke, **text)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)


@asynccontextmanager
async def connected(address: str, forgiven: str) -> AsyncIterator[Browser]:
    """Speak to a browser in the block; in the end no page has complained but as forgiven."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
        asyncio.TaskGroup() as tasks,
    ):
        browser = Browser(socket, forgiven)
        reading = tasks.create_task(browser.read())
        yield browser
        problems = [each for tab in browser.tabs.values() for each in tab.problems]
        reading.cancel()
    assert [each for each in problems if not re.search(browser.forgiven, each)] == []


@asynccontextmanager
async def browsing(path: str, forgiven: str = "$^") -> AsyncIterator[Browser]:
    """Run a browser with a fresh profile for as long as the block lasts, and speak to it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        file = Path(profile, "DevToolsActivePort")
        command, folder = (path, *FLAGS, f"--user-data-dir={profile}"), Path(profile)
        async with started(*command, folder=folder, errors=subprocess.DEVNULL):
            await until(lambda: file.exists() and "/" in file.read_text(), "Chromium", PATIENCE)
            port, place = file.read_text().split()
            async with connected(f"ws://127.0.0.1:{port}{place}", forgiven) as browser:
                yield browser
