"""The WebSocket: logging in, hearing and being heard, resuming, and being refused."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from tests.conftest import Launch
from tests.helpers import UPGRADE, ClosedError, Event, Server, User, claims, forge, unique
from tests.test_messages import BAD_CLIENT_IDS, BAD_TEXTS, GOOD_TEXTS

BAD_CURSORS = ["-1", "x", "1.5", "", "%20", "1e3", "%D9%A3", "9" * 5000, str(2**53 + 1), "%00"]


def auth(token: str) -> Event:
    """Return the frame that logs in."""
    return {"type": "auth", "token": token}


async def test_hello_comes_first(server: Server) -> None:
    """A socket opened with the header gets a hello that says where and who one is."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        assert ws.frames[0] == ws.hello
        online = ws.hello.pop("online")
        assert set(online) <= {alice.username}
        epoch = ws.hello.pop("epoch")
        assert quote(str(epoch)) == await alice.epoch(room)
        assert ws.hello == {
            "type": "hello",
            "room_id": room,
            "username": alice.username,
            "role": "owner",
            "seq": 1,
        }


async def test_a_first_frame_logs_in_as_the_header_does(server: Server) -> None:
    """A browser, which cannot send the header, logs in by its first frame."""
    alice = await server.user("alice")
    room = await alice.room()
    async with server.chat(room) as ws:
        await ws.send(auth(alice.token))
        assert (await ws.next())["type"] == "hello"
        assert (await ws.deliver("Hello World!"))["username"] == alice.username


@pytest.mark.parametrize(
    "frame",
    [
        '{"type":"auth","token":"nonsense"}',
        '{"type":"auth","token":""}',
        '{"type":"auth","token":5}',
        '{"type":"auth"}',
        '{"type":"auth","token":null}',
        '{"message":"Hello World!"}',
        '{"type":"typing"}',
        "{}",
        "[]",
        "null",
        "auth",
        "",
        '{"type":"auth","token":"a","token":"b"}',
        "[" * 60000,
    ],
)
async def test_any_other_first_frame_closes_4401(server: Server, frame: str) -> None:
    """A bad token, or anything else before a good one, ends the socket with the reason."""
    async with server.chat("1") as ws:
        await ws.send_text(frame)
        assert await ws.closed() == 4401
        assert ws.reason
        assert ws.frames == []


async def test_a_first_frame_that_is_binary_closes(server: Server) -> None:
    """A binary first frame is no log-in."""
    alice = await server.user("alice")
    async with server.chat("1") as ws:
        await ws.send_bytes(json.dumps(auth(alice.token)).encode())
        assert await ws.closed() in {1003, 4401}


async def test_who_does_not_log_in_is_let_go_after_ten_seconds(
    launch: Launch, session: aiohttp.ClientSession
) -> None:
    """A socket without a log-in is closed with 4401 after about 10 s, whatever the database."""
    server = Server(launch("--port", "0"), session)
    async with server.chat("1") as ws:
        began = asyncio.get_running_loop().time()
        with pytest.raises(ClosedError):
            await ws.next(patience=15)
        assert ws.code == 4401
        assert 8 < asyncio.get_running_loop().time() - began < 13


@pytest.mark.parametrize(
    ("status", "close", "room", "query"),
    [
        (404, 4404, "no-such-room", ""),
        (404, 4404, "NO", ""),
        (404, 4404, "x" * 65, ""),
        (403, 4403, "{private}", ""),
        (403, 4403, "{banned}", ""),
        *((400, 4400, "1", f"?after={cursor}") for cursor in BAD_CURSORS),
        *((400, 4400, "1", f"?last={cursor}") for cursor in BAD_CURSORS),
        (400, 4400, "1", "?after=1&after=2"),
    ],
)
async def test_a_refusal_comes_before_the_upgrade_or_as_a_close_code(
    server: Server, status: int, close: int, room: str, query: str
) -> None:
    """By header a refusal is an HTTP error; by first frame it is a close code with a reason."""
    alice, bob = await server.users("alice", "bob")
    if room in {"{private}", "{banned}"}:
        kind = "private" if room == "{private}" else "public"
        room = await alice.room(kind=kind)
        if kind == "public":
            await alice.appoint(room, bob, "banned")
    path = f"/websockets/chat/{room}{query}"
    (await bob.get(path, headers=UPGRADE)).refused(status)
    async with server.chat(room + query) as ws:
        await ws.send(auth(bob.token))
        assert await ws.closed() == close
        assert ws.reason


