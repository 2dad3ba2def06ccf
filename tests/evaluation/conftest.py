"""Fixtures that several modules on evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.transfer_run import TransferRun, run_transfer


@pytest.fixture(scope="session")
def transferred(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferRun:
    """A whole transfer; tests leave its files alone."""
    return run_transfer(tiny_path, tmp_path_factory.mktemp("models"))
