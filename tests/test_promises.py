"""The promises, by their numbers, on both engines and between two processes.

What only a process's death shows is in test_faults.py, more of the seventh in test_bad_input.py.
"""

import asyncio
import json
import time
from pathlib import Path

import jwt
import pytest
from aiohttp import WSMsgType

import chatserver
from tests.conftest import Start
from tests.engines import full_disk, held_commits, writer
from tests.helpers import Server, User
from tests.sockets import Wire
from tests.words import KEY, PASSWORD, Event, unique, until

Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
LONG = "愛" * 4000


async def test_1_nobody_hears_what_is_not_committed(start: Start, caplog: Log) -> None:
    """Neither its sender nor others are told while a commit hangs, nor when the disk is full."""
    chat = await start()
    there = await start(chat)
    alice, bob = await chat.talk("alice", "bob")
    sockets = (alice, bob, await (await there.user("carol")).enter(alice.room))
    async with held_commits(chat) as one_hangs:
        await alice.send(message="hi")
        await one_hangs()
        post = asyncio.create_task(alice.user.post_in(alice.room, "ho"))
        for socket in sockets:
            await socket.ask("bad_request", type="nothing")
            assert not socket.heard(message="hi")
        assert not post.done()
    event = await post
    for socket in sockets:
        await socket.hears("hi")
        assert await socket.hears("ho") == event
    async with full_disk(chat):
        error = await alice.ask("unavailable", message=LONG, client_id="c1")
        assert error["client_id"] == "c1" and error["retry_after"] >= 1
        (await bob.user.post(f"{bob.room.path}/messages", {"message": LONG})).refused(503)
    caplog.clear()
    await bob.user.post_in(bob.room, LONG)
    for socket in sockets:
        await socket.hears(LONG, username=bob.name)
    assert await alice.room.texts() == ["hi", "ho", LONG]


async def test_1_commits_are_synced(start: Start, caplog: Log) -> None:
    """SQLite syncs each commit; a Postgres that does not is named loudly at the start."""
    chat = await start()
    if not chat.shared:
        for pragma, value in (("synchronous", 2), ("journal_mode", "wal")):
            (row,) = await writer(chat).execute_fetchall(f"PRAGMA {pragma}")
            assert row[0] == value
        return
    name = chat.config.database_url.rpartition("/")[2]
    await chat.change(f"ALTER DATABASE {name} SET synchronous_commit = off")
    await start(chat)
    assert "CRITICAL" in caplog.text and "synchronous_commit" in caplog.text
    caplog.clear()


async def test_2_all_hear_one_order_without_a_gap(chat: Server, there: Server) -> None:
    """Messages, edits, deletes and members share one row of numbers, also for who comes later."""
    alice, bob = await chat.talk("alice", "bob")
    sockets = (alice, bob, await (await there.user("carol")).enter(alice.room))
    firsts = [(await socket.say("first"))["seq"] for socket in sockets]
    roles, late = [], []
    for number in range(8):
        for socket, first in zip(sockets, firsts, strict=True):
            await socket.send(message=f"{socket.name} {number}")
            await socket.send(type="edit", target=first, message=f"edit {number}")
        roles += [alice.room.admit(bob.user, role=role) for role in ("moderator", "member")]
        late.append(await bob.user.at(there).enter(bob.room, after=number))
    for socket, first in zip(sockets, firsts, strict=True):
        await socket.send(type="delete", target=first)
    await asyncio.gather(*roles)
    head = max([(await socket.say("the end"))["seq"] for socket in sockets])
    log = [(event["seq"], event["type"], event["username"]) for event in await alice.room.log()]
    assert [seq for seq, *_ in log] == list(range(1, head + 1))
    assert {kind for _, kind, _ in log} == {"message", "edit", "delete", "member"}
    for socket in (*sockets, *late):
        await socket.reaches(head)
        heard = [(event["seq"], event["type"], event["username"]) for event in socket.events]
        assert heard == log[-len(heard) :]


