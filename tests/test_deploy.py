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

DEPLOY = {path.name: path.read_text("utf-8") for path in (ROOT / "deploy").iterdir()}


def nginx(folder: Path, port: int, upstream: str) -> list[str]:
    """Write the configuration of an nginx that includes our snippet; return its command."""
    site = DEPLOY["nginx.conf"].replace("127.0.0.1:8000", upstream).replace("listen [::]:80;", "")
    site = site.replace("listen 80;", f"listen 127.0.0.1:{port};")
    bodies = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    site += "".join(f"{name}_temp_path {folder}/{name};\n" for name in bodies)
    user = "user root;\n" if os.geteuid() == 0 else ""
    start = f"daemon off;\n{user}pid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{start}http {{\naccess_log off;\n{site}}}\n")
    return [tool("nginx"), "-e", "stderr", "-p", f"{folder}", "-c", f"{folder}/nginx.conf"]


def caddy(folder: Path, port: int, upstream: str) -> list[str]:
    """Write our Caddyfile for a site without HTTPS; return the command that runs Caddy."""
    site = DEPLOY["Caddyfile"].replace("127.0.0.1:8000", upstream)
    site = site.replace("chat.example.com {", f"http://127.0.0.1:{port} {{")
    options = "{\nadmin off\nauto_https off\ndefault_bind 127.0.0.1\n}\n"
    (folder / "Caddyfile").write_text(options + site)
    return [tool("caddy"), "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


@pytest.mark.slow
@pytest.mark.parametrize("proxy", [nginx, caddy])
async def test_people_chat_through_a_proxy_and_are_told_apart(proxy: Any, tmp_path: Path) -> None:
    """They chat live, resume and hear of the end; limits count for who they are, not say to be."""
    (proxies,) = set(re.findall(r"PROXIES=(\d)", DEPLOY["nginx.conf"] + DEPLOY["Caddyfile"]))
    home: Any = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    limits = {"proxies": proxies, "logins_per_minute": 2}
    async with running(tmp_path, "sqlite:///chat.db", **limits) as [process]:
        command = proxy(tmp_path, port, process.url.removeprefix("http://"))
        async with started(*command, folder=tmp_path, **home):
            with socket.socket() as probe:
                await until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0, f"{command}")
            form = {"username": "nobody", "password": "wrong"}
            for own, feigned, status in ((2, 7, 400), (2, 8, 400), (2, 9, 429), (3, 2, 400)):
                connector = aiohttp.TCPConnector(local_addr=(f"127.0.0.{own}", 0))
                claim = {"X-Forwarded-For": f"127.0.0.{feigned}"}
                async with aiohttp.ClientSession(connector=connector, headers=claim) as session:
                    assert (await session.post(f"{url}/auth/token", data=form)).status == status
            async with (
                company(At(url), "alice", "bob") as [alice, bob],
                alice.chat("1") as hers,
                bob.chat("1", "?after=0", token="") as his,
            ):
                await his.send(type="auth", token=bob.token)
                await his.hears(type="hello")
                await hers.say("hello " * 500)
                last = (await his.say("and back"))["seq"]
                await hers.hears(seq=last)
                assert [event["seq"] for event in his.events] == list(range(1, last + 1))
                ends = await asyncio.gather(hers.is_closed(), his.is_closed(), process.end())
                assert tuple(ends) == (1001, 1001, 0)


@pytest.mark.slow
async def test_compose_and_systemd_start_it_again(tmp_path: Path) -> None:
    """Compose waits for Postgres, whose data outlive it; systemd-analyze verifies the unit."""
    composed = yaml.safe_load(DEPLOY["compose.yaml"])
    chat, postgres = composed["services"]["chat"], composed["services"]["postgres"]
    assert chat["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert [volume.split(":")[0] for volume in postgres["volumes"]] == list(composed["volumes"])
    assert {name.lower() for name in chat["environment"]} <= set(SETTINGS)
    assert ":?" in chat["environment"]["SECRET_KEY"], "compose asks for it"
    assert all(port.startswith("127.0.0.1:") for port in chat["ports"])
    unit = DEPLOY["chatserver.service"]
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert (chat["restart"], settings["Restart"]) == ("unless-stopped", "on-failure")
    assert int(settings["TimeoutStopSec"]) > 5 and int(settings["LimitNOFILE"]) > Config().sockets
    python = str(Path(sys.executable).resolve())
    file = tmp_path / "chatserver.service"
    file.write_text(unit.replace("/opt/chatserver/.venv/bin/python", python))
    command = [tool("systemd-analyze"), "verify", "--man=no", str(file)]
    assert await run(*command, folder=tmp_path) == (0, "")


@pytest.mark.slow
async def test_the_image_has_all_that_the_server_needs(tmp_path: Path) -> None:
    """Of its files alone the server runs; its health check and the copy of its database work."""
    text = DEPLOY["Dockerfile"].replace("\\\n", " ")
    image = dict(re.findall(r"^([A-Z]+)\s+(.+)$", text, re.MULTILINE))
    assert (image["USER"], image["VOLUME"]) == ("chat", "/data")
    assert image["CMD"] == '["python", "/app/chatserver.py"]'
    assert "COPY chatserver.py schema.sql /app/\nCOPY web /app/web\n" in text
    seen = re.findall("^!(.+)$", DEPLOY["Dockerfile.dockerignore"], re.MULTILINE)
    assert seen == ["requirements.txt", "chatserver.py", "schema.sql", "web"]
    assert "DATABASE_URL=sqlite:////data/chat.db" in image["ENV"]
    copy_program(tmp_path)
    program = tmp_path / "chatserver.py"
    async with running(tmp_path, "sqlite:///chat.db", program=program) as [process]:
        async with aiohttp.ClientSession(process.url, raise_for_status=True) as session:
            for path in ("/", "/docs", "/web/docs.js", "/openapi.json"):
                (await session.get(path)).release()
        place: Any = {"folder": tmp_path, "PORT": process.url.rpartition(":")[2]}
        health = json.loads(image["HEALTHCHECK"].partition(" CMD ")[2])[1:]
        assert await run(sys.executable, *health, **place) == (0, "")
        (copy,) = re.findall(r'docker exec chat python -c "(.*)"\n', DEPLOY["README.md"])
        copy = copy.replace('\\"', '"').replace("/data", str(tmp_path))
        assert await run(sys.executable, "-c", copy, **place) == (0, "")
        assert (tmp_path / "backup.db").stat().st_size > 0
        assert await process.end() == 0
        assert (await run(sys.executable, *health, **place))[0] == 1
