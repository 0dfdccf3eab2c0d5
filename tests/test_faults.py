"""Every fault that can be made: what was acknowledged stays, and the server heals by itself."""

import asyncio
import random
import resource
import shutil
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from tests import postgres
from tests.checker import Trial, trying
from tests.conftest import Databases, Start
from tests.people import Chat, User, company, handshake
from tests.processes import PROGRAM, Process, Wire, cut_connections, descriptors, memory, running
from tests.words import PASSWORD, Event, unique, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]


@asynccontextmanager
async def under_load(
    folder: Path, url: str, *, program: Path = PROGRAM, count: int = 1
) -> AsyncIterator[tuple[list[Process], User, Trial]]:
    """Run processes under load, and with alice; afterwards no promise is broken."""
    async with (
        running(folder, url, count=count, program=program) as processes,
        company(processes[0], "alice", "bob") as users,
        trying(processes, users, counts=(12, 8)) as trial,
    ):
        yield processes, users[0], trial


@asynccontextmanager
async def talking(
    folder: Path, url: str = "", **settings: Any
) -> AsyncIterator[tuple[Process, User, Chat]]:
    """Run one process, on SQLite if nothing else is said, with alice in the Lobby."""
    async with (
        running(folder, url or f"sqlite:///{folder}/chat.db", **settings) as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        yield process, alice, chat


async def say_until(kind: str, chat: Chat, patience: float = 10) -> list[Event]:
    """Send messages until one is stored, or is not and gets an error; return all answers."""
    answers: list[Event] = []
    async with asyncio.timeout(patience):
        while not answers or answers[-1]["type"] != kind:
            client_id = unique("id")
            await chat.send(message="x" * 3000, client_id=client_id)
            answers.append(await chat.hears(client_id=client_id, patience=patience))
            assert answers[-1].get("error") in (None, "unavailable")
            await asyncio.sleep(0.02)
    return answers


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

# Kills its process before or after a commit, once a file of its number says so.
KILLER = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import aiosqlite, asyncpg, chatserver
def fatal(execute):
    async def run(self, *work, **more):
        text = str(work[:2]).lower()
        commits = "commit" in text or "insert into events" in text  # which commits itself
        file = pathlib.Path(str(os.getpid()))
        when = file.read_text() if commits and file.exists() else ""
        if when == "after":
            await execute(self, *work, **more)
        if when:
            os.kill(os.getpid(), signal.SIGKILL)
        return await execute(self, *work, **more)
    return run
aiosqlite.Connection._execute = fatal(aiosqlite.Connection._execute)
asyncpg.Connection.execute = fatal(asyncpg.Connection.execute)
chatserver.main()
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "before", "after"])
async def test_whatever_ends_a_process_loses_nothing(
    engine: str, new_database: Databases, tmp_path: Path, how: str
) -> None:
    """Ended again and again, one or all, at random or about a commit, SIGTERM in 5 s with 0."""
    chance, count = random.Random(12), 1 if engine == "sqlite" else 3  # noqa: S311
    program, url = tmp_path / "killer.py", new_database(tmp_path)
    program.write_text(KILLER)
    async with under_load(tmp_path, url, program=program, count=count) as (processes, _, trial):
        for number in range(6):
            await trial.more(chance.randrange(20, 150))
            victims = processes if number % 3 == 2 else [chance.choice(processes)]
            for victim in victims:
                if how in ("before", "after"):
                    (tmp_path / f"{victim.pid}").write_text(how)
                else:
                    victim.popen.send_signal(signal.Signals[how])
            for victim in victims:
                assert await victim.over() == (0 if how == "SIGTERM" else -9), victim.log
                await victim.again()
        await trial.more(50)


