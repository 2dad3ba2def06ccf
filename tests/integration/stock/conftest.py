"""The comparison with an unpatched build is collected by `-m stock` alone: it needs that build."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "stock" and collection_path.name.startswith("test_") else None
