"""Bad input: a clear error, and never a 5xx, a traceback or a lost socket (promise 7).

That nothing answers 500 is checked by the helper behind every request, and that nothing is logged
as a fault by the fixture behind every server. Here are the requests that try hardest.
"""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import random
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests.helpers import Room, Server
from tests.people import company
from tests.processes import running
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import KEY, Event, is_refusal

JSON = "application/json"
GOOD = b'{"message":"x","role":"member","name":"x","seq":1,"room_id":"x-1"}'

# Bodies that no operation takes, sent as JSON.
BODIES = [
    *(b"{", b"[]", b"null", b"5", b'"message"', b"{'message': 'x'}", GOOD + b" {}", GOOD[:-1]),
    *(b"\x00" * 100, b"message=x&role=member", b"[" * 60000, b'{"n":' * 10000),
    b'{"message":NaN,"role":NaN,"name":NaN,"seq":NaN}',
    b'{"message":"\xff","role":"\xff","name":"\xff","seq":"\xff"}',
    b'{"message":"\xed\xa0\x80","role":"\\ud800","name":"\\ud800","seq":"x"}',
    b'\xef\xbb\xbf{"message":5,"role":5,"name":5,"seq":"x"}',
    GOOD.decode().encode("utf-16"),
    b'{"message":' + b"9" * 5000 + b',"role":1,"name":1,"seq":' + b"9" * 5000 + b"}",
    b'{"message":1e999,"role":1e999,"name":1e999,"seq":-1e999}',
]
TAKES_JSON = [
    *(("POST", "/rooms"), ("PUT", "/rooms/{room}/members/{name}")),
    *(("POST", "/rooms/{room}/messages"), ("PATCH", "/rooms/{room}/messages/2")),
    *(("PUT", "/rooms/{room}/read"), ("POST", "/auth/register"), ("POST", "/auth/password")),
    *(("DELETE", "/users/me"), ("POST", "/auth/token")),
]


async def test_a_body_that_is_no_json_object_is_refused(chat: Server) -> None:
    """Broken, deep, misencoded or enormous JSON is 400 on every path that takes any."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "untouched")
    for method, path in TAKES_JSON:
        url = path.format(room=room.room_id, name=alice.name)
        for body in BODIES:
            answer = await alice.ask(method, url, data=body, headers={"Content-Type": JSON})
            answer.refused(400, "invalid_request" if path == "/auth/token" else "bad_request")
    assert (await room.story())[1:] == ["2 alice: untouched"]


async def test_a_body_says_that_it_is_json(chat: Server) -> None:
    """A body that calls itself anything but JSON is 415; of charsets only UTF-8 is ever read."""
    alice = await chat.user("alice")
    room = await alice.room()
    for statuses, kinds in (
        ({201}, (JSON, f"{JSON}; charset=utf-8", 'Application/JSON; Charset="UTF-8"')),
        ({415}, ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x")),
        ({201, 400, 415}, [f"{JSON}; charset={name}" for name in ("bogus", "utf-16", "zlib", "")]),
    ):
        for kind in kinds:
            options: Any = {"data": '{"message":"é"}'.encode(), "headers": {"Content-Type": kind}}
            answer = await alice.ask("POST", f"{room.path}/messages", **options)
            assert answer.status in statuses, kind
    assert set(await room.texts()) == {"é"}


async def test_a_packed_body_is_no_smaller(chat: Server) -> None:
    """A bomb of zeros, a broken packing and an unknown one are the client's error."""
    alice = await chat.user("alice")
    bomb = gzip.compress(b'{"message":"' + b"x" * 10**7 + b'"}')
    for coding, body in (("gzip", bomb), ("gzip", b"\x1f\x8b broken"), ("deflate", b"x" * 9)):
        async with Wire(chat) as wire:
            wire.request(alice, "/rooms/1/messages", body, f"Content-Encoding: {coding}")
            assert (await wire.head()).split()[1] in {b"400", b"413", b"415"}, coding
            is_refusal(json.loads(await wire.reader.readuntil(b"}")))


async def test_what_is_not_there_is_missing_as_json(chat: Server) -> None:
    """An unknown path is 404, logged in or not; a wrong method is 405 and told the right ones."""
    alice = await chat.user("alice")
    paths = ("/nowhere", "/rooms/1/events", "/users/me/x", "/%00", "/%FF", "/..%2Fetc", "//")
    for path in (*paths, "/web/", "/web/..%2fchatserver.py", "/web/../chatserver.py", "/web/%00"):
        (await alice.get(path)).refused(404, "not_found")
        (await chat.ask("GET", path)).refused(404, "not_found")
    for method, path, allowed in (
        ("GET", "/auth/register", {"POST"}),
        ("PATCH", "/users/me", {"GET", "DELETE"}),
        ("PUT", "/rooms/1/messages", {"GET", "POST"}),
        ("POST", "/websockets/chat/1", {"GET"}),
        ("TRACE", "/rooms", {"GET", "POST"}),
    ):
        answer = await alice.ask(method, path)
        answer.refused(405, "method_not_allowed")
        assert set(answer.headers["Allow"].split(",")) - {"HEAD"} == allowed


