"""The checker of the log is itself checked: servers broken on purpose, each of which it names."""

from pathlib import Path

import pytest

from tests.checker import Stream, Trial, trying
from tests.commands import copy_program
from tests.people import company
from tests.processes import PROGRAM, running
from tests.words import Event

# What the checker finds when something is put before a text of the server.
BROKEN = {
    "lost": ("self.hub.publish(change.events); await asyncio.sleep(0.05); ", "await fetch(ADD"),
    "hole": ("secrets.randbelow(200) and ", "socket.write(frames)"),
    "repeat": ("cursor -= cursor > 0; ", "socket.cursor = cursor\n"),
    "stuck": ("self.heads[room_id] += not secrets.randbelow(50); ", "self.heads[room_id] += 1"),
    "refused": ("secrets.randbelow(20) or first([], 'x'); ", "room_id, username, client_id = p"),
    "reset": ("secrets.randbelow(3) == 0 or ", "cursor > seq or"),
    "closed": ("secrets.randbelow(20) or socket.close(4403, 'no'); ", "socket.heard = mono"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
async def test_a_broken_server_is_found_out(tmp_path: Path, kind: str) -> None:
    """Whatever is broken on purpose is named by the checker, be it by kill -9 or in peace."""
    new, old = BROKEN[kind]
    text = PROGRAM.read_text("utf-8")
    assert text.count(old) == 1, f"{old} is there {text.count(old)} times"
    copy_program(tmp_path)
    program, url = tmp_path / PROGRAM.name, f"sqlite:///{tmp_path}/chat.db"
    program.write_text(text.replace(old, new + old), "utf-8")
    async with (
        running(tmp_path, url, clean=False, program=program) as [process],
        company(process, "alice", "bob") as users,
        trying([process], users, patience=5, sound=False) as trial,
    ):
        for _ in range(5 if kind == "lost" else 1):
            await trial.more(150)
            await process.again()
        await trial.more(150)
    kinds = {problem.partition(":")[0] for problem in trial.problems}
    assert kind in kinds and (kind != "refused" or "status" in kinds), trial.problems[:20]


HEAD: Event = {"type": "message", "username": "al", "created_at": "now"}
ONE, TWO, THREE = LOG = [
    HEAD | {"seq": seq, "client_id": client_id, "message": f"text of {client_id}"}
    for seq, client_id in ((1, "a"), (2, "b"), (3, "c"))
]
# What the checker finds, in which log, when so much was told and seen.
VERDICTS: list[tuple[str, list[Event], list[tuple[str, int]], list[Event]]] = [
    ("", LOG, [("a", 1), ("a", 1)], LOG),
    ("split", [ONE, TWO], [], []),
    ("gap", [ONE, THREE], [], []),
    ("twice", [*LOG, TWO | {"seq": 4}], [("b", 2)], []),
    ("moved", LOG, [("a", 1), ("a", 2)], []),
    ("lost", LOG, [("a", 2)], []),
    ("lost", LOG, [("d", 4)], []),
    ("garbled", [ONE, TWO | {"message": "x"}, THREE], [("b", 2)], []),
    ("hole", LOG, [], [ONE, THREE]),
    ("repeat", LOG, [], [ONE, TWO, TWO, THREE]),
    ("other", LOG, [], [ONE | {"username": "bo"}, TWO, THREE]),
]


@pytest.mark.parametrize(("kind", "log", "told", "seen"), VERDICTS)
def test_each_kind_of_broken_promise_has_a_name(
    kind: str, log: list[Event], told: list[tuple[str, int]], seen: list[Event]
) -> None:
    """What was told and what was seen of a log is found sound, or named for what is wrong."""
    trial = Trial([], [], "")
    trial.streams = [Stream(events=seen)]
    for client_id, seq in told:
        trial.acknowledge(client_id, seq)
    trial.judge(log, LOG if kind == "split" else log)
    assert {problem.partition(":")[0] for problem in trial.problems} == {kind} - {""}
