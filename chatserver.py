#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.5,<4", "aiosqlite>=0.22,<1", "pyjwt>=2.10,<3", "asyncpg>=0.30,<1"]
# ///
"""A complete chat server in one file: accounts, rooms, live messages that are never lost.

Users are members of rooms. Whatever happens in a room is an event with a number, its seq; a
message is one kind of event, and a room's events in order are its log. The way of a message:

  WebSocket: obey_text  a frame comes in
  operations: submit_message  its fields are checked, and it waits in a queue
  chat: write_batch, change  all that wait are stored in one transaction, under the next numbers
  hub: publish, hand  each socket that has all before gets it in one write
  hub: notice, read_on  who is behind gets it from the log, as fast as they read

Read downwards: settings, errors, fields, passwords, database, statements, events, changes, hub,
chat, operations, HTTP, WebSocket, application. The heart is changes, hub, chat and WebSocket.
"""

from __future__ import annotations

import argparse
import asyncio
import configparser
import gc
import getpass
import hashlib
import ipaddress
import json
import logging
import math
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
import unicodedata
from collections import abc, defaultdict
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

import aiosqlite
import jwt
from aiohttp import WSMessage, WSMsgType, typedefs, web

Row = abc.Mapping[str, Any]
Rows = abc.Sequence[Row]
FOLDER = Path(__file__).resolve().parent
LOGGER = logging.getLogger("chatserver")

# ------------------------------ settings
# The fields of Config are the one table of settings, for the command line, the environment and
# files. Only load_config knows where a value is from.


def setting(default: Any, allowed: str | range, meaning: str) -> Any:
    """A field of Config with what is allowed in it."""
    metadata = {"allowed": allowed, "meaning": meaning}
    return field(default=default, metadata=metadata, repr=False)


def parse_setting(one: Field[Any], value: Any) -> Any:
    """A setting's value, or raises a ValueError."""
    allowed = one.metadata["allowed"]
    bounds = ""
    if isinstance(allowed, range):
        bounds = f", {allowed[0]} to {allowed[-1]}"
        if isinstance(value, str) and re.fullmatch("[0-9]{1,12}", value):
            value = int(value)
        fits = type(value) is int and value in allowed
    else:
        fits = isinstance(value, str) and bool(re.fullmatch(allowed, value))
    if not fits:
        raise ValueError(f"{one.name}: should be {one.metadata['meaning']}{bounds}")
    return value


MANY = range(2**31)  # any number that a setting could need
DATABASES = r"sqlite(\+\w+)?:///(?!:memory:).+|postgres(ql)?(\+\w+)?://.+"
ORIGINS = r"(\s*https?://[^\s,/]+\s*(,|$))*"


@dataclass(frozen=True)
class Config:
    """Every setting; for limits 0 means none."""

    database_url: str = setting("sqlite:///./chat.db", DATABASES, "sqlite:///… or postgresql://…")
    secret_key: str = setting("", "(.{32,})?", "32 characters or more that sign log-ins")
    algorithm: str = setting("HS256", "HS(256|384|512)", "HS256, HS384 or HS512")
    access_token_expire_minutes: int = setting(60, MANY[1:], "minutes that a log-in lasts")
    host: str = setting("127.0.0.1", ".+", "the address to listen at; 0.0.0.0 is every one")
    port: int = setting(8000, range(65536), "the port to listen at; 0 is any free one")
    workers: int = setting(1, range(1, 1000), "processes; more than one need Postgres")
    registration: str = setting("open", "open|closed", "open or closed")
    password_min_length: int = setting(4, range(1, 1025), "bytes a new password has at least")
    message_length: int = setting(4000, range(1, 10001), "characters a message has at most")
    messages_per_second: int = setting(10, MANY, "messages of one user; twice that at once")
    logins_per_minute: int = setting(10, MANY, "log-ins that fail, from one address")
    registrations_per_hour: int = setting(20, MANY, "registrations from one address")
    sockets_per_user: int = setting(20, MANY, "sockets of one user, in each process")
    sockets: int = setting(10000, MANY, "sockets of all users, in each process")
    allowed_origins: str = setting("", ORIGINS, "sites whose pages may use it, by commas")
    proxies: int = setting(0, range(100), "proxies in front that set X-Forwarded-For")

    def __post_init__(self) -> None:
        """Raises a ValueError that names a setting."""
        for one in fields(self):
            parse_setting(one, getattr(self, one.name))
        shared = self.database_url.startswith("postgres")
        if shared and not self.secret_key:
            raise ValueError("secret_key: Postgres needs one, the same everywhere")
        if self.workers > 1 and not shared:
            raise ValueError("workers: more than one need Postgres")


SETTINGS = {one.name: one for one in fields(Config)}
ENV_LINE = r"""(?:export\s+)?(\w+)\s*=\s*(["']?)(.*?)\2(?:\s+#.*)?"""


def read_settings(name: str) -> dict[str, str]:
    """What config.ini or .env sets."""
    ini = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#", ";"))
    try:
        text = Path(name).read_text("utf-8-sig") if Path(name).exists() else ""
        if name == ".env":
            lines = [re.fullmatch(ENV_LINE, line.strip()) for line in text.splitlines()]
            return {parts[1].lower(): parts[3] for parts in lines if parts}
        ini.read_string(text)
    except (OSError, ValueError, configparser.Error) as error:
        raise SystemExit(f"chatserver: {name}: {error}".replace("\n", " ")) from None
    return {name: value for section in ini.values() for name, value in section.items()}


def load_config(options: dict[str, Any]) -> Config:
    """Reads options over environment over .env over config.ini."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    files = {name: read_settings(name) for name in ("config.ini", ".env")}
    sources = files | {"the environment": environment, "the command line": options}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    try:
        for origin, found in sources.items():
            for name in [name for name in found if found[name]]:  # an empty one is not set
                origins[name] = origin
                if name in SETTINGS:
                    values[name] = parse_setting(SETTINGS[name], found[name])
                elif origin == "config.ini":
                    raise ValueError(f"{name}: there is no such setting")
        if environment.get("port"):
            values.setdefault("host", "0.0.0.0")  # who sets PORT wants every one
        return Config(**values)
    except ValueError as error:
        origin = origins.get(str(error).partition(":")[0], "the defaults")
        raise SystemExit(f"chatserver: {error} (it comes from {origin})") from None


# -------------------------------- errors
# Whatever is refused, anywhere, is a ChatError. HTTP answers its status; a WebSocket that must
# close for it closes with 4000 + status, or with 1013 where a retry helps.
CODES = {408: "timeout", 413: "too_large", 429: "rate_limited", 503: "unavailable"}


class ChatError(Exception):
    """A refusal: an HTTP status, a sentence, and more for its JSON."""

    def __init__(self, status: int, detail: str, code: str = "", **more: Any) -> None:
        super().__init__(detail)
        self.status = status
        code = code or CODES.get(status) or HTTPStatus(status).name.lower()
        self.body = {"error": code, "detail": detail, **more}


# -------------------------------- fields
# What may come in, by the name of its field, be it in a path, a query, a body or a frame. Nothing
# of it is trusted, and nothing here knows what it is for.
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
LARGEST = 2**53
CHARACTER = r"[^\0\ud800-\udfff]"  # no NUL, no half of a pair
KIND = "public|private|direct"
ROLE = "member|moderator|owner|banned"
TYPE = "message|edit|delete|typing|read"
PATTERNS = {
    "client_id": ("[ -~]{1,64}", "1 to 64 printable ASCII characters"),
    "email": (r"[^\s@\0\ud800-\udfff]{1,64}@[^\s@\0\ud800-\udfff]{1,189}", "an e-mail address"),
    "kind": (KIND, KIND),
    "message": (f"{CHARACTER}+", "text, not blank, without NUL"),
    "name": (f"{CHARACTER}{{1,100}}", "1 to 100 characters, not blank"),
    "q": (f"{CHARACTER}{{1,200}}", "1 to 200 characters, not blank"),
    "role": (ROLE, ROLE),
    "room_id": ("[a-z0-9][a-z0-9_-]{0,63}", "1 to 64 of a-z 0-9 _-"),
    "type": (TYPE, TYPE),
    "username": ("(?!(?i:me)$)[a-zA-Z0-9][a-zA-Z0-9_.-]{1,31}", "2 to 32 of a-z 0-9 _.-"),
}
ANYTHING = (f"{CHARACTER}{{1,4096}}", "text")
SHOWN = ("message", "name", "q")  # must show
BLANK = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # Unicode's categories


@dataclass
class Fields:
    """What came in; a field is checked when it is asked for."""

    raw: Row
    address: str = ""

    def text(self, name: str, default: str | None = None, *, any_text: bool = False) -> str:
        """A text that fits its pattern, or the default for none."""
        value: Any = self.raw.get(name)
        if value is None and default is not None:
            return default
        pattern, meaning = ANYTHING if any_text else PATTERNS.get(name, ANYTHING)
        fits = isinstance(value, str) and re.fullmatch(pattern, value)
        if not fits or (name in SHOWN and BLANK.issuperset(map(unicodedata.category, value))):
            raise ChatError(400, f"{name}: should be {meaning}")
        return str(value).lower() if name in ("email", "username") else str(value)

    def number(self, name: str, default: int | None = None, least: int = 0) -> int:
        """A whole number; in a query it is spelled out."""
        value = self.raw.get(name, default)
        if isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value):
            value = int(value)
        if type(value) is not int or not least <= value <= LARGEST:
            raise ChatError(400, f"{name}: should be a number from {least} to {LARGEST}")
        return value

    def limit(self) -> int:
        """How many rows a page shall have, at most 200."""
        return min(self.number("limit", 50, least=1), 200)


def fold(text: str) -> str:
    """A text without case, composed in one way."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def parse_object(source: str) -> dict[str, Any]:
    """Parses one JSON object, whatever else it may be."""
    try:
        found = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise ChatError(400, f"not JSON: {error}"[:200]) from None
    if not isinstance(found, dict):
        raise ChatError(400, "a JSON object is expected")
    return found


# ----------------------------- passwords
# How a password is kept, and how often something may be tried.
# It knows no users.
SCRYPT = "scrypt$16384$8$5"  # N, r, p


