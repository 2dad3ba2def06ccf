"""Opens what is measured by file or name: the evaluator of a model on a task, and a steering."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..._util.files import StrPath
from ...errors import UsageError
from ...generation.answer_file import AnswerFile
from ...llama.steered_llama import SteeredLlama
from ...maps.recommended import nothing_to_steer
from ...model_files.model_info import ModelInfo, model_info
from ...models.embedded import behaviour
from ...models.local_models import resolve_model
from ...models.shipped_maps import map_path, shipped_name
from ...models.user_maps import PAIRS_FILE, TASK_FILE, beside_map
from ...pairs.pairs import Pair, load_pairs
from ...steering.steering import Steering
from ..tasks.builtin import BUILTIN, default_guards, open_task
from ..tasks.neutral_text import NeutralText, load_neutral_text
from ..tasks.scorers import make_scorer
from ..tasks.tasks import Scorer, Task
from .evaluator import Evaluator, EvaluatorSettings, Progress
from .workload import OnWork

Benign = tuple[Task, Scorer] | StrPath | None
"""Benign prompts: a task with its scorer or a file, "default" for those that fit the model, None for none."""
Neutral = NeutralText | StrPath | None
"""A neutral text, or a file; "default" and None as for `Benign`."""


def model_facts(facts: ModelInfo) -> dict[str, Any]:
    """The model's metadata in results: name of the file, quantization, identity; no folders."""
    return {
        "file": facts.paths[0].name,
        "name": facts.name,
        "architecture": facts.architecture,
        "quantization": facts.file_type,
        "size_bytes": facts.size_bytes,
        "identity": None if facts.identity is None else facts.identity.to_dict(),
    }


def pairs_of(steering: Steering) -> list[Pair] | None:
    """Load the pairs that a shipped or a learnt map was made from; None for any other map."""
    if (name := shipped_name(steering.path)) is not None:
        return load_pairs(behaviour(name).pairs)
    path = beside_map(steering.path, PAIRS_FILE) if steering.expert_map is not None else None
    return None if path is None else load_pairs(path)


def task_of(path: Path | None) -> str | None:
    """The task that belongs to a shipped or a learnt map, by the map's file, as `open_task` takes it; None: none."""
    if (name := shipped_name(path)) is not None:
        return f"{BUILTIN}{name}"
    found = beside_map(path, TASK_FILE)
    return None if found is None else str(found)


def open_guards(
    model: StrPath, benign: Benign = "default", neutral: Neutral = "default"
) -> tuple[tuple[Task, Scorer] | None, NeutralText | None]:
    """Load the benign prompts with their scorer, and the neutral text, of a model. Raises FormatError, UsageError."""
    shipped = default_guards(model) if "default" in (benign, neutral) else (None, None)
    if benign == "default":
        benign = shipped[0]
    elif benign is not None and not isinstance(benign, tuple):
        task = open_task(benign, scorer="refusal")
        benign = task, make_scorer(task.scorer, task.options)
    if neutral == "default":
        neutral = shipped[1]
    elif neutral is not None and not isinstance(neutral, NeutralText):
        neutral = load_neutral_text(neutral)
    return benign, neutral


@contextmanager
def open_evaluator(
    model: StrPath,
    task: Task | StrPath,
    *,
    scorer: Scorer | str | None = None,
    n_items: int | None = None,
    benign: Benign = "default",
    neutral: Neutral = "default",
    settings: EvaluatorSettings | None = None,
    records: StrPath | AnswerFile | None = None,
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_work: OnWork | None = None,
    **model_arguments: Any,
) -> Iterator[Evaluator]:
    """Load a model and open an evaluator on it, for `evaluate`, `sweep`, `tune` and `transfer`.

    `model` is "tiny" or a GGUF file, `task` "builtin:NAME" or a file, of which the first `n_items` are taken.
    `records`: a file for all answers, or an AnswerFile; an interrupted block leaves `<records>.partial`, to go on from
    with `resume`. Nobody else writes it meanwhile.
    `metadata`: further facts that results depend on, besides the model's. `on_work` is told beforehand how much there
    is to measure. `model_arguments` are `SteeredLlama`'s.

    Raises FormatError, UsageError, BusyError (another process writes `records`), StorageError, and ModelError for a
    model without experts.
    """
    path = resolve_model(os.fspath(model))
    facts = model_info(path)
    facts.require_moe()
    if not isinstance(task, Task):
        task = open_task(task, scorer=scorer if isinstance(scorer, str) else None)
    task = task.first(n_items)
    if scorer is None or isinstance(scorer, str):
        scorer = make_scorer(task.scorer, task.options)
    guards = open_guards(path, benign, neutral)
    with ExitStack() as stack:
        if records is not None and not isinstance(records, AnswerFile):
            records = AnswerFile(records)
        kept = None if records is None else stack.enter_context(records)
        # a small context: the evaluator makes one of its own over the same weights
        llama = SteeredLlama(path, **{"n_ctx": 64, "n_batch": 64, **model_arguments})
        stack.callback(llama.close)
        evaluator = stack.enter_context(
            Evaluator(
                llama,
                task,
                scorer,
                benign=guards[0],
                neutral=guards[1],
                settings=settings,
                kept=kept,
                resume=resume and kept is not None and kept.exists(),
                metadata={"model": model_facts(facts), **(metadata or {})},
                progress=progress,
                on_work=on_work,
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
    weights: str | None = None,
    cap: float | None = None,
    rank: str = "rd",
) -> Steering:
    """Read a map (a file, or its name) or a bias file, and choose experts, as `Steering` says.

    `strength` is its `scale`. Without numbers the choice is the one that the map recommends, changed by what else is
    given. Raises FormatError, UsageError, also for a map that recommends none.
    """
    if map is None:
        given = (activate, deactivate, layers, strength, weights, cap)
        if reverse or rank != "rd" or any(value is not None for value in given):
            raise UsageError("the experts are chosen from a map; name it")
        return Steering.open(bias=bias)
    path = map_path(map)
    rule = {"scale": strength, "cap": cap, "weights": weights}
    choice: dict[str, Any] = {"activate": activate, "deactivate": deactivate, "layers": layers, **rule}
    # a False or "rd" is as if it was left out: a recommended choice may have other ones
    choice |= {"reverse": reverse or None, "rank": None if rank == "rd" else rank}
    if not any(choice[name] for name in ("activate", "deactivate")) and bias is None:
        opened = Steering.open(map_file=path).recommending(choice)
        if not opened.has_experts and activate is deactivate is None:
            raise UsageError(nothing_to_steer(path))
        return opened.with_choice(choice)[0]
    return Steering.open(
        map_file=path,
        bias=bias,
        activate=activate or 0,
        deactivate=deactivate or 0,
        reverse=reverse,
        layers=layers,
        scale=strength,
        weights=weights,
        cap=cap,
        rank=rank,
    )
