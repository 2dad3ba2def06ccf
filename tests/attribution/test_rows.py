"""The rows that an item's answers are decoded in: shared by answers with one beginning, or a branch for each."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.attribution.decoding import _branches, _tree
from steermoe_local.attribution.items import Answer, Item


@st.composite
def items(draw: Any) -> Item:
    """Answers of a small alphabet, so that beginnings are shared; each scores some of its tokens."""
    answers = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
        scored = draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1))
        answers.append(Answer(tuple(tokens), tuple(sorted(scored)), draw(st.sampled_from([1.0, -0.5]))))
    return Item("item", tuple(draw(st.lists(st.integers(7, 9), min_size=1, max_size=4))), tuple(answers))


@given(item=items())
def test_each_answer_is_one_path_of_rows(item: Item) -> None:
    last = len(item.prompt) - 1
    for rows in (_tree(item), _branches(item)):
        for number, answer in enumerate(item.answers):
            path = [(position, token) for token, position, numbers, _ in rows if number in numbers]
            inputs = (item.prompt[last], *answer.tokens[:-1])  # the last token is predicted, and read by nothing
            assert path == [(last + i, token) for i, token in enumerate(inputs)]
            targets = {
                (position - last, target)
                for _, position, numbers, of in rows
                for who, target in of
                if who == number and who in numbers
            }
            assert targets == {(i, answer.tokens[i]) for i in answer.scored}


@given(item=items())
def test_a_tree_has_no_row_twice(item: Item) -> None:
    last = len(item.prompt) - 1
    tree = _tree(item)
    beginnings = {answer.tokens[:length] for answer in item.answers for length in range(len(answer.tokens))}
    assert len(tree) == len(beginnings)
    assert tree[0][:3] == (item.prompt[last], last, tuple(range(len(item.answers))))
    # parents first: llama.cpp wants the positions of a sequence in order
    assert [position for _, position, _, _ in tree] == sorted(position for _, position, _, _ in tree)
    assert len(_branches(item)) == sum(len(answer.tokens) for answer in item.answers)
    assert all(len(numbers) == 1 for _, _, numbers, _ in _branches(item))
