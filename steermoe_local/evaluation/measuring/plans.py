"""Opens steering plans: rules in their text or object form, or a file of them, and what their names stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._util.files import StrPath
from ..._util.regular_files import open_regular
from ...errors import FormatError, UsageError
from ...maps.expert_map import ExpertMap
from ...models.shipped_maps import map_path
from ...steering.plan import SteeringPlan, map_of_condition, require_experts
from ...steering.plan_file import SUFFIXES, read_plan_file
from ...steering.plan_rules import RuleSpec, Where, shown
from ...steering.rules import DEFAULT_STRENGTH
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
    rules: Sequence[RuleSpec | str | Mapping[str, Any]] | Mapping[str, Any] | StrPath,
    *,
    name: str | None = None,
    find: Find = map_path,
    tell: Callable[..., None] = lambda *warnings: None,
) -> SteeringPlan:
    """Read a plan, its rules, `{"rules": [...]}` or the file that has them, and look up what the rules name.

    Names are those of maps and bias files as the command line takes them: paths, and names of maps (`map_path`); in a
    file also `NAME`, `NAME.json` and `NAME.gguf` beside it, which come first. `find` looks up others. A map without
    numbers is steered by as it recommends, and a soft rule without `scale` has `DEFAULT_STRENGTH`. `name` is shown to
    users. `tell` is called with warnings.

    Raises UsageError, FormatError, which name the rule; FormatError also where a name stands for another map or bias
    than when a server wrote the file.
    """
    path: Path | None = None
    made_of: Mapping[str, str] = {}
    listed: Sequence[RuleSpec | str | Mapping[str, Any]]
    if isinstance(rules, (str, os.PathLike)):
        path = Path(rules)
        if ":" in str(path) and not is_plan_file(path) and not os.path.lexists(path):
            raise UsageError(f"{path}: no such file; give rules as a list, like open_plan(['answer: formal +8 -8'])")
        read = read_plan_file(path)
        listed, made_of, name, find = read.rules, read.made_of, name or plan_name(path), beside(path, find)
    elif isinstance(rules, Mapping):
        if odd := next((key for key in rules if key != "rules"), None):
            raise UsageError(f"{shown(odd)}: not a part of a plan, which has rules alone; a rule stands in a list")
        listed = rules.get("rules", ())
    else:
        listed = rules
    files = _Files(find, tell)
    plan = SteeringPlan.open(listed, files.steering, files.expert_map, name=name or "plan", path=path)
    for named, digest in made_of.items():
        if (found := files.digest(named)) not in (None, digest):
            raise FormatError(
                f"{path}: {named} is not what the plan was made of ({found[:8]}, then {digest[:8]}); bring that back, "
                "or take made_of out"
            )
    return plan


def open_placement(where: Where, *, find: Find = map_path) -> SteeringPlan:
    """An `EvaluatorSettings.placement` of one window; what steers there is left open. Raises as `open_plan`."""
    files, steered = _Files(find, lambda *warnings: None), Steering("steered")
    return SteeringPlan.open([RuleSpec(where, steered.name)], lambda name, choice: steered, files.expert_map)


class _Files:
    """The maps and bias files that the rules of a plan name, each read once."""

    def __init__(self, find: Find, tell: Callable[..., None]) -> None:
        self._find, self._tell = find, tell
        self._opened: dict[Path, Steering] = {}
        self._named: dict[str, Steering] = {}

    def steering(self, name: str, choice: Mapping[str, Any]) -> Steering:
        """The steering of a rule. Raises UsageError, FormatError."""
        opened = self._open(name)
        if opened.expert_map is None or opened.path is None:
            return opened.with_choice(choice)[0]
        steering, warnings = opened.recommending(choice).with_choice(choice, strength=DEFAULT_STRENGTH)
        require_experts(name, steering, choice)
        self._tell(*warnings)
        return steering

    def expert_map(self, name: str) -> tuple[ExpertMap, Path | None]:
        """The map that a condition looks at. Raises UsageError, FormatError."""
        return map_of_condition(name, self._open(name))

    def digest(self, name: str) -> str | None:
        """The digest, as in `PlanFile.made_of`, of the map or bias that rules name so; None if none does."""
        opened = self._named.get(name)
        return None if opened is None else opened.source_sha256

    def _open(self, name: str) -> Steering:
        path = self._find(name)
        if path not in self._opened:
            is_bias = is_bias_file(path)
            self._opened[path] = Steering.open(bias=path) if is_bias else Steering.open(map_file=path)
        self._named[name] = self._opened[path]
        return self._opened[path]
