#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.5,<4", "pyjwt>=2.10,<3", "asyncpg>=0.30,<1"]
# ///
"""A complete chat server in one file: accounts, rooms, live messages that are never lost.

It reads downwards: settings, errors, validation, database, statements, operations, hub, chat,
HTTP, WebSocket, application. The path of one message: a frame is validated and queued; the writer
numbers and stores the whole queue in one transaction; the hub encodes each event once, joins the
frames of a room and hands them to each socket in one write.

Words: *users* are *members* of *rooms*; whatever happens in a room is an *event* with a *seq*,
and a *message* is one kind of event; a room's events in order are its *log*; a *cursor* is the
seq up to which somebody has seen it; a *note* (kind, name, more) is what one process tells the
others, and may be lost.
"""

from __future__ import annotations

import asyncio
import base64
import configparser
import contextlib
import gc
import getpass
import hashlib
import importlib
import inspect
import ipaddress
import itertools
import json
import logging
import multiprocessing
import os
import re
import secrets
import signal
import socket as sockets
import sqlite3
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

import jwt
from aiohttp import WSMsgType, typedefs, web

Row = Mapping[str, Any]  # of the database, or the fields of a JSON object
HERE = Path(__file__).resolve().parent
LOGGER = logging.getLogger("chatserver")
UNLIMITED = 2**53  # up to here every JSON client keeps whole numbers exactly

# ----------------------------------------------------------------------------------------- settings
# The fields of Config are the one table of settings. It is read once and passed down; only this
# section knows where a value came from.

DATABASES = r"sqlite(\+\w+)?:///(?!:memory:).+|postgres(ql)?(\+\w+)?://.+"
RULES: dict[str, range | tuple[str, str]] = {  # a number's range, or a text's pattern and meaning
    "access_token_expire_minutes": range(1, 10**8),
    "algorithm": ("HS256|HS384|HS512", "HS256, HS384 or HS512"),
    "allowed_origins": (r"\w[\w.+-]*://[^\s/*A-Z]+|null", "only origins, as https://example.com"),
    "database_url": (DATABASES, "sqlite:///FILE or postgresql://ADDRESS"),
    "metrics": ("off|on", "off or on"),
    "password_min_length": range(1025),
    "port": range(65536),
    "registration": ("open|closed", "open or closed"),
    "workers": range(1, 257),
}


@dataclass(frozen=True)
class Config:
    """Every setting and its default; config.ini has their meanings; for limits 0 means none."""

    database_url: str = field(default="sqlite:///./chat.db", repr=False)  # may hold a password
    secret_key: str = field(default="", repr=False)
    algorithm: str = "HS256"
    access_token_expire_minutes: int = 60
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    registration: str = "open"
    password_min_length: int = 4
    message_length: int = 4000
    frame_bytes: int = 65536
    body_bytes: int = 65536
    history_limit: int = 200
    messages_per_second: int = 10
    message_burst: int = 20
    logins_per_minute: int = 10
    registrations_per_hour: int = 20
    sockets_per_user: int = 20
    sockets_per_address: int = 200
    sockets: int = 10000
    rooms_per_user: int = 100
    retention_days: int = 0
    allowed_origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    metrics: str = "off"
    docs_assets: str = "cdn"

    @staticmethod
    def check(name: str, value: Any) -> None:
        """Refuses a value that a setting cannot have, with its name first; limits begin at 0."""
        default = getattr(Config, name)
        kind = type(default)
        rule = RULES.get(name, range(2**31) if kind is int else (".*", f"a {kind.__name__}"))
        fits, meaning = type(value) is kind, str(rule[1])
        if isinstance(rule, range):
            fits, meaning = fits and value in rule, f"from {rule[0]} to {rule[-1]}"
        elif fits:
            texts = value if kind is tuple else (value,)
            fits = all(re.fullmatch(rule[0], str(text), re.DOTALL) for text in texts)
        if not fits:
            shown = "what was given" if name in ("secret_key", "database_url") else repr(value)
            raise ValueError(f"{name}: {shown} is not {meaning}")

    def __post_init__(self) -> None:
        """Refuses values that are bad by themselves or do not go together, with a ValueError."""
        for name, value in vars(self).items():
            self.check(name, value)
        if "pgbouncer=true" in self.database_url:
            raise ValueError("database_url: LISTEN needs the direct address, not pgbouncer's")
        postgres = self.database_url.startswith("postgres")
        if postgres and not self.secret_key:
            raise ValueError("secret_key: is required with Postgres, the same for all processes")
        if 0 < len(self.secret_key.encode()) < 32:
            raise ValueError("secret_key: has less than 32 bytes")
        if self.docs_assets not in ("cdn", "off") and not Path(self.docs_assets).is_dir():
            raise ValueError(f"docs_assets: {self.docs_assets!r} is not cdn, off or a folder")
        if self.workers > 1 and not postgres:
            raise ValueError("workers: SQLite belongs to one process, more than one needs Postgres")
        try:
            [ipaddress.ip_network(text, strict=False) for text in self.trusted_proxies]
        except ValueError as error:
            raise ValueError(f"trusted_proxies: {error}") from None


ENV_LINE = re.compile(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|((?:(?!\s\#).)*))""")


def read_file(name: str) -> str:
    """Returns the text of a file in the working directory, if there is one."""
    return Path(name).read_text("utf-8-sig", "replace") if Path(name).is_file() else ""


def read_settings(arguments: Iterable[str]) -> Iterable[tuple[str, str, str]]:
    """Yields all that is set anywhere as (place, name, text), the weakest place first."""
    ini = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" #", " ;"))
    ini.read_string(read_file("config.ini"), "config.ini")
    if strays := {*ini.sections(), *ini.defaults()} - {"chatserver"}:
        raise ValueError(f"config.ini: {min(strays)}: all settings belong to [chatserver]")
    for section in ini.sections():
        yield from (("config.ini", name, text) for name, text in ini[section].items())
    for found in filter(None, map(ENV_LINE.match, read_file(".env").splitlines())):
        yield ".env", found[1].lower(), found[2] or found[3] or (found[4] or "").strip()
    yield from (("environment", name.lower(), text) for name, text in os.environ.items())
    options = iter(arguments)
    for option in options:
        name, equals, text = option.partition("=")
        if not name.startswith("--") or "_" in name:
            raise ValueError(f"command line: {name}: there is no such setting, see --help")
        if not (text := text if equals else next(options, "")):
            raise ValueError(f"command line: {name}: needs a value")
        yield "command line", name[2:].replace("-", "_"), text


def load_config(arguments: Iterable[str] = ()) -> Config:
    """Reads every source; a bad setting ends the program with a line that names its place."""
    places, values = dict[str, str](), dict[str, Any]()
    try:
        for place, name, text in read_settings(arguments):
            kind = type(getattr(Config, name)) if name in Config.__dataclass_fields__ else None
            if kind is None and place in ("config.ini", "command line"):
                raise ValueError(f"{place}: {name}: there is no such setting")
            if kind is None or not text:
                continue
            places[name], values[name] = place, text
            if kind is tuple:
                values[name] = tuple(filter(None, map(str.strip, text.split(","))))
            elif kind is int and re.fullmatch("[0-9]{1,12}", text):
                values[name] = int(text)
            Config.check(name, values[name])
        if places.get("port") == "environment" and "host" not in places:
            values["host"] = ""  # hosting services that give PORT want every address
        return Config(**values)
    except (ValueError, OSError, configparser.Error) as error:
        reason = " ".join(str(error).split())
        place = places.get(reason.partition(":")[0], "")
        raise SystemExit(f"chatserver: {place}{': ' if place else ''}{reason}") from None


# ------------------------------------------------------------------------------------------- errors
# Whatever is refused, anywhere, is a ChatError. A WebSocket that must close for it closes with
# 4000 + status, or with 1013 where a retry helps.

CODES = {410: "reset", 413: "too_large", 429: "rate_limited", 500: "internal", 503: "unavailable"}


class ChatError(Exception):
    """A refusal: an HTTP status, a sentence for people, a code for programs, more for its JSON."""

    def __init__(self, status: int, detail: str, code: str = "", **more: Any) -> None:
        super().__init__(detail := " ".join(detail.split()))
        phrase = HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.body = {"error": code or CODES.get(status, phrase), "detail": detail, **more}
        self.status, self.close_code = status, 1013 if status == 503 else 4000 + status


MISTAKE = ChatError(500, "the server made a mistake, which is logged")

# --------------------------------------------------------------------------------------- validation
# What may come in, by the name of its field, wherever it stands: in a path, a query, JSON or a
# frame; what a password is; and how much of anything one may do.

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
TEXT = r"[^\0\ud800-\udfff]"  # no NUL and no half of a surrogate pair: what every engine can hold
ANYTHING = (f"{TEXT}*", "text without NUL")
NAME = r"(?!me$)[a-z0-9][a-z0-9_.-]{1,31}"
FIELDS: dict[str, range | tuple[str, str]] = {  # a number's range, or a text's pattern and meaning
    "client_id": ("[ -~]{1,64}", "1 to 64 printable ASCII characters"),
    "email": (r"[^\s@\0\ud800-\udfff]{1,64}@[^\s@\0\ud800-\udfff]{1,189}", "an e-mail address"),
    "kind": ("public|private|direct", "public, private or direct"),
    "limit": range(1, UNLIMITED + 1),
    "message": (rf"(?=.*\S){TEXT}+", "text, not blank, without NUL"),
    "name": (rf"(?=.*\S){TEXT}{{1,100}}", "1 to 100 characters, not blank"),
    "new_password": (f"{TEXT}+", "text, not empty, without NUL"),
    "password": (f"{TEXT}+", "text, not empty, without NUL"),
    "q": (rf"(?=.*\S){TEXT}{{1,200}}", "1 to 200 characters, not blank"),
    "role": ("member|moderator|owner|banned", "member, moderator, owner or banned"),
    "room_id": ("[a-z0-9][a-z0-9_-]{0,63}", "1 to 64 of a-z 0-9 _ -, a letter or digit first"),
    "username or email": (f"{TEXT}{{1,320}}", "a username or an e-mail address"),
    "username": (NAME, "2 to 32 of a-z 0-9, and _.- but first; not me"),
}
REQUIRED = inspect.Parameter.empty


def check(data: Row, name: str, default: Any = REQUIRED, *, spelled: bool = False) -> Any:
    """Returns a field, or its default, or refuses; queries spell their numbers."""
    if default is not REQUIRED and (name not in data or (data[name] is None and not default)):
        return default
    value, rule = data.get(name), FIELDS.get(name, range(UNLIMITED + 1))
    if isinstance(rule, range) and not isinstance(default, str):
        if spelled and re.fullmatch("[0-9]{1,99}", str(value)):
            value = int(str(value))
            value = min(value, UNLIMITED) if name in ("limit", "wait") else value
        if type(value) is int and value in rule:
            return value
        raise ChatError(400, f"{name}: should be a whole number from {rule[0]} to {rule[-1]}")
    pattern, meaning = ANYTHING if isinstance(rule, range) else rule
    if isinstance(value, str):
        if name == "email" or (name in ("username", "prefix", "after") and value.isascii()):
            value = value.lower()
        if re.fullmatch(pattern, value, re.DOTALL):
            return value
    raise ChatError(400, f"{name}: should be {meaning}")


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses an object that has a key twice, since nobody knows which one was meant."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def refuse_constant(name: str) -> None:
    """Refuses NaN and Infinity (RFC 8259 6)."""
    raise ValueError(f"{name} is not JSON")


decode = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant).decode


def parse_object(text: str) -> dict[str, Any]:
    """Parses one JSON object, however deep it nests and however long its numbers are."""
    try:
        if isinstance(found := decode(text), dict):
            return found
    except (ValueError, RecursionError) as error:
        raise ChatError(400, f"not JSON: {error}"[:200]) from None
    raise ChatError(400, "a JSON object is expected")


SCRYPT = "scrypt$16384$8$5"  # N, r, p; a log-in hashes anew what was hashed with others
NOBODY = f"{SCRYPT}${'00' * 16}${'00' * 64}"  # no password has this hash; finding out takes as long


def check_password(data: Row, name: str, shortest: int = 1) -> bytes:
    """Returns a password's bytes as given; no NUL, since HMAC pads with it (RFC 2104 2)."""
    password = str(check(data, name)).encode()
    if not shortest <= len(password) <= 1024:
        raise ChatError(400, f"{name}: should have {shortest} to 1024 bytes")
    return password


def hash_password(password: bytes, parameters: str = SCRYPT, salt: bytes = b"") -> str:
    """Returns scrypt (RFC 7914) with its parameters and salt; takes about 0.2 s of one core."""
    salt, (n, r, p) = salt or secrets.token_bytes(16), map(int, parameters.split("$")[1:])
    digest = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=2**28)
    return f"{parameters}${salt.hex()}${digest.hex()}"


