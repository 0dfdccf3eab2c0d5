"""Settings and the command line: where they come from, what is refused, and how it all ends."""

import asyncio
import contextlib
import itertools
import re
import secrets
import signal
import socket
import stat
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Launch, Start
from tests.helpers import (
    LOST,
    PROGRAM,
    ROOT,
    SECRET,
    SETTINGS,
    Server,
    Wire,
    background,
    claims,
    forge,
    run,
    unique,
)
from tests.postgres import drop_database, execute, free_port, run_apart, with_database


def config(folder: Path, **settings: Any) -> None:
    """Write a config.ini with these settings."""
    lines = ["[chatserver]", *(f"{key} = {value}" for key, value in settings.items())]
    (folder / "config.ini").write_text("\n".join(lines) + "\n", "utf-8")


def dotenv(folder: Path, *lines: str) -> None:
    """Write a .env with these lines."""
    (folder / ".env").write_text("\n".join(lines) + "\n", "utf-8")


def one_line(folder: Path, *arguments: str, typed: str = "", **settings: Any) -> str:
    """Check that the program refuses to start, in one line and within 5 s; return the line."""
    code, out, err = run(folder, *arguments, typed=typed, **settings)
    assert code != 0
    assert out == ""
    (line,) = err.splitlines()
    assert line.strip()
    return line


# --- The files that come with the program


def documented() -> dict[str, str]:
    """Return what config.ini shows, commented out, as name and value."""
    text = (ROOT / "config.ini").read_text("utf-8")
    return dict(re.findall(r"^# ?(\w+) *= *(.*?) *$", text, re.MULTILINE))


def test_config_ini_lists_every_setting_at_its_default() -> None:
    """The config.ini that comes along has every setting, commented out, and no other."""
    assert documented() == SETTINGS
    text = (ROOT / "config.ini").read_text("utf-8")
    active = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert active == ["[chatserver]"]
    assert len(text.splitlines()) <= 80


def test_config_ini_works_with_every_line_switched_on(launch: Launch, tmp_path: Path) -> None:
    """With every comment sign taken away, config.ini says what held without it."""
    port = free_port()
    config(tmp_path, **(documented() | {"port": port, "secret_key": SECRET}))
    assert launch().listening().endswith(f":{port}")


def test_the_program_names_the_packages_of_requirements_txt() -> None:
    """The block for `uv run` at the top of the program is requirements.txt and its Python."""
    text = PROGRAM.read_text("utf-8")
    block = re.search(r"(?m)^# /// script$\s(?P<toml>(^#(| .*)$\s)+)^# ///$", text)
    assert block is not None
    lines = block["toml"].splitlines()
    script = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    needed = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    needed = [line.strip() for line in needed if line.strip() and not line.startswith("#")]
    assert script["dependencies"] == needed
    assert script["requires-python"] == ">=3.11"


# --- Where settings come from


SOURCES = ["config.ini", ".env", "environment", "command line"]


@pytest.mark.parametrize("count", range(1, 5))
def test_each_source_overrides_those_before(launch: Launch, tmp_path: Path, count: int) -> None:
    """Command line over environment over .env over config.ini."""
    ports = [free_port() for _ in range(count)]
    arguments: list[str] = []
    environment: dict[str, Any] = {}
    for source, port in zip(SOURCES[:count], ports, strict=True):
        match source:
            case "config.ini":
                config(tmp_path, port=port)
            case ".env":
                dotenv(tmp_path, f"PORT={port}", "HOST=127.0.0.1")
            case "environment":
                environment |= {"port": port, "host": "127.0.0.1"}
            case _:
                arguments += ["--port", str(port)]
    assert launch(*arguments, **environment).listening() == f"http://127.0.0.1:{ports[-1]}"