@pytest.mark.parametrize("value", ["Bearer nonsense", "Bearer ", "Basic Og==", "nonsense", ""])
async def test_a_bad_header_is_401_before_the_upgrade(server: Server, value: str) -> None:
    """An Authorization header that does not log in is refused, not taken for none."""
    headers = UPGRADE | {"Authorization": value}
    (await server.get("/websockets/chat/1", headers=headers)).refused(401, "unauthorized")


async def test_a_plain_get_is_no_websocket(server: Server) -> None:
    """Without an upgrade the path answers an error, not a crash."""
    alice = await server.user("alice")
    answer = await alice.get("/websockets/chat/1")
    assert answer.refused(answer.status)
    assert 400 <= answer.status < 500


async def test_pages_from_elsewhere_are_refused(server: Server) -> None:
    """An Origin that is not the server's own is 403; its own, or none, is welcome."""
    alice = await server.user("alice")
    room = await alice.room()
    path = f"/websockets/chat/{room}"
    for origin in ("http://evil.example", "null", f"{server.url}.evil.example", "https://[", "x"):
        (await alice.get(path, headers=UPGRADE | {"Origin": origin})).refused(403, "forbidden")
    async with alice.chat(room, headers={"Origin": server.url}) as ws:
        await ws.deliver("from my own page")


async def test_connecting_joins_a_public_room(server: Server) -> None:
    """The first connection makes a member, once, and the hello counts the join already."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    async with alice.chat(room) as hers:
        async with bob.chat(room) as ws:
            assert (ws.hello["role"], ws.hello["seq"]) == ("member", 2)
            if alice.username not in ws.hello["online"]:  # then it follows within half a second
                await ws.event("presence", username=alice.username, online=True)
        event = await hers.event("member")
        assert (event["seq"], event["member"], event["role"]) == (2, bob.username, "member")
        async with bob.chat(room) as ws:
            assert ws.hello["seq"] == 2
            assert ws.numbers == []


async def test_hello_world_is_seen_by_all_at_once_and_in_the_history(server: Server) -> None:
    """The shortest frame is a message: its sender, the others and the history see one event."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        await hers.send_text('{"message": "Hello World!"}')
        echo = await hers.event("message")
        assert await his.event("message") == echo
    assert (echo["message"], echo["username"], echo["seq"]) == ("Hello World!", alice.username, 3)
    assert (echo["room_id"], "client_id" in echo) == (room, False)
    assert (await bob.get(f"/rooms/{room}/messages")).ok() == [echo]
    assert (await bob.events(room))[-1] == echo


@pytest.mark.parametrize("text", GOOD_TEXTS)
async def test_a_text_travels_as_it_is(server: Server, text: str) -> None:
    """Every character of a good text comes out as it went in."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        assert (await hers.deliver(text))["message"] == text
        assert (await his.event("message"))["message"] == text


async def test_what_is_posted_over_http_arrives_on_sockets(server: Server) -> None:
    """A socket hears a message over HTTP, its sender's own sockets too, with the client id."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        posted = await alice.say(room, "by post", client_id="p1")
        assert await hers.event("message") == posted
        assert await his.event("message") == posted


async def test_all_see_one_order_without_gaps(server: Server) -> None:
    """Messages of three senders at once arrive at all of them under the same numbers."""
    users = await server.users("alice", "bob", "carol")
    room = await users[0].room(*users[1:])
    async with users[0].chat(room) as a, users[1].chat(room) as b, users[2].chat(room) as c:
        sockets = (a, b, c)
        for number in range(40):
            await asyncio.gather(*(ws.say(f"message {number}") for ws in sockets))
        streams = [await ws.upto(3 + 120) for ws in sockets]
    assert streams[0] == streams[1] == streams[2]
    assert [event["seq"] for event in streams[0]] == list(range(4, 124))
    for user in users:
        mine = [e["message"] for e in streams[0] if e["username"] == user.username]
        assert mine == [f"message {number}" for number in range(40)]


