"""A checker of the log in the manner of Jepsen: what clients were told is held against the log.

A `Trial` lets writers and readers loose on one room while a test breaks what it likes. Every send
is recorded as ok, under the number that was told, or stays unknown. Readers drop and resume
anywhere. Afterwards `judge` names everything that breaks a promise.
"""

import asyncio
import itertools
import json
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from tests.people import LOST, User, close_code, drop
from tests.processes import Process
from tests.words import Event, until

NUMBERED = ("message", "edit", "delete", "member")
COME_AGAIN = {1000, 1001, 1006, 1013}  # codes after which clients come back
EXPECTED = {
    "POST": {200, 201, 503},
    "PATCH": {200, 403, 404, 503},  # another's message, or one that was deleted
    "DELETE": {204, 403, 404, 503},
}


@dataclass
class Stream:
    """What one client saw of the log, over as many connections as it took."""

    start: int  # the number before its first event
    live: bool = False  # it stayed to the end, and should have seen the head
    events: list[Event] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Return the number to resume after."""
        return int(self.events[-1]["seq"]) if self.events else self.start


@dataclass
class Record:
    """What clients sent into a room, what they were told, and what they saw."""

    sent: dict[str, str] = field(default_factory=dict)
    ok: dict[str, int] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def acknowledge(self, client_id: str, seq: int) -> None:
        """Note under which number a send is stored; it never changes."""
        if self.ok.setdefault(client_id, seq) != seq:
            self.complaints.append(f"moved: {client_id} was {self.ok[client_id]}, then {seq}")


def essence(event: Event) -> list[Any]:
    """Return what an event is for ever, whatever has become of its text."""
    keys = ("seq", "type", "username", "created_at", "client_id", "target", "member", "role")
    return [event.get(key) for key in keys]


def judge(record: Record, log: Sequence[Event], head: int) -> list[str]:
    """Return every broken promise, each beginning with the name of its kind."""
    return [*record.complaints, *judge_log(record, log), *judge_streams(record, log, head)]


def judge_log(record: Record, log: Sequence[Event]) -> list[str]:
    """Hold the log against what was sent: ok is there once, unknown at most once, no gap."""
    found = []
    by_seq = {event["seq"]: event for event in log}
    if [event["seq"] for event in log] != list(range(1, len(log) + 1)):
        found.append(f"gap: of 1 to {len(log)} {sorted(set(range(1, len(log))) - set(by_seq))}")
    times = Counter(event["client_id"] for event in log if event.get("client_id"))
    found += [f"twice: {client_id} is there {n} times" for client_id, n in times.items() if n > 1]
    for client_id, seq in record.ok.items():
        event = by_seq.get(seq, {})
        if event.get("client_id") != client_id:
            found.append(f"lost: {client_id} was acknowledged as {seq}")
        elif event.get("message") not in (None, "edited", record.sent[client_id]):
            found.append(f"garbled: {client_id} is now {event['message']!r}")
    return found


def judge_streams(record: Record, log: Sequence[Event], head: int) -> list[str]:
    """Hold every stream against the log: the same events in order, each once, up to the head."""
    found = []
    by_seq = {event["seq"]: event for event in log}
    for stream in record.streams:
        for wanted, event in enumerate(stream.events, stream.start + 1):
            if (seq := event["seq"]) != wanted:
                found.append(f"{'repeat' if seq < wanted else 'hole'}: {seq} came for {wanted}")
                break
            if essence(event) != essence(by_seq.get(seq, {})):
                found.append(f"other: {seq} came as {event}, the log has {by_seq.get(seq)}")
                break
        if stream.live and stream.last < head:
            found.append(f"behind: a reader saw {stream.last} of {head}")
    return found


class Trial:
    """Writers and readers in one room, on all the processes there are, for as long as a block."""

    patience = 30.0  # for everybody to come to the end

    def __init__(
        self,
        processes: Sequence[Process],
        users: Sequence[User],
        room: str,
        counts: tuple[int, int] = (8, 6),
        seed: int = 1,
    ) -> None:
        """Prepare so many writers and readers; they go where the processes are at the moment."""
        self.processes, self.room = processes, room
        self.users = itertools.cycle(users)
        self.chances = [random.Random(f"{seed} {n}") for n in range(sum(counts) + 1)]  # noqa: S311
        self.counts = counts
        self.record = Record()
        self.done = asyncio.Event()
        self.end = ""  # the client_id of the last message, which readers wait for
        self.problems: list[str] = []

    async def __aenter__(self) -> Self:
        """Let everybody loose: writers by socket and by post, readers who stay and who drop."""
        first, *chances = self.chances
        works = [self.meddle(next(self.users), first)]
        ways = itertools.cycle([self.write_by_socket, self.write_by_socket, self.write_by_post])
        works += [next(ways)(next(self.users), chance) for chance in chances[: self.counts[0]]]
        self.writers = [asyncio.create_task(work) for work in works]
        self.readers = [
            asyncio.create_task(self.read(next(self.users), chance, stay=number % 2 == 0))
            for number, chance in enumerate(chances[self.counts[0] :])
        ]
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """Let writers finish and readers reach the head, then judge."""
        try:
            if kind is None:
                await self.finish(self.patience)
        finally:
            for task in (*self.writers, *self.readers):
                task.cancel()
            await asyncio.gather(*self.writers, *self.readers, return_exceptions=True)

    async def finish(self, patience: float) -> None:
        """Bring everything to its end and hold it against the log of every process."""
        self.done.set()
        _, stuck = await asyncio.wait(self.writers, timeout=patience)
        self.end = self.next_id()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not await self.post(next(self.users), self.end):
                    await asyncio.sleep(0.1)
                await asyncio.wait(self.readers)
        self.record.complaints += [f"stuck: {task.get_coro()}" for task in stuck]
        for task in (*self.writers, *self.readers):
            if task.done():
                task.result()
        logs = [await self.read_log(process) for process in self.processes]
        if any(log != logs[0] for log in logs):
            self.record.complaints.append("split: two processes tell different logs")
        self.problems = judge(self.record, logs[0], self.record.ok.get(self.end, len(logs[0])))

    async def read_log(self, process: Process) -> list[Event]:
        """Return the log as a process tells it, or as much of it as comes."""
        log: list[Event] = []
        with suppress(*LOST):
            await next(self.users).at(process).log(self.room, log)
            return log
        self.record.complaints.append("stuck: the log is not told to its end")
        return log

    async def more(self, count: int, patience: float = 30) -> None:
        """Wait until so many more sends are ok."""
        goal = len(self.record.ok) + count
        await until(lambda: len(self.record.ok) >= goal, f"{count} more messages", patience)

    def next_id(self) -> str:
        """Return a client_id with a text of its own, noted as sent."""
        client_id = secrets.token_hex(6)
        self.record.sent[client_id] = f"text of {client_id}"
        return client_id

    def choose_id(self, chance: random.Random, pending: str | None, mine: list[str]) -> str:
        """Return what to send: what is unknown again, or what was ok long ago, or something new."""
        if pending and chance.random() < 0.8:
            return pending  # else it stays unknown for ever
        if mine and chance.random() < 0.05:
            return chance.choice(mine)
        mine.append(self.next_id())
        return mine[-1]

    # --- What clients do

    async def ask(self, user: User, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request to any process; return the status and the JSON, 0 if it was lost."""
        url = f"{random.choice(self.processes).url}/rooms/{self.room}/messages{path}"  # noqa: S311
        headers = {"Authorization": f"Bearer {user.token}"}
        try:
            async with user.session.request(method, url, json=body, headers=headers) as answer:
                data = await answer.read()
        except LOST:
            return 0, None
        if answer.status not in EXPECTED[method]:
            self.record.complaints.append(
                f"status: {method} {path}: {answer.status} {data[:200]!r}"
            )
        return answer.status, json.loads(data or b"null")

    async def post(self, user: User, client_id: str) -> int | None:
        """Post a message; return its number or None."""
        body = {"message": self.record.sent[client_id], "client_id": client_id}
        status, event = await self.ask(user, "POST", "", body)
        if status not in (200, 201):
            return None
        self.record.acknowledge(client_id, event["seq"])
        return int(event["seq"])

    async def write_by_post(self, user: User, chance: random.Random) -> None:
        """Post until it is over, most unknown messages again."""
        pending, mine = None, list[str]()
        while not self.done.is_set():
            client_id = self.choose_id(chance, pending, mine)
            pending = None if await self.post(user, client_id) else client_id
            await asyncio.sleep(0.1 if pending else 0.005)

    async def meddle(self, user: User, chance: random.Random) -> None:
        """Edit and delete what was stored."""
        while not self.done.is_set():
            await asyncio.sleep(0.1)
            if self.record.ok:
                path = f"/{chance.choice(list(self.record.ok.values()))}"
                method, body = chance.choice([("PATCH", {"message": "edited"}), ("DELETE", None)])
                await self.ask(user, method, path, body)

    async def write_by_socket(self, user: User, chance: random.Random) -> None:
        """Send until it is over, with a stream of its own on every connection."""
        pending, mine = None, list[str]()
        while not self.done.is_set():
            with suppress(*LOST):
                async with self.connect(user) as ws:
                    stream = Stream((await self.receive(ws))["seq"])
                    self.record.streams.append(stream)
                    while not self.done.is_set():
                        pending = self.choose_id(chance, pending, mine)
                        body = {"message": self.record.sent[pending], "client_id": pending}
                        await ws.send_json(body)
                        if seq := await self.outcome(ws, stream, pending):
                            self.record.acknowledge(pending, seq)
                            pending = None
                        await asyncio.sleep(0.1 if pending else 0.005)
            await asyncio.sleep(0.05)

    async def outcome(self, ws: Any, stream: Stream, client_id: str) -> int | None:
        """Read until a send is answered: by its event, by an ack, or by an error."""
        while (frame := await self.receive(ws, stream)).get("client_id") != client_id:
            pass
        if frame["type"] != "error":
            return int(frame["seq"])
        if frame["error"] != "unavailable":
            self.record.complaints.append(f"refused: {frame}")
        return None

    async def read(self, user: User, chance: random.Random, *, stay: bool) -> None:
        """Follow the log from its beginning to the last message, over drops and losses."""
        stream = Stream(0, live=True)
        self.record.streams.append(stream)
        while True:
            with suppress(*LOST):
                async with self.connect(user, f"?after={stream.last}") as ws:
                    for _ in range(10**6 if stay else chance.randrange(1, 150)):
                        frame = await self.receive(ws, stream)
                        if self.end and frame.get("client_id") == self.end:
                            return
                    if chance.random() < 0.7:  # as in a tunnel
                        drop(ws)
            await asyncio.sleep(0.05)

    def connect(self, user: User, query: str = "") -> Any:
        """Open a socket to any process."""
        url = f"{random.choice(self.processes).url}/websockets/chat/{self.room}{query}"  # noqa: S311
        headers = {"Authorization": f"Bearer {user.token}"}
        return user.session.ws_connect(url, headers=headers, max_msg_size=0)

    async def receive(self, ws: Any, stream: Stream | None = None) -> Event:
        """Return the next frame; what has a number goes into the stream."""
        message = await ws.receive(timeout=20)
        if message.type is not aiohttp.WSMsgType.TEXT:
            if close_code(message) not in COME_AGAIN:
                self.record.complaints.append(f"closed: {close_code(message)} {message.extra}")
            raise ConnectionResetError
        frame: Event = json.loads(message.data)
        if stream and frame["type"] in NUMBERED:
            stream.events.append(frame)
        if frame["type"] == "reset":
            self.record.complaints.append(f"reset: {frame}")
        return frame
