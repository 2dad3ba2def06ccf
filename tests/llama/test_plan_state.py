"""What steers each row of a text, against a reference that decides each row by reading the whole text again."""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.llama.plan_state import Decision, PlanState, entropy, margin
from steermoe_local.llama.reasoning_styles import ReasoningStyle
from steermoe_local.maps.routing_lean import RoutingLean
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import BiasPlan, BiasRule
from steermoe_local.steering.plan_rules import Condition, Where
from steermoe_local.steering.plan_text import parse_rule
from tests.llama.test_phases import whole_text_phase
from tests.llama.test_reasoning import STYLES
from tests.support.builders import identity

SHAPE, TOP_K, N_VOCAB = (3, 4), 2, 11
LEANS = [RoutingLean(np.random.default_rng(seed).normal(size=SHAPE)) for seed in (1, 2)]


def bias(expert: int) -> BiasFile:
    signs = np.zeros(SHAPE, np.int8)
    signs[1, expert] = 1
    return BiasFile.from_signs(signs, identity())


BIASES = [bias(expert) for expert in range(4)]


@dataclass
class Text:
    """A prompt and a reply as tokens, with what the model computes of them."""

    tokens: list[bytes]
    n_prompt: int
    style: ReasoningStyle | None
    experts: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]  # row i: those that token i is drawn from

    @property
    def ids(self) -> list[int]:
        known = sorted(set(self.tokens))
        return [known.index(token) for token in self.tokens]


def decided(plan: Any, text: Text) -> list[Decision]:
    """The decision of each row by a `PlanState` that is told everything in its time."""
    by_id = dict(zip(text.ids, text.tokens, strict=True))
    state = PlanState(plan, text.style, by_id.__getitem__)
    found = state.prompt(text.ids[: text.n_prompt])
    state.saw_prompt_routing(text.experts[: text.n_prompt - 1])
    found.append(state.first())
    for i in range(text.n_prompt, len(text.tokens)):
        state.saw_reply_routing(text.experts[i - 1 : i])
        state.saw_logits(text.logits[i])
        phase, decision = state.reply(text.ids[i])
        assert phase == read_phases(text)[1][i]
        found.append(decision)
    return found


#
# the reference
#


def read_phases(text: Text) -> tuple[list[str], list[str]]:
    """Text and phase of each token, from the whole text in front of it."""
    ends = [b"".join(text.tokens[: i + 1]).decode("utf-8", "ignore") for i in range(len(text.tokens))]
    texts = [end.removeprefix(start) for start, end in zip(["", *ends], ends, strict=False)]
    phases = ["prompt"] * text.n_prompt
    for i in range(text.n_prompt, len(text.tokens)):
        before = "".join(texts[text.n_prompt : i])
        phase = whole_text_phase(text.style, before + texts[i], len(before), len(before + texts[i]))
        phases.append({"T": "thinking", "A": "answer"}[phase])
    return texts, phases


def upcoming(style: ReasoningStyle | None, before: str) -> str:
    """The phase of what is drawn behind this beginning of a reply: that of a text which is no marker."""
    if style is not None and style.tags is not None and before.strip():
        tags = style.tags
        openings = [mark for mark in (tags.header, tags.opening, tags.closing, tags.answer_opening) if mark]
        rest = (style.prefix + before).lstrip()
        while tags.header and rest.startswith(tags.header):
            rest = rest.removeprefix(tags.header).lstrip()
        if rest and any(mark != rest and mark.startswith(rest) for mark in openings):
            return "thinking"  # it may become a marker
    return {"T": "thinking", "A": "answer"}[whole_text_phase(style, before + "Q", len(before), len(before) + 1)]


def first_with(mark: str | int, texts: list[str], ids: list[int], first: int, offset: int) -> int:
    """The first token from `first` on that completes the mark, looked for from character `offset` on; else the end."""
    for k in range(first, len(ids)):
        if ids[k] == mark if isinstance(mark, int) else mark in "".join(texts[: k + 1])[offset:]:
            return k
    return len(ids)


