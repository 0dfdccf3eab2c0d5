"""Messages: sending and sending again, history, edits, deletes, read marks, search, the log."""

import asyncio
import re
from typing import Any
from urllib.parse import quote

import pytest

from tests.helpers import Room, Server, User
from tests.words import Event, unique

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
BAD_TEXTS: list[Any] = [
    *("", " ", "\n\t ", "\u2003\u3000", "\u200b\u200d\ufeff", "\u202e\x01", "x" * 4001),
    *("a\0b", "\0", "\ud800", "a\udfff", 5, True, None, [], {}),
]
GOOD_TEXTS = [
    "x",
    "😀" * 4000,
    "  blanks\n\nand\tlines \r\n",
    "שלום 👩‍👩‍👧 \u202eRTL\u202c e\u0301",
    "\u0085\u2028\ufeff|\uffff\U0010ffff",
    "<script>alert(1)</script> & \"quotes\" 'n' \\ %s $1 {0}",
    "\x1b[31m\x7f\x01",
    '","username":"mallory","message":"',
]
BAD_CLIENT_IDS: list[Any] = [
    *("", "x" * 65, "é", "a\nb", "a\tb", "\x7f", "a\0", "\ud800", "a\n", 5, True, [], {})
]


async def history(user: User, room: Room, query: str = "") -> list[Event]:
    """Return a page of a room's history."""
    page: list[Event] = (await user.get(f"{room.path}/messages?{query}")).ok()
    return page


# --- Sending


async def test_a_post_answers_with_its_event(chat: Server) -> None:
    """A posted message answers 201 with all that the history and the log show of it."""
    alice = await chat.user("alice")
    room = await alice.room()
    event = await alice.post_in(room, "Hello World!", client_id="c 1~!", ignored={"x": [1]})
    plain = await alice.post_in(room, "no id")
    assert await history(alice, room) == [event, plain]
    assert (await room.log(1)) == [event, plain]
    assert TIME.fullmatch(event.pop("created_at"))
    assert event == {
        "type": "message",
        "room_id": room.room_id,
        "seq": 2,
        "username": alice.name,
        "message": "Hello World!",
        "client_id": "c 1~!",
    }
    assert "client_id" not in plain


async def test_a_text_is_kept_as_it_is(chat: Server) -> None:
    """Every character of a good text comes back: from REST, sockets, history, log and search."""
    alice, bob = await chat.talk("alice", "bob")
    path = f"{alice.room.path}/messages/{{}}"
    for text in GOOD_TEXTS:
        event = await alice.user.post_in(alice.room, text)
        assert event["message"] == text
        assert await bob.hears(text) == event
        spoken = await bob.say(text)
        assert spoken["message"] == text
        assert (await history(bob.user, bob.room))[-2:] == [event, spoken]
        edit = {"message": text[::-1]}
        assert (await alice.user.patch(path.format(event["seq"]), edit)).ok()["message"] == text[
            ::-1
        ]
        assert (await bob.hears(type="edit"))["message"] == text[::-1]


async def test_a_bad_text_is_refused(chat: Server) -> None:
    """A blank, over-long, NUL-bearing or surrogate text is neither a message nor an edit."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    good = await alice.say("good")
    for text in BAD_TEXTS:
        (await alice.user.post(path, {"message": text})).refused(400, "bad_request")
        (await alice.user.patch(f"{path}/{good['seq']}", {"message": text})).refused(400)
        error = await alice.ask("bad_request", message=text, client_id="c")
        assert error["client_id"] == "c"
        error = await alice.ask("bad_request", type="edit", target=good["seq"], message=text)
        assert error["target"] == good["seq"]
    (await alice.user.post(path, {"text": "x", "client_id": "c"})).refused(400, "bad_request")
    assert await alice.room.story() == ["1 alice makes alice owner", "2 alice: good"]


async def test_a_bad_client_id_is_refused(chat: Server) -> None:
    """A client id is 1 to 64 printable ASCII characters, or nothing is stored."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    for client_id in BAD_CLIENT_IDS:
        body = {"message": "x", "client_id": client_id}
        (await alice.user.post(path, body)).refused(400, "bad_request")
        assert "client_id" not in await alice.ask("bad_request", **body)
    assert len(await alice.room.log()) == 1
    for client_id in ("x" * 64, " ", "~"):
        assert (await alice.say("good", client_id=client_id))["client_id"] == client_id


