"""create_app in a larger program: under a prefix, in a running loop, in a thread, twice."""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from chatserver import CHAT, Config, create_app
from tests.conftest import Databases
from tests.people import At, User, enrol
from tests.processes import serving
from tests.words import KEY, until


@pytest.fixture
def config(new_database: Databases, tmp_path: Path) -> Config:
    """Give settings for a fresh database, all limits as they are."""
    return Config(database_url=new_database(tmp_path), secret_key=KEY)


async def talk(alice: User) -> None:
    """Connect, and see a message over the socket and over HTTP."""
    async with alice.chat("1") as chat:
        sent = await chat.deliver("Hello World!")
        posted = await alice.say("1", "by post")
        await chat.hear("message", seq=posted["seq"])
    history = await alice.ask("GET", "/rooms/1/messages")
    assert [event["seq"] for event in history][-2:] == [sent["seq"], posted["seq"]]


async def run_once(config: Config) -> list[int]:
    """Run a program that has the server in it, and chat; return how two sockets were closed."""
    parent = web.Application()
    parent.add_subapp("/community/chat", create_app(config))
    async with aiohttp.ClientSession() as session:
        async with serving(parent) as url:
            (alice,) = await enrol(session, At(f"{url}/community/chat"), "alice")
            await talk(alice)
            assert (await alice.ask("GET", "/none", status=404))["error"] == "not_found"
            async with session.get(f"{url}/none") as outside:
                assert outside.content_type == "text/plain", "the larger program is left alone"
                assert "Content-Security-Policy" not in outside.headers
            sockets = [await alice.chat("1", token=token).__aenter__() for token in (None, "")]
            closed = asyncio.gather(*(socket.closed() for socket in sockets))
        return list(await closed)


async def test_in_a_running_loop_under_a_prefix(config: Config) -> None:
    """It starts and stops again, sockets are told, and neither a task nor a thread is left."""
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    for _ in range(2):
        assert await run_once(config) == [1001, 1001]
    new = asyncio.all_tasks() - tasks
    await until(lambda: not [task for task in new if not task.done()], "the end of its tasks")
    started = [one for one in set(threading.enumerate()) - threads if one.name[:7] != "asyncio"]
    await until(lambda: not [one for one in started if one.is_alive()], "the end of its threads")


async def test_in_a_thread(config: Config) -> None:
    """It runs in a loop of its own in a thread, where there are no signals."""
    assert await asyncio.to_thread(asyncio.run, run_once(config)) == [1001, 1001]


async def test_twice_in_one_program(new_database: Databases, tmp_path: Path) -> None:
    """Two servers in one program know nothing of each other."""
    parent = web.Application()
    for name, key in (("one", KEY), ("two", KEY[::-1])):
        (tmp_path / name).mkdir()
        url = new_database(tmp_path / name)
        parent.add_subapp(f"/{name}", create_app(Config(database_url=url, secret_key=key)))
    async with serving(parent) as url, aiohttp.ClientSession() as session:
        one, two = At(f"{url}/one"), At(f"{url}/two")
        (alice,), (bob,) = await enrol(session, one, "alice"), await enrol(session, two, "bob")
        await talk(alice)
        assert await bob.ask("GET", "/rooms/1/messages") == []
        await alice.at(two).ask("GET", "/users/me", status=401)
        async with alice.chat("1") as here, bob.chat("1") as there:
            await there.deliver("there")
            await here.deliver("here")
            assert {frame["username"] for frame in here.frames} == {alice.name}


def test_create_app_opens_nothing_and_reads_what_main_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Config environment and files count, the command line does not; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", "--port=nonsense", "--of=another"])
    (tmp_path / "config.ini").write_text("[chatserver]\nmessage_length = 7\nport = 8123\n")
    monkeypatch.setenv("PORT", "8124")
    threads = threading.active_count()
    config = create_app()[CHAT].config
    assert (config.message_length, config.port) == (7, 8124)
    create_app(Config(database_url="postgresql://nobody@127.0.0.1:1/x", secret_key=KEY))
    assert [path.name for path in tmp_path.iterdir()] == ["config.ini"]
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("name", "value"), [("port", 65536), ("port", None), ("workers", 2), ("secret_key", "short")]
)
def test_config_refuses_bad_values_by_name(name: str, value: Any) -> None:
    """A bad value is a ValueError that names its setting; a secret is shown nowhere."""
    with pytest.raises(ValueError, match=rf"^{name}: ") as refusal:
        Config(**{name: value})
    good = Config(secret_key=KEY, database_url="postgresql://me:hunter2@127.0.0.1/x")
    assert not re.search(f"hunter2|short|{KEY}", f"{refusal.value}{good!r}")
