"""Messages in the form that a template takes: content, calls of tools, ids, system messages."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import jinja2
import pytest

from steermoe_local.llama.chat_template import ChatTemplate
from steermoe_local.llama.template_date import template_date
from steermoe_local.llama.template_messages import CallForm, merged_system

DAY = template_date("2024-02-29")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]
ARGUMENTS = '{"city": "Oslo", "days": 2}'


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def chat(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    before = copy.deepcopy(messages)
    text = template(source).chat(messages, add_generation_prompt=True, variables=variables, date=DAY)
    assert messages == before, "the caller's messages are changed"
    return text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any, id_: str | None = "call_1234567890", content: Any = None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [made | ({"id": id_} if id_ else {})]}


def result(id_: str | None = "call_1234567890", content: Any = "Sunny.") -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": id_} if id_ else {})


#
# content
#

TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
# as MiniMax-Text-01's
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ c.text }}{% endfor %}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)
USERS_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{% for c in m.content %}{{ c['text'] }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
JSON = "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}{% endfor %}"  # noqa: E501


@pytest.mark.parametrize("source", [TEXTS, PARTS, BOTH, USERS_PARTS, JSON])
def test_content_as_text(source: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("One?"), {"role": "assistant", "content": "Two."}]
    assert chat(source, messages) == "[system]Be brief.[user]One?[assistant]Two."


@pytest.mark.parametrize(("source", "joined"), [(TEXTS, "a\nb"), (PARTS, "ab"), (BOTH, "ab"), (JSON, "a\nb")])
def test_content_in_parts(source: str, joined: str) -> None:
    """Templates that take parts join them; others get a text, whose parts stand on lines of their own."""
    assert chat(source, [user(parts("a", "b"))]) == f"[user]{joined}"


def test_other_parts_stay() -> None:
    image = [{"type": "image"}, *parts("a")]
    assert chat("{{ messages[0].content | tojson }}", [user(image)]) == json.dumps(image)


def test_null_content() -> None:
    assert chat(TEXTS, [user(None)]) == "[user]"


#
# calls
#

OBJECT = (  # of arguments an object is wanted
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}>"
    "{% endfor %}{% endfor %}"
)
AS_JSON = OBJECT.replace(
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}",
    " {{ c.function.arguments | tojson }}",
)
TEXT = OBJECT.replace(  # a text is wanted
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}",
    "{{ ' ' + c.function.arguments }}",
)
PRINTED = OBJECT.replace(  # an object would come out as Python has it
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}",
    " {{ c.function.arguments }}",
)


@pytest.mark.parametrize("arguments", [ARGUMENTS, json.loads(ARGUMENTS)])
@pytest.mark.parametrize(
    ("source", "printed"),
    [(OBJECT, 'city="Oslo" days=2'), (AS_JSON, ARGUMENTS), (TEXT, ARGUMENTS), (PRINTED, ARGUMENTS)],
)
def test_arguments(source: str, printed: str, arguments: Any) -> None:
    """Objects and texts alike, in the form that the template takes."""
    text = chat(source, [user("x"), call(arguments), result()], tools=TOOLS)
    assert text == f"[user]x[assistant]<weather {printed}>[tool]Sunny."


@pytest.mark.parametrize("arguments", ["", "  ", "{}", None, {}])
@pytest.mark.parametrize(("source", "printed"), [(OBJECT, ""), (AS_JSON, " {}"), (TEXT, " {}"), (PRINTED, " {}")])
def test_no_arguments(source: str, printed: str, arguments: Any) -> None:
    text = chat(source, [user("x"), call(arguments), result()], tools=TOOLS)
    assert text == f"[user]x[assistant]<weather{printed}>[tool]Sunny."


def test_arguments_that_are_no_object() -> None:
    assert "<weather [1]>" in chat(PRINTED, [user("x"), call("[1]"), result()])
    assert "<weather {broken>" in chat(PRINTED, [user("x"), call("{broken"), result()])
    with pytest.raises(jinja2.TemplateError):
        chat(OBJECT, [user("x"), call("{broken"), result()])


def test_the_other_form_is_tried() -> None:
    """A template whose probe says objects, and which wants a text for one of its tools."""
    source = OBJECT.replace("m.tool_calls or []", "m.tool_calls or []").replace(
        "{% for k", "{% if c.function.name == 'weather' %}{{ ' ' + c.function.arguments }}{% else %}{% for k"
    )
    source = source.replace("{% endfor %}>", "{% endfor %}{% endif %}>")
    assert template(source).forms.calls == CallForm(text_arguments=False)
    assert f"<weather {ARGUMENTS}>" in chat(source, [user("x"), call(ARGUMENTS), result()])


def test_content_of_a_message_that_calls() -> None:
    """Calls that a template renders only of null content (DeepSeek-R1-Distill-Llama) are not lost."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
        "<{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}>"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert template(source).forms.calls.empty is None
    assert chat(source, [user("x"), call(ARGUMENTS), result()]) == f"x<weather {ARGUMENTS}>Sunny."
    # one that adds the content to a text gets a text
    source = OBJECT.replace("m.content or ''", "m.content + '|'")
    assert "[assistant]|<weather" in chat(source, [user("x"), call(ARGUMENTS), result()])