# --- Sending again


async def test_a_retry_is_answered_with_the_first_event(chat: Server, there: Server) -> None:
    """The same client id and text again is 200 with the first event, on any process."""
    alice = await chat.user("alice")
    room = await alice.room()
    first = await alice.post_in(room, "once", client_id="c1")
    for server in (chat, there, chat):
        again = await alice.at(server).post(
            f"{room.path}/messages", {"message": "once", "client_id": "c1"}
        )
        assert again.ok(200) == first
    assert await room.texts() == ["once"]


async def test_another_text_under_a_client_id_is_a_conflict(chat: Server, there: Server) -> None:
    """A client id in use for another text is 409 or an error that names it, not stored."""
    (alice,) = await chat.talk("alice")
    await alice.say("one", client_id="c1")
    body = {"message": "two", "client_id": "c1"}
    (await alice.user.at(there).post(f"{alice.room.path}/messages", body)).refused(409, "conflict")
    assert (await alice.ask("conflict", **body))["client_id"] == "c1"
    assert await alice.room.texts() == ["one"]


async def test_a_retry_is_known_after_an_edit_and_a_delete(chat: Server, there: Server) -> None:
    """A retry finds its message as it is now, whatever has become of the text since."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    body = {"message": "first", "client_id": "c1"}
    seq = (await alice.say("first", client_id="c1"))["seq"]
    (await alice.user.patch(f"{path}/{seq}", {"message": "second"})).ok()
    for text in ("first", "second", "third"):
        again = (await alice.user.at(there).post(path, body | {"message": text})).ok(200)
        assert (again["seq"], again["message"]) == (seq, "second")
    (await alice.user.delete(f"{path}/{seq}")).ok(204)
    again = (await alice.user.at(there).post(path, body)).ok(200)
    assert (again["seq"], again["deleted"]) == (seq, True)
    assert "message" not in again
    await alice.send(**body)
    assert await alice.hears(type="ack") == {"type": "ack", "client_id": "c1", "seq": seq}


async def test_who_may_send_again(chat: Server) -> None:
    """Who was removed and comes back is known by what they sent; the banned are refused."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    body = {"message": "before", "client_id": "c1"}
    first = await bob.post_in(room, "before", client_id="c1")
    (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
    assert (await bob.post(f"{room.path}/messages", body)).ok(200) == first
    await room.admit(bob, role="banned")
    (await bob.post(f"{room.path}/messages", body)).refused(403, "forbidden")
    assert await room.texts() == ["before"]


async def test_a_client_id_is_ones_own_and_the_rooms(chat: Server) -> None:
    """Somebody else, or the same user elsewhere, may use the same client id."""
    alice, bob = await chat.users("alice", "bob")
    here, elsewhere = await alice.room(bob), await alice.room()
    await alice.post_in(here, "mine", client_id="c1")
    await bob.post_in(here, "his", client_id="c1")
    await alice.post_in(elsewhere, "there", client_id="c1")
    assert await here.texts() == ["mine", "his"]
    assert await elsewhere.texts() == ["there"]


async def test_one_client_id_sent_at_once_from_all_sides_is_one_message(
    chat: Server, there: Server
) -> None:
    """Over HTTP and sockets of two processes at the same time, a client id is one message."""
    (alice,) = await chat.talk("alice")
    other = await alice.user.at(there).enter(alice.room)
    for number in range(5):
        body = {"message": f"text {number}", "client_id": f"c{number}"}
        posts = [
            alice.user.at(server).post(f"{alice.room.path}/messages", body)
            for server in (chat, there, chat, there)
        ]
        answers, *_ = await asyncio.gather(
            asyncio.gather(*posts), alice.send(**body), other.send(**body), alice.send(**body)
        )
        assert {answer.status for answer in answers} <= {200, 201}
        (seq,) = {answer.json["seq"] for answer in answers}
        for socket, acks in ((alice, 1), (other, 0)):
            await socket.reaches(seq)
            while len(socket.heard(type="ack", client_id=f"c{number}")) < acks:
                await socket.hears(type="ack", seq=seq)
    assert await alice.room.texts() == [f"text {number}" for number in range(5)]


async def test_of_different_texts_under_one_client_id_one_is_stored(
    chat: Server, there: Server
) -> None:
    """Of four texts under one client id at the same time, one is stored and three conflict."""
    alice = await chat.user("alice")
    room = await alice.room()
    posts = [
        alice.at(server).post(f"{room.path}/messages", {"message": str(n), "client_id": "c1"})
        for n, server in enumerate((chat, there, chat, there))
    ]
    statuses = [answer.status for answer in await asyncio.gather(*posts)]
    assert sorted(statuses) == [201, 409, 409, 409]
    assert await room.texts() == [str(statuses.index(201))]


async def test_a_retry_beside_an_edit_is_known_or_in_conflict(chat: Server, there: Server) -> None:
    """Sending again while the message is edited never makes a second one."""
    alice = await chat.user("alice")
    room = await alice.room()
    for number in range(5):
        body = {"message": "old", "client_id": f"c{number}"}
        seq = (await alice.post_in(room, "old", client_id=f"c{number}"))["seq"]
        path = f"{room.path}/messages"
        edit = alice.at(there).patch(f"{path}/{seq}", {"message": "new"})
        again, edited = await asyncio.gather(alice.post(path, body), edit)
        edited.ok()
        assert again.ok(200)["seq"] == seq


# --- History


@pytest.mark.parametrize("query", ["", "before=6", "after=3", "after=0", "after=3&before=7"])
@pytest.mark.parametrize("limit", ["", "limit=1", "limit=3", "limit=200", "limit=99999"])
async def test_history_is_paged_by_number(chat: Server, query: str, limit: str) -> None:
    """`before`, `after` and `limit` cut the history as a list of numbers would be cut."""
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(9))
    (await alice.user.patch(f"{alice.room.path}/messages/5", {"message": "edited"})).ok()
    bounds = dict(part.split("=") for part in query.split("&") if part)
    count = int(limit.partition("=")[2] or 50)
    after, before = int(bounds.get("after", 0)), int(bounds.get("before", 99))
    numbers = [seq for seq in range(2, 11) if after < seq < before]
    expected = numbers[:count] if "after" in bounds and "before" not in bounds else numbers[-count:]
    page = await history(alice.user, alice.room, f"{query}&{limit}")
    if len(bounds) == 2:
        assert [event["seq"] for event in page] in (expected, numbers[:count])
    else:
        assert [event["seq"] for event in page] == expected


