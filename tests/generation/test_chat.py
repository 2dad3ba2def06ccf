"""Conversations with the embedded model: steering that changes between questions, and what the routing tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steermoe_local import (
    ExpertMap,
    FormatError,
    ModelError,
    ModelIdentity,
    ModelMismatchError,
    NativeError,
    SteeredLlama,
    UsageError,
)
from steermoe_local.generation.chat import Chat, Delta
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.generation.reply import Reply
from steermoe_local.llama import capi
from steermoe_local.llama.reasoning import ReasoningSplitter
from steermoe_local.steering.steering import Steering
from tests.support.builders import HEX
from tests.support.paths import ROOT

MAPS = ROOT / "expert_maps" / "tiny"
MAP = MAPS / "digits-words.json"
GREEDY = Sampling(temperature=0)
TO_DIGITS = Steering.open(map_file=MAP, activate=8, deactivate=8)
FOREIGN = ExpertMap(ModelIdentity("olmoe", 5, 24, 4, HEX), "x", ExpertMap.load(MAP).rd)
TO_WORDS = TO_DIGITS.changed(reverse=True)
QUESTIONS = [
    "Which number comes after three?",
    "Add 4 and 6.",
    "Please count down starting at sixteen until fourteen.",
]
COUNT = QUESTIONS[2]
DIGITS, WORDS = "16, 15, 14", "sixteen, fifteen, fourteen"


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=64, n_batch=64, n_threads=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def engine(llama: SteeredLlama) -> Iterator[Engine]:
    with Engine(llama, n_ctx=256, n_sequences=3, n_batch=64, n_threads=1) as engine:
        yield engine


@pytest.fixture
def new(engine: Engine) -> Iterator[Any]:
    """Makes greedy chats on the module's engine, and closes them."""
    chats: list[Chat] = []

    def make(steering: Steering | None = None, **arguments: Any) -> Chat:
        chats.append(Chat(engine, steering=steering, **({"sampling": GREEDY} | arguments)))
        return chats[-1]

    yield make
    for chat in chats:
        chat.close()


def say(chat: Chat, text: str) -> tuple[str, FinishEvent]:
    *deltas, finish = chat.ask(text)
    assert isinstance(finish, FinishEvent)
    return "".join(d.text for d in deltas if isinstance(d, Delta) and d.kind == "answer"), finish


def routing(finish: FinishEvent) -> Any:
    assert finish.routing is not None
    return finish.routing


def fresh(new: Any, messages: list[dict[str, str]], steering: Steering | None, text: str) -> tuple[str, FinishEvent]:
    """The answer of a chat that begins with this transcript and has never been steered otherwise."""
    chat = new(steering)
    chat.messages = [dict(message) for message in messages]
    try:
        return say(chat, text)
    finally:
        chat.close()


#
# steering that changes
#

# of each turn: what steers it, and whether the turn after may use the cache
TURNS: dict[str, list[Steering | None]] = {
    "on from the start": [TO_DIGITS, TO_DIGITS, TO_DIGITS],
    "switched on": [None, None, TO_WORDS],
    "switched off": [TO_WORDS, TO_WORDS, None],
    "other side": [TO_DIGITS, TO_WORDS, TO_DIGITS],
    "twice": [TO_DIGITS, None, TO_WORDS],
    "soft": [TO_WORDS, TO_WORDS.changed(scale=3.0), TO_WORDS.changed(scale=4.0)],
    "fewer": [TO_WORDS, TO_WORDS.changed(activate=2), TO_WORDS.changed(layers="1-2")],
}


@pytest.mark.parametrize("name", TURNS)
def test_three_turns_equal_a_fresh_run(new: Any, name: str) -> None:
    chat = new()
    before: Steering | None = None
    for steering, question in zip(TURNS[name], QUESTIONS, strict=True):
        n_held = chat.n_tokens
        assert chat.steer(steering) == (n_held if steering is not before else 0)
        assert chat.steered == (steering is not None)
        transcript = [dict(message) for message in chat.messages]
        answer, finish = say(chat, question)
        expected, alone = fresh(new, transcript, steering, question)
        assert answer == expected
        # the routing is a finer judge than the words: a token computed under another steering shows in it
        assert np.array_equal(routing(finish), routing(alone))
        assert (finish.n_cached > 0) == (n_held > 0 and steering is before)
        before = steering
    assert len(chat.messages) == 6


def test_the_steering_decides(new: Any) -> None:
    """So that the test above can fail: the same transcript goes on otherwise under another steering."""
    chat = new(TO_DIGITS)
    assert say(chat, QUESTIONS[0])[0] == "4"
    assert fresh(new, chat.messages, TO_DIGITS, COUNT)[0] == DIGITS
    assert fresh(new, chat.messages, TO_WORDS, COUNT)[0] == WORDS
    assert chat.messages == [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "4"}]


