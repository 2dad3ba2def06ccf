"""The messages of a conversation, as clients write them and as SDKs send answers back."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from .known_fields import Place
from .schemas_base import Body, Short, Text

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_PARTS = {"reasoning": ("reasoning", "text"), "thinking": ("thinking",)}
_PART_TYPES = (*_TEXT_PARTS, *_REASONING_PARTS)


class ContentPart(Body):
    """A part of a message: text, or reasoning that is given back; other parts are refused."""

    place: ClassVar[Place | None] = "content part"

    type: Literal["text", "input_text", "output_text", "refusal", "reasoning", "thinking"]
    text: Text | None = None
    refusal: Text | None = Field(None, description="The text of a part of type refusal.")
    reasoning: Text | None = Field(None, description="The text of a part of type reasoning.")
    thinking: Text | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)] | None = Field(
        None, description="The text of a part of type thinking, or its parts."
    )

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind not in _PART_TYPES:
            raise ValueError(f"parts of type {kind[:40]!r} are not offered; this server reads text")
        return value

    @model_validator(mode="after")
    def _has_its_text(self) -> ContentPart:
        names = _REASONING_PARTS.get(self.type) or (_TEXT_PARTS[self.type],)
        if all(getattr(self, name) is None for name in names):
            raise ValueError(f"a part of type {self.type} needs {names[0]}")
        return self

    @property
    def is_reasoning(self) -> bool:
        """Whether it belongs to the reasoning."""
        return self.type in _REASONING_PARTS

    @property
    def value(self) -> str:
        """Its text."""
        names = _REASONING_PARTS.get(self.type) or (_TEXT_PARTS[self.type],)
        found = next(value for name in names if (value := getattr(self, name)) is not None)
        return found if isinstance(found, str) else "\n".join(part.value for part in found)


class FunctionCall(Body):
    """The call that an assistant made."""

    place: ClassVar[Place | None] = "call"

    name: FunctionName
    arguments: Text = Field(description="JSON.")

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Some clients keep the parsed arguments."""
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else "" if value is None else value


class ToolCall(Body):
    """A call in an assistant's message."""

    place: ClassVar[Place | None] = "tool call"

    id: Short
    type: Literal["function"] | None = "function"
    function: FunctionCall


class Message(Body):
    """A message of the conversation, also an answer as SDKs send it back."""

    place: ClassVar[Place | None] = "message"

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: Short | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Short | None = None
    reasoning_content: Text | None = Field(None, description="An assistant's reasoning, given to the template.")
    reasoning: Text | None = Field(None, description="reasoning_content under vLLM's and OpenRouter's name.")
    thinking: Text | None = Field(None, description="reasoning_content under Ollama's name.")
    refusal: Text | None = Field(None, description="An assistant's answer, if it has no other content.")
    prefix: bool | None = Field(None, description="Mistral's and DeepSeek's name: continue this last message.")
    partial: bool | None = Field(None, description="Moonshot's name: continue this last message.")

    @model_validator(mode="after")
    def _goes_together(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant calls tools")
        if self.role == "assistant":
            given = (self.reasoning_content, self.reasoning, self.thinking, self._parts(of_reasoning=True))
            self.reasoning_content = next((text for text in given if text), None)
        # null from a client that keeps every field is an empty text; a field that is missing may be a mistake
        is_null = "content" in self.model_fields_set and self.role in ("assistant", "tool")
        other = self.role == "assistant" and (self.tool_calls or self.reasoning_content or self.refusal)
        if self.content is None and not (is_null or other):
            raise ValueError(f"a message of the {self.role} needs content")
        return self

    def _parts(self, *, of_reasoning: bool) -> str:
        """The parts' texts, of the reasoning or of the rest; parts stand on lines of their own, as in llama.cpp."""
        if isinstance(self.content, str):
            return "" if of_reasoning else self.content
        parts = [part for part in self.content or () if part.is_reasoning == of_reasoning]
        return "\n".join(part.value for part in parts)

    @property
    def text(self) -> str:
        """The content as one text."""
        return (self.refusal or "") if self.content is None else self._parts(of_reasoning=False)
