"""Steerings that are measured in windows of the text: `EvaluatorSettings.placement`, plans, and --where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import BiasFile, ExpertMap, UsageError
from steermoe_local.cli import main
from steermoe_local.evaluation.measuring.evaluator import Evaluator
from steermoe_local.evaluation.measuring.measurements import Answer
from steermoe_local.evaluation.measuring.plans import open_placement, open_plan
from steermoe_local.evaluation.reports.evaluation import tables
from steermoe_local.evaluation.studies.evaluate import evaluate
from steermoe_local.evaluation.tasks.neutral_text import NeutralText, score_text
from steermoe_local.evaluation.tasks.tasks import Choice, Score, Scorer, Task
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.prompts import PromptItem
from steermoe_local.steering.bias_plan import BiasPlan
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.plan_text import parse_where
from steermoe_local.steering.steering import Steering
from tests.support.evaluators import SETTINGS, texts

STEERING = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)


class TwoChoices(Scorer):
    """Scores by the log-probabilities of an item's two answers."""

    kind: Any = "choices"

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        return str(item.extra["positive"]), str(item.extra["negative"])

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        return Score(float(choices[0].logprob > choices[1].logprob), "positive")


def at(where: str) -> SteeringPlan:
    return open_placement(parse_where(where))


def test_a_placement_is_the_plan(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None], neutral: NeutralText
) -> None:
    """What is measured under a placement is what the plan itself gives, and another thing than without it."""
    placed = open_evaluator(neutral=neutral, settings=replace(SETTINGS, placement=at("prompt")))
    under = placed.measure(biases)
    plain = open_evaluator(neutral=neutral)
    plans = [None if bias is None else at("prompt").placed(bias) for bias in biases]
    assert all(isinstance(plan, BiasPlan) for plan in plans[1:])
    for mine, plan in zip(under, plain.measure(plans), strict=True):
        assert (texts(mine), mine.text, mine.key) == (texts(plan), plan.text, plan.key)
    everywhere = plain.measure(biases)
    assert [found.bias for found in under] == biases, "the bias that was asked for"
    for mine, whole in zip(under[1:], everywhere[1:], strict=True):
        assert mine.text is not None
        assert whole.text is not None
        assert mine.text != whole.text
        assert mine.text.kl > 0, "the answer sees the steered prompt"
    assert under[0].key == everywhere[0].key
    assert {found.key for found in under[1:]}.isdisjoint(found.key for found in everywhere[1:])


def test_windows_that_cover_all_tokens_are_the_bias(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None], neutral: NeutralText
) -> None:
    """Prompt and answer under one bias each, and the bias alone, give the same answers and the same text."""
    whole = open_plan(["prompt: digits-words", "thinking: digits-words", "answer: digits-words"])
    assert whole.single is not None
    evaluator = open_evaluator(neutral=neutral)
    first, second = evaluator.measure([whole.placed(biases[1]), biases[1]])
    assert (texts(first), first.text) == (texts(second), second.text)


def test_the_text_is_an_answer(open_evaluator: Callable[..., Evaluator]) -> None:
    """Steering a window of the answer changes the predictions of its tokens, and of those that see them."""
    text = NeutralText(
        "text", ((None, "The colour of the old house is red, and the new one is white. It is by the sea."),)
    )
    evaluator = open_evaluator(neutral=text)
    (document,) = text.documents(evaluator.renderer, evaluator.engine.n_ctx, 24)
    bias = STEERING.build()
    first, later = (at(where).placed(bias) for where in ("answer[0:1]", "answer[6:]"))
    logits = {
        start + i: rows[:, i]
        for start, rows in evaluator.engine.logits(
            [None, first, later], document.tokens, document.first, n_prompt=document.first + 1
        )
        for i in range(rows.shape[1])
    }
    rows = [logits[document.first + i] for i in range(8)]
    assert (rows[0][0] != rows[0][1]).any(), "the row that draws the answer's first token"
    for row in rows[:6]:
        np.testing.assert_array_equal(row[0], row[2])
    assert (rows[6][0] != rows[6][2]).any()
    unsteered, steered = score_text(evaluator.engine, [None, later], [document])
    assert (unsteered.kl, steered.kl > 0) == (0, True)


