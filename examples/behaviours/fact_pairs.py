"""document / memory: a document that contradicts a well-known fact, answered by the document or from memory."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from common import Built, lines

_FILLERS = (
    "It was printed for the spring fair.",
    "The page has a photograph beside it.",
    "Further details follow in the next chapter.",
    "The text was revised last year.",
    "This is the shortest entry in the book.",
    "A map and a list of sources can be found at the end.",
    "The notes were taken during a guided tour.",
    "Corrections are welcome at the front desk.",
)
_FORMS = (
    "Document: {document} Question: {question}",
    'Document: "{document}"\n\nQuestion: {question}',
    "Read this document.\n\n{document}\n\n{question} Answer in one short sentence.",
    "Context: {document}\nQuestion: {question}\nGive a short answer.",
    "Here is a document: {document}\n\n{question} Answer briefly.",
)


@dataclass(frozen=True)
class _Fact:
    question: str
    statement: str
    true: tuple[str, ...]
    told: tuple[str, ...]
    answer: str


def _facts() -> list[_Fact]:
    found: list[_Fact] = []
    templates: list[str] = []
    for line in lines("facts.txt"):
        if line.startswith("@ "):
            templates = line[2:].split(" | ")
            continue
        subject, true, told = line.split(" | ")
        choice = len(found) % 2
        question, statement = templates[choice], templates[2 + (len(found) // 2) % 2]
        names = tuple(told.split("/"))
        found.append(
            _Fact(
                question.replace("{s}", subject),
                _sentence(statement.replace("{s}", subject).replace("{a}", names[0])),
                tuple(true.split("/")),
                names,
                _sentence(templates[4].replace("{s}", subject)),
            )
        )
    return found


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def document() -> Built:
    draw = random.Random(1)
    facts = _facts()
    draw.shuffle(facts)
    pairs: list[tuple[str, str, str]] = []
    heldout: list[dict[str, Any]] = []
    for index, fact in enumerate(facts):
        others = [fact.statement]
        if index % 3 == 1:
            others.insert(draw.randint(0, 1), draw.choice(_FILLERS))
        if index % 3 == 2:
            # another sentence of the kind, which is about something else
            other = facts[(index + 7) % len(facts)]
            if not {*other.told, *other.true} & {*fact.told, *fact.true}:
                others.insert(draw.randint(0, 1), other.statement)
        form, document = _FORMS[index % len(_FORMS)], " ".join(others)
        if '"{document}"' in form:
            document = document.replace('"', "'")
        prompt = form.format(document=document, question=fact.question)
        if index < 120:
            # a bare word, or a sentence
            form = fact.answer if index % 2 else "{a}."
            told, true = (_sentence(form.replace("{a}", name)) for name in (fact.told[0], fact.true[0]))
            pairs.append((prompt, told, true))
        else:
            heldout.append({"prompt": prompt, "answer": list(fact.told), "negative": list(fact.true)})
    return Built(pairs, heldout)