async def test_a_retry_is_answered_by_an_ack_to_its_sender_alone(server: Server) -> None:
    """Sending again under a client id gives the first number, and no second message."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        first = await hers.deliver("once", client_id="c1")
        await hers.say("once", client_id="c1")
        ack = await hers.event("ack")
        assert (ack["client_id"], ack["seq"]) == ("c1", first["seq"])
        body = {"message": "once", "client_id": "c1"}
        answer = await alice.post(f"/rooms/{room}/messages", json=body)
        assert answer.ok(200)["seq"] == first["seq"]
        last = await hers.deliver("twice", client_id="c2")
        assert last["seq"] == first["seq"] + 1
        await his.upto(last["seq"])
        assert his.numbers == [first["seq"], last["seq"]]
        assert not any(frame["type"] == "ack" for frame in his.frames)
        assert hers.numbers == [first["seq"], last["seq"]]


async def test_a_retry_is_known_after_an_edit_and_a_delete(server: Server) -> None:
    """Also what has been edited or deleted since is acknowledged under its first number."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        seq = (await ws.deliver("one", client_id="c1"))["seq"]
        await ws.send({"type": "edit", "target": seq, "message": "two"})
        await ws.event("edit")
        for text in ("one", "two", "three"):
            await ws.say(text, client_id="c1")
            assert (await ws.event("ack"))["seq"] == seq
        await ws.send({"type": "delete", "target": seq})
        await ws.event("delete")
        await ws.say("one", client_id="c1")
        assert (await ws.event("ack"))["seq"] == seq
        assert await alice.head(room) == seq + 2


async def test_another_text_under_a_client_id_is_an_error(server: Server) -> None:
    """A client id in use for another text is refused with that id, not acknowledged."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        await ws.deliver("one", client_id="c1")
        await ws.say("two", client_id="c1")
        assert (await ws.refusal("conflict"))["client_id"] == "c1"
        await ws.deliver("three")
    assert await alice.head(room) == 3


async def test_two_of_one_client_id_in_one_write_make_one_message(server: Server) -> None:
    """Frames that arrive together are told apart too: one echo, then acks or a conflict."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        for text in ("one", "one", "two"):
            await ws.say(text, client_id="c1")
        kinds = [(await ws.find(lambda f: f.get("client_id") == "c1"))["type"] for _ in range(3)]
    assert sorted(kinds) == ["ack", "error", "message"]
    assert await alice.head(room) == 2


async def filled(user: User, count: int = 10) -> str:
    """Return a room of the user's with this many messages, numbered from 2."""
    room = await user.room()
    async with user.chat(room) as ws:
        for number in range(count):
            await ws.say(f"message {number}")
        await ws.upto(count + 1)
    return room


@pytest.mark.parametrize("after", [0, 1, 5, 10, 11])
async def test_after_delivers_what_was_missed_and_then_goes_live(
    server: Server, after: int
) -> None:
    """`after=N` gives N+1, N+2 … once each, as the log has them, and then what is new."""
    alice = await server.user("alice")
    room = await filled(alice)
    epoch = await alice.epoch(room)
    async with alice.chat(room, after=after, epoch=epoch) as ws:
        assert ws.hello["seq"] == 11
        await ws.deliver("live")
        assert ws.numbers == list(range(after + 1, 13))
        assert ws.events == await alice.events(room, after)


@pytest.mark.parametrize(("last", "first"), [(0, 12), (1, 11), (3, 9), (10, 2), (1000, 1)])
async def test_last_begins_with_the_newest_messages(server: Server, last: int, first: int) -> None:
    """`last=N` gives the N newest messages in order, and then goes live."""
    alice = await server.user("alice")
    room = await filled(alice)
    async with alice.chat(room, last=last) as ws:
        await ws.deliver("live")
        shown = [event["seq"] for event in ws.events if event["type"] == "message"]
        assert shown == list(range(max(first, 2), 13))


async def test_last_is_clamped_to_the_history_limit(server: Server) -> None:
    """However much is asked for, at most 200 messages come."""
    alice = await server.user("alice")
    room = await filled(alice, 210)
    async with alice.chat(room, last=2**53) as ws:
        await ws.deliver("live")
        assert len([e for e in ws.events if e["type"] == "message"]) == 201


async def test_without_a_cursor_only_what_is_new_comes(server: Server) -> None:
    """Neither `after` nor `last`: nothing old is sent."""
    alice = await server.user("alice")
    room = await filled(alice)
    async with alice.chat(room) as ws:
        await ws.deliver("live")
        assert ws.numbers == [12]


@pytest.mark.parametrize("query", [{"after": 12}, {"after": 2**53}, {"after": 5, "epoch": "x"}])
async def test_a_cursor_that_cannot_be_served_is_reset_and_goes_live(
    server: Server, query: dict[str, Any]
) -> None:
    """Above the head or of another epoch: the client is told to begin again, and hears on."""
    alice = await server.user("alice")
    room = await filled(alice)
    async with alice.chat(room, **query) as ws:
        reset = await ws.event("reset")
        assert (reset["seq"], reset["epoch"]) == (11, ws.hello["epoch"])
        assert reset["floor"] in {0, 1}
        await ws.deliver("live")
        assert ws.numbers == [12]


