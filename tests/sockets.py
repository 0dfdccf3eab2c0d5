"""Sockets as the tests hold them: `Socket` speaks the protocol, `Wire` is nothing but bytes."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import pytest
from aiohttp import WSMsgType
from yarl import URL

from tests.words import NUMBERED, PATIENCE, Event, is_refusal, tell, unique

if TYPE_CHECKING:
    from tests.helpers import Room, Server, User


class Frames:
    """What goes over an open socket; each numbered event is held against the one before it."""

    def __init__(self, after: Any = None) -> None:
        """Begin after the number that is asked for, else after that in the hello."""
        self.after = after
        self.frames: list[Event] = []
        self.cursor: int | None = None  # the number of the event that came last
        self.code: int | None = None
        self.reason = ""

    async def open(self, session: aiohttp.ClientSession, url: URL, token: str = "") -> None:
        """Connect; with a token one is logged in, and waits for the hello."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        patience = aiohttp.ClientWSTimeout(ws_close=1)
        self.ws = await session.ws_connect(url, headers=headers, max_msg_size=0, timeout=patience)
        if token:
            await self.hears(type="hello")

    async def send(self, **frame: Any) -> None:
        """Send a frame."""
        await self.ws.send_json(frame)

    async def say(self, text: str, **more: Any) -> Event:
        """Send a message, and wait until it comes back: then it is stored."""
        client_id = more.setdefault("client_id", unique("id"))
        await self.send(message=text, **more)
        return await self.hears(text, client_id=client_id)

    async def next(self, patience: float = PATIENCE) -> Event:
        """Return the next frame, of whatever type; events come in order, without a gap."""
        message = await self.ws.receive(timeout=patience)
        if message.type is not WSMsgType.TEXT:
            closed = message.type is WSMsgType.CLOSE
            self.code = message.data if closed else self.ws.close_code or 1006
            self.reason = str(message.extra or "")
            raise ConnectionResetError(self.code, self.reason)
        frame: Event = json.loads(message.data)
        self.frames.append(frame)
        if frame["type"] == "hello":
            self.cursor = frame["seq"] if self.after is None else self.after
        elif frame["type"] == "reset":
            self.cursor = frame["seq"]
        elif frame["type"] in NUMBERED:
            assert self.cursor is not None, f"before hello: {frame}"
            assert frame["seq"] == self.cursor + 1, f"after {self.cursor}: {frame}"
            self.cursor = frame["seq"]
        return frame

    async def hears(
        self, message: str | None = None, patience: float = PATIENCE, **fields: Any
    ) -> Event:
        """Read until a frame comes that has this text, or these fields."""
        wanted = fields if message is None else {"type": "message", "message": message, **fields}
        began = len(self.frames)
        try:
            async with asyncio.timeout(patience):
                while not wanted.items() <= (await self.next(patience)).items():
                    pass
        except (TimeoutError, ConnectionResetError) as error:
            pytest.fail(f"{wanted} did not come but {self.frames[began:]} and {error!r}")
        return self.frames[-1]

    async def reaches(self, seq: int) -> None:
        """Read until the event of this number has come."""
        async with asyncio.timeout(PATIENCE):
            while self.cursor is None or self.cursor < seq:
                await self.next()

    async def is_closed(self, patience: float = PATIENCE) -> int:
        """Read on until the server closes; return the code, 1006 without a close frame."""
        async with asyncio.timeout(patience):
            with suppress(ConnectionResetError):
                while True:
                    await self.next(patience)
        assert self.code is not None
        return self.code

    def heard(self, **fields: Any) -> list[Event]:
        """Return the frames so far that have these fields."""
        return [frame for frame in self.frames if fields.items() <= frame.items()]

    @property
    def hello(self) -> Event:
        """Return the greeting."""
        return self.heard(type="hello")[-1]

    @property
    def events(self) -> list[Event]:
        """Return the numbered events so far."""
        return [frame for frame in self.frames if frame["type"] in NUMBERED]

    async def leave(self) -> None:
        """Close in the orderly way, and wait a second at most for the server to do so too."""
        await self.ws.close()