NINE = (  # as Mistral's
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id|length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "<{{ c.function.name }} {{ c.function.arguments | tojson }} {{ c.id }}>{% endfor %}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id|length != 9 %}{{ raise_exception('nine characters') }}"
    "{% endif %}{{ '[' + m.tool_call_id + ']' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def ids(text: str) -> list[str]:
    return [piece[-9:] for piece in text.replace("]", ">").split(">")[:-1]]


def test_ids_of_nine_characters() -> None:
    made = ids(chat(NINE, [user("x"), call(ARGUMENTS), result()]))
    assert made[0] == made[1]
    assert made[0].isalnum()
    assert made == ids(chat(NINE, [user("x"), call(ARGUMENTS), result()])), "the same in every request"
    assert ids(chat(NINE, [user("x"), call(ARGUMENTS, "abcDEF123"), result("abcDEF123")])) == ["abcDEF123"] * 2
    two = [user("x"), call(ARGUMENTS, "call_a"), result("call_a"), call(ARGUMENTS, "call_b"), result("call_b")]
    first, second, third, fourth = ids(chat(NINE, two))
    assert first == second != third == fourth


def test_results_without_an_id_belong_to_the_calls_in_turn() -> None:
    both = call(ARGUMENTS, "call_a")
    both["tool_calls"] += call(ARGUMENTS, "call_b")["tool_calls"]
    one, two, three, four = ids(chat(NINE, [user("x"), both, result(None), result(None)]))
    assert (one, two) == (three, four)
    one, two = ids(chat(NINE, [user("x"), call(ARGUMENTS, None), result(None)]))
    assert one == two


def test_ids_stay_elsewhere() -> None:
    source = "{% for m in messages %}{{ m.tool_call_id }}{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}"
    source += "{% endfor %}"
    assert chat(source, [user("x"), call(ARGUMENTS), result()]) == "call_1234567890 call_1234567890"


def test_the_field_of_reasoning() -> None:
    field = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.FIELD }}{% endif %}{% endfor %}"
    assert template(field.replace("FIELD", "thinking")).forms.reasoning_field == "thinking"
    assert template(field.replace("FIELD", "reasoning_content")).forms.reasoning_field is None
    assert template(field.replace("m.FIELD", "m.reasoning_content or m.reasoning")).forms.reasoning_field is None
    assert template(TEXTS).forms.reasoning_field is None


#
# system messages
#

REFUSES = (  # as Mixtral's and Gemma's
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_refused_system_message_goes_into_the_users(caplog: pytest.LogCaptureFixture) -> None:
    compiled = template(REFUSES)
    messages = [SYSTEM, user("One?"), {"role": "assistant", "content": "Two."}, user("Three?")]
    with caplog.at_level(logging.WARNING, "steermoe.prompts"):
        for _ in range(2):
            text = compiled.chat(messages, add_generation_prompt=True, variables={}, date=DAY)
            assert text == "[user]Be brief.\nOne?[assistant]Two.[user]Three?"
    assert len(caplog.records) == 1, "it is said once"
    assert "system" in caplog.records[0].getMessage()


def test_where_there_is_no_user_the_template_decides() -> None:
    with pytest.raises(jinja2.TemplateError, match="role not supported"):
        chat(REFUSES, [SYSTEM])
    with pytest.raises(jinja2.TemplateError, match="role not supported"):  # the text would be lost
        chat(REFUSES.replace("{{ m.content }}", ""), [SYSTEM, user("One?")])
    with pytest.raises(jinja2.TemplateError, match="in turns"):
        chat(REFUSES, [user("One?"), user("Two?")])


def test_templates_that_take_one_get_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "steermoe.prompts"):
        assert chat(TEXTS, [SYSTEM, user("One?")]) == "[system]Be brief.[user]One?"
        assert chat("{{ messages[-1].content }}", [SYSTEM, user("One?")]) == "One?", "dropped, not refused"
    assert not caplog.records


def test_merging() -> None:
    two = {"role": "system", "content": "Be kind."}
    assert merged_system([SYSTEM, two, user("x")]) == [user("Be brief.\nBe kind.\nx")]
    assert merged_system([user("x"), SYSTEM, user("y")]) == [user("x"), user("Be brief.\ny")]
    assert merged_system([SYSTEM, user(parts("x"))]) == [user([*parts("Be brief."), *parts("x")])]
    assert merged_system([user("x")]) is None
    assert merged_system([user("x"), SYSTEM]) is None
