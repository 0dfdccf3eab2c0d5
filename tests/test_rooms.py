"""Rooms: who may see, enter, rename, leave and delete them, and what the log says of it."""

import asyncio
from typing import Any

import pytest

from tests.conftest import Start
from tests.helpers import PASSWORD, UPGRADE, Event, Server, User, unique

FIELDS = {"room_id", "name", "kind", "role", "seq", "read_seq", "unread"}
NO_TEXTS: list[Any] = [None, 5, True, [], {}]


async def listed(user: User, room: str) -> Event | None:
    """Return a room as the user's list of rooms shows it."""
    rooms: list[Event] = (await user.get("/rooms")).ok()
    found = [each for each in rooms if each["room_id"] == room]
    return found[0] if found else None


async def roles(user: User, room: str) -> dict[str, str]:
    """Return the members of a room with their roles, as the user sees them."""
    members = (await user.get(f"/rooms/{room}")).ok()["members"]
    return {member["username"]: member["role"] for member in members}


async def test_a_fresh_database_has_a_lobby_that_the_first_account_owns(start: Start) -> None:
    """Room 1, "Lobby", is there from the start, and its owner is who came first."""
    server = await start()
    first = await server.user("first")
    second = await server.user("second")
    lobby = await listed(first, "1")
    assert lobby is not None
    assert lobby.keys() == FIELDS
    assert (lobby["name"], lobby["kind"], lobby["role"]) == ("Lobby", "public", "owner")
    seen = await listed(second, "1")
    assert seen is not None
    assert (seen["role"], seen["unread"], seen["read_seq"]) == (None, 0, 0)
    (event,) = await second.events("1")
    assert event["type"] == "member"
    assert (event["seq"], event["member"], event["role"]) == (1, first.username, "owner")


async def test_who_creates_a_room_owns_it(server: Server) -> None:
    """A new room answers 201, and its first event is its owner's membership."""
    alice = await server.user("alice")
    room = unique("den")
    body = {"room_id": room, "name": "The Den", "kind": "private"}
    created = (await alice.post("/rooms", json=body)).ok(201)
    expected = {"room_id": room, "name": "The Den", "kind": "private", "role": "owner", "seq": 1}
    assert created.items() >= expected.items()
    assert await listed(alice, room) == created | {"read_seq": created["read_seq"]}
    (event,) = await alice.events(room)
    assert (event["type"], event["seq"], event["username"]) == ("member", 1, alice.username)
    assert (event["member"], event["role"]) == (alice.username, "owner")


async def test_kind_and_name_have_defaults(server: Server) -> None:
    """A room is public and named like its id unless one says otherwise."""
    alice = await server.user("alice")
    room = unique("plain")
    created = (await alice.post("/rooms", json={"room_id": room})).ok(201)
    assert (created["kind"], created["name"]) == ("public", room)


@pytest.mark.parametrize(
    "change",
    [
        *({"room_id": text} for text in ("", "-a", "_a", "a" * 65, "a b", "a/b", "a\n", "é")),
        *({"room_id": text} for text in ("комната", "a.b", "\0", "\ud800")),
        *({"room_id": value} for value in NO_TEXTS),
        {"room_id": "direct-1"},
        {"room_id": "\N{KELVIN SIGN}itchen"},
        *({"name": text} for text in ("", "   ", "x" * 101, "a\0b", "\ud800")),
        *({"name": value} for value in NO_TEXTS[1:]),
        *({"kind": text} for text in ("", "secret", "PUBLIC")),
        *({"kind": value} for value in NO_TEXTS[1:]),
        {"kind": "direct"},
        {"kind": "direct", "username": 5},
    ],
)
async def test_a_bad_room_is_400(server: Server, change: dict[str, Any]) -> None:
    """Ids, names and kinds outside of the rules are refused."""
    alice = await server.user("alice")
    room = unique("ok")
    body = {"room_id": room, "name": "Fine", "kind": "public"} | change
    (await alice.post("/rooms", json=body)).refused(400, "bad_request")
    assert await listed(alice, room) is None


async def test_a_room_needs_an_id(server: Server) -> None:
    """A room that is not direct needs an id."""
    alice = await server.user("alice")
    (await alice.post("/rooms", json={"name": "Nameless"})).refused(400, "bad_request")


