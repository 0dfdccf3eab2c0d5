"""The files in deploy/: proxies with sockets through them, the unit, the image and the rest."""

import asyncio
import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest

from tests.conftest import Start, is_clean, missing
from tests.helpers import PATIENCE, ROOT, SETTINGS, UPGRADE, Process, Server, until
from tests.postgres import free_port

DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "chatserver.service").read_text("utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
UPSTREAM = "127.0.0.1:8000"  # where the snippets expect the server
SITE = "chat.example.com"


def tool(name: str) -> str:
    """Return the path of a program that a test needs, or skip the test."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        missing(f"no {name}")
    return str(path)


# --- Proxies


def nginx(folder: Path, port: int, upstream: str) -> list[str]:
    """Write the configuration of an nginx that includes our snippet; return its command."""
    site = (DEPLOY / "nginx.conf").read_text("utf-8").replace(UPSTREAM, upstream)
    site = re.sub(r"listen \[::\]:80;\s*", "", site)
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
    bodies = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in bodies)
    user = "user root;\n" if os.geteuid() == 0 else ""
    start = f"daemon off;\n{user}pid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    config = folder / "nginx.conf"
    config.write_text(f"{start}http {{\naccess_log off;\n{paths}{site}}}\n", "utf-8")
    return [tool("nginx"), "-e", "stderr", "-p", str(folder), "-c", str(config)]


def caddy(folder: Path, port: int, upstream: str) -> list[str]:
    """Write our Caddyfile for a site without HTTPS; return the command that runs Caddy."""
    site = (DEPLOY / "Caddyfile").read_text("utf-8").replace(UPSTREAM, upstream)
    site = site.replace(f"{SITE} {{", f"http://127.0.0.1:{port} {{")
    assert str(port) in site
    config = folder / "Caddyfile"
    options = "{\nadmin off\nauto_https off\ndefault_bind 127.0.0.1\n}\n"
    config.write_text(options + site, "utf-8")
    return [tool("caddy"), "run", "--config", str(config), "--adapter", "caddyfile"]


def answers(port: int) -> bool:
    """Return whether somebody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Behind(Protocol):
    """Puts a proxy in front of a server."""

    async def __call__(self, server: Server) -> Server:
        """Start the proxy; return the server as it is seen through it."""


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
async def behind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Behind]:
    """Give a function that starts a proxy, set up as the snippet in deploy/ says."""
    proxies: list[subprocess.Popen[bytes]] = []

    async def behind(server: Server) -> Server:
        """Start the proxy on a free port and wait until it listens."""
        port = free_port()
        command = request.param(tmp_path, port, server.url.removeprefix("http://"))
        home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        with (tmp_path / "proxy.log").open("wb") as log:
            proxies.append(subprocess.Popen(command, env=home, stdout=log, stderr=log))  # noqa: S603
        log_text = (tmp_path / "proxy.log").read_text
        await until(lambda: answers(port) or proxies[0].poll() is not None, "the proxy")
        assert proxies[0].poll() is None, log_text()
        seen = Server(server.process, server.session, database=server.database)
        seen.url = f"http://127.0.0.1:{port}"
        return seen

    yield behind
    for proxy in proxies:
        proxy.terminate()
        await asyncio.to_thread(proxy.wait, PATIENCE)


async def test_two_people_chat_through_a_proxy(start: Start, behind: Behind) -> None:
    """Through the proxy people log in, chat live, resume and find their history."""
    server = await behind(await start(trusted_proxies="127.0.0.1"))
    alice, bob = await server.users("alice", "bob")
    async with alice.chat("1") as hers, bob.chat("1", after=0) as his:
        sent = await hers.deliver("hello " * 500)
        assert (await his.event("message", seq=sent["seq"]))["message"] == sent["message"]
        await his.deliver("and back")
        await hers.event("message", message="and back")
        assert his.numbers == list(range(1, sent["seq"] + 2))
    texts = [message["message"] for message in (await bob.get("/rooms/1/messages")).ok()]
    assert texts == ["hello " * 500, "and back"]


