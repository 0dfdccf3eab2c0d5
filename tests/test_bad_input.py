"""Bad input: a clear error, and never a 5xx, a traceback or a lost socket (promise 7).

That nothing answers 500 is checked by the helper behind every request, and that nothing is logged
as a fault by the fixture behind every server. Here are the requests that try hardest.
"""

import asyncio
import base64
import gzip
import json
import random
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import pytest
from yarl import URL

from tests.document import DOCUMENT, OPERATIONS
from tests.helpers import Room, Server
from tests.processes import running
from tests.sockets import Socket, Wire
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


async def test_a_body_that_is_no_json_object_is_refused(chat: Server) -> None:
    """Broken, deep, misencoded or enormous JSON is 400 wherever any is taken."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "untouched")
    for (method, path), operation in OPERATIONS.items():
        url = path.format(room_id=room.room_id, username=alice.name, target=2)
        for body in BODIES if "requestBody" in operation else ():
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
    for path in DOCUMENT["paths"]:
        answer = await alice.ask("TRACE", path.format(room_id="1", username="alice", target="2"))
        answer.refused(405, "method_not_allowed")
        allowed = {method for method, known in OPERATIONS if known == path}
        assert set(answer.headers["Allow"].split(",")) - {"HEAD"} == allowed


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

BAD_CLAIMS: dict[str, list[Any]] = {
    "exp": [time.time() - 9, 0, -1, None, "tomorrow", float("nan"), []],
    "sub": [None, "", "nobody", 5, 10**400, "a\0b", "\ud800", ["alice"]],
    "ver": [None, "", "x", -1, 1, 1.5, 10**400, {}],
    "nbf": [time.time() + 10**6],
}
NO_CLAIMS = [b"[]", b'"alice"', b"null", b"\xff", b"[" * 3000, b'{"sub":' + b"9" * 5000 + b"}"]


def forgeries(token: str) -> list[str]:
    """Return tokens that are like a good one, but none."""
    head, content, signature = token.split(".")
    good: Event = jwt.decode(token, KEY, ["HS256"])
    bad = [good | {claim: value} for claim, values in BAD_CLAIMS.items() for value in values]
    bad += [{name: good[name] for name in good if name != claim} for claim in good]
    return [
        *(jwt.encode(claims, KEY) for claims in bad),
        *(jwt.encode(good, key) for key in (KEY[:-1], KEY + "\n")),
        *(jwt.encode(good, KEY, "HS384"), jwt.encode(good, "", "none")),
        jwt.encode(good, KEY, headers={"crit": ["exp"]}),
        *(jwt.PyJWS().encode(claims, KEY, "HS256") for claims in NO_CLAIMS),
        f"{base64.b64encode(b'[' * 3000).decode()}.{content}.{signature}",
        *(f"{head}.{content}", f"{head}.{content}.", f".{token}", f"{token}.x", f"{token}x"),
        *(token[:-1], token.swapcase(), content, "..", "a.b.c", "é.é.é", "x" * 7000),
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


CANARY = b"canary-in-the-header"
END = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
NO_HTTP = [
    *(b"\r\n\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
    *(b"GET http://[" + END + b"\r\n", b"GET /" + b"x" * 20_000 + END + b"\r\n"),
    b"GET /" + END + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /" + END + b"Bad Header: " + CANARY + b"\r\n\r\n",
    b"GET /" + END + b"Authorization: " + CANARY + b"\0\r\n\r\n",
    b"GET /" + END + b"A: " + CANARY * 1000 + b"\r\n\r\n",
    b"POST /" + END + b"Content-Length: x" + CANARY + b"\r\n\r\n",
    b"POST /" + END + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"POST /" + END + CHUNKED + b"Content-Length: 1\r\n\r\nzz" + CANARY + b"\r\n",
    *(CHANCE.randbytes(300) for _ in range(20)),
]


@pytest.mark.slow
async def test_what_is_no_http_gets_a_short_answer(tmp_path: Path) -> None:
    """Bytes that are no request are refused, without a header's value in the log."""
    async with running(tmp_path, "sqlite:///chat.db") as (process,):
        url = URL(process.url)
        for data in NO_HTTP:
            reader, writer = await asyncio.open_connection(url.host, url.port)
            writer.write(data)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            assert not answer or re.match(rb"HTTP/1.[01] (4|200)", answer), data
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