QUERIES = [
    *("after=%00", "after=%FF", "after=%ED%A0%80", "limit=%FF", "%00=1", "%", "%zz", "=", "&&"),
    *("after", "limit=1&limit=2", "epoch=%00", "epoch=%FF", "q=%00&limit=1", "q=x&room_id=%00"),
    *("q=x&room_id=", "token=%00", "x=" + "y" * 6000, "username=me&password=x", "room_id=1"),
]


async def test_a_strange_query_does_no_harm(chat: Server) -> None:
    """A query that makes no sense is ignored or refused on every path, and changes no meaning."""
    alice = await chat.user("alice")
    room = await alice.room()
    socket = f"/websockets/chat/{room.room_id}"
    for path in ("/users", "/users/me", "/search", room.path, f"{room.path}/messages", socket):
        for query in QUERIES:
            answer = await alice.ask("GET", f"{path}?{query}", headers=UPGRADE)
            assert answer.status in {101, 200, 400, 404}, answer
            if path == "/users/me":
                assert answer.ok()["username"] == alice.name
            if path == room.path:
                assert answer.ok()["room_id"] == room.room_id


async def test_a_path_counts_and_not_what_the_body_says(chat: Server) -> None:
    """A room, user or number in the path is meant, whatever fields of these names a body has."""
    alice, bob = await chat.users("alice", "bob")
    room, other = await alice.room(), await alice.room()
    lie = {"room_id": other.room_id, "username": bob.name, "target": 1}
    (await alice.post(f"{room.path}/messages", lie | {"message": "here"})).ok(201)
    (await alice.patch(f"{room.path}/messages/2", lie | {"message": "there"})).ok()
    (await alice.put(f"{room.path}/members/{alice.name}", lie)).ok()
    assert (await room.story())[1:] == ["2 alice: there", "3 alice edits 2: there"]
    socket = await alice.enter(room)
    await socket.say("by frame", room_id=other.room_id, username=bob.name)
    assert len(await other.log()) == 1


# --- Tokens


def part(value: Any) -> bytes:
    """Return a part of a JWT: JSON as unpadded, URL-safe base64."""
    data = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def forge(claims: Any, key: str = KEY, alg: str = "HS256", head: Any = None) -> str:
    """Return a JWT signed by hand, so that a library's own scruples do not help the server."""
    signed = part(head or {"alg": alg, "typ": "JWT"}) + b"." + part(claims)
    digest = hashlib.sha384 if alg == "HS384" else hashlib.sha256
    signature = b"" if alg == "none" else hmac.digest(key.encode(), signed, digest)
    return (signed + b"." + part(signature)).decode()


BAD_CLAIMS: dict[str, list[Any]] = {
    "exp": [time.time() - 9, 0, -1, None, "tomorrow", float("nan"), []],
    "sub": [None, "", "nobody", 5, 10**400, "a\0b", "\ud800", ["alice"]],
    "ver": [None, "", "x", -1, 1, 1.5, 10**400, {}],
    "nbf": [time.time() + 10**6],
}
NO_CLAIMS: list[Any] = [[], "alice", None, b"\xff", b"[" * 3000, b'{"sub":' + b"9" * 5000 + b"}"]


def forgeries(token: str) -> list[str]:
    """Return tokens that are like a good one, but none."""
    content, signed = token.split(".")[1], token.rpartition(".")[0]
    good: Event = json.loads(base64.urlsafe_b64decode(content + "=="))
    assert forge(good) == token, "the forger is able"
    return [
        *(forge(good, alg=alg) for alg in ("none", "None", "HS384", "RS256", "")),
        *(forge(good, key) for key in ("", KEY[:-1], KEY + "\n")),
        *(forge(good, head=head) for head in ({"alg": "HS256", "crit": ["exp"]}, b"[" * 3000)),
        *(forge({k: v for k, v in good.items() if k != claim}) for claim in good),
        *(forge(good | {claim: bad}) for claim in BAD_CLAIMS for bad in BAD_CLAIMS[claim]),
        *(forge(claims) for claims in NO_CLAIMS),
        *(token[:-1], token + "x", token + ".x", signed + ".", "." + token, content, signed),
        *(token.swapcase(), "..", "a.b.c", "é.é.é", "x" * 7000),
    ]


