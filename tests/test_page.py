"""The chat page as people meet it, in a real Chromium: in the sun, in the rain, in two tabs."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jwt
import pytest
from aiohttp import web

from chatserver import create_app
from tests.browser import Browser, Tab, browsing
from tests.commands import tool
from tests.conftest import config
from tests.people import At, User, enrol
from tests.processes import serving
from tests.rain import Rain
from tests.words import KEY, PASSWORD, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("constants")]
COMPLAINTS = "net::ERR_|WebSocket|status of 4"  # of the browser itself, on what was in vain
STORE = "chat / "  # begins the names of what the page keeps


class House(NamedTuple):
    """A server in the weather, the browser of its guests, and what they do by other means."""

    rain: Rain
    browser: Browser
    session: aiohttp.ClientSession

    async def enrol(self, *names: str) -> list[User]:
        """Return people with fresh accounts, who talk to the server in the sun."""
        return await enrol(self.session, At(self.rain.target.geturl()), *names)

    async def enter(self, user: User, room: str = "1", life: int = 3_600_000, **window: Any) -> Tab:
        """Open the page in a window of its own, logged in, and wait until its room is live."""
        tab = await self.browser.tab(self.rain.url, **window)
        kept = json.dumps({"token": user.token, "born": time.time() * 1000, "life": life})
        await tab.js(f"sessionStorage.setItem('{STORE}user', '{user.name}')")
        await tab.js(f"localStorage.setItem('{STORE}{user.name} session', '{kept}')")
        await tab.js(f"history.replaceState(null, '', '#{room}')")
        await tab.reload()
        await online(tab)
        return tab

    async def alone(self, **room: Any) -> tuple[User, str, Tab]:
        """Return somebody, a room of hers, and the page in it."""
        (alice,) = await self.enrol("alice")
        name = await alice.room(**room)
        return alice, name, await self.enter(alice, name)


@pytest.fixture
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """Run a server, maybe with settings or under a prefix of a larger one, and come to it."""
    settings = dict(getattr(request, "param", {}))
    prefix = settings.pop("prefix", "")
    app = create_app(config(f"sqlite:///{tmp_path}/chat.db", **settings))
    if prefix:
        (larger := web.Application()).add_subapp(prefix, app)
        app = larger
    async with (
        aiohttp.ClientSession() as session,
        serving(app) as url,
        Rain(url + prefix) as rain,
        browsing(tool("chromium", "chromium-browser"), COMPLAINTS) as browser,
    ):
        house = House(rain, browser, session)
        await house.enrol("owner")  # of the Lobby, as the first one
        yield house


# --- What people see and do

COMPOSER = "$('#text').value"
STATE = "$('#status').dataset.state"
FOCUS = "document.activeElement.id || document.activeElement.className"


async def online(tab: Tab) -> None:
    """Wait until the room is open and live, its history shown."""
    await tab.wait(f"['online', 'resumed'].includes({STATE})")
    await tab.wait("$('.message, #empty:not([hidden])')")


async def say(tab: Tab, *texts: str) -> None:
    """Type messages and send each with Enter."""
    await tab.js("$('#text').focus()")
    for text in texts:
        await tab.type(text, "Enter")


async def shows(tab: Tab, *texts: str) -> None:
    """Wait until the log says just this, and none of it waits."""
    await tab.reads("#log .text", *texts)
    await tab.wait("!$('.waiting')")


async def press(tab: Tab, part: str, *buttons: str) -> None:
    """Press buttons in a part of the page, one after another, by what they say."""
    for words in buttons:
        fits = f"el.textContent.trim() === '{words}' && el.checkVisibility()"
        button = f"$$(`{part} button`).find((el) => {fits})"
        await tab.wait(f"((el) => el && (el.click(), true))({button})")


async def choose(tab: Tab, selector: str, value: str) -> None:
    """Choose from a list."""
    await tab.js(f"((el) => {{ el.value = '{value}'; el.onchange(); }})($(`{selector}`))")


async def create(tab: Tab, kind: str, name: str) -> str:
    """Make a room with the dialog, and return its id."""
    before = await tab.js("location.hash")
    await tab.click("#add")
    await choose(tab, "#kind", kind)
    await tab.fill("#name", name, "Enter")
    await tab.wait(f"location.hash !== '{before}'")
    await online(tab)
    return str(await tab.js("location.hash.slice(1)"))


async def has_said(user: User, room: str, *texts: str) -> None:
    """Wait until just these messages are in the room's log, in this order."""
    found, deadline = None, time.monotonic() + 20
    while found != list(texts):
        assert time.monotonic() < deadline, f"{found} instead of {texts}"
        await asyncio.sleep(0.02)
        history = await user.ask("GET", f"/rooms/{room}/messages?limit=200")
        found = [event["message"] for event in history]


