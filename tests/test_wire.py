"""What may come over the wire, well-formed or not: nothing of it crashes, and nobody else notices.

All on one running server, beside which a witness goes on talking; at the end its log is clean.
"""

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from yarl import URL

from tests.people import At, User, enrol, handshake, upgrade_request
from tests.processes import Process, memory, running

pytestmark = pytest.mark.slow
NOBODY: Any = User(None, At("http://x"), "", "")  # type: ignore[arg-type]
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


@pytest.fixture(scope="module")
async def process(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Process]:
    """Run one server for all tests of this file; what was sent to it left its log clean."""
    async with running(tmp_path_factory.mktemp("wire"), "sqlite:///chat.db") as (process,):
        yield process
    assert len(process.log) < 20_000, process.log[:2000]
    assert CANARY not in process.log


@pytest.fixture(scope="module")
async def company(process: Process) -> AsyncIterator[list[User]]:
    """Give somebody who witnesses all of it, and somebody who does it."""
    async with aiohttp.ClientSession() as session:
        yield await enrol(session, process, "witness", "mallory")


@pytest.fixture
async def users(company: list[User]) -> AsyncIterator[list[User]]:
    """Give both; the witness talks before and after in undisturbed peace."""
    async with company[0].chat("1") as chat:
        await chat.deliver("before")
        yield company
        await chat.deliver("after")
        await asyncio.wait_for(chat.ws.ping(), 1)


# --- RFC 6455


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: bool = True) -> bytes:
    """Return one frame as clients send it; `first` has the bits before the opcode."""
    size = len(payload)
    if size < 126:
        head = bytes([first | opcode, (0x80 if mask else 0) | size])
    else:
        head = bytes([first | opcode, (0x80 if mask else 0) | 126]) + size.to_bytes(2, "big")
    return head + (b"\0\0\0\0" if mask else b"") + payload


