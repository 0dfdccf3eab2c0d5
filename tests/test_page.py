"""The chat page as people meet it, in a real Chromium: in the sun, in the rain, in two tabs."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from aiohttp import web

import chatserver
from chatserver import Config, create_app
from tests.browser import Browser, Chromium, Tab, connected, program
from tests.conftest import missing
from tests.people import At, User, enrol
from tests.processes import Process, serving
from tests.rain import Rain
from tests.words import KEY, NO_LIMITS, PASSWORD

pytestmark = pytest.mark.slow
BAD_WEATHER = r"net::ERR_|WebSocket|status of 40[13]|status of 429"
GONE = "status of 40[134]"  # requests that were under way when one lost the right to them
STORE = "chat / "  # begins the names of what the page keeps


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """Give the address of a browser."""
    path = program()
    if path is None:
        missing("there is no Chromium here")
    browser = Chromium(path or "")
    try:
        yield browser.address()
    finally:
        browser.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Give a session of a client for what others do meanwhile."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def rain(house: str) -> AsyncIterator[Rain]:
    """Give bad weather in front of the server."""
    async with Rain(house) as rain:
        yield rain


@pytest.fixture
async def browser(chromium: str, rain: Rain) -> AsyncIterator[Browser]:
    """Give the browser; after the test no page has complained about anything unforgiven."""
    del rain  # but the pages close before the weather ends
    async with connected(chromium) as browser:
        yield browser


@asynccontextmanager
async def site(folder: Path, prefix: str = "", **settings: Any) -> AsyncIterator[str]:
    """Run the server, maybe under a prefix of a larger one; yield its address."""
    database = f"sqlite:///{folder}/{secrets.token_hex(4)}.db"
    settings = {**NO_LIMITS, "database_url": database, "secret_key": KEY, **settings}
    app = create_app(Config(**settings))
    if prefix:
        (larger := web.Application()).add_subapp(prefix, app)
        app = larger
    async with serving(app) as url:
        yield url + prefix


@pytest.fixture(scope="module", autouse=True)
def cheap_passwords() -> Iterator[None]:
    """Make a hash cost next to nothing, since many people come here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chatserver, "SCRYPT", "scrypt$2$8$1")
        yield


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Run a server for the tests of the page that need none of their own."""
    async with site(tmp_path_factory.mktemp("page")) as url:
        async with aiohttp.ClientSession() as session:
            await enrol(session, At(url), "owner")  # of the Lobby, as the first one
        yield url


# --- What people do


async def log_in(tab: Tab, user: User, **login: Any) -> None:
    """Let the page find a log-in when it is loaded next."""
    kept = {"token": user.token, "born": time.time() * 1000, "life": 3_600_000, **login}
    name = json.dumps(user.name)
    await tab.js(f"sessionStorage.setItem('{STORE}user', {name})")
    await tab.js(f"localStorage.setItem('{STORE}' + {name} + ' session', `{json.dumps(kept)}`)")


async def enter(browser: Browser, user: User, room: str = "1", url: str = "", **window: Any) -> Tab:
    """Open the page in a window of its own, logged in already, in a room."""
    tab = await find_door(browser, user, room, url, **window)
    await tab.call("Page.reload")
    await online(tab)
    return tab


async def find_door(
    browser: Browser, user: User, room: str = "", url: str = "", **window: Any
) -> Tab:
    """Open the page such that a reload finds a log-in, and maybe a room."""
    tab = await browser.tab(url or user.place.url, **window)
    await log_in(tab, user)
    await tab.js(f"history.replaceState(null, '', '#{room}')")
    return tab


async def is_in(tab: Tab, *states: str, patience: float = 20) -> None:
    """Wait until the page says that it is in one of these states."""
    code = f"{json.dumps(states)}.includes(document.querySelector('#status').dataset.state)"
    await tab.wait(code, patience)


async def online(tab: Tab, patience: float = 20) -> None:
    """Wait until the room is open and live, its history shown."""
    await is_in(tab, "online", "resumed", patience=patience)
    await tab.wait("document.querySelector('.message, #empty:not([hidden])')")


async def say(tab: Tab, text: str) -> None:
    """Type a message and send it with Enter."""
    await tab.js("document.querySelector('#text').focus()")
    await tab.type(text)
    await tab.press("Enter")


def text_of(selector: str) -> str:
    """Return the expression for what an element says."""
    return f"document.querySelector({json.dumps(selector)})?.textContent"


def all_of(selector: str, what: str = "textContent") -> str:
    """Return the expression for what all such elements say, or have."""
    return f"[...document.querySelectorAll({json.dumps(selector)})].map((el) => el.{what})"


TEXTS = all_of("#log .text")
LOG = """[...document.querySelectorAll('#log .message')].map((el) =>
    [el.querySelector('.author').textContent, el.querySelector('.text').textContent])"""
NUMBERS = "[...document.querySelectorAll('#log .message')].map((el) => Number(el.dataset.seq))"
COMPOSER = "document.querySelector('#text').value"
FOCUS = "document.activeElement.id || document.activeElement.className"
VISIBLE = "{ visibilityProperty: true }"


async def shows(tab: Tab, *lines: tuple[User, str]) -> None:
    """Wait until the log has just these messages, and none waits."""
    await tab.equals(LOG, [[user.name, text] for user, text in lines])
    await tab.wait("!document.querySelector('.waiting')")


async def number(tab: Tab, text: str) -> str:
    """Return the selector of the message with this text, once it has a number."""
    code = f"""[...document.querySelectorAll('.message[data-seq]')].find((el) =>
        el.querySelector('.text').textContent === {json.dumps(text)})?.dataset.seq"""
    return f".message[data-seq='{await tab.wait(code)}']"


async def press_button(tab: Tab, scope: str, words: str) -> None:
    """Press the button in a part of the page that says so."""
    find = f"""[...document.querySelectorAll({json.dumps(scope + " button")})]
        .find((el) => el.textContent.trim() === {json.dumps(words)} && el.checkVisibility())"""
    await tab.wait(f"((el) => el && (el.click(), true))({find})")


async def messages(user: User, room: str) -> list[str]:
    """Return what was said in a room, as the server has it."""
    history = await user.ask("GET", f"/rooms/{room}/messages?limit=200")
    return [message["message"] for message in history if "message" in message]


async def has_said(user: User, room: str, *texts: str, patience: float = 20) -> None:
    """Wait until just these messages are in the room's log, in this order."""
    deadline = time.monotonic() + patience
    while (found := await messages(user, room)) != list(texts):
        assert time.monotonic() < deadline, f"{found} instead of {texts}"
        await asyncio.sleep(0.05)


async def create(tab: Tab, kind: str, name: str) -> str:
    """Make a room with the dialog, and return its id."""
    before = await tab.js("location.hash")
    await tab.click("#add")
    await tab.js(
        f"""document.querySelector('#kind').value = {json.dumps(kind)},
        document.querySelector('#kind').onchange()"""
    )
    await tab.fill("#name", name)
    await tab.press("Enter")
    await tab.wait(f"location.hash !== {json.dumps(before)}")
    await online(tab)
    return str(await tab.js("location.hash.slice(1)"))


