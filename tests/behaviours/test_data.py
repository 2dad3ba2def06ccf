"""The behaviours that ship: what their files hold, that the generator writes them, and their scorers' error rates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import steermoe_local
from steermoe_local.behaviours import BuiltinBehaviour, behaviour, behaviours, neutral_questions
from steermoe_local.errors import UsageError
from steermoe_local.evaluation.tasks.builtin import builtin_task, side_of
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.models import embedded
from steermoe_local.pairs.pairs import Pair
from steermoe_local.pairs.prompts import PromptItem
from tests.support import chat_templates
from tests.support.paths import ROOT

GENERAL = [one for one in behaviours() if not one.model]
MAKE = ROOT / "examples" / "behaviours" / "make.py"

NUMBER = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|[0-9]+"
)

each = pytest.mark.parametrize("one", GENERAL, ids=lambda one: one.name)
every = pytest.mark.parametrize("one", behaviours(), ids=lambda one: one.name)


def prompt(pair: Pair) -> str:
    """The one user's message of a pair, the same on both sides."""
    assert not isinstance(pair.positive, str)
    assert not isinstance(pair.negative, str)
    user, answer = pair.positive
    assert (user.role, answer.role) == ("user", "assistant")
    assert pair.negative[0] == user
    return user.content


def core(text: str) -> str:
    """A prompt without the request for a short answer, in small letters."""
    return text.lower().removesuffix(" answer in one or two sentences.").strip()


def item_of(one: BuiltinBehaviour, pair: Pair) -> PromptItem:
    """The pair's prompt as an item that the behaviour's scorer takes."""
    extra = dict(zip(("answer", "negative"), difference(pair), strict=True)) if one.name == "document" else {}
    return PromptItem(pair.id, prompt(pair), extra=extra)


def difference(pair: Pair) -> tuple[str, str]:
    """What differs between two answers that are one sentence but for some words."""
    one, two = (target.replace('"', "").rstrip(".").split() for target in (pair.positive_target, pair.negative_target))
    while one and two and one[0] == two[0]:
        one, two = one[1:], two[1:]
    while one and two and one[-1] == two[-1]:
        one, two = one[:-1], two[:-1]
    return " ".join(one), " ".join(two)


#
# what there is
#


def test_what_ships() -> None:
    assert [one.name for one in GENERAL] == [
        "concise", "formal", "digits", "json", "german", "step-by-step", "hedged", "document", "in-role",
    ]  # fmt: skip
    planted = [one for one in behaviours() if one.model]
    assert [one.name for one in planted] == [one.name for one in embedded.behaviours()]
    assert {one.model for one in planted} == {embedded.TINY}
    assert [one.name for one in behaviours() if one.one_way] == ["refuse-comply"]


def test_by_name() -> None:
    assert behaviour("formal").negative == "casual"
    for name, words in (("formel", "did you mean formal"), ("xyzzy", "steermoe behaviours")):
        with pytest.raises(UsageError, match=words):
            behaviour(name)


@every
def test_facts(one: BuiltinBehaviour) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", one.name)
    assert one.positive != one.negative
    assert one.like != one.unlike
    assert one.about.endswith(".")
    assert one.folder.is_dir()
    task = builtin_task(one.name)
    scorer = make_scorer(task.scorer, task.options)
    assert (task.positive, task.negative, task.max_tokens) == (one.positive, one.negative, one.max_tokens)
    for item in task.items:
        scorer.check(item)
    assert json.loads(json.dumps(one.to_dict()))["name"] == one.name


def test_instructions_of_the_embedded_model_are_those_that_it_was_trained_on() -> None:
    text = (ROOT / "examples" / "tiny_moe" / "lexicon.py").read_text("utf-8")
    for one in behaviours():
        if one.model:
            assert f'"{one.like}"' in text
            assert f'"{one.unlike}"' in text


def test_the_files_are_small() -> None:
    folder = ROOT / "steermoe_local" / "behaviours"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".pyc") < 1_500_000


