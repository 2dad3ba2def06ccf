"""Scorers of an answer's form: its language (of five), and JSON against prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..._util.json_text import parse_json
from ...errors import UsageError
from ...pairs.prompts import PromptItem
from .tasks import ILL_FORMED, Score, Scorer

_MAX_CHARACTERS = 20_000
_LETTERS = re.compile(r"(?!(?<=['\u2019])s\b)[^\W\d_]+")  # not the "s" of "Spain's"

# frequent words; what English and German share stands below
_GERMAN_WORDS = """
der das und ist nicht ein eine einen einem einer eines mit für auf zu den dem des sich im als auch aus bei wird
werden sind oder wie aber nach über durch kann können sie ich du wir ihr ihre ihren sein seine seinen es wenn
dass daß noch nur schon mehr sehr hier dort dann weil zum zur vom beim haben habe hatte hast einmal immer viel
viele gibt geht macht machen sollte sollten muss müssen etwa etwas bis um vor unter zwischen ohne gegen wurde
morgens abends heute gestern montags sonntags täglich
wurden waren diese dieser dieses diesen jede jeder jedes keine kein nein ja bitte gern danke heißt liegt besteht
meist oft damit daher denn doch mal gut groß größte einfach zuerst deine dein dir dich mir mich uns ihm ihn
sowie während welche dabei dazu alle allen aller
"""
_GERMAN = frozenset(_GERMAN_WORDS.split())
_ENGLISH_WORDS = """
the and is are of to it that this with for on as by from they which their its be been has have had not but or if
you your we our he she his her them there here when where what who how can could should would may might must do
does did most some many more than then these those into about over under between because while usually often
very only other one two a i my me at use used make makes made no yes try let after eat eats live lives come
comes called wrote painted invented people things year years water world each every all
read watch play bake cook wash dry put take buy pack visit go clean keep towel movies cold
"""
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
# those that French, Italian and Spanish share count half; German has some of them, too ("des", "du", "es")
_FRENCH_WORDS = """
les une est dans avec vous nous cette ces être sont leur leurs mais où par pas aux ce cet qui qu dont sur sous votre
vos notre nos il ils elle elles peut peuvent doit doivent lorsque quand aussi ainsi même chaque autre autres entre sans
selon afin très fait faire ici plusieurs tous toute toutes comme pour ou et le du des si ne la de un en se que lors
après avant vers puis donc été ci dessous chez soit fois quelle quel depuis deux ses sa encore celui celle
met n s l d j y au
"""
_SPANISH_WORDS = """
el los las del por para y como más este esta está están esto estos estas puede pueden cuando desde hasta también sin
sobre ser fue muy pero cada donde dónde otro otra otros otras hay sus usted si según entre todos todas debe deben
utilizar usar ejemplo o la una un con se que lo al su de en es son le les ha han sido después antes así aquí si
solo sólo hacia tras mediante aunque mismo misma cuyo ni ya eso esa ese cual dos hacer manera
"""
_ITALIAN_WORDS = """
il gli della delle dello degli dei del nel nella nelle nei alla alle allo ai al dal dalla dalle che è sono può possono
per con una uno un come questo questa questi queste anche più non quando dove ogni altro altra altri altre viene vengono
deve devono tra fra senza essere esempio e di da si se la lo le su i l d dell all nell dall sull quindi dopo prima
ed ad cui oppure tutti tutte solo mentre potete fino
"""
_SPELLED = {
    "german": re.compile(r"[äöüß]|sch|(?:ung|ungen|keit|heit|lich|isch|chen)$|^(?:ge|ver|be)\w+t$"),
    "english": re.compile(r"th|wh|(?:ing|tion|tions|ly|ness|ment|ous|ful|ed|ght)$"),
    "french": re.compile(r"[éêëçîïôûœ]|(?:è|à|ù)\w|(?:eux|eur|eurs|aux|oir|ique|iques|ez|tte|ttes)$"),
    "spanish": re.compile(r"[áíóúñ]|(?:ción|ciones|dad|dades|ado|ados|ada|adas|mos|ndo|ero|eros|uen|iente)$"),
    "italian": re.compile(
        r"[ìò]|[àèù]$|(?:zione|zioni|ità|ato|ata|ati|gine|ggio|nte|tti|tto|tta|lla|lle)$|gli|cch|zz|qua"
    ),
}
# an answer in one of these languages is in none of the five
_DUTCH_AND_PORTUGUESE_WORDS = """
het een van niet não uma
"""
# German words that stand in names, or that English has at times: they count half
_HALF_GERMAN = frozenset(["die", "war", "von", "bin", "am", "da"])
# words of several languages: they count half where there is another sign of the language
_GERMAN_AND_ENGLISH = frozenset(["hat", "was", "so", "an", "in", "also", "man", "will"])
_SHARED = {
    "german": _GERMAN_AND_ENGLISH,
    "english": _GERMAN_AND_ENGLISH,
    "spanish": frozenset({"a", "no"}),
    "italian": frozenset({"a"}),
}


def _weighed(words: str, *related: str) -> dict[str, float]:
    """Each word and how much it says: half where a related language has it as well, nothing where English has it."""
    others = {word for other in related for word in other.split()}
    return {word: 0.5 if word in others else 1.0 for word in words.split() if word not in _ENGLISH}


_RELATED = ("french", "spanish", "italian")  # have signs in common, so that a small difference says as much
_WORDS_OF: dict[str, dict[str, float]] = {
    "german": dict.fromkeys(_GERMAN, 1.0) | dict.fromkeys(_HALF_GERMAN, 0.5),
    "english": dict.fromkeys(_ENGLISH, 1.0),
    "french": _weighed(_FRENCH_WORDS, _SPANISH_WORDS, _ITALIAN_WORDS),
    "spanish": _weighed(_SPANISH_WORDS, _FRENCH_WORDS, _ITALIAN_WORDS),
    "italian": _weighed(_ITALIAN_WORDS, _FRENCH_WORDS, _SPANISH_WORDS),
    "": _weighed(_DUTCH_AND_PORTUGUESE_WORDS),
}

_FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_JSON_START = re.compile(r'\A\s*(?:\{\s*(?:"|\}|\Z)|\[\s*(?:[\[{"\d\]-]|\Z))')
_WORDS = re.compile(r"[^\W\d_]{2,}")


def language_of(text: str) -> str:
    """The language of a text, of those that are known here; "" if it is about equally in two, in another, or in none.

    By frequent words and by spelling; words that several languages have count half, and some of them only beside other
    signs of the language.
    """
    words = [word.lower() for word in _LETTERS.findall(text[:_MAX_CHARACTERS])]
    found = {name: sum(known.get(word, 0.0) for word in words) for name, known in _WORDS_OF.items()}
    for name, spelled in _SPELLED.items():
        found[name] += 0.4 * sum(bool(spelled.search(word)) for word in words)
    for name, shared in _SHARED.items():
        if found[name]:
            found[name] += 0.5 * sum(word in shared for word in words)
    (name_2, second), (name, first) = sorted(found.items(), key=lambda one: one[1])[-2:]
    apart = 0.1 if name in _RELATED and name_2 in _RELATED else 0.3
    # a sentence of each language has about half of its words in the lists
    if not words or first + second < 0.1 * len(words) or first - second < apart * (first + second) or first == 0:
        return ""
    return name


@dataclass(frozen=True)
class Language(Scorer):
    """1 if the answer is in the language `positive`, 0 if it is in `negative`; one in another language, about equally
    in two, or without words is ill-formed.

    `negative` "": English, of English German. Known are english, french, german, italian and spanish.
    """

    positive: str = "german"
    negative: str = ""

    def __post_init__(self) -> None:
        known = ", ".join(sorted(_SPELLED))
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if value not in _SPELLED and not (name == "negative" and not value):
                raise UsageError(f"{name}: {value!r} is not one of {known}")
        if self.positive == self.negative:
            raise UsageError(f"negative: {self.negative!r} is the positive language; name two")

    def score(self, item: PromptItem, text: str) -> Score:
        negative = self.negative or ("german" if self.positive == "english" else "english")
        found = language_of(text)
        return (
            Score(float(found == self.positive), found)
            if found in (self.positive, negative)
            else Score(0.0, ILL_FORMED)
        )


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
