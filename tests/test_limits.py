"""Limits: how much, how often, how many at once, and what every answer carries."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

import chatserver
from tests.conftest import SCRYPT, Start
from tests.helpers import Room, Server
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import PASSWORD, Answer, Event, unique, until

JSON = {"Content-Type": "application/json"}


def from_(address: str) -> dict[str, Any]:
    """Return the options of a request that a proxy passes on from an address."""
    return {"headers": {"X-Forwarded-For": address}}


# --- Messages


async def test_who_is_above_the_rate_waits_as_long_as_told(start: Start) -> None:
    """Twice the rate is taken at once, the next is refused, and after the time it names one is."""
    chat = await start(messages_per_second=2)
    alice, bob = await chat.users("alice", "bob")
    lobby = Room(alice, "1")
    socket = await bob.enter(lobby)
    for number in range(4):
        await alice.post_in(lobby, f"{number}")
    for number in range(3):  # coming in was a change, too
        await socket.say(f"{number}")
    answer = await alice.post("/rooms/1/messages", {"message": "too much"})
    error = answer.refused(429, "rate_limited")
    assert error["retry_after"] == int(answer.headers["Retry-After"]) == 1
    assert re.search(r"\b1 s", error["detail"])
    error = await socket.ask("rate_limited", message="late", client_id="late")
    assert (error["client_id"], error["retry_after"]) == ("late", 1)
    await asyncio.sleep(1)
    await alice.post_in(lobby, "in time")
    await socket.say("late", client_id="late")


CHANGES: list[tuple[str, str, Event | None]] = [
    ("POST", "/rooms/1/messages", {"message": "x"}),
    ("PATCH", "/rooms/1/messages/2", {"message": "x"}),
    ("DELETE", "/rooms/1/messages/2", None),
    ("POST", "/rooms", {"name": "x"}),
    ("POST", "/rooms", {"kind": "direct", "username": "{bob}"}),
    ("DELETE", "/rooms/1", None),
    ("PUT", "/rooms/1/members/{bob}", {"role": "member"}),
    ("DELETE", "/rooms/1/members/{bob}", None),
]


async def test_all_changes_fill_one_bucket_of_ones_own(start: Start) -> None:
    """Posts, frames, edits and changes of rooms and members count together, for each user alone."""
    chat = await start(messages_per_second=1)
    alice, bob = await chat.users("alice", "bob")
    socket = await alice.enter(Room(alice, "1"))
    await socket.say("by socket")
    await alice.post_in(Room(alice, "1"), "by post")
    for method, path, body in CHANGES:
        text = json.dumps(body).replace("{bob}", bob.name)
        answer = await alice.ask(method, path.replace("{bob}", bob.name), json.loads(text))
        answer.refused(429, "rate_limited")
    await socket.ask("rate_limited", message="x")
    await socket.ask("rate_limited", type="edit", target=2, message="x")
    await socket.ask("rate_limited", type="delete", target=2)
    await bob.post_in(Room(bob, "1"), "nobody else is slowed down")
    assert len(await Room(alice, "1").log()) == 5


@pytest.mark.parametrize("kind", ["ping", "typing", "read", "nonsense"])
async def test_a_flood_of_other_frames_closes_its_own_socket(chat: Server, kind: str) -> None:
    """Who floods the server with pings or frames that are no messages is closed 4429."""
    alice, bob = await chat.talk("alice", "bob")
    closing = asyncio.create_task(alice.is_closed())
    with suppress(aiohttp.ClientConnectionResetError):
        for _ in range(400):
            await (alice.ws.ping() if kind == "ping" else alice.send(type=kind, seq=1))
            await asyncio.sleep(0)
    assert await closing == 4429
    await bob.say("I am still here")
    assert len(bob.heard(type="typing")) <= 200


async def test_read_marks_over_http_have_a_rate(chat: Server) -> None:
    """Each mark that moves is a transaction, so they cannot come without end."""
    alice, _ = await chat.talk("alice", "bob")
    await alice.say_all(f"message {number}" for number in range(150))
    path = f"{alice.room.path}/read"
    bob = await chat.user("bob")
    await alice.room.admit(bob)
    answers = await asyncio.gather(*(bob.put(path, {"seq": seq}) for seq in range(1, 151)))
    assert {answer.status for answer in answers} == {204, 429}


# --- Log-ins and registrations


@pytest.mark.parametrize("path", ["/auth/token", "/auth/password", "/users/me"])
async def test_failed_logins_count_for_the_address(start: Start, path: str) -> None:
    """Three wrong passwords are refused, then the address is 429; from elsewhere all works."""
    chat = await start(logins_per_minute=3, proxies=1)
    alice = await chat.user("alice")
    near, far = from_("198.51.100.1"), from_("198.51.100.2")

    async def attempt(where: Any, password: str) -> Answer:
        """Tell the server a password."""
        if path == "/auth/token":
            return await chat.login(alice.name, password, **where)
        body = {"password": password, "new_password": "4321"}
        method = "POST" if path == "/auth/password" else "DELETE"
        return await alice.ask(method, path, body, **where)

    for _ in range(5):  # what succeeds does not count
        (await chat.login(alice.name, **near)).ok()
    for _ in range(3):
        (await attempt(near, "wrong")).refused(400 if path == "/auth/token" else 403)
    error = (await attempt(near, "wrong")).refused(429, "rate_limited")
    assert 15 <= error["retry_after"] <= 20
    (await chat.login(alice.name, **near)).refused(429, "rate_limited")
    (await chat.login(unique("nobody"), "wrong", **near)).refused(429, "rate_limited")
    (await alice.get("/users/me")).ok()
    (await chat.login(alice.name, **far)).ok()


async def test_guesses_side_by_side_are_no_way_around(start: Start) -> None:
    """Many guesses at once count no less than one after another."""
    chat = await start(logins_per_minute=3)
    alice = await chat.user("alice")
    guesses = (chat.login(alice.name, f"wrong {number}") for number in range(20))
    statuses = [answer.status for answer in await asyncio.gather(*guesses)]
    assert sorted(statuses) == [400] * 3 + [429] * 17


async def test_registrations_count_for_the_address(start: Start) -> None:
    """The third registration within an hour from one address is 429, and elsewhere it is not."""
    chat = await start(registrations_per_hour=2, proxies=1)
    answers = [await chat.register(unique("many"), **from_("198.51.100.1")) for _ in range(3)]
    assert [answer.status for answer in answers] == [201, 201, 429]
    assert 1700 <= answers[2].refused(429, "rate_limited")["retry_after"] <= 1800
    (await chat.register(unique("other"), **from_("198.51.100.2"))).ok(201)


async def test_while_a_password_is_hashed_nobody_else_waits(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message passes while a log-in is checked; of too many log-ins some are 503 at once."""
    chat = await start()
    (alice,) = await chat.talk("alice")
    name = unique("slow")
    monkeypatch.setattr(chatserver, "SCRYPT", SCRYPT)
    (await chat.register(name)).ok(201)
    login = asyncio.create_task(chat.login(name))
    await until(lambda: chat.chat.hashing, "the hash to begin")
    await alice.say("quick")
    assert not login.done()
    (await login).ok()
    monkeypatch.setattr(chatserver, "SCRYPT", "scrypt$8192$8$2")
    body = {"username": unique("many"), "password": PASSWORD}
    posts = (chat.ask("POST", "/auth/token", data=body) for _ in range(60))
    answers = await asyncio.gather(*posts)
    assert {answer.status for answer in answers} == {400, 503}
    assert sum(answer.status == 400 for answer in answers) >= 20
    for answer in answers:
        answer.refused(answer.status, "unavailable" if answer.status == 503 else "invalid_grant")