@pytest.mark.parametrize(("limit", "size"), [("PAGE_EVENTS", 3), ("PAGE_BYTES", 300)])
async def test_3_a_resume_gives_all_that_follows_once(
    chat: Server, there: Server, monkeypatch: Patch, limit: str, size: int
) -> None:
    """In pages of any size `after=N` gives N+1, N+2 …, or a reset, and then what is new."""
    monkeypatch.setattr(chatserver, limit, size)
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(20))
    log = await alice.room.log()
    epoch = alice.hello["epoch"]
    reset = {"type": "reset", "room_id": alice.room.room_id, "seq": 21, "epoch": epoch}
    users = [alice.user, alice.user.at(there)]
    back = [(n, await u.enter(alice.room, after=n)) for u in users for n in (0, 1, 7, 20, 21)]
    cursors = ((22, epoch), (2**53, epoch), (1, "another"))
    lost = [await u.enter(alice.room, after=n, epoch=e) for u in users for n, e in cursors]
    await alice.say("live")
    for after, socket in back:
        await socket.hears("live")
        assert not socket.heard(type="reset") and socket.events[:-1] == log[after:]
    for socket in lost:
        await socket.hears("live")
        assert socket.heard(type="reset") == [reset] and len(socket.events) == 1


async def test_3_replays_and_history_show_what_is_now(chat: Server, there: Server) -> None:
    """They give the edited text at once and the deleted none; then come the edits and deletes."""
    (alice,) = await chat.talk("alice")
    user, path = alice.user, f"{alice.room.path}/messages"
    await alice.say_all(["frist", "secnod"])
    await alice.send(type="edit", target=2, message="first")
    await alice.send(type="edit", target=3, message="second")
    await alice.send(type="delete", target=3)
    await alice.reaches(6)
    edited = (await user.patch(f"{path}/2", {"message": "1st"})).ok()
    replay = await user.at(there).enter(alice.room, after=1)
    await replay.reaches(7)
    assert replay.story == [
        *("2 alice: 1st", "3 alice: (deleted)", "4 alice edits 2: 1st"),
        *("5 alice edits 3: (deleted)", "6 alice deletes 3", "7 alice edits 2: 1st"),
    ]
    assert (await user.at(there).get(path)).ok() == replay.events[:2]
    assert replay.events[0] == edited and replay.events[1]["deleted"]


async def test_3_4_a_restart_changes_nothing(start: Start) -> None:
    """After a restart the epoch is the same, and client ids are known; elsewhere it is another."""
    chat = await start()
    (alice,) = await chat.talk("alice")
    await alice.say("once", client_id="c1")
    await alice.leave()
    await chat.stop()
    chat = await start(chat)
    epoch = alice.hello["epoch"]
    again = await alice.user.at(chat).enter(alice.room, after=1, epoch=epoch)
    await again.hears("once")
    await again.send(message="once", client_id="c1")
    await again.hears(type="ack", seq=2)
    await again.ask("conflict", message="twice", client_id="c1")
    (stranger,) = await (await start()).talk("stranger")
    assert stranger.hello["epoch"] != epoch


async def test_4_a_retry_makes_no_second_message(chat: Server, there: Server) -> None:
    """Sent again anywhere it is told of as it is now; unedited, with another text, in conflict."""
    (alice,) = await chat.talk("alice")
    elsewhere = await alice.user.at(there).enter(alice.room)
    path = f"{alice.room.path}/messages"
    for text in ("first", "first", "other"):
        await alice.send(message=text, client_id="c1")
    first = await alice.hears("first")
    assert await alice.hears(type="ack") == {"type": "ack", "client_id": "c1", "seq": 2}
    assert (await alice.is_refused("conflict"))["client_id"] == "c1"
    body = {"message": "first", "client_id": "c1"}
    assert (await elsewhere.user.post(path, body)).ok(200) == first
    (await elsewhere.user.post(path, body | {"message": "other"})).refused(409, "conflict")
    edited = (await alice.user.patch(f"{path}/2", {"message": "second"})).ok()
    for text in ("first", "second", "third"):
        assert (await elsewhere.user.post(path, body | {"message": text})).ok(200) == edited
    (await alice.user.delete(f"{path}/2")).ok(204)
    deleted = (await elsewhere.user.post(path, body)).ok(200)
    assert deleted["deleted"] and deleted["seq"] == 2 and "message" not in deleted
    await elsewhere.send(**body)
    await elsewhere.hears(type="ack", seq=2)
    assert len(await alice.room.log()) == 4


