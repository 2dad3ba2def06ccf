"""Results as plain JSON values, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steermoe_local.evaluation.measuring.json_values import from_plain, plain


@dataclass(frozen=True)
class Part:
    value: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    named: Mapping[str, Part | None]
    path: Path
    one: Part | None = None
    facts: dict[str, Any] = field(default_factory=dict, metadata={"json": "about"})
    hidden: tuple[int, ...] = ()


WHOLE = Whole(
    (Part(0.5, ("a", "b")), Part(1)),
    {"x": Part(2), "y": None},
    Path("file"),
    facts={"n": [1, {"m": None}]},
    hidden=(1,),
)


def test_what_is_written() -> None:
    assert list(plain(WHOLE)) == ["parts", "named", "path", "one", "about", "hidden"], "in the order of the fields"
    data = plain(WHOLE, without=["hidden"])
    assert data == {
        "parts": [{"value": 0.5, "names": ["a", "b"]}, {"value": 1, "names": []}],
        "named": {"x": {"value": 2, "names": []}, "y": None},
        "path": "file",
        "one": None,
        "about": {"n": [1, {"m": None}]},
    }
    assert plain(Whole((), {}, Path("/a/folder/file")))["path"] == "file", "no folders of this machine"


def test_what_is_read() -> None:
    assert from_plain(Whole, json.loads(json.dumps(plain(WHOLE)))) == WHOLE
    data = {**plain(WHOLE, without=["hidden"]), "other": 1}
    assert from_plain(Whole, data).hidden == (), "what is not there has its default, what is not known is left"
    assert from_plain(Whole | None, None) is None
    assert from_plain(Whole | None, data).one is None
