"""create_app in a larger program: under a prefix, in a running loop, in a thread, twice."""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from chatserver import CHAT, Config, create_app
from tests.conftest import Databases
from tests.people import At, User, enrol
from tests.processes import serving
from tests.words import KEY


@pytest.fixture
def config(new_database: Databases, tmp_path: Path) -> Config:
    """Give settings for a fresh database, all limits as they are."""
    return Config(database_url=new_database(tmp_path), secret_key=KEY)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a client session."""
    async with aiohttp.ClientSession() as session:
        yield session


async def hello_world(session: aiohttp.ClientSession, url: str) -> User:
    """Register, log in, connect, and see a message over the socket and over HTTP."""
    (alice,) = await enrol(session, At(url), "alice")
    async with alice.chat("1") as chat:
        sent = await chat.deliver("Hello World!")
        posted = await alice.say("1", "by post")
        await chat.hear("message", seq=posted["seq"])
    history = await alice.ask("GET", "/rooms/1/messages")
    assert [event["seq"] for event in history][-2:] == [sent["seq"], posted["seq"]]
    return alice


async def test_everything_works_under_a_prefix(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """As a sub-application, page, docs, log-in, sockets and refusals are as ever."""
    parent = web.Application()

    async def index(_: web.Request) -> web.Response:
        """Answer for the larger program."""
        return web.Response(text="the larger program")

    parent.router.add_get("/", index)
    parent.add_subapp("/community/chat", create_app(config))
    async with serving(parent) as url:
        alice = await hello_world(session, f"{url}/community/chat")
        for path in ("/", "/docs", "/redoc"):
            async with session.get(alice.place.url + path) as answer:
                assert answer.status == 200
                assert "script-src" in answer.headers["Content-Security-Policy"] or path == "/"
                page = await answer.text()
            assert not re.search(r"""(?:src|href|action)=["']/""", page), "this leaves the prefix"
            for name in re.findall(r"""(?:src|href)=["']([\w./]+\.(?:js|css))["']""", page):
                async with session.get(f"{alice.place.url}/{name}") as answer:
                    assert answer.status == 200, name
                    assert not re.search(r"""(?:fetch|request|api)\([`"']/""", await answer.text())
        document = await alice.ask("GET", "/openapi.json")
        assert [server["url"] for server in document.get("servers", [])] in ([], ["."], ["./"])
        flows = document["components"]["securitySchemes"].values()
        urls = [flow["tokenUrl"] for scheme in flows for flow in scheme.get("flows", {}).values()]
        assert urls and not any(token_url.startswith("/") for token_url in urls)
        await alice.ask("GET", "/nothing-here", status=404)
        assert "detail" in await alice.ask("DELETE", "/rooms", status=405)
        stranger = alice._replace(token="x")
        assert (await stranger.ask("GET", "/rooms", status=401))["error"] == "unauthorized"
        form = {"username": "nobody-at-all", "password": "wrong"}
        refusal = await stranger.ask("POST", "/auth/token", form, status=400)
        assert refusal["error"] == "invalid_grant"
        assert refusal["error_description"] == refusal["detail"]
        async with session.get(f"{url}/") as outside:
            assert await outside.text() == "the larger program"
            assert "Content-Security-Policy" not in outside.headers, "the parent is left alone"
        async with session.get(f"{url}/nothing-here") as outside:
            assert outside.content_type == "text/plain", "and so are its errors"


async def test_in_a_running_loop_again_and_again(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """It starts and stops in a loop that goes on, and leaves no task and no thread behind."""
    before = asyncio.all_tasks()
    threads = set(threading.enumerate())
    for _ in range(2):
        async with serving(create_app(config)) as url:
            await hello_world(session, url)
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() - before if "chatserver" in repr(task)]
    left = [one for one in threading.enumerate() if one not in threads and one.is_alive()]
    for thread in left:
        await asyncio.to_thread(thread.join, 0 if thread.name.startswith("asyncio") else 2)
    assert not [one for one in left if one.is_alive() and not one.name.startswith("asyncio")]


