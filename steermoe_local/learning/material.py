"""What a run learns from and what it is measured on: pairs and items, divided by a hash of their prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PairsError
from ..evaluation.tasks.tasks import Task
from ..pairs.pairs import Message, Pair
from ..pairs.prompts import PromptItem

_CHOOSING = 0.3  # of what is not held out, the share on which the numbers of experts are chosen
_FOR_MARGIN = 0.2  # of the pairs of a behaviour, the share that is held out for the margin
LEAST_PAIRS, LEAST_CHOOSING, LEAST_HELDOUT = 10, 6, 10
_MARGIN = "choice"


@dataclass(frozen=True)
class Material:
    """Pairs to learn from; the tasks on which the choice is made, and which the last step alone sees.

    `margin` are further held-out pairs of a behaviour whose own scorer reads answers: they are scored by which answer
    the model finds likelier. No prompt is in two of them.
    """

    pairs: tuple[Pair, ...]
    choosing: Task
    heldout: Task
    margin: Task | None = None


def place(prompt: str) -> float:
    """The place of a prompt, 0 to 1, by a hash of its text: the same in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(prompt.encode("utf-8")).digest()[:6], "big") / 2**48


def least_pairs(heldout: float) -> int:
    """Pairs of which each part has its least on average, where this share is held out."""
    rest = 1 - heldout
    parts = LEAST_HELDOUT / heldout, LEAST_CHOOSING / (_CHOOSING * rest), LEAST_PAIRS / ((1 - _CHOOSING) * rest)
    return math.ceil(max(parts))


def part_of(prompt: str, heldout: float, choosing: float = _CHOOSING) -> str:
    """The part that a prompt belongs to: "heldout", "choosing" or "pairs"."""
    where = place(prompt)
    if where < heldout:
        return "heldout"
    return "choosing" if where < heldout + (1 - heldout) * choosing else "pairs"


def of_pairs(
    name: str, pairs: Sequence[Pair], heldout: float, sides: tuple[str, str], most: tuple[int, int, int]
) -> Material:
    """Divide pairs; the items of the tasks are scored by which answer the model finds likelier, per token.

    `most`: how many pairs, items to choose on, and held-out items are taken at most. Raises PairsError when a part is
    too small.
    """
    raw = all(isinstance(pair.positive, str) for pair in pairs)
    parts: dict[str, list[Pair]] = {"pairs": [], "choosing": [], "heldout": []}
    for pair in pairs:
        part = part_of(prompt_of(pair), heldout)
        scored = raw == isinstance(pair.positive, str) and choice_item(pair) is not None
        if part != "pairs" and not scored:
            part = "pairs"  # it cannot be scored, but it can be learnt from
        parts[part].append(pair)
    found = {part: _first(of, n) for (part, of), n in zip(parts.items(), most, strict=True)}
    _require(len(pairs), {part: len(of) for part, of in found.items()})
    items = {part: [item for pair in found[part] if (item := choice_item(pair))] for part in ("choosing", "heldout")}
    tasks = {part: _choice_task(name, items[part], sides, raw) for part in items}
    return Material(tuple(found["pairs"]), tasks["choosing"], tasks["heldout"])


def of_behaviour(task: Task, pairs: Sequence[Pair], choosing: float, most: tuple[int, int, int]) -> Material:
    """The material of a behaviour that ships: its pairs, of which a part is held out for the margin, and its held-out
    prompts divided in two.
    """
    parts: dict[str, list[PromptItem]] = {"choosing": [], "heldout": []}
    for item in task.items:
        text = _text_of(item.content)
        parts["choosing" if place(text) < choosing else "heldout"].append(item)
    n_pairs, n_choosing, n_heldout = most
    found = {"choosing": parts["choosing"][:n_choosing], "heldout": parts["heldout"][:n_heldout]}
    apart = [pair for pair in pairs if place(prompt_of(pair)) < _FOR_MARGIN]
    scored = [one for pair in apart if (one := choice_item(pair)) is not None][:n_heldout]
    learnt = _first([pair for pair in pairs if pair not in apart], n_pairs)
    sides = task.positive, task.negative
    _require(len(pairs), {"pairs": len(learnt), **{part: len(items) for part, items in found.items()}})
    return Material(
        tuple(learnt),
        replace(task, items=tuple(found["choosing"])),
        replace(task, items=tuple(found["heldout"])),
        _choice_task(task.name, scored, sides, raw=False) if len(scored) >= LEAST_HELDOUT else None,
    )


