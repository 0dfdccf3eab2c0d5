"""What happens to databases: commits that take long, commits that fail, an outage."""

import asyncio
import secrets
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiosqlite
import asyncpg

from chatserver import SQLite
from tests import postgres
from tests.helpers import Server
from tests.processes import cut_connections
from tests.words import PATIENCE, until


def writer(server: Server) -> aiosqlite.Connection:
    """Return the connection that writes into the server's file."""
    assert isinstance(server.chat.db, SQLite)
    return server.chat.db.writer


@asynccontextmanager
async def at_commit(url: str, work: str) -> AsyncIterator[None]:
    """Let Postgres do something more at each commit of events."""
    body = f"$$BEGIN {work}; RETURN NULL; END$$"
    function = f"CREATE OR REPLACE FUNCTION more() RETURNS trigger LANGUAGE plpgsql AS {body}"
    trigger = """CREATE CONSTRAINT TRIGGER more AFTER INSERT ON events DEFERRABLE
        INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION more()"""
    await postgres.execute(url, function, trigger)
    yield
    await postgres.execute(url, "DROP TRIGGER more ON events")


@asynccontextmanager
async def held_commits(server: Server) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Let commits end only after the block; yield a function that waits for one that hangs."""
    url, begun, ended = server.config.database_url, threading.Event(), threading.Event()
    if server.shared:
        async with at_commit(url, "PERFORM pg_advisory_xact_lock(42)"):
            holder = await asyncpg.connect(url)
            await holder.execute("SELECT pg_advisory_lock(42)")
            waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

            async def hangs() -> None:
                """Wait for a commit that hangs."""
                async with asyncio.timeout(PATIENCE):
                    while not await holder.fetch(waiting):
                        await asyncio.sleep(0.01)

            try:
                yield hangs
            finally:
                await holder.close()
        return

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
        async with at_commit(server.config.database_url, "RAISE EXCEPTION 'full'"):
            yield
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
    name, beside = urlsplit(url).path[1:], urlsplit(url)._replace(path="/postgres").geturl()
    may = f"ALTER DATABASE {name} ALLOW_CONNECTIONS"
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
    await postgres.execute(beside, f"{may} false", cut)
    yield
    await postgres.execute(beside, f"{may} true")


@asynccontextmanager
async def lonely_account(server: Server) -> AsyncIterator[tuple[str, Any]]:
    """Yield a URL with an account of its own in Postgres, and a function that opens or shuts it."""
    url, name = server.config.database_url, f"chat_{secrets.token_hex(4)}"
    await postgres.execute(url, f"CREATE ROLE {name} LOGIN SUPERUSER")

    async def set_login(may: str) -> None:
        """LOGIN lets the account in again; NOLOGIN shuts it out and cuts its connections."""
        await postgres.execute(url, f"ALTER ROLE {name} {may}")
        await cut_connections(url, f"usename = '{name}'")

    yield f"postgresql://{name}@{url.rpartition('@')[2]}", set_login
    await set_login("NOLOGIN")
    await postgres.execute(url, f"DROP ROLE {name}")
