"""Accounts: registering, logging in as OAuth clients do, passwords, and leaving for good."""

import asyncio
import re
import time
from typing import Any

import pytest

from tests.helpers import PASSWORD, UPGRADE, Server, unique

TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
KELVIN = "\N{KELVIN SIGN}elvin"


def form(name: str, **changes: object) -> dict[str, Any]:
    """Return a good registration, but for the changes."""
    return {"username": name, "email": f"{name}@example.org", "password": PASSWORD} | changes


async def test_register_answers_with_the_account(server: Server) -> None:
    """Registering answers 201 with the user, who sees their own e-mail and never a password."""
    name = unique("New.user_1")
    answer = await server.post("/auth/register", json=form(name))
    user = answer.ok(201)
    assert user["username"] == name.lower()
    assert user["email"].lower() == f"{name}@example.org".lower()
    assert user["online"] is False
    assert TIME.match(user["created_at"])
    assert user.keys() == {"username", "email", "created_at", "online"}


@pytest.mark.parametrize(
    "username",
    [
        "",
        "a",
        "-dash",
        ".dot",
        "_line",
        "a" * 33,
        "al ice",
        " alice",
        "alice\n",
        "alice\0",
        "al/ice",
        "älice",
        "алиса",
        "愛子",
        "alice\u200b",
        "٣٣٣",
        KELVIN,
        "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}van",
        "\ud800\ud800",
        5,
        True,
        None,
        [],
        {},
    ],
)
async def test_register_refuses_bad_names(server: Server, username: object) -> None:
    """A name outside of the pattern is refused, also one that only lower() would make fit."""
    body = form(unique("bad"), username=username)
    (await server.post("/auth/register", json=body)).refused(400, "bad_request")


@pytest.mark.parametrize(
    "email",
    [
        "",
        "nobody",
        "@example.org",
        "nobody@",
        "two words@example.org",
        "a\0b@example.org",
        "a@example.org\n",
        "\ud800@example.org",
        "a" * 1000 + "@example.org",
        5,
        None,
        ["a@example.org"],
    ],
)
async def test_register_refuses_bad_email(server: Server, email: object) -> None:
    """What cannot be an e-mail address is refused."""
    body = form(unique("bad"), email=email)
    (await server.post("/auth/register", json=body)).refused(400, "bad_request")


@pytest.mark.parametrize(
    "password",
    ["", "123", "é1", "x" * 1025, "é" * 513, "pass\0word", "\ud800123", 1234, None],
)
async def test_register_refuses_bad_passwords(server: Server, password: object) -> None:
    """A password that is too short or too long in bytes, or has a NUL, is refused."""
    body = form(unique("bad"), password=password)
    (await server.post("/auth/register", json=body)).refused(400, "bad_request")


@pytest.mark.parametrize("field", ["username", "email", "password"])
async def test_register_needs_every_field(server: Server, field: str) -> None:
    """A registration without one of its fields is refused."""
    body = form(unique("bad"))
    del body[field]
    (await server.post("/auth/register", json=body)).refused(400, "bad_request")


