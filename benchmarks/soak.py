"""Hours of mixed load, in turns with faults: what the server uses ends where it began.

    python -m benchmarks.soak --seconds 3600 --engine postgres

Writers, readers who drop and resume, edits, log-ins, and in every other round a fault. After each
round, when all clients are gone, one row of the table; at the end the last is held against the
first. A promise that broke, or something that grew, makes the exit code 1. It runs in the folder of
the program, needs the packages of tests/requirements.txt, and Linux (/proc).
"""

import argparse
import asyncio
import itertools
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

from tests import postgres
from tests.checker import trying
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
    pid, told, last = process.pid, process.folder / "tasks", deque[int](maxlen=10)
    while len(last) < 10 or len(set(last)) > 1:  # for two seconds nobody came or went
        last.append(descriptors(pid))
        await asyncio.sleep(0.2)
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
                with ExitStack() as stack:
                    for _ in range(30):
                        stack.enter_context(handshake(user, "1"))
                    await asyncio.sleep(5)
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


async def soak(engine: str, url: str, folder: Path, seconds: float) -> list[str]:
    """Run rounds for so many seconds; print the table and return what is wrong."""
    program, count = folder / "probe.py", 1 if engine == "sqlite" else 2
    program.write_text(PROBE)
    began, rows, problems = time.monotonic(), list[Figures](), list[str]()
    faults = itertools.cycle(fault for each in FAULTS[engine] for fault in ("", each))
    print(f"{engine:>8} {'messages':>9} {'MiB':>6} {'fds':>5} {'tasks':>6} {'db':>3}  fault")
    async with running(folder, url, count=count, strict=False, program=program) as processes:
        while time.monotonic() - began < seconds or len(rows) < 3:
            fault, half = next(faults), min(30.0, seconds / 8)
            async with (
                company(processes[0], "alice", "bob") as users,
                trying(processes, users, counts=(12, 12), sound=False) as trial,
            ):
                visits = asyncio.create_task(visit(users[0]))
                await asyncio.sleep(half)
                await disturb(fault, processes, url)
                await asyncio.sleep(half)
                visits.cancel()
            problems += trial.problems
            rows.append(row := await look(processes[0], url))
            spent = f"{time.monotonic() - began:7.0f}s {len(trial.ok):9} {row[0] / 2**20:6.1f}"
            print(f"{spent} {row[1]:5} {row[2]:6} {row[3]:3}  {fault}", flush=True)
    first, last = rows[0], rows[-1]
    more = [now > then + 2 for then, now in zip(first[1:], last[1:], strict=True)]
    if any(more) or last.memory > first.memory * 1.25 + 2**23:
        problems.append(f"grown: {first} at first, {last} at last")
    return problems


def main() -> int:
    """Read the command line, soak, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--engine", choices=FAULTS, default="sqlite")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        url = f"sqlite:///{name}/chat.db"
        if chosen.engine == "postgres":
            url = stack.enter_context(closing(postgres.Cluster())).url
        problems = asyncio.run(soak(chosen.engine, url, Path(name), chosen.seconds))
    print("\n".join(problems) or "nothing grew and no promise broke")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
