"""Steering plans of the command line: rules in their text form, and what their names stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..._util.regular_files import open_regular
from ...errors import UsageError
from ...models.shipped_maps import map_path, recommended_numbers
from ...steering.plan_file import SUFFIXES
from ...steering.plan_rules import RuleSpec
from ...steering.plan_text import parse_where, split_rules
from ..output import warn

if TYPE_CHECKING:
    from ...maps.expert_map import ExpertMap
    from ...steering.plan import SteeringPlan
    from ...steering.steering import Steering

Find = Callable[[str], Path]
"""The file of a map or bias file by what a rule calls it. Raises UsageError for a name that nothing has."""


class RuleText(click.types.StringParamType):
    """A rule of a plan in its text form; semicolons separate those of an environment variable."""

    name = "rule"

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """The rules of a variable."""
        return split_rules(rv)


class WhereText(click.types.StringParamType):
    """A place in the text form of rules, like `answer[0:32]`; it stays the text."""

    name = "where"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text. Fails for one that is no place."""
        text = super().convert(value, param, ctx)
        try:
            parse_where(str(text))
        except UsageError as error:
            self.fail(f"{error}.", param, ctx)
        return text


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
    rules: Sequence[RuleSpec | str | Mapping[str, Any]],
    *,
    name: str = "plan",
    path: Path | None = None,
    find: Find = map_path,
    tell: Callable[..., None] = warn,
) -> SteeringPlan:
    """Look up what rules name. `path` is the file that they come from; `tell` takes warnings.

    A shipped map without numbers gets those of its card. Raises UsageError, FormatError, which name the rule.
    """
    from ...steering.plan import SteeringPlan

    files = _Files(find if path is None else beside(path, find), tell)
    return SteeringPlan.open(rules, files.steering, files.expert_map, name=name, path=path)


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
        from ...steering.steering import Steering

        path = self._find(name)
        if path not in self._opened:
            is_bias = is_bias_file(path)
            self._opened[path] = Steering.open(bias=path) if is_bias else Steering.open(map_file=path)
        return self._opened[path]
