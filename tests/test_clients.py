"""Clients that other people wrote, and the OpenAPI document, against the running server."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import aiohttp
import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from authlib.integrations.httpx_client import AsyncOAuth2Client  # type: ignore[import-untyped]
from oauthlib.oauth2 import InvalidGrantError, LegacyApplicationClient  # type: ignore[import-untyped]
from requests_oauthlib import OAuth2Session  # type: ignore[import-untyped]

from tests.conftest import Start, missing
from tests.helpers import PASSWORD, ROOT, Server, unique


@pytest.fixture(autouse=True)
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow OAuth clients to speak to this machine without TLS."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    monkeypatch.setenv("NO_PROXY", "*")


# --- OAuth clients


@pytest.mark.parametrize("authentication", ["plain", "basic"])
async def test_requests_oauthlib_logs_in_and_chats(server: Server, authentication: str) -> None:
    """Its password grant gets a token that it then sends, with or without client credentials."""
    alice = await server.user()

    def talk() -> tuple[Any, Any]:
        """Do as its manual says."""
        with OAuth2Session(client=LegacyApplicationClient(client_id="anything")) as session:
            more: dict[str, Any] = {}
            if authentication == "basic":
                more = {"client_secret": "ignored", "include_client_id": True}
            token = session.fetch_token(
                f"{server.url}/auth/token", username=alice.username, password=PASSWORD, **more
            )
            body = {"message": "by requests"}
            posted = session.post(f"{server.url}/rooms/1/messages", json=body, timeout=10)
            assert posted.status_code == 201, posted.text
            return token, session.get(f"{server.url}/users/me", timeout=10).json()

    token, me = await asyncio.to_thread(talk)
    assert token["token_type"] == "bearer"
    assert token["expires_in"] == 3600
    assert me["username"] == alice.username


async def test_requests_oauthlib_understands_the_refusal(server: Server) -> None:
    """A wrong password is an InvalidGrantError with a description."""
    alice = await server.user()

    def talk() -> InvalidGrantError:
        """Log in with a wrong password."""
        with OAuth2Session(client=LegacyApplicationClient(client_id="anything")) as session:
            with pytest.raises(InvalidGrantError) as caught:
                session.fetch_token(
                    f"{server.url}/auth/token", username=alice.username, password="wrong"
                )
            return caught.value

    assert (await asyncio.to_thread(talk)).description


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
async def test_authlib_logs_in_and_chats(server: Server, method: str) -> None:
    """Authlib's asynchronous client gets a token whatever its client authentication is."""
    alice = await server.user()
    async with AsyncOAuth2Client(
        "anything", "ignored", token_endpoint_auth_method=method, trust_env=False
    ) as client:
        token = await client.fetch_token(
            f"{server.url}/auth/token", username=alice.email, password=PASSWORD
        )
        assert token["token_type"] == "bearer"
        answer = await client.get(f"{server.url}/users/me")
        assert answer.json()["username"] == alice.username


