"""What several tests of the server share."""

from __future__ import annotations

import pytest

from steermoe_local import ExpertMap
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.models.shipped_maps import shipped_maps


@pytest.fixture(scope="module")
def digits() -> ExpertMap:
    return with_recommended(ExpertMap.load(shipped_maps()["digits-words"]), None)
