"""Steerings of the embedded model by request, the biases that they mean, and what the server answers."""

from __future__ import annotations

from typing import Any

from steermoe_local import BiasFile, ExpertMap
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support.running_server import Running

__all__ = ["DIGITS", "DOCUMENT", "WORDS", "bias_of", "messages", "post", "text_of"]

DIGITS = {"map": "digits-words", "activate": 2, "deactivate": 2}
WORDS = DIGITS | {"reverse": True}
DOCUMENT = {"map": "document-memory", "activate": 4, "deactivate": 4}


def messages(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def bias_of(choice: dict[str, Any]) -> BiasFile:
    """The bias that a choice means, built without the server."""
    expert_map = ExpertMap.load(shipped_maps()[choice["map"]])
    layers = None
    if "layers" in choice:
        first, last = choice["layers"].split("-")
        layers = range(int(first), int(last) + 1)
    signs = expert_map.choose(
        choice["activate"], choice["deactivate"], reverse=choice.get("reverse", False), layers=layers
    )
    if choice.get("mode") == "soft":
        return BiasFile.from_soft(signs, expert_map.identity, choice["scale"])
    return BiasFile.from_signs(signs, expert_map.identity)


def post(server: Running, **body: Any) -> Any:
    return server.client.post("/v1/steering", json=body)
