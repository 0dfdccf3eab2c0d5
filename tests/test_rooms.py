"""Rooms: who makes them, who is in them, who may do what to whom, and how they end."""

import asyncio
from typing import Any

import pytest

from tests.conftest import Start
from tests.document import OPERATIONS
from tests.helpers import Room, Server, User
from tests.sockets import UPGRADE
from tests.words import PASSWORD, Answer, unique

ROLES = ("owner", "moderator", "member", "banned", "out")  # the last: who is not in the room


async def make(user: User, room: Room, other: User, role: str) -> Answer:
    """Let a user give somebody a role, or remove them."""
    path = f"{room.path}/members/{other.name}"
    body = None if role == "out" else {"role": role}
    return await user.ask("PUT" if body else "DELETE", path, body)


async def all_refused(user: User, room: Room, status: int) -> None:
    """Check that whatever a user asks of a room is refused with this status, and is not shown."""
    body = {"message": "x", "seq": 1}
    for method, path in OPERATIONS:
        if "{room_id}" in path or path == "/search":
            url = path.format(room_id=room.room_id, username=user.name, target=2)
            more: Any = {"headers": UPGRADE} if method == "GET" else {"body": body}
            answer = await user.ask(method, f"{url}?q=x&room_id={room.room_id}", **more)
            answer.refused(status)
    for url in ("/rooms", "/search?q=secret"):
        assert room.room_id not in str((await user.get(url)).ok())


async def test_who_makes_a_room_owns_it(start: Start) -> None:
    """The first account owns the Lobby; of four who make a room at once one does, and owns it."""
    chat = await start()
    there = await start(chat)
    alice = await chat.user("alice")
    body = {"room_id": unique("a_b"), "name": "愛 a/b?", "kind": "private"}
    work = [alice.at(server).post("/rooms", body | {"x": 1}) for server in (chat, there) * 2]
    answers = await asyncio.gather(*work)
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]
    (made,) = [answer.json for answer in answers if answer.status == 201]
    assert made.pop("members") == [{"username": alice.name, "role": "owner"}]
    lobby = {"room_id": "1", "name": "Lobby", "kind": "public"}
    fresh = {"role": "owner", "seq": 1, "read_seq": 1, "unread": 0}
    assert (await alice.at(there).get("/rooms")).ok() == [lobby | fresh, made]
    assert made == body | fresh
    for room_id in ("1", made["room_id"]):
        assert await Room(alice, room_id).story() == ["1 alice makes alice owner"]
    for name, word in [("Tea", "tea-"), ("愛の部屋", "room-"), ("a/b" * 33, "a-ba-")] * 2:
        made = (await alice.post("/rooms", {"name": name})).ok(201)
        assert made["room_id"].startswith(word)
        assert (made["name"], made["kind"]) == (name, "public")


async def test_what_is_bad_makes_neither_rooms_nor_members(chat: Server) -> None:
    """Ids, names, kinds and roles outside of the rules, and unknown people, change nothing."""
    alice, bob = await chat.users("alice", "bob")
    cases: dict[str, list[Any]] = {
        "room_id": ["-a", "a" * 65, "a b", "a\n", "é", "A", "a.b", "\0", "\ud800", "direct_1", 5],
        "name": ["", "   ", "x" * 101, "a\0b", "\ud800", "\u200b\u200d", 5, True, [], {}],
        "kind": ["", "secret", "PUBLIC", "deleted", "direct", 5],
    }
    for field, value in [(field, value) for field, values in cases.items() for value in values]:
        body = {"room_id": unique("ok"), "name": "Fine", "kind": "public", field: value}
        (await alice.post("/rooms", body)).refused(400, "bad_request")
    for status, name in ((404, "nobody-of-this-name"), (400, alice.name), (400, None), (400, 5)):
        (await alice.post("/rooms", {"kind": "direct", "username": name})).refused(status)
    room = await alice.room()  # which is committed after what was refused
    assert [one["room_id"] for one in (await alice.get("/rooms")).ok() if one["role"]] == [room[1]]
    assert await chat.rows("SELECT 1 FROM rooms WHERE name LIKE '%nobody-of-this-name%'") == []
    nobody, bobs = (f"{room.path}/members/{name}" for name in ("nobody-of-this-name", bob.name))
    for bad in ({"role": "king"}, {"role": ""}, {"role": 5}, {"role": ["member"]}, "x"):
        (await alice.put(bobs, bad)).refused(400, "bad_request")
    for method, path in (("PUT", nobody), ("DELETE", nobody), ("DELETE", bobs)):
        (await alice.ask(method, path, {"role": "member"})).refused(404, "not_found")
    assert len(await room.log()) == 1


@pytest.mark.parametrize(("kind", "role"), [("private", "out"), ("public", "banned")])
async def test_a_door_is_closed(chat: Server, there: Server, kind: str, role: str) -> None:
    """Strangers and the removed see nothing of a private room, the banned of a public one."""
    alice, bob, stranger = await chat.users("alice", "bob", "stranger")
    room = await alice.room(bob, kind=kind)
    await bob.post_in(room, "secret")
    for user in (bob, stranger):
        await make(alice, room, user, role)
        for server in (chat, there):
            await all_refused(user.at(server), room, 403)
    assert await room.texts() == ["secret"]


