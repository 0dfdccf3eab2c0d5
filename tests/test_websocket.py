"""The WebSocket: logging in, being heard, being refused, whispers, and how a socket ends."""

import asyncio
import json
import time
from typing import Any

import jwt
import pytest
from aiohttp import WSMsgType

import chatserver
from tests.helpers import Room, Server, User
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import KEY, until


def short_lived(user: User, seconds: float) -> str:
    """Return a token of the user's that ends so many seconds from now."""
    claims = jwt.decode(user.token, KEY, ["HS256"])
    return jwt.encode(claims | {"exp": time.time() + seconds}, KEY)


# --- Coming in


async def test_hello_comes_first(chat: Server) -> None:
    """A socket opened with the header gets a hello that says where and who one is."""
    alice = await chat.user("alice")
    room = await alice.room()
    socket = await alice.enter(room)
    assert socket.frames == [
        {
            "type": "hello",
            "room_id": room.room_id,
            "username": alice.name,
            "role": "owner",
            "seq": 1,
            "epoch": socket.hello["epoch"],
            "online": [alice.name],
        }
    ]
    url = chat.url(f"/websockets/chat/{room.room_id}")
    async with chat.client.session.ws_connect(url, compress=15) as ws:
        assert not ws.compress  # it would cost ten times the memory


async def test_a_first_frame_logs_in_as_the_header_does(chat: Server) -> None:
    """A browser, which cannot send the header, logs in by its first frame."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "before")
    socket = await Socket(alice, room, after=1).connect(header=False)
    await socket.ws.ping()
    await socket.send(type="auth", token=alice.token)
    assert (await socket.next())["type"] == "hello"
    await socket.hears("before")
    await socket.say("Hello World!")


BAD_FIRST_FRAMES = [
    '{"type":"auth","token":"nonsense"}',
    '{"type":"auth","token":""}',
    '{"type":"auth","token":5}',
    '{"type":"auth","token":"\\ud800"}',
    '{"type":"auth"}',
    '{"type":"auth","token":null}',
    '{"message":"Hello World!"}',
    '{"type":"typing"}',
    *("{}", "[]", "null", "auth", "", "[" * 60000),
]


async def test_any_other_first_frame_is_no_login(chat: Server) -> None:
    """A bad token, or anything else before a good one, closes 4401 with the reason."""
    alice = await chat.user("alice")
    for frame in BAD_FIRST_FRAMES:
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.ws.send_str(frame)
        assert await socket.is_closed() == 4401, frame[:80]
        assert socket.reason
        assert socket.frames == []
    socket = await Socket(alice, Room(alice, "1")).connect(header=False)
    await socket.ws.send_bytes(json.dumps({"type": "auth", "token": alice.token}).encode())
    assert await socket.is_closed() in {1003, 4401}


async def test_who_does_not_log_in_is_let_go(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket without a log-in is closed with 4401 after some seconds, whatever it pings."""
    assert chatserver.LOGIN_WAIT == 10
    monkeypatch.setattr(chatserver, "LOGIN_WAIT", 0.5)
    alice = await chat.user("alice")
    socket = await Socket(alice, Room(alice, "1")).connect(header=False)
    await socket.ws.ping()
    assert await socket.is_closed() == 4401
    assert socket.frames == []


BAD_CURSORS = ["-1", "x", "1.5", "%20", "1e3", "%D9%A3", "9" * 5000, str(2**53 + 1), "%00"]


async def test_a_refusal_comes_before_the_upgrade_or_as_a_close_code(chat: Server) -> None:
    """By header a refusal is an HTTP error; by first frame it is a close code with a reason."""
    alice, bob = await chat.users("alice", "bob")
    private, public = await alice.room(kind="private"), await alice.room()
    await public.admit(bob, role="banned")
    cases: list[tuple[int, Room, Any]] = [
        *((404, Room(bob, room_id), "0") for room_id in ("no-such-room", "direct_0123")),
        *((403, room, "0") for room in (private, public)),
        *((400, Room(bob, "1"), cursor) for cursor in BAD_CURSORS),
    ]
    for status, room, after in cases:
        path = f"/websockets/chat/{room.room_id}?after={after}"
        (await bob.ask("GET", path, headers=UPGRADE)).refused(status)
        socket = await Socket(bob, room, after=after).connect(header=False)
        await socket.send(type="auth", token=bob.token)
        assert await socket.is_closed() == 4000 + status, (room, after)
        assert socket.reason
        assert socket.frames == []
    assert len(await private.log()) == 1


