"""OAuth clients that other people wrote log in as their manuals say."""

from collections.abc import AsyncIterator

import pytest
from authlib.integrations.requests_client import OAuth2Session as Authlib  # type: ignore[import-untyped]
from oauthlib.oauth2 import LegacyApplicationClient  # type: ignore[import-untyped]
from requests_oauthlib import OAuth2Session  # type: ignore[import-untyped]

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
