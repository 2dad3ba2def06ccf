"""Steerings, questions and answers of the embedded model, and what chats say to them."""

from __future__ import annotations

from typing import Any

from steermoe_local import ExpertMap, ModelIdentity
from steermoe_local.generation.chat import Chat, Part
from steermoe_local.generation.engine import FinishEvent
from steermoe_local.steering.steering import Steering
from tests.support.builders import HEX
from tests.support.paths import ROOT

MAPS = ROOT / "expert_maps" / "tiny"
MAP = MAPS / "digits-words.json"
TO_DIGITS = Steering.open(map_file=MAP, activate=8, deactivate=8)
TO_WORDS = TO_DIGITS.changed(reverse=True)
FOREIGN = ExpertMap(ModelIdentity("olmoe", 5, 24, 4, HEX), "x", ExpertMap.load(MAP).rd)
QUESTIONS = [
    "Which number comes after three?",
    "Add 4 and 6.",
    "Please count down starting at sixteen until fourteen.",
]
COUNT = QUESTIONS[2]
DIGITS, WORDS = "16, 15, 14", "sixteen, fifteen, fourteen"


def say(chat: Chat, text: str) -> tuple[str, FinishEvent]:
    *parts, finish = chat.ask(text)
    assert isinstance(finish, FinishEvent)
    return "".join(part.text for part in parts if isinstance(part, Part) and part.kind == "answer"), finish


def routing(finish: FinishEvent) -> Any:
    assert finish.routing is not None
    return finish.routing


def fresh(new: Any, messages: list[dict[str, str]], steering: Steering | None, text: str) -> tuple[str, FinishEvent]:
    """The answer of a chat that begins with this transcript and has never been steered otherwise."""
    chat = new(steering)
    chat.messages = [dict(message) for message in messages]
    try:
        return say(chat, text)
    finally:
        chat.close()
