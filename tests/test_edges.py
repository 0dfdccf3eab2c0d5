"""What happens at once, meanwhile, or with what no honest client would send."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import Start
from tests.helpers import PASSWORD, Server, User, Wire, background, run, unique, until
from tests.test_settings import one_line


async def fill(user: User, room: str) -> None:
    """Write more into a room than a stalled reader's buffers hold."""
    await asyncio.gather(*(user.say(room, "x" * 4000) for _ in range(200)))


# --- Fields that a route does not have


@pytest.mark.parametrize(
    "body", [{"void": 0}, {"password": "x"}, {"password": "x", "before": "y", "me": "alice"}]
)
async def test_a_logout_takes_nothing_from_its_body(
    server: Server, body: dict[str, object]
) -> None:
    """Whatever its body says, a logout voids every token and leaves the password alone."""
    alice = await server.user(fresh=True)
    (await alice.post("/auth/logout", json=body)).ok(204)
    (await alice.get("/users/me")).refused(401)
    (await server.login(alice.username)).ok()


async def test_ones_own_account_is_nobody_elses(server: Server) -> None:
    """No query makes /users/me show another one than the caller."""
    alice, bob = await server.users("alice", "bob")
    me = (await alice.get(f"/users/me?username={bob.username}")).ok()
    assert (me["username"], me["email"]) == (alice.username, alice.email)


async def test_nobody_is_called_me(server: Server) -> None:
    """A name that /users/me would hide is not given."""
    form = {"username": "Me", "email": f"{unique('me')}@example.org", "password": PASSWORD}
    (await server.post("/auth/register", json=form)).refused(400, "bad_request")


async def test_an_email_is_compared_without_case_in_every_script(server: Server) -> None:
    """Who registered with an e-mail in capitals beyond ASCII logs in with it in any case."""
    name = unique("zoe")
    form = {"username": name, "email": f"ÄÉ.{name}@Example.org", "password": PASSWORD}
    (await server.post("/auth/register", json=form)).ok(201)
    (await server.login(form["email"])).ok()
    (await server.login(form["email"].lower())).ok()
    again = form | {"username": unique("zoe"), "email": form["email"].lower()}
    (await server.post("/auth/register", json=again)).refused(409, "conflict")


@pytest.mark.parametrize(
    "target",
    [["\ud800"], {"a": 1}, 1.5, 10**4200, -1, "\ud800", True],
    ids=lambda target: ascii(target)[:9],
)
async def test_a_target_that_is_none_is_refused_and_hurts_nobody(
    server: Server, target: object
) -> None:
    """A refused frame with a senseless target is answered without it, and all else goes on."""
    alice = await server.user()
    room = await alice.room()
    async with alice.chat(room) as chat:
        first = await chat.deliver("one", client_id="twice")
        await chat.send({"message": "two", "client_id": "twice", "target": target})
        refusal = await chat.refusal("conflict")
        assert refusal["client_id"] == "twice"
        assert "target" not in refusal
        await chat.send({"type": "edit", "target": target, "message": "x"})
        assert "target" not in await chat.refusal("bad_request")
        assert (await chat.deliver("three"))["seq"] == first["seq"] + 1


# --- Marks and presence


async def test_a_read_mark_is_never_told_backwards(server: Server) -> None:
    """Others do not hear of a mark that did not move."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        last = (await his.deliver("hello"))["seq"]
        for seq in (last, last - 1, last):
            await his.send({"type": "read", "seq": seq})
        await his.deliver("read")
        await hers.event("message", message="read")
    marks = [frame["seq"] for frame in hers.frames if frame["type"] == "read"]
    assert marks == [last]


async def test_hello_names_everybody_who_is_here(server: Server) -> None:
    """Who comes right after others is told of them at once."""
    alice, bob, carol = await server.users("alice", "bob", "carol")
    room = await alice.room(bob, carol)
    async with alice.chat(room), bob.chat(room), carol.chat(room) as chat:
        assert chat.hello["online"] == sorted(user.username for user in (alice, bob, carol))


async def test_who_comes_during_a_replay_is_told_after_it(server: Server) -> None:
    """A socket that is still being sent the log hears at its end who came meanwhile."""
    alice, bob, carol = await server.users("alice", "bob", "carol")
    room = await alice.room(bob, carol)
    await fill(alice, room)
    wire = Wire(alice, f"{room}?after=0", buffer=4096)

    def told() -> bool:
        """Read until bob's presence comes."""
        data = b""
        while b'"presence"' not in data or bob.username.encode() not in data[-1000:]:
            data = data[-1000:] + wire.socket.recv(1 << 16)
        return True

    try:
        async with carol.chat(room) as hers, bob.chat(room):
            await hers.event("presence", username=bob.username, online=True)
            assert await asyncio.to_thread(told)
    finally:
        wire.close()