def verify_password(password: bytes, stored: str) -> bool:
    """Tells in constant time whether a hash is of this password."""
    parameters, salt, _ = stored.rsplit("$", 2)
    return secrets.compare_digest(hash_password(password, parameters, bytes.fromhex(salt)), stored)


class Limiter:
    """Leaky buckets, one a key: `burst` at once, then `rate` a second; 0 for either: no limit."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.empty_at = rate, burst, dict[str, float]()

    def take(self, key: str, count: int = 1) -> None:
        """Puts `count` in if there is room for one more, or refuses and says when there will be."""
        if self.rate and self.burst:
            empty_at = max(self.empty_at.get(key, 0), now := time.monotonic())
            if (wait := empty_at - now - (self.burst - 1) / self.rate) > 1e-9:
                raise ChatError(429, "too much, wait a little", retry_after=int(wait) + 1)
            self.empty_at[key] = empty_at + count / self.rate

    def forget(self) -> None:
        """Drops the keys whose bucket is empty."""
        now = time.monotonic()
        self.empty_at = {key: at for key, at in self.empty_at.items() if at > now}


# ----------------------------------------------------------------------------------------- database
# An operation is a generator: it yields (statement, rows of parameters), receives the rows that
# come out, and returns its result. So one text serves both engines: sqlite3 drives it whole, on a
# thread, never cancelled half-way; asyncpg drives it with awaits. All in which the engines differ
# is here; what a room or a user is, is not.

Operation = Generator[tuple[str, Sequence[Sequence[Any]]], list[Any], Any]
NUMBERS = tuple(map(str, range(1, 20)))
READ, WRITE = "BEGIN", "BEGIN IMMEDIATE"
NOTIFY = "SELECT pg_notify('chatserver', $1)"


class DatabaseError(ChatError):
    """The database cannot answer; `undone` if it is certain that nothing was changed."""

    logged = 0.0  # when one was; a second later the next one is

    def __init__(self, reason: BaseException, *, undone: bool = False) -> None:
        super().__init__(503, "the database cannot be reached, try again soon", retry_after=2)
        self.undone = undone
        if time.monotonic() - self.logged > 1:
            DatabaseError.logged = time.monotonic()
            LOGGER.error("database: %s: %s", type(reason).__name__, str(reason).partition("\n")[0])


class SQLite:
    """A file that belongs to this process: one thread writes, three read, each on a connection."""

    name, row_lock, shared, warnings = "sqlite", "", False, tuple[str, ...]()

    def __init__(self, url: str) -> None:
        self.path = os.path.realpath(unquote(url.partition("?")[0].partition(":///")[2]))
        self.threads = {READ: ThreadPoolExecutor(3), WRITE: ThreadPoolExecutor(1)}
        self.idle = {begin: list[sqlite3.Connection]() for begin in self.threads}  # one a thread
        self.opened = list[sqlite3.Connection]()

    def connect(self, *pragmas: str, suffix: str = "") -> sqlite3.Connection:
        """Opens a connection for any thread."""
        path = self.path + suffix
        connection = sqlite3.connect(path, 0, isolation_level=None, check_same_thread=False)
        self.opened.insert(0, connection)
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        return connection

    async def open(self, schema: str) -> None:
        """Takes the file for this process alone and makes its tables, or ends the program."""
        try:
            self.connect(suffix="-lock").execute("BEGIN EXCLUSIVE")
            self.writer = self.connect("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON")
            self.writer.executescript(schema)
            self.idle[WRITE].append(self.writer)
            for _ in range(3):
                self.idle[READ].append(self.connect("query_only=ON"))
            self.inode = os.stat(self.path).st_ino
        except (sqlite3.Error, OSError) as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise SystemExit(f"chatserver: database_url: {self.path}: {reason}") from None

    async def close(self) -> None:
        """Lets what runs end, then frees the file."""
        for threads in self.threads.values():
            threads.shutdown()
        for connection in self.opened:
            connection.close()

    def transact(self, begin: str, operation: Operation) -> Any:
        """Runs an operation and commits; binds $1 by name, as 3.11 misbinds by position."""
        connection = self.idle[begin].pop()
        try:
            if os.stat(self.path).st_ino != self.inode:
                raise sqlite3.OperationalError("the file was replaced under the running server")
            connection.execute(begin)
            sql, many = next(operation)
            while True:
                rows = []
                for values in many:
                    cursor = connection.execute(sql, dict(zip(NUMBERS, values, strict=False)))
                    names = [column[0] for column in cursor.description or ()]
                    rows += [dict(zip(names, row, strict=False)) for row in cursor]
                sql, many = operation.send(rows)
        except StopIteration as stop:
            connection.execute("COMMIT")
            return stop.value
        finally:
            with contextlib.suppress(sqlite3.Error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            self.idle[begin].append(connection)

    async def run(self, begin: str, operation: Operation) -> Any:
        """Returns what an operation returned: what it read in one snapshot, or what is on disk."""
        loop, threads = asyncio.get_running_loop(), self.threads[begin]
        try:
            return await loop.run_in_executor(threads, self.transact, begin, operation)
        except (sqlite3.Error, OSError) as error:
            raise DatabaseError(error) from error

    async def tidy(self) -> None:
        """Empties the write-ahead log, where erased text would linger."""
        work = partial(self.writer.executescript, "PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.suppress(sqlite3.Error):
            await asyncio.get_running_loop().run_in_executor(self.threads[WRITE], work)

    async def tell(self, notes: Sequence[Any]) -> None:
        """Has nobody to tell: all who use the file are in this process."""


@lru_cache
def without_hints(sql: str) -> str:
    """Returns a statement as Postgres takes it, which needs no advice and knows no word for it."""
    return re.sub(r" INDEXED BY \w+", "", sql)


class Postgres:
    """A database that processes share; one connection of each carries notes."""

    name, row_lock, shared, warnings = "postgres", " FOR UPDATE", True, tuple[str, ...]()
    allowed = ("host", "port", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey")

    def __init__(self, url: str) -> None:
        """Rewrites the URL for asyncpg, which takes every parameter unknown to it as a setting."""
        asyncpg = importlib.import_module("asyncpg")  # only who has Postgres needs it
        account, at, rest = url.partition("://")[2].rpartition("@")
        place, _, query = rest.partition("?")
        account = ":".join(quote(unquote(part), "") for part in account.split(":", 1))
        kept = "&".join(one for one in query.split("&") if one.partition("=")[0] in self.allowed)
        self.options = {"dsn": f"postgresql://{account}{at}{place}?{kept}", "timeout": 5}
        limits = {"lock_timeout": "3s", "statement_timeout": "10s"}
        limits["idle_in_transaction_session_timeout"] = "800ms"  # a frozen process blocks no room
        self.options |= {"command_timeout": 15, "server_settings": limits}
        errors = asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
        self.failures = (*errors, OSError, TimeoutError)
        self.refusals = asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError
        self.asyncpg, self.process, self.heard = asyncpg, secrets.token_hex(4), 0.0
        self.telling = asyncio.Lock()
        self.pools: dict[str, Any] = {}
        self.listener: Any = None

    async def open(self, schema: str) -> None:
        """Makes the tables, one process at a time; finds settings that lose what was acked."""
        schema = schema.replace("TEXT", 'TEXT COLLATE "C"').replace(" WITHOUT ROWID", "")
        sizes = {"min_size": 0, "reset": self.keep}
        try:
            for begin, size in ((READ, 4), (WRITE, 1)):
                pool = self.asyncpg.create_pool(max_size=size, **sizes, **self.options)
                self.pools[begin] = await pool
            async with self.pools[WRITE].acquire() as connection:
                if await connection.fetchval("SHOW server_encoding") != "UTF8":
                    raise ValueError("its encoding is not UTF8, so it cannot hold every message")
                await connection.execute("SELECT pg_advisory_lock(7304241)")
                # Not if it was run before, since that would wait for whoever tends a table now;
                # and one by one, so that no transaction locks two tables.
                ready = await connection.fetchval("SELECT to_regclass('events_silent')")
                for statement in () if ready else filter(str.strip, schema.split(";\n")):
                    await connection.execute(statement)
                await connection.execute("SELECT pg_advisory_unlock(7304241)")
                for name in ("fsync", "synchronous_commit", "full_page_writes"):
                    if await connection.fetchval("SELECT current_setting($1)", name) == "off":
                        self.warnings += (f"{name} is off in Postgres: messages can be lost",)
        except (*self.failures, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SystemExit(f"chatserver: database_url: {reason}") from None

    async def keep(self, connection: Any) -> None:
        """Hands a connection back as it is: nobody leaves anything behind."""

    async def close(self) -> None:
        """Drops every connection."""
        for connection in filter(None, (self.listener, *self.pools.values())):
            connection.terminate()

    async def drive(self, connection: Any, operation: Operation) -> Any:
        """Runs an operation to its end, each of its steps in one round trip."""
        try:
            sql, many = next(operation)
            while True:
                rows = []
                if len(many) == 1:
                    rows = await connection.fetch(without_hints(sql), *many[0])
                elif many:
                    rows = await connection.fetchmany(without_hints(sql), many)
                sql, many = operation.send(rows)
        except StopIteration as stop:
            return stop.value

    async def run(self, begin: str, operation: Operation) -> Any:
        """Returns what an operation returned, once committed; a failed COMMIT may have happened."""
        try:
            async with self.pools[begin].acquire(timeout=5) as connection:
                if begin == READ:
                    return await self.drive(connection, operation)
                async with connection.transaction():
                    return await self.drive(connection, operation)
        except self.failures as error:
            raise DatabaseError(error, undone=isinstance(error, self.refusals)) from error

    async def tell(self, notes: Sequence[Any]) -> None:
        """Tells all processes, this one too; who misses it finds out when it looks for itself."""
        rows = [(encode((self.process, *note)),) for note in notes]
        with contextlib.suppress(*self.failures, AttributeError):  # no listener: it is connecting
            async with self.telling:
                await self.listener.executemany(NOTIFY, rows, timeout=2)

    async def listen(self, hear: Callable[..., None]) -> None:
        """Calls hear with what others tell; ends when not even its own echo comes."""

        def receive(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
            self.heard = time.monotonic()
            process, *note = json.loads(payload)
            if process != self.process:
                hear(*note, process)

        with contextlib.suppress(*self.failures):
            listener = await self.asyncpg.connect(**self.options)
            await listener.add_listener("chatserver", receive)
            self.listener, self.heard = listener, time.monotonic()
            while not self.listener.is_closed() and time.monotonic() - self.heard < 6:
                await asyncio.sleep(0.2)
        if self.listener:
            self.listener.terminate()


# --------------------------------------------------------------------------------------- statements
# All SQL, the same for both engines.

EVENT = """SELECT e.room_id, e.seq, e.kind, e.username, e.target, e.member, e.role, e.name,
    coalesce(e.message, t.message) AS message, e.created_at, e.edited_at, e.client_id
    FROM events e LEFT JOIN events t ON t.room_id = e.room_id AND t.seq = e.target"""
# Unread is all that came after the mark, less what is no message and what is one's own: both few.
ROOM = """SELECT r.room_id, r.name, r.kind, m.role, r.seq, coalesce(m.read_seq, 0) AS read_seq,
    coalesce(r.seq - m.read_seq - (SELECT count(*) FROM events e INDEXED BY events_silent
    WHERE e.room_id = r.room_id AND e.seq > m.read_seq AND e.message IS NULL)
    - (SELECT count(*) FROM events e INDEXED BY events_by_user WHERE e.room_id = r.room_id
    AND e.username = $1 AND e.seq > m.read_seq AND e.message IS NOT NULL), 0) AS unread
    FROM rooms r LEFT JOIN members m ON m.room_id = r.room_id AND m.username = $1
    WHERE r.kind <> 'deleted'"""
READABLE = "(m.role <> 'banned' OR (m.role IS NULL AND r.kind = 'public'))"
GET_EPOCH = "SELECT value FROM meta WHERE name = 'epoch'"
ADD_EPOCH = "INSERT INTO meta (name, value) VALUES ('epoch', $1) ON CONFLICT DO NOTHING"
SET_EPOCH = "UPDATE meta SET value = $1 WHERE name = 'epoch'"
ADD_USER = """INSERT INTO users (username, email, password, version, created_at)
    VALUES ($1, $2, $3, 0, $4) ON CONFLICT DO NOTHING RETURNING username"""
GET_USER = """SELECT username, email, password, version, created_at FROM users
    WHERE (username = $1 OR email = $1) AND password IS NOT NULL"""
GET_VERSION = "SELECT username, version FROM users WHERE username = $1 AND password IS NOT NULL"
LIST_USERS = """SELECT username, created_at FROM users WHERE password IS NOT NULL AND username > $1
    AND substr(username, 1, length($2)) = $2 ORDER BY username LIMIT $3"""
SET_USER = """UPDATE users SET password = $2, email = $3, version = version + $4
    WHERE username = $1 RETURNING username, version"""
LIST_ROOMS = f"{ROOM} AND {READABLE} ORDER BY r.room_id"
GET_ROOM = f"{ROOM} AND r.room_id = $2"
LOCK_ROOM = "SELECT room_id, name, kind, seq, floor FROM rooms WHERE room_id = $1"
ADD_ROOM = """INSERT INTO rooms (room_id, name, kind, seq, floor, created_by, created_at)
    VALUES ($1, $2, $3, 0, 0, $4, $5) ON CONFLICT DO NOTHING RETURNING room_id"""
COUNT_ROOMS = """SELECT count(*) AS rooms FROM rooms
    WHERE created_by = $1 AND kind IN ('public', 'private')"""
SET_ROOM = "UPDATE rooms SET name = $2, kind = $3 WHERE room_id = $1"
SET_SEQ = "UPDATE rooms SET seq = $2 WHERE room_id = $1"
LIST_MEMBERS = "SELECT username, role FROM members WHERE room_id = $1 ORDER BY username"
GET_ROLE = "SELECT room_id, username, role FROM members WHERE room_id = $1 AND username = $2"
# Owners, moderators, members: the alphabet falls as their ranks do.
GET_HEIR = """SELECT username, role FROM members WHERE room_id = $1 AND username <> $2
    AND role <> 'banned' ORDER BY role DESC, since, username"""
LIST_ROLES = "SELECT room_id, role FROM members WHERE username = $1 ORDER BY room_id"
SET_ROLE = """INSERT INTO members (room_id, username, role, read_seq, since) VALUES
    ($1, $2, $3, $4, $4) ON CONFLICT (room_id, username) DO UPDATE SET role = excluded.role"""
DROP_MEMBER = "DELETE FROM members WHERE room_id = $1 AND username = $2"
SET_READ = """UPDATE members SET read_seq = $3
    WHERE room_id = $1 AND username = $2 AND read_seq < $3 RETURNING read_seq"""
ADD_EVENT = """INSERT INTO events (room_id, seq, kind, username, created_at, target, member, role,
    name, message, folded, client_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9,
    CASE WHEN $3 = 'message' THEN $10 END, $11, $12)"""
GET_MESSAGE = f"{EVENT} WHERE e.room_id = $1 AND e.seq = $2 AND e.kind = 'message'"
FIND_MESSAGE = f"{EVENT} WHERE e.room_id = $1 AND e.username = $2 AND e.client_id = $3"
SET_MESSAGE = """UPDATE events SET message = $3, folded = $4, edited_at = $5
    WHERE room_id = $1 AND seq = $2"""
LIST_TEXTS = """SELECT room_id, seq FROM events WHERE username = $1 AND message IS NOT NULL
    ORDER BY room_id, seq LIMIT 500"""
LIST_EVENTS = f"""{EVENT} WHERE e.room_id = $1 AND e.seq > $2 AND e.seq <= $3
    ORDER BY e.seq LIMIT $4"""
HISTORY = f"{EVENT} WHERE e.kind = 'message' AND e.room_id = $1 AND e.seq > $2 AND e.seq < $3"
NEWEST = f"{HISTORY} ORDER BY e.seq DESC LIMIT $4"
OLDEST = f"{HISTORY} ORDER BY e.seq LIMIT $4"
SEARCH = f"""{EVENT} JOIN rooms r ON r.room_id = e.room_id AND r.kind <> 'deleted'
    LEFT JOIN members m ON m.room_id = e.room_id AND m.username = $1
    WHERE e.folded LIKE $2 ESCAPE '!' AND e.seq > r.floor AND {READABLE}"""
SEARCH_ALL = f"{SEARCH} ORDER BY e.created_at DESC, e.room_id, e.seq DESC LIMIT $3"
SEARCH_ROOM = f"{SEARCH} AND e.room_id = $4 AND e.seq < $5 ORDER BY e.seq DESC LIMIT $3"
LIST_EXPIRED = """SELECT room_id, kind, floor, goal FROM (SELECT r.room_id, r.kind, r.floor,
    CASE r.kind WHEN 'deleted' THEN r.seq ELSE coalesce((SELECT min(e.seq) - 1 FROM events e
    WHERE e.room_id = r.room_id AND e.seq > r.floor AND e.created_at >= $1), r.seq) END AS goal
    FROM rooms r) AS aged WHERE goal > floor"""
SET_FLOOR = "UPDATE rooms SET floor = $2 WHERE room_id = $1 AND floor < $2"
EXPIRE = """DELETE FROM events
    WHERE room_id = $1 AND seq <= $2 AND (client_id IS NULL OR $3 = 'deleted')"""
EXPIRE_MARKS = "UPDATE members SET read_seq = $2 WHERE room_id = $1 AND read_seq < $2"
BLANK = """UPDATE events SET message = NULL, folded = NULL
    WHERE room_id = $1 AND seq <= $2 AND message IS NOT NULL"""


def each(sql: str, many: Sequence[Sequence[Any]]) -> Operation:
    """Is the operation of one statement for many rows of parameters."""
    return (yield sql, many)


def first(sql: str, *values: Any) -> Operation:
    """Is the operation that returns one statement's first row, or None."""
    return next(iter((yield sql, [values])), None)


