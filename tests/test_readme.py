"""Every transcript, client and snippet of the README is run as it stands there."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Launch, missing
from tests.helpers import PASSWORD, ROOT, Server, until

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "sh"]
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
SCRIPTS = [text for language, text in BLOCKS if language == "js"]
HERE = "http://127.0.0.1:8000"


def shown_after(block: str) -> str:
    """Return what the README says that a block prints, with any time for its times."""
    after = README.partition(block)[2].partition("```\n")[2]
    shown = re.match(r"\s*\n((?: {4}.*\n)+)", after)
    assert shown
    text = re.escape(shown[1].strip())
    return re.sub(r"2026\\-11\\-22T12:00:00\\\.000Z", r"[0-9T:.-]+Z", text)


async def test_the_transcript_prints_what_it_says(launch: Launch) -> None:
    """The first commands of the README, typed one after another, answer what stands below them."""
    url = launch("--port", "0").listening()
    register, talk = SHELL[1:3]
    for block in (register, talk):
        script = block.replace(HERE, url)
        shell = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", script], capture_output=True, text=True, check=True
        )
        assert re.fullmatch(shown_after(block), shell.stdout.strip()), shell.stdout


@pytest.fixture
def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def follow(command: list[str], environment: dict[str, str], wanted: str) -> None:
    """Run a client until it prints what is wanted."""
    client = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
    )
    assert client.stdout
    try:
        async with asyncio.timeout(20):
            while wanted not in (line := (await client.stdout.readline()).decode()):
                assert line, "the client ended"
    finally:
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()


async def test_the_python_client_chats(server: Server, tmp_path: Path) -> None:
    """The client in Python posts, and prints what it hears."""
    alice = await server.user("alice")
    await alice.get("/rooms/1")
    text = (
        SNIPPETS[0].replace("alice@example.com", alice.username).replace('"1234"', repr(PASSWORD))
    )
    (tmp_path / "client.py").write_text(text, "utf-8")
    command = [sys.executable, str(tmp_path / "client.py")]
    await follow(command, {"CHAT_URL": server.url}, f"{alice.username} Hello World!")


async def test_the_javascript_client_chats(server: Server, tmp_path: Path) -> None:
    """The client in JavaScript logs in with its first frame, posts, and prints what it hears."""
    if not (node := shutil.which("node")):
        missing("node is not installed")
    assert node
    alice = await server.user("alice")
    text = SCRIPTS[0].replace("alice@example.com", alice.username).replace('"1234"', repr(PASSWORD))
    text = text.replace(HERE, server.url)
    (tmp_path / "client.mjs").write_text(text, "utf-8")
    version = subprocess.check_output([node, "--version"])  # noqa: S603
    flag = ["--experimental-websocket"] if int(version[1:3]) < 22 else []
    command = [node, *flag, str(tmp_path / "client.mjs")]
    await follow(command, {}, f"{alice.username} Hello from JavaScript!")


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_the_embedding_snippets_serve(number: int, tmp_path: Path, free_port: int) -> None:
    """Each way of embedding that the README shows serves the health check."""
    text = SNIPPETS[number].replace("8080", str(free_port))
    (tmp_path / "program.py").write_text(text, "utf-8")
    program = await asyncio.create_subprocess_exec(
        *[sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    path = "/chat/healthz" if "add_subapp" in text else "/healthz"
    try:
        answers: list[bytes] = []

        def answered() -> bool:
            """Ask once."""
            url = f"http://127.0.0.1:{free_port}{path}"
            answers.append(subprocess.run(["curl", "-s", url], capture_output=True).stdout)  # noqa: PLW1510, S603, S607
            return b'"ok"' in answers[-1]

        await until(answered, "the health check")
    finally:
        program.kill()
        await program.wait()


def test_every_test_that_the_promises_name_exists() -> None:
    """The tests that the README names for each promise are there."""
    promises = (ROOT / "tests" / "test_promises.py").read_text("utf-8")
    for name in re.findall(r"`(test_\d_)…`", README):
        assert f"def {name}" in promises, name
