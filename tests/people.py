"""People who use real processes of the server, over HTTP and sockets, at one or another."""

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, Protocol, Self

import aiohttp
from yarl import URL

from tests.words import PASSWORD, PATIENCE, Event

LOST = (aiohttp.ClientError, OSError, TimeoutError)  # what clients meet when a process is gone


class Place(Protocol):
    """A running server, be it a process or a part of this one."""

    @property
    def url(self) -> str:
        """Return where it listens at the moment."""


class At(NamedTuple):
    """A server at an address that stays."""

    url: str


class User(NamedTuple):
    """Somebody with an account, who talks to one server or another."""

    session: aiohttp.ClientSession
    place: Place
    name: str
    token: str

    def at(self, place: Place) -> "User":
        """Return the same user as one who talks to another server."""
        return self._replace(place=place)

    async def ask(self, method: str, path: str, body: Any = None, status: int = 0) -> Any:
        """Send a request; return the JSON of this status, or of any success."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.place.url + path
        async with self.session.request(method, url, json=body, headers=headers) as answer:
            text = await answer.text()
            fits = answer.status == status if status else answer.status < 300
            assert fits, f"{method} {path}: {answer.status} {text[:300]}"
        return json.loads(text or "null")

    async def room(self, *members: "User", **more: Any) -> str:
        """Make a room with these members in it; return its id."""
        name = str(more.pop("room_id", f"room-{secrets.token_hex(4)}"))
        await self.ask("POST", "/rooms", {"room_id": name, "name": name, **more})
        for member in members:
            await self.ask("PUT", f"/rooms/{name}/members/{member.name}", {"role": "member"})
        return name

    async def say(self, room: str, text: str, **more: Any) -> Event:
        """Post a message; return its event."""
        event: Event = await self.ask("POST", f"/rooms/{room}/messages", {"message": text, **more})
        return event

    async def log(self, room: str, log: list[Event] | None = None) -> list[Event]:
        """Return the log of a room, into a list if one is given, as a socket tells it."""
        log = [] if log is None else log
        async with self.chat(room, "?after=0") as chat:
            while not log or log[-1]["seq"] < chat.hello["seq"]:
                frame = await chat.next()
                if "created_at" in frame:
                    log.append(frame)
        return log

    def chat(self, room: str, query: str = "", token: str | None = None) -> "Chat":
        """Open a socket to a room."""
        return Chat(self, room, query, self.token if token is None else token)


async def enrol(session: aiohttp.ClientSession, place: Place, *names: str) -> list[User]:
    """Return people with fresh accounts; their passwords are hashed side by side."""

    async def join(word: str) -> User:
        """Register and log in."""
        name = f"{word}-{secrets.token_hex(4)}"
        form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
        await User(session, place, name, "").ask("POST", "/auth/register", form)
        login = await User(session, place, name, "").ask("POST", "/auth/token", form)
        return User(session, place, name, login["access_token"])

    return await asyncio.gather(*map(join, names))


@asynccontextmanager
async def company(place: Place, *names: str) -> AsyncIterator[list[User]]:
    """Give people with fresh accounts and one client session between them."""
    timeout = aiohttp.ClientTimeout(total=40)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield await enrol(session, place, *names)


def below(ws: Any) -> Any:
    """Return the transport below a socket, to stall it or to see what waits."""
    return ws._response.connection.transport  # noqa: SLF001


def close_code(message: aiohttp.WSMessage) -> int:
    """Return the code that the server gave in its last frame, 1006 without one."""
    return int(message.data) if message.type is aiohttp.WSMsgType.CLOSE else 1006


def drop(ws: Any) -> None:
    """Lose a connection as in a tunnel: no close frame says good-bye."""
    below(ws).abort()


class Chat:
    """A socket to one room that remembers what it has seen."""

    def __init__(self, user: User, room: str, query: str, token: str) -> None:
        """Prepare a connection; without a token it still has to log in by its first frame."""
        self.url = f"{user.place.url}/websockets/chat/{room}{query}"
        self.session = user.session
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.frames: list[Event] = []
        self.hello: Event = {}

    async def __aenter__(self) -> Self:
        """Connect, and wait for the hello when logged in."""
        self.ws = await self.session.ws_connect(self.url, headers=self.headers, max_msg_size=0)
        if self.headers:
            self.hello = await self.hear("hello")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close in the orderly way, but wait for nobody."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.ws.close()

    async def send(self, **frame: Any) -> None:
        """Send a frame."""
        await self.ws.send_json(frame)

    async def next(self, patience: float = PATIENCE) -> Event:
        """Return the next frame."""
        message = await self.ws.receive(timeout=patience)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise ConnectionResetError(close_code(message), message.extra)
        self.frames.append(json.loads(message.data))
        return self.frames[-1]

    async def hear(self, kind: str, patience: float = PATIENCE, **fields: Any) -> Event:
        """Read until a frame of this type and with these fields comes."""
        async with asyncio.timeout(patience):
            while True:
                frame = await self.next(patience)
                if {"type": kind, **fields}.items() <= frame.items():
                    return frame

    async def hear_any(self, kind: str, patience: float = PATIENCE, **fields: Any) -> Event:
        """Return the newest frame of this type with these fields, or read until one comes."""
        wanted = {"type": kind, **fields}.items()
        seen = [frame for frame in self.frames if wanted <= frame.items()]
        return seen[-1] if seen else await self.hear(kind, patience, **fields)

    async def hear_of(self, client_id: str, patience: float = PATIENCE) -> Event:
        """Read until a frame answers this client_id: its event, an ack or an error."""
        async with asyncio.timeout(patience):
            while (frame := await self.next(patience)).get("client_id") != client_id:
                pass
            return frame

    async def deliver(self, text: str) -> Event:
        """Send a message and wait until it is stored."""
        client_id = secrets.token_hex(4)
        await self.send(message=text, client_id=client_id)
        return await self.hear("message", client_id=client_id)

    async def closed(self, patience: float = PATIENCE) -> int:
        """Read until the server closes; return the code, 1006 without a close frame."""
        async with asyncio.timeout(patience):
            try:
                while True:
                    await self.next(patience)
            except ConnectionResetError as error:
                return int(error.args[0])

    @property
    def numbers(self) -> list[int]:
        """Return the numbers seen so far."""
        return [frame["seq"] for frame in self.frames if "created_at" in frame]


# --- Without a library


def upgrade_request(user: User, room: str, *headers: str) -> bytes:
    """Return a handshake; headers that are given take the place of the usual ones."""
    lines = {
        "host": f"Host: {URL(user.place.url).authority}",
        "connection": "Connection: Upgrade",
        "upgrade": "Upgrade: websocket",
        "sec-websocket-version": "Sec-WebSocket-Version: 13",
        "sec-websocket-key": "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    }
    if user.token:
        lines["authorization"] = f"Authorization: Bearer {user.token}"
    lines |= {header.partition(":")[0].lower(): header for header in headers}
    start = f"GET /websockets/chat/{room} HTTP/1.1"
    return "\r\n".join([start, *lines.values(), "", ""]).encode()


def dial(user: User) -> socket.socket:
    """Connect, with little room for what comes, to stall soon."""
    url = URL(user.place.url)
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(10)
    peer.connect((url.host, url.port))
    return peer


def handshake(user: User, room: str, *headers: str, wanted: bytes = b"101") -> socket.socket:
    """Open a socket to a room, or be refused as wanted; what comes is still to be read."""
    peer = dial(user)
    peer.sendall(upgrade_request(user, room, *headers))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += peer.recv(1)
    assert head.startswith(b"HTTP/1.1 " + wanted), head
    assert b"Sec-WebSocket-Extensions" not in head and b"Sec-WebSocket-Protocol" not in head
    return peer
