"""A checker of the log in the manner of Jepsen: what clients were told is held against the log.

A `Trial` lets writers and readers loose on one room while a test breaks what it likes. Every send
is recorded as ok, under the number that was told, or stays unknown. Readers drop and resume
anywhere. Afterwards `judge` names everything that breaks a promise.
"""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import WSMsgType

from tests.people import LOST, User, drop
from tests.processes import Process
from tests.words import NUMBERED, Event, unique, until

COME_AGAIN = {1000, 1001, 1006, 1013}  # codes after which clients come back
EXPECTED = {
    "POST": {200, 201, 503},
    "PATCH": {200, 403, 404, 503},  # another's message, or one that was deleted
    "DELETE": {204, 403, 404, 503},
}
# What an event is for ever, whatever has become of its text.
ESSENCE = ("seq", "type", "username", "created_at", "client_id", "target", "member", "role")


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


def judge(record: Record, log: Sequence[Event], head: int) -> list[str]:
    """Return every broken promise, each beginning with the name of its kind."""
    found = list(record.complaints)
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
    for stream in record.streams:
        for wanted, event in enumerate(stream.events, stream.start + 1):
            stored = by_seq.get(event["seq"], {})
            if (seq := event["seq"]) != wanted:
                found.append(f"{'repeat' if seq < wanted else 'hole'}: {seq} came for {wanted}")
                break
            if any(event.get(key) != stored.get(key) for key in ESSENCE):
                found.append(f"other: {seq} came as {event}, the log has {stored}")
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
        self.processes, self.room, self.counts = processes, room, counts
        self.users = itertools.cycle(users)
        self.chance = random.Random(seed)  # noqa: S311
        self.record = Record()
        self.over = False
        self.end = ""  # the client_id of the last message, which readers wait for
        self.problems: list[str] = []

    async def __aenter__(self) -> Self:
        """Let everybody loose: writers, one who edits, readers who stay and readers who drop."""
        works = [self.meddle(), *(self.write() for _ in range(self.counts[0]))]
        self.writers = [asyncio.create_task(work) for work in works]
        reads = [self.read(stay=number % 2 == 0) for number in range(self.counts[1])]
        self.readers = [asyncio.create_task(read) for read in reads]
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """Let writers finish and readers reach the head, then judge."""
        tasks = [*self.writers, *self.readers]
        try:
            if kind is None:
                await self.finish(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, tasks: list[asyncio.Task[None]]) -> None:
        """Bring everything to its end and hold it against the log of every process."""
        self.over = True
        _, stuck = await asyncio.wait(self.writers, timeout=self.patience)
        self.record.complaints += [f"stuck: {task.get_coro()}" for task in stuck]
        self.end = self.next_id()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.patience):
                while not await self.post(next(self.users), self.end):
                    await asyncio.sleep(0.1)
                await asyncio.wait(self.readers)
        for task in tasks:
            if task.done():
                task.result()
        logs = [await self.read_log(process) for process in self.processes]
        if any(log != logs[0] for log in logs):
            self.record.complaints.append("split: two processes tell different logs")
        self.problems = judge(self.record, logs[0], self.record.ok.get(self.end, len(logs[0])))

    async def read_log(self, process: Process) -> list[Event]:
        """Return the log as a process tells it, or as much of it as comes."""
        stream = Stream(0)
        with suppress(*LOST):
            async with self.connect(next(self.users).at(process), "?after=0") as ws:
                head = (await self.receive(ws))["seq"]
                while stream.last < head:
                    await self.receive(ws, stream)
            return stream.events
        self.record.complaints.append("stuck: the log is not told to its end")
        return stream.events

    async def more(self, count: int, patience: float = 30) -> None:
        """Wait until so many more sends are ok."""
        goal = len(self.record.ok) + count
        await until(lambda: len(self.record.ok) >= goal, f"{count} more messages", patience)

    def next_id(self) -> str:
        """Return a client_id with a text of its own, noted as sent."""
        client_id = unique("id")
        self.record.sent[client_id] = f"text of {client_id}"
        return client_id

    def choose_id(self, pending: str | None, mine: list[str]) -> str:
        """Return what to send: what is unknown again, or what was ok long ago, or something new."""
        if pending and self.chance.random() < 0.8:
            return pending  # else it stays unknown for ever
        if mine and self.chance.random() < 0.05:
            return self.chance.choice(mine)
        mine.append(self.next_id())
        return mine[-1]

    # --- What clients do

    def anywhere(self, user: User) -> User:
        """Return a user at any of the processes."""
        return user.at(self.chance.choice(self.processes))

    async def ask(self, user: User, method: str, path: str, body: Any = None) -> Any:
        """Send a request to any process; return the JSON of a success, else nothing."""
        url = f"{self.anywhere(user).place.url}/rooms/{self.room}/messages{path}"
        headers = {"Authorization": f"Bearer {user.token}"}
        with suppress(*LOST):
            async with user.session.request(method, url, json=body, headers=headers) as answer:
                data = await answer.read()
            if answer.status not in EXPECTED[method]:
                self.record.complaints.append(f"status: {method} {path}: {answer.status} {data!r}")
            return json.loads(data) if data and answer.ok else None
        return None

    async def post(self, user: User, client_id: str) -> bool:
        """Post a message; return whether it is stored."""
        body = {"message": self.record.sent[client_id], "client_id": client_id}
        if event := await self.ask(user, "POST", "", body):
            self.record.acknowledge(client_id, event["seq"])
        return event is not None

    async def meddle(self) -> None:
        """Edit and delete what was stored."""
        user = next(self.users)
        while not self.over:
            await asyncio.sleep(0.1)
            if self.record.ok:
                path = f"/{self.chance.choice(list(self.record.ok.values()))}"
                method = self.chance.choice(["PATCH", "DELETE"])
                await self.ask(user, method, path, {"message": "edited"})

    async def write(self) -> None:
        """Send or post until it is over, with a stream of its own on every connection."""
        user, pending, mine = next(self.users), None, list[str]()
        while not self.over:
            with suppress(*LOST):
                async with self.connect(self.anywhere(user)) as ws:
                    stream = Stream((await self.receive(ws))["seq"])
                    self.record.streams.append(stream)
                    while not self.over:
                        pending = self.choose_id(pending, mine)
                        if self.chance.random() < 0.3:
                            stored = await self.post(user, pending)
                        else:
                            stored = await self.send(ws, stream, pending)
                        pending = None if stored else pending
                        await asyncio.sleep(0.005 if stored else 0.1)
            await asyncio.sleep(0.05)

    async def send(self, ws: Any, stream: Stream, client_id: str) -> bool:
        """Send a message; return whether its event, an ack or an error is the answer."""
        await ws.send_json({"message": self.record.sent[client_id], "client_id": client_id})
        while (frame := await self.receive(ws, stream)).get("client_id") != client_id:
            pass
        if frame["type"] != "error":
            self.record.acknowledge(client_id, frame["seq"])
            return True
        if frame["error"] != "unavailable":
            self.record.complaints.append(f"refused: {frame}")
        return False

    async def read(self, *, stay: bool) -> None:
        """Follow the log from its beginning to the last message, over drops and losses."""
        user, stream = next(self.users), Stream(0, live=True)
        self.record.streams.append(stream)
        while True:
            with suppress(*LOST):
                async with self.connect(self.anywhere(user), f"?after={stream.last}") as ws:
                    # Who drops cannot keep up on a busy machine: in the end everybody stays.
                    stays = stay or self.over
                    for _ in range(10**6 if stays else self.chance.randrange(1, 150)):
                        frame = await self.receive(ws, stream)
                        if self.end and frame.get("client_id") == self.end:
                            return
                    if self.chance.random() < 0.7:
                        drop(ws)
            await asyncio.sleep(0.05)

    def connect(self, user: User, query: str = "") -> Any:
        """Open a socket."""
        url = f"{user.place.url}/websockets/chat/{self.room}{query}"
        headers = {"Authorization": f"Bearer {user.token}"}
        return user.session.ws_connect(url, headers=headers, max_msg_size=0)

    async def receive(self, ws: Any, stream: Stream | None = None) -> Event:
        """Return the next frame; what has a number goes into the stream."""
        message = await ws.receive(timeout=5)
        if message.type is not WSMsgType.TEXT:
            code = message.data if message.type is WSMsgType.CLOSE else 1006
            if code not in COME_AGAIN:
                self.record.complaints.append(f"closed: {code} {message.extra}")
            raise ConnectionResetError
        frame: Event = json.loads(message.data)
        if stream and frame["type"] in NUMBERED:
            stream.events.append(frame)
        if frame["type"] == "reset":
            self.record.complaints.append(f"reset: {frame}")
        return frame


@asynccontextmanager
async def trying(
    processes: Sequence[Process], users: Sequence[User], **more: Any
) -> AsyncIterator[Trial]:
    """Let writers and readers loose in a new room; afterwards no promise is broken."""
    room = await users[0].room(*users[1:])
    async with Trial(processes, users, room, **more) as trial:
        yield trial
    assert trial.problems == []
