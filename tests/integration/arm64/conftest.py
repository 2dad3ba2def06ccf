"""These tests are collected by `-m arm64` alone: they need the reference of another processor (make test-arm64)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "arm64" and collection_path.name.startswith("test_") else None
