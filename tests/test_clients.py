"""Clients that other people wrote work with the running server as their manuals say."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from authlib.integrations.requests_client import OAuth2Session as Authlib  # type: ignore[import-untyped]
from oauthlib.oauth2 import LegacyApplicationClient  # type: ignore[import-untyped]
from requests_oauthlib import OAuth2Session  # type: ignore[import-untyped]
from websockets.asyncio.client import connect

from tests.people import company
from tests.processes import Process, running
from tests.words import PASSWORD

pytestmark = pytest.mark.slow
OAUTH = {
    "requests-oauthlib": lambda: OAuth2Session(client=LegacyApplicationClient("anything")),
    "authlib": lambda: Authlib("anything", token_endpoint_auth_method="none"),
    "authlib, Basic": lambda: Authlib("anything", "ignored"),
    "authlib, form": lambda: Authlib("", "x", token_endpoint_auth_method="client_secret_post"),
}


@pytest.fixture(scope="module")
async def process(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Process]:
    """Run one server for all tests of this file, to which OAuth clients may speak without TLS."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OAUTHLIB_INSECURE_TRANSPORT", "AUTHLIB_INSECURE_TRANSPORT", "NO_PROXY"):
            patch.setenv(name, "*")
        async with running(tmp_path_factory.mktemp("clients"), "sqlite:///chat.db") as [process]:
            yield process


@pytest.mark.parametrize("client", OAUTH)
async def test_oauth_clients_log_in_and_chat(process: Process, client: str) -> None:
    """By name or e-mail, whatever they say of themselves; and they understand a refusal."""
    url, form = f"{process.url}/auth/token", {"password": PASSWORD}
    async with company(process, "alice") as [alice]:
        for name in (alice.name, f"{alice.name}@example.org"):
            with OAUTH[client]() as session:
                token = session.fetch_token(url, username=name, **form)
                assert (token["token_type"], token["expires_in"]) == ("bearer", 3600)
                posted = session.post(f"{process.url}/rooms/1/messages", json={"message": "hi"})
                assert (posted.status_code, posted.json()["username"]) == (201, alice.name)
                assert session.head(f"{process.url}/healthz").status_code == 200
                with pytest.raises(Exception, match=r"invalid_grant.* wrong name or password"):
                    session.fetch_token(url, username=name, password="wrong")


@pytest.mark.parametrize("how", ["header", "first frame"])
async def test_the_websockets_library_chats(process: Process, how: str) -> None:
    """The library that most Python clients use connects either way, its compression declined."""
    async with company(process, "alice") as [alice], asyncio.timeout(20):
        uri = f"{process.url.replace('http', 'ws')}/websockets/chat/1"
        headers = {"Authorization": f"Bearer {alice.token}"} if how == "header" else {}
        async with connect(uri, additional_headers=headers, proxy=None) as socket:
            if how != "header":
                await socket.send(json.dumps({"type": "auth", "token": alice.token}))
            assert json.loads(await socket.recv())["type"] == "hello"
            await socket.send(json.dumps({"message": "Hello World!", "client_id": "1"}))
            while json.loads(await socket.recv()).get("client_id") != "1":
                pass
            await (await socket.ping(b"are you there?"))
