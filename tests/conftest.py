"""The fixtures: every test that asks for a server runs on SQLite and on a real Postgres.

`chat` is one server for all tests; what they make in it is theirs alone. On Postgres a second one
on the same database, `there`, is another process to all intents: they share no object. SQLite
belongs to one process, so on SQLite `there` is `chat` itself. `start` makes a server of one's own.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import chatserver
from tests import postgres
from tests.helpers import Server
from tests.words import KEY, NO_LIMITS, until

Client = TestClient[web.Request, web.Application]
Databases = Callable[[Path], str]  # where SQLite's is to lie
Start = Callable[..., Awaitable[Server]]  # with settings; beside another one, if one is given
SCRYPT, POLL = chatserver.SCRYPT, chatserver.POLL  # what they are outside of these tests


def pytest_configure() -> None:
    """Let a SIGTERM, as `timeout` sends it, end the run with all that the fixtures started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def missing(reason: str) -> None:
    """Skip a test that cannot run here; in CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


# --- Databases


def new_cluster() -> postgres.Cluster:
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
    with closing(new_cluster()) as cluster:
        yield cluster.url


@pytest.fixture
def cluster() -> Iterator[postgres.Cluster]:
    """Give a Postgres of the test's own, to stop, start and cut off as it likes."""
    with closing(new_cluster()) as cluster:
        yield cluster


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name the database engine that the test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_database(engine: str, request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Give a function that makes a fresh database of the engine and returns its URL."""
    if engine == "sqlite":
        yield lambda folder: f"sqlite:///{folder / 'chat.db'}"
        return
    url: str = request.getfixturevalue("postgres_url")
    made: list[str] = []

    def create(_: Path) -> str:
        """Make a database on the Postgres of this run."""
        made.append(postgres.create_database(url))
        return made[-1]

    yield create
    # A cluster of our own goes away as a whole; on somebody else's we clean up behind us.
    for database in made if os.environ.get("TEST_DATABASE_URL") else []:
        postgres.drop_database(url, database)


@pytest.fixture(scope="session")
def folders() -> Iterator[Callable[[], Path]]:
    """Give a function that makes folders for databases, where a commit is quick."""
    with ExitStack() as stack:
        folder = partial(tempfile.TemporaryDirectory, prefix="chat-sqlite-", dir=postgres.roomy())
        yield lambda: Path(stack.enter_context(folder()))


# --- Servers


@pytest.fixture(scope="session")
def constants() -> Iterator[None]:
    """Make a hash cost next to nothing, and let no look into the database make up for a lost note.

    What a hash costs in earnest, and what such a look is for, is tested by itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatserver, "SCRYPT", "scrypt$2$8$1")
        patch.setattr(chatserver, "POLL", 600)
        yield


def config(database: str, **settings: Any) -> chatserver.Config:
    """Return the settings of a server without limits, and those given."""
    fixed: dict[str, Any] = {**NO_LIMITS, "secret_key": KEY, "database_url": database}
    return chatserver.Config(**(fixed | settings))


async def hear_each_other(*servers: Server) -> None:
    """Wait until processes on one Postgres get each other's notes."""
    if len(servers) > 1:
        await until(lambda: all(server.hub.peers for server in servers), "notes of each other")


@pytest.fixture(scope="session")
async def servers(
    constants: None,
    engine: str,
    new_database: Databases,
    folders: Callable[[], Path],
) -> AsyncIterator[list[Server]]:
    """Run the servers that most tests share: two on Postgres, one on SQLite."""
    del constants
    url = new_database(folders())
    count = 1 if engine == "sqlite" else 2
    clients = [Client(TestServer(chatserver.create_app(config(url)))) for _ in range(count)]
    for client in clients:
        await client.start_server()
    running = [Server(client) for client in clients]
    await hear_each_other(*running)
    await running[0].user("first")  # who owns the Lobby, so that nobody else does
    yield running
    for client in clients:
        await client.close()


@pytest.fixture
async def chat(servers: list[Server], caplog: pytest.LogCaptureFixture) -> AsyncIterator[Server]:
    """Give the shared server; after the test it has forgotten every socket and logged no fault."""
    yield servers[0]
    for server in servers:
        await server.forget()
    is_clean(caplog)


@pytest.fixture
def there(chat: Server, servers: list[Server]) -> Server:
    """Give another process on the database of `chat`, or `chat` itself on SQLite."""
    assert chat is servers[0]
    return servers[-1]


@pytest.fixture
async def start(
    constants: None,
    new_database: Databases,
    folders: Callable[[], Path],
    aiohttp_client: Callable[[web.Application], Awaitable[Client]],
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Start]:
    """Give a function that starts servers; those that still run after the test stop in order."""
    del constants
    started: list[Server] = []

    async def start(beside: Server | None = None, **settings: Any) -> Server:
        """Start a server; a second one on a file of SQLite's is the first one."""
        if beside and beside.runs and not beside.shared:
            return beside
        url = beside.config.database_url if beside else new_database(folders())
        app = chatserver.create_app(config(url, **settings))
        started.append(Server(await aiohttp_client(app)))
        if beside and beside.runs:
            await hear_each_other(beside, started[-1])
        return started[-1]

    yield start
    for server in started:
        await server.forget()
    is_clean(caplog)


def is_clean(caplog: pytest.LogCaptureFixture) -> None:
    """Check that nothing was logged as a fault, but what the test has cleared away."""
    faults = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name in ("chatserver", "asyncio", "aiohttp.web") and record.levelname != "WARNING"
        if record.levelname in ("ERROR", "CRITICAL") or record.exc_info
    ]
    assert not faults, faults


@pytest.fixture
async def brisk() -> AsyncIterator[None]:
    """Take the clients' own loop out of its debug mode, for they have much to do."""
    loop = asyncio.get_running_loop()
    loop.set_debug(False)
    yield
    loop.set_debug(True)
