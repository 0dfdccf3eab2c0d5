"""The pages as people meet them: a real Chromium chats, and reads the docs."""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.browser import Browser, Chromium, Tab, program
from tests.conftest import Launch, Shared, Start, is_clean, missing
from tests.helpers import (
    NO_LIMITS,
    PASSWORD,
    PATIENCE,
    SECRET,
    Process,
    Server,
    User,
    background,
    unique,
)

DOWN = r"net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE)"
ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js")
PACKAGES = ("swagger-ui-dist@5.35.0", "redoc@2.5.4")


@pytest.fixture(scope="session")
def chromium() -> Iterator[str]:
    """Give the address of the browser of this run."""
    path = program()
    if path is None:
        missing("there is no Chromium here")
    browser = Chromium(path or "")
    try:
        yield browser.address()
    finally:
        browser.close()


@pytest.fixture
async def browser(chromium: str, session: aiohttp.ClientSession) -> AsyncIterator[Browser]:
    """Give the browser; after the test no page has complained about anything unforgiven."""
    async with session.ws_connect(chromium, max_msg_size=0) as socket:
        browser = Browser(socket)
        async with background(browser.read()):
            yield browser
            problems = [tab.problems for tab in browser.tabs.values()]
            await browser.close()
    assert not any(problems), problems


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Run a server on SQLite for the tests of the page."""
    folder = tmp_path_factory.mktemp("page")
    settings = {**NO_LIMITS, "secret_key": SECRET}
    process = Process(folder, "--port", "0", settings=settings)
    try:
        process.listening()
        yield Shared(process, "")
        assert process.stop() == 0, process.stderr
        is_clean(process.stderr)
    finally:
        process.kill()


@pytest.fixture
def site(house: Shared, session: aiohttp.ClientSession) -> Iterator[Server]:
    """Give the server of the page, and the accounts that are idle."""
    server = Server(house.process, session, pool=house.pool)
    yield server
    server.release()


# --- What people do


async def enter(browser: Browser, user: User, room: str = "1", **window: int | bool) -> Tab:
    """Open the page in a window of its own, logged in already, in a room."""
    tab = await browser.tab(f"{user.server.url}/healthz", **window)
    await tab.js(f"sessionStorage.setItem('token', {json.dumps(user.token)})")
    await tab.go(f"{user.server.url}/#{room}")
    await online(tab)
    return tab


async def online(tab: Tab, *states: str) -> None:
    """Wait until the room is open and live (or in one of these states), its history shown."""
    wanted = json.dumps(states or ["online", "resumed"])
    await tab.wait(f"{wanted}.includes(document.querySelector('#status').dataset.state)")
    await tab.wait("document.querySelector('.message, #empty:not([hidden])')")


async def say(tab: Tab, text: str) -> None:
    """Type a message and send it with Enter."""
    await tab.click("#text")
    await tab.type(text)
    await tab.press("Enter")


LOG = """[...document.querySelectorAll('#log .message')].map((el) =>
    [el.querySelector('.author').textContent, el.querySelector('.text').textContent])"""
NUMBERS = "[...document.querySelectorAll('#log .message')].map((el) => Number(el.dataset.seq))"


async def shows(tab: Tab, *lines: tuple[User | str, str]) -> None:
    """Wait until the log has just these messages, and each has its number."""
    names = [user.username if isinstance(user, User) else user for user, _ in lines]
    await tab.equals(LOG, [[name, text] for name, (_, text) in zip(names, lines, strict=True)])
    await tab.wait("!document.querySelector('.pending')")


async def number(tab: Tab, text: str) -> str:
    """Return the selector of the message with this text, once it has a number."""
    code = f"""[...document.querySelectorAll('.message[data-seq]')].find((el) =>
        el.querySelector('.text').textContent === {json.dumps(text)})?.dataset.seq"""
    return f".message[data-seq='{await tab.wait(code)}']"


async def read(user: User, room: str) -> None:
    """Wait until the server knows that there is nothing unread."""
    async with asyncio.timeout(PATIENCE):
        while (await user.get(f"/rooms/{room}")).ok()["unread"]:
            await asyncio.sleep(0.05)


async def create(tab: Tab, kind: str, name: str) -> str:
    """Make a room with the dialog, and return its id."""
    await tab.click("#add")
    await tab.js(f"document.querySelector('#kind').value = {json.dumps(kind)}")
    await tab.fill("#name", name)
    await tab.press("Enter")
    await tab.wait("!document.querySelector('#new').open")
    await online(tab)
    return str(await tab.js("location.hash.slice(1)"))


# --- Chatting


async def test_two_people_register_log_in_and_chat(site: Server, browser: Browser) -> None:
    """Two people in two windows make accounts and see each other's messages, typing and names."""
    alice, bob = unique("alice"), unique("bob")
    tabs = [await browser.tab(site.url) for _ in "ab"]
    for tab, name in zip(tabs, (alice, bob), strict=True):
        await tab.fill("#username", name.upper())
        await tab.fill("#email", f"{name}@example.org")
        await tab.fill("#password", PASSWORD)
        await tab.click("#register")
        await online(tab)
        assert await tab.js("document.querySelector('#me').textContent") == name
    a, b = tabs
    await create(a, "public", room := unique("Walks"))
    await b.go(f"{site.url}/#{room.lower()}")
    await online(b)
    await say(a, "Hello Bob")
    await shows(b, (alice, "Hello Bob"))
    await b.click("#text")
    await b.type("Hello")
    await a.equals("document.querySelector('#typing').textContent", f"{bob} is typing…")
    await b.type(" Alice")
    await b.press("Enter")
    for tab in tabs:
        await shows(tab, (alice, "Hello Bob"), (bob, "Hello Alice"))
        await tab.wait(f"document.querySelector('#online').textContent.includes('{alice}, {bob}')")
    assert await a.js("document.querySelectorAll('.mine .text')[0].textContent") == "Hello Bob"
    assert await b.js("document.querySelectorAll('.mine .text')[0].textContent") == "Hello Alice"
    await a.click("#logout")
    await a.wait("!document.querySelector('#auth').hidden")
    await b.equals("document.querySelector('#online').textContent", f"1 online: {bob}")


