"""What a run has to do, as the clock takes it, with prompts to measure the model's speed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .._util.files import human_duration
from ..attribution.texts import documents as draw_documents
from ..evaluation.measuring.replies import render
from ..evaluation.tasks.neutral_text import Document, NeutralText
from ..evaluation.tasks.tasks import Task
from ..llama.rendering import RenderedPrompt, Renderer
from .answers import AT_ONCE, LEAST_TOKENS, SIDES
from .clock import Speed, Work, expected_seconds
from .material import Material
from .options import SIZES, LearnOptions
from .source import Source
from .steps import TEXT_OF_DRAW

_DECODED = 16  # tokens that a model writes to show its speed, where it writes no answers in the run
_MORE_ASKED = 1.15  # questions for each pair: some make none
_OTHERS = {"thorough": "normal", "normal": "quick"}


@dataclass(frozen=True)
class Sample:
    """What a model's speed is measured on: prompts, and tokens of the longest answer to them.

    With `sides` the prompts are questions under both instructions in turn.
    """

    prompts: tuple[RenderedPrompt, ...]
    max_tokens: int
    sides: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.tokens) for prompt in self.prompts)


def sample_of_questions(renderer: Renderer, source: Source, options: LearnOptions) -> Sample:
    """Of a run whose questions the model answers."""
    assert source.instructions is not None
    n = max(2, options.n_parallel)
    messages = [
        question.messages(source.instructions[side]) for question in source.questions[: n // 2] for side in SIDES
    ]
    prompts = tuple(renderer.render(one) for one in messages)
    return Sample(prompts, options.all_sizes.answer_tokens, sides=True)


def sample_of_material(renderer: Renderer, material: Material, options: LearnOptions) -> Sample:
    """Of a run whose pairs are there: the prompts that are held out from them for choosing."""
    choosing = material.choosing
    prompts = tuple(render(renderer, choosing, item) for item in choosing.items[: options.n_parallel])
    tasks = [task for task in (material.heldout, choosing) if _is_generated(task)]
    return Sample(prompts, tasks[0].max_tokens if tasks else _DECODED)


def work_of_questions(
    renderer: Renderer, source: Source, options: LearnOptions, wanted: int, sample: Sample, lengths: Sequence[float]
) -> Work:
    """Of a run whose questions the model answers until there are `wanted` pairs; `lengths` are those of the sample."""
    sizes = options.all_sizes
    wanted = min(wanted, len(source.questions))
    rest = wanted * (1 - options.heldout)
    bare = [renderer.render(question.messages()) for question in source.questions[: options.n_parallel]]
    n_asked = AT_ONCE * math.ceil(_MORE_ASKED * wanted / AT_ONCE)
    return Work(
        prompt=_mean(bare),
        answer=sum(map(_kept, lengths[::2], lengths[1::2])) / max(1, len(lengths[1::2])),
        written=sum(lengths) / len(lengths),
        n_asked=min(len(source.questions), n_asked),
        asked=_mean(sample.prompts),
        n_pairs=round(min(0.7 * rest, sizes.n_pairs)),
        n_choosing=round(min(0.3 * rest, sizes.n_choosing)),
        n_heldout=round(min(sizes.n_heldout, wanted * options.heldout)),
        generated=options.judge is not None,
    )


def work_of_material(renderer: Renderer, material: Material, options: LearnOptions, written: float) -> Work:
    """Of a run whose pairs are there; the model writes so many tokens of an answer."""
    n, choosing, heldout = options.n_parallel, material.choosing, material.heldout
    targets = [pair.positive_target + pair.negative_target for pair in material.pairs[:n]]
    answer = sum(len(renderer.tokenize(text, add_special=False)) for text in targets) / (2 * len(targets))
    return Work(
        prompt=_mean([render(renderer, choosing, item) for item in choosing.items[:n]]),
        answer=answer,
        written=written,
        n_asked=0,
        n_pairs=len(material.pairs),
        n_choosing=len(choosing.items),
        n_heldout=len(heldout.items),
        generated=_is_generated(heldout),
        chosen_generated=_is_generated(choosing),
    )


def with_text(work: Work, renderer: Renderer, neutral: NeutralText | None, documents: Sequence[Document]) -> Work:
    """The work with what is read of the neutral text, whose documents are those of the evaluators."""
    if neutral is None:
        return work
    drawn = draw_documents(neutral, renderer, TEXT_OF_DRAW)
    read = sum(len(document.tokens) - 1 for document in documents)
    return replace(work, text=read, draw_text=sum(document.n for document in drawn))


def _kept(one: float, other: float) -> float:
    """Mean tokens of the two answers of a pair: the longer one is cut to the other."""
    return (min(one, most := max(LEAST_TOKENS, min(one, other))) + min(other, most)) / 2


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
        written=min(work.written, sizes.answer_tokens) if work.n_asked else work.written,
        text=work.text * min(1.0, sizes.n_text / options.all_sizes.n_text),
    )
    seconds = sum(expected_seconds(sizes, less, speed).values())
    flag = "--quick" if other == "quick" else "without --thorough"
    return f"; {flag}: about {human_duration(seconds)}"


def _is_generated(task: Task) -> bool:
    return task.scorer != "choice"


def _mean(prompts: Sequence[RenderedPrompt]) -> float:
    return sum(len(prompt.tokens) for prompt in prompts) / len(prompts)
