"""create_app in a larger program: under a prefix, in a running loop, in a thread, twice."""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from chatserver import Config, create_app
from tests.conftest import Databases
from tests.helpers import SECRET, UPGRADE, Chat, Pool, Server, unique

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")


class Embedded(Server):
    """A server in this process, seen with the eyes of the other tests."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        """Speak to the server at an address, which may have a path."""
        self.url, self.session = url, session
        self.database = ""
        self._taken = []
        self.pool = Pool()


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """Run an application in this loop on a free port, and yield its address."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def config(new_database: Databases, tmp_path: Path) -> Config:
    """Give settings for a fresh database, all limits as they are."""
    return Config(database_url=new_database(tmp_path), secret_key=SECRET, metrics="on")


async def hello_world(server: Server) -> None:
    """Register, log in, connect, and see a message over the socket and over HTTP."""
    alice = await server.user(unique("alice"))
    async with server.chat("1", token=alice.token) as chat:
        sent = await chat.deliver("Hello World!")
        posted = await alice.say("1", "by post")
        await chat.upto(posted["seq"])
    history = (await alice.get("/rooms/1/messages")).ok()
    assert [event["seq"] for event in history][-2:] == [sent["seq"], posted["seq"]]


async def test_everything_works_under_a_prefix(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """As a sub-application page, docs, log-in, sockets and refusals are as ever."""
    parent = web.Application()

    async def index(_: web.Request) -> web.Response:
        """Answer for the larger program."""
        return web.Response(text="the larger program")

    parent.router.add_get("/", index)
    parent.add_subapp("/community/chat", create_app(config))
    async with serving(parent) as url:
        server = Embedded(f"{url}/community/chat", session)
        await hello_world(server)
        for path in ("/", "/docs", "/redoc"):
            answer = await server.get(path)
            assert answer.status == 200, answer
            page = answer.body.decode()
            assert "script-src" in answer.headers["Content-Security-Policy"]
            rooted = re.findall(r"""(?:src|href|action)=["'](/[^"']*)""", page)
            assert not rooted, "an absolute path leaves the prefix"
            assert not re.search(r"""(?:fetch|request|api)\(\s*[`"']/""", page), path
        document = (await server.get("/openapi.json")).ok()
        servers = [one["url"] for one in document.get("servers", [])]
        assert all(not one.startswith("/") or one == "/community/chat" for one in servers), servers
        (await server.get("/healthz")).ok()
        assert (await server.get("/metrics")).status == 200
        (await server.get("/rooms")).refused(401, "unauthorized")
        (await server.get("/nothing-here")).refused(404, "not_found")
        (await server.request("DELETE", "/rooms")).refused(405, "method_not_allowed")
        refused = await server.login("nobody-at-all", "wrong")
        refused.refused(400, "invalid_grant")
        assert refused.json["error_description"] == refused.json["detail"]
        answer = await server.get("/websockets/chat/1", headers={**UPGRADE, "Authorization": "x"})
        answer.refused(401)
        async with session.get(f"{url}/") as outside:
            assert await outside.text() == "the larger program"
            assert "Content-Security-Policy" not in outside.headers, "the parent is left alone"
        async with session.get(f"{url}/nothing-here") as outside:
            assert outside.status == 404
            assert "X-Frame-Options" not in outside.headers


async def test_the_document_points_to_where_the_server_is(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """Under a prefix Swagger's calls and its token URL are resolved below that prefix."""
    parent = web.Application()
    parent.add_subapp("/chat", create_app(config))
    async with serving(parent) as url:
        document = (await Embedded(f"{url}/chat", session).get("/openapi.json")).ok()
        for scheme in document["components"]["securitySchemes"].values():
            for flow in scheme.get("flows", {}).values():
                assert not flow["tokenUrl"].startswith("/"), "leaves the prefix"
        base = document.get("servers", [{"url": "/"}])[0]["url"]
        assert not base.startswith("/") or base == "/chat", base


async def test_in_a_running_loop_beside_other_work(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """AppRunner starts and stops it in a loop that goes on, and nothing of it is left behind."""
    before = asyncio.all_tasks()
    threads = threading.active_count()
    for _ in range(2):
        async with serving(create_app(config)) as url:
            await hello_world(Embedded(url, session))
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if "chatserver" in repr(task)}
    assert not left
    assert threading.active_count() <= threads + 1


async def test_sockets_are_told_when_the_larger_program_stops(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """When the runner cleans up, sockets close 1001, and it does not take long."""
    parent = web.Application()
    parent.add_subapp("/chat", create_app(config))
    async with asyncio.timeout(20), serving(parent) as url:
        server = Embedded(f"{url}/chat", session)
        alice = await server.user("alice")
        chat = await Chat(server, "1", alice.token).__aenter__()
        stranger = await Chat(server, "1", None).__aenter__()
        closed = asyncio.gather(chat.closed(), stranger.closed())
        await asyncio.sleep(0)
    assert list(await closed) == [1001, 1001]
    await chat.__aexit__(None, None, None)
    await stranger.__aexit__(None, None, None)


async def test_in_a_thread(config: Config, session: aiohttp.ClientSession) -> None:
    """It runs in a loop of its own in a thread, where there are no signals."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        """Run until told to stop."""
        stop = asyncio.Event()
        async with serving(create_app(config)) as url:
            ready.put((url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    url, loop, stop = await asyncio.to_thread(ready.get, True, 10)  # noqa: FBT003
    try:
        await hello_world(Embedded(url, session))
    finally:
        loop.call_soon_threadsafe(stop.set)
        await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_twice_in_one_process(
    new_database: Databases, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Two servers in one process, even in one program, know nothing of each other."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    keys = (SECRET, SECRET[::-1])
    parent = web.Application()
    for folder, key in zip(folders, keys, strict=True):
        url = new_database(folder)
        parent.add_subapp(f"/{folder.name}", create_app(Config(database_url=url, secret_key=key)))
    async with serving(parent) as url:
        one, two = (Embedded(f"{url}/{folder.name}", session) for folder in folders)
        alice = await one.user("alice")
        await alice.say("1", "only here")
        (await two.get("/users/me", token=alice.token)).refused(401)
        (await two.login(alice.username)).refused(400)
        bob = await two.user("bob")
        assert (await bob.get("/rooms/1/messages")).ok() == []
        async with (
            one.chat("1", token=alice.token) as first,
            two.chat("1", token=bob.token) as second,
        ):
            await second.deliver("there")
            await first.deliver("here")
            assert {event["username"] for event in first.events} == {alice.username}


def test_create_app_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, thread or socket is made, and no setting is read from elsewhere, before it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///./from-environment.db")
    threads = threading.active_count()
    create_app(Config(database_url="sqlite:///./chat.db"))
    create_app(Config(database_url="postgresql://nobody@127.0.0.1:1/x", secret_key=SECRET))
    create_app()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_create_app_without_config_reads_what_main_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Config environment and files count, and the command line does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", "--port=nonsense", "--of=another"])
    (tmp_path / "config.ini").write_text("[chatserver]\nmessage_length = 7\nport = 8123\n")
    monkeypatch.setenv("PORT", "8124")
    app = create_app()
    config = next(one.config for one in app.values() if hasattr(one, "config"))
    assert (config.message_length, config.port) == (7, 8124)


BAD: dict[str, list[Any]] = {
    "database_url": ["", "mysql://x/y", "chat.db", None, 5],
    "secret_key": ["short", None, b"x" * 40],
    "algorithm": ["none", "RS256", "hs256", None],
    "port": [-1, 65536, "8000", 1.5, None, True],
    "workers": [0, -1, 2, "1"],
    "registration": ["maybe", True],
    "password_min_length": [-1, "4"],
    "message_length": [-1, 2.0],
    "messages_per_second": [-1, 0.5, "10"],
    "sockets": [-1, None],
    "retention_days": [-1, "7"],
    "access_token_expire_minutes": [-1, "60"],
    "allowed_origins": ["https://a.example", ["https://a.example"], None],
    "trusted_proxies": ["10.0.0.0/8", ("nonsense",), ("10.0.0.0/99",), ("",)],
    "metrics": ["yes", True],
    "docs_assets": [None, 1],
    "host": [None, 1],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD.items() for value in values]
)
def test_config_refuses_bad_values_by_name(key: str, value: Any) -> None:
    """A bad value is a ValueError that names its setting, and never shows a secret."""
    with pytest.raises(ValueError, match=rf"^{key}\b") as caught:
        Config(**{key: value})
    assert key != "secret_key" or str(value) not in str(caught.value)


def test_config_never_shows_its_secret() -> None:
    """A Config that is printed shows neither the key nor the database's password."""
    config = Config(secret_key=SECRET, database_url="postgresql://me:hunter2@127.0.0.1/x")
    assert SECRET not in repr(config)
    assert "hunter2" not in repr(config)


@pytest.mark.parametrize("given", [{"unknown": 1}, {"DATABASE_URL": "sqlite:///x.db"}])
def test_config_knows_its_settings_only(given: dict[str, Any]) -> None:
    """What is no setting is refused as any keyword is."""
    with pytest.raises(TypeError):
        Config(**given)


def test_config_needs_a_key_with_postgres() -> None:
    """With Postgres the key is required, for all processes have to share it."""
    with pytest.raises(ValueError, match=r"^secret_key"):
        Config(database_url="postgresql://127.0.0.1/x")
