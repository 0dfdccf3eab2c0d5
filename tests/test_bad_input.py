"""Bad input: a clear error, and never a 5xx, a traceback or a lost socket (promise 7).

That nothing answers 500 is checked by the helper behind every request, and that nothing is logged
as a fault by the fixture behind every server. Here are the requests that try hardest.
"""

import base64
import gzip
import hashlib
import hmac
import json
import time
from collections.abc import Callable

import pytest

from tests.helpers import Room, Server
from tests.sockets import UPGRADE, Socket, Wire
from tests.test_rooms import PATHS
from tests.words import KEY, Event, is_refusal

JSON = "application/json"
GOOD = b'{"message":"x","role":"member","name":"x","seq":1,"room_id":"x-1"}'

# Bodies that no operation takes, sent as JSON.
BODIES = [
    *(b"{", b"}", b"[]", b"null", b"5", b'"message"', b"{'message': 'x'}", GOOD + b" {}"),
    *(GOOD[:-1], GOOD[:-1] + b",}", b'{message:"x"}', b"\x00" * 100, b"message=x&role=member"),
    *(b'{"message":NaN,"role":NaN,"name":NaN,"seq":NaN}', b"[" * 60000, b'{"n":' * 10000),
    b'{"message":"\xff","role":"\xff","name":"\xff","seq":"\xff"}',
    b'{"message":"\xed\xa0\x80","role":"\\ud800","name":"\\ud800","seq":"x"}',
    b'\xef\xbb\xbf{"message":5,"role":5,"name":5,"seq":"x"}',
    *(GOOD.decode().encode(coding) for coding in ("utf-16", "utf-16-le", "utf-32")),
    b'{"message":' + b"[" * 30000 + b"]" * 30000 + b"}",
    b'{"message":' + b"9" * 5000 + b',"role":1,"name":1,"seq":' + b"9" * 5000 + b"}",
    b'{"message":1e999,"role":1e999,"name":1e999,"seq":-1e999}',
]
TAKES_JSON = [
    *(("POST", "/rooms"), ("PUT", "/rooms/{room}/members/{name}")),
    *(("POST", "/rooms/{room}/messages"), ("PATCH", "/rooms/{room}/messages/2")),
    *(("PUT", "/rooms/{room}/read"), ("POST", "/auth/register"), ("POST", "/auth/password")),
    *(("DELETE", "/users/me"), ("POST", "/auth/token")),
]


