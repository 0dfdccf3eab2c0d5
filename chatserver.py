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
seq up to which somebody has seen it; a *note* is what one process tells the others, and may be
lost.
"""

from __future__ import annotations

import asyncio
import base64
import configparser
import contextlib
import getpass
import hashlib
import hmac
import importlib
import inspect
import ipaddress
import itertools
import json
import logging
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
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import parse_qsl, quote, unquote

import jwt
from aiohttp import WSMsgType, web

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
LOGGER = logging.getLogger("chatserver")
UNLIMITED = 2**53  # up to here every JSON client keeps whole numbers exactly

# ----------------------------------------------------------------------------------------- settings
# The fields of Config are the one table of settings. It is read once and passed down; only this
# section knows where a value came from.

RULES: dict[str, range | str] = {
    "access_token_expire_minutes": range(1, 10**8),
    "algorithm": "HS256|HS384|HS512",
    "database_url": r"sqlite(\+\w+)?:///.+|postgres(ql)?(\+\w+)?://.+",
    "metrics": "off|on",
    "port": range(65536),
    "registration": "open|closed",
    "secret_key": r"(.{32,})?",
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

    def __post_init__(self) -> None:
        """Refuses a bad value with a ValueError that begins with the setting's name."""
        for name, value in vars(self).items():
            rule = RULES.get(name, range(2**31) if isinstance(value, int) else ".*")
            fits = type(value) is type(getattr(Config, name))
            if fits and isinstance(rule, range):
                fits, rule = value in rule, f"from {rule[0]} to {rule[-1]}"
            elif fits and isinstance(value, str):
                fits = bool(re.fullmatch(str(rule), value, re.DOTALL))
            if not fits:
                shown = "what was given" if name in ("secret_key", "database_url") else repr(value)
                raise ValueError(f"{name}: {shown} is not {rule}")
        if "pgbouncer=true" in self.database_url:
            raise ValueError("database_url: LISTEN needs the direct address, not pgbouncer's")
        postgres = self.database_url.startswith("postgres")
        if postgres and not self.secret_key:
            raise ValueError("secret_key: is required with Postgres, the same for all processes")
        if self.workers > 1 and not postgres:
            raise ValueError("workers: SQLite belongs to one process, more than one needs Postgres")
        for text in self.trusted_proxies:
            try:
                ipaddress.ip_network(text, strict=False)
            except ValueError as error:
                raise ValueError(f"trusted_proxies: {error}") from None


