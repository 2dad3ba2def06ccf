"""The examples of docs/server.md, run against the server with the embedded model."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.running_server import Running, running

PAGE = (ROOT / "docs" / "server.md").read_text("utf-8")
BLOCK = re.compile(r"(<!-- (not run|openai): [^\n]*-->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
URL = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2) as found:
        yield found


def blocks(language: str, mark: str = "") -> list[str]:
    found = [text for _, marked, kind, text in BLOCK.findall(PAGE) if kind == language and marked == mark]
    assert found
    return found


def run(server: Running, command: list[str], text: str, folder: Path) -> str:
    assert URL in text
    done = subprocess.run(
        [*command, text.replace(URL, server.url)], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Running, tmp_path: Path) -> None:
    chat, names, plans = (run(server, ["bash", "-euc"], text, tmp_path) for text in blocks("sh"))
    assert '"content":"four"' in chat
    assert '"side":"words"' in chat
    assert names.count('"name":"words"') == 2
    assert plans.count('"rules":["thinking: none","answer[0:3]: digits-words +8 -4"]') == 1
    assert '"steered":[{"rule":1,"start":0,' in plans
    assert '"rules":["answer[0:3]: digits-words +8 -8"]' in plans
    assert "error" not in chat + names + plans


def test_python(server: Running, tmp_path: Path) -> None:
    chat, experts = (run(server, [sys.executable, "-c"], text, tmp_path) for text in blocks("python"))
    assert chat == "4 digits\n"
    assert re.fullmatch(r"\(\d+, 5, 4\)\n", experts)


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")
def test_openai(server: Running, tmp_path: Path) -> None:
    chat, response = (run(server, [sys.executable, "-c"], text, tmp_path) for text in blocks("python", "openai"))
    assert chat == "11, 12, 13, 14, 15\n"
    assert response == "11, 12, 13, 14, 15 4\n"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript(server: Running, tmp_path: Path) -> None:
    (text,) = blocks("js")
    out = run(server, ["node", "--input-type=module", "-e"], text, tmp_path)
    assert re.fullmatch(r"4 [0-9a-f]{8}\n", out)


def test_every_address_is_described(server: Running) -> None:
    for path in server.client.get("/openapi.json").json()["paths"]:
        name = path.replace("{name}", "NAME").replace("/{model_id}", "")
        name = re.sub(r"\{(response|job)_id\}", "ID", name)
        assert name in PAGE, path