async def test_a_page_has_fifty_messages_and_at_most_two_hundred(chat: Server) -> None:
    """Without a limit a page is the newest 50; a limit above 200 is clamped to 200."""
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(201))
    for query, count, newest in (("", 50, 202), ("limit=200", 200, 202), ("limit=201", 200, 202)):
        page = await history(alice.user, alice.room, query)
        assert [event["seq"] for event in page] == list(range(newest - count + 1, newest + 1))
    found = (await alice.user.get(f"/search?q=message&room_id={alice.room.room_id}&limit=999")).ok()
    assert len(found) == 200


NO_NUMBERS = [
    "x",
    "-1",
    "1.5",
    "",
    "%D9%A3",
    "1e3",
    "0x1",
    "9" * 5000,
    str(2**53 + 1),
    "%2B1",
    "true",
]


@pytest.mark.parametrize(
    "path",
    [
        "/messages?limit",
        "/messages?before",
        "/messages?after",
    ],
)
async def test_what_is_no_number_is_refused(chat: Server, path: str) -> None:
    """A number in a query is digits in range, or the request is refused."""
    alice = await chat.user("alice")
    room = await alice.room()
    numbers = NO_NUMBERS + (["0"] if path.endswith("limit") else [])
    for number in numbers:
        (await alice.get(f"{room.path}{path}={number}")).refused(400, "bad_request")
    (await alice.get(f"{room.path}{path}=1")).ok()


# --- Edits and deletes