# --------------------------------------------------------------------------------------- operations
# What users can do and see. Each is named like its route, takes the fields that it needs, by the
# names that they have in JSON, and returns what is answered; `me` is who asks. It refuses before
# it writes, so that its refusal undoes nothing for others. It knows neither transport.

RANKS = {"banned": -1, "visitor": 0, "member": 1, "moderator": 2, "owner": 3}
COLUMNS = ("room_id", "seq", "kind", "username", "created_at", "target", "member", "role", "name")
BLANK_EVENT = dict.fromkeys((*COLUMNS, "message", "folded", "client_id", "edited_at"))
SHOWN = {  # what an event of a kind has besides room_id, seq, username and times
    "message": ("message",),
    "edit": ("target", "message"),
    "delete": ("target",),
    "member": ("member", "role"),
    "room": ("name",),
}


@lru_cache(256)
def iso_minute(minutes: int) -> str:
    """Returns a time without its seconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(minutes * 60, UTC).strftime("%Y-%m-%dT%H:%M")


@lru_cache(256)
def iso_time(milliseconds: int) -> str:
    """Returns a stored time as ISO 8601 in UTC; quickly, since every event has one."""
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{iso_minute(minutes)}:{rest // 1000:02}.{rest % 1000:03}Z"


def describe(row: Row) -> dict[str, Any]:
    """Returns an event as clients see it, from the log or from what is being added to it."""
    kind, event = row["kind"], {"type": row["kind"], "room_id": row["room_id"], "seq": row["seq"]}
    event["username"] = row["username"]
    for name in SHOWN[kind]:
        event[name] = row[name]
    if event.get("message", "") is None:
        del event["message"]
        event["deleted"] = True
    event["created_at"] = iso_time(row["created_at"])
    if row["edited_at"]:
        event["edited_at"] = iso_time(row["edited_at"])
    if row["client_id"]:
        event["client_id"] = row["client_id"]
    return event


def show_user(row: Row) -> dict[str, Any]:
    """Returns a user as others see them; who is online only the hub knows."""
    return {"username": row["username"], "created_at": iso_time(row["created_at"]), "online": False}


def is_whole(page: Sequence[Row], cursor: int) -> bool:
    """Tells whether a page of the log follows the cursor without a hole."""
    return bool(page) and page[-1]["seq"] == cursor + len(page)


class Command(NamedTuple):
    """An operation, who asks, its fields, the log-in behind it, and who hears its outcome."""

    name: str
    me: str
    fields: dict[str, Any]
    version: int | None = None
    reply: Callable[[Any], object] = id

    def rooms(self) -> list[str]:
        """Returns the rooms that have to be at hand."""
        return [*self.fields.get("rooms", ()), *filter(None, [self.fields.get("room_id")])]


class Transaction:
    """What one transaction sees and adds: rooms, roles, events, and notes for whom they concern."""

    def __init__(self, config: Config, row_lock: str = "") -> None:
        self.config, self.row_lock, self.now = config, row_lock, int(time.time() * 1000)
        self.me = ""  # who asks for the command at hand
        self.rooms: dict[str, dict[str, Any]] = {}
        self.roles: dict[tuple[str, str], str | None] = {}
        self.versions: dict[str, int] = {}  # of the users' log-ins
        self.sent: dict[tuple[str, str, str | None], Row] = {}  # messages by their client_id
        self.events: list[dict[str, Any]] = []
        self.notes: list[tuple[str, str, Any]] = []

    def lock(self, names: Iterable[str]) -> Operation:
        """Has rooms at hand, in a fixed order, so that no two transactions await each other."""
        missing = sorted({*names} - self.rooms.keys())
        found = yield LOCK_ROOM + self.row_lock, [(name,) for name in missing]
        self.rooms |= {row["room_id"]: dict(row) for row in found if row["kind"] != "deleted"}

    def run(self, commands: Sequence[Command]) -> Operation:
        """Does commands in order, each with its rooms and roles at hand; returns their outcomes."""
        pairs = {(room_id, one.me) for one in commands for room_id in one.rooms()}
        yield from self.lock(room_id for room_id, _ in pairs)
        found = yield GET_ROLE, [*pairs]
        self.roles = {(row["room_id"], row["username"]): row["role"] for row in found}
        callers = {(one.me,) for one in commands if one.version is not None}
        self.versions = {row["username"]: row["version"] for row in (yield GET_VERSION, [*callers])}
        named = [(one.me, one.fields) for one in commands if one.fields.get("client_id")]
        found = yield FIND_MESSAGE, [(new["room_id"], me, new["client_id"]) for me, new in named]
        self.sent = {(row["room_id"], row["username"], row["client_id"]): row for row in found}
        outcomes: list[Any] = []
        for command in commands:
            self.me = command.me
            try:
                if command.version not in (None, self.versions.get(self.me)):
                    raise ChatError(401, "log in again: this log-in has ended")
                outcomes.append((yield from getattr(self, command.name)(**command.fields)))
            except ChatError as error:
                outcomes.append(error)
        yield ADD_EVENT, [tuple(event.values())[:12] for event in self.events]
        yield SET_SEQ, [*{event["room_id"]: event["seq"] for event in self.events}.items()]
        return outcomes

    def admit(self, room_id: str, least: str = "visitor") -> int:
        """Returns the caller's rank in a room; strangers are visitors of a public one."""
        if room_id not in self.rooms:
            raise ChatError(404, "there is no such room")
        stranger = "visitor" if self.rooms[room_id]["kind"] == "public" else "banned"
        rank = RANKS[self.roles.get((room_id, self.me)) or stranger]
        if rank < RANKS[least]:
            detail = f"that takes the role of {least} or above in this room"
            raise ChatError(403, "this room is not open to you" if least == "visitor" else detail)
        return rank

    def add(self, room_id: str, kind: str, **fields: Any) -> dict[str, Any]:
        """Adds an event under the room's next number."""
        self.rooms[room_id]["seq"] += 1
        event = BLANK_EVENT | fields | {"room_id": room_id, "seq": self.rooms[room_id]["seq"]}
        event |= {"kind": kind, "username": self.me, "created_at": self.now}
        self.events.append(event)
        return event

    def set_role(self, room_id: str, member: str, role: str | None) -> Operation:
        """Makes a membership what it shall be."""
        self.roles[room_id, member] = role
        seq = self.add(room_id, "member", member=member, role=role)["seq"]
        if role:
            yield SET_ROLE, [(room_id, member, role, seq)]
        else:
            yield DROP_MEMBER, [(room_id, member)]

    def post_message(self, room_id: str, message: str, client_id: str | None = None) -> Operation:
        """Posts a message; 201 and the event or, if it is a retry, 200 and the first event."""
        rank = self.admit(room_id)
        old = self.sent.get((room_id, self.me, client_id)) if client_id else None
        if old and not old["edited_at"] and old["message"] not in (None, message):
            raise ChatError(409, "this client_id was sent before with another text")
        if not old and rank == RANKS["visitor"]:
            yield from self.set_role(room_id, self.me, "member")
        fields = {"message": message, "folded": message.casefold(), "client_id": client_id}
        event = old or self.add(room_id, "message", **fields)
        if client_id:
            self.sent[room_id, self.me, client_id] = event
        return 200 if old else 201, describe(event)

    def set_message(self, room_id: str, seq: int, message: str | None) -> Operation:
        """Edits one's own message or deletes it, as a moderator may; no other row has its text."""
        rank, old = self.admit(room_id), (yield from first(GET_MESSAGE, room_id, seq))
        if not old or old["message"] is None or seq <= self.rooms[room_id]["floor"]:
            raise ChatError(404, "there is no such message, or it was deleted")
        if old["username"] != self.me and (message or rank < RANKS["moderator"]):
            raise ChatError(403, "only its author may do that; a moderator may delete it")
        new = {**old, "message": message, "edited_at": self.now if message else None}
        self.sent[room_id, old["username"], old["client_id"]] = new  # for retries in this batch
        folded = message and message.casefold()
        yield SET_MESSAGE, [(room_id, seq, message, folded, new["edited_at"])]
        self.add(room_id, "edit" if message else "delete", target=seq, message=message)
        return message and describe(new)

    def set_member(self, room_id: str, username: str, role: str | None = "member") -> Operation:
        """Sets a role, or none, as far as the caller's own goes; a room with an owner keeps one."""
        mine, found = self.admit(room_id), (yield from first(GET_ROLE, room_id, username))
        theirs, rank = found and found["role"], RANKS[role or "visitor"]
        if self.rooms[room_id]["kind"] == "direct":
            raise ChatError(403, "a direct room always has the same two members")
        user = (yield from first(GET_USER + self.row_lock, username)) if role else theirs
        if not user:
            raise ChatError(404, "there is no such user here")
        if theirs == "owner" != role and mine == RANKS["owner"]:
            heir = yield from first(GET_HEIR, room_id, username)
            if not heir or heir["role"] != "owner":
                raise ChatError(409, "the last owner has to make somebody else owner first")
        own = 0 <= rank <= max(mine, RANKS["member"])
        above = mine == RANKS["owner"] or mine > max(rank, RANKS[theirs or "visitor"], 1)
        if not (own if self.me == username else above):
            raise ChatError(403, "that takes a higher role in this room")
        if role != theirs:
            yield from self.set_role(room_id, username, role)
        return role and {"username": username, "role": role, "online": False}

    def join(self, room_id: str) -> Operation:
        """Lets a socket in, a visitor as a member; returns what `hello` tells."""
        if self.admit(room_id) == RANKS["visitor"]:
            yield from self.set_role(room_id, self.me, "member")
        room = self.rooms[room_id]
        return self.roles[room_id, self.me], room["floor"], room["seq"]

    def create_room(
        self, room_id: str = "", name: str = "", kind: str = "public", username: str = ""
    ) -> Operation:
        """Makes a room and its owner, or, unless they have it, the one direct room of two users."""
        owners, most = {self.me: "owner"}, self.config.rooms_per_user or UNLIMITED
        if kind == "direct":
            if not username or username == self.me:
                raise ChatError(400, "username: should be another user's")
            pair = sorted((self.me, username))
            name, owners = ", ".join(pair), dict.fromkeys(pair, "member")
            room_id = f"direct-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
            yield from self.lock([room_id])
            if room_id not in self.rooms and not (yield from first(GET_USER, username)):
                raise ChatError(404, "there is no such user")
        elif not room_id or room_id.startswith("direct-"):
            raise ChatError(400, "room_id: is required, and may not begin with direct-")
        elif (yield from first(COUNT_ROOMS, self.me))["rooms"] >= most:
            raise ChatError(403, f"you have created {most} rooms, which is as many as one may")
        new = yield from first(ADD_ROOM, room_id, name or room_id, kind, self.me, self.now)
        if not new and kind != "direct":
            raise ChatError(409, "this room_id is, or was, another room's")
        yield from self.lock([room_id])
        for member, role in sorted(owners.items()) if new else ():
            yield from self.set_role(room_id, member, role)
        self.roles.setdefault((room_id, self.me), "member")
        return 201 if new else 200, (yield from self.show_room(room_id))

    def rename_room(self, room_id: str, name: str) -> Operation:
        """Renames a room."""
        self.admit(room_id, "owner")
        yield SET_ROOM, [(room_id, name, self.rooms[room_id]["kind"])]
        self.add(room_id, "room", name=name)
        return (yield from self.get_room(room_id))

    def delete_room(self, room_id: str) -> Operation:
        """Deletes a room; its events go by and by, its id stays taken."""
        self.admit(room_id, "owner")
        yield SET_ROOM, [(room_id, "", "deleted")]
        del self.rooms[room_id]
        self.notes.append(("gone", room_id, None))

    def mark_read(self, room_id: str, seq: int) -> Operation:
        """Moves the caller's read marker forward, to the head at most."""
        self.admit(room_id, "member")
        seq = min(seq, self.rooms[room_id]["seq"])
        if (yield from first(SET_READ, room_id, self.me, seq)):
            read = {"type": "read", "room_id": room_id, "username": self.me, "seq": seq}
            self.notes.append(("tell", room_id, read))

    def register(self, room_id: str, email: str, password: str) -> Operation:
        """Adds an account; the first, while the Lobby is untouched, becomes its owner."""
        if not (yield from first(ADD_USER, self.me, email, password, self.now)):
            raise ChatError(409, "this name or e-mail address is taken")
        if room_id in self.rooms and not self.rooms[room_id]["seq"]:
            yield from self.set_role(room_id, self.me, "owner")
        return (yield from self.get_me())

    def set_password(self, password: str = "", before: str = "", void: int = 1) -> Operation:
        """Voids every token of a user; with a new password's hash, or with the old one."""
        user = yield from first(GET_USER + self.row_lock, self.me)
        if not user or (before and user["password"] != before):
            raise ChatError(404, "there is no such user, or the password has been changed")
        values = (user["username"], password or user["password"], user["email"], void)
        self.end((yield from first(SET_USER, *values)))

    def logout(self) -> Operation:
        """Voids every token of the caller."""
        yield from self.set_password()

    def end(self, user: Row) -> None:
        """Ends all log-ins of a user before this version."""
        self.versions[user["username"]] = user["version"]
        self.notes.append(("end", user["username"], user["version"]))

    def delete_user(self) -> Operation:
        """Empties an account and leaves its rooms; the last owner's next in rank inherits."""
        self.end((yield from first(SET_USER, self.me, None, None, 1)))
        mine = yield LIST_ROLES, [(self.me,)]
        yield from self.lock(row["room_id"] for row in mine)
        for room_id, role in [(row["room_id"], row["role"]) for row in mine]:
            if room_id in self.rooms:
                heir = role == "owner" and (yield from first(GET_HEIR, room_id, self.me))
                yield from self.set_role(room_id, self.me, None)
                if heir and heir["role"] != "owner":
                    yield from self.set_role(room_id, heir["username"], "owner")

    def erase(self, rooms: Sequence[str], texts: Sequence[Row]) -> Operation:
        """Deletes messages of an account that is about to go, in whatever rooms they are."""
        yield SET_MESSAGE, [(row["room_id"], row["seq"], None, None, None) for row in texts]
        for row in texts:
            if row["room_id"] in self.rooms:
                self.add(row["room_id"], "delete", target=row["seq"])

    def expire(self, room_id: str, kind: str, floor: int) -> Operation:
        """Raises a room's floor; below it only client_ids stay, to know a retry for ever."""
        for sql in (SET_FLOOR, BLANK, EXPIRE_MARKS):
            yield sql, [(room_id, floor)]
        yield EXPIRE, [(room_id, floor, kind)]

    def list_users(self, after: str = "", prefix: str = "", limit: int = 50) -> Operation:
        """Lists users by name."""
        return [show_user(row) for row in (yield LIST_USERS, [(after, prefix, limit)])]

    def get_user(self, username: str) -> Operation:
        """Returns a user."""
        if not (row := (yield from first(GET_USER, username))):
            raise ChatError(404, "there is no such user")
        return show_user(row)

    def get_me(self) -> Operation:
        """Returns the caller, who alone sees the e-mail address."""
        row = yield from first(GET_USER, self.me)
        return show_user(row) | {"email": row["email"]}

    def list_rooms(self) -> Operation:
        """Lists public rooms and the caller's own."""
        return [dict(row) for row in (yield LIST_ROOMS, [(self.me,)])]

    def show_room(self, room_id: str) -> Operation:
        """Returns a room as the caller sees it; what this transaction adds counts."""
        self.admit(room_id)
        if not (row := (yield from first(GET_ROOM, self.me, room_id))):
            raise ChatError(404, "there is no such room")
        return {**row, "seq": self.rooms[room_id]["seq"], "unread": max(row["unread"], 0)}

    def get_room(self, room_id: str) -> Operation:
        """Returns a room with its members, the banned only to moderators."""
        hidden = () if self.admit(room_id) >= RANKS["moderator"] else ("banned",)
        found = yield LIST_MEMBERS, [(room_id,)]
        shown = [dict(row) | {"online": False} for row in found if row["role"] not in hidden]
        return (yield from self.show_room(room_id)) | {"members": shown}

    def list_messages(
        self, room_id: str, before: int = UNLIMITED, after: int = -1, limit: int = 50
    ) -> Operation:
        """Returns a page of history, oldest first."""
        self.admit(room_id)
        start = max(after, self.rooms[room_id]["floor"])
        end = min(before, self.rooms[room_id]["seq"] + 1)
        sql = NEWEST if after < 0 or before < UNLIMITED else OLDEST
        page = yield sql, [(room_id, start, end, limit)]
        return sorted(map(describe, page), key=lambda event: event["seq"])

    def list_events(
        self, room_id: str, after: int = 0, epoch: str = "", limit: int = 200, wait: int = 0
    ) -> Operation:
        """Returns the log after a cursor, as a WebSocket would; the route does the waiting."""
        self.admit(room_id)
        floor, seq = self.rooms[room_id]["floor"], self.rooms[room_id]["seq"]
        head = {"seq": seq, "epoch": (yield from first(GET_EPOCH))["value"]}
        # Not beyond the head that was read together with the caller's role: that may be past.
        page = yield LIST_EVENTS, [(room_id, after, seq, limit)]
        known = floor <= after <= seq and epoch in ("", head["epoch"])
        if not known or not (after == seq or is_whole(page, after)):
            detail = "there is nothing to resume from; start afresh from seq"
            raise ChatError(410, detail, floor=floor, **head)
        return {"events": [*map(describe, page)], **head}

    def search(
        self, q: str, room_id: str = "", before: int = UNLIMITED, limit: int = 50
    ) -> Operation:
        """Finds messages that hold a text, newest first."""
        pattern = "%" + re.sub("([!%_])", r"!\1", q.casefold()) + "%"
        if room_id:
            self.admit(room_id)
            values = (self.me, pattern, limit, room_id, before)
            return [*map(describe, (yield SEARCH_ROOM, [values]))]
        if before < UNLIMITED:
            raise ChatError(400, "before: goes with room_id, whose numbers it means")
        return [*map(describe, (yield SEARCH_ALL, [(self.me, pattern, limit)]))]


