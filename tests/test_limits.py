"""Limits: how much, how often, how many at once, and what every answer carries."""

import asyncio
import re
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from tests.conftest import Start
from tests.document import OPERATIONS
from tests.helpers import Room, Server
from tests.sockets import UPGRADE, Socket, Wire
from tests.words import PASSWORD, unique, until

JSON = {"Content-Type": "application/json"}
Log = pytest.LogCaptureFixture


async def test_who_is_above_the_rate_waits_as_long_as_told(start: Start) -> None:
    """Twice the rate is taken at once; then all changes wait, of this user alone, until told."""
    chat = await start(messages_per_second=1)
    alice, bob = await chat.users("alice", "bob")
    lobby = Room(alice, "1")
    socket = await alice.enter(lobby)
    await socket.say("by socket")
    await alice.post_in(lobby, "by post")
    body = {"name": "x", "message": "too much", "role": "member"}
    work = [
        alice.ask(method, path.format(room_id="1", username=bob.name, target="2"), body)
        for method, path in OPERATIONS
        if method != "GET" and "/rooms" in path and "/read" not in path
    ]
    for answer in await asyncio.gather(*work):
        error = answer.refused(429, "rate_limited")
        assert error["retry_after"] == int(answer.headers["Retry-After"]) == 1
        assert re.search(r"\b1 s", error["detail"])
    error = await socket.ask("rate_limited", message="late", client_id="late")
    assert (error["client_id"], error["retry_after"]) == ("late", 1)
    await bob.post_in(lobby, "nobody else is slowed down")
    await asyncio.sleep(1)
    await socket.say("late", client_id="late")
    assert await lobby.texts() == ["by socket", "by post", "nobody else is slowed down", "late"]


@pytest.mark.parametrize("kind", ["ping", "typing", "read", "nonsense"])
async def test_a_flood_of_other_frames_closes_its_own_socket(chat: Server, kind: str) -> None:
    """Who floods it with pings or what is no message is closed 4429, and 429 over HTTP."""
    alice, bob = await chat.talk("alice", "bob")
    closing = asyncio.create_task(alice.is_closed())
    with suppress(aiohttp.ClientConnectionResetError):
        for _ in range(400):
            await (alice.ws.ping() if kind == "ping" else alice.send(type=kind, seq=1))
            await asyncio.sleep(0)
    assert await closing == 4429
    await bob.say("I am still here")
    assert len(bob.heard(type="typing")) <= 200
    marks = [alice.user.put(f"{bob.room.path}/read", {"seq": 1}) for _ in range(60)]
    assert 429 in [answer.status for answer in await asyncio.gather(*marks)]


@pytest.mark.parametrize("path", ["/auth/token", "/auth/password", "/users/me"])
async def test_failed_logins_count_for_the_address(start: Start, path: str) -> None:
    """Of wrong passwords at once three are looked at; from elsewhere all works."""
    chat = await start(logins_per_minute=3, proxies=1)
    alice = await chat.user("alice")
    near: Any = {"headers": {"X-Forwarded-For": "198.51.100.1"}}
    for _ in range(5):  # what succeeds does not count
        (await chat.login(alice.name, **near)).ok()
    method = "DELETE" if path == "/users/me" else "POST"
    body = {"username": alice.name, "password": "wrong", "new_password": "4321"}
    guesses = [alice.ask(method, path, body, **near) for _ in range(20)]
    statuses = [answer.status for answer in await asyncio.gather(*guesses)]
    assert sorted(statuses) == [400 if path == "/auth/token" else 403] * 3 + [429] * 17
    error = (await chat.login(alice.name, **near)).refused(429, "rate_limited")
    assert 15 <= error["retry_after"] <= 20
    (await alice.get("/users/me")).ok()
    (await chat.login(alice.name, headers={"X-Forwarded-For": "198.51.100.2"})).ok()


