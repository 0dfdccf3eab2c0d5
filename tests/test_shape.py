"""The shape of the program: how large it may be and how it is laid out. To add, first simplify."""

import ast
import json
import re
import statistics
import subprocess
import symtable
import sys

from tests.processes import PROGRAM, ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
Defined = Function | ast.ClassDef
TEXT = PROGRAM.read_text("utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, Function)]
STARTS = {line.split()[-1]: at for at, line in enumerate(LINES) if re.match(r"# -+ \w+$", line)}


def lines_of(node: ast.stmt) -> range:
    """Return the numbers of a statement's lines, from its `def` to its end."""
    return range(node.lineno, (node.end_lineno or 0) + 1)


# --- Size


def test_the_program_is_small() -> None:
    """At most 2,000 lines, 1,500 of them code, and 90,000 characters, as ruff lays it out."""
    command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length=100", str(PROGRAM)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    documented = [node for node in ast.walk(TREE) if isinstance(node, Defined | ast.Module)]
    texts = [node.body[0] for node in documented if ast.get_docstring(node)]
    docstrings = {number for text in texts for number in lines_of(text)}
    told = {number for number, line in enumerate(LINES, 1) if re.match(r"\s*(#|$)", line)}
    assert len(LINES) <= 2000
    assert len(LINES) - len(told | docstrings) <= 1500
    assert len(TEXT) <= 90_000
    assert len([line for line in LINES if len(line) > 95]) <= 40


def test_no_function_is_long_or_nested_deeply() -> None:
    """At most 40 lines a function, half of them at most 10, and blocks at most four deep."""
    assert [function.name for function in FUNCTIONS if len(lines_of(function)) > 40] == []
    assert statistics.median(len(lines_of(function)) for function in FUNCTIONS) <= 10
    for function in FUNCTIONS:
        inside = [node.col_offset for node in ast.walk(function) if isinstance(node, ast.stmt)]
        assert (max(inside) - function.col_offset) // 4 - 1 <= 4, function.name


# --- Order


def test_sections_stand_in_order_and_say_what_they_know() -> None:
    """The docstring names them and what is in them; each opens with two to five lines."""
    told = ast.get_docstring(TREE) or ""
    assert f"Read downwards: {', '.join(STARTS)}." in told.replace("\n", " ")
    for section, functions in re.findall(r"^  (\w+): (\w+(?:, \w+)*)  ", told, re.MULTILINE):
        assert section in STARTS
        assert set(functions.split(", ")) <= {function.name for function in FUNCTIONS}, functions
    for name, at in STARTS.items():
        below = LINES[at + 1 : at + 8]
        assert 2 <= [line[:1] == "#" for line in below].index(False) <= 5, name


def test_statements_stand_in_their_section_and_read_every_column() -> None:
    """SQL is written there, or in the database's where it is an engine's own."""
    verbs = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\s")
    for node in ast.walk(TREE):
        if isinstance(node, ast.Constant) and verbs.match(str(node.value)):
            assert STARTS["database"] < node.lineno - 1 < STARTS["events"], node.lineno
    schema = (ROOT / "schema.sql").read_text("utf-8")
    columns = set(re.findall(r"^    ([a-z_]+) (?:TEXT|BIGINT)", schema, re.MULTILINE))
    statements = "\n".join(LINES[STARTS["statements"] : STARTS["events"]])
    assert columns and columns <= set(re.findall(r"\w+", statements))


def test_nothing_is_used_before_it_is_defined() -> None:
    """Read from top to bottom, every name of the module has been defined where it is used."""
    head = r"(?:async def |def |class )?(\w+)(?:[:(]| =)"
    defined = {name[1]: at for at, line in enumerate(LINES, 1) if (name := re.match(head, line))}

    def used(table: symtable.SymbolTable) -> set[str]:
        """Return the names of the module that a function or a class reads, or what is in it."""
        own = {one.get_name() for one in table.get_symbols() if one.is_global()}
        return own.union(*map(used, table.get_children()))

    for table in symtable.symtable(TEXT, PROGRAM.name, "exec").get_children():
        early = {name for name in used(table) if defined.get(name, 0) > table.get_lineno()}
        assert early <= {table.get_name()}, table.get_name()


# --- What has to agree


def test_the_packages_are_four_and_one_is_for_postgres_alone() -> None:
    """The top, by which uv runs it, and requirements.txt agree; SQLite does without asyncpg."""
    wanted = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert '# requires-python = ">=3.11"' in LINES
    assert f"# dependencies = {json.dumps(wanted)}" in LINES
    names = {re.split("[<>=~]", line)[0] for line in wanted}
    assert names == {"aiohttp", "aiosqlite", "pyjwt", "asyncpg"}
    script = "import sys, chatserver as c; c.create_app(c.Config()); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT)  # noqa: S603
    assert "aiosqlite" in loaded and "asyncpg" not in loaded


def test_every_promise_has_a_test() -> None:
    """Each promise is tested under its number; the seventh has a file of its own."""
    tests = (ROOT / "tests/test_promises.py").read_text("utf-8")
    names = re.findall(r"^async def test((?:_\d)+)_", tests, re.MULTILINE)
    assert set("".join(names)) >= set("1234568")
