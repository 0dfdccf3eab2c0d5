"""Rooms: who makes them, who is in them, who may do what to whom, and how they end."""

import asyncio
import re
from typing import Any

import pytest

from tests.conftest import Start
from tests.helpers import Room, Server, User
from tests.sockets import UPGRADE
from tests.words import PASSWORD, Event, unique


async def listed(user: User, room_id: str) -> Event | None:
    """Return a room as it stands in the user's list, or None."""
    rooms = [room for room in (await user.get("/rooms")).ok() if room["room_id"] == room_id]
    return rooms[0] if rooms else None


def seen(room_id: str, name: str, kind: str, role: str | None, **numbers: int) -> Event:
    """Return a room as it is shown to somebody."""
    return {"room_id": room_id, "name": name, "kind": kind, "role": role, **numbers}


async def roles(user: User, room: Room) -> dict[str, str]:
    """Return who is what in a room, as the user sees it, by the names of the test."""
    members = (await user.get(room.path)).ok()["members"]
    return {member["username"].partition("-")[0]: member["role"] for member in members}


# --- Making rooms


async def test_the_first_account_owns_the_lobby(start: Start) -> None:
    """A fresh database has the public room 1, "Lobby", whose owner is who came first."""
    chat = await start()
    alice, bob = await chat.users("alice", "bob")
    lobby = Room(alice, "1")
    shown = (await bob.get("/rooms/1")).ok()
    assert (shown["name"], shown["kind"], shown["role"]) == ("Lobby", "public", None)
    assert await roles(bob, lobby) == {"alice": "owner"}
    assert await lobby.story() == ["1 alice makes alice owner"]


async def test_who_makes_a_room_owns_it(chat: Server, there: Server) -> None:
    """A new room answers 201, is known in every process, and begins with its owner."""
    alice = await chat.user("alice")
    room_id = unique("made")
    body = {"room_id": room_id, "name": "Made", "kind": "private", "more": "ignored"}
    made = (await alice.post("/rooms", body)).ok(201)
    assert made == {
        "members": [{"username": alice.name, "role": "owner"}],
        **seen(room_id, "Made", "private", "owner", seq=1, read_seq=1, unread=0),
    }
    assert (await alice.at(there).get(f"/rooms/{room_id}")).ok() == made
    (event,) = await Room(alice, room_id).log()
    assert (event["type"], event["member"], event["role"]) == ("member", alice.name, "owner")


@pytest.mark.parametrize(
    "name", ["Tea", "愛の部屋", "\N{TEACUP WITHOUT HANDLE}", "x" * 100, "a/b?c"]
)
async def test_any_name_makes_a_room_twice(chat: Server, name: str) -> None:
    """Without an id the server makes one from the name, in any script, as often as one likes."""
    alice = await chat.user("alice")
    made = [(await alice.post("/rooms", {"name": name})).ok(201) for _ in range(2)]
    assert [room["name"] for room in made] == [name, name]
    assert made[0]["kind"] == "public"
    first, second = (room["room_id"] for room in made)
    assert first != second
    assert re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", first)
    assert first.startswith("tea") or name != "Tea"


async def test_an_id_is_given_once(chat: Server) -> None:
    """Up to 64 small letters, digits, dashes and underlines make an id, for one room."""
    alice, bob = await chat.users("alice", "bob")
    for room_id in (unique("0"), unique("a_b"), unique("x" * 55)):
        body = {"room_id": room_id, "name": "x"}
        (await alice.post("/rooms", body)).ok(201)
        for user in (alice, bob):
            (await user.post("/rooms", body)).refused(409, "conflict")


NO_TEXTS: list[Any] = [5, True, [], {}]
BAD_ROOMS: list[Event] = [
    *({"room_id": text} for text in ("-a", "_a", "a" * 65, "a b", "a/b", "a\n", "é", "A")),
    *({"room_id": text} for text in ("комната", "a.b", "\0", "\ud800", "direct_1")),
    *({"room_id": value} for value in NO_TEXTS),
    *({"name": text} for text in ("", "   ", "x" * 101, "a\0b", "\ud800", "\u200b\u200d")),
    *({"name": value} for value in NO_TEXTS),
    *({"kind": text} for text in ("", "secret", "PUBLIC", "deleted")),
    *({"kind": value} for value in NO_TEXTS),
    {"kind": "direct"},
    {"kind": "direct", "username": 5},
]


