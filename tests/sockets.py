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
    """A socket and what goes over it; each numbered event is held against the one before it."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, token: str) -> None:
        """Prepare to connect; without a token the first frame still has to log in."""
        self.session, self.url, self.token = session, url, token
        self.frames: list[Event] = []
        self.cursor: int | None = None  # the number of the event that came last
        self.code, self.reason = 0, ""  # what it was closed with

    async def connect(self) -> Self:
        """Connect, and wait for the hello when logged in."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        how: Any = {"max_msg_size": 0, "timeout": aiohttp.ClientWSTimeout(ws_close=1)}
        self.ws = await self.session.ws_connect(self.url, headers=headers, **how)
        if self.token:
            await self.hears(type="hello")
        return self

    async def leave(self, *_: object) -> None:
        """Close in the orderly way, and wait a second at most for the server to do so too."""
        await self.ws.close()

    __aenter__ = connect
    __aexit__ = leave

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
        if frame["type"] in ("hello", "reset"):
            after = self.url.query.get("after") if frame["type"] == "hello" else None
            self.cursor = int(after or frame["seq"])
        elif frame["type"] in NUMBERED:
            assert self.cursor is not None, f"before hello: {frame}"
            assert frame["seq"] == self.cursor + 1, f"after {self.cursor}: {frame}"
            self.cursor = frame["seq"]
        return frame

    async def hears(self, message: str = "", patience: float = PATIENCE, **fields: Any) -> Event:
        """Read until a frame comes that has this text, or these fields."""
        wanted = {"type": "message", "message": message, **fields} if message else fields
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
        while self.cursor is None or self.cursor < seq:
            await self.next()

    async def is_closed(self, patience: float = PATIENCE) -> int:
        """Read on until the server closes; return the code, 1006 without a close frame."""
        async with asyncio.timeout(patience):
            with suppress(ConnectionResetError):
                while True:
                    await self.next(patience)
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


class Socket(Frames):
    """A user's socket to a room."""

    def __init__(self, user: "User", room: "Room", **query: Any) -> None:
        """Prepare to connect; `after` and `epoch` go into the query."""
        self.user, self.room, self.name = user, room, user.name
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        url = user.server.url(f"/websockets/chat/{room.room_id}?{asked}")
        super().__init__(user.server.client.session, url, user.token)

    async def connect(self, *, header: bool = True) -> Self:
        """Connect; with the header one is logged in."""
        self.token = self.user.token if header else ""
        self.user.server.sockets.append(await super().connect())
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


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket"}
UPGRADE |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}


class Wire:
    """A connection with no library around it: to stall, to send nonsense, to see each byte."""

    def __init__(self, server: "Server", buffer: int = 0) -> None:
        """Prepare a connection; `buffer` is how many bytes the kernel takes in unread."""
        self.url, self.socket = server.url("/"), socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)

    async def __aenter__(self) -> Self:
        """Connect."""
        self.socket.connect((self.url.host, self.url.port))
        self.reader, self.writer = await asyncio.open_connection(sock=self.socket, limit=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut the connection."""
        self.writer.transport.abort()

    def request(
        self, user: "User", path: str, body: bytes, *more: str, method: str = "POST"
    ) -> None:
        """Send a request with a body of JSON, and more headers."""
        start, who = f"{method} {path} HTTP/1.1", f"Authorization: Bearer {user.token}"
        what = ("Content-Type: application/json", f"Content-Length: {len(body)}")
        lines = [start, "Host: localhost", who, *what, *more, "", ""]
        self.writer.write("\r\n".join(lines).encode() + body)

    async def upgrade(self, user: "User", room: "Room", query: str = "") -> Self:
        """Become a user's socket to a room, of which nothing is read yet."""
        headers = [f"{name}: {value}" for name, value in UPGRADE.items()]
        self.request(user, f"/websockets/chat/{room.room_id}{query}", b"", *headers, method="GET")
        async with asyncio.timeout(PATIENCE):
            assert (await self.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        return self

    def frame(self, payload: bytes, opcode: int = WSMsgType.TEXT) -> None:
        """Send one frame, masked with zeros."""
        size = len(payload)
        length = b"\xff" + size.to_bytes(8, "big")
        if size < 2**16:
            length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        self.writer.write(bytes([0x80 | opcode]) + length + bytes(4) + payload)

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
        async for opcode, payload in self.frames():
            if opcode == WSMsgType.CLOSE:
                return int.from_bytes(payload[:2], "big")
        return 1006
