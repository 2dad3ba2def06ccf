"""Expert maps by name: those that ship with the package, and those of the user's maps folder."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

from .._util.closest import did_you_mean
from .._util.package import PACKAGE
from ..errors import UsageError
from .user_maps import MAP_FILE, user_maps, user_maps_folder, without_map


def shipped_maps() -> dict[str, Path]:
    """Name and file of each shipped map, of all models that ship, each in a folder of its model's name."""
    installed = PACKAGE / "expert_maps"
    folder = installed if installed.is_dir() else PACKAGE.parent / "expert_maps"  # of a source tree
    return {path.stem: path for path in sorted(folder.glob("*/*.json"))}


def shipped_map(name: str) -> Path | None:
    """The file of a shipped map by its name, alone or behind its model's: `digits-words`, `tiny/digits-words`."""
    path = shipped_maps().get(name.rpartition("/")[2])
    return path if path is not None and name in (path.stem, f"{path.parent.name}/{path.stem}") else None


def known_maps() -> dict[str, Path]:
    """Name and file of each map that has a name: the shipped ones, and the user's, which come first."""
    return shipped_maps() | user_maps()


def shipped_name(path: Path | None) -> str | None:
    """The name of a shipped map, by its file or an equal copy of that name; None for other files."""
    shipped = None if path is None else shipped_maps().get(path.stem)
    try:
        return path.stem if path and shipped and filecmp.cmp(shipped, path, shallow=False) else None
    except OSError:
        return None


def map_path(name: str | os.PathLike[str]) -> Path:
    """Path of the map that the command line names.

    A file; the folder of a learnt steering; else a map of the user's maps folder by name; else a shipped map
    (`digits-words`, `tiny/digits-words`).

    Raises UsageError, which names the maps that there are.
    """
    text = os.path.expanduser(name)
    path = Path(text)
    is_name = path.name == text and path.suffix not in (".json", ".gguf")
    if os.path.isdir(path) and os.path.isfile(path / MAP_FILE):
        return path / MAP_FILE
    if os.path.exists(path) and not (is_name and os.path.isdir(path)):  # false for a name that no system can have
        return path
    if found := known_maps().get(text) or shipped_map(text):
        return found
    if is_name and not os.path.exists(path):
        if why := without_map(text):
            raise UsageError(f"{text}: no map yet: {why}")
        known = ", ".join(known_maps())
        raise UsageError(
            f"{text}: neither a file nor a map ({known}; yours are in {user_maps_folder()})"
            f"{did_you_mean(text, known_maps()) or '; check the name'}"
        )
    return path
