"""People who use real processes of the server, over HTTP and sockets, at one or another."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self

import aiohttp
from yarl import URL

from tests.processes import Process
from tests.sockets import UPGRADE, Frames
from tests.words import PASSWORD, PATIENCE, Event, unique

LOST = (aiohttp.ClientError, OSError, TimeoutError)  # what clients meet when a process is gone


class At(NamedTuple):
    """A server at an address that stays."""

    url: str


class User(NamedTuple):
    """Somebody with an account, who talks to one server or another."""

    session: aiohttp.ClientSession
    place: At | Process
    name: str
    token: str

    def at(self, place: At | Process) -> "User":
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
        name = str(more.pop("room_id", unique("room")))
        await self.ask("POST", "/rooms", {"room_id": name, "name": name, **more})
        for member in members:
            await self.ask("PUT", f"/rooms/{name}/members/{member.name}", {"role": "member"})
        return name

    async def say(self, room: str, text: str, **more: Any) -> Event:
        """Post a message; return its event."""
        event: Event = await self.ask("POST", f"/rooms/{room}/messages", {"message": text, **more})
        return event

    async def log(self, room: str) -> list[Event]:
        """Return the log of a room, as a socket tells it."""
        async with self.chat(room, "?after=0") as chat:
            await chat.reaches(chat.hello["seq"])
            return chat.events

    def chat(self, room: str, query: str = "", token: str | None = None) -> "Chat":
        """Open a socket to a room."""
        return Chat(self, room, query, self.token if token is None else token)


async def enrol(session: aiohttp.ClientSession, place: At | Process, *names: str) -> list[User]:
    """Return people with fresh accounts; their passwords are hashed side by side."""

    async def join(word: str) -> User:
        """Register and log in."""
        name = unique(word)
        form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
        await User(session, place, name, "").ask("POST", "/auth/register", form)
        login = await User(session, place, name, "").ask("POST", "/auth/token", form)
        return User(session, place, name, login["access_token"])

    return await asyncio.gather(*map(join, names))


@asynccontextmanager
async def company(place: At | Process, *names: str) -> AsyncIterator[list[User]]:
    """Give people with fresh accounts and one client session between them."""
    timeout = aiohttp.ClientTimeout(total=40)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield await enrol(session, place, *names)


def below(ws: Any) -> Any:
    """Return the transport below a socket, to stall it or to see what waits."""
    return ws._response.connection.transport  # noqa: SLF001


def drop(ws: Any) -> None:
    """Lose a connection as in a tunnel: no close frame says good-bye."""
    below(ws).abort()


class Chat(Frames):
    """A socket to one room, for as long as a block."""

    def __init__(self, user: User, room: str, query: str, token: str) -> None:
        """Prepare a connection; without a token it still has to log in by its first frame."""
        self.url = URL(f"{user.place.url}/websockets/chat/{room}{query}")
        super().__init__(int(self.url.query["after"]) if "after" in self.url.query else None)
        self.session, self.token = user.session, token

    async def __aenter__(self) -> Self:
        """Connect, and wait for the hello when logged in."""
        await self.open(self.session, self.url, self.token)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close in the orderly way, but wait for nobody."""
        await self.leave()

    async def hear(self, kind: str, patience: float = PATIENCE, **fields: Any) -> Event:
        """Read until a frame of this type and with these fields comes."""
        return await self.hears(patience=patience, **{"type": kind, **fields})

    async def hear_any(self, kind: str, patience: float = PATIENCE, **fields: Any) -> Event:
        """Return the newest frame of this type with these fields, or read until one comes."""
        seen = self.heard(type=kind, **fields)
        return seen[-1] if seen else await self.hear(kind, patience, **fields)

    deliver = Frames.say
    closed = Frames.is_closed

    @property
    def numbers(self) -> list[int]:
        """Return the numbers seen so far."""
        return [event["seq"] for event in self.events]


def handshake(user: User, room: str) -> socket.socket:
    """Open a socket to a room that stalls soon, since nothing of what comes is read."""
    url, peer = URL(user.place.url), socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(10)
    peer.connect((url.host, url.port))
    headers = {"Host": url.authority, "Authorization": f"Bearer {user.token}", **UPGRADE}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    start = f"GET /websockets/chat/{room} HTTP/1.1"
    peer.sendall("\r\n".join([start, *lines, "", ""]).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += peer.recv(1)
    assert head.startswith(b"HTTP/1.1 101 "), head
    return peer
