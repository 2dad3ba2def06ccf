"""Bounds of grammars: llama.cpp and llguidance read them by recursion, and some GBNF takes llama.cpp minutes a token."""

from __future__ import annotations

import re

from ..errors import UsageError

GUIDED = "%llguidance"
"""How a grammar of llguidance begins, as in llama.cpp; every other one is GBNF."""

MAX_GRAMMAR = 1 << 20  # characters
MAX_GRAMMAR_OF_FILE = 64 << 10
_MAX_RULES = 512  # of llguidance; 3,000 that refer to each other take 8 MiB of stack
_MAX_PARTS = 4000  # of GBNF: rules, groups, repetitions; 100,000 in one another take 8 MiB of stack
_MAX_PLAIN_PARTS = 64
_REPEATED = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*+"|\[(?:[^\]\\\n]|\\.)*+\]|#[^\n]*+')
_PLAIN = re.compile(r"\s*root\s*::=[\s|?*+{},\d.]*")


def require_bounded(grammar: str) -> None:
    """Raise UsageError for a grammar that could overflow the stack of the native libraries."""
    if len(grammar) > MAX_GRAMMAR:
        raise UsageError(f"grammar: {len(grammar)} characters; at most {MAX_GRAMMAR} are read")
    if grammar.startswith(GUIDED):
        if (n := sum(":" in line for line in grammar.splitlines())) > _MAX_RULES:
            raise UsageError(f"grammar: {n} rules; at most {_MAX_RULES} are read")
    elif (n := grammar.count("::=") + _n_parts(grammar)) > _MAX_PARTS:
        raise UsageError(f"grammar: {n} rules, groups and repetitions; at most {_MAX_PARTS} are read")


def require_of_file(grammar: str) -> None:
    """Raise UsageError for a grammar that is not read from a file: whoever wrote it may want it to take forever.

    llguidance bounds its own work, but for JSON Schema. llama.cpp does not: of GBNF only the one rule root is taken,
    with literals and classes of characters that are repeated or alternatives, but no groups and no other rules.
    """
    require_bounded(grammar)
    if len(grammar) > MAX_GRAMMAR_OF_FILE:
        raise UsageError(f"grammar: {len(grammar)} characters; at most {MAX_GRAMMAR_OF_FILE} are read from a file")
    cure = "leave it out, and give it to Sampling"
    if grammar.startswith(GUIDED):
        if "%json" in grammar:
            raise UsageError(f"grammar: one with %json is not read from a file; {cure}")
        return
    rest = _LITERAL.sub(" ", grammar)
    if not _PLAIN.fullmatch(rest) or _n_parts(rest) > _MAX_PLAIN_PARTS:
        raise UsageError(
            f"grammar: of GBNF only one rule without groups, with up to {_MAX_PLAIN_PARTS} alternatives and "
            f"repetitions, is read from a file; {cure}"
        )


def _n_parts(grammar: str) -> int:
    """At least as many rules as llama.cpp makes of groups, alternatives and repetitions."""
    n = sum(map(grammar.count, "(|?*+"))
    for found in _REPEATED.finditer(grammar):
        n += sum(int(number[:9]) for number in found.groups() if number)
    return n
