"""Bad input: a clear error, and never a 5xx, a traceback or a lost socket (promise 7).

That nothing answers a 5xx is checked by the helper behind every request, and that no traceback is
logged by the fixture behind every server. Here are the requests that try hardest.
"""

import asyncio
import gzip
import io
import json
import time
import zlib
from typing import Any

import pytest
from yarl import URL

from tests.conftest import Start
from tests.helpers import SECRET, UPGRADE, Server, claims, forge, part, unique
from tests.test_rooms import PATHS

JSON = "application/json"

# Bodies that no path takes, sent as JSON.
BODIES = [
    b"",
    b" ",
    b"{",
    b"}",
    b"[]",
    b"null",
    b"5",
    b'"message"',
    b"{'message': 'x'}",
    b'{"message":"x"} {}',
    b'{"message":"x",}',
    b'{"message":"x"',
    b'{message:"x"}',
    b'{"message":NaN}',
    b'{"message":"x","role":"member","name":"x","seq":1,"n":NaN}',
    b'{"message":"x","role":"member","name":"x","seq":1,"n":-Infinity}',
    b'{"message":"x","role":"member","name":"x","seq":1,"seq":1}',
    b'{"message":"x","role":"member","name":"x","seq":1,"n":{"a":1,"a":2}}',
    b'{"message":"\xff","role":"\xff","name":"\xff","seq":"\xff"}',
    b'{"message":"\xed\xa0\x80","role":"member","name":"x","seq":1}',
    b'\xef\xbb\xbf{"message":5,"role":5,"name":5,"seq":"x"}',
    '{"message":"x","role":"member","name":"x","seq":1}'.encode("utf-16"),
    '{"message":"x","role":"member","name":"x","seq":1}'.encode("utf-16-le"),
    '{"message":"x","role":"member","name":"x","seq":1}'.encode("utf-32"),
    b"[" * 60000,
    b'{"message":' + b"[" * 30000 + b"]" * 30000 + b"}",
    b'{"n":' * 10000 + b"1" + b"}" * 10000,
    b'{"message":' + b"9" * 5000 + b',"role":1,"name":1,"seq":' + b"9" * 5000 + b"}",
    b'{"message":1e999,"role":1e999,"name":1e999,"seq":1e999}',
    b'{"message":-' + b"9" * 5000 + b',"role":1,"name":1,"seq":-' + b"9" * 5000 + b"}",
    b"\x00" * 100,
    b"message=x&role=member&name=x&seq=1",
]

TAKES_JSON = [
    ("POST", "/rooms"),
    ("PATCH", "/rooms/{room}"),
    ("PUT", "/rooms/{room}/members/{name}"),
    ("POST", "/rooms/{room}/messages"),
    ("PATCH", "/rooms/{room}/messages/2"),
    ("PUT", "/rooms/{room}/read"),
    ("POST", "/auth/register"),
    ("POST", "/auth/password"),
    ("DELETE", "/users/me"),
]


@pytest.mark.parametrize(("method", "path"), TAKES_JSON)
async def test_a_body_that_is_no_json_object_is_400(server: Server, method: str, path: str) -> None:
    """Broken, deep, doubled, misencoded or enormous JSON is 400 on every path that takes any."""
    alice = await server.user("alice")
    room = await alice.room()
    await alice.say(room, "untouched")
    path = path.format(room=room, name=alice.username)
    for body in BODIES:
        if not body.strip() and "/members/" in path:
            continue  # no body is a body there: the role has a default
        headers = {"Content-Type": JSON}
        answer = await alice.request(method, path, data=body, headers=headers)
        assert answer.status == 400, (body[:80], answer)
        answer.refused(400, "bad_request")
    assert await alice.head(room) == 2
    (message,) = (await alice.get(f"/rooms/{room}/messages")).ok()
    assert message["message"] == "untouched"