# Pairs of X-Forwarded-For, the number of proxies, and whether they are the same address.
ADDRESSES = [
    (0, "198.51.100.1", "198.51.100.2", True),
    (1, "198.51.100.1", "198.51.100.2", False),
    (1, "6.6.6.6, 198.51.100.1", "7.7.7.7, 198.51.100.1", True),
    (1, "198.51.100.1, 6.6.6.6", "198.51.100.1, 7.7.7.7", False),
    (1, "198.51.100.1:50001", "198.51.100.1:50002", True),
    (1, "198.51.100.1:50001", "198.51.100.1", True),
    (1, "2001:db8::1", "2001:db8::2:3", True),
    (1, "2001:db8::1", "2001:db8:0:1::1", False),
    (1, "[2001:db8::1]:443", "2001:db8::2", True),
    (1, "::ffff:198.51.100.1", "198.51.100.1", True),
    (1, "::ffff:198.51.100.1", "::ffff:198.51.100.2", False),
    (2, "6.6.6.6, 198.51.100.1, 10.0.0.1", "7.7.7.7, 198.51.100.1, 10.0.0.2", True),
    (2, "198.51.100.1, 10.0.0.1", "198.51.100.2, 10.0.0.1", False),
    (2, "198.51.100.1", "198.51.100.2", True),
]


