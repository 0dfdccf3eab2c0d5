"""The promises of the README, each with a test that tries to break it."""

import asyncio
import itertools
import random
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from tests import postgres
from tests.conftest import Databases, Start
from tests.helpers import (
    LOST,
    NUMBERED,
    PASSWORD,
    Answer,
    Chat,
    Event,
    Server,
    User,
    Wire,
    background,
    claims,
    forge,
    unique,
    until,
)

# --- 1: durable at ack


class Writers:
    """Writers of one room that note what they sent and what was acknowledged."""

    def __init__(self, room: str) -> None:
        """Begin with nothing sent."""
        self.room = room
        self.sent: dict[str, str] = {}
        self.acked: dict[int, str] = {}

    def next(self) -> tuple[str, str]:
        """Return a fresh client id and its text, noted as sent."""
        client_id = unique("c")
        self.sent[client_id] = f"text of {client_id}"
        return client_id, self.sent[client_id]

    async def by_socket(self, user: User) -> None:
        """Write over a socket, one message after the other, until the server is lost."""
        try:
            async with user.chat(self.room) as ws:
                while True:
                    client_id, text = self.next()
                    event = await ws.deliver(text, client_id=client_id)
                    self.acked[event["seq"]] = client_id
        except LOST:
            return

    async def by_post(self, user: User) -> None:
        """Write over HTTP, one message after the other, until the server is lost."""
        try:
            while True:
                client_id, text = self.next()
                event = await user.say(self.room, text, client_id=client_id)
                self.acked[event["seq"]] = client_id
        except LOST:
            return


async def test_1_a_kill_under_load_loses_nothing_acknowledged(start: Start) -> None:
    """After kill -9 every acknowledged message is there, under the number that was told."""
    server = await start(strict=False)
    alice = await server.user("alice")
    writers = Writers(await alice.room())
    for goal in (200, 500):
        work = [writers.by_socket(alice) for _ in range(8)]
        work += [writers.by_post(alice) for _ in range(4)]
        async with background(*work) as tasks:
            await until(lambda goal=goal: len(writers.acked) >= goal, "messages")  # type: ignore[misc]
            await server.kill()
            await asyncio.wait_for(asyncio.gather(*tasks), 20)
        await server.restart()
    log = await alice.events(writers.room)
    assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
    for seq, client_id in writers.acked.items():
        event = log[seq - 1]
        assert (event["seq"], event["client_id"]) == (seq, client_id)
        assert event["message"] == writers.sent[client_id]
    stored = [event["client_id"] for event in log if event["type"] == "message"]
    assert len(stored) == len(set(stored))
    assert set(stored) <= writers.sent.keys()


async def test_1_what_a_kill_left_open_is_settled_by_sending_again(start: Start) -> None:
    """After kill -9 every message that got no answer is sent again, and is there once."""
    server = await start(strict=False)
    alice = await server.user("alice")
    writers = Writers(await alice.room())
    async with background(*(writers.by_socket(alice) for _ in range(10))) as tasks:
        await until(lambda: len(writers.acked) >= 100, "messages")
        await server.kill()
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
    await server.restart()
    known = {client_id: seq for seq, client_id in writers.acked.items()}
    for client_id, text in writers.sent.items():
        body = {"message": text, "client_id": client_id}
        answer = await alice.post(f"/rooms/{writers.room}/messages", json=body)
        if client_id in known:
            assert answer.ok(200)["seq"] == known[client_id]
        else:
            assert answer.status in {200, 201}, answer
    log = await alice.events(writers.room, 1)
    assert sorted(event["client_id"] for event in log) == sorted(writers.sent)


