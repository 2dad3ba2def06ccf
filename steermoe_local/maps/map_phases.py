"""Phases of maps: of which of the targets' tokens a map, or counts, are, where they are not of all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError, UsageError

THINKING = "thinking"
_FIRST = re.compile(r"first:([1-9][0-9]{0,8})")
_NAME = re.compile(r"(first|rest):([1-9][0-9]{0,8})|thinking|answer")


@dataclass(frozen=True)
class PhaseSplit:
    """How the tokens of each target are divided: the first `first` and those behind them; None: thinking and answer.

    Raises UsageError for a number below 1.
    """

    first: int | None = None

    def __post_init__(self) -> None:
        if self.first is not None and not 1 <= self.first < 1_000_000_000:
            raise UsageError(f"phase first:{self.first}: give a number of tokens from 1 on")

    @classmethod
    def parse(cls, text: str) -> PhaseSplit:
        """Read "first:N" or "thinking". Raises UsageError."""
        found = _FIRST.fullmatch(text)
        if found is None and text != THINKING:
            raise UsageError(f"phase {text!r}: give first:N, like first:16, or {THINKING}")
        return cls(int(found[1]) if found else None)

    def __str__(self) -> str:
        return THINKING if self.first is None else f"first:{self.first}"

    @property
    def names(self) -> tuple[str, str]:
        """The two phases, as maps name them."""
        return (THINKING, "answer") if self.first is None else (f"first:{self.first}", f"rest:{self.first}")

    def missing(self, phase: str, side: str) -> str:
        """Why there is no map of a phase without tokens on a side, and the cure."""
        if self.first is None:
            cure = "let the targets be whole replies, with their reasoning as the chat template writes it"
        else:
            cure = f"give fewer than {self.first} tokens, or longer targets"
        return f"no target of the {side} side has tokens of the phase {phase}, so it has no map; {cure}"


def phase_problem(phase: object) -> str | None:
    """What is wrong with a phase in a file; None: nothing. "" is all tokens."""
    if phase == "" or (isinstance(phase, str) and _NAME.fullmatch(phase)):
        return None
    return f"phase: {str(phase)[:40]!r} is none of first:N, rest:N, thinking and answer"


def read_phase(data: Mapping[str, Any], again: str) -> str:
    """The phase in the parsed JSON of a file, "" if there is none. Raises FormatError; `again` is the cure."""
    if "phase" not in data:
        return ""
    if not data["phase"]:
        raise FormatError(f"phase: {data['phase']!r} says nothing; leave it out; {again}")
    if problem := phase_problem(data["phase"]):
        raise FormatError(f"{problem}; {again}")
    return str(data["phase"])


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
