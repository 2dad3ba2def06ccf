"""The user's maps folder: maps and learnt steerings by name.

A learnt steering NAME is a folder `FOLDER/NAME/` with `map.json`, and beside it what it was made of and measured by
(`pairs.jsonl`, `task.jsonl`, `report.md`, ...). A map alone is `FOLDER/NAME.json`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .._util.windows import is_device
from ..errors import UsageError

ENVIRONMENT = "STEERMOE_MAPS"
MAP_FILE = "map.json"
PAIRS_FILE = "pairs.jsonl"
TASK_FILE = "task.jsonl"
RESULT_FILE = "learn.json"  # written last
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Endings of a file's name that make it another thing than a map.
_OTHERS = (".choice.json", ".plan.json")


def user_maps_folder() -> Path:
    """The user's maps folder, which need not exist: $STEERMOE_MAPS, else the folder for the user's data."""
    if given := os.environ.get(ENVIRONMENT):
        return Path(os.path.expanduser(given))
    from platformdirs import user_data_path

    return user_data_path("steermoe-local", appauthor=False) / "maps"


def check_map_name(name: str) -> str:
    """Return a name for a map in the folder. Raises UsageError for one that no map there can have."""
    if not _NAME.fullmatch(name) or f"{name}.json".endswith(_OTHERS):
        raise UsageError(
            f"{name!r} is no name for a map; take small letters, digits, '.', '_' and '-', at most 64, a letter or "
            "digit first, without .choice or .plan at the end"
        )
    if is_device(name) or name.endswith("."):  # refused everywhere: the folder may be carried to another machine
        raise UsageError(f"{name!r} cannot be the name of a folder on Windows; take another name")
    if name == "none":
        raise UsageError("'none' stands for no steering; take another name")
    return name


def maps_in(folder: Path) -> dict[str, Path]:
    """Name and file of each map in a folder laid out like the user's, by name; learnt ones before loose files.

    What cannot be read is left out, and so are names that no map can have.
    """
    found: dict[str, Path] = {}
    try:
        there = sorted(folder.iterdir())
    except OSError:  # none, or not to be read
        return {}
    for path in there:
        if path.name.endswith(".json") and not path.name.endswith(_OTHERS) and _is_file(path):
            found.setdefault(path.name.removesuffix(".json"), path)
        elif _is_file(path / MAP_FILE):
            found[path.name] = path / MAP_FILE
    return {name: found[name] for name in sorted(found) if _NAME.fullmatch(name)}


def user_maps() -> dict[str, Path]:
    """Name and file of each map in the user's maps folder, by name."""
    return maps_in(user_maps_folder())


def is_learnt(path: Path) -> bool:
    """Whether a map's file is that of a learnt steering: NAME/map.json with its pairs or task beside it."""
    return path.name == MAP_FILE and any(_is_file(path.with_name(name)) for name in (PAIRS_FILE, TASK_FILE))


def map_label(path: Path) -> str:
    """What a map's file is called: NAME of NAME/map.json and of NAME.json."""
    return path.absolute().parent.name if path.name == MAP_FILE else path.stem


def beside_map(path: Path | None, name: str) -> Path | None:
    """A file of a learnt steering, by the path of its map; None where the map is no learnt one or lacks the file."""
    if path is None or path.name != MAP_FILE:
        return None
    found = path.with_name(name)
    return found if _is_file(found) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