@pytest.mark.parametrize(("proxies", "one", "other", "same"), ADDRESSES)
async def test_whose_address_counts(
    start: Start, proxies: int, one: str, other: str, *, same: bool
) -> None:
    """As many proxies of one's own stand in front as are set; what clients write counts nothing."""
    chat = await start(proxies=proxies, registrations_per_hour=1)
    (await chat.register(unique("first"), **from_(one))).ok(201)
    second = await chat.register(unique("second"), **from_(other))
    assert second.status == (429 if same else 201)


async def test_the_last_line_of_a_doubled_header_counts(start: Start) -> None:
    """A proxy may add a line of its own instead of adding to the client's."""
    chat = await start(proxies=1, registrations_per_hour=1)
    for number, status in enumerate((201, 429)):
        lines = [("X-Forwarded-For", f"6.6.6.{number}"), ("X-Forwarded-For", "198.51.100.1")]
        form = {"username": unique("x"), "email": f"{unique('x')}@x.org", "password": PASSWORD}
        async with chat.client.session.post(
            chat.url("/auth/register"), json=form, headers=lines
        ) as answer:
            assert answer.status == status


@pytest.mark.parametrize(
    "value", ["", ",", "unknown", "_hidden", "1.2.3", "::1%eth0", "é", ":", "x" * 900]
)
async def test_a_strange_forwarded_address_does_no_harm(start: Start, value: str) -> None:
    """Whatever X-Forwarded-For says, the answer is the usual one."""
    chat = await start(proxies=1, registrations_per_hour=1, logins_per_minute=5)
    (await chat.register(unique("x"), **from_(value))).ok(201)
    (await chat.login("nobody", **from_(value))).refused(400, "invalid_grant")


# --- Sockets


async def test_a_user_has_so_many_sockets(start: Start) -> None:
    """The third of two sockets is 429 before the upgrade, or 4429 after it, until one has gone."""
    chat = await start(sockets_per_user=2)
    alice, bob = await chat.users("alice", "bob")
    lobby = Room(alice, "1")
    first, _ = [await alice.enter(lobby) for _ in range(2)]
    (await alice.ask("GET", "/websockets/chat/1", headers=UPGRADE)).refused(429, "rate_limited")
    third = await Socket(alice, lobby).connect(header=False)
    await third.send(type="auth", token=alice.token)
    assert await third.is_closed() == 4429
    await bob.enter(lobby)
    await first.leave()
    await until(lambda: len(chat.hub.users[alice.name]) == 1, "the first socket's end")
    await alice.enter(lobby)