async def test_a_bad_room_is_not_made(chat: Server) -> None:
    """Ids, names and kinds outside of the rules are refused, and nothing is made."""
    alice = await chat.user("alice")
    for change in BAD_ROOMS:
        body = {"room_id": unique("ok"), "name": "Fine", "kind": "public"} | change
        (await alice.post("/rooms", body)).refused(400, "bad_request")
    (await alice.post("/rooms", {})).refused(400, "bad_request")
    assert not [room for room in (await alice.get("/rooms")).ok() if room["role"]]


async def test_one_id_made_at_once_is_one_room(chat: Server, there: Server) -> None:
    """Of four who make a room of one id at the same time, one succeeds."""
    alice, bob = await chat.users("alice", "bob")
    body = {"room_id": unique("race"), "name": "x"}
    users = (alice, bob.at(there), alice.at(there), bob)
    answers = await asyncio.gather(*(user.post("/rooms", body) for user in users))
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]


async def test_the_list_shows_public_rooms_and_ones_own(chat: Server) -> None:
    """The list has every public room and what the caller is in, and says what is unread."""
    alice, bob = await chat.users("alice", "bob")
    public, closed, shared = (
        await alice.room(),
        await alice.room(kind="private"),
        await alice.room(bob, kind="private"),
    )
    await alice.post_in(public, "one")
    await alice.post_in(shared, "two")
    assert await listed(bob, closed.room_id) is None
    assert await listed(bob, public.room_id) == seen(
        public.room_id, "room", "public", None, seq=2, read_seq=0, unread=0
    )
    assert await listed(bob, shared.room_id) == seen(
        shared.room_id, "room", "private", "member", seq=3, read_seq=2, unread=1
    )


# --- Closed doors

PATHS: list[tuple[str, str, Event | None]] = [
    ("GET", "/rooms/{room}", None),
    ("DELETE", "/rooms/{room}", None),
    ("PUT", "/rooms/{room}/members/{name}", {}),
    ("DELETE", "/rooms/{room}/members/{name}", None),
    ("GET", "/rooms/{room}/messages", None),
    ("POST", "/rooms/{room}/messages", {"message": "x"}),
    ("PATCH", "/rooms/{room}/messages/2", {"message": "x"}),
    ("DELETE", "/rooms/{room}/messages/2", None),
    ("PUT", "/rooms/{room}/read", {"seq": 1}),
    ("GET", "/search?q=x&room_id={room}", None),
    ("GET", "/websockets/chat/{room}", None),
]


async def all_refused(user: User, room_id: str, status: int) -> None:
    """Check that whatever a user asks of a room is refused with this status."""
    for method, path, body in PATHS:
        url = path.format(room=room_id, name=user.name)
        headers = UPGRADE if "websockets" in path else {}
        (await user.ask(method, url, body, headers=headers)).refused(status)


@pytest.mark.parametrize("room_id", ["no-such-room", "direct_0123456789"])
async def test_a_room_that_is_not_there_is_missing(chat: Server, room_id: str) -> None:
    """An unknown room is 404 whatever one wants of it."""
    await all_refused(await chat.user("alice"), room_id, 404)


async def test_an_impossible_id_is_missing_or_bad(chat: Server) -> None:
    """An id that no room can have is refused like any other, and crashes nothing."""
    alice = await chat.user("alice")
    for room_id in ("LOBBY", "%D0%B0", "a%2Fb", "x" * 65, "%00", "%2541"):
        for method, path, body in PATHS:
            url = path.format(room=room_id, name=alice.name)
            assert (await alice.ask(method, url, body, headers=UPGRADE)).status in {400, 404}


