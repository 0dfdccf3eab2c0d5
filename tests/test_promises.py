"""The promises, one after another, on both engines and between two processes.

What only the death of a process can show is in test_processes.py and test_faults.py, and more that
the seventh means is in test_bad_input.py.
"""

import asyncio
import json
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import WSMsgType

import chatserver
from tests import postgres
from tests.conftest import Start
from tests.engines import full_disk, held_commits, writer
from tests.helpers import Server, User
from tests.sockets import Socket, Wire
from tests.words import KEY, PASSWORD, Event, unique, until

LONG = "愛" * 4000

# --- 1: durable at ack


async def test_1_nobody_hears_what_is_not_committed(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
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
        answer = await bob.user.post(f"{alice.room.path}/messages", {"message": LONG})
        answer.refused(503, "unavailable")
    caplog.clear()
    await bob.user.post_in(bob.room, LONG)
    for socket in sockets:
        await socket.hears(LONG, username=bob.name)
    assert await alice.room.texts() == ["hi", "ho", LONG]


async def test_1_commits_are_synced(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite syncs each commit; a Postgres that does not is named loudly at the start."""
    chat = await start()
    if not chat.shared:
        for pragma, value in (("synchronous", 2), ("journal_mode", "wal")):
            (row,) = await writer(chat).execute_fetchall(f"PRAGMA {pragma}")
            assert row[0] == value
        return
    url = chat.config.database_url
    name = url.rpartition("/")[2]
    await postgres.execute(url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    await start(chat)
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "CRITICAL"]
    assert "synchronous_commit" in line
    caplog.clear()


# --- 2: one order


async def test_2_all_hear_one_order_without_a_gap(chat: Server, there: Server) -> None:
    """Messages, edits, deletes and members share one row of numbers, the same for all."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    sockets = (alice, bob, carol)
    firsts = [(await socket.say("first"))["seq"] for socket in sockets]
    roles = []
    for number in range(8):
        for socket, first in zip(sockets, firsts, strict=True):
            await socket.send(message=f"{socket.name} {number}")
            await socket.send(type="edit", target=first, message=f"edit {number}")
        roles += [alice.room.admit(bob.user, role=role) for role in ("moderator", "member")]
    for socket, first in zip(sockets, firsts, strict=True):
        await socket.send(type="delete", target=first)
    await asyncio.gather(*roles)
    head = max([(await socket.say("the end"))["seq"] for socket in sockets])
    for socket in sockets:
        await socket.reaches(head)
    streams = [await alice.room.log(), *(socket.events for socket in sockets)]
    log, *heard = [[(e["seq"], e["type"], e["username"]) for e in stream] for stream in streams]
    assert [seq for seq, *_ in log] == list(range(1, head + 1))
    assert {kind for _, kind, _ in log} == {"message", "edit", "delete", "member"}
    for events in heard:
        assert events == log[-len(events) :]


# --- 3: resume for ever


@pytest.mark.parametrize(("events", "size"), [(1, 2**16), (7, 2**16), (100, 300)])
async def test_3_a_resume_gives_all_that_follows_once(
    chat: Server, there: Server, monkeypatch: pytest.MonkeyPatch, events: int, size: int
) -> None:
    """In pages of any size `after=N` gives N+1, N+2 …, or a reset, and then what is new."""
    monkeypatch.setattr(chatserver, "PAGE_EVENTS", events)
    monkeypatch.setattr(chatserver, "PAGE_BYTES", size)
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(20))
    log = await alice.room.log()
    head = {"room_id": alice.room.room_id, "seq": 21, "epoch": alice.hello["epoch"]}
    users = [alice.user, alice.user.at(there)]
    sockets = [await u.enter(alice.room, after=after) for u in users for after in (0, 1, 7, 20, 21)]
    queries: list[dict[str, Any]] = [{"after": 22}, {"after": 2**53}, {"after": 1, "epoch": "x"}]
    lost = [await user.enter(alice.room, **query) for user in users for query in queries]
    await alice.say("live")
    for socket in [*sockets, *lost]:
        await socket.hears("live")
        assert socket.heard(type="reset") == ([{"type": "reset", **head}] if socket in lost else [])
        assert socket.events[:-1] == ([] if socket in lost else log[socket.query["after"] :])


async def test_3_a_replay_shows_texts_as_they_are_now(chat: Server, there: Server) -> None:
    """A replay gives the edited text at once, the deleted none, then edits and deletes."""
    (alice,) = await chat.talk("alice")
    for text in ("one", "two", "three"):
        await alice.say(text)
    await alice.send(type="edit", target=2, message="uno")
    await alice.send(type="edit", target=3, message="dos")
    await alice.send(type="delete", target=3)
    await alice.send(type="edit", target=2, message="eins")
    await alice.reaches(8)
    replay = await alice.user.at(there).enter(alice.room, after=1)
    await replay.reaches(8)
    assert replay.story == [
        *("2 alice: eins", "3 alice: (deleted)", "4 alice: three", "5 alice edits 2: eins"),
        *("6 alice edits 3: (deleted)", "7 alice deletes 3", "8 alice edits 2: eins"),
    ]


async def test_3_whoever_comes_and_goes_misses_nothing(chat: Server, there: Server) -> None:
    """A client that drops and resumes at random, anywhere, sees every event once, in order."""
    chance = random.Random(3)  # noqa: S311 - the same each time
    alice, bob = await chat.talk("alice", "bob")
    seen = [0]
    for sent in range(5, 205, 5):
        for number in range(5):
            await alice.send(message=f"{number} of five")
        server = chance.choice((chat, there))
        socket = await bob.user.at(server).enter(bob.room, after=seen[-1])
        await socket.reaches(min(2 + sent, seen[-1] + chance.randint(0, 10)))
        seen += [event["seq"] for event in socket.events]
        socket.drop()
    last = await bob.user.at(there).enter(bob.room, after=seen[-1])
    await last.reaches(202)
    assert seen + [event["seq"] for event in last.events] == list(range(203))


async def test_3_4_a_restart_changes_nothing(start: Start) -> None:
    """After a restart the epoch is the same, and client ids are known; elsewhere it is another."""
    chat = await start()
    (alice,) = await chat.talk("alice")
    seq = (await alice.say("once", client_id="c1"))["seq"]
    epoch = alice.hello["epoch"]
    await alice.leave()
    await chat.stop()
    chat = await start(chat)
    again = await alice.user.at(chat).enter(alice.room, after=1, epoch=epoch)
    await again.hears("once")
    await again.send(message="once", client_id="c1")
    assert (await again.hears(type="ack"))["seq"] == seq
    await again.ask("conflict", message="twice", client_id="c1")
    await again.say("next")
    (stranger,) = await (await start()).talk("stranger")
    assert stranger.hello["epoch"] != epoch


# --- 4: retry for ever


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
    assert (await elsewhere.hears(type="ack"))["seq"] == 2
    assert len(await alice.room.log()) == 4


async def test_4_sent_at_once_from_all_sides_it_is_one(chat: Server, there: Server) -> None:
    """Of one client id, of one user in one room, one text is stored, once, wherever it is sent."""
    alice, bob = await chat.talk("alice", "bob")
    other = await alice.user.at(there).enter(alice.room)
    path = f"{alice.room.path}/messages"
    users = [alice.user, other.user] * 2
    for client_id in ("a", "b", "c", "d", "e"):
        body = {"message": "once", "client_id": client_id}
        for socket in (alice, other, alice):
            await socket.send(**body)
        answers = await asyncio.gather(*(user.post(path, body) for user in users))
        (seq,) = {answer.json["seq"] for answer in answers}
        await alice.hears(type="ack", client_id=client_id, seq=seq)
    bodies = [{"message": f"text {number}", "client_id": "f"} for number in range(4)]
    posts = [user.post(path, body) for user, body in zip(users, bodies, strict=True)]
    statuses = [answer.status for answer in await asyncio.gather(*posts)]
    assert sorted(statuses) == [201, 409, 409, 409]
    await bob.say("somebody else's", client_id="a")
    await alice.user.post_in(await alice.user.room(), "elsewhere", client_id="a")
    stored = ["once"] * 5 + [f"text {statuses.index(201)}", "somebody else's"]
    assert await alice.room.texts() == stored


# --- 5: nobody waits for a slow reader


def waits(server: Server, name: str) -> int:
    """Return how many bytes wait in the server for a user's sockets."""
    return sum(one.transport.get_write_buffer_size() for one in server.hub.users.get(name, ()))


@pytest.mark.parametrize("query", ["", "?after=0"])
async def test_5_who_stops_reading_is_cut_off_and_freed(
    chat: Server, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """A stalled reader costs less than 1 MiB, holds up nobody, and is cut off with 4408."""
    assert chatserver.STALL == 15
    monkeypatch.setattr(chatserver, "STALL", 1)
    alice, bob = await chat.talk("alice", "bob")
    troll = await chat.user("troll")
    await alice.room.admit(troll)
    await alice.say_all(LONG for _ in range(100))
    async with Wire(chat, buffer=4096) as stalled:
        await stalled.upgrade(troll, alice.room, query)
        await until(lambda: troll.name in chat.hub.users, "the reader who stalls")
        (socket,) = chat.hub.users[troll.name]
        began = time.monotonic()
        meanwhile = 0
        while troll.name in chat.hub.users:
            await alice.say(LONG)
            await bob.hears(LONG)
            meanwhile += waits(chat, troll.name) > chatserver.UNSENT
            assert waits(chat, troll.name) < 2**20
            assert time.monotonic() - began < 8
        assert meanwhile > 3
        assert socket.transport.is_closing()
        assert await stalled.close_code() in {4408, 1006}
    back = await troll.enter(alice.room, after=0)
    await back.reaches((await alice.say("the end"))["seq"])


async def test_5_who_says_good_bye_unread_is_freed(chat: Server) -> None:
    """A socket that closes but reads nothing of what waits for it is freed soon."""
    (alice,) = await chat.talk("alice")
    await alice.say_all(LONG for _ in range(60))
    async with Wire(chat, buffer=4096) as wire:
        await wire.upgrade(alice.user, alice.room, "?after=0")
        await until(lambda: waits(chat, alice.name) > 0, "something to wait")
        (socket,) = [s for s in chat.hub.users[alice.name] if s.transport.get_write_buffer_size()]
        wire.frame(b"\x03\xe8", WSMsgType.CLOSE)
        await until(lambda: socket not in chat.hub.sockets, "the server to forget it", 5)
        await until(lambda: not socket.transport.get_write_buffer_size(), "its memory", 5)


async def test_5_whispers_do_not_pile_up(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a room where only typing flows a stalled reader costs as little, and others hear it."""
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
    await alice.hears("so far", username=crowd[-1].name)
    assert len(alice.heard(type="typing")) == 1080


async def test_5_a_slow_reader_gets_all(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes longer than the stall limit for what waits is not cut off."""
    monkeypatch.setattr(chatserver, "STALL", 1)
    (alice,) = await chat.talk("alice")
    await alice.say_all(LONG for _ in range(150))
    seen: list[int] = []
    async with Wire(chat, buffer=4096) as slow:
        await slow.upgrade(alice.user, alice.room, "?after=1")
        async for _, payload in slow.frames():
            if b'"created_at"' in payload:
                seen.append(json.loads(payload)["seq"])
                await asyncio.sleep(0.015)
            if len(seen) == 150:
                break
    assert seen == list(range(2, 152))


# --- 6: shut means shut

MEMBER = "/rooms/{room}/members/{bob}"
NEW = {"password": PASSWORD, "new_password": "4321"}
SHUTS: dict[str, tuple[str, str, str, Event | None, set[int]]] = {
    "a logout": ("bob", "POST", "/auth/logout", None, {4401}),
    "a new password": ("bob", "POST", "/auth/password", NEW, {4401}),
    "a deleted account": ("bob", "DELETE", "/users/me", NEW, {4401, 4403}),
    "a removal": ("alice", "DELETE", MEMBER, None, {4403}),
    "a leave": ("bob", "DELETE", MEMBER, None, {4403}),
    "a ban": ("alice", "PUT", MEMBER, {"role": "banned"}, {4403}),
    "a deleted room": ("alice", "DELETE", "/rooms/{room}", None, {4404}),
}


@pytest.mark.parametrize("how", SHUTS)
async def test_6_shut_means_shut(chat: Server, there: Server, how: str) -> None:
    """Whatever shuts a user out closes all of their sockets, and nothing later arrives."""
    who, method, path, body, codes = SHUTS[how]
    alice, bob = await chat.talk("alice", "bob")
    room = alice.room
    by_frame = await Socket(bob.user, room).connect(header=False)
    await by_frame.send(type="auth", token=bob.user.token)
    await by_frame.hears(type="hello")
    sockets = [by_frame, bob, await bob.user.at(there).enter(room)]
    user = alice.user if who == "alice" else bob.user
    end = user.ask(method, path.format(room=room.room_id, bob=bob.name), body)
    noise = [alice.user.post(f"{room.path}/messages", {"message": "noise"}) for _ in range(40)]
    answer, *_ = await asyncio.gather(end, *noise)
    assert answer.status in {200, 204}
    if codes != {4404}:
        await (await alice.user.at(there).enter(room)).say("not for bob")
    for socket in sockets:
        assert await socket.is_closed() in codes
        assert socket.reason
        assert not socket.heard(message="not for bob")
    if codes == {4403}:
        (seq,) = [event["seq"] for event in await room.log(2) if event["type"] == "member"]
        assert {socket.cursor for socket in sockets} == {seq}


async def test_6_what_ends_one_thing_leaves_the_others(chat: Server, there: Server) -> None:
    """A removal closes its room alone, until one is back; a logout no socket of a later log-in."""
    alice, bob = await chat.talk("alice", "bob")
    second = await alice.user.room(bob.user)
    in_second = await bob.user.at(there).enter(second)
    (await alice.user.delete(f"{second.path}/members/{bob.name}")).ok(204)
    assert await in_second.is_closed() == 4403
    await second.admit(bob.user)
    again = await bob.user.at(there).enter(second, after=0)
    await again.say("back, and not closed by a replay of the removal")
    await bob.say("still here")
    (await bob.user.post("/auth/logout")).ok(204)
    fresh = User(there, bob.name, (await there.login(bob.name)).ok()["access_token"])
    new = await fresh.enter(bob.room)
    assert await bob.is_closed() == 4401
    await new.say("me again")
    await alice.say("still here")


async def test_6_a_replay_ends_where_its_reader_was_banned(chat: Server, there: Server) -> None:
    """Who is behind when the ban comes gets the log up to the ban, and not an event more."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    talker = await alice.enter(room)
    await talker.say_all(LONG for _ in range(60))
    async with Wire(there, buffer=4096) as behind:
        await behind.upgrade(bob, room, "?after=0")
        await until(lambda: waits(there, bob.name) > 0, "the reader to fall behind")
        await room.admit(bob, role="banned")
        await talker.say_all(f"not for bob {number}" for number in range(30))
        seen: list[bytes] = []
        async for opcode, payload in behind.frames():
            seen.append(payload)
            if opcode == WSMsgType.CLOSE:
                break
    assert int.from_bytes(seen[-1][:2], "big") == 4403
    ban = json.loads(seen[-2])
    assert (ban["seq"], ban["member"], ban["role"]) == (63, bob.name, "banned")


async def test_6_a_token_ends_within_a_second(chat: Server, there: Server) -> None:
    """When a token expires its sockets close with 4401, and nothing that they send is done."""
    alice, bob = await chat.talk("alice", "bob")
    ends = int(time.time()) + 4
    claims = jwt.decode(bob.user.token, KEY, ["HS256"]) | {"exp": ends}
    login = User(there, bob.name, jwt.encode(claims, KEY))
    idle, busy = await login.enter(bob.room), await login.at(chat).enter(bob.room)
    closing = asyncio.create_task(idle.is_closed())
    while time.time() < ends - 0.3:
        await alice.say("meanwhile")
    await asyncio.sleep(ends - time.time())
    await busy.send(message="too late")  # before a sweep closes it, but for bad luck
    assert await busy.is_closed() == 4401
    assert await closing == 4401
    assert time.time() - ends < 3  # a second, and what a busy machine adds
    assert "too late" not in await alice.room.texts()
    await bob.say("still here")


# --- 7: bad input gets a clear error

BAD_FRAMES = [
    *("", "x", "[]", "null", "5", '"x"', "{}", "[" * 60000, '{"message":NaN}', '{"message":null}'),
    *('{"message":"\\ud800"}', '{"message":"\\u0000"}', '{"type":"message"}', '{"type":"shout"}'),
    *('{"type":"hello"}', '{"type":""}', '{"type":5}', '{"type":[]}', '{"type":"edit","target":2}'),
    *('{"type":"edit","message":"x"}', '{"type":"delete"}', '{"type":"delete","target":"x"}'),
    *('{"type":"delete","target":' + "9" * 4000 + "}", '{"type":"delete","target":-1}'),
    *('{"type":"read"}', '{"type":"read","seq":1.5}', '{"type":"read","seq":true}'),
]


async def test_7_a_refused_frame_is_an_error_and_the_socket_lives_on(chat: Server) -> None:
    """Whatever a text frame holds, the answer is an error, and what follows is done."""
    alice, bob = await chat.talk("alice", "bob")
    for frame in BAD_FRAMES:
        await alice.ws.send_str(frame)
        await alice.is_refused("bad_request")
    await alice.say("still here")
    await bob.hears("still here")
    assert len(bob.events) == 1


# --- 8: a delete really erases


async def test_8_an_erased_text_is_nowhere(start: Start) -> None:
    """What was deleted, or replaced by an edit, is in no answer and in no byte of the database."""
    chat = await start()
    there = await start(chat)
    (alice,) = await chat.talk("alice")
    user, path = alice.user, f"{alice.room.path}/messages"
    await alice.say_all(f"chatter {number} " + "x" * 200 for number in range(50))
    kept, *erased = [unique(word) for word in ("kept", "former", "first", "second", "third")]
    first = (await alice.say(erased[0]))["seq"]
    second = (await alice.say(erased[1], client_id="c1"))["seq"]
    third = (await alice.say(erased[2] * 50))["seq"]
    (await user.patch(f"{path}/{first}", {"message": kept})).ok()
    (await user.patch(f"{path}/{second}", {"message": erased[3] + "y" * 1000})).ok()
    for seq in (second, third):
        (await user.delete(f"{path}/{seq}")).ok(204)
    shown = [
        str(await alice.room.log(reader=user.at(there))),
        str((await user.get(f"{path}?limit=200")).ok()),
        str((await user.post(path, {"message": erased[1], "client_id": "c1"})).ok()),
        *[str((await user.get(f"/search?q={word}")).ok()) for word in (kept, *erased)],
    ]
    assert [kept in text for text in shown] == [True, True, False, True] + [False] * 4
    await chat.forget()
    await chat.stop()
    if chat.shared:
        tables = await there.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        rows = [await there.rows(f"SELECT t::text FROM {table} t") for (table,) in tables]  # noqa: S608
        stored = str(rows).encode()
    else:
        file = chat.config.database_url.removeprefix("sqlite:///")
        sqlite3.connect(file).execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
        stored = Path(file).read_bytes()
    assert kept.encode() in stored
    assert not [word for word in erased if word in str(shown) or word.encode() in stored]