# --- In the sun


@pytest.mark.parametrize("house", [{}, {"prefix": "/team/chat"}], indirect=True)
async def test_two_people_register_log_in_and_chat(house: House) -> None:
    """In two tabs of one browser they write, see each other, and change what is theirs alone."""
    a = await house.browser.tab(house.rain.url)
    b = await house.browser.tab(house.rain.url, beside=a)
    for tab, name in ((a, "alice"), (b, "bob")):
        await tab.click("#other-way")
        await tab.fill("#username", name.upper())
        await tab.fill("#email", f"{name}@example.org")
        await tab.fill("#password", PASSWORD, "Enter")
        await online(tab)
    room = await create(a, "public", "Walks")
    await b.js(f"location.hash = '{room}'")
    await b.reads("#title", "Walks")
    await say(a, "Helo Bob", "A mistake")
    await b.reads("#log .text", "Helo Bob", "A mistake")
    await b.fill("#text", "Hello")
    await a.reads("#whispers", "bob is typing…")
    await b.type(" Alice", "Enter")
    await a.reads("#log .author", "alice", "alice", "bob")
    await a.reads(".mine .text", "Helo Bob", "A mistake")
    first, second = ".message:nth-child(1)", ".message:nth-child(2)"
    await a.hover(first)
    await a.click(f"{first} .edit")
    await a.fill("#text", "Hello Bob", "Enter")
    await a.hover(second)
    await a.click(f"{second} .delete")
    await a.click(f"{second} .sure")
    await b.wait(f"$('{first}').matches('.edited') && $('{second}').matches('.deleted')")
    await b.hover(first)
    visible = "(el) => el.checkVisibility({ visibilityProperty: true })"
    assert await b.js(f"$$('{first} button').filter({visible})") == []
    for tab, name in ((a, "alice"), (b, "bob")):
        await shows(tab, "Hello Bob", "Message deleted", "Hello Alice")
        await tab.reload()
        await shows(tab, "Hello Bob", "Message deleted", "Hello Alice")
        await tab.reads("#me", name)
        await tab.reads("#online", "2 online: alice, bob")


async def test_what_is_unread_is_counted_until_it_is_read_in_any_tab(house: House) -> None:
    """Rooms that others made turn up; tabs agree on what is read, and on the end."""
    alice, bob = await house.enrol("alice", "bob")
    a, one = await house.enter(alice), await house.enter(bob)
    two = await house.enter(bob, beside=one)
    private = await create(a, "private", "Surprise")
    await alice.ask("PUT", f"/rooms/{private}/members/{bob.name}", {})
    await say(a, "Only for you")
    direct = await create(a, "direct", bob.name)
    await say(a, "psst")
    for tab in (one, two):
        await tab.reads(f"[data-room='{private}'].private .badge", "1")
        await tab.reads(f"[data-room='{direct}'].direct .badge", "1")
        await tab.equals("document.title", "(2) Lobby · Chat")
    await one.click(f"[data-room='{private}'] a")
    await shows(one, "Only for you")
    await two.equals("document.title", "(1) Lobby · Chat", 5)
    await one.click(f"[data-room='{direct}'] a")
    await one.equals("document.title", f"{alice.name} · Chat")
    other = await house.enter(bob)  # on another machine
    await other.equals("document.title", "Lobby · Chat")
    await one.click("#account-button")
    await one.click("#logout")
    for tab in (one, two):
        await tab.wait("$('#door').checkVisibility()")
        for words in ("Only for you", "Surprise", "psst"):  # hidden is not enough
            await tab.equals(f"document.body.textContent.includes('{words}')", False)  # noqa: FBT003
    await a.reads("#online", f"1 online: {alice.name}")


