"""Keeping a server for years: retention, backups, lost passwords and files, full disks."""

import asyncio
import hashlib
import resource
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Databases, Start
from tests.helpers import (
    PASSWORD,
    SECRET,
    Chat,
    Event,
    Process,
    Server,
    User,
    background,
    run,
)
from tests.postgres import run_apart

DAY = 86_400_000
sqlite_only = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
postgres_only = pytest.mark.parametrize("engine", ["postgres"], indirect=True)


def file_of(database: str) -> Path:
    """Return the file of an SQLite database."""
    return Path(database.removeprefix("sqlite:///"))


async def on_postgres(url: str, sql: str) -> list[Any]:
    """Run one statement on a Postgres and return its rows."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


def rows(database: str, sql: str) -> list[Any]:
    """Run one statement on the database itself, behind the server's back, and return its rows."""
    if not database.startswith("sqlite"):
        return run_apart(on_postgres(database, sql))
    connection = sqlite3.connect(file_of(database), timeout=5)
    try:
        found = connection.execute(sql).fetchall()
        connection.commit()
    finally:
        connection.close()
    return found


def in_files(database: str, text: str) -> bool:
    """Return whether the database still has a text anywhere: SQLite's files, or Postgres' rows."""
    if database.startswith("sqlite"):
        path = file_of(database)
        return any(text.encode() in file.read_bytes() for file in path.parent.glob("chat.db*"))
    like = f"message LIKE '%{text}%' OR folded LIKE '%{text.casefold()}%'"
    return bool(rows(database, f"SELECT seq FROM events WHERE {like}"))  # noqa: S608


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until a condition that has to ask the server holds."""
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        await asyncio.sleep(0.05)


async def stopped(server: Server) -> str:
    """Stop a server in good order and return its database."""
    assert await asyncio.to_thread(server.process.stop) == 0, server.process.stderr
    return server.database


def at(server: Server, user: User) -> User:
    """Return the same user on another server of the same database."""
    return User(server, (user.username, user.email, user.password, user.token))  # type: ignore[arg-type]


# --- Retention


class Aged:
    """A room in which the events up to `old` are three days old, and a server that keeps two."""

    def __init__(self, server: Server, alice: User, room: str, old: int) -> None:
        """Keep all of it."""
        self.server, self.alice, self.room, self.old = server, alice, room, old


SAID = [f"Pumpernickel number {number}" for number in range(6)]


@pytest.fixture
async def aged(start: Start) -> Aged:
    """Make a room whose first half has expired, and wait until the server has noticed."""
    server = await start()
    alice = await server.user()
    room = await alice.room()
    posts = [await alice.say(room, text, client_id=f"c{n}") for n, text in enumerate(SAID[:2])]
    posts += [await alice.say(room, text) for text in SAID[2:]]
    (
        await alice.patch(f"/rooms/{room}/messages/{posts[0]['seq']}", json={"message": "Edited"})
    ).ok()
    database = await stopped(server)
    old = int(posts[2]["seq"])
    before = int(time.time() * 1000) - 3 * DAY
    where = f"room_id = '{room}' AND seq <= {old} RETURNING seq"
    rows(database, f"UPDATE events SET created_at = {before} WHERE {where}")  # noqa: S608
    server = await start(database=database, retention_days=2)
    alice = at(server, alice)

    async def expired() -> bool:
        """Tell whether the floor has risen."""
        return (await alice.get(f"/rooms/{room}/events?after={old - 1}")).status == 410

    await eventually(expired, "the old events to expire")
    return Aged(server, alice, room, old)


async def test_expired_events_are_410_and_reset_and_the_rest_is_there(aged: Aged) -> None:
    """Below the floor `after` is 410 or a reset frame; from the floor on everything comes."""
    alice, room, old = aged.alice, aged.room, aged.old
    head = old + 4
    answer = await alice.get(f"/rooms/{room}/events?after=0")
    answer.refused(410, "reset")
    epoch = answer.json["epoch"]
    assert answer.json.items() >= {"floor": old, "seq": head}.items()
    async with alice.chat(room, after=old - 1) as chat:
        reset = await chat.event("reset")
        expected = {"type": "reset", "room_id": room, "floor": old, "seq": head, "epoch": epoch}
        assert reset == expected
        await chat.deliver("live again")
        assert chat.numbers == [head + 1]
    async with alice.chat(room, after=old) as chat:
        await chat.upto(head + 1)
        assert chat.numbers == list(range(old + 1, head + 2))
        assert not [frame for frame in chat.frames if frame["type"] == "reset"]
        edit = next(event for event in chat.events if event["type"] == "edit")
        assert edit["target"] == 2
        assert "message" not in edit, "its message has expired"
    assert [event["seq"] for event in await alice.events(room, old)] == chat.numbers


async def test_an_expired_text_is_nowhere(aged: Aged) -> None:
    """History, search, edits and the database itself know nothing of what has expired."""
    alice, room = aged.alice, aged.room
    page = (await alice.get(f"/rooms/{room}/messages?limit=200")).ok()
    assert [message["message"] for message in page] == SAID[3:]
    page = (await alice.get(f"/rooms/{room}/messages?after=0")).ok()
    assert [message["message"] for message in page] == SAID[3:]
    found = (await alice.get("/search?q=pumpernickel")).ok()
    assert [message["message"] for message in found] == SAID[:2:-1]
    assert (await alice.get(f"/search?q=edited&room_id={room}")).ok() == []
    for seq in (2, 3, 4):
        path = f"/rooms/{room}/messages/{seq}"
        (await alice.patch(path, json={"message": "back again"})).refused(404, "not_found")
        (await alice.delete(path)).refused(404, "not_found")
    for text in ("Edited", *SAID[:3]):

        async def gone(text: str = text) -> bool:
            """Tell whether the text is out of the database."""
            return not in_files(aged.server.database, text)

        await eventually(gone, f"{text!r} to be erased from the database")


async def test_a_retry_is_known_after_retention(aged: Aged) -> None:
    """A client_id whose message has expired is answered with the first number, for ever."""
    alice, room = aged.alice, aged.room
    head = await alice.head(room) if aged.old == 0 else aged.old + 4
    for number in (0, 1):
        body = {"message": SAID[number], "client_id": f"c{number}"}
        event = (await alice.post(f"/rooms/{room}/messages", json=body)).ok(200)
        assert event["seq"] == number + 2
        assert "message" not in event
    async with alice.chat(room) as chat:
        assert chat.hello["seq"] == head, "no message was made"
        await chat.say(SAID[1], client_id="c1")
        ack = await chat.event("ack")
        assert (ack["client_id"], ack["seq"]) == ("c1", 3)
        assert chat.numbers == []


async def test_a_room_whose_every_event_expired_goes_on_counting(start: Start) -> None:
    """When all has expired the floor is the head, and the next message has the next number."""
    server = await start()
    alice = await server.user()
    room = await alice.room()
    last = await alice.say(room, "soon old")
    database = await stopped(server)
    rows(database, "UPDATE events SET created_at = 1000 RETURNING seq")
    server = await start(database=database, retention_days=1)
    alice = at(server, alice)

    async def expired() -> bool:
        """Tell whether the floor is the head."""
        return (await alice.get(f"/rooms/{room}/events?after={last['seq'] - 1}")).status == 410

    await eventually(expired, "everything to expire")
    assert (await alice.get(f"/rooms/{room}/messages")).ok() == []
    assert (await alice.get(f"/rooms/{room}/events?after={last['seq']}")).ok()["events"] == []
    assert (await alice.say(room, "young"))["seq"] == last["seq"] + 1
    async with alice.chat(room, last=5) as chat:
        await chat.upto(last["seq"] + 1)
        assert chat.numbers == [last["seq"] + 1]


async def test_without_retention_nothing_expires(start: Start) -> None:
    """With retention_days=0 an event of 1970 is kept."""
    server = await start()
    alice = await server.user()
    await alice.say("1", "very old")
    database = await stopped(server)
    rows(database, "UPDATE events SET created_at = 1000 RETURNING seq")
    server = await start(database=database)
    alice = at(server, alice)
    await alice.say("1", "young")
    assert (await alice.events("1"))[0]["created_at"] == "1970-01-01T00:00:01.000Z"


async def test_a_deleted_rooms_text_goes(start: Start) -> None:
    """After the next upkeep no text of a deleted room is left, and its id is kept."""
    server = await start()
    alice = await server.user()
    room = await alice.room()
    for number in range(20):
        await alice.say(room, f"Sauerkraut {number}", client_id=f"{number}")
    assert await asyncio.to_thread(in_files, server.database, "Sauerkraut")
    (await alice.delete(f"/rooms/{room}")).ok(204)
    database = await stopped(server)
    server = await start(database=database)

    async def gone() -> bool:
        """Tell whether the text is out of the database."""
        return not (in_files(database, "Sauerkraut") or in_files(database, "sauerkraut"))

    await eventually(gone, "the deleted room's text to be erased")
    body = {"room_id": room, "name": "again"}
    (await at(server, alice).post("/rooms", json=body)).refused(409, "conflict")


# --- Backups


async def chatter(chat: Chat, acked: list[Event]) -> None:
    """Write without a pause, and keep what was acknowledged."""
    while True:
        acked.append(await chat.deliver("noise " * 20))


@sqlite_only
async def test_a_backup_under_load_is_consistent_and_noticed(start: Start, tmp_path: Path) -> None:
    """A copy made under load has all that was acked, is consistent, and resets old cursors."""
    server = await start()
    alice, bob = await server.users("alice", "bob")
    epoch = await alice.epoch("1")
    copy = tmp_path / "chat.db"
    acked: list[Event] = []
    async with (
        alice.chat("1") as one,
        bob.chat("1") as two,
        background(chatter(one, acked), chatter(two, acked)),
    ):
        await asyncio.sleep(0)
        while len(acked) < 20:
            await asyncio.sleep(0.01)
        before = max(event["seq"] for event in acked)
        arguments = ("backup", str(copy))
        settings: dict[str, Any] = {"database_url": server.database}
        for _ in range(2):  # the second replaces the first
            done = await asyncio.to_thread(run, tmp_path, *arguments, **settings)
            assert done[0] == 0, done
        after = max(event["seq"] for event in acked)
    assert after > before, "the server went on meanwhile"
    assert not list(tmp_path.glob("chat.db?*")), "only the copy is left behind"
    url = f"sqlite:///{copy}"
    assert rows(url, "PRAGMA integrity_check") == [("ok",)]
    numbers = [seq for (seq,) in rows(url, "SELECT seq FROM events WHERE room_id = '1' ORDER BY 1")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert before <= len(numbers)
    assert rows(url, "SELECT seq FROM rooms WHERE room_id = '1'") == [(len(numbers),)]
    old, new = (rows(u, "SELECT value FROM meta") for u in (server.database, url))
    assert old != new
    await stopped(server)

    restored = await start(database=url)
    alice = at(restored, alice)
    (await alice.get(f"/rooms/1/events?after=5&epoch={epoch}")).refused(410, "reset")
    async with alice.chat("1", after=5, epoch=epoch) as chat:
        assert chat.hello["epoch"] != epoch
        reset = await chat.event("reset")
        assert (reset["epoch"], reset["seq"]) == (chat.hello["epoch"], chat.hello["seq"])
        await chat.deliver("live")
    async with alice.chat("1", after=5, epoch=chat.hello["epoch"]) as chat:
        await chat.upto(chat.hello["seq"])
        assert chat.numbers == list(range(6, chat.hello["seq"] + 1))


@sqlite_only
@pytest.mark.parametrize("case", ["no folder", "no database", "a folder"])
async def test_a_backup_that_fails_says_so_on_one_line(
    engine: str, tmp_path: Path, case: str
) -> None:
    """Where there is nothing to copy, or nowhere to copy to, one line says so."""
    assert engine == "sqlite"
    source = tmp_path / "chat.db"
    if case != "no database":
        sqlite3.connect(source).close()
        source.touch()
    target = (
        tmp_path if case == "a folder" else tmp_path / ("none/x.db" if "folder" in case else "y")
    )
    done = await asyncio.to_thread(
        run, tmp_path, "backup", str(target), database_url=f"sqlite:///{source}"
    )
    code, _, log = done
    assert code not in (0, -9), done
    assert "Traceback" not in log, log
    assert len(log.strip().splitlines()) == 1, log
    assert source.exists() == (case != "no database"), "a backup makes no database"


@postgres_only
async def test_a_backup_of_postgres_tells_what_to_do(start: Start, tmp_path: Path) -> None:
    """On Postgres backup exits 2, points to pg_dump, and its line of SQL renews the epoch."""
    server = await start()
    alice = await server.user()
    epoch = await alice.epoch("1")
    settings: dict[str, Any] = {"database_url": server.database, "secret_key": SECRET}
    code, out, log = await asyncio.to_thread(run, tmp_path, "backup", "x.sql", **settings)
    assert code == 2, log
    advice = out + log
    assert "pg_dump" in advice
    assert not list(tmp_path.glob("x.sql*"))
    database = await stopped(server)
    sql = advice[advice.index("UPDATE") :].split(";")[0].strip()
    run_apart(on_postgres(database, sql))
    server = await start(database=database)
    alice = at(server, alice)
    assert await alice.epoch("1") != epoch
    (await alice.get(f"/rooms/1/events?after=0&epoch={epoch}")).refused(410, "reset")


# --- Passwords


async def set_password(
    folder: Path, database: str, name: str, typed: str, **more: Any
) -> tuple[int, str, str]:
    """Run `set-password` with its two lines from a pipe."""
    settings = {"database_url": database, "secret_key": SECRET, **more}
    return await asyncio.to_thread(
        run, folder, "set-password", name, typed=typed, patience=10, **settings
    )


async def test_set_password_replaces_a_lost_password(start: Start, tmp_path: Path) -> None:
    """Two equal lines become the password, and every token of before is void."""
    server = await start()
    alice, bob = await server.users("alice", "bob")
    database = await stopped(server)
    done = await set_password(tmp_path, database, alice.username.upper(), "new one\nnew one\n")
    assert done[0] == 0, done
    assert "new one" not in done[1] + done[2]
    server = await start(database=database)
    (await server.get("/users/me", token=alice.token)).refused(401)
    (await server.get("/users/me", token=bob.token)).ok()
    (await server.login(alice.username)).refused(400, "invalid_grant")
    (await server.login(alice.username, "new one")).ok()


@pytest.fixture(scope="module")
def with_alice(new_database: Databases, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a database that has one account, whose server is stopped."""
    folder = tmp_path_factory.mktemp("alice")
    database = new_database(folder)
    process = Process(folder, "--port=0", settings={"database_url": database, "secret_key": SECRET})
    process.listening()
    process.stop()
    rows(
        database,
        "INSERT INTO users (username, email, password, version, created_at)"
        " VALUES ('alice', 'a@example.org', 'kept', 0, 0) RETURNING username",
    )
    return database


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("alice", "one\ntwo\n"),
        ("alice", "12345\n"),
        ("alice", ""),
        ("alice", "\n\n"),
        ("alice", "123\n123\n"),
        ("alice", "12345 \n12345\n"),
        ("alice", "x" * 1025 + "\n" + "x" * 1025 + "\n"),
        ("nobody-like-this", "12345\n12345\n"),
        ("", "12345\n12345\n"),
    ],
)
async def test_set_password_refuses_on_one_line(
    with_alice: str, tmp_path: Path, name: str, typed: str
) -> None:
    """Lines that differ, a bad password or an unknown name change nothing and say why."""
    done = await set_password(tmp_path, with_alice, name, typed)
    assert done[0] not in (0, -9), done
    assert "Traceback" not in done[2], done
    assert len(done[2].strip().splitlines()) == 1, done
    assert rows(with_alice, "SELECT password, version FROM users") == [("kept", 0)]