async def test_a_browser_logs_in_by_its_first_frame_through_a_proxy(
    start: Start, behind: Behind
) -> None:
    """The page's own origin, port and all, is let in through the proxy; another's is not."""
    server = await behind(await start(trusted_proxies="127.0.0.1"))
    alice = await server.user()
    async with server.chat("1", headers={"Origin": server.url}) as page:
        await page.send({"type": "auth", "token": alice.token})
        assert (await page.event("hello"))["username"] == alice.username
    for origin in ("https://evil.example", "http://127.0.0.1"):
        headers = {**UPGRADE, "Origin": origin}
        (await alice.get("/websockets/chat/1", headers=headers)).refused(403, "forbidden")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
async def test_the_server_knows_people_apart_behind_a_proxy(start: Start, behind: Behind) -> None:
    """Limits count for the address of the client, whatever that client claims in a header."""
    server = await behind(await start(trusted_proxies="127.0.0.1", logins_per_minute=2))

    async def fail(address: str, claim: str) -> int:
        """Fail to log in from an address while claiming to be another."""
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        form = {"username": "nobody", "password": "wrong"}
        headers = {"X-Forwarded-For": claim}
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(server.url + "/auth/token", data=form, headers=headers) as response,
        ):
            return response.status

    tries = [await fail("127.0.0.2", f"203.0.113.{number}") for number in range(4)]
    assert tries == [400, 400, 429, 429]
    assert await fail("127.0.0.3", "127.0.0.2") == 400


async def test_a_shutdown_is_announced_through_a_proxy(start: Start, behind: Behind) -> None:
    """When the server stops, the close code reaches the client behind the proxy."""
    server = await behind(await start(trusted_proxies="127.0.0.1"))
    alice = await server.user()
    async with alice.chat("1") as chat:
        assert await asyncio.to_thread(server.process.stop) == 0
        assert await chat.closed() == 1001


# --- The unit


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about the unit, once its Python is there."""
    analyze = tool("systemd-analyze")
    python = "/opt/chatserver/.venv/bin/python"
    assert python in UNIT
    unit = tmp_path / "chatserver.service"
    unit.write_text(UNIT.replace(python, str(Path(sys.executable).resolve())), "utf-8")
    command = [analyze, "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_leaves_room_for_sockets_and_time_to_stop() -> None:
    """The unit has descriptors for every socket and waits longer than a shutdown takes."""
    # The unit may name a key twice, which ConfigParser only takes when it is not strict.
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read_string(UNIT)
    service = unit["Service"]
    assert int(service["LimitNOFILE"]) > int(SETTINGS["sockets"])
    assert int(service["TimeoutStopSec"]) > 5
    assert service["WorkingDirectory"] == f"%S/{service['StateDirectory']}"
    assert service["ProtectSystem"] == "strict"
    assert service["DynamicUser"] == "yes"


# --- The image


def instructions(name: str) -> list[str]:
    """Return what follows each instruction of this name in the Dockerfile."""
    return re.findall(rf"^{name}\s+(.+)$", DOCKERFILE, re.MULTILINE)


def copied() -> list[str]:
    """Return the files that the image takes from the repository for the program itself."""
    (files,) = (line for line in instructions("COPY") if line.endswith(" /app/"))
    return files.split()[:-1]


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Process]:
    """Give a server that has only what the image has: its files and its environment."""
    (tmp_path / "app").mkdir()
    (tmp_path / "data").mkdir()
    for file in copied():
        shutil.copy(ROOT / file, tmp_path / "app")
    variables = dict(re.findall(r"\b([A-Z_]+)=(\S+)", instructions("ENV")[0]))
    assert variables["DATABASE_URL"] == "sqlite:////data/chat.db"
    settings = {name.lower(): variables[name] for name in ("HOST", "PORT")}
    settings["database_url"] = f"sqlite:///{tmp_path}/data/chat.db"
    settings["port"] = str(free_port())
    program = tmp_path / "app" / "chatserver.py"
    process = Process(tmp_path / "data", settings=settings, program=program)
    yield process
    process.kill()


async def test_the_image_has_all_the_files_that_the_server_needs(
    image: Process, session: aiohttp.ClientSession
) -> None:
    """With the files that the image copies the server starts, and shows its page and its docs."""
    url = await asyncio.to_thread(image.listening)
    assert url.startswith("http://0.0.0.0:")
    server = Server(image, session)
    server.url = url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/healthz"):
        assert (await server.get(path)).status == 200
    alice = await server.user()
    await alice.say("1", "from the image")
    assert await asyncio.to_thread(image.stop) == 0
    is_clean(image.stderr)


async def test_the_health_check_tells_a_server_that_runs_from_one_that_does_not(
    image: Process,
) -> None:
    """The image's health check succeeds while the server answers, and fails afterwards."""
    url = await asyncio.to_thread(image.listening)
    (line,) = instructions("HEALTHCHECK")
    python, *arguments = json.loads(line[line.index("[") :])
    assert python == "python"

    def check() -> int:
        """Run the health check as Docker does."""
        variables = {**os.environ, "PORT": url.rpartition(":")[2]}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, check=False)  # noqa: S603
        return done.returncode

    assert await asyncio.to_thread(check) == 0
    assert await asyncio.to_thread(image.stop) == 0
    assert await asyncio.to_thread(check) != 0


