"""Clients that other people wrote work with the running server as their manuals say."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from authlib.integrations.requests_client import OAuth2Session as Session  # type: ignore[import-untyped]
from oauthlib.oauth2 import (  # type: ignore[import-untyped]
    InvalidGrantError,
    LegacyApplicationClient,
)
from requests_oauthlib import OAuth2Session  # type: ignore[import-untyped]
from websockets.asyncio.client import connect

from tests.people import User, company
from tests.processes import Process, running
from tests.words import PASSWORD

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow OAuth clients to speak to this machine without TLS."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
async def process(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Process]:
    """Run one server for all tests of this file."""
    async with running(tmp_path_factory.mktemp("clients"), "sqlite:///chat.db") as (process,):
        yield process


@pytest.mark.parametrize("more", [{}, {"client_secret": "ignored", "include_client_id": True}])
async def test_requests_oauthlib_logs_in_and_chats(process: Process, more: dict[str, Any]) -> None:
    """Its password grant gets a token that it then sends, with or without client credentials."""

    def talk(user: User) -> tuple[Any, Any]:
        """Do as its manual says, then fail to log in."""
        url = process.url
        with OAuth2Session(client=LegacyApplicationClient(client_id="anything")) as session:
            token_url = f"{url}/auth/token"
            token = session.fetch_token(token_url, username=user.name, password=PASSWORD, **more)
            posted = session.post(f"{url}/rooms/1/messages", json={"message": "hi"}, timeout=10)
            assert posted.status_code == 201, posted.text
            me = session.get(f"{url}/users/me", timeout=10).json()
            with pytest.raises(InvalidGrantError) as refusal:
                session.fetch_token(token_url, username=user.name, password="wrong", **more)
            assert refusal.value.description
            return token, me

    async with company(process, "alice") as (alice,):
        token, me = await asyncio.to_thread(talk, alice)
        assert (token["token_type"], token["expires_in"]) == ("bearer", 3600)
        assert me["username"] == alice.name


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
async def test_authlib_logs_in_and_chats(process: Process, method: str) -> None:
    """Authlib's client gets a token by e-mail address, whatever its client authentication is."""

    def talk(user: User) -> Any:
        """Do as its manual says."""
        with Session("anything", "ignored", token_endpoint_auth_method=method) as session:
            url, email = f"{process.url}/auth/token", f"{user.name}@example.org"
            token = session.fetch_token(url, username=email, password=PASSWORD)
            assert token["token_type"] == "bearer"
            return session.get(f"{process.url}/users/me", timeout=10).json()

    async with company(process, "alice") as (alice,):
        assert (await asyncio.to_thread(talk, alice))["username"] == alice.name


async def test_httpx_registers_logs_in_and_chats(process: Process) -> None:
    """The whole first example works with httpx, over one connection, and HEAD as monitors ask."""
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=20) as client:
        form = {"username": "hettie", "email": "h@example.org", "password": PASSWORD}
        assert (await client.post("/auth/register", json=form)).status_code == 201
        login = await client.post("/auth/token", data={"username": "hettie", "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {login.json()['access_token']}"
        posted = await client.post("/rooms/1/messages", json={"message": "by httpx"})
        assert posted.status_code == 201
        assert posted.json() in (await client.get("/rooms/1/messages")).json()
        for path in ("/", "/healthz", "/openapi.json", "/docs"):
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b""), path


@pytest.mark.parametrize("how", ["header", "first frame"])
async def test_the_websockets_library_chats(process: Process, how: str) -> None:
    """The library that most Python clients use connects either way, its compression declined."""
    async with company(process, "alice") as (alice,):
        uri = f"{process.url.replace('http', 'ws')}/websockets/chat/1"
        headers = {"Authorization": f"Bearer {alice.token}"} if how == "header" else {}
        async with connect(uri, additional_headers=headers, proxy=None) as socket:
            if how != "header":
                await socket.send(json.dumps({"type": "auth", "token": alice.token}))
            assert json.loads(await socket.recv())["type"] == "hello"
            await socket.send(json.dumps({"message": "Hello World!", "client_id": "1"}))
            async with asyncio.timeout(10):
                while json.loads(await socket.recv()).get("client_id") != "1":
                    pass
            await asyncio.wait_for(await socket.ping(b"are you there?"), 10)


async def test_the_websockets_command_line_chats(process: Process) -> None:
    """`python -m websockets URI` logs in by its first line, and is heard and told."""
    async with company(process, "alice", "bob") as (alice, bob), bob.chat("1") as chat:
        uri = f"{process.url.replace('http', 'ws')}/websockets/chat/1"
        pipe = subprocess.PIPE
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "websockets", uri, stdin=pipe, stdout=pipe, stderr=pipe
        )
        assert program.stdin and program.stdout
        try:
            async with asyncio.timeout(20):
                login = json.dumps({"type": "auth", "token": alice.token})
                program.stdin.write(f"{login}\n".encode())
                await program.stdout.readuntil(b'"hello"')
                program.stdin.write(b'{"message": "by the command line"}\n')
                said = await chat.hear("message", message="by the command line")
                assert said["username"] == alice.name
                await bob.say("1", "an answer")
                await program.stdout.readuntil(b"an answer")
                program.stdin.close()
                await program.stdout.read()
                await program.wait()
        finally:
            if program.returncode is None:
                program.kill()
            await program.communicate()
