"""Bad input: a clear error, and never a 5xx, a traceback or a lost socket (promise 7).

That nothing answers 500 is checked by the helper behind every request, and that nothing is logged
as a fault by the fixture behind every server. Here are the requests that try hardest.
"""

import asyncio
import gzip
import random
import re
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from yarl import URL

import chatserver
from tests.document import DOCUMENT, OPERATIONS
from tests.helpers import Room, Server
from tests.processes import running
from tests.sockets import Socket, Wire
from tests.words import KEY, PATIENCE, Event

JSON = "application/json"
GOOD = b'{"message":"x","role":"member","name":"x","seq":1,"room_id":"x-1"}'
BAD_VALUES = [b"true", b"[]", b"NaN", b'"\\u0000"', b'"\\ud800"', b'"\xff"', b"9" * 5000]
# Bodies that no operation takes, sent as JSON.
BODIES = [
    *(b"{", b"[]", b"null", b"5", b'"message"', GOOD + b" {}", b"\x00" * 100, b"message=x"),
    *(b"[" * 60000, b'{"n":' * 10000, GOOD.decode().encode("utf-16")),
    *(b'{"message":?,"role":?,"name":?,"seq":?}'.replace(b"?", value) for value in BAD_VALUES),
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
    """What calls itself anything else is 415, of charsets UTF-8 is read, and bombs are refused."""
    alice = await chat.user("alice")
    room = await alice.room()
    text = '{"message":"é"}'.encode()
    charsets = [f"{JSON}; charset={name}" for name in ("bogus", "utf-16", "zlib", "")]
    bomb = gzip.compress(b'{"message":"' + b"x" * 10**7 + b'"}')
    packed = [("gzip", bomb), ("gzip", b"\x1f\x8b broken"), ("deflate", b"x" * 9)]
    cases: list[tuple[set[int], str, str, bytes]] = [
        *(({201}, kind, "", text) for kind in (JSON, 'Application/JSON; Charset="UTF-8"')),
        *(({415}, kind, "", text) for kind in ("text/plain", "multipart/form-data", "x")),
        *(({201, 400, 415}, kind, "", text) for kind in charsets),
        *(({400, 413}, JSON, coding, body) for coding, body in packed),
    ]
    for statuses, kind, coding, body in cases:
        headers = {"Content-Type": kind, "Connection": "close"}  # as it does after a bad body
        headers |= {"Content-Encoding": coding} if coding else {}
        answer = await alice.ask("POST", f"{room.path}/messages", data=body, headers=headers)
        assert answer.status in statuses and answer.json, (kind, coding)
    assert set(await room.texts()) == {"é"}


async def test_what_is_not_there_is_missing_as_json(chat: Server) -> None:
    """An unknown path is 404, logged in or not; a wrong method is 405 and told the right ones."""
    alice = await chat.user("alice")
    for path in ("/nowhere", "/users/me/x", "/%00", "/%FF", "//", "/web/", "/web/..%2fREADME.md"):
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
    await (await alice.enter(room)).say("by frame", room_id=other.room_id, username=bob.name)
    told = ["2 alice: there", "3 alice edits 2: there", "4 alice: by frame"]
    assert (await room.story())[1:] == told
    assert len(await other.log()) == 1


BAD_CLAIMS: dict[str, list[Any]] = {
    "exp": [time.time() - 9, 0, None, "tomorrow", float("nan"), []],
    "sub": [None, "", "nobody", 5, "a\0b", "\ud800", ["alice"]],
    "ver": [None, "x", -1, 1, 1.5, 10**400, {}],
    "nbf": [time.time() + 10**6],
}
NO_CLAIMS = [b"[]", b"null", b"\xff", b"[" * 3000, b'{"sub":' + b"9" * 5000 + b"}"]


async def test_a_forged_token_logs_nobody_in(chat: Server) -> None:
    """However a token is forged or damaged, it is 401 over HTTP and closes a socket with 4401."""
    alice = await chat.user("alice")
    good: Event = jwt.decode(alice.token, KEY, ["HS256"])
    bad = [good | {claim: value} for claim, values in BAD_CLAIMS.items() for value in values]
    bad += [{name: good[name] for name in good if name != claim} for claim in good]
    for token in (
        *(jwt.encode(claims, KEY) for claims in bad),
        *(jwt.PyJWS().encode(claims, KEY, "HS256") for claims in NO_CLAIMS),
        *(jwt.encode(good, KEY[:-1]), jwt.encode(good, KEY, "HS384"), jwt.encode(good, "", "none")),
        *(f".{alice.token}", f"{alice.token}x", alice.token[:-1], alice.token.swapcase()),
        *("..", "a.b.c", "é.é.é", "x" * 7000),
    ):
        (await chat.ask("GET", "/users/me", token)).refused(401, "unauthorized")
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.send(type="auth", token=token)
        assert await socket.is_closed() == 4401, token[:300]


async def test_a_body_that_drags_on_is_refused(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who begins a body and does not end it hears 408, whatever it was to be."""
    monkeypatch.setattr(chatserver, "BODY_WAIT", 0.3)
    alice = await chat.user("alice")
    headers = f"Host: x\r\nAuthorization: Bearer {alice.token}\r\nContent-Length: 9\r\n\r\n"
    for path in ("/auth/token", "/rooms"):
        async with Wire(chat) as wire:
            wire.writer.write(f"POST {path} HTTP/1.1\r\n{headers}half".encode())
            async with asyncio.timeout(PATIENCE):
                assert (await wire.reader.readline()).startswith(b"HTTP/1.1 408 ")


CANARY = b"canary-in-the-header"
END = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
NO_HTTP = [
    *(b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 20_000 + END + b"\r\n"),
    b"GET /" + END + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /" + END + b"Bad Header: " + CANARY + b"\r\n\r\n",
    b"GET /" + END + b"Authorization: " + CANARY + b"\0\r\n\r\n",
    b"POST /" + END + b"Content-Length: x" + CANARY + b"\r\n\r\n",
    b"POST /" + END + b"Transfer-Encoding: chunked\r\n\r\nzz" + CANARY + b"\r\n",
    *(random.Random(number).randbytes(300) for number in range(20)),  # noqa: S311 - no secret
]


@pytest.mark.slow
async def test_what_is_no_http_gets_a_short_answer(tmp_path: Path) -> None:
    """It is refused, without a header's value in the log; who drags on is cut off after 20 s."""
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
        ends = [await asyncio.open_connection(url.host, url.port) for _ in range(3)]
        ended = asyncio.gather(*(reader.read() for reader, _ in ends), return_exceptions=True)
        ends[1][1].write(b"GET /" + END)
        ends[2][1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /" + END)
        began = time.monotonic()
        while not ended.done():
            for _, writer in ends[1:]:  # the first says nothing at all
                writer.write(b"X-Slow: a\r\n")
            await asyncio.sleep(0.4)
            assert time.monotonic() - began < 23
        for _, writer in ends:
            writer.close()
