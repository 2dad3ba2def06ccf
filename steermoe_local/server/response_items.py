"""From a responses request to the chat request that means the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from .api_errors import ApiError, request_error
from .schemas import Generation
from .schemas_chat import ChatRequest
from .schemas_items import CallItem, Content, Item, MessageItem, OutputItem, ReasoningItem
from .schemas_responses import AllowedTools, FunctionChoice, ResponsesRequest

# Fields of both requests that this one means itself.
_OWN = {"n", "n_cmpl", "n_predict", "n_probs", "max_tokens", "return_tokens", "stream_options"}
# What a chat request calls its fields, and what they are here, for messages of errors.
_NAMES = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}

_ITEM: TypeAdapter[Any] = TypeAdapter(Item)


def as_items(output: Sequence[dict[str, Any]]) -> list[Any]:
    """Items of a response's output, as a request may have them; without a call that was cut off before its name."""
    return [_ITEM.validate_python(item) for item in output if item.get("name") != ""]


def own_items(request: ResponsesRequest) -> list[Any]:
    """The items of a request itself; a text is a message of the user."""
    if isinstance(request.input, str):
        return [MessageItem.model_validate({"role": "user", "content": request.input})]
    return request.input


def chat_request(request: ResponsesRequest, items: Sequence[Any]) -> ChatRequest:
    """The chat request that means the same; `items` are all of the conversation, without references.

    Raises ApiError, with the field's name in the responses request.
    """
    fields: dict[str, Any] = {
        "messages": messages_of(request.instructions, items),
        "max_completion_tokens": request.max_output_tokens,
        "chat_template_kwargs": request.chat_template_kwargs,
        "continue_final_message": request.continue_final_message,
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _format(request),
    }
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    try:
        chat = ChatRequest.model_validate(fields | _tools(request))
    except ValidationError as error:
        raise renamed(request_error(error)) from None
    shared = (set(Generation.model_fields) & request.model_fields_set) - _OWN
    return chat.model_copy(update={name: getattr(request, name) for name in shared})  # they were validated


def renamed(error: ApiError) -> ApiError:
    """The error of a chat request with the names that its fields have in a responses request."""
    for name, here in _NAMES.items():
        if (error.param or str(error)).startswith(name):
            param = None if error.param is None else here + error.param[len(name) :]
            message = str(error).replace(name, here, 1)
            return ApiError(error.status, message, kind=error.kind, param=param, code=error.code, headers=error.headers)
    return error


#
# messages
#


def messages_of(instructions: str | None, items: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a chat.

    Reasoning, text and calls that follow each other are one message of the assistant, as the model gave them. System
    messages at the beginning are one, since many templates have room for one only.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if isinstance(item, OutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            message = {"role": item.role, "content": item.content}
            if item.role != "user" and len(messages) == 1 and messages[0]["role"] in ("system", "developer"):
                _join(messages[0], message)
            else:
                messages.append(message)
        else:
            _add_to_assistant(messages, item)
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" not in message:
            message.setdefault("content", "")
    return messages


def _join(first: dict[str, Any], other: dict[str, Any]) -> None:
    first["content"] = f"{_text(first['content'])}\n\n{_text(other['content'])}"
    if other["role"] == "system":
        first["role"] = "system"


def _add_to_assistant(messages: list[dict[str, Any]], item: Any) -> None:
    """Add what an assistant said to its message, which is a new one where the order would be lost otherwise."""

    def message(*after: str) -> dict[str, Any]:
        """The assistant's last message, a new one if it has any of these fields already."""
        if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in after):
            messages.append({"role": "assistant"})
        return messages[-1]

    if isinstance(item, ReasoningItem):
        texts = [part.text for part in item.content or item.summary or ()]
        if texts:
            message("reasoning_content", "content", "tool_calls")["reasoning_content"] = "\n".join(texts)
    elif isinstance(item, MessageItem):
        message("content", "tool_calls")["content"] = item.content
    else:
        assert isinstance(item, CallItem), f"{type(item).__name__} has no place in a chat"
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        message().setdefault("tool_calls", []).append(call)


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.value for part in content)


#
# formats and tools
#


def _format(request: ResponsesRequest) -> dict[str, Any] | None:
    format_ = request.text.format if request.text is not None else None
    if format_ is None:
        return None
    if format_.schema_ is None:
        return {"type": format_.type}
    given = {"name": format_.name, "description": format_.description, "strict": format_.strict}
    return {"type": format_.type, "json_schema": given | {"schema": format_.schema_}}


def _tools(request: ResponsesRequest) -> dict[str, Any]:
    """tools and tool_choice of the chat request. Raises ApiError."""
    try:
        functions = request.functions
    except ValueError as error:
        raise ApiError(400, f"tools: {error}", param="tools", code="invalid_value") from None
    choice: Any = request.tool_choice
    if isinstance(choice, FunctionChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, AllowedTools):
        names = [tool.name for tool in choice.tools]
        if unknown := next((name for name in names if name not in functions), None):
            raise ApiError(
                400, f"tool_choice: {unknown!r} is none of the tools", param="tool_choice", code="invalid_value"
            )
        functions, choice = {name: functions[name] for name in names}, choice.mode
    given = ("name", "description", "parameters", "strict")
    tools = [
        {"type": "function", "function": {name: getattr(tool, name) for name in given}}
        for tool, _ in functions.values()
    ]
    return {"tools": tools or None, "tool_choice": choice}