# How many proxies, the headers of two requests, line by line, and whether they are one address.
ADDRESSES = [
    (0, ["198.51.100.1"], ["198.51.100.2"], True),
    (1, ["198.51.100.1"], ["198.51.100.2"], False),
    (1, ["6.6.6.6, 198.51.100.1"], ["7.7.7.7, 198.51.100.1"], True),
    (1, ["6.6.6.6", "198.51.100.1"], ["7.7.7.7", "198.51.100.1"], True),
    (1, ["198.51.100.1:50001"], ["198.51.100.1:50002"], True),
    (1, ["[2001:db8::1]:443"], ["2001:db8::2:3"], True),
    (1, ["2001:db8::1"], ["2001:db8:0:1::1"], False),
    (1, ["::ffff:198.51.100.1"], ["198.51.100.1"], True),
    (2, ["6.6.6.6, 198.51.100.1, 10.0.0.1"], ["198.51.100.1, 10.0.0.2"], True),
    (2, ["198.51.100.1"], ["198.51.100.2"], True),
    *((1, [odd], ["198.51.100.1"], False) for odd in ("", ":", "1.2.3", "é", "x" * 900)),
]


@pytest.mark.parametrize(("proxies", "one", "other", "same"), ADDRESSES)
async def test_registrations_count_for_the_address(
    start: Start, proxies: int, one: list[str], other: list[str], *, same: bool
) -> None:
    """As many proxies of one's own stand in front as are set; what clients write counts nothing."""
    chat = await start(proxies=proxies, registrations_per_hour=1)
    url = chat.url("/auth/register")
    for lines, status in ((one, 201), (other, 429 if same else 201)):
        form = {"username": unique("x"), "email": f"{unique('x')}@x.org", "password": PASSWORD}
        headers = [("X-Forwarded-For", line) for line in lines]
        async with chat.client.session.post(url, json=form, headers=headers) as answer:
            assert answer.status == status
            assert status == 201 or 3500 <= (await answer.json())["retry_after"] <= 3600


async def test_a_user_and_a_server_have_so_many_sockets(start: Start) -> None:
    """Of a user's twelve at once two get in, others are 429 or 4429; of all the 15th is 503."""
    chat = await start(sockets_per_user=2, sockets=14)
    alice, bob = await chat.users("alice", "bob")
    path, lobby = "/websockets/chat/1", Room(alice, "1")
    first = await alice.enter(lobby)
    others = [await Socket(alice, lobby).connect(header=False) for _ in range(11)]
    await asyncio.gather(*(socket.send(type="auth", token=alice.token) for socket in others))
    await until(lambda: len(chat.hub.sockets) == 2, "ten to be refused")
    (await alice.ask("GET", path, headers=UPGRADE)).refused(429, "rate_limited")
    late = await Socket(alice, lobby).connect(header=False)
    await late.send(type="auth", token=alice.token)
    assert await late.is_closed() == 4429
    await until(lambda: len(chat.hub.sockets) == 2, "its end")
    bobs = await bob.enter(lobby)
    unknown = [await Socket(bob, lobby).connect(header=False) for _ in range(11)]
    for token in (bob.token, ""):
        (await chat.ask("GET", path, token, headers=UPGRADE)).refused(503, "unavailable")
    await bobs.say("in here all is well")
    for socket in (first, unknown[0]):
        await socket.leave()
    await until(lambda: len(chat.hub.sockets) == 12, "the end of both")
    await alice.enter(lobby)


async def test_a_frame_a_body_and_a_text_have_a_size(start: Start) -> None:
    """64 KiB of a frame or a body are taken, and as many characters as are set, but no more."""
    chat = await start(message_length=5)
    alice, bob = await chat.talk("alice", "bob")
    path = f"{alice.room.path}/messages"
    fits = b'{"message":"hi","more":"' + b"x" * (2**16 - 26) + b'"}'
    for body, status in ((fits, 201), (fits + b" ", 413)):
        for chunked in (None, True):
            options: dict[str, Any] = {"data": body, "headers": JSON, "chunked": chunked}
            assert (await alice.user.ask("POST", path, **options)).status == status
        async with Wire(chat) as wire:
            await wire.upgrade(bob.user, bob.room)
            wire.frame(body)
            if status == 413:
                assert await wire.close_code() == 1009
            else:
                await bob.hears("hi", username=bob.name)
    await alice.say("😀" * 5)
    await alice.ask("bad_request", message="x" * 6)
    await alice.ask("bad_request", type="edit", target=3, message="x" * 6)
    assert await alice.room.texts() == ["hi"] * 3 + ["😀" * 5]


