"""Two answers side by side, and what the routing of an answer tells."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steermoe_local import SteeredLlama, UsageError
from steermoe_local.generation.chat import Chat, Part
from steermoe_local.generation.engine import Engine, FinishEvent, Sampling
from steermoe_local.llama import capi
from tests.support.chats import (
    COUNT,
    DIGITS,
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
    kinds = [side for side, item in items if isinstance(item, Part)]
    assert kinds != sorted(kinds), "they come interleaved"
    assert kinds != sorted(kinds, reverse=True)
    both = sides(items)
    for side, steering in (("unsteered", None), ("steered", TO_WORDS)):
        expected, alone = fresh(new, transcript, steering, COUNT)
        assert both[side][0] == expected
        assert np.array_equal(routing(both[side][1]), routing(alone))
    assert both["steered"][0] == WORDS
    assert both["steered"][1].n_cached > 0, "the chat's own slot is as it was"
    assert chat.messages[2:] == [{"role": "user", "content": COUNT}, {"role": "assistant", "content": WORDS}]
    assert chat.last is both["steered"][1]
    transcript = [dict(message) for message in chat.messages]
    answer, finish = say(chat, QUESTIONS[1])
    assert finish.n_cached > both["steered"][1].n_prompt
    assert answer == fresh(new, transcript, TO_WORDS, QUESTIONS[1])[0]


def test_both_sides_are_decoded_at_once(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same llama_decode, each token under the row that it names (steermoe_set_token_rows)."""
    chat = new(TO_WORDS)
    batches: list[list[int]] = []
    steered: set[tuple[int, int]] = set()  # (slot, row)
    token_rows: list[int] = []
    decode, set_token_rows = capi.decode, capi.set_token_rows

    def decoding(ctx: Any, batch: Any, rows: Any) -> None:
        batches.append([slot for _, _, slot, _ in rows])
        steered.update(zip(batches[-1], token_rows, strict=True))
        decode(ctx, batch, rows)

    def setting(ctx: Any, rows: Any) -> None:
        token_rows[:] = rows
        set_token_rows(ctx, rows)

    monkeypatch.setattr(capi, "decode", decoding)
    monkeypatch.setattr(capi, "set_token_rows", setting)
    chat.steer(TO_DIGITS)
    ends = {side: finish for side, (_, finish) in sides(chat.compare(COUNT)).items()}
    lengths = {side: finish.n_generated + 1 for side, finish in ends.items()}  # each end is drawn, too
    assert len(batches) == max(lengths.values()), "as many as the longer side needs by itself"
    both = [batch for batch in batches if len(set(batch)) == 2]
    assert len(both) == min(lengths.values())
    assert len(steered) == 2
    for slot, row in steered:
        assert (row >= 0) == (slot == chat._slot.index), "the chat's own alone is steered"


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
    real = chat._request

    def request(text: str, sampling: Sampling, side: str) -> Any:
        made, style = real(text, sampling, side)
        return replace(made, max_tokens=2 if side == first else 5), style

    monkeypatch.setattr(chat, "_request", request)
    items = chat.compare(COUNT)
    ends = (side for side, item in items if isinstance(item, FinishEvent))
    assert next(ends) == first
    with pytest.raises(UsageError, match="still coming"):
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
        with pytest.raises(UsageError, match="/steer NAME"):
            list(chat.compare(COUNT))
    chat.steer(TO_WORDS)
    chat.switch(False)
    with pytest.raises(UsageError, match="/steer NAME"):
        list(chat.compare(COUNT))
    with Engine(llama, n_ctx=64, n_threads=1) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        with pytest.raises(UsageError, match="n_slots=2"):
            list(chat.compare(COUNT))
        assert say(chat, COUNT)[0] == WORDS
        with pytest.raises(UsageError, match="n_slots=2"):
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
    with pytest.raises(UsageError, match="nothing steered"):
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
    # the same rows through another slot of the engine, unsteered, prompt and answer as they stand in memory
    tokens = chat._slot.tokens
    first = finish.n_prompt - 1
    with engine.slot() as slot:
        unsteered = engine.route(tokens, None, first, first + finish.n_rows, slot=slot)
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
    assert chat._slot.tokens == tokens
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
    with pytest.raises(UsageError, match="was stopped"):
        chat.routing()


def test_without_a_recorder(llama: SteeredLlama) -> None:
    with Engine(llama, n_ctx=64, n_slots=2, n_threads=1, record=False) as engine:
        chat = Chat(engine, sampling=GREEDY, steering=TO_WORDS)
        assert say(chat, COUNT)[0] == WORDS
        for call in (chat.routing, chat.why):
            with pytest.raises(UsageError, match="not counted"):
                call()