@pytest.mark.parametrize(
    "lines",
    [
        ("# PORT=1", "", "OTHER=1", "OTHER=2", "BARE", "PORT={port}", "export HOST=127.0.0.1"),
        ('export PORT="{port}"', "HOST='127.0.0.1'", "  MESSAGE_LENGTH = 100  ", 'METRICS="off"'),
        ("PORT={port} # the port", 'HOST="127.0.0.1"   # loopback', "export METRICS=off\t# no"),
    ],
)
def test_dotenv_is_read_as_shells_and_compose_do(
    launch: Launch, tmp_path: Path, lines: tuple[str, ...]
) -> None:
    """A .env may say export, quote, and comment, and hold what is not ours."""
    port = free_port()
    dotenv(tmp_path, *(line.format(port=port) for line in lines))
    assert launch().listening() == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("argument", [["--port", "{port}"], ["--port={port}"]])
def test_arguments_are_written_either_way(launch: Launch, argument: list[str]) -> None:
    """`--port 1` and `--port=1` are the same."""
    port = free_port()
    process = launch(*(each.format(port=port) for each in argument))
    assert process.listening() == f"http://127.0.0.1:{port}"


def test_a_port_from_the_environment_opens_every_address(launch: Launch, tmp_path: Path) -> None:
    """A host that gives PORT wants every address; a PORT from elsewhere stays on loopback."""
    port = free_port()
    process = launch(port=port)
    socket.create_connection(("127.0.0.2", port), 5).close()
    assert process.stop() == 0
    config(tmp_path, port=port)
    launch()
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), 5)


async def test_no_configuration_at_all_works(
    launch: Launch, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """In an empty folder a database and a secret are made, for the owner's eyes only."""
    server = Server(launch("--port", "0"), session)
    alice = await server.user("alice")
    found = None
    for file in tmp_path.iterdir():
        text = (
            file.read_bytes().decode("latin-1").strip()
            if not file.name.endswith((".db", "-wal", "-shm"))
            else ""
        )
        if 32 <= len(text) < 1000 and "\n" not in text:
            token = forge(claims(alice.token), key=text)
            if (await server.get("/users/me", token=token)).status == 200:
                found = file
    assert found is not None, sorted(file.name for file in tmp_path.iterdir())
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert (tmp_path / "chat.db").exists()
    key = found.read_bytes()
    assert server.process.stop() == 0
    again = Server(launch("--port", "0"), session)
    (await again.get("/users/me", token=alice.token)).ok()
    assert found.read_bytes() == key
    assert key.decode() not in server.process.stderr + server.process.stdout


async def test_a_secret_is_taken_as_it_is(
    launch: Launch, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """Percent signs, hashes and semicolons are part of a secret in config.ini."""
    key = "%(x)s%%#;'\"=" + "k" * 32
    config(tmp_path, secret_key=key)
    server = Server(launch("--port", "0"), session)
    alice = await server.user("alice")
    token = forge(claims(alice.token), key=key)
    (await server.get("/users/me", token=token)).ok()


async def test_settings_have_their_effect(start: Start) -> None:
    """Lengths, limits, algorithm and life time are those that were set."""
    server = await start(
        password_min_length=6,
        message_length=10,
        history_limit=5,
        frame_bytes=2000,
        body_bytes=1000,
        algorithm="HS512",
        access_token_expire_minutes=5,
    )
    (await server.register(unique("x"), "12345")).refused(400, "bad_request")
    name = unique("alice")
    (await server.register(name, "123456")).ok(201)
    login = (await server.login(name, "123456")).ok()
    assert login["expires_in"] == 300
    token = login["access_token"]
    content = claims(token)
    assert content["exp"] - content["iat"] == 300
    (await server.get("/users/me", token=forge(content, alg="HS256"))).refused(401)
    (await server.get("/users/me", token=forge(content, alg="HS512"))).ok()
    path = "/rooms/1/messages"
    (await server.post(path, token=token, json={"message": "x" * 11})).refused(400)
    (await server.post(path, token=token, json={"message": "x" * 1000})).refused(413)
    for number in range(7):
        (await server.post(path, token=token, json={"message": f"{number:010}"})).ok(201)
    assert len((await server.get(f"{path}?limit=100", token=token)).ok()) == 5
    async with server.chat("1", token=token) as ws:
        await ws.say("x" * 1500)
        await ws.refusal("bad_request")
        await ws.say("x" * 2100)
        assert await ws.closed() == 1009


async def test_registration_can_be_closed(start: Start) -> None:
    """With `registration=closed` nobody gets an account."""
    server = await start(registration="closed")
    (await server.register(unique("x"))).refused(403, "forbidden")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///kept.db",
        "sqlite:///sub folder/kept.db",
        "sqlite:///{folder}/kept.db",
        "sqlite+pysqlite:///{folder}/kept.db",
    ],
)
def test_sqlite_urls_are_sqlalchemys(launch: Launch, tmp_path: Path, url: str) -> None:
    """Three slashes are relative, four absolute, and a driver is dropped."""
    (tmp_path / "sub folder").mkdir()
    launch("--port", "0", database_url=url.format(folder=tmp_path))
    where = tmp_path / "sub folder" if "sub" in url else tmp_path
    assert (where / "kept.db").exists()


