"""A transfer of the embedded model over two quantizations, which several modules look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steermoe_local import ExpertMap, load_pairs, record_counts
from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.opening import open_evaluator
from steermoe_local.evaluation.metrics.intervals import Interval
from steermoe_local.evaluation.studies.transfer.results import Transfer
from steermoe_local.evaluation.studies.transfer.transfer import OpenEvaluator, transfer
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import NeutralText, load_neutral_text
from steermoe_local.models.embedded import behaviour, data_folder
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.steering import Steering

QUANTS = ("Q8_0", "Q2_K")
N_ITEMS, N_PAIRS, N_TEXTS = 6, 10, 15
BEHAVIOUR = behaviour("digits-words")


@dataclass
class TransferRun:
    """A whole transfer, its arguments, and the maps that it made."""

    found: Transfer
    folder: Path
    maps: dict[str, ExpertMap]
    steering: Steering
    pairs: list[Pair]
    neutral: NeutralText
    evaluators: OpenEvaluator

    def path(self, name: str) -> Path:
        return self.folder / f"tiny-moe-{name}.gguf"


def run_transfer(model: Path, folder: Path) -> TransferRun:
    """By a map of the few pairs, so that the base's own map is the same."""
    pairs = list(load_pairs(BEHAVIOUR.pairs))[:N_PAIRS]
    text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    neutral = replace(text, passages=text.passages[:N_TEXTS])
    made = ExpertMap.from_counts(record_counts(model, pairs, n_threads=1), "digits-words")
    steering = Steering("digits-words", expert_map=made, activate=2, deactivate=2)
    task = builtin_task("digits-words").first(N_ITEMS)
    settings = EvaluatorSettings(n_parallel=8, context={"n_threads": 1})
    arguments: dict[str, Any] = {"neutral": neutral, "benign": None, "settings": settings, "n_threads": 1}

    def evaluators(path: Path, _: str) -> Any:
        return open_evaluator(path, task, **arguments)

    maps: dict[str, ExpertMap] = {}
    options: dict[str, Any] = {"quants": QUANTS, "pairs": pairs, "n_threads": 1, "on_map": maps.__setitem__}
    found = transfer(model, steering, evaluators, folder=folder, **options)
    return TransferRun(found, folder, maps, steering, pairs, neutral, evaluators)


def interval(value: float, half: float = 0.1) -> Interval:
    return Interval(value, value - half, value + half, 100, "newcombe")