async def test_1_a_postgres_that_forgets_is_told_loudly(
    engine: str, start: Start, request: pytest.FixtureRequest
) -> None:
    """A cluster without fsync is named at the start and by /healthz; a good one is not."""
    good = await start()
    assert not (await good.get("/healthz")).ok()["warnings"]
    assert "fsync" not in good.process.stderr
    if engine == "sqlite":
        return
    cluster: postgres.Cluster = request.getfixturevalue("cluster")
    command = "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"
    await asyncio.to_thread(lambda: postgres.run_apart(postgres.execute(cluster.url, *command)))
    server = await start(database=cluster.url)
    assert "fsync" in server.process.stderr
    assert "fsync" in str((await server.get("/healthz")).ok()["warnings"])


# --- 2 and 3: one order, resumed for ever


async def test_2_everything_in_a_room_has_one_gapless_number(server: Server) -> None:
    """Messages, edits, deletes and membership share one row of numbers, the same for everybody."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    start = await alice.head(room)

    async def talk(ws: Chat, user: User) -> None:
        """Post, edit and delete over both transports, and never wait for the other."""
        for number in range(20):
            await ws.say(f"{user.username} {number}")
            event = await user.say(room, f"{user.username} {number} by REST")
            path = f"/rooms/{room}/messages/{event['seq']}"
            (await user.patch(path, json={"message": "edited"})).ok()
            (await user.delete(path)).ok(204)

    async with alice.chat(room) as one, bob.chat(room) as two:
        await asyncio.gather(talk(one, alice), talk(two, bob))
        await alice.appoint(room, bob, "moderator")
        head = start + 2 * 20 * 4 + 1
        await one.upto(head)
        await two.upto(head)
        assert one.numbers == two.numbers == list(range(start + 1, head + 1))
        assert one.events == two.events
    assert await alice.head(room) == head
    logged = await bob.events(room, after=start)
    assert [signature(event) for event in logged] == [signature(event) for event in one.events]


def signature(event: Event) -> tuple[object, ...]:
    """Return what an event is in every replay, whatever has become of its text since."""
    keys = ("seq", "type", "username", "client_id", "target", "member", "role", "created_at")
    return tuple(event.get(key) for key in keys)


async def wander(user: User, room: str, chance: random.Random) -> list[Event]:
    """Follow a room to the text "the end", dropping the connection at random on the way."""
    stream: list[Event] = []
    while True:
        cursor = stream[-1]["seq"] if stream else 0
        async with user.chat(room, after=cursor) as ws:
            for _ in range(chance.randrange(1, 120)):
                frame = await ws.next()
                assert frame["type"] not in {"reset", "error"}, frame
                if frame["type"] in NUMBERED:
                    stream.append(frame)
                if frame.get("message") == "the end":
                    return stream
            if chance.random() < 0.7:
                ws.drop()


async def write(user: User, room: str, count: int) -> None:
    """Write messages, some of which are edited or deleted a moment later."""
    async with user.chat(room) as ws:
        for number in range(count):
            seq = (await ws.deliver(f"message {number}"))["seq"]
            if number % 7 == 3:
                await ws.send({"type": "edit", "target": seq, "message": f"edited {number}"})
            if number % 11 == 5:
                await ws.send({"type": "delete", "target": seq})


async def test_3_fifty_who_drop_and_resume_see_the_log(server: Server) -> None:
    """Clients that join, drop and resume at random each see every event once, in order."""
    users = await server.users("alice", "bob", "carol", "root", "doer")
    room = await users[0].room(*users[1:])
    chance = random.Random(7)  # noqa: S311
    followers = [wander(user, room, random.Random(chance.random())) for user in users * 10]  # noqa: S311
    async with background(*followers) as tasks:
        await asyncio.gather(*(write(user, room, 40) for user in users[:4]))
        await users[0].say(room, "the end")
        async with asyncio.timeout(30):
            streams = await asyncio.gather(*tasks)
    log = [signature(event) for event in await users[0].events(room)]
    assert [row[0] for row in log] == list(range(1, len(log) + 1))
    assert len(log) > 190
    for stream in streams:
        assert [signature(event) for event in stream] == log


async def test_3_a_resume_reaches_over_a_restart(start: Start) -> None:
    """After the server's restart a client goes on from its last number, in the same epoch."""
    server = await start()
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        last = (await ws.deliver("before"))["seq"]
        epoch = ws.hello["epoch"]
        assert await asyncio.to_thread(server.process.stop) == 0
        assert await ws.closed() == 1001
    await server.restart()
    await alice.say(room, "while away")
    async with alice.chat(room, after=last, epoch=epoch) as ws:
        await ws.deliver("after")
        assert [event["message"] for event in ws.events] == ["while away", "after"]
        assert ws.numbers == [last + 1, last + 2]


