"""The fixtures: every test that asks for a server runs on SQLite and on a real Postgres."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest

from tests import postgres
from tests.helpers import NO_LIMITS, SECRET, Pool, Process, Server


def pytest_configure() -> None:
    """Let a SIGTERM, as `timeout` sends it, end the run with all that the fixtures started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def missing(reason: str) -> None:
    """Skip a test that cannot run here; in CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def cluster_or_skip() -> postgres.Cluster:
    """Start a Postgres, or skip."""
    try:
        return postgres.Cluster()
    except postgres.MissingError as error:
        missing(str(error))
        raise


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Give the URL of a Postgres to create databases on, for the whole run."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    cluster = cluster_or_skip()
    yield cluster.url
    cluster.close()


@pytest.fixture
def cluster() -> Iterator[postgres.Cluster]:
    """Give a Postgres of the test's own, to stop, start and cut off as it likes."""
    cluster = cluster_or_skip()
    yield cluster
    cluster.close()


class Databases(Protocol):
    """Makes a fresh database and returns its URL."""

    def __call__(self, folder: Path) -> str:
        """Make a database; SQLite's lies in the folder."""


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name the database engine that the test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_database(engine: str, request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Give a function that makes a fresh database of the engine."""
    if engine == "sqlite":
        yield lambda folder: f"sqlite:///{folder / 'chat.db'}"
        return
    url: str = request.getfixturevalue("postgres_url")
    made: list[str] = []

    def create(folder: Path) -> str:
        """Make a database on the Postgres of this run."""
        del folder
        made.append(postgres.create_database(url))
        return made[-1]

    yield create
    # A cluster of our own goes away as a whole; on somebody else's we clean up behind us.
    if os.environ.get("TEST_DATABASE_URL"):
        for database in made:
            postgres.drop_database(url, database)


def is_clean(log: str) -> None:
    """Check that a log tells of no crash, no warning of Python's and nothing left behind."""
    for sign in ("Traceback", "Warning:", "was never awaited", "was destroyed", "Unclosed "):
        assert sign not in log, log


class Shared:
    """The server that most tests share, with the accounts that are idle at the moment."""

    def __init__(self, process: Process, database: str) -> None:
        """Keep a process and its pool of accounts."""
        self.process = process
        self.database = database
        self.pool = Pool()


@pytest.fixture(scope="session")
def shared(new_database: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Run one server on each engine for all the tests that do not need their own."""
    folder = tmp_path_factory.mktemp("shared")
    database = new_database(folder)
    settings = {**NO_LIMITS, "secret_key": SECRET, "database_url": database}
    process = Process(folder, "--port", "0", settings=settings)
    try:
        process.listening()
        yield Shared(process, database)
        assert process.stop() == 0, process.stderr
        is_clean(process.stderr)
    finally:
        process.kill()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client session without a limit on connections and without cookies."""
    connector = aiohttp.TCPConnector(limit=0)
    jar = aiohttp.DummyCookieJar()
    timeout = aiohttp.ClientTimeout(total=40)
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=jar, timeout=timeout
    ) as session:
        yield session


@pytest.fixture
async def server(
    shared: Shared, session: aiohttp.ClientSession, request: pytest.FixtureRequest
) -> AsyncIterator[Server]:
    """Give the shared server; whatever the test does to it, it logs no traceback."""
    before = len(shared.process.stderr)
    failed = request.session.testsfailed
    server = Server(shared.process, session, database=shared.database, pool=shared.pool)
    yield server
    if request.session.testsfailed == failed:  # else who knows what became of the accounts
        server.release()
    is_clean(shared.process.stderr[before:])


class Launch(Protocol):
    """Starts a process in the test's folder, on SQLite unless it is told otherwise."""

    def __call__(self, *arguments: str, folder: Path | None = None, **settings: Any) -> Process:
        """Start it and wait until it listens."""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Give a function that starts processes with nothing set, and end them after the test."""
    processes: list[Process] = []

    def launch(*arguments: str, folder: Path | None = None, **settings: Any) -> Process:
        """Start a process with just these arguments and this environment."""
        process = Process(folder or tmp_path, *arguments, settings=settings)
        processes.append(process)
        process.listening()
        return process

    yield launch
    for process in processes:
        process.kill()


class Start(Protocol):
    """Starts a server of the test's own."""

    async def __call__(
        self, *arguments: str, strict: bool = True, database: str = "", **settings: object
    ) -> Server:
        """Start it with these arguments and settings, on a fresh database or a given one."""


@pytest.fixture
async def start(
    new_database: Databases, session: aiohttp.ClientSession, tmp_path: Path
) -> AsyncIterator[Start]:
    """Give a function that starts servers; after the test each of them ends in good order."""
    processes: list[Process] = []

    async def start(
        *arguments: str, strict: bool = True, database: str = "", **settings: object
    ) -> Server:
        """Start a server in a folder of its own."""
        folder = tmp_path / f"server-{len(processes) + 1}"
        folder.mkdir()
        url = database or await asyncio.to_thread(new_database, folder)
        both = {**NO_LIMITS, "secret_key": SECRET, "database_url": url, **settings}

        def launch() -> Process:
            """Start the process, the first time or again."""
            process = Process(folder, "--port", "0", *arguments, settings=both, strict=strict)
            processes.append(process)
            return process

        process = launch()
        await asyncio.to_thread(process.listening)
        return Server(process, session, database=url, restart=launch)

    yield start
    try:
        for process in processes:
            if process.popen.poll() is None:
                code = await asyncio.to_thread(process.stop)
                assert code == 0, process.stderr
            is_clean(process.stderr)
    finally:
        for process in processes:
            process.kill()
