"""What a run has to do, as the clock takes it, with prompts to measure the model's speed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .._util.files import human_duration
from ..evaluation.measuring.replies import render
from ..evaluation.tasks.tasks import Task
from ..llama.rendering import RenderedPrompt, Renderer
from .answers import SIDES
from .clock import Speed, Work, expected_seconds
from .material import Material
from .options import SIZES, LearnOptions
from .source import Source

_OTHERS = {"thorough": "normal", "normal": "quick"}


def work_of_questions(
    renderer: Renderer, source: Source, options: LearnOptions, wanted: int
) -> tuple[list[RenderedPrompt], Work]:
    """Of a run whose questions the model answers until there are `wanted` pairs."""
    assert source.instructions is not None
    sizes, text = options.all_sizes, source.instructions[SIDES[0]]
    prompts = [renderer.render(question.messages(text)) for question in source.questions[: options.n_parallel]]
    wanted = min(wanted, len(source.questions))
    rest = wanted * (1 - options.heldout)
    return prompts, Work(
        prompt=_mean(prompts),
        answer=0.8 * sizes.answer_tokens,
        n_asked=min(len(source.questions), math.ceil(1.2 * wanted)),
        n_pairs=round(min(0.7 * rest, sizes.n_pairs)),
        n_choosing=round(min(0.3 * rest, sizes.n_choosing)),
        n_heldout=round(min(sizes.n_heldout, wanted * options.heldout)),
        generated=options.judge is not None,
    )


def work_of_material(
    renderer: Renderer, material: Material, options: LearnOptions
) -> tuple[list[RenderedPrompt], Work]:
    """Of a run whose pairs are there."""
    n, choosing, heldout = options.n_parallel, material.choosing, material.heldout
    prompts = [render(renderer, choosing, item) for item in choosing.items[:n]]
    targets = [pair.positive_target + pair.negative_target for pair in material.pairs[:n]]
    answer = sum(len(renderer.tokenize(text, add_special=False)) for text in targets) / (2 * len(targets))
    return prompts, Work(
        prompt=_mean(prompts),
        answer=answer,
        n_asked=0,
        n_pairs=len(material.pairs),
        n_choosing=len(choosing.items),
        n_heldout=len(heldout.items),
        generated=_is_generated(heldout),
        chosen_generated=_is_generated(choosing),
    )


def shorter(options: LearnOptions, work: Work, speed: Speed) -> str:
    """The flag that makes the run shorter, and how long it takes then; "" where there is none."""
    other = _OTHERS.get(options.effort)
    if other is None or options.sizes:
        return ""
    sizes = SIZES[other]
    less = replace(
        work,
        n_asked=math.ceil(work.n_asked * sizes.n_heldout / options.all_sizes.n_heldout),
        n_pairs=min(work.n_pairs, sizes.n_pairs),
        n_choosing=min(work.n_choosing, sizes.n_choosing),
        n_heldout=min(work.n_heldout, sizes.n_heldout),
        answer=min(work.answer, sizes.answer_tokens),
    )
    seconds = sum(expected_seconds(sizes, less, speed).values())
    flag = "--quick" if other == "quick" else "without --thorough"
    return f"; {flag}: about {human_duration(seconds)}"


def _is_generated(task: Task) -> bool:
    return task.scorer != "choice"


def _mean(prompts: Sequence[RenderedPrompt]) -> float:
    return sum(len(prompt.tokens) for prompt in prompts) / len(prompts)
