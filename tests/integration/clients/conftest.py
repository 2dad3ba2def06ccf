"""These tests are collected by `-m clients` alone: they need programs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "clients" and collection_path.name.startswith("test_") else None
