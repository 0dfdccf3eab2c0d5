"""What tests of several processes need: clients that resume elsewhere, ways to break things.

A `Ledger` knows what was sent and what was acknowledged; `writer` and `reader` are clients that do
what the README asks of clients: retry under the same client id, resume after the last number.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from tests.helpers import LOST, NUMBERED, PATIENCE, Account, Chat, Event, Server, User, unique

THE_END = "the end"


def at(server: Server, user: User) -> User:
    """Return the same user as one who talks to another process."""
    return User(server, Account(user.username, user.email, user.password, user.token))


async def query(url: str, statement: str, *values: object) -> list[Any]:
    """Return the rows of one statement on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(statement, *values))
    finally:
        await connection.close()


async def terminate(url: str, condition: str = "true") -> int:
    """Cut the connections to this database, or some of them; return how many there were."""
    rows = await query(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "  # noqa: S608
        "WHERE datname = current_database() AND pid <> pg_backend_pid() "
        f"AND backend_type = 'client backend' AND {condition}",
    )
    return len(rows)


# Connections that wait for NOTIFY are known by what they did last.
LISTENERS = "(query ILIKE 'listen%' OR query ILIKE '%pg_notify%')"


async def batter(url: str, condition: str = "true") -> None:
    """Cut connections to this database without a pause."""
    while True:
        await terminate(url, condition)


# --- Streams


def signature(event: Event) -> tuple[object, ...]:
    """Return what an event is in every replay, whatever has become of its text since."""
    keys = ("seq", "type", "username", "client_id", "target", "member", "role", "created_at")
    return tuple(event.get(key) for key in keys)


def equals(stream: Sequence[Event], log: Sequence[Event]) -> None:
    """Check that a stream is this part of the log: no gap, no repeat, no other order."""
    numbers = [event["seq"] for event in stream]
    wanted = [event["seq"] for event in log]
    assert numbers == wanted, f"{numbers} is not {wanted}"
    for one, other in zip(stream, log, strict=True):
        assert signature(one) == signature(other)


class Ledger:
    """What writers have sent into a room, and the numbers that they were told."""

    def __init__(self, room: str) -> None:
        """Begin with nothing sent."""
        self.room = room
        self.sent: dict[str, str] = {}
        self.acked: dict[str, int] = {}
        self.errors: list[str] = []

    def next(self, word: str) -> str:
        """Return a fresh client id, noted as sent with a text of its own."""
        client_id = unique(word)
        self.sent[client_id] = f"text of {client_id}"
        return client_id

    def ack(self, client_id: str, seq: int) -> None:
        """Note an acknowledgement, which never changes its mind."""
        assert self.acked.setdefault(client_id, seq) == seq, f"{client_id} has two numbers"

    def check(self, log: Sequence[Event], *, settled: bool = True) -> None:
        """Check that the log numbers 1, 2, 3 … and holds once, as told, what was acknowledged."""
        assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
        for client_id, seq in self.acked.items():
            event = log[seq - 1]
            assert (event.get("client_id"), event.get("message")) == (
                client_id,
                self.sent[client_id],
            )
        stored = [event["client_id"] for event in log if event.get("client_id") in self.sent]
        assert len(stored) == len(set(stored)), "a message is there twice"
        if settled:
            assert self.acked.keys() == self.sent.keys() == set(stored)


def by_client_id(client_id: str) -> Callable[[Event], bool]:
    """Return what tells the frame that answers this client id."""
    return lambda frame: frame.get("client_id") == client_id


async def settle(ws: Chat, ledger: Ledger, client_id: str, patience: float = 20) -> bool:
    """Send a message of the ledger and wait for what becomes of it: acknowledged, or refused."""
    await ws.say(ledger.sent[client_id], client_id=client_id)
    while (frame := await ws.next(patience)).get("client_id") != client_id:
        pass
    if frame["type"] == "error":
        ledger.errors.append(frame["error"])
        return False
    ledger.ack(client_id, frame["seq"])
    return True


async def insist(ws: Chat, ledger: Ledger, word: str) -> int:
    """Send a message until it is acknowledged, each time under the same client id."""
    client_id = ledger.next(word)
    async with asyncio.timeout(PATIENCE):
        while not await settle(ws, ledger, client_id):
            await asyncio.sleep(0.05)
    return ledger.acked[client_id]