async def test_nesting_a_million_deep_is_an_error(start: Start) -> None:
    """With the size limits lifted, 10^6 brackets are refused like any other bad JSON."""
    server = await start(body_bytes=4_000_000, frame_bytes=4_000_000)
    alice = await server.user("alice")
    deep = b"[" * 10**6
    whole = b'{"message":' + deep + b"]" * 10**6 + b"}"
    objects = b'{"a":' * 500_000
    for body in (deep, whole, objects):
        headers = {"Content-Type": JSON}
        answer = await alice.post("/rooms/1/messages", data=io.BytesIO(body), headers=headers)
        answer.refused(400, "bad_request")
    async with alice.chat("1") as ws:
        for body in (deep, whole, objects):
            await ws.send_text(body.decode())
            await ws.refusal("bad_request")
        await ws.deliver("still here")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Type": "application/x-www-form-urlencoded"}),
        (415, {"Content-Type": "multipart/form-data; boundary=x"}),
        (415, {"Content-Type": "application/octet-stream"}),
        (415, {"Content-Type": "application/xml"}),
        (415, {"Content-Type": "nonsense"}),
        (415, {"Content-Type": f"{JSON}; charset=bogus"}),
        (415, {"Content-Type": f"{JSON}; charset=utf-16"}),
        (415, {"Content-Type": f"{JSON}; charset=latin-1"}),
        (415, {"Content-Type": f"{JSON}; charset=rot13"}),
        (415, {"Content-Type": f"{JSON}; charset=zlib"}),
        (415, {"Content-Type": f"{JSON}; charset="}),
        (201, {"Content-Type": JSON}),
        (201, {"Content-Type": f"{JSON}; charset=utf-8"}),
        (201, {"Content-Type": 'Application/JSON; Charset="UTF-8"'}),
    ],
)
async def test_json_has_to_say_so(server: Server, status: int, headers: dict[str, str]) -> None:
    """A body that calls itself anything but JSON in UTF-8 is 415."""
    alice = await server.user("alice")
    room = await alice.room()
    body = b'{"message":"x"}'
    answer = await alice.post(f"/rooms/{room}/messages", data=body, headers=headers)
    if status == 415:
        answer.refused(415, "unsupported_media_type")
        form = headers | {"Content-Type": headers["Content-Type"].replace("x-www-form-", "x-")}
        login = await server.post("/auth/token", data=b"username=a&password=b", headers=form)
        assert login.refused(login.status)
        assert login.status in {400, 415}
        assert login.json["error_description"] == login.json["detail"]
    else:
        answer.ok(201)


@pytest.mark.parametrize("path", ["/rooms/1/messages", "/auth/register", "/auth/token"])
async def test_a_body_above_the_limit_is_413(server: Server, path: str) -> None:
    """A body over 64 KiB is 413, as JSON, with a length or in chunks; zipped it is no smaller."""
    alice = await server.user("alice")
    big = json.dumps({"message": "x" * 70000}).encode()
    bomb = gzip.compress(json.dumps({"message": "x" * 10**7}).encode())

    async def chunks() -> Any:
        """Send without telling how much is to come."""
        for at in range(0, len(big), 7000):
            yield big[at : at + 7000]

    (await alice.post(path, data=big, headers={"Content-Type": JSON})).refused(413, "too_large")
    answer = await alice.post(path, data=chunks(), headers={"Content-Type": JSON})
    answer.refused(413, "too_large")
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    answer = await alice.post(path, data=bomb, headers=headers)
    assert answer.refused(answer.status)
    assert answer.status in {400, 413, 415}


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "bogus", "gzip, gzip"])
async def test_a_body_that_is_not_what_it_is_coded_as_is_refused(
    server: Server, coding: str
) -> None:
    """A content coding that is unknown, or broken, is the client's error."""
    alice = await server.user("alice")
    for body in (b"\x1f\x8b broken", zlib.compress(b"{")[:-1], b'{"message":5}'):
        headers = {"Content-Type": JSON, "Content-Encoding": coding}
        answer = await raw_request(server, "POST", "/rooms/1/messages", alice.token, headers, body)
        assert 400 <= answer < 500, (coding, body, answer)


