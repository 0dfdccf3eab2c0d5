"""What can go wrong in such a server, and must not: races and outages."""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

import jwt
import pytest

import chatserver
from tests.conftest import Start
from tests.engines import held_commits, lonely_account, outage
from tests.helpers import Room, Server, User
from tests.sockets import Socket, Wire
from tests.words import KEY, PATIENCE, until

Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture


async def test_in_a_batch_each_has_its_own_outcome(start: Start, monkeypatch: Patch) -> None:
    """Of a batch some are refused, too many must come again, and a log-out waits for it."""
    monkeypatch.setattr(chatserver, "QUEUE", 6)
    chat = await start()
    alice, bob, carol = await chat.talk("alice", "bob", "carol")
    private = await alice.user.room(kind="private")
    path = f"{alice.room.path}/messages"
    await alice.say("one", client_id="c1")
    cases = [
        (201, alice.user, path, {"message": "good"}),
        (200, alice.user, path, {"message": "one", "client_id": "c1"}),
        (409, alice.user, path, {"message": "two", "client_id": "c1"}),
        (403, bob.user, f"{private.path}/messages", {"message": "let me in"}),
        (404, bob.user, "/rooms/no-such-room/messages", {"message": "hello?"}),
        (201, bob.user, path, {"message": "good too"}),
    ]
    there = await start(chat)
    async with held_commits(chat) as one_hangs:
        await carol.send(message="holds the others up")
        await one_hangs()
        logout = asyncio.create_task(carol.user.at(there).post("/auth/logout"))
        done, _ = await asyncio.wait([logout], timeout=0.5)
        assert not done
        work = [asyncio.create_task(user.post(where, body)) for _, user, where, body in cases]
        await until(chat.chat.queue.full, "all to wait for the next batch")
        await alice.ask("unavailable", message="too much", client_id="c2")
        (await bob.user.post(path, {"message": "too much"})).refused(503, "unavailable")
    assert [(await task).status for task in work] == [status for status, *_ in cases]
    (await logout).ok(204)
    assert await alice.room.texts() == ["one", "holds the others up", "good", "good too"]


