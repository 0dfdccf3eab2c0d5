"""Messages: how they look, what is none, history, edits and deletes, read marks, search."""

import asyncio
from typing import Any
from urllib.parse import quote

from tests.helpers import Room, Server, User
from tests.test_rooms import make
from tests.words import unique


async def test_a_message_is_the_same_for_all(chat: Server, there: Server) -> None:
    """Posted, sent or edited, it is told to all alike, and each of its characters is kept."""
    alice, bob = await chat.talk("alice", "bob")
    carol = await (await there.user("carol")).enter(alice.room)
    path = f"{alice.room.path}/messages"
    for text in (
        *("x", "😀" * 4000, "  blanks\n\nand\tlines \r\n", "שלום 👩‍👩‍👧 \u202eRTL\u202c e\u0301"),
        *("\u0085\u2028\ufeff|\uffff\U0010ffff", "\x1b[31m\x7f\x01"),
        *("<script>alert(1)</script> & 'n' \\ %s $1 {0}", '","username":"mallory","message":"'),
    ):
        posted = await alice.user.post_in(alice.room, text, client_id=unique("~ !"), ignored=[1])
        sent = await bob.say(text)
        edit = {"message": text[::-1]}
        edited = (await alice.user.patch(f"{path}/{posted['seq']}", edit)).ok()
        assert edited == posted | edit | {"edited_at": edited["edited_at"]}
        for socket in (alice, carol):
            assert await socket.hears(text) == posted
            assert await socket.hears(text) == sent
            assert (await socket.hears(type="edit"))["message"] == text[::-1]
        assert (await carol.user.get(f"{path}?limit=2")).ok() == [edited, sent]


async def test_bad_texts_and_client_ids_are_refused(chat: Server) -> None:
    """What is blank, too long, has a NUL or a surrogate, or is no text is stored nowhere."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    await alice.say("good", client_id="x" * 64)
    text: Any
    for text in (
        *("", "\n\t ", "\u2003\u3000", "\u200b\u200d\ufeff", "\u202e\x01", "x" * 4001),
        *("a\0b", "\ud800", "a\udfff", 5, True, None, [], {}),
    ):
        (await alice.user.post(path, {"message": text})).refused(400, "bad_request")
        (await alice.user.patch(f"{path}/2", {"message": text})).refused(400, "bad_request")
        assert (await alice.ask("bad_request", message=text, client_id="c"))["client_id"] == "c"
        assert (await alice.ask("bad_request", type="edit", target=2, message=text))["target"] == 2
    for bad in ("", "x" * 65, "é", "a\n", "\x7f", "a\0", "\ud800", 5, True, ["a"]):
        body = {"message": "x", "client_id": bad}
        (await alice.user.post(path, body)).refused(400, "bad_request")
        assert "client_id" not in await alice.ask("bad_request", **body)
    assert await alice.room.story() == ["1 alice makes alice owner", "2 alice: good"]


async def test_history_is_paged_by_number(chat: Server) -> None:
    """`before`, `after` and `limit`, 50 by default and 200 at most, cut the row of messages."""
    (alice,) = await chat.talk("alice")
    path = f"{alice.room.path}/messages"
    await alice.say_all(f"message {number}" for number in range(201))
    (await alice.user.patch(f"{path}/5", {"message": "edited"})).ok()
    for query, first, last in (
        *(("", 153, 202), ("limit=9999", 3, 202), ("before=6", 2, 5), ("before=6&limit=3", 3, 5)),
        *(("after=0", 2, 51), ("after=3&before=7", 4, 6), ("after=202", 203, 202)),
    ):
        page = (await alice.user.get(f"{path}?{query}")).ok()
        assert [event["seq"] for event in page] == list(range(first, last + 1)), query
    found = await alice.user.get(f"/search?q=message&room_id={alice.room.room_id}&limit=999")
    assert len(found.ok()) == 200
    for bad in ("x", "-1", "1.5", "", "%D9%A3", "1e3", "9" * 5000, str(2**53 + 1), "%2B1"):
        for query in ("limit=0", f"limit={bad}", f"before={bad}", f"after={bad}"):
            (await alice.user.get(f"{path}?{query}")).refused(400, "bad_request")


async def test_who_may_change_a_message(chat: Server, there: Server) -> None:
    """Who is in edits one's own, moderators and owners delete others'; all edits at once count."""
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
    work = [alice.at(one).patch(f"{path}/3", {"message": "x"}) for one in (chat, there) * 3]
    assert [answer.status for answer in await asyncio.gather(*work)] == [200] * 6
    assert len(await room.log(5)) == 6
    (await alice.delete(f"{path}/3")).ok(204)
    for target in (0, 1, 3, 6, 99, 2**53):  # nothing, a member, what is deleted, an edit
        (await alice.patch(f"{path}/{target}", {"message": "x"})).refused(404, "not_found")
        (await alice.delete(f"{path}/{target}")).refused(404, "not_found")


async def unread(user: User, room: Room) -> tuple[int, int]:
    """Return the user's read mark in a room, and how many messages are unread."""
    shown = (await user.get(room.path)).ok()
    return shown["read_seq"], shown["unread"]