async def raw_request(  # noqa: PLR0913, PLR0917
    server: Server, method: str, path: str, token: str, headers: dict[str, str], body: bytes
) -> int:
    """Send a request byte by byte, as no library would, and return the status."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"Authorization: Bearer {token}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    answer = await exchange(server, "\r\n".join([*lines, "", ""]).encode() + body)
    return int(answer.split()[1])


async def exchange(server: Server, data: bytes) -> bytes:
    """Send bytes on a connection of their own, and return all that comes back."""
    url = URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        async with asyncio.timeout(15):
            writer.write(data)
            await writer.drain()
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("name", ["Sec-WebSocket-Key", "Sec-WebSocket-Version"])
@pytest.mark.parametrize("value", [b"\xff", "\u00b2".encode(), b"x"])
async def test_a_strange_handshake_is_400(server: Server, name: str, value: bytes) -> None:
    """A handshake whose headers are not what they should be is refused, without a traceback."""
    alice = await server.user("alice")
    headers = UPGRADE | {"Connection": "Upgrade, close", "Authorization": f"Bearer {alice.token}"}
    lines = [f"{key}: {text}".encode() for key, text in headers.items() if key != name]
    lines = [b"GET /websockets/chat/1 HTTP/1.1", b"Host: x", *lines, name.encode() + b": " + value]
    answer = await exchange(server, b"\r\n".join([*lines, b"", b""]))
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert b'"bad_request"' in answer


@pytest.mark.parametrize("value", ["100-continue", "100-Continue", "miracles", "\u00ff"])
async def test_whatever_is_expected_the_answer_comes(server: Server, value: str) -> None:
    """A body is asked for when the client waits for that; what else is expected does no harm."""
    alice = await server.user("alice")
    body = b'{"message": "as expected"}'
    lines = ["POST /rooms/1/messages HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"Authorization: Bearer {alice.token}", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {JSON}", f"Expect: {value}", "", ""]
    answer = await exchange(server, "\r\n".join(lines).encode() + body)
    continues = answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 ")
    assert continues if "100" in value else answer.startswith(b"HTTP/1.1 201 "), answer


CANARY = "canary-in-the-header"
MALFORMED = [
    b"\r\n\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: " + CANARY.encode() + b"\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + CANARY.encode() * 1000 + b"\r\n\r\n",
    b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
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
]


@pytest.mark.parametrize("data", MALFORMED)
async def test_what_is_no_http_gets_a_short_answer(server: Server, data: bytes) -> None:
    """Bytes that are no request are refused briefly, without a header's value in the log."""
    before = len(server.process.stderr)
    url = URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(15):
        try:
            answer = await reader.read()
        except ConnectionResetError:
            answer = b""
    writer.close()
    if answer:
        assert 400 <= int(answer.split()[1]) < 500 or answer.startswith(b"HTTP/1.1 200"), answer
        assert len(answer) < 3000 or b" 200 " in answer[:20]
    assert CANARY not in server.process.stderr[before:]
    (await server.get("/healthz")).ok()


@pytest.mark.parametrize(
    "path", ["/nowhere", "/rooms/1/nowhere", "/users/me/x", "/%00", "/%FF", "/..%2F..%2Fetc", "//"]
)
async def test_an_unknown_path_is_404_as_json(server: Server, path: str) -> None:
    """A path that is not there is 404 in the shape of every error, logged in or not."""
    alice = await server.user("alice")
    (await alice.get(path)).refused(404, "not_found")
    (await server.get(path)).refused(404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/auth/register", {"POST"}),
        ("PUT", "/auth/token", {"POST"}),
        ("POST", "/users", {"GET"}),
        ("PATCH", "/users/me", {"GET", "DELETE"}),
        ("DELETE", "/rooms", {"GET", "POST"}),
        ("POST", "/rooms/1", {"GET", "PATCH", "DELETE"}),
        ("POST", "/rooms/1/members/alice", {"PUT", "DELETE"}),
        ("PUT", "/rooms/1/messages", {"GET", "POST"}),
        ("PUT", "/rooms/1/messages/1", {"PATCH", "DELETE"}),
        ("POST", "/rooms/1/events", {"GET"}),
        ("GET", "/rooms/1/read", {"PUT"}),
        ("POST", "/search", {"GET"}),
        ("POST", "/healthz", {"GET"}),
        ("POST", "/", {"GET"}),
        ("POST", "/websockets/chat/1", {"GET"}),
        ("TRACE", "/rooms", {"GET", "POST"}),
    ],
)
async def test_a_wrong_method_is_405_with_allow(
    server: Server, method: str, path: str, allowed: set[str]
) -> None:
    """A method that a path does not have is 405, and Allow names those it has."""
    alice = await server.user("alice")
    answer = await alice.request(method, path)
    answer.refused(405, "method_not_allowed")
    named = {each.strip() for each in answer.headers["Allow"].split(",")}
    assert allowed <= named <= allowed | {"HEAD", "OPTIONS"}


