"""The body of responses: items, tools in their flat form, formats of the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .schemas import Body, Generation, Short, Text
from .schemas_chat import FunctionName

_WITHOUT_EFFECT = "Accepted, without effect."
_TEXT_PARTS = ("input_text", "output_text", "text")
_TOOLS_NAMED = 8  # in a message

Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, StringConstraints(max_length=128)]


def _kind(value: Any) -> str:
    """The field `type` of JSON, or of what was made of it; "" if it is no text."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else ""


#
# items
#


class TextPart(Body):
    """A part of a message or of a tool's output."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    # An answer may be sent back as it came.
    annotations: list[Any] | None = Field(None, max_length=1024, description=_WITHOUT_EFFECT)
    logprobs: list[Any] | None = Field(None, description=_WITHOUT_EFFECT)
    parsed: Any = Field(None, description="Accepted, without effect: what an SDK made of the text.")
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)
    cache_control: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)


class RefusalPart(Body):
    """A refusal of another server's model."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """Its text."""
        return self.refusal


def _only_text(value: Any) -> Any:
    if (kind := _kind(value)) and kind not in (*_TEXT_PARTS, "refusal"):
        raise ValueError(f"parts of type {kind[:40]!r} are not offered; this server reads text")
    return value


Part = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[RefusalPart, Tag("RefusalPart")],
    Discriminator(lambda value: "RefusalPart" if _kind(value) == "refusal" else "TextPart"),
    BeforeValidator(_only_text),
]
Content = Text | Annotated[list[Part], Field(max_length=4096, fail_fast=True)]


class MessageItem(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Id | None = None
    status: Status | None = Field(None, description=_WITHOUT_EFFECT)
    phase: Short | None = Field(None, description=_WITHOUT_EFFECT)


class CallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Short
    name: FunctionName
    arguments: Text
    id: Id | None = None
    status: Status | None = Field(None, description=_WITHOUT_EFFECT)
    namespace: Short | None = Field(None, description=_WITHOUT_EFFECT)
    caller: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)
    parsed_arguments: Any = Field(None, description="Accepted, without effect: what an SDK made of the arguments.")


class OutputItem(Body):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: Short
    output: Content
    id: Id | None = None
    status: Status | None = Field(None, description=_WITHOUT_EFFECT)
    name: Short | None = Field(None, description=_WITHOUT_EFFECT)
    namespace: Short | None = Field(None, description=_WITHOUT_EFFECT)
    caller: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)


class ReasoningText(Body):
    """A text of the reasoning."""

    type: Literal["reasoning_text", "text"]
    text: Text


class SummaryText(Body):
    """A text of a summary of the reasoning."""

    type: Literal["summary_text"]
    text: Text


class ReasoningItem(Body):
    """Reasoning that came before an answer or a call."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(max_length=1024, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=1024, fail_fast=True)] | None = None
    encrypted_content: Text | None = Field(None, description="Accepted, without effect: nothing is encrypted here.")
    id: Id | None = None
    status: Status | None = Field(None, description=_WITHOUT_EFFECT)


class ReferenceItem(Body):
    """An item of a response that the server keeps."""

    type: Literal["item_reference"]
    id: Id


_ITEMS = {
    "message": "MessageItem",
    "function_call": "CallItem",
    "function_call_output": "OutputItem",
    "reasoning": "ReasoningItem",
    "item_reference": "ReferenceItem",
}


def _known_item(value: Any) -> Any:
    if (kind := _kind(value)) and kind not in _ITEMS:
        raise ValueError(f"items of type {kind[:40]!r} are not offered; there are {', '.join(_ITEMS)}")
    return value


Item = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[OutputItem, Tag("OutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[ReferenceItem, Tag("ReferenceItem")],
    Discriminator(lambda value: _ITEMS.get(_kind(value), "MessageItem")),
    BeforeValidator(_known_item),
]


#
# tools
#


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = Field(None, description=_WITHOUT_EFFECT)
    allowed_callers: list[Short] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)
    output_schema: dict[str, Any] | None = Field(None, description=_WITHOUT_EFFECT)


# What OpenAI's own machines do, or what needs a model made for it. Clients send these to any server.
HOSTED_TOOLS = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)


class HostedTool(Body):
    """A tool that this server does not have. The model is not shown it, and `tools` of the response leaves it out."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    type: Annotated[str, Field(json_schema_extra={"enum": list(HOSTED_TOOLS)})]

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in HOSTED_TOOLS:
            raise ValueError(f"{value[:40]!r} is no type of a tool; send tools of type function")
        return value


PlainTool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")] | Annotated[HostedTool, Tag("HostedTool")],
    Discriminator(lambda value: "FunctionTool" if _kind(value) == "function" else "HostedTool"),
]


class NamespaceTool(Body):
    """Functions under a common name."""

    type: Literal["namespace"]
    name: Short
    description: Text | None = None
    tools: Annotated[list[PlainTool], Field(max_length=128, fail_fast=True)]