async def test_pages_at_allowed_origins_may_ask_and_no_others(start: Start) -> None:
    """Preflights and answers, refusals included, name an allowed origin and what it may send."""
    chat = await start(allowed_origins="https://one.example,  https://two.example:8443")
    work = [(204, "OPTIONS", "/rooms/1"), (200, "GET", "/healthz"), (404, "GET", "/nowhere")]
    for origin in ("https://one.example", "https://two.example:8443"):
        asks = {"Origin": origin, "Access-Control-Request-Method": "PATCH"}
        for status, method, path in work:
            answer = await chat.ask(method, path, headers=asks)
            assert answer.status == status and "Origin" in answer.headers["Vary"]
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            methods = answer.headers["Access-Control-Allow-Methods"].split(", ")
            assert {"GET", "POST", "PUT", "PATCH", "DELETE"} <= set(methods)
            headers = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
            assert {"authorization", "content-type"} <= set(headers)
    others = ["https://evil.example", "http://one.example", "https://one.example.evil", "null", "*"]
    for server in (chat, await start()):
        for origin in [*others, "https://one.example:444", "https://two.example", ""]:
            for method in ("GET", "OPTIONS"):
                asks = {"Origin": origin, "Access-Control-Request-Method": "GET"}
                answer = await server.ask(method, "/users/me", headers=asks)
                assert "access-control" not in str(answer.headers).lower()


async def test_every_answer_carries_the_usual_security_headers(chat: Server) -> None:
    """Pages, answers and refusals say nosniff, no referrer, no frames, and have a strict policy."""
    alice = await chat.user("alice")
    paths = ("/", "/docs", "/redoc", "/openapi.json", "/healthz", "/users/me", "/nowhere", "/web/x")
    for path in paths:
        headers = (await alice.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Server"] == "chatserver"
        rules = [rule.split() for rule in headers["Content-Security-Policy"].split(";")]
        policy = {name: set(sources) for name, *sources in rules}
        assert policy["default-src"] == {"'self'"}
        assert policy["frame-ancestors"] == {"'none'"}
        unsafe = {"'unsafe-inline'", "'unsafe-eval'", "*", "https:"}
        assert not unsafe & policy.get("script-src", policy["default-src"])
    assert (await alice.get("/users/me")).headers["Cache-Control"] == "no-store"


async def test_what_is_secret_is_in_no_answer_and_no_log(chat: Server, caplog: Log) -> None:
    """Passwords, tokens and texts that were refused are repeated nowhere."""
    caplog.set_level("DEBUG")
    (alice,) = await chat.talk("alice")
    secret = unique("secret")
    for answer in (
        await chat.login(alice.name, secret),
        await chat.register(unique("x"), f"{secret}\0"),
        await chat.ask("GET", "/users/me", secret),
        await alice.user.post(f"{alice.room.path}/messages", {"message": [secret]}),
        await alice.user.ask("POST", f"{alice.room.path}/messages", data=secret, headers=JSON),
        await alice.user.get(f"/search?q={secret}&limit=x"),
    ):
        assert secret not in str(answer.refused(answer.status))
    for frame in ({"type": "auth", "token": secret}, {"message": [secret]}):
        assert secret not in str(await alice.ask("bad_request", **frame))
    await alice.say(secret)
    logged = [record.getMessage() for record in caplog.records if record.name == "chatserver"]
    assert secret not in str(logged)