def hash_password(password: str, salt: bytes, parameters: str) -> str:
    """Scrypt (RFC 7914) with its parameters and salt; takes 0.2 s."""
    n, r, p = (int(part) for part in parameters.split("$")[1:])
    digest = hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=2**28)
    return f"{parameters}${salt.hex()}${digest.hex()}"


class Limiter:
    """Gives each key `count` tokens a time; 0: no limit."""

    def __init__(self, what: str, count: int, seconds: int, times: int = 1) -> None:
        self.what = what
        self.rate = count / seconds
        self.most = count * times
        self.buckets: dict[str, tuple[float, float]] = {}  # what was left, when

    def left(self, key: str) -> float:
        """How many tokens a key has now."""
        tokens, when = self.buckets.get(key, (self.most, 0))
        return min(self.most, tokens + (monotonic() - when) * self.rate)

    def take(self, key: str, tokens: int = 1) -> None:
        """Takes a token, or gives one back (-1); or refuses."""
        left = self.left(key)
        if self.rate and left < tokens:
            wait = math.ceil((tokens - left) / self.rate)
            raise ChatError(429, f"too many {self.what}, wait {wait} s", retry_after=wait)
        if self.rate:
            self.buckets[key] = (left - tokens, monotonic())

    def forget(self) -> None:
        """Drops the keys that have all their tokens."""
        self.buckets = {key: one for key, one in self.buckets.items() if self.left(key) < self.most}


# ------------------------------ database
# Two engines behind one face: `fetch` reads, `transaction` gives a fetch that also writes, and
# `tell` reaches other processes. It does not know what is kept.
FIRST_EDITION = "SELECT floor FROM rooms LIMIT 1"
Fetch = abc.Callable[..., abc.Awaitable[Rows]]
Note = abc.Sequence[Any]


@contextmanager
def reported(db: Database) -> abc.Iterator[None]:
    """Turns failures into `unavailable`; logs the first in a row."""
    try:
        yield
        db.failing = False
    except db.failures as error:
        if not db.failing:
            LOGGER.error("database: %s: %s", type(error).__name__, error)
        db.failing = True
        reason = "the database cannot be reached"
        raise ChatError(503, reason, retry_after=2) from None


async def check_edition(db: Database, fetch: Fetch) -> None:
    """Ends the program if it is the first edition's."""
    with suppress(*db.failures):
        await fetch(FIRST_EDITION)
        raise SystemExit("chatserver: database_url: of the first edition, left as it is")


class SQLite:
    """A file of this process alone: one connection writes, three read."""

    failures: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    failing = False

    def __init__(self, url: str) -> None:
        self.path = os.path.realpath(unquote(url.partition("?")[0].partition(":///")[2]))
        self.readers: asyncio.Queue[aiosqlite.Connection] = asyncio.Queue()
        self.opened: list[aiosqlite.Connection] = []

    async def connect(self, *pragmas: str, suffix: str = "") -> aiosqlite.Connection:
        """Opens a connection with its thread."""
        path = self.path + suffix
        connection = await aiosqlite.connect(path, timeout=2, isolation_level="IMMEDIATE")
        self.opened.append(connection)
        connection.row_factory = sqlite3.Row
        for pragma in pragmas:
            await connection.execute_fetchall(f"PRAGMA {pragma}")
        return connection

    async def open(self, schema: str) -> None:
        """Takes the file, or ends the program."""
        try:
            os.close(os.open(self.path, os.O_CREAT, 0o600))
            guard = await self.connect(suffix="-lock")
            await guard.execute_fetchall("BEGIN EXCLUSIVE")
            self.writer = await self.connect("synchronous=FULL", "secure_delete=ON")
            await check_edition(self, partial(self.run, self.writer))
            await self.run(self.writer, "PRAGMA journal_mode=WAL")
            await self.writer.executescript(schema)
            self.inode = os.stat(self.path).st_ino
            for _ in range(3):
                self.readers.put_nowait(await self.connect("query_only=ON"))
        except self.failures as error:
            reason = "another process uses it" if "locked" in str(error) else error
            raise SystemExit(f"chatserver: database_url: {self.path}: {reason}") from None

    async def close(self) -> None:
        """Lets what runs end, then frees the file."""
        for connection in reversed(self.opened):
            await connection.close()

    async def run(self, connection: aiosqlite.Connection, sql: str, *values: Any) -> Any:
        """Rows; SQLite binds $1, $2 rightly only by name."""
        by_name: Any = {str(number): value for number, value in enumerate(values, 1)}
        return await connection.execute_fetchall(sql, by_name)

    async def fetch(self, sql: str, *values: Any) -> Any:
        """The rows of a statement that only reads."""
        reader = await self.readers.get()
        try:
            with reported(self):
                return await self.run(reader, sql, *values)
        finally:
            self.readers.put_nowait(reader)

    @asynccontextmanager
    async def transaction(self) -> abc.AsyncIterator[Fetch]:
        """Commits what was written, or nothing."""
        run = partial(self.run, self.writer)
        with reported(self):
            if os.stat(self.path).st_ino != self.inode:
                raise OSError(f"{self.path} was replaced")
            try:
                yield run
                if self.writer.in_transaction:
                    await self.writer.commit()
            except BaseException:
                await self.writer.rollback()
                raise

    def tell(self, *note: Any) -> None:
        """Has nobody to tell."""


