"""The API document, and a client that holds every answer of a server against it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from tests.processes import ROOT

FILE = ROOT / "web" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
COMPONENTS = DOCUMENT["components"]
GUIDE: str = DOCUMENT["info"]["description"]
OPERATIONS = {
    (method.upper(), path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Return what a node is, or what it refers to, with what it adds to that."""
    if "$ref" not in node:
        return node
    place: Any = DOCUMENT
    for name in node["$ref"].removeprefix("#/").split("/"):
        place = place[name]
    return {**resolve(place), **{key: value for key, value in node.items() if key != "$ref"}}


def closed(node: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that allows nothing but what the document names."""
    node = {**resolve(node)}
    if "properties" in node:
        node["properties"] = {name: closed(each) for name, each in node["properties"].items()}
        return node | {"unevaluatedProperties": False}
    if "items" in node:
        return node | {"items": closed(node["items"])}
    return node | {"oneOf": [closed(each) for each in node["oneOf"]]} if "oneOf" in node else node


def validate(value: object, schema: dict[str, Any], told: str) -> None:
    """Check a value against a schema of the document."""
    validator = jsonschema.Draft202012Validator({**closed(schema), "components": COMPONENTS})
    wrong = [error.message for error in validator.iter_errors(value)]
    assert wrong == [], told


def template_of(path: str) -> str:
    """Return the path of the document that a request's path belongs to."""
    paths: list[str] = sorted(DOCUMENT["paths"])
    path = path.partition("?")[0]
    return next(one for one in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", one), path))


def examples(node: object) -> Iterator[tuple[dict[str, Any], object]]:
    """Yield every example with its schema."""
    if isinstance(node, dict):
        for example in node.get("examples", []):
            yield node, example
        if "example" in node:
            yield node["schema"], node["example"]
        for each in node.values():
            yield from examples(each)


class Api:
    """A server whose every answer is held against the document."""

    def __init__(self, client: Any) -> None:
        """Speak to this server; remember which answers came."""
        self.client = client
        self.tokens: dict[str, str] = {}
        self.seen: set[tuple[str, str, str]] = set()
        self.bodies: list[Any] = []

    async def ask(
        self, who: str, request: str, body: object = None, status: int = 0, **options: Any
    ) -> Any:
        """Send a request; check that the answer is documented; return its JSON."""
        method, path = request.split(" ")
        headers = {"Authorization": f"Bearer {self.tokens[who]}"} if who else {}
        headers |= options.pop("headers", {})
        options |= {"json": body} if body is not None else {}
        async with self.client.request(method, path, headers=headers, **options) as answer:
            text = await answer.text()
        told = f"{who} {request} {body} -> {answer.status} {text[:300]}"
        operation, code = (method, template_of(path)), str(answer.status)
        assert status in (0, answer.status), told
        assert code in OPERATIONS[operation]["responses"], f"undocumented: {told}"
        self.seen.add((*operation, code))
        response = resolve(OPERATIONS[operation]["responses"][code])
        for name, header in response.get("headers", {}).items():
            value = answer.headers[name]
            validate(int(value) if value.isdigit() else value, resolve(header)["schema"], told)
        content = response.get("content", {})
        assert answer.content_type in content if content else text == "", told
        if "application/json" not in content:
            return text or None
        self.bodies.append(json.loads(text))
        validate(self.bodies[-1], content["application/json"].get("schema", {}), told)
        return self.bodies[-1]

    async def enrol(self, *names: str) -> None:
        """Register people and log them in."""
        for name in names:
            user = {"username": name, "email": f"{name}@example.com", "password": "1234"}
            await self.ask("", "POST /auth/register", user, 201)
            form = {"username": f" {name}@EXAMPLE.com ", "password": "1234"}
            token = await self.ask("", "POST /auth/token", status=200, data=form)
            self.tokens[name] = token["access_token"]