def test_choices_are_replies(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None], task: Task
) -> None:
    """The texts of choices are of the answer, and their prompts are not."""

    def logprobs(plan: Any) -> list[float]:
        evaluator = open_evaluator(scorer=TwoChoices())
        evaluator.measure([plan])
        return [logprob for record in evaluator._records.values() for _, logprob, _ in record["choices"]]

    unsteered, whole = logprobs(None), logprobs(biases[1])
    answer, prompt = logprobs(at("answer").placed(biases[1])), logprobs(at("prompt").placed(biases[1]))
    assert len({tuple(found) for found in (unsteered, whole, answer, prompt)}) == 4
    assert logprobs(at("answer[99:]").placed(biases[1])) == unsteered


def test_another_placement_is_not_resumed(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None], tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    with AnswerFile(records) as kept:
        evaluator = open_evaluator(kept=kept, settings=replace(SETTINGS, placement=at("answer")))
        evaluator.measure([biases[1]])
    for placement in (None, at("prompt")):
        with AnswerFile(records) as kept, pytest.raises(UsageError, match="placement"):
            open_evaluator(kept=kept, resume=True, settings=replace(SETTINGS, placement=placement))


def test_a_plan_of_several_choices_is_measured_as_a_whole(open_evaluator: Callable[..., Evaluator]) -> None:
    plan = open_plan(["prompt: digits-words +2 -2", "answer: digits-words +2 -2 reverse"])
    assert plan.single is None
    evaluation = evaluate(open_evaluator(), plan)
    assert [side.name for side in evaluation.sides] == ["unsteered", "steered"]
    assert (evaluation.controls, list(evaluation.effects)) == ((), ["steered"])
    assert [rule["text"] for rule in evaluation.steering["rules"]] == plan.texts
    nothing = open_plan(["answer: none"])
    with pytest.raises(UsageError, match="no rule"):
        evaluate(open_evaluator(), nothing)


def test_commands(tmp_path: Path) -> None:
    """`eval` and `sweep` measure where they are told to, and say so; commands that measure one choice take one."""
    common = ("-m", "tiny", "-n", "8", "-t", "1", "--neutral", "none", "--benign", "none")
    out = tmp_path / "eval"
    words = ("--steer", "answer[0:2]: digits-words", "--no-controls", "--no-away", "-o", str(out))
    assert CliRunner().invoke(main, ["eval", *common, *words]).exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["provenance"]["settings"]["placement"] == ["answer[0:2]: steered"]
    assert "`answer[0:2]: steered`" in (out / "report.md").read_text()
    out = tmp_path / "sweep"
    grid = ("--map", "digits-words", "--activate", "2", "--deactivate", "2", "--where", "prompt[-4:]", "-o", str(out))
    assert CliRunner().invoke(main, ["sweep", *common[:-4], *grid]).exit_code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["about"]["settings"]["placement"] == ["prompt[-4:]: steered"]
    two = ("--steer", "prompt: digits-words", "--steer", "answer: digits-words +1 -1")
    done = CliRunner().invoke(main, ["experiment", "random10", *common[:4], *two, "-o", str(tmp_path / "no")])
    assert done.exit_code == 2
    assert "2 choices of experts" in done.stderr
    assert not (tmp_path / "no").exists()


def test_another_map_of_a_condition_is_another_placement() -> None:
    """Its name is the same; what it looks at is not."""
    assert STEERING.expert_map is not None
    maps = [ExpertMap(STEERING.expert_map.identity, "m", scale * STEERING.expert_map.rd) for scale in (1, -1)]
    found = []
    for looks_at in maps:

        def opened(name: str, looks_at: ExpertMap = looks_at) -> tuple[ExpertMap, None]:
            return looks_at, None

        plan = SteeringPlan.open(["answer when m < 0.1 over prompt: m"], lambda name, choice: STEERING, opened)
        found.append(replace(SETTINGS, placement=plan).to_dict())
    assert found[0]["placement"] == found[1]["placement"]
    assert found[0] != found[1]


