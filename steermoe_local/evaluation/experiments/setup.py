"""What recipes work with, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import UsageError
from ...pairs.pairs import Pair
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator, EvaluatorSettings
from ..reports.report import Table, escape, markdown_table
from ..studies.control_runs import ControlResult, run_controls
from ..tasks.tasks import Scorer, Task
from .wording import Sides, Verdict

__all__ = ["Answer", "Experiment", "Lab"]

Answer = tuple[str, Verdict, Sequence[Table], Mapping[str, Any]]
"""What a recipe gives: finding, verdict, tables, figures."""


@dataclass(frozen=True)
class Lab:
    """What a recipe works with: an evaluator on the behaviour's task, and a choice of experts from its map.

    `pairs` are those that the map was made of. `ability` is a task that the steering should leave alone, measured with
    `settings`. `recording`: arguments of `recorder.record_counts` that differ from the evaluator's. `log` gets a line
    on what is being done.

    Raises UsageError for a bias file, a preset and a reversed choice: recipes choose from a map, and both ways.
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
        """Check the steering."""
        if self.steering.expert_map is None:
            raise UsageError(f"{self.steering.name}: experiments choose experts from a map; give one with --map MAP")
        if self.steering.reverse or self.steering.preset:
            raise UsageError("experiments steer both ways with numbers of their own; leave out reverse and preset")

    def sides(self, steering: Steering, reverse: Steering | None = None, *, text: bool = True) -> Sides:
        """Measure a choice unsteered, towards and away."""
        reverse = reverse or steering.changed(reverse=True)
        biases = [None, steering.build(self.evaluator.identity), reverse.build(self.evaluator.identity)]
        if biases[1] is None:
            raise UsageError(f"{steering.name}: chooses no experts; give --activate N, --deactivate N or both")
        found = self.evaluator.measure(biases, text=text, benign=text, what="steering")
        return Sides(found[0], found[1], found[2], self.seed)

    def controls(
        self, kinds: Sequence[str], steering: Steering, real: float, reverse: Steering | None = None
    ) -> dict[str, ControlResult]:
        """Controls of its swing, by kind."""
        found = run_controls(
            self.evaluator,
            steering,
            real_effect=real,
            reverse=reverse,
            n_draws=self.n_draws,
            kinds=kinds,
            pairs=self.pairs,
            recording=self.recording,
            seed=self.seed,
            log=self.log,
        )
        return {control.kind: control for control in found}


@dataclass(frozen=True)
class Experiment:
    """What a recipe found.

    `verdict`: do the figures speak "for" what docs/experiments.md expects of a map that works, or "against"? `finding`
    is the answer in a sentence, made of the `figures` (plain JSON values), which `tables` show in full.
    """

    name: str
    question: str
    finding: str
    verdict: Verdict
    tables: tuple[Table, ...]
    figures: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "experiment": self.name,
            "question": self.question,
            "finding": self.finding,
            "verdict": self.verdict,
            "figures": dict(self.figures),
            "tables": [asdict(table) for table in self.tables],
            "about": dict(self.about),
        }

    def markdown(self, command: str = "", pictures: Sequence[str] = ()) -> str:
        """A short report; `command` makes it again, `pictures` are names of files beside it."""
        lines = [f"# {self.name}", "", escape(self.question), "", f"**{escape(self.finding)}**", ""]
        lines += [f"![{picture}]({picture})\n" for picture in pictures]
        for table in self.tables:
            lines += [f"## {escape(table.title)}", "", markdown_table(table), ""]
        lines += ["## Where it comes from", ""]
        lines += ["```sh", command, "```", ""] if command else []
        origin = [self.about.get(name) for name in ("tool", "created")]
        digests = [f"{name} {str(self.about.get(name))[:12]}" for name in ("map_sha256", "task_sha256")]
        words = [*(str(value) for value in origin if value), f"seed {self.about.get('seed')}", *digests]
        return "\n".join([*lines, escape(", ".join(words)) + ".", ""])
