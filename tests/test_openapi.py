"""The API document says what the server does: held against its routes, answers and frames."""

import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import hypothesis
import jsonschema  # type: ignore[import-untyped]
import pytest
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

import chatserver
from chatserver import Config, create_app
from tests import people
from tests.conftest import Databases, Start
from tests.document import COMPONENTS, DOCUMENT, GUIDE, OPERATIONS, closed
from tests.helpers import Server, User
from tests.processes import running
from tests.sockets import UPGRADE
from tests.words import KEY, Answer

SOCKET = "/websockets/chat/{room_id}"
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
STRICT = schemathesis.openapi.from_dict({**DOCUMENT, "paths": closed(DOCUMENT["paths"])})


def test_the_document_says_everything_once_and_shows_what_is_true() -> None:
    """Its references lead somewhere, its parts are needed, and its examples fit their schemas."""
    references = set(re.findall(r'"\$ref": "#/components/([^"]+)"', json.dumps(DOCUMENT)))
    parts = {f"{kind}/{name}" for kind, named in COMPONENTS.items() for name in named}
    assert references == {part for part in parts if not part.startswith("securitySchemes")}
    for schema in COMPONENTS["schemas"].values():
        for example in schema.get("examples", []):
            jsonschema.validate(example, {**closed(schema), "components": COMPONENTS})


def test_the_document_lists_every_route_and_no_other() -> None:
    """The routes of the application and the operations of the document are the same."""
    app = create_app(Config(secret_key=KEY))
    routes = {(one.method, one.resource.canonical) for one in app.router.routes() if one.resource}
    files = {route for route in routes if route[0] == "HEAD" or route[1].startswith("/web/")}
    myself = ("GET", "/users/me")  # which the route of every user answers
    assert routes - files | {myself} == set(OPERATIONS)


def test_the_guide_tells_the_limits_that_the_program_has() -> None:
    """Seconds and sizes in the text are those of the constants and defaults."""
    config = Config()
    for told in (
        f"A ping comes every {chatserver.PING} s",
        f"answers nothing for {chatserver.SILENCE} s",
        f"nothing for {chatserver.STALL} s",
        f"as their first frame, within {chatserver.LOGIN_WAIT} s",
        f"complete within {chatserver.BODY_WAIT} s",
        f"more than {chatserver.QUIET_ABOVE} users are online",
        f"{config.messages_per_second} messages a second of one user",
        f"{config.logins_per_minute} log-ins a minute that fail",
        f"{config.registrations_per_hour} registrations an hour",
        f"more than {config.sockets_per_user} sockets of one user",
    ):
        assert told in GUIDE, told
    text, password = COMPONENTS["schemas"]["Text"], COMPONENTS["schemas"]["NewPassword"]
    assert text["maxLength"] == config.message_length
    assert password["description"].startswith(f"{config.password_min_length} to 1024 bytes")


ALICE = {"username": "alice", "email": "alice@example.com", "password": "1234"}
ONCE = {"message": "Hello World!", "client_id": "c-1"}
BOB = {"kind": "direct", "username": "bob"}
TEA = {"name": "Tea", "kind": "private", "room_id": "tea"}
NEW = {"password": "1234", "new_password": "2345"}
# Who asks for what, with which bodies. Alice owns the Lobby and Tea.
STORY: list[tuple[str, str, list[Any]]] = [
    *(("", f"GET /{path}", [None]) for path in ("healthz", "", "docs", "redoc", "openapi.json")),
    ("", "POST /auth/register", [{"username": "al"}, ALICE]),
    ("", "POST /auth/token", [{"username": "x"}, {**ALICE, "password": "x"}, {"grant_type": "x"}]),
    ("alice", "POST /auth/renew", [None]),
    ("alice", "POST /rooms", [TEA, TEA, {"name": " "}, BOB, BOB, {**BOB, "username": "nobody"}]),
    ("alice", "PUT /rooms/tea/members/bob", [None, {"role": "moderator"}]),
    ("alice", "PUT /rooms/tea/members/alice", [{"role": "member"}]),
    ("alice", "DELETE /rooms/tea/members/alice", [None]),
    ("bob", "DELETE /rooms/tea/members/bob", [None]),
    ("alice", "POST /rooms/1/messages", [ONCE, {"message": "twice"}, {"message": " \u200b"}]),
    ("alice", "POST /rooms/1/messages", [ONCE, {**ONCE, "message": "another"}]),
    ("alice", "PATCH /rooms/1/messages/2", [{"message": "Hello, World!"}]),
    ("alice", "DELETE /rooms/1/messages/3", [None]),
    ("alice", "PUT /rooms/1/read", [{"seq": 1}]),
    *(("carol", f"GET /users{more}", [None]) for more in ("?limit=2&after=alice", "?limit=x")),
    *(("carol", f"GET /users/{name}", [None]) for name in ("me", "bob", "nobody", "x")),
    *(("alice", f"GET /rooms{more}", [None]) for more in ("", "/tea", "/1/messages")),
    *(("carol", f"GET /search{query}", [None]) for query in ("?q=HELLO", "")),
    *(("carol", f"GET /search?q=x&room_id={room_id}", [None]) for room_id in ("tea", "none")),
    ("alice", "DELETE /rooms/tea", [None]),
    ("alice", "DELETE /users/me", [{"password": "1234"}, {"password": "wrong"}, {}]),
    ("carol", "DELETE /users/me", [{"password": "1234"}]),
    ("bob", "POST /auth/password", [{**NEW, "password": "x"}, {**NEW, "new_password": "5"}, NEW]),
    ("alice", "POST /auth/logout", [None]),
]
ANY_BODY = {"name": "x", "message": "x", "seq": 1, "role": "owner"}  # something for each operation