async def test_history_comes_when_one_scrolls_up(house: House) -> None:
    """Scrolling up reads the whole history, in order, and what was looked at keeps its place."""
    (alice,) = await house.enrol("alice")
    room = await alice.room()
    for n in range(180):
        await alice.say(room, f"message {n}")
    tab = await house.enter(alice, room)
    numbers = "$$('.message').map((el) => Number(el.dataset.seq))"
    while await tab.js(f"{numbers}[0]") > 2:
        # What is under the reader's eyes stays there when older messages come in above it.
        moved = await tab.js("""(async () => {
            const log = $('#log'), first = log.firstChild;
            log.scrollTop = 300;
            const seen = document.elementFromPoint(700, 300).closest('.message');
            const place = seen.getBoundingClientRect().top;
            while (log.firstChild === first) await new Promise(requestAnimationFrame);
            return Math.abs(seen.getBoundingClientRect().top - place);
        })()""")
        assert moved <= 1
    await tab.equals(numbers, list(range(2, 182)))
    await tab.fill("#search", "message 77")
    await tab.reads("#found", "1 found")
    await tab.click("#results li a")
    await tab.reads(".goal .text", "message 77")


async def test_people_are_invited_given_roles_removed_and_banned(house: House) -> None:
    """Owners and moderators see the buttons that work for them, members see none."""
    alice, bob, carol = await house.enrol("alice", "bob", "carol")
    room = await alice.room(bob, kind="private")
    a, b = await house.enter(alice, room), await house.enter(bob, room)
    of_alice, of_bob, of_carol = (f"#people [data-name='{u.name}']" for u in (alice, bob, carol))
    usable = "['invite', 'leave-room', 'delete-room'].filter((id) => $('#' + id).checkVisibility())"
    for tab in (a, b):
        await tab.click("#about-button")
    await b.reads(f"{of_alice} button", "Message")
    await b.equals(usable, ["leave-room"])
    await a.reads(f"{of_bob} button", "Message", "Remove", "Ban")
    await a.equals(usable, ["invite", "delete-room"])
    await choose(a, f"{of_bob} select", "moderator")
    await b.equals(usable, ["invite", "leave-room"])
    await b.reads(f"{of_alice} button", "Message")
    await b.fill("#guest", carol.name.upper(), "Enter")
    await b.reads(f"{of_carol} button", "Message", "Remove", "Ban")
    c = await house.enter(carol, room)
    await press(b, of_carol, "Ban", "Really ban?")
    await b.reads(f"{of_carol} button", "Lift ban")
    await c.reads("#notice", "You are no longer in this room.")
    await c.reads("#title", "Lobby")
    await b.fill("#guest", carol.name, "Enter")
    await b.reads("#about .error", f"{carol.name} is banned here. Lift the ban first.")
    await press(b, of_carol, "Lift ban")
    for tab in (a, b):
        await tab.wait(f"!$(`{of_carol}`)")
    await press(a, of_bob, "Remove", "Really remove?")
    await b.reads("#notice", "You are no longer in this room.")


async def test_a_password_is_changed_and_an_account_ended(house: House) -> None:
    """A new password leaves this page logged in; the end of an account needs it."""
    alice, _, tab = await house.alone(name="Gardening")
    await tab.click("#account-button")
    await tab.reads("#account-email", f"{alice.name}@example.org")
    await tab.click("#account summary")
    await tab.fill("#old-password", "wrong")
    await tab.fill("#new-password", "a new one", "Enter")
    await tab.reads("#change-password .error", "Wrong password.")
    await tab.fill("#old-password", PASSWORD, "Enter")
    await tab.reads("#notice", "Your password is changed. Other devices have to log in again.")
    await online(tab)
    # The server speaks of ids, the page of the names that it shows.
    words = "First give “Gardening” another owner, or delete what nobody needs."
    for form, answer in (("#end-account", words), ("#door", "Your account has ended.")):
        await tab.click("#account-button")
        await tab.click("#account details:last-of-type summary")
        await tab.fill("#last-password", "a new one", "Enter")
        await tab.reads(f"{form} .error", answer)
        if answer == words:
            await tab.press("Escape")
            await tab.click("#about-button")
            await press(tab, "#about", "Delete this room", "Really delete it, with all messages?")
            await tab.reads("#title", "Lobby")
    assert await tab.js("Object.keys(localStorage).filter((key) => !key.endsWith('session'))") == []


# --- In the rain


