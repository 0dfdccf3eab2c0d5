"""The page on security: what it names is there, and no item stands there twice."""

import re

from tests.processes import ROOT


def test_every_item_stands_once_and_names_tests_that_exist() -> None:
    """No number comes twice; each row ends with tests, or says that there is none."""
    page = (ROOT / "docs/security.md").read_text("utf-8")
    rows = re.findall(r"^\| (V[^|]*) \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    items = [item for numbers, _ in rows for item in numbers.split(", ")]
    assert len(items) == len(set(items)) > 99
    assert [row for row in rows if not re.search("::test_|^[*]{2}(left to|not met)", row[1])] == []
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", page):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), name


def test_password_fields_hide_what_is_typed_and_let_managers_help() -> None:
    """Each has the type of a password and says which, and nothing stands in a paste's way."""
    fields = re.findall(r"<input[^>]*password[^>]*>", (ROOT / "web/index.html").read_text("utf-8"))
    assert fields and all('type="password"' in field for field in fields)
    assert all(re.search('autocomplete="(current|new)-password"', field) for field in fields)
    assert "paste" not in (ROOT / "web/chat.js").read_text("utf-8")
