"""The text form of the rules of a steering plan: `WHERE: WHAT`.

    answer: formal +8 -8
    thinking: none
    answer[0:32] every 2: careful +0 -20 layers=3-7
    answer after "Answer:" when faithful < 0.1 over prompt: faithful +0 -50 mode=capped cap=4

WHERE is a phase (prompt, thinking, answer) or all, then, in any order, a window [A:B], `after TEXT`, `until TEXT` (or
a token: `after #123`), `every N` and `when CONDITION`. A condition is `MAP [by rd|effect] < X over prompt`,
`... over last N`, `entropy > X` or `margin < X`. WHAT is none, or the name of a map or bias file, the numbers of
experts (+ promoted, - suppressed) and further fields of a choice as NAME=VALUE. Without "WHERE:" a rule is of all
tokens. Texts and names with spaces, colons or quotes are written in single quotes, or in double quotes as JSON has
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import UsageError
from .plan_rules import EVERYWHERE, MAX_RULE, MAX_RULES, NONE, PHASES, Condition, RuleSpec, Where

_QUOTED = r'"(?:[^"\\]|\\.)*"' + r"|'[^']*'"
_WORD = re.compile(rf"\s*({_QUOTED}|\[[^\]\s]*\]|[<>]|:|[^\s\"'<>\[\]:]+)")
_WHAT_WORD = re.compile(rf"\s*({_QUOTED}|[^\s\"']+)")
_WINDOW = re.compile(r"\[(-?\d*):(-?\d*)\]")
_NUMBER = re.compile(r"[+-]\d{1,9}")
_TYPES = {"layers": str, "preset": str, "rank": str, "mode": str, "scale": float, "weights": str, "cap": float}
_PLAIN = re.compile(r"[^\s\"'<>\[\]:#+-][^\s\"'<>\[\]:]*")
_KEYWORDS = frozenset({"after", "until", "every", "when", "by", "over", "last", "reverse", "entropy", "margin", NONE})


def parse_rules(texts: Sequence[str]) -> list[RuleSpec]:
    """Read rules in their text form. Raises UsageError, which names the rule by its number and text."""
    if not 1 <= len(texts) <= MAX_RULES:
        raise UsageError(f"a plan has 1 to {MAX_RULES} rules, not {len(texts)}")
    return [parse_rule(text, number) for number, text in enumerate(texts, 1)]


def parse_rule(text: str, number: int | None = None) -> RuleSpec:
    """Read one rule. Raises UsageError, which names the rule by `number` and its text."""
    try:
        if len(text) > MAX_RULE:
            raise UsageError(f"longer than {MAX_RULE} characters")
        return _Reader(text).rule()
    except UsageError as error:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise UsageError(f"rule{'' if number is None else f' {number}'} {shown!r}: {error}") from None


class _Reader:
    """Reads the words of a rule from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rule(self) -> RuleSpec:
        where = self._where() if self._has_where() else Where()
        name, choice = self._what()
        return RuleSpec(where, name, choice)

    def _has_where(self) -> bool:
        """Whether a colon ends a WHERE, rather than belonging to the path of a rule without one."""
        first = _WORD.match(self._text)
        known = first is not None and first[1] in (*PHASES, EVERYWHERE)
        if known and ":" not in self._text and "[" not in self._text:
            return False  # a map of that name, of all tokens
        if not known and ":" in re.sub(_QUOTED, "", self._text):
            word = first[1] if first else ""
            _refuse(
                f"{word!r} is no place; begin with {', '.join(PHASES)} or {EVERYWHERE}, or quote a name with a colon"
            )
        return known

    def _where(self) -> Where:
        place = self._next()
        fields: dict[str, Any] = {"phase": None if place == EVERYWHERE else place}
        while (word := self._next()) != ":":
            if word.startswith("["):
                self._set(fields, "start", self._window(word)[0])
                fields["stop"] = self._window(word)[1]
            elif word in ("after", "until"):
                self._set(fields, word, self._mark(word))
            elif word == "every":
                self._set(fields, word, self._integer(self._next(), "every"))
            elif word == "when":
                self._set(fields, word, self._condition())
            elif not word:
                _refuse("a colon and a steering are missing, like answer: formal +8 -8, or answer: none")
            else:
                _refuse(f"{word!r} is not understood; give [A:B], after, until, every or when, and a colon behind them")
        return Where(**fields)

    def _set(self, fields: dict[str, Any], name: str, value: Any) -> None:
        if name in fields:
            _refuse(f"{'a window' if name == 'start' else name} twice; give it once")
        fields[name] = value

    def _window(self, word: str) -> tuple[int, int | None]:
        window = _WINDOW.fullmatch(word)
        if window is None or "-" in window.groups():
            _refuse(f"{word}: no window; write [A:B], [A:] or [:B], in tokens")
        start, stop = (int(number) if number else None for number in window.groups())
        return start or 0, stop

    def _mark(self, name: str) -> str | int:
        word = self._next()
        if word.startswith("#") and word[1:].isdecimal() and len(word) < 12:
            return int(word[1:])
        if word in ("", ":"):
            _refuse(f"{name}: which text? write it in quotes, or a token as #123")
        return _unquoted(word)

    def _condition(self) -> Condition:
        what = self._next()
        fields: dict[str, Any] = {"measure": what if what in ("entropy", "margin") else "routing"}
        if fields["measure"] == "routing":
            fields["map"] = "" if what in ("", ":", "<", ">") else _unquoted(what)
        sign = self._next()
        if sign == "by":
            fields["by"] = self._next()
            sign = self._next()
        if sign not in ("<", ">"):
            _refuse(f"when {what}: write < or > and a number behind it, like {what or 'faithful'} < 0.1")
        fields["below" if sign == "<" else "above"] = self._float(self._next(), "when")
        if fields["measure"] == "routing":
            if self._next() != "over":
                _refuse(f"when {what}: over which tokens? write over prompt, or over last 16")
            span = self._next()
            if span == "last":
                fields["last"] = self._integer(self._next(), "over last")
            elif span != "prompt":
                _refuse(f"when {what}: over {span}: write over prompt, or over last 16")
        return Condition(**fields)

    def _what(self) -> tuple[str | None, dict[str, Any]]:
        words = self._rest()
        if not words:
            _refuse(f"what steers there? give the name of a map, or {NONE}")
        name = None if words[0] == NONE else _unquoted(words[0])
        choice: dict[str, Any] = {}
        for word in words[1:]:
            key, is_field, value = word.partition("=")
            if _NUMBER.fullmatch(word):
                self._set(choice, "activate" if word[0] == "+" else "deactivate", int(word[1:]))
            elif word == "reverse":
                self._set(choice, "reverse", True)
            elif is_field and key in _TYPES:
                given = value if _TYPES[key] is str else self._limit(value) if key == "cap" else self._float(value, key)
                self._set(choice, key, given)
            else:
                _refuse(
                    f"{word!r} is not understood; behind the name come +N, -N, reverse and "
                    f"{', '.join(f'{key}=' for key in _TYPES)}"
                )
        return name, choice

    def _limit(self, value: str) -> float:
        return float("inf") if value == "inf" else self._float(value, "cap")

    def _next(self) -> str:
        """The next word, "" at the end."""
        found = _WORD.match(self._text, self._at)
        if found is None:
            if self._text[self._at :].strip():
                _refuse(f"{self._text[self._at :].strip()[:20]!r}: a quote or bracket that has no end")
            return ""
        self._at = found.end()
        return found[1]

    def _rest(self) -> list[str]:
        words = []
        while found := _WHAT_WORD.match(self._text, self._at):
            words.append(found[1])
            self._at = found.end()
        if self._text[self._at :].strip():
            _refuse(f"{self._text[self._at :].strip()[:20]!r}: a quote that has no end")
        return words

    @staticmethod
    def _integer(word: str, name: str) -> int:
        if not re.fullmatch(r"\d{1,9}", word):
            _refuse(f"{name} {word}: give a whole number")
        return int(word)

    @staticmethod
    def _float(word: str, name: str) -> float:
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", word):
            _refuse(f"{name}: {word!r} is no number")
        return float(word)