def frames(peer: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yield the opcode and payload of each frame that comes, until the end."""
    stream = peer.makefile("rb")
    with suppress(ConnectionResetError):
        while head := stream.read(2):
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
            yield head[0] & 15, stream.read(size)


SAY = json.dumps(
    {"message": "caf\u00e9 \U0001f600", "client_id": "said"}, ensure_ascii=False
).encode()
LATE = frame(TEXT, b'{"message":"late","client_id":"late"}')
# What is said in pieces, or among control frames, is said all the same.
SAID: dict[str, Iterable[bytes]] = {
    "whole": [frame(TEXT, SAY)],
    "in two fragments": [frame(TEXT, SAY[:20], first=0), frame(0, SAY[20:])],
    "in fragments of a byte": [
        frame(TEXT, SAY[:1], first=0),
        *(frame(0, SAY[n : n + 1], first=0) for n in range(1, len(SAY))),
        frame(0),
    ],
    "with empty fragments": [frame(TEXT, first=0), frame(0, first=0), frame(0, SAY)],
    "around a ping": [frame(TEXT, SAY[:9], first=0), frame(PING, b"mid"), frame(0, SAY[9:])],
    "after pongs nobody asked for": [frame(PONG, b"x" * 125)] * 20 + [frame(TEXT, SAY)],
    "after an empty one": [frame(TEXT), frame(TEXT, SAY)],
    "a byte at a time": [bytes([byte]) for byte in frame(TEXT, SAY)],
    "with a length longer than need be": [
        bytes([0x81, 0x80 | 127]) + len(SAY).to_bytes(8, "big") + b"\0\0\0\0" + SAY
    ],
    "with the next close at its heels": [frame(TEXT, SAY) + frame(CLOSE, b"\x03\xe8")],
}


@pytest.mark.parametrize("how", SAID)
async def test_a_message_is_heard_however_it_is_framed(users: list[User], how: str) -> None:
    """Fragments, control frames between them and odd lengths are all one to the server."""
    room = await users[1].room()
    with closing(await asyncio.to_thread(handshake, users[1], room)) as peer:

        def talk() -> Any:
            """Send it, and read until it comes back."""
            for data in SAID[how]:
                peer.sendall(data)
            for opcode, payload in frames(peer):
                if opcode == TEXT and b'"said"' in payload:
                    return json.loads(payload)["message"]
            return None

        said = await asyncio.to_thread(talk)
    async with asyncio.timeout(5):
        while said is None and "close" in how:
            said = (await users[1].log(room))[-1].get("message")
    assert said == "caf\u00e9 \U0001f600"


# What a client must not send, and the codes that may answer it; None: cut off without a word.
WRONG: dict[str, tuple[bytes, set[int | None]]] = {
    "text that is no UTF-8": (frame(TEXT, b"\xff\xfe"), {1007}),
    "half a character": (frame(TEXT, b'{"message":"\xf0\x9f"}'), {1007}),
    "a surrogate in UTF-8": (frame(TEXT, b'{"message":"\xed\xa0\x80"}'), {1007}),
    "binary": (frame(BINARY, SAY), {1003}),
    "binary in fragments": (frame(BINARY, SAY[:5], first=0) + frame(0, SAY[5:]), {1003}),
    "a continuation of nothing": (frame(0, SAY), {1002}),
    "text amid text": (frame(TEXT, b"{", first=0) + frame(TEXT, b"}"), {1002}),
    "reserved bits": (frame(TEXT, SAY, first=0xC0), {1002}),
    "all reserved bits": (frame(TEXT, SAY, first=0xF0), {1002}),
    "a reserved opcode": (frame(3, SAY), {1002}),
    "a reserved control opcode": (frame(11, b""), {1002}),
    "a ping in fragments": (frame(PING, b"x", first=0), {1002}),
    "a ping too long": (frame(PING, b"x" * 126), {1002}),
    "a close too long": (frame(CLOSE, b"\x03\xe8" + b"x" * 124), {1002}),
    "a close of one byte": (frame(CLOSE, b"\x03"), {1002}),
    "a close with a code that may not be sent": (frame(CLOSE, b"\x03\xed"), {1002, 1005}),
    "a close with code 0": (frame(CLOSE, b"\0\0"), {1002, 0}),
    "a close whose reason is no UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), {1002, 1007}),
    "a close without a code": (frame(CLOSE), {1000, 1005, None}),
    "a close with a code of one's own": (frame(CLOSE, b"\x0f\xa0mine"), {4000, 1000}),
    "a frame of 2^63 bytes": (bytes([0x81, 0xFF]) + b"\xff" * 12, {1002, 1009}),
    "a frame of 2^40 bytes": (bytes([0x81, 0xFF, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4]), {1009}),
    "a frame of 10^6 brackets": (
        bytes([0x81, 0xFF]) + (10**6).to_bytes(8, "big") + b"\0\0\0\0" + b"[" * 10**6,
        {1009, None},
    ),
    "fragments without end": (
        frame(TEXT, b"x" * 60_000, first=0) + frame(0, b"x" * 60_000, first=0) * 3,
        {1009, None},
    ),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", {1002, 1009}),
}


@pytest.mark.parametrize("how", WRONG)
async def test_what_breaks_the_protocol_ends_its_own_socket(users: list[User], how: str) -> None:
    """The close code is that of RFC 6455, and what follows it is not obeyed."""
    data, codes = WRONG[how]
    room = await users[1].room()
    with closing(await asyncio.to_thread(handshake, users[1], room)) as peer:

        def provoke() -> int | None:
            """Send it; return the code of the close frame."""
            with suppress(ConnectionError):
                peer.sendall(data + LATE)
            for opcode, payload in frames(peer):
                if opcode == CLOSE:
                    return int.from_bytes(payload[:2], "big") if payload else None
            return None

        assert await asyncio.to_thread(provoke) in codes
    assert not [event for event in await users[1].log(room) if event.get("client_id") == "late"]


async def test_pings_are_echoed_as_they_are(users: list[User]) -> None:
    """A pong has the payload of its ping, up to 125 bytes of anything, in order."""
    with closing(await asyncio.to_thread(handshake, users[1], "1")) as peer:
        sent = [b"", b"x", bytes(range(125)), b"\xff" * 125]
        peer.sendall(b"".join(frame(PING, payload) for payload in sent))
        read = frames(peer)
        pongs = [payload for opcode, payload in (next(read) for _ in range(5)) if opcode == PONG]
        while len(pongs) < len(sent):
            opcode, payload = await asyncio.to_thread(next, read)
            pongs += [payload] if opcode == PONG else []
        assert pongs == sent


async def test_what_is_offered_in_the_handshake_is_declined(users: list[User]) -> None:
    """Compression, subprotocols and later versions are not taken up, and not logged."""
    offers = ["Sec-WebSocket-Extensions: permessage-deflate", f"Sec-WebSocket-Protocol: {CANARY}"]
    (await asyncio.to_thread(handshake, users[1], "1", *offers)).close()
    for odd in ("Sec-WebSocket-Version: 99", "Sec-WebSocket-Key: x", "Upgrade: h2c"):
        refused = partial(handshake, wanted=b"4")
        (await asyncio.to_thread(refused, users[1], "1", odd)).close()


# --- HTTP

CANARY = "canary-in-the-header"
NO_HTTP = [
    b"\r\n\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: " + CANARY.encode() + b"\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + CANARY.encode() * 1000 + b"\r\n\r\n",
    b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x" + CANARY.encode() + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz"
    + CANARY.encode()
    + b"\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nX: \xff\r\nConnection: close\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //\\..%2f HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /websockets/chat/1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
    b"POST /websockets/chat/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /rooms/%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /rooms/%ff?after=%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /web/..%2f..%2fconfig.ini HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /web/%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
]


def exchange(url: str, data: bytes) -> bytes:
    """Send bytes on a connection of their own, and return all that comes back."""
    where, heard = URL(url), b""
    with socket.create_connection((where.host, where.port), 10) as peer, suppress(ConnectionError):
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        while chunk := peer.recv(65536):
            heard += chunk
    return heard


@pytest.mark.parametrize("data", NO_HTTP, ids=range(len(NO_HTTP)))
async def test_what_is_no_http_gets_a_short_answer(users: list[User], data: bytes) -> None:
    """Bytes that are no request are refused briefly, without a header's value in the log."""
    answer = await asyncio.to_thread(exchange, users[0].place.url, data)
    if answer:
        status = int(answer.split()[1])
        assert status == 200 or (400 <= status < 500 and len(answer) < 3000), answer


SLOW = {
    "says nothing": (b"", b""),
    "drips a header": (b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"a"),
    "drips headers": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-Slow: a\r\n"),
    "drips its second headers": (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX-Slow: ",
        b"a",
    ),
    "drips a body": (
        b"POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
        b" ",
    ),
    "drips chunks": (
        b"POST /auth/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\na\r\n",
    ),
    "stops in a body": (
        b"POST /auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nusername=",
        b"",
    ),
    "never logs in": (upgrade_request(NOBODY, "1"), frame(PONG)),
}


def drag_on(url: str, begin: bytes, drip: bytes) -> float:
    """Be slow; return after how many seconds the server had enough."""
    where, began = URL(url), time.monotonic()
    with socket.create_connection((where.host, where.port)) as peer, suppress(ConnectionError):
        peer.settimeout(0.4)
        peer.sendall(begin)
        while time.monotonic() - began < 30:
            with suppress(TimeoutError):
                if not (data := peer.recv(65536)) or b" 408 " in data:
                    break
                continue
            peer.sendall(drip)
    return time.monotonic() - began


async def test_who_drags_on_is_cut_off(users: list[User]) -> None:
    """Headers not complete after 20 s, a body or a log-in after 10 s, and the connection ends."""
    url = users[0].place.url
    waits = await asyncio.gather(
        *(asyncio.to_thread(drag_on, url, *slow) for slow in SLOW.values())
    )
    for kind, seconds in zip(SLOW, waits, strict=True):
        most = 13 if "body" in kind or "chunks" in kind or "logs" in kind else 23
        assert 5 < seconds < most, (kind, seconds)


# --- Fuzzed frames

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=80)
    | st.sampled_from(["", " ", "\0", "\ud800", "me", "../..", "\u202e", 2**53, 2**53 + 1, 1, 2]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("message", "client_id", "target", "seq", "token", "room_id", "username", "retry")
KINDS = ("message", "edit", "delete", "typing", "read", "auth", None)


def fuzz(user: User, kind: str | None, number: int) -> None:
    """Send generated frames of a type; each is obeyed or answered, and the socket lives on."""
    url = f"{user.place.url.replace('http', 'ws')}/websockets/chat/1"
    headers = {"Authorization": f"Bearer {user.token}"}
    with connect(url, additional_headers=headers, proxy=None, compression=None) as ws:

        @seed(number)
        @settings(
            max_examples=30,  # with more it would be a flood
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), VALUES)
        def send(fields: dict[str, Any], odd: Any) -> None:
            """Send a frame, then a good one, and read up to its answer."""
            mark = secrets.token_hex(4)
            ws.send(json.dumps({"type": odd if kind is None else kind, **fields}))
            ws.send(json.dumps({"message": "still here", "client_id": mark}))
            while (heard := json.loads(ws.recv(10))).get("client_id") != mark:
                if heard["type"] == "error":
                    assert heard["error"] and heard["detail"], heard
                    assert heard["error"] not in ("unavailable", "internal"), heard

        try:
            send()
        except ConnectionClosed as closed:
            pytest.fail(f"{kind}: closed with {closed.rcvd}")