# ---------------------------------------------------------------------------------------------- hub
# Who is connected, and how an event gets to every socket once, in order, waiting for nobody. It
# knows a room by its cursor, the last seq that this process has published; what it missed it
# reads in the log.

NAMES = 200  # names of who is online in one note, which has less than 8000 bytes
QUIET_ABOVE = 100  # users online: with more, presence, typing and read markers are not told
WAITING = 2**20  # bytes that may wait for a slow reader
TOO_SLOW = 4408, "too slow: resume from the last number that you saw"
PAGE = 500  # events in one step of a replay
PING, SILENCE = 25, 40  # seconds


def to_frame(payload: bytes, opcode: int = WSMsgType.TEXT) -> bytes:
    """Returns one whole unmasked frame (RFC 6455 5.2)."""
    size, start = len(payload), bytes((0x80 | opcode,))
    if size < 126:
        return start + bytes((size,)) + payload
    wide = size >= 65536
    return start + (b"\x7f" if wide else b"\x7e") + size.to_bytes(8 if wide else 2, "big") + payload


def to_frames(items: Iterable[Row]) -> bytes:
    """Encodes items as one run of frames."""
    return b"".join([to_frame(encode(item).encode()) for item in items])


class Login(NamedTuple):
    """Whom a token names, which version of their tokens it is, and when it ends."""

    username: str
    version: int
    expires: float


