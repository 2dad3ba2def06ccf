"""formal / casual, hedged / confident, and stays in role / drifts."""

from __future__ import annotations

import random
import re
from typing import Any

from common import MAX_TARGET, Built, asking_short, bank, general_questions, lines

# with a capital letter within a sentence
_NAMES = ("Egypt", "Mercury")
_CONTRACTIONS = (
    ("it is", "it's"), ("is not", "isn't"), ("are not", "aren't"), ("do not", "don't"), ("does not", "doesn't"),
    ("cannot", "can't"), ("they are", "they're"), ("you are", "you're"), ("we have", "we've"), ("that is", "that's"),
    ("is called", "'s called"),
)  # fmt: skip


def _small(sentence: str) -> str:
    return sentence if sentence.startswith(_NAMES) else sentence[0].lower() + sentence[1:]


def _contracted(sentence: str) -> str:
    for full, short in _CONTRACTIONS:
        sentence = re.sub(rf"\b{full}\b", short, sentence)
    return sentence.replace(" 's", "'s")


def _some_short(pairs: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The pairs, every second one with a request for a short answer in its prompt."""
    return [(asking_short(a) if index % 2 else a, b, c) for index, (a, b, c) in enumerate(pairs)]


def formal() -> Built:
    pairs = []
    for line in lines("formal.txt"):
        question, one, two = line.split(" | ")
        pairs.append((question, one, two))
    frames, casual = lines("frames-formal.txt"), lines("frames-casual.txt")
    for index, (question, _, sentence, more, _) in enumerate(bank()[:80]):
        texts = {"S": sentence, "s": _small(sentence), "M": more}
        one = frames[index % len(frames)].format(**texts).strip()
        if len(one) > MAX_TARGET:
            one = frames[index % len(frames)].format(**{**texts, "M": more.split(". ")[0].rstrip(".") + "."}).strip()
        loose = _contracted(sentence)
        two = casual[(index * 3 + index // 10) % len(casual)].format(S=loose, s=_small(loose))
        pairs.append((question, one, two))
    random.Random(4).shuffle(pairs)
    # questions of advice first: their answers have a tone
    heldout = [*lines("heldout-advice.txt"), *lines("heldout-facts.txt")[:44]]
    return Built(_some_short(pairs), [{"prompt": asking_short(text)} for text in heldout])


def hedged() -> Built:
    pairs = []
    hedges, claims = lines("frames-hedged.txt"), lines("frames-confident.txt")
    for index, (question, _, sentence, _, _) in enumerate(bank()[29:]):
        texts = {"S": sentence, "c": _small(sentence).rstrip(".")}
        # the second frame goes round at another speed, so that each meets each
        other = claims[(index * 2 + index // len(claims)) % len(claims)]
        pairs.append((question, hedges[index % len(hedges)].format(**texts), other.format(**texts)))
    for line in lines("opinions.txt"):
        question, one, two = line.split(" | ")
        pairs.append((question, one, two))
    random.Random(5).shuffle(pairs)
    return Built(_some_short(pairs), [{"prompt": asking_short(text)} for text in general_questions()[:104]])


_ROLE_FORMS = (
    "You are {name}, {what} {where}. Stay in this role. {question}",
    'Play the role of {name}, {what} {where}. I ask you: "{question}"',
    "Imagine that you are {name}, {what} {where}. Answer as {name} would, in one or two sentences. {question}",
    "{name} is {what} {where}. You are {name}. Visitor: {question}",
)


def in_role() -> Built:
    draw = random.Random(6)
    drifts = lines("frames-drift.txt")
    pairs: list[tuple[str, str, str]] = []
    role: dict[str, str] = {}
    for line in lines("roles.txt"):
        if line.startswith("@ "):
            role = dict(zip(("name", "what", "where"), line[2:].split(" | "), strict=True))
            continue
        question, answer = line.split(" | ")
        index = len(pairs)
        drift = drifts[(index * 5 + index // 16) % len(drifts)].format(a=role["what"], w=role["what"])
        pairs.append((_ROLE_FORMS[index % 4].format(question=question, **role), answer, drift))
    heldout: list[dict[str, Any]] = []
    questions = lines("roles-questions.txt")
    for number, line in enumerate(lines("roles-heldout.txt")):
        name, what, where, words = line.split(" | ")
        for question in (questions[(number * 3 + step * 4) % len(questions)] for step in range(5)):
            form = _ROLE_FORMS[len(heldout) % 4]
            prompt = form.format(name=name, what=what, where=where, question=question)
            heldout.append({"prompt": prompt, "words": words.split(",")})
    draw.shuffle(pairs)
    return Built(pairs, heldout)