@pytest.mark.parametrize(
    ("password", "other"),
    [
        ("  1234 ", "1234"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"),
        ("x" * 1024, "x" * 1023),
    ],
)
async def test_passwords_are_taken_exactly(server: Server, password: str, other: str) -> None:
    """A password counts as it was given: its spaces, its case, its way to write an accent."""
    name = unique("exact")
    (await server.register(name, password)).ok(201)
    wrong, right = await asyncio.gather(server.login(name, other), server.login(name, password))
    wrong.refused(400, "invalid_grant")
    right.ok()


@pytest.mark.parametrize("field", ["username", "email"])
async def test_register_refuses_what_is_taken(server: Server, field: str) -> None:
    """A name or an e-mail that somebody has is 409, in capitals too."""
    alice = await server.user("alice")
    taken = str(getattr(alice, field)).upper()
    body = form(unique("second")) | {field: taken}
    (await server.post("/auth/register", json=body)).refused(409, "conflict")


async def test_one_name_registered_at_once_makes_one_account(server: Server) -> None:
    """Of three registrations of one name at the same time, one wins and two are 409."""
    name = unique("race")
    bodies = [form(name, email=f"{unique('race')}@example.org") for _ in range(3)]
    answers = await asyncio.gather(*(server.post("/auth/register", json=b) for b in bodies))
    winners = [answer for answer in answers if answer.status == 201]
    losers = [answer for answer in answers if answer.status != 201]
    assert len(winners) == 1
    assert [answer.refused(409, "conflict") for answer in losers] == ["conflict"] * 2


BY_NAME = {"username": "{name}", "password": PASSWORD}


@pytest.mark.parametrize(
    "request_",
    [
        {"data": BY_NAME},
        {"data": BY_NAME | {"username": "{email}"}},
        {"data": BY_NAME | {"username": "{NAME}"}},
        {"data": BY_NAME | {"username": "{EMAIL}"}},
        {"data": BY_NAME | {"grant_type": "password"}},
        {"data": BY_NAME | {"grant_type": "password", "scope": "", "client_id": "None"}},
        {"data": BY_NAME, "headers": {"Authorization": "Basic Og=="}},
        {"data": BY_NAME, "headers": {"Authorization": "Bearer nonsense"}},
        {"json": BY_NAME},
        {"json": BY_NAME | {"username": "{email}", "grant_type": "password", "more": [1]}},
    ],
)
async def test_token_in_every_form(server: Server, request_: dict[str, Any]) -> None:
    """Name or e-mail, form or JSON, with or without what OAuth clients add: it logs in."""
    alice = await server.user("alice")
    kind = "data" if "data" in request_ else "json"
    login = request_[kind]["username"].strip("{}")
    name = {"name": alice.username, "email": alice.email}[login.lower()]
    body = request_[kind] | {"username": name.upper() if login.isupper() else name}
    answer = await server.post("/auth/token", **(request_ | {kind: body}))
    token = answer.ok()
    assert answer.headers["Cache-Control"] == "no-store"
    assert token["token_type"].lower() == "bearer"
    assert token["expires_in"] == 3600
    me = await server.get("/users/me", token=token["access_token"])
    assert me.ok()["username"] == alice.username


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("invalid_grant", {"username": "{name}", "password": "wrong"}),
        ("invalid_grant", {"username": "{name}", "password": ""}),
        ("invalid_grant", {"username": "no-such-name", "password": "1234"}),
        ("invalid_grant", {"username": "no@example.com", "password": "1234"}),
        ("invalid_request", {"username": "{name}"}),
        ("invalid_request", {"password": "1234"}),
        ("invalid_request", {}),
        ("invalid_request", {"grant_type": "password"}),
        ("unsupported_grant_type", {"grant_type": "client_credentials", "scope": "x"}),
        (
            "unsupported_grant_type",
            {"grant_type": "refresh_token", "username": "{name}", "password": "1234"},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["data", "json"])
async def test_token_errors_are_those_of_rfc_6749(
    server: Server, code: str, body: dict[str, str], kind: str
) -> None:
    """A refused log-in names the RFC's error and repeats its sentence as error_description."""
    alice = await server.user("alice")
    body = {key: alice.username if value == "{name}" else value for key, value in body.items()}
    answer = await server.post("/auth/token", **{kind: body})
    if not body.get("password") and "password" in body:
        assert answer.refused(400) in {"invalid_grant", "invalid_request"}
    else:
        answer.refused(400, code)
    assert answer.json["error_description"] == answer.json["detail"]


@pytest.mark.parametrize(
    "request_",
    [
        {"data": b"username=a%FF&password=1234", "headers": "form"},
        {"data": b"username=a%00b&password=1234", "headers": "form"},
        {"data": b"username=alice&password=12%0034", "headers": "form"},
        {"data": b"username=alice&username=bob&password=1234", "headers": "form"},
        {"data": b"username=alice&password=1234&password=4321", "headers": "form"},
        {"data": b"\xff\xfe\x00", "headers": "form"},
        {"json": {"username": 5, "password": "1234"}},
        {"json": {"username": "alice", "password": 1234}},
        {"json": {"username": None, "password": None}},
        {"json": ["alice", "1234"]},
        {"json": {"username": "愛子", "password": "x" * 2000}},
        {"data": b"{", "headers": "json"},
        {"data": b"", "headers": "json"},
    ],
)
async def test_token_refuses_malformed_bodies(server: Server, request_: dict[str, Any]) -> None:
    """A body that cannot be read is the client's error, told as OAuth clients read it."""
    kinds = {"form": "application/x-www-form-urlencoded", "json": "application/json"}
    if kind := request_.get("headers"):
        request_ = request_ | {"headers": {"Content-Type": kinds[kind]}}
    answer = await server.post("/auth/token", **request_)
    assert answer.refused(400) in {"invalid_request", "invalid_grant"}
    assert answer.json["error_description"] == answer.json["detail"]


async def test_an_unknown_name_is_not_told_from_a_wrong_password(server: Server) -> None:
    """An unknown user gets the same answer as a wrong password, after about the same time."""
    alice = await server.user("alice")
    took: dict[str, list[float]] = {}
    bodies = set()
    for _ in range(3):
        for name in (alice.username, "nobody-of-this-name"):
            began = time.perf_counter()
            bodies.add((await server.login(name, "wrong")).body)
            took.setdefault(name, []).append(time.perf_counter() - began)
    assert len(bodies) == 1
    known, unknown = (min(times) for times in took.values())
    assert unknown > known / 2


NEEDS_LOGIN = [
    ("POST", "/auth/logout"),
    ("POST", "/auth/password"),
    ("GET", "/users"),
    ("GET", "/users/me"),
    ("GET", "/users/alice"),
    ("DELETE", "/users/me"),
    ("GET", "/rooms"),
    ("POST", "/rooms"),
    ("GET", "/rooms/1"),
    ("PATCH", "/rooms/1"),
    ("DELETE", "/rooms/1"),
    ("PUT", "/rooms/1/members/alice"),
    ("DELETE", "/rooms/1/members/alice"),
    ("GET", "/rooms/1/messages"),
    ("POST", "/rooms/1/messages"),
    ("PATCH", "/rooms/1/messages/1"),
    ("DELETE", "/rooms/1/messages/1"),
    ("GET", "/rooms/1/events"),
    ("PUT", "/rooms/1/read"),
    ("GET", "/search?q=x"),
]


@pytest.mark.parametrize(("method", "path"), NEEDS_LOGIN)
async def test_everything_else_needs_a_token(server: Server, method: str, path: str) -> None:
    """Without a token every other path is 401, whatever else is wrong with the request."""
    (await server.request(method, path)).refused(401, "unauthorized")
    (await server.request(method, path, token="nonsense", data=b"{")).refused(401)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "{token}", "Basic {token}", "Bearer {token} x", "Bearer {token},"],
)
async def test_authorization_has_one_form(server: Server, value: str) -> None:
    """Anything but one bearer token in the Authorization header is 401."""
    alice = await server.user("alice")
    headers = {"Authorization": value.format(token=alice.token)}
    (await server.get("/users/me", headers=headers)).refused(401, "unauthorized")


