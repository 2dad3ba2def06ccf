"""TOML from strangers: one error for all that is wrong, and no square of the size."""

from __future__ import annotations

import time
import tomllib

import pytest

from steermoe_local._util.toml_text import MAX_TOML, TomlError, parse_toml


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("a = 1\nb = ", "Invalid value", 2),
        ("a = 1\na = 2", "overwrite", 2),
        ("a = " + "9" * 100_000, "digits", None),
        ("a = 0x" + "f" * 100_000, "400000 bits", None),
        ("a = " + "[" * 100_000 + "]" * 100_000, "nested", None),
        ("#" + "x" * MAX_TOML, "larger than 1024 KiB", None),
        ("b = 1\n" + ".".join("a" * 100_000) + " = 1", "parts", 2),
        ("[" + ".".join(['"a.b"'] * 100) + "]", "parts", 1),
        ("x = {" + " . ".join(["'a'"] * 100) + " = 1}", "parts", 1),
    ],
    ids=range(9),
)
def test_refused(text: str, words: str, line: int | None) -> None:
    begin = time.thread_time()
    with pytest.raises(TomlError) as caught:
        parse_toml(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.line == line
    assert time.thread_time() - begin < 5  # tomllib alone takes minutes, and all memory, for a key of many parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b.c = 1",
        "a = '" + "word. " * 500 + "'",
        'a = "' + "x.y/" * 500 + '"',
        "# " + ". " * 500,
        "a = 9223372036854775807",
    ],
)
def test_taken(text: str) -> None:
    assert parse_toml(text) == tomllib.loads(text)
