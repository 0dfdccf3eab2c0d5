"""Every fault that can be made: what was acknowledged stays, and the server heals by itself."""

import asyncio
import itertools
import os
import random
import resource
import shutil
import socket
import sqlite3
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from tests import postgres
from tests.checker import Trial
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
from tests.words import until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("brisk")]
UNAVAILABLE = {"type": "error", "error": "unavailable"}


@asynccontextmanager
async def trying(processes: list[Process], users: list[User], **more: Any) -> AsyncIterator[Trial]:
    """Let writers and readers loose in a new room; afterwards no promise is broken."""
    room = await users[0].room(*users[1:])
    trial = Trial(processes, users, room, **more)
    async with trial:
        yield trial
    assert trial.problems == []


async def again(process: Process, *, kill: bool = True) -> None:
    """Kill a process, if it still runs, and start it again."""
    if kill:
        process.kill()
    process.start()
    await process.ready()


# --- Processes that die or freeze


async def test_kill_9_at_random_loses_nothing(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """Processes are killed again and again, one or all, and what was told is there once."""
    chance = random.Random(12)  # noqa: S311
    count = 1 if engine == "sqlite" else 3
    async with (
        running(tmp_path, new_database(tmp_path), count=count) as processes,
        company(processes[0], "alice", "bob") as users,
        trying(processes, users, counts=(12, 8)) as trial,
    ):
        for number in range(6):
            await trial.more(chance.randrange(20, 150))
            victims = processes if number % 3 == 2 else [chance.choice(processes)]
            for victim in victims:
                victim.kill()
            for victim in victims:
                await again(victim, kill=False)
        await trial.more(50)


# Kills its process before or after the COMMIT at which a file says so.
KILLER = """
import os, signal, sys
import aiosqlite, chatserver
execute = aiosqlite.Connection._execute
async def fatal(self, function, *values, **more):
    commit = "commit" in (getattr(function, "__name__", ""), str(values[:1]).lower()[2:8])
    when = open("when").read() if commit and os.path.exists("when") else ""
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    found = await execute(self, function, *values, **more)
    if when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return found
aiosqlite.Connection._execute = fatal
chatserver.main()
"""


@pytest.mark.parametrize("when", ["before", "after"])
async def test_kill_9_around_a_commit_loses_nothing(
    engine: str, new_database: Databases, tmp_path: Path, when: str
) -> None:
    """Killed just before its commit, or between it and the fan-out, a batch is there once."""
    async with AsyncExitStack() as stack:
        url = new_database(tmp_path)
        (tmp_path / "killer.py").write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{KILLER}"
        )
        program: Any = PROGRAM
        if engine == "sqlite":
            program = tmp_path / "killer.py"
        else:
            wire = await stack.enter_async_context(Wire(url))
            url = wire.url
        run = running(tmp_path, url, program=program)
        (process,) = await stack.enter_async_context(run)
        users = await stack.enter_async_context(company(process, "alice", "bob"))
        async with trying([process], users) as trial:
            for _ in range(4):
                await trial.more(30)
                if engine == "sqlite":
                    (tmp_path / "when").write_text(when)
                else:
                    wire.on_loss = process.kill
                    wire.lose = "request" if when == "before" else "answer"
                await until(lambda: process.popen.poll() is not None, "its death")
                (tmp_path / "when").unlink(missing_ok=True)
                await again(process)
            await trial.more(30)


async def test_sigterm_under_load_finishes_what_was_accepted(
    new_database: Databases, tmp_path: Path
) -> None:
    """Stopped and started under load, each time with 0 within 5 s, it loses and doubles nothing."""
    async with (
        running(tmp_path, new_database(tmp_path)) as (process,),
        company(process, "alice", "bob") as users,
        trying([process], users, counts=(12, 6)) as trial,
    ):
        for _ in range(3):
            await trial.more(100)
            assert await process.end() == 0, process.log
            await again(process, kill=False)
        await trial.more(100)


