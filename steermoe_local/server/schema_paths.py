"""Where schemas stand in a JSON Schema: paths, references, and what holds together with what."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
Schema = dict[str, Any] | bool

COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_DEFINITIONS = ("$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("additionalProperties", "additionalItems", "items")
# Keywords beside which one of COMBINING does not stand alone.
_ASSERTING = {
    *COMBINING,
    *_SINGLE,
    "properties",
    "patternProperties",
    "prefixItems",
    "type",
    "enum",
    "const",
    "required",
}
_ASSERTING |= {f"{end}{what}" for end in ("min", "max") for what in ("Items", "Length", "Properties", "imum")}
_ASSERTING |= {"exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "format"}

_UNIMPLEMENTED = {"not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "uniqueItems"}
_UNIMPLEMENTED |= {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
_UNIMPLEMENTED |= {"$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"}
KNOWN = _ASSERTING | _UNIMPLEMENTED | {*_DEFINITIONS, "$schema", "$id", "$anchor"}
"""Keywords that say something about values, or where schemas are; all others are notes."""


class SchemaError(ValueError):
    """A schema that cannot be used: `path` says where, the text why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path

    def __str__(self) -> str:
        return f"{json_path(self.path)}: {super().__str__()}"


def json_path(path: Path) -> str:
    """A path as JSONPath writes it: `$.properties.x.anyOf[0]`."""
    text = "$"
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[A-Za-z_$][\w$]*", step, re.ASCII):
            text += f".{step}"
        else:
            text += f"[{json.dumps(step[:80])}]"
    return text


def pointer_of(path: Path) -> str:
    """A path as JSON Pointer in a reference."""
    return "".join(
        "/" + urllib.parse.quote(str(step).replace("~", "~0").replace("/", "~1"), safe="$~") for step in path
    )


def children(schema: Schema) -> Iterator[tuple[Path, Any]]:
    """The schemas directly inside one (of the keywords that are supported), with the steps to them."""
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            yield from (((keyword, name), inner) for name, inner in value.items())
        elif (keyword in _LISTS or keyword == "items") and isinstance(value, list):
            yield from (((keyword, index), inner) for index, inner in enumerate(value))
        elif keyword in _SINGLE:
            yield (keyword,), value


def at(root: Any, path: Path) -> Any:
    """What stands at a path. Raises LookupError."""
    for step in path:
        if not (isinstance(root, list) if isinstance(step, int) else isinstance(root, dict)):
            raise KeyError(step)
        root = root[step]
    return root


def target_of(root: Any, reference: str) -> Path | None:
    """The path that a reference inside the document names; None for an anchor, or for what is not there."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    path: Path = ()
    for step in urllib.parse.unquote(reference).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        path += (int(step) if step.isdecimal() and isinstance(at(root, path), list) else step,)
        try:
            at(root, path)
        except LookupError:
            return None
    return path


def combines(schema: dict[str, Any]) -> bool:
    """Whether several schemas hold at once for a value that this one describes."""
    has = [keyword for keyword in COMBINING if keyword in schema]
    all_of = schema.get("allOf")
    several = isinstance(all_of, list) and len(all_of) > 1
    return bool(has) and (several or len(_ASSERTING & schema.keys()) > 1)


def walk(root: Schema, shared: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, Schema, bool]]:
    """All schemas of a document: (path, schema, whether it alone describes its value).

    `shared` are the targets of references beside which something else holds, see `shared_targets`.
    """
    pending: list[tuple[Path, Schema, bool]] = [((), root, True)]
    while pending:
        path, schema, alone = pending.pop()
        alone = alone and path not in shared and not (isinstance(schema, dict) and combines(schema))
        yield path, schema, alone
        for steps, inner in children(schema):
            pending.append((path + steps, inner, alone or steps[0] in _DEFINITIONS))


def shared_targets(root: Schema) -> frozenset[Path]:
    """The schemas that are referred to where something else holds as well."""
    shared: frozenset[Path] = frozenset()
    while True:
        found = {
            target
            for _, schema, alone in walk(root, shared)
            if isinstance(schema, dict) and not alone and isinstance(reference := schema.get("$ref"), str)
            if (target := target_of(root, reference)) is not None
        }
        if found <= shared:
            return shared
        shared |= found


def endless_reference(root: Schema) -> Path | None:
    """The path of a `$ref` that makes every value endless, None if there is an end."""
    references = {
        path: target
        for path, schema, _ in walk(root)
        if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str)
        if (target := target_of(root, reference)) is not None
    }
    ending: set[Path] = set()
    pending = list(dict.fromkeys(references.values()))
    while True:
        for target in pending:
            if _ends(at(root, target), target, references, ending):
                ending.add(target)
        left = [target for target in reversed(pending) if target not in ending]  # chains run either way
        if len(left) == len(pending):
            break
        pending = left
    if _ends(root, (), references, ending):
        return None
    return next(path for path, target in references.items() if target not in ending)


def _ends(schema: Any, path: Path, references: dict[Path, Path], ending: set[Path]) -> bool:
    """Whether there is a value that ends, where exactly the targets in `ending` have one."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return True

    def ends(*steps: str | int) -> bool:
        try:
            return _ends(at(schema, steps), path + steps, references, ending)
        except LookupError:
            return True

    def indices(keyword: str) -> range:
        value = schema.get(keyword)
        return range(len(value) if isinstance(value, list) else 0)

    if path in references and references[path] not in ending:
        return False
    if not all(ends("allOf", index) for index in indices("allOf")):
        return False
    for keyword in ("anyOf", "oneOf"):
        if indices(keyword) and not any(ends(keyword, index) for index in indices(keyword)):
            return False
    types = schema.get("type", ["null", "object", "array"])
    types = types if isinstance(types, list) else [types]
    if any(kind not in ("object", "array") for kind in types):
        return True
    if "object" in types and all(
        ends("properties", name) if name in schema.get("properties", {}) else ends("additionalProperties")
        for name in schema.get("required", ())
    ):
        return True
    first = "items" if indices("items") else "prefixItems"
    n_items = schema.get("minItems", 0)
    return (
        "array" in types
        and all(ends(first, index) for index in indices(first)[:n_items])
        and (n_items <= len(indices(first)) or ends("additionalItems" if first == "items" else "items"))
    )
