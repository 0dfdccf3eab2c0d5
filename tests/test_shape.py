"""The shape of the code: to add, first simplify."""

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest

from tests.helpers import PROGRAM, ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar),
    *(ast.With, ast.AsyncWith, ast.Match),
)


@pytest.fixture(scope="module")
def source() -> str:
    """Give the program as `ruff format` lays it out."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100"]
    return subprocess.run(  # noqa: S603
        [*command, "--stdin-filename", PROGRAM.name, "-"],
        input=PROGRAM.read_text("utf-8"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def tree(source: str) -> ast.Module:
    """Give the program's syntax tree."""
    return ast.parse(source)


def functions(tree: ast.AST) -> list[Function]:
    """Return every function, method and inner function."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Return a function's lines, from its `def` to its end."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_the_program_does_not_grow(source: str) -> None:
    """The whole server, with its settings, its SQL and both engines, is at most 2,222 lines."""
    assert len(source.splitlines()) <= 2222


def test_the_page_has_at_most_four_hundred_lines() -> None:
    """The chat page is at most 400 lines, none of them endless."""
    lines = (ROOT / "client.html").read_text("utf-8").splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 200


def test_no_function_is_long(tree: ast.Module) -> None:
    """No function has more than 40 lines, and half of them have at most 10."""
    lengths = {function.name: length(function) for function in functions(tree)}
    assert {name: lines for name, lines in lengths.items() if lines > 40} == {}
    assert statistics.median(length(function) for function in functions(tree)) <= 10


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


def test_nothing_is_nested_deeply(tree: ast.Module) -> None:
    """Blocks lie at most four deep in each other."""
    depths = {function.name: depth(function.body) for function in functions(tree)}
    assert {name: levels for name, levels in depths.items() if levels > 4} == {}


def test_every_function_and_class_says_what_it_is_for(tree: ast.Module) -> None:
    """Every function and every class has a docstring, and so has the module."""
    defined = [*functions(tree), *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    assert ast.get_docstring(tree)
    silent = [node.name for node in defined if not (ast.get_docstring(node) or "").strip()]
    assert set(silent) <= {"__init__", "stop_all", "receive", "handler"}


def definitions(tree: ast.Module) -> dict[str, int]:
    """Return the names that the module itself defines, with the line where each is ready."""
    lines: dict[str, int] = {}
    for statement in tree.body:
        if isinstance(statement, Function | ast.ClassDef):
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
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        else:
            names |= bound(ast.iter_child_nodes(node))
    return names


def uses(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """Yield each name that is read, with its line, but for those that a scope hides."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.id, node.lineno
    inside = hidden
    if isinstance(node, Function | ast.Lambda | ast.ClassDef):
        inside |= bound(ast.iter_child_nodes(node))
    hints = {getattr(node, name, None) for name in ("annotation", "returns")}  # never evaluated
    for child in ast.iter_child_nodes(node):
        if child in hints:
            continue
        # The names of a class are not those of its methods.
        is_method = isinstance(node, ast.ClassDef) and isinstance(child, Function)
        yield from uses(child, hidden if is_method else inside)


def test_nothing_is_used_before_it_is_defined(tree: ast.Module) -> None:
    """Read from top to bottom, every name of the module has been defined where it is used."""
    defined = definitions(tree)
    early = []
    for statement in tree.body:
        own = getattr(statement, "name", "")
        for name, line in uses(statement):
            if name != own and defined.get(name, 0) > statement.lineno:
                early.append(f"line {line}: {name} (defined in line {defined[name]})")
    assert early == []
