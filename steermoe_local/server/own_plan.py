"""The plan of the server's own command line, as clients may see it."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UsageError
from ..steering.plan import PlanRule
from .maps_folder import name_of_file
from .plans import with_all
from .schemas_plans import is_name


def without_folders(rule: PlanRule) -> PlanRule:
    """A rule with all that it chooses, whose maps are called as their files are. Raises UsageError."""
    spec, where = rule.spec, rule.spec.where
    if rule.steering is not None and rule.steering.path is not None:
        spec = replace(spec, name=name_of_file(rule.steering.path))
    if where.when is not None and rule.looks_at_path is not None:
        spec = replace(spec, where=replace(where, when=replace(where.when, map=name_of_file(rule.looks_at_path))))
    return with_all(replace(rule, spec=spec))


def require_plan_name(name: str) -> None:
    """Raise UsageError for a plan's name that no request could give."""
    if not is_name(name):
        raise UsageError(f"{name!r}: not a name for requests; take letters, digits, '.', '_' and '-'")
