"""The expert maps that ship with the package, by name."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

from .._util.package import PACKAGE
from ..errors import UsageError
from .embedded import behaviours


def shipped_maps() -> dict[str, Path]:
    """Name and file of each shipped map; all are maps of the embedded model."""
    installed = PACKAGE / "expert_maps"
    folder = installed if installed.is_dir() else PACKAGE.parent / "expert_maps"  # of a source tree
    return {path.stem: path for path in sorted((folder / "tiny").glob("*.json"))}


def map_path(name: str | os.PathLike[str]) -> Path:
    """Path of the map that the command line names: a file, else a shipped map (`digits-words`, `tiny/digits-words`).

    Raises UsageError, which names the shipped maps.
    """
    text = os.path.expanduser(name)
    path = Path(text)
    if os.path.exists(path):  # false for a name that no system can have
        return path
    shipped = shipped_maps()
    if found := shipped.get(text.removeprefix("tiny/")):
        return found
    if path.suffix == "" and path.name == text:
        raise UsageError(f"{text}: neither a file nor a map that ships ({', '.join(shipped)}); check the name")
    return path


def recommended_numbers(path: Path) -> tuple[int, int] | None:
    """The numbers of experts to activate and deactivate that the model's card recommends for a shipped map or its copy.

    None for other files.
    """
    shipped = shipped_maps().get(path.stem)
    try:
        if shipped is None or not filecmp.cmp(shipped, path, shallow=False):
            return None
    except OSError:
        return None
    return next(((b.n_activate, b.n_deactivate) for b in behaviours() if b.name == path.stem), None)