async def test_edits_and_deletes_show_in_both_windows(site: Server, browser: Browser) -> None:
    """Each edits and deletes what is theirs, and has no button for what is not."""
    alice, bob = await site.users("alice", "bob")
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
    seen = await b.js(
        f"{buttons}.filter((el) => el.checkVisibility({{ visibilityProperty: true }}))"
    )
    assert seen == []
    await a.call("Page.reload")
    await online(a)
    await shows(a, (alice, "The first"), (alice, "Message deleted"))


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
async def test_both_resume_when_the_server_restarts(
    start: Start, browser: Browser, unused_tcp_port: int, how: str
) -> None:
    """Nothing is missing or doubled afterwards, nor what was typed while the server was down."""
    server = await start("--port", str(unused_tcp_port))
    alice, bob = await server.users("alice", "bob")
    a, b = await asyncio.gather(enter(browser, alice), enter(browser, bob))
    await say(a, "one")
    await say(b, "two")
    for tab in (a, b):
        await tab.equals(f"{LOG}.map((line) => line[1]).sort()", ["one", "two"])
    with ExitStack() as stack:
        for tab in (a, b):
            stack.enter_context(tab.forgiving(DOWN))
        await say(a, "at the last moment")
        if how == "SIGTERM":
            assert await asyncio.to_thread(server.process.stop) == 0
        else:
            await server.kill()
        for tab in (a, b):
            await tab.wait("document.querySelector('#status').dataset.state === 'lost'")
        await say(a, "while it was down")
        await say(b, "while it was down, too")
        await say(a, "still down")
        for tab in (a, b):
            await tab.wait("document.querySelector('.pending')")
        await server.restart()
        for tab in (a, b):
            await online(tab, "resumed")
            text = await tab.js("document.querySelector('#status').textContent")
            assert text.startswith("Back online, ")
            await tab.wait(f"{LOG}.length >= 6 && !document.querySelector('.pending')")
    await say(b, "after all")
    await a.wait(f"{LOG}.length >= 7")
    history = (await alice.get("/rooms/1/messages")).ok()
    said = ["one", "two", "at the last moment", "while it was down", "while it was down, too"]
    assert sorted(m["message"] for m in history) == sorted([*said, "still down", "after all"])
    for tab in (a, b):
        await tab.equals(LOG, [[m["username"], m["message"]] for m in history])
        await tab.equals(NUMBERS, [m["seq"] for m in history])


