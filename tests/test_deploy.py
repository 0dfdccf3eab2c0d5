"""The files in deploy/: proxies with sockets through them, the unit, the image and the rest."""

import asyncio
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml  # type: ignore[import-untyped]

from chatserver import Config
from tests.commands import copy_program, run, started, tool
from tests.people import At, company
from tests.postgres import free_port
from tests.processes import ROOT, SETTINGS, running
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
    site += "".join(f"{name}_temp_path {folder}/{name};\n" for name in bodies)
    user = "user root;\n" if os.geteuid() == 0 else ""
    start = f"daemon off;\n{user}pid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{start}http {{\naccess_log off;\n{site}}}\n")
    return [tool("nginx"), "-e", "stderr", "-p", f"{folder}", "-c", f"{folder}/nginx.conf"]


def caddy(folder: Path, port: int, upstream: str) -> list[str]:
    """Write our Caddyfile for a site without HTTPS; return the command that runs Caddy."""
    site = read("Caddyfile").replace(UPSTREAM, upstream)
    site = site.replace("chat.example.com {", f"http://127.0.0.1:{port} {{")
    options = "{\nadmin off\nauto_https off\ndefault_bind 127.0.0.1\n}\n"
    (folder / "Caddyfile").write_text(options + site)
    return [tool("caddy"), "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


def listens(port: int) -> bool:
    """Try to connect to a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def fail(url: str, address: str, claim: str) -> int:
    """Fail to log in from an address while claiming to be another; return the status."""
    form, headers = {"username": "nobody", "password": "wrong"}, {"X-Forwarded-For": claim}
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        return (await session.post(f"{url}/auth/token", data=form)).status


@pytest.mark.slow
@pytest.mark.parametrize("proxy", [nginx, caddy])
async def test_people_chat_through_a_proxy_and_are_told_apart(proxy: Any, tmp_path: Path) -> None:
    """They chat live, resume and hear of the end; limits count for who they are, not say to be."""
    (proxies,) = set(re.findall(r"PROXIES=(\d)", read("nginx.conf") + read("Caddyfile")))
    limits: Any = {"proxies": proxies, "logins_per_minute": 2}
    home: Any = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with running(tmp_path, f"sqlite:///{tmp_path}/chat.db", **limits) as [process]:
        command = proxy(tmp_path, port, process.url.removeprefix("http://"))
        async with started(*command, folder=tmp_path, **home):
            await until(lambda: listens(port), f"{command}")
            tries = [await fail(url, "127.0.0.2", f"203.0.113.{number}") for number in range(3)]
            assert [*tries, await fail(url, "127.0.0.3", "127.0.0.2")] == [400, 400, 429, 400]
            async with (
                company(At(url), "alice", "bob") as [alice, bob],
                alice.chat("1") as hers,
                bob.chat("1", "?after=0", token="") as his,
            ):
                await his.send(type="auth", token=bob.token)
                await his.hear("hello")
                await hers.deliver("hello " * 500)
                last = await his.deliver("and back")
                await hers.hear("message", seq=last["seq"])
                assert his.numbers == list(range(1, last["seq"] + 1))
                ends = await asyncio.gather(hers.closed(), his.closed(), process.end())
                assert tuple(ends) == (1001, 1001, 0)


# --- The unit, the image and the rest


@pytest.mark.slow
async def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say; it has descriptors for all, and starts again."""
    python, text = "/opt/chatserver/.venv/bin/python", read("chatserver.service")
    settings = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    assert int(settings["LimitNOFILE"]) > Config().sockets and int(settings["TimeoutStopSec"]) > 5
    assert settings["WorkingDirectory"] == f"%S/{settings['StateDirectory']}"
    assert settings["Restart"] == "on-failure" and python in text
    unit = tmp_path / "chatserver.service"
    unit.write_text(text.replace(python, str(Path(sys.executable).resolve())))
    command = [tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    assert await run(*command, folder=tmp_path) == (0, "")


def test_compose_waits_for_postgres_and_starts_again() -> None:
    """Postgres is healthy first, and its data outlive it; and the Procfile runs the program."""
    composed = yaml.safe_load(read("compose.yaml"))
    chat, postgres = composed["services"]["chat"], composed["services"]["postgres"]
    assert (DEPLOY / chat["build"]["context"] / chat["build"]["dockerfile"]).is_file()
    assert chat["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert postgres["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert [volume.split(":")[0] for volume in postgres["volumes"]] == list(composed["volumes"])
    assert {name.lower() for name in chat["environment"]} <= set(SETTINGS)
    assert ":?" in chat["environment"]["SECRET_KEY"], "compose asks for it"
    assert all(port.startswith("127.0.0.1:") for port in chat["ports"])
    assert chat["restart"] == "unless-stopped"
    assert read("Procfile") == "web: python chatserver.py\n"


@pytest.mark.slow
async def test_the_image_has_all_that_the_server_needs(tmp_path: Path) -> None:
    """Of its files alone the server runs; its health check and the copy of its database work."""
    text = read("Dockerfile").replace("\\\n", " ")
    image = dict(re.findall(r"^([A-Z]+)\s+(.+)$", text, re.MULTILINE))
    assert (image["USER"], image["VOLUME"]) == ("chat", "/data")
    assert json.loads(image["CMD"]) == ["python", "/app/chatserver.py"]
    assert "COPY chatserver.py schema.sql /app/\nCOPY web /app/web\n" in text
    seen = re.findall("^!(.+)$", read("Dockerfile.dockerignore"), re.MULTILINE)
    assert seen == ["requirements.txt", "chatserver.py", "schema.sql", "web"]
    assert "DATABASE_URL=sqlite:////data/chat.db" in image["ENV"]
    copy_program(tmp_path)
    copied: Any = {"program": tmp_path / "chatserver.py", "port": free_port()}
    async with running(tmp_path, f"sqlite:///{tmp_path}/chat.db", **copied) as [process]:
        async with aiohttp.ClientSession(process.url, raise_for_status=True) as session:
            for path in ("/", "/docs", "/web/docs.js", "/openapi.json"):
                (await session.get(path)).release()
        place: Any = {"folder": tmp_path, "PORT": str(copied["port"])}
        health = json.loads(image["HEALTHCHECK"].partition(" CMD ")[2])[1:]
        assert await run(sys.executable, *health, **place) == (0, "")
        (copy,) = re.findall(r'docker exec chat python -c "(.*)"\n', read("README.md"))
        copy = copy.replace('\\"', '"').replace("/data", str(tmp_path))
        assert await run(sys.executable, "-c", copy, **place) == (0, "")
        assert (tmp_path / "backup.db").stat().st_size > 0
        assert await process.end() == 0
        assert (await run(sys.executable, *health, **place))[0] == 1