def test_the_generator_writes_these_files() -> None:
    done = subprocess.run(
        [sys.executable, str(MAKE), "--check"],
        env=os.environ | {"PYTHONPATH": str(Path(steermoe_local.__file__).parent.parent)},  # the package that is tested
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run python examples/behaviours/make.py: {done.stdout}{done.stderr}"


#
# pairs and held-out prompts
#


@each
def test_pairs(one: BuiltinBehaviour) -> None:
    pairs = one.pairs()
    assert 110 <= len(pairs) <= 130
    assert all(count == 1 for count in Counter(core(prompt(pair)) for pair in pairs).values())
    for pair in pairs:
        assert pair.margin_problem() is None
        for target in (pair.positive_target, pair.negative_target):
            assert 0 < len(target) <= 400
            assert target == target.strip()
            assert "{" not in target or one.name == "json"
    # varied answers
    for targets in ([p.positive_target for p in pairs], [p.negative_target for p in pairs]):
        assert len(set(targets)) >= 0.4 * len(pairs)
        assert Counter(targets).most_common(1)[0][1] <= 6


@each
def test_both_answers_of_a_pair_are_on_their_side_by_the_scorer(one: BuiltinBehaviour) -> None:
    scorer = make_scorer(one.scorer, one.options)
    for pair in one.pairs():
        item = item_of(one, pair)
        assert side_of(scorer.score(item, pair.positive_target)) == "positive", pair.positive_target
        assert side_of(scorer.score(item, pair.negative_target)) == "negative", pair.negative_target


@each
def test_held_out_prompts(one: BuiltinBehaviour) -> None:
    items = one.heldout()
    assert 95 <= len(items) <= 110
    texts = [core(str(item.content)) for item in items]
    assert len(set(texts)) == len(texts)
    assert not {*texts} & {core(prompt(pair)) for pair in one.pairs()}
    assert not {*texts} & {core(question) for question in neutral_questions()}


@each
def test_held_out_prompts_are_not_those_of_the_pairs_with_other_numbers(one: BuiltinBehaviour) -> None:
    """A map could otherwise learn the sentences that it is judged by."""

    def masked(text: str) -> str:
        return re.sub(rf"\b(?:{NUMBER})(?:-(?:{NUMBER}))*\b", "#", core(text))

    asked = {masked(prompt(pair)) for pair in one.pairs()}
    assert asked.isdisjoint(masked(str(item.content)) for item in one.heldout())


def test_held_out_questions_for_records_are_worded_differently() -> None:
    """Each kind of record has questions of the pairs and others of the held-out prompts."""
    for line in (ROOT / "examples" / "behaviours" / "material" / "records.txt").read_text("utf-8").splitlines():
        if line.startswith("@ "):
            wordings = line[2:].split(" | ")[:4]
            assert all("{0}" in wording for wording in wordings)
            assert len({*wordings}) == 4


def test_held_out_subjects_are_none_of_the_pairs() -> None:
    def texts(name: str) -> str:
        return "\n".join(str(item.content) for item in behaviour(name).heldout())

    for pair in behaviour("in-role").pairs():
        found = re.search(r"(?:You are|role of|that you are|^)\s?([A-Z][\w. ]+?)(?:,| is )", prompt(pair))
        assert found
        assert found[1] not in texts("in-role")
    for pair in behaviour("json").pairs():
        data = json.loads(re.sub(r"^```json\n|\n```$", "", pair.positive_target))
        subject = str(next(iter(data.values())))
        assert not re.search(rf"\b{re.escape(subject)}\b(?! (?:on|of|in))", texts("json")), subject
    told = [item.extra["answer"] for item in behaviour("document").heldout()]
    assert all(isinstance(one, list) for one in told)
    questions = {str(item.content).rsplit("Question:", 1)[-1].strip() for item in behaviour("document").heldout()}
    for pair in behaviour("document").pairs():
        assert prompt(pair).rsplit("Question:", 1)[-1].strip() not in questions


def test_a_document_says_something_else_than_memory() -> None:
    for item in behaviour("document").heldout():
        told, known = ({text.lower() for text in item.extra[name]} for name in ("answer", "negative"))
        assert not told & known
        assert any(text in str(item.content).lower() for text in told)
        assert not any(re.search(rf"\b{re.escape(text)}\b", str(item.content).lower()) for text in known), item


def test_neutral_questions() -> None:
    questions = neutral_questions()
    assert len(questions) >= 240
    assert len({core(question) for question in questions}) == len(questions)
    assert all(question.endswith("?") and 8 <= len(question) <= 90 for question in questions)
    # of many kinds
    first = Counter(" ".join(question.split()[:3]) for question in questions)
    assert first.most_common(1)[0][1] <= 0.4 * len(questions)


@pytest.mark.parametrize(
    "name", ["Qwen-Qwen3-0.6B", "mistralai-Mistral-Nemo-Instruct-2407", "ibm-granite-granite-3.3-2B-Instruct"]
)
def test_pairs_come_through_real_templates(name: str) -> None:
    for one in GENERAL:
        for pair in one.pairs():
            for side, target in pair.sides():
                assert not isinstance(side, str)
                text = chat_templates.render(name, [message.to_dict() for message in side], answer=False)
                assert prompt(pair) in text
                assert target in text.split(prompt(pair), 1)[1]


#
# labelled answers
#


@every
def test_the_error_rate_on_labelled_answers_is_the_stored_one(one: BuiltinBehaviour) -> None:
    scorer = make_scorer(one.scorer, one.options)
    rows = one.labelled()
    wrong = [row for row in rows if side_of(scorer.score(row, row.extra["reply"])) != row.extra["label"]]
    assert one.n_labelled == len(rows) >= 60
    assert round(len(wrong) / len(rows), 4) == one.error_rate <= 0.1
    assert sum(row.extra.get("split") == "test" for row in rows) == one.n_test
    assert sum(row.extra.get("split") == "test" for row in wrong) == one.n_test_errors
    labels = Counter(row.extra["label"] for row in rows)
    assert min(labels["positive"], labels["negative"]) >= 25
    assert bool(one.model) or labels["ill-formed"] >= 10
    assert len({(row.content, row.extra["reply"]) for row in rows}) == len(rows)


@each
def test_nothing_is_ill_formed(one: BuiltinBehaviour) -> None:
    scorer = make_scorer(one.scorer, one.options)
    item = one.heldout()[0]
    for text in ("", " \n", "...", "\0"):
        assert side_of(scorer.score(item, text)) == "ill-formed"
