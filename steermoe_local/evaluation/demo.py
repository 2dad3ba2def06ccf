"""The whole pipeline on the embedded model: record, score, choose, steer, and measure on prompts it has not seen.

The embedded model is a positive control: its behaviours were tied to known experts when it was trained. So this shows
that detection finds experts and that steering moves behaviour, not that such experts arise without planting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..detection.recorder import record_counts
from ..errors import UsageError
from ..identity import ModelIdentity
from ..llama.steered_llama import SteeredLlama
from ..maps.expert_map import ExpertMap
from ..models.embedded import Behaviour, behaviours, embedded_model
from ..pairs.pairs import load_pairs
from ..steering.bias_file import BiasFile, write_bias
from ..steering.control_choices import random_signs
from .measuring.evaluator import Evaluator, EvaluatorSettings
from .measuring.measurements import Measurement
from .tasks.builtin import builtin_task
from .tasks.scorers import make_scorer
from .tasks.tasks import Scorer, Task

_MAX_TOKENS = 48

Signs = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Example:
    """A held-out prompt with its three replies."""

    prompt: str
    base: str
    toward: str
    away: str


@dataclass(frozen=True)
class BehaviourResult:
    """The figures of one behaviour; all rates are shares of replies that show its positive side."""

    name: str
    positive: str
    negative: str
    n: int
    base: float
    toward: float
    away: float
    random_mean: float  # mean rate over draws of as many random experts
    random_swing: float  # mean |rate of a draw - rate of its reverse|
    random_swing_max: float
    n_random: int
    max_abs_rd: float
    n_activate: int
    n_deactivate: int
    n_active: int  # after the cap of top-k a layer
    n_inactive: int
    planted_precision: float  # planted experts among as many of the top |RD| as were planted, sign included
    planted_n: int
    exact: dict[str, float]
    ill_formed: dict[str, float]
    neutral: dict[str, float]  # accuracy on neutral tasks
    examples: list[Example] = field(default_factory=list)

    @property
    def swing(self) -> float:
        """The effect: rate under positive steering minus rate under negative steering."""
        return self.toward - self.away


@dataclass(frozen=True)
class DemoResult:
    """The results of all behaviours, and the folder of their files."""

    model: ModelIdentity
    behaviours: list[BehaviourResult]
    n_neutral: int
    seed: int
    seconds: float
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        data: dict[str, Any] = asdict(self)
        data["folder"] = str(self.folder)
        for item, result in zip(data["behaviours"], self.behaviours, strict=True):
            item["swing"] = result.swing
        return data


def run_demo(
    folder: Path,
    *,
    n_prompts: int | None = 40,
    n_random: int = 5,
    seed: int = 0,
    n_threads: int | None = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> DemoResult:
    """Detect and steer every behaviour of the embedded model; measure with greedy decoding.

    Args:
        folder: where counts (.npz), maps (.json) and bias files (.gguf) go.
        n_prompts: held-out prompts of each behaviour and of the neutral tasks; None takes all.
        n_random: draws of as many random experts, each also reversed.
        seed: of the random experts.
        n_threads: threads of llama.cpp; None takes all cores. The model is too small to gain from a second one, and
            on a busy machine threads wait for each other.
        progress: called with (what, done, total).

    Raises UsageError and the errors of the steps.
    """
    if n_random < 1 or (n_prompts is not None and n_prompts < 1):
        raise UsageError("the demo needs at least one prompt and one random draw")
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    show = progress or (lambda *_: None)
    model = SteeredLlama(embedded_model(), n_ctx=64)
    settings = EvaluatorSettings(n_parallel=32, context={"n_threads": n_threads})
    neutral = _task("neutral", n_prompts)
    results = []
    for behaviour in behaviours():
        expert_map = _detect(behaviour, model, folder, n_threads, show)
        with Evaluator(
            model, *_task(behaviour.name, n_prompts), benign=neutral, settings=settings, progress=show
        ) as evaluator:
            results.append(_measure(behaviour, evaluator, expert_map, folder, n_random, seed))
    n_neutral = len(neutral[0].items)
    return DemoResult(expert_map.identity, results, n_neutral, seed, time.monotonic() - start, folder)


def n_answers(n_prompts: int | None, n_random: int) -> int:
    """Answers that `run_demo` has the model write."""
    n_neutral = len(_task("neutral", n_prompts)[0].items)
    n = sum(len(_task(behaviour.name, n_prompts)[0].items) for behaviour in behaviours())
    return n * (3 + 2 * n_random) + 3 * n_neutral * len(behaviours())


def _task(name: str, n_prompts: int | None) -> tuple[Task, Scorer]:
    task = replace(builtin_task(name).first(n_prompts), max_tokens=_MAX_TOKENS)
    return task, make_scorer(task.scorer, task.options)


def _detect(
    b: Behaviour, model: SteeredLlama, folder: Path, n_threads: int | None, show: Callable[[str, int, int], None]
) -> ExpertMap:
    """Record the pairs, score them, write counts and map."""
    counts = record_counts(
        model,
        load_pairs(b.pairs),
        behaviour=b.name,
        n_threads=n_threads,
        progress=lambda done, total: show(f"{b.name}: detect", done, total),
    )
    counts.save(folder / f"{b.name}.counts.npz")
    expert_map = ExpertMap.from_counts(counts, positive=b.positive, negative=b.negative, license="MIT")
    expert_map.save(folder / f"{b.name}.map.json")
    return expert_map


def _measure(
    b: Behaviour, evaluator: Evaluator, expert_map: ExpertMap, folder: Path, n_random: int, seed: int
) -> BehaviourResult:
    """Choose experts both ways, write the bias files, steer, and score."""
    identity = expert_map.identity
    biases: dict[str, BiasFile | None] = {"base": None}
    for name, reverse in (("toward", False), ("away", True)):
        signs = expert_map.choose(b.n_activate, b.n_deactivate, reverse=reverse)
        choice = {"activate": b.n_activate, "deactivate": b.n_deactivate, "reverse": reverse}
        provenance = {"behaviour": b.name, "map_sha256": expert_map.sha256, "choice": json.dumps(choice)}
        bias = biases[name] = BiasFile.from_signs(signs, identity, provenance=provenance)
        write_bias(bias, folder / f"{b.name}.{name}.gguf")
    found = dict(zip(biases, evaluator.measure(list(biases.values()), what=f"{b.name}: steer"), strict=True))
    toward = expert_map.choose(b.n_activate, b.n_deactivate)
    random = _random_rates(b, evaluator, expert_map, toward, n_random, seed)
    effects = np.abs(random[:, 0] - random[:, 1])
    return BehaviourResult(
        name=b.name,
        positive=b.positive,
        negative=b.negative,
        n=len(evaluator.task.items),
        base=found["base"].rate,
        toward=found["toward"].rate,
        away=found["away"].rate,
        random_mean=float(random.mean()),
        random_swing=float(effects.mean()),
        random_swing_max=float(effects.max()),
        n_random=n_random,
        max_abs_rd=float(np.abs(expert_map.rd).max()),
        n_activate=b.n_activate,
        n_deactivate=b.n_deactivate,
        n_active=int((toward > 0).sum()),
        n_inactive=int((toward < 0).sum()),
        planted_precision=_planted_precision(expert_map, b),
        planted_n=len(b.planted_positive | b.planted_negative),
        exact={name: _exact_rate(measured, evaluator.task) for name, measured in found.items()},
        ill_formed={name: measured.label_share("ill-formed") for name, measured in found.items()},
        neutral={name: float(measured.benign_values.mean()) for name, measured in found.items()},
        examples=_examples(found, evaluator.task),
    )


def _random_rates(
    b: Behaviour, evaluator: Evaluator, expert_map: ExpertMap, signs: Signs, n: int, seed: int
) -> npt.NDArray[np.float64]:
    """Rates [n, 2] of as many random experts, and of the same experts with the signs swapped."""
    rng = np.random.default_rng(seed)
    layers = tuple(int(layer) for layer in np.flatnonzero(np.abs(expert_map.rd).sum(axis=1)))
    drawn = [random_signs(signs, expert_map.identity, layers, rng) for _ in range(n)]
    biases = [BiasFile.from_signs(table, expert_map.identity) for one in drawn for table in (one, -one)]
    found = evaluator.measure(biases, benign=False, what=f"{b.name}: random experts")
    return np.array([measured.rate for measured in found]).reshape(n, 2)


def _exact_rate(measured: Measurement, task: Task) -> float:
    """Share of replies that are, word for word, what one of the sides expects."""
    replies = zip(measured.answers, task.items, strict=True)
    return float(np.mean([a.text.strip() in (item.extra["positive"], item.extra["negative"]) for a, item in replies]))


def _examples(found: Mapping[str, Measurement], task: Task, n: int = 2) -> list[Example]:
    """The first prompts whose reply steering flips."""
    replies = zip(task.items, *(found[name].answers for name in ("base", "toward", "away")), strict=True)
    return [
        Example(item.messages()[-1].content, *(answer.text.strip() for answer in answers))
        for item, *answers in replies
        if [answer.label for answer in answers[1:]] == ["positive", "negative"]
    ][:n]


def _planted_precision(expert_map: ExpertMap, behaviour: Behaviour) -> float:
    """Share of the top |RD| experts that were planted on the side that RD's sign says.

    As many are looked at as were planted, so that this is precision and recall in one.
    """
    n = len(behaviour.planted_positive | behaviour.planted_negative)
    hits = [
        (layer, expert) in (behaviour.planted_positive if rd > 0 else behaviour.planted_negative)
        for layer, expert, rd in expert_map.top(n)
    ]
    return float(np.mean(hits))