async def test_set_password_takes_an_email_address_or_refuses_it(
    start: Start, tmp_path: Path
) -> None:
    """Who is named by e-mail address gets the new password, or is refused on one line."""
    server = await start()
    alice = await server.user()
    database = await stopped(server)
    code, _, log = await set_password(tmp_path, database, alice.email, "new one\nnew one\n")
    assert "Traceback" not in log, log
    server = await start(database=database)
    (await server.login(alice.username, "new one" if code == 0 else PASSWORD)).ok()


@sqlite_only
async def test_set_password_leaves_a_running_servers_file_alone(
    start: Start, tmp_path: Path
) -> None:
    """With SQLite set-password is refused while the server runs, which goes on undisturbed."""
    server = await start()
    alice = await server.user()
    async with alice.chat("1") as chat:
        done = await set_password(tmp_path, server.database, alice.username, "12345\n12345\n")
        assert done[0] not in (0, -9), done
        assert len(done[2].strip().splitlines()) == 1, done
        await chat.deliver("undisturbed")
    (await server.login(alice.username)).ok()


@postgres_only
async def test_set_password_works_beside_a_running_server(start: Start, tmp_path: Path) -> None:
    """With Postgres set-password works at once, and closes the user's sockets 4401."""
    server = await start()
    alice, bob = await server.users("alice", "bob")
    async with alice.chat("1") as chat, bob.chat("1") as other:
        done = await set_password(tmp_path, server.database, alice.username, "12345\n12345\n")
        assert done[0] == 0, done
        assert await chat.closed() == 4401
        await other.deliver("undisturbed")
    (await server.login(alice.username, "12345")).ok()


