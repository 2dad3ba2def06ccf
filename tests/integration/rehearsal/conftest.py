"""The rehearsal is collected by `-m rehearsal` alone, as it needs transformers; test_core.py always."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.rehearsal.rendering import Desk


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    part = collection_path.name.startswith("test_") and collection_path.name != "test_core.py"
    return True if part and config.option.markexpr != "rehearsal" else None


@pytest.fixture(scope="module")
def desk(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A template on the vocabulary of its family; loaded once for all checks of the template."""
    with Desk.open(name, tmp_path_factory.mktemp("template")) as opened:
        yield opened