async def test_an_edit_shows_everywhere(chat: Server, there: Server) -> None:
    """An edit answers with the new message, is an event of its own, and says when it was."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    ear = await bob.at(there).enter(room)
    first = await alice.post_in(room, "frist", client_id="c1")
    path = f"{room.path}/messages/{first['seq']}"
    edited = (await alice.at(there).patch(path, {"message": "first"})).ok()
    assert TIME.fullmatch(edited["edited_at"])
    assert edited == first | {"message": "first", "edited_at": edited["edited_at"]}
    event = await ear.hears(type="edit")
    assert (event["target"], event["message"], event["seq"]) == (first["seq"], "first", 4)
    assert await history(bob, room) == [edited]
    assert (await room.story())[2:] == ["3 alice: first", "4 alice edits 3: first"]


@pytest.mark.parametrize(
    ("role", "status"), [("owner", 204), ("moderator", 204), ("member", 403), (None, 403)]
)
async def test_who_may_change_what_others_wrote(
    chat: Server, role: str | None, status: int
) -> None:
    """Nobody edits what others wrote; moderators and owners delete it, and nobody else does."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room()
    if role:
        await room.admit(bob, role=role)
    path = f"{room.path}/messages/{(await alice.post_in(room, 'mine'))['seq']}"
    (await bob.patch(path, {"message": "his"})).refused(403, "forbidden")
    assert (await bob.delete(path)).status == status
    assert await room.texts() == (["mine"] if status == 403 else [])


async def test_a_delete_leaves_a_stone_without_text(chat: Server) -> None:
    """A deleted message keeps its number and its author in the history, and loses its text."""
    alice = await chat.user("alice")
    room = await alice.room()
    event = await alice.post_in(room, "oops", client_id="c1")
    (await alice.delete(f"{room.path}/messages/2")).ok(204)
    del event["message"]
    assert await history(alice, room) == [event | {"deleted": True}]
    assert (await room.story())[1:] == ["2 alice: (deleted)", "3 alice deletes 2"]
    for method in ("PATCH", "DELETE"):
        answer = await alice.ask(method, f"{room.path}/messages/2", {"message": "x"})
        answer.refused(404, "not_found")


@pytest.mark.parametrize("target", ["1", "3", "99", "0", str(2**53)])
async def test_what_is_no_message_is_neither_edited_nor_deleted(chat: Server, target: str) -> None:
    """The number of a member event, of an edit, or of nothing is 404."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "first")
    (await alice.patch(f"{room.path}/messages/2", {"message": "second"})).ok()
    path = f"{room.path}/messages/{target}"
    (await alice.patch(path, {"message": "x"})).refused(404, "not_found")
    (await alice.delete(path)).refused(404, "not_found")
    assert len(await room.log()) == 3


async def test_a_number_counts_in_its_own_room_alone(chat: Server) -> None:
    """The author of a message in one room reaches no message of the same number in another."""
    alice, bob = await chat.users("alice", "bob")
    here, elsewhere = await alice.room(bob), await bob.room(alice)
    await bob.post_in(here, "here")
    await alice.post_in(elsewhere, "elsewhere")
    (await alice.patch(f"{here.path}/messages/3", {"message": "x"})).refused(403)
    (await alice.delete(f"{elsewhere.path}/messages/3")).ok(204)
    assert await here.texts() == ["here"]


@pytest.mark.parametrize("kind", ["private", "public"])
async def test_who_was_shut_out_changes_nothing(chat: Server, kind: str) -> None:
    """Having written a message does not open a room again to who was removed or banned."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob, kind=kind)
    seq = (await bob.post_in(room, "mine"))["seq"]
    if kind == "private":
        (await alice.delete(f"{room.path}/members/{bob.name}")).ok(204)
    else:
        await room.admit(bob, role="banned")
    path = f"{room.path}/messages/{seq}"
    (await bob.patch(path, {"message": "x"})).refused(403, "forbidden")
    (await bob.delete(path)).refused(403, "forbidden")
    assert await room.texts() == ["mine"]


async def test_edits_at_once_leave_the_last_one(chat: Server, there: Server) -> None:
    """Of edits at the same time on two processes each is an event, and the last one stands."""
    alice = await chat.user("alice")
    room = await alice.room()
    await alice.post_in(room, "first")
    work = [
        alice.at(server).patch(f"{room.path}/messages/2", {"message": f"edit {number}"})
        for number, server in enumerate((chat, there) * 3)
    ]
    answers = [answer.ok() for answer in await asyncio.gather(*work)]
    assert len({answer["message"] for answer in answers}) == 6
    log = await room.log()
    assert [event["type"] for event in log[2:]] == ["edit"] * 6
    assert {event["message"] for event in log[1:]} == {log[1]["message"]}


