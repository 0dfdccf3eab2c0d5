"""The page on security: what it names is there, and no item stands there twice."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/security.md").read_text("utf-8")


def test_every_test_that_holds_an_item_exists() -> None:
    """What the page names as `file::test` is a function of that file."""
    named = set(re.findall(r"(tests/\w+\.py)::(\w+)", PAGE))
    there = {file: (ROOT / file).read_text("utf-8") for file, _ in named}
    assert [one for one in sorted(named) if f"def {one[1]}(" not in there[one[0]]] == []


def test_every_item_stands_once_and_says_how_it_stands() -> None:
    """No number comes twice; each row ends with a test, or says that there is none."""
    rows = re.findall(r"^\| (V[^|]*) \|.*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    items = [item for row in rows for item in row[0].split(", ")]
    assert len(items) == len(set(items)) > 99
    assert [row for row in rows if not re.search("::test_|^[*]{2}(left to|not met)", row[1])] == []


def test_password_fields_hide_what_is_typed_and_let_managers_help() -> None:
    """Each has the type of a password and says which, and nothing stands in a paste's way."""
    fields = re.findall(r"<input[^>]*password[^>]*>", (ROOT / "web/index.html").read_text("utf-8"))
    assert fields and all('type="password"' in field for field in fields)
    assert all(re.search('autocomplete="(current|new)-password"', field) for field in fields)
    assert "paste" not in (ROOT / "web/chat.js").read_text("utf-8")