async def test_unread_badges_and_rooms_that_others_made(site: Server, browser: Browser) -> None:
    """Private and direct rooms turn up in the other's list with the number of unread messages."""
    alice, bob = await site.users("alice", "bob", fresh=True)
    a, b = await asyncio.gather(enter(browser, alice), enter(browser, bob))
    private = await create(a, "private", unique("Surprise"))
    await say(a, "Only for you")
    await a.click("#invite")
    assert await a.js("document.querySelector('#kind').value") == "invite"
    await a.fill("#name", bob.username)
    await a.press("Enter")
    await a.wait("!document.querySelector('#new').open")
    await say(a, "Do you like it?")
    direct = await create(a, "direct", bob.username)
    assert await a.js("document.querySelector('#title').textContent") == bob.username
    await say(a, "psst")
    waiting = """Object.fromEntries([...document.querySelectorAll('#rooms li')]
        .map((el) => [el.dataset.room, el.querySelector('.badge').textContent]))"""
    await b.wait(f"({waiting})['{private}'] === '1' && ({waiting})['{direct}'] === '1'")
    assert await b.js("document.title") == "(2) Lobby · Chat"
    item = f"#rooms li[data-room='{private}']"
    assert await b.js(f"document.querySelector(`{item}`).className") == "private"
    await b.click(f"{item} a")
    await online(b)
    await shows(b, (alice, "Only for you"), (alice, "Do you like it?"))
    await b.equals(f"({waiting})['{private}']", "")
    await read(bob, private)
    await b.click(f"#rooms li[data-room='{direct}'] a")
    await b.equals("document.querySelector('#title').textContent", alice.username)
    await shows(b, (alice, "psst"))
    await b.equals("document.title", f"{alice.username} · Chat")


async def test_a_private_room_is_closed_to_others(site: Server, browser: Browser) -> None:
    """Who is not invited neither sees a private room nor gets in by its address."""
    alice, eve = await site.users("alice", "eve")
    room = await alice.room(kind="private")
    await alice.say(room, "a secret")
    e = await enter(browser, eve)
    assert not await e.js(f"document.querySelector('[data-room={room}]')")
    await e.js(f"location.hash = '{room}'")
    await e.equals(
        "document.querySelector('#notice').innerText", "You are not a member of this room."
    )
    await e.equals("location.hash", "")
    assert "a secret" not in await e.js("document.body.innerText")


async def test_history_comes_when_one_scrolls_up(site: Server, browser: Browser) -> None:
    """Scrolling up reads the whole history, in order, and what was looked at keeps its place."""
    (alice,) = await site.users("alice")
    room = await alice.room()
    async with alice.chat(room) as chat:
        for n in range(180):
            await chat.say(f"message {n}")
        await chat.upto(181)
    tab = await enter(browser, alice, room)
    top = "document.querySelector('#log').scrollTop"
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
    assert await tab.js(top) > 0
    await tab.fill("#search", "message 77")
    await tab.equals("document.querySelector('#found').textContent", "1 found")
    await tab.click("#results li a")
    await tab.equals("document.querySelector('.goal .text')?.textContent", "message 77")


# --- Text that would like to be more


EVIL = (
    "<img src=x onerror=window.owned=1>",
    "<script>window.owned=2</script>",
    "\"'><svg/onload=window.owned=3>",
    "javascript:window.owned=4 https://example.org/?<b>\"onclick='window.owned=5'",
)
HARMLESS = """window.owned === undefined && !document.body.querySelector('img, svg, iframe, object')
    && document.scripts.length === 1
    && [...document.querySelectorAll('a')].every((el) => /^https?:/.test(el.href))"""