async def test_3_the_seam_between_replay_and_live_shows_nowhere(server: Server) -> None:
    """Those who connect in the middle of a flood get each number once, without a gap."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        for number in range(200):
            await ws.say(f"old {number}")
        await ws.upto(201)

        async def flood() -> None:
            """Write as fast as the socket takes it."""
            for number in range(400):
                await ws.say(f"new {number}")
                if number % 20 == 0:
                    await asyncio.sleep(0)
            await ws.upto(601)

        async def join(after: int) -> list[int]:
            """Resume in the middle of it all and read to the end."""
            async with alice.chat(room, after=after) as late:
                await late.upto(601)
                return late.numbers

        joins = [join(after) for after in range(0, 200, 10)]
        _, *streams = await asyncio.gather(flood(), *joins)
    for after, numbers in zip(range(0, 200, 10), streams, strict=True):
        assert numbers == list(range(after + 1, 602))


# --- 4: retry for ever


async def test_4_one_client_id_twenty_times_at_once_makes_one_message(server: Server) -> None:
    """Over HTTP and sockets at the same time, one client id is one message with one number."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)

    async def by_socket(ws: Chat) -> int:
        """Send it over a socket, and return the number it is acknowledged under."""
        await ws.say("once", client_id="c1")
        return int((await ws.find(lambda frame: frame.get("client_id") == "c1"))["seq"])

    async def by_post() -> int:
        """Send it over HTTP, and return the number of the answer."""
        body = {"message": "once", "client_id": "c1"}
        answer = await alice.post(f"/rooms/{room}/messages", json=body)
        return int(answer.ok(201 if answer.status == 201 else 200)["seq"])

    async with AsyncExitStack() as stack:
        observer = await stack.enter_async_context(bob.chat(room))
        sockets = [await stack.enter_async_context(alice.chat(room)) for _ in range(10)]
        work = [job for ws in sockets for job in (by_socket(ws), by_post())]
        assert set(await asyncio.gather(*work)) == {3}
        last = await alice.say(room, "the last")
        for ws in (observer, *sockets):
            await ws.upto(last["seq"])
            assert ws.numbers == [3, 4]
    assert last["seq"] == 4


async def test_4_twenty_texts_under_one_client_id_make_one_message(server: Server) -> None:
    """Of different texts under one client id at once, one is stored and the others refused."""
    alice = await server.user("alice")
    room = await alice.room()
    bodies = [{"message": f"text {number}", "client_id": "c1"} for number in range(20)]
    posts = [alice.post(f"/rooms/{room}/messages", json=body) for body in bodies]
    answers = await asyncio.gather(*posts)
    assert sorted(answer.status for answer in answers) == [201] + [409] * 19
    assert await alice.head(room) == 2


async def test_4_a_retry_is_known_after_a_restart(start: Start) -> None:
    """A client id is remembered by the database, not by the process."""
    server = await start()
    alice = await server.user("alice")
    first = await alice.say("1", "once", client_id="c1")
    await server.kill()
    await server.restart()
    body = {"message": "once", "client_id": "c1"}
    assert (await alice.post("/rooms/1/messages", json=body)).ok(200)["seq"] == first["seq"]
    async with alice.chat("1") as ws:
        await ws.say("once", client_id="c1")
        assert (await ws.event("ack"))["seq"] == first["seq"]
        await ws.say("twice", client_id="c1")
        await ws.refusal("conflict")


