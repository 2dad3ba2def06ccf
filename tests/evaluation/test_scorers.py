"""Scorers: what is right, what is refused, and multiple choice against llama_cpp's own logits."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import SteeredLlama
from steermoe_local.errors import FormatError, UsageError
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.tasks import safe_regex
from steermoe_local.evaluation.tasks.number_scorer import numbers_in
from steermoe_local.evaluation.tasks.scorers import SCORERS, make_scorer, option_names, parse_options
from steermoe_local.evaluation.tasks.tasks import Choice, Task
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.llama.rendering import Renderer
from steermoe_local.pairs.prompts import PromptItem
from tests.support import rounding
from tests.support.low_level import F32
from tests.support.paths import ROOT

TEXT = st.text(max_size=40)


def item(**extra: Any) -> PromptItem:
    return PromptItem("q", "x", extra=extra)


def label(name: str, text: str, options: dict[str, Any] | None = None, **extra: Any) -> str:
    scorer = make_scorer(name, options)
    scorer.check(item(**extra))
    score = scorer.score(item(**extra), text)
    assert score.value == (score.label in ("right", "digits", "positive", "refused"))
    return score.label


#
# by name
#


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("exactly", {}, ["'exactly'", *SCORERS]),
        ("exact", {"case": True}, ["exact", "'case'", "ignore_case", "normalize", "other"]),
        ("refusal", {"case": True}, ["refusal", "'case'"]),
        ("exact", {"ignore_case": 1}, ["exact", "ignore_case: 1"]),
        ("exact", {"ignore_case": None}, ["exact", "ignore_case: None"]),
        ("exact", {"normalize": "lower"}, ["exact", "normalize: 'lower'", "none", "strip", "squad"]),
        ("contains", {"normalize": "strip"}, ["contains", "normalize: 'strip'", "none", "squad"]),
        ("choice", {"normalize": "words"}, ["choice", "normalize: 'words'", "none", "tokens", "characters", "bytes"]),
        ("sides", {"behaviour": "kind"}, ["sides", "behaviour: 'kind'", "digits-words", "document-memory"]),
        ("regex", {"pattern": "("}, ["regex", "pattern: '('"]),
        ("regex", {"pattern": "a{99999999999}"}, ["regex", "pattern: 'a{99999999999}'"]),
        ("regex", {"pattern": "(" * 5000 + ")" * 5000}, ["regex", "pattern: '(((("]),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_scorer(name, options)
    assert all(fact in str(caught.value) for fact in facts)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_message_of_an_impossible_option() -> None:
    with pytest.raises(UsageError) as caught:
        make_scorer("exact", {"normalize": "lower"})
    assert str(caught.value) == "scorer exact: normalize: 'lower' is not one of none, strip, squad"


def test_options_from_texts() -> None:
    assert parse_options("exact", ["ignore_case=true", "other=a=b"]) == {"ignore_case": True, "other": "a=b"}
    assert parse_options("judge", ["timeout=3", "retries=2", "model=3"]) == {"timeout": 3.0, "retries": 2, "model": "3"}
    for texts, words in (
        (["ignore_case"], "KEY=VALUE"),
        (["ignore_case=yes"], "ignore_case: 'yes'"),
        (["ignore_case=1"], "ignore_case: 1 "),
        (["other=a", "other=b"], "given twice"),
        (["case=true"], "'case'"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_options("exact", texts)
    with pytest.raises(UsageError, match=r"retries: 2\.5 "):
        parse_options("judge", ["retries=2.5"])


def test_a_prompt_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Is {answer} polite?")
    assert parse_options("judge", [f"prompt=@{path}"]) == {"prompt": "Is {answer} polite?"}
    assert parse_options("regex", ["pattern=@x"]) == {"pattern": "@x"}
    path.write_bytes(b"\xff")
    for name in (path, tmp_path / "nothing"):
        with pytest.raises(FormatError):
            parse_options("judge", [f"prompt=@{name}"])


def test_the_page_has_all_scorers_and_options() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| [^|]* \| ([^|]*) \| [^|]* \|$", page, re.MULTILINE))
    for name in SCORERS:
        if name != "judge":
            assert re.findall(r"`([a-z_]+)`", rows[name]) == list(option_names(name)), name
    judges = page.partition("## A judge")[2].partition("\n## ")[0]
    for option in option_names("judge"):
        assert f"`{option}`" in judges


#
# texts
#


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("Paris", {}, "right"),
        (" Paris\n", {}, "right"),
        (" Paris", {"normalize": "none"}, "wrong"),
        ("paris", {}, "wrong"),
        ("PARIS", {"ignore_case": True}, "right"),
        ("The  paris.", {"normalize": "squad"}, "right"),
        ("a Paris, the!", {"normalize": "squad"}, "right"),
        ("Paris, France", {"normalize": "squad"}, "wrong"),
        ("", {}, "wrong"),
    ],
)
def test_exact(text: str, options: dict[str, Any], found: str) -> None:
    assert label("exact", text, options, answer="Paris") == found
    assert label("exact", text, options, answer=["Rome", "Paris"]) == found


@pytest.mark.parametrize(
    ("text", "answer", "options", "found"),
    [
        ("It is Paris.", "paris", {}, "right"),
        ("It is Paris.", "paris", {"ignore_case": False}, "wrong"),
        ("a heart", "art", {}, "wrong"),
        ("a heart", "art", {"words": False}, "right"),
        ("art!", "art", {}, "right"),
        ("I like C++.", "C++", {}, "right"),
        ("$5 or 5$", "5$", {}, "right"),
        ("New\n  York", "New York", {}, "right"),
        ("a.b", "a.b", {}, "right"),
        ("axb", "a.b", {}, "wrong"),
        ("12", "1", {}, "wrong"),
        ("Zu\u0308rich", "Z\u00fcrich", {}, "right"),
        ("in the U.S.A. only", "USA", {"normalize": "squad"}, "right"),
        ("", "x", {}, "wrong"),
    ],
)
def test_contains(text: str, answer: str, options: dict[str, Any], found: str) -> None:
    assert label("contains", text, options, answer=answer) == found


@given(TEXT, TEXT, TEXT)
def test_an_answer_is_found_where_it_stands(before: str, answer: str, after: str) -> None:
    if answer.strip():
        assert label("contains", f"{before} {answer} {after}", answer=answer) == "right"
        assert label("contains", before + answer + after, {"words": False, "ignore_case": False}, answer=answer) in (
            "right",
            "wrong",  # an accent may join a letter of the answer
        )
        assert label("exact", answer, answer=answer) == "right"


@pytest.mark.parametrize("field", ["negative", "not_answer"])
@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("exact", "lute", "right"),
        ("exact", "harp", "memory"),
        ("exact", "drum", "ill-formed"),
        ("contains", "a lute", "right"),
        ("contains", "a harp", "memory"),
        ("contains", "not a harp but a lute", "both"),
        ("contains", "a drum", "ill-formed"),
        ("regex", "a lute", "right"),
        ("regex", "a harp", "memory"),
        ("regex", "a drum", "ill-formed"),
        ("regex", "drum", "wrong"),
    ],
)
def test_two_sides(name: str, text: str, found: str, field: str) -> None:
    options = {"other": "memory"} | ({"pattern": r"a (\w+)"} if name == "regex" else {})
    assert label(name, text, options, answer="lute", **{field: ["harp", "violin"]}) == found


@pytest.mark.parametrize(
    ("text", "options", "extra", "found"),
    [
        ("it is 42", {"pattern": "[0-9]+"}, {}, "right"),
        ("none", {"pattern": "[0-9]+"}, {}, "wrong"),
        ("none", {"pattern": "[0-9]+"}, {"pattern": "^n"}, "right"),
        ("it is 42", {"pattern": "[0-9]+"}, {"answer": "42"}, "right"),
        ("it is 43", {"pattern": "[0-9]+"}, {"answer": "42"}, "wrong"),
        ("#### 42 !", {"pattern": r"#### (\S+)"}, {"answer": ["7", "42"]}, "right"),
        ("Answer: b", {"pattern": "answer: ([A-D])", "ignore_case": True}, {"answer": "B"}, "right"),
        ("x", {"pattern": "(y)?x"}, {"answer": "y"}, "wrong"),
        ("a\nb", {"pattern": "(?m)^b$"}, {}, "right"),
    ],
)
def test_regex(text: str, options: dict[str, Any], extra: dict[str, Any], found: str) -> None:
    assert label("regex", text, options, **extra) == found


def test_a_pattern_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_regex, "SECONDS", 0.5)
    monkeypatch.setattr(safe_regex.search, "__defaults__", (0.5,))
    begin = time.perf_counter()
    assert label("regex", "a" * 60, {"pattern": "(a+)+b"}) == "too-slow"
    assert time.perf_counter() - begin < 60, "without a limit it takes years"
    monkeypatch.undo()
    assert label("regex", "aab", {"pattern": "(a+)+b"}) == "right"  # a new process


@pytest.mark.parametrize(
    "pattern",
    ["(?:(?:(?:a?){1000}){1000}){1000}b", "(?:a??){4000000000}b"],  # the package regex compiles them into gigabytes
)
def test_a_pattern_that_needs_gigabytes(pattern: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    begin = time.perf_counter()
    assert label("regex", "a" * safe_regex.MAX_TEXT, {"pattern": pattern}) == "too-slow"
    assert time.perf_counter() - begin < 60
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 1 << 20)  # KiB
    assert label("regex", "ab", {"pattern": "a(b)"}) == "right"


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        # where the package regex differs from re
        ("b", "a{e}", "wrong"),
        ("a{e}", "a{e}", "right"),
        ("\u00b2", r"\w", "right"),
        ("\u203f", r"\w", "wrong"),
        ("\x1c", r"\s", "right"),
        ("foo\u0301", r"\bfoo\b", "right"),
    ],
)
def test_patterns_are_those_of_re(text: str, pattern: str, found: str) -> None:
    assert label("regex", text, {"pattern": pattern}) == found


def test_only_the_beginning_is_searched() -> None:
    text = "x" * safe_regex.MAX_TEXT
    assert label("regex", text[1:] + "y", {"pattern": "y"}) == "right"
    assert label("regex", text + "y", {"pattern": "y"}) == "wrong"


@given(TEXT)
def test_a_search_is_pythons(text: str) -> None:
    pattern = re.compile(r"(\w)\W|.$")
    there = pattern.search(text)
    found = (False, "") if there is None else (True, there.group(1) or "")
    assert safe_regex.search(pattern, text, 60) == found


@pytest.mark.parametrize(
    ("name", "extra", "facts"),
    [
        ("exact", {}, "answer: "),
        ("exact", {"answer": None}, "answer: "),
        ("exact", {"answer": 3}, "answer: "),
        ("exact", {"answer": []}, "answer: "),
        ("exact", {"answer": ["a", 3]}, "answer: "),
        ("exact", {"answer": " "}, "answer: "),
        ("exact", {"answer": "a", "negative": 3}, "negative: "),
        ("contains", {"answer": {}}, "answer: "),
        ("regex", {}, "pattern: "),
        ("regex", {"pattern": 3}, "pattern: "),
        ("regex", {"pattern": "("}, "pattern: '(' "),
        ("regex", {"pattern": "x", "negative": "y"}, "answer: "),
        ("sides", {"positive": "1"}, "negative: "),
        ("sides", {"positive": ["1", "2"], "negative": "x"}, "positive: "),
        ("choice", {}, "choices: "),
        ("choice", {"choices": ["a"], "answer": 0}, "choices: "),
        ("choice", {"choices": "ab", "answer": 0}, "choices: "),
        ("choice", {"choices": ["a", ""], "answer": 0}, "choices: "),
        ("choice", {"choices": ["a", "a"], "answer": 0}, "choices: "),
        ("choice", {"choices": ["a", "b"]}, "answer: "),
        ("choice", {"choices": ["a", "b"], "answer": []}, "answer: "),
        ("choice", {"choices": ["a", "b"], "answer": 2}, "answer: 2 "),
        ("choice", {"choices": ["a", "b"], "answer": -1}, "answer: -1 "),
        ("choice", {"choices": ["a", "b"], "answer": True}, "answer: True "),
        ("choice", {"choices": ["a", "b"], "answer": "C"}, "answer: 'C' "),
        ("choice", {"choices": ["a", "b"], "answer": ""}, "answer: '' "),
        ("choice", {"choices": ["a", "b"], "answer": "AB"}, "answer: 'AB' "),
        ("choice", {"choices": ["a", "b"], "answer": 0, "negative": "A"}, "negative: "),
    ],
)
def test_items_that_cannot_be_scored(name: str, extra: dict[str, Any], facts: str) -> None:
    with pytest.raises(FormatError) as caught:
        make_scorer(name).check(PromptItem("q7", "x", line=3, extra=extra))
    assert str(caught.value).startswith(f"item q7 (line 3): {facts}")


def test_the_message_of_an_item_without_an_answer() -> None:
    with pytest.raises(FormatError) as caught:
        make_scorer("exact").check(PromptItem("q7", "x", line=3))
    assert str(caught.value) == 'item q7 (line 3): answer: missing; write "answer": "Paris", or ["Paris", "paris"]'


def test_an_answer_of_which_nothing_is_left() -> None:
    for name in ("exact", "contains"):
        with pytest.raises(FormatError, match="normalized"):
            make_scorer(name, {"normalize": "squad"}).check(item(answer="The"))


#
# forms
#


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3, 4, 5", (3, 0)),
        ("three, four", (0, 2)),
        ("twenty-three", (0, 1)),
        ("two hundred and five", (0, 1)),
        ("TWENTY three", (0, 1)),
        ("1,024.5 at 10:30", (2, 0)),
        ("the 3rd", (1, 0)),
        ("the one that counts, one of them, no one, one's own", (0, 0)),
        ("one apple", (0, 1)),
        ("1. one\n2. two", (0, 2)),
        ("1) 5 apples\n2) 6 pears", (2, 0)),
        ("4. That is all.", (1, 0)),
        ("1.\n2.\n3.", (3, 0)),
        ("often, tenth, someone, weight", (0, 0)),
        ("B2", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_numbers(text: str, numbers: tuple[int, int]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3, 4", "digits"),
        ("three", "words"),
        ("3 or three", "ill-formed"),
        ("none", "ill-formed"),
        ("3 4 one", "digits"),
    ],
)
def test_digits_or_words(text: str, found: str) -> None:
    assert label("digits-or-words", text) == found


@pytest.mark.parametrize(
    ("text", "found"), [("I can't help with that.", "refused"), ("Sure.", "complied"), (" \n", "ill-formed")]
)
def test_refusal(text: str, found: str) -> None:
    assert label("refusal", text) == found


def test_sides_without_a_behaviour() -> None:
    fields = {"positive": "15", "negative": "fifteen"}
    assert label("sides", "15", **fields) == "positive"
    assert label("sides", "16", **fields) == "ill-formed"
    assert label("sides", "16", {"behaviour": "digits-words"}, **fields) == "positive"


#
# multiple choice
#


def choose(logprobs: list[float], options: dict[str, Any] | None = None, n_tokens: int = 1, **extra: Any) -> str:
    scorer = make_scorer("choice", options)
    fields = {"choices": ["ab", "\u00e9\u00e9\u00e9", "c"][: len(logprobs)], "answer": 0} | extra
    scorer.check(item(**fields))
    texts = scorer.choices(item(**fields))
    choices = [
        Choice(text, logprob, n_tokens + i) for i, (text, logprob) in enumerate(zip(texts, logprobs, strict=True))
    ]
    return scorer.score_choices(item(**fields), tuple(choices)).label


def test_the_likeliest_choice() -> None:
    assert choose([-1, -2]) == "right"
    assert choose([-2, -1]) == "wrong"
    assert choose([-2, -1], negative="B", options={"other": "memory"}) == "memory"
    assert choose([-1, -1]) == "right"  # the first of equals
    assert choose([-1, -1], answer=1) == "wrong"
    assert choose([-1, float("nan")]) == choose([-1, float("-inf")]) == "ill-formed"
    assert choose([-9, -9, -1], answer=[0, "c"]) == "right"


def test_lengths() -> None:
    # 2 and 3 characters, 2 and 6 bytes; 1 and 2 tokens
    assert choose([-2.0, -3.3], {"normalize": "characters"}) == "right"
    assert choose([-2.0, -3.3], {"normalize": "bytes"}) == "wrong"
    assert choose([-2.0, -3.3], {"normalize": "tokens"}) == "wrong"
    assert choose([-2.0, -2.7], {"normalize": "characters"}) == "wrong"
    # the prefix is a part of the choice, but not of its length
    assert choose([-2.0, -2.9], {"normalize": "characters", "prefix": " " * 50}) == "wrong"


def test_naming_a_choice() -> None:
    texts = ["B", "A", "x"]
    for answer, place in (("A", 1), ("B", 0), ("C", 2), (1, 1), ("x", 2), (["C", 0], 0)):
        logprobs = [-5.0, -5.0, -5.0]
        logprobs[place] = -1.0
        assert choose(logprobs, choices=texts, answer=answer) == "right", answer


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(
        tiny_f32_path, n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, type_k=F32, type_v=F32
    )
    yield model
    model.close()


def logprob(llama: SteeredLlama, tokens: list[int], first: int) -> float:
    """Of the tokens from index `first` on, from llama_cpp's own logits."""
    llama.reset()
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)], dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logprobs[i - 1, tokens[i]] for i in range(first, len(tokens))))


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("raw", "prompt", "options", "texts", "merges"),
    [
        (False, "Which number comes after three?", {}, ["4", "four", "5", "fourteen, fifteen"], False),
        (True, "Please count down starting at", {"prefix": " "}, ["six", "sixteen until fourteen."], False),
        # "six" + "teen" is one token of its own: all choices begin with that place
        (True, "Please count down starting at six", {}, ["teen until fourteen.", "ty", " until four."], True),
    ],
)
def test_log_probabilities_are_the_models(
    llama: SteeredLlama,
    tmp_path: Path,
    raw: bool,
    prompt: str,
    options: dict[str, Any],
    texts: list[str],
    merges: bool,
) -> None:
    one = PromptItem("q", prompt, extra={"choices": texts, "answer": 0})
    task, scorer = Task("t", (one,), "choice", options, raw=raw), make_scorer("choice", options)
    settings = EvaluatorSettings(n_parallel=2, context={"n_threads": 1, "type_k": F32, "type_v": F32})
    with (
        AnswerFile(tmp_path / "records.jsonl") as file,
        Evaluator(llama, task, scorer, settings=settings, kept=file) as evaluator,
    ):
        answer = evaluator.measure([None])[0].answers[0]
        kept = [record for record in file.records() if "choices" in record]
    renderer = Renderer(llama._model)
    before = prompt if raw else renderer.chat_text([{"role": "user", "content": prompt}])
    head = renderer.tokenize(before, add_special=raw)
    tokens = [renderer.tokenize(before + text, add_special=raw) for text in scorer.choices(one)]
    first = len(head) - merges
    assert all(part[:first] == head[:first] for part in tokens)
    assert any(part[: len(head)] != head for part in tokens) == merges
    assert [(text, n) for text, _, n in kept[0]["choices"]] == [
        (text, len(part) - first) for text, part in zip(scorer.choices(one), tokens, strict=True)
    ]
    expected = [logprob(llama, part, first) for part in tokens]
    allowance = rounding.logprobs(llama.scores[: len(tokens[-1])], **rounding.TINY)
    for (_, value, n), wanted in zip(kept[0]["choices"], expected, strict=True):
        assert value == pytest.approx(wanted, rel=0, abs=n * allowance)
    assert answer.text == scorer.choices(one)[int(np.argmax(expected))]
    assert answer.value == (np.argmax(expected) == 0)
