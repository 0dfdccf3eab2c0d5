"""Accounts: registering, logging in as OAuth clients do, passwords, and leaving for good."""

import asyncio
import re
import time
from itertools import product
from typing import Any

import jwt
import pytest

import chatserver
from tests.conftest import SCRYPT, Start
from tests.document import OPERATIONS
from tests.helpers import Server, User
from tests.sockets import UPGRADE
from tests.words import KEY, PASSWORD, Answer, Event, unique, until


async def register(server: Server, name: str, **changes: object) -> Answer:
    """Register an account as the tests usually do, but for the changes."""
    form = {"username": name, "email": f"{name}@example.org", "password": PASSWORD} | changes
    return await server.ask("POST", "/auth/register", json=form)


async def test_a_bad_registration_is_refused(chat: Server) -> None:
    """Names, addresses and passwords outside of their rules are 400, and so is none at all."""
    bad: dict[str, list[Any]] = {
        "username": ["", "a", "a" * 33, "me", "-a", "al ice", "al\n", "a\0", "älice", "\ud800x", 5],
        "email": ["", "nobody", "@x.org", "a b@x.org", "a\0@x.org", "a" * 999 + "@x.org", 5, None],
        "password": ["", "123", "é1", "x" * 1025, "é" * 513, "pass\0word", "\ud80012", 1234],
    }
    for name in ("ab", "0.b_c-d", "x" * 32):
        (await register(chat, name)).ok(201)
    for field, values in bad.items():
        for value in values:
            (await register(chat, unique("bad"), **{field: value})).refused(400, "bad_request")


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


async def test_others_see_a_name_and_a_date(chat: Server) -> None:
    """An e-mail address is its owner's alone; users are listed by name, byte by byte, in pages."""
    bob, word = await chat.user("bob"), unique("zz")
    seen: list[Event] = []
    for name in (f"{word}{end}" for end in ("_c", "0", ".a", "-B")):
        user = (await register(chat, name)).ok(201)
        token = (await chat.login(name)).ok()["access_token"]
        assert (await chat.ask("GET", "/users/me", token)).ok() == user
        seen = [(await bob.get(f"/users/{name}")).ok(), *seen]
        mine = {"username": name.lower(), "email": f"{name}@example.org".lower()}
        assert user == seen[0] | mine and "email" not in seen[0]
    for after, limit, wanted in (("", 4, seen), ("", 3, seen[:3]), ("-b", 2, seen[1:3])):
        assert (await bob.get(f"/users?after={word}{after}&limit={limit}")).ok() == wanted
    (await bob.get(f"/users/{bob.email}")).refused(400)


async def test_passwords_are_taken_exactly(chat: Server) -> None:
    """A password counts as it was given: its blanks, its case, its way to write an accent."""
    pairs = [("caf\u00e9", "cafe\u0301"), ("  1234 ", "1234"), ("Pass", "pass"), ("éé", "éé\0")]
    for password, other in (*pairs, ("x" * 1024, "x" * 1023)):
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
    alice, _ = await chat.users("alice", "bob")
    (one,), (other,) = await chat.rows("SELECT password FROM users WHERE password LIKE '%$8$5$%'")
    assert re.fullmatch(r"scrypt\$16384\$8\$5\$[0-9a-f]{32}\$[0-9a-f]{128}", one)
    assert one != other  # though their passwords are the same
    took = []
    for name in (alice.name, "nobody-of-this-name") * 2:
        began = time.perf_counter()
        (await chat.login(name, "wrong")).refused(400, "invalid_grant")
        took.append(time.perf_counter() - began)
    assert min(took[1::2]) > min(took[::2]) / 2
    (await chat.login(old.name)).ok()


async def test_a_new_password_voids_the_old_and_every_token(chat: Server, there: Server) -> None:
    """A refused change changes nothing; after a good one old password and tokens are void."""
    alice = await chat.user("alice")
    good = {"password": PASSWORD, "new_password": "a better one"}
    (await alice.post("/auth/password", good | {"password": "wrong"})).refused(403, "forbidden")
    (await alice.post("/auth/password", good | {"new_password": "123"})).refused(400)
    (await chat.login(alice.name)).ok()
    (await alice.post("/auth/password", good)).ok(204)
    for server in (chat, there):
        (await alice.at(server).get("/users/me")).refused(401, "unauthorized")
        (await server.login(alice.name)).refused(400, "invalid_grant")
        (await server.login(alice.name, "a better one")).ok()


async def test_all_log_in_as_their_clients_do(chat: Server) -> None:
    """Name or e-mail, form or JSON, with or without what OAuth clients add: it logs in."""
    alice = await chat.user("alice")
    names = (alice.name, f"  {alice.name.upper()} \t", alice.email, f" {alice.email.upper()}\n")
    more = {"grant_type": "password", "scope": "", "client_id": "None", "client_secret": ""}
    for kind, username, added in product(("data", "json"), names, ({}, more)):
        body = {"username": username, "password": PASSWORD, **added}
        options: dict[str, Any] = {kind: body, "headers": {"Authorization": "Basic Og=="}}
        answer = await chat.ask("POST", "/auth/token", **options)
        login = answer.ok()
        assert answer.headers["Cache-Control"] == "no-store"
        token = login.pop("access_token")
        assert login == {"token_type": "bearer", "expires_in": 3600}
        assert (await chat.ask("GET", "/users/me", token)).ok()["username"] == alice.name


