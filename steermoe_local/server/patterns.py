"""Regular expressions of JSON Schema, in the syntax of llguidance.

A schema's patterns are ECMA 262's; Python (pydantic, jsonschema) and Rust (llguidance) read some of them otherwise.
What is written here matches only texts that ECMA 262 and Python both match, and what would mean something else is
refused.
"""

from __future__ import annotations

import re

# What each class stands for, in the narrow reading (of texts that may come) and in the wide one (of those excluded).
_NARROW = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r" \t\n\r\f\x{a0}\x{2028}\x{2029}",
}
_WIDE = {
    "d": r"\p{Nd}",
    "w": r"\p{L}\p{N}\p{M}_",
    "s": r"\s\x{feff}\x1c-\x1f",
}
# What a string of a grammar can spell; llguidance takes a class that holds all control characters for one that holds
# the quote and the backslash, too.
_SPELLABLE = r"[^\x00-\x07\x0b\x0e-\x1f\x7f]"
_NOT_A_LINE_END = rf"[[^\n\r\x{{2028}}\x{{2029}}]&&{_SPELLABLE}]"
_ESCAPES = re.compile(r"\\(?:[nrtfv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{1,6}\}|[pP]\{[\w=]+\}|\W|_)")
_GROUP = re.compile(r"\((?:\?(?::|P?<[A-Za-z_]\w*>))?(?!\?)")


class PatternError(ValueError):
    """A pattern that cannot be used; its text says why."""


def portable_pattern(pattern: str) -> str:
    """The pattern for llguidance. Raises PatternError for what it cannot express, or would read otherwise."""
    out, index = [], 0
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            text, index = _escape(pattern, index)
        elif character == "[":
            text, index = _class(pattern, index)
        elif character == "(":
            group = _GROUP.match(pattern, index)
            if group is None:
                raise PatternError(f"{pattern[index : index + 4]!r}: look-around and flags are not supported")
            text, index = group[0], group.end()
        else:
            text, index = _NOT_A_LINE_END if character == "." else character, index + 1
        out.append(text)
    return "".join(out)


def _escape(pattern: str, index: int) -> tuple[str, int]:
    """An escape outside of a class, and where it ends."""
    letter = pattern[index + 1 : index + 2]
    if letter and letter in "dws":
        return f"[{_NARROW[letter]}]", index + 2
    if letter and letter in "DWS":
        return f"[[^{_WIDE[letter.lower()]}]&&{_SPELLABLE}]", index + 2
    return _character(pattern, index)


def _character(pattern: str, index: int) -> tuple[str, int]:
    found = _ESCAPES.match(pattern, index)
    if found is None:
        raise PatternError(f"{pattern[index : index + 2]!r} is not supported")
    text = found[0]
    if text.startswith("\\u") and text[2] != "{":
        text = f"\\x{{{text[2:]}}}"
    return (text[1] if text[1].isspace() or text[1] == "_" else text), found.end()


def _class(pattern: str, index: int) -> tuple[str, int]:
    """A class in brackets, and where it ends. What it excludes is read widely."""
    negated = pattern.startswith("^", index + 1)
    table, complement = (_WIDE, _NARROW) if negated else (_NARROW, _WIDE)
    out, index = ["[^" if negated else "["], index + 1 + negated
    if pattern.startswith("]", index):
        raise PatternError("'[]': an empty class is read differently by different programs; escape the bracket")
    while not pattern.startswith("]", index):
        letter = pattern[index + 1 : index + 2]
        if index >= len(pattern):
            raise PatternError("'[' has no ']'")
        if pattern[index] != "\\":
            if pattern.startswith("--", index):
                raise PatternError("'--' in a class is read differently by different programs; escape the '-'")
            text, index = "\\" * (pattern[index] in "[&~") + pattern[index], index + 1
        elif letter and letter in "dws":
            text, index = table[letter], index + 2
        elif letter and letter in "DWS":
            text, index = f"[^{complement[letter.lower()]}]", index + 2
        else:
            text, index = _character(pattern, index)
        out.append(text)
    return f"[{''.join(out)}]&&{_SPELLABLE}]", index + 1
