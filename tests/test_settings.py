"""Settings and the command line: where they come from, what is refused, and how it all ends."""

import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from chatserver import Config, load_config, parse_arguments
from tests.commands import run
from tests.conftest import Databases
from tests.helpers import run_past
from tests.people import below, company
from tests.processes import PROGRAM, ROOT, SETTINGS, Process, running
from tests.words import KEY

DEFAULTS = {name: str(default) for name, default in SETTINGS.items()}
PLACES = ("config.ini", ".env", "the environment", "the command line")
SECRET = f"--secret-key={KEY}"


@pytest.fixture(autouse=True)
def nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin in an empty folder, with no setting anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["chatserver.py"])
    for name in SETTINGS:
        monkeypatch.setenv(name.upper(), "")  # an empty one counts as none


def put(place: str, name: str, value: str) -> None:
    """Set a setting in one place, and there alone."""
    if place == "the environment":
        os.environ[name.upper()] = value
    elif place == "the command line":
        sys.argv.append(f"--{name.replace('_', '-')}={value}")
    else:
        section = "[chatserver]\n" if place == "config.ini" else ""
        Path(place).write_text(f"{section}{name} = {value}\n")


def config() -> Config:
    """Return the settings that the program would start with."""
    return load_config(parse_arguments())


def test_every_setting_is_told_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` and config.ini have all; with every line of it switched on nothing changes."""
    text = (ROOT / "config.ini").read_text("utf-8")
    assert dict(re.findall(r"^#(\w+) =(?: (.*))?$", text, re.MULTILINE)) == DEFAULTS
    assert text.count("\n") <= 60, "it fits on a screen"
    Path("config.ini").write_text(re.sub(r"^#(?=\w+ =)", "", text, flags=re.MULTILINE))
    assert config() == Config()
    sys.argv.append("--help")
    with pytest.raises(SystemExit, match=r"^0$"):
        config()
    told = capsys.readouterr().out.replace("-", "_")
    shown = dict(re.findall(r"__(\w+) VALUE\s+\w[^(]{9,}\(default:\s+(\S+)\)", told))
    assert shown == {name: default or "none" for name, default in DEFAULTS.items()}


def test_each_place_overrides_those_before() -> None:
    """Command line over environment over .env over config.ini; PORT there opens every address."""
    for number, place in enumerate(PLACES, 1):
        put(place, "port", f"{number}")
        host = "127.0.0.1" if place in PLACES[:2] else "0.0.0.0"  # noqa: S104
        assert (config().host, config().port) == (host, number)
    put("the environment", "host", "127.0.0.2")
    assert config().host == "127.0.0.2"


def test_values_are_read_as_shells_and_compose_write_them() -> None:
    """A .env may quote, comment and hold other's; a secret is taken as it is, an empty one not."""
    for text in (
        "# SOCKETS=1\n\nOTHER=1\nBARE\nSOCKETS = 5\nexport ALGORITHM=HS512",
        "\ufeffSOCKETS=\"5\" # so many\nALGORITHM='HS512'   # strong\nexport PORT=1\t# no",
    ):
        Path(".env").write_text(text + "\n", "utf-8")
        assert (config().sockets, config().algorithm) == (5, "HS512")
    key = "%(x)s%%#;'\"=" + "k" * 32
    Path("config.ini").write_text(f"\ufeff[chatserver]\nsecret_key = {key}\n", "utf-8")
    put(".env", "sockets", "")
    put("the environment", "database_url", "")
    assert config() == Config(secret_key=key)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("port", "x"), ("port", "65536"), ("port", "1.5"), ("algorithm", "none")),
        *(("secret_key", "x" * 31), ("database_url", "mysql://x/y"), ("allowed_origins", "x.org")),
    ],
)
def test_a_bad_value_is_named_with_its_place(place: str, name: str, value: str) -> None:
    """Wherever it stands, also where a good one overrules it, one line tells it, and no secret."""
    put(place, name, value)
    if place == "config.ini":
        put("the environment", name, DEFAULTS[name])
    with pytest.raises(SystemExit, match=f"^chatserver: {name}: .*{place}.*$") as refusal:
        config()
    assert name != "secret_key" or value not in str(refusal.value)


def test_what_is_unknown_or_garbled_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that there is not stops the start, as do its beginning and a file of nonsense."""
    for argument in ("--nonsense=1", "--por=1", "--port", "backup"):
        sys.argv[1:] = [argument]
        with pytest.raises(SystemExit, match=r"^2$"):
            config()
        assert "chatserver: error: " in capsys.readouterr().err
    sys.argv.pop()
    for text in ("nonsense = 1", "port = 1\nport = 2", "what is this", "\udcff"):
        Path("config.ini").write_text(f"[chatserver]\n{text}", "utf-8", "surrogateescape")
        with pytest.raises(SystemExit, match=r"^chatserver: .*config\.ini.*$"):
            config()


async def refuses(folder: Path, why: str, *arguments: str, typed: str = "", lines: int = 1) -> None:
    """Check that a command line ends with a reason, in so few lines, and without a secret."""
    command = [sys.executable, str(PROGRAM), *arguments]
    code, text = await run(*command, folder=folder, typed=typed, PORT="0", HOST="127.0.0.1")
    assert code > 0 and why in text and text.count("\n") < lines, text
    assert "Traceback" not in text and "hunter2" not in text, text


async def test_a_start_that_cannot_be_is_told_in_a_line(tmp_path: Path) -> None:
    """What is missing or wrong around the server ends it, at most with a line of each process."""
    (tmp_path / "garbage").write_text("this is no database" * 999)
    (tmp_path / "short.secret").write_text("short")
    nowhere = "--database-url=postgresql://me:hunter2@127.0.0.1:1/x"
    for why, *arguments in (
        ("secret_key", nowhere),
        ("database_url", nowhere, SECRET),
        ("workers", "--workers=2"),
        ("no.such.host.invalid", "--host=no.such.host.invalid"),
        ("database_url", "--database-url=sqlite:///none/chat.db"),
        ("database_url", "--database-url=sqlite:///garbage"),
        ("short.secret", "--database-url=sqlite:///short"),
    ):
        await refuses(tmp_path, why, *arguments)
    await refuses(tmp_path, "database_url", nowhere, SECRET, "--workers=3", lines=4)


async def test_the_first_edition_is_left_alone(new_database: Databases, tmp_path: Path) -> None:
    """A database with a table of the first edition stops the start, and gets no others."""
    url = new_database(tmp_path)
    await run_past(url, "CREATE TABLE rooms (floor BIGINT)")
    await refuses(tmp_path, "first edition", f"--database-url={url}", SECRET)
    await run_past(url, "CREATE TABLE members (more BIGINT)")  # fails if there is one


async def test_no_configuration_at_all_works(tmp_path: Path) -> None:
    """In an empty folder a database and a secret are made, for one process and owner, and kept."""
    process = Process(tmp_path, "--port", "0")
    try:
        await process.ready()
        assert process.url.startswith("http://127.0.0.1:")
        port = process.url.rpartition(":")[2]
        await refuses(tmp_path, port, f"--port={port}")
        (tmp_path / "link.db").symlink_to("chat.db")
        for url in ("sqlite:///chat.db", f"sqlite+pysqlite:///{tmp_path}/link.db"):
            await refuses(tmp_path, "another process", f"--database-url={url}")
        for path in tmp_path.glob("chat.db*"):
            assert path.stat().st_mode & 0o077 == 0, path
        async with company(process, "alice") as [alice]:
            assert await process.end(signal.SIGINT) == 0
            assert process.out.read_text().count("\n") == 1
            await process.again()
            await alice.ask("GET", "/users/me")
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
        half = socket.create_connection(("::1", int(process.url.rpartition(":")[2])))
        half.sendall(b'POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"')
        below(stalled.ws).pause_reading()
        for number in range(60):
            await chat.send(message="\u611b" * 4000, client_id=f"{number}")
        await chat.hears(client_id="59")
        assert await process.end() == 0
        assert await chat.is_closed() == 1001
        half.close()


async def test_set_password_replaces_a_lost_password(
    engine: str, new_database: Databases, tmp_path: Path
) -> None:
    """Two equal lines become the password and end every log-in, if no server has SQLite's file."""
    url = new_database(tmp_path).replace("postgresql:", "postgres:")
    same = url.partition("?")[0].replace(":", "+driver:", 1) + "?sslmode=prefer&ssl=false&more=x"
    place = [f"--database-url={same}", SECRET, "set-password"]
    good = "new one \nnew one \n"
    async with (
        running(tmp_path, url) as [process],
        company(process, "alice") as [alice],
        alice.chat("1") as chat,
    ):
        if engine == "sqlite":
            await refuses(tmp_path, "another process", *place, alice.name, typed=good)
            assert await process.end() == 0
        for typed in ("12345 \n12345\n", "123\n123\n"):
            await refuses(tmp_path, "password", *place, alice.name, typed=typed)
        await refuses(tmp_path, "user", *place, "nobody-like-this", typed=good)
        command = [sys.executable, str(PROGRAM), *place, alice.name.upper()]
        code, told = await run(*command, folder=tmp_path, typed=good)
        assert code == 0 and "new one" not in told
        if engine == "sqlite":
            await process.again()
        else:
            assert await chat.is_closed() == 4401
        await alice.ask("GET", "/users/me", status=401)
        form = {"username": alice.name, "password": "1234"}
        await alice.ask("POST", "/auth/token", form, status=400)
        await alice.ask("POST", "/auth/token", form | {"password": "new one "})
