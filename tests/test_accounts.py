"""Accounts: registering, logging in as OAuth clients do, passwords, and leaving for good."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest

import chatserver
from tests.conftest import SCRYPT, Start
from tests.helpers import Server, User
from tests.words import KEY, PASSWORD, Event, unique

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def form(name: str, **changes: object) -> Event:
    """Return a good registration, but for the changes."""
    return {"username": name, "email": f"{name}@example.org", "password": PASSWORD} | changes


# --- Registering


async def test_who_registers_sees_the_new_account(chat: Server) -> None:
    """A registration answers 201 with the user, whose name is lowercased, and no password."""
    for name in (unique("New.user_1"), "ab", "x" * 32, "0.b_c-d"):
        user = (await chat.ask("POST", "/auth/register", json=form(name))).ok(201)
        assert user.keys() == {"username", "email", "created_at"}
        assert user["username"] == name.lower()
        assert TIME.fullmatch(user["created_at"])
        login = (await chat.login(name)).ok()
        assert (await chat.ask("GET", "/users/me", login["access_token"])).ok() == user


BAD_FIELDS: dict[str, list[Any]] = {
    "username": [
        *("", "a", "me", "-dash", ".dot", "_line", "a" * 33, "al ice", " alice", "alice\n"),
        *("alice\0", "al/ice", "älice", "алиса", "愛子", "alice\u200b", "٣٣٣", "\ud800\ud800"),
        *(5, True, None, [], {}),
    ],
    "email": [
        *("", "nobody", "@example.org", "nobody@", "two words@example.org", "a\0b@example.org"),
        *("a@example.org\n", "\ud800@example.org", "a" * 1000 + "@example.org"),
        *(5, None, ["a@example.org"]),
    ],
    "password": ["", "123", "é1", "x" * 1025, "é" * 513, "pass\0word", "\ud80012", 1234, None],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
async def test_a_bad_registration_is_refused(chat: Server, field: str) -> None:
    """Names, addresses and passwords outside of their rules are 400, and so is none at all."""
    for value in BAD_FIELDS[field]:
        answer = await chat.ask(
            "POST", "/auth/register", json=form(unique("bad"), **{field: value})
        )
        answer.refused(400, "bad_request")
    body = form(unique("bad"))
    del body[field]
    (await chat.ask("POST", "/auth/register", json=body)).refused(400, "bad_request")


@pytest.mark.parametrize("field", ["username", "email"])
async def test_what_is_taken_is_a_conflict(chat: Server, there: Server, field: str) -> None:
    """A name or an e-mail that somebody has is 409 in every process, in capitals too."""
    alice = await chat.user("alice")
    taken = {"username": alice.name, "email": alice.email}[field].upper()
    body = form(unique("second"), **{field: taken})
    (await there.ask("POST", "/auth/register", json=body)).refused(409, "conflict")


async def test_one_name_registered_at_once_makes_one_account(chat: Server, there: Server) -> None:
    """Of four registrations of one name at the same time, one wins and three are 409."""
    name = unique("race")
    bodies = [form(name, email=f"{unique('race')}@example.org") for _ in range(4)]
    work = [
        server.ask("POST", "/auth/register", json=body)
        for server, body in zip((chat, there) * 2, bodies, strict=True)
    ]
    assert sorted(answer.status for answer in await asyncio.gather(*work)) == [201, 409, 409, 409]


async def test_registration_may_be_closed_and_passwords_longer(start: Start) -> None:
    """What settings ask of new accounts and passwords leaves alone those that are there."""
    chat = await start()
    alice = await chat.user("alice")
    await chat.stop()
    chat = await start(chat, registration="closed")
    (await chat.register(unique("bob"))).refused(403, "forbidden")
    (await chat.login(alice.name)).ok()
    await chat.stop()
    chat = await start(chat, password_min_length=10)
    (await chat.register(unique("bob"), "x" * 9)).refused(400, "bad_request")
    (await chat.register(unique("bob"), "é" * 5)).ok(201)
    body = {"password": PASSWORD, "new_password": "4321"}
    (await alice.at(chat).post("/auth/password", body)).refused(400, "bad_request")
    (await chat.login(alice.name)).ok()


# --- Passwords


@pytest.mark.parametrize(
    ("password", "other"),
    [
        ("  1234 ", "1234"),
        ("Pass", "pass"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"),
        ("éé", "éé\0"),
        ("x" * 1024, "x" * 1023),
    ],
)
async def test_passwords_are_taken_exactly(chat: Server, password: str, other: str) -> None:
    """A password counts as it was given: its blanks, its case, its way to write an accent."""
    name = unique("exact")
    (await chat.register(name, password)).ok(201)
    (await chat.login(name, other)).refused(400)
    (await chat.login(name, password)).ok()


async def test_a_hash_costs_what_it_should_also_for_nobody(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash is scrypt of N=2^14, r=8, p=5, and an unknown name takes as long as a known one."""
    monkeypatch.setattr(chatserver, "SCRYPT", SCRYPT)
    alice = await chat.user("alice")
    bob = await chat.user("bob")
    names = f"'{alice.name}', '{bob.name}'"
    hashes = await chat.rows(f"SELECT password FROM users WHERE username IN ({names})")  # noqa: S608
    for (stored,) in hashes:
        assert re.fullmatch(r"scrypt\$16384\$8\$5\$[0-9a-f]{32}\$[0-9a-f]{128}", stored)
    assert hashes[0] != hashes[1]  # though their passwords are the same
    took: dict[str, list[float]] = {}
    bodies = set()
    for name in (alice.name, "nobody-of-this-name") * 2:
        began = time.perf_counter()
        bodies.add((await chat.login(name, "wrong")).body)
        took.setdefault(name, []).append(time.perf_counter() - began)
    assert len(bodies) == 1
    known, unknown = (min(times) for times in took.values())
    assert unknown > known / 2


