"""The options that name the items of an attribution and the neutral text of its costs, and what they open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ..output import SummedLines, progress_bar, say
from .common import FILE
from .groups import option, option_group
from .opening import open_model
from .system_text import NameOrPath

if TYPE_CHECKING:
    from ...attribution.items import Item
    from ...evaluation.tasks.neutral_text import NeutralText
    from ...evaluation.tasks.tasks import Task
    from ...generation.answer_file import AnswerFile
    from ...llama.rendering import Renderer
    from ...llama.steered_llama import SteeredLlama
    from ...model_files.model_info import ModelInfo
    from .llama import LlamaFlags

_NONE = "none"


@dataclass(frozen=True)
class ItemFlags:
    """What the margin is measured on: pairs of one prompt and two answers, or a task of choices."""

    pairs_file: Path | None = option("--pairs", type=FILE, help="Pairs of one prompt and two answers, JSONL.")
    task_name: str | None = option(
        "--task",
        type=NameOrPath(),
        metavar="TASK",
        help="Instead of pairs: a task of choices (docs/tasks.md), or builtin:NAME.",
    )
    neutral_name: str | None = option(
        "--neutral",
        type=NameOrPath(),
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


def decoder_arguments(flags: LlamaFlags) -> dict[str, Any]:
    """The part of the flags that the context of an attribution, or of a fit, takes."""
    given = flags.context_arguments()
    return {name: given[name] for name in ("n_batch", "n_threads", "type_k", "type_v", "flash_attn")}


@contextmanager
def interventions(
    facts: ModelInfo,
    model: Path,
    item_flags: ItemFlags,
    rendering: Mapping[str, Any],
    flags: LlamaFlags,
    kept: AnswerFile,
    resume: bool,
    shorter: str,
) -> Iterator[tuple[SteeredLlama, list[Item], dict[str, Any]]]:
    """Render the items, load the model and show a bar; yields model, items, and further arguments of `attribute` and
    `fit`: the neutral text, what is kept, progress.

    `rendering` are the arguments of the renderer, `shorter` the options that make the work shorter. A block that fails
    or is interrupted says what is kept. Raises what the items raise, ResourceError, ModelError.
    """
    from ...evaluation.measuring.opening import model_facts
    from ...llama.rendering import Renderer, vocabulary_renderer

    neutral = item_flags.neutral(model)
    skipped = SummedLines(say)
    with vocabulary_renderer(model, **rendering) as renderer:  # before the weights are loaded
        items = item_flags.items(
            renderer, lambda name, reason: skipped.add(f"skipped: pair {name!r}: {reason}", f"skipped: {reason}")
        )
    skipped.close()
    said = False

    def log(line: str) -> None:
        nonlocal said
        say(line if said else f"{line} (shorter with {shorter})")
        said = True

    with open_model(facts, flags, 2 * flags.batch_size, path=model) as llama, progress_bar() as show:
        common = {
            "neutral": neutral,
            "renderer": Renderer(llama._model, **rendering),
            "kept": kept,
            "resume": resume,
            "metadata": {"model": model_facts(facts), "flash_attn": flags.flash_attn},
            "progress": show,
            "log": log,
        }
        try:
            yield llama, items, common
        except BaseException:
            if kept.n_kept:
                say(f"{kept.n_kept} parts are kept in {kept.path}; go on with the same command and --resume")
            raise


item_options = option_group(ItemFlags, "item_flags")
"""The options of the items; the command gets them as `item_flags` (ItemFlags)."""
