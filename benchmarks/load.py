#!/usr/bin/env python3
"""One room, many sockets, a few busy senders: how many deliveries a second of server CPU buys.

It starts a server of its own on 127.0.0.1, on SQLite in a temporary folder and with the limits off,
puts it on one core and itself on another, and ends by itself. It needs Linux (/proc) and the
server's own packages.

    python benchmarks/load.py --sockets 1000 --senders 8 --seconds 3
"""

import argparse
import asyncio
import contextlib
import json
import os
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = Path(__file__).resolve().parent.parent / "chatserver.py"
MARK = b"~load~"  # once in every message, and nowhere else in what the server sends
TEXT = MARK.decode() + " The quick brown fox jumps over the lazy dog near the river bank"
ROOM = "hall"
NO_LIMITS = ("messages_per_second", "registrations_per_hour", "sockets_per_user")
WARM_UP = 1.0  # seconds of load before the clock starts


@dataclass
class Tally:
    """What has been counted so far."""

    deliveries: int = 0
    messages: int = 0
    misplaced: int = 0  # events that did not come right after their predecessor
    latencies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """The running server, and a token for each sender."""

    pid: int
    port: int
    tokens: list[str]

    def cpu(self) -> float:
        """Return the CPU seconds that all threads of the server have used."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


class Listener(asyncio.Protocol):
    """A socket that only reads: it counts marks and decodes nothing, so that many fit one core."""

    def __init__(self, tally: Tally, port: int, token: str) -> None:
        """Remember where to go; `ready` is done when the server has upgraded."""
        self.tally, self.port, self.token = tally, port, token
        self.rest = b""  # too short to hold a mark, perhaps the beginning of one
        self.ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        assert isinstance(transport, asyncio.Transport)
        lines = [
            f"GET /websockets/chat/{ROOM} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            f"Authorization: Bearer {self.token}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        """Count; the first bytes say whether the upgrade went well."""
        data = self.rest + data
        self.tally.deliveries += data.count(MARK)
        self.rest = data[1 - len(MARK) :]
        if not self.ready.done():
            self.ready.set_result(data.startswith(b"HTTP/1.1 101 "))


async def send(socket: aiohttp.ClientWebSocketResponse, tally: Tally, window: int) -> None:
    """Keep `window` messages under way; each echo lets the next one go."""
    began: dict[str, float] = {}
    seq = None

    async def one() -> None:
        client_id = secrets.token_hex(8)
        began[client_id] = time.perf_counter()
        await socket.send_str(json.dumps({"message": TEXT, "client_id": client_id}))

    for _ in range(window):
        await one()
    async for frame in socket:
        event = json.loads(frame.data)
        if event["type"] != "message":
            continue
        tally.deliveries += 1
        tally.misplaced += seq not in (None, event["seq"] - 1)
        seq = event["seq"]
        if (start := began.pop(event["client_id"], None)) is not None:
            tally.messages += 1
            tally.latencies.append(time.perf_counter() - start)
            await one()


@contextlib.asynccontextmanager
async def running_server(senders: int) -> AsyncIterator[tuple[Target, aiohttp.ClientSession]]:
    """Start a server, register the senders and make the room; stop it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        limits = {name.upper(): "0" for name in NO_LIMITS}
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])  # the server inherits this core
        process = subprocess.Popen(
            [
                sys.executable,
                str(PROGRAM),
                "--port=0",
                f"--database-url=sqlite:///{folder}/chat.db",
            ],
            cwd=folder,
            env={"PATH": os.environ["PATH"], **limits},
            stdout=subprocess.PIPE,
        )
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            url = line.decode().split()[-1]
            async with aiohttp.ClientSession(url) as session:
                tokens = [await log_in(session, f"user{number}") for number in range(senders)]
                room = {"room_id": ROOM, "name": ROOM}
                headers = {"Authorization": f"Bearer {tokens[0]}"}
                await session.post("/rooms", json=room, headers=headers, raise_for_status=True)
                yield Target(process.pid, int(url.rpartition(":")[2]), tokens), session
        finally:
            process.terminate()
            process.wait(10)


async def log_in(session: aiohttp.ClientSession, name: str) -> str:
    """Register somebody and return a token."""
    user = {"username": name, "email": f"{name}@example.org", "password": "benchmark"}
    await session.post("/auth/register", json=user, raise_for_status=True)
    form = {"username": name, "password": user["password"]}
    async with session.post("/auth/token", data=form, raise_for_status=True) as response:
        return str((await response.json())["access_token"])


async def listen(target: Target, tally: Tally, count: int) -> list[asyncio.BaseTransport]:
    """Open the sockets that only read."""
    loop = asyncio.get_running_loop()
    opened: list[asyncio.BaseTransport] = []
    for number in range(count):
        token = target.tokens[number % len(target.tokens)]
        new = partial(Listener, tally, target.port, token)
        transport, listener = await loop.create_connection(new, "127.0.0.1", target.port)
        assert await listener.ready, "the server refused a socket"
        opened.append(transport)
    return opened


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the load and return the figures."""
    tally = Tally()
    async with running_server(options.senders) as (target, session), asyncio.TaskGroup() as tasks:
        opened = await listen(target, tally, options.sockets - options.senders)
        busy = []
        for token in target.tokens:
            headers = {"Authorization": f"Bearer {token}"}
            socket = await session.ws_connect(f"/websockets/chat/{ROOM}", headers=headers)
            busy.append(tasks.create_task(send(socket, tally, options.window)))
        await asyncio.sleep(WARM_UP)
        tally.deliveries = tally.messages = 0
        tally.latencies.clear()
        clock, cpu = time.perf_counter(), target.cpu()
        await asyncio.sleep(options.seconds)
        took, used = time.perf_counter() - clock, target.cpu() - cpu
        deliveries, messages = tally.deliveries, tally.messages
        for task in busy:
            task.cancel()
        for transport in opened:
            transport.close()
    latencies = statistics.quantiles(tally.latencies, n=100)
    return {
        "messages_per_second": round(messages / took),
        "deliveries_per_second": round(deliveries / took),
        "deliveries_per_cpu_second": round(deliveries / used),
        "server_cpu": round(used / took, 2),
        "echo_p50_ms": round(latencies[49] * 1000, 1),
        "echo_p99_ms": round(latencies[98] * 1000, 1),
        "misplaced": tally.misplaced,
    }


def bounded(least: int, most: int) -> Any:
    """Return a type for an option that takes whole numbers in a range."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    return number


def main() -> None:
    """Read the options, take a core each, measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sockets", type=bounded(1, 5000), default=1000)
    parser.add_argument("--senders", type=bounded(1, 32), default=8)
    parser.add_argument("--window", type=bounded(1, 64), default=4, help="messages under way")
    parser.add_argument("--seconds", type=bounded(1, 60), default=3)
    options = parser.parse_args()
    options.senders = min(options.senders, options.sockets)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(asyncio.run(measure(options))))


if __name__ == "__main__":
    main()
