"""Opens steering plans: rules in their text or object form, or a file of them, and what their names stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._util.files import StrPath
from ..._util.regular_files import open_regular
from ...errors import UsageError
from ...maps.expert_map import ExpertMap
from ...models.shipped_maps import map_path, recommended_numbers
from ...steering.plan import SteeringPlan
from ...steering.plan_file import SUFFIXES, read_plan
from ...steering.plan_rules import RuleSpec, Where
from ...steering.steering import Steering

Find = Callable[[str], Path]
"""The file of a map or bias file by what a rule calls it. Raises UsageError for a name that nothing has."""


def plan_name(path: Path) -> str:
    """The name of a plan's file: careful for maps/careful.plan.json."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    return path.name.removesuffix(suffix) or path.name


def is_plan_file(path: Path) -> bool:
    """Whether a file's name is that of a plan."""
    return path.name.endswith(SUFFIXES)


def is_bias_file(path: Path) -> bool:
    """By its first bytes: GGUF, or JSON as a map is."""
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # reading it as a map says why


def beside(plan: Path, find: Find = map_path) -> Find:
    """Where the names of a plan's file are looked for: in the file's own folder, else as `find` does."""

    def found(name: str) -> Path:
        at = plan.parent / os.path.expanduser(name)
        for path in (at, Path(f"{at}.json"), Path(f"{at}.gguf")):
            if os.path.isfile(path):
                return path
        return find(name)

    return found


def open_plan(
    rules: Sequence[RuleSpec | str | Mapping[str, Any]] | StrPath,
    *,
    name: str | None = None,
    find: Find = map_path,
    tell: Callable[..., None] = lambda *warnings: None,
) -> SteeringPlan:
    """Read a plan, its rules or the file that has them, and look up what the rules name.

    Names are those of maps and bias files as the command line takes them: paths, and the maps that ship with the
    package; in a file also `NAME`, `NAME.json` and `NAME.gguf` beside it, which come first. `find` looks up others. A
    shipped map without numbers gets those of its card. `name` is shown to users. `tell` is called with warnings.

    Raises UsageError, FormatError, which name the rule.
    """
    path: Path | None = None
    if isinstance(rules, (str, os.PathLike)):
        path = Path(rules)
        rules, name, find = read_plan(path), name or plan_name(path), beside(path, find)
    files = _Files(find, tell)
    return SteeringPlan.open(rules, files.steering, files.expert_map, name=name or "plan", path=path)


def open_placement(where: Where, steering: Steering, *, find: Find = map_path) -> SteeringPlan:
    """A plan that steers in one window, for `EvaluatorSettings.placement`. Raises as `open_plan`."""
    files = _Files(find, lambda *warnings: None)
    return SteeringPlan.open([RuleSpec(where, steering.name)], lambda name, choice: steering, files.expert_map)


class _Files:
    """The maps and bias files that the rules of a plan name, each read once."""

    def __init__(self, find: Find, tell: Callable[..., None]) -> None:
        self._find, self._tell = find, tell
        self._opened: dict[Path, Steering] = {}

    def steering(self, name: str, choice: Mapping[str, Any]) -> Steering:
        """The steering of a rule. Raises UsageError, FormatError."""
        opened = self._open(name)
        if opened.expert_map is None or opened.path is None:
            return opened.with_choice(choice)[0]
        given = dict(choice)
        if not {"activate", "deactivate", "preset"} & given.keys():
            numbers = recommended_numbers(opened.path)
            if numbers is None:
                raise UsageError(
                    f"{name}: how many experts? write +N for those to promote (RD > 0), -N for those to suppress "
                    f"(RD < 0), like {name} +8 -8"
                )
            given["activate"], given["deactivate"] = numbers
        if "preset" not in given and not given.get("activate") and not given.get("deactivate"):
            raise UsageError(f"{name}: no experts, so nothing steers there; write +N or -N, or none in the map's place")
        steering, warnings = opened.with_choice(given)
        self._tell(*warnings)
        return steering

    def expert_map(self, name: str) -> tuple[ExpertMap, Path | None]:
        """The map that a condition looks at. Raises UsageError, FormatError."""
        opened = self._open(name)
        if opened.expert_map is None:
            raise UsageError(f"when {name}: a bias file has no scores to look at; name an expert map")
        return opened.expert_map, opened.path

    def _open(self, name: str) -> Steering:
        path = self._find(name)
        if path not in self._opened:
            is_bias = is_bias_file(path)
            self._opened[path] = Steering.open(bias=path) if is_bias else Steering.open(map_file=path)
        return self._opened[path]
