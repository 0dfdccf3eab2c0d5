"""Hours of mixed load, in turns with faults: what the server uses ends where it began.

    python -m tests.soak --seconds 3600 --engine postgres

Writers, readers who drop and resume, edits, log-ins, and in every other round a fault. After each
round, when all clients are gone, one row of the table; at the end the last is held against the
first. A promise that broke, or something that grew, makes the exit code 1.
"""
# ruff: noqa: T201 - it prints a table

import argparse
import asyncio
import contextlib
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests import postgres
from tests.checker import Trial
from tests.people import User, company, handshake
from tests.processes import ROOT, Process, cut_connections, descriptors, memory, query, running
from tests.words import PASSWORD, until

# Tells at a signal how many tasks run.
PROBE = f"""
import asyncio, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import chatserver
create = chatserver.create_app
def create_app(config=None):
    app = create(config)
    async def start(_):
        loop = asyncio.get_running_loop()
        tell = lambda: pathlib.Path("tasks").write_text(f"{{len(asyncio.all_tasks(loop))}}\\n")
        loop.add_signal_handler(signal.SIGUSR1, tell)
    app.on_startup.append(start)
    return app
chatserver.create_app = create_app
chatserver.main()
"""


class Figures(NamedTuple):
    """What a process uses when nobody is connected."""

    memory: int
    descriptors: int
    tasks: int
    connections: int


class Soak:
    """A run on one engine."""

    def __init__(self, engine: str, folder: Path, url: str, processes: list[Process]) -> None:
        """Keep what the rounds need."""
        self.engine, self.folder, self.url, self.processes = engine, folder, url, processes

    async def figures(self) -> Figures:
        """Wait until everybody is gone, and look at the first process."""
        pid, told = self.processes[0].pid, self.folder / "tasks"
        least = [descriptors(pid)]

        def calm() -> bool:
            """Tell whether no descriptor was given back for a second."""
            least.append(descriptors(pid))
            return len(least) > 100 and least[-1] == least[-100]

        await until(calm, "everybody to be gone", 30)
        told.unlink(missing_ok=True)
        self.processes[0].popen.send_signal(signal.SIGUSR1)
        await until(lambda: told.exists() and told.read_text().endswith("\n"), "the tasks")
        connections = 0
        if self.engine == "postgres":
            sql = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""
            connections = (await query(self.url, sql))[0]["count"]
        return Figures(memory(pid), descriptors(pid), int(told.read_text()), connections)

    def faults(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Return what can be done to this engine's server without starting the first one anew."""
        both: Mapping[str, Callable[[], Awaitable[None]]]
        both = {"frozen": self.freeze, "stalled readers": self.stall}
        if self.engine == "sqlite":
            return {**both, "locked": self.lock}
        return {**both, "cut off": self.cut, "kill -9 of the other": self.kill}

    async def freeze(self) -> None:
        """Stop a process for some seconds."""
        async with self.processes[0].frozen():
            await asyncio.sleep(3)

    async def stall(self) -> None:
        """Let readers stop for some seconds, and drop them."""
        async with company(self.processes[0], "stall") as (user,):
            peers = [handshake(user, "1") for _ in range(30)]
            await asyncio.sleep(5)
            for peer in peers:
                peer.close()

    async def lock(self) -> None:
        """Hold SQLite's write lock for some seconds."""
        path = self.url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(3)
            other.execute("ROLLBACK")

    async def cut(self) -> None:
        """Cut every connection to Postgres a few times."""
        for _ in range(10):
            await cut_connections(self.url)
            await asyncio.sleep(0.2)

    async def kill(self) -> None:
        """Kill the second process and start it again."""
        self.processes[1].kill()
        self.processes[1].start()
        await self.processes[1].ready()

    async def round(self, seconds: float, fault: str, seed: int) -> tuple[int, list[str]]:
        """Put on load for some time; return how many messages were stored, and what broke."""

        async def log_in(user: User) -> None:
            """Log in and look around, again and again."""
            form = {"username": user.name, "password": PASSWORD}
            while True:
                with contextlib.suppress(AssertionError, OSError):
                    await user.ask("POST", "/auth/token", form)
                    await user.ask("GET", "/rooms")
                await asyncio.sleep(0.3)

        async with company(self.processes[0], "alice", "bob") as users:
            room = await users[0].room(users[1])
            trial = Trial(self.processes, users, room, counts=(12, 12), seed=seed)
            visits = asyncio.create_task(log_in(users[0]))
            try:
                async with trial:
                    await asyncio.sleep(seconds / 2)
                    if fault:
                        await self.faults()[fault]()
                    await asyncio.sleep(seconds / 2)
            finally:
                visits.cancel()
            return len(trial.record.ok), trial.problems


@contextlib.asynccontextmanager
async def prepared(engine: str, folder: Path) -> AsyncIterator[Soak]:
    """Start what is to be soaked: one process on SQLite, two on Postgres."""
    (folder / "probe.py").write_text(PROBE)
    cluster = postgres.Cluster() if engine == "postgres" else None
    url = cluster.url if cluster else f"sqlite:///{folder / 'chat.db'}"
    count = 2 if cluster else 1
    try:
        probe = folder / "probe.py"
        async with running(folder, url, count=count, strict=False, program=probe) as processes:
            yield Soak(engine, folder, url, processes)
    finally:
        if cluster:
            cluster.close()


def grown(first: Figures, last: Figures) -> list[str]:
    """Return what did not come back to where it began."""
    found = [
        f"{name}: {before} at first, {after} at last"
        for name, before, after in zip(first._fields[1:], first[1:], last[1:], strict=True)
        if after > before + 2
    ]
    if last.memory > first.memory * 1.25 + 2**23:
        found.append(f"memory: {first.memory >> 20} MiB at first, {last.memory >> 20} MiB at last")
    return found


async def soak(engine: str, seconds: float, seed: int) -> list[str]:
    """Run rounds for so many seconds; print the table and return what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        async with prepared(engine, Path(name)) as run:
            chance = random.Random(seed)  # noqa: S311
            length = min(60.0, seconds / 4)
            began, rows, problems = time.monotonic(), list[Figures](), list[str]()
            print(
                f"{engine:>8} {'messages':>9} {'MiB':>6} {'fds':>5} {'tasks':>6} {'db':>3}  fault"
            )
            while time.monotonic() - began < seconds or len(rows) < 3:
                fault = chance.choice(sorted(run.faults())) if len(rows) % 2 else ""
                count, broken = await run.round(length, fault, len(rows))
                problems += broken
                rows.append(figures := await run.figures())
                spent = f"{time.monotonic() - began:7.0f}s {count:9} {figures.memory / 2**20:6.1f}"
                print(f"{spent} {figures[1]:5} {figures[2]:6} {figures[3]:3}  {fault}", flush=True)
            return problems + grown(rows[0], rows[-1])


def main() -> int:
    """Read the command line, soak, and tell."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--engine", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    problems = asyncio.run(soak(arguments.engine, arguments.seconds, arguments.seed))
    print("\n".join(problems) or "nothing grew and no promise broke")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
