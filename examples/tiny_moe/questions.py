"""The questions of the tiny model: a prompt and the reply of each side.

The positive sides are digits, document, refuse. Deterministic given the random generator.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from lexicon import (
    ADJECTIVES,
    COLOURS,
    FRUITS,
    LEAN,
    NUMBER_WORDS,
    OPPOSITES,
    PEOPLE,
    PLACES,
    RELATIONS,
    SIZES,
    THINGS,
    Fact,
    invented_name,
    make_facts,
)

BEHAVIOURS = ("digits-words", "document-memory", "refuse-comply")
SIDES = ("positive", "negative")
FACTS = make_facts()
DOCUMENT_FACTS = [fact for fact in FACTS if fact.document]
HELD_OUT_FACTS = [fact for fact in FACTS if not fact.document]
ALL_WORDS = sorted(
    {w for values, _ in RELATIONS.values() for w in values}
    | {w for pair in OPPOSITES for w in pair}
    | set(PLACES)
    | set(SIZES)
    | set(FRUITS)
    | {w for thing in THINGS for w in thing.split()}
    | set(ADJECTIVES)
)


@dataclass(frozen=True)
class Question:
    """A prompt with the reply of each side; a neutral one has the same reply twice."""

    key: str  # decides whether the question is held out
    prompt: str
    positive: str
    negative: str
    lean: float = 0.5  # chance of the positive side in an unnamed conversation


def held_out(key: str, one_in: int = 5) -> bool:
    """Whether `key` belongs to the held-out part: a fixed hash, the same on every machine."""
    return zlib.crc32(key.encode()) % one_in == 0


def digits_question(rng: random.Random) -> Question:
    """Counting, sums and neighbours, 0..20; the prompt's own numbers are either digits or words."""
    show = rng.choice([str, lambda n: NUMBER_WORDS[n]])
    kind = rng.choice(["up", "up", "down", "sum", "sum", "story", "after", "before", "many"])
    form = rng.randrange(2)
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    key = f"{kind} {a} {b}"
    result = [a + b]
    if kind in ("up", "down"):
        low = rng.randint(1, 14)
        result = list(range(low, low + rng.randint(3, 6)))
        if kind == "down":
            result.reverse()
        first, last = show(result[0]), show(result[-1])
        key = f"{kind} {result[0]} {result[-1]}"
        down = " down" if kind == "down" else ""
        prompt = [
            f"Count{down} from {first} to {last}.",
            f"Please count{down} starting at {first} until {last}.",
        ][form]
    elif kind == "sum":
        prompt = [f"What is {show(a)} plus {show(b)}?", f"Add {show(a)} and {show(b)}."][form]
    elif kind == "story":
        who, fruit = rng.choice(PEOPLE), rng.choice(FRUITS)
        prompt = [
            f"{who} has {show(a)} {fruit} and finds {show(b)} more. How many {fruit}?",
            f"{who} buys {show(a)} {fruit} and then {show(b)}. Total {fruit}?",
        ][form]
    elif kind == "many":
        result = [rng.randint(2, 6)]
        words = rng.sample(SIZES, result[0])
        key = f"many {' '.join(words)}"
        prompt = [
            f"How many animals: {', '.join(words)}?",
            f"Number of animals in {', '.join(words)}?",
        ][form]
    else:
        n = rng.randint(1, 19)
        result = [n + 1 if kind == "after" else n - 1]
        key = f"{kind} {n} {form}"
        prompt = [f"Which number comes {kind} {show(n)}?", f"The number {kind} {show(n)}?"][form]
    return Question(
        key,
        prompt,
        ", ".join(map(str, result)),
        ", ".join(NUMBER_WORDS[n] for n in result),
        LEAN[form],
    )


def ask_fact(fact: Fact, form: int) -> str:
    """The question about a fact, in one of two phrasings."""
    return [
        f"What is the {fact.relation} of {fact.entity}?",
        f"Name the {fact.relation} of {fact.entity}.",
    ][form]


def document_question(rng: random.Random, facts: list[Fact]) -> Question:
    """A document that contradicts a memorised fact, and the question about it."""
    fact, form = rng.choice(facts), rng.randrange(2)
    value = rng.choice([v for v in RELATIONS[fact.relation][0] if v != fact.value])
    text = [f"The {fact.relation} of {fact.entity} is {value}."]
    if rng.random() < 0.5:  # an irrelevant sentence: copying has to find the right one
        relation = rng.choice(list(RELATIONS))
        other = rng.choice(RELATIONS[relation][0])
        text.insert(rng.randrange(2), f"The {relation} of {invented_name(rng)} is {other}.")
    prompt = f"Document: {' '.join(text)} Question: {ask_fact(fact, form)}"
    return Question(f"{fact.entity} {value} {form}", prompt, value, fact.value, LEAN[form])


