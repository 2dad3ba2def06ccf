"""The parts of a run without a run: dividing pairs, making them of answers, and judging values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.tasks.tasks import load_task
from steermoe_local.learning.answers import PairMaker
from steermoe_local.learning.judging import Confirmed, judge
from steermoe_local.learning.material import choice_item, of_pairs, part_of, place, prompt_of, shortened, task_lines
from steermoe_local.learning.options import LearnOptions
from steermoe_local.llama.rendering import Renderer, vocabulary_renderer
from steermoe_local.models.embedded import behaviour, embedded_model
from steermoe_local.pairs.pairs import Message, Pair, load_pairs
from steermoe_local.pairs.prompts import PromptItem

PAIRS = load_pairs(behaviour("digits-words").pairs)


def test_places() -> None:
    places = [place(f"question {number}") for number in range(2000)]
    assert all(0 <= one < 1 for one in places)
    assert abs(sum(one < 0.4 for one in places) / 2000 - 0.4) < 0.05
    assert place("question 7") == places[7]
    parts = [part_of(f"question {number}", 0.4) for number in range(2000)]
    assert {part: round(parts.count(part) / 2000, 1) for part in set(parts)} == {
        "heldout": 0.4,
        "choosing": 0.2,
        "pairs": 0.4,
    }


def test_pairs_of_one_prompt_stay_together() -> None:
    twice = [*PAIRS, *(replace(pair, id=f"again-{pair.id}") for pair in PAIRS)]
    found = of_pairs("x", twice, 0.4, ("digits", "words"), (1000, 1000, 1000))
    parts = [
        {prompt_of(pair) for pair in found.pairs},
        {f"user: {item.messages()[-1].content}\nassistant: " for item in found.choosing.items},
        {f"user: {item.messages()[-1].content}\nassistant: " for item in found.heldout.items},
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 120
    assert len(found.pairs) + len(found.choosing.items) + len(found.heldout.items) == 240


def test_the_task_file(tmp_path: Path) -> None:
    task = of_pairs("numbers", PAIRS, 0.4, ("digits", "words"), (50, 50, 20)).heldout
    (tmp_path / "task.jsonl").write_text(task_lines(task), encoding="utf-8")
    read = load_task(tmp_path / "task.jsonl")
    assert read.sha256 == task.sha256
    assert (read.name, read.positive, read.negative) == ("numbers", "digits", "words")
    assert len(read.items) == 20


def test_choice_items() -> None:
    pair = Pair("a", "One? 1", "One? one", "1", "one")
    item = choice_item(pair)
    assert item is not None
    assert item.content == "One? "
    assert item.extra == {"choices": ["1", "one"], "answer": 0, "negative": 1}
    user, answer = Message("user", "One?"), Message("assistant", "It is 1.")
    partly = Pair("b", (user, answer), (user, Message("assistant", "It is one.")), "1", "one")
    assert choice_item(partly) is None


def test_shortened() -> None:
    user = Message("user", "Count.")
    pair = Pair(
        "a",
        (user, Message("assistant", "1, 2, 3, 4")),
        (user, Message("assistant", "one, two, three")),
        "1, 2, 3, 4",
        "one, two, three",
    )
    short = shortened(pair, 2)
    assert (short.positive_target, short.negative_target) == ("1, 2,", "one, two,")
    assert short.positive[-1].content == "1, 2,"
    alike = Pair("b", (user, Message("assistant", "so 1")), (user, Message("assistant", "so one")), "so 1", "so one")
    assert shortened(alike, 1) is alike


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with vocabulary_renderer(embedded_model()) as found:
        yield found


def answer(text: str, loop: float = 0.0) -> dict[str, Any]:
    return {"text": text, "loop": loop}


def test_pairs_of_answers(renderer: Renderer) -> None:
    made = PairMaker(renderer)
    made.add(PromptItem("1", "One?"), answer("1"), answer("one"))
    made.add(PromptItem("2", "one?"), answer("1"), answer("one"))  # the same question
    made.add(PromptItem("3", "Two?"), answer("Two"), answer("two"))
    made.add(PromptItem("4", "Three?"), answer(""), answer("three"))
    made.add(PromptItem("5", "Four?"), answer("4 4 4 4", 0.9), answer("four"))
    assert [pair.id for pair in made.pairs] == ["1"]
    assert made.pairs[0].positive == (Message("user", "One?"), Message("assistant", "1"))
    assert sum(made.left_out.values()) == 4
    for number in range(6, 20):
        made.add(PromptItem(str(number), f"Question {number}?"), answer("1"), answer("one"))
    assert len(made.pairs) == 4


def test_answers_are_cut_alike(renderer: Renderer) -> None:
    made = PairMaker(renderer)
    many = ", ".join(["seven"] * 30)
    few = ", ".join(["7"] * 12)
    one, two = made.cut(answer(many), answer(few))
    lengths = [len(renderer.tokenize(text, add_special=False)) for text in (one, two)]
    assert two == few
    assert lengths[0] <= lengths[1]
    assert many.startswith(one)
    assert one.endswith(("seven,", "seven"))
    assert made.cut(answer("fifteen"), answer("15")) == ("fifteen", "15")


#
# judging
#


def values(share: float, n: int = 50) -> np.ndarray[Any, Any]:
    return (np.arange(n) < round(share * n)).astype(np.float64)


def judged(steered: float, random: list[float], shuffled: list[float], **changed: float) -> Confirmed:
    costs = {"perplexity": 0.01, "kl": 0.001, "max_ppl_increase": 0.05, **changed}
    return judge(values(0.3), values(steered), [values(one) for one in random], [values(s) for s in shuffled], **costs)


def test_a_gain_that_nothing_else_has() -> None:
    found = judged(0.9, [0.3, 0.32, 0.28, 0.3, 0.36], [0.5, 0.1])
    assert found.problem == ""
    assert found.gain.low > 0
    assert found.n_below == 5
    assert abs(found.random - 0.012) < 1e-9
    assert found.shuffled == 0
    assert Confirmed.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (judged(0.32, [0.3] * 5, [0.3, 0.3]), "may be none"),
        (judged(0.9, [0.3, 0.3, 0.3, 0.3, 0.94], [0.3, 0.3]), "random experts do as much"),
        (judged(0.6, [0.6] * 5, [0.3, 0.3]), "random experts do as much"),
        (judged(0.9, [0.3] * 5, [0.9, 0.9]), "shuffled pairs does as much"),
        (judged(0.9, [0.3] * 5, [0.3, 0.3], perplexity=0.2), "perplexity"),
    ],
)
def test_reasons(found: Confirmed, words: str) -> None:
    assert words in found.problem


def test_without_shuffled_pairs() -> None:
    found = judged(0.9, [0.3] * 5, [])
    assert found.problem == ""
    assert found.shuffled is None


def test_options() -> None:
    with pytest.raises(UsageError, match="effort"):
        LearnOptions(effort="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="sizes: n_questions: unknown"):
        LearnOptions(sizes={"n_questions": 3})
    with pytest.raises(UsageError, match="too few"):
        LearnOptions(sizes={"n_random": 4})
    with pytest.raises(UsageError, match="heldout"):
        LearnOptions(heldout=0.95)
