"""What is there for learners: the tour names what exists, exercises are solved, examples run."""

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import aiohttp
import pytest
from aiohttp import web

import chatserver
from chatserver import Config, create_app
from examples.embed import create_site
from tests import mutants, words
from tests.browser import browsing
from tests.commands import started, tool
from tests.conftest import Databases
from tests.people import At, User, enrol
from tests.processes import ROOT, serving
from tests.words import KEY, NO_LIMITS, PASSWORD, Event

DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
TOUR = (DOCS / "tour.md").read_text("utf-8")
EXERCISES = (DOCS / "exercises.md").read_text("utf-8")
SOLUTIONS = sorted(path.stem for path in (DOCS / "solutions").glob("*.patch"))
# What stands in the tour in code, and is no name of the program: the wire's words and Python's.
WORDS = {
    *("await", "async", "with", "except", "for", "alive", "json", "sent", "ack", "reset"),
    *("folded", "edited", "edit", "delete"),
    *("typing", "presence", "unavailable", "client_id", "version", "abort"),
}


# --- The tour


@cache
def names() -> set[str]:
    """Return the names of the program: of the module, and of classes with what they keep."""
    found = set(dir(builtins)) | set(vars(chatserver))
    for node in ast.parse((ROOT / "chatserver.py").read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(f"{node.name}.{inner.name}")
                elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                    found |= {f"{node.name}.{inner.attr}"} if inner.value.id == "self" else set()
    return found


def test_the_tour_names_what_is_there() -> None:
    """Each name in it is one of the program, and each piece of code stands there as it is told."""
    told = re.sub(r"^Try: .*$|^\|.*\|$", "", TOUR, flags=re.MULTILINE)
    for code in re.findall("`([^`]+)`", told):
        if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", code):
            known = names() | {"chatserver.py", "schema.sql"} | WORDS
            assert code in known, code
        elif re.match(r"if |socket\.|folded ", code):
            assert code.rstrip(":") in (ROOT / "chatserver.py").read_text("utf-8"), code
    table = TOUR.partition("## Where each promise")[2]
    assert set(re.findall(r"`([A-Za-z_.]+)`", table)) <= names() | {"schema.sql"}
    for number, unit, name in re.findall(r"([\d,]+)( KiB)?(?: s)?\s\(`([A-Z_]+)`\)", TOUR):
        value = int(number.replace(",", "")) << (10 if unit else 0)
        assert getattr(chatserver, name) == value, name
    engines = re.findall(r"isinstance\(self\.db, ", (ROOT / "chatserver.py").read_text("utf-8"))
    assert len(engines) == 4 and "four `isinstance` in `Chat`" in TOUR
    sections = re.findall(r"^# -+ (\w+)$", Path(chatserver.__file__).read_text(), re.MULTILINE)
    assert set(re.findall(r"section \*(\w+)\*", TOUR)) <= set(sections)


def test_the_tour_can_be_read_in_an_hour() -> None:
    """It has fifteen stops in order, each says what happens without it, and is not long."""
    stops = re.findall(r"^### (\d+)\. .*?(?=^##|\Z)", TOUR, re.MULTILINE | re.DOTALL)
    assert [int(number) for number in stops] == list(range(1, 16))
    parts = re.split(r"^##+ ", TOUR, flags=re.MULTILINE)
    for part in [part for part in parts if re.match(r"\d", part)]:
        assert "\nRead " in part and ("Without it" in part or part.startswith("10")), part[:40]
    assert len(TOUR.split()) < 3500


def test_the_faults_to_try_are_there() -> None:
    """Each fault that the tour lets one put in is one of those that are known."""
    tries = re.findall(r"^Try: `\.venv/bin/python -m tests\.mutants \"(.+)\"`$", TOUR, re.MULTILINE)
    assert len(tries) >= 10
    for part in tries:
        assert len([one for one in mutants.MUTANTS if part in one.name]) == 1, part


def test_the_drawing_names_what_is_there_and_has_dark_colours() -> None:
    """The functions in it exist; each colour that is set in the light is set in the dark, too."""
    text = (DOCS / "message.svg").read_text("utf-8")
    root = ET.fromstring(text)  # noqa: S314 (our own file)
    svg = "{http://www.w3.org/2000/svg}"
    told = [t.text or "" for t in root.iter(f"{svg}text") if t.get("class") == "name"]
    methods = {name.rpartition(".")[2] for name in names()}
    assert {word for one in told for word in one.split(", ")} <= methods
    assert root.find(f"{svg}title") is not None and "message.svg" in TOUR
    light, dark = text.split("prefers-color-scheme: dark")
    drawn = set(re.findall(r"^\s+(\.?[a-z-]+) \{.*(?:fill|stroke): #", light, re.MULTILINE))
    assert drawn == set(re.findall(r"^\s+(\.?[a-z-]+) \{", dark, re.MULTILINE))


# --- The exercises


def added(patch: str, file: str) -> int:
    """Return how many lines a patch adds to a file."""
    part = re.search(rf"^diff --git a/{file} .*?(?=^diff |\Z)", patch, re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^\+(?!\+\+)", part[0], re.MULTILINE)) if part else 0


def test_exercises_and_solutions_belong_together() -> None:
    """Solutions are there, and as long as is told; all links lead somewhere."""
    told = re.findall(r"^Solution: \[(\w+)\.patch\]\(.*\), (\d+) lines", EXERCISES, re.MULTILINE)
    assert sorted(name for name, _ in told) == SOLUTIONS
    for name, lines in told:
        patch = (DOCS / "solutions" / f"{name}.patch").read_text("utf-8")
        program = "time_bot.py" if name == "time_bot" else "chatserver.py"
        assert added(patch, program) == int(lines), name
        assert added(patch, f"tests/test_{name}.py"), name
    assert added((DOCS / "solutions" / "reactions.patch").read_text("utf-8"), "chatserver.py") <= 30
    for text in (TOUR, EXERCISES):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (DOCS / link).exists(), link


def test_the_hints_name_what_is_there() -> None:
    """What the introduction of the exercises tells to read, to copy or to switch off exists."""
    told = EXERCISES.partition("\n## ")[0]
    known = names() | {name.rpartition(".")[2] for name in names()} | set(vars(words))
    for code in re.findall("`([^`\n]+)`", told):
        path, _, name = code.partition("::")
        if (ROOT / path).is_file():
            assert f"def {name}" in (ROOT / path).read_text("utf-8") if name else True, code
        elif re.fullmatch(r"\w+|change\.\w+.*|chat\.change.*", code):
            assert re.split(r"\W", code.partition("(")[0])[-1] in known | {"data"}, code


def run(folder: Path, *command: str) -> None:
    """Run a command, which has to succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-1000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_applies_and_passes_its_tests(name: str, tmp_path: Path) -> None:
    """The patch fits the program as it is, is laid out like it, and does what it should."""
    mutants.copy(tmp_path)
    run(tmp_path, tool("git"), "apply", str(DOCS / "solutions" / f"{name}.patch"))
    python = [sys.executable, "-m"]
    files = [*map(str, tmp_path.glob("*.py")), f"tests/test_{name}.py"]
    run(tmp_path, *python, "ruff", "check", "-q", *files)
    run(tmp_path, *python, "ruff", "format", "--check", "-q", *files)
    options = ["-q", "-p", "no:cacheprovider", "-k", "not postgres"]
    run(tmp_path, *python, "pytest", *options, f"tests/test_{name}.py")


# --- The examples


@asynccontextmanager
async def alice_at(url: str) -> AsyncIterator[User]:
    """Give somebody with a fresh account."""
    async with aiohttp.ClientSession() as session:
        (alice,) = await enrol(session, At(url), "alice")
        yield alice


def settings(folder: Path, **more: Any) -> Config:
    """Return the settings of a server on SQLite without limits."""
    url = f"sqlite:///{folder}/chat.db"
    fixed: dict[str, Any] = {**NO_LIMITS, "database_url": url, "secret_key": KEY}
    return Config(**(fixed | more))


async def test_the_shop_announces_each_order_once(new_database: Databases, tmp_path: Path) -> None:
    """Its own code posts, live for all; an order that comes again, also later, is old news."""
    config = settings(tmp_path, database_url=new_database(tmp_path))

    async def order(alice: User, number: str) -> int:
        """Send an order to the shop, beside the chat."""
        url = alice.place.url.replace("/chat", f"/orders/{number}")
        async with alice.session.put(url) as answer:
            return answer.status

    for again in (False, True):
        site = create_site(config)
        async with serving(site) as url, alice_at(f"{url}/chat") as alice:
            async with alice.chat("1") as chat:
                for number in ("17", "17", f"18{int(again)}"):
                    assert await order(alice, number) == 200
                event = await chat.hear("message", message=f"Order 18{int(again)} came in.")
                assert event["username"] == "shop"
            assert await order(alice, "x") == 404
            history: list[Event] = await alice.ask("GET", "/rooms/1/messages")
            texts = [f"Order {n} came in." for n in ("17", "180", "181")[: 2 + again]]
            assert [event["message"] for event in history] == texts


@pytest.mark.slow
async def test_the_bot_answers(tmp_path: Path) -> None:
    """In 30 lines it rolls the dice for who asks."""
    assert (EXAMPLES / "bot.py").read_text("utf-8").count("\n") <= 30
    async with serving(create_app(settings(tmp_path))) as url, alice_at(url) as alice:
        (dice,) = await enrol(alice.session, At(url), "dice")
        async with alice.chat("1") as chat:
            command = [sys.executable, str(EXAMPLES / "bot.py"), url, dice.name, PASSWORD, "1"]
            async with started(*command, folder=tmp_path):
                await chat.hear("presence", username=dice.name, online=True)
                for _ in range(2):
                    await chat.send(message="/roll")
                    said = await chat.hear("message", username=dice.name)
                    assert re.fullmatch(rf"{alice.name} rolls [1-6]", said["message"])


@pytest.mark.slow
async def test_the_page_elsewhere_is_let_in_where_its_origin_is_allowed(tmp_path: Path) -> None:
    """A page of another origin logs in, hears and says, but not where its site is not named."""
    elsewhere = web.Application()
    elsewhere.router.add_static("/", EXAMPLES)
    (tmp_path / "closed").mkdir()
    chromium = tool("chromium", "chromium-browser")
    async with serving(elsewhere) as origin, browsing(chromium) as browser:
        allowed = settings(tmp_path, allowed_origins=f"https://example.org, {origin}")
        closed = settings(tmp_path / "closed")
        async with serving(create_app(allowed)) as url, serving(create_app(closed)) as other:
            tab = await browser.tab(f"{origin}/page.html")
            state, shown = (f"document.getElementById('{id_}')" for id_ in ("state", "messages"))

            async def log_in(at: str, name: str) -> None:
                """Fill in the form and send it."""
                for field, text in (("server", at), ("username", name), ("password", PASSWORD)):
                    await tab.fill(f"[name={field}]", text)
                await tab.click("#login button")

            async with alice_at(other) as alice:
                with tab.forgiving("CORS|ERR_FAILED"):
                    await log_in(other, alice.name)
                    await tab.wait(f"{state}.textContent.startsWith('It failed')")
            async with alice_at(url) as alice, alice.chat("1") as chat:
                await chat.deliver("<b>before</b>")
                await log_in(url, alice.name)
                await tab.equals(f"{state}.textContent", f"Here as {alice.name}.")
                await chat.deliver("live")
                await tab.fill("[name=message]", "from elsewhere")
                await tab.click("#compose button")
                event = await chat.hear("message", message="from elsewhere")
                assert len(event["client_id"]) == 36
                lines = [f"{alice.name}: {e}" for e in ("<b>before</b>", "live", "from elsewhere")]
                await tab.equals(f"{shown}.innerText", "\n".join(lines))
