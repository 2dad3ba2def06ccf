"""These tests are collected by `-m windows` alone: they need a cross-build, and wine."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "windows" and collection_path.name.startswith("test_") else None
