"""Conversations and targets that every template is tried with."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


def _chat(*texts: str, system: str = "") -> list[Message]:
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *found] if system else found


# messages and the target in them
TARGETS: dict[str, tuple[list[Message], str]] = {
    "a reply": (_chat("Count from three to five.", "three, four, five"), "three, four, five"),
    "a number": (_chat("How many?", "13"), "13"),
    "a part of a reply": (_chat("How many apples?", "There are 42 apples in it."), "42 apples"),
    "an earlier reply": (_chat("Name a fruit.", "A ripe banana.", "Thanks."), "banana"),
    "one letter": (_chat("Which one, a or b?", "a"), "a"),
    "a word of markup": (_chat("Say it.", "a message of the user"), "message"),
    "a role as the reply": (_chat("Who are you?", "assistant"), "assistant"),
    "a question": (_chat("The word is cucumber.", "Fine."), "cucumber"),
    "the last question": (_chat("one", "two", "three zebras run"), "three zebras"),
    "a system message": (_chat("Hi.", "Hello.", system="You like sour plums."), "sour plums"),
    "thoughts": (_chat("Is a pear good?", "<think>A pear, hm.</think>Yes, it is."), "pear"),
    "earlier thoughts": (_chat("Is a fig good?", "<think>A fig, hm.</think>Yes.", "And a pear?"), "fig"),
    "behind thoughts": (_chat("Which fruit?", "<think>Let me see.</think>A plum."), "plum"),
    "other scripts": (_chat("日本語で答えて。", "猫は🐈です。naïve"), "猫は🐈です"),
    "lines": (_chat("Write a poem.", "first line\n\nsecond  line\n\tthird"), "line\n\nsecond  line"),
}
PLAIN: dict[str, tuple[str, str]] = {
    "words": ("one, two, three", "two, three"),
    "a number": ("It costs 13 coins", "13"),
    "the beginning": ("banana and more", "banana"),
    "other scripts": ("naïve 猫は🐈です end", "猫は🐈"),
    "blanks": ("  two  blanks\n\n\tand a tab", "blanks\n\n\tand"),
}

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "enum": ["one", "two"], "description": "The word."},
        "sure": {"type": "boolean", "description": "No doubt."},
    },
    "required": ["word", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "put", "description": "Puts a word.", "parameters": SCHEMA}}


def _call(arguments: str, id_: str) -> list[Message]:
    call = {"id": id_, "type": "function", "function": {"name": "put", "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": id_, "name": "put", "content": '{"done": true}'},
    ]


def tool_round(arguments: str = '{"word": "one", "sure": true}', id_: str = "abc123def") -> list[Message]:
    """A question, a call with its result, and the answer's turn."""
    return [{"role": "user", "content": "Put a word."}, *_call(arguments, id_)]


def tool_rounds() -> list[Message]:
    """Two rounds of calls, and the answer's turn."""
    second = [{"role": "assistant", "content": "It is put."}, {"role": "user", "content": "And another one!"}]
    return [*tool_round(), *second, *_call('{"word": "two", "sure": false}', "xyz987uvw")]


# what is answered: messages and tools
RENDERINGS: dict[str, tuple[list[Message], list[Message] | None]] = {
    "one question": (_chat("Which number comes after three?"), None),
    "three turns": (_chat("Name a fruit.", "A banana.", "Another one!"), None),
    "a system message": (_chat("Hi.", system="You like plums."), None),
    "a developer message": ([{"role": "developer", "content": "You like figs."}, *_chat("Hi.")], None),
    "tools": (_chat("Put a word."), [TOOL]),
    "a tool round": (tool_round(), [TOOL]),
    "two tool rounds": (tool_rounds(), [TOOL]),
}
