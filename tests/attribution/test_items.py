"""Items of pairs and of tasks: which tokens are the prompt, which are scored, and what gives no margin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steermoe_local import Message, Pair
from steermoe_local.attribution.items import Answer, Item, pair_items, split, task_items
from steermoe_local.errors import PairsError, UsageError
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import Task
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.tokenizing import token_bytes
from steermoe_local.pairs.prompts import PromptItem


@pytest.fixture(scope="module")
def renderer(tiny_model: Any) -> Renderer:
    return Renderer(tiny_model)


def text_of(renderer: Renderer, tokens: Any) -> str:
    return b"".join(token_bytes(renderer._model.vocab, token, special=True) for token in tokens).decode()


def pair(question: str, positive: str, negative: str, name: str = "a", targets: tuple[str, str] = ("", "")) -> Pair:
    sides = [(Message("user", question), Message("assistant", answer)) for answer in (positive, negative)]
    return Pair(name, sides[0], sides[1], targets[0] or positive, targets[1] or negative)


COUNT = pair("Count to three.", "1, 2, 3", "one, two, three")


#
# pairs
#


def test_prompt_and_answers_are_the_renderers_tokens(renderer: Renderer) -> None:
    (item,) = pair_items(renderer, [COUNT])
    assert item.id == "a"
    assert [answer.sign for answer in item.answers] == [1.0, -1.0]
    for answer, (side, target) in zip(item.answers, COUNT.sides(), strict=True):
        rendered = renderer.prompt(side, target)
        assert [*item.prompt, *answer.tokens] == rendered.tokens
        assert [len(item.prompt) + index for index in answer.scored] == rendered.target
        assert text_of(renderer, [answer.tokens[i] for i in answer.scored]).strip() == target
    assert item.n_tokens == len(item.prompt) + max(len(answer.tokens) for answer in item.answers)


def test_what_stands_before_and_after_the_targets_is_not_scored(renderer: Renderer) -> None:
    one = pair("Count.", "numbers: 1, 2 and so on", "numbers: one, two and so on", targets=("1, 2", "one, two"))
    (item,) = pair_items(renderer, [one])
    assert text_of(renderer, item.prompt).endswith("numbers:")
    assert [text_of(renderer, answer.tokens).strip() for answer in item.answers] == ["1, 2", "one, two"]
    assert [answer.scored for answer in item.answers] == [tuple(range(len(answer.tokens))) for answer in item.answers]


def test_plain_texts_begin_with_the_same_tokens(renderer: Renderer) -> None:
    (item,) = pair_items(renderer, [Pair("t", "The answer is 7", "The answer is seven", "7", "seven")])
    assert list(item.prompt) == renderer.prompt("The answer is 7", "7").tokens[: len(item.prompt)]
    assert text_of(renderer, item.prompt).strip().endswith("is")


def test_pairs_of_different_prompts_and_one_target_have_no_margin(renderer: Renderer) -> None:
    """The paper's faithfulness pairs: the refusal names how to make others."""
    sides = [(Message("user", text), Message("assistant", "Paris")) for text in ("Document. Where?", "Where?")]
    faithful = Pair("f-1", sides[0], sides[1], "Paris", "Paris")
    with pytest.raises(PairsError, match=r"f-1.*--choices"):
        pair_items(renderer, [COUNT, faithful])
    skipped: list[tuple[str, str]] = []
    (kept,) = pair_items(renderer, [faithful, COUNT], lambda name, reason: skipped.append((name, reason)))
    assert kept.id == "a"
    assert [name for name, _ in skipped] == ["f-1"]
    assert "\n" not in skipped[0][1]