async def test_message_text_stays_text(site: Server, browser: Browser) -> None:
    """HTML in a message is shown as it was typed: live, edited, in the history and the search."""
    alice, bob = await site.users("alice", "bob")
    room = await alice.room(bob)
    a, b = await enter(browser, alice, room), await enter(browser, bob, room)
    for text in EVIL:
        await say(a, text)
    (await alice.patch(f"/rooms/{room}/messages/3", json={"message": EVIL[1]})).ok()
    wanted = [(alice, EVIL[1]), *((alice, text) for text in EVIL[1:])]
    await b.call("Page.reload")
    await online(b)
    await b.fill("#search", "owned")
    await b.wait("document.querySelectorAll('#results li').length >= 4")
    found = "[...document.querySelectorAll('#results .text')].map((el) => el.textContent)"
    assert set(await b.js(found)) == set(EVIL[1:])
    for tab in (a, b):
        await shows(tab, *wanted)
        assert await tab.js(HARMLESS)


async def test_room_names_stay_text(site: Server, browser: Browser) -> None:
    """HTML in a room's name is shown as it was typed: in the list, the title and the search."""
    (alice,) = await site.users("alice")
    tab = await enter(browser, alice)
    for name in EVIL:
        room = await create(tab, "public", name)
        await tab.equals("document.querySelector('#title').textContent", name)
        await tab.equals(f"document.querySelector('[data-room={room}] .cut').textContent", name)
        await say(tab, "owned")
        await number(tab, "owned")
    await tab.fill("#search", "owned")
    for name in EVIL:
        found = "[...document.querySelectorAll('#results small')].map((el) => el.textContent)"
        await tab.wait(f"{found}.some((text) => text.startsWith({json.dumps(name)}))")
    assert await tab.js(HARMLESS)


async def test_names_of_people_stay_text(
    launch: Launch, session: aiohttp.ClientSession, browser: Browser, tmp_path: Path
) -> None:
    """The form refuses a name with HTML in it, and one that is stored all the same stays text."""
    server = Server(launch("--port", "0"), session)
    (alice,) = await server.users("alice")
    (await alice.post("/rooms/1/messages", json={"message": "owned"})).ok(201)
    tab = await browser.tab(server.url)
    await tab.fill("#username", EVIL[0])
    await tab.fill("#email", "eve@example.org")
    await tab.fill("#password", PASSWORD)
    with tab.forgiving("status of 400"):
        await tab.click("#register")
        await tab.wait("document.querySelector('#auth .error').textContent")
    assert await tab.js(HARMLESS)
    await asyncio.to_thread(server.process.stop)
    with sqlite3.connect(tmp_path / "chat.db") as database:
        database.execute("UPDATE events SET username = ? WHERE kind = 'message'", [EVIL[0]])
        direct = ("direct", f"{EVIL[1]}, {alice.username}", "1")
        database.execute("UPDATE rooms SET kind = ?, name = ? WHERE room_id = ?", direct)
    database.close()
    alice.server.process = launch("--port", "0")
    server.url = server.process.listening()
    tab = await enter(browser, alice)
    await shows(tab, (EVIL[0], "owned"))
    await tab.equals("document.querySelector('#title').textContent", EVIL[1])
    await tab.fill("#search", "owned")
    await tab.equals("document.querySelector('#results b')?.textContent", EVIL[0])
    assert await tab.js(HARMLESS)


async def test_the_page_runs_no_script_but_its_own(site: Server, browser: Browser) -> None:
    """Even HTML that got into the page runs nothing, and the console would have told us."""
    (alice,) = await site.users("alice")
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


