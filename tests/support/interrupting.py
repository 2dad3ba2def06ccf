"""Interrupts of runs that keep their results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steermoe_local.generation.answer_file import AnswerFile


@contextmanager
def interrupted_after(n: int) -> Iterator[None]:
    """Within the block, Ctrl-C comes as soon as `n` results are in the file of a run."""
    add, n_added = AnswerFile.add, 0

    def add_and_interrupt(self: AnswerFile, record: dict[str, Any]) -> None:
        nonlocal n_added
        add(self, record)
        n_added += 1
        if n_added == n:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerFile, "add", add_and_interrupt)
        yield
