"""The options that name the items of an attribution, and the neutral text of its costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import UsageError
from .common import FILE
from .groups import option, option_group

if TYPE_CHECKING:
    from ...attribution.items import Item
    from ...evaluation.tasks.neutral_text import NeutralText
    from ...evaluation.tasks.tasks import Task
    from ...llama.rendering import Renderer

_NONE = "none"


@dataclass(frozen=True)
class ItemFlags:
    """What the margin is measured on: pairs of one prompt and two answers, or a task of choices."""

    pairs_file: Path | None = option("--pairs", type=FILE, help="Pairs of one prompt and two answers, JSONL.")
    task_name: str | None = option(
        "--task", metavar="TASK", help="Instead of pairs: a task of choices (docs/tasks.md), or builtin:NAME."
    )
    neutral_name: str | None = option(
        "--neutral",
        metavar="FILE",
        help="Neutral text on which costs are measured, `none` for none.  [default: a shipped one]",
    )
    n_text: int = option(
        "--n-text", type=click.IntRange(1), default=96, show_default=True, metavar="N", help="Tokens of it that count."
    )

    def __post_init__(self) -> None:
        if (self.pairs_file is None) == (self.task_name is None):
            raise UsageError("what is the effect measured on? give --pairs FILE, or --task TASK, and not both")

    @cached_property
    def task(self) -> Task | None:
        """The task, None with pairs. Raises FormatError, UsageError."""
        from ...evaluation.tasks.builtin import open_task

        return None if self.task_name is None else open_task(self.task_name)

    @property
    def response(self) -> str:
        """Name of what the margin is measured on: "pairs", or the task's."""
        return "pairs" if self.task is None else self.task.name

    def neutral(self, model: Path) -> NeutralText | None:
        """The neutral text: that which was named, else the one shipped for the model. Raises FormatError."""
        from ...evaluation.measuring.opening import open_guards

        name = self.neutral_name
        return open_guards(model, None, "default" if name is None else None if name == _NONE else name)[1]

    def items(self, renderer: Renderer, on_skip: Callable[[str, str], None]) -> list[Item]:
        """The items, rendered. `on_skip` gets the id of a pair without a margin, and why.

        Raises PairsError, FormatError, UsageError.
        """
        from ...attribution.items import pair_items, task_items
        from ...evaluation.tasks.scorers import make_scorer
        from ...pairs.pairs import load_pairs

        if self.pairs_file is not None:
            return pair_items(renderer, load_pairs(self.pairs_file), on_skip)
        assert self.task is not None
        return task_items(renderer, self.task, make_scorer(self.task.scorer, self.task.options))


item_options = option_group(ItemFlags, "item_flags")
"""The options of the items; the command gets them as `item_flags` (ItemFlags)."""
