"""The files in deploy/: proxies with sockets through them, the unit, the image and the rest."""

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml  # type: ignore[import-untyped]

from chatserver import Config
from tests.commands import copy_program, run, started, tool
from tests.people import At, enrol
from tests.postgres import free_port
from tests.processes import ROOT, SETTINGS, Process, running
from tests.words import until

DEPLOY = ROOT / "deploy"
UPSTREAM = "127.0.0.1:8000"  # where the snippets expect the server


def read(name: str) -> str:
    """Return the text of a file in deploy/."""
    return (DEPLOY / name).read_text("utf-8")


# --- Proxies


def nginx(folder: Path, port: int, upstream: str) -> list[str]:
    """Write the configuration of an nginx that includes our snippet; return its command."""
    site = read("nginx.conf").replace(UPSTREAM, upstream).replace("listen [::]:80;", "")
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
    bodies = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in bodies)
    user = "user root;\n" if os.geteuid() == 0 else ""
    start = f"daemon off;\n{user}pid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{start}http {{\naccess_log off;\n{paths}{site}}}\n")
    return [tool("nginx"), "-e", "stderr", "-p", f"{folder}", "-c", f"{folder}/nginx.conf"]


def caddy(folder: Path, port: int, upstream: str) -> list[str]:
    """Write our Caddyfile for a site without HTTPS; return the command that runs Caddy."""
    site = read("Caddyfile").replace(UPSTREAM, upstream)
    site = site.replace("chat.example.com {", f"http://127.0.0.1:{port} {{")
    options = "{\nadmin off\nauto_https off\ndefault_bind 127.0.0.1\n}\n"
    (folder / "Caddyfile").write_text(options + site)
    return [tool("caddy"), "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
async def behind(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Process, str]]:
    """Run a server behind a proxy, both as deploy/ says; give it and the proxy's address."""
    (proxies,) = set(re.findall(r"PROXIES=(\d)", read("nginx.conf") + read("Caddyfile")))
    settings: dict[str, Any] = {"proxies": proxies, "logins_per_minute": 2}
    async with running(tmp_path, f"sqlite:///{tmp_path}/chat.db", **settings) as [process]:
        port = free_port()
        command = request.param(tmp_path, port, process.url.removeprefix("http://"))
        home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}

        def listens() -> bool:
            """Try to connect to the proxy."""
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        async with started(*command, folder=tmp_path, **home):
            await until(listens, f"{command}")
            yield process, f"http://127.0.0.1:{port}"


