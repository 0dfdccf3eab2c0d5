"""Several processes on one Postgres are one server, whoever dies or freezes."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from tests import postgres
from tests.checker import trying
from tests.people import Chat, User, company
from tests.processes import Process, Wire, cut_connections, is_clean, running, session_of
from tests.words import KEY, unique, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]

Hosts = list[Process]
LISTENERS = "(query ILIKE 'listen%' OR query ILIKE '%pg_notify%')"


@pytest.fixture(scope="module")
def url(postgres_url: str) -> str:
    """Give the database of all tests of this file."""
    return postgres.create_database(postgres_url)


@pytest.fixture(scope="module")
async def hosts(url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosts]:
    """Run four processes for all tests of this file that do not need their own."""
    async with running(tmp_path_factory.mktemp("hosts"), url, count=4) as processes:
        yield processes


@asynccontextmanager
async def sockets(room: str, *users: User) -> AsyncIterator[list[Chat]]:
    """Open sockets to a room; each holds that every number comes once, in order."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(user.chat(room)) for user in users]


async def online(user: User, room: str) -> list[str]:
    """Return who is online in a room, as a process tells."""
    async with user.chat(room) as chat:
        return list(chat.hello["online"])


async def cross(chats: Sequence[Chat]) -> float:
    """Send a message from every socket to all; return how long it took in all."""
    began = time.monotonic()
    seqs = [(await chat.say("cross"))["seq"] for chat in chats]
    for chat in chats:
        await chat.reaches(max(seqs))
    return time.monotonic() - began


async def quick(chats: Sequence[Chat], patience: float) -> None:
    """Wait until messages cross by wake-ups again, not by the poll."""
    async with asyncio.timeout(patience):
        while await cross(chats) > 0.5:
            pass


# --- Together


async def test_processes_may_start_at_once(postgres_url: str, tmp_path: Path) -> None:
    """Five processes that start at the same moment on an empty database agree on everything."""
    url, epochs = postgres.create_database(postgres_url), set()
    async with (
        running(tmp_path, url, count=5) as processes,
        company(processes[0], "first") as (first,),
    ):
        for process in processes:
            async with first.at(process).chat("1", "?after=0") as chat:
                assert (await chat.next())["role"] == "owner"
                assert chat.hello["seq"] == 1
                epochs.add(chat.hello["epoch"])
    assert len(epochs) == 1


async def test_four_processes_keep_every_promise(hosts: Hosts) -> None:
    """Writers and readers who drop and resume anywhere see one log; what was told is there once."""
    async with (
        company(hosts[0], "alice", "bob", "carol") as users,
        trying(hosts, users, counts=(24, 16)) as trial,
    ):
        await trial.more(1500)


# --- Wake-ups


async def test_without_wake_ups_the_poll_delivers(hosts: Hosts, url: str) -> None:
    """While every listener is cut off again and again messages cross within a few seconds."""

    async def batter() -> None:
        """Cut off every listener without a pause."""
        while True:
            await cut_connections(url, LISTENERS)

    async with company(hosts[0], "alice") as (alice,):
        room = await alice.room()
        async with sockets(room, *map(alice.at, hosts)) as chats:
            storm = asyncio.create_task(batter())
            assert await cross(chats[:2]) < 6
            storm.cancel()
            await quick(chats, 8)


async def test_a_silent_listener_is_replaced(hosts: Hosts, url: str, tmp_path: Path) -> None:
    """A silent listening connection holds up no send; the poll stands in, then a new connection."""
    async with (
        Wire(url) as wire,
        running(tmp_path, wire.url) as (process,),
        company(hosts[0], "alice") as (alice,),
        sockets(await alice.room(), alice, alice.at(process)) as chats,
    ):
        await quick(chats, 5)
        assert wire.mute_listeners() == 1
        began = time.monotonic()
        await chats[1].say("beside")
        assert time.monotonic() - began < 1.5
        assert await cross(chats) < 6
        await quick(chats, 15)


async def test_a_burst_of_whispers_is_told_however_long(hosts: Hosts) -> None:
    """Who comes into many rooms at once, more than one NOTIFY can tell, is known elsewhere."""
    async with company(hosts[0], "alice", "bob") as (alice, bob), AsyncExitStack() as stack:
        names = [unique(f"r{number}").ljust(64, "x") for number in range(100)]
        rooms = [await alice.room(bob, room_id=name) for name in names]
        there = [alice.at(hosts[1]).chat(room) for room in rooms]
        chats = await asyncio.gather(*map(stack.enter_async_context, there))
        await asyncio.gather(*(chat.send(type="typing") for chat in chats))
        async with asyncio.timeout(10):
            for room in rooms:
                while alice.name not in await online(bob.at(hosts[2]), room):
                    await asyncio.sleep(0.1)
        async with bob.at(hosts[2]).chat(rooms[0]) as here:
            await quick([chats[0], here], 1)