@pytest.mark.parametrize(("n", "r", "p"), [(2**13, 8, 1), (2**15, 8, 1)])
async def test_a_hash_with_other_parameters_is_renewed_at_log_in(
    start: Start, n: int, r: int, p: int
) -> None:
    """Who logs in with the right password gets today's hash; tokens stay valid."""
    server = await start()
    alice = await server.user()
    salt = b"salt of 16 bytes"
    digest = hashlib.scrypt(PASSWORD.encode(), salt=salt, n=n, r=r, p=p, maxmem=2**28)
    stored = f"scrypt${n}${r}${p}${salt.hex()}${digest.hex()}"
    where = f"username = '{alice.username}'"
    read = f"SELECT password FROM users WHERE {where}"  # noqa: S608
    shape = rows(server.database, read)[0][0].split("$")
    assert shape[:4] == ["scrypt", "16384", "8", "5"], "the test knows how hashes are kept"
    database = await stopped(server)
    rows(database, f"UPDATE users SET password = '{stored}' WHERE {where} RETURNING 1")  # noqa: S608
    server = await start(database=database)
    (await server.login(alice.username, "wrong")).refused(400, "invalid_grant")
    assert rows(database, read) == [(stored,)], "a wrong password renews nothing"
    token = (await server.login(alice.username)).ok()["access_token"]
    assert rows(database, read)[0][0].startswith("scrypt$16384$8$5$")
    for each in (token, alice.token):
        (await server.get("/users/me", token=each)).ok()
    (await server.login(alice.username)).ok()
    (await server.login(alice.username, "wrong")).refused(400, "invalid_grant")


