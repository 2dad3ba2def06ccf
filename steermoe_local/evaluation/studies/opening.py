"""Benches, steerings and whole evaluations from names and files, as the command line opens them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..._util.files import StrPath
from ...errors import UsageError
from ...generation.answer_file import AnswerFile
from ...llama.steered_llama import SteeredLlama
from ...model_files.model_info import ModelInfo, model_info
from ...models.embedded import behaviours, resolve_model
from ...models.shipped_maps import map_path, recommended_numbers
from ...pairs.pairs import Pair, load_pairs
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator, EvaluatorSettings, Progress
from ..tasks.builtin import default_guards, open_task
from ..tasks.neutral_text import NeutralText, load_neutral_text
from ..tasks.scorers import make_scorer
from ..tasks.tasks import Scorer, Task
from .evaluate import Controls, Evaluation, evaluate

__all__ = ["model_facts", "open_evaluator", "open_steering", "pairs_of", "run_evaluation"]

_DEFAULT = Controls()


def model_facts(facts: ModelInfo) -> dict[str, Any]:
    """What results say of their model: name of the file, quantization, identity; no folders."""
    return {
        "file": facts.paths[0].name,
        "name": facts.name,
        "architecture": facts.architecture,
        "quantization": facts.file_type,
        "size_bytes": facts.size_bytes,
        "identity": None if facts.identity is None else facts.identity.to_dict(),
    }


def pairs_of(steering: Steering) -> list[Pair] | None:
    """The pairs that a shipped map was made from; None where nobody knows them."""
    if steering.path is None or recommended_numbers(steering.path) is None:
        return None
    for behaviour in behaviours():
        if behaviour.name == steering.path.stem:
            return list(load_pairs(behaviour.pairs))
    return None


@contextmanager
def open_evaluator(
    model: StrPath,
    task: Task | StrPath,
    *,
    scorer: Scorer | str | None = None,
    n_items: int | None = None,
    benign: tuple[Task, Scorer] | StrPath | None = "default",
    neutral: NeutralText | StrPath | None = "default",
    settings: EvaluatorSettings | None = None,
    records: StrPath | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **model_arguments: Any,
) -> Iterator[Evaluator]:
    """Load a model and open an evaluator on it, for `evaluate`, `sweep`, `tune` and the like.

    `model` is "tiny" or a GGUF file, `task` "builtin:NAME" or a file, of which the first `n_items` are taken. `benign`
    and `neutral`: files, "default" for those that fit the model, None for none. `records`: a file for all answers; an
    interrupted block leaves `<records>.partial`, to go on from with `resume`. `model_arguments` are `SteeredLlama`'s.

    Raises FormatError, UsageError, and ModelError for a model without experts.
    """
    path = resolve_model(os.fspath(model))
    facts = model_info(path)
    facts.require_moe()
    given = scorer if isinstance(scorer, str) else None
    opened = task if isinstance(task, Task) else open_task(task, scorer=given)
    opened = opened.first(n_items)
    if scorer is None or isinstance(scorer, str):
        scorer = make_scorer(opened.scorer, opened.options)
    shipped = default_guards(path) if "default" in (benign, neutral) else (None, None)
    with ExitStack() as stack:
        kept = None if records is None else stack.enter_context(AnswerFile(records))
        llama = SteeredLlama(path, **{"n_ctx": 64, "n_batch": 64, **model_arguments})
        stack.callback(llama.close)
        evaluator = stack.enter_context(
            Evaluator(
                llama,
                opened,
                scorer,
                benign=_benign(shipped[0] if benign == "default" else benign),
                neutral=_neutral(shipped[1] if neutral == "default" else neutral),
                settings=settings,
                kept=kept,
                resume=resume and kept is not None and kept.exists(),
                metadata={"model": model_facts(facts)},
                progress=progress,
            )
        )
        yield evaluator
        evaluator.finish()


def open_steering(
    map: StrPath | None = None,  # as the command line names it
    *,
    bias: StrPath | None = None,
    activate: int | None = None,
    deactivate: int | None = None,
    reverse: bool = False,
    layers: str | None = None,
    strength: float | None = None,
) -> Steering:
    """Read a map (a file, or the name of a shipped one) or a bias file, and choose experts.

    Without numbers a shipped map gets those of its card. Raises FormatError, UsageError.
    """
    if map is None:
        if any(value is not None for value in (activate, deactivate, layers, strength)) or reverse:
            raise UsageError("the experts are chosen from a map; name it")
        return Steering.open(bias=bias)
    path = map_path(map)
    numbers = (activate, deactivate)
    if numbers == (None, None):
        numbers = recommended_numbers(path) or numbers
    return Steering.open(
        map_file=path,
        bias=bias,
        activate=numbers[0] or 0,
        deactivate=numbers[1] or 0,
        reverse=reverse,
        layers=layers,
        scale=strength,
    )


def run_evaluation(
    model: StrPath,
    *,
    map: StrPath | None = None,  # as the command line names it
    bias: StrPath | None = None,
    activate: int | None = None,
    deactivate: int | None = None,
    reverse: bool = False,
    layers: str | None = None,
    strength: float | None = None,
    task: Task | StrPath | None = None,
    away: bool = True,
    controls: Controls | None = _DEFAULT,
    pairs: StrPath | None = None,
    seed: int = 0,
    settings: EvaluatorSettings | None = None,
    **evaluator_arguments: Any,
) -> Evaluation:
    """`evaluate` from files and names, like `steermoe eval`.

    `task` is by default the shipped map's own. The steering's arguments are `open_steering`'s, `evaluator_arguments`
    those of `open_evaluator`. Raises as these and `evaluate`.
    """
    path = resolve_model(os.fspath(model))
    identity = model_info(path).require_moe()
    steering = open_steering(
        map,
        bias=bias,
        activate=activate,
        deactivate=deactivate,
        reverse=reverse,
        layers=layers,
        strength=strength,
    )
    steering.check(identity, str(path), settings is not None and settings.force)
    if task is None:
        if pairs_of(steering) is None or steering.path is None:
            raise UsageError("which task? name one: a file, or builtin:NAME")
        task = f"builtin:{steering.path.stem}"
    if controls is not None and controls.pairs is None:
        found = load_pairs(pairs) if pairs is not None else pairs_of(steering)
        controls = replace(controls, pairs=found)
    with open_evaluator(path, task, settings=settings, **evaluator_arguments) as evaluator:
        return evaluate(evaluator, steering, away=away, controls=controls, seed=seed)


def _benign(benign: tuple[Task, Scorer] | StrPath | None) -> tuple[Task, Scorer] | None:
    if benign is None or isinstance(benign, tuple):
        return benign
    task = open_task(benign, scorer="refusal")
    return task, make_scorer(task.scorer, task.options)


def _neutral(neutral: NeutralText | StrPath | None) -> NeutralText | None:
    return neutral if neutral is None or isinstance(neutral, NeutralText) else load_neutral_text(neutral)