async def test_a_line_that_falls_silent_is_noticed(house: House) -> None:
    """At once by who types or comes back, soon by a list that is ahead, within 60 s by nobody."""
    alice, bob = await house.enrol("alice", "bob")
    rooms = [await alice.room(bob) for _ in range(4)]
    typed, slept, busy, quiet = tabs = [await house.enter(alice, room) for room in rooms]
    assert house.rain.silence() == 4
    begun = time.monotonic()
    await bob.say(rooms[2], "missed")
    await asyncio.sleep(6)  # the time in which one types nothing
    await typed.type("are you there?")
    await slept.js("document.onvisibilitychange()")
    for tab in (typed, slept, busy):
        await tab.equals(STATE, "resumed")
    assert time.monotonic() - begun < 27, "only the clock noticed it"
    assert await typed.js(COMPOSER) == "are you there?"
    await busy.reads("#log .text", "missed")
    await busy.reads("#status", "Back online, caught up on 1 missed")
    await quiet.equals(STATE, "resumed", 40)
    assert time.monotonic() - begun < 60
    for room, tab in zip(rooms, tabs, strict=True):
        await bob.say(room, "and on it goes")
        await tab.equals("$$('#log .text').at(-1)?.textContent", "and on it goes", 4)


async def test_without_websockets_one_can_chat_all_the_same(house: House) -> None:
    """One that nobody answers is given up after 10 s; where all are refused, the page says so."""
    alice, room, tab = await house.alone()
    await alice.say(room, "before")
    house.rain.turn("hanging")
    await tab.reload()
    await shows(tab, "before")
    assert await tab.js(STATE) == "connecting"
    house.rain.turn("sunny")
    await tab.equals(STATE, "resumed", 16)
    house.rain.turn("refusing")
    await tab.reads("#status", "No live connection here, looking every 5 s")
    await say(tab, "mine")
    await shows(tab, "before", "mine")
    event = await alice.say(room, "from elsewhere")
    await shows(tab, "before", "mine", "from elsewhere")
    await alice.ask("PATCH", f"/rooms/{room}/messages/{event['seq']}", {"message": "edited"})
    await shows(tab, "before", "mine", "edited")


@pytest.mark.parametrize("house", [{"messages_per_second": 10}], indirect=True)
async def test_what_was_written_offline_arrives_in_order(house: House) -> None:
    """An edit, 30 messages, from two tabs, one elsewhere, one later, slowed by the rate limit."""
    alice, room, tab = await house.alone()
    two = await house.enter(alice, other := await alice.room(), beside=tab)
    await say(tab, "Teh first")
    await shows(tab, "Teh first")
    house.rain.turn("away")
    await tab.press("ArrowUp")
    await tab.fill("#text", "The first", "Enter")
    written = [f"line {n}" for n in range(30)]
    await say(tab, *written[:-1])
    await say(two, "elsewhere")
    await two.js(f"location.hash = '{room}'")
    await say(two, written[-1])
    for each in (tab, two):
        await each.wait("$('#status').textContent.includes('32 messages wait')")
        await each.reads("#unsent-summary", "32 waiting")
    await tab.reads(".waiting .text", "The first", *written)
    assert await tab.js("$('.waiting .note').textContent") == "Waiting to be sent"
    house.rain.delay = 0.01
    house.rain.turn("sunny")
    await say(tab, "after the return")
    await has_said(alice, room, "The first", *written, "after the return")
    await has_said(alice, other, "elsewhere")
    for each in (tab, two):
        await shows(each, "The first", *written, "after the return")
        await each.wait("!$('#unsent-summary').checkVisibility()")


async def test_the_outbox_survives_a_closed_tab(house: House) -> None:
    """What a portal kept from being sent, though it said 200, the next tab sends just once."""
    alice, room, tab = await house.alone()
    other = await alice.room()
    house.rain.turn("portal")
    await say(tab, "one")
    await tab.wait("$('#status').textContent.includes('1 message waits')")
    await tab.js(f"location.hash = '{other}'")
    await say(tab, "two")
    await tab.wait("$('.waiting')")
    await tab.call("Page.close")
    await has_said(alice, room)
    house.rain.turn("sunny")
    house.rain.lose_answers = 2  # it is stored, but we do not hear of it: sent again, stored once
    tab = await house.enter(alice, beside=tab)
    await has_said(alice, other, "two")
    await tab.wait("!$('#unsent-summary').checkVisibility()")
    assert house.rain.lose_answers == 0
    await has_said(alice, room, "one")


