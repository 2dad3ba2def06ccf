"""Random walks through the grammars of JSON Schemas, and random schemas to walk through."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from steermoe_local.llama.grammars import GuidedGrammar, _byte_tokenizer
from steermoe_local.server.grammar import grammar_of_schema

N_BYTES = 256
END = N_BYTES  # stands for an end-of-generation token
CLOSING = b'"}]0e'  # what ends a value soonest


def grammar_of(schema: Any) -> GuidedGrammar:
    """The grammar of a schema, over single bytes. Raises ApiError."""
    return GuidedGrammar(grammar_of_schema(schema, "schema"), _byte_tokenizer())


def may_follow(grammar: GuidedGrammar) -> list[int]:
    """The bytes that may come next, and END where the text may end."""
    logits = np.zeros(N_BYTES + 1, np.float32)
    grammar.restrict(None, logits)
    return [int(token) for token in np.flatnonzero(np.isfinite(logits))]


def accepts(schema: Any, text: str) -> bool:
    """Whether the grammar of a schema accepts a text."""
    grammar = grammar_of(schema)
    for byte in text.encode("utf-8"):
        if not grammar.allows(byte):
            return False
        grammar.accept(byte)
    return grammar.allows(END)


def walk(schema: Any, rng: random.Random, n_free: int = 60, n_most: int = 3000) -> str:
    """A text of the schema's grammar: `n_free` random bytes, then the shortest way out that is seen."""
    grammar = grammar_of(schema)
    text = bytearray()
    while len(text) < n_most:
        following = may_follow(grammar)
        if END in following and (len(following) == 1 or len(text) >= n_free or rng.random() < 0.3):
            return text.decode("utf-8")
        choices = [byte for byte in following if byte != END]
        solid = [byte for byte in choices if byte not in b" \t\r\n"] or choices
        closing = [byte for byte in CLOSING if byte in solid]
        plain = [byte for byte in solid if byte < 0x80] or solid
        if closing and rng.random() < (0.7 if len(text) >= n_free else 0.15):
            byte = closing[0]
        else:
            byte = rng.choice(choices if rng.random() < 0.1 else plain if rng.random() < 0.8 else solid)
        grammar.accept(byte)
        text.append(byte)
    raise AssertionError(f"no end of {json.dumps(schema)} after {bytes(text[-80:])!r}")


STRINGS = ["", "a", "two words", 'a"b', "a\nb", "\t", "\\", "\\n", "é", "😀", "/", "a\\u0041", "$ref", " ", "\r\f\b"]
PATTERNS = [r"^\d{3}-\d{4}$", r"^\w+$", r"^[A-Z]\S*$", r"\.", r"^a\.b$", r"^\s?x\s?$", r"^(foo|ba[rz])+$", r"[^\d\s]"]
PATTERNS += ['^["\\\\]+$', r"^[^\"]*$", r"^.{2,4}$", r"\/", r"^\D\W$", r"^\u0041[\x42-C]*$", "^é+$"]
PATTERNS += [r"^[\w.+-]+@\w+\.\w{2,}$", r"^[^\W_]+$", r"^a$|^b$", r"^(?:x{2,3}|y{1,})$", r"^[[&~]+$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri", "password"]


def random_document(rng: random.Random) -> Any:
    """A schema that may refer to itself."""
    return _reference(rng, 3) if _maybe(rng, 0.15) else random_schema(rng)


def random_schema(rng: random.Random, depth: int = 3) -> Any:
    """A schema of the keywords that are in use; some are not supported."""
    kinds = ["string", "number", "enum", "const", "typed", "bool"]
    if depth:
        kinds += ["object", "object", "array", "array", "any", "all", "one"]
    return _MAKERS[rng.choice(kinds)](rng, depth)


def _maybe(rng: random.Random, share: float = 0.5) -> bool:
    return rng.random() < share


