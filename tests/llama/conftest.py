"""The vocabulary of the embedded model, and logits to draw from."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.drawing import likely_logits


@pytest.fixture(scope="module")
def vocab(tiny_model: Any) -> Any:
    return tiny_model.vocab


@pytest.fixture(scope="module")
def logits(tiny_model: Any) -> Any:
    return likely_logits(tiny_model.n_vocab())
