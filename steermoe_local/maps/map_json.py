"""The file of an expert map, as text and back.

It is JSON with one row of scores a line, so that it can be read, compared and sent:

    {"format": "steermoe-expert-map", "version": 2, "model": {...},
     "behaviour": {"name": ..., "positive": ..., "negative": ...},
     "n1": ..., "n2": ..., "n_pairs": ..., "pairs_sha256": [...], "dates": [...], "until_stable": {...}, "phase": ...,
     "recommended": {"choice": {...}, ...},
     "tool": ..., "created": ..., "license": ..., "notes": ..., "confidence": {...},
     "rd": [[...], ...], "a1": [[...], ...], "a2": [[...], ...], "se": [[...], ...],
     "logit": [[...], ...], "weight": [[...], ...], "attribution": {...}, "effects": [{...}, ...]}

`rd` is [n_layer, n_expert]; the counts `a1` and `a2` are optional, and so are the standard errors `se` with their
`confidence`, the scores `logit` and `weight`, and the `effects` of interventions with their `attribution`. A map
without the last four is of version 1. `dates` are those that the chat template printed, left out where it prints none;
`until_stable` is there where the run was to end early, `phase` where the map is of one phase of the targets,
`recommended` where it recommends a choice of experts. Numbers are written so that they read back as the same float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..errors import FormatError
from ..identity import ModelIdentity
from .confidence import Confidence
from .effects import Attribution, Effects
from .map_phases import read_phase
from .recommended import Recommended
from .stability import Stability

FORMAT = "steermoe-expert-map"
VERSION = 2  # of maps with a field of _NEW; the others are written as version 1, which older readers take
AGAIN = "run steermoe detect again"
COUNTS = ("n1", "n2", "n_pairs")
_NEW = {"logit", "weight", "effects", "attribution"}
_REQUIRED = {"format", "version", "model", "behaviour", "rd"}
_TEXTS = ("tool", "created", "license", "notes")
_BEHAVIOUR = ("name", "positive", "negative")
_TABLES = ("rd", "a1", "a2", "se", "logit", "weight")
_OPTIONAL = {"pairs_sha256", "dates", "until_stable", "phase", "recommended", "confidence"}
_KNOWN = _REQUIRED | {*COUNTS, *_TEXTS, *_TABLES} | _OPTIONAL | _NEW


def map_text(expert_map: Any, recommended: bool = True) -> str:
    """The text of the file of an `ExpertMap`; the same map gives the same text.

    Without `recommended` it is that of the map without its recommended choice.
    """
    m = expert_map
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION if any(getattr(m, name, None) is not None for name in _NEW) else 1,
        "model": m.identity.to_dict(),
        "behaviour": {"name": m.behaviour, "positive": m.positive, "negative": m.negative},
        **{name: getattr(m, name) for name in COUNTS},
        "pairs_sha256": list(m.pairs_sha256),
        **({"dates": list(m.dates)} if m.dates else {}),
        **({"until_stable": m.stability.to_dict()} if m.stability else {}),
        **({"phase": m.phase} if m.phase else {}),
        **({"recommended": m.recommended.to_dict()} if recommended and m.recommended else {}),
        **{name: getattr(m, name) for name in _TEXTS if getattr(m, name)},
        **({"confidence": m.confidence.to_dict()} if m.confidence else {}),
    }
    text = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
    for name in _TABLES:
        table = getattr(m, name)
        if table is not None:
            text += _lines(name, table.tolist())
    if m.effects is not None:
        text += f',\n "attribution": {json.dumps(m.effects.facts.to_dict(), ensure_ascii=False)}'
        text += _lines("effects", m.effects.rows())
    return text + "\n}\n"


def _lines(name: str, rows: Iterable[Any]) -> str:
    """A list, one row a line."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return f',\n "{name}": [\n{lines}\n ]'


def map_fields(data: object) -> dict[str, Any]:
    """The arguments of `ExpertMap` in the parsed JSON of its file. Raises FormatError, which names the field."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f'not an expert map (no "format": "{FORMAT}" in it); {AGAIN}')
    version = data.get("version")
    if isinstance(version, bool) or version not in (1, VERSION):  # True is 1 to Python
        raise FormatError(
            f"an expert map of version {version!r}, this program reads 1 to {VERSION}; upgrade steermoe-local"
        )
    _check(data)
    return {
        "identity": ModelIdentity.from_dict(data["model"]),
        "behaviour": data["behaviour"]["name"],
        "positive": data["behaviour"].get("positive", ""),
        "negative": data["behaviour"].get("negative", ""),
        "pairs_sha256": tuple(data.get("pairs_sha256", ())),
        "dates": data.get("dates", ()),
        **{name: data.get(name, 0) for name in COUNTS},
        **{name: data.get(name, "") for name in _TEXTS},
        **{name: data[name] for name in _TABLES if name in data},
        "confidence": Confidence.from_dict(data["confidence"]) if "confidence" in data else None,
        "stability": Stability.from_dict(data["until_stable"]) if "until_stable" in data else None,
        "effects": _effects(data),
        "recommended": Recommended.from_dict(data["recommended"]) if "recommended" in data else None,
        "phase": read_phase(data, AGAIN),
    }


def _effects(data: dict[str, Any]) -> Effects | None:
    if ("effects" in data) != ("attribution" in data):
        raise FormatError("effects, attribution: only one of them is there; give both or none")
    if "effects" not in data:
        return None
    return Effects.from_rows(Attribution.from_dict(data["attribution"]), data["effects"])


def _check(data: dict[str, Any]) -> None:
    """Raise FormatError for fields that are missing, unknown in this version, or of another type than text."""
    known = _KNOWN if data["version"] == VERSION else _KNOWN - _NEW
    if missing := sorted(_REQUIRED - set(data)):
        raise FormatError(f"{missing[0]}: missing; {AGAIN}")
    if unknown := sorted(set(data) - known):
        if unknown[0] in _NEW:
            raise FormatError(f"{unknown[0]}: belongs to version {VERSION}, and the file says 1; {AGAIN}")
        raise FormatError(f"{unknown[0]}: unknown field; put remarks into notes")
    behaviour = data["behaviour"]
    if not isinstance(behaviour, dict) or not {"name"} <= set(behaviour) <= set(_BEHAVIOUR):
        raise FormatError("behaviour: not an object with name, positive, negative")
    texts = {f"behaviour.{key}": value for key, value in behaviour.items()}
    texts |= {name: data[name] for name in _TEXTS if name in data}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise FormatError(f"{name}: not a string; put it in quotes")
    if nothing := sorted(name for name in _TABLES if data.get(name, ()) is None):
        raise FormatError(f"{nothing[0]}: null; leave it out, or give the table")
    if not isinstance(data.get("pairs_sha256", []), list):
        raise FormatError(f"pairs_sha256: not a list; {AGAIN}")