async def test_an_id_is_given_once(server: Server) -> None:
    """A taken id is 409, also for its owner, also after the room was deleted."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    for user in (alice, bob):
        (await user.post("/rooms", json={"room_id": room})).refused(409, "conflict")
    (await alice.delete(f"/rooms/{room}")).ok(204)
    (await alice.post("/rooms", json={"room_id": room})).refused(409, "conflict")


async def test_one_id_created_at_once_makes_one_room(server: Server) -> None:
    """Of five who create a room of one id at the same time, one succeeds."""
    alice, bob = await server.users("alice", "bob")
    body = {"room_id": unique("race")}
    work = [user.post("/rooms", json=body) for user in (alice, bob, alice, bob, alice)]
    statuses = sorted(answer.status for answer in await asyncio.gather(*work))
    assert statuses == [201, 409, 409, 409, 409]


PATHS = [
    ("GET", "/rooms/{room}", None),
    ("PATCH", "/rooms/{room}", {"name": "x"}),
    ("DELETE", "/rooms/{room}", None),
    ("PUT", "/rooms/{room}/members/{name}", {}),
    ("DELETE", "/rooms/{room}/members/{name}", None),
    ("GET", "/rooms/{room}/messages", None),
    ("POST", "/rooms/{room}/messages", {"message": "x"}),
    ("PATCH", "/rooms/{room}/messages/1", {"message": "x"}),
    ("DELETE", "/rooms/{room}/messages/1", None),
    ("GET", "/rooms/{room}/events", None),
    ("PUT", "/rooms/{room}/read", {"seq": 1}),
    ("GET", "/search?q=x&room_id={room}", None),
]


@pytest.mark.parametrize(("method", "path", "body"), PATHS)
async def test_an_unknown_room_is_404(server: Server, method: str, path: str, body: object) -> None:
    """A room that is not there is 404 everywhere, also under an id that no room can have."""
    alice = await server.user("alice")
    for room in ("no-such-room", "LOBBY", "%D0%B0", "a%2Fb", "x" * 65, "%00"):
        url = path.format(room=room, name=alice.username)
        answer = await alice.request(method, url, json=body)
        if url.startswith("/search") and answer.status == 400:
            continue  # in a query an impossible id may also be called bad input
        answer.refused(404, "not_found")


@pytest.mark.parametrize(("method", "path", "body"), PATHS)
async def test_a_private_room_is_403_to_strangers(
    server: Server, method: str, path: str, body: object
) -> None:
    """Who is no member of a private room gets nothing there, and no way to let themselves in."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(kind="private")
    path = path.format(room=room, name=bob.username)
    (await bob.request(method, path, json=body)).refused(403, "forbidden")
    (await bob.get(f"/websockets/chat/{room}", headers=UPGRADE)).refused(403, "forbidden")
    assert await listed(bob, room) is None
    assert await roles(alice, room) == {alice.username: "owner"}


async def test_a_public_room_is_read_by_all_and_joined_by_posting(server: Server) -> None:
    """A stranger may read a public room without joining it, and joins it with the first post."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    await alice.say(room, "Come in")
    (message,) = (await bob.get(f"/rooms/{room}/messages")).ok()
    assert message["message"] == "Come in"
    assert (await bob.get(f"/rooms/{room}")).ok()["role"] is None
    seen = await listed(bob, room)
    assert seen is not None
    assert (seen["role"], seen["unread"]) == (None, 0)
    await bob.say(room, "Thank you")
    kinds = [(event["type"], event["username"]) for event in await bob.events(room)]
    assert kinds[2:] == [("member", bob.username), ("message", bob.username)]
    assert await roles(bob, room) == {alice.username: "owner", bob.username: "member"}


async def test_joining_twice_is_one_event(server: Server) -> None:
    """Whoever has the role already gets 200, and the log says nothing new."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    for _ in range(2):
        member = (await bob.put(f"/rooms/{room}/members/{bob.username}")).ok()
        assert member.keys() == {"username", "role", "online"}
        assert (member["username"], member["role"]) == (bob.username, "member")
    assert len(await alice.events(room)) == 2


@pytest.mark.parametrize(
    "body",
    [{"role": "king"}, {"role": ""}, {"role": None}, {"role": 5}, {"role": ["member"]}, [], "x"],
)
async def test_a_bad_role_is_400(server: Server, body: object) -> None:
    """There are four roles and no others."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    path = f"/rooms/{room}/members/{bob.username}"
    (await alice.put(path, json=body)).refused(400, "bad_request")
    assert bob.username not in await roles(alice, room)


@pytest.mark.parametrize("name", ["nobody-of-this-name", "a", "%00", "%D0%B0"])
async def test_an_unknown_member_is_404(server: Server, name: str) -> None:
    """Who has no account cannot become a member, nor cease to be one."""
    alice = await server.user("alice")
    room = await alice.room()
    (await alice.put(f"/rooms/{room}/members/{name}", json={})).refused(404, "not_found")
    (await alice.delete(f"/rooms/{room}/members/{name}")).refused(404, "not_found")


async def test_who_is_not_there_cannot_be_removed(server: Server) -> None:
    """Removing somebody who is no member is 404."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    (await alice.delete(f"/rooms/{room}/members/{bob.username}")).refused(404, "not_found")


