"""A shop with a chat below /chat/; the shop's own code posts there, each order once.

PYTHONPATH=. python examples/embed.py
curl -X PUT http://127.0.0.1:8080/orders/17
"""
# ruff: noqa: INP001 (these are programs, not a package)

import logging
import math
import secrets

from aiohttp import web

from chatserver import (
    CHAT,
    GET_USER,
    Chat,
    ChatError,
    Config,
    Fields,
    Login,
    create_app,
    post_message,
    register,
)

NAME = "shop"
ROOM = "1"  # the Lobby
LOGGER = logging.getLogger(NAME)
CHATS = web.AppKey("chats", Chat)
LOGIN = web.AppKey("login", Login)


async def open_account(site: web.Application) -> None:
    """Find the shop's account, or make it at the first start; nobody needs its password."""
    chat = site[CHATS]
    if not await chat.db.fetch(GET_USER, NAME):
        account = {"username": NAME, "email": "shop@example.com", "password": secrets.token_hex()}
        await register(chat, None, Fields(account))
    (row,) = await chat.db.fetch(GET_USER, NAME)
    site[LOGIN] = Login(NAME, row["version"], expires=math.inf)


async def take_order(request: web.Request) -> web.Response:
    """Take an order and announce it; one that is sent twice is announced once."""
    number = int(request.match_info["number"])
    message = {"room_id": ROOM, "message": f"Order {number} came in.", "client_id": f"o{number}"}
    try:
        await post_message(request.app[CHATS], request.app[LOGIN], Fields(message))
    except ChatError as error:
        LOGGER.warning("order %s is not announced: %s", number, error)
    return web.json_response({"order": number})


def create_site(config: Config) -> web.Application:
    """Build the shop, with the chat as a part of it."""
    site, chat = web.Application(), create_app(config)
    site[CHATS] = chat[CHAT]
    site.add_subapp("/chat/", chat)  # this first: it opens the database at the start
    site.on_startup.append(open_account)
    site.router.add_put(r"/orders/{number:\d{1,9}}", take_order)
    return site


if __name__ == "__main__":
    web.run_app(create_site(Config()), port=8080)