async def test_a_wrong_password_is_told(site: Server, browser: Browser) -> None:
    """The form says why it did not work, keeps the name, and lets one try again."""
    (alice,) = await site.users("alice")
    tab = await browser.tab(site.url)
    await tab.fill("#username", alice.username)
    await tab.fill("#password", "wrong")
    with tab.forgiving("status of 400") as refused:
        await tab.click("#login")
        await tab.wait("document.querySelector('#auth .error').textContent.includes('password')")
    assert len(refused) == 1
    assert not await tab.js("document.querySelector('#chat').checkVisibility()")
    await tab.fill("#email", alice.email)
    with tab.forgiving("status of 409"):
        await tab.click("#register")
        await tab.wait("document.querySelector('#auth .error').textContent.includes('taken')")
    await tab.fill("#password", PASSWORD)
    await tab.click("#login")
    await online(tab)
    assert await tab.js("document.querySelector('#password').value") == ""


async def test_a_logout_elsewhere_leads_back_to_the_door(site: Server, browser: Browser) -> None:
    """Who is logged out by another window is told so, and comes back to the same room."""
    (alice,) = await site.users("alice", fresh=True)
    room = await alice.room()
    await alice.say(room, "still here")
    tab = await enter(browser, alice, room)
    with tab.forgiving("status of 401"):  # the page may be reading when its log-in ends
        (await alice.post("/auth/logout")).ok(204)
        await tab.wait("document.querySelector('#auth .error').textContent.includes('expired')")
    await tab.fill("#username", alice.username)
    await tab.fill("#password", PASSWORD)
    await tab.press("Enter")
    await online(tab)
    await shows(tab, (alice, "still here"))


# --- Everybody's page


FOCUS = "document.activeElement.id || document.activeElement.className"


async def test_the_keyboard_alone_is_enough(site: Server, browser: Browser) -> None:
    """Without a mouse one logs in, sends, edits, deletes and changes the room."""
    (alice,) = await site.users("alice", fresh=True)
    room = await alice.room()
    tab = await browser.tab(f"{site.url}/#{room}")
    await tab.equals(FOCUS, "username")
    await tab.type(alice.username)
    await tab.press("Tab")
    await tab.equals(FOCUS, "email")
    await tab.press("Tab")
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
    await tab.press("Tab", shift=True)
    await tab.equals(FOCUS, "log")
    await tab.press("ArrowUp")
    await tab.press("ArrowUp")
    await tab.equals("document.activeElement.querySelector('.text').textContent", "one")
    for stop in ("edit", "delete"):
        await tab.press("Tab")
        await tab.equals(FOCUS, stop)
    await tab.press("Enter")
    await tab.press("Enter")
    await shows(tab, (alice, "Message deleted"), (alice, "two and a half"))
    for _ in range(30):
        if await tab.js("document.activeElement.closest('[data-room=\"1\"]')"):
            break
        assert await tab.js("document.activeElement.matches(':focus-visible')")
        await tab.press("Tab", shift=True)
    await tab.press("Enter")
    await tab.equals("document.querySelector('#title').textContent", "Lobby")
    await tab.equals(FOCUS, "text")


async def test_a_phone_shows_everything(site: Server, browser: Browser) -> None:
    """At 390 x 844 nothing is wider than the screen, and a finger is enough."""
    (alice,) = await site.users("alice")
    (await alice.post("/rooms", json={"room_id": (room := unique("r")), "name": "m" * 100})).ok(201)
    for text in ("w" * 500, "https://example.org/" + "x" * 500, "Teh end"):
        await alice.say(room, text)

    async def fits() -> None:
        """Check that neither the page nor what scrolls in it is cut off on the right."""
        parts = "[document.documentElement, ...document.querySelectorAll('#log, #lists, dialog')]"
        assert await tab.js("innerWidth") == 390
        assert await tab.js(f"{parts}.filter((el) => el.scrollWidth > el.clientWidth)") == []

    tab = await browser.tab(site.url, 390, 844, phone=True)
    await tab.wait("!document.querySelector('#auth').hidden")
    await fits()
    await tab.js(f"sessionStorage.setItem('token', {json.dumps(alice.token)})")
    await tab.call("Page.reload")
    await online(tab)
    await tab.tap("#back")
    await tab.wait("document.querySelector('nav').checkVisibility()")
    await fits()
    await tab.tap("#add")
    await tab.wait("document.querySelector('dialog').open")
    await fits()
    await tab.tap("#close")
    await tab.wait(f"document.querySelector('[data-room={room}]')")
    await tab.tap(f"[data-room={room}] a")
    await tab.wait(f"{LOG}.length === 3")
    await fits()
    last = await number(tab, "Teh end")
    await tab.tap(last)
    await tab.tap(f"{last} .edit")
    await tab.fill("#text", "The end")
    await tab.tap("#send")
    await number(tab, "The end")
    await fits()