async def test_fuzzed_frames_are_obeyed_or_refused(process: Process) -> None:
    """Whatever JSON a frame of any type holds, the socket lives on and memory stays flat."""
    async with aiohttp.ClientSession() as session:
        users = await enrol(session, process, *["fuzz"] * len(KINDS) * 3)
    work = list(zip(users, KINDS * 3, range(len(users)), strict=True))
    await asyncio.to_thread(fuzz, *work[0])
    used = memory(process.pid)
    for each in work[1:]:
        await asyncio.to_thread(fuzz, *each)
    assert memory(process.pid) - used < 20 * 2**20


async def test_fuzzed_bytes_harm_nobody(users: list[User]) -> None:
    """Random bytes after the handshake, and instead of it, end their own connection alone."""
    chance = secrets.SystemRandom()
    url = users[1].place.url
    for _ in range(40):
        noise = chance.randbytes(chance.randrange(1, 400))
        await asyncio.to_thread(exchange, url, noise)
        with closing(await asyncio.to_thread(handshake, users[1], "1")) as peer:
            peer.sendall(noise)
            peer.shutdown(socket.SHUT_WR)
            ended = partial(lambda peer: [opcode for opcode, _ in frames(peer)], peer)
            await asyncio.wait_for(asyncio.to_thread(ended), 10)
