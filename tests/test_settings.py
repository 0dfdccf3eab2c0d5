"""Settings and the command line: where they come from, what is refused, and how it all ends."""

import itertools
import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from yarl import URL

from chatserver import CHAT, Config, create_app
from tests import postgres
from tests.conftest import Databases
from tests.people import below, company, drop
from tests.processes import (
    PROGRAM,
    ROOT,
    SETTINGS,
    Process,
    environment,
    is_clean,
    query,
    running,
    serving,
)
from tests.words import KEY

DEFAULTS = {name: str(default) for name, default in SETTINGS.items()}
SOURCES = ("config.ini", ".env", "environment", "command line")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty working directory in an environment without settings."""
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config() -> Config:
    """Return the settings as the environment and the files of the working directory have them."""
    return create_app()[CHAT].config


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    """Give a port that is taken, so that no start that should have been refused goes on."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield str(holder.getsockname()[1])


# --- Command lines that end by themselves

# One interpreter that has imported the program runs each command line in a child of its own.
DRIVER = """
import json, os, signal, sys
import chatserver
def run(case):
    os.chdir(case["folder"])
    for number, name in enumerate(("in", "out", "err")):
        path = os.path.join(case["files"], name)
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(case["environment"])
    sys.argv = ["chatserver.py", *case["arguments"]]
    signal.alarm(5)
    chatserver.main()
for case in json.load(sys.stdin):
    child = os.fork()
    if not child:
        run(case)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Case(NamedTuple):
    """A command line in a fresh folder: arguments, environment, files there, what is typed."""

    arguments: Sequence[str] = ()
    settings: Mapping[str, str] = {}
    files: Mapping[str, str | bytes] = {}
    typed: str = ""

    def with_port(self, port: str) -> "Case":
        """Return the same with a port, if there is one."""
        return self._replace(arguments=[*self.arguments, *([f"--port={port}"] if port else [])])


class Outcome(NamedTuple):
    """How a command line ended within 5 s."""

    code: int
    out: str
    err: str

    def refused(self, *words: str, lines: int = 1) -> None:
        """Check that it was refused, in one line, that has these words."""
        assert self.code not in (0, -14), self
        assert self.out == "", self
        assert "Traceback" not in self.err, self
        assert 1 <= len(self.err.splitlines()) <= lines, self
        for word in words:
            assert word in self.err.replace("-", "_") + self.err, (word, self)


def run_all(folder: Path, cases: Sequence[Case]) -> list[Outcome]:
    """Run command lines, each in a folder of its own, for 5 s at most."""
    jobs = []
    for number, case in enumerate(cases):
        files, home = folder / f"{number}.files", folder / f"{number}"
        files.mkdir()
        home.mkdir()
        (files / "in").write_text(case.typed)
        for name, content in case.files.items():
            (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        where: dict[str, Any] = {"folder": str(home), "files": str(files)}
        given = environment({k: v.format(home=home) for k, v in case.settings.items()})
        jobs.append(where | {"arguments": case.arguments, "environment": given})
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", DRIVER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment({}),
        timeout=10 + 5 * len(jobs),
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    texts = [[(Path(job["files"]) / name).read_text() for name in ("out", "err")] for job in jobs]
    return [Outcome(code, *pair) for code, pair in zip(codes, texts, strict=True)]


def all_refused(
    folder: Path, cases: Sequence[Case], words: Sequence[tuple[str, ...]], lines: int = 1
) -> list[Outcome]:
    """Check that each is refused in so few lines that have its words; tell all that are not."""
    outcomes, wrong = run_all(folder, cases), []
    for case, outcome, wanted in zip(cases, outcomes, words, strict=True):
        try:
            outcome.refused(*wanted, lines=lines)
        except AssertionError as error:
            wrong.append(f"{case}: {str(error)[:400]}")
    assert wrong == [], "\n".join(wrong)
    return outcomes


def ini(**settings: str) -> str:
    """Return a config.ini with these settings."""
    return "\n".join(["[chatserver]", *(f"{key} = {value}" for key, value in settings.items())])


def placed(source: str, name: str, value: str) -> Case:
    """Return a command line for which a setting comes from one source."""
    match source:
        case "config.ini":
            return Case(files={source: ini(**{name: value})})
        case ".env":
            return Case(files={source: f"{name.upper()}={value}\n"})
        case "environment":
            return Case(settings={name: value})
    return Case([f"--{name.replace('_', '-')}", value])


# --- The files that come with the program


def documented() -> dict[str, str]:
    """Return what config.ini shows, commented out, as name and value."""
    text = (ROOT / "config.ini").read_text("utf-8")
    return dict(re.findall(r"^# ?(\w+) *= *(.*?) *$", text, re.MULTILINE))


def test_config_ini_lists_every_setting_at_its_default() -> None:
    """The config.ini that comes along has every setting, commented out, and no other."""
    assert documented() == DEFAULTS
    lines = (ROOT / "config.ini").read_text("utf-8").splitlines()
    active = [line for line in lines if line.strip() and not line.startswith("#")]
    assert active == ["[chatserver]"]
    assert len(lines) <= 60, "it fits on a screen"


def test_config_ini_works_with_every_line_switched_on(home: Path) -> None:
    """With every comment sign taken away, config.ini says what held without it."""
    (home / "config.ini").write_text(ini(**documented()))
    assert config() == Config()


def test_help_tells_every_setting_and_its_default(tmp_path: Path) -> None:
    """`--help` shows each setting with its default, and set-password, and makes no file."""
    ((code, out, err),) = run_all(tmp_path, [Case(["--help"])])
    assert (code, err) == (0, "")
    assert "set-password" in out
    shown = dict(re.findall(r"(?s)\n  --(\S+) (.*?)(?=\n  --|$)", out))
    for name, default in DEFAULTS.items():
        told = "".join(shown[name.replace("_", "-")].split())
        assert default in told and len(told) > len(default) + 10, (name, told)
    assert list((tmp_path / "0").iterdir()) == []


def test_the_program_names_the_packages_of_requirements_txt() -> None:
    """The block for `uv run` at the top of the program is requirements.txt and its Python."""
    block = re.search(r"(?m)^# /// script$\s(?P<toml>(^#(| .*)$\s)+)^# ///$", PROGRAM.read_text())
    assert block is not None
    lines = block["toml"].splitlines()
    script = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    needed = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(script["dependencies"]) == sorted(
        line for line in needed if line and not line.startswith("#")
    )
    assert script["requires-python"] == ">=3.11"


# --- Where settings come from


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_source_overrides_those_before(
    home: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Environment over .env over config.ini."""
    (home / "config.ini").write_text(ini(message_length="1", sockets="7"))
    if count > 1:
        (home / ".env").write_text("MESSAGE_LENGTH=2\n")
    if count > 2:
        monkeypatch.setenv("MESSAGE_LENGTH", "3")
    assert (config().message_length, config().sockets) == (count, 7)


