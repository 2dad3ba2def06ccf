"""Alternatives of `oneOf` that exclude each other, so that `anyOf` says the same: by their type, or by a tag."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .schema_paths import Path, Schema, at, target_of, walk

_MAX_STEPS = 16  # of references to references


def exclusive_choices(root: Schema) -> dict[Path, dict[Path, str]]:
    """Paths of schemas whose `oneOf` excludes visibly; each with the tags that its alternatives have to require.

    A tag is a property with a constant of its own in every alternative, as discriminated unions have it; one with a
    default is optional in the schemas of pydantic, and a value without it would fit several.
    """
    found = {}
    for path, schema, _ in walk(root):
        if isinstance(schema, dict) and isinstance(choices := schema.get("oneOf"), list) and "anyOf" not in schema:
            resolved = [_resolved(root, (*path, "oneOf", index)) for index in range(len(choices))]
            tags = _tags(schema, resolved)
            if tags is not None:
                found[path] = tags
    return found


def _resolved(root: Schema, path: Path) -> tuple[Path, Any]:
    schema = at(root, path)
    for _ in range(_MAX_STEPS):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        target = target_of(root, reference) if isinstance(reference, str) else None
        if target is None:
            break
        path, schema = target, at(root, target)
    return path, schema


def _tags(schema: dict[str, Any], choices: Sequence[tuple[Path, Any]]) -> dict[Path, str] | None:
    """The tag of each alternative that is an object, {} if there is at most one; None: they may overlap."""
    taken: set[str] = set()
    objects = []
    for path, choice in choices:
        types = _types(choice)
        if types is None or (types & taken - {"object"}):
            return None
        taken |= types
        if "object" in types:
            objects.append((path, choice))
    if len(objects) < 2:
        return {}
    if any(_types(choice) != {"object"} for _, choice in objects):
        return None
    properties = [choice.get("properties") for _, choice in objects]
    if not all(isinstance(some, dict) for some in properties):
        return None
    for name in properties[0]:
        values = [_constants(some.get(name)) for some in properties]
        known = [some for some in values if some]
        if len(known) == len(values) and len(frozenset().union(*known)) == sum(map(len, known)):
            return {path: name for path, _ in objects}
    return None


def _types(schema: Any) -> set[str] | None:
    """The types of a schema's values, integers being numbers; None: unknown."""
    if not isinstance(schema, dict):
        return None
    types = schema.get("type")
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        return None
    return {"number" if name == "integer" else name for name in types}


def _constants(schema: Any) -> frozenset[str]:
    """The texts that a schema allows, in JSON; none if it allows others as well."""
    if not isinstance(schema, dict):
        return frozenset()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return frozenset()
    return frozenset(json.dumps(value) for value in values)
