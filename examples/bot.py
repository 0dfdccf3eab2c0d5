"""A bot that answers /roll: python examples/bot.py http://127.0.0.1:8000 NAME PASSWORD ROOM."""
# ruff: noqa: INP001 (these are programs, not a package)

import asyncio
import secrets
import sys

import aiohttp


async def attend(url: str, name: str, password: str, room: str) -> None:
    """Answer whoever asks, until the connection or the log-in ends."""
    async with aiohttp.ClientSession(url) as http:
        form = {"username": name, "password": password}
        async with http.post("/auth/token", data=form, raise_for_status=True) as answer:
            token = (await answer.json())["access_token"]
        path, log_in = f"/websockets/chat/{room}", {"Authorization": f"Bearer {token}"}
        async with http.ws_connect(path, headers=log_in, heartbeat=30) as ws:
            async for frame in ws:
                event = frame.json()
                if event["type"] == "message" and event.get("message") == "/roll":
                    eyes = secrets.randbelow(6) + 1
                    await ws.send_json({"message": f"{event['username']} rolls {eyes}"})


asyncio.run(attend(*sys.argv[1:5]))
# What is asked while it is away it never answers: exercise 1 is the bot that does.