async def test_sockets_are_told_when_the_larger_program_stops(
    config: Config, session: aiohttp.ClientSession
) -> None:
    """When the runner cleans up, sockets close 1001, and it does not take long."""
    parent = web.Application()
    parent.add_subapp("/chat", create_app(config))
    async with serving(parent) as url, asyncio.timeout(20):
        (alice,) = await enrol(session, At(f"{url}/chat"), "alice")
        chat = await alice.chat("1").__aenter__()
        stranger = await alice.chat("1", token="").__aenter__()
        closed = asyncio.gather(chat.closed(), stranger.closed())
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
    assert list(await closed) == [1001, 1001]
    assert asyncio.get_running_loop().time() - began < 5


async def test_in_a_thread(config: Config, session: aiohttp.ClientSession) -> None:
    """It runs in a loop of its own in a thread, where there are no signals."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        """Run until told to stop."""
        stop = asyncio.Event()
        async with serving(create_app(config)) as url:
            ready.put((url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    url, loop, stop = await asyncio.to_thread(ready.get, timeout=10)
    try:
        await hello_world(session, url)
    finally:
        loop.call_soon_threadsafe(stop.set)
        await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()


async def test_twice_in_one_process(
    new_database: Databases, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Two servers in one process, even in one program, know nothing of each other."""
    parent = web.Application()
    for name, key in (("one", KEY), ("two", KEY[::-1])):
        (tmp_path / name).mkdir()
        url = new_database(tmp_path / name)
        parent.add_subapp(f"/{name}", create_app(Config(database_url=url, secret_key=key)))
    async with serving(parent) as url:
        one, two = At(f"{url}/one"), At(f"{url}/two")
        alice = await hello_world(session, one.url)
        (bob,) = await enrol(session, two, "bob")
        assert await bob.ask("GET", "/rooms/1/messages") == []
        await alice.at(two).ask("GET", "/users/me", status=401)
        form = {"username": alice.name, "password": "1234"}
        await alice.at(two).ask("POST", "/auth/token", form, status=400)
        async with alice.chat("1") as here, bob.chat("1") as there:
            await there.deliver("there")
            await here.deliver("here")
            assert {frame["username"] for frame in here.frames} == {alice.name}


def test_create_app_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it runs no file, thread or connection is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "sqlite:///./from-environment.db")
    threads = threading.active_count()
    create_app(Config(database_url="sqlite:///./chat.db"))
    create_app(Config(database_url="postgresql://nobody@127.0.0.1:1/x", secret_key=KEY))
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
    config = create_app()[CHAT].config
    assert (config.message_length, config.port) == (7, 8124)


@pytest.mark.parametrize(
    ("key", "value"),
    [("port", 65536), ("port", None), ("workers", 0), ("secret_key", "short"), ("proxies", -1)],
)
def test_config_refuses_bad_values_by_name(key: str, value: Any) -> None:
    """A bad value is a ValueError that names its setting, and never shows a secret."""
    with pytest.raises(ValueError, match=rf"^{key}\b") as caught:
        Config(**{key: value})
    assert key != "secret_key" or value not in str(caught.value)


def test_config_needs_a_key_with_postgres_and_knows_its_settings_only() -> None:
    """With Postgres the key is required, and what is no setting is refused as any keyword is."""
    with pytest.raises(ValueError, match=r"^secret_key"):
        Config(database_url="postgresql://127.0.0.1/x")
    with pytest.raises(TypeError):
        Config(DATABASE_URL="sqlite:///x.db")  # type: ignore[call-arg]


def test_config_never_shows_its_secret() -> None:
    """A Config that is printed shows neither the key nor the database's password."""
    config = Config(secret_key=KEY, database_url="postgresql://me:hunter2@127.0.0.1/x")
    assert KEY not in repr(config)
    assert "hunter2" not in repr(config)
