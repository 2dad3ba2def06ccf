"""Models that several native tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.low_level import identity_of, open_model
from tests.support.random_models import OLMOE
from tests.support.sequence_steering import (
    Loaded,
)


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[Loaded]:
    path = random_model(OLMOE)
    model = open_model(path)
    yield identity_of(path), model
    model.close()