class Postgres:
    """A database that processes share."""

    failing = False
    kept = r"(?:^|&)((?:host|ssl\w+)=[^&]*)"
    notify = "SELECT pg_notify('chatserver', $1)"
    unsafe = """SELECT name FROM pg_settings WHERE (name = 'server_encoding' AND setting <> 'UTF8')
        OR (name IN ('fsync', 'synchronous_commit', 'full_page_writes') AND setting = 'off')"""

    def __init__(self, url: str) -> None:
        import asyncpg

        errors = asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
        self.failures = (*errors, OSError, TimeoutError)
        self.asyncpg = asyncpg
        self.pool: Any = None
        self.notes: asyncio.Queue[Note] = asyncio.Queue(100_000)
        place, _, query = url.partition("://")[2].partition("?")
        dsn = f"postgresql://{place}?{'&'.join(re.findall(self.kept, query))}"
        limits = {"lock_timeout": "3s", "statement_timeout": "10s"}
        limits["idle_in_transaction_session_timeout"] = "1500ms"  # who freezes
        self.options = {"dsn": dsn, "timeout": 5, "command_timeout": 15, "server_settings": limits}

    async def open(self, schema: str) -> None:
        """Makes the tables, or ends the program."""
        pooled: Any = {"min_size": 0, "max_size": 5, **self.options}
        pooled["reset"] = lambda _: asyncio.sleep(0)  # nothing: no session changes
        try:
            self.pool = await self.asyncpg.create_pool(**pooled)
            async with self.pool.acquire() as connection:
                await check_edition(self, connection.fetch)
                async with connection.transaction():
                    await connection.execute("SELECT pg_advisory_xact_lock(7304241)")
                    if not await connection.fetchval("SELECT to_regclass('events')"):
                        await connection.execute(schema.replace("TEXT", 'TEXT COLLATE "C"'))
                for row in await connection.fetch(self.unsafe):
                    LOGGER.critical("Postgres can lose messages by its %s", row["name"])
        except (*self.failures, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise SystemExit(f"chatserver: database_url: {reason}") from None

    async def close(self) -> None:
        """Drops every connection."""
        if self.pool:
            self.pool.terminate()

    async def fetch(self, sql: str, *values: Any) -> Any:
        """The rows of a statement that only reads."""
        with reported(self):
            async with self.pool.acquire(timeout=5) as connection:
                return await connection.fetch(sql, *values)

    @asynccontextmanager
    async def transaction(self) -> abc.AsyncIterator[Fetch]:
        """Commits what was written, or nothing."""
        with reported(self):
            async with self.pool.acquire(timeout=5) as connection, connection.transaction():
                yield connection.fetch

    def tell(self, *note: Any) -> None:
        """Has others told soon, if it can."""
        with suppress(asyncio.QueueFull):
            self.notes.put_nowait(note)

    async def exchange(self, hear: abc.Callable[[str, Note], None]) -> None:
        """Tells and hears notes until the connection fails."""
        name = secrets.token_hex(4)
        hear(name, ("begin",))

        def receive(*heard: Any) -> None:
            sender, *notes = json.loads(heard[-1])
            for note in notes:
                if sender != name:
                    hear(sender, note)

        with reported(self):
            connection = await self.asyncpg.connect(**self.options)
            try:
                await connection.add_listener("chatserver", receive)
                while True:
                    notes: list[Note] = [("alive",)]
                    with suppress(TimeoutError):
                        notes.append(await asyncio.wait_for(self.notes.get(), 1))
                    # NOTIFY carries less than 8000 bytes; a note has up to 152.
                    while len(notes) < 50 and not self.notes.empty():
                        notes.append(self.notes.get_nowait())
                    await connection.execute(self.notify, encode([name, *notes]), timeout=4)
            finally:
                connection.terminate()


Database = SQLite | Postgres

# ---------------------------- statements
# All SQL, the same for both engines. Rows go in as one JSON document, which both take apart.
# It knows the tables of schema.sql, not what they are for.


def document(rows: abc.Iterable[Row]) -> str:
    """Rows as one parameter of a statement."""
    return encode(dict(enumerate(rows)))


# Only a message's row holds its text; an edit tells that of now.
EVENT = """SELECT e.seq, e.kind, e.json, (SELECT t.json FROM events t
  WHERE e.kind = 'edit' AND t.room_id = e.room_id AND t.seq = e.target) AS edited FROM events e"""
READABLE = "(m.role <> 'banned' OR (m.role IS NULL AND r.kind = 'public'))"
# Who posts has read all before.
MARK = """(SELECT max(seq) FROM (SELECT m.read_seq AS seq UNION ALL SELECT max(e.seq) FROM events e
  WHERE e.room_id = r.room_id AND e.username = m.username AND e.target IS NULL) AS marks)"""
ROOM = f"""SELECT r.room_id, r.name, r.kind, m.role, coalesce({MARK}, 0) AS read_seq,
  (SELECT coalesce(max(e.seq), 0) FROM events e WHERE e.room_id = r.room_id) AS seq,
  (SELECT count(*) FROM (SELECT 1 FROM events e WHERE e.room_id = r.room_id
  AND e.seq > {MARK} AND e.folded IS NOT NULL ORDER BY e.seq LIMIT 100) AS news) AS unread
  FROM rooms r LEFT JOIN members m ON m.room_id = r.room_id AND m.username = $1
  WHERE r.kind <> 'deleted'"""
GET_EPOCH = """INSERT INTO meta (name, value) VALUES ('epoch', $1)
  ON CONFLICT (name) DO UPDATE SET value = meta.value RETURNING value"""
ADD_USER = """INSERT INTO users (username, email, password, version, created_at)
  VALUES ($1, $2, $3, 0, $4) ON CONFLICT DO NOTHING RETURNING username"""
GET_USER = """SELECT username, email, password, version, created_at FROM users
  WHERE (username = $1 OR email = $1) AND password IS NOT NULL"""
LIST_USERS = """SELECT username, created_at FROM users WHERE password IS NOT NULL AND username > $1
  ORDER BY username LIMIT $2"""
CHANGE_USER = """UPDATE users SET password = $2, version = version + 1
  WHERE username = $1 AND password IS NOT NULL RETURNING version"""
VOID_TOKENS = "UPDATE users SET version = version + 1 WHERE username = $1"
CLOSE_USER = """UPDATE users SET email = NULL, password = NULL, version = version + 1
  WHERE username = $1"""
LIST_ROOMS = f"{ROOM} AND {READABLE} ORDER BY r.room_id"
GET_ROOM = f"{ROOM} AND r.room_id = $2"
ADD_ROOM = """INSERT INTO rooms (room_id, name, kind) VALUES ($1, $2, $3)
  ON CONFLICT DO NOTHING RETURNING room_id"""
CLOSE_ROOM = "UPDATE rooms SET name = '', kind = 'deleted' WHERE room_id = $1"
LIST_MEMBERS = "SELECT username, role FROM members WHERE room_id = $1 ORDER BY username"
LIST_SEATS = "SELECT room_id FROM members WHERE username = $1 ORDER BY room_id"
LIST_OWN_ROOMS = """SELECT room_id FROM members m WHERE username = $1 AND role = 'owner'
  AND NOT EXISTS (SELECT 1 FROM members o WHERE o.room_id = m.room_id AND o.role = 'owner'
  AND o.username <> m.username) ORDER BY room_id"""
SET_ROLE = """INSERT INTO members (room_id, username, role, read_seq) VALUES ($1, $2, $3, $4)
  ON CONFLICT (room_id, username) DO UPDATE SET role = excluded.role"""
DROP_MEMBER = "DELETE FROM members WHERE room_id = $1 AND username = $2"
DROP_MEMBERS = "DELETE FROM members WHERE room_id = $1"
SET_READ = """UPDATE members SET read_seq = $3
  WHERE room_id = $1 AND username = $2 AND read_seq < $3"""
ADD_MEMBERS = """INSERT INTO members (room_id, username, role, read_seq) SELECT
  value ->> 'room_id', value ->> 'username', 'member', CAST(value ->> 'seq' AS BIGINT)
  FROM json_each($1)"""
LOCK = """WITH p AS (SELECT value FROM json_each($1)), r AS (SELECT 1 FROM rooms
  WHERE room_id IN (SELECT value ->> 'room_id' FROM p) ORDER BY room_id FOR UPDATE),
  u AS (SELECT 1 FROM users WHERE username IN (SELECT value ->> 'username' FROM p)
  ORDER BY username FOR UPDATE) SELECT (SELECT count(*) FROM r), (SELECT count(*) FROM u)"""
# What is known of users in rooms, and of what they sent under a client_id.
GET_SEATS = """WITH p AS MATERIALIZED (SELECT CAST(key AS BIGINT) AS number, value ->> 'room_id'
  AS room_id, value ->> 'username' AS username, value ->> 'client_id' AS client_id
  FROM json_each($1)) SELECT p.room_id, p.username,
  (SELECT r.kind FROM rooms r WHERE r.room_id = p.room_id AND r.kind <> 'deleted') AS kind,
  (SELECT coalesce(max(e.seq), 0) FROM events e WHERE e.room_id = p.room_id) AS seq,
  (SELECT u.version FROM users u WHERE u.username = p.username AND u.password IS NOT NULL)
  AS version,
  (SELECT m.role FROM members m WHERE m.room_id = p.room_id AND m.username = p.username) AS role,
  (SELECT e.json FROM events e WHERE e.room_id = p.room_id AND e.username = p.username
  AND e.client_id = p.client_id) AS sent FROM p ORDER BY p.number"""
# Python begins a transaction at an INSERT, not at a WITH: alone, this one commits itself.
ADD_EVENTS = """WITH p AS (SELECT value FROM json_each($1)) INSERT INTO events (room_id, seq, kind,
  username, created_at, target, client_id, folded, json) SELECT value ->> 'room_id',
  CAST(value ->> 'seq' AS BIGINT), value ->> 'kind', value ->> 'username',
  CAST(value ->> 'created_at' AS BIGINT), CAST(value ->> 'target' AS BIGINT),
  value ->> 'client_id', value ->> 'folded', value ->> 'json' FROM p"""
GET_MESSAGE = """SELECT username, json FROM events
  WHERE room_id = $1 AND seq = $2 AND folded IS NOT NULL"""
SET_MESSAGE = "UPDATE events SET json = $3, folded = $4 WHERE room_id = $1 AND seq = $2"
DROP_EVENTS = "DELETE FROM events WHERE room_id = $1 AND seq <= $2"
DROP_REMAINS = """DELETE FROM events
  WHERE room_id IN (SELECT room_id FROM rooms WHERE kind = 'deleted')"""
LIST_EVENTS = f"{EVENT} WHERE e.room_id = $1 AND e.seq > $2 ORDER BY e.seq LIMIT $3"
HISTORY = f"""{EVENT} WHERE e.kind = 'message' AND e.room_id = $1 AND e.seq > $2 AND e.seq < $3
  AND EXISTS (SELECT 1 FROM rooms r JOIN users u ON u.username = $5 AND u.version = $6
  LEFT JOIN members m ON m.room_id = r.room_id AND m.username = u.username
  WHERE r.room_id = $1 AND r.kind <> 'deleted' AND u.password IS NOT NULL AND {READABLE})"""
NEWEST = f"{HISTORY} ORDER BY e.seq DESC LIMIT $4"
OLDEST = f"{HISTORY} ORDER BY e.seq LIMIT $4"
SEARCH = f"""{EVENT} JOIN rooms r ON r.room_id = e.room_id AND r.kind <> 'deleted'
  LEFT JOIN members m ON m.room_id = e.room_id AND m.username = $1
  WHERE e.folded LIKE $2 ESCAPE '!' AND {READABLE} AND ($3 = '' OR e.room_id = $3)
  ORDER BY e.created_at DESC, e.room_id, e.seq DESC LIMIT $4"""

# -------------------------------- events
# An event is stored as the very JSON that clients get: who delivers it only joins texts. Only an
# edit is completed, with the text that its message has now.


def iso_time(milliseconds: int) -> str:
    """A stored time as ISO 8601 in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03}Z"


def show(event: Row) -> str:
    """An event as clients get it."""
    stored: str = event["json"]
    if event["kind"] != "edit":
        return stored
    message = json.loads(event["edited"] or "{}")
    text = {name: message[name] for name in ("message", "deleted") if name in message}
    return encode(json.loads(stored) | text)


def show_all(events: abc.Iterable[Row]) -> str:
    """Events as a JSON array."""
    return f"[{','.join(map(show, events))}]"


# ------------------------------- changes
# A change is one transaction. It locks rooms, then users, each by name, so that no two wait for
# each other; it checks what one may do, and adds events under the next numbers. It knows neither
# HTTP nor sockets.
RANKS = {"banned": 0, "stranger": 0, "visitor": 1, "member": 2, "moderator": 3, "owner": 4}


class Login(NamedTuple):
    """Whom a token names, its version, and when it ends."""

    username: str
    version: int
    expires: float


class Stored(NamedTuple):
    """The JSON of a post's event, and whether that was there before."""

    json: str
    retry: bool


Outcome = Stored | ChatError


class Post(NamedTuple):
    """A message on its way; `answer` takes its outcome."""

    login: Login
    seat: dict[str, Any]  # room_id, username and client_id
    message: str | None  # none: only joins
    answer: abc.Callable[[Outcome], None]


def check_version(version: int | None, me: Login) -> None:
    """Refuses a log-in that was ended."""
    if version != me.version:
        raise ChatError(401, "log in again: this log-in has ended")


def first(rows: Rows, missing: str) -> Row:
    """The first of some rows, or refuses."""
    if not rows:
        raise ChatError(404, f"there is no such {missing}")
    return rows[0]


def rank_of(role: str | None, kind: str | None, least: str = "visitor") -> int:
    """The rank of a role, or of none, in a room of a kind."""
    if kind is None:
        raise ChatError(404, "there is no such room")
    rank = RANKS[role or ("visitor" if kind == "public" else "stranger")]
    if rank < RANKS["visitor"]:
        raise ChatError(403, "this room is not open to you")
    if rank < RANKS[least]:
        raise ChatError(403, f"that takes the role of {least} in this room")
    return rank


def seats(room_ids: abc.Iterable[str | None], *usernames: str | None) -> list[Row]:
    """What GET_SEATS takes: each user in each room."""
    return [{"room_id": one, "username": name} for one in room_ids for name in usernames]


class Change:
    """One transaction: what it knows and what it adds to the log."""

    def __init__(self, fetch: Fetch, seats: Rows) -> None:
        self.fetch = fetch
        self.now = int(time.time() * 1000)
        self.iso_now = iso_time(self.now)
        self.rows = [dict(row) for row in seats]  # what is known, in the order asked
        self.seats = {(row["room_id"], row["username"]): row for row in self.rows}
        self.heads: dict[str, int] = {row["room_id"]: row["seq"] for row in self.rows}
        self.events: list[dict[str, Any]] = []
        self.notes: list[Note] = []  # for every process, once this is on disk

    def enter(self, room_id: str, username: str, least: str = "visitor") -> int:
        """The rank of a user in a room; refuses one below `least`."""
        seat = self.seats[room_id, username]
        return rank_of(seat["role"], seat["kind"], least)

    async def set_role(self, room_id: str, username: str, member: str, role: str | None) -> None:
        """Makes a membership what it shall be."""
        if self.seats[room_id, member]["version"] is None:
            raise ChatError(404, "there is no such user")
        seq = self.add(room_id, "member", username, member=member, role=role)["seq"]
        if role:
            await self.fetch(SET_ROLE, room_id, member, role, seq)
        else:
            await self.fetch(DROP_MEMBER, room_id, member)

    def add(self, room_id: str, kind: str, username: str, **fields: Any) -> dict[str, Any]:
        """Adds an event under the room's next number."""
        self.heads[room_id] += 1
        event = {"room_id": room_id, "seq": self.heads[room_id], "username": username}
        shown = {"type": kind, **event, "created_at": self.iso_now, **fields}
        event |= {"kind": kind, "created_at": self.now, "json": encode(shown)}
        event |= {"target": fields.get("target"), "client_id": fields.get("client_id")}
        event["folded"] = fold(fields["message"]) if kind == "message" else None
        self.events.append(event)
        return event


def check_role(change: Change, room_id: str, me: str, member: str, role: str | None) -> None:
    """Refuses a change that one may not make."""
    mine = change.enter(room_id, me)
    seat = change.seats[room_id, member]
    old = RANKS[seat["role"] or "visitor"]
    new = RANKS[role or "visitor"]
    if seat["kind"] == "direct":
        raise ChatError(403, "a direct room keeps its two members")
    if me == member:
        allowed = RANKS["visitor"] <= new <= max(mine, RANKS["member"])
    elif mine == RANKS["moderator"]:
        allowed = old < mine and new < mine
    else:
        allowed = mine == RANKS["owner"]
    if not allowed:
        raise ChatError(403, "that takes a higher role in this room")


async def check_owners(change: Change, member: str, room_ids: abc.Sequence[str]) -> None:
    """Refuses to let the last owner of a room go."""
    alone = [row["room_id"] for row in await change.fetch(LIST_OWN_ROOMS, member)]
    if last := [room_id for room_id in alone if room_id in room_ids]:
        raise ChatError(409, f"first give {', '.join(last)} another owner, or delete it")


def post_one(change: Change, post: Post, before: str | None) -> Stored:
    """Adds a message, and its author to the room."""
    room_id, username, client_id = post.seat.values()
    seat = change.seats[room_id, username]
    check_version(seat["version"], post.login)
    rank = change.enter(room_id, username)
    if before:
        event = json.loads(before)
        if "edited_at" not in event and event.get("message", post.message) != post.message:
            raise ChatError(409, "this client_id was sent with another text")
        return Stored(before, retry=True)
    if rank == RANKS["visitor"]:
        seat["role"] = "member"
        change.add(room_id, "member", username, member=username, role="member")
    if post.message is None:
        return Stored("", retry=False)
    fields = {"client_id": client_id} if client_id else {}
    event = change.add(room_id, "message", username, **fields, message=post.message)
    return Stored(event["json"], retry=False)


async def post_all(change: Change, posts: abc.Sequence[Post]) -> list[Outcome]:
    """Adds messages; returns their outcomes."""
    sent: dict[tuple[Any, ...], str] = {}  # earlier in this batch
    outcomes: list[Outcome] = []
    for post, row in zip(posts, change.rows, strict=True):
        key = tuple(post.seat.values())
        try:
            stored = post_one(change, post, sent.get(key, row["sent"]))
            outcomes.append(stored)
            if post.seat["client_id"]:
                sent[key] = stored.json
        except ChatError as error:
            outcomes.append(error)
    joined = [event for event in change.events if event["kind"] == "member"]
    if joined:
        await change.fetch(ADD_MEMBERS, document(joined))
    return outcomes


# ----------------------------------- hub
# Who is connected, and how events reach every socket once, in order. Each has a cursor in its log:
# the last seq that it was handed. Whoever has the page that follows a cursor hands it to all who
# stand there, awaiting nothing: a commit to those at the end, a reader of the log to those who are
# behind. So live, replay and catching up are one thing, and nothing is skipped or repeated.
PING = 25  # seconds from one ping to the next
SILENCE = 40  # seconds after which a silent peer is dropped
STALL = 15  # seconds after which who reads nothing is cut off
LOGIN_WAIT = 10  # seconds that a socket may take to log in
PEER_SILENCE = 5  # seconds after which a process is gone
UNSENT = 2**18  # bytes that may wait in a socket
PAGE_EVENTS = 500  # events that are read at once
PAGE_BYTES = 2**16  # bytes after which a page is cut
QUIET_ABOVE = 100  # people online: with more nothing is whispered
HERE = "here"  # the name of this process


def to_frame(payload: bytes, opcode: int = WSMsgType.TEXT) -> bytes:
    """One whole unmasked frame (RFC 6455 5.2)."""
    size = len(payload)  # below 64 KiB: a message has 10,000 characters
    if size < 126:
        return bytes([0x80 | opcode, size]) + payload
    return bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big") + payload


class Page(NamedTuple):
    """A stretch of a log, which may end with a removal."""

    start: int  # the seq before its first event
    end: int
    frames: bytes
    removed: str | None


def to_pages(events: Rows) -> abc.Iterator[Page]:
    """Yields events as pages, cut when long and after a removal."""
    frames = bytearray()
    start = events[0]["seq"] - 1
    for event in events:
        frames += to_frame(show(event).encode())
        removed = None
        if event["kind"] == "member":
            fields = json.loads(event["json"])
            removed = fields["member"] if fields["role"] in (None, "banned") else None
        if removed or len(frames) > PAGE_BYTES or event is events[-1]:
            yield Page(start, event["seq"], bytes(frames), removed)
            frames.clear()
            start = event["seq"]


class Socket:
    """One connection, in a room once it has a log-in."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.login: Login | None = None
        self.username: str | None = None
        self.room: Room | None = None
        self.entered = 0  # the seq at which it came: who was removed before is back
        self.cursor: int | None = None  # up to which seq it has the log
        self.closed = False
        self.opened = self.heard = self.pinged = self.moved = monotonic()
        self.written = 0  # bytes, of which `taken` had left at the last look
        self.taken = 0

    def is_full(self) -> bool:
        """Tells whether it should get nothing more for now."""
        return self.transport.get_write_buffer_size() > UNSENT

    def write(self, data: bytes) -> None:
        """Writes frames, but none after the close frame."""
        if not self.closed and not self.transport.is_closing():
            self.written += len(data)
            self.transport.write(data)

    def send(self, item: Row) -> None:
        """Encodes and writes an item."""
        self.write(to_frame(encode(item).encode(errors="replace")))

    def close(self, code: int, reason: str, linger: float = 2) -> None:
        """Sends a close frame, and soon cuts whatever the peer does."""
        if not self.closed:
            payload = code.to_bytes(2, "big") + reason.encode()[:120]
            self.write(to_frame(payload, WSMsgType.CLOSE))
            self.closed = True
            asyncio.get_running_loop().call_later(linger, self.cut)

    def cut(self) -> None:
        """Ends the connection, if it has not (CPython 3.11 fails)."""
        with suppress(AttributeError):
            self.transport.abort()

    def sweep(self, now: float) -> None:
        """Ends what has expired, stalled or fallen silent."""
        waiting = self.transport.get_write_buffer_size()
        taken = self.written - waiting
        if taken != self.taken or not waiting:
            self.taken = taken
            self.moved = now
        if self.login is None and now - self.opened > LOGIN_WAIT:
            self.close(4401, "no log-in came within 10 s")
        elif self.login and time.time() > self.login.expires:
            self.close(4401, "the token has expired")
        elif now - self.moved > STALL:
            self.close(4408, "too slow: resume from your last seq")
        elif now - self.heard > SILENCE:
            self.cut()
        elif now - self.pinged > PING:
            self.pinged = now
            self.write(to_frame(b"", WSMsgType.PING))


class Room:
    """A room in which somebody is connected."""

    def __init__(self, room_id: str) -> None:
        self.room_id = room_id
        self.head = 0  # the highest seq heard of
        self.sockets: set[Socket] = set()
        self.readers: dict[int, asyncio.Task[None]] = {}  # by cursor


class Hub:
    """The rooms and sockets of this process, and who is online."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.rooms: dict[str, Room] = {}
        self.sockets: set[Socket] = set()
        self.users: defaultdict[str, set[Socket]] = defaultdict(set)
        self.online: defaultdict[str, dict[str, set[str]]] = defaultdict(dict)
        self.peers: dict[str, float] = {}  # when each was heard

    def enter(self, socket: Socket, me: Login, room_id: str) -> None:
        """Makes a socket known to whatever ends it."""
        room = self.rooms.setdefault(room_id, Room(room_id))
        room.sockets.add(socket)
        self.users[me.username].add(socket)
        socket.login = me
        socket.username = me.username
        socket.room = room

    def leave(self, socket: Socket) -> None:
        """Forgets a socket, and what only it needed."""
        self.sockets.discard(socket)
        room = socket.room
        if room and socket.username:
            room.sockets.discard(socket)
            others = self.users[socket.username]
            others.discard(socket)
            if not any(other.room is room for other in others):
                self.see(HERE, room.room_id, socket.username, online=False)
            if not others:
                del self.users[socket.username]
            if not room.sockets:
                del self.rooms[room.room_id]

    def publish(self, events: abc.Iterable[Row]) -> None:
        """Hands on what was added to logs, here and elsewhere."""
        by_room = defaultdict(list)
        for event in events:
            by_room[event["room_id"]].append(event)
        for room_id, added in by_room.items():
            if room_id in self.rooms:
                self.hand(self.rooms[room_id], added)
            self.notice(room_id, added[-1]["seq"])
            self.db.tell("head", room_id, added[-1]["seq"])

    def hand(self, room: Room, events: Rows) -> None:
        """Hands a stretch of a log to all who stand before it."""
        for start, end, frames, removed in to_pages(events):
            for socket in room.sockets:
                if socket.cursor == start and not socket.is_full():
                    socket.write(frames)
                    socket.cursor = end
                    if removed == socket.username and end > socket.entered:
                        socket.close(4403, "you are no longer in this room")

    def notice(self, room_id: str, head: int) -> None:
        """Notes how far a log goes, for who is behind."""
        room = self.rooms.get(room_id)
        if room:
            room.head = max(room.head, head)
            for cursor in {one.cursor for one in room.sockets if not one.closed}:
                if cursor is not None and cursor < room.head and cursor not in room.readers:
                    room.readers[cursor] = asyncio.create_task(self.read_on(room, cursor))

    async def read_on(self, room: Room, cursor: int) -> None:
        """Hands on what follows a cursor while somebody stands there."""
        pause = 0.005
        try:
            while behind := [s for s in room.sockets if s.cursor == cursor and not s.closed]:
                page: Rows = []
                if not all(socket.is_full() for socket in behind):
                    with suppress(ChatError):  # the database is away
                        page = await self.db.fetch(LIST_EVENTS, room.room_id, cursor, PAGE_EVENTS)
                if page and page[0]["seq"] == cursor + 1:
                    self.hand(room, page)
                    self.notice(room.room_id, room.head)
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.2)
        finally:
            del room.readers[cursor]

    def whisper(self, item: Row) -> None:
        """Tells others what is never stored, if few are here."""
        room = self.rooms.get(item["room_id"])
        if room and len(self.online.get(room.room_id, ())) <= QUIET_ABOVE:
            frame = to_frame(encode(item).encode())
            for socket in room.sockets:
                other = socket.cursor is not None and socket.username != item["username"]
                if other and not socket.is_full():
                    socket.write(frame)

    def see(self, process: str, room_id: str, username: str, *, online: bool) -> None:
        """Notes who came or went; whispers what is new."""
        room = self.online[room_id]
        before = room.get(username, set())
        room[username] = before | {process} if online else before - {process}
        if bool(before) != bool(room[username]):
            item = {"type": "presence", "room_id": room_id, "username": username, "online": online}
            self.whisper(item)
        if not room[username]:
            del room[username]
        if not room:
            del self.online[room_id]
        if process == HERE:
            self.db.tell("presence", room_id, username, online)

    def forget_peers(self, silence: float) -> None:
        """Takes silent processes as gone."""
        now = monotonic()
        for process in [peer for peer, heard in self.peers.items() if now - heard > silence]:
            del self.peers[process]
            for room_id, usernames in list(self.online.items()):
                for username in [name for name, seen in usernames.items() if process in seen]:
                    self.see(process, room_id, username, online=False)

    def hear(self, process: str, note: Note) -> None:
        """Does what a process tells."""
        match note:
            case ["begin"]:
                self.forget_peers(0)
            case ["alive"]:
                if process not in self.peers:
                    self.db.tell("who is there")
                self.peers[process] = monotonic()
            case ["who is there"]:
                for socket in self.sockets:
                    if socket.room and socket.cursor is not None:
                        self.db.tell("presence", socket.room.room_id, socket.username, True)
            case ["presence", room_id, username, online]:
                self.see(process, room_id, username, online=online)
            case ["head", room_id, seq]:
                self.notice(room_id, seq)
            case ["whisper", item]:
                self.whisper(item)
            case ["room ended", room_id, *_] if room_id in self.rooms:
                for socket in self.rooms[room_id].sockets:
                    socket.close(4404, "this room was deleted")
            case ["log-ins ended", username, version]:
                for socket in self.users.get(username, ()):
                    if socket.login and (version is None or socket.login.version < version):
                        socket.close(4401, "this log-in has ended")


