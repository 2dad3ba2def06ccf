"""The text form of the rules of a steering plan: `WHERE: WHAT`.

    answer: formal +8 -8
    thinking: none
    answer[0:32] every 2: careful +0 -20 layers=3-7
    answer after "Answer:" when faithful < 0.1 over prompt: faithful +0 -50 mode=capped cap=4

WHERE is a phase (prompt, thinking, answer) or all, then, in any order, a window [A:B], `after TEXT`, `until TEXT` (or
a token: `after #123`), `every N` and `when CONDITION`. A condition is `MAP [by rd|effect] < X over prompt`,
`... over last N`, `entropy > X` or `margin < X`. WHAT is none, or the name of a map or bias file, the numbers of
experts (+ promoted, - suppressed), reverse, and further fields of a choice as NAME=VALUE. Without "WHERE:" a rule is of
all tokens. Texts and names with spaces, colons or quotes are written in single quotes, or in double quotes as JSON has
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .._util.json_text import quoted
from ..errors import UsageError, prefixed
from .plan_rules import CHOICE, EVERYWHERE, MAX_RULES, NONE, PHASES, Condition, RuleSpec, Where, shown

MAX_RULE = 4096
"""Most characters of a rule in its text form."""

# Possessive (*+, ++), so that a text without an end costs no more than one with.
_QUOTED = r'"(?:[^"\\]|\\.)*+"' + r"|'[^']*+'"
_WORD = re.compile(rf"\s*+({_QUOTED}|\[[^\]]*+\]|[<>:]|[^\s\"'<>\[\]:]++)", re.DOTALL)
_WHAT_WORD = re.compile(rf"\s*+((?:[a-z]++=)?(?:{_QUOTED})|[^\s\"']++)", re.DOTALL)
_INTEGER = re.compile(r"[0-9]{1,10}")  # not \d, which is the digits of all scripts
_EXPERTS = re.compile(r"[+-][0-9]{1,9}")
_REAL = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]{1,3})?")
_PLAIN = re.compile(r"[^\s\"'<>\[\]:;#+-][^\s\"'<>\[\]:;]*")
_PLAIN_VALUE = re.compile(r"[^\s\"';]+")
_KEYWORDS = frozenset({"after", "until", "every", "when", "by", "over", "last", "reverse", "entropy", "margin", NONE})
_FIELDS = [name for name in CHOICE if name not in ("activate", "deactivate", "reverse")]


def parse_rules(texts: Sequence[str]) -> list[RuleSpec]:
    """Read rules in their text form. Raises UsageError, which names the rule by its number and text."""
    if not 1 <= len(texts) <= MAX_RULES:
        raise UsageError(f"a plan has 1 to {MAX_RULES} rules, not {len(texts)}")
    return [parse_rule(text, number) for number, text in enumerate(texts, 1)]


def split_rules(text: str) -> list[str]:
    """The rules of one line, which semicolons outside of quotes separate; what is empty is left out."""
    parts: list[str] = []
    quote, escaped, start = "", False, 0
    for at, letter in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = letter == "\\" and quote == '"'
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == ";":
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def parse_rule(text: str, number: int | None = None, *, colon: bool = True) -> RuleSpec:
    """Read one rule. Without `colon` it may be left out, as in `answer[0:32] formal +8`.

    Raises UsageError, which names the rule by `number` and its text.
    """
    with _naming("rule" if number is None else f"rule {number}", text):
        if ";" in text and len(rules := split_rules(text)) > 1:
            raise UsageError(f"{len(rules)} rules in one text; give them as {len(rules)}, or quote the semicolon")
        return require_short(_Reader(text, colon).rule())


def parse_where(text: str) -> Where:
    """Read a WHERE alone, like `answer[0:32] every 2`. Raises UsageError, which names it."""
    with _naming("where", text):
        return _Reader(text, colon=False).where()


@contextmanager
def _naming(what: str, text: str) -> Iterator[None]:
    """Put what is read, and its text, before the message of an error."""
    with prefixed(f"{what} {quoted(text, 80)}"):
        if len(text) > MAX_RULE:
            raise UsageError(f"longer than {MAX_RULE} characters")
        yield


def require_short(rule: RuleSpec) -> RuleSpec:
    """A rule whose text form can be read back. Raises UsageError."""
    if len(format_rule(rule)) > MAX_RULE:
        raise UsageError(f"longer than {MAX_RULE} characters, as it is written")
    return rule


class _Reader:
    """Reads the words of a rule from left to right. Without `colon` it may be left out."""

    def __init__(self, text: str, colon: bool) -> None:
        self._text, self._colon = text, colon
        self._at = 0

    def rule(self) -> RuleSpec:
        where = self._where() if self._has_where() else Where()
        name, choice = self._what()
        return RuleSpec(where, name, choice)

    def where(self) -> Where:
        places = f"{', '.join(PHASES)} or {EVERYWHERE}"
        if (first := next(self._words(), "")) not in (*PHASES, EVERYWHERE):
            _refuse(f"{shown(first)} is no place; begin with {places}, like answer[0:32]")
        where = self._where()
        if rest := self._text[self._at :].strip():
            _refuse(f"{quoted(rest, 20)} is not understood; behind {first} come [A:B], after, until, every or when")
        return where

    def _has_where(self) -> bool:
        """Whether a colon ends a WHERE, rather than belonging to the path of a rule without one."""
        words = self._words()
        first = next(words, "")
        if first in (*PHASES, EVERYWHERE):
            return True
        if first == ":" or ":" in words:
            _refuse(
                f"{shown(first)} is no place; begin with {', '.join(PHASES)} or {EVERYWHERE}, "
                "or quote a name with a colon"
            )
        return False

    def _words(self) -> Iterator[str]:
        """The words up to the end, or what is none."""
        at = 0
        while found := _WORD.match(self._text, at):
            yield found[1]
            at = found.end()

    def _where(self) -> Where:
        place = self._next()
        fields: dict[str, Any] = {"phase": None if place == EVERYWHERE else place}
        before = self._at
        while (word := self._next()) != ":":
            if word.startswith("["):
                start, stop = self._window(word)
                self._set(fields, "start", start)
                fields["stop"] = stop
            elif word in ("after", "until"):
                self._set(fields, word, self._mark(word))
            elif word == "every":
                self._set(fields, word, self._integer(self._next(), "every"))
            elif word == "when":
                self._set(fields, word, self._condition())
            elif not self._colon:
                self._at = before
                break
            elif not word:
                _refuse(
                    f"a colon and what steers are missing, like {place}: formal +8 -8, or {place}: {NONE}; "
                    f'quote a map of that name: "{place}"'
                )
            else:
                _refuse(
                    f"{shown(word)} is not understood; behind {place} come [A:B], after, until, every or when, "
                    "and then a colon"
                )
            before = self._at
        return Where(**fields)

    def _set(self, fields: dict[str, Any], name: str, value: Any) -> None:
        if name in fields:
            _refuse(f"{'a window' if name == 'start' else name} twice; give it once")
        fields[name] = value

    def _window(self, word: str) -> tuple[int, int | None]:
        start, colon, stop = word[1:-1].partition(":")
        ends = [end.strip() for end in (start, stop)]
        if not colon or not all(not end or _INTEGER.fullmatch(end.removeprefix("-")) for end in ends):
            _refuse(f"{shown(word)}: no window; write [A:B], [A:] or [:B], in tokens")
        return int(ends[0] or 0), int(ends[1]) if ends[1] else None

    def _mark(self, name: str) -> str | int:
        word = self._next()
        if word.startswith("#"):
            if not _INTEGER.fullmatch(word[1:]):
                _refuse(f"{name} {shown(word)}: no token, which is written as #123; write a text in quotes")
            return int(word[1:])
        if word in ("", ":", "<", ">") or word.startswith("["):
            _refuse(f"{name}: which text? write it in quotes, or a token as #123")
        return _unquoted(word)

    def _condition(self) -> Condition:
        what = self._next()
        fields: dict[str, Any] = {"measure": what if what in ("entropy", "margin") else "routing"}
        if fields["measure"] == "routing":
            fields["map"] = "" if what[:1] in ("", ":", "<", ">", "[") else _unquoted(what)
        told = f"when {shown(fields.get('map', what))}" if what else "when"
        sign = self._next()
        if sign == "by":
            fields["by"] = self._next()
            sign = self._next()
        if sign not in ("<", ">"):
            _refuse(f"{told}: write < or > and a number behind it, like faithful < 0.1 over prompt, or entropy > 2")
        limit = self._next()
        if limit.startswith("="):
            _refuse(f"{told}: {sign}= is no comparison here; write < or >")
        fields["below" if sign == "<" else "above"] = self._float(limit, "when")
        if fields["measure"] == "routing":
            if self._next() != "over":
                _refuse(
                    f"{told}: no measure, which are entropy and margin; behind the name of a map write over "
                    "which tokens it is taken: over prompt, or over last 16"
                )
            span = self._next()
            if span == "last":
                fields["last"] = self._integer(self._next(), "over last")
            elif span != "prompt":
                _refuse(f"{told}: over {shown(span)}: write over prompt, or over last 16")
        return Condition(**fields)

    def _what(self) -> tuple[str | None, dict[str, Any]]:
        words = self._rest()
        if not words:
            _refuse(f"what steers there? give the name of a map, or {NONE}")
        if _EXPERTS.fullmatch(words[0]):
            _refuse(f"{words[0]} of which map? begin with its name, like formal {words[0]}")
        name = None if words[0] == NONE else _unquoted(words[0])
        choice: dict[str, Any] = {}
        for word in words[1:]:
            key, is_field, value = word.partition("=")
            if _EXPERTS.fullmatch(word):
                self._set(choice, "activate" if word[0] == "+" else "deactivate", int(word[1:]))
            elif word in ("reverse", "reverse=true", "reverse=false"):
                self._set(choice, "reverse", value != "false")
            elif is_field and key in _FIELDS:
                self._set(choice, key, _unquoted(value) if CHOICE[key] == (str,) else self._limit(value, key))
            else:
                _refuse(
                    f"{shown(word)} is not understood; behind the name come +N, -N, reverse and "
                    f"{', '.join(f'{key}=' for key in _FIELDS)}"
                )
        return name, choice

    def _limit(self, value: str, name: str) -> float:
        return float("inf") if (name, value) == ("cap", "inf") else self._float(value, name)

    def _next(self) -> str:
        """The next word, "" at the end."""
        found = _WORD.match(self._text, self._at)
        if found is None:
            if self._text[self._at :].strip():
                _refuse(f"{quoted(self._text[self._at :].strip(), 20)}: a quote or bracket that has no end")
            return ""
        self._at = found.end()
        return found[1]

    def _rest(self) -> list[str]:
        words = []
        while found := _WHAT_WORD.match(self._text, self._at):
            words.append(found[1])
            self._at = found.end()
        if self._text[self._at :].strip():
            _refuse(f"{quoted(self._text[self._at :].strip(), 20)}: a quote that has no end")
        return words

    @staticmethod
    def _integer(word: str, name: str) -> int:
        if not _INTEGER.fullmatch(word):
            _refuse(f"{name} {shown(word)}: give a whole number")
        return int(word)

    @staticmethod
    def _float(word: str, name: str) -> float:
        if not _REAL.fullmatch(word):
            _refuse(f"{name}: {shown(word)} is no number")
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
        raise UsageError(f"{shown(word)}: not a text as JSON has it; use single quotes for backslashes") from None


def _quoted(text: str) -> str:
    """A word that says `text`."""
    plain = _PLAIN.fullmatch(text) and text not in _KEYWORDS and text.isprintable()
    return text if plain else _in_quotes(text)


def _in_quotes(text: str) -> str:
    """A text as JSON has it, with letters as they are and everything that is not printed as its number."""
    return "".join(
        sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in json.dumps(text, ensure_ascii=False)
    )


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
        words += ["when", format_condition(where.when)]
    return f"{' '.join(words)}: {' '.join(_what_words(rule))}"


def format_window(start: int, stop: int | None) -> str:
    """A window as it is written behind a phase; "" for all tokens."""
    return "" if not start and stop is None else f"[{start}:{'' if stop is None else stop}]"


def format_condition(when: Condition) -> str:
    """A condition as it is written behind "when"."""
    return " ".join(_condition_words(when))


def _condition_words(when: Condition) -> Iterable[str]:
    if when.measure == "routing":
        yield _quoted(when.map)
        if when.by != "rd":
            yield from ("by", when.by)
    else:
        yield when.measure
    yield from ("<" if when.above is None else ">", _number(when.limit))
    if when.measure == "routing":
        yield from ("over", "prompt") if when.last is None else ("over", "last", str(when.last))


def _what_words(rule: RuleSpec) -> Iterable[str]:
    yield NONE if rule.name is None else _quoted(rule.name)
    for name, value in rule.choice.items():
        if name in ("activate", "deactivate"):
            yield f"{'+' if name == 'activate' else '-'}{value}"
        elif name == "reverse":
            yield name if value else f"{name}=false"
        elif isinstance(value, str):
            plain = _PLAIN_VALUE.fullmatch(value) and value.isprintable()
            yield f"{name}={value if plain else _in_quotes(value)}"
        else:
            yield f"{name}={_number(value)}"


def _number(value: float) -> str:
    """A number that reads back as the same, whole ones without a point."""
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)
