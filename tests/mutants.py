"""Are the tests sharp? Each fault is put into a copy of the program, and the tests have to see it.

    python -m tests.mutants                  every fault, one after another
    python -m tests.mutants "a lost note"    those whose names have this in them

A fault names the test file that should see it; if that does not, the whole fast suite has a try.
Tests that cannot even be collected would fail with every fault, so that is looked at first.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WHOLE = ("chatserver.py", "schema.sql", "config.ini", "requirements.txt", "pyproject.toml")
FOLDERS = ("web", "tests", "docs", "deploy")
PROMISES, LESSONS, ROOMS = "test_promises", "test_lessons", "test_rooms"
MESSAGES, SOCKETS, LIMITS = "test_messages", "test_websocket", "test_limits"
ACCOUNTS, BAD = "test_accounts", "test_bad_input"
SUITE = (ACCOUNTS, ROOMS, MESSAGES, SOCKETS, PROMISES, LIMITS, BAD, LESSONS)


class Mutant(NamedTuple):
    """A fault: what it is, the text that stands there once, what is put there, who should see it."""

    name: str
    old: str
    new: str
    tests: str


# fmt: off
MUTANTS = [
    Mutant("events are published before the commit", "document(change.events))\n",
           "document(change.events))\n                self.hub.publish(change.events)\n", PROMISES),
    Mutant("synchronous=NORMAL", "synchronous=FULL", "synchronous=NORMAL", PROMISES),
    Mutant("a retry is not looked up", "    if before:\n", "    if False:\n", MESSAGES),
    Mutant("another text under a client_id is acknowledged",
           '!= post.message:\n            raise', '== "":\n            raise', MESSAGES),
    Mutant("a retry of an edited message is a conflict", '"edited_at" not in event and ', "", MESSAGES),
    Mutant("a retry in the same batch is not seen", "sent.get(key, row[\"sent\"])", 'row["sent"]', MESSAGES),
    Mutant("a replay begins one too early", "e.seq > $2 ORDER BY e.seq LIMIT $3",
           "e.seq >= $2 ORDER BY e.seq LIMIT $3", PROMISES),
    Mutant("a replay skips one", "e.seq > $2 ORDER BY e.seq LIMIT $3",
           "e.seq > $2 + 1 ORDER BY e.seq LIMIT $3", PROMISES),
    Mutant("a page repeats the one before", "            frames.clear()\n", "", PROMISES),
    Mutant("a cursor at the head is reset", "if cursor > seq or", "if cursor >= seq or", PROMISES),
    Mutant("a cursor above the head is served", "if cursor > seq or", "if", PROMISES),
    Mutant("an epoch is not compared",
           ' or data.raw.get("epoch", chat.epoch) != chat.epoch', "", PROMISES),
    Mutant("who comes in is not read on to", "    chat.hub.notice(room_id, seq)\n", "", PROMISES),
    Mutant("a note of new events is not sent",
           '            self.db.tell("head", room_id, added[-1]["seq"])\n', "", PROMISES),
    Mutant("an edit is replayed without its text", "encode(json.loads(stored) | text)", "stored", PROMISES),
    Mutant("the removed stay", "if page.removed == socket.username and", "if False and", PROMISES),
    Mutant("the removed get the rest of the page", "if removed or len(frames)", "if len(frames)", PROMISES),
    Mutant("who has come back is closed for a former removal",
           " and page.end > socket.entered", "", PROMISES),
    Mutant("an ended log-in is told to nobody",
           '    change.notes.append(("log-ins ended", me.username, me.version + 1))\n', "", PROMISES),
    Mutant("an ended log-in is not told to other processes",
           "await fetch(self.db.notify, encode([\"\", note]))", "pass", PROMISES),
    Mutant("a later log-in is closed too", "socket.login.version < version", "True", PROMISES),
    Mutant("a change does not check the log-in",
           'check_version(change.rows[0]["version"], me)', "pass", ACCOUNTS),
    Mutant("a post does not check the log-in",
           '    check_version(seat["version"], post.login)\n', "", LESSONS),
    Mutant("an expired token keeps its socket", "elif self.login and time.time() > self.login.expires",
           "elif False", PROMISES),
    Mutant("an expired token still talks", "elif me.expires < time.time():", "elif False:", PROMISES),
    Mutant("who stalls is not cut off", "elif now - self.moved > STALL", "elif False", PROMISES),
    Mutant("events pile up for who stalls", "== page.start and not socket.is_full()", "== page.start", PROMISES),
    Mutant("whispers pile up for who stalls", "if other and not socket.is_full()", "if other", PROMISES),
    Mutant("a deleted text stays in the log", '            del event["message"]\n', "", PROMISES),
    Mutant("a deleted text stays in the search", "fold(message) if message else None",
           'fold(message or json.loads(row["json"])["message"])', PROMISES),
    Mutant("a deleted text stays in the file", "secure_delete=ON", "secure_delete=OFF", PROMISES),
    Mutant("the banned may enter", '"banned": 0', '"banned": 1', ROOMS),
    Mutant("the banned may search", "(m.role <> 'banned' OR", "(m.role IS NOT NULL OR", ROOMS),
    Mutant("moderators rule moderators", "allowed = old < mine and", "allowed =", ROOMS),
    Mutant("moderators make moderators", "old < mine and new < mine", "old < mine", ROOMS),
    Mutant("members promote themselves", "<= max(mine, RANKS[\"member\"])", "<= 4", ROOMS),
    Mutant("the last owner may step down", '    if before == "owner" and role',
           '    if before == "owner" and leave and role', ROOMS),
    Mutant("a refused change is kept", "                await self.writer.rollback()\n", "", ROOMS),
    Mutant("a direct room can be taken", "if room_id.startswith(DIRECT) and", "if False and", ROOMS),
    Mutant("rooms are not locked between processes", "ORDER BY room_id FOR UPDATE", "ORDER BY room_id", ROOMS),
    Mutant("users are not locked between processes", "await fetch(LOCK_USERS, document(asked))", "pass", LESSONS),
    Mutant("changes are not made one at a time", "async with self.writing, self.db", "async with self.db", MESSAGES),
    Mutant("moderators cannot delete", 'rank >= RANKS["moderator"]', 'rank > RANKS["moderator"]', MESSAGES),
    Mutant("moderators can edit", "not (erase and rank", "not (rank", MESSAGES),
    Mutant("an edit may be too long", "None if erase else check_length(chat, data)",
           'None if erase else data.text("message")', LIMITS),
    Mutant("message_length is one less", "len(message) > chat.config", "len(message) >= chat.config", LIMITS),
    Mutant("the message at the mark is unread", "e.seq > m.read_seq", "e.seq >= m.read_seq", MESSAGES),
    Mutant("a read mark moves back", " AND read_seq < $3", "", MESSAGES),
    Mutant("visitors have a read mark", 'rank_of(seat["role"], seat["kind"], "member")\n    seq = min',
           "seq = min", MESSAGES),
    Mutant("a search takes % for anything", 'r"!\\1"', 'r"\\1"', MESSAGES),
    Mutant("what does not show is a message", "or (name in SHOWN and", "or (False and", MESSAGES),
    Mutant("a rate lets one too many pass", "and left < tokens:", "and left < tokens - 1:", LIMITS),
    Mutant("a good log-in counts as failed", "        self.logins.take(data.address, -1)\n", "", LIMITS),
    Mutant("the client's own X-Forwarded-For counts", "seen[-proxies]", "seen[0]", LIMITS),
    Mutant("each address of IPv6 counts by itself", "(int(parsed), 64)", "(int(parsed), 128)", LIMITS),
    Mutant("a user has one socket more", "self.config.sockets_per_user <= len(",
           "self.config.sockets_per_user < len(", LIMITS),
    Mutant("sockets without a log-in are not counted", "        chat.hub.sockets.add(socket)\n        if me:\n",
           "        if me:\n            chat.hub.sockets.add(socket)\n", LIMITS),
    Mutant("a hash is cheap", "scrypt$16384$8$5", "scrypt$1024$8$5", ACCOUNTS),
    Mutant("an unknown name is refused at once", 'f"{SCRYPT}$00$00"', '"scrypt$2$1$1$00$00"', ACCOUNTS),
    Mutant("a new password keeps the old tokens", "SET password = $2, version = version + 1",
           "SET password = $2", ACCOUNTS),
    Mutant("401 does not say Bearer", 'if error.status == 401', "if False", ACCOUNTS),
    Mutant("any page may ask", "if origin in [one", "if origin or [one", LIMITS),
    Mutant("scripts may be inline", "\"default-src 'self'; img", "\"default-src 'self' 'unsafe-inline'; img", LIMITS),
    Mutant("errors echo what they were sent", "            item[name] = read(name)\n",
           "            item[name] = data.raw[name]\n", SOCKETS),
    Mutant("frames behind the close frame are obeyed", "            if socket.closed:\n                break\n", "", LESSONS),
    Mutant("who does not log in may stay", "if self.login is None and now", "if False and now", SOCKETS),
    Mutant("nobody is pinged", "elif now - self.pinged > PING", "elif False", SOCKETS),
    Mutant("a crowd is whispered to", "<= QUIET_ABOVE", "<= QUIET_ABOVE + 1", SOCKETS),
    Mutant("a second socket is a second presence", "if bool(before) != bool(room[username])", "if True", SOCKETS),
    Mutant("a process that is gone keeps its users", "        self.hub.forget_peers(PEER_SILENCE)\n", "", LESSONS),
    Mutant("lost notes are not made up for", "self.sweep: 1, self.poll: POLL}", "self.sweep: 1}", PROMISES),
    Mutant("a mistake stops the writer", '        except Exception:\n            LOGGER.exception("a batch',
           '        except KeyError:\n            LOGGER.exception("a batch', LESSONS),
    Mutant("a stop tells nobody", "            socket.close(1001, \"shutting down\")\n", "            pass\n", LESSONS),
    Mutant("the texts of a deleted room stay", "            await step.fetch(DROP_EVENTS, room_id, seq)\n",
           "            pass\n", ROOMS),
    Mutant("an expired token logs in", '"verify_iat": False}', '"verify_iat": False, "verify_exp": False}', BAD),
    Mutant("deep nesting is a mistake", "except (ValueError, RecursionError) as error:\n        raise ChatError(400",
           "except ValueError as error:\n        raise ChatError(400", BAD),
]
# fmt: on


def copy(to: Path) -> None:
    """Copy what the tests need."""
    for name in WHOLE:
        shutil.copy(ROOT / name, to)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))


def run(folder: Path, *names: str) -> str:
    """Run tests in a folder until one fails; return its name, or nothing if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}.py" for name in names]
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired:
        return "a time-out"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    return "" if done.returncode == 0 else f"the start: {done.stdout[-200:]}{done.stderr[-200:]}"


