"""What happens to databases: commits that take long, commits that fail, an outage."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiosqlite
import asyncpg

from tests import postgres
from tests.helpers import Server
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
    if server.config.shared:
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
        """Hold a commit in the thread of its connection, as a slow disk would."""
        if statement.upper().startswith("COMMIT"):
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
    if server.config.shared:
        url = server.config.database_url
        await postgres.execute(url, AT_COMMIT.format("RAISE EXCEPTION 'full';"), ON_COMMIT)
        yield
        await postgres.execute(url, "DROP TRIGGER at_commit ON events")
        return
    await writer(server).execute("PRAGMA max_page_count = 1")  # it means: no more than there are
    yield
    await writer(server).execute(f"PRAGMA max_page_count = {2**30}")


@asynccontextmanager
async def outage(server: Server) -> AsyncIterator[None]:
    """Let nobody reach the database; of SQLite's file it is writing that is impossible."""
    url = server.config.database_url
    if server.config.shared:
        async with postgres.outage(url):
            yield
        return
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()