def test_the_command_line_overrides_everything(tmp_path: Path, taken: str) -> None:
    """`--port N` and `--port=N` count more than the environment and the files."""
    files = {"config.ini": ini(port="1"), ".env": "PORT=2\n"}
    settings = {"port": "3", "host": "127.0.0.1"}
    cases = [Case(args, settings, files) for args in (["--port", taken], [f"--port={taken}"])]
    all_refused(tmp_path, cases, [(taken,)] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "# SOCKETS=1\n\nOTHER=1\nOTHER=2\nBARE\nSOCKETS=5\nexport ALGORITHM=HS512",
        "export SOCKETS=\"5\"\nALGORITHM='HS512'\n  MESSAGE_LENGTH = 100  ",
        '\ufeffSOCKETS=5 # so many\nALGORITHM="HS512"   # strong\nexport PORT=1\t# no',
    ],
)
def test_dotenv_is_read_as_shells_and_compose_do(home: Path, text: str) -> None:
    """A .env may say export, quote, comment, begin with a byte order mark, and hold other's."""
    (home / ".env").write_text(text + "\n", "utf-8")
    assert (config().sockets, config().algorithm) == (5, "HS512")


def test_config_ini_takes_values_as_they_are(home: Path) -> None:
    """Percent signs, hashes, semicolons and quotes are part of a secret, and a BOM is none."""
    key = "%(x)s%%#;'\"=" + "k" * 32
    (home / "config.ini").write_text("\ufeff" + ini(secret_key=key), "utf-8")
    assert config().secret_key == key


