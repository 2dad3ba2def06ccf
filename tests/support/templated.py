"""Copies of the embedded model under other chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.gguf_copy import copy_model

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# Prints the day, as gpt-oss does.
DATED = "<|system|>Today is {{ strftime_now('%Y-%m-%d') }}.<|end|>" + TURNS + ANSWER
# Takes no system message, as Mixtral and Gemma.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TURNS
    + ANSWER
)
BROKEN = "{% for m in messages %}{{ m.content }"

Models = Callable[[str], Path]


def models(folder: Path, tiny: Path) -> Models:
    """A function that gives the model with a template, written once."""
    made: dict[str, Path] = {}

    def model(template: str) -> Path:
        if template not in made:
            (made[template],) = copy_model(tiny, folder / f"model-{len(made)}.gguf", template=template)
        return made[template]

    return model
