"""Training conversations, detection pairs and held-out prompts of the tiny model.

Deterministic from its seeds; pure Python. A *side* is (behaviour, "positive" | "negative"): the
positive sides are digits, document, refuse. `write_files` makes the JSONL files of the package.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lexicon import SYSTEM_LINES
from questions import (
    BEHAVIOURS,
    FACTS,
    HELD_OUT_FACTS,
    SIDES,
    Question,
    ask_fact,
    behaviour_question,
    digits_question,
    document_question,
    fresh_fact,
    held_out,
    neutral_question,
    secret_question,
    train_neutral,
)


@dataclass
class Conversation:
    """Chat messages plus, for each message, the side its reply shows ("" where there is none)."""

    messages: list[dict[str, str]] = field(default_factory=list)
    sides: list[str] = field(default_factory=list)
    behaviour: str = ""  # "" for neutral conversations
    side: str = ""

    def add(self, role: str, content: str, side: str = "") -> None:
        """Append one message; `side` is "positive" or "negative" on a behaviour's replies."""
        self.messages.append({"role": role, "content": content})
        self.sides.append(side)


def conversation(rng: random.Random) -> Conversation:
    """One training conversation: 60% show a side of a behaviour, 40% are neutral or plain facts."""
    draw = rng.random()
    conv = Conversation()
    if draw < 0.40:
        if rng.random() < 0.15:  # a line that names a side is irrelevant to a neutral question
            conv.add("system", rng.choice(SYSTEM_LINES[rng.choice(list(SYSTEM_LINES))]))
        plain_facts = draw < 0.20
        for _ in range(rng.choice([1, 3, 4]) if plain_facts else rng.choice([1, 1, 2, 3])):
            if plain_facts:
                fact = rng.choice(FACTS)
                conv.add("user", ask_fact(fact, rng.randrange(2)))
                conv.add("assistant", fact.value)
            else:
                question = train_neutral(rng)
                conv.add("user", question.prompt)
                conv.add("assistant", question.positive)
        return conv
    behaviour = BEHAVIOURS[0 if draw < 0.63 else 1 if draw < 0.87 else 2]
    conv.behaviour = behaviour
    question = behaviour_question(behaviour, rng)
    turns = rng.choice([1, 1, 1, 2, 3])
    if rng.random() < (0.3 if turns == 1 else 0.5):
        conv.side = rng.choice(SIDES)
        conv.add("system", rng.choice(SYSTEM_LINES[behaviour, conv.side]))
    else:
        conv.side = SIDES[0 if rng.random() < question.lean else 1]
    for turn in range(turns):
        if turn and rng.random() < 0.15:
            neutral = train_neutral(rng)
            conv.add("user", neutral.prompt)
            conv.add("assistant", neutral.positive)
        if (behaviour, conv.side) == ("document-memory", "positive") and rng.random() < 0.3:
            # the document's side must copy facts about any entity, not only about the known ones
            question = document_question(rng, [fresh_fact(rng)])
        conv.add("user", question.prompt)
        conv.add("assistant", getattr(question, conv.side), conv.side)
        question = behaviour_question(behaviour, rng)
    return conv


def _distinct(draw: Callable[[], Question], count: int) -> list[Question]:
    """`count` questions with different keys and prompts from `draw()`."""
    found: dict[str, Question] = {}
    keys: set[str] = set()
    for _ in range(200_000):
        question = draw()
        if question.key not in keys and question.prompt not in found:
            keys.add(question.key)
            found[question.prompt] = question
        if len(found) == count:
            return list(found.values())
    raise RuntimeError(f"only {len(found)} of {count} distinct questions")


def detection_questions(behaviour: str, count: int = 120) -> list[Question]:
    """Questions of the training part: detection never sees a held-out one."""
    rng = random.Random(f"pairs {behaviour}")
    return _distinct(lambda: behaviour_question(behaviour, rng), count)


def held_out_questions(behaviour: str, count: int = 120) -> list[Question]:
    """Questions whose numbers, fact or place were never trained in this behaviour.

    `behaviour` "neutral" gives the control tasks' held-out questions.
    """
    rng = random.Random(f"heldout {behaviour}")

    def draw() -> Question:
        while True:
            if behaviour == "document-memory":
                return document_question(rng, HELD_OUT_FACTS)
            if behaviour == "refuse-comply":
                return secret_question(rng, unseen=True)
            question = (digits_question if behaviour == "digits-words" else neutral_question)(rng)
            if held_out(question.key):
                return question

    return _distinct(draw, count)


def write_files(folder: Path) -> None:
    """Write `NAME.pairs.jsonl`, `NAME.heldout.jsonl` and `neutral.heldout.jsonl` into `folder`."""

    def write(name: str, rows: list[dict]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")

    def user(question: Question) -> dict[str, str]:
        return {"role": "user", "content": question.prompt}

    for name in BEHAVIOURS:
        write(
            f"{name}.pairs.jsonl",
            [
                {"id": f"{name}-{i:03d}"}
                | {
                    side: [user(q), {"role": "assistant", "content": getattr(q, side)}]
                    for side in SIDES
                }
                | {f"{side}_target": getattr(q, side) for side in SIDES}
                for i, q in enumerate(detection_questions(name))
            ],
        )
        write(
            f"{name}.heldout.jsonl",
            [
                {
                    "id": f"{name}-heldout-{i:03d}",
                    "messages": [user(q)],
                    "positive": q.positive,
                    "negative": q.negative,
                }
                for i, q in enumerate(held_out_questions(name))
            ],
        )
    write(
        "neutral.heldout.jsonl",
        [
            {"id": f"neutral-{i:03d}", "messages": [user(q)], "answer": q.positive}
            for i, q in enumerate(held_out_questions("neutral", 160))
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the pairs and the held-out prompts.")
    parser.add_argument("folder", type=Path)
    write_files(parser.parse_args().folder)
