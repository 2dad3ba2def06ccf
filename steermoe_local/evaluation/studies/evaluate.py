"""Evaluates a steering: rates unsteered and steered both ways, with intervals, controls and side effects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..._util.files import StrPath, parse_json, timestamp, tool_name
from ...errors import UsageError
from ...model_files.model_info import model_info
from ...models.local_models import resolve_model
from ...pairs.pairs import load_pairs
from ...steering.plan import AnySteering
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator, EvaluatorSettings
from ..measuring.json_values import plain
from ..measuring.measurements import UNSTEERED, Measurement
from ..measuring.opening import open_evaluator, open_steering, pairs_of, task_of
from ..measuring.side_effects import Fluency, fluency
from ..metrics.intervals import Interval, rate
from ..tasks.tasks import Task
from .controls.controls import CONTROLS, ControlResult, Controls, control_work, run_controls
from .signatures import Signature, Thresholds, effect_signatures, guard_signatures
from .steerings import EFFECT, NEGATIVE, STEERED, effects_of, has_reverse, side_biases, steering_facts

__all__ = ["Controls", "Evaluation", "Side", "evaluate", "run_evaluation"]


@dataclass(frozen=True)
class Side:
    """What was measured under one steering: "unsteered", "towards" (the map's positive side), "away" (its negative
    side), or "steered" by a bias file.

    `rate` is the task's: how far its positive side is shown. `labels` are shares of the answers. `n_active` and
    `n_inactive` experts were promoted and suppressed. `steered` and `benign_steered` are the shares of the answers, to
    the task and to benign prompts, in which a rule of a plan with conditions steered a token; None without conditions.
    """

    name: str
    key: str
    n_active: int
    n_inactive: int
    rate: Interval
    labels: Mapping[str, float]
    fluency: Fluency
    steered: float | None = None
    benign_steered: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`, with its provenance.

    `effects` are differences of rates in points of 1, over the same items: "towards" and "away" against unsteered, and
    "swing", towards less away; for a bias file "steered" alone. `measurements` hold each side's answers.
    """

    task: str
    positive: str
    negative: str
    sides: tuple[Side, ...]
    effects: Mapping[str, Interval]
    controls: tuple[ControlResult, ...]
    signatures: tuple[Signature, ...]
    steering: Mapping[str, Any]
    provenance: Mapping[str, Any]
    measurements: tuple[Measurement, ...] = field(repr=False, compare=False)

    @property
    def headline(self) -> tuple[str, Interval]:
        """Name and value of the effect that the controls are compared with: "swing", or the only one."""
        return list(self.effects.items())[-1]

    def side(self, name: str) -> Side:
        """The side of that name. Raises KeyError."""
        return {side.name: side for side in self.sides}[name]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the answers."""
        return plain(self, without=["measurements"])


_DEFAULT = Controls()


def evaluate(
    evaluator: Evaluator,
    steering: AnySteering,
    *,
    away: bool = True,
    controls: Controls | None = _DEFAULT,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    log: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a steering on an evaluator's task, with controls and side effects.

    "towards" is the map's positive side also if the steering is reversed. `away`: measure the reversed choice, too; a
    bias file, a preset and a plan have none. `controls` None: none are run, nor for a plan: it is measured as a whole.
    A plan of one steering is better given as that steering, and the plan as `EvaluatorSettings.placement`. `seed` is
    that of bootstraps and control draws. `log` is called with a line on what is being done.

    Raises UsageError (a steering that changes nothing), ChoiceError, ModelMismatchError, ModelError, NativeError, and
    what the scorer raises.
    """
    away = away and has_reverse(steering)
    biases = side_biases(steering, evaluator.identity, away)
    parts = {"sides": evaluator.work(list(biases.values()))}
    if controls is not None and isinstance(steering, Steering):
        parts[CONTROLS] = control_work(evaluator, steering, controls, both_ways=away)
    evaluator.workload.expect("eval", parts)
    measured = dict(zip(biases, evaluator.measure(list(biases.values()), what="sides"), strict=True))
    unsteered = measured[UNSTEERED]
    effects = effects_of(measured, seed)
    headline = list(effects)[-1]
    wanted = {name: -1 if name == NEGATIVE or (name == STEERED and _is_reversed(steering)) else 1 for name in effects}
    found: tuple[ControlResult, ...] = ()
    if controls is not None and isinstance(steering, Steering):
        found = run_controls(
            evaluator,
            steering.changed(reverse=False) if away else steering,
            controls,
            # run_controls itself changes the sign of a reversed steering's effect, but knows nothing of a bias file's
            real_effect=effects[headline].value * (1 if steering.reverse else wanted[headline]),
            both_ways=away,
            seed=seed,
            log=log,
        )
    signatures: list[Signature] = []
    for name, effect in effects.items():
        if name != EFFECT:
            signatures += guard_signatures(name, measured[name], unsteered, thresholds, seed)
        signatures += effect_signatures(
            name,
            effect,
            wanted=wanted[name],
            unsteered_rate=None if name == EFFECT else unsteered.rate,
            controls=found if name == headline else (),
            limits=thresholds,
        )
    return Evaluation(
        task=evaluator.task.name,
        positive=evaluator.task.positive,
        negative=evaluator.task.negative,
        sides=tuple(_side(name, found, unsteered, seed) for name, found in measured.items()),
        effects=effects,
        controls=found,
        signatures=tuple(signatures),
        steering=steering_facts(steering),
        provenance={
            **evaluator.metadata,
            "settings": evaluator.settings,
            "seed": seed,
            "controls": None if controls is None else {"n_draws": controls.n_draws, "kinds": list(controls.kinds)},
            "thresholds": asdict(thresholds or Thresholds()),
            "created": timestamp(),
            "tool": tool_name(),
        },
        measurements=tuple(measured.values()),
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
    weights: str | None = None,
    cap: float | None = None,
    rank: str = "rd",
    task: Task | StrPath | None = None,
    away: bool = True,
    controls: Controls | None = _DEFAULT,
    pairs: StrPath | None = None,
    seed: int = 0,
    settings: EvaluatorSettings | None = None,
    **evaluator_arguments: Any,
) -> Evaluation:
    """Evaluate a steering from files and names, like `steermoe eval`.

    `task` is by default that of the shipped or learnt map. `map` to `rank` are the arguments of `open_steering`,
    `pairs` is the file of pairs that the map was made from, `evaluator_arguments` are those of `open_evaluator`. Raises
    as these and `evaluate`.
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
        weights=weights,
        cap=cap,
        rank=rank,
    )
    steering.check(identity, str(path), settings is not None and settings.force)
    task = task or (None if map is None else task_of(steering.path))
    if task is None:
        raise UsageError("which task? name one: a file, or builtin:NAME")
    if controls is not None and controls.pairs is None:
        controls = replace(controls, pairs=pairs_of(steering) if pairs is None else load_pairs(pairs))
    with open_evaluator(path, task, settings=settings, **evaluator_arguments) as evaluator:
        return evaluate(evaluator, steering, away=away, controls=controls, seed=seed)


def _is_reversed(steering: AnySteering) -> bool:
    """Whether a bias file says that it was made by a reversed choice."""
    bias = steering.bias if isinstance(steering, Steering) else None
    made = "" if bias is None else bias.provenance.get("choice", "")
    try:
        choice = parse_json(made)
    except ValueError:
        return False
    return isinstance(choice, dict) and choice.get("reverse") is True


def _side(name: str, measured: Measurement, unsteered: Measurement, seed: int) -> Side:
    labels = sorted({answer.label for answer in measured.answers})
    return Side(
        name=name,
        key=measured.key,
        n_active=measured.n_experts[0],
        n_inactive=measured.n_experts[1],
        rate=rate(measured.values, seed),
        labels={label: measured.label_share(label) for label in labels},
        fluency=fluency(measured, unsteered),
        steered=measured.steered,
        benign_steered=measured.benign_steered,
    )