async def test_a_process_that_is_frozen_for_8_s_holds_up_nobody(
    postgres_url: str, tmp_path: Path
) -> None:
    """Beside it all goes on; thawed it delivers nothing from after a ban, an end or a log-out."""
    names = ("alice", "bob", "banned", "left", "deleted")
    async with (
        running(tmp_path, postgres.create_database(postgres_url), count=3) as processes,
        company(processes[0], *names) as users,
        trying(processes, users[:2]) as trial,
        AsyncExitStack() as stack,
    ):
        alice, _, banned, left, deleted = users
        room, doomed = await alice.room(banned, left), await alice.room(deleted)
        frozen = processes[2]
        pairs = [(banned, room), (left, room), (deleted, doomed)]
        chats = [await stack.enter_async_context(u.at(frozen).chat(r)) for u, r in pairs]
        await trial.more(100)
        async with frozen.frozen():
            trial.processes = processes[:2]
            waits, began = [], time.monotonic()
            await alice.ask("PUT", f"/rooms/{room}/members/{banned.name}", {"role": "banned"})
            await left.ask("POST", "/auth/logout")
            await alice.ask("DELETE", f"/rooms/{doomed}")
            while time.monotonic() - began < 8:
                sent = time.monotonic()
                await alice.at(processes[1]).say(room, "not for them")
                waits.append(time.monotonic() - sent)
                await asyncio.sleep(0.05)
        thawed = time.monotonic()
        trial.processes = processes
        codes = [await chat.closed() for chat in chats]
        assert codes == [4403, 4401, 4404]
        assert time.monotonic() - thawed < 4
        for chat in chats:
            assert not [frame for frame in chat.frames if frame.get("message") == "not for them"]
        assert max(waits) < 2.5, "at first a transaction of the frozen process may be waited for"
        assert statistics.median(waits) < 0.2
        await trial.more(100)


# --- SQLite's file and disk


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of 2 MiB at a folder, if that is allowed here; tell whether it was."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder)]
    mounted = not os.geteuid() and not subprocess.run(mount, check=False).returncode  # noqa: S603
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S603, S607


def give_room(folder: Path) -> None:
    """Make the small disk larger."""
    subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True)  # noqa: S603, S607


def limit_files(process: Process, folder: Path) -> Callable[[], Any]:
    """Let a process write no file beyond what it has and a little; return what lifts that."""
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in folder.glob("chat.db*"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest + 400_000, unlimited[1]))
    return partial(resource.prlimit, process.pid, resource.RLIMIT_FSIZE, unlimited)