class Socket(Frames):
    """A user's socket to a room."""

    def __init__(self, user: "User", room: "Room", **query: Any) -> None:
        """Prepare to connect; `after` and `epoch` go into the query."""
        super().__init__(query.get("after"))
        self.user, self.room, self.query = user, room, query
        self.name = user.name

    async def connect(self, *, header: bool = True) -> Self:
        """Connect; with the header one is logged in."""
        server = self.user.server
        query = "&".join(f"{name}={value}" for name, value in self.query.items())
        url = server.url(f"/websockets/chat/{self.room.room_id}?{query}")
        await self.open(server.client.session, url, self.user.token if header else "")
        server.sockets.append(self)
        return self

    async def say_all(self, texts: Iterable[str]) -> None:
        """Send messages one upon another, and wait until all have come back."""
        client_id = ""
        for text in texts:
            client_id = unique("id")
            await self.send(message=text, client_id=client_id)
        await self.hears(client_id=client_id)

    async def ask(self, code: str = "", **frame: Any) -> Event:
        """Send a frame that is refused; return the error, which names the frame."""
        await self.send(**frame)
        return await self.is_refused(code)

    async def is_refused(self, code: str = "") -> Event:
        """Wait for an error, check its shape and return it."""
        error = await self.hears(type="error")
        is_refusal(error, code)
        return error

    @property
    def story(self) -> list[str]:
        """Return the events so far in a few words."""
        return [tell(event) for event in self.events]

    def drop(self) -> None:
        """Lose the connection, as in a tunnel: no close frame says good-bye."""
        self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


class Wire:
    """A connection with no library around it: to stall, to send nonsense, to see each byte."""

    def __init__(self, server: "Server", buffer: int = 0) -> None:
        """Prepare a connection; `buffer` is how many bytes the kernel takes in unread."""
        self.server = server
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(0)

    async def __aenter__(self) -> Self:
        """Connect."""
        url = self.server.url("/")
        await asyncio.get_running_loop().sock_connect(self.socket, (url.host, url.port))
        self.reader, self.writer = await asyncio.open_connection(sock=self.socket, limit=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut the connection."""
        self.writer.transport.abort()
        with suppress(OSError):
            await self.writer.wait_closed()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def head(self) -> bytes:
        """Return the head of an answer."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(b"\r\n\r\n")

    def request(
        self, user: "User", path: str, body: bytes, *more: str, method: str = "POST"
    ) -> None:
        """Send a request with a body of JSON, and more headers."""
        lines = [
            *(f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"),
            *(f"Authorization: Bearer {user.token}", f"Content-Length: {len(body)}", *more),
        ]
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    async def upgrade(self, user: "User", room: "Room", query: str = "") -> Self:
        """Become a user's socket to a room, of which nothing is read yet."""
        path = f"/websockets/chat/{room.room_id}{query}"
        headers = [f"{name}: {value}" for name, value in UPGRADE.items()]
        self.request(user, path, b"", *headers, method="GET")
        assert (await self.head()).startswith(b"HTTP/1.1 101 ")
        return self

    def frame(self, payload: bytes, opcode: int = WSMsgType.TEXT, first: int = 0x80) -> None:
        """Send one frame, masked with zeros."""
        size = len(payload)
        length = b"\xff" + size.to_bytes(8, "big")
        if size < 2**16:
            length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.send(bytes([first | opcode]) + length + bytes(4) + payload)

    async def frames(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the opcode and payload of each frame, until the connection ends."""
        with suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                async with asyncio.timeout(PATIENCE):
                    first, size = await self.reader.readexactly(2)
                    if size > 125:
                        wide = await self.reader.readexactly(2 if size == 126 else 8)
                        size = int.from_bytes(wide, "big")
                    payload = await self.reader.readexactly(size)
                yield first & 15, payload

    async def close_code(self) -> int:
        """Read to the end; return the code of the close frame, 1006 if there is none."""
        async with asyncio.timeout(PATIENCE):
            async for opcode, payload in self.frames():
                if opcode == WSMsgType.CLOSE:
                    return int.from_bytes(payload[:2], "big")
        return 1006
