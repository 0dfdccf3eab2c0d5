"""The story helpers: a real server in a process of its own, and users who talk to it.

Nothing here sleeps for luck: every wait is for a condition, and fails after PATIENCE seconds.
"""

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "chatserver.py"
SECRET = "a secret of the tests, long enough for every algorithm: 64 bytes and more"
PASSWORD = "1234"
PATIENCE = 10.0
NUMBERED = ("message", "edit", "delete", "member", "room")

# One row a setting: its name and its default as a user would write it.
SETTINGS = {
    "database_url": "sqlite:///./chat.db",
    "secret_key": "",
    "algorithm": "HS256",
    "access_token_expire_minutes": "60",
    "host": "127.0.0.1",
    "port": "8000",
    "workers": "1",
    "registration": "open",
    "password_min_length": "4",
    "message_length": "4000",
    "frame_bytes": "65536",
    "body_bytes": "65536",
    "history_limit": "200",
    "messages_per_second": "10",
    "message_burst": "20",
    "logins_per_minute": "10",
    "registrations_per_hour": "20",
    "sockets_per_user": "20",
    "sockets_per_address": "200",
    "sockets": "10000",
    "rooms_per_user": "100",
    "retention_days": "0",
    "allowed_origins": "",
    "trusted_proxies": "",
    "metrics": "off",
    "docs_assets": "cdn",
}

# Most tests are not about limits, and all come from one address.
NO_LIMITS = {
    "messages_per_second": 0,
    "logins_per_minute": 0,
    "registrations_per_hour": 0,
    "sockets_per_user": 0,
    "sockets_per_address": 0,
    "sockets": 0,
    "rooms_per_user": 0,
}

Json = Any  # what the server answers: the assertions are its type check
Event = dict[str, Any]


def unique(word: str) -> str:
    """Return the word with an ending that nobody else has."""
    return f"{word}-{secrets.token_hex(4)}"


async def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait until the condition holds; `what` says what was waited for when it never does."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        await asyncio.sleep(0.01)


# --- Processes


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return this process's environment without any setting of ours, and with those given."""
    ours = {name.upper() for name in SETTINGS}
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("PYTHON")}
    return kept | {k.upper(): str(v) for k, v in settings.items() if v is not None}