# ---------------------------------- chat
# What all operations share: log-ins, the queue and its writer, and tasks that run all the time.
# It knows no routes and no frames.
BATCH = 250  # messages in one transaction
QUEUE = 10_000  # messages that wait for one
POLL = 2  # seconds between looks into the database
HASHES = 32  # passwords hashed or waiting
MISTAKE = "the server made a mistake, which is logged"


def keep_secret(path: Path) -> str:
    """The key in a file, made at the first call."""
    if not path.exists():
        draft = path.with_name(path.name + ".new")
        draft.touch(0o600)
        draft.write_text(secrets.token_hex(32))
        draft.replace(path)
    key = path.read_text().strip()
    if len(key) < 32:
        raise SystemExit(f"chatserver: {path}: no key; delete it for a new one")
    return key


class Chat:
    """The server without its routes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.key = config.secret_key
        engine = Postgres if config.database_url.startswith("postgres") else SQLite
        self.db: Database = engine(config.database_url)
        self.hub = Hub(self.db)
        self.decoded = lru_cache(10_000)(self.decode)
        self.epoch = ""
        self.stopping = False
        self.writing = asyncio.Lock()
        self.queue: asyncio.Queue[Post] = asyncio.Queue(QUEUE)
        self.hashers = asyncio.Semaphore(2)
        self.hashing = 0
        self.searches = asyncio.Semaphore(2)  # so that there are connections for others
        self.messages = Limiter("messages", config.messages_per_second, 1, times=2)
        self.frames = Limiter("frames", 20, 1, times=5)
        self.logins = Limiter("failed log-ins", config.logins_per_minute, 60)
        self.registrations = Limiter("registrations", config.registrations_per_hour, 3600)

    @asynccontextmanager
    async def opened(self) -> abc.AsyncIterator[None]:
        """Opens the database, finds key and epoch; closes it."""
        try:
            await self.db.open((FOLDER / "schema.sql").read_text("utf-8"))
            if isinstance(self.db, SQLite) and not self.key:
                self.key = keep_secret(Path(self.db.path + ".secret"))
            async with self.db.transaction() as fetch:
                self.epoch = (await fetch(GET_EPOCH, secrets.token_hex(8)))[0]["value"]
            with suppress(ChatError):
                async with self.db.transaction() as fetch:
                    await fetch(DROP_REMAINS)
            yield
        finally:
            await self.db.close()

    async def run(self, _: web.Application) -> abc.AsyncIterator[None]:
        """Runs tasks from start to end."""
        works: dict[Any, float] = {self.write_batch: 0, self.sweep: 1, self.poll: POLL}
        if isinstance(self.db, Postgres):
            works[partial(self.db.exchange, self.hub.hear)] = 1
        async with self.opened():
            tasks = [asyncio.create_task(self.keep(work, wait)) for work, wait in works.items()]
            yield
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)

    async def keep(self, work: Any, wait: float) -> None:
        """Does something again and again."""
        while True:
            try:
                with suppress(ChatError):  # the database is away, which is logged
                    await work()
            except Exception:
                LOGGER.exception("a task failed")
            await asyncio.sleep(wait)

    async def stop(self, _: web.Application) -> None:
        """Stores what was accepted, closes all sockets."""
        self.stopping = True
        deadline = monotonic() + 1.5
        while (self.writing.locked() or not self.queue.empty()) and monotonic() < deadline:
            await asyncio.sleep(0.01)
        for socket in self.hub.sockets:
            socket.close(1001, "shutting down")

    @asynccontextmanager
    async def change(self, asked: Rows, me: Login | None = None) -> abc.AsyncIterator[Change]:
        """Makes one change at a time, and publishes it once on disk."""
        async with self.writing, self.db.transaction() as fetch:
            wanted = document(asked)
            if isinstance(self.db, Postgres):  # SQLite's writer has the whole file
                await fetch(LOCK, wanted)
            change = Change(fetch, await fetch(GET_SEATS, wanted))
            if me:
                check_version(change.rows[0]["version"], me)
            yield change
            if change.events:
                await fetch(ADD_EVENTS, document(change.events))
            if isinstance(self.db, Postgres):
                for note in change.notes:  # from "", so that all hear it
                    await fetch(self.db.notify, encode(["", note]))
        self.hub.publish(change.events)
        for note in change.notes:
            self.hub.hear(HERE, note)

    def submit(self, post: Post) -> None:
        """Queues a post."""
        if self.stopping or self.queue.full():
            raise ChatError(503, "too much waits", retry_after=1)
        self.queue.put_nowait(post)

    async def write_batch(self) -> None:
        """Stores together what came meanwhile."""
        posts = [await self.queue.get()]
        await asyncio.sleep(0)  # others come just now
        while len(posts) < BATCH and not self.queue.empty():
            posts.append(self.queue.get_nowait())
        outcomes: list[Outcome]
        try:
            async with self.change([post.seat for post in posts]) as change:
                outcomes = await post_all(change, posts)
        except ChatError as error:
            outcomes = [ChatError(503, str(error), retry_after=2) for _ in posts]
        except Exception:
            LOGGER.exception("a batch failed")
            outcomes = [ChatError(500, MISTAKE) for _ in posts]
        for post, outcome in zip(posts, outcomes, strict=True):
            asyncio.get_running_loop().call_soon(post.answer, outcome)

    async def sweep(self) -> None:
        """Does what only the time asks for."""
        now = monotonic()
        for socket in self.hub.sockets:
            socket.sweep(now)
        self.hub.forget_peers(PEER_SILENCE)
        for limiter in (self.messages, self.frames, self.logins, self.registrations):
            limiter.forget()

    async def poll(self) -> None:
        """Looks into the database, should a note be lost."""
        for row in await self.db.fetch(GET_SEATS, document(seats(self.hub.rooms, None))):
            kind = "head" if row["kind"] else "room ended"
            self.hub.hear(HERE, (kind, row["room_id"], row["seq"]))
        for row in await self.db.fetch(GET_SEATS, document(seats([None], *self.hub.users))):
            self.hub.hear(HERE, ("log-ins ended", row["username"], row["version"]))

    async def hash(self, password: str, salt: bytes, parameters: str) -> str:
        """Hashes a password on one of two threads."""
        if self.hashing >= HASHES:
            raise ChatError(503, "too many log-ins at once", retry_after=2)
        self.hashing += 1
        try:
            async with self.hashers:
                return await asyncio.to_thread(hash_password, password, salt, parameters)
        finally:
            self.hashing -= 1

    async def hash_new(self, password: str) -> str:
        """The hash of a new password."""
        least = self.config.password_min_length
        if not least <= len(password.encode()) <= 1024:
            raise ChatError(400, f"a password should have {least} to 1024 bytes")
        return await self.hash(password, secrets.token_bytes(16), SCRYPT)

    async def verify(self, account: str, data: Fields, refusal: ChatError) -> Row:
        """Who has this account and password; or refuses, in equal time."""
        self.logins.take(data.address)  # before: many at once cannot pass
        rows = await self.db.fetch(GET_USER, account)
        stored = rows[0]["password"] if rows else f"{SCRYPT}$00$00"  # nobody's takes as long
        parameters, salt, _ = stored.rsplit("$", 2)
        hashed = await self.hash(data.text("password"), bytes.fromhex(salt), parameters)
        if not secrets.compare_digest(hashed, stored):
            raise refusal
        self.logins.take(data.address, -1)
        return dict(rows[0])

    def make_token(self, user: Row) -> dict[str, Any]:
        """A fresh token, as OAuth2 clients want it."""
        seconds = self.config.access_token_expire_minutes * 60
        now = int(time.time())
        claims = {"sub": user["username"], "ver": user["version"], "iat": now, "exp": now + seconds}
        token = jwt.encode(claims, self.key, self.config.algorithm)
        return {"access_token": token, "token_type": "bearer", "expires_in": seconds}

    def decode(self, token: str) -> Login:
        """Whom a token of ours names."""
        options: Any = {"require": ["exp", "iat", "sub"], "verify_iat": False}  # clocks go back
        try:
            claims = jwt.decode(token, self.key, [self.config.algorithm], options)
            username = Fields({"username": claims["sub"]}).text("username")
            return Login(username, claims["ver"], int(claims["exp"]))
        except (jwt.InvalidTokenError, ChatError, LookupError, ValueError, RecursionError) as error:
            raise ChatError(401, f"log in again: {error}") from None

    def read_token(self, token: object) -> Login:
        """Whom a token of ours names, as long as it lasts."""
        login = self.decoded(str(token)[:2000])
        if login.expires < time.time():
            raise ChatError(401, "log in again: the token has expired")
        return login

    async def visit(self, me: Login, room_id: str | None = None) -> Row:
        """The caller's seat; refuses who is out."""
        seat: Row = (await self.db.fetch(GET_SEATS, document(seats([room_id], me.username))))[0]
        check_version(seat["version"], me)
        if room_id is not None:
            rank_of(seat["role"], seat["kind"])
        return seat

    def check_capacity(self, me: Login | None = None) -> None:
        """Refuses one socket too many, in all or of a user."""
        if me and 0 < self.config.sockets_per_user <= len(self.hub.users.get(me.username, ())):
            raise ChatError(429, "too many sockets of one user, wait 10 s", retry_after=10)
        full = 0 < self.config.sockets <= len(self.hub.sockets)
        if not me and (full or self.stopping):
            raise ChatError(503, "the server is full", retry_after=10)


