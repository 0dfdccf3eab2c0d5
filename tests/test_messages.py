"""Messages over HTTP: history, sending and sending again, edits, deletes, read marks, search."""

import asyncio
import re
import time
from typing import Any

import pytest

from tests.helpers import Event, Server, User, background, unique

TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

BAD_TEXTS = ["", " ", "\n\t ", "\u2003\u3000", "x" * 4001, "a\0b", "\ud800", 5, True, None, [], {}]
GOOD_TEXTS = [
    "x",
    "😀" * 4000,
    "  spaces\n\nand\tlines \r\n",
    "שלום 👩‍👩‍👧 \u202eRTL\u202c e\u0301",
    "\u0085\u2028\ufeff|\uffff\U0010ffff",
    "<script>alert(1)</script> & \"quotes\" 'n' \\ %s $1 {0}",
    "\x1b[31m\x7f\x01",
]
BAD_CLIENT_IDS = ["", "x" * 65, "é", "a\nb", "a\tb", "\x7f", "a\0", "\ud800", 5, True, [], {}]


async def history(user: User, room: str, query: str = "") -> list[Event]:
    """Return a page of a room's history."""
    page: list[Event] = (await user.get(f"/rooms/{room}/messages?{query}")).ok()
    return page


async def test_a_post_answers_with_its_event(server: Server) -> None:
    """A posted message answers 201 with all that the history shows of it."""
    alice = await server.user("alice")
    room = await alice.room()
    event = await alice.say(room, "Hello World!", client_id="c 1~!", ignored={"x": [1]})
    assert TIME.match(event.pop("created_at"))
    assert event == {
        "type": "message",
        "room_id": room,
        "seq": 2,
        "username": alice.username,
        "message": "Hello World!",
        "client_id": "c 1~!",
    }
    plain = await alice.say(room, "no id")
    assert "client_id" not in plain
    assert (await history(alice, room))[1] == plain


@pytest.mark.parametrize("text", GOOD_TEXTS)
async def test_a_text_is_kept_as_it_is(server: Server, text: str) -> None:
    """Every character of a good text comes back, in the answer, the history and the log."""
    alice = await server.user("alice")
    room = await alice.room()
    event = await alice.say(room, text)
    assert event["message"] == text
    assert await history(alice, room) == [event]
    assert (await alice.events(room, 1)) == [event]


@pytest.mark.parametrize("text", BAD_TEXTS)
async def test_a_bad_text_is_400(server: Server, text: object) -> None:
    """A blank, over-long, NUL-bearing or surrogate text is refused, as a message and as an edit."""
    alice = await server.user("alice")
    room = await alice.room()
    path = f"/rooms/{room}/messages"
    (await alice.post(path, json={"message": text})).refused(400, "bad_request")
    event = await alice.say(room, "good")
    edit = await alice.patch(f"{path}/{event['seq']}", json={"message": text})
    edit.refused(400, "bad_request")
    assert await history(alice, room) == [event]


async def test_a_message_is_needed(server: Server) -> None:
    """A body without a message is refused."""
    alice = await server.user("alice")
    room = await alice.room()
    answer = await alice.post(f"/rooms/{room}/messages", json={"text": "x", "client_id": "c"})
    answer.refused(400, "bad_request")


@pytest.mark.parametrize("client_id", BAD_CLIENT_IDS)
async def test_a_bad_client_id_is_400(server: Server, client_id: object) -> None:
    """A client id is 1 to 64 printable ASCII characters, or nothing is stored."""
    alice = await server.user("alice")
    room = await alice.room()
    body = {"message": "x", "client_id": client_id}
    (await alice.post(f"/rooms/{room}/messages", json=body)).refused(400, "bad_request")
    assert await alice.head(room) == 1


async def test_a_retry_is_answered_with_the_first_event(server: Server) -> None:
    """The same client id and text again is 200 with the first event, as often as one likes."""
    alice = await server.user("alice")
    room = await alice.room()
    first = await alice.say(room, "once", client_id="c1")
    for _ in range(3):
        body = {"message": "once", "client_id": "c1"}
        assert (await alice.post(f"/rooms/{room}/messages", json=body)).ok(200) == first
    assert await history(alice, room) == [first]


