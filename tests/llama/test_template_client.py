"""Chat templates in the child process: what comes back is what this process renders, byte for byte."""

from __future__ import annotations

import datetime
import enum
import json
import logging
import math
import subprocess
import sys
from typing import Any

import pytest

from steermoe_local.errors import ModelError, PairsError, UsageError
from steermoe_local.llama import template_worker
from steermoe_local.llama.chat_template import ChatTemplate, names_of
from steermoe_local.llama.locating import find_losses, knowing_roles, place_target
from steermoe_local.llama.template_client import BoundedTemplate, TemplateRefusal, template_facts
from steermoe_local.llama.template_date import template_date
from steermoe_local.llama.template_pool import TemplatePool
from steermoe_local.llama.template_values import packed, unpacked
from tests.support.chat_templates import NAMES, source
from tests.support.templated import NO_SYSTEM
from tests.test_layering import PACKAGE, imports

DAY = template_date("2024-02-29")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells <the> \"weather\" & 'more', né.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Zoslo", None, 1.5, -0.0, 1e300, 10**40]}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_0123456789",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Zo\\u00e9"}'},
}
QUESTION = {"role": "user", "content": "Is it sunny? 🌞 <|im_end|> \x00"}
CASES: dict[str, list[dict[str, Any]]] = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION],
    "developer": [{"role": "developer", "content": "Be brief."}, QUESTION],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}],
    "calls": [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "Quite sunny."},
    ],
    "long": [
        message
        for i in range(8)
        for message in ({"role": "user", "content": f"{i}, né? " * 500}, {"role": "assistant", "content": f"{i}."})
    ],
    "none": [],
}