# ---------------------------- operations
# What users can do. An operation takes the server, who asks, and the fields, wherever they are
# from. It returns what is answered, and knows no transport.
Operation = abc.Callable[[Chat, Any, Fields], abc.Awaitable[Any]]
DIRECT = "direct_"  # begins the ids of direct rooms, which no other room has


def show_user(row: Row) -> dict[str, Any]:
    """A user as others see them."""
    return {"username": row["username"], "created_at": iso_time(row["created_at"])}


async def list_users(chat: Chat, me: Login, data: Fields) -> Any:
    """Lists users by name."""
    await chat.visit(me)
    rows = await chat.db.fetch(LIST_USERS, data.text("after", ""), data.limit())
    return [show_user(row) for row in rows]


async def get_user(chat: Chat, me: Login, data: Fields) -> Any:
    """A user; `me` is the caller, who alone sees the e-mail address."""
    await chat.visit(me)
    mine = data.raw["username"] == "me"
    username = me.username if mine else data.text("username")
    row = first(await chat.db.fetch(GET_USER, username), "user")
    return show_user(row) | ({"email": row["email"]} if mine else {})


async def register(chat: Chat, _: None, data: Fields) -> Any:
    """Adds an account; the first one owns the Lobby."""
    username = data.text("username")
    email = data.text("email")
    if chat.config.registration == "closed":
        raise ChatError(403, "registration is closed")
    chat.registrations.take(data.address)
    hashed = await chat.hash_new(data.text("password"))
    async with chat.change(seats(["1"], username)) as change:
        if not await change.fetch(ADD_USER, username, email, hashed, change.now):
            raise ChatError(409, "this name or e-mail address is taken")
        change.seats["1", username]["version"] = 0
        if change.seats["1", username]["kind"] and change.heads["1"] == 0:
            await change.set_role("1", username, username, "owner")
    return show_user({"username": username, "created_at": change.now}) | {"email": email}, 201


