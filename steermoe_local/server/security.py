"""ASGI middleware that checks host names, the API key and request bodies before the application sees them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from .api_errors import ApiError
from .json_requests import Bodies
from .settings import ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page, which asks for the key, and addresses that reveal nothing about the model or its users.
_PUBLIC = frozenset({"/", "/favicon.ico", "/health", "/docs", "/openapi.json"})
_PAGE = "/page/"
_DRAINED_SECONDS = 1.0
# Neither user names nor zones (%eth0) nor letters that a browser would have to translate.
_HOST = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[\w-]+(?:\.[\w-]+)*\.?))(?::(?P<port>[0-9]{0,5}))?", re.ASCII
)


class HostGuard:
    """Refuses host names that are not this server's, against DNS rebinding: a page can point its own name here.

    Addresses cannot be rebound, so they are accepted. What other headers say of the host (X-Forwarded-Host) counts for
    nothing. An address with a host in it (`GET http://HOST/...`) has to name the one of the Host header.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._names = frozenset(
            name.lower().strip("[]")
            for name in ("localhost", settings.host, *settings.allowed_hosts, *([] if settings.local else _own_names()))
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
            if not host_allowed(host, self._names):
                message = (
                    f"host {host[:100]!r} is not a name of this server; use its address, or start it with "
                    "--allowed-host NAME"
                )
                return await refuse(ApiError(403, message, kind="permission_error", code="unknown_host"), send)
            if scope["raw_path"].lower().startswith(b"http://"):
                named, _, path = scope["raw_path"][len(b"http://") :].partition(b"/")
                if named.lower() != hosts[0].strip().lower():
                    message = "the address of the request and its header Host name different hosts; send one"
                    return await refuse(ApiError(400, message, code="two_hosts"), send)
                path = b"/" + path
                scope = {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}
        return await self._app(scope, receive, send)


def host_allowed(header: str, names: frozenset[str]) -> bool:
    """Whether a Host header is one of the names, or an address, in the form of HTTP: HOST, HOST:PORT, [IPV6]:PORT."""
    found = _HOST.fullmatch(header.strip(" \t"))
    if found is None or (found["port"] and not 0 < int(found["port"]) < 65536):
        return False
    host = (found["v6"] or found["name"]).lower()
    if found["v6"] is None:
        host = host.removesuffix(".")
        if host in names or host.endswith(".localhost"):
            return True
    elif host in names:  # the server's own --host
        return True
    try:
        return ipaddress.ip_address(host).version == (4 if found["v6"] is None else 6)
    except ValueError:
        return False


def _own_names() -> tuple[str, ...]:
    name = socket.gethostname()
    return (name, name.partition(".")[0], f"{name.partition('.')[0]}.local")


class KeyGuard:
    """Requires the API key, if the server has one."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._digest = None if settings.api_key is None else _digest(settings.api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digest is not None and scope["type"] == "http" and not self._is_public(scope):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
            # Digests have one length: the time of the comparison reveals neither the key's length nor a right prefix.
            right = hmac.compare_digest(_digest(key.strip()), self._digest)
            if scheme.lower() != b"bearer" or not right:
                message = "no valid API key; send the header Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)
                return await refuse(error, send)
        return await self._app(scope, receive, send)

    @staticmethod
    def _is_public(scope: Scope) -> bool:
        public = scope["path"] in _PUBLIC or scope["path"].startswith(_PAGE)
        return public and scope["method"] in ("GET", "HEAD")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyGuard:
    """Reads bodies whole, within limits of size and time, and passes on only strict JSON, parsed."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._limit, self._seconds = settings.body_limit, settings.body_seconds
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        try:
            if b"expect" in headers:
                _require_json_type(headers)  # before the client is told to send the body
            body = await self._read(headers, receive)
            if body is None:
                return None  # the client is gone
            if body:
                _require_json_type(headers)
                scope = {**scope, **await self._bodies.parse(body)}
        except ApiError as error:
            if error.status == 413 and b"expect" not in headers:
                await _drain(receive)
            return await refuse(error, send)
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return await self._app(scope, replay, send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._limit:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limit:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            message_text = f"the body did not come within {self._seconds:g} seconds"
            raise ApiError(408, message_text, kind="timeout_error", code="slow_body") from None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit >> 20} MiB", code="body_too_large")


def _require_json_type(headers: dict[bytes, bytes]) -> None:
    """Raise ApiError for another type: a page of another origin can send those without a preflight request."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "the body is JSON; send the header Content-Type: application/json", code="content_type")


async def _drain(receive: Receive) -> None:
    """Read for a moment what the client still sends: it reads the answer only after that."""
    try:
        async with asyncio.timeout(_DRAINED_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    except TimeoutError:
        pass


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
