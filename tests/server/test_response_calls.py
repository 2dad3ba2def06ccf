"""Tool calls that a model chooses to make, as items and events of a response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.test_tool_calls import PARAMETERS, QUESTION, SAID, saying
from tests.support.chat_templates import source

TOOLS: Any = [
    {"type": "function", "name": name, "description": "It does.", "parameters": PARAMETERS}
    for name in ("get_weather", "stop")
]


@pytest.mark.parametrize("name", ["call", "content and call", "thought and call", "harmony"])
def test_a_round_of_calls_that_the_model_chose(tmp_path: Path, name: str) -> None:
    template, text, reasoning, content = SAID[name]
    http = openai.DefaultHttpxClient(trust_env=False)
    with (
        saying(text, source(template), tmp_path) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        fields: Any = {"model": "tiny", "tools": TOOLS, "max_output_tokens": 600}
        if name == "harmony":
            fields["reasoning"] = {"effort": "high"}
        response = client.responses.create(input=QUESTION, **fields)
        kinds = ["reasoning"] * (reasoning is not None) + ["message"] * (content is not None) + ["function_call"]
        assert [item.type for item in response.output] == kinds
        call: Any = response.output[-1]
        assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Rome"}, "completed")
        if content is not None:
            assert response.output_text == content
        if reasoning is not None:
            thought: Any = response.output[0]
            assert thought.content[0].text == reasoning
        with client.responses.stream(input=QUESTION, **fields) as stream:
            final = stream.get_final_response()
        assert [item.type for item in final.output] == kinds
        assert final.output[-1].arguments == call.arguments  # type: ignore[union-attr]
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
        user: Any = {"role": "user", "content": QUESTION}
        again = client.responses.create(input=[user, *response.output, output], **fields)
        by_id = client.responses.create(input=[output], previous_response_id=response.id, **fields)
        assert again.usage is not None
        assert by_id.usage is not None
        assert again.usage.input_tokens == by_id.usage.input_tokens > response.usage.input_tokens  # type: ignore[union-attr]