async def log_in(chat: Chat, _: None, data: Fields) -> Any:
    """Logs in by OAuth2's password grant (RFC 6749 4.3)."""
    if data.text("grant_type", "password") != "password":
        raise ChatError(400, "grant_type should be password", "unsupported_grant_type")
    account = data.text("username", any_text=True).strip()
    refusal = ChatError(400, "wrong name or password", "invalid_grant")
    return chat.make_token(await chat.verify(account, data, refusal))


async def check_health(chat: Chat, _: None, __: Fields) -> Any:
    """Tells whether the database answers."""
    async with chat.change([]):
        return {"status": "ok"}


async def renew(chat: Chat, me: Login, _: Fields) -> Any:
    """A fresh token for one that is still good."""
    await chat.visit(me)
    return chat.make_token({"username": me.username, "version": me.version})


async def end_logins(change: Change, me: Login, sql: str, *values: Any) -> None:
    """Voids every token of the caller by a statement."""
    await change.fetch(sql, me.username, *values)
    change.notes.append(("log-ins ended", me.username, me.version + 1))


async def log_out(chat: Chat, me: Login, _: Fields) -> None:
    """Voids every token of the caller."""
    async with chat.change(seats([None], me.username), me) as change:
        await end_logins(change, me, VOID_TOKENS)


async def change_password(chat: Chat, me: Login, data: Fields) -> None:
    """Changes the caller's password and voids every token."""
    await chat.verify(me.username, data, ChatError(403, "wrong password"))
    hashed = await chat.hash_new(data.text("new_password"))
    async with chat.change(seats([None], me.username), me) as change:
        await end_logins(change, me, CHANGE_USER, hashed)


async def delete_me(chat: Chat, me: Login, data: Fields) -> None:
    """Empties the caller's account, who leaves all rooms."""
    await chat.verify(me.username, data, ChatError(403, "wrong password"))
    room_ids = [row["room_id"] for row in await chat.db.fetch(LIST_SEATS, me.username)]
    async with chat.change(seats([None, *room_ids], me.username), me) as change:
        await check_owners(change, me.username, room_ids)
        for row in await change.fetch(LIST_SEATS, me.username):
            if (row["room_id"], me.username) not in change.seats:
                raise ChatError(503, "you have just joined another room, try again", retry_after=1)
            await change.set_role(row["room_id"], me.username, me.username, None)
        await end_logins(change, me, CLOSE_USER)


async def list_rooms(chat: Chat, me: Login, _: Fields) -> Any:
    """Lists public rooms and the caller's own."""
    await chat.visit(me)
    return [dict(row) for row in await chat.db.fetch(LIST_ROOMS, me.username)]


async def get_room(chat: Chat, me: Login, data: Fields) -> Any:
    """A room and its members, the banned only to moderators."""
    room_id = data.text("room_id")
    seat = await chat.visit(me, room_id)
    room = first(await chat.db.fetch(GET_ROOM, me.username, room_id), "room")
    members = [dict(row) for row in await chat.db.fetch(LIST_MEMBERS, room_id)]
    if rank_of(seat["role"], seat["kind"]) < RANKS["moderator"]:
        members = [member for member in members if member["role"] != "banned"]
    return {**room, "members": members}


async def create_room(chat: Chat, me: Login, data: Fields) -> Any:
    """Makes a room, or finds two users' direct room."""
    chat.messages.take(me.username)
    kind = data.text("kind", "public")
    roles = {me.username: "owner"}
    if kind == "direct":
        pair = sorted([me.username, data.text("username")])
        roles = dict.fromkeys(pair, "member")
        name = ", ".join(pair)
        room_id = DIRECT + hashlib.sha256(name.encode()).hexdigest()[:32]
    else:
        room_id = data.text("room_id", "")
        name = data.text("name", room_id or None)
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "room"
        room_id = room_id or f"{slug}-{secrets.token_hex(4)}"
    if room_id.startswith(DIRECT) and len(roles) < 2:
        raise ChatError(400, "this is for direct rooms, of two users")
    others = [name for name in roles if name != me.username]
    async with chat.change(seats([room_id], me.username, *others), me) as change:
        added = await change.fetch(ADD_ROOM, room_id, name, kind)
        if not added and kind != "direct":
            raise ChatError(409, "this room_id is, or was, another room's")
        if added:
            for username, role in roles.items():
                await change.set_role(room_id, me.username, username, role)
    return await get_room(chat, me, Fields({"room_id": room_id})), 201 if added else 200


async def delete_room(chat: Chat, me: Login, data: Fields) -> None:
    """Deletes a room and what was said; its id stays taken."""
    room_id = data.text("room_id")
    chat.messages.take(me.username)
    async with chat.change(seats([room_id], me.username), me) as change:
        change.enter(room_id, me.username, "owner")
        await change.fetch(CLOSE_ROOM, room_id)
        await change.fetch(DROP_MEMBERS, room_id)
        change.notes.append(("room ended", room_id))
    for seq in range(2000, change.heads[room_id] + 2000, 2000):  # others come in between
        async with chat.change([]) as step:
            await step.fetch(DROP_EVENTS, room_id, seq)


async def set_member(chat: Chat, me: Login, data: Fields, *, leave: bool = False) -> Any:
    """Gives a role, by default the present one, or none (leave)."""
    room_id = data.text("room_id")
    member = data.text("username")
    wanted = data.text("role", "")
    chat.messages.take(me.username)
    async with chat.change(seats([room_id], me.username, member), me) as change:
        before = change.seats[room_id, member]["role"]
        role = None if leave else wanted or before or "member"
        check_role(change, room_id, me.username, member, role)
        if leave and not before:
            raise ChatError(404, "there is no such member")
        if before == "owner" and role != "owner":
            await check_owners(change, member, [room_id])
        if role != before:
            await change.set_role(room_id, me.username, member, role)
    return None if leave else {"username": member, "role": role}


drop_member = partial(set_member, leave=True)  # leaves, removes somebody, or lifts a ban


