"""Programs of others that tests run, and what the server itself runs from."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.processes import ROOT
from tests.words import missing

Program = asyncio.subprocess.Process


def tool(*names: str) -> str:
    """Return the path of a program that a test needs, by one of its names, or skip the test."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    found = [one for name in names if (one := shutil.which(name, path=path))]
    return found[0] if found else missing(f"no {names[0]}")


@asynccontextmanager
async def started(
    *command: str, folder: Path, errors: Any = None, **variables: Any
) -> AsyncIterator[Program]:
    """Run a program in a folder for as long as the block lasts, and all that it starts."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    place: Any = {"cwd": folder, "env": {**os.environ, **variables}, "start_new_session": True}
    name, *arguments = command
    program = await asyncio.create_subprocess_exec(name, *arguments, **pipes, **place)
    try:
        yield program
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGTERM)
        await program.communicate()


async def run(*command: str, folder: Path, typed: str = "", **variables: Any) -> tuple[int, str]:
    """Run a program to its end, and type this; return its exit code and all that it says."""
    async with started(*command, folder=folder, errors=subprocess.STDOUT, **variables) as program:
        out, _ = await asyncio.wait_for(program.communicate(typed.encode()), 60)
    return int(program.returncode or 0), out.decode().strip()


def copy_program(folder: Path) -> None:
    """Copy what the server runs from."""
    for name in ("chatserver.py", "schema.sql", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "web", folder / "web")
