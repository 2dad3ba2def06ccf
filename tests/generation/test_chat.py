"""Conversations with the embedded model: steering that changes between questions, turns, templates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from steermoe_local import ModelError, ModelMismatchError, NativeError, SteeredLlama, UsageError
from steermoe_local.generation.chat import Chat, Part
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.generation.reply import Reply
from steermoe_local.steering.steering import Steering
from tests.support.chats import (
    COUNT,
    DIGITS,
    FOREIGN,
    QUESTIONS,
    TO_DIGITS,
    TO_WORDS,
    WORDS,
    fresh,
    routing,
    say,
)
from tests.support.generation import GREEDY

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
    with monkeypatch.context() as patch:
        patch.setattr(chat._slot, "keep", lambda n: None)
        chat.steer(TO_WORDS)
        new_bias = chat._slot.bias
        assert new_bias is not None
        chat._slot._keys = [new_bias.key] * chat.n_tokens  # not true: they were computed under the old one
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
    with pytest.raises(UsageError, match=r"no steering .*--steer or --plan"):
        chat.switch(True)


def test_a_steering_that_does_not_fit(new: Any, engine: Engine) -> None:
    chat = new(TO_DIGITS)
    say(chat, QUESTIONS[0])
    n_tokens = chat.n_tokens
    foreign = Steering("foreign", FOREIGN, activate=2)
    with pytest.raises(ModelMismatchError, match="foreign: "):
        chat.steer(foreign)
    with pytest.raises(UsageError, match="layers"):
        chat.steer(TO_DIGITS.changed(layers="x"))
    assert chat.steering is TO_DIGITS
    assert chat.n_tokens == n_tokens
    n_free = engine.n_free
    with pytest.raises(ModelMismatchError):
        new(foreign)
    assert engine.n_free == n_free, "the slot is given back"


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
    with pytest.raises(UsageError, match=r"and the context 256; .*/reset.* -c"):
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
        with pytest.raises(UsageError, match="still coming"):
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
    with pytest.raises(UsageError, match="still coming"):
        chat.reset()
    list(other)
    assert len(chat.messages) == 6


def test_text_that_was_held_back() -> None:
    """A piece without a token of its own adds text and no token."""
    reply = Reply()
    for event in (TokenEvent("four", 7), TokenEvent("", 8), TokenEvent("\ufffd", -1)):
        reply.add(event)
    assert reply.tokens == [7, 8]
    assert reply.text == reply.raw == "four\ufffd"


def test_the_context_is_full(llama: SteeredLlama) -> None:
    with Engine(llama, n_ctx=16, n_threads=1) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        _, finish = say(chat, COUNT)
        assert finish.reason == "context"
        assert finish.n_prompt + finish.n_generated == 16
        before = [dict(message) for message in chat.messages]
        with pytest.raises(UsageError, match=r"and the context 16; .*/reset") as info:
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
        engines.append(Engine(llama, n_ctx=256, n_slots=2, n_threads=1))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_no_template(engine_with: Any) -> None:
    engine = engine_with(None)
    with pytest.raises(ModelError, match=r"no chat template.*--raw"):
        Chat(engine)
    assert engine.n_free == 2, "none was taken"


def test_the_template_refuses(engine_with: Any) -> None:
    chat = Chat(engine_with(STRICT), system="x", sampling=GREEDY, max_tokens=2)
    with pytest.raises(UsageError, match=r"refuses .*: no system"):
        list(chat.ask("y"))
    assert chat.messages == []
    chat.set_system(None)
    list(chat.ask("y"))


@pytest.mark.parametrize(("template", "opening"), [(THINKING, '"<think>"'), (OPENED, "")])
def test_reasoning(engine_with: Any, template: str, opening: str) -> None:
    grammar = f'root ::= {opening} "\\nplus one\\n</think>\\n\\n4"'
    engine = engine_with(template)
    chat = Chat(engine, sampling=Sampling(temperature=0, grammar=grammar), thinking=True)
    items = list(chat.ask(QUESTIONS[0]))
    kinds = [item.kind for item in items if isinstance(item, Part)]
    assert kinds == sorted(kinds, reverse=True), "first the reasoning"
    assert chat.messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "plus one"}
    # the template leaves the reasoning of earlier turns out: only what is before it is still in memory
    finish = items[-1]
    assert isinstance(finish, FinishEvent)
    chat.sampling = GREEDY
    chat.max_tokens = 1
    *_, second = chat.ask("Add 4 and 6.")
    assert isinstance(second, FinishEvent)
    n_opening = len(engine.renderer.tokenize("<think>\n", add_special=False)) if not opening else 0
    assert second.n_cached == finish.n_prompt - n_opening


def test_stopped_while_reasoning(engine_with: Any) -> None:
    grammar = 'root ::= "\\none plus one plus one"'
    chat = Chat(engine_with(OPENED), sampling=Sampling(temperature=0, grammar=grammar), thinking=True)
    answer = chat.ask("x")
    part = next(answer)
    answer.close()
    assert isinstance(part, Part)
    assert part.kind == "reasoning"
    assert chat.messages[1]["content"] == ""
    assert chat.messages[1]["reasoning_content"].startswith(part.text)
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