@pytest.mark.parametrize(("method", "path"), TAKES_JSON)
async def test_a_body_that_is_no_json_object_is_refused(
    chat: Server, method: str, path: str
) -> None:
    """Broken, deep, misencoded or enormous JSON is 400 on every path that takes any."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "untouched")
    url = path.format(room=room.room_id, name=alice.name)
    for body in BODIES:
        answer = await alice.ask(method, url, data=body, headers={"Content-Type": JSON})
        assert answer.status == 400, (body[:80], str(answer))
        answer.refused(400, "invalid_request" if path == "/auth/token" else "bad_request")
    assert (await room.story())[1:] == ["2 alice: untouched"]


KINDS = [
    *((415, kind) for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense")),
    *((415, kind) for kind in ("multipart/form-data; boundary=x", "application/octet-stream")),
    *(
        (201, kind)
        for kind in (JSON, f"{JSON}; charset=utf-8", 'Application/JSON; Charset="UTF-8"')
    ),
]


async def test_a_body_says_that_it_is_json(chat: Server) -> None:
    """A body that calls itself anything but JSON is 415; of charsets only UTF-8 is ever read."""
    alice = await chat.user("alice")
    room = await alice.room()
    path, body = f"{room.path}/messages", '{"message":"é"}'.encode()
    for status, kind in KINDS:
        answer = await alice.ask("POST", path, data=body, headers={"Content-Type": kind})
        assert answer.status == status, kind
        if status == 415:
            answer.refused(415, "unsupported_media_type")
    for charset in ("bogus", "utf-16", "latin-1", "rot13", "zlib", ""):
        headers = {"Content-Type": f"{JSON}; charset={charset}"}
        answer = await alice.ask("POST", path, data=body, headers=headers)
        assert answer.status in {201, 400, 415}, charset
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


async def test_an_unknown_path_is_missing_as_json(chat: Server) -> None:
    """A path that is not there is 404 in the shape of every error, logged in or not."""
    alice = await chat.user("alice")
    for path in ("/nowhere", "/rooms/1/events", "/users/me/x", "/%00", "/%FF", "/..%2Fetc", "//"):
        (await alice.get(path)).refused(404, "not_found")
        (await chat.ask("GET", path)).refused(404, "not_found")
    for path in ("/web/", "/web/..%2fchatserver.py", "/web/../chatserver.py", "/web/nothing.js"):
        answer = await chat.ask("GET", path)
        answer.refused(answer.status)
        assert answer.status in {403, 404}
        assert b"import" not in answer.body


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/auth/register", {"POST"}),
        ("POST", "/users", {"GET"}),
        ("PATCH", "/users/me", {"GET", "DELETE"}),
        ("DELETE", "/rooms", {"GET", "POST"}),
        ("PATCH", "/rooms/1", {"GET", "DELETE"}),
        ("POST", "/rooms/1/members/alice", {"PUT", "DELETE"}),
        ("PUT", "/rooms/1/messages", {"GET", "POST"}),
        ("PUT", "/rooms/1/messages/1", {"PATCH", "DELETE"}),
        ("GET", "/rooms/1/read", {"PUT"}),
        ("POST", "/", {"GET"}),
        ("POST", "/websockets/chat/1", {"GET"}),
        ("TRACE", "/rooms", {"GET", "POST"}),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    chat: Server, method: str, path: str, allowed: set[str]
) -> None:
    """A method that a path does not have is 405, and Allow names those it has."""
    alice = await chat.user("alice")
    answer = await alice.ask(method, path)
    answer.refused(405, "method_not_allowed")
    named = {each.strip() for each in answer.headers["Allow"].split(",")}
    assert allowed <= named <= allowed | {"HEAD", "OPTIONS"}


QUERIES = [
    *("after=%00", "after=%FF", "after=%ED%A0%80", "limit=%FF", "a=%00", "%00=1", "%", "%zz", "="),
    *(
        "&&",
        "after",
        "limit=1&limit=2",
        "epoch=%00",
        "epoch=%FF",
        "q=%00&limit=1",
        "q=x&room_id=%00",
    ),
    *("q=x&room_id=", "token=%00", "x=" + "y" * 6000, "username=me&password=x", "room_id=1"),
]


async def test_a_strange_query_does_no_harm(chat: Server) -> None:
    """A query that makes no sense is ignored or refused on every path, and changes no meaning."""
    alice = await chat.user("alice")
    room = await alice.room()
    paths = [path for method, path, _ in PATHS if method == "GET"]
    for path in (*paths, "/users", "/users/me", "/search"):
        url = path.format(room=room.room_id).partition("?")[0]
        for query in QUERIES:
            answer = await alice.ask("GET", f"{url}?{query}", headers=UPGRADE)
            assert answer.status in {101, 200, 400, 404, 410}, answer
            if url == "/users/me":
                assert answer.ok()["username"] == alice.name
            elif answer.status == 200 and url == room.path:
                assert answer.json["room_id"] == room.room_id


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


def part(value: object) -> bytes:
    """Return a part of a JWT: JSON as unpadded, URL-safe base64."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def claims(token: str) -> Event:
    """Return what a JWT says, without asking whether it is true."""
    return dict(json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "==")))


