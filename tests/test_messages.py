"""Messages: how they look, what is none, history, edits and deletes, read marks, search.

That they are sent again, replayed and erased as promised is in test_promises.py.
"""

import asyncio
import re
from typing import Any
from urllib.parse import quote

from tests.helpers import Room, Server, User
from tests.test_rooms import make
from tests.words import Event, unique

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
GOOD_TEXTS = [
    *("x", "😀" * 4000, "  blanks\n\nand\tlines \r\n", "שלום 👩‍👩‍👧 \u202eRTL\u202c e\u0301"),
    *("\u0085\u2028\ufeff|\uffff\U0010ffff", "\x1b[31m\x7f\x01"),
    "<script>alert(1)</script> & \"quotes\" 'n' \\ %s $1 {0}",
    '","username":"mallory","message":"',
]
BAD_TEXTS: list[Any] = [
    *("", "\n\t ", "\u2003\u3000", "\u200b\u200d\ufeff", "\u202e\x01", "x" * 4001),
    *("a\0b", "\ud800", "a\udfff", 5, True, None, [], {}),
]
BAD_CLIENT_IDS: list[Any] = ["", "x" * 65, "é", "a\n", "\x7f", "a\0", "\ud800", 5, True, [], {}]
NO_NUMBERS = ["x", "-1", "1.5", "", "%D9%A3", "1e3", "0x1", "9" * 5000, str(2**53 + 1), "%2B1"]


async def history(user: User, room: Room, query: str = "") -> list[Event]:
    """Return a page of a room's history."""
    page: list[Event] = (await user.get(f"{room.path}/messages?{query}")).ok()
    return page


async def test_a_message_is_the_same_for_all(chat: Server, there: Server) -> None:
    """Posted, sent or edited, it is told to all alike, and each of its characters is kept."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    path = f"{alice.room.path}/messages"
    for number, text in enumerate(GOOD_TEXTS):
        posted = await alice.user.post_in(alice.room, text, client_id=f"c {number}~!", ignored=[1])
        sent = await bob.say(text)
        edit = {"message": text[::-1]}
        edited = (await alice.user.patch(f"{path}/{posted['seq']}", edit)).ok()
        assert edited == posted | edit | {"edited_at": edited["edited_at"]}
        for socket in (alice, carol):
            assert await socket.hears(text) == posted
            assert await socket.hears(text) == sent
            assert (await socket.hears(type="edit"))["message"] == text[::-1]
        assert (await history(carol.user, carol.room))[-2:] == [edited, sent]


async def test_bad_texts_and_client_ids_are_refused(chat: Server) -> None:
    """What is blank, too long, has a NUL or a surrogate, or is no text is stored nowhere."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    await alice.say("good", client_id="x" * 64)
    for text in BAD_TEXTS:
        (await alice.user.post(path, {"message": text})).refused(400, "bad_request")
        (await alice.user.patch(f"{path}/2", {"message": text})).refused(400, "bad_request")
        assert (await alice.ask("bad_request", message=text, client_id="c"))["client_id"] == "c"
        assert (await alice.ask("bad_request", type="edit", target=2, message=text))["target"] == 2
    for client_id in BAD_CLIENT_IDS:
        body = {"message": "x", "client_id": client_id}
        (await alice.user.post(path, body)).refused(400, "bad_request")
        assert "client_id" not in await alice.ask("bad_request", **body)
    assert await alice.room.story() == ["1 alice makes alice owner", "2 alice: good"]


PAGES = [
    *(("", 153, 202), ("limit=200", 3, 202), ("limit=9999", 3, 202), ("before=6", 2, 5)),
    *(("before=6&limit=3", 3, 5), ("after=3&limit=3", 4, 6), ("after=0", 2, 51)),
    *(("after=3&before=7", 4, 6), ("after=202", 203, 202)),
]


async def test_history_is_paged_by_number(chat: Server) -> None:
    """`before`, `after` and `limit`, 50 by default and 200 at most, cut the row of messages."""
    (alice,) = await chat.talk("alice")
    await alice.say_all(f"message {number}" for number in range(201))
    (await alice.user.patch(f"{alice.room.path}/messages/5", {"message": "edited"})).ok()
    for query, first, last in PAGES:
        page = await history(alice.user, alice.room, query)
        assert [event["seq"] for event in page] == list(range(first, last + 1)), query
    found = await alice.user.get(f"/search?q=message&room_id={alice.room.room_id}&limit=999")
    assert len(found.ok()) == 200
    queries = [f"{name}={text}" for name in ("limit", "before", "after") for text in NO_NUMBERS]
    for query in ["limit=0", *queries]:
        (await alice.user.get(f"{alice.room.path}/messages?{query}")).refused(400, "bad_request")