# --- Read marks


async def unread(user: User, room: Room) -> tuple[int, int]:
    """Return the user's read mark in a room, and how many messages are unread."""
    shown = (await user.get(room.path)).ok()
    return shown["read_seq"], shown["unread"]


async def test_unread_are_living_messages_above_the_mark(chat: Server, there: Server) -> None:
    """Neither edits, deletes, joins nor the deleted count as unread; posting moves the mark."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room(bob)
    assert await unread(bob, room) == (2, 0)
    for text in ("one", "two", "three"):
        await alice.post_in(room, text)
    assert await unread(alice, room) == (5, 0)
    assert await unread(bob.at(there), room) == (2, 3)
    (await alice.patch(f"{room.path}/messages/3", {"message": "uno"})).ok()
    await room.admit(carol)
    assert await unread(bob, room) == (2, 3)
    (await alice.delete(f"{room.path}/messages/4")).ok(204)
    assert await unread(bob, room) == (2, 2)
    (await bob.put(f"{room.path}/read", {"seq": 3})).ok(204)
    assert await unread(bob.at(there), room) == (3, 1)
    await bob.post_in(room, "mine")
    assert await unread(bob, room) == (9, 0)


async def test_the_mark_never_moves_back_nor_beyond_the_head(chat: Server) -> None:
    """A lower mark changes nothing, and one beyond the head is the head."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    for number in range(5):
        await alice.post_in(room, f"message {number}")
    for seq, mark, count in ((4, 4, 3), (3, 4, 3), (0, 4, 3), (6, 6, 1), (2**53, 7, 0)):
        (await bob.put(f"{room.path}/read", {"seq": seq})).ok(204)
        assert await unread(bob, room) == (mark, count)
    await alice.post_in(room, "one more")
    assert await unread(bob, room) == (7, 1)


async def test_marks_moved_at_once_end_at_the_highest(chat: Server, there: Server) -> None:
    """However marks of several devices arrive, the highest stands."""
    alice, bob = await chat.talk("alice", "bob")
    await alice.say_all(f"message {number}" for number in range(12))
    path = f"{bob.room.path}/read"
    work = [
        bob.user.at(server).put(path, {"seq": seq})
        for seq, server in zip((9, 4, 12, 3, 7, 8), (chat, there) * 3, strict=True)
    ]
    for answer in await asyncio.gather(*work):
        answer.ok(204)
    assert await unread(bob.user, bob.room) == (12, 2)


async def test_a_bad_read_mark_is_refused(chat: Server) -> None:
    """A read mark is a whole number, of a member."""
    (alice,) = await chat.talk("alice")
    bad: list[Any] = ["x", 1.5, -1, True, None, [], {}, 2**53 + 1, 10**400]
    for seq in bad:
        (await alice.user.put(f"{alice.room.path}/read", {"seq": seq})).refused(400, "bad_request")
        await alice.ask("bad_request", type="read", seq=seq)
    (await alice.user.put(f"{alice.room.path}/read", {})).refused(400, "bad_request")
    bob = await chat.user("bob")
    (await bob.put(f"{alice.room.path}/read", {"seq": 1})).refused(403, "forbidden")
    assert (await bob.get(alice.room.path)).ok()["read_seq"] == 0


async def test_unread_is_counted_up_to_a_hundred(chat: Server) -> None:
    """99 unread messages are 99, and 101 are a hundred."""
    (alice,) = await chat.talk("alice")
    bob = await chat.user("bob")
    await alice.room.admit(bob)
    await alice.say_all(f"message {number}" for number in range(99))
    assert (await unread(bob, alice.room))[1] == 99
    await alice.say_all(["100", "101"])
    assert (await unread(bob, alice.room))[1] == 100


# --- Search


