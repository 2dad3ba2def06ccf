"""The tests of `wheel` are collected by `-m sdist` alone: they build llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "sdist" and collection_path.name == "test_wheel_of_sdist.py" else None