# Who (in the room's role) does what to a member of which role, and is it allowed?
# None is somebody who is not in the room; "self" is the actor; the action None is a removal.
ALLOWED: list[tuple[str, str | None, str | None, int]] = [
    ("owner", None, "member", 200),
    ("owner", None, "moderator", 200),
    ("owner", None, "owner", 200),
    ("owner", None, "banned", 200),
    ("owner", "member", "owner", 200),
    ("owner", "moderator", "member", 200),
    ("owner", "moderator", "banned", 200),
    ("owner", "owner", "member", 200),
    ("owner", "owner", "banned", 200),
    ("owner", "banned", "member", 200),
    ("owner", "moderator", None, 204),
    ("owner", "owner", None, 204),
    ("owner", "banned", None, 204),
    ("moderator", None, "member", 200),
    ("moderator", None, "banned", 200),
    ("moderator", "member", "banned", 200),
    ("moderator", "banned", "member", 200),
    ("moderator", "member", None, 204),
    ("moderator", "banned", None, 204),
    ("moderator", "self", None, 204),
    ("moderator", "self", "member", 200),
    ("moderator", None, "moderator", 403),
    ("moderator", None, "owner", 403),
    ("moderator", "member", "moderator", 403),
    ("moderator", "moderator", "member", 403),
    ("moderator", "moderator", "banned", 403),
    ("moderator", "owner", "member", 403),
    ("moderator", "owner", "banned", 403),
    ("moderator", "moderator", None, 403),
    ("moderator", "owner", None, 403),
    ("moderator", "self", "owner", 403),
    ("member", "self", None, 204),
    ("member", "self", "moderator", 403),
    ("member", "self", "owner", 403),
    ("member", None, "member", 403),
    ("member", None, "banned", 403),
    ("member", "member", "banned", 403),
    ("member", "member", "moderator", 403),
    ("member", "member", None, 403),
    ("member", "owner", None, 403),
    ("member", "banned", None, 403),
    ("banned", "self", "member", 403),
    ("banned", "self", "owner", 403),
    ("banned", "self", None, 403),
    ("banned", "member", None, 403),
    ("banned", "member", "banned", 403),
]


@pytest.mark.parametrize(
    ("kind", "actor", "target", "role", "status"),
    [
        *(("private", *row) for row in ALLOWED),
        *(("public", *row) for row in ALLOWED if row[1] in {None, "self"}),
    ],
)
async def test_who_may_do_what_to_whom(  # noqa: PLR0913, PLR0917
    server: Server, kind: str, actor: str, target: str | None, role: str | None, status: int
) -> None:
    """Moderators rule those below them, owners all, members and the banned only themselves."""
    root, doer, other = await server.users("root", "doer", "other")
    room = await root.room(kind=kind)
    await root.appoint(room, doer, actor)
    if target == "self":
        other = doer
    elif target is not None:
        await root.appoint(room, other, target)
    before = await roles(root, room), await root.head(room)
    path = f"/rooms/{room}/members/{other.username}"
    if role is None:
        answer = await doer.delete(path)
    else:
        answer = await doer.put(path, json={"role": role})
    after = await roles(root, room), await root.head(room)
    if status == 403:
        answer.refused(403, "forbidden")
        assert after == before
        return
    answer.ok(status)
    assert after[0].get(other.username) == role
    (event,) = await root.events(room, before[1])
    assert (event["type"], event["seq"]) == ("member", before[1] + 1)
    assert (event["username"], event["member"]) == (doer.username, other.username)
    assert event["role"] == role


@pytest.mark.parametrize("kind", ["public", "private"])
async def test_the_last_owner_can_neither_leave_nor_step_down(server: Server, kind: str) -> None:
    """The last owner's way out is 409 until there is another owner."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob, kind=kind)
    path = f"/rooms/{room}/members/{alice.username}"
    (await alice.delete(path)).refused(409, "conflict")
    for role in ("member", "moderator", "banned"):
        (await alice.put(path, json={"role": role})).refused(409, "conflict")
    assert await alice.head(room) == 2
    await alice.appoint(room, bob, "owner")
    (await alice.delete(path)).ok(204)
    assert await roles(bob, room) == {bob.username: "owner"}


async def test_two_last_owners_leaving_at_once_leave_one_behind(server: Server) -> None:
    """When both owners leave at the same time, one of them is held back."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    await alice.appoint(room, bob, "owner")
    work = [user.delete(f"/rooms/{room}/members/{user.username}") for user in (alice, bob)]
    assert sorted(answer.status for answer in await asyncio.gather(*work)) == [204, 409]


