"""Every limit with its status, Retry-After or frame, and what it spares."""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import aiohttp
import pytest
from aiohttp import WSMsgType
from yarl import URL

from tests.conftest import Databases, Start, is_clean
from tests.helpers import (
    NO_LIMITS,
    PASSWORD,
    SECRET,
    UPGRADE,
    Answer,
    Chat,
    ClosedError,
    Pool,
    Process,
    Server,
    User,
    background,
    unique,
    until,
)

HERE = "https://chat.example"
LIMITS = {
    **NO_LIMITS,
    "secret_key": SECRET,
    "messages_per_second": 2,
    "message_burst": 4,
    "logins_per_minute": 3,
    "registrations_per_hour": 5,
    "sockets_per_user": 2,
    "sockets_per_address": 4,
    "rooms_per_user": 2,
    "frame_bytes": 2000,
    "body_bytes": 2000,
    "message_length": 50,
    "history_limit": 5,
    "allowed_origins": f"{HERE}, https://two.example",
    "trusted_proxies": "127.0.0.1, 10.0.0.0/8",
}
SOCKET = "/websockets/chat/1"
numbers = itertools.count(1)


def address() -> str:
    """Return an address that no test has had before."""
    number = next(numbers)
    return f"198.51.{number // 250}.{number % 250 + 1}"


# --- Peers that take their time


class Slow(NamedTuple):
    """How a peer drags on: what it sends at once, and what it repeats until it is cut off."""

    begin: bytes
    drip: bytes


SLOW = {
    "says nothing": Slow(b"", b""),
    "drips headers": Slow(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"a"),
    "drips more headers": Slow(b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-Slow: a\r\n"),
    "drips its second headers": Slow(
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX-Slow: ", b"a"
    ),
    "drips a body": Slow(
        b"POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{",
        b" ",
    ),
    "drips a body without a length": Slow(
        b"POST /auth/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\na\r\n",
    ),
    "stops in a body": Slow(
        b"POST /auth/token HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nusername=", b""
    ),
}


def drag_on(url: str, slow: Slow, patience: float = 28) -> tuple[float, bytes]:
    """Be slow; return after how many seconds the server had enough, and what it said."""
    where, heard = URL(url), b""
    with socket.create_connection((where.host, where.port or 80)) as peer:
        peer.settimeout(0.4)
        peer.sendall(slow.begin)
        began = time.monotonic()
        while time.monotonic() - began < patience:
            try:
                if not (data := peer.recv(65536)):
                    break
                heard += data
                if b" 408 " in data:
                    break
                continue
            except TimeoutError:
                pass
            except ConnectionError:
                break
            try:
                peer.sendall(slow.drip)
            except ConnectionError:
                break
    return time.monotonic() - began, heard


class Limited:
    """A server on which every limit is low, and the slow peers that came when it started."""

    def __init__(self, process: Process, threads: ThreadPoolExecutor) -> None:
        """Send the slow peers on their way."""
        self.process = process
        self.pool = Pool()
        url = process.listening()
        self.slow: dict[str, Future[tuple[float, bytes]]] = {
            name: threads.submit(drag_on, url, slow) for name, slow in SLOW.items()
        }


@pytest.fixture(scope="module")
def limited(new_database: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """Run one server on each engine that has every limit."""
    folder = tmp_path_factory.mktemp("limited")
    settings = {**LIMITS, "database_url": new_database(folder)}
    process = Process(folder, "--port=0", settings=settings)
    try:
        with ThreadPoolExecutor(len(SLOW)) as threads:
            yield Limited(process, threads)
        assert process.stop() == 0, process.stderr
        is_clean(process.stderr)
    finally:
        process.kill()


class From(Server):
    """The server as somebody at one address sees it, whom a trusted proxy announces."""

    address: str


@pytest.fixture
async def near(limited: Limited) -> AsyncIterator[From]:
    """Give the server with every limit, as seen from an address of the test's own."""
    async with client(limited, address()) as server:
        yield server


@pytest.fixture
async def far(limited: Limited) -> AsyncIterator[From]:
    """Give the same server as seen from another address."""
    async with client(limited, address()) as server:
        yield server


class client:  # noqa: N801 - reads like contextlib's functions
    """Gives the server as seen from an address."""

    def __init__(self, limited: Limited, place: str) -> None:
        """Prepare a session that says where it comes from."""
        self.limited, self.place = limited, place

    async def __aenter__(self) -> From:
        """Open the session."""
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"X-Forwarded-For": self.place},
            timeout=aiohttp.ClientTimeout(total=40),
        )
        self.server = server = From(self.limited.process, self.session, pool=self.limited.pool)
        server.address = self.place
        return server

    async def __aexit__(self, *_: object) -> None:
        """Give the accounts back and close the session."""
        self.server.release()
        await self.session.close()


