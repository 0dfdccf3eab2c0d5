"""What can go wrong in such a server, and must not: races and outages."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import jwt
import pytest

import chatserver
from tests import postgres
from tests.conftest import Start
from tests.engines import held_commits, lonely_account, outage
from tests.helpers import Room, Server, User
from tests.sockets import Socket, Wire
from tests.words import KEY, PASSWORD, Answer, until

# --- The writer never stops


async def test_an_answer_that_is_hard_to_echo_stops_nobody(chat: Server) -> None:
    """Refusals in one batch with good messages are answered, and so are the good ones."""
    alice, bob = await chat.talk("alice", "bob")
    await alice.room.admit(bob.user, role="banned")
    await bob.is_closed()
    room = await bob.user.room()
    outsider = await alice.user.enter(room)
    await (await bob.user.enter(room)).say("begin")
    hard = ['"\\ud800"', '"\\u0000"', "5", "[]", "{}", "1e400", "NaN", '"' + "x" * 3000 + '"']
    for number, value in enumerate(hard):
        await outsider.ws.send_str(f'{{"message":"x","client_id":{value},"target":{value}}}')
        await outsider.ws.send_str(
            f'{{"type":"edit","message":"x","target":1,"client_id":{value}}}'
        )
        await outsider.send(message="good", client_id=f"c{number}")
    await outsider.hears("good", client_id=f"c{len(hard) - 1}")
    assert await room.texts() == ["begin"] + ["good"] * len(hard)


async def test_a_batch_tells_each_sender_what_became_of_it(start: Start) -> None:
    """Of messages that are stored together, the refused are refused and the others stored."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    private = await alice.user.room(kind="private")
    first = (await alice.say("one", client_id="c1"))["seq"]
    path = f"{alice.room.path}/messages"
    async with held_commits(chat) as one_hangs:
        await alice.send(message="holds the others up")
        await one_hangs()
        cases = [
            (201, alice.user, path, {"message": "good"}),
            (200, alice.user, path, {"message": "one", "client_id": "c1"}),
            (409, alice.user, path, {"message": "two", "client_id": "c1"}),
            (403, bob.user, f"{private.path}/messages", {"message": "let me in"}),
            (404, bob.user, "/rooms/no-such-room/messages", {"message": "hello?"}),
            (201, bob.user, path, {"message": "good too"}),
        ]
        work = [asyncio.create_task(user.post(where, body)) for _, user, where, body in cases]
        waiting = chat.chat.queue
        await until(lambda: waiting.qsize() == len(cases), "all to wait for the next batch")
    answers = [await task for task in work]
    assert [answer.status for answer in answers] == [status for status, *_ in cases]
    assert answers[1].json["seq"] == first
    assert (await alice.room.texts())[1:] == ["holds the others up", "good", "good too"]


