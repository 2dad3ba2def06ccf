"""Texts, models and helpers of the tests of the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.support.running_server import Running

QUESTION = "Which number comes after three?"
COUNT = "Count from three to nine."
REFUSED = "the server responded with a status of"  # what a browser says of an answer that is not 2xx
OFF = "net::ERR_"
MARKUP = "<img src=x onerror=\"alert(1)\"><script>alert(2)</script><b onclick='alert(3)'>b</b>"


def table(server: Running, name: str = "digits-words", **choice: Any) -> Any:
    response = server.client.get(f"/v1/steering/{name}/map", params=choice)
    assert response.status_code == 200, response.text
    return response.json()


@contextmanager
def registered(server: Running, *bodies: dict[str, Any]) -> Iterator[None]:
    """Names that are there while the block lasts; within it they may go."""
    for body in bodies:
        response = server.client.post("/v1/steering", json=body)
        assert response.status_code == 201, response.text
    try:
        yield
    finally:
        for body in bodies:
            server.client.delete(f"/v1/steering/{body['name']}")


def sse(*chunks: dict[str, Any], end: str = "") -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def marked(parts: Sequence[tuple[str, int | None, bool]], applied: Any, *, n_prompt: int = 9) -> str:
    """A whole stream that says what was steered: parts (text, rule, whether it is reasoning), each one token."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"reasoning_content" if thought else "content": text}, "rule": rule}]}
        for text, rule, thought in parts
    ]
    chunks[0]["steering"] = applied
    last = {"choices": [{"delta": {}, "rule": None, "finish_reason": "stop", "seed": 7}], "steering": applied}
    usage = {"choices": [], "usage": {"prompt_tokens": n_prompt, "completion_tokens": len(parts)}}
    return sse(*chunks, last, usage, end="data: [DONE]\n\n")
