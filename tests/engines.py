"""What happens to databases: commits that take long, commits that fail, an outage."""

import asyncio
import secrets
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from urllib.parse import urlsplit, urlunsplit

import aiosqlite
import asyncpg

from tests import postgres
from tests.helpers import Server
from tests.processes import cut_connections
from tests.words import PATIENCE, until

AT_COMMIT = """CREATE OR REPLACE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS
$$BEGIN {} RETURN NULL; END$$"""
ON_COMMIT = """CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON events DEFERRABLE
INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()"""
WAITING = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


def writer(server: Server) -> aiosqlite.Connection:
    """Return the connection that writes into the server's file."""
    found = [one for one in vars(server.chat.db).values() if isinstance(one, aiosqlite.Connection)]
    return found[0]


@asynccontextmanager
async def held_commits(server: Server) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Let commits end only after the block; yield a function that waits for one that hangs."""
    if server.shared:
        url = server.config.database_url
        work = AT_COMMIT.format("PERFORM pg_advisory_xact_lock(42);")
        await postgres.execute(url, work, ON_COMMIT)
        holder = await asyncpg.connect(url)
        await holder.execute("SELECT pg_advisory_lock(42)")

        async def hangs() -> None:
            """Wait for a commit that hangs."""
            async with asyncio.timeout(PATIENCE):
                while not await holder.fetch(WAITING):
                    await asyncio.sleep(0.01)

        try:
            yield hangs
        finally:
            await holder.close()
            await postgres.execute(url, "DROP TRIGGER at_commit ON events")
        return
    begun, ended = threading.Event(), threading.Event()

    def trace(statement: str) -> None:
        """Hold a change in the thread of its connection, as a slow disk would."""
        if "INSERT INTO events" in statement:
            begun.set()
            ended.wait(PATIENCE)

    await writer(server).set_trace_callback(trace)
    try:
        yield lambda: until(begun.is_set, "a commit to begin")
    finally:
        ended.set()
        await writer(server).set_trace_callback(None)  # type: ignore[arg-type]


@asynccontextmanager
async def full_disk(server: Server) -> AsyncIterator[None]:
    """Let no message be stored: SQLite finds its disk full, Postgres fails as it commits."""
    if server.shared:
        url = server.config.database_url
        await postgres.execute(url, AT_COMMIT.format("RAISE EXCEPTION 'full';"), ON_COMMIT)
        yield
        await postgres.execute(url, "DROP TRIGGER at_commit ON events")
        return
    await writer(server).execute("PRAGMA max_page_count = 1")  # it means: no more than there are
    yield
    await writer(server).execute(f"PRAGMA max_page_count = {2**30}")


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Let another program write into SQLite's file, and so nobody else."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@asynccontextmanager
async def outage(server: Server) -> AsyncIterator[None]:
    """Let nobody reach the database; of SQLite's file it is writing that is impossible."""
    url = server.config.database_url
    if not server.shared:
        with locked(url):
            yield
        return
    name, beside = urlsplit(url).path[1:], postgres.with_database(url, "postgres")
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
    await postgres.execute(beside, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", cut)
    try:
        yield
    finally:
        await postgres.execute(beside, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@asynccontextmanager
async def lonely_account(
    server: Server,
) -> AsyncIterator[tuple[str, Callable[[str], Awaitable[None]]]]:
    """Yield a URL with an account of its own in Postgres, and a function that opens or shuts it."""
    url = server.config.database_url
    name = f"chat_{secrets.token_hex(4)}"
    await postgres.execute(url, f"CREATE ROLE {name} LOGIN SUPERUSER")

    async def set_login(may: str) -> None:
        """LOGIN lets the account in again; NOLOGIN shuts it out and cuts its connections."""
        await postgres.execute(url, f"ALTER ROLE {name} {may}")
        await cut_connections(url, f"usename = '{name}'")

    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    yield urlunsplit(parts._replace(netloc=f"{name}@{place}")), set_login
    await set_login("NOLOGIN")
    await postgres.execute(url, f"DROP ROLE {name}")
