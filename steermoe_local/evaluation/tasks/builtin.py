"""The tasks that ship with the package, and the guards against side effects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from ..._util.closest import did_you_mean
from ..._util.files import StrPath
from ...behaviours import behaviours
from ...errors import UsageError
from ...identity import ModelIdentity
from ...model_files.model_info import model_info
from ...models.embedded import data_folder, embedded_model
from ...models.local_models import resolve_model
from ...pairs.prompts import load_prompts
from .neutral_text import NeutralText, load_neutral_text
from .scorers import make_scorer
from .tasks import ILL_FORMED, Score, Scorer, Task, load_task, overridden

BUILTIN = "builtin:"
_MAX_TOKENS = 24  # the embedded model's longest reply has 20


def builtin_names() -> tuple[str, ...]:
    """The names of the tasks that ship: those of the behaviours, and the guards."""
    return (*(behaviour.name for behaviour in behaviours()), "neutral", "benign")


def builtin_task(name: str) -> Task:
    """A task by name, with or without "builtin:" before it.

    The name of a behaviour: its held-out prompts, scored by its scorer (those of the embedded model's behaviours by
    side). `neutral`: tasks of the embedded model that no behaviour touches, scored by their answer. `benign`: harmless
    requests for any model, scored as refusals. Raises UsageError.
    """
    name = name.removeprefix(BUILTIN)
    common: dict[str, Any] = {"max_tokens": _MAX_TOKENS, "license": "MIT", "source": f"{BUILTIN}{name}"}
    for one in behaviours():
        if one.name == name:
            common |= {"positive": one.positive, "negative": one.negative, "max_tokens": one.max_tokens}
            return Task(name, tuple(one.heldout()), one.scorer, dict(one.options), **common)
    if name == "neutral":
        items = tuple(load_prompts(data_folder() / "neutral.heldout.jsonl"))
        return Task(name, items, "exact", positive="right", negative="wrong", **common)
    if name == "benign":
        return replace(load_task(data_folder() / "benign.jsonl"), source=common["source"])
    names = builtin_names()
    raise UsageError(f"{name!r} is no builtin task{did_you_mean(name, names)}; take one of {', '.join(names)}")


def side_of(score: Score) -> str:
    """The side that an answer of a behaviour shows by its score: "positive", "negative" or "ill-formed".

    An answer with both sides in it ("both") is on neither.
    """
    if score.value >= 0.5:
        return "positive"
    return ILL_FORMED if score.label in (ILL_FORMED, "both") else "negative"


def open_task(
    task: StrPath,
    *,
    scorer: str | None = None,
    options: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> Task:
    """A task as the command line names it: "builtin:NAME", or a file (`load_task`).

    `scorer` with its `options`, and `max_tokens`, override those of the task. Raises UsageError, FormatError.
    """
    text = os.fspath(task)
    if not text.startswith(BUILTIN):
        if text in builtin_names() and not os.path.exists(text):
            raise UsageError(f"{text}: no such file; the task that ships is called {BUILTIN}{text}")
        return load_task(task, scorer=scorer, options=options, max_tokens=max_tokens)
    found = builtin_task(text)
    return replace(found, **overridden({"options": found.options}, scorer, options, max_tokens))


def is_embedded(model: StrPath | ModelIdentity | None) -> bool:
    """Whether it is the embedded model, in any quantization, by its routers. False for None."""
    if model is None:
        return False
    if not isinstance(model, ModelIdentity):
        found = model_info(resolve_model(os.fspath(model))).identity
        return found is not None and found.router_sha256 == _embedded_router()
    return model.router_sha256 == _embedded_router()


@cache
def _embedded_router() -> str:
    return model_info(embedded_model()).require_moe().router_sha256


def default_guards(model: StrPath | ModelIdentity | None) -> tuple[tuple[Task, Scorer], NeutralText]:
    """Guards against side effects for a model: (benign prompts with the scorer of refusals, neutral text).

    The embedded model knows only its own tasks, so it gets those that no behaviour touches; any other model gets
    harmless requests and plain prose that ship with the package. Raises ModelError for a file that is no model.
    """
    if is_embedded(model):
        neutral = builtin_task("neutral")
        task = replace(neutral, scorer="refusal", options={}, positive="refused", negative="answered")
        text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    else:
        task, text = builtin_task("benign"), load_neutral_text(data_folder() / "neutral.txt")
    return (task, make_scorer(task.scorer, task.options)), text
