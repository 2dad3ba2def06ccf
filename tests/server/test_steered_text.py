"""Which characters of an answer were steered: whatever holds text back, each has the rule of its own token."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.generation.engine import FinishEvent, TokenEvent
from steermoe_local.llama.detokenizer import TextStream
from steermoe_local.llama.reasoning_styles import ReasoningStyle, reasoning_style
from steermoe_local.server.answers import Answer, Chunk
from steermoe_local.server.tool_calls import OfferedTools
from steermoe_local.server.tool_formats import FORMATS
from tests.support.chat_templates import source

# Characters that stand once in a text, so that it is known which token said them; none is in a marker.
LETTERS = "αβγδεζηθικλμνξοπρστυφχψωабвгдежзийклмнпуфцчшщ一二三四五六七八九十百千万🐈🐕🦊"
HERMES = OfferedTools(next(format_ for format_ in FORMATS if format_.name == "hermes"), {"stop": {}})
CALL = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'

STYLES: dict[str, ReasoningStyle | None] = {
    "none": None,
    "tags": reasoning_style(source("Qwen-Qwen3-0.6B")),
    "opened": reasoning_style(source("StepFun3.5-Flash"), "<think>\n"),
    "channels": reasoning_style(source("openai-gpt-oss-120b")),
}
# what stands around the reasoning and the answer
FRAMES: dict[str, tuple[str, str, str]] = {
    "none": ("", "", ""),
    "tags": ("<think>\n", "\n</think>\n\n", ""),
    "opened": ("", "\n</think>\n\n", ""),
    "channels": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "",
    ),
}


def finish(stop: str | None) -> FinishEvent:
    return FinishEvent("stop", 1, 0, 1, 0.0, 0.0, 0, stop)


def answered(
    data: bytes, cuts: list[int], rules: list[int | None], answer: Answer, stops: tuple[str, ...]
) -> list[Chunk]:
    """Feed a reply, cut into tokens, as the engine gives it out; `rules` repeat over the tokens."""
    stream, chunks = TextStream(stops), []
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(data)], strict=True)):
        if stream.stop is not None:
            break
        text = stream.feed(data[start:end])
        chunks.append(answer.take(TokenEvent(text, number, rule=rules[number % len(rules)])))
    if rest := stream.feed(b"", final=True):
        chunks.append(answer.take(TokenEvent(rest, -1)))
    return [*chunks, answer.take(finish(stream.stop))]


@pytest.mark.parametrize("tools", [None, HERMES], ids=["plain", "tools"])
@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_character_has_the_rule_of_its_token(name: str, tools: OfferedTools | None, data: st.DataObject) -> None:
    letters = data.draw(st.permutations(LETTERS))
    n_reasoning = 0 if name == "none" else data.draw(st.integers(0, 12))
    words = [*letters[:n_reasoning], *letters[n_reasoning : n_reasoning + data.draw(st.integers(0, 14))]]
    spaced = [letter + data.draw(st.sampled_from(["", " ", "\n", "<"])) for letter in words]
    before, between, after = FRAMES[name]
    call = CALL if tools is not None and data.draw(st.booleans()) else ""
    text = before + "".join(spaced[:n_reasoning]) + between + "".join(spaced[n_reasoning:]) + call + after
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=len(raw))) - {len(raw)})
    rules = data.draw(st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=7))
    stops = tuple(data.draw(st.sets(st.sampled_from([a + b for a in (*letters[:9], "<", " ") for b in letters[:9]]))))

    answer = Answer(
        lambda number: raw[[0, *cuts][number] : [*cuts, len(raw)][number]], False, STYLES[name], tools=tools
    )
    plain = answered(raw, cuts, rules, answer, stops)
    marked = Answer(
        lambda number: raw[[0, *cuts][number] : [*cuts, len(raw)][number]],
        False,
        STYLES[name],
        tools=tools,
        with_rules=True,
    )
    chunks = answered(raw, cuts, rules, marked, stops)
    assert marked.texts == answer.texts, "marks change the text"
    assert [chunk.text for chunk in chunks] == [chunk.text for chunk in plain]

    ends = [*cuts, len(raw)]
    token_of = {}
    for letter, end in zip(text, accumulate(len(letter.encode()) for letter in text), strict=True):
        token_of[letter] = next(number for number, last in enumerate(ends) if last >= end)
    steered = marked.steered
    assert steered is not None
    found: dict[str, int | None] = {}
    for kind in ("reasoning", "answer"):
        at = 0
        for chunk in chunks:
            for (piece_kind, piece), rule in chunk.pieces:
                if piece_kind != kind:
                    continue
                found |= dict.fromkeys(piece, rule)
                inside = [
                    span for span in steered.spans[kind] if span["start"] <= at and at + len(piece) <= span["end"]
                ]
                assert [span["rule"] for span in inside] == ([] if rule is None else [rule])
                at += len(piece)
        assert at == len(marked.texts[kind])
        spans = steered.spans[kind]
        assert all(0 <= span["start"] < span["end"] <= at for span in spans)
        assert all(
            one["end"] < two["start"] or (one["end"] == two["start"] and one["rule"] != two["rule"])
            for one, two in pairwise(spans)
        )
    wanted = {letter: rules[token_of[letter] % len(rules)] for letter in words if letter in found}
    assert {letter: found[letter] for letter in wanted} == wanted
    assert "".join(piece for piece, _ in steered.pieces(marked.text)) == marked.text


def test_text_beside_calls() -> None:
    """What stands behind a call comes out at the end; it has the rule of where it stands."""
    data = f"αβ{CALL}γδ".encode()
    cuts = [2, 4, len(data) - 4, len(data) - 2]
    answer = Answer(
        lambda number: data[[0, *cuts][number] : [*cuts, len(data)][number]], False, tools=HERMES, with_rules=True
    )
    answered(data, cuts, [0, 1, 2, 3, 4], answer, ())
    assert len(answer.calls) == 1
    assert answer.text == "αβγδ"
    assert answer.steered is not None
    assert [span["rule"] for span in answer.steered.spans["answer"]] == [0, 1, 3, 4]


def test_bytes_that_no_token_completes() -> None:
    data = "β".encode()[:1]
    answer = Answer(lambda _: data, False, with_rules=True)
    answered(data, [], [3], answer, ())
    assert answer.text == "�"
    assert answer.steered is not None
    assert answer.steered.fields(5) == {"steered": [{"rule": 3, "start": 5, "end": 6}]}
    assert answer.steered.token_rules == [3]