async def test_a_replay_shows_texts_as_they_are_now(server: Server) -> None:
    """A replay gives the edited text at once, the deleted none, then both events."""
    alice = await server.user("alice")
    room = await filled(alice, 2)
    path = f"/rooms/{room}/messages"
    (await alice.patch(f"{path}/2", json={"message": "edited"})).ok()
    (await alice.delete(f"{path}/3")).ok(204)
    async with alice.chat(room, after=1) as ws:
        edited, deleted, edit, delete = (await ws.upto(5))[:4]
    assert (edited["message"], edit["message"], edit["target"]) == ("edited", "edited", 2)
    assert (deleted["deleted"], delete["target"]) == (True, 3)
    assert "message" not in deleted
    assert [edit["type"], delete["type"]] == ["edit", "delete"]


# Frames that are refused, with what the error has to say; {alice} is not bob's.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *((text, {}) for text in ("", "x", "{", '{"message":"x"', "[]", "[{}]", "5", "null", '"x"')),
    *((text, {}) for text in ("{'message':'x'}", '{"message":"x"}{}', "\ufeff", "NaN", "{}")),
    ('{"message":NaN}', {}),
    ('{"message":"x","more":Infinity}', {}),
    ('{"message":"x","message":"y"}', {}),
    ('{"message":"x","more":{"a":1,"a":2}}', {}),
    ("[" * 60000, {}),
    ('{"message":' + "[" * 30000 + "]" * 30000 + "}", {}),
    ('{"message":"x","n":' + '{"a":' * 10000 + "1" + "}" * 10000 + "}", {}),
    ('{"type":"read","seq":' + "9" * 5000 + "}", {}),
    ('{"type":"nonsense","client_id":"c9"}', {}),
    ('{"type":5}', {}),
    ('{"type":null,"message":"x"}', {}),
    ('{"type":["message"],"message":"x"}', {}),
    ('{"type":"hello"}', {}),
    ('{"type":"message"}', {}),
    ('{"type":"message","text":"x","client_id":"c7"}', {"client_id": "c7"}),
    ('{"type":"message","message":"","client_id":"c8"}', {"client_id": "c8"}),
    ('{"type":"edit","message":"x"}', {}),
    ('{"type":"edit","target":2}', {"target": 2}),
    ('{"type":"edit","target":2,"message":" ","client_id":"e"}', {"target": 2, "client_id": "e"}),
    ('{"type":"edit","target":"2","message":"x"}', {}),
    ('{"type":"edit","target":2.5,"message":"x"}', {}),
    ('{"type":"edit","target":true,"message":"x"}', {}),
    ('{"type":"edit","target":null,"message":"x"}', {}),
    ('{"type":"edit","target":1e999,"message":"x"}', {}),
    ('{"type":"edit","target":-1,"message":"x"}', {}),
    ('{"type":"edit","target":1,"message":"x"}', {"error": "not_found", "target": 1}),
    ('{"type":"edit","target":99,"message":"x"}', {"error": "not_found", "target": 99}),
    ('{"type":"edit","target":' + str(2**70) + ',"message":"x"}', {}),
    ('{"type":"edit","target":2,"message":"x"}', {"error": "forbidden", "target": 2}),
    ('{"type":"delete"}', {}),
    ('{"type":"delete","target":[]}', {}),
    ('{"type":"delete","target":1,"client_id":"d"}', {"error": "not_found", "client_id": "d"}),
    ('{"type":"delete","target":99}', {"error": "not_found", "target": 99}),
    ('{"type":"delete","target":2}', {"error": "forbidden", "target": 2}),
    ('{"type":"read"}', {}),
    ('{"type":"read","seq":"1"}', {}),
    ('{"type":"read","seq":-1}', {}),
    ('{"type":"read","seq":1.5}', {}),
    ('{"type":"read","seq":true}', {}),
    ('{"type":"auth","token":"nonsense"}', {"error": "unauthorized"}),
    ('{"type":"auth","token":5}', {}),
    ('{"type":"auth"}', {}),
]