async def test_what_is_refused_says_why_and_touches_no_neighbour(house: House) -> None:
    """Of "before", 70,000 letters, "after" the middle one waits for its author to mend it."""
    alice, room, tab = await house.alone()
    house.rain.turn("away")
    await say(tab, "before", "w" * 70_000, "x" * 5000, "after")
    house.rain.turn("sunny")
    await has_said(alice, room, "before", "after")
    await tab.reads("#unsent-summary", "2 not sent")
    reasons = await tab.js("$$('.message.refused .note').map((el) => el.textContent)")
    assert reasons[0].startswith("Not sent: This is too long.")
    assert reasons[1].startswith("Not sent: The message is over 4000 characters.")
    await tab.fill("#text", "a draft")
    await press(tab, ".message.refused:not(.refused ~ .refused)", "Throw away")
    await tab.reads("#unsent-summary", "1 not sent")
    await tab.reload()
    await press(tab, ".message.refused", "Mend")
    await tab.equals(COMPOSER, "x" * 5000)
    await tab.fill("#text", "shorter", "Enter")
    await tab.equals(COMPOSER, "a draft")
    await has_said(alice, room, "before", "after", "shorter")
    await tab.wait("!$('.message.refused')")


async def test_a_draft_stays_in_its_room(house: House) -> None:
    """It waits over reloads, and while one edits; to it goes the edit of what was deleted."""
    alice, bob = await house.enrol("alice", "bob")
    room, other = await bob.room(alice), await alice.room()
    event = await alice.say(room, "Teh message")
    tab = await house.enter(alice, room)
    for place, text in ((room, "a draft here"), (other, "a draft there")):
        await tab.js(f"location.hash = '{place}'")
        await tab.equals(COMPOSER, "")
        await tab.type(text)
    await tab.js(f"location.hash = '{room}'")
    await tab.equals(COMPOSER, "a draft here")
    await tab.hover(".message")
    await tab.click(".edit")
    await tab.equals(COMPOSER, "Teh message")
    await tab.fill("#text", "The message")
    await tab.reload()
    await tab.equals(COMPOSER, "The message")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{event['seq']}")
    await shows(tab, "Message deleted")
    await tab.equals(COMPOSER, "The message\na draft here")
    await tab.js(f"location.hash = '{other}'")
    await tab.equals(COMPOSER, "a draft there")


# --- The door, and the session


async def test_the_end_of_a_session_takes_nothing_away(house: House) -> None:
    """It is renewed in time; if it ends all the same, what is typed waits for the password."""
    (alice,) = await house.enrol("alice")
    room = await alice.room(name="Gardening")
    now = int(time.time())
    claims = jwt.decode(alice.token, KEY, ["HS256"]) | {"iat": now, "exp": now + 9}
    short = alice._replace(token=jwt.encode(claims, KEY, "HS256"))
    tab = await house.enter(short, room, life=9000)
    kept = f"JSON.parse(localStorage['{STORE}{alice.name} session'])"
    await tab.wait(f"{kept}.life > 9000")
    await asyncio.sleep(max(0, now + 10.5 - time.time()))  # until the first token has ended
    await tab.reads("#status", "Connected")
    await tab.fill("#text", "in the middle of a ")
    await alice.ask("POST", "/auth/logout")
    await tab.wait("$('#again').checkVisibility()")
    await tab.equals(FOCUS, "text")
    await tab.type("sentence", "Enter")
    await tab.type("the next")
    await tab.reads(".waiting .text", "in the middle of a sentence")
    await tab.fill("#again-password", PASSWORD, "Enter")
    await shows(tab, "in the middle of a sentence")
    await tab.equals(FOCUS, "text")
    token = await tab.js(f"{kept}.token")
    await tab.go("about:blank")
    await alice._replace(token=token).ask("POST", "/auth/logout")
    await tab.go(f"{house.rain.url}#{room}")
    await tab.reads("#door .error", "Your log-in has ended. Log in again to go on.")
    assert await tab.js("$('#username').value") == alice.name
    await tab.equals(FOCUS, "password")
    await tab.type(PASSWORD, "Enter")
    await tab.reads("#title", "Gardening")
    await tab.equals(COMPOSER, "the next")