# --- Files that go away, disks that are full


@sqlite_only
@pytest.mark.parametrize("how", ["deleted", "swapped", "moved away and back"])
async def test_a_file_that_is_gone_stops_acknowledgements(start: Start, how: str) -> None:
    """Once its database file is gone or another, the server acknowledges nothing more."""
    server = await start()
    alice = await server.user()
    path = file_of(server.database)
    async with alice.chat("1") as chat:
        await chat.deliver("stored")
        if how == "swapped":
            shutil.copy(path, f"{path}.new")
            Path(f"{path}.new").replace(path)
        elif how == "deleted":
            path.unlink()
        else:
            path.rename(f"{path}.away")
        body = {"message": "lost?", "client_id": "lost"}
        await chat.send(body)
        error = await chat.refusal("unavailable")
        assert error["client_id"] == "lost"
        (await alice.post("/rooms/1/messages", json=body)).refused(503, "unavailable")
        (await server.get("/healthz")).refused(503, "unavailable")
        if how == "moved away and back":
            path.with_name(f"{path.name}.away").rename(path)
            (await server.get("/healthz")).ok()
            await chat.deliver("lost?", client_id="lost")
            await alice.say("1", "it has healed")
    if how == "moved away and back":
        await server.kill()
        await server.restart()
        texts = [event.get("message") for event in await alice.events("1")]
        assert texts[-3:] == ["stored", "lost?", "it has healed"]