async def test_httpx_registers_logs_in_and_chats(server: Server) -> None:
    """The whole first example works with httpx, over one connection."""
    name = unique("alice")
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
        form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
        assert (await client.post("/auth/register", json=form)).status_code == 201
        login = await client.post("/auth/token", data={"username": name, "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {login.json()['access_token']}"
        body = {"message": "by httpx"}
        posted = await client.post("/rooms/1/messages", json=body)
        assert posted.status_code == 201
        history = (await client.get("/rooms/1/messages")).json()
        assert posted.json() in history


@pytest.mark.parametrize("path", ["/", "/healthz", "/openapi.json", "/docs"])
async def test_head_is_answered_as_get_without_a_body(server: Server, path: str) -> None:
    """Monitors and `curl -I` ask with HEAD, which every server has to know (RFC 9110 9.1)."""
    answer = await server.request("HEAD", path)
    assert (answer.status, answer.body) == (200, b""), answer


# --- Command lines


async def run(*command: str, typed: bytes = b"") -> str:
    """Run a program and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(typed), 20)
    assert process.returncode == 0, err
    return out.decode()


async def test_curl_registers_logs_in_and_chats(server: Server) -> None:
    """The first example works with curl as one would type it, `-d` for the form included."""
    curl = shutil.which("curl")
    if curl is None:
        missing("no curl")
    base = [str(curl), "-sS", "--fail-with-body", "--noproxy", "*"]
    name = unique("alice")
    form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
    user = json.loads(await run(*base, "--json", json.dumps(form), f"{server.url}/auth/register"))
    assert user["username"] == name
    grant = f"username={name}&password={PASSWORD}"
    login = json.loads(await run(*base, "-d", grant, f"{server.url}/auth/token"))
    bearer = f"Authorization: Bearer {login['access_token']}"
    body = '{"message": "by curl"}'
    url = f"{server.url}/rooms/1/messages"
    head = ["-H", bearer, "-H", "Content-Type: application/json"]
    event = json.loads(await run(*base, *head, "-d", body, url))
    # A body over 1 KB makes curl ask with Expect: 100-continue.
    big = json.dumps({"message": "x" * 3000})
    longer = json.loads(await run(*base, *head, "-H", "Expect: 100-continue", "-d", big, url))
    assert longer["seq"] > event["seq"]
    history = json.loads(await run(*base, "-H", bearer, url))
    assert event in history


async def test_the_websockets_command_line_chats(server: Server) -> None:
    """`python -m websockets URI` logs in by its first line, hears the hello and says something."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    uri = f"{server.url.replace('http', 'ws')}/websockets/chat/{room}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "websockets",
        uri,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with bob.chat(room) as chat:
            login = json.dumps({"type": "auth", "token": alice.token})
            process.stdin.write(f"{login}\n".encode())
            seen = b""
            async with asyncio.timeout(10):
                while b'"hello"' not in seen:
                    seen += await process.stdout.read(4096)
            process.stdin.write(b'{"message": "by the command line"}\n')
            event = await chat.event("message", message="by the command line")
            assert event["username"] == alice.username
            await bob.say(room, "an answer")
            async with asyncio.timeout(10):
                while b"an answer" not in seen:
                    seen += await process.stdout.read(4096)
            process.stdin.close()
            async with asyncio.timeout(10):
                while await process.stdout.read(4096):
                    pass
                await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("how", ["header", "first frame"])
async def test_the_websockets_library_chats(server: Server, how: str) -> None:
    """The library that most Python clients use connects either way, its compression declined."""
    from websockets.asyncio.client import connect  # noqa: PLC0415 - names like other libraries'

    alice = await server.user()
    uri = f"{server.url.replace('http', 'ws')}/websockets/chat/1"
    headers = {"Authorization": f"Bearer {alice.token}"} if how == "header" else {}
    async with connect(uri, additional_headers=headers, proxy=None) as socket:
        if how != "header":
            await socket.send(json.dumps({"type": "auth", "token": alice.token}))
        assert json.loads(await socket.recv())["type"] == "hello"
        await socket.send(json.dumps({"message": "Hello World!", "client_id": "1"}))
        async with asyncio.timeout(10):
            while json.loads(await socket.recv()).get("client_id") != "1":
                pass
        pong = await socket.ping(b"are you there?")
        await asyncio.wait_for(pong, 10)


# --- The OpenAPI document


def document() -> dict[str, Any]:
    """Return the document beside the program."""
    return cast("dict[str, Any]", json.loads((ROOT / "openapi.json").read_text("utf-8")))


def operations() -> Iterator[tuple[str, str]]:
    """Yield the method and path of every operation."""
    for path, item in document()["paths"].items():
        for method in item:
            if method in ("get", "post", "put", "patch", "delete"):
                yield method, path


async def test_the_document_lists_every_route_and_no_other(server: Server) -> None:
    """Each path of the document exists with each of its methods, and others are refused."""
    for method, path in operations():
        real = path.replace("{room_id}", "1").replace("{username}", "al").replace("{seq}", "1")
        answer = await server.request(method.upper(), real)
        assert answer.status != 405, answer
        assert answer.status != 404 or path == "/metrics" or "assets" in path, answer
    documented = {path for _, path in operations()}
    for path in (
        "/auth/register", "/auth/token", "/auth/logout", "/auth/password", "/users", "/users/me",
        "/users/{username}", "/rooms", "/rooms/{room_id}", "/rooms/{room_id}/members/{username}",
        "/rooms/{room_id}/messages", "/rooms/{room_id}/messages/{seq}", "/rooms/{room_id}/events",
        "/rooms/{room_id}/read", "/search", "/healthz",
    ):  # fmt: skip
        assert path in documented, path


def check_case(
    schema: Any, url: str, token: str, examples: int, skip: Callable[[str], bool]
) -> int:
    """Send generated requests for each operation, good ones and bad; return how many were sent."""
    from schemathesis import GenerationMode  # noqa: PLC0415 - slow to import, and only here

    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if skip(f"{operation.method.upper()} {operation.path}"):
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.POSITIVE or has_input(operation):
                sent += probe(operation, mode, url, token, examples)
    assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    return sent


def has_input(operation: Any) -> bool:
    """Tell whether there is anything about an operation that can be wrong."""
    raw = operation.definition.raw
    return bool(raw.get("parameters") or raw.get("requestBody"))


def probe(operation: Any, mode: Any, url: str, token: str, examples: int) -> int:
    """Send generated requests for one operation; return how many were sent."""
    from hypothesis import HealthCheck, Phase, given, settings  # noqa: PLC0415

    statuses, sent = set(operation.definition.raw["responses"]), 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        """Send one request and look at the answer."""
        nonlocal sent
        sent += 1
        headers = {"Authorization": f"Bearer {token}"}
        answer = case.call(base_url=url, headers=headers, timeout=20)
        shown = f"{case.method} {case.formatted_path} {case.query} {case.body!r}"
        told = f"{shown[:600]} -> {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500, told
        assert str(answer.status_code) in statuses, f"undocumented: {told}"
        validate(operation_schema(case, answer.status_code), answer, told)

    send()
    return sent


def operation_schema(case: Any, status: int) -> Any:
    """Return the JSON schema that the document gives for an answer, or None."""
    answers = document()["paths"][case.path][case.method.lower()]["responses"]
    found = answers[str(status)]
    if "$ref" in found:
        found = document()["components"]["responses"][found["$ref"].rsplit("/", 1)[1]]
    return found.get("content", {}).get("application/json", {}).get("schema")


def validate(schema: Any, answer: Any, told: str) -> None:
    """Check an answer's body against its schema."""
    if schema is not None:
        whole = {**schema, "components": document()["components"]}
        try:
            jsonschema.validate(answer.json(), whole, cls=jsonschema.Draft202012Validator)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{told}: {error.message}")


# These end the log-in that the others need; the socket is no request for a fuzzer.
ENDS = ("POST /auth/logout", "POST /auth/password", "DELETE /users/me")


async def test_schemathesis_finds_no_crash_and_no_undocumented_answer(start: Start) -> None:
    """Whatever follows or breaks the document is answered as the document says, never by a 5xx."""
    if find_spec("schemathesis") is None:
        missing("no schemathesis")
    import schemathesis  # noqa: PLC0415 - slow to import, and only here

    server = await start(body_bytes=65536)
    alice = await server.user()
    schema = schemathesis.openapi.from_dict(document())

    def skip(operation: str) -> bool:
        """Tell which operations are left out."""
        return operation in ENDS or "/auth/" in operation or "/websockets" in operation

    sent = await asyncio.to_thread(check_case, schema, server.url, alice.token, 8, skip)
    assert sent > 100, "it did hardly anything"
    assert "Traceback" not in server.process.stderr


async def test_schemathesis_on_log_ins_finds_no_crash(start: Start) -> None:
    """What hashes passwords, or ends the log-in, gets few requests, each without a token too."""
    if find_spec("schemathesis") is None:
        missing("no schemathesis")
    import schemathesis  # noqa: PLC0415 - slow to import, and only here

    server = await start()
    schema = schemathesis.openapi.from_dict(document())

    def skip(operation: str) -> bool:
        """Tell which operations are left out."""
        return not (operation in ENDS or "/auth/" in operation)

    sent = await asyncio.to_thread(check_case, schema, server.url, "no.good.token", 4, skip)
    assert sent > 10, "it did hardly anything"


async def test_answers_are_as_documented(server: Server, session: aiohttp.ClientSession) -> None:
    """What the server answers to a usual course of things validates against the document."""
    del session
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    event = await alice.say(room, "hello", client_id="1")
    paths = {
        "/users/me": "/users/me",
        "/users": "/users",
        f"/users/{bob.username}": "/users/{username}",
        "/rooms": "/rooms",
        f"/rooms/{room}": "/rooms/{room_id}",
        f"/rooms/{room}/messages": "/rooms/{room_id}/messages",
        f"/rooms/{room}/events": "/rooms/{room_id}/events",
        "/search?q=hello": "/search",
        "/healthz": "/healthz",
    }
    assert event["seq"]
    for path, template in paths.items():
        answer = await alice.get(path)
        answer.ok()
        found = document()["paths"][template]["get"]["responses"]["200"]
        schema = found["content"]["application/json"]["schema"]
        whole = {**schema, "components": document()["components"]}
        jsonschema.validate(answer.json, whole, cls=jsonschema.Draft202012Validator)


def test_the_document_is_openapi_3_1() -> None:
    """The document says what it is, and every reference in it leads somewhere."""
    text = Path(ROOT / "openapi.json").read_text("utf-8")
    whole = document()
    assert whole["openapi"].startswith("3.1")
    for reference in {part.split('"')[0] for part in text.split('"$ref": "')[1:]}:
        place: Any = whole
        for name in reference.removeprefix("#/").split("/"):
            place = place[name.replace("~1", "/").replace("~0", "~")]
