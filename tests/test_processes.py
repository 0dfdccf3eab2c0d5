"""Several processes on one Postgres are one server, whatever breaks."""

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Protocol

import aiohttp
import asyncpg
import pytest

from tests import postgres
from tests.conftest import is_clean
from tests.helpers import (
    NO_LIMITS,
    PASSWORD,
    SECRET,
    Account,
    Answer,
    Chat,
    ClosedError,
    Event,
    Process,
    Server,
    User,
    Wire,
    background,
    claims,
    forge,
    unique,
    until,
)
from tests.processes import (
    LISTENERS,
    THE_END,
    Ledger,
    Proxy,
    at,
    batter,
    by_client_id,
    equals,
    insist,
    query,
    reader,
    session_of,
    settle,
    terminate,
    writer,
)

needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")


def launch_process(
    folder: Path, url: str, *arguments: str, strict: bool = True, **settings: object
) -> Process:
    """Start a process on a database; all share the secret, as they have to."""
    settings = {**NO_LIMITS, "secret_key": SECRET, "database_url": url, **settings}
    return Process(folder, "--port=0", *arguments, settings=settings, strict=strict)


class Hosts:
    """Three processes on one database; who dies in a test is replaced before the next one."""

    def __init__(self, url: str, folder: Path) -> None:
        """Start all at once, on an empty database."""
        self.url, self.folder = url, folder
        self.accounts: list[Account] = []
        self.processes = [launch_process(folder, url) for _ in range(3)]

    def heal(self) -> None:
        """Wait until all run."""
        for place, process in enumerate(self.processes):
            if process.popen.poll() is not None:
                self.processes[place] = launch_process(self.folder, self.url)
        for process in self.processes:
            process.listening()


