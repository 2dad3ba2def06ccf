"""These tests are collected by `-m wheels` alone: they need the wheels of `make dist`, installed."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "wheels" and collection_path.name.startswith("test_") else None