@sqlite_only
async def test_a_first_frame_while_the_database_is_away_is_told_to_come_back(start: Start) -> None:
    """A log-in by first frame that cannot be checked closes 1013, which reconnects, not 4401."""
    server = await start()
    alice = await server.user()
    path = file_of(server.database)
    async with server.session.ws_connect(f"{server.url}/websockets/chat/1") as ws:
        path.rename(f"{path}.away")
        await ws.send_json({"type": "auth", "token": alice.token})
        closing = await ws.receive(timeout=5)
        assert (closing.data, ws.close_code) == (1013, 1013)
    Path(f"{path}.away").rename(path)
    async with alice.chat("1") as chat:
        await chat.deliver("it has healed")


@sqlite_only
async def test_a_full_disk_loses_nothing_acknowledged(start: Start) -> None:
    """While nothing can be written sends are `unavailable`; with room again all goes on."""
    server = await start()
    alice = await server.user()
    pid = server.process.popen.pid
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    path = file_of(server.database)
    acked: list[int] = []
    async with alice.chat("1") as chat:
        acked += [(await chat.deliver("before"))["seq"]]
        sizes = [file.stat().st_size for file in path.parent.glob("chat.db*")]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(sizes) + 100_000, unlimited[1]))
        refused: Event = {}
        while not refused:
            assert len(acked) < 1000, "the limit has no effect"
            await chat.say("x" * 3000, client_id=f"c{len(acked)}")
            answer = await chat.find(lambda frame: frame["type"] in ("message", "error"))
            if answer["type"] == "message":
                acked.append(answer["seq"])
            else:
                refused = answer
        assert (refused["error"], refused["client_id"]) == ("unavailable", f"c{len(acked)}")
        body = {"message": "x" * 9999}
        (await alice.post("/rooms/1/messages", json=body)).refused(400)
        body = {"message": "x" * 3000}
        (await alice.post("/rooms/1/messages", json=body)).refused(503, "unavailable")
        page = (await alice.get("/rooms/1/messages?limit=1")).ok()
        assert page[0]["seq"] == acked[-1], "reading goes on"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        again = await chat.deliver("x" * 3000, client_id=f"c{len(acked)}")
        assert again["seq"] == acked[-1] + 1
        acked.append(again["seq"])
    await server.kill()
    await server.restart()
    log = await alice.events("1")
    numbers = [event["seq"] for event in log]
    assert numbers == list(range(1, acked[-1] + 1))
    assert set(acked) == {event["seq"] for event in log if event["type"] == "message"}
    assert rows(server.database, "PRAGMA integrity_check") == [("ok",)]


