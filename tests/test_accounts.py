"""Accounts: registering, logging in as OAuth clients do, passwords, and leaving for good."""

import asyncio
import re
import time
from typing import Any

import jwt
import pytest

import chatserver
from tests.conftest import SCRYPT, Start
from tests.document import OPERATIONS
from tests.helpers import Server, User
from tests.sockets import UPGRADE
from tests.words import KEY, PASSWORD, Answer, Event, unique


async def register(server: Server, name: str, **changes: object) -> Answer:
    """Register an account as the tests usually do, but for the changes."""
    form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD} | changes
    return await server.ask("POST", "/auth/register", json=form)


async def test_who_registers_sees_the_new_account(chat: Server) -> None:
    """A registration answers 201 with the user, whose name is lowercased, and no password."""
    for name in (unique("New.user_1"), "ab", "x" * 32, "0.b_c-d"):
        user = (await register(chat, name)).ok(201)
        assert user.keys() == {"username", "email", "created_at"}
        assert user["username"] == name.lower()
        login = (await chat.login(name)).ok()
        assert (await chat.ask("GET", "/users/me", login["access_token"])).ok() == user


BAD_FIELDS: dict[str, list[Any]] = {
    "username": [
        *("", "a", "me", "-dash", "a" * 33, "al ice", "alice\n", "alice\0", "al/ice", "älice"),
        *("愛子", "٣٣٣", "\ud800\ud800", 5, None, []),
    ],
    "email": [
        *("", "nobody", "@example.org", "nobody@", "two words@example.org", "a\0b@example.org"),
        *("a@example.org\n", "\ud800@example.org", "a" * 1000 + "@example.org", 5, None),
    ],
    "password": ["", "123", "é1", "x" * 1025, "é" * 513, "pass\0word", "\ud80012", 1234, None],
}


async def test_a_bad_registration_is_refused(chat: Server) -> None:
    """Names, addresses and passwords outside of their rules are 400, and so is none at all."""
    for field, values in BAD_FIELDS.items():
        for value in values:
            answer = await register(chat, unique("bad"), **{field: value})
            answer.refused(400, "bad_request")


async def test_a_name_and_an_address_are_given_once(chat: Server, there: Server) -> None:
    """What somebody has is 409 in every process, in capitals too; of four at once one gets it."""
    alice = await chat.user("alice")
    (await register(there, unique("x"), username=alice.name.upper())).refused(409, "conflict")
    (await register(there, unique("x"), email=alice.email.upper())).refused(409, "conflict")
    name = unique("race")
    work = [register(one, name, email=f"{unique('x')}@x.org") for one in (chat, there) * 2]
    assert sorted(answer.status for answer in await asyncio.gather(*work)) == [201, 409, 409, 409]


async def test_registration_may_be_closed_and_passwords_longer(start: Start) -> None:
    """What settings ask of new accounts and passwords leaves alone those that are there."""
    chat = await start()
    alice = await chat.user("alice")
    await chat.stop()
    chat = await start(chat, registration="closed", password_min_length=10)
    (await chat.register(unique("bob"), "x" * 10)).refused(403, "forbidden")
    (await chat.login(alice.name)).ok()
    for status, password in ((400, "x" * 9), (204, "é" * 5)):
        body = {"password": PASSWORD, "new_password": password}
        assert (await alice.at(chat).post("/auth/password", body)).status == status


# --- Passwords


async def test_passwords_are_taken_exactly(chat: Server) -> None:
    """A password counts as it was given: its blanks, its case, its way to write an accent."""
    accents = ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}")
    others = [("  1234 ", "1234"), ("Pass", "pass"), ("éé", "éé\0"), ("x" * 1024, "x" * 1023)]
    for password, other in (accents, *others):
        name = unique("exact")
        (await chat.register(name, password)).ok(201)
        (await chat.login(name, other)).refused(400)
        (await chat.login(name, password)).ok()