async def test_hashes_of_other_parameters_stay_good(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash says its own parameters, so a password of yesterday logs in today."""
    alice = await chat.user("alice")
    monkeypatch.setattr(chatserver, "SCRYPT", "scrypt$4$4$2")
    (await chat.login(alice.name)).ok()
    (await chat.login(alice.name, "wrong")).refused(400, "invalid_grant")


REFUSED_PASSWORDS = [
    (403, {"password": "wrong", "new_password": "4321"}),
    (400, {"password": PASSWORD, "new_password": "123"}),
    (400, {"password": PASSWORD, "new_password": "x" * 1025}),
    (400, {"password": PASSWORD, "new_password": "new\0word"}),
    (400, {"password": PASSWORD, "new_password": 54321}),
    (400, {"password": PASSWORD}),
    (400, {"new_password": "4321"}),
    (400, {"password": 1234, "new_password": "4321"}),
    (400, {}),
]


async def test_a_refused_change_of_password_changes_nothing(chat: Server) -> None:
    """A wrong old or a bad new password is refused, and the token lives on."""
    alice = await chat.user("alice")
    for status, body in REFUSED_PASSWORDS:
        (await alice.post("/auth/password", body)).refused(status)
    (await alice.get("/users/me")).ok()
    (await chat.login(alice.name)).ok()


async def test_a_new_password_voids_the_old_and_every_token(chat: Server, there: Server) -> None:
    """After a change of password the old one and the old tokens are worth nothing anywhere."""
    alice = await chat.user("alice")
    body = {"password": PASSWORD, "new_password": "a better one"}
    (await alice.post("/auth/password", body)).ok(204)
    for server in (chat, there):
        (await alice.at(server).get("/users/me")).refused(401, "unauthorized")
        (await server.login(alice.name)).refused(400, "invalid_grant")
        (await server.login(alice.name, "a better one")).ok()


# --- Logging in

LOGINS: list[dict[str, Any]] = [
    {"data": {"username": "{name}"}},
    {"data": {"username": "{email}"}},
    {"data": {"username": "{NAME}"}},
    {"data": {"username": "{EMAIL}"}},
    {"data": {"username": "  {name} \t"}},
    {"data": {"username": " {email}\n"}},
    {"data": {"username": "{name}", "grant_type": "password"}},
    {"data": {"username": "{name}", "scope": "", "client_id": "None", "client_secret": ""}},
    {"data": {"username": "{name}"}, "headers": {"Authorization": "Basic Og=="}},
    {"data": {"username": "{name}"}, "headers": {"Authorization": "Bearer nonsense"}},
    {"json": {"username": "{name}"}},
    {"json": {"username": "{email}", "grant_type": "password", "more": [1]}},
]


@pytest.mark.parametrize("request_", LOGINS)
async def test_all_log_in_as_their_clients_do(chat: Server, request_: dict[str, Any]) -> None:
    """Name or e-mail, form or JSON, with or without what OAuth clients add: it logs in."""
    alice = await chat.user("alice")
    kind = "data" if "data" in request_ else "json"
    words = {"{name}": alice.name, "{email}": alice.email}
    words |= {word.upper(): value.upper() for word, value in words.items()}
    body = {**request_[kind], "password": PASSWORD}
    for word, value in words.items():
        body["username"] = body["username"].replace(word, value)
    answer = await chat.ask("POST", "/auth/token", **(request_ | {kind: body}))
    login = answer.ok()
    assert answer.headers["Cache-Control"] == "no-store"
    assert login.keys() == {"access_token", "token_type", "expires_in"}
    assert (login["token_type"], login["expires_in"]) == ("bearer", 3600)
    me = await chat.ask("GET", "/users/me", login["access_token"])
    assert me.ok()["username"] == alice.name


BAD_LOGINS: list[tuple[str, dict[str, Any]]] = [
    ("invalid_grant", {"username": "{name}", "password": "wrong"}),
    ("invalid_grant", {"username": "no-such-name", "password": PASSWORD}),
    ("invalid_grant", {"username": "no@example.com", "password": PASSWORD}),
    ("invalid_grant", {"username": "愛子", "password": "x" * 2000}),
    ("invalid_request", {"username": "{name}"}),
    ("invalid_request", {"password": PASSWORD}),
    ("invalid_request", {}),
    ("invalid_request", {"grant_type": "password"}),
    ("unsupported_grant_type", {"grant_type": "client_credentials", "scope": "x"}),
    (
        "unsupported_grant_type",
        {"grant_type": "refresh_token", "username": "{name}", "password": PASSWORD},
    ),
]


@pytest.mark.parametrize("kind", ["data", "json"])
async def test_a_refused_login_is_told_as_rfc_6749_says(chat: Server, kind: str) -> None:
    """A refused log-in names the RFC's error and repeats its sentence as error_description."""
    alice = await chat.user("alice")
    for code, body in BAD_LOGINS:
        sent = {name: alice.name if value == "{name}" else value for name, value in body.items()}
        options: dict[str, Any] = {kind: sent}
        error = (await chat.ask("POST", "/auth/token", **options)).refused(400, code)
        assert error["error_description"] == error["detail"]


GARBLED_LOGINS: list[dict[str, Any]] = [
    {"data": b"username=a%FF&password=1234"},
    {"data": b"username=a%00b&password=1234"},
    {"data": b"username=alice&password=12%0034"},
    {"data": b"\xff\xfe\x00"},
    {"json": {"username": 5, "password": "1234"}},
    {"json": {"username": "alice", "password": 1234}},
    {"json": {"username": None, "password": None}},
    {"json": {"username": "\ud800", "password": "1234"}},
    {"json": ["alice", "1234"]},
    {"data": b"{", "headers": {"Content-Type": "application/json"}},
    {"data": b"", "headers": {"Content-Type": "application/json"}},
]


async def test_a_garbled_login_is_the_clients_error(chat: Server) -> None:
    """A log-in that cannot be read is 400, told as OAuth clients read it."""
    for request in GARBLED_LOGINS:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        options: Any = request if "json" in request else {"headers": kind} | request
        error = (await chat.ask("POST", "/auth/token", **options)).refused(400)
        assert error["error"] in {"invalid_request", "invalid_grant"}, request
        assert error["error_description"] == error["detail"]


# --- Tokens

NEEDS_LOGIN = [
    *("POST /auth/logout", "POST /auth/password", "POST /auth/renew", "GET /users"),
    *("GET /users/me", "GET /users/alice", "DELETE /users/me", "GET /rooms", "POST /rooms"),
    *("GET /rooms/1", "DELETE /rooms/1", "PUT /rooms/1/members/alice"),
    *("DELETE /rooms/1/members/alice", "GET /rooms/1/messages", "POST /rooms/1/messages"),
    *("PATCH /rooms/1/messages/1", "DELETE /rooms/1/messages/1"),
    *("PUT /rooms/1/read", "GET /search?q=x"),
]


@pytest.mark.parametrize("request_", NEEDS_LOGIN)
async def test_all_but_the_door_needs_a_token(chat: Server, request_: str) -> None:
    """Without a token every path behind the log-in is 401, whatever else is wrong."""
    method, path = request_.split()
    (await chat.ask(method, path)).refused(401, "unauthorized")
    (await chat.ask(method, path, "nonsense", data=b"{")).refused(401, "unauthorized")


async def test_only_one_bearer_token_logs_in(chat: Server) -> None:
    """Anything but one bearer token in the Authorization header is 401; `bEARER` is one."""
    alice = await chat.user("alice")
    bad = ("", "Bearer", "Bearer ", "{}", "Basic {}", "Bearer {} x", "Bearer,{}", "Bearer {},")
    for status, values in ((401, bad), (200, ("Bearer {}", "bEARER {}"))):
        for value in values:
            headers = {"Authorization": value.format(alice.token)}
            answer = await chat.ask("GET", "/users/me", headers=headers)
            assert answer.status == status, value


async def test_a_fresh_token_is_given_for_a_good_one(chat: Server, there: Server) -> None:
    """A renewal gives a token of full length for one that has not ended, which lives on."""
    alice = await chat.user("alice")
    now = int(time.time())
    claims = jwt.decode(alice.token, KEY, ["HS256"]) | {"iat": now - 3500, "exp": now + 100}
    late = User(there, alice.name, jwt.encode(claims, KEY))
    answer = await late.post("/auth/renew")
    login = answer.ok()
    assert answer.headers["Cache-Control"] == "no-store"
    assert (login["token_type"], login["expires_in"]) == ("bearer", 3600)
    renewed = jwt.decode(login["access_token"], KEY, ["HS256"])
    assert now + 3600 <= renewed["exp"] <= now + 3610
    for token in (late.token, login["access_token"]):
        assert (await chat.ask("GET", "/users/me", token)).ok()["username"] == alice.name
    ended = jwt.encode(claims | {"exp": now - 1}, KEY)
    (await chat.ask("POST", "/auth/renew", ended)).refused(401, "unauthorized")
    (await alice.post("/auth/logout")).ok(204)
    (await late.post("/auth/renew")).refused(401, "unauthorized")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_tokens_are_signed_and_live_as_it_is_set(start: Start, algorithm: str) -> None:
    """The one algorithm that is set counts, and a token lives as long as is set."""
    chat = await start(algorithm=algorithm, access_token_expire_minutes=7)
    alice = await chat.user("alice")
    assert (await chat.login(alice.name)).ok()["expires_in"] == 420
    assert jwt.get_unverified_header(alice.token)["alg"] == algorithm
    claims = jwt.decode(alice.token, KEY, [algorithm])
    assert claims["exp"] - claims["iat"] == 420
    for other in {"HS256", "HS384", "HS512"} - {algorithm}:
        forged = jwt.encode(claims, KEY, other)
        (await chat.ask("GET", "/users/me", forged)).refused(401, "unauthorized")


async def test_a_clock_that_was_set_back_logs_nobody_out(chat: Server) -> None:
    """A token that was given in what is now the future is as good as any."""
    alice = await chat.user("alice")
    claims = jwt.decode(alice.token, KEY, ["HS256"])
    ahead = claims | {"iat": claims["iat"] + 1000, "exp": claims["exp"] + 1000}
    (await chat.ask("GET", "/users/me", jwt.encode(ahead, KEY))).ok()


async def test_a_logout_voids_every_token_of_ones_own(chat: Server, there: Server) -> None:
    """A logout voids all tokens of the user in every process, and nobody else's."""
    alice, bob = await chat.users("alice", "bob")
    second = (await there.login(alice.name)).ok()["access_token"]
    (await alice.post("/auth/logout")).ok(204)
    for token in (alice.token, second):
        for server in (chat, there):
            (await server.ask("GET", "/users/me", token)).refused(401, "unauthorized")
    (await bob.get("/users/me")).ok()
    third = (await chat.login(alice.name)).ok()["access_token"]
    (await there.ask("GET", "/users/me", third)).ok()


LATE_CHANGES: list[tuple[str, str, Event]] = [
    ("POST", "/rooms/{room}/messages", {"message": "late"}),
    ("PATCH", "/rooms/{room}/messages/2", {"message": "late"}),
    ("DELETE", "/rooms/{room}/messages/2", {}),
    ("PUT", "/rooms/{room}/read", {"seq": 1}),
    ("PUT", "/rooms/{room}/members/{other}", {"role": "member"}),
    ("DELETE", "/rooms/{room}", {}),
    ("POST", "/rooms", {"name": "late"}),
    ("POST", "/rooms", {"kind": "direct", "username": "{other}"}),
    ("POST", "/auth/logout", {}),
    ("POST", "/auth/password", {"password": PASSWORD, "new_password": "4321"}),
    ("DELETE", "/users/me", {"password": PASSWORD}),
]


@pytest.mark.parametrize(("method", "path", "body"), LATE_CHANGES)
async def test_a_login_that_ends_under_way_changes_nothing(
    chat: Server, there: Server, method: str, path: str, body: Event
) -> None:
    """A request whose body comes after its log-in was ended elsewhere is 401."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    await alice.post_in(room, "first")
    words = {"room": room.room_id, "other": bob.name}
    text = str(body).replace("'", '"').replace("{other}", bob.name).encode()
    begun, ended = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        """Send the body when the log-in has ended."""
        yield text[:1]
        begun.set()
        await ended.wait()
        yield text[1:]

    headers = {"Content-Type": "application/json"}
    request = alice.ask(method, path.format(**words), data=slowly(), headers=headers)
    task = asyncio.create_task(request)
    await begun.wait()
    await (await alice.enter(room)).leave()  # the head of the request has surely been read
    (await alice.at(there).post("/auth/logout")).ok(204)
    ended.set()
    (await task).refused(401, "unauthorized")
    token = (await chat.login(alice.name)).ok()["access_token"]
    back = User(chat, alice.name, token)
    log = await room.log(reader=back)
    assert [event["type"] for event in log] == ["member", "message"]
    mine = [one for one in (await back.get("/rooms")).ok() if one["role"]]
    assert [(one["room_id"], one["name"]) for one in mine] == [(room.room_id, "room")]


# --- Users


async def test_nobody_else_sees_an_email(chat: Server) -> None:
    """Others see a name and a date; the address is its owner's alone."""
    alice, bob = await chat.users("alice", "bob")
    seen = await bob.get(f"/users/{alice.name.upper()}")
    assert seen.ok().keys() == {"username", "created_at"}
    assert seen.ok()["username"] == alice.name
    users = await bob.get(f"/users?limit=200&after={alice.name[:-1]}")
    assert alice.name in users.body.decode()
    assert alice.email not in users.body.decode()
    assert (await alice.get("/users/me")).ok()["email"] == alice.email


async def test_an_unknown_user_is_missing(chat: Server) -> None:
    """A user who is not there is 404; a name that nobody can have may also be called bad."""
    alice, bob = await chat.users("alice", "bob")
    (await alice.get("/users/nobody-of-this-name")).refused(404, "not_found")
    for name in ("a", "al%20ice", "%D0%B0", "%00", bob.email):
        assert (await alice.get(f"/users/{name}")).status in {400, 404}


async def test_users_are_listed_by_name(chat: Server) -> None:
    """The list of users is sorted by byte, as long as asked for, and goes on after a name."""
    word = unique("zz")
    names = sorted(f"{word}{end}" for end in (".a", "-b", "_c", "0"))
    for name in reversed(names):
        (await chat.register(name)).ok(201)
    alice = await chat.user("alice")

    async def listed(query: str) -> list[str]:
        """Return the names in a list of users."""
        return [user["username"] for user in (await alice.get(f"/users?{query}")).ok()]

    assert (await listed(f"after={word}&limit=4")) == names
    assert (await listed(f"after={word}&limit=3")) == names[:3]
    assert (await listed(f"after={names[1]}&limit=2")) == names[2:]
    assert (await listed(f"after={names[0]}&limit=1")) == names[1:2]
    assert len(await listed("limit=1")) == 1


# --- Leaving for good


async def test_a_refused_deletion_deletes_nothing(chat: Server) -> None:
    """Without the right password an account stays."""
    alice = await chat.user("alice")
    for status, body in ((403, {"password": "wrong"}), (400, {}), (400, {"password": None})):
        (await alice.delete("/users/me", body)).refused(status)
    (await alice.delete("/users/me", [])).refused(400)
    (await alice.get("/users/me")).ok()


async def test_a_deleted_account_is_gone_and_its_messages_stay(chat: Server, there: Server) -> None:
    """Account, e-mail and rooms are gone everywhere, the messages stay, the name stays taken."""
    alice, bob = await chat.users("alice", "bob")
    room = await bob.room(alice)
    await alice.post_in(room, "I was here")
    (await alice.at(there).delete("/users/me", {"password": PASSWORD})).ok(204)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    for name in (alice.name, alice.email):
        (await chat.login(name)).refused(400, "invalid_grant")
    (await bob.get(f"/users/{alice.name}")).refused(404, "not_found")
    assert alice.name not in (await bob.get(f"/users?after={alice.name[:-1]}")).body.decode()
    again = form(alice.name, email=f"{unique('other')}@example.org")
    (await chat.ask("POST", "/auth/register", json=again)).refused(409, "conflict")
    heir = form(unique("heir"), email=alice.email)
    (await chat.ask("POST", "/auth/register", json=heir)).ok(201)
    assert (await room.story())[1:] == [
        "2 bob makes alice member",
        "3 alice: I was here",
        "4 alice makes alice None",
    ]
    members = (await bob.get(room.path)).ok()["members"]
    assert members == [{"username": bob.name, "role": "owner"}]
    (await bob.put(f"{room.path}/members/{alice.name}")).refused(404, "not_found")
    stored = await chat.rows(f"SELECT email, password FROM users WHERE username = '{alice.name}'")  # noqa: S608
    assert stored == [(None, None)]


async def test_the_last_owner_hands_a_room_over_before_going(chat: Server) -> None:
    """The account of a last owner stays until each of the rooms is handed over or deleted."""
    alice, bob = await chat.users("alice", "bob")
    kept, gone, shared = await alice.room(bob), await alice.room(), await bob.room()
    await shared.admit(alice, role="owner")
    error = (await alice.delete("/users/me", {"password": PASSWORD})).refused(409, "conflict")
    assert kept.room_id in error["detail"]
    assert gone.room_id in error["detail"]
    assert shared.room_id not in error["detail"]
    (await alice.get("/users/me")).ok()
    (await alice.delete(gone.path)).ok(204)
    await kept.admit(bob, role="owner")
    (await alice.delete("/users/me", {"password": PASSWORD})).ok(204)
    assert (await bob.get(kept.path)).ok()["role"] == "owner"


async def test_two_last_owners_cannot_both_go_at_once(chat: Server, there: Server) -> None:
    """When both owners of a room delete their accounts at the same time, one is held back."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    await room.admit(bob, role="owner")
    work = [
        user.at(server).delete("/users/me", {"password": PASSWORD})
        for user, server in ((alice, chat), (bob, there))
    ]
    statuses = [answer.status for answer in await asyncio.gather(*work)]
    assert sorted(statuses) in ([204, 409], [409, 503], [204, 503]), statuses