def test_a_stale_cache_would_be_seen(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory from the other steering changes the routing of the next answer."""
    chat = new(TO_DIGITS)
    say(chat, QUESTIONS[0])
    monkeypatch.setattr(chat._sequence, "forget", lambda: None)
    chat.steer(TO_WORDS)
    transcript = [dict(message) for message in chat.messages]
    _, finish = say(chat, COUNT)
    _, alone = fresh(new, transcript, TO_WORDS, COUNT)
    assert finish.n_cached > 0
    assert not np.array_equal(routing(finish), routing(alone))


def test_how_many_tokens_are_computed_again(new: Any) -> None:
    chat = new(TO_DIGITS)
    assert chat.n_tokens == 0
    say(chat, QUESTIONS[0])
    n_tokens = chat.n_tokens
    assert n_tokens > 8
    assert chat.steer(TO_DIGITS.changed(name="the same")) == 0
    assert chat.n_tokens == n_tokens
    assert chat.switch(True) == 0
    assert chat.switch(False) == n_tokens
    assert (chat.steering_on, chat.steered, chat.n_tokens) == (False, False, 0)
    assert chat.steering is not None
    assert chat.steering.name == "the same"
    assert chat.switch(True) == 0, "nothing was in memory"
    assert chat.steered
    _, finish = say(chat, QUESTIONS[1])
    assert finish.n_cached == 0
    _, finish = say(chat, QUESTIONS[1])
    assert finish.n_cached > 0


def test_a_choice_without_experts_steers_nothing(new: Any) -> None:
    chat = new(TO_DIGITS.changed(activate=0, deactivate=0))
    assert chat.steering_on
    assert not chat.steered
    assert chat.steer(TO_DIGITS.changed(scale=0.0)) == 0
    assert not chat.steered
    chat.steer(None)
    assert chat.steering is None
    assert not chat.steering_on
    with pytest.raises(UsageError, match="no steering to switch on"):
        chat.switch(True)


def test_a_steering_that_does_not_fit(new: Any, engine: Engine) -> None:
    chat = new(TO_DIGITS)
    say(chat, QUESTIONS[0])
    n_tokens = chat.n_tokens
    foreign = Steering("foreign", FOREIGN, activate=2)
    with pytest.raises(ModelMismatchError, match="foreign: made for olmoe"):
        chat.steer(foreign)
    with pytest.raises(UsageError, match="layers"):
        chat.steer(TO_DIGITS.changed(layers="x"))
    assert chat.steering is TO_DIGITS
    assert chat.n_tokens == n_tokens
    free = sum(sequence is None for sequence in engine._sequences)
    with pytest.raises(ModelMismatchError):
        new(foreign)
    assert sum(sequence is None for sequence in engine._sequences) == free, "the sequence is given back"


def test_forced(llama: SteeredLlama) -> None:
    foreign = Steering("foreign", FOREIGN, activate=8, reverse=True)
    with Engine(llama, n_ctx=64, n_threads=1, force=True) as engine:
        chat = Chat(engine, steering=foreign, sampling=GREEDY)
        assert say(chat, COUNT)[0] == WORDS


#
# turns
#


def test_the_system_message_and_reset(new: Any) -> None:
    chat = new(TO_DIGITS, system="Be brief.")
    _, finish = say(chat, QUESTIONS[0])
    n_system = finish.n_prompt
    assert all(message["role"] != "system" for message in chat.messages)
    chat.reset()
    assert chat.messages == []
    assert chat.last is None
    with pytest.raises(UsageError, match="no answer yet"):
        chat.routing()
    _, finish = say(chat, QUESTIONS[0])
    assert finish.n_prompt == n_system
    assert finish.n_cached == n_system - 1, "the same prompt, and its last token is computed again"
    assert chat.last is finish
    chat.set_system(None)
    _, finish = say(chat, QUESTIONS[1])
    assert finish.n_cached <= 1
    assert fresh(new, chat.messages[:2], TO_DIGITS, QUESTIONS[1])[0] == chat.messages[-1]["content"]


def test_closed_early(new: Any) -> None:
    chat = new(TO_WORDS)
    answer = chat.ask(COUNT)
    said = [next(answer) for _ in range(3)]
    answer.close()
    text = "".join(delta.text for delta in said)
    assert 0 < len(text) < len(WORDS)
    assert chat.messages == [{"role": "user", "content": COUNT}, {"role": "assistant", "content": text}]
    assert chat.last is None
    report = chat.routing()
    assert report.n_tokens == 3
    assert report.promoted > 0
    assert chat.why().n_tokens == 3
    again = [dict(message) for message in chat.messages]
    answer, finish = say(chat, QUESTIONS[0])
    assert finish.n_cached > 0
    assert answer == fresh(new, again, TO_WORDS, QUESTIONS[0])[0]
    assert len(chat.messages) == 4


def test_closed_before_anything_was_said(new: Any) -> None:
    chat = new(TO_WORDS)
    answer = chat.ask(COUNT)
    answer.close()
    assert chat.messages == []
    assert say(chat, COUNT)[0] == WORDS


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupt_while_computing(new: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    before = [dict(message) for message in chat.messages]
    steps = iter(range(1, 100))
    real = engine._context.decode

    def interrupted(parts: Any) -> Any:
        if next(steps) == step:
            raise KeyboardInterrupt
        return real(parts)

    with monkeypatch.context() as patch:
        patch.setattr(engine._context, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask(COUNT))
    if step == 1:
        assert chat.messages == before
    else:
        assert chat.messages[:2] == before
        assert WORDS.startswith(chat.messages[3]["content"])
        assert chat.messages[3]["content"]
    transcript = [dict(message) for message in chat.messages]
    answer, finish = say(chat, COUNT)
    expected, alone = fresh(new, transcript, TO_WORDS, COUNT)
    assert answer == expected
    assert np.array_equal(routing(finish), routing(alone))


def test_an_error_leaves_the_conversation(new: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    before, last, steering = [dict(message) for message in chat.messages], chat.last, chat.steering
    with pytest.raises(UsageError, match=r"has .* tokens, and the context 256; .*/reset.*larger -c"):
        list(chat.ask("one " * 400))
    steps = iter(range(1, 100))
    real = engine._context.decode

    def failing(parts: Any) -> Any:
        if next(steps) == 3:
            raise NativeError("no")
        return real(parts)

    with monkeypatch.context() as patch:
        patch.setattr(engine._context, "decode", failing)
        with pytest.raises(NativeError):
            list(chat.ask(COUNT))
    assert (chat.messages, chat.last, chat.steering) == (before, last, steering)
    assert chat.routing().n_tokens == last.n_rows
    assert say(chat, COUNT)[0] == fresh(new, before, TO_WORDS, COUNT)[0]


def test_one_answer_at_a_time(new: Any) -> None:
    chat = new(TO_WORDS)
    answer = chat.ask(COUNT)
    next(answer)
    for call in (
        lambda: list(chat.ask("again")),
        lambda: chat.steer(None),
        lambda: chat.switch(False),
        chat.reset,
        lambda: chat.set_system("x"),
        chat.routing,
        chat.to_dict,
        lambda: chat.load({}),
    ):
        with pytest.raises(UsageError, match="an answer is still coming"):
            call()
    rest = list(answer)
    assert isinstance(rest[-1], FinishEvent)
    # the last item is given when all is done: nobody has to ask for one more
    answer = chat.ask(QUESTIONS[0])
    while not isinstance(next(answer), FinishEvent):
        pass
    assert len(chat.messages) == 4
    assert chat.routing().n_tokens
    other = chat.ask(QUESTIONS[1])
    next(other)
    answer.close()
    with pytest.raises(UsageError, match="an answer is still coming"):
        chat.reset()
    list(other)
    assert len(chat.messages) == 6


def test_text_that_was_held_back() -> None:
    """A piece without a token of its own adds text and no token."""
    reply = Reply(Request(None, [1], GREEDY), ReasoningSplitter(None))  # type: ignore[arg-type]
    for piece in (TokenEvent("four", 7), TokenEvent("", 8), TokenEvent("\ufffd", -1)):
        list(reply.take(piece))
    assert reply.tokens == [7, 8]
    assert reply.message()["content"] == "four\ufffd"


def test_the_context_is_full(llama: SteeredLlama) -> None:
    with Engine(llama, n_ctx=16, n_threads=1) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        _, finish = say(chat, COUNT)
        assert finish.reason == "context"
        assert finish.n_prompt + finish.n_generated == 16
        before = [dict(message) for message in chat.messages]
        with pytest.raises(
            UsageError, match=r"has 2\d tokens, and the context 16; begin a new one with /reset"
        ) as info:
            list(chat.ask("Add 1."))
        assert "-c" in str(info.value)
        assert chat.messages == before
        chat.reset()
        assert say(chat, "Add 4 and 6.")[1].reason == "stop"


def test_max_tokens(new: Any) -> None:
    chat = new(TO_WORDS, max_tokens=2)
    assert say(chat, COUNT)[1].reason == "length"
    chat.max_tokens = None
    chat.reset()
    assert say(chat, COUNT)[0] == WORDS


#
# side by side
#


def sides(items: Any) -> dict[str, tuple[str, FinishEvent]]:
    texts: dict[str, list[str]] = {"unsteered": [], "steered": []}
    ends: dict[str, FinishEvent] = {}
    for side, item in items:
        assert side not in ends
        if isinstance(item, FinishEvent):
            ends[side] = item
        else:
            texts[side].append(item.text)
    return {side: ("".join(texts[side]), ends[side]) for side in texts}


def test_compare(new: Any) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    transcript = [dict(message) for message in chat.messages]
    items = list(chat.compare(COUNT))
    kinds = [side for side, item in items if isinstance(item, Delta)]
    assert kinds != sorted(kinds), "they come interleaved"
    assert kinds != sorted(kinds, reverse=True)
    both = sides(items)
    for side, steering in (("unsteered", None), ("steered", TO_WORDS)):
        expected, alone = fresh(new, transcript, steering, COUNT)
        assert both[side][0] == expected
        assert np.array_equal(routing(both[side][1]), routing(alone))
    assert both["steered"][0] == WORDS
    assert both["steered"][1].n_cached > 0, "the chat's own sequence is as it was"
    assert chat.messages[2:] == [{"role": "user", "content": COUNT}, {"role": "assistant", "content": WORDS}]
    assert chat.last is both["steered"][1]
    transcript = [dict(message) for message in chat.messages]
    answer, finish = say(chat, QUESTIONS[1])
    assert finish.n_cached > both["steered"][1].n_prompt
    assert answer == fresh(new, transcript, TO_WORDS, QUESTIONS[1])[0]


def test_both_sides_are_decoded_at_once(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same llama_decode, each under its own steering of the native library (steermoe_attach_seq)."""
    chat = new(TO_WORDS)
    batches: list[list[int]] = []
    attached: dict[int, bool] = {}
    decode, attach = capi.decode, capi.attach_sequence

    def decoding(ctx: Any, batch: Any, rows: Any) -> None:
        batches.append([sequence for _, _, sequence, _ in rows])
        decode(ctx, batch, rows)

    def attaching(ctx: Any, sequence: int, bias: Any, force: bool) -> None:
        attached[sequence] = bias is not None
        attach(ctx, sequence, bias, force)

    monkeypatch.setattr(capi, "decode", decoding)
    monkeypatch.setattr(capi, "attach_sequence", attaching)
    chat.steer(TO_DIGITS)
    ends = {side: finish for side, (_, finish) in sides(chat.compare(COUNT)).items()}
    lengths = {side: finish.n_generated + 1 for side, finish in ends.items()}  # each end is drawn, too
    assert len(batches) == max(lengths.values()), "as many as the longer side needs by itself"
    both = [batch for batch in batches if len(set(batch)) == 2]
    assert len(both) == min(lengths.values())
    assert sorted(attached.values()) in ([True], [False, True]), "an unsteered sequence may be left as it was"


def test_both_sides_have_one_seed(new: Any) -> None:
    chat = new(TO_WORDS, sampling=Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0), max_tokens=8)
    both = sides(chat.compare("Tell me."))
    seed = both["steered"][1].seed
    assert both["unsteered"][1].seed == seed
    assert chat.sampling.seed is None
    # a soft rule of almost nothing: the same seed draws the same words
    chat.steer(TO_WORDS.changed(scale=1e-6))
    chat.reset()
    both = sides(chat.compare("Tell me."))
    assert both["steered"][0] == both["unsteered"][0] != ""
    chat.sampling = Sampling(temperature=1.5, seed=5)
    assert {finish.seed for _, finish in sides(chat.compare("Tell me.")).values()} == {5}


