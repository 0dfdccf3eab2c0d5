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
from tests.processes import ROOT, SETTINGS, running

README = (ROOT / "README.md").read_text("utf-8")
HERE = "http://127.0.0.1:8000"


def block(language: str, part: str) -> str:
    """Return the one block of this language that has this part."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [each for each in blocks if part in each]
    return str(found)


def is_shown(printed: str, text: str) -> None:
    """Check that something printed what stands below its text in the README, at another time."""
    shown = re.match(r"```\n\n((?: {4}.*\n)+)", README.partition(text)[2])
    assert shown
    pattern = re.escape(shown[1].strip().replace("\n    ", "\n")).replace("8000", r"\d+")
    assert re.fullmatch(re.sub("2026.*?Z", "[0-9T:.-]+Z", pattern), printed), printed


async def shell(text: str, folder: Path, **variables: str) -> str:
    """Run a block as somebody who types it, and return what it prints."""
    code, out = await run("bash", "-euc", text, folder=folder, **variables)
    assert code == 0, f"{text}: {out}"
    return out


async def prints(program: Program, count: int = 1, patience: float = 20) -> str:
    """Return the next lines that a program prints."""
    assert program.stdout
    async with asyncio.timeout(patience):
        lines = [await program.stdout.readline() for _ in range(count)]
    return b"".join(lines).decode().strip()


def client(url: str) -> list[str]:
    """Return the command that runs the client in Python, which shall go to this address."""
    return [sys.executable, "-c", block("python", "ws_connect").replace(HERE, url)]


async def test_the_first_message_is_told_as_it_happens(start: Start, tmp_path: Path) -> None:
    """Typed one after another, the commands print what stands below them; both clients chat."""
    url = str((await start()).client.make_url("")).rstrip("/")
    for part in ("/auth/register", "/rooms/1/messages"):
        text = block("sh", part)
        is_shown(await shell(text.replace(HERE, url), tmp_path), text)
    async with started(*client(url), folder=tmp_path) as out:
        is_shown(await prints(out, 2), block("python", "ws_connect"))
    if (version := int((await shell(f"{tool('node')} --version", tmp_path))[1:3])) < 20:
        pytest.skip("node 18 has no WebSocket, the README wants node 22")
    flag = ["--experimental-websocket"] if version < 22 else []
    text = block("js", "WebSocket").replace(HERE, url)
    command = ["node", *flag, "--input-type=module", "-e", text]
    async with started(*command, folder=tmp_path) as out:
        assert (await prints(out, 3)).endswith("alice Hello from JavaScript!")


@pytest.mark.slow
async def test_the_python_client_misses_nothing_and_says_nothing_twice(
    new_database: Databases, tmp_path: Path
) -> None:
    """It waits for the server, says its message once, and after a kill -9 hears what it missed."""
    alice = {"username": "alice", "email": "alice@example.com", "password": "1234"}
    port = postgres.free_port()
    async with (
        running(tmp_path, new_database(tmp_path), port=port) as [process],
        company(process, "bob") as [bob],
    ):
        url = process.url
        await bob.ask("POST", "/auth/register", alice)
        process.kill()
        async with started(*client(url), folder=tmp_path) as out:
            await asyncio.sleep(1)
            process.start()
            assert await prints(out) == "alice Hello again!"
            await process.again()
            await bob.say("1", "while you were away")
            assert await prints(out) == f"{bob.name} while you were away"
        said = [event["message"] for event in await bob.ask("GET", "/rooms/1/messages")]
        assert said == ["Hello again!", "while you were away"]


@pytest.mark.slow
async def test_one_line_sets_up_and_runs_the_server(tmp_path: Path) -> None:
    """In a fresh clone the first line makes the environment, installs, and runs the server."""
    copy_program(tmp_path)
    line, place = block("sh", "chatserver.py\n"), {"PORT": "0", "HOST": "127.0.0.1"}
    async with started("bash", "-c", line, folder=tmp_path, **place) as out:
        is_shown(await prints(out, patience=120), line)


@pytest.mark.slow
async def test_the_server_is_a_part_of_a_larger_site(tmp_path: Path) -> None:
    """The snippet serves the chat below its prefix."""
    port = postgres.free_port()
    command = [sys.executable, "-uc", block("python", "add_subapp").replace("8080", f"{port}")]
    async with started(*command, folder=tmp_path, PYTHONPATH=str(ROOT)) as out:
        await prints(out)
        async with aiohttp.request("GET", f"http://127.0.0.1:{port}/chat/healthz") as answer:
            assert answer.status == 200


@pytest.mark.slow
async def test_a_backup_is_made_and_put_in_place(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """The lines copy the database of a running server and put it back; clients get a reset."""
    number = 0 if engine == "sqlite" else 1
    backup, restore = (block("sh", part).splitlines()[number] for part in ("VACUUM", "UPDATE"))
    tool("sqlite3")
    url = new_database(tmp_path)
    variables = {"DATABASE_URL": url, "PATH": f"{postgres.binaries()}:{os.environ['PATH']}"}
    async with running(tmp_path, url) as [process], company(process, "alice") as [alice]:
        await alice.say("1", "kept")
        await shell(backup, tmp_path, **variables)
        await alice.say("1", "said after the backup")
        async with alice.chat("1") as chat:
            old = chat.hello
        assert await process.end() == 0
        await shell(restore, tmp_path, **variables)
        await process.again()
        said = [event["message"] for event in await alice.ask("GET", "/rooms/1/messages")]
        assert said == ["kept"]
        async with alice.chat("1", f"?after={old['seq'] - 1}&epoch={old['epoch']}") as chat:
            assert (await chat.hear("reset"))["seq"] == old["seq"] - 1
            await chat.deliver("goes on")


# --- Claims


def test_what_it_names_exists() -> None:
    """Settings, files and sections that the pages name are there; it and the file are short."""
    pages = [ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), target
    texts = "".join(page.read_text("utf-8") for page in pages[:2])
    named = {name.lower() for name in re.findall(r"\b([A-Z][A-Z_]+)=", texts)}
    assert named <= {*SETTINGS, "token", "postgres_password"}
    headings = re.findall("^## (.*)$", README.lower(), re.MULTILINE)
    anchors = {re.sub(r"\W+", "-", heading) for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors
    program = (ROOT / "chatserver.py").read_text("utf-8")
    sections = re.findall(r"^# -+ (\w+)$", program, re.MULTILINE)
    assert f"Downwards: {', '.join(sections)}." in README
    assert program.count("\n") <= 2000 and len(README.encode()) <= 12_440
    assert block("sh", "pytest") in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_protocol_is_that_of_the_document() -> None:
    """Frames and close codes on the one page are those that /docs tells."""
    page = README.partition("## The protocol")[2].partition("## Embedding")[0]
    frames, _, closing = page.partition("| You receive | |")[2].partition("Close codes")
    kinds = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", frames, re.MULTILINE)))
    shown = GUIDE.partition("| The server sends |")[2]
    assert set(kinds) == set(re.findall(r'^\| `\{"type": "(\w+)"', shown, re.MULTILINE))
    table = GUIDE.partition("| Close code |")[2].partition("**A client")[0]
    codes, known = (set(re.findall(r"\b[14]\d{3}\b", text)) for text in (closing, table))
    assert codes <= known and not [code for code in known - codes if code > "4"]
