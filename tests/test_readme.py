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
from tests.people import enrol
from tests.processes import ROOT, SETTINGS, running

README = (ROOT / "README.md").read_text("utf-8")
HERE = "http://127.0.0.1:8000"
WELCOME = f"chatserver listening on {HERE}"


def block(language: str, part: str) -> str:
    """Return the one block of this language that has this part."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [each for each in blocks if part in each]
    return str(found)


def shown_after(text: str) -> str:
    """Return what the README says that a block prints, as a pattern with any time for its times."""
    shown = re.match(r"```\n\n((?: {4}.*\n)+)", README.partition(text)[2])
    assert shown
    pattern = re.escape(shown[1].strip().replace("\n    ", "\n"))
    return pattern.replace(re.escape("2026-11-22T12:00:00.000Z"), "[0-9T:.-]+Z")


async def shell(text: str, folder: Path, **variables: str) -> str:
    """Run a block as somebody who types it, and return what it prints."""
    code, out = await run("bash", "-euc", text, folder=folder, **variables)
    assert code == 0, f"{text}: {out}"
    return out


async def prints(program: Program, count: int = 1, patience: float = 20) -> list[str]:
    """Return the next lines that a program prints."""
    assert program.stdout
    async with asyncio.timeout(patience):
        return [(await program.stdout.readline()).decode().strip() for _ in range(count)]


def client(folder: Path, url: str) -> list[str]:
    """Write the client in Python, which shall go to this address; return its command."""
    text = block("python", "ws_connect").replace(HERE, url)
    (folder / "client.py").write_text(text, "utf-8")
    return [sys.executable, "client.py"]


# --- The first message


async def test_the_first_message_is_told_as_it_happens(start: Start, tmp_path: Path) -> None:
    """Typed one after another, the commands print what stands below them; both clients chat."""
    url = str((await start()).client.make_url("")).rstrip("/")
    for part in ("/auth/register", "/rooms/1/messages"):
        text = block("sh", part)
        printed = await shell(text.replace(HERE, url), tmp_path)
        assert re.fullmatch(shown_after(text), printed), printed
    async with started(*client(tmp_path, url), folder=tmp_path) as out:
        printed = "\n".join(await prints(out, 2))
        assert re.fullmatch(shown_after(block("python", "ws_connect")), printed), printed
    node = tool("node")
    version = int((await shell("node --version", tmp_path))[1:3])
    if version < 20:
        pytest.skip("node 18 has no WebSocket, the README wants node 22")
    flag = ["--experimental-websocket"] if version < 22 else []
    (tmp_path / "client.mjs").write_text(block("js", "WebSocket").replace(HERE, url), "utf-8")
    async with started(node, *flag, "client.mjs", folder=tmp_path) as out:
        assert (await prints(out, 3))[-1] == "alice Hello from JavaScript!"


@pytest.mark.slow
async def test_the_python_client_misses_nothing_and_says_nothing_twice(
    new_database: Databases, tmp_path: Path
) -> None:
    """It waits for the server, says its message once, and after a kill -9 hears what it missed."""
    alice = {"username": "alice", "email": "alice@example.com", "password": "1234"}
    database, port = new_database(tmp_path), postgres.free_port()
    async with (
        running(tmp_path, database, port=port) as [process],
        aiohttp.ClientSession() as session,
    ):
        url = process.url
        (await session.post(f"{url}/auth/register", json=alice)).raise_for_status()
        process.kill()
        async with started(*client(tmp_path, url), folder=tmp_path) as out:
            await asyncio.sleep(1)
            process.start()
            assert await prints(out) == ["alice Hello again!"]
            process.kill()
            process.start()
            (bob,) = await enrol(session, await process.ready(), "bob")
            await bob.say("1", "while you were away")
            await bob.say("1", "and now")
            wanted = [f"{bob.name} while you were away", f"{bob.name} and now"]
            assert await prints(out, 2) == wanted
        said = [event["message"] for event in await bob.ask("GET", "/rooms/1/messages")]
        assert said == ["Hello again!", "while you were away", "and now"]


# --- Setting up, embedding, upkeep


@pytest.mark.slow
async def test_one_line_sets_up_and_runs_the_server(tmp_path: Path) -> None:
    """In a fresh clone the first line makes the environment, installs, and runs the server."""
    copy_program(tmp_path)
    line = block("sh", "chatserver.py\n")
    assert shown_after(line) == re.escape(WELCOME)
    variables = {"PORT": "0", "HOST": "127.0.0.1"}
    async with started("bash", "-c", line, folder=tmp_path, **variables) as out:
        last = (await prints(out, patience=120))[0]
        assert re.fullmatch(WELCOME.replace("8000", r"\d+"), last), last


def test_ci_runs_the_line_of_the_tests() -> None:
    """What CI calls is what the README tells people to type."""
    assert block("sh", "pytest") in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.slow
async def test_the_server_is_a_part_of_a_larger_site(tmp_path: Path) -> None:
    """The snippet serves the chat below its prefix."""
    port = postgres.free_port()
    text = block("python", "add_subapp").replace("8080", str(port))
    (tmp_path / "site.py").write_text(text, "utf-8")
    command = [sys.executable, "-u", "site.py"]
    async with started(*command, folder=tmp_path, PYTHONPATH=str(ROOT)) as out:
        await prints(out)
        url = f"http://127.0.0.1:{port}/chat/healthz"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert (await answer.json())["status"] == "ok"


@pytest.mark.slow
async def test_a_backup_is_made_and_put_in_place(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """The lines copy the database of a running server and put it back; clients get a reset."""
    number = 0 if engine == "sqlite" else 1
    backup, restore = (block("sh", part).splitlines()[number] for part in ("VACUUM", "UPDATE"))
    if engine == "sqlite":
        tool("sqlite3")
    url = new_database(tmp_path)
    variables = {"DATABASE_URL": url, "PATH": f"{postgres.binaries()}:{os.environ['PATH']}"}
    async with aiohttp.ClientSession() as session:
        async with running(tmp_path, url) as [process]:
            (alice,) = await enrol(session, process, "alice")
            await alice.say("1", "kept")
            await shell(backup, tmp_path, **variables)
            await alice.say("1", "said after the backup")
            async with alice.chat("1") as chat:
                old = chat.hello
        await shell(restore, tmp_path, **variables)
        async with running(tmp_path, url) as [process]:
            alice = alice.at(process)
            said = [event["message"] for event in await alice.ask("GET", "/rooms/1/messages")]
            assert said == ["kept"]
            query = f"?after={old['seq'] - 1}&epoch={old['epoch']}"
            async with alice.chat("1", query) as chat:
                assert (await chat.hear("reset"))["seq"] == old["seq"] - 1
            await alice.say("1", "goes on")


# --- Claims


def test_what_it_names_exists() -> None:
    """Settings, files and sections that the README names are there; what it lacks is not."""
    named = re.findall(r"\b([A-Z][A-Z_]+)=", README) + re.findall(r" --(port|workers)\b", README)
    assert {name.lower() for name in named} <= {*SETTINGS, "token"}
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    headings = re.findall("^## (.*)$", README.lower(), re.MULTILINE)
    anchors = {re.sub(r"\W+", "-", heading) for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_protocol_is_that_of_the_document() -> None:
    """Frames and close codes on the one page are those that /docs tells."""
    page = README.partition("## The protocol")[2].partition("## Embedding")[0]
    frames = page.partition("| You receive | |")[2].partition("Close codes")[0]
    kinds = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", frames, re.MULTILINE))))
    shown = GUIDE.partition("| The server sends |")[2]
    assert kinds == set(re.findall(r'^\| `\{"type": "(\w+)"', shown, re.MULTILINE))
    codes = set(re.findall(r"\b(1\d{3}|4\d{3})\b", page.partition("Close codes")[2]))
    table = GUIDE.partition("| Close code |")[2].partition("**A client")[0]
    assert codes <= set(re.findall(r"\b(1\d{3}|4\d{3})\b", table))
    assert {code for code in codes if code > "4"} == set(re.findall(r"\b(4\d{3})\b", table))


def test_the_file_is_as_long_and_laid_out_as_it_says() -> None:
    """Under 2,000 lines, in the sections that the README, itself short, names in that order."""
    assert len(README.encode()) <= 12_440
    program = (ROOT / "chatserver.py").read_text("utf-8")
    assert program.count("\n") < 2000
    sections = re.findall(r"^# -+ (\w+)$", program, re.MULTILINE)
    told = README.partition("Downwards: ")[2].partition(".")[0].split(", ")
    assert told == sections