def _refuse(why: str) -> NoReturn:
    raise UsageError(why)


def _unquoted(word: str) -> str:
    """What a word says. Raises UsageError."""
    if word[:1] == "'":
        return word[1:-1]
    if word[:1] != '"':
        return word
    try:
        return str(json.loads(word))
    except ValueError:
        raise UsageError(f"{word}: not a text as JSON has it; use single quotes for backslashes") from None


def _quoted(text: str) -> str:
    """A word that says `text`."""
    plain = _PLAIN.fullmatch(text) and text not in _KEYWORDS and text.isprintable()
    return text if plain else json.dumps(text, ensure_ascii=False)


def format_rule(rule: RuleSpec) -> str:
    """The text form of a rule; `parse_rule` reads it back."""
    where = rule.where
    words = [(where.phase or EVERYWHERE) + format_window(where.start, where.stop)]
    for name in ("after", "until"):
        mark = getattr(where, name)
        if mark is not None:
            words += [name, f"#{mark}" if isinstance(mark, int) else _quoted(mark)]
    if where.every != 1:
        words += ["every", str(where.every)]
    if where.when is not None:
        words += ["when", *_condition_words(where.when)]
    return f"{' '.join(words)}: {' '.join(_what_words(rule))}"


def format_window(start: int, stop: int | None) -> str:
    """A window as it is written behind a phase; "" for all tokens."""
    return "" if not start and stop is None else f"[{start}:{'' if stop is None else stop}]"


def _condition_words(when: Condition) -> Iterable[str]:
    if when.measure == "routing":
        yield _quoted(when.map)
        if when.by != "rd":
            yield from ("by", when.by)
    else:
        yield when.measure
    yield from ("<" if when.above is None else ">", repr(when.limit))
    if when.measure == "routing":
        yield from ("over", "prompt") if when.last is None else ("over", "last", str(when.last))


def _what_words(rule: RuleSpec) -> Iterable[str]:
    yield NONE if rule.name is None else _quoted(rule.name)
    for name, value in rule.choice.items():
        if name in ("activate", "deactivate"):
            yield f"{'+' if name == 'activate' else '-'}{value}"
        elif name == "reverse":
            if value:
                yield name
        elif value is not None:
            yield f"{name}={value if isinstance(value, str) else repr(value)}"
