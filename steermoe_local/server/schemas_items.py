"""The items of a conversation in the form of responses, as clients write them and as SDKs send them back."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from .known_fields import Place
from .schemas_base import Body, Short, Text
from .schemas_messages import ContentPart, FunctionName

Id = Annotated[str, StringConstraints(max_length=128)]
Content = Text | Annotated[list[ContentPart], Field(max_length=4096, fail_fast=True)]


def kind_of(value: Any) -> str:
    """The field `type` of JSON, or of what was made of it; "" if it is no text."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else ""


class _Item(Body):
    place: ClassVar[Place | None] = "item"

    id: Id | None = None


class MessageItem(_Item):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Short
    name: FunctionName
    arguments: Text


class OutputItem(_Item):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: Short
    output: Content
    name: Short | None = Field(None, description="Accepted, without effect: the call has it.")


class ReasoningText(Body):
    """A text of the reasoning."""

    type: Literal["reasoning_text", "text"]
    text: Text


class SummaryText(Body):
    """A text of a summary of the reasoning."""

    type: Literal["summary_text"]
    text: Text


class ReasoningItem(_Item):
    """Reasoning that came before an answer or a call."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(max_length=1024, fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=1024, fail_fast=True)] | None = None


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
    if (kind := kind_of(value)) and kind not in _ITEMS:
        raise ValueError(f"items of type {kind[:40]!r} are not offered; there are {', '.join(_ITEMS)}")
    return value


Item = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[OutputItem, Tag("OutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[ReferenceItem, Tag("ReferenceItem")],
    Discriminator(lambda value: _ITEMS.get(kind_of(value), "MessageItem")),
    BeforeValidator(_known_item),
]
