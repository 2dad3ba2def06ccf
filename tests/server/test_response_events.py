"""Deltas of a chat's answer as output items and events."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from steermoe_local.server.response_events import ReasoningCount, ResponseEvents

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_ITEM: TypeAdapter[Any] = TypeAdapter(ResponseOutputItem)

THINK = {"reasoning_content": "t"}
SAY = {"content": "a"}


def begun(index: int, id_: str, name: str, arguments: str = "") -> dict[str, Any]:
    call = {"index": index, "id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"tool_calls": [call]}


def more(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def run(deltas: list[dict[str, Any]], complete: bool = True, **options: Any) -> tuple[list[Any], list[Any]]:
    """(events, output), both as OpenAI's client reads them."""
    events = ResponseEvents(**options)
    found = [event for delta in deltas for event in events.add(delta)] + list(events.finish(complete))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return [_EVENT.validate_python(event) for event in found], [_ITEM.validate_python(item) for item in events.output]


def names(events: list[Any]) -> list[str]:
    return [event.type.removeprefix("response.") for event in events]


OPENED, CLOSED = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
MESSAGE = [*OPENED, "output_text.delta", "output_text.done", *CLOSED]
REASONING = [*OPENED, "reasoning_text.delta", "reasoning_text.done", *CLOSED]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


@pytest.mark.parametrize(
    ("deltas", "expected", "kinds"),
    [
        ([SAY], MESSAGE, ["message"]),
        ([{"role": "assistant", "content": ""}, SAY], MESSAGE, ["message"]),
        ([THINK, SAY], REASONING + MESSAGE, ["reasoning", "message"]),
        ([begun(0, "c", "f", "{}")], CALL, ["function_call"]),
        ([begun(0, "c", "f"), more(0, "{}")], CALL, ["function_call"]),
        (
            [SAY, begun(0, "c", "f", "{}"), begun(1, "d", "g", "{}")],
            MESSAGE + CALL + CALL,
            ["message", "function_call", "function_call"],
        ),
        ([THINK, begun(0, "c", "f"), more(0, "{}")], REASONING + CALL, ["reasoning", "function_call"]),
        ([THINK, SAY, THINK], REASONING + MESSAGE + REASONING, ["reasoning", "message", "reasoning"]),
    ],
)
def test_the_order_of_events(deltas: list[Any], expected: list[str], kinds: list[str]) -> None:
    events, output = run(deltas)
    assert names(events) == expected
    assert [item.type for item in output] == kinds
    assert {item.status for item in output} == {"completed"}
    added = [event for event in events if event.type == "response.output_item.added"]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == [event.output_index for event in done] == list(range(len(output)))
    assert [event.item for event in done] == output
    assert {event.item.status for event in added} == {"in_progress"}
    own = {event.output_index: event.item.id for event in added}
    assert len(set(own.values())) == len(own)
    assert all(event.item_id == own[event.output_index] for event in events if hasattr(event, "item_id"))


def test_texts_join() -> None:
    events, output = run([THINK, {"reasoning_content": "u"}, SAY, {"content": "b"}])
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "ab"
    assert output[0].content[0].text == "tu"
    assert output[1].content[0].text == "ab"
    by_name = dict(zip(names(events), events, strict=True))
    assert by_name["reasoning_text.done"].text == "tu"
    assert by_name["output_text.done"].text == by_name["content_part.done"].part.text == "ab"


def test_calls_join() -> None:
    events, output = run([begun(0, "c", "f"), more(0, '{"a"'), more(0, ":1}")], namespaces={"f": "n", "g": None})
    (call,) = output
    assert (call.call_id, call.name, call.arguments, call.namespace) == ("c", "f", '{"a":1}', "n")
    assert events[0].item.arguments == ""
    assert events[-2].arguments == '{"a":1}'


def test_an_answer_that_was_cut_off() -> None:
    _, output = run([THINK, SAY], complete=False)
    assert [item.status for item in output] == ["completed", "incomplete"]
    _, output = run([THINK], complete=False)
    assert [(item.type, item.status) for item in output] == [("reasoning", "incomplete")]
    _, output = run([begun(0, "c", "f", '{"a"')], complete=False)
    assert (output[0].status, output[0].arguments) == ("incomplete", '{"a"')


@pytest.mark.parametrize("complete", [True, False])
def test_an_empty_answer_is_a_message(complete: bool) -> None:
    events, output = run([], complete)
    assert names(events) == [name for name in MESSAGE if name != "output_text.delta"]
    assert output[0].content[0].text == ""
    assert [item.type for item in run([THINK])[1]] == ["reasoning", "message"]


def test_log_probabilities_go_with_their_text() -> None:
    """Those of a token whose text is held back wait for it."""
    one, two = ({"token": token, "logprob": -1.0, "bytes": [97], "top_logprobs": []} for token in "ab")
    events = ResponseEvents()
    assert list(events.add({"content": ""}, [one])) == []
    delta = list(events.add(SAY, [two]))[-1]
    assert delta["logprobs"] == [one, two]
    list(events.add({"content": ""}, [one]))
    list(events.finish(complete=True))
    assert events.output[0]["content"][0]["logprobs"] == [one, two, one]


def test_reasoning_tokens_are_counted() -> None:
    """A token without text belongs to what comes next, or, in the middle, to what came last."""
    count = ReasoningCount()
    for kinds in ([], ["reasoning"], ["reasoning"], [], ["answer"], ["answer"]):
        count.add(1, kinds)
    assert count.n == 4
    plain = ReasoningCount()
    for kinds in ([], ["answer"], []):
        plain.add(1, kinds)
    assert plain.n == 0
