"""The server's log: a line for each thing that happened, whatever requests say; a traceback only if one is wanted."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support.hostile import ESCAPES, obeyed
from tests.support.paths import ROOT
from tests.support.running_server import until

# `serve`, with a mistake in GET /v1/models, and one in what the loop calls
PROGRAM = """
import asyncio, sys
from steermoe_local.server.service import Service
def models(self):
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    raise RuntimeError("/home/secret\\nINFO: forged \\x1b[2J")
Service.models = models
sys.argv[0] = "steermoe"
from steermoe_local.cli import main
main()
"""


@pytest.mark.parametrize("debug", [False, True])
def test_a_line_each(debug: bool) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"STEERMOE_DEBUG": "1"} if debug else {})
    command = [sys.executable, "-c", PROGRAM, "serve", "-m", "tiny", "--port", "0", "-np", "1", "-c", "128"]
    with tempfile.TemporaryFile("w+") as log:

        def written() -> str:
            log.seek(0)
            return log.read()

        with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=log) as process:
            try:
                until(lambda: process.poll() is not None or "serves" in written(), seconds=60)
                url = next(word for word in written().split() if word.startswith("http"))
                failed = httpx.get(f"{url}/v1/models", timeout=60)  # an error in a handler ends its connection
                for text in ESCAPES:
                    name = text.encode("utf-8", "replace").decode()
                    httpx.get(f"{url}/v1/models/{quote(name)}", timeout=60)
                    httpx.post(f"{url}/v1/responses", json=_request(name), timeout=60)
                    httpx.post(f"{url}/v1/chat/completions", json={name: name}, timeout=60)
                _raw(url, b"GET /\x1b]0;t\x07 HTTP/1.1\r\nHost: \x1b[2J\r\nX: \x9b\r\n\r\n")
                _raw(url, b"\x1b[2J\x9b\n\n\r\n\r\n")
                process.terminate()
                process.wait(30)
            finally:
                process.kill()
        lines = written().splitlines()
    assert process.returncode == 0, lines
    assert failed.status_code == 500
    assert set(failed.json()) == {"error"}
    assert failed.json()["error"]["code"] == "internal_error"
    assert "secret" not in failed.text
    assert not obeyed("".join(lines)), lines
    assert [line for line in lines if "left out" in line], "names of tools came to the log"
    told = [line for line in lines if "RuntimeError: /home/secret\u240aINFO: forged \u241b[2J" in line]
    assert len(told) == len({line[:23] for line in told}), "once each"
    assert any("Traceback" in line for line in lines) == debug, lines
    assert [line for line in lines if "ZeroDivisionError" in line]
    if not debug:
        assert not [line for line in lines if line.startswith((" ", "INFO", "  File"))], lines


def _request(name: str) -> dict[str, Any]:
    tools = [{"type": "web_search", "name": name}, {"type": "custom", "name": name}]
    return {"input": "hi", "max_output_tokens": 1, "tools": tools, "tool_choice": "auto"}


def _raw(url: str, data: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(data)
        while connection.recv(65536):
            pass
