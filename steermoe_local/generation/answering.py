"""Answers to one or many prompts as they come, each under one steering or under two to compare."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from ..llama.reasoning import Part
from ..llama.rendering import RenderedPrompt
from ..llama.sampling import RANDOM_SEED
from ..steering.bias_plan import AnyBias
from .engine import Engine, Request, Sampling
from .reply import Reply

Event = tuple[int, str, Part | Reply]
"""(index of the prompt, name of the side, what came): parts of the text, at the end the whole reply."""


def answers(
    engine: Engine,
    prompts: Iterable[RenderedPrompt],
    sides: Mapping[str, AnyBias | None],
    *,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Event]:
    """Answer prompts under each of some steerings (`sides`, by name; None: unsteered), in all of the engine's slots.

    What comes is in order for each prompt and side. With a random seed one is drawn for each prompt, the same for its
    sides. Closing the iterator stops what is running.

    Raises UsageError (a prompt that does not fit the context), ModelMismatchError, ModelError, NativeError.
    """
    requests: list[Request] = []
    replies: list[tuple[int, str, Reply]] = []
    for index, prompt in enumerate(prompts):
        drawn = _seeded(sampling or Sampling())
        for side, bias in sides.items():
            requests.append(
                Request(
                    prompt.tokens,
                    bias,
                    drawn,
                    max_tokens,
                    tuple(stop),
                    special=prompt.has_control_markers,
                    style=prompt.style,
                )
            )
            replies.append((index, side, Reply(prompt.style)))
    with closing(engine.generate(*requests)) as events:
        for number, event in events:
            index, side, reply = replies[number]
            for part in reply.add(event):
                yield index, side, part
            if reply.finish is not None:
                yield index, side, reply


def _seeded(sampling: Sampling) -> Sampling:
    if sampling.seed is not None:
        return sampling
    # nothing is drawn at temperature 0, and the same run should tell the same
    return replace(sampling, seed=secrets.randbelow(RANDOM_SEED) if sampling.temperature else 0)