async def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """While nothing can be written sends are refused and reading goes on; with room all heals."""
    home = tmp_path / "disk"
    home.mkdir()
    with small_disk(home) as mounted:
        async with (
            running(tmp_path, f"sqlite:///{home}/chat.db") as (process,),
            company(process, "alice") as (alice,),
            alice.chat("1") as chat,
        ):
            heal = partial(give_room, home) if mounted else limit_files(process, home)
            for number in itertools.count():
                body = {"message": "x" * 3000, "client_id": f"c{number}"}
                await chat.send(**body)
                if (answer := await chat.hears(client_id=f"c{number}"))["type"] == "error":
                    break
            assert number > 5
            assert answer["error"] == "unavailable"
            await alice.ask("POST", "/rooms/1/messages", body, status=503)
            log = await alice.log("1")
            assert [event.get("client_id") for event in log[1:]] == [f"c{n}" for n in range(number)]
            heal()
            await chat.send(**body)
            assert (await chat.hears(client_id=f"c{number}"))["seq"] == log[-1]["seq"] + 1
            await again(process)
            assert (await alice.log("1"))[:-1] == log
            process.kill()
            with closing(sqlite3.connect(home / "chat.db")) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_sqlite_that_somebody_locks_is_an_interruption(tmp_path: Path) -> None:
    """While another program holds the write lock sends are refused or wait, and none is lost."""
    async with (
        running(tmp_path, f"sqlite:///{tmp_path}/chat.db") as (process,),
        company(process, "alice", "bob") as users,
        trying([process], users) as trial,
    ):
        await trial.more(50)
        with closing(sqlite3.connect(tmp_path / "chat.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            async with users[0].chat(trial.room) as chat:
                await chat.send(message="now", client_id="now")
                answer = await chat.hears(client_id="now")
                assert UNAVAILABLE.items() <= answer.items()
                await users[1].ask("GET", f"/rooms/{trial.room}/messages")
            assert time.monotonic() - began < 10
            other.execute("ROLLBACK")
        await trial.more(50, patience=5)


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved away and back"])
async def test_a_file_that_is_gone_stops_acknowledgements(tmp_path: Path, how: str) -> None:
    """Once its database file is gone or another one, the server acknowledges nothing more."""
    path, away = tmp_path / "chat.db", tmp_path / "away.db"
    async with (
        running(tmp_path, f"sqlite:///{path}") as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        await chat.deliver("stored")
        if how == "replaced":
            shutil.copy(path, away)
            away.replace(path)
        else:
            path.rename(away)
        async with asyncio.timeout(5):  # it may look once a second or so
            for number in itertools.count():
                await chat.send(message="lost?", client_id=f"c{number}")
                answer = await chat.hears(client_id=f"c{number}")
                if answer["type"] == "error":
                    break
                await asyncio.sleep(0.1)
        assert answer["error"] == "unavailable"
        await alice.ask("GET", "/healthz", status=503)
        if how == "moved away and back":
            away.rename(path)
            async with asyncio.timeout(5):
                while True:
                    await chat.send(message="lost?", client_id=answer["client_id"])
                    if (await chat.hears(client_id=answer["client_id"]))["type"] != "error":
                        break
                    await asyncio.sleep(0.1)
            await alice.ask("GET", "/healthz")
            await again(process)
            texts = [event.get("message") for event in await alice.log("1")]
            assert texts[1] == "stored" and texts[-1] == "lost?"


# --- A Postgres that breaks


async def refuses(user: User, chat: Chat) -> None:
    """Check that a server without a database says so everywhere, and keeps its sockets."""
    await chat.send(message="refused", client_id="refused")
    assert UNAVAILABLE.items() <= (await chat.hears(client_id="refused")).items()
    for path in ("/rooms", "/users/me", "/rooms/1/messages", "/healthz"):
        assert (await user.ask("GET", path, status=503))["error"] == "unavailable"
    await user.ask("POST", "/rooms/1/messages", {"message": "refused"}, status=503)
    form = {"username": user.name, "password": "1234"}
    assert (await user.ask("POST", "/auth/token", form, status=503))["error"] == "unavailable"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await user.chat("1").__aenter__()
    assert refusal.value.status == 503
    chat.frames.clear()


async def test_a_postgres_that_dies_and_comes_back_is_an_interruption(
    cluster: postgres.Cluster, tmp_path: Path
) -> None:
    """While Postgres is gone for 5 s all sockets live and all sends are refused; then all heals."""
    async with (
        running(tmp_path, cluster.url, count=2) as processes,
        company(processes[0], "alice", "bob") as users,
        trying(processes, users) as trial,
        users[0].chat("1") as one,
        users[0].at(processes[1]).chat("1") as two,
    ):
        await trial.more(50)
        await asyncio.to_thread(cluster.stop, "immediate")
        down = time.monotonic()
        async with asyncio.timeout(6):
            await asyncio.gather(refuses(users[0], one), refuses(users[0].at(processes[1]), two))
        await until(lambda: time.monotonic() - down > 5, "5 s")
        await asyncio.to_thread(cluster.start)
        await trial.more(50, patience=8)
        sent = await one.deliver("it has healed")
        await two.hear("message", seq=sent["seq"])
        for process in processes:
            await users[0].at(process).ask("GET", "/healthz")
    assert len(process.log) < 20_000, "it does not log every failure"


async def test_a_postgres_that_hangs_holds_up_neither_clients_nor_the_end(
    postgres_url: str, tmp_path: Path
) -> None:
    """Of a database that answers nothing sends are told in time, sockets live, SIGTERM works."""
    async with (
        Wire(postgres.create_database(postgres_url)) as wire,
        running(tmp_path, wire.url) as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        wire.stalled = True
        await chat.send(message="into the void", client_id="void")
        assert UNAVAILABLE.items() <= (await chat.hears(client_id="void", patience=40)).items()
        wire.stalled = False
        async with asyncio.timeout(15):
            answer: Any = {"type": "error"}
            while answer["type"] == "error":
                await chat.send(message="into the void", client_id="void")
                answer = await chat.hears(client_id="void")
        log = await alice.log("1")
        assert [e["seq"] for e in log if e.get("client_id") == "void"] == [answer["seq"]]
        wire.stalled = True
        await chat.send(message="the last")
        code, told = await asyncio.gather(process.end(), chat.closed())
        assert (code, told) == (0, 1001)


async def test_a_commit_or_its_answer_that_is_lost_is_never_a_false_ack(
    postgres_url: str, tmp_path: Path
) -> None:
    """Cut before or after COMMIT took effect, what is acknowledged is there, and once."""
    async with (
        Wire(postgres.create_database(postgres_url)) as wire,
        running(tmp_path, wire.url) as (process,),
        company(process, "alice", "bob") as users,
        trying([process], users, counts=(6, 6)) as trial,
    ):
        for _ in range(6):
            for side in ("request", "answer"):
                wire.lost.clear()
                wire.lose = side
                await asyncio.wait_for(wire.lost.wait(), 10)
                await trial.more(10)


async def test_when_all_connections_are_cut_delivery_is_back_in_seconds(
    postgres_url: str, tmp_path: Path
) -> None:
    """Cut again and again under load, sockets live, and afterwards nothing is missing."""
    url = postgres.create_database(postgres_url)
    async with (
        running(tmp_path, url, count=2) as processes,
        company(processes[0], "alice", "bob") as users,
        trying(processes, users) as trial,
        users[0].chat(trial.room) as chat,
    ):
        for _ in range(30):
            await cut_connections(url)
            await asyncio.sleep(0.1)
        await trial.more(50, patience=5)
        await chat.deliver("still here")


# --- Too much of everything


async def latency(chat: Chat, seconds: float) -> list[float]:
    """Say something again and again for some time; return how long each took to come back."""
    waits, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        sent = time.monotonic()
        await chat.deliver("quick")
        waits.append(time.monotonic() - sent)
        await asyncio.sleep(0.02)
    return waits


async def test_descriptors_that_run_out_hurt_only_who_comes(tmp_path: Path) -> None:
    """With no descriptor left those who are in go on, the log stays short; later all is well."""
    async with (
        running(tmp_path, f"sqlite:///{tmp_path}/chat.db") as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        url, before = URL(process.url), descriptors(process.pid)
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (before + 10, unlimited[1]))
        peers = [socket.create_connection((url.host, url.port), 5) for _ in range(60)]
        await until(lambda: descriptors(process.pid) >= before + 10, "the last descriptor")
        assert max(await latency(chat, 3)) < 1
        for peer in peers:
            peer.close()
        async with asyncio.timeout(10):
            while (await alice.ask("GET", "/healthz"))["status"] != "ok":
                await asyncio.sleep(0.1)
        await until(lambda: descriptors(process.pid) <= before + 3, "the descriptors")
        await latency(chat, 1.5)
        assert len(process.log) < 20_000


async def flood_of_pings(user: User) -> None:
    """Ping without a pause until one is thrown out."""
    async with user.chat("1") as chat:
        with suppress(ConnectionError):
            for _ in range(20_000):
                await chat.ws.ping(b"x" * 100)
        assert await chat.closed() in (4429, 1006)


async def flood_of_messages(user: User) -> None:
    """Send messages without a pause; they are refused, or one is thrown out."""
    with suppress(ConnectionError):
        async with user.chat("1") as chat:
            for number in range(20_000):
                await chat.send(message="spam", client_id=f"{number}")
            await chat.hear("error", error="rate_limited")


async def flood_of_log_ins(user: User) -> None:
    """Log in sixty times at once, which is more than can wait."""
    form = {"username": user.name, "password": "1234"}

    async def log_in() -> int:
        """Log in once."""
        url = f"{user.place.url}/auth/token"
        async with user.session.post(url, data=form) as answer:
            return answer.status

    found = await asyncio.gather(*(log_in() for _ in range(60)))
    assert {200, 503} == set(found), found


@pytest.mark.parametrize("flood", [flood_of_pings, flood_of_messages, flood_of_log_ins])
async def test_a_flood_disturbs_nobody_else(tmp_path: Path, flood: Any) -> None:
    """Whoever floods the server is refused or thrown out, and others hardly notice."""
    url = f"sqlite:///{tmp_path}/chat.db"
    async with (
        running(tmp_path, url, strict=False, messages_per_second=50) as (process,),
        company(process, "alice", "mallory") as (alice, mallory),
        alice.chat("1") as chat,
    ):
        floods = asyncio.create_task(flood(mallory))
        waits = await latency(chat, 3)
        await asyncio.wait_for(floods, 30)
        assert statistics.median(waits) < 0.2, waits
        assert max(waits) < 1.5, waits


async def test_readers_that_stop_are_cut_off_and_really_freed(tmp_path: Path) -> None:
    """In a busy room and in one of whispers they cost little, others nothing, and then they go."""
    url = f"sqlite:///{tmp_path}/chat.db"
    # Has the C library give back what Python has freed, so that it can be seen.
    exact: dict[str, Any] = {"malloc_mmap_threshold_": 8192, "malloc_trim_threshold_": 65536}
    async with (
        running(tmp_path, url, **exact, strict=False) as (process,),
        company(process, *["alice"] * 12) as (alice, bob, *others),
    ):
        busy, quiet = await alice.room(bob), await alice.room()
        async with AsyncExitStack() as stack:
            chats = [await stack.enter_async_context(u.chat(busy)) for u in (alice, bob)]
            typists = [await stack.enter_async_context(u.chat(quiet)) for u in (bob, *others)]
            await latency(chats[0], 1)
            before, used = descriptors(process.pid), memory(process.pid)
            peers = [
                stack.enter_context(handshake(alice, room))
                for room in (busy, quiet)
                for _ in range(30)
            ]

            async def shout() -> None:
                """Keep the busy room busy."""
                while True:
                    for number in range(10):
                        await chats[1].send(message="x" * 4000, client_id=f"{number}")
                    await chats[1].deliver("next")
                    chats[1].frames.clear()
                    await asyncio.sleep(0.05)

            async def type_(chat: Chat) -> None:
                """Type, as often as one may."""
                while True:
                    await chat.send(type="typing")
                    await asyncio.sleep(0.06)

            async def hear(chat: Chat) -> None:
                """Read what the others type."""
                while True:
                    await chat.next(60)
                    chat.frames.clear()

            work = [shout(), *map(type_, typists), *map(hear, typists)]
            tasks = [asyncio.create_task(each) for each in work]
            waits, most, began = [], 0, time.monotonic()
            while descriptors(process.pid) > before and time.monotonic() - began < 60:
                waits += await latency(chats[0], 0.5)
                most = max(most, memory(process.pid))
            for task in tasks:
                assert not task.done(), task
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert time.monotonic() - began < 60, "they are still there"
            assert most - used < len(peers) * 2**20
            assert memory(process.pid) - used < 4 * 2**20
            assert statistics.median(waits) < 0.1
            assert max(waits) < 1


async def test_a_thousand_who_resume_in_the_same_second_get_everything(
    new_database: Databases, tmp_path: Path
) -> None:
    """Each gets what it missed once and goes live, and others' messages hardly wait."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 20_000), most))
    async with (
        running(tmp_path, new_database(tmp_path), strict=False) as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        for number in range(300):
            await chat.send(message=f"missed {number}", client_id=f"{number}")
        head = (await chat.hear("message", client_id="299"))["seq"]

        async def resume(number: int) -> bool:
            """Come back after the last hundred or so; tell whether all came once, in order."""
            after = head - 100 - number % 7
            async with alice.chat("1", f"?after={after}") as mine:
                await mine.hear("message", 40, message="live")
                return mine.numbers == list(range(after + 1, after + 1 + len(mine.numbers)))

        began = time.monotonic()
        tasks = [asyncio.create_task(resume(number)) for number in range(1000)]
        waits = await latency(chat, 2)
        while not all(task.done() for task in tasks):
            await chat.send(message="live")
            await asyncio.wait(tasks, timeout=1)
            assert time.monotonic() - began < 40
        assert all(task.result() for task in tasks)
        assert max(waits) < 6, "one loop is also the thousand's"


# --- Clocks

CLOCK = """
import pathlib, time
from datetime import datetime
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
    (tmp_path / "offset").write_text("0")
    (tmp_path / "clock.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{CLOCK}")
    url = f"sqlite:///{tmp_path}/chat.db"
    async with (
        running(tmp_path, url, program=tmp_path / "clock.py") as (process,),
        company(process, "alice") as (alice,),
        alice.chat("1") as chat,
    ):
        first = await chat.deliver("before")
        (tmp_path / "offset").write_text("-3600")
        assert (await chat.deliver("an hour ago"))["seq"] == first["seq"] + 1
        assert (await alice.say("1", "by post"))["seq"] == first["seq"] + 2
        assert (await alice.ask("POST", "/auth/renew"))["access_token"]
        (tmp_path / "offset").write_text("7200")
        assert await chat.closed(4) == 4401
        await alice.ask("GET", "/users/me", status=401)
