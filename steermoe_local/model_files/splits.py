"""Names of the parts of split models: llama.cpp's NAME-00001-of-0000N.gguf (llama_split_path)."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})", re.DOTALL)


def split_name(stem: str) -> tuple[str, int, int] | None:
    """(prefix, number of the part, number of parts) of a name without ".gguf"; None for another name."""
    match = _NAME.fullmatch(stem)
    return (match[1], int(match[2]), int(match[3])) if match and 1 <= int(match[2]) <= int(match[3]) else None


def part_paths(path: Path) -> tuple[Path, ...]:
    """Paths of all parts, in order, of the split model that `path` is a part of by its name; () for another name."""
    found = split_name(path.stem) if path.suffix == ".gguf" else None
    if found is None:
        return ()
    prefix, _, count = found
    return tuple(path.with_name(f"{prefix}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def missing_part(parts: tuple[Path, ...]) -> str:
    """The message about the first part that does not exist, "" if all do."""
    for part in parts:
        if not part.exists():
            return f"{part}: missing; fetch all {len(parts)} parts into one folder"
    return ""


def why_not_loaded(path: Path) -> str:
    """Why llama.cpp cannot load a part of a split model, judged by its name; "" if it can."""
    parts = part_paths(path)
    if path in parts[1:]:
        return f"{path}: part {parts.index(path) + 1} of {len(parts)} of a split model; give the first, {parts[0]}"
    return missing_part(parts)
