"""Settings and the command line: where they come from, what is refused, and how it all ends."""

import re
import signal
import socket
import sqlite3
import stat
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from yarl import URL

from chatserver import Config, create_app, load_config, parse_arguments
from tests import postgres
from tests.commands import run
from tests.conftest import Databases
from tests.people import below, company, drop
from tests.processes import PROGRAM, ROOT, SETTINGS, Process, is_clean, running, serving
from tests.words import KEY

DEFAULTS = {name: str(default) for name, default in SETTINGS.items()}
PLACES = ("config.ini", ".env", "the environment", "the command line")
Put = Callable[[str, str, str], None]


@pytest.fixture(autouse=True)
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Give a function that sets a setting in one place; until then nothing is set anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["chatserver.py"])
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)

    def put(place: str, name: str, value: str) -> None:
        """Set it where it is read from."""
        match place:
            case "config.ini":
                Path(place).write_text(f"[chatserver]\n{name} = {value}\n")
            case ".env":
                Path(place).write_text(f"{name.upper()}={value}\n")
            case "the environment":
                monkeypatch.setenv(name.upper(), value)
            case _:
                sys.argv.append(f"--{name.replace('_', '-')}={value}")

    return put


def config() -> Config:
    """Return the settings that the program would start with."""
    return load_config(parse_arguments())


# --- Where settings come from