@pytest.mark.parametrize(
    ("scheme", "query"),
    [
        ("postgres", ""),
        ("postgresql+asyncpg", ""),
        ("postgresql+psycopg2", "?sslmode=disable"),
        ("postgres", "?sslmode=prefer&channel_binding=prefer&connect_timeout=10"),
        ("postgresql", "?application_name=chat&target_session_attrs=any&options="),
    ],
)
def test_postgres_urls_are_as_hosts_give_them(
    launch: Launch, postgres_url: str, scheme: str, query: str
) -> None:
    """Whatever the scheme is called, and whatever parameters a host adds, it connects."""
    url = scheme + postgres_url.removeprefix("postgresql").split("?")[0] + query
    launch("--port", "0", database_url=url, secret_key=SECRET)


def test_a_pooler_that_cannot_listen_is_told(tmp_path: Path, postgres_url: str) -> None:
    """A URL that goes through pgbouncer works, or one line says what to change."""
    url = postgres_url + ("&" if "?" in postgres_url else "?") + "pgbouncer=true"
    line = one_line(tmp_path, "--port", "0", database_url=url, secret_key=SECRET)
    assert "pgbouncer" in line


# --- What is refused


BAD_VALUES = [
    *(("port", value) for value in ("x", "-1", "65536", "1.5")),
    *(("workers", value) for value in ("x", "0")),
    *(("algorithm", value) for value in ("none", "RS256", "hs256x")),
    ("registration", "maybe"),
    *(("access_token_expire_minutes", value) for value in ("x", "-5")),
    ("password_min_length", "-1"),
    ("message_length", "9" * 5000),
    *(("secret_key", value) for value in ("short", "x" * 31)),
    ("metrics", "perhaps"),
    *(("trusted_proxies", value) for value in ("not-an-address", "10.0.0.0/99")),
    *(("database_url", value) for value in ("mysql://x/y", "chat.db", "sqlite:/x")),
]


def all_of(tmp_path: Path, check: Callable[..., None], cases: Iterable[Sequence[Any]]) -> None:
    """Check every case in a folder of its own, two at a time, and tell all that failed."""

    def attempt(numbered: tuple[int, Sequence[Any]]) -> str:
        """Return what is wrong with a case."""
        number, case = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(folder, *case)
        except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
            return f"{case}: {str(error).splitlines()[:1]}"
        return ""

    with ThreadPoolExecutor(2) as threads:
        failures = [failure for failure in threads.map(attempt, enumerate(cases)) if failure]
    assert failures == []


def test_a_bad_value_is_named_with_its_place(tmp_path: Path) -> None:
    """Wherever a bad value stands, one line names the place and the key."""

    def check(folder: Path, source: str) -> None:
        """Check one place."""
        line = refusal(folder, source, "port", "x")
        named = [place for place in SOURCES if place in line]
        assert named == [source] or (source == "command line" and "--port" in line), line

    all_of(tmp_path, check, [(source,) for source in SOURCES])


def test_a_bad_value_stops_the_start(tmp_path: Path) -> None:
    """What a setting cannot be is refused in one line, which tells no secret."""

    def check(folder: Path, source: str, key: str, value: str) -> None:
        """Check one value in one place."""
        line = refusal(folder, source, key, value)
        assert key != "secret_key" or value not in line

    sources = itertools.cycle(SOURCES)
    all_of(tmp_path, check, [(source, *bad) for source, bad in zip(sources, BAD_VALUES)])  # noqa: B905