async def test_what_is_no_handshake_or_no_login_is_refused_before_the_upgrade(chat: Server) -> None:
    """A header that does not log in is 401, not taken for none; a plain GET is an error."""
    alice = await chat.user("alice")
    for token in ("nonsense", "", short_lived(alice, -1)):
        headers = UPGRADE | {"Authorization": f"Bearer {token}"}
        answer = await chat.ask("GET", "/websockets/chat/1", headers=headers)
        answer.refused(401, "unauthorized")
    answer = await alice.get("/websockets/chat/1")
    answer.refused(answer.status)
    assert 400 <= answer.status < 500


async def test_coming_in_joins_a_public_room_once(chat: Server, there: Server) -> None:
    """The first connection makes a member, and the hello counts the join already."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    ear = await alice.enter(room)
    first = await bob.at(there).enter(room, after=0)
    assert (first.hello["role"], first.hello["seq"]) == ("member", 2)
    second = await bob.enter(room)
    await first.say("hi")
    assert second.hello["seq"] == 2
    await ear.hears("hi")
    assert ear.story == ["2 bob makes bob member", "3 bob: hi"]
    assert first.story == ["1 alice makes alice owner", *ear.story]


async def test_many_come_in_at_once_as_one_member_each(chat: Server, there: Server) -> None:
    """Sockets of two users opened at the same time make two members, and all are live."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room()
    users = [user.at(server) for user in (bob, carol) for server in (chat, there) for _ in range(3)]
    sockets = await asyncio.gather(*(user.enter(room, after=0) for user in users))
    await alice.post_in(room, "welcome")
    for socket in sockets:
        await socket.hears("welcome")
    assert len(await room.log()) == 4


# --- Being heard


