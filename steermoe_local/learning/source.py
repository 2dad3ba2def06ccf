"""Opens a contrast: names of the sides, questions with two instructions, or pairs, and a behaviour's own task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..behaviours.builtin import behaviour, neutral_questions
from ..errors import PairsError, UsageError
from ..evaluation.tasks.builtin import builtin_task, is_embedded
from ..evaluation.tasks.tasks import Task
from ..identity import ModelIdentity
from ..models import embedded
from ..pairs.pairs import Pair, load_pairs, pairs_digest
from ..pairs.prompts import PromptItem, load_prompts, prompts_digest
from .answers import SIDES
from .material import choice_item, least_pairs
from .options import Builtin, Contrast, GivenPairs, LearnOptions

FEW = 40
"""Pairs below which no part of them could be held out: they are examples, by which the model answers questions."""
_MOST_EXAMPLES = 8  # in an instruction
_LONGEST_EXAMPLE = 600  # characters of a prompt or an answer there


@dataclass(frozen=True)
class Source:
    """What a run begins with.

    Either `questions` are asked under the two `instructions`, or there are `pairs`; `task` has the held-out prompts of
    a behaviour that ships, with its scorer. `settings` says what of it the result depends on, `words` what it is;
    `note` is said first, "" if there is nothing to say.
    """

    positive: str
    negative: str
    words: str
    settings: Mapping[str, Any]
    instructions: Mapping[str, str] | None = None
    questions: tuple[PromptItem, ...] = ()
    pairs: tuple[Pair, ...] = ()
    task: Task | None = None
    one_way: bool = False
    error_rate: float | None = None
    license: str = ""
    note: str = ""


def open_source(contrast: Contrast, options: LearnOptions, model: ModelIdentity) -> Source:
    """Read what a contrast names, for a model. Raises UsageError, FormatError, PairsError."""
    sides = options.positive or "like", options.negative or "unlike"
    if isinstance(contrast, Builtin):
        return _of_behaviour(contrast, options, model)
    if isinstance(contrast, GivenPairs):
        pairs = tuple(load_pairs(contrast.path))
        if len(pairs) < FEW and (like_these := _by_examples(pairs)) is not None:
            words = f"the model's own answers in the manner of {len(pairs)} examples of {contrast.path.name}"
            note = (
                f"{contrast.path}: {len(pairs)} pairs are too few to hold some out, so they are taken as examples: the "
                "model answers questions in the manner of each side; about 60 pairs are learnt from themselves"
            )
            return replace(_asked(like_these, _ordered_questions(None, model), sides, words), note=note)
        positive, negative = options.positive or "positive", options.negative or "negative"
        settings = {"pairs": pairs_digest(pairs)}
        return Source(positive, negative, f"{len(pairs)} pairs of {contrast.path.name}", settings, pairs=pairs)
    instructions = dict(zip(SIDES, (contrast.like, contrast.unlike), strict=True))
    questions = _ordered_questions(contrast.questions, model)
    if len(questions) < (least := least_pairs(options.heldout)):
        raise PairsError(
            f"{contrast.questions}: too few questions ({len(questions)}), as some are held out; give {least} at least, "
            "better 200, or none: then those that ship are asked"
        )
    words = f'the model\'s own answers under "{contrast.like}" and "{contrast.unlike}"'
    return _asked(instructions, questions, sides, words)


def _asked(
    instructions: Mapping[str, str], questions: tuple[PromptItem, ...], sides: tuple[str, str], words: str
) -> Source:
    settings: dict[str, Any] = {"instructions": dict(instructions), "questions": prompts_digest(questions)}
    return Source(*sides, f"{words}, to {len(questions)} questions", settings, instructions, questions)


def _by_examples(pairs: Sequence[Pair]) -> dict[str, str] | None:
    """Instructions that show the examples of each side; None for pairs that are no questions with two answers."""
    parts: dict[str, list[str]] = {side: [] for side in SIDES}
    for pair in pairs[:_MOST_EXAMPLES]:
        item = choice_item(pair)
        if item is None or isinstance(item.content, str):
            return None
        question = item.content[-1].content[:_LONGEST_EXAMPLE]
        for side, answer in zip(SIDES, (pair.positive_target, pair.negative_target), strict=True):
            parts[side].append(f"Question: {question}\nAnswer: {answer[:_LONGEST_EXAMPLE]}")
    head = "Answer every question in the manner, tone and form of the answers in these examples, and say nothing else."
    return {side: "\n\n".join([head, *texts]) for side, texts in parts.items()}


def _of_behaviour(contrast: Builtin, options: LearnOptions, model: ModelIdentity) -> Source:
    found = behaviour(contrast.name)
    if found.model and not is_embedded(model):
        raise UsageError(
            f"{found.name}: a behaviour of the embedded model alone (-m {found.model}); steermoe behaviours lists "
            "those for any instruct model"
        )
    pairs, task = tuple(found.pairs()), builtin_task(found.name)
    settings = {"behaviour": found.name, "pairs": pairs_digest(pairs), "task": task.sha256}
    return Source(
        options.positive or found.positive,
        options.negative or found.negative,
        f"the behaviour {found.name} that ships: {found.title}",
        settings,
        pairs=pairs,
        task=task,
        one_way=found.one_way,
        error_rate=found.error_rate,
        license="MIT",
    )


def _ordered_questions(file: Path | None, model: ModelIdentity) -> tuple[PromptItem, ...]:
    """The questions of a file; else those that ship, for the embedded model those that it was trained on.

    Their order depends on their texts alone.
    """
    return tuple(_in_fixed_order(_questions(file, model)))


def _questions(file: Path | None, model: ModelIdentity) -> list[PromptItem]:
    if file is not None:
        return load_prompts(file)
    if is_embedded(model):
        return [
            PromptItem(pair.id, pair.positive[:-1])
            for planted in embedded.behaviours()
            for pair in load_pairs(planted.pairs)
        ]
    return [PromptItem(f"question-{number:03d}", text) for number, text in enumerate(neutral_questions(), 1)]


def _in_fixed_order(questions: list[PromptItem]) -> list[PromptItem]:
    """Questions in an order that depends on their texts alone, so that kinds of them are mixed."""

    def key(item: PromptItem) -> bytes:
        text = "\n".join(message.content for message in item.messages())
        return hashlib.sha256(f"order {text}".encode()).digest()

    return sorted(questions, key=key)
