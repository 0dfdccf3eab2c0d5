"""Who the tests are about: a server, its users and their rooms."""

import sqlite3
from contextlib import closing
from functools import partialmethod
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.test_utils import TestClient
from yarl import URL

import chatserver
from tests import postgres
from tests.sockets import Socket
from tests.words import PASSWORD, Answer, Event, tell, unique, until


async def run_past(url: str, sql: str) -> list[Any]:
    """Run a statement on a database past the server that uses it, and return its rows."""
    if url.startswith("postgres"):
        return await postgres.read(url, sql)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        return connection.execute(sql).fetchall()


class Server:
    """A running server as the tests see it."""

    def __init__(self, client: TestClient[web.Request, web.Application]) -> None:
        """Keep a client of the application, which is this process's own."""
        self.client = client
        self.chat = client.app[chatserver.CHAT]
        self.hub = self.chat.hub
        self.config = self.chat.config
        self.shared = self.config.database_url.startswith("postgres")  # by many processes
        self.sockets: list[Socket] = []
        self.runs = True

    def url(self, path: str) -> URL:
        """Return the address of a path, which is taken as it is written."""
        return URL(str(self.client.make_url("/"))[:-1] + path, encoded=True)

    async def ask(self, method: str, path: str, token: str = "", **options: Any) -> Answer:
        """Send a request; whatever it was, a crash of the server is never the answer."""
        headers = dict(options.pop("headers", None) or {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        session = self.client.session
        async with session.request(method, self.url(path), headers=headers, **options) as answer:
            body = await answer.read()
            found = Answer(f"{method} {path}", answer.status, answer.headers, body)
        assert found.status < 500 or found.status == 503, found
        return found

    async def register(self, name: str, password: str = PASSWORD, **options: Any) -> Answer:
        """Register an account with an e-mail address made from its name."""
        form = {"username": name, "email": f"{name}@example.org", "password": password}
        return await self.ask("POST", "/auth/register", json=form, **options)

    async def login(self, name: str, password: str = PASSWORD, **options: Any) -> Answer:
        """Ask for a token with the form that OAuth clients send."""
        form = {"username": name, "password": password}
        return await self.ask("POST", "/auth/token", data=form, **options)

    async def user(self, word: str) -> "User":
        """Return somebody new, who is logged in."""
        name = unique(word)
        (await self.register(name)).ok(201)
        return User(self, name, (await self.login(name)).ok()["access_token"])

    async def users(self, *words: str) -> "list[User]":
        """Return several new users."""
        return [await self.user(word) for word in words]

    async def talk(self, *words: str, **options: str) -> "list[Socket]":
        """Return sockets of new users in a new room of the first of them."""
        users = await self.users(*words)
        room = await users[0].room(*users[1:], **options)
        return [await user.enter(room) for user in users]

    async def rows(self, sql: str) -> list[Any]:
        """Run a statement past the server, which tells nobody, and return its rows."""
        return await run_past(self.config.database_url, sql)

    change = rows

    async def forget(self) -> None:
        """Close what the tests left open; the server then knows of no socket and no room."""
        for one in self.sockets:
            await one.leave()
        self.sockets.clear()
        if self.runs:
            hub = self.hub
            await until(lambda: not (hub.sockets or hub.rooms or hub.users), "nobody to be left")

    async def stop(self) -> None:
        """Shut down in order."""
        self.runs = False
        await self.client.server.close()


class Room(NamedTuple):
    """A room, as its owner knows it."""

    owner: "User"
    room_id: str

    @property
    def path(self) -> str:
        """Return where it is."""
        return f"/rooms/{self.room_id}"

    async def log(self, after: int = 0, reader: "User | None" = None) -> list[Event]:
        """Return the events after a number, as somebody who resumes there gets them."""
        socket = await (reader or self.owner).enter(self, after=after)
        await socket.reaches(socket.hello["seq"])
        await socket.leave()
        return socket.events

    async def story(self) -> list[str]:
        """Return its log in a few words."""
        return [tell(event) for event in await self.log()]

    async def texts(self) -> list[str]:
        """Return what was said in it."""
        return [e["message"] for e in await self.log() if e["type"] == "message" and "message" in e]

    async def admit(self, *users: "User", role: str = "member") -> None:
        """Give users a role in it."""
        for user in users:
            (await self.owner.put(f"{self.path}/members/{user.name}", {"role": role})).ok()


class User:
    """Somebody who is logged in."""

    def __init__(self, server: Server, name: str, token: str) -> None:
        """Speak to the server with this token."""
        self.server, self.name, self.token = server, name, token
        self.email = f"{name}@example.org"

    def at(self, server: Server) -> "User":
        """Return the same user as one who talks to another process."""
        return User(server, self.name, self.token)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """Send a request, with a body as JSON if there is one."""
        if body is not None:
            options["json"] = body
        return await self.server.ask(method, path, self.token, **options)

    get = partialmethod(ask, "GET")
    post = partialmethod(ask, "POST")
    put = partialmethod(ask, "PUT")
    patch = partialmethod(ask, "PATCH")
    delete = partialmethod(ask, "DELETE")

    async def room(self, *members: "User", kind: str = "public", word: str = "room") -> Room:
        """Make a room of one's own, with these members in it."""
        name = unique(word)
        (await self.post("/rooms", {"room_id": name, "name": word, "kind": kind})).ok(201)
        room = Room(self, name)
        await room.admit(*members)
        return room

    async def post_in(self, room: Room, text: str, **more: Any) -> Event:
        """Post a message over HTTP; return its event."""
        answer = await self.post(f"{room.path}/messages", {"message": text, **more})
        return dict(answer.ok(201))

    async def enter(self, room: Room, **query: Any) -> "Socket":
        """Open a socket to a room, and wait for its hello."""
        return await Socket(self, room, **query).connect()
