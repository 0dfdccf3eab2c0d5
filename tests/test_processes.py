"""Several processes on one Postgres are one server, whoever dies or freezes."""

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import asyncpg
import jwt
import pytest

from tests import postgres
from tests.checker import Trial
from tests.people import Chat, User, company
from tests.processes import Process, Wire, cut_connections, is_clean, running, session_of
from tests.words import KEY, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]

LISTENERS = "(query ILIKE 'listen%' OR query ILIKE '%pg_notify%')"


class Hosts(NamedTuple):
    """Four processes on one database, and how to reach it."""

    processes: list[Process]
    url: str


@pytest.fixture(scope="module")
async def hosts(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Hosts]:
    """Run four processes for all tests of this file that do not need their own."""
    url, folder = postgres.create_database(postgres_url), tmp_path_factory.mktemp("hosts")
    async with running(folder, url, count=4) as processes:
        yield Hosts(processes, url)


@asynccontextmanager
async def sockets(*pairs: tuple[User, str]) -> AsyncIterator[list[Chat]]:
    """Open a socket for each pair of a user and a room."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(user.chat(room)) for user, room in pairs]


async def epoch(user: User) -> str:
    """Return the epoch that a process tells."""
    async with user.chat("1") as chat:
        return str(chat.hello["epoch"])


async def online(user: User, room: str) -> list[str]:
    """Return who is online in a room, as a process tells."""
    async with user.chat(room) as chat:
        return list(chat.hello["online"])


@asynccontextmanager
async def back_after(process: Process) -> AsyncIterator[None]:
    """Start a process again once the block is over, however that went: others need it."""
    try:
        yield
    finally:
        process.start()
        await process.ready()


def everywhere(hosts: Hosts, user: User) -> list[User]:
    """Return a user at each of the processes."""
    return [user.at(process) for process in hosts.processes]


async def cross(chats: Sequence[Chat]) -> float:
    """Send a message from every socket to all; return how long it took in all."""
    began = time.monotonic()
    seqs = [(await chat.deliver("cross"))["seq"] for chat in chats]
    for chat in chats:
        while not chat.numbers or chat.numbers[-1] < max(seqs):
            await chat.next()
    return time.monotonic() - began


async def quick(chats: Sequence[Chat], patience: float) -> None:
    """Wait until messages cross by wake-ups again, not by the poll."""
    async with asyncio.timeout(patience):
        while await cross(chats) > 0.5:
            pass


def whole(chat: Chat) -> bool:
    """Return whether a socket saw every number since its hello once, in order."""
    return chat.numbers == list(
        range(chat.hello["seq"] + 1, chat.hello["seq"] + 1 + len(chat.numbers))
    )


# --- Together


async def test_processes_that_start_at_once_make_one_database(
    postgres_url: str, tmp_path: Path
) -> None:
    """Five processes that start at the same moment on an empty database agree on everything."""
    url = postgres.create_database(postgres_url)
    async with (
        running(tmp_path, url, count=5) as processes,
        company(processes[0], "first") as (first,),
    ):
        logs = [await first.at(process).log("1") for process in processes]
        assert all(log == logs[0] for log in logs)
        assert [event["role"] for event in logs[0]] == ["owner"]
        assert len({await epoch(first.at(process)) for process in processes}) == 1


async def test_four_processes_keep_every_promise(hosts: Hosts) -> None:
    """Writers and readers who drop and resume anywhere see one log; what was told is there once."""
    async with company(hosts.processes[0], "alice", "bob", "carol") as users:
        room = await users[0].room(*users[1:])
        trial = Trial(hosts.processes, users, room, counts=(24, 16))
        async with trial:
            await trial.more(1500)
    assert trial.problems == []
    assert len(trial.record.ok) >= 1500


# --- Wake-ups


async def test_without_wake_ups_the_poll_delivers(hosts: Hosts) -> None:
    """While every listener is cut off again and again messages cross within a few seconds."""
    async with company(hosts.processes[0], "alice") as (alice,):
        room = await alice.room()
        async with sockets(*((user, room) for user in everywhere(hosts, alice))) as chats:

            async def batter() -> None:
                """Cut off every listener without a pause."""
                while True:
                    await cut_connections(hosts.url, LISTENERS)

            storm = asyncio.create_task(batter())
            assert await cross(chats[:2]) < 6
            storm.cancel()
            await quick(chats, 8)
            assert all(map(whole, chats))


async def test_a_listener_that_falls_silent_is_replaced(hosts: Hosts, tmp_path: Path) -> None:
    """A silent listening connection holds up no send; the poll stands in, then a new connection."""
    async with (
        Wire(hosts.url) as wire,
        running(tmp_path, wire.url) as (process,),
        company(hosts.processes[0], "alice") as (alice,),
    ):
        room = await alice.room()
        async with sockets((alice, room), (alice.at(process), room)) as chats:
            await quick(chats, 5)
            assert wire.mute_listeners() == 1
            began = time.monotonic()
            await chats[1].deliver("beside")
            assert time.monotonic() - began < 1.5
            assert await cross(chats) < 6
            await quick(chats, 15)
            assert all(map(whole, chats))


async def clone(hosts: Hosts, user: User, count: int) -> list[User]:
    """Return users with the longest names, made beside the server, for hashing takes long."""
    claims = jwt.decode(user.token, KEY, ["HS256"])
    names = [f"{number:03}-{secrets.token_hex(14)}" for number in range(count)]
    copy = """INSERT INTO users (username, email, password, version, created_at)
        SELECT name, name || '@example.org', password, version, created_at
        FROM users, unnest($1::text[]) AS name WHERE username = $2"""
    await postgres.read(hosts.url, copy, names, user.name)
    tokens = [jwt.encode({**claims, "sub": name}, KEY, "HS256") for name in names]
    return [
        user._replace(name=name, token=token) for name, token in zip(names, tokens, strict=True)
    ]


async def test_a_burst_of_whispers_is_told_however_long(hosts: Hosts) -> None:
    """Who is online in a room of long names, more than one NOTIFY can hold, is known elsewhere."""
    async with company(hosts.processes[0], "alice") as (alice,), AsyncExitStack() as stack:
        room = await alice.room(room_id=f"r{secrets.token_hex(4)}".ljust(64, "x"))
        users = await clone(hosts, alice, 90)
        there = [user.at(hosts.processes[1]).chat(room) for user in users]
        chats = await asyncio.gather(*map(stack.enter_async_context, there))
        here = await stack.enter_async_context(alice.chat(room))
        await asyncio.gather(*(chat.send(type="typing") for chat in chats))
        for user in users[::10]:
            await here.hear_any("typing", username=user.name)
        names = {user.name for user in [alice, *users]}
        async with asyncio.timeout(8):
            while set(await online(alice.at(hosts.processes[2]), room)) != names:
                await asyncio.sleep(0.1)
        began = time.monotonic()
        await chats[0].deliver("and the listener lives")
        await here.hear("message", message="and the listener lives")
        assert time.monotonic() - began < 1


async def test_who_is_on_a_dead_or_frozen_process_is_offline_soon(hosts: Hosts) -> None:
    """Users of a killed or a frozen process go offline within 15 s; thawed, theirs are back."""
    async with company(hosts.processes[0], "alice", "bob", "carol") as (alice, bob, carol):
        room = await alice.room(bob, carol)
        dead, frozen = hosts.processes[2:]
        async with sockets((alice, room), (bob.at(dead), room), (carol.at(frozen), room)) as chats:
            hers = chats[0]
            for user in (bob, carol):
                await hers.hear_any("presence", username=user.name, online=True)
            async with frozen.frozen(), back_after(dead):
                dead.kill()
                for user in (bob, carol):
                    await hers.hear_any("presence", 15, username=user.name, online=False)
                # Each process finds out by itself.
                async with asyncio.timeout(15):
                    while await online(alice.at(hosts.processes[1]), room) != [alice.name]:
                        await asyncio.sleep(0.1)
            await hers.hear("presence", 15, username=carol.name, online=True)
            await quick([hers, chats[2]], 10)
            assert whole(hers) and whole(chats[2])


# --- Shut means shut, everywhere

MEMBER = "/rooms/{room}/members/{bob}"
PASSWORDS = {"password": "1234", "new_password": "4321"}
SHUT: dict[str, tuple[int, str, str, str, Any]] = {
    "log out": (4401, "bob", "POST", "/auth/logout", None),
    "change the password": (4401, "bob", "POST", "/auth/password", PASSWORDS),
    "end the account": (4401, "bob", "DELETE", "/users/me", {"password": "1234"}),
    "remove": (4403, "alice", "DELETE", MEMBER, None),
    "ban": (4403, "alice", "PUT", MEMBER, {"role": "banned"}),
    "delete the room": (4404, "alice", "DELETE", "/rooms/{room}", None),
}


@pytest.mark.parametrize("way", SHUT)
async def test_shut_on_one_process_is_shut_on_all(hosts: Hosts, way: str) -> None:
    """What shuts a user out on one process closes sockets on all, and nothing later arrives."""
    code, who, method, path, body = SHUT[way]
    async with company(hosts.processes[0], "alice", "bob") as (alice, bob):
        room = await alice.room(bob, kind="private")
        path = path.format(room=room, bob=bob.name)
        pages: list[Any] = []

        async def chatter(user: User) -> None:
            """Write without a pause, as long as the room is there."""
            while True:
                await user.say(room, "x")

        async def page(user: User) -> None:
            """Read pages of the log without a pause, as long as one may."""
            while True:
                pages.append(await user.ask("GET", f"/rooms/{room}/messages?limit=5"))

        async with sockets(*((user, room) for user in everywhere(hosts, bob))) as chats:
            work = [chatter(user) for user in everywhere(hosts, alice)]
            work += [page(user) for user in everywhere(hosts, bob)]
            tasks = [asyncio.create_task(each) for each in work]
            for chat in chats:
                await chat.hear("message")
            await {"alice": alice, "bob": bob}[who].ask(method, path, body)
            began = time.monotonic()
            if code != 4404:
                await alice.say(room, "not for bob")
            for chat in chats:
                assert await chat.closed() in ({4401, 4403} if "account" in way else {code})
                assert not [frame for frame in chat.frames if frame.get("message") == "not for bob"]
            assert time.monotonic() - began < 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if code == 4403:
            log = await alice.log(room)
            end = max(event["seq"] for event in log if event.get("member") == bob.name)
            seen = [event for page in pages for event in page]
            assert max(event["seq"] for event in seen) <= end
            assert max(number for chat in chats for number in chat.numbers) <= end


# --- Workers


async def test_workers_share_a_port_and_end_together(hosts: Hosts, tmp_path: Path) -> None:
    """Three workers answer on one port, say once that they listen, and stop in order."""
    async with (
        company(hosts.processes[0], "alice") as (alice,),
        running(tmp_path, hosts.url, "--workers=3") as (process,),
    ):
        room = await alice.room()
        async with sockets(*([(alice.at(process), room)] * 12)) as chats:
            await quick(chats, 8)
            assert await process.end() == 0
            for chat in chats:
                assert await chat.closed() == 1001
                assert whole(chat)
        assert process.out.read_text().count("listening") == 1
        with pytest.raises(aiohttp.ClientConnectionError):
            await alice.at(process).ask("GET", "/healthz")


@pytest.mark.parametrize("victim", ["a worker", "the parent"])
async def test_when_one_dies_unasked_all_stop(hosts: Hosts, tmp_path: Path, victim: str) -> None:
    """After kill -9 of a worker or their parent, under load, all are gone within 5 s, code > 0."""
    async with (
        company(hosts.processes[0], "alice") as (alice,),
        running(tmp_path, hosts.url, "--workers=3", clean=False) as (process,),
    ):
        room = await alice.room()
        await until(lambda: len(session_of(process.pid)) == 4, "three workers")
        trial = Trial([process, hosts.processes[1]], [alice], room)
        async with trial:
            await trial.more(100)
            workers = session_of(process.pid) - {process.pid}
            os.kill(min(workers) if victim == "a worker" else process.pid, signal.SIGKILL)
            began = time.monotonic()
            await until(lambda: not session_of(process.pid), "the end of all", 5)
            code = await process.over(5 - (time.monotonic() - began))
            assert code > 0 or (victim != "a worker" and code == -signal.SIGKILL)
            trial.processes = [hosts.processes[1]]
            await trial.more(100)
    assert trial.problems == []


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_no_worker_survives_a_stop_at_any_moment(
    hosts: Hosts, tmp_path: Path, count: int
) -> None:
    """SIGTERM between two forks, or just after the last, leaves nothing behind."""
    settings: dict[str, Any] = {"database_url": hosts.url, "secret_key": KEY, "port": 0}
    settings["workers"] = 3
    process = Process(tmp_path, **settings)
    try:
        while len(session_of(process.pid)) <= count:
            assert process.popen.poll() is None, process.log
            await asyncio.sleep(0)
        assert await process.end() in (0, -signal.SIGTERM)
        is_clean(process.log)
    finally:
        process.kill()


async def test_a_process_starts_while_a_table_is_tended(hosts: Hosts, tmp_path: Path) -> None:
    """A start waits for no VACUUM or ANALYZE that runs on the log, nor holds up others for it."""
    connection = await asyncpg.connect(hosts.url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE")
            async with (
                running(tmp_path, hosts.url) as (process,),
                company(process, "alice") as (alice,),
            ):
                await alice.say("1", "meanwhile")
    finally:
        await connection.close()
