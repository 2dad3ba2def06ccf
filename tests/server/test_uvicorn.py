"""What `server/protocol.py` and `server/program.py` take for granted of uvicorn, h11 and asyncio.

A failure here says which of it another version changed; the tests of connections say what no longer works then.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap

import h11
import pytest
import uvicorn
from uvicorn.protocols.http import h11_impl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from steermoe_local.server.protocol import GuardedProtocol

OVERRIDDEN = ["__init__", "connection_made", "connection_lost", "data_received", "eof_received", "pause_writing"]
OVERRIDDEN += ["resume_writing", "on_response_complete", "send_400_response", "shutdown"]
READ = [
    "conn",
    "app",
    "cycle",
    "flow",
    "transport",
    "loop",
    "client",
    "server",
    "scope",
    "_unset_keepalive_if_required",
]
READ_OF_CYCLE = ["response_complete", "response_started", "more_body", "disconnected", "message_event", "keep_alive"]


def names_in(function: object) -> set[str]:
    """The attributes that a function's source names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_overridden_is_there(name: str) -> None:
    assert name in vars(GuardedProtocol)
    assert callable(getattr(H11Protocol, name, None)), f"uvicorn's H11Protocol has no {name} any more"


def test_what_is_read_is_there() -> None:
    named = names_in(H11Protocol)
    assert set(READ) <= named | set(vars(H11Protocol)), "attributes of H11Protocol"
    assert set(READ_OF_CYCLE) <= names_in(RequestResponseCycle), "attributes of RequestResponseCycle"
    assert h11_impl.STATUS_PHRASES[404] == b"Not Found"


def test_who_calls_what_is_overridden() -> None:
    handled = names_in(H11Protocol.handle_events)
    assert "send_400_response" in handled, "invalid requests are answered elsewhere"
    assert "on_response_complete" in handled, "the end of an answer is told otherwise"
    assert "app" in handled, "the application of a connection is no attribute of its protocol"
    assert "conn" in names_in(H11Protocol.data_received), "h11 is fed elsewhere"
    assert "shutdown" in names_in(uvicorn.Server.shutdown), "connections are told otherwise that the server stops"


def test_the_server() -> None:
    started = names_in(uvicorn.Server.startup)
    assert {"lifespan", "servers", "started"} <= started
    assert "create_server" in started, "it accepts connections in another way, which Server.startup has to leave out"
    assert inspect.iscoroutinefunction(uvicorn.Server.startup)
    assert list(inspect.signature(uvicorn.Server.handle_exit).parameters) == ["self", "sig", "frame"]
    accepted = set(inspect.signature(H11Protocol.__init__).parameters)
    assert {"config", "server_state", "app_state"} <= accepted


def test_h11() -> None:
    connection = h11.Connection(h11.SERVER, 100)
    connection.receive_data(b"GET ")
    assert connection.trailing_data == (b"GET ", False)
    assert connection.their_state is h11.IDLE
    error = h11.RemoteProtocolError("a", error_status_hint=431)
    assert error.error_status_hint == 431
    connection.receive_data(b"a" * 101)
    with pytest.raises(h11.RemoteProtocolError) as refused:
        connection.next_event()
    assert refused.value.error_status_hint == 431
    assert connection.our_state is h11.IDLE, "an error can be answered"


def test_asyncio() -> None:
    assert "eof_received" in inspect.getsource(asyncio.selector_events._SelectorSocketTransport)
    for name in ("sock_accept", "connect_accepted_socket"):
        assert inspect.iscoroutinefunction(getattr(asyncio.AbstractEventLoop, name))
