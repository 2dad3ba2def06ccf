"""What the server makes of requests for the chat template: dates, parts, calls, reasoning."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.server.prompting import Prompter
from steermoe_local.server.schemas_chat import ChatRequest
from tests.support.templated import DATED, NO_SYSTEM, models

_REQUEST = TypeAdapter(ChatRequest)
CALLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.thinking }}"
    "{% for c in m.tool_calls %}<{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}"
    "{% endfor %}>{% endfor %}{% endif %}{% endfor %}"
)
TYPED = "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}({{ c['text'] }}){% endfor %}{% endfor %}"


class Desk:
    """Gives the prompt of a request under a template."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self._model = models(folder, tiny)

    @contextmanager
    def open(self, template: str, **settings: Any) -> Iterator[Any]:
        with vocabulary(self._model(template)) as model:
            engine: Any = SimpleNamespace(renderer=Renderer(model), model=model, n_ctx=1 << 16)
            prompter = Prompter(engine, thinking=False, template_arguments={}, **settings)
            try:
                yield (
                    lambda *messages, **fields: (
                        prompter.chat(
                            _REQUEST.validate_python({"model": "m", "messages": list(messages), **fields})
                        ).rendered.text
                    )
                )
            finally:
                prompter.close()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Desk:
    return Desk(tmp_path_factory.mktemp("models"), tiny_path)


HI = {"role": "user", "content": "Hi."}


def test_the_date_is_that_of_the_request(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server runs for days; `serve --date` fixes it."""

    class Day(datetime.date):
        now = (2024, 2, 29)

        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return datetime.date(*cls.now)

    monkeypatch.setattr("steermoe_local.llama.template_date.datetime.date", Day)
    with desk.open(DATED) as prompt:
        assert "Today is 2024-02-29." in prompt(HI)
        Day.now = (2024, 3, 1)
        assert "Today is 2024-03-01." in prompt(HI)
    with desk.open(DATED, date=datetime.datetime(2025, 12, 1)) as prompt:
        assert "Today is 2025-12-01." in prompt(HI)


def test_a_round_of_calls(desk: Desk) -> None:
    """As an SDK sends it: null content, arguments as a text or none, reasoning where the template reads it."""

    def call(arguments: str) -> dict[str, Any]:
        made = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [made], "reasoning_content": "Hm."}

    result = {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."}
    with desk.open(CALLS) as prompt:
        assert prompt(HI, call('{"city": "Oslo"}'), result) == "[user]Hi.[assistant]Hm.<weather city=Oslo>[tool]Sunny."
        assert prompt(HI, call(""), result) == "[user]Hi.[assistant]Hm.<weather>[tool]Sunny."


def test_parts(desk: Desk) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    with desk.open(TYPED) as prompt:
        assert prompt(parts) == "[user](a)(b)"
        assert prompt(HI) == "[user](Hi.)"
    with desk.open(CALLS) as prompt:
        assert prompt(parts) == "[user]a\nb"


def test_a_refused_system_message_is_logged_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with desk.open(NO_SYSTEM) as prompt, caplog.at_level(logging.WARNING):
        for _ in range(2):
            text = prompt({"role": "system", "content": "Be brief."}, HI)
            assert text == "<|user|>Be brief.\nHi.<|end|><|assistant|>"
    assert [record.name for record in caplog.records] == ["steermoe.prompts"]
