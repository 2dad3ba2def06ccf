"""Fixtures of the tests of `steermoe chat`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    """An environment whose history is of this test alone."""
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "home" / "state")}


@pytest.fixture
def start(tmp_path: Path, state: dict[str, str]) -> Iterator[Any]:
    """Start the program in a terminal; it is ended with the test."""
    from tests.support.terminal import Terminal  # not on Windows

    running: list[Terminal] = []

    def start(*arguments: Any, env: dict[str, str] | None = None, **options: Any) -> Terminal:
        running.append(Terminal(*arguments, env=state | (env or {}), cwd=tmp_path, **options))
        return running[-1]

    yield start
    for terminal in running:
        terminal.child.close(force=True)
