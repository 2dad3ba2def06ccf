"""Running the server: its socket, its signals, and the line that it prints when it is ready."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType

import uvicorn

from ..errors import UsageError
from ..generation.engine import Engine
from .api_errors import is_new
from .app import create_app
from .registry import SteeringRegistry
from .settings import ServerSettings
from .worker import Worker

_GRACE = 30  # seconds for answers that are being decoded when the server is asked to stop
_CONNECTIONS = 512  # besides the waiting ones; more get 503

Say = Callable[[str], None]


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free port. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host}: not an address of this machine ({error.strerror or error})") from None
    found = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would let two programs share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another port, or 0 for a free one"
        ) from None
    return found


def url_of(listening: socket.socket) -> str:
    """The address for a browser."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Stops after the running answers on the first signal; at once on a second, or while the model is loading."""

    def __init__(self, config: uvicorn.Config, worker: Worker, say: Say) -> None:
        super().__init__(config)
        self._worker, self._say = worker, say

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM; uvicorn would raise them again at the end."""
        if self.should_exit or self._worker.state == "loading":
            os._exit(130)  # the engine's thread may be in the middle of something long
        self.should_exit = True
        if self._worker.n_running:
            self._say(f"finishing {self._worker.n_running} answers; Ctrl-C again stops at once")


def run_server(
    settings: ServerSettings,
    registry: SteeringRegistry,
    load: Callable[[], AbstractContextManager[Engine]],
    say: Say,
) -> None:
    """Serve until a signal comes. `say` prints a line on the terminal.

    Raises UsageError (the address cannot be used), and what `load` raises.
    """
    listening = listen(settings.host, settings.port)
    servers: list[_Server] = []

    def on_state(state: str) -> None:
        if state == "ok":
            steering = registry.default or "none"
            facts = f"{worker.n_slots} at once, steering: {steering}"
            say(f"steermoe serves {settings.model} at {url_of(listening)} ({facts})")
        elif state == "failed":
            for server in servers:
                server.should_exit = True

    worker = Worker(load, queue_limit=settings.queue_limit, on_state=on_state)
    config = uvicorn.Config(
        create_app(worker, registry, settings),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could claim any address
        timeout_graceful_shutdown=_GRACE,
        limit_concurrency=_CONNECTIONS + settings.queue_limit,
    )
    server = _Server(config, worker, say)
    servers.append(server)
    for line in settings.warnings:
        say(f"warning: {line}")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(is_new)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        listening.close()
    worker.stop()
    if worker.error is not None:
        raise worker.error