# --- 5: nobody waits for a slow reader


async def latencies(ws: Chat, observer: Chat, text: str, count: int) -> list[float]:
    """Send messages one by one; return how long each took to reach its sender and an observer."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        seq = (await ws.deliver(text))["seq"]
        await observer.upto(seq)
        times.append(time.perf_counter() - began)
        ws.frames.clear()
        observer.frames.clear()
    return times


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")
async def test_5_a_stalled_reader_delays_nobody_and_is_cut(start: Start) -> None:
    """In a room of 100 stalled readers change no latency, and are cut off and freed."""
    server = await start(strict=False)
    alice = await server.user("alice")
    room = await alice.room()
    text = "愛" * 4000
    wires = [Wire(alice, room) for _ in range(95)]
    for wire in wires:
        wire.swallow()
    pid = server.process.popen.pid
    try:
        async with alice.chat(room) as ws, alice.chat(room) as observer:
            before = await latencies(ws, observer, text, 40)
            stalled = [Wire(alice, room, buffer=4096) for _ in range(3)]
            wires += stalled
            assert all(wire.held_by(pid) for wire in stalled)
            during: list[float] = []
            async with asyncio.timeout(20):
                while any(wire.held_by(pid) for wire in stalled):
                    during += await latencies(ws, observer, text, 20)
            after = await latencies(ws, observer, text, 20)
        assert {wire.close_code() for wire in stalled} <= {4408, 1006}
    finally:
        for wire in wires:
            wire.close()
    usual = statistics.median(before)
    assert statistics.median(during) < 2 * usual + 0.02
    assert statistics.median(after) < 2 * usual + 0.02
    assert max(during) < max(before) + 0.5


async def test_5_who_was_cut_off_resumes(server: Server) -> None:
    """A client that was cut off for not reading comes back and has missed nothing."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    stalled = Wire(bob, room, buffer=4096)
    pid = server.process.popen.pid
    try:
        async with alice.chat(room) as ws:
            async with asyncio.timeout(20):
                while stalled.held_by(pid):
                    for _ in range(20):
                        await ws.say("愛" * 4000)
                    head = (await ws.deliver("the end"))["seq"]
        async with bob.chat(room, after=2) as late:
            await late.upto(head)
            assert late.numbers == list(range(3, head + 1))
    finally:
        stalled.close()


async def test_5_a_replay_larger_than_the_limit_is_no_slow_reader(server: Server) -> None:
    """A client that reads a replay of several MB slowly is waited for, not cut off."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        for _ in range(20):
            for _ in range(20):
                await ws.say("愛" * 4000)
            head = (await ws.deliver("the end"))["seq"]
    async with alice.chat(room, after=0) as slow:
        while len(slow.numbers) < 50:
            await slow.next()
            await asyncio.sleep(0.01)
        await slow.upto(head)
        assert slow.numbers == list(range(1, head + 1))


# --- 6: shut means shut


async def log_out(_: User, bob: User, __: str) -> Answer:
    """Log bob out."""
    return await bob.post("/auth/logout")


async def change_password(_: User, bob: User, __: str) -> Answer:
    """Change bob's password."""
    return await bob.post("/auth/password", json={"password": PASSWORD, "new_password": "4321"})


async def delete_account(_: User, bob: User, __: str) -> Answer:
    """Delete bob's account."""
    return await bob.delete("/users/me", json={"password": PASSWORD})


async def remove(alice: User, bob: User, room: str) -> Answer:
    """Remove bob from the room."""
    return await alice.delete(f"/rooms/{room}/members/{bob.username}")


async def ban(alice: User, bob: User, room: str) -> Answer:
    """Ban bob from the room."""
    return await alice.put(f"/rooms/{room}/members/{bob.username}", json={"role": "banned"})


async def delete_room(alice: User, _: User, room: str) -> Answer:
    """Delete the room."""
    return await alice.delete(f"/rooms/{room}")


