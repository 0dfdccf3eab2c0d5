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
from tests.people import At, company, enrol
from tests.processes import serving
from tests.words import KEY, until


async def run_once(config: Config) -> list[int]:
    """Run a program that has the server in it, and chat; return how two sockets were closed."""
    parent = web.Application()
    parent.add_subapp("/community/chat", create_app(config))
    async with aiohttp.ClientSession() as session:
        async with serving(parent) as url:
            (alice,) = await enrol(session, At(f"{url}/community/chat"), "alice")
            chats = [await alice.chat("1", token=token).__aenter__() for token in (None, "")]
            sent = await chats[0].say("Hello World!")
            posted = await alice.say("1", "by post")
            await chats[0].hears("by post")
            assert (await alice.ask("GET", "/rooms/1/messages"))[-2:] == [sent, posted]
            assert (await alice.ask("GET", "/none", status=404))["error"] == "not_found"
            async with session.get(f"{url}/none") as outside:
                assert outside.content_type == "text/plain", "the larger program is left alone"
                assert "Content-Security-Policy" not in outside.headers
            closed = asyncio.gather(*(chat.is_closed() for chat in chats))
        return list(await closed)


async def test_it_runs_again_and_again_and_in_a_thread(new_database: Databases) -> None:
    """Under a prefix it starts and stops, sockets are told, and no task and no thread is left."""
    config = Config(database_url=new_database(), secret_key=KEY)
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    for _ in range(2):
        assert await run_once(config) == [1001, 1001]
    assert await asyncio.to_thread(asyncio.run, run_once(config)) == [1001, 1001]
    new = asyncio.all_tasks() - tasks
    await until(lambda: all(task.done() for task in new), "the end of its tasks")
    started = [one for one in set(threading.enumerate()) - threads if one.name[:7] != "asyncio"]
    await until(lambda: not any(one.is_alive() for one in started), "the end of its threads")


async def test_twice_in_one_program(new_database: Databases) -> None:
    """Two servers in one program know nothing of each other."""
    parent = web.Application()
    for name, key in (("one", KEY), ("two", KEY[::-1])):
        config = Config(database_url=new_database(), secret_key=key)
        parent.add_subapp(f"/{name}", create_app(config))
    async with (
        serving(parent) as url,
        company(At(f"{url}/one"), "alice") as [alice],
        company(At(f"{url}/two"), "bob") as [bob],
        alice.chat("1") as here,
        bob.chat("1") as there,
    ):
        await alice.at(bob.place).ask("GET", "/users/me", status=401)
        await there.say("there")
        await here.say("here")
        assert {frame["username"] for frame in here.frames} == {alice.name}


def test_create_app_opens_nothing_and_reads_what_main_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Config environment and files count, the command line does not; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", "--port=nonsense", "--of=another"])
    monkeypatch.setenv("PORT", "8124")
    (tmp_path / "config.ini").write_text("[chatserver]\nmessage_length = 7\nport = 8123\n")
    threads = threading.active_count()
    config = create_app()[CHAT].config
    assert (config.message_length, config.port) == (7, 8124)
    create_app(Config(database_url="postgresql://nobody@127.0.0.1:1/x", secret_key=KEY))
    assert [path.name for path in tmp_path.iterdir()] == ["config.ini"]
    assert threading.active_count() == threads


def test_config_refuses_bad_values_by_name() -> None:
    """A bad value is a ValueError that names its setting; a secret is shown nowhere."""
    bad: list[tuple[str, Any]] = [("port", 65536), ("port", None), ("secret_key", "short")]
    for name, value in bad:
        with pytest.raises(ValueError, match=rf"^{name}: ((?!short).)*$"):
            Config(**{name: value})
    good = Config(secret_key=KEY, database_url="postgresql://me:hunter2@127.0.0.1/x")
    assert not re.search(f"hunter2|{KEY}", repr(good))
