"""Chats under plans: what a change computes again, comparisons, reports of the routing, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, ModelMismatchError, UsageError
from steermoe_local.generation.chat import Chat
from steermoe_local.generation.engine import Engine, FinishEvent
from steermoe_local.steering.bias_plan import BiasPlan
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.steering import Steering
from tests.support.chats import (
    COUNT,
    DIGITS,
    FOREIGN,
    MAP,
    MAPS,
    QUESTIONS,
    TO_DIGITS,
    TO_WORDS,
    WORDS,
    fresh,
    routing,
    say,
)
from tests.support.generation import GREEDY

pytestmark = pytest.mark.numeric


def open_plan(*rules: str, name: str = "plan") -> SteeringPlan:
    """A plan whose names are of the maps of the embedded model."""

    def steering(map_name: str, choice: Mapping[str, Any]) -> Steering:
        if map_name == "foreign":
            return Steering("foreign", FOREIGN, activate=2)
        return Steering.open(map_file=MAPS / f"{map_name}.json", **choice)

    return SteeringPlan.open(
        list(rules), steering, lambda one: (ExpertMap.load(MAPS / f"{one}.json"), MAPS / f"{one}.json"), name=name
    )


WORDS_IN_ANSWERS = open_plan("answer: digits-words +8 -8 reverse")
DIGITS_IN_ANSWERS = open_plan("answer: digits-words +8 -8")
BUT_THE_FIRST = open_plan("answer[1:]: digits-words +8 -8 reverse")


def test_a_plan_decides(new: Any) -> None:
    """The answer alone is steered, and that is enough for these."""
    for plan, expected in ((WORDS_IN_ANSWERS, WORDS), (DIGITS_IN_ANSWERS, DIGITS)):
        chat = new(plan)
        assert chat.steered
        assert chat.steering is plan
        assert say(chat, COUNT)[0] == expected
        chat.close()


def test_a_change_forgets_answers_alone(new: Any) -> None:
    chat = new()
    say(chat, QUESTIONS[0])
    held = chat.n_tokens
    assert chat.steer(BUT_THE_FIRST) == 0, "the unsteered conversation is a prompt now, and stays unsteered"
    assert chat.n_tokens == held
    _, second = say(chat, COUNT)
    assert second.n_cached == held
    assert second.n_steered == second.n_generated - 1 > 3
    held = chat.n_tokens
    assert chat.steer(WORDS_IN_ANSWERS) == held - second.n_prompt > 3, "what was steered as an answer"
    transcript = [dict(message) for message in chat.messages]
    found, third = say(chat, QUESTIONS[1])
    assert third.n_cached == second.n_prompt
    assert (found, routing(third).tolist()) == _as_fresh(new, transcript, WORDS_IN_ANSWERS, QUESTIONS[1])
    held = chat.n_tokens
    assert chat.switch(False) == held - chat.n_tokens > 1
    assert chat.n_tokens == third.n_prompt - 1, "the prompt's last row was steered as the answer's first"
    transcript = [dict(message) for message in chat.messages]
    found, fourth = say(chat, QUESTIONS[0])
    assert fourth.n_cached == third.n_prompt - 1
    assert (found, routing(fourth).tolist()) == _as_fresh(new, transcript, None, QUESTIONS[0])
    held = chat.n_tokens
    assert chat.steer(TO_WORDS) == held, "a steering of all tokens shares nothing"
    assert chat.steer(BUT_THE_FIRST) == 0, "nothing is left"


def _as_fresh(new: Any, transcript: Any, steering: Any, text: str) -> tuple[str, list[Any]]:
    answer, finish = fresh(new, transcript, steering, text)
    return answer, routing(finish).tolist()


def test_turns_under_a_plan_equal_a_fresh_run(new: Any) -> None:
    """Each turn computes the earlier answer again, as a part of the prompt."""
    chat = new(WORDS_IN_ANSWERS)
    previous: FinishEvent | None = None
    for question in QUESTIONS:
        transcript = [dict(message) for message in chat.messages]
        found, finish = say(chat, question)
        assert (found, routing(finish).tolist()) == _as_fresh(new, transcript, WORDS_IN_ANSWERS, question)
        assert finish.n_cached == (0 if previous is None else previous.n_prompt - 1)
        previous = finish


def test_compare(new: Any) -> None:
    chat = new(WORDS_IN_ANSWERS)
    ends = {side: item for side, item in chat.compare(COUNT) if isinstance(item, FinishEvent)}
    assert ends["unsteered"].n_steered == 0
    assert ends["steered"].n_steered == ends["steered"].n_generated
    assert chat.messages[-1]["content"] == WORDS
    assert np.array_equal(routing(ends["unsteered"]), routing(fresh(new, [], None, COUNT)[1]))


def test_the_signs_of_what_was_in_force(new: Any) -> None:
    """Promoted and suppressed are the experts of the biases that steered a token; those that turn are neither."""
    chat = new(
        open_plan(
            "answer[0:2]: digits-words +8 -8 reverse",
            "answer[2:]: digits-words +4 -4",
            "thinking: document-memory +8 -8",
        )
    )
    say(chat, COUNT)
    signs = [TO_WORDS.build().signs, TO_DIGITS.changed(activate=4, deactivate=4).build().signs]
    expected = np.sign(signs[0] + signs[1])
    assert (signs[0] * signs[1] < 0).any(), "some turn"
    report = chat.routing()
    for layer in report.layers:
        for use in layer.experts:
            assert use.sign == expected[layer.layer, use.expert]
            assert use.rd is None, "two maps have no RD in common"
    why = chat.why()
    assert why.n_tokens == report.n_tokens
    assert (why.promoted.n_experts, why.suppressed.n_experts) == ((expected > 0).sum(), (expected < 0).sum())
    assert why.changed > 0


def test_why_reads_the_answer_unsteered(new: Any, engine: Engine) -> None:
    """Under a plan for the prompt the answer's tokens are unsteered, and their routing is another all the same."""
    chat = new(open_plan("prompt: digits-words +8 -8 reverse"))
    _, finish = say(chat, COUNT)
    assert finish.n_steered == 0
    why = chat.why()
    assert why.promoted.n_experts == (TO_WORDS.build().signs > 0).sum()
    first = finish.n_prompt - 1
    unsteered = engine.route(chat._answered.tokens, None, first, first + finish.n_rows)
    assert why.changed == sum(np.abs(routing(finish) - unsteered).sum(axis=1) // 2)
    assert chat.routing().mean_rd is not None


def test_nothing_was_in_force(new: Any) -> None:
    chat = new(open_plan("answer[1000:]: digits-words +8 -8"))
    assert chat.steered
    say(chat, QUESTIONS[0])
    assert {use.sign for layer in chat.routing().layers for use in layer.experts} == {0}
    with pytest.raises(UsageError, match="nothing steered"):
        chat.why()


def test_the_routing_of_an_answer_that_was_stopped(new: Any) -> None:
    """It is read again, as it was steered."""
    whole = new(WORDS_IN_ANSWERS)
    say(whole, COUNT)
    chat = new(WORDS_IN_ANSWERS)
    items = chat.ask(COUNT)
    for _ in range(3):
        next(items)
    items.close()
    report = chat.routing()
    n = len(chat._answered.tokens) - chat._answered.n_prompt
    assert report.n_tokens == n
    assert report.promoted == pytest.approx(whole.routing().promoted, abs=0.01), "as the whole answer"
    chat.steer(DIGITS_IN_ANSWERS)
    with pytest.raises(UsageError, match="steering has changed"):
        chat.routing()


def test_files(new: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is saved as the files that it names, found from any folder, and opened again."""
    monkeypatch.chdir(MAPS)

    def here(name: str, choice: Mapping[str, Any]) -> Steering:
        return Steering.open(map_file=f"{name}.json", **choice)

    plan = SteeringPlan.open(
        ["answer when digits-words > -99 over prompt: digits-words +8 -8 reverse", "thinking: none"],
        here,
        lambda name: (ExpertMap.load(f"{name}.json"), Path(f"{name}.json")),
        name="mine",
    )
    chat = new(plan)
    answer, _ = say(chat, COUNT)
    chat.save(tmp_path / "chat.json")
    data = json.loads((tmp_path / "chat.json").read_text())
    assert data["version"] == 3
    assert data["steering"]["rules"][0]["steering"]["map"] == str(MAP)
    assert data["steering"]["rules"][0]["looks_at"]["map"] == str(MAP)
    assert data["steering"]["rules"][0]["map"] == "digits-words", "the name is as it was written"
    monkeypatch.chdir(tmp_path)
    other = new()
    assert other.load(tmp_path / "chat.json") == []
    assert isinstance(other.steering, SteeringPlan)
    assert (other.steering.name, other.steering.texts) == ("mine", plan.texts)
    assert isinstance(other._slot.bias, BiasPlan)
    assert other._slot.bias.key == chat._slot.bias.key
    assert other.messages == chat.messages
    other.reset()
    assert say(other, COUNT)[0] == answer
    data["steering"]["rules"][1]["text"] = "thinking[5:2]: none"
    assert "rules[2]" in other.load(data)[0]
    assert other.steering is None


def test_plans_that_do_not_fit(new: Any, llama: Any) -> None:
    chat = new(BUT_THE_FIRST)
    say(chat, QUESTIONS[0])
    held = chat.n_tokens
    for refused, kind in (
        (open_plan("answer: foreign"), ModelMismatchError),
        (open_plan("answer: digits-words +8 -8 layers=x"), UsageError),
    ):
        with pytest.raises(kind):
            chat.steer(refused)
        assert chat.steering is BUT_THE_FIRST
        assert chat.n_tokens == held
    with Engine(llama, n_ctx=256, n_threads=1, record=False) as engine:
        routed = open_plan("answer when digits-words > 0 over prompt: digits-words +8 -8")
        with pytest.raises(UsageError, match="recorder"):
            Chat(engine, sampling=GREEDY, steering=routed)
        assert engine.n_free == 1