Shut = Callable[[User, User, str], Awaitable[Answer]]


@asynccontextmanager
async def chatter(user: User, room: str) -> AsyncIterator[None]:
    """Write into a room without a pause beside the block, as long as it is there."""

    async def talk() -> None:
        """Write over HTTP, again and again."""
        for number in itertools.count():
            answer = await user.post(f"/rooms/{room}/messages", json={"message": f"m {number}"})
            if answer.status == 404:
                return
            answer.ok(201)

    async with background(talk()) as (task,):
        yield
        assert not task.done() or task.exception() is None


@pytest.mark.parametrize(
    ("shut", "code"),
    [
        (log_out, 4401),
        (change_password, 4401),
        (delete_account, 4401),
        (remove, 4403),
        (ban, 4403),
        (delete_room, 4404),
    ],
)
@pytest.mark.parametrize("kind", ["public", "private"])
async def test_6_shut_means_shut(server: Server, shut: Shut, code: int, kind: str) -> None:
    """Whatever shuts a user out closes all of their sockets, and nothing later arrives."""
    alice = await server.user("alice")
    bob = await server.user("bob", fresh=code == 4401)
    room = await alice.room(bob, kind=kind)
    async with (
        chatter(alice, room),
        bob.chat(room) as first,
        server.chat(room) as second,
        alice.chat(room) as hers,
    ):
        await second.send({"type": "auth", "token": bob.token})
        await second.event("hello")
        for ws in (first, second):
            await ws.event("message")
        answer = await shut(alice, bob, room)
        assert answer.status in {200, 204}, answer
        if code != 4404:
            later = await alice.say(room, "not for bob")
            await hers.upto(later["seq"])
        for ws in (first, second):
            assert await ws.closed() == code
            assert ws.reason
            assert not any(event.get("message") == "not for bob" for event in ws.events)
    if code == 4403:
        (removal,) = [
            event
            for event in await alice.events(room)
            if event["type"] == "member"
            and event["member"] == bob.username
            and event["role"] in {None, "banned"}
        ]
        for ws in (first, second):
            assert max(ws.numbers) <= removal["seq"]
    if code == 4401:
        (await bob.get("/users/me")).refused(401, "unauthorized")


async def test_6_a_logout_leaves_others_alone(server: Server) -> None:
    """A logout closes the user's sockets in every room, and nobody else's."""
    alice = await server.user("alice")
    bob = await server.user("bob", fresh=True)
    rooms = [await alice.room(bob) for _ in range(2)]
    async with (
        alice.chat(rooms[0]) as hers,
        bob.chat(rooms[0]) as first,
        bob.chat(rooms[1]) as second,
    ):
        (await bob.post("/auth/logout")).ok(204)
        assert await first.closed() == 4401
        assert await second.closed() == 4401
        await hers.deliver("still here")


async def test_6_a_removal_from_one_room_leaves_the_other_open(server: Server) -> None:
    """Who is removed from one room stays connected to another."""
    alice, bob = await server.users("alice", "bob")
    rooms = [await alice.room(bob) for _ in range(2)]
    async with bob.chat(rooms[0]) as first, bob.chat(rooms[1]) as second:
        (await alice.delete(f"/rooms/{rooms[0]}/members/{bob.username}")).ok(204)
        assert await first.closed() == 4403
        await second.deliver("still here")


async def test_6_a_socket_outlives_its_token_by_nothing(server: Server) -> None:
    """When the token expires the socket closes with 4401, and nothing later arrives."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    ends = int(time.time()) + 2
    token = forge(claims(bob.token) | {"exp": ends})
    async with server.chat(room, token=token) as ws, chatter(alice, room):
        assert await ws.closed() == 4401
        assert ends - 0.2 < time.time() < ends + 1.5
        later = [
            event
            for event in ws.events
            if event["created_at"] > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ends + 1))
        ]
        assert later == []
    (await server.get("/users/me", token=token)).refused(401, "unauthorized")


async def test_6_a_renewed_login_counts_from_then_on(server: Server) -> None:
    """A socket whose login was renewed in time lives past the first token's end."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    ends = int(time.time()) + 2
    token = forge(claims(bob.token) | {"exp": ends})
    async with server.chat(room, token=token) as ws:
        await ws.send({"type": "auth", "token": bob.token})
        await ws.deliver("renewed")
        await until(lambda: time.time() > ends + 1, "the old token's end")
        await ws.deliver("still here")