async def test_a_public_room_is_open(chat: Server) -> None:
    """Strangers read it, and join with the first post or a PUT; who was removed may come back."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room()
    path = f"{room.path}/members/{bob.name}"
    (await bob.get(f"{room.path}/messages")).ok()
    for text in ("Thank you", "Nice here"):
        await bob.post_in(room, text)
    (await make(alice, room, bob, "out")).ok(204)
    for _ in range(2):  # the second changes nothing, nor does any other PUT without a role
        assert (await bob.put(path)).ok() == {"username": bob.name, "role": "member"}
    await room.admit(bob, role="moderator")
    assert (await bob.put(path, {})).ok() == {"username": bob.name, "role": "moderator"}
    await room.admit(bob, role="banned")
    members = [{"username": alice.name, "role": "owner"}, {"username": bob.name, "role": "banned"}]
    assert (await alice.get(room.path)).ok()["members"] == members
    assert (await carol.get(room.path)).ok()["members"] == members[:1]  # bans are for moderators
    (await make(alice, room, bob, "out")).ok(204)  # which lifts the ban
    await bob.post_in(room, "back")
    assert (await room.story())[1:] == [
        *("2 bob makes bob member", "3 bob: Thank you", "4 bob: Nice here"),
        *("5 alice makes bob None", "6 bob makes bob member", "7 alice makes bob moderator"),
        *("8 alice makes bob banned", "9 alice makes bob None", "10 bob makes bob member"),
        "11 bob: back",
    ]


MAY = {  # what each role may make of whom; all else is forbidden
    "owner": {"self": "moderator member out"} | dict.fromkeys(ROLES, " ".join(ROLES)),
    "moderator": {"self": "member out"} | dict.fromkeys(ROLES[2:], " ".join(ROLES[2:])),
    "member": {"self": "out"},
    "banned": {},
    "out": {"self": "member"},  # in a public room; a private one is closed, see above
}


@pytest.mark.parametrize("mine", ROLES)
async def test_who_may_do_what_to_whom(chat: Server, there: Server, mine: str) -> None:
    """Moderators rule those below them, owners all, all others at most themselves."""
    root, doer, third = await chat.users("root", "doer", "third")
    room = await root.room()
    for target, role in [(target, role) for target in (*ROLES, "self") for role in ROLES]:
        other, before = (doer, mine) if target == "self" else (third, target)
        if role == before:
            continue
        await make(root, room, doer, mine)
        await make(root, room, other, before)
        head = (await root.get(room.path)).ok()["seq"]
        answer = await make(doer.at(there), room, other, role)
        told = [(e["username"], e["member"], e["role"]) for e in await room.log(head)]
        if role in MAY[mine].get(target, "").split():
            assert answer.status == (204 if role == "out" else 200), (target, role, answer)
            assert told == [(doer.name, other.name, None if role == "out" else role)]
        else:
            assert (answer.status, told) == (403, []), (target, role, answer)


async def test_a_room_keeps_an_owner(chat: Server, there: Server) -> None:
    """The last owner stays; of two who leave, step down or dismiss each other at once, one does."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    for role in ("out", "member", "moderator"):
        (await make(alice.at(there), room, alice, role)).refused(409, "conflict")
    for role, crossed, late in (("out", False, 409), ("member", False, 409), ("member", True, 403)):
        room = await alice.room()
        await room.admit(bob, role="owner")
        first, second = (bob, alice) if crossed else (alice, bob)
        work = [make(alice, room, first, role), make(bob.at(there), room, second, role)]
        statuses = sorted(answer.status for answer in await asyncio.gather(*work))
        assert statuses == [204 if role == "out" else 200, late]
        assert str((await alice.get(room.path)).ok()["members"]).count("owner") == 1


async def test_a_direct_room_is_made_once_and_stays(chat: Server, there: Server) -> None:
    """However two people open it, at once or later, it is theirs; only an account may end."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    hers = {"kind": "direct", "username": bob.name.upper()}
    his = {"kind": "direct", "username": alice.name, "name": "Another name", "room_id": "x"}
    work = [alice.at(server).post("/rooms", hers) for server in (chat, there)]
    work += [bob.at(server).post("/rooms", his) for server in (chat, there)]
    answers = await asyncio.gather(*work)
    assert sorted(answer.status for answer in answers) == [200, 200, 200, 201]
    (room_id,) = {answer.json["room_id"] for answer in answers}
    room = Room(alice, room_id)
    for user, role in ((carol, "member"), (bob, "out"), (alice, "owner"), (alice, "out")):
        (await make(alice, room, user, role)).refused(403, "forbidden")
    (await alice.delete(room.path)).refused(403, "forbidden")
    await all_refused(carol, room, 403)
    await alice.post_in(room, "farewell")
    found = (await bob.post("/rooms", his)).ok(200)
    assert (found["kind"], found["role"], found["seq"]) == ("direct", "member", 3)
    assert found["room_id"] == room_id and found["name"] != "Another name"
    (await bob.delete("/users/me", {"password": PASSWORD})).ok(204)
    assert (await room.story())[2:] == ["3 alice: farewell", "4 bob makes bob None"]


async def test_a_deleted_room_is_gone_for_good(chat: Server, there: Server) -> None:
    """Its owner alone ends it; what comes at that moment is answered, then all is 404, erased."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    for role in ("member", "moderator"):
        await room.admit(bob, role=role)
        (await bob.delete(room.path)).refused(403, "forbidden")
    path, body = f"{room.path}/messages", {"message": "secret"}
    posts = [bob.at(server).post(path, body) for server in (chat, there) * 5]
    end, *answers = await asyncio.gather(alice.at(there).delete(room.path), *posts)
    end.ok(204)
    assert {answer.status for answer in answers} <= {201, 404}
    for user in (alice, bob.at(there)):
        await all_refused(user, room, 404)
    (await alice.post("/rooms", {"room_id": room.room_id, "name": "x"})).refused(409)
    sql = f"SELECT * FROM events WHERE room_id = '{room.room_id}'"  # noqa: S608
    assert await chat.rows(sql) == []