async def test_the_removed_may_come_back_to_a_public_room_only(server: Server) -> None:
    """A removal from a public room does not bar the way back; from a private room it does."""
    alice, bob = await server.users("alice", "bob")
    for kind, status in (("public", 200), ("private", 403)):
        room = await alice.room(bob, kind=kind)
        path = f"/rooms/{room}/members/{bob.username}"
        (await alice.delete(path)).ok(204)
        assert (await bob.put(path)).status == status
        assert (await bob.get(f"/rooms/{room}/messages")).status == status


async def test_the_banned_neither_read_nor_join(server: Server) -> None:
    """A ban from a public room shuts its history, its log, its socket and its door."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    word = unique("word")
    await alice.say(room, word)
    await alice.appoint(room, bob, "banned")
    for method, path, body in PATHS:
        path = path.format(room=room, name=bob.username)  # noqa: PLW2901
        (await bob.request(method, path, json=body)).refused(403, "forbidden")
    (await bob.get(f"/websockets/chat/{room}", headers=UPGRADE)).refused(403, "forbidden")
    assert (await bob.get(f"/search?q={word}")).ok() == []
    (await alice.delete(f"/rooms/{room}/members/{bob.username}")).ok(204)
    (await bob.get(f"/rooms/{room}/messages")).ok()


async def test_only_moderators_see_the_banned(server: Server) -> None:
    """The list of members shows bans to moderators and owners, and to nobody else."""
    root, mod, bob, troll = await server.users("root", "doer", "bob", "other")
    room = await root.room(bob)
    await root.appoint(room, mod, "moderator")
    await root.appoint(room, troll, "banned")
    everybody = {root.username: "owner", mod.username: "moderator", bob.username: "member"}
    for user in (root, mod):
        assert await roles(user, room) == everybody | {troll.username: "banned"}
    stranger = await server.user("alice")
    for user in (bob, stranger):
        assert await roles(user, room) == everybody
    assert list(await roles(root, room)) == sorted([*everybody, troll.username])


async def test_a_direct_room_is_the_same_from_both_sides(server: Server) -> None:
    """A direct room is created once for two people, with both as equal members."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    first = {"kind": "direct", "username": bob.username.upper()}
    created = (await alice.post("/rooms", json=first)).ok(201)
    again = {"kind": "direct", "username": alice.username, "name": "Another name"}
    found = (await bob.post("/rooms", json=again)).ok(200)
    room = created["room_id"]
    assert found["room_id"] == room
    assert (created["kind"], created["role"]) == ("direct", "member")
    assert found["name"] == created["name"]
    assert await roles(bob, room) == {alice.username: "member", bob.username: "member"}
    assert (await listed(alice, room)) is not None
    members = [e["member"] for e in await alice.events(room) if e["type"] == "member"]
    assert sorted(members) == sorted([alice.username, bob.username])
    await alice.say(room, "psst")
    seen = await listed(bob, room)
    assert seen is not None
    assert seen["unread"] == 1


async def test_a_direct_room_opened_from_both_sides_at_once_is_one(server: Server) -> None:
    """Ten requests for the same two people at the same time make one room."""
    alice, bob = await server.users("alice", "bob", fresh=True)
    work = [
        user.post("/rooms", json={"kind": "direct", "username": other.username})
        for user, other in ((alice, bob), (bob, alice)) * 5
    ]
    answers = await asyncio.gather(*work)
    assert len({answer.json["room_id"] for answer in answers}) == 1
    assert sorted(answer.status for answer in answers) == [200] * 9 + [201]


@pytest.mark.parametrize(
    ("status", "username"), [(404, "nobody-of-this-name"), (400, "{self}"), (400, None), (400, 5)]
)
async def test_a_direct_room_needs_somebody_else(
    server: Server, status: int, username: object
) -> None:
    """Nobody has a direct room with themselves, or with nobody."""
    alice = await server.user("alice")
    name = alice.username if username == "{self}" else username
    (await alice.post("/rooms", json={"kind": "direct", "username": name})).refused(status)


