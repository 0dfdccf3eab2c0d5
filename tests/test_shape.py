"""The shape of the program: how large it may be and how it is laid out. To add, first simplify."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "chatserver.py"
SECTIONS = [
    *("settings", "errors", "fields", "passwords", "database", "statements", "events", "changes"),
    *("hub", "chat", "operations", "HTTP", "WebSocket", "application"),
]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Defined = Function | ast.ClassDef
BLOCKS = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar),
    *(ast.With, ast.AsyncWith, ast.Match),
)
TEXT = PROGRAM.read_text("utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Return a function's lines, from its `def` to its end."""
    return (function.end_lineno or 0) - function.lineno + 1


def docstring_lines() -> set[int]:
    """Return the numbers of all lines of docstrings."""
    found: set[int] = set()
    for node in ast.walk(TREE):
        if isinstance(node, Defined | ast.Module) and ast.get_docstring(node):
            found |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def comment_lines() -> set[int]:
    """Return the numbers of all lines that are nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(TEXT).readline)
    starts = [token.start for token in tokens if token.type == tokenize.COMMENT]
    return {line for line, column in starts if not LINES[line - 1][:column].strip()}


# --- Size


def test_the_program_is_small() -> None:
    """At most 2,000 lines, 1,500 of them code, and 90,000 characters, as ruff lays it out."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--check",
        "--line-length",
        "100",
        str(PROGRAM),
    ]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    told = docstring_lines() | comment_lines()
    code = [line for number, line in enumerate(LINES, 1) if line.strip() and number not in told]
    assert len(LINES) <= 2000
    assert len(code) <= 1500
    assert len(TEXT) <= 90_000


def test_lines_are_not_packed() -> None:
    """At most 40 lines are over 95 columns, and none has two statements."""
    assert len([line for line in LINES if len(line) > 95]) <= 40
    tokens = tokenize.generate_tokens(io.StringIO(TEXT).readline)
    assert not [token.start for token in tokens if token.exact_type == tokenize.SEMI]


def test_no_function_is_long() -> None:
    """No function has more than 40 lines, and half of them have at most 10."""
    assert {one.name: length(one) for one in FUNCTIONS if length(one) > 40} == {}
    assert statistics.median(map(length, FUNCTIONS)) <= 10


def depth(statements: list[ast.stmt], level: int = 0) -> int:
    """Return how deep blocks lie in blocks; an `elif` is no deeper than its `if`."""
    return max((level, *(inner(statement, level) for statement in statements)))


