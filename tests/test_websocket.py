"""The WebSocket: logging in, coming in, being refused, whispers, and how a socket ends.

What is told in which order, and what a refused frame is answered, is in test_promises.py.
"""

import asyncio
from typing import Any

import pytest
from aiohttp import WSMsgType

import chatserver
from tests.helpers import Room, Server
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import until


async def test_hello_comes_first(chat: Server, there: Server) -> None:
    """By header or first frame, one is told where and who one is, and joins once, all at once."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room()
    by_header = await alice.enter(room)
    by_frame = await Socket(alice, room).connect(header=False)
    await by_frame.ws.ping()
    await by_frame.send(type="auth", token=alice.token)
    await by_frame.say("Hello World!")
    who = {"type": "hello", "room_id": room.room_id, "username": alice.name, "role": "owner"}
    where = {"seq": 1, "epoch": chat.chat.epoch, "online": [alice.name]}
    for socket in (by_header, by_frame):
        assert socket.frames[0] == who | where
    users = [user.at(server) for user in (bob, carol) for server in (chat, there)] * 3
    sockets = await asyncio.gather(*(user.enter(room, after=0) for user in users))
    await alice.post_in(room, "welcome")
    for socket in sockets:
        await socket.hears("welcome")
        assert socket.hello["role"] == "member" and socket.hello["seq"] >= 3
    assert [event["type"] for event in await room.log(2)] == ["member", "member", "message"]


async def test_all_else_is_no_login(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad token, or anything else before a good one, closes 4401; so does a long silence."""
    alice = await chat.user("alice")
    for frame in (
        *('{"type":"auth"}', '{"type":"auth","token":5}', '{"type":"auth","token":"nonsense"}'),
        *('{"message":"Hello!"}', "{}", "[]", "", "[" * 60000),
    ):
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.ws.send_str(frame)
        assert await socket.is_closed() == 4401, frame[:80]
        assert socket.reason and not socket.frames
    monkeypatch.setattr(chatserver, "LOGIN_WAIT", 0.5)
    silent = await Socket(alice, Room(alice, "1")).connect(header=False)
    await silent.ws.ping()
    assert await silent.is_closed() == 4401


async def test_a_refusal_comes_before_the_upgrade_or_as_a_close_code(chat: Server) -> None:
    """By header a refusal is an HTTP error; by first frame it is a close code with a reason."""
    alice, bob = await chat.users("alice", "bob")
    private, public = await alice.room(kind="private"), await alice.room()
    await public.admit(bob, role="banned")
    cases = [(404, "no-such-room", "0"), (403, private.room_id, "0"), (403, public.room_id, "0")]
    cases += [(400, "1", bad) for bad in ("-1", "1.5", "%D9%A3", "9" * 5000, str(2**53 + 1))]
    for status, room_id, after in cases:
        path = f"/websockets/chat/{room_id}?after={after}"
        (await bob.ask("GET", path, headers=UPGRADE)).refused(status)
        socket = await Socket(bob, Room(bob, room_id), after=after).connect(header=False)
        await socket.send(type="auth", token=bob.token)
        assert await socket.is_closed() == 4000 + status, path
        assert socket.reason and not socket.frames
    (await chat.ask("GET", "/websockets/chat/1", "nonsense", headers=UPGRADE)).refused(401)


async def test_an_error_names_the_frame_it_answers(chat: Server) -> None:
    """It carries client_id and target of a frame, if they are good; what is bad is refused."""
    alice, bob = await chat.talk("alice", "bob")
    seq = (await alice.say("mine"))["seq"]
    error = await bob.ask("forbidden", type="delete", target=seq, client_id="e1")
    assert (error["client_id"], error["target"]) == ("e1", seq)
    bad: Any
    for bad in ("\ud800", "a\0", "x" * 65, 5.5, [], {"a": 1}, -1, True, 10**30):
        for kind in ("message", "edit", "delete", "read", "auth", bad):
            fields = dict.fromkeys(("message", "client_id", "target", "seq"), bad)
            error = await alice.ask("bad_request", type=kind, **fields)
            assert error.keys() == {"type", "error", "detail"}
    for token in (bob.user.token, alice.user.token, "nonsense", None):
        await alice.ask("bad_request", type="auth", token=token)
    assert (await alice.say("still who I was"))["username"] == alice.name