def forge(content: object, key: str = KEY, alg: str = "HS256", head: object = None) -> str:
    """Return a JWT signed by hand, so that a library's own scruples do not help the server."""
    signed = part(head or {"typ": "JWT", "alg": alg}) + b"." + part(content)
    digest = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(alg, hashlib.sha256)
    signature = b"" if alg == "none" else hmac.digest(key.encode(), signed, digest)
    return (signed + b"." + part(signature)).decode()


NOW = int(time.time())
CLAIMS: list[Event] = [
    *({"exp": exp} for exp in (NOW - 9, 0, -1, None, "tomorrow", float("nan"))),
    *({"sub": sub} for sub in (None, "", "nobody", 5, 10**400, "a\0b", "\ud800", "%")),
    *({"ver": ver} for ver in (None, "", "x", -1, 1, 1.5, 10**400)),
    *({"nbf": NOW + 10**6}, {"sub": "' OR 1=1 --"}, {"sub": ["alice"]}, {"exp": []}, {"ver": {}}),
]
NO_CLAIMS: list[object] = [[], "alice", None, b"\xff", b"[" * 3000]
Forging = Callable[[str], str]
FORGINGS: list[Forging] = [
    *(
        lambda t, alg=alg: forge(claims(t), alg=alg)
        for alg in ("none", "None", "HS384", "RS256", "")
    ),
    *(lambda t, key=key: forge(claims(t), key) for key in ("", KEY[:-1], KEY + "\n", "x" * 64)),
    lambda t: forge(claims(t), head={"alg": "HS256", "crit": ["exp"]}),
    lambda t: forge(claims(t), head=b"[" * 3000),
    lambda t: forge(claims(t), head=b'{"alg":' + b"[" * 3000),
    *(
        lambda t, claim=claim: forge({k: v for k, v in claims(t).items() if k != claim})
        for claim in ("exp", "iat", "sub", "ver")
    ),
    *(lambda t, change=change: forge(claims(t) | change) for change in CLAIMS),
    *(lambda _, body=body: forge(body) for body in NO_CLAIMS),
    lambda _: forge(b'{"sub":' + b"9" * 5000 + b"}"),
    lambda t: t[:-1],
    lambda t: t + "x",
    lambda t: t + ".x",
    lambda t: t.rsplit(".", 1)[0] + ".",
    lambda t: "." + t,
    lambda t: t.split(".")[1],
    lambda t: t.swapcase(),
    *(lambda _, text=text: text for text in ("..", "a.b.c", "é.é.é", "x" * 7000)),
]


async def test_a_forged_token_logs_nobody_in(chat: Server) -> None:
    """However a token is forged or damaged, it is 401 over HTTP and closes a socket with 4401."""
    alice = await chat.user("alice")
    (await chat.ask("GET", "/users/me", forge(claims(alice.token)))).ok()  # the forger is able
    assert claims(alice.token).keys() == {"sub", "ver", "iat", "exp"}
    for number, forging in enumerate(FORGINGS):
        token = forging(alice.token)
        answer = await chat.ask("GET", "/users/me", token)
        assert answer.status == 401, (number, token[:300])
        answer.refused(401, "unauthorized")
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.send(type="auth", token=token)
        assert await socket.is_closed() == 4401, (number, token[:300])


async def test_a_client_that_vanishes_at_any_step_disturbs_nobody(chat: Server) -> None:
    """Whoever is gone in the middle of a request, a log-in or a frame leaves nothing behind."""
    alice, bob = await chat.talk("alice", "bob")
    user, room = alice.user, alice.room
    for _ in range(5):
        async with Wire(chat) as wire:
            wire.request(user, f"{room.path}/messages", b'{"message":"maybe"}')
        silent = await Socket(user, room).connect(header=False)
        silent.drop()
        waiting = await Socket(user, room, after=0).connect(header=False)
        await waiting.send(type="auth", token=user.token)
        waiting.drop()
        talking = await user.enter(room)
        await talking.send(message="perhaps")
        await talking.send(type="typing")
        talking.drop()
    await alice.say("still here")
    await bob.hears("still here")
