"""Fixtures of the tests of the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import write_bias
from steermoe_local.steering.steering import Steering
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def bias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bias file that steers the embedded model towards words."""
    path = tmp_path_factory.mktemp("bias") / "words.gguf"
    digits = ROOT / "expert_maps" / "tiny" / "digits-words.json"
    made = Steering.open(map_file=digits, activate=2, deactivate=2, reverse=True).build()
    assert made is not None
    write_bias(made, path)
    return path


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