def refusal(folder: Path, source: str, key: str, value: str) -> str:
    """Set a bad value in a source, check that it is refused by name, and return the line."""
    arguments: list[str] = []
    environment: dict[str, str] = {}
    match source:
        case "config.ini":
            config(folder, **{key: value})
        case ".env":
            dotenv(folder, f"{key.upper()}={value}")
        case "environment":
            environment = {key: value}
        case _:
            arguments = ["--" + key.replace("_", "-"), value]
    line = one_line(folder, *arguments, **environment)
    assert key in line.lower().replace("-", "_")
    return line


def test_an_unknown_argument_stops_the_start(tmp_path: Path) -> None:
    """What the command line does not know is named in one line, and nothing is made."""

    def check(folder: Path, *arguments: str) -> None:
        """Check one command line."""
        line = one_line(folder, *arguments)
        named = [each.split("=")[0].strip("-").lower() for each in arguments]
        assert any(name in line.lower() for name in named), line
        assert list(folder.iterdir()) == []

    unknown = "--nonsense 1|--nonsense=1|--nonsense|--por 1|--port|--PORT 1|-p 1|nonsense|8000"
    all_of(tmp_path, check, [each.split() for each in [*unknown.split("|"), "--port 0 stray"]])


def test_a_config_ini_with_mistakes_stops_the_start(tmp_path: Path) -> None:
    """An unknown key or section, a doubled one, or what is no INI at all is one line."""

    def check(folder: Path, text: str, name: str) -> None:
        """Check one file."""
        (folder / "config.ini").write_bytes(text.encode("utf-8", "surrogateescape"))
        line = one_line(folder)
        assert "config.ini" in line
        assert name in line

    mistakes = [
        ("[chatserver]\nnonsense = 1\n", "nonsense"),
        ("[chatserver]\nport = 0\nport = 1\n", "port"),
        ("[chatserver]\nport\n", ""),
        ("port = 0\n", ""),
        ("[chatserver\nport = 0\n", ""),
        ("[chat]\nport = 0\n", "chat"),
        ("[chatserver]\nport = 0\n[more]\nport = 1\n", "more"),
        ("[chatserver]\nport = \udcff\n", ""),
    ]
    all_of(tmp_path, check, mistakes)


def test_a_port_in_use_is_told(launch: Launch, tmp_path: Path) -> None:
    """A port that is taken, by whatever program, stops the start with one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in one_line(tmp_path, "--port", str(port))
    other = tmp_path / "other"
    other.mkdir()
    port = free_port()
    launch("--port", str(port))
    assert str(port) in one_line(other, "--port", str(port))
    assert str(port) in one_line(other, "--port", str(port), "--host", "0.0.0.0")  # noqa: S104


@pytest.mark.parametrize("url", ["sqlite:///chat.db", "sqlite:///{folder}/chat.db", "link"])
def test_a_second_process_on_one_file_is_refused(launch: Launch, tmp_path: Path, url: str) -> None:
    """One process owns a SQLite file, by whatever path another one comes to it."""
    first = launch("--port", "0")
    if url == "link":
        (tmp_path / "link.db").symlink_to(tmp_path / "chat.db")
        url = "sqlite:///link.db"
    line = one_line(tmp_path, "--port", "0", database_url=url.format(folder=tmp_path))
    assert "chat.db" in line or "link.db" in line
    assert first.popen.poll() is None
    first.kill()
    launch("--port", "0")


def test_workers_need_postgres(tmp_path: Path) -> None:
    """More than one worker on SQLite is refused with the reason."""
    line = one_line(tmp_path, "--port", "0", "--workers", "2")
    assert "workers" in line.lower()
    assert "sqlite" in line.lower() or "postgres" in line.lower()


def test_a_database_that_cannot_hold_every_text_is_refused(
    tmp_path: Path, postgres_url: str
) -> None:
    """A Postgres database that is not in UTF-8 stops the start, and is told why."""
    name = f"chat_latin_{secrets.token_hex(6)}"
    made = f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    run_apart(execute(postgres_url, made))
    url = with_database(postgres_url, name)
    try:
        assert "UTF8" in one_line(tmp_path, "--port=0", database_url=url, secret_key=SECRET)
    finally:
        drop_database(postgres_url, url)


def test_workers_that_cannot_start_say_so_once(tmp_path: Path) -> None:
    """Where no database answers, one worker tries and tells it, not each of them."""
    url = f"postgresql://chat:secret@127.0.0.1:{free_port()}/chat"
    line = one_line(tmp_path, "--workers", "3", database_url=url, secret_key=SECRET)
    assert "database_url" in line


def test_postgres_needs_a_secret(tmp_path: Path, postgres_url: str) -> None:
    """With Postgres the secret has to be given, for all processes share it."""
    assert "secret_key" in one_line(tmp_path, "--port", "0", database_url=postgres_url).lower()


def test_a_postgres_that_is_not_there_is_told_without_its_password(tmp_path: Path) -> None:
    """A database that refuses is one line, and the password in its URL is not in it."""
    url = f"postgresql://chat:hunter2@127.0.0.1:{free_port()}/chat"
    settings: dict[str, Any] = {"database_url": url, "secret_key": SECRET}
    assert "hunter2" not in one_line(tmp_path, "--port", "0", **settings)


@pytest.mark.parametrize("name", ["folder", "nonsense.db", "no-such-folder/chat.db"])
def test_a_file_that_is_no_database_is_told(tmp_path: Path, name: str) -> None:
    """What cannot be opened as a database is named in one line, and left as it is."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "nonsense.db").write_text("this is no database, and long enough to tell " * 50)
    line = one_line(tmp_path, "--port", "0", database_url=f"sqlite:///{name}")
    assert name in line
    assert (tmp_path / "nonsense.db").read_text().startswith("this is no database")