async def writer(
    hosts: Sequence[Server], user: User, ledger: Ledger, *, stop: asyncio.Event, count: int = 10**6
) -> None:
    """Write until told to stop, each message until it is acknowledged; when cut off, elsewhere."""
    pending = ""
    for server in itertools.cycle(hosts):
        with suppress(*LOST):
            async with at(server, user).chat(ledger.room) as ws:
                while pending or (count and not stop.is_set()):
                    pending = pending or ledger.next("w")
                    if await settle(ws, ledger, pending):
                        pending, count = "", count - 1
                    else:
                        await asyncio.sleep(0.05)
        if not pending and (stop.is_set() or not count):
            return
        await asyncio.sleep(0.05)


async def reader(
    hosts: Sequence[Server], user: User, room: str, *, chance: random.Random | None = None
) -> list[Event]:
    """Follow a room to its end; after every loss, wanted or not, resume on the next host."""
    stream: list[Event] = []
    for server in itertools.cycle(hosts):
        after = stream[-1]["seq"] if stream else 0
        with suppress(*LOST):
            async with at(server, user).chat(room, after=after) as ws:
                for _ in range(chance.randrange(1, 150) if chance else 10**6):
                    frame = await ws.next(30)
                    assert frame["type"] not in {"reset", "error"}, frame
                    if frame["type"] in NUMBERED:
                        stream.append(frame)
                    if frame.get("message") == THE_END:
                        return stream
                if chance and chance.random() < 0.7:
                    ws.drop()
        await asyncio.sleep(0.05)
    raise AssertionError


# --- Postgres behind a wire that can be cut


Pair = tuple[asyncio.StreamWriter, asyncio.StreamWriter]


class Proxy:
    """A TCP proxy before Postgres that can swallow a COMMIT or its answer, and cut the wire."""

    def __init__(self, url: str) -> None:
        """Prepare a proxy to the Postgres of this URL."""
        parts = urlsplit(url)
        self._target = parts.hostname or "127.0.0.1", parts.port or 5432
        self._parts = parts
        self._server: asyncio.Server | None = None
        self._wires: set[asyncio.StreamWriter] = set()
        self._listeners: set[Pair] = set()
        self._muted: set[Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.armed = ""
        self.down = False
        self.stay_down = False
        self.cuts = 0

    @property
    def url(self) -> str:
        """Return the URL that leads through this proxy; TLS would hide the COMMIT from it."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        account, at_sign, _ = self._parts.netloc.rpartition("@")
        netloc = f"{account}{at_sign}127.0.0.1:{port}"
        return urlunsplit(self._parts._replace(netloc=netloc, query="sslmode=disable"))

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut everything and stop listening."""
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Cut every connection."""
        for wire in list(self._wires):
            wire.transport.abort()

    def stall(self) -> None:
        """Forward nothing any more, but keep every connection open, as a dead network does."""
        self._flows.clear()

    def mute(self) -> int:
        """Forward nothing any more on connections that LISTEN; return how many there are."""
        self._muted |= self._listeners
        return len(self._muted)

    def arm(self, side: str, *, stay_down: bool = False) -> None:
        """Lose the next COMMIT on its way (`request`), or its `answer`, and cut that connection."""
        self.armed, self.stay_down = side, stay_down

    async def _connected(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Connect a client with Postgres, or turn it away."""
        if self.down:
            client.transport.abort()
            return
        back, postgres = await asyncio.open_connection(*self._target)
        pair = client, postgres
        self._wires.update(pair)
        for source, sink, side in ((reader, postgres, "request"), (back, client, "answer")):
            task = asyncio.create_task(self._pump(source, sink, side, pair))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        side: str,
        pair: Pair,
    ) -> None:
        """Forward one direction of a connection until it ends or is cut."""
        with suppress(OSError):
            while data := await source.read(1 << 16):
                await self._flows.wait()
                if b"LISTEN" in data:
                    self._listeners.add(pair)
                while pair in self._muted:
                    await asyncio.sleep(0.05)
                if self.armed == side and b"COMMIT" in data.upper():
                    self.armed, self.down = "", self.stay_down
                    self.cuts += 1
                    break
                sink.write(data)
                await sink.drain()
        self._listeners.discard(pair)
        for wire in pair:
            wire.transport.abort()
            self._wires.discard(wire)


# --- Processes


def session_of(leader: int) -> set[int]:
    """Return the living processes of a session, the children of a dead leader too (on Linux)."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.add(int(path.parent.name))
    return found