REFUSED = {
    "other prompts": Pair(
        "r",
        (Message("user", "x"), Message("assistant", "1")),
        (Message("user", "y"), Message("assistant", "2")),
        "1",
        "2",
    ),
    "one target": pair("Count.", "one", "one", name="r"),
    "nothing before": Pair("r", "one", "two", "one", "two"),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_other_pairs_that_are_refused(renderer: Renderer, refused: Pair) -> None:
    with pytest.raises(PairsError, match="'r'"):
        pair_items(renderer, [refused])
    with pytest.raises(PairsError, match="none of the 1 pairs"):
        pair_items(renderer, [refused], lambda *_: None)


def test_no_pairs_give_no_items(renderer: Renderer) -> None:
    with pytest.raises(PairsError):
        pair_items(renderer, [])


class FixedTokens:
    """Stands for a renderer whose tokenizer merges what stands before the target with it."""

    def __init__(self, *prompts: tuple[list[int], list[int]]) -> None:
        self.prompts = iter(prompts)

    def prompt(self, side: Any, target: str) -> Any:
        from steermoe_local.llama.rendering import Prompt

        return Prompt(*next(self.prompts))


def test_a_target_that_is_merged_with_its_prompt(renderer: Renderer) -> None:
    """The first tokens differ before the target, or none is left before it: the pair is skipped."""
    reasons: list[str] = []

    def skip(_: str, reason: str) -> None:
        reasons.append(reason)

    for tokens in ([([5, 6, 7], [2]), ([5, 8, 9], [2])], [([6, 7], [0, 1]), ([8, 9], [0, 1])]):
        with pytest.raises(PairsError, match="none of the 1"):
            pair_items(FixedTokens(*tokens), [COUNT], skip)  # type: ignore[arg-type]
    assert "differ" in reasons[0]
    assert "before" in reasons[1]


def test_a_target_that_begins_at_a_later_token_than_the_other() -> None:
    """What stands before it is read under steering, but not scored."""
    (item,) = pair_items(FixedTokens(([1, 2, 3, 4, 5], [3, 4]), ([1, 2, 6], [2])), [COUNT])  # type: ignore[arg-type]
    assert item.prompt == (1, 2)
    assert item.answers == (Answer((3, 4, 5), (1, 2), 1.0), Answer((6,), (0,), -1.0))


#
# tasks
#


def choice_task(*items: dict[str, Any], **fields: Any) -> Task:
    prompts = tuple(PromptItem(f"q{i}", item.pop("prompt"), extra=item) for i, item in enumerate(items))
    return Task("quiz", prompts, "choice", **fields)


CHOICES = {"prompt": "Which number comes after three?", "choices": ["4", "four", "5", "6, 7"], "answer": [0, 1]}


def items_of(renderer: Renderer, task: Task) -> list[Item]:
    return task_items(renderer, task, make_scorer(task.scorer, task.options))


def test_choices_of_a_task(renderer: Renderer) -> None:
    (item,) = items_of(renderer, choice_task(dict(CHOICES)))
    assert item.id == "q0"
    assert [answer.sign for answer in item.answers] == [0.5, 0.5, -0.5, -0.5]
    before = renderer.render((Message("user", str(CHOICES["prompt"])),))
    for answer, text in zip(item.answers, ["4", "four", "5", "6, 7"], strict=True):
        assert [*item.prompt, *answer.tokens] == renderer.tokenize(before.text + text, add_special=False)
        assert answer.scored == tuple(range(len(answer.tokens)))
        assert text_of(renderer, answer.tokens).strip() == text
    assert len(item.answers[3].tokens) > 1


def test_a_prefix_of_choices_and_a_raw_prompt(renderer: Renderer) -> None:
    task = choice_task(
        {"prompt": "Three, then", "choices": ["four", "seven"], "answer": "seven"}, raw=True, options={"prefix": " "}
    )
    (item,) = items_of(renderer, task)
    assert [answer.sign for answer in item.answers] == [-1.0, 1.0]
    whole = renderer.tokenize("Three, then seven", add_special=True)
    assert [*item.prompt, *item.answers[1].tokens] == whole


def test_tasks_without_a_margin_are_refused(renderer: Renderer) -> None:
    text = Task("capitals", (PromptItem("x", "Capital of France?", extra={"answer": "Paris"}),), "contains")
    with pytest.raises(UsageError, match=r"capitals.*contains.*choice"):
        items_of(renderer, text)
    with pytest.raises(UsageError, match=r"quiz, q1"):
        items_of(renderer, choice_task(dict(CHOICES), {**CHOICES, "answer": [0, 1, 2, 3]}))


def test_choices_that_begin_with_nothing_before_them(renderer: Renderer) -> None:
    """A vocabulary without a token for the beginning, whose tokenizer merges the prompt with each choice."""

    class Merging:
        has_template = False

        def render(self, content: Any) -> Any:
            from steermoe_local.llama.rendering import RenderedPrompt

            return RenderedPrompt(content, [1])

        def tokenize(self, text: str, *, add_special: bool) -> list[int]:
            return [10 + len(text)]

    with pytest.raises(UsageError, match="q0"):
        items_of(Merging(), choice_task({"prompt": "a", "choices": ["b", "cd"], "answer": 0}))  # type: ignore[arg-type]


#
# halves
#


def some_items(n: int) -> list[Item]:
    return [Item(f"item-{i}", (1,), (Answer((2,), (0,), 1.0), Answer((3,), (0,), -1.0))) for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("most", [None, 1, 3, 10, 100])
def test_what_estimates_does_not_confirm(n: int, most: int | None) -> None:
    items = some_items(n)
    estimating, confirming = split(items, most, seed=1)
    used = min(n, most or n)
    assert len(estimating) + len(confirming) == used
    assert len({item.id for item in [*estimating, *confirming]}) == used
    assert len(confirming) == (used // 2 if used > 3 else 0)
    assert len(estimating) >= 1


def test_the_halves_depend_on_ids_and_seed_alone() -> None:
    items = some_items(30)
    assert split(items, None, 1) == split(items[::-1], None, 1)
    assert split(items, 12, 1) == split([replace(item) for item in items], 12, 1)
    assert split(items, None, 1) != split(items, None, 2)
    more = [*split(items, 20, 1)[0], *split(items, 20, 1)[1]]
    fewer = [*split(items, 10, 1)[0], *split(items, 10, 1)[1]]
    assert {item.id for item in fewer} < {item.id for item in more}