async def test_another_text_under_a_client_id_is_a_conflict(server: Server) -> None:
    """A client id in use for another text is 409, and nothing is stored."""
    alice = await server.user("alice")
    room = await alice.room()
    first = await alice.say(room, "one", client_id="c1")
    body = {"message": "two", "client_id": "c1"}
    (await alice.post(f"/rooms/{room}/messages", json=body)).refused(409, "conflict")
    assert await history(alice, room) == [first]


async def test_a_retry_is_known_after_an_edit_and_a_delete(server: Server) -> None:
    """A retry finds its message by client id, whatever has become of the text since."""
    alice = await server.user("alice")
    room = await alice.room()
    path = f"/rooms/{room}/messages"
    seq = (await alice.say(room, "first", client_id="c1"))["seq"]
    (await alice.patch(f"{path}/{seq}", json={"message": "second"})).ok()
    for text in ("first", "second", "third"):
        again = (await alice.post(path, json={"message": text, "client_id": "c1"})).ok(200)
        assert (again["seq"], again["message"]) == (seq, "second")
    (await alice.delete(f"{path}/{seq}")).ok(204)
    again = (await alice.post(path, json={"message": "first", "client_id": "c1"})).ok(200)
    assert (again["seq"], again["deleted"]) == (seq, True)
    assert "message" not in again
    assert await alice.head(room) == 4


async def test_a_client_id_is_ones_own_and_the_rooms(server: Server) -> None:
    """Somebody else, or the same user elsewhere, may use the same client id."""
    alice, bob = await server.users("alice", "bob")
    room, other = await alice.room(bob), await alice.room()
    await alice.say(room, "one", client_id="c1")
    assert (await bob.say(room, "two", client_id="c1"))["seq"] == 4
    assert (await alice.say(other, "three", client_id="c1"))["seq"] == 2
    assert (await alice.say(room, "four", client_id="C1"))["seq"] == 5


@pytest.mark.parametrize(
    "query",
    [
        *("", "limit=1", "limit=7", "limit=200", "limit=100000", f"limit={2**53}"),
        *("before=1", "before=2", "before=30&limit=5", "before=99999", f"before={2**53}"),
        *("after=0", "after=0&limit=3", "after=20&limit=4", "after=59", "after=99999"),
        *("after=10&before=20", "after=10&before=20&limit=3", "after=20&before=10"),
    ],
)
async def test_history_is_paged_by_number(server: Server, query: str) -> None:
    """`before`, `after` and `limit` cut the history as a list of numbers would be cut."""
    bob = await server.user("bob")
    room = await long_room(server)
    everything = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", query)}
    before, after = everything.get("before", 2**53), everything.get("after", -1)
    limit = min(everything.get("limit", 50), 200)
    fits = [seq for seq in range(2, 62) if after < seq < before]
    page = [message["seq"] for message in await history(bob, room, query)]
    if "after" in everything and "before" in everything:
        assert page in (fits[:limit], fits[-limit:])
    else:
        assert page == (fits[:limit] if "after" in everything else fits[-limit:])


async def long_room(server: Server) -> str:
    """Return a room of 60 messages, numbered from 2; it is made once for each server."""
    if "long" not in server.pool.rooms:
        alice = await server.user("writer")
        room = await alice.room()
        async with alice.chat(room) as ws:
            for number in range(60):
                await ws.say(f"message {number}")
            await ws.upto(61)
        server.pool.rooms["long"] = room
    return server.pool.rooms["long"]


async def test_a_page_has_fifty_messages_and_at_most_two_hundred(server: Server) -> None:
    """Without a limit a page is the newest 50; a limit above 200 is clamped to 200."""
    alice = await server.user("alice")
    room = await alice.room()
    async with alice.chat(room) as ws:
        for number in range(210):
            await ws.say(f"message {number}")
        await ws.upto(211)
    newest = [message["seq"] for message in await history(alice, room)]
    assert newest == list(range(162, 212))
    most = [message["seq"] for message in await history(alice, room, "limit=201")]
    assert most == list(range(12, 212))


NO_NUMBERS = ["x", "-1", "1.5", "", "%20", "1e3", "0x1", "%D9%A3", "9" * 5000, "1_0", "NaN", "%00"]