def _string(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    if _maybe(rng, 0.4):
        schema["pattern"] = rng.choice(PATTERNS)
    elif _maybe(rng, 0.4):
        schema["format"] = rng.choice(FORMATS)
    if _maybe(rng, 0.3):
        schema["minLength"] = rng.randint(0, 5)
    if _maybe(rng, 0.3):
        schema["maxLength"] = rng.randint(2, 12)
    return schema


def _number(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": rng.choice(["number", "integer"])}
    scale = rng.choice([1, 10, 1000, 10**6, 0.5])
    if _maybe(rng):
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = rng.randint(-12, 10) * scale
    if _maybe(rng):
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = rng.randint(10, 40) * scale
    if _maybe(rng, 0.2):
        schema["multipleOf"] = rng.choice([1, 3, 0.5, 0.25, 7, 10])
    return schema


def _value(rng: random.Random, depth: int = 2) -> Any:
    plain = [None, True, False, rng.randint(-100, 10**9), round(rng.uniform(-5, 5), 3), rng.choice(STRINGS)]
    plain += [rng.uniform(-1e6, 1e6), 1e-7 * rng.randint(1, 99)]
    if depth and _maybe(rng, 0.3):
        inner = [_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        return inner if _maybe(rng) else dict(zip(rng.sample(STRINGS, len(inner)), inner, strict=True))
    return rng.choice(plain)


def _object(rng: random.Random, depth: int) -> Any:
    names = rng.sample([*STRINGS, "name", "x1"], rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {n: random_schema(rng, depth - 1) for n in names}}
    if _maybe(rng, 0.8):
        schema["required"] = [name for name in names if _maybe(rng, 0.7)]
    if _maybe(rng, 0.5):
        schema["additionalProperties"] = rng.choice([True, False, random_schema(rng, depth - 1)])
    if _maybe(rng, 0.15):
        schema["patternProperties"] = {rng.choice(["^x", r"\d$", "^é"]): random_schema(rng, depth - 1)}
    if _maybe(rng, 0.15):
        schema[rng.choice(["minProperties", "maxProperties"])] = rng.randint(0, 3)
    return schema


def _array(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array"}
    if _maybe(rng, 0.8):
        schema["items"] = random_schema(rng, depth - 1)
    if _maybe(rng, 0.3):
        schema["prefixItems"] = [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    if _maybe(rng, 0.4):
        schema["minItems"] = rng.randint(0, 3)
    if _maybe(rng, 0.4):
        schema["maxItems"] = rng.randint(1, 5)
    if _maybe(rng, 0.1):
        schema["uniqueItems"] = _maybe(rng)
    return schema


def _some(rng: random.Random, depth: int) -> list[Any]:
    return [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]


def _reference(rng: random.Random, depth: int) -> Any:
    """A recursive one: a list or a tree that ends with null or without children."""
    where = rng.choice(["$defs", "definitions"])
    more = rng.choice(
        [
            {"anyOf": [{"type": "null"}, {"$ref": f"#/{where}/n"}]},
            {"type": "array", "items": {"$ref": f"#/{where}/n"}, "maxItems": 2},
        ]
    )
    properties = {"value": random_schema(rng, depth - 1), "next": more}
    return {where: {"n": {"type": "object", "properties": properties, "required": ["value"]}}, "$ref": f"#/{where}/n"}


_MAKERS = {
    "string": _string,
    "number": _number,
    "enum": lambda rng, depth: {"enum": [_value(rng) for _ in range(rng.randint(1, 4))]},
    "const": lambda rng, depth: {"const": _value(rng)},
    "typed": lambda rng, depth: {"type": rng.sample(["null", "boolean", "integer", "string"], rng.randint(1, 3))},
    "bool": lambda rng, depth: rng.choice([True, {}, True, False]),
    "object": _object,
    "array": _array,
    "any": lambda rng, depth: {"anyOf": _some(rng, depth)},
    "all": lambda rng, depth: {"allOf": _some(rng, depth)},
    "one": lambda rng, depth: {"oneOf": _some(rng, depth)},
}
