"""Running the server: its socket, its signals, and the line that it prints when it is ready."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UsageError
from ..generation.engine import Engine
from .accepting import Acceptor, room_for
from .api_errors import is_new
from .app import create_app
from .connections import Connections
from .learn_jobs import LearnJobs
from .peers import send_in_packets
from .protocol import GuardedProtocol
from .registry import SteeringRegistry
from .settings import ServerSettings
from .stopping import StopDeadline, end_now
from .worker import Worker

_TOLD_SECONDS = 2.0  # for clients to be told that the server stops, after the time for their answers
_ENDED_SECONDS = 5.0  # after that time, for everything
# A thread that waits for Python's lock gets it from one that computes after this time; Python's own is fifty times as
# long. The event loop waits for it after every call to the system, some ten of them for a connection, so that clients
# who come beside the parsing of a large body would wait for one another.
_SWITCH_SECONDS = 0.0001

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
        if sys.platform == "win32":  # where the other option would let two programs share a port, and so would neither
            found.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        send_in_packets(found)
        found.bind(address)
        found.listen(1024)
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


class Server(uvicorn.Server):
    """uvicorn's server, with connections that are guarded.

    It stops after the running answers on the first signal; at once on a second, or while the model is loading. Answers
    that take longer than `settings.stop_seconds` end with an error.
    """

    def __init__(
        self, app: FastAPI, worker: Worker, settings: ServerSettings, listening: socket.socket, say: Say
    ) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a client could claim any address
            timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=settings.stop_seconds + _TOLD_SECONDS,  # type: ignore[arg-type]
        )
        super().__init__(config)
        self._worker, self._settings, self._listening, self._say = worker, settings, listening, say
        self._stop: StopDeadline | None = None
        wanted = settings.connections + settings.queue_limit
        self.open_connections = Connections(room_for(wanted))
        if self.open_connections.limit < wanted:
            say(
                f"warning: at most {self.open_connections.limit} connections at once, not {wanted}, as the process may "
                "open no more files; raise ulimit -n"
            )

    def serve_until_stopped(self) -> None:
        """Serve until a signal comes; from then on the process has a deadline."""
        with StopDeadline(self._settings.stop_seconds + _ENDED_SECONDS) as self._stop:
            try:
                asyncio.run(self.serve(sockets=[]))
            finally:
                self._listening.close()
            self._worker.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections; uvicorn itself gets no socket."""
        await super().startup(sockets=[])

        def make(reserved: bool) -> GuardedProtocol:
            return GuardedProtocol(
                settings=self._settings,
                open_connections=self.open_connections,
                reserved=reserved,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        self._acceptor = Acceptor(self._listening, make, self.open_connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait for the answers, then end those that are left with an error, then all."""
        await self._acceptor.close()
        late = asyncio.get_running_loop().call_later(self._settings.stop_seconds, self._worker.stop, 0)
        await super().shutdown(sockets)
        late.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM; uvicorn would raise them again at the end."""
        if self.should_exit or self._worker.state == "loading":
            end_now()  # the engine's thread may be in the middle of something long
        self.should_exit = True
        if self._stop is not None:
            self._stop.noticed(sig)
        if self._worker.n_running:
            self._say(f"finishing {self._worker.n_running} answers; Ctrl-C again stops at once")


def run_server(
    settings: ServerSettings,
    registry: SteeringRegistry,
    load: Callable[[], AbstractContextManager[Engine]],
    say: Say,
    jobs: LearnJobs | None = None,
) -> None:
    """Serve until a signal comes. `say` prints a line on the terminal; without `jobs` nothing can be learnt.

    Raises UsageError (the address cannot be used), and what `load` raises.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    listening = listen(settings.host, settings.port)
    servers: list[Server] = []

    def on_state(state: str) -> None:
        if state == "ok":
            # What is there now stays. Collections, of which a body of 100,000 objects causes several, would look at all
            # of it again while every other thread waits: 100 ms and more.
            gc.collect()
            gc.freeze()
            steering = registry.default or "none"
            facts = f"{worker.n_slots} at once, steering: {steering}"
            say(f"steermoe serves {settings.model} at {url} ({facts})")
        elif state == "failed":
            for server in servers:
                server.should_exit = True

    url = url_of(listening)
    on_busy = None if jobs is None else jobs.set_busy
    worker = Worker(load, queue_limit=settings.queue_limit, on_state=on_state, on_busy=on_busy)
    server = Server(create_app(worker, registry, settings, jobs=jobs), worker, settings, listening, say)
    servers.append(server)
    for line in settings.warnings:
        say(f"warning: {line}")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(is_new)
    server.serve_until_stopped()
    if worker.error is not None:
        raise worker.error
