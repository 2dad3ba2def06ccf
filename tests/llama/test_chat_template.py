"""The environment of chat templates: transformers' settings, what llama.cpp permits, hostile templates, dates."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steermoe_local.errors import ModelError, UsageError
from steermoe_local.llama.chat_template import ChatTemplate
from steermoe_local.llama.template_client import BoundedTemplate, template_problem, template_variables
from steermoe_local.llama.template_date import TemplateDate, other_date, template_date

DAY = template_date("2024-02-29")
USER = [{"role": "user", "content": "Hi."}]


def rendered(source: str, messages: Any = USER, *, date: TemplateDate = DAY, **variables: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages, add_generation_prompt=True, variables=variables, date=date)


#
# the environment
#


def as_transformers(source: str, **variables: Any) -> str:
    """By transformers' own settings (its utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if m.content %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{{ '<é & \"x\">' | tojson }} {{ '<é>' }}",
        "{{ bos_token }}{% if add_generation_prompt %}A{% endif %}{{ nothing }}{{ messages[0].nothing }}",
        "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_settings_of_transformers(source: str) -> None:
    messages = [*USER, {"role": "assistant", "content": "né <b> & 'c'"}]
    wanted = as_transformers(source, messages=messages, bos_token="<s>", add_generation_prompt=True)
    assert rendered(source, messages) == wanted


def test_a_template_is_compiled_once_in_each_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes far longer than rendering, also of one that only llama.cpp's reading renders."""
    compiled = []
    original = jinja2.Environment.from_string
    monkeypatch.setattr(
        jinja2.Environment, "from_string", lambda self, source: compiled.append(source) or original(self, source)
    )
    template = ChatTemplate("{{ 'a' + nothing }}{{ messages[0].content }}", {})
    for _ in range(3):
        assert template.render(USER, add_generation_prompt=True, variables={}, date=DAY) == "aHi."
    assert len(compiled) == 2


def test_marks_of_generated_text_are_left_out() -> None:
    assert rendered("{% generation %}a{{ messages[0].content }}{% endgeneration %}b") == "aHi.b"


def test_lists_can_be_changed() -> None:
    """As in llama.cpp; the caller's messages stay as they are."""
    source = "{% set l = [] %}{% for i in range(3) %}{% set _ = l.append(i) %}{% endfor %}{{ l.pop() }}{{ l }}"
    assert rendered(source) == "2[0, 1]"
    messages = [{"role": "user", "content": ["a"]}]
    assert rendered("{% set _ = messages[0].content.append('b') %}{{ messages[0].content|length }}", messages) == "2"
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ [].append.__self__.__class__ }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__.__class__.__base__ }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ [1].clear() }}{{ [1].extend([2]) }}",
        "{% set l = [1] %}{% for x in l %}{% set _ = l.append(x) %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'x' %}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ 10 ** 11 * [0] }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%99999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% import 'os' as os %}",
    ],
)
def test_hostile_templates(source: str) -> None:
    """Nothing of Python comes out, nothing is changed outside, no loop runs for ever."""
    try:
        text = rendered(source)
    except (jinja2.TemplateError, OverflowError, TypeError, RecursionError):
        return
    assert text == ""


def test_nothing_runs_while_a_template_is_only_read() -> None:
    """`steermoe info` compiles templates of any file."""
    assert template_problem("{{ 'x' | center(10 ** 12) }}{{ 'x' * 10 ** 12 }}") is None


def test_operators() -> None:
    assert rendered("{{ 'ab' * 3 }}{{ 2 * 'c' }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ 3 * 4 }}") == "abababcc 1024 3 12"
    assert rendered("{{ '%05d|%s' % (42, 'x') }}") == "00042|x"


def test_json_of_a_generator() -> None:
    assert rendered("{{ messages | map(attribute='role') | tojson }}") == '["user"]'
    assert rendered("{{ {'a': 1}.items() | tojson }}") == '[["a", 1]]'
    with pytest.raises(TypeError):
        rendered("{{ [raise_exception] | tojson }}")


def test_sums_with_nothing() -> None:
    """transformers gives up, so llama.cpp's way is taken; elsewhere an undefined value stays an error."""
    assert rendered("{{ 'a' + nothing + 'b' + none }}") == "ab"
    with pytest.raises(jinja2.UndefinedError):
        rendered("{{ nothing() }}")
    with pytest.raises(TypeError):
        rendered("{{ 'a' + 1 }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% if x %}",
        "{{ x ",
        "{{ x | nosuch }}",
        "{% nosuch %}",
        "{% if x %}" * 200 + "{% endif %}" * 200,
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    ],
)
def test_a_text_that_is_no_template(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTemplate(source, {})
    assert "\n" not in str(caught.value)
    assert "--raw" in str(caught.value)
    assert template_problem(source) == str(caught.value)
    assert not template_variables(source) - {"x"}  # it is asked before a template is rendered, and raises nothing


def test_variables() -> None:
    source = "{% set a = b %}{{ a }}{{ strftime_now('%Y') }}{% for m in messages %}{{ m }}{% endfor %}"
    assert template_variables(source) == {"b", "strftime_now", "messages"}
    assert template_problem(source) is None
    assert rendered("{{ tools is defined }}{{ tools }}") == "False"


#
# dates
#

CLOCK = "{{ strftime_now('%d %B %Y, %H:%M') }}"
LLAMA_31 = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
LLAMA_32 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d/%m/%y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}"
)
FIREFUNCTION = "{{ 'Today is ' + datetime }}"
NONE = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("source", "given", "by_itself"),
    [
        (CLOCK, "29 February 2024, 00:00", "29 February 2024, 00:00"),
        (LLAMA_31, "29 Feb 2024", "26 Jul 2024"),
        (LLAMA_32, "29/02/24", "29/02/24"),
        (FIREFUNCTION, "Today is Feb 29 2024", "Today is Feb 29 2024"),
        (NONE, "Hi.", "Hi."),
    ],
)
def test_dates(source: str, given: str, by_itself: str) -> None:
    """By the clock of transformers; llama.cpp's variables where the template needs them, or a user gave the date."""
    template = BoundedTemplate(source, {})
    for date, wanted in ((DAY, given), (TemplateDate(DAY.day, given=False), by_itself)):
        assert rendered(source, date=date) == wanted
        assert template.reads(date) == (source != NONE and "26 Jul" not in wanted)
    assert rendered(source, date_string="mine", datetime="mine") == (
        {LLAMA_31: "mine", LLAMA_32: "mine", FIREFUNCTION: "Today is mine"}.get(source, given)
    )


def test_what_is_a_date() -> None:
    day = datetime.date(2024, 2, 29)
    assert template_date("2024-02-29") == template_date(day) == TemplateDate(day)
    assert template_date(datetime.datetime(2024, 2, 29, 23, 59)) == TemplateDate(day)
    assert template_date(TemplateDate(day, given=False)) == TemplateDate(day, given=False)
    today = template_date(None)
    assert not today.given
    assert abs((today.day - datetime.date.today()).days) <= 1
    for text in ("2023-02-29", "20240229", "2024-W09-4", "29.02.2024", "", "today", "2024-02-29T00:00", "٢٠٢٤-02-29"):
        with pytest.raises(UsageError, match="date"):
            template_date(text)


def test_another_date_is_named_with_the_cure() -> None:
    assert "--date 2024-02-29" in other_date("2024-02-29", "2024-03-01")
    assert "2024-03-01" in other_date("2024-02-29", "2024-03-01")
    assert "--date 2024-02-29" in other_date("2024-02-29", None)
    assert "--date" in other_date(None, "2024-03-01")
