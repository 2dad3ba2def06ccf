"""Small runs of `learn` on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.learning.learn import LearnProgress, learn
from steermoe_local.learning.options import Contrast, LearnOptions, LikeUnlike
from steermoe_local.learning.result import LearnResult
from steermoe_local.models.embedded import embedded_model

SMALL = {
    "n_pairs": 40,
    "answer_tokens": 20,
    "n_candidates": 6,
    "draws": 64,
    "n_items": 4,
    "n_choosing": 16,
    "n_trials": 10,
    "n_heldout": 24,
    "n_text": 60,
}
OPENINGS = LikeUnlike("Use digits.", "Use words.")


def small_options(**fields: Any) -> LearnOptions:
    given: dict[str, Any] = {"effort": "quick", "sizes": SMALL, "context": {"n_threads": 1}, **fields}
    return LearnOptions(**given)


def small(
    folder: Path,
    contrast: Contrast,
    *,
    name: str = "numbers",
    model: Path | None = None,
    resume: bool = False,
    restart: bool = False,
    progress: Callable[[LearnProgress], None] | None = None,
    **fields: Any,
) -> LearnResult:
    """A run that takes seconds."""
    options = small_options(**{"positive": "digits", "negative": "words", **fields})
    return learn(
        model or embedded_model(),
        name,
        contrast,
        folder,
        options=options,
        resume=resume,
        restart=restart,
        progress=progress,
        now=lambda: 0.0,  # no time passes: what a run finds does not depend on the machine
    )


@pytest.fixture(scope="package")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> LearnResult:
    """Learnt from the openings that the embedded model was trained on."""
    return small(tmp_path_factory.mktemp("maps"), OPENINGS)
