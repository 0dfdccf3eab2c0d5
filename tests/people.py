"""People who use real processes of the server, over HTTP and sockets, at one or another."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

from tests.processes import Process
from tests.sockets import UPGRADE, Frames
from tests.words import PASSWORD, Event, unique

LOST = (aiohttp.ClientError, OSError, TimeoutError)  # what clients meet when a process is gone

Chat = Frames  # a socket to one room, for as long as a block


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
        url, headers = self.place.url + path, {"Authorization": f"Bearer {self.token}"}
        async with self.session.request(method, url, json=body, headers=headers) as answer:
            text = await answer.text()
        fits = answer.status == status if status else answer.ok
        assert fits, f"{method} {path}: {answer.status} {text[:300]}"
        return json.loads(text or "null")

    async def room(self, *members: "User", **more: Any) -> str:
        """Make a room with these members in it; return its id."""
        name = str(more.pop("room_id", unique("room")))
        await self.ask("POST", "/rooms", {"room_id": name, "name": name, **more})
        for member in members:
            await self.ask("PUT", f"/rooms/{name}/members/{member.name}", {"role": "member"})
        return name

    async def say(self, room: str, text: str, **more: Any) -> Any:
        """Post a message; return its event."""
        return await self.ask("POST", f"/rooms/{room}/messages", {"message": text, **more})

    async def log(self, room: str) -> list[Event]:
        """Return the log of a room, as a socket tells it."""
        async with self.chat(room, "?after=0") as chat:
            await chat.reaches(chat.hello["seq"])
            return chat.events

    def chat(self, room: str, query: str = "", token: str | None = None) -> Chat:
        """Open a socket to a room."""
        url = URL(f"{self.place.url}/websockets/chat/{room}{query}")
        return Chat(self.session, url, self.token if token is None else token)


async def enrol(session: aiohttp.ClientSession, place: At | Process, *names: str) -> list[User]:
    """Return people with fresh accounts; their passwords are hashed side by side."""

    async def join(word: str) -> User:
        """Register and log in."""
        user = User(session, place, unique(word), "")
        mail = f"{user.name}@example.org"
        form = {"username": user.name, "email": mail, "password": PASSWORD}
        await user.ask("POST", "/auth/register", form)
        return user._replace(token=(await user.ask("POST", "/auth/token", form))["access_token"])

    return await asyncio.gather(*map(join, names))


@asynccontextmanager
async def company(place: At | Process, *names: str) -> AsyncIterator[list[User]]:
    """Give people with fresh accounts and one client session between them."""
    how: Any = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(40)}
    async with aiohttp.ClientSession(**how) as session:
        yield await enrol(session, place, *names)


def below(ws: Any) -> Any:
    """Return the transport below a socket, to stall it or to see what waits."""
    return ws._response.connection.transport  # noqa: SLF001


def drop(ws: Any) -> None:
    """Lose a connection as in a tunnel: no close frame says good-bye."""
    below(ws).abort()


def handshake(user: User, room: str) -> socket.socket:
    """Open a socket to a room that stalls soon, since nothing of what comes is read."""
    url, peer = URL(user.place.url), socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(10)
    peer.connect((url.host, url.port))
    upgrade = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
    head = f"Host: {url.authority}\r\nAuthorization: Bearer {user.token}\r\n{upgrade}"
    peer.sendall(f"GET /websockets/chat/{room} HTTP/1.1\r\n{head}\r\n".encode())
    assert peer.recv(13) == b"HTTP/1.1 101 "
    return peer
