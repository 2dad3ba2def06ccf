"""Items of an attribution: a prompt and the answers whose log-probabilities are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import PairsError, UsageError
from ..evaluation.measuring.rendered_tasks import choices
from ..evaluation.measuring.replies import render
from ..evaluation.tasks.tasks import Scorer, Task
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama
from ..llama.tokenizing import common_prefix
from ..pairs.pairs import Pair


@dataclass(frozen=True)
class Answer:
    """Tokens that follow the shared prompt, of which those at `scored` count, with the weight `sign` in the margin."""

    tokens: tuple[int, ...]
    scored: tuple[int, ...]
    sign: float


@dataclass(frozen=True)
class Item:
    """A prompt and its answers; the margin is the sum of sign x mean log-probability of each answer's scored tokens."""

    id: str
    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest answer with the prompt."""
        return len(self.prompt) + max(len(answer.tokens) for answer in self.answers)


def pair_items(
    renderer: Renderer, pairs: Iterable[Pair], on_skip: Callable[[str, str], None] | None = None
) -> list[Item]:
    """Items of pairs whose sides have one prompt and different targets.

    `on_skip` is called with the id and the reason of a pair that is none; without it PairsError is raised, and also
    where no pair is left.
    """
    found: list[Item] = []
    reason = ""
    n = 0
    for pair in pairs:
        n += 1
        try:
            found.append(_pair_item(renderer, pair))
        except PairsError as error:
            if on_skip is None:
                raise PairsError(f"pair {pair.id!r}: {error}") from None
            reason = reason or str(error)
            on_skip(pair.id, str(error))
    if not found:
        raise PairsError(f"none of the {n} pairs has a margin: {reason}")
    return found


def _pair_item(renderer: Renderer, pair: Pair) -> Item:
    if problem := pair.margin_problem():
        raise PairsError(problem)
    one, two = (renderer.prompt(side, target) for side, target in pair.sides())
    first = min(one.target[0], two.target[0])
    if common_prefix(one.tokens, two.tokens) < first:
        raise PairsError(
            "the tokens before the targets differ, so the targets do not answer one prompt; write the same text "
            "before both"
        )
    if not first:
        raise PairsError(
            "no token stands before the targets, so their first one cannot be predicted; begin with a prompt"
        )
    answers = []
    for prompt, sign in ((one, 1.0), (two, -1.0)):
        scored = tuple(index - first for index in prompt.target)
        answers.append(Answer(tuple(prompt.tokens[first:]), scored, sign))
    return Item(pair.id, tuple(one.tokens[:first]), tuple(answers))


def as_items(given: Iterable[Item] | Iterable[Pair], renderer: Renderer | None, llama: SteeredLlama) -> list[Item]:
    """Items as they are, and those of pairs; `renderer` None: the model's. Raises as `pair_items`."""
    found = list(given)
    pairs = [one for one in found if isinstance(one, Pair)]
    items = [one for one in found if isinstance(one, Item)]
    return items + (pair_items(renderer or Renderer(llama._model), pairs) if pairs else [])


def task_items(renderer: Renderer, task: Task, scorer: Scorer) -> list[Item]:
    """Items of a task whose scorer compares choices: the mean of the right ones less the mean of the others.

    Raises UsageError for another task, and FormatError for an item that cannot be scored.
    """
    if scorer.kind != "choices":
        raise UsageError(
            f"task {task.name}: scored by {task.scorer}, which reads generated text; attribution compares the "
            "log-probabilities of given answers: take a task of choices (scorer choice), or --pairs"
        )
    found = []
    for item in task.items:
        scorer.check(item)
        prompt = render(renderer, task, item)
        texts, right = choices(task, scorer, item), set(scorer.right_choices(item))
        whole = [renderer.tokenize(prompt.text + text, add_special=prompt.add_special) for text in texts]
        wrong = len(whole) - len(right)
        if not wrong:
            raise UsageError(f"task {task.name}, {item.id}: all choices are right; a margin needs one that is not")
        # where the choices begin, all at the same token, as in evaluation
        first = min(min(common_prefix(prompt.tokens, tokens), len(tokens) - 1) for tokens in whole)
        answers = [
            Answer(
                tuple(tokens[first:]),
                tuple(range(len(tokens) - first)),
                1 / len(right) if index in right else -1 / wrong,
            )
            for index, tokens in enumerate(whole)
        ]
        if not first:
            raise UsageError(
                f"task {task.name}, {item.id}: no token stands before the choices, so their first one cannot be "
                "predicted; begin with a prompt"
            )
        found.append(Item(str(item.id), tuple(whole[0][:first]), tuple(answers)))
    return found


def split(items: Sequence[Item], n: int | None, seed: int) -> tuple[list[Item], list[Item]]:
    """Items that estimate and items that confirm, halves of the first `n` (None: all) in an order of the seed's own.

    The order depends on an item's id and the seed alone. Fewer than four items confirm nothing: an error over items
    takes two.
    """

    def key(item: Item) -> Any:
        return hashlib.sha256(f"{seed} {item.id}".encode()).digest()

    chosen = sorted(items, key=key)[:n]
    half = len(chosen) // 2 if len(chosen) > 3 else 0
    return chosen[half:], chosen[:half]


def digest(items: Sequence[Item]) -> str:
    """SHA-256 (hex) of the items' tokens, in the order of their ids."""
    data = [[item.id, item.prompt, [asdict(answer) for answer in item.answers]] for item in items]
    return hashlib.sha256(json.dumps(sorted(data, key=lambda row: str(row[0]))).encode("utf-8")).hexdigest()
