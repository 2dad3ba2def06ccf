"""The body of chat/completions: messages, tools, response formats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from .schemas import Body, Generation, Short, Text

_KNOWN_PARTS = ("text",)
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ContentPart(Body):
    """A part of a message; only text is read."""

    type: Short
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, max_length=16, description="Accepted, without effect.")
    cache_control: dict[str, Any] | None = Field(None, max_length=16, description="Accepted, without effect.")

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind not in _KNOWN_PARTS:
            raise ValueError(f"parts of type {kind[:40]!r} are not offered; this server reads text")
        return value


class FunctionCall(Body):
    """The call that an assistant made."""

    name: FunctionName
    arguments: Text


class ToolCall(Body):
    """A call in an assistant's message."""

    id: Short
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, ge=0, le=1024, description="Accepted, as streams give it.")


class Message(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: Short | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Short | None = None
    reasoning_content: Text | None = Field(None, description="An assistant's reasoning, given to the template.")
    # An answer may be sent back as it came.
    refusal: Text | None = Field(None, description="Accepted, without effect.")
    annotations: list[Any] | None = Field(None, max_length=128, description="Accepted, without effect.")
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant calls tools")
        return self

    @property
    def text(self) -> str:
        """The content as one text; parts stand on lines of their own, as in llama.cpp."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class Function(Body):
    """A function that may be called."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Its name."""

    name: FunctionName


class ToolChoice(Body):
    """A function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The schema of response_format."""

    name: Short | None = None
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text, json_object or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Of json_object, as llama-cpp-python.")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema goes with the type json_object")
        return self


class ChatRequest(Generation):
    """POST /v1/chat/completions: answer a conversation through the model's chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Short | None = Field(None, description="For templates that read it.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Variables for the chat template, as in llama.cpp."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls the first one is given.")
    verbosity: Short | None = Field(None, description="Accepted, without effect.")
    prediction: dict[str, Any] | None = Field(None, max_length=16, description="Accepted, without effect.")
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    # Fields that would change the answer are refused, not ignored; null is accepted, as clients send it.
    functions: None = Field(None, description="Not offered: send tools.")
    function_call: None = Field(None, description="Not offered: send tool_choice.")
    audio: None = Field(None, description="Not offered.")
    web_search_options: None = Field(None, description="Not offered.")
    moderation: None = Field(None, description="Not offered.")

    @field_validator("functions", "function_call", "audio", "web_search_options", "moderation", mode="before")
    @classmethod
    def _not_offered(cls, value: Any, info: ValidationInfo) -> None:
        if value is not None:
            instead = {"functions": "send tools", "function_call": "send tool_choice"}
            raise ValueError(f"not offered; {instead.get(info.field_name or '', 'leave it out')}")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variable_names(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in value or {}:
            if not name.isidentifier():
                raise ValueError(f"{name[:40]!r} is no name of a variable")
        return value

    @model_validator(mode="after")
    def _chat_goes_together(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if isinstance(self.tool_choice, ToolChoice) or self.tool_choice == "required":
            names = [tool.function.name for tool in self.tools or ()]
            if not names:
                raise ValueError("tool_choice: there are no tools to choose from")
            if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} is none of the tools")
            if self.response_format is not None and self.response_format.type != "text":
                raise ValueError("a forced tool call and a response_format exclude each other")
        return self
