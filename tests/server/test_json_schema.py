"""What holds of a JSON Schema in its grammar, and which part of one is refused."""

from __future__ import annotations

import json
import random
import re
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pydantic
import pytest

from steermoe_local.server.api_errors import ApiError
from tests.support.schema_walks import accepts, grammar_of, walk


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXTS = ["a\nb", "\t", "\\", '"', "\\n", "\\u0041", "é", "😀", "/", "", "\b\f\r", "\u2028", "<|im_end|>", "[^a]{2}"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stand_for_themselves(text: str) -> None:
    """As enum, const and name of a property: exactly this text, whatever characters it has."""
    rng = random.Random(1)
    assert json.loads(walk({"const": text}, rng)) == text
    assert json.loads(walk({"enum": [text]}, rng)) == text
    assert json.loads(walk(closed(**{text: {"type": "null"}}), rng)) == {text: None}
    assert accepts({"enum": ["other", text]}, compact(text))
    assert not accepts({"const": text}, compact(text + "x"))
    assert not accepts({"enum": [text]}, compact("other"))


VALUES = [None, True, False, 0, -7, 12, 2**53, -1.5e-7, 0.1, 1e15, [], {}, [1, [None]], {"k": {"j": ["\n"]}}, "x"]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_constants_of_every_type(value: Any) -> None:
    found = json.loads(walk({"const": value}, random.Random(1)))
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)
    assert json.loads(walk({"enum": [value]}, random.Random(2))) == value