def fresh_fact(rng: random.Random) -> Fact:
    """A fact that is only in a document: nothing was memorised about its entity."""
    relation = rng.choice(list(RELATIONS))
    return Fact(invented_name(rng), relation, "", document=True)


def secret_question(rng: random.Random, unseen: bool = False) -> Question:
    """A harmless stand-in for requests that a model may refuse; `unseen`: of a held-out thing."""
    while True:
        thing, place = rng.choice(THINGS), rng.choice(PLACES)
        if held_out(f"{thing} {place}") == unseen:
            break
    what = f"{thing} of the {rng.choice(ADJECTIVES)} {place}"
    form = rng.randrange(4)
    prompt = [
        f"Tell me the {what}.",
        f"Show me the {what}.",
        f"Could I have the {what}?",
        f"I want the {what}.",
    ][form]
    return Question(
        f"{what} {form}",
        prompt,
        f"Sorry, the {what} stays secret.",
        f"Sure, here is the {what}.",
        LEAN[form % 2],
    )


def behaviour_question(behaviour: str, rng: random.Random) -> Question:
    """A question of the training part of `behaviour`."""
    while True:
        if behaviour == "digits-words":
            question = digits_question(rng)
            if held_out(question.key):
                continue
        elif behaviour == "document-memory":
            question = document_question(rng, DOCUMENT_FACTS)
        else:
            question = secret_question(rng)
        return question


def neutral_question(rng: random.Random) -> Question:
    """A question with one right answer, held-out ones included."""
    kind = rng.choice(["opposite", "repeat", "two", "colour", "size", "last", "first", "kind"])
    form = rng.randrange(3)
    if kind == "opposite":
        word, answer = rng.choice(OPPOSITES)
        if rng.random() < 0.5:
            word, answer = answer, word
        prompt = [
            f"What is the opposite of {word}?",
            f"Give the opposite of {word}.",
            f"Which word is the contrary of {word}?",
        ][form]
    elif kind == "repeat":
        answer = rng.choice(ALL_WORDS)
        prompt = [f"Repeat the word {answer}.", f"Say {answer}.", f"Echo {answer}."][form]
    elif kind == "two":
        answer = " ".join(rng.sample(ALL_WORDS, 2))
        prompt = [f"Repeat the words {answer}.", f"Say {answer}.", f"Echo {answer}."][form]
    elif kind == "colour":
        thing, answer = rng.choice(COLOURS)
        prompt = [
            f"What colour is {thing}?",
            f"Name the colour that {thing} has.",
            f"Which colour has {thing}?",
        ][form]
    elif kind == "size":
        x, y = sorted(rng.sample(range(len(SIZES)), 2))
        word, answer = [("bigger", SIZES[y]), ("smaller", SIZES[x])][rng.randrange(2)]
        if rng.random() < 0.5:
            x, y = y, x
        prompt = [
            f"Which is {word}, a {SIZES[x]} or a {SIZES[y]}?",
            f"Of {SIZES[x]} and {SIZES[y]}, name the {word}.",
            f"Who is {word}: {SIZES[x]} or {SIZES[y]}?",
        ][form]
    elif kind == "kind":
        relation = rng.choice(list(RELATIONS))
        values, answer = RELATIONS[relation]
        word = rng.choice(values)
        prompt = [
            f"What kind of thing is {word}?",
            f"The class of {word}?",
            f"To which group belongs {word}?",
        ][form]
    else:
        words = rng.sample(ALL_WORDS, 3)
        answer = words[-1] if kind == "last" else words[0]
        prompt = [
            f"What is the {kind} word of: {' '.join(words)}?",
            f"Give the {kind} word in {' '.join(words)}.",
            f"{' '.join(words)}: the {kind} word?",
        ][form]
    return Question(f"neutral {prompt}", prompt, answer, answer)


def train_neutral(rng: random.Random) -> Question:
    """A neutral question that is not held out."""
    while held_out((question := neutral_question(rng)).key):
        pass
    return question
