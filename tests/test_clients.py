"""OAuth clients that other people wrote log in as their manuals say."""

from pathlib import Path

import pytest
from authlib.integrations.requests_client import OAuth2Session as Authlib  # type: ignore[import-untyped]
from oauthlib.oauth2 import LegacyApplicationClient  # type: ignore[import-untyped]
from requests_oauthlib import OAuth2Session  # type: ignore[import-untyped]

from tests.people import company
from tests.processes import running
from tests.words import PASSWORD


@pytest.mark.slow
async def test_oauth_clients_can_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They log in, whatever they say of themselves, and post; and they understand a refusal."""
    for name in ("OAUTHLIB_INSECURE_TRANSPORT", "AUTHLIB_INSECURE_TRANSPORT", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    clients = (
        OAuth2Session(client=LegacyApplicationClient("anything")),
        Authlib("anything", token_endpoint_auth_method="none"),
        Authlib("anything", "ignored"),
        Authlib("", "x", token_endpoint_auth_method="client_secret_post"),
    )
    async with running(tmp_path, "sqlite:///chat.db") as [server], company(server, "al") as [al]:
        for client in clients:
            with client as session:
                url = f"{server.url}/auth/token"
                token = session.fetch_token(url, username=al.name, password=PASSWORD)
                assert (token["token_type"], token["expires_in"]) == ("bearer", 3600)
                posted = session.post(f"{server.url}/rooms/1/messages", json={"message": "hi"})
                assert (posted.status_code, posted.json()["username"]) == (201, al.name)
                with pytest.raises(Exception, match=r"invalid_grant.* wrong name or password"):
                    session.fetch_token(url, username=al.name, password="wrong")