NAME = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OPEN = NAME | {"additionalProperties": True}
MORE = {"properties": {"b": {"const": 2}}, "required": ["b"]}
TREE = {
    "$defs": {"tree": closed(value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#/$defs/tree"}})},
    "$ref": "#/$defs/tree",
}
SELF = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}
TAGGED = {
    "oneOf": [closed(kind={"const": "a"}, x={"type": "integer"}), closed(kind={"const": "b"})],
    "discriminator": {"propertyName": "kind"},
}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "string", "pattern": r"^\d{3}-\w+\.\s$"}, ['"123-a_b. "'], ['"12-a. "', '"123-ab. x"', '"123-a,"']),
        ({"type": "string", "pattern": r"\."}, ['"a.b"', '"."'], ['"ab"']),
        ({"type": "string", "pattern": r"^[^\s\"]+$"}, ['"a\\\\"'], ['"a b"', '"a\\"b"', '"\\u0061"']),
        ({"type": "string", "pattern": "^.$"}, ['"é"', '"😀"', '"\\""'], ['"\\n"', '"""', '"ab"']),
        ({"type": "string", "pattern": r"^\D\W$"}, ['"a-"'], ['"٣-"', '"aé"', '"1-"']),
        ({"type": "string", "pattern": '^[^"]*$'}, ['"a\\\\"', '"\\n"', '"é"'], ['"\\""', '"a\\"b"']),
        ({"type": "string", "pattern": r"^[\x00-!#-~]*$"}, ['"a\\\\\\n"'], ['"\\""', '"é"']),
        ({"type": "string", "pattern": r"^[^\\]$"}, ['"\\""', '"é"'], ['"\\\\"', '"ab"']),
        ({"type": "string", "pattern": "^[[&~]$"}, ['"["', '"&"', '"~"'], ['"a"', '""']),
        ({"type": "string", "pattern": "^a", "minLength": 2, "maxLength": 3}, ['"ab"'], ['"a"', '"abcd"', '"ba"']),
        ({"type": "string", "maxLength": 1}, ['"😀"', '"\\n"', '""'], ['"ab"', '"\\ud83d\\ude00"']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2023-12-31"'], ['"2023-02-29"', '"0000-01-01"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"00:00:00.5+01:00"'], ['"22:59:60Z"', '"24:00:00Z"']),
        ({"format": "date-time", "pattern": "^2"}, ['"2024-01-01T00:00:00Z"'], ['"1024-01-01T00:00:00Z"']),
        ({"type": "string", "format": "ipv4"}, ['"127.0.0.1"'], ['"256.0.0.1"', '"1.2.3"']),
        ({"type": "string", "format": "password"}, ['"x y"'], ["1"]),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, ["3", "11"], ["2", "12", "3.0", "03"]),
        ({"type": "integer", "exclusiveMinimum": -2, "maximum": 2**63}, ["-1", "0", "99999"], ["-2", "1e9"]),
        ({"type": ["integer", "null"]}, ["-5", "9007199254740992", "null"], ["9" * 17, "1.5"]),
        ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "0.25", "1.0"], ["1.01", "-0.1", "1e0", "2"]),
        ({"type": "number", "multipleOf": 0.25}, ["1.75", "-3"], ["0.3"]),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 1.0, "maxItems": 2}, ["[true]"], ["[]", "[1]"]),
        ({"type": "array", "items": {"items": {"const": 1}, "minItems": 2}}, ["[]", "[[1,1]]"], ["[[1]]", "[2]"]),
        ({"type": "array", "prefixItems": [{"const": 1}, True], "items": False}, ["[1]", "[1,{}]"], ["[2]", "[1,2,3]"]),
        ({"items": [{"const": 1}], "additionalItems": False, "type": "array"}, ["[1]"], ["[1,1]", "[2]"]),
        ({"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
        (closed(yes=True, also={}), ['{"yes":{"x":[1]},"also":"y"}'], ['{"yes":1}']),
        ({"type": "object", "properties": {"a": False, "b": True}}, ["{}", '{"b":1}'], ['{"a":1}']),
        (NAME, ['{"a":1}', '{"a": 1}'], ["{}", '{"a":1,"b":2}', '{"a":"1"}', '{"\\u0061":1}']),
        (OPEN, ['{"a":1,"b":2}'], ['{"a":1,"a":"x"}', '{"a":1,"\\u0061":"x"}', '{"b":2}']),
        (NAME | {"additionalProperties": {"type": "null"}}, ['{"a":1,"b":null}'], ['{"a":1,"b":2}']),
        ({"type": "object", "patternProperties": {r"^x\.": {"const": 1}}}, ['{"x.":1,"xy":2}'], ['{"x.y":2}']),
        ({"properties": {"a": {}}}, ['{"a":1}'], ["1"]),
        ({"anyOf": [{"type": "integer"}, NAME]}, ["5", '{"a":5}'], ['"5"', '{"a":5,"b":1}']),
        (OPEN | {"anyOf": [MORE]}, ['{"a":1,"b":2}'], ['{"a":1,"b":1}', '{"a":1}']),
        ({"allOf": [NAME, MORE]}, ['{"a":1,"b":2}'], ['{"a":1}', '{"b":2}']),
        ({"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": NAME}, "title": "t"}, ['{"a":1}'], ['{"a":1,"b":2}']),
        ({"oneOf": [{"$ref": "#/$defs/n"}, {"type": "null"}], "$defs": {"n": SELF}}, ["null"], ['{"next":1}']),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"1"'], ["null"]),
        (TAGGED, ['{"kind":"a","x":1}', '{"kind":"b"}'], ['{"kind":"b","x":1}', '{"kind":"c"}']),
        ({"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"', "1"]),
        ({"propertyNames": {"type": "string"}, "additionalProperties": {"const": 1}}, ['{"a":1}'], ['{"a":2}']),
        ({"anyOf": [{"const": 1}, {"not": {}}]}, ["1"], ["2", ""]),
        ({"properties": {"a": {"const": 1}, "b": {"not": {}}}}, ['{"a":1}', "{}"], ['{"a":1,"b":1}', '{"b":null}']),
        (TREE, ['{"value":1,"children":[{"value":2,"children":[]}]}'], ['{"value":1,"children":[{"value":2}]}']),
        (SELF, ['{"next":null}', '{"next":{"next":null}}'], ["null", '{"next":{}}']),
        ({"$defs": {"a/b~é": {"const": 1}}, "$ref": "#/$defs/a~1b~0%C3%A9"}, ["1"], ["2"]),
        ({"x-guidance": {"lenient": True, "item_separator": ";"}, "type": "array"}, ["[1,2]"], ["[1;2]"]),
        (True, ["1", '{"a":[]}'], ["", "a"]),
    ],
    ids=lambda value: compact(value)[:60] if not isinstance(value, list) else "",
)  # fmt: skip
def test_keywords(schema: Any, valid: list[str], invalid: list[str]) -> None:
    for text in valid:
        assert accepts(schema, text), text
    for text in invalid:
        assert not accepts(schema, text), text


def test_answers_are_in_one_line() -> None:
    """At most a blank behind a comma or colon, none before or behind the value: weak models would write little else."""
    schema = closed(a={"type": "array", "items": {"type": "integer"}}, b={"const": {"c": [1, 2]}})
    text = '{"a":[1,2],"b":{"c":[1,2]}}'
    for index in range(len(text) + 1):
        for blanks in (" ", "\n", "\t", "  "):
            is_behind_separator = text[:index].endswith((",", ":"))
            spaced = text[:index] + blanks + text[index:]
            assert accepts(schema, spaced) == (is_behind_separator and blanks == " "), spaced


NEVER = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        (closed(x={"not": {"type": "null"}}), "$.properties.x.not"),
        (closed(x={"type": "array", "uniqueItems": True}), "$.properties.x.uniqueItems"),
        ({"anyOf": [True, {"type": "object", "propertyNames": {"maxLength": 3}}]}, "$.anyOf[1].propertyNames"),
        ({"if": {"type": "null"}, "then": False}, "$.if"),
        ({"type": "array", "contains": {"const": 1}}, "$.contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "$.dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "$.unevaluatedProperties"),
        ({"$defs": {"a b": {"not": {"const": 1}}}, "items": {"$ref": "#/$defs/a b"}}, '$.$defs["a b"].not'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "$.oneOf"),
        (closed(x={"pattern": "(?=a)"}), "$.properties.x.pattern"),
        (closed(x={"pattern": r"^(a)\1$"}), "$.properties.x.pattern"),
        (closed(x={"pattern": r"\bx"}), "$.properties.x.pattern"),
        (closed(x={"pattern": "("}), "$.properties.x.pattern"),
        (closed(x={"pattern": "[a--b]"}), "$.properties.x.pattern"),
        (closed(x={"pattern": "(?s)."}), "$.properties.x.pattern"),
        (closed(x={"type": "string", "format": "json-pointer"}), "$.properties.x.format"),
        ({"type": "nonsense"}, "$.type"),
        ({"properties": []}, "$.properties"),
        ({"required": 5}, "$.required"),
        ({"type": "array", "items": 3}, "$.items"),
        ({"$ref": "#/no"}, "$.$ref"),
        ({"$ref": "https://a.b/c"}, "$.$ref"),
        ({"const": 12345678901234567890}, "$.const"),
        ({"enum": ["a", 0.12345678901234567]}, "$.enum[1]"),
        ({"const": "\x00"}, "$.const"),
        ({"minimum": 2**60}, "$.minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "$"),
        ({"enum": []}, "$.enum"),
        (NAME | {"required": ["b"], "additionalProperties": False}, "$"),
        ({"type": "object", "minProperties": 2}, "$.minProperties"),
        ({"$ref": "#"}, "$.$ref"),
        (NEVER, "$.properties.a.$ref"),
        ({"$defs": {"l": {"items": {"$ref": "#/$defs/l"}, "minItems": 1}}, "$ref": "#/$defs/l"}, "$.$ref"),
        ({"allOf": [{"type": "string", "pattern": f"x{i}"} for i in range(20)]}, "$.allOf[10].pattern"),
        ({"type": "integer", "multipleOf": 1_000_003}, "$.multipleOf"),
        ({"patternProperties": {f"^{i}": True for i in range(51)}}, "$.patternProperties"),
        ({"minLength": 10**9}, "$.minLength"),
        (False, "$"),
    ],
    ids=lambda value: compact(value)[:60],
)  # fmt: skip
def test_what_is_refused_is_named(schema: Any, path: str) -> None:
    with pytest.raises(ApiError) as caught:
        grammar_of(schema)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_schema", "schema")
    assert str(caught.value).startswith(f"schema: {path}: "), caught.value


