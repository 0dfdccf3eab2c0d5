"""What is there for learners: the tour names what exists, exercises are solved, examples run."""

import re
import sys
from itertools import chain
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import expect

import chatserver
from chatserver import Config
from examples.embed import create_site
from tests import mutants
from tests.browser import browsing
from tests.commands import run, started, tool
from tests.conftest import Databases
from tests.people import At, company
from tests.processes import PROGRAM, ROOT, running, serving
from tests.words import KEY, PASSWORD

DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
TOUR = (DOCS / "tour.md").read_text("utf-8")
PATCHES = {path.stem: path.read_text("utf-8") for path in (DOCS / "solutions").glob("*.patch")}
TEXT = PROGRAM.read_text("utf-8")
NAMES = set(re.findall(r"\w+", TEXT + (ROOT / "tests/words.py").read_text("utf-8")))


# --- The tour


def test_the_tour_names_what_is_there() -> None:
    """Each name in it and its drawing is one of the program, each number and line as it is told."""
    told = re.findall(r"`([A-Za-z_]+)(?:\.([a-z_]+))?`", TOUR)
    drawn = re.findall(r'class="name"[^>]*>([^<]+)<', (DOCS / "message.svg").read_text("utf-8"))
    assert told and drawn
    for name in [*chain(*told), *", ".join(drawn).split(", ")]:
        assert name in NAMES | {"", "py"}, name
    for line in re.findall(r"`((?:if |socket\.|folded )[^`]+)`", TOUR):
        assert line in TEXT, line
    for number, unit, name in re.findall(r"([\d,]+)( KiB)?(?: s)?\s\(`([A-Z_]+)`\)", TOUR):
        value = int(number.replace(",", "")) << (10 if unit else 0)
        assert getattr(chatserver, name) == value, name
    for section in re.findall(r"section \*(\w+)\*", TOUR):
        assert re.search(f"^# -+ {section}$", TEXT, re.MULTILINE), section


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
        assert len([name for _, name, *_ in mutants.MUTANTS if part in name]) == 1, part


# --- The exercises


def test_exercises_name_what_is_there() -> None:
    """Solutions are as long as is told, and what the introduction tells to read or copy exists."""
    exercises = (DOCS / "exercises.md").read_text("utf-8")
    told = re.findall(r"^Solution: \[(\w+)\.patch\]\(.*\), (\d+) lines", exercises, re.MULTILINE)
    assert {name for name, _ in told} == set(PATCHES)
    for name, lines in told:
        _, *parts = re.split(r"^diff --git a/(\S+) .*\n", PATCHES[name], flags=re.MULTILINE)
        changed = dict(zip(parts[::2], parts[1::2], strict=True))
        program = "time_bot.py" if name == "time_bot" else "chatserver.py"
        added = re.findall(r"^\+(?!\+\+)", changed[program], re.MULTILINE)
        assert len(added) == int(lines) and f"tests/test_{name}.py" in changed, name
    for code in re.findall("`([^`\n]+)`", exercises.partition("\n## ")[0]):
        path, _, name = code.partition("::")
        if (ROOT / path).is_file():
            assert f"def {name}" in (ROOT / path).read_text("utf-8") or not name, code
        elif re.fullmatch(r"\w+|change\.\w+.*|chat\.change.*", code):
            assert set(re.findall(r"\w+", code)) <= NAMES, code


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


async def test_the_shop_announces_each_order_once(new_database: Databases) -> None:
    """Its own code posts, live for all; an order that comes again, also later, is old news."""
    config = Config(database_url=new_database(), secret_key=KEY)
    for last in ("180", "181"):
        async with (
            serving(create_site(config)) as url,
            company(At(f"{url}/chat"), "alice") as [alice],
            alice.chat("1") as chat,
        ):
            for number, status in (("17", 200), ("17", 200), (last, 200), ("x", 404)):
                async with alice.session.put(f"{url}/orders/{number}") as answer:
                    assert answer.status == status
            await chat.hears(f"Order {last} came in.", username="shop")
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
        browsing("$^") as browser,
    ):
        await chat.hears(type="presence", username=dice.name, online=True)
        await chat.say("<b>before</b>")
        page = await browser.page()
        await page.goto(f"{origin}/page.html")
        form = {"server": process.url, "username": alice.name, "password": PASSWORD}
        for field, text in form.items():
            await page.fill(f"[name={field}]", text)
        await page.click("#login button")
        await expect(page.locator("#state")).to_have_text(f"Here as {alice.name}.")
        await page.fill("[name=message]", "/roll")
        await page.click("#compose button")
        assert len((await chat.hears("/roll"))["client_id"]) == 36
        said = (await chat.hears(type="message", username=dice.name))["message"]
        assert re.fullmatch(rf"{alice.name} rolls [1-6]", said)
        shown = [f"{alice.name}: <b>before</b>", f"{alice.name}: /roll", f"{dice.name}: {said}"]
        await expect(page.locator("#messages li")).to_have_text(shown)