def try_out(mutant: Mutant) -> str:
    """Put a fault into a copy of the program; return which test sees it."""
    text = (ROOT / "chatserver.py").read_text("utf-8")
    if text.count(mutant.old) != 1:
        return f"NOT APPLIED: its text stands {text.count(mutant.old)} times"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        (folder / "chatserver.py").write_text(text.replace(mutant.old, mutant.new), "utf-8")
        others = [other for other in SUITE if other != mutant.tests]
        return run(folder, mutant.tests) or run(folder, *others)


def check_start(names: set[str]) -> None:
    """End unless the tests can be collected with the program as it is."""
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{name}.py" for name in sorted(names)]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        told = done.stdout[-2000:] + done.stderr[-2000:]
        sys.exit(f"{told}\nthe tests do not even start without a fault: see above")


def main() -> None:
    """Try every fault that is asked for; the exit code counts those that no test saw."""
    wanted = sys.argv[1:]
    chosen = [one for one in MUTANTS if not wanted or any(word in one.name for word in wanted)]
    if not chosen:
        sys.exit(f"no fault has {' or '.join(map(repr, wanted))} in its name")
    check_start({one.tests for one in chosen} | set(SUITE))
    missed = []
    for mutant in chosen:
        began = time.monotonic()
        found = try_out(mutant)
        missed += [] if found and not found.startswith("NOT") else [mutant.name]
        print(
            f"{mutant.name}: {found or 'SURVIVED'} ({time.monotonic() - began:.0f} s)", flush=True
        )
    print(f"{len(chosen) - len(missed)} of {len(chosen)} were seen; not: {missed}")
    sys.exit(len(missed))


if __name__ == "__main__":
    main()
