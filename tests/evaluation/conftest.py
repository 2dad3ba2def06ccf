"""Fixtures that several modules on evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.evaluation.measuring.evaluator import Evaluator
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import NeutralText, load_neutral_text
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import Scorer, Task
from steermoe_local.models.embedded import data_folder
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.steering import Steering
from tests.support.evaluators import SETTINGS, N
from tests.support.figures import checked_figures
from tests.support.transfer_run import TransferRun, run_transfer


@pytest.fixture(scope="session", autouse=True)
def _no_legend_lies_on_data() -> Iterator[None]:
    with checked_figures():
        yield


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1, n_threads_batch=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def biases() -> list[BiasFile | None]:
    """Unsteered, positive and negative steering, and a soft rule."""
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    choices = (steering, steering.changed(reverse=True), steering.changed(scale=1.5))
    return [None, *(choice.build() for choice in choices)]


@pytest.fixture(scope="module")
def task() -> Task:
    return builtin_task("digits-words").first(N)


@pytest.fixture(scope="module")
def benign() -> tuple[Task, Scorer]:
    task = replace(builtin_task("neutral"), scorer="refusal").first(2)
    return task, make_scorer("refusal")


@pytest.fixture(scope="module")
def neutral() -> NeutralText:
    text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    return replace(text, passages=text.passages[:5])


@pytest.fixture
def open_evaluator(llama: SteeredLlama, task: Task) -> Iterator[Callable[..., Evaluator]]:
    """Evaluators on the embedded model, closed behind the test."""
    opened: list[Evaluator] = []

    def make(task: Task = task, scorer: Scorer | None = None, **options: Any) -> Evaluator:
        scorer = scorer or make_scorer(task.scorer, task.options)
        opened.append(Evaluator(llama, task, scorer, **{"settings": SETTINGS} | options))
        return opened[-1]

    yield make
    for evaluator in opened:
        evaluator.__exit__()


@pytest.fixture(scope="session")
def transferred(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferRun:
    """A whole transfer; tests leave its files alone."""
    return run_transfer(tiny_path, tmp_path_factory.mktemp("models"))
