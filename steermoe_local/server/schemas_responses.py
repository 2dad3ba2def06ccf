"""The body of responses: tools in their flat form, formats of the text, and what else a request has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..generation.bounds import MAX_MESSAGES
from .known_fields import Place
from .schemas import Generation
from .schemas_base import Body, Short, Text
from .schemas_items import Id, Item, kind_of
from .schemas_messages import FunctionName

_WITHOUT_EFFECT = "Accepted, without effect."
_TOOLS_NAMED = 8  # in a message


#
# tools
#


class FunctionTool(Body):
    """A function that may be called."""

    place: ClassVar[Place | None] = "responses tool"

    type: Literal["function"]
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


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
    Discriminator(lambda value: "FunctionTool" if kind_of(value) == "function" else "HostedTool"),
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
    Discriminator(lambda value: _TOOLS.get(kind_of(value), "HostedTool")),
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


class ReasoningConfig(Body):
    """How the model reasons."""

    effort: Short | None = Field(None, description="For templates that read it; none: no reasoning.")
    summary: Short | None = Field(None, description="Accepted, without effect: the reasoning itself is given.")
    generate_summary: Short | None = Field(None, description=_WITHOUT_EFFECT)
    context: Short | None = Field(None, description=_WITHOUT_EFFECT)
    mode: Short | None = Field(None, description=_WITHOUT_EFFECT)


_INSTEAD = {
    "n": "a response is one answer; send several requests",
    "n_cmpl": "a response is one answer; send several requests",
    "max_tokens": "not offered; send max_output_tokens",
    "n_predict": "not offered; send max_output_tokens",
    "n_probs": "not offered; send top_logprobs",
    "return_tokens": "not offered; leave it out",
}


class ResponsesRequest(Generation):
    """POST /v1/responses: answer a conversation of items through the model's chat template."""

    place: ClassVar[Place | None] = "responses request"

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input; not kept for later.")
    previous_response_id: Id | None = Field(None, description="A kept response, whose items come before the input.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="With the reasoning.")
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
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
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls the first one is given.")
    continue_final_message: bool | Literal["content", "reasoning_content"] | None = Field(
        None, description="Whether a last message of the assistant is continued; it is, unless this is false."
    )
    # Of chat completions, and not here; null is accepted.
    n: Literal[1] | None = Field(None, description="Only 1.")
    n_cmpl: Literal[1] | None = Field(None, description="Only 1.")
    max_tokens: None = Field(None, description="Not offered: send max_output_tokens.")
    n_predict: None = Field(None, description="Not offered: send max_output_tokens.")
    n_probs: None = Field(None, description="Not offered: send top_logprobs.")
    return_tokens: Literal[False] | None = Field(None, description="Not offered.")

    @field_validator(*_INSTEAD, mode="before")
    @classmethod
    def _not_offered(cls, value: Any, info: ValidationInfo) -> Any:
        field = info.field_name or ""
        if value is None or value is False or (field in ("n", "n_cmpl") and value == 1):
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