async def test_sockets_opened_at_once_count_no_less(start: Start) -> None:
    """Of twelve sockets opened at once two get in."""
    chat = await start(sockets_per_user=2)
    alice = await chat.user("alice")

    async def attempt() -> bool:
        """Try to come in by a first frame."""
        socket = await Socket(alice, Room(alice, "1")).connect(header=False)
        await socket.send(type="auth", token=alice.token)
        try:
            return bool((await socket.next())["type"] == "hello")
        except ConnectionResetError:
            return False

    assert sum(await asyncio.gather(*(attempt() for _ in range(12)))) == 2


async def test_a_full_server_takes_no_more_sockets(start: Start) -> None:
    """When all sockets are taken, by whom ever, the next is 503, and the rest works on."""
    chat = await start(sockets=3)
    alice = await chat.user("alice")
    lobby = Room(alice, "1")
    inside = await alice.enter(lobby)
    unknown = [await Socket(alice, lobby).connect(header=False) for _ in range(2)]
    (await alice.ask("GET", "/websockets/chat/1", headers=UPGRADE)).refused(503, "unavailable")
    (await chat.ask("GET", "/websockets/chat/1", headers=UPGRADE)).refused(503, "unavailable")
    await inside.say("in here all is well")
    await unknown[0].leave()
    await until(lambda: len(chat.hub.sockets) == 2, "the end of one")
    await alice.enter(lobby)


# --- Sizes


def hi(size: int) -> bytes:
    """Return the JSON of a message in so many bytes."""
    return b'{"message":"hi","more":"' + b"x" * (size - 26) + b'"}'


@pytest.mark.parametrize("pieces", [1, 5])
async def test_a_frame_has_at_most_64_kib(chat: Server, pieces: int) -> None:
    """A frame of 64 KiB is answered, one byte more closes 1009, in one piece or in many."""
    alice, bob = await chat.talk("alice", "bob")
    for size in (2**16, 2**16 + 1):
        async with Wire(chat) as wire:
            await wire.upgrade(alice.user, alice.room)
            step = size // pieces
            for start in range(0, size, step):
                last = 0x80 if start + step >= size else 0
                wire.frame(hi(size)[start : start + step], 0 if start else 1, last)
            if size == 2**16:
                await bob.hears("hi")
            else:
                assert await wire.close_code() == 1009
    assert await alice.room.texts() == ["hi"]


async def test_a_body_has_at_most_64_kib(chat: Server) -> None:
    """A body of 64 KiB is read, one byte more is 413, with a length or in chunks."""
    alice = await chat.user("alice")
    room = await alice.room()
    for size, status in ((2**16, 201), (2**16 + 1, 413)):
        text = hi(size)

        async def chunks(text: bytes = text) -> AsyncIterator[bytes]:
            """Send without telling how much is to come."""
            for at in range(0, len(text), 9000):
                yield text[at : at + 9000]

        for data in (text, chunks()):
            path = f"{room.path}/messages"
            answer = await alice.ask("POST", path, data=data, headers=JSON)
            assert answer.status == status
            if status == 413:
                answer.refused(413, "too_large")


async def test_characters_count_and_not_bytes(start: Start) -> None:
    """`message_length` counts characters; one too many is refused in posts, frames and edits."""
    chat = await start(message_length=5)
    alice = await chat.user("alice")
    lobby = Room(alice, "1")
    socket = await alice.enter(lobby)
    seq = (await socket.say("😀" * 5))["seq"]
    (await alice.post("/rooms/1/messages", {"message": "x" * 6})).refused(400, "bad_request")
    (await alice.patch(f"/rooms/1/messages/{seq}", {"message": "x" * 6})).refused(400)
    await socket.ask("bad_request", message="x" * 6)
    await socket.ask("bad_request", type="edit", target=seq, message="x" * 6)
    await alice.post_in(lobby, "x" * 5)