async def refusals(alice: User, carol: User) -> AsyncIterator[Answer]:
    """Ask for all without a log-in, with a body that is none, and in rooms that are not open."""
    for (method, path), operation in OPERATIONS.items():
        headers = UPGRADE if path == SOCKET else {}
        url = path.format(room_id="1", username="alice", target=2)
        if "security" not in operation:
            yield await alice.server.ask(method, url, headers={**headers, "Authorization": "none"})
        for kind in operation.get("requestBody", {}).get("content", ()):
            yield await alice.ask(method, url, data="hello", headers={"Content-Type": "text/plain"})
            yield await alice.ask(method, url, data="x" * 70_000, headers={"Content-Type": kind})
        for room_id in ("private", "none", "NO") if "{room_id}" in path else ():
            url = path.format(room_id=room_id, username="carol", target=2)
            body = None if method == "GET" else ANY_BODY
            yield await carol.ask(method, url, body, headers=headers)


async def test_every_answer_is_as_documented(start: Start) -> None:
    """Whatever people do, status and body are as documented; and all that is documented occurs."""
    chat = await start()
    users = {"": User(chat, "", "")}
    answers = [await (await start(registration="closed")).register("dave")]
    for name in ("alice", "bob", "carol"):
        answers += [await chat.register(name), await chat.login(name)]
        users[name] = User(chat, name, answers[-1].ok()["access_token"])
    answers += [await users["alice"].post("/rooms", {**TEA, "room_id": "private"})]
    answers += [answer async for answer in refusals(users["alice"], users["carol"])]
    for who, request, bodies in STORY:
        method, path = request.split(" ")
        answers += [await users[who].ask(method, path, body) for body in bodies]
    occurred: defaultdict[str, set[str]] = defaultdict(set)
    for answer in answers:
        method, _, path = answer.request.partition("?")[0].partition(" ")
        operation = STRICT.find_operation_by_path(method, path)
        assert operation, answer
        occurred[operation.label].add(str(answer.status))
        headers = {name: [value] for name, value in answer.headers.items()}
        sent = requests.PreparedRequest()  # of which nothing is looked at
        response = schemathesis.Response(answer.status, headers, answer.body, sent, 0, verify=False)
        operation.validate_response(response)
    for (method, path), described in OPERATIONS.items():
        expected = described["responses"].keys() - {"101", "408", "429", "503"}
        assert occurred[f"{method} {path}"] == expected, path


async def test_every_frame_is_as_the_guide_shows_it(chat: Server) -> None:
    """A client that was written from the guide knows each frame, and each comes."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    hers = await alice.enter(room, after=0, epoch="another")
    await hers.hears(type="reset")
    his = await bob.enter(room)
    seq = (await his.say("Hello World!", client_id="c-1"))["seq"]
    await his.send(message="Hello World!", client_id="c-1")
    await his.hears(type="ack")
    await his.send(type="edit", target=seq, message="Hello, World!")
    await his.send(type="delete", target=seq, client_id="c-2")
    await his.ask("not_found", type="delete", target=999, client_id="c-3")
    await his.send(type="typing")
    await hers.hears(type="typing")
    came: dict[str, set[str]] = {"error": {"retry_after"}}
    schema = {**closed(COMPONENTS["schemas"]["ServerFrame"]), "components": COMPONENTS}
    for frame in hers.frames + his.frames:
        jsonschema.validate(frame, schema)
        came.setdefault(frame["type"], set()).update(frame)
    table = GUIDE.partition("| The server sends |")[2].partition("| Close code |")[0]
    frames = [json.loads(text) for text in re.findall(r"^\| `(\{.*?\})` \|", table, re.MULTILINE)]
    shown = {frame["type"]: set(frame) for frame in frames}
    shown["error"] |= {"target"}
    assert came == shown


CHECKS: list[Any] = [
    *(not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_headers_conformance, checks.response_schema_conformance),
]


@pytest.fixture(scope="module")
async def alice(
    new_database: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[people.User]:
    """Give somebody at a process of her own."""
    folder = tmp_path_factory.mktemp("attacked")
    url = new_database(folder)
    async with running(folder, url) as [process], people.company(process, "alice") as [user]:
        yield user


@pytest.mark.slow
@SCHEMA.exclude(path=SOCKET).parametrize()
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_generated_requests_are_answered_as_documented(case: Any, alice: people.User) -> None:
    """Whatever follows or breaks the document is answered as the document says, never by a 5xx."""
    ends_log_in = case.path in ("/auth/logout", "/auth/password", "/users/me")
    headers = {"Authorization": "none" if ends_log_in else f"Bearer {alice.token}"}
    case.call_and_validate(base_url=alice.place.url, headers=headers, checks=CHECKS)