@pytest.mark.parametrize("house", [{"registrations_per_hour": 3}], indirect=True)
async def test_the_door_says_what_is_wrong(house: House) -> None:
    """It says so of names and passwords, how long to wait, and what to do without a network."""
    (alice,) = await house.enrol("alice")
    tab = await house.browser.tab(house.rain.url)
    await tab.fill("#username", alice.name)
    await tab.fill("#password", "wrong", "Enter")
    await tab.reads("#door .error", "Wrong name or password.")
    await tab.click("#other-way")
    await tab.fill("#email", "bob@example.org")
    for name, answer in (
        ("ä", "The name should be 2 to 32 .*"),
        (alice.name, ".* taken.*"),
        ("bob", "Too many registrations, wait \\d+ seconds, then try again."),
    ):
        await tab.fill("#username", name, "Enter")
        await tab.wait(f"/^{answer}$/.test($('#door .error').textContent)")
    await tab.click("#other-way")
    await tab.fill("#username", f" {alice.name}@example.org ")
    await tab.fill("#password", PASSWORD)
    house.rain.turn("away")
    await tab.press("Enter")
    unreachable = "The server cannot be reached. Check the network, then try again."
    await tab.reads("#door .error", unreachable)
    house.rain.turn("sunny")
    await tab.press("Enter")
    await online(tab)
    assert await tab.js("$('#password').value") == ""
    house.rain.turn("away")
    await tab.fill("#search", "something")
    await tab.reads("#found", unreachable)


# --- Every language, and text that would like to be more


async def test_every_script_is_at_home(house: House) -> None:
    """Any name can be given twice, and after a deletion; each text runs in its own direction."""
    _, _, tab = await house.alone()
    rooms = set()
    for name in ("Café & Bar!", "会议室", "חדר", "חדר"):
        rooms.add(await create(tab, "private", name))
        await tab.reads("#title", name)
    assert len(rooms) == 4
    await tab.click("#about-button")
    await press(tab, "#about", "Delete this room", "Really delete it, with all messages?")
    await tab.reads("#notice", "This room was deleted.")
    await create(tab, "private", "חדר")
    await tab.equals("getComputedStyle($('#title')).direction", "rtl")
    ways = {"שלום world": "rtl", "مرحبا": "rtl", "سلام، چطوری؟": "rtl", "hello עולם": "ltr"}
    for text, way in ways.items():
        await tab.fill("#text", text)
        await tab.equals("getComputedStyle($('#text')).direction", way)
        await tab.press("Enter")
    await shows(tab, *ways)
    shown = await tab.js("$$('#log .text').map((el) => getComputedStyle(el).direction)")
    assert shown == list(ways.values())


async def test_one_lands_where_one_was(house: House) -> None:
    """At first in the Lobby; from a room that is closed to one as from one that is not there."""
    alice, eve = await house.enrol("alice", "eve")
    secret = await alice.room(kind="private", name="Secret plans")
    room = await alice.room(eve, name="AAA")
    tab = await house.enter(eve, "")
    await tab.reads("#title", "Lobby")
    for address in (secret, "there-is-no-such-room"):
        await tab.js("$('#notice').replaceChildren()")
        await tab.js(f"location.hash = '{address}'")
        await tab.reads("#notice", "There is no such room, or it is not open to you.")
        await tab.reads("#title", "Lobby")
    assert "Secret" not in await tab.js("document.body.innerText")
    await tab.click(f"[data-room='{room}'] a")
    await tab.reads("#title", "AAA")
    await tab.js("history.replaceState(null, '', '#')")
    await tab.reload()
    await tab.reads("#title", "AAA")


TEXTS = (  # links are marked by ⟦ and ⟧
    "(see ⟦https://en.wikipedia.org/wiki/Ergo_(IRC)⟧) and [⟦https://example.org/a[1]⟧], so",
    "見て ⟦https://example.org/路⟧。看⟦https://example.org/a⟧，然后「⟦https://example.org/b⟧」",
    "هل ⟦https://example.org/a⟧؟",
    "⟦HTTPS://Example.ORG/A⟧ and ⟦Http://example.org⟧?!",
    '"⟦https://example.org/a⟧" “⟦https://example.org/?q=a&b=c#d⟧”;',
    "https:// is no link, nor is https://( or javascript:alert(1)",
    "<script>window.owned=2</script>",
    "\"'><svg/onload=window.owned=3>",
    "javascript:window.owned=4 ⟦https://example.org/⟧?<b>\"onclick='window.owned=5'",
    "<img src=x onerror=window.owned=1>",
)


