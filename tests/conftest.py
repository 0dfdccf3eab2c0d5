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
from contextlib import closing
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from pytest_aiohttp import AiohttpClient

import chatserver
from tests import postgres
from tests.helpers import Server
from tests.words import KEY, NO_LIMITS, until

Databases = Callable[..., str]  # of SQLite with the folder that it is to lie in, if in any
Start = Callable[..., Awaitable[Server]]  # with settings; beside another one, if one is given
SCRYPT = chatserver.SCRYPT  # as it is outside of these tests


def pytest_configure() -> None:
    """Let a SIGTERM, as `timeout` sends it, end the run with all that the fixtures started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def constants() -> Iterator[None]:
    """Make a hash cost next to nothing, and let no poll make up for a note that was lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatserver, "SCRYPT", "scrypt$2$8$1")
        patch.setattr(chatserver, "POLL", 600)
        yield


@pytest.fixture
async def brisk() -> AsyncIterator[None]:
    """Take the clients' own loop out of its debug mode, for they have much to do."""
    loop = asyncio.get_running_loop()
    loop.set_debug(False)
    yield
    loop.set_debug(True)


# --- Databases


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Give the URL of a Postgres to create databases on, for the whole run."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        drops = (f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in postgres.MADE)
        postgres.execute_apart(url, *drops)
        return
    with closing(postgres.Cluster()) as cluster:
        yield cluster.url


@pytest.fixture
def cluster() -> Iterator[postgres.Cluster]:
    """Give a Postgres of the test's own, to stop, start and cut off as it likes."""
    with closing(postgres.Cluster()) as cluster:
        yield cluster


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name the database engine that the test runs on."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_database(engine: str, request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Give a function that makes a fresh database of the engine and returns its URL."""
    if engine == "postgres":
        url = request.getfixturevalue("postgres_url")
        yield lambda _=None: postgres.create_database(url)
        return
    with tempfile.TemporaryDirectory(prefix="chat-sqlite-", dir=postgres.roomy()) as quick:
        yield lambda folder=None: f"sqlite:///{folder or tempfile.mkdtemp(dir=quick)}/chat.db"


# --- Servers


def config(database: str, **settings: Any) -> chatserver.Config:
    """Return the settings of a server without limits, and those given."""
    fixed: dict[str, Any] = {**NO_LIMITS, "secret_key": KEY, "database_url": database}
    return chatserver.Config(**(fixed | settings))


async def hear_each_other(server: Server, beside: Server) -> None:
    """Wait until two processes on one database get each other's notes."""
    await until(lambda: beside.hub.peers and server.hub.peers, "notes of each other")


@pytest.fixture(scope="session")
async def servers(new_database: Databases) -> AsyncIterator[list[Server]]:
    """Run the servers that most tests share: two on Postgres, one on SQLite."""
    url = new_database()
    apps = [
        chatserver.create_app(config(url)) for _ in range(2 if url.startswith("postgres") else 1)
    ]
    running = [Server(TestClient(TestServer(app))) for app in apps]
    for server in running:
        await server.client.start_server()
    if running[0].shared:
        await hear_each_other(*running)
    await running[0].user("first")  # who owns the Lobby, so that nobody else does
    yield running
    for server in running:
        await server.client.close()


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
    new_database: Databases, aiohttp_client: AiohttpClient, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Start]:
    """Give a function that starts servers; those that still run after the test stop in order."""
    started: list[Server] = []

    async def start(beside: Server | None = None, **settings: Any) -> Server:
        """Start a server; a second one on a file of SQLite's is the first one."""
        if beside and beside.runs and not beside.shared:
            return beside
        url = beside.config.database_url if beside else new_database()
        app = chatserver.create_app(config(url, **settings))
        started.append(Server(await aiohttp_client(app)))
        if beside and beside.runs:
            await hear_each_other(started[-1], beside)
        return started[-1]

    yield start
    for server in started:
        await server.forget()
    for server in started:
        await server.client.close()
    is_clean(caplog)


def is_clean(caplog: pytest.LogCaptureFixture) -> None:
    """Check that nothing was logged as a fault, but what the test has cleared away."""
    names, levels = ("chatserver", "asyncio", "aiohttp.web"), ("ERROR", "CRITICAL")
    records = [one for one in caplog.get_records("call") if one.name in names]
    assert not [one.getMessage() for one in records if one.levelname in levels]