def here(name: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Any:
    """(text, losses), or the refusal, of the template in this process."""
    template = ChatTemplate(source(name), TOKENS)

    def render(messages: list[dict[str, Any]]) -> str:
        return template.chat(messages, add_generation_prompt=True, variables=variables, date=DAY)

    try:
        whole = knowing_roles(render, messages, source(name))
        text = whole([dict(message) for message in messages])
        return text, tuple(find_losses(whole, messages, text))
    except Exception as error:
        return " ".join(str(error).split())[:300]


@pytest.mark.parametrize("name", NAMES)
def test_the_archive(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every template of llama.cpp's archive, with every kind of message, with and without tools."""
    template = BoundedTemplate(source(name), TOKENS)
    for case, messages in CASES.items():
        for variables in ({}, {"tools": [TOOL], "enable_thinking": False, "nothing": None}):
            wanted = here(name, messages, variables)
            found: Any
            try:
                found = template.text_and_losses(messages, add_generation_prompt=True, variables=variables, date=DAY)
            except TemplateRefusal as refusal:
                found = str(refusal)
            assert found == wanted, case
    names = names_of(source(name))
    facts = template_facts(source(name))
    assert facts.problem is None
    assert {"variables": facts.variables, "fields": facts.fields, "guarded": facts.guarded} == names
    assert template.reasoning_field == ChatTemplate(source(name), TOKENS).forms.reasoning_field


@pytest.mark.parametrize("name", NAMES[::7])
def test_places(name: str) -> None:
    messages = [{"role": "user", "content": "Count: né"}, {"role": "assistant", "content": "one, two"}]
    template, mine = BoundedTemplate(source(name), TOKENS), ChatTemplate(source(name), TOKENS)

    def render(messages: list[dict[str, Any]]) -> str:
        return mine.chat(messages, add_generation_prompt=False, variables={}, date=DAY)

    wanted = place_target(render, messages, "two", ["<|im_end|>"])
    assert template.placed(messages, "two", ["<|im_end|>"], variables={}, date=DAY) == wanted
    with pytest.raises(PairsError, match="three"):
        template.placed(messages, "three", [], variables={}, date=DAY)


class _Color(enum.StrEnum):
    RED = "red"


def test_values() -> None:
    """What JSON has no form of arrives as it is, too."""
    day = datetime.date(2024, 2, 29)
    values: dict[Any, Any] = {
        "dates": [day, datetime.datetime(2024, 2, 29, 1, 2, 3), datetime.time(4, 5)],
        "numbers": [0, -1, 10**30, 0.1, -0.0, 1e308, math.inf, True],
        "texts": ["", "\ud800\x00é🌞", "\0value"],
        "kinds": [None, (1, (2,)), {3}, frozenset({4}), {1: "a", None: {"b": ()}}, {"\0value": 1}],
    }
    back = unpacked(json.loads(json.dumps(packed(values))))
    assert back == values
    assert str(back) == str(values)
    assert math.isnan(unpacked(json.loads(json.dumps(packed(math.nan)))))
    assert packed(_Color.RED) == "red"
    template = BoundedTemplate("{{ x.a.strftime('%Y') }}{{ x.b }}{{ none_ is none }}{{ gone is defined }}{{ d }}", {})
    variables = {"x": {"a": day, "b": (1, 0.1)}, "none_": None, "d": {1: [None]}}
    text = template.text([], add_generation_prompt=True, variables=variables, date=DAY)
    assert text == "2024(1, 0.1)TrueFalse{1: [None]}"
    with pytest.raises(UsageError, match="object"):
        template.text([], add_generation_prompt=True, variables={"x": object()}, date=DAY)


def test_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": ["a"]}]
    template = BoundedTemplate("{% set _ = messages[0].content.append('b') %}{{ messages[0].content | length }}", {})
    assert template.text(messages, add_generation_prompt=True, variables={}, date=DAY) == "2"
    assert messages == [{"role": "user", "content": ["a"]}]


def test_errors_of_the_template() -> None:
    """Its words, in one line; a text that is no template is a ModelError."""
    template = BoundedTemplate("{{ raise_exception('no\\n such   role' ~ 'x' * 999) }}", {})
    with pytest.raises(TemplateRefusal) as caught:
        template.text([], add_generation_prompt=True, variables={}, date=DAY)
    assert str(caught.value).startswith("no such rolexxx")
    assert len(str(caught.value)) == 300
    with pytest.raises(ModelError, match="cannot be read"):
        BoundedTemplate("{{ x", {})


def test_warnings_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with caplog.at_level(logging.WARNING, "steermoe.prompts"):
        for _ in range(2):
            template = BoundedTemplate(NO_SYSTEM, {})
            for _ in range(2):
                template.text(messages, add_generation_prompt=True, variables={}, date=DAY)
    assert [record.name for record in caplog.records] == ["steermoe.prompts"] * 2


def test_a_fault_of_the_program_is_not_laid_on_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError("a fault")

    monkeypatch.setattr(template_worker, "find_losses", broken)
    monkeypatch.setattr(
        TemplatePool, "ask", lambda _, *request: template_worker.answer(*json.loads(json.dumps(request)))
    )
    template = BoundedTemplate("{{ messages }}", {})
    with pytest.raises(RuntimeError, match="LookupError: a fault"):
        template.text_and_losses([], add_generation_prompt=True, variables={}, date=DAY)


def test_a_child_keeps_some_templates() -> None:
    """Others are sent once more."""
    templates = [BoundedTemplate(f"{i} {{{{ x }}}}", {}) for i in range(template_worker._MOST_KEPT + 3)]
    for _ in range(2):
        texts = [one.text([], add_generation_prompt=True, variables={"x": 1}, date=DAY) for one in templates]
        assert texts == [f"{i} 1" for i in range(len(templates))]


def test_tokens_are_of_each_template() -> None:
    for token in ("<a>", "<b>", "<a>"):
        template = BoundedTemplate("{{ bos_token }}", {"bos_token": token})
        assert template.text([], add_generation_prompt=True, variables={}, date=DAY) == token


def test_only_the_child_compiles_templates() -> None:
    """In the package Jinja gets models' templates in one module, and that one is loaded by the child's module alone."""
    users: dict[str, set[str]] = {"jinja2": set(), "llama.chat_template": set(), "llama.template_worker": set()}
    for path in PACKAGE.rglob("*.py"):
        own, others = imports(path)
        for name in users.keys() & (own | others):
            users[name].add(path.relative_to(PACKAGE).as_posix())
    assert users == {
        "jinja2": {"llama/chat_template.py", "maps/cards.py"},  # the latter fills in the package's own
        "llama.chat_template": {"llama/template_worker.py"},
        "llama.template_worker": {"llama/template_pool.py"},
    }


def test_the_child_is_small() -> None:
    """It loads neither NumPy nor llama.cpp: it starts fast, and its limit of memory counts from little."""
    code = (
        "import sys, types; package = types.ModuleType('steermoe_local'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['steermoe_local'] = package; import steermoe_local.llama.template_worker; "
        "print([name for name in ('numpy', 'llama_cpp', 'gguf', 'ctypes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(PACKAGE)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
