"""Bad weather between a browser and the server: a proxy that falls silent, refuses, loses."""

import asyncio
import re
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from tests.words import until

WRITING = re.compile(rb"(POST|PUT|PATCH|DELETE) ")
PORTAL = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<h1>Welcome</h1>"


@dataclass(eq=False)
class Connection:
    """One connection of the browser, with one to the server behind it."""

    ends: list[StreamWriter]  # the browser's and the server's
    upgrade: bool = False
    silent: bool = False
    losing: bool = False

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
        self.weather = "sunny"  # away: there is no network; portal: somebody else's page answers;
        # refusing: it does so to WebSockets alone; hanging: nothing does
        self.lose_answers = 0  # so many changes reach the server, and their answers nobody

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{self.target.path}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut everything and stop listening."""
        self.turn("away")
        self.server.close()
        await until(lambda: not self.connections, "the ends of the connections")

    def turn(self, weather: str) -> None:
        """Change the weather, for what is open, too."""
        self.weather = weather
        for connection in self.connections:
            if weather in ("away", "portal") or (weather == "refusing" and connection.upgrade):
                connection.cut()

    def silence(self) -> None:
        """Let the open WebSockets fall silent without closing them."""
        for connection in self.connections:
            connection.silent = connection.upgrade

    async def _accept(self, near: StreamReader, client: StreamWriter) -> None:
        """Take a connection: answer in the server's place, or pass everything on until it ends."""
        connection = Connection([client])
        self.connections.add(connection)
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await near.readuntil(b"\r\n\r\n")
            connection.upgrade = b"\r\nupgrade: websocket" in head.lower()
            if self.weather == "portal" or (self.weather == "refusing" and connection.upgrade):
                client.write(PORTAL)
            elif self.weather == "hanging" and connection.upgrade:
                await near.read()
            elif self.weather != "away":
                far, server = await asyncio.open_connection(self.target.hostname, self.target.port)
                connection.ends.append(server)
                up = self._pass(connection, near, server, head)
                await asyncio.gather(up, self._pass(connection, far, client))
            await client.drain()
        self.connections.discard(connection)
        connection.cut()

    async def _pass(
        self, connection: Connection, source: StreamReader, sink: StreamWriter, data: bytes = b""
    ) -> None:
        """Pass one direction on, as the weather is."""
        to_server = sink is not connection.ends[0]
        with suppress(OSError):
            while data := data or await source.read(1 << 16):
                if to_server and self.lose_answers and WRITING.match(data):
                    self.lose_answers -= 1
                    connection.losing = True
                if connection.losing and not to_server:
                    break
                if not connection.silent:
                    sink.write(data)
                    await sink.drain()
                data = b""
        if not connection.silent:  # else nobody hears of its end either
            connection.cut()