async def test_4_sent_at_once_from_all_sides_it_is_one(chat: Server, there: Server) -> None:
    """Of one client id, of one user in one room, one text is stored, once, wherever it is sent."""
    alice, bob = await chat.talk("alice", "bob")
    other = await alice.user.at(there).enter(alice.room)
    path = f"{alice.room.path}/messages"
    users = [alice.user, other.user] * 2
    for client_id in ("a", "b", "c"):
        body = {"message": "once", "client_id": client_id}
        for socket in (alice, other, alice):
            await socket.send(**body)
        answers = await asyncio.gather(*(user.post(path, body) for user in users))
        (seq,) = {answer.json["seq"] for answer in answers}
        await alice.hears(type="ack", client_id=client_id, seq=seq)
    posts = [u.post(path, {"message": f"text {n}", "client_id": "d"}) for n, u in enumerate(users)]
    statuses = [answer.status for answer in await asyncio.gather(*posts)]
    assert sorted(statuses) == [201, 409, 409, 409]
    await bob.say("somebody else's", client_id="a")
    await alice.user.post_in(await alice.user.room(), "elsewhere", client_id="a")
    stored = ["once"] * 3 + [f"text {statuses.index(201)}", "somebody else's"]
    assert await alice.room.texts() == stored


def waits(server: Server, name: str) -> int:
    """Return how many bytes wait in the server for a user's sockets."""
    return sum(one.transport.get_write_buffer_size() for one in server.hub.users.get(name, ()))


async def test_5_who_stops_reading_is_cut_off_and_freed(chat: Server, monkeypatch: Patch) -> None:
    """Who stalls, live or behind, costs less than 1 MiB, holds up nobody, and is cut off: 4408."""
    assert chatserver.STALL == 15
    monkeypatch.setattr(chatserver, "STALL", 1)
    alice, bob = await chat.talk("alice", "bob")
    troll = await chat.user("troll")
    await alice.room.admit(troll)
    await alice.say_all(LONG for _ in range(100))
    async with Wire(chat, buffer=4096) as live, Wire(chat, buffer=4096) as behind:
        await live.upgrade(troll, alice.room)
        await behind.upgrade(troll, alice.room, "?after=0")
        await until(lambda: len(chat.hub.users.get(troll.name, ())) == 2, "those who stall")
        sockets = list(chat.hub.users[troll.name])
        began = time.monotonic()
        meanwhile = 0
        while troll.name in chat.hub.users:
            await alice.say(LONG)
            await bob.hears(LONG)
            meanwhile += waits(chat, troll.name) > chatserver.UNSENT
            assert waits(chat, troll.name) < 2**20
            assert time.monotonic() - began < 20
        assert meanwhile > 3
        assert all(socket.transport.is_closing() for socket in sockets)
        for stalled in (live, behind):
            assert await stalled.close_code() in {4408, 1006}
    back = await troll.enter(alice.room, after=0)
    await back.reaches((await alice.say("the end"))["seq"])


