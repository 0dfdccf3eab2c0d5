"""Nothing grows with a room's age: a million events cost what a thousand cost."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import closing

import pytest

from tests.conftest import Databases
from tests.helpers import run_past
from tests.people import User, company, handshake
from tests.processes import running
from tests.words import unique

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]
# A room's second event is repeated up to a number; through the server it would take minutes.
FILL = """
INSERT INTO events (room_id, seq, kind, username, created_at, folded, json)
WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
SELECT room_id, i, kind, username, created_at, folded,
    replace(json, '"seq":2,', '"seq":' || i || ',')
FROM events CROSS JOIN n WHERE room_id = '{room}' AND seq = 2"""


@pytest.fixture(scope="module")
async def alice(
    new_database: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[User]:
    """Give the owner of a large room and a small one, found without statistics by a server."""
    folder = tmp_path_factory.mktemp("grown")
    url = new_database(folder)
    sizes = {"large": 1_000_000, "small": 1_000}
    async with running(folder, url, strict=False) as [server], company(server, "alice") as [alice]:
        for room in sizes:
            await alice.room(room_id=room)
            await alice.say(room, "one of very many, about as long as what people say")
        assert await server.end() == 0
        for room, count in sizes.items():
            await run_past(url, FILL.format(room=room, count=count))
        await server.again()
        yield alice


PAGE = "/rooms/{}/messages"
ACTS = ("resume", "GET /rooms", f"GET {PAGE}", f"GET {PAGE}?before=500", f"GET {PAGE}?after=300")


@pytest.mark.parametrize("what", [*ACTS, f"POST {PAGE}", f"PATCH {PAGE}/400"])
async def test_it_costs_the_same_in_a_large_room(alice: User, what: str) -> None:
    """With a million events it takes at most 1.3 times as long as with a thousand."""

    async def act(room: str) -> None:
        """Come back after a hundred events, or send a request, some with a text."""
        if what == "resume":
            head = (await alice.ask("GET", f"/rooms/{room}"))["seq"]
            async with alice.chat(room, f"?after={head - 100}") as chat:
                await chat.reaches(head)
        else:
            method, path = what.format(room).split()
            new = {"message": "one more", "client_id": unique("id")}
            await alice.ask(method, path, None if method == "GET" else new)

    for _ in range(4):  # a busy machine gets more than one chance
        times: dict[str, list[float]] = {"small": [], "large": []}
        for room in ["small", "large"] * 25:
            began = time.perf_counter()
            await act(room)
            times[room].append(time.perf_counter() - began)
        small, large = (statistics.median(taken) for taken in times.values())
        if large <= 1.3 * small:
            return
    pytest.fail(f"{small * 1000:.2f} ms in the small room, {large * 1000:.2f} ms in the large one")


async def test_a_long_resume_streams(alice: User) -> None:
    """Who was away for 200,000 events and reads fast gets over 10,000 a second, each once."""
    head = (await alice.ask("GET", "/rooms/large"))["seq"]
    first, last = f'"seq":{head - 199_999},'.encode(), f'"seq":{head},'.encode()

    def stream() -> bytes:
        """Read until the last number comes, and all in between."""
        data = bytearray()
        with closing(handshake(alice, f"large?after={head - 200_000}")) as peer:
            while last not in data[-100_000:] or len(data) < 10_000_000:
                data += peer.recv(1 << 20)
        return bytes(data)

    began = time.monotonic()
    data = await asyncio.to_thread(stream)
    assert 200_000 / (time.monotonic() - began) > 10_000
    assert data.count(b'"type":"message"') + data.count(b'"type":"edit"') == 200_000
    assert data.index(first) < data.rindex(last)


async def test_searches_for_what_is_rare_hold_nobody_up(alice: User) -> None:
    """While a million messages are searched again and again, a page comes as quickly as ever."""
    searching = asyncio.gather(*(alice.ask("GET", "/search?q=nowhere") for _ in range(12)))
    times = []
    while not searching.done():
        began = time.perf_counter()
        await alice.ask("GET", "/rooms/small/messages")
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.01)
    assert await searching == [[]] * 12
    assert max(times) < 0.5, times