def test_a_port_from_the_environment_opens_every_address(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that gives PORT wants every address; with HOST, or PORT in a file, it is as set."""
    (home / "config.ini").write_text(ini(port="8123"))
    assert (config().host, config().port) == ("127.0.0.1", 8123)
    monkeypatch.setenv("PORT", "8124")
    assert (config().host, config().port) == ("0.0.0.0", 8124)  # noqa: S104
    monkeypatch.setenv("HOST", "127.0.0.2")
    assert config().host == "127.0.0.2"


def test_an_empty_value_counts_as_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose passes on as an empty variable is at its default."""
    (home / ".env").write_text("SOCKETS=\n")
    monkeypatch.setenv("DATABASE_URL", "")
    assert config() == Config()


# --- What is refused

BAD = {
    "port": ("x", "x", "x", "x", "-1", "65536", "1.5", "9" * 10),
    "workers": ("x", "0", "-1"),
    "algorithm": ("none", "RS256", "hs256x"),
    "registration": ("maybe", "close"),
    "access_token_expire_minutes": ("x", "-5", "0"),
    "password_min_length": ("-1", "many"),
    "message_length": ("9" * 5000, "-1"),
    "messages_per_second": ("-1", "0.5"),
    "sockets": ("1e3",),
    "proxies": ("-1", "10.0.0.0/8"),
    "secret_key": ("short", "x" * 31),
    "database_url": ("mysql://x/y", "chat.db", "sqlite:/x"),
}


def test_a_bad_value_is_named_with_its_place(tmp_path: Path, taken: str) -> None:
    """Wherever a bad value stands, one line names the setting and the place, and no secret."""
    sources = itertools.cycle(SOURCES)
    bad = [(next(sources), name, value) for name, values in BAD.items() for value in values]
    cases = [placed(*each).with_port(taken if each[1] != "port" else "") for each in bad]
    outcomes = all_refused(tmp_path, cases, [(source, name) for source, name, _ in bad])
    for outcome, (_, name, value) in zip(outcomes, bad, strict=True):
        assert name != "secret_key" or value not in outcome.err, "it tells a secret"


STRAYS: dict[str, Case] = {
    "--nonsense": Case(["--nonsense", "1"]),
    "--nonsens": Case(["--nonsens=1"]),
    "--por": Case(["--por", "1"]),  # no setting may be shortened: another one may come
    "--port": Case(["--port"]),
    "set-password": Case(["backup"]),
    "set-password ": Case(["set-password", "a", "b"]),
    "nonsense": Case(files={"config.ini": ini(nonsense="1")}),
    "sockets": Case(files={"config.ini": ini(sockets="1\nsockets=2")}),
    "config.ini": Case(files={"config.ini": "sockets = 1\n"}),
    "config.ini ": Case(files={"config.ini": "[chatserver]\nwhat is this"}),
    "config.ini:": Case(files={"config.ini": b"[chatserver]\nhost = \xff\xfe\n"}),
    ".env": Case(files={".env": b"HOST=\xff\xfe\n"}),
}


def test_what_is_unknown_or_garbled_stops_the_start(tmp_path: Path, taken: str) -> None:
    """An unknown argument or key, or a file that is none, is named, and nothing is made."""
    cases = [case.with_port("" if name == "--port" else taken) for name, case in STRAYS.items()]
    all_refused(tmp_path, cases, [(name.strip(" :"),) for name in STRAYS], lines=12)
    for number, case in enumerate(cases):
        assert len(list((tmp_path / f"{number}").iterdir())) == len(case.files)


def test_a_bad_value_stops_the_start_even_if_a_good_one_counts(tmp_path: Path, taken: str) -> None:
    """A mistake in config.ini is told, though the command line overrules it."""
    case = Case(files={"config.ini": ini(port="zzz")}).with_port(taken)
    all_refused(tmp_path, [case], [("config.ini", "port")])


def on(url: str, *arguments: str) -> Case:
    """Return a command line for a database."""
    return Case(arguments, {"database_url": url, "secret_key": KEY, "port": "0"})


NO_POSTGRES = "postgresql://me:hunter2@127.0.0.1:1/x"
IMPOSSIBLE: list[tuple[str, Case]] = [
    ("secret_key", Case(["--port=0"], {"database_url": NO_POSTGRES})),
    ("database_url", on(NO_POSTGRES)),
    ("workers", on("", "--workers=2")),
    ("no.such.host.invalid", on("", "--host", "no.such.host.invalid")),
    ("database_url", on("sqlite:///none/chat.db")),
    ("database_url", on("sqlite:////tmp")),
    ("database_url", Case(["--port=0"], files={"chat.db": b"this is no database" * 999})),
    ("chat.db.secret", Case(["--port=0"], files={"chat.db.secret": ""})),
    ("chat.db.secret", Case(["--port=0"], files={"chat.db.secret": "short"})),
]


def test_a_start_that_cannot_be_is_told_on_one_line(tmp_path: Path) -> None:
    """What is missing or wrong around the server is one line that says where, and no password."""
    words, cases = zip(*IMPOSSIBLE, strict=True)
    for outcome in all_refused(tmp_path, cases, [(word,) for word in words]):
        assert "hunter2" not in outcome.err


def test_workers_that_cannot_start_say_so_in_a_line_each(tmp_path: Path) -> None:
    """All end when the database is away, and at most a line of each says that."""
    case = on(NO_POSTGRES, "--workers=3")
    (outcome,) = all_refused(tmp_path, [case], [("database_url",)], lines=4)
    assert "hunter2" not in outcome.err


FIRST_EDITION = (
    "CREATE TABLE rooms (room_id TEXT PRIMARY KEY, name TEXT, kind TEXT, seq BIGINT, floor BIGINT)",
    "CREATE TABLE events (room_id TEXT, seq BIGINT, kind TEXT, message TEXT, folded TEXT)",
)


async def test_a_database_of_the_first_edition_is_left_alone(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """A database with the tables of the first edition stops the start in one line, and is kept."""
    url, path = new_database(tmp_path), tmp_path / "chat.db"
    if engine == "postgres":
        await postgres.execute(url, *FIRST_EDITION)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(";".join(FIRST_EDITION))
    before = path.read_bytes() if path.exists() else b""
    all_refused(tmp_path, [on(url)], [("database_url", "first edition")])
    assert before == (path.read_bytes() if path.exists() else b"")
    if engine == "postgres":
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        assert {row["tablename"] for row in await query(url, tables)} == {"events", "rooms"}


# --- URLs


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///kept.db",
        "sqlite:///sub folder/kept.db",
        "sqlite:///{home}/kept.db",
        "sqlite+pysqlite:///{home}/kept.db",
    ],
)
async def test_sqlite_urls_are_sqlalchemys(home: Path, url: str) -> None:
    """Three slashes are relative, four absolute, and a driver is dropped."""
    (home / "sub folder").mkdir()
    async with serving(create_app(Config(database_url=url.format(home=home)))):
        assert (home / ("sub folder" if "sub" in url else ".") / "kept.db").exists()