# --- Rates of messages


async def test_posts_above_the_burst_are_429_until_retry_after(near: Server) -> None:
    """A burst of posts is taken, the next is 429 with Retry-After, and after that time one is."""
    alice = await near.user(fresh=True)
    room = await alice.room()
    for number in range(4):
        await alice.say(room, f"{number}")
    path = f"/rooms/{room}/messages"
    answer = await alice.post(path, json={"message": "too much"})
    answer.refused(429, "rate_limited")
    assert answer.json["retry_after"] == int(answer.headers["Retry-After"]) == 1, answer
    await asyncio.sleep(1.05)
    await alice.say(room, "after the time that was asked for")
    texts = [event["message"] for event in await alice.events(room) if event["type"] == "message"]
    assert texts == ["0", "1", "2", "3", "after the time that was asked for"]


async def test_frames_above_the_burst_get_an_error_and_the_socket_lives_on(near: Server) -> None:
    """A message above the burst gets a rate_limited error with its client_id, and no close."""
    alice = await near.user(fresh=True)
    async with alice.chat("1") as chat:
        for number in range(4):
            await chat.deliver(f"{number}")
        await chat.say("too much", client_id="late")
        error = await chat.refusal("rate_limited")
        assert error["client_id"] == "late"
        assert 1 <= error["retry_after"] <= 2
        await asyncio.sleep(1.05)
        await chat.deliver("too much", client_id="late")


async def test_the_rate_counts_both_transports_and_each_user_alone(near: Server) -> None:
    """REST and WebSocket, posts, edits and deletes fill one bucket, which is one user's own."""
    alice, bob = await near.users("alice", "bob", fresh=True)
    async with alice.chat("1") as chat:
        first = await chat.deliver("by socket")
        await alice.say("1", "by post")
        path = f"/rooms/1/messages/{first['seq']}"
        (await alice.patch(path, json={"message": "an edit"})).ok()
        await chat.send({"type": "delete", "target": first["seq"]})
        await chat.event("delete", target=first["seq"])
        (await alice.post("/rooms/1/messages", json={"message": "x"})).refused(429, "rate_limited")
        (await alice.delete(path)).refused(429, "rate_limited")
        await chat.say("x", client_id="x")
        await chat.refusal("rate_limited")
        await chat.send({"type": "edit", "target": first["seq"], "message": "y", "client_id": "y"})
        error = await chat.refusal("rate_limited")
        assert (error["client_id"], error["target"]) == ("y", first["seq"])
        await bob.say("1", "nobody else is slowed down")
        await chat.event("message", message="nobody else is slowed down")


async def test_no_rate_switches_the_burst_off_too(start: Start) -> None:
    """With messages_per_second=0 a burst of any length is taken."""
    server = await start(messages_per_second=0, message_burst=2)
    alice = await server.user()
    async with alice.chat("1") as chat:
        for number in range(30):
            await chat.say(f"{number}", client_id=f"{number}")
        await chat.event("message", client_id="29")


