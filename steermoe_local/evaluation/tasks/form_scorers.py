"""Scorers of an answer's form: its language (English or German), and JSON against prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..._util.json_text import parse_json
from ...errors import UsageError
from ...pairs.prompts import PromptItem
from .tasks import ILL_FORMED, Score, Scorer

_MAX_CHARACTERS = 20_000
_LETTERS = re.compile(r"[^\W\d_]+")

# words of one language alone: not "in", "so", "was", "die", "war", "hat", "an", "also", "man", "will", "bin"
_GERMAN_WORDS = """
der das und ist nicht ein eine einen einem einer eines mit für auf zu den dem des sich im als auch aus bei wird
werden sind oder wie aber nach über durch kann können sie ich du wir ihr ihre ihren sein seine seinen es wenn
dass daß noch nur schon mehr sehr hier dort dann weil zum zur vom beim haben habe hatte hast einmal immer viel
viele gibt geht macht machen sollte sollten muss müssen etwa etwas bis um vor unter zwischen ohne gegen wurde
morgens abends heute gestern montags sonntags täglich
wurden waren diese dieser dieses diesen jede jeder jedes keine kein nein ja bitte gern danke heißt liegt besteht
meist oft damit daher denn doch mal gut groß größte einfach zuerst deine dein dir dich mir mich uns ihm ihn
sowie während welche dabei dazu
"""
_GERMAN = frozenset(_GERMAN_WORDS.split())
_ENGLISH_WORDS = """
the and is are of to it that this with for on as by from they which their its be been has have had not but or if
you your we our he she his her them there here when where what who how can could should would may might must do
does did most some many more than then these those into about over under between because while usually often
very only other one two a i my me at use used make makes made no yes try let after eat eats live lives come
comes called wrote painted invented people things year years water world each every all who's isn't
read watch play bake cook wash dry put take buy pack visit go clean add keep towel movies cold
"""
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
# German words that English also has, or that stand in names
_HALF_GERMAN_WORDS = """
die hat war was so an in von also man will bin am
"""
_HALF_GERMAN = frozenset(_HALF_GERMAN_WORDS.split())
# of those, the ones that are rarely English
_RATHER_GERMAN = frozenset({"die", "war", "von", "bin", "am"})
# words of English that are also among these
_HALF_ENGLISH = _HALF_GERMAN - _RATHER_GERMAN
# words of other languages that neither has: an answer with more of them is in one of those
_OTHER_WORDS = """
de het een van niet le les est une et dans pour que el los las y para con una del il di che gli della um uma não
"""
_OTHER = frozenset(_OTHER_WORDS.split())
_SPELLED_GERMAN = re.compile(r"[äöüß]|sch|(?:ung|ungen|keit|heit|lich|isch|chen)$|^(?:ge|ver|be)\w+t$")
_SPELLED_ENGLISH = re.compile(r"th|wh|(?:ing|tion|tions|ly|ness|ment|ous|ful|ed|ght)$")

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_JSON_START = re.compile(r'\A\s*(?:\{\s*(?:"|\}|\Z)|\[\s*(?:[\[{"\d\]-]|\Z))')
_WORDS = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Language(Scorer):
    """1 if the answer is in the language `positive` ("german" or "english"), 0 if in the other.

    By words that only one of the two has, and by spelling where few of those occur. An answer about equally in both,
    in a language that is neither, or without words, is ill-formed.
    """

    positive: str = "german"

    def __post_init__(self) -> None:
        if self.positive not in ("german", "english"):
            raise UsageError(f"positive: {self.positive!r} is not one of german, english")

    def score(self, item: PromptItem, text: str) -> Score:
        words = [word.lower() for word in _LETTERS.findall(text[:_MAX_CHARACTERS])]
        german = sum(word in _GERMAN for word in words) + 0.4 * sum(bool(_SPELLED_GERMAN.search(w)) for w in words)
        english = sum(word in _ENGLISH for word in words) + 0.4 * sum(bool(_SPELLED_ENGLISH.search(w)) for w in words)
        some_english = english > 0
        if german:
            german += 0.5 * sum(word in _HALF_GERMAN for word in words)
        elif not any(word in _ENGLISH for word in words):
            german += 0.5 * sum(word in _RATHER_GERMAN for word in words)
        if some_english:
            english += 0.5 * sum(word in _HALF_ENGLISH for word in words)
        total = german + english
        # a sentence of either language has about half of its words in the lists
        if sum(word in _OTHER for word in words) > max(german, english):
            return Score(0.0, ILL_FORMED)
        if not words or total < 0.1 * len(words) or abs(german - english) < 0.3 * total or total == 0:
            return Score(0.0, ILL_FORMED)
        found = "german" if german > english else "english"
        return Score(float(found == self.positive), found)


@dataclass(frozen=True)
class JsonOrProse(Scorer):
    """1 if the answer is a JSON object or array, 0 if it is prose; without words, or half of each, it is ill-formed.

    A fenced block and a few words before or after the JSON are allowed (`share`: the least share of the answer's
    characters that is JSON). JSON that is cut off counts, JSON with an error in it is ill-formed.
    """

    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share: {self.share:g} is not above 0 and up to 1")

    def score(self, item: PromptItem, text: str) -> Score:
        text = text[:_MAX_CHARACTERS].strip()
        block = _FENCE.search(text)
        start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=-1)
        body = block.group(1).strip() if block else text[start:] if start >= 0 else ""
        if not body.startswith(("{", "[")):
            return Score(0.0, "prose" if _WORDS.search(text) and not block else ILL_FORMED)
        body = body[: _end(body)].strip()
        share = len(body) / len(text.replace("```json", "").replace("```", "").strip() or "x")
        # a bracket in prose
        if share < 0.25 or (share < self.share and '"' not in body and _WORDS.search(text[:start])):
            return Score(0.0, "prose")
        if not _JSON_START.match(body) or _json_state(body) == "broken":
            # braces around other things, which prose has as well, or JSON with an error
            return Score(0.0, "prose" if share < self.share and _WORDS.search(text[:start]) else ILL_FORMED)
        # more words are allowed behind JSON that stands first or in a fence, and is complete
        apart = (block is not None or start == 0) and share >= 0.4 and '"' in body and _json_state(body) == "whole"
        return Score(1.0, "json") if share >= self.share or apart else Score(0.0, ILL_FORMED)


def _outside_strings(text: str) -> Iterator[tuple[int, str]]:
    """Index and letter of the brackets that are in no JSON string, and of the quote that begins each string; then, if
    the last string has no end, its quote again at the text's length.
    """
    inside = escaped = False
    for index, letter in enumerate(text):
        if inside:
            inside = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter in '"{[}]':
            inside = letter == '"'
            yield index, letter
    if inside:
        yield len(text), '"'


def _end(text: str) -> int:
    """Index behind the bracket that closes the first one; the whole length where none does."""
    depth = 0
    for index, letter in _outside_strings(text):
        if letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
            if depth <= 0:
                return index + 1
    return len(text)


def _json_state(text: str) -> str:
    """ "whole" for a JSON object or array, "cut" for the beginning of one, "broken" for anything else."""
    closing: list[str] = []
    for index, letter in _outside_strings(text):
        if letter in "{[":
            closing.append("}" if letter == "{" else "]")
        elif letter in "}]" and (not closing or closing.pop() != letter):
            return "broken"
        elif index == len(text):
            closing.append(letter)
    if closing:
        return "cut" if '"' in text else "broken"
    try:
        value = parse_json(text)
    except ValueError:
        return "broken"
    return "whole" if isinstance(value, dict | list) else "broken"
