"""What is there for learners: the tour names what exists, exercises are solved, examples run."""

import ast
import builtins
import re
import sys
from pathlib import Path

import pytest
from aiohttp import web

import chatserver
from chatserver import Config
from examples.embed import create_site
from tests import mutants, words
from tests.browser import browsing
from tests.commands import run, started, tool
from tests.conftest import Databases
from tests.people import At, company
from tests.processes import PROGRAM, ROOT, running, serving
from tests.words import KEY, PASSWORD

DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
TOUR = (DOCS / "tour.md").read_text("utf-8")
EXERCISES = (DOCS / "exercises.md").read_text("utf-8")
PATCHES = {path.stem: path.read_text("utf-8") for path in (DOCS / "solutions").glob("*.patch")}
TEXT = PROGRAM.read_text("utf-8")
# What stands in the tour in code, and is no name of the program: the wire's words and Python's.
WORDS = {
    *("await", "async", "with", "except", "for", "alive", "json", "sent", "ack", "reset"),
    *("folded", "edited", "edit", "delete", "chatserver.py", "schema.sql"),
    *("typing", "presence", "unavailable", "client_id", "version", "abort"),
}
# The names of the program: of the module, and of classes with what they keep.
NAMES = set(dir(builtins)) | set(vars(chatserver))
for definition in [node for node in ast.parse(TEXT).body if isinstance(node, ast.ClassDef)]:
    body = ast.unparse(definition)
    NAMES |= {f"{definition.name}.{name}" for name in re.findall(r"(?:def |self\.)(\w+)", body)}
METHODS = {name.rpartition(".")[2] for name in NAMES}


# --- The tour


def test_the_tour_names_what_is_there() -> None:
    """Each name in it and its drawing is one of the program, each number and line as it is told."""
    told = re.sub(r"^Try: .*$|^\|.*\|$", "", TOUR, flags=re.MULTILINE)
    for code in re.findall("`([^`]+)`", told):
        if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)?", code):
            assert code in NAMES | WORDS, code
        elif re.match(r"if |socket\.|folded ", code):
            assert code.rstrip(":") in TEXT, code
    table = TOUR.partition("## Where each promise")[2]
    assert set(re.findall(r"`([A-Za-z_.]+)`", table)) <= NAMES | {"schema.sql"}
    drawn = re.findall(r'class="name"[^>]*>([^<]+)<', (DOCS / "message.svg").read_text("utf-8"))
    assert drawn and set(", ".join(drawn).split(", ")) <= METHODS
    for number, unit, name in re.findall(r"([\d,]+)( KiB)?(?: s)?\s\(`([A-Z_]+)`\)", TOUR):
        value = int(number.replace(",", "")) << (10 if unit else 0)
        assert getattr(chatserver, name) == value, name
    assert TEXT.count("isinstance(self.db, ") == 4 and "four `isinstance` in `Chat`" in TOUR
    sections = re.findall(r"^# -+ (\w+)$", TEXT, re.MULTILINE)
    assert set(re.findall(r"section \*(\w+)\*", TOUR)) <= set(sections)


def test_the_tour_can_be_read_in_an_hour() -> None:
    """It has fifteen stops that say what happens without them, and faults that can be tried."""
    parts = re.findall(r"^### (\d+)(\. .*?)(?=^##|\Z)", TOUR, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in parts] == list(range(1, 16))
    for number, part in parts:
        assert "\nRead " in part and ("Without it" in part or number == "10"), number
    assert len(TOUR.split()) < 3500
    tries = re.findall(r"^Try: `\.venv/bin/python -m tests\.mutants \"(.+)\"`$", TOUR, re.MULTILINE)
    assert len(tries) >= 10
    for part in tries:
        assert len([one for one in mutants.MUTANTS if part in one.name]) == 1, part


# --- The exercises