class Process:
    """One `python chatserver.py` in a folder; what it prints goes into files there."""

    counter = itertools.count(1)

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        settings: Mapping[str, object],
        strict: bool = True,
        program: Path = PROGRAM,
    ) -> None:
        """Start it; `strict` turns on asyncio's debug mode and makes every warning an error."""
        number = next(self.counter)
        self.out = folder / f"stdout-{number}.txt"
        self.err = folder / f"stderr-{number}.txt"
        flags = ["-X", "dev", "-W", "error"] if strict else []
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(  # noqa: S603
                [sys.executable, *flags, str(program), *arguments],
                cwd=folder,
                env=environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """Return what it has printed so far."""
        return self.out.read_text("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Return what it has logged so far."""
        return self.err.read_text("utf-8", "replace")

    def listening(self) -> str:
        """Wait for the line that says where it listens, and return that address."""
        deadline = time.monotonic() + PATIENCE
        while True:
            over = self.popen.poll() is not None or time.monotonic() > deadline
            line = re.search(r"^chatserver listening on (http://\S+)\n", self.stdout, re.MULTILINE)
            if line:
                return line[1]
            assert not over, f"it did not start: {self.stdout} {self.stderr}"
            time.sleep(0.01)

    def stop(self, patience: float = PATIENCE) -> int:
        """Ask it to shut down with SIGTERM and return its exit code."""
        self.popen.terminate()
        return self.popen.wait(patience)

    def kill(self) -> None:
        """End it and its workers as a power cut would."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE)


def run(
    folder: Path, *arguments: str, patience: float = 5, typed: str = "", **settings: Any
) -> tuple[int, str, str]:
    """Run the program to its end, within `patience`: its exit code, its output and its log."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(PROGRAM), *arguments],
        cwd=folder,
        env=environment(settings),
        input=typed,
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# --- HTTP


@dataclass(frozen=True)
class Answer:
    """What the server answered, and what every answer has to be like."""

    request: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        """Return the body, which has to be JSON and to say so."""
        kind = self.headers.get("Content-Type", "")
        assert kind.startswith("application/json"), f"{self} has the type {kind!r}"
        return json.loads(self.body)

    def ok(self, status: int = 200) -> Json:
        """Return the body of a success with just this status."""
        assert self.status == status, f"expected {status}: {self}"
        return self.json if self.body else None

    def refused(self, status: int, code: str = "") -> str:
        """Check that this is the error that is promised, and return its code."""
        assert self.status == status, f"expected {status} {code}: {self}"
        error = self.json
        assert isinstance(error["error"], str), self
        assert isinstance(error["detail"], str), self
        assert error["detail"].strip(), self
        assert "\n" not in error["detail"], self
        assert not code or error["error"] == code, f"expected {code}: {self}"
        if status == 401:
            assert self.headers["WWW-Authenticate"].startswith("Bearer"), self
        if status == 405:
            assert self.headers["Allow"], self
        if status in (429, 503):
            assert int(self.headers["Retry-After"]) >= 1, self
        return str(error["error"])

    def __str__(self) -> str:
        """Return the request and the answer on one line, for a failing assertion."""
        return f"{self.request} -> {self.status} {self.body[:500]!r}"


class Account(NamedTuple):
    """What somebody knows of their own account."""

    username: str
    email: str
    password: str
    token: str


@dataclass
class Pool:
    """What the tests of a shared server pass on: accounts cost half a second each."""

    accounts: dict[str, list[Account]] = field(default_factory=dict)
    rooms: dict[str, str] = field(default_factory=dict)


class Server:
    """A running server as one test sees it: its process, and a client session to reach it."""

    def __init__(
        self,
        process: Process,
        session: aiohttp.ClientSession,
        *,
        database: str = "",
        pool: Pool | None = None,
        restart: Callable[[], Process] | None = None,
    ) -> None:
        """Wrap a process; what is in the pool serves again."""
        self.process = process
        self.session = session
        self.database = database
        self.url = process.listening()
        self.pool = pool or Pool()
        self._taken: list[tuple[str, Account]] = []
        self._restart = restart

    async def request(
        self, method: str, path: str, *, token: str | None = None, **options: Any
    ) -> Answer:
        """Send a request; whatever it was, a crash of the server is never the answer."""
        headers = dict(options.pop("headers", None) or {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        url = URL(self.url + path, encoded=True)
        async with self.session.request(method, url, headers=headers, **options) as response:
            body = await response.read()
            answer = Answer(f"{method} {path}", response.status, response.headers, body)
        assert answer.status < 500 or answer.status == 503, answer
        return answer

    async def get(self, path: str, **options: Any) -> Answer:
        """GET a path, as nobody in particular."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Answer:
        """POST to a path, as nobody in particular."""
        return await self.request("POST", path, **options)

    async def login(self, name: str, password: str = PASSWORD) -> Answer:
        """Ask for a token with the form that OAuth clients send."""
        return await self.post("/auth/token", data={"username": name, "password": password})

    async def register(self, name: str, password: str = PASSWORD) -> Answer:
        """Register an account with an e-mail address made from its name."""
        form = {"username": name, "email": f"{name}@example.org", "password": password}
        return await self.post("/auth/register", json=form)

    async def user(self, name: str = "alice", *, fresh: bool = False) -> "User":
        """Return somebody with an account, logged in; `fresh` when the test changes the account."""
        idle = self.pool.accounts.setdefault(name, [])
        if idle and not fresh:
            account = idle.pop()
        else:
            username = unique(name)
            (await self.register(username)).ok(201)
            token = (await self.login(username)).ok()["access_token"]
            account = Account(username, f"{username}@example.org", PASSWORD, token)
        if not fresh:
            self._taken.append((name, account))
        return User(self, account)

    async def users(self, *names: str, fresh: bool = False) -> "tuple[User, ...]":
        """Return several users; their passwords are hashed side by side."""
        return tuple(await asyncio.gather(*(self.user(name, fresh=fresh) for name in names)))

    def chat(self, room: str, *, token: str | None = None, **options: Any) -> "Chat":
        """Open a socket to a room; without a token it still has to log in by its first frame."""
        return Chat(self, room, token, **options)

    async def kill(self) -> None:
        """End the process with SIGKILL."""
        await asyncio.to_thread(self.process.kill)

    async def restart(self) -> None:
        """Start a process again in the same folder, on the same database, on another port."""
        assert self._restart is not None, "a server that tests share is not for restarting"
        self.process = await asyncio.to_thread(self._restart)
        self.url = await asyncio.to_thread(self.process.listening)

    def release(self) -> None:
        """Give the accounts that this test borrowed back to the pool."""
        for name, account in self._taken:
            self.pool.accounts[name].append(account)
        self._taken.clear()


class User:
    """Somebody who is logged in."""

    def __init__(self, server: Server, account: Account) -> None:
        """Speak to the server with this account's token."""
        self.server = server
        self.username, self.email, self.password, self.token = account

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request with this user's token."""
        return await self.server.request(method, path, **({"token": self.token} | options))

    async def get(self, path: str, **options: Any) -> Answer:
        """GET a path."""
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Answer:
        """POST to a path."""
        return await self.request("POST", path, **options)

    async def put(self, path: str, **options: Any) -> Answer:
        """PUT to a path."""
        return await self.request("PUT", path, **options)

    async def patch(self, path: str, **options: Any) -> Answer:
        """PATCH a path."""
        return await self.request("PATCH", path, **options)

    async def delete(self, path: str, **options: Any) -> Answer:
        """DELETE a path."""
        return await self.request("DELETE", path, **options)

    async def room(self, *members: "User", kind: str = "public") -> str:
        """Create a room of one's own with these members in it, and return its id."""
        room_id = unique("room")
        body = {"room_id": room_id, "name": room_id, "kind": kind}
        (await self.post("/rooms", json=body)).ok(201)
        for member in members:
            await self.appoint(room_id, member, "member")
        return room_id

    async def appoint(self, room: str, member: "User", role: str) -> None:
        """Give somebody a role in a room."""
        path = f"/rooms/{room}/members/{member.username}"
        (await self.put(path, json={"role": role})).ok()

    async def say(self, room: str, text: str, **more: object) -> Event:
        """Post a message over HTTP and return its event."""
        body = {"message": text, **more}
        event: Event = (await self.post(f"/rooms/{room}/messages", json=body)).ok(201)
        return event

    async def events(self, room: str, after: int = 0) -> list[Event]:
        """Return the whole log of a room after a number, page by page."""
        log: list[Event] = []
        while True:
            page = (await self.get(f"/rooms/{room}/events?after={after}")).ok()
            log += page["events"]
            if not page["events"]:
                return log
            after = log[-1]["seq"]

    async def head(self, room: str) -> int:
        """Return the number of the room's newest event."""
        return int((await self.get(f"/rooms/{room}/events?limit=1")).ok()["seq"])

    async def epoch(self, room: str) -> str:
        """Return the epoch of the server's log as it is written in a query."""
        return quote(str((await self.get(f"/rooms/{room}/events?limit=1")).ok()["epoch"]))

    def chat(self, room: str, **options: Any) -> "Chat":
        """Open a socket to a room; it has had its hello when the `async with` begins."""
        return self.server.chat(room, token=self.token, **options)


# --- WebSockets

# A GET with these headers asks for an upgrade; aiohttp's own call hides the body of a refusal.
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


class ClosedError(Exception):
    """The server closed the socket while a frame was awaited."""


# What a client meets when its server is killed.
LOST = (ClosedError, aiohttp.ClientError, OSError, TimeoutError)


class Chat:
    """A socket to one room that remembers what it has seen."""

    def __init__(
        self, server: Server, room: str, token: str | None, **query_and_options: Any
    ) -> None:
        """Prepare a connection: `after`, `last` and `epoch` go into the query."""
        options = query_and_options
        query = [f"{k}={options.pop(k)}" for k in ("after", "last", "epoch") if k in options]
        self.url = f"{server.url}/websockets/chat/{room}" + ("?" + "&".join(query) if query else "")
        self.room = room
        self.hello: Event = {}
        self.frames: list[Event] = []
        self.code: int | None = None
        self.reason = ""
        self._server = server
        self._logged_in = token is not None
        self._options = options
        if token is not None:
            headers = {"Authorization": f"Bearer {token}"} | options.pop("headers", {})
            options["headers"] = headers

    async def __aenter__(self) -> Self:
        """Connect, and wait for the hello when logged in by header."""
        url = URL(self.url, encoded=True)
        self._ws = await self._server.session.ws_connect(url, max_msg_size=0, **self._options)
        if self._logged_in:
            self.hello = await self.event("hello")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close in the orderly way."""
        await self._ws.close()

    def drop(self) -> None:
        """Lose the connection, as in a tunnel: no close frame says good-bye."""
        peer = self._ws.get_extra_info("socket")
        peer.shutdown(socket.SHUT_RDWR)

    async def ping(self) -> None:
        """Send a ping of the WebSocket protocol."""
        await self._ws.ping()

    async def send(self, frame: object) -> None:
        """Send an object as a JSON text frame."""
        await self._ws.send_str(json.dumps(frame))

    async def send_text(self, text: str) -> None:
        """Send a text frame as it is."""
        await self._ws.send_str(text)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame."""
        await self._ws.send_bytes(data)

    async def send_raw(self, opcode: aiohttp.WSMsgType, data: bytes) -> None:
        """Send a frame of any kind, well-formed or not."""
        await self._ws.send_frame(data, opcode)

    async def say(self, text: str, **more: object) -> None:
        """Send a message without waiting for its echo."""
        await self.send({"type": "message", "message": text, **more})

    async def deliver(self, text: str, **more: object) -> Event:
        """Send a message and return its echo, which says that it is stored."""
        client_id = more.setdefault("client_id", unique("c"))
        await self.say(text, **more)
        return await self.find(lambda frame: frame.get("client_id") == client_id)

    async def next(self, patience: float = PATIENCE) -> Event:
        """Return the next frame, of whatever type."""
        message = await self._ws.receive(timeout=patience)
        if message.type is aiohttp.WSMsgType.TEXT:
            frame: Event = json.loads(message.data)
            self.frames.append(frame)
            return frame
        if message.type is aiohttp.WSMsgType.CLOSE:
            self.code, self.reason = message.data, message.extra or ""
        elif self.code is None:
            self.code = 1006
        raise ClosedError(self.code, self.reason)

    async def find(self, wanted: Callable[[Event], bool]) -> Event:
        """Read until the wanted frame comes, and return it."""
        began = len(self.frames)
        async with asyncio.timeout(PATIENCE):
            try:
                while not wanted(frame := await self.next()):
                    pass
            except TimeoutError:
                seen = self.frames[began:]
                pytest.fail(f"the frame did not come; these did: {seen}")
            else:
                return frame

    async def event(self, kind: str, **fields: object) -> Event:
        """Read until a frame of this type (and with these fields) comes, and return it."""
        return await self.find(
            lambda frame: frame["type"] == kind and fields.items() <= frame.items()
        )

    async def upto(self, seq: int) -> list[Event]:
        """Read until the event of this number comes; return the numbered events seen so far."""
        if not any(event["seq"] >= seq for event in self.events):
            await self.find(lambda frame: frame["type"] in NUMBERED and frame["seq"] >= seq)
        return self.events

    async def refusal(self, code: str = "") -> Event:
        """Wait for an error frame, check its shape and return it."""
        error = await self.event("error")
        assert isinstance(error["detail"], str), error
        assert error["detail"].strip(), error
        assert not code or error["error"] == code, error
        return error

    async def closed(self) -> int:
        """Read on until the server closes, and return the code (1006: without a close frame)."""
        async with asyncio.timeout(PATIENCE):
            try:
                while True:
                    await self.next()
            except ClosedError:
                assert self.code is not None
                return self.code

    @property
    def events(self) -> list[Event]:
        """Return the numbered events seen so far."""
        return [frame for frame in self.frames if frame["type"] in NUMBERED]

    @property
    def numbers(self) -> list[int]:
        """Return the numbers of the events seen so far, in the order of their coming."""
        return [event["seq"] for event in self.events]


class Wire:
    """A socket to a room with no library around it, to stall or to swallow what comes."""

    def __init__(self, user: User, room: str, *, buffer: int = 0) -> None:
        """Connect and upgrade, and read nothing yet; `buffer` is the kernel's room for input."""
        url = URL(user.server.url)
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect((url.host, url.port))
        self.port: int = self.socket.getsockname()[1]
        self.server_port = url.port
        lines = [
            f"GET /websockets/chat/{room} HTTP/1.1",
            f"Host: {url.authority}",
            f"Authorization: Bearer {user.token}",
            *(f"{name}: {value}" for name, value in UPGRADE.items()),
        ]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.socket.recv(1)
        assert head.startswith(b"HTTP/1.1 101 "), head

    def swallow(self) -> None:
        """Read and forget all that comes from now on."""
        self.socket.settimeout(0)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.socket, self.socket.recv, 1 << 20)

    def close_code(self) -> int:
        """Read all that came: the close frame's code, or 1006 when the connection was reset."""
        data = b""
        try:
            while chunk := self.socket.recv(1 << 20):
                data += chunk
        except ConnectionResetError:
            return 1006
        codes = [body[:2] for opcode, body in frames(data) if opcode == aiohttp.WSMsgType.CLOSE]
        return int.from_bytes(codes[0], "big") if codes else 1006

    def held_by(self, pid: int) -> bool:
        """Return whether a process still has the other end open (on Linux)."""
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *_, inode = line.split()[:10]
            if local.endswith(f":{self.server_port:04X}") and remote.endswith(f":{self.port:04X}"):
                return f"socket:[{inode}]" in descriptors(pid)
        return False

    def close(self) -> None:
        """Give the socket back."""
        with suppress(RuntimeError):
            asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process point to."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def frames(data: bytes) -> Iterable[tuple[int, bytes]]:
    """Yield the opcode and payload of each whole frame that a server sent."""
    while len(data) >= 2:
        size, start = data[1] & 127, 2
        if size > 125:
            wide = 2 if size == 126 else 8
            size, start = int.from_bytes(data[2 : 2 + wide], "big"), 2 + wide
        if len(data) < start + size:
            return
        yield data[0] & 15, data[start : start + size]
        data = data[start + size :]


# --- Tokens, honest and forged


def part(value: object) -> bytes:
    """Return a part of a JWT: JSON as unpadded, URL-safe base64."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def claims(token: str) -> dict[str, Any]:
    """Return what a JWT says, without asking whether it is true."""
    middle = token.split(".")[1]
    content: dict[str, Any] = json.loads(base64.urlsafe_b64decode(middle + "=="))
    return content


def forge(content: object, *, key: str = SECRET, alg: str = "HS256", **header: object) -> str:
    """Return a JWT signed by hand, so that a library's own scruples do not help the server."""
    head = part({"typ": "JWT", "alg": alg, **header}) + b"." + part(content)
    digest = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(alg, hashlib.sha256)
    signature = b"" if alg == "none" else hmac.digest(key.encode(), head, digest)
    return (head + b"." + part(signature)).decode()


# --- Things that go on beside


@asynccontextmanager
async def background(*work: Any) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run coroutines beside the block, and cancel what is left of them after it."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
