"""A checker of the log in the manner of Jepsen: what clients were told is held against the log.

`trying` lets writers and readers loose on one room while a test breaks what it likes. Every send
is recorded as ok, under the number that was told, or stays unknown. Readers drop and resume
anywhere. Afterwards `judge` names everything that breaks a promise.
"""

import asyncio
import itertools
import json
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType

from tests.people import LOST, User, drop
from tests.processes import Process
from tests.words import NUMBERED, Event, unique, until

COME_AGAIN = {1000, 1001, 1006, 1013}  # codes after which clients come back
# What an event is for ever, whatever has become of its text.
ESSENCE = ("seq", "type", "username", "created_at", "client_id", "target", "member", "role")


@dataclass
class Stream:
    """What one client saw of the log, over as many connections as it took."""

    start: int = 0  # the number before its first event
    events: list[Event] = field(default_factory=list)

    def compare(self, log: dict[int, Event]) -> Iterator[str]:
        """Tell of each event that is not the one that the log has next."""
        for wanted, event in enumerate(self.events, self.start + 1):
            seq, stored = event["seq"], log.get(event["seq"], {})
            if seq != wanted:
                yield f"{'repeat' if seq < wanted else 'hole'}: {seq} came for {wanted}"
            elif any(event.get(key) != stored.get(key) for key in ESSENCE):
                yield f"other: {seq} came as {event}, the log has {stored}"


class Trial:
    """Writers and readers in one room, what they were told and saw, and what is wrong with it."""

    def __init__(self, processes: Sequence[Process], users: Sequence[User], room: str) -> None:
        """Prepare; everybody goes where the processes are at the moment."""
        self.processes, self.users, self.room = processes, itertools.cycle(users), room
        self.end = ""  # when it is over, the client_id of the last message
        self.ok: dict[str, int] = {}  # the number that was told for a client_id
        self.streams: list[Stream] = []
        self.problems: list[str] = []  # each begins with the name of its kind

    async def more(self, count: int, patience: float = 30) -> None:
        """Wait until so many more sends are ok."""
        goal = len(self.ok) + count
        await until(lambda: len(self.ok) >= goal, f"{count} more messages", patience)

    def acknowledge(self, client_id: str, seq: int) -> None:
        """Note under which number a send is stored; it never changes."""
        if self.ok.setdefault(client_id, seq) != seq:
            self.problems.append(f"moved: {client_id} was {self.ok[client_id]}, then {seq}")

    def judge(self, log: Sequence[Event], *others: Sequence[Event]) -> None:
        """Hold all that was told and seen against the log, as one process and others tell it."""
        by_seq = {event["seq"]: event for event in log}
        if any(other != log for other in others):
            self.problems.append("split: two processes tell different logs")
        if missing := set(range(1, len(log) + 1)) - set(by_seq):
            self.problems.append(f"gap: none of {len(log)} events has the numbers {missing}")
        for client_id, times in Counter(event.get("client_id") for event in log).items():
            if client_id and times > 1:
                self.problems.append(f"twice: {client_id} is there {times} times")
        for client_id, seq in self.ok.items():
            event = by_seq.get(seq, {})
            if event.get("client_id") != client_id:
                self.problems.append(f"lost: {client_id} was acknowledged as {seq}")
            elif event.get("message") not in (None, "edited", f"text of {client_id}"):
                self.problems.append(f"garbled: {client_id} is now {event['message']!r}")
        for stream in self.streams:
            self.problems += list(stream.compare(by_seq))[:1]  # what follows is off as well

    # --- What clients do

    async def ask(self, user: User, method: str, path: str, body: Event) -> Any:
        """Send a request to any process; return the JSON of a success, else nothing."""
        url = f"{secrets.choice(self.processes).url}/rooms/{self.room}/messages{path}"
        headers = {"Authorization": f"Bearer {user.token}"}
        with suppress(*LOST):
            async with user.session.request(method, url, json=body, headers=headers) as answer:
                data = await answer.read()
            if answer.ok:
                return json.loads(data or "null")
            # To edit and to delete another's message, or a deleted one, is refused.
            if answer.status not in ({503} if method == "POST" else {403, 404, 503}):
                self.problems.append(f"status: {method} {path}: {answer.status} {data!r}")
        return None

    async def post(self, user: User, client_id: str) -> bool:
        """Post a message; return whether it is stored."""
        body = {"message": f"text of {client_id}", "client_id": client_id}
        event = await self.ask(user, "POST", "", body)
        if event:
            self.acknowledge(client_id, event["seq"])
        return bool(event)

    async def send(self, ws: Any, stream: Stream, client_id: str) -> bool:
        """Send a message; return whether its event, an ack or an error is the answer."""
        await ws.send_json({"message": f"text of {client_id}", "client_id": client_id})
        while (frame := await self.receive(ws, stream)).get("client_id") != client_id:
            pass
        if frame["type"] != "error":
            self.acknowledge(client_id, frame["seq"])
        elif frame["error"] != "unavailable":
            self.problems.append(f"refused: {frame}")
        return bool(frame["type"] != "error")

    async def write(self) -> None:
        """Send or post until it is over, with a stream of its own on every connection."""
        user = next(self.users)
        mine = [secrets.token_hex(8)]  # what is not stored for certain is sent again
        while not self.end:
            with suppress(*LOST):
                async with self.connect(user) as ws:
                    stream = Stream((await self.receive(ws))["seq"])
                    self.streams.append(stream)
                    while not self.end:
                        if secrets.randbelow(100) < 30:
                            stored = await self.post(user, mine[-1])
                        else:
                            stored = await self.send(ws, stream, mine[-1])
                        if stored:  # some things are sent again long after
                            again = secrets.randbelow(100) < 5
                            mine.append(secrets.choice(mine) if again else secrets.token_hex(8))
                        await asyncio.sleep(0.005 if stored else 0.1)
            await asyncio.sleep(0.05)

    async def meddle(self) -> None:
        """Edit and delete what was stored."""
        user = next(self.users)
        while not self.end:
            await asyncio.sleep(0.1)
            if self.ok:
                path = f"/{secrets.choice(list(self.ok.values()))}"
                method = secrets.choice(["PATCH", "DELETE"])
                await self.ask(user, method, path, {"message": "edited"})

    async def read(self, stream: Stream, at: Process | None = None, *, stay: bool = True) -> None:
        """Follow the log from its beginning to the last message, over drops and losses."""
        user = next(self.users)
        while True:
            after = stream.events[-1]["seq"] if stream.events else 0
            with suppress(*LOST):
                async with self.connect(user, f"?after={after}", at) as ws:
                    # Who drops cannot keep up on a busy machine: in the end everybody stays.
                    stays = stay or self.end
                    for _ in range(10**6 if stays else 1 + secrets.randbelow(150)):
                        frame = await self.receive(ws, stream)
                        if frame.get("client_id") == self.end:
                            return
                    if secrets.randbelow(100) < 70:
                        drop(ws)
            await asyncio.sleep(0.05)

    def connect(self, user: User, query: str = "", at: Process | None = None) -> Any:
        """Open a socket, to any process if none is given."""
        place = at or secrets.choice(self.processes)
        url = f"{place.url}/websockets/chat/{self.room}{query}"
        headers = {"Authorization": f"Bearer {user.token}"}
        return user.session.ws_connect(url, headers=headers, max_msg_size=0)

    async def receive(self, ws: Any, stream: Stream | None = None) -> Event:
        """Return the next frame; what has a number goes into the stream."""
        received = await ws.receive(timeout=5)
        if received.type is not WSMsgType.TEXT:
            code = received.data if received.type is WSMsgType.CLOSE else 1006
            if code not in COME_AGAIN:
                self.problems.append(f"closed: {code} {received.extra}")
            raise ConnectionResetError
        frame: Event = json.loads(received.data)
        if stream and frame["type"] in NUMBERED:
            stream.events.append(frame)
        if frame["type"] == "reset":
            self.problems.append(f"reset: {frame}")
        return frame