def added(patch: str, file: str) -> int:
    """Return how many lines a patch adds to a file."""
    part = re.search(rf"^diff --git a/{file} .*?(?=^diff |\Z)", patch, re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^\+(?!\+\+)", part[0], re.MULTILINE)) if part else 0


def test_exercises_name_what_is_there() -> None:
    """Solutions are as long as is told, and what the introduction tells to read or copy exists."""
    told = re.findall(r"^Solution: \[(\w+)\.patch\]\(.*\), (\d+) lines", EXERCISES, re.MULTILINE)
    assert {name for name, _ in told} == set(PATCHES)
    for name, lines in told:
        program = "time_bot.py" if name == "time_bot" else "chatserver.py"
        assert added(PATCHES[name], program) == int(lines), name
        assert added(PATCHES[name], f"tests/test_{name}.py"), name
    for code in re.findall("`([^`\n]+)`", EXERCISES.partition("\n## ")[0]):
        path, _, name = code.partition("::")
        if (ROOT / path).is_file():
            assert f"def {name}" in (ROOT / path).read_text("utf-8") or not name, code
        elif re.fullmatch(r"\w+|change\.\w+.*|chat\.change.*", code):
            name = re.split(r"\W", code.partition("(")[0])[-1]
            assert name in METHODS | set(vars(words)) | {"data"}, code


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PATCHES))
async def test_a_solution_applies_and_passes_its_tests(name: str, tmp_path: Path) -> None:
    """The patch fits the program as it is, is laid out like it, and does what it should."""
    mutants.copy(tmp_path)
    patch, test = str(DOCS / "solutions" / f"{name}.patch"), f"tests/test_{name}.py"
    assert await run(tool("git"), "apply", patch, folder=tmp_path) == (0, "")
    files = [*map(str, tmp_path.glob("*.py")), test]
    pytest_ = ["pytest", "-q", "-p", "no:cacheprovider", "-k", "not postgres", test]
    for command in (["ruff", "check", *files], ["ruff", "format", "--check", *files], pytest_):
        code, said = await run(sys.executable, "-m", *command, folder=tmp_path)
        assert code == 0, said


# --- The examples


async def test_the_shop_announces_each_order_once(new_database: Databases, tmp_path: Path) -> None:
    """Its own code posts, live for all; an order that comes again, also later, is old news."""
    config = Config(database_url=new_database(tmp_path), secret_key=KEY)
    for last in ("180", "181"):
        async with (
            serving(create_site(config)) as url,
            company(At(f"{url}/chat"), "alice") as [alice],
            alice.chat("1") as chat,
        ):
            for number, status in (("17", 200), ("17", 200), (last, 200), ("x", 404)):
                async with alice.session.put(f"{url}/orders/{number}") as answer:
                    assert answer.status == status
            await chat.hear("message", message=f"Order {last} came in.", username="shop")
            history = await alice.ask("GET", "/rooms/1/messages")
    assert [event["message"].split()[1] for event in history] == ["17", "180", "181"]


@pytest.mark.slow
async def test_the_bot_answers_on_the_page_of_another_site(tmp_path: Path) -> None:
    """From an origin that the server names the page shows and posts; in 30 lines a bot answers."""
    command = [sys.executable, str(EXAMPLES / "bot.py")]
    assert (EXAMPLES / "bot.py").read_text("utf-8").count("\n") <= 30
    elsewhere = web.Application()
    elsewhere.router.add_static("/", EXAMPLES)
    database = f"sqlite:///{tmp_path}/chat.db"
    async with (
        serving(elsewhere) as origin,
        running(tmp_path, database, allowed_origins=f"https://example.org, {origin}") as [process],
        company(process, "alice", "dice") as [alice, dice],
        alice.chat("1") as chat,
        started(*command, process.url, dice.name, PASSWORD, "1", folder=tmp_path),
        browsing(tool("chromium", "chromium-browser")) as browser,
    ):
        await chat.hear("presence", username=dice.name, online=True)
        await chat.deliver("<b>before</b>")
        tab = await browser.tab(f"{origin}/page.html")
        form = {"server": process.url, "username": alice.name, "password": PASSWORD}
        for field, text in form.items():
            await tab.fill(f"[name={field}]", text)
        await tab.click("#login button")
        await tab.equals("document.getElementById('state').textContent", f"Here as {alice.name}.")
        await tab.fill("[name=message]", "/roll")
        await tab.click("#compose button")
        assert len((await chat.hear("message", message="/roll"))["client_id"]) == 36
        said = (await chat.hear("message", username=dice.name))["message"]
        assert re.fullmatch(rf"{alice.name} rolls [1-6]", said)
        shown = [f"{alice.name}: <b>before</b>", f"{alice.name}: /roll", f"{dice.name}: {said}"]
        await tab.equals("document.getElementById('messages').innerText", "\n".join(shown))