async def test_only_so_many_messages_wait(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is slow a few messages wait, and what is above is told to come again."""
    monkeypatch.setattr(chatserver, "QUEUE", 4)
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    async with held_commits(chat) as one_hangs:
        await alice.send(message="the first")
        await one_hangs()
        for number in range(10):
            await alice.send(message="waits", client_id=f"c{number}")
        refused = [(await alice.is_refused("unavailable"))["client_id"] for _ in range(6)]
        assert refused == [f"c{number}" for number in range(4, 10)]
        path = f"{bob.room.path}/messages"
        (await bob.user.post(path, {"message": "too much"})).refused(503, "unavailable")
    await alice.say("there is room again")
    assert await alice.room.texts() == ["the first", *["waits"] * 4, "there is room again"]


async def test_who_hangs_up_takes_nobody_along(start: Start) -> None:
    """What a client that vanishes has asked for is done and told to all, or not done at all."""
    chat = await start()
    there = await start(chat)
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    path = alice.room.path
    async with held_commits(chat) as one_hangs:
        async with Wire(chat) as wire:
            wire.request(
                alice.user, f"{path}/members/{bob.name}", b'{"role":"owner"}', method="PUT"
            )
            await one_hangs()
        await alice.ask("bad_request", type="nothing")
    async with held_commits(chat) as one_hangs:
        await alice.send(message="first")
        await one_hangs()
        lost = await bob.user.enter(bob.room)
        await lost.send(message="said")
        async with Wire(chat) as wire:
            wire.request(alice.user, f"{path}/messages", b'{"message":"posted"}')
            await until(lambda: chat.chat.queue.qsize() == 2, "both to wait for the next batch")
        lost.drop()
        await until(lambda: len(chat.hub.users[bob.name]) == 1, "the server to see it")
    head = (await alice.say("all is well"))["seq"]
    log = await alice.room.log()
    for socket in (alice, bob, carol):
        await socket.reaches(head)
        assert socket.events == log[-len(socket.events) :]
    first, *others, last = await alice.room.texts()
    assert (first, sorted(others), last) == ("first", ["posted", "said"], "all is well")


async def test_a_mistake_in_a_batch_is_an_answer_and_the_writer_lives(
    chat: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should anything unforeseen happen while messages are stored, their senders are told."""
    (alice,) = await chat.talk("alice")

    def fail(*_: object) -> str:
        """Be a mistake."""
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(chatserver, "fold", fail)
        error = await alice.ask(message="x", client_id="c1")
        assert error["client_id"] == "c1"
        assert "ZeroDivision" not in str(error)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    await alice.say("x", client_id="c1")


# --- Coming in, and being shut out, at the wrong moment


async def test_members_come_in_while_the_writer_is_busy(start: Start) -> None:
    """A member enters with a read: a thousand who come back do not wait for one another."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    async with held_commits(chat) as one_hangs:
        await alice.send(message="slow")
        await one_hangs()
        again = [await bob.user.enter(bob.room, after=2) for _ in range(5)]
        assert [socket.hello["seq"] for socket in again] == [2] * 5
    for socket in (*again, bob, alice):
        await socket.hears("slow")
        assert [event["seq"] for event in socket.events] == [3]


async def test_who_is_let_in_at_the_moment_of_an_event_gets_it_once(
    chat: Server, there: Server
) -> None:
    """Those who come in the middle of a flood get each number once, without a gap."""
    (alice,) = await chat.talk("alice")
    users = await chat.users("bob", "carol")
    flood = asyncio.create_task(alice.say_all(f"message {number}" for number in range(300)))
    sockets = [
        await users[n % 2].at((chat, there)[n // 2 % 2]).enter(alice.room) for n in range(12)
    ]
    await flood
    head = (await alice.say("the end"))["seq"]
    for socket in sockets:
        await socket.reaches(head)
    assert [socket for socket in sockets if 3 < socket.hello["seq"] < head - 1]


async def test_what_the_removed_still_send_is_not_obeyed(chat: Server) -> None:
    """A frame behind one's removal lets nobody into a public room again, though it is read."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    async with Wire(chat) as wire:
        await wire.upgrade(bob, room)
        await until(lambda: bob.name in chat.hub.users, "bob")
        (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
        for _ in range(5):
            wire.frame(b'{"message":"me again"}')
        assert await wire.close_code() == 4403
    await until(lambda: bob.name not in chat.hub.users, "the end of bob's socket")
    await alice.post_in(room, "he is gone")
    assert await room.texts() == ["he is gone"]
    assert len((await alice.get(room.path)).ok()["members"]) == 1


async def test_a_log_out_is_answered_after_what_was_sent_before(start: Start) -> None:
    """A message on its way to the disk in another process is stored before the answer, or never."""
    chat = await start()
    there = await start(chat)
    (alice,) = await chat.talk("alice")
    async with held_commits(chat) as one_hangs:
        await alice.send(message="just in time")
        await one_hangs()
        logout = asyncio.create_task(alice.user.at(there).post("/auth/logout"))
        done, _ = await asyncio.wait([logout], timeout=0.5)
        assert not done
    (await logout).ok(204)
    assert await chat.rows("SELECT 1 FROM events WHERE json LIKE '%just in time%'")


async def test_who_is_let_in_while_leaving_for_good_is_no_member(start: Start) -> None:
    """An account that is deleted while it is let into a room elsewhere is not in that room."""
    chat = await start()
    there = await start(chat)
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    async with held_commits(chat) as one_hangs:
        admission = asyncio.create_task(room.admit(bob))
        await one_hangs()
        goodbye = bob.at(there).delete("/users/me", {"password": PASSWORD})
        deletion = asyncio.create_task(goodbye)
        await asyncio.wait([deletion], timeout=0.5)
    await admission
    if (await deletion).status == 503:  # there is a room more to leave
        (await bob.delete("/users/me", {"password": PASSWORD})).ok(204)
    assert [one["role"] for one in (await alice.get(room.path)).ok()["members"]] == ["owner"]


async def test_what_nobody_told_is_checked_where_it_is_stored(chat: Server) -> None:
    """A log-in, a role or a room that ended unheard is found out by the change itself."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await chat.user("carol")).enter(alice.room)
    room_id = alice.room.room_id
    carols = f"room_id = '{room_id}' AND username = '{carol.name}'"
    for sql, code in (
        (f"UPDATE users SET version = version + 1 WHERE username = '{bob.name}'", "unauthorized"),  # noqa: S608
        (f"UPDATE members SET role = 'banned' WHERE {carols}", "forbidden"),  # noqa: S608
        (f"UPDATE rooms SET kind = 'deleted' WHERE room_id = '{room_id}'", "not_found"),  # noqa: S608
    ):
        await chat.change(sql)
        socket = {"unauthorized": bob, "forbidden": carol, "not_found": alice}[code]
        await socket.ask(code, message="late", client_id="c1")
        await socket.ask(code, type="delete", target=3)
        answer = await socket.user.post(f"{alice.room.path}/messages", {"message": "late"})
        answer.refused(answer.status, code)


async def test_a_query_is_decoded_once(chat: Server) -> None:
    """`%2541` is the text `%41` and not the letter A."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "100%41")
    await alice.post_in(room, "100A")
    found = (await alice.get(f"/search?q=100%2541&room_id={room.room_id}")).ok()
    assert [message["message"] for message in found] == ["100%41"]
    socket = await alice.enter(room, after=1, epoch="%2541")
    assert (await socket.next())["type"] == "reset"


async def test_a_hundred_whispers_at_once_are_all_told(chat: Server, there: Server) -> None:
    """However many notes come together, and however long their names, the other process hears."""
    names = [f"crowd-{number}-{'x' * 12}" for number in range(20)]
    alice, *crowd = await chat.talk("alice", *names, word="r" * 50)
    carol = await (await there.user("carol")).enter(alice.room)
    for _ in range(10):
        await asyncio.gather(*(socket.send(type="typing") for socket in crowd))
    await alice.say("the end")
    await carol.hears("the end")
    await until_heard(carol, 200, type="typing")


async def until_heard(socket: Socket, count: int, **fields: str) -> None:
    """Read until so many frames with these fields have come."""
    while len(socket.heard(**fields)) < count:
        await socket.hears(**fields)


# --- Outages


async def test_without_the_database_sockets_wait_and_all_heals(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Sends are `unavailable` and REST is 503 as long as nothing can be stored, and no longer."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    (await chat.ask("GET", "/healthz")).ok()
    path = f"{alice.room.path}/messages"
    seq = (await bob.say("mine"))["seq"]
    async with outage(chat):
        error, edit, post = await asyncio.gather(
            alice.ask("unavailable", message="lost?", client_id="c1"),
            bob.ask("unavailable", type="edit", target=seq, message="x", client_id="e1"),
            alice.user.post(path, {"message": "lost?"}),
        )
        post.refused(503, "unavailable")
        assert (error["client_id"], edit["client_id"]) == ("c1", "e1")
        assert error["retry_after"] >= 1
        if chat.shared:
            for where in ("/healthz", "/rooms", "/users/me"):
                (await alice.user.get(where)).refused(503, "unavailable")
            late = await Socket(alice.user, alice.room).connect(header=False)
            await late.send(type="auth", token=alice.user.token)
            assert await late.is_closed() == 1013
    assert len([r for r in caplog.records if r.name == "chatserver"]) <= 3
    assert "lost?" not in caplog.text.replace("client_id", "")
    caplog.clear()
    await insist(lambda: alice.user.post(path, {"message": "x"}))
    await alice.say("lost?", client_id="c1")
    await bob.hears("lost?")
    await insist(lambda: chat.ask("GET", "/healthz"))
    caplog.clear()


async def insist(attempt: Callable[[], Awaitable[Answer]]) -> None:
    """Try again as long as something is unavailable."""
    async with asyncio.timeout(8):
        while (await attempt()).status == 503:
            await asyncio.sleep(0.05)


async def test_tokens_end_and_pings_go_out_during_an_outage(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What depends on the time alone goes on while the database is slow or away."""
    monkeypatch.setattr(chatserver, "PING", 0.5)
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    claims = jwt.decode(bob.user.token, KEY, ["HS256"]) | {"exp": int(time.time()) + 2}
    late = await User(chat, bob.name, jwt.encode(claims, KEY)).enter(bob.room)
    async with Wire(chat) as wire:
        await wire.upgrade(alice.user, alice.room)
        async with outage(chat):
            edit = asyncio.create_task(alice.user.delete(alice.room.path))
            assert await late.is_closed() == 4401
            assert time.time() < claims["exp"] + 1.9
            async with asyncio.timeout(3):
                async for opcode, _ in wire.frames():
                    if opcode == 9:
                        break
            (await edit).refused(503, "unavailable")
    await insist(lambda: chat.ask("GET", "/healthz"))
    caplog.clear()


async def test_a_replay_survives_an_outage(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is behind when the database goes gets the rest when it is back, and then what is new."""
    monkeypatch.setattr(chatserver, "PAGE_EVENTS", 5)
    chat = await start()
    (alice,) = await chat.talk("alice")
    await alice.say_all("愛" * 4000 for _ in range(80))
    seen: list[int] = []

    def faults() -> list[str]:
        """Return what the server has logged."""
        return [r.getMessage() for r in caplog.records if r.name == "chatserver"]

    async with Wire(chat, buffer=4096) as wire:
        await wire.upgrade(alice.user, alice.room, "?after=0")

        async def read() -> None:
            """Read to the message that comes after the outage."""
            async for _, payload in wire.frames():
                frame = json.loads(payload)
                seen.extend([frame["seq"]] if "created_at" in frame else [])
                if frame.get("message") == "new":
                    break

        async with outage(chat):
            reading = asyncio.create_task(read())
            await until(lambda: len(seen) == 81 or faults(), "the replay to meet the outage")
            await asyncio.sleep(0.5)  # long enough to try again very often
        assert len(faults()) <= 3
        await insist(lambda: chat.ask("GET", "/healthz"))
        await alice.user.post_in(alice.room, "new")
        await asyncio.wait_for(reading, 8)
    assert seen == list(range(1, 83))
    caplog.clear()


async def test_a_process_that_is_cut_off_is_taken_as_gone_and_comes_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        bobs = await bob.at(there).enter(alice.room)
        carols = await carol.at(there).enter(alice.room)
        await alice.hears(type="presence", username=carol.name, online=True)
        await set_login("NOLOGIN")
        for user in (bob, carol):
            await alice.hears(type="presence", username=user.name, online=False)
        await alice.say("into the void")
        (await carol.post("/auth/logout")).ok(204)
        await bobs.ask("unavailable", message="anybody?")
        await set_login("LOGIN")
        await bobs.hears("into the void")
        assert await carols.is_closed() == 4401
        await alice.hears(type="presence", username=bob.name, online=True)
        await alice.send(type="typing")
        await bobs.hears(type="typing")
        await alice.say("so that what came twice would have come")
        await bobs.hears("so that what came twice would have come")
        assert len(bobs.heard(type="typing")) == 1
        late = await (await chat.user("dave")).enter(alice.room)
        assert bob.name in late.hello["online"]
        caplog.clear()
        await there.forget()
        await there.stop()


async def test_a_lost_ear_is_made_up_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the connections that carry notes are cut, what happens meanwhile is heard soon."""
    monkeypatch.setattr(chatserver, "POLL", 0.3)
    chat = await start()
    there = await start(chat)
    if not chat.shared:
        return  # there are no notes
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    bobs = await bob.user.at(there).enter(alice.room)
    cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND query ~* 'listen|notify'
        AND pid <> pg_backend_pid()"""
    await postgres.execute(chat.config.database_url, cut)
    path = f"{alice.room.path}/messages"
    await insist(lambda: alice.user.post(path, {"message": "said meanwhile"}))
    await insist(lambda: bob.user.post("/auth/logout"))
    await carol.hears("said meanwhile")
    assert await bobs.is_closed() == 4401
    await until(lambda: len(there.hub.online.get(alice.room.room_id, ())) == 2, "who is there")
    caplog.clear()


async def test_what_is_left_of_a_deleted_room_is_erased_at_the_next_start(start: Start) -> None:
    """A server that ended in the middle of erasing a room goes on with it when it starts."""
    chat = await start()
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(10))
    await alice.leave()
    await chat.stop()
    room_id = alice.room.room_id
    await chat.change(f"UPDATE rooms SET kind = 'deleted' WHERE room_id = '{room_id}'")  # noqa: S608
    chat = await start(chat)
    (await alice.user.at(chat).get(alice.room.path)).refused(404, "not_found")
    assert await chat.rows(f"SELECT seq FROM events WHERE room_id = '{room_id}'") == []  # noqa: S608


# --- The end of a server


async def test_a_stop_tells_every_socket_and_finishes_what_was_accepted(start: Start) -> None:
    """Sockets get 1001; after a restart the log has all that was seen, and goes on from there."""
    chat = await start()
    alice, bob = await chat.talk("alice", "bob")
    unknown = await Socket(bob.user, bob.room).connect(header=False)
    for number in range(30):
        await alice.send(message=f"message {number}")
    await bob.hears("message 0")
    sockets = (alice, bob, unknown)
    _, *codes = await asyncio.gather(chat.stop(), *(socket.is_closed() for socket in sockets))
    assert codes == [1001] * 3
    chat = await start(chat)
    log = await Room(alice.user.at(chat), alice.room.room_id).log(2)
    for socket in (alice, bob):
        assert socket.events == log[: len(socket.events)]
    again = await bob.user.at(chat).enter(bob.room, after=bob.cursor)
    await again.say("goes on")