async def test_a_forged_token_logs_nobody_in(chat: Server) -> None:
    """However a token is forged or damaged, it is 401 over HTTP and closes a socket with 4401."""
    alice = await chat.user("alice")
    for token in forgeries(alice.token):
        (await chat.ask("GET", "/users/me", token)).refused(401, "unauthorized")
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.send(type="auth", token=token)
        assert await socket.is_closed() == 4401, token[:300]


# --- Frames and bytes

ODD: list[Any] = [
    *(None, True, -1, 1, 2, 2**53 + 1, 10**400, 1.5, float("nan"), float("inf"), "", " ", "x"),
    *("\0", "\ud800", "\u202e", "me", "../..", "x" * 5000, [], {}, [[[]]], {"a": {"\0": []}}),
]
FIELDS = ("message", "client_id", "target", "seq", "token", "room_id", "username", "role")
CHANCE = random.Random(7)  # noqa: S311 - the same each time


async def test_fuzzed_frames_are_obeyed_or_refused(chat: Server) -> None:
    """Whatever JSON a frame of any type holds, it is obeyed or refused; the socket lives on."""
    for kind in ("message", "edit", "delete", "typing", "read", "auth", None):
        (alice,) = await chat.talk("alice")
        for _ in range(30):  # with more it would be a flood
            fields = {name: CHANCE.choice(ODD) for name in CHANCE.sample(FIELDS, 4)}
            await alice.send(type=kind or CHANCE.choice(ODD), **fields)
            await alice.say("still here")
        for error in alice.heard(type="error"):
            is_refusal(error)
            assert error["error"] in {"bad_request", "not_found", "conflict"}, error


async def test_noise_ends_its_own_socket_alone(chat: Server) -> None:
    """Random bytes on a socket, or none, as who logs in is gone at once, disturb nobody."""
    alice, bob = await chat.talk("alice", "bob")
    for _ in range(20):
        async with Wire(chat) as wire:
            await wire.upgrade(alice.user, alice.room)
            wire.send(CHANCE.randbytes(100))
            wire.writer.write_eof()
            await wire.rest()
        waiting = await Socket(alice.user, alice.room, after=0).connect(header=False)
        await waiting.send(type="auth", token=alice.user.token)
        waiting.drop()
        await bob.say("not disturbed")


CANARY = b"canary-in-the-header"
END = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NO_HTTP = [
    *(
        b"\r\n\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    *(start + END + b"\r\n" for start in (b"GET http://[", b"GET /" + b"x" * 20_000, b"OPTIONS *")),
    b"GET /" + END + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /" + END + b"Bad Header: " + CANARY + b"\r\n\r\n",
    b"GET /" + END + b"Authorization: " + CANARY + b"\0\r\n\r\n",
    b"GET /" + END + b"A: " + CANARY * 1000 + b"\r\n\r\n",
    b"POST /" + END + b"Content-Length: x" + CANARY + b"\r\n\r\n",
    b"POST /" + END + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"POST /" + END + CHUNKED + b"\r\nzz" + CANARY + b"\r\n",
    b"POST /" + END + CHUNKED + b"Content-Length: 1\r\n\r\n0\r\n\r\n",
    *(b"\x16\x03\x01\x02" + bytes(200), *(CHANCE.randbytes(300) for _ in range(20))),
]


@pytest.mark.slow
async def test_what_is_no_http_gets_a_short_answer(tmp_path: Path) -> None:
    """Bytes that are no request are refused, without a header's value in the log."""
    async with (
        running(tmp_path, "sqlite:///chat.db") as (process,),
        company(process, "witness") as (witness,),
        witness.chat("1") as chat,
    ):
        url = URL(process.url)
        for data in NO_HTTP:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(data)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            assert not answer or re.match(rb"HTTP/1.[01] (4|200)", answer), data
        await chat.deliver("not disturbed")
    assert CANARY.decode() not in process.log


SLOW = [
    (20, b"", b""),
    (20, b"GET /" + END, b"X-Slow: a\r\n"),
    (20, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /" + END + b"A: ", b"a"),
    (10, b"POST /auth/token" + END + CHUNKED + b"\r\n", b"1\r\na\r\n"),
]


async def drag_on(url: URL, most: float, begin: bytes, drip: bytes) -> None:
    """Be slow until the server has had enough, and check how long that was."""
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(begin)
    began = time.monotonic()
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while time.monotonic() - began < 30:
            writer.write(drip)
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.readuntil(b" 408 "), 0.4)
                break
    writer.close()
    assert 5 < time.monotonic() - began < most + 3, begin


@pytest.mark.slow
async def test_who_drags_on_is_cut_off(tmp_path: Path) -> None:
    """Headers not complete after 20 s, or a body after 10 s, and the connection ends."""
    async with running(tmp_path, "sqlite:///chat.db") as (process,):
        await asyncio.gather(*(drag_on(URL(process.url), *slow) for slow in SLOW))
