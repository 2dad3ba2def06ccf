"""Addresses as clients write them: base URLs without /v1 or with two, slashes at the end or doubled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = "/v1"
_SHOWN = 120  # characters of an address in a message


class PlainAddresses:
    """Rewrites an address that is not there to the one that is meant.

    Slashes count once, and not at the end. /v1/v1/... is /v1/...; with or without /v1, the one that exists is taken.
    """

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            spellings = _spellings(scope["path"])
            found = next((path for path in spellings if any(_routes_at(self._api, path))), scope["path"])
            if found != scope["path"]:
                scope = {**scope, "path": found, "raw_path": found.encode("utf-8")}
        await self._app(scope, receive, send)


def _spellings(path: str) -> Sequence[str]:
    """What an address may mean, the nearest first."""
    plain = re.sub("/{2,}", "/", path).rstrip("/") or "/"
    while plain.startswith(f"{_PREFIX}{_PREFIX}/"):
        plain = plain.removeprefix(_PREFIX)
    other = plain.removeprefix(_PREFIX) if plain.startswith(f"{_PREFIX}/") else _PREFIX + plain
    return (plain, other)


def methods_at(api: FastAPI, path: str) -> list[str]:
    """The methods that an address takes, [] for one that is not there."""
    return sorted({method for route in _routes_at(api, path) for method in getattr(route, "methods", None) or ()})


def _routes_at(api: FastAPI, path: str) -> Iterator[BaseRoute]:
    """The routes of an address, whatever their methods."""
    for route in api.routes:
        match, _ = route.matches({"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []})
        if match is not Match.NONE:
            yield route


def not_there(api: FastAPI, path: str) -> str:
    """The message for an address that is not there: what is."""
    return f"no such address: {_shown(path)}; there are: {', '.join(_addresses(api.routes))}; /docs describes them"


def wrong_method(api: FastAPI, method: str, path: str) -> str:
    """The message for a method that an address does not take."""
    return f"{_shown(path)} does not take {_shown(method)}; send {' or '.join(methods_at(api, path))}"


def _addresses(routes: Sequence[BaseRoute]) -> list[str]:
    """ "METHOD PATH" of what /docs describes."""
    found: dict[str, list[str]] = {}
    for route in routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            found.setdefault(re.sub(r":\w+}", "}", route.path), []).extend(sorted(route.methods or ()))
    return [f"{'/'.join(methods)} {path}" for path, methods in found.items()]


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN])
