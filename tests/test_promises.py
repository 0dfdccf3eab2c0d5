"""The promises, one after another, on both engines and between two processes.

What only the death of a process can show is in test_processes.py. The seventh, bad input, has a
file of its own, and so has much of the fourth: test_messages.py.
"""

import asyncio
import itertools
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import WSMsgType

import chatserver
from tests import postgres
from tests.conftest import POLL, Start
from tests.engines import full_disk, held_commits, writer
from tests.helpers import Room, Server, User
from tests.sockets import Socket, Wire
from tests.words import KEY, PASSWORD, Answer, unique, until

LONG = "愛" * 4000

# --- 1: durable at ack


async def test_1_nobody_hears_what_is_not_committed(start: Start) -> None:
    """While a commit takes its time neither the sender nor anybody else is told of it."""
    chat = await start()
    there = await start(chat)
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    await alice.hears(type="presence", username=carol.name)
    path = f"{alice.room.path}/messages"
    async with held_commits(chat) as one_hangs:
        await alice.send(message="hi", client_id="c1")
        await one_hangs()
        post = asyncio.create_task(alice.user.post(path, {"message": "ho"}))
        edit = asyncio.create_task(bob.user.post("/rooms", {"name": "new"}))
        for socket in (alice, bob, carol):
            await socket.ask("bad_request", type="nothing")
            assert socket.events == ([] if socket is carol else socket.events[:1])
            assert not socket.heard(message="hi")
        assert not post.done()
        assert not edit.done()
    for socket in (alice, bob, carol):
        await socket.hears("hi")
        await socket.hears("ho")
    assert (await post).ok(201)["seq"] == 5
    (await edit).ok(201)