async def test_a_refused_login_is_told_as_rfc_6749_says(chat: Server) -> None:
    """A refused log-in names the RFC's error and repeats its sentence as error_description."""
    for code, username, password in (
        ("invalid_grant", "愛子", "x" * 2000),
        *(("invalid_request", name, PASSWORD) for name in ("", "a\0", 5, None)),
        *(("invalid_request", "alice", password) for password in ("", "\ud800", 1234)),
    ):
        body = {"username": username, "password": password}
        error = (await chat.ask("POST", "/auth/token", json=body)).refused(400, code)
        assert error["error_description"] == error["detail"]
    forms = {"username": "invalid_request", "grant_type": "unsupported_grant_type"}
    for name, code in forms.items():
        (await chat.ask("POST", "/auth/token", data={name: "x"})).refused(400, code)


async def test_only_one_bearer_token_logs_in(chat: Server) -> None:
    """Anything but one bearer token in the Authorization header is 401; `bEARER` is one."""
    alice = await chat.user("alice")
    for value in ("", "Bearer ", "{}", "Basic {}", "Bearer {} x", "Bearer,{}"):
        headers = {"Authorization": value.format(alice.token)}
        (await chat.ask("GET", "/users/me", headers=headers)).refused(401, "unauthorized")
    (await chat.ask("GET", "/users/me", headers={"Authorization": f"bEARER {alice.token}"})).ok()


async def test_a_fresh_token_is_given_for_a_good_one(chat: Server, there: Server) -> None:
    """A renewal gives a token of full length for one that has not ended, which lives on."""
    alice = await chat.user("alice")
    now = int(time.time())
    claims = jwt.decode(alice.token, KEY, ["HS256"]) | {"iat": now - 3500, "exp": now + 100}
    late = User(there, alice.name, jwt.encode(claims, KEY))
    fresh = (await late.post("/auth/renew")).ok()
    assert jwt.decode(fresh["access_token"], KEY, ["HS256"])["exp"] >= now + 3600
    for token in (late.token, fresh["access_token"]):
        (await chat.ask("GET", "/users/me", token)).ok()


async def test_tokens_are_signed_and_live_as_it_is_set(start: Start) -> None:
    """The algorithm is the one that is set, and a token lives as long as is set."""
    for algorithm in ("HS256", "HS384", "HS512"):
        chat = await start(algorithm=algorithm, access_token_expire_minutes=7)
        alice = await chat.user("alice")
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
    assert (await bob.get(room.path)).ok()["seq"] == 2  # nothing has been changed


async def test_a_deleted_account_is_gone_and_its_messages_stay(chat: Server, there: Server) -> None:
    """Account, e-mail and rooms are gone everywhere, the messages stay, the name stays taken."""
    alice, bob = await chat.users("alice", "bob")
    room = await bob.room(alice)
    await alice.post_in(room, "I was here")
    (await alice.delete("/users/me", {"password": "wrong"})).refused(403, "forbidden")
    (await alice.at(there).delete("/users/me", {"password": PASSWORD})).ok(204)
    (await alice.get("/users/me")).refused(401, "unauthorized")
    (await chat.login(alice.name)).refused(400, "invalid_grant")
    (await bob.get(f"/users/{alice.name}")).refused(404, "not_found")
    assert alice.name not in (await bob.get(f"/users?after={alice.name[:-1]}")).body.decode()
    (await register(chat, alice.name, email=f"{unique('x')}@x.org")).refused(409, "conflict")
    (await register(chat, unique("heir"), email=alice.email)).ok(201)
    (await bob.put(f"{room.path}/members/{alice.name}")).refused(404, "not_found")
    assert (await room.story())[2:] == ["3 alice: I was here", "4 alice makes alice None"]


async def test_who_joins_a_room_while_going_goes_again(chat: Server, there: Server) -> None:
    """A room that comes in between is left by nobody unseen: 503, and nothing has changed."""
    alice, bob = await chat.users("alice", "bob")
    room = await bob.room()
    async with chat.chat.writing:
        going = asyncio.create_task(alice.delete("/users/me", {"password": PASSWORD}))
        await until(lambda: "waiters" in repr(chat.chat.writing), "the end to wait")
        values = f"'{room.room_id}', '{alice.name}', 'member', 0"
        await chat.change(f"INSERT INTO members VALUES ({values})")  # noqa: S608
    (await going).refused(503, "unavailable")
    assert (await alice.at(there).get(room.path)).ok()["role"] == "member"
    (await alice.delete("/users/me", {"password": PASSWORD})).ok(204)
    assert await room.story() == ["1 bob makes bob owner", "2 alice makes alice None"]


async def test_the_last_owner_hands_a_room_over_before_going(chat: Server, there: Server) -> None:
    """Each room needs another owner or an end first; of two owners who go at once, one waits."""
    alice, bob = await chat.users("alice", "bob")
    kept, gone, shared = await alice.room(bob), await alice.room(), await bob.room()
    await shared.admit(alice, role="owner")
    told = (await alice.delete("/users/me", {"password": PASSWORD})).refused(409)["detail"]
    assert [room for room in (kept, gone, shared) if room.room_id in told] == [kept, gone]
    (await alice.delete(gone.path)).ok(204)
    await kept.admit(bob, role="owner")
    work = [one.delete("/users/me", {"password": PASSWORD}) for one in (alice, bob.at(there))]
    statuses = [answer.status for answer in await asyncio.gather(*work)]
    assert sorted(statuses) in ([204, 409], [409, 503], [204, 503]), statuses