async def test_5_whispers_do_not_pile_up(chat: Server, monkeypatch: Patch) -> None:
    """Where only typing flows who stalls costs as little, and is freed when they say good-bye."""
    assert chatserver.UNSENT <= 2**19
    monkeypatch.setattr(chatserver, "UNSENT", 2**14)
    alice, *crowd = await chat.talk("alice", *["crowd" + "d" * 18] * 12, word="r" * 50)
    troll = await chat.user("troll")
    async with Wire(chat, buffer=4096) as stalled:
        await stalled.upgrade(troll, alice.room)
        await alice.hears(type="presence", username=troll.name)
        for socket in crowd:
            for _ in range(90):
                await socket.send(type="typing")
            await socket.say("so far")
            assert waits(chat, troll.name) < 2**15
        assert waits(chat, troll.name) > 0
        (unread,) = [socket.transport for socket in chat.hub.users[troll.name]]
        stalled.frame(b"\x03\xe8", WSMsgType.CLOSE)
        await until(lambda: not unread.get_write_buffer_size(), "its memory to be freed")
        await until(lambda: troll.name not in chat.hub.users, "the server to forget it")
    await alice.hears("so far", username=crowd[-1].name)
    assert len(alice.heard(type="typing")) == 1080


async def test_5_a_slow_reader_gets_all(chat: Server, monkeypatch: Patch) -> None:
    """A client that takes longer than the stall limit for what waits is not cut off."""
    monkeypatch.setattr(chatserver, "STALL", 1)
    (alice,) = await chat.talk("alice")
    await alice.say_all(LONG for _ in range(150))
    async with Wire(chat, buffer=4096) as slow:
        await slow.upgrade(alice.user, alice.room, "?after=1")
        frames = slow.frames()
        assert b'"hello"' in (await anext(frames))[1]
        for seq in range(2, 152):
            assert json.loads((await anext(frames))[1])["seq"] == seq
            await asyncio.sleep(0.015)


NEW = {"password": PASSWORD, "new_password": "4321"}
SHUTS: dict[str, tuple[str, str, str, Event | None, set[int]]] = {
    "a logout": ("bob", "POST", "/auth/logout", None, {4401}),
    "a new password": ("bob", "POST", "/auth/password", NEW, {4401}),
    "a deleted account": ("bob", "DELETE", "/users/me", NEW, {4401, 4403}),
    "a removal": ("alice", "DELETE", "/rooms/{room}/members/{bob}", None, {4403}),
    "a ban": ("alice", "PUT", "/rooms/{room}/members/{bob}", {"role": "banned"}, {4403}),
    "a deleted room": ("alice", "DELETE", "/rooms/{room}", None, {4404}),
}


@pytest.mark.parametrize("how", SHUTS)
async def test_6_shut_means_shut(chat: Server, there: Server, how: str) -> None:
    """Whatever shuts a user out closes all sockets concerned, and nothing later arrives."""
    who, method, path, body, codes = SHUTS[how]
    alice, bob = await chat.talk("alice", "bob")
    room = alice.room
    sockets = [bob, await bob.user.enter(room), await bob.user.at(there).enter(room)]
    elsewhere = await bob.user.enter(await alice.user.room())
    user = alice.user if who == "alice" else bob.user
    end = user.ask(method, path.format(room=room.room_id, bob=bob.name), body)
    noise = [alice.user.post(f"{room.path}/messages", {"message": "noise"}) for _ in range(40)]
    answer, *_ = await asyncio.gather(end, *noise)
    assert answer.status in {200, 204}
    if codes != {4404}:
        await (await alice.user.at(there).enter(room)).say("not for bob")
    for socket in sockets:
        assert await socket.is_closed() in codes
        assert socket.reason and not socket.heard(message="not for bob")
    if codes == {4403}:
        (seq,) = [event["seq"] for event in await room.log(2) if event["type"] == "member"]
        assert {socket.cursor for socket in sockets} == {seq}
        await elsewhere.say("still here")
    if how == "a removal":
        await (await bob.user.enter(room, after=0)).say("back, and not closed by its replay")


