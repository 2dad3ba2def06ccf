"""What several tests of recording share."""

from __future__ import annotations

from pathlib import Path

import pytest

from steermoe_local import Pair, load_pairs
from tests.support.detecting import DATA
from tests.support.near_ties import near_ties_of_pairs


@pytest.fixture(scope="session")
def chat_pairs() -> list[Pair]:
    """Chat pairs that share the template's text, questions and, on both sides, targets."""
    files = ("digits-words", "document-memory", "refuse-comply")
    return [pair for name in files for pair in load_pairs(DATA / f"{name}.pairs.jsonl")[:16]]


@pytest.fixture(scope="session")
def untied_pairs(chat_pairs: list[Pair], tiny_f32_path: Path) -> list[Pair]:
    """Pairs of which every choice of experts is the same however F32 rounds: other batches count the same, exactly."""
    found = [pair for pair in chat_pairs if not near_ties_of_pairs(tiny_f32_path, [pair])]
    assert len(found) >= 40
    return found
