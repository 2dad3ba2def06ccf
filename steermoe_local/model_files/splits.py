"""Names of the parts of split models: llama.cpp's NAME-00001-of-0000N.gguf (llama_split_path)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})", re.DOTALL)


def split_name(stem: str) -> tuple[str, int, int] | None:
    """(prefix, number of the part, number of parts) of a name without ".gguf"; None for another name."""
    match = _NAME.fullmatch(stem)
    return (match[1], int(match[2]), int(match[3])) if match and 1 <= int(match[2]) <= int(match[3]) else None


@dataclass(frozen=True)
class SplitPaths:
    """The paths of a split model by the name of one part; made one at a time, since a name may speak of 99,999."""

    given: Path
    prefix: str
    number: int
    count: int

    @classmethod
    def of(cls, path: Path) -> SplitPaths | None:
        """None for a name that is not that of a part."""
        found = split_name(path.stem) if path.suffix == ".gguf" else None
        return None if found is None else cls(path, *found)

    def __iter__(self) -> Iterator[Path]:
        return (self.part(number) for number in range(1, self.count + 1))

    def part(self, number: int) -> Path:
        """The path of a part, counted from 1."""
        return self.given.with_name(f"{self.prefix}-{number:05d}-of-{self.count:05d}.gguf")

    def missing(self) -> str:
        """The message about the first part that does not exist, "" if all do."""
        for part in self:
            if not part.exists():
                return f"{part}: missing; fetch all {self.count} parts into one folder"
        return ""


def why_not_loaded(path: Path) -> str:
    """Why llama.cpp cannot load a part of a split model, judged by its name; "" if it can."""
    parts = SplitPaths.of(path)
    if parts is None:
        return ""
    if parts.number > 1:
        return f"{path}: part {parts.number} of {parts.count} of a split model; give the first, {parts.part(1)}"
    return parts.missing()
