"""Hours of mixed load, in turns with faults: what the server uses ends where it began.

    python -m tests.soak --seconds 3600 --engine postgres

Writers, readers who drop and resume, edits, log-ins, and in every other round a fault. After each
round, when all clients are gone, one row of the table; at the end the last is held against the
first. A promise that broke, or something that grew, makes the exit code 1.
"""
# ruff: noqa: T201 - it prints a table

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

from tests import postgres
from tests.checker import Trial
from tests.engines import locked
from tests.people import LOST, User, company, handshake
from tests.processes import ROOT, Process, cut_connections, descriptors, memory, running
from tests.words import PASSWORD, until

# Tells at a signal how many tasks run.
PROBE = f"""
import asyncio, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import chatserver
def tell(*_):
    pathlib.Path("tasks").write_text(f"{{len(asyncio.all_tasks())}}\\n")
signal.signal(signal.SIGUSR1, tell)
chatserver.main()
"""
CONNECTIONS = """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
    AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""
FAULTS = {  # the first process is never started anew
    "sqlite": ("frozen", "stalled readers", "locked"),
    "postgres": ("frozen", "stalled readers", "cut off", "kill -9 of the other"),
}


class Figures(NamedTuple):
    """What a process uses when nobody is connected."""

    memory: int
    descriptors: int
    tasks: int
    connections: int


async def look(process: Process, url: str) -> Figures:
    """Wait until everybody is gone, and look at a process."""
    pid, told = process.pid, process.folder / "tasks"
    least = [descriptors(pid)]

    def calm() -> bool:
        """Tell whether no descriptor was given back for a second."""
        least.append(descriptors(pid))
        return len(least) > 100 and least[-1] == least[-100]

    await until(calm, "everybody to be gone", 30)
    told.unlink(missing_ok=True)
    process.popen.send_signal(signal.SIGUSR1)
    await until(lambda: told.exists() and told.read_text().endswith("\n"), "the tasks")
    connections = [] if url.startswith("sqlite") else await postgres.read(url, CONNECTIONS)
    return Figures(memory(pid), descriptors(pid), int(told.read_text()), len(connections))


async def disturb(fault: str, processes: list[Process], url: str) -> None:
    """Let one of the faults happen, for some seconds."""
    match fault:
        case "frozen":
            async with processes[0].frozen():
                await asyncio.sleep(3)
        case "stalled readers":
            async with company(processes[0], "stall") as (user,):
                peers = [handshake(user, "1") for _ in range(30)]
                await asyncio.sleep(5)
            for peer in peers:
                peer.close()
        case "locked":
            with locked(url):
                await asyncio.sleep(3)
        case "cut off":
            for _ in range(10):
                await cut_connections(url)
                await asyncio.sleep(0.2)
        case "kill -9 of the other":
            await processes[1].again()


async def visit(user: User) -> None:
    """Log in and look around, again and again."""
    form = {"username": user.name, "password": PASSWORD}
    while True:
        with suppress(AssertionError, *LOST):
            await user.ask("POST", "/auth/token", form)
            await user.ask("GET", "/rooms")
        await asyncio.sleep(0.3)


async def put_on(
    processes: list[Process], url: str, seconds: float, fault: str, seed: int
) -> tuple[int, list[str]]:
    """Put on load for some time; return how many messages were stored, and what broke."""
    async with company(processes[0], "alice", "bob") as users:
        room = await users[0].room(users[1])
        trial = Trial(processes, users, room, counts=(12, 12), seed=seed)
        visits = asyncio.create_task(visit(users[0]))
        try:
            async with trial:
                await asyncio.sleep(seconds / 2)
                await disturb(fault, processes, url)
                await asyncio.sleep(seconds / 2)
        finally:
            visits.cancel()
        return len(trial.record.ok), trial.problems


async def soak(engine: str, url: str, folder: Path, seconds: float, seed: int) -> list[str]:
    """Run rounds for so many seconds; print the table and return what is wrong."""
    probe, chance = folder / "probe.py", random.Random(seed)  # noqa: S311
    probe.write_text(PROBE)
    began, rows, problems = time.monotonic(), list[Figures](), list[str]()
    print(f"{engine:>8} {'messages':>9} {'MiB':>6} {'fds':>5} {'tasks':>6} {'db':>3}  fault")
    count = 1 if engine == "sqlite" else 2
    async with running(folder, url, count=count, strict=False, program=probe) as processes:
        while time.monotonic() - began < seconds or len(rows) < 3:
            fault = chance.choice(FAULTS[engine]) if len(rows) % 2 else ""
            length = min(60.0, seconds / 4)
            stored, broken = await put_on(processes, url, length, fault, len(rows))
            problems += broken
            rows.append(row := await look(processes[0], url))
            spent = f"{time.monotonic() - began:7.0f}s {stored:9} {row.memory / 2**20:6.1f}"
            print(f"{spent} {row[1]:5} {row[2]:6} {row[3]:3}  {fault}", flush=True)
    return problems + grown(rows[0], rows[-1])


def grown(first: Figures, last: Figures) -> list[str]:
    """Return what did not come back to where it began."""
    more = [after > before + 2 for before, after in zip(first, last, strict=True)]
    more[0] = last.memory > first.memory * 1.25 + 2**23
    return [f"{first} at first, {last} at last"] if any(more) else []


def main() -> int:
    """Read the command line, soak, and tell."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--engine", choices=FAULTS, default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        url = f"sqlite:///{name}/chat.db"
        if chosen.engine == "postgres":
            url = stack.enter_context(closing(postgres.Cluster())).url
        problems = asyncio.run(soak(chosen.engine, url, Path(name), chosen.seconds, chosen.seed))
    print("\n".join(problems) or "nothing grew and no promise broke")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