@pytest.fixture(scope="module")
def hosts(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Run three processes for all tests of this file that do not need their own."""
    url = postgres.create_database(postgres_url)
    hosts = Hosts(url, tmp_path_factory.mktemp("hosts"))
    try:
        hosts.heal()
        yield hosts
        for process in hosts.processes:
            assert process.stop() == 0, process.stderr
            is_clean(process.stderr)
    finally:
        for process in hosts.processes:
            process.kill()
    if os.environ.get("TEST_DATABASE_URL"):
        postgres.drop_database(postgres_url, url)


class Trio:
    """The three processes as one test sees them."""

    def __init__(self, hosts: Hosts, session: aiohttp.ClientSession) -> None:
        """Reach each of them with this session."""
        self.hosts, self.url = hosts, hosts.url
        self.servers = [Server(process, session) for process in hosts.processes]

    async def users(self, count: int) -> tuple[User, ...]:
        """Return users, at home on the first process; their names are as long as names may be."""
        accounts = self.hosts.accounts
        while len(accounts) < count:
            accounts.append(await self.account())
        return tuple(User(self.servers[0], account) for account in accounts[:count])

    async def account(self) -> Account:
        """Return a new account: another one's with a new name, for hashing passwords takes long."""
        name = unique("abcdefghij"[len(self.hosts.accounts) % 10] * 23)
        if not self.hosts.accounts:
            (await self.servers[0].register(name)).ok(201)
            token = (await self.servers[0].login(name)).ok()["access_token"]
            return Account(name, f"{name}@example.org", PASSWORD, token)
        first = self.hosts.accounts[0]
        copy = """INSERT INTO users (username, email, password, version, created_at)
            SELECT $1, $2, password, version, created_at FROM users WHERE username = $3"""
        await query(self.url, copy, name, f"{name}@example.org", first.username)
        token = forge(claims(first.token) | {"sub": name})
        return Account(name, f"{name}@example.org", PASSWORD, token)

    def on(self, place: int, user: User) -> User:
        """Return a user as one who talks to another of the processes."""
        return at(self.servers[place], user)

    def from_(self, place: int) -> list[Server]:
        """Return the processes in turn, beginning with this one."""
        place %= len(self.servers)
        return self.servers[place:] + self.servers[:place]


@pytest.fixture
async def trio(hosts: Hosts, session: aiohttp.ClientSession) -> AsyncIterator[Trio]:
    """Give the three processes; whatever the test does to them, they log no traceback."""
    await asyncio.to_thread(hosts.heal)
    before = [(process, len(process.stderr)) for process in hosts.processes]
    asyncio.get_running_loop().set_debug(enabled=False)  # the clients' loop, which has much to do
    yield Trio(hosts, session)
    for process, start in before:
        is_clean(process.stderr[start:])


class Launch(Protocol):
    """Starts processes of the test's own."""

    async def __call__(
        self, url: str, count: int = 1, *arguments: str, strict: bool = True, **settings: object
    ) -> list[Server]:
        """Start so many at once on this database, and wait until they listen."""


@pytest.fixture
async def launch(session: aiohttp.ClientSession, tmp_path: Path) -> AsyncIterator[Launch]:
    """Give a function that starts processes; those that still run after the test end in order."""
    started: list[Process] = []

    async def launch(
        url: str, count: int = 1, *arguments: str, strict: bool = True, **settings: object
    ) -> list[Server]:
        """Start processes."""
        new = [
            launch_process(tmp_path, url, *arguments, strict=strict, **settings)
            for _ in range(count)
        ]
        started.extend(new)
        for process in new:
            await asyncio.to_thread(process.listening)
        return [Server(process, session) for process in new]

    yield launch
    try:
        for process in started:
            if process.popen.poll() is None:
                assert await asyncio.to_thread(process.stop) == 0, process.stderr
            is_clean(process.stderr)
    finally:
        for process in started:
            process.kill()


@asynccontextmanager
async def sockets(*pairs: tuple[User, str]) -> AsyncIterator[list[Chat]]:
    """Open a socket for each pair of a user and a room."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(user.chat(room)) for user, room in pairs]


async def cross(chats: Sequence[Chat], ledger: Ledger) -> float:
    """Send a message from every socket to all the others; return how long it took in all."""
    began = time.monotonic()
    seqs = await asyncio.gather(*(insist(ws, ledger, "cross") for ws in chats))
    for ws in chats:
        await ws.upto(max(seqs))
    return time.monotonic() - began


async def finish(ledger: Ledger, user: User, chats: Sequence[Chat]) -> list[Event]:
    """End a room's story: check the ledger, and that each socket saw the log since its hello."""
    last = await user.say(ledger.room, THE_END)
    log = await user.events(ledger.room)
    ledger.check(log)
    for ws in chats:
        await ws.upto(last["seq"])
        equals(ws.events, log[ws.hello["seq"] :])
    return log


# --- Starting together


async def test_processes_that_start_at_once_make_one_database(
    postgres_url: str, launch: Launch
) -> None:
    """Five processes that start at the same moment on an empty database agree on everything."""
    url = await asyncio.to_thread(postgres.create_database, postgres_url)
    servers = await launch(url, 5, strict=False)
    first = await servers[0].user("first")
    epochs = {await at(server, first).epoch("1") for server in servers}
    assert len(epochs) == 1
    for server in servers:
        answer = (await server.get("/healthz")).ok()
        assert (answer["status"], answer["database"]) == ("ok", "postgres")
        (lobby,) = (await at(server, first).get("/rooms")).ok()
        assert (lobby["room_id"], lobby["role"]) == ("1", "owner")


# --- One order


async def meddle(trio: Trio, users: Sequence[User], room: str) -> None:
    """Post on one process, edit on the next, delete on the third, and move roles about."""
    for number in range(8):
        there, next_, last = (trio.on((number + shift) % 3, users[0]) for shift in range(3))
        seq = (await there.say(room, f"draft {number}"))["seq"]
        path = f"/rooms/{room}/messages/{seq}"
        (await next_.patch(path, json={"message": f"final {number}"})).ok()
        await last.appoint(room, users[1], "moderator" if number % 2 else "member")
        (await last.delete(path)).ok(204)
        (await there.patch(path, json={"message": "too late"})).refused(404, "not_found")


async def test_thirty_writers_and_thirty_readers_see_one_log(trio: Trio) -> None:
    """Readers who drop at random and resume on another process each see the log and no more."""
    users = await trio.users(10)
    ledger = Ledger(await users[0].room(*users[1:]))
    chance = random.Random(11)  # noqa: S311
    readers = [
        reader(trio.from_(n), users[n % 10], ledger.room, chance=random.Random(chance.random()))  # noqa: S311
        for n in range(30)
    ]
    writers = [
        writer(trio.from_(n), users[n % 10], ledger, stop=asyncio.Event(), count=10)
        for n in range(30)
    ]
    async with background(*readers) as tasks, asyncio.timeout(40):
        await asyncio.gather(*writers, meddle(trio, users, ledger.room))
        await users[0].say(ledger.room, THE_END)
        streams = await asyncio.gather(*tasks)
        logs = [await at(server, users[0]).events(ledger.room) for server in trio.servers]
    ledger.check(logs[0])
    assert ledger.errors == []
    assert len(ledger.acked) == 300
    for stream in (*logs[1:], *streams):
        equals(stream, logs[0])


async def test_one_client_id_sent_at_once_to_all_processes_is_one_message(trio: Trio) -> None:
    """Sends of one client id to three processes at once make one message and all hear of it."""
    (alice,) = await trio.users(1)
    room = await alice.room()
    path = f"/rooms/{room}/messages"
    async with sockets(*((trio.on(place, alice), room) for place in range(3))) as chats:
        for number in range(10):
            body = {"message": f"text {number}", "client_id": f"c{number}"}
            posts = [trio.on(place, alice).post(path, json=body) for place in (0, 1, 2, 0, 1, 2)]
            says = [ws.say(body["message"], client_id=body["client_id"]) for ws in chats]
            answers, _ = await asyncio.gather(asyncio.gather(*posts), asyncio.gather(*says))
            assert sum(answer.status == 201 for answer in answers) <= 1
            seqs = {answer.ok(answer.status)["seq"] for answer in answers}
            for ws in chats:
                seqs.add((await ws.find(by_client_id(f"c{number}")))["seq"])
            assert seqs == {number + 2}
        last = await alice.say(room, THE_END)
        for ws in chats:
            await ws.upto(last["seq"])
            assert ws.numbers == list(range(2, 13))


async def test_one_client_id_with_two_texts_at_once_is_one_message(trio: Trio) -> None:
    """Of different texts under one client id, sent to three processes at once, one is stored."""
    (alice,) = await trio.users(1)
    room = await alice.room()
    posts = [
        trio.on(number % 3, alice).post(
            f"/rooms/{room}/messages", json={"message": f"text {number}", "client_id": "c1"}
        )
        for number in range(12)
    ]
    answers = await asyncio.gather(*posts)
    assert sorted(answer.status for answer in answers) == [201] + [409] * 11
    assert await alice.head(room) == 2


async def test_what_is_made_once_is_made_once_on_all_processes(trio: Trio) -> None:
    """One name, one room id and one direct room, asked for everywhere at once, are made once."""
    alice, bob = await trio.users(2)
    name, room = unique("dora"), unique("room")
    registered = await asyncio.gather(*(server.register(name) for server in trio.servers))
    assert sorted(answer.status for answer in registered) == [201, 409, 409]
    mine = [trio.on(place, alice) for place in range(3)]
    made = await asyncio.gather(*(user.post("/rooms", json={"room_id": room}) for user in mine))
    assert sorted(answer.status for answer in made) == [201, 409, 409]
    body = {"kind": "direct", "username": bob.username}
    direct = await asyncio.gather(*(user.post("/rooms", json=body) for user in mine))
    assert {answer.ok(answer.status)["room_id"] for answer in direct} == {
        (await bob.post("/rooms", json=body | {"username": alice.username})).ok()["room_id"]
    }


async def test_processes_that_want_the_same_rooms_do_not_lock_each_other_out(trio: Trio) -> None:
    """Batches of three processes with the same rooms in different orders all get through, soon."""
    (alice,) = await trio.users(1)
    chance = random.Random(5)  # noqa: S311
    ids = [unique("room") for _ in range(8)]

    async def make(place: int) -> list[Answer]:
        """Ask one process for all the rooms, in some order."""
        user = trio.on(place, alice)
        bodies = [{"room_id": room_id} for room_id in chance.sample(ids, 8)]
        return await asyncio.gather(*(user.post("/rooms", json=body) for body in bodies))

    made = await asyncio.gather(*map(make, range(3)))
    statuses = sorted(answer.status for answers in made for answer in answers)
    assert statuses == [201] * 8 + [409] * 16

    async def post(place: int) -> None:
        """Write into all rooms on one process at once, in some order, some times."""
        for _ in range(5):
            posts = (trio.on(place, alice).say(room_id, "x") for room_id in chance.sample(ids, 8))
            await asyncio.gather(*posts)

    began = time.monotonic()
    await asyncio.gather(*map(post, range(3)))
    assert time.monotonic() - began < 5
    for room_id in ids:
        assert await alice.head(room_id) == 16


# --- Wake-ups


async def test_a_message_crosses_in_milliseconds(trio: Trio, launch: Launch) -> None:
    """At light load half of the messages reach another process within 15 ms of being sent."""
    one, two = await launch(trio.url, 2, strict=False)
    alice, bob = await trio.users(2)
    room = await alice.room(bob)
    medians = []
    async with sockets((at(one, alice), room), (at(two, bob), room)) as (hers, his):
        for _ in range(5):  # a busy machine gets more than one chance
            times = []
            for number in range(40):
                sent = time.perf_counter()
                await hers.say(f"{number}")
                await his.event("message", message=f"{number}")
                times.append(time.perf_counter() - sent)
                his.frames.clear()
            medians.append(statistics.median(times))
            if medians[-1] < 0.015:
                return
    pytest.fail(f"the medians of five rounds: {medians}")


async def test_a_flood_on_one_process_keeps_nobody_waiting_on_another(trio: Trio) -> None:
    """While one process commits without a pause, the others hear of it all the time."""
    alice, bob = await trio.users(2)
    room, there = await alice.room(bob), trio.on(1, alice)
    acked: dict[int, float] = {}

    async def flood() -> None:
        """Write over HTTP without a pause."""
        while True:
            seq = (await there.say(room, "x"))["seq"]
            acked[seq] = time.monotonic()

    waits = []
    async with sockets((bob, room)) as (his,), background(*(flood() for _ in range(20))):
        await until(lambda: len(acked) > 20, "the flood")
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            seq = (await his.event("message"))["seq"]
            waits.append(time.monotonic() - acked.get(seq, time.monotonic()))
            his.frames.clear()
    assert statistics.median(waits) < 0.15
    assert max(waits) < 1


async def test_without_wake_ups_the_poll_delivers(trio: Trio) -> None:
    """While every listener is cut off again and again, messages cross within a few seconds."""
    users = await trio.users(3)
    ledger = Ledger(await users[0].room(*users[1:]))
    pairs = [(trio.on(place, user), ledger.room) for place, user in enumerate(users)]
    async with sockets(*pairs) as chats:
        async with background(batter(trio.url, LISTENERS)):
            for _ in range(2):
                assert await cross(chats, ledger) < 4
        await until_quick(chats, ledger, 5)
        await finish(ledger, users[0], chats)


async def until_quick(chats: Sequence[Chat], ledger: Ledger, patience: float) -> None:
    """Wait until messages cross by wake-ups again, not by the poll."""
    async with asyncio.timeout(patience):
        while await cross(chats, ledger) > 0.5:
            pass


async def test_a_listener_that_falls_silent_is_replaced(trio: Trio, launch: Launch) -> None:
    """A silent listening connection holds up no send; the poll stands in, then a new connection."""
    alice, bob = await trio.users(2)
    ledger = Ledger(await alice.room(bob))
    async with Proxy(trio.url) as proxy:
        (server,) = await launch(proxy.url)
        async with sockets((alice, ledger.room), (at(server, bob), ledger.room)) as chats:
            await until_quick(chats, ledger, 3)
            assert proxy.mute() == 1
            for _ in range(4):
                began = time.monotonic()
                await insist(chats[1], ledger, "beside")
                assert time.monotonic() - began < 1.5
            assert await cross(chats, ledger) < 4
            await until_quick(chats, ledger, 12)
            await finish(ledger, alice, chats)


async def test_a_wake_up_that_is_too_large_is_not_lost(trio: Trio) -> None:
    """Who is online in 20 rooms of long names, more than a NOTIFY can hold, is known elsewhere."""
    users = await trio.users(10)
    alice = users[0]
    rooms = [unique("room").ljust(64, "x") for _ in range(20)]
    made = (alice.post("/rooms", json={"room_id": room}) for room in rooms)
    for answer in await asyncio.gather(*made):
        answer.ok(201)
    names = {user.username for user in users}
    join = """INSERT INTO members (room_id, username, role, read_seq, since)
        SELECT room, name, 'member', 0, 0 FROM unnest($1::text[]) room, unnest($2::text[]) name
        ON CONFLICT DO NOTHING"""
    await query(trio.url, join, rooms, sorted(names))
    async with AsyncExitStack() as stack:
        chats = [trio.on(1, user).chat(room) for user in users for room in rooms]
        await asyncio.gather(*map(stack.enter_async_context, chats))

        async def online(room: str) -> set[str]:
            """Return who is online in a room, as the third process has it."""
            members = (await trio.on(2, alice).get(f"/rooms/{room}")).ok()["members"]
            return {member["username"] for member in members if member["online"]}

        await chats[0]._ws.close()  # noqa: SLF001
        async with asyncio.timeout(5):
            while await online(rooms[0]) != names - {alice.username}:
                await asyncio.sleep(0.05)
            for room in rooms[1:]:
                while await online(room) != names:
                    await asyncio.sleep(0.05)


# --- Presence, typing, read markers


async def test_presence_typing_and_read_markers_cross(trio: Trio) -> None:
    """Who comes, types, reads and goes on one process is told on the others, not to themselves."""
    alice, carol = await trio.users(2)
    bob = User(trio.servers[0], await trio.account())
    room = await alice.room(bob, carol)
    there, path = trio.on(1, bob), f"/users/{bob.username}"
    async with sockets((alice, room), (trio.on(2, bob), room)) as (hers, other):
        await hers.event("presence", username=bob.username, online=True)
        async with sockets((there, room)) as (his,):
            await his.send({"type": "typing"})
            typing = await hers.event("typing")
            assert (typing["username"], typing["room_id"]) == (bob.username, room)
            await his.send({"type": "read", "seq": 3})
            assert (await hers.event("read"))["seq"] == 3
            for place in range(3):
                assert (await trio.on(place, alice).get(path)).ok()["online"]
        # Bob is still there by his other socket. Carol's coming is told after the end of his first.
        async with sockets((trio.on(1, carol), room)):
            await hers.event("presence", username=carol.username, online=True)
        await hers.event("presence", username=carol.username, online=False)
        changes = [frame for frame in hers.frames if frame.get("username") == bob.username]
        assert [frame["online"] for frame in changes if frame["type"] == "presence"] == [True]
        assert not {"typing", "read"} & {frame["type"] for frame in other.frames}
        await other._ws.close()  # noqa: SLF001
        await hers.event("presence", username=bob.username, online=False)
        for place in range(3):
            async with asyncio.timeout(5):
                while (await trio.on(place, alice).get(path)).ok()["online"]:
                    await asyncio.sleep(0.05)


# --- Shut means shut, everywhere

Shut = Callable[[User, User, str], Awaitable[Answer]]
SHUT: dict[str, tuple[int, Shut]] = {
    "log out": (4401, lambda _, bob, __: bob.post("/auth/logout")),
    "change the password": (
        4401,
        lambda _, bob, __: bob.post(
            "/auth/password", json={"password": PASSWORD, "new_password": "4321"}
        ),
    ),
    "remove": (
        4403,
        lambda alice, bob, room: alice.delete(f"/rooms/{room}/members/{bob.username}"),
    ),
    "ban": (
        4403,
        lambda alice, bob, room: alice.put(
            f"/rooms/{room}/members/{bob.username}", json={"role": "banned"}
        ),
    ),
    "delete the room": (4404, lambda alice, _, room: alice.delete(f"/rooms/{room}")),
}


async def chatter(user: User, room: str) -> None:
    """Write over HTTP without a pause, as long as the room is there."""
    while (await user.post(f"/rooms/{room}/messages", json={"message": "x"})).status != 404:
        pass


@pytest.mark.parametrize("way", SHUT)
async def test_shut_on_one_process_is_shut_on_all(trio: Trio, way: str) -> None:
    """What shuts a user out on one process closes sockets on all, and nothing later arrives."""
    code, shut = SHUT[way]
    (alice,) = await trio.users(1)
    bob = User(trio.servers[0], await trio.account())
    room = await alice.room(bob)
    pairs = [(trio.on(place, bob), room) for place in range(3)]
    talk = [chatter(trio.on(place, alice), room) for place in range(3)]
    async with sockets(*pairs) as chats, background(*talk):
        for ws in chats:
            await ws.event("message")
        answer = await shut(alice, bob, room)
        assert answer.status in {200, 204}, answer
        if code != 4404:
            await alice.say(room, "not for bob")
        for ws in chats:
            assert await ws.closed() == code
            assert ws.reason
            assert not any(event.get("message") == "not for bob" for event in ws.events)
    if code == 4403:
        events = [event for event in await alice.events(room) if event["type"] == "member"]
        removal = events[-1]["seq"]
        assert events[-1]["member"] == bob.username
        for ws in chats:
            assert max(ws.numbers) <= removal


@asynccontextmanager
async def overtaken(url: str, request: Awaitable[Answer]) -> AsyncIterator[asyncio.Task[Answer]]:
    """Hold up a request for a page of the log between its reads, if it needs more than one."""
    waits = """SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'"""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("BEGIN; LOCK TABLE meta")
        async with background(request) as (page,):
            async with asyncio.timeout(2):
                while not page.done() and not await query(url, waits):
                    await asyncio.sleep(0.01)
            yield page
            await connection.execute("COMMIT")
            await page
    finally:
        await connection.close()


async def test_a_page_that_a_removal_overtakes_holds_nothing_later(trio: Trio) -> None:
    """Who is removed while a page of the log is read for them gets no later number in it."""
    alice, bob = await trio.users(2)
    room = await alice.room(bob, kind="private")
    request = trio.on(1, bob).get(f"/rooms/{room}/events")
    async with overtaken(trio.url, request) as page:
        (await alice.delete(f"/rooms/{room}/members/{bob.username}")).ok(204)
        removal = (await alice.get(f"/rooms/{room}")).ok()["seq"]
        assert (await alice.say(room, "not for bob"))["seq"] == removal + 1
    answer = page.result()
    if answer.status != 403:
        assert all(event["seq"] <= removal for event in answer.ok()["events"]), answer


async def test_a_page_that_the_retention_overtakes_has_no_hole(trio: Trio) -> None:
    """When old events go while a page with them is read, the answer is all of them or a reset."""
    (alice,) = await trio.users(1)
    room = await alice.room()
    for number in range(8):  # what has a client id is kept, without its text, to know a retry
        await alice.say(room, "x", **({"client_id": "c"} if number == 1 else {}))
    async with overtaken(trio.url, trio.on(1, alice).get(f"/rooms/{room}/events?after=2")) as page:
        expire = "DELETE FROM events WHERE room_id = $1 AND seq <= 6 AND client_id IS NULL"
        await query(trio.url, expire, room)
        await query(trio.url, "UPDATE rooms SET floor = 6 WHERE room_id = $1", room)
    answer = page.result()
    if answer.status != 410:
        numbers = [event["seq"] for event in answer.ok()["events"]]
        assert numbers == list(range(3, 3 + len(numbers)))


async def test_a_replay_that_the_retention_overtakes_has_no_hole(trio: Trio) -> None:
    """When old events go while a slow reader is being sent them, it is cut off, not deceived."""
    (alice,) = await trio.users(1)
    room = await alice.room()
    old = """INSERT INTO events
        (room_id, seq, kind, username, created_at, message, folded, client_id)
        SELECT $1, n, 'message', $2, 1000, repeat('x', 9000), 'x',
        CASE n % 2 WHEN 1 THEN 'c' || n END
        FROM generate_series(2, 600) AS n"""
    await query(trio.url, old, room, alice.username)
    await query(trio.url, "UPDATE rooms SET seq = 600 WHERE room_id = $1", room)
    for after in (0, 1):
        async with trio.on(1, alice).chat(room, after=after) as ws:
            await ws.event("message")
            expire = "DELETE FROM events WHERE room_id = $1 AND seq < 590 AND client_id IS NULL"
            await query(trio.url, expire, room)
            await query(trio.url, "UPDATE rooms SET floor = 589 WHERE room_id = $1", room)
            with suppress(ClosedError):
                await ws.upto(600)
            assert ws.numbers == list(range(after + 1, after + 1 + len(ws.numbers)))
        await query(trio.url, "UPDATE rooms SET floor = 0 WHERE room_id = $1", room)
        await query(trio.url, old + " ON CONFLICT DO NOTHING", room, alice.username)


async def test_retention_on_all_processes_at_once_never_shows_a_hole(
    trio: Trio, launch: Launch
) -> None:
    """While three processes delete the same old events, the floor only rises; below it is reset."""
    (alice,) = await trio.users(1)
    room, count = await alice.room(), 15_000
    old = """INSERT INTO events (room_id, seq, kind, username, created_at, message, folded)
        SELECT $1, n, 'message', $2, 1000, 'x', 'x' FROM generate_series(2, $3::bigint) AS n"""
    await query(trio.url, old, room, alice.username, count)
    await query(trio.url, "UPDATE events SET created_at = 1000 WHERE room_id = $1", room)
    await query(trio.url, "UPDATE rooms SET seq = $2 WHERE room_id = $1", room, count)
    await alice.say(room, "young")
    floors = [0]
    starting = launch(trio.url, 3, strict=False, retention_days=1)
    async with background(starting) as (started,), asyncio.timeout(20):
        while floors[-1] < count:
            ((floor,),) = await query(trio.url, "SELECT floor FROM rooms WHERE room_id = $1", room)
            floors.append(floor)
            answer = await alice.get(f"/rooms/{room}/events?after={floor}&limit=1")
            if answer.status != 410:
                assert answer.ok()["events"][0]["seq"] == floor + 1
        await started
    assert floors == sorted(floors)


async def test_who_comes_back_after_a_removal_is_not_shut_out_by_it(trio: Trio) -> None:
    """A removal that is heard of late does not close the socket of who has come back since."""
    alice, bob = await trio.users(2)
    room = await alice.room(bob)
    async with (
        sockets((trio.on(1, alice), room)) as (hers,),
        background(batter(trio.url, LISTENERS)),
    ):
        for _ in range(3):
            (await alice.delete(f"/rooms/{room}/members/{bob.username}")).ok(204)
            async with sockets((trio.on(1, bob), room)) as (his,):
                back = await his.deliver("back again")
                assert his.numbers == [back["seq"]]
                await hers.upto(back["seq"])
    log = await alice.events(room)
    equals(hers.events, log[hers.hello["seq"] : len(hers.events) + hers.hello["seq"]])


# --- Processes that die or freeze


async def test_a_killed_process_loses_nothing_and_its_clients_go_elsewhere(trio: Trio) -> None:
    """After kill -9 the others go on; its clients resume there, and its users soon are offline."""
    users = await trio.users(5)
    ledger, stop = Ledger(await users[0].room(*users[1:])), asyncio.Event()
    readers = [reader(trio.from_(n), users[n % 3], ledger.room) for n in range(6)]
    writers = [writer(trio.from_(n), users[n % 3], ledger, stop=stop) for n in range(9)]
    sleeper, observer = users[3], users[4]
    async with AsyncExitStack() as stack:
        seen = await stack.enter_async_context(observer.chat(ledger.room))
        await stack.enter_async_context(trio.on(2, sleeper).chat(ledger.room))
        await seen.event("presence", username=sleeper.username, online=True)
        tasks = await stack.enter_async_context(background(*readers, *writers))
        await until(lambda: len(ledger.acked) > 100, "messages")
        await trio.servers[2].kill()
        killed, before = time.monotonic(), len(ledger.acked)
        await until(lambda: len(ledger.acked) > before + 30, "the others", 3)
        stop.set()
        async with asyncio.timeout(25):
            await asyncio.gather(*tasks[6:])
            last = await users[0].say(ledger.room, THE_END)
            streams = await asyncio.gather(*tasks[:6])
        log = await finish(ledger, users[0], [seen])
        for stream in streams:
            equals(stream, log[: last["seq"]])
        gone = {"type": "presence", "username": sleeper.username, "online": False}
        while not any(gone.items() <= frame.items() for frame in seen.frames):
            await seen.next(16 - (time.monotonic() - killed))
        there = trio.on(1, users[0])
        while (await there.get(f"/users/{sleeper.username}")).ok()["online"]:
            assert time.monotonic() - killed < 16
            await asyncio.sleep(0.05)


async def freeze_in_transaction(trio: Trio, process: Process) -> None:
    """Stop a process that writes, in the middle of a transaction if it can be met in one."""
    busy = """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND state LIKE 'idle in transaction%'"""
    connection = await asyncpg.connect(trio.url)
    try:
        for _ in range(100):
            process.popen.send_signal(signal.SIGSTOP)
            if await connection.fetchval(busy):
                await asyncio.sleep(0.02)
                if await connection.fetchval(busy):
                    return
            process.popen.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.01)
        process.popen.send_signal(signal.SIGSTOP)
    finally:
        await connection.close()