# --- What was begun before an end


async def held_back(began: asyncio.Event, go: asyncio.Event) -> AsyncIterator[bytes]:
    """Send the first half of a message, and the second when told to."""
    yield b'{"message": '
    began.set()
    await go.wait()
    yield b'"too late"}'


@pytest.mark.parametrize("end", ["logout", "deletion"])
async def test_what_was_begun_before_a_login_ended_is_refused(server: Server, end: str) -> None:
    """A request whose body comes after its login has ended changes nothing."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    room, began, go = await alice.room(bob), asyncio.Event(), asyncio.Event()
    headers = {"Content-Type": "application/json"}
    post = bob.post(f"/rooms/{room}/messages", data=held_back(began, go), headers=headers)
    posting = asyncio.create_task(post)
    await began.wait()
    if end == "logout":
        (await bob.post("/auth/logout")).ok(204)
    else:
        (await bob.delete("/users/me", json={"password": PASSWORD})).ok(204)
    before = await alice.events(room)
    go.set()
    (await posting).refused(401, "unauthorized")
    assert await alice.events(room) == before


async def test_nothing_brings_a_deleted_room_back(server: Server) -> None:
    """Whatever reaches a room at the moment of its deletion, it is gone afterwards."""
    alice, bob = await server.users("alice", "bob")
    for _ in range(10):
        room = await alice.room(bob)
        answers = await asyncio.gather(
            alice.delete(f"/rooms/{room}"),
            alice.patch(f"/rooms/{room}", json={"name": "Back again"}),
            bob.post(f"/rooms/{room}/messages", json={"message": "hello?"}),
            *(alice.get(f"/rooms/{room}") for _ in range(5)),
        )
        assert answers[0].status == 204
        assert {answer.status for answer in answers} <= {200, 201, 204, 404}
        (await alice.get(f"/rooms/{room}")).refused(404, "not_found")


async def test_an_account_erases_its_texts_beside_the_end_of_their_room(server: Server) -> None:
    """An account is deleted with its texts though one of its rooms goes at the same time."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    rooms = [await alice.room(bob) for _ in range(4)]
    for room in rooms:
        async with bob.chat(room) as chat:
            for number in range(300):
                await chat.say(f"text {number}")
            await chat.deliver("the end")
    leaving = bob.delete("/users/me", json={"password": PASSWORD, "erase": True})
    leave = asyncio.create_task(leaving)
    for room in rooms[1:]:
        await asyncio.sleep(0.1)
        (await alice.delete(f"/rooms/{room}")).ok(204)
    (await leave).ok(204)
    assert all("message" not in event for event in await alice.events(rooms[0]))


async def test_who_says_good_bye_without_reading_is_let_go(server: Server) -> None:
    """A socket that closes but does not read what is left for it is freed after 2 seconds."""
    alice = await server.user()
    room = await alice.room()
    await fill(alice, room)
    wire = Wire(alice, f"{room}?after=0", buffer=4096)
    try:
        await asyncio.sleep(0.3)
        wire.socket.sendall(bytes((0x88, 0x82, 0, 0, 0, 0)) + (1000).to_bytes(2, "big"))
        held = server.process.popen.pid
        await until(lambda: not wire.held_by(held), "the descriptor to be freed", 10)
    finally:
        wire.close()