@pytest.mark.parametrize(
    "path",
    [
        *("/rooms/1/messages?limit=", "/rooms/1/messages?before=", "/rooms/1/messages?after="),
        *("/rooms/1/events?after=", "/rooms/1/events?limit=", "/rooms/1/events?wait="),
        *("/users?limit=", "/search?q=x&limit=", "/search?q=x&room_id=1&before="),
    ],
)
async def test_what_is_no_number_is_400(server: Server, path: str) -> None:
    """A number in a query is digits, or the request is refused."""
    alice = await server.user("alice")
    for value in NO_NUMBERS:
        (await alice.get(path + value)).refused(400, "bad_request")


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_what_is_no_message_is_404(server: Server, method: str) -> None:
    """A number that is no message's (1 is a member event) cannot be edited or deleted."""
    alice = await server.user("alice")
    room = await alice.room()
    for seq in ("1", "99", "0", "-1", "x", "2.0", "9" * 30, "%00", "%D9%A3"):
        path = f"/rooms/{room}/messages/{seq}"
        answer = await alice.request(method, path, json={"message": "x"})
        answer.refused(404, "not_found")
    assert await alice.head(room) == 1


async def test_an_edit_shows_everywhere(server: Server) -> None:
    """An edit answers with the new message, is an event of its own, and says when it was."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    seq = (await alice.say(room, "teh word", client_id="c1"))["seq"]
    path = f"/rooms/{room}/messages/{seq}"
    edited = (await alice.patch(path, json={"message": "the word"})).ok()
    assert (edited["seq"], edited["message"], edited["client_id"]) == (seq, "the word", "c1")
    assert TIME.match(edited["edited_at"])
    assert await history(bob, room) == [edited]
    message, edit = await bob.events(room, seq - 1)
    assert message == edited
    assert (edit["type"], edit["seq"], edit["target"]) == ("edit", seq + 1, seq)
    assert (edit["message"], edit["username"]) == ("the word", alice.username)


@pytest.mark.parametrize("role", ["owner", "moderator", "member"])
async def test_nobody_edits_anothers_message(server: Server, role: str) -> None:
    """Only its author may edit a message; not even the owner of the room may."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    await alice.appoint(room, bob, role)
    event = await alice.say(room, "mine")
    path = f"/rooms/{room}/messages/{event['seq']}"
    (await bob.patch(path, json={"message": "yours"})).refused(403, "forbidden")
    assert await history(alice, room) == [event]


async def test_a_delete_leaves_a_stone_without_text(server: Server) -> None:
    """A deleted message keeps its number and its author in the history, and loses its text."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    seq = (await alice.say(room, "regret"))["seq"]
    path = f"/rooms/{room}/messages/{seq}"
    (await alice.delete(path)).ok(204)
    (stone,) = await history(bob, room)
    assert (stone["seq"], stone["deleted"], stone["username"]) == (seq, True, alice.username)
    assert "message" not in stone
    replayed, delete = await bob.events(room, seq - 1)
    assert replayed == stone
    assert (delete["type"], delete["seq"], delete["target"]) == ("delete", seq + 1, seq)
    (await alice.delete(path)).refused(404, "not_found")
    (await alice.patch(path, json={"message": "again"})).refused(404, "not_found")
    assert await alice.head(room) == seq + 1


async def test_an_edit_of_a_deleted_message_is_replayed_without_text(server: Server) -> None:
    """In a replay the edit of a message that was deleted later has no text either."""
    alice = await server.user("alice")
    room = await alice.room()
    seq = (await alice.say(room, "one"))["seq"]
    path = f"/rooms/{room}/messages/{seq}"
    for text in ("two", "three"):
        (await alice.patch(path, json={"message": text})).ok()
    message, *edits = await alice.events(room, 1)
    assert [event["message"] for event in (message, *edits)] == ["three"] * 3
    (await alice.delete(path)).ok(204)
    message, first, second, last = await alice.events(room, 1)
    assert [event["seq"] for event in (message, first, second, last)] == [2, 3, 4, 5]
    assert not any("message" in event for event in (message, first, second, last))
    assert (first["deleted"], second["deleted"]) == (True, True)


@pytest.mark.parametrize(
    ("role", "status"), [("owner", 204), ("moderator", 204), ("member", 403), ("banned", 403)]
)
async def test_moderators_delete_what_others_wrote(server: Server, role: str, status: int) -> None:
    """A message is deleted by its author, a moderator or an owner, and by nobody else."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    await alice.appoint(room, bob, role)
    event = await alice.say(room, "mine")
    answer = await bob.delete(f"/rooms/{room}/messages/{event['seq']}")
    assert answer.status == status
    (message,) = await history(alice, room)
    assert message.get("deleted", False) is (status == 204)