# --- Figures


def figures(text: str) -> dict[str, float]:
    """Return the samples as Prometheus' own parser reads them; labels stay in the name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.type in ("counter", "gauge"), family
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


async def test_metrics_are_read_by_prometheus(start: Start) -> None:
    """Figures count sockets, rooms, messages, deliveries, batches and errors by code."""
    server = await start(metrics="on")
    alice, bob = await server.users("alice", "bob")
    async with alice.chat("1") as one, bob.chat("1") as two:
        before = figures((await server.get("/metrics")).body.decode())
        for number in range(5):
            await one.deliver(f"{number}")
        await two.event("message", message="4")
        for _ in range(3):
            (await server.get("/rooms")).refused(401)
        (await server.get("/nothing-here")).refused(404)
        await one.send({"type": "nonsense"})
        await one.refusal("bad_request")
        answer = await server.get("/metrics")
        after = figures(answer.body.decode())
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "version=0.0.4" in answer.headers["Content-Type"]
    assert after["chatserver_sockets"] == 2
    assert after["chatserver_rooms"] == 1
    assert after["chatserver_queue"] == 0

    def grew(name: str) -> float:
        """Return by how much a counter grew."""
        return after[name] - before.get(name, 0)

    assert grew("chatserver_messages_total") == 5
    assert grew("chatserver_deliveries_total") == 10
    assert 1 <= grew("chatserver_batches_total") <= 5
    assert grew("chatserver_batch_messages_total") == 5
    assert 0 < grew("chatserver_commit_seconds_total") < 10
    assert after["chatserver_slow_readers_total"] == 0
    assert grew('chatserver_errors_total{code="unauthorized"}') == 3
    assert grew('chatserver_errors_total{code="not_found"}') == 1
    assert grew('chatserver_errors_total{code="bad_request"}') == 1


async def test_metrics_are_there_from_the_start(start: Start) -> None:
    """A fresh server has every figure already, at 0, so that a first error is a rise."""
    server = await start(metrics="on")
    found = figures((await server.get("/metrics")).body.decode())
    for name in ("messages", "deliveries", "batches", "commit_seconds", "slow_readers"):
        assert f"chatserver_{name}_total" in found


async def test_metrics_are_off_by_default(server: Server) -> None:
    """Unless they are switched on, /metrics is 404 like any unknown path."""
    (await server.get("/metrics")).refused(404, "not_found")