@pytest.mark.parametrize(("bound", "share"), [("> 1000", 0.0), ("< 1000", 1.0)], ids=["never", "always"])
def test_steered_answers_of_a_condition(
    open_evaluator: Callable[..., Evaluator], tmp_path: Path, bound: str, share: float
) -> None:
    """`eval` says in which share of the answers a condition held, for the plan and for the choice that it places."""
    placement = open_plan([f"answer when digits-words {bound} over prompt: digits-words +2 -2"])
    two = open_plan([*placement.texts, f"thinking when entropy {bound}: digits-words +2 -2 reverse"])
    records = tmp_path / "records.jsonl"
    with AnswerFile(records) as kept:
        evaluator = open_evaluator(kept=kept, settings=replace(SETTINGS, placement=placement))
        found = evaluate(evaluator, STEERING, controls=None)
        whole = evaluate(evaluator, two)
        evaluator.finish()
    assert [(side.name, side.steered) for side in found.sides] == [
        ("unsteered", None),
        ("towards", share),
        ("away", share),
    ]
    assert [side.steered for side in whole.sides] == [None, share]
    assert found.to_dict()["sides"][1]["steered"] == share
    (table,) = [table for table in tables(found) if table.title == "Steered answers"]
    assert [row[:2] for row in table.rows] == [("towards", f"{share:.0%}"), ("away", f"{share:.0%}")]
    lines = [json.loads(line) for line in records.read_text("utf-8").splitlines()]
    assert {line["n_steered"] == share * line["n_tokens"] for line in lines if line["bias"] != "unsteered"} == {True}
    assert all("n_steered" not in line for line in lines if line["bias"] == "unsteered")


def test_steered_choices_of_a_condition(open_evaluator: Callable[..., Evaluator]) -> None:
    for bound, share in (("> 1000", 0.0), ("< 1000", 1.0)):
        placement = open_plan([f"answer when digits-words {bound} over prompt: digits-words +2 -2"])
        evaluator = open_evaluator(scorer=TwoChoices(), settings=replace(SETTINGS, placement=placement))
        _, measured = evaluator.measure([None, STEERING.build()])
        assert measured.steered == share
        for record in evaluator._records.values():
            n_tokens = sum(n for *_, n in record["choices"])
            assert record.get("n_steered", 0) == (share * n_tokens if record["bias"] == measured.key else 0)


def test_without_conditions_nothing_is_said_of_them(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None]
) -> None:
    evaluator = open_evaluator(settings=replace(SETTINGS, placement=at("answer[0:2]")))
    found = evaluate(evaluator, STEERING, controls=None)
    assert {side.steered for side in found.sides} == {None}
    assert "Steered answers" not in [table.title for table in tables(found)]
    steered = [answer.n_steered for answer in found.measurements[1].answers]
    assert set(steered) <= {1, 2}, "of the first two tokens"
    (unsteered,) = evaluator.measure([None])
    assert {answer.n_steered for answer in unsteered.answers} == {None}


def test_a_record_of_an_earlier_version(open_evaluator: Callable[..., Evaluator]) -> None:
    """It says nothing of steered tokens, so nothing is said of a share that it is a part of."""
    placement = open_plan(["answer when entropy > 1000: digits-words +2 -2"])
    evaluator = open_evaluator(settings=replace(SETTINGS, placement=placement))
    (measured,) = evaluator.measure([STEERING.build()])
    assert measured.steered == 0
    first = next(iter(evaluator._records.values()))
    del first["n_steered"]
    answer = Answer.from_record(first)
    assert (answer.n_steered, answer.text) == (None, measured.answers[0].text)
    (again,) = evaluator.measure([STEERING.build()])
    assert again.steered is None