async def found(user: User, q: str, **query: object) -> list[str]:
    """Return the texts that a search finds, in its order."""
    more = "".join(f"&{name}={value}" for name, value in query.items())
    messages = (await user.get(f"/search?q={quote(q)}{more}")).ok()
    assert all(message["type"] == "message" for message in messages)
    return [message["message"] for message in messages]


# What one looks for, and the number of the text that has it.
FINDS = [
    *(("ASSENB", 0), ("strasse", 0), ("STRASSE", 0), ("привет МИР", 1), ("吃了", 2), ("苹", 2)),
    *(("テキス", 3), ("ﾃｷｽ", 3), ("ÜNÏCÖDÉ", 4), ("u\u0308ni\u0308", 4), ("100% s", 5), ("E_T", 5)),
    *((":\\d", 5), ("'QUOTED'", 6), ('"t', 6), ("office", 7), ("ﬀi", 7), ("wide", 8), ("！", 9)),
    *(("!", 9), ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", 10)),
]


async def test_search_finds_parts_of_words_however_they_are_written(chat: Server) -> None:
    """A search is for a substring, no matter the case or how a letter is composed."""
    alice = await chat.user("alice")
    room = await alice.room()
    texts = [
        *("Straßenbahn", "ПРИВЕТ мир", "我今天吃了苹果", "日本語のテキスト", "Ünïcödé"),
        *("100% sure_thing c:\\dir", "'quoted' \"twice\"", "o\ufb03ce", "ＷＩＤＥ", "oh!"),
        "Cafe\N{COMBINING ACUTE ACCENT}",
    ]
    for text in texts:
        await alice.post_in(room, text)
    for q, number in FINDS:
        assert await found(alice, q, room_id=room.room_id) == [texts[number]], q
    for q in ("assen%", "100_", "sure thing", "привет  мир", "*", "吃*", "cafes", "!%"):
        assert await found(alice, q, room_id=room.room_id) == [], q
    assert await found(alice, "%", room_id=room.room_id) == [texts[5]]
    assert await found(alice, "_", room_id=room.room_id) == [texts[5]]


async def test_search_shows_only_rooms_one_may_read(chat: Server, there: Server) -> None:
    """Search finds what is in public rooms and one's own, newest first, nothing of the closed."""
    alice, bob = await chat.users("alice", "bob")
    word = unique("word")
    public, private, shared = (
        await alice.room(),
        await alice.room(kind="private"),
        await alice.room(bob, kind="private"),
    )
    for number, room in enumerate((public, private, shared)):
        await alice.post_in(room, f"{word} {number}")
        await asyncio.sleep(0.002)  # order across rooms is by time, to the millisecond
    assert await found(alice, word) == [f"{word} {number}" for number in (2, 1, 0)]
    assert await found(alice, word, limit=2) == [f"{word} {number}" for number in (2, 1)]
    assert await found(bob.at(there), word) == [f"{word} {number}" for number in (2, 0)]
    (await bob.get(f"/search?q={word}&room_id={private.room_id}")).refused(403, "forbidden")
    assert await found(bob, word, room_id=public.room_id) == [f"{word} 0"]
    await public.admit(bob, role="banned")
    assert await found(bob.at(there), word) == [f"{word} 2"]


async def test_search_knows_the_present_text_only(chat: Server) -> None:
    """What was edited is found by its new text, what was deleted not at all."""
    alice = await chat.user("alice")
    room = await alice.room()
    old, new = unique("old"), unique("new")
    await alice.post_in(room, old)
    (await alice.patch(f"{room.path}/messages/2", {"message": new})).ok()
    assert (await found(alice, old), await found(alice, new)) == ([], [new])
    (await alice.delete(f"{room.path}/messages/2")).ok(204)
    assert (await found(alice, old), await found(alice, new)) == ([], [])


async def test_a_bad_search_is_refused(chat: Server) -> None:
    """A search is for 1 to 200 characters that show."""
    alice = await chat.user("alice")
    bad = [
        *("", "q=", "q=%20", "q=%00", "q=a%00b", "q=" + "x" * 201, "room_id=1"),
        *("q=x&limit=x", "q=x&limit=0", "q=x&limit=-1", "q=%E2%80%8B"),
    ]
    for query in bad:
        (await alice.get(f"/search?{query}")).refused(400, "bad_request")
    assert await found(alice, "x" * 200) == []
