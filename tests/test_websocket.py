"""The WebSocket: logging in, coming in, being refused, whispers, and how a socket ends.

What is told in which order, and what a refused frame is answered, is in test_promises.py.
"""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import WSMsgType

import chatserver
from tests.helpers import Room, Server
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import until


async def test_hello_comes_first(chat: Server) -> None:
    """Logged in by the header or by a first frame, one is told where and who one is."""
    alice = await chat.user("alice")
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


BAD_FIRST_FRAMES = [
    *('{"type":"auth"}', '{"type":"auth","token":5}', '{"type":"auth","token":"nonsense"}'),
    *('{"message":"Hello!"}', '{"type":"typing"}', "{}", "[]", "auth", "", "[" * 60000),
]


async def test_all_else_is_no_login(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad token, or anything else before a good one, closes 4401; so does none in 10 s."""
    alice = await chat.user("alice")
    lobby = Room(alice, "1")
    for frame in BAD_FIRST_FRAMES:
        socket = await Socket(alice, lobby).connect(header=False)
        await socket.ws.send_str(frame)
        assert await socket.is_closed() == 4401, frame[:80]
        assert socket.reason and not socket.frames
    socket = await Socket(alice, lobby).connect(header=False)
    await socket.ws.send_bytes(json.dumps({"type": "auth", "token": alice.token}).encode())
    assert await socket.is_closed() == 4401
    assert chatserver.LOGIN_WAIT == 10
    monkeypatch.setattr(chatserver, "LOGIN_WAIT", 0.5)
    socket = await Socket(alice, lobby).connect(header=False)
    await socket.ws.ping()
    assert await socket.is_closed() == 4401


BAD_CURSORS = ["-1", "x", "1.5", "%20", "1e3", "%D9%A3", "9" * 5000, str(2**53 + 1), "%00"]


async def test_a_refusal_comes_before_the_upgrade_or_as_a_close_code(chat: Server) -> None:
    """By header a refusal is an HTTP error; by first frame it is a close code with a reason."""
    alice, bob = await chat.users("alice", "bob")
    private, public = await alice.room(kind="private"), await alice.room()
    await public.admit(bob, role="banned")
    cases = [(404, "no-such-room", "0"), (403, private.room_id, "0"), (403, public.room_id, "0")]
    cases += [(400, "1", cursor) for cursor in BAD_CURSORS]
    for status, room_id, after in cases:
        path = f"/websockets/chat/{room_id}?after={after}"
        (await bob.ask("GET", path, headers=UPGRADE)).refused(status)
        socket = await Socket(bob, Room(bob, room_id), after=after).connect(header=False)
        await socket.send(type="auth", token=bob.token)
        assert await socket.is_closed() == 4000 + status, path
        assert socket.reason and not socket.frames
    answer = await chat.ask("GET", "/websockets/chat/1", "nonsense", headers=UPGRADE)
    answer.refused(401, "unauthorized")
    (await bob.get("/websockets/chat/1")).refused(400)
    assert len(await private.log()) == 1


async def test_coming_in_joins_a_public_room_once(chat: Server, there: Server) -> None:
    """However many sockets two users open at once, two members join, and all are live."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room()
    users = [user.at(server) for user in (bob, carol) for server in (chat, there)] * 3
    sockets = await asyncio.gather(*(user.enter(room, after=0) for user in users))
    await alice.post_in(room, "welcome")
    for socket in sockets:
        await socket.hears("welcome")
        assert socket.hello["role"] == "member" and socket.hello["seq"] >= 2
    assert [event["type"] for event in await room.log(1)] == ["member", "member", "message"]


async def test_an_error_names_the_frame_it_answers(chat: Server) -> None:
    """An error carries the client_id and target of its frame, but only if they are good ones."""
    alice, bob = await chat.talk("alice", "bob")
    seq = (await alice.say("mine"))["seq"]
    error = await bob.ask("forbidden", type="delete", target=seq, client_id="e1")
    assert (error["client_id"], error["target"]) == ("e1", seq)
    bad: Any
    for bad in ("\ud800", "a\0", "x" * 65, 5.5, [], {"a": 1}, -1, True, 10**30):
        error = await alice.ask("bad_request", message="", client_id=bad, target=bad)
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
            for number in range(20):
                wire.frame(f'{{"message":"late {number}"}}'.encode())
            assert await wire.close_code() == code
            for _ in range(5 if code == 1003 else 0):  # it reads on until its peer closes too
                wire.frame(b'{"message":"later still"}')
                await asyncio.sleep(0.02)
                assert not wire.reader.at_eof() and not wire.reader.exception()
    await until(lambda: len(chat.hub.users[alice.name]) == 1, "their end")
    await alice.say("not disturbed")
    await bob.hears("not disturbed")
    assert len(bob.events) == 1


async def test_typing_is_told_to_few_others_and_not_stored(
    chat: Server, there: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others hear of it in every process, without a number; in a crowd nothing is whispered."""
    assert chatserver.QUIET_ABOVE == 100
    monkeypatch.setattr(chatserver, "QUIET_ABOVE", 3)
    alice, bob = await chat.talk("alice", "bob")
    second = await alice.user.enter(alice.room)
    carol = await (await there.user("carol")).enter(alice.room)
    await alice.hears(type="presence", username=carol.name)
    await alice.send(type="typing")
    typing = {"type": "typing", "room_id": alice.room.room_id, "username": alice.name}
    for socket in (bob, carol):
        assert await socket.hears(type="typing") == typing
    dave = await (await chat.user("dave")).enter(alice.room)
    await alice.send(type="typing")
    await alice.say("loud")
    for socket in (bob, carol, dave, second):
        await socket.hears("loud")
        assert len(socket.heard(type="typing")) == (socket in {bob, carol})
        assert not socket.heard(type="presence", username=dave.name)
    await dave.leave()
    await until(lambda: len(chat.hub.online[alice.room.room_id]) == 3, "three to be left")
    await alice.send(type="typing")
    await bob.hears(type="typing")
    assert len(await alice.room.log()) == 5


async def test_presence_tells_of_the_first_socket_and_the_last(chat: Server, there: Server) -> None:
    """The others hear of one's first socket in any process and of the end of one's last."""
    (alice,) = await chat.talk("alice")
    bob = await chat.user("bob")
    phone = await bob.at(there).enter(alice.room)
    shown = {"type": "presence", "room_id": alice.room.room_id, "username": bob.name}
    assert await alice.hears(type="presence") == shown | {"online": True}
    desk = await bob.enter(alice.room)
    assert desk.hello["online"] == sorted([alice.name, bob.name])
    await phone.leave()
    left = 1 if there is chat else 0
    await until(lambda: len(there.hub.users.get(bob.name, ())) == left, "the phone's end")
    await alice.say("still one")
    await desk.hears("still one")
    assert len(alice.heard(type="presence")) == 1
    desk.drop()
    assert await alice.hears(type="presence") == shown | {"online": False}
    again = await bob.at(there).enter(alice.room)
    await alice.hears(type="presence", online=True)
    assert not again.heard(type="presence", username=bob.name)


async def test_the_silent_are_dropped(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers no ping within the silence that is allowed is dropped; who does, stays."""
    assert (chatserver.PING, chatserver.SILENCE) == (25, 40)
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