async def test_the_shortest_frame_is_a_message(chat: Server, there: Server) -> None:
    """Its sender, the others and the history see one event, as they do for a post."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    await alice.send(message="Hello World!", ignored=[1])
    event = await alice.hears("Hello World!")
    assert await bob.hears("Hello World!") == event
    assert await carol.hears("Hello World!") == event
    assert (await bob.user.get(f"{bob.room.path}/messages")).ok() == [event]
    posted = await alice.user.at(there).post_in(alice.room, "posted", client_id="c1")
    for socket in (alice, bob, carol):
        assert await socket.hears("posted") == posted
    assert event.keys() == {"type", "room_id", "seq", "username", "created_at", "message"}


async def test_frames_of_one_client_id_that_come_together_are_told_apart(chat: Server) -> None:
    """Of three in one write the first is the event; a twin gets an ack, another text an error."""
    alice, bob = await chat.talk("alice", "bob")
    for text in ("once", "once", "other"):
        await alice.send(message=text, client_id="c1")
    ack = await alice.hears(type="ack")
    error = await alice.is_refused("conflict")
    assert error["client_id"] == "c1"
    assert ack["seq"] == alice.heard(message="once")[0]["seq"]
    await alice.say("end")
    await bob.hears("end")
    assert [event.get("message") for event in bob.events] == ["once", "end"]


async def test_a_role_counts_on_the_socket_from_the_moment_it_is_given(chat: Server) -> None:
    """What a role allows over HTTP it allows on an open socket, and no longer than it lasts."""
    alice, bob = await chat.talk("alice", "bob")
    seq = (await alice.say("rude"))["seq"]
    assert (await bob.ask("forbidden", type="delete", target=seq))["target"] == seq
    await alice.room.admit(bob.user, role="moderator")
    await bob.send(type="delete", target=seq)
    await alice.hears(type="delete", target=seq)
    again = (await alice.say("rude again"))["seq"]
    await alice.room.admit(bob.user, role="member")
    await bob.ask("forbidden", type="delete", target=again)
    await bob.ask("forbidden", type="edit", target=again, message="mine")


# --- Being refused

BAD_FRAMES: list[tuple[str, str]] = [
    *(("bad_request", text) for text in ("", "x", "{", "[]", "null", "5", '"x"', "[" * 60000)),
    *(("bad_request", f'{{"type":{kind}}}') for kind in ('"shout"', '""', "5", "[]", "{}", "true")),
    ("bad_request", "{}"),
    ("bad_request", '{"type":"message"}'),
    ("bad_request", '{"message":NaN}'),
    ("bad_request", '{"type":"edit","message":"x"}'),
    ("bad_request", '{"type":"edit","target":2}'),
    *(
        ("bad_request", f'{{"type":"delete","target":{target}}}')
        for target in ("-1", "1.5", '"x"', "true", "null", "[]", "NaN", "9" * 4000, str(2**53 + 1))
    ),
    ("not_found", '{"type":"delete","target":99}'),
    ("not_found", '{"type":"edit","target":1,"message":"x"}'),
    *(("bad_request", f'{{"type":"read","seq":{seq}}}') for seq in ("-1", "1.5", "NaN", "[]")),
    ("bad_request", '{"type":"read"}'),
    ("bad_request", '{"type":"auth","token":"x"}'),
    ("bad_request", '{"type":"hello"}'),
]


async def test_a_refused_frame_is_an_error_and_the_socket_lives_on(chat: Server) -> None:
    """Whatever a text frame holds, the answer is an error, and what follows is done."""
    alice, bob = await chat.talk("alice", "bob")
    for code, frame in BAD_FRAMES:
        await alice.ws.send_str(frame)
        await alice.is_refused(code)
    await alice.say("still here")
    assert bob.events == []
    await bob.hears("still here")


async def test_an_error_names_the_frame_it_answers(chat: Server) -> None:
    """An error carries the client_id and target of its frame, but only if they are good ones."""
    (alice,) = await chat.talk("alice")
    error = await alice.ask("not_found", type="edit", target=9, message="x", client_id="e1")
    assert (error["client_id"], error["target"]) == ("e1", 9)
    bad: Any
    for bad in ("\ud800", "a\0", "x" * 65, 5, [], {"a": 1}):
        error = await alice.ask("bad_request", message="", client_id=bad, target=bad)
        assert "client_id" not in error
        error = await alice.ask("not_found", type="delete", target=9, client_id=bad)
        assert "client_id" not in error
    for bad in (-1, 1.5, "\ud800", "x", True, [], 10**30):
        assert "target" not in await alice.ask("bad_request", message=" ", target=bad)
    await alice.say("still here")


@pytest.mark.parametrize(
    ("opcode", "payload", "first", "code"),
    [
        (WSMsgType.BINARY, b"{}", 0x80, 1003),
        (WSMsgType.TEXT, b"\xff\xfe", 0x80, 1007),
        (WSMsgType.TEXT, b"\xed\xa0\x80", 0x80, 1007),
        (3, b"", 0x80, 1002),
        (WSMsgType.TEXT, b"{}", 0xC0, 1002),
        (WSMsgType.PING, b"x", 0x00, 1002),
        (WSMsgType.CONTINUATION, b"x", 0x80, 1002),
    ],
)
async def test_what_is_no_text_frame_ends_its_own_socket_alone(
    chat: Server, opcode: int, payload: bytes, first: int, code: int
) -> None:
    """Binary, broken and forbidden frames close with the codes of RFC 6455, for nobody else."""
    alice, bob = await chat.talk("alice", "bob")
    async with Wire(chat) as wire:
        await wire.upgrade(alice.user, alice.room)
        wire.frame(payload, opcode, first)
        assert await wire.close_code() == code
    await alice.say("not disturbed")
    await bob.hears("not disturbed")


async def test_frames_after_the_close_frame_are_not_obeyed(chat: Server) -> None:
    """What a peer has sent behind a binary frame, or behind its own close frame, is not done."""
    alice = await chat.user("alice")
    room = await alice.room()
    for opcode in (WSMsgType.BINARY, WSMsgType.CLOSE):
        async with Wire(chat) as wire:
            await wire.upgrade(alice, room)
            wire.frame(b"\x03\xe8" if opcode == WSMsgType.CLOSE else b"", opcode)
            for number in range(20):
                wire.frame(f'{{"message":"late {number}"}}'.encode())
            await wire.close_code()
    await until(lambda: not chat.hub.sockets, "the end of both")
    await alice.post_in(room, "the end")
    assert await room.texts() == ["the end"]


async def test_a_message_in_fragments_is_one_message(chat: Server) -> None:
    """A text may come in many frames, with pings between them, which are answered."""
    alice, bob = await chat.talk("alice", "bob")
    async with Wire(chat) as wire:
        await wire.upgrade(alice.user, alice.room)
        wire.frame(b'{"message":', WSMsgType.TEXT, 0x00)
        wire.frame(b"are you there?", WSMsgType.PING)
        wire.frame(b'"in ', WSMsgType.CONTINUATION, 0x00)
        wire.frame(b'parts"}', WSMsgType.CONTINUATION)
        await bob.hears("in parts")
        pongs = []
        async for opcode, payload in wire.frames():
            if opcode == WSMsgType.PONG:
                pongs.append(payload)
            if b"in parts" in payload:
                break
        assert pongs == [b"are you there?"]


# --- Whispers


async def test_typing_is_told_to_the_others_and_not_stored(chat: Server, there: Server) -> None:
    """Typing reaches the others in every process, has no number, and is never stored."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    second = await alice.user.enter(alice.room)
    await alice.send(type="typing")
    typing = {"type": "typing", "room_id": alice.room.room_id, "username": alice.name}
    for socket in (bob, carol):
        assert await socket.hears(type="typing") == typing
    await alice.say("done")
    await second.hears("done")
    assert not alice.heard(type="typing")
    assert not second.heard(type="typing")
    assert len(await alice.room.log()) == 4