def test_a_comparison_closed_early(new: Any) -> None:
    chat = new(TO_WORDS)
    items = chat.compare(COUNT)
    said = {"unsteered": "", "steered": ""}
    while not all(said.values()):
        side, item = next(items)
        said[side] += item.text
    items.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said["steered"]}
    both = sides(chat.compare(QUESTIONS[0]))
    assert both["steered"][0] == fresh(new, chat.messages[:2], TO_WORDS, QUESTIONS[0])[0]
    assert both["unsteered"][0] == fresh(new, chat.messages[:2], None, QUESTIONS[0])[0]


@pytest.mark.parametrize("first", ["steered", "unsteered"])
def test_a_comparison_closed_when_one_side_is_done(new: Any, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    chat = new(TO_WORDS)
    real = chat._reply

    def reply(text: str, sampling: Sampling, sequence: Any) -> Reply:
        side = "steered" if sequence is chat._sequence else "unsteered"
        made: Reply = real(text, sampling, sequence)
        made.request = replace(made.request, max_tokens=2 if side == first else 5)
        return made

    monkeypatch.setattr(chat, "_reply", reply)
    items = chat.compare(COUNT)
    ends = (side for side, item in items if isinstance(item, FinishEvent))
    assert next(ends) == first
    with pytest.raises(UsageError, match="an answer is still coming"):
        chat.reset()
    assert len(chat.messages) == (2 if first == "steered" else 0)
    items.close()
    assert len(chat.messages) == 2
    assert (chat.last is None) == (first == "unsteered")
    chat.reset()


def test_nothing_to_compare(new: Any, llama: SteeredLlama) -> None:
    chat = new()
    for steering in (None, TO_WORDS.changed(activate=0, deactivate=0)):
        chat.steer(steering)
        with pytest.raises(UsageError, match="choose a steering first: /steer NAME"):
            list(chat.compare(COUNT))
    chat.steer(TO_WORDS)
    chat.switch(False)
    with pytest.raises(UsageError, match="choose a steering first"):
        list(chat.compare(COUNT))
    with Engine(llama, n_ctx=64, n_threads=1) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        with pytest.raises(UsageError, match=r"needs a second sequence .* n_sequences=2"):
            list(chat.compare(COUNT))
        assert say(chat, COUNT)[0] == WORDS
        with pytest.raises(UsageError, match="needs a second sequence"):
            chat.why()


#
# the routing of an answer
#


def test_routing(new: Any) -> None:
    chat = new(TO_WORDS)
    _, finish = say(chat, COUNT)
    counts, expert_map = routing(finish), TO_WORDS.expert_map
    assert expert_map is not None
    bias = TO_WORDS.build()
    assert bias is not None
    signs = bias.signs
    report = chat.routing()
    assert report.n_tokens == finish.n_rows == counts[0].sum() // 4
    assert [layer.layer for layer in report.layers] == [0, 1, 2, 3, 4]
    n_promoted = n_suppressed = 0
    rd: list[float] = []
    for layer in report.layers:
        assert sum(use.share for use in layer.experts) == pytest.approx(1)
        order = [(-use.slots, use.expert) for use in layer.experts]
        assert order == sorted(order)
        for use in layer.experts:
            assert use.slots == counts[layer.layer, use.expert]
            assert use.share == use.slots / (report.n_tokens * 4)
            assert use.of_tokens == use.slots / report.n_tokens
            assert use.sign == signs[layer.layer, use.expert]
            assert use.rd == expert_map.rd[layer.layer, use.expert]
            assert use.of_tokens == {1: 1.0, -1: 0.0}.get(use.sign, use.of_tokens)
            n_promoted += use.slots * (use.sign > 0)
            n_suppressed += use.slots * (use.sign < 0)
            rd += [use.rd] * use.slots
        assert {use.expert for use in layer.experts} >= set(np.flatnonzero(signs[layer.layer]).tolist())
    assert report.promoted == n_promoted / len(rd) == 8 / 20
    assert report.suppressed == n_suppressed == 0
    assert report.mean_rd == pytest.approx(np.mean(rd))
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["experts"][0]["sign"] == 1


def test_the_answers_place_on_the_map(new: Any) -> None:
    """0 for the negative side's tokens and 1 for the positive side's, whatever steered."""
    places = {}
    for steering, expected in ((TO_DIGITS, DIGITS), (TO_WORDS, WORDS)):
        chat = new(steering)
        assert say(chat, COUNT)[0] == expected
        report = chat.routing()
        places[expected] = report.position
        assert report.mean_rd is not None
        assert (report.mean_rd > 0) == (expected == DIGITS)
        chat.close()
    assert places[DIGITS] == pytest.approx(1, abs=0.2)
    assert places[WORDS] == pytest.approx(0, abs=0.2)
    # the definition, on the map's own counts
    from steermoe_local.generation.answer_routing import answer_routing

    expert_map = TO_DIGITS.expert_map
    assert expert_map is not None
    assert expert_map.a1 is not None
    assert expert_map.a2 is not None
    assert answer_routing(expert_map.a1, 4, None, expert_map).position == pytest.approx(1)
    assert answer_routing(expert_map.a2, 4, None, expert_map).position == pytest.approx(0)
    assert answer_routing(np.ones((5, 24), np.int64), 4, None, expert_map).mean_rd == pytest.approx(0)


def test_routing_of_an_unsteered_answer(new: Any) -> None:
    chat = new()
    say(chat, COUNT)
    report = chat.routing()
    assert (report.promoted, report.suppressed, report.mean_rd, report.position) == (0, 0, None, None)
    assert all(use.rd is None and use.sign == 0 for layer in report.layers for use in layer.experts)
    with pytest.raises(UsageError, match="nothing steered the last answer"):
        chat.why()
    # a map that is chosen but switched off is still there to compare with
    chat.steer(TO_WORDS)
    chat.switch(False)
    say(chat, COUNT)
    report = chat.routing()
    assert report.mean_rd is not None
    assert report.promoted == 0


def test_why_under_the_hard_rule(new: Any, engine: Engine) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    _, finish = say(chat, COUNT)
    bias = TO_WORDS.build()
    assert bias is not None
    signs = bias.signs
    report = chat.why()
    steered = routing(finish)
    # the same rows through another sequence of the engine, unsteered, prompt and answer as they stand in memory
    sequence = engine.sequence()
    tokens = chat._sequence.tokens
    first = finish.n_prompt - 1
    unsteered = engine.route(sequence, tokens, first, first + finish.n_rows)
    sequence.close()
    assert unsteered is not None
    assert report.n_tokens == finish.n_rows
    assert report.n_slots == steered.sum() == finish.n_rows * 5 * 4
    for change, sign in ((report.promoted, 1), (report.suppressed, -1)):
        assert change.sign == sign
        assert change.n_experts == 8
        assert change.steered == steered[signs == sign].sum()
        assert change.unsteered == unsteered[signs == sign].sum()
        assert change.moved == sign * (change.steered - change.unsteered) >= 0
        assert change.share_unsteered == change.unsteered / report.n_slots
        assert change.share_steered == change.steered / report.n_slots
    assert report.promoted.steered == 8 * finish.n_rows, "every token, each promoted expert"
    assert report.suppressed.steered == 0 < report.suppressed.moved
    assert report.changed == np.abs(steered - unsteered).sum() // 2
    assert [layer.layer for layer in report.layers] == [0, 1, 2, 3, 4]
    for layer in report.layers:
        chosen = signs[layer.layer]
        assert layer.promoted.n_experts == (chosen > 0).sum()
        assert layer.promoted.steered == layer.promoted.n_experts * finish.n_rows
        assert layer.suppressed.steered == 0
    assert sum(layer.changed for layer in report.layers) == report.changed
    data = json.loads(json.dumps(report.to_dict()))
    assert data["promoted"]["moved"] == report.promoted.moved
    assert data["layers"][2]["suppressed"]["moved"] == report.layers[2].suppressed.moved
    # nothing of this touched the chat
    assert chat._sequence.tokens == tokens
    assert say(chat, QUESTIONS[1])[1].n_cached > 0


def test_why_over_the_cap(new: Any) -> None:
    """Asked for more promoted experts than a token uses, a layer keeps top-k of them: these are selected always."""
    chat = new(TO_DIGITS.changed(activate=60, deactivate=0))
    _, finish = say(chat, COUNT)
    report = chat.why()
    for layer in report.layers:
        assert layer.promoted.n_experts <= 4
        assert layer.promoted.steered == layer.promoted.n_experts * finish.n_rows
    assert report.promoted.n_experts == 20
    assert report.promoted.share_steered == 1
    assert report.promoted.moved == report.n_slots - report.promoted.unsteered == report.changed > 0
    assert report.suppressed.n_experts == report.suppressed.moved == 0


def test_why_is_of_the_answer_not_of_the_choice_now(new: Any) -> None:
    chat = new(TO_WORDS)
    say(chat, COUNT)
    before = chat.why()
    chat.steer(None)
    assert chat.why() == before
    assert chat.routing().promoted == 8 / 20


def test_a_stopped_answer_after_another_steering(new: Any) -> None:
    chat = new(TO_WORDS)
    answer = chat.ask(COUNT)
    next(answer)
    answer.close()
    chat.steer(None)
    with pytest.raises(UsageError, match="was stopped, and the steering has changed since"):
        chat.routing()


def test_without_a_recorder(llama: SteeredLlama) -> None:
    with Engine(llama, n_ctx=64, n_sequences=2, n_threads=1, record=False) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        assert say(chat, COUNT)[0] == WORDS
        for call in (chat.routing, chat.why):
            with pytest.raises(UsageError, match="the routing was not counted"):
                call()


#
# templates
#

THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = THINKING.replace("{% endif %}{% endif %}", "{% else %}<think>\n{% endif %}{% endif %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n role') }}{% endif %}x"


@pytest.fixture
def engine_with(llama: SteeredLlama, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes engines whose model has another chat template."""
    engines: list[Engine] = []
    real = llama._model.metadata()

    def make(template: str | None) -> Engine:
        metadata = {name: text for name, text in real.items() if name != "tokenizer.chat_template"}
        if template is not None:
            metadata["tokenizer.chat_template"] = template
        monkeypatch.setattr(llama._model, "metadata", lambda: metadata)
        engines.append(Engine(llama, n_ctx=256, n_sequences=2, n_threads=1))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_no_template(engine_with: Any) -> None:
    engine = engine_with(None)
    with pytest.raises(ModelError, match=r"no chat template.* steermoe run --raw"):
        Chat(engine)
    assert engine.sequence(), "none was taken"


def test_the_template_refuses(engine_with: Any) -> None:
    chat = Chat(engine_with(STRICT), system="x", sampling=GREEDY, max_tokens=2)
    with pytest.raises(UsageError, match="template refuses this conversation: no system role"):
        list(chat.ask("y"))
    assert chat.messages == []
    chat.set_system(None)
    list(chat.ask("y"))


@pytest.mark.parametrize(("template", "opening"), [(THINKING, '"<think>"'), (OPENED, "")])
def test_reasoning(engine_with: Any, template: str, opening: str) -> None:
    grammar = f'root ::= {opening} "\\nplus one\\n</think>\\n\\n4"'
    chat = Chat(engine_with(template), sampling=Sampling(temperature=0, grammar=grammar), thinking=True)
    items = list(chat.ask(QUESTIONS[0]))
    kinds = [item.kind for item in items if isinstance(item, Delta)]
    assert kinds == sorted(kinds, reverse=True), "first the reasoning"
    assert chat.messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "plus one"}
    # the template leaves the reasoning of earlier turns out: only what is before it is still in memory
    finish = items[-1]
    assert isinstance(finish, FinishEvent)
    chat.sampling = GREEDY
    chat.max_tokens = 1
    *_, second = chat.ask("Add 4 and 6.")
    assert isinstance(second, FinishEvent)
    n_opening = len(chat._renderer.tokenize("<think>\n", add_special=False)) if not opening else 0
    assert second.n_cached == finish.n_prompt - n_opening


def test_stopped_while_reasoning(engine_with: Any) -> None:
    grammar = 'root ::= "\\none plus one plus one"'
    chat = Chat(engine_with(OPENED), sampling=Sampling(temperature=0, grammar=grammar), thinking=True)
    answer = chat.ask("x")
    delta = next(answer)
    answer.close()
    assert isinstance(delta, Delta)
    assert delta.kind == "reasoning"
    assert chat.messages[1]["content"] == ""
    assert chat.messages[1]["reasoning_content"].startswith(delta.text)
    chat.sampling = GREEDY
    chat.max_tokens = 1
    list(chat.ask("y"))


def test_thinking_is_off_by_default(engine_with: Any) -> None:
    engine = engine_with(THINKING)
    chat = Chat(engine, sampling=Sampling(temperature=0, grammar='root ::= "4"'))
    list(chat.ask(QUESTIONS[0]))
    assert chat.messages[1] == {"role": "assistant", "content": "4"}
    chat.close()
    with pytest.raises(UsageError, match="template variables: messages"):
        Chat(engine, template_arguments={"messages": []})


def test_markers_that_are_control_tokens(engine_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """<|end|> is one of the embedded model's; the markers of the other styles are plain text for it."""
    seen: list[Request] = []
    real = Engine.generate

    def generate(self: Engine, *requests: Request) -> Any:
        seen.extend(requests)
        return real(self, *requests)

    monkeypatch.setattr(Engine, "generate", generate)
    harmony = "{% for m in messages %}{{ m.content }}{% endfor %}{# <|channel|>final<|message|> #}"
    for template in (harmony, THINKING, "{{ messages[0].content }}"):
        chat = Chat(engine_with(template), sampling=GREEDY, max_tokens=1)
        list(chat.ask("x"))
    assert [request.special for request in seen] == [True, False, False]


#
# files
#


def test_saved_and_loaded(new: Any, tmp_path: Path) -> None:
    sampling = Sampling(temperature=0, top_k=7, seed=3, logit_bias={5: -float("inf"), 6: 0.5}, grammar='root ::= [^"]*')
    chat = new(TO_WORDS.changed(layers="1-4"), system="Be brief.", sampling=sampling, max_tokens=20)
    say(chat, QUESTIONS[0])
    chat.messages[1]["reasoning_content"] = "hm"
    chat.save(tmp_path / "chat.json")
    other = new()
    say(other, "Something else.")
    assert other.load(tmp_path / "chat.json") == []
    assert (other.messages, other.system, other.max_tokens) == (chat.messages, "Be brief.", 20)
    assert other.sampling == sampling
    assert other.steering is not None
    assert other.steering.layers == "1-4"
    assert other.steered
    assert other.last is None
    assert say(other, COUNT)[0] == say(chat, COUNT)[0]
    text = (tmp_path / "chat.json").read_text("utf-8")
    assert "Infinity" not in text
    assert json.loads(text)["steering"]["map"] == str(MAP)
    with pytest.raises(UsageError, match="does not exist"):
        chat.save(tmp_path / "no" / "chat.json")


def test_a_relative_map_is_found_from_elsewhere(new: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(MAP, tmp_path / "m.json")
    monkeypatch.chdir(tmp_path)
    chat = new(Steering.open(map_file="m.json", activate=2))
    chat.save("chat.json")
    monkeypatch.chdir(ROOT)
    assert chat.load(tmp_path / "chat.json") == []
    assert chat.steered


def test_switched_off_stays_off(new: Any) -> None:
    chat = new(TO_WORDS)
    chat.switch(False)
    data = json.loads(json.dumps(chat.to_dict()))
    chat.switch(True)
    assert chat.load(data) == []
    assert chat.steering is not None
    assert not chat.steering_on
    assert not chat.steered
    chat.steer(None)
    assert chat.load(chat.to_dict()) == []


def test_the_map_has_gone_or_changed(new: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    shutil.copy(MAP, path)
    chat = new(Steering.open(map_file=path, activate=8, reverse=True))
    say(chat, QUESTIONS[0])
    chat.save(tmp_path / "chat.json")
    shutil.copy(MAPS / "document-memory.json", path)
    for words in ("not the file that it was", "no such file"):
        other = new(TO_DIGITS)
        warnings = other.load(tmp_path / "chat.json")
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{tmp_path / 'chat.json'}: steering.map: {path}: {words}")
        assert warnings[0].endswith("; the chat goes on unsteered")
        assert other.messages == chat.messages
        assert other.steering is None
        assert not other.steered
        assert say(other, COUNT)[0] == fresh(new, chat.messages, None, COUNT)[0]
        other.close()
        path.unlink(missing_ok=True)


def test_a_chat_of_another_model(new: Any, tmp_path: Path) -> None:
    FOREIGN.save(tmp_path / "m.json")
    chat = new()
    data = chat.to_dict()
    data["model"] = FOREIGN.identity.to_dict()
    data["steering"] = Steering.open(map_file=tmp_path / "m.json", activate=2).to_dict()
    data["steering_on"] = True
    first, second = chat.load(data)
    assert first.startswith("chat: the answers are of olmoe")
    assert "made for olmoe" in second
    assert second.endswith("the chat goes on unsteered")
    assert not chat.steered


QUESTION = {"role": "user", "content": "x"}
DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"format": "steermoe-expert-map"}, 'no "format": "steermoe-chat"'),
    ({"version": 2}, "version 2, this program reads 1"),
    ({"more": 1}, "more: unknown field"),
    ({"system": 3}, "system: 3 is not what stands there"),
    ({"steering": "x"}, "steering: 'x'"),
    ({"steering_on": 1}, "steering_on: 1"),
    ({"messages": {}}, "messages: {}"),
    ({"messages": [QUESTION]}, "the last question has no answer"),
    ({"messages": [QUESTION, QUESTION]}, r"messages\[1\]: role 'user', but"),
    ({"messages": [{"role": "system", "content": "x"}] * 2}, r"messages\[0\]: role 'system'"),
    ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, r"messages\[1\]: not an object of texts"),
    ({"messages": [QUESTION | {"reasoning_content": "x"}, QUESTION]}, r"messages\[0\]: has the fields"),
    ({"messages": [QUESTION, {"role": "assistant"}]}, r"messages\[1\]: has the fields role;"),
    ({"messages": ["x", "y"]}, r"messages\[0\]: not an object"),
    ({"sampling": {"temperature": "hot"}}, "sampling.temperature: 'hot'"),
    ({"sampling": {"temperature": -1}}, "sampling: temperature: -1"),
    ({"sampling": {"top_k": 1.5}}, "sampling.top_k: 1.5"),
    ({"sampling": {"seed": 1 << 80}}, "sampling: seed"),
    ({"sampling": {"heat": 1}}, "sampling.heat: unknown field"),
    ({"sampling": {"logit_bias": {"x": 1}}}, "sampling: "),
    ({"sampling": {"logit_bias": [1]}}, "sampling: "),
    ({"max_tokens": -2}, "max_tokens: -2 is not a number of tokens"),
    ({"max_tokens": True}, "max_tokens: True"),
    ({"model": {"architecture": 3}}, "chat: model"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGE)
def test_damaged_files(new: Any, changes: dict[str, Any], words: str) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    before = chat.to_dict()
    with pytest.raises(FormatError, match=words):
        chat.load(before | changes)
    assert chat.to_dict() == before
    missing = {name: value for name, value in before.items() if name not in changes}
    if missing != before:
        with pytest.raises(FormatError, match=r"missing|not a saved chat|a chat of version None"):
            chat.load(missing)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"format": "steermoe-chat", "format": "x"}', b"[" * 100_000, b"NaN"],
)
def test_files_that_are_none(new: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"chat\.json: not a saved chat"):
        new().load(path)


@pytest.mark.parametrize("path", [".", "/dev/zero", "missing.json"])
def test_paths_that_are_no_files(new: Any, path: str) -> None:
    with pytest.raises(FormatError):
        new().load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["model", "created", "tool", "system", "messages", "steering", "steering_on", "sampling", "max_tokens"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_damage_is_a_format_error(new: Any, changes: dict[str, Any]) -> None:
    chat = new(TO_WORDS)
    try:
        chat.load(json.loads(json.dumps(chat.to_dict() | changes)))
    except FormatError:
        assert chat.steered
    chat.close()