@pytest.mark.parametrize(("frame", "expected"), REFUSED)
async def test_a_refused_frame_is_an_error_and_the_socket_lives_on(
    server: Server, frame: str, expected: dict[str, Any]
) -> None:
    """Whatever is wrong with a frame, its sender hears why, nobody else anything."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    await alice.say(room, "not yours")
    async with alice.chat(room) as hers, bob.chat(room) as his:
        await his.send_text(frame)
        error = await his.refusal()
        assert error.items() >= expected.items(), error
        await his.deliver("still here")
        await hers.event("message")
        assert hers.numbers[-2:] == [3, 4]
        assert "error" not in {each["type"] for each in hers.frames}
        assert [each["type"] for each in his.frames].count("error") == 1


@pytest.mark.parametrize("text", [json.dumps(text) for text in BAD_TEXTS])
async def test_a_bad_text_is_an_error(server: Server, text: str) -> None:
    """A text that HTTP refuses is refused on a socket too, with the client id."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        await ws.send_text('{"type":"message","client_id":"c1","message":' + text + "}")
        assert (await ws.refusal("bad_request"))["client_id"] == "c1"
        await ws.deliver("good")
    assert await alice.head(room) == 2


@pytest.mark.parametrize("client_id", BAD_CLIENT_IDS)
async def test_a_bad_client_id_is_an_error(server: Server, client_id: object) -> None:
    """A bad client id is refused, and its message not stored."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        await ws.send({"message": "x", "client_id": client_id})
        await ws.refusal("bad_request")
        await ws.deliver("good")
    assert await alice.head(room) == 2


async def test_unknown_keys_are_ignored(server: Server) -> None:
    """What a frame has beside the keys that are known does no harm."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        event = await ws.deliver("x", seq=7, username="mallory", role="owner", more=[{"a": 1}])
        assert (event["seq"], event["username"]) == (2, alice.username)
        assert "more" not in event


@pytest.mark.parametrize(
    ("code", "opcode", "data"),
    [
        (1003, aiohttp.WSMsgType.BINARY, b'{"message":"x"}'),
        (1003, aiohttp.WSMsgType.BINARY, b""),
        (1007, aiohttp.WSMsgType.TEXT, b'{"message":"\xff\xfe"}'),
        (1007, aiohttp.WSMsgType.TEXT, '{"message":"x"}'.encode("utf-16")),
        (1007, aiohttp.WSMsgType.TEXT, b'{"message":"\xed\xa0\x80"}'),
        (1009, aiohttp.WSMsgType.TEXT, b'{"message":"' + b"x" * 70000 + b'"}'),
        (1009, aiohttp.WSMsgType.TEXT, b"[" * 10**6),
    ],
)
async def test_what_is_no_text_frame_closes_only_its_own_socket(
    server: Server, code: int, opcode: aiohttp.WSMsgType, data: bytes
) -> None:
    """Binary, broken or oversize frames end the socket with RFC 6455's code, and no other's."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        await his.send_raw(opcode, data)
        assert await his.closed() == code
        await hers.deliver("still here")
    assert await alice.head(room) == 3


async def test_edits_and_deletes_are_events_for_all(server: Server) -> None:
    """An edit and a delete over the socket arrive everywhere under numbers of their own."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        seq = (await hers.deliver("teh word"))["seq"]
        frame = {"type": "edit", "target": seq, "message": "the word", "client_id": "e1"}
        await hers.send(frame)
        edit = await his.event("edit")
        assert (edit["seq"], edit["target"], edit["message"]) == (seq + 1, seq, "the word")
        assert (edit["room_id"], edit["username"]) == (room, alice.username)
        await hers.send({"type": "delete", "target": seq})
        delete = await his.event("delete")
        assert (delete["seq"], delete["target"], "message" in delete) == (seq + 2, seq, False)
        await hers.upto(seq + 2)
        assert hers.events == his.events
        await hers.send({"type": "edit", "target": seq, "message": "again"})
        assert (await hers.refusal("not_found"))["target"] == seq


async def test_a_moderator_deletes_over_the_socket(server: Server) -> None:
    """What a role allows over HTTP it allows on the socket, from the moment it is given."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        seq = (await hers.deliver("rude"))["seq"]
        await his.send({"type": "delete", "target": seq})
        await his.refusal("forbidden")
        await alice.appoint(room, bob, "moderator")
        await his.event("member")
        await his.send({"type": "delete", "target": seq})
        assert (await hers.event("delete"))["username"] == bob.username
        await his.send({"type": "edit", "target": seq, "message": "polite"})
        await his.refusal()


async def test_typing_is_told_to_the_others_and_not_stored(server: Server) -> None:
    """Typing reaches the others, once in 2 s however often it is sent, and has no number."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        for _ in range(5):
            await hers.send({"type": "typing"})
        typing = await his.event("typing")
        assert typing.items() >= {"room_id": room, "username": alice.username}.items()
        assert "seq" not in typing
        await hers.deliver("typed")
        await his.event("message")
        kinds = [frame["type"] for frame in his.frames]
        assert kinds.count("typing") == 1
        assert "typing" not in {frame["type"] for frame in hers.frames}
    assert await alice.head(room) == 3