@asynccontextmanager
async def trying(
    processes: Sequence[Process],
    users: Sequence[User],
    counts: tuple[int, int] = (8, 6),
    *,
    patience: float = 30,
    sound: bool = True,
) -> AsyncIterator[Trial]:
    """Let writers and readers loose in a new room; afterwards no promise is broken, if `sound`."""
    trial = Trial(processes, users, await users[0].room(*users[1:]))
    trial.streams = [Stream() for _ in range(counts[1])]
    works = [trial.meddle(), *(trial.write() for _ in range(counts[0]))]
    writers = [asyncio.create_task(work) for work in works]
    reads = [trial.read(stream, stay=n % 2 == 0) for n, stream in enumerate(trial.streams)]
    readers = [asyncio.create_task(read) for read in reads]
    try:
        yield trial
        trial.end = unique("end")
        await asyncio.wait(writers, timeout=patience)
        logs = {process: Stream() for process in trial.processes}
        readers += [asyncio.create_task(trial.read(log, at)) for at, log in logs.items()]
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not await trial.post(users[0], trial.end):
                    await asyncio.sleep(0.1)
                await asyncio.wait(readers)
        for task in [*writers, *readers]:
            if task.done():
                task.result()
            else:
                trial.problems.append(f"stuck: {task.get_coro()}")
        trial.judge(*(log.events for log in logs.values()))
    finally:
        for task in [*writers, *readers]:
            task.cancel()
        await asyncio.gather(*writers, *readers, return_exceptions=True)
    assert not sound or trial.problems == []