async def test_a_direct_room_stays_as_it_is(server: Server) -> None:
    """Nobody leaves, invites to, renames or deletes a direct room, and a third sees nothing."""
    alice, bob, carol = await server.users("alice", "bob", "carol", fresh=True)
    body = {"kind": "direct", "username": bob.username}
    room = (await alice.post("/rooms", json=body)).ok(201)["room_id"]
    head = await alice.head(room)
    path = f"/rooms/{room}"
    refusals = [
        alice.put(f"{path}/members/{carol.username}", json={}),
        alice.put(f"{path}/members/{bob.username}", json={"role": "banned"}),
        alice.put(f"{path}/members/{alice.username}", json={"role": "owner"}),
        alice.delete(f"{path}/members/{bob.username}"),
        alice.delete(f"{path}/members/{alice.username}"),
        alice.patch(path, json={"name": "Ours"}),
        alice.delete(path),
        carol.get(path),
        carol.get(f"{path}/messages"),
        carol.put(f"{path}/members/{carol.username}", json={}),
        carol.post(f"{path}/messages", json={"message": "me too"}),
        carol.get(f"/websockets/chat/{room}", headers=UPGRADE),
    ]
    for answer in await asyncio.gather(*refusals):
        answer.refused(403, "forbidden")
    assert await alice.head(room) == head
    assert await listed(carol, room) is None


async def test_owners_rename_a_room(server: Server) -> None:
    """A new name is an event, and shows in the list at once."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with bob.chat(room) as ws:
        changed = (await alice.patch(f"/rooms/{room}", json={"name": "Ümläut 愛"})).ok()
        event = await ws.event("room")
    assert changed["name"] == "Ümläut 愛"
    assert (event["name"], event["username"]) == ("Ümläut 愛", alice.username)
    assert (event["seq"], event["room_id"]) == (3, room)
    assert (await alice.events(room))[-1] == event
    seen = await listed(bob, room)
    assert seen is not None
    assert (seen["name"], seen["seq"]) == ("Ümläut 愛", 3)


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\0b", "\ud800", 5, None, []])
async def test_a_bad_new_name_is_400(server: Server, name: object) -> None:
    """A room keeps its name when the new one is bad."""
    alice = await server.user("alice")
    room = await alice.room()
    (await alice.patch(f"/rooms/{room}", json={"name": name})).refused(400, "bad_request")
    assert await alice.head(room) == 1


@pytest.mark.parametrize("role", ["moderator", "member", None])
async def test_only_owners_rename_and_delete(server: Server, role: str | None) -> None:
    """Whoever is not the owner can neither rename nor delete a room."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    if role:
        await alice.appoint(room, bob, role)
    (await bob.patch(f"/rooms/{room}", json={"name": "Mine"})).refused(403, "forbidden")
    (await bob.delete(f"/rooms/{room}")).refused(403, "forbidden")
    (await alice.get(f"/rooms/{room}")).ok()


async def test_a_deleted_room_is_gone(server: Server) -> None:
    """After its deletion a room is 404 everywhere, and its words are found nowhere."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    word = unique("word")
    await alice.say(room, word)
    (await alice.delete(f"/rooms/{room}")).ok(204)
    for user in (alice, bob):
        for method, path, body in PATHS:
            path = path.format(room=room, name=bob.username)  # noqa: PLW2901
            (await user.request(method, path, json=body)).refused(404, "not_found")
        assert await listed(user, room) is None
        assert (await user.get(f"/search?q={word}")).ok() == []
    (await alice.get(f"/websockets/chat/{room}", headers=UPGRADE)).refused(404, "not_found")


@pytest.mark.parametrize("heir", ["moderator", "member"])
async def test_a_room_never_loses_its_last_owner(server: Server, heir: str) -> None:
    """With the last owner's account gone, the oldest moderator, else member, becomes owner."""
    owner = await server.user("owner", fresh=True)
    oldest, second, third = await server.users("alice", "bob", "carol")
    room = await owner.room(oldest, second, third)
    if heir == "moderator":
        await owner.appoint(room, second, "moderator")
        await owner.appoint(room, third, "moderator")
    (await owner.delete("/users/me", json={"password": PASSWORD})).ok(204)
    chosen = second if heir == "moderator" else oldest
    now = await roles(oldest, room)
    assert now[chosen.username] == "owner"
    assert owner.username not in now
    last = [event for event in await oldest.events(room) if event["type"] == "member"][-2:]
    changes = {event["member"]: event["role"] for event in last}
    assert changes == {chosen.username: "owner", owner.username: None}