# --- In the sun


async def test_two_people_register_log_in_and_chat(house: str, browser: Browser) -> None:
    """Two people make accounts and see each other's messages, typing and presence."""
    browser.forgiven = GONE
    alice, bob = (f"{name}-{secrets.token_hex(3)}" for name in ("alice", "bob"))
    tabs = [await browser.tab(house) for _ in "ab"]
    for tab, name in zip(tabs, (alice, bob), strict=True):
        await tab.click("#other-way")
        await tab.fill("#username", name.upper())
        await tab.fill("#email", f"{name}@example.org")
        await tab.fill("#password", PASSWORD)
        await tab.click("#come-in")
        await online(tab)
        assert await tab.js(text_of("#me")) == name
    a, b = tabs
    await tab.equals(text_of("#title"), "Lobby")
    room = await create(a, "public", "Walks")
    await b.js(f"location.hash = '{room}'")
    await b.equals(text_of("#title"), "Walks")
    await online(b)
    await say(a, "Hello Bob")
    await b.equals(TEXTS, ["Hello Bob"])
    await b.click("#text")
    await b.type("Hello")
    await a.equals(text_of("#whispers"), f"{bob} is typing…")
    await b.type(" Alice")
    await b.press("Enter")
    for tab in tabs:
        await tab.equals(LOG, [[alice, "Hello Bob"], [bob, "Hello Alice"]])
        await tab.equals(text_of("#online"), f"2 online: {alice}, {bob}")
    assert await a.js(all_of(".mine .text")) == ["Hello Bob"]
    assert await b.js(all_of(".mine .text")) == ["Hello Alice"]
    await a.click("#account-button")
    await a.click("#logout")
    await a.wait("document.querySelector('#door').checkVisibility()")
    await b.equals(text_of("#online"), f"1 online: {bob}")