@pytest.mark.parametrize("kind", ["ping", "typing", "read", "nonsense"])
async def test_a_flood_of_other_frames_closes_4429(near: Server, kind: str) -> None:
    """Who floods the server with pings or frames that are no messages is closed 4429."""
    alice, bob = await near.users("alice", "bob", fresh=True)
    async with alice.chat("1") as chat, bob.chat("1") as other:
        try:
            for _ in range(400):
                if kind == "ping":
                    await chat.ping()
                else:
                    await chat.send({"type": kind, "seq": 1})
        except aiohttp.ClientConnectionResetError:
            pass
        assert await chat.closed() == 4429
        assert chat.reason
        await other.deliver("I am still here")


# --- Log-ins and registrations


@pytest.mark.parametrize("path", ["/auth/token", "/auth/password", "/users/me"])
async def test_failed_log_ins_count_for_the_address(near: From, far: From, path: str) -> None:
    """Three wrong passwords are refused, then the address is 429; from elsewhere all works."""
    alice = await near.user(fresh=True)

    async def attempt(server: Server, password: str) -> Answer:
        """Tell the server a password."""
        if path == "/auth/token":
            return await server.login(alice.username, password)
        method = "POST" if path == "/auth/password" else "DELETE"
        body = {"password": password, "new_password": PASSWORD}
        return await server.request(method, path, token=alice.token, json=body)

    for _ in range(3):
        (await attempt(near, "wrong")).refused(400 if path == "/auth/token" else 403)
    (await attempt(near, "wrong")).refused(429, "rate_limited")
    (await near.login(alice.username)).refused(429, "rate_limited")
    (await near.login(unique("nobody"), "wrong")).refused(429, "rate_limited")
    (await near.get("/users/me", token=alice.token)).ok()
    (await far.login(alice.username)).ok()
    if path != "/auth/token":
        (await attempt(far, PASSWORD)).ok(204)


async def test_log_ins_that_succeed_do_not_count(near: Server) -> None:
    """One may log in with the right password as often as one likes."""
    alice = await near.user()
    for _ in range(5):
        (await near.login(alice.username)).ok()


async def test_guesses_side_by_side_are_no_way_around_the_limit(near: Server) -> None:
    """Many guesses at once count no less than one after another: the right one is too late."""
    alice = await near.user()
    guesses = [asyncio.create_task(near.login(alice.username, f"wrong {n}")) for n in range(10)]
    await asyncio.wait(guesses, return_when=asyncio.FIRST_COMPLETED)
    answer = await near.login(alice.username)
    statuses = [task.result().status for task in guesses if task.done()]
    await asyncio.gather(*guesses)
    answer.refused(429, "rate_limited")
    assert {400, 429} >= set(statuses), statuses