def tokens_of(where: Where, text: Text, ids: list[int], texts: list[str], phases: list[str]) -> list[int]:
    """Indices of the tokens that a rule's window has, whatever its condition.

    The prompt's last token is not one: what is computed of it is the first token of the reply.
    """
    there = [i for i, phase in enumerate(phases) if where.phase in (None, phase)]
    if where.phase == "prompt":
        there = [i for i in there if i != text.n_prompt - 1]
    own_texts, own_ids = [texts[i] for i in there], [ids[i] for i in there]
    begin, end, offset = 0, len(there), 0
    completing = -1
    if where.after is not None:
        completing = first_with(where.after, own_texts, own_ids, 0, 0)
        begin = completing + 1
        joined = "".join(own_texts[:begin])
        offset = len(joined) if isinstance(where.after, int) else joined.find(where.after) + len(where.after)
    if where.until is not None and begin <= len(there):
        first = begin if isinstance(where.until, int) else max(completing, 0)
        end = first_with(where.until, own_texts, own_ids, first, offset) + 1
    found = [i for i in there[begin:end] if i != text.n_prompt - 1]
    return found[where.start : where.stop : where.every]


def lean_of(lean: RoutingLean, experts: npt.NDArray[np.int32]) -> float:
    scores = [
        math.fsum(lean.scores[layer, expert] for layer, slots in enumerate(token) for expert in slots if expert >= 0)
        for token in experts.tolist()
    ]
    return math.fsum(scores) / len(scores)


def holds(rule: BiasRule, text: Text, i: int) -> bool:
    when = rule.where.when
    if when is None:
        return True
    if when.measure == "routing":
        assert rule.lean is not None
        first = text.n_prompt - 1
        span = text.experts[:first] if when.last is None else text.experts[first : i - 1][-when.last :]
        if len(span) < (when.last or 1):
            return False
        value = lean_of(rule.lean, span)
    elif i == text.n_prompt:
        return False  # the first token of the reply is behind no drawn one
    else:
        i -= 1
        p = np.exp(text.logits[i].astype(np.float64) - np.float64(text.logits[i].max()))
        p = np.sort(p / p.sum())
        value = (
            -sum(float(q) * math.log(q) for q in p if q) if when.measure == "entropy" else float(np.log(p[-1] / p[-2]))
        )
    return value < when.below if when.below is not None else value > (when.above or 0.0)


def reference(plan: BiasPlan, text: Text) -> list[Decision]:
    """Of each row: of a token of the prompt that is read, then of each token that is drawn, the next one included."""
    texts, own = read_phases(text)
    found: list[Decision] = []
    for i in [*range(text.n_prompt - 1), *range(text.n_prompt, len(text.tokens) + 1)]:
        phases, seen, ids = own, texts, text.ids
        if i >= text.n_prompt:  # by what is before it alone; the text of what is drawn does not matter
            phase = upcoming(text.style, "".join(texts[text.n_prompt : i]))
            phases, seen, ids = [*own[:i], phase], [*texts[:i], ""], [*ids[:i], -1]
        for index, rule in enumerate(plan.rules):
            if i in tokens_of(rule.where, text, ids, seen, phases) and holds(rule, text, i):
                found.append(Decision(rule.bias, None if rule.bias is None else index, phases[i]))  # type: ignore[arg-type]
                break
        else:
            found.append(Decision(None, None, phases[i]))  # type: ignore[arg-type]
    return found


#
# random rules on random texts
#

PIECES = ["a", "b", "ab", " ", "\n", "é", "漢", "🙂", "<think>", "</think>", "Answer:", "<", "x" * 9]
CHANNEL_PIECES = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "analysis", "final", "assistant"]
MARKS = st.one_of(st.integers(0, 6), st.sampled_from([*PIECES, "aa", "ba", "k>", "é漢", "</think>\n", "<|channel|>"]))


