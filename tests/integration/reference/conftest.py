"""The live comparison is collected by `-m reference` alone: importing torch takes seconds, and it may be missing."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.markexpr != "reference" and collection_path.name.startswith("test_") else None