async def list_messages(chat: Chat, me: Login, data: Fields) -> Any:
    """A page of history, oldest first; by default the newest."""
    room_id = data.text("room_id")
    bounds = (data.number("after", 0), data.number("before", LARGEST), data.limit())
    newest = "after" not in data.raw or "before" in data.raw
    sql = NEWEST if newest else OLDEST
    rows = await chat.db.fetch(sql, room_id, *bounds, me.username, me.version)
    if not rows:  # there is nothing, or this refuses
        await chat.visit(me, room_id)
    return show_all(reversed(rows) if newest else rows)


async def search(chat: Chat, me: Login, data: Fields) -> Any:
    """Finds messages that hold a text, newest first."""
    pattern = "%" + re.sub("([!%_])", r"!\1", fold(data.text("q"))) + "%"
    room_id = data.text("room_id", "")
    limit = data.limit()
    await chat.visit(me, room_id or None)
    async with chat.searches:
        return show_all(await chat.db.fetch(SEARCH, me.username, pattern, room_id, limit))


def check_length(chat: Chat, data: Fields) -> str:
    """The text of a message, if it is not too long."""
    message = data.text("message")
    if len(message) > chat.config.message_length:
        raise ChatError(400, f"message: is over {chat.config.message_length} characters")
    return message


def submit_message(
    chat: Chat, me: Login, data: Fields, answer: abc.Callable[[Outcome], None]
) -> None:
    """Queues a message; `answer` takes its outcome."""
    seat = {"room_id": data.text("room_id"), "username": me.username}
    seat["client_id"] = data.text("client_id", "")
    message = check_length(chat, data)
    chat.messages.take(me.username)
    chat.submit(Post(me, seat, message, answer))


async def outcome_of(submit: abc.Callable[..., None]) -> Stored:
    """Waits for what becomes of a post."""
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    submit(future.set_result)
    outcome = await asyncio.shield(future)
    if isinstance(outcome, ChatError):
        raise outcome
    return outcome


async def post_message(chat: Chat, me: Login, data: Fields) -> Any:
    """Posts a message; for a retry, 200 and the first event."""
    stored = await outcome_of(partial(submit_message, chat, me, data))
    return stored.json, 200 if stored.retry else 201


async def edit_message(chat: Chat, me: Login, data: Fields, *, erase: bool = False) -> Any:
    """Edits one's own message; or erases it, or a moderator does."""
    room_id = data.text("room_id")
    target = data.number("target")
    message = None if erase else check_length(chat, data)
    chat.messages.take(me.username)
    async with chat.change(seats([room_id], me.username), me) as change:
        rank = change.enter(room_id, me.username)
        row = first(await change.fetch(GET_MESSAGE, room_id, target), "message")
        if row["username"] != me.username and not (erase and rank >= RANKS["moderator"]):
            raise ChatError(403, "this message is somebody else's")
        event = json.loads(row["json"])
        if message:
            event |= {"message": message, "edited_at": change.iso_now}
        else:
            event["deleted"] = True
            del event["message"]
        folded = fold(message) if message else None
        await change.fetch(SET_MESSAGE, room_id, target, encode(event), folded)
        kind = "edit" if message else "delete"
        change.add(room_id, kind, me.username, target=target)["edited"] = encode(event)
    return None if erase else event


delete_message = partial(edit_message, erase=True)


async def mark_read(chat: Chat, me: Login, data: Fields) -> None:
    """Moves the caller's read marker forward."""
    room_id = data.text("room_id")
    chat.frames.take(me.username)
    seat = await chat.visit(me, room_id)
    rank_of(seat["role"], seat["kind"], "member")
    seq = min(data.number("seq"), seat["seq"])
    async with chat.change(seats([None], me.username), me) as change:
        await change.fetch(SET_READ, room_id, me.username, seq)


# ---------------------------------- HTTP
# Collects an operation's fields from path, query or body, and answers in JSON.
# It decides nothing.
OPEN = (register, log_in, check_health)  # the operations that need no log-in
CHAT = web.AppKey("chat", Chat)
BODY_WAIT = 10  # seconds that a body may take
BODY = 2**16  # bytes that a body or a frame may have


def answer(data: Any = None, status: int = 200) -> web.Response:
    """JSON, or 204 for nothing."""
    if data is None:
        return web.Response(status=204)
    text = data if isinstance(data, str) else encode(data)  # text is JSON already
    headers = {"Cache-Control": "no-store"}
    return web.json_response(text=text, status=status, headers=headers)


def address_of(request: web.Request) -> str:
    """Who asks, as our outermost proxy saw it; of IPv6 the network."""
    seen = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
    proxies = request.app[CHAT].config.proxies
    source = seen[-proxies].strip() if 0 < proxies <= len(seen) else request.remote or ""
    if source.count(":") == 1 or "]:" in source:  # address:port or [address of IPv6]:port
        source = source.rpartition(":")[0]
    try:
        parsed = ipaddress.ip_address(source.strip("[]"))
    except ValueError:
        return source
    if isinstance(parsed, ipaddress.IPv4Address):
        return source
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed), 64), strict=False))


async def read_fields(request: web.Request, *, form: bool = False) -> Fields:
    """The fields of path and query, JSON body or form."""
    try:
        async with asyncio.timeout(BODY_WAIT):
            source = (await request.read()).decode()
    except TimeoutError:
        raise ChatError(408, "the body took too long") from None
    except (ValueError, web.RequestPayloadError):
        raise ChatError(400, "the body cannot be read") from None
    found: dict[str, Any] = {}
    if request.method in ("GET", "HEAD"):
        found.update(request.query)
    elif form and request.content_type == "application/x-www-form-urlencoded":
        found.update(parse_qsl(source, keep_blank_values=True))
    elif source and request.content_type != "application/json":
        raise ChatError(415, "the body should be application/json in UTF-8")
    elif source:
        found.update(parse_object(source))
    return Fields({**found, **request.match_info}, address_of(request))


