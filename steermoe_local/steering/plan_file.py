"""Files of steering plans: NAME.plan.json or NAME.plan.toml, with a list `rules` of texts and objects.

rules = ["thinking: none", "answer[0:32]: careful +0 -20"]

A file that a server wrote has `made_of`, too: the digest of the map or bias behind each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._util.file_kinds import PLAN, require_kind
from .._util.files import StrPath, is_sha256, parse_json, read_bytes
from .._util.toml_text import TomlError, parse_toml
from ..errors import FormatError, UsageError
from .plan_objects import rules_from
from .plan_rules import RuleSpec, shown

SUFFIXES = (".plan.json", ".plan.toml")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class PlanFile:
    """What a plan's file holds: its rules, and by name the digests of the maps and biases that they were made of.

    A digest is `ExpertMap.sha256` or `BiasFile.key`. Files that people write have none.
    """

    rules: tuple[RuleSpec, ...]
    made_of: Mapping[str, str] = field(default_factory=dict)


def read_plan(path: StrPath) -> list[RuleSpec]:
    """Read the rules of a plan's file; TOML by its suffix, JSON otherwise. Raises FormatError, which names the rule."""
    return list(read_plan_file(path).rules)


def read_plan_file(path: StrPath) -> PlanFile:
    """Read a plan's file, as `read_plan`, with what its rules were made of. Raises FormatError."""
    path = Path(path)
    data = _parsed(path)
    if "rules" not in data or data.keys() - {"rules", "made_of"}:
        odd = next((name for name in data if name not in ("rules", "made_of")), None)
        what = "has no rules" if odd is None else f"{shown(odd)}: not a part of a plan"
        raise FormatError(f"{path}: {what}; a plan has rules = [...], and made_of if a server wrote it")
    made_of = data.get("made_of", {})
    if not isinstance(made_of, dict) or not all(map(is_sha256, made_of.values())):
        raise FormatError(f"{path}: made_of: not digests by names; leave it out")
    try:
        return PlanFile(tuple(rules_from(data["rules"])), made_of)
    except UsageError as error:
        raise FormatError(f"{path}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    require_kind(path, "a steering plan", PLAN)
    raw = read_bytes(path, "a steering plan", _MAX_BYTES)
    is_toml = path.suffix == ".toml"
    try:
        text = raw.decode("utf-8")
        data = parse_toml(text) if is_toml else parse_json(text)
    except TomlError as error:
        raise FormatError(f"{path}:{error.line or 1}: not a steering plan: not TOML ({error})") from None
    except ValueError as error:
        raise FormatError(f"{path}: not a steering plan: not {'TOML' if is_toml else 'JSON'} ({error})") from None
    if not isinstance(data, dict):
        raise FormatError(f'{path}: not a steering plan, which is an object {{"rules": [...]}}')
    return data