async def test_unread_is_what_lives_above_the_mark(chat: Server, there: Server) -> None:
    """The highest mark stands, by frame, REST or a post; edits, joins and deletes do not count."""
    alice, bob = await chat.talk("alice", "bob")
    user, room, path = bob.user.at(there), bob.room, f"{bob.room.path}/read"
    await alice.say_all(["3", "4", "5", "6", "7"])
    assert await unread(alice.user, room) == (7, 0)
    for seq, mark, count in ((0, 2, 5), (4, 4, 3), (3, 4, 3), (6, 6, 1), (2**53, 7, 0)):
        (await user.put(path, {"seq": seq})).ok(204)
        assert await unread(user, room) == (mark, count)
    await alice.say_all(["8", "9", "10", "11"])
    await bob.send(type="read", seq=8)
    for bad in ("x", 1.5, -1, True, None, 2**53 + 1, 10**400):
        await bob.ask("bad_request", type="read", seq=bad)
        (await user.put(path, {"seq": bad})).refused(400, "bad_request")
    assert await unread(user, room) == (8, 3)
    await asyncio.gather(*(user.put(path, {"seq": seq}) for seq in (9, 10, 8)))
    assert await unread(user, room) == (10, 1)
    carol = await chat.user("carol")
    (await carol.put(path, {"seq": 1})).refused(403, "forbidden")
    assert await unread(carol, room) == (0, 0)
    await room.admit(carol)
    await alice.send(type="edit", target=9, message="9!")
    await alice.send(type="delete", target=11)
    await alice.reaches(14)
    assert await unread(user, room) == (10, 0)
    await bob.say("15")
    for more, count in ((99, 99), (2, 100)):
        await alice.say_all(f"message {number}" for number in range(more))
        assert await unread(user, room) == (15, count)


async def found(user: User, q: str, **query: object) -> list[str]:
    """Return the texts that a search finds, in its order."""
    more = "".join(f"&{name}={value}" for name, value in query.items())
    return [message["message"] for message in (await user.get(f"/search?q={quote(q)}{more}")).ok()]


async def test_search_finds_parts_of_words_however_they_are_written(chat: Server) -> None:
    """A search is for 1 to 200 characters, no matter the case or how a letter is composed."""
    alice = await chat.user("alice")
    room = await alice.room()
    finds = {  # texts, and what finds each of them alone
        "Straßenbahn": ("ASSENB", "strasse", "STRASSE"),
        "ПРИВЕТ мир": ("привет МИР",),
        "テキスト吃了苹果": ("テキス", "ﾃｷｽ", "吃了", "苹"),
        "100% 'sure_thing' c:\\dir": ("100% '", "E_T", ":\\d", "%", "_"),
        "o\ufb03ce Cafe\N{COMBINING ACUTE ACCENT}": ("office c", "ﬀi", "café"),
        "ＷＩＤＥ!": ("wide", "！", "!"),
    }
    for text in finds:
        await alice.post_in(room, text)
    for text, finders in finds.items():
        for q in finders:
            assert await found(alice, q, room_id=room.room_id) == [text], q
    for q in ("assen%", "100_", "sure thing", "привет  мир", "*", "cafes", "!%", "x" * 200):
        assert await found(alice, q, room_id=room.room_id) == [], q
    for query in ("", "q=", "q=%20", "q=%E2%80%8B", "q=a%00b", "q=" + "x" * 201, "room_id=1"):
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