ENV_LINE = re.compile(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|((?:(?!\s\#).)*))""")


def read_settings(arguments: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yields all that is set anywhere as (place, name, text), the weakest place first."""
    ini = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" #", " ;"))
    try:
        ini.read("config.ini", "utf-8")
    except (configparser.Error, UnicodeError) as error:
        raise ValueError(f"config.ini: {error}") from None
    if strays := {*ini.sections(), *ini.defaults()} - {"chatserver"}:
        raise ValueError(f"config.ini: {min(strays)}: all settings belong to [chatserver]")
    for section in ini.sections():
        yield from (("config.ini", name, text) for name, text in ini[section].items())
    lines = Path(".env").read_text("utf-8").splitlines() if Path(".env").is_file() else []
    for found in filter(None, map(ENV_LINE.match, lines)):
        yield ".env", found[1].lower(), found[2] or found[3] or (found[4] or "").strip()
    yield from (("environment", name.lower(), text) for name, text in os.environ.items())
    options = iter(arguments)
    for option in options:
        name, equals, text = option.removeprefix("--").partition("=")
        if not equals and (text := next(options, "")) == "":
            raise ValueError(f"command line: {option}: needs a value")
        yield "command line", name.replace("-", "_"), text


def load_config(arguments: Iterable[str] = ()) -> Config:
    """Reads every source; a bad setting ends the program with a line that names its place."""
    places: dict[str, str] = {}
    values: dict[str, Any] = {}
    try:
        for place, name, text in read_settings(arguments):
            default = getattr(Config, name, None) if name in Config.__dataclass_fields__ else None
            if default is None and place in ("config.ini", "command line"):
                raise ValueError(f"{place}: {name}: there is no such setting")
            if default is None or not text:
                continue
            places[name] = place
            if isinstance(default, tuple):
                values[name] = tuple(part.strip() for part in text.split(",") if part.strip())
            elif isinstance(default, int) and not re.fullmatch("-?[0-9]{1,12}", text):
                raise ValueError(f"{name}: {text!r} is not a whole number")
            else:
                values[name] = type(default)(text)
        if places.get("port") == "environment" and "host" not in places:
            values["host"] = ""  # hosting services that give PORT want every address
        return Config(**values)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        place = places.get(reason.partition(":")[0], "")
        raise SystemExit(f"chatserver: {place}{': ' if place else ''}{reason}") from None


# ------------------------------------------------------------------------------------------- errors
# Whatever is refused, anywhere, is a ChatError: an HTTP status, a code for programs, a sentence
# for people. A WebSocket that must close for it closes with 4000 + status, or 1013 where a retry
# helps.

CODES = {410: "reset", 413: "too_large", 429: "rate_limited", 500: "internal", 503: "unavailable"}


class ChatError(Exception):
    """A refusal; `more` joins its JSON. Not `settled`: it may have happened all the same."""

    def __init__(self, status: int, detail: str, code: str = "", **more: Any) -> None:
        super().__init__(detail)
        phrase = HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.status, self.settled = status, more.pop("settled", True)
        self.body = {"error": code or CODES.get(status, phrase), "detail": detail, **more}
        self.close_code = 1013 if status == 503 else 4000 + status


MISTAKE = ChatError(500, "the server made a mistake, which is logged")

# --------------------------------------------------------------------------------------- validation
# What may come in, by the name of its field, wherever it stands: in a path, a query, JSON or a
# frame.

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
TEXT = r"[^\0\ud800-\udfff]"  # no NUL and no half of a surrogate pair: what every engine can hold
FIELDS: dict[str, range | tuple[str, str]] = {  # a number's range, or a text's pattern and meaning
    "account": (f"{TEXT}{{1,320}}", "a username or an e-mail address"),
    "client_id": ("[ -~]{1,64}", "1 to 64 printable ASCII characters"),
    "email": (r"[^\s@\0\ud800-\udfff]{1,64}@[^\s@\0\ud800-\udfff]{1,189}", "an e-mail address"),
    "kind": ("public|private|direct", "public, private or direct"),
    "limit": range(1, UNLIMITED + 1),
    "message": (rf"(?=.*\S){TEXT}+", "text, not blank, without NUL"),
    "name": (rf"(?=.*\S){TEXT}{{1,100}}", "1 to 100 characters, not blank"),
    "new_password": (f"{TEXT}+", "text without NUL"),
    "password": (f"{TEXT}+", "text without NUL"),
    "q": (rf"(?=.*\S){TEXT}{{1,200}}", "1 to 200 characters, not blank"),
    "role": ("member|moderator|owner|banned", "member, moderator, owner or banned"),
    "room_id": ("[a-z0-9][a-z0-9_-]{0,63}", "1 to 64 of a-z 0-9 _ -, a letter or digit first"),
    "username": ("[a-z0-9][a-z0-9_.-]{1,31}", "2 to 32 of a-z 0-9 _ . -, a letter or digit first"),
}
ANYTHING = (f"{TEXT}*", "text without NUL")
REQUIRED = inspect.Parameter.empty


def check(
    data: Mapping[str, Any], name: str, default: Any = REQUIRED, *, spelled: bool = False
) -> Any:
    """Returns a field, or its default, or refuses; a query spells its numbers."""
    value, rule = data.get(name), FIELDS.get(name, range(UNLIMITED + 1))
    if default is not REQUIRED and (name not in data or value is default is None):
        return default
    if isinstance(rule, range) and not isinstance(default, str):
        if spelled and isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value):
            value = int(value)
        if type(value) is int and value in rule:
            return value
        raise ChatError(400, f"{name}: should be a whole number from {rule[0]} to {rule[-1]}")
    pattern, meaning = rule if isinstance(rule, tuple) else ANYTHING
    if isinstance(value, str):
        if value.isascii() and name in ("username", "email", "prefix"):
            value = value.lower()
        if re.fullmatch(pattern, value, re.DOTALL):
            return value
    raise ChatError(400, f"{name}: should be {meaning}")


def check_password(data: Mapping[str, Any], name: str, shortest: int = 1) -> bytes:
    """Returns a password's bytes as given; no NUL, since HMAC pads with it (RFC 2104 2)."""
    password = str(check(data, name)).encode()
    if not shortest <= len(password) <= 1024:
        raise ChatError(400, f"{name}: should have {shortest} to 1024 bytes")
    return password


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses an object that has a key twice, since nobody knows which one was meant."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def refuse_constant(name: str) -> NoReturn:
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


def hash_password(password: bytes, parameters: str = SCRYPT, salt: bytes = b"") -> str:
    """Returns scrypt (RFC 7914) with its parameters and salt; takes about 0.2 s of one core."""
    salt, (n, r, p) = salt or secrets.token_bytes(16), map(int, parameters.split("$")[1:])
    digest = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=2**28)
    return f"{parameters}${salt.hex()}${digest.hex()}"


def verify_password(password: bytes, stored: str) -> bool:
    """Tells in constant time whether a hash is of this password."""
    parameters, salt, _ = stored.rsplit("$", 2)
    return hmac.compare_digest(hash_password(password, parameters, bytes.fromhex(salt)), stored)


class Limiter:
    """Leaky buckets, one a key: `burst` at once, then `rate` a second; 0 for either: no limit."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.empty_at: dict[str, float] = {}

    def take(self, key: str, count: int = 1) -> None:
        """Puts `count` in if there is room for one more, or refuses and says when there will be."""
        if self.rate and self.burst:
            now = time.monotonic()
            empty_at = max(self.empty_at.get(key, 0), now)
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
# thread, in one hop, never cancelled half-way; asyncpg drives it with awaits. An operation
# refuses before it writes, so that its refusal undoes nothing for others in its transaction. All
# in which the engines differ is here; what a room or a user is, is not.

Row = Mapping[str, Any]
Operation = Generator[tuple[str, Sequence[Sequence[Any]]], list[Any], T]
Hear = Callable[[str, list[Any]], None]
NUMBERS = tuple(map(str, range(1, 20)))


def unavailable(reason: BaseException, *, settled: bool = True) -> ChatError:
    """Logs why the database cannot answer, and returns the refusal."""
    LOGGER.error("database: %s: %s", type(reason).__name__, str(reason).partition("\n")[0])
    detail = "the database cannot be reached, try again soon"
    return ChatError(503, detail, settled=settled, retry_after=2)


class SQLite:
    """A file that belongs to one process: one thread writes, three read, each on its connection."""

    name, row_lock, shared = "sqlite", "", False
    warnings: tuple[str, ...] = ()

    def __init__(self, url: str) -> None:
        self.path = os.path.realpath(unquote(url.partition("?")[0].partition(":///")[2]))
        self.local, self.opened = threading.local(), list[sqlite3.Connection]()
        durable = ("BEGIN IMMEDIATE", "synchronous=FULL", "secure_delete=ON")
        self.writing = ThreadPoolExecutor(1, "write", self.connect, durable)
        self.reading = ThreadPoolExecutor(3, "read", self.connect, ("BEGIN", "query_only=ON"))

    def connect(self, begin: str, *pragmas: str, suffix: str = "") -> sqlite3.Connection:
        """Opens a connection for this thread, whose transactions begin like this."""
        path, self.local.begin = self.path + suffix, begin
        connection = sqlite3.connect(path, 0, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        self.opened.append(connection)
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        self.local.connection = connection
        return connection

    async def open(self, schema: str) -> None:
        """Takes the file for this process alone and makes its tables, or ends the program."""
        try:
            self.connect("", suffix="-lock").execute("BEGIN EXCLUSIVE")
            self.connect("", "journal_mode=WAL", "synchronous=FULL").executescript(schema)
            self.inode = os.stat(self.path).st_ino
        except (sqlite3.Error, OSError) as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise SystemExit(f"chatserver: database_url: {self.path}: {reason}") from None

    async def close(self) -> None:
        """Lets what runs end, then frees the file."""
        self.writing.shutdown()
        self.reading.shutdown()
        for connection in reversed(self.opened):
            connection.close()

    def transact(self, operation: Operation[T]) -> T:
        """Runs an operation and commits; binds $1 by name, as 3.11 misbinds by position."""
        connection, rows = self.local.connection, None
        if os.stat(self.path).st_ino != self.inode:
            raise sqlite3.OperationalError("the file was replaced under the running server")
        connection.execute(self.local.begin)
        try:
            while True:
                sql, many = operation.send(rows)  # type: ignore[arg-type]  # it starts with None
                bound = (dict(zip(NUMBERS, values, strict=False)) for values in many)
                rows = [row for values in bound for row in connection.execute(sql, values)]
        except StopIteration as stop:
            connection.execute("COMMIT")
            return stop.value  # type: ignore[no-any-return]
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    async def run(self, threads: ThreadPoolExecutor, function: Callable[..., T], *values: Any) -> T:
        """Runs a function on a thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, function, *values)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(error) from error

    async def read(self, operation: Callable[..., Operation[T]], *values: Any) -> T:
        """Returns what an operation finds in one snapshot."""
        return await self.run(self.reading, self.transact, operation(*values))

    async def write(self, operation: Callable[..., Operation[T]], *values: Any) -> T:
        """Returns what an operation returned, once its transaction is on disk."""
        return await self.run(self.writing, self.transact, operation(*values))

    async def tidy(self) -> None:
        """Empties the write-ahead log, where erased text would linger."""
        checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)"
        await self.run(self.writing, lambda: self.local.connection.execute(checkpoint).fetchall())

    async def tell(self, notes: Sequence[Any]) -> None:
        """Has nobody to tell: all who use the file are in this process."""

    async def listen(self, hear: Hear) -> None:
        """Has nobody to listen to."""


class Postgres:
    """A database that processes share; in each, one connection writes, one carries notes."""

    name, row_lock, shared = "postgres", " FOR UPDATE", True
    allowed = ("host", "port", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey")
    timeouts = (("lock_timeout", "3s"), ("statement_timeout", "10s"))
    frozen = (
        "idle_in_transaction_session_timeout",
        "800ms",
    )  # so that no frozen process blocks rooms

    def __init__(self, url: str) -> None:
        """Rewrites the URL for asyncpg, which takes every parameter unknown to it as a setting."""
        account, at, rest = url.partition("://")[2].rpartition("@")
        place, _, query = rest.partition("?")
        account = ":".join(quote(unquote(part), "") for part in account.split(":", 1))
        kept = "&".join(one for one in query.split("&") if one.partition("=")[0] in self.allowed)
        self.asyncpg = importlib.import_module("asyncpg")
        self.options = {"dsn": f"postgresql://{account}{at}{place}?{kept}", "timeout": 5}
        self.options |= {
            "command_timeout": 15,
            "server_settings": dict([*self.timeouts, self.frozen]),
        }
        errors = (self.asyncpg.PostgresError, self.asyncpg.InterfaceError)
        self.failures = (*errors, self.asyncpg.InternalClientError, OSError, TimeoutError)
        self.warnings, self.process, self.heard = tuple[str, ...](), secrets.token_hex(4), 0.0
        self.pool: Any = None
        self.writer: Any = None
        self.listener: Any = None

    async def open(self, schema: str) -> None:
        """Makes the tables, one process at a time; finds settings that lose what was acked."""
        schema = schema.replace("TEXT", 'TEXT COLLATE "C"').replace(" WITHOUT ROWID", "")
        try:
            self.pool = await self.asyncpg.create_pool(
                min_size=0, max_size=4, reset=self.keep, **self.options
            )
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock(7304241)")
                await connection.execute(schema)
                for name in ("fsync", "synchronous_commit", "full_page_writes"):
                    if await connection.fetchval("SELECT current_setting($1)", name) == "off":
                        self.warnings += (f"{name} is off in Postgres: messages can be lost",)
        except (*self.failures, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SystemExit(f"chatserver: database_url: {reason}") from None

    async def close(self) -> None:
        """Drops every connection."""
        for connection in filter(None, (self.writer, self.listener, self.pool)):
            connection.terminate()

    async def keep(self, connection: Any) -> None:
        """Hands a connection back as it is: whoever reads leaves nothing behind."""

    async def drive(self, connection: Any, operation: Operation[T]) -> T:
        """Runs an operation to its end, each of its steps in one round trip."""
        rows: Any = None
        try:
            while True:
                sql, many = operation.send(rows)
                if len(many) == 1:
                    rows = await connection.fetch(sql, *many[0])
                else:
                    rows = await connection.fetchmany(sql, many) if many else []
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def read(self, operation: Callable[..., Operation[T]], *values: Any) -> T:
        """Returns what an operation finds; tries twice, as a connection may have died unnoticed."""
        for last in (False, True):
            try:
                async with self.pool.acquire(timeout=5) as connection:
                    return await self.drive(connection, operation(*values))
            except self.failures as error:
                if last:
                    raise unavailable(error) from error
        raise AssertionError

    async def write(self, operation: Callable[..., Operation[T]], *values: Any) -> T:
        """Returns what an operation returned, once committed; a failed COMMIT may have happened."""
        settled = True
        try:
            self.writer = self.writer or await self.asyncpg.connect(**self.options)
            await self.writer.execute("BEGIN")
            result = await self.drive(self.writer, operation(*values))
            settled = False
            await self.writer.execute("COMMIT")
        except BaseException as error:
            if self.writer:
                self.writer.terminate()  # and with it all that the transaction had begun
            self.writer = None
            if isinstance(error, self.failures):
                raise unavailable(error, settled=settled) from error
            raise
        return result

    async def tidy(self) -> None:
        """Leaves that to autovacuum."""

    async def tell(self, notes: Sequence[Any]) -> None:
        """Tells all processes, this one too; who misses it finds out when it looks for itself."""
        with contextlib.suppress(*self.failures, AttributeError):  # no listener: it is connecting
            for start in range(0, len(notes), 12):  # a NOTIFY holds less than 8000 bytes
                payload = encode([self.process, notes[start : start + 12]])
                notify = "SELECT pg_notify('chatserver', $1)"
                await self.listener.execute(notify, payload, timeout=2)

    async def listen(self, hear: Hear) -> None:
        """Calls hear(process, notes); hear("", []) whenever something may have been missed."""

        def receive(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
            self.heard = time.monotonic()
            process, notes = json.loads(payload)
            if process != self.process:
                hear(process, notes)

        while True:
            with contextlib.suppress(*self.failures):
                self.heard = time.monotonic()
                self.listener = await self.asyncpg.connect(**self.options)
                await self.listener.add_listener("chatserver", receive)
                hear("", [])
                while not self.listener.is_closed() and time.monotonic() - self.heard < 6:
                    await asyncio.sleep(0.2)
            if self.listener:
                self.listener.terminate()
            await asyncio.sleep(0.3)


# --------------------------------------------------------------------------------------- statements
# All SQL, the same for both engines.

EVENT = """SELECT e.room_id, e.seq, e.kind, e.username, e.target, e.member, e.role, e.name,
    coalesce(e.message, t.message) AS message, e.created_at, e.edited_at, e.client_id
    FROM events e LEFT JOIN events t ON t.room_id = e.room_id AND t.seq = e.target"""
ROOM = """SELECT r.room_id, r.name, r.kind, r.seq, r.floor, m.role,
    coalesce(m.read_seq, 0) AS read_seq,
    (SELECT count(*) FROM (SELECT 1 AS one FROM events e WHERE m.role IS NOT NULL
    AND e.room_id = r.room_id AND e.seq > m.read_seq AND e.message IS NOT NULL AND e.username <> $1
    LIMIT 1001) AS newer) AS unread FROM rooms r
    LEFT JOIN members m ON m.room_id = r.room_id AND m.username = $1 WHERE r.kind <> 'deleted'"""
READABLE = """coalesce(m.role, CASE r.kind WHEN 'public' THEN 'visitor' ELSE 'banned' END)
    <> 'banned'"""
GET_EPOCH = "SELECT value FROM meta WHERE name = 'epoch'"
ADD_EPOCH = "INSERT INTO meta (name, value) VALUES ('epoch', $1) ON CONFLICT DO NOTHING"
SET_EPOCH = "UPDATE meta SET value = $1 WHERE name = 'epoch'"
ADD_USER = """INSERT INTO users (username, email, password, version, created_at)
    VALUES ($1, $2, $3, 0, $4) ON CONFLICT DO NOTHING RETURNING username"""
GET_USER = """SELECT username, email, password, version, created_at FROM users
    WHERE (username = $1 OR email = $1) AND password IS NOT NULL"""
LIST_USERS = """SELECT username, created_at FROM users WHERE password IS NOT NULL AND username > $1
    AND substr(username, 1, length($2)) = $2 ORDER BY username LIMIT $3"""
COUNT_USERS = "SELECT count(*) AS users FROM users"
SET_USER = """UPDATE users SET password = $2, email = $3, version = version + $4
    WHERE username = $1 RETURNING version"""
LIST_ROOMS = f"{ROOM} AND {READABLE} ORDER BY r.room_id"
GET_ROOM = f"{ROOM} AND r.room_id = $2"
LOCK_ROOM = """SELECT room_id, name, kind, seq, floor FROM rooms
    WHERE room_id = $1 AND kind <> 'deleted'"""
ADD_ROOM = """INSERT INTO rooms (room_id, name, kind, seq, floor, created_by, created_at)
    VALUES ($1, $2, $3, 0, 0, $4, $5) ON CONFLICT DO NOTHING RETURNING room_id"""
COUNT_ROOMS = """SELECT count(*) AS rooms FROM rooms
    WHERE created_by = $1 AND kind IN ('public', 'private')"""
SET_ROOM = "UPDATE rooms SET name = $2, kind = $3 WHERE room_id = $1"
SET_SEQ = "UPDATE rooms SET seq = $2 WHERE room_id = $1"
GET_HEAD = "SELECT room_id, seq, kind FROM rooms WHERE room_id = $1"
LIST_MEMBERS = "SELECT username, role FROM members WHERE room_id = $1 ORDER BY username"
GET_ROLE = "SELECT room_id, username, role FROM members WHERE room_id = $1 AND username = $2"
GET_HEIR = """SELECT username, role FROM members
    WHERE room_id = $1 AND username <> $2 AND role <> 'banned'
    ORDER BY CASE role WHEN 'owner' THEN 0 WHEN 'moderator' THEN 1 ELSE 2 END, since, username"""
LIST_ROLES = "SELECT room_id, role FROM members WHERE username = $1"
SET_ROLE = """INSERT INTO members (room_id, username, role, read_seq, since)
    VALUES ($1, $2, $3, $4, $4)
    ON CONFLICT (room_id, username) DO UPDATE SET role = excluded.role"""
DROP_MEMBER = "DELETE FROM members WHERE room_id = $1 AND username = $2"
SET_READ = """UPDATE members SET read_seq = $3
    WHERE room_id = $1 AND username = $2 AND read_seq < $3"""
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
LIST_EXPIRED = """SELECT r.room_id, r.kind, r.seq, r.floor, (SELECT min(e.seq) FROM events e
    WHERE e.room_id = r.room_id AND e.seq > r.floor AND e.created_at >= $1) AS young
    FROM rooms r WHERE r.floor < r.seq"""
SET_FLOOR = "UPDATE rooms SET floor = $2 WHERE room_id = $1 AND floor < $2"
EXPIRE = """DELETE FROM events
    WHERE room_id = $1 AND seq <= $2 AND (client_id IS NULL OR $3 = 'deleted')"""
BLANK = """UPDATE events SET message = NULL, folded = NULL
    WHERE room_id = $1 AND seq <= $2 AND message IS NOT NULL"""


def each(sql: str, many: Sequence[Sequence[Any]]) -> Operation[list[Any]]:
    """Is the operation of one statement for many rows of parameters."""
    return (yield sql, many)


def first(sql: str, *values: Any) -> Operation[Any]:
    """Is the operation that returns one statement's first row, or None."""
    return next(iter((yield sql, [values])), None)


# --------------------------------------------------------------------------------------- operations
# What users can do and see. Each is named like its route, takes who asks and the fields that it
# needs, by the names that they have in JSON, and returns what is answered. It refuses, or adds
# events to the log. It knows neither transport.

RANKS = {"banned": -1, "visitor": 0, "member": 1, "moderator": 2, "owner": 3}
# In the order of ADD_EVENT; what an event does not have is None.
COLUMNS = ("room_id", "seq", "kind", "username", "created_at", "target", "member", "role", "name")
BLANK_EVENT = dict.fromkeys((*COLUMNS, "message", "folded", "client_id", "edited_at"))


@lru_cache(256)
def iso_time(milliseconds: int) -> str:
    """Returns a stored time as ISO 8601 in UTC."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe(row: Row) -> dict[str, Any]:
    """Returns an event as clients see it, from the log or from what is being added to it."""
    kind, text = row["kind"], row["message"]
    event = {"type": kind, "room_id": row["room_id"], "seq": row["seq"]}
    event["username"] = row["username"]
    if kind in ("edit", "delete"):
        event["target"] = row["target"]
    if kind in ("message", "edit"):
        event["deleted" if text is None else "message"] = True if text is None else text
    elif kind == "member":
        event["member"], event["role"] = row["member"], row["role"]
    elif kind == "room":
        event["name"] = row["name"]
    event["created_at"] = iso_time(row["created_at"])
    if row["edited_at"]:
        event["edited_at"] = iso_time(row["edited_at"])
    if row["client_id"]:
        event["client_id"] = row["client_id"]
    return event


def show_user(row: Row) -> dict[str, Any]:
    """Returns a user as others see them; who is online only the hub knows."""
    created_at = iso_time(row["created_at"])
    return {"username": row["username"], "created_at": created_at, "online": False}


def admit(room: Row, role: str | None, least: str = "visitor") -> int:
    """Returns the rank of a role; strangers are visitors of a public room. Refuses a lower one."""
    rank = RANKS[role or ("visitor" if room["kind"] == "public" else "banned")]
    if rank < RANKS[least]:
        raise ChatError(403, f"this room asks for a {least} or above, which you are not")
    return rank


class Post(NamedTuple):
    """A message on its way into the log."""

    me: str
    room_id: str
    message: str
    client_id: str | None = None


class Transaction:
    """What one transaction sees and adds: locked rooms, events, and notes for whom they concern."""

    def __init__(self, config: Config, row_lock: str = "") -> None:
        self.config, self.row_lock, self.now = config, row_lock, int(time.time() * 1000)
        self.rooms: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.notes: list[tuple[str, str, Any]] = []

    def add(self, room_id: str, kind: str, me: str, **fields: Any) -> dict[str, Any]:
        """Adds an event under the room's next number."""
        room, event = self.rooms[room_id], BLANK_EVENT | fields
        room["seq"] += 1
        event |= {"room_id": room_id, "seq": room["seq"], "kind": kind, "username": me}
        event["created_at"] = self.now
        self.events.append(event)
        return event

    def room(self, room_id: str) -> dict[str, Any]:
        """Returns a locked room."""
        if room_id not in self.rooms:
            raise ChatError(404, "there is no such room")
        return self.rooms[room_id]

    def enter(self, me: str, room_id: str, least: str = "visitor") -> Operation[int]:
        """Returns the caller's rank in a locked room."""
        found = yield from first(GET_ROLE, room_id, me)
        return admit(self.room(room_id), found and found["role"], least)

    def set_role(self, me: str, room_id: str, member: str, role: str | None) -> Operation[None]:
        """Makes a membership what it shall be."""
        seq = self.add(room_id, "member", me, member=member, role=role)["seq"]
        if role:
            yield SET_ROLE, [(room_id, member, role, seq)]
        else:
            yield DROP_MEMBER, [(room_id, member)]

    def post_message(
        self, me: str, room_id: str, message: str, client_id: str | None = None
    ) -> Operation[Any]:
        """Posts one message; 201 and the event or, if it is a retry, 200 and the first event."""
        outcome = (yield from self.post_messages([Post(me, room_id, message, client_id)]))[0]
        if isinstance(outcome, ChatError):
            raise outcome
        return outcome

    def post_messages(self, posts: Sequence[Post]) -> Operation[list[Any]]:
        """Posts all that may be posted, in three statements; returns what came of each."""
        found = yield GET_ROLE, list({(post.room_id, post.me) for post in posts})
        roles = {(row["room_id"], row["username"]): row["role"] for row in found}
        named = [(post.room_id, post.me, post.client_id) for post in posts if post.client_id]
        found = yield FIND_MESSAGE, named
        sent = {(row["room_id"], row["username"], row["client_id"]): row for row in found}
        outcomes: list[Any] = []
        for me, room_id, text, client_id in posts:
            old = sent.get((room_id, me, client_id))
            try:
                rank = admit(self.room(room_id), roles.get((room_id, me)))
                if old and not old["edited_at"] and old["message"] not in (None, text):
                    raise ChatError(409, "this client_id was sent before with another text")
            except ChatError as error:
                outcomes.append(error)
                continue
            if not old and rank == RANKS["visitor"]:
                yield from self.set_role(me, room_id, me, "member")
                roles[room_id, me] = "member"
            fields = {"message": text, "folded": text.casefold(), "client_id": client_id}
            event = old or self.add(room_id, "message", me, **fields)
            if client_id:
                sent[room_id, me, client_id] = event
            outcomes.append((200 if old else 201, describe(event)))
        return outcomes

    def edit_message(self, me: str, room_id: str, seq: int, message: str) -> Operation[Any]:
        """Replaces the text of one's own message."""
        return (yield from self.change_message(me, room_id, seq, message))

    def delete_message(self, me: str, room_id: str, seq: int) -> Operation[None]:
        """Erases the text of a message, one's own or as a moderator."""
        yield from self.change_message(me, room_id, seq, None)

    def change_message(self, me: str, room_id: str, seq: int, text: str | None) -> Operation[Any]:
        """Keeps a text in one place only, the message's own row, so that erased is erased."""
        rank = yield from self.enter(me, room_id)
        old = yield from first(GET_MESSAGE, room_id, seq)
        if not old or old["message"] is None or seq <= self.rooms[room_id]["floor"]:
            raise ChatError(404, "there is no such message, or it was deleted")
        if old["username"] != me and (text is not None or rank < RANKS["moderator"]):
            raise ChatError(403, "only its author may do that; a moderator may delete it")
        edited_at = None if text is None else self.now
        yield SET_MESSAGE, [(room_id, seq, text, text and text.casefold(), edited_at)]
        self.add(room_id, "edit" if text else "delete", me, target=seq, message=text)
        return describe({**old, "message": text, "edited_at": edited_at})

    def put_member(
        self, me: str, room_id: str, username: str, role: str = "member"
    ) -> Operation[Any]:
        """Joins, invites, promotes, steps down or bans."""
        yield from self.change_member(me, room_id, username, role)
        return {"username": username, "role": role, "online": False}

    def delete_member(self, me: str, room_id: str, username: str) -> Operation[None]:
        """Leaves, removes or lifts a ban."""
        yield from self.change_member(me, room_id, username, None)

    def change_member(
        self, me: str, room_id: str, member: str, role: str | None
    ) -> Operation[None]:
        """Sets a role as far as the caller's own goes; a room that had an owner keeps one."""
        mine = yield from self.enter(me, room_id)
        found = yield from first(GET_ROLE, room_id, member)
        theirs, rank = found and found["role"], RANKS[role or "visitor"]
        if self.rooms[room_id]["kind"] == "direct":
            raise ChatError(403, "a direct room always has the same two members")
        if not (theirs or role) or not (yield from first(GET_USER, member)):
            raise ChatError(404, "there is no such user here")
        if theirs == "owner" != role and mine == RANKS["owner"]:
            heir = yield from first(GET_HEIR, room_id, member)
            if not heir or heir["role"] != "owner":
                raise ChatError(409, "the last owner has to make somebody else owner first")
        own = 0 <= rank <= max(mine, RANKS["member"])
        above = mine == RANKS["owner"] or mine > max(rank, RANKS[theirs or "visitor"], 1)
        if not (own if me == member else above):
            raise ChatError(403, "that takes a higher role in this room")
        if role != theirs:
            yield from self.set_role(me, room_id, member, role)

    def join(self, me: str, version: int, room_id: str) -> Operation[Any]:
        """Lets a socket in, a visitor as a member; returns what `hello` tells."""
        user = yield from first(GET_USER, me)
        if not user or user["version"] != version:
            raise ChatError(401, "this log-in has ended")
        if (yield from self.enter(me, room_id)) == RANKS["visitor"]:
            yield from self.set_role(me, room_id, me, "member")
        role = (yield from first(GET_ROLE, room_id, me))["role"]
        return role, self.rooms[room_id]["floor"], self.rooms[room_id]["seq"]

    def create_room(
        self,
        me: str,
        room_id: str | None = None,
        name: str | None = None,
        kind: str = "public",
        username: str | None = None,
    ) -> Operation[Any]:
        """Makes a room and its owner, or, unless they have it, the one direct room of two users."""
        if kind == "direct":
            return (yield from self.create_direct(me, username))
        if not room_id or room_id.startswith("direct-"):
            raise ChatError(400, "room_id: is required, and may not begin with direct-")
        most = self.config.rooms_per_user
        if most and (yield from first(COUNT_ROOMS, me))["rooms"] >= most:
            raise ChatError(403, f"you have created {most} rooms, which is as many as one may")
        if not (yield from first(ADD_ROOM, room_id, name or room_id, kind, me, self.now)):
            raise ChatError(409, "this room_id is, or was, another room's")
        self.rooms[room_id] = {"seq": 0, "floor": 0, "kind": kind}
        yield from self.set_role(me, room_id, me, "owner")
        return 201, (yield from self.see_room(me, room_id))

    def create_direct(self, me: str, username: str | None) -> Operation[Any]:
        """Returns 201 and a new direct room, or 200 and the one that there is."""
        if not username or username == me:
            raise ChatError(400, "username: should be another user's")
        if not (yield from first(GET_USER, username)):
            raise ChatError(404, "there is no such user")
        pair = sorted((me, username))
        room_id = f"direct-{hashlib.sha256(' '.join(pair).encode()).hexdigest()[:32]}"
        new = yield from first(ADD_ROOM, room_id, ", ".join(pair), "direct", me, self.now)
        if new:
            self.rooms[room_id] = {"seq": 0, "floor": 0, "kind": "direct"}
            for member in pair:
                yield from self.set_role(me, room_id, member, "member")
        return 201 if new else 200, (yield from self.see_room(me, room_id))

    def rename_room(self, me: str, room_id: str, name: str) -> Operation[Any]:
        """Renames a room."""
        yield from self.enter(me, room_id, "owner")
        yield SET_ROOM, [(room_id, name, self.rooms[room_id]["kind"])]
        self.add(room_id, "room", me, name=name)
        return (yield from self.see_room(me, room_id))

    def delete_room(self, me: str, room_id: str) -> Operation[None]:
        """Deletes a room; its events go by and by, its id stays taken."""
        yield from self.enter(me, room_id, "owner")
        yield SET_ROOM, [(room_id, "", "deleted")]
        self.notes.append(("gone", room_id, None))

    def mark_read(self, me: str, room_id: str, seq: int) -> Operation[None]:
        """Moves the caller's read marker forward, to the head at most."""
        yield from self.enter(me, room_id, "member")
        seq = min(seq, self.rooms[room_id]["seq"])
        yield SET_READ, [(room_id, me, seq)]
        read = {"type": "read", "room_id": room_id, "username": me, "seq": seq}
        self.notes.append(("tell", room_id, read))

    def register(self, username: str, email: str, password: str) -> Operation[Any]:
        """Adds an account; the first becomes owner of the Lobby, whose lock makes it the first."""
        accounts = (yield from first(COUNT_USERS))["users"]
        if not (yield from first(ADD_USER, username, email, password, self.now)):
            raise ChatError(409, "this name or e-mail address is taken")
        if not accounts and "1" in self.rooms:
            yield from self.set_role(username, "1", username, "owner")
        return (yield from self.get_user(username))

    def set_password(self, me: str, password: str = "", void: int = 1) -> Operation[None]:
        """Voids every token of a user; with a new password's hash, or with the old one."""
        if not (user := (yield from first(GET_USER, me))):
            raise ChatError(404, "there is no such user")
        values = (user["username"], password or user["password"], user["email"], void)
        version = (yield from first(SET_USER, *values))["version"]
        self.notes.append(("end", user["username"], version))

    def delete_user(self, me: str) -> Operation[None]:
        """Empties an account and leaves its rooms; the last owner's next in rank inherits."""
        ended = yield from first(SET_USER, me, None, None, 1)
        self.notes.append(("end", me, ended["version"]))
        for room_id, role in [(row["room_id"], row["role"]) for row in (yield LIST_ROLES, [(me,)])]:
            if room_id in self.rooms:
                heir = yield from first(GET_HEIR, room_id, me)
                yield from self.set_role(me, room_id, me, None)
                if role == "owner" and heir and heir["role"] != "owner":
                    yield from self.set_role(me, room_id, heir["username"], "owner")

    def erase(self, me: str, room_id: str, seqs: Sequence[int]) -> Operation[None]:
        """Deletes messages of an account that is about to go, in whatever rooms they are."""
        yield SET_MESSAGE, [(room_id, seq, None, None, None) for seq in seqs]
        for seq in seqs:
            self.add(room_id, "delete", me, target=seq)

    def expire(self, room_id: str, kind: str, floor: int) -> Operation[None]:
        """Raises a room's floor; below it only client_ids stay, to know a retry for ever."""
        for sql, values in ((SET_FLOOR, ()), (EXPIRE, (kind,)), (BLANK, ())):
            yield sql, [(room_id, floor, *values)]

    def list_users(
        self, me: str, after: str = "", prefix: str = "", limit: int = 50
    ) -> Operation[Any]:
        """Lists users by name."""
        return [show_user(row) for row in (yield LIST_USERS, [(after, prefix, limit)])]

    def get_user(self, me: str, username: str | None = None) -> Operation[Any]:
        """Returns a user; the e-mail address only to oneself, at /users/me."""
        if not (row := (yield from first(GET_USER, username or me))):
            raise ChatError(404, "there is no such user")
        return show_user(row) | ({} if username else {"email": row["email"]})

    def look_into(self, me: str, room_id: str) -> Operation[Any]:
        """Returns the row of a room that the caller may read."""
        if not (row := (yield from first(GET_ROOM, me, room_id))):
            raise ChatError(404, "there is no such room")
        admit(row, row["role"])
        return row

    def show_room(self, row: Row) -> dict[str, Any]:
        """Returns a room as the caller sees it."""
        seq = self.rooms.get(row["room_id"], row)["seq"]  # what this transaction adds counts
        shown = ("room_id", "name", "kind", "role", "seq", "read_seq", "unread")
        return {name: row[name] for name in shown} | {"seq": seq}

    def list_rooms(self, me: str) -> Operation[Any]:
        """Lists public rooms and the caller's own."""
        return [self.show_room(row) for row in (yield LIST_ROOMS, [(me,)])]

    def see_room(self, me: str, room_id: str) -> Operation[Any]:
        """Returns a room without its members."""
        return self.show_room((yield from self.look_into(me, room_id)))

    def get_room(self, me: str, room_id: str) -> Operation[Any]:
        """Returns a room with its members, the banned only to moderators."""
        room = yield from self.look_into(me, room_id)
        hidden = () if RANKS[room["role"] or "visitor"] >= RANKS["moderator"] else ("banned",)
        found = yield LIST_MEMBERS, [(room_id,)]
        shown = [dict(row) | {"online": False} for row in found if row["role"] not in hidden]
        return self.show_room(room) | {"members": shown}

    def list_messages(
        self,
        me: str,
        room_id: str,
        before: int | None = None,
        after: int | None = None,
        limit: int = 50,
    ) -> Operation[Any]:
        """Returns a page of history, oldest first."""
        room = yield from self.look_into(me, room_id)
        sql = OLDEST if after is not None and before is None else NEWEST
        start, end = max(after or 0, room["floor"]), room["seq"] + 1
        end = end if before is None else min(before, end)
        page = yield sql, [(room_id, start, end, limit)]
        return sorted(map(describe, page), key=lambda event: event["seq"])

    def list_events(
        self,
        me: str,
        room_id: str,
        after: int = 0,
        epoch: str = "",
        limit: int = 200,
        wait: int = 0,  # seconds; the route does the waiting
    ) -> Operation[Any]:
        """Returns the log after a cursor, as a WebSocket would."""
        room = yield from self.look_into(me, room_id)
        now = (yield from first(GET_EPOCH))["value"]
        # Not beyond the head that was read together with the caller's role: that may be past.
        page = yield LIST_EVENTS, [(room_id, after, room["seq"], limit)]
        whole = (page[-1]["seq"] if page else room["seq"]) == after + len(page)
        if not (whole and room["floor"] <= after <= room["seq"] and epoch in ("", now)):
            more = {"floor": room["floor"], "seq": room["seq"], "epoch": now}
            raise ChatError(410, "there is nothing to resume from; start afresh from seq", **more)
        return {"events": [*map(describe, page)], "seq": room["seq"], "epoch": now}

    def search(
        self,
        me: str,
        q: str,
        room_id: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> Operation[Any]:
        """Finds messages that hold a text, newest first."""
        pattern = "%" + re.sub("([!%_])", r"!\1", q.casefold()) + "%"
        if room_id:
            yield from self.look_into(me, room_id)
            values = (me, pattern, limit, room_id, UNLIMITED if before is None else before)
            return [*map(describe, (yield SEARCH_ROOM, [values]))]
        if before is not None:
            raise ChatError(400, "before: goes with room_id, whose numbers it means")
        return [*map(describe, (yield SEARCH_ALL, [(me, pattern, limit)]))]


# ---------------------------------------------------------------------------------------------- hub
# Who is connected, and how an event gets to every socket once, in order, waiting for nobody. It
# knows a room by its cursor, the last seq that this process has published; what it missed it
# reads in the log.

QUIET_ABOVE = (
    100  # users online in a room; with more, presence, typing and read markers are not told
)
WAITING = 2**20  # bytes that may wait for a slow reader
PAGE = 200  # events in one step of a replay
PING, SILENCE = 25, 40  # seconds


def to_frame(payload: bytes, opcode: int = WSMsgType.TEXT) -> bytes:
    """Returns one whole unmasked frame (RFC 6455 5.2)."""
    size, start = len(payload), bytes((0x80 | opcode,))
    if size < 126:
        return start + bytes((size,)) + payload
    wide = size >= 65536
    return start + (b"\x7f" if wide else b"\x7e") + size.to_bytes(8 if wide else 2, "big") + payload


def to_frames(items: Iterable[Mapping[str, Any]]) -> bytes:
    """Encodes items as one run of frames."""
    return b"".join([to_frame(encode(item).encode()) for item in items])


class Login(NamedTuple):
    """Whom a token names, which version of their tokens it is, and when it ends."""

    username: str
    version: int
    expires: float


class Socket:
    """One connection to a room; live once it has seen all that is published."""

    def __init__(self, transport: asyncio.Transport, room: Room, login: Login) -> None:
        # Small kernel buffers make a stalled reader show soon.
        transport.get_extra_info("socket").setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 65536)
        self.transport, self.room, self.closed, self.typed = transport, room, False, 0.0
        self.heard = self.pinged = time.monotonic()
        self.entered: int | None = None  # the head when it entered; what removed it has a later seq
        self.removed = 0
        self.loop = asyncio.get_running_loop()
        self.expiry = self.loop.call_soon(int)  # takes the place of a timer until there is one
        self.renew(login)

    def renew(self, login: Login) -> None:
        """Makes the socket live as long as this log-in and not a moment longer."""
        self.login = login
        self.expiry.cancel()
        left = login.expires - time.time()
        self.expiry = self.loop.call_later(left, self.close, 4401, "the token has expired")

    def send(self, *items: Mapping[str, Any]) -> None:
        """Writes frames, but none after the close frame."""
        if not self.closed:
            self.transport.write(to_frames(items))

    def close(self, code: int, reason: str) -> None:
        """Sends a close frame now and soon cuts the connection, whatever the peer does."""
        if not self.closed:
            self.closed = True
            self.room.live.discard(self)
            payload = code.to_bytes(2, "big") + reason.encode()[:120]
            self.transport.write(to_frame(payload, WSMsgType.CLOSE))
            if code == 1001 and self.transport.can_write_eof():
                self.transport.write_eof()  # aiohttp reads no farewell while it shuts down
            self.loop.call_later(0.5 if code == 4408 else 2, self.transport.abort)


class Room:
    """A room in which somebody is connected; cursor None: where it stands is not known yet."""

    def __init__(self, room_id: str) -> None:
        self.room_id, self.head = room_id, 0
        self.cursor: int | None = None
        self.sockets, self.live, self.announced = set[Socket](), set[Socket](), set[str]()


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
        self.stale, self.woken = set[str](), asyncio.Event()  # rooms that have missed something
        self.notes: list[Any] = []  # on their way to other processes
        self.peers: dict[str, dict[str, set[str]]] = {}  # process, room: who is online there
        self.coming: dict[str, dict[str, set[str]]] = {}  # the same, while it is being told
        self.heard: dict[str, float] = {}

    def enter(self, socket: Socket) -> None:
        """Registers a socket before it is live, so that nothing that would end it is missed."""
        socket.room.sockets.add(socket)
        self.users[socket.login.username].add(socket)

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

    def notice(self, room_id: str, head: int) -> None:
        """Takes note of how far a room's log goes."""
        if room_id in self.waiting:
            self.waiting.pop(room_id).set()
        if room := self.rooms.get(room_id):
            room.head = max(room.head, head)
            if room.cursor is not None and room.cursor < room.head:
                self.stale.add(room_id)
                self.woken.set()

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
        for socket in list(room.sockets):
            if socket.login.username == member:
                socket.removed = seq
                if socket.entered is not None and socket.entered < seq:
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
        shut(slow, 4408, "too slow: resume from the last number that you saw")

    async def follow(self) -> None:
        """Reads in the log what stale rooms have missed, and delivers it."""
        while await self.woken.wait():
            self.woken.clear()
            while self.stale:
                room = self.rooms.get(self.stale.pop())
                if room and room.cursor is not None and room.cursor < room.head:
                    try:
                        await self.catch_up(room, room.cursor)
                    except ChatError:
                        await asyncio.sleep(0.5)
                        self.notice(room.room_id, 0)

    async def catch_up(self, room: Room, cursor: int) -> None:
        """Brings a room a step nearer to its head; meanwhile others may do so as well."""
        page = await self.db.read(each, LIST_EVENTS, [(room.room_id, cursor, UNLIMITED, 1000)])
        page = [event for event in page if event["seq"] > (room.cursor or 0)]
        if page and page[0]["seq"] - 1 == room.cursor:
            self.deliver(room, page)
        elif page:
            room.cursor = page[-1]["seq"]
            shut(room.sockets, 1001, "what you missed has expired, resume")
        if page:
            self.notice(room.room_id, 0)

    async def replay(self, socket: Socket, cursor: int) -> None:
        """Sends what follows a cursor, at the reader's pace, then in the same step goes live."""
        room = socket.room
        while not socket.closed and cursor != room.cursor:
            page: list[Any] | None = None
            published = room.cursor or 0  # as it is now: it moves on while we read
            with contextlib.suppress(ChatError):
                values = (room.room_id, cursor, published, PAGE)
                page = await self.db.read(each, LIST_EVENTS, [values])
            if page is None or cursor > published:
                await asyncio.sleep(0.02)  # the database is away, or we have not published so far
                continue
            if not page or page[-1]["seq"] != cursor + len(page):
                socket.close(1001, "what you missed has expired, resume")
                return
            socket.send(*map(describe, page))
            cursor = page[-1]["seq"]
            while not socket.closed and socket.transport.get_write_buffer_size() > WAITING // 4:
                await asyncio.sleep(0.01)
        if not socket.closed:
            room.live.add(socket)

    def whisper(self, room_id: str, *items: dict[str, Any]) -> None:
        """Sends what is never stored to everybody in a small room but whom it is about."""
        if room_id in self.rooms and len(self.online(room_id)) <= QUIET_ABOVE:
            for socket in self.rooms[room_id].live:
                socket.send(*(one for one in items if one["username"] != socket.login.username))

    def online(self, room_id: str) -> set[str]:
        """Returns who is connected to a room, anywhere."""
        here = self.rooms[room_id].sockets if room_id in self.rooms else ()
        elsewhere = (peer.get(room_id, ()) for peer in self.peers.values())
        return {socket.login.username for socket in here}.union(*elsewhere)

    def online_anywhere(self) -> set[str]:
        """Returns who is connected to any room."""
        elsewhere = (names for peer in self.peers.values() for names in peer.values())
        return set(self.users).union(*elsewhere)

    def announce(self) -> None:
        """Tells who came and went since the last time, here and to other processes."""
        for room_id, room in self.rooms.items():
            online, common = self.online(room_id), {"type": "presence", "room_id": room_id}
            if len(online) <= QUIET_ABOVE and online != room.announced:
                changed, room.announced = sorted(online ^ room.announced), online
                news = ({"username": name, "online": name in online} for name in changed)
                self.whisper(room_id, *(common | one for one in news))
            if self.db.shared:
                names = sorted({socket.login.username for socket in room.sockets})
                starts = range(0, len(names), 10)
                self.notes += [("online", room_id, names[at : at + 10]) for at in starts]
        self.notes.append(("online", "", []))

    def hear(self, process: str, notes: Sequence[Any]) -> None:
        """Takes in what another process tells; after a silence ("") suspects every room."""
        self.heard[process] = time.monotonic()
        coming = self.coming.setdefault(process, {})
        for kind, name, more in notes:
            if kind == "head":
                self.notice(name, more)
            elif kind == "online" and name:
                coming.setdefault(name, set()).update(more)
            elif kind == "online":
                self.peers[process] = coming
                coming = self.coming[process] = {}
            else:
                self.obey(kind, name, more)

    def obey(self, kind: str, name: str, more: Any = None) -> None:
        """Does what a commit, here or elsewhere, has made necessary."""
        if kind == "end":
            old = [one for one in self.users.get(name, ()) if one.login.version < more]
            shut(old, 4401, "this log-in has ended")
        elif kind == "gone" and name in self.rooms:
            shut(self.rooms[name].sockets, 4404, "this room was deleted")
        elif kind == "tell":
            self.whisper(name, more)

    def sweep(self) -> None:
        """Pings, cuts off who answers nothing, and forgets processes that fell silent."""
        now = time.monotonic()
        for socket in itertools.chain.from_iterable(self.users.values()):
            if now - socket.heard > SILENCE:
                socket.transport.abort()
            elif now - socket.pinged > PING and not socket.closed:
                socket.pinged = now
                socket.transport.write(to_frame(b"", WSMsgType.PING))
        for process in [name for name, heard in self.heard.items() if now - heard > 10]:
            for known in (self.heard, self.peers, self.coming):
                known.pop(process, None)


# --------------------------------------------------------------------------------------------- chat
# What both transports share: the writer, log-ins, and the tasks that run as long as the server
# does.

BATCH, QUEUE = 250, 10_000  # commands in one transaction, and waiting for one
HASHES = 32  # passwords being hashed or waiting for it
Reply = Callable[[Any], None]


class Command(NamedTuple):
    """A change that waits for the writer: an operation, its fields, its rooms, who hears of it."""

    name: str
    fields: dict[str, Any]
    rooms: Sequence[str]
    reply: Reply


def transact(work: Transaction, commands: Sequence[Command]) -> Operation[list[Any]]:
    """Runs commands in order, neighbouring posts as one; returns their outcomes."""
    names = sorted({room_id for command in commands for room_id in command.rooms})
    locked = yield LOCK_ROOM + work.row_lock, [(name,) for name in names]
    work.rooms = {row["room_id"]: dict(row) for row in locked}
    outcomes: list[Any] = []
    for posts, group in itertools.groupby(commands, key=lambda one: one.name == "post_message"):
        if posts:
            outcomes += yield from work.post_messages([Post(**one.fields) for one in group])
            continue
        for command in group:
            try:
                outcomes.append((yield from getattr(work, command.name)(**command.fields)))
            except ChatError as error:
                outcomes.append(error)
    yield ADD_EVENT, [tuple(event.values())[:12] for event in work.events]
    yield SET_SEQ, [*{event["room_id"]: event["seq"] for event in work.events}.items()]
    return outcomes


def keep_secret(path: str) -> str:
    """Returns the key in a file that only its owner may read, made at the first call."""
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    return Path(path).read_text("utf-8").strip()


class Chat(Hub):
    """The server without its transports."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.key, self.epoch, self.stopping = config.secret_key, "", False
        self.queue, self.wake = list[Command](), asyncio.Event()
        self.news, self.telling = asyncio.Event(), asyncio.Lock()
        self.hour = asyncio.Event()  # set before an hour is over when there is something to delete
        self.connected: Counter[str] = Counter()  # sockets by address
        self.strangers: set[web.WebSocketResponse] = set()  # sockets that have not logged in
        self.hashing, self.hashes = ThreadPoolExecutor(2, "hash"), 0
        self.turns = asyncio.Semaphore(2)
        self.messages = Limiter(config.messages_per_second, config.message_burst)
        self.frames = Limiter(20, 100)  # whatever else a socket sends; who floods us is cut off
        self.logins = Limiter(config.logins_per_minute / 60, config.logins_per_minute)
        hourly = config.registrations_per_hour
        self.registrations = Limiter(hourly / 3600, hourly)

    @contextlib.asynccontextmanager
    async def running(self, _: object = None, *, listens: bool = True) -> AsyncIterator[None]:
        """Opens the database and runs the tasks; on the way out finishes what was accepted."""
        await self.db.open((HERE / "schema.sql").read_text("utf-8"))
        for warning in self.db.warnings:
            LOGGER.critical(warning)
        if isinstance(self.db, SQLite) and not self.key:
            self.key = keep_secret(self.db.path + ".secret")
        await self.db.write(first, ADD_EPOCH, secrets.token_hex(8))
        self.epoch = (await self.db.read(first, GET_EPOCH))["value"]
        forever = self.write_batches(), self.spread(), self.tick(), self.upkeep(), self.follow()
        listen = [self.db.listen(self.hear)] if listens else []
        tasks = [asyncio.create_task(task) for task in (*forever, *listen)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)  # a database that hangs answers no farewell either
            self.hashing.shutdown(cancel_futures=True)
            await self.db.close()

    def submit(self, name: str, fields: dict[str, Any], rooms: Sequence[str], reply: Reply) -> None:
        """Queues a change."""
        if len(self.queue) >= QUEUE or self.stopping:
            raise ChatError(503, "more waits than can be stored now, try again soon", retry_after=1)
        self.queue.append(Command(name, fields, rooms, reply))
        self.wake.set()

    async def change(self, name: str, rooms: Sequence[str] = (), /, **fields: Any) -> Any:
        """Returns what an operation returns, once that is durable and published."""
        future = asyncio.get_running_loop().create_future()
        self.submit(
            name, fields, rooms, lambda one: None if future.done() else future.set_result(one)
        )
        if isinstance(outcome := await future, ChatError):
            raise outcome
        return outcome

    async def look(self, name: str, /, **fields: Any) -> Any:
        """Returns what an operation finds."""
        return await self.db.read(partial(getattr(Transaction(self.config), name), **fields))

    async def write_batches(self) -> None:
        """Commits together what arrived while the last batch was committed: so durable is fast."""
        while await self.wake.wait():
            self.wake.clear()
            while batch := self.queue[:BATCH]:
                await self.commit(batch)
                del self.queue[: len(batch)]
                self.news.set()
            self.news.set()

    async def spread(self) -> None:
        """Tells other processes, beside the writer, so that neither waits for the other."""
        while await self.news.wait():
            self.news.clear()
            await self.tell()

    async def tell(self) -> None:
        """Sends the notes that have gathered to other processes."""
        async with self.telling:
            notes, self.notes = self.notes, []
            await self.db.tell(notes)

    async def commit(self, batch: Sequence[Command]) -> None:
        """Stores a batch, publishes it and answers; what fails is tried thrice, if that is safe."""
        outcomes: list[Any] = []
        for attempt in range(3):
            work, failed = Transaction(self.config, self.db.row_lock), batch
            began = time.monotonic()
            try:
                outcomes = await self.db.write(transact, work, batch)
                self.counts["commit_seconds"] += time.monotonic() - began
                await self.announce_commit(work)
                break
            except ChatError as error:
                batch = []
                for command in failed:  # a client_id makes safe what may have happened already
                    if attempt < 2 and (error.settled or command.fields.get("client_id")):
                        batch.append(command)
                    else:
                        command.reply(error)
            except Exception:
                LOGGER.exception("a change failed")
                outcomes = [MISTAKE] * len(batch)
                break
        for command, outcome in zip(batch, outcomes, strict=True):
            command.reply(outcome)

    async def announce_commit(self, work: Transaction) -> None:
        """Publishes; whom it shuts out is shut out everywhere before anybody is answered."""
        for note in work.notes:
            self.obey(*note)
        self.publish(work.events)
        self.counts["batches"] += 1
        self.counts["batch_messages"] += len(work.events)
        self.counts["messages"] += sum(event["kind"] == "message" for event in work.events)
        self.notes += work.notes
        if any(note[0] == "end" for note in work.notes):
            await self.tell()
        if any(note[0] == "gone" for note in work.notes):
            self.hour.set()

    async def tick(self) -> None:
        """Does what need not be done at once."""
        for count in itertools.count():
            await asyncio.sleep(0.5)
            self.announce()
            self.wake.set()
            if count % 4 == 0:
                self.sweep()
                for limiter in (self.messages, self.frames, self.logins, self.registrations):
                    limiter.forget()
                with contextlib.suppress(ChatError):
                    await self.poll()

    async def poll(self) -> None:
        """Looks into a shared database itself, in case a note was lost."""
        if self.db.shared:
            for row in await self.db.read(each, GET_HEAD, [(name,) for name in self.rooms]):
                self.notice(row["room_id"], row["seq"])
                self.obey("gone" if row["kind"] == "deleted" else "", row["room_id"])
            for row in await self.db.read(each, GET_USER, [(name,) for name in self.users]):
                self.obey("end", row["username"], row["version"])

    async def upkeep(self) -> None:
        """Deletes what has expired, at start and hourly, a little at a time."""
        while True:
            days = self.config.retention_days
            cutoff = int((time.time() - days * 86400) * 1000) if days else 0
            with contextlib.suppress(ChatError):
                for row in await self.db.read(each, LIST_EXPIRED, [(cutoff,)]):
                    fields = {"room_id": row["room_id"], "kind": row["kind"]}
                    young = row["young"] if row["kind"] != "deleted" else None
                    goal = row["seq"] if young is None else young - 1
                    for floor in range(row["floor"], goal, 500):
                        fields["floor"] = min(floor + 500, goal)
                        await self.change("expire", [row["room_id"]], **fields)
                await self.db.tidy()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.hour.wait(), 3600)
            self.hour.clear()

    async def hash(self, function: Callable[..., T], *values: Any, address: str | None = None) -> T:
        """Runs a password function on one of two threads; refuses when too many wait already."""
        if self.hashes >= HASHES:
            raise ChatError(503, "too many log-ins at once, try again soon", retry_after=2)
        self.hashes += 1
        try:
            async with self.turns:
                if address is not None:  # others from there may have failed meanwhile
                    self.logins.take(address, 0)
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.hashing, function, *values)
        finally:
            self.hashes -= 1

    async def verify(self, account: str, password: bytes, address: str, refusal: ChatError) -> Row:
        """Returns who has this name or e-mail and password; failures count for the address."""
        self.logins.take(address, 0)
        user = await self.db.read(first, GET_USER, account)
        stored = user["password"] if user else NOBODY
        if not await self.hash(verify_password, password, stored, address=address):
            self.logins.take(address)
            raise refusal
        if not stored.startswith(f"{SCRYPT}$"):
            hashed = await self.hash(hash_password, password)
            await self.change("set_password", me=user["username"], password=hashed, void=0)
        return user  # type: ignore[no-any-return]

    async def authenticate(self, token: object) -> Login:
        """Returns whom a token names, if it is ours, has not expired and was not voided."""
        options: Any = {
            "require": ["exp", "iat", "sub"],
            "verify_iat": False,
        }  # clocks are set back
        try:
            claims = jwt.decode(str(token), self.key, [self.config.algorithm], options)
            name = check({"username": claims["sub"]}, "username")
        except (jwt.InvalidTokenError, ValueError, ChatError) as error:
            raise ChatError(401, f"log in again: {error}") from None
        user = await self.db.read(first, GET_USER, name)
        if not user or (user["username"], user["version"]) != (claims["sub"], claims.get("ver")):
            raise ChatError(401, "log in again: this log-in has ended")
        return Login(name, user["version"], claims["exp"])


# --------------------------------------------------------------------------------------------- HTTP
# A route binds an operation's fields from path, query and body, by name, and answers what it
# returns. Only what is more than that has a handler of its own.

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
COUNTED = (
    *("messages", "deliveries", "slow_readers"),
    *("batches", "batch_messages", "commit_seconds"),
)
POSTING = ("post_message", "edit_message", "delete_message")


def answer(data: Any = None, status: int = 200) -> web.Response:
    """Returns JSON, or 204 for nothing."""
    if data is None:
        return web.Response(status=204)
    return web.json_response(data, status=status, dumps=encode)


@lru_cache
def fields_of(name: str) -> dict[str, Any]:
    """Returns the fields that an operation takes, with their defaults."""
    parameters = inspect.signature(getattr(Transaction, name)).parameters.values()
    return {one.name: one.default for one in parameters if one.name not in ("self", "me")}


class Http(Chat):
    """The handlers of HTTP."""

    def bind(self, name: str, data: Mapping[str, Any], me: str, *, spelled: bool) -> dict[str, Any]:
        """Returns the fields of an operation, checked; the caller's rate of posting counts here."""
        fields = {
            key: check(data, key, default, spelled=spelled)
            for key, default in fields_of(name).items()
        }
        if "limit" in fields:
            fields["limit"] = min(fields["limit"], self.config.history_limit or UNLIMITED)
        if name in POSTING:
            if len(fields.get("message", "")) > (self.config.message_length or UNLIMITED):
                raise ChatError(400, f"message: is over {self.config.message_length} characters")
            self.messages.take(me)
        return {"me": me, **fields}

    async def identify(self, request: web.Request) -> Login:
        """Returns whom the Authorization header names."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise ChatError(401, "an Authorization: Bearer header is required")
        return await self.authenticate(token.strip())

    def address(self, request: web.Request) -> str:
        """Returns the right-most address that is not a trusted proxy's."""
        hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
        hops = [hop.strip().removeprefix("::ffff:") for hop in (*hops, request.remote or "")]
        trusted = [ipaddress.ip_network(text, strict=False) for text in self.config.trusted_proxies]
        with contextlib.suppress(ValueError):
            while hops[1:] and any(ipaddress.ip_address(hops[-1]) in one for one in trusted):
                hops.pop()
        return hops[-1][:64]

    def query(self, request: web.Request) -> dict[str, str]:
        """Returns a query, whose parts are UTF-8 and stand there once."""
        text = request.rel_url.raw_query_string
        try:
            return unique(parse_qsl(text, keep_blank_values=True, errors="strict"))
        except ValueError as error:
            raise ChatError(400, f"the query cannot be read: {error}") from None

    async def read_body(self, request: web.Request) -> str:
        """Returns a body as text, if it is no longer than it may be and is there within 10 s."""
        data, most = bytearray(), self.config.body_bytes or UNLIMITED
        try:
            async with asyncio.timeout(10):
                async for chunk in request.content.iter_any():
                    data += chunk
                    if len(data) > most:
                        raise ChatError(413, f"the body is larger than {most} bytes")
            return data.decode()
        except TimeoutError:
            raise ChatError(408, "the body took longer than 10 s") from None
        except (ValueError, web.RequestPayloadError) as error:
            raise ChatError(400, f"the body cannot be read: {error}"[:200]) from None

    async def body(self, request: web.Request, form: str = "") -> Mapping[str, Any]:
        """Returns a JSON object, or a form where one is expected; an empty body is {}."""
        text, kind = await self.read_body(request), request.headers.get("Content-Type", "").lower()
        if form and request.content_type == form:
            try:
                return unique(parse_qsl(text, keep_blank_values=True, max_num_fields=50))
            except ValueError as error:
                raise ChatError(400, f"the form cannot be read: {error}") from None
        if text and not re.fullmatch('application/json *(; *charset="?utf-8"?)?', kind):
            raise ChatError(415, "the body should be application/json in UTF-8")
        return parse_object(text) if text else {}

    def route(self, name: str, method: str) -> Handler:
        """Returns the handler of an operation for those who are logged in."""

        async def handler(request: web.Request) -> web.StreamResponse:
            me, path = (await self.identify(request)).username, dict[str, Any](request.match_info)
            for key, value in path.items():
                try:
                    path[key] = check(path, key, spelled=True)
                except ChatError:
                    raise ChatError(404, f"there is no {key} like {value[:64]}") from None
            data = self.query(request) if method == "GET" else await self.body(request)
            fields = self.bind(name, {**data, **path}, me, spelled=method == "GET")
            if method != "GET":
                outcome = await self.change(
                    name, list(filter(None, [fields.get("room_id")])), **fields
                )
            elif fields.get("wait"):
                outcome = await self.look_for(request, name, fields)
            else:
                outcome = await self.look(name, **fields)
            status, outcome = outcome if isinstance(outcome, tuple) else (200, outcome)
            return answer(self.mark_online(outcome), status)

        return handler

    async def look_for(self, request: web.Request, name: str, fields: dict[str, Any]) -> Any:
        """Returns events, if need be once there are some, or none after `wait` seconds."""
        more = self.waiting.setdefault(fields["room_id"], asyncio.Event())
        outcome = await self.look(name, **fields)
        if not outcome["events"]:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(more.wait(), min(fields["wait"], 30))
            await self.identify(request)  # the log-in may have ended meanwhile
            outcome = await self.look(name, **fields)
        return outcome

    def mark_online(self, outcome: Any) -> Any:
        """Fills in who is online, in this room or in any, which no operation knows."""
        room = outcome if isinstance(outcome, dict) and "members" in outcome else None
        online = self.online(room["room_id"]) if room else self.online_anywhere()
        users = room["members"] if room else outcome or ()
        for user in [users] if isinstance(users, dict) else users:
            if "online" in user:
                user["online"] = user["username"] in online
        return outcome

    async def register(self, request: web.Request) -> web.Response:
        """Adds an account."""
        data = await self.body(request)
        fields = {"username": check(data, "username"), "email": check(data, "email")}
        password = check_password(data, "password", self.config.password_min_length)
        if self.config.registration == "closed":
            raise ChatError(403, "registration is closed")
        self.registrations.take(self.address(request))
        fields["password"] = await self.hash(hash_password, password)
        return answer(await self.change("register", ["1"], **fields), 201)

    async def token(self, request: web.Request) -> web.Response:
        """Logs in, by OAuth2's password grant (RFC 6749 4.3) as a form, or by the same as JSON."""
        data = await self.body(request, form="application/x-www-form-urlencoded")
        if data.get("grant_type", "password") != "password":
            raise ChatError(400, "grant_type should be password", "unsupported_grant_type")
        account = check({"account": data.get("username")}, "account").lower()
        refusal = ChatError(400, "wrong name or password", "invalid_grant")
        password = check_password(data, "password")
        user = await self.verify(account, password, self.address(request), refusal)
        now, seconds = int(time.time()), self.config.access_token_expire_minutes * 60
        claims = {"sub": user["username"], "ver": user["version"], "iat": now, "exp": now + seconds}
        token = jwt.encode(claims, self.key, self.config.algorithm)
        response = answer({"access_token": token, "token_type": "bearer", "expires_in": seconds})
        response.headers["Cache-Control"] = "no-store"
        return response

    async def confirm(self, request: web.Request, me: str, data: Mapping[str, Any]) -> None:
        """Asks the caller for the password again."""
        password, refusal = check_password(data, "password"), ChatError(403, "wrong password")
        await self.verify(me, password, self.address(request), refusal)

    async def change_password(self, request: web.Request) -> web.Response:
        """Changes the caller's password and voids every token."""
        me, data = (await self.identify(request)).username, await self.body(request)
        fresh = check_password(data, "new_password", self.config.password_min_length)
        await self.confirm(request, me, data)
        hashed = await self.hash(hash_password, fresh)
        return answer(await self.change("set_password", me=me, password=hashed))

    async def delete_me(self, request: web.Request) -> web.Response:
        """Deletes the caller's account and, if asked to, the text of all their messages."""
        me, data = (await self.identify(request)).username, await self.body(request)
        if not isinstance(data.get("erase", False), bool):
            raise ChatError(400, "erase: should be true or false")
        await self.confirm(request, me, data)
        while data.get("erase") and (texts := await self.db.read(each, LIST_TEXTS, [(me,)])):
            for room_id, group in itertools.groupby(texts, key=lambda row: str(row["room_id"])):
                fields = {"room_id": room_id, "seqs": [row["seq"] for row in group]}
                await self.change("erase", [room_id], me=me, **fields)
        rooms = [row["room_id"] for row in await self.db.read(each, LIST_ROLES, [(me,)])]
        return answer(await self.change("delete_user", rooms, me=me))

    def page(self, file: str, policy: str, **words: str) -> Handler:
        """Returns the handler of a page; its inline script and style are allowed by hash."""

        async def handler(_: web.Request) -> web.Response:
            text, allowed = (HERE / file).read_text("utf-8"), policy
            for word, value in words.items():
                text = text.replace("{{" + word + "}}", value)
            for tag in ("script", "style"):
                block = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()
                digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
                allowed = allowed.replace("{" + tag + "}", f"'sha256-{digest}'")
            headers = {"Content-Security-Policy": allowed}
            return web.Response(text=text, content_type="text/html", headers=headers)

        return handler

    async def docs_asset(self, request: web.Request) -> web.StreamResponse:
        """Returns one of the files of the documentation pages."""
        file = Path(self.config.docs_assets) / request.match_info["file"]
        if self.config.docs_assets in ("cdn", "off") or not file.is_file():
            raise ChatError(404, "there is no such file")
        return web.FileResponse(file)

    async def openapi(self, _: web.Request) -> web.Response:
        """Returns the OpenAPI document."""
        text = (HERE / "openapi.json").read_text("utf-8")
        return web.Response(text=text, content_type="application/json")

    async def healthz(self, _: web.Request) -> web.Response:
        """Tells whether the database answers and is set up to keep what it is told."""
        await self.db.read(first, GET_EPOCH)
        facts = {"database": self.db.name, "warnings": self.db.warnings}
        return answer({"status": "ok", **facts})

    async def metrics(self, _: web.Request) -> web.Response:
        """Returns figures for Prometheus."""
        if self.config.metrics == "off":
            raise ChatError(404, "metrics are off")
        sizes = {"sockets": self.connected.total(), "rooms": len(self.rooms)}
        lines = []
        for name, size in (*sizes.items(), ("queue", len(self.queue))):
            lines += [f"# TYPE chatserver_{name} gauge", f"chatserver_{name} {size}"]
        for name in COUNTED:
            lines += [f"# TYPE chatserver_{name}_total counter"]
            lines += [f"chatserver_{name}_total {self.counts[name]}"]
        lines += ["# TYPE chatserver_errors_total counter"]
        for name in sorted(self.counts.keys() - {*COUNTED}):
            code = name.removeprefix("errors ")
            lines += [f'chatserver_errors_total{{code="{code}"}} {self.counts[name]}']
        text = "\n".join([*lines, ""]).encode()
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=text, headers=headers)


# ---------------------------------------------------------------------------------------- WebSocket
# One coroutine a socket: log in, enter the room, replay, then do what each frame asks for. A
# frame that is refused is answered, and the socket lives on.

FRAMES = {
    "message": "post_message",
    "edit": "edit_message",
    "delete": "delete_message",
    "read": "mark_read",
}


def is_name(value: object) -> bool:
    """Tells whether a client_id or target is one, so that it may be sent back."""
    return type(value) is int or (
        isinstance(value, str) and bool(re.fullmatch("[ -~]{1,64}", value))
    )


class ChatServer(Http):
    """The handler of the WebSocket, and with it the whole server."""

    async def connect(self, request: web.Request) -> web.WebSocketResponse:
        """Accepts a socket, if there is room for it, and frees all that it had when it ends."""
        address, origin = self.address(request), request.headers.get("Origin", "")
        foreign = origin and origin.partition("://")[2] != request.host
        if foreign and origin not in self.config.allowed_origins:
            raise ChatError(403, "pages of this origin may not connect")
        if self.connected.total() >= (self.config.sockets or UNLIMITED) or self.stopping:
            raise ChatError(503, "the server is full", retry_after=10)
        if self.connected[address] >= (self.config.sockets_per_address or UNLIMITED):
            raise ChatError(429, "too many sockets from this address", retry_after=10)
        self.connected[address] += 1
        try:
            return await self.accept(request)
        finally:
            self.connected[address] -= 1
            if not self.connected[address]:
                del self.connected[address]

    async def accept(self, request: web.Request) -> web.WebSocketResponse:
        """Takes a socket from its handshake to its end."""
        login = await self.identify(request) if "Authorization" in request.headers else None
        if login:
            await self.check_entry(request, login)
        size = self.config.frame_bytes + 1 if self.config.frame_bytes else 0
        ws = web.WebSocketResponse(
            timeout=2, autoclose=False, autoping=False, compress=False, max_msg_size=size
        )
        await ws.prepare(request)
        try:
            await self.converse(request, ws, login)
        except ChatError as error:
            await ws.close(code=error.close_code, message=str(error).encode()[:120])
        finally:
            if request.transport:
                request.transport.close()
        return ws

    def check_share(self, username: str) -> None:
        """Refuses who has as many sockets as one may."""
        if len(self.users.get(username, ())) >= (self.config.sockets_per_user or UNLIMITED):
            raise ChatError(429, "too many sockets of this user", retry_after=10)

    async def check_entry(self, request: web.Request, login: Login) -> dict[str, Any]:
        """Refuses who may not connect to this room, or not from there; returns where to start."""
        self.check_share(login.username)
        query, room_id = self.query(request), request.match_info["room_id"]
        try:
            check(request.match_info, "room_id")
        except ChatError:
            raise ChatError(404, "there is no such room") from None
        await self.look("look_into", me=login.username, room_id=room_id)
        start = {name: check(query, name, None, spelled=True) for name in ("after", "last")}
        return start | {"epoch": query.get("epoch", self.epoch)}

    async def first_frame(self, ws: web.WebSocketResponse) -> Login:
        """Waits 10 s for {"type": "auth", "token"}, as browsers must log in."""
        self.strangers.add(ws)
        try:
            message = await ws.receive(timeout=10)
            data = parse_object(message.data) if message.type == WSMsgType.TEXT else {}
            if data.get("type") == "auth":
                return await self.authenticate(data.get("token"))
        except (TimeoutError, ChatError) as error:  # what was no JSON was no log-in either
            if isinstance(error, ChatError) and error.status != 400:
                raise
        finally:
            self.strangers.discard(ws)
        raise ChatError(401, "the first frame should be a valid log-in, within 10 s")

    async def converse(
        self, request: web.Request, ws: web.WebSocketResponse, login: Login | None
    ) -> None:
        """Logs in, enters, replays and listens."""
        login = login or await self.first_frame(ws)
        room_id, start = request.match_info["room_id"], await self.check_entry(request, login)
        if not (transport := request.transport):
            return
        self.check_share(login.username)
        room = self.rooms.setdefault(room_id, Room(room_id))
        socket, replay = Socket(transport, room, login), None
        self.enter(socket)
        try:
            cursor = await self.greet(socket, start)
            if cursor == room.cursor and not socket.closed:
                room.live.add(socket)
            else:
                replay = asyncio.create_task(self.replay(socket, cursor))
            await self.listen(ws, socket)
        finally:
            self.leave(socket)
            if replay:
                replay.cancel()
                await asyncio.wait([replay])

    async def greet(self, socket: Socket, start: Mapping[str, Any]) -> int:
        """Enters and says hello, and reset if it must; returns the cursor to go on from."""
        room, login = socket.room, socket.login
        fields = {"me": login.username, "version": login.version, "room_id": room.room_id}
        role, floor, seq = await self.change("join", [room.room_id], **fields)
        socket.entered = seq
        if socket.removed > seq:
            raise ChatError(403, "you are no longer in this room")
        room.cursor = seq if room.cursor is None else room.cursor
        self.notice(room.room_id, seq)
        where = {"room_id": room.room_id, "seq": seq, "epoch": self.epoch}
        online = sorted(room.announced | {login.username})
        hello = {"type": "hello", "username": login.username, "role": role, "online": online}
        socket.send(hello | where)
        after = seq if start["after"] is None else start["after"]
        if start["after"] is None and start["last"]:
            last = min(start["last"], self.config.history_limit or UNLIMITED)
            newest = await self.db.read(each, NEWEST, [(room.room_id, floor, seq + 1, last)])
            after = newest[-1]["seq"] - 1 if newest else seq
        if not floor <= after <= seq or start["epoch"] != self.epoch:
            socket.send({"type": "reset", "floor": floor, **where})
            return int(seq)
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
                        socket.transport.write(to_frame(message.data, WSMsgType.PONG))
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
        kind, room_id, me = (
            str(data.get("type", "message")),
            socket.room.room_id,
            socket.login.username,
        )
        if kind in FRAMES:
            if kind in ("edit", "delete"):
                data["seq"], _ = check(data, "target"), check(data, "client_id", None)
            if kind == "read":
                self.count(socket)
            fields = self.bind(FRAMES[kind], data | {"room_id": room_id}, me, spelled=False)
            self.submit(FRAMES[kind], fields, [room_id], partial(self.settle, socket, data))
        elif kind == "typing":
            self.count(socket)
            self.tell_typing(socket)
        elif kind == "auth":
            self.count(socket)
            login = await self.authenticate(data.get("token"))
            if login.username != me:
                raise ChatError(403, "this token is another user's, the old log-in stands")
            socket.renew(login)
        else:
            raise ChatError(400, f"type: should be {', '.join(FRAMES)}, typing or auth")

    def tell_typing(self, socket: Socket) -> None:
        """Tells the others that somebody types, at most every 2 s."""
        if time.monotonic() - socket.typed > 2:
            socket.typed, room_id = time.monotonic(), socket.room.room_id
            typing = {"type": "typing", "room_id": room_id, "username": socket.login.username}
            self.whisper(room_id, typing)
            self.notes.append(("tell", room_id, typing))
            self.wake.set()

    def settle(self, socket: Socket, data: Mapping[str, Any], outcome: Any) -> None:
        """Answers a frame: an error, an ack to a retry, else the event itself is the answer."""
        if isinstance(outcome, ChatError):
            named = {name: data.get(name) for name in ("client_id", "target")}
            shown = {name: one for name, one in named.items() if is_name(one)}
            socket.send({"type": "error", **outcome.body, **shown})
            self.counts[f"errors {outcome.body['error']}"] += 1
        elif isinstance(outcome, tuple) and outcome[0] == 200:
            socket.send({"type": "ack", "client_id": data["client_id"], "seq": outcome[1]["seq"]})


# -------------------------------------------------------------------------------------- application
# What stands around every handler, the route table, and how the program starts and stops.

SERVER = web.AppKey("server", ChatServer)
CDN = "https://cdn.jsdelivr.net/npm/"
STRICT = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
PAGE_POLICY = (
    f"{STRICT}; script-src {{script}}; style-src {{style}}; connect-src 'self'; img-src data:"
)
DOCS_POLICY = (
    f"{STRICT}; script-src 'self' {{script}} {CDN}; style-src 'self' 'unsafe-inline' {CDN}; "
    "connect-src 'self'; img-src 'self' data:; font-src data:; worker-src blob:"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": STRICT,
}
ROUTES = """
POST   /auth/logout                         set_password
GET    /users                               list_users
GET    /users/me                            get_user
GET    /users/{username}                    get_user
GET    /rooms                               list_rooms
POST   /rooms                               create_room
GET    /rooms/{room_id}                     get_room
PATCH  /rooms/{room_id}                     rename_room
DELETE /rooms/{room_id}                     delete_room
PUT    /rooms/{room_id}/members/{username}  put_member
DELETE /rooms/{room_id}/members/{username}  delete_member
GET    /rooms/{room_id}/messages            list_messages
POST   /rooms/{room_id}/messages            post_message
PATCH  /rooms/{room_id}/messages/{seq}      edit_message
DELETE /rooms/{room_id}/messages/{seq}      delete_message
GET    /rooms/{room_id}/events              list_events
PUT    /rooms/{room_id}/read                mark_read
GET    /search                              search
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
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
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
    request.config_dict[SERVER].counts[f"errors {refusal.body['error']}"] += 1
    return refuse(request, refusal, headers)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds the headers that every answer carries, and CORS for pages of allowed origins."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    origin = request.headers.get("Origin", "")
    if origin in request.config_dict[SERVER].config.allowed_origins:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, PATCH, DELETE"
        response.headers["Vary"] = "Origin"


async def stop(app: web.Application) -> None:
    """Lets what was accepted be committed, for at most 1 s, then sends every socket away."""
    server = app[SERVER]
    server.stopping = True
    for _ in range(100):
        await asyncio.sleep(0.01 if server.queue else 0)
    for event in server.waiting.values():
        event.set()
    shut(itertools.chain.from_iterable(server.users.values()), 1001, "shutting down")
    closing = [asyncio.ensure_future(ws.close(code=1001, drain=False)) for ws in server.strangers]
    if closing:
        await asyncio.wait(closing, timeout=1)


def create_app(config: Config | None = None) -> web.Application:
    """Returns the server as an aiohttp application; opens nothing yet."""
    app = web.Application(middlewares=[answer_errors])
    app[SERVER] = server = ChatServer(config or load_config())
    app.cleanup_ctx.append(server.running)
    app.on_shutdown.append(stop)
    app.on_response_prepare.append(add_headers)
    assets = server.config.docs_assets
    assets = assets if assets in ("cdn", "off") else "folder"
    handlers: dict[str, Handler] = {
        "POST /auth/register": server.register,
        "POST /auth/token": server.token,
        "POST /auth/password": server.change_password,
        "DELETE /users/me": server.delete_me,
        "GET /websockets/chat/{room_id}": server.connect,
        "GET /": server.page("client.html", PAGE_POLICY),
        "GET /docs": server.page("docs.html", DOCS_POLICY, kind="swagger", assets=assets),
        "GET /redoc": server.page("docs.html", DOCS_POLICY, kind="redoc", assets=assets),
        "GET /docs/assets/{file:[a-z.-]+}": server.docs_asset,
        "GET /openapi.json": server.openapi,
        "GET /healthz": server.healthz,
        "GET /metrics": server.metrics,
    }
    for method, path, name in map(str.split, ROUTES.strip().splitlines()):
        handlers[f"{method} {path}"] = server.route(name, method)
    for route, handler in handlers.items():
        method, path = route.split()
        if method == "GET":
            app.router.add_get(path, handler, allow_head="websockets" not in path)
        else:
            app.router.add_route(method, path, handler)
    return app


def backup(config: Config, target: str) -> None:
    """Copies the database while the server runs, under a new epoch, so that clients notice."""
    if not config.database_url.startswith("sqlite"):
        print("use pg_dump; once restored: UPDATE meta SET value = 'new' WHERE name = 'epoch'")
        raise SystemExit(2)
    path, part = quote(SQLite(config.database_url).path), Path(f"{target}.part")
    try:
        source = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
            copy.execute(SET_EPOCH, {"1": secrets.token_hex(8)})
            copy.commit()
        part.replace(target)
    except (sqlite3.Error, OSError) as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"chatserver: backup: {error}") from None


async def reset_password(config: Config, username: str) -> None:
    """Asks twice for a user's new password."""
    ask = getpass.getpass if sys.stdin.isatty() else lambda _: sys.stdin.readline().rstrip("\n")
    typed = {"password": ask("New password: ")}
    if ask("Again: ") != typed["password"]:
        raise SystemExit("chatserver: the two differ")
    try:
        password = hash_password(check_password(typed, "password", config.password_min_length))
        async with (server := Chat(config)).running(listens=False):
            await server.change("set_password", me=username.lower(), password=password)
    except ChatError as error:
        raise SystemExit(f"chatserver: {error}") from None


async def serve(config: Config, listener: sockets.socket) -> None:
    """Runs one process until it is told to stop."""
    stopped, parent = asyncio.Event(), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(
        create_app(config), access_log=None, keepalive_timeout=20, shutdown_timeout=1
    )
    try:
        await runner.setup()
        # A small number here means few accepted at a time, so that processes share them fairly.
        await web.SockSite(runner, listener, backlog=8).start()
        listener.listen(1024)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"chatserver listening on http://{host}:{port}", flush=True)
        while not stopped.is_set() and (config.workers == 1 or os.getppid() == parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), 1)
    finally:
        await runner.cleanup()


def supervise(config: Config, listener: sockets.socket) -> None:
    """Keeps `workers` processes on one socket, replaces one that dies, and stops them together."""
    children, stopping, began = set[int](), threading.Event(), time.monotonic()
    signals, failed = (signal.SIGTERM, signal.SIGINT), False

    def stop_all(*_: object) -> None:
        stopping.set()
        for child in children:
            os.kill(child, signal.SIGTERM)

    for number in signals:
        signal.signal(number, stop_all)
    while children or not stopping.is_set():
        while len(children) < config.workers and not stopping.is_set():
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until stop_all knows the child
            if not (child := os.fork()):
                for number in signals:
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                asyncio.run(serve(config, listener))
                os._exit(0)
            children.add(child)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        child, status = os.wait()
        children.discard(child)
        if os.waitstatus_to_exitcode(status) == 1 and time.monotonic() - began < 10:
            failed = True  # it could not start, and has said why
            stop_all()
        stopping.wait(0.3)
    if failed:
        raise SystemExit(1)


def main() -> None:
    """Does what the command line asks for: with nothing but settings it runs the server."""
    os.umask(0o077)  # the database is for nobody else to read
    words = sys.argv[1:]
    command = words[0] if words[:1] in (["backup"], ["set-password"]) and words[1:] else ""
    config = load_config(words[2:] if command else words)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with contextlib.suppress(
        ImportError, ValueError
    ):  # each socket takes one; Windows has no limit
        resource = importlib.import_module("resource")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # it logs a traceback for bad requests
    if command == "backup":
        backup(config, words[1])
    elif command:
        asyncio.run(reset_password(config, words[1]))
    else:
        family = sockets.AF_INET6 if ":" in config.host else sockets.AF_INET
        try:
            listener = sockets.create_server((config.host, config.port), family=family)
        except OSError as error:
            place = f"{config.host}:{config.port}"
            raise SystemExit(f"chatserver: port: {place}: {error.strerror}") from None
        with listener:
            if config.workers > 1:
                supervise(config, listener)
            else:
                asyncio.run(serve(config, listener))


if __name__ == "__main__":
    main()