@st.composite
def texts(draw: st.DrawFn) -> Text:
    name = draw(st.sampled_from(["none", "think", "think, begun", "cohere", "harmony"]))
    pieces = PIECES + (CHANNEL_PIECES if name == "harmony" else [])
    if name == "cohere":
        pieces = [*pieces, "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]
    whole = "".join(draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=24))).encode()
    cuts = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=30)) | {0, len(whole)})
    tokens = [whole[a:b] for a, b in pairwise(cuts)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    experts = np.stack([[rng.permutation(SHAPE[1])[:TOP_K] for _ in range(SHAPE[0])] for _ in tokens])
    logits = rng.normal(size=(len(tokens), N_VOCAB)) * 3
    n_prompt = draw(st.integers(1, len(tokens)))
    return Text(tokens, n_prompt, STYLES[name], experts.astype(np.int32), logits.astype(np.float32))


@st.composite
def rules(draw: st.DrawFn) -> BiasRule:
    phase: Any = draw(st.sampled_from([None, "prompt", "thinking", "answer"]))
    ends = st.integers(-6 if phase == "prompt" else 0, 6)
    start, stop = draw(st.one_of(st.just((0, None)), st.tuples(ends, st.one_of(st.none(), ends))))
    if stop is not None and (stop == 0 or (stop <= start and (stop < 0) == (start < 0))):
        stop = None
    condition = lean = None
    if phase in ("thinking", "answer") and draw(st.booleans()):
        measure: Any = draw(st.sampled_from(["routing", "entropy", "margin"]))
        side, limit = draw(st.sampled_from(["below", "above"])), draw(st.sampled_from([-0.31, 0.173, 0.71, 1.31]))
        last = draw(st.one_of(st.none(), st.integers(1, 4))) if measure == "routing" else None
        condition = Condition(measure, map="f" * (measure == "routing"), last=last, **{side: limit})  # type: ignore[arg-type]
        lean = draw(st.sampled_from(LEANS)) if measure == "routing" else None
    every = draw(st.sampled_from([1, 1, 2, 3]))
    after, until = draw(st.tuples(st.one_of(st.none(), MARKS), st.one_of(st.none(), MARKS)))
    where = Where(phase, start, stop, after, until, every, condition)
    return BiasRule(where, draw(st.sampled_from([None, *BIASES])), lean)


@settings(max_examples=400, deadline=None)
@given(st.lists(rules(), min_size=1, max_size=5), texts())
def test_against_the_reference(plan: list[BiasRule], text: Text) -> None:
    assert decided(BiasPlan(tuple(plan)), text) == reference(BiasPlan(tuple(plan)), text)


@given(st.lists(rules(), min_size=1, max_size=3), texts(), st.data())
def test_what_is_told_at_once_and_bit_by_bit(plan: list[BiasRule], text: Text, data: st.DataObject) -> None:
    """Routing of the reply may be told in pieces of any size; a token decides by what came before it."""
    unconditional = BiasPlan(tuple(BiasRule(replace(rule.where, when=None), rule.bias) for rule in plan))
    by_id = dict(zip(text.ids, text.tokens, strict=True))
    state = PlanState(unconditional, text.style, by_id.__getitem__)
    assert not any((state.needs_logits, state.needs_prompt_routing, state.needs_reply_routing))
    found = [*state.prompt(text.ids[: text.n_prompt]), state.first()]
    found += [state.reply(token)[1] for token in text.ids[text.n_prompt :]]
    assert found == decided(unconditional, text)
    told = [PlanState(BiasPlan(tuple(plan)), text.style, by_id.__getitem__) for _ in range(2)]
    cut = data.draw(st.integers(0, len(text.tokens)))
    for state, cuts in zip(told, ([cut], range(len(text.tokens))), strict=True):
        for start, stop in zip([0, *cuts], [*cuts, len(text.tokens)], strict=True):
            state.saw_reply_routing(text.experts[start:stop])
    assert told[0].reply(text.ids[0]) == told[1].reply(text.ids[0])


#
# single rules
#


def steered(
    *lines: str, prompt: str = "", reply: str = "", style: str = "think", tokens: list[str] | None = None
) -> str:
    """The rule that steers each character of a prompt and a reply, whose tokens are characters; "." for none.

    The prompt has one more character at its end, whose row is that of the reply's first.
    """
    plan = BiasPlan(
        tuple(BiasRule(parse_rule(line).where, None if ": none" in line else BIASES[i]) for i, line in enumerate(lines))
    )
    state = PlanState(plan, STYLES[style], lambda token: chr(token).encode())
    found = [*state.prompt([ord(sign) for sign in prompt + "$"]), state.first()]
    found = [*found, *(state.reply(ord(sign))[1] for sign in reply)][:-1]
    return "".join("." if decision.rule is None else str(decision.rule) for decision in found)


@pytest.mark.parametrize(
    ("lines", "prompt", "reply", "found"),
    [
        (["all: x"], "abc", "de", "00000"),
        (["prompt: x"], "abc", "de", "000.."),
        (["answer: x"], "abc", "de", "...00"),
        (["answer: none", "all: x"], "abc", "de", "111.."),
        (["answer[1:2]: x", "answer: x"], "", "abc", "101"),
        (["answer[2:]: x"], "ab", "abcde", "....000"),
        (["prompt[-1:]: x"], "abcd", "e", "...0."),
        (["prompt[-3:-1]: x"], "abcd", "", ".00."),
        (["prompt[-3:] every 2: x"], "abcde", "", "..0.0"),
        (["prompt[-9:2]: x"], "abcd", "", "00.."),
        (["prompt[-2:3]: x"], "abcd", "", "..0."),
        (["all[2:4]: x"], "abc", "de", "..00."),
        (["all[1:] every 2: x"], "abc", "def", ".0.0.0"),
        (["answer every 3: x"], "", "abcdefg", "0..0..0"),
        (["answer after ab: x"], "", "xabyab", "...000"),
        (["answer until ab: x"], "", "xabyab", "000..."),
        (["answer after '(' until ')': x"], "", ")x(ab)c(d)", "...000...."),
        (["answer after '\"' until '\"': x"], "", 'a"bc"d', "..000."),
        (["answer after '(' until ')' [1:2]: x"], "", "(abc)", "..0.."),
        (["answer after ab: x"], "ab", "xab", "....."),
        (["all after ab: x"], "ab", "xab", "..000"),
        (["prompt after ab: x"], "abab", "xab", "..00..."),
        (["prompt[-1:] after ab: x"], "abxyz", "", "....0"),
        ([f"answer after #{ord('b')} until #{ord('d')}: x"], "", "abcdef", "..00.."),
        (["thinking: x", "answer: x"], "", "<think>ab</think>cd", "1" + "0" * 16 + "11"),
        (["thinking after '<think>' until '</': x"], "", "<think>ab</think>c", "." * 7 + "0000" + "." * 7),
        (["answer[:2]: x"], "", "<think>ab</think>cde", "0" + "." * 16 + "00."),
    ],
)
def test_windows(lines: list[str], prompt: str, reply: str, found: str) -> None:
    assert steered(*lines, prompt=prompt, reply=reply) == found


def test_a_token_that_completes_both_marks_ends_the_window() -> None:
    plan = BiasPlan((BiasRule(parse_rule("answer after '(' until ')': x").where, BIASES[0]),))
    state = PlanState(plan, None, [b"a()b", b"(c", b"d)", b"e", b"x(", b")"].__getitem__)
    assert [state.reply(token)[1].rule for token in (0, 1, 2)] == [None, None, None]
    state = PlanState(plan, None, [b"a)(b", b"c", b")d", b"e"].__getitem__)
    assert [state.reply(token)[1].rule for token in range(4)] == [0, 0, None, None]


def test_a_bias_alone_and_nothing() -> None:
    for plan, rule in ((BIASES[0], 0), (None, None)):
        state = PlanState(plan, STYLES["think"], [b"<think>", b"</think>", b"x"].__getitem__)
        assert not any((state.needs_logits, state.needs_prompt_routing, state.needs_reply_routing))
        assert state.prompt([0, 2]) == [(plan, rule, "prompt")]
        assert state.first() == (plan, rule, "answer"), "until it thinks"
        found = [state.reply(token) for token in (0, 1, 2)]
        assert [own for own, _ in found] == ["thinking", "thinking", "answer"]
        assert [decision for _, decision in found] == [(plan, rule, of) for of in ("thinking", "answer", "answer")]


#
# measures
#


@given(st.integers(0, 10**6), st.integers(2, 500), st.floats(0.01, 50))
def test_entropy_and_margin(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=n) * scale).astype(np.float32)
    logits[rng.random(n) < 0.2] = -np.inf  # banned tokens
    logits[:2] = logits[:2].clip(-100, 100)
    logp = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    known = logp[np.isfinite(logp)]
    assert math.isclose(entropy(logits), -(np.exp(known) * known).sum(), rel_tol=1e-9, abs_tol=1e-12)
    second, first = np.sort(logp)[-2:]
    assert math.isclose(margin(logits), first - second, rel_tol=1e-9, abs_tol=1e-12)
    assert entropy(logits) == entropy(logits.copy()), "the same to the bit"


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("logits", "nats", "lead"),
    [
        ([0.0, 0.0], math.log(2), 0.0),
        ([5.0], 0.0, INF),
        ([5.0, -INF], 0.0, INF),
        ([1e30, -1e30], 0.0, 2e30),
        ([NAN, 0.0], NAN, NAN),
        ([0.0, INF], NAN, NAN),
        ([INF, INF], NAN, NAN),
        ([-INF, -INF], NAN, NAN),
        ([NAN], NAN, NAN),
    ],
)
def test_logits_that_are_no_distribution(logits: list[float], nats: float, lead: float) -> None:
    given_logits = np.array(logits, np.float32)
    assert entropy(given_logits) == pytest.approx(nats, nan_ok=True)
    assert margin(given_logits) == pytest.approx(lead, nan_ok=True)
    if math.isnan(nats):
        for condition in ("entropy < 9", "entropy > -9", "margin < 9", "margin > -9"):
            plan = BiasPlan((BiasRule(parse_rule(f"answer when {condition}: x").where, BIASES[0]),))
            state = PlanState(plan, None, [b"a"].__getitem__)
            state.saw_logits(given_logits)
            assert state.reply(0)[1].rule is None