async def test_a_body_that_does_not_come_is_not_waited_for(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not complete a body in time is answered or cut off, and holds up nobody."""
    assert chatserver.BODY_WAIT == 10
    monkeypatch.setattr(chatserver, "BODY_WAIT", 0.3)
    async with Wire(chat) as wire:
        head = "POST /auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nusername="
        wire.send(head.encode())
        assert (await wire.head()).split()[1] in {b"408", b"400"}


# --- What every answer carries

ORIGINS: dict[str, Any] = {"allowed_origins": "https://one.example,  https://two.example:8443"}


@pytest.mark.parametrize("origin", ["https://one.example", "https://two.example:8443"])
async def test_pages_at_allowed_origins_may_ask(start: Start, origin: str) -> None:
    """Preflights and answers, refusals included, name the allowed origin and what it may send."""
    chat = await start(**ORIGINS)
    asks = {"Origin": origin, "Access-Control-Request-Method": "PATCH"}
    preflight = await chat.ask("OPTIONS", "/rooms/1/messages/1", headers=asks)
    assert preflight.status in {200, 204}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        assert method in preflight.headers["Access-Control-Allow-Methods"]
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
    assert "authorization" in allowed
    assert "content-type" in allowed
    for path in ("/healthz", "/users/me", "/nowhere"):
        answer = await chat.ask("GET", path, headers={"Origin": origin})
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize(
    "origin",
    [
        *("https://evil.example", "http://one.example", "https://one.example.evil", "null", ""),
        *("https://one.example:444", "https://two.example", "https://one.exampl", "*"),
    ],
)
async def test_pages_from_elsewhere_may_not(start: Start, origin: str) -> None:
    """What comes from elsewhere is answered without any CORS header."""
    nothing: dict[str, Any] = {}
    for settings in (ORIGINS, nothing):
        chat = await start(**settings)
        for method in ("GET", "OPTIONS"):
            asks = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            answer = await chat.ask(method, "/users/me", headers=asks)
            assert not [name for name in answer.headers if name.startswith("Access-Control")]


async def test_every_answer_carries_the_usual_security_headers(chat: Server) -> None:
    """Pages, answers and refusals say nosniff, no referrer, no frames, and have a strict policy."""
    alice = await chat.user("alice")
    paths = ("/", "/docs", "/redoc", "/openapi.json", "/healthz", "/users/me", "/nowhere", "/web/x")
    for path in paths:
        headers = (await alice.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        policy = dict(
            part.strip().partition(" ")[::2]
            for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] in {"'none'", "'self'"}
        assert policy["frame-ancestors"] == "'none'"
        scripts = policy.get("script-src", policy["default-src"])
        assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "https:"} & set(scripts.split())
        assert headers["Server"] == "chatserver"
        if path.startswith("/users"):
            assert headers["Cache-Control"] == "no-store"


async def test_what_is_secret_is_in_no_answer_and_no_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Passwords, tokens and texts that were refused are repeated nowhere."""
    caplog.set_level("DEBUG")
    chat = await start()
    (alice,) = await chat.talk("alice")
    secret = unique("secret")
    answers = [
        await chat.login(alice.name, secret),
        await chat.register(unique("x"), f"{secret}\0{secret}"),
        await chat.ask("GET", "/users/me", secret),
        await alice.user.post("/rooms/1/messages", {"message": [secret]}),
        await alice.user.ask("POST", "/rooms/1/messages", data=secret, headers=JSON),
        await alice.user.get(f"/rooms/1/messages?token={secret}&after=x"),
        await alice.user.get(f"/search?q={secret}&limit=x"),
    ]
    for answer in answers:
        answer.refused(answer.status)
        assert secret not in answer.body.decode()
    error = await alice.ask("bad_request", type="auth", token=secret)
    assert secret not in str(error)
    await alice.say(secret)
    await alice.ask("bad_request", message=[secret])
    bad = await Socket(alice.user, alice.room).connect(header=False)
    await bad.send(type="auth", token=secret)
    await bad.is_closed()
    assert secret not in bad.reason
    ours = [record for record in caplog.records if record.name.startswith("chatserver")]
    assert secret not in str([record.getMessage() for record in ours])
