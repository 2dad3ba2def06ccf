"""Which tokens in memory a plan can use again: those that were computed under the bias that is in force at them now."""

from __future__ import annotations

from typing import Any

import pytest

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.generation.engine import Engine, Slot
from tests.support.generation import alone, answer, endless, greedy
from tests.support.placed import plan

pytestmark = pytest.mark.numeric


def n_cached(engine: Engine, slot: Slot | None, prompt: list[int], bias: Any, n: int = 5) -> tuple[int, list[int]]:
    """(tokens of the prompt that were in memory, the answer's tokens); the answer is that of an empty memory."""
    _, tokens, end = answer(engine, greedy(prompt, n, bias, slot=slot, sampling=endless(engine.model)))[0]
    return end.n_cached, tokens


@pytest.fixture
def fresh(open_engine: Any, llama: SteeredLlama) -> Any:
    return lambda prompt, bias: alone(open_engine, prompt, bias, max_tokens=5, sampling=endless(llama))[1]


def test_switching_answers_recomputes_no_prompt(open_engine: Any, biases: Any, prompts: Any, fresh: Any) -> None:
    """Unsteered, answer-only, another, off: the prompt is shared; all-token steering shares nothing."""
    prompt = prompts[2]
    whole = len(prompt) - 1  # the last token is computed for its logits
    switches: list[tuple[Any, int]] = [
        (None, 0),
        (plan(("answer", biases[1])), whole),
        (plan(("answer", biases[2])), whole),
        (plan(("answer[0:3]", biases[2]), ("answer", biases[1])), whole),
        (None, whole),
        (biases[1], 0),
        (plan(("prompt", biases[1])), whole),  # the same bias at the same tokens
        (plan(("prompt", biases[1]), ("answer", biases[2])), whole),
        (plan(("answer", biases[2])), 0),
        (plan(("all", biases[2])), 0),
        (biases[2], whole),
    ]
    with open_engine() as engine, engine.slot() as slot:
        for bias, expected in switches:
            found, tokens = n_cached(engine, slot, prompt, bias)
            assert found == expected
            assert tokens == fresh(prompt, bias)


def test_windows_of_the_prompt(open_engine: Any, biases: Any, prompts: Any, fresh: Any) -> None:
    """Memory is used up to the first token that is steered otherwise."""
    prompt = prompts[2]
    n = len(prompt) - 1  # the last one's row is the answer's
    assert n > 7
    switches: list[tuple[Any, int]] = [
        (None, 0),
        (plan(("prompt[-1:]", biases[1])), n - 1),
        (plan(("prompt[-3:]", biases[1]), ("answer", biases[1])), n - 3),
        (plan(("prompt[-3:]", biases[2])), n - 3),
        (plan(("prompt[4:6]", biases[2])), 4),
        (plan(("prompt[4:7]", biases[2])), 6),
        (plan(("prompt[5:7]", biases[2])), 4),
        (plan(("prompt every 2", biases[3])), 0),
        (plan(("prompt[2:] every 2", biases[3])), 0),
        (plan(("prompt[2:5] every 2", biases[3])), 6),
        (None, 2),
    ]
    with open_engine() as engine, engine.slot() as slot:
        for bias, expected in switches:
            found, tokens = n_cached(engine, slot, prompt, bias)
            assert found == expected
            assert tokens == fresh(prompt, bias)
            state = [] if bias is None else bias.biases
            assert set(slot.keys) <= {None, *(one.key for one in state)}


def test_earlier_answers_are_prompt_in_the_next_turn(open_engine: Any, biases: Any, prompts: Any, fresh: Any) -> None:
    """So an answer that was steered as an answer is computed again, and the prompts before it are not."""
    only = plan(("answer", biases[1]))
    with open_engine() as engine, engine.slot() as slot:
        first, said = n_cached(engine, slot, prompts[2], only)
        text = [*prompts[2], *said, *prompts[0]]
        second, again = n_cached(engine, slot, text, only)
        assert (first, second) == (0, len(prompts[2]) - 1), "the prompt's last row was the answer's first"
        assert again == fresh(text, only)
        # switched off now, nothing but this turn's answer is new
        longer = [*text, *again, *prompts[1]]
        third, last = n_cached(engine, slot, longer, None)
        assert third == len(text) - 1
        assert last == fresh(longer, None)
        # unsteered answers are in memory as they are needed; the last of one was drawn, and never read
        fourth, _ = n_cached(engine, slot, [*longer, *last, *prompts[3]], only)
        assert fourth == len(longer) + len(last) - 1


def test_the_slot_with_most_valid_tokens(open_engine: Any, biases: Any, prompts: Any) -> None:
    """Not the one with most tokens of the text: what counts is what the request can use."""
    prompt = prompts[2]
    with open_engine(n_slots=3) as engine:
        n_cached(engine, None, prompt, biases[1])
        n_cached(engine, None, prompt, plan(("prompt[-2:]", biases[1])))
        assert [slot.bias is not None for slot in engine._slots] == [True, True, False]
        found, _ = n_cached(engine, None, prompt, plan(("answer", biases[2])))
        assert found == len(prompt) - 3
        assert [bool(slot.tokens) for slot in engine._slots] == [True, True, False]
        assert engine._slots[1].keys[len(prompt)] == biases[2].key
        found, _ = n_cached(engine, None, prompt, plan(("prompt", biases[1]), ("answer", biases[2])))
        assert found == len(prompt) - 1
        first = len(prompt) - 1
        assert engine._slots[0].keys[: first + 2] == [biases[1].key] * first + [biases[2].key] * 2


def test_steering_a_slot_keeps_what_stays_valid(open_engine: Any, biases: Any, prompts: Any) -> None:
    """What it holds is then the beginning of a prompt."""
    prompt, n = prompts[2], len(prompts[2])

    def steer(slot: Slot, bias: BiasFile | Any) -> int:
        assert slot.steer(bias)
        assert not slot.steer(bias)
        return len(slot.tokens)

    with open_engine() as engine, engine.slot() as slot:
        n_cached(engine, slot, prompt, None)
        n_held = len(slot.tokens)
        assert n_held == n + 4
        assert steer(slot, plan(("answer", biases[1]))) == n_held
        assert steer(slot, plan(("prompt[-1:]", biases[1]), ("answer", biases[1]))) == n_held, "the end is to come"
        assert steer(slot, plan(("prompt[3:5]", biases[1]))) == 3
        assert steer(slot, None) == 3
        n_cached(engine, slot, prompt, plan(("answer", biases[2])))
        assert len(slot.tokens) == n_held
        assert steer(slot, plan(("answer", biases[1]))) == n - 1
        assert steer(slot, biases[1]) == 0
        n_cached(engine, slot, prompt, biases[1])
        assert steer(slot, plan(("prompt[:-2]", biases[1]))) == n_held, "more of the prompt is to come"
        assert steer(slot, None) == 0


def test_memory_that_cannot_be_cut(open_engine: Any, biases: Any, prompts: Any, monkeypatch: Any) -> None:
    """A recurrent state: all is computed again."""
    only = plan(("answer", biases[1]))
    with open_engine() as engine, engine.slot() as slot:
        n_cached(engine, slot, prompts[2], only)
        cut = engine._context.cut
        monkeypatch.setattr(engine._context, "cut", lambda index, n: cut(index, 0) and not n)
        found, tokens = n_cached(engine, slot, prompts[2], plan(("answer", biases[2])))
        monkeypatch.undo()
        assert found == 0
        assert len(slot.keys) == len(slot.tokens) == len(prompts[2]) + len(tokens) - 1
