"""What the tests of the benchmarks share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def benchmarks_on_path() -> Iterator[None]:
    """The benchmarks are programs: they import each other as they do when one of them is run."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