async def test_who_left_edits_nothing(server: Server) -> None:
    """Having written a message in a private room does not open it again to who was removed."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob, kind="private")
    event = await bob.say(room, "mine")
    (await alice.delete(f"/rooms/{room}/members/{bob.username}")).ok(204)
    path = f"/rooms/{room}/messages/{event['seq']}"
    (await bob.patch(path, json={"message": "still"})).refused(403, "forbidden")
    (await bob.delete(path)).refused(403, "forbidden")


async def unread(user: User, room: str) -> tuple[int, int]:
    """Return the read mark and the number of unread messages in the user's list of rooms."""
    (found,) = [each for each in (await user.get("/rooms")).ok() if each["room_id"] == room]
    return found["read_seq"], found["unread"]


async def test_unread_are_living_messages_by_others_above_the_mark(server: Server) -> None:
    """Neither one's own messages nor edits, deletes, joins or the deleted count as unread."""
    alice, bob, carol = await server.users("alice", "bob", "carol")
    room = await alice.room()
    await alice.say(room, "before bob came")
    await alice.appoint(room, bob, "member")
    assert await unread(bob, room) == (3, 0)
    await bob.say(room, "my own")
    wrong = await alice.say(room, "teh one")
    gone = await alice.say(room, "the other")
    assert (await unread(bob, room))[1] == 2
    path = f"/rooms/{room}/messages"
    (await alice.patch(f"{path}/{wrong['seq']}", json={"message": "the one"})).ok()
    await alice.appoint(room, carol, "member")
    (await alice.patch(f"/rooms/{room}", json={"name": "renamed"})).ok()
    assert (await unread(bob, room))[1] == 2
    (await alice.delete(f"{path}/{gone['seq']}")).ok(204)
    assert (await unread(bob, room))[1] == 1
    (await bob.put(f"/rooms/{room}/read", json={"seq": wrong["seq"]})).ok(204)
    assert await unread(bob, room) == (wrong["seq"], 0)


async def test_the_read_mark_never_moves_back_nor_beyond_the_head(server: Server) -> None:
    """A lower mark changes nothing, and one beyond the head is the head."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    for number in range(5):
        await alice.say(room, f"message {number}")
    for seq, mark, count in ((4, 4, 3), (3, 4, 3), (0, 4, 3), (6, 6, 1), (2**53, 7, 0)):
        (await bob.put(f"/rooms/{room}/read", json={"seq": seq})).ok(204)
        assert await unread(bob, room) == (mark, count)
    await alice.say(room, "one more")
    assert await unread(bob, room) == (7, 1)


@pytest.mark.parametrize("seq", ["1", 1.5, -1, True, None, [], {}, 2**53 + 1, 10**400])
async def test_a_bad_read_mark_is_400(server: Server, seq: object) -> None:
    """A read mark is a number of the log."""
    alice = await server.user("alice")
    room = await alice.room()
    (await alice.put(f"/rooms/{room}/read", json={"seq": seq})).refused(400, "bad_request")
    (await alice.put(f"/rooms/{room}/read", json={})).refused(400, "bad_request")


async def test_only_members_have_a_read_mark(server: Server) -> None:
    """A stranger may read a public room, but has no mark in it."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room()
    (await bob.put(f"/rooms/{room}/read", json={"seq": 1})).refused(403, "forbidden")


