"""Bad weather between a browser and the server: a proxy that delays, falls silent, refuses.

HTTP and WebSockets pass through it as they are, until it is told otherwise; then they meet what
people meet on trains, behind company firewalls and in hotels.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

UPGRADE = re.compile(rb"(?i)\r\nupgrade: *websocket")
WRITING = re.compile(rb"(POST|PUT|PATCH|DELETE) ")
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
PORTAL = b"<!doctype html><title>Welcome on board</title>"
WELCOME = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(PORTAL), PORTAL)
)


class Connection:
    """One connection of the browser, with one to the server behind it."""

    def __init__(self, near: asyncio.StreamWriter, head: bytes) -> None:
        """Keep what was asked for first."""
        self.ends = [near]
        self.upgrade = bool(UPGRADE.search(head))
        self.silent = False
        self.losing = False

    def cut(self) -> None:
        """Cut both sides without a word."""
        for end in self.ends:
            end.transport.abort()


class Rain:
    """A proxy in front of a server; its attributes are the weather."""

    def __init__(self, url: str) -> None:
        """Stand before the server at this URL; at first the sun shines."""
        self.target = urlsplit(url)
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.upgrades = "pass"  # or refuse, or hang: they are never answered
        self.delay = 0.0  # seconds that each piece takes, in each direction
        self.portal = False  # somebody else's page answers whatever is asked
        self.lose_answers = 0  # so many changes reach the server, and their answers nobody
        self._away = False

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut everything and stop listening."""
        self.away = True
        for listener in self.server.sockets:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        # asyncio leaves a connection open that is being accepted while its server closes.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # --- The weather

    @property
    def away(self) -> bool:
        """Tell whether there is no network at all."""
        return self._away

    @away.setter
    def away(self, now: bool) -> None:
        """Lose the network, or find it again."""
        self._away = now
        if now:
            self._cut(lambda _: True)

    def silence(self) -> int:
        """Let the open WebSockets fall silent without closing them; return how many."""
        sockets = [each for each in self.connections if each.upgrade]
        for connection in sockets:
            connection.silent = True
        return len(sockets)

    def refuse_upgrades(self) -> None:
        """Allow no WebSocket any more, neither a new one nor those that are open."""
        self.upgrades = "refuse"
        self._cut(lambda connection: connection.upgrade)

    def open_portal(self) -> None:
        """Let somebody else's page answer from now on."""
        self.portal = True
        self._cut(lambda _: True)

    # --- What it does to connections

    def _cut(self, which: Callable[[Connection], bool]) -> None:
        """Cut some of the connections."""
        for connection in [each for each in self.connections if which(each)]:
            connection.cut()

    async def _accept(self, near: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Take a connection from its first request to its end."""
        task = asyncio.current_task()
        assert task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if self.away:
                client.transport.abort()
                return
            head = await near.readuntil(b"\r\n\r\n")
            connection = Connection(client, head)
            self.connections.add(connection)
            try:
                await self._serve(connection, near, head)
            finally:
                self.connections.discard(connection)
                connection.cut()

    async def _serve(self, connection: Connection, near: asyncio.StreamReader, head: bytes) -> None:
        """Answer in the server's place, or pass everything on."""
        client = connection.ends[0]
        if self.portal:
            client.write(WELCOME)
            await client.drain()
            client.close()
        elif connection.upgrade and self.upgrades == "refuse":
            client.write(FORBIDDEN)
            await client.drain()
            client.close()
        elif connection.upgrade and self.upgrades == "hang":
            await near.read()
        else:
            host, port = self.target.hostname, self.target.port
            far, server = await asyncio.open_connection(host, port)
            connection.ends.append(server)
            await asyncio.gather(
                self._pass(connection, near, server, head),
                self._pass(connection, far, client, b""),
            )

    async def _pass(
        self,
        connection: Connection,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        data: bytes,
    ) -> None:
        """Pass one direction on, as the weather is."""
        to_server = sink is not connection.ends[0]
        with suppress(OSError):
            while data := data or await source.read(1 << 16):
                await asyncio.sleep(self.delay)
                if to_server and self.lose_answers and WRITING.match(data):
                    self.lose_answers -= 1
                    connection.losing = True
                if connection.losing and not to_server:
                    break
                if not connection.silent:
                    sink.write(data)
                    await sink.drain()
                data = b""
        connection.cut()
