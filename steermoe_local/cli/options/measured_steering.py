"""What a measurement steers by: the choice of experts that its options name, and where it is in force."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ...errors import UsageError
from ...identity import ModelIdentity
from ...models.shipped_maps import map_path
from ..output import warn
from .steering import SteeringFlags

if TYPE_CHECKING:
    from ...steering.plan import AnySteering, SteeringPlan
    from ...steering.steering import Steering


class MeasuredSteering:
    """The part of `EvaluationSetup` that is about steering; each is read when it is first used."""

    model: Path
    steering_flags: SteeringFlags
    where: str | None

    @property
    def identity(self) -> ModelIdentity:
        """The model's. Raises ModelError for one without experts."""
        raise NotImplementedError

    @cached_property
    def chosen(self) -> AnySteering:
        """What the flags choose, checked against the model. Raises UsageError when they name nothing."""
        found = self.steering_flags.open(self.identity, self.model)
        if found is None:
            raise UsageError("nothing to steer by; give --map MAP, --bias FILE, or rules of a plan with --steer")
        built = found.build(self.identity)  # fails now if the model cannot be steered so
        if built is None and self.steering_flags.is_plan:
            raise UsageError(
                f"{found.name}: its rules steer nothing, so nothing can be measured; let one name a map or bias file"
            )
        return found

    @cached_property
    def steering(self) -> Steering:
        """The choice of experts that is measured; of a plan that of all its rules, in force at the `placement`.

        Raises UsageError for a plan of several choices, and when there is none.
        """
        plan = self._plan
        if plan is None:
            return cast("Steering", self.chosen)
        if plan.single is None:
            n = len(plan.steerings)
            raise UsageError(
                f"{plan.name}: its rules steer by {n or 'no'} choices of experts, and this command measures one; "
                "steermoe eval measures such a plan as a whole"
            )
        return plan.single

    @property
    def whole(self) -> AnySteering:
        """The choice of experts that is measured, or a plan of several. Raises UsageError when there is none."""
        return self._plan if self._plan is not None and self._plan.single is None else self.steering

    @cached_property
    def placement(self) -> SteeringPlan | None:
        """Where all that is measured is in force: where a plan of one choice steers, or --where; None: everywhere."""
        from ...evaluation.measuring.plans import open_placement
        from ...steering.plan_text import parse_where

        if self.where is not None and self._plan is not None:
            raise UsageError("--where and the rules of a plan both say where; give one of them")
        if self.where is not None:
            placement = open_placement(parse_where(self.where))
            warn(*placement.check(self.identity, str(self.model), self.steering_flags.force))
            return placement
        return self._plan if self._plan is not None and self._plan.single is not None else None

    @cached_property
    def _plan(self) -> SteeringPlan | None:
        from ...steering.plan import SteeringPlan

        chosen = self.chosen if self.steering_flags.is_plan else None
        return chosen if isinstance(chosen, SteeringPlan) else None

    @cached_property
    def map_steering(self) -> Steering:
        """The map alone, for commands that choose the numbers of experts themselves; of a plan that of all its rules.

        The numbers are those of the flags, else those that the map recommends, else 0; all else is as the flags say.
        Raises UsageError for a bias file.
        """
        flags = self.steering_flags
        if self._plan is not None and self.steering.expert_map is not None:
            return self.steering
        if "map" not in flags.source:
            raise UsageError("the experts are chosen from a map; give --map MAP")
        from ...steering.steering import Steering

        steering = Steering.open(map_file=map_path(flags.source["map"]))
        numbers = {"activate": flags.activate, "deactivate": flags.deactivate}
        if flags.activate is flags.deactivate is None and steering.recommended is not None:
            numbers = {name: steering.recommended.choice.get(name) for name in numbers}
        steering = steering.changed(
            **{name: number or 0 for name, number in numbers.items()},
            reverse=flags.reverse,
            layers=flags.layers,
            rank=flags.rank,
            **flags.rule.fields,
        )
        warn(*steering.check(self.identity, str(self.model), flags.force))
        return steering