def inner(statement: ast.stmt, level: int) -> int:
    """Return how deep a statement reaches; what is defined inside is measured by itself."""
    if not isinstance(statement, BLOCKS):
        return level
    deepest = level + 1
    bodies = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
    others = [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
    for body in [*bodies, *(other.body for other in others)]:
        is_elif = isinstance(statement, ast.If) and body is statement.orelse and len(body) == 1
        is_elif = is_elif and isinstance(body[0], ast.If)
        deepest = max(deepest, depth(body, level if is_elif else level + 1))
    return deepest


def test_nothing_is_nested_deeply() -> None:
    """Blocks lie at most four deep in each other."""
    depths = {function.name: depth(function.body) for function in FUNCTIONS}
    assert {name: levels for name, levels in depths.items() if levels > 4} == {}


# --- Order


def banners() -> list[tuple[int, str]]:
    """Return the line and the name of each section."""
    found = [(at, re.fullmatch(r"# -+ ([A-Za-z]+)", line)) for at, line in enumerate(LINES)]
    return [(at, banner[1]) for at, banner in found if banner]


def test_sections_stand_in_the_order_that_the_docstring_tells() -> None:
    """The sections are those that are promised, in that order."""
    assert [name for _, name in banners()] == SECTIONS
    told = " ".join((ast.get_docstring(TREE) or "").split())
    assert ", ".join(SECTIONS[:-1]) in told


def test_each_section_says_what_it_knows() -> None:
    """A section opens with two to five lines of comment."""
    for at, name in banners():
        below = LINES[at + 1 : at + 8]
        comment = next(n for n, line in enumerate(below) if not line.startswith("#"))
        assert 2 <= comment <= 5, name


def test_every_function_and_class_says_what_it_is_for() -> None:
    """The module, every class and every function but __init__ has a docstring of its own."""
    assert ast.get_docstring(TREE)
    defined = [node for node in ast.walk(TREE) if isinstance(node, Defined)]
    silent = {node.name for node in defined if not (ast.get_docstring(node) or "").strip()}
    nested = {
        inside.name
        for function in FUNCTIONS
        for inside in ast.walk(function)
        if isinstance(inside, Function) and inside is not function
    }
    assert silent - nested <= {"__init__"}


def test_statements_stand_in_their_section() -> None:
    """SQL is written in its section, or in the database's where it is an engine's own."""
    starts = {name: at for at, name in banners()}
    where = range(starts["database"], starts["events"])
    verbs = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\s")
    stray = [
        f"{node.lineno}: {node.value[:40]}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if verbs.match(node.value) and node.lineno - 1 not in where
    ]
    assert stray == []


def definitions() -> dict[str, int]:
    """Return the names that the module itself defines, with the line where each is ready."""
    lines: dict[str, int] = {}
    for statement in TREE.body:
        if isinstance(statement, Defined):
            lines.setdefault(statement.name, statement.lineno)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                lines.setdefault(node.id, statement.lineno)
    return lines


def bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that these statements bind, but for those inside of inner functions."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        names |= {node.name} if isinstance(node, Defined) else bound(ast.iter_child_nodes(node))
    return names


def uses(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """Yield each name that is read, with its line, but for those that a scope hides."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.id, node.lineno
    inside = hidden
    if isinstance(node, Defined | ast.Lambda):
        inside |= bound(ast.iter_child_nodes(node))
    hints = {getattr(node, name, None) for name in ("annotation", "returns")}  # never evaluated
    for child in ast.iter_child_nodes(node):
        if child in hints:
            continue
        # The names of a class are not those of its methods.
        is_method = isinstance(node, ast.ClassDef) and isinstance(child, Function)
        yield from uses(child, hidden if is_method else inside)


def test_nothing_is_used_before_it_is_defined() -> None:
    """Read from top to bottom, every name of the module has been defined where it is used."""
    defined = definitions()
    early = []
    for statement in TREE.body:
        own = getattr(statement, "name", "")
        for name, line in uses(statement):
            if name != own and defined.get(name, 0) > statement.lineno:
                early.append(f"line {line}: {name} (defined in line {defined[name]})")
    assert early == []


def test_the_docstring_leads_to_names_that_exist() -> None:
    """What the map at the top names as a function or a section is one."""
    names = {node.name for node in ast.walk(TREE) if isinstance(node, Defined)}
    told = ast.get_docstring(TREE) or ""
    steps = re.findall(r"^  (\w+): (\w+(?:, \w+)*)  ", told, re.MULTILINE)
    assert steps
    for section, functions in steps:
        assert section in SECTIONS
        assert set(functions.split(", ")) <= names, functions


# --- What has to agree


def test_the_packages_are_those_of_requirements_txt() -> None:
    """The block at the top, by which uv runs the file, wants what requirements.txt wants."""
    block = re.search(r"^# dependencies = (\[.*\])$", TEXT, re.MULTILINE)
    wanted = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert block
    assert ast.literal_eval(block[1]) == wanted
    names = {re.split("[<>=~]", line)[0] for line in wanted}
    assert names == {"aiohttp", "aiosqlite", "pyjwt", "asyncpg"}


def test_asyncpg_is_imported_for_postgres_alone() -> None:
    """With SQLite the server needs three packages, and the fourth is not even looked for."""
    script = (
        "import sys, chatserver; chatserver.create_app(chatserver.Config()); print(*sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
    assert "asyncpg" not in done.stdout.split()


def test_every_promise_has_a_test() -> None:
    """Each promise is tested under its number; the seventh has a file of its own."""
    tests = (ROOT / "tests/test_promises.py").read_text("utf-8")
    names = re.findall(r"^async def test((?:_\d)+)_", tests, re.MULTILINE)
    assert set("".join(names)) - {"_"} == set("1234568")


def test_every_column_is_read() -> None:
    """The schema has no column that no statement names."""
    schema = (ROOT / "schema.sql").read_text("utf-8")
    columns = set(re.findall(r"^    ([a-z_]+) (?:TEXT|BIGINT)", schema, re.MULTILINE))
    starts = {name: at for at, name in banners()}
    statements = "\n".join(LINES[starts["statements"] : starts["events"]])
    assert columns
    assert {name for name in columns if not re.search(rf"\b{name}\b", statements)} == set()
