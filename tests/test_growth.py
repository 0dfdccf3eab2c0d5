"""Nothing grows with a room's age: a million events cost what a thousand cost."""

import asyncio
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing

import pytest

from tests import postgres
from tests.conftest import Databases
from tests.people import User, company, handshake
from tests.processes import running

pytestmark = pytest.mark.slow
LARGE, SMALL = 1_000_000, 1_000
SERIES = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i + 1 FROM n WHERE i < {count})",
    "postgres": "WITH n(i) AS (SELECT * FROM generate_series(3, {count}::bigint))",
}


def columns(engine: str, url: str) -> list[str]:
    """Return the columns of the log."""
    if engine == "postgres":
        sql = "SELECT column_name FROM information_schema.columns WHERE table_name = 'events'"
        return [row["column_name"] for row in postgres.run_apart(postgres.read(url, sql))]
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return [row[1] for row in connection.execute("PRAGMA table_info(events)")]


def fill(engine: str, url: str, room: str, count: int) -> None:
    """Repeat a room's second event up to a number; through the server it would take minutes."""
    new = {"seq": "n.i", "json": "replace(e.json, '\"seq\":2,', '\"seq\":' || n.i || ',')"}
    names = columns(engine, url)
    values = ", ".join(new.get(name, f"e.{name}") for name in names)
    sql = f"""INSERT INTO events ({", ".join(names)}) {SERIES[engine].format(count=count)}
        SELECT {values} FROM events e CROSS JOIN n WHERE e.room_id = '{room}' AND e.seq = 2"""  # noqa: S608
    if engine == "postgres":
        postgres.run_apart(postgres.execute(url, sql))
        return
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(sql)


@pytest.fixture(scope="module")
async def alice(
    engine: str, new_database: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[User]:
    """Give the owner of a large room and a small one, on a server that found them so."""
    folder = tmp_path_factory.mktemp("grown")
    url = new_database(folder)
    loop = asyncio.get_running_loop()
    loop.set_debug(False)
    async with (
        running(folder, url, strict=False) as (process,),
        company(process, "alice") as (alice,),
    ):
        for room in ("large", "small"):
            await alice.room(room_id=room)
            await alice.say(room, "one of very many, about as long as what people say")
        assert await process.end() == 0
        await asyncio.to_thread(fill, engine, url, "large", LARGE)
        await asyncio.to_thread(fill, engine, url, "small", SMALL)
        process.start()
        await process.ready()
        yield alice
    loop.set_debug(True)


async def page(alice: User, room: str) -> None:
    """Read the newest page."""
    assert len(await alice.ask("GET", f"/rooms/{room}/messages")) == 50


async def old_page(alice: User, room: str) -> None:
    """Read pages from the middle."""
    assert len(await alice.ask("GET", f"/rooms/{room}/messages?before=500")) == 50
    assert len(await alice.ask("GET", f"/rooms/{room}/messages?after=300")) == 50


async def post(alice: User, room: str) -> None:
    """Post a message with a client_id."""
    await alice.say(room, "one more", client_id=f"{time.monotonic_ns()}")


async def edit(alice: User, room: str) -> None:
    """Edit an old message."""
    await alice.ask("PATCH", f"/rooms/{room}/messages/400", {"message": "edited"})


async def resume(alice: User, room: str) -> None:
    """Come back after a hundred events."""
    head = (await alice.ask("GET", f"/rooms/{room}"))["seq"]
    async with alice.chat(room, f"?after={head - 100}") as chat:
        while chat.numbers[-1:] != [head]:
            await chat.next()
        assert chat.numbers == list(range(head - 99, head + 1))


async def list_rooms(alice: User, room: str) -> None:
    """List the rooms, with what is unread."""
    assert room in {one["room_id"] for one in await alice.ask("GET", "/rooms")}


@pytest.mark.parametrize("act", [page, old_page, post, edit, resume, list_rooms])
async def test_it_costs_the_same_in_a_large_room(
    engine: str, alice: User, act: Callable[[User, str], Awaitable[None]]
) -> None:
    """With a million events it takes at most 1.3 times as long as with a thousand."""
    times: dict[str, list[float]] = {"small": [], "large": []}
    for _ in range(4):  # a busy machine gets more than one chance
        for _ in range(25):
            for room, taken in times.items():
                began = time.perf_counter()
                await act(alice, room)
                taken.append(time.perf_counter() - began)
        small, large = (statistics.median(taken) for taken in times.values())
        if large <= 1.3 * small:
            return
        for taken in times.values():
            taken.clear()
    pytest.fail(f"{engine}: {act.__name__}: {small * 1000:.2f} ms, large {large * 1000:.2f} ms")


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
        await page(alice, "small")
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.01)
    assert await searching == [[]] * 12
    assert max(times) < 0.5, times
