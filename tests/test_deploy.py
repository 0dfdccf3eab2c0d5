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
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml  # type: ignore[import-untyped]

from chatserver import Config
from tests.conftest import missing
from tests.people import At, enrol
from tests.postgres import free_port
from tests.processes import PATIENCE, ROOT, SETTINGS, Process, running, until

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


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
async def behind(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Process, str]]:
    """Run a server behind a proxy, both as deploy/ says; give it and the proxy's address."""
    snippets = [(DEPLOY / name).read_text("utf-8") for name in ("nginx.conf", "Caddyfile")]
    (proxies,) = {number for text in snippets for number in re.findall(r"PROXIES=(\d)", text)}
    settings: dict[str, Any] = {"proxies": proxies, "logins_per_minute": 2}
    async with running(tmp_path, f"sqlite:///{tmp_path}/chat.db", **settings) as [process]:
        port, log = free_port(), tmp_path / "proxy.log"
        command = request.param(tmp_path, port, process.url.removeprefix("http://"))
        home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        with log.open("wb") as out:
            proxy = subprocess.Popen(command, env=os.environ | home, stdout=out, stderr=out)  # noqa: S603

        def listens() -> bool:
            """Try to connect to the proxy, which should not end."""
            assert proxy.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            await until(listens, "the proxy")
            yield process, f"http://127.0.0.1:{port}"
        finally:
            proxy.terminate()
            await asyncio.to_thread(proxy.wait, PATIENCE)


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
    form = {"username": "nobody", "password": "wrong"}

    async def fail(address: str, claim: str) -> int:
        """Fail to log in from an address while claiming to be another."""
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        headers = {"X-Forwarded-For": claim}
        async with (
            aiohttp.ClientSession(behind[1], connector=connector) as session,
            session.post("/auth/token", data=form, headers=headers) as answer,
        ):
            return answer.status

    tries = [await fail("127.0.0.2", f"203.0.113.{number}") for number in range(4)]
    assert tries == [400, 400, 429, 429]
    assert await fail("127.0.0.3", "127.0.0.2") == 400


# --- The unit


@pytest.mark.slow
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say about the unit, once its Python is there."""
    python = "/opt/chatserver/.venv/bin/python"
    assert python in UNIT
    unit = tmp_path / "chatserver.service"
    unit.write_text(UNIT.replace(python, str(Path(sys.executable).resolve())), "utf-8")
    command = [tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_leaves_room_for_sockets_and_starts_all_again() -> None:
    """It has descriptors for every socket, waits for a shutdown, and starts after a failure."""
    # The unit may name a key twice, which ConfigParser only takes when it is not strict.
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.read_string(UNIT)
    service = unit["Service"]
    assert int(service["LimitNOFILE"]) > Config().sockets
    assert int(service["TimeoutStopSec"]) > 5
    assert service["WorkingDirectory"] == f"%S/{service['StateDirectory']}"
    assert (service["ProtectSystem"], service["DynamicUser"]) == ("strict", "yes")
    assert service["Restart"] == "on-failure"


# --- The image


def instructions(name: str) -> list[str]:
    """Return what follows each instruction of this name in the Dockerfile."""
    return re.findall(rf"^{name}\s+(.+)$", DOCKERFILE, re.MULTILINE)


def test_the_image_does_not_run_as_root_and_is_built_of_what_it_needs() -> None:
    """It ends as an ordinary user, runs the program, and Docker sees just the files it copies."""
    assert len(instructions("FROM")) == 2
    assert (instructions("USER"), instructions("VOLUME")) == (["chat"], ["/data"])
    assert json.loads(instructions("CMD")[-1]) == ["python", "/app/chatserver.py"]
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    seen = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert seen == copied - {"--from=packages", "/venv"}


@pytest.mark.slow
async def test_the_image_has_all_that_the_server_needs(tmp_path: Path) -> None:
    """Of its files alone the server runs; its health check and the copy of its database work."""
    (data := tmp_path / "data").mkdir()
    (app := tmp_path / "app").mkdir()
    for name in ("chatserver.py", "schema.sql"):
        shutil.copy(ROOT / name, app)
    shutil.copytree(ROOT / "web", app / "web")
    assert instructions("COPY")[-2:] == ["chatserver.py schema.sql /app/", "web /app/web"]
    variables = dict(re.findall(r"\b([A-Z_]+)=(\S+)", instructions("ENV")[0]))
    assert variables["DATABASE_URL"] == "sqlite:////data/chat.db"
    database, port = f"sqlite:///{data}/chat.db", free_port()
    settings: dict[str, Any] = {"database_url": database, "host": variables["HOST"], "port": port}
    process = Process(data, program=app / "chatserver.py", **settings)
    (check,) = instructions("HEALTHCHECK")
    health = json.loads(check[check.index("[") :])[1:]
    notes = (DEPLOY / "README.md").read_text("utf-8")
    (copy,) = re.findall(r'docker exec chat python -c "(.*)"\n', notes)

    async def run(*arguments: str) -> int:
        """Run Python as Docker does."""
        environment = {**os.environ, "PORT": str(port)}
        program = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, env=environment, stderr=subprocess.DEVNULL
        )
        return await program.wait()

    try:
        await process.ready()
        async with aiohttp.ClientSession(process.url, raise_for_status=True) as session:
            for path in ("/", "/docs", "/web/docs.js", "/openapi.json"):
                (await session.get(path)).release()
        assert await run(*health) == 0
        assert await run("-c", copy.replace('\\"', '"').replace("/data", str(data))) == 0
        assert (data / "backup.db").stat().st_size > 0
        assert await process.end() == 0
        assert await run(*health) != 0
    finally:
        process.kill()


# --- Compose and Procfile


def test_compose_starts_the_server_once_postgres_is_ready() -> None:
    """The server waits for a healthy Postgres whose data outlive it, and is started again."""
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
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
    assert (DEPLOY / "Procfile").read_text("utf-8") == "web: python chatserver.py\n"
    port = free_port()
    process = Process(tmp_path, port=port, database_url=f"sqlite:///{tmp_path}/chat.db")
    try:
        assert (await process.ready()).url == f"http://0.0.0.0:{port}"
        assert await process.end() == 0
    finally:
        process.kill()


def test_the_notes_name_settings_that_exist() -> None:
    """Every variable that the notes set is one of the server's, or of Docker's own."""
    notes = (DEPLOY / "README.md").read_text("utf-8")
    for name in re.findall(r"\b([A-Z][A-Z_]+)=", notes):
        assert name.lower() in SETTINGS or name == "POSTGRES_PASSWORD", name