QUERIES = [
    *("after=%00", "after=%FF", "after=%ED%A0%80", "prefix=%00", "prefix=%FF", "limit=%FF"),
    *(
        "a=%00",
        "%00=1",
        "%",
        "%zz",
        "=",
        "&&",
        "after",
        "limit=1&limit=2",
        "epoch=%00",
        "epoch=%FF",
    ),
    *(
        "q=%00&limit=1",
        "q=x&room_id=%00",
        "q=x&room_id=",
        "last=%00",
        "token=%00",
        "x=" + "y" * 6000,
    ),
]


@pytest.mark.parametrize("query", QUERIES)
async def test_a_strange_query_does_no_harm(server: Server, query: str) -> None:
    """A query that makes no sense is ignored or refused on every path."""
    alice = await server.user("alice")
    room = await alice.room()
    for _method, path, _body in [*PATHS, ("GET", "/users", None), ("GET", "/search", None)]:
        path = path.format(room=room, name=alice.username).split("?")[0]  # noqa: PLW2901
        answer = await alice.get(f"{path}?{query}")
        assert answer.status in {200, 400, 404, 405, 410}, answer
    answer = await alice.get(f"/websockets/chat/{room}?{query}", headers=UPGRADE)
    assert answer.status in {101, 400}


NOW = int(time.time())


@pytest.mark.parametrize(
    "forged",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "NONE"},
        {"alg": "HS384"},
        {"alg": "HS512"},
        {"alg": "RS256"},
        {"alg": "ES256"},
        {"alg": ""},
        {"alg": "HS256", "key": "another key that is longer than thirty-two bytes"},
        {"alg": "HS256", "key": ""},
        {"alg": "HS256", "key": SECRET[:-1]},
        {"alg": "HS256", "key": SECRET + "\n"},
        {"alg": "HS256", "crit": ["exp"]},
        {"exp": NOW - 10**6},
        {"exp": 0},
        {"exp": -1},
        {"exp": None},
        {"exp": "tomorrow"},
        {"exp": []},
        {"exp": float("nan")},
        {"exp": float("inf")},
        {"iat": None},
        {"nbf": NOW + 10**6},
        {"sub": None},
        {"sub": ""},
        {"sub": "no-such-user"},
        {"sub": 5},
        {"sub": 10**400},
        {"sub": ["alice"]},
        {"sub": "a\0b"},
        {"sub": "\ud800"},
        {"sub": "%"},
        {"sub": "' OR 1=1 --"},
    ],
)
async def test_a_forged_token_is_401(server: Server, forged: dict[str, Any]) -> None:
    """However a token is forged, it is 401 over HTTP and closes a socket with 4401."""
    alice = await server.user("alice")
    content = claims(alice.token)
    signing = {k: v for k, v in forged.items() if k in {"alg", "key", "crit"}}
    content |= {k: v for k, v in forged.items() if k not in signing}
    content = {k: v for k, v in content.items() if forged.get(k, "") is not None}
    token = forge(content, **signing)
    (await server.get("/users/me", token=token)).refused(401, "unauthorized")
    (await server.get("/websockets/chat/1", token=token, headers=UPGRADE)).refused(401)
    async with server.chat("1") as ws:
        await ws.send({"type": "auth", "token": token})
        assert await ws.closed() == 4401


