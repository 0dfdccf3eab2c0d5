"""The API document, and what it allows."""

import json
from typing import Any

from tests.processes import ROOT

DOCUMENT: dict[str, Any] = json.loads((ROOT / "web/openapi.json").read_text("utf-8"))
COMPONENTS = DOCUMENT["components"]
GUIDE: str = DOCUMENT["info"]["description"]
OPERATIONS = {
    (method.upper(), path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


def closed(node: Any) -> Any:
    """Return a part of the document, its references followed, that allows only what it names."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        _, _, kind, name = node["$ref"].split("/")
        return closed(COMPONENTS[kind][name])
    only = {"unevaluatedProperties": False} if "properties" in node else {}
    return {key: each if key == "allOf" else closed(each) for key, each in node.items()} | only
