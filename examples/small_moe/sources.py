"""The packages that sources.toml names, and the documents that are made of them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A Debian package and which of its files are text for the model; sources.toml explains the fields."""

    name: str
    version: str
    kind: str
    files: tuple[str, ...]
    path: re.Pattern[str]
    licence: str
    language: str = ""
    main: str = ""
    without: tuple[str, ...] = ()
    archive: str = ""


def packages() -> list[Package]:
    """All packages, in the file's order."""
    data = tomllib.loads((Path(__file__).parent / "sources.toml").read_text("utf-8"))
    fields = {entry["name"]: entry for entry in data["package"]}
    found = []
    for entry in data["package"]:
        whole = {**fields.get(entry.get("like", ""), {}), **entry}
        whole.pop("like", None)
        whole["path"] = re.compile(whole["path"])
        for name in ("files", "without"):
            whole[name] = tuple(whole.get(name, ()))
        found.append(Package(**whole))
    return found


def lines(path: Path) -> Iterator[dict[str, str]]:
    """The documents that corpus.py wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
