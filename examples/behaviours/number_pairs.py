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
    ("add", "{who} read {a} pages yesterday and {b} today. How many pages is that?", "That is {n} pages."),
    (
        "add",
        "There are {a} cars in the car park, and {b} more drive in. How many are in it?",
        "There are {n} cars in it.",
    ),
    (
        "sub",
        "A road is {a} kilometres long, and {b} of them are done. How many lie ahead?",
        "{n} kilometres lie ahead.",
    ),
    ("sub", "The temperature was {a} degrees and fell by {b}. What is it now?", "It is {n} degrees now."),
    ("double", "A stamp costs {a} cents. What do two of them cost?", "They cost {n} cents."),
    ("mul", "In a hall stand {a} tables with {b} chairs each. How many chairs is that?", "That is {n} chairs."),
    ("half", "Two children share {a} sweets. How many does each of them get?", "Each of them gets {n}."),
    ("next", "Which floor is right above floor {a}?", "Floor {n} is right above it."),
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
    for question, answer, number in known[:30]:
        items.append((question, *(answer.format(n=form(int(number))) for form in (str, number_word))))
    seen: set[str] = set()
    while len(items) < 120:
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
    # not the pairs' sentences with other numbers
    heldout = [*(question for question, *_ in known[30:]), *lines("numbers-heldout.txt")]
    draw.shuffle(heldout)
    return Built(items, [{"prompt": question} for question in heldout])


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
    (
        "{who} bakes {a} trays with {t} biscuits each and eats {b}. How many biscuits are left?",
        ("{a} trays hold {a} times {t}, so {ta} biscuits.", "Without the {b} that were eaten there are {ta_b}."),
        "{ta_b} biscuits are left.",
    ),
    (
        "A bus ticket costs {m} euros. {who} rides to work and back on {t} days. What does that cost?",
        ("To work and back costs 2 times {m}, so {m2} euros a day.", "{t} days cost {t} times {m2}, so {mt2} euros."),
        "That costs {mt2} euros.",
    ),
    (
        "{who} has {t} euros, earns {a} euros three times and spends {b}. How much is it then?",
        ("Three times {a} euros are {a3} euros.", "{t} plus {a3} minus {b} is {t_a3_b}."),
        "It is {t_a3_b} euros then.",
    ),
    (
        "A rope of {am} metres is cut into {a} equal parts. How long are two of them together?",
        ("One part is {am} divided by {a}, so {m} metres long.", "Two parts are 2 times {m}, so {m2} metres."),
        "They are {m2} metres long together.",
    ),
    (
        "A kilo of pears costs {m} euros and a kilo of plums {b}. What do {a} kilos of each cost?",
        ("A kilo of each costs {m} plus {b}, so {m_b} euros.", "{a} kilos of each cost {a} times {m_b} euros."),
        "They cost {m_b_a} euros.",
    ),
    (
        "A lift starts on floor {t}, goes up {a} floors and then down {b}. On which floor is it?",
        ("From floor {t} it goes up to floor {t_a}.", "From there {b} floors down is floor {t_a_less_b}."),
        "It is on floor {t_a_less_b}.",
    ),
    (
        "{who} is {t} years old, and a cousin is {a} years older. How old are they together?",
        ("The cousin is {t} plus {a}, so {t_a} years old.", "Together they are {t} plus {t_a}."),
        "They are {t_t_a} years old together.",
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
        "mt_a": m * t - a, "t_a_b": t + a + b, "ta_b": t * a - b, "m2": 2 * m, "mt2": 2 * m * t, "a3": 3 * a,
        "t_a3_b": t + 3 * a - b, "m_b": m + b, "m_b_a": a * (m + b), "t_a_less_b": t + a - b, "t_t_a": 2 * t + a,
        "who": draw.choice(_NAMES), "things": draw.choice(_THINGS),
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
    pairs = [*tasks[:50], *(_problem(number, draw) for number in range(70))]
    heldout = [*(question for question, *_ in tasks[50:]), *lines("problems-heldout.txt")]
    draw.shuffle(pairs)
    draw.shuffle(heldout)
    return Built(pairs, [{"prompt": question} for question in heldout])