async def test_a_frozen_process_holds_up_nobody(trio: Trio) -> None:
    """While one is stopped for 8 s, in mid-transaction, the others go on; then it catches up."""
    users = await trio.users(3)
    ledger, stop = Ledger(await users[0].room(*users[1:])), asyncio.Event()
    pairs = [(trio.on(place, user), ledger.room) for place, user in enumerate(users)]
    frozen = trio.servers[2].process
    writers = [writer([trio.servers[2]], users[2], ledger, stop=stop) for _ in range(4)]
    waits = []
    async with sockets(*pairs) as chats, background(*writers) as tasks:
        await until(lambda: len(ledger.acked) > 20, "messages")
        try:
            await freeze_in_transaction(trio, frozen)
            began = time.monotonic()
            while time.monotonic() - began < 8:
                waits.append(await cross(chats[:2], ledger))
                await asyncio.sleep(0.05)
        finally:
            frozen.popen.send_signal(signal.SIGCONT)
        assert max(waits) < 1.5
        assert await cross(chats, ledger) < 3
        stop.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        await finish(ledger, users[0], chats)


# --- A Postgres that breaks


async def test_a_lock_held_by_somebody_else_only_delays(trio: Trio) -> None:
    """While somebody locks the rooms for 2 s messages wait; nobody seems to leave."""
    users = await trio.users(3)
    ledger = Ledger(await users[0].room(*users[1:]))
    pairs = [(trio.on(place, user), ledger.room) for place, user in enumerate(users)]
    connection = await asyncpg.connect(trio.url)
    try:
        async with sockets(*pairs) as chats:
            await chats[0].event("presence", username=users[2].username, online=True)
            await connection.execute("BEGIN; SELECT 1 FROM rooms FOR UPDATE")
            async with background(cross(chats, ledger)) as (crossing,):
                await asyncio.wait([crossing], timeout=2)
                assert not crossing.done()
                await connection.execute("COMMIT")
                assert await crossing < 4
            await until_quick(chats, ledger, 3)
            await finish(ledger, users[0], chats)
            frames = [frame for ws in chats for frame in ws.frames]
            assert not [frame for frame in frames if frame.get("online") is False]
    finally:
        await connection.close()