async def test_a_frozen_process_holds_up_nobody(postgres_url: str, tmp_path: Path) -> None:
    """Beside it all goes on; thawed it delivers nothing from after a ban or a log-out."""
    url = postgres.create_database(postgres_url)
    async with (
        under_load(tmp_path, url, count=3) as ((first, other, frozen), _, trial),
        company(first, "alice", "banned", "left") as (alice, banned, left),
    ):
        room = await alice.room(banned, left)
        async with banned.at(frozen).chat(room) as one, left.at(frozen).chat(room) as two:
            await trial.more(100)
            async with frozen.frozen(), alice.at(other).chat(room) as chat:
                trial.processes = [first, other]
                await alice.ask("PUT", f"/rooms/{room}/members/{banned.name}", {"role": "banned"})
                await left.ask("POST", "/auth/logout")
                waits = await latency(chat, 8)
            assert (await one.is_closed(), await two.is_closed()) == (4403, 4401)
            assert not one.heard(message="quick") + two.heard(message="quick")
        assert max(waits) < 2.5, "at first a transaction of the frozen process may be waited for"
        assert statistics.median(waits) < 0.2
        await trial.more(100)


# --- SQLite's file and disk


async def test_a_file_that_cannot_grow_or_is_gone_loses_nothing(tmp_path: Path) -> None:
    """While nothing can be written, or the file is away or another, sends are refused; then not."""
    path, away = tmp_path / "chat.db", tmp_path / "away.db"
    async with talking(tmp_path) as (process, alice, chat):
        limit = partial(resource.prlimit, process.pid, resource.RLIMIT_FSIZE)
        unlimited = limit()
        largest = max(file.stat().st_size for file in tmp_path.glob("chat.db*"))
        limit((largest + 400_000, unlimited[1]))
        answers = await say_until("error", chat)
        assert len(answers) > 5 and (await alice.log("1"))[1:] == answers[:-1]
        limit(unlimited)
        answers += await say_until("message", chat)
        path.rename(away)
        answers += await say_until("error", chat)
        shutil.copy(away, path)
        answers += await say_until("error", chat)
        await alice.ask("GET", "/healthz", status=503)
        away.rename(path)
        answers += await say_until("message", chat)
        await process.again()
        assert (await alice.log("1"))[1:] == [answer for answer in answers if "seq" in answer]


# --- A Postgres that breaks


async def test_a_postgres_that_dies_comes_back(cluster: postgres.Cluster, tmp_path: Path) -> None:
    """While Postgres is gone for 5 s all sockets live and all sends are refused; then all heals."""
    async with (
        under_load(tmp_path, cluster.url, count=2) as (processes, alice, trial),
        alice.chat("1") as one,
        alice.at(processes[1]).chat("1") as two,
    ):
        await trial.more(50)
        await asyncio.to_thread(cluster.stop)
        for chat in (one, two):
            await say_until("error", chat)
        await asyncio.sleep(5)
        await asyncio.to_thread(cluster.start)
        await trial.more(50, patience=8)
        sent = await one.say("it has healed")
        assert await two.hears("it has healed") == sent


async def test_a_bad_wire_to_postgres_makes_no_false_ack(postgres_url: str, tmp_path: Path) -> None:
    """Cut about a COMMIT, all at once, or silent: senders are told in time, and SIGTERM works."""
    url = postgres.create_database(postgres_url)
    async with Wire(url) as wire:
        async with under_load(tmp_path, wire.url) as (_, _, trial):
            for side in ["request", "answer"] * 6:
                wire.lose = side
                await until(lambda: not wire.lose, "a commit that is lost")
                await trial.more(10)
            for _ in range(30):
                await cut_connections(url)
                await asyncio.sleep(0.1)
            await trial.more(50, patience=5)
        async with talking(tmp_path, wire.url) as (process, _, chat):
            wire.stalled = True
            await say_until("error", chat, 40)
            wire.stalled = False
            await say_until("message", chat, 15)
            wire.stalled = True
            await chat.send(message="the last")
            assert tuple(await asyncio.gather(process.end(), chat.is_closed())) == (0, 1001)