async def test_an_edit_and_a_delete_show_everywhere(chat: Server, there: Server) -> None:
    """An edited message says when; a deleted one keeps its number and cannot be changed again."""
    alice, bob = await chat.users("alice", "bob")
    room = await alice.room(bob)
    ear = await bob.at(there).enter(room)
    await alice.post_in(room, "frist")
    path = f"{room.path}/messages/"
    edited = (await alice.at(there).patch(f"{path}3", {"message": "first"})).ok()
    assert TIME.fullmatch(edited["created_at"]) and TIME.fullmatch(edited["edited_at"])
    (await alice.delete(f"{path}3")).ok(204)
    del edited["message"]
    assert await history(bob, room) == [edited | {"deleted": True}]
    await ear.reaches(5)
    assert ear.story == ["3 alice: frist", "4 alice edits 3: first", "5 alice deletes 3"]
    for target in (0, 1, 3, 4, 99, 2**53):  # nothing, a member, what is deleted, an edit
        (await alice.patch(f"{path}{target}", {"message": "x"})).refused(404, "not_found")
        (await alice.delete(f"{path}{target}")).refused(404, "not_found")


async def test_edits_at_once_are_all_events(chat: Server, there: Server) -> None:
    """Of edits at the same time on two processes each is done, under a number of its own."""
    (alice,) = await chat.talk("alice")
    await alice.say("first")
    path = f"{alice.room.path}/messages/2"
    work = [alice.user.at(server).patch(path, {"message": "x"}) for server in (chat, there) * 3]
    assert [answer.status for answer in await asyncio.gather(*work)] == [200] * 6
    await alice.reaches(8)


async def test_who_may_change_a_message(chat: Server) -> None:
    """Who is in edits one's own, moderators and owners delete others', and nobody edits those."""
    alice, bob = await chat.users("alice", "bob")
    for role, own, others in (
        *(("owner", 200, 204), ("moderator", 200, 204), ("member", 200, 403)),
        *(("banned", 403, 403), ("out", 403, 403)),
    ):
        room = await alice.room(bob, kind="private")
        path = f"{room.path}/messages"
        await alice.post_in(room, "hers")
        await bob.post_in(room, "his")
        await make(alice, room, bob, role)
        (await bob.patch(f"{path}/3", {"message": "mine"})).refused(403, "forbidden")
        assert (await bob.delete(f"{path}/3")).status == others
        assert (await bob.patch(f"{path}/4", {"message": "mine"})).status == own
        left = ["hers"] * (others == 403) + ["mine" if own == 200 else "his"]
        assert await room.texts() == left


async def unread(user: User, room: Room) -> tuple[int, int]:
    """Return the user's read mark in a room, and how many messages are unread."""
    shown = (await user.get(room.path)).ok()
    return shown["read_seq"], shown["unread"]


async def test_unread_are_living_messages_above_the_mark(chat: Server, there: Server) -> None:
    """Neither edits, joins nor the deleted count; posting moves the mark; up to 100 are counted."""
    alice, bob, carol = await chat.users("alice", "bob", "carol")
    room = await alice.room(bob)
    for text in ("one", "two", "three"):
        await alice.post_in(room, text)
    assert await unread(alice, room) == (5, 0)
    assert await unread(bob.at(there), room) == (2, 3)
    (await alice.patch(f"{room.path}/messages/3", {"message": "uno"})).ok()
    await room.admit(carol)
    (await alice.delete(f"{room.path}/messages/4")).ok(204)
    assert await unread(bob, room) == (2, 2)
    await bob.post_in(room, "mine")
    assert await unread(bob, room) == (9, 0)
    talker = await alice.enter(room)
    await talker.say_all(f"message {number}" for number in range(99))
    assert await unread(bob, room) == (9, 99)
    await talker.say_all(["100", "101"])
    assert await unread(bob, room) == (9, 100)


