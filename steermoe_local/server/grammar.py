"""Response formats and forced tool calls as grammars."""

from __future__ import annotations

import json

from .api_errors import ApiError
from .json_schema import guided_grammar, schema_text
from .schema_paths import Schema, SchemaError
from .schemas_chat import ChatRequest, ResponseFormat, Tool, ToolChoice


class ForcedCall:
    """A tool call that the answer must be: of one function (`name`), or of any of several (`name` None)."""

    def __init__(self, tools: dict[int, Tool]) -> None:
        """`tools` by their index in the request."""
        self._tools = tools
        only = next(iter(tools.values()))
        self.name = only.function.name if len(tools) == 1 else None

    @property
    def grammar(self) -> str:
        """The grammar of the arguments, or of {"name", "arguments"} if the model chooses. Raises ApiError."""
        schemas = {index: self._arguments(index, tool) for index, tool in self._tools.items()}
        if self.name is not None:
            return guided_grammar("".join(f"start: %json {schema}\n" for schema in schemas.values()))
        rules = "start: " + " | ".join(f"call{index}" for index in schemas) + "\n"
        for index, schema in schemas.items():
            opening = f'{{"name": {json.dumps(self._tools[index].function.name)}, "arguments": '
            rules += f'call{index}: {json.dumps(opening)} arguments{index} "}}"\narguments{index}: %json {schema}\n'
        return guided_grammar(rules)

    @staticmethod
    def _arguments(index: int, tool: Tool) -> str:
        """The schema of a tool's arguments, which are an object whatever else it says; none without `parameters`."""
        parameters = tool.function.parameters
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        where = f"tools[{index}].function.parameters"
        return _schema(parameters if "type" in parameters else {"type": "object", **parameters}, where)


def forced_call(request: ChatRequest) -> ForcedCall | None:
    """The tool call that a request's tool_choice forces, if any."""
    tools = dict(enumerate(request.tools or []))
    if isinstance(request.tool_choice, ToolChoice):
        name = request.tool_choice.function.name
        index = next(index for index, tool in tools.items() if tool.function.name == name)
        return ForcedCall({index: tools[index]})
    return ForcedCall(tools) if request.tool_choice == "required" else None


def grammar_of_format(format_: ResponseFormat | None) -> str | None:
    """The grammar of a response_format, None for plain text. Raises ApiError."""
    if format_ is None or format_.type == "text":
        return None
    if format_.json_schema is not None:
        return grammar_of_schema(format_.json_schema.schema_, "response_format.json_schema.schema")
    if format_.schema_ is not None:
        return grammar_of_schema(format_.schema_, "response_format.schema")
    return grammar_of_schema({"type": "object"}, "response_format")


def grammar_of_schema(schema: Schema, where: str) -> str:
    """The grammar of a JSON Schema's values. Raises ApiError, of the field `where`, for one that is not supported."""
    return guided_grammar(f"start: %json {_schema(schema, where)}\n")


def _schema(schema: Schema, where: str) -> str:
    try:
        return schema_text(schema)
    except SchemaError as error:
        raise ApiError(400, f"{where}: {error}", param=where, code="invalid_schema") from None
