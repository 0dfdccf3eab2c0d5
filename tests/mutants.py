"""Are the tests sharp? Each fault is put into a copy of the program, and the tests have to see it.

python -m tests.mutants                  every fault, one after another
python -m tests.mutants "lost notes"     those whose names have this in them
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Who should see a fault: what it is, the text that stands in the program once, what is put there.
# fmt: off
FAULTS = {
    "test_promises": [
        ("events are published before the commit",
         "await fetch(ADD_EVENTS,", "self.hub.publish(change.events)\n                await fetch(ADD_EVENTS,"),
        ("synchronous=NORMAL", "synchronous=FULL", "synchronous=NORMAL"),
        ("a replay begins one too early",
         "e.seq > $2 ORDER BY e.seq LIMIT $3", "e.seq >= $2 ORDER BY e.seq LIMIT $3"),
        ("a replay skips one", "e.seq > $2 ORDER BY e.seq LIMIT $3", "e.seq > $2 + 1 ORDER BY e.seq LIMIT $3"),
        ("an expired token still asks", "if login.expires < time.time():", "if False:"),
        ("an expired token still talks", "elif me.expires < time.time():", "elif False:"),
        ("a deleted text stays in the search",
         "fold(message) if message else None", 'fold(message or json.loads(row["json"])["message"])'),
        ("a page repeats the one before", "            frames.clear()\n", ""),
        ("a cursor at the head is reset", "if cursor > seq or", "if cursor >= seq or"),
        ("a cursor above the head is served", "if cursor > seq or", "if"),
        ("an epoch is not compared", ' or data.raw.get("epoch", chat.epoch) != chat.epoch', ""),
        ("who comes in is not read on to", "    chat.hub.notice(room_id, seq)\n", ""),
        ("a note of new events is not sent", '            self.db.tell("head", room_id, added[-1]["seq"])\n', ""),
        ("an edit is replayed without its text", "encode(json.loads(stored) | text)", "stored"),
        ("a retry is not looked up", "if before:", "if False:"),
        ("another text under a client_id is acknowledged",
         "!= post.message:\n            raise", '== "":\n            raise'),
        ("a retry of an edited message is a conflict", '"edited_at" not in event and ', ""),
        ("a retry in the same batch is not seen", 'sent.get(key, row["sent"])', 'row["sent"]'),
        ("the removed stay", "if removed == socket.username and", "if False and"),
        ("the removed get the rest of the page", "if removed or len(frames)", "if len(frames)"),
        ("who has come back is closed for a former removal", " and end > socket.entered", ""),
        ("an ended log-in is told to nobody",
         '    change.notes.append(("log-ins ended", me.username, me.version + 1))\n', ""),
        ("an ended log-in is not told to other processes", 'await fetch(self.db.notify, encode(["", note]))', "pass"),
        ("an expired token keeps its socket", "elif self.login and time.time() > self.login.expires", "elif False"),
        ("who stalls is not cut off", "elif now - self.moved > STALL", "elif False"),
        ("events pile up for who stalls", "== start and not socket.is_full()", "== start"),
        ("whispers pile up for who stalls", "if other and not socket.is_full()", "if other"),
        ("a deleted text stays in the log", '            del event["message"]\n', ""),
        ("a deleted text stays in the file", "secure_delete=ON", "secure_delete=OFF"),
    ],
    "test_messages": [
        ("moderators can edit", "not (erase and rank", "not (rank"),
        ("who posts has not read", "m.username AND e.target IS NULL", "m.username AND e.target = 0"),
        ("a read mark moves back", " AND read_seq < $3", ""),
        ("visitors have a read mark", 'rank_of(seat["role"], seat["kind"], "member")\n    seq = min', "seq = min"),
        ("changes are not made one at a time", "async with self.writing, self.db", "async with self.db"),
        ("moderators cannot delete", 'rank >= RANKS["moderator"]', 'rank > RANKS["moderator"]'),
        ("the message at the mark is unread", "e.seq > {MARK}", "e.seq >= {MARK}"),
        ("a search takes % for anything", 'r"!\\1"', 'r"\\1"'),
        ("what does not show is a message", "or (name in SHOWN and", "or (False and"),
    ],
    "test_accounts": [
        ("a room joined in between is not seen", "if (row[\"room_id\"], me.username) not in change.seats", "if False"),
        ("401 does not say Bearer", "if error.status == 401", "if False"),
        ("a change does not check the log-in", 'check_version(change.rows[0]["version"], me)', "pass"),
        ("a hash is cheap", "scrypt$16384$8$5", "scrypt$1024$8$5"),
        ("an unknown name is refused at once", 'f"{SCRYPT}$00$00"', '"scrypt$2$1$1$00$00"'),
        ("a new password keeps the old tokens", "SET password = $2, version = version + 1", "SET password = $2"),
    ],
    "test_lessons": [
        ("a post does not check the log-in", '    check_version(seat["version"], post.login)\n', ""),
        ("users are not locked between processes", ", (SELECT count(*) FROM u)", ""),
        ("a process that is gone keeps its users", "        self.hub.forget_peers(PEER_SILENCE)\n", ""),
        ("a mistake ends a task", 'LOGGER.exception("a task failed")', "raise"),
        ("a mistake stops the writer",
         'except Exception:\n            LOGGER.exception("a batch',
         'except KeyError:\n            LOGGER.exception("a batch'),
        ("a later log-in is closed too", "socket.login.version < version", "True"),
        ("lost notes are not made up for", "self.sweep: 1, self.poll: POLL}", "self.sweep: 1}"),
        ("a stop tells nobody", 'socket.close(1001, "shutting down")', "pass"),
    ],
    "test_rooms": [
        ("the banned may search", "(m.role <> 'banned' OR", "(m.role IS NOT NULL OR"),
        ("moderators make moderators", "old < mine and new < mine", "old < mine"),
        ("members promote themselves", '<= max(mine, RANKS["member"])', "<= 4"),
        ("the banned may enter", '"banned": 0', '"banned": 1'),
        ("moderators rule moderators", "allowed = old < mine and", "allowed ="),
        ("the last owner may step down", 'if before == "owner" and role', 'if before == "owner" and leave and role'),
        ("a refused change is kept", "                await self.writer.rollback()\n", ""),
        ("a direct room can be taken", "if room_id.startswith(DIRECT) and", "if False and"),
        ("rooms are not locked between processes", "ORDER BY room_id FOR UPDATE", "ORDER BY room_id"),
        ("the texts of a deleted room stay", "await step.fetch(DROP_EVENTS, room_id, seq)", "pass"),
    ],
    "test_limits": [
        ("an edit may be too long", "None if erase else check_length(chat, data)", 'None if erase else data.text("message")'),
        ("message_length is one less", "len(message) > chat.config", "len(message) >= chat.config"),
        ("a good log-in counts as failed", "        self.logins.take(data.address, -1)\n", ""),
        ("a rate lets one too many pass", "and left < tokens:", "and left < tokens - 1:"),
        ("the client's own X-Forwarded-For counts", "seen[-proxies]", "seen[0]"),
        ("each address of IPv6 counts by itself", "(int(parsed), 64)", "(int(parsed), 128)"),
        ("a user has one socket more", "self.config.sockets_per_user <= len(", "self.config.sockets_per_user < len("),
        ("sockets without a log-in are not counted",
         "chat.hub.sockets.add(socket)\n        if me:", "if me:\n            chat.hub.sockets.add(socket)"),
        ("any page may ask", "if origin in [one", "if origin or [one"),
        ("scripts may be inline", "\"default-src 'self'; img", "\"default-src 'self' 'unsafe-inline'; img"),
    ],
    "test_websocket": [
        ("errors echo what they were sent", "item[name] = read(name)", "item[name] = data.raw[name]"),
        ("frames behind the close frame are obeyed",
         "            if socket.closed:\n                continue  # until the peer closes too\n", ""),
        ("who does not log in may stay", "if self.login is None and now", "if False and now"),
        ("nobody is pinged", "elif now - self.pinged > PING", "elif False"),
        ("a crowd is whispered to", "<= QUIET_ABOVE", "<= QUIET_ABOVE + 1"),
        ("a second socket is a second presence", "if bool(before) != bool(room[username])", "if True"),
    ],
    "test_bad_input": [
        ("an expired token logs in", '"verify_iat": False}', '"verify_iat": False, "verify_exp": False}'),
        ("a body may take for ever", "asyncio.timeout(BODY_WAIT)", "asyncio.timeout(None)"),
        ("deep nesting is a mistake",
         "except (ValueError, RecursionError) as error:\n        raise ChatError(400",
         "except ValueError as error:\n        raise ChatError(400"),
    ],
}
# fmt: on

MUTANTS = [(tests, *fault) for tests, faults in FAULTS.items() for fault in faults]


def copy(to: str | Path) -> None:
    """Copy the program and its tests."""
    private = shutil.ignore_patterns(".*", "*.db*", "__pycache__")
    shutil.copytree(ROOT, to, ignore=private, dirs_exist_ok=True)


def seen(tests: str, old: str, new: str) -> str:
    """Put a fault into a copy of the program; return which test sees it, if one does."""
    text = (ROOT / "chatserver.py").read_text("utf-8")
    assert text.count(old) == 1, f"this stands in the program {text.count(old)} times: {old}"
    command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{tests}.py"]
    with tempfile.TemporaryDirectory() as folder:
        copy(folder)
        Path(folder, "chatserver.py").write_text(text.replace(old, new), "utf-8")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode > 1:  # else it would look as if every fault were seen
        sys.exit(f"the tests do not even start: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed[1] if failed else ""


def main() -> None:
    """Try every fault that is asked for; the exit code counts those that no test saw."""
    missed = []
    for tests, name, old, new in MUTANTS:
        if any(word in name for word in sys.argv[1:] or [""]):
            test = seen(tests, old, new)
            missed += [] if test else [name]
            print(f"{name}: {test or 'SURVIVED'}", flush=True)
    print(f"seen by no test: {missed}")
    sys.exit(len(missed))


if __name__ == "__main__":
    main()