async def test_registrations_count_for_the_address(near: Server, far: Server) -> None:
    """The sixth registration within an hour from one address is 429, and elsewhere it is not."""
    answers = await asyncio.gather(*(near.register(unique("many")) for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [201] * 5 + [429] * 3
    refused = next(answer for answer in answers if answer.status == 429)
    refused.refused(429, "rate_limited")
    assert int(refused.headers["Retry-After"]) <= 720
    (await far.register(unique("many"))).ok(201)


async def test_closed_registration_is_403_and_log_ins_go_on(start: Start) -> None:
    """With registration closed nobody registers, and who has an account logs in."""
    server = await start()
    alice = await server.user()
    database = server.database
    assert await asyncio.to_thread(server.process.stop) == 0
    shut = await start(database=database, registration="closed")
    (await shut.register(unique("late"))).refused(403, "forbidden")
    (await shut.login(alice.username)).ok()


async def test_password_min_length_counts_bytes_of_new_passwords_only(start: Start) -> None:
    """A new password needs so many bytes; one that was given before still logs in."""
    server = await start()
    alice = await server.user()
    database = server.database
    assert await asyncio.to_thread(server.process.stop) == 0
    strict = await start(database=database, password_min_length=8)
    token = (await strict.login(alice.username)).ok()["access_token"]
    (await strict.register(unique("short"), "1234567")).refused(400)
    (await strict.register(unique("long"), "ÄÖÜß")).ok(201)
    body = {"password": PASSWORD, "new_password": "1234567"}
    (await strict.post("/auth/password", token=token, json=body)).refused(400)
    (await strict.get("/users/me", token=token)).ok()


async def test_a_flood_of_log_ins_leaves_everybody_else_alone(start: Start) -> None:
    """While log-ins are hashed, messages are as quick as ever; what cannot wait is 503."""
    server = await start()
    alice, bob = await server.users("alice", "bob")
    delays: list[float] = []
    async with alice.chat("1") as chat:
        flood = [asyncio.create_task(server.login(bob.username, "wrong")) for _ in range(55)]
        while not all(task.done() for task in flood[:36]) and len(delays) < 60:
            began = time.monotonic()
            await chat.deliver("quick")
            delays.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
        answers = await asyncio.gather(*flood)
    assert statistics.median(delays) < 0.2, delays
    assert max(delays) < 2, delays
    full = [answer for answer in answers if answer.status == 503]
    assert 55 - 45 <= len(full) < 55, [answer.status for answer in answers]
    for answer in full:
        answer.refused(503, "unavailable")
    (await server.login(bob.username)).ok()


async def test_log_ins_of_one_address_leave_room_for_others(start: Start) -> None:
    """However many log-ins one address has waiting, those of another are hashed too."""
    server = await start(trusted_proxies="127.0.0.1", logins_per_minute=0)
    alice, bob = await server.users("alice", "bob")

    async def log_in(user: User, place: str) -> int:
        """Log in from an address; return the status."""
        form = {"username": user.username, "password": PASSWORD}
        headers = {"X-Forwarded-For": place}
        return (await server.post("/auth/token", data=form, headers=headers)).status

    seen: list[int] = []

    async def log_in_without_end() -> None:
        """Log in again and again, as fast as it is answered."""
        while True:
            seen.append(await log_in(alice, "203.0.113.1"))

    async with background(*(log_in_without_end() for _ in range(40))):
        await until(lambda: 503 in seen, "a full queue")
        assert [await log_in(bob, "203.0.113.2") for _ in range(3)] == [200] * 3
    assert set(seen) == {200, 503}


async def test_changes_of_rooms_have_a_rate_too(near: From) -> None:
    """Who joins and leaves without end is 429 at last; what they post has a rate of its own."""
    alice, bob = await near.users("alice", "bob", fresh=True)
    room, answers = await alice.room(), []
    path = f"/rooms/{room}/members/{bob.username}"
    for _ in range(25):
        answers += [await bob.put(path, json={}), await bob.delete(path)]
    refused = [answer for answer in answers if answer.status == 429]
    assert 1 <= len(refused) <= 11
    refused[0].refused(429, "rate_limited")
    await bob.say("1", "still here")


# --- Who counts as where


async def guess(server: Server, place: str) -> int:
    """Log in with a wrong password, from where X-Forwarded-For says; return the status."""
    form = {"username": "nobody-at-all", "password": "wrong"}
    headers = {"X-Forwarded-For": place}
    return (await server.post("/auth/token", data=form, headers=headers)).status


async def test_addresses_of_one_ipv6_network_count_as_one(limited: Limited) -> None:
    """Whoever has a /64 has one share, not 2^64; another /64 has its own."""
    site = f"2001:db8:{secrets.randbelow(9999)}"
    places = (f"{site}:1::1", f"{site}:1::2", f"{site}:1:3::", f"{site}:1::4", f"{site}:2::1")
    async with client(limited, address()) as server:
        statuses = [await guess(server, place) for place in places]
    assert statuses == [400, 400, 400, 429, 400]


async def test_only_the_last_untrusted_address_counts(limited: Limited) -> None:
    """What a client writes into X-Forwarded-For itself does not make it somebody else."""
    mine = address()
    async with client(limited, mine) as server:
        chains = [f"1.2.3.{n}, {mine}" for n in range(3)] + [f"{mine}, 10.1.2.3, 10.0.0.9", mine]
        statuses = [await guess(server, chain) for chain in chains]
    assert statuses == [400, 400, 400, 429, 429]


async def test_without_a_trusted_proxy_the_header_counts_for_nothing(start: Start) -> None:
    """With no trusted_proxies X-Forwarded-For is not read."""
    server = await start(logins_per_minute=2)
    statuses = [await guess(server, f"203.0.113.{number}") for number in range(3)]
    assert statuses == [400, 400, 429]


@pytest.mark.parametrize(
    "value",
    ["", ",", "unknown", "::1", "[::1]:80", "1.2.3.4:5678", "::ffff:10.0.0.1, ::", "x" * 4000],
)
async def test_a_strange_forwarded_for_does_no_harm(near: Server, value: str) -> None:
    """Whatever X-Forwarded-For says, the answer is the usual one."""
    assert await guess(near, value) in (400, 429)


# --- Sockets


async def test_a_users_sockets_are_counted(near: From, limited: Limited) -> None:
    """A user's third socket is 429 before the upgrade, or 4429 after it, until one has gone."""
    alice = await near.user(fresh=True)
    async with alice.chat("1") as first, alice.chat("1") as second:
        headers = {**UPGRADE, "X-Forwarded-For": address()}
        refusal = await alice.get(SOCKET, headers=headers)
        refusal.refused(429, "rate_limited")
        async with near.chat("1", headers={"X-Forwarded-For": address()}) as third:
            await third.send({"type": "auth", "token": alice.token})
            assert await third.closed() == 4429
            assert third.reason
        await first.deliver("both live on")
        await second.event("message", message="both live on")
    await asyncio.sleep(0)
    async with client(limited, address()) as elsewhere:
        await until_connected(elsewhere, alice.token)


async def until_connected(server: Server, token: str) -> None:
    """Connect as soon as the sockets that were closed are no longer counted."""
    async with asyncio.timeout(5):
        while True:
            try:
                async with server.chat("1", token=token):
                    return
            except aiohttp.WSServerHandshakeError as error:
                assert error.status == 429  # noqa: PT017 - until then that is the answer
                await asyncio.sleep(0.05)


async def connected(stack: AsyncExitStack, chat: Chat) -> bool:
    """Connect; tell whether the server let the socket in."""
    try:
        await stack.enter_async_context(chat)
    except (aiohttp.WSServerHandshakeError, ClosedError):
        return False
    return True


@pytest.mark.parametrize("counted", ["user", "address"])
async def test_sockets_that_come_at_once_are_counted_too(near: From, counted: str) -> None:
    """Of twelve sockets opened at once no more get in than one after another."""
    users = await near.users("alice", "bob", "carol", "dave")
    async with AsyncExitStack() as stack:
        chats = []
        for number in range(12):
            user = users[0] if counted == "user" else users[number % 4]
            place = address() if counted == "user" else near.address
            chats.append(user.chat("1", headers={"X-Forwarded-For": place}))
        entered = await asyncio.gather(*(connected(stack, chat) for chat in chats))
    assert sum(entered) == (2 if counted == "user" else 4)


async def test_an_addresss_sockets_are_counted_before_they_log_in(near: From, far: From) -> None:
    """Sockets that have not logged in count for their address; the fifth is 429 at once."""
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(near.chat("1"))
        (await near.get(SOCKET, headers=UPGRADE)).refused(429, "rate_limited")
        bob = await far.user("bob")
        async with bob.chat("1") as other:
            await other.deliver("from elsewhere")
    alice = await near.user()
    await until_connected(near, alice.token)


async def test_sockets_of_a_full_server_are_503(start: Start) -> None:
    """When all sockets are taken the next is 503 with Retry-After, and the rest works on."""
    server = await start(sockets=3)
    alice = await server.user()
    async with alice.chat("1") as chat, server.chat("1"), alice.chat("1"):
        (await alice.get(SOCKET, headers=UPGRADE)).refused(503, "unavailable")
        (await server.get(SOCKET, headers=UPGRADE)).refused(503, "unavailable")
        await alice.say("1", "by post")
        await chat.event("message", message="by post")


ORIGINS = {
    "none": (None, True),
    "its own": ("self", True),
    "allowed": (HERE, True),
    "allowed second": ("https://two.example", True),
    "other": ("https://evil.example", False),
    "null": ("null", False),
    "longer": (f"{HERE}.evil.example", False),
    "other scheme": ("http://chat.example", False),
    "other port": (f"{HERE}:444", False),
    "garbage": ("://", False),
}


@pytest.mark.parametrize("origin", ORIGINS)
async def test_only_pages_of_known_origins_connect(near: Server, origin: str) -> None:
    """A socket from a page is taken when its Origin is the server's own or an allowed one."""
    value, welcome = ORIGINS[origin]
    alice = await near.user()
    value = near.url if value == "self" else value
    headers = {"Origin": value} if value else {}
    if welcome:
        async with alice.chat("1", headers=headers) as chat:
            assert chat.hello["username"] == alice.username
    else:
        answer = await alice.get(SOCKET, headers=UPGRADE | headers)
        answer.refused(403, "forbidden")


# --- Sizes


async def test_a_frame_above_frame_bytes_closes_1009(near: Server) -> None:
    """A frame of exactly frame_bytes is answered, one more byte closes 1009."""
    alice = await near.user(fresh=True)
    async with alice.chat("1") as chat:
        frame = json.dumps({"message": "ok", "pad": ""})
        frame = frame.replace('""', '"' + "x" * (2000 - len(frame)) + '"')
        assert len(frame) == 2000
        await chat.send_text(frame)
        await chat.event("message", message="ok")
        await chat.send_text(frame + " ")
        assert await chat.closed() == 1009


async def test_fragments_count_together(near: Server) -> None:
    """A message in many small fragments is as long as all of them."""
    alice = await near.user()
    async with alice.chat("1") as chat:
        writer = chat._ws._writer  # noqa: SLF001 - the library sends no fragments of its own
        transport = writer.transport
        for number in range(30):
            opcode = WSMsgType.TEXT if not number else WSMsgType.CONTINUATION
            transport.write(bytes((opcode, 0x80 | 100, 0, 0, 0, 0)) + b"x" * 100)
        assert await chat.closed() == 1009


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_body_bytes_is_413(near: Server, chunked: bool) -> None:  # noqa: FBT001
    """A body of exactly body_bytes is read, one more byte is 413, however it is sent."""
    alice = await near.user(fresh=True)
    room = await alice.room()

    async def parts(data: bytes) -> AsyncIterator[bytes]:
        """Yield a body piece by piece."""
        for at in range(0, len(data), 500):
            yield data[at : at + 500]

    for size, status in ((2000, 201), (2001, 413)):
        data = json.dumps({"message": "ok"}).encode().ljust(size)
        body: Any = parts(data) if chunked else data
        headers = {"Content-Type": "application/json"}
        answer = await alice.post(f"/rooms/{room}/messages", data=body, headers=headers)
        assert answer.status == status, answer
    answer.refused(413, "too_large")


async def test_a_message_above_message_length_is_refused(near: Server) -> None:
    """Characters count, not bytes; one too many is refused in posts, frames and edits."""
    alice = await near.user(fresh=True)
    longest, longer = "\U0001f600" * 50, "\U0001f600" * 51
    event = await alice.say("1", longest)
    (await alice.post("/rooms/1/messages", json={"message": longer})).refused(400, "bad_request")
    path = f"/rooms/1/messages/{event['seq']}"
    (await alice.patch(path, json={"message": longer})).refused(400, "bad_request")
    async with alice.chat("1") as chat:
        await chat.say(longer)
        await chat.refusal("bad_request")
        await chat.send({"type": "edit", "target": event["seq"], "message": longer})
        await chat.refusal("bad_request")
        await chat.deliver(longest)


async def test_history_limit_clamps_every_page(near: Server, far: Server) -> None:
    """No page and no replay by `last` is longer than history_limit, whatever is asked for."""
    alice, bob = await near.users("alice", "bob", fresh=True)
    carol = await far.user("carol", fresh=True)
    word = unique("word")
    room = await alice.room(bob, carol)
    for user in (alice, bob):
        for _ in range(4):
            await user.say(room, f"a {word}")
    for path in (
        f"/rooms/{room}/messages?limit=200",
        f"/rooms/{room}/messages?after=0&limit=9007199254740992",
        f"/search?q={word}&limit=100",
        f"/search?q={word}&room_id={room}",
        "/users?limit=100",
    ):
        assert len((await alice.get(path)).ok()) <= 5, path
    assert len((await alice.get(f"/rooms/{room}/messages?limit=200")).ok()) == 5
    assert len((await alice.get(f"/search?q={word}&limit=100")).ok()) == 5
    assert len((await alice.get(f"/rooms/{room}/events?limit=200")).ok()["events"]) == 5
    head = await alice.head(room)
    async with alice.chat(room, last=100) as chat:
        assert chat.hello["seq"] == head
        await chat.upto(head)
        assert chat.numbers == list(range(head - 4, head + 1))


async def test_rooms_per_user_is_403(near: Server) -> None:
    """A user's third room is 403; direct rooms, and rooms of others, do not count."""
    alice, bob = await near.users("alice", "bob", fresh=True)
    for _ in range(2):
        await alice.room()
    body = {"room_id": unique("room"), "name": "one too many"}
    (await alice.post("/rooms", json=body)).refused(403, "forbidden")
    (await alice.post("/rooms", json={"kind": "direct", "username": bob.username})).ok(201)
    (await bob.post("/rooms", json=body)).ok(201)


async def test_rooms_asked_for_at_once_are_counted_too(near: Server) -> None:
    """Of eight rooms asked for at once two are made."""
    alice = await near.user(fresh=True)
    bodies = [{"room_id": unique("room")} for _ in range(8)]
    answers = await asyncio.gather(*(alice.post("/rooms", json=body) for body in bodies))
    assert sorted(answer.status for answer in answers) == [201] * 2 + [403] * 6


async def test_zero_means_no_limit_of_any_size(start: Start) -> None:
    """With 0, texts, frames, bodies and pages are as long as one likes."""
    server = await start(message_length=0, frame_bytes=0, body_bytes=0, history_limit=0)
    alice = await server.user()
    text = "long " * 100_000
    async with alice.chat("1") as chat:
        await chat.deliver(text)
        event = await alice.say("1", text)
        assert (await chat.upto(event["seq"]))[-1]["message"] == text
        for number in range(210):
            await chat.say(f"{number}", client_id=f"n{number}")
        await chat.event("message", client_id="n209")
    page = (await alice.get("/rooms/1/messages?limit=1000")).ok()
    assert len(page) == 212


# --- CORS, headers, logs


PREFLIGHT = {
    "Access-Control-Request-Method": "PUT",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize("origin", [HERE, "https://two.example"])
async def test_pages_of_allowed_origins_get_cors(near: Server, origin: str) -> None:
    """Preflights and answers, refusals included, name the allowed origin and what it may send."""
    headers = {"Origin": origin}
    for path in ("/rooms", "/auth/token", "/rooms/1/members/alice", "/rooms/1/messages"):
        answer = await near.request("OPTIONS", path, headers=headers | PREFLIGHT)
        assert answer.status in (200, 204), answer
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        allowed = answer.headers["Access-Control-Allow-Headers"].lower()
        assert "authorization" in allowed and "content-type" in allowed
        methods = answer.headers["Access-Control-Allow-Methods"]
        assert all(name in methods for name in ("GET", "POST", "PUT", "PATCH", "DELETE"))
    for path in ("/rooms", "/healthz", "/nothing-here", "/auth/token"):
        answer = await near.get(path, headers=headers)
        assert answer.headers["Access-Control-Allow-Origin"] == origin, answer
        assert "origin" in answer.headers["Vary"].lower(), answer
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", f"{HERE}.evil.example", HERE[:-1]]
)
async def test_other_pages_get_no_cors(near: Server, origin: str) -> None:
    """What comes from elsewhere is answered without any CORS header."""
    headers = {"Origin": origin}
    answers = [
        await near.request("OPTIONS", "/rooms", headers=headers | PREFLIGHT),
        await near.get("/rooms", headers=headers),
        await near.get("/healthz", headers=headers),
    ]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("Access-Control")], answer


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/redoc", "/openapi.json", "/healthz", "/rooms", "/nothing", SOCKET]
)
async def test_every_answer_carries_the_security_headers(near: Server, path: str) -> None:
    """Pages and answers say nosniff, no referrer, no frames, and have a strict policy."""
    answer = await near.get(path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Frame-Options"] == "DENY"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    scripts = re.search("script-src ([^;]*)", policy)
    assert not scripts or not re.search("unsafe|[*]", scripts[1]), policy


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc"])
async def test_a_page_allows_just_its_own_script(near: Server, path: str) -> None:
    """The policy names the hash of each inline script, and there are no inline handlers."""
    answer = await near.get(path)
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    blocks = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert blocks
    for block in blocks:
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]+\son[a-z]+=", re.sub("(?s)<script>.*?</script>", "", page))