def cut(transport: asyncio.Transport) -> None:
    """Ends a connection whatever waits for it, if it has not ended already."""
    if transport.get_extra_info("socket").fileno() >= 0:
        transport.abort()


class Socket:
    """One connection to a room; live once it has seen all that is published."""

    def __init__(self, transport: asyncio.Transport, room: Room, login: Login) -> None:
        # Small kernel buffers make a stalled reader show soon.
        transport.get_extra_info("socket").setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 65536)
        self.transport, self.room, self.closed, self.typed = transport, room, False, 0.0
        self.told = set[str]()  # who was online when it entered
        self.heard = self.pinged = time.monotonic()
        self.entered, self.removed = UNLIMITED, 0  # the seqs that let it in and that put it out
        self.loop = asyncio.get_running_loop()
        self.expiry = self.loop.call_soon(int)  # takes the place of a timer until there is one
        self.renew(login)

    def renew(self, login: Login) -> None:
        """Makes the socket live as long as this log-in and not a moment longer."""
        self.login = login
        self.expiry.cancel()
        left = login.expires - time.time()
        self.expiry = self.loop.call_later(left, self.close, 4401, "the token has expired")

    def write(self, data: bytes) -> None:
        """Writes frames, but none after the close frame; a replay may be further behind."""
        most = WAITING if self in self.room.live else 8 * WAITING
        if self.transport.get_write_buffer_size() > most:
            self.close(*TOO_SLOW)
        elif not self.closed:
            self.transport.write(data)

    def send(self, *items: Row) -> None:
        """Encodes and writes items."""
        self.write(to_frames(items))

    def close(self, code: int, reason: str) -> None:
        """Sends a close frame now and soon cuts the connection, whatever the peer does."""
        if not self.closed:
            self.closed = True
            self.room.live.discard(self)
            payload = code.to_bytes(2, "big") + reason.encode()[:120]
            self.transport.write(to_frame(payload, WSMsgType.CLOSE))
            if code == 1001:  # aiohttp reads no farewell while it shuts down
                with contextlib.suppress(OSError, NotImplementedError):  # gone already; TLS
                    self.transport.write_eof()
            self.loop.call_later(0.5 if code == 4408 else 2, cut, self.transport)


class Room:
    """A room in which somebody is connected; cursor -1: where it stands is not known yet."""

    def __init__(self, room_id: str) -> None:
        self.room_id, self.cursor, self.head = room_id, -1, 0
        self.sockets, self.live = set[Socket](), set[Socket]()
        self.announced = set[str]()  # who was told to be online
        self.reader: asyncio.Task[None] | None = None  # reads what this process has missed


def shut(some: Iterable[Socket], code: int, reason: str) -> None:
    """Closes sockets."""
    for socket in list(some):
        socket.close(code, reason)


class Hub:
    """The rooms and sockets of this process, and what it knows of the others."""

    def __init__(self, config: Config) -> None:
        self.config, url = config, config.database_url
        self.db = Postgres(url) if url.startswith("postgres") else SQLite(url)
        self.counts: defaultdict[str, float] = defaultdict(int)
        self.rooms: dict[str, Room] = {}
        self.users: defaultdict[str, set[Socket]] = defaultdict(set)
        self.waiting: dict[str, asyncio.Event] = {}  # for the next event of a room, by long polls
        self.notes: list[Any] = []  # on their way to other processes
        # Who is online elsewhere: by room and process, with the time when it was told.
        self.peers: dict[str, dict[str, tuple[set[str], float]]] = {}

    def leave(self, socket: Socket) -> None:
        """Forgets a socket, and what only it needed."""
        room, username = socket.room, socket.login.username
        socket.expiry.cancel()
        for group in (room.sockets, room.live, self.users[username]):
            group.discard(socket)
        if not self.users[username]:
            del self.users[username]
        if not room.sockets:
            self.rooms.pop(room.room_id, None)
            self.notes.append(("online", room.room_id, []))

    def publish(self, events: Iterable[dict[str, Any]]) -> None:
        """Delivers what follows a room's cursor; if something is missing between, has it read."""
        by_room = defaultdict(list)
        for event in events:
            by_room[event["room_id"]].append(event)
        for room_id, added in by_room.items():
            room, head = self.rooms.get(room_id), added[-1]["seq"]
            if room and room.cursor == added[0]["seq"] - 1:
                self.deliver(room, added)
            self.notice(room_id, head)
            self.notes.append(("head", room_id, head))

    def wake_polls(self, *room_ids: str) -> None:
        """Has the long polls of rooms look again."""
        for room_id in room_ids:
            if room_id in self.waiting:
                self.waiting.pop(room_id).set()

    def notice(self, room_id: str, head: int) -> None:
        """Takes note of how far a room's log goes; what this process has missed it reads."""
        self.wake_polls(room_id)
        if room := self.rooms.get(room_id):
            room.head = max(room.head, head)
            reading = room.reader and not room.reader.done()
            if -1 < room.cursor < room.head and not reading:
                room.reader = asyncio.create_task(self.catch_up(room))

    async def catch_up(self, room: Room) -> None:
        """Delivers a room's log up to its head; meanwhile others may do so as well."""
        while room.sockets and room.cursor < room.head:
            page: list[Any] = []
            with contextlib.suppress(ChatError):
                values = (room.room_id, room.cursor, UNLIMITED, 1000)
                page = await self.db.run(READ, each(LIST_EVENTS, [values]))
            if not page:
                await asyncio.sleep(0.5)
            page = [event for event in page if event["seq"] > room.cursor]
            if is_whole(page, room.cursor):
                self.deliver(room, page)
            elif page:
                room.cursor = page[-1]["seq"]
                shut(room.sockets, 1001, "what you missed has expired, resume")

    def deliver(self, room: Room, events: Sequence[Row]) -> None:
        """Writes events to all live sockets; who is removed by one gets none after it."""
        start = 0
        for end, event in enumerate(events, 1):
            if event["kind"] == "member" and event["role"] in (None, "banned"):
                self.fan_out(room, events[start:end])
                start = end
                self.remove(room, event["member"], event["seq"])
        self.fan_out(room, events[start:])
        room.cursor = events[-1]["seq"]

    def remove(self, room: Room, member: str, seq: int) -> None:
        """Closes the sockets of who was removed, unless they have come back since."""
        for socket in [one for one in room.sockets if one.login.username == member]:
            socket.removed = seq
            if socket.entered < seq:
                socket.close(4403, "you are no longer in this room")

    def fan_out(self, room: Room, events: Sequence[Row]) -> None:
        """Encodes once, writes once a socket, and cuts off who lags too far behind."""
        data, slow = to_frames(map(describe, events)), []
        for socket in room.live:
            if socket.transport.get_write_buffer_size() > WAITING:
                slow.append(socket)
            else:
                socket.transport.write(data)
        self.counts["deliveries"] += len(room.live) * len(events)
        self.counts["slow_readers"] += len(slow)
        shut(slow, *TOO_SLOW)

    async def replay(self, socket: Socket, cursor: int) -> None:
        """Sends what follows a cursor, at the reader's pace, then in the same step goes live."""
        room = socket.room
        while not socket.closed and cursor != room.cursor:
            page: list[Any] = []
            published = room.cursor  # as it is now: it moves on while we read
            with contextlib.suppress(ChatError):
                values = (room.room_id, cursor, published, PAGE)
                page = await self.db.run(READ, each(LIST_EVENTS, [values]))
                if cursor < published and not is_whole(page, cursor):
                    socket.close(1001, "what you missed has expired, resume")
            if not page:
                await asyncio.sleep(0.02)  # the database is away, or we have not published so far
                continue
            socket.send(*map(describe, page))
            cursor = page[-1]["seq"]
            sent = time.monotonic()
            while not socket.closed and socket.transport.get_write_buffer_size() > WAITING // 4:
                await asyncio.sleep(0.01)
                if time.monotonic() - sent > SILENCE:
                    socket.close(*TOO_SLOW)
        if not socket.closed:
            room.live.add(socket)
            self.tell_presence([socket], room.room_id, socket.told, self.online(room.room_id))

    def whisper(self, some: Iterable[Socket], items: Sequence[Row]) -> None:
        """Sends what is never stored, if few are online, to everybody but whom it is about."""
        if items and len(self.online(items[0]["room_id"])) <= QUIET_ABOVE:
            for socket in list(some):
                socket.send(*(one for one in items if one["username"] != socket.login.username))

    def tell_presence(
        self, some: Iterable[Socket], room_id: str, before: set[str], online: set[str]
    ) -> None:
        """Tells sockets who came and went."""
        common, changed = {"type": "presence", "room_id": room_id}, sorted(online ^ before)
        self.whisper(some, [common | {"username": one, "online": one in online} for one in changed])

    def here(self, room_id: str) -> set[str]:
        """Returns who is connected to a room in this process."""
        room = self.rooms.get(room_id)
        return {one.login.username for one in room.sockets if not one.closed} if room else set()

    def online(self, room_id: str | None = None) -> set[str]:
        """Returns who is connected, in any process, to a room or to any room."""
        here = set(self.users) if room_id is None else self.here(room_id)
        rooms = self.peers.values() if room_id is None else [self.peers.get(room_id, {})]
        return here.union(*(names for told in rooms for names, _ in told.values()))

    def announce(self, *, again: bool) -> None:
        """Tells who came and went since the last time, here and, all of it again, elsewhere."""
        for room_id, room in self.rooms.items():
            online = self.online(room_id)
            if again or online != room.announced:
                self.notes.append(("online", room_id, sorted(self.here(room_id))[:NAMES]))
            if online != room.announced:
                self.tell_presence(room.live, room_id, room.announced, online)
                room.announced = online

    def hear(self, kind: str, name: str, more: Any = None, process: str = "") -> None:
        """Does what a commit has made necessary, or another process tells."""
        room = self.rooms.get(name)
        if kind == "head":
            self.notice(name, more)
        elif kind == "online":
            self.peers.setdefault(name, {})[process] = set(more), time.monotonic()
        elif kind == "tell" and room:
            self.whisper(room.live, [more])
        elif kind == "gone":
            self.wake_polls(name)
            shut(room.sockets if room else (), 4404, "this room was deleted")
        elif kind == "end":
            old = [one for one in self.users.get(name, ()) if one.login.version < more]
            shut(old, 4401, "this log-in has ended")
            self.wake_polls(*self.waiting)

    def sweep(self) -> None:
        """Pings, cuts off who answers nothing, and forgets processes that fell silent."""
        now = time.monotonic()
        for socket in itertools.chain.from_iterable(self.users.values()):
            if now - socket.heard > SILENCE:
                cut(socket.transport)
            elif now - socket.pinged > PING:
                socket.pinged = now
                socket.write(to_frame(b"", WSMsgType.PING))
        for name, told in list(self.peers.items()):
            kept = {key: one for key, one in told.items() if one[0] and now - one[1] < 10}
            self.peers[name] = kept
            if not kept:
                del self.peers[name]


# --------------------------------------------------------------------------------------------- chat
# What both transports share: the writer, log-ins, and the tasks that run as long as the server
# does.

BATCH, QUEUE = 250, 10_000  # commands in one transaction, and waiting for one
HASHES = 32  # passwords being hashed or waiting for it


def keep_secret(path: str) -> str:
    """Returns the key in a file that only its owner may read, made at the first call."""
    private = partial(os.open, mode=0o600)
    with contextlib.suppress(FileExistsError), open(path, "x", opener=private) as file:
        file.write(secrets.token_hex(32))
    if len(secret := Path(path).read_bytes().strip()) < 32:
        raise SystemExit(f"chatserver: secret_key: {path} has less than 32 bytes")
    return secret.decode()