async def test_a_read_mark_moves_and_is_told_to_nobody(chat: Server) -> None:
    """A mark that moves, by frame or by REST, shows in one's own list of rooms alone."""
    alice, bob = await chat.talk("alice", "bob")
    await alice.say_all(["one", "two"])
    for seq in (3, 1):
        await bob.send(type="read", seq=seq)
    await bob.say("read")
    await alice.hears("read")
    assert not alice.heard(type="read")
    assert not bob.heard(type="read")
    await alice.say("three")
    await bob.send(type="read", seq=6)
    await bob.ask("bad_request", type="nothing")
    shown = (await bob.user.get(bob.room.path)).ok()
    assert (shown["read_seq"], shown["unread"]) == (6, 0)


async def test_presence_tells_of_the_first_socket_and_the_last(chat: Server, there: Server) -> None:
    """The others hear of one's first socket in any process and of the end of one's last."""
    (alice,) = await chat.talk("alice")
    bob = await chat.user("bob")
    phone = await bob.at(there).enter(alice.room)
    shown = {"type": "presence", "room_id": alice.room.room_id, "username": bob.name}
    assert await alice.hears(type="presence") == shown | {"online": True}
    desk = await bob.enter(alice.room)
    assert sorted(desk.hello["online"]) == sorted([alice.name, bob.name])
    await phone.leave()
    await until(
        lambda: len(there.hub.users.get(bob.name, ())) == (there is chat), "the phone's end"
    )
    await alice.say("still one")
    await desk.hears("still one")
    assert len(alice.heard(type="presence")) == 1
    desk.drop()
    assert await alice.hears(type="presence", online=False) == shown | {"online": False}
    again = await bob.at(there).enter(alice.room)
    await alice.hears(type="presence", online=True)
    assert not again.heard(type="presence", username=bob.name)


async def test_in_a_crowd_nothing_is_whispered(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a room with more people online than a hundred, events alone are told."""
    assert chatserver.QUIET_ABOVE == 100
    monkeypatch.setattr(chatserver, "QUIET_ABOVE", 3)
    alice, bob, carol = await chat.talk("alice", "bob", "carol")
    await carol.send(type="typing")
    await alice.hears(type="typing")
    dave = await (await chat.user("dave")).enter(alice.room)
    await carol.send(type="typing")
    await carol.say("loud")
    for socket in (alice, bob, dave):
        await socket.hears("loud")
    assert len(alice.heard(type="typing")) == 1
    assert not alice.heard(type="presence", username=dave.name)
    assert not dave.heard(type="typing")
    await dave.leave()
    await until(lambda: len(chat.hub.rooms[alice.room.room_id].sockets) == 3, "three to be left")
    await carol.send(type="typing")
    await alice.hears(type="typing")


async def test_a_login_stands_as_long_as_its_socket(chat: Server) -> None:
    """A second auth frame is an error, whoever's token it has; one stays who one was."""
    alice, bob = await chat.talk("alice", "bob")
    for token in (bob.user.token, alice.user.token, "nonsense", None):
        await alice.ask("bad_request", type="auth", token=token)
    assert (await alice.say("me"))["username"] == alice.name


# --- The end


async def test_a_silent_peer_is_pinged_and_then_dropped(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers no ping within the silence that is allowed is dropped; who does, stays."""
    assert (chatserver.PING, chatserver.SILENCE) == (25, 40)
    monkeypatch.setattr(chatserver, "PING", 0.5)
    monkeypatch.setattr(chatserver, "SILENCE", 2.5)
    alice, bob = await chat.talk("alice", "bob")
    async with Wire(chat) as wire:
        await wire.upgrade(bob.user, bob.room)
        reading = asyncio.create_task(bob.is_closed())  # its library answers pings while it reads
        async with asyncio.timeout(8):
            pings = [opcode async for opcode, _ in wire.frames() if opcode == WSMsgType.PING]
        assert len(pings) >= 2
    await alice.hears(type="presence", online=True)
    assert not reading.done()
    reading.cancel()
