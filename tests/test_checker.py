"""The checker of the log is itself checked: servers broken on purpose, each of which it names."""

from pathlib import Path

import pytest

from tests.checker import Record, Stream, Trial, judge
from tests.commands import copy_program
from tests.people import company
from tests.processes import PROGRAM, running
from tests.words import Event

STORE = "                await fetch(ADD_EVENTS, document(change.events))\n"
PUBLISH = (
    "                self.hub.publish(change.events)\n                await asyncio.sleep(0.05)\n"
)
# How a server is broken, and what the checker may call it.
BROKEN: dict[str, tuple[str, str, set[str]]] = {
    "acknowledges before the commit": (STORE, STORE + PUBLISH, {"lost", "reset", "other"}),
    "drops one delivery in 200": (
        *("socket.write(frames)\n", "secrets.randbelow(200) and socket.write(frames)\n"),
        {"hole"},
    ),
    "repeats one on resume": (
        *("    socket.cursor = cursor\n", "    socket.cursor = max(cursor - 1, 0)\n"),
        {"repeat"},
    ),
    "skips a number": (
        *("self.heads[room_id] += 1\n", "self.heads[room_id] += secrets.choice([1] * 50 + [2])\n"),
        {"gap", "hole", "stuck"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
async def test_a_broken_server_is_found_out(tmp_path: Path, what: str) -> None:
    """Whatever is broken on purpose is named by the checker, be it by kill -9 or in peace."""
    old, new, names = BROKEN[what]
    text = PROGRAM.read_text("utf-8")
    assert text.count(old) == 1, f"the text to replace is there {text.count(old)} times: {old}"
    copy_program(tmp_path)
    program = tmp_path / PROGRAM.name
    program.write_text(text.replace(old, new), "utf-8")
    async with (
        running(tmp_path, f"sqlite:///{tmp_path}/chat.db", clean=False, program=program) as [
            process
        ],
        company(process, "alice", "bob") as users,
    ):
        trial = Trial([process], users, await users[0].room(users[1]))
        trial.patience = 5
        async with trial:
            for _ in range(5 if "commit" in what else 1):
                await trial.more(150)
                await process.again()
            await trial.more(150)
    assert {problem.partition(":")[0] for problem in trial.problems} & names, trial.problems[:20]


def event(seq: int, **more: object) -> Event:
    """Return an event of a made-up log."""
    return {"type": "message", "seq": seq, "username": "al", "created_at": "now", **more}


LOG = [event(1), event(2, client_id="a", message="text of a"), event(3)]
VERDICTS: list[tuple[str, list[Event], dict[str, int], list[Event]]] = [
    ("", LOG, {"a": 2}, LOG),
    ("gap", [LOG[0], LOG[2]], {}, []),
    ("twice", [*LOG, event(4, client_id="a", message="text of a")], {"a": 2}, []),
    ("lost", LOG, {"a": 3}, []),
    ("lost", LOG, {"b": 4}, []),
    ("garbled", [LOG[0], event(2, client_id="a", message="x"), LOG[2]], {"a": 2}, []),
    ("hole", LOG, {}, [LOG[0], LOG[2]]),
    ("repeat", LOG, {}, [*LOG[:2], *LOG[1:]]),
    ("other", LOG, {}, [event(1, username="bo"), *LOG[1:]]),
    ("behind", LOG, {}, LOG[:2]),
]


@pytest.mark.parametrize(("kind", "log", "ok", "seen"), VERDICTS)
def test_each_kind_of_broken_promise_has_a_name(
    kind: str, log: list[Event], ok: dict[str, int], seen: list[Event]
) -> None:
    """What was told and what was seen of a log is found sound, or named for what is wrong."""
    record = Record(sent={"a": "text of a", "b": "text of b"}, ok=ok)
    record.streams.append(Stream(0 if seen else 3, live=bool(seen), events=seen))
    problems = judge(record, log, 3)
    assert {problem.partition(":")[0] for problem in problems} == ({kind} if kind else set())
