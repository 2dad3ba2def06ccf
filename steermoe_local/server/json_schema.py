"""JSON Schemas as grammars of llguidance, which either follows a keyword or refuses the schema.

What llguidance reads otherwise than the standard is put right here, or refused; nothing is ignored that could let an
invalid value through. Objects with `properties` have no others unless the schema says so, as in llama.cpp.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from ..llama.grammars import GUIDED, why_refused
from .patterns import PatternError, portable_pattern
from .schema_choices import exclusive_choices
from .schema_paths import (
    COMBINING,
    KNOWN,
    Path,
    Schema,
    SchemaError,
    at,
    children,
    endless_reference,
    pointer_of,
    shared_targets,
    target_of,
    walk,
)
from .string_formats import ENFORCED, PATTERNS, UNSUPPORTED

_MAX_SCHEMA = 64 * 1024  # characters of JSON
_MAX_DEPTH = 24
_MAX_COUNT = 100_000  # of minLength and the like: no context holds more
_MAX_MULTIPLES = 100_000  # the sum of all multipleOf, in units of their last digit: llguidance has a state for each
_MAX_PATTERN_PAIRS = 2500  # patternProperties: each is compared with each
_MAX_SHARED_PATTERNS = 10  # that may hold for one text: llguidance takes minutes to find out whether any text fits more
_MAX_REFERENCES = 500
_MAX_TRIALS = 32  # schemas tried alone to find the one at fault
_EXACT = 2**53  # llguidance reads numbers as floats
_CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")  # that a string of a grammar cannot hold
_COUNTS = tuple(f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties"))
_UNIMPLEMENTED = re.compile(r'Unimplemented keys: \["([^"]+)"')
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True,),
    "unevaluatedItems": (True,),
    "not": (False,),
    "propertyNames": (True, {}, {"type": "string"}),  # Zod writes the last one for every record
}
# A schema without a type that has keywords of one kind of value describes such a value, as in llama.cpp.
_TYPES = {
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_TYPE_NAMES = ("string", "number", "integer", "boolean", "object", "array", "null")
_SHAPES: dict[str, tuple[type, str]] = dict.fromkeys(("pattern", "format", "$ref"), (str, "a text"))
_SHAPES |= dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), (dict, "an object of schemas"))
_SHAPES |= dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems", "enum", "required"), (list, "a list"))
_TYPED_OTHERWISE = {*COMBINING, "type", "enum", "const"}
# JSON in one line: where blanks and lines are free, weak models write little else and find no end within max_tokens.
# \u is not allowed: a name written so would be read as another one than it is.
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",  # regular expressions
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}


def schema_text(schema: Schema) -> str:
    """The schema as llguidance gets it, in JSON. Raises SchemaError for one that is not supported, or too large."""
    try:
        text = json.dumps(schema, allow_nan=False)
    except ValueError:
        raise SchemaError((), "a number in it is not finite") from None
    if len(text) > _MAX_SCHEMA:
        raise SchemaError((), f"larger than {_MAX_SCHEMA >> 10} KiB")
    _check_depth(schema, ())
    return _schema_text(text)


@lru_cache(maxsize=64)
def _schema_text(text: str) -> str:
    schema = json.loads(text)
    prepared = schema if isinstance(schema, bool) else _Prepared(schema).root
    if prepared is False:
        raise SchemaError((), "no value is valid")
    if prepared is True:
        prepared = {}
    endless = endless_reference(prepared)
    if endless is not None:
        raise SchemaError((*endless, "$ref"), "it refers to itself without an end")
    if reason := _refusal(prepared):
        raise _culprit(prepared, reason)
    return json.dumps(prepared | {"x-guidance": _OPTIONS})


def guided_grammar(rules: str) -> str:
    """A grammar in Lark, with `%json` and `schema_text` for a schema."""
    # nothing forced: of several tokens for a text the model chooses
    return f'{GUIDED} {{"no_forcing": true}}\n{rules}'


def _check_depth(value: Any, path: Path) -> None:
    if len(path) > _MAX_DEPTH:
        raise SchemaError(path, f"nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_depth(inner, (*path, step))


class _Prepared:
    """A schema whose keywords mean to llguidance what they mean to JSON Schema (`root`)."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._source, self._n_references = schema, 0
        self._alone = {path: alone for path, _, alone in walk(schema, shared_targets(schema))}
        self._exclusive = exclusive_choices(schema)
        self._tags: dict[Path, set[str]] = {}
        for tags in self._exclusive.values():
            for path, name in tags.items():
                self._tags.setdefault(path, set()).add(name)
        self._n_multiples = self._n_pattern_pairs = self._n_shared_patterns = 0
        self.root: Schema = self._schema(schema, ())

    def _schema(self, schema: Any, path: Path) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(path, f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
        if schema.get("not") is True or schema.get("not") == {}:  # so Zod writes what can be nothing
            return False
        # beside a reference, llguidance takes a keyword that it does not know for a condition
        result = {keyword: value for keyword, value in schema.items() if keyword in KNOWN}
        for keyword, value in list(result.items()):
            _check_shape(keyword, value, (*path, keyword))
            if value in _NO_EFFECT.get(keyword, ()):
                del result[keyword]
            elif keyword in _COUNTS:
                result[keyword] = _count(value, (*path, keyword))
            elif keyword == "multipleOf":
                self._add_multiples(value, (*path, keyword))
            elif keyword in _TYPES["number"]:
                result[keyword] = _bound(keyword, value, (*path, keyword))
            elif keyword in ("const", "enum"):
                _check_value(value, (*path, keyword))
            elif keyword == "pattern":
                result[keyword] = _pattern(value, (*path, keyword))
            elif keyword == "patternProperties":
                self._add_pattern_pairs(len(value), (*path, keyword))
            elif keyword == "$ref":
                result[keyword] = self._reference(value, (*path, keyword))
            elif keyword in ("$id", "$dynamicRef", "$recursiveRef") and path:
                raise SchemaError((*path, keyword), "not supported; refer by #/...")
        for steps, inner in children(schema):
            self._put(result, steps, self._schema(inner, path + steps), (*path, *steps))
        _translate_format(result, path)
        self._n_shared_patterns += "pattern" in result and not self._alone.get(path)
        if self._n_shared_patterns > _MAX_SHARED_PATTERNS:
            raise SchemaError((*path, "pattern"), f"more than {_MAX_SHARED_PATTERNS} patterns hold together")
        self._complete(result, path)
        _bound_integers(result)
        if path in self._tags:
            result["required"] = list(dict.fromkeys([*result.get("required", []), *sorted(self._tags[path])]))
        if path in self._exclusive:
            return {"anyOf" if keyword == "oneOf" else keyword: value for keyword, value in result.items()}
        return result

    @staticmethod
    def _put(result: dict[str, Any], steps: Path, inner: Any, path: Path) -> None:
        keyword = str(steps[0])
        if len(steps) == 1:
            result[keyword] = inner
            return
        holder = result[keyword] = result[keyword].copy()  # those of the caller stay as they are
        name = steps[1]
        if keyword == "patternProperties":
            del holder[name]  # in the order of the schema
            name = _pattern(str(name), path)
        holder[name] = inner

    def _reference(self, reference: str, path: Path) -> str:
        """The reference as a URI, to where its target is in `root`."""
        self._n_references += 1
        if self._n_references > _MAX_REFERENCES:
            raise SchemaError(path, f"more than {_MAX_REFERENCES} references")
        if not reference.startswith("#"):
            raise SchemaError(path, f"{json.dumps(reference)[:80]}: only references inside the schema (#/...)")
        target = target_of(self._source, reference)
        if target is None:
            if reference.startswith("#/"):
                raise SchemaError(path, f"{json.dumps(reference)[:80]} is not in the schema")
            return reference  # an anchor
        moved = [
            "anyOf" if step == "oneOf" and target[:index] in self._exclusive else step
            for index, step in enumerate(target)
        ]
        return "#" + pointer_of(tuple(moved))

    def _add_multiples(self, value: Any, path: Path) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise SchemaError(path, "not a number above 0")
        number = Decimal(repr(value))
        exponent = number.as_tuple().exponent
        assert isinstance(exponent, int)  # of a finite number
        self._n_multiples += int(number.scaleb(max(0, -exponent)))
        if self._n_multiples > _MAX_MULTIPLES:
            raise SchemaError(path, f"{value} has too many digits (all of them may come to {_MAX_MULTIPLES:,} units)")

    def _add_pattern_pairs(self, n: int, path: Path) -> None:
        self._n_pattern_pairs += n * n
        if self._n_pattern_pairs > _MAX_PATTERN_PAIRS:
            raise SchemaError(path, f"more than {math.isqrt(_MAX_PATTERN_PAIRS)} patterns")

    def _complete(self, schema: dict[str, Any], path: Path) -> None:
        """State what a schema that alone describes its value leaves open; and refuse what counts names twice."""
        if self._alone.get(path):
            kinds = [kind for kind, words in _TYPES.items() if not schema.keys().isdisjoint(words)]
            if len(kinds) == 1 and not _TYPED_OTHERWISE & schema.keys():
                schema["type"] = kinds[0]
            properties = schema.get("properties")
            if (
                properties is not None
                and all(name in properties for name in schema.get("required", ()))
                and not {*COMBINING, "additionalProperties", "patternProperties"} & schema.keys()
            ):
                schema["additionalProperties"] = False
        least = schema.get("minProperties", 0)
        if schema.get("additionalProperties") is not False and least > max(1, len(schema.get("required", ()))):
            raise SchemaError((*path, "minProperties"), "counts names that may come twice; name them in `required`")


def _check_shape(keyword: str, value: Any, path: Path) -> None:
    if keyword in _SHAPES:
        kind, name = _SHAPES[keyword]
        if not isinstance(value, kind):
            raise SchemaError(path, f"not {name}")
    names = value if isinstance(value, list) else [value]
    if keyword == "type":
        for name in names:
            if name not in _TYPE_NAMES:
                raise SchemaError(path, f"{json.dumps(name)[:40]} is not one of {', '.join(_TYPE_NAMES)}")
    elif keyword == "required" and not all(isinstance(name, str) for name in names):
        raise SchemaError(path, "not a list of names")


def _count(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise SchemaError(path, "not a whole number")
    if not 0 <= value <= _MAX_COUNT:
        raise SchemaError(path, f"{value} is not from 0 to {_MAX_COUNT}")
    return int(value)


def _bound(keyword: str, value: Any, path: Path) -> Any:
    """A bound of numbers; one that is out of llguidance's reach is replaced by a stricter one."""
    if isinstance(value, bool):  # of JSON Schema's draft 4
        return value
    if not isinstance(value, int | float):
        raise SchemaError(path, "not a number")
    if -_EXACT <= value <= _EXACT:
        return _exact(value, path)
    if (value > 0) == (keyword in ("maximum", "exclusiveMaximum")):
        return _EXACT if value > 0 else -_EXACT
    return _exact(value, path)


def _bound_integers(schema: dict[str, Any]) -> None:
    """Integers have 16 digits at most, as in llama.cpp, which every program reads exactly; weak models find no end."""
    types = schema.get("type", ())
    types = types if isinstance(types, list) else [types]
    if "integer" in types and "number" not in types and not {"enum", "const", "multipleOf"} & schema.keys():
        if not {"minimum", "exclusiveMinimum"} & schema.keys():
            schema["minimum"] = -_EXACT
        if not {"maximum", "exclusiveMaximum"} & schema.keys():
            schema["maximum"] = _EXACT


def _exact(value: Any, path: Path) -> Any:
    """The number, if llguidance writes exactly this one."""
    if not -_EXACT <= value <= _EXACT:
        raise SchemaError(path, f"{value} is not from {-_EXACT} to {_EXACT}")
    if isinstance(value, float) and float(f"{value:.15g}") != value:
        raise SchemaError(path, f"{value} has more than 15 digits")
    return value


def _check_value(value: Any, path: Path) -> None:
    """Raise SchemaError for what a grammar cannot spell exactly."""
    if isinstance(value, str):
        if found := _CONTROL.search(value):
            raise SchemaError(path, f"the character U+{ord(found[0]):04X} is not supported")
    elif isinstance(value, int | float):
        _exact(value, path)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_value(inner, (*path, index))
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_value(name, path)
            _check_value(inner, (*path, name))


def _pattern(value: str, path: Path) -> str:
    try:
        return portable_pattern(value)
    except PatternError as error:
        raise SchemaError(path, str(error)) from None


def _translate_format(schema: dict[str, Any], path: Path) -> None:
    name = schema.get("format")
    if name is None:
        return
    if name in UNSUPPORTED:
        raise SchemaError((*path, "format"), f"{name!r} is not supported")
    if name in PATTERNS:
        del schema["format"]
        pattern = PATTERNS[name]
        if "pattern" in schema:
            schema["allOf"] = [*schema.get("allOf", []), {"pattern": pattern}]
        else:
            schema["pattern"] = pattern
    elif name not in ENFORCED:
        del schema["format"]


#
# what llguidance refuses
#


def _refusal(schema: dict[str, Any]) -> str | None:
    """Why llguidance refuses a schema; None if it does not."""
    reason = why_refused(json.dumps({"grammars": [{"json_schema": schema | {"x-guidance": _OPTIONS}}]}))
    return None if reason is None else " ".join(reason.partition(" while processing json-schema:")[0].split())


def _culprit(root: dict[str, Any], reason: str) -> SchemaError:
    """The error that names the innermost schema that is refused for the same reason alone, and its keyword."""
    if "too large" in reason:  # as a whole; and each trial would take long
        return SchemaError((), _plain(reason))
    document = _rebased(root)
    n_trials = 0

    def same(schema: dict[str, Any]) -> bool:
        nonlocal n_trials
        n_trials += 1
        return n_trials <= _MAX_TRIALS and _refusal(schema | {"$defs": {"root": document}}) == reason

    def inside(path: Path) -> list[Path]:
        schema = at(document, path)
        found = [path + steps for steps, _ in children(schema) if steps[0] not in ("$defs", "definitions")]
        target = target_of(root, at(root, path).get("$ref", "")) if isinstance(schema, dict) else None
        return found if target is None else [*found, target]

    path: Path = ()
    seen = {path}
    while inner := next(
        (inner for inner in inside(path) if inner not in seen and same({"$ref": f"#/$defs/root{pointer_of(inner)}"})),
        None,
    ):
        path = inner
        seen.add(path)
    schema = at(document, path)
    named = _UNIMPLEMENTED.match(reason)
    if named and named[1] in schema:
        return SchemaError((*path, named[1]), "this keyword is not supported")
    if isinstance(schema, dict):
        typed = {"type": schema["type"]} if "type" in schema else {}
        keyword = next(
            (name for name in schema if name not in ("$defs", "type") and same(typed | {name: schema[name]})), ""
        )
        path = (*path, keyword) if keyword else path
    return SchemaError(path, _plain(reason))


def _rebased(schema: Any) -> Any:
    """A copy of a schema whose references are to a document that holds it as `#/$defs/root`."""
    if not isinstance(schema, dict):
        return schema
    copy = {name: value for name, value in schema.items() if name != "$id"}
    if isinstance(reference := copy.get("$ref"), str):
        copy["$ref"] = "#/$defs/root" + reference.removeprefix("#")
    for steps, inner in children(schema):
        holder = copy
        for step in steps[:-1]:
            holder[step] = holder = holder[step].copy()
        holder[steps[-1]] = _rebased(inner)
    return copy


def _plain(reason: str) -> str:
    """A reason of llguidance in the words of a schema."""
    if named := _UNIMPLEMENTED.match(reason):
        return f"the keyword {named[1]!r} is not supported"
    if reason.startswith("oneOf constraints"):
        return "its alternatives do not exclude each other visibly; use anyOf, or give each a `const` of its own"
    if reason.startswith("Unable to determine"):
        return "its patterns and lengths are too complex together"
    if reason.startswith("regex parse error"):
        return f"no regular expression ({reason.rpartition('error: ')[2]})"
    return reason.partition(" <state>")[0][:200]
