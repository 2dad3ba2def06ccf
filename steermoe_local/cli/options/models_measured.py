"""What commands share that measure several models one after the other (transfer, audit): what is done, and the bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..output import progress_bar, say
from .common import check_unfinished

if TYPE_CHECKING:
    from ...generation.answer_file import AnswerFile
    from .evaluation_setup import EvaluationSetup

COLUMNS = "columns.jsonl"
"""The file of a run's folder with one line for each model that is done."""


def models_done(setup: EvaluationSetup, kept: AnswerFile, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of models of an interrupted run.

    `settings` must be the same to go on. Raises UsageError without --resume or --restart, or with other settings.
    """
    check_unfinished(kept, setup.resume, setup.restart)
    if kept.exists() and setup.resume:
        kept.resume(settings)
        return list(kept.records())
    if setup.restart:
        for path in setup.path(".").glob("*.records.jsonl.partial"):
            path.unlink()
    kept.start(settings)
    return []


def say_models_kept(kept: AnswerFile) -> None:
    """Say how much of an interrupted run is kept."""
    if kept.n_kept:
        what = "1 model is" if kept.n_kept == 1 else f"{kept.n_kept} models are"
        say(f"{what} done and kept in {kept.path}; go on with the same command and --resume")


class QuantizerBar:
    """The bar while a model is quantized; the evaluator has its own, and two do not go together."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._show: Callable[[str, int, int], None] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._show is None:
            self._show = self._open.enter_context(progress_bar())
        self._show(what, done, total)
        if done >= total:
            self.close()

    def close(self) -> None:
        self._show = None
        self._open.close()