class Chat(Hub):
    """The server without its transports."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.key, self.epoch, self.stopping = config.secret_key, "", False
        self.queue, self.wake = list[Command](), asyncio.Event()
        self.news = asyncio.Event()  # set when there are notes
        self.hour = asyncio.Event()  # set before an hour is over when there is something to delete
        self.connected: Counter[str] = Counter()  # sockets by address
        self.strangers: set[web.WebSocketResponse] = set()  # sockets that have not logged in
        self.hashes, self.hashers = Counter[str](), ThreadPoolExecutor(2)  # hashes: by address
        self.searches = asyncio.Semaphore(2)  # which leaves connections for what is quick
        self.messages = Limiter(config.messages_per_second, config.message_burst)
        self.changes = Limiter(config.messages_per_second, 10 * config.message_burst)  # of rooms
        self.frames = Limiter(20, 100)  # whatever else a socket sends; who floods us is cut off
        self.logins = Limiter(config.logins_per_minute / 60, config.logins_per_minute)
        hourly = config.registrations_per_hour
        self.registrations = Limiter(hourly / 3600, hourly)
        self.limiters = (self.messages, self.changes, self.frames, self.logins, self.registrations)

    @contextlib.asynccontextmanager
    async def running(self, _: object = None, *, listens: bool = True) -> AsyncIterator[None]:
        """Opens the database and runs the tasks; on the way out finishes what was accepted."""
        await self.db.open((HERE / "schema.sql").read_text("utf-8"))
        for warning in self.db.warnings:
            LOGGER.critical(warning)
        if isinstance(self.db, SQLite) and not self.key:
            self.key = keep_secret(self.db.path + ".secret")
        await self.db.run(WRITE, first(ADD_EPOCH, secrets.token_hex(8)))
        self.epoch = (await self.db.run(READ, first(GET_EPOCH)))["value"]
        works = [self.write_batches, self.spread, self.tick, self.upkeep]
        if listens and isinstance(self.db, Postgres):
            works.append(partial(self.db.listen, self.hear))
        tasks = [asyncio.create_task(self.keep(work)) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)  # a database that hangs answers no farewell either
            self.hashers.shutdown(wait=False, cancel_futures=True)
            await self.db.tell(self.notes)  # who was here is so no more
            await self.db.close()

    async def keep(self, work: Callable[[], Any]) -> None:
        """Does something again and again, also should it fail."""
        while True:
            try:
                await work()
            except Exception:
                LOGGER.exception("a task failed")
            await asyncio.sleep(1)

    def submit(self, command: Command) -> None:
        """Queues a change."""
        if len(self.queue) >= QUEUE or self.stopping:
            raise ChatError(503, "more waits than can be stored now, try again soon", retry_after=1)
        self.queue.append(command)
        self.wake.set()

    async def change(self, name: str, me: str, /, version: int | None = None, **fields: Any) -> Any:
        """Returns what an operation returns, once that is durable and published."""
        answers = asyncio.Queue[Any]()
        self.submit(Command(name, me, fields, version, answers.put_nowait))
        if isinstance(outcome := await answers.get(), ChatError):
            raise outcome
        return outcome

    async def look(self, name: str, me: str, /, **fields: Any) -> Any:
        """Returns what an operation finds."""
        work = Transaction(self.config).run([Command(name, me, fields)])
        async with self.searches if name == "search" else contextlib.nullcontext():
            outcome = (await self.db.run(READ, work))[0]
        if isinstance(outcome, ChatError):
            raise outcome
        return outcome

    async def write_batches(self) -> None:
        """Commits together what arrived while the last batch was committed: so durable is fast."""
        while await self.wake.wait():
            self.wake.clear()
            while batch := self.queue[:BATCH]:
                outcomes = await self.commit(batch)
                del self.queue[: len(batch)]
                self.news.set()
                for command, outcome in zip(batch, outcomes, strict=True):
                    try:
                        command.reply(outcome)
                    except Exception:  # one that cannot be told harms no other
                        LOGGER.exception("an answer failed")

    async def commit(self, batch: Sequence[Command]) -> Sequence[Any]:
        """Stores a batch and publishes it; whom it shuts out is shut out before the answer."""
        for attempt in range(3):
            work, began = Transaction(self.config, self.db.row_lock), time.monotonic()
            try:
                outcomes: list[Any] = await self.db.run(WRITE, work.run(batch))
                break
            except DatabaseError as error:
                if attempt == 2 or not error.undone:
                    return [error] * len(batch)
            except Exception:
                LOGGER.exception("a change failed")
                return [MISTAKE] * len(batch)
        for note in work.notes:
            self.hear(*note)
        self.publish(work.events)
        self.notes += work.notes
        if ends := [note for note in work.notes if note[0] == "end"]:
            await self.db.tell(ends)
        if any(note[0] == "gone" for note in work.notes):
            self.hour.set()
        self.counts["commit_seconds"] += time.monotonic() - began
        self.counts["batches"] += 1
        self.counts["batch_messages"] += len(work.events)
        self.counts["messages"] += sum(event["kind"] == "message" for event in work.events)
        return outcomes

    async def spread(self) -> None:
        """Tells other processes, beside the writer, so that neither waits for the other."""
        while await self.news.wait():
            self.news.clear()
            notes, self.notes = self.notes, []
            await self.db.tell(notes)

    async def tick(self) -> None:
        """Does what need not be done at once; looks into a shared database, if a note was lost."""
        for count in itertools.count():
            await asyncio.sleep(0.5)
            self.announce(again=count % 4 == 0)
            self.notes.append(("", "", None))  # its echo shows that notes arrive
            self.news.set()
            if count % 4 == 0:
                self.sweep()
                for limiter in self.limiters:
                    limiter.forget()
                with contextlib.suppress(ChatError):
                    await self.poll()

    async def poll(self) -> None:
        """Looks into a shared database itself, in case a note was lost."""
        if self.db.shared:
            names = [(name,) for name in {*self.rooms, *self.waiting}]
            for row in await self.db.run(READ, each(LOCK_ROOM, names)):
                self.notice(row["room_id"], row["seq"])
                self.hear("gone" if row["kind"] == "deleted" else "", row["room_id"])
            for row in await self.db.run(READ, each(GET_USER, [(name,) for name in self.users])):
                self.hear("end", row["username"], row["version"])

    async def upkeep(self) -> None:
        """Deletes what has expired, at start and hourly, a little at a time."""
        self.hour.clear()
        days = self.config.retention_days
        cutoff = int((time.time() - days * 86400) * 1000) if days else 0
        with contextlib.suppress(ChatError):
            for row in await self.db.run(READ, each(LIST_EXPIRED, [(cutoff,)])):
                room_id, kind, floor, goal = row.values()
                for step in (*range(floor + 500, goal, 500), goal):
                    await self.change("expire", "", room_id=room_id, kind=kind, floor=step)
        if isinstance(self.db, SQLite):
            await self.db.tidy()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.hour.wait(), 3600)

    async def hash(self, address: str, function: Callable[..., Any], *values: Any) -> Any:
        """Runs a password function on one of two threads; refuses when too many wait already."""
        if self.hashes.total() >= HASHES or self.hashes[address] >= HASHES // 2:
            raise ChatError(503, "too many log-ins at once, try again soon", retry_after=2)
        self.hashes[address] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.hashers, function, *values)
        finally:
            self.hashes -= Counter([address])

    async def verify(self, account: str, password: bytes, address: str, refusal: ChatError) -> Row:
        """Returns who has this name or e-mail and password; failures count for the address."""
        self.logins.take(address, 0)
        user = await self.db.run(READ, first(GET_USER, account))
        stored = user["password"] if user else NOBODY
        right = await self.hash(address, verify_password, password, stored)
        self.logins.take(address, 0)  # others from there may have failed meanwhile
        if not right:
            self.logins.take(address)
            raise refusal
        if not stored.startswith(f"{SCRYPT}$"):
            hashed = await self.hash(address, hash_password, password)
            fields = {"password": hashed, "before": stored, "void": 0}
            await self.change("set_password", user["username"], **fields)
        return user  # type: ignore[no-any-return]

    async def authenticate(self, token: object) -> Login:
        """Returns whom a token names, if it is ours, has not expired and was not voided."""
        options: Any = {"require": ["exp", "iat", "sub"], "verify_iat": False}  # clocks go back
        try:
            claims = jwt.decode(str(token), self.key, [self.config.algorithm], options)
            name = check({"username": claims["sub"]}, "username")
        except (jwt.InvalidTokenError, ValueError, ChatError) as error:
            raise ChatError(401, f"log in again: {error}") from None
        user = await self.db.run(READ, first(GET_USER, name))
        if not user or (user["username"], user["version"]) != (claims["sub"], claims.get("ver")):
            raise ChatError(401, "log in again: this log-in has ended")
        return Login(name, user["version"], claims["exp"])


# --------------------------------------------------------------------------------------------- HTTP
# A route binds an operation's fields from path, query and body, by name, and answers what it
# returns. Only what is more than that has a handler of its own.

CDN = "https://cdn.jsdelivr.net/npm/"
STRICT = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
PAGE_POLICY = STRICT + "; script-src {script}; style-src {style}; connect-src 'self'; img-src data:"
DOCS_POLICY = (
    f"{STRICT}; script-src 'self' {{script}} {CDN}; style-src 'self' 'unsafe-inline' {CDN}; "
    "connect-src 'self'; img-src 'self' data:; font-src data:; worker-src blob:"
)
RATES = dict.fromkeys(("post_message", "set_message"), "messages")
RATES |= dict.fromkeys(("set_member", "create_room", "rename_room", "delete_room"), "changes")
COUNTED = ("messages", "deliveries", "slow_readers", "batches", "batch_messages", "commit_seconds")


def answer(data: Any = None, status: int = 200) -> web.Response:
    """Returns JSON, or 204 for nothing."""
    if data is None:
        return web.Response(status=204)
    return web.json_response(data, status=status, dumps=encode)


@lru_cache
def fields_of(name: str) -> dict[str, Any]:
    """Returns the fields that an operation takes, with their defaults."""
    parameters = inspect.signature(getattr(Transaction, name)).parameters.values()
    return {one.name: one.default for one in parameters if one.name != "self"}


def query(request: web.Request) -> dict[str, str]:
    """Returns a query, whose parts are UTF-8 and stand there once."""
    text = request.rel_url.raw_query_string
    try:
        return unique(parse_qsl(text, keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise ChatError(400, f"the query cannot be read: {error}") from None


def locate(request: web.Request) -> dict[str, Any]:
    """Returns the fields of a path; there is nothing where one is not what it should be."""
    try:
        return {name: check(request.match_info, name, spelled=True) for name in request.match_info}
    except ChatError as error:
        raise ChatError(404, f"there is no such path: {error}") from None


class Http(Chat):
    """The handlers of HTTP."""

    def bind(
        self, name: str, data: Row, me: str, *, spelled: bool = False, unset: bool = False
    ) -> dict[str, Any]:
        """Returns an operation's fields, checked; the caller's rate of posting counts here."""
        fields: dict[str, Any] = {
            key: None if unset and key not in data else check(data, key, default, spelled=spelled)
            for key, default in fields_of(name).items()
        }
        if "limit" in fields:
            fields["limit"] = min(fields["limit"], self.config.history_limit or UNLIMITED)
        if len(fields.get("message") or "") > (self.config.message_length or UNLIMITED):
            raise ChatError(400, f"message: is over {self.config.message_length} characters")
        if name in RATES:
            getattr(self, RATES[name]).take(me)
        return fields

    async def identify(self, request: web.Request) -> Login:
        """Returns whom the Authorization header names."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise ChatError(401, "an Authorization: Bearer header is required")
        return await self.authenticate(token.strip())

    def address(self, request: web.Request) -> str:
        """Returns the right-most address that is not a trusted proxy's; of IPv6 its /64."""
        hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
        hops = [hop.strip().removeprefix("::ffff:") for hop in (*hops, request.remote or "")]
        trusted = [ipaddress.ip_network(text, strict=False) for text in self.config.trusted_proxies]
        with contextlib.suppress(ValueError):
            while hops[1:] and any(ipaddress.ip_address(hops[-1]) in one for one in trusted):
                hops.pop()
            if ipaddress.ip_address(hops[-1]).version == 6:  # of which one person has 2^64
                return str(ipaddress.ip_network(f"{hops[-1]}/64", strict=False))
        return hops[-1][:64]

    async def body(self, request: web.Request, form: str = "") -> Row:
        """Returns a JSON object, or the form that is expected, within 10 s; an empty body is {}."""
        data, most = bytearray(), self.config.body_bytes or UNLIMITED
        kind = request.headers.get("Content-Type", "").lower()
        try:
            async with asyncio.timeout(10):
                async for chunk in request.content.iter_any():
                    data += chunk
                    if len(data) > most:
                        raise ChatError(413, f"the body is larger than {most} bytes")
            text = data.decode()
            if form and request.content_type == form:
                return unique(parse_qsl(text, keep_blank_values=True, errors="strict"))
        except TimeoutError:
            raise ChatError(408, "the body took longer than 10 s") from None
        except (ValueError, web.RequestPayloadError) as error:
            raise ChatError(400, f"the body cannot be read: {error}"[:200]) from None
        if text and not re.fullmatch('application/json *(; *charset="?utf-8"?)?', kind):
            raise ChatError(415, "the body should be application/json in UTF-8")
        return parse_object(text) if text else {}

    def route(self, name: str, method: str) -> typedefs.Handler:
        """Returns the handler of an operation for those who are logged in."""

        async def handler(request: web.Request) -> web.StreamResponse:
            login, path = await self.identify(request), locate(request)
            if method == "GET":
                fields = self.bind(name, query(request) | path, login.username, spelled=True)
                outcome = await self.look(name, login.username, **fields)
                if fields.get("wait") and not outcome["events"]:
                    outcome = await self.wait_for(request, login.username, fields)
            else:  # to delete is to set to nothing
                data = {**await self.body(request), **path} if method != "DELETE" else path
                fields = self.bind(name, data, login.username, unset=method == "DELETE")
                outcome = await self.change(name, login.username, version=login.version, **fields)
            status, outcome = outcome if isinstance(outcome, tuple) else (200, outcome)
            return answer(self.mark_online(outcome), status)

        return handler

    async def wait_for(self, request: web.Request, me: str, fields: dict[str, Any]) -> Any:
        """Returns a room's next events, or none after `wait` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + min(fields["wait"], 30)
        while True:
            more = self.waiting.setdefault(fields["room_id"], asyncio.Event())
            outcome = await self.look("list_events", me, **fields)
            if outcome["events"] or loop.time() >= end or self.stopping:
                return outcome
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await more.wait()
            await self.identify(request)  # the log-in may have ended meanwhile

    def mark_online(self, outcome: Any) -> Any:
        """Fills in who is online, in this room or in any, which no operation knows."""
        whole: Row = outcome if isinstance(outcome, dict) else {"members": outcome or ()}
        shown = [user for user in whole.get("members", [whole]) if "online" in user]
        online = self.online(whole.get("room_id")) if shown else ()
        for user in shown:
            user["online"] = user["username"] in online
        return outcome

    async def register(self, request: web.Request) -> web.Response:
        """Adds an account."""
        data = await self.body(request)
        username, email = check(data, "username"), check(data, "email")
        password = check_password(data, "password", self.config.password_min_length)
        if self.config.registration == "closed":
            raise ChatError(403, "registration is closed")
        self.registrations.take(address := self.address(request))
        hashed = await self.hash(address, hash_password, password)
        user = await self.change("register", username, room_id="1", email=email, password=hashed)
        return answer(user, 201)

    async def token(self, request: web.Request) -> web.Response:
        """Logs in, by OAuth2's password grant (RFC 6749 4.3) as a form, or by the same as JSON."""
        data = await self.body(request, form="application/x-www-form-urlencoded")
        if (data.get("grant_type") or "password") != "password":
            raise ChatError(400, "grant_type should be password", "unsupported_grant_type")
        given = {"username or email": data.get("username")}
        account = check(given, "username or email").lower()
        refusal = ChatError(400, "wrong name or password", "invalid_grant")
        password = check_password(data, "password")
        user = await self.verify(account, password, self.address(request), refusal)
        now, seconds = int(time.time()), self.config.access_token_expire_minutes * 60
        claims = {"sub": user["username"], "ver": user["version"], "iat": now, "exp": now + seconds}
        token = jwt.encode(claims, self.key, self.config.algorithm)
        response = answer({"access_token": token, "token_type": "bearer", "expires_in": seconds})
        response.headers["Cache-Control"] = "no-store"
        return response

    async def confirm(self, request: web.Request) -> tuple[str, Row]:
        """Returns the caller and the body, once the body's password is found to be the caller's."""
        me, data = (await self.identify(request)).username, await self.body(request)
        password, refusal = check_password(data, "password"), ChatError(403, "wrong password")
        await self.verify(me, password, self.address(request), refusal)
        return me, data

    async def change_password(self, request: web.Request) -> web.Response:
        """Changes the caller's password and voids every token."""
        me, data = await self.confirm(request)
        password = check_password(data, "new_password", self.config.password_min_length)
        hashed = await self.hash(self.address(request), hash_password, password)
        return answer(await self.change("set_password", me, password=hashed))

    async def delete_me(self, request: web.Request) -> web.Response:
        """Deletes the caller's account and, if asked to, the text of all their messages."""
        me, data = await self.confirm(request)
        if not isinstance(data.get("erase", False), bool):
            raise ChatError(400, "erase: should be true or false")
        await self.change("set_password", me)  # so that nothing is added meanwhile
        while data.get("erase") and (texts := await self.db.run(READ, each(LIST_TEXTS, [(me,)]))):
            await self.change("erase", me, rooms=[row["room_id"] for row in texts], texts=texts)
        return answer(await self.change("delete_user", me))

    async def page(self, request: web.Request) -> web.Response:
        """Returns the page to chat in, or the docs; inline script and style are allowed by hash."""
        chat, assets = request.path.endswith("/"), self.config.docs_assets
        file, policy = ("client.html", PAGE_POLICY) if chat else ("docs.html", DOCS_POLICY)
        text = (HERE / file).read_text("utf-8")
        text = text.replace("{{assets}}", assets if assets in ("cdn", "off") else "folder")
        policy = policy if assets == "cdn" else policy.replace(CDN, "")
        for tag in ("script", "style"):
            block = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()
            digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
            policy = policy.replace("{" + tag + "}", f"'sha256-{digest}'")
        headers = {"Content-Security-Policy": policy}
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def openapi(self, _: web.Request) -> web.Response:
        """Returns the OpenAPI document."""
        text = (HERE / "openapi.json").read_text("utf-8")
        return web.Response(text=text, content_type="application/json")

    async def healthz(self, _: web.Request) -> web.Response:
        """Tells whether the database answers and is set up to keep what it is told."""
        await self.db.run(READ, first(GET_EPOCH))
        return answer({"status": "ok", "database": self.db.name, "warnings": self.db.warnings})

    async def metrics(self, _: web.Request) -> web.Response:
        """Returns figures for Prometheus."""
        if self.config.metrics == "off":
            raise ChatError(404, "metrics are off")
        figures: dict[str, float] = {"sockets gauge": self.connected.total()}
        figures |= {"rooms gauge": len(self.rooms), "queue gauge": len(self.queue)}
        figures |= {f"{name}_total counter": self.counts[name] for name in COUNTED}
        lines = []
        for name, value in figures.items():
            lines += [f"# TYPE chatserver_{name}", f"chatserver_{name.partition(' ')[0]} {value}"]
        lines += ["# TYPE chatserver_errors_total counter"]
        for name in sorted(self.counts.keys() - {*COUNTED}):
            lines += [f'chatserver_errors_total{{code="{name}"}} {self.counts[name]}']
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body="\n".join([*lines, ""]).encode(), headers=headers)