async def test_nothing_secret_is_logged(start: Start) -> None:
    """Passwords, tokens and texts appear in no log, whatever goes wrong with them."""
    server = await start(metrics="on", logins_per_minute=3)
    word = "PineappleSecret"
    name = unique("alice")
    (await server.register(name, word)).ok(201)
    token = (await server.login(name, word)).ok()["access_token"]
    for _ in range(5):
        await server.login(name, f"{word}-wrong")
        await server.login(f"{word}@\0", word)
    await server.post("/auth/token", data=f"password={word}&password={word}&username=%ff")
    await server.post("/auth/register", data=f'{{"password": "{word}"', headers={"a": word})
    await server.get(f"/rooms?token={token}&{word}")
    await server.get(f"/websockets/chat/1?token={token}", headers=UPGRADE)
    await server.get("/rooms", token=f"{word}.{word}.{word}")
    await server.post("/rooms/1/messages", token=token, json={"message": word, "client_id": "1"})
    await server.post("/rooms/1/messages", token=token, json={"message": word + "\0"})
    async with server.chat("1", token=token) as chat:
        await chat.send({"type": word})
        await chat.send_text(f'{{"message": "{word}')
        await chat.send_bytes(word.encode())
        await chat.closed()
    async with server.chat("1") as chat:
        await chat.send({"type": "auth", "token": word})
        await chat.closed()
    log = server.process.stderr + server.process.stdout
    assert word not in log
    assert token not in log
    assert token.split(".")[2] not in log
    assert SECRET not in log


# --- The end: by now the slow peers have been slow for a while


@pytest.mark.parametrize("kind", SLOW)
async def test_who_drags_on_is_cut_off(limited: Limited, near: Server, kind: str) -> None:
    """Headers not complete after 20 s and bodies not complete after 10 s end the connection."""
    cut = limited.slow[kind]
    await until(cut.done, "the server to cut the slow peer off", 30)
    seconds, said = cut.result()
    if "body" in kind:
        assert 9 < seconds < 12, (seconds, said)
        assert not said or said.startswith(b"HTTP/1.1 408 "), said
    else:
        assert 18 < seconds < 23, (seconds, said)
        assert b" 500 " not in said
    async with background() as _:
        (await near.get("/healthz")).ok()
