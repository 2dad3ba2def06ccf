"""These tests are collected by `-m device` alone: they need a build with a backend for one."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "device" and collection_path.name.startswith("test_") else None
