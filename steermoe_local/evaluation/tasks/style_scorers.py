"""Scorers of an answer's style: its length, formality, hedging, steps, and whether it stays in a role. For English.

All go by words and marks of lists; docs/behaviours.md tells how often each is wrong on a labelled list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import FormatError, UsageError
from ...pairs.prompts import PromptItem
from .tasks import ILL_FORMED, Score, Scorer

_MAX_CHARACTERS = 20_000
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# writing without blanks between words, Chinese and Japanese: a word has about two signs there
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]{1,2}")
_SPECIAL_TOKEN = re.compile(r"<\|[\w-]{1,40}\|>")
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++(?=\s|\Z)|\n+")


def _any_of(*texts: str) -> re.Pattern[str]:
    """A pattern of any of the texts as whole words; an apostrophe may be typographic."""
    joined = "|".join(text.replace("'", "['\u2019]").replace(" ", r"\s+") for text in texts)
    return re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.IGNORECASE)


# formality
_CONTRACTION = re.compile(
    r"\b(?:\w{1,8}n['\u2019]t|(?:i|you|we|they|he|she|it|that|there|here|what|who|how|where|let)"
    r"['\u2019](?:m|re|s|ve|ll|d))\b",
    re.IGNORECASE,
)
_SLANG = _any_of(
    "yeah|yep|yup|nope|nah|hey|hi there|hiya|yo|lol|omg|btw|gonna|wanna|gotta|kinda|sorta|dunno|lemme|gimme|ya|u|ur|"
    "dude|bro|buddy|folks|guys|awesome|totally|super|cool|stuff|no worries|no biggie|pretty much|tons|loads|a bunch|"
    "a ton|yum|yummy|tasty|wow|whoa|oh|haha|duh|chill|legit|epic|crazy|insane|mega|nifty|neat|easy peasy|you bet|"
    "sure thing|for real|heads up|pro tip|big time|no sweat|way too|way more|tbh|imo|fyi|thx|ok|okay|oops|ugh|huh|"
    "right\\?|you know|just grab|grab|chuck|toss|bucks|kid|kids|veggies|comfy|cuz|'cause|y'all|ain't|anyway|so yeah|"
    "honestly|basically|good to go|hang out|hop|whip up|nice one|cheers|mate|vibe|vibes|thing is|boom|voila|dig in|"
    "those guys|these guys|little guy|little guys|gross|messy|sweet|snag|go nuts|go wild|got you|hit up|stoked|jazz"
)
_LONG_VOWEL = re.compile(r"\b\w*([aeiou])\1{2,}\w*\b", re.IGNORECASE)
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]|(?<!\\w)[:;]-?[)D(P](?!\\w)")
_FORMAL = _any_of(
    "furthermore|moreover|therefore|consequently|thus|hence|accordingly|nevertheless|nonetheless|additionally|"
    "in addition|regarding|concerning|with regard to|with respect to|in accordance with|pertaining|kindly|"
    "please note|please be advised|it is advisable|it is recommended|it is essential|it is customary|"
    "it is worth noting|"
    "it is important|it should be noted|it may be|one should|one may|one might|one ought|one must|"
    "i would (?:kindly |respectfully |strongly |warmly )?"
    "(?:recommend|suggest|advise|propose|be pleased|be delighted|encourage|like to)|"
    "may i|should you|shall|ought to|prior to|subsequently|sufficient|sufficiently|obtain|obtained|utili[sz]e|"
    "individuals|appropriate|ensure|ensures|ensuring|dear (?:sir|madam|colleague|guest|reader)|sincerely|respectfully|"
    "yours faithfully|esteemed|commence|endeavou?r|facilitate|approximately|considerable|considerably|principal|"
    "principally|primarily|constitutes?|comprises?|denotes?|is referred to as|is defined as|is regarded as|"
    "is considered|whilst|whereby|thereby|therein|herein|such as|in order to|due to|owing to|by means of|"
    "for the purpose of|in the event|i trust|i remain|permit me|allow me|it is with|pleasure to|inquiry|enquiry|"
    "assistance|require|requires|required|purchase|reside|resides|numerous|several|commonly|typically|generally|"
    "sincere|gratitude|privilege|recommended|advisable|consider|considering|preferably|undertake|maintain|provide|provides|thorough|thoroughly|"
    "fitting|prudent|accompanied by|one's|cordial|cordially|courteous|courtesy|succinct|obligatory|ascertain|convey|"
    "in recognition of|prolonged|is produced|are produced|"
    "suitable|beneficial|optimal|initially|ultimately|proper|properly|indeed|which is|upon"
)
_FULL_FORM = _any_of(
    "it is|it is not|do not|does not|did not|cannot|can not|will not|would not|should not|is not|are not|you are|i am|"
    "they are|we are|that is|there is|you will|it will|i would|i will|i have|you have"
)
_LOWER_START = re.compile(r"(?:\A|[.!?]\s+)[a-z]")

# hedging
_HEDGE = _any_of(
    "i think|i believe|i guess|i suppose|i'm not sure|i am not sure|i'm not certain|i am not certain|i'm not entirely|"
    "i am not entirely|not entirely sure|not completely sure|not absolutely sure|hard to say|hard to know|"
    "difficult to say|it depends|depends on|may|might|could be|could have|could well|could also|perhaps|maybe|possibly|"
    "probably|presumably|apparently|seemingly|it seems|seems to|seem to|it appears|appears to|appear to|likely|"
    "unlikely|as far as i know|to my knowledge|if i remember|if i recall|if i'm not mistaken|if i am not mistaken|"
    "i could be wrong|i may be wrong|i might be wrong|don't quote me|in my opinion|in my view|i would say|i'd say|"
    "i would guess|i'd guess|my guess|my best guess|one possibility|there is a chance|there's a chance|arguably|"
    "not necessarily|opinions differ|opinions vary|uncertain|unclear|not known for certain|not clear|suggests?|"
    "tends? to|more or less|roughly speaking|so to speak|in some cases|it is possible|it's possible|can vary|"
    "could vary|varies|i'm fairly|i am fairly|fairly sure|pretty sure|i imagine|i suspect|supposedly|reportedly|"
    "could work|some research|some studies|hints? that|"
    "is thought to|are thought to|is believed to|are believed to|would want to check|worth checking|"
    "you may want|you might want"
)
_WEAK_HEDGE = _any_of(
    "usually|often|generally|sometimes|typically|mostly|somewhat|rather|fairly|relatively|around|about|roughly|"
    "approximately|in general|on the whole|commonly|could"
)
_BOOSTER = _any_of(
    "definitely|certainly|absolutely|undoubtedly|without a doubt|without doubt|no doubt|there is no doubt|clearly|"
    "obviously|of course|always|never|for sure|surely|must be|i am certain|i'm certain|i am sure|i'm sure|"
    "there is no question|beyond question|beyond doubt|it is a fact|the fact is|unquestionably|indisputably|"
    "plain and simple|period|full stop|guaranteed|exactly|precisely|simply|know for a fact|hands down|"
    "make no mistake|every time|one hundred percent|100%|the answer is"
)
_MONTH = re.compile(
    r"\b(?:in|of|since|until|by|early|late|mid|last|next|and|to|from) May\b|\b[0-9]{1,2} May\b|\bMay [0-9]"
)

# steps
_NUMBERED = re.compile(
    r"(?:^|\n)[ \t>*#]*(?:\*\*)?(?:step\s+)?([0-9]{1,2})(?:[.):]|\s*[-\u2013:])(?=\s|\*|\Z)", re.IGNORECASE
)
_STEP = re.compile(r"\bstep\s+(?:[0-9]{1,2}|one|two|three|four|five)\b", re.IGNORECASE)
_STEPWISE = _any_of(
    "step by step|step-by-step|let's break|let us break|let's think|let us think|let's work|let us work|"
    "let's solve|let's calculate|let us calculate|let's go through|let's start|break it down|follow these steps|"
    "here are the steps"
)
_ORDER = _any_of(
    "first|firstly|first of all|second|secondly|third|thirdly|next|then|after that|afterwards|finally|lastly|"
    "to begin with|begin by|start by|once that is done|in the end|now"
)
_FIRST = _any_of("first|firstly|first of all|to begin with|begin by|start by")
_EQUAL_LINE = re.compile(r"^[^\n=]{1,200}=[^\n]*[0-9]", re.MULTILINE)
_EQUATION = re.compile(
    r"[0-9)]\s{0,3}(?:[-+*/x\u00d7\u00f7\u00b7\u2212]|times|plus|minus|divided by)\s{0,3}[$(]?[0-9][^=\n]{0,40}="
)

# roles
_DRIFT = re.compile(
    r"\bas an? [\w-]{1,20} (?:ai\b|language model)"
    r"|\bas an? (?:artificial|ai\b|large language|language model|virtual|"
    r"digital assistant|computer|machine|assistant\b)"
    r"|\bi(?:['\u2019]m| am) (?:just |only |actually |really |simply )?(?:an? )?(?:artificial|ai\b|large language|"
    r"language model|virtual|digital|computer program|chatbot|machine|assistant\b|text-based|program\b|not (?:a |an )?"
    r"(?:real|actual|human|person|actually|really))"
    r"|\bi(?:['\u2019]m| am) [\w-]{1,20}, (?:an? )?(?:[\w-]{1,20} )?"
    r"(?:ai\b|artificial|virtual|language model|digital assistant|chatbot|computer program)"
    r"|\b(?:since|because|given that) i(?:['\u2019]m| am) (?:an? )?(?:ai\b|artificial|software)"
    r"|\bunlike (?:a |other )?humans?, i (?:do not|don['\u2019]t|have no|only)\b"
    r"|\b(?:in the way|the way|like) (?:that )?(?:a )?humans? (?:do|does|would)\b"
    r"|\b(?:real-time (?:data|information|access|weather)|exist only as|only generate text|process text|as software)\b"
    r"|\bi (?:do not|don['\u2019]t) have (?:access to|the ability to|the capability)"
    r"|\bi(?:['\u2019]m| am) (?:functioning|operating)\b"
    r"|\b(?:here|ready) (?:and ready )?to (?:help|assist)(?: you)?(?=\s*(?:[.!?]|\Z|with any))"
    r"|\bbeing an? (?:ai|artificial)\b|\bno (?:physical|human) (?:form|body)\b"
    r"|\b(?:language model|ai model|ai assistant|training data|my training|my programming|my developers)\b"
    r"|\bi (?:was|am|have been) (?:created|trained|developed|designed|programmed) (?:by|on|to|as)\b"
    r"|\bi (?:do not|don['\u2019]t|can['\u2019]t|cannot|can not) (?:actually |really |truly |physically )?"
    r"(?:have|possess|experience|hold) (?:any |a )?(?:personal|feelings?|emotions?|physical|real|human|body|"
    r"experiences?|memories|opinions|preferences|senses|childhood|family|hands|hobbies|favou?rites?|actual|mornings?)"
    r"|\bi (?:can['\u2019]t|cannot|don['\u2019]t|do not) (?:actually|really|physically) \w+"
    r"|\b(?:pretend(?:ing)? to be|role[- ]?play(?:ing)?|in character|out of character|stepping out|step out of|"
    r"the character|this persona|this role|that role|fictional)\b"
    r"|\bhow (?:can|may) i (?:help|assist) you\b|\bis there anything else\b",
    re.IGNORECASE,
)
_FIRST_PERSON = re.compile(
    r"\b(?:I|me|my|mine|myself|we|us|our|ours)\b|\b(?:I|we)['\u2019](?:m|ve|ll|d|re)\b", re.IGNORECASE
)
# how people speak who are asked something, and what they do meanwhile: "*nods*"
_SPEAKING = re.compile(
    r"\A[\"\u201c\s]*(?:ah+|aye|oh|well|why|arr+|hm+|ha|heavens|good (?:day|morning|evening)|greetings|hello|welcome|"
    r"buon ?giorno|bonjour|ol[a\u00e1]|aloha|ahoy)\b[ ,.!]"
    r"|\b(?:my (?:dear|friend|lad|lass|child)|folks|matey|me hearties|stranger|traveller|young (?:man|lady))\b"
    r"|(?<![*\w])\*[a-z][^*\n]{2,80}\*(?![*\w])",
    re.IGNORECASE,
)


def _words(text: str) -> list[str]:
    text = _SPECIAL_TOKEN.sub(" ", text)
    return _WORD.findall(_UNSPACED.sub(r"\g<0> ", text) if _UNSPACED.search(text) else text)


def _n_sentences(text: str) -> int:
    return max(1, sum(bool(part.strip()) for part in _SENTENCE_END.split(text)))


def _repeats(words: list[str]) -> bool:
    """Whether a text goes in circles: most of its words have been there before, again and again."""
    return len(words) >= 24 and len({word.lower() for word in words}) < 0.25 * len(words)


@dataclass(frozen=True)
class Length(Scorer):
    """1 ("short") if the answer has at most `limit` words, 0 ("long") if more; an empty or circling one is ill-formed.

    An item's own `limit` comes before the option.
    """

    limit: int = 20

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"limit: {self.limit} is not a number of words from 1 up")

    def check(self, item: PromptItem) -> None:
        self._limit(item)

    def score(self, item: PromptItem, text: str) -> Score:
        words = _words(text[:_MAX_CHARACTERS])
        if not words or _repeats(words):
            return Score(0.0, ILL_FORMED)
        return Score(1.0, "short") if len(words) <= self._limit(item) else Score(0.0, "long")

    def _limit(self, item: PromptItem) -> int:
        limit = item.extra.get("limit", self.limit)
        if type(limit) is not int or limit < 1:
            raise FormatError(f'item {item.id}: limit: {limit!r} is no number of words; write "limit": 20')
        return limit


@dataclass(frozen=True)
class Formality(Scorer):
    """1 if the answer is formal, 0 if it is casual; a plain one, with few signs of either, is ill-formed.

    Contractions, slang, exclamation marks and small letters at the beginning are casual; connectives and words of
    written English, full forms and long words are formal.
    """

    def score(self, item: PromptItem, text: str) -> Score:
        text = text[:_MAX_CHARACTERS]
        words = _words(text)
        if not words or _repeats(words):
            return Score(0.0, ILL_FORMED)
        casual = (
            1.0 * len(_CONTRACTION.findall(text))
            + 1.5 * len(_SLANG.findall(text))
            + 1.0 * min(3, text.count("!"))
            + 2.0 * min(2, len(_EMOJI.findall(text)))
            + 1.5 * min(2, len(_LONG_VOWEL.findall(text)))
            + 1.5 * min(2, len(_LOWER_START.findall(text)))
        )
        length = sum(map(len, words)) / len(words)
        formal = (
            1.0 * len(_FORMAL.findall(text))
            + 0.5 * len(_FULL_FORM.findall(text))
            + (min(2.0, 1.5 * (length - 4.9)) if length > 4.9 and len(words) >= 8 else 0.0)
        )
        # of a long answer a single sign says little
        needed = 1.0 + 0.01 * max(0, len(words) - 30)
        if abs(formal - casual) < needed:
            return Score(0.0, ILL_FORMED)
        return Score(1.0, "formal") if formal > casual else Score(0.0, "casual")


@dataclass(frozen=True)
class Hedging(Scorer):
    """1 if the answer is hedged ("perhaps", "I think"), 0 if it asserts; one hedge among many assertions is ill-formed.

    Words such as "usually" count a quarter of a hedge, words such as "definitely" against it.
    """

    def score(self, item: PromptItem, text: str) -> Score:
        text = _MONTH.sub(" ", text[:_MAX_CHARACTERS])
        words = _words(text)
        if not words or _repeats(words) or not re.search(r"[A-Za-z]", text):
            return Score(0.0, ILL_FORMED)
        hedges = len(_HEDGE.findall(text)) + 0.25 * min(3, len(_WEAK_HEDGE.findall(text)))
        boosters = len(_BOOSTER.findall(text))
        share = (hedges - 0.75 * boosters) / _n_sentences(text)
        if hedges >= 1 and share >= 0.3:
            return Score(1.0, "hedged")
        return Score(0.0, "confident") if hedges < 1 or share < 0.15 else Score(0.0, ILL_FORMED)


@dataclass(frozen=True)
class Steps(Scorer):
    """1 if the answer goes by steps, 0 if it is direct: no steps, and at most `limit` words; else it is ill-formed.

    Steps are numbered lines, "Step 1", "First, ... Then, ...", or several equations one after another.
    """

    limit: int = 40

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"limit: {self.limit} is not a number of words from 1 up")

    def score(self, item: PromptItem, text: str) -> Score:
        text = text[:_MAX_CHARACTERS]
        words = _words(text)
        if not words or _repeats(words):
            return Score(0.0, ILL_FORMED)
        numbered = {int(found) for found in _NUMBERED.findall(text)}
        cut_list = 1 in numbered and len(words) > 12  # an answer that ends in its first step
        ordered = {found.lower() for found in _ORDER.findall(text)}
        if (
            len(numbered) > 1
            or cut_list
            or _STEP.search(text)
            or _STEPWISE.search(text)
            or (_FIRST.search(text) and len(ordered) >= 2)
            or len(ordered) >= 3
            or len(_EQUATION.findall(text)) >= 2
            or len(_EQUAL_LINE.findall(text)) >= 3
        ):
            return Score(1.0, "steps")
        return Score(0.0, "direct" if len(words) <= self.limit else ILL_FORMED)


@dataclass(frozen=True)
class Role(Scorer):
    """1 if the answer stays in the role that the prompt gives, 0 if it falls out of it; neither is ill-formed.

    Out of it: it speaks of being a program, of pretending, or offers help as an assistant. In it: it speaks of itself,
    or as somebody who is addressed ("Ah, ...", "*nods*"), or has one of the words in the item's `words`.
    """

    def check(self, item: PromptItem) -> None:
        self._known(item)

    def score(self, item: PromptItem, text: str) -> Score:
        text = text[:_MAX_CHARACTERS]
        if _DRIFT.search(text):
            return Score(0.0, "drift")
        known = {word.lower() for word in self._known(item)}
        if _FIRST_PERSON.search(text) or _SPEAKING.search(text) or known & {word.lower() for word in _words(text)}:
            return Score(1.0, "in-role")
        return Score(0.0, ILL_FORMED)

    def _known(self, item: PromptItem) -> list[str]:
        words = item.extra.get("words", [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise FormatError(f'item {item.id}: words: not a list of texts; write "words": ["lamp", "harbour"]')
        return words