async def test_a_private_room_is_closed_to_strangers(chat: Server) -> None:
    """Who is no member of a private room gets nothing there, and no way to let themselves in."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(kind="private")
    word = unique("word")
    await alice.post_in(room, word)
    await all_refused(bob, room.room_id, 403)
    assert (await bob.get(f"/search?q={word}")).ok() == []
    assert await listed(bob, room.room_id) is None
    assert len(await room.log()) == 2


async def test_the_banned_neither_read_nor_come_back(chat: Server, there: Server) -> None:
    """A ban shuts a public room: its history, log, search, socket and door, until it is lifted."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    word = unique("word")
    await alice.post_in(room, word)
    await bob.post_in(room, "mine")
    await room.admit(bob, role="banned")
    for server in (chat, there):
        await all_refused(bob.at(server), room.room_id, 403)
    assert (await bob.get(f"/search?q={word}")).ok() == []
    assert await listed(bob, room.room_id) is None
    (await bob.delete(f"{room.path}/messages/4")).refused(403)
    (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
    assert len((await bob.get(f"{room.path}/messages")).ok()) == 2
    assert (await room.story())[-2:] == ["5 alice makes bob banned", "6 alice makes bob None"]


async def test_a_public_room_is_read_by_all_and_joined_by_posting(chat: Server) -> None:
    """A stranger may read a public room without joining it, and joins it with the first post."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    await alice.post_in(room, "Come in")
    for path in (f"{room.path}/messages", room.path):
        (await bob.get(path)).ok()
    assert (await bob.get(room.path)).ok()["role"] is None
    await bob.post_in(room, "Thank you")
    await bob.post_in(room, "Nice here")
    assert (await room.story())[1:] == [
        *("2 alice: Come in", "3 bob makes bob member", "4 bob: Thank you", "5 bob: Nice here")
    ]
    assert await roles(bob, room) == {"alice": "owner", "bob": "member"}


async def test_the_removed_may_come_back_to_a_public_room_only(chat: Server) -> None:
    """A removal from a public room does not bar the way back; from a private room it does."""
    alice, bob = await chat.users("alice", "bob")
    for kind, status in (("public", 200), ("private", 403)):
        room = await alice.room(bob, kind=kind)
        path = f"{room.path}/members/{bob.name}"
        (await alice.delete(path)).ok(204)
        assert (await bob.put(path)).status == status
        assert (await bob.get(f"{room.path}/messages")).status == status


# --- Roles

# Who (by the role in the room) does what to whom (None: to somebody who is not in it; "self": to
# themselves), where the role None is a removal; and how it is answered.
RULES: list[tuple[str, str | None, str | None, int]] = [
    *(("owner", None, role, 200) for role in ("member", "moderator", "owner", "banned")),
    *(("owner", "member", role, 200) for role in ("moderator", "owner", "banned")),
    *(("owner", "moderator", role, 200) for role in ("member", "banned")),
    *(("owner", "owner", role, 200) for role in ("member", "banned")),
    *(("owner", role, None, 204) for role in ("moderator", "owner", "banned")),
    ("owner", "banned", "member", 200),
    ("owner", "self", "moderator", 200),
    ("owner", "self", None, 204),
    *(("moderator", None, role, 200) for role in ("member", "banned")),
    ("moderator", "member", "banned", 200),
    ("moderator", "banned", "member", 200),
    *(("moderator", role, None, 204) for role in ("member", "banned", "self")),
    ("moderator", "self", "member", 200),
    *(("moderator", None, role, 403) for role in ("moderator", "owner")),
    ("moderator", "member", "moderator", 403),
    ("moderator", "banned", "moderator", 403),
    *(("moderator", "moderator", role, 403) for role in ("member", "banned", None)),
    *(("moderator", "owner", role, 403) for role in ("member", "banned", None)),
    ("moderator", "self", "owner", 403),
    ("member", "self", None, 204),
    *(("member", "self", role, 403) for role in ("moderator", "owner")),
    *(("member", None, role, 403) for role in ("member", "banned")),
    *(("member", "member", role, 403) for role in ("banned", "moderator", None)),
    *(("member", role, None, 403) for role in ("owner", "banned")),
    *(("banned", "self", role, 403) for role in ("member", "owner", None)),
    *(("stranger", "self", role, 403) for role in ("moderator", "owner", "banned")),
    *(("stranger", role, None, 403) for role in ("owner", "member", "banned")),
    *(("stranger", None, role, 403) for role in ("member", "banned")),
    *(("banned", "member", role, 403) for role in ("banned", None)),
]


@pytest.mark.parametrize("kind", ["private", "public"])
@pytest.mark.parametrize("actor", ["owner", "moderator", "member", "banned", "stranger"])
async def test_who_may_do_what_to_whom(chat: Server, there: Server, kind: str, actor: str) -> None:
    """Moderators rule those below them, owners all, all others at most themselves."""
    root, doer, third = await chat.users("root", "doer", "other")
    room = await root.room(kind=kind)
    for _, target, role, status in (rule for rule in RULES if rule[0] == actor):
        other = doer if target == "self" else third
        await room.admit(doer, role="member" if actor == "stranger" else actor)
        if actor == "stranger":
            (await root.delete(f"{room.path}/members/{doer.name}")).ok(204)
        if target != "self":
            await room.admit(other, role=target or "member")
        if target is None:
            (await root.delete(f"{room.path}/members/{other.name}")).ok(204)
        head = (await root.get(room.path)).ok()["seq"]
        path = f"{room.path}/members/{other.name}"
        asker = doer.at(there)
        answer = await (asker.put(path, {"role": role}) if role else asker.delete(path))
        assert answer.status == status, (actor, target, role, str(answer))
        added = await room.log(head)
        if status == 403:
            answer.refused(403, "forbidden")
            assert added == []
            continue
        assert (answer.json if role else None) == (
            {"username": other.name, "role": role} if role else None
        )
        (event,) = added
        assert (event["type"], event["username"]) == ("member", doer.name)
        assert (event["member"], event["role"]) == (other.name, role)
        assert (await roles(root, room)).get(other.name.partition("-")[0]) == role


async def test_without_a_role_one_stays_what_one_is(chat: Server) -> None:
    """A PUT without a role lets in, and never undoes a promotion, nor says so twice."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    path = f"{room.path}/members/{bob.name}"
    for _ in range(2):
        assert (await bob.put(path)).ok() == {"username": bob.name, "role": "member"}
    await room.admit(bob, role="moderator")
    assert (await bob.put(path, {})).ok() == {"username": bob.name, "role": "moderator"}
    own = f"{room.path}/members/{alice.name}"
    assert (await alice.put(own)).ok() == {"username": alice.name, "role": "owner"}
    await room.admit(bob, role="moderator")
    assert (await room.story())[1:] == ["2 bob makes bob member", "3 alice makes bob moderator"]


async def test_neither_bad_roles_nor_unknown_people_are_let_in(chat: Server) -> None:
    """There are four roles and no others, for those who have an account; who is out stays out."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    bodies: list[Any] = [*({"role": role} for role in ("king", "", 5, ["member"])), [], "x"]
    for body in bodies:
        answer = await alice.put(f"{room.path}/members/{bob.name}", body)
        answer.refused(400, "bad_request")
    for body in ({}, {"role": "member"}, {"role": "banned"}):
        answer = await alice.put(f"{room.path}/members/nobody-of-this-name", body)
        answer.refused(404, "not_found")
    for name in ("nobody-of-this-name", bob.name):
        (await alice.delete(f"{room.path}/members/{name}")).refused(404, "not_found")
    assert await roles(alice, room) == {"alice": "owner"}
    assert len(await room.log()) == 1


async def test_only_moderators_see_the_banned(chat: Server) -> None:
    """The list of members shows bans to moderators and owners, and to nobody else."""
    root, mod, bob, troll, stranger = await chat.users("root", "mod", "bob", "troll", "stranger")
    room = await root.room(bob)
    await room.admit(mod, role="moderator")
    await room.admit(troll, role="banned")
    everybody = {"bob": "member", "mod": "moderator", "root": "owner"}
    for user in (root, mod):
        assert await roles(user, room) == everybody | {"troll": "banned"}
    for user in (bob, stranger):
        assert await roles(user, room) == everybody
    members = (await root.get(room.path)).ok()["members"]
    assert members == sorted(members, key=lambda member: str(member["username"]))


@pytest.mark.parametrize("kind", ["public", "private"])
async def test_the_last_owner_stays(chat: Server, there: Server, kind: str) -> None:
    """The last owner can neither leave nor step down until there is another one."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob, kind=kind)
    path = f"{room.path}/members/{alice.name}"
    (await alice.delete(path)).refused(409, "conflict")
    for role in ("member", "moderator"):
        (await alice.at(there).put(path, {"role": role})).refused(409, "conflict")
    assert (await alice.put(path, {"role": "banned"})).status in {403, 409}
    await room.admit(bob, role="owner")
    (await alice.at(there).delete(path)).ok(204)
    assert await roles(bob, room) == {"bob": "owner"}


async def test_two_last_owners_cannot_both_leave_at_once(chat: Server, there: Server) -> None:
    """When both owners leave, or both step down, at the same time, one of them is held back."""
    alice, bob = await chat.users("alice", "bob")
    for way in ("DELETE", "PUT"):
        room = await alice.room()
        await room.admit(bob, role="owner")
        work = [
            user.ask(way, f"{room.path}/members/{user.name}", {"role": "member"})
            for user in (alice, bob.at(there))
        ]
        statuses = [answer.status for answer in await asyncio.gather(*work)]
        assert sorted(statuses)[1] == 409, statuses
        assert "owner" in (await roles(alice, room)).values()


async def test_two_who_change_each_other_at_once_are_both_answered(
    chat: Server, there: Server
) -> None:
    """Changes that concern the same people in the other order do not wait for each other."""
    alice, bob = await chat.users("alice", "bob")
    rooms = [await alice.room() for _ in range(6)]
    for room in rooms:
        await room.admit(bob, role="owner")
    work = []
    for room in rooms:
        work += [
            alice.put(f"{room.path}/members/{bob.name}", {"role": "moderator"}),
            bob.at(there).put(f"{room.path}/members/{alice.name}", {"role": "moderator"}),
        ]
    statuses = [answer.status for answer in await asyncio.gather(*work)]
    assert set(statuses) <= {200, 403}, statuses
    assert statuses.count(200) == len(rooms)


# --- Direct rooms


async def test_a_direct_room_is_the_same_from_both_sides(chat: Server, there: Server) -> None:
    """A direct room is made once for two people, and is found by either ever after."""
    alice, bob = await chat.users("alice", "bob")
    body = {"kind": "direct", "username": bob.name.upper()}
    made = (await alice.post("/rooms", body)).ok(201)
    other = {"kind": "direct", "username": alice.name, "name": "Another name", "room_id": "x"}
    found = (await bob.at(there).post("/rooms", other)).ok(200)
    assert found["room_id"] == made["room_id"]
    assert found["name"] == made["name"]
    assert (made["kind"], made["role"], found["role"]) == ("direct", "member", "member")
    room = Room(alice, made["room_id"])
    assert await roles(bob, room) == {"alice": "member", "bob": "member"}
    assert sorted(await room.story()) == ["1 alice makes alice member", "2 alice makes bob member"]
    await alice.post_in(room, "psst")
    assert (await listed(bob, room.room_id) or {})["unread"] == 1
    (await bob.post("/rooms", other)).ok(200)


async def test_a_direct_room_opened_from_both_sides_at_once_is_one(
    chat: Server, there: Server
) -> None:
    """Requests for the same two people at the same time make one room."""
    alice, bob = await chat.users("alice", "bob")
    work = [
        user.at(server).post("/rooms", {"kind": "direct", "username": other.name})
        for user, other in ((alice, bob), (bob, alice))
        for server in (chat, there, chat)
    ]
    answers = await asyncio.gather(*work)
    assert len({answer.json.get("room_id") for answer in answers}) == 1
    assert sorted(answer.status for answer in answers) == [200] * 5 + [201]


async def test_a_direct_room_needs_somebody_else(chat: Server) -> None:
    """Nobody has a direct room with themselves or with nobody, and none is left behind."""
    alice = await chat.user("alice")
    for status, name in ((404, "nobody-of-this-name"), (400, alice.name), (400, None), (400, 5)):
        (await alice.post("/rooms", {"kind": "direct", "username": name})).refused(status)
    await alice.room()  # so that something is committed after what was refused
    assert await chat.rows("SELECT 1 FROM rooms WHERE name LIKE '%nobody-of-this-name%'") == []


async def test_a_direct_room_cannot_be_taken_beforehand(chat: Server) -> None:
    """Nobody makes a room under the id that a direct room of others will have."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    made = (await alice.post("/rooms", {"kind": "direct", "username": bob.name})).ok(201)
    assert made["room_id"].startswith("direct_")
    for room_id in (made["room_id"], f"direct_{'0' * 32}", "direct_x"):
        body = {"room_id": room_id, "name": "mine", "kind": "public"}
        assert (await carol.post("/rooms", body)).status in {400, 403, 409}
    assert (await alice.get(f"/rooms/{made['room_id']}")).ok()["kind"] == "direct"


async def test_a_direct_room_stays_as_it_is(chat: Server) -> None:
    """Nobody leaves, invites to or deletes a direct room, and a third sees nothing."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    made = (await alice.post("/rooms", {"kind": "direct", "username": bob.name})).ok(201)
    room = Room(alice, made["room_id"])
    bobs, alices = (f"{room.path}/members/{user.name}" for user in (bob, alice))
    refusals = [
        alice.put(f"{room.path}/members/{carol.name}", {}),
        alice.put(bobs, {"role": "banned"}),
        alice.put(alices, {"role": "owner"}),
        alice.delete(bobs),
        alice.delete(alices),
        alice.delete(room.path),
    ]
    for answer in await asyncio.gather(*refusals):
        answer.refused(403, "forbidden")
    await all_refused(carol, room.room_id, 403)
    assert len(await room.log()) == 2


async def test_a_direct_room_outlives_who_left_for_good(chat: Server) -> None:
    """Of two in a direct room one may delete the account; the other keeps what was said."""
    alice, bob = await chat.users("alice", "bob")
    made = (await alice.post("/rooms", {"kind": "direct", "username": bob.name})).ok(201)
    room = Room(alice, made["room_id"])
    await bob.post_in(room, "farewell")
    (await bob.delete("/users/me", {"password": PASSWORD})).ok(204)
    assert (await room.texts()) == ["farewell"]
    assert await roles(alice, room) == {"alice": "member"}


# --- The end


async def test_only_owners_delete_a_room(chat: Server) -> None:
    """Whoever is not the owner cannot delete a room."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    for role in (None, "member", "moderator"):
        if role:
            await room.admit(bob, role=role)
        (await bob.delete(room.path)).refused(403, "forbidden")
    (await alice.get(room.path)).ok()


async def test_a_deleted_room_is_gone_for_good(chat: Server, there: Server) -> None:
    """After its deletion a room is 404 everywhere, its texts are erased, its id stays taken."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    word = unique("word")
    await alice.post_in(room, word)
    (await alice.at(there).delete(room.path)).ok(204)
    for user in (alice, bob, alice.at(there)):
        await all_refused(user, room.room_id, 404)
        assert await listed(user, room.room_id) is None
        assert (await user.get(f"/search?q={word}")).ok() == []
    (await alice.post("/rooms", {"room_id": room.room_id, "name": "x"})).refused(409, "conflict")
    for table in ("events", "members"):
        sql = f"SELECT * FROM {table} WHERE room_id = '{room.room_id}'"  # noqa: S608
        assert await chat.rows(sql) == []


async def test_whatever_reaches_a_room_at_its_end_is_answered(chat: Server, there: Server) -> None:
    """Requests at the moment of a deletion are done or refused; afterwards the room is gone."""
    alice, bob = await chat.users("alice", "bob")
    for _ in range(3):
        room = await alice.room(bob)
        await bob.post_in(room, "before")
        work = [
            bob.at(server).ask(method, path.format(room=room.room_id, name=bob.name), body)
            for method, path, body in PATHS
            if "websockets" not in path
            for server in (chat, there)
        ]
        end = alice.delete(room.path)
        answers = await asyncio.gather(*work[: len(work) // 2], end, *work[len(work) // 2 :])
        assert answers[len(work) // 2].status == 204
        assert {answer.status for answer in answers} <= {200, 201, 204, 403, 404}
        await all_refused(bob, room.room_id, 404)
        sql = f"SELECT * FROM events WHERE room_id = '{room.room_id}'"  # noqa: S608
        assert await chat.rows(sql) == []
