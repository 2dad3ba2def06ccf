"""Fields of requests that clients are known to send and that are no field here: harmless ones, and refused ones.

`IGNORED` are dropped, because the answer is the same without them. `NOT_OFFERED` would change the answer, so they are
refused, unless their value asks for nothing. Any other unknown field is refused as unknown. docs/server.md shows both
tables (`ignored_table`, `not_offered_table`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Place = Literal[
    "request",
    "stream_options",
    "message",
    "content part",
    "tool",
    "function",
    "tool call",
    "call",
    "responses request",
    "item",
    "responses tool",
]
"""The objects of a request. "function" is that of a tool, "call" that of a tool call; an item is one of responses."""

# What holds for these places, too.
_ALSO: dict[Place, tuple[Place, ...]] = {
    "responses request": ("request",),
    "responses tool": ("tool", "function"),
}


@dataclass(frozen=True)
class Ignored:
    """Fields of an object that have no effect, and why the answer is the same without them."""

    place: Place
    names: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class NotOffered:
    """Fields that would change the answer. `nothing` are the values that do not, besides null; `cure` what to send."""

    place: Place
    names: tuple[str, ...]
    nothing: tuple[Any, ...]
    cure: str


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PROVIDERS = "provider_options providerOptions provider_metadata providerMetadata experimental_providerMetadata"
_PROVIDERS += " provider_specific_fields extra_content"
_SENT_BACK = "what came with an answer that is sent back"
_HINTS = "hints for a provider"

IGNORED = (
    Ignored(
        "request",
        _names(
            "user metadata store safety_identifier service_tier prompt_cache_key prompt_cache_retention "
            "prompt_cache_options tags trace session_id chat_id request_id litellm_session_id"
        ),
        "who asks, what for, and how it is accounted; nothing is stored",
    ),
    Ignored(
        "request",
        _names("prediction draft_model speculative.n_max speculative.n_min speculative.p_min speculative.type"),
        "it would only make the same answer faster",
    ),
    Ignored("request", _names("verbosity"), "a wish that no local model knows"),
    Ignored(
        "request",
        _names("id_slot n_cache_reuse n_keep n_discard backend_sampling keep_alive ttl priority cache_salt slot_id"),
        "slots, memory and order of work; answers end at the end of the context, and nothing is shifted",
    ),
    Ignored(
        "request",
        _names(
            "timings_per_token return_progress sse_ping_interval verbose response_fields usage include_reasoning "
            "return_token_ids return_tokens_as_token_ids"
        ),
        "what else is reported, and when",
    ),
    Ignored(
        "request",
        _names("provider models route transforms"),
        "which of several providers or models answers (OpenRouter); there is one here",
    ),
    Ignored("stream_options", _names("include_obfuscation continuous_usage_stats"), "nothing is padded; usage is last"),
    Ignored(
        "message",
        _names(
            "id object type model created created_at createdAt timestamp updated_at status index usage finish_reason "
            "stop_reason logprobs metadata response_metadata parsed annotations citations images is_error tool_name "
            "message_id messageId conversation_id trace_id traceId agent sender source opts injected extra_fields "
            f"cache_control prompt_cache_breakpoint thinking_blocks reasoning_details reasoning_signature {_PROVIDERS}"
        ),
        f"{_SENT_BACK}, besides its text, reasoning and calls",
    ),
    Ignored(
        "content part",
        _names(
            "id index annotations citations logprobs parsed status cache_control prompt_cache_breakpoint signature "
            f"thought_signature encrypted_content {_PROVIDERS}"
        ),
        _SENT_BACK,
    ),
    Ignored("tool", _names(f"cache_control defer_loading strict {_PROVIDERS}"), _HINTS),
    Ignored("function", _names(f"cache_control output_schema returns annotations {_PROVIDERS}"), _HINTS),
    Ignored(
        "tool call",
        _names(f"index status cache_control thought_signature parsed_arguments {_PROVIDERS}"),
        _SENT_BACK,
    ),
    Ignored("call", _names(f"parsed_arguments thought_signature {_PROVIDERS}"), _SENT_BACK),
    Ignored(
        "responses request",
        _names("client_metadata max_tool_calls access_programs"),
        "who asks, or a bound on tools that are not here",
    ),
    Ignored(
        "item",
        _names(
            f"status phase namespace caller created_by parsed_arguments encrypted_content cache_control {_PROVIDERS}"
        ),
        _SENT_BACK,
    ),
    Ignored("responses tool", _names("allowed_callers"), "there are no programs that call"),
)

NOT_OFFERED = (
    NotOffered("request", ("functions",), (), "send tools"),
    NotOffered("request", ("function_call",), (), "send tool_choice"),
    NotOffered("request", ("audio", "web_search_options", "moderation"), (), "leave it out"),
    NotOffered("request", ("plugins", "lora", "documents", "files"), ([],), "leave it out"),
    NotOffered("request", ("suffix",), ("",), "leave it out; text between a prompt and a suffix is not offered"),
    NotOffered("request", ("best_of",), (1,), "leave it out, or send n"),
    NotOffered(
        "request",
        (
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "structured_outputs",
            "grammar_triggers",
            "grammar_lazy",
        ),
        (False,),
        "send response_format with a JSON Schema",
    ),
    # some grammars take llama.cpp minutes per token; those made of a JSON Schema are checked for it
    NotOffered("request", ("grammar",), ("",), "send response_format with a JSON Schema"),
    NotOffered("request", ("format",), ("",), "send response_format"),
    NotOffered("request", ("options",), ({},), "send its fields beside messages"),
    NotOffered("request", ("num_ctx",), (), "start the server with -c"),
    NotOffered("request", ("chat_template",), (), "start the server with a model that has it"),
    NotOffered("request", ("mirostat_mode",), (0,), "send mirostat"),
    NotOffered("request", ("tfs_z",), (1,), "leave it out; llama.cpp has no tail-free sampling any more"),
    NotOffered("request", ("penalize_nl",), (True,), "leave it out; a newline counts as any token"),
    NotOffered("request", ("min_tokens",), (0,), "send ignore_eos with max_tokens"),
    NotOffered("request", ("stop_token_ids", "bad_words", "allowed_token_ids"), ([],), "send stop or logit_bias"),
    NotOffered("request", ("use_beam_search", "early_stopping"), (False,), "leave it out"),
    NotOffered("request", ("length_penalty",), (1,), "leave it out; it belongs to beam search"),
    NotOffered("request", ("skip_special_tokens", "spaces_between_special_tokens"), (True,), "leave it out"),
    NotOffered("request", ("include_stop_str_in_output", "post_sampling_probs"), (False,), "leave it out"),
    NotOffered("request", ("prompt_logprobs",), (0,), "send echo with logprobs to /v1/completions"),
    NotOffered("request", ("truncate_prompt_tokens",), (-1,), "shorten the prompt"),
    NotOffered("request", ("t_max_predict_ms",), (0, -1), "send max_tokens, or start the server with --timeout"),
    NotOffered("request", ("n_indent",), (0,), "leave it out"),
    NotOffered(
        "request",
        ("reasoning_budget_tokens", "thinking_budget_tokens", "reasoning_budget", "thinking_budget"),
        (-1,),
        "send reasoning_effort or chat_template_kwargs",
    ),
    NotOffered("request", ("parse_tool_calls",), (True,), "send tool_choice none"),
    NotOffered("responses request", ("background",), (False,), "send stream: true, or wait for the answer"),
    NotOffered("responses request", ("conversation",), (), "send the items, or previous_response_id"),
    NotOffered("responses request", ("prompt",), (), "send instructions and input"),
    NotOffered("responses request", ("context_management",), ([],), "leave it out"),
    NotOffered("message", ("audio",), (), "send its transcript as content"),
    NotOffered("message", ("function_call",), (), "send tool_calls"),
)


def ignored(place: Place) -> dict[str, str]:
    """The harmless fields of an object, with why."""
    places = (place, *_ALSO.get(place, ()))
    return {name: row.why for row in IGNORED if row.place in places for name in row.names}


def not_offered(place: Place) -> dict[str, NotOffered]:
    """The refused fields of an object."""
    places = (place, *_ALSO.get(place, ()))
    return {name: row for row in NOT_OFFERED if row.place in places for name in row.names}


def asks_for_nothing(value: Any, row: NotOffered) -> bool:
    """Whether a refused field has a value that changes nothing."""
    return value is None or any(value == plain and _is_bool(value) == _is_bool(plain) for plain in row.nothing)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _cells(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def ignored_table() -> str:
    """`IGNORED` in Markdown."""
    rows = [(row.place, _code(row.names), row.why) for row in IGNORED]
    return _cells(rows, ("in", "accepted, without effect", "because"))


def not_offered_table() -> str:
    """`NOT_OFFERED` in Markdown."""
    rows = [
        (row.place, _code(row.names), _code([json.dumps(value) for value in (None, *row.nothing)]), row.cure)
        for row in NOT_OFFERED
    ]
    return _cells(rows, ("in", "refused", "but", "instead"))


def document(schema: dict[str, Any], place: Place, own: Collection[str]) -> None:
    """Add the fields of both tables to the JSON Schema of an object; `own` are the fields that it has."""
    properties = schema.setdefault("properties", {})
    for name, why in ignored(place).items():
        if name not in own:
            properties[name] = {"description": f"Accepted, without effect: {why}."}
    for name, row in not_offered(place).items():
        if name not in own:
            properties[name] = {"enum": [None, *row.nothing], "description": f"Not offered: {row.cure}."}
