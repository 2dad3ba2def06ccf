"""digits / words, and step-by-step / direct: small tasks with numbers."""

from __future__ import annotations

import random
from typing import Any

from common import Built, lines
from steermoe_local.pairs.number_pairs import number_word

_NAME_WORDS = "Mia Omar Lena Ravi Sofia Kofi Hana Tom Ines Yuki Paul Amara Nina Diego Leila Jonas"
_NAMES = _NAME_WORDS.split()
_THING_WORDS = "apples pencils stickers marbles books shells stamps plates oranges buttons candles cards tickets"
_THINGS = _THING_WORDS.split()

# (question, answer): {a}, {b} are numbers of the question, {n} is the result
_TASKS = (
    ("add", "What is {a} plus {b}?", "{n}."),
    ("add", "Add {a} and {b}.", "The sum is {n}."),
    ("add", "{who} has {a} {things} and gets {b} more. How many are there now?", "There are {n} {things} now."),
    ("add", "A bus carries {a} people, and {b} more get on. How many people are on it?", "There are {n} people on it."),
    ("sub", "What is {a} minus {b}?", "{n}."),
    ("sub", "Take {b} away from {a}.", "That leaves {n}."),
    ("sub", "{who} had {a} {things} and gave away {b}. How many are left?", "{n} {things} are left."),
    ("sub", "There are {a} chairs in the room and {b} are taken. How many are free?", "{n} chairs are free."),
    ("next", "Which number comes after {a}?", "{n}."),
    ("next", "What is the number that comes right after {a}?", "The number that comes after {a} is {n}."),
    ("before", "Which number comes before {a}?", "The number before {a} is {n}."),
    ("double", "What is twice {a}?", "Twice {a} is {n}."),
    ("double", "{who} walks {a} kilometres there and the same way back. How far is that?", "That is {n} kilometres."),
    ("half", "What is half of {a}?", "Half of {a} is {n}."),
    ("mul", "What is {a} times {b}?", "{a} times {b} is {n}."),
    ("mul", "A shelf has {a} rows with {b} {things} each. How many {things} is that?", "That is {n} {things}."),
    ("count", "Count from {a} to {n}.", "{list}"),
    ("age", "{who} is {a} years old. How old will {who} be in {b} years?", "{who} will be {n} years old."),
)


def _numbers(kind: str, draw: random.Random) -> tuple[int, int, int]:
    """(a, b, result)."""
    a, b = draw.randint(3, 40), draw.randint(2, 20)
    if kind == "sub":
        a += b + 1
        return a, b, a - b
    if kind in ("next", "before"):
        return a, 1, a + 1 if kind == "next" else a - 1
    if kind == "double":
        return a, a, 2 * a
    if kind == "half":
        return 2 * a, 2, a
    if kind == "mul":
        a, b = draw.randint(2, 9), draw.randint(2, 9)
        return a, b, a * b
    if kind == "count":
        return a, 0, a + draw.randint(2, 5)
    return a, b, a + b


def digits() -> Built:
    draw = random.Random(2)
    items: list[tuple[str, str, str]] = []
    known = [line.split(" | ") for line in lines("numbers.txt")]
    for question, answer, number in known:
        items.append((question, *(answer.format(n=form(int(number))) for form in (str, number_word))))
    seen: set[str] = set()
    while len(items) < 224:
        kind, question, answer = _TASKS[len(items) % len(_TASKS)]
        a, b, n = _numbers(kind, draw)
        words = {"who": draw.choice(_NAMES), "things": draw.choice(_THINGS)}
        # numbers of the question in either form, so that the form is no part of the answer
        ask = draw.choice((str, number_word))
        prompt = question.format(a=ask(a), b=ask(b), n=ask(n), **words)
        key = f"{kind} {a} {b} {n}"
        if key in seen:
            continue
        seen.add(key)
        answers = []
        for form in (str, number_word):
            counted = ", ".join(form(number) for number in range(a, n + 1)) if kind == "count" else ""
            answers.append(_sentence(answer.format(a=form(a), b=form(b), n=form(n), list=f"{counted}.", **words)))
        items.append((prompt, answers[0], answers[1]))
    draw.shuffle(items)
    return Built(items[:120], [{"prompt": question} for question, *_ in items[120:]])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# word problems: question, numbered steps, answer
