"""Finding a map or bias file by what a person calls it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..._util.closest import did_you_mean
from ..._util.regular_files import open_regular
from ...errors import SteerMoEError, UsageError
from ...evaluation.measuring.plans import beside, is_bias_file, is_plan_file, open_plan, plan_name
from ...identity import ModelIdentity
from ...maps.ranks import ranks_of
from ...models.shipped_maps import known_maps, shipped_map
from ...models.user_maps import MAP_FILE, maps_in
from ...steering.plan import AnySteering, SteeringPlan
from ...steering.plan_file import read_plan
from ...steering.plan_rules import EVERYWHERE, NONE, PHASES, Where
from ...steering.plan_text import parse_rule, split_rules
from ...steering.steering import Steering
from ..options.system_text import is_text

_HEAD = 1 << 16  # bytes
# A place in the text, a word with a colon that may be a misspelt one, or a name and a choice of experts behind it.
_RULES = re.compile(
    rf"(?:{'|'.join((*PHASES, EVERYWHERE))})[\s\[:]"
    r"|[a-z]{2}[^:/\\]*+:(?:\s|$)"
    r"|(?:\"[^\"]*+\"|'[^']*+'|[^\s\"':]++)\s++(?:[+-]\d|reverse\b|[a-z]++=)"
)


class MapFinder:
    """Maps, bias files and plans by path, or by name: of given folders, of the user's maps folder, and shipped ones.

    Where several have a name, the first folder's counts, and in a folder a map before a plan.
    """

    def __init__(self, folders: Sequence[Path], identity: ModelIdentity, where: Path, force: bool = False) -> None:
        """`identity` is that of the model in `where`; files of other models are not offered."""
        self._folders = folders
        self._identity = identity
        self._where = where
        self._force = force
        self._fitting: dict[str, Path] | None = None

    def names(self) -> dict[str, Path]:
        """The files that fit the model, by name; read once."""
        if self._fitting is None:
            self._fitting = {name: path for name, path in self._named().items() if self._fits(path)}
        return self._fitting

    def open(self, name: str, before: AnySteering | None = None) -> tuple[AnySteering, list[str]]:
        """The steering of that name or path, or of that text of rules, and warnings.

        A map is taken with the choice that it recommends. One that recommends none has rule and layers of `before`, and
        so rank and weights, if the map has their data, and numbers of experts if somebody chose them for `before`; else
        none.

        Raises UsageError for a name that nothing has and for bad rules, FormatError, ModelMismatchError.
        """
        steering: AnySteering
        warnings: list[str] = []
        path = None if self._is_rules(name) else self.find(name)
        if path is None:
            texts = split_rules(name)
            rules = [parse_rule(text, number, colon=False) for number, text in enumerate(texts, 1)]
            steering = alone(open_plan(rules, find=self.find, tell=_to(warnings)))
        elif is_plan_file(path):
            steering = open_plan(path, find=self.find, tell=_to(warnings))
        elif is_bias_file(path):
            steering = Steering.open(bias=path)
        else:
            steering = Steering.open(map_file=path).recommending()
            if steering.recommended is None and isinstance(before, Steering) and before.expert_map is not None:
                steering = _with_choice_of(before, steering)
        return steering, warnings + steering.check(self._identity, str(self._where), self._force)

    def _is_rules(self, text: str) -> bool:
        """Whether a text is one of rules, and not a name or path, which come first."""
        if os.path.isfile(os.path.expanduser(text)) or text in self._named():
            return False
        return _RULES.match(text) is not None or len(split_rules(text)) > 1

    def find(self, name: str) -> Path:
        """The file of a name or path. Raises UsageError."""
        path = os.path.expanduser(name)
        if os.path.isfile(path):
            return Path(path)
        if os.path.isfile(Path(path) / MAP_FILE) and os.path.basename(path) != path:
            return Path(path) / MAP_FILE
        named = self._named()
        if found := named.get(name) or shipped_map(name):
            return found
        hint = did_you_mean(name, self.names()) or "; give the path of a map or bias file"
        if name == NONE:
            hint = "; /steer off steers by nothing"
        raise UsageError(f"{name}: no such file, and no map of that name for this model{hint}")

    def _named(self) -> dict[str, Path]:
        named = known_maps()
        for folder in reversed(self._folders):
            with contextlib.suppress(OSError):  # gone, or not to be read: its names are not there
                found = sorted(path for path in folder.iterdir() if is_text(path.name))  # others no chat can keep
                plans = {plan_name(path): path for path in found if is_plan_file(path)}
                rest = [path for path in found if path.suffix in (".json", ".gguf") and not is_plan_file(path)]
                learnt = {name: path for name, path in maps_in(folder).items() if path.name == MAP_FILE}
                named |= plans | {path.stem: path for path in rest} | learnt
        return named

    def _fits(self, path: Path) -> bool:
        """Is the model's router hash in the file's head? Enough for a list of names; opening it looks closer."""
        if is_plan_file(path):
            with contextlib.suppress(SteerMoEError):
                return all(self._is_fitting(path, rule.name) for rule in read_plan(path) if rule.name is not None)
            return False
        try:
            with open_regular(path) as file:
                return self._identity.router_sha256.encode() in file.read(_HEAD)
        except OSError:
            return False

    def _is_fitting(self, plan: Path, name: str) -> bool:
        """Does the map that a plan names fit?"""
        found = beside(plan, self.find)(name)
        return not is_plan_file(found) and self._fits(found)


def _with_choice_of(before: Steering, steering: Steering) -> Steering:
    """A map's steering by the choice of another map, as far as it has the data, without what that one recommends."""
    if before.values:
        return steering
    there = () if steering.expert_map is None else ranks_of(steering.expert_map)
    chosen = before.recommended is None or bool(before.recommended.values)
    if not chosen:
        own = replace(before, activate=0, deactivate=0).recommending()
        chosen = (own.activate, own.deactivate) != (before.activate, before.deactivate)
    return steering.changed(
        epsilon=before.epsilon,
        layers=before.layers,
        **before.rule.fields | {"weights": before.weights if before.weights in there else None},
        rank=before.rank if before.rank in there else "rd",
        activate=before.activate if chosen else 0,
        deactivate=before.deactivate if chosen else 0,
    )


def alone(plan: SteeringPlan) -> AnySteering:
    """The steering of a plan that steers all tokens alike, whose numbers can be changed; else the plan."""
    first = plan.rules[0]
    return first.steering if first.steering is not None and first.spec.where == Where() else plan


def _to(warnings: list[str]) -> Callable[..., None]:
    """A function that keeps warnings."""
    return lambda *lines: warnings.extend(lines)