def prompt_of(pair: Pair) -> str:
    """The text in front of a pair's positive target: pairs of one prompt have the same."""
    side, target = pair.positive, pair.positive_target
    if isinstance(side, str):
        return side[: side.rindex(target)]
    carrier = max(index for index, message in enumerate(side) if target in message.content)
    last = side[carrier]
    before = [*side[:carrier], Message(last.role, last.content[: last.content.rindex(target)])]
    return "\n".join(f"{message.role}: {message.content}" for message in before)


def choice_item(pair: Pair) -> PromptItem | None:
    """The pair as an item of a task of choices: the prompt, and both answers; None if it is not of that form."""
    if pair.margin_problem() is not None:
        return None
    choices = {"choices": [pair.positive_target, pair.negative_target], "answer": 0, "negative": 1}
    if isinstance(pair.positive, str) or isinstance(pair.negative, str):
        assert isinstance(pair.positive, str)  # both sides of a pair are of one kind
        before = pair.positive[: pair.positive.rindex(pair.positive_target)]
        return PromptItem(pair.id, before, extra=choices) if before else None
    last = pair.positive[-1]
    whole = last.content == pair.positive_target and pair.negative[-1].content == pair.negative_target
    if last.role != "assistant" or not whole or len(pair.positive) < 2:
        return None
    return PromptItem(pair.id, tuple(pair.positive[:-1]), extra=choices)


def shortened(pair: Pair, words: int) -> Pair:
    """The pair with the first words of both answers, where they differ and end their sides; else as it is."""
    if choice_item(pair) is None:
        return pair
    targets = [" ".join(target.split(" ")[:words]) for target in (pair.positive_target, pair.negative_target)]
    if targets[0] == targets[1]:
        return pair
    sides: list[Any] = []
    for side, target in zip((pair.positive, pair.negative), targets, strict=True):
        if isinstance(side, str):
            return pair
        sides.append((*side[:-1], Message("assistant", target)))
    return Pair(pair.id, *sides, *targets)


def task_lines(task: Task) -> str:
    """A task as the text of a task file."""
    names = ("name", "scorer", "options", "max_tokens", "stop", "system", "raw", "positive", "negative", "license")
    head = {name: getattr(task, name) for name in names}
    head |= {"options": {k: v for k, v in task.options.items() if k != "base_url"}, "stop": list(task.stop)}
    given = {name: value for name, value in head.items() if value not in ("", [], {}, False)}
    rows: list[Mapping[str, Any]] = [{"task": given}]
    for item in task.items:
        content = item.content
        prompt = {"prompt": content} if isinstance(content, str) else {"messages": [m.to_dict() for m in content]}
        system = {"system": item.system} if item.system else {}
        rows.append({"id": item.id, **prompt, **system, **item.extra})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _choice_task(name: str, items: Iterable[PromptItem], sides: tuple[str, str], raw: bool) -> Task:
    return Task(name, tuple(items), _MARGIN, {"normalize": "tokens"}, positive=sides[0], negative=sides[1], raw=raw)


def _first(pairs: list[Pair], n: int) -> list[Pair]:
    return pairs[:n]


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(f"{m.role}: {m.content}" for m in content)


def _require(n: int, parts: Mapping[str, int]) -> None:
    """Raise PairsError for parts that are too small."""
    least = {"pairs": LEAST_PAIRS, "choosing": LEAST_CHOOSING, "heldout": LEAST_HELDOUT}
    if short := [part for part in parts if parts[part] < least[part]]:
        words = {"pairs": "to learn from", "choosing": "to choose on", "heldout": "held out"}
        counts = ", ".join(f"{parts[part]} {words[part]} (at least {least[part]})" for part in parts)
        raise PairsError(
            f"{n} pairs are too few: {counts}; {words[short[0]]} there are not enough. Give about 60 pairs of one "
            "prompt and two answers, with different prompts"
        )