async def test_a_screen_reader_finds_a_name_for_everything(site: Server, browser: Browser) -> None:
    """What can be used has a name, and what happens by itself is announced."""
    (alice,) = await site.users("alice")
    room = await alice.room()
    await alice.say(room, "Hello")
    usable = {"textbox", "searchbox", "combobox", "button", "link", "log", "navigation", "dialog"}

    async def names() -> list[tuple[str, str]]:
        """Return the roles and names that a screen reader is told."""
        nodes = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in usable]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in found]

    tab = await browser.tab(site.url)
    await tab.wait("!document.querySelector('#auth').hidden")
    door = await names()
    tab = await enter(browser, alice, room)
    chat = await names()
    await tab.click("#add")
    dialog = await names()
    assert {("textbox", "Name"), ("textbox", "Password")} <= set(door)
    assert {("log", "Messages"), ("textbox", "Message"), ("searchbox", "Search")} <= set(chat)
    assert {"dialog", "combobox", "textbox", "button"} <= {role for role, _ in dialog}
    assert [(role, name) for role, name in door + chat + dialog if not name.strip()] == []
    roles = "['#log', '#status', '#notice'].map((at) => document.querySelector(at).role)"
    assert await tab.js(roles) == ["log", "status", "alert"]
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
    site: Server, browser: Browser, *, dark: bool
) -> None:
    """Every text has a contrast of at least 4.5 to 1, in light and in dark."""
    alice, bob = await site.users("alice", "bob")
    room, other = await alice.room(bob), await alice.room(bob)
    await alice.say(room, "from alice, with https://example.org/")
    await alice.say(other, "unread")
    (await bob.delete(f"/rooms/{room}/messages/{(await bob.say(room, 'gone'))['seq']}")).ok(204)
    await bob.say(room, "from bob")
    tab = await enter(browser, bob, room, dark=dark)
    await tab.wait(f"document.querySelector('[data-room={other}] .badge').textContent === '1'")
    background = await tab.js("getComputedStyle(document.body).backgroundColor")
    assert (background != "rgb(255, 255, 255)") is dark
    texts, faint = await tab.js(CONTRAST)
    assert texts > 15
    assert faint == []
    door = await browser.tab(site.url, dark=dark)
    await door.wait("!document.querySelector('#auth').hidden")
    texts, faint = await door.js(CONTRAST)
    assert texts > 5
    assert faint == []


# --- The API docs


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the scripts of Swagger UI and ReDoc, from npm unless there is one."""
    if given := os.environ.get("DOCS_ASSETS_DIR"):
        return Path(given)
    npm = shutil.which("npm")
    if npm is None:
        missing("neither DOCS_ASSETS_DIR nor npm has Swagger UI and ReDoc")
    folder = tmp_path_factory.mktemp("assets")
    command = [npm or "", "pack", "--silent", *PACKAGES]
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        missing(f"npm could not fetch Swagger UI and ReDoc: {done.stderr.strip()[-200:]}")
    for archive in folder.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if name in ASSETS and (file := tar.extractfile(member)):
                    (folder / name).write_bytes(file.read())
    return folder


async def authorize(tab: Tab, name: str, password: str) -> None:
    """Log in with Swagger's own dialog."""
    await tab.fill("#oauth_username", name)
    await tab.fill("#oauth_password", password)
    await tab.click(".modal-btn.authorize")


