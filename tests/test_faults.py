"""Every fault that can be made: what was acknowledged stays, and the server heals by itself."""

import asyncio
import itertools
import random
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests import postgres
from tests.checker import Trial, trying
from tests.conftest import Databases
from tests.people import Chat, User, company, handshake
from tests.processes import (
    PROGRAM,
    ROOT,
    Process,
    Wire,
    cut_connections,
    descriptors,
    memory,
    running,
)
from tests.words import PASSWORD, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]


@asynccontextmanager
async def under_load(
    folder: Path, url: str, *, program: Path = PROGRAM, count: int = 1
) -> AsyncIterator[tuple[list[Process], list[User], Trial]]:
    """Run processes under load; afterwards no promise is broken."""
    async with (
        running(folder, url, count=count, program=program) as processes,
        company(processes[0], "alice", "bob") as users,
        trying(processes, users, counts=(12, 8)) as trial,
    ):
        yield processes, users, trial


@asynccontextmanager
async def talking(
    folder: Path, url: str = "", **settings: Any
) -> AsyncIterator[tuple[Process, User, Chat]]:
    """Run one process, on SQLite if nothing else is said, with somebody in the Lobby."""
    async with (
        running(folder, url or f"sqlite:///{folder}/chat.db", **settings) as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        yield process, alice, chat


async def try_send(chat: Chat, client_id: str, patience: float = 10) -> Any:
    """Send a message; return its event or ack, or the error that says that nothing is stored."""
    await chat.send(message="x" * 3000, client_id=client_id)
    answer = await chat.hears(client_id=client_id, patience=patience)
    assert answer["type"] != "error" or answer["error"] == "unavailable"
    return answer


async def insist(chat: Chat, client_id: str, patience: float) -> Any:
    """Send a message until it is stored; return its event or ack."""
    async with asyncio.timeout(patience):
        while (answer := await try_send(chat, client_id))["type"] == "error":
            await asyncio.sleep(0.1)
    return answer


async def latency(chat: Chat, seconds: float) -> list[float]:
    """Say something again and again for some time; return how long each took to come back."""
    waits, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        sent = time.monotonic()
        await chat.say("quick")
        waits.append(time.monotonic() - sent)
        await asyncio.sleep(0.02)
    return waits


# --- Processes that die or freeze


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_whatever_ends_a_process_loses_nothing(
    engine: str, new_database: Databases, tmp_path: Path, how: signal.Signals
) -> None:
    """Under load processes are ended again and again, one or all, SIGTERM within 5 s, with 0."""
    chance, count = random.Random(12), 1 if engine == "sqlite" else 3  # noqa: S311
    async with under_load(tmp_path, new_database(tmp_path), count=count) as (processes, _, trial):
        for number in range(6):
            await trial.more(chance.randrange(20, 150))
            victims = processes if number % 3 == 2 else [chance.choice(processes)]
            for victim in victims:
                victim.popen.send_signal(how)
            for victim in victims:
                assert await victim.over() == (0 if how == signal.SIGTERM else -how), victim.log
                await victim.again()
        await trial.more(50)


# Kills its process before or after the COMMIT at which a file says so.
KILLER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import aiosqlite, asyncpg, chatserver
def fatal(execute):
    async def run(self, *work, **more):
        commit = "commit" in str(work[:2]).lower() and os.path.exists("when")
        when = open("when").read() if commit else ""
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = await execute(self, *work, **more)
        if when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return run
aiosqlite.Connection._execute = fatal(aiosqlite.Connection._execute)
asyncpg.Connection.execute = fatal(asyncpg.Connection.execute)
chatserver.main()
"""


@pytest.mark.parametrize("when", ["before", "after"])
async def test_kill_9_around_a_commit(new_database: Databases, tmp_path: Path, when: str) -> None:
    """Killed just before its commit, or between it and the fan-out, a batch is there once."""
    program, switch = tmp_path / "killer.py", tmp_path / "when"
    program.write_text(KILLER)
    url = new_database(tmp_path)
    async with under_load(tmp_path, url, program=program) as ((process,), _, trial):
        for _ in range(4):
            await trial.more(30)
            switch.write_text(when)
            assert await process.over() == -signal.SIGKILL
            switch.unlink()
            await process.again()
        await trial.more(30)


async def test_a_frozen_process_holds_up_nobody(postgres_url: str, tmp_path: Path) -> None:
    """Beside it all goes on; thawed it delivers nothing from after a ban, an end or a log-out."""
    async with (
        under_load(tmp_path, postgres.create_database(postgres_url), count=3) as run,
        company(run[0][0], "alice", "banned", "left", "deleted") as users,
        AsyncExitStack() as stack,
    ):
        (_, other, frozen), _, trial = run
        alice, banned, left, deleted = users
        room, doomed = await alice.room(banned, left), await alice.room(deleted)
        pairs = [(banned, room), (left, room), (deleted, doomed)]
        chats = [await stack.enter_async_context(u.at(frozen).chat(r)) for u, r in pairs]
        await trial.more(100)
        async with frozen.frozen(), alice.at(other).chat(room) as chat:
            trial.processes = trial.processes[:2]
            await alice.ask("PUT", f"/rooms/{room}/members/{banned.name}", {"role": "banned"})
            await left.ask("POST", "/auth/logout")
            await alice.ask("DELETE", f"/rooms/{doomed}")
            waits = await latency(chat, 8)
        assert [await chat.closed(4) for chat in chats] == [4403, 4401, 4404]
        assert not [chat for chat in chats if chat.heard(message="quick")]
        assert max(waits) < 2.5, "at first a transaction of the frozen process may be waited for"
        assert statistics.median(waits) < 0.2
        await trial.more(100)


# --- SQLite's file and disk


async def test_a_file_that_cannot_grow_loses_nothing(tmp_path: Path) -> None:
    """While nothing can be written sends are refused and reading goes on; with room all heals."""
    async with talking(tmp_path) as (process, alice, chat):
        limit = partial(resource.prlimit, process.pid, resource.RLIMIT_FSIZE)
        unlimited = limit()
        largest = max(path.stat().st_size for path in tmp_path.glob("chat.db*"))
        limit((largest + 400_000, unlimited[1]))
        for number in itertools.count():
            if (await try_send(chat, f"c{number}"))["type"] == "error":
                break
        limit((20_000, unlimited[1]))  # what is less than a message might still have fitted
        await alice.ask("POST", "/rooms/1/messages", {"message": "x" * 3000}, status=503)
        log = await alice.log("1")
        assert [event.get("client_id") for event in log[1:]] == [f"c{n}" for n in range(number)]
        assert number > 5
        limit(unlimited)
        assert (await try_send(chat, f"c{number}"))["seq"] == log[-1]["seq"] + 1
        await process.again()
        assert (await alice.log("1"))[:-1] == log
        process.kill()
        with closing(sqlite3.connect(tmp_path / "chat.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("back", [False, True])
async def test_a_file_that_is_gone_stops_acknowledgements(tmp_path: Path, *, back: bool) -> None:
    """While its database file is away, or another one, the server acknowledges nothing more."""
    path, away = tmp_path / "chat.db", tmp_path / "away.db"
    async with talking(tmp_path) as (process, alice, chat):
        await chat.say("stored")
        path.rename(away)
        if not back:
            shutil.copy(away, path)
        async with asyncio.timeout(5):  # it may look once a second or so
            for number in itertools.count():
                if (answer := await try_send(chat, f"c{number}"))["type"] == "error":
                    break
                await asyncio.sleep(0.1)
        await alice.ask("GET", "/healthz", status=503)
        if back:
            away.rename(path)
            await insist(chat, answer["client_id"], 5)
            await alice.ask("GET", "/healthz")
            await process.again()
            log = await alice.log("1")
            assert log[1]["message"] == "stored" and log[-1]["client_id"] == answer["client_id"]


# --- A Postgres that breaks


async def test_a_postgres_that_dies_comes_back(cluster: postgres.Cluster, tmp_path: Path) -> None:
    """While Postgres is gone for 5 s all sockets live and all sends are refused; then all heals."""
    async with (
        under_load(tmp_path, cluster.url, count=2) as (processes, (alice, bob), trial),
        alice.chat("1") as one,
        bob.at(processes[1]).chat("1") as two,
    ):
        await trial.more(50)
        await asyncio.to_thread(cluster.stop)
        down = time.monotonic()
        for chat, user in ((one, alice), (two, bob.at(processes[1]))):
            assert (await try_send(chat, "refused"))["type"] == "error"
            await user.ask("POST", "/rooms/1/messages", {"message": "refused"}, status=503)
            await user.ask("GET", "/healthz", status=503)
        await until(lambda: time.monotonic() - down > 5, "5 s")
        await asyncio.to_thread(cluster.start)
        await trial.more(50, patience=8)
        sent = await one.say("it has healed")
        assert await two.hears("it has healed") == sent
        await alice.ask("GET", "/healthz")
    assert len(processes[0].log) < 20_000, "it does not log every failure"


async def test_a_postgres_that_hangs_holds_up_nobody(postgres_url: str, tmp_path: Path) -> None:
    """Of a database that answers nothing sends are told in time, sockets live, SIGTERM works."""
    async with (
        Wire(postgres.create_database(postgres_url)) as wire,
        talking(tmp_path, wire.url) as (process, alice, chat),
    ):
        wire.stalled = True
        assert (await try_send(chat, "void", 40))["type"] == "error"
        wire.stalled = False
        answer = await insist(chat, "void", 15)
        log = await alice.log("1")
        assert [e["seq"] for e in log if e.get("client_id") == "void"] == [answer["seq"]]
        wire.stalled = True
        await chat.send(message="the last")
        assert tuple(await asyncio.gather(process.end(), chat.closed())) == (0, 1001)


async def test_cut_connections_make_no_false_ack(postgres_url: str, tmp_path: Path) -> None:
    """Cut before or after a COMMIT took effect, or all at once, again and again, all heals."""
    url = postgres.create_database(postgres_url)
    async with (
        Wire(url) as wire,
        under_load(tmp_path, wire.url) as (_, (alice, _), trial),
        alice.chat("1") as chat,
    ):
        for side in ["request", "answer"] * 6:
            wire.lose = side
            await until(lambda: not wire.lose, "a commit that is lost")
            await trial.more(10)
        for _ in range(30):
            await cut_connections(url)
            await asyncio.sleep(0.1)
        await trial.more(50, patience=5)
        await chat.say("still here")


# --- Too much of everything


async def test_descriptors_that_run_out_hurt_only_who_comes(tmp_path: Path) -> None:
    """With no descriptor left those who are in go on, the log stays short; later all is well."""
    async with talking(tmp_path) as (process, alice, chat):
        url, before = URL(process.url), descriptors(process.pid)
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (before + 10, unlimited[1]))
        peers = [socket.create_connection((url.host, url.port), 5) for _ in range(60)]
        await until(lambda: descriptors(process.pid) >= before + 10, "the last descriptor")
        assert max(await latency(chat, 3)) < 1
        for peer in peers:
            peer.close()
        await alice.ask("GET", "/healthz")
        await until(lambda: descriptors(process.pid) <= before + 3, "the descriptors")
        await latency(chat, 1.5)  # after a second asyncio looks for newcomers again
        assert len(process.log) < 20_000


async def flood(user: User) -> None:
    """Send until one is refused, ping until one is thrown out, log in sixty times at once."""
    async with user.chat("1") as chat:
        for number in range(300):
            await chat.send(message="spam", client_id=f"{number}")
        await chat.hears(error="rate_limited")
        with suppress(ConnectionError):
            for _ in range(20_000):
                await chat.ws.ping(b"x" * 100)
        assert await chat.closed() in (4429, 1006)
    form = {"username": user.name, "password": PASSWORD}
    logins = [user.session.post(f"{user.place.url}/auth/token", data=form) for _ in range(60)]
    assert {200, 503} == {answer.status for answer in await asyncio.gather(*logins)}


async def test_a_flood_disturbs_nobody_else(tmp_path: Path) -> None:
    """Whoever floods the server is refused or thrown out, and others hardly notice."""
    async with (
        talking(tmp_path, strict=False, messages_per_second=50) as (process, _, chat),
        company(process, "mallory") as (mallory,),
    ):
        task, waits = asyncio.create_task(flood(mallory)), list[float]()
        while not task.done() or len(waits) < 50:
            waits += await latency(chat, 0.5)
        await task
        assert statistics.median(waits) < 0.2, waits
        assert max(waits) < 1.5, waits


async def again_and_again(chat: Chat, pause: float, *frames: Any) -> None:
    """Send frames without an end, while what comes is read and forgotten."""
    while True:
        await asyncio.gather(*(chat.send(**frame) for frame in frames))
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                while True:
                    await chat.next()
                    chat.frames.clear()


async def test_readers_that_stop_are_cut_off_and_really_freed(tmp_path: Path) -> None:
    """In a busy room and in one of whispers they cost little, others nothing, and then they go."""
    # Has the C library give back what Python has freed, so that it can be seen.
    exact: dict[str, Any] = {"malloc_mmap_threshold_": 8192, "malloc_trim_threshold_": 65536}
    async with (
        talking(tmp_path, strict=False, **exact) as (process, alice, chat),
        company(process, *["typist"] * 12) as typists,
        AsyncExitStack() as stack,
    ):
        busy, quiet = await alice.room(), await alice.room()
        shouter = await stack.enter_async_context(alice.chat(busy))
        chats = [await stack.enter_async_context(typist.chat(quiet)) for typist in typists]
        work = [again_and_again(chat, 0.06, {"type": "typing"}) for chat in chats]
        work.append(again_and_again(shouter, 0.05, *[{"message": "x" * 4000}] * 10))
        tasks = [asyncio.create_task(each) for each in work]
        await latency(chat, 1)
        before, used = descriptors(process.pid), memory(process.pid)
        for room in [busy, quiet] * 30:
            stack.enter_context(handshake(alice, room))
        waits, most, began = [], 0, time.monotonic()
        while descriptors(process.pid) > before:
            waits += await latency(chat, 0.5)
            most = max(most, memory(process.pid))
            assert time.monotonic() - began < 60, "they are still there"
        assert not [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most - used < 60 * 2**20
        assert memory(process.pid) - used < 4 * 2**20
        assert statistics.median(waits) < 0.1
        assert max(waits) < 1


async def test_a_thousand_resume_at_once(new_database: Databases, tmp_path: Path) -> None:
    """Each gets what it missed once and goes live, and others' messages hardly wait."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 20_000), most))
    async with talking(tmp_path, new_database(tmp_path), strict=False) as (_, alice, chat):
        for number in range(300):
            await chat.send(message=f"missed {number}", client_id=f"{number}")
        head = (await chat.hears(client_id="299"))["seq"]

        async def resume(number: int) -> None:
            """Come back after the last hundred or so; the socket holds that all come, in order."""
            async with alice.chat("1", f"?after={head - 100 - number % 7}") as mine:
                await mine.hears("live", 40)

        began = time.monotonic()
        tasks = [asyncio.create_task(resume(number)) for number in range(1000)]
        waits = await latency(chat, 2)
        while not all(task.done() for task in tasks):
            await chat.send(message="live")
            await asyncio.wait(tasks, timeout=1)
            assert time.monotonic() - began < 40
        await asyncio.gather(*tasks)
        assert max(waits) < 6, "one loop is also the thousand's"


# --- Clocks

CLOCK = f"""
import pathlib, sys, time
from datetime import datetime
sys.path.insert(0, {str(ROOT)!r})
import chatserver, jwt.api_jwt
real = time.time
time.time = lambda: real() + float(pathlib.Path("offset").read_text())
class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
jwt.api_jwt.datetime = Clock
chatserver.main()
"""


async def test_a_clock_that_steps_logs_nobody_out(tmp_path: Path) -> None:
    """An hour back tokens stay good and numbers go on; two hours ahead what has expired closes."""
    offset, program = tmp_path / "offset", tmp_path / "clock.py"
    offset.write_text("0")
    program.write_text(CLOCK)
    async with talking(tmp_path, program=program) as (_, alice, chat):
        await chat.say("before")
        offset.write_text("-3600")
        await chat.say("an hour ago")
        assert (await alice.say("1", "by post"))["seq"] == 4
        assert (await alice.ask("POST", "/auth/renew"))["access_token"]
        offset.write_text("7200")
        assert await chat.closed(4) == 4401
        await alice.ask("GET", "/users/me", status=401)