# --- How it ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_shutdown_is_clean(start: Start, number: signal.Signals) -> None:
    """Sockets get 1001 and the exit code is 0 within 5 s, even with a reader that has stalled."""
    server = await start()
    alice = await server.user("alice")
    room = await alice.room()
    stalled = Wire(alice, room, buffer=4096)
    half = socket.create_connection(("127.0.0.1", stalled.server_port))
    half.sendall(b"POST /auth/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    try:
        async with alice.chat(room) as ws, server.chat(room) as not_yet:
            poll = alice.get(f"/rooms/{room}/events?after=1000&wait=30")
            async with background(poll):
                for _ in range(40):
                    await ws.say("愛" * 4000)
                await ws.deliver("the last")
                server.process.popen.send_signal(number)
                assert await ws.closed() == 1001
                assert await not_yet.closed() == 1001
                assert await asyncio.to_thread(server.process.popen.wait, 5) == 0
    finally:
        stalled.close()
        half.close()
    assert len(server.process.stdout.splitlines()) == 1


async def test_what_was_accepted_is_finished(start: Start) -> None:
    """Requests under way when the shutdown comes are answered truly or not at all."""
    server = await start()
    alice = await server.user("alice")
    acked: list[int] = []

    async def write() -> None:
        """Post messages until the server is gone."""
        with contextlib.suppress(*LOST):
            for number in itertools.count():
                body = {"message": f"text {number}"}
                answer = await alice.post("/rooms/1/messages", json=body)
                if answer.status == 503:
                    return
                acked.append(answer.ok(201)["seq"])

    async with background(*(write() for _ in range(10))) as tasks:
        while len(acked) < 50:
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(server.process.stop, 5) == 0
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
    await server.restart()
    stored = [event["seq"] for event in await alice.events("1") if event["type"] == "message"]
    assert len(acked) == len(set(acked))
    assert set(acked) <= set(stored)


async def test_a_restart_keeps_everything(start: Start) -> None:
    """Accounts, tokens, rooms, roles and messages are there after a restart."""
    server = await start()
    alice = await server.user("alice")
    room = await alice.room(kind="private")
    await alice.say(room, "remember")
    before = [(await alice.get(path)).ok() for path in ("/rooms", f"/rooms/{room}/events")]
    assert await asyncio.to_thread(server.process.stop) == 0
    await server.restart()
    after = [(await alice.get(path)).ok() for path in ("/rooms", f"/rooms/{room}/events")]
    assert before == after