async def test_who_is_on_a_dead_or_frozen_process_is_offline_soon(hosts: Hosts) -> None:
    """Users of a killed or a frozen process go offline within 15 s; thawed, theirs are back."""
    _, other, dead, frozen = hosts
    async with company(hosts[0], "alice", "bob", "carol") as (alice, bob, carol):
        room = await alice.room(bob, carol)
        async with sockets(room, alice, bob.at(dead), carol.at(frozen)) as (hers, _, carols):
            for user in (bob, carol):
                await hers.hear_any("presence", username=user.name, online=True)
            try:
                async with frozen.frozen():
                    dead.kill()
                    for user in (bob, carol):
                        await hers.hear_any("presence", 15, username=user.name, online=False)
                    async with asyncio.timeout(15):  # each process finds out by itself
                        while await online(alice.at(other), room) != [alice.name]:
                            await asyncio.sleep(0.1)
            finally:
                await dead.again()
            await hers.hear("presence", 15, username=carol.name, online=True)
            await quick([hers, carols], 10)


# --- Shut means shut, everywhere

BOB = "/rooms/{room}/members/{bob}"
SHUT: dict[str, tuple[int, str, str, str, Any]] = {
    "log out": (4401, "bob", "POST", "/auth/logout", None),
    "ban": (4403, "alice", "PUT", BOB, {"role": "banned"}),
    "delete the room": (4404, "alice", "DELETE", "/rooms/{room}", None),
}


@pytest.mark.parametrize("way", SHUT)
async def test_shut_on_one_process_is_shut_on_all(hosts: Hosts, way: str) -> None:
    """What shuts a user out on one process closes sockets on all, and nothing later arrives."""
    code, who, method, path, body = SHUT[way]

    async def chatter(user: User) -> None:
        """Write without a pause, as long as the room is there."""
        while True:
            await user.say(room, "x")

    async with company(hosts[0], "alice", "bob") as (alice, bob):
        room = await alice.room(bob, kind="private")
        async with sockets(room, *map(bob.at, hosts)) as chats:
            tasks = [asyncio.create_task(chatter(alice.at(host))) for host in hosts]
            for chat in chats:
                await chat.hear("message")
            path = path.format(room=room, bob=bob.name)
            await {"alice": alice, "bob": bob}[who].ask(method, path, body)
            began = time.monotonic()
            if code != 4404:
                await alice.say(room, "not for bob")
            assert [await chat.closed() for chat in chats] == [code] * 4
            assert time.monotonic() - began < 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not [chat for chat in chats if chat.heard(message="not for bob")]
        if code == 4403:
            log = await alice.log(room)
            (end,) = [event["seq"] for event in log if event.get("role") == "banned"]
            assert max(number for chat in chats for number in chat.numbers) <= end


# --- Workers


async def test_workers_share_a_port_and_an_end(hosts: Hosts, url: str, tmp_path: Path) -> None:
    """Three workers answer on one port, say once that they listen, and stop in order."""
    async with (
        company(hosts[0], "alice") as (alice,),
        running(tmp_path, url, "--workers=3") as (process,),
        sockets(await alice.room(), *[alice.at(process)] * 12) as chats,
    ):
        await quick(chats, 8)
        assert await process.end() == 0
        assert [await chat.closed() for chat in chats] == [1001] * 12
        assert process.out.read_text().count("listening") == 1
        with pytest.raises(aiohttp.ClientConnectionError):
            await alice.at(process).ask("GET", "/healthz")


@pytest.mark.parametrize("victim", ["a worker", "the parent"])
async def test_if_one_dies_all_stop(hosts: Hosts, url: str, tmp_path: Path, victim: str) -> None:
    """After kill -9 of a worker or their parent, under load, all are gone within 5 s, code > 0."""
    async with (
        running(tmp_path, url, "--workers=3", clean=False) as (process,),
        company(hosts[0], "alice") as users,
        trying([process, hosts[1]], users) as trial,
    ):
        await until(lambda: len(session_of(process.pid)) == 4, "three workers")
        await trial.more(100)
        workers = session_of(process.pid) - {process.pid}
        os.kill(min(workers) if victim == "a worker" else process.pid, signal.SIGKILL)
        await until(lambda: not session_of(process.pid), "the end of all", 5)
        code = await process.over()
        assert code > 0 or (victim != "a worker" and code == -signal.SIGKILL)
        trial.processes = [hosts[1]]
        await trial.more(100)


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_no_worker_survives_a_stop(url: str, tmp_path: Path, count: int) -> None:
    """SIGTERM between two forks, or just after the last, leaves nothing behind."""
    process = Process(tmp_path, database_url=url, secret_key=KEY, port=0, workers=3)
    try:
        while len(session_of(process.pid)) <= count:
            assert process.popen.poll() is None, process.log
            await asyncio.sleep(0)
        assert await process.end() in (0, -signal.SIGTERM)
        is_clean(process.log)
    finally:
        process.kill()


async def test_a_start_waits_for_no_vacuum(hosts: Hosts, url: str, tmp_path: Path) -> None:
    """A start waits for no VACUUM or ANALYZE that runs on the log, nor holds up others for it."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE")
            async with running(tmp_path, url) as (new,), company(new, "alice") as (alice,):
                await alice.at(hosts[0]).say("1", "meanwhile")
    finally:
        await connection.close()
