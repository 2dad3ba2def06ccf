"""Pairs of digits and words, control pairs of form alone, and swapped sides."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import PairsError, UsageError
from steermoe_local.pairs.builders import (
    Tally,
)
from steermoe_local.pairs.control_pairs import SURFACES, prompts_of, shuffled_pairs, superficial_pairs
from steermoe_local.pairs.number_pairs import number_pairs, number_word
from steermoe_local.pairs.pairs import Message, Pair, load_pairs, save_pairs
from tests.pairs.test_pair_builders import made, text_pairs

#
# numbers
#


def test_number_words() -> None:
    words = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety-nine", 100: "one hundred", 101: "one hundred and one"}
    words |= {342: "three hundred and forty-two", 1000: "one thousand", 1005: "one thousand and five"}
    words |= {9999: "nine thousand nine hundred and ninety-nine", 2300: "two thousand three hundred"}
    assert {n: number_word(n) for n in words} == words
    assert len({number_word(n) for n in range(10_000)}) == 10_000
    for n in (-1, 10_000):
        with pytest.raises(UsageError):
            number_word(n)


@given(st.integers(0, 2**32), st.integers(10, 9999))
def test_number_pairs(seed: int, largest: int) -> None:
    pairs = list(islice(number_pairs(seed=seed, largest=largest), 20))
    assert pairs == list(islice(number_pairs(seed=seed, largest=largest), 20))
    assert len({pair.positive for pair in pairs}) == len(pairs)
    for pair in pairs:
        numbers = [int(part) for part in pair.positive_target.split(", ")]
        assert all(0 <= n <= largest for n in numbers)
        assert pair.negative_target == ", ".join(map(number_word, numbers))
        assert pair.positive[0] == pair.negative[0]
        assert not any(c.isdigit() for c in pair.positive[0].content)  # type: ignore[union-attr]


def test_the_answers_of_numbers_are_right() -> None:
    value = {number_word(n): n for n in range(101)}
    seen = set()
    for pair in islice(number_pairs(seed=5), 500):
        prompt = pair.positive[0].content  # type: ignore[union-attr]
        numbers = [int(part) for part in pair.positive_target.split(", ")]
        words = prompt.rstrip("?.").split()
        seen.add((words[0], " plus " in prompt, "down" in prompt, " in steps " in prompt))
        if words[0] == "What":
            sign = "plus" if " plus " in prompt else "minus"
            a, b = (value[part] for part in prompt[len("What is ") : -1].split(f" {sign} "))
            assert numbers == [a + b if sign == "plus" else a - b]
        elif words[0] == "Which":
            n = value[prompt.split(" comes ")[1].split(" ", 1)[1][:-1]]
            assert numbers == [n + 1 if " after " in prompt else n - 1]
        else:
            step = {"two": 2, "five": 5, "ten": 10}[words[-1]] if " in steps of " in prompt else 1
            first, last = prompt.split(" from ")[1].rstrip(".").split(" in steps")[0].split(" to ")
            down = "down" in prompt
            assert numbers == list(range(value[first], value[last] + (-1 if down else 1), -step if down else step))
    assert len(seen) == 7, "sums, differences, neighbours; counting up and down, by ones and in steps"


def test_numbers_end_when_there_are_no_more() -> None:
    few = list(number_pairs(largest=10))
    assert 60 < len(few) < 400
    with pytest.raises(UsageError, match="not from 10 to 9999"):
        next(number_pairs(largest=9))


#
# controls
#


def test_superficial_pairs_hold_the_same_content(tmp_path: Path) -> None:
    tally = Tally()
    source = list(islice(number_pairs(seed=1), 60))
    pairs = made(superficial_pairs(source, tally))
    assert len(pairs) + sum(tally.skipped.values()) == 60
    assert set(tally.skipped) <= {"nothing to change (casing)"}
    by_id = {pair.id: pair for pair in source}
    kinds = Counter()
    letters = str.maketrans("", "", '*->"\n. ')
    for pair in pairs:
        name, kind = pair.id.split("~")
        original = by_id[name]
        assert (pair.positive, pair.positive_target) in original.sides()
        old, new = pair.positive_target, pair.negative_target
        assert new != old
        assert pair.negative[0] == pair.positive[0]
        assert pair.negative[-1].content == new  # type: ignore[union-attr]
        if kind == "casing":
            assert new.casefold() == old.casefold()
        elif kind == "format":
            assert new.translate(letters) == old.translate(letters)
        else:
            assert old in new
            assert len(new) > len(old) + 20
        kinds[kind, pair.positive == original.positive] += 1
    assert set(kinds) == {("length", True), ("length", False), ("casing", False), ("format", True), ("format", False)}
    save_pairs(pairs, tmp_path / "p.jsonl")
    assert load_pairs(tmp_path / "p.jsonl") == pairs


def test_superficial_kinds_and_places() -> None:
    side = (Message("user", "say x and x"), Message("assistant", "x, then x"), Message("user", "thanks"))
    pair = Pair("a", side, side, "x", "x")
    (casing,) = superficial_pairs([pair], Tally(), ["casing"])
    assert casing.negative == (side[0], Message("assistant", "x, then X"), side[2])
    (text,) = superficial_pairs([Pair("t", "x y x", "z", "x", "z")], Tally(), ["format"])
    assert text.negative == "x y **x**"
    (lower,) = superficial_pairs([Pair("t", "ABC", "z", "ABC", "z")], Tally(), ["casing"])
    assert lower.negative == "abc"
    for wrong in (["colour"], []):
        with pytest.raises(UsageError, match="kinds of surface"):
            made(superficial_pairs([pair], Tally(), wrong))
    assert set(SURFACES) == {"length", "casing", "format"}


def test_every_form_is_used_on_both_sides() -> None:
    for kind, n_forms in (("format", 5), ("length", 16)):
        pairs = superficial_pairs(text_pairs(80), Tally(), [kind])
        forms = {"".join(c for c in pair.negative_target if not c.isdigit()) for pair in pairs}
        assert len(forms) == 2 * n_forms


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhere is it?\r\n\r\n Who? \n".encode())
    assert [(p.id, p.positive_target, p.positive == p.negative) for p in prompts_of(path)] == [
        ("line-1", "Where is it?", True),
        ("line-3", "Who?", True),
    ]
    for data, words in ((b"\n \n", "no prompts"), (b"\xff", "not UTF-8"), (b'{"a": 1}', "unknown field")):
        path.write_bytes(data)
        with pytest.raises(PairsError, match=words):
            prompts_of(path)
    with pytest.raises(PairsError, match="No such file"):
        prompts_of(tmp_path / "none")


@given(st.integers(2, 40), st.integers(0, 1000))
def test_shuffling_swaps_half(n: int, seed: int) -> None:
    pairs = text_pairs(n)
    result = made(shuffled_pairs(pairs, seed=seed))
    assert result == made(shuffled_pairs(pairs, seed=seed))
    swapped = [new for new, old in zip(result, pairs, strict=True) if new != old]
    assert len(swapped) == n // 2
    for new, old in zip(result, pairs, strict=True):
        assert new.id in (old.id, old.id + "~swapped")
        assert (new.id == old.id) == (new == old)
        assert sorted(map(str, new.sides())) == sorted(map(str, old.sides()))
    # a swap undone is the pair as it was
    back = {pair.id: pair for seed in range(30) for pair in shuffled_pairs(result, seed=seed)}
    assert n < 4 or set(pairs) <= set(back.values())


def test_shuffling_spreads_over_the_file() -> None:
    often = Counter(p.id for seed in range(400) for p in shuffled_pairs(text_pairs(10), seed=seed) if "~" in p.id)
    assert len(often) == 10
    assert max(abs(n - 200) for n in often.values()) < 60
    with pytest.raises(UsageError, match="pairs at least"):
        made(shuffled_pairs(text_pairs(1)))