async def test_what_is_no_text_frame_ends_its_own_socket(chat: Server) -> None:
    """It closes with the code of RFC 6455, and what its peer has sent behind it is not done."""
    alice, bob = await chat.talk("alice", "bob")
    for opcode, payload, code in (
        *((WSMsgType.BINARY, b'{"message":"x"}', 1003), (WSMsgType.CLOSE, b"\x03\xe8", 1000)),
        (WSMsgType.TEXT, b'{"message":"\xed\xa0\x80"}', 1007),
    ):
        async with Wire(chat) as wire:
            await wire.upgrade(alice.user, alice.room)
            wire.frame(payload, opcode)
            for _ in range(20):
                wire.frame(b'{"message":"late"}')
            assert await wire.close_code() == code
    await until(lambda: len(chat.hub.users[alice.name]) == 1, "their end")
    await alice.say("not disturbed")
    await bob.hears("not disturbed")
    assert len(bob.events) == 1


async def test_others_hear_who_comes_types_and_goes(
    chat: Server, there: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any process they hear of one's first socket, typing and last one; a crowd hears none."""
    monkeypatch.setattr(chatserver, "QUIET_ABOVE", 3)
    alice, bob = await chat.talk("alice", "bob")
    second = await alice.user.enter(alice.room)
    carol = await chat.user("carol")
    phone = await carol.at(there).enter(alice.room)
    shown = {"type": "presence", "room_id": alice.room.room_id, "username": carol.name}
    assert await alice.hears(type="presence", username=carol.name) == shown | {"online": True}
    desk = await carol.enter(alice.room)
    assert desk.hello["online"] == sorted([alice.name, bob.name, carol.name])
    await alice.send(type="typing")
    typing = {"type": "typing", "room_id": alice.room.room_id, "username": alice.name}
    for socket in (bob, phone, desk):
        assert await socket.hears(type="typing") == typing
    dave = await (await chat.user("dave")).enter(alice.room)
    await alice.send(type="typing")
    await alice.say("loud")
    for socket in (bob, phone, desk, dave, second):
        await socket.hears("loud")
        assert len(socket.heard(type="typing")) == (socket in {bob, phone, desk})
        assert not socket.heard(type="presence", username=dave.name)
    await phone.leave()
    await dave.leave()
    await until(lambda: len(chat.hub.online[alice.room.room_id]) == 3, "three to be left")
    left = 1 if there is chat else 0
    await until(lambda: len(there.hub.users.get(carol.name, ())) == left, "the phone's end")
    await alice.say("still one")
    await desk.hears("still one")
    assert len(alice.heard(type="presence", username=carol.name)) == 1
    desk.drop()
    assert await alice.hears(type="presence", username=carol.name) == shown | {"online": False}
    assert len(await alice.room.log()) == 6


async def test_the_silent_are_dropped(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers no ping within the silence that is allowed is dropped; who does, stays."""
    monkeypatch.setattr(chatserver, "PING", 0.5)
    monkeypatch.setattr(chatserver, "SILENCE", 2.5)
    alice, bob = await chat.talk("alice", "bob")
    async with Wire(chat) as wire:
        await wire.upgrade(bob.user, bob.room)
        wire.frame(b"are you there?", WSMsgType.PING)
        reading = asyncio.create_task(bob.is_closed())  # its library answers pings while it reads
        async with asyncio.timeout(8):
            heard = [frame async for frame in wire.frames()]
        assert (WSMsgType.PONG, b"are you there?") in heard
        assert heard.count((WSMsgType.PING, b"")) >= 2
    await alice.hears(type="presence", online=True)
    assert not reading.done()
    reading.cancel()
