"""Files of steering plans: NAME.plan.json or NAME.plan.toml, with a list `rules` of texts and objects.

rules = ["thinking: none", "answer[0:32]: careful +0 -20"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._util.file_kinds import PLAN, require_kind
from .._util.files import StrPath, parse_json, read_bytes
from .._util.toml_text import TomlError, parse_toml
from ..errors import FormatError, UsageError
from .plan_objects import rules_from
from .plan_rules import RuleSpec

SUFFIXES = (".plan.json", ".plan.toml")
_MAX_BYTES = 256 << 10


def read_plan(path: StrPath) -> list[RuleSpec]:
    """Read the rules of a plan's file; TOML by its suffix, JSON otherwise. Raises FormatError, which names the rule."""
    path = Path(path)
    data = _parsed(path)
    if set(data) != {"rules"}:
        odd = next((name for name in data if name != "rules"), None)
        what = "has no rules" if odd is None else f"{odd}: not a part of a plan"
        raise FormatError(f"{path}: {what}; a plan has rules = [...] and nothing else")
    try:
        return rules_from(data["rules"])
    except UsageError as error:
        raise FormatError(f"{path}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    require_kind(path, "a steering plan", PLAN)
    raw = read_bytes(path, "a steering plan", _MAX_BYTES)
    try:
        text = raw.decode("utf-8")
        data = parse_toml(text) if path.suffix == ".toml" else parse_json(text)
    except TomlError as error:
        raise FormatError(f"{path}:{error.line or 1}: not a steering plan: not TOML ({error})") from None
    except ValueError as error:
        raise FormatError(f"{path}: not a steering plan: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise FormatError(f'{path}: not a steering plan, which is an object {{"rules": [...]}}')
    return data