async def test_the_forger_knows_how_to_make_a_good_one(server: Server) -> None:
    """The same forging with nothing changed logs in: the tests above refuse what they name."""
    alice = await server.user("alice")
    token = forge(claims(alice.token))
    assert (await server.get("/users/me", token=token)).ok()["username"] == alice.username


async def test_every_claim_of_a_token_counts(server: Server) -> None:
    """A token without one of its claims, or with one of another kind, is 401."""
    alice = await server.user("alice")
    content = claims(alice.token)
    assert {"exp", "iat", "sub"} < content.keys()
    (version,) = content.keys() - {"exp", "iat", "sub"}
    forgeries = [{k: v for k, v in content.items() if k != gone} for gone in content]
    kinds: list[Any] = [None, "", "x", -1, content[version] + 1, 1.5, [], {}, 10**400]
    forgeries += [content | {version: value} for value in kinds]
    for forgery in forgeries:
        (await server.get("/users/me", token=forge(forgery))).refused(401, "unauthorized")


@pytest.mark.parametrize(
    "damage",
    [
        lambda token: token[:-1],
        lambda token: token + "x",
        lambda token: token + ".x",
        lambda token: token.rsplit(".", 1)[0],
        lambda token: token.rsplit(".", 1)[0] + ".",
        lambda token: "." + token,
        lambda token: token.replace(".", ".."),
        lambda token: token.split(".")[1],
        lambda token: token.swapcase(),
        lambda token: token[::-1],
        lambda _: "..",
        lambda _: "a.b.c",
        lambda _: part("x").decode() + ".x.x",
        lambda _: "é.é.é",
        lambda _: "x" * 7000,
        lambda _: forge([]),
        lambda _: forge("alice"),
        lambda _: forge(None),
        lambda _: forge(b"\xff\xfe"),
        lambda _: forge(b"[" * 3000),
        lambda _: forge(b'{"sub":' + b"9" * 5000 + b"}"),
    ],
)
async def test_a_damaged_token_is_401(server: Server, damage: Any) -> None:
    """What is no whole token is 401, over HTTP and by first frame."""
    alice = await server.user("alice")
    token = damage(alice.token)
    headers = {"Authorization": f"Bearer {token}"}
    (await server.get("/users/me", headers=headers)).refused(401, "unauthorized")
    async with server.chat("1") as ws:
        await ws.send({"type": "auth", "token": token})
        assert await ws.closed() == 4401


async def test_a_token_of_one_user_is_not_anothers_after_a_name_is_reused(server: Server) -> None:
    """The token of a deleted account is worth nothing, whoever registers next."""
    alice = await server.user("alice", fresh=True)
    (await alice.delete("/users/me", json={"password": alice.password})).ok(204)
    await server.user("bob", fresh=True)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    async with server.chat("1") as ws:
        await ws.send({"type": "auth", "token": alice.token})
        assert await ws.closed() == 4401


async def test_errors_never_repeat_what_is_secret(server: Server) -> None:
    """Passwords, tokens and texts that were refused are in no answer and no log."""
    alice = await server.user("alice")
    secret = unique("secret")
    before = len(server.process.stderr)
    answers = [
        await server.login(alice.username, secret),
        await server.register(unique("x"), secret[:1] + "\0" + secret),
        await server.get("/users/me", token=secret),
        await alice.post("/rooms/1/messages", json={"message": [secret]}),
        await alice.post("/rooms/1/messages", data=secret, headers={"Content-Type": JSON}),
        await alice.get(f"/rooms/1/events?token={secret}&after=x"),
        await alice.get(f"/search?q={secret}&limit=x"),
    ]
    for answer in answers:
        answer.refused(answer.status)
        assert secret not in answer.body.decode()
    assert secret not in server.process.stderr[before:]