async def test_6_a_replay_ends_where_its_reader_was_banned(chat: Server, there: Server) -> None:
    """Who is behind when the ban comes gets the log up to the ban, and not an event more."""
    alice, bob = await chat.talk("alice", "bob")
    sockets = (bob, await bob.user.at(there).enter(bob.room))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatserver, "UNSENT", -1)  # so that all are behind
        await alice.user.post_in(alice.room, "for bob too")
        await alice.room.admit(bob.user, role="banned")
        for _ in range(5):
            await alice.user.post_in(alice.room, "not for bob")
    for socket in sockets:
        assert await socket.is_closed() == 4403
        assert socket.story == ["3 alice: for bob too", "4 alice makes bob banned"]


async def test_6_a_token_ends_within_a_second(chat: Server, there: Server) -> None:
    """When a token expires its sockets close with 4401, and nothing that they send is done."""
    alice, bob = await chat.talk("alice", "bob")
    ends = int(time.time()) + 4
    claims = jwt.decode(bob.user.token, KEY, ["HS256"]) | {"exp": ends}
    login = User(there, bob.name, jwt.encode(claims, KEY))
    idle, busy = await login.enter(bob.room), await login.at(chat).enter(bob.room)
    await asyncio.sleep(ends - time.time())
    await busy.send(message="too late")  # before a sweep closes it, but for bad luck
    for socket in (busy, idle):
        assert await socket.is_closed() == 4401
        (await socket.user.get("/users/me")).refused(401)
    assert time.time() - ends < 3  # a second, and what a busy machine adds
    assert "too late" not in await alice.room.texts()
    await bob.say("still here")


async def test_7_a_refused_frame_is_an_error_and_the_socket_lives_on(chat: Server) -> None:
    """Whatever a text frame holds, the answer is an error, and what follows is done."""
    alice, bob = await chat.talk("alice", "bob")
    for frame in (
        *("", "x", "[]", "null", '"x"', "{}", "[" * 60000, '{"message":NaN}', '{"message":null}'),
        *('{"message":"\\ud800"}', '{"type":"message"}', '{"type":"shout"}', '{"type":5}'),
        *('{"type":"edit","target":2}', '{"type":"edit","message":"x"}', '{"type":"delete"}'),
        *('{"type":"delete","target":-1}', '{"type":"delete","target":' + "9" * 4000 + "}"),
    ):
        await alice.ws.send_str(frame)
        await alice.is_refused("bad_request")
    await alice.say("still here")
    await bob.hears("still here")
    assert len(bob.events) == 1


async def test_8_an_erased_text_is_nowhere(start: Start) -> None:
    """What was deleted, or replaced by an edit, is in no answer and in no byte of the database."""
    chat = await start()
    there = await start(chat)
    (alice,) = await chat.talk("alice")
    user, path = alice.user, f"{alice.room.path}/messages"
    kept, *erased = [unique(word) for word in ("kept", "former", "first", "second", "third")]
    for seq, text in enumerate((erased[0], erased[1], erased[2] * 50), 2):
        await alice.say(text, client_id=f"c{seq}")
    (await user.patch(f"{path}/2", {"message": kept})).ok()
    (await user.patch(f"{path}/3", {"message": erased[3] + "y" * 1000})).ok()
    for seq in (3, 4):
        (await user.delete(f"{path}/{seq}")).ok(204)
    shown = [
        str(await alice.room.log(reader=user.at(there))),
        str((await user.get(f"{path}?limit=200")).ok()),
        str((await user.post(path, {"message": erased[1], "client_id": "c3"})).ok()),
        *[str((await user.get(f"/search?q={word}")).ok()) for word in (kept, *erased)],
    ]
    assert [kept in text for text in shown] == [True, True, False, True] + [False] * 4
    await chat.forget()
    await chat.stop()
    if chat.shared:
        tables = await chat.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        stored: object = [await chat.rows(f"SELECT t::text FROM {table} t") for (table,) in tables]  # noqa: S608
    else:
        folder = Path(chat.config.database_url.removeprefix("sqlite:///")).parent
        stored = [file.read_bytes() for file in folder.iterdir()]
    assert kept in str(stored)
    assert not [word for word in erased if word in str(shown) + str(stored)]