async def test_who_hangs_up_takes_nobody_along(start: Start) -> None:
    """Who is gone in the middle of a log-in leaves nothing; what was asked for is done for all."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await (await start(chat)).user("carol")).enter(alice.room)
    server: Any = chat.client.server
    server.runner.server.handler_cancellation = False  # which is True in tests alone
    for number in range(40):
        with suppress(TimeoutError):
            async with Wire(chat) as wire, asyncio.timeout(number / 2000):
                await wire.upgrade(bob.user, bob.room)
    path = alice.room.path
    async with held_commits(chat) as one_hangs, Wire(chat) as wire:
        wire.request(alice.user, f"{path}/members/{bob.name}", b'{"role":"owner"}', method="PUT")
        await one_hangs()
    async with held_commits(chat) as one_hangs, Wire(chat) as wire:
        await alice.send(message="first")
        await one_hangs()
        lost = await bob.user.enter(bob.room)  # who is a member waits for no commit
        await lost.send(message="said")
        wire.request(alice.user, f"{path}/messages", b'{"message":"posted"}')
        await until(lambda: chat.chat.queue.qsize() == 2, "both to wait for the next batch")
        lost.drop()
        await until(lambda: len(chat.hub.users[bob.name]) == 1, "the server to see it")
    head = (await alice.say("all is well"))["seq"]
    log = await alice.room.log()
    for socket in (alice, bob, carol):
        await socket.reaches(head)
        assert socket.events == log[-len(socket.events) :]
    assert sorted(await alice.room.texts()) == ["all is well", "first", "posted", "said"]


async def test_a_mistake_does_not_stop_the_writer(chat: Server, caplog: Log) -> None:
    """Should anything unforeseen happen while messages are stored, their senders are told."""
    (alice,) = await chat.talk("alice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatserver, "fold", lambda text: text / 0)
        error = await alice.ask(message="x", client_id="c1")
        assert error["client_id"] == "c1" and "TypeError" not in str(error)
    assert "TypeError" in caplog.text
    caplog.clear()
    await alice.say("x", client_id="c1")


async def test_a_mistake_tells_clients_nothing_and_logs_no_line_of_theirs(
    chat: Server, monkeypatch: Patch, caplog: Log
) -> None:
    """A request that meets a mistake is 500 without its cause; its path is quoted in the log."""
    monkeypatch.setattr(chatserver, "bearer", lambda _: 1 / 0)
    async with chat.client.session.get(chat.url("/users/%0Aforged")) as answer:
        assert answer.status == 500 and "Zero" not in await answer.text()
    assert "ZeroDivisionError" in caplog.text and "\nforged" not in caplog.text
    caplog.clear()


async def test_a_mistake_ends_a_socket_but_no_task(
    chat: Server, monkeypatch: Patch, caplog: Log
) -> None:
    """A socket that meets one is told to come again; what runs all the time runs on."""
    alice, bob = await chat.talk("alice", "bob")
    with monkeypatch.context() as patch:
        patch.setattr(chatserver, "obey", lambda *_: 1 / 0)
        await alice.send(message="hi")
        assert await alice.is_closed() == 1013 and "Zero" not in alice.reason
    await bob.say("still here")
    monkeypatch.setattr(chat.hub, "forget_peers", lambda _: 1 / 0)
    await until(lambda: caplog.text.count("a task failed") > 1, "the second mistake of a task")
    caplog.clear()


async def test_what_nobody_told_is_checked_where_it_is_stored(chat: Server) -> None:
    """A log-in, a role or a room that ended unheard is found out by the change itself."""
    alice, bob, carol = await chat.talk("alice", "bob", "carol")
    for what, key, socket, code in (
        ("users SET version = version + 1 WHERE username", bob.name, bob, "unauthorized"),
        ("members SET role = 'banned' WHERE username", carol.name, carol, "forbidden"),
        ("rooms SET kind = 'deleted' WHERE room_id", alice.room.room_id, alice, "not_found"),
    ):
        await chat.change(f"UPDATE {what} = '{key}'")
        await socket.ask(code, message="late", client_id="c1")
        await socket.ask(code, type="delete", target=3)
        answer = await socket.user.post(f"{alice.room.path}/messages", {"message": "late"})
        answer.refused(answer.status, code)


async def test_an_outage_heals(start: Start, monkeypatch: Patch, caplog: Log) -> None:
    """Sends and requests are `unavailable`, tokens end, a replay waits; then all goes on."""
    monkeypatch.setattr(chatserver, "PAGE_EVENTS", 5)
    chat = await start()
    (alice,) = await chat.talk("alice")
    await alice.say_all("愛" * 4000 for _ in range(80))
    bob = await (await chat.user("bob")).enter(alice.room)
    seq = (await bob.say("mine"))["seq"]
    async with Wire(chat, buffer=4096) as behind:
        await behind.upgrade(alice.user, alice.room, "?after=0")
        await until(lambda: any(one.is_full() for one in chat.hub.sockets), "a full buffer")
        frames = behind.frames()
        claims = jwt.decode(bob.user.token, KEY, ["HS256"]) | {"exp": int(time.time()) + 2}
        late = await User(chat, bob.name, jwt.encode(claims, KEY)).enter(bob.room)
        async with outage(chat):
            seen = [await anext(frames) for _ in range(20)]
            error, edit, post, code = await asyncio.gather(
                alice.ask("unavailable", message="lost?", client_id="c1"),
                bob.ask("unavailable", type="edit", target=seq, message="x", client_id="e1"),
                alice.user.post(f"{alice.room.path}/messages", {"message": "lost?"}),
                late.is_closed(),
            )
            assert (error["client_id"], edit["client_id"], code) == ("c1", "e1", 4401)
            post.refused(503, "unavailable")
            for where in ("/healthz", "/rooms", "/users/me") if chat.shared else ():
                (await alice.user.get(where)).refused(503, "unavailable")
        async with asyncio.timeout(PATIENCE):
            while (await chat.ask("GET", "/healthz")).status == 503:
                await asyncio.sleep(0.05)
        assert len([one for one in caplog.records if one.name == "chatserver"]) <= 3
        caplog.clear()
        seen += [await anext(frames) for _ in range(64)]
        await alice.say("lost?", client_id="c1")
        await bob.hears("lost?")
    assert [json.loads(payload)["seq"] for _, payload in seen[1:]] == list(range(1, 84))


async def test_a_process_that_is_cut_off_comes_back(
    start: Start, monkeypatch: Patch, caplog: Log
) -> None:
    """Users of a process that is heard no more are offline; once it is back nothing is missing."""
    monkeypatch.setattr(chatserver, "POLL", 0.2)
    monkeypatch.setattr(chatserver, "PEER_SILENCE", 2.5)
    chat = await start()
    if not chat.shared:
        return  # there are no other processes
    async with lonely_account(chat) as (url, set_login):
        there = await start(database_url=url)
        (alice,) = await chat.talk("alice")
        bob, carol = await chat.users("bob", "carol")
        bobs, carols = [await user.at(there).enter(alice.room) for user in (bob, carol)]
        await alice.hears(type="presence", username=carol.name, online=True)
        doomed = await alice.user.room(bob)
        others = await bob.at(there).enter(doomed)
        await set_login("NOLOGIN")
        for user in (bob, carol):
            await alice.hears(type="presence", username=user.name, online=False)
        await alice.say("into the void")
        (await carol.post("/auth/logout")).ok(204)
        (await alice.user.delete(doomed.path)).ok(204)
        await bobs.ask("unavailable", message="anybody?")
        await set_login("LOGIN")
        await bobs.hears("into the void")
        assert (await carols.is_closed(), await others.is_closed()) == (4401, 4404)
        await alice.hears(type="presence", username=bob.name, online=True)
        caplog.clear()
        await there.forget()
        await there.stop()


async def test_a_stop_tells_every_socket_and_finishes_what_was_accepted(start: Start) -> None:
    """Sockets get 1001; the next start has all that was seen, and erases what was being deleted."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    unknown = await Socket(bob.user, bob.room).connect(header=False)
    doomed = await alice.user.room(bob.user)
    for number in range(30):
        await alice.send(message=f"message {number}")
    await bob.hears("message 0")
    sockets = (alice, bob, unknown)
    _, *codes = await asyncio.gather(chat.stop(), *(socket.is_closed() for socket in sockets))
    assert codes == [1001] * 3
    where = f"WHERE room_id = '{doomed.room_id}'"
    await chat.change(f"UPDATE rooms SET kind = 'deleted' {where}")  # noqa: S608
    chat = await start(chat)
    assert await chat.rows(f"SELECT seq FROM events {where}") == []  # noqa: S608
    log = await Room(alice.user.at(chat), alice.room.room_id).log(2)
    for socket in (alice, bob):
        assert socket.events == log[: len(socket.events)]
    again = await bob.user.at(chat).enter(bob.room, after=bob.cursor)
    await again.say("goes on")
