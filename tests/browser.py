"""A real Chromium without a window, driven over its DevTools protocol.

One browser serves a whole run. Each tab lives in a context of its own, as if on a machine of its
own, and remembers what its console complains about.
"""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--no-first-run", "--no-proxy-server", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--lang=en-GB"),
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "Home": 36}
PATIENCE = 20.0


def program() -> str | None:
    """Return where Chromium is installed, if it is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Chromium:
    """The process of a browser, with a fresh profile."""

    def __init__(self, path: str) -> None:
        """Start it."""
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._popen = subprocess.Popen(  # noqa: S603
            [path, *FLAGS, f"--user-data-dir={self._profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def address(self) -> str:
        """Wait until it can be spoken to, and return the URL of its WebSocket."""
        file = Path(self._profile, "DevToolsActivePort")
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(FileNotFoundError, ValueError):
                port, path = file.read_text().split()
                return f"ws://127.0.0.1:{port}{path}"
            assert self._popen.poll() is None, "Chromium did not start"
            assert time.monotonic() < deadline, "Chromium does not listen"
            time.sleep(0.02)

    def close(self) -> None:
        """End it, and throw its profile away."""
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGTERM)
        try:
            self._popen.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait(5)
        shutil.rmtree(self._profile, ignore_errors=True)


class PageError(Exception):
    """The browser refused a command, or a script in the page failed."""


class Browser:
    """One test's connection to the browser, and the tabs that the test opened."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Speak over this socket."""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._contexts: list[str] = []
        self.tabs: dict[str, Tab] = {}
        self.forgiven = "$^"  # the pattern of complaints that the test expects

    def problems(self, *forgiven: str) -> list[str]:
        """Return what the pages complained about, but for what is forgiven."""
        pattern = "|".join([self.forgiven, *forgiven])
        found = [each for tab in self.tabs.values() for each in tab.problems]
        return [each for each in found if not re.search(pattern, each)]

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

    async def tab(
        self,
        url: str,
        width: int = 1200,
        height: int = 800,
        beside: "Tab | None" = None,
        **media: Any,
    ) -> "Tab":
        """Open a page in a window of its own, or in one more tab beside another.

        Tabs beside each other share what the browser keeps; `phone` and `dark` may be true.
        """
        if beside:
            context = beside.context
        else:
            context = (await self.call("Target.createBrowserContext"))["browserContextId"]
            self._contexts.append(context)
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        session = attached["sessionId"]
        tab = self.tabs[session] = Tab(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.call(f"{domain}.enable")
        await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await tab.look(width, height, **media)
        await tab.go(url)
        return tab

    async def close(self) -> None:
        """Close the windows that are open."""
        while self._contexts:
            context = self._contexts.pop()
            await self.call("Target.disposeBrowserContext", browserContextId=context)


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

    # --- The wire

    async def call(self, method: str, **params: Any) -> Any:
        """Give a command to this tab."""
        return await self._browser.call(method, self._session, **params)

    def hear(self, event: str, params: dict[str, Any]) -> None:
        """Remember complaints, and answer requests that `intercept` stopped."""
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", str(details)))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str([each.get("value") for each in params["args"]]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.problems.append(f"{entry['text']} ({entry.get('url', '')})")
        elif event == "Fetch.requestPaused":
            task = asyncio.create_task(self._answer(params))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def intercept(self, pattern: str, files: Mapping[str, bytes]) -> None:
        """Answer requests to such URLs with these files, and let all others of them fail."""
        self._files = dict(files)
        await self.call("Fetch.enable", patterns=[{"urlPattern": pattern}])

    async def _answer(self, paused: dict[str, Any]) -> None:
        """Answer a request in the place of the host that it was meant for."""
        request, name = paused["requestId"], paused["request"]["url"].rsplit("/", 1)[1]
        if name not in self._files:
            await self.call(
                "Fetch.failRequest", requestId=request, errorReason="AddressUnreachable"
            )
            return
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        headers = {"Content-Type": kind, "Access-Control-Allow-Origin": "*"}
        await self.call(
            "Fetch.fulfillRequest",
            requestId=request,
            responseCode=200,
            responseHeaders=[{"name": name, "value": value} for name, value in headers.items()],
            body=base64.b64encode(self._files[name]).decode(),
        )

    @contextmanager
    def forgiving(self, pattern: str) -> Iterator[list[str]]:
        """Take complaints that match the pattern out of what the block adds to the console."""
        before = len(self.problems)
        forgiven: list[str] = []
        yield forgiven
        later, self.problems[before:] = self.problems[before:], []
        for problem in later:
            (forgiven if re.search(pattern, problem) else self.problems).append(problem)

    # --- Looking

    async def look(
        self, width: int, height: int, *, phone: bool = False, dark: bool = False
    ) -> None:
        """Give the window a size and the system a colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        await self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def go(self, url: str) -> None:
        """Load a page, or go to another place in it."""
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def js(self, code: str) -> Any:
        """Return the value of an expression in the page; an element is just true."""
        code = f"((value) => value instanceof Node || value)({code})"
        answer = await self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise PageError(code, answer["exceptionDetails"])
        return answer["result"].get("value")

    async def wait(self, code: str, patience: float = PATIENCE) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + patience
        while True:
            with suppress(PageError):
                if value := await self.js(code):
                    return value
            assert time.monotonic() < deadline, await self._missed(code)
            await asyncio.sleep(0.02)

    async def equals(self, code: str, wanted: object, patience: float = PATIENCE) -> None:
        """Wait until an expression has just this value."""
        deadline, value = time.monotonic() + patience, None
        while time.monotonic() < deadline:
            with suppress(PageError):
                value = await self.js(code)
                if value == wanted:
                    return
            await asyncio.sleep(0.02)
        assert value == wanted, await self._missed(code)

    async def _missed(self, code: str) -> str:
        """Return what there was in the place of what was waited for."""
        with suppress(PageError):
            text = await self.js("document.body.innerText")
            return f"waited for {code}; the page: {text[:1000]!r}; its console: {self.problems}"
        return f"waited for {code}; its console: {self.problems}"

    async def close(self) -> None:
        """Close the tab as its user would."""
        await self.call("Page.close")

    async def screenshot(self, path: Path) -> None:
        """Write a picture of the window."""
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    # --- Hands

    async def _spot(self, selector: str) -> dict[str, Any]:
        """Wait until nothing covers the middle of an element, and return where that is."""
        x, y = await self.wait(
            f"""(() => {{
                const el = document.querySelector({json.dumps(selector)});
                el.scrollIntoView({{ block: 'nearest' }});
                const box = el.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                return el.contains(document.elementFromPoint(x, y)) && [x, y];
            }})()"""
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

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def fill(self, selector: str, text: str) -> None:
        """Click into a field and type in the place of what it says."""
        await self.click(selector)
        await self.js(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            await self.type(text)
        else:
            await self.call("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete")

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key and let it go."""
        stroke: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        stroke["modifiers"] = 8 if shift else 0
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **stroke, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **stroke)


@asynccontextmanager
async def connected(address: str, *forgiven: str) -> AsyncIterator[Browser]:
    """Speak to a browser in the block; in the end no page has complained but as forgiven."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
        asyncio.TaskGroup() as tasks,
    ):
        browser = Browser(socket)
        reading = tasks.create_task(browser.read())
        yield browser
        problems = browser.problems(*forgiven)
        await browser.close()
        reading.cancel()
    assert problems == []


@asynccontextmanager
async def browsing(path: str, *forgiven: str) -> AsyncIterator[Browser]:
    """Run a browser for as long as the block lasts, and speak to it."""
    chromium = Chromium(path)
    try:
        async with connected(chromium.address(), *forgiven) as browser:
            yield browser
    finally:
        chromium.close()
