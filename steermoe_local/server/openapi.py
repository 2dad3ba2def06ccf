"""The OpenAPI document with its errors and streams, and /docs, a page without external resources."""

from __future__ import annotations

import html
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .._util.files import tool_name

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
        }
    },
}
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": _ERROR_CONTENT}
    for status, text in {
        400: "The request cannot be answered as it is; the message says what to change.",
        401: "No valid API key.",
        403: "A host name that is not this server's, or something that is not allowed.",
        404: "No such model, steering or address.",
        408: "It took longer than the server's timeout.",
        409: "The name is taken, or in use.",
        413: "The body is too large.",
        415: "The body is not sent as JSON.",
        429: "Too many requests wait; Retry-After says when to come again.",
        503: "The model is being loaded, or the server is stopping.",
    }.items()
}

STREAMS: dict[str, Any] = {
    "description": "The answer; with `stream`, chunks of it as server-sent events up to `data: [DONE]`.",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's own validation errors, which this server never sends."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=tool_name().rpartition(" ")[2],
            summary=app.summary,
            description=app.description,
            routes=app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = _ERROR
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:14px/1.4 ui-monospace,monospace}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
    "summary{cursor:pointer}h2{margin-top:2rem}:root{color-scheme:light dark}"
)


def docs_page(app: FastAPI) -> str:
    """The OpenAPI document as an HTML page: each address, its fields and their meaning."""
    document = openapi(app)
    parts = [f"<h1>{html.escape(app.title)}</h1><p>{html.escape(app.description)}</p>"]
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1).</p>')
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            text = html.escape(operation.get("description", ""))
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if reference := content.get("schema", {}).get("$ref"):
                parts.append(_fields(document, reference))
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(app.title)}</title><style>{_STYLE}</style>"
    )
    return head + "\n".join(parts) + "</html>"


def _fields(document: dict[str, Any], reference: str) -> str:
    name = reference.rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{html.escape(field)}</code>{' (required)' if field in required else ''}</td>"
        f"<td><code>{html.escape(_type(facts))}</code></td><td>{html.escape(facts.get('description', ''))}</td></tr>"
        for field, facts in schema.get("properties", {}).items()
    ]
    return f"<details open><summary>{html.escape(name)}</summary><table>{''.join(rows)}</table></details>"


def _type(facts: dict[str, Any]) -> str:
    """A short name of a type."""
    if "$ref" in facts:
        return str(facts["$ref"]).rpartition("/")[2]
    for word in ("anyOf", "oneOf"):
        if word in facts:
            return " | ".join(dict.fromkeys(_type(option) for option in facts[word]))
    if "const" in facts:
        return repr(facts["const"])
    if "enum" in facts:
        return " | ".join(map(repr, facts["enum"]))
    if facts.get("type") == "array":
        return f"[{_type(facts.get('items', {}))}]"
    bounds = [f"{sign} {facts[key]}" for key, sign in _BOUNDS.items() if key in facts]
    return " ".join([str(facts.get("type", "any")), *bounds])


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