_PROBLEMS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "{who} buys {a} {things} at {b} euros each and pays with a note of {p} euros. How much change is there?",
        ("The {things} cost {a} times {b} euros, which is {ab} euros.", "{p} minus {ab} leaves {p_ab} euros."),
        "The change is {p_ab} euros.",
    ),
    (
        "A train travels {a} hours at {t} kilometres per hour. How far does it go?",
        ("The distance is the speed times the time.", "{t} times {a} is {ta}."),
        "It goes {ta} kilometres.",
    ),
    (
        "{who} reads {t} pages on each of {a} days. The book has {big} pages. How many are left?",
        ("In {a} days {who} reads {a} times {t}, so {ta} pages.", "{big} minus {ta} leaves {big_ta} pages."),
        "There are {big_ta} pages left.",
    ),
    (
        "A recipe for {a} people needs {am} eggs. How many eggs are needed for {b} people?",
        ("Each person needs {am} divided by {a}, which is {m} eggs.", "{b} people need {b} times {m}, so {bm} eggs."),
        "{bm} eggs are needed.",
    ),
    (
        "A garden is {t} metres long and {a} metres wide. How long is the fence around it?",
        (
            "Length and width together are {t} plus {a}, so {t_a} metres.",
            "The fence runs along both twice: {t_a2} metres.",
        ),
        "The fence is {t_a2} metres long.",
    ),
    (
        "{who} saves {m} euros a week for {t} weeks and then spends {a}. How much is left?",
        ("In {t} weeks {who} saves {m} times {t}, so {mt} euros.", "After spending {a} there are {mt_a} euros."),
        "{mt_a} euros are left.",
    ),
    (
        "Three shelves hold {t}, {a} and {b} {things}. How many {things} are there in all?",
        ("The first two shelves hold {t} plus {a}, so {t_a} {things}.", "With the third there are {t_a_b} {things}."),
        "There are {t_a_b} {things} in all.",
    ),
)


def _problem(number: int, draw: random.Random) -> tuple[str, str, str]:
    """(question, answer in steps, direct answer)."""
    question, steps, answer = _PROBLEMS[number % len(_PROBLEMS)]
    a, b, m, t = draw.randint(3, 9), draw.randint(2, 9), draw.randint(2, 5), draw.randint(11, 30)
    p = (a * b // 10 + draw.randint(1, 3)) * 10
    big = t * a + draw.randint(11, 90)
    values: dict[str, Any] = {
        "a": a, "b": b, "m": m, "t": t, "p": p, "big": big, "ab": a * b, "p_ab": p - a * b, "ta": t * a,
        "big_ta": big - t * a, "am": a * m, "bm": b * m, "t_a": t + a, "t_a2": 2 * (t + a), "mt": m * t,
        "mt_a": m * t - a, "t_a_b": t + a + b, "who": draw.choice(_NAMES), "things": draw.choice(_THINGS),
    }  # fmt: skip
    texts = [step.format(**values) for step in steps]
    final = answer.format(**values)
    return question.format(**values), _in_steps(texts, f"So {final[0].lower()}{final[1:]}", number), final


def _in_steps(steps: list[str], final: str, number: int) -> str:
    """The steps in one of the forms that models use."""
    if number % 3 == 0:
        return "\n".join([*(f"{index}. {step}" for index, step in enumerate(steps, 1)), final])
    if number % 3 == 1:
        return "\n".join([*(f"Step {index}: {step}" for index, step in enumerate(steps, 1)), final])
    leads = ("First", "Then", "Next", "After that")
    return " ".join([*(f"{lead}: {step}" for lead, step in zip(leads, steps, strict=False)), f"Finally: {final}"])


def steps() -> Built:
    draw = random.Random(3)
    tasks = []
    for index, line in enumerate(lines("how-to.txt")):
        question, direct, *parts = line.split(" | ")
        done = "\n".join(f"{number}. {part}" for number, part in enumerate(parts, 1))
        if index % 3 == 1:
            done = "\n".join(f"Step {number}: {part}" for number, part in enumerate(parts, 1))
        if index % 3 == 2:
            low = [part[0].lower() + part[1:] for part in parts]
            done = " ".join(f"{lead}, {part}" for lead, part in zip(("First", "Then", "Finally"), low, strict=True))
        tasks.append((question, done, direct))
    problems = [_problem(number, draw) for number in range(160)]
    problems = list({question: one for one in problems for question in (one[0],)}.values())
    pairs = [*tasks[:50], *problems[:70]]
    heldout = [*(question for question, *_ in tasks[50:]), *(question for question, *_ in problems[70:])]
    draw.shuffle(pairs)
    return Built(pairs, [{"prompt": question} for question in heldout[:104]])
