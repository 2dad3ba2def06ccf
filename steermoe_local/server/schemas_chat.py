"""The body of chat/completions: tools, response formats, reasoning; `schemas_messages` has the messages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ..generation.bounds import MAX_MESSAGES, MAX_TOKENS
from .known_fields import Place
from .schemas import Generation
from .schemas_base import Body, Short, Text, same
from .schemas_messages import FunctionName, Message

__all__ = [
    "ChatRequest",
    "Function",
    "FunctionName",
    "JsonSchema",
    "Message",
    "NamedFunction",
    "Reasoning",
    "ResponseFormat",
    "Thinking",
    "Tool",
    "ToolChoice",
]

Limit = Annotated[int, Field(ge=1, le=MAX_TOKENS)] | Literal[-1]


class Function(Body):
    """A function that may be called."""

    place: ClassVar[Place | None] = "function"

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are known."""

    place: ClassVar[Place | None] = "tool"

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
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text, json_object or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="Of json_object.")

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema goes with the type json_object")
        return self


class Reasoning(Body):
    """How much to reason, in OpenRouter's form."""

    effort: Short | None = None
    enabled: bool | None = None
    exclude: bool | None = Field(None, description="Accepted, without effect: reasoning has a field of its own.")
    summary: Short | None = Field(None, description="Accepted, without effect: the whole reasoning is given.")


class Thinking(Body):
    """Whether to think, in DeepSeek's form."""

    type: Literal["enabled", "disabled"]


class ChatRequest(Generation):
    """POST /v1/chat/completions: answer a conversation through the model's chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Limit | None = Field(None, description="-1: until the model ends, or the context is full.")
    max_completion_tokens: Limit | None = Field(None, description="The same under OpenAI's newer name.")
    n_predict: Limit | None = Field(None, description="The same under llama-server's name.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = Field(None, description="response_format's schema under llama-server's name.")
    reasoning_effort: Short | None = Field(None, description="For templates that read it.")
    reasoning: Reasoning | None = Field(None, description="reasoning_effort in OpenRouter's form.")
    enable_thinking: bool | None = Field(None, description="The template's switch for thinking.")
    thinking: Thinking | None = Field(None, description="enable_thinking in DeepSeek's form.")
    reasoning_format: Literal["none", "auto", "deepseek"] | None = Field(
        None, description="none: leave reasoning in the content, with its markers, as in llama-server."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Variables for the chat template, as in llama.cpp."
    )
    continue_final_message: bool | Literal["content", "reasoning_content"] | None = Field(
        None, description="Whether a last message of the assistant is continued; it is, unless this is false."
    )
    add_generation_prompt: bool | None = Field(None, description="Goes with continue_final_message, as in vLLM.")
    echo: bool | None = Field(None, description="Give a continued message's beginning before its continuation.")
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls the first one is given.")
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _other_spellings(cls, value: Any) -> Any:
        """Anthropic's form of a choice without a name, and its word for required."""
        if isinstance(value, dict) and value.keys() == {"type"} and value["type"] != "function":
            value = value["type"]
        return "required" if value == "any" else value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variable_names(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in value or {}:
            if not name.isidentifier():
                raise ValueError(f"{name[:40]!r} is no name of a variable")
        return value

    @model_validator(mode="after")
    def _chat_goes_together(self) -> ChatRequest:
        self.max_tokens = same("max_tokens", self.max_tokens, "max_completion_tokens", self.max_completion_tokens)
        if self.n_probs is not None:
            self.logprobs = same("logprobs", self.logprobs, "n_probs", True)
            self.top_logprobs = same("top_logprobs", self.top_logprobs, "n_probs", self.n_probs)
        if self.json_schema is not None:
            if self.response_format is not None:
                raise ValueError("response_format and json_schema both bind the answer; give one of them")
            self.response_format = ResponseFormat(type="json_object", schema=self.json_schema)
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

    @model_validator(mode="after")
    def _end_of_the_conversation(self) -> ChatRequest:
        last = self.messages[-1]
        wanted = self.continue_final_message or last.prefix or last.partial
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; send one of them")
        if last.role != "assistant":
            if wanted:
                raise ValueError(
                    "continue_final_message: the last message is not the assistant's; end with its beginning"
                )
            if self.add_generation_prompt is False:
                raise ValueError("add_generation_prompt: false goes with a last message of the assistant; leave it out")
            return self
        if self.continue_final_message is False and not (last.prefix or last.partial):
            return self
        cure = "; send continue_final_message: false for a new turn of the assistant"
        if last.tool_calls:
            raise ValueError(f"messages: the last one calls tools; send the results as messages of the tool{cure}")
        if len(self.messages) > 1 and self.messages[-2].role == "assistant":
            raise ValueError(f"messages: two of the assistant at the end cannot be continued; join them{cure}")
        if self.continue_final_message == "reasoning_content" and last.text:
            raise ValueError("continue_final_message: the reasoning is at its end, as there is content; leave that out")
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError(f"a response_format binds a whole answer; leave out the last message{cure}")
        if isinstance(self.tool_choice, ToolChoice) or self.tool_choice == "required":
            raise ValueError(f"a forced tool call is a whole answer; leave out the last message{cure}")
        return self

    @property
    def continues(self) -> Message | None:
        """The last message if the answer continues it."""
        last = self.messages[-1]
        if last.role != "assistant" or (self.continue_final_message is False and not (last.prefix or last.partial)):
            return None
        return last

    @property
    def thinks(self) -> bool | None:
        """Whether the request turns thinking on or off; None: it does not say."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        if self.reasoning is not None and self.reasoning.enabled is not None:
            return self.reasoning.enabled
        return self.enable_thinking

    @property
    def effort(self) -> str | None:
        """The effort of reasoning that the request asks for."""
        return self.reasoning_effort or (self.reasoning.effort if self.reasoning is not None else None)