async def test_unread_is_exact_up_to_a_thousand(server: Server) -> None:
    """999 unread messages are 999, and 1,010 are at least 1,000."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    async with alice.chat(room) as ws:
        for number in range(999):
            await ws.say(f"message {number}")
        await ws.upto(1001)
        assert (await unread(bob, room))[1] == 999
        for number in range(11):
            await ws.say(f"more {number}")
        await ws.upto(1012)
    assert (await unread(bob, room))[1] >= 1000


async def found(user: User, q: str, **query: object) -> list[str]:
    """Return the texts that a search finds, in its order."""
    messages = (await user.get("/search", params={"q": q, **query})).ok()
    assert all(message["type"] == "message" for message in messages)
    return [message["message"] for message in messages]


async def test_search_finds_parts_of_words_whatever_the_case(server: Server) -> None:
    """A search is for a substring, without case, in every script, newest first."""
    alice = await server.user("alice")
    room = await alice.room()
    mark = unique("")
    texts = [
        f"Straßenbahn {mark}",
        f"ПРИВЕТ мир {mark}",
        f"我今天吃了苹果 {mark}",
        f"日本語のテキスト {mark}",
    ]
    texts += [f"Ünïcödé {mark}", f"100% sure_thing c:\\dir {mark}", f"'quoted' \"twice\" {mark}"]
    for text in texts:
        await alice.say(room, text)
    assert await found(alice, mark, room_id=room) == texts[::-1]
    for q, number in (
        *(("ASSENB", 0), ("привет МИР", 1), ("吃了", 2), ("苹", 2), ("テキス", 3), ("語", 3)),
        *(("ÜNÏCÖDÉ", 4), ("100% s", 5), ("E_T", 5), (":\\d", 5), ("'QUOTED'", 6), ('"t', 6)),
    ):
        assert await found(alice, q, room_id=room) == [texts[number]], q
    for q in ("assen%", "100_", "sure thing", "%", "_", "e\u0301", "привет  мир", "*", "吃*"):
        expected = [texts[5]] if q in {"%", "_"} else []
        assert await found(alice, q, room_id=room) == expected, q


async def test_search_shows_only_rooms_one_may_read(server: Server) -> None:
    """Search finds what is in public rooms and one's own, and nothing of what is closed."""
    alice, bob = await server.users("alice", "bob")
    word = unique("word")
    public, private, shared = (
        await alice.room(),
        await alice.room(kind="private"),
        await alice.room(bob, kind="private"),
    )
    for room in (public, private, shared):
        await alice.say(room, f"{word} {room}")
    assert await found(alice, word) == [f"{word} {room}" for room in (shared, private, public)]
    assert await found(bob, word) == [f"{word} {room}" for room in (shared, public)]
    (await bob.get(f"/search?q={word}&room_id={private}")).refused(403, "forbidden")
    assert await found(bob, word, room_id=public) == [f"{word} {public}"]
    await alice.appoint(public, bob, "banned")
    assert await found(bob, word) == [f"{word} {shared}"]


async def test_search_is_paged_within_a_room(server: Server) -> None:
    """`limit` and, within a room, `before` page through what is found."""
    alice = await server.user("alice")
    room = await alice.room()
    word = unique("word")
    seqs = [(await alice.say(room, f"{word} {number}"))["seq"] for number in range(5)]
    assert await found(alice, word, limit=2) == [f"{word} 4", f"{word} 3"]
    older = await found(alice, word, room_id=room, before=seqs[3], limit=2)
    assert older == [f"{word} 2", f"{word} 1"]
    assert await found(alice, word, room_id=room, before=1) == []
    assert len(await found(alice, word, limit=100000)) == 5


async def test_search_knows_the_present_text_only(server: Server) -> None:
    """What was edited is found by its new text, what was deleted not at all."""
    alice = await server.user("alice")
    room = await alice.room()
    old, new = unique("old"), unique("new")
    seq = (await alice.say(room, old))["seq"]
    (await alice.patch(f"/rooms/{room}/messages/{seq}", json={"message": new})).ok()
    assert (await found(alice, old), await found(alice, new)) == ([], [new])
    (await alice.delete(f"/rooms/{room}/messages/{seq}")).ok(204)
    assert (await found(alice, old), await found(alice, new)) == ([], [])