async def test_when_all_backends_are_terminated_delivery_is_back_in_seconds(trio: Trio) -> None:
    """All connections are cut under load: sockets live, and within 3 s messages cross as before."""
    users = await trio.users(3)
    ledger, stop = Ledger(await users[0].room(*users[1:])), asyncio.Event()
    pairs = [(trio.on(place, user), ledger.room) for place, user in enumerate(users)]
    writers = [writer(trio.from_(n), users[n], ledger, stop=stop) for n in range(3)]
    async with sockets(*pairs) as chats, background(*writers) as tasks:
        for _ in range(2):
            goal = len(ledger.acked) + 10
            await until(lambda goal=goal: len(ledger.acked) > goal, "messages")  # type: ignore[misc]
            assert await terminate(trio.url) >= 6
            assert await cross(chats, ledger) < 3
            await until_quick(chats, ledger, 3)
        async with background(batter(trio.url)) as (storm,):
            await asyncio.wait([storm], timeout=2)
        assert await cross(chats, ledger) < 3
        await until_quick(chats, ledger, 3)
        stop.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        await finish(ledger, users[0], chats)


async def refuses(server: Server, user: User, ws: Chat, ledger: Ledger) -> None:
    """Check that a server without a database says so, everywhere, and keeps its sockets."""
    assert not await settle(ws, ledger, ledger.next("refused"))
    assert ledger.errors[-1] == "unavailable"
    user = at(server, user)
    for path in ("/rooms", "/users/me", f"/rooms/{ledger.room}/events?after=0"):
        (await user.get(path)).refused(503, "unavailable")
    body = {"message": "refused"}
    (await user.post(f"/rooms/{ledger.room}/messages", json=body)).refused(503, "unavailable")
    (await server.login(user.username)).refused(503, "unavailable")
    (await server.get("/healthz")).refused(503, "unavailable")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await user.chat(ledger.room).__aenter__()
    assert refusal.value.status == 503


