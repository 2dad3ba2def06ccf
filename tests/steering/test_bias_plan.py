"""Biases and where each is in force: the simplest form of a plan, and keys that say what it does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.llama.plan_state import PlanState
from steermoe_local.maps.routing_lean import RoutingLean
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import BiasPlan, BiasRule, simplest
from steermoe_local.steering.plan_rules import Condition, Where
from steermoe_local.steering.plan_text import parse_rule
from tests.support.builders import identity
from tests.support.plans import places


def bias(expert: int, sign: int = 1) -> BiasFile:
    signs = np.zeros((3, 4), np.int8)
    signs[1, expert] = sign
    return BiasFile.from_signs(signs, identity())


A, B, SAME_AS_A = bias(0), bias(1), bias(0)
EMPTY = BiasFile.from_signs(np.zeros((3, 4)), identity())
LEAN, OTHER = RoutingLean(np.eye(3, 4)), RoutingLean(np.eye(3, 4) / 2)
ALL, ANSWER, THINKING = Where(), Where("answer"), Where("thinking")


def when(where: str) -> Where:
    return parse_rule(f"{where}: x").where


def rule(where: Where | str, steers: BiasFile | None, lean: RoutingLean | None = None) -> BiasRule:
    return BiasRule(when(where) if isinstance(where, str) else where, steers, lean)


def test_a_plan_that_never_steers_is_none() -> None:
    for rules in (
        [rule(ALL, None)],
        [rule(ANSWER, EMPTY), rule(THINKING, None)],
        [rule(ALL, None), rule(ANSWER, A)],
        [rule(ANSWER, None), rule(ANSWER, A)],
        [rule(ANSWER, None), rule("answer[0:3] every 2", A)],
        [rule("answer[0:3]", None), rule("answer[0:3] when entropy < 1", A)],
        [rule("answer when f < 1 over prompt", None, LEAN), rule("answer when g by effect < 1 over prompt", A, LEAN)],
    ):
        assert simplest(rules) is None


def test_one_bias_for_all_tokens_is_no_plan() -> None:
    for rules in (
        [rule(ALL, A)],
        [rule(ALL, A), rule(ANSWER, B)],
        [rule(ALL, A), rule(ALL, B)],
        [rule(ALL, A), rule(THINKING, None)],
    ):
        assert simplest(rules) is A


def test_what_is_kept() -> None:
    made = simplest(
        [rule(THINKING, EMPTY), rule(ANSWER, A), rule(ANSWER, B), rule(ALL, SAME_AS_A), rule("prompt", None)]
    )
    assert isinstance(made, BiasPlan)
    assert [kept.where for kept in made.rules] == [THINKING, ANSWER, ANSWER, ALL], "indices are those of the rules"
    assert [kept.bias for kept in made.rules] == [None, A, None, SAME_AS_A]
    assert [found.key for found in made.biases] == [A.key]
    assert (made.n_active, made.n_inactive) == (1, 0)
    assert made.identity == identity()
    assert not made.needs_routing


def test_hidden_rules_need_nothing() -> None:
    """Nobody looks at the condition of a rule that another one hides: no recorder is needed for it."""
    hidden = [rule("answer when f < 1 over prompt", B, LEAN), rule("answer when entropy > 1", B)]
    made = simplest([rule(ANSWER, A), *hidden, rule("prompt[-2:]", A)])
    assert isinstance(made, BiasPlan)
    assert not made.needs_routing
    state = PlanState(made, None, lambda token: b"x")
    assert not any((state.needs_logits, state.needs_prompt_routing, state.needs_reply_routing))
    assert len(made.rules) == 4, "indices are those of the rules"


@pytest.mark.parametrize(
    ("text", "lean", "needs"),
    [
        ("answer when entropy < 1", None, (True, False, False)),
        ("answer when f < 1 over prompt", LEAN, (False, True, False)),
        ("answer when f < 1 over last 3", LEAN, (False, False, True)),
    ],
)
def test_needs(text: str, lean: RoutingLean | None, needs: tuple[bool, bool, bool]) -> None:
    made = simplest([rule(text, A, lean)])
    assert isinstance(made, BiasPlan)
    state = PlanState(made, None, lambda token: b"x")
    assert (state.needs_logits, state.needs_prompt_routing, state.needs_reply_routing) == needs
    assert made.needs_routing == any(needs[1:])


def key(*rules: BiasRule) -> str | None:
    made = simplest(rules)
    return None if made is None else made.key


def test_equal_keys() -> None:
    """What maps are called, how a bias was made and how a number is written is not what a plan does."""
    condition = "answer when f < 1 over prompt"
    assert key(rule(condition, A, LEAN)) == key(
        rule("answer when g < 1.0 over prompt", SAME_AS_A, RoutingLean(np.eye(3, 4)))
    )
    by_effect = rule("answer when f by effect < 1 over prompt", A, LEAN)
    assert key(by_effect) == key(rule(condition, A, LEAN)), "the scores are compared, not their names"
    assert key(rule(ANSWER, A)) == key(rule("answer[0:]", replace(A, provenance={"tool": "x"})))
    below = [Condition("margin", below=limit) for limit in (0, 0.0, -0.0)]
    assert len({key(rule(Where("answer", when=found), A)) for found in below}) == 1
    assert key(rule(ALL, A)) == A.key
    assert key(rule(ANSWER, A), rule(ANSWER, B)) == key(rule(ANSWER, A))


def test_other_keys() -> None:
    condition = rule("answer when f < 1 over prompt", A, LEAN)
    others = [
        condition,
        rule("answer when f < 1 over prompt", A, OTHER),
        rule("answer when f < 1 over prompt", B, LEAN),
        rule("answer when f > 1 over prompt", A, LEAN),
        rule("answer when f < 2 over prompt", A, LEAN),
        rule("answer when f < 1 over last 3", A, LEAN),
        rule("thinking when f < 1 over prompt", A, LEAN),
        rule("answer when entropy < 1", A),
        rule("answer when margin < 1", A),
        rule(ANSWER, A),
        rule("answer[1:]", A),
        rule("answer[:1]", A),
        rule("answer every 2", A),
        rule("answer after x", A),
        rule("answer until x", A),
        rule("answer after #7", A),
        rule("answer after '#7'", A),
        rule("prompt", A),
        rule(ALL, A),
    ]
    plans = [[other] for other in others]
    plans += [[rule(ANSWER, A), rule(ALL, B)], [rule(ANSWER, B), rule(ALL, A)], [rule(THINKING, None), rule(ALL, A)]]
    assert len({key(*rules) for rules in plans}) == len(plans)


BIASES = st.sampled_from([None, EMPTY, A, B, SAME_AS_A])
UNCONDITIONAL = places(small=True).map(lambda where: replace(where, when=None))
TOKENS = ["a", "b", "#", "<think>", "</think>", "\n"]


@given(
    st.lists(
        st.builds(BiasRule, st.one_of(st.just(ALL), st.just(ANSWER), UNCONDITIONAL), BIASES), min_size=1, max_size=6
    ),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), max_size=20),
)
def test_the_simplest_plan_steers_alike(rules: list[BiasRule], prompt: list[int], reply: list[int]) -> None:
    from steermoe_local.llama.reasoning_styles import reasoning_style

    def steered(plan: object) -> list[str | None]:
        state = PlanState(plan, reasoning_style("<think></think>"), lambda token: TOKENS[token].encode())  # type: ignore[arg-type]
        decisions = [*state.prompt(prompt), state.first(), *(state.reply(token)[1] for token in reply)]
        keys = [decision.bias.key if decision.bias is not None else None for decision in decisions]
        if isinstance(plan, BiasPlan):
            for decision in decisions:
                assert decision.rule is None or plan.rules[decision.rule].bias is decision.bias
        return [None if found == EMPTY.key else found for found in keys]

    assert steered(simplest(rules)) == steered(BiasPlan(tuple(rules)))