@pytest.mark.parametrize(
    "query",
    [
        *("", "q=", "q=%20", "q=%00", "q=a%00b", "q=%ED%A0%80", "q=%FF", "q=" + "x" * 201),
        *("q=x&before=5", "q=x&limit=x", "room_id=1"),
    ],
)
async def test_a_bad_search_is_400(server: Server, query: str) -> None:
    """A search needs 1 to 200 characters, and `before` needs a room."""
    alice = await server.user("alice")
    (await alice.get(f"/search?{query}")).refused(400, "bad_request")


async def test_events_are_the_whole_log(server: Server) -> None:
    """The log has every event once, in order, after any number, with the head and the epoch."""
    alice = await server.user("alice")
    room = await long_room(server)
    log = await alice.events(room)
    assert [event["seq"] for event in log] == list(range(1, 62))
    for after in (0, 1, 30, 60, 61):
        page = (await alice.get(f"/rooms/{room}/events?after={after}&limit=20")).ok()
        assert page["events"] == log[after : after + 20]
        assert page.keys() == {"events", "seq", "epoch"}
        assert page["seq"] == 61


@pytest.mark.parametrize("query", ["after=62", "after=100000", f"after={2**53}", "epoch=x"])
async def test_a_cursor_that_cannot_be_served_is_410(server: Server, query: str) -> None:
    """A cursor above the head or of another epoch is told so, with where to begin again."""
    alice = await server.user("alice")
    room = await long_room(server)
    answer = await alice.get(f"/rooms/{room}/events?{query}")
    answer.refused(410, "reset")
    assert answer.json["seq"] == 61
    assert answer.json["floor"] in {0, 1}
    page = (await alice.get(f"/rooms/{room}/events?after=61&epoch={await alice.epoch(room)}")).ok()
    assert page["events"] == []
    assert page["epoch"] == answer.json["epoch"]


@pytest.mark.parametrize("query", ["after=-1", "after=x", f"after={2**53 + 1}", "after=1&after=2"])
async def test_a_cursor_that_is_no_number_is_400(server: Server, query: str) -> None:
    """A cursor is one number up to 2^53."""
    alice = await server.user("alice")
    (await alice.get(f"/rooms/1/events?{query}")).refused(400, "bad_request")


async def test_a_long_poll_ends_with_the_next_event(server: Server) -> None:
    """`wait` holds the answer back until there is something to tell."""
    alice, bob = await server.users("alice", "bob")
    room = await alice.room(bob)
    path = f"/rooms/{room}/events?after=2&wait=30"
    async with background(bob.get(path)) as (poll,):
        await asyncio.wait([poll], timeout=0.3)
        assert not poll.done()
        event = await alice.say(room, "at last")
        async with asyncio.timeout(5):
            page: dict[str, Any] = (await poll).ok()
    assert page["events"] == [event]


async def test_a_long_poll_ends_when_its_room_is_deleted(server: Server) -> None:
    """Who waits for a room's next event is told at once that there will be none."""
    alice = await server.user("alice")
    room = await alice.room()
    async with background(alice.get(f"/rooms/{room}/events?after=1&wait=30")) as (poll,):
        await asyncio.wait([poll], timeout=0.3)
        (await alice.delete(f"/rooms/{room}")).ok(204)
        async with asyncio.timeout(5):
            (await poll).refused(404, "not_found")


async def test_a_long_poll_ends_in_time(server: Server) -> None:
    """With nothing to tell, the answer comes empty after the wait, and at once without one."""
    alice = await server.user("alice")
    room = await alice.room()
    took = []
    for wait in (1, 0):
        began = time.monotonic()
        page = (await alice.get(f"/rooms/{room}/events?after=1&wait={wait}")).ok()
        took.append(time.monotonic() - began)
        assert page["events"] == []
    assert 0.9 < took[0] < 3
    assert took[1] < 0.5


async def test_a_long_poll_sees_what_is_there_already(server: Server) -> None:
    """A wait with events to tell does not wait."""
    alice = await server.user("alice")
    room = await alice.room()
    began = time.monotonic()
    page = (await alice.get(f"/rooms/{room}/events?after=0&wait=30")).ok()
    assert [event["seq"] for event in page["events"]] == [1]
    assert time.monotonic() - began < 5