async def test_a_hash_costs_what_it_should_also_for_nobody(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash is scrypt of N=2^14, r=8, p=5, an unknown name takes as long, and old hashes stay."""
    old = await chat.user("old")
    monkeypatch.setattr(chatserver, "SCRYPT", SCRYPT)
    alice, bob = await chat.users("alice", "bob")
    names = f"'{alice.name}', '{bob.name}'"
    hashes = await chat.rows(f"SELECT password FROM users WHERE username IN ({names})")  # noqa: S608
    for (stored,) in hashes:
        assert re.fullmatch(r"scrypt\$16384\$8\$5\$[0-9a-f]{32}\$[0-9a-f]{128}", stored)
    assert hashes[0] != hashes[1]  # though their passwords are the same
    took: dict[str, list[float]] = {}
    for name in (alice.name, "nobody-of-this-name") * 2:
        began = time.perf_counter()
        (await chat.login(name, "wrong")).refused(400, "invalid_grant")
        took.setdefault(name, []).append(time.perf_counter() - began)
    known, unknown = (min(times) for times in took.values())
    assert unknown > known / 2
    (await chat.login(old.name)).ok()
    (await chat.login(old.name, "wrong")).refused(400, "invalid_grant")


async def test_a_new_password_voids_the_old_and_every_token(chat: Server, there: Server) -> None:
    """A refused change changes nothing; after a good one old password and tokens are void."""
    alice = await chat.user("alice")
    good = {"password": PASSWORD, "new_password": "a better one"}
    (await alice.post("/auth/password", good | {"password": "wrong"})).refused(403, "forbidden")
    for bad in ("123", "x" * 1025, "new\0word", 54321, None):
        body = good | {"new_password": bad}
        (await alice.post("/auth/password", body)).refused(400, "bad_request")
    (await chat.login(alice.name)).ok()
    (await alice.post("/auth/password", good)).ok(204)
    for server in (chat, there):
        (await alice.at(server).get("/users/me")).refused(401, "unauthorized")
        (await server.login(alice.name)).refused(400, "invalid_grant")
        (await server.login(alice.name, "a better one")).ok()


# --- Logging in, and tokens

LOGINS: list[tuple[str, Event]] = [
    ("{name}", {}),
    (" {EMAIL}\n", {}),
    ("  {NAME} \t", {"grant_type": "password"}),
    ("{email}", {"scope": "", "client_id": "None", "client_secret": ""}),
]


@pytest.mark.parametrize("kind", ["data", "json"])
async def test_all_log_in_as_their_clients_do(chat: Server, kind: str) -> None:
    """Name or e-mail, form or JSON, with or without what OAuth clients add: it logs in."""
    alice = await chat.user("alice")
    names = {"name": alice.name, "email": alice.email}
    names |= {word.upper(): name.upper() for word, name in names.items()}
    for username, more in LOGINS:
        body = {"username": username.format(**names), "password": PASSWORD, **more}
        options: dict[str, Any] = {kind: body, "headers": {"Authorization": "Basic Og=="}}
        answer = await chat.ask("POST", "/auth/token", **options)
        login = answer.ok()
        assert answer.headers["Cache-Control"] == "no-store"
        token = login.pop("access_token")
        assert login == {"token_type": "bearer", "expires_in": 3600}
        assert (await chat.ask("GET", "/users/me", token)).ok()["username"] == alice.name


BAD_LOGINS: list[tuple[str, Any, Any]] = [
    *(("invalid_grant", "nobody", PASSWORD), ("invalid_grant", "愛子", "x" * 2000)),
    *(("invalid_request", name, PASSWORD) for name in ("", "a\0", "\ud800", 5, None)),
    *(("invalid_request", "alice", password) for password in ("", "a\0", 1234, None)),
]


async def test_a_refused_login_is_told_as_rfc_6749_says(chat: Server) -> None:
    """A refused log-in names the RFC's error and repeats its sentence as error_description."""
    for code, username, password in BAD_LOGINS:
        body = {"username": username, "password": password}
        error = (await chat.ask("POST", "/auth/token", json=body)).refused(400, code)
        assert error["error_description"] == error["detail"]
    for form in (b"username=a%00&password=1234", b"username=alice", b"\xff\xfe", b""):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await chat.ask("POST", "/auth/token", data=form, headers=headers)
        answer.refused(400, "invalid_request")
    answer = await chat.ask("POST", "/auth/token", data={"grant_type": "refresh_token"})
    answer.refused(400, "unsupported_grant_type")


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
    fresh = (await late.post("/auth/renew")).ok()
    assert (fresh["token_type"], fresh["expires_in"]) == ("bearer", 3600)
    assert now + 3600 <= jwt.decode(fresh["access_token"], KEY, ["HS256"])["exp"] <= now + 3610
    for token in (late.token, fresh["access_token"]):
        assert (await chat.ask("GET", "/users/me", token)).ok()["username"] == alice.name


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_tokens_are_signed_and_live_as_it_is_set(start: Start, algorithm: str) -> None:
    """The algorithm is the one that is set, and a token lives as long as is set."""
    chat = await start(algorithm=algorithm, access_token_expire_minutes=7)
    alice = await chat.user("alice")
    assert (await chat.login(alice.name)).ok()["expires_in"] == 420
    assert jwt.get_unverified_header(alice.token)["alg"] == algorithm
    claims = jwt.decode(alice.token, KEY, [algorithm])
    assert claims["exp"] - claims["iat"] == 420


async def test_a_logout_voids_every_token_of_ones_own(chat: Server, there: Server) -> None:
    """In no process a token of before is good for anything any more; nobody else's has ended."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    await alice.post_in(room, "first")
    second = User(there, alice.name, (await there.login(alice.name)).ok()["access_token"])
    (await alice.post("/auth/logout")).ok(204)
    body = {"message": "x", "name": "x", "seq": 1, "password": PASSWORD, "new_password": "4321"}
    for (method, path), operation in OPERATIONS.items():
        url = path.format(room_id=room.room_id, username=bob.name, target=2) + "?q=late"
        for user in (alice, second) if "security" not in operation else ():
            options: Any = {"headers": UPGRADE} if method == "GET" else {"json": body}
            (await user.ask(method, url, **options)).refused(401, "unauthorized")
    (await bob.get("/users/me")).ok()
    third = User(there, alice.name, (await chat.login(alice.name)).ok()["access_token"])
    assert [event["type"] for event in await room.log(reader=third)] == ["member", "message"]


async def test_others_see_a_name_and_a_date(chat: Server) -> None:
    """An e-mail address is its owner's alone; who is not there, or cannot be, is missing."""
    alice, bob = await chat.users("alice", "bob")
    seen = (await bob.get(f"/users/{alice.name.upper()}")).ok()
    assert seen == {"username": alice.name, "created_at": seen["created_at"]}
    assert seen in (await bob.get(f"/users?limit=200&after={alice.name[:-1]}")).ok()
    assert (await alice.get("/users/me")).ok() == seen | {"email": alice.email}
    (await alice.get("/users/nobody-of-this-name")).refused(404, "not_found")
    for name in ("a", "al%20ice", "%D0%B0", "%00", bob.email):
        assert (await alice.get(f"/users/{name}")).status in {400, 404}


async def test_users_are_listed_by_name(chat: Server) -> None:
    """The list of users is sorted by byte, as long as asked for, and goes on after a name."""
    alice = await chat.user("alice")
    word = unique("zz")
    names = sorted(f"{word}{end}" for end in (".a", "-b", "_c", "0"))
    for name in reversed(names):
        (await chat.register(name)).ok(201)
    for after, limit, wanted in ((word, 4, names), (word, 3, names[:3]), (names[1], 2, names[2:])):
        users = (await alice.get(f"/users?after={after}&limit={limit}")).ok()
        assert [user["username"] for user in users] == wanted


# --- Leaving for good


async def test_a_deleted_account_is_gone_and_its_messages_stay(chat: Server, there: Server) -> None:
    """Account, e-mail and rooms are gone everywhere, the messages stay, the name stays taken."""
    alice, bob = await chat.users("alice", "bob")
    room = await bob.room(alice)
    await alice.post_in(room, "I was here")
    refusals: list[tuple[int, Any]] = [(403, {"password": "wrong"}), (400, {}), (400, [])]
    for status, body in refusals:
        (await alice.delete("/users/me", body)).refused(status)
    (await alice.at(there).delete("/users/me", {"password": PASSWORD})).ok(204)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    for name in (alice.name, alice.email):
        (await chat.login(name)).refused(400, "invalid_grant")
    (await bob.get(f"/users/{alice.name}")).refused(404, "not_found")
    assert alice.name not in (await bob.get(f"/users?after={alice.name[:-1]}")).body.decode()
    (await register(chat, alice.name, email=f"{unique('x')}@x.org")).refused(409, "conflict")
    (await register(chat, unique("heir"), email=alice.email)).ok(201)
    told = ["2 bob makes alice member", "3 alice: I was here", "4 alice makes alice None"]
    assert (await room.story())[1:] == told
    members = (await bob.get(room.path)).ok()["members"]
    assert members == [{"username": bob.name, "role": "owner"}]
    (await bob.put(f"{room.path}/members/{alice.name}")).refused(404, "not_found")
    stored = await chat.rows(f"SELECT email, password FROM users WHERE username = '{alice.name}'")  # noqa: S608
    assert stored == [(None, None)]


async def test_the_last_owner_hands_a_room_over_before_going(chat: Server, there: Server) -> None:
    """Each room needs another owner or an end first; of two owners who go at once, one waits."""
    alice, bob = await chat.users("alice", "bob")
    kept, gone, shared = await alice.room(bob), await alice.room(), await bob.room()
    await shared.admit(alice, role="owner")
    error = (await alice.delete("/users/me", {"password": PASSWORD})).refused(409, "conflict")
    named = [room for room in (kept, gone, shared) if room.room_id in error["detail"]]
    assert named == [kept, gone]
    (await alice.delete(gone.path)).ok(204)
    await kept.admit(bob, role="owner")
    work = [one.delete("/users/me", {"password": PASSWORD}) for one in (alice, bob.at(there))]
    statuses = [answer.status for answer in await asyncio.gather(*work)]
    assert sorted(statuses) in ([204, 409], [409, 503], [204, 503]), statuses