@pytest.mark.parametrize(
    ("scheme", "parameters"),
    [
        ("postgres", ""),
        ("postgresql+asyncpg", "?sslmode=disable"),
        ("postgresql+psycopg2", "?sslmode=prefer&channel_binding=prefer&connect_timeout=10"),
        ("postgresql", "?application_name=chat&target_session_attrs=any&options="),
        ("postgres", "?pgbouncer=true&ssl=false"),
    ],
)
async def test_postgres_urls_are_as_hosts_give_them(
    new_postgres: str, scheme: str, parameters: str
) -> None:
    """Whatever the scheme is called, and whatever parameters a host adds, it connects."""
    url = scheme + new_postgres.removeprefix("postgresql").split("?")[0] + parameters
    async with serving(create_app(Config(database_url=url, secret_key=KEY))):
        pass


@pytest.fixture(scope="module")
def new_postgres(postgres_url: str) -> str:
    """Give a fresh database on Postgres."""
    return postgres.create_database(postgres_url)


# --- Real processes


async def test_no_configuration_at_all_works(tmp_path: Path) -> None:
    """In an empty folder a database and a secret are made, for the owner's eyes only, and kept."""
    process = Process(tmp_path, "--port", "0")
    try:
        await process.ready()
        assert process.url.startswith("http://127.0.0.1:")
        key = (tmp_path / "chat.db.secret").read_text()
        assert len(key.strip()) >= 32
        for path in (*tmp_path.glob("chat.db*"), tmp_path / "chat.db.secret"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        async with company(process, "alice") as (alice,):
            assert await process.end(signal.SIGINT) == 0
            assert process.out.read_text().count("\n") == 1
            is_clean(process.log)
            process.start()
            await process.ready()
            assert (await alice.ask("GET", "/users/me"))["username"] == alice.name
            assert await process.end() == 0
        assert (tmp_path / "chat.db.secret").read_text() == key
        assert key.strip() not in process.log
    finally:
        process.kill()


async def test_an_address_of_ipv6_is_printed_as_urls_have_it(tmp_path: Path) -> None:
    """With `--host ::1` the line that it listens is a URL that can be opened."""
    url = f"sqlite:///{tmp_path}/chat.db"
    async with running(tmp_path, url, host="::1") as (process,):
        assert re.fullmatch(r"http://\[::1\]:\d+", process.url)
        async with aiohttp.request("GET", f"{process.url}/healthz") as answer:
            assert answer.status == 200


async def test_a_port_and_a_file_belong_to_one_process(tmp_path: Path) -> None:
    """A second process on a port, or on a SQLite file by any name, is refused in one line."""
    path = tmp_path / "chat.db"
    async with running(tmp_path, f"sqlite:///{path}") as (process,):
        (tmp_path / "link.db").symlink_to(path)
        port = str(URL(process.url).port)
        cases = [
            Case(["--port", port]),
            Case(["--port", port, "--host", "0.0.0.0"]),  # noqa: S104
            on(f"sqlite:///{path}"),
            on(f"sqlite:///{tmp_path}/link.db"),
        ]
        all_refused(tmp_path, cases, [(port,), (port,), ("database_url",), ("database_url",)])
        assert process.popen.poll() is None


STALLED = b"""POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"""


async def test_a_stop_is_orderly_and_quick(new_database: Databases, tmp_path: Path) -> None:
    """Sockets get 1001 and all ends with 0 within 5 s, whoever reads nothing or sends half."""
    async with (
        running(tmp_path, new_database(tmp_path)) as (process,),
        company(process, "alice") as (alice,),
    ):
        room = await alice.room()
        half = socket.create_connection(("127.0.0.1", URL(process.url).port or 0))
        half.sendall(STALLED)
        stalled = alice.chat(room)
        async with stalled, alice.chat(room) as chat, alice.chat(room, token="") as not_yet:
            below(stalled.ws).pause_reading()
            for number in range(60):
                await chat.send(message="\u611b" * 4000, client_id=f"{number}")
            await chat.hear("message", client_id="59")
            began = time.monotonic()
            process.popen.terminate()
            assert await chat.closed() == 1001
            assert await not_yet.closed() == 1001
            assert await process.over(5 - (time.monotonic() - began)) == 0
            drop(stalled.ws)
        half.close()


async def test_a_restart_keeps_everything(new_database: Databases, tmp_path: Path) -> None:
    """Accounts, tokens, rooms, roles, marks and messages are there after a restart."""
    paths = ("/rooms", "/rooms/{room}", "/rooms/{room}/messages", "/users/me")
    async with (
        running(tmp_path, new_database(tmp_path)) as (process,),
        company(process, "alice") as (alice,),
    ):
        room = await alice.room(kind="private")
        await alice.say(room, "remember", client_id="1")
        before = [await alice.ask("GET", path.format(room=room)) for path in paths]
        assert await process.end() == 0
        process.start()
        await process.ready()
        assert [await alice.ask("GET", path.format(room=room)) for path in paths] == before


# --- set-password

TYPED = [
    ("{alice}", "one1\ntwo2\n"),
    ("{alice}", "12345\n"),
    ("{alice}", ""),
    ("{alice}", "\n\n"),
    ("{alice}", "123\n123\n"),
    ("{alice}", "12345 \n12345\n"),
    ("{alice}", "a\0bcd\na\0bcd\n"),
    ("{alice}", "x" * 1025 + "\n" + "x" * 1025 + "\n"),
    ("nobody-like-this", "12345\n12345\n"),
    ("", "12345\n12345\n"),
]


def set_password(database: str, name: str, typed: str) -> Case:
    """Return the command that sets a password."""
    return on(database, "set-password", name)._replace(typed=typed)


async def test_set_password_replaces_a_lost_password(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """Two equal lines become the password and void every token; whatever else is typed, nothing."""
    database = new_database(tmp_path)
    async with (
        running(tmp_path, database) as (process,),
        company(process, "alice", "bob") as (alice, bob),
    ):
        if engine == "sqlite":
            assert await process.end() == 0
        cases = [set_password(database, name.format(alice=alice.name), t) for name, t in TYPED]
        good = set_password(database, alice.name.upper(), "new one \nnew one \n")
        *bad, done = run_all(tmp_path, [*cases, good])
        for outcome in bad:
            outcome.refused()
        assert done.code == 0, done
        assert "new one" not in done.out + done.err
        if engine == "sqlite":
            process.start()
            await process.ready()
        await alice.ask("GET", "/users/me", status=401)
        await bob.ask("GET", "/users/me")
        form = {"username": alice.name, "password": "1234"}
        await alice.ask("POST", "/auth/token", form, status=400)
        await alice.ask("POST", "/auth/token", form | {"password": "new one "})


async def test_set_password_beside_a_running_server(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """With SQLite it is refused, with Postgres it closes the user's sockets 4401; others go on."""
    database = new_database(tmp_path)
    async with (
        running(tmp_path, database) as (process,),
        company(process, "alice", "bob") as (alice, bob),
        alice.chat("1") as chat,
        bob.chat("1") as other,
    ):
        (done,) = run_all(tmp_path, [set_password(database, alice.name, "12345\n12345\n")])
        if engine == "sqlite":
            done.refused()
        else:
            assert done.code == 0, done
            assert await chat.closed() == 4401
        await other.deliver("undisturbed")