async def test_a_postgres_that_dies_and_comes_back_is_an_interruption(
    cluster: postgres.Cluster, launch: Launch
) -> None:
    """While Postgres is gone for 5 s all sockets live and all sends are refused; then all heals."""
    servers = await launch(cluster.url, 3)
    users = await servers[0].users("alice", "bob")
    ledger, stop = Ledger(await users[0].room(users[1])), asyncio.Event()
    pairs = [(at(server, users[0]), ledger.room) for server in servers]
    writers = [writer([server], users[1], ledger, stop=stop) for server in servers]
    async with sockets(*pairs) as chats, background(*writers) as tasks:
        await until(lambda: len(ledger.acked) > 30, "messages")
        await asyncio.to_thread(cluster.stop, "immediate")
        down = time.monotonic()
        work = (
            refuses(server, users[0], ws, ledger) for server, ws in zip(servers, chats, strict=True)
        )
        async with asyncio.timeout(5):
            await asyncio.gather(*work)
        await until(lambda: time.monotonic() - down > 5, "5 s")
        await asyncio.to_thread(cluster.start)
        back = time.monotonic()
        await cross(chats, ledger)
        assert time.monotonic() - back < 4
        await until_quick(chats, ledger, 4)
        stop.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)
        for client_id in ledger.sent.keys() - ledger.acked.keys():
            assert await settle(chats[0], ledger, client_id)
        await finish(ledger, users[0], chats)
    for server in servers:
        (await server.get("/healthz")).ok()