# --- 8: a delete really erases


async def test_8_a_deleted_text_is_nowhere(
    start: Start, engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """A deleted text, with all its edits, is in no answer and in no byte of the database."""
    database = await asyncio.to_thread(new_database, tmp_path)
    server = await start(database=database)
    alice = await server.user("alice")
    room = await alice.room()
    words = [unique(f"secret{number}") for number in range(4)]
    async with alice.chat(room) as ws:
        for number in range(50):
            await ws.say(f"chatter {number} " + "x" * 200)
        first = (await ws.deliver(words[0], client_id="c1"))["seq"]
        await ws.send({"type": "edit", "target": first, "message": words[1]})
        await ws.event("edit")
        await ws.send({"type": "edit", "target": first, "message": words[2] + "y" * 1000})
        await ws.event("edit")
        second = (await ws.deliver(words[3] * 50))["seq"]
        for seq in (first, second):
            await ws.send({"type": "delete", "target": seq})
            await ws.event("delete", target=seq)
    async with alice.chat(room, after=0) as replay:
        await replay.upto(await alice.head(room))
    shown = [
        str(replay.frames),
        str(await alice.events(room)),
        str((await alice.get(f"/rooms/{room}/messages?limit=200")).ok()),
        str((await alice.post(f"/rooms/{room}/messages", json=retry(words[0]))).ok(200)),
        *[str((await alice.get(f"/search?q={word}")).ok()) for word in words],
    ]
    assert await asyncio.to_thread(server.process.stop) == 0
    for word in words:
        assert not any(word in each for each in shown)
        assert word not in server.process.stderr
    if engine == "sqlite":
        assert remains_in_files(tmp_path / "chat.db", words) == []
    else:
        assert await remains_in_tables(database, words) == []


def retry(text: str) -> dict[str, str]:
    """Return the body of the retry of the first message."""
    return {"message": text, "client_id": "c1"}


def remains_in_files(path: Path, words: list[str]) -> list[str]:
    """Return which words are still in SQLite's files after a checkpoint."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    files = [file.read_bytes() for file in path.parent.glob(path.name + "*") if file.is_file()]
    return [word for word in words if any(word.encode() in data for data in files)]


async def remains_in_tables(url: str, words: list[str]) -> list[str]:
    """Return which words are still in any row of any table of a Postgres database."""
    connection = await asyncpg.connect(url)
    try:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        tables = [row[0] for row in await connection.fetch(query)]
        assert tables
        found = []
        for table, word in itertools.product(tables, words):
            count = f'SELECT count(*) FROM "{table}" AS t WHERE t::text LIKE $1'  # noqa: S608
            if await connection.fetchval(count, f"%{word}%"):
                found.append(word)
        return found
    finally:
        await connection.close()


async def test_8_an_edit_erases_the_former_text_from_answers(server: Server) -> None:
    """After an edit the former text is in no history, log, search or replay."""
    alice = await server.user("alice")
    room = await alice.room()
    word = unique("former")
    seq = (await alice.say(room, word))["seq"]
    (await alice.patch(f"/rooms/{room}/messages/{seq}", json={"message": "new"})).ok()
    async with alice.chat(room, after=0) as ws:
        await ws.upto(seq + 1)
        assert word not in str(ws.frames)
    assert word not in str(await alice.events(room))
    assert (await alice.get(f"/search?q={word}")).ok() == []
