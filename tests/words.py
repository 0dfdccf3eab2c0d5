"""What the helpers have in common: waiting, telling events in words, judging answers.

Nothing here sleeps for luck: every wait is for a condition, and fails after PATIENCE seconds.
"""

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

import pytest

import chatserver

KEY = "a key of the tests that is long enough for each algorithm: 64 bytes, and more"
PASSWORD = "1234"
PATIENCE = 10.0
NUMBERED = ("message", "edit", "delete", "member")
LIMITS = ("_second", "_minute", "_hour", "sockets", "_user")
# Most tests are not about limits, and all come from one address.
NO_LIMITS = {field.name: 0 for field in fields(chatserver.Config) if field.name.endswith(LIMITS)}

Event = dict[str, Any]


def unique(word: str) -> str:
    """Return the word with an ending that nobody else has."""
    return f"{word}-{secrets.token_hex(4)}"


async def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait until the condition holds; `what` says what was waited for when it never does."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience} s for {what}"
        await asyncio.sleep(0.005)


def missing(reason: str) -> NoReturn:
    """Skip a test that cannot run here; in CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def tell(event: Event) -> str:
    """Return an event in a few words, with the names as the test gave them."""
    words = {key: str(value).partition("-")[0] for key, value in event.items()}
    who = f"{event['seq']} {words['username']}"
    match event["type"]:
        case "message":
            return f"{who}: {event.get('message', '(deleted)')}"
        case "edit":
            return f"{who} edits {event['target']}: {event.get('message', '(deleted)')}"
        case "delete":
            return f"{who} deletes {event['target']}"
        case _:
            return f"{who} makes {words['member']} {event['role']}"


class Answer(NamedTuple):
    """What the server answered, and what every answer has to be like."""

    request: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return the body, which has to be JSON and to say so."""
        kind = self.headers.get("Content-Type", "")
        assert kind.startswith("application/json"), f"{self} has the type {kind!r}"
        return json.loads(self.body)

    def ok(self, status: int = 200) -> Any:
        """Return the body of a success with just this status."""
        assert self.status == status, f"expected {status}: {self}"
        return self.json if self.body else None

    def refused(self, status: int, code: str = "") -> Event:
        """Check that this is the error that is promised, and return it."""
        assert self.status == status, f"expected {status} {code}: {self}"
        error: Event = self.json
        is_refusal(error, code)
        assert ("WWW-Authenticate" in self.headers) == (status == 401), self
        assert ("Allow" in self.headers) == (status == 405), self
        if status in (429, 503):
            assert int(self.headers["Retry-After"]) >= 1, self
        return error

    def __str__(self) -> str:
        """Return the request and the answer on one line, for a failing assertion."""
        return f"{self.request} -> {self.status} {self.body[:500]!r}"


def is_refusal(error: Event, code: str = "") -> None:
    """Check that an error says its code and one sentence for people."""
    assert isinstance(error["error"], str) and isinstance(error["detail"], str), error
    assert error["detail"].strip() and "\n" not in error["detail"], error
    assert not code or error["error"] == code, f"expected {code}: {error}"
