"""Every transcript, client, snippet and line of the README is run as it stands there."""

import asyncio
import os
import re
import sys
from pathlib import Path

import aiohttp
import pytest

from tests import postgres
from tests.commands import Program, copy_program, run, started, tool
from tests.conftest import Databases, Start
from tests.document import GUIDE
from tests.people import company
from tests.processes import PROGRAM, ROOT, SETTINGS, running

README = (ROOT / "README.md").read_text("utf-8")
HERE = "http://127.0.0.1:8000"


def block(language: str, part: str, url: str = HERE) -> str:
    """Return the one block of this language that has this part, for a server at this address."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [each for each in blocks if part in each]
    return str(found).replace(HERE, url)


def is_shown(printed: str, part: str) -> None:
    """Check that something printed what stands below its block in the README, at another time."""
    shown = re.search(r"^```\n\n((?: {4}.*\n)+)", README.partition(part)[2], re.MULTILINE)
    assert shown
    pattern = re.escape(shown[1].strip().replace("\n    ", "\n")).replace("8000", r"\d+")
    assert re.fullmatch(re.sub("2026.*?Z", "[0-9T:.-]+Z", pattern), printed), printed


async def prints(program: Program, count: int = 1, patience: float = 20) -> str:
    """Return the next lines that a program prints."""
    assert program.stdout
    async with asyncio.timeout(patience):
        lines = [await program.stdout.readline() for _ in range(count)]
    return b"".join(lines).decode().strip()


async def test_the_first_message_is_told_as_it_happens(start: Start, tmp_path: Path) -> None:
    """Typed one after another, the commands print what stands below them; both clients chat."""
    url = str((await start()).client.make_url("")).rstrip("/")
    for part in ("/auth/register", "/rooms/1/messages"):
        _, printed = await run("bash", "-euc", block("sh", part, url), folder=tmp_path)
        is_shown(printed, part)
    client = block("python", "ws_connect", url)
    async with started(sys.executable, "-c", client, folder=tmp_path) as out:
        is_shown(await prints(out, 2), "ws_connect")
    node = [tool("node"), "--experimental-websocket"]  # which is none any more since version 22
    if (await run(*node, "-e", "WebSocket", folder=tmp_path))[0]:
        pytest.skip("this node has no WebSocket")
    command = [*node, "--input-type=module", "-e", block("js", "WebSocket", url)]
    async with started(*command, folder=tmp_path) as out:
        assert (await prints(out, 3)).endswith("alice Hello from JavaScript!")


@pytest.mark.slow
async def test_the_python_client_misses_nothing_and_says_nothing_twice(
    new_database: Databases, tmp_path: Path
) -> None:
    """It waits for the server, says its message once, and after a kill -9 hears what it missed."""
    alice = {"username": "alice", "email": "alice@example.com", "password": "1234"}
    async with (
        running(tmp_path, new_database(tmp_path), port=postgres.free_port()) as [process],
        company(process, "bob") as [bob],
    ):
        client = block("python", "ws_connect", process.url)
        await bob.ask("POST", "/auth/register", alice)
        process.kill()
        async with started(sys.executable, "-c", client, folder=tmp_path) as out:
            await asyncio.sleep(1)
            process.start()
            assert await prints(out) == "alice Hello again!"
            await process.again()
            await bob.say("1", "while you were away")
            assert await prints(out) == f"{bob.name} while you were away"
        said = [event["message"] for event in await bob.ask("GET", "/rooms/1/messages")]
        assert said == ["Hello again!", "while you were away"]


@pytest.mark.slow
async def test_one_line_runs_the_server_and_a_few_embed_it(tmp_path: Path) -> None:
    """In a fresh clone the first line installs and runs it; a snippet serves it below a prefix."""
    copy_program(tmp_path)
    line, place = block("sh", "chatserver.py\n"), {"PORT": "0", "HOST": "127.0.0.1"}
    async with started("bash", "-c", line, folder=tmp_path, **place) as out:
        is_shown(await prints(out, patience=120), "chatserver.py\n")
    port = postgres.free_port()
    snippet = block("python", "add_subapp").replace("8080", f"{port}")
    async with started(sys.executable, "-uc", snippet, folder=tmp_path) as out:
        await prints(out)
        async with aiohttp.request("GET", f"http://127.0.0.1:{port}/chat/healthz") as answer:
            assert answer.status == 200


@pytest.mark.slow
async def test_a_backup_is_made_and_put_in_place(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """The lines copy the database of a running server and put it back; clients get a reset."""
    number = ["sqlite", "postgres"].index(engine)
    backup, restore = (block("sh", part).splitlines()[number] for part in ("VACUUM", "UPDATE"))
    tool("sqlite3")
    url = new_database(tmp_path)
    variables = {"DATABASE_URL": url, "PATH": f"{postgres.binaries()}:{os.environ['PATH']}"}
    async with running(tmp_path, url) as [process], company(process, "alice") as [alice]:
        await alice.say("1", "kept")
        assert (await run("bash", "-c", backup, folder=tmp_path, **variables))[0] == 0
        await alice.say("1", "said after the backup")
        async with alice.chat("1") as chat:
            old = chat.hello
        assert await process.end() == 0
        assert (await run("bash", "-c", restore, folder=tmp_path, **variables))[0] == 0
        await process.again()
        (said,) = await alice.ask("GET", "/rooms/1/messages")
        assert said["message"] == "kept"
        async with alice.chat("1", f"?after={old['seq'] - 1}&epoch={old['epoch']}") as chat:
            assert (await chat.hears(type="reset"))["seq"] == old["seq"] - 1
            await chat.say("goes on")


def test_what_it_names_exists() -> None:
    """Settings and files of the pages are there, and sections, frames and codes of the README."""
    pages = [ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), target
    texts = "".join(page.read_text("utf-8") for page in pages[:2])
    named = {name.lower() for name in re.findall(r"\b([A-Z][A-Z_]+)=", texts)}
    assert named <= {*SETTINGS, "token", "postgres_password"}
    sections = re.findall(r"^# -+ (\w+)$", PROGRAM.read_text("utf-8"), re.MULTILINE)
    assert f"Downwards: {', '.join(sections)}." in README and len(README.encode()) <= 12_440
    assert block("sh", "pytest") in (ROOT / ".ci" / "run").read_text("utf-8")
    protocol = README.partition("## The protocol")[2].partition("## Embedding")[0]
    frames, _, closing = protocol.partition("| You receive | |")[2].partition("Close codes")
    kinds = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", frames, re.MULTILINE)))
    shown = GUIDE.partition("| The server sends |")[2]
    assert set(kinds) == set(re.findall(r'^\| `\{"type": "(\w+)"', shown, re.MULTILINE))
    table = GUIDE.partition("| Close code |")[2].partition("**A client")[0]
    codes, known = (set(re.findall(r"\b[14]\d{3}\b", text)) for text in (closing, table))
    assert codes <= known and not [code for code in known - codes if code > "4"]