async def test_what_people_write_stays_text_but_for_links(house: House) -> None:
    """Links end where people mean; HTML is shown as typed, and would run nothing if it got in."""
    alice, bob = await house.enrol("alice", "bob")
    texts = [re.sub("[⟦⟧]", "", text) for text in TEXTS]
    room = await alice.room(bob, name=texts[-1])
    a, b = await house.enter(alice, room), await house.enter(bob, room)
    await say(a, *texts[:-1], "an image")
    await shows(b, *texts[:-1], "an image")
    seq = await b.js("$('.message:last-child').dataset.seq")
    await alice.ask("PATCH", f"/rooms/{room}/messages/{seq}", {"message": texts[-1]})
    await b.fill("#search", "owned=")
    await b.reads("#found", "4 found")
    for tab in (a, b):
        await shows(tab, *texts)
        await tab.reads("#title", texts[-1])
        await tab.reads("#log .text a", *re.findall("⟦(.+?)⟧", str(TEXTS)))
        assert await tab.js("!document.body.querySelector('img, svg, script')")
    house.browser.forgiven = "Content Security Policy"
    evil = '<img src="data:," onerror="window.owned = 6"><b style="top: 0"></b>'
    await a.js(f"document.body.insertAdjacentHTML('beforeend', `{evil}`)")
    await until(lambda: len(a.problems) == 2, "two complaints")
    assert await a.js("window.owned === undefined") and await b.js("window.owned === undefined")


# --- Everybody's page


async def test_the_keyboard_alone_is_enough(house: House) -> None:
    """Without a mouse one logs in, sends, edits, deletes and changes the room."""
    (alice,) = await house.enrol("alice")
    tab = await house.browser.tab(f"{house.rain.url}#{await alice.room()}")
    await tab.equals(FOCUS, "username")
    await tab.type(alice.name, "Tab")
    await tab.type(PASSWORD, "Enter")
    await online(tab)
    await tab.equals(FOCUS, "text")
    await tab.type("one", "Enter")
    await tab.type("two", "Enter")
    await shows(tab, "one", "two")
    await tab.press("ArrowUp")
    await tab.type(" and")
    await tab.press("Enter", shift=True)
    await tab.type("a half", "Enter")
    await shows(tab, "one", "two and\na half")
    await tab.press("Tab", shift=True)
    await tab.equals(FOCUS, "log")
    await tab.press("ArrowUp", "ArrowUp", "Tab")
    await tab.equals(FOCUS, "edit")
    await tab.press("Tab", "Enter", "Enter")
    await shows(tab, "Message deleted", "two and\na half")
    while not await tab.js("document.activeElement.closest('[data-room=\"1\"]')"):
        assert await tab.js("document.activeElement.matches(':focus-visible')")
        await tab.press("Tab", shift=True)
    await tab.press("Enter")
    await tab.reads("#title", "Lobby")
    await tab.equals(FOCUS, "text")


FITS = """innerWidth === 390 && [document.documentElement, ...$$('#log, #lists, dialog')]
    .every((el) => el.scrollWidth <= el.clientWidth)"""


async def test_a_phone_shows_everything(house: House) -> None:
    """At 390 x 844 nothing is wider than the screen, a finger is enough, Enter makes a line."""
    door = await house.browser.tab(house.rain.url, phone=True)
    await door.wait(f"$('#door').checkVisibility() && {FITS}")
    (alice,) = await house.enrol("alice")
    room = await alice.room(name="m" * 100)
    for text in ("w" * 500, "https://example.org/" + "x" * 500, "Teh end"):
        await alice.say(room, text)
    tab = await house.enter(alice, phone=True)
    await tab.tap("#back")
    await tab.wait(f"$('nav').checkVisibility() && {FITS}")
    for button, dialog in (("#add", "#new"), ("#account-button", "#account")):
        await tab.tap(button)
        await tab.wait(f"$('{dialog}').open && {FITS}")
        await tab.tap(f"{dialog} .close")
    await tab.tap(f"[data-room='{room}'] a")
    await tab.wait(f"$$('.message').length === 3 && {FITS}")
    await tab.tap(".message:last-child")
    await tab.tap(".message:last-child .edit")
    await tab.fill("#text", "The end", "Enter")
    await tab.type("of it")
    await tab.equals(COMPOSER, "The end\nof it")
    await tab.tap("#send")
    await tab.reads(".message:last-child .text", "The end\nof it")
    await tab.equals(FOCUS, "text")
    await tab.tap("#about-button")
    await tab.wait(f"$('#people li') && {FITS}")