async def test_swagger_logs_in_and_posts(
    launch: Launch, session: aiohttp.ClientSession, browser: Browser, assets: Path
) -> None:
    """Authorize takes name and password, and "Try it out" posts a message with the login."""
    server = Server(launch("--port", "0", docs_assets=assets), session)
    (alice,) = await server.users("alice")
    tab = await browser.tab(f"{server.url}/docs")
    await tab.wait("document.querySelectorAll('.opblock').length >= 25")
    await tab.click(".auth-wrapper .authorize")
    with tab.forgiving("status of 400") as refused:
        await authorize(tab, alice.username, "wrong")
        await tab.wait("document.querySelector('.auth-container .errors')")
    assert len(refused) == 1
    await authorize(tab, alice.username, PASSWORD)
    await tab.wait("document.querySelector('.auth-container').innerText.includes('Authorized')")
    await tab.click(".btn-done")
    post = "#operations-Messages-post_message"
    await tab.click(f"{post} button.opblock-summary-control")
    await tab.click(f"{post} .try-out__btn")
    await tab.fill(f"{post} [data-param-name=room_id] input", "1")
    await tab.fill(f"{post} textarea", '{"message": "Hello from Swagger"}')
    await tab.click(f"{post} .execute")
    status = f"document.querySelector('{post} .live-responses-table tbody .response-col_status')"
    await tab.equals(f"{status}?.innerText.trim()", "201")
    (message,) = (await alice.get("/rooms/1/messages")).ok()
    assert (message["username"], message["message"]) == (alice.username, "Hello from Swagger")


async def test_redoc_shows_the_paths(
    launch: Launch, session: aiohttp.ClientSession, browser: Browser, assets: Path
) -> None:
    """ReDoc renders every operation, and how the WebSocket is spoken to."""
    server = Server(launch("--port", "0", docs_assets=assets), session)
    paths = (await server.get("/openapi.json")).ok()["paths"]
    names = [operation["operationId"] for each in paths.values() for operation in each.values()]
    tab = await browser.tab(f"{server.url}/redoc")
    sections = "[...document.querySelectorAll('[data-section-id]')].map((el) => el.id)"
    await tab.wait(f"{sections}.length > {len(names)}")
    shown = await tab.js(sections)
    assert [name for name in names if not any(name in section for section in shown)] == []
    text = await tab.js("document.body.innerText")
    assert [path for path in paths if path not in text] == []
    assert "client_id" in text


async def test_the_cdn_is_held_to_the_pinned_files(
    site: Server, browser: Browser, assets: Path
) -> None:
    """With the files of those versions from the CDN both pages render: the hashes are right."""
    files = {name: (assets / name).read_bytes() for name in ASSETS}
    for page, shown in (("docs", ".opblock"), ("redoc", "[data-section-id]")):
        tab = await browser.tab("about:blank")
        await tab.intercept("https://*", files)
        await tab.go(f"{site.url}/{page}")
        await tab.wait(f"document.querySelectorAll('{shown}').length >= 25")


@pytest.mark.parametrize("trouble", ["off", "offline", "forged"])
async def test_the_docs_pages_themselves_list_the_operations(
    launch: Launch, session: aiohttp.ClientSession, browser: Browser, trouble: str
) -> None:
    """Without a CDN, or with one that sends other files, the pages list the operations."""
    assets = "off" if trouble == "off" else "cdn"
    server = Server(launch("--port", "0", docs_assets=assets), session)
    paths = (await server.get("/openapi.json")).ok()["paths"]
    wanted = [f"{method.upper()} {path}" for path, each in paths.items() for method in each]
    forged = dict.fromkeys(ASSETS, b"window.owned = 1")
    for page in ("docs", "redoc"):
        tab = await browser.tab("about:blank")
        await tab.intercept("https://*", forged if trouble == "forged" else {})
        with tab.forgiving("ERR_ADDRESS_UNREACHABLE|integrity") as refused:
            await tab.go(f"{server.url}/{page}")
            await tab.wait(f"document.querySelectorAll('h3').length >= {len(wanted)}")
        shown = await tab.js("[...document.querySelectorAll('h3')].map((el) => el.textContent)")
        assert sorted(shown) == sorted(wanted)
        assert bool(refused) is (trouble != "off")
        assert await tab.js("window.owned") is None
