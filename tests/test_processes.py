"""Several processes on one Postgres are one server, whoever dies or freezes."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests import postgres
from tests.checker import trying
from tests.people import Chat, User, company
from tests.processes import Process, Wire, cut_connections, running, session_of
from tests.words import unique, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]

Hosts = list[Process]


@pytest.fixture(scope="module")
def url(postgres_url: str) -> str:
    """Give the database of all tests of this file."""
    return postgres.create_database(postgres_url)


@pytest.fixture(scope="module")
async def hosts(url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosts]:
    """Run four processes for all tests of this file, started at once on an empty database."""
    async with running(tmp_path_factory.mktemp("hosts"), url, count=4) as processes:
        yield processes


@asynccontextmanager
async def sockets(room: str, *users: User) -> AsyncIterator[list[Chat]]:
    """Open sockets to a room; each holds that every number comes once, in order."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(user.chat(room)) for user in users]


async def sees(user: User, room: str, *others: User) -> None:
    """Wait until a process tells a user that just these others are online in a room, too."""
    async with asyncio.timeout(15):
        while True:
            async with user.chat(room) as chat:
                if {*chat.hello["online"]} == {one.name for one in (user, *others)}:
                    return
            await asyncio.sleep(0.1)


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


# --- Wake-ups


async def batter(url: str) -> None:
    """Cut off every listener without a pause."""
    while True:
        await cut_connections(url, "(query ILIKE 'listen%' OR query ILIKE '%pg_notify%')")


async def test_without_wake_ups_the_poll_delivers(hosts: Hosts, url: str, tmp_path: Path) -> None:
    """Silent listeners, and those cut off, hold up no send: the poll tells it, then new ones do."""
    async with (
        Wire(url) as wire,
        running(tmp_path, wire.url) as (process,),
        company(hosts[0], "alice") as (alice,),
        sockets(await alice.room(), alice, alice.at(process)) as chats,
    ):
        await quick(chats, 5)
        wire.muted = {*wire.listening}
        assert len(wire.muted) == 1
        async with asyncio.timeout(1.5):
            await chats[1].say("beside")
        assert await cross(chats) < 6
        await quick(chats, 15)
        storm = asyncio.create_task(batter(url))
        assert await cross(chats) < 6
        storm.cancel()
        await quick(chats, 8)


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
                await sees(bob.at(hosts[2]), room, alice)
        async with bob.at(hosts[2]).chat(rooms[0]) as here:
            await quick([chats[0], here], 1)


async def test_who_is_on_a_dead_or_frozen_process_is_offline_soon(hosts: Hosts) -> None:
    """Users of a killed or a frozen process go offline within 15 s; thawed, theirs are back."""
    _, other, dead, frozen = hosts
    async with company(hosts[0], "alice", "bob", "carol") as (alice, bob, carol):
        room = await alice.room(bob, carol)
        async with sockets(room, alice, bob.at(dead), carol.at(frozen)) as (hers, _, carols):
            await sees(alice, room, bob, carol)
            async with frozen.frozen():
                dead.kill()
                await sees(alice, room)
                await sees(alice.at(other), room)  # each process finds out by itself
            await dead.again()
            await sees(alice, room, carol)
            await quick([hers, carols], 10)


# --- Shut means shut, everywhere


@pytest.mark.parametrize("code", [4401, 4403, 4404])
async def test_shut_on_one_process_is_shut_on_all(hosts: Hosts, code: int) -> None:
    """Log-out, ban and end of a room close sockets on all processes; nothing later arrives."""
    async with company(hosts[0], "alice", "bob") as (alice, bob):
        room = await alice.room(bob, kind="private")
        async with sockets(room, *map(bob.at, hosts)) as chats:
            await alice.say(room, "for all")
            for chat in chats:
                await chat.hears("for all")
            if code == 4401:
                await bob.ask("POST", "/auth/logout")
            elif code == 4403:
                await alice.ask("PUT", f"/rooms/{room}/members/{bob.name}", {"role": "banned"})
            else:
                await alice.ask("DELETE", f"/rooms/{room}")
            for host in hosts if code != 4404 else ():
                await alice.at(host).say(room, "not for bob")
            assert [await chat.is_closed(3) for chat in chats] == [code] * 4
        assert not [chat for chat in chats if chat.heard(message="not for bob")]


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
        assert [await chat.is_closed() for chat in chats] == [1001] * 12
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


async def test_a_start_waits_for_no_vacuum(hosts: Hosts, url: str, tmp_path: Path) -> None:
    """A start waits for no VACUUM or ANALYZE that runs on the log, nor holds up others for it."""
    vacuum = await asyncpg.connect(url)
    async with vacuum.transaction():
        await vacuum.execute("LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE")
        async with running(tmp_path, url) as (new,), company(new, "alice") as (alice,):
            await alice.at(hosts[0]).say("1", "meanwhile")
    await vacuum.close()