# --- A connection that is cut around a COMMIT


Way = Callable[[User, Chat, str, str | None], Awaitable[int | None]]


async def by_socket(_: User, ws: Chat, text: str, client_id: str | None) -> int | None:
    """Send a message over a socket; return its number, or None for a refusal."""
    more = {"client_id": client_id} if client_id else {}
    await ws.say(text, **more)

    def is_outcome(frame: Event) -> bool:
        """Tell what answers this message: itself, an ack, or an error."""
        if client_id:
            return frame.get("client_id") == client_id
        return frame["type"] == "error" or frame.get("message") == text

    outcome = await ws.find(is_outcome)
    if outcome["type"] == "error":
        assert outcome["error"] == "unavailable"
        return None
    return int(outcome["seq"])


async def by_post(user: User, ws: Chat, text: str, client_id: str | None) -> int | None:
    """Post a message; return its number, or None for a refusal."""
    body = {"message": text} | ({"client_id": client_id} if client_id else {})
    answer = await user.post(f"/rooms/{ws.room}/messages", json=body)
    if answer.status == 503:
        answer.refused(503, "unavailable")
        return None
    return int(answer.ok(answer.status)["seq"])


async def test_a_commit_or_its_answer_that_is_lost_is_never_a_false_ack(
    trio: Trio, launch: Launch
) -> None:
    """Cut before or after COMMIT took effect: what is acknowledged is there, and once."""
    alice, bob = await trio.users(2)
    room = await alice.room(bob)
    async with Proxy(trio.url) as proxy:
        (server,) = await launch(proxy.url)
        hers, cuts = at(server, alice), 0
        async with sockets((hers, room), (bob, room)) as (ws, his):
            for side, stay_down, way, client_id in [
                (side, stay_down, way, client_id)
                for side in ("request", "answer")
                for stay_down in (False, True)
                for way in (by_socket, by_post)
                for client_id in (None, unique("c"))
            ]:
                case = f"{side} {stay_down} {way.__name__} {client_id}"
                text = unique("text")
                proxy.arm(side, stay_down=stay_down)
                seq = await way(hers, ws, text, client_id)
                cuts += 1
                assert proxy.cuts == cuts, case
                stored = [e["seq"] for e in await alice.events(room) if e.get("message") == text]
                assert stored == [seq] if seq else len(stored) <= 1, case
                if side == "request" and not client_id:
                    assert seq is None and stored == [], case
                proxy.down = False
                if client_id:
                    await expect_one(hers, ws, way, text, client_id)
            last = await alice.say(room, THE_END)
            log = await alice.events(room)
            assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
            for each in (ws, his):
                await each.upto(last["seq"])
                equals(each.events, log[each.hello["seq"] :])


