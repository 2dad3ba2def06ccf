"""Requests over HTTP that any chat model must answer, whatever its template."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from tests.integration.rehearsal.conversations import SCHEMA, TOOL, tool_round
from tests.support.paths import BUILD
from tests.support.running_server import Running, until

QUESTION = "Which number comes after three?"
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


def _choice(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def check_answer(server: Running) -> None:
    """A plain answer, and the same as a stream."""
    choice = _choice(server.chat(QUESTION, max_tokens=12))
    message = choice["message"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
    deltas = [event["choices"][0]["delta"] for event in server.events("/v1/chat/completions", body) if event["choices"]]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == (message.get(field) or ""), field


def check_schema(server: Running, **fields: Any) -> None:
    """JSON that a schema binds is the answer's content."""
    choice = _choice(server.chat(QUESTION, response_format=FORMAT, max_tokens=600, **fields))
    message = choice["message"]
    assert message["content"], f"no content; reasoning: {(message.get('reasoning_content') or '')[:80]!r}"
    jsonschema.validate(json.loads(message["content"]), SCHEMA)


def check_forced_call(server: Running) -> None:
    """A tool that must be called gets its arguments."""
    for wanted in ("required", {"type": "function", "function": {"name": "put"}}):
        choice = _choice(server.chat(QUESTION, tools=[TOOL], tool_choice=wanted, max_tokens=600))
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "put"
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert choice["finish_reason"] == "tool_calls"


def check_tool_round(server: Running, refused: bool = False) -> None:
    """A round of calls in the history, with arguments and without, under ids of any length.

    `refused`: the template knows no role of tools.
    """
    for arguments, id_ in (
        ('{"word": "one", "sure": true}', "abc123def"),
        ("", "abc123def"),
        ("{}", "call_0123456789"),
    ):
        body = {"model": "tiny", "messages": tool_round(arguments, id_), "tools": [TOOL], "max_tokens": 4}
        response = server.client.post("/v1/chat/completions", json=body)
        if refused:
            assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        else:
            _choice(response)


def check_reasoning(server: Running) -> None:
    """Thinking asked for and not, by OpenAI's field and by the template's variable."""
    for effort in ("none", "low", "high"):
        choice = _choice(server.chat(QUESTION, reasoning_effort=effort, max_tokens=8))
        assert choice["finish_reason"] in ("length", "stop")
    check_schema(server, reasoning_effort="high")


def check_system(server: Running) -> None:
    """System and developer messages are taken."""
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "You like plums."}, {"role": "user", "content": "Hi."}]
        _choice(
            server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 2})
        )


def check_server(server: Running, refuses_tools: bool) -> None:
    """All of them."""
    check_answer(server)
    check_schema(server)
    check_forced_call(server)
    check_tool_round(server, refuses_tools)
    check_reasoning(server)
    check_system(server)


@contextlib.contextmanager
def llama_server(model: Path, *options: Any) -> Iterator[httpx.Client]:
    """llama.cpp's own server with a model."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [BUILD / "bin" / "llama-server", "-m", model, "--jinja", "-c", 512, "-t", 1, "-np", 1, "--no-warmup"]
    command += ["--no-webui", "--host", "127.0.0.1", "--port", port, *options]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                until(lambda: process.poll() is not None or _healthy(client), seconds=120)
                assert process.poll() is None, "llama-server does not start"
                yield client
        finally:
            process.kill()  # it holds nothing that is worth a proper end


def _healthy(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False
