"""Phases of maps: of which of the targets' tokens a map, or counts, are, where they are not of all."""

from __future__ import annotations

import re

_NAME = re.compile(r"(first|rest):([1-9][0-9]{0,8})|thinking|answer")


def phase_problem(phase: object) -> str | None:
    """What is wrong with a phase in a file; None: nothing. "" is all tokens."""
    if phase == "" or (isinstance(phase, str) and _NAME.fullmatch(phase)):
        return None
    return f"phase: {str(phase)[:40]!r} is none of first:N, rest:N, thinking and answer"


def phase_words(phase: str) -> str:
    """A phase in words, behind "of"."""
    found = _NAME.fullmatch(phase)
    if found is None or found[1] is None:
        return f"the {phase}" if phase else "all tokens of the targets"
    return (
        f"the first {found[2]} tokens of each target"
        if found[1] == "first"
        else f"the tokens behind the first {found[2]}"
    )
