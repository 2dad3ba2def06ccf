"""Fixtures that several modules on maps share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.figures import checked_figures


@pytest.fixture(scope="session", autouse=True)
def _no_legend_lies_on_data() -> Iterator[None]:
    with checked_figures():
        yield