async def test_edits_and_deletes_show_in_both_windows(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Each edits and deletes what is theirs, and has no button for what is not."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    a, b = await enter(browser, alice, room), await enter(browser, bob, room)
    await say(a, "Teh first")
    await say(a, "A mistake")
    await shows(b, (alice, "Teh first"), (alice, "A mistake"))
    first, second = await number(a, "Teh first"), await number(a, "A mistake")
    await a.hover(first)
    await a.click(f"{first} .edit")
    await a.fill("#text", "The first")
    await a.press("Enter")
    for tab in (a, b):
        await shows(tab, (alice, "The first"), (alice, "A mistake"))
        await tab.wait(f"document.querySelector(`{first}`).matches('.edited')")
    await a.hover(second)
    await a.click(f"{second} .delete")
    await a.click(f"{second} .sure")
    for tab in (a, b):
        await tab.wait(f"document.querySelector(`{second}`).matches('.deleted')")
        assert "A mistake" not in await tab.js("document.body.innerText")
    await b.hover(first)
    buttons = f"[...document.querySelectorAll(`{first} button`)]"
    assert await b.js(f"{buttons}.filter((el) => el.checkVisibility({VISIBLE}))") == []
    await a.call("Page.reload")
    await online(a)
    await shows(a, (alice, "The first"), (alice, "Message deleted"))


async def test_unread_counts_and_rooms_that_others_made(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Private and direct rooms turn up in the other's list with the number of unread messages."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    a, b = await enter(browser, alice), await enter(browser, bob)
    private = await create(a, "private", "Surprise")
    await say(a, "Only for you")
    await a.click("#about-button")
    await a.fill("#guest", bob.name)
    await a.press("Enter")
    await a.wait(f"document.querySelector(`#people [data-name='{bob.name}']`)")
    await a.press("Escape")
    await say(a, "Do you like it?")
    direct = await create(a, "direct", bob.name)
    assert await a.js(text_of("#title")) == bob.name
    await say(a, "psst")
    waiting = """Object.fromEntries([...document.querySelectorAll('#rooms li')]
        .map((el) => [el.dataset.room, el.querySelector('.badge').textContent]))"""
    await b.wait(f"({waiting})['{private}'] === '1' && ({waiting})['{direct}'] === '1'")
    assert await b.js("document.title") == "(2) Lobby · Chat"
    item = f"#rooms li[data-room='{private}']"
    assert await b.js(f"document.querySelector(`{item}`).className") == "private"
    await b.click(f"{item} a")
    await shows(b, (alice, "Only for you"), (alice, "Do you like it?"))
    await b.equals(f"({waiting})['{private}']", "")
    deadline = time.monotonic() + 5
    while (await bob.ask("GET", f"/rooms/{private}"))["unread"]:
        assert time.monotonic() < deadline, "the server was not told"
        await asyncio.sleep(0.05)
    await b.click(f"#rooms li[data-room='{direct}'] a")
    await b.equals(text_of("#title"), alice.name)
    await shows(b, (alice, "psst"))
    await b.equals("document.title", f"{alice.name} · Chat")


async def test_history_comes_when_one_scrolls_up(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Scrolling up reads the whole history, in order, and what was looked at keeps its place."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    for n in range(180):
        await alice.say(room, f"message {n}")
    tab = await enter(browser, alice, room)
    for _ in range(60):
        # What is under the reader's eyes stays there when older messages come in above it.
        moved = await tab.js("""(async () => {
            const log = document.querySelector('#log'), first = log.firstChild;
            log.scrollTop = 300;
            const seen = document.elementFromPoint(700, 300).closest('.message');
            const place = seen.getBoundingClientRect().top;
            for (let i = 0; i < 50 && log.firstChild === first; i++)
                await new Promise((done) => setTimeout(done, 20));
            return Math.abs(seen.getBoundingClientRect().top - place);
        })()""")
        assert moved <= 1
        if await tab.js("Number(document.querySelector('#log').firstChild.dataset.seq)") == 2:
            break
    await tab.equals(NUMBERS, list(range(2, 182)))
    assert await tab.js("document.querySelector('#log').scrollTop") > 0
    await tab.fill("#search", "message 77")
    await tab.equals(text_of("#found"), "1 found")
    await tab.click("#results li a")
    await tab.equals(text_of(".goal .text"), "message 77")


async def test_people_are_invited_given_roles_removed_and_banned(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Owners and moderators see the buttons that work for them, members see none."""
    browser.forgiven = GONE
    alice, bob, carol = await enrol(session, At(house), "alice", "bob", "carol")
    room = await alice.room(bob, kind="private")
    a, b = await enter(browser, alice, room), await enter(browser, bob, room)

    def row(user: User) -> str:
        return f"#people [data-name='{user.name}']"

    async def offers(tab: Tab, user: User, *buttons: str) -> None:
        """Wait until just these buttons stand beside a name."""
        await tab.equals(all_of(f"{row(user)} button"), list(buttons))

    for tab in (a, b):
        await tab.click("#about-button")
    await offers(b, alice, "Message")
    usable = "['#invite', '#leave-room', '#delete-room'].filter((at) => "
    usable += "document.querySelector(at).checkVisibility())"
    assert await b.js(usable) == ["#leave-room"]
    assert await a.js(usable) == ["#invite", "#delete-room"]
    await offers(a, bob, "Message", "Remove", "Ban")
    await a.js(
        f"""((el) => {{ el.value = 'moderator'; el.onchange(); }})(
        document.querySelector(`{row(bob)} select`))"""
    )
    await b.equals(usable, ["#invite", "#leave-room"])
    await offers(b, alice, "Message")
    await b.fill("#guest", carol.name.upper())
    await b.press("Enter")
    await offers(b, carol, "Message", "Remove", "Ban")
    c = await enter(browser, carol, room)
    await press_button(b, row(carol), "Ban")
    await press_button(b, row(carol), "Really ban?")
    await offers(b, carol, "Lift ban")
    await c.wait(text_of("#notice") + ".includes('no longer in this room')")
    await c.equals(text_of("#title"), "Lobby")
    await b.fill("#guest", carol.name)
    await b.press("Enter")
    await b.wait(text_of("#about .error") + ".includes('banned here')")
    await press_button(b, row(carol), "Lift ban")
    await b.wait(f"!document.querySelector(`{row(carol)}`)")
    await a.wait(f"!document.querySelector(`{row(carol)}`)")
    await press_button(a, row(bob), "Remove")
    await press_button(a, row(bob), "Really remove?")
    await b.wait(text_of("#notice") + ".includes('no longer in this room')")
    await press_button(a, "#about", "Delete this room")
    await press_button(a, "#about", "Really delete it, with all messages?")
    await a.equals(text_of("#title"), "Lobby")


async def test_a_password_is_changed_and_an_account_ended(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """A new password leaves this page logged in; the end of an account needs it."""
    browser.forgiven = GONE
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room(name="Gardening")
    tab = await enter(browser, alice, room)
    await tab.click("#account-button")
    await tab.equals(text_of("#account-email"), f"{alice.name}@example.org")
    await tab.click("#account summary")
    await tab.fill("#old-password", "wrong")
    await tab.fill("#new-password", "a new one")
    with tab.forgiving("status of 403"):
        await tab.press("Enter")
        await tab.equals(text_of("#change-password .error"), "Wrong password.")
    await tab.fill("#old-password", PASSWORD)
    await tab.press("Enter")
    await tab.wait(text_of("#notice") + ".includes('password is changed')")
    await online(tab)
    assert not await tab.js("document.querySelector('#again').checkVisibility()")
    await say(tab, "still here")
    await number(tab, "still here")
    await tab.click("#account-button")
    await tab.click("#account details:last-of-type summary")
    await tab.fill("#last-password", "a new one")
    with tab.forgiving("status of 409"):
        await tab.press("Enter")
        await tab.wait(text_of("#end-account .error"))
    # The server speaks of ids, the page of the names that it shows.
    wanted = "First give “Gardening” another owner, or delete what nobody needs."
    await tab.equals(text_of("#end-account .error"), wanted)
    await tab.press("Escape")
    await tab.click("#about-button")
    await press_button(tab, "#about", "Delete this room")
    await press_button(tab, "#about", "Really delete it, with all messages?")
    await tab.equals(text_of("#title"), "Lobby")
    await tab.click("#account-button")
    await tab.click("#account details:last-of-type summary")
    await tab.fill("#last-password", "a new one")
    await tab.press("Enter")
    await tab.equals(text_of("#door .error"), "Your account has ended.")
    kept = "Object.keys(localStorage).filter((key) => !key.endsWith(' session'))"
    assert await tab.js(kept) == []


# --- In the rain: a dead line


async def test_a_line_that_falls_silent_is_noticed(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Within 60 s the page knows, says so, and shows what it missed: busy, quiet, or typing."""
    browser.forgiven = BAD_WEATHER
    alice, bob = await enrol(session, At(house), "alice", "bob")
    busy, quiet, typed = [await alice.room(bob) for _ in range(3)]
    tabs = {room: await enter(browser, alice, room, rain.url) for room in (busy, quiet, typed)}
    for room in (busy, typed):
        await bob.say(room, "heard")
        await tabs[room].equals(TEXTS, ["heard"])
    assert rain.silence() == 3
    begun = time.monotonic()
    for n in range(3):
        await bob.say(busy, f"missed {n}")
    await bob.say(typed, "missed")
    await asyncio.sleep(6)  # the time in which one types nothing
    await tabs[typed].click("#text")
    await tabs[typed].type("are you there?")
    await tabs[typed].equals(TEXTS, ["heard", "missed"], 10)
    assert await tabs[typed].js(COMPOSER) == "are you there?"
    await tabs[busy].equals(TEXTS, ["heard", "missed 0", "missed 1", "missed 2"], 25)
    for tab in tabs.values():
        await is_in(tab, "resumed", patience=50)
        assert "Back online" in await tab.js(text_of("#status"))
    assert time.monotonic() - begun < 60
    await bob.say(quiet, "and on it goes")
    await tabs[quiet].equals(TEXTS, ["and on it goes"])


async def test_coming_back_to_the_tab_finds_a_dead_line(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """After a sleep one need not wait for the clock."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    tab = await enter(browser, alice, room, rain.url)
    assert rain.silence() == 1
    await bob.say(room, "missed")
    await asyncio.sleep(2.5)  # the sleep
    begun = time.monotonic()
    await tab.js("document.onvisibilitychange()")
    await tab.equals(TEXTS, ["missed"], 9)
    assert time.monotonic() - begun < 9


async def test_an_upgrade_that_nobody_answers_is_given_up(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """History shows at once; after 10 s the page tries again, and is live once that works."""
    browser.forgiven = BAD_WEATHER
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    await bob.say(room, "before")
    rain.upgrades = "hang"
    tab = await find_door(browser, alice, room, rain.url)
    await tab.call("Page.reload")
    await tab.equals(TEXTS, ["before"])
    assert await tab.js("document.querySelector('#status').dataset.state") == "connecting"
    rain.upgrades = "pass"
    await online(tab, 16)
    await bob.say(room, "after")
    await tab.equals(TEXTS, ["before", "after"], 2)


async def test_where_websockets_are_refused_one_can_chat_all_the_same(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """The page says so, shows history and news every few seconds, and sends."""
    browser.forgiven = BAD_WEATHER
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    await bob.say(room, "before")
    rain.refuse_upgrades()
    tab = await find_door(browser, alice, room, rain.url)
    await tab.call("Page.reload")
    await is_in(tab, "blocked")
    assert "No live connection" in await tab.js(text_of("#status"))
    await say(tab, "mine")
    await shows(tab, (bob, "before"), (alice, "mine"))
    event = await bob.say(room, "theirs")
    await tab.equals(TEXTS, ["before", "mine", "theirs"], 8)
    await bob.ask("PATCH", f"/rooms/{room}/messages/{event['seq']}", {"message": "edited"})
    await tab.equals(TEXTS, ["before", "mine", "edited"], 8)


# --- In the rain: the outbox


async def test_what_was_written_offline_arrives_in_order(
    tmp_path: Path, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """30 written offline, one in another room, one after the return, slowed by the rate limit."""
    browser.forgiven = BAD_WEATHER
    async with site(tmp_path, messages_per_second=10) as url, Rain(url) as rain:
        alice, bob = await enrol(session, At(url), "alice", "bob")
        room, other = await bob.room(alice, kind="private"), await bob.room(alice, kind="private")
        tab = await enter(browser, alice, room, rain.url)
        rain.away = True
        written = [f"line {n}" for n in range(30)]
        for text in written:
            await say(tab, text)
        await tab.wait(text_of("#status") + ".includes('30 messages wait')")
        await tab.equals("document.querySelectorAll('.waiting').length", 30)
        await tab.equals(text_of(".waiting .note"), "Waiting to be sent")
        await tab.js(f"location.hash = '{other}'")
        await say(tab, "elsewhere")
        await tab.equals(text_of("#unsent-summary"), "31 waiting")
        await tab.js(f"location.hash = '{room}'")
        rain.away = False
        await tab.js("ononline()")
        await say(tab, "after the return")
        await has_said(bob, room, *written, "after the return")
        await has_said(bob, other, "elsewhere")
        await tab.equals(TEXTS, [*written, "after the return"])
        await tab.wait("!document.querySelector('.waiting')")
        await tab.wait("!document.querySelector('#unsent-summary').checkVisibility()")
        await browser.close()


async def test_the_outbox_survives_a_closed_tab(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """What waited in a tab that was closed is sent by the next one, and just once."""
    browser.forgiven = BAD_WEATHER
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room, other = await alice.room(), await alice.room()
    tab = await enter(browser, alice, room, rain.url)
    blank = await find_door(browser, bob, url=rain.url, beside=tab)
    rain.away = True
    await say(tab, "one")
    await tab.js(f"location.hash = '{other}'")
    await say(tab, "two")
    await tab.wait("document.querySelector('.waiting')")
    await tab.js("location.hash = '1'")
    await tab.close()
    rain.away = False
    rain.lose_answers = 2  # it is stored, but we do not hear of it: sent again, stored once
    await log_in(blank, alice)
    await blank.call("Page.reload")
    await online(blank)
    assert await blank.js("location.hash") == "#1"
    await has_said(alice, room, "one")
    await has_said(alice, other, "two")
    await blank.wait("!document.querySelector('#unsent-summary').checkVisibility()")
    assert rain.lose_answers == 0
    await has_said(alice, room, "one")


async def test_what_is_refused_says_why_and_touches_no_neighbour(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Of "before", 70,000 letters, "after" the middle one waits for its author to mend it."""
    browser.forgiven = f"{BAD_WEATHER}|status of 400|status of 413"
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    tab = await enter(browser, alice, room, rain.url)
    rain.away = True
    for text in ("before", "w" * 70_000, "x" * 5000, "after"):
        await say(tab, text)
    rain.away = False
    await tab.js("ononline()")
    await has_said(alice, room, "before", "after")
    await tab.equals("document.querySelectorAll('.message.refused').length", 2)
    reasons = await tab.js(all_of(".refused .note"))
    assert reasons[0].startswith("Not sent: This is too long.")
    assert reasons[1].startswith("Not sent: The message is over 4000 characters.")
    await tab.equals(text_of("#unsent-summary"), "2 not sent")
    await tab.click("#text")
    await tab.type("a draft")
    await press_button(tab, ".message.refused:not(.refused ~ .refused)", "Throw away")
    await tab.equals("document.querySelectorAll('.message.refused').length", 1)
    await tab.call("Page.reload")
    await online(tab)
    await press_button(tab, ".message.refused", "Mend")
    await tab.equals(f"{COMPOSER}.length", 5000)
    await tab.fill("#text", "shorter")
    await tab.press("Enter")
    await tab.equals(COMPOSER, "a draft")
    await has_said(alice, room, "before", "after", "shorter")
    await tab.wait("!document.querySelector('.message.refused')")


async def test_a_draft_stays_in_its_room(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Each room has its draft, over reloads too; editing gives it back afterwards."""
    (alice,) = await enrol(session, At(house), "alice")
    room, other = await alice.room(), await alice.room()
    await alice.say(room, "Teh message")
    tab = await enter(browser, alice, room)
    await tab.click("#text")
    await tab.type("a draft here")
    await tab.js(f"location.hash = '{other}'")
    await tab.equals(COMPOSER, "")
    await tab.type("a draft there")
    await tab.js(f"location.hash = '{room}'")
    await tab.equals(COMPOSER, "a draft here")
    await tab.hover(await number(tab, "Teh message"))
    await tab.click(".edit")
    await tab.equals(COMPOSER, "Teh message")
    await tab.fill("#text", "The message")
    await tab.call("Page.reload")
    await online(tab)
    await tab.equals(COMPOSER, "The message")
    await tab.click("#text")
    await tab.press("Enter")
    await shows(tab, (alice, "The message"))
    await tab.equals(COMPOSER, "a draft here")
    await tab.js(f"location.hash = '{other}'")
    await tab.equals(COMPOSER, "a draft there")


async def test_what_is_typed_outlives_the_message_that_was_edited(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """When a moderator deletes a message while its author edits it, the text becomes a draft."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await bob.room(alice)
    event = await alice.say(room, "Teh message")
    tab = await enter(browser, alice, room)
    await tab.press("ArrowUp")
    await tab.fill("#text", "The message, and more")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{event['seq']}")
    await tab.equals(TEXTS, ["Message deleted"])
    await tab.wait("!document.querySelector('#editing').checkVisibility()")
    assert await tab.js(COMPOSER) == "The message, and more"


async def test_an_edit_that_was_made_offline_waits_as_well(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """An edit is shown where its message is, as waiting, and goes out with the others."""
    browser.forgiven = BAD_WEATHER
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    await alice.say(room, "Teh message")
    tab = await enter(browser, alice, room, rain.url)
    rain.away = True
    await tab.press("ArrowUp")
    await tab.equals(COMPOSER, "Teh message")
    await tab.fill("#text", "The message")
    await tab.press("Enter")
    await say(tab, "and another")
    await tab.equals(TEXTS, ["The message", "and another"])
    await tab.equals("document.querySelectorAll('.waiting').length", 2)
    rain.away = False
    await tab.js("ononline()")
    await shows(tab, (alice, "The message"), (alice, "and another"))
    history = await alice.ask("GET", f"/rooms/{room}/messages")
    assert [each["message"] for each in history] == ["The message", "and another"]


async def test_two_tabs_lose_nothing_of_each_other(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """What both wrote offline is sent once, in the order in which it was written."""
    browser.forgiven = BAD_WEATHER
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    one = await enter(browser, alice, room, rain.url)
    two = await enter(browser, alice, room, rain.url, beside=one)
    rain.away = True
    for tab, text in ((one, "1"), (two, "2"), (two, "3"), (one, "4")):
        await say(tab, text)
    for tab in (one, two):
        await tab.equals(TEXTS, ["1", "2", "3", "4"])
    rain.away = False
    for tab in (one, two):
        await tab.js("ononline()")
    await has_said(alice, room, "1", "2", "3", "4")
    for tab in (one, two):
        await online(tab)
        await shows(tab, *[(alice, text) for text in "1234"])
    await has_said(alice, room, "1", "2", "3", "4")


async def test_a_portal_in_between_is_not_taken_for_the_server(
    house: str, rain: Rain, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Where somebody else's page answers "200" to everything, a message is not taken as sent."""
    browser.forgiven = BAD_WEATHER
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    tab = await enter(browser, alice, room, rain.url)
    rain.open_portal()
    await say(tab, "on the train")
    await tab.wait(text_of("#status") + ".includes('1 message waits')")
    assert await messages(alice, room) == []
    rain.portal = False
    await tab.js("ononline()")
    await has_said(alice, room, "on the train")
    await online(tab)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
async def test_both_resume_when_the_server_restarts(
    tmp_path: Path, browser: Browser, session: aiohttp.ClientSession, how: str
) -> None:
    """Nothing is missing or doubled afterwards, nor what was typed while the server was down."""
    database = f"sqlite:///{tmp_path}/chat.db"
    browser.forgiven = BAD_WEATHER
    settings: dict[str, Any] = {**NO_LIMITS, "database_url": database, "secret_key": KEY}
    process = await Process(tmp_path, host="127.0.0.1", port=0, **settings).ready()
    process.environment["PORT"] = process.url.rpartition(":")[2]
    try:
        alice, bob = await enrol(session, At(process.url), "alice", "bob")
        a, b = await enter(browser, alice), await enter(browser, bob)
        await say(a, "one")
        await b.equals(TEXTS, ["one"])
        if how == "SIGTERM":
            assert await process.end() == 0
        else:
            process.kill()
        for tab in (a, b):
            await is_in(tab, "lost")
        await say(a, "while it was down")
        await say(b, "while it was down, too")
        await say(a, "still down")
        for tab in (a, b):
            await tab.wait("document.querySelector('.waiting')")
        process.start()
        await process.ready()
        for tab in (a, b):
            await is_in(tab, "resumed", patience=30)
            await tab.equals(f"{TEXTS}.length", 4)
            await tab.wait("!document.querySelector('.waiting')")
        await say(b, "after all")
        await a.equals(f"{TEXTS}.length", 5)
        history = await alice.ask("GET", "/rooms/1/messages")
        theirs = [each["message"] for each in history if each["username"] == alice.name]
        assert theirs == ["one", "while it was down", "still down"]
        for tab in (a, b):
            await tab.equals(LOG, [[each["username"], each["message"]] for each in history])
            await tab.equals(NUMBERS, [each["seq"] for each in history])
        assert await process.end() == 0
    finally:
        process.kill()


# --- The session


async def test_the_log_in_is_renewed_while_the_page_is_used(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """A token that ends in some seconds is no reason to log in again."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    now = int(time.time())
    claims = jwt.decode(alice.token, KEY, ["HS256"]) | {"iat": now, "exp": now + 9}
    short = alice._replace(token=jwt.encode(claims, KEY, "HS256"))
    tab = await find_door(browser, short, room)
    await log_in(tab, short, life=9000)
    await tab.call("Page.reload")
    await online(tab)
    kept = f"JSON.parse(localStorage.getItem('{STORE}{alice.name} session'))"
    await tab.wait(f"{kept}.life > 9000")
    await asyncio.sleep(max(0, now + 10.5 - time.time()))  # until the first token has ended
    await online(tab)
    assert "Back online" not in await tab.js(text_of("#status"))
    await say(tab, "still here")
    await shows(tab, (alice, "still here"))


async def test_the_end_of_a_session_takes_nothing_away(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """The focus stays where one types, what is sent waits, and the password is all it takes."""
    browser.forgiven = BAD_WEATHER
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    await bob.say(room, "hello")
    tab = await enter(browser, alice, room)
    await tab.click("#text")
    await tab.type("in the middle of a ")
    await alice.ask("POST", "/auth/logout")
    await tab.wait("document.querySelector('#again').checkVisibility()")
    assert await tab.js(FOCUS) == "text"
    await tab.type("sentence")
    await tab.press("Enter")
    await tab.type("the next")
    await tab.equals(TEXTS, ["hello", "in the middle of a sentence"])
    await tab.call("Page.reload")
    await tab.wait("document.querySelector('#door').checkVisibility()")
    assert await tab.js("document.querySelector('#username').value") == alice.name
    await tab.fill("#password", PASSWORD)
    await tab.press("Enter")
    await online(tab)
    await shows(tab, (bob, "hello"), (alice, "in the middle of a sentence"))
    await tab.equals(COMPOSER, "the next")
    token = f"JSON.parse(localStorage.getItem('{STORE}{alice.name} session')).token"
    await alice._replace(token=await tab.js(token)).ask("POST", "/auth/logout")
    await tab.wait("document.querySelector('#again').checkVisibility()")
    await tab.fill("#again-password", PASSWORD)
    await tab.press("Enter")
    await online(tab)
    await tab.equals(FOCUS, "text")
    await tab.press("Enter")
    await tab.equals(f"{TEXTS}.length", 3)
    await tab.wait("!document.querySelector('.waiting')")
    await bob.say(room, "and on")
    await tab.equals(TEXTS, ["hello", "in the middle of a sentence", "the next", "and on"])


async def test_a_log_in_that_has_ended_meanwhile_leads_to_the_door(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Who comes back too late finds their name at the door, and behind it the room."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room(name="Gardening")
    tab = await find_door(browser, alice, room)
    await alice.ask("POST", "/auth/logout")
    browser.forgiven = GONE
    await tab.call("Page.reload")
    await tab.equals(text_of("#door .error"), "Your log-in has ended. Log in again to go on.")
    assert await tab.js("document.querySelector('#username').value") == alice.name
    await tab.equals(FOCUS, "password")
    await tab.type(PASSWORD)
    await tab.press("Enter")
    await online(tab)
    await tab.equals(text_of("#title"), "Gardening")


async def test_two_tabs_agree_on_what_is_read_and_on_the_end(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """What is read in one tab is read in the other at once; a log-out leads both to the door."""
    browser.forgiven = GONE
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room, other = await bob.room(alice), await bob.room(alice)
    one = await enter(browser, alice, other)
    two = await enter(browser, alice, other, beside=one)
    for text in ("1", "2"):
        await bob.say(room, text)
    for tab in (one, two):
        await tab.wait("document.title.startsWith('(2) ')")
    await one.js(f"location.hash = '{room}'")
    await one.equals(TEXTS, ["1", "2"])
    for tab in (one, two):
        await tab.wait("!document.title.startsWith('(')", 3)
    await one.click("#account-button")
    await one.click("#logout")
    for tab in (one, two):
        await tab.wait("document.querySelector('#door').checkVisibility()")


async def test_two_people_can_sit_in_two_tabs(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Who logs in in another tab changes nothing in this one."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob)
    a = await enter(browser, alice, room)
    b = await enter(browser, bob, room, beside=a)
    for tab, name in ((a, alice.name), (b, bob.name)):
        await tab.call("Page.reload")
        await online(tab)
        await tab.equals(text_of("#me"), name)
    await say(a, "who is there?")
    await shows(b, (alice, "who is there?"))
    await say(b, "it is me")
    await shows(b, (alice, "who is there?"), (bob, "it is me"))


# --- Every language


async def test_each_text_runs_in_its_own_direction(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Hebrew, Arabic and Persian run from the right, also beside English, also while typed."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room(name="חדר")
    tab = await enter(browser, alice, room)
    texts = {
        "שלום world": "rtl",
        "مرحبا": "rtl",
        "سلام، چطوری؟": "rtl",
        "hello עולם": "ltr",
        "123 שלום": "rtl",
    }

    def direction(selector: str) -> str:
        return f"getComputedStyle([...document.querySelectorAll('{selector}')].at(-1)).direction"

    for text, way in texts.items():
        await tab.click("#text")
        await tab.type(text)
        await tab.equals(direction("#text"), way)
        await tab.press("Enter")
        await number(tab, text)
        await tab.equals(direction("#log .text"), way)
    await tab.equals(direction("#title"), "rtl")
    sides = """[...document.querySelectorAll('#log .text')].slice(0, 4).map((el) => {
        const range = document.createRange(), box = el.getBoundingClientRect();
        range.selectNodeContents(el);
        return range.getBoundingClientRect().right > box.right - 2 ? 'right' : 'left';
    })"""
    assert await tab.js(sides) == ["right", "right", "right", "left"]


LINKS = {
    "see https://en.wikipedia.org/wiki/Ergo_(IRC)": ["https://en.wikipedia.org/wiki/Ergo_(IRC)"],
    "(see https://en.wikipedia.org/wiki/Ergo_(IRC))": ["https://en.wikipedia.org/wiki/Ergo_(IRC)"],
    "(https://example.org/a)": ["https://example.org/a"],
    "[https://example.org/a[1]], so": ["https://example.org/a[1]"],
    "https://example.org/a. Then": ["https://example.org/a"],
    "https://example.org/a?!": ["https://example.org/a"],
    "見て https://example.org/路。そして": ["https://example.org/路"],
    "「https://example.org/a」": ["https://example.org/a"],
    "看https://example.org/a，然后": ["https://example.org/a"],
    "هل https://example.org/a؟": ["https://example.org/a"],
    "HTTPS://Example.ORG/A and Http://example.org": ["HTTPS://Example.ORG/A", "Http://example.org"],
    '"https://example.org/a" “https://example.org/b”': [
        "https://example.org/a",
        "https://example.org/b",
    ],
    "https://example.org/?q=a&b=c#d;": ["https://example.org/?q=a&b=c#d"],
    "https:// is no link, nor is https://( or javascript:alert(1)": [],
}


async def test_links_end_where_people_mean(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Brackets that were opened belong to a link, punctuation of any script does not."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    for text in LINKS:
        await alice.say(room, text)
    tab = await enter(browser, alice, room)
    await tab.equals(TEXTS, list(LINKS))
    found = """[...document.querySelectorAll('#log .text')].map((el) =>
        [...el.querySelectorAll('a')].map((link) => link.textContent))"""
    assert await tab.js(found) == list(LINKS.values())


async def test_any_room_name_works_twice_and_after_a_deletion(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """A name of any script can be given again and again."""
    browser.forgiven = GONE
    (alice,) = await enrol(session, At(house), "alice")
    tab = await enter(browser, alice)
    rooms = []
    for name in ("会议室", "会议室", "Café & Bar!", "Café & Bar!", "חדר"):
        rooms.append(await create(tab, "private", name))
        await tab.equals(text_of("#title"), name)
    assert len(set(rooms)) == 5
    await tab.click("#about-button")
    await press_button(tab, "#about", "Delete this room")
    await press_button(tab, "#about", "Really delete it, with all messages?")
    await tab.equals(text_of("#title"), "Lobby")
    await tab.equals(text_of("#notice"), "This room was deleted.")
    await create(tab, "private", "חדר")
    await tab.equals(text_of("#title"), "חדר")


async def test_nobody_is_told_of_anothers_private_room(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """The page says the same of a room that is not there and of one that is not open to one."""
    alice, eve = await enrol(session, At(house), "alice", "eve")
    room = await alice.room(kind="private", name="Secret plans")
    await alice.say(room, "a secret")
    tab = await enter(browser, eve)
    for address in (room, "there-is-no-such-room"):
        await tab.js("document.querySelector('#notice').replaceChildren()")
        with tab.forgiving("status of 40[34]"):
            await tab.js(f"location.hash = '{address}'")
            await tab.wait(text_of("#notice"))
        words = "There is no such room, or it is not open to you."
        await tab.equals(text_of("#notice"), words)
        await tab.equals(text_of("#title"), "Lobby")
        await online(tab)
    assert "ecret" not in await tab.js("document.body.innerText")


# --- Text that would like to be more


EVIL = (
    "<img src=x onerror=window.owned=1>",
    "<script>window.owned=2</script>",
    "\"'><svg/onload=window.owned=3>",
    "javascript:window.owned=4 https://example.org/?<b>\"onclick='window.owned=5'",
)
HARMLESS = """window.owned === undefined && !document.body.querySelector('img, svg, iframe, object')
    && document.scripts.length === 1
    && [...document.querySelectorAll('main a[target], #results a')]
        .every((el) => /^https?:/.test(el.href))"""


async def test_what_people_write_stays_text(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """HTML in a message or a name is shown as it was typed: live, edited, later and when found."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await alice.room(bob, name=EVIL[0])
    a, b = await enter(browser, alice, room), await enter(browser, bob, room)
    for text in EVIL:
        await say(a, text)
    await shows(b, *[(alice, text) for text in EVIL])
    seq = (await b.js(NUMBERS))[0]
    await alice.ask("PATCH", f"/rooms/{room}/messages/{seq}", {"message": EVIL[1]})
    await b.fill("#search", "owned=")
    await b.wait("document.querySelectorAll('#results li').length >= 4")
    assert set(await b.js(all_of("#results .text"))) == set(EVIL[1:])
    for tab in (a, b):
        await shows(tab, (alice, EVIL[1]), *[(alice, text) for text in EVIL[1:]])
        await tab.equals(text_of("#title"), EVIL[0])
        assert await tab.js(HARMLESS)


async def test_the_page_runs_no_script_but_its_own(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Even HTML that got into the page runs nothing, and the console would have told us."""
    (alice,) = await enrol(session, At(house), "alice")
    tab = await enter(browser, alice)
    with tab.forgiving("Content Security Policy") as refused:
        await tab.js("""(() => {
            const script = document.createElement('script');
            script.textContent = 'window.owned = 1';
            document.body.append(script);
            const place = document.body.appendChild(document.createElement('div'));
            place.innerHTML = '<img src="data:," onerror="window.owned = 2"><b style="top: 0"></b>';
            return new Promise((done) => setTimeout(done, 100));
        })()""")
    assert len(refused) == 3, refused
    assert await tab.js("window.owned") is None


# --- The door


async def test_a_wrong_password_is_told(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """The form says why it did not work, keeps the name, and lets one try again."""
    (alice,) = await enrol(session, At(house), "alice")
    tab = await browser.tab(house)
    await tab.fill("#username", alice.name)
    await tab.fill("#password", "wrong")
    with tab.forgiving("status of 400") as refused:
        await tab.click("#come-in")
        await tab.equals(text_of("#door .error"), "Wrong name or password.")
        await tab.click("#other-way")
        await tab.fill("#email", f"{alice.name}@example.org")
        await tab.fill("#username", "ä")
        await tab.click("#come-in")
        await tab.wait(text_of("#door .error") + ".startsWith('The name should be 2 to 32')")
    assert len(refused) == 2
    await tab.fill("#username", alice.name)
    with tab.forgiving("status of 409"):
        await tab.click("#come-in")
        await tab.wait(text_of("#door .error") + ".includes('taken')")
    await tab.click("#other-way")
    await tab.fill("#username", f" {alice.name}@example.org ")
    await tab.fill("#password", PASSWORD)
    await tab.click("#come-in")
    await online(tab)
    assert await tab.js("document.querySelector('#password').value") == ""


async def test_who_is_too_fast_is_told_how_long_to_wait(tmp_path: Path, browser: Browser) -> None:
    """Registering too often says how many seconds to wait; a lost network, what to do."""
    browser.forgiven = BAD_WEATHER
    async with site(tmp_path, registrations_per_hour=1) as url, Rain(url) as rain:
        tab = await browser.tab(rain.url)
        await tab.click("#other-way")
        await tab.fill("#username", "alice")
        await tab.fill("#email", "alice@example.org")
        await tab.fill("#password", PASSWORD)
        await tab.press("Enter")
        await online(tab)
        other = await browser.tab(rain.url)
        await other.click("#other-way")
        await other.fill("#username", "bob")
        await other.fill("#email", "bob@example.org")
        await other.fill("#password", PASSWORD)
        await other.press("Enter")
        await other.wait(text_of("#door .error"))
        words = str(await other.js(text_of("#door .error")))
        assert words.startswith("Too many registrations, wait "), words
        assert words.endswith(" seconds, then try again."), words
        rain.away = True
        await other.press("Enter")
        words = "The server cannot be reached. Check the network, then try again."
        await other.equals(text_of("#door .error"), words)
        await tab.fill("#search", "something")
        await tab.equals(text_of("#found"), words)
        await browser.close()


async def test_one_lands_where_one_was(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """At first that is the Lobby, whatever the other rooms are called; later the last room."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room = await bob.room(alice, name="AAA")
    tab = await find_door(browser, alice)
    await tab.call("Page.reload")
    await online(tab)
    assert await tab.js(text_of("#title")) == "Lobby"
    await tab.click(f"[data-room='{room}'] a")
    await tab.equals(text_of("#title"), "AAA")
    await tab.js("history.replaceState(null, '', '#')")
    await tab.call("Page.reload")
    await online(tab)
    assert await tab.js(text_of("#title")) == "AAA"


async def test_the_page_works_under_a_prefix(tmp_path: Path, browser: Browser) -> None:
    """Behind a path of a larger site all is as it is without, under the same strict policy."""
    async with site(tmp_path, "/team/chat") as url:
        tab = await browser.tab(f"{url}/")
        await tab.click("#other-way")
        await tab.fill("#username", "alice")
        await tab.fill("#email", "alice@example.org")
        await tab.fill("#password", PASSWORD)
        await tab.press("Enter")
        await online(tab)
        await say(tab, "hello")
        await number(tab, "hello")
        await browser.close()


# --- Everybody's page


async def test_the_keyboard_alone_is_enough(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """Without a mouse one logs in, sends, edits, deletes and changes the room."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    tab = await browser.tab(f"{house}/#{room}")
    await tab.equals(FOCUS, "username")
    await tab.type(alice.name)
    await tab.press("Tab")
    await tab.equals(FOCUS, "password")
    await tab.type(PASSWORD)
    await tab.press("Enter")
    await online(tab)
    await tab.equals(FOCUS, "text")
    for text in ("one", "two"):
        await tab.type(text)
        await tab.press("Enter")
    await shows(tab, (alice, "one"), (alice, "two"))
    await tab.press("ArrowUp")
    await tab.type(" and a half")
    await tab.press("Enter")
    await shows(tab, (alice, "one"), (alice, "two and a half"))
    await tab.type("first")
    await tab.press("Enter", shift=True)
    await tab.type("second")
    await tab.press("Enter")
    await shows(tab, (alice, "one"), (alice, "two and a half"), (alice, "first\nsecond"))
    await tab.press("Tab", shift=True)
    await tab.equals(FOCUS, "log")
    for _ in range(3):
        await tab.press("ArrowUp")
    await tab.equals("document.activeElement.querySelector('.text').textContent", "one")
    for stop in ("edit", "delete"):
        await tab.press("Tab")
        await tab.equals(FOCUS, stop)
    await tab.press("Enter")
    await tab.press("Enter")
    await tab.equals(f"{TEXTS}[0]", "Message deleted")
    for _ in range(60):
        if await tab.js("document.activeElement.closest('[data-room=\"1\"]')"):
            break
        assert await tab.js("document.activeElement.matches(':focus-visible')")
        await tab.press("Tab", shift=True)
    await tab.press("Enter")
    await tab.equals(text_of("#title"), "Lobby")
    await tab.equals(FOCUS, "text")


async def test_a_phone_shows_everything(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """At 390 x 844 nothing is wider than the screen, a finger is enough, Enter makes a line."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room(name="m" * 100)
    for text in ("w" * 500, "https://example.org/" + "x" * 500, "Teh end"):
        await alice.say(room, text)

    async def fits() -> None:
        """Check that neither the page nor what scrolls in it is cut off on the right."""
        parts = "[document.documentElement, ...document.querySelectorAll('#log, #lists, dialog')]"
        assert await tab.js("innerWidth") == 390
        assert await tab.js(f"{parts}.filter((el) => el.scrollWidth > el.clientWidth)") == []

    tab = await browser.tab(house, 390, 844, phone=True)
    await tab.wait("!document.querySelector('#door').hidden")
    await fits()
    await log_in(tab, alice)
    await tab.call("Page.reload")
    await online(tab)
    await tab.tap("#back")
    await tab.wait("document.querySelector('nav').checkVisibility()")
    await fits()
    for button, dialog in (("#add", "#new"), ("#account-button", "#account")):
        await tab.tap(button)
        await tab.wait(f"document.querySelector('{dialog}').open")
        await fits()
        await tab.tap(f"{dialog} .close")
    await tab.tap(f"[data-room='{room}'] a")
    await tab.equals(f"{TEXTS}.length", 3)
    await fits()
    last = await number(tab, "Teh end")
    await tab.tap(last)
    await tab.tap(f"{last} .edit")
    await tab.fill("#text", "The end")
    await tab.press("Enter")
    await tab.type("of it")
    await tab.equals(COMPOSER, "The end\nof it")
    await tab.tap("#send")
    await number(tab, "The end\nof it")
    await tab.equals(FOCUS, "text")
    await tab.tap("#about-button")
    await tab.wait("document.querySelector('#people li')")
    await fits()


async def test_the_composer_grows_and_nothing_else_scrolls(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """The composer has no scrollbar until it is a third of the page; lists have no bullets."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    await alice.say(room, "a message")
    tab = await enter(browser, alice, room)
    heights = []
    for _ in range(3):
        await tab.type("a line")
        await tab.press("Enter", shift=True)
        heights.append(await tab.js("document.querySelector('#text').offsetHeight"))
        style = "getComputedStyle(document.querySelector('#text')).overflowY"
        assert await tab.js(style) == "hidden"
    assert heights == sorted(set(heights)), heights
    await tab.type("line\n" * 60)
    assert await tab.js("document.querySelector('#text').offsetHeight < innerHeight * 0.36")
    assert await tab.js(style) == "auto"
    await tab.js("document.querySelector('#text').select()")
    await tab.type("short again")
    assert await tab.js(style) == "hidden"
    scrolling = """[...document.querySelectorAll('*')].filter((el) => el.checkVisibility()
        && /auto|scroll/.test(getComputedStyle(el).overflowY)
        && el.scrollHeight > el.clientHeight).map((el) => el.id)"""
    assert set(await tab.js(scrolling)) <= {"lists"}  # the shared server has many rooms
    for part in ("#rooms", "#results", "#people"):
        style = f"getComputedStyle(document.querySelector('{part}')).listStyleType"
        assert await tab.js(style) == "none"


async def test_a_screen_reader_finds_a_name_for_everything(
    house: str, browser: Browser, session: aiohttp.ClientSession
) -> None:
    """What can be used has a name; a message is author, time and text, one after another."""
    (alice,) = await enrol(session, At(house), "alice")
    room = await alice.room()
    await alice.say(room, "Hello")
    usable = {"textbox", "searchbox", "combobox", "button", "link", "log", "navigation", "dialog"}

    async def nodes() -> list[dict[str, Any]]:
        """Return what a screen reader is told."""
        found = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        return [node for node in found if not node["ignored"]]

    async def names() -> list[tuple[str, str]]:
        """Return the roles and names of what can be used."""
        found = [(node["role"]["value"], node.get("name", {})) for node in await nodes()]
        return [(role, name.get("value", "")) for role, name in found if role in usable]

    tab = await browser.tab(house)
    await tab.wait("!document.querySelector('#door').hidden")
    door = await names()
    tab = await enter(browser, alice, room)
    chat = await names()
    by_id = {node["nodeId"]: node for node in await nodes()}
    (article,) = [node for node in by_id.values() if node["role"]["value"] == "article"]
    parts = [by_id[child] for child in article["childIds"] if child in by_id]
    parts = [part for part in parts if part["role"]["value"] == "paragraph"]
    texts = []
    for part in parts:
        leaves = [part]
        while leaves[0]["role"]["value"] != "StaticText":
            leaves = [by_id[child] for child in leaves[0]["childIds"] if child in by_id]
        texts.append(leaves[0]["name"]["value"])
    assert len(texts) == 3
    assert (texts[0], texts[2]) == (alice.name, "Hello")
    await tab.click("#add")
    dialogs = await names()
    await tab.press("Escape")
    await tab.click("#about-button")
    await tab.wait("document.querySelector('#people li')")
    dialogs += await names()
    await tab.press("Escape")
    await tab.click("#account-button")
    dialogs += await names()
    assert {("textbox", "Name or e-mail"), ("textbox", "Password")} <= set(door)
    assert {("log", "Messages"), ("textbox", "Message"), ("searchbox", "Search messages")} <= set(
        chat
    )
    assert {"dialog", "combobox", "textbox", "button"} <= {role for role, _ in dialogs}
    assert [(role, name) for role, name in door + chat + dialogs if not name.strip()] == []
    attributes = "['#log', '#status', '#notice'].map((at) => document.querySelector(at).role)"
    assert await tab.js(attributes) == ["log", "status", "alert"]
    assert await tab.js("document.documentElement.lang") == "en"


CONTRAST = """(() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => parse(colour).slice(0, 3).map((x) => x / 255)
        .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (el) => {
        while (el && parse(getComputedStyle(el).backgroundColor)[3] === 0) el = el.parentElement;
        return light(getComputedStyle(el ?? document.body).backgroundColor);
    };
    const ratio = (el) => {
        const [dim, bright] = [light(getComputedStyle(el).color), ground(el)].sort((a, b) => a - b);
        return (bright + 0.05) / (dim + 0.05);
    };
    const texts = [...document.querySelectorAll('body *')].filter((el) => el.checkVisibility()
        && [...el.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return [texts.length, texts.filter((el) => ratio(el) < 4.5).map((el) => el.outerHTML)];
})()"""


@pytest.mark.parametrize("dark", [False, True])
async def test_the_colours_are_far_enough_apart(
    house: str, browser: Browser, session: aiohttp.ClientSession, *, dark: bool
) -> None:
    """Every text has a contrast of at least 4.5 to 1, in light and in dark."""
    alice, bob = await enrol(session, At(house), "alice", "bob")
    room, other = await alice.room(bob), await alice.room(bob)
    await alice.say(room, "from alice, with https://example.org/")
    await alice.say(other, "unread")
    gone = await bob.say(room, "gone")
    await bob.ask("DELETE", f"/rooms/{room}/messages/{gone['seq']}")
    await bob.say(room, "from bob")
    tab = await enter(browser, bob, room, dark=dark)
    with tab.forgiving("status of 400"):
        await say(tab, "w" * 4001)
        await tab.wait("document.querySelector('.message.refused')")
    await tab.wait(f"document.querySelector(`[data-room='{other}'] .badge`).textContent === '1'")
    background = await tab.js("getComputedStyle(document.body).backgroundColor")
    assert (background != "rgb(255, 255, 255)") is dark
    texts, faint = await tab.js(CONTRAST)
    assert texts > 15
    assert faint == []
    door = await browser.tab(house, dark=dark)
    await door.wait("!document.querySelector('#door').hidden")
    texts, faint = await door.js(CONTRAST)
    assert texts >= 5
    assert faint == []
