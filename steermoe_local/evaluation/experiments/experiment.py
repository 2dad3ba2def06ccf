"""The setup of an experiment, what it measures in both directions, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...errors import UsageError
from ...pairs.pairs import Pair
from ...steering.bias_file import BiasFile
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator, EvaluatorSettings
from ..measuring.json_values import plain
from ..measuring.measurements import Measurement
from ..measuring.side_effects import fluency
from ..metrics.formatting import number, percent
from ..metrics.intervals import Interval, difference, rate
from ..reports.document import Table, escape, sections
from ..studies.controls.controls import CONTROLS, ControlResult, Controls, control_work, run_controls
from ..tasks.tasks import Scorer, Task

Verdict = Literal["for", "against", "open"]
Found = tuple[str, Verdict, Sequence[Table], Mapping[str, Any]]
"""What the function of an experiment returns: finding, verdict, tables, figures."""
Biases = tuple[BiasFile | None, BiasFile | None]
"""Of the positive and of the negative steering."""

GUARDS = ("side", "experts + / -", "rate", "ill-formed", "perplexity ratio", "KL", "benign refused")
"""Header of `side_row`."""


def text_cells(found: Measurement, base: Measurement) -> tuple[str, str]:
    """Perplexity ratio and KL on the neutral text."""
    guards = fluency(found, base)
    return number(guards.perplexity_ratio, 3), number(guards.kl, 4)


def side_row(name: str, found: Measurement, base: Measurement) -> tuple[str, ...]:
    """Rate and side effects of one steering, under `GUARDS`."""
    n_active, n_inactive = found.n_experts
    refused = str(rate(found.benign_values)) if found.benign else "-"
    shares = (str(rate(found.values)), percent(found.label_share("ill-formed")))
    return (name, f"{n_active} / {n_inactive}", *shares, *text_cells(found, base), refused)


@dataclass(frozen=True)
class Sides:
    """A choice of experts, measured unsteered and in both directions; `seed` is the bootstrap's."""

    unsteered: Measurement
    positive: Measurement
    negative: Measurement
    seed: int

    @property
    def effect(self) -> Interval:
        """Rate under positive steering - rate under negative steering, over the same items."""
        return difference(self.positive.values, self.negative.values, self.seed)

    @property
    def named(self) -> dict[str, Measurement]:
        """The three measurements by their names in files and reports."""
        return {"unsteered": self.unsteered, "towards": self.positive, "away": self.negative}

    def table(self) -> Table:
        """Rates and side effects of the three."""
        rows = [side_row(name, found, self.unsteered) for name, found in self.named.items()]
        return Table("Rates and guards", GUARDS, tuple(rows), "rate: share on the positive side, 95% interval")

    def figures(self) -> dict[str, Any]:
        """Rates and effect as plain JSON values."""
        return {"rates": {name: found.rate for name, found in self.named.items()}, "swing": asdict(self.effect)}


@dataclass(frozen=True)
class ExperimentSetup:
    """What an experiment works with: an evaluator on the behaviour's task, and a choice of experts from its map.

    `pairs` are those that the map was made from. `ability` is a task that the steering should leave alone, measured
    with `settings`. `recording`: arguments of `record_counts` that differ from the evaluator's. `log` is called with a
    line on what is being done.

    Raises UsageError for a bias file, a preset and a reversed choice: experiments choose from a map, in both
    directions.
    """

    evaluator: Evaluator
    steering: Steering
    pairs: Sequence[Pair] | None = None
    ability: tuple[Task, Scorer] | None = None
    settings: EvaluatorSettings | None = None
    n_draws: int = 20
    seed: int = 0
    recording: Mapping[str, Any] | None = None
    log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if self.steering.expert_map is None:
            raise UsageError(f"{self.steering.name}: experiments choose experts from a map; give one with --map MAP")
        if self.steering.reverse or self.steering.preset:
            raise UsageError("experiments steer both ways with numbers of their own; leave out reverse and preset")

    def biases(self, steering: Steering, reverse: Steering | None = None) -> Biases:
        """Build a choice and its reverse. Raises ChoiceError."""
        identity = self.evaluator.identity
        return steering.build(identity), (reverse or steering.changed(reverse=True)).build(identity)

    def measure(self, biases: Mapping[str, Biases], what: str, *, benign: bool = False) -> dict[str, Sides]:
        """Measure choices by name, all in one call."""
        flat = [bias for both in biases.values() for bias in both]
        unsteered, *found = self.evaluator.measure([None, *flat], benign=benign, what=what)
        return {
            name: Sides(unsteered, found[2 * index], found[2 * index + 1], self.seed)
            for index, name in enumerate(biases)
        }

    def compare(
        self, kinds: Sequence[str], steering: Steering, reverse: Steering | None = None
    ) -> tuple[Sides, dict[str, ControlResult]]:
        """Measure one choice and its controls by kind. Raises UsageError for one without experts."""
        biases = self.biases(steering, reverse)
        if biases[0] is None:
            raise UsageError(f"{steering.name}: chooses no experts; give --activate N, --deactivate N or both")
        controls = Controls(self.n_draws, kinds, self.pairs, self.recording)
        work = {"steering": self.evaluator.work([None, *biases])}
        work[CONTROLS] = control_work(self.evaluator, steering, controls)
        self.evaluator.workload.expect("experiment", work)
        sides = self.measure({"": biases}, "steering", benign=True)[""]
        found = run_controls(
            self.evaluator,
            steering,
            controls,
            real_effect=sides.effect.value,
            reverse=reverse,
            seed=self.seed,
            log=self.log,
        )
        return sides, {control.kind: control for control in found}


@dataclass(frozen=True)
class ExperimentResult:
    """The result of an experiment.

    `verdict`: do the figures speak "for" what docs/experiments.md expects of a map that works, or "against"? `finding`
    is the answer in a sentence, made of the `figures` (plain JSON values), which `tables` show in full.
    """

    name: str = field(metadata={"json": "experiment"})
    question: str
    finding: str
    verdict: Verdict
    figures: Mapping[str, Any]
    tables: tuple[Table, ...]
    metadata: Mapping[str, Any] = field(metadata={"json": "about"})

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def markdown(self, command: str = "", pictures: Sequence[str] = ()) -> str:
        """A short report; `command` makes it again, `pictures` are names of files in the same folder."""
        lines = [f"# {self.name}", "", escape(self.question), "", f"**{escape(self.finding)}**", ""]
        lines += [*sections(self.tables, pictures), "## Where it comes from", ""]
        lines += ["```sh", command, "```", ""] if command else []
        origin = [self.metadata.get(name) for name in ("tool", "created")]
        digests = [f"{name} {str(self.metadata.get(name))[:12]}" for name in ("map_sha256", "task_sha256")]
        words = [*(str(value) for value in origin if value), f"seed {self.metadata.get('seed')}", *digests]
        return "\n".join([*lines, escape(", ".join(words)) + ".", ""])