def test_every_setting_is_told_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` and config.ini have all; with every line of it switched on nothing changes."""
    text = (ROOT / "config.ini").read_text("utf-8")
    assert dict(re.findall(r"^#(\w+) =(?: (.*))?$", text, re.MULTILINE)) == DEFAULTS
    assert [line for line in text.splitlines() if line and line[0] != "#"] == ["[chatserver]"]
    assert text.count("\n") <= 60, "it fits on a screen"
    Path("config.ini").write_text(re.sub(r"^#(?=\w+ =)", "", text, flags=re.MULTILINE))
    assert config() == Config()
    sys.argv.append("--help")
    with pytest.raises(SystemExit, match=r"^0$"):
        config()
    shown = dict(re.findall(r"(?s)\n  --(\S+) (.*?)(?=\n  --|$)", capsys.readouterr().out))
    for name, default in DEFAULTS.items():
        told = "".join(shown[name.replace("_", "-")].split())
        assert default in told and len(told) > len(default) + 10, (name, told)


def test_each_place_overrides_those_before(put: Put) -> None:
    """Command line over environment over .env over config.ini."""
    for number, place in enumerate(PLACES, 1):
        put(place, "message_length", f"{number}")
        assert config().message_length == number


@pytest.mark.parametrize(
    "text",
    [
        "# SOCKETS=1\n\nOTHER=1\nBARE\nSOCKETS = 5\nexport ALGORITHM=HS512",
        "\ufeffSOCKETS=\"5\" # so many\nALGORITHM='HS512'   # strong\nexport PORT=1\t# no",
    ],
)
def test_dotenv_is_read_as_shells_and_compose_do(text: str) -> None:
    """A .env may say export, quote, comment, begin with a byte order mark, and hold other's."""
    Path(".env").write_text(text + "\n", "utf-8")
    assert (config().sockets, config().algorithm) == (5, "HS512")


def test_values_are_taken_as_they_are_and_empty_ones_not_at_all(put: Put) -> None:
    """Percent signs, hashes and quotes are part of a secret; what compose leaves empty is unset."""
    key = "%(x)s%%#;'\"=" + "k" * 32
    Path("config.ini").write_text(f"\ufeff[chatserver]\nsecret_key = {key}\n", "utf-8")
    put(".env", "sockets", "")
    put("the environment", "database_url", "")
    assert config() == Config(secret_key=key)


def test_a_port_from_the_environment_opens_every_address(put: Put) -> None:
    """A host that gives PORT wants every address; with HOST, or PORT in a file, it is as set."""
    put("config.ini", "port", "8123")
    assert (config().host, config().port) == ("127.0.0.1", 8123)
    put("the environment", "port", "8124")
    assert (config().host, config().port) == ("0.0.0.0", 8124)  # noqa: S104
    put("the environment", "host", "127.0.0.2")
    assert config().host == "127.0.0.2"


# --- What is refused

BAD = {
    "port": "x -1 65536 1.5 99999999999999999999",
    "algorithm": "none RS256",
    "registration": "close",
    "allowed_origins": "example.org",
    "secret_key": "x" * 31,
    "database_url": "mysql://x/y chat.db",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "value"), [(k, v) for k in BAD for v in BAD[k].split()])
def test_a_bad_value_is_named_with_its_place(put: Put, place: str, name: str, value: str) -> None:
    """Wherever it stands, also where a good one overrules it, one line tells it, and no secret."""
    put(place, name, value)
    if place == "config.ini":
        put("the environment", name, DEFAULTS[name])
    with pytest.raises(SystemExit, match=f"^chatserver: {name}: .*{place}.*$") as refusal:
        config()
    assert name != "secret_key" or value not in str(refusal.value)


# A shortened setting is none: another one may come that begins like it.
@pytest.mark.parametrize("argument", ["--nonsense=1", "--por=1", "--port", "backup"])
def test_a_strange_argument_is_told(capsys: pytest.CaptureFixture[str], argument: str) -> None:
    """What is no setting, has no value or is no command stops the start, with a hint."""
    sys.argv.append(argument)
    with pytest.raises(SystemExit, match=r"^2$"):
        config()
    assert "chatserver: error: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nonsense = 1", "port = 1\nport = 2", "what is this", "\udcff"])
def test_a_garbled_file_is_told(text: str) -> None:
    """A config.ini with an unknown setting, or that cannot be read, is named on one line."""
    Path("config.ini").write_text(f"[chatserver]\n{text}", "utf-8", "surrogateescape")
    with pytest.raises(SystemExit, match=r"^chatserver: .*config\.ini.*$"):
        config()


async def start(folder: Path, *arguments: str, typed: str = "") -> tuple[int, str]:
    """Run a command line that ends by itself; return its exit code and what it says."""
    command = [sys.executable, str(PROGRAM), *arguments]
    return await run(*command, folder=folder, typed=typed, PORT="0", HOST="127.0.0.1")


def is_refused(outcome: tuple[int, str], told: str, lines: int = 1) -> None:
    """Check that a command line ended with a reason, in so few lines, and without a secret."""
    code, text = outcome
    assert code > 0 and told in text and text.count("\n") < lines, outcome
    assert "Traceback" not in text and "hunter2" not in text, outcome


SECRET = f"--secret-key={KEY}"
NOWHERE = "--database-url=postgresql://me:hunter2@127.0.0.1:1/x"


@pytest.mark.parametrize(
    ("told", "arguments", "lines"),
    [
        ("secret_key", [NOWHERE], 1),
        ("database_url", [NOWHERE, SECRET], 1),
        ("database_url", [NOWHERE, SECRET, "--workers=3"], 4),
        ("workers", ["--workers=2"], 1),
        ("no.such.host.invalid", ["--host=no.such.host.invalid"], 1),
        ("database_url", ["--database-url=sqlite:///none/chat.db"], 1),
        ("database_url", ["--database-url=sqlite:///garbage"], 1),
        ("short.secret", ["--database-url=sqlite:///short"], 1),
    ],
)
async def test_a_start_that_cannot_be_is_told_in_a_line(
    tmp_path: Path, told: str, arguments: list[str], lines: int
) -> None:
    """What is missing or wrong around the server ends it, at most with a line of each process."""
    (tmp_path / "garbage").write_text("this is no database" * 999)
    (tmp_path / "short.secret").write_text("short")
    is_refused(await start(tmp_path, *arguments), told, lines)


async def test_a_port_and_a_file_belong_to_one_process(tmp_path: Path) -> None:
    """A second process on a port, or on a SQLite file by any name, is refused in one line."""
    path = tmp_path / "chat.db"
    async with running(tmp_path, f"sqlite:///{path}") as [process]:
        (tmp_path / "link.db").symlink_to(path)
        port = str(URL(process.url).port)
        for host in ("127.0.0.1", "0.0.0.0"):  # noqa: S104
            is_refused(await start(tmp_path, f"--port={port}", f"--host={host}"), port)
        for url in ("sqlite:///chat.db", f"sqlite+pysqlite:///{tmp_path}/link.db"):
            is_refused(await start(tmp_path, f"--database-url={url}"), "another process")


async def test_a_database_of_the_first_edition_is_left_alone(
    postgres_url: str, tmp_path: Path
) -> None:
    """A database with a table of the first edition stops the start, and gets no others."""
    url, old = postgres.create_database(postgres_url), "CREATE TABLE rooms (floor BIGINT)"
    await postgres.execute(url, old)
    is_refused(await start(tmp_path, f"--database-url={url}", SECRET), "first edition")
    assert await postgres.read(url, "SELECT to_regclass('members')") == [(None,)]
    with closing(sqlite3.connect("chat.db")) as connection:
        connection.execute(old)
    before = Path("chat.db").read_bytes()
    is_refused(await start(tmp_path), "first edition")
    assert Path("chat.db").read_bytes() == before


async def test_postgres_urls_are_as_hosts_give_them(postgres_url: str) -> None:
    """Whatever the scheme is called, and whatever parameters a host adds, it connects."""
    place = postgres.create_database(postgres_url).removeprefix("postgresql").partition("?")[0]
    for url in (
        f"postgres{place}?pgbouncer=true&ssl=false",
        f"postgresql+asyncpg{place}?sslmode=disable&application_name=chat&options=",
        f"postgresql+psycopg2{place}?sslmode=prefer&channel_binding=prefer&connect_timeout=10",
    ):
        async with serving(create_app(Config(database_url=url, secret_key=KEY))):
            pass


# --- From the start to the end


async def test_no_configuration_at_all_works(tmp_path: Path) -> None:
    """In an empty folder a database and a secret are made, for the owner's eyes only, and kept."""
    process = Process(tmp_path, "--port", "0")
    try:
        await process.ready()
        assert process.url.startswith("http://127.0.0.1:")
        async with company(process, "alice") as [alice]:
            for path in tmp_path.glob("chat.db*"):
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
            assert await process.end(signal.SIGINT) == 0
            assert process.out.read_text().count("\n") == 1
            is_clean(process.log)
            await process.again()
            assert (await alice.ask("GET", "/users/me"))["username"] == alice.name
        assert (tmp_path / "chat.db.secret").read_text().strip() not in process.log
    finally:
        process.kill()


async def test_a_stop_is_orderly_and_quick(new_database: Databases, tmp_path: Path) -> None:
    """Sockets get 1001 and all ends with 0 within 5 s, whoever reads nothing or sends half."""
    async with (
        running(tmp_path, new_database(tmp_path), host="::1") as [process],
        company(process, "alice") as [alice],
        alice.chat("1") as stalled,
        alice.chat("1") as chat,
    ):
        assert process.url.startswith("http://[::1]:")
        half = socket.create_connection(("::1", URL(process.url).port or 0))
        half.sendall(b'POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"')
        below(stalled.ws).pause_reading()
        for number in range(60):
            await chat.send(message="\u611b" * 4000, client_id=f"{number}")
        await chat.hear("message", client_id="59")
        assert await process.end() == 0
        assert await chat.closed() == 1001
        drop(stalled.ws)
        half.close()


async def test_set_password_replaces_a_lost_password(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """Two equal lines become the password and end every log-in; SQLite's server has to be down."""
    url = new_database(tmp_path)
    place = [f"--database-url={url}", SECRET, "set-password"]
    good = "new one \nnew one \n"
    async with (
        running(tmp_path, url) as [process],
        company(process, "alice", "bob") as [alice, bob],
        alice.chat("1") as closed,
        bob.chat("1") as other,
    ):
        if engine == "sqlite":
            is_refused(await start(tmp_path, *place, alice.name, typed=good), "another process")
            await other.deliver("undisturbed")
            assert await process.end() == 0
        for typed in ("12345 \n12345\n", "12345\n", "123\n123\n", "a\0bcd\na\0bcd\n"):
            is_refused(await start(tmp_path, *place, alice.name, typed=typed), "password")
        is_refused(await start(tmp_path, *place, "nobody-like-this", typed=good), "user")
        code, told = await start(tmp_path, *place, alice.name.upper(), typed=good)
        assert code == 0 and "new one" not in told
        if engine == "sqlite":
            await process.again()
        else:
            assert await closed.closed() == 4401
            await other.deliver("undisturbed")
        await bob.ask("GET", "/users/me")
        await alice.ask("GET", "/users/me", status=401)
        form = {"username": alice.name, "password": "1234"}
        await alice.ask("POST", "/auth/token", form, status=400)
        await alice.ask("POST", "/auth/token", form | {"password": "new one "})
