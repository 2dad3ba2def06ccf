"""The model's own answers under two instructions, and the pairs that they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..evaluation.metrics.repetition import repetition
from ..generation.answer_file import AnswerFile
from ..generation.answering import answers
from ..generation.engine import Engine, Sampling
from ..generation.reply import Reply
from ..llama.rendering import Renderer
from ..pairs.pairs import Message, Pair
from ..pairs.prompts import PromptItem

SIDES = ("like", "unlike")
AT_ONCE = 32  # questions that are asked before it is looked at how many pairs there are
_MOST_ALIKE = 4  # pairs with the very same two answers: further ones teach nothing new
_LOOPS = 0.5  # an answer that repeats itself for this share is no answer
LEAST_TOKENS = 8  # answers up to this length stay whole


def ask(
    engine: Engine,
    renderer: Renderer,
    questions: Sequence[PromptItem],
    instructions: Mapping[str, str],
    *,
    max_tokens: int,
    wanted: int,
    kept: AnswerFile,
    records: dict[str, dict[str, Any]],
    enough: Callable[[int], bool],
    progress: Callable[[int, int], None],
) -> tuple[list[Pair], dict[str, int]]:
    """Ask questions under both instructions until there are `wanted` pairs, or `enough` says so of a number.

    `records` are those of an earlier, interrupted run by id; new ones are added to them and to `kept`. Returns the
    pairs, in the questions' order, and how many questions made none, by reason.
    """
    made = PairMaker(renderer)
    n_asked = 0
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        _answer(engine, renderer, part, instructions, max_tokens, kept, records)
        for question in part:
            made.add(question, *(records[f"{side}/{question.id}"] for side in SIDES))
        n_asked += len(part)
        progress(min(len(made.pairs), wanted), wanted)
        if len(made.pairs) >= wanted or enough(len(made.pairs)):
            break
    return made.pairs[:wanted], {"asked": n_asked, **made.left_out}


def _answer(
    engine: Engine,
    renderer: Renderer,
    questions: Iterable[PromptItem],
    instructions: Mapping[str, str],
    max_tokens: int,
    kept: AnswerFile,
    records: dict[str, dict[str, Any]],
) -> None:
    """Have some questions answered, each under both instructions; what is there already is not computed again."""
    wanted = [
        (f"{side}/{question.id}", question.messages(instructions[side]))
        for question in questions
        for side in SIDES
        if f"{side}/{question.id}" not in records
    ]
    prompts = [renderer.render(messages) for _, messages in wanted]
    for index, _, event in answers(
        engine, prompts, {"": None}, sampling=Sampling(temperature=0), max_tokens=max_tokens
    ):
        if isinstance(event, Reply):
            assert event.finish is not None
            record: dict[str, Any] = {
                "id": wanted[index][0],
                "text": event.text.strip(),
                "finish": event.finish.reason,
                "loop": repetition(event.tokens).loop,
            }
            kept.add(record)
            records[record["id"]] = record


class PairMaker:
    """Makes pairs of the two answers to each question; `left_out` counts those that made none, by reason."""

    def __init__(self, renderer: Renderer) -> None:
        self.pairs: list[Pair] = []
        self.left_out: Counter[str] = Counter()
        self._renderer = renderer
        self._asked: set[str] = set()
        self._alike: Counter[tuple[str, str]] = Counter()

    def add(self, question: PromptItem, like: Mapping[str, Any], unlike: Mapping[str, Any]) -> None:
        """Add the pair of a question, unless its answers cannot be compared."""
        content = question.messages()
        key = " ".join(message.content.casefold() for message in content)
        texts = self.cut(like, unlike)
        if key in self._asked:
            reason = "the question was asked already"
        elif not all(texts):
            reason = "an answer is empty"
        elif max(like["loop"], unlike["loop"]) >= _LOOPS:
            reason = "an answer repeats itself"
        elif texts[0].casefold() == texts[1].casefold():
            reason = "both answers are the same"
        elif self._alike[texts] >= _MOST_ALIKE:
            reason = f"{_MOST_ALIKE} pairs have these answers already"
        else:
            self._asked.add(key)
            self._alike[texts] += 1
            one, two = ((*content, Message("assistant", text)) for text in texts)
            self.pairs.append(Pair(str(question.id), one, two, texts[0], texts[1]))
            return
        self._asked.add(key)
        self.left_out[reason] += 1

    def cut(self, like: Mapping[str, Any], unlike: Mapping[str, Any]) -> tuple[str, str]:
        """Both answers, the longer one cut to the tokens of the other, at the end of a word; short ones stay whole."""
        texts = [str(like["text"]), str(unlike["text"])]
        lengths = [self._length(text) for text in texts]
        most = max(LEAST_TOKENS, min(lengths))
        return tuple(  # type: ignore[return-value]  # two, as given
            text if length <= most else self._first(text, most) for text, length in zip(texts, lengths, strict=True)
        )

    def _length(self, text: str) -> int:
        return len(self._renderer.tokenize(text, add_special=False, parse_special=False)) if text else 0

    def _first(self, text: str, most: int) -> str:
        """The first words of a text that have at most so many tokens."""
        ends = [index for index, letter in enumerate(text) if letter.isspace()]
        low, high = 0, len(ends)  # how many ends fit: found by halving
        while low < high:
            middle = (low + high + 1) // 2
            if self._length(text[: ends[middle - 1]]) <= most:
                low = middle
            else:
                high = middle - 1
        return text[: ends[low - 1]].rstrip() if low else text