_TOOLS = {"function": "FunctionTool", "namespace": "NamespaceTool"}
Tool = Annotated[
    Annotated[FunctionTool, Tag("FunctionTool")]
    | Annotated[NamespaceTool, Tag("NamespaceTool")]
    | Annotated[HostedTool, Tag("HostedTool")],
    Discriminator(lambda value: _TOOLS.get(_kind(value), "HostedTool")),
]


class FunctionChoice(Body):
    """A function that has to be called."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(Body):
    """Which of the functions may, or have to, be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=128, fail_fast=True)]


#
# the request
#


class TextFormat(Body):
    """text, json_object or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Short | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("schema goes with the type json_schema")
        return self


class TextConfig(Body):
    """The form of the text."""

    format: TextFormat | None = None
    verbosity: Short | None = Field(None, description=_WITHOUT_EFFECT)


class Reasoning(Body):
    """How the model reasons."""

    effort: Short | None = Field(None, description="For templates that read it; none: no reasoning.")
    summary: Short | None = Field(None, description="Accepted, without effect: the reasoning itself is given.")
    generate_summary: Short | None = Field(None, description=_WITHOUT_EFFECT)
    context: Short | None = Field(None, description=_WITHOUT_EFFECT)
    mode: Short | None = Field(None, description=_WITHOUT_EFFECT)


_INSTEAD = {
    "n": "a response is one answer; send several requests",
    "max_tokens": "not offered; send max_output_tokens",
    "background": "not offered; send stream: true, or wait for the answer",
    "conversation": "not offered; send the items, or previous_response_id",
    "prompt": "not offered; send instructions and input",
    "context_management": "not offered; leave it out",
    "moderation": "not offered; leave it out",
}


class ResponsesRequest(Generation):
    """POST /v1/responses: answer a conversation of items through the model's chat template."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input; not kept for later.")
    previous_response_id: Id | None = Field(None, description="A kept response, whose items come before the input.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="With the reasoning.")
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Short] | None = Field(
        None, max_length=32, description="message.output_text.logprobs is known; the others are without effect."
    )
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: bool | None = Field(None, description="false: not kept in memory for previous_response_id.")
    metadata: Annotated[dict[str, Short], Field(max_length=16)] | None = Field(None, description="Given back.")
    user: Short | None = Field(None, description="Given back.")
    prompt_cache_key: Short | None = Field(None, description="Given back; beginnings of prompts are found without it.")
    safety_identifier: Short | None = Field(None, description="Given back.")
    service_tier: Short | None = Field(None, description=_WITHOUT_EFFECT)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="Accepted, without effect: a prompt that is too long is refused."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Variables for the chat template, as in llama.cpp."
    )
    parallel_tool_calls: bool | None = Field(None, description=_WITHOUT_EFFECT)
    max_tool_calls: int | None = Field(None, ge=0, le=2**31 - 1, description=_WITHOUT_EFFECT)
    client_metadata: dict[str, Any] | None = Field(None, max_length=64, description=_WITHOUT_EFFECT)
    access_programs: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)
    image: dict[str, Any] | None = Field(None, max_length=16, description=_WITHOUT_EFFECT)
    # Fields that would change the answer are refused, not ignored; null is accepted, as clients send it.
    background: Literal[False] | None = Field(None, description="Not offered.")
    n: Literal[1] | None = Field(None, description="Only 1.")
    max_tokens: None = Field(None, description="Not offered: send max_output_tokens.")
    conversation: None = Field(None, description="Not offered: send the items.")
    prompt: None = Field(None, description="Not offered: send instructions and input.")
    context_management: None = Field(None, description="Not offered.")
    moderation: None = Field(None, description="Not offered.")

    @field_validator(*_INSTEAD, mode="before")
    @classmethod
    def _not_offered(cls, value: Any, info: ValidationInfo) -> Any:
        field = info.field_name or ""
        if value is None or (field == "background" and value is False) or (field == "n" and value == 1):
            return value
        raise ValueError(_INSTEAD[field])

    @property
    def functions(self) -> dict[str, tuple[FunctionTool, str | None]]:
        """The functions by name, with their namespace. Raises ValueError for two of one name."""
        found: dict[str, tuple[FunctionTool, str | None]] = {}
        for tool, namespace in _flat(self.tools or ()):
            if isinstance(tool, FunctionTool):
                if tool.name in found:
                    raise ValueError(f"two functions have the name {tool.name!r}")
                found[tool.name] = tool, namespace
        return found

    @property
    def left_out(self) -> list[str]:
        """The types of the tools that the model is not shown."""
        kinds = (tool.type for tool, _ in _flat(self.tools or ()) if isinstance(tool, HostedTool))
        return list(dict.fromkeys(kinds))[:_TOOLS_NAMED]

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools without those that the model is not shown, as they were sent."""
        shown = (tool for tool in self.tools or () if not isinstance(tool, HostedTool))
        return [tool.model_dump(by_alias=True, exclude_unset=True) for tool in shown]

    @property
    def wants_logprobs(self) -> bool:
        """Are log probabilities asked for?"""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


def _flat(tools: Any, namespace: str | None = None) -> Iterator[tuple[FunctionTool | HostedTool, str | None]]:
    for tool in tools:
        if isinstance(tool, NamespaceTool):
            yield from _flat(tool.tools, tool.name)
        else:
            yield tool, namespace