# ---------------------------------------------------------------------------------------- WebSocket
# One coroutine a socket: log in, enter the room, replay, then do what each frame asks for. A
# frame that is refused is answered, and the socket lives on.

FRAMES = {
    "message": "post_message",
    "edit": "set_message",
    "delete": "set_message",
    "read": "mark_read",
}


class ChatServer(Http):
    """The handler of the WebSocket, and with it the whole server."""

    async def connect(self, request: web.Request) -> web.WebSocketResponse:
        """Takes a socket, if there is room for it, from its handshake to its end."""
        address, origin = self.address(request), request.headers.get("Origin", "")
        foreign = origin and origin.partition("://")[2] != request.host
        if foreign and origin not in self.config.allowed_origins:
            raise ChatError(403, "pages of this origin may not connect")
        if self.connected.total() >= (self.config.sockets or UNLIMITED) or self.stopping:
            raise ChatError(503, "the server is full", retry_after=10)
        if self.connected[address] >= (self.config.sockets_per_address or UNLIMITED):
            raise ChatError(429, "too many sockets from this address", retry_after=10)
        size = self.config.frame_bytes + 1 if self.config.frame_bytes else 0
        ws = web.WebSocketResponse(
            timeout=2, autoclose=False, autoping=False, compress=False, max_msg_size=size
        )
        self.connected[address] += 1
        try:
            login = await self.identify(request) if "Authorization" in request.headers else None
            if login:
                await self.check_entry(request, login)
            try:
                await ws.prepare(request)
            except ValueError:  # of headers that are not ASCII
                raise ChatError(400, "the handshake cannot be read") from None
            await self.converse(request, ws, login or await self.first_frame(ws))
        except ChatError as error:
            if not ws.prepared:
                raise
            await ws.close(code=error.close_code, message=str(error).encode()[:120])
        finally:
            self.connected[address] -= 1
            if not self.connected[address]:
                del self.connected[address]
            if ws.prepared and (transport := request.transport):
                transport.close()  # which waits for what is unsent, but not for ever
                asyncio.get_running_loop().call_later(2, cut, transport)
        return ws

    async def check_entry(self, request: web.Request, login: Login) -> dict[str, Any]:
        """Refuses who may not connect to this room, or not from there; returns where to start."""
        asked = query(request)
        await self.look("show_room", login.username, **locate(request))
        if len(self.users.get(login.username, ())) >= (self.config.sockets_per_user or UNLIMITED):
            raise ChatError(429, "too many sockets of this user", retry_after=10)
        start = {name: check(asked, name, None, spelled=True) for name in ("after", "last")}
        return start | {"epoch": asked.get("epoch", "") if "after" in asked else ""}

    async def first_frame(self, ws: web.WebSocketResponse) -> Login:
        """Waits 10 s for {"type": "auth", "token"}, as browsers must log in."""
        self.strangers.add(ws)
        try:
            data = await ws.receive_json(loads=parse_object, timeout=10)
        except (TimeoutError, TypeError, ChatError):  # what was no JSON was no log-in either
            data = {}
        finally:
            self.strangers.discard(ws)
        if data.get("type") != "auth":
            raise ChatError(401, "the first frame should be a valid log-in, within 10 s")
        return await self.authenticate(data.get("token"))

    async def converse(self, request: web.Request, ws: web.WebSocketResponse, login: Login) -> None:
        """Enters, replays and listens; whatever happens, the socket is forgotten at the end."""
        room_id, start = request.match_info["room_id"], await self.check_entry(request, login)
        if not (transport := request.transport):
            return
        room = self.rooms.setdefault(room_id, Room(room_id))
        socket, replay = Socket(transport, room, login), None
        # Before it is live, so that nothing that would end it is missed.
        room.sockets.add(socket)
        self.users[login.username].add(socket)
        try:
            cursor = await self.greet(socket, start)
            replay = asyncio.create_task(self.replay(socket, cursor))
            await self.listen(ws, socket)
        finally:
            self.leave(socket)
            if replay:
                replay.cancel()
                await asyncio.wait([replay])

    async def greet(self, socket: Socket, start: Row) -> int:
        """Enters and says hello, and reset if it must; returns the cursor to go on from."""
        room, me, version = socket.room, socket.login.username, socket.login.version
        role, floor, seq = await self.change("join", me, version=version, room_id=room.room_id)
        socket.entered = seq
        if socket.removed > seq:
            raise ChatError(403, "you are no longer in this room")
        room.cursor = seq if room.cursor < 0 else room.cursor
        self.notice(room.room_id, seq)
        where = {"room_id": room.room_id, "seq": seq, "epoch": self.epoch}
        hello = {"type": "hello", "username": me, "role": role}
        socket.told = self.online(room.room_id)
        socket.send({**hello, **where, "online": sorted(socket.told)[:QUIET_ABOVE]})
        after = seq if start["after"] is None else start["after"]
        if start["after"] is None and start["last"]:
            last = min(start["last"], self.config.history_limit or UNLIMITED)
            values = (room.room_id, floor, seq + 1, last)
            newest = await self.db.run(READ, each(NEWEST, [values]))
            after = newest[-1]["seq"] - 1 if newest else seq
        if not floor <= after <= seq or start["epoch"] not in ("", self.epoch):
            socket.send({"type": "reset", "floor": floor, **where})
            after = seq
        return int(after)

    async def listen(self, ws: web.WebSocketResponse, socket: Socket) -> None:
        """Answers each frame until the socket ends."""
        async for message in ws:
            socket.heard, data = time.monotonic(), dict[str, Any]()
            if socket.closed:
                continue
            try:
                if message.type == WSMsgType.TEXT:
                    data = parse_object(message.data)
                    await self.act(socket, data)
                elif message.type == WSMsgType.BINARY:
                    socket.close(1003, "text frames only")
                else:
                    self.count(socket)
                    if message.type == WSMsgType.PING:
                        socket.write(to_frame(message.data, WSMsgType.PONG))
            except ChatError as error:
                self.count(socket)
                self.settle(socket, data, error)
        if not socket.closed:
            await ws.close(drain=False)

    def count(self, socket: Socket) -> None:
        """Counts whatever is no accepted message, and cuts off who floods us with it."""
        try:
            self.frames.take(socket.login.username)
        except ChatError:
            socket.close(4429, "flooding")

    async def act(self, socket: Socket, data: dict[str, Any]) -> None:
        """Does what a frame asks for; most types are operations, as over HTTP."""
        kind, room_id, me = data.get("type", "message"), socket.room.room_id, socket.login.username
        if kind in ("read", "typing", "auth"):
            self.count(socket)
        if kind == "typing":
            self.tell_typing(socket)
        elif kind == "auth":
            login = await self.authenticate(data.get("token"))
            if login.username != me:
                raise ChatError(403, "this token is another user's, the old log-in stands")
            socket.renew(login)
        elif isinstance(kind, str) and kind in FRAMES:
            given = {**data, "room_id": room_id}
            if kind in ("edit", "delete"):
                given["seq"], _ = check(data, "target"), check(data, "client_id", None)
            if kind == "delete":
                given.pop("message", None)
            fields = self.bind(FRAMES[kind], given, me, unset=kind == "delete")
            reply = partial(self.settle, socket, data)
            self.submit(Command(FRAMES[kind], me, fields, socket.login.version, reply))
        else:
            raise ChatError(400, f"type: should be {', '.join(FRAMES)}, typing or auth")

    def tell_typing(self, socket: Socket) -> None:
        """Tells the others that somebody types, at most every 2 s."""
        if time.monotonic() - socket.typed > 2:
            socket.typed, room = time.monotonic(), socket.room
            typing = {"type": "typing", "room_id": room.room_id, "username": socket.login.username}
            self.whisper(room.live, [typing])
            self.notes.append(("tell", room.room_id, typing))
            self.news.set()

    def settle(self, socket: Socket, data: Row, outcome: Any) -> None:
        """Answers a frame: an error, an ack to a retry, else the event itself is the answer."""
        if isinstance(outcome, ChatError):
            body = {"type": "error", **outcome.body}
            for name in ("client_id", "target"):
                with contextlib.suppress(ChatError):
                    body[name] = check(data, name)
            socket.send(body)
            self.counts[outcome.body["error"]] += 1
        elif isinstance(outcome, tuple) and outcome[0] == 200:
            socket.send({"type": "ack", "client_id": data["client_id"], "seq": outcome[1]["seq"]})