def test_what_was_not_told_does_not_hold() -> None:
    for line in ("entropy < 9", "margin > -9", "f < 9 over prompt", "f < 9 over last 1"):
        plan = BiasPlan(
            (BiasRule(parse_rule(f"answer when {line}: x").where, BIASES[0], LEANS[0] if "f" in line else None),)
        )
        state = PlanState(plan, None, [b"a"].__getitem__)
        state.prompt([0])
        assert state.first().rule is None
        assert state.reply(0)[1].rule is None


def test_a_prompt_of_one_token_leans_nowhere() -> None:
    for line in ("f < 9 over prompt", "f > -9 over prompt"):
        plan = BiasPlan((BiasRule(parse_rule(f"answer when {line}: x").where, BIASES[0], LEANS[0]),))
        state = PlanState(plan, None, [b"a"].__getitem__)
        assert state.prompt([0]) == []
        state.saw_prompt_routing(np.zeros((0, SHAPE[0], TOP_K), np.int32))
        assert state.first().rule is None


#
# cost
#


def test_long_replies_cost_the_same_for_each_token() -> None:
    """The last tokens are summed anew for each token, so that nothing drifts: 4,096 of them in microseconds.

    The second half of 40,000 tokens must not cost more than the first; a cost that grows with the reply would be three
    times as high. Memory stays as well.
    """
    lines = [
        "thinking after 'never' until 'xyz': x",
        "answer when f < 0 over last 4096: x",
        "answer when f > 0 over last 7: x",
        "answer every 3 after 'a': x",
    ]
    plan = BiasPlan(
        tuple(BiasRule(parse_rule(line).where, BIASES[0], LEANS[0] if "f " in line else None) for line in lines)
    )
    state = PlanState(plan, STYLES["think"], [b"<think>", b"</think>", b" a", b"\n"].__getitem__)
    rng = np.random.default_rng(0)
    experts = np.stack([[rng.permutation(4)[:2] for _ in range(3)] for _ in range(64)]).astype(np.int32)
    state.prompt([2] * 100)
    for token in (0, 2, 1):
        state.reply(token)

    def read(n: int) -> float:
        start = time.process_time()
        for i in range(n):
            state.reply(2 + i % 2)
            state.saw_reply_routing(experts[i % 64 : i % 64 + 1])
        return time.process_time() - start

    # the least of ten: CPU time, too, is longer while other work shares the core
    first, second = (min(read(2_000) for _ in range(10)) for _ in range(2))
    assert second < 2 * first
    tracemalloc.start()
    read(5_000)
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 100_000, "nothing is kept of a token"