# --- Too much of everything


async def test_a_flood_disturbs_nobody_else(tmp_path: Path) -> None:
    """Of messages, log-ins and connections too many are refused; others hardly notice."""
    async with (
        talking(tmp_path, strict=False, messages_per_second=50) as (process, alice, chat),
        company(process, "mallory") as (mallory,),
        mallory.chat("1") as spam,
    ):
        talk = asyncio.create_task(latency(chat, 8))
        for _ in range(300):
            await spam.send(message="spam")
        await spam.hears(error="rate_limited")
        url, form = URL(process.url), {"username": mallory.name, "password": PASSWORD}
        logins = [mallory.session.post(url / "auth/token", data=form) for _ in range(60)]
        assert {200, 503} == {answer.status for answer in await asyncio.gather(*logins)}
        most = descriptors(process.pid) + 10
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, most))
        peers = [socket.create_connection((url.host, url.port), 5) for _ in range(30)]
        await until(lambda: descriptors(process.pid) >= most, "the last descriptor")
        waits = await talk + await latency(chat, 2)
        for peer in peers:
            peer.close()
        handshake(alice, "1").close()
        await latency(chat, 1.5)  # asyncio looks for newcomers again after a second
        assert len(process.log) < 20_000
        assert statistics.median(waits) < 0.2 and max(waits) < 1.5, waits


async def chatter(chat: Chat, *frames: Any) -> None:
    """Send frames again and again, while what comes is read and forgotten."""
    while True:
        for frame in frames:
            await chat.send(**frame)
        with suppress(TimeoutError):
            await chat.is_closed(0.06)
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
        work = [chatter(shouter, *[{"message": "x" * 4000}] * 10)]
        work += [chatter(chat, {"type": "typing"}) for chat in chats]
        tasks = [asyncio.create_task(each) for each in work]
        waits, most = await latency(chat, 1), 0
        before, used = descriptors(process.pid), memory(process.pid)
        for room in [busy, quiet] * 30:
            stack.enter_context(handshake(alice, room))
        async with asyncio.timeout(60):
            while descriptors(process.pid) > before:
                waits += await latency(chat, 0.5)
                most = max(most, memory(process.pid))
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most - used < 60 * 2**20
        assert memory(process.pid) - used < 4 * 2**20
        assert statistics.median(waits) < 0.1 and max(waits) < 1, waits


async def test_hundreds_resume_at_once(new_database: Databases, tmp_path: Path) -> None:
    """Each gets what it missed once and goes live, and others' messages hardly wait."""
    async with (
        talking(tmp_path, new_database(tmp_path), strict=False) as (_, alice, chat),
        AsyncExitStack() as stack,
    ):
        for number in range(300):
            await chat.send(message=f"missed {number}", client_id=f"{number}")
        head = (await chat.hears(client_id="299"))["seq"]
        chats = [alice.chat("1", f"?after={head - 100 - number % 7}") for number in range(500)]
        coming = asyncio.gather(*map(stack.enter_async_context, chats))
        waits = await latency(chat, 2)
        await coming
        await chat.say("live")
        for one in chats:
            await one.hears("live", 40)
        assert max(waits) < 6, "one loop is also the hundreds'"


# --- Clocks


async def test_a_clock_that_steps_logs_nobody_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back tokens stay good and numbers go on; hours ahead what has expired closes."""
    chat, real = await start(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    (alice,) = await chat.talk("alice")
    bob = await chat.user("bob")
    monkeypatch.setattr(time, "time", real)
    await alice.say("an hour ago")
    assert (await bob.post_in(alice.room, "from the future"))["seq"] == 4
    (await bob.post("/auth/renew")).ok()
    monkeypatch.setattr(time, "time", lambda: real() + 3 * 3600)
    assert await alice.is_closed() == 4401
    (await bob.get("/users/me")).refused(401)