def bearer(request: web.Request) -> str:
    """The token in the Authorization header."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise ChatError(401, "an Authorization: Bearer header is required")
    return token.strip()


async def over_http(operation: Operation, request: web.Request) -> web.StreamResponse:
    """Handles a request by an operation."""
    chat = request.app[CHAT]
    me = None if operation in OPEN else chat.read_token(bearer(request))
    data = await read_fields(request, form=operation is log_in)
    outcome = await operation(chat, me, data)
    return answer(*outcome) if isinstance(outcome, tuple) else answer(outcome)


async def show_file(path: Path, _: web.Request) -> web.StreamResponse:
    """Handles a request for a file."""
    return web.FileResponse(path, headers={"Cache-Control": "no-cache"})


# ----------------------------- WebSocket
# One coroutine a socket: log in, enter the room, then do what frames ask for. One that is refused
# is answered, and the socket lives on. What it gets is the hub's affair.
CHANGES: dict[str, Operation] = {"edit": edit_message, "delete": delete_message, "read": mark_read}


async def may_enter(chat: Chat, data: Fields, token: str) -> Login:
    """Who wants to enter; refuses while HTTP can say so."""
    me = chat.read_token(token)
    data.number("after", 0)
    await chat.visit(me, data.text("room_id"))
    chat.check_capacity(me)
    return me


async def enter(chat: Chat, socket: Socket, me: Login, data: Fields) -> None:
    """Joins if need be and says hello; the hub does the rest."""
    room_id = data.text("room_id")
    data.number("after", 0)  # a bad one is refused first
    chat.check_capacity(me)
    # Known before its seat is read: what ends log-in or room shows there, or finds the socket.
    chat.hub.enter(socket, me, room_id)
    seat = await chat.visit(me, room_id)
    if seat["role"] is None:
        chat.messages.take(me.username)
        mine = {"room_id": room_id, "username": me.username, "client_id": ""}
        await outcome_of(lambda answer: chat.submit(Post(me, mine, None, answer)))
        seat = await chat.visit(me, room_id)
        rank_of(seat["role"], seat["kind"], "member")
    seq = seat["seq"]
    chat.hub.see(HERE, room_id, me.username, online=True)
    head = {"room_id": room_id, "seq": seq, "epoch": chat.epoch}
    hello = {"type": "hello", **head, "username": me.username, "role": seat["role"]}
    socket.send(hello | {"online": sorted(chat.hub.online[room_id])[:QUIET_ABOVE]})
    cursor = data.number("after", seq)
    if cursor > seq or data.raw.get("epoch", chat.epoch) != chat.epoch:
        socket.send({"type": "reset", **head})
        cursor = seq
    socket.entered = seq
    socket.cursor = cursor
    chat.hub.notice(room_id, seq)


async def obey_first(chat: Chat, socket: Socket, frame: WSMessage, data: Fields) -> None:
    """Logs in by the first frame, as browsers must."""
    fields: Row = {}
    with suppress(ChatError):
        fields = parse_object(frame.data) if frame.type == WSMsgType.TEXT else {}
    if fields.get("type") != "auth":
        raise ChatError(401, "the first frame should be a log-in")
    await enter(chat, socket, chat.read_token(fields.get("token")), data)


def refuse_frame(socket: Socket, data: Fields, error: ChatError) -> None:
    """Answers an error, with what the frame may be known by."""
    item = {"type": "error", **error.body}
    for name, read in (("client_id", data.text), ("target", data.number)):
        with suppress(ChatError):
            item[name] = read(name)
    socket.send(item)


def answer_message(socket: Socket, data: Fields, outcome: Outcome) -> None:
    """Answers what was refused or sent before."""
    if isinstance(outcome, ChatError):
        refuse_frame(socket, data, outcome)
    elif outcome.retry:
        seq = json.loads(outcome.json)["seq"]
        socket.send({"type": "ack", "client_id": data.text("client_id"), "seq": seq})


def count_frame(chat: Chat, socket: Socket) -> None:
    """Closes a socket whose user sends too many frames."""
    try:
        chat.frames.take(socket.username or "")
    except ChatError:
        socket.close(4429, "flooding", linger=0.1)


async def obey_text(chat: Chat, socket: Socket, me: Login, frame: str, room_id: str) -> None:
    """Does what a text frame asks for, or answers why not."""
    data = Fields({})
    try:
        data = Fields(parse_object(frame) | {"room_id": room_id})
        kind = data.text("type", "message")
        if kind == "message":
            submit_message(chat, me, data, partial(answer_message, socket, data))
            return
        if kind == "typing":
            count_frame(chat, socket)
            item = {"type": "typing", "room_id": room_id, "username": me.username}
            chat.hub.whisper(item)
            chat.db.tell("whisper", item)
        else:
            await CHANGES[kind](chat, me, data)
    except ChatError as error:
        refuse_frame(socket, data, error)
        if error.status != 503:
            count_frame(chat, socket)


async def obey(chat: Chat, socket: Socket, frame: WSMessage, data: Fields) -> None:
    """Does what any frame asks for."""
    socket.heard = monotonic()
    me = socket.login
    if frame.type == WSMsgType.PING and not socket.is_full():
        socket.write(to_frame(frame.data, WSMsgType.PONG))
    if frame.type in (WSMsgType.PING, WSMsgType.PONG):
        if me:
            count_frame(chat, socket)
    elif me is None:
        await obey_first(chat, socket, frame, data)
    elif me.expires < time.time():
        socket.close(4401, "the token has expired")
    elif frame.type == WSMsgType.TEXT:
        await obey_text(chat, socket, me, frame.data, data.text("room_id"))
    else:
        socket.close(1003, "text frames only")


async def connect(request: web.Request) -> web.StreamResponse:
    """Takes a socket from its handshake to its end."""
    chat = request.app[CHAT]
    data = Fields({**request.query, **request.match_info})
    me = None
    chat.check_capacity()
    if "Authorization" in request.headers:
        me = await may_enter(chat, data, bearer(request))
    options: Any = {"autoclose": False, "autoping": False, "compress": False}
    ws = web.WebSocketResponse(max_msg_size=BODY + 1, **options)
    await ws.prepare(request)
    if request.transport is None:
        return ws
    kernel = request.transport.get_extra_info("socket")
    kernel.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 2**16)
    socket = Socket(request.transport)
    try:
        chat.check_capacity()
        chat.hub.sockets.add(socket)
        if me:
            await enter(chat, socket, me, data)
        async for frame in ws:
            if socket.closed:
                continue  # until the peer closes too
            await obey(chat, socket, frame, data)
    except ChatError as error:
        socket.close(1013 if error.status == 503 else 4000 + error.status, str(error))
    except Exception:
        LOGGER.exception("a socket failed")
        socket.close(1013, MISTAKE)
    finally:
        if not ws.closed:
            socket.close(1000, "")
        chat.hub.leave(socket)
        socket.transport.close()  # nothing follows a close frame
        asyncio.get_running_loop().call_later(2, socket.cut)
    return ws


# --------------------------- application
# What stands around every handler, the routes, and how the program starts and stops. It knows no
# rooms.
OPERATIONS: dict[str, dict[str, Operation]] = {
    "/auth/register": {"POST": register},
    "/auth/token": {"POST": log_in},
    "/auth/renew": {"POST": renew},
    "/auth/logout": {"POST": log_out},
    "/auth/password": {"POST": change_password},
    "/users": {"GET": list_users},
    "/users/me": {"DELETE": delete_me},
    "/users/{username}": {"GET": get_user},
    "/rooms": {"GET": list_rooms, "POST": create_room},
    "/rooms/{room_id}": {"GET": get_room, "DELETE": delete_room},
    "/rooms/{room_id}/members/{username}": {"PUT": set_member, "DELETE": drop_member},
    "/rooms/{room_id}/messages": {"GET": list_messages, "POST": post_message},
    "/rooms/{room_id}/messages/{target}": {"PATCH": edit_message, "DELETE": delete_message},
    "/rooms/{room_id}/read": {"PUT": mark_read},
    "/search": {"GET": search},
    "/healthz": {"GET": check_health},
}
PAGES = {"/": "index.html", "/docs": "docs.html", "/redoc": "docs.html"}
PAGES["/openapi.json"] = "openapi.json"
CSP = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
HEADERS = {"Server": "chatserver", "Referrer-Policy": "no-referrer"}
HEADERS |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": CSP}
CDN = "https://cdn.jsdelivr.net"
DOCS_CSP = f"; script-src 'self' {CDN}; style-src 'self' 'unsafe-inline' {CDN}; worker-src blob:"
CORS = {"Access-Control-Allow-Headers": "Authorization, Content-Type", "Vary": "Origin"}
CORS["Access-Control-Allow-Methods"] = "GET, POST, PUT, PATCH, DELETE"


def refuse(request: web.Request, error: ChatError) -> web.Response:
    """A refusal as JSON, with the headers that belong to it."""
    body = dict(error.body)
    if request.path.endswith("/auth/token"):
        body["error_description"] = body["detail"]  # RFC 6749 5.2
        if body["error"] == "bad_request":
            body["error"] = "invalid_request"
    response = answer(body, error.status)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if "retry_after" in body:
        response.headers["Retry-After"] = str(body["retry_after"])
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: typedefs.Handler) -> web.StreamResponse:
    """Turns what is raised into JSON."""
    try:
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return answer()
        return await handler(request)
    except ChatError as error:
        return refuse(request, error)
    except web.HTTPException as error:
        response = refuse(request, ChatError(error.status, error.reason))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # nobody is there
    except Exception:
        LOGGER.exception("%s %r failed", request.method, request.path)
        return refuse(request, ChatError(500, MISTAKE))


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds headers, and CORS for allowed origins."""
    response.headers.update(HEADERS)
    if request.path.endswith(("/docs", "/redoc")):
        response.headers["Content-Security-Policy"] += DOCS_CSP
    origin = request.headers.get("Origin")
    allowed = request.app[CHAT].config.allowed_origins.split(",")
    if origin in [one.strip() for one in allowed if one]:
        response.headers.update(CORS | {"Access-Control-Allow-Origin": origin})


def create_app(config: Config | None = None) -> web.Application:
    """The server as an aiohttp application, not opened yet."""
    chat = Chat(config or load_config({}))
    app = web.Application(middlewares=[answer_errors], client_max_size=BODY)
    app[CHAT] = chat
    app.cleanup_ctx.append(chat.run)
    app.on_shutdown.append(chat.stop)
    app.on_response_prepare.append(add_headers)
    app.router.add_get("/websockets/chat/{room_id}", connect)
    for path, operations in OPERATIONS.items():
        for method, operation in operations.items():
            app.add_routes([web.route(method, path, partial(over_http, operation))])
    files = {f"/web/{file.name}": file.name for file in (FOLDER / "web").glob("*.*")}
    for path, name in (PAGES | files).items():
        app.router.add_get(path, partial(show_file, FOLDER / "web" / name))
    return app


def serve(config: Config, listener: sockets.socket, ready: abc.Callable[[], None]) -> None:
    """Runs one process until it is told to stop."""

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    limits: Any = {"access_log": None, "shutdown_timeout": 1, "keepalive_timeout": 20}
    web.run_app(create_app(config), sock=listener, print=lambda _: ready(), **limits)


def supervise(config: Config, listener: sockets.socket, ready: abc.Callable[[], None]) -> None:
    """Runs several processes; when one ends, all end."""
    fork = multiprocessing.get_context("fork")
    says = [ready] + [lambda: None] * (config.workers - 1)
    workers = [fork.Process(target=serve, args=(config, listener, say)) for say in says]
    for worker in workers:
        worker.start()
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # only now: no worker may inherit this
        signal.signal(number, lambda *_: asked.set())
    while not asked.is_set() and all(worker.is_alive() for worker in workers):
        asked.wait(0.2)
    deadline = monotonic() + 4
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(max(0, deadline - monotonic()))
        worker.kill()
    if not asked.is_set():
        raise SystemExit("chatserver: a worker ended unasked, so all ended")


async def set_password(config: Config, username: str) -> None:
    """Gives a user a new password, typed or piped twice."""
    typed = sys.stdin.isatty()
    read = getpass.getpass if typed else lambda _: sys.stdin.readline().rstrip("\n")
    data = Fields({"password": read("New password: "), "again": read("Again: ")})
    if data.raw["password"] != data.raw["again"]:
        raise SystemExit("chatserver: these two passwords differ")
    chat = Chat(config)
    try:
        async with chat.opened():
            hashed = await chat.hash_new(data.text("password"))
            async with chat.change([]) as change:
                rows = await change.fetch(CHANGE_USER, username.lower(), hashed)
                version = first(rows, "user")["version"]
                change.notes.append(("log-ins ended", username.lower(), version))
    except ChatError as error:
        raise SystemExit(f"chatserver: {error}") from None


def parse_arguments() -> dict[str, Any]:
    """Reads the command line."""
    parser = argparse.ArgumentParser("chatserver", allow_abbrev=False)
    parser.add_argument("command", nargs="*", help="set-password NAME asks for a new one")
    for name, one in SETTINGS.items():
        shown = "none" if one.default == "" else one.default
        meaning = f"{one.metadata['meaning']} (default: {shown})"
        parser.add_argument("--" + name.replace("_", "-"), metavar="VALUE", help=meaning)
    arguments = vars(parser.parse_args())
    if arguments["command"] and arguments["command"][:-1] != ["set-password"]:
        parser.error("the only command is: set-password NAME")
    return arguments


def prepare_process() -> None:
    """Sets up permissions, memory, logs and descriptors."""
    os.umask(0o077)
    gc.set_threshold(10_000, 5, 5)  # a full collection stops all for 50 ms
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("aiohttp.server", "aiohttp.websocket"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # Else it logs a traceback a second while no descriptor is left:
    logging.getLogger("asyncio").addFilter(lambda line: "system resource" not in line.msg)
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Runs the server, or sets a password."""
    arguments = parse_arguments()
    config = load_config(arguments)
    prepare_process()
    if arguments["command"]:
        asyncio.run(set_password(config, arguments["command"][1]))
        return
    family = sockets.AF_INET6 if ":" in config.host else sockets.AF_INET
    try:
        address = (config.host, config.port)
        listener = sockets.create_server(address, family=family, backlog=1024)
    except OSError as error:
        raise SystemExit(f"chatserver: host and port: {error.strerror or error}") from None
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say = partial(print, f"chatserver listening on http://{shown}:{port}", flush=True)
    run = supervise if config.workers > 1 else serve
    with listener:
        run(config, listener, say)


if __name__ == "__main__":
    main()
