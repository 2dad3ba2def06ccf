"""Answers in OpenAI's JSON, whole and as chunks of a stream, in the form of llama_cpp.llama_types.

Fields beyond OpenAI's: `steering` (what was applied), `routing` (the experts that were selected), `timings`, and `seed`
of each choice. `sglext` is SGLang's (routed_experts.py).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._util.files import tool_name
from ..generation.engine import FinishEvent
from .answers import Entry
from .prompting import decode_token
from .registered import Applied

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_cpp.llama_types import (
        ChatCompletionLogprobs,
        ChatCompletionLogprobToken,
        ChatCompletionTopLogprobToken,
        CompletionLogprobs,
    )

FINGERPRINT = tool_name().replace(" ", "-")


@dataclass(frozen=True)
class Head:
    """The fields that an answer and all its chunks begin with."""

    prefix: str  # of the id
    kind: str  # object
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON object."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }


def usage(prompts: Sequence[Sequence[FinishEvent]]) -> dict[str, Any]:
    """The usage field. `prompts` holds the answers of each prompt; a prompt answered n times counts once."""
    n_prompt = sum(answers[0].n_prompt for answers in prompts)
    n_answer = sum(finish.n_generated for answers in prompts for finish in answers)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(answers[0].n_cached for answers in prompts)},
    }


def steering_info(applied: Applied, finish: FinishEvent | None = None) -> dict[str, Any] | None:
    """The steering field: what was applied, None for nothing.

    With the end of an answer: `n_cached` prompt tokens were in memory, and `n_steered` tokens of it were steered.
    """
    if applied.info is None:
        return None
    counts = {} if finish is None else {"n_cached": finish.n_cached, "n_steered": finish.n_steered}
    return dict(applied.info) | counts


def timings(finish: FinishEvent) -> dict[str, Any]:
    """The timings field, with the names of llama-server."""
    return {
        "cache_n": finish.n_cached,
        "prompt_n": finish.n_prompt - finish.n_cached,
        "prompt_ms": round(1000 * finish.prompt_seconds, 3),
        "predicted_n": finish.n_generated,
        "predicted_ms": round(1000 * finish.seconds, 3),
    }


def chat_logprobs(entries: Sequence[Entry], piece: Callable[[int], bytes]) -> ChatCompletionLogprobs:
    """The logprobs field of a chat's choice."""

    def token(id_: int, logprob: float) -> ChatCompletionTopLogprobToken:
        data = piece(id_)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content: list[ChatCompletionLogprobToken] = [
        {**token(entry.token, entry.logprob or 0.0), "top_logprobs": [token(*other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[Entry], piece: Callable[[int], bytes]) -> CompletionLogprobs:
    """The logprobs field of a completion's choice."""
    return {
        "tokens": [decode_token(piece(entry.token)) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top(entry, piece) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top(entry: Entry, piece: Callable[[int], bytes]) -> dict[str, float] | None:
    """Log-probabilities of the likeliest tokens and the drawn one by their texts; of two equal texts, the likelier."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        top.setdefault(decode_token(piece(token)), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    """At least -9999: JSON has no infinity, and OpenAI writes this for impossible tokens."""
    return max(logprob, -9999.0)