# -------------------------------------------------------------------------------------- application
# What stands around every handler, the route table, and how the program starts and stops.

SERVER = web.AppKey("server", ChatServer)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": STRICT,
}
ROUTES = """
POST   /auth/register                       register
POST   /auth/token                          token
POST   /auth/logout                         logout
POST   /auth/password                       change_password
GET    /users                               list_users
GET    /users/me                            get_me
DELETE /users/me                            delete_me
GET    /users/{username}                    get_user
GET    /rooms                               list_rooms
POST   /rooms                               create_room
GET    /rooms/{room_id}                     get_room
PATCH  /rooms/{room_id}                     rename_room
DELETE /rooms/{room_id}                     delete_room
PUT    /rooms/{room_id}/members/{username}  set_member
DELETE /rooms/{room_id}/members/{username}  set_member
GET    /rooms/{room_id}/messages            list_messages
POST   /rooms/{room_id}/messages            post_message
PATCH  /rooms/{room_id}/messages/{seq}      set_message
DELETE /rooms/{room_id}/messages/{seq}      set_message
GET    /rooms/{room_id}/events              list_events
PUT    /rooms/{room_id}/read                mark_read
GET    /search                              search
GET    /websockets/chat/{room_id}           connect
GET    /                                    page
GET    /docs                                page
GET    /redoc                               page
GET    /openapi.json                        openapi
GET    /healthz                             healthz
GET    /metrics                             metrics
"""


def refuse(request: web.Request, refusal: ChatError, headers: dict[str, str]) -> web.Response:
    """Returns a refusal as JSON, with the headers that belong to it."""
    body = dict(refusal.body)
    if request.path.endswith("/auth/token"):  # RFC 6749 5.2
        code = body["error"].replace("bad_request", "invalid_request")
        body |= {"error": code, "error_description": body["detail"]}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status in (429, 503):
        headers["Retry-After"] = str(body.get("retry_after", 5))
    response = answer(body, refusal.status)
    response.headers.update(headers)
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: typedefs.Handler) -> web.StreamResponse:
    """Turns whatever is raised, by whomever, into its JSON; answers CORS preflights."""
    headers: dict[str, str] = {}
    try:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return answer()
        return await handler(request)
    except ChatError as error:
        refusal = error
    except web.HTTPException as error:
        if error.status < 400:
            raise
        refusal = ChatError(error.status, f"{request.method} {request.path}: {error.reason}")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    except ConnectionError:
        raise
    except Exception:
        LOGGER.exception("%s %s failed", request.method, request.path)
        refusal = MISTAKE
    request.config_dict[SERVER].counts[refusal.body["error"]] += 1
    return refuse(request, refusal, headers)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds the headers that every answer carries, and CORS for pages of allowed origins."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "chatserver"
    if allowed := request.config_dict[SERVER].config.allowed_origins:
        response.headers["Vary"] = "Origin"
    if (origin := request.headers.get("Origin", "")) in allowed:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, PATCH, DELETE"


async def stop(app: web.Application) -> None:
    """Lets what was accepted be committed, for at most 1 s, then sends every socket away."""
    server = app[SERVER]
    server.stopping = True
    for _ in range(100):
        await asyncio.sleep(0.01 if server.queue else 0)
    server.wake_polls(*server.waiting)
    shut(itertools.chain.from_iterable(server.users.values()), 1001, "shutting down")
    closing = [asyncio.ensure_future(ws.close(code=1001, drain=False)) for ws in server.strangers]
    if closing:
        await asyncio.wait(closing, timeout=1)


async def expect(request: web.Request) -> None:
    """Lets the body come, whatever else is expected (RFC 9110 10.1.1)."""
    if request.headers["Expect"].lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun


def create_app(config: Config | None = None) -> web.Application:
    """Returns the server as an aiohttp application; opens nothing yet."""
    app = web.Application(middlewares=[answer_errors])
    app[SERVER] = server = ChatServer(config or load_config())
    app.cleanup_ctx.append(server.running)
    app.on_shutdown.append(stop)
    app.on_response_prepare.append(add_headers)
    for method, path, name in map(str.split, ROUTES.strip().splitlines()):
        handler = getattr(server, name, None) or server.route(name, method)
        if method == "GET":
            app.router.add_get(path, handler, allow_head=name != "connect", expect_handler=expect)
        else:
            app.router.add_route(method, path, handler, expect_handler=expect)
    if server.config.docs_assets not in ("cdn", "off"):
        app.router.add_static("/docs/assets", server.config.docs_assets)
    return app


def backup(config: Config, target: str) -> None:
    """Copies the database while the server runs, under a new epoch, so that clients notice."""
    if not config.database_url.startswith("sqlite"):
        print("use pg_dump; once restored: UPDATE meta SET value = 'new' WHERE name = 'epoch'")
        raise SystemExit(2)
    path, part = SQLite(config.database_url).path, Path(f"{target}.part")
    if os.path.realpath(target) == path:
        raise SystemExit(f"chatserver: backup: {target}: is the database itself")
    try:
        source = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
            copy.execute(SET_EPOCH, {"1": secrets.token_hex(8)})
            copy.commit()
        part.replace(target)
    except (sqlite3.Error, OSError) as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"chatserver: backup: of {path} to {target}: {error}") from None


async def reset_password(config: Config, username: str) -> None:
    """Asks twice for a user's new password."""
    ask = getpass.getpass if sys.stdin.isatty() else lambda _: sys.stdin.readline().rstrip("\r\n")
    typed = {"password": ask("New password: ")}
    if ask("Again: ") != typed["password"]:
        raise SystemExit("chatserver: the two differ")
    try:
        password = hash_password(check_password(typed, "password", config.password_min_length))
        async with (server := Chat(config)).running(listens=False):
            await server.change("set_password", username.lower(), password=password)
    except ChatError as error:
        raise SystemExit(f"chatserver: {error}") from None


async def serve(config: Config, listener: sockets.socket, up: threading.Event) -> None:
    """Runs one process until it is told to stop; the first one says that it listens."""
    stopped, parent = asyncio.Event(), os.getppid()
    gc.set_threshold(50_000)  # almost nothing here is a cycle, and looking for them takes time
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    limits: Any = {"keepalive_timeout": 20, "shutdown_timeout": 1, "lingering_time": 1}
    runner = web.AppRunner(create_app(config), access_log=None, **limits)
    try:
        await runner.setup()
        # A small number here means few accepted at a time, so that processes share them fairly.
        await web.SockSite(runner, listener, backlog=8).start()
        listener.listen(1024)
        host = config.host or "0.0.0.0"  # noqa: S104  # every address is usually written so
        host = f"[{host}]" if ":" in host else host
        if not up.is_set():
            print(f"chatserver listening on http://{host}:{listener.getsockname()[1]}", flush=True)
        up.set()
        while not stopped.is_set() and (config.workers == 1 or os.getppid() == parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), 1)
    finally:
        await runner.cleanup()


def supervise(config: Config, listener: sockets.socket) -> None:
    """Keeps `workers` processes on one socket, replaces one that dies, and stops them together."""
    fork: Any = multiprocessing.get_context("fork")
    up, stopping, failed, workers = fork.Event(), threading.Event(), False, list[Any]()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    while workers or not stopping.is_set():
        if any(one.exitcode == 1 for one in workers) and not up.is_set():
            failed = True  # it could not start, and has said why
            stopping.set()
        workers = [one for one in workers if one.is_alive()]
        most = config.workers if up.is_set() else 1  # the others, once the first one listens
        while len(workers) < most and not stopping.is_set():
            workers.append(fork.Process(target=lambda: asyncio.run(serve(config, listener, up))))
            workers[-1].start()
        for worker in workers if stopping.is_set() else ():
            worker.terminate()  # again and again, since a new one may not yet listen to signals
        time.sleep(0.2)
    if failed:
        raise SystemExit(1)


def main() -> None:
    """Does what the command line asks for: with nothing but settings it runs the server."""
    os.umask(0o077)  # the database is for nobody else to read
    words = sys.argv[1:]
    command = words[0] if words[:1] in (["backup"], ["set-password"]) and words[1:] else ""
    if words in (["-h"], ["--help"]):
        print("python chatserver.py [backup FILE | set-password NAME] [--SETTING VALUE ...]")
        return
    config = load_config(words[2:] if command else words)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(ImportError, ValueError):  # a descriptor a socket; not on Windows
        resource = importlib.import_module("resource")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # it logs a traceback for bad requests
    if command == "backup":
        backup(config, words[1])
    elif command:
        asyncio.run(reset_password(config, words[1]))
    else:
        both = config.host == "" and sockets.has_dualstack_ipv6()
        family = sockets.AF_INET6 if both or ":" in config.host else sockets.AF_INET
        address = config.host, config.port
        try:
            listener = sockets.create_server(address, family=family, dualstack_ipv6=both)
        except OSError as error:
            place = f"{config.host}:{config.port}"
            raise SystemExit(f"chatserver: host and port: {place}: {error.strerror}") from None
        with listener:
            if config.workers > 1:
                supervise(config, listener)
            else:
                asyncio.run(serve(config, listener, threading.Event()))


if __name__ == "__main__":
    main()