async def expect_one(user: User, ws: Chat, way: Way, text: str, client_id: str) -> None:
    """Send a message again until it is acknowledged: it is there once, under that number."""
    async with asyncio.timeout(5):
        while (seq := await way(user, ws, text, client_id)) is None:
            await asyncio.sleep(0.05)
    log = await user.events(ws.room)
    assert [event["seq"] for event in log if event.get("client_id") == client_id] == [seq]
    assert log[seq - 1]["message"] == text


async def test_a_database_that_hangs_does_not_hold_up_the_shut_down(
    trio: Trio, launch: Launch
) -> None:
    """With a message in a transaction that gets no answer, SIGTERM still ends all within 5 s."""
    (alice,) = await trio.users(1)
    room = await alice.room()
    async with Proxy(trio.url) as proxy:
        (server,) = await launch(proxy.url)
        async with sockets((at(server, alice), room)) as (ws,):
            proxy.stall()
            await ws.say("into the void")
            await ws.ping()
            stopped = asyncio.to_thread(server.process.stop, 5)
            code, told = await asyncio.gather(stopped, ws.closed())
            assert (code, told) == (0, 1001)


async def test_a_process_starts_while_a_table_is_tended(hosts: Hosts, launch: Launch) -> None:
    """A start waits for no VACUUM or ANALYZE that runs on the log, nor holds up others for it."""
    connection = await asyncpg.connect(hosts.url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE")
            (server,) = await launch(hosts.url, 1)
            alice = await server.user("alice")
            await alice.say("1", "meanwhile")
    finally:
        await connection.close()


# --- Workers


def workers_of(process: Process) -> set[int]:
    """Return the children of a process that was started with `--workers`."""
    return session_of(process.popen.pid) - {process.popen.pid}


async def ends(process: Process) -> int:
    """Ask a process to stop; return its exit code once it and its children have ended, in 5 s."""
    began = time.monotonic()
    code = await asyncio.to_thread(process.stop, 5)
    patience = 5 - (time.monotonic() - began)
    await until(lambda: not session_of(process.popen.pid), "the children's end", patience)
    return code


@needs_proc
async def test_workers_share_a_port_are_replaced_and_end_together(
    trio: Trio, launch: Launch
) -> None:
    """A killed worker is replaced, the others go on; SIGTERM ends all, sockets get 1001."""
    alice, bob = await trio.users(2)
    (server,) = await launch(trio.url, 1, "--workers=3")
    process = server.process
    await until(lambda: len(workers_of(process)) == 3, "three workers")
    room = await alice.room(bob)
    stop, ledger = asyncio.Event(), Ledger(room)
    with closing(Wire(at(server, alice), room)) as wire:
        (victim,) = [pid for pid in workers_of(process) if wire.held_by(pid)]
        writers = [writer([server], bob, ledger, stop=stop) for _ in range(12)]
        async with background(*writers) as tasks:
            await until(lambda: len(ledger.acked) > 60, "messages")
            os.kill(victim, signal.SIGKILL)
            assert await asyncio.to_thread(wire.close_code) == 1006
            before = len(ledger.acked)
            await until(lambda: len(ledger.acked) > before + 60, "messages of the others")
            await until(lambda: len(workers_of(process) - {victim}) == 3, "a new worker")
            stop.set()
            async with asyncio.timeout(10):
                await asyncio.gather(*tasks)
    async with sockets(*([(at(server, alice), room)] * 12)) as chats:
        await until_quick(chats[:4], ledger, 8)
        await finish(ledger, alice, chats)
        assert await ends(process) == 0
        for ws in chats:
            assert await ws.closed() == 1001
    assert process.stdout.count("listening") == 1
    with pytest.raises(aiohttp.ClientConnectionError):
        await server.get("/healthz")


async def stop_early(hosts: Hosts, count: int) -> None:
    """Stop a server as soon as it has so many workers: all of them end."""
    process = launch_process(hosts.folder, hosts.url, "--workers=3", strict=False)
    try:
        while len(workers_of(process)) < count:
            assert process.popen.poll() is None, process.stderr
            await asyncio.sleep(0)
        assert await ends(process) == 0
        is_clean(process.stderr)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.wait()


async def stop_amid_repair(hosts: Hosts, launch: Launch) -> None:
    """Stop a server while it replaces a killed worker: all of them end."""
    (server,) = await launch(hosts.url, 1, "--workers=2", strict=False)
    await until(lambda: len(workers_of(server.process)) == 2, "two workers")
    victim = min(workers_of(server.process))
    os.kill(victim, signal.SIGKILL)
    await until(lambda: len(workers_of(server.process) - {victim}) == 2, "a new worker")
    assert await ends(server.process) == 0


@needs_proc
async def test_no_worker_survives_a_stop_at_any_moment(hosts: Hosts, launch: Launch) -> None:
    """SIGTERM between two forks, or while a worker is being replaced, leaves nothing behind."""
    early = (stop_early(hosts, count) for count in (1, 2, 3))
    await asyncio.gather(stop_amid_repair(hosts, launch), *early)
