"""Does a steering do what it should? Unsteered, towards and away, with intervals, controls, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..._util.files import parse_json, timestamp, tool_name
from ...errors import UsageError
from ...pairs.pairs import Pair
from ...steering.bias_file import BiasFile
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator
from ..measuring.measurements import UNSTEERED, Measurement
from ..measuring.side_effects import Fluency, fluency
from ..metrics.intervals import Interval, difference, rate
from .control_runs import ALL, ControlResult, run_controls
from .signatures import Signature, Thresholds, effect_signatures, guard_signatures

__all__ = ["Controls", "Evaluation", "Side", "evaluate", "has_reverse", "side_biases", "steering_facts"]

TOWARDS, AWAY, STEERED = "towards", "away", "steered"


@dataclass(frozen=True)
class Controls:
    """Which controls are run beside a steering: `kinds` of `control_runs.ALL`, `n_draws` of each random kind.

    `pairs` are those that the map was made from, for the maps of shuffled and of superficial pairs. `recording`:
    arguments of `recorder.record_counts` that differ from the evaluator's.
    """

    n_draws: int = 20
    kinds: Sequence[str] = ALL
    pairs: Sequence[Pair] | None = None
    recording: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Side:
    """What one steering gave: "unsteered", "towards" (the map's positive side), "away", or "steered" by a bias file.

    `rate` is the task's: how far its positive side is shown. `labels` are shares of the answers. `n_active` and
    `n_inactive` experts were promoted and suppressed.
    """

    name: str
    key: str
    n_active: int
    n_inactive: int
    rate: Interval
    labels: Mapping[str, float]
    fluency: Fluency

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """The answer, and where it comes from.

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
        """The effect that the controls are compared with: the swing, or the only one."""
        name = list(self.effects)[-1]
        return name, self.effects[name]

    def side(self, name: str) -> Side:
        """The side of that name. Raises KeyError."""
        for side in self.sides:
            if side.name == name:
                return side
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the answers."""
        return {
            "task": self.task,
            "positive": self.positive,
            "negative": self.negative,
            "sides": [side.to_dict() for side in self.sides],
            "effects": {name: asdict(effect) for name, effect in self.effects.items()},
            "controls": [control.to_dict() for control in self.controls],
            "signatures": [signature.to_dict() for signature in self.signatures],
            "steering": dict(self.steering),
            "provenance": dict(self.provenance),
        }


_DEFAULT = Controls()


def evaluate(
    evaluator: Evaluator,
    steering: Steering,
    *,
    away: bool = True,
    controls: Controls | None = _DEFAULT,
    seed: int = 0,
    thresholds: Thresholds | None = None,
    log: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a steering on an evaluator's task, with its reverse, controls and guards.

    "towards" is the map's positive side also if the steering is reversed. A bias file and a preset have no reverse.
    `controls` None: none are run. `seed` is that of bootstraps and control draws. `log` gets lines on what is done.

    Raises UsageError (a steering that changes nothing), ChoiceError, ModelMismatchError, ModelError, NativeError, and
    what the scorer raises.
    """
    away = away and has_reverse(steering)
    biases = side_biases(evaluator, steering, away)
    measured = dict(zip(biases, evaluator.measure(list(biases.values()), what="eval"), strict=True))
    unsteered = measured[UNSTEERED]
    effects = {
        name: difference(measurement.values, unsteered.values, seed)
        for name, measurement in measured.items()
        if name != UNSTEERED
    }
    if away:
        effects["swing"] = difference(measured[TOWARDS].values, measured[AWAY].values, seed)
    headline = list(effects)[-1]
    wanted = {name: -1 if name == AWAY or (name == STEERED and _is_reversed(steering)) else 1 for name in effects}
    found: tuple[ControlResult, ...] = ()
    if controls is not None:
        found = run_controls(
            evaluator,
            steering.changed(reverse=False) if away else steering,
            # of a reversed steering run_controls turns the sign itself; of a bias file nobody else knows it
            real_effect=effects[headline].value * (1 if steering.reverse else wanted[headline]),
            away=away,
            n_draws=controls.n_draws,
            kinds=controls.kinds,
            pairs=controls.pairs,
            recording=controls.recording,
            seed=seed,
            log=log,
        )
    signatures: list[Signature] = []
    for name, effect in effects.items():
        is_swing = name not in measured
        if not is_swing:
            signatures += guard_signatures(name, measured[name], unsteered, thresholds, seed)
        signatures += effect_signatures(
            name,
            effect,
            wanted=wanted[name],
            unsteered_rate=None if is_swing else unsteered.rate,
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


def has_reverse(steering: Steering) -> bool:
    """Can it be turned around? Not a bias file, and a preset never steers away from its behaviour."""
    return steering.expert_map is not None and not steering.preset


def side_biases(evaluator: Evaluator, steering: Steering, away: bool) -> dict[str, BiasFile | None]:
    """What steers each side by its name, the unsteered model first; `away`: also the reverse.

    Raises UsageError for a steering that changes nothing, ChoiceError for what the model cannot carry out.
    """
    steered = steering.build(evaluator.identity)
    if steered is None:
        raise UsageError(f"{steering.name}: steers nothing; choose experts with activate, deactivate or both")
    if steering.expert_map is None:
        return {UNSTEERED: None, STEERED: steered}
    other = steering.changed(reverse=not steering.reverse).bias_file(evaluator.identity) if away else None
    towards, back = (other, steered) if steering.reverse else (steered, other)
    found = {UNSTEERED: None, TOWARDS: towards, AWAY: back}
    return {name: bias for name, bias in found.items() if name == UNSTEERED or bias is not None}


def _is_reversed(steering: Steering) -> bool:
    """Was the bias file made to steer away?"""
    made = steering.bias.provenance.get("choice", "") if steering.bias is not None else ""
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
        n_active=0 if measured.bias is None else measured.bias.n_active,
        n_inactive=0 if measured.bias is None else measured.bias.n_inactive,
        rate=rate(measured.values, seed),
        labels={label: measured.label_share(label) for label in labels},
        fluency=fluency(measured, unsteered),
    )


def steering_facts(steering: Steering) -> dict[str, Any]:
    """The choice without the folders of the person who made it."""
    facts = steering.to_dict()
    for kind in ("map", "bias"):
        if facts.get(kind):
            facts[kind] = Path(facts[kind]).name
    return facts