async def test_a_conflict_is_judged_by_what_the_same_moment_has_changed(server: Server) -> None:
    """A retry beside the edit of its message is acknowledged or in conflict, never a second one."""
    alice = await server.user()
    room = await alice.room()
    for number in range(10):
        body = {"message": "first", "client_id": f"c{number}"}
        seq = (await alice.post(f"/rooms/{room}/messages", json=body)).ok(201)["seq"]
        path = f"/rooms/{room}/messages"
        edit, retry = await asyncio.gather(
            alice.patch(f"{path}/{seq}", json={"message": "second"}),
            alice.post(path, json=body | {"message": "third"}),
        )
        assert edit.status == 200
        assert retry.status == 409 or retry.ok()["seq"] == seq
        assert (await alice.post(path, json=body)).ok()["seq"] == seq


async def test_a_direct_room_outlives_an_account(server: Server) -> None:
    """The same request gives the same direct room ever after, also when the other has left."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    form = {"kind": "direct", "username": bob.username}
    room = (await alice.post("/rooms", json=form)).ok(201)["room_id"]
    (await bob.delete("/users/me", json={"password": PASSWORD})).ok(204)
    assert (await alice.post("/rooms", json=form)).ok()["room_id"] == room
    (await alice.post("/rooms", json=form | {"username": unique("none")})).refused(404)


async def test_who_is_added_while_leaving_is_gone_too(server: Server) -> None:
    """An account that is made a member while it is being deleted is no member afterwards."""
    alice = await server.user("alice")
    room = await alice.room(kind="private")
    for _ in range(4):
        bob = await server.user(fresh=True)
        path = f"/rooms/{room}/members/{bob.username}"

        async def add(path: str = path) -> None:
            """Add and remove without end."""
            while True:
                await alice.put(path, json={})
                await alice.delete(path)

        async with background(add()):
            (await bob.delete("/users/me", json={"password": PASSWORD})).ok(204)
        members = (await alice.get(f"/rooms/{room}")).ok()["members"]
        assert [member["username"] for member in members] == [alice.username]


async def test_a_long_poll_ends_with_its_log_in(server: Server) -> None:
    """A logout ends the caller's long polls with 401, and those of others go on."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    room = await alice.room(bob)
    path = f"/rooms/{room}/events?after=2&wait=30"
    async with background(alice.get(path), bob.get(path)) as (mine, other):
        await asyncio.wait([mine, other], timeout=0.3)
        (await alice.post("/auth/logout")).ok(204)
        async with asyncio.timeout(5):
            (await mine).refused(401, "unauthorized")
        await asyncio.wait([other], timeout=0.3)
        assert not other.done()
        event = await bob.say(room, "go on")
        assert (await other).ok()["events"] == [event]


async def test_who_stops_reading_a_replay_is_cut_off(server: Server) -> None:
    """Who resumes and reads nothing is cut off within a minute, though they go on talking."""
    alice = await server.user("alice")
    room = await alice.room()
    await fill(alice, room)
    await fill(alice, room)
    with closing(Wire(alice, f"{room}?after=0", buffer=4096)) as wire:
        held = partial(wire.held_by, server.process.popen.pid)
        began = asyncio.get_running_loop().time()
        while held():
            assert asyncio.get_running_loop().time() - began < 60
            with suppress(ConnectionError):
                wire.socket.sendall(bytes((0x8A, 0x80, 0, 0, 0, 0)))  # a pong
            await asyncio.sleep(1)
        assert asyncio.get_running_loop().time() - began > 10


# --- Generous and exact


@pytest.mark.parametrize("name", ["limit", "wait"])
async def test_what_is_far_above_its_maximum_is_clamped_too(server: Server, name: str) -> None:
    """A limit or a wait may have any number of digits."""
    alice = await server.user()
    room = await alice.room()
    page = (await alice.get(f"/rooms/{room}/events?after=0&{name}=99999999999999999999")).ok()
    assert [event["seq"] for event in page["events"]] == [1]


async def test_an_empty_grant_type_is_none(server: Server) -> None:
    """A parameter without a value counts as left out (RFC 6749 3.1)."""
    alice = await server.user()
    form = {"username": alice.username, "password": PASSWORD}
    (await server.post("/auth/token", data=form | {"grant_type": ""})).ok()
    (await server.post("/auth/token", json=form | {"grant_type": None})).ok()