async def test_a_mark_never_moves_back_nor_beyond_the_head(chat: Server, there: Server) -> None:
    """Of marks by frame and by REST, on any process, the highest stands, and none is told."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await chat.user("carol")
    path = f"{bob.room.path}/read"
    await alice.say_all(f"message {number}" for number in range(5))
    for seq, mark, count in ((4, 4, 3), (3, 4, 3), (0, 4, 3), (6, 6, 1), (2**53, 7, 0)):
        (await bob.user.at(there).put(path, {"seq": seq})).ok(204)
        assert await unread(bob.user, bob.room) == (mark, count)
    await alice.say_all(["6", "7", "8", "9"])
    await bob.send(type="read", seq=8)
    await asyncio.gather(*(bob.user.at(there).put(path, {"seq": seq}) for seq in (9, 10, 8)))
    assert await unread(bob.user, bob.room) == (10, 1)
    await bob.say("read")
    await alice.hears("read")
    assert not alice.heard(type="read") and not bob.heard(type="read")
    bad: Any
    for bad in ("x", 1.5, -1, True, None, [], 2**53 + 1, 10**400):
        (await bob.user.put(path, {"seq": bad})).refused(400, "bad_request")
    (await carol.put(path, {"seq": 1})).refused(403, "forbidden")
    assert await unread(carol, alice.room) == (0, 0)


async def found(user: User, q: str, **query: object) -> list[str]:
    """Return the texts that a search finds, in its order."""
    more = "".join(f"&{name}={value}" for name, value in query.items())
    return [message["message"] for message in (await user.get(f"/search?q={quote(q)}{more}")).ok()]


# Texts, and what finds each of them alone.
FINDS = {
    "Straßenbahn": ("ASSENB", "strasse", "STRASSE"),
    "ПРИВЕТ мир": ("привет МИР",),
    "我今天吃了苹果": ("吃了", "苹"),
    "テキスト": ("テキス", "ﾃｷｽ"),
    "Ünïcödé": ("ÜNÏCÖDÉ", "u\u0308ni\u0308"),
    "100% sure_thing c:\\dir": ("100% s", "E_T", ":\\d", "%", "_"),
    "'quoted' \"twice\"": ("'QUOTED'", '"t'),
    "o\ufb03ce": ("office", "ﬀi"),
    "ＷＩＤＥ!": ("wide", "！", "!"),
    "Cafe\N{COMBINING ACUTE ACCENT}": ("caf\N{LATIN SMALL LETTER E WITH ACUTE}",),
}
NO_SEARCHES = ["", "q=", "q=%20", "q=%E2%80%8B", "q=a%00b", "q=" + "x" * 201, "room_id=1"]


async def test_search_finds_parts_of_words_however_they_are_written(chat: Server) -> None:
    """A search is for 1 to 200 characters, no matter the case or how a letter is composed."""
    alice = await chat.user("alice")
    room = await alice.room()
    for text in FINDS:
        await alice.post_in(room, text)
    for text, finders in FINDS.items():
        for q in finders:
            assert await found(alice, q, room_id=room.room_id) == [text], q
    for q in ("assen%", "100_", "sure thing", "привет  мир", "*", "cafes", "!%", "x" * 200):
        assert await found(alice, q, room_id=room.room_id) == [], q
    for query in NO_SEARCHES:
        (await alice.get(f"/search?{query}")).refused(400, "bad_request")


async def test_search_shows_only_rooms_one_may_read(chat: Server, there: Server) -> None:
    """Search finds what is in public rooms and one's own, newest first, nothing of the closed."""
    alice, bob = await chat.users("alice", "bob")
    word = unique("word")
    rooms = [await alice.room(), await alice.room(kind="private")]
    rooms.append(await alice.room(bob, kind="private"))
    for number, room in enumerate(rooms):
        await alice.post_in(room, f"{word} {number}")
        await asyncio.sleep(0.002)  # order across rooms is by time, to the millisecond
    assert await found(alice, word, limit=2) == [f"{word} 2", f"{word} 1"]
    assert await found(bob.at(there), word) == [f"{word} 2", f"{word} 0"]
    assert await found(bob, word, room_id=rooms[0].room_id) == [f"{word} 0"]
    await rooms[0].admit(bob, role="banned")
    assert await found(bob.at(there), word) == [f"{word} 2"]