def test_the_image_is_built_of_two_stages_and_does_not_run_as_root() -> None:
    """The image ends as an ordinary user, and its command is given as a list."""
    assert len(instructions("FROM")) == 2
    assert instructions("USER") == ["chat"]
    assert instructions("VOLUME") == ["/data"]
    assert json.loads(instructions("CMD")[-1]) == ["python", "/app/chatserver.py"]


def test_the_build_sees_just_what_it_copies() -> None:
    """The list of files that Docker may see is that of the files copied."""
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    seen = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert sorted(seen) == sorted([*copied(), "requirements.txt"])
    assert [name for name in seen if not (ROOT / name).is_file()] == []


# --- Compose and Procfile


def composed() -> Any:
    """Return what compose.yaml says."""
    if find_spec("yaml") is None:
        missing("no PyYAML")
    return import_module("yaml").safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def test_compose_starts_the_server_once_postgres_is_ready() -> None:
    """The server waits for a healthy Postgres whose data outlive it, and needs a key of its own."""
    services = composed()["services"]
    chat, postgres = services["chat"], services["postgres"]
    context = (DEPLOY / chat["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / chat["build"]["dockerfile"]).is_file()
    assert chat["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert postgres["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert [volume.split(":")[0] for volume in postgres["volumes"]] == list(composed()["volumes"])
    assert chat["environment"]["SECRET_KEY"].startswith("${SECRET_KEY:?")
    assert chat["environment"]["DATABASE_URL"].startswith("postgresql://chat:${POSTGRES_PASSWORD:?")
    assert {name.lower() for name in chat["environment"]} <= set(SETTINGS)
    assert all(port.startswith("127.0.0.1:") for port in chat["ports"])


def test_the_procfile_starts_the_server_on_the_port_it_is_given(tmp_path: Path) -> None:
    """Given a PORT, the Procfile's command listens on every address, as hosts expect."""
    assert (DEPLOY / "Procfile").read_text("utf-8") == "web: python chatserver.py\n"
    port = free_port()
    settings = {"port": port, "database_url": f"sqlite:///{tmp_path}/chat.db"}
    process = Process(tmp_path, settings=settings)
    try:
        assert process.listening() == f"http://0.0.0.0:{port}"
        assert process.stop() == 0
    finally:
        process.kill()
