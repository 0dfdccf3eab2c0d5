"""The chat page as people meet it, in a real Chromium: in the sun, in the rain, in two tabs."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import jwt
import pytest
from aiohttp import web
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Page, expect

from chatserver import create_app
from tests.browser import Browser, browsing
from tests.conftest import config
from tests.people import At, User, enrol
from tests.processes import serving
from tests.rain import Rain
from tests.words import KEY, PASSWORD, until

pytestmark = pytest.mark.slow
COMPLAINTS = "net::ERR_|WebSocket|status of 4"  # of the browser itself, on what was in vain


class House(NamedTuple):
    """A server in the weather, the browser of its guests, and what they do by other means."""

    rain: Rain
    browser: Browser
    session: aiohttp.ClientSession

    async def enrol(self, *names: str) -> list[User]:
        """Return people with fresh accounts, who talk to the server in the sun."""
        return await enrol(self.session, At(self.rain.target.geturl()), *names)

    async def page(self, room: str = "", beside: Page | None = None, **device: Any) -> Page:
        """Open the page on a machine of its own, or beside another."""
        page = await self.browser.page(beside, **device)
        await page.goto(f"{self.rain.url}#{room}")
        return page

    async def enter(self, user: User, room: str = "1", **machine: Any) -> Page:
        """Open the page, logged in, and wait until its room is live."""
        page = await self.page(room, **machine)
        if "beside" not in machine:
            await log_in(page, user.name)
        await online(page)
        return page

    async def alone(self, **room: Any) -> tuple[User, str, Page]:
        """Return somebody, a room of hers, and the page in it."""
        (alice,) = await self.enrol("alice")
        name = await alice.room(**room)
        return alice, name, await self.enter(alice, name)


@pytest.fixture
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """Run a server, maybe with settings, as a part of a larger one, and come to it."""
    settings = getattr(request, "param", {})
    larger = web.Application(client_max_size=1 << 16)
    larger.add_subapp("/team/chat", create_app(config(f"sqlite:///{tmp_path}/db", **settings)))
    async with (
        aiohttp.ClientSession() as session,
        serving(larger) as url,
        Rain(f"{url}/team/chat") as rain,
        browsing(COMPLAINTS) as browser,
    ):
        house = House(rain, browser, session)
        await house.enrol("owner")  # of the Lobby, as the first one
        yield house


# --- What people see and do


async def reads(page: Page, selector: str, *texts: str | re.Pattern[str]) -> None:
    """Wait until such elements say just this, one after another."""
    await expect(page.locator(selector)).to_have_text(texts)


async def shows(page: Page, *texts: str) -> None:
    """Wait until the log says just this, and none of it waits."""
    await reads(page, "#log .text", *texts)
    await expect(page.locator(".waiting")).to_have_count(0)


async def online(page: Page, how: str = "online|resumed") -> None:
    """Wait until the room is open and live, its history shown."""
    await expect(page.locator("#status")).to_have_attribute("data-state", re.compile(how))
    await expect(page.locator(".message, #empty:visible").first).to_be_visible()


async def submit(page: Page, selector: str, text: str) -> None:
    """Fill a field and press Enter."""
    await page.fill(selector, text)
    await page.press(selector, "Enter")


async def log_in(page: Page, name: str, password: str = PASSWORD) -> None:
    """Say at the door who one is."""
    await page.fill("#username", name)
    await submit(page, "#password", password)


async def say(page: Page, *texts: str) -> None:
    """Type messages and send each with Enter."""
    for text in texts:
        await submit(page, "#text", text)


async def press(page: Page, part: str, *buttons: str) -> None:
    """Press buttons in a part of the page, one after another, by what they say."""
    for words in buttons:
        await page.locator(part).get_by_role("button", name=words, exact=True).click()


async def create(page: Page, kind: str, name: str) -> str:
    """Make a room with the dialog, and return its id."""
    before = page.url
    await page.click("#add")
    await page.select_option("#kind", kind)
    await submit(page, "#name", name)
    await expect(page).not_to_have_url(before)
    await reads(page, "#title", name)
    await online(page)
    return page.url.partition("#")[2]


async def said(user: User, room: str) -> list[str]:
    """Return what the log of the room holds."""
    history = await user.ask("GET", f"/rooms/{room}/messages?limit=200")
    return [event["message"] for event in history]


# --- In the sun


async def test_two_people_register_log_in_and_chat(house: House) -> None:
    """In two tabs of one browser they write, see each other, and change what is theirs alone."""
    a = await house.page()
    b = await house.page(beside=a)
    for page, name in ((a, "alice"), (b, "bob")):
        await page.click("#other-way")
        await page.fill("#email", f"{name}@example.org")
        await log_in(page, name.upper())
        await online(page)
    room = await create(a, "public", "Walks")
    await b.evaluate(f"location.hash = '{room}'")
    await say(a, "Helo Bob", "A mistake")
    await shows(b, "Helo Bob", "A mistake")
    await b.fill("#text", "Hello Alice")
    await reads(a, "#whispers", "bob is typing…")
    await b.press("#text", "Enter")
    await reads(a, "#log .author", "alice", "alice", "bob")
    first, second = ".message:nth-child(1)", ".message:nth-child(2)"
    await a.hover(first)
    await a.click(f"{first} .edit")
    await submit(a, "#text", "Hello Bob")
    await a.hover(second)
    await press(a, second, "Delete", "Really delete?")
    await expect(b.locator(".edited + .deleted")).to_be_visible()
    await b.hover(first)
    await expect(b.locator(f"{first} button:visible")).to_have_count(0)
    for page, name in ((a, "alice"), (b, "bob")):
        await page.reload()
        await shows(page, "Hello Bob", "Message deleted", "Hello Alice")
        await reads(page, "#me", name)
        await reads(page, "#online", "2 online: alice, bob")


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
    for page in (one, two):
        await reads(page, f"[data-room='{private}'].private .badge", "1")
        await reads(page, f"[data-room='{direct}'].direct .badge", "1")
        await expect(page).to_have_title("(2) Lobby · Chat")
    await one.click(f"[data-room='{private}'] a")
    await shows(one, "Only for you")
    await expect(two).to_have_title("(1) Lobby · Chat")
    await one.click(f"[data-room='{direct}'] a")
    await expect(one).to_have_title(f"{alice.name} · Chat")
    other = await house.enter(bob)  # on another machine
    await expect(other).to_have_title("Lobby · Chat")
    await one.click("#account-button")
    await one.click("#logout")
    for page in (one, two):
        await expect(page.locator("#door")).to_be_visible()
        words = re.compile("Only for you|Surprise|psst")  # that they are hidden is not enough
        await expect(page.locator("body")).not_to_contain_text(words)
    await reads(a, "#online", f"1 online: {alice.name}")


async def test_history_comes_when_one_scrolls_up(house: House) -> None:
    """Scrolling up reads the whole history, in order, and what was looked at keeps its place."""
    (alice,) = await house.enrol("alice")
    room = await alice.room()
    for n in range(180):
        await alice.say(room, f"message {n}")
    page = await house.enter(alice, room)
    while await page.locator(".message").count() < 180:
        moved = await page.evaluate("""async () => {
            const log = document.querySelector('#log'), first = log.firstChild;
            log.scrollTop = 300;
            const seen = document.elementFromPoint(700, 300).closest('.message');
            const place = seen.getBoundingClientRect().top;
            while (log.firstChild === first) await new Promise(requestAnimationFrame);
            return Math.abs(seen.getBoundingClientRect().top - place);
        }""")
        assert moved <= 1
    await shows(page, *[f"message {n}" for n in range(180)])
    await page.fill("#search", "message 77")
    await page.click("#results li a")
    await reads(page, ".goal .text", "message 77")


async def test_people_are_invited_given_roles_removed_and_banned(house: House) -> None:
    """Owners and moderators see the buttons that work for them, members see none."""
    alice, bob, carol = await house.enrol("alice", "bob", "carol")
    room = await alice.room(bob, kind="private")
    a, b = await house.enter(alice, room), await house.enter(bob, room)
    of_bob, of_carol = (f"#people [data-name='{user.name}']" for user in (bob, carol))
    buttons = "#about button:visible"
    for page in (a, b):
        await page.click("#about-button")
    await reads(b, buttons, "Close", "Message", "Leave this room")
    await reads(a, buttons, "Close", "Invite", "Message", "Remove", "Ban", "Delete this room")
    await a.select_option(f"{of_bob} select", "moderator")
    await reads(b, buttons, "Close", "Invite", "Message", "Leave this room")
    await submit(b, "#guest", carol.name.upper())
    await reads(b, f"{of_carol} button", "Message", "Remove", "Ban")
    c = await house.enter(carol, room)
    await press(b, of_carol, "Ban", "Really ban?")
    await reads(b, f"{of_carol} button", "Lift ban")
    await reads(c, "#notice", "You are no longer in this room.")
    await submit(b, "#guest", carol.name)
    await reads(b, "#about > .error", f"{carol.name} is banned here. Lift the ban first.")
    await press(b, of_carol, "Lift ban")
    for page in (a, b):
        await expect(page.locator(of_carol)).to_have_count(0)
    await press(a, of_bob, "Remove", "Really remove?")
    await reads(b, "#notice", "You are no longer in this room.")


async def test_a_password_is_changed_and_an_account_ended(house: House) -> None:
    """A new password leaves this page logged in; the end of an account needs it."""
    alice, room, page = await house.alone(name="Gardening")
    await page.click("#account-button")
    for summary in await page.locator("#account summary").all():
        await summary.click()
    await submit(page, "#last-password", PASSWORD)
    words = "First give “Gardening” another owner, or delete what nobody needs."
    await reads(page, "#end-account .error", words)  # the server speaks of ids, the page of names
    await alice.ask("DELETE", f"/rooms/{room}")
    await page.fill("#old-password", "wrong")
    await submit(page, "#new-password", "a new one")
    await reads(page, "#change-password .error", "Wrong password.")
    await submit(page, "#old-password", PASSWORD)
    await reads(page, "#notice", "Your password is changed. Other devices have to log in again.")
    await online(page)
    await page.click("#account-button")
    await page.click("#account summary >> nth=1")
    await submit(page, "#last-password", "a new one")
    await reads(page, "#door .error", "Your account has ended.")
    kept = await page.evaluate("Object.keys(localStorage)")
    assert [key for key in kept if not key.endswith("session")] == []


async def test_the_end_of_a_session_takes_nothing_away(house: House) -> None:
    """It is renewed in time; if it ends all the same, what is typed waits for the password."""
    (alice,) = await house.enrol("alice")
    room = await alice.room(name="Gardening")
    page = await house.page(room)
    text = page.locator("#text")
    claims = jwt.decode(alice.token, KEY, ["HS256"]) | {"exp": int(time.time()) + 10}
    short = {"access_token": jwt.encode(claims, KEY, "HS256"), "expires_in": 9}
    await page.route("**/auth/token", lambda route: route.fulfill(json=short), times=1)
    await log_in(page, alice.name)
    await online(page)
    await asyncio.sleep(max(0, claims["exp"] + 1.5 - time.time()))  # until this log-in has ended
    await reads(page, "#status", "Connected")
    await say(page, "still here")
    await shows(page, "still here")
    await text.fill("in the middle of a ")
    await alice.ask("POST", "/auth/logout")
    await expect(page.locator("#again")).to_be_visible()
    await expect(text).to_be_focused()
    await page.keyboard.type("sentence\nthe next")
    await reads(page, ".waiting .text", "in the middle of a sentence")
    await submit(page, "#again-password", PASSWORD)
    await shows(page, "still here", "in the middle of a sentence")
    await expect(text).to_have_value("the next")


async def test_a_draft_stays_in_its_room(house: House) -> None:
    """It waits over reloads, and while one edits; to it goes the edit of what was deleted."""
    alice, bob = await house.enrol("alice", "bob")
    room, other = await bob.room(alice), await alice.room()
    event = await alice.say(room, "Teh message")
    page = await house.enter(alice, room)
    text = page.locator("#text")
    await text.fill("a draft")
    for place, draft in ((other, ""), (room, "a draft")):
        await page.evaluate(f"location.hash = '{place}'")
        await expect(text).to_have_value(draft)
    await page.hover(".message")
    await page.click(".edit")
    await expect(text).to_have_value("Teh message")
    await text.fill("The message")
    await page.reload()
    await expect(text).to_have_value("The message")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{event['seq']}")
    await shows(page, "Message deleted")
    await expect(text).to_have_value("The message\na draft")


async def test_one_finds_ones_way_between_rooms(house: House) -> None:
    """A name can be given twice, and after a deletion; from what is closed one gets back."""
    alice, eve = await house.enrol("alice", "eve")
    secret = await alice.room(kind="private", name="Secret plans")
    page = await house.enter(eve, "")
    await reads(page, "#title", "Lobby")
    rooms = [await create(page, "private", name) for name in ("Café & Bar!", "会议室", "会议室")]
    assert len(set(rooms)) == 3
    await page.click("#about-button")
    await press(page, "#about", "Delete this room", "Really delete it, with all messages?")
    await reads(page, "#notice", "This room was deleted.")
    await create(page, "private", "会议室")
    for address in (secret, "there-is-no-such-room"):
        await page.evaluate("document.querySelector('#notice').replaceChildren()")
        await page.evaluate(f"location.hash = '{address}'")
        await reads(page, "#notice", "There is no such room, or it is not open to you.")
        await reads(page, "#title", "Lobby")
    await expect(page.locator("body")).not_to_contain_text("Secret")
    await page.click(f"[data-room='{rooms[0]}'] a")
    await reads(page, "#title", "Café & Bar!")
    await page.goto(house.rain.url)
    await reads(page, "#title", "Café & Bar!")


TEXTS = (  # links are marked by ⟦ and ⟧
    "(see ⟦https://en.wikipedia.org/wiki/Ergo_(IRC)⟧) and [⟦https://example.org/a[1]⟧], so",
    "見て ⟦https://example.org/路⟧。看⟦https://example.org/a⟧，然后「⟦https://example.org/b⟧」",
    "هل ⟦https://example.org/a⟧؟",
    '“⟦HTTPS://Example.ORG/A⟧” and "⟦https://example.org/?q=a&b=c#d⟧"?!',
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
    seq = await b.locator(".message").last.get_attribute("data-seq")
    await alice.ask("PATCH", f"/rooms/{room}/messages/{seq}", {"message": texts[-1]})
    await b.fill("#search", "owned=")
    await reads(b, "#found", "4 found")
    for page in (a, b):
        await shows(page, *texts)
        await reads(page, "#title", texts[-1])
        await reads(page, "#log .text a", *re.findall("⟦(.+?)⟧", str(TEXTS)))
        await expect(page.locator("#log .text >> nth=2")).to_have_css("direction", "rtl")
        await expect(page.locator("body :is(img, svg, script)")).to_have_count(0)
    evil = '<img src="data:," onerror="window.owned = 6"><b style="top: 0"></b>'
    await a.evaluate(f"document.body.insertAdjacentHTML('beforeend', `{evil}`)")
    await until(lambda: len(house.browser.problems) == 2, "two complaints")
    assert all("Content Security Policy" in each for each in house.browser.problems)
    house.browser.problems.clear()
    for page in (a, b):
        assert await page.evaluate("window.owned") is None


async def test_the_keyboard_alone_is_enough(house: House) -> None:
    """Without a mouse one logs in, sends, edits, deletes and changes the room."""
    (alice,) = await house.enrol("alice")
    page = await house.page(await alice.room())
    text, keyboard = page.locator("#text"), page.keyboard
    await expect(page.locator("#username")).to_be_focused()
    await keyboard.type(alice.name)
    await keyboard.press("Tab")
    await keyboard.type(f"{PASSWORD}\n")
    await online(page)
    await expect(text).to_be_focused()
    await keyboard.type("one\ntwo\n")
    await shows(page, "one", "two")
    await keyboard.press("ArrowUp")
    await keyboard.type(" and")
    await keyboard.press("Shift+Enter")
    await keyboard.type("a half\n")
    await shows(page, "one", "two and\na half")
    await keyboard.press("Shift+Tab")
    await expect(page.locator("#log")).to_be_focused()
    for key in ("ArrowUp", "ArrowUp", "Tab"):
        await keyboard.press(key)
    await expect(page.locator(".message:first-child .edit")).to_be_focused()
    for key in ("Tab", "Enter", "Enter"):
        await keyboard.press(key)
    await shows(page, "Message deleted", "two and\na half")
    while not await page.locator("[data-room='1'] :focus").count():
        await expect(page.locator(":focus-visible")).to_have_count(1)
        await keyboard.press("Shift+Tab")
    await keyboard.press("Enter")
    await reads(page, "#title", "Lobby")
    await expect(text).to_be_focused()


async def fits(page: Page, part: str) -> None:
    """Wait until a part of the page is there, and nothing is wider than a phone."""
    await expect(page.locator(part).first).to_be_visible()
    await page.wait_for_function("""() => innerWidth === 390
        && [document.documentElement, ...document.querySelectorAll('#log, #lists, dialog')]
            .every((el) => el.scrollWidth <= el.clientWidth)""")


async def test_a_phone_shows_everything(house: House) -> None:
    """At 390 x 844 nothing is wider than the screen, a finger is enough, Enter makes a line."""
    phone: Any = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    await fits(await house.page(**phone), "#door")
    (alice,) = await house.enrol("alice")
    room = await alice.room(name="m" * 100)
    for text in ("w" * 500, "https://example.org/" + "x" * 500, "Teh end"):
        await alice.say(room, text)
    page = await house.enter(alice, **phone)
    await page.tap("#back")
    await fits(page, "nav")
    for button, dialog in (("#add", "#new"), ("#account-button", "#account")):
        await page.tap(button)
        await fits(page, dialog)
        await page.tap(f"{dialog} .close")
    await page.tap(f"[data-room='{room}'] a")
    await fits(page, ".message:nth-child(3)")
    await page.tap(".message:last-child")
    await page.tap(".message:last-child .edit")
    await submit(page, "#text", "The end")
    await page.keyboard.type("of it")
    await expect(page.locator("#text")).to_have_value("The end\nof it")
    await page.tap("#send")
    await reads(page, ".message:last-child .text", "The end\nof it")
    await expect(page.locator("#text")).to_be_focused()
    await page.tap("#about-button")
    await fits(page, "#people li")


@pytest.mark.parametrize("colours", ["light", "dark"])
async def test_everybody_can_read_it(house: House, colours: str) -> None:
    """A screen reader finds a name for all, and weak eyes a contrast of 4.5 to 1."""
    alice, bob = await house.enrol("alice", "bob")
    room = await alice.room(bob)
    await alice.say(await alice.room(bob), "unread")
    gone = await bob.say(room, "gone")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{gone['seq']}")
    await alice.say(room, "https://example.org/")
    page = await house.enter(bob, room, color_scheme=colours)
    await say(page, "w" * 4001)
    await expect(page.locator(".message.refused")).to_be_visible()
    await reads(page, ".badge:visible", "1")
    door = await house.page(color_scheme=colours)
    for where, button, part in (
        (door, "#username", "#door"),
        (page, "#text", "#log"),
        (page, "#add", "#new"),
        (page, "#about-button", "#people li"),
        (page, "#account-button", "#account"),
    ):
        await where.click(button)
        await expect(where.locator(part).first).to_be_visible()
        found = await Axe().run(where, options={"runOnly": ["wcag2a", "wcag2aa"]})
        assert found.violations_count == 0, found.generate_report()
        await where.keyboard.press("Escape")


# --- In the rain


@pytest.mark.parametrize("house", [{"registrations_per_hour": 3}], indirect=True)
async def test_the_door_says_what_is_wrong(house: House) -> None:
    """It says so of names and passwords, how long to wait, and what to do without a network."""
    (alice,) = await house.enrol("alice")
    page = await house.page()
    await log_in(page, alice.name, "wrong")
    await reads(page, "#door .error", "Wrong name or password.")
    await page.click("#other-way")
    await page.fill("#email", "bob@example.org")
    for name, answer in (
        ("ä", "^The name should be 2 to 32 "),
        (alice.name, "taken"),
        ("bob", r"^Too many registrations, wait \d+ seconds, then try again\.$"),
    ):
        await submit(page, "#username", name)
        await reads(page, "#door .error", re.compile(answer))
    await page.click("#other-way")
    house.rain.turn("away")
    await log_in(page, f" {alice.name}@example.org ")
    await expect(page.locator("#door .error")).to_contain_text("The server cannot be reached.")
    house.rain.turn("sunny")
    await page.press("#password", "Enter")
    await online(page)


async def test_a_line_that_falls_silent_is_noticed(house: House) -> None:
    """At once by who types or comes back, soon by a list that is ahead, within 60 s by nobody."""
    alice, bob = await house.enrol("alice", "bob")
    rooms = [await alice.room(bob) for _ in range(4)]
    typed, slept, busy, quiet = pages = [await house.enter(alice, room) for room in rooms]
    house.rain.silence()
    await bob.say(rooms[2], "missed")
    await asyncio.sleep(6)  # the time in which one types nothing
    await typed.fill("#text", "are you there?")
    await slept.evaluate("document.onvisibilitychange()")
    for page in (typed, slept, busy):
        await online(page, "resumed")
    assert await quiet.get_attribute("#status", "data-state") == "online"  # until the clock asks
    await shows(busy, "missed")
    await reads(busy, "#status", "Back online, caught up on 1 missed")
    await online(quiet, "resumed")
    for room, page in zip(rooms, pages, strict=True):
        await bob.say(room, "and on it goes")
        await expect(page.locator("#log .text").last).to_have_text("and on it goes")


async def test_without_websockets_one_can_chat_all_the_same(house: House) -> None:
    """One that nobody answers is given up after 10 s; where all are refused, the page says so."""
    alice, room, page = await house.alone()
    await alice.say(room, "before")
    house.rain.turn("hanging")
    await page.reload()
    await shows(page, "before")
    await reads(page, "#status", "Connecting…")
    house.rain.turn("sunny")
    await online(page, "resumed")
    house.rain.turn("refusing")
    await reads(page, "#status", "No live connection here, looking every 5 s")
    await say(page, "mine")
    await shows(page, "before", "mine")
    event = await alice.say(room, "from elsewhere")
    await shows(page, "before", "mine", "from elsewhere")
    await alice.ask("PATCH", f"/rooms/{room}/messages/{event['seq']}", {"message": "edited"})
    await shows(page, "before", "mine", "edited")


@pytest.mark.parametrize("house", [{"messages_per_second": 10}], indirect=True)
async def test_what_was_written_offline_arrives_in_order(house: House) -> None:
    """An edit, 30 messages, from two tabs, one elsewhere, one later, slowed by the rate limit."""
    alice, room, page = await house.alone()
    two = await house.enter(alice, other := await alice.room(), beside=page)
    await say(page, "Teh first")
    await shows(page, "Teh first")
    house.rain.turn("away")
    await page.press("#text", "ArrowUp")
    written = ["The first", *[f"line {n}" for n in range(30)]]
    await say(page, *written[:-1])
    await say(two, "elsewhere")
    await two.evaluate(f"location.hash = '{room}'")
    await say(two, written[-1])
    for each in (page, two):
        await expect(each.locator("#status")).to_contain_text("32 messages wait")
    await reads(page, ".waiting .text", *written)
    house.rain.turn("sunny")
    written.append("after the return")
    await say(page, written[-1])
    for each in (page, two):
        await shows(each, *written)
    assert (await said(alice, room), await said(alice, other)) == (written, ["elsewhere"])


async def test_the_outbox_survives_a_closed_tab(house: House) -> None:
    """What a portal held up the next tab sends just once; what is refused its author mends."""
    alice, room, page = await house.alone()
    other = await alice.room()
    house.rain.turn("portal")  # which says 200 to everything
    await say(page, "before", "w" * 70_000, "x" * 5000, "after")
    await expect(page.locator("#status")).to_contain_text("4 messages wait")
    await page.evaluate(f"location.hash = '{other}'")
    await say(page, "elsewhere")
    await reads(page, ".waiting .text", "elsewhere")
    await page.close()
    assert await said(alice, room) == []
    house.rain.turn("sunny")
    house.rain.lose_answers = 4  # stored, but unheard: Chromium itself and the page send it again
    page = await house.enter(alice, room, beside=page)
    text, refused = page.locator("#text"), page.locator(".message.refused")
    await reads(page, "#unsent-summary", "2 not sent")
    assert house.rain.lose_answers == 0
    assert await said(alice, other) == ["elsewhere"]
    reasons = ("This is too long.", "The message is over 4000 characters.")
    await expect(refused.locator(".note")).to_contain_text(reasons)
    await text.fill("a draft")
    await press(page, ".message.refused >> nth=0", "Throw away")
    await expect(refused).to_have_count(1)
    await page.reload()
    await press(page, ".message.refused", "Mend")
    await expect(text).to_have_value("x" * 5000)
    await say(page, "shorter")
    await expect(text).to_have_value("a draft")
    await shows(page, "before", "after", "shorter")