async def test_the_scheme_is_read_without_case(server: Server) -> None:
    """`bearer` is `Bearer`, as HTTP says of every scheme."""
    alice = await server.user("alice")
    answer = await server.get("/users/me", headers={"Authorization": f"bearer {alice.token}"})
    assert answer.ok()["username"] == alice.username


async def test_a_token_in_the_url_logs_nobody_in(server: Server) -> None:
    """Tokens never travel in a URL: there they are worth nothing."""
    alice = await server.user("alice")
    query = f"?token={alice.token}&access_token={alice.token}"
    (await server.get(f"/users/me{query}")).refused(401, "unauthorized")
    async with server.session.ws_connect(f"{server.url}/websockets/chat/1{query}") as ws:
        await ws.send_json({"message": "Hello World!"})
        assert (await ws.receive()).data == 4401
    (await server.get(f"/rooms/1/events{query}", headers=UPGRADE)).refused(401)


async def test_users_are_seen_without_their_email(server: Server) -> None:
    """Nobody but its owner sees an e-mail address."""
    alice, bob = await server.users("alice", "bob")
    seen = (await bob.get(f"/users/{alice.username}")).ok()
    assert seen.keys() == {"username", "created_at", "online"}
    assert alice.email not in (await bob.get(f"/users?prefix={alice.username}")).body.decode()
    me = (await alice.get("/users/me")).ok()
    assert me["email"] == alice.email
    assert TIME.match(me["created_at"])


@pytest.mark.parametrize(
    "name", ["nobody-of-this-name", "a", "al%20ice", "%D0%B0", "x" * 33, "%00"]
)
async def test_an_unknown_user_is_404(server: Server, name: str) -> None:
    """A user who is not there is 404, also under a name that nobody could have."""
    alice = await server.user("alice")
    (await alice.get(f"/users/{name}")).refused(404, "not_found")


async def test_a_name_in_a_path_is_lowercased(server: Server) -> None:
    """Names are lowercased in a path as they are everywhere."""
    alice = await server.user("alice")
    seen = (await alice.get(f"/users/{alice.username.upper()}")).ok()
    assert seen["username"] == alice.username


async def test_users_are_listed_by_name(server: Server) -> None:
    """The list of users is sorted, filtered by prefix and read on after a name."""
    word = unique("list")
    names = sorted(f"{word}{end}" for end in (".a", "-b", "_c", "0"))
    answers = await asyncio.gather(*(server.register(name) for name in names))
    assert {answer.status for answer in answers} == {201}
    alice = await server.user("alice")

    async def listed(query: str) -> list[str]:
        """Return the names in a list of users."""
        return [user["username"] for user in (await alice.get(f"/users?{query}")).ok()]

    assert await listed(f"prefix={word}") == names
    assert await listed(f"prefix={word.upper()}") == names
    assert await listed(f"prefix={word}&limit=3") == names[:3]
    assert await listed(f"prefix={word}&after={names[1]}") == names[2:]
    assert await listed(f"prefix={word}&after={names[0]}&limit=2") == names[1:3]
    assert await listed(f"prefix={word}&limit=1000000") == names
    assert await listed("prefix=%25") == []
    assert names[0] not in await listed(f"prefix=____{word[4:]}")


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=1.5", "limit=", "limit=%D9%A3"])
async def test_a_bad_page_of_users_is_400(server: Server, query: str) -> None:
    """A limit that is no number is refused."""
    alice = await server.user("alice")
    (await alice.get(f"/users?{query}")).refused(400, "bad_request")