async def test_1_what_cannot_be_stored_is_refused_and_heard_by_nobody(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """With the disk full a message is `unavailable`, an edit too; with room again all goes on."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    seq = (await alice.say("before"))["seq"]
    async with full_disk(chat):
        error = await alice.ask("unavailable", message=LONG, client_id="c1")
        assert error["client_id"] == "c1"
        assert error["retry_after"] >= 1
        path = f"{alice.room.path}/messages"
        (await alice.user.post(path, {"message": LONG})).refused(503, "unavailable")
        for number in range(9):
            answer = await alice.user.patch(f"{path}/{seq}", {"message": f"{number}{LONG}"[:4000]})
            assert answer.status in {200, 503}
        assert (await alice.user.get("/healthz")).status == 200
    caplog.clear()
    await alice.say(LONG, client_id="c1")
    await bob.hears(LONG)
    assert (await alice.room.log())[-1]["message"] == LONG
    assert len([text for text in await alice.room.texts() if text == LONG]) == 1


async def test_1_a_commit_waits_for_the_disk(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite syncs each commit; a Postgres that does not is named loudly at the start."""
    chat = await start()
    if not chat.shared:
        for pragma, value in (("synchronous", 2), ("journal_mode", "wal")):
            (row,) = await writer(chat).execute_fetchall(f"PRAGMA {pragma}")
            assert row[0] == value
        return
    assert not caplog.records
    url = chat.config.database_url
    name = url.rpartition("/")[2]
    await postgres.execute(url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    await start(chat)
    (line,) = [one.getMessage() for one in caplog.records if one.levelname == "CRITICAL"]
    assert "synchronous_commit" in line
    caplog.clear()


async def test_1_an_acknowledged_message_is_in_the_database(chat: Server, there: Server) -> None:
    """When a message has come back, or its post was answered, every other reader finds it."""
    alice = await (await there.user("alice")).room()
    talker = await alice.owner.enter(alice)
    for number in range(10):
        word = unique("word")
        await (talker.say(word) if number % 2 else alice.owner.post_in(alice, word))
        assert await chat.rows(f"SELECT 1 FROM events WHERE json LIKE '%{word}%'")  # noqa: S608


# --- 2: one order


async def test_2_all_hear_one_order_without_a_gap(chat: Server, there: Server) -> None:
    """Messages, edits, deletes and roles share one row of numbers, the same for all."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    room = alice.room
    await room.admit(carol.user, role="owner")

    async def promote(user: User) -> None:
        """Give roles again and again."""
        for role in ("member", "moderator") * 3:
            (await user.put(f"{room.path}/members/{bob.name}", {"role": role})).ok()

    async def talk(socket: Socket) -> None:
        """Say things and change one's mind."""
        for number in range(10):
            event = await socket.say(f"{socket.name} {number}")
            if number % 3 == 0:
                await socket.send(type="edit", target=event["seq"], message="edited")
            if number % 3 == 1:
                await socket.send(type="delete", target=event["seq"])

    await asyncio.gather(*map(talk, (alice, bob, carol)), promote(alice.user), promote(carol.user))
    head = (await alice.say("the end"))["seq"]
    log = {event["seq"]: event for event in await room.log()}
    assert sorted(log) == list(range(1, head + 1))
    for socket in (alice, bob, carol):
        await socket.reaches(head)
        assert [log[event["seq"]]["type"] for event in socket.events] == [
            event["type"] for event in socket.events
        ]
    assert alice.events[-30:] == bob.events[-30:] == carol.events[-30:]


async def test_2_every_kind_of_change_is_an_event(chat: Server) -> None:
    """Whatever changes a room is told to who is in, under the next number, and in the log."""
    alice, bob = await chat.talk("alice", "bob")
    user, path = alice.user, alice.room.path
    dave = await chat.user("dave")
    await alice.say("one")
    (await user.patch(f"{path}/messages/3", {"message": "uno"})).ok()
    (await user.delete(f"{path}/messages/3")).ok(204)
    (await dave.put(f"{path}/members/{dave.name}")).ok()
    (await user.put(f"{path}/members/{dave.name}", {"role": "moderator"})).ok()
    (await dave.delete(f"{path}/members/{dave.name}")).ok(204)
    await bob.reaches(8)
    assert bob.story == [
        *("3 alice: one", "4 alice edits 3: uno", "5 alice deletes 3", "6 dave makes dave member"),
        *("7 alice makes dave moderator", "8 dave makes dave None"),
    ]
    assert [event["seq"] for event in await alice.room.log(2)] == list(range(3, 9))


# --- 3: resume for ever


@pytest.mark.parametrize(("events", "size"), [(1, 2**16), (7, 2**16), (100, 300), (500, 2**16)])
async def test_3_a_resume_gives_everything_after_a_number_once(
    chat: Server, there: Server, monkeypatch: pytest.MonkeyPatch, events: int, size: int
) -> None:
    """However the log falls into pages, `after=N` gives N+1, N+2 … and then what is new."""
    monkeypatch.setattr(chatserver, "PAGE_EVENTS", events)
    monkeypatch.setattr(chatserver, "PAGE_BYTES", size)
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(20))
    log = await alice.room.log()
    sockets = [
        await alice.user.at(server).enter(alice.room, after=after)
        for after in (0, 1, 7, 20, 21)
        for server in (chat, there)
    ]
    await alice.say("live")
    for socket in sockets:
        await socket.hears("live")
        assert socket.events[:-1] == log[socket.query["after"] :]


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
    replay = await alice.user.at(there).enter(alice.room, after=0)
    await replay.reaches(8)
    assert replay.story[1:] == [
        *("2 alice: eins", "3 alice: (deleted)", "4 alice: three", "5 alice edits 2: eins"),
        *("6 alice edits 3: (deleted)", "7 alice deletes 3", "8 alice edits 2: eins"),
    ]
    assert replay.events == await alice.room.log()
    assert replay.events[1]["edited_at"] >= replay.events[1]["created_at"]


async def test_3_whoever_comes_and_goes_misses_nothing(chat: Server, there: Server) -> None:
    """Clients that drop and resume at random, anywhere, see every event once, in order."""
    chance = random.Random(3)  # noqa: S311 - the same each time
    alice, bob = await chat.talk("alice", "bob")
    done = asyncio.Event()
    end = 2 + 150

    async def talk() -> None:
        """Send everything, a few at a time."""
        for number in range(end - 2):
            await alice.send(message=f"message {number}")
            if number % 5 == 0:
                await alice.reaches(number + 1)
        await alice.reaches(end)
        done.set()

    async def wander() -> list[int]:
        """Come, read a little, vanish, and come back elsewhere, to the end."""
        seen: list[int] = []
        after = 0
        while after < end:
            server = chance.choice((chat, there))
            socket = await bob.user.at(server).enter(bob.room, after=after)
            await socket.reaches(min(end, after + chance.randint(0, 30)))
            seen += [event["seq"] for event in socket.events]
            after = seen[-1] if seen else 0
            socket.drop()
        return seen

    streams = await asyncio.gather(*(wander() for _ in range(6)), talk())
    for stream in streams[:-1]:
        assert stream == list(range(1, end + 1))
    assert done.is_set()


@pytest.mark.parametrize("query", [{"after": 3}, {"after": 2**53}, {"after": 1, "epoch": "x"}])
async def test_3_a_cursor_that_cannot_be_served_is_reset(
    chat: Server, there: Server, query: dict[str, Any]
) -> None:
    """Above the head, or of another epoch, there is a reset, and then what is new."""
    (alice,) = await chat.talk("alice")
    await alice.say("before")
    again = await alice.user.at(there).enter(alice.room, **query)
    reset = await again.next()
    head = {"seq": 2, "epoch": alice.hello["epoch"], "room_id": alice.room.room_id}
    assert reset == {"type": "reset"} | head
    await alice.say("after")
    await again.hears("after")
    assert [event["seq"] for event in again.events] == [3]
    fine = await alice.user.at(there).enter(alice.room, after=3, epoch=head["epoch"])
    await fine.say("fine")
    assert not fine.heard(type="reset")


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
    await again.say("next", client_id="c2")
    (stranger,) = await (await start()).talk("stranger")
    assert stranger.hello["epoch"] != epoch


async def test_6_what_no_note_told_is_found_by_looking(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should every note be lost, a process finds ends of rooms and of log-ins by itself."""
    assert POLL == 2
    monkeypatch.setattr(chatserver, "POLL", 0.1)
    chat = await start()
    if not chat.shared:
        return  # nobody else writes into the file
    alice, bob = await chat.talk("alice", "bob")
    other = await alice.user.enter(await alice.user.room())
    await chat.change(f"UPDATE users SET version = version + 1 WHERE username = '{bob.name}'")  # noqa: S608
    assert await bob.is_closed() == 4401
    room_id = alice.room.room_id
    await chat.change(f"UPDATE rooms SET kind = 'deleted' WHERE room_id = '{room_id}'")  # noqa: S608
    assert await alice.is_closed() == 4404
    await other.say("still here")


# --- 5: nobody waits for a slow reader


def waits(server: Server, name: str) -> int:
    """Return how many bytes wait in the server for a user's sockets."""
    return sum(one.transport.get_write_buffer_size() for one in server.hub.users.get(name, ()))


@pytest.mark.parametrize("resumes", [False, True])
async def test_5_who_stops_reading_is_cut_off_and_freed(
    chat: Server, monkeypatch: pytest.MonkeyPatch, *, resumes: bool
) -> None:
    """A stalled reader costs less than 1 MiB, delays nobody, and is cut off with 4408."""
    assert chatserver.STALL == 15
    monkeypatch.setattr(chatserver, "STALL", 1)
    alice, bob = await chat.talk("alice", "bob")
    troll = await chat.user("troll")
    await alice.room.admit(troll)
    if resumes:
        await alice.say_all(LONG for _ in range(100))
    async with Wire(chat, buffer=4096) as stalled:
        await stalled.upgrade(troll, alice.room, "?after=0" if resumes else "")
        await until(lambda: troll.name in chat.hub.users, "the reader who stalls")
        (socket,) = chat.hub.users[troll.name]
        began = time.monotonic()
        while troll.name in chat.hub.users:
            said = time.monotonic()
            await alice.say(LONG)
            await bob.hears(LONG)
            assert time.monotonic() - said < 1
            assert waits(chat, troll.name) < 2**20
            await asyncio.sleep(0.02)
        assert 0.5 < time.monotonic() - began < 8
        assert socket.transport.is_closing()
        assert await stalled.close_code() in {4408, 1006}
    back = await troll.enter(alice.room, after=0)
    head = (await alice.say("the end"))["seq"]
    await back.reaches(head)


async def test_5_who_closes_without_reading_is_freed(chat: Server) -> None:
    """A socket that says good-bye but reads nothing of what waits for it is freed soon."""
    (alice,) = await chat.talk("alice")
    await alice.say_all(LONG for _ in range(60))
    async with Wire(chat, buffer=4096) as wire:
        await wire.upgrade(alice.user, alice.room, "?after=0")
        await until(lambda: waits(chat, alice.name) > 0, "something to wait")
        (socket,) = [s for s in chat.hub.users[alice.name] if s.transport.get_write_buffer_size()]
        wire.frame(b"\x03\xe8", WSMsgType.CLOSE)
        await until(lambda: socket not in chat.hub.sockets, "the server to forget it", 5)
        await until(lambda: not socket.transport.get_write_buffer_size(), "its memory", 5)
        assert socket.transport.is_closing()


async def test_5_whispers_do_not_pile_up_for_who_stalls(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_5_one_who_reads_slowly_gets_everything(
    chat: Server, there: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that takes longer than the stall limit for what waits is not cut off."""
    monkeypatch.setattr(chatserver, "STALL", 1)
    (alice,) = await chat.talk("alice")
    await alice.say_all(LONG for _ in range(150))
    seen = []
    async with Wire(there, buffer=4096) as slow:
        await slow.upgrade(alice.user, alice.room, "?after=0")
        async for opcode, payload in slow.frames():
            if opcode == WSMsgType.TEXT and b'"created_at"' in payload:
                seen.append(payload)
                await asyncio.sleep(0.015)
            if len(seen) == 151:
                break
    assert [b'"seq":%d,' % seq in payload for seq, payload in enumerate(seen, 1)] == [True] * 151


# --- 6: shut means shut

Shut = Callable[[User, User, Room], Awaitable[Answer]]
NEW = {"password": PASSWORD, "new_password": "4321"}
SHUTS: dict[str, tuple[set[int], Shut]] = {
    "a logout": ({4401}, lambda _, bob, __: bob.post("/auth/logout")),
    "a new password": ({4401}, lambda _, bob, __: bob.post("/auth/password", NEW)),
    "a deleted account": (
        {4401, 4403},
        lambda _, bob, __: bob.delete("/users/me", {"password": PASSWORD}),
    ),
    "a removal": ({4403}, lambda alice, bob, room: alice.delete(f"{room.path}/members/{bob.name}")),
    "a leave": ({4403}, lambda _, bob, room: bob.delete(f"{room.path}/members/{bob.name}")),
    "a ban": (
        {4403},
        lambda alice, bob, room: alice.put(f"{room.path}/members/{bob.name}", {"role": "banned"}),
    ),
    "a deleted room": ({4404}, lambda alice, _, room: alice.delete(room.path)),
}


async def chatter(user: User, room: Room, stop: asyncio.Event) -> None:
    """Talk without a pause until told to stop, or the room is gone."""
    for number in itertools.count():
        answer = await user.post(f"{room.path}/messages", {"message": f"message {number}"})
        if stop.is_set() or answer.status == 404:
            break
        answer.ok(201)


@pytest.mark.parametrize("how", SHUTS)
@pytest.mark.parametrize("kind", ["public", "private"])
async def test_6_shut_means_shut(chat: Server, there: Server, how: str, kind: str) -> None:
    """Whatever shuts a user out closes all of their sockets, and nothing later arrives."""
    codes, shut = SHUTS[how]
    alice, bob = await chat.talk("alice", "bob", kind=kind)
    by_frame = await Socket(bob.user, bob.room).connect(header=False)
    await by_frame.send(type="auth", token=bob.user.token)
    sockets = [by_frame, bob, await bob.user.at(there).enter(bob.room)]
    stop = asyncio.Event()
    noise = asyncio.create_task(chatter(alice.user, alice.room, stop))
    for socket in sockets:
        await socket.hears(type="message")
    elsewhere = await alice.user.at(there).enter(alice.room)
    assert (await shut(alice.user, bob.user, bob.room)).status in {200, 204}
    began = time.monotonic()
    if codes != {4404}:
        await alice.user.post_in(alice.room, "not for bob")
        await elsewhere.hears("not for bob")
    for socket in sockets:
        assert await socket.is_closed() in codes
        assert socket.reason
        assert not socket.heard(message="not for bob")
    assert time.monotonic() - began < 1.9
    stop.set()
    await noise
    if codes == {4403}:
        (end,) = [e["seq"] for e in await alice.room.log(2) if e["type"] == "member"]
        assert {socket.cursor for socket in sockets} == {end}
    if 4401 in codes:
        (await bob.user.get("/users/me")).refused(401, "unauthorized")


async def test_6_what_ends_one_thing_leaves_the_others(chat: Server, there: Server) -> None:
    """A logout closes the user's sockets in every room; a removal those in its room alone."""
    alice, bob = await chat.talk("alice", "bob")
    second = await alice.user.room(bob.user)
    in_second = await bob.user.at(there).enter(second)
    (await alice.user.delete(f"{second.path}/members/{bob.name}")).ok(204)
    assert await in_second.is_closed() == 4403
    await bob.say("still here")
    third = await bob.user.at(there).enter(await alice.user.room(bob.user))
    (await bob.user.at(there).post("/auth/logout")).ok(204)
    assert await bob.is_closed() == 4401
    assert await third.is_closed() == 4401
    await alice.say("still here")


async def test_6_who_logs_in_anew_is_not_closed_for_the_old_login(
    chat: Server, there: Server
) -> None:
    """The end of former log-ins leaves a socket alone that has a later one."""
    alice = await chat.user("alice")
    room = await alice.room()
    old = await alice.enter(room)
    (await alice.post("/auth/logout")).ok(204)
    fresh = User(there, alice.name, (await there.login(alice.name)).ok()["access_token"])
    new = await fresh.enter(room)
    assert await old.is_closed() == 4401
    await new.say("me again")


async def test_6_a_replay_ends_where_its_reader_was_banned(chat: Server, there: Server) -> None:
    """Who is behind when the ban comes gets the log up to the ban, and not an event more."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    talker = await alice.enter(room)
    await talker.say_all(f"{number} {LONG}"[:4000] for number in range(60))
    for server in (chat, there):
        async with Wire(server, buffer=4096) as behind:
            await behind.upgrade(bob, room, "?after=0")
            await until(lambda: waits(server, bob.name) > 0, "the reader to fall behind")  # noqa: B023
            await room.admit(bob, role="banned")
            ban = (await alice.get(room.path)).ok()["seq"]
            await talker.say_all(f"not for bob {number}" for number in range(30))
            seen = []
            code = 0
            async for opcode, payload in behind.frames():
                if opcode == WSMsgType.CLOSE:
                    code = int.from_bytes(payload[:2], "big")
                    break
                seen.append(payload)
            assert code == 4403
            assert b'"role":"banned"' in seen[-1]
            assert f'"seq":{ban},'.encode() in seen[-1]
        (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
        await room.admit(bob)


async def test_6_a_former_removal_does_not_close_who_has_come_back(chat: Server) -> None:
    """A replay over one's own removal and return goes on to the present."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    for _ in range(3):
        (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
        await room.admit(bob)
    await alice.post_in(room, "welcome back")
    socket = await bob.enter(room, after=0)
    await socket.hears("welcome back")
    await socket.say("thank you")


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
    assert time.time() - ends < 1.7
    assert "too late" not in await alice.room.texts()
    (await login.get("/users/me")).refused(401, "unauthorized")
    await bob.say("still here")


# --- 8: a delete really erases


async def test_8_a_deleted_text_is_nowhere(start: Start) -> None:
    """A deleted text, with all its edits, is in no answer and in no byte of the database."""
    chat = await start()
    there = await start(chat)
    (alice,) = await chat.talk("alice")
    words = [unique(f"secret{number}") for number in range(4)]
    await alice.say_all(f"chatter {number} " + "x" * 200 for number in range(50))
    first = (await alice.say(words[0], client_id="c1"))["seq"]
    for word in words[1:3]:
        await alice.send(type="edit", target=first, message=word + "y" * 1000)
        await alice.hears(type="edit")
    second = (await alice.say(words[3] * 50))["seq"]
    for seq in (first, second):
        await alice.send(type="delete", target=seq)
        await alice.hears(type="delete", target=seq)
    replay = await alice.user.at(there).enter(alice.room, after=0)
    await replay.reaches(second + 2)
    path = f"{alice.room.path}/messages"
    shown = [
        str(replay.frames),
        str(await alice.room.log()),
        (await alice.user.get(f"{path}?limit=200")).body.decode(),
        (await alice.user.post(path, {"message": words[0], "client_id": "c1"})).body.decode(),
        *[str((await alice.user.get(f"/search?q={word}")).ok()) for word in words],
    ]
    assert not [word for word in words if word in "".join(shown)]
    await chat.forget()
    await chat.stop()
    if chat.shared:
        tables = await there.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        rows = [await there.rows(f"SELECT t::text FROM {table} t") for (table,) in tables]  # noqa: S608
        stored = str(rows).encode()
        assert b"chatter" in stored
    else:
        file = chat.config.database_url.removeprefix("sqlite:///")
        sqlite3.connect(file).execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
        stored = Path(file).read_bytes()
    assert not [word for word in words if word.encode() in stored]


async def test_8_an_edit_erases_the_former_text(chat: Server, there: Server) -> None:
    """After an edit the former text is in no history, log, search, replay or row."""
    (alice,) = await chat.talk("alice")
    word = unique("former")
    await alice.say(word)
    await alice.send(type="edit", target=2, message="new")
    await alice.hears(type="edit")
    replay = await alice.user.at(there).enter(alice.room, after=0)
    await replay.reaches(3)
    assert word not in str(replay.frames)
    assert word not in str(await alice.room.log())
    assert word not in str((await alice.user.get(f"{alice.room.path}/messages")).ok())
    assert (await alice.user.get(f"/search?q={word}")).ok() == []
    assert await chat.rows(f"SELECT 1 FROM events WHERE json LIKE '%{word}%'") == []  # noqa: S608
