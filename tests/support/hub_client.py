"""Runs the program against the stand-in hub, with a home of its own, and never with another network."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from steermoe_local.cli import main
from tests.support.held import patience
from tests.support.hub_stand_in import Hub

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody answers
_UNSET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LLAMA_CACHE", "STEERMOE_MODELS", "STEERMOE_MAPS", "STEERMOE_MODEL")
# Before the program starts: small transfers, so that an interrupted one has left something; no network but this one.
_PRELUDE = """
import socket
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14
connect = socket.socket.connect
def guarded(self, address):
    if {closed} or (isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost")):
        import os
        os.write(2, b"REACHED FOR THE NETWORK")
        os._exit(99)
    return connect(self, address)
socket.socket.connect = guarded
from steermoe_local.cli import main
main()
"""


class Client:
    """The program with a cache of its own, in this process (`__call__`) or in one of its own (`program`)."""

    def __init__(self, hub: Hub | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = hub
        self.folder = folder
        self.home = folder / "home"
        self.cache = self.home / "hub"
        self.endpoint = hub.endpoint if hub else NOBODY
        self.patch = monkeypatch
        for name in _UNSET:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("OLLAMA_MODELS", str(folder / "ollama"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        monkeypatch.setenv("STEERMOE_CONFIG", "")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        values = {"ENDPOINT": self.endpoint, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": False}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values["HF_TOKEN_PATH"] = str(self.home / "token")
        values["HF_HUB_DISABLE_XET"] = True
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits longer and longer before it gives up
        self.guard(lambda host: host in ("127.0.0.1", "localhost"))

    def guard(self, allowed: Callable[[str], bool]) -> None:
        """Fail the test when this process connects to any other host."""
        connect = socket.socket.connect

        def guarded(this: socket.socket, address: Any) -> None:
            if isinstance(address, tuple) and not allowed(address[0]):
                pytest.fail(f"reached for the network: {address}")
            connect(this, address)

        self.patch.setattr(socket.socket, "connect", guarded)

    def __call__(self, *arguments: Any, token: str | None = None, **variables: str) -> Result:
        """In this process: what the client read from the environment at its import is set in its constants."""
        with self.patch.context() as patch:
            if token:
                patch.setenv("HF_TOKEN", token)
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(constants, "HF_HUB_OFFLINE", variables.get("HF_HUB_OFFLINE") == "1")
            return CliRunner().invoke(main, [str(argument) for argument in arguments])

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "STEERMOE_M"))}
        environment |= {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1"}
        return environment | variables

    def start(self, *arguments: Any, closed: bool = False, **variables: str) -> subprocess.Popen[str]:
        """In a process of its own; `closed` ends it when it opens any connection."""
        return subprocess.Popen(
            [sys.executable, "-c", _PRELUDE.format(closed=closed), *map(str, arguments)],
            env=self._environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def start_in_terminal(self, columns: int, *arguments: Any, **variables: str) -> Any:
        """In a pseudo-terminal (a pexpect.spawn)."""
        import pexpect

        return pexpect.spawn(
            sys.executable,
            ["-c", _PRELUDE.format(closed=False), *map(str, arguments)],
            env=self._environment({"TERM": "xterm"} | variables),
            cwd=str(self.folder),
            dimensions=(24, columns),
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
        )

    def program(self, *arguments: Any, closed: bool = False, **variables: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a whole run."""
        process = self.start(*arguments, closed=closed, **variables)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def interrupt(
        self, process: subprocess.Popen[str], folder: Path, n_bytes: int, number: int = signal.SIGINT
    ) -> tuple[int, str, str]:
        """Send a signal when a partial download in the folder has so many bytes; the hub holds it before its end."""

        def has_begun() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return any(path.stat().st_size >= n_bytes for path in folder.rglob("*.incomplete"))
            return False

        patience(process, has_begun)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def fails(done: Result, status: int, *words: str) -> str:
    """Check that a run ended with one line that has these words; returns it."""
    assert done.exit_code == status, done.output
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last, last
    return last