async def test_a_form_that_is_not_utf8_is_refused(server: Server) -> None:
    """A password whose bytes are no text is not taken for another one."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = b"username=alice&password=%ff%ff%ff%ff"
    (await server.post("/auth/token", data=body, headers=headers)).refused(400, "invalid_request")


async def test_users_after_a_name_in_capitals(server: Server) -> None:
    """A cursor of names is read as names are, without case."""
    alice = await server.user()
    users = (await alice.get(f"/users?after={alice.username.upper()}&limit=200")).ok()
    assert all(user["username"] > alice.username for user in users)


async def test_docs_without_a_cdn_allow_none(start: Start) -> None:
    """With the files of the docs at hand, or without them, the policy names nobody else."""
    for page in ("/docs", "/redoc"):
        assert "jsdelivr" in (await (await start()).get(page)).headers["Content-Security-Policy"]
        policy = (await (await start(docs_assets="off")).get(page)).headers
        assert "jsdelivr" not in policy["Content-Security-Policy"]


# --- The start


@pytest.mark.parametrize("content", ["", "short"])
def test_a_damaged_secret_is_told(tmp_path: Path, content: str) -> None:
    """A secret beside the database that is too short to sign with stops the start."""
    (tmp_path / "chat.db.secret").write_text(content)
    assert "chat.db.secret" in one_line(tmp_path, "--port", "0")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["registration", "closed"], "registration"),
        (["--password_min_length", "3"], "password_min_length"),
        (["--workers="], "workers"),
        (["--docs-assets", "nowhere"], "docs_assets"),
        (["--host", "no.such.host.invalid"], "chatserver: host"),
        (["--secret-key", "x" * 31], "secret_key"),
        (["--allowed-origins", "https://a.example,b.example"], "command line: allowed_origins"),
        (["--allowed-origins", "https://a.example/"], "command line: allowed_origins"),
        (["--allowed-origins", "*"], "command line: allowed_origins"),
        (["--password-min-length", "1025"], "command line: password_min_length"),
        (["--database-url", "sqlite:///:memory:"], "command line: database_url"),
        (["backup"], "--help"),
    ],
)
def test_arguments_are_taken_by_the_letter(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    """What is no setting as it should be written, or points nowhere, stops the start."""
    assert named in one_line(tmp_path, *arguments)


def test_a_bad_value_stops_the_start_even_if_a_good_one_counts(tmp_path: Path) -> None:
    """A mistake in config.ini is told, though the command line overrules it."""
    (tmp_path / "config.ini").write_text("[chatserver]\nport = zzz\n")
    assert "config.ini: port" in one_line(tmp_path, "--port", "0")


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """What Windows' editors put before the first setting does not hide it."""
    (tmp_path / ".env").write_text("\ufeffPORT=x\n", "utf-8")
    assert ".env: port" in one_line(tmp_path)
    (tmp_path / ".env").unlink()
    (tmp_path / "config.ini").write_text("\ufeff[chatserver]\nport = x\n", "utf-8")
    assert "config.ini: port" in one_line(tmp_path)


def test_a_backup_never_replaces_the_database(tmp_path: Path) -> None:
    """A backup that would land on the database itself is refused, by any of its names."""
    database = tmp_path / "chat.db"
    sqlite3.connect(database).close()
    (tmp_path / "other.db").symlink_to(database)
    for target in ("chat.db", "./chat.db", "other.db"):
        code, _, error = run(tmp_path, "backup", target)
        assert code == 1
        assert "the database itself" in error
    code, _, error = run(tmp_path, "backup", "copy.db", database_url="sqlite:///none.db")
    assert code == 1
    assert "none.db" in error
    assert not (tmp_path / "copy.db").exists()


def test_help_is_one_line(tmp_path: Path) -> None:
    """Who asks for help is told what can be given."""
    code, output, _ = run(tmp_path, "--help")
    assert code == 0
    assert "set-password" in output
    assert not list(tmp_path.iterdir())