async def test_logout_voids_every_token(server: Server) -> None:
    """A logout answers 204 and voids all tokens of the user, and only theirs."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    second = (await server.login(alice.username)).ok()["access_token"]
    (await alice.post("/auth/logout")).ok(204)
    for token in (alice.token, second):
        (await server.get("/users/me", token=token)).refused(401, "unauthorized")
    (await alice.post("/auth/logout")).refused(401, "unauthorized")
    (await bob.get("/users/me")).ok()
    third = (await server.login(alice.username)).ok()["access_token"]
    (await server.get("/users/me", token=third)).ok()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"password": "wrong", "new_password": "4321"}),
        (400, {"password": PASSWORD, "new_password": "123"}),
        (400, {"password": PASSWORD, "new_password": "x" * 1025}),
        (400, {"password": PASSWORD, "new_password": "new\0word"}),
        (400, {"password": PASSWORD, "new_password": 54321}),
        (400, {"password": PASSWORD}),
        (400, {"new_password": "4321"}),
        (400, {"password": 1234, "new_password": "4321"}),
        (400, {}),
    ],
)
async def test_a_refused_password_change_changes_nothing(
    server: Server, status: int, body: dict[str, Any]
) -> None:
    """A wrong old or a bad new password is refused, and the token lives on."""
    alice = await server.user("alice")
    (await alice.post("/auth/password", json=body)).refused(status)
    (await alice.get("/users/me")).ok()


async def test_a_new_password_voids_every_token(server: Server) -> None:
    """After a change of password the old one and the old tokens are worth nothing."""
    alice = await server.user("alice", fresh=True)
    body = {"password": PASSWORD, "new_password": "a better one"}
    (await alice.post("/auth/password", json=body)).ok(204)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    (await server.login(alice.username)).refused(400, "invalid_grant")
    (await server.login(alice.username, "a better one")).ok()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"password": "wrong"}),
        (400, {}),
        (400, {"password": None}),
        (400, {"password": PASSWORD, "erase": "yes"}),
        (400, []),
    ],
)
async def test_a_refused_deletion_deletes_nothing(
    server: Server, status: int, body: object
) -> None:
    """Without the right password an account stays."""
    alice = await server.user("alice")
    (await alice.delete("/users/me", json=body)).refused(status)
    (await alice.get("/users/me")).ok()


async def test_a_deleted_account_is_gone_and_its_name_never_given_again(server: Server) -> None:
    """Account, e-mail and password are gone, the messages stay, and the name stays taken."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    room = await bob.room(alice)
    seq = (await alice.say(room, "I was here"))["seq"]
    (await alice.delete("/users/me", json={"password": PASSWORD})).ok(204)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    (await server.login(alice.username)).refused(400, "invalid_grant")
    (await server.login(alice.email)).refused(400, "invalid_grant")
    (await bob.get(f"/users/{alice.username}")).refused(404, "not_found")
    assert (await bob.get(f"/users?prefix={alice.username}")).ok() == []
    again = form(alice.username, email=f"{unique('other')}@example.org")
    (await server.post("/auth/register", json=again)).refused(409, "conflict")
    heir = form(unique("heir"), email=alice.email)
    (await server.post("/auth/register", json=heir)).ok(201)
    (message,) = (await bob.get(f"/rooms/{room}/messages")).ok()
    assert (message["seq"], message["username"]) == (seq, alice.username)
    assert message["message"] == "I was here"
    members = (await bob.get(f"/rooms/{room}")).ok()["members"]
    assert [member["username"] for member in members] == [bob.username]


async def test_a_deleted_account_takes_its_texts_along_when_asked(server: Server) -> None:
    """With `erase` the messages of a deleted account are deleted as by their author."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    room = await bob.room(alice)
    word = unique("secret")
    await alice.say(room, word)
    await bob.say(room, "mine stays")
    (await alice.delete("/users/me", json={"password": PASSWORD, "erase": True})).ok(204)
    history = await bob.get(f"/rooms/{room}/messages")
    hers, his = history.ok()
    assert hers["deleted"] is True
    assert his["message"] == "mine stays"
    assert word not in history.body.decode()
    assert word not in str(await bob.events(room))
    assert (await bob.get(f"/search?q={word}")).ok() == []