def test_the_last_tokens_of_a_long_piece() -> None:
    """Routing of many tokens told at once, more than any condition looks back to."""
    rng = np.random.default_rng(0)
    experts = np.stack([[rng.permutation(4)[:2] for _ in range(3)] for _ in range(3000)]).astype(np.int32)
    scores = LEANS[0].of_tokens(experts)
    for cuts in ([], [1], [1000], [2990, 2999], range(0, 3000, 7)):
        for last in (1, 5, 700):
            mean = float(scores[-last:].mean())
            for limit, rule in ((np.nextafter(mean, -9), 0), (np.nextafter(mean, 9), None)):
                where = Where("answer", when=Condition("routing", above=float(limit), map="f", last=last))
                state = PlanState(BiasPlan((BiasRule(where, BIASES[0], LEANS[0]),)), None, [b"a"].__getitem__)
                for start, stop in zip([0, *cuts], [*cuts, 3000], strict=True):
                    state.saw_reply_routing(experts[start:stop])
                assert state.reply(0)[1].rule == rule


def test_the_last_tokens_are_exact() -> None:
    """Numbers of very different size come and go: what is left is what the last ones alone make."""
    scores = np.zeros((2, 3))
    scores[0] = [1e16, 1.0, -1.0]
    lean = RoutingLean(scores)
    plan = BiasPlan((BiasRule(parse_rule("answer when f > 0.99 over last 2: x").where, BIASES[0], lean),))
    state = PlanState(plan, None, [b"a"].__getitem__)
    for expert in (0, 1) * 3000:
        state.saw_reply_routing(np.array([[[expert], [0]]], np.int32))
    state.saw_reply_routing(np.array([[[1], [0]]], np.int32))
    assert state.reply(0)[1].rule == 0
    state.saw_reply_routing(np.array([[[2], [0]]], np.int32))
    assert state.reply(0)[1].rule is None
