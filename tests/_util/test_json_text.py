"""JSON from strangers: linear, bounded before it is built, and refused in few words."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.json_text import BODY_LIMITS, FILE_LIMITS, JsonLimits, parse_json

SMALL = JsonLimits(values=100, containers=50, keys=20, key=30, depth=5, digits=40)

UNLIMITED = JsonLimits(*[1 << 40] * 3, key=1 << 40, depth=64, digits=1 << 12)
LONG = "k" * 10**6


def refusal(text: str, limits: JsonLimits = FILE_LIMITS, **options: Any) -> str:
    """Why a text is refused, in few words whatever its size."""
    with pytest.raises(ValueError) as caught:
        parse_json(text, limits, **options)
    message = str(caught.value)
    assert len(message) < 200
    assert "\n" not in message
    return message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text("ab\"\\,[{é", max_size=5), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


@given(JSON, st.booleans(), st.booleans())
def test_what_is_strict_json_is_read_as_json_reads_it(value: Any, ascii_only: bool, strict: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text, strict=strict) == json.loads(text)


@given(JSON, st.text('[]{},:"\\u1ed8 ', max_size=30), st.integers(0, 200))
def test_what_json_refuses_is_refused(value: Any, noise: str, place: int) -> None:
    text = json.dumps(value)
    text = text[:place] + noise + text[place:]
    try:
        expected = json.loads(text)
    except ValueError:
        refusal(text)
        refusal(text, strict=False)
    else:
        assert parse_json(text, strict=False) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
        ('[{"x": {"a": 1, "\\u0061": 3}}]', "'a' stands twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("-1e999", "-1e999"),
        ("1" + "0" * 400, "too large"),
        ("9" * 5000, "5000 characters"),
        ("0." + "1" * 5000, "5002 characters"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('["\\ud83d", "\\ude00"]', "surrogate"),
        ("\ud800".join('""'), "surrogate"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("[" * 900_000, "nested"),
        ("[" * 9_000_000, "values"),
        (json.dumps(dict.fromkeys(map(str, range(100_001)))), "more than 100000 keys"),
        (json.dumps({"k" * 1001: 1}), "1001 characters"),
        (f'{{"{LONG}": 1, "{LONG}": 2}}', "stands twice"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_refused(text: str, words: str) -> None:
    assert words in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 64 + "]" * 64,
        '"\\ud83d\\ude00"',
        "-0",
        "-0.0",
        "1e-999",
        "9" * 308,
        f'{{"{LONG[:1000]}": 1}}',
        '["\\\\ud800"]',
    ],
)
def test_taken(text: str) -> None:
    assert parse_json(text) == json.loads(text)


def test_data_sets_may_be_less_strict() -> None:
    assert parse_json('{"a": 1, "a": 1e999, "b": "\\ud800"}', strict=False) == {"a": float("inf"), "b": "\ud800"}
    assert "nested" in refusal("[" * 65 + "]" * 65, strict=False)
    assert "5000" in refusal("9" * 5000, strict=False)


@pytest.mark.parametrize(
    ("limit", "make"),
    [
        ("values", lambda n: [1] * (n - 1)),
        ("containers", lambda n: [[] for _ in range(n - 1)]),
        ("keys", lambda n: {str(i): 1 for i in range(n)}),
        ("key", lambda n: {"k" * n: 1}),
        ("digits", lambda n: 10 ** (n - 1)),
    ],
)
def test_each_limit(limit: str, make: Callable[[int], Any]) -> None:
    most = getattr(SMALL, limit)
    assert parse_json(json.dumps(make(most)), SMALL) == make(most)
    refusal(json.dumps(make(most + 1)), SMALL)


def test_what_stands_in_texts_does_not_count() -> None:
    text = json.dumps([',[{"\\' * 100, "[" * 200, {"a,": "{" * 300}])
    assert parse_json(text, SMALL) == json.loads(text)


BOMBS: dict[str, Callable[[int], str]] = {
    "one key": lambda n: "{" + ",".join(['"a":1'] * (n // 6)) + "}",
    "the last key": lambda n: "{" + ",".join(f'"{i}":1' for i in range(n // 9)) + ',"0":1}',
    "objects": lambda n: "[" + ",".join(['{"a":1,"a":1}'] * (n // 14)) + "]",
    "open text": lambda n: '["' + '\\",' * (n // 3),
    "quotes": lambda n: '"' * n,
    "commas in a text": lambda n: '["' + "," * n + '"]',
    "empty texts": lambda n: "[" + '"",' * (n // 3) + "1]",
    "brackets": lambda n: "[" * n,
    "digits": lambda n: "1" * n,
    "escapes": lambda n: '"' + "\\u00e9" * (n // 6) + '"',
}


@pytest.mark.parametrize("name", BOMBS)
def test_cost_is_linear(name: str) -> None:
    """4 MB take half a second at most; the square of 700,000 keys would be hours."""
    text = BOMBS[name](4 << 20)
    begin = time.thread_time()
    for limits in (BODY_LIMITS, UNLIMITED):
        with contextlib.suppress(ValueError):
            parse_json(text, limits)
    assert time.thread_time() - begin < 10


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded(name: str) -> None:
    """At most 60 bytes for a byte of text: an object of one key has 232."""
    text = BOMBS[name](1 << 20)
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            parse_json(text)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 60 << 20