async def test_read_marks_are_told_to_the_others(server: Server) -> None:
    """A read mark over the socket moves the mark and shows to the others, not to oneself."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        seq = (await hers.deliver("read this"))["seq"]
        await his.upto(seq)
        await his.send({"type": "read", "seq": seq})
        read = await hers.event("read")
        assert (read["username"], read["seq"], read["room_id"]) == (bob.username, seq, room)
        await his.deliver("read it")
        assert "read" not in {frame["type"] for frame in his.frames}
    (found,) = [each for each in (await bob.get("/rooms")).ok() if each["room_id"] == room]
    assert (found["read_seq"], found["unread"]) == (seq, 0)


async def test_presence_tells_who_comes_and_goes(server: Server) -> None:
    """The others hear of one's first socket and of the end of one's last, and see it in lists."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    room = await alice.room(bob)

    async def online() -> tuple[bool, bool]:
        """Return whether bob is online as a user and as a member."""
        user = (await alice.get(f"/users/{bob.username}")).ok()
        members = (await alice.get(f"/rooms/{room}")).ok()["members"]
        (member,) = [each for each in members if each["username"] == bob.username]
        return user["online"], member["online"]

    async with alice.chat(room) as hers:
        assert await online() == (False, False)
        async with bob.chat(room) as first:
            came = await hers.event("presence", username=bob.username)
            assert (came["online"], came["room_id"], "seq" in came) == (True, room, False)
            assert await online() == (True, True)
            async with bob.chat(room) as second:
                await second.deliver("here too")
            await first.deliver("still here")
            await hers.event("message", message="still here")
            assert await online() == (True, True)
        went = await hers.event("presence", username=bob.username)
        assert went["online"] is False
        assert await online() == (False, False)
        told = [
            f["online"] for f in hers.frames if f.get("username") == bob.username and "online" in f
        ]
        assert told == [True, False]
        assert not any(
            frame["type"] == "presence" and frame["username"] == alice.username
            for frame in hers.frames
        )


async def test_a_renewed_login_keeps_the_socket(server: Server) -> None:
    """A new token of the same user on an open socket is taken without a word or with a nod."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        await ws.send(auth(forge(claims(alice.token))))
        await ws.deliver("still here")
        assert not any(frame["type"] == "error" for frame in ws.frames)
        assert [frame["type"] for frame in ws.frames].count("hello") == 1


async def test_a_bad_renewal_leaves_the_old_login_standing(server: Server) -> None:
    """Another user's token, or none at all, is an error; one stays who one was."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as ws:
        for token in (bob.token, "nonsense", forge(claims(alice.token), key="x" * 32)):
            await ws.send(auth(token))
            await ws.refusal()
        assert (await ws.deliver("still me"))["username"] == alice.username


async def test_a_deleted_room_closes_its_sockets_4404(server: Server) -> None:
    """Whoever is in a room that is deleted is closed with 4404; other rooms are not."""
    alice, bob = await server.users("alice", "bob")
    room, other = await alice.room(bob), await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his, bob.chat(other) as elsewhere:
        (await alice.delete(f"/rooms/{room}")).ok(204)
        assert await hers.closed() == 4404
        assert await his.closed() == 4404
        await elsewhere.deliver("still here")


async def test_a_lost_connection_is_forgotten(server: Server) -> None:
    """A client that vanishes without a word disturbs nobody, and is offline soon after."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as hers, bob.chat(room) as his:
        await hers.event("presence", username=bob.username, online=True)
        his.drop()
        await hers.event("presence", username=bob.username, online=False)
        await hers.deliver("still here")


async def test_leaving_a_room_closes_ones_sockets_there(server: Server) -> None:
    """Who leaves a room hears their own leaving at most, and is closed with 4403."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with bob.chat(room) as his:
        (await bob.delete(f"/rooms/{room}/members/{bob.username}")).ok(204)
        await alice.say(room, unique("later"))
        assert await his.closed() == 4403
        assert his.numbers in ([], [3])