async def test_the_composer_grows_and_nothing_else_scrolls(house: House) -> None:
    """The composer has no scrollbar until it is a third of the page; lists have no bullets."""
    _, _, tab = await house.alone()
    heights = []
    for lines, overflow in ((1, "hidden"), (2, "hidden"), (3, "hidden"), (60, "auto")):
        await tab.fill("#text", "\n".join(["a line"] * lines))
        heights.append(await tab.js("$('#text').offsetHeight"))
        assert await tab.js("getComputedStyle($('#text')).overflowY") == overflow
    assert heights == sorted(set(heights)) and heights[-1] < 800 * 0.36
    await tab.fill("#text", "short again")
    scrolling = """$$('*').filter((el) => el.checkVisibility()
        && /auto|scroll/.test(getComputedStyle(el).overflowY)
        && el.scrollHeight > el.clientHeight)"""
    assert await tab.js(scrolling) == []
    bullets = "$$('#rooms, #results, #people').map((el) => getComputedStyle(el).listStyleType)"
    assert await tab.js(bullets) == ["none"] * 3


USABLE = ("textbox", "searchbox", "combobox", "button", "link", "log", "navigation", "dialog")


FAINT = """(() => {
    const colour = (el, of) => getComputedStyle(el)[of].match(/[\\d.]+/g).map(Number);
    const light = (el, of) => colour(el, of).slice(0, 3)
        .map((x) => x / 255).map((x) => (x <= 0.04 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0.05);
    const ground = (el) => colour(el, 'backgroundColor')[3] === 0 && el !== document.body
        ? ground(el.parentElement) : el;
    const ratio = (el) => light(el, 'color') / light(ground(el), 'backgroundColor');
    return $$('body *').filter((el) => el.checkVisibility() && ratio(el) < 4.5 && ratio(el) > 0.22
        && [...el.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
        .map((el) => el.outerHTML);
})()"""


async def test_everybody_can_read_it(house: House) -> None:
    """All has a name for a screen reader, and a contrast of 4.5 to 1, in the light and the dark."""
    alice, bob = await house.enrol("alice", "bob")
    room = await alice.room(bob)
    await alice.say(await alice.room(bob), "unread")
    gone = await bob.say(room, "gone")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{gone['seq']}")
    await alice.say(room, "https://example.org/")
    tab = await house.enter(bob, room)
    await say(tab, "w" * 4001)
    await tab.wait("$('.message.refused') && $$('.badge').some((el) => el.textContent === '1')")
    words = await tab.js("$$('.message:first-child > p').map((el) => el.textContent)")
    assert (len(words), words[0], words[2]) == (3, bob.name, "Message deleted")
    door = await house.browser.tab(house.rain.url)
    found, grounds = set(), set()
    for page, button, part in (
        (door, "#username", "#door"),
        (tab, "#text", "#log"),
        (tab, "#add", "#new"),
        (tab, "#about-button", "#people li"),
        (tab, "#account-button", "#account"),
    ):
        await page.click(button)
        await page.wait(f"$('{part}')?.checkVisibility()")
        nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        nodes = [node for node in nodes if not node["ignored"]]
        found |= {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes}
        for colours in ("light", "dark"):
            scheme = {"name": "prefers-color-scheme", "value": colours}
            await page.call("Emulation.setEmulatedMedia", features=[scheme])
            await page.equals(FAINT, [])
            grounds.add(await page.js("getComputedStyle(document.body).backgroundColor"))
        await page.press("Escape")
    assert len(grounds) == 2
    assert [role for role, name in found if role in USABLE and not name.strip()] == []
    assert {role for role, _ in found} >= {*USABLE, "article", "status", "alert"}
    assert {("textbox", "Password"), ("textbox", "Message"), ("dialog", "New room")} <= found
