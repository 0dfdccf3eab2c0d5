"""Real processes of the server, a wire to Postgres that can be cut, and what the kernel knows."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from aiohttp import web

from chatserver import Config
from tests import postgres
from tests.words import KEY, NO_LIMITS, PATIENCE, until

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "chatserver.py"
SETTINGS = {field.name: field.default for field in fields(Config)}
Ends = set[asyncio.StreamWriter]
TROUBLE = ("Traceback", "Warning:", "was never awaited", "was destroyed", "Unclosed ", "never retr")


class Process:
    """One `python chatserver.py` in a folder; what it prints and logs goes into files there."""

    def __init__(
        self, home: Path, *more: str, strict: bool = True, program: Path = PROGRAM, **settings: Any
    ) -> None:
        """Start it; `strict` turns on asyncio's debug mode and makes every warning an error."""
        flags = ["-X", "dev", "-W", "error"] if strict else []
        self.command = [sys.executable, *flags, str(program), *more]
        ours = {name.upper() for name in SETTINGS}
        kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("PYTHON")}
        self.environment = kept | {name.upper(): str(value) for name, value in settings.items()}
        self.folder = home
        self.start()

    def start(self) -> None:
        """Start it, the first time or again with the same settings, in a session of its own."""
        name = self.folder / f"{time.monotonic_ns()}"
        self.out, self.err = name.with_suffix(".out"), name.with_suffix(".err")
        place: Any = {"cwd": self.folder, "env": self.environment, "start_new_session": True}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(self.command, stdout=out, stderr=err, **place)  # noqa: S603
        self.pid = self.popen.pid

    @property
    def log(self) -> str:
        """Return what it has logged so far."""
        return self.err.read_text("utf-8", "replace")

    @property
    def url(self) -> str:
        """Return the address that it has printed, or nothing as long as it does not listen."""
        lines = re.findall(r"(?m)^chatserver listening on (http://\S+)\n", self.out.read_text())
        return lines[0] if lines else ""

    async def ready(self) -> None:
        """Wait until it listens."""
        await until(lambda: self.url or self.popen.poll() is not None, "the line that it listens")
        assert self.popen.poll() is None, self.log

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code, once it and its workers are gone."""
        self.popen.send_signal(how)
        return await self.over()

    async def over(self) -> int:
        """Wait until it and its workers are gone, and return the exit code."""
        await until(lambda: self.popen.poll() is not None, "the end of a process", 5)
        await until(lambda: not session_of(self.pid), "the end of its workers", 1)
        return int(self.popen.returncode)

    def kill(self) -> None:
        """End it and its workers as a power cut would."""
        for pid in session_of(self.pid):
            os.kill(pid, signal.SIGKILL)
        self.popen.wait(PATIENCE)

    async def again(self) -> None:
        """Kill it, if it still runs, and start it again."""
        self.kill()
        self.start()
        await self.ready()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Stop it for as long as the block lasts, as a machine that hangs would."""
        self.popen.send_signal(signal.SIGSTOP)
        yield
        self.popen.send_signal(signal.SIGCONT)


@asynccontextmanager
async def running(
    folder: Path, database: str, *more: str, count: int = 1, clean: bool = True, **settings: Any
) -> AsyncIterator[list[Process]]:
    """Run processes without limits on one database; they stop in order, with clean logs."""
    usual: dict[str, Any] = {"database_url": database, "secret_key": KEY, "port": 0}
    settings = {**NO_LIMITS, **usual, "host": "127.0.0.1", **settings}
    processes = [Process(folder, *more, **settings) for _ in range(count)]
    try:
        for process in processes:
            await process.ready()
        yield processes
        for process in processes:
            if process.popen.poll() is None:
                assert await process.end() == 0, process.log
            for sign in TROUBLE if clean else ():
                before, found, after = process.log.partition(sign)
                assert not found, f"{before[-1000:]}{found}{after[:3000]}"
    finally:
        for process in processes:
            process.kill()


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Run an application in this process on a free port, and yield its address."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# --- Postgres, and a wire to it that can be cut


async def cut_connections(url: str, condition: str = "true") -> int:
    """Cut the connections to this database, or some of them; return how many there were."""
    sql = f"""SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend' AND {condition}"""  # noqa: S608
    return len(await postgres.read(url, sql))


class Wire:
    """A TCP proxy before Postgres that can lose a COMMIT or its answer, and fall silent."""

    def __init__(self, url: str) -> None:
        """Prepare a wire to the Postgres of this URL."""
        self.parts = urlsplit(url)
        self.ends: Ends = set()
        self.listening: Ends = set()  # the clients' ends of connections that LISTEN
        self.muted: Ends = set()  # those of connections on which nothing goes over any more
        self.stalled = False  # nothing goes over any connection
        self.lose = ""  # the side that is lost at the next COMMIT: request or answer

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        account = self.parts.netloc.rpartition("@")[0]
        netloc = f"{account}@127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        # TLS would hide the COMMIT from us.
        self.url = self.parts._replace(netloc=netloc, query="sslmode=disable").geturl()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut everything and stop listening."""
        self.server.close()
        for end in self.ends:
            end.transport.abort()
        await until(lambda: not self.ends, "the ends of the wire")

    async def connect(self, near: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Join a client with Postgres until either ends."""
        far, server = await asyncio.open_connection(self.parts.hostname, self.parts.port)
        ends = {client, server}
        self.ends |= ends
        up = self.pump("request", near, server, ends)
        await asyncio.gather(up, self.pump("answer", far, client, ends))
        self.ends -= ends
        self.listening -= ends

    async def pump(
        self, side: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter, ends: Ends
    ) -> None:
        """Forward one direction, as long as nothing is to be lost in it."""
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if b"\x0bLISTEN\0" in data:  # "it is done", says Postgres
                    self.listening.add(sink)
                while (self.stalled or self.muted & ends) and not sink.transport.is_closing():
                    await asyncio.sleep(0.02)
                if self.lose == side and b"COMMIT" in data.upper():
                    self.lose = ""
                    break
                sink.write(data)
                await sink.drain()
        for end in ends:
            end.transport.abort()


# --- What the kernel knows (on Linux)


def session_of(leader: int) -> set[int]:
    """Return the living processes of a session, the children of a dead leader too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.add(int(path.parent.name))
    return found


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def memory(pid: int) -> int:
    """Return how many bytes of memory are a process's own."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) << 10