@pytest.mark.slow
async def test_people_chat_through_a_proxy(behind: tuple[Process, str]) -> None:
    """Through it people log in, chat live, resume, and hear that the server shuts down."""
    process, url = behind
    async with aiohttp.ClientSession() as session:
        alice, bob = await enrol(session, At(url), "alice", "bob")
        async with alice.chat("1") as hers, bob.chat("1", "?after=0", token="") as his:
            await his.send(type="auth", token=bob.token)
            await his.hear("hello")
            sent = await hers.deliver("hello " * 500)
            assert (await his.hear("message", seq=sent["seq"]))["message"] == sent["message"]
            await his.deliver("and back")
            await hers.hear("message", message="and back")
            assert his.numbers == list(range(1, sent["seq"] + 2))
            ends = tuple(await asyncio.gather(hers.closed(), his.closed(), process.end()))
            assert ends == (1001, 1001, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
async def test_the_server_knows_people_apart_behind_a_proxy(behind: tuple[Process, str]) -> None:
    """Limits count for the address of the client, whatever that client claims in a header."""

    async def fail(address: str, claim: str) -> int:
        """Fail to log in from an address while claiming to be another."""
        form = {"username": "nobody", "password": "wrong"}
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with aiohttp.ClientSession(
            behind[1], connector=connector, headers={"X-Forwarded-For": claim}
        ) as session:
            return (await session.post("/auth/token", data=form)).status

    tries = [await fail("127.0.0.2", f"203.0.113.{number}") for number in range(4)]
    assert tries == [400, 400, 429, 429]
    assert await fail("127.0.0.3", "127.0.0.2") == 400


# --- The unit


@pytest.mark.slow
async def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about the unit, once its Python is there."""
    python = "/opt/chatserver/.venv/bin/python"
    assert python in read("chatserver.service")
    unit = tmp_path / "chatserver.service"
    unit.write_text(read(unit.name).replace(python, str(Path(sys.executable).resolve())))
    command = [tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    assert await run(*command, folder=tmp_path) == (0, "")


def test_the_unit_leaves_room_for_sockets_and_starts_all_again() -> None:
    """It has descriptors for every socket, waits for a shutdown, and starts after a failure."""
    unit = dict(re.findall(r"^(\w+)=(.*)$", read("chatserver.service"), re.MULTILINE))
    assert int(unit["LimitNOFILE"]) > Config().sockets
    assert int(unit["TimeoutStopSec"]) > 5
    assert unit["WorkingDirectory"] == f"%S/{unit['StateDirectory']}"
    assert (unit["ProtectSystem"], unit["DynamicUser"]) == ("strict", "yes")
    assert unit["Restart"] == "on-failure"


# --- The image


def instructions(name: str) -> list[str]:
    """Return what follows each instruction of this name in the Dockerfile."""
    text = read("Dockerfile").replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.+)$", text, re.MULTILINE)


def test_the_image_does_not_run_as_root_and_is_built_of_what_it_needs() -> None:
    """It ends as an ordinary user, runs the program, and Docker sees just the files it copies."""
    assert len(instructions("FROM")) == 2
    assert (instructions("USER"), instructions("VOLUME")) == (["chat"], ["/data"])
    assert json.loads(instructions("CMD")[-1]) == ["python", "/app/chatserver.py"]
    seen = set(re.findall("^!(.+)$", read("Dockerfile.dockerignore"), re.MULTILINE))
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert seen == copied - {"--from=packages", "/venv"}


@pytest.mark.slow
async def test_the_image_has_all_that_the_server_needs(tmp_path: Path) -> None:
    """Of its files alone the server runs; its health check and the copy of its database work."""
    for folder in ((data := tmp_path / "data"), (app := tmp_path / "app")):
        folder.mkdir()
    copy_program(app)
    assert instructions("COPY")[-2:] == ["chatserver.py schema.sql /app/", "web /app/web"]
    variables = dict(re.findall(r"\b([A-Z_]+)=(\S+)", instructions("ENV")[0]))
    assert variables["DATABASE_URL"] == "sqlite:////data/chat.db"
    settings = {"database_url": f"sqlite:///{data}/chat.db", "host": variables["HOST"]}
    port = str(free_port())
    process = Process(data, program=app / "chatserver.py", port=port, **settings)
    health = json.loads(instructions("HEALTHCHECK")[0].partition(" CMD ")[2])[1:]
    (copy,) = re.findall(r'docker exec chat python -c "(.*)"\n', read("README.md"))
    copy = copy.replace('\\"', '"').replace("/data", str(data))

    async def succeeds(*arguments: str) -> bool:
        """Run Python as Docker does."""
        return (await run(sys.executable, *arguments, folder=tmp_path, PORT=port))[0] == 0

    try:
        await process.ready()
        async with aiohttp.ClientSession(process.url, raise_for_status=True) as session:
            for path in ("/", "/docs", "/web/docs.js", "/openapi.json"):
                (await session.get(path)).release()
        assert await succeeds(*health)
        assert await succeeds("-c", copy)
        assert (data / "backup.db").stat().st_size > 0
        assert await process.end() == 0
        assert not await succeeds(*health)
    finally:
        process.kill()


# --- Compose and Procfile


def test_compose_starts_the_server_once_postgres_is_ready() -> None:
    """The server waits for a healthy Postgres whose data outlive it, and is started again."""
    composed = yaml.safe_load(read("compose.yaml"))
    chat, postgres = composed["services"]["chat"], composed["services"]["postgres"]
    context = (DEPLOY / chat["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / chat["build"]["dockerfile"]).is_file()
    assert chat["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert postgres["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert [volume.split(":")[0] for volume in postgres["volumes"]] == list(composed["volumes"])
    assert chat["environment"]["SECRET_KEY"].startswith("${SECRET_KEY:?")
    assert chat["environment"]["DATABASE_URL"].startswith("postgresql://chat:${POSTGRES_PASSWORD:?")
    assert {name.lower() for name in chat["environment"]} <= set(SETTINGS)
    assert all(port.startswith("127.0.0.1:") for port in chat["ports"])
    assert chat["restart"] == "unless-stopped"


@pytest.mark.slow
async def test_the_procfile_starts_the_server_on_the_port_it_is_given(tmp_path: Path) -> None:
    """Given a PORT, the Procfile's command listens on every address, as hosts expect."""
    assert read("Procfile") == "web: python chatserver.py\n"
    port, database = free_port(), f"sqlite:///{tmp_path}/chat.db"
    async with running(tmp_path, database, host="", port=port) as [process]:
        assert process.url == f"http://0.0.0.0:{port}"


def test_the_notes_name_settings_that_exist() -> None:
    """Every variable that the notes set is one of the server's, or of Docker's own."""
    for name in re.findall(r"\b([A-Z][A-Z_]+)=", read("README.md")):
        assert name.lower() in SETTINGS or name == "POSTGRES_PASSWORD", name