def test_a_schema_that_is_not_used_may_be_anything() -> None:
    assert accepts({"$defs": {"x": {"not": {}}}, "type": "integer"}, "1")


#
# what clients make
#


class Colour(StrEnum):
    RED = "red"
    NEW_LINE = "new\nline"


class Leaf(pydantic.BaseModel):
    kind: Literal["leaf"] = "leaf"
    colour: Colour
    weight: Annotated[float, pydantic.Field(ge=0, le=1)]


class Node(pydantic.BaseModel):
    """Refers to itself."""

    kind: Literal["node"]
    label: Annotated[str, pydantic.Field(pattern=r"^[A-Z]\w*\.\d+$", max_length=12)] = pydantic.Field(alias='a "b"')
    left: Node | None
    items: Annotated[list[Annotated[Node | Leaf, pydantic.Field(discriminator="kind")]], pydantic.Field(max_length=2)]
    id: UUID
    amount: int | None = None
    scores: dict[str, int] = {}
    pair: tuple[int, Literal["x"]]


@pytest.mark.parametrize("model", [Leaf, Node])
@pytest.mark.parametrize("strict", [False, True])
def test_models_of_pydantic(model: type[pydantic.BaseModel], strict: bool) -> None:
    """Each value is one of the model, also under the rules of OpenAI's strict schemas."""
    schema = model.model_json_schema()
    if strict:
        for part in (schema, *schema.get("$defs", {}).values()):
            if part.get("type") == "object":
                part |= {"additionalProperties": False, "required": list(part["properties"])}
    rng = random.Random(5)
    for _ in range(8):
        text = walk(schema, rng, n_free=150)
        model.model_validate_json(text)
        jsonschema.validate(json.loads(text), schema)


CHARACTERS = '"\\\n\t\r\fa &]~é'
CLASSES = [
    "[^{}]",
    "[{}]",
    "{}",
    "[^{}b]",
    "[^{}\\n]",
    "[^{}\\\\]",
    "[^{}\\s]",
    "(?:[^{}]|z)",
    "[^!-&{}]",
    "[#-\\[{}\\]-~]",
]


@pytest.mark.parametrize("character", CHARACTERS)
def test_patterns_agree_with_python(character: str) -> None:
    """Each class of one character with each character, as they are in JSON."""
    for form in CLASSES:
        pattern = f"^{form.format(re.escape(character))}$"
        for text in CHARACTERS:
            wanted = re.fullmatch(pattern, text) is not None
            assert accepts({"type": "string", "pattern": pattern}, compact(text)) == wanted, (pattern, text)
